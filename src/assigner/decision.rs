use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::Guard;

use super::snapshot::Snapshot;
use crate::id::ExperimentId;
use crate::money::Money;
use crate::repo::{Decided, Decider, PriceBook, Reason, Subject};

/// An [`Assigner`](crate::Assigner)'s experiments as of one moment: see [`Assigner::view`](crate::Assigner::view).
#[derive(Clone)]
pub struct AssignerView {
    pub(super) snapshot: Arc<Snapshot>,
}

impl AssignerView {
    /// As [`Assigner::assign`](crate::Assigner::assign).
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

    /// The version of the snapshot: see [`Assigner::version`](crate::Assigner::version).
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

/// What an [`Assigner`](crate::Assigner) says of a user. It holds the snapshot that it was made from, so keep it for a request, not for
/// an hour.
pub struct Decision<'v> {
    pub(super) snapshot: Held<'v>,
    pub(super) index: u32,
    pub(super) decided: Decided,
}

/// A snapshot of the decision's own, or of the view it was asked of.
pub(super) enum Held<'v> {
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
    /// only, or where the user may have been let in before (a predicate, a holdout). [`Assigner::quote`](crate::Assigner::quote) tells.
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

/// How current an [`Assigner`](crate::Assigner) is.
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
