//! One connection in use, and what must happen to it when its user goes away.
//!
//! The rules, each of them learnt from a failure:
//!
//! - Messages that belong together are polled together (`join`), so that they leave in one flight; `try_join`
//!   would drop the rest at the first error.
//! - A statement is prepared, or sent with its types, *before* it flies: an unprepared text would be parsed in a
//!   round trip of its own, and run after the COMMIT that was sent behind it, outside the tenant.
//! - The clean-up is armed before the first poll.
//! - A connection that is left while a statement is under way, or is being prepared, never returns to the pool. The
//!   statement is cancelled, except while a BEGIN is unanswered: the cancel might hit that, and the statement behind
//!   it would run bare, so then the connection is only closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::Object;
use futures_util::FutureExt;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{Format, IsNull, ToSql, Type};
use tokio_postgres::{Row, SimpleQueryMessage, error::SqlState};

use super::session::{Session, StatementMode};
use super::statement::Statement;
use crate::error::{Error, ErrorKind, Result};

pub(crate) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A pooled connection that returns to the pool clean, or not at all.
pub(crate) struct Flight {
    /// `None` only after it was given up.
    connection: Option<Object>,
    session: Arc<Session>,
    /// Calls that were sent and have not been answered to the end. A call that was dropped stays.
    under_way: AtomicUsize,
    /// A BEGIN was sent and has not been answered.
    begins: AtomicBool,
    /// The connection must not be used again.
    lost: AtomicBool,
}

/// A statement, ready to fly: nothing remains that needs a round trip of its own.
pub(crate) enum Ready<'s> {
    Named(tokio_postgres::Statement),
    Unnamed(&'s str),
}

impl Flight {
    pub(crate) async fn checkout(session: &Arc<Session>) -> Result<Self> {
        Ok(Flight {
            connection: Some(session.checkout().await?),
            session: Arc::clone(session),
            under_way: AtomicUsize::new(0),
            begins: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        })
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(crate) fn connection(&self) -> &Object {
        self.connection.as_ref().expect("given up only by drop")
    }

    /// Needs a round trip the first time a connection meets the statement, none afterwards. Take off before: the
    /// server may wait for a lock while it parses, and before a BEGIN its own limit is not set.
    pub(crate) async fn prepare(&self, statement: &'static Statement) -> Result<Ready<'_>> {
        let text = self.session.catalog.text(statement)?;
        match self.session.mode {
            StatementMode::Typed => Ok(Ready::Unnamed(text)),
            StatementMode::Prepared => {
                let preparing = self.connection().prepare_typed_cached(text, statement.params);
                let prepared = match self.session.statement_timeout {
                    Some(limit) => tokio::time::timeout(limit + ON_THE_WAY, preparing).await,
                    None => Ok(preparing.await),
                };
                let Ok(prepared) = prepared else {
                    self.take_off(); // never to land: the server is at it still
                    return Err(Error::new(ErrorKind::Timeout, "the statement was not prepared in time"));
                };
                prepared.map(Ready::Named).map_err(|e| {
                    self.lose_if_broken(&e);
                    Error::from_driver(e, false)
                })
            }
        }
    }

    /// Whether the error says that the named statement is not what it was (a changed table, a pooler); forgets
    /// it, so that the next use prepares it anew.
    pub(crate) fn forget_if_stale(
        &self,
        statement: &'static Statement,
        error: &tokio_postgres::Error,
    ) -> bool {
        let stale = matches!(
            error.code(),
            Some(&SqlState::FEATURE_NOT_SUPPORTED | &SqlState::INVALID_SQL_STATEMENT_NAME)
        );
        if stale && let Ok(text) = self.session.catalog.text(statement) {
            self.connection().statement_cache.remove(text, statement.params);
        }
        stale
    }

    pub(crate) async fn begin(&self, text: &str) -> Result<(), tokio_postgres::Error> {
        self.begins.store(true, Ordering::Relaxed);
        self.connection().batch_execute(text).await?;
        self.begins.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// A BEGIN that has a question with it.
    pub(crate) async fn begin_asking(
        &self,
        text: &str,
    ) -> Result<Vec<SimpleQueryMessage>, tokio_postgres::Error> {
        self.begins.store(true, Ordering::Relaxed);
        let said = self.connection().simple_query(text).await?;
        self.begins.store(false, Ordering::Relaxed);
        Ok(said)
    }

    pub(crate) async fn query(
        &self,
        statement: &'static Statement,
        ready: &Ready<'_>,
        params: Params<'_>,
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        match ready {
            Ready::Named(named) => {
                let hidden: Vec<Hidden<'_>> = params.iter().map(|p| Hidden(*p)).collect();
                let params: Vec<&(dyn ToSql + Sync)> = hidden.iter().map(|p| p as _).collect();
                self.connection().query(named, &params).await
            }
            // Their values are in no log of the driver's.
            Ready::Unnamed(text) => self.connection().query_typed(text, &typed(statement, params)).await,
        }
    }

    pub(crate) async fn simple(&self, text: &str) -> Result<(), tokio_postgres::Error> {
        self.connection().batch_execute(text).await
    }

    /// From here until [`land`](Flight::land) a drop gives the connection up.
    pub(crate) fn take_off(&self) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn land(&self) {
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    /// Never let anybody use this connection again.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// After a FATAL error the server hangs up, which the pool may not have noticed when its next user comes.
    pub(crate) fn lose_if_broken(&self, error: &tokio_postgres::Error) {
        use tokio_postgres::error::Severity::{Fatal, Panic};
        if error.as_db_error().is_none_or(|db| matches!(db.parsed_severity(), Some(Fatal | Panic))) {
            self.lose();
        }
    }

    /// Ends the work of calls that were dropped, if there are any and it can be done safely.
    pub(crate) async fn cancel_dropped(&self) {
        if self.under_way.load(Ordering::Relaxed) > 0 && !self.begins.load(Ordering::Relaxed) {
            (self.session.cancel)(self.connection().cancel_token()).await;
        }
    }

    /// Ends an idle transaction without waiting: the ROLLBACK is queued ahead of the connection's next user.
    pub(crate) fn queue_rollback(&self) {
        if let Some(Err(_)) = self.connection().batch_execute("ROLLBACK").now_or_never() {
            self.lose();
        }
    }
}

/// What a limit of the server's is exceeded by when it is watched from here.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// A parameter that the driver cannot print: at its debug level it logs the parameters of named statements.
struct Hidden<'a>(&'a (dyn ToSql + Sync));

impl std::fmt::Debug for Hidden<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("_")
    }
}

impl ToSql for Hidden<'_> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql_checked(ty, out)
    }

    fn accepts(_: &Type) -> bool {
        true // the parameter itself is asked by to_sql_checked
    }

    fn to_sql_checked(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql_checked(ty, out)
    }

    fn encode_format(&self, ty: &Type) -> Format {
        self.0.encode_format(ty)
    }
}

/// Parameters with the types they were declared with.
pub(crate) fn typed<'a>(
    statement: &'static Statement,
    params: Params<'a>,
) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(statement.params.iter().cloned()).collect()
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        let under_way = *self.under_way.get_mut() > 0;
        if !under_way && !*self.lost.get_mut() {
            drop(connection); // back into the pool
            self.session.tell_pool();
            return;
        }
        // Out of the pool, which may open another one in its place.
        let client = Object::take(connection);
        self.session.tell_pool();
        if under_way
            && !*self.begins.get_mut()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let cancelled = (self.session.cancel)(client.cancel_token());
            runtime.spawn(async move {
                cancelled.await;
                drop(client);
            });
        }
    }
}
