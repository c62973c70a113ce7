//! Two prices: the elasticity between them, and what a rise may cost in conversion.

use super::gauss::{critical, finite};
use super::{Alpha, Interval, NotEstimable, Proportion};

/// How strongly conversion answers to the price, between two prices: −2 means that 1 % more costs 2 % of the buyers.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Elasticity {
    /// The arc elasticity: the relative change of conversion by that of the price, both of the middle. No unit.
    pub estimate: f64,
    /// Its standard error, by the delta method.
    pub standard_error: f64,
    /// Its confidence interval, which is not symmetric.
    pub interval: Interval,
}

/// The arc (midpoint) elasticity of conversion between two prices, each with its buyers of its users.
///
/// Two prices have an elasticity and no optimum: a curve needs three ([`fit_demand`](crate::stats::fit_demand)). The prices
/// are in one currency, any unit. The interval leaves out a share of `alpha`.
///
/// Source: Allen, "The concept of arc elasticity of demand", *Review of Economic Studies* 1 (1934). The elasticity is a
/// function of the ratio of the two rates, tanh(½ ln ratio), so its interval is that of the ratio by the delta method on the
/// logarithm (Katz et al., *Biometrics* 34, 1978). On the plain scale a 95 % interval covers 90 % where 5 of 500 buy.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) where nobody bought at one of the prices, or the prices are the same;
/// [`NoVariance`](NotEstimable::NoVariance) where all bought at one; [`OutOfRange`](NotEstimable::OutOfRange) for a price that
/// is negative or not finite.
///
/// ```
/// use lastprice::stats::{Alpha, Proportion, arc_elasticity};
///
/// let (at_19, at_29) = (Proportion::new(120, 1000)?, Proportion::new(90, 1000)?);
/// let found = arc_elasticity((19.0, at_19), (29.0, at_29), Alpha::default())?;
/// assert!((found.estimate - -0.6857).abs() < 0.0001);
/// assert!(found.interval.contains(-1.0), "revenue may rise or fall");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn arc_elasticity(
    one: (f64, Proportion),
    other: (f64, Proportion),
    alpha: Alpha,
) -> Result<Elasticity, NotEstimable> {
    let (p0, p1) = (price(one.0)?, price(other.0)?);
    let z = critical(alpha);
    if p0 == p1 {
        return Err(NotEstimable::TooFew { what: "different prices", needed: 2, got: 1 });
    }
    let (q0, q1) = (rate(one.1)?, rate(other.1)?);
    let of_prices = finite((p1 - p0) / (0.5 * p0 + 0.5 * p1))?;
    // ln(q1/q0), and its variance.
    let ratio = (q1 / q0).ln();
    let deviation = (variance_of_ln(one.1) + variance_of_ln(other.1)).sqrt();
    let at = |ratio: f64| 2.0 * (0.5 * ratio).tanh() / of_prices;
    let (end, other_end) = (at(ratio - z * deviation), at(ratio + z * deviation));
    // (q1 − q0) by the middle, of counts: the rates of two arms of 10⁹ users may differ in the last digits only.
    let (of_0, of_1) = (cross(one.1, other.1), cross(other.1, one.1));
    let apart = of_1.abs_diff(of_0) as f64 / (0.5 * of_0 as f64 + 0.5 * of_1 as f64);
    let estimate = if of_1 < of_0 { -apart } else { apart } / of_prices;
    let slope = 4.0 * (q0 / (q0 + q1)) * (q1 / (q0 + q1)) / of_prices;
    Ok(Elasticity {
        estimate: finite(estimate)?,
        standard_error: finite(slope.abs() * deviation)?,
        interval: Interval { low: end.min(other_end), high: end.max(other_end) },
    })
}

/// The largest relative drop of conversion at which the new price earns as much per user as the old one: 0.25 for a quarter
/// of the buyers. Negative if the new price is lower: then conversion has to rise by so much.
///
/// 1 − (old − cost) / (new − cost), with the unit cost 0 for revenue. Prices and cost are in one currency, any unit. Source:
/// Nagle and Müller, *The Strategy and Tactics of Pricing*, 6th ed., chapter 9 ("breakeven sales change").
///
/// # Errors
///
/// [`NoMargin`](NotEstimable::NoMargin) where one of the prices does not exceed the cost;
/// [`OutOfRange`](NotEstimable::OutOfRange) for a price or a cost that is negative or not finite.
///
/// ```
/// use lastprice::stats::break_even_drop;
///
/// assert_eq!(break_even_drop(20.0, 25.0, 0.0)?, 0.2);
/// assert_eq!(break_even_drop(20.0, 25.0, 15.0)?, 0.5); // the margin doubles
/// assert!(break_even_drop(20.0, 25.0, 20.0).is_err());
/// # Ok::<(), lastprice::stats::NotEstimable>(())
/// ```
pub fn break_even_drop(old: f64, new: f64, cost: f64) -> Result<f64, NotEstimable> {
    let (old, new, cost) = (price(old)?, price(new)?, unit_cost(cost)?);
    if old <= cost || new <= cost {
        return Err(NotEstimable::NoMargin);
    }
    finite((new - old) / (new - cost))
}

/// A price that can be computed with.
pub(super) fn price(price: f64) -> Result<f64, NotEstimable> {
    if price >= 0.0 { finite(price) } else { Err(NotEstimable::OutOfRange) }
}

/// A unit cost that can be computed with.
pub(super) fn unit_cost(cost: f64) -> Result<f64, NotEstimable> {
    price(cost).map_err(|_| NotEstimable::OutOfRange)
}

fn rate(data: Proportion) -> Result<f64, NotEstimable> {
    match data.rate() {
        None => Err(NotEstimable::TooFew { what: "users at one of the prices", needed: 1, got: 0 }),
        Some(0.0) => Err(NotEstimable::TooFew { what: "buyers at one of the prices", needed: 1, got: 0 }),
        Some(1.0) => Err(NotEstimable::NoVariance { what: "users at one of the prices" }),
        Some(rate) => Ok(rate),
    }
}

/// The rate of one, times the users of both.
fn cross(one: Proportion, other: Proportion) -> u128 {
    u128::from(one.successes()) * u128::from(other.n())
}

/// The variance of the logarithm of a rate: (1 − q)/(n q).
fn variance_of_ln(data: Proportion) -> f64 {
    let others = (data.n() - data.successes()) as f64;
    others / data.n() as f64 / data.successes() as f64
}
