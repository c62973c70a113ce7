//! A standby that answers reads, for as long as it is known to be current enough.
//!
//! How far it is behind, a standby does not know: what it replayed last may be old because nothing was written since, and that
//! nothing waits to be replayed may mean that nothing arrives any more. So at every beat a mark is taken: how far the
//! primary's log is now. A standby that has replayed the log up to a mark has all that was committed before the mark was
//! taken; no server's clock takes part in that. How far it is, the standby says in the same flight as it answers, so that a
//! read costs one round trip there as well.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use futures_util::FutureExt;
use futures_util::future::try_join3;
use tokio::task::AbortHandle;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_postgres::{Row, error::SqlState};

use super::flight::{Flight, Params};
use super::health::{Health, Leave, REST};
use super::marks::{Mark, Marks, Place, REPLAYED, keep_marking, origin_of};
use super::session::Session;
use super::statement::Statement;
use super::watch::Watch;
use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;
use crate::telemetry;

/// How many marks there are within the time that a standby may be behind.
const MARKS: u32 = 4;

/// Who has waited so long and heard nothing has learnt something, also if it gives up by itself.
const SILENCE: Duration = Duration::from_millis(100);

/// The standby of a primary, and what is known of it.
pub(crate) struct Replica {
    pub(crate) session: Arc<Session>,
    max_staleness: Duration,
    state: Mutex<State>,
    answered: AtomicU64,
    empty: AtomicU64,
    stale: AtomicU64,
    failed: AtomicU64,
}

#[derive(Default)]
struct State {
    marks: Marks,
    marking: Option<AbortHandle>,
    health: Health,
    /// It was behind, and nobody is sent there until then.
    behind: Option<Instant>,
    staleness: Option<Duration>,
}

/// What came of a read that the standby might have answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Answered,
    /// It has no row of it, which may be too new for it.
    Empty,
    Stale,
    Failed,
}

/// What a standby said.
pub(crate) struct Answer {
    pub(crate) rows: Vec<Row>,
    /// All that was committed before is in it.
    pub(crate) as_of: Instant,
}

/// What a replica has been good for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Uses {
    pub(crate) answered: u64,
    pub(crate) empty: u64,
    pub(crate) stale: u64,
    pub(crate) failed: u64,
    pub(crate) staleness: Option<Duration>,
}

impl Replica {
    pub(crate) fn new(session: Session, max_staleness: Duration) -> Self {
        let zero = AtomicU64::default;
        Replica {
            session: Arc::new(session.of_replica()),
            max_staleness,
            state: Mutex::default(),
            answered: zero(),
            empty: zero(),
            stale: zero(),
            failed: zero(),
        }
    }

    /// Somebody may be sent there; `None` if the primary has to be asked at once.
    pub(super) fn attempt(&self, primary: &Arc<Session>) -> Option<Attempt<'_>> {
        self.keep_marking(primary);
        let leave = self.leave();
        leave.map_err(|lack| self.count(lack)).ok().map(|leave| Attempt::new(self, leave))
    }

    /// Whether it may be used at all: row-level security binds the login there, and it belongs to this primary. That it is
    /// away is no fault: the primary is asked instead.
    pub(crate) async fn check(&self, primary: &Session) -> Result<()> {
        let leave = self.state().health.leave_to_examine(Instant::now());
        let Some(attempt) = leave.map(|leave| Attempt::new(self, leave)) else { return Ok(()) };
        let there = async {
            let connection = self.session.checkout().await?;
            match timeout(self.patience(), origin_of(&connection)).await {
                Ok(origin) => origin,
                Err(late) => {
                    drop(Object::take(connection)); // it waits for an answer still
                    Err(silence(late))
                }
            }
        };
        let there = match self.session.in_time(1, there).await {
            Ok(there) => there,
            Err(error) => {
                attempt.failed(&error);
                if error.kind() == ErrorKind::IsolationNotEnforced {
                    return Err(error);
                }
                tracing::warn!(%error, "the replica cannot be reached; the primary is asked");
                return Ok(());
            }
        };
        attempt.heard();
        let here = origin_of(&*primary.checkout().await?).await?;
        let wrong = |rule| Err(Error::invalid("replica", rule));
        if there.cluster != here.cluster {
            return wrong("is no standby of the server that `url` names");
        }
        if there.database != here.database {
            return wrong("names another database than `url`");
        }
        Ok(())
    }

    pub(crate) fn uses(&self) -> Uses {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Uses {
            answered: count(&self.answered),
            empty: count(&self.empty),
            stale: count(&self.stale),
            failed: count(&self.failed),
            staleness: self.state().staleness,
        }
    }

    pub(crate) fn close(&self) {
        self.session.pool.close();
        self.session.tell_pool();
        if let Some(marking) = self.state().marking.take() {
            marking.abort();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn beat(&self) -> Duration {
        self.max_staleness / MARKS
    }

    /// A network that says nothing any more is not waited for as long as a statement may take.
    fn patience(&self) -> Duration {
        self.session.pool.timeouts().create.unwrap_or(REST)
    }

    /// Leave to ask, or what is to be counted instead.
    fn leave(&self) -> Result<Leave, Use> {
        let (mut state, now) = (self.state(), Instant::now());
        if state.marks.oldest().is_none() || state.behind.is_some_and(|until| now < until) {
            return Err(Use::Stale);
        }
        state.health.leave(now).ok_or(Use::Failed)
    }

    fn count(&self, what: Use) {
        let (counter, outcome) = match what {
            Use::Answered => (&self.answered, "answered"),
            Use::Empty => (&self.empty, "empty"),
            Use::Stale => (&self.stale, "stale"),
            Use::Failed => (&self.failed, "failed"),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        telemetry::replica_read(outcome);
    }

    /// From when on something may be missing in what is at this place of the log, if that is late enough.
    fn as_of(&self, place: Place) -> Option<Instant> {
        let mut state = self.state();
        let mark = state.marks.reached(place);
        // Behind all marks, it is at least as old as the oldest.
        let staleness = mark.or(state.marks.oldest())?.taken.elapsed();
        state.staleness = Some(staleness);
        telemetry::replica_staleness(staleness);
        let mark = mark.filter(|_| staleness <= self.max_staleness);
        if mark.is_none() {
            state.behind = Some(Instant::now() + self.beat().min(REST));
        }
        Some(mark?.taken)
    }

    /// Takes marks from here on; once more, if the runtime that did so is gone.
    fn keep_marking(&self, primary: &Arc<Session>) {
        let mut state = self.state();
        if state.marking.as_ref().is_none_or(AbortHandle::is_finished) && !self.session.pool.is_closed() {
            state.marking = Some(tokio::spawn(keep_marking(Arc::downgrade(primary))).abort_handle());
        }
    }

    pub(super) fn has_mark(&self, mark: Mark) {
        self.state().marks.push(mark, self.max_staleness);
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.close();
    }
}

/// One who is sent there. Dropped, it was given up by its caller.
pub(super) struct Attempt<'r> {
    replica: &'r Replica,
    leave: Leave,
    began: Instant,
    /// The standby has spoken, or has failed to.
    settled: AtomicBool,
}

impl<'r> Attempt<'r> {
    fn new(replica: &'r Replica, leave: Leave) -> Self {
        Attempt { replica, leave, began: Instant::now(), settled: AtomicBool::new(false) }
    }

    /// Asks the standby, which has to be current enough by then; `None` if the primary has to be asked. What the standby has
    /// nothing of may be too new for it.
    pub(super) async fn ask(
        self,
        tenant: TenantId,
        statement: &'static Statement,
        params: Params<'_>,
        watch: &Watch<'_>,
    ) -> Result<Option<Answer>> {
        let Attempt { replica, .. } = self;
        let (what, answer) =
            match replica.session.in_time(1, self.fly(tenant, statement, params, watch)).await {
                Ok((place, rows)) => match replica.as_of(place) {
                    Some(as_of) if !rows.is_empty() => (Use::Answered, Some(Answer { rows, as_of })),
                    Some(_) => (Use::Empty, None),
                    None => (Use::Stale, None),
                },
                // It would take as long on the primary.
                Err(error) if error.sqlstate() == Some(&SqlState::QUERY_CANCELED) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "the replica does not answer; the primary is asked");
                    self.failed(&error);
                    (Use::Failed, None)
                }
            };
        replica.count(what);
        Ok(answer)
    }

    /// `BEGIN + bind + how far are you` ‖ statement ‖ `COMMIT`, in one flight.
    async fn fly(
        &self,
        tenant: TenantId,
        statement: &'static Statement,
        params: Params<'_>,
        watch: &Watch<'_>,
    ) -> Result<(Place, Vec<Row>)> {
        let flight = watch.checkout(&self.replica.session).await?;
        flight.take_off();
        let answer = self.transact(&flight, tenant, statement, params).await;
        flight.land();
        answer
    }

    async fn transact(
        &self,
        flight: &Flight,
        tenant: TenantId,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<(Place, Vec<Row>)> {
        let begin =
            format!("{}; SET TRANSACTION READ ONLY; {REPLAYED}", flight.session().begin(tenant, None));
        let ready = flight.prepare(statement).await?;
        // To drop the rest is safe, since the connection is lost with it.
        let begun = async {
            let said =
                timeout(self.replica.patience(), flight.begin_asking(&begin)).await.map_err(silence)?;
            let place = Place::said(&said.map_err(|e| Error::from_driver(e, false))?);
            if place.is_ok() {
                self.heard(); // however long the statement takes
            }
            Ok(place)
        };
        let (query, commit) = (flight.query(statement, &ready, params), flight.simple("COMMIT"));
        let flown = try_join3(begun, query.map(Ok), commit.map(Ok)).await;
        let (place, rows, committed) = flown.inspect_err(|_: &Error| flight.lose())?;
        let failed = |e| Error::from_driver(e, false);
        match (rows, committed) {
            (Ok(rows), Ok(())) => Ok((place?, rows)),
            (Err(e), Ok(())) => {
                flight.forget_if_stale(statement, &e);
                Err(failed(e))
            }
            (Err(e), Err(_)) | (Ok(_), Err(e)) => {
                flight.lose();
                Err(failed(e))
            }
        }
    }

    /// Others may be sent.
    fn heard(&self) {
        self.settled.store(true, Ordering::Relaxed);
        self.replica.state().health.answered();
    }

    fn failed(&self, error: &Error) {
        self.settled.store(true, Ordering::Relaxed);
        let is_silent = error.kind() == ErrorKind::Timeout;
        self.replica.state().health.failed(self.leave, is_silent, Instant::now());
    }
}

fn silence(_: Elapsed) -> Error {
    Error::new(ErrorKind::Timeout, "the replica did not answer in time")
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if *self.settled.get_mut() {
            return;
        }
        let mut state = self.replica.state();
        if self.began.elapsed() >= SILENCE {
            state.health.failed(self.leave, true, Instant::now());
        } else {
            state.health.withdrawn(self.leave);
        }
    }
}
