//! What holds for any input, and what is refused.

use super::level;
use proptest::prelude::*;

use super::super::*;
use super::of;

/// Any double at all, and those that break code.
fn any_number() -> impl Strategy<Value = f64> {
    let special =
        vec![0.0, -0.0, 1.0, -1.0, f64::MAX, f64::MIN_POSITIVE, 5e-324, f64::INFINITY, f64::NAN, 1e12, 1e-6];
    prop_oneof![any::<f64>(), -100.0..100.0, proptest::sample::select(special)]
}

fn any_alpha() -> impl Strategy<Value = Alpha> {
    prop_oneof![4 => 0.001..0.99, 1 => proptest::sample::select(vec![1e-15, 1.0 - 1e-16])]
        .prop_map(|alpha| Alpha::new(alpha).unwrap())
}

fn any_proportion() -> impl Strategy<Value = Proportion> {
    let n = prop_oneof![0..3_u64, 0..2000_u64, 0..1_000_000_000_u64, any::<u64>()];
    let part = |n: u64| prop_oneof![3 => 0..=n, 1 => Just(0), 1 => Just(n)];
    n.prop_flat_map(move |n| part(n).prop_map(move |x| of(x, n)))
}

fn any_sample() -> impl Strategy<Value = Sample> {
    (prop_oneof![0..4_u64, any::<u64>()], any_number(), any_number()).prop_map(|(n, mean, deviations)| {
        Sample::from_deviations(n, mean, deviations.abs()).unwrap_or_default()
    })
}

fn sane(interval: Interval) -> bool {
    interval.low <= interval.high
}

fn share(x: f64) -> bool {
    (0.0..=1.0).contains(&x)
}

fn arms(k: usize) -> impl Strategy<Value = Vec<Posterior>> {
    proptest::collection::vec((-10.0..10.0, -3.0..1.0), 2..=k)
        .prop_map(|all| all.into_iter().map(|(m, s)| Posterior::new(m, 10_f64.powf(s)).unwrap()).collect())
}

/// Three to five prices with falling demand.
fn experiment() -> impl Strategy<Value = Vec<(f64, Proportion)>> {
    let point = (1.0..9.0, 500..100_000_u64, 0.2..1.0);
    (0.05..0.5, proptest::collection::vec(point, 3..=5)).prop_map(|(first, points)| {
        let (mut price, mut rate) = (5.0, first);
        let each = points.into_iter().map(|(step, n, left)| {
            price += step;
            rate *= left;
            (price, of((rate * n as f64) as u64 + 1, n))
        });
        each.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_input_breaks_two_arms(one in any_sample(), other in any_sample(), alpha in any_alpha(), mean in any_number(),
                                sd in any_number(), flat: bool) {
        let prior = if flat { Prior::Flat } else { Prior::Normal { mean, sd } };
        if let Ok(effect) = bayesian_effect(one, other, prior, alpha) {
            prop_assert!(share(effect.chance_to_win) && sane(effect.interval));
            prop_assert!(effect.loss_of_control >= 0.0 && effect.loss_of_treatment >= 0.0);
        }
    }

    #[test]
    fn no_input_breaks_prices(groups in proptest::collection::vec((any_number(), any_proportion()), 0..6),
                              cost in any_number(), at in any_number(), alpha in any_alpha()) {
        if let [one, other, ..] = groups[..] && let Ok(found) = arc_elasticity(one, other, alpha) {
            prop_assert!(sane(found.interval) && found.standard_error >= 0.0);
        }
        if let Ok(drop) = break_even_drop(cost, at, 0.5 * at) {
            prop_assert!(drop <= 1.0);
        }
        if let Ok(curve) = fit_demand(&groups) {
            prop_assert!(share(curve.fit_p) && curve.deviance >= 0.0 && curve.pearson >= 0.0);
            for found in [curve.rate_at(at, alpha), curve.elasticity_at(at, alpha), curve.margin_at(at, cost, alpha)] {
                prop_assert!(found.is_err() || found.is_ok_and(|found| sane(found.interval) && found.estimate.is_finite()));
            }
            if let Ok(best) = curve.optimal_price(cost, alpha) {
                prop_assert!(best.price >= cost && best.interval.contains(best.price) && best.standard_error >= 0.0);
                prop_assert!(best.per_thousand >= 0.0);
            }
        }
    }

    #[test]
    fn two_arms_are_the_difference(all in arms(2)) {
        let sd = all[0].sd().hypot(all[1].sd());
        let difference = Posterior::new(all[1].mean() - all[0].mean(), sd).unwrap();
        prop_assert!((best_arm(&all).unwrap()[1].best - difference.chance_above(0.0)).abs() < 1e-10);
    }

    #[test]
    fn cents_are_as_good_as_dollars(groups in experiment(), cost in 0.0..5.0, at in 0.0..50.0) {
        let cents: Vec<_> = groups.iter().map(|(price, data)| (price * 100.0, *data)).collect();
        let same = |one: f64, other: f64| (one - other).abs() <= 1e-9 * one.abs().max(1e-9);
        let (a, b) = (arc_elasticity(groups[0], groups[1], level(0.9)), arc_elasticity(cents[0], cents[1], level(0.9)));
        prop_assert!(same(a.unwrap().estimate, b.unwrap().estimate));
        let (Ok(curve), Ok(in_cents)) = (fit_demand(&groups), fit_demand(&cents)) else { return Ok(()) };
        prop_assert!(same(curve.slope, in_cents.slope * 100.0) && same(curve.fit_p, in_cents.fit_p));
        let (one, other) = (curve.elasticity_at(at, level(0.9)).unwrap(), in_cents.elasticity_at(at * 100.0, level(0.9)).unwrap());
        prop_assert!(same(one.estimate, other.estimate) && same(one.interval.low, other.interval.low));
        if let (Ok(one), Ok(other)) = (curve.optimal_price(cost, level(0.9)), in_cents.optimal_price(cost * 100.0, level(0.9))) {
            prop_assert!(same(one.price * 100.0, other.price) && same(one.standard_error * 100.0, other.standard_error));
            prop_assert!(same(one.interval.low * 100.0, other.interval.low) && same(one.interval.high * 100.0, other.interval.high));
            prop_assert!(same(one.per_thousand * 100.0, other.per_thousand));
        }
    }

    #[test]
    fn no_price_earns_more_than_the_best(groups in experiment(), cost in 0.0..5.0, other in 0.0..200.0) {
        let Ok(curve) = fit_demand(&groups) else { return Ok(()) };
        let Ok(best) = curve.optimal_price(cost, level(0.9)) else { return Ok(()) };
        let there = curve.margin_at(other, cost, level(0.9)).unwrap().estimate;
        prop_assert!(there <= best.per_thousand * (1.0 + 1e-12));
        prop_assert!((curve.margin_at(best.price, 0.0, level(0.9)).unwrap().extrapolated) == best.extrapolated);
    }

    #[test]
    fn the_order_of_prices_does_not_matter(groups in experiment()) {
        let mut reversed = groups.clone();
        reversed.reverse();
        prop_assert_eq!(fit_demand(&groups), fit_demand(&reversed));
    }
}

proptest! {
    // A comparison takes 60,000 densities, which a debug build feels.
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chances_sum_to_one_in_any_order(mut all in arms(4)) {
        let chances = best_arm(&all).unwrap();
        prop_assert!((chances.iter().map(|arm| arm.best).sum::<f64>() - 1.0).abs() < 1e-9);
        all.reverse();
        for (one, other) in chances.iter().rev().zip(best_arm(&all).unwrap()) {
            prop_assert!((one.best - other.best).abs() < 1e-12);
            prop_assert!((one.expected_loss - other.expected_loss).abs() < 1e-12 * (1.0 + one.expected_loss));
        }
    }

    #[test]
    fn no_input_breaks_rates(one in any_proportion(), other in any_proportion(), rate in any_number(), alpha in any_alpha()) {
        let [one, other] = [one, other].map(|data| BetaPosterior::of(data, BetaPrior::Jeffreys));
        prop_assert!(share(one.mean()) && share(one.chance_below(rate)) && share(one.chance_above(&other)));
        let interval = one.interval(alpha);
        prop_assert!(sane(interval) && share(interval.low) && share(interval.high));
        if let Ok(quantile) = one.quantile(rate) {
            prop_assert!(share(quantile));
        }
    }
}

#[test]
fn groups_of_one_price_are_one() {
    let [once, again] = [(29.0, of(40, 500)), (29.0, of(50, 500))];
    let whole = fit_demand(&[(19.0, of(120, 1000)), (29.0, of(90, 1000)), (39.0, of(60, 1000))]).unwrap();
    let parts = [(19.0, of(120, 1000)), once, (39.0, of(60, 1000)), again, (99.0, of(0, 0))];
    assert_eq!(fit_demand(&parts).unwrap(), whole);
}

#[test]
fn what_cannot_be_told_is_refused() {
    let (some, none, all) = (of(90, 1000), of(0, 1000), of(1000, 1000));
    let refused = |result: Result<DemandCurve, NotEstimable>| result.unwrap_err().to_string();
    assert_eq!(
        refused(fit_demand(&[(19.0, some), (29.0, some), (29.0, some)])),
        "3 different prices are needed, and 2 are there"
    );
    assert_eq!(
        refused(fit_demand(&[(1.0, none), (2.0, none), (3.0, none)])),
        "1 buyers are needed, and 0 are there"
    );
    assert_eq!(refused(fit_demand(&[(1.0, all), (2.0, all), (3.0, all)])), "all users are the same");
    let separated =
        [[all, none, none], [all, some, none], [none, none, all], [none, some, all], [some, none, none]];
    for [one, two, three] in separated {
        assert_eq!(fit_demand(&[(1.0, one), (2.0, two), (3.0, three)]), Err(NotEstimable::Separated));
    }
    assert!(fit_demand(&[(1.0, none), (2.0, some), (3.0, none)]).is_ok(), "flat, and with a bad fit");
    assert_eq!(fit_demand(&[(-1.0, some), (2.0, some), (3.0, some)]), Err(NotEstimable::OutOfRange));
    assert_eq!(fit_demand(&[(f64::NAN, some), (2.0, some), (3.0, some)]), Err(NotEstimable::OutOfRange));

    let rising = fit_demand(&[(1.0, of(10, 1000)), (2.0, of(20, 1000)), (3.0, of(40, 1000))]).unwrap();
    assert_eq!(rising.optimal_price(0.0, level(0.95)), Err(NotEstimable::DemandNotFalling));
    let hardly = fit_demand(&[(1.0, of(30, 1000)), (2.0, of(25, 1000)), (3.0, of(24, 1000))]).unwrap();
    assert_eq!(hardly.optimal_price(0.0, level(0.95)), Err(NotEstimable::DemandNotFalling));
    assert_eq!(hardly.optimal_price(-1.0, level(0.95)), Err(NotEstimable::OutOfRange));

    let arc =
        |p0, one, p1, other| arc_elasticity((p0, one), (p1, other), level(0.95)).unwrap_err().to_string();
    assert_eq!(arc(19.0, some, 29.0, none), "1 buyers at one of the prices are needed, and 0 are there");
    assert_eq!(arc(19.0, some, 19.0, some), "2 different prices are needed, and 1 are there");
    assert_eq!(arc(19.0, some, 29.0, of(0, 0)), "1 users at one of the prices are needed, and 0 are there");
    assert_eq!(arc(19.0, all, 29.0, some), "all users at one of the prices are the same");
    assert_eq!(arc(19.0, some, f64::INFINITY, some), "the numbers are beyond what can be calculated");

    assert_eq!(break_even_drop(10.0, 20.0, 10.0), Err(NotEstimable::NoMargin));
    assert_eq!(break_even_drop(20.0, 10.0, 10.0), Err(NotEstimable::NoMargin));
    assert_eq!(break_even_drop(0.0, 10.0, 0.0), Err(NotEstimable::NoMargin));
    assert_eq!(break_even_drop(20.0, 10.0, 0.0), Ok(-1.0), "half the price needs twice the buyers");

    let (one, same) = (Sample::of(&[1.0]).unwrap(), Sample::of(&[2.0, 2.0]).unwrap());
    let various = Sample::of(&[1.0, 2.0]).unwrap();
    let effect = |one, other| bayesian_effect(one, other, Prior::Flat, level(0.95)).unwrap_err().to_string();
    assert_eq!(effect(one, various), "2 users are needed, and 1 are there");
    assert_eq!(effect(various, same), "all users of an arm are the same");
    let nonsense = Prior::Normal { mean: 0.0, sd: -1.0 };
    assert!(bayesian_effect(various, various, nonsense, level(0.95)).is_err());
    assert_eq!(
        best_arm(&[Posterior::new(1.0, 1.0).unwrap()]).unwrap_err().to_string(),
        "2 arms are needed, and 1 are there"
    );
}
