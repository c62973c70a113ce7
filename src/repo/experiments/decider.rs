//! An experiment's configuration, compiled: the one place that decides who sees what, and why.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use super::entry::{AssignmentUnit, Eligibility, Layer};
use super::model::ExperimentStatus;
use crate::bucketing::{Allocation, Placement, Share, Unit};
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::{Currency, Money};
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
    /// Active, by user, for everyone, nobody forced: the common case takes no turns.
    is_plain: bool,
    /// Stored quotes may differ from what is decided here though nothing else says so.
    exceptions: bool,
}

/// The configuration, compiled; without gates that are open to all.
pub(super) fn allocation(
    salt: &str,
    weights: &[u32],
    traffic: Share,
    layer: Option<&Layer>,
    tenant_salt: &str,
    holdout: Share,
) -> Result<Allocation> {
    let mut allocation = Allocation::new(salt, weights)?;
    if traffic != Share::ALL {
        allocation = allocation.traffic(traffic);
    }
    if holdout != Share::NONE {
        allocation = allocation.holdout(tenant_salt, holdout);
    }
    match layer {
        Some(layer) => allocation.layer(&format!("{tenant_salt}/{}", layer.name()), layer.range()),
        None => Ok(allocation),
    }
}

/// What a [`Decider`] is made of: columns of the experiment and of its tenant.
pub(crate) struct Parts<'p> {
    pub(crate) id: ExperimentId,
    pub(crate) key: &'p str,
    pub(crate) phase: i32,
    pub(crate) status: ExperimentStatus,
    pub(crate) currency: Currency,
    pub(crate) variants: Vec<Variant>,
    /// The first variant, unless one is named.
    pub(crate) baseline: Option<&'p str>,
    pub(crate) salt: &'p str,
    pub(crate) traffic: Share,
    pub(crate) layer: Option<Layer>,
    pub(crate) tenant_salt: &'p str,
    pub(crate) holdout: Share,
    pub(crate) unit: AssignmentUnit,
    pub(crate) eligibility: Eligibility,
    pub(crate) started: Option<DateTime<Utc>>,
    pub(crate) forced: HashMap<String, String>,
    pub(crate) exceptions: bool,
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
        Decider::new(Parts {
            id: row.id("id")?,
            key: row.field("key")?,
            phase: row.field("phase")?,
            status: ExperimentStatus::stored(row.field("status")?)?,
            currency: row.currency("currency")?,
            variants: row.field::<FromJsonb<Vec<Variant>>>("variants")?.0,
            baseline: row.field("baseline")?,
            salt: row.field("salt")?,
            traffic: row.share("traffic")?,
            layer: Layer::from_row(row)?,
            tenant_salt: row.field("tenant_salt")?,
            holdout: row.share("holdout")?,
            unit: AssignmentUnit::stored(row.field("unit")?)?,
            eligibility: Eligibility::stored(row.field("eligibility")?)?,
            started: row.field("start_date")?,
            forced: row.field::<FromJsonb<HashMap<String, String>>>("forced")?.0,
            exceptions: row.field("exceptions")?,
        })
    }

    pub(crate) fn new(parts: Parts<'_>) -> Result<Self> {
        let index = |name: &str| {
            let at = parts.variants.iter().position(|v| v.name == name);
            at.and_then(|at| u32::try_from(at).ok()).ok_or_else(|| Error::internal("a name is no variant's"))
        };
        let baseline = parts.baseline.map_or(Ok(0), index)?;
        let forced: HashMap<_, _> =
            parts.forced.into_iter().map(|(id, name)| Ok((id, index(&name)?))).collect::<Result<_>>()?;

        let weights: Vec<u32> = parts.variants.iter().map(|v| v.weight).collect();
        let allocation = allocation(
            parts.salt,
            &weights,
            parts.traffic,
            parts.layer.as_ref(),
            parts.tenant_salt,
            parts.holdout,
        )?;

        let is_plain = parts.status == ExperimentStatus::Active
            && parts.unit == AssignmentUnit::User
            && parts.eligibility == Eligibility::Everyone
            && forced.is_empty();
        let currency = parts.currency;
        let arm = |v: Variant| Arm { name: v.name, price: Money::stored(v.price, currency), book: v.book };
        Ok(Decider {
            id: parts.id,
            key: parts.key.into(),
            phase: parts.phase,
            status: parts.status,
            variants: parts.variants.into_iter().map(arm).collect(),
            baseline,
            allocation,
            unit: parts.unit,
            eligibility: parts.eligibility,
            started: parts.started,
            forced,
            is_plain,
            exceptions: parts.exceptions,
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

    /// What there is to say without the database, where there may be a stored quote.
    #[inline]
    pub(crate) fn decide_without_quote(&self, subject: &Subject<'_>) -> Decided {
        if self.is_plain && subject.predicate.is_none() {
            return self.place(subject.user.unit);
        }
        let unit = self.unit(subject);
        self.forced(unit).unwrap_or_else(|| self.decide(subject, unit))
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
    pub(crate) fn decide(&self, subject: &Subject<'_>, unit: Option<Hashed<'_>>) -> Decided {
        let Some(unit) = unit else { return self.outside(Reason::NoAccount) };
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
        self.place(unit.unit)
    }

    #[inline]
    fn place(&self, unit: Unit) -> Decided {
        match self.allocation.place(unit) {
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
    /// rises; but a holdout may have been raised, and who may enter have changed, after a quote was stored.
    #[inline]
    pub(crate) fn is_certain(&self, reason: Reason) -> bool {
        match reason {
            Reason::NoAccount => true,
            Reason::Forced
            | Reason::Draft
            | Reason::OutsideLayer
            | Reason::OutsideTraffic
            | Reason::Randomised => {
                self.phase == 1 && !self.exceptions && self.eligibility == Eligibility::Everyone
            }
            Reason::Paused
            | Reason::Completed
            | Reason::Ineligible
            | Reason::CustomerUnknown
            | Reason::Grandfathered
            | Reason::HeldOut => false,
        }
    }
}
