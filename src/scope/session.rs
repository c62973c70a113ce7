//! What all scopes of a client share: the pool, who we are in the database, and how a tenant is bound.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Object, Pool, PoolError, TimeoutType};
use futures_util::future::{Either, join3, ready, select};
use postgres_protocol::escape::escape_literal;
use tokio::sync::OnceCell;
use tokio_postgres::types::Type;

use super::pooler::{self, Another};
use super::replica::Replica;
use super::statement::Catalog;
use super::watch::Slow;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Actor, TenantId};
use crate::secrets::Vault;
use crate::telemetry::PoolGauges;

/// The version of the schema that this crate was written for; it works with the next one as well, so that old
/// processes survive a database that was migrated first.
pub(crate) const SCHEMA_VERSION: i32 = 1;

/// How long an answer may be under way that takes no work.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// How statements are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum StatementMode {
    /// Parsed once per connection and then named: the fastest, for connections of one's own, or a pooler that
    /// knows named statements. Behind one that shares connections and does not know them, a name would mean another
    /// client's statement: the first call looks for that, by one short-lived connection of its own, and is refused.
    #[default]
    Prepared,
    /// Sent with its text each time, unnamed: for PgBouncer in transaction mode before 1.21. One round trip as
    /// well; the server parses each time.
    Typed,
}

/// Cancels a statement on its own connection, with the client's TLS; boxed so that scopes need not know it.
pub(crate) type Canceller =
    dyn Fn(tokio_postgres::CancelToken) -> futures_util::future::BoxFuture<'static, ()> + Send + Sync;

pub(crate) struct Session {
    pub(crate) pool: Pool,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) mode: StatementMode,
    pub(crate) policy: RolePolicy,
    pub(crate) statement_timeout: Option<Duration>,
    pub(crate) cancel: Box<Canceller>,
    pub(crate) vault: Arc<Vault>,
    pub(crate) slow: Option<Arc<Slow>>,
    gauges: PoolGauges,
    pub(super) another: Box<Another>,
    /// A standby of it, for reads.
    pub(crate) replica: Option<Replica>,
    found: OnceCell<Found>,
    /// How many rows of usage each tenant has reported by this client since it last had them folded.
    reported: Mutex<HashMap<TenantId, u64>>,
}

/// The ways to the server, each with the client's address and TLS.
pub(crate) struct Doors {
    pub(crate) pool: Pool,
    pub(crate) cancel: Box<Canceller>,
    pub(crate) another: Box<Another>,
}

/// What to do when the login role bypasses row-level security.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RolePolicy {
    /// Become `lastprice_app` in every transaction.
    Assume,
    /// Refuse to work.
    Require,
}

/// What the first connection found.
#[derive(Debug, Clone, Copy)]
struct Found {
    role: Role,
    /// By Citus: the tenant has to reach the shards.
    is_distributed: bool,
}

/// Who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Row-level security binds the login role, which has the rights of `lastprice_app`.
    Ordinary,
    /// Not so, and every transaction becomes `lastprice_app`.
    Assumed,
}

impl Session {
    pub(crate) fn new(
        doors: Doors,
        catalog: Catalog,
        mode: StatementMode,
        policy: RolePolicy,
        statement_timeout: Option<Duration>,
        vault: Vault,
        slow: Option<Arc<Slow>>,
    ) -> Self {
        let Doors { pool, cancel, another } = doors;
        Session {
            pool,
            catalog: Arc::new(catalog),
            mode,
            policy,
            statement_timeout,
            cancel,
            vault: Arc::new(vault),
            slow,
            gauges: PoolGauges::of("primary"),
            another,
            replica: None,
            found: OnceCell::new(),
            reported: Mutex::default(),
        }
    }

    /// As it is for a replica.
    pub(super) fn of_replica(self) -> Self {
        Session { gauges: PoolGauges::of("replica"), ..self }
    }

    pub(crate) fn with_replica(self, replica: Option<Replica>) -> Self {
        Session { replica, ..self }
    }

    /// A connection from the pool; the first one also tells who we are.
    pub(crate) async fn checkout(&self) -> Result<Object> {
        let connection = self.unexamined().await?;
        self.found.get_or_try_init(|| self.examine(&connection)).await?;
        Ok(connection)
    }

    /// A connection from the pool, whoever we are: for the audit, which is to say so.
    pub(crate) async fn unexamined(&self) -> Result<Object> {
        let taken = match select(pin!(self.pool.get()), ready(())).await {
            Either::Left((taken, _)) => taken,
            Either::Right(((), taking)) => {
                self.tell_pool(); // that somebody waits
                taking.await
            }
        };
        self.tell_pool();
        taken.map_err(pool_error)
    }

    /// Tells how the pool is used now, if it has changed.
    pub(crate) fn tell_pool(&self) {
        self.gauges.tell(|| {
            let s = self.pool.status();
            [s.max_size, s.size, s.available, s.waiting]
        });
    }

    /// Counts rows of usage; whether there are so many of the tenant now that they are to be folded.
    pub(crate) fn has_reported(&self, tenant: TenantId, rows: u64, many: u64) -> bool {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let since = reported.entry(tenant).or_default();
        *since += rows;
        *since >= many && reported.remove(&tenant).is_some()
    }

    /// Opens a transaction and binds it: one message, so that it travels with the statement it protects.
    pub(crate) fn begin(&self, tenant: TenantId, actor: Option<&Actor>) -> String {
        let mut begin = String::with_capacity(256);
        // Whatever the database's default: a fold with an older snapshot would fold nothing.
        begin.push_str("BEGIN ISOLATION LEVEL READ COMMITTED");
        // Compiling a statement takes a second where running it takes a tenth of one.
        begin.push_str("; SET LOCAL jit = off");
        // Left to itself the server plans a statement with a small array anew each time, which takes longer than to run it. That
        // every statement finds its rows by an index without knowing its parameters is tested. And a plan that was made when a
        // table was small, and read as a whole, would be kept while it grows.
        // Citus cannot: it plans for the node that it knows the parameters lead to.
        let found = self.found.get();
        let is_distributed = found.is_some_and(|found| found.is_distributed);
        if self.mode == StatementMode::Prepared && !is_distributed {
            begin
                .push_str("; SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off");
        }
        if let Some(limit) = self.statement_timeout {
            let _ = write!(begin, "; SET LOCAL statement_timeout = {}", limit.as_millis());
        }
        // Unset means that no connection was examined, which checkout() does not let happen.
        if found.is_none_or(|found| found.role != Role::Ordinary) {
            begin.push_str("; SET LOCAL ROLE lastprice_app");
        }
        if is_distributed {
            // What is set after it in the same message would have to reach the shards as well, and cannot.
            if let Some(actor) = actor {
                push_actor(&mut begin, actor);
            }
            let _ = write!(begin, "; SELECT {}.app_set_tenant('{tenant}')", self.catalog.schema());
            return begin;
        }
        let _ = write!(begin, "; SET LOCAL app.tenant_id = '{tenant}'");
        if let Some(actor) = actor {
            push_actor(&mut begin, actor);
        }
        begin
    }

    /// Gives up what takes longer than a call of so many statements can by its own limits. Then the network is silent, and
    /// whoever went on waiting would do so for ever, and hold up all who come after.
    pub(crate) async fn in_time<T>(
        &self,
        statements: u32,
        asking: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let late = |_| Error::new(ErrorKind::Timeout, "the database did not answer in time");
        let limits = self.pool.timeouts();
        let statement = self.statement_timeout.unwrap_or(Duration::from_secs(30)).saturating_mul(statements);
        let limits = [limits.wait, limits.create, Some(statement)].into_iter().flatten();
        tokio::time::timeout(limits.fold(ON_THE_WAY, Duration::saturating_add), asking).await.map_err(late)?
    }

    async fn examine(&self, connection: &Object) -> Result<Found> {
        let driver = |e| Error::from_driver(e, false);
        let schema = self.catalog.schema();
        let ask = format!("SELECT {schema}.lastprice_schema_version()");
        // In a transaction, since not every pooler keeps one.
        let (begun, version, _) = join3(
            connection.batch_execute("BEGIN"),
            connection.query_typed_one(&ask, &[]),
            connection.batch_execute("COMMIT"),
        )
        .await;
        begun.map_err(pooler::explain_no_transaction)?;
        let version: i32 = version
            .and_then(|row| row.try_get(0))
            .map_err(driver)
            .map_err(|e| explain_missing_schema(e, schema))?;
        if !(SCHEMA_VERSION..=SCHEMA_VERSION + 1).contains(&version) {
            return Err(Error::new(
                ErrorKind::SchemaMismatch,
                format!(
                    "schema {schema} has version {version}, and this release of the crate works with \
                     {SCHEMA_VERSION} and {}: {}",
                    SCHEMA_VERSION + 1,
                    if version < SCHEMA_VERSION { "run the migrations" } else { "use a newer release" }
                ),
            ));
        }
        if self.mode == StatementMode::Prepared {
            pooler::allow_names(connection, &*self.another).await?;
        }
        let row = connection.query_typed_one(WHO_AM_I, &[(&schema, Type::TEXT)]).await.map_err(driver)?;
        let (name, bypasses): (String, bool) = (row.get(0), row.get(1));
        let (member, inherits, is_distributed): (bool, bool, bool) = (row.get(2), row.get(3), row.get(4));
        let role = match (bypasses, self.policy) {
            (false, _) if !member => Err(Error::new(
                ErrorKind::IsolationNotEnforced,
                format!("role `{name}` is not a member of `lastprice_app`: GRANT lastprice_app TO {name}"),
            )),
            (false, _) => Ok(if inherits { Role::Ordinary } else { Role::Assumed }),
            (true, RolePolicy::Require) => Err(Error::new(
                ErrorKind::IsolationNotEnforced,
                format!(
                    "role `{name}` bypasses row-level security (superuser, BYPASSRLS, owner of the tables, or a member \
                     of such a role): log in as an ordinary role that is a member of `lastprice_app`"
                ),
            )),
            (true, RolePolicy::Assume) if !member => Err(Error::new(
                ErrorKind::IsolationNotEnforced,
                format!(
                    "role `{name}` bypasses row-level security and cannot become `lastprice_app`: GRANT lastprice_app TO {name}"
                ),
            )),
            (true, RolePolicy::Assume) => {
                tracing::warn!(
                    role = %name,
                    "the login role bypasses row-level security; every transaction becomes `lastprice_app`. In production, log in \
                     as an ordinary member of `lastprice_app` and set `require_app_role()`"
                );
                Ok(Role::Assumed)
            }
        };
        Ok(Found { role: role?, is_distributed })
    }
}

/// Adds who makes the changes to a message that begins a transaction.
///
/// A character that the database's encoding lacks would fail the message as a whole, with the BEGIN in it, and the
/// statement behind it would run bare. In disguise it fails after the BEGIN.
pub(crate) fn push_actor(begin: &mut String, actor: &Actor) {
    let actor = actor.as_str();
    if actor.is_ascii() {
        let _ = write!(begin, "; SET LOCAL app.actor = {}", escape_literal(actor));
        return;
    }
    begin.push_str("; SELECT set_config('app.actor', convert_from(decode('");
    for byte in actor.bytes() {
        let _ = write!(begin, "{byte:02x}");
    }
    begin.push_str("', 'hex'), 'UTF8'), true)");
}

/// Each table with rows of a tenant, as an array in SQL.
macro_rules! tenant_tables {
    () => {
        "'{tenants, experiments, assignments, views, conversions, usage, recommendations, waiting_conversions, webhook_events, \
         ledger_locks, audit_trail, metric_totals, metric_deltas, metric_baselines, archived_experiments, usage_totals, \
         tenant_limits, identities, erasures}'::name[]"
    };
}
pub(crate) use tenant_tables;

/// Does row-level security bind the current role? A role that inherits the owner's, or may become it or another
/// one that bypasses, escapes it though its own attributes say nothing.
const WHO_AM_I: &str = concat!("
    SELECT current_user::text,
           EXISTS (SELECT FROM pg_catalog.pg_roles r
                   WHERE (r.rolsuper OR r.rolbypassrls) AND pg_has_role(r.oid, 'MEMBER'))
           OR EXISTS (SELECT FROM pg_catalog.pg_class c
                      WHERE c.relnamespace = $1::regnamespace AND pg_has_role(c.relowner, 'MEMBER') AND c.relname = ANY (",
    tenant_tables!(),
    " || 'plan_limits'::name)),
           COALESCE((SELECT pg_has_role(r.oid, 'MEMBER') FROM pg_catalog.pg_roles r WHERE r.rolname = 'lastprice_app'), false),
           COALESCE((SELECT pg_has_role(r.oid, 'USAGE') FROM pg_catalog.pg_roles r WHERE r.rolname = 'lastprice_app'), false),
           EXISTS (SELECT FROM pg_catalog.pg_extension e WHERE e.extname = 'citus')");

fn explain_missing_schema(error: Error, schema: &str) -> Error {
    if error.kind() != ErrorKind::SchemaMismatch {
        return error;
    }
    Error::new(
        ErrorKind::SchemaMismatch,
        format!(
            "schema {schema} of this database does not hold lastprice: install it with `psql -f schema.sql` or \
             `Admin::migrate`, or name the schema that holds it"
        ),
    )
    .with_source(error)
}

fn pool_error(error: PoolError) -> Error {
    let timeout = |what| Error::new(ErrorKind::Timeout, what);
    match error {
        PoolError::Timeout(TimeoutType::Wait) => {
            timeout("all connections of the pool were busy for longer than `acquire_timeout`")
        }
        PoolError::Timeout(TimeoutType::Create) => timeout("connecting took longer than `connect_timeout`"),
        PoolError::Timeout(TimeoutType::Recycle) => timeout("checking a pooled connection took too long"),
        PoolError::Backend(e) => Error::from_connecting(e),
        PoolError::Closed => Error::new(ErrorKind::Closed, "the client was closed"),
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            Error::internal("the pool was set up without a runtime")
        }
    }
}
