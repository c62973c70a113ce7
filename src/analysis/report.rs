//! All that is to be said of an experiment, in sentences.

use chrono::NaiveDate;
use serde::Serialize;

use super::compare::{Chance, Comparison, Estimated, at_the_horizon, baseline, chances, compare};
use super::health::{Finding, Severity, findings};
use super::prices::{PriceAnalysis, analyse};
use super::verdict::{Verdict, verdict};
use crate::error::Result;
use crate::repo::{Cohort, DecisionRule, Results};
use crate::stats::{Alpha, Effect, Estimate, Interval, PowerAnalysis};

/// What an experiment has shown: a verdict, what it rests on, and what stands in its way.
///
/// Its [`Display`](std::fmt::Display) is for people, its [`Serialize`] for programs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What to do, by the rule of the plan.
    pub verdict: Verdict,
    /// What is not as it should be, the serious first.
    pub findings: Vec<Finding>,
    /// Each variant against the baseline.
    pub comparisons: Vec<Comparison>,
    /// Which arm is the best, with what probability. Not protected against peeking.
    pub chances: Estimated<Vec<Chance>>,
    /// How many users per arm it takes to find the plan's minimum effect in four of five experiments, as far as is known.
    pub users_needed: Option<u64>,
    /// What the prices tell; `None` without a variant.
    pub prices: Option<PriceAnalysis>,
    /// The metric per user, day by day.
    pub daily: Vec<DailyMean>,
    /// The numbers that all of it is made of.
    pub results: Results,
}

/// The metric per user of an arm, of all users until a day of assignment whose window is over.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DailyMean {
    /// The phase.
    pub phase: i32,
    /// The variant.
    pub variant: String,
    /// The day (UTC) of the last assignment that is in it.
    pub day: NaiveDate,
    /// How many users.
    pub users: u64,
    /// Their mean.
    pub mean: f64,
    /// Where the mean lies, by a confidence sequence: all days together.
    pub interval: Option<Interval>,
}

impl Report {
    /// The report on results.
    ///
    /// ```no_run
    /// # fn f(results: lastprice::Results) -> lastprice::Result<()> {
    /// let report = lastprice::Report::of(results)?;
    /// println!("{}: {report}", report.verdict);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a plan that breaks its own rules: one that was written by SQL.
    pub fn of(results: Results) -> Result<Self> {
        results.plan.check(Some(results.currency))?;
        let alpha = Alpha::new(results.plan.alpha)?;
        let judged = at_the_horizon(&results);
        let comparisons = compare(&judged, alpha);
        let chances = chances(&judged);
        let findings = findings(&results, &comparisons, alpha);
        Ok(Report {
            verdict: verdict(&judged, &comparisons, &chances, &findings),
            users_needed: users_needed(&judged, alpha, comparisons.len()),
            prices: analyse(&judged, alpha),
            daily: daily(&results, alpha),
            findings,
            comparisons,
            chances,
            results,
        })
    }

    /// The effect that the plan's rule looks at: by a confidence sequence, or at the planned look.
    ///
    /// # Errors
    ///
    /// What the comparison has in its place.
    pub fn deciding(&self, comparison: &Comparison) -> Estimated<Effect> {
        match self.results.plan.rule {
            DecisionRule::FixedHorizon => comparison.planned,
            _ => comparison.difference,
        }
    }

    pub(super) fn alpha(&self) -> Alpha {
        Alpha::new(self.results.plan.alpha).unwrap_or_default()
    }

    /// Whether nothing stands in the way of a verdict.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity < Severity::Blocking)
    }
}

fn users_needed(results: &Results, alpha: Alpha, comparisons: usize) -> Option<u64> {
    let each = alpha.shared_by(u32::try_from(comparisons).ok()?);
    let power = match results.plan.rule {
        DecisionRule::FixedHorizon => PowerAnalysis::fixed_horizon(each, 0.8),
        _ => PowerAnalysis::always_valid(each, 0.8),
    };
    let metric = baseline(results)?.metric;
    power.ok()?.users_per_arm(metric.variance()?, results.plan.minimum_effect * metric.mean()).ok()
}

fn daily(results: &Results, alpha: Alpha) -> Vec<DailyMean> {
    let mut all = Vec::new();
    for arm in &results.arms {
        let arms = results.arms.iter().filter(|other| other.phase == arm.phase).count() as u64;
        let target = results.plan.target_sample_size / arms;
        let mut until = Cohort::default();
        for day in arm.days.iter().filter(|day| day.is_mature) {
            until += day.cohort;
            let (users, mean) = (until.users(), until.metric.mean());
            let estimate = until
                .metric
                .variance_of_mean()
                .and_then(|variance| Estimate::new(mean, variance, users).ok());
            all.push(DailyMean {
                phase: arm.phase,
                variant: arm.variant.clone(),
                day: day.day,
                users,
                mean,
                interval: estimate.map(|e| e.always_valid(alpha, target).interval),
            });
        }
    }
    all
}

impl Comparison {
    /// Whether the interval of the difference leaves out 0.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.difference.is_ok_and(|effect: Effect| !effect.interval.contains(0.0))
    }
}
