//! A standby that answers reads, for as long as it is known to be current enough.
//!
//! How far it is behind, a standby does not know: what it replayed last may be old because nothing was written since, and that
//! nothing waits to be replayed may mean that nothing arrives any more. So at every beat a mark is taken: how far the
//! primary's log is now. A standby that has replayed the log up to a mark has all that was committed before the mark was
//! taken; no server's clock takes part in that. How far it is, the standby says in the same flight as it answers, so that a
//! read costs one round trip there as well.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, try_join3};
use futures_util::{FutureExt, TryFutureExt};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row, SimpleQueryMessage, error::SqlState};

use super::flight::{Flight, Params};
use super::session::Session;
use super::statement::Statement;
use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;

/// For how long nobody is sent to a standby that has failed, or is behind: so long at the most.
const REST: Duration = Duration::from_secs(1);

/// How many marks there are within the time that a standby may be behind.
const MARKS: u32 = 4;

/// The standby of a primary, and what is known of it.
pub(crate) struct Replica {
    pub(crate) session: Arc<Session>,
    max_staleness: Duration,
    state: Mutex<State>,
    answered: AtomicU64,
    stale: AtomicU64,
    failed: AtomicU64,
}

#[derive(Default)]
struct State {
    marks: Marks,
    marking: Option<AbortHandle>,
    /// Until when nobody is sent there, and what is counted instead.
    rest: Option<(Instant, Lack)>,
    staleness: Option<Duration>,
}

/// How far the log of a cluster was at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Of which cluster: its standbys have the same.
    cluster: u64,
    lsn: u64,
}

/// How far the primary was, after some moment of our clock.
#[derive(Debug, Clone, Copy)]
struct Mark {
    taken: Instant,
    place: Place,
}

/// The newest last.
#[derive(Default)]
struct Marks(VecDeque<Mark>);

/// Why the primary is asked instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
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
    pub(crate) stale: u64,
    pub(crate) failed: u64,
    pub(crate) staleness: Option<Duration>,
}

impl Replica {
    pub(crate) fn new(session: Arc<Session>, max_staleness: Duration) -> Self {
        let zero = AtomicU64::default;
        let state = Mutex::default();
        Replica { session, max_staleness, state, answered: zero(), stale: zero(), failed: zero() }
    }

    /// Asks the standby, which has to be current enough by then; `None` if the primary has to be asked. What the standby has
    /// nothing of may be too new for it.
    pub(super) async fn ask(
        &self,
        primary: &Arc<Session>,
        tenant: TenantId,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Option<Answer>> {
        self.keep_marking(primary);
        if let Some(lack) = self.lack() {
            return Ok(self.lacks(lack));
        }
        match self.session.in_time(1, self.fly(tenant, statement, params)).await {
            Ok((place, rows)) => match self.as_of(place) {
                Some(as_of) if !rows.is_empty() => {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                    Ok(Some(Answer { rows, as_of }))
                }
                Some(_) => Ok(self.lacks(Lack::Stale)),
                None => {
                    self.rest(self.beat().min(REST), Lack::Stale);
                    Ok(self.lacks(Lack::Stale))
                }
            },
            // It would take as long on the primary.
            Err(error) if error.sqlstate() == Some(&SqlState::QUERY_CANCELED) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the replica does not answer; the primary is asked");
                self.rest(REST, Lack::Failed);
                Ok(self.lacks(Lack::Failed))
            }
        }
    }

    /// Whether it may be used at all: row-level security binds the login there, and it belongs to this primary. That it is
    /// away is no fault: the primary is asked instead.
    pub(crate) async fn check(&self, primary: &Session) -> Result<()> {
        let there = async {
            let connection = self.session.checkout().await?;
            cluster_of(&connection).await
        };
        match there.await {
            Ok(there) if there == cluster_of(&*primary.checkout().await?).await? => Ok(()),
            Ok(_) => Err(Error::invalid("replica", "is no standby of the server that `url` names")),
            Err(error) if error.kind() == ErrorKind::IsolationNotEnforced => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the replica cannot be reached; the primary is asked");
                Ok(())
            }
        }
    }

    pub(crate) fn uses(&self) -> Uses {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Uses {
            answered: count(&self.answered),
            stale: count(&self.stale),
            failed: count(&self.failed),
            staleness: self.state().staleness,
        }
    }

    pub(crate) fn close(&self) {
        self.session.pool.close();
        if let Some(marking) = self.state().marking.take() {
            marking.abort();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self) -> Duration {
        self.max_staleness / MARKS
    }

    fn rest(&self, pause: Duration, lack: Lack) {
        self.state().rest = Some((Instant::now() + pause, lack));
    }

    /// What is to be counted instead of asking, if it is useless to ask.
    fn lack(&self) -> Option<Lack> {
        let state = self.state();
        match state.rest {
            Some((until, lack)) if Instant::now() < until => Some(lack),
            _ => state.marks.0.is_empty().then_some(Lack::Stale),
        }
    }

    fn lacks(&self, lack: Lack) -> Option<Answer> {
        let counter = if lack == Lack::Stale { &self.stale } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// From when on something may be missing in what is at this place of the log, if that is late enough.
    fn as_of(&self, place: Place) -> Option<Instant> {
        let mut state = self.state();
        let mark = state.marks.reached(place);
        // Behind all marks, it is at least as old as the oldest.
        let staleness = mark.or(state.marks.0.front().copied())?.taken.elapsed();
        state.staleness = Some(staleness);
        let mark = mark?;
        (staleness <= self.max_staleness).then_some(mark.taken)
    }

    /// `BEGIN + bind + how far are you` ‖ statement ‖ `COMMIT`, in one flight.
    async fn fly(
        &self,
        tenant: TenantId,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<(Place, Vec<Row>)> {
        let flight = Flight::checkout(&self.session).await?;
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
        // A network that says nothing any more is not waited for as long as a statement may take. To drop the rest is safe, since
        // the connection is lost with it.
        let limit = self.session.pool.timeouts().create.unwrap_or(REST);
        let begun = async {
            let late = |_| Error::new(ErrorKind::Timeout, "the replica did not answer in time");
            let said = timeout(limit, flight.begin_asking(&begin)).await.map_err(late)?;
            said.map_err(|e| Error::from_driver(e, false))
        };
        let (query, commit) = (flight.query(statement, &ready, params), flight.simple("COMMIT"));
        let flown = try_join3(begun, query.map(Ok), commit.map(Ok)).await;
        let (said, rows, committed) = flown.inspect_err(|_| flight.lose())?;
        let failed = |e| Error::from_driver(e, false);
        match (rows, committed) {
            (Ok(rows), Ok(())) => Ok((Place::said(&said)?, rows)),
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

    /// Takes marks from here on; once more, if the runtime that did so is gone.
    fn keep_marking(&self, primary: &Arc<Session>) {
        let mut state = self.state();
        if state.marking.as_ref().is_none_or(AbortHandle::is_finished) && !self.session.pool.is_closed() {
            state.marking = Some(tokio::spawn(mark(Arc::downgrade(primary))).abort_handle());
        }
    }

    fn has_mark(&self, mark: Mark) {
        self.state().marks.push(mark, self.max_staleness);
    }
}

impl Marks {
    /// One that is older than that is kept, which says how far behind a standby is.
    fn push(&mut self, mark: Mark, max_age: Duration) {
        let Marks(marks) = self;
        // A primary that is less far than it was is another one.
        if marks
            .back()
            .is_some_and(|last| last.place.cluster != mark.place.cluster || last.place.lsn > mark.place.lsn)
        {
            marks.clear();
        }
        while marks.get(1).is_some_and(|second| mark.taken.duration_since(second.taken) > max_age) {
            marks.pop_front();
        }
        marks.push_back(mark);
    }

    /// The last one that a standby at this place has reached.
    fn reached(&self, place: Place) -> Option<Mark> {
        let reached = |mark: &&Mark| mark.place.cluster == place.cluster && mark.place.lsn <= place.lsn;
        self.0.iter().rev().find(reached).copied()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.close();
    }
}

/// By a connection of its own: when the pool is exhausted, the replica is needed most.
async fn mark(primary: Weak<Session>) {
    let mut line = None;
    loop {
        let Some(session) = primary.upgrade() else { return };
        let Some(replica) = &session.replica else { return };
        let (beat, taken) = (replica.beat(), Instant::now());
        let limit = beat.max(REST);
        let opening = line.is_none().then(|| (session.another)(None));
        drop(session); // nobody is kept alive by being waited for
        let place = timeout(limit, look(&mut line, opening)).await;
        match (place, primary.upgrade()) {
            (Ok(Ok(place)), Some(session)) => {
                if let Some(replica) = &session.replica {
                    replica.has_mark(Mark { taken, place });
                }
            }
            (failed, _) => {
                line = None;
                if let Ok(Err(error)) = failed {
                    tracing::debug!(%error, "it cannot be known how far the replica is");
                }
            }
        }
        tokio::time::sleep(beat.saturating_sub(taken.elapsed())).await;
    }
}

/// Opens a connection.
type Opening = BoxFuture<'static, Option<Result<Client, tokio_postgres::Error>>>;

/// How far the primary is: by a connection that is there, or that has to be opened.
async fn look(line: &mut Option<Client>, opening: Option<Opening>) -> Result<Place> {
    if let Some(opening) = opening {
        let late = || Error::new(ErrorKind::Timeout, "connecting took longer than `connect_timeout`");
        *line = Some(opening.await.ok_or_else(late)?.map_err(Error::from_connecting)?);
    }
    let client = line.as_ref().ok_or_else(|| Error::internal("a connection was not opened"))?;
    let said = client.simple_query(INSERTED).map_err(|e| Error::from_driver(e, false)).await?;
    Place::said(&said)
}

async fn cluster_of(connection: &Client) -> Result<u64> {
    let said = connection.simple_query(CLUSTER).await.map_err(|e| Error::from_driver(e, false))?;
    Ok(Place::said(&said)?.cluster)
}

impl Place {
    fn said(messages: &[SimpleQueryMessage]) -> Result<Place> {
        let row = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let text = |column| row.and_then(|row| row.try_get(column).ok().flatten());
        let cluster = text(0).and_then(|cluster| cluster.parse().ok());
        let lsn = text(1).and_then(|lsn| lsn.parse::<PgLsn>().ok()).map(u64::from);
        let unsaid = || Error::new(ErrorKind::Unavailable, "the server does not say how far its log is");
        Ok(Place { cluster: cluster.ok_or_else(unsaid)?, lsn: lsn.ok_or_else(unsaid)? })
    }
}

/// Not how far the log is written: what is committed without waiting for the disk is seen before.
const INSERTED: &str =
    "SELECT system_identifier, pg_catalog.pg_current_wal_insert_lsn() FROM pg_catalog.pg_control_system()";

/// NULL on a server that never was a standby; on one that is none any more it stays as it was then.
const REPLAYED: &str =
    "SELECT system_identifier, pg_catalog.pg_last_wal_replay_lsn() FROM pg_catalog.pg_control_system()";

const CLUSTER: &str = "SELECT system_identifier, '0/0' FROM pg_catalog.pg_control_system()";

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn mark(start: Instant, second: u64, cluster: u64, lsn: u64) -> Mark {
        Mark { taken: start + Duration::from_secs(second), place: Place { cluster, lsn } }
    }

    #[test]
    fn a_standby_has_what_was_committed_before_the_last_mark_it_reached() {
        let (start, mut marks) = (Instant::now(), Marks::default());
        let second_of = |marks: &Marks, cluster, lsn| {
            marks.reached(Place { cluster, lsn }).map(|mark| (mark.taken - start).as_secs())
        };
        assert_eq!(second_of(&marks, 1, u64::MAX), None);
        for second in 0..40 {
            // Nothing was written from the thirtieth on.
            marks.push(mark(start, second, 1, 100 * second.min(30)), LIMIT);
        }
        assert_eq!(second_of(&marks, 1, 2999), Some(29));
        assert_eq!(second_of(&marks, 1, 3000), Some(39), "it is idle, and not behind");
        assert_eq!(second_of(&marks, 1, 2799), None, "so old a mark is not kept");
        assert_eq!(second_of(&marks, 2, u64::MAX), None, "of another cluster");
        assert!(marks.0.len() <= 12, "{}", marks.0.len());
        // Another primary, which was promoted before it had everything.
        marks.push(mark(start, 40, 1, 2900), LIMIT);
        assert_eq!((second_of(&marks, 1, 2899), second_of(&marks, 1, 2900)), (None, Some(40)));
    }

    #[test]
    fn a_place_is_what_both_ends_say() {
        let place = Place { cluster: 7, lsn: 0x16_b374_d848 };
        assert_eq!("16/B374D848".parse::<PgLsn>().map(u64::from).unwrap(), place.lsn);
        assert!(Place::said(&[]).is_err());
    }
}
