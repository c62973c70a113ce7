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
///
/// It is what a service keeps between showing a price and charging it; experiment and user are enough to look it up again
/// ([`Assignments::get`](crate::Assignments::get)).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Quote {
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
    /// Until when the price may be charged without asking again; `None` means for ever. Asking
    /// ([`assign`](crate::Assignments::assign), [`Assigner::quote`](crate::Assigner::quote)) promises the same price anew
    /// when less than half of [the validity](crate::NewExperiment::quotes_valid_for) is left.
    pub valid_until: Option<DateTime<Utc>>,
}

impl Quote {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        Ok(Quote {
            experiment_id: row.id("experiment_id")?,
            user_id: UserId::new(row.field::<String>("user_id")?)?,
            variant: row.field("variant")?,
            price: row.money("price", "quote_currency")?,
            book: row.field::<FromJsonb<PriceBook>>("book")?.0,
            phase: row.field("quote_phase")?,
            reason: AssignmentReason::stored(row.field("reason")?)?,
            assigned_at: row.field("assigned_at")?,
            valid_until: row.field("valid_until")?,
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
        quote: Quote,
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
            AssignOutcome::Assigned { quote, .. } => quote.price,
            AssignOutcome::Outside { price, .. } => *price,
        }
    }

    /// The further prices to show.
    #[must_use]
    pub fn book(&self) -> &PriceBook {
        match self {
            AssignOutcome::Assigned { quote, .. } => &quote.book,
            AssignOutcome::Outside { book, .. } => book,
        }
    }

    /// The variant to show.
    #[must_use]
    pub fn variant(&self) -> &str {
        match self {
            AssignOutcome::Assigned { quote, .. } => &quote.variant,
            AssignOutcome::Outside { variant, .. } => variant,
        }
    }

    /// The stored quote, if the user is in the experiment.
    #[must_use]
    pub fn quote(&self) -> Option<&Quote> {
        match self {
            AssignOutcome::Assigned { quote, .. } => Some(quote),
            AssignOutcome::Outside { .. } => None,
        }
    }

    /// Whether this call stored the quote.
    #[must_use]
    pub fn is_new(&self) -> bool {
        matches!(self, AssignOutcome::Assigned { is_new: true, .. })
    }
}
