//! A tenant's experiments in memory, kept current.

mod decision;
mod feed;
mod snapshot;
mod source;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::error::{Error, ErrorKind, Result};
use crate::repo::{AssignOutcome, NewExperiment, Subject};
use crate::scope::TenantHandle;
use decision::Held;
pub use decision::{AssignerStatus, AssignerView, Decision};
pub(crate) use feed::{Feed, OpenLine};
use snapshot::Snapshot;
use source::{Inner, Source};

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
/// if let Some(decision) = assigner.assign("pro-plan", &user) {
///     println!("{} sees {} ({})", user, decision.price(), decision.reason());
/// }
/// // When the price is shown: stored, and from then on the user's.
/// let quote = assigner.quote("pro-plan", &user).await?;
/// println!("{} is promised {}", user, quote.price());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Assigner {
    inner: Arc<Inner>,
}

impl Assigner {
    pub(crate) async fn open(tenant: TenantHandle, feed: Arc<Feed>) -> Result<Self> {
        let tenant_id = tenant.tenant_id();
        if let Some(inner) = feed.find(tenant_id) {
            return Assigner::confirmed(inner).await;
        }
        let born = Instant::now();
        let config = feed.in_time(source::read(&tenant)).await?;
        let config = config.ok_or_else(|| Error::not_found("tenant"))?;
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

    /// Experiments that are in no database, as if all were activated now: for tests of code that takes an assigner. An
    /// experiment's key is its salt, so that the same user sees the same variant in every run. Of two with one key the
    /// first counts. Only [`assign`](Assigner::assign) and [`view`](Assigner::view) work: quotes are made by databases.
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

    /// What a change does to an assigner that is not [`fixed`](Assigner::fixed).
    pub(crate) fn swap_fixed(&self, experiments: impl IntoIterator<Item = NewExperiment>) -> Result<()> {
        self.inner.current.store(Arc::new(Snapshot::fixed(experiments)?));
        Ok(())
    }

    /// The variant and the price of a user in the experiment of this key; `None` if the tenant has no such
    /// experiment, so that the host's own price holds.
    ///
    /// ```no_run
    /// # fn f(assigner: lastprice::Assigner, user: lastprice::UserId, list_price: lastprice::Money) {
    /// let price = assigner.assign("pro-plan", &user).map_or(list_price, |decision| decision.price());
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
    /// let price = assigner.quote("pro-plan", &user).await?.price();
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

    /// The version of the snapshot: another one after every change of the tenant's experiments or holdout. Opaque: of two it
    /// cannot be told which is later.
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
