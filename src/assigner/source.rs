use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::feed::Feed;
use super::snapshot::Snapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::scope::TenantHandle;

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
            let version = source.tenant.experiments().config_version().await;
            let is_gone = matches!(&version, Err(error) if error.kind() == ErrorKind::NotFound);
            let mut version = if is_gone { 0 } else { version? };
            if version != self.current.load().version {
                version = self.load(source).await?;
            }
            source.is_current(asked, heard);
            Ok(version)
        };
        source.feed.in_time(confirmed).await
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
        let (version, deciders) = match source.tenant.experiments().config().await {
            Ok(config) => (config.version, config.deciders),
            // The tenant was deleted, and its experiments with it.
            Err(error) if error.kind() == ErrorKind::NotFound => (0, Vec::new()),
            Err(error) => return Err(error),
        };
        self.current.store(Arc::new(Snapshot::new(version, deciders)));
        Ok(version)
    }
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
            let as_of = moment.saturating_duration_since(self.born).as_millis();
            self.confirmed.fetch_max(u64::try_from(as_of).unwrap_or(0), Ordering::AcqRel);
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
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
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
