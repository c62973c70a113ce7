//! What a plan allows, how much of it is used, and taking from it.

use chrono::{DateTime, NaiveDate, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{MAX_AMOUNT, Usage, check_metric, check_not_metered};
use crate::error::{Error, ErrorKind, ExceededQuota, Result};
use crate::id::IdempotencyKey;
use crate::repo::row::{Fields, text_enum};
use crate::scope::Statement;

/// The metric of how many experiments are active now. What limits it is looked at by
/// [`activate`](crate::Experiments::activate) and [`resume`](crate::Experiments::resume).
pub(crate) const ACTIVE_EXPERIMENTS: &str = "active_experiments";

text_enum! {
    /// For how long a limit is, before what was used counts as nothing again.
    LimitPeriod, "period" {
        /// A day, in UTC.
        Day = "day",
        /// A billing period of the tenant's: a month, by default the calendar's, in UTC.
        Month = "month",
        /// For good.
        Ever = "ever",
    }
}

/// A limit, and how much of it is used.
///
/// ```no_run
/// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
/// let quota = tenant.usage().check_quota("signals").await?;
/// if quota.remaining() == Some(0) {
///     println!("no signals until {:?}", quota.resets_at);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// What is limited.
    pub metric: String,
    /// How much is allowed in a period; `None` is unlimited.
    pub limit: Option<u64>,
    /// How much was used in the current period. It may be more than the limit: what is [added](Usage::add), or metered by
    /// itself, is never refused.
    pub used: u64,
    /// How long a period is.
    pub period: LimitPeriod,
    /// The first day of the current period, in UTC; `None` for [`LimitPeriod::Ever`].
    pub first_day: Option<NaiveDate>,
    /// When the current period ends, and nothing is used again; `None` for [`LimitPeriod::Ever`].
    pub resets_at: Option<DateTime<Utc>>,
    /// What was asked for, where that was too much.
    refused: u64,
}

impl Quota {
    /// How much is left; `None` is unlimited.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.used))
    }

    /// The error that says that so much of it was asked for in vain.
    pub(crate) fn exceeded(self, requested: u64) -> Error {
        Error::quota_exceeded(ExceededQuota {
            requested,
            limit: self.limit.unwrap_or(u64::MAX),
            metric: self.metric,
            used: self.used,
            resets_at: self.resets_at,
        })
    }

    fn from_row(row: &Row, metric: &str) -> Result<Self> {
        let limit = row.field::<Option<i64>>("quota")?.map(|_| row.count("quota")).transpose()?;
        Ok(Quota {
            metric: metric.to_owned(),
            limit,
            used: row.count("used")?,
            period: LimitPeriod::stored(row.field("period")?)?,
            first_day: row.field("first_day")?,
            resets_at: row.field("resets_at")?,
            refused: 0,
        })
    }
}

/// What became of an amount that was to be taken from a quota. Each has the quota as it is after that.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "the amount may not have been consumed"]
pub enum ConsumeOutcome {
    /// It was taken.
    Consumed(Quota),
    /// It was taken, or [added](Usage::add), before under the same key: nothing was taken now.
    Duplicate {
        /// The quota as it is now.
        quota: Quota,
        /// The day, in UTC, of which it was taken: it may be of an earlier period than `quota` is.
        day: NaiveDate,
    },
    /// There is not that much left: nothing was taken.
    Exceeded(Quota),
}

impl ConsumeOutcome {
    /// The quota, whatever became of the amount.
    #[must_use]
    pub fn quota(&self) -> &Quota {
        match self {
            ConsumeOutcome::Consumed(quota)
            | ConsumeOutcome::Duplicate { quota, .. }
            | ConsumeOutcome::Exceeded(quota) => quota,
        }
    }

    /// The quota if the amount was taken, now or before.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let key = lastprice::IdempotencyKey::new("request-4711 at 2026-01-31T12:00:07Z")?;
    /// let left = tenant.usage().try_consume("api_calls", 1, &key).await?.into_result()?.remaining();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`QuotaExceeded`](crate::ErrorKind::QuotaExceeded), with the numbers in
    /// [`Error::exceeded_quota`](crate::Error::exceeded_quota).
    pub fn into_result(self) -> Result<Quota> {
        match self {
            ConsumeOutcome::Consumed(quota) | ConsumeOutcome::Duplicate { quota, .. } => Ok(quota),
            ConsumeOutcome::Exceeded(quota) => {
                let requested = quota.refused;
                Err(quota.exceeded(requested))
            }
        }
    }
}

impl Usage<'_> {
    /// How much of a metric is allowed and used, now. What limits a tenant is a limit of its own, or else one of its plan,
    /// or else a built-in one; without any it is unlimited: see [`AdminLimits`](crate::AdminLimits).
    ///
    /// A metric is whatever it is called: one that is misspelt has no limit, hence is unlimited, and nothing says so.
    ///
    /// Of `active_experiments` the number of active experiments counts; of any other metric what [`total`](Usage::total) counts.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let left = tenant.usage().check_quota("signals").await?.remaining();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn check_quota(self, metric: &str) -> Result<Quota> {
        check_metric(metric)?;
        let row = self.scope.query_opt(&QUOTA, &[&self.tenant(), &metric]).await?;
        let row = row.ok_or_else(|| Error::not_found("tenant"))?;
        self.fold_if_many(row.field("pending")?).await;
        Quota::from_row(&row, metric)
    }

    /// Takes an amount of today from a quota, if that much is left; once for a key, which counts for the metric, as that of
    /// [`NewUsage`](crate::NewUsage). An amount is 1 to 10¹². A metric that is misspelt has no limit, and everything is taken of it.
    ///
    /// A key names one use, for good: the same one again is [`Duplicate`](ConsumeOutcome::Duplicate) and takes nothing, also in a later
    /// period, whose quota it would be free of. So put into it what makes the use one: the id of the request, or an object's with its
    /// time, and not an object's alone that is used again next month.
    ///
    /// Exact: who takes of the same limited metric of the same tenant waits for who did before, until that one's transaction has
    /// ended, and a second at the most. By itself that is at once; in a transaction, the host's as well, when that is committed: take
    /// late in it. An unlimited metric makes nobody wait. What is [added](Usage::add) counts, but waits for nobody and is never
    /// refused.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// use lastprice::{ConsumeOutcome, IdempotencyKey};
    /// let key = IdempotencyKey::new("export of shop-7 at 2026-01-31T12:00:07Z")?; // this export, not any of that shop
    /// match tenant.usage().try_consume("exports", 1, &key).await? {
    ///     ConsumeOutcome::Exceeded(quota) => println!("wait until {:?}", quota.resets_at),
    ///     taken => println!("{:?} are left", taken.quota().remaining()),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric or the amount,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the key stands for another amount, or if the host's transaction is not
    /// `READ COMMITTED`; [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if another transaction has been taking of the metric for a second: nothing was
    /// taken, and trying again is safe. That too little is left is an outcome. None of these ends a host's transaction.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`](crate::TenantScope). Taking again with the same key counts once.
    pub async fn try_consume(
        self,
        metric: &str,
        amount: u64,
        key: &IdempotencyKey,
    ) -> Result<ConsumeOutcome> {
        check_metric(metric)?;
        check_not_metered(metric)?;
        if amount == 0 || amount > MAX_AMOUNT {
            return Err(Error::invalid("amount", "is not between 1 and 10^12"));
        }
        let (tenant, value) = (self.tenant(), amount as i64);
        let row = self.scope.query_opt(&CONSUME, &[&tenant, &metric, &value, &key.as_str()]).await?;
        let row = row.ok_or_else(|| Error::not_found("tenant"))?;
        let outcome = row.field("outcome")?;
        match outcome {
            "busy" => {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "another transaction is taking of the quota and has not ended: nothing was taken",
                ));
            }
            "isolation" => {
                return Err(Error::conflict(
                    "the host's transaction is not READ COMMITTED: it does not see what others take of the quota",
                ));
            }
            _ => {}
        }
        self.fold_if_many(row.field("pending")?).await;
        let quota = Quota::from_row(&row, metric)?;
        match outcome {
            "consumed" => Ok(ConsumeOutcome::Consumed(quota)),
            "exceeded" => Ok(ConsumeOutcome::Exceeded(Quota { refused: amount, ..quota })),
            "duplicate" if row.field::<i64>("standing")? == value => {
                Ok(ConsumeOutcome::Duplicate { quota, day: row.field("standing_day")? })
            }
            "duplicate" => {
                Err(Error::conflict("the idempotency key stands for another amount")
                    .with_fields(vec!["amount"]))
            }
            _ => Err(Error::internal("an outcome is none that this release knows")),
        }
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&QUOTA, &CONSUME];

static QUOTA: Statement = Statement::read(
    "usage.quota",
    "SELECT q.quota, q.period, q.used, q.first_day, q.resets_at, q.pending
     FROM {s}.tenants t CROSS JOIN LATERAL {s}.usage_quota(t.id, $2) q WHERE t.id = $1",
    &[Type::UUID, Type::TEXT],
);

// One call, so that the lock in it is held for no round trip.
static CONSUME: Statement = Statement::write(
    "usage.consume",
    "SELECT c.outcome, c.standing, c.standing_day, c.quota, c.period, c.used, c.first_day, c.resets_at, c.pending
     FROM {s}.tenants t CROSS JOIN LATERAL {s}.consume_usage(t.id, $2, $3, $4) c WHERE t.id = $1",
    &[Type::UUID, Type::TEXT, Type::INT8, Type::TEXT],
);
