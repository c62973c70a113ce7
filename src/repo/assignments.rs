use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::experiments::ExperimentStatus;
use super::page::{Cursor, MAX_PAGE, Page, rows_for};
use super::row::{Fields, text_enum};
use super::variants::{FromJsonb, PriceBook, Variant};
use crate::bucketing::{Allocation, Unit};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, UserId};
use crate::money::{Currency, Money};
use crate::scope::{Statement, TenantScope};

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
    }
}

text_enum! {
    /// Why a user is outside an experiment.
    OutsideReason, "outside" {
        /// It has not been activated yet.
        Draft = "draft",
        /// It takes no new users for now.
        Paused = "paused",
        /// It is over.
        Completed = "completed",
    }
}

/// A stored assignment: what this user was promised, as it was then. It stands whatever becomes of the experiment.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Assignment {
    /// The experiment.
    pub experiment_id: ExperimentId,
    /// The user.
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
    fn from_row(row: &Row) -> Result<Self> {
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
    /// The user is not in the experiment and sees the baseline; nothing is stored.
    Outside {
        /// The name of the baseline variant.
        baseline: String,
        /// Its headline price.
        price: Money,
        /// Its further prices.
        book: PriceBook,
        /// Why.
        reason: OutsideReason,
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

    /// The variant to show: the assigned one, or the baseline.
    #[must_use]
    pub fn variant(&self) -> &str {
        match self {
            AssignOutcome::Assigned { assignment, .. } => &assignment.variant,
            AssignOutcome::Outside { baseline, .. } => baseline,
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

/// Who was promised which price.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Assignments<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Assignments<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Assignments { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// The price of a user: the stored quote if there is one, else, while the experiment is active, a new one by
    /// algorithm `v1` (see [`bucketing`](crate::bucketing)), else the baseline.
    ///
    /// One round trip for a user who has a quote or stays outside, two for a new one.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let user = lastprice::UserId::new("user-42")?;
    /// let outcome = tenant.assignments().assign(id, &user).await?;
    /// println!("{} sees {}", user, outcome.price());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Calling again gives the same answer.
    pub async fn assign(self, experiment: ExperimentId, user: &UserId) -> Result<AssignOutcome> {
        let mut outcomes = self.assign_many(experiment, std::slice::from_ref(user)).await?;
        outcomes.pop().ok_or_else(|| Error::internal("one user has no outcome"))
    }

    /// [`assign`](Assignments::assign) for up to 1000 users, in at most three round trips; the outcomes are in
    /// the users' order. A user who is named twice is new once.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, users: Vec<lastprice::UserId>) -> lastprice::Result<()> {
    /// let outcomes = tenant.assignments().assign_many(id, &users).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`assign`](Assignments::assign), and [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than
    /// 1000 users.
    pub async fn assign_many(self, experiment: ExperimentId, users: &[UserId]) -> Result<Vec<AssignOutcome>> {
        if users.len() > MAX_PAGE as usize {
            return Err(Error::invalid("users", format_args!("are more than {MAX_PAGE}")));
        }
        // The configuration of an active experiment is frozen, so what one statement has read holds for the next,
        // unless the status changes in between: the insert looks at that once more.
        let mut is_new = HashSet::new();
        for _ in 0..3 {
            let (config, mut stored) = self.read(experiment, users).await?;
            let new = missing(&config, users, &stored)?;
            for assignment in self.insert(&config, new).await? {
                is_new.insert(assignment.user_id.clone());
                stored.insert(assignment.user_id.clone(), assignment);
            }
            if users.iter().all(|user| !is_active(&config) || stored.contains_key(user)) {
                return users.iter().map(|user| outcome(&config, user, &stored, &is_new)).collect();
            }
            // Somebody else assigned some of them meanwhile, or the status changed: look again.
        }
        Err(Error::conflict("the experiment was paused and resumed again and again meanwhile"))
    }

    /// The experiment, and what is stored for these users.
    async fn read(self, experiment: ExperimentId, users: &[UserId]) -> Result<(Config, Stored)> {
        let users: Vec<&str> = users.iter().map(UserId::as_str).collect();
        let rows = self.scope.query(&READ, &[&self.tenant(), &experiment.uuid(), &users]).await?;
        let config = Config::from_row(rows.first().ok_or_else(|| Error::not_found("experiment"))?)?;
        let mut stored = Stored::with_capacity(rows.len());
        for row in &rows {
            if row.field::<Option<&str>>("user_id")?.is_some() {
                let assignment = Assignment::from_row(row)?;
                stored.insert(assignment.user_id.clone(), assignment);
            }
        }
        Ok((config, stored))
    }

    async fn insert(self, config: &Config, new: Vec<(&str, i32)>) -> Result<Vec<Assignment>> {
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let (users, variants): (Vec<&str>, Vec<i32>) = new.into_iter().unzip();
        let (tenant, experiment, phase) = (self.tenant(), config.id.uuid(), config.phase);
        let rows = self.scope.query(&INSERT, &[&tenant, &experiment, &phase, &users, &variants]).await?;
        rows.iter().map(Assignment::from_row).collect()
    }

    /// The stored quote of a user, if there is one.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let quoted = tenant.assignments().get(id, &user).await?.map(|quote| quote.price);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn get(self, experiment: ExperimentId, user: &UserId) -> Result<Option<Assignment>> {
        let row = self.scope.query_opt(&GET, &[&self.tenant(), &experiment.uuid(), &user.as_str()]).await?;
        row.map(|row| Assignment::from_row(&row)).transpose()
    }

    /// All quotes of a user, by experiment; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let quotes = tenant.assignments().list_by_user(&user, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_user(
        self,
        user: &UserId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Assignment>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&LIST_BY_USER, &[&self.tenant(), &user.as_str(), &after, &rows]).await?;
        let items = rows.iter().map(Assignment::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |a: &Assignment| a.experiment_id.uuid()))
    }
}

type Stored = HashMap<UserId, Assignment>;

/// What assigning needs of an experiment.
struct Config {
    id: ExperimentId,
    status: ExperimentStatus,
    currency: Currency,
    variants: Vec<Variant>,
    baseline: Option<String>,
    salt: String,
    phase: i32,
}

impl Config {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Config {
            id: row.id("id")?,
            status: ExperimentStatus::stored(row.field("status")?)?,
            currency: row.currency("currency")?,
            variants: row.field::<FromJsonb<Vec<Variant>>>("variants")?.0,
            baseline: row.field("baseline")?,
            salt: row.field("salt")?,
            phase: row.field("phase")?,
        })
    }

    /// The variant that everyone outside sees: the one that is named, or the first.
    fn baseline(&self) -> Result<&Variant> {
        let named = |v: &&Variant| self.baseline.as_ref().is_none_or(|name| v.name == *name);
        self.variants.iter().find(named).ok_or_else(|| Error::internal("the baseline is no variant"))
    }
}

fn is_active(config: &Config) -> bool {
    config.status == ExperimentStatus::Active
}

/// Users without a quote, each once, with the index of the variant that the hash gives them; sorted, so that two
/// callers with the same users wait for each other in one order.
fn missing<'u>(config: &Config, users: &'u [UserId], stored: &Stored) -> Result<Vec<(&'u str, i32)>> {
    if !is_active(config) {
        return Ok(Vec::new());
    }
    let weights: Vec<u32> = config.variants.iter().map(|v| v.weight).collect();
    let allocation = Allocation::new(&config.salt, &weights)?;
    let new = users.iter().filter(|user| !stored.contains_key(user));
    let mut new: Vec<_> =
        new.map(|user| (user.as_str(), allocation.variant(Unit::of(user)) as i32)).collect();
    new.sort_unstable();
    new.dedup();
    Ok(new)
}

fn outcome(
    config: &Config,
    user: &UserId,
    stored: &Stored,
    is_new: &HashSet<UserId>,
) -> Result<AssignOutcome> {
    if let Some(assignment) = stored.get(user) {
        return Ok(AssignOutcome::Assigned { assignment: assignment.clone(), is_new: is_new.contains(user) });
    }
    let reason = match config.status {
        ExperimentStatus::Draft => OutsideReason::Draft,
        ExperimentStatus::Paused => OutsideReason::Paused,
        ExperimentStatus::Completed => OutsideReason::Completed,
        ExperimentStatus::Active => return Err(Error::internal("an active experiment left a user out")),
    };
    let baseline = config.baseline()?;
    Ok(AssignOutcome::Outside {
        baseline: baseline.name.clone(),
        price: Money::stored(baseline.price, config.currency),
        book: baseline.book.clone(),
        reason,
    })
}

macro_rules! columns {
    () => {
        "experiment_id, user_id, variant, price, currency AS quote_currency, book, phase AS quote_phase, \
         reason, assigned_at"
    };
}

pub(super) const STATEMENTS: &[&Statement] = &[&READ, &INSERT, &GET, &LIST_BY_USER];

// The experiment, once per stored quote of these users, or once without any; its variants with the first row only. LIMIT keeps it at one look-up per user:
// as a plain join, a plan made for an average experiment reads all quotes of this one.
static READ: Statement = Statement::read(
    "assignments.read",
    "SELECT e.id, e.status, e.baseline, e.salt, e.currency, e.phase,
            CASE WHEN row_number() OVER () = 1 THEN e.variants END AS variants,
            a.experiment_id, a.user_id, a.variant, a.price, a.currency AS quote_currency, a.book,
            a.phase AS quote_phase, a.reason, a.assigned_at
     FROM {s}.experiments e
     LEFT JOIN (unnest($3) AS x (user_id) CROSS JOIN LATERAL (
       SELECT * FROM {s}.assignments a
       WHERE a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id = x.user_id LIMIT 1) a) ON true
     WHERE e.tenant_id = $1 AND e.id = $2",
    &[Type::UUID, Type::UUID, Type::TEXT_ARRAY],
);

// The row is the quote: prices are copied from the configuration by the database itself.
static INSERT: Statement = Statement::write(
    "assignments.insert",
    concat!(
        "INSERT INTO {s}.assignments (tenant_id, experiment_id, user_id, variant, price, currency, book, phase)
         SELECT e.tenant_id, e.id, x.user_id, e.variants -> x.variant ->> 'name',
                CASE WHEN scale(p.price) > 6 THEN round(p.price, 6) ELSE p.price END, e.currency,
                COALESCE(e.variants -> x.variant -> 'prices', '[]'), e.phase
         FROM {s}.experiments e, unnest($4, $5) AS x (user_id, variant),
              LATERAL (SELECT (e.variants -> x.variant ->> 'price')::numeric AS price) p
         WHERE e.tenant_id = $1 AND e.id = $2 AND e.status = 'active' AND e.phase = $3
         ORDER BY x.user_id
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::INT4, Type::TEXT_ARRAY, Type::INT4_ARRAY],
);

static GET: Statement = Statement::read(
    "assignments.get",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.assignments WHERE tenant_id = $1 AND experiment_id = $2 AND user_id = $3"
    ),
    &[Type::UUID, Type::UUID, Type::TEXT],
);

static LIST_BY_USER: Statement = Statement::read(
    "assignments.list_by_user",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.assignments WHERE tenant_id = $1 AND user_id = $2 AND experiment_id >= $3
         ORDER BY tenant_id, user_id, experiment_id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);
