//! What keeps all assigners of a client current: one connection that listens, for all tenants.
//!
//! The connection is believed only while it proves that it hears: a probe goes out through the pool at every beat, and must
//! have come back by the next one. (A pooler may take a LISTEN and never deliver; a dead network says nothing at all.)
//! Notifications arrive in the order of their commits, so a probe that comes back also tells that every change before
//! it was heard of. While nothing is proven, every assigner is polled at every beat.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use tokio::task::AbortHandle;
use tokio::time::{Instant as TokioInstant, sleep_until, timeout, timeout_at};
use tokio_postgres::types::Type;

use super::{Inner, Source};
use crate::connect::Line;
use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;
use crate::repo::PROBE;
use crate::scope::Session;

/// How long an answer may be under way that takes no work.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// Opens the connection that listens.
pub(crate) type OpenLine = dyn Fn() -> BoxFuture<'static, Result<Line>> + Send + Sync;

pub(crate) struct Feed {
    session: Arc<Session>,
    open: Box<OpenLine>,
    beat: Duration,
    is_listening: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    assigners: HashMap<TenantId, Weak<Inner>>,
    task: Option<AbortHandle>,
    closed: bool,
}

impl Feed {
    pub(crate) fn new(session: Arc<Session>, open: Box<OpenLine>, beat: Duration) -> Arc<Self> {
        let (is_listening, state) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Feed { session, open, beat, is_listening, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_listening(&self) -> bool {
        self.is_listening.load(Ordering::Relaxed)
    }

    pub(super) fn find(&self, tenant: TenantId) -> Option<Arc<Inner>> {
        self.state().assigners.get(&tenant).and_then(Weak::upgrade)
    }

    /// Keeps an assigner current from here on; of two for one tenant, the one that came first.
    pub(super) fn enter(self: &Arc<Self>, tenant: TenantId, inner: Arc<Inner>) -> Arc<Inner> {
        let (entered, superfluous) = {
            let mut state = self.state();
            match state.assigners.get(&tenant).and_then(Weak::upgrade) {
                Some(first) => (first, Some(inner)),
                None => {
                    state.assigners.insert(tenant, Arc::downgrade(&inner));
                    (inner, None)
                }
            }
        };
        drop(superfluous); // outside of the lock, which its drop takes
        let mut state = self.state();
        // Also when the runtime that it ran on is gone.
        if !state.closed && state.task.as_ref().is_none_or(AbortHandle::is_finished) {
            state.task = Some(tokio::spawn(run(Arc::downgrade(self))).abort_handle());
        }
        entered
    }

    pub(super) fn leave(&self, tenant: TenantId) {
        let mut state = self.state();
        if state.assigners.get(&tenant).is_some_and(|inner| inner.strong_count() == 0) {
            state.assigners.remove(&tenant);
        }
    }

    /// Ends the connection. Assigners go on with what they have.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        if let Some(task) = state.task.take() {
            task.abort();
        }
        self.is_listening.store(false, Ordering::Relaxed);
    }

    fn assigners(&self) -> Vec<Arc<Inner>> {
        self.state().assigners.values().filter_map(Weak::upgrade).collect()
    }

    fn heard(&self, payload: &str) {
        for inner in self.assigners() {
            let Some(source) = inner.source.as_ref().filter(|source| source.token == payload) else {
                continue;
            };
            source.heard.fetch_add(1, Ordering::AcqRel);
            if !source.queued.swap(true, Ordering::AcqRel) {
                tokio::spawn(async move {
                    if let Err(error) = inner.reload().await {
                        tracing::warn!(%error, "a changed configuration could not be read; it is tried again");
                    }
                });
            }
        }
    }

    /// Gives up what takes longer than a call can by its own limits. Then the network is silent, and whoever went on
    /// waiting would do so for ever, and hold up all who come after.
    pub(super) async fn in_time<T>(&self, asking: impl Future<Output = Result<T>>) -> Result<T> {
        let late = |_| Error::new(ErrorKind::Timeout, "the database did not answer in time");
        let limits = self.session.pool.timeouts();
        let statement = self.session.statement_timeout.unwrap_or(Duration::from_secs(30));
        let limits = [limits.wait, limits.create, Some(statement)].into_iter().flatten();
        timeout(limits.fold(ON_THE_WAY, Duration::saturating_add), asking).await.map_err(late)?
    }

    async fn probe(session: Arc<Session>, payload: String, beat: Duration) -> Result<()> {
        let connection = session.checkout().await?;
        let limit = beat.max(ON_THE_WAY);
        let Ok(sent) = timeout(limit, connection.query_typed(PROBE, &[(&payload, Type::TEXT)])).await else {
            drop(Object::take(connection)); // out of the pool: nobody gets an answer by it any more
            return Err(Error::new(ErrorKind::Timeout, "the probe was not answered"));
        };
        sent.map(drop).map_err(|e| Error::from_driver(e, false))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.close();
    }
}

/// A probe that was sent and has not come back.
struct Probe {
    payload: String,
    sent: Instant,
}

async fn run(feed: Weak<Feed>) {
    let mut line: Option<Line> = None;
    let mut probe: Option<Probe> = None;
    let mut next = TokioInstant::now();
    loop {
        let heard = match &mut line {
            Some(line) => timeout_at(next, line.hear()).await.ok(),
            None => {
                sleep_until(next).await;
                None
            }
        };
        let Some(feed) = feed.upgrade() else { return };
        match heard {
            Some(Some(payload)) if probe.as_ref().is_some_and(|probe| probe.payload == payload) => {
                feed.is_listening.store(true, Ordering::Relaxed);
                if let Some(Probe { sent, .. }) = probe.take() {
                    feed.assigners()
                        .iter()
                        .filter_map(|i| i.source.as_ref())
                        .for_each(|s| s.has_heard_all(sent));
                }
            }
            Some(Some(payload)) => feed.heard(&payload),
            Some(None) => {
                (line, probe, next) = (None, None, TokioInstant::now());
                feed.is_listening.store(false, Ordering::Relaxed);
            }
            None => {
                next = TokioInstant::now() + feed.beat;
                if probe.take().is_some() {
                    line = None;
                    feed.is_listening.store(false, Ordering::Relaxed);
                }
                if line.is_none() {
                    line = (feed.open)()
                        .await
                        .inspect_err(|error| tracing::debug!(%error, "cannot listen"))
                        .ok();
                    if line.is_some() {
                        // What changed while nobody listened has to be read, however many tries that takes.
                        let assigners = feed.assigners();
                        let sources = assigners.iter().filter_map(|inner| inner.source.as_ref());
                        sources.for_each(|source| _ = source.heard.fetch_add(1, Ordering::AcqRel));
                    }
                }
                if line.is_some() {
                    let payload = uuid::Uuid::new_v4().to_string();
                    tokio::spawn(Feed::probe(Arc::clone(&feed.session), payload.clone(), feed.beat));
                    probe = Some(Probe { payload, sent: Instant::now() });
                }
                poll(&feed);
            }
        }
    }
}

/// Asks for the versions of those that may have missed something: a few at a time, while the feed goes on.
fn poll(feed: &Feed) {
    let mut asked = feed.assigners();
    if feed.is_listening() {
        asked.retain(|inner| inner.source.as_ref().is_some_and(Source::lacks_a_change));
    }
    if asked.is_empty() {
        return;
    }
    tokio::spawn(stream::iter(asked).for_each_concurrent(4, |inner| async move {
        // Who waits for an answer is not joined at every beat by one more; if need be, the next one asks.
        if inner.source.as_ref().is_some_and(Source::is_loading) {
            return;
        }
        if let Err(error) = inner.confirm().await {
            tracing::debug!(%error, "an assigner could not be confirmed");
        }
    }));
}
