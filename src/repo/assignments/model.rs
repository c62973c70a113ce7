//! A stored assignment, and what becomes of asking for one.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use crate::error::Result;
use crate::id::{ExperimentId, UserId};
use crate::money::Money;
use crate::repo::experiments::Reason;
use crate::repo::row::{Fields, text_enum};
use crate::repo::subject::{Customer, Subject};
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
        /// Of a person by two ids who had a quote by each, and saw two prices: see [`Users::merge`](crate::Users::merge).
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

/// A quote to store: who, in which experiment, and what the host knows of them, as in a [`Subject`]. For what goes on its
/// own way, such as the events of a [`Recorder`](crate::Recorder).
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId) -> lastprice::Result<()> {
/// use lastprice::{NewAssignment, UserId};
///
/// let quote = NewAssignment::new(experiment, UserId::new("user-42")?).account(UserId::new("account-7")?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewAssignment {
    pub(crate) experiment_id: ExperimentId,
    user_id: UserId,
    account: Option<UserId>,
    customer: Customer,
    shown_at: DateTime<Utc>,
}

impl NewAssignment {
    /// A user, of whom nothing else is known. What a host's predicate ([`Subject::eligible_if`]) leaves out is not to be
    /// stored in the first place.
    pub fn new(experiment: ExperimentId, user: UserId) -> Self {
        NewAssignment {
            experiment_id: experiment,
            user_id: user,
            account: None,
            customer: Customer::Unknown,
            shown_at: Utc::now(),
        }
    }

    /// As [`Subject::account`].
    pub fn account(mut self, account: UserId) -> Self {
        self.account = Some(account);
        self
    }

    /// As [`Subject::customer_since`].
    pub fn customer_since(mut self, since: DateTime<Utc>) -> Self {
        self.customer = Customer::Since(since);
        self
    }

    /// As [`Subject::not_a_customer`].
    pub fn not_a_customer(mut self) -> Self {
        self.customer = Customer::No;
        self
    }

    /// As [`Subject::shown_at`]. Default: when this value was made.
    pub fn shown_at(mut self, time: DateTime<Utc>) -> Self {
        self.shown_at = time;
        self
    }

    /// The ids that it may be stored under: the experiment's unit decides.
    pub(crate) fn units(&self) -> (&UserId, Option<&UserId>) {
        (&self.user_id, self.account.as_ref())
    }

    pub(crate) fn subject(&self) -> Subject<'_> {
        let subject =
            Subject { customer: self.customer, shown_at: Some(self.shown_at), ..Subject::new(&self.user_id) };
        self.account.iter().fold(subject, Subject::account)
    }

    /// What it holds on the heap, in bytes.
    pub(crate) fn heap(&self) -> usize {
        self.user_id.as_str().len() + self.account.as_ref().map_or(0, |account| account.as_str().len())
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
