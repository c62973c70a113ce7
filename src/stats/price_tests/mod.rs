//! Prices and posteriors against other implementations: every case of `vectors/price*.json`, which
//! `scripts/oracles/price.py` wrote.

mod coverage;
mod properties;

use serde::Deserialize;

use super::gauss::{below, critical, unit_loss};
use super::price::lambert_w_of_exp;
use super::*;

/// That of an interval which leaves out the rest.
fn level(level: f64) -> Alpha {
    Alpha::new(1.0 - level).unwrap()
}

#[derive(Deserialize)]
struct Vectors {
    normals: Normals,
    arms: Vec<Arms>,
    betas: Vec<Beta>,
    pairs: Vec<Pair>,
    arcs: Vec<Arc>,
    demands: Vec<Demand>,
    lamberts: Vec<Lambert>,
    break_evens: Vec<BreakEven>,
}

#[derive(Deserialize)]
struct Normals {
    cases: Vec<Normal>,
    critical: Vec<Critical>,
}

#[derive(Deserialize)]
struct Normal {
    z: f64,
    below: f64,
    loss: f64,
}

#[derive(Deserialize)]
struct Critical {
    level: f64,
    z: f64,
}

#[derive(Deserialize)]
struct Arms {
    arms: Vec<(f64, f64)>,
    best: Vec<f64>,
    loss: Vec<f64>,
}

#[derive(Deserialize)]
struct Beta {
    x: u64,
    n: u64,
    prior: String,
    rate: f64,
    below: f64,
    above: f64,
}

#[derive(Deserialize)]
struct Pair {
    one: (u64, u64),
    other: (u64, u64),
    prior: String,
    above: f64,
}

#[derive(Deserialize)]
struct Arc {
    prices: (f64, f64),
    counts: [(u64, u64); 2],
    level: f64,
    estimate: f64,
    se: f64,
    low: f64,
    high: f64,
}

#[derive(Deserialize)]
struct Demand {
    points: Vec<(f64, u64, u64)>,
    query: f64,
    cost: f64,
    level: f64,
    a: f64,
    b: f64,
    cov: [f64; 3],
    deviance: f64,
    pearson: f64,
    fit_p: f64,
    rate: [f64; 3],
    elasticity: [f64; 3],
    optimum: Option<Optimum>,
}

#[derive(Deserialize)]
struct Optimum {
    price: f64,
    se: f64,
    low: f64,
    high: f64,
    per_thousand: f64,
}

#[derive(Deserialize)]
struct Lambert {
    y: f64,
    w: f64,
}

#[derive(Deserialize)]
struct BreakEven {
    old: f64,
    new: f64,
    cost: f64,
    drop: f64,
}

#[derive(Deserialize)]
struct Effects {
    effects: Vec<Effect>,
}

#[derive(Deserialize)]
struct Effect {
    control: (u64, f64, f64),
    treatment: (u64, f64, f64),
    prior: Option<NormalPrior>,
    level: f64,
    mean: f64,
    sd: f64,
    low: f64,
    high: f64,
    win: f64,
    loss_of_control: f64,
    loss_of_treatment: f64,
}

#[derive(Deserialize)]
struct NormalPrior {
    mean: f64,
    sd: f64,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../vectors/price.json")).expect("a file of vectors")
}

fn of(successes: u64, n: u64) -> Proportion {
    Proportion::new(successes, n).unwrap()
}

fn posterior(data: Proportion, prior: &str) -> BetaPosterior {
    BetaPosterior::of(data, if prior == "uniform" { BetaPrior::Uniform } else { BetaPrior::Jeffreys })
}

/// Equal to 9 digits, or to so much of `scale`.
#[track_caller]
fn near(ours: f64, theirs: f64, scale: f64, what: impl std::fmt::Debug) {
    let apart = (ours - theirs).abs();
    assert!(apart <= 1e-9 * theirs.abs().max(scale), "{ours:e} is not {theirs:e} of {what:?}");
}

#[test]
fn normal_distribution() {
    let Normals { cases, critical: levels } = vectors().normals;
    for v in &cases {
        near(below(v.z), v.below, 0.0, v.z);
        near(unit_loss(v.z), v.loss, 0.0, v.z);
    }
    // 1 − a tiny level is rounded.
    for v in levels.iter().filter(|v| v.level > 1e-6) {
        near(critical(level(v.level)), v.z, 0.0, v.level);
    }
    assert!(cases.len() >= 70 && levels.len() >= 60);
}

#[test]
fn effects_of_gbstats() {
    let Effects { effects } = serde_json::from_str(include_str!("../vectors/price_effect.json")).unwrap();
    for v in &effects {
        let [control, treatment] =
            [v.control, v.treatment].map(|(n, sum, squares)| Sample::from_sums(n, sum, squares).unwrap());
        let prior = match v.prior {
            Some(NormalPrior { mean, sd }) => Prior::Normal { mean, sd },
            None => Prior::Flat,
        };
        let ours = bayesian_effect(control, treatment, prior, level(v.level)).unwrap();
        let what = (v.control, v.treatment);
        near(ours.difference.mean(), v.mean, v.sd, what);
        near(ours.difference.sd(), v.sd, 0.0, what);
        near(ours.interval.low, v.low, v.sd, what);
        near(ours.interval.high, v.high, v.sd, what);
        near(ours.chance_to_win, v.win, 0.0, what);
        near(ours.loss_of_control, v.loss_of_control, 0.0, what);
        near(ours.loss_of_treatment, v.loss_of_treatment, 0.0, what);
    }
    assert_eq!((effects[0].control.0, effects.len()), (1000, 77));
    assert!((effects[0].win - 0.943_212_6).abs() < 1e-7, "the golden case of the design");
}

#[test]
fn best_of_arms() {
    let all = vectors().arms;
    for v in &all {
        let arms: Vec<_> = v.arms.iter().map(|(mean, sd)| Posterior::new(*mean, *sd).unwrap()).collect();
        let ours = best_arm(&arms).unwrap();
        for (arm, (best, loss)) in ours.iter().zip(v.best.iter().zip(&v.loss)) {
            near(arm.best, *best, 0.0, &v.arms);
            near(arm.expected_loss, *loss, 0.0, &v.arms);
        }
    }
    assert!(all.len() >= 50);
}

#[test]
fn beta_posteriors() {
    let all = vectors().betas;
    for v in &all {
        let what = (v.x, v.n, &v.prior, v.rate);
        let (this, mirrored) = (posterior(of(v.x, v.n), &v.prior), posterior(of(v.n - v.x, v.n), &v.prior));
        near(this.chance_below(v.rate), v.below, 0.0, what);
        // 1 − a small rate is rounded.
        if v.rate > 0.01 {
            near(mirrored.chance_below(1.0 - v.rate), v.above, 0.0, what);
        }
        // Where the probability has its digits, the rate comes back.
        if v.below > 0.0 && v.below <= 0.5 {
            near(this.quantile(v.below).unwrap(), v.rate, 0.0, what);
        }
        if v.above > 1e-5 && v.above < 0.5 {
            near(this.interval(Alpha::new(2.0 * v.above).unwrap()).high, v.rate, 0.0, what);
        }
    }
    assert!(all.len() >= 150, "{}", all.len());
}

#[test]
fn beta_comparisons() {
    let all = vectors().pairs;
    for v in &all {
        let (one, other) =
            (posterior(of(v.one.0, v.one.1), &v.prior), posterior(of(v.other.0, v.other.1), &v.prior));
        let above = one.chance_above(&other);
        near(above, v.above, 0.0, (v.one, v.other, &v.prior));
        near(above + other.chance_above(&one), 1.0, 0.0, (v.one, v.other));
    }
    assert_eq!(all.len(), 54);
}

#[test]
fn arc_elasticities() {
    let all = vectors().arcs;
    for v in &all {
        let [one, other] = v.counts.map(|(x, n)| of(x, n));
        let ours = arc_elasticity((v.prices.0, one), (v.prices.1, other), level(v.level)).unwrap();
        let what = (v.prices, v.counts);
        near(ours.estimate, v.estimate, 0.0, what);
        near(ours.standard_error, v.se, 0.0, what);
        near(ours.interval.low, v.low, v.se, what);
        near(ours.interval.high, v.high, v.se, what);
        // Elasticity is the same from either side.
        let back = arc_elasticity((v.prices.1, other), (v.prices.0, one), level(v.level)).unwrap();
        near(back.estimate, v.estimate, 0.0, what);
        near(back.interval.low, v.low, v.se, what);
    }
    assert!(all.len() >= 56);
}

#[test]
fn demand_curves() {
    let (all, mut optima) = (vectors().demands, 0);
    for v in &all {
        let groups: Vec<_> = v.points.iter().map(|(price, x, n)| (*price, of(*x, *n))).collect();
        let ours = fit_demand(&groups).unwrap_or_else(|e| panic!("{e} {:?}", v.points));
        let (what, se) = (&v.points, [v.cov[0].sqrt(), v.cov[2].sqrt()]);
        // Flat demand of 10⁹ users has a slope of nothing; what counts is its error.
        near(ours.intercept, v.a, 1e-3 * se[0], what);
        near(ours.slope, v.b, 1e-3 * se[1], what);
        near(ours.covariance[0][0], v.cov[0], 0.0, what);
        near(ours.covariance[0][1], v.cov[1], 0.0, what);
        near(ours.covariance[1][1], v.cov[2], 0.0, what);
        near(ours.deviance, v.deviance, 1e-3, what);
        near(ours.pearson, v.pearson, 1e-3, what);
        near(ours.fit_p, v.fit_p, 0.0, what);
        assert_eq!(ours.residual_df, v.points.len() as u64 - 2);
        let rate = ours.rate_at(v.query, level(v.level)).unwrap();
        near(rate.estimate, v.rate[0], 0.0, what);
        near(rate.interval.low, v.rate[1], 0.0, what);
        near(rate.interval.high, v.rate[2], 0.0, what);
        let elasticity = ours.elasticity_at(v.query, level(v.level)).unwrap();
        let width = v.elasticity[2] - v.elasticity[1];
        near(elasticity.estimate, v.elasticity[0], width, what);
        near(elasticity.interval.low, v.elasticity[1], width, what);
        near(elasticity.interval.high, v.elasticity[2], width, what);
        let margin = ours.margin_at(v.query, v.cost, level(v.level)).unwrap();
        near(margin.estimate, 1000.0 * (v.query - v.cost) * v.rate[0], 0.0, what);
        assert!(margin.interval.contains(margin.estimate));
        let outside = v.query < v.points[0].0 || v.query > v.points[v.points.len() - 1].0;
        assert!([rate, elasticity, margin].iter().all(|at| at.extrapolated == outside));

        let best = ours.optimal_price(v.cost, level(v.level));
        let Some(theirs) = &v.optimum else {
            assert_eq!(best, Err(NotEstimable::DemandNotFalling), "{what:?}");
            continue;
        };
        let best = best.unwrap();
        near(best.price, theirs.price, 0.0, what);
        near(best.standard_error, theirs.se, 0.0, what);
        near(best.interval.low, theirs.low, 0.0, what);
        near(best.interval.high, theirs.high, 0.0, what);
        near(best.per_thousand, theirs.per_thousand, 0.0, what);
        near(
            ours.margin_at(best.price, v.cost, level(v.level)).unwrap().estimate,
            best.per_thousand,
            0.0,
            what,
        );
        optima += 1;
    }
    assert!(all.len() >= 75 && optima >= 50, "{optima} of {}", all.len());
}

#[test]
fn golden_curve() {
    let curve = fit_demand(&[(19.0, of(120, 1000)), (29.0, of(90, 1000)), (39.0, of(60, 1000))]).unwrap();
    let best = curve.optimal_price(0.0, level(0.95)).unwrap();
    assert!((curve.intercept - -1.268_660_3).abs() < 5e-8 && (curve.slope - -0.037_337_4).abs() < 5e-8);
    assert!((best.price - 29.304_496).abs() < 5e-7 && (best.standard_error - 5.813).abs() < 5e-4);
    assert!(!best.extrapolated);
}

#[test]
fn lambert() {
    let all = vectors().lamberts;
    for v in &all {
        near(lambert_w_of_exp(v.y), v.w, 0.0, v.y);
    }
    assert!(all.len() >= 60);
}

#[test]
fn break_even() {
    let all = vectors().break_evens;
    for v in &all {
        near(break_even_drop(v.old, v.new, v.cost).unwrap(), v.drop, 0.0, (v.old, v.new, v.cost));
    }
    assert!(all.len() >= 60);
}

/// By derivatives that are taken numerically, and the covariance over the unscaled price: another way than that of the curve.
#[test]
fn what_a_price_earns_beyond_another() {
    let of_1000 = |buyers| of(buyers, 1000);
    let curve = fit_demand(&[(19.0, of_1000(220)), (29.0, of_1000(160)), (39.0, of_1000(90))]).unwrap();
    for (one, other, cost) in [(31.0, 19.0, 0.0), (19.0, 39.0, 12.5), (24.0, 29.0, 3.0)] {
        let value = |a: f64, b: f64| {
            let rate = |p: f64| 1.0 / (1.0 + (-(a + b * p)).exp());
            1000.0 * ((one - cost) * rate(one) - (other - cost) * rate(other))
        };
        let (a, b, e) = (curve.intercept, curve.slope, 1e-5);
        let by = [
            (value(a + e, b) - value(a - e, b)) / (2.0 * e),
            (value(a, b + e / 30.0) - value(a, b - e / 30.0)) / (2.0 * e / 30.0),
        ];
        let [[aa, ab], [_, bb]] = curve.covariance;
        let variance = by[0] * by[0] * aa + 2.0 * by[0] * by[1] * ab + by[1] * by[1] * bb;
        let found = curve.margin_beyond(one, other, cost).unwrap();
        assert!((found.mean() - value(a, b)).abs() < 1e-8, "{one} {other}");
        assert!((found.sd() / variance.sqrt() - 1.0).abs() < 1e-5, "{} {}", found.sd(), variance.sqrt());
    }
    let more = curve.rate_beyond(19.0, 39.0).unwrap();
    assert!(more.mean() > 0.1 && more.chance_above(0.0) > 0.9999);
    assert_eq!(curve.rate_beyond(19.0, 19.0), Err(NotEstimable::OutOfRange));
    assert_eq!(curve.margin_beyond(-1.0, 19.0, 0.0), Err(NotEstimable::OutOfRange));
}
