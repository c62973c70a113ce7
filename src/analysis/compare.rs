//! Each variant against the baseline.

use serde::Serialize;

use crate::money::Money;
use crate::repo::{ArmResults, Cohort, Results};
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
    /// The phases that are in it, each compared for itself, and combined by the inverse of their variances.
    pub phases: Vec<i32>,
    /// Users of the baseline in these phases.
    pub baseline_users: u64,
    /// Users of the variant in these phases.
    pub users: u64,
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

/// How many users each arm has at least before anything is said of it.
pub(super) const MIN_USERS: u64 = 100;

pub(super) fn is_enough(cohorts: impl Iterator<Item = Cohort>) -> bool {
    let (users, buyers) = cohorts.fold((0, 0), |(u, b), cohort| (u + cohort.users(), b + cohort.buyers));
    users >= MIN_USERS && buyers >= stats::MIN_BUYERS_PER_ARM
}

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

fn pairs(results: &Results, variant: &ArmResults) -> Vec<Pair> {
    let same = |arm: &&ArmResults| arm.variant == variant.variant && arm.price == variant.price;
    let pair = |arm: &ArmResults| {
        let baseline = baseline_in(results, arm.phase)?.mature();
        let other = arm.mature();
        (baseline.users() > 0 && other.users() > 0).then_some(Pair { phase: arm.phase, baseline, other })
    };
    results.arms.iter().filter(same).filter_map(pair).collect()
}

/// By phase, and all together. A phase that tells nothing is left out, unless none does.
fn combined(pairs: &[Pair], by: fn(Sample, Sample) -> Estimated<Estimate>) -> Estimated<Combined> {
    let each: Vec<_> = pairs.iter().map(|pair| by(pair.baseline.metric, pair.other.metric)).collect();
    match (each.iter().find_map(|e| e.as_ref().ok()), each.first()) {
        (None, Some(Err(reason))) => Err(*reason),
        (None, _) => Err(NotEstimable::TooFew { what: "users whose window is over", needed: 1, got: 0 }),
        (Some(_), _) => stats::combine(&each.into_iter().flatten().collect::<Vec<_>>()),
    }
}

pub(super) fn compare(results: &Results, alpha: Alpha) -> Vec<Comparison> {
    let contenders = contenders(results);
    let each = alpha.shared_by(u32::try_from(contenders.len()).unwrap_or(u32::MAX));
    // Of the users of all arms, those of two.
    let target = results.plan.target_sample_size * 2 / (contenders.len() as u64 + 1);
    let mut comparisons: Vec<Comparison> = contenders
        .iter()
        .map(|arm| {
            let pairs = pairs(results, arm);
            let (difference, lift) = (combined(&pairs, stats::difference), combined(&pairs, stats::lift));
            let largest = pairs.iter().max_by_key(|pair| pair.users());
            Comparison {
                variant: arm.variant.clone(),
                price: arm.price,
                phases: pairs.iter().map(|pair| pair.phase).collect(),
                baseline_users: pairs.iter().map(|pair| pair.baseline.users()).sum(),
                users: pairs.iter().map(|pair| pair.other.users()).sum(),
                has_enough: is_enough(pairs.iter().map(|pair| pair.baseline))
                    && is_enough(pairs.iter().map(|pair| pair.other)),
                difference: difference.map(|d| d.estimate.always_valid(each, target)),
                lift: lift.map(|l| l.estimate.always_valid(each, target)),
                planned: difference.map(|d| d.estimate.fixed_horizon(each)),
                same_in_phases: difference.ok().filter(|_| pairs.len() > 1).map(|d| d.heterogeneity_p_value),
                chance_to_win: difference
                    .and_then(|d| Posterior::new(d.estimate.value(), d.estimate.variance().sqrt()))
                    .map(|posterior| posterior.chance_above(0.0)),
                conversion: match largest {
                    None => {
                        Err(NotEstimable::TooFew { what: "users whose window is over", needed: 1, got: 0 })
                    }
                    Some(pair) => {
                        stats::compare_proportions(pair.baseline.conversion(), pair.other.conversion(), alpha)
                    }
                },
            }
        })
        .collect();
    correct(&mut comparisons);
    comparisons
}

/// Holm's correction of the planned test, over the variants of which it says something.
fn correct(comparisons: &mut [Comparison]) {
    let planned = || comparisons.iter().filter_map(|c| c.planned.ok());
    let Ok(corrected) = stats::holm(&planned().map(|effect| effect.p_value).collect::<Vec<_>>()) else {
        return;
    };
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
