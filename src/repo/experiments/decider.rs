//! An experiment's configuration, compiled: the one place that decides who sees what, and why.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use super::entry::{AssignmentUnit, Eligibility, Layer};
use super::model::ExperimentStatus;
use crate::bucketing::{Allocation, Placement, Share};
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::Money;
use crate::repo::row::{Fields, text_enum};
use crate::repo::subject::{Customer, Hashed, Subject};
use crate::repo::variants::{FromJsonb, PriceBook, Variant};

text_enum! {
    /// Why a user sees the price that they see, in the order in which it is decided. A stored quote comes right after
    /// `Forced`.
    Reason, "reason" {
        /// The experiment is by account, and no account was named: the baseline.
        NoAccount = "no_account",
        /// By the experiment's list, for testing.
        Forced = "forced",
        /// The experiment has not been activated yet: the baseline.
        Draft = "draft",
        /// It takes no new users for now: the baseline.
        Paused = "paused",
        /// It is over: the baseline.
        Completed = "completed",
        /// The host's predicate says no: the baseline.
        Ineligible = "ineligible",
        /// The experiment is for new customers, and nobody said whether the user is one: the baseline.
        CustomerUnknown = "customer_unknown",
        /// The experiment is for new customers, and this one was a customer before: the baseline, which is kept.
        Grandfathered = "grandfathered",
        /// Among those who are in no experiment of the tenant: the baseline.
        HeldOut = "held_out",
        /// In a part of the layer that is not this experiment's: the baseline.
        OutsideLayer = "outside_layer",
        /// Beyond the share of users that the experiment takes: the baseline.
        OutsideTraffic = "outside_traffic",
        /// By the hash.
        Randomised = "randomised",
    }
}

/// Columns of an experiment `e` and its tenant `t` that a [`Decider`] is made of.
macro_rules! decider_columns {
    ($variants:literal) => {
        concat!(
            "e.id, e.key, e.status, e.currency, e.phase, e.baseline, e.salt, e.traffic, e.layer, e.layer_start, e.layer_end, \
             e.unit, e.eligibility, e.exceptions, e.start_date, t.salt AS tenant_salt, t.holdout, ",
            $variants
        )
    };
}
pub(crate) use decider_columns;

/// An experiment, ready to decide.
#[derive(Debug)]
pub(crate) struct Decider {
    pub(crate) id: ExperimentId,
    pub(crate) key: Box<str>,
    pub(crate) phase: i32,
    pub(crate) status: ExperimentStatus,
    variants: Box<[Arm]>,
    baseline: u32,
    allocation: Allocation,
    unit: AssignmentUnit,
    eligibility: Eligibility,
    started: Option<DateTime<Utc>>,
    forced: HashMap<String, u32>,
    /// Stored quotes may differ from what is decided here though nothing else says so.
    exceptions: bool,
}

/// A variant, as it is shown.
#[derive(Debug)]
pub(crate) struct Arm {
    pub(crate) name: String,
    pub(crate) price: Money,
    pub(crate) book: PriceBook,
}

/// The index of a variant (there is always one) and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decided {
    pub(crate) variant: u32,
    pub(crate) reason: Reason,
}

impl Decider {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let variants = row.field::<FromJsonb<Vec<Variant>>>("variants")?.0;
        let index = |name: &str| {
            let at = variants.iter().position(|v| v.name == name);
            at.and_then(|at| u32::try_from(at).ok()).ok_or_else(|| Error::internal("a name is no variant's"))
        };
        let baseline = row.field::<Option<&str>>("baseline")?.map_or(Ok(0), index)?;
        let forced = row.field::<FromJsonb<HashMap<String, String>>>("forced")?.0;
        let forced = forced.into_iter().map(|(id, name)| Ok((id, index(&name)?))).collect::<Result<_>>()?;

        let weights: Vec<u32> = variants.iter().map(|v| v.weight).collect();
        let mut allocation = Allocation::new(row.field("salt")?, &weights)?;
        let (traffic, holdout) = (row.share("traffic")?, row.share("holdout")?);
        let tenant_salt: &str = row.field("tenant_salt")?;
        if traffic != Share::ALL {
            allocation = allocation.traffic(traffic);
        }
        if holdout != Share::NONE {
            allocation = allocation.holdout(tenant_salt, holdout);
        }
        if let Some(layer) = Layer::from_row(row)? {
            allocation = allocation.layer(&format!("{tenant_salt}/{}", layer.name()), layer.range())?;
        }

        let currency = row.currency("currency")?;
        let arm = |v: Variant| Arm { name: v.name, price: Money::stored(v.price, currency), book: v.book };
        Ok(Decider {
            id: row.id("id")?,
            key: row.field::<&str>("key")?.into(),
            phase: row.field("phase")?,
            status: ExperimentStatus::stored(row.field("status")?)?,
            variants: variants.into_iter().map(arm).collect(),
            baseline,
            allocation,
            unit: AssignmentUnit::stored(row.field("unit")?)?,
            eligibility: Eligibility::stored(row.field("eligibility")?)?,
            started: row.field("start_date")?,
            forced,
            exceptions: row.field("exceptions")?,
        })
    }

    /// A variant that was decided, or the baseline.
    pub(crate) fn arm(&self, decided: Decided) -> &Arm {
        &self.variants[decided.variant as usize]
    }

    /// Whose id decides, and what is stored is stored under.
    #[inline]
    pub(crate) fn unit<'s>(&self, subject: &Subject<'s>) -> Option<Hashed<'s>> {
        match self.unit {
            AssignmentUnit::User => Some(subject.user),
            AssignmentUnit::Account => subject.account,
        }
    }

    /// What comes before a stored quote.
    #[inline]
    pub(crate) fn forced(&self, unit: Option<Hashed<'_>>) -> Option<Decided> {
        if self.forced.is_empty() {
            return None;
        }
        let variant = *self.forced.get(unit?.id.as_str())?;
        Some(Decided { variant, reason: Reason::Forced })
    }

    /// What comes after a stored quote.
    #[inline]
    pub(crate) fn decide(&self, subject: &Subject<'_>) -> Decided {
        let Some(unit) = self.unit(subject) else { return self.outside(Reason::NoAccount) };
        match self.status {
            ExperimentStatus::Active => {}
            ExperimentStatus::Draft => return self.outside(Reason::Draft),
            ExperimentStatus::Paused => return self.outside(Reason::Paused),
            ExperimentStatus::Completed => return self.outside(Reason::Completed),
        }
        if subject.predicate.is_some_and(|is_eligible| !is_eligible(&self.key)) {
            return self.outside(Reason::Ineligible);
        }
        if self.eligibility == Eligibility::NewCustomersOnly {
            match subject.customer {
                Customer::No => {}
                Customer::Unknown => return self.outside(Reason::CustomerUnknown),
                Customer::Since(since) if self.started.is_some_and(|start| since >= start) => {}
                Customer::Since(_) => return self.outside(Reason::Grandfathered),
            }
        }
        match self.allocation.place(unit.unit) {
            Placement::Variant(variant) => Decided { variant, reason: Reason::Randomised },
            Placement::HeldOut => self.outside(Reason::HeldOut),
            Placement::OutsideLayer => self.outside(Reason::OutsideLayer),
            Placement::OutsideTraffic => self.outside(Reason::OutsideTraffic),
        }
    }

    #[inline]
    fn outside(&self, reason: Reason) -> Decided {
        Decided { variant: self.baseline, reason }
    }

    /// Whether no stored quote can say otherwise. A range of a layer never moves, and the traffic of one phase only
    /// rises; a holdout may have been raised, and who may enter have changed, after a quote was stored.
    #[inline]
    pub(crate) fn is_certain(&self, reason: Reason) -> bool {
        match reason {
            Reason::NoAccount | Reason::Forced => true,
            Reason::Draft | Reason::OutsideLayer => !self.exceptions,
            Reason::Randomised | Reason::OutsideTraffic => self.phase == 1 && !self.exceptions,
            Reason::Paused
            | Reason::Completed
            | Reason::Ineligible
            | Reason::CustomerUnknown
            | Reason::Grandfathered
            | Reason::HeldOut => false,
        }
    }
}
