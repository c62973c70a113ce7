//! [`TenantScope`]: the only way to tenant data. This is the only place that binds a tenant.

mod flight;
mod health;
mod marks;
mod pooler;
mod replica;
mod session;
mod statement;
mod transaction;
mod watch;

use std::sync::Arc;

use futures_util::future::join3;
use tokio_postgres::Row;
use tracing::Instrument as _;

use crate::error::{Error, ErrorKind, Result};
use crate::id::{Actor, TenantId};
use crate::secrets::Vault;
use flight::{Flight, typed};
use replica::Attempt;
use transaction::Open;
use watch::Watch;

pub(crate) use flight::Params;
#[cfg(feature = "migrate")]
pub(crate) use pooler::{Between, look_between};
pub(crate) use replica::{Answer, Replica};
pub use session::StatementMode;
pub(crate) use session::{Doors, RolePolicy, SCHEMA_VERSION, Session, push_actor, tenant_tables};
pub(crate) use statement::{Catalog, Statement};
pub use transaction::{TenantHandle, TenantTransaction};
pub(crate) use watch::Slow;
pub use watch::SlowStatement;

/// The guard that binds one tenant to a transaction; the repositories hang off it.
///
/// There are three ways to have one, with the same repositories on it:
///
/// - [`Client::tenant`](crate::Client::tenant): every call is its own transaction, in one round trip;
/// - [`TenantHandle::begin`]: one transaction until [`commit`](TenantTransaction::commit); the BEGIN travels with the
///   first statement, so that n statements and the commit are n + 1 round trips;
/// - [`TenantScope::within`]: inside a transaction of the host's own, so that our rows commit or roll back with the
///   host's; one round trip a statement.
///
/// In all three the database enforces the tenant by row-level security, and every statement names it as well.
///
/// # Cancel safety
///
/// Dropping a future of a repository never leaves a connection in a state that its next user could notice. Whether the
/// work of the dropped call took effect is open: [`TenantHandle`]'s calls may have been committed. Repeating a call with
/// the same ids and idempotency keys is safe. In a [`TenantTransaction`] the transaction cannot be committed any more;
/// in a host's transaction the host goes on as if our statement had been finished.
///
/// ```no_run
/// # async fn f(client: lastprice::Client, id: lastprice::TenantId) -> lastprice::Result<()> {
/// let active = client.tenant(id).experiments().by_key("pro-plan").await?;
/// # Ok(()) }
/// ```
pub struct TenantScope<'t> {
    tenant: TenantId,
    actor: Option<Actor>,
    /// No replica is to answer.
    fresh: bool,
    wire: Wire<'t>,
}

enum Wire<'t> {
    OneShot(Arc<Session>),
    Open(Box<Open>),
    Host(Box<Within<'t>>),
}

/// What a scope in a host's transaction works with.
pub(crate) struct Within<'t> {
    pub(crate) transaction: &'t tokio_postgres::Transaction<'t>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) vault: Arc<Vault>,
    pub(crate) slow: Option<Arc<Slow>>,
}

impl<'t> TenantScope<'t> {
    fn one_shot(session: Arc<Session>, tenant: TenantId) -> Self {
        TenantScope { tenant, actor: None, fresh: false, wire: Wire::OneShot(session) }
    }

    pub(crate) fn host(within: Within<'t>, tenant: TenantId) -> Self {
        TenantScope { tenant, actor: None, fresh: true, wire: Wire::Host(Box::new(within)) }
    }

    /// The tenant this scope is bound to.
    #[must_use]
    pub fn tenant_id(&self) -> TenantId {
        self.tenant
    }

    fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    /// Says who makes the changes of this scope, for the record (`updated_by`, and the [audit trail](crate::AuditTrail)).
    #[must_use]
    pub fn with_actor(mut self, actor: Actor) -> Self {
        self.actor = Some(actor);
        self
    }

    /// A transaction of its own for several statements that belong together; `None` if the scope is in one.
    pub(crate) async fn begin_if_alone(&self) -> Result<Option<TenantTransaction>> {
        let Wire::OneShot(session) = &self.wire else { return Ok(None) };
        let watch = Watch::over("begin", self.tenant, session.slow.as_ref());
        let flight = watch.checkout(session).instrument(watch.span()).await;
        watch.landed(&flight, |_| 0);
        let open = Box::new(Open::new(flight?));
        let (tenant, actor) = (self.tenant, self.actor.clone());
        let scope = TenantScope { tenant, actor, fresh: true, wire: Wire::Open(open) };
        Ok(Some(TenantTransaction::new(scope)))
    }

    /// An error of a call that has written something: alone, each of its statements is committed by itself.
    pub(crate) fn after_writing(&self, error: Error) -> Error {
        if self.is_one_shot() { error.after_a_commit() } else { error }
    }

    /// Does it, and again if it was the victim of a deadlock: then it did nothing. In a transaction that is not its own it
    /// cannot be done again.
    pub(crate) async fn unless_deadlocked<T, F>(&self, work: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let tries = if self.is_one_shot() { TRIES } else { 1 };
        for _ in 1..tries {
            let result = work().await;
            if !result.as_ref().is_err_and(Error::is_deadlock) {
                return result;
            }
        }
        work().await
    }

    /// The keys of secrets.
    pub(crate) fn vault(&self) -> &Vault {
        match &self.wire {
            Wire::OneShot(session) => &session.vault,
            Wire::Open(open) => open.vault(),
            Wire::Host(host) => &host.vault,
        }
    }

    /// The client's; none in a host's transaction.
    pub(crate) fn session(&self) -> Option<&Arc<Session>> {
        match &self.wire {
            Wire::OneShot(session) => Some(session),
            Wire::Open(open) => Some(open.session()),
            Wire::Host(_) => None,
        }
    }

    /// Whether each call is a transaction of its own.
    pub(crate) fn is_one_shot(&self) -> bool {
        matches!(self.wire, Wire::OneShot(_))
    }

    /// Runs one statement for the bound tenant. All of them pass here, and are watched.
    pub(crate) async fn query(&self, statement: &'static Statement, params: Params<'_>) -> Result<Vec<Row>> {
        let watch = Watch::over(statement.name, self.tenant, self.slow());
        let rows = self.run(statement, params, &watch).instrument(watch.span()).await;
        watch.landed(&rows, Vec::len);
        rows
    }

    async fn run(
        &self,
        statement: &'static Statement,
        params: Params<'_>,
        watch: &Watch<'_>,
    ) -> Result<Vec<Row>> {
        match &self.wire {
            Wire::OneShot(session) => {
                if statement.may_be_stale
                    && !self.fresh
                    && let Some(attempt) = self.attempt()
                    && let Some(answer) = attempt.ask(self.tenant, statement, params, watch).await?
                {
                    return Ok(answer.rows);
                }
                self.unless_deadlocked(|| self.query_alone(session, statement, params, watch)).await
            }
            Wire::Open(open) => open.query(self.tenant, self.actor.as_ref(), statement, params).await,
            Wire::Host(host) => self.query_within(host, statement, params).await,
        }
    }

    fn slow(&self) -> Option<&Arc<Slow>> {
        match &self.wire {
            Wire::OneShot(session) => session.slow.as_ref(),
            Wire::Open(open) => open.session().slow.as_ref(),
            Wire::Host(host) => host.slow.as_ref(),
        }
    }

    /// Somebody may be sent to the replica.
    fn attempt(&self) -> Option<Attempt<'_>> {
        let Wire::OneShot(session) = &self.wire else { return None };
        session.replica.as_ref()?.attempt(session)
    }

    /// Has a read answered by the replica; `None` if there is none that is current enough, or it has no row of it.
    pub(crate) async fn ask_replica(
        &self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Option<Answer>> {
        let Some(attempt) = self.attempt() else { return Ok(None) };
        let watch = Watch::over(statement.name, self.tenant, self.slow());
        let asking = attempt.ask(self.tenant, statement, params, &watch);
        let answer = asking.instrument(watch.span()).await;
        watch.landed(&answer, |answer| answer.as_ref().map_or(0, |answer| answer.rows.len()));
        answer
    }

    /// Runs one statement that yields at most one row.
    pub(crate) async fn query_opt(
        &self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Option<Row>> {
        Ok(self.query(statement, params).await?.pop())
    }

    async fn query_alone(
        &self,
        session: &Arc<Session>,
        statement: &'static Statement,
        params: Params<'_>,
        watch: &Watch<'_>,
    ) -> Result<Vec<Row>> {
        let flight = watch.checkout(session).await?;
        flight.take_off();
        let rows = self.transact(&flight, statement, params, watch).await;
        flight.land();
        rows
    }

    /// `BEGIN + bind` ‖ statement ‖ `COMMIT`, in one flight.
    async fn transact(
        &self,
        flight: &Flight,
        statement: &'static Statement,
        params: Params<'_>,
        watch: &Watch<'_>,
    ) -> Result<Vec<Row>> {
        let begin = flight.session().begin(self.tenant, self.actor.as_ref());
        let mut retried = false;
        loop {
            let ready = flight.prepare(statement).await?;
            watch.sent();
            let (begun, rows, committed) =
                join3(flight.begin(&begin), flight.query(statement, &ready, params), flight.simple("COMMIT"))
                    .await;
            let lost_outcome = |e| Error::from_driver(e, statement.writes);
            if let Err(e) = begun {
                flight.lose(); // the statement may have run outside a transaction
                return Err(lost_outcome(e));
            }
            return match (rows, committed) {
                (Ok(rows), Ok(())) => Ok(rows),
                // A failed statement turns the COMMIT behind it into a ROLLBACK that reports success.
                (Err(e), Ok(())) if !retried && flight.forget_if_stale(statement, &e) => {
                    retried = true;
                    continue;
                }
                (Err(e), Ok(())) => Err(lost_outcome(e)),
                (Err(e), Err(_)) | (Ok(_), Err(e)) => {
                    flight.lose(); // a COMMIT is always answered, unless the connection is going
                    Err(lost_outcome(e))
                }
            };
        }
    }

    /// Role and tenant are set before and restored after the statement, in one flight: the host's own statements
    /// never run as ours, and a ROLLBACK TO SAVEPOINT of the host's cannot unbind the tenant unnoticed.
    async fn query_within(
        &self,
        Within { transaction, catalog, .. }: &Within<'_>,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Vec<Row>> {
        let text = catalog.text(statement)?;
        let bind = self.bind_within(catalog.schema());
        let params = typed(statement, params);
        let (bound, rows, restored) = join3(
            transaction.batch_execute(&bind),
            transaction.query_typed(text, &params),
            transaction.batch_execute(RESTORE_HOST),
        )
        .await;
        // Nothing was committed, whatever broke: that is the host's to do.
        let failed = |e| Error::from_driver(e, false);
        bound.map_err(failed)?;
        let rows = rows.map_err(failed)?;
        restored.map_err(failed)?;
        Ok(rows)
    }

    fn bind_within(&self, schema: &str) -> String {
        let literal = postgres_protocol::escape::escape_literal;
        format!(
            "SELECT set_config('lastprice.host_role', current_setting('role'), true), \
                    set_config('lastprice.host_tenant', COALESCE(current_setting('app.tenant_id', true), ''), true), \
                    set_config('lastprice.host_actor', COALESCE(current_setting('app.actor', true), ''), true), \
                    set_config('role', CASE WHEN pg_has_role('lastprice_app', 'USAGE') AND row_security_active({}) \
                               THEN current_setting('role') ELSE 'lastprice_app' END, true), \
                    set_config('app.tenant_id', '{}', true), \
                    set_config('app.actor', {}, true)",
            literal(&format!("{schema}.experiments")),
            self.tenant,
            literal(self.actor.as_ref().map_or("", Actor::as_str)),
        )
    }
}

/// Of a transaction that is the victim of deadlocks.
const TRIES: usize = 4;

const RESTORE_HOST: &str = "SELECT set_config('role', current_setting('lastprice.host_role'), true), \
     set_config('app.tenant_id', current_setting('lastprice.host_tenant'), true), \
     set_config('app.actor', current_setting('lastprice.host_actor'), true)";

impl std::fmt::Debug for TenantScope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let form = match self.wire {
            Wire::OneShot(_) => "one-shot",
            Wire::Open(_) => "transaction",
            Wire::Host(_) => "within",
        };
        f.debug_struct("TenantScope")
            .field("tenant", &self.tenant)
            .field("form", &form)
            .finish_non_exhaustive()
    }
}

fn poisoned() -> Error {
    Error::new(
        ErrorKind::Closed,
        "an earlier call of this transaction failed or was dropped: it has been rolled back, nothing was committed",
    )
}
