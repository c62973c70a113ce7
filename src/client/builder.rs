use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use futures_util::FutureExt;
use secrecy::SecretString;

use super::Client;
use crate::assigner::{Feed, OpenLine};
use crate::connect::{Line, SslMode, Target, connector, open_another};
use crate::error::{Error, ErrorKind, Result};
use crate::repo;
use crate::scope::{Catalog, Doors, Replica, RolePolicy, Session, Slow, SlowStatement, StatementMode};
use crate::secrets::{KeyRing, SecretKeys, Vault};
use crate::telemetry;

/// The options of a [`Client`]. Setters never fail; [`build`](ClientBuilder::build) does, and names the option.
///
/// ```
/// use std::time::Duration;
///
/// # fn main() -> lastprice::Result<()> {
/// let client = lastprice::Client::builder()
///     .url("postgres://service:secret@db.internal/shop?sslmode=prefer")
///     .pool_size(16)
///     .acquire_timeout(Duration::from_secs(2))
///     .require_app_role()
///     .build()?; // connects when it is used first
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ClientBuilder {
    url: Option<String>,
    replica: Option<String>,
    max_staleness: Duration,
    schema: String,
    pool_size: usize,
    acquire_timeout: Duration,
    connect_timeout: Duration,
    statement_timeout: Option<Duration>,
    application_name: Option<String>,
    ssl_mode: Option<SslMode>,
    ssl_root_cert: Option<PathBuf>,
    mode: StatementMode,
    policy: RolePolicy,
    poll_interval: Duration,
    keys: Option<SecretKeys>,
    paid_api_key: Option<SecretString>,
    slow: Option<Arc<Slow>>,
}

impl ClientBuilder {
    pub(crate) fn new() -> Self {
        ClientBuilder {
            url: None,
            replica: None,
            max_staleness: Duration::from_secs(10),
            schema: "public".to_owned(),
            pool_size: 10,
            acquire_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Some(Duration::from_secs(30)),
            application_name: None,
            ssl_mode: None,
            ssl_root_cert: None,
            mode: StatementMode::Prepared,
            policy: RolePolicy::Assume,
            poll_interval: Duration::from_secs(5),
            keys: None,
            paid_api_key: None,
            slow: None,
        }
    }

    /// Where the database is: a URL or `key=value` text as libpq takes it. Without it, the environment says:
    /// see [`Client::from_env`].
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// A streaming standby of the server, which takes reads off it: [metrics](crate::Metrics) and the polls of
    /// [assigners](crate::Assigner) are answered there, by a second pool of the same size and with the same options, as of at most
    /// [`max_staleness`](ClientBuilder::max_staleness) ago. Writes and all other reads go to the server that `url` names, and so does what
    /// the standby cannot answer: while it is away, or further behind, or not known to be current (for a moment after the start),
    /// and what it has no row of. A read that must see what was written before asks a [`fresh`](crate::TenantHandle::fresh) handle.
    /// [`Client::replica_status`] counts.
    ///
    /// It has to follow that very server, and be asked for the same database: [`Client::ready`] refuses another one, and no answer of
    /// it is used. One that does not answer is left alone for longer after each failure, up to half a minute. One more connection,
    /// outside of the pools, asks the server four times within `max_staleness` how far its log is.
    ///
    /// ```
    /// # fn main() -> lastprice::Result<()> {
    /// let client = lastprice::Client::builder()
    ///     .url("postgres://service:secret@db.internal/shop?sslmode=prefer")
    ///     .replica("postgres://service:secret@standby.internal/shop?sslmode=prefer")
    ///     .max_staleness(std::time::Duration::from_secs(5))
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn replica(mut self, url: impl Into<String>) -> Self {
        self.replica = Some(url.into());
        self
    }

    /// How old an answer of the [replica](ClientBuilder::replica) may be: what was committed longer ago is in it. Default: 10 s; from
    /// 100 ms to a day.
    pub fn max_staleness(mut self, limit: Duration) -> Self {
        self.max_staleness = limit;
        self
    }

    /// What encrypts the secrets of tenants. Default: the [ring](crate::KeyRing::from_env) in `LASTPRICE_KEYS`, if that is set. Without
    /// keys all else works, and a call that needs one fails with [`SecretUnavailable`](crate::ErrorKind::SecretUnavailable).
    ///
    /// ```
    /// # fn main() -> lastprice::Result<()> {
    /// let keys = lastprice::KeyRing::new("2026-11", [7; 32])?;
    /// let builder = lastprice::Client::builder().keys(keys).paid_api_key("the platform's");
    /// # Ok(()) }
    /// ```
    pub fn keys(mut self, keys: impl Into<SecretKeys>) -> Self {
        self.keys = Some(keys.into());
        self
    }

    /// The platform's own Paid.ai key, for managed tenants: see [`Tenants::paid_credentials`](crate::Tenants::paid_credentials).
    pub fn paid_api_key(mut self, key: impl Into<SecretString>) -> Self {
        self.paid_api_key = Some(key.into());
        self
    }

    /// The schema that holds the tables. Default: `public`.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// How many connections there may be at the most. Default: 10.
    pub fn pool_size(mut self, connections: usize) -> Self {
        self.pool_size = connections;
        self
    }

    /// How long a call waits for a free connection before it fails with
    /// [`Timeout`](crate::ErrorKind::Timeout). Default: 5 s.
    pub fn acquire_timeout(mut self, limit: Duration) -> Self {
        self.acquire_timeout = limit;
        self
    }

    /// How long opening a connection may take; with several hosts, for each. Default: 5 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the server works on one statement, in milliseconds' precision; `None` for as long as it takes.
    /// Default: 30 s. It is set with each transaction, so it holds behind a pooler too.
    pub fn statement_timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.statement_timeout = limit.into();
        self
    }

    /// The name that the server shows for our connections. Default: the URL's, or else `lastprice`.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = Some(name.into());
        self
    }

    /// Whether and how TLS is used. Default: the URL's `sslmode`, or else [`SslMode::Prefer`].
    pub fn ssl_mode(mut self, mode: SslMode) -> Self {
        self.ssl_mode = Some(mode);
        self
    }

    /// A PEM file with the authorities to trust. Default: the URL's `sslrootcert`, or else the system's.
    pub fn ssl_root_cert(mut self, file: impl Into<PathBuf>) -> Self {
        self.ssl_root_cert = Some(file.into());
        self
    }

    /// How statements are sent. Default: [`StatementMode::Prepared`].
    pub fn statement_mode(mut self, mode: StatementMode) -> Self {
        self.mode = mode;
        self
    }

    /// Calls `hook` for each statement that took at least so long, however it ended; for each and every one, if that is zero. The
    /// wait for a connection counts, and that of a transaction is told as `begin`. Without a hook, nothing is told of slow statements.
    ///
    /// It is called by the task that made the call, after the connection was given back or is known to be lost, and before
    /// the call returns: it should be quick, and must not block. In a transaction the connection is still held. A hook that
    /// panics is told of in the log, and harms nothing.
    ///
    /// ```
    /// use std::sync::{Arc, atomic::{AtomicU64, Ordering}};
    ///
    /// let slow = Arc::new(AtomicU64::new(0));
    /// let counter = Arc::clone(&slow);
    /// let builder = lastprice::Client::builder().on_slow_statement(std::time::Duration::from_millis(500), move |slow| {
    ///     counter.fetch_add(1, Ordering::Relaxed);
    ///     eprintln!("{} took {:?} and returned {:?} rows", slow.operation, slow.elapsed, slow.rows);
    /// });
    /// ```
    pub fn on_slow_statement(
        mut self,
        threshold: Duration,
        hook: impl Fn(&SlowStatement) + Send + Sync + 'static,
    ) -> Self {
        self.slow = Some(Arc::new(Slow { threshold, hook: Box::new(hook) }));
        self
    }

    /// How often an [`Assigner`](crate::Assigner) asks for changes where the database's notifications do not arrive, and
    /// whether they do. Default: 5 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.poll_interval = interval;
        self
    }

    /// If the login role bypasses row-level security, become `lastprice_app` in every transaction and log a
    /// warning (the default, for development); with `false`, the same as
    /// [`require_app_role`](ClientBuilder::require_app_role).
    pub fn assume_app_role(mut self, assume: bool) -> Self {
        self.policy = if assume { RolePolicy::Assume } else { RolePolicy::Require };
        self
    }

    /// Refuse to work with a login role that bypasses row-level security: a superuser, a role with BYPASSRLS, the
    /// owner of the tables, or a member of such a role. For production.
    pub fn require_app_role(self) -> Self {
        self.assume_app_role(false)
    }

    /// Checks the options. Does not connect: the first call does, or [`Client::ready`].
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming the option.
    pub fn build(self) -> Result<Client> {
        for (name, limit) in [
            ("acquire_timeout", self.acquire_timeout),
            ("connect_timeout", self.connect_timeout),
            ("poll_interval", self.poll_interval),
        ] {
            if limit.is_zero() {
                return Err(Error::invalid(name, "is zero"));
            }
        }
        if self.poll_interval > Duration::from_secs(86_400) {
            return Err(Error::invalid("poll_interval", "is more than a day"));
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(86_400)).contains(&self.max_staleness) {
            return Err(Error::invalid("max_staleness", "is not between 100 ms and a day"));
        }
        if self.pool_size == 0 || self.pool_size > 10_000 {
            return Err(Error::invalid("pool_size", "is not between 1 and 10000"));
        }
        if self
            .statement_timeout
            .is_some_and(|limit| limit.as_millis() == 0 || limit.as_millis() > i32::MAX as u128)
        {
            return Err(Error::invalid("statement_timeout", "is not between 1 ms and 24 days"));
        }
        if self.schema.is_empty() || self.schema.len() > 63 || self.schema.contains('\0') {
            return Err(Error::invalid("schema", "is not a name of 1 to 63 bytes"));
        }
        if self.application_name.as_ref().is_some_and(|name| name.contains('\0')) {
            return Err(Error::invalid("application_name", "contains a NUL character"));
        }
        let keys = match &self.keys {
            Some(keys) => Some(keys.clone()),
            None => KeyRing::from_env_if_set()?.map(SecretKeys::from),
        };
        let vault = Vault { keys, paid_api_key: self.paid_api_key.clone() };
        let target = match &self.url {
            Some(url) => Target::from_url(url)?,
            None => Target::from_env()?,
        };
        let replica = self.replica.as_deref().map(Target::from_replica).transpose()?;
        // It reads no secret.
        let replica = replica.map(|target| self.session(target, Vault::default())).transpose()?;
        let replica = replica.map(|(session, ..)| Replica::new(session, self.max_staleness));
        let (session, open, address) = self.session(target, vault)?;
        let session = Arc::new(session.with_replica(replica));
        let feed = Feed::new(Arc::clone(&session), open, self.poll_interval);
        Ok(Client::new(session, feed, address))
    }

    /// A pool of connections to a server, the way to listen to it, and its address for people.
    fn session(&self, target: Target, vault: Vault) -> Result<(Session, Box<OpenLine>, String)> {
        let mut target = target.with_ssl(self.ssl_mode, self.ssl_root_cert.clone())?;
        target.pg.connect_timeout(self.connect_timeout);
        match &self.application_name {
            Some(name) => _ = target.pg.application_name(name),
            None if target.pg.get_application_name().is_none() => _ = target.pg.application_name("lastprice"),
            None => {}
        }

        let tls = connector(&target)?;
        let hosts = u32::try_from(target.pg.get_hosts().len()).unwrap_or(u32::MAX);
        // Fast: no round trip at checkout. What the others would clean up, a scope never leaves behind.
        let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let connect_timeout = self.connect_timeout.saturating_mul(hosts);
        let pool = Pool::builder(Manager::from_config(target.pg.clone(), tls.clone(), manager))
            .max_size(self.pool_size)
            .wait_timeout(Some(self.acquire_timeout))
            .create_timeout(Some(connect_timeout))
            .recycle_timeout(Some(self.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|e| Error::internal("the pool cannot be set up").with_source(e))?;
        let (pg, secure) = (target.pg.clone(), tls.clone());
        let open = move || {
            let opening = Line::open(pg.clone(), secure.clone(), repo::LISTEN);
            async move {
                // The driver's own limit ends when the server accepts, who may say nothing ever after.
                let opened = tokio::time::timeout(connect_timeout, opening).await;
                let late =
                    |_| Error::new(ErrorKind::Timeout, "connecting took longer than `connect_timeout`");
                opened.map_err(late)?.map_err(Error::from_connecting)
            }
            .boxed()
        };
        let (pg, secure) = (target.pg.clone(), tls.clone());
        let another = move |option| open_another(pg.clone(), secure.clone(), connect_timeout, option).boxed();
        let cancel = move |token: tokio_postgres::CancelToken| {
            let tls = tls.clone();
            // That the statement had finished is no error, nor that the server is gone.
            async move { drop(token.cancel_query(tls).await) }.boxed()
        };
        let catalog = Catalog::new(&self.schema, repo::statements());
        let doors = Doors { pool, cancel: Box::new(cancel), another: Box::new(another) };
        let (limit, slow) = (self.statement_timeout, self.slow.clone());
        let session = Session::new(doors, catalog, self.mode, self.policy, limit, vault, slow);
        telemetry::describe();
        Ok((session, Box::new(open), target.describe()))
    }
}

impl std::fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may hold a password.
        f.debug_struct("ClientBuilder")
            .field("schema", &self.schema)
            .field("pool_size", &self.pool_size)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}
