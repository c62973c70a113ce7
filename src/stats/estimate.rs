//! What is estimated, before the question how sure it is.

use super::special::{chi_squared_tail, normal_quantile, normal_tail, t_quantile, t_tail};
use super::{Alpha, Interval, NotEstimable};
use crate::error::{Error, Result};

/// An estimated effect with the variance of its error, in the effect's own unit: money per user, or a share for a lift.
///
/// [`difference`](super::difference), [`lift`](super::lift) and others make one. [`fixed_horizon`](Self::fixed_horizon) and
/// [`always_valid`](Self::always_valid) say how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Estimate {
    value: f64,
    variance: f64,
    n: u64,
    degrees_of_freedom: Option<f64>,
}

/// How sure an effect is.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Effect {
    /// The estimated effect.
    pub estimate: f64,
    /// The standard deviation of its error.
    pub standard_error: f64,
    /// Where the effect lies, at level 1 − alpha.
    pub interval: Interval,
    /// Two-sided: how often equal arms look as different as this. At or below alpha exactly where the interval excludes 0.
    pub p_value: f64,
}

impl Estimate {
    /// An estimate that was made elsewhere, of so many users in all; its error is taken as normal.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless value and variance are finite and the variance is above 0.
    pub fn new(value: f64, variance: f64, n: u64) -> Result<Self> {
        Estimate::checked(value, variance, n, None).map_err(|_| {
            Error::invalid("variance", "or the value is not finite, or the variance is not above 0")
        })
    }

    /// None of the numbers is NaN or so far out that what is made of them could be.
    pub(super) fn checked(
        value: f64,
        variance: f64,
        n: u64,
        degrees_of_freedom: Option<f64>,
    ) -> Result<Self, NotEstimable> {
        if variance == 0.0 {
            return Err(NotEstimable::NoVariance { what: "users" });
        }
        let sane = value.abs() < 1e150 && (1e-280..1e280).contains(&variance);
        if sane && degrees_of_freedom.is_none_or(|df| (1.0 - 1e-9..1e30).contains(&df)) {
            return Ok(Estimate { value, variance, n, degrees_of_freedom });
        }
        Err(NotEstimable::OutOfRange)
    }

    /// The estimated effect.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.value
    }

    /// The variance of its error.
    #[must_use]
    pub fn variance(&self) -> f64 {
        self.variance
    }

    /// How many users it is of, all arms together.
    #[must_use]
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Those of Student's t; `None` where the error is taken as normal.
    #[must_use]
    pub fn degrees_of_freedom(&self) -> Option<f64> {
        self.degrees_of_freedom
    }

    /// Interval and p value of *one* look, at a time that was set before. Who looks every day and stops at the first small p value
    /// finds a winner among equal arms in a quarter of all experiments; that needs [`always_valid`](Self::always_valid).
    ///
    /// ```
    /// use lastprice::stats::{Alpha, Estimate};
    ///
    /// let effect = Estimate::new(0.6, 0.09, 2000)?.fixed_horizon(Alpha::default());
    /// assert!((effect.p_value - 0.0455).abs() < 1e-4);
    /// assert!(effect.interval.low > 0.0);
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    #[must_use]
    pub fn fixed_horizon(&self, alpha: Alpha) -> Effect {
        let standard_error = self.variance.sqrt();
        let score = self.value.abs() / standard_error;
        let (critical, tail) = match self.degrees_of_freedom {
            Some(df) => (t_quantile(0.5 * alpha.get(), df), t_tail(score, df)),
            None => (normal_quantile(0.5 * alpha.get()), normal_tail(score)),
        };
        Effect {
            estimate: self.value,
            standard_error,
            interval: Interval::around(self.value, critical * standard_error),
            p_value: (2.0 * tail).min(1.0),
        }
    }
}

/// One estimate of several.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Combined {
    /// Their mean, weighted by 1 / variance.
    pub estimate: Estimate,
    /// Cochran's Q: the weighted squares of the distances from the mean.
    pub heterogeneity: f64,
    /// How often estimates of one and the same effect are as far apart as these. A small one says that the effect changed between
    /// the phases, and their mean is of nothing in particular. 1 for a single estimate.
    pub heterogeneity_p_value: f64,
}

/// Combines the estimates of separate groups of users: phases with different weights, countries.
///
/// Fixed effect, inverse variance (Cochran 1954, "The combination of estimates from different experiments"; Hedges and Olkin 1985,
/// ch. 6). Pooling the users of phases with different weights instead would take a change of season for an effect of the price
/// (Simpson's paradox). The errors are taken as normal, so each phase should have some hundred users; a single estimate stays as it is.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) without estimates, [`OutOfRange`](NotEstimable::OutOfRange).
///
/// ```
/// use lastprice::stats::{combine, Estimate};
///
/// let both = combine(&[Estimate::new(1.0, 0.2, 500)?, Estimate::new(2.0, 0.6, 700)?])?;
/// assert!((both.estimate.value() - 1.25).abs() < 1e-12);
/// assert!((both.estimate.variance() - 0.15).abs() < 1e-12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn combine(estimates: &[Estimate]) -> Result<Combined, NotEstimable> {
    let [first, rest @ ..] = estimates else {
        return Err(NotEstimable::TooFew { what: "estimates", needed: 1, got: 0 });
    };
    if rest.is_empty() {
        return Ok(Combined { estimate: *first, heterogeneity: 0.0, heterogeneity_p_value: 1.0 });
    }
    let weights: f64 = estimates.iter().map(|e| 1.0 / e.variance).sum();
    let mean = estimates.iter().map(|e| e.value * (1.0 / e.variance / weights)).sum::<f64>();
    let n = estimates.iter().fold(0u64, |n, e| n.saturating_add(e.n));
    let heterogeneity: f64 = estimates.iter().map(|e| (e.value - mean).powi(2) / e.variance).sum();
    if !heterogeneity.is_finite() {
        return Err(NotEstimable::OutOfRange);
    }
    let df = u32::try_from(rest.len()).map_err(|_| NotEstimable::OutOfRange)?;
    Ok(Combined {
        estimate: Estimate::checked(mean, 1.0 / weights, n, None)?,
        heterogeneity,
        heterogeneity_p_value: chi_squared_tail(heterogeneity, df),
    })
}
