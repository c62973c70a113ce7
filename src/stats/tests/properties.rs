//! What holds for any numbers.

use proptest::prelude::*;

use crate::stats::*;

fn value() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => -1e3..1e3,
        2 => Just(0.0),
        1 => prop_oneof![Just(1e-60), Just(-1e60), Just(1e60), Just(1e30), Just(1e-300), Just(5e-324)],
    ]
}

fn sample() -> impl Strategy<Value = Sample> {
    let n = prop_oneof![0..4u64, 2..2_000_000_000u64, Just(u64::MAX)];
    let deviations = prop_oneof![0.0..1e6, Just(0.0), Just(1e120), Just(1e-300), Just(5e-324)];
    (n, value(), deviations).prop_map(|(n, mean, deviations)| {
        Sample::from_deviations(n, mean, if n < 2 { 0.0 } else { deviations }).unwrap()
    })
}

fn alpha() -> impl Strategy<Value = Alpha> {
    prop_oneof![1e-15..0.9999, Just(0.05)].prop_map(|alpha| Alpha::new(alpha).unwrap())
}

fn share() -> impl Strategy<Value = Proportion> {
    let n = prop_oneof![0..5u64, 0..300u64, 0..2_000_000_000u64, Just(u64::MAX)];
    (n, prop_oneof![Just(0.0), Just(1.0), 0.0..1.0, 0.0..1e-6])
        .prop_map(|(n, part)| Proportion::new(((n as f64 * part) as u64).min(n), n).unwrap())
}

fn sane(effect: Effect, alpha: Alpha) {
    let Effect { estimate, standard_error, interval, p_value } = effect;
    assert!(estimate.is_finite() && standard_error.is_finite() && standard_error > 0.0, "{effect:?}");
    assert!(
        interval.low.is_finite() && interval.high.is_finite() && interval.contains(estimate),
        "{effect:?}"
    );
    assert!((0.0..=1.0).contains(&p_value), "{effect:?}");
    // Both say the same, but for the last digits.
    let clear = (p_value - alpha.get()).abs() > 1e-6 * alpha.get();
    assert!(!clear || (p_value < alpha.get()) != interval.contains(0.0), "{effect:?} {alpha:?}");
}

fn near(a: f64, b: f64, scale: f64) -> bool {
    (a - b).abs() <= 1e-9 * (a.abs().max(b.abs()) + scale)
}

proptest! {
    #[test]
    fn comparisons_of_anything_are_sane_or_refused(a in sample(), b in sample(), alpha in alpha(), target in any::<u64>()) {
        for estimate in [difference(a, b), lift(a, b)].into_iter().flatten() {
            sane(estimate.fixed_horizon(alpha), alpha);
            sane(estimate.always_valid(alpha, target), alpha);
        }
    }

    #[test]
    fn to_change_the_sides_changes_the_sign(a in sample(), b in sample()) {
        match (difference(a, b), difference(b, a)) {
            (Ok(there), Ok(back)) => {
                prop_assert_eq!(there.value(), -back.value());
                let (there, back) = (there.fixed_horizon(Alpha::default()), back.fixed_horizon(Alpha::default()));
                prop_assert!(near(there.p_value, back.p_value, 0.0));
            }
            (there, back) => prop_assert_eq!(there.is_ok(), back.is_ok()),
        }
    }

    #[test]
    fn merging_is_what_counting_all_is(users in prop::collection::vec(-1e3..1e3f64, 0..40), cuts in (0..40usize, 0..40usize)) {
        let whole = Sample::of(&users).unwrap();
        let (x, y) = (cuts.0.min(users.len()), cuts.1.min(users.len()));
        let parts = [&users[..x.min(y)], &users[x.min(y)..x.max(y)], &users[x.max(y)..]].map(|part| Sample::of(part).unwrap());
        for merged in [parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[1].merge(parts[2]))] {
            prop_assert_eq!(merged.n(), whole.n());
            prop_assert!(near(merged.mean(), whole.mean(), 1.0));
            prop_assert!(near(merged.deviations(), whole.deviations(), 1e3));
        }
        let sums = Sample::from_sums(users.len() as u64, users.iter().sum(), users.iter().map(|x| x * x).sum()).unwrap();
        prop_assert!(near(sums.deviations(), whole.deviations(), 1e6));
    }

    #[test]
    fn pairs_merge_as_samples_do(users in prop::collection::vec((-1e3..1e3f64, -1e3..1e3f64), 0..40), cut in 0..40usize) {
        let (left, right) = users.split_at(cut.min(users.len()));
        let merged = PairedSample::of(left).unwrap().merge(PairedSample::of(right).unwrap());
        let (post, pre): (Vec<f64>, Vec<f64>) = users.iter().copied().unzip();
        let products = users.iter().map(|(post, pre)| post * pre).sum();
        let whole =
            PairedSample::from_sums(Sample::of(&post).unwrap(), Sample::of(&pre).unwrap(), products).unwrap();
        prop_assert!(near(merged.codeviations(), whole.codeviations(), 1e6));
    }

    #[test]
    fn any_sums_are_a_sample_or_refused(n in any::<u64>(), sum in any::<f64>(), squares in any::<f64>(), products in any::<f64>()) {
        if let Ok(sample) = Sample::from_sums(n, sum, squares) {
            prop_assert!(sample.mean().is_finite() && sample.deviations() >= 0.0 && sample.deviations().is_finite());
            let pair = PairedSample::from_sums(sample, sample, products).unwrap_or_default();
            if let Ok(adjusted) = adjusted_lift(pair, pair.merge(pair)) {
                sane(adjusted.estimate.fixed_horizon(Alpha::default()), Alpha::default());
            }
        }
    }

    #[test]
    fn equal_users_have_no_variance(n in 2..2_000_000u64, price in 0.01..1e6f64) {
        let all = Sample::from_sums(n, price * n as f64, price * price * n as f64).unwrap();
        prop_assert_eq!(all.deviations(), 0.0);
        let refused = Err(NotEstimable::NoVariance { what: "users of an arm" });
        prop_assert_eq!(difference(all, Sample::of(&[1.0, 2.0]).unwrap()), refused);
    }

    #[test]
    fn adjustments_of_anything_are_sane_or_refused(
        a in prop::collection::vec((value(), value()), 0..20),
        b in prop::collection::vec((value(), value()), 0..20),
    ) {
        let (a, b) = (PairedSample::of(&a).unwrap(), PairedSample::of(&b).unwrap());
        for adjusted in [adjusted_difference(a, b), adjusted_lift(a, b)].into_iter().flatten() {
            prop_assert!(adjusted.theta.is_finite() && adjusted.variance_reduction <= 1.0);
            sane(adjusted.estimate.fixed_horizon(Alpha::default()), Alpha::default());
        }
    }

    #[test]
    fn shares_of_anybody_are_sane(a in share(), b in share(), alpha in alpha()) {
        for share in [a, b] {
            if let Ok(interval) = wilson(share, alpha) {
                prop_assert!(0.0 <= interval.low && interval.high <= 1.0 && interval.contains(share.rate().unwrap()));
            }
        }
        let (there, back) = (compare_proportions(a, b, alpha), compare_proportions(b, a, alpha));
        prop_assert_eq!(there.is_ok(), a.n() > 0 && b.n() > 0);
        if let (Ok(there), Ok(back)) = (there, back) {
            prop_assert!(there.interval.contains(there.difference) && (0.0..=1.0).contains(&there.p_value), "{:?}", there);
            prop_assert!(there.interval.low >= -1.0 - 1e-12 && there.interval.high <= 1.0 + 1e-12);
            prop_assert!(near(there.p_value, back.p_value, 1e-6), "{:?} {:?}", there, back);
            if a.rate() == b.rate() {
                prop_assert!(there.p_value > 0.999, "{:?}", there);
            }
        }
    }

    #[test]
    fn combinations_of_anything_are_sane_or_refused(estimates in prop::collection::vec((value(), 1e-200..1e120f64, any::<u64>()), 0..6)) {
        let estimates: Vec<Estimate> = estimates.iter().map(|(v, w, n)| Estimate::new(*v, *w, *n).unwrap()).collect();
        if let Ok(both) = combine(&estimates) {
            sane(both.estimate.fixed_horizon(Alpha::default()), Alpha::default());
            prop_assert!((0.0..=1.0).contains(&both.heterogeneity_p_value) && both.heterogeneity >= 0.0);
            let least = estimates.iter().map(Estimate::variance).fold(f64::INFINITY, f64::min);
            prop_assert!(both.estimate.variance() <= least * (1.0 + 1e-9));
        }
    }

    #[test]
    fn adjusted_p_values_are_no_smaller_and_keep_the_order(p in prop::collection::vec(0.0..=1.0f64, 0..20)) {
        let (holm, hochberg) = (holm(&p).unwrap(), benjamini_hochberg(&p).unwrap());
        for i in 0..p.len() {
            prop_assert!(p[i] <= hochberg[i] && hochberg[i] <= holm[i] * (1.0 + 1e-12) && holm[i] <= 1.0);
            for j in 0..p.len() {
                prop_assert!(p[i] > p[j] || (holm[i] <= holm[j] && hochberg[i] <= hochberg[j]));
            }
        }
    }

    #[test]
    fn ratios_of_any_arms_are_sane_or_refused(arms in prop::collection::vec((prop_oneof![0..50u64, any::<u64>()], prop_oneof![0..4u32, any::<u32>()]), 0..6)) {
        if let Ok(found) = sample_ratio(&arms) {
            prop_assert!((0.0..=1.0).contains(&found.p_value) && (0.0..=1.0).contains(&found.always_valid_p_value), "{:?}", found);
        }
    }

    #[test]
    fn plans_of_anything_are_sane_or_refused(variance in any::<f64>(), effect in any::<f64>(), n in any::<u64>(), power in 0.5..0.999f64, alpha in alpha()) {
        let plan = PowerAnalysis::fixed_horizon(alpha, power).unwrap();
        let (_, _) = (plan.users_per_arm(variance, effect), plan.users_per_arm_for_shares(variance, effect));
        if let Ok(found) = plan.detectable_difference(variance, n) {
            prop_assert!(!found.is_nan());
        }
        let base = (effect.abs() % 1.0).max(0.0);
        if let Ok(found) = plan.detectable_share(base, n) {
            prop_assert!(found > base && found <= 1.0);
        }
    }

    #[test]
    fn robust_numbers_of_anything_are_sane_or_refused(
        a in prop::collection::vec(value(), 0..20), b in prop::collection::vec(value(), 0..20),
        zeros in prop_oneof![0..4u64, Just(1_000_000_000), Just(u64::MAX - 20)], levels in (0.0..0.5f64, 0.5..=1.0f64),
    ) {
        let of = |buyers: &Vec<f64>| Totals::new(buyers.len() as u64 + zeros, buyers.clone()).unwrap();
        let arms = [of(&a), of(&b)];
        if let Ok(capped) = winsorise(&arms, levels.0, levels.1) {
            prop_assert!(capped.limits.low <= capped.limits.high);
            for (capped, arm) in capped.samples.iter().zip(&arms) {
                prop_assert!(capped.n() == arm.users() && capped.deviations() <= arm.sample().deviations() * (1.0 + 1e-9) + 1e-9);
            }
        }
        if let Ok(found) = bootstrap(&arms[0], &arms[1], Alpha::default(), 0, zeros) {
            prop_assert!(found.difference.low <= found.difference.high);
            prop_assert!(found.lift.is_err() || found.lift.is_ok_and(|lift| lift.low <= lift.high));
        }
    }
}

#[test]
fn numbers_that_no_data_has_are_errors() {
    assert!(Sample::from_sums(10, f64::NAN, 1.0).is_err());
    assert!(Sample::from_sums(10, 100.0, 1.0).is_err());
    assert!(Sample::from_deviations(10, 1.0, -1.0).is_err());
    assert!(Sample::of(&[1.0, f64::INFINITY]).is_err());
    assert!(Totals::new(1, vec![1.0, 2.0]).is_err() && Totals::new(2, vec![f64::NAN]).is_err());
    assert!(winsorise(&[], 0.0, 1.0).is_err() && winsorise(&[], 1.0, 0.0).is_err());
    assert!(Alpha::new(f64::NAN).is_err() && Alpha::new(1.0).is_err());
    assert!(holm(&[f64::NAN]).is_err() && benjamini_hochberg(&[1.1]).is_err());
    assert!(Estimate::new(0.0, 0.0, 5).is_err() && Estimate::new(f64::NAN, 1.0, 5).is_err());
    assert!(PowerAnalysis::fixed_horizon(Alpha::default(), 0.1).is_err());
}

#[test]
fn too_little_is_refused_with_its_reason() {
    let many = Sample::of(&[1.0, 2.0, 3.0]).unwrap();
    let one = Sample::of(&[5.0]).unwrap();
    let few = |got| NotEstimable::TooFew { what: "users of an arm", needed: 2, got };
    assert_eq!(difference(many, one), Err(few(1)));
    assert_eq!(difference(Sample::default(), many), Err(few(0)));
    assert_eq!(adjusted_difference(PairedSample::default(), PairedSample::default()), Err(few(0)));
    let loss = Sample::of(&[-1.0, -2.0]).unwrap();
    assert_eq!(lift(loss, many), Err(NotEstimable::NoBaseline));
    assert!(difference(loss, many).is_ok());
    assert_eq!(combine(&[]), Err(NotEstimable::TooFew { what: "estimates", needed: 1, got: 0 }));
    assert!(sample_ratio(&[(0, 1), (0, 1)]).is_err() && sample_ratio(&[(5, 1), (5, 0)]).is_err());
}

#[test]
fn a_resample_of_next_to_nothing_makes_no_infinite_lift() {
    let (baseline, other) =
        (Totals::new(2, vec![1e-300, 1.0]).unwrap(), Totals::new(2, vec![1e10, 2e10]).unwrap());
    let found = bootstrap(&baseline, &other, Alpha::default(), 1000, 1).unwrap();
    assert!(found.difference.low <= found.difference.high);
    assert_eq!(found.lift, Err(NotEstimable::OutOfRange));
}
