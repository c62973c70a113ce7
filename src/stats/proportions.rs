//! Shares: conversion.

use super::special::{chi_squared_tail, ln_binomial, normal_quantile};
use super::{Alpha, Interval, NotEstimable, Proportion};

/// Where the share of buyers lies, by Wilson's (1927) score interval: within 0 to 1, and good for few buyers or none.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) of nobody.
///
/// ```
/// use lastprice::stats::{wilson, Alpha, Proportion};
///
/// let nobody_of_100 = wilson(Proportion::new(0, 100)?, Alpha::default())?;
/// assert_eq!(nobody_of_100.low, 0.0);
/// assert!((nobody_of_100.high - 0.0370).abs() < 1e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn wilson(share: Proportion, alpha: Alpha) -> Result<Interval, NotEstimable> {
    let rate = rate(share)?;
    let z = normal_quantile(0.5 * alpha.get());
    let (n, square) = (share.n() as f64, z * z);
    let successes = share.successes() as f64;
    let root = z * (square + 4.0 * successes * (1.0 - rate)).sqrt();
    let high = ((2.0 * successes + square + root) / (2.0 * (n + square))).min(1.0);
    // The other root of the same equation: the product of both is known, their difference would cancel.
    let low = successes * rate / (n + square) / high;
    Ok(Interval { low: low.min(rate), high: high.max(rate) })
}

/// By what test a p value was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProportionTest {
    /// Fisher's exact test: where fewer than 5 buyers or non-buyers are expected in an arm (Cochran 1954).
    Fisher,
    /// Pearson's chi-squared test, without a correction for continuity: everywhere else.
    ChiSquared,
}

/// How different two shares are.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct ProportionDifference {
    /// Other − baseline, from −1 to 1: 0.01 is one percentage point more.
    pub difference: f64,
    /// Where the difference lies, by Newcombe's (1998) hybrid score interval, method 10.
    pub interval: Interval,
    /// Two-sided. Of another kind than the interval: near alpha, one may exclude 0 where the other does not.
    pub p_value: f64,
    /// By what test.
    pub test: ProportionTest,
}

/// Compares the share of buyers of two arms, at one look that was planned. For looks at any time, take
/// [`difference`](super::difference) of both as [`Sample`](super::Sample)s, and [`always_valid`](super::Estimate::always_valid).
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) if there is nobody in an arm. No buyers at all is no reason: the difference is 0, as far as known.
///
/// ```
/// use lastprice::stats::{compare_proportions, Alpha, Proportion, ProportionTest};
///
/// let few = compare_proportions(Proportion::new(0, 40)?, Proportion::new(6, 40)?, Alpha::default())?;
/// assert_eq!((few.difference, few.test), (0.15, ProportionTest::Fisher));
/// assert!((few.p_value - 0.02555).abs() < 1e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn compare_proportions(
    baseline: Proportion,
    other: Proportion,
    alpha: Alpha,
) -> Result<ProportionDifference, NotEstimable> {
    let (a, b) = (rate(baseline)?, rate(other)?);
    let (of_a, of_b) = (wilson(baseline, alpha)?, wilson(other, alpha)?);
    let difference = b - a;
    let table = Table::of(baseline, other);
    let (test, p_value) = if table.is_small() {
        (ProportionTest::Fisher, table.fisher())
    } else {
        (ProportionTest::ChiSquared, table.chi_squared())
    };
    Ok(ProportionDifference {
        difference,
        interval: Interval {
            low: difference - (b - of_b.low).hypot(of_a.high - a),
            high: difference + (of_b.high - b).hypot(a - of_a.low),
        },
        p_value,
        test,
    })
}

fn rate(share: Proportion) -> Result<f64, NotEstimable> {
    share.rate().ok_or(NotEstimable::TooFew { what: "users of an arm", needed: 1, got: 0 })
}

/// Two arms, buyers and others; turned so that `n` are the users of the smaller arm, `m` the rarer of buyers and others, and `k` both.
struct Table {
    k: f64,
    n: f64,
    m: f64,
    total: f64,
}

impl Table {
    fn of(baseline: Proportion, other: Proportion) -> Self {
        let (small, large) = if baseline.n() <= other.n() { (baseline, other) } else { (other, baseline) };
        let (k, n) = (small.successes() as f64, small.n() as f64);
        let (m, total) = (k + large.successes() as f64, n + large.n() as f64);
        let k_of_others = (small.n() - small.successes()) as f64;
        let others = k_of_others + (large.n() - large.successes()) as f64;
        if m <= others { Table { k, n, m, total } } else { Table { k: k_of_others, n, m: others, total } }
    }

    /// Whether a cell of the table is expected to have fewer than 5.
    fn is_small(&self) -> bool {
        self.n / self.total * self.m < 5.0
    }

    /// Pearson's chi-squared at one degree of freedom, which is the square of the pooled z.
    fn chi_squared(&self) -> f64 {
        let Table { k, n, m, total } = *self;
        let (a, b) = (k / n, (m - k) / (total - n));
        let pooled = m / total * ((total - m) / total);
        chi_squared_tail((b - a) * (b - a) / (pooled * (1.0 / n + 1.0 / (total - n))), 1)
    }

    /// The chance of all tables with the same margins that are no likelier than this one (Fisher 1935; two-sided as in R and scipy).
    /// From each end only as far as the terms matter: in a small table the counts spread over few numbers, of however many users.
    fn fisher(&self) -> f64 {
        let Table { k, n, m, total } = *self;
        let (least, most) = ((n + m - total).max(0.0), n.min(m));
        let mode = ((n + 1.0) * ((m + 1.0) / (total + 2.0))).floor().clamp(least, most);
        // Equal chances differ by rounding.
        let limit = self.ln_chance(k) + 1e-9;
        let below = last(mode, least, |x| self.ln_chance(x) > limit);
        let above = last(mode, most, |x| self.ln_chance(x) > limit);
        let (Some(below), Some(above)) = (below, above) else {
            return 1.0;
        };
        self.sum(below, least) + self.sum(above, most)
    }

    /// ln P(x of the rarer kind in the smaller arm), hypergeometric, by three binomials (Loader 2000).
    fn ln_chance(&self, x: f64) -> f64 {
        let Table { n, m, total, .. } = *self;
        let (p, q) = (n / total, (total - n) / total);
        ln_binomial(x, m, p, q) + ln_binomial(n - x, total - m, p, q) - ln_binomial(n, total, p, q)
    }

    /// The chances from the one after `from` to the `end`.
    fn sum(&self, from: f64, end: f64) -> f64 {
        let step = if end < from { -1.0 } else { 1.0 };
        let (mut x, mut sum) = (from, 0.0);
        while x != end {
            x += step;
            let chance = self.ln_chance(x).exp();
            sum += chance;
            if chance <= sum * 1e-17 {
                break;
            }
        }
        sum
    }
}

/// The last from the mode to the end, of those that are likelier, which lie together; `None` if not even the mode is.
fn last(mode: f64, end: f64, likelier: impl Fn(f64) -> bool) -> Option<f64> {
    if !likelier(mode) {
        return None;
    }
    let (mut yes, mut no) = (mode, end);
    if likelier(end) {
        return Some(end);
    }
    while (no - yes).abs() > 1.0 {
        let middle = (0.5 * (yes + no)).floor();
        if likelier(middle) { yes = middle } else { no = middle }
    }
    Some(yes)
}
