//! Simulated experiments with known demand: how often the intervals contain the truth. The seed is fixed, so are the numbers.

use super::super::price::lambert_w_of_exp;
use super::super::*;
use super::level;
use super::of;

/// splitmix64.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn buyers(&mut self, rate: f64, n: u64) -> Proportion {
        let limit = (rate * 2_f64.powi(64)) as u64;
        of((0..n).map(|_| u64::from(self.next() < limit)).sum(), n)
    }
}

fn rate(a: f64, b: f64, price: f64) -> f64 {
    1.0 / (1.0 + (-a - b * price).exp())
}

/// Shares of 1,000 experiments: those that tell a best price, and of these, those whose 95 % interval contains the true
/// one, and those whose interval by the delta method would.
fn coverage(prices: &[f64], n: u64, (a, b, cost): (f64, f64, f64)) -> (f64, f64, f64) {
    let truth = cost + (1.0 + lambert_w_of_exp(a + b * cost - 1.0)) / -b;
    let mut draws = Draws(7);
    let (mut told, mut covered, mut by_delta) = (0, 0, 0);
    for _ in 0..1000 {
        let groups: Vec<_> = prices.iter().map(|p| (*p, draws.buyers(rate(a, b, *p), n))).collect();
        let Ok(best) = fit_demand(&groups).unwrap().optimal_price(cost, level(0.95)) else { continue };
        told += 1;
        covered += i32::from(best.interval.contains(truth));
        by_delta += i32::from(Interval::around(best.price, 1.96 * best.standard_error).contains(truth));
    }
    let share = |count| f64::from(count) / f64::from(told);
    let result = (f64::from(told) / 1000.0, share(covered), share(by_delta));
    println!("{prices:?}, {n} each, {a} {b} {cost}, best {truth:.2}: {result:?}");
    result
}

#[test]
fn best_prices_are_where_they_are_said_to_be() {
    let three = [19.0, 29.0, 39.0];
    let five = [19.0, 24.0, 29.0, 34.0, 39.0];
    for (prices, demand) in [
        (&three[..], (-1.27, -0.0373, 0.0)),
        (&five[..], (-1.27, -0.0373, 0.0)),
        (&three[..], (0.0, -0.08, 0.0)),
        (&five[..], (-1.0, -0.06, 10.0)),
    ] {
        let (told, covered, _) = coverage(prices, 2000, demand);
        assert!(told > 0.95 && (0.935..=0.975).contains(&covered), "{told} {covered}");
    }
}

#[test]
fn near_prices_ask_for_more_than_the_delta_method() {
    let (told, covered, by_delta) = coverage(&[25.0, 29.0, 33.0], 2000, (-1.27, -0.0373, 0.0));
    assert!(told < 0.9 && covered > 0.94, "{told} {covered}");
    assert!(by_delta < 0.9, "{by_delta}: if it is as good, it is simpler");
}

#[test]
fn elasticities_are_where_they_are_said_to_be() {
    for (q0, q1, n) in [(0.12, 0.09, 2000), (0.02, 0.015, 2000), (0.012, 0.01, 500), (0.6, 0.4, 200)] {
        let truth = (q1 - q0) / (q0 + q1) * 48.0 / 10.0;
        let mut draws = Draws(11);
        let (mut told, mut covered) = (0, 0);
        for _ in 0..1500 {
            let (one, other) = (draws.buyers(q0, n), draws.buyers(q1, n));
            let Ok(found) = arc_elasticity((19.0, one), (29.0, other), level(0.95)) else { continue };
            told += 1;
            covered += i32::from(found.interval.contains(truth));
        }
        let share = f64::from(covered) / f64::from(told);
        println!("{q0} {q1} of {n}: {share} of {told}");
        // With 5 buyers it contains more than it says; it never contains less.
        assert!(share > 0.94 && (share < 0.97 || n == 500), "{share}");
    }
}
