//! Whether the numbers can be believed.

use std::fmt;

use serde::Serialize;

use super::compare::{Comparison, MIN_USERS, baseline_in, contenders, current};
use crate::repo::{ArmResults, Results};
use crate::stats::{self, Alpha, MIN_BUYERS_PER_ARM};

/// The share of entries or buyers from which on a fault of theirs cannot be overlooked.
const TOLERATED: f64 = 0.01;
/// How unlikely it is that phases with one and the same effect look as different as theirs.
const PHASES_DIFFER: f64 = 0.001;
/// The share of the newest views that programs may have.
const TOLERATED_VIEWS: f64 = 0.2;

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Check {
    /// Whether the arms have the users that their weights say.
    SampleRatio,
    /// Whether users have entries of two variants.
    Crossovers,
    /// Whether users were charged what was quoted.
    QuoteMismatch,
    /// Whether users' windows are over.
    Maturity,
    /// Whether there are enough users and buyers.
    SampleSize,
    /// Whether a phase began within the window, and whether the phases have one effect.
    Phases,
    /// Whether anything is earned.
    Losses,
    /// Whether programs look at the prices.
    Bots,
    /// The guardrail of money that goes back.
    Refunds,
    /// Whether all currencies have a rate.
    Currencies,
}

/// How serious it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// To be known; the verdict stands.
    Warning,
    /// Until it is mended, there is no verdict.
    Blocking,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// How serious it is.
    pub severity: Severity,
    /// What was found, in a sentence.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// All that is not as it should be, the serious first.
pub(super) fn findings(results: &Results, comparisons: &[Comparison], alpha: Alpha) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut find = |check, is_blocking: bool, message: String| {
        let severity = if is_blocking { Severity::Blocking } else { Severity::Warning };
        found.push(Finding { check, severity, message });
    };
    sample_ratios(results, &mut find);
    faults_of_entries(results, &mut find);
    sizes(results, comparisons, &mut find);
    losses(results, &mut find);
    phases(results, comparisons, &mut find);
    refunds(results, alpha, &mut find);
    let recent = results.recent_views;
    if recent.suspects > 0 {
        let share = recent.views_of_suspects as f64 / recent.views.max(1) as f64;
        find(
            Check::Bots,
            share > TOLERATED_VIEWS,
            format!(
                "{} of {} recent viewers made {:.0} % of the last {} views: that is no person looking at a price",
                recent.suspects,
                recent.viewers,
                share * 100.0,
                recent.views
            ),
        );
    }
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

fn sample_ratios(results: &Results, find: &mut impl FnMut(Check, bool, String)) {
    let phases: std::collections::BTreeSet<i32> = results.arms.iter().map(|arm| arm.phase).collect();
    for phase in phases {
        let arms: Vec<&ArmResults> = results.arms.iter().filter(|arm| arm.phase == phase).collect();
        let counted: Vec<(u64, u32)> = arms.iter().map(|arm| (arm.counts.assignments, arm.weight)).collect();
        let Ok(ratio) = stats::sample_ratio(&counted) else { continue };
        if !ratio.is_mismatch() {
            continue;
        }
        let shares: Vec<String> =
            arms.iter().map(|arm| format!("`{}` {}", arm.variant, arm.counts.assignments)).collect();
        let shares = shares.join(", ");
        find(
            Check::SampleRatio,
            true,
            match ratio.stray_users {
                0 => format!(
                    "users are not divided as the weights of phase {phase} say ({shares}; p = {:.1e}): something loses users \
                     of one variant, and the others are not comparable with them",
                    ratio.p_value
                ),
                strays => {
                    format!("{strays} users of phase {phase} are in variants without a weight ({shares})")
                }
            },
        );
    }
}

fn faults_of_entries(results: &Results, find: &mut impl FnMut(Check, bool, String)) {
    let (mut payments, mut buyers) = (0, 0);
    for arm in &results.arms {
        payments += arm.counts.conversions + arm.counts.renewals;
        buyers += arm.days.iter().map(|day| day.cohort.buyers).sum::<u64>();
    }
    let is_many = |count: u64, of: u64| count as f64 > TOLERATED * of as f64;
    let count = results.crossovers;
    if count > 0 {
        let what = "users have ledger entries of two variants: they saw two prices";
        find(Check::Crossovers, is_many(count, buyers), format!("{count} {what}"));
    }
    let count = results.quote_mismatches;
    if count > 0 {
        let message = format!(
            "{count} of {payments} payments differ from what was quoted: users paid another price than the one that is tested, or in a currency without a quote"
        );
        find(Check::QuoteMismatch, is_many(count, payments), message);
    }
    let count = results.unconverted;
    if count > 0 {
        let message =
            format!("{count} ledger entries are in currencies without an exchange rate, and in no statistic");
        find(Check::Currencies, is_many(count, payments), message);
    }
}

fn sizes(results: &Results, comparisons: &[Comparison], find: &mut impl FnMut(Check, bool, String)) {
    let days = results.plan.window_days;
    let compared: Vec<String> = std::iter::once(results.baseline.clone())
        .chain(contenders(results).iter().map(|arm| arm.variant.clone()))
        .collect();
    if compared.len() < 2 {
        find(Check::SampleSize, true, "there is no variant to compare the baseline with".to_owned());
        return;
    }
    let is_young = |variant: &str| {
        let mut arms = results.arms.iter().filter(|arm| arm.variant == variant);
        arms.all(|arm| arm.mature().users() == 0)
    };
    if let Some(first) = compared.iter().find(|variant| is_young(variant)) {
        find(
            Check::Maturity,
            true,
            format!(
                "nobody of `{first}` is judged yet: users are when they have been in for {days} whole days"
            ),
        );
        return;
    }
    // The others are judged without it, unless there are none.
    let is_alone = comparisons.iter().all(|c| !c.has_enough);
    for c in comparisons.iter().filter(|c| !c.has_enough) {
        find(
            Check::SampleSize,
            is_alone,
            format!(
                "`{}` has {} judged users, of whom {} bought, beside {} and {} of the baseline: at least {MIN_USERS} users and \
                 {MIN_BUYERS_PER_ARM} buyers of each are needed",
                c.variant, c.users, c.buyers, c.baseline_users, c.baseline_buyers
            ),
        );
    }
}

fn losses(results: &Results, find: &mut impl FnMut(Check, bool, String)) {
    let judged = || results.arms.iter().map(ArmResults::mature).filter(|cohort| cohort.buyers > 0);
    if judged().next().is_some() && judged().all(|cohort| cohort.metric.mean() <= 0.0) {
        find(Check::Losses, false, "all variants lose money: what is best loses least".to_owned());
    }
}

fn phases(results: &Results, comparisons: &[Comparison], find: &mut impl FnMut(Check, bool, String)) {
    let newest = current(results).next().map_or(1, |arm| arm.phase);
    let is_young = |arm: &ArmResults| arm.mature().users() == 0;
    if newest > 1 && baseline_in(results, newest).is_some_and(is_young) {
        let days = results.plan.window_days;
        let message = format!(
            "phase {newest} began less than {days} days ago, so that the numbers are all of other weights or variants"
        );
        find(Check::Phases, true, message);
    }
    for comparison in comparisons {
        if let Some(p_value) = comparison.same_in_phases.filter(|p| *p < PHASES_DIFFER) {
            let name = &comparison.variant;
            let message = format!(
                "the effect of `{name}` differs between the phases (p = {p_value:.1e}): their mean is of neither"
            );
            find(Check::Phases, true, message);
        }
    }
}

fn refunds(results: &Results, alpha: Alpha, find: &mut impl FnMut(Check, bool, String)) {
    let Some(limit) = results.plan.max_refund_rate else { return };
    // What was dropped cannot be mended.
    let is_compared = |variant: &str| current(results).any(|arm| arm.variant == variant);
    for arm in &results.arms {
        let rate = arm.mature().refund_rate();
        let (Some(share), Ok(interval)) = (rate.rate(), stats::wilson(rate, alpha)) else { continue };
        if share > limit {
            find(
                Check::Refunds,
                interval.low > limit && is_compared(&arm.variant),
                format!(
                    "{:.1} % of the buyers of `{}` got money back ({} of {}), more than the {:.1} % of the plan",
                    share * 100.0,
                    arm.variant,
                    rate.successes(),
                    rate.n(),
                    limit * 100.0
                ),
            );
        }
    }
}
