//! Differences of means.

use super::{Estimate, NotEstimable, Sample};

/// How much more `other` has per user than `baseline`, in the unit of the samples.
///
/// Variances are not taken as equal, as a dearer price has fewer buyers of more revenue each; degrees of freedom are Welch's (1947)
/// and Satterthwaite's (1946), so [`fixed_horizon`](Estimate::fixed_horizon) is Welch's t test.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) unless both have two users, [`NoVariance`](NotEstimable::NoVariance) if one has only equal
/// numbers (nobody bought), [`OutOfRange`](NotEstimable::OutOfRange).
///
/// ```
/// use lastprice::stats::{difference, Alpha, NotEstimable, Sample};
///
/// let effect = difference(Sample::of(&[1.0, 2.0, 3.0])?, Sample::of(&[3.0, 4.0, 6.0])?)?.fixed_horizon(Alpha::default());
/// assert!((effect.estimate - 7.0 / 3.0).abs() < 1e-12);
/// assert!(effect.interval.contains(effect.estimate) && effect.p_value > 0.05);
///
/// let nobody_bought = Sample::of(&[0.0; 50])?;
/// assert!(matches!(difference(Sample::of(&[0.0, 5.0])?, nobody_bought), Err(NotEstimable::NoVariance { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn difference(baseline: Sample, other: Sample) -> Result<Estimate, NotEstimable> {
    Arms::new(baseline, other)?.difference()
}

/// How much more `other` has per user than `baseline`, as a share of the baseline: 0.12 is 12 % more.
///
/// Its variance is by the delta method, with Welch's degrees of freedom, as in GrowthBook's `gbstats`. That is good where the
/// baseline's mean is many standard errors above zero (some hundred buyers), and too narrow where it is only a few.
///
/// # Errors
///
/// As [`difference`]; and [`NoBaseline`](NotEstimable::NoBaseline) unless the baseline's mean is above 0.
///
/// ```
/// use lastprice::stats::{lift, Alpha, Sample};
///
/// let (baseline, other) = (Sample::from_sums(1000, 5000.0, 90_000.0)?, Sample::from_sums(1000, 5600.0, 110_000.0)?);
/// let effect = lift(baseline, other)?.fixed_horizon(Alpha::default());
/// assert!((effect.estimate - 0.12).abs() < 1e-12 && (effect.p_value - 0.134182024).abs() < 1e-9);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lift(baseline: Sample, other: Sample) -> Result<Estimate, NotEstimable> {
    Arms::new(baseline, other)?.lift((baseline.mean(), other.mean()))
}

/// Two arms, as their means and the variances of these; of covariate-adjusted numbers as well.
pub(super) struct Arms {
    pub(super) n: (u64, u64),
    pub(super) means: (f64, f64),
    pub(super) variances: (f64, f64),
}

impl Arms {
    fn new(baseline: Sample, other: Sample) -> Result<Self, NotEstimable> {
        let of_mean = |sample: Sample| {
            let too_few = NotEstimable::TooFew { what: "users of an arm", needed: 2, got: sample.n() };
            sample.variance_of_mean().ok_or(too_few)
        };
        Ok(Arms {
            n: (baseline.n(), other.n()),
            means: (baseline.mean(), other.mean()),
            variances: (of_mean(baseline)?, of_mean(other)?),
        })
    }

    pub(super) fn difference(&self) -> Result<Estimate, NotEstimable> {
        let (a, b) = self.variances;
        self.estimate(self.means.1 - self.means.0, a + b)
    }

    /// Relative to unadjusted means, as an adjustment moves both arms.
    pub(super) fn lift(&self, unadjusted: (f64, f64)) -> Result<Estimate, NotEstimable> {
        let (baseline, other) = unadjusted;
        if baseline <= 0.0 {
            return Err(NotEstimable::NoBaseline);
        }
        let ratio = other / baseline;
        let variance = (self.variances.1 + ratio * ratio * self.variances.0) / baseline / baseline;
        self.estimate((self.means.1 - self.means.0) / baseline, variance)
    }

    fn estimate(&self, value: f64, variance: f64) -> Result<Estimate, NotEstimable> {
        let (a, b) = self.variances;
        if a <= 0.0 || b <= 0.0 {
            return Err(NotEstimable::NoVariance { what: "users of an arm" });
        }
        // Welch and Satterthwaite, by the arms' shares of the variance: squares of variances could overflow.
        let (of_a, of_b) = (a / (a + b), b / (a + b));
        let (n_a, n_b) = self.n;
        let df = 1.0 / (of_a * of_a / (n_a - 1) as f64 + of_b * of_b / (n_b - 1) as f64);
        Estimate::checked(value, variance, n_a.saturating_add(n_b), Some(df))
    }
}
