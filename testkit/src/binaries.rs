use crate::error::{Error, Result};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The PostgreSQL server programs of this machine.
///
/// Looked for in this order: `$PGBIN`; `PATH`, with symbolic links followed (`initdb` wants `postgres` next to
/// itself); `pg_config --bindir`; and where Debian, Red Hat, Homebrew, EnterpriseDB and Postgres.app put them,
/// newest first.
///
/// ```no_run
/// # fn main() -> Result<(), lastprice_testkit::Error> {
/// let server = lastprice_testkit::Server::find()?;
/// println!("PostgreSQL {} in {}", server.version(), server.bindir().display());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    bindir: PathBuf,
    version: String,
}

/// Folders that hold one folder per version, named by a prefix and the version: `/usr/lib/postgresql/15/bin`.
const VERSIONED: [(&str, &str); 7] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@"),
    ("/Library/PostgreSQL", ""),
    ("/Applications/Postgres.app/Contents/Versions", ""),
];

impl Server {
    /// Finds the server programs.
    ///
    /// # Errors
    ///
    /// When there are none (the message names the package to install), when `$PGBIN` points to a folder without
    /// them, or when they do not run.
    pub fn find() -> Result<Server> {
        let bindir = match env::var_os("PGBIN").filter(|value| !value.is_empty()) {
            Some(given) => {
                let given = PathBuf::from(given);
                if !is_bindir(&given) {
                    let given = given.display();
                    return Err(Error::new(format!("PGBIN is {given}, but there is no initdb and postgres")));
                }
                given
            }
            None => candidates().find(|dir| is_bindir(dir)).ok_or_else(|| Error::new(NOT_FOUND))?,
        };
        let postgres = bindir.join("postgres");
        let version = output(&postgres, "--version")
            .as_deref()
            .and_then(version_in)
            .ok_or_else(|| Error::new(format!("{} --version does not answer", postgres.display())))?;
        Ok(Server { bindir, version })
    }

    /// The folder of `initdb`, `postgres` and `pg_ctl`.
    pub fn bindir(&self) -> &Path {
        &self.bindir
    }

    /// The version as the server prints it, such as `15.18` or `18beta1`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The path of one of the programs, such as `psql`, when it is installed next to the server.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        Some(self.bindir.join(name)).filter(|path| path.is_file())
    }

    /// Tells installations apart whose data directories must not be mixed; fit for a file name.
    pub(crate) fn tag(&self) -> String {
        let place = crate::host::fnv1a(&[&self.bindir.to_string_lossy()]);
        format!("{}-{:08x}", self.version, place as u32)
    }

    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }
}

const NOT_FOUND: &str = "found no PostgreSQL server on this machine: install one (Debian, Ubuntu: `apt-get install \
    postgresql`; Fedora: `dnf install postgresql-server`; macOS: `brew install postgresql@17`), or set PGBIN to the \
    folder of initdb, or set TEST_DATABASE_URL to a server whose role may create databases and roles";

fn is_bindir(dir: &Path) -> bool {
    dir.join("initdb").is_file() && dir.join("postgres").is_file()
}

/// Lazily, so that `pg_config` is not run when `PATH` has the answer.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path: Vec<PathBuf> = env::split_paths(&path)
        .filter_map(|dir| fs::canonicalize(dir.join("initdb")).ok()?.parent().map(Path::to_owned))
        .collect();
    let by_pg_config = || output(Path::new("pg_config"), "--bindir").map(PathBuf::from);
    in_path.into_iter().chain(std::iter::once_with(by_pg_config).flatten()).chain(versioned())
}

fn versioned() -> impl Iterator<Item = PathBuf> {
    let mut found = Vec::new();
    for (root, prefix) in VERSIONED {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
            if let Some(major) = number.and_then(|number| number.parse::<u32>().ok()) {
                found.push((major, entry.path().join("bin")));
            }
        }
    }
    found.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    found.into_iter().map(|(_, dir)| dir)
}

fn output(program: &Path, argument: &str) -> Option<String> {
    let output =
        Command::new(program).arg(argument).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` is `15.18`.
fn version_in(line: &str) -> Option<String> {
    let version = line.split_once("(PostgreSQL) ")?.1.split_whitespace().next()?;
    let plain = version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.');
    plain.then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version() {
        assert_eq!(version_in("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)").unwrap(), "15.18");
        assert_eq!(version_in("postgres (PostgreSQL) 18beta1").unwrap(), "18beta1");
        assert_eq!(version_in("postgres (PostgreSQL) ../../x"), None);
        assert_eq!(version_in("mysqld 8"), None);
    }

    #[test]
    fn the_message_says_what_to_install() {
        for hint in ["apt-get install postgresql", "postgresql-server", "postgresql@17", "TEST_DATABASE_URL"]
        {
            assert!(NOT_FOUND.contains(hint));
        }
    }
}
