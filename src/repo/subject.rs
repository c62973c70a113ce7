use chrono::{DateTime, Utc};

use crate::bucketing::Unit;
use crate::id::UserId;

/// Who is to see a price, and what the host knows of them. A `&UserId` is one, if there is nothing to say.
///
/// ```
/// use lastprice::{Subject, UserId};
///
/// let (user, account) = (UserId::new("user-42")?, UserId::new("account-7")?);
/// let in_europe = true;
/// let subject = Subject::new(&user)
///     .account(&account)
///     .customer_since("2026-01-31T00:00:00Z".parse().unwrap())
///     .eligible_if(&|experiment| experiment != "eu-annual" || in_europe);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Clone, Copy)]
#[must_use]
pub struct Subject<'a> {
    pub(crate) user: Hashed<'a>,
    pub(crate) account: Option<Hashed<'a>>,
    pub(crate) customer: Customer,
    pub(crate) shown_at: Option<DateTime<Utc>>,
    pub(crate) predicate: Option<&'a (dyn Fn(&str) -> bool + Sync)>,
}

/// An id, and its hash.
#[derive(Clone, Copy)]
pub(crate) struct Hashed<'a> {
    pub(crate) id: &'a UserId,
    pub(crate) unit: Unit,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Customer {
    Unknown,
    No,
    Since(DateTime<Utc>),
}

impl<'a> Hashed<'a> {
    #[inline]
    fn new(id: &'a UserId) -> Self {
        Hashed { id, unit: Unit::of(id) }
    }
}

impl<'a> Subject<'a> {
    /// A user, of whom nothing else is known. The id is hashed here, once for any number of experiments.
    #[inline]
    pub fn new(user: &'a UserId) -> Self {
        Subject {
            user: Hashed::new(user),
            account: None,
            customer: Customer::Unknown,
            shown_at: None,
            predicate: None,
        }
    }

    /// The account of the user, for experiments [by account](crate::AssignmentUnit::Account). Without it, the user is
    /// outside of them.
    pub fn account(mut self, account: &'a UserId) -> Self {
        self.account = Some(Hashed::new(account));
        self
    }

    /// Since when the user, or the account, is a paying customer: who was one when an experiment
    /// [for new customers](crate::Eligibility::NewCustomersOnly) started keeps the baseline.
    pub fn customer_since(mut self, since: DateTime<Utc>) -> Self {
        self.customer = Customer::Since(since);
        self
    }

    /// The user is no paying customer yet. Without a word on it, the user is outside of experiments
    /// [for new customers](crate::Eligibility::NewCustomersOnly), so that nobody is re-priced by an omission.
    pub fn not_a_customer(mut self) -> Self {
        self.customer = Customer::No;
        self
    }

    /// When the price was shown, if that is not now: it was decided [from memory](crate::Assigner) and is stored later. From
    /// then on the user's window counts. A time to come is taken as now. It changes nothing of a quote that is stored already.
    pub fn shown_at(mut self, time: DateTime<Utc>) -> Self {
        self.shown_at = Some(time);
        self
    }

    /// Whom the host lets into an experiment, by its key; asked when nothing before it has decided. Default:
    /// everyone.
    pub fn eligible_if(mut self, predicate: &'a (dyn Fn(&str) -> bool + Sync)) -> Self {
        self.predicate = Some(predicate);
        self
    }
}

impl<'a> From<&'a UserId> for Subject<'a> {
    #[inline]
    fn from(user: &'a UserId) -> Self {
        Subject::new(user)
    }
}

impl std::fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let account = self.account.map(|account| account.id);
        f.debug_struct("Subject")
            .field("user", self.user.id)
            .field("account", &account)
            .finish_non_exhaustive()
    }
}
