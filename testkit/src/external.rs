//! A server that somebody else runs, named by the environment.

use crate::{
    error::{Context, Error, Result},
    host::{Endpoint, Host, Passwords},
};
use std::{
    env,
    sync::{Arc, OnceLock},
};
use tokio::sync::OnceCell;
use tokio_postgres::{Config, config};

/// The server of `TEST_DATABASE_URL`; read once per process. Never that of `DATABASE_URL`: that is where a developer's
/// service keeps its data, and tests make roles and databases.
pub(crate) fn from_environment() -> Result<Option<Arc<Host>>> {
    static EXTERNAL: OnceLock<Result<Option<Arc<Host>>>> = OnceLock::new();
    EXTERNAL
        .get_or_init(|| {
            let Some(url) = env::var("TEST_DATABASE_URL").ok().filter(|url| !url.trim().is_empty()) else {
                return Ok(None);
            };
            let host = host(&url).map(|host| Some(Arc::new(host)));
            host.context(|| "TEST_DATABASE_URL cannot be used for tests".to_owned())
        })
        .clone()
}

fn host(url: &str) -> Result<Host> {
    let config: Config = url.parse().context(|| {
        "it is neither a URL nor key=value pairs that tokio-postgres can read (of sslmode it knows disable, prefer and \
         require)"
            .to_owned()
    })?;
    let superuser = config.get_user().ok_or_else(|| Error::new("it names no user"))?.to_owned();
    let password = config.get_password().map(|word| String::from_utf8_lossy(word).into_owned());
    let passwords = Passwords::Derived {
        // Not the host, which goes by several names.
        seed: format!("{superuser}\n{}", password.as_deref().unwrap_or_default()),
        superuser: superuser.clone(),
        password,
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let options = match config.get_ssl_mode() {
        config::SslMode::Disable => "?sslmode=disable",
        config::SslMode::Require => {
            return Err(Error::new("it demands TLS, which the testkit does not speak"));
        }
        _ => "",
    };
    let endpoint = match config.get_hosts().first() {
        Some(config::Host::Tcp(host)) => Endpoint::tcp(host, port, options, passwords),
        Some(config::Host::Unix(dir)) => Endpoint::socket(dir, port, passwords),
        None => return Err(Error::new("it names no host")),
    };
    Ok(Host {
        public: endpoint.clone(),
        local: endpoint,
        maintenance: config.get_dbname().unwrap_or(&superuser).to_owned(),
        superuser,
        sweep: usize::MAX,
        prepared: OnceCell::new(),
        _keep: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_urls_and_pairs() {
        let read = host("postgres://me:secret@db.example:6000/work").unwrap();
        assert_eq!(read.public.url("me", "x"), "postgres://me:secret@db.example:6000/x");
        assert_eq!(read.maintenance, "work");
        assert_ne!(read.public.url("other", "x"), "postgres://other:secret@db.example:6000/x");

        let read = host("host=/run/postgresql user=me").unwrap();
        assert_eq!(read.public.url("me", "x"), "postgres://me@%2Frun%2Fpostgresql:5432/x");
        assert_eq!(read.maintenance, "me");
    }

    #[test]
    fn says_what_is_missing() {
        assert_eq!(host("host=localhost").unwrap_err().to_string(), "it names no user");
        assert_eq!(host("user=me").unwrap_err().to_string(), "it names no host");
        assert!(host("postgres://me@h/d?sslmode=require").is_err());
        assert!(host("nonsense").is_err());
    }
}
