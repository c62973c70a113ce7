//! Each variant against the baseline.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use chrono::NaiveDate;
use serde::Serialize;

use crate::money::Money;
use crate::repo::{ArmResults, Cohort, DecisionRule, Results};
use crate::stats::{
    self, Alpha, ArmChance, Combined, Effect, Estimate, NotEstimable, Posterior, ProportionDifference, Sample,
};

/// What the data says, or why it says nothing.
pub type Estimated<T> = std::result::Result<T, NotEstimable>;

/// One variant compared with the baseline: users whose window is over, in all phases that showed both at these prices.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The variant.
    pub variant: String,
    /// Its headline price.
    pub price: Money,
    /// The phases that are in it, each compared for itself, and combined by the inverse of their variances: those with 100 users
    /// on each side and 100 buyers on one, or where there is none, the one with the most users.
    pub phases: Vec<i32>,
    /// Users of the baseline in these phases.
    pub baseline_users: u64,
    /// How many of them bought.
    pub baseline_buyers: u64,
    /// Users of the variant in these phases.
    pub users: u64,
    /// How many of them bought.
    pub buyers: u64,
    /// Whether both have the 100 users and 100 buyers without which chance decides.
    pub has_enough: bool,
    /// The metric per user, the variant's less the baseline's, in the experiment's currency, by a confidence sequence: it holds
    /// however often one looks.
    pub difference: Estimated<Effect>,
    /// The same relative to the baseline: 0.1 is 10 % more.
    pub lift: Estimated<Effect>,
    /// The difference by Welch's test, for one look that was planned; the p-value is corrected by Holm for the number of variants.
    /// Not protected against peeking.
    pub planned: Estimated<Effect>,
    /// How likely the phases are to have one and the same effect: the p-value of Cochran's Q; `None` of one phase.
    pub same_in_phases: Option<f64>,
    /// The probability of being better than the baseline, from a flat prior. Not protected against peeking.
    pub chance_to_win: Estimated<f64>,
    /// The share of the baseline's buyers that the variant loses, negative if it wins some; of the phase with the most users.
    pub conversion_drop: Option<f64>,
    /// The share of buyers, the variant's less the baseline's; of the phase with the most users.
    pub conversion: Estimated<ProportionDifference>,
}

/// What one arm has of being the best. Not protected against peeking.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Chance {
    /// The variant.
    pub variant: String,
    /// The probability that no other one is better.
    pub best: f64,
    /// What choosing it loses on average, per user, in the experiment's currency.
    pub expected_loss: f64,
}

/// Of more arms the integral would take seconds.
const MOST_ARMS: usize = 12;

/// How many users each arm has at least before anything is said of it.
pub(super) const MIN_USERS: u64 = 100;

/// Variant and baseline in one phase.
struct Pair {
    phase: i32,
    baseline: Cohort,
    other: Cohort,
}

impl Pair {
    fn users(&self) -> u64 {
        self.baseline.users() + self.other.users()
    }

    /// Whether it may be combined with others: of a few users the variance is a guess, and its inverse a bad weight. Where one
    /// side alone sells nothing, it counts.
    fn has_weight(&self) -> bool {
        let few = self.baseline.users().min(self.other.users()) < MIN_USERS;
        !few && self.baseline.buyers.max(self.other.buyers) >= stats::MIN_BUYERS_PER_ARM
    }
}

/// The arms that new users get: those of the last phase.
pub(super) fn current(results: &Results) -> impl Iterator<Item = &ArmResults> {
    let phase = results.arms.iter().map(|arm| arm.phase).max();
    results.arms.iter().filter(move |arm| Some(arm.phase) == phase)
}

pub(super) fn baseline_in(results: &Results, phase: i32) -> Option<&ArmResults> {
    results.arms.iter().find(|arm| arm.phase == phase && arm.variant == results.baseline)
}

/// The baseline in the phase in which most of its users are judged.
pub(super) fn baseline(results: &Results) -> Option<Cohort> {
    let arms = results.arms.iter().filter(|arm| arm.variant == results.baseline);
    arms.map(ArmResults::mature).max_by_key(Cohort::users)
}

/// The variants that are compared with the baseline: those of the last phase that ever had a weight.
pub(super) fn contenders(results: &Results) -> Vec<&ArmResults> {
    let shown = |variant: &str| results.arms.iter().any(|arm| arm.variant == variant && arm.weight > 0);
    current(results).filter(|arm| arm.variant != results.baseline && shown(&arm.variant)).collect()
}

/// In which phases a variant and the baseline are compared; where none has enough users, the one that has most.
fn pairs(results: &Results, variant: &ArmResults) -> Vec<Pair> {
    let same = |arm: &&ArmResults| arm.variant == variant.variant && arm.price == variant.price;
    let pair = |arm: &ArmResults| {
        let baseline = baseline_in(results, arm.phase)?.mature();
        let other = arm.mature();
        (baseline.users() > 0 && other.users() > 0).then_some(Pair { phase: arm.phase, baseline, other })
    };
    let all: Vec<Pair> = results.arms.iter().filter(same).filter_map(pair).collect();
    if all.iter().any(Pair::has_weight) {
        return all.into_iter().filter(Pair::has_weight).collect();
    }
    all.into_iter().max_by_key(Pair::users).into_iter().collect()
}

/// By phase, and all together. A phase that tells nothing is not left out: what the others say would be half of the truth.
fn combined(pairs: &[Pair], by: fn(Sample, Sample) -> Estimated<Estimate>) -> Estimated<Combined> {
    let each = pairs.iter().map(|pair| by(pair.baseline.metric, pair.other.metric));
    match each.collect::<Estimated<Vec<_>>>()?.as_slice() {
        [] => Err(NotEstimable::TooFew { what: "users whose window is over", needed: 1, got: 0 }),
        estimates => stats::combine(estimates),
    }
}

/// How many variants were compared with the baseline, in whatever phase: what was dropped was looked at as well.
fn looked_at(results: &Results) -> u32 {
    let shown = results.arms.iter().filter(|arm| arm.weight > 0 && arm.variant != results.baseline);
    let names: BTreeSet<&str> = shown.map(|arm| arm.variant.as_str()).collect();
    u32::try_from(names.len()).unwrap_or(u32::MAX).max(1)
}

/// The results as they were when a planned sample size was reached, by whole days: later looks are not planned.
pub(super) fn at_the_horizon(results: &Results) -> Cow<'_, Results> {
    let mut users: BTreeMap<NaiveDate, u64> = BTreeMap::new();
    let compared = contenders(results);
    let is_compared = |arm: &ArmResults| {
        arm.variant == results.baseline
            || compared.iter().any(|c| c.variant == arm.variant && c.price == arm.price)
    };
    for day in results.arms.iter().filter(|arm| is_compared(arm)).flat_map(|arm| &arm.days) {
        if day.is_mature {
            *users.entry(day.day).or_default() += day.cohort.users();
        }
    }
    let mut until = 0_u64;
    let reached = users.iter().find_map(|(day, users)| {
        until += users;
        (until >= results.plan.target_sample_size).then_some(*day)
    });
    let (DecisionRule::FixedHorizon, Some(last)) = (results.plan.rule, reached) else {
        return Cow::Borrowed(results);
    };
    let mut then = results.clone();
    for day in then.arms.iter_mut().flat_map(|arm| &mut arm.days) {
        day.is_mature &= day.day <= last;
    }
    Cow::Owned(then)
}

pub(super) fn compare(results: &Results, alpha: Alpha) -> Vec<Comparison> {
    let contenders = contenders(results);
    let variants = looked_at(results);
    let each = alpha.shared_by(variants);
    // Of the users of all arms, those of two.
    let target = results.plan.target_sample_size.saturating_mul(2) / (u64::from(variants) + 1);
    let mut comparisons: Vec<Comparison> = contenders
        .iter()
        .map(|arm| {
            let pairs = pairs(results, arm);
            let (difference, lift) = (combined(&pairs, stats::difference), combined(&pairs, stats::lift));
            let largest = pairs.iter().max_by_key(|pair| pair.users());
            let conversion = largest
                .map(|pair| (pair.baseline.conversion(), pair.other.conversion()))
                .ok_or(NotEstimable::TooFew { what: "users whose window is over", needed: 1, got: 0 });
            let sum = |of: fn(&Pair) -> u64| pairs.iter().map(of).sum::<u64>();
            let (baseline_buyers, buyers) = (sum(|p| p.baseline.buyers), sum(|p| p.other.buyers));
            let (baseline_users, users) = (sum(|p| p.baseline.users()), sum(|p| p.other.users()));
            Comparison {
                variant: arm.variant.clone(),
                price: arm.price,
                phases: pairs.iter().map(|pair| pair.phase).collect(),
                baseline_users,
                baseline_buyers,
                users,
                buyers,
                has_enough: baseline_users.min(users) >= MIN_USERS
                    && baseline_buyers.min(buyers) >= stats::MIN_BUYERS_PER_ARM,
                difference: difference.map(|d| d.estimate.always_valid(each, target)),
                lift: lift.map(|l| l.estimate.always_valid(each, target)),
                planned: difference.map(|d| d.estimate.fixed_horizon(each)),
                same_in_phases: difference.ok().filter(|_| pairs.len() > 1).map(|d| d.heterogeneity_p_value),
                chance_to_win: difference
                    .and_then(|d| Posterior::new(d.estimate.value(), d.estimate.variance().sqrt()))
                    .map(|posterior| posterior.chance_above(0.0)),
                conversion_drop: conversion.ok().and_then(|(baseline, other)| {
                    let rate = baseline.rate().filter(|rate| *rate > 0.0)?;
                    Some(1.0 - other.rate()? / rate)
                }),
                conversion: conversion
                    .and_then(|(baseline, other)| stats::compare_proportions(baseline, other, alpha)),
            }
        })
        .collect();
    correct(&mut comparisons, variants);
    comparisons
}

/// Holm's correction of the planned test, over all variants: those of which it says nothing have the p-value 1.
fn correct(comparisons: &mut [Comparison], variants: u32) {
    let mut p_values: Vec<f64> = comparisons.iter().filter_map(|c| Some(c.planned.ok()?.p_value)).collect();
    p_values.resize(p_values.len().max(variants as usize), 1.0);
    let Ok(corrected) = stats::holm(&p_values) else { return };
    let effects = comparisons.iter_mut().filter_map(|c| c.planned.as_mut().ok());
    for (effect, p_value) in effects.zip(corrected) {
        effect.p_value = p_value;
    }
}

/// The chances of all arms, the baseline first, of which the data says something.
///
/// The differences to the baseline have its error in common. So the posterior of an arm is that of the baseline plus its
/// difference, with what the variance of the difference has beyond the baseline's.
pub(super) fn chances(results: &Results) -> Estimated<Vec<Chance>> {
    let contenders = contenders(results);
    if contenders.len() >= MOST_ARMS {
        return Err(NotEstimable::TooMany { what: "variants", at_most: MOST_ARMS as u64 });
    }
    let baseline_variance = |pairs: &[Pair]| {
        let precision: f64 =
            pairs.iter().filter_map(|p| p.baseline.metric.variance_of_mean()).map(f64::recip).sum();
        precision.recip()
    };
    let mut names = vec![results.baseline.clone()];
    let mut posteriors = Vec::new();
    let mut of_baseline = f64::INFINITY;
    for arm in contenders {
        let pairs = pairs(results, arm);
        let Ok(difference) = combined(&pairs, stats::difference) else { continue };
        let variance = baseline_variance(&pairs);
        let rest = difference.estimate.variance() - variance;
        if let Ok(posterior) = Posterior::new(difference.estimate.value(), rest.max(0.0).sqrt()) {
            of_baseline = of_baseline.min(variance);
            names.push(arm.variant.clone());
            posteriors.push(posterior);
        }
    }
    if posteriors.is_empty() {
        return Err(NotEstimable::TooFew { what: "variants that can be compared", needed: 1, got: 0 });
    }
    posteriors.insert(0, Posterior::new(0.0, of_baseline.sqrt())?);
    let chance = |(variant, chance): (String, ArmChance)| Chance {
        variant,
        best: chance.best,
        expected_loss: chance.expected_loss,
    };
    Ok(names.into_iter().zip(stats::best_arm(&posteriors)?).map(chance).collect())
}
