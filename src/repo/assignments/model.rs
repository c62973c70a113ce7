//! A stored assignment, and what becomes of asking for one.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use crate::error::Result;
use crate::id::{ExperimentId, UserId};
use crate::money::Money;
use crate::repo::experiments::Reason;
use crate::repo::row::{Fields, text_enum};
use crate::repo::variants::{FromJsonb, PriceBook};

text_enum! {
    /// Why a user has the variant it has.
    AssignmentReason, "reason" {
        /// By the hash: the only population that statistics are made of.
        Randomised = "randomised",
        /// By a list, for testing.
        Forced = "forced",
        /// By the hash, but only when the sale was recorded.
        Late = "late",
        /// By another system, before.
        Imported = "imported",
        /// Taken over from another id of the same person.
        Merged = "merged",
        /// By having been a customer before an experiment for new customers: the baseline.
        Grandfathered = "grandfathered",
    }
}

/// A stored assignment: what this user was promised, as it was then. It stands whatever becomes of the experiment.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Assignment {
    /// The experiment.
    pub experiment_id: ExperimentId,
    /// The user; in an experiment by account, the account. Views and sales are recorded under this id.
    pub user_id: UserId,
    /// The variant.
    pub variant: String,
    /// The headline price that was quoted.
    pub price: Money,
    /// The further prices that were quoted.
    pub book: PriceBook,
    /// The experiment's phase then.
    pub phase: i32,
    /// Why this variant.
    pub reason: AssignmentReason,
    /// When.
    pub assigned_at: DateTime<Utc>,
}

impl Assignment {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        Ok(Assignment {
            experiment_id: row.id("experiment_id")?,
            user_id: UserId::new(row.field::<String>("user_id")?)?,
            variant: row.field("variant")?,
            price: row.money("price", "quote_currency")?,
            book: row.field::<FromJsonb<PriceBook>>("book")?.0,
            phase: row.field("quote_phase")?,
            reason: AssignmentReason::stored(row.field("reason")?)?,
            assigned_at: row.field("assigned_at")?,
        })
    }
}

/// What a user is to be shown. There is always a price.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AssignOutcome {
    /// The user is in the experiment, and this is stored.
    Assigned {
        /// The stored quote: of this call, or of the first one for this user.
        assignment: Assignment,
        /// Whether this call stored it.
        is_new: bool,
    },
    /// The user is no part of the experiment, and nothing was stored by this call. Shown is the baseline, or the variant
    /// that is forced.
    Outside {
        /// The name of the variant.
        variant: String,
        /// Its headline price.
        price: Money,
        /// Its further prices.
        book: PriceBook,
        /// Why.
        reason: Reason,
    },
}

impl AssignOutcome {
    /// The headline price to show.
    #[must_use]
    pub fn price(&self) -> Money {
        match self {
            AssignOutcome::Assigned { assignment, .. } => assignment.price,
            AssignOutcome::Outside { price, .. } => *price,
        }
    }

    /// The further prices to show.
    #[must_use]
    pub fn book(&self) -> &PriceBook {
        match self {
            AssignOutcome::Assigned { assignment, .. } => &assignment.book,
            AssignOutcome::Outside { book, .. } => book,
        }
    }

    /// The variant to show.
    #[must_use]
    pub fn variant(&self) -> &str {
        match self {
            AssignOutcome::Assigned { assignment, .. } => &assignment.variant,
            AssignOutcome::Outside { variant, .. } => variant,
        }
    }

    /// The stored quote, if the user is in the experiment.
    #[must_use]
    pub fn assignment(&self) -> Option<&Assignment> {
        match self {
            AssignOutcome::Assigned { assignment, .. } => Some(assignment),
            AssignOutcome::Outside { .. } => None,
        }
    }

    /// Whether this call stored the quote.
    #[must_use]
    pub fn is_new(&self) -> bool {
        matches!(self, AssignOutcome::Assigned { is_new: true, .. })
    }
}
