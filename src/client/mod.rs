//! The front door: hands out scopes.

mod builder;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use builder::ClientBuilder;

use crate::assigner::{Assigner, Feed};
use crate::audit::{self, IsolationReport};
use crate::error::Result;
use crate::id::TenantId;
use crate::record::{Recorder, RecorderOptions};
use crate::repo::{self, NewTenant, Tenant};
use crate::scope::{Catalog, Session, TenantHandle, TenantScope, Within};

/// A pool of connections, and the way to a tenant's data. Cheap to clone; clones share the pool.
///
/// The first call examines the database: its schema version, and whether row-level security binds the login role.
/// See [`ClientBuilder::require_app_role`].
///
/// ```no_run
/// use lastprice::{Client, NewTenant};
///
/// # async fn f() -> lastprice::Result<()> {
/// let client = Client::from_env()?;
/// let tenant = client.create_tenant(NewTenant::managed("Acme", "ops@acme.example")).await?;
/// let experiments = client.tenant(tenant.id).experiments().list(None, 20, None).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client {
    session: Arc<Session>,
    feed: Arc<Feed>,
    address: Arc<str>,
}

impl Client {
    /// All options, one by one.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::new()
    }

    /// A client from `DATABASE_URL`, or else from `DB_HOST`, `DB_PORT`, `DB_NAME`, `DB_USER`, `DB_PASSWORD`, with
    /// default options. It connects when it is used first.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names the variable.
    pub fn from_env() -> Result<Self> {
        Client::builder().build()
    }

    pub(crate) fn new(session: Arc<Session>, feed: Arc<Feed>, address: String) -> Self {
        Client { session, feed, address: address.into() }
    }

    /// One tenant, each call a transaction of its own. Costs nothing until a call is made; an id that does not
    /// exist has no rows.
    #[must_use]
    pub fn tenant(&self, id: TenantId) -> TenantHandle {
        TenantHandle::new(Arc::clone(&self.session), id)
    }

    /// Creates a tenant.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
    /// let acme = lastprice::NewTenant::managed("Acme", "ops@acme.example");
    /// let acme = client.create_tenant(acme).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a field that breaks a rule,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the e-mail address (in any case) or the id is taken,
    /// [`SecretUnavailable`](crate::ErrorKind::SecretUnavailable) for a secret without [keys](ClientBuilder::keys).
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the tenant may or may not have been created. Give the input an id of your own
    /// ([`NewTenant::id`]) to find out.
    pub async fn create_tenant(&self, new: NewTenant) -> Result<Tenant> {
        self.tenant(new.id).tenants().create(new).await
    }

    /// A scope inside a transaction of the host's own, with this client's schema and keys. See [`TenantScope::within`].
    #[must_use]
    pub fn within<'t>(
        &self,
        transaction: &'t tokio_postgres::Transaction<'t>,
        tenant: TenantId,
    ) -> TenantScope<'t> {
        let (catalog, vault) = (Arc::clone(&self.session.catalog), Arc::clone(&self.session.vault));
        let slow = self.session.slow.clone();
        TenantScope::host(Within { transaction, catalog, vault, slow }, tenant)
    }

    /// A tenant's experiments in memory, kept current: answers without the database. Loads them, and starts to follow their
    /// changes; asked again for the same tenant, it returns the same one for as long as that is in use. One more
    /// connection, outside of the pool, listens for the changes of all tenants while there is an assigner.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client, tenant: lastprice::TenantId) -> lastprice::Result<()> {
    /// let assigner = client.assigner(tenant).await?;
    /// let user = lastprice::UserId::new("user-42")?;
    /// let decision = assigner.assign("pro-plan", &user);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant, and those of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn assigner(&self, tenant: TenantId) -> Result<Assigner> {
        Assigner::open(self.tenant(tenant), Arc::clone(&self.feed)).await
    }

    /// Starts to write events in the background, many in one statement, for all tenants: with the default options.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client, tenant: lastprice::TenantId, view: lastprice::NewView) -> lastprice::Result<()> {
    /// let recorder = client.recorder(); // once, at start-up
    /// recorder.record(tenant, view)?;
    /// let report = recorder.shutdown(std::time::Duration::from_secs(10)).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn recorder(&self) -> Recorder {
        Recorder::start(Arc::clone(&self.session), &RecorderOptions::new())
    }

    /// [`recorder`](Client::recorder), with options.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
    /// let recorder = client.recorder_with(lastprice::RecorderOptions::new().max_events(1_000_000))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming the option.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn recorder_with(&self, options: RecorderOptions) -> Result<Recorder> {
        options.check()?;
        Ok(Recorder::start(Arc::clone(&self.session), &options))
    }

    /// Connects, and examines the schema version and the role, as the first call would: for start-up and
    /// readiness probes. With a [replica](ClientBuilder::replica), that is examined as well; that it is away is no error.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
    /// client.ready().await?; // at start-up
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch),
    /// [`IsolationNotEnforced`](crate::ErrorKind::IsolationNotEnforced),
    /// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Timeout`](crate::ErrorKind::Timeout);
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if the replica is a standby of another server, or names another database.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn ready(&self) -> Result<()> {
        let connection = self.session.checkout().await?;
        connection.batch_execute("").await.map_err(|e| crate::Error::from_driver(e, false))?;
        drop(connection);
        match &self.session.replica {
            Some(replica) => replica.check(&self.session).await,
            None => Ok(()),
        }
    }

    /// Looks for everything that would let one tenant reach another's rows: in who this login is and may become, in tables, policies,
    /// keys, rights, views and functions, and in a pooler on the way. Also for a login that the client itself refuses; it
    /// changes nothing. For start-up and CI.
    ///
    /// Examined are the tables of the schema, and the host's own in the same schema that have a `tenant_id` and that the
    /// login, `lastprice_app` or PUBLIC has rights on.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
    /// client.verify_isolation().await?.into_result()?; // at start-up
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch), [`Unavailable`](crate::ErrorKind::Unavailable) or
    /// [`Timeout`](crate::ErrorKind::Timeout). Findings are no errors: see
    /// [`into_result`](IsolationReport::into_result).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect; the connection it used is closed.
    pub async fn verify_isolation(&self) -> Result<IsolationReport> {
        audit::verify(&self.session).await
    }

    /// How the pool is used now.
    #[must_use]
    pub fn pool_status(&self) -> PoolStatus {
        PoolStatus::of(&self.session)
    }

    /// What the [replica](ClientBuilder::replica) has been good for, since the client was built; `None` without one.
    #[must_use]
    pub fn replica_status(&self) -> Option<ReplicaStatus> {
        self.session.replica.as_ref().map(|replica| {
            let uses = replica.uses();
            ReplicaStatus {
                answered: uses.answered,
                empty: uses.empty,
                stale: uses.stale,
                failed: uses.failed,
                staleness: uses.staleness,
                pool: PoolStatus::of(&replica.session),
            }
        })
    }

    /// Closes the pool for all clones: new calls fail, calls under way finish. Returns when the last connection
    /// has been given back. An [`Assigner`] goes on with what it has. A [`Recorder`] ends, and what it has not written is
    /// lost: shut it down before.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
    /// client.close().await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the pool is closed all the same.
    pub async fn close(&self) {
        self.feed.close();
        self.session.pool.close();
        let replica = self.session.replica.as_ref().inspect(|replica| replica.close());
        let is_open = |session: &Session| session.pool.status().size > 0;
        while is_open(&self.session) || replica.is_some_and(|replica| is_open(&replica.session)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.session.tell_pool();
        if let Some(replica) = replica {
            replica.session.tell_pool();
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.address).field("pool", &self.pool_status()).finish()
    }
}

/// How a client's pool is used at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Connections that there may be at the most.
    pub max_size: usize,
    /// Connections that there are.
    pub size: usize,
    /// Connections that are free.
    pub available: usize,
    /// Calls that wait for a connection.
    pub waiting: usize,
}

impl PoolStatus {
    fn of(session: &Session) -> Self {
        let s = session.pool.status();
        PoolStatus { max_size: s.max_size, size: s.size, available: s.available, waiting: s.waiting }
    }
}

/// How reads were spread between a client's replica and the server it follows: see [`Client::replica_status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplicaStatus {
    /// Reads that the replica has answered.
    pub answered: u64,
    /// Reads that the primary was asked as well, because the replica, current enough, had no row of what was asked: there may be none,
    /// or it may be too new.
    pub empty: u64,
    /// Reads that the primary was asked instead, because the replica was too far behind, or not known to be current.
    pub stale: u64,
    /// Reads that the primary was asked instead, because the replica did not answer.
    pub failed: u64,
    /// How old its data was at the most when it last answered, whether in time or not; `None` before.
    pub staleness: Option<Duration>,
    /// How its pool is used now.
    pub pool: PoolStatus,
}

impl<'t> TenantScope<'t> {
    /// A scope inside a transaction of the host's own: our rows commit or roll back with the host's.
    ///
    /// Each call costs one round trip, in which role and tenant are set before the statement and restored after it.
    /// Where row-level security would not bind the host's role, or that role has no right on our tables (as after a
    /// SET ROLE), the call runs as `lastprice_app`, which must be granted to the role that logged in. Outcomes such as
    /// "already recorded" or "not assigned" are returned and leave the transaction usable; an error of the database
    /// aborts it, as any error in it would.
    ///
    /// One call at a time: calls of two scopes of one transaction, polled on two threads at once, may overtake each other.
    ///
    /// It expects the tables in schema `public`, and has no keys for secrets; [`Client::within`] uses the client's. deadpool's `Transaction`
    /// derefs to tokio-postgres's.
    ///
    /// ```no_run
    /// # use lastprice::{TenantScope, TenantId, NewView};
    /// # async fn f(host: &mut tokio_postgres::Client, id: TenantId, view: NewView) -> Result<(), Box<dyn std::error::Error>> {
    /// let transaction = host.transaction().await?;
    /// transaction.execute("INSERT INTO orders DEFAULT VALUES", &[]).await?;
    /// TenantScope::within(&transaction, id).views().record(&view).await?;
    /// transaction.commit().await?; // both, or neither
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn within(transaction: &'t tokio_postgres::Transaction<'t>, tenant: TenantId) -> Self {
        static PUBLIC: OnceLock<Arc<Catalog>> = OnceLock::new();
        let catalog = PUBLIC.get_or_init(|| Arc::new(Catalog::new("public", repo::statements())));
        let (catalog, vault) = (Arc::clone(catalog), Arc::default());
        TenantScope::host(Within { transaction, catalog, vault, slow: None }, tenant)
    }
}
