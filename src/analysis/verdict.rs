//! What to do.

use std::fmt;

use serde::Serialize;

use super::compare::{Chance, Comparison, Estimated, baseline};
use super::health::{Finding, Severity};
use crate::repo::{DecisionRule, Results};

/// What the plan's rule says.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// Nothing can be said, for the reasons that the report's findings give.
    Withheld {
        /// How many findings stand in the way.
        findings: usize,
    },
    /// The rule does not decide yet: go on.
    Undecided,
    /// A variant is better than the baseline.
    Better {
        /// Which: the one that brings most.
        variant: String,
        /// Others that are better than the baseline as well; the rule does not tell which of them is the best.
        others: Vec<String>,
    },
    /// A variant is better than the baseline, and loses more buyers than the plan allows.
    GuardrailBroken {
        /// Which.
        variant: String,
        /// The share of the baseline's buyers that it loses.
        conversion_drop: f64,
    },
    /// No variant is better than the baseline by what the plan calls worth it.
    KeepBaseline,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Withheld { findings: 1 } => write!(f, "no verdict, for one reason"),
            Verdict::Withheld { findings } => write!(f, "no verdict, for {findings} reasons"),
            Verdict::Undecided => write!(f, "not decided yet: let it run"),
            Verdict::Better { variant, others } => {
                write!(f, "take `{variant}`")?;
                match others.as_slice() {
                    [] => Ok(()),
                    others => write!(f, "; better than the baseline as well: `{}`", others.join("`, `")),
                }
            }
            Verdict::GuardrailBroken { variant, conversion_drop } => write!(
                f,
                "`{variant}` earns more, but loses {:.1} % of the buyers, which is more than the plan allows",
                conversion_drop * 100.0
            ),
            Verdict::KeepBaseline => write!(f, "keep the baseline: nothing is better by enough to matter"),
        }
    }
}

pub(super) fn verdict(
    results: &Results,
    comparisons: &[Comparison],
    chances: &Estimated<Vec<Chance>>,
    findings: &[Finding],
) -> Verdict {
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocking).count();
    if blocking > 0 {
        return Verdict::Withheld { findings: blocking };
    }
    match results.plan.rule {
        DecisionRule::Sequential => sequential(results, comparisons),
        DecisionRule::FixedHorizon => fixed_horizon(results, comparisons),
        DecisionRule::ExpectedLoss(limit) => expected_loss(results, comparisons, chances, limit),
    }
}

fn sequential(results: &Results, comparisons: &[Comparison]) -> Verdict {
    let is_better = |c: &Comparison| c.difference.is_ok_and(|effect| effect.interval.low > 0.0);
    if let Some(verdict) = best_of(results, comparisons, is_better) {
        return verdict;
    }
    let cannot_matter = |c: &Comparison| {
        // Of too few buyers, only that a variant is clearly worse is believed.
        c.difference.is_ok_and(|effect| effect.interval.high < 0.0)
            || c.has_enough && c.lift.is_ok_and(|effect| effect.interval.high < results.plan.minimum_effect)
    };
    if comparisons.iter().all(cannot_matter) { Verdict::KeepBaseline } else { Verdict::Undecided }
}

fn fixed_horizon(results: &Results, comparisons: &[Comparison]) -> Verdict {
    // Of those who are compared.
    let baseline = comparisons.iter().map(|c| c.baseline_users).max().unwrap_or(0);
    let users = comparisons.iter().map(|c| c.users).sum::<u64>() + baseline;
    if users < results.plan.target_sample_size {
        return Verdict::Undecided;
    }
    let alpha = results.plan.alpha;
    let is_better = |c: &Comparison| c.planned.is_ok_and(|e| e.estimate > 0.0 && e.p_value <= alpha);
    best_of(results, comparisons, is_better).unwrap_or(Verdict::KeepBaseline)
}

fn expected_loss(
    results: &Results,
    comparisons: &[Comparison],
    chances: &Estimated<Vec<Chance>>,
    limit: f64,
) -> Verdict {
    let Ok(chances) = chances else { return Verdict::Undecided };
    let Some(safest) = chances.iter().min_by(|a, b| a.expected_loss.total_cmp(&b.expected_loss)) else {
        return Verdict::Undecided;
    };
    if baseline(results).is_none_or(|of| safest.expected_loss > limit * of.metric.mean().abs()) {
        return Verdict::Undecided;
    }
    let is_safest = |c: &Comparison| c.variant == safest.variant;
    best_of(results, comparisons, is_safest).unwrap_or(Verdict::KeepBaseline)
}

/// The one that brings most of those that are better and break no guardrail.
fn best_of(
    results: &Results,
    comparisons: &[Comparison],
    is_better: impl Fn(&Comparison) -> bool,
) -> Option<Verdict> {
    let estimate = |c: &Comparison| c.difference.map_or(f64::NEG_INFINITY, |effect| effect.estimate);
    let mut better: Vec<&Comparison> = comparisons.iter().filter(|c| c.has_enough && is_better(c)).collect();
    better.sort_by(|a, b| estimate(b).total_cmp(&estimate(a)));
    let broken = |c: &Comparison| c.conversion_drop.filter(|drop| is_beyond(results, *drop));
    let mut allowed = better.iter().filter(|c| broken(c).is_none()).map(|c| c.variant.clone());
    if let Some(variant) = allowed.next() {
        return Some(Verdict::Better { variant, others: allowed.collect() });
    }
    let best = better.first()?;
    let conversion_drop = broken(best)?;
    Some(Verdict::GuardrailBroken { variant: best.variant.clone(), conversion_drop })
}

fn is_beyond(results: &Results, drop: f64) -> bool {
    results.plan.max_conversion_drop.is_some_and(|limit| drop > limit)
}
