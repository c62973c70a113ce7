//! Tests of the testkit itself, against real servers.

mod databases;
mod external;
mod private;
mod processes;
mod webhooks;

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

/// A folder of its own for a test, whose servers are then its own as well.
struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lptk-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = env::temp_dir().join(name);
        fs::create_dir(&dir).unwrap();
        // Root's tests run some processes as somebody else.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        Scratch { dir }
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// This test binary again, as another process: it runs the ignored test `name` and nothing else. The child has to
    /// be told that it is one, so that `cargo test -- --ignored` is harmless.
    fn child(&self, program: &Path, name: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
        for variable in ["TEST_DATABASE_URL", "DATABASE_URL", "TMPDIR"] {
            command.env_remove(variable);
        }
        command.env("LASTPRICE_TESTKIT_DIR", self.state()).env("LASTPRICE_TESTKIT_LINGER", "0.2");
        command.env("TESTKIT_CHILD", &self.dir);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command
    }

    fn spawn(&self, name: &str) -> Child {
        self.child(&env::current_exe().unwrap(), name).spawn().unwrap()
    }

    /// The folders of the servers that run here.
    fn servers(&self) -> Vec<PathBuf> {
        let run = fs::read_dir(self.state().join("run")).into_iter().flatten().flatten();
        run.map(|entry| entry.path()).collect()
    }

    /// Waits until the last server has gone, with its process and its folder.
    fn wait_until_empty(&self, postmasters: &[u32]) {
        wait_for("the servers to go", || {
            self.servers().is_empty() && !postmasters.iter().any(|pid| is_running(*pid))
        });
    }

    /// The process number of the one server that runs here.
    fn postmaster(&self) -> u32 {
        let servers = self.servers();
        assert_eq!(servers.len(), 1, "{servers:?}");
        postmaster_of(&servers[0])
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn postmaster_of(server: &Path) -> u32 {
    let text = fs::read_to_string(server.join("data/postmaster.pid")).unwrap();
    text.lines().next().unwrap().trim().parse().unwrap()
}

/// A zombie, which nobody has reaped, does not run.
fn is_running(pid: u32) -> bool {
    let output = Command::new("ps").args(["-o", "stat=", "-p", &pid.to_string()]).output().unwrap();
    let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    !state.is_empty() && !state.starts_with('Z')
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        sleep(Duration::from_millis(20));
    }
}

/// Whether this process has been started by a test, see [`Scratch::child`].
fn is_child() -> bool {
    env::var_os("TESTKIT_CHILD").is_some()
}
