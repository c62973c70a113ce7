//! What is known of a group of users.

use crate::error::{Error, Result};

/// How many, their mean, and the sum of squared deviations from it: all that a mean and its uncertainty need.
///
/// ```
/// use lastprice::stats::Sample;
///
/// let arm = Sample::from_sums(1000, 5000.0, 90_000.0)?; // users, revenue, revenue²
/// assert_eq!(arm.mean(), 5.0);
/// assert_eq!(arm, Sample::of(&[1.0, 9.0])?.merge(Sample::from_sums(998, 4990.0, 89_918.0)?));
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Sample {
    n: u64,
    mean: f64,
    /// Σ(x − mean)²; sums of squares would lose it where the mean is large.
    deviations: f64,
}

impl Sample {
    /// What numbers stay below, so that nothing that is made of them can overflow.
    const MAX: f64 = 1e60;
    const MAX_SQUARE: f64 = 1e120;

    /// From a sum and a sum of squares, over all users, those with nothing included.
    ///
    /// Deviations below the rounding of such sums (numbers that differ by less than 1 in 10 million) are taken as none:
    /// [`from_deviations`](Self::from_deviations) keeps them.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for numbers that are not finite or above 1e60, sums of nobody, and squares
    /// that are fewer than such a sum has.
    pub fn from_sums(n: u64, sum: f64, sum_squares: f64) -> Result<Self> {
        if !(sum.abs() <= Sample::MAX && (0.0..=Sample::MAX_SQUARE).contains(&sum_squares)) {
            return Err(Error::invalid(
                "sum_squares",
                "and the sum are not finite numbers, or squares are negative",
            ));
        }
        if n == 0 {
            return match (sum, sum_squares) {
                (0.0, 0.0) => Ok(Sample::default()),
                _ => Err(Error::invalid("n", "is 0, and the sums are not")),
            };
        }
        let mean = sum / n as f64;
        // The rounded part of the product as well, as the difference may be all that it leaves.
        let square = mean * sum;
        let rest = f64::mul_add(mean, sum, -square);
        let deviations = sum_squares - square - rest;
        if deviations < -1e-9 * sum_squares {
            return Err(Error::invalid("sum_squares", "is less than any numbers of this sum have"));
        }
        let rounding = 8.0 * f64::EPSILON * sum_squares;
        Ok(Sample { n, mean, deviations: if deviations <= rounding || n == 1 { 0.0 } else { deviations } })
    }

    /// From a mean and the sum of squared deviations from it, which keep their precision where squares do not.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for numbers that are not finite or beyond 1e60, negative deviations, and
    /// deviations of fewer than two.
    pub fn from_deviations(n: u64, mean: f64, deviations: f64) -> Result<Self> {
        if !(mean.abs() <= Sample::MAX && (0.0..=Sample::MAX_SQUARE).contains(&deviations)) {
            return Err(Error::invalid(
                "deviations",
                "and the mean are not finite numbers, or deviations are negative",
            ));
        }
        if n < 2 && deviations > 0.0 {
            return Err(Error::invalid("deviations", "are of fewer than two"));
        }
        Ok(if n == 0 { Sample::default() } else { Sample { n, mean, deviations } })
    }

    /// So many, all the same.
    pub(super) fn constant(n: u64, value: f64) -> Self {
        if n == 0 { Sample::default() } else { Sample { n, mean: value, deviations: 0.0 } }
    }

    /// From the numbers themselves.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a number that is not finite.
    pub fn of(values: &[f64]) -> Result<Self> {
        let one = |value: &f64| Sample::from_deviations(1, *value, 0.0);
        values.iter().try_fold(Sample::default(), |all, value| Ok(all.merge(one(value)?)))
    }

    /// Both together (Chan, Golub and LeVeque 1979).
    #[must_use]
    pub fn merge(self, other: Sample) -> Sample {
        if self.n == 0 || other.n == 0 {
            return if other.n == 0 { self } else { other };
        }
        let n = self.n.saturating_add(other.n);
        let of_other = other.n as f64 / n as f64;
        let apart = other.mean - self.mean;
        Sample {
            n,
            mean: self.mean + apart * of_other,
            deviations: self.deviations + other.deviations + apart * apart * self.weight_apart(&other),
        }
    }

    /// What the distance of two means weighs in the deviations of both together.
    pub(super) fn weight_apart(&self, other: &Sample) -> f64 {
        let n = self.n.saturating_add(other.n).max(1) as f64;
        self.n as f64 * (other.n as f64 / n)
    }

    /// How many.
    #[must_use]
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Their mean; 0 of nobody.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Their sum.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.mean * self.n as f64
    }

    /// The sum of their squares.
    #[must_use]
    pub fn sum_squares(&self) -> f64 {
        self.deviations + self.mean * self.sum()
    }

    /// The sum of squared deviations from their mean.
    #[must_use]
    pub fn deviations(&self) -> f64 {
        self.deviations
    }

    /// The unbiased variance, with n − 1; `None` of fewer than two.
    #[must_use]
    pub fn variance(&self) -> Option<f64> {
        (self.n > 1).then(|| self.deviations / (self.n - 1) as f64)
    }

    /// The variance of their mean; `None` of fewer than two.
    #[must_use]
    pub fn variance_of_mean(&self) -> Option<f64> {
        Some(self.variance()? / self.n as f64)
    }
}

/// How many of how many: buyers of users.
///
/// ```
/// use lastprice::stats::Proportion;
///
/// assert_eq!(Proportion::new(90, 1000)?.rate(), Some(0.09));
/// assert!(Proportion::new(3, 2).is_err());
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Proportion {
    successes: u64,
    n: u64,
}

impl Proportion {
    /// So many of so many.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if there are more successes than users.
    pub fn new(successes: u64, n: u64) -> Result<Self> {
        if successes > n {
            return Err(Error::invalid("successes", "are more than there are users"));
        }
        Ok(Proportion { successes, n })
    }

    /// Of counts that cannot be more: at most all of them.
    pub(crate) fn of_users(successes: u64, n: u64) -> Self {
        Proportion { successes: successes.min(n), n }
    }

    /// How many did.
    #[must_use]
    pub fn successes(&self) -> u64 {
        self.successes
    }

    /// Of how many.
    #[must_use]
    pub fn n(&self) -> u64 {
        self.n
    }

    /// The share, from 0 to 1; `None` of nobody.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        (self.n > 0).then(|| self.successes as f64 / self.n as f64)
    }
}

/// Each who did counts 1, the others 0.
impl From<Proportion> for Sample {
    fn from(share: Proportion) -> Self {
        let ones = Sample::constant(share.successes, 1.0);
        ones.merge(Sample::constant(share.n - share.successes, 0.0))
    }
}

/// From where to where something lies, at the level that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// Around a middle, so far to both sides.
    #[must_use]
    pub fn around(middle: f64, half: f64) -> Self {
        Interval { low: middle - half, high: middle + half }
    }

    /// Whether the number lies in it, the ends included.
    #[must_use]
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// Why the data does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
#[non_exhaustive]
pub enum NotEstimable {
    /// Too few for any statement.
    #[error("{needed} {what} are needed, and {got} are there")]
    TooFew {
        /// Of what: users, buyers, prices.
        what: &'static str,
        /// How many are needed.
        needed: u64,
        /// How many there are.
        got: u64,
    },
    /// Too many to be calculated in reasonable time.
    #[error("there are more than {at_most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many can be.
        at_most: u64,
    },
    /// All are the same, so nothing says how much chance there is in it.
    #[error("all {what} are the same")]
    NoVariance {
        /// Of what.
        what: &'static str,
    },
    /// A share of nothing: the baseline's mean is not above 0.
    #[error("the baseline's mean is not above zero, so there is no lift relative to it")]
    NoBaseline,
    /// The numbers are so large, so small or so far apart that double precision does not hold the result.
    #[error("the numbers are beyond what can be calculated")]
    OutOfRange,
    /// Up to some price all bought, above it nobody (or the other way round): the steeper a curve, the better it fits.
    #[error(
        "a price separates those who buy from those who do not, so the slope of demand has no finite estimate"
    )]
    Separated,
    /// The iterations did not come to rest.
    #[error("the fit did not converge")]
    NotConverged,
    /// Demand may as well be flat or rising, at the level that was asked for.
    #[error("demand does not fall significantly with the price, so no price is the best")]
    DemandNotFalling,
    /// Demand has another shape than the curve, so what the curve says of its prices is not believed.
    #[error("the tested prices do not follow the demand curve")]
    PoorFit,
    /// Of a price that was not tested, and lies between none that were, nothing is known.
    #[error("the price lies outside of the tested ones")]
    Untested,
    /// Nothing is earned per sale.
    #[error("a price does not exceed the unit cost, so nothing is earned by a sale")]
    NoMargin,
}
