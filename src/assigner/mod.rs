//! A tenant's experiments in memory, kept current.

mod feed;
mod snapshot;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};

use crate::error::{Error, ErrorKind, Result};
use crate::id::ExperimentId;
use crate::money::Money;
use crate::repo::{AssignOutcome, Decided, Decider, NewExperiment, PriceBook, Reason, Subject};
use crate::scope::TenantHandle;
pub(crate) use feed::Feed;
use snapshot::Snapshot;

/// Answers from memory which price a user sees, for one tenant: see [`Client::assigner`](crate::Client::assigner).
///
/// [`assign`](Assigner::assign) is synchronous and takes no lock: tens of nanoseconds, no allocation. What it answers
/// from is an immutable snapshot of the tenant's experiments, which is replaced as a whole when one of them changes:
/// within milliseconds where notifications of the database arrive, at the next poll where they do not (behind a pooler,
/// on a standby). While the database is away it goes on with the last snapshot; [`status`](Assigner::status) says how
/// old that is.
///
/// A decision is not a quote: **only the database makes a quote**, by [`quote`](Assigner::quote).
/// [`Decision::is_certain`] says whether a stored one could differ.
///
/// Cheap to clone; clones share the snapshot.
///
/// ```no_run
/// # async fn f(client: lastprice::Client, tenant: lastprice::TenantId) -> lastprice::Result<()> {
/// let assigner = client.assigner(tenant).await?; // once, at start-up
///
/// let user = lastprice::UserId::new("user-42")?;
/// if let Some(decision) = assigner.assign("pro-decider", &user) {
///     println!("{} sees {} ({})", user, decision.price(), decision.reason());
/// }
/// // When the price is shown: stored, and from then on the user's.
/// let quote = assigner.quote("pro-decider", &user).await?;
/// println!("{} is promised {}", user, quote.price());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Assigner {
    inner: Arc<Inner>,
}

struct Inner {
    current: ArcSwap<Snapshot>,
    /// `None` if it was made without a database.
    source: Option<Source>,
}

/// Where snapshots come from.
struct Source {
    tenant: TenantHandle,
    /// Which notifications are this tenant's.
    token: String,
    /// One load at a time, so that an older answer never replaces a newer one.
    loading: tokio::sync::Mutex<()>,
    /// Changes that were heard of, and how many of them the snapshot has.
    heard: AtomicU64,
    read: AtomicU64,
    /// A load is waiting to begin.
    queued: AtomicBool,
    /// When the snapshot was known to be current, in milliseconds since `born`.
    confirmed: AtomicU64,
    born: Instant,
    /// Keeps the feed running.
    feed: Arc<Feed>,
}

impl Assigner {
    pub(crate) async fn open(tenant: TenantHandle, feed: Arc<Feed>) -> Result<Self> {
        let tenant_id = tenant.tenant_id();
        if let Some(inner) = feed.find(tenant_id) {
            return Assigner::confirmed(inner).await;
        }
        let born = Instant::now();
        let config = feed.in_time(tenant.experiments().config()).await?;
        let source = Source {
            tenant,
            token: config.token,
            loading: tokio::sync::Mutex::default(),
            heard: AtomicU64::new(1), // what changed before the feed knew of it
            read: AtomicU64::new(0),
            queued: AtomicBool::new(false),
            confirmed: AtomicU64::new(0),
            born,
            feed: Arc::clone(&feed),
        };
        let current = ArcSwap::from_pointee(Snapshot::new(config.version, config.deciders));
        let inner = feed.enter(tenant_id, Arc::new(Inner { current, source: Some(source) }));
        Assigner::confirmed(inner).await
    }

    /// Nobody gets one that may have missed a change before the feed knew of it.
    async fn confirmed(inner: Arc<Inner>) -> Result<Self> {
        let assigner = Assigner { inner };
        if assigner.inner.source.as_ref().is_some_and(Source::lacks_a_change) {
            assigner.confirm().await?;
        }
        Ok(assigner)
    }

    /// Experiments that are in no database, as if all were active: for tests of code that takes an assigner. An
    /// experiment's key is its salt, so that the same user sees the same variant in every run.
    ///
    /// ```
    /// use lastprice::{Assigner, Currency, NewExperiment, UserId, Variants};
    ///
    /// let variants = Variants::new().add("19", 1, 19).add("29", 1, 29);
    /// let assigner = Assigner::fixed([NewExperiment::new("pro-plan", "Pro", Currency::USD, variants)])?;
    /// let decision = assigner.assign("pro-plan", &UserId::new("user-42")?).unwrap();
    /// assert!(["19", "29"].contains(&decision.variant()));
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule. Its
    /// [`quote`](Assigner::quote) and [`confirm`](Assigner::confirm) fail with [`Closed`](crate::ErrorKind::Closed).
    pub fn fixed(experiments: impl IntoIterator<Item = NewExperiment>) -> Result<Self> {
        let current = ArcSwap::from_pointee(Snapshot::fixed(experiments)?);
        Ok(Assigner { inner: Arc::new(Inner { current, source: None }) })
    }

    /// For the benchmarks: what a change does.
    #[doc(hidden)]
    pub fn swap_fixed(&self, experiments: impl IntoIterator<Item = NewExperiment>) -> Result<()> {
        self.inner.current.store(Arc::new(Snapshot::fixed(experiments)?));
        Ok(())
    }

    /// The variant and the price of a user in the experiment of this key; `None` if the tenant has no such
    /// experiment, so that the host's own price holds.
    ///
    /// ```no_run
    /// # fn f(assigner: lastprice::Assigner, user: lastprice::UserId, list_price: lastprice::Money) {
    /// let price = assigner.assign("pro-decider", &user).map_or(list_price, |decision| decision.price());
    /// # }
    /// ```
    #[inline]
    #[must_use]
    pub fn assign<'s>(&self, experiment: &str, subject: impl Into<Subject<'s>>) -> Option<Decision<'static>> {
        let snapshot = self.inner.current.load();
        let (index, decided) = snapshot.decide(experiment, &subject.into())?;
        Some(Decision { snapshot: Held::Guarded(snapshot), index, decided })
    }

    /// The experiments as of now, for a request that asks for several: one moment for all of them, at half the cost each.
    ///
    /// ```no_run
    /// # fn f(assigner: lastprice::Assigner, user: lastprice::UserId) {
    /// let view = assigner.view();
    /// let subject = lastprice::Subject::new(&user); // hashed once
    /// let (pro, seats) = (view.assign("pro-plan", subject), view.assign("seats", subject));
    /// # }
    /// ```
    #[must_use]
    pub fn view(&self) -> AssignerView {
        AssignerView { snapshot: self.inner.current.load_full() }
    }

    /// The stored quote of a user, or a new one: [`Assignments::assign`](crate::Assignments::assign), by the
    /// experiment's key. What is stored always wins over what [`assign`](Assigner::assign) says.
    ///
    /// ```no_run
    /// # async fn f(assigner: lastprice::Assigner, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let price = assigner.quote("pro-decider", &user).await?.price();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if the tenant has no such experiment,
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a key that none could have, and those of the connection.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`](crate::TenantScope). Calling again gives the same answer.
    pub async fn quote<'s>(
        &self,
        experiment: &str,
        subject: impl Into<Subject<'s>>,
    ) -> Result<AssignOutcome> {
        let subject = subject.into();
        let known = {
            let snapshot = self.inner.current.load();
            snapshot.find(experiment).map(|index| snapshot.deciders[index as usize].id)
        };
        let tenant = &self.inner.source()?.tenant;
        let id = match known {
            Some(id) => id,
            // Created since the snapshot.
            None => {
                let found = tenant.experiments().by_key(experiment).await?;
                found.ok_or_else(|| Error::not_found("experiment"))?.id
            }
        };
        match tenant.assignments().assign(id, subject).await {
            // Deleted since the snapshot, and made anew.
            Err(error) if error.kind() == ErrorKind::NotFound && known.is_some() => {
                let found = tenant.experiments().by_key(experiment).await?.ok_or(error)?;
                tenant.assignments().assign(found.id, subject).await
            }
            outcome => outcome,
        }
    }

    /// Asks the database whether the snapshot is current, loads a new one if not, and returns its version. All
    /// changes that were committed before the call are in what is answered after it.
    ///
    /// ```no_run
    /// # async fn f(assigner: lastprice::Assigner) -> lastprice::Result<()> {
    /// let version = assigner.confirm().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of the connection; the last snapshot stays.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn confirm(&self) -> Result<u64> {
        self.inner.source()?;
        let inner = Arc::clone(&self.inner);
        // A task of its own: a future that nobody polls would hold up all others.
        let confirming = tokio::spawn(async move { inner.confirm().await });
        confirming
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Closed, "the runtime is shutting down")))
    }

    /// The version of the snapshot: another one after every change of the tenant's experiments or holdout.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.inner.current.load().version
    }

    /// How current the snapshot is, and how it is kept so.
    #[must_use]
    pub fn status(&self) -> AssignerStatus {
        let snapshot = self.inner.current.load();
        AssignerStatus {
            version: snapshot.version,
            experiments: snapshot.deciders.len(),
            age: self.inner.source.as_ref().map_or(Duration::ZERO, Source::age),
            is_listening: self.inner.source.as_ref().is_some_and(|source| source.feed.is_listening()),
        }
    }
}

impl fmt::Debug for Assigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Assigner")
            .field("tenant", &self.inner.source.as_ref().map(|source| source.tenant.tenant_id()))
            .field("status", &self.status())
            .finish()
    }
}

impl Inner {
    fn source(&self) -> Result<&Source> {
        self.source.as_ref().ok_or_else(|| Error::new(ErrorKind::Closed, "the assigner has no database"))
    }

    /// Loads a new snapshot if the version is another.
    async fn confirm(&self) -> Result<u64> {
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
    async fn reload(&self) -> Result<()> {
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
struct OnDrop<F: FnMut()>(F);

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
    fn has_heard_all(&self, moment: Instant) {
        if !self.lacks_a_change() {
            let as_of = moment.saturating_duration_since(self.born).as_millis();
            self.confirmed.fetch_max(u64::try_from(as_of).unwrap_or(0), Ordering::AcqRel);
        }
    }

    /// Whether somebody is asking the database, or waits for that.
    fn is_loading(&self) -> bool {
        self.loading.try_lock().is_err()
    }

    /// Whether a change was heard of that the snapshot lacks.
    fn lacks_a_change(&self) -> bool {
        self.read.load(Ordering::Acquire) < self.heard.load(Ordering::Acquire)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn age(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.confirmed.load(Ordering::Acquire)))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.feed.leave(self.tenant.tenant_id());
    }
}

/// An [`Assigner`]'s experiments as of one moment: see [`Assigner::view`].
#[derive(Clone)]
pub struct AssignerView {
    snapshot: Arc<Snapshot>,
}

impl AssignerView {
    /// As [`Assigner::assign`].
    #[inline]
    #[must_use]
    pub fn assign<'s>(&self, experiment: &str, subject: impl Into<Subject<'s>>) -> Option<Decision<'_>> {
        let (index, decided) = self.snapshot.decide(experiment, &subject.into())?;
        Some(Decision { snapshot: Held::Viewed(&self.snapshot), index, decided })
    }

    /// The keys of all experiments.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.snapshot.deciders.iter().map(|decider| &*decider.key)
    }

    /// The version of the snapshot.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.snapshot.version
    }
}

impl fmt::Debug for AssignerView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AssignerView").field("version", &self.version()).finish_non_exhaustive()
    }
}

/// What an [`Assigner`] says of a user. It holds the snapshot that it was made from, so keep it for a request, not for
/// an hour.
pub struct Decision<'v> {
    snapshot: Held<'v>,
    index: u32,
    decided: Decided,
}

enum Held<'v> {
    Guarded(Guard<Arc<Snapshot>>),
    Viewed(&'v Snapshot),
}

impl Decision<'_> {
    #[inline]
    fn snapshot(&self) -> &Snapshot {
        match &self.snapshot {
            Held::Guarded(snapshot) => snapshot,
            Held::Viewed(snapshot) => snapshot,
        }
    }

    #[inline]
    fn decider(&self) -> &Decider {
        &self.snapshot().deciders[self.index as usize]
    }

    /// The headline price to show. There always is one: whoever is not in the experiment sees the baseline.
    #[inline]
    #[must_use]
    pub fn price(&self) -> Money {
        self.decider().arm(self.decided).price
    }

    /// The further prices to show.
    #[must_use]
    pub fn book(&self) -> &PriceBook {
        &self.decider().arm(self.decided).book
    }

    /// The variant to show.
    #[must_use]
    pub fn variant(&self) -> &str {
        &self.decider().arm(self.decided).name
    }

    /// Its index, in the order of the experiment's variants.
    #[inline]
    #[must_use]
    pub fn variant_index(&self) -> usize {
        self.decided.variant as usize
    }

    /// Why this variant.
    #[inline]
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.decided.reason
    }

    /// Whether no stored quote of the user says otherwise. `false` where one may: once the experiment is paused or over, has
    /// had more than one phase, holds imported or merged quotes or has taken somebody off its list, is for new customers
    /// only, or where the user may have been let in before (a predicate, a holdout). [`Assigner::quote`] tells.
    ///
    /// As of the snapshot: while another program's change is on its way, that program may have decided by it already. And
    /// by what is stored: a row that SQL wrote as `randomised`, with another variant than the hash's, is not known of.
    #[inline]
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.decider().is_certain(self.decided.reason)
    }

    /// The experiment.
    #[must_use]
    pub fn experiment_id(&self) -> ExperimentId {
        self.decider().id
    }

    /// The experiment's phase.
    #[must_use]
    pub fn phase(&self) -> i32 {
        self.decider().phase
    }

    /// The version of the snapshot that it was made from.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.snapshot().version
    }
}

impl fmt::Debug for Decision<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decision")
            .field("experiment", &self.decider().key)
            .field("variant", &self.variant())
            .field("price", &self.price())
            .field("reason", &self.reason())
            .field("is_certain", &self.is_certain())
            .field("version", &self.version())
            .finish()
    }
}

/// How current an [`Assigner`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AssignerStatus {
    /// The version of its snapshot.
    pub version: u64,
    /// How many experiments are in it.
    pub experiments: usize,
    /// For how long it has not been confirmed that the snapshot is current. Up to the poll interval or little more while
    /// all is well; growing while the database is away.
    pub age: Duration,
    /// Whether notifications arrive. If not, the database is polled.
    pub is_listening: bool,
}
