//! A server that databases are made on, wherever it comes from, and how one gets there.

use crate::{
    error::{Context, Result},
    external, roles, shared,
};
use std::{any::Any, fmt, path::Path, sync::Arc, time::Duration};
use tokio::sync::OnceCell;
use tokio_postgres::{Client, Config, NoTls};

/// One way to reach a server.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// As it stands in a URL: a name, or the percent-encoded folder of the socket.
    host: String,
    port: u16,
    /// What follows the database in a URL, with its question mark.
    options: &'static str,
    pub(crate) passwords: Passwords,
}

/// What a role proves itself by.
#[derive(Clone)]
pub(crate) enum Passwords {
    /// Nothing: the server trusts whoever can reach it.
    Trust,
    /// The same word for every role.
    Same(&'static str),
    /// One per role, which every process computes alike; the superuser has been given to us with its own.
    Derived { seed: String, superuser: String, password: Option<String> },
}

impl Passwords {
    pub(crate) fn of(&self, role: &str) -> Option<String> {
        match self {
            Passwords::Trust => None,
            Passwords::Same(word) => Some((*word).to_owned()),
            Passwords::Derived { superuser, password, .. } if role == superuser => password.clone(),
            Passwords::Derived { seed, .. } => {
                Some(format!("{:016x}{:016x}", fnv1a(&["1", seed, role]), fnv1a(&["2", seed, role])))
            }
        }
    }
}

impl Endpoint {
    pub(crate) fn socket(dir: &Path, port: u16, passwords: Passwords) -> Endpoint {
        Endpoint { host: percent(&dir.to_string_lossy()), port, options: "", passwords }
    }

    pub(crate) fn tcp(host: &str, port: u16, options: &'static str, passwords: Passwords) -> Endpoint {
        let host = if host.contains(':') { format!("[{host}]") } else { percent(host) };
        Endpoint { host, port, options, passwords }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// A URL that both libpq and tokio-postgres understand. The port is always there: PGPORT must not change it.
    pub(crate) fn url(&self, role: &str, database: &str) -> String {
        let Endpoint { host, port, options, passwords } = self;
        let password = passwords.of(role).map(|word| format!(":{}", percent(&word))).unwrap_or_default();
        format!("postgres://{}{password}@{host}:{port}/{}{options}", percent(role), percent(database))
    }
}

/// A server that databases are made on.
pub(crate) struct Host {
    /// How tests reach it.
    pub(crate) public: Endpoint,
    /// How we reach it ourselves, without TLS.
    pub(crate) local: Endpoint,
    pub(crate) superuser: String,
    /// The database that one connects to in order to make others.
    pub(crate) maintenance: String,
    /// How many databases of dead processes to drop when this process comes in.
    pub(crate) sweep: usize,
    /// Roles are made once per process and server.
    pub(crate) prepared: OnceCell<()>,
    /// Whatever keeps the server alive.
    pub(crate) _keep: Option<Box<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("host", &self.public.host).field("port", &self.public.port).finish()
    }
}

impl Host {
    /// The server for ordinary tests: the one that the environment names, or else the shared cluster.
    pub(crate) async fn for_tests() -> Result<Arc<Host>> {
        match external::from_environment()? {
            Some(host) => Ok(host),
            None => blocking(shared::join).await,
        }
    }

    /// A connection of the superuser to the maintenance database, with our roles in place.
    pub(crate) async fn admin(&self) -> Result<Client> {
        let admin = connect(&self.local.url(&self.superuser, &self.maintenance)).await?;
        self.prepared.get_or_try_init(|| roles::prepare(self, &admin)).await?;
        Ok(admin)
    }
}

/// Connects without TLS, and drives the connection on the current runtime until the client is dropped.
pub(crate) async fn connect(url: &str) -> Result<Client> {
    let mut config: Config = url.parse().context(|| "cannot read the URL of the test server".to_owned())?;
    config.application_name("lastprice-testkit").connect_timeout(Duration::from_secs(10));
    let connected = config.connect(NoTls).await;
    let user = config.get_user().unwrap_or_default();
    let database = config.get_dbname().unwrap_or_default();
    let (client, connection) = connected
        .context(|| format!("cannot connect to the test server (role {user}, database {database})"))?;
    tokio::spawn(async move {
        // Its end is seen by the client, too.
        let _ = connection.await;
    });
    Ok(client)
}

/// Runs what waits for processes and files, without holding up the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context(|| "the work on the test server was cut short".to_owned())?
}

/// FNV-1a, since the standard library's hash may change between compilers, and processes must agree.
pub(crate) fn fnv1a(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn percent(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte as char),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::config::Host as Address;

    #[test]
    fn urls_read_back_as_what_went_in() {
        let passwords = Passwords::Same("p@ss/w%rd:");
        let url = Endpoint::socket(Path::new("/tmp/a b"), 5433, passwords).url("o'role", "d?b");
        let config: Config = url.parse().unwrap();
        assert_eq!(config.get_hosts(), [Address::Unix("/tmp/a b".into())]);
        assert_eq!(config.get_ports(), [5433]);
        assert_eq!(config.get_user(), Some("o'role"));
        assert_eq!(config.get_password(), Some("p@ss/w%rd:".as_bytes()));
        assert_eq!(config.get_dbname(), Some("d?b"));

        let url = Endpoint::tcp("::1", 5432, "?sslmode=disable", Passwords::Trust).url("r", "d");
        let config: Config = url.parse().unwrap();
        assert_eq!(config.get_hosts(), [Address::Tcp("::1".into())]);
    }

    #[test]
    fn derived_passwords_differ_by_role_and_seed() {
        let derived = |seed: &str| Passwords::Derived {
            seed: seed.to_owned(),
            superuser: "root".to_owned(),
            password: Some("given".to_owned()),
        };
        assert_eq!(derived("s").of("root").unwrap(), "given");
        assert_eq!(derived("s").of("a"), derived("s").of("a"));
        assert_ne!(derived("s").of("a"), derived("s").of("b"));
        assert_ne!(derived("s").of("a"), derived("t").of("a"));
    }
}
