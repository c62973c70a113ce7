//! Beta posteriors of conversion rates.
//!
//! Everything is integrated over the log-odds, in which even the posterior of no buyers at all is a smooth hill. The incomplete
//! beta functions of libraries stop short of their continued fraction's end at a million users, and their `ln_gamma` loses
//! six digits at a billion.

use std::f64::consts::TAU;

use super::gauss::{cuts, integral, points};
use super::{Alpha, Interval, NotEstimable, Proportion};

/// What was believed of a rate before the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BetaPrior {
    /// Beta(½, ½), which does not depend on how the rate is measured (Jeffreys, *Proc. R. Soc. A* 186, 1946).
    #[default]
    Jeffreys,
    /// Beta(1, 1): every rate is as likely as any other.
    Uniform,
}

/// What a conversion rate may be after the data: Beta(buyers + a, others + b). **Not protected against peeking.**
///
/// Source: Gelman et al., *Bayesian Data Analysis*, 3rd ed., section 2.1. The numbers have 9 digits with up to 10⁹ users, in
/// the far tails as well.
///
/// ```
/// use lastprice::stats::{Alpha, BetaPosterior, BetaPrior, Proportion};
///
/// let at_19 = BetaPosterior::of(Proportion::new(120, 1000)?, BetaPrior::Jeffreys);
/// let at_29 = BetaPosterior::of(Proportion::new(90, 1000)?, BetaPrior::Jeffreys);
/// assert!((at_19.chance_above(&at_29) - 0.9855).abs() < 0.0005);
/// let nobody = BetaPosterior::of(Proportion::new(0, 1000)?, BetaPrior::Jeffreys);
/// assert!(nobody.interval(Alpha::default()).high < 0.003);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct BetaPosterior {
    a: f64,
    b: f64,
}

impl BetaPosterior {
    /// Of so many buyers of so many users; of nobody, it is the prior.
    #[must_use]
    pub fn of(data: Proportion, prior: BetaPrior) -> Self {
        let prior = match prior {
            BetaPrior::Jeffreys => 0.5,
            BetaPrior::Uniform => 1.0,
        };
        let others = data.n() - data.successes();
        BetaPosterior { a: data.successes() as f64 + prior, b: others as f64 + prior }
    }

    /// The mean rate, from 0 to 1.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.a / (self.a + self.b)
    }

    /// The probability of a rate at or below this one, from 0 to 1; of NaN, 0.
    #[must_use]
    pub fn chance_below(&self, rate: f64) -> f64 {
        if rate.is_nan() || rate <= 0.0 {
            return 0.0;
        }
        if rate >= 1.0 {
            return 1.0;
        }
        let hill = Hill::of(*self);
        // Both ratios are about 1 where it matters; a difference of two logarithms would have fewer digits.
        let v = ((rate / self.a) / ((1.0 - rate) / self.b)).ln();
        hill.sum(hill.edges[0], v).min(1.0)
    }

    /// The rate that lies above the truth with this probability.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](NotEstimable::OutOfRange) for a probability that is not between 0 and 1.
    pub fn quantile(&self, probability: f64) -> Result<f64, NotEstimable> {
        if !(probability > 0.0 && probability < 1.0) {
            return Err(NotEstimable::OutOfRange);
        }
        // From the nearer end, as only small numbers have all their digits there.
        if probability <= 0.5 {
            Ok(self.rate(Hill::of(*self).where_sum_is(probability)))
        } else {
            Ok(self.rate(-Hill::of(self.mirrored()).where_sum_is(1.0 - probability)))
        }
    }

    /// The central credible interval, with equal tails.
    #[must_use]
    pub fn interval(&self, alpha: Alpha) -> Interval {
        let tail = 0.5 * alpha.get();
        let low = self.rate(Hill::of(*self).where_sum_is(tail));
        let high = self.rate(-Hill::of(self.mirrored()).where_sum_is(tail));
        // Both are the median at a level of next to nothing, but for the last digit.
        Interval { low: low.min(high), high }
    }

    /// The probability that this rate is above the other, from 0 to 1.
    #[must_use]
    pub fn chance_above(&self, other: &BetaPosterior) -> f64 {
        let (this, other_hill) = (Hill::of(*self), Hill::of(*other));
        // Of the two middles; where they are near, the quotients are near 1.
        let apart = ((self.a / other.a) * (other.b / self.b)).ln();
        let mut edges: Vec<f64> = this.edges.iter().map(|v| v + apart).collect();
        edges.extend(&other_hill.edges);
        edges.sort_by(f64::total_cmp);
        let (mut chance, mut below) = (0.0, 0.0);
        for ends in edges.windows(2) {
            let (low, high) = (ends[0], ends[1]);
            for (v, weight) in points(low, high) {
                let other_is_below = below + integral(low, v, |v| other_hill.density(v));
                chance += weight * this.density(v - apart) * other_is_below;
            }
            below += integral(low, high, |v| other_hill.density(v));
        }
        chance.min(1.0)
    }

    /// The posterior of not buying.
    fn mirrored(self) -> Self {
        BetaPosterior { a: self.b, b: self.a }
    }

    /// The rate at log-odds that lie so far from ln(a/b).
    fn rate(self, v: f64) -> f64 {
        let mean = self.mean();
        let rate = if v > 0.0 {
            1.0 / (1.0 + self.b / self.a * (-v).exp())
        } else {
            mean * v.exp() / (1.0 + mean * v.exp_m1())
        };
        rate.min(1.0)
    }
}

/// The density of v = log-odds − ln(a/b), and where to cut it: where a normal one would be at whole standard deviations.
struct Hill {
    of: BetaPosterior,
    top: f64,
    edges: Vec<f64>,
}

impl Hill {
    fn of(of: BetaPosterior) -> Self {
        let n = of.a + of.b;
        // The logarithm of 1/B(a, b), without the parts that cancel each other (Loader, "Fast and accurate computation of
        // binomial probabilities", 2000).
        let rest = stirling_error(n) - stirling_error(of.a) - stirling_error(of.b);
        let top = (of.a / n * of.b / TAU).sqrt() * rest.exp();
        let left = cut(of.b, of.a).into_iter().rev().map(|v| -v);
        let edges = left.chain([0.0]).chain(cut(of.a, of.b)).collect();
        Hill { of, top, edges }
    }

    fn density(&self, v: f64) -> f64 {
        self.top * (-depth(self.of.a, self.of.b, v)).exp()
    }

    /// The integral from an edge to anywhere.
    fn sum(&self, from: f64, to: f64) -> f64 {
        let inner = self.edges.iter().copied().filter(|v| (from..to).contains(v));
        let (sum, last) = inner
            .fold((0.0, from), |(sum, last), edge| (sum + integral(last, edge, |v| self.density(v)), edge));
        if to > last { sum + integral(last, to.min(self.end()), |v| self.density(v)).max(0.0) } else { sum }
    }

    fn end(&self) -> f64 {
        self.edges[self.edges.len() - 1]
    }

    fn where_sum_is(&self, goal: f64) -> f64 {
        let mut below = 0.0;
        for ends in self.edges.windows(2) {
            let (start, mut low, mut high) = (ends[0], ends[0], ends[1]);
            let whole = integral(low, high, |v| self.density(v));
            if below + whole < goal {
                below += whole;
                continue;
            }
            // Newton, and halves where it leaves the piece.
            let mut v = 0.5 * (low + high);
            for _ in 0..100 {
                let over = below + integral(start, v, |v| self.density(v)) - goal;
                if over > 0.0 {
                    high = v
                } else {
                    low = v
                }
                let step = over / self.density(v);
                let next = v - step;
                if step.abs() <= 1e-15 * v.abs() || high - low <= 1e-15 * v.abs() {
                    return v;
                }
                v = if low < next && next < high { next } else { 0.5 * (low + high) };
            }
            return v;
        }
        self.end()
    }
}

/// How far below the top the logarithm of the density is: n KL(middle ‖ v), without cancellation where v is near 0.
fn depth(a: f64, b: f64, v: f64) -> f64 {
    if a > b {
        return depth(b, a, -v);
    }
    let (n, middle) = (a + b, a / (a + b));
    let y = middle * v.exp_m1();
    if y <= 0.5 {
        n * (ln_1p_less(y) + middle * exp_m1_less(v))
    } else if v < 700.0 {
        n * (y.ln_1p() - middle * v)
    } else {
        n * (v + middle.ln() - middle * v)
    }
}

/// Where the depth to the right of the middle is z²/2, for each cut z.
fn cut(a: f64, b: f64) -> Vec<f64> {
    let (n, middle) = (a + b, a / (a + b));
    let mut v = 0.0;
    let mut last_z = 0.0;
    let near = (n / a / b).sqrt();
    let found = cuts().map(|z| {
        v = if v == 0.0 { near } else { v * z / last_z };
        last_z = z;
        // The depth is convex in v, so Newton's steps come to rest; nothing depends on the last digits.
        for _ in 0..60 {
            let slope = if v > 30.0 {
                b
            } else {
                let odds = middle * v.exp_m1();
                n * (1.0 - middle) * odds / (1.0 + odds)
            };
            let step = (depth(a, b, v) - 0.5 * z * z) / slope;
            v = if step < v { v - step } else { 0.5 * v };
            if step.abs() < 1e-3 * v {
                break;
            }
        }
        v
    });
    found.collect()
}

/// ln(1 + y) − y.
fn ln_1p_less(y: f64) -> f64 {
    if y.abs() > 0.1 {
        return y.ln_1p() - y;
    }
    // −y²/2 + y³/3 − …
    let series = (2..=18).rev().fold(0.0, |rest, k| 1.0 / f64::from(k) - y * rest);
    -y * y * series
}

/// exp(v) − 1 − v.
fn exp_m1_less(v: f64) -> f64 {
    if v.abs() > 0.1 {
        return v.exp_m1() - v;
    }
    // v²/2 (1 + v/3 (1 + v/4 (…
    0.5 * v * v * (3..=14).rev().fold(1.0, |rest, k| 1.0 + v / f64::from(k) * rest)
}

/// What Stirling's formula lacks of ln Γ(z): the series of Abramowitz and Stegun 6.1.40, from 15 on.
fn stirling_error(z: f64) -> f64 {
    if z < 15.0 {
        let step = (z + 0.5) * (1.0 / z).ln_1p() - 1.0;
        return stirling_error(z + 1.0) + step;
    }
    let s = 1.0 / (z * z);
    (1.0 / 12.0 - s * (1.0 / 360.0 - s * (1.0 / 1260.0 - s * (1.0 / 1680.0 - s / 1188.0)))) / z
}
