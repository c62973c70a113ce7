//! The crash-proof reference count of a running server.
//!
//! Beside each server runs a small shell script that reads a FIFO. Everyone who uses the server keeps a write end
//! of it open. The kernel closes it on exit, on panic and on kill -9, so the script sees end-of-file exactly when the
//! last user has gone, whatever became of it. Then it stops the server and removes its folder.

use crate::{
    account::Account,
    binaries::Server,
    error::{Context, Result},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Child,
};

/// Arguments: the folder of the programs, the folder of this server, the seconds to linger.
///
/// Each user writes one byte as it comes in, so `n` is zero only if nobody came while the script was sleeping. Whoever
/// came in before the sign `open` was taken down may stay: that is what the second `cat` waits for.
const SCRIPT: &str = r#"
bin=$1 dir=$2 linger=$3
trap '' HUP INT TERM
cd /
while n=$(cat | wc -c) && [ "$n" -gt 0 ]; do sleep "$linger"; done
rm -f "$dir/open"
cat >/dev/null
if [ -f "$dir/data/postmaster.pid" ]; then
    "$bin/pg_ctl" stop -m immediate -w -t 10 -D "$dir/data" || kill -9 "$(head -n 1 "$dir/data/postmaster.pid")"
fi
rm -rf "$dir" || { sleep 1; rm -rf "$dir"; }
"#;

/// `O_NONBLOCK`, which the standard library does not name.
const NON_BLOCKING: i32 = if cfg!(any(target_os = "linux", target_os = "android")) { 0o4000 } else { 0x4 };

/// Keeps a server alive for as long as it exists. Not inherited by child processes.
#[derive(Debug)]
pub(crate) struct Lease {
    _write_end: File,
}

impl Lease {
    /// Joins the users of the server in `dir`; `None` when its supervisor has gone.
    pub(crate) fn join(dir: &Path) -> Option<Lease> {
        let mut write_end = open_write_end(dir).ok()?;
        write_end.write_all(b"x").ok()?;
        Some(Lease { _write_end: write_end })
    }
}

/// Whether a supervisor looks after `dir`.
pub(crate) fn is_supervised(dir: &Path) -> bool {
    open_write_end(dir).is_ok()
}

/// Starts the supervisor of `dir` and returns the first lease on it; who drops that should reap the child.
///
/// The script gets the read end as its standard input, opened here while a write end exists: were it to open the FIFO
/// by itself, it would wait for ever if we died in between.
pub(crate) fn supervise(
    account: &Account,
    server: &Server,
    dir: &Path,
    linger: f64,
) -> Result<(Lease, Child)> {
    let fifo = dir.join("fifo");
    let mut mkfifo = account.command("mkfifo", dir);
    mkfifo.args(["-m", "600"]).arg(&fifo);
    account.run(mkfifo)?;

    let open = || -> io::Result<(File, File)> {
        let both = OpenOptions::new().read(true).write(true).open(&fifo)?;
        let read_end = File::open(&fifo)?;
        let write_end = open_write_end(dir)?;
        drop(both);
        Ok((read_end, write_end))
    };
    let (read_end, mut write_end) = open().context(|| format!("cannot open {}", fifo.display()))?;
    let mut sh = account.command("sh", dir);
    sh.args(["-c", SCRIPT, "lastprice-testkit"]).arg(server.bindir()).arg(dir).arg(linger.to_string());
    let child = sh.stdin(read_end).spawn().context(|| "cannot start the supervisor `sh`".to_owned())?;
    // `sh` holds the only other read end now: it was moved into the command, which ends here.
    drop(sh);
    write_end.write_all(b"x").context(|| "the supervisor `sh` has died".to_owned())?;
    Ok((Lease { _write_end: write_end }, child))
}

/// Takes `dir` down, which nobody supervises any more: its supervisor was killed, or never started.
pub(crate) fn bury(account: &Account, server: &Server, dir: &Path) {
    if dir.join("data/postmaster.pid").exists() {
        let mut stop = account.command(server.path_of("pg_ctl"), dir);
        stop.args(["stop", "-m", "immediate", "-w", "-t", "10", "-D"]).arg(dir.join("data"));
        let _ = stop.status();
    }
    let _ = fs::remove_dir_all(dir);
}

/// Fails with ENXIO when nobody reads.
fn open_write_end(dir: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).custom_flags(NON_BLOCKING).open(dir.join("fifo"))
}
