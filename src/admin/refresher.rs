//! A task that keeps `experiment_metrics` fresh.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::Instrument as _;
use tracing::field::Empty;

use super::Admin;
use crate::error::{Error, ErrorKind, Result};
use crate::telemetry;

/// What takes longer than this, or than an interval if that is more, is given up.
const LONG: Duration = Duration::from_secs(60);

/// The options of a [`Refresher`]. Setters never fail; [`Admin::refresher_with`] does, and names the option.
///
/// ```no_run
/// # fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
/// use lastprice::RefresherOptions;
///
/// let refresher = admin.refresher_with(RefresherOptions::new().every(std::time::Duration::from_secs(60)))?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct RefresherOptions {
    every: Duration,
}

impl Default for RefresherOptions {
    fn default() -> Self {
        RefresherOptions::new()
    }
}

impl RefresherOptions {
    /// The defaults.
    pub fn new() -> Self {
        RefresherOptions { every: Duration::from_secs(300) }
    }

    /// How old the numbers may become, and up to a tenth more. Default: 5 minutes.
    pub fn every(mut self, every: Duration) -> Self {
        self.every = every;
        self
    }

    fn check(&self) -> Result<()> {
        if !(Duration::from_millis(100)..=Duration::from_secs(86_400)).contains(&self.every) {
            return Err(Error::invalid("every", "is not between 100 ms and a day"));
        }
        Ok(())
    }
}

/// What a [`Refresher`] has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefresherStatus {
    /// How often it has refreshed.
    pub refreshed: u64,
    /// How often it had nothing to do, because somebody else had refreshed, or was about to.
    pub skipped: u64,
    /// How often it has failed.
    pub failed: u64,
    /// When it last refreshed or had nothing to do, by this machine's clock.
    pub last_success: Option<DateTime<Utc>>,
    /// Why it failed the last time; `None` once it has succeeded again.
    pub last_error: Option<ErrorKind>,
}

/// Refreshes `experiment_metrics` by itself, for all tenants: see [`Admin::refresher`].
///
/// - As many services may run one as there are: they refresh once in an interval together, not once each. Who finds numbers that
///   are younger than the interval does nothing, and only one refreshes at a time, which the database sees to.
/// - A failure is logged and seen in the [`status`](Refresher::status), and the next turn, an interval later, tries again. While the
///   database is away nothing else happens.
/// - What takes longer than an interval (or a minute, if that is more) is given up as a [`Timeout`](ErrorKind::Timeout).
///
/// Dropped without a [`shutdown`](Refresher::shutdown), it stops at once; a refresh that is under way goes on in the database.
#[must_use = "dropped, a refresher stops"]
pub struct Refresher {
    status: Arc<Mutex<RefresherStatus>>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Admin {
    /// Refreshes every 5 minutes in the background from now on, by this connection, so that nobody has to call
    /// [`refresh_metrics`](Admin::refresh_metrics). Only [`Metrics::refreshed`](crate::Metrics::refreshed) and who reads
    /// `experiment_metrics` need it: all other numbers are live.
    ///
    /// ```no_run
    /// # async fn f() -> lastprice::Result<()> {
    /// let admin = lastprice::Admin::connect("postgres://owner:secret@db.internal/shop").await?;
    /// let refresher = admin.refresher();
    /// // … and at the end:
    /// refresher.shutdown(std::time::Duration::from_secs(10)).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn refresher(self) -> Refresher {
        Refresher::start(self, RefresherOptions::new().every)
    }

    /// [`refresher`](Admin::refresher), with options.
    ///
    /// ```no_run
    /// # fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let every = lastprice::RefresherOptions::new().every(std::time::Duration::from_secs(60));
    /// let refresher = admin.refresher_with(every)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) that names the option.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn refresher_with(self, options: RefresherOptions) -> Result<Refresher> {
        options.check()?;
        Ok(Refresher::start(self, options.every))
    }
}

impl Refresher {
    fn start(admin: Admin, every: Duration) -> Self {
        let status = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(run(admin, every, Arc::clone(&status), stopped));
        Refresher { status, stop: Some(stop), task: Some(task) }
    }

    /// What it has done so far.
    ///
    /// ```no_run
    /// # fn f(refresher: lastprice::Refresher) {
    /// if let Some(kind) = refresher.status().last_error {
    ///     eprintln!("the numbers are getting old: {kind:?}");
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn status(&self) -> RefresherStatus {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops, and closes the connection. A refresh that is under way is waited for until the time is up; then it goes on in the
    /// database without us.
    ///
    /// ```no_run
    /// # async fn f(refresher: lastprice::Refresher) {
    /// let status = refresher.shutdown(std::time::Duration::from_secs(10)).await;
    /// println!("refreshed {} times", status.refreshed);
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is like dropping the refresher.
    pub async fn shutdown(mut self, deadline: Duration) -> RefresherStatus {
        drop(self.stop.take());
        if let Some(task) = &mut self.task
            && tokio::time::timeout(deadline, &mut *task).await.is_err()
        {
            task.abort();
            let _ = task.await; // that it was aborted
        }
        self.task = None;
        self.status()
    }
}

impl Drop for Refresher {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl fmt::Debug for Refresher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refresher").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// What became of a turn.
enum Turn {
    Refreshed,
    /// Somebody else did it, so long ago.
    Fresh(Duration),
    /// Somebody else is doing it.
    Busy,
}

async fn run(
    admin: Admin,
    every: Duration,
    status: Arc<Mutex<RefresherStatus>>,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let span = tracing::debug_span!(target: "lastprice", "lastprice.refresh", outcome = Empty);
        let began = Instant::now();
        let turning = tokio::time::timeout(every.max(LONG), turn(&admin, every)).instrument(span.clone());
        let turn = match turning.await {
            Ok(turn) => turn,
            Err(_) => {
                admin.hang_up().await; // what comes next would wait behind what was given up
                Err(Error::new(ErrorKind::Timeout, "the refresh took too long"))
            }
        };
        let outcome = match &turn {
            Ok(Turn::Refreshed) => "refreshed",
            Ok(Turn::Fresh(_)) => "fresh",
            Ok(Turn::Busy) => "busy",
            Err(error) => error.kind().as_str(),
        };
        span.record("outcome", outcome);
        drop(span);
        telemetry::refresher_turn(outcome, began.elapsed());
        if let Err(error) = &turn {
            tracing::warn!(%error, "the metrics could not be refreshed; the next turn tries again");
        }
        let age = if let Ok(Turn::Fresh(age)) = &turn { *age } else { Duration::ZERO };
        note(&mut status.lock().unwrap_or_else(PoisonError::into_inner), turn);
        let pause = every.saturating_sub(age) + jitter(every);
        // That it is told nothing, and only left alone, is the signal.
        if tokio::time::timeout(pause, &mut stopped).await.is_ok() {
            return;
        }
    }
}

async fn turn(admin: &Admin, every: Duration) -> Result<Turn> {
    match admin.age_of_metrics().await? {
        Some(age) if age < every => Ok(Turn::Fresh(age)),
        _ if admin.refresh_metrics().await? => Ok(Turn::Refreshed),
        _ => Ok(Turn::Busy),
    }
}

fn note(status: &mut RefresherStatus, turn: Result<Turn>) {
    match turn {
        Ok(turn) => {
            match turn {
                Turn::Refreshed => status.refreshed += 1,
                Turn::Fresh(_) | Turn::Busy => status.skipped += 1,
            }
            (status.last_success, status.last_error) = (Some(Utc::now()), None);
        }
        Err(error) => {
            status.failed += 1;
            status.last_error = Some(error.kind());
        }
    }
}

/// Up to a tenth: of several who wait for the same moment, one comes first, and the others find its work done.
fn jitter(every: Duration) -> Duration {
    let dice = uuid::Uuid::new_v4().as_u128() as u32;
    (every / 10).mul_f64(f64::from(dice) / f64::from(u32::MAX))
}

impl Admin {
    /// How long ago the metrics were refreshed, by the database's clock; `None` if never, or if there is no experiment.
    async fn age_of_metrics(&self) -> Result<Option<Duration>> {
        // Not there after a schema-only restore, and then it cannot be read.
        let is_there: bool = self
            .value("SELECT relispopulated FROM pg_class WHERE oid = '{s}.experiment_metrics'::regclass")
            .await?;
        if !is_there {
            return Ok(None);
        }
        // A refresh writes every row.
        let age: Option<f64> = self
            .value(
                "SELECT (SELECT extract(epoch FROM clock_timestamp() - refreshed_at)::float8
                         FROM {s}.experiment_metrics LIMIT 1)",
            )
            .await?;
        Ok(age.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)))
    }

    async fn hang_up(&self) {
        *self.connection.lock().await = None;
    }
}
