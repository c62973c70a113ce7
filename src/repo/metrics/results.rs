//! The numbers of an experiment, by variant and phase, and by what users of each day brought within the window.

use std::collections::BTreeMap;
use std::iter;
use std::ops::AddAssign;

use chrono::{DateTime, NaiveDate, Utc};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{MetricCounts, Metrics};
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::{Currency, Money};
use crate::repo::experiments::{AnalysisPlan, Experiment, ExperimentStatus};
use crate::repo::row::Fields;
use crate::repo::variants::{FromJsonb, Variant};
use crate::scope::Statement;
use crate::stats::{Proportion, Sample};

/// The results of an experiment, as counted: what its [`Report`](crate::Report) is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Results {
    /// The experiment.
    pub experiment_id: ExperimentId,
    /// Its key.
    pub key: String,
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub status: ExperimentStatus,
    /// The variant that the others are compared with.
    pub baseline: String,
    /// The currency of all amounts that are numbers.
    pub currency: Currency,
    /// How they are judged.
    pub plan: AnalysisPlan,
    /// When they were read.
    pub as_of: DateTime<Utc>,
    /// When it was activated.
    pub start_date: Option<DateTime<Utc>>,
    /// When it was completed.
    pub end_date: Option<DateTime<Utc>>,
    /// Its arms by phase, in the experiment's order.
    pub arms: Vec<ArmResults>,
    /// Users who were not randomised, and are in no statistic, by the reason of their assignment: testers (`forced`),
    /// existing customers (`grandfathered`), buyers who were never shown a price (`late`), and so on; `outside` are sales to
    /// users who are not in the experiment.
    pub others: BTreeMap<String, MetricCounts>,
    /// Sales and renewals that were charged otherwise than quoted.
    pub quote_mismatches: u64,
    /// Users whose ledger entries are of two variants.
    pub crossovers: u64,
    /// Ledger entries in currencies that the plan has no exchange rate for: in no statistic.
    pub unconverted: u64,
    /// The newest views, at most 10,000.
    pub recent_views: RecentViews,
}

/// One variant in one phase: the randomised only.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ArmResults {
    /// The phase: weights and variants differ between them, so numbers of two are never pooled.
    pub phase: i32,
    /// The variant's name.
    pub variant: String,
    /// Its headline price in the phase.
    pub price: Money,
    /// Its weight in the phase.
    pub weight: u32,
    /// All that was counted until now, whatever the window.
    pub counts: MetricCounts,
    /// What users brought within the window, by the day (UTC) of their assignment.
    pub days: Vec<CohortDay>,
}

impl ArmResults {
    pub(crate) fn empty(phase: i32, variant: &str, price: Money, weight: u32) -> Self {
        let (variant, counts) = (variant.to_owned(), MetricCounts::default());
        ArmResults { phase, variant, price, weight, counts, days: Vec::new() }
    }

    /// The users whose window is over: those who are judged.
    #[must_use]
    pub fn mature(&self) -> Cohort {
        self.days.iter().filter(|day| day.is_mature).fold(Cohort::default(), |mut all, day| {
            all += day.cohort;
            all
        })
    }
}

/// The users of one day.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CohortDay {
    /// The day (UTC) of their assignment.
    pub day: NaiveDate,
    /// Whether the window of all of them is over.
    pub is_mature: bool,
    /// What they brought within the window, until now.
    pub cohort: Cohort,
}

/// What a group of users brought within the window after their assignment.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[non_exhaustive]
pub struct Cohort {
    /// The plan's metric by user, those without a sale included: n, mean, and squares.
    pub metric: Sample,
    /// Users who bought.
    pub buyers: u64,
    /// Buyers who got money back.
    pub refunded: u64,
    /// Sales.
    pub sales: u64,
    /// Renewals.
    pub renewals: u64,
    /// Refunds and chargebacks.
    pub refunds: u64,
    /// Net revenue in the experiment's currency, by the plan's exchange rates.
    pub revenue: f64,
}

impl Cohort {
    /// How many users.
    #[must_use]
    pub fn users(&self) -> u64 {
        self.metric.n()
    }

    /// Buyers of users.
    #[must_use]
    pub fn conversion(&self) -> Proportion {
        Proportion::of_users(self.buyers, self.users())
    }

    /// Of buyers, those who got money back.
    #[must_use]
    pub fn refund_rate(&self) -> Proportion {
        Proportion::of_users(self.refunded, self.buyers)
    }

    /// Net revenue by sale; `None` without a sale.
    #[must_use]
    pub fn average_order_value(&self) -> Option<f64> {
        (self.sales > 0).then(|| self.revenue / self.sales as f64)
    }
}

impl AddAssign for Cohort {
    fn add_assign(&mut self, other: Self) {
        self.metric = self.metric.merge(other.metric);
        self.buyers += other.buyers;
        self.refunded += other.refunded;
        self.sales += other.sales;
        self.renewals += other.renewals;
        self.refunds += other.refunds;
        self.revenue += other.revenue;
    }
}

/// Who looked lately: a person looks at a price some times, a program hundreds of times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct RecentViews {
    /// How many views were looked at.
    pub views: u64,
    /// How many users they are of.
    pub viewers: u64,
    /// How many users have more than 200 of them.
    pub suspects: u64,
    /// How many views those have.
    pub views_of_suspects: u64,
}

/// What a phase that is over was about.
#[derive(Deserialize)]
struct PastPhase {
    phase: i32,
    variants: Vec<Variant>,
}

impl Metrics<'_> {
    /// What the experiment has brought, by variant and phase. See [`report`](Metrics::report) for what it means.
    ///
    /// Counts cost the same however long the history is; what users brought within their window is read from the ledger, and
    /// costs what its buyers are.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// for arm in tenant.metrics().results(id).await?.arms {
    ///     let mature = arm.mature();
    ///     println!("{}: {} users, {:.2} each", arm.variant, mature.users(), mature.metric.mean());
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    pub async fn results(self, id: ExperimentId) -> Result<Results> {
        let (tenant, uuid) = (self.tenant(), id.uuid());
        let setup = self.scope.query_opt(&SETUP, &[&tenant, &uuid]).await?;
        let setup = setup.ok_or_else(|| Error::not_found("experiment"))?;
        let experiment = Experiment::from_row(&setup)?;
        let FromJsonb(past) = setup.field::<FromJsonb<Vec<PastPhase>>>("past_phases")?;
        let plan = &experiment.plan;
        let cohorts = self.cohorts(&experiment).await?;
        let counts = self.scope.query(&COUNTS, &[&tenant, &uuid]).await?;
        let views = self.scope.query_opt(&RECENT_VIEWS, &[&tenant, &uuid, &SUSPECT_VIEWS]).await?;

        let mut arms = Vec::new();
        let current = (experiment.phase, &experiment.variants);
        for (phase, variants) in past.iter().map(|p| (p.phase, &p.variants)).chain([current]) {
            let price = |of: &Variant| Money::stored(of.price, experiment.currency);
            arms.extend(variants.iter().map(|v| ArmResults::empty(phase, &v.name, price(v), v.weight)));
        }
        let mut results = Results {
            experiment_id: id,
            as_of: setup.field("as_of")?,
            quote_mismatches: 0,
            crossovers: 0,
            unconverted: 0,
            recent_views: views.map(|row| RecentViews::from_row(&row)).transpose()?.unwrap_or_default(),
            plan: plan.clone(),
            key: experiment.key,
            name: experiment.name,
            status: experiment.status,
            baseline: experiment.baseline,
            currency: experiment.currency,
            start_date: experiment.start_date,
            end_date: experiment.end_date,
            arms,
            others: BTreeMap::new(),
        };
        for row in &cohorts {
            results.add_cohort(row)?;
        }
        for row in &counts {
            let reason: &str = row.field("reason")?;
            let arm = results.arm(row.field("phase")?, row.field("variant")?);
            match arm {
                Some(arm) if reason == "randomised" => arm.counts.add(row)?,
                _ => results.others.entry(reason.to_owned()).or_default().add(row)?,
            }
        }
        self.fold_if_many(&counts).await?;
        Ok(results)
    }

    async fn cohorts(self, experiment: &Experiment) -> Result<Vec<Row>> {
        let plan = &experiment.plan;
        let hours = i32::from(plan.window_days) * 24;
        let own = (experiment.currency, Decimal::ONE);
        let rates = plan.exchange_rates.iter().map(|(currency, rate)| (*currency, *rate));
        let others = rates.filter(|(currency, _)| *currency != experiment.currency);
        // The experiment's own one first: the statement compares with that one.
        let (currencies, rates): (Vec<String>, Vec<Decimal>) =
            iter::once(own).chain(others).map(|(currency, rate)| (currency.code().to_owned(), rate)).unzip();
        let (items, costs, cost) = plan.costs();
        let (tenant, id) = (self.tenant(), experiment.id.uuid());
        self.scope.query(&COHORTS, &[&tenant, &id, &hours, &currencies, &rates, &items, &costs, &cost]).await
    }
}

impl Results {
    fn arm(&mut self, phase: i32, variant: &str) -> Option<&mut ArmResults> {
        self.arms.iter_mut().find(|arm| arm.phase == phase && arm.variant == variant)
    }

    fn add_cohort(&mut self, row: &Row) -> Result<()> {
        self.quote_mismatches += row.count("mismatches")?;
        self.crossovers += row.count("crossed")?;
        self.unconverted += row.count("unconverted")?;
        let (users, buyers) = (row.count("users")?, row.count("buyers")?);
        let cohort = Cohort {
            metric: Sample::from_sums(users, row.field("total")?, row.field("squares")?)
                .map_err(|_| Error::internal("a cohort has entries, and no users"))?,
            buyers: buyers.min(users),
            refunded: row.count("refunded")?,
            sales: row.count("sales")?,
            renewals: row.count("renewals")?,
            refunds: row.count("refunds")?,
            revenue: row.field("revenue")?,
        };
        let (day, is_mature) = (row.field("day")?, row.field("is_mature")?);
        if let Some(arm) = self.arm(row.field("phase")?, row.field("variant")?) {
            arm.days.push(CohortDay { day, is_mature, cohort });
        }
        Ok(())
    }
}

impl RecentViews {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(RecentViews {
            views: row.count("views")?,
            viewers: row.count("viewers")?,
            suspects: row.count("suspects")?,
            views_of_suspects: row.count("views_of_suspects")?,
        })
    }
}

/// More than a person looks, among 10,000 views of an experiment.
const SUSPECT_VIEWS: i64 = 200;

pub(super) const STATEMENTS: &[&Statement] = &[&SETUP, &COUNTS, &COHORTS, &RECENT_VIEWS];

static SETUP: Statement = Statement::read(
    "results.setup",
    concat!(
        "SELECT ",
        crate::repo::experiments::columns!(),
        ", past_phases, now() AS as_of FROM {s}.experiments WHERE tenant_id = $1 AND id = $2"
    ),
    &[Type::UUID, Type::UUID],
);

static COUNTS: Statement = Statement::read(
    "results.counts",
    "SELECT phase, variant, reason, currency, sum(assignments)::bigint AS assignments, sum(views)::bigint AS views,
            sum(conversions)::bigint AS conversions, sum(renewals)::bigint AS renewals, sum(refunds)::bigint AS refunds,
            sum(revenue) AS revenue, sum(pending)::bigint AS pending
     FROM (SELECT phase, variant, reason, currency, assignments, views, conversions, renewals, refunds, revenue, 0 AS pending
           FROM {s}.metric_totals WHERE tenant_id = $1 AND experiment_id = $2
           UNION ALL
           SELECT phase, variant, reason, currency, assignments, views, conversions, renewals, refunds, revenue, 1
           FROM {s}.metric_deltas WHERE tenant_id = $1 AND experiment_id = $2) live
     GROUP BY phase, variant, reason, currency",
    &[Type::UUID, Type::UUID],
);

// By user first: what counts is what a user brought. Users who brought nothing are known by how many were assigned that day, so
// that nothing reads one row for each of them. Hours, since a day of an interval may be one of 23 hours. Sums are exact until
// the end: in whatever order entries came, the numbers are the same.
//
// What it costs is what is done for each entry and buyer, so: entries come out of the index in the order of users, and nothing is
// sorted or kept (ORDER BY also keeps what is made of an entry from being made for each use of it); what is the same for all is
// looked up once (plan); most entries are in the experiment's own currency, and most plans know no cost. UTC is an interval,
// since the name of a time zone is looked up each time.
static COHORTS: Statement = Statement::read(
    "results.cohorts",
    "WITH plan AS (
       SELECT make_interval(hours => $3) AS window_length, $4[1] AS currency, $8 <> 0 OR cardinality($6) > 0 AS has_costs
     ), ledger AS (
       SELECT c.user_id, c.phase, c.variant, c.kind, c.quote_mismatch, c.assigned_at,
              c.occurred_at < c.assigned_at + (SELECT window_length FROM plan) AS counts,
              CASE WHEN c.currency = (SELECT currency FROM plan) THEN c.revenue
                   ELSE c.revenue * $5[array_position($4, c.currency)] END AS revenue,
              CASE WHEN (SELECT has_costs FROM plan) AND c.kind IN ('sale', 'renewal')
                   THEN c.quantity * COALESCE($7[array_position($6, c.item)], $8) END AS cost
       FROM {s}.conversions c
       WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.reason = 'randomised' ORDER BY c.user_id
     ), by_user AS (
       SELECT min(phase) AS phase, min(variant COLLATE \"C\") AS variant, max(variant COLLATE \"C\") AS other,
              (min(assigned_at) AT TIME ZONE interval '0')::date AS day,
              sum(CASE WHEN cost IS NULL THEN revenue ELSE revenue - cost END) FILTER (WHERE counts) AS total,
              sum(revenue) FILTER (WHERE (SELECT has_costs FROM plan) AND counts) AS revenue,
              count(*) FILTER (WHERE counts AND kind = 'sale') AS sales,
              count(*) FILTER (WHERE counts AND kind = 'renewal') AS renewals,
              count(*) FILTER (WHERE counts AND kind IN ('refund', 'chargeback')) AS refunds,
              count(*) FILTER (WHERE quote_mismatch) AS mismatches, count(*) FILTER (WHERE revenue IS NULL) AS unconverted
       FROM ledger GROUP BY user_id
     ), brought AS (
       SELECT phase, variant COLLATE \"default\" AS variant, day, sum(total) AS total, sum(total * total) AS squares,
              CASE WHEN (SELECT has_costs FROM plan) THEN sum(revenue) ELSE sum(total) END AS revenue,
              count(*) FILTER (WHERE sales > 0) AS buyers, count(*) FILTER (WHERE sales > 0 AND refunds > 0) AS refunded,
              sum(sales) AS sales, sum(renewals) AS renewals, sum(refunds) AS refunds, sum(mismatches) AS mismatches,
              sum(unconverted) AS unconverted, count(*) FILTER (WHERE variant <> other) AS crossed
       FROM by_user GROUP BY phase, variant, day
     ), assigned AS (
       SELECT phase, variant, day, sum(assignments) AS users
       FROM (SELECT phase, variant, day, assignments FROM {s}.metric_totals
             WHERE tenant_id = $1 AND experiment_id = $2 AND reason = 'randomised' AND currency = 'XXX'
             UNION ALL
             SELECT phase, variant, day, assignments FROM {s}.metric_deltas
             WHERE tenant_id = $1 AND experiment_id = $2 AND reason = 'randomised' AND currency = 'XXX') live
       GROUP BY phase, variant, day HAVING sum(assignments) > 0
     )
     SELECT phase, variant, day, (day + 1)::timestamp AT TIME ZONE 'UTC' + make_interval(hours => $3) <= now() AS is_mature,
            COALESCE(users, 0)::bigint AS users, COALESCE(total, 0)::float8 AS total, COALESCE(squares, 0)::float8 AS squares,
            COALESCE(revenue, 0)::float8 AS revenue, COALESCE(buyers, 0) AS buyers, COALESCE(refunded, 0) AS refunded,
            COALESCE(sales, 0)::bigint AS sales, COALESCE(renewals, 0)::bigint AS renewals, COALESCE(refunds, 0)::bigint AS refunds,
            COALESCE(mismatches, 0)::bigint AS mismatches, COALESCE(unconverted, 0)::bigint AS unconverted,
            COALESCE(crossed, 0) AS crossed
     FROM assigned LEFT JOIN brought USING (phase, variant, day)
     ORDER BY day, phase, variant",
    &[
        Type::UUID,
        Type::UUID,
        Type::INT4,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::NUMERIC,
    ],
);

// The newest only: what it costs does not grow.
static RECENT_VIEWS: Statement = Statement::read(
    "results.recent_views",
    "SELECT COALESCE(sum(n), 0)::bigint AS views, count(*) AS viewers, count(*) FILTER (WHERE n > $3) AS suspects,
            COALESCE(sum(n) FILTER (WHERE n > $3), 0)::bigint AS views_of_suspects
     FROM (SELECT user_id, count(*) AS n
           FROM (SELECT user_id FROM {s}.views WHERE tenant_id = $1 AND experiment_id = $2
                 ORDER BY tenant_id DESC, experiment_id DESC, occurred_at DESC LIMIT 10000) newest
           GROUP BY user_id) by_user",
    &[Type::UUID, Type::UUID, Type::INT8],
);
