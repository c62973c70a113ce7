//! What keeps all assigners of a client current: one connection that listens, for all tenants.
//!
//! The connection is believed only while it proves that it hears: a probe goes out through the pool at every beat, and must
//! have come back within a beat, or a second if that is longer. (A pooler may take a LISTEN and never deliver; a dead
//! network says nothing at all.)
//! Notifications arrive in the order of their commits, so a probe that comes back also tells that every change before
//! it was heard of. While nothing is proven, every assigner is polled at every beat.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant as TokioInstant, sleep_until, timeout, timeout_at};
use tokio_postgres::types::Type;

use super::source::{Inner, OnDrop, Source};
use crate::connect::Line;
use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;
use crate::repo::PROBE;
use crate::scope::Session;
use crate::telemetry;

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
    /// The same ones, by what a notification says.
    by_token: HashMap<String, TenantId>,
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
        self.is_listening.load(Ordering::Relaxed) && !self.state().closed
    }

    fn listens(&self, is_listening: bool) {
        if self.is_listening.swap(is_listening, Ordering::Relaxed) != is_listening {
            telemetry::listens(is_listening);
        }
    }

    pub(super) fn find(self: &Arc<Self>, tenant: TenantId) -> Option<Arc<Inner>> {
        let found = self.state().assigners.get(&tenant).and_then(Weak::upgrade);
        self.run();
        found
    }

    /// Keeps an assigner current from here on; of two for one tenant, the one that came first.
    pub(super) fn enter(self: &Arc<Self>, tenant: TenantId, inner: Arc<Inner>) -> Arc<Inner> {
        let (entered, superfluous) = {
            let mut state = self.state();
            match state.assigners.get(&tenant).and_then(Weak::upgrade) {
                Some(first) => (first, Some(inner)),
                None => {
                    state.assigners.insert(tenant, Arc::downgrade(&inner));
                    state.by_token.extend(inner.source.as_ref().map(|source| (source.token.clone(), tenant)));
                    (inner, None)
                }
            }
        };
        drop(superfluous); // outside of the lock, which its drop takes
        self.run();
        entered
    }

    /// Once, and once more if the runtime that it ran on is gone.
    fn run(self: &Arc<Self>) {
        let mut state = self.state();
        if !state.closed && state.task.as_ref().is_none_or(AbortHandle::is_finished) {
            state.task = Some(tokio::spawn(run(Arc::downgrade(self))).abort_handle());
        }
    }

    pub(super) fn leave(&self, tenant: TenantId) {
        let mut state = self.state();
        if state.assigners.get(&tenant).is_some_and(|inner| inner.strong_count() == 0) {
            state.assigners.remove(&tenant);
            state.by_token.retain(|_, of| *of != tenant);
        }
    }

    /// Whether nobody is left to be told anything: then the task ends, and the next assigner starts another.
    fn is_idle(&self) -> bool {
        let mut state = self.state();
        let is_idle = state.assigners.values().all(|inner| inner.strong_count() == 0);
        if is_idle {
            state.task = None;
        }
        is_idle
    }

    /// Ends the connection. Assigners go on with what they have.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        if let Some(task) = state.task.take() {
            task.abort();
        }
    }

    fn assigners(&self) -> Vec<Arc<Inner>> {
        self.state().assigners.values().filter_map(Weak::upgrade).collect()
    }

    fn heard(&self, payload: &str) {
        let inner = {
            let state = self.state();
            state.by_token.get(payload).and_then(|tenant| state.assigners.get(tenant)?.upgrade())
        };
        let Some((inner, source)) = inner.as_ref().and_then(|inner| Some((inner, inner.source.as_ref()?)))
        else {
            return;
        };
        source.heard.fetch_add(1, Ordering::AcqRel);
        if !source.queued.swap(true, Ordering::AcqRel) {
            let inner = Arc::clone(inner);
            let reloading = async move {
                if let Err(error) = inner.reload().await {
                    tracing::warn!(%error, "a changed configuration could not be read; it is tried again");
                }
            };
            tokio::spawn(reloading);
        }
    }

    /// Whatever happened while nobody listened has to be read, however many tries that takes.
    fn may_have_missed_something(&self) {
        let assigners = self.assigners();
        let sources = assigners.iter().filter_map(|inner| inner.source.as_ref());
        sources.for_each(|source| _ = source.heard.fetch_add(1, Ordering::AcqRel));
    }

    pub(super) async fn in_time<T>(&self, asking: impl Future<Output = Result<T>>) -> Result<T> {
        self.session.in_time(1, asking).await
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
        self.listens(false);
    }
}

/// A probe that was sent and has not come back.
struct Probe {
    payload: String,
    sent: Instant,
}

/// What the feed knows of its connection.
#[derive(Default)]
struct Ear {
    line: Option<Line>,
    probe: Option<Probe>,
    /// How many connections in a row heard nothing, and from when on another one is tried.
    deaf: u32,
    again: Option<Instant>,
}

impl Ear {
    /// Whether it has begun to.
    async fn listen(&mut self, feed: &Feed) -> bool {
        if self.line.is_some() || self.again.is_some_and(|again| Instant::now() < again) {
            return false;
        }
        match (feed.open)().await {
            Ok(line) => {
                self.line = Some(line);
                feed.may_have_missed_something();
            }
            Err(error) => tracing::debug!(%error, "cannot listen"),
        }
        self.line.is_some()
    }

    fn probe(&mut self, feed: &Feed) {
        if self.line.is_some() && self.probe.is_none() {
            let payload = uuid::Uuid::new_v4().to_string();
            tokio::spawn(Feed::probe(Arc::clone(&feed.session), payload.clone(), feed.beat));
            self.probe = Some(Probe { payload, sent: Instant::now() });
        }
    }

    /// The next connection waits a beat, and longer each time: behind a pooler it will hear no more than this one.
    fn hang_up(&mut self, feed: &Feed) {
        let pause = feed.beat.min(ON_THE_WAY) * 2u32.pow(self.deaf.min(6));
        let (deaf, again) = (self.deaf.saturating_add(1), Instant::now().checked_add(pause));
        *self = Ear { deaf, again, ..Ear::default() };
        feed.listens(false);
    }
}

async fn run(feed: Weak<Feed>) {
    let leaving = feed.clone();
    let _at_last = OnDrop(move || {
        if let Some(feed) = leaving.upgrade() {
            feed.listens(false);
        }
    });
    let mut ear = Ear::default();
    let mut polling: Option<JoinHandle<()>> = None;
    let mut next = TokioInstant::now();
    loop {
        let heard = match &mut ear.line {
            Some(line) => timeout_at(next, line.hear()).await.ok(),
            None => {
                sleep_until(next).await;
                None
            }
        };
        let Some(feed) = feed.upgrade() else { return };
        match heard {
            Some(Some(payload)) if ear.probe.as_ref().is_some_and(|probe| probe.payload == payload) => {
                feed.listens(true);
                ear.deaf = 0;
                if let Some(Probe { sent, .. }) = ear.probe.take() {
                    feed.assigners()
                        .iter()
                        .filter_map(|i| i.source.as_ref())
                        .for_each(|s| s.has_heard_all(sent));
                }
            }
            Some(Some(payload)) => feed.heard(&payload),
            Some(None) => {
                ear.hang_up(&feed);
                next = TokioInstant::now() + feed.beat.min(ON_THE_WAY);
            }
            None => {
                if feed.is_idle() {
                    return;
                }
                next = TokioInstant::now() + feed.beat;
                let limit = feed.beat.max(ON_THE_WAY);
                if ear.probe.as_ref().is_some_and(|probe| probe.sent.elapsed() >= limit) {
                    ear.hang_up(&feed);
                }
                // One round at a time, and not behind the opening of a connection.
                if polling.as_ref().is_none_or(JoinHandle::is_finished) {
                    polling = poll(&feed);
                }
                if ear.listen(&feed).await {
                    polling = poll(&feed); // of what changed until then
                }
                ear.probe(&feed);
            }
        }
    }
}

/// Asks for the versions of those that may have missed something: a few at a time, while the feed goes on.
fn poll(feed: &Feed) -> Option<JoinHandle<()>> {
    let mut asked = feed.assigners();
    if feed.is_listening() {
        asked.retain(|inner| inner.source.as_ref().is_some_and(Source::lacks_a_change));
    }
    if asked.is_empty() {
        return None;
    }
    Some(tokio::spawn(stream::iter(asked).for_each_concurrent(4, |inner| async move {
        // Who waits for an answer is not joined at every beat by one more; if need be, the next one asks.
        if inner.source.as_ref().is_some_and(Source::is_loading) {
            return;
        }
        if let Err(error) = inner.poll().await {
            tracing::debug!(%error, "an assigner could not be confirmed");
        }
    })))
}
