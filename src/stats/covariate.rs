//! Less noise, by what was known of the users before.

use super::means::Arms;
use super::{Estimate, NotEstimable, Sample};
use crate::error::{Error, Result};

/// What users bring (`post`), each with a number that was known of them before they were assigned (`pre`, such as last month's
/// revenue).
///
/// ```
/// use lastprice::stats::{PairedSample, Sample};
///
/// let post = Sample::from_sums(1000, 5000.0, 90_000.0)?;
/// let pre = Sample::from_sums(1000, 4000.0, 60_000.0)?;
/// let arm = PairedSample::from_sums(post, pre, 55_000.0)?; // Σ post · pre
/// assert_eq!(arm.post().mean(), 5.0);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct PairedSample {
    post: Sample,
    pre: Sample,
    /// Σ(post − mean)(pre − mean).
    codeviations: f64,
}

impl PairedSample {
    /// From both numbers of the same users, and the sum of their products.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if both are not of as many users, or the products are not finite or more than
    /// such numbers can have.
    pub fn from_sums(post: Sample, pre: Sample, products: f64) -> Result<Self> {
        if post.n() != pre.n() {
            return Err(Error::invalid("pre", "is not of as many users as post"));
        }
        let codeviations = products - post.sum() * pre.mean();
        let bound = (post.deviations() * pre.deviations()).sqrt();
        let rounding = 1e-9 * (post.sum_squares() * pre.sum_squares()).sqrt();
        // Cauchy and Schwarz.
        if codeviations.is_nan() || codeviations.abs() > bound + rounding {
            return Err(Error::invalid("products", "are more than numbers of these sums and squares have"));
        }
        Ok(PairedSample { post, pre, codeviations: codeviations.clamp(-bound, bound) })
    }

    /// From the numbers themselves: (post, pre) of each user.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a number that is not finite.
    pub fn of(users: &[(f64, f64)]) -> Result<Self> {
        let one = |(post, pre): &(f64, f64)| -> Result<PairedSample> {
            Ok(PairedSample { post: Sample::of(&[*post])?, pre: Sample::of(&[*pre])?, codeviations: 0.0 })
        };
        users.iter().try_fold(PairedSample::default(), |all, user| Ok(all.merge(one(user)?)))
    }

    /// Both together (Chan, Golub and LeVeque 1979, for products).
    #[must_use]
    pub fn merge(self, other: PairedSample) -> PairedSample {
        let weight = self.post.weight_apart(&other.post);
        let apart = (other.post.mean() - self.post.mean()) * (other.pre.mean() - self.pre.mean());
        PairedSample {
            post: self.post.merge(other.post),
            pre: self.pre.merge(other.pre),
            codeviations: self.codeviations + other.codeviations + apart * weight,
        }
    }

    /// What they brought.
    #[must_use]
    pub fn post(&self) -> Sample {
        self.post
    }

    /// What was known before.
    #[must_use]
    pub fn pre(&self) -> Sample {
        self.pre
    }

    /// The sum of the products of both numbers' deviations from their means.
    #[must_use]
    pub fn codeviations(&self) -> f64 {
        self.codeviations
    }
}

/// An effect with what the users were before taken out.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Adjusted {
    /// The effect.
    pub estimate: Estimate,
    /// How much of `pre` is taken from `post`: the slope of the regression over both arms. 0 if `pre` is the same for all.
    pub theta: f64,
    /// Which share of the unadjusted variance is gone, at most 1. As many users fewer are needed; below 0 it got worse.
    pub variance_reduction: f64,
}

/// [`difference`](super::difference), adjusted by CUPED: Deng, Xu, Kohavi and Walker (2013, "Improving the sensitivity of online
/// controlled experiments by utilizing pre-experiment data"). One theta over both arms together, as in GrowthBook's `gbstats`.
///
/// `pre` must have been fixed before the assignment: anything the price could have changed biases the effect.
///
/// # Errors
///
/// As [`difference`](super::difference), of the adjusted numbers: [`NoVariance`](NotEstimable::NoVariance) also where `pre` explains
/// `post` entirely.
///
/// ```
/// use lastprice::stats::{adjusted_difference, Alpha, PairedSample, Sample};
///
/// let pre = |sum, squares| Sample::from_sums(1000, sum, squares);
/// let baseline = PairedSample::from_sums(Sample::from_sums(1000, 5000.0, 90_000.0)?, pre(4000.0, 60_000.0)?, 55_000.0)?;
/// let other = PairedSample::from_sums(Sample::from_sums(1000, 5600.0, 110_000.0)?, pre(4100.0, 61_000.0)?, 60_000.0)?;
///
/// let adjusted = adjusted_difference(baseline, other)?;
/// assert!((adjusted.theta - 0.8171665).abs() < 1e-7);
/// assert!((adjusted.estimate.value() - 0.5182833).abs() < 1e-7);
/// assert!((adjusted.estimate.fixed_horizon(Alpha::default()).p_value - 0.0753972).abs() < 1e-7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn adjusted_difference(baseline: PairedSample, other: PairedSample) -> Result<Adjusted, NotEstimable> {
    let (arms, theta, plain) = adjust(baseline, other)?;
    Ok(adjusted(arms.difference()?, theta, &arms, plain))
}

/// [`lift`](super::lift), adjusted as [`adjusted_difference`]: the adjusted difference as a share of the baseline's plain mean.
///
/// # Errors
///
/// As [`adjusted_difference`]; and [`NoBaseline`](NotEstimable::NoBaseline) unless the baseline's mean is above 0.
pub fn adjusted_lift(baseline: PairedSample, other: PairedSample) -> Result<Adjusted, NotEstimable> {
    let (arms, theta, plain) = adjust(baseline, other)?;
    let estimate = arms.lift((baseline.post.mean(), other.post.mean()))?;
    Ok(adjusted(estimate, theta, &arms, plain))
}

fn adjusted(estimate: Estimate, theta: f64, arms: &Arms, plain: f64) -> Adjusted {
    let variance_reduction = 1.0 - (arms.variances.0 + arms.variances.1) / plain;
    Adjusted { estimate, theta, variance_reduction }
}

/// The adjusted arms, theta, and the variance of the unadjusted difference.
fn adjust(baseline: PairedSample, other: PairedSample) -> Result<(Arms, f64, f64), NotEstimable> {
    let both = baseline.merge(other);
    let theta = if both.pre.deviations() > 0.0 { both.codeviations / both.pre.deviations() } else { 0.0 };
    let arm = |of: PairedSample| {
        let n = of.post.n();
        if n < 2 {
            return Err(NotEstimable::TooFew { what: "users of an arm", needed: 2, got: n });
        }
        let parts = of.post.deviations() + theta * theta * of.pre.deviations();
        let rest = parts - 2.0 * theta * of.codeviations;
        // What is left after a cancellation of all digits is rounding, not variance.
        let rest = if rest <= 1e-13 * parts { 0.0 } else { rest };
        let scale = (n - 1) as f64 * n as f64;
        Ok((of.post.mean() - theta * of.pre.mean(), rest / scale, of.post.deviations() / scale))
    };
    let (a, b) = (arm(baseline)?, arm(other)?);
    let arms = Arms { n: (baseline.post.n(), other.post.n()), means: (a.0, b.0), variances: (a.1, b.1) };
    Ok((arms, theta, a.2 + b.2))
}
