//! The demand curve: a binomial logit over the price.

use super::elasticity::{price, unit_cost};
use super::gauss::{critical, finite};
use super::special::chi_squared_tail;
use super::{Alpha, Interval, NotEstimable, Proportion};

/// Conversion as a function of the price: ln(q / (1 − q)) = intercept + slope · price.
///
/// Prices are in units of one currency, and so is everything that is earned. Numbers for one price come from
/// [`rate_at`](DemandCurve::rate_at), [`elasticity_at`](DemandCurve::elasticity_at) and
/// [`margin_at`](DemandCurve::margin_at); the best one from [`optimal_price`](DemandCurve::optimal_price).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct DemandCurve {
    /// The log-odds of buying at the price 0.
    pub intercept: f64,
    /// The change of the log-odds per unit of the currency; negative where demand falls with the price.
    pub slope: f64,
    /// The covariance matrix of intercept and slope: the inverse of the Fisher information.
    pub covariance: [[f64; 2]; 2],
    /// The lowest and the highest tested price; outside, the curve is a guess.
    pub tested: Interval,
    /// How far the rates lie from the curve: twice the log-likelihood that is lost to a rate of its own for each price.
    pub deviance: f64,
    /// The same as Pearson's chi-squared.
    pub pearson: f64,
    /// Prices beyond the two that fix the curve. With 1, the test of the fit is weak: it hardly sees another shape.
    pub residual_df: u64,
    /// The p-value of the fit, of the deviance: near 0 where demand has another shape than the curve.
    pub fit_p: f64,
    #[serde(skip)]
    pub(super) line: Line,
}

/// The same curve over the scaled price, (price − middle) / half of the range: no digits are lost to prices of 10¹² that
/// differ by 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Line {
    pub(super) middle: f64,
    pub(super) half: f64,
    pub(super) a: f64,
    pub(super) b: f64,
    pub(super) var_a: f64,
    pub(super) cov: f64,
    pub(super) var_b: f64,
}

/// What the demand curve says of one price.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct AtPrice {
    /// The estimate, in the unit that the function names.
    pub estimate: f64,
    /// Its confidence interval.
    pub interval: Interval,
    /// Whether the price lies outside of the tested ones, where the interval does not know whether the curve still holds.
    pub extrapolated: bool,
}

/// Fits a demand curve to the buyers of the users of each price.
///
/// Prices in one currency, any unit; the groups of a price that comes twice are added up, and those without users left out.
/// Maximum likelihood by Fisher scoring, that is iteratively reweighted least squares. Source: McCullagh and Nelder,
/// *Generalized Linear Models*, 2nd ed., chapter 4; when it exists: Silvapulle, *JRSS B* 43 (1981).
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) than three prices, or no buyers at all; [`NoVariance`](NotEstimable::NoVariance) where all
/// bought; [`Separated`](NotEstimable::Separated); [`NotConverged`](NotEstimable::NotConverged);
/// [`OutOfRange`](NotEstimable::OutOfRange) for a price that is negative or not finite.
///
/// ```
/// use lastprice::stats::{Alpha, Proportion, fit_demand};
///
/// let of_1000 = |buyers| Proportion::new(buyers, 1000);
/// let curve = fit_demand(&[(19.0, of_1000(120)?), (29.0, of_1000(90)?), (39.0, of_1000(60)?)])?;
/// assert!((curve.slope - -0.0373374).abs() < 1e-7);
/// assert_eq!(curve.residual_df, 1);
///
/// let at_35 = curve.margin_at(35.0, 0.0, Alpha::default())?; // revenue per 1,000 users
/// assert!((at_35.estimate - 2475.0).abs() < 1.0 && !at_35.extrapolated);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn fit_demand(groups: &[(f64, Proportion)]) -> Result<DemandCurve, NotEstimable> {
    let points = distinct(groups)?;
    if points.len() < 3 {
        return Err(NotEstimable::TooFew { what: "different prices", needed: 3, got: points.len() as u64 });
    }
    refuse_separated(&points)?;
    let tested = Interval { low: points[0].price, high: points[points.len() - 1].price };
    let (middle, half) = (0.5 * tested.low + 0.5 * tested.high, 0.5 * (tested.high - tested.low));
    let line = fit(&points, middle, half)?;
    let residual_df = points.len() as u64 - 2;
    let (deviance, pearson) = (deviance(&points, &line), pearson(&points, &line));
    let curve = DemandCurve {
        intercept: line.a - line.b * (middle / half),
        slope: line.b / half,
        covariance: line.covariance_of_prices(),
        tested,
        deviance,
        pearson,
        residual_df,
        fit_p: chi_squared_tail(deviance, u32::try_from(residual_df).unwrap_or(u32::MAX)),
        line,
    };
    let [[var_a, cov], [_, var_b]] = curve.covariance;
    for value in [curve.intercept, curve.slope, var_a, cov, var_b, deviance, pearson, curve.fit_p] {
        finite(value)?;
    }
    Ok(curve)
}

impl DemandCurve {
    /// The share of users who buy at a price, from 0 to 1. The interval is Wald's, on the log-odds.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](NotEstimable::OutOfRange) for a price that is negative or not finite, or too far away.
    pub fn rate_at(&self, at: f64, alpha: Alpha) -> Result<AtPrice, NotEstimable> {
        let (t, z) = (self.line.scaled(price(at)?), critical(alpha));
        let around = z * self.line.variance_at(t).sqrt();
        let odds = finite(self.line.log_odds(t))?;
        finite(around)?;
        let interval = Interval { low: logistic(odds - around), high: logistic(odds + around) };
        Ok(self.at(at, logistic(odds), interval))
    }

    /// The elasticity of conversion at a price: slope · price · (1 − rate), without a unit. The interval is that of the delta
    /// method.
    ///
    /// # Errors
    ///
    /// Those of [`rate_at`](DemandCurve::rate_at).
    pub fn elasticity_at(&self, at: f64, alpha: Alpha) -> Result<AtPrice, NotEstimable> {
        let (line, z) = (&self.line, critical(alpha));
        let t = line.scaled(price(at)?);
        let (rate, rest) = (logistic(line.log_odds(t)), logistic(-line.log_odds(t)));
        // Price in halves of the range, as the slope is per such a half.
        let p = at / line.half;
        let variance = line.variance_of(-line.b * p * rate * rest, p * rest * (1.0 - line.b * t * rate));
        let estimate = finite(line.b * p * rest)?;
        let around = finite(z * variance.sqrt())?;
        Ok(self.at(at, estimate, Interval::around(estimate, around)))
    }

    /// What 1,000 users bring at a price: the margin over the unit cost, or with a cost of 0 the revenue. In units of the
    /// currency; below the cost it is a loss. The interval is that of the rate.
    ///
    /// # Errors
    ///
    /// Those of [`rate_at`](DemandCurve::rate_at), and [`OutOfRange`](NotEstimable::OutOfRange) for a cost that is negative or
    /// not finite.
    pub fn margin_at(&self, at: f64, cost: f64, alpha: Alpha) -> Result<AtPrice, NotEstimable> {
        let rate = self.rate_at(at, alpha)?;
        let per_sale = finite(1000.0 * (at - unit_cost(cost)?))?;
        let (one, other) = (per_sale * rate.interval.low, per_sale * rate.interval.high);
        let interval = Interval { low: one.min(other), high: one.max(other) };
        Ok(self.at(at, per_sale * rate.estimate, interval))
    }

    fn at(&self, price: f64, estimate: f64, interval: Interval) -> AtPrice {
        AtPrice { estimate, interval, extrapolated: !self.tested.contains(price) }
    }
}

impl Line {
    pub(super) fn scaled(&self, price: f64) -> f64 {
        (price - self.middle) / self.half
    }

    pub(super) fn log_odds(&self, t: f64) -> f64 {
        self.a + self.b * t
    }

    fn variance_at(&self, t: f64) -> f64 {
        self.variance_of(1.0, t)
    }

    /// The variance of a function with these derivatives by a and b.
    pub(super) fn variance_of(&self, by_a: f64, by_b: f64) -> f64 {
        let b = by_b * self.var_b;
        (by_a * (by_a * self.var_a + 2.0 * by_b * self.cov) + by_b * b).max(0.0)
    }

    fn covariance_of_prices(&self) -> [[f64; 2]; 2] {
        let shift = self.middle / self.half;
        let cov = (self.cov - shift * self.var_b) / self.half;
        [[self.variance_of(1.0, -shift), cov], [cov, self.var_b / self.half / self.half]]
    }
}

/// One price with its buyers and all its users.
struct Point {
    price: f64,
    buyers: f64,
    users: f64,
}

impl Point {
    /// How many more buy than expected, with the digits of the fewer: buyers or others.
    fn over(&self, rate: f64, rest: f64) -> f64 {
        if rate < 0.5 {
            self.buyers - self.users * rate
        } else {
            self.users * rest - (self.users - self.buyers)
        }
    }
}

fn distinct(groups: &[(f64, Proportion)]) -> Result<Vec<Point>, NotEstimable> {
    let mut points: Vec<Point> = Vec::with_capacity(groups.len());
    let mut sorted = groups.to_vec();
    sorted.sort_by(|one, other| one.0.total_cmp(&other.0));
    for (at, data) in sorted {
        let at = price(at)?;
        let (buyers, users) = (data.successes() as f64, data.n() as f64);
        match points.last_mut() {
            _ if data.n() == 0 => {}
            Some(last) if last.price == at => {
                last.buyers += buyers;
                last.users += users;
            }
            _ => points.push(Point { price: at, buyers, users }),
        }
    }
    Ok(points)
}

/// There is no finite maximum where the prices of buyers and those of others do not overlap (Silvapulle 1981).
fn refuse_separated(points: &[Point]) -> Result<(), NotEstimable> {
    let range = |has: fn(&Point) -> bool| {
        let mut prices = points.iter().filter(|point| has(point)).map(|point| point.price);
        let first = prices.next()?;
        Some((first, prices.next_back().unwrap_or(first)))
    };
    let Some((first_buyer, last_buyer)) = range(|point| point.buyers > 0.0) else {
        return Err(NotEstimable::TooFew { what: "buyers", needed: 1, got: 0 });
    };
    let Some((first_other, last_other)) = range(|point| point.buyers < point.users) else {
        return Err(NotEstimable::NoVariance { what: "users" });
    };
    if last_buyer <= first_other || last_other <= first_buyer {
        return Err(NotEstimable::Separated);
    }
    Ok(())
}

fn fit(points: &[Point], middle: f64, half: f64) -> Result<Line, NotEstimable> {
    let (buyers, users) = points.iter().fold((0.5, 1.0), |sum, p| (sum.0 + p.buyers, sum.1 + p.users));
    let flat = (buyers / (users - buyers)).ln();
    let mut line = Line { middle, half, a: flat, b: 0.0, var_a: 0.0, cov: 0.0, var_b: 0.0 };
    let (mut lost, mut settled) = (deviance(points, &line), false);
    for _ in 0..200 {
        let (mut score, mut info) = ([0.0; 2], [0.0; 3]);
        for point in points {
            let t = line.scaled(point.price);
            let (rate, rest) = (logistic(line.log_odds(t)), logistic(-line.log_odds(t)));
            let (weight, over) = (point.users * rate * rest, point.over(rate, rest));
            score = [score[0] + over, score[1] + over * t];
            info = [info[0] + weight, info[1] + weight * t, info[2] + weight * t * t];
        }
        let determinant = info[0] * info[2] - info[1] * info[1];
        if !determinant.is_normal() || determinant < 0.0 {
            return Err(NotEstimable::NotConverged);
        }
        let inverse = [info[2] / determinant, -info[1] / determinant, info[0] / determinant];
        (line.var_a, line.cov, line.var_b) = (inverse[0], inverse[1], inverse[2]);
        if settled {
            return Ok(line);
        }
        let (to_a, to_b) =
            (inverse[0] * score[0] + inverse[1] * score[1], inverse[1] * score[0] + inverse[2] * score[1]);
        // Each step squares the error, so a small one is the last; with 10¹⁸ users rounding keeps it from being smaller.
        let of_error = (to_a * to_a * info[0] + to_b * to_b * info[2]).sqrt();
        let largest = to_a.abs().max(to_b.abs()) / (1.0 + line.a.abs() + line.b.abs());
        settled = (largest < 1e-7 && of_error < 1e-7) || largest < 1e-14;
        if settled {
            (line.a, line.b) = (line.a + to_a, line.b + to_b);
            continue;
        }
        // Half a step, where a whole one goes too far. A rise by a millionth is rounding, or nothing.
        let mut share = 1.0;
        loop {
            let next = Line { a: line.a + share * to_a, b: line.b + share * to_b, ..line };
            let left = deviance(points, &next);
            if left <= lost + 1e-9 * lost + 1e-6 || share < 1e-9 {
                (line, lost) = (next, left);
                break;
            }
            share *= 0.5;
        }
    }
    Err(NotEstimable::NotConverged)
}

fn deviance(points: &[Point], line: &Line) -> f64 {
    let of = |point: &Point| {
        let odds = line.log_odds(line.scaled(point.price));
        let others = point.users - point.buyers;
        2.0 * surprise(point.buyers, point.users * logistic(odds))
            + 2.0 * surprise(others, point.users * logistic(-odds))
    };
    points.iter().map(of).sum()
}

fn pearson(points: &[Point], line: &Line) -> f64 {
    let of = |point: &Point| {
        let odds = line.log_odds(line.scaled(point.price));
        let (rate, rest) = (logistic(odds), logistic(-odds));
        let over = point.over(rate, rest);
        over * (over / (point.users * rate * rest))
    };
    points.iter().map(of).sum()
}

/// x ln(x/μ) + μ − x, without cancellation where they are near (Loader 2000).
fn surprise(x: f64, expected: f64) -> f64 {
    let apart = x - expected;
    if x == 0.0 {
        return expected;
    }
    if apart.abs() > 0.1 * (x + expected) {
        return x * (x / expected).ln() - apart;
    }
    let v = apart / (x + expected);
    let series = (1..=9).rev().fold(0.0, |rest, k| 1.0 / f64::from(2 * k + 1) + v * v * rest);
    apart * v + 2.0 * x * v * v * v * series
}

/// 1 / (1 + e⁻ˣ): the rate of log-odds.
pub(super) fn logistic(odds: f64) -> f64 {
    1.0 / (1.0 + (-odds).exp())
}
