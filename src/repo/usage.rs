use chrono::NaiveDate;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::row::{Fields, rules};
use crate::error::{Error, Result};
use crate::id::IdempotencyKey;
use crate::scope::{Statement, TenantScope};

/// An amount that a tenant used of a metric on a day.
///
/// ```
/// # fn f(today: chrono::NaiveDate) -> lastprice::Result<()> {
/// let calls = lastprice::NewUsage::new("api_calls", today, 120, lastprice::IdempotencyKey::new("batch-7")?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewUsage {
    metric: String,
    day: NaiveDate,
    amount: u64,
    idempotency_key: IdempotencyKey,
}

impl NewUsage {
    /// A metric is `a-z`, then `a-z 0-9 _ .`, at most 64; an amount is at most 10¹². The key counts once for the
    /// metric, whatever the day.
    pub fn new(metric: impl Into<String>, day: NaiveDate, amount: u64, key: IdempotencyKey) -> Self {
        NewUsage { metric: metric.into(), day, amount, idempotency_key: key }
    }
}

/// What became of a reported amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UsageOutcome {
    /// It was added.
    Added,
    /// The key is there already, for the same day and amount; nothing was added.
    Duplicate,
}

/// The usage of one day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct UsageDay {
    /// The day.
    pub day: NaiveDate,
    /// The sum of what was added to it.
    pub amount: u64,
}

/// What the tenant used, by metric and day.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Usage<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Usage<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Usage { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Adds an amount to a metric's day, once.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, usage: lastprice::NewUsage) -> lastprice::Result<()> {
    /// let outcome = tenant.usage().add(&usage).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the key stands for another day or amount,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Adding the same value again counts once.
    pub async fn add(self, usage: &NewUsage) -> Result<UsageOutcome> {
        check_metric(&usage.metric)?;
        rules::day("day", usage.day)?;
        let amount = i64::try_from(usage.amount).ok().filter(|a| *a <= 1_000_000_000_000);
        let amount = amount.ok_or_else(|| Error::invalid("amount", "is more than 10^12"))?;
        let key = usage.idempotency_key.as_str();
        let added =
            self.scope.query_opt(&ADD, &[&self.tenant(), &usage.metric, &usage.day, &amount, &key]).await?;
        if added.is_some() {
            return Ok(UsageOutcome::Added);
        }
        let Some(stored) = self.scope.query_opt(&BY_KEY, &[&self.tenant(), &usage.metric, &key]).await?
        else {
            return Err(Error::not_found("tenant"));
        };
        let (day, value): (NaiveDate, i64) = (stored.field("day")?, stored.field("value")?);
        let fields: Vec<&'static str> = [("day", day != usage.day), ("amount", value != amount)]
            .into_iter()
            .filter_map(|(field, differs)| differs.then_some(field))
            .collect();
        if fields.is_empty() {
            return Ok(UsageOutcome::Duplicate);
        }
        Err(Error::conflict(format!("the idempotency key stands for another {}", fields.join(", ")))
            .with_fields(fields))
    }

    /// The total of a metric from one day to another, both included.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, from: chrono::NaiveDate, to: chrono::NaiveDate) -> lastprice::Result<()> {
    /// let calls = tenant.usage().total("api_calls", from, to).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric.
    pub async fn total(self, metric: &str, from: NaiveDate, to: NaiveDate) -> Result<u64> {
        check_metric(metric)?;
        rules::day("from", from)?;
        rules::day("to", to)?;
        let row = self.scope.query_opt(&TOTAL, &[&self.tenant(), &metric, &from, &to]).await?;
        row.ok_or_else(|| Error::internal("a sum has no row"))?.count("value")
    }

    /// The totals by day, from one day to another, both included; days without usage are left out. At most 400 days.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, from: chrono::NaiveDate, to: chrono::NaiveDate) -> lastprice::Result<()> {
    /// let days = tenant.usage().by_day("api_calls", from, to).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric, or a range of more than 400 days.
    pub async fn by_day(self, metric: &str, from: NaiveDate, to: NaiveDate) -> Result<Vec<UsageDay>> {
        check_metric(metric)?;
        rules::day("from", from)?;
        rules::day("to", to)?;
        if (to - from).num_days() >= 400 {
            return Err(Error::invalid("to", "is more than 400 days after `from`"));
        }
        let rows = self.scope.query(&DAYS, &[&self.tenant(), &metric, &from, &to]).await?;
        rows.iter().map(|row| Ok(UsageDay { day: row.field("day")?, amount: row.count("value")? })).collect()
    }
}

fn check_metric(metric: &str) -> Result<()> {
    let good = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_' || c == b'.';
    if metric.is_empty()
        || metric.len() > 64
        || !metric.bytes().all(good)
        || !metric.as_bytes()[0].is_ascii_lowercase()
    {
        return Err(Error::invalid("metric", "is not 1 to 64 of `a-z 0-9 _ .`, a letter first"));
    }
    Ok(())
}

pub(super) const STATEMENTS: &[&Statement] = &[&ADD, &BY_KEY, &TOTAL, &DAYS];

static ADD: Statement = Statement::write(
    "usage.add",
    "INSERT INTO {s}.usage (tenant_id, metric, day, value, idempotency_key)
     SELECT t.id, $2, $3, $4, $5 FROM {s}.tenants t WHERE t.id = $1
     ON CONFLICT DO NOTHING RETURNING value",
    &[Type::UUID, Type::TEXT, Type::DATE, Type::INT8, Type::TEXT],
);

static BY_KEY: Statement = Statement::read(
    "usage.by_key",
    "SELECT day, value FROM {s}.usage WHERE tenant_id = $1 AND metric = $2 AND idempotency_key = $3",
    &[Type::UUID, Type::TEXT, Type::TEXT],
);

static TOTAL: Statement = Statement::read(
    "usage.total",
    "SELECT COALESCE(sum(value), 0)::bigint AS value FROM {s}.usage
     WHERE tenant_id = $1 AND metric = $2 AND day BETWEEN $3 AND $4",
    &[Type::UUID, Type::TEXT, Type::DATE, Type::DATE],
);

static DAYS: Statement = Statement::read(
    "usage.by_day",
    "SELECT day, sum(value)::bigint AS value FROM {s}.usage
     WHERE tenant_id = $1 AND metric = $2 AND day BETWEEN $3 AND $4 GROUP BY day ORDER BY day",
    &[Type::UUID, Type::TEXT, Type::DATE, Type::DATE],
);
