mod counts;
mod results;

use std::sync::Arc;

use chrono::{DateTime, NaiveDate, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

pub use self::counts::{CurrencySales, MetricCounts};
pub use self::results::{ArmResults, Cohort, CohortDay, RecentViews, Results};
pub(crate) use self::results::{SUSPECT_VIEWS, recent_views};
use super::experiments::ExperimentStatus;
use super::page::{Cursor, Page, rows_for};
use super::row::{Fields, rules};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, TenantId};
use crate::money::Money;
use crate::scope::{Session, Statement, TenantHandle, TenantScope};

/// A reader that meets this many pending deltas folds them into the totals.
const FOLD_AT: i64 = 1000;

/// As many rows of usage as `fold_usage` takes at once: when so many were moved, more may wait.
pub(crate) const FULL_FOLD: u64 = 50_000;

/// Folds a tenant's in the background of a client, until less is left than a fold takes.
pub(crate) async fn fold_all(session: Arc<Session>, tenant: TenantId) {
    let handle = TenantHandle::new(Arc::clone(&session), tenant);
    loop {
        match session.in_time(1, handle.metrics().fold()).await {
            Ok(moved) if moved >= FULL_FOLD => {}
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(%error, "pending deltas were not folded");
                return;
            }
        }
    }
}

/// The numbers of one variant.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct VariantMetrics {
    /// The variant's name.
    pub variant: String,
    /// Its numbers.
    pub counts: MetricCounts,
}

/// The numbers of one variant on one day.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DayMetrics {
    /// The day, in UTC, on which it happened.
    pub day: NaiveDate,
    /// The variant's name.
    pub variant: String,
    /// Its numbers.
    pub counts: MetricCounts,
}

/// The numbers of an experiment at the last refresh: a row of `experiment_metrics`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ExperimentSummary {
    /// The experiment.
    pub experiment_id: ExperimentId,
    /// Its key.
    pub key: String,
    /// Its name.
    pub name: String,
    /// Its status then.
    pub status: ExperimentStatus,
    /// Users who were assigned.
    pub assignments: u64,
    /// Views.
    pub views: u64,
    /// Sales, in any currency.
    pub conversions: u64,
    /// Net revenue in the experiment's currency; others are left out.
    pub revenue: Money,
    /// When the numbers were refreshed.
    pub refreshed_at: DateTime<Utc>,
}

/// Exact numbers: live ones cost the same however long the history is.
///
/// With a [replica](crate::ClientBuilder::replica), each call alone is answered there, as of some moments ago; calls of a
/// [`fresh`](crate::TenantHandle::fresh) handle and of a transaction are not. What is asked of a replica and is not there yet, such as
/// an experiment that is new, is asked of the primary.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Metrics<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Metrics<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Metrics { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// The live numbers of an experiment.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let revenue = tenant.metrics().experiment(id).await?.revenue(lastprice::Currency::USD);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    pub async fn experiment(self, id: ExperimentId) -> Result<MetricCounts> {
        let mut all = MetricCounts::default();
        for variant in self.by_variant(id).await? {
            all.add_all(&variant.counts)?;
        }
        Ok(all)
    }

    /// The live numbers of each variant, in the experiment's order; variants without users are there with zeros.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// for v in tenant.metrics().by_variant(id).await? {
    ///     println!("{}: {} of {} bought", v.variant, v.counts.conversions, v.counts.assignments);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    pub async fn by_variant(self, id: ExperimentId) -> Result<Vec<VariantMetrics>> {
        let groups = self.scope.query(&BY_VARIANT, &[&self.tenant(), &id.uuid()]).await?;
        if groups.is_empty() {
            return Err(Error::not_found("experiment"));
        }
        let mut variants: Vec<VariantMetrics> = Vec::new();
        for group in &groups {
            let name: &str = group.field("variant")?;
            if variants.last().is_none_or(|last| last.variant != name) {
                variants.push(VariantMetrics { variant: name.to_owned(), counts: MetricCounts::default() });
            }
            if let Some(last) = variants.last_mut() {
                last.counts.add(group)?;
            }
        }
        self.fold_if_many(&groups).await?;
        Ok(variants)
    }

    /// The live numbers by day (UTC) and variant, from one day to another, both included; days and variants
    /// without events are left out. At most 400 days.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, from: chrono::NaiveDate, to: chrono::NaiveDate) -> lastprice::Result<()> {
    /// let days = tenant.metrics().by_day(id, from, to).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a range of more than 400 days, or out of the years 1970 to
    /// 9999.
    pub async fn by_day(self, id: ExperimentId, from: NaiveDate, to: NaiveDate) -> Result<Vec<DayMetrics>> {
        rules::day("from", from)?;
        rules::day("to", to)?;
        if (to - from).num_days() >= 400 {
            return Err(Error::invalid("to", "is more than 400 days after `from`"));
        }
        let groups = self.scope.query(&BY_DAY, &[&self.tenant(), &id.uuid(), &from, &to]).await?;
        let mut days: Vec<DayMetrics> = Vec::new();
        for group in &groups {
            let (day, name): (NaiveDate, &str) = (group.field("day")?, group.field("variant")?);
            if days.last().is_none_or(|last| last.day != day || last.variant != name) {
                days.push(DayMetrics { day, variant: name.to_owned(), counts: MetricCounts::default() });
            }
            if let Some(last) = days.last_mut() {
                last.counts.add(group)?;
            }
        }
        self.fold_if_many(&groups).await?;
        Ok(days)
    }

    /// All experiments as of the last refresh, by id; at most 1000 a page. See
    /// [`Admin::refresh_metrics`](crate::Admin::refresh_metrics).
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let page = tenant.metrics().refreshed(100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn refreshed(self, limit: u32, after: Option<Cursor>) -> Result<Page<ExperimentSummary>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&REFRESHED, &[&self.tenant(), &after, &rows]).await?;
        let summary = |row: &Row| {
            Ok(ExperimentSummary {
                experiment_id: row.id("experiment_id")?,
                key: row.field("key")?,
                name: row.field("name")?,
                status: ExperimentStatus::stored(row.field("status")?)?,
                assignments: row.count("assignments")?,
                views: row.count("views")?,
                conversions: row.count("conversions")?,
                revenue: row.money("revenue", "currency")?,
                refreshed_at: row.field("refreshed_at")?,
            })
        };
        let items = rows.iter().map(summary).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |s: &ExperimentSummary| s.experiment_id.uuid()))
    }

    /// Moves pending deltas, and [usage](crate::Usage), into totals. Readers do it by themselves when many are pending; the numbers do not change.
    ///
    /// Returns how many were moved, deltas and reports of usage: 0 also while somebody else is folding. Of reports it is 50,000
    /// at the most, so that no call takes long; the rest is the next one's.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let moved = tenant.metrics().fold().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn fold(self) -> Result<u64> {
        let row = self.scope.query_opt(&FOLD, &[]).await?;
        row.ok_or_else(|| Error::internal("a function has no row"))?.count("folded")
    }

    /// In a longer transaction the fold would be held back until it ends, and keep others from folding. That it fails
    /// (on a standby, say) is no reason to withhold numbers that were read.
    async fn fold_if_many(self, groups: &[Row]) -> Result<()> {
        self.fold_if_pending(groups.iter().map(|g| g.field::<i64>("pending")).sum::<Result<_>>()?).await;
        Ok(())
    }

    pub(super) async fn fold_if_pending(self, pending: i64) {
        if pending >= FOLD_AT
            && self.scope.is_one_shot()
            && let Err(error) = self.fold().await
        {
            tracing::debug!(%error, "pending deltas were not folded");
        }
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&BY_VARIANT, &BY_DAY, &REFRESHED, &FOLD];
pub(super) const RESULTS_STATEMENTS: &[&Statement] = results::STATEMENTS;

// Live = totals + pending deltas, in one statement, hence one snapshot.
static BY_VARIANT: Statement = Statement::report(
    "metrics.by_variant",
    "WITH counted AS (
       SELECT variant, currency, sum(assignments)::bigint AS assignments, sum(views)::bigint AS views,
              sum(conversions)::bigint AS conversions, sum(renewals)::bigint AS renewals,
              sum(refunds)::bigint AS refunds, sum(revenue) AS revenue, sum(pending)::bigint AS pending
       FROM (SELECT variant, currency, assignments, views, conversions, renewals, refunds, revenue, 0 AS pending
             FROM {s}.metric_totals WHERE tenant_id = $1 AND experiment_id = $2 AND reason <> 'outside'
             UNION ALL
             SELECT variant, currency, assignments, views, conversions, renewals, refunds, revenue, 1
             FROM {s}.metric_deltas WHERE tenant_id = $1 AND experiment_id = $2 AND reason <> 'outside') live
       GROUP BY variant, currency
     ), variants AS (
       SELECT v ->> 'name' AS variant, ordinality
       FROM {s}.experiments e, jsonb_array_elements(e.variants) WITH ORDINALITY AS v (v, ordinality)
       WHERE e.tenant_id = $1 AND e.id = $2
     )
     SELECT variant, currency, assignments, views, conversions, renewals, refunds, revenue, COALESCE(pending, 0) AS pending
     FROM variants FULL JOIN counted USING (variant)
     ORDER BY ordinality, variant, currency",
    &[Type::UUID, Type::UUID],
);

static BY_DAY: Statement = Statement::report(
    "metrics.by_day",
    "SELECT day, variant, currency, sum(assignments)::bigint AS assignments, sum(views)::bigint AS views,
            sum(conversions)::bigint AS conversions, sum(renewals)::bigint AS renewals,
              sum(refunds)::bigint AS refunds, sum(revenue) AS revenue, sum(pending)::bigint AS pending
     FROM (SELECT day, variant, currency, assignments, views, conversions, renewals, refunds, revenue, 0 AS pending
           FROM {s}.metric_totals
           WHERE tenant_id = $1 AND experiment_id = $2 AND day BETWEEN $3 AND $4 AND reason <> 'outside'
           UNION ALL
           SELECT day, variant, currency, assignments, views, conversions, renewals, refunds, revenue, 1
           FROM {s}.metric_deltas
           WHERE tenant_id = $1 AND experiment_id = $2 AND day BETWEEN $3 AND $4 AND reason <> 'outside') live
     GROUP BY day, variant, currency ORDER BY day, variant, currency",
    &[Type::UUID, Type::UUID, Type::DATE, Type::DATE],
);

static REFRESHED: Statement = Statement::report(
    "metrics.refreshed",
    "SELECT experiment_id, key, name, status, currency, assignments, views, conversions, revenue, refreshed_at
     FROM {s}.tenant_experiment_metrics WHERE tenant_id = $1 AND experiment_id >= $2
     ORDER BY tenant_id, experiment_id LIMIT $3",
    &[Type::UUID, Type::UUID, Type::INT8],
);

static FOLD: Statement =
    Statement::write("metrics.fold", "SELECT {s}.fold_experiment_metrics() AS folded", &[]);
