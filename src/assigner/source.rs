use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tracing::Instrument as _;
use tracing::field::Empty;

use super::feed::Feed;
use super::snapshot::Snapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::repo::Config;
use crate::scope::TenantHandle;
use crate::telemetry;

/// The version of a tenant that was deleted, and its experiments with it.
const GONE: u64 = 0;

/// What the clones of an assigner share.
pub(super) struct Inner {
    pub(super) current: ArcSwap<Snapshot>,
    /// `None` if it was made without a database.
    pub(super) source: Option<Source>,
}

/// Where snapshots come from.
pub(super) struct Source {
    pub(super) tenant: TenantHandle,
    /// Which notifications are this tenant's.
    pub(super) token: String,
    /// One load at a time, so that an older answer never replaces a newer one.
    pub(super) loading: tokio::sync::Mutex<()>,
    /// Changes that were heard of, and how many of them the snapshot has.
    pub(super) heard: AtomicU64,
    pub(super) read: AtomicU64,
    /// A load is waiting to begin.
    pub(super) queued: AtomicBool,
    /// When the snapshot was known to be current, in milliseconds since `born`.
    pub(super) confirmed: AtomicU64,
    pub(super) born: Instant,
    /// Keeps the feed running.
    pub(super) feed: Arc<Feed>,
}

impl Inner {
    pub(super) fn source(&self) -> Result<&Source> {
        self.source.as_ref().ok_or_else(|| Error::new(ErrorKind::Closed, "the assigner has no database"))
    }

    /// Loads a new snapshot if the version is another.
    pub(super) async fn confirm(&self) -> Result<u64> {
        let source = self.source()?;
        let confirmed = async {
            let _one = source.loading.lock().await;
            let (asked, heard) = (source.now(), source.heard.load(Ordering::Acquire));
            let mut version = source.tenant.experiments().config_version().await?.unwrap_or(GONE);
            if version != self.current.load().version {
                version = self.load(source).await?;
            }
            source.is_current(asked, heard);
            Ok(version)
        };
        source.feed.in_time(confirmed).await
    }

    /// [`confirm`](Inner::confirm)s, unless a replica says that nothing has changed until some moments ago. When it says something
    /// else, either of the two may be the newer one.
    pub(super) async fn poll(&self) -> Result<()> {
        let source = self.source()?;
        if !source.lacks_a_change() {
            let asked = async {
                let _one = source.loading.lock().await;
                source.tenant.experiments().replicated_version().await
            };
            match source.feed.in_time(asked).await {
                Ok(Some((version, as_of))) if version == self.current.load().version => {
                    source.confirmed.fetch_max(source.millis(as_of), Ordering::AcqRel);
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "the replica could not be polled"),
            }
        }
        self.confirm().await.map(drop)
    }

    /// Loads a new snapshot, of which the database has spoken.
    pub(super) async fn reload(&self) -> Result<()> {
        let source = self.source()?;
        let reloaded = async {
            let _one = source.loading.lock().await;
            source.queued.store(false, Ordering::Release);
            let (asked, heard) = (source.now(), source.heard.load(Ordering::Acquire));
            self.load(source).await?;
            source.is_current(asked, heard);
            Ok(())
        };
        let _at_last = OnDrop(|| source.queued.store(false, Ordering::Release)); // also if it never began
        source.feed.in_time(reloaded).await
    }

    async fn load(&self, source: &Source) -> Result<u64> {
        let config = read(&source.tenant).await?;
        let (version, deciders) =
            config.map_or((GONE, Vec::new()), |config| (config.version, config.deciders));
        self.current.store(Arc::new(Snapshot::new(version, deciders)));
        Ok(version)
    }
}

/// What a tenant's experiments are now; `None` if there is no such tenant.
pub(super) async fn read(tenant: &TenantHandle) -> Result<Option<Config>> {
    let span = tracing::debug_span!(
        target: "lastprice",
        "lastprice.reload",
        tenant = %tenant.tenant_id(),
        version = Empty,
        experiments = Empty,
        outcome = Empty
    );
    let config = tenant.experiments().config().instrument(span.clone()).await;
    if let Ok(Some(config)) = &config {
        span.record("version", config.version);
        span.record("experiments", config.deciders.len());
    }
    let outcome = config.as_ref().map_or_else(|error| error.kind().as_str(), |_| "ok");
    span.record("outcome", outcome);
    telemetry::reloaded(outcome);
    config
}

/// Does something when it goes away, however that happens.
pub(super) struct OnDrop<F: FnMut()>(pub(super) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Source {
    fn is_current(&self, as_of: u64, heard: u64) {
        self.read.fetch_max(heard, Ordering::AcqRel);
        self.confirmed.fetch_max(as_of, Ordering::AcqRel);
    }

    /// All that was committed before `moment` has been heard of; what was heard of and not read is not confirmed.
    pub(super) fn has_heard_all(&self, moment: Instant) {
        if !self.lacks_a_change() {
            self.confirmed.fetch_max(self.millis(moment), Ordering::AcqRel);
        }
    }

    /// Whether somebody is asking the database, or waits for that.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.try_lock().is_err()
    }

    /// Whether a change was heard of that the snapshot lacks.
    pub(super) fn lacks_a_change(&self) -> bool {
        self.read.load(Ordering::Acquire) < self.heard.load(Ordering::Acquire)
    }

    fn now(&self) -> u64 {
        self.millis(Instant::now())
    }

    /// Since `born`.
    fn millis(&self, moment: Instant) -> u64 {
        u64::try_from(moment.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn age(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.confirmed.load(Ordering::Acquire)))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.feed.leave(self.tenant.tenant_id());
    }
}
