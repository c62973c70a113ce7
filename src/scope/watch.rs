//! What is told of a statement: a span, metrics, and the slow ones to whoever asked for them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::Span;
use tracing::field::Empty;

use super::flight::Flight;
use super::session::Session;
use crate::error::{ErrorKind, Result};
use crate::id::TenantId;
use crate::telemetry;

/// A statement that took long: see [`ClientBuilder::on_slow_statement`](crate::ClientBuilder::on_slow_statement).
///
/// It has no parameter, no row, and no text that could hold one.
///
/// ```
/// fn tell(slow: &lastprice::SlowStatement) {
///     eprintln!("{} took {:?} for tenant {}", slow.operation, slow.elapsed, slow.tenant);
/// }
/// let builder = lastprice::Client::builder().on_slow_statement(std::time::Duration::from_millis(500), tell);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlowStatement {
    /// The statement's name, for [`Admin::explain`](crate::Admin::explain); of a [`TenantTransaction`](crate::TenantTransaction),
    /// also `begin` (the wait for its connection), and `commit` or `rollback`.
    pub operation: &'static str,
    /// For whom it was.
    pub tenant: TenantId,
    /// How long the caller waited for it: with `waited`, and with retries.
    pub elapsed: Duration,
    /// How much of that was the wait for a connection of the pool.
    pub waited: Duration,
    /// How many rows it returned; `None` if it failed or was dropped.
    pub rows: Option<usize>,
    /// Why it failed.
    pub error: Option<ErrorKind>,
    /// Its future was dropped before there was an answer, as by a time limit of the caller's.
    pub dropped: bool,
}

/// What is to be called for slow statements.
pub(crate) struct Slow {
    pub(crate) threshold: Duration,
    pub(crate) hook: Box<dyn Fn(&SlowStatement) + Send + Sync>,
}

/// One statement under way. When it goes away, everybody who wants to know of it is told.
pub(super) struct Watch<'a> {
    operation: &'static str,
    tenant: TenantId,
    slow: Option<&'a Arc<Slow>>,
    span: Span,
    started: Instant,
    /// In microseconds.
    waited: AtomicU64,
    tries: AtomicU32,
    outcome: Outcome,
}

#[derive(Clone, Copy)]
enum Outcome {
    Dropped,
    Rows(usize),
    Failed(ErrorKind),
}

impl<'a> Watch<'a> {
    /// The span is there only for who listens: without a subscriber this looks at a flag and at the clock.
    pub(super) fn over(operation: &'static str, tenant: TenantId, slow: Option<&'a Arc<Slow>>) -> Self {
        let span = tracing::debug_span!(
            target: "lastprice",
            "lastprice.statement",
            operation,
            %tenant,
            rows = Empty,
            retries = Empty,
            outcome = Empty
        );
        let (waited, tries) = (AtomicU64::new(0), AtomicU32::new(0));
        let started = Instant::now();
        Watch { operation, tenant, slow, span, started, waited, tries, outcome: Outcome::Dropped }
    }

    /// What happens until the answer happens in it.
    pub(super) fn span(&self) -> Span {
        self.span.clone()
    }

    /// It is sent, perhaps again.
    pub(super) fn sent(&self) {
        self.tries.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection of the pool. How long that takes is told, also of one that does not come, or is not waited for any more.
    pub(super) async fn checkout(&self, session: &Arc<Session>) -> Result<Flight> {
        let _waiting = Waiting { watch: self, since: Instant::now() };
        Flight::checkout(session).await
    }

    /// So long until there was a connection.
    fn waited(&self, so_long: Duration) {
        let micros = u64::try_from(so_long.as_micros()).unwrap_or(u64::MAX);
        self.waited.fetch_add(micros, Ordering::Relaxed);
    }

    /// There is an answer.
    pub(super) fn landed<T>(mut self, answer: &Result<T>, rows: impl FnOnce(&T) -> usize) {
        self.outcome = match answer {
            Ok(answer) => Outcome::Rows(rows(answer)),
            Err(error) => Outcome::Failed(error.kind()),
        };
    }

    fn call(&self, slow: &Slow, elapsed: Duration) {
        let waited = Duration::from_micros(self.waited.load(Ordering::Relaxed));
        let (rows, error, dropped) = match self.outcome {
            Outcome::Dropped => (None, None, true),
            Outcome::Rows(rows) => (Some(rows), None, false),
            Outcome::Failed(kind) => (None, Some(kind), false),
        };
        let (operation, tenant) = (self.operation, self.tenant);
        let statement = SlowStatement { operation, tenant, elapsed, waited, rows, error, dropped };
        // It is the host's code, and may run while a future is dropped: what is wrong with it must not end our work.
        if catch_unwind(AssertUnwindSafe(|| (slow.hook)(&statement))).is_err() {
            tracing::warn!(operation, "the hook for slow statements has panicked");
        }
    }
}

/// Who waits for a connection.
struct Waiting<'a> {
    watch: &'a Watch<'a>,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.watch.waited(self.since.elapsed());
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let retries = self.tries.load(Ordering::Relaxed).saturating_sub(1);
        let error = match self.outcome {
            Outcome::Dropped => Some("dropped"),
            Outcome::Failed(kind) => Some(kind.as_str()),
            Outcome::Rows(rows) => {
                self.span.record("rows", rows);
                None
            }
        };
        self.span.record("retries", retries);
        self.span.record("outcome", error.unwrap_or("ok"));
        telemetry::statement(self.operation, elapsed, retries, error);
        if let Some(slow) = self.slow
            && elapsed >= slow.threshold
        {
            self.call(slow, elapsed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn heard(threshold: Duration, end: impl FnOnce(Watch<'_>)) -> Vec<SlowStatement> {
        let heard: Arc<Mutex<Vec<SlowStatement>>> = Arc::default();
        let notes = Arc::clone(&heard);
        let hook = Box::new(move |slow: &SlowStatement| notes.lock().unwrap().push(*slow));
        let slow = Some(Arc::new(Slow { threshold, hook }));
        end(Watch::over("views.record", TenantId::new(), slow.as_ref()));
        let heard = heard.lock().unwrap();
        heard.clone()
    }

    #[test]
    fn the_slow_ones_are_told_however_they_end() {
        let told = heard(Duration::ZERO, |watch| watch.landed(&Ok([1, 2]), |rows| rows.len()));
        assert_eq!((told[0].operation, told[0].rows, told[0].error), ("views.record", Some(2), None));
        let failed = Err::<(), _>(crate::Error::internal("x"));
        let told = heard(Duration::ZERO, |watch| watch.landed(&failed, |_| 0));
        assert_eq!((told[0].rows, told[0].error, told[0].dropped), (None, Some(ErrorKind::Internal), false));
        let told = heard(Duration::ZERO, |watch| {
            watch.waited(Duration::from_millis(7));
            drop(watch);
        });
        assert_eq!((told[0].error, told[0].dropped, told[0].waited.as_millis()), (None, true, 7));
        assert!(heard(Duration::from_secs(60), |watch| drop(watch)).is_empty());
    }

    #[test]
    fn a_hook_that_panics_harms_nobody() {
        let slow = Some(Arc::new(Slow {
            threshold: Duration::ZERO,
            hook: Box::new(|_: &SlowStatement| panic!("a fault of the host's")),
        }));
        Watch::over("views.record", TenantId::new(), slow.as_ref()).landed(&Ok(()), |()| 0);
        drop(Watch::over("views.record", TenantId::new(), slow.as_ref()));
    }
}
