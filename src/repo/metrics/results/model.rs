//! What results hold.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use chrono::{DateTime, NaiveDate, Utc};
use serde::Serialize;

use super::super::MetricCounts;
use crate::id::ExperimentId;
use crate::money::{Currency, Money};
use crate::repo::experiments::{AnalysisPlan, ExperimentStatus};
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
    /// What larger totals of users are taken for, if the plan [says so](AnalysisPlan::winsorise_at).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub winsorised_above: Option<f64>,
    /// The newest views, at most 10,000, of users who were randomised.
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
    /// The metric of the users whose window is over, with large totals taken for the percentile of the plan: what is judged, if
    /// the plan [says so](AnalysisPlan::winsorise_at).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub winsorised: Option<Sample>,
}

impl ArmResults {
    pub(crate) fn empty(phase: i32, variant: &str, price: Money, weight: u32) -> Self {
        let (variant, counts) = (variant.to_owned(), MetricCounts::default());
        ArmResults { phase, variant, price, weight, counts, days: Vec::new(), winsorised: None }
    }

    /// The users whose window is over: those who are judged. Their metric is the [winsorised](ArmResults::winsorised) one, if
    /// there is one.
    #[must_use]
    pub fn mature(&self) -> Cohort {
        let days = self.days.iter().filter(|day| day.is_mature);
        let all = days.fold(Cohort::default(), |mut all, day| {
            all += day.cohort;
            all
        });
        Cohort { metric: self.winsorised.unwrap_or(all.metric), ..all }
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

/// What a group of users brought until the end of the window after their assignment. What happened before it by the clock of whoever
/// reported it is in it as well.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[non_exhaustive]
pub struct Cohort {
    /// The plan's metric by user, those without a sale included: n, mean, and squares.
    pub metric: Sample,
    /// Users who bought.
    pub buyers: u64,
    /// Buyers who got money back, and did not lose it again to a reversed chargeback.
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
