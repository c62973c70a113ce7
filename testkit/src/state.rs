//! The folder where everything of ours lives, below the temporary directory.
//!
//! ```text
//! lastprice-testkit-<uid>/     ours
//!     lock                     held while a server is joined, made or buried
//!     initdb-<version>-<hash>/ a fresh data directory, made once and copied for each server; stays
//!     run/                     the server's account's
//!         s<pid>-<n>/          a shared server: data/ fifo log open .s.PGSQL.5432
//!         p<pid>-<n>/          a private one
//! ```

use crate::{
    account::Account,
    binaries::Server,
    error::{Context, Error, Result},
    supervisor::{self, Lease},
};
use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{self, Child},
    sync::atomic::{AtomicU32, Ordering},
};

/// The longest path that a Unix socket can have.
const SOCKET_PATH_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };
/// What comes after the state directory in the longest socket path of ours.
const SOCKET_SUFFIX: &str = "/run/p4194304-99/.s.PGSQL.65535";

/// The state directory, and what one needs to make servers in it.
#[derive(Debug, Clone)]
pub(crate) struct State {
    base: PathBuf,
    pub(crate) account: Account,
    pub(crate) server: Server,
}

/// Held while servers are joined, made or buried; the kernel releases it, whatever becomes of us.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// The folder of one server, with its supervisor; the server itself is not there yet.
#[derive(Debug)]
pub(crate) struct Plot {
    pub(crate) dir: PathBuf,
    pub(crate) lease: Lease,
    pub(crate) supervisor: Child,
}

impl State {
    pub(crate) fn open() -> Result<State> {
        let server = Server::find()?;
        let account = Account::find()?;
        let base = match env::var_os("LASTPRICE_TESTKIT_DIR").filter(|value| !value.is_empty()) {
            Some(given) => usable(PathBuf::from(given), &account)?,
            None => {
                let name = format!("lastprice-testkit-{}", account.caller);
                // A TMPDIR may be too long for a socket, or closed to the server's account. /tmp is neither.
                usable(env::temp_dir().join(&name), &account)
                    .or_else(|error| usable(Path::new("/tmp").join(&name), &account).map_err(|_| error))?
            }
        };
        let run = base.join("run");
        make_dir(&run, 0o700)?;
        account.give(&run)?;
        Ok(State { base, account, server })
    }

    pub(crate) fn lock(&self) -> Result<Lock> {
        let path = self.base.join("lock");
        let open = || -> io::Result<File> {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        open().map(|file| Lock { _file: file }).context(|| format!("cannot lock {}", path.display()))
    }

    /// The folders of all servers, ours and other processes'.
    pub(crate) fn plots(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.base.join("run")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Makes the folder of a new server: `kind` is the first letter of its name.
    pub(crate) fn make_plot(&self, kind: char, linger: f64, _lock: &Lock) -> Result<Plot> {
        // Nobody can be making one while we hold the lock, so what has no supervisor has lost it.
        for dir in self.plots() {
            if !supervisor::is_supervised(&dir) {
                supervisor::bury(&self.account, &self.server, &dir);
            }
        }
        self.ensure_initdb()?;
        let dir = self.new_dir(kind)?;
        let supervised = self.account.give(&dir);
        match supervised.and_then(|()| supervisor::supervise(&self.account, &self.server, &dir, linger)) {
            Ok((lease, supervisor)) => Ok(Plot { dir, lease, supervisor }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    /// Copies a fresh data directory there; takes a while, and needs no lock.
    pub(crate) fn fill(&self, plot: &Plot) -> Result<()> {
        let mut copy = self.account.command("cp", &plot.dir);
        copy.arg("-Rp").arg(self.cached_initdb()).arg(plot.dir.join("data"));
        self.account.run(copy)
    }

    fn new_dir(&self, kind: char) -> Result<PathBuf> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let dir = self.base.join("run").join(format!("{kind}{}-{n}", process::id()));
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(dir),
                // A process that had our number before may have a server that is still stopping.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(|| format!("cannot create {}", dir.display())),
            }
        }
    }

    fn cached_initdb(&self) -> PathBuf {
        self.base.join(format!("initdb-{}", self.server.tag()))
    }

    /// Runs initdb once. Its result is made under another name and then renamed, so it is whole or not there.
    fn ensure_initdb(&self) -> Result<()> {
        let finished = self.cached_initdb();
        if finished.is_dir() {
            return Ok(());
        }
        let half = self.base.join("initdb.half");
        if half.exists() {
            fs::remove_dir_all(&half).context(|| format!("cannot remove {}", half.display()))?;
        }
        make_dir(&half, 0o700)?;
        self.account.give(&half)?;
        let mut initdb = self.account.command(self.server.path_of("initdb"), &half);
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "-D",
        ]);
        initdb.arg(&half);
        self.account.run(initdb)?;
        fs::rename(&half, &finished).context(|| format!("cannot rename {}", half.display()))
    }
}

/// Checks that `base` can be the state directory, and makes it.
fn usable(base: PathBuf, account: &Account) -> Result<PathBuf> {
    let shown = base.display();
    let length = base.as_os_str().len() + SOCKET_SUFFIX.len();
    if length > SOCKET_PATH_MAX {
        return Err(Error::new(format!(
            "{shown} is too long for the path of a Unix socket, by {} bytes: set LASTPRICE_TESTKIT_DIR or TMPDIR to a \
             shorter path",
            length - SOCKET_PATH_MAX
        )));
    }
    if !base.is_absolute() {
        return Err(Error::new(format!("{shown}: LASTPRICE_TESTKIT_DIR and TMPDIR must be absolute paths")));
    }
    if let Some(parent) = base.parent() {
        fs::create_dir_all(parent).context(|| format!("cannot create {}", parent.display()))?;
    }
    // The server's account has to pass through on its way to `run`.
    make_dir(&base, if account.differs() { 0o711 } else { 0o700 })?;
    let found = fs::symlink_metadata(&base).context(|| format!("cannot look at {shown}"))?;
    if !found.is_dir() || found.uid() != account.caller || found.mode() & 0o022 != 0 {
        return Err(Error::new(format!(
            "{shown} is not a folder that belongs to user {} alone: remove it, or set LASTPRICE_TESTKIT_DIR to another \
             path",
            account.caller
        )));
    }
    if !account.can_enter(&base) {
        return Err(Error::new(format!(
            "the server's user cannot enter {shown}: set LASTPRICE_TESTKIT_DIR or TMPDIR to a folder open to all"
        )));
    }
    Ok(base)
}

/// Like `mkdir -p` for the last component, with these permissions whatever the umask is.
fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    let make = || match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => fs::set_permissions(dir, Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    make().context(|| format!("cannot create {}", dir.display()))
}
