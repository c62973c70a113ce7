//! The numbers of an experiment, by variant and phase, and by what users of each day brought within the window.

mod model;
mod sql;

use std::collections::BTreeMap;
use std::iter;

use rust_decimal::Decimal;
use serde::Deserialize;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::Metrics;
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::Money;
use crate::repo::experiments::Experiment;
use crate::repo::row::Fields;
use crate::repo::variants::{FromJsonb, Variant};
use crate::stats::{self, Sample, Totals};
pub use model::{ArmResults, Cohort, CohortDay, RecentViews, Results};
pub(super) use sql::STATEMENTS;
pub(crate) use sql::recent_views;
use sql::{COHORTS, COUNTS, RECENT_VIEWS, SETUP, TOTALS};

/// More than a person looks, among 10,000 views of an experiment.
pub(crate) const SUSPECT_VIEWS: i64 = 200;

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
        let results = self.read_results(id).await?;
        // Randomised, and of no arm: a phase began between two of the statements. Now it is known.
        if results.others.contains_key("randomised") { self.read_results(id).await } else { Ok(results) }
    }

    async fn read_results(self, id: ExperimentId) -> Result<Results> {
        let (tenant, uuid) = (self.tenant(), id.uuid());
        let setup = self.scope.query_opt(&SETUP, &[&tenant, &uuid]).await?;
        let setup = setup.ok_or_else(|| Error::not_found("experiment"))?;
        let experiment = Experiment::from_row(&setup)?;
        let FromJsonb(past) = setup.field::<FromJsonb<Vec<PastPhase>>>("past_phases")?;
        let plan = &experiment.plan;
        let parameters = Parameters::of(self.tenant(), &experiment);
        let cohorts = self.scope.query(&COHORTS, &parameters.all()).await?;
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
            winsorised_above: None,
            plan: plan.clone(),
            key: experiment.key.clone(),
            name: experiment.name.clone(),
            status: experiment.status,
            baseline: experiment.baseline.clone(),
            currency: experiment.currency,
            start_date: experiment.start_date,
            end_date: experiment.end_date,
            arms,
            others: BTreeMap::new(),
        };
        for row in &cohorts {
            results.add_cohort(row)?;
        }
        self.winsorise(&mut results, &parameters).await?;
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

    /// Takes large totals of users for the percentile of the plan, of all users whose window is over.
    async fn winsorise(self, results: &mut Results, parameters: &Parameters<'_>) -> Result<()> {
        let Some(percentile) = results.plan.winsorise_at else { return Ok(()) };
        let days = results.arms.iter().flat_map(|arm| &arm.days).filter(|day| day.is_mature);
        let Some(until) = days.map(|day| day.day).max() else { return Ok(()) };
        let mut params = parameters.all().to_vec();
        params.push(&until);
        let rows = self.scope.query(&TOTALS, &params).await?;
        let mut totals =
            results.arms.iter().map(|arm| (arm.mature().users(), Vec::<f64>::new())).collect::<Vec<_>>();
        for row in &rows {
            let (phase, variant) = (row.field::<i32>("phase")?, row.field::<&str>("variant")?);
            let arms = results.arms.iter().zip(&mut totals);
            for (_, (users, of_arm)) in arms.filter(|(arm, _)| arm.phase == phase && arm.variant == variant) {
                *of_arm = row.field("totals")?;
                // A sale of a user who was never assigned is written by hand only.
                of_arm.truncate(usize::try_from(*users).unwrap_or(usize::MAX));
            }
        }
        let totals: Vec<_> =
            totals.into_iter().map(|(users, of_arm)| Totals::new(users, of_arm)).collect::<Result<_>>()?;
        let winsorised = stats::winsorise(&totals, 0.0, percentile)?;
        results.winsorised_above = Some(winsorised.limits.high);
        for (arm, sample) in results.arms.iter_mut().zip(winsorised.samples) {
            arm.winsorised = Some(sample);
        }
        Ok(())
    }
}

/// What the statements are told of an experiment and its plan.
struct Parameters<'e> {
    tenant: Uuid,
    id: Uuid,
    hours: i32,
    currencies: Vec<String>,
    rates: Vec<Decimal>,
    items: Vec<&'e str>,
    costs: Vec<Decimal>,
    cost: Decimal,
}

impl<'e> Parameters<'e> {
    fn of(tenant: Uuid, experiment: &'e Experiment) -> Self {
        let plan = &experiment.plan;
        let own = (experiment.currency, Decimal::ONE);
        let rates = plan.exchange_rates.iter().map(|(currency, rate)| (*currency, *rate));
        let others = rates.filter(|(currency, _)| *currency != experiment.currency);
        // The experiment's own one first: the statement compares with that one.
        let (currencies, rates) =
            iter::once(own).chain(others).map(|(currency, rate)| (currency.code().to_owned(), rate)).unzip();
        let (items, costs, cost) = plan.costs();
        let (id, hours) = (experiment.id.uuid(), i32::from(plan.window_days) * 24);
        Parameters { tenant, id, hours, currencies, rates, items, costs, cost }
    }

    fn all(&self) -> [&(dyn ToSql + Sync); 8] {
        let Parameters { tenant, id, hours, currencies, rates, items, costs, cost } = self;
        [tenant, id, hours, currencies, rates, items, costs, cost]
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
