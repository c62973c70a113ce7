//! Every case of `vectors/core.json`, which `scripts/oracles/core.py` makes by mpmath, gbstats, scipy and statsmodels.

use serde::Deserialize;

use crate::stats::special::{chi_squared_tail, normal_quantile, normal_tail, t_quantile, t_tail};
use crate::stats::*;

#[derive(Deserialize)]
struct Vectors {
    distributions: Vec<Distribution>,
    means: Vec<Means>,
    covariates: Vec<Covariate>,
    proportions: Vec<Shares>,
    combinations: Vec<Combination>,
    multiples: Vec<Multiple>,
    ratios: Vec<Ratio>,
    powers: Vec<Power>,
    winsorised: Vec<Capped>,
    bootstraps: Vec<Boot>,
}

#[derive(Deserialize)]
struct Distribution {
    of: String,
    x: f64,
    df: f64,
    tail: f64,
}

type Arm = (u64, f64, f64);

#[derive(Deserialize, Debug)]
struct Means {
    baseline: Arm,
    other: Arm,
    alpha: f64,
    target: u64,
    difference: [f64; 4],
    lift: [f64; 4],
    sequential_difference: [f64; 4],
    sequential_lift: [f64; 4],
}

#[derive(Deserialize, Debug)]
struct Covariate {
    baseline: (Arm, Arm, f64),
    other: (Arm, Arm, f64),
    alpha: f64,
    theta: f64,
    variance_reduction: f64,
    difference: [f64; 4],
    lift: [f64; 4],
}

#[derive(Deserialize, Debug)]
struct Shares {
    baseline: (u64, u64),
    other: (u64, u64),
    alpha: f64,
    wilson: [f64; 2],
    newcombe: [f64; 2],
    fisher: bool,
    p: f64,
}

#[derive(Deserialize, Debug)]
struct Combination {
    estimates: Vec<(f64, f64)>,
    value: f64,
    variance: f64,
    q: f64,
    p: f64,
}

#[derive(Deserialize, Debug)]
struct Multiple {
    p: Vec<f64>,
    holm: Vec<f64>,
    benjamini_hochberg: Vec<f64>,
}

#[derive(Deserialize, Debug)]
struct Ratio {
    users: Vec<u64>,
    weights: Vec<u32>,
    p: f64,
    always_valid_p: f64,
}

#[derive(Deserialize, Debug)]
struct Power {
    alpha: f64,
    power: f64,
    variance: f64,
    difference: f64,
    users: u64,
    detectable: f64,
    shares: (f64, f64),
    share_users: u64,
}

#[derive(Deserialize, Debug)]
struct Capped {
    arms: Vec<Vec<f64>>,
    users: Vec<u64>,
    lower: f64,
    upper: f64,
    limits: [f64; 2],
    sums: Vec<f64>,
    deviations: Vec<f64>,
}

#[derive(Deserialize, Debug)]
struct Boot {
    users: [u64; 2],
    buyers: [Vec<f64>; 2],
    difference: [f64; 2],
    lift: [f64; 2],
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../vectors/core.json")).unwrap()
}

/// To 1e-9 of the number, or of `scale` where digits were lost before.
#[track_caller]
fn same(ours: f64, theirs: f64, scale: f64, case: &dyn std::fmt::Debug) {
    // Below 1e-300, doubles have no 9 digits.
    let allowed = 1e-9 * theirs.abs().max(scale) + 1e-308;
    assert!((ours - theirs).abs() <= allowed, "{ours:e}, not {theirs:e}: {case:?}");
}

/// Value, low, high, p.
#[track_caller]
fn same_effect(effect: Effect, theirs: [f64; 4], case: &dyn std::fmt::Debug) {
    let width = theirs[2] - theirs[1];
    same(effect.estimate, theirs[0], width, case);
    same(effect.interval.low, theirs[1], width, case);
    same(effect.interval.high, theirs[2], width, case);
    same(effect.p_value, theirs[3], 0.0, case);
}

fn alpha(value: f64) -> Alpha {
    Alpha::new(value).unwrap()
}

fn sample((n, sum, squares): Arm) -> Sample {
    Sample::from_sums(n, sum, squares).unwrap()
}

#[test]
fn tails_and_quantiles_are_exact_where_they_are_tiny_and_for_billions() {
    let vectors = vectors().distributions;
    assert!(vectors.len() >= 100);
    for Distribution { of, x, df, tail } in vectors {
        let ours = match of.as_str() {
            "t" => t_tail(x, df),
            "t_quantile" => t_quantile(x, df),
            "normal" => normal_tail(x),
            "normal_quantile" => normal_quantile(x),
            "chi_squared" => chi_squared_tail(x, df as u32),
            _ => panic!("{of}?"),
        };
        assert!((ours - tail).abs() <= 1e-12 * tail, "{of}({x}, {df}): {ours:e}, not {tail:e}");
    }
}

#[test]
fn means_are_those_of_gbstats() {
    let cases = vectors().means;
    assert!(cases.len() >= 50);
    for case in cases {
        let (a, b) = (sample(case.baseline), sample(case.other));
        let (difference, lift) = (difference(a, b).unwrap(), lift(a, b).unwrap());
        let alpha = alpha(case.alpha);
        same_effect(difference.fixed_horizon(alpha), case.difference, &case);
        same_effect(lift.fixed_horizon(alpha), case.lift, &case);
        same_effect(difference.always_valid(alpha, case.target), case.sequential_difference, &case);
        same_effect(lift.always_valid(alpha, case.target), case.sequential_lift, &case);
    }
}

#[test]
fn covariate_adjustment_is_that_of_gbstats() {
    let cases = vectors().covariates;
    assert!(cases.len() >= 50);
    for case in cases {
        let pair = |(post, pre, products): (Arm, Arm, f64)| {
            PairedSample::from_sums(sample(post), sample(pre), products).unwrap()
        };
        let (a, b) = (pair(case.baseline), pair(case.other));
        let adjusted = adjusted_difference(a, b).unwrap();
        same(adjusted.theta, case.theta, 0.0, &case);
        same(adjusted.variance_reduction, case.variance_reduction, 1.0, &case);
        same_effect(adjusted.estimate.fixed_horizon(alpha(case.alpha)), case.difference, &case);
        let lift = adjusted_lift(a, b).unwrap().estimate;
        same_effect(lift.fixed_horizon(alpha(case.alpha)), case.lift, &case);
    }
}

#[test]
fn shares_are_those_of_statsmodels_and_scipy() {
    let cases = vectors().proportions;
    let fisher = cases.iter().filter(|case| case.fisher).count();
    assert!(fisher >= 50 && cases.len() - fisher >= 50);
    for case in cases {
        let share = |(k, n)| Proportion::new(k, n).unwrap();
        let (a, b) = (share(case.baseline), share(case.other));
        let interval = wilson(a, alpha(case.alpha)).unwrap();
        same(interval.low, case.wilson[0], 0.0, &case);
        same(interval.high, case.wilson[1], 0.0, &case);
        let found = compare_proportions(a, b, alpha(case.alpha)).unwrap();
        // Rates near 1 have 16 digits, so what is left of their difference has fewer.
        let scale = (case.newcombe[1] - case.newcombe[0]).max(1e-7);
        same(found.interval.low, case.newcombe[0], scale, &case);
        same(found.interval.high, case.newcombe[1], scale, &case);
        assert_eq!(found.test == ProportionTest::Fisher, case.fisher, "{case:?}");
        same(found.p_value, case.p, 0.0, &case);
    }
}

#[test]
fn estimates_combine_as_in_statsmodels() {
    let cases = vectors().combinations;
    assert!(cases.len() >= 50);
    for case in cases {
        let estimates: Vec<Estimate> = case
            .estimates
            .iter()
            .map(|(value, variance)| Estimate::new(*value, *variance, 7).unwrap())
            .collect();
        let both = combine(&estimates).unwrap();
        same(both.estimate.value(), case.value, case.variance.sqrt(), &case);
        same(both.estimate.variance(), case.variance, 0.0, &case);
        same(both.heterogeneity, case.q, 1e-3, &case);
        same(both.heterogeneity_p_value, case.p, 0.0, &case);
        assert_eq!(both.estimate.n(), 7 * estimates.len() as u64);
    }
}

#[test]
fn p_values_are_adjusted_as_in_statsmodels() {
    let cases = vectors().multiples;
    assert!(cases.len() >= 50);
    for case in cases {
        for (ours, theirs) in [
            (holm(&case.p).unwrap(), &case.holm),
            (benjamini_hochberg(&case.p).unwrap(), &case.benjamini_hochberg),
        ] {
            assert_eq!(ours.len(), theirs.len());
            ours.iter().zip(theirs).for_each(|(ours, theirs)| same(*ours, *theirs, 0.0, &case));
        }
    }
}

#[test]
fn sample_ratios_are_those_of_scipy_and_ssrm_test() {
    let cases = vectors().ratios;
    assert!(cases.len() >= 50);
    for case in cases {
        let arms: Vec<(u64, u32)> = case.users.iter().copied().zip(case.weights.iter().copied()).collect();
        let found = sample_ratio(&arms).unwrap();
        same(found.p_value, case.p, 0.0, &case);
        same(found.always_valid_p_value, case.always_valid_p, 0.0, &case);
        // An arm that nobody is given changes nothing, unless somebody got it.
        let with = |stray| sample_ratio(&[&arms[..], &[(stray, 0)]].concat()).unwrap();
        assert_eq!(with(0), found);
        assert_eq!((with(1).p_value, with(1).stray_users, with(1).is_mismatch()), (found.p_value, 1, true));
    }
}

#[test]
fn sample_sizes_are_those_of_statsmodels() {
    let cases = vectors().powers;
    assert!(cases.len() >= 50);
    for case in cases {
        let plan = PowerAnalysis::fixed_horizon(alpha(case.alpha), case.power).unwrap();
        assert_eq!(plan.users_per_arm(case.variance, case.difference).unwrap(), case.users, "{case:?}");
        same(plan.detectable_difference(case.variance, case.users).unwrap(), case.detectable, 0.0, &case);
        let (baseline, other) = case.shares;
        assert_eq!(plan.users_per_arm_for_shares(baseline, other).unwrap(), case.share_users, "{case:?}");
        let least = plan.detectable_share(baseline, case.share_users).unwrap();
        assert!(
            other < baseline || (least <= other && least > baseline + 0.99 * (other - baseline)),
            "{case:?}"
        );
    }
}

#[test]
fn totals_are_capped_as_by_numpy() {
    let cases = vectors().winsorised;
    assert!(cases.len() >= 50);
    for case in cases {
        let arms: Vec<Totals> = case
            .arms
            .iter()
            .zip(&case.users)
            .map(|(buyers, n)| Totals::new(*n, buyers.clone()).unwrap())
            .collect();
        let capped = winsorise(&arms, case.lower, case.upper).unwrap();
        same(capped.limits.low, case.limits[0], 0.0, &case);
        same(capped.limits.high, case.limits[1], 0.0, &case);
        for (arm, sample) in capped.samples.iter().enumerate() {
            assert_eq!(sample.n(), case.users[arm]);
            same(sample.sum(), case.sums[arm], 1e-3, &case);
            same(sample.deviations(), case.deviations[arm], 1e-3, &case);
        }
    }
}

#[test]
fn bootstrap_intervals_are_those_of_scipy_within_its_own_noise() {
    for case in vectors().bootstraps {
        let arm = |i: usize| Totals::new(case.users[i], case.buyers[i].clone()).unwrap();
        let found = bootstrap(&arm(0), &arm(1), Alpha::default(), 5000, 42).unwrap();
        for (ours, theirs) in [(found.difference, case.difference), (found.lift.unwrap(), case.lift)] {
            // Two draws of a 2.5 % quantile of 5000 and 10 000 differ by 1 % of the width (one standard error).
            let noise = 0.04 * (theirs[1] - theirs[0]);
            assert!((ours.low - theirs[0]).abs() < noise, "{ours:?} {theirs:?}");
            assert!((ours.high - theirs[1]).abs() < noise, "{ours:?} {theirs:?}");
        }
    }
}
