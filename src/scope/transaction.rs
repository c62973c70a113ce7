//! A tenant's handle, and the transaction that it opens.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use futures_util::future::join;
use tokio_postgres::{Row, error::SqlState};
use tracing::Instrument as _;

use super::flight::{Flight, Params};
use super::session::Session;
use super::statement::Statement;
use super::watch::Watch;
use super::{TenantScope, Wire, poisoned};
use crate::error::{Error, Result};
use crate::id::{Actor, TenantId};
use crate::secrets::Vault;

/// One tenant of a [`Client`](crate::Client): every call on it is a transaction of its own, in one round trip.
///
/// ```no_run
/// # async fn f(client: lastprice::Client, id: lastprice::TenantId) -> lastprice::Result<()> {
/// let tenant = client.tenant(id);
/// let me = tenant.tenants().get().await?;
/// # Ok(()) }
/// ```
pub struct TenantHandle {
    scope: TenantScope<'static>,
    session: Arc<Session>,
}

impl fmt::Debug for TenantHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TenantHandle").field("scope", &self.scope).finish()
    }
}

impl Clone for TenantHandle {
    fn clone(&self) -> Self {
        let TenantScope { tenant, actor, fresh, .. } = &self.scope;
        let wire = Wire::OneShot(Arc::clone(&self.session));
        let scope = TenantScope { tenant: *tenant, actor: actor.clone(), fresh: *fresh, wire };
        TenantHandle { scope, session: Arc::clone(&self.session) }
    }
}

impl TenantHandle {
    pub(crate) fn new(session: Arc<Session>, id: TenantId) -> Self {
        TenantHandle { scope: TenantScope::one_shot(Arc::clone(&session), id), session }
    }

    /// Says who makes the changes, for the record (`updated_by`, and the [audit trail](crate::AuditTrail)).
    #[must_use]
    pub fn with_actor(self, actor: Actor) -> Self {
        TenantHandle { scope: self.scope.with_actor(actor), ..self }
    }

    /// Reads what was written: with a [replica](crate::ClientBuilder::replica), what that would answer is asked of the primary, so that
    /// all that was committed before a call is in its answer. Without one, nothing changes.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client, id: lastprice::TenantId, x: lastprice::ExperimentId, view: lastprice::NewView) -> lastprice::Result<()> {
    /// let tenant = client.tenant(id);
    /// tenant.views().record(&view).await?;
    /// let counts = tenant.fresh().metrics().experiment(x).await?; // has the view, for certain
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn fresh(self) -> Self {
        TenantHandle { scope: self.scope.fresh(), ..self }
    }

    /// Opens one transaction for several calls. Takes a connection from the pool, and no round trip: the BEGIN
    /// travels with the first statement.
    ///
    /// ```no_run
    /// # async fn f(client: lastprice::Client, id: lastprice::TenantId, x: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let transaction = client.tenant(id).begin().await?;
    /// let experiment = transaction.experiments().activate(x).await?;
    /// transaction.commit().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Timeout`](crate::ErrorKind::Timeout) if no connection became free in time,
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if none could be opened.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn begin(&self) -> Result<TenantTransaction> {
        let transaction = self.scope.begin_if_alone().await?;
        transaction.ok_or_else(|| Error::internal("a handle is in a transaction already"))
    }
}

impl Deref for TenantHandle {
    type Target = TenantScope<'static>;

    fn deref(&self) -> &Self::Target {
        &self.scope
    }
}

/// One transaction of one tenant, until [`commit`](TenantTransaction::commit). Dropped, it rolls back.
///
/// After a call that failed in the database, or was dropped, the transaction is over: later calls fail, and `commit` rolls
/// back and says so. What a call refuses by itself ([`InvalidInput`](crate::ErrorKind::InvalidInput),
/// [`NotFound`](crate::ErrorKind::NotFound), [`Conflict`](crate::ErrorKind::Conflict)) leaves the transaction usable: then
/// it is up to you whether to commit the rest.
/// See [`TenantHandle::begin`].
#[derive(Debug)]
#[must_use = "dropped, a transaction rolls back"]
pub struct TenantTransaction {
    scope: TenantScope<'static>,
}

impl TenantTransaction {
    pub(super) fn new(scope: TenantScope<'static>) -> Self {
        TenantTransaction { scope }
    }

    /// Commits.
    ///
    /// ```no_run
    /// # async fn f(transaction: lastprice::TenantTransaction) -> lastprice::Result<()> {
    /// transaction.commit().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Closed`](crate::ErrorKind::Closed) if an earlier call failed in the database or was dropped: all is rolled back;
    /// [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown) if the connection broke meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the transaction may or may not have been committed.
    pub async fn commit(self) -> Result<()> {
        self.end("COMMIT", "commit").await
    }

    /// Rolls back, and waits until it has happened. Dropping the transaction does the same without waiting.
    ///
    /// ```no_run
    /// # async fn f(transaction: lastprice::TenantTransaction) -> lastprice::Result<()> {
    /// transaction.rollback().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if the connection broke: the server rolls back by itself.
    pub async fn rollback(self) -> Result<()> {
        self.end("ROLLBACK", "rollback").await
    }

    async fn end(&self, how: &'static str, operation: &'static str) -> Result<()> {
        let watch = Watch::over(operation, self.scope.tenant, self.scope.slow());
        let ended = self.open().finish(how).instrument(watch.span()).await;
        watch.landed(&ended, |()| 0);
        ended
    }

    fn open(&self) -> &Open {
        let Wire::Open(open) = &self.scope.wire else {
            unreachable!("a transaction is open by construction")
        };
        open
    }
}

impl Deref for TenantTransaction {
    type Target = TenantScope<'static>;

    fn deref(&self) -> &Self::Target {
        &self.scope
    }
}

/// The state of an open transaction. Calls may run concurrently on it; they fly in the order of their first poll.
pub(super) struct Open {
    flight: Flight,
    /// BEGIN was sent.
    begun: AtomicBool,
    /// Held while the BEGIN is under way.
    first: std::sync::Mutex<()>,
    /// COMMIT or ROLLBACK was answered.
    ended: AtomicBool,
    /// A call failed or was dropped under way.
    poisoned: AtomicBool,
}

impl Open {
    pub(super) fn new(flight: Flight) -> Self {
        let no = || AtomicBool::new(false);
        Open { flight, begun: no(), first: std::sync::Mutex::new(()), ended: no(), poisoned: no() }
    }

    pub(super) async fn query(
        &self,
        tenant: TenantId,
        actor: Option<&Actor>,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Vec<Row>> {
        self.check()?;
        let call = Call::take_off(self);
        let rows = self.send(tenant, actor, statement, params).await;
        call.land();
        rows.inspect_err(|_| self.poison())
    }

    async fn send(
        &self,
        tenant: TenantId,
        actor: Option<&Actor>,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Vec<Row>> {
        let ready = self.flight.prepare(statement).await?;
        self.check()?; // of what other calls met meanwhile
        let (begun, rows) = if self.begun.load(Ordering::Acquire) {
            (Ok(()), Some(self.flight.query(statement, &ready, params).await))
        } else {
            let text = self.flight.session().begin(tenant, actor);
            let mut begin = std::pin::pin!(self.flight.begin(&text));
            // Whoever sees `begun` may send: the BEGIN leaves (at its first poll) before anybody does.
            let sent = {
                let _one = self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let is_first = !self.begun.load(Ordering::Acquire);
                let polled = is_first.then(|| begin.as_mut().poll(&mut Context::from_waker(Waker::noop())));
                self.begun.store(true, Ordering::Release);
                polled
            };
            let query = self.flight.query(statement, &ready, params);
            match sent {
                Some(polled) => together(polled, begin, query).await,
                None => (Ok(()), Some(query.await)),
            }
        };
        if let Err(e) = begun {
            self.flight.lose(); // the statement may have run outside a transaction
            return Err(Error::from_driver(e, false));
        }
        let rows = rows.ok_or_else(|| Error::internal("a statement was not sent"))?;
        rows.map_err(|e| {
            self.flight.forget_if_stale(statement, &e);
            self.flight.lose_if_broken(&e);
            Error::from_driver(e, false)
        })
    }

    pub(super) fn vault(&self) -> &Vault {
        &self.session().vault
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        self.flight.session()
    }

    async fn finish(&self, how: &'static str) -> Result<()> {
        let usable = self.check();
        let commits = how == "COMMIT" && usable.is_ok();
        if self.begun.load(Ordering::Relaxed) {
            self.flight.cancel_dropped().await;
            let call = Call::take_off(self);
            let ended = self.flight.simple(if commits { "COMMIT" } else { "ROLLBACK" }).await;
            call.land();
            match ended {
                Ok(()) => self.ended.store(true, Ordering::Relaxed),
                // Hit by the cancel of a dropped call; closing the connection rolls back as well. And that an earlier
                // call failed says more than that the connection broke with it.
                Err(e) if !commits && (how == "COMMIT" || e.code() == Some(&SqlState::QUERY_CANCELED)) => {
                    self.flight.lose();
                }
                Err(e) => {
                    self.flight.lose();
                    return Err(Error::from_driver(e, commits));
                }
            }
        }
        if how == "COMMIT" { usable } else { Ok(()) }
    }

    fn check(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Relaxed) { Err(poisoned()) } else { Ok(()) }
    }

    fn poison(&self) {
        self.poisoned.store(true, Ordering::Relaxed);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if *self.begun.get_mut() && !*self.ended.get_mut() {
            self.flight.queue_rollback();
        }
    }
}

/// What both give, flying together. `begin` was polled once, and on a busy machine that may have been slow enough for
/// its answer to be there: the query is sent all the same, unless the connection is broken.
async fn together<E, T>(
    polled: Poll<Result<(), E>>,
    begin: impl Future<Output = Result<(), E>>,
    query: impl Future<Output = T>,
) -> (Result<(), E>, Option<T>) {
    match polled {
        Poll::Pending => {
            let (begun, rows) = join(begin, query).await;
            (begun, Some(rows))
        }
        Poll::Ready(Ok(())) => (Ok(()), Some(query.await)),
        Poll::Ready(Err(e)) => (Err(e), None),
    }
}

/// One call under way. Dropped before it has landed, it poisons the transaction and the connection.
struct Call<'a> {
    open: &'a Open,
    landed: bool,
}

impl<'a> Call<'a> {
    fn take_off(open: &'a Open) -> Self {
        open.flight.take_off();
        Call { open, landed: false }
    }

    fn land(mut self) {
        self.landed = true;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.landed {
            self.open.flight.land();
        } else {
            self.open.poison();
            self.open.flight.lose();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_statement_flies_whenever_the_begin_is_answered() {
        let after = |polled, begin: std::future::Ready<Result<(), ()>>| {
            together(polled, begin, ready("rows")).now_or_never().unwrap()
        };
        assert_eq!(after(Poll::Pending, ready(Ok(()))), (Ok(()), Some("rows")));
        assert_eq!(after(Poll::Ready(Ok(())), ready(Err(()))), (Ok(()), Some("rows")), "answered at once");
        let broken = together(Poll::Ready(Err(())), pending(), ready("rows")).now_or_never().unwrap();
        assert_eq!(broken, (Err(()), None));
    }
}
