//! Who runs the server. PostgreSQL refuses to run as root, and in a container the tests usually are root.

use crate::error::{Context, Error, Result};
use std::{
    env,
    ffi::OsStr,
    io,
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

/// The account of `initdb`, the server and its supervisor.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    /// Who we are.
    pub(crate) caller: u32,
    /// Who the server is; differs from the caller only when that is root.
    uid: u32,
    gid: u32,
}

impl Account {
    pub(crate) fn find() -> Result<Account> {
        let caller =
            id(&["-u"]).ok_or_else(|| Error::new("cannot find out who we are: `id -u` does not answer"))?;
        if caller != 0 {
            return Ok(Account { caller, uid: caller, gid: id(&["-g"]).unwrap_or(caller) });
        }
        ["postgres", "nobody"]
            .iter()
            .find_map(|name| Some(Account { caller, uid: id(&["-u", name])?, gid: id(&["-g", name])? }))
            .ok_or_else(|| {
                Error::new(
                    "PostgreSQL does not run as root, and there is no user `postgres` or `nobody`: add one",
                )
            })
    }

    pub(crate) fn differs(&self) -> bool {
        self.caller != self.uid
    }

    /// A command that runs as the server's account in `dir`, in a process group of its own (so that Ctrl-C and
    /// test runners leave it alone), with nothing of our environment that could change what PostgreSQL does.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear();
        for name in ["PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"] {
            if let Some(value) = env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("LC_ALL", "C").env("TZ", "UTC").current_dir(dir).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if self.differs() {
            // The standard library gives up root's supplementary groups as well.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Runs such a command to its end; its complaint is part of the error.
    pub(crate) fn run(&self, mut command: Command) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let user = self.uid;
        let output = command
            .stderr(Stdio::piped())
            .output()
            .context(|| format!("cannot run {program} as user {user}; may that user read and execute it?"))?;
        if output.status.success() {
            return Ok(());
        }
        let complaint = io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        Err(complaint).context(|| format!("{program} failed ({})", output.status))
    }

    /// Hands over a file or folder that we have just made.
    pub(crate) fn give(&self, path: &Path) -> Result<()> {
        if !self.differs() {
            return Ok(());
        }
        chown(path, Some(self.uid), Some(self.gid))
            .context(|| format!("cannot give {} to user {}", path.display(), self.uid))
    }

    /// Whether the server's account can enter a folder: root's own TMPDIR is often closed to others.
    pub(crate) fn can_enter(&self, dir: &Path) -> bool {
        !self.differs() || self.command("true", dir).status().is_ok_and(|status| status.success())
    }
}

fn id(arguments: &[&str]) -> Option<u32> {
    let output =
        Command::new("id").args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    if !output.status.success() {
        return None;
    }
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}
