mod quota;

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{Datelike, Days, Months, NaiveDate};
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::metrics::fold_all;
use super::page::MAX_PAGE;
use super::row::{Fields, rules};
use crate::error::{Error, Result};
use crate::id::IdempotencyKey;
use crate::scope::{Statement, TenantScope};
pub(crate) use quota::ACTIVE_EXPERIMENTS;
pub use quota::{ConsumeOutcome, LimitPeriod, Quota};

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
    /// metric, whatever the day. What is metered by itself ([`signals`, `experiments`](Usage) and `active_experiments`) is
    /// refused where it is added.
    pub fn new(metric: impl Into<String>, day: NaiveDate, amount: u64, key: IdempotencyKey) -> Self {
        NewUsage { metric: metric.into(), day, amount, idempotency_key: key }
    }

    /// Checks what can be checked without the database.
    pub(crate) fn check(&self) -> Result<()> {
        check_metric(&self.metric)?;
        check_not_metered(&self.metric)?;
        rules::day("day", self.day)?;
        if self.amount > MAX_AMOUNT {
            return Err(Error::invalid("amount", "is more than 10^12"));
        }
        Ok(())
    }

    pub(crate) fn metric(&self) -> &str {
        &self.metric
    }

    /// What it holds on the heap, in bytes.
    pub(crate) fn heap(&self) -> usize {
        self.metric.capacity() + self.idempotency_key.as_str().len()
    }

    /// At most 10¹², so that it fits.
    fn value(&self) -> i64 {
        self.amount as i64
    }
}

const MAX_AMOUNT: u64 = 1_000_000_000_000;

/// When a client has added so many rows for a tenant, it has them folded: half of what a fold takes.
const FOLD_AFTER: u64 = 25_000;

/// What became of a reported amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UsageOutcome {
    /// It was added.
    Added,
    /// The key is there already, for the same day and amount; nothing was added.
    Duplicate,
    /// The key is there already, for another day or amount; nothing was added. Only of [`Usage::add_many`]:
    /// [`Usage::add`] makes an error of it.
    Conflict {
        /// The day that stands under the key.
        day: NaiveDate,
        /// The amount that stands under the key.
        amount: u64,
    },
}

impl NewUsage {
    /// The error of a key that stands for something else.
    pub(crate) fn conflict(&self, day: NaiveDate, amount: u64) -> Error {
        let fields: Vec<&'static str> = [("day", day != self.day), ("amount", amount != self.amount)]
            .into_iter()
            .filter_map(|(field, differs)| differs.then_some(field))
            .collect();
        Error::conflict(format!("the idempotency key stands for another {}", fields.join(", ")))
            .with_fields(fields)
    }
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

/// The usage of a billing period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct UsagePeriod {
    /// Its first day.
    pub first_day: NaiveDate,
    /// Its last day.
    pub last_day: NaiveDate,
    /// What was used from the first day to the last.
    pub amount: u64,
}

/// What the tenant used, by metric and day (UTC), and what it may use.
///
/// Metrics are the host's to name, and to [`add`](Usage::add). Two are metered by the database itself, in the transaction that
/// makes them and at no cost there, whoever writes:
///
/// - `signals`: assignments and sales, on the day of the assignment or sale;
/// - `experiments`: experiments that were activated, on the day on which they began.
///
/// What was used stays used when an experiment is archived or deleted. Nothing can be added to these, nor consumed of them.
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
        match self.add_many(std::slice::from_ref(usage)).await?.pop() {
            Some(UsageOutcome::Conflict { day, amount }) => Err(usage.conflict(day, amount)),
            Some(outcome) => Ok(outcome),
            None => Err(Error::internal("one amount has no outcome")),
        }
    }

    /// Adds up to 1000 amounts, each once, in one statement; the outcomes are in the amounts' order.
    ///
    /// One round trip, and a second one if some of them were there already. After every 25,000 of a tenant the client adds them up in
    /// the background, by a connection of the pool.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, usage: Vec<lastprice::NewUsage>) -> lastprice::Result<()> {
    /// let outcomes = tenant.usage().add_many(&usage).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 1000 amounts, or one that breaks a rule,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant; then nothing is added. That a key stands
    /// for another day or amount is an outcome: [`UsageOutcome::Conflict`].
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Adding the same values again counts once.
    pub async fn add_many(self, usage: &[NewUsage]) -> Result<Vec<UsageOutcome>> {
        if usage.len() > MAX_PAGE as usize {
            return Err(Error::invalid("usage", format_args!("is more than {MAX_PAGE} amounts")));
        }
        usage.iter().try_for_each(NewUsage::check)?;
        if usage.is_empty() {
            return Ok(Vec::new());
        }
        let metrics: Vec<&str> = usage.iter().map(NewUsage::metric).collect();
        let days: Vec<NaiveDate> = usage.iter().map(|u| u.day).collect();
        let values: Vec<i64> = usage.iter().map(NewUsage::value).collect();
        let keys: Vec<&str> = usage.iter().map(|u| u.idempotency_key.as_str()).collect();
        let tenant = self.tenant();
        let added = self.scope.query(&ADD, &[&tenant, &metrics, &days, &values, &keys]).await?;

        // What stands under each key, and whether this call put it there. Of one key's amounts the first in the call was
        // added.
        let mut standing: HashMap<(String, String), (NaiveDate, u64, bool)> = HashMap::new();
        let stand = |row: &tokio_postgres::Row, ours| -> Result<_> {
            let key = (row.field("metric")?, row.field("idempotency_key")?);
            Ok((key, (row.field("day")?, row.count("value")?, ours)))
        };
        for row in &added {
            standing.extend([stand(row, true)?]);
        }
        self.fold_in_the_background(added.len());
        let id = |usage: &NewUsage| (usage.metric.clone(), usage.idempotency_key.as_str().to_owned());
        let (metrics, keys): (Vec<&str>, Vec<&str>) = usage
            .iter()
            .filter(|usage| !standing.contains_key(&id(usage)))
            .map(|usage| (usage.metric(), usage.idempotency_key.as_str()))
            .unzip();
        if !keys.is_empty() {
            let there = self.scope.query(&BY_KEYS, &[&tenant, &metrics, &keys]).await;
            for row in &there.map_err(|e| self.scope.after_writing(e))? {
                standing.extend([stand(row, false)?]);
            }
        }
        let outcome = |usage: &NewUsage| {
            let (day, amount, ours) =
                standing.get_mut(&id(usage)).ok_or_else(|| Error::not_found("tenant"))?;
            Ok(match (*day, *amount) == (usage.day, usage.amount) {
                true if std::mem::take(ours) => UsageOutcome::Added,
                true => UsageOutcome::Duplicate,
                false => UsageOutcome::Conflict { day: *day, amount: *amount },
            })
        };
        usage.iter().map(outcome).collect()
    }

    /// The total of a metric in the billing period of a day: a month, which begins with the day of the month that is
    /// the tenant's (1 unless [`AdminLimits::set_billing_day`](crate::AdminLimits::set_billing_day) said otherwise).
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, last_month: chrono::NaiveDate) -> lastprice::Result<()> {
    /// let bill = tenant.usage().in_period("signals", last_month).await?;
    /// println!("{} signals from {} to {}", bill.amount, bill.first_day, bill.last_day);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric or the day,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn in_period(self, metric: &str, day: NaiveDate) -> Result<UsagePeriod> {
        check_metric(metric)?;
        rules::day("day", day)?;
        let row = self.scope.query_opt(&BILLING_DAY, &[&self.tenant()]).await?;
        let billing_day: i32 = row.ok_or_else(|| Error::not_found("tenant"))?.field("billing_day")?;
        let (first_day, last_day) =
            period_of(day, billing_day).ok_or_else(|| Error::internal("a day has no period"))?;
        let amount = self.sum(metric, first_day, last_day).await?;
        Ok(UsagePeriod { first_day, last_day, amount })
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
        self.sum(metric, from, to).await
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
        let pending: i64 = rows.iter().map(|row| row.field::<i64>("pending")).sum::<Result<_>>()?;
        self.fold_if_many(pending).await;
        rows.iter().map(|row| Ok(UsageDay { day: row.field("day")?, amount: row.count("value")? })).collect()
    }

    async fn sum(self, metric: &str, from: NaiveDate, to: NaiveDate) -> Result<u64> {
        let row = self.scope.query_opt(&TOTAL, &[&self.tenant(), &metric, &from, &to]).await?;
        let row = row.ok_or_else(|| Error::internal("a sum has no row"))?;
        self.fold_if_many(row.field("pending")?).await;
        row.count("value")
    }

    /// So that no more waits than a fold takes, of a tenant of whom nobody reads. In a host's transaction there is no connection to
    /// do it by: readers and refreshers do it then.
    fn fold_in_the_background(self, added: usize) {
        if let Some(session) = self.scope.session()
            && session.has_reported(self.scope.tenant_id(), added as u64, FOLD_AFTER)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(fold_all(Arc::clone(session), self.scope.tenant_id()));
        }
    }

    /// So that what is pending stays little, whoever else folds.
    async fn fold_if_many(self, pending: i64) {
        self.scope.metrics().fold_if_pending(pending).await;
    }
}

/// From the first day to the last.
fn period_of(day: NaiveDate, billing_day: i32) -> Option<(NaiveDate, NaiveDate)> {
    let before = Days::new(u64::try_from(billing_day).ok()?.checked_sub(1)?);
    let first = day.checked_sub_days(before)?.with_day(1)?.checked_add_days(before)?;
    Some((first, first.checked_add_months(Months::new(1))?.pred_opt()?))
}

pub(crate) fn check_metric(metric: &str) -> Result<()> {
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

/// What the database counts by itself is nobody's to add to.
fn check_not_metered(metric: &str) -> Result<()> {
    match metric {
        "signals" | "experiments" | ACTIVE_EXPERIMENTS => {
            Err(Error::invalid("metric", "is metered by itself: nothing is added to it or consumed of it"))
        }
        _ => Ok(()),
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&ADD, &BY_KEYS, &BILLING_DAY, &TOTAL, &DAYS];
pub(super) const QUOTA_STATEMENTS: &[&Statement] = quota::STATEMENTS;

// In the order of the keys: two batches with the same ones wait for each other in one order. Of one key's amounts the
// first in the call is added.
static ADD: Statement = Statement::write(
    "usage.add",
    "INSERT INTO {s}.usage (tenant_id, metric, day, value, idempotency_key)
     SELECT t.id, x.metric, x.day, x.value, x.idempotency_key
     FROM (SELECT t.id FROM {s}.tenants t WHERE t.id = $1) t,
          unnest($2, $3, $4, $5) WITH ORDINALITY AS x (metric, day, value, idempotency_key, n)
     ORDER BY x.metric, x.idempotency_key, x.n
     ON CONFLICT DO NOTHING RETURNING metric, day, value, idempotency_key",
    &[Type::UUID, Type::TEXT_ARRAY, Type::DATE_ARRAY, Type::INT8_ARRAY, Type::TEXT_ARRAY],
);

// LIMIT keeps it at one look-up per key, whatever the planner thinks of the table.
static BY_KEYS: Statement = Statement::read(
    "usage.by_keys",
    "SELECT u.metric, u.day, u.value, u.idempotency_key
     FROM unnest($2, $3) AS x (metric, idempotency_key) CROSS JOIN LATERAL (
       SELECT * FROM {s}.usage u
       WHERE u.tenant_id = $1 AND u.metric = x.metric AND u.idempotency_key = x.idempotency_key LIMIT 1) u",
    &[Type::UUID, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
);

static BILLING_DAY: Statement = Statement::read(
    "usage.billing_day",
    "SELECT t.billing_day FROM {s}.tenants t WHERE t.id = $1",
    &[Type::UUID],
);

/// Of rows of `tenant_usage`, as far as a number goes. Rows that an owner has deleted by hand count as less than nothing on the
/// day of that row, and no day is less than nothing.
macro_rules! amount {
    () => {
        "GREATEST(LEAST(COALESCE(sum(value), 0), 9223372036854775807), 0)::bigint AS value,
         count(*) FILTER (WHERE pending) AS pending"
    };
}

static TOTAL: Statement = Statement::read(
    "usage.total",
    concat!(
        "SELECT ",
        amount!(),
        " FROM {s}.tenant_usage WHERE tenant_id = $1 AND metric = $2 AND day BETWEEN $3 AND $4"
    ),
    &[Type::UUID, Type::TEXT, Type::DATE, Type::DATE],
);

static DAYS: Statement = Statement::read(
    "usage.by_day",
    // A day whose amounts were all 0 is there; one of whose events nothing is left is not.
    concat!(
        "SELECT day, ",
        amount!(),
        " FROM {s}.tenant_usage WHERE tenant_id = $1 AND metric = $2 AND day BETWEEN $3 AND $4
         GROUP BY day HAVING sum(value) > 0 OR $2 NOT IN ('signals', 'experiments') ORDER BY day"
    ),
    &[Type::UUID, Type::TEXT, Type::DATE, Type::DATE],
);
