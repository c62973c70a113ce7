//! Events that go on their own way: written in the background, many at once.
//!
//! `event`: what goes in and what comes out; `policy`: the rules, pure; `queue`: what waits, plain data behind one lock;
//! `batch`, `write`: what is written together, and how; `shared`, `lane`: the lock, who waits for whom, and the workers;
//! `telemetry`: what the log and the metrics are told.

mod batch;
mod event;
mod lane;
mod options;
mod policy;
mod queue;
mod shared;
mod telemetry;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::{AbortHandle, JoinHandle};

use crate::error::Result;
use crate::id::TenantId;
use crate::scope::Session;
pub use event::{Event, NotTaken, NotTakenReason, Rejection, Tracked};
use lane::Lane;
pub use options::{RecorderOptions, RecorderReport, RecorderStats};
use shared::Shared;

/// Writes events in the background, many in one statement, for all tenants of a client: see
/// [`Client::recorder`](crate::Client::recorder).
///
/// This is the guard that owns the worker: keep it in `main`, and [shut it down](Recorder::shutdown) at the end. Who
/// records gets a [`RecorderHandle`], which this derefs to.
///
/// - [`record`](RecorderHandle::record) takes an event and returns at once. It is in memory then, and is lost if the process
///   dies; [`track`](RecorderHandle::track) returns when it is committed.
/// - There is a limit to what waits ([`RecorderOptions::max_events`], [`max_bytes`](RecorderOptions::max_bytes)). Beyond it
///   `record` gives the event back, and `track` waits.
/// - Events of one user are written in their order: no view or sale before the assignment that was accepted before it. So
///   are those of an account, after the assignments of its users. Of those that are written at once, assignments come
///   first, then views, sales and usage.
/// - An event counts once, however often it has to be tried: after a failure of the connection, the server or the schema it
///   is tried again, for as long as it takes, with pauses of up to 5 s. One that the database refuses is rejected alone.
/// - After an attempt whose outcome is open, an event that turns out to be there counts as written by it. If it was there
///   before, that is a duplicate that is not noticed.
/// - A tenant that fails holds up at most half of the lanes.
///
/// Dropped without a shutdown, it takes no more events, and goes on in the background to write those it has, for as long as
/// the runtime runs.
///
/// ```no_run
/// # async fn f(client: lastprice::Client, tenant: lastprice::TenantId, id: lastprice::ExperimentId) -> lastprice::Result<()> {
/// use lastprice::{NewAssignment, NewView, UserId};
///
/// let recorder = client.recorder();
/// let events = recorder.handle(); // for the request handlers
///
/// let user = UserId::new("user-42")?;
/// events.record(tenant, NewAssignment::new(id, user.clone()))?; // a decision becomes a quote
/// events.record(tenant, NewView::new(id, user))?;
///
/// let report = recorder.shutdown(std::time::Duration::from_secs(10)).await;
/// println!("{} written, {} lost", report.stats.written, report.stats.dropped);
/// # Ok(()) }
/// ```
#[must_use = "dropped, a recorder takes no more events"]
pub struct Recorder {
    handle: RecorderHandle,
    lanes: Vec<JoinHandle<()>>,
}

/// Takes events for a [`Recorder`]. Cheap to clone.
#[derive(Clone)]
pub struct RecorderHandle {
    shared: Arc<Shared>,
}

impl Recorder {
    /// The options have been checked.
    pub(crate) fn start(session: Arc<Session>, options: &RecorderOptions) -> Self {
        let shared = Shared::new(options);
        let lane = |_| Lane { shared: Arc::clone(&shared), session: Arc::clone(&session) };
        let lanes = (0..options.lanes).map(lane).map(|lane| tokio::spawn(lane.run())).collect();
        Recorder { handle: RecorderHandle { shared }, lanes }
    }

    /// What records, for whoever needs it.
    #[must_use]
    pub fn handle(&self) -> RecorderHandle {
        self.handle.clone()
    }

    /// Takes no more events, writes those that are pending, and returns when that is done, or when the time is up: then the
    /// others are dropped, and whoever tracks one is told.
    ///
    /// ```no_run
    /// # async fn f(recorder: lastprice::Recorder) {
    /// let report = recorder.shutdown(std::time::Duration::from_secs(10)).await;
    /// if report.stats.dropped > 0 {
    ///     eprintln!("{} events are lost", report.stats.dropped);
    /// }
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is like dropping the recorder: what is pending is written in the background.
    pub async fn shutdown(mut self, deadline: Duration) -> RecorderReport {
        self.shared.close();
        let lanes = std::mem::take(&mut self.lanes);
        let aborts: Vec<AbortHandle> = lanes.iter().map(JoinHandle::abort_handle).collect();
        let mut ended = join_all(lanes); // when nothing is pending, they end by themselves
        if tokio::time::timeout(deadline, &mut ended).await.is_err() {
            self.shared.end();
            aborts.iter().for_each(AbortHandle::abort);
            ended.await; // what they had in hand is counted when they are gone
        }
        let report = self.shared.report();
        let RecorderStats { accepted, written, duplicate, rejected, dropped, .. } = report.stats;
        if rejected + dropped > 0 {
            tracing::warn!(accepted, written, duplicate, rejected, dropped, "the recorder was shut down");
        } else {
            tracing::debug!(accepted, written, duplicate, "the recorder was shut down");
        }
        report
    }
}

impl RecorderHandle {
    /// Takes an event, to be written soon, or gives it back. Never waits.
    ///
    /// That it was accepted does not say that the database will take it: [`stats`](RecorderHandle::stats) counts what it
    /// rejects, and the log tells of it.
    ///
    /// ```no_run
    /// # fn f(events: lastprice::RecorderHandle, tenant: lastprice::TenantId, view: lastprice::NewView) {
    /// if let Err(not_taken) = events.record(tenant, view) {
    ///     eprintln!("a view is lost: {not_taken}");
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotTaken`] holds the event, and says why: [`Full`](NotTakenReason::Full), [`Closed`](NotTakenReason::Closed), or
    /// [`Invalid`](NotTakenReason::Invalid) with the error that names the field.
    pub fn record(&self, tenant: TenantId, event: impl Into<Event>) -> Result<(), NotTaken> {
        self.shared.record(tenant, event.into())
    }

    /// Takes an event, waiting for room if need be, and returns when it is committed. It shares its commit with all that are
    /// waiting then, and does not wait for company.
    ///
    /// ```no_run
    /// # async fn f(events: lastprice::RecorderHandle, tenant: lastprice::TenantId, sale: lastprice::NewConversion) -> lastprice::Result<()> {
    /// if events.track(tenant, sale).await?.is_stored() {
    ///     println!("the webhook may be acknowledged");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule,
    /// [`Closed`](crate::ErrorKind::Closed) if the recorder has ended and the event was not written,
    /// [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown) if it ended while the event was under way. While the database is
    /// away there is no error: it waits.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits for room, it has no effect. Once the event is accepted it goes on its way, whether or not
    /// somebody waits for it.
    pub async fn track(&self, tenant: TenantId, event: impl Into<Event>) -> Result<Tracked> {
        self.shared.track(tenant, event.into()).await
    }

    /// Returns when all that was accepted before the call is settled: written, a duplicate, rejected or dropped. While the
    /// database is away, that is not before it is back.
    ///
    /// ```no_run
    /// # async fn f(events: lastprice::RecorderHandle) {
    /// events.flush().await;
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing but that nothing lingers which was pending.
    pub async fn flush(&self) {
        self.shared.flush().await;
    }

    /// The numbers of this moment.
    ///
    /// ```no_run
    /// # fn f(events: lastprice::RecorderHandle) {
    /// let stats = events.stats();
    /// println!("{} of {} are written, {} wait", stats.written, stats.accepted, stats.pending);
    /// # }
    /// ```
    #[must_use]
    pub fn stats(&self) -> RecorderStats {
        self.shared.stats()
    }
}

impl Deref for Recorder {
    type Target = RecorderHandle;

    fn deref(&self) -> &Self::Target {
        &self.handle
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.lanes.is_empty() {
            return; // it was shut down
        }
        let pending = self.shared.close();
        tracing::warn!(
            pending,
            "a recorder was dropped without a shutdown; what is pending is written in the background"
        );
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl fmt::Debug for RecorderHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecorderHandle").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
