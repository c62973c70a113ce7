//! Normal posteriors of means and of their difference.

use super::gauss::{below, critical, finite, unit_loss};
use super::{Alpha, Interval, NotEstimable, Sample};

/// What was believed before the data.
///
/// ```
/// use lastprice::stats::Prior;
///
/// assert_eq!(Prior::default(), Prior::Flat);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
#[serde(tag = "prior", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prior {
    /// Nothing: every number is as likely as any other.
    #[default]
    Flat,
    /// A normal distribution, in the units of the metric.
    Normal {
        /// Its mean; 0 for an effect that is believed to be small.
        mean: f64,
        /// Its standard deviation, above 0.
        sd: f64,
    },
}

/// A normal distribution of what a mean, or a difference of means, may be after the data. **Not protected against peeking.**
///
/// The data's variance is taken as known, which asks for arms of some hundred users.
/// Source: Gelman et al., *Bayesian Data Analysis*, 3rd ed., section 2.5 (normal data with known variance).
///
/// ```
/// use lastprice::stats::{Alpha, Posterior};
///
/// let revenue = Posterior::new(5.0, 0.5)?; // per user
/// assert_eq!(revenue.chance_above(5.0), 0.5);
/// assert!((revenue.interval(Alpha::default())?.low - 4.02).abs() < 0.001);
/// assert!(Posterior::new(5.0, 0.0).is_err());
/// # Ok::<(), lastprice::stats::NotEstimable>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Posterior {
    mean: f64,
    sd: f64,
}

impl Posterior {
    /// From a mean and a standard deviation.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](NotEstimable::OutOfRange) for a mean that is not finite and a deviation that is not above 0.
    pub fn new(mean: f64, sd: f64) -> Result<Self, NotEstimable> {
        if !(mean.is_finite() && sd.is_normal() && sd > 0.0) {
            return Err(NotEstimable::OutOfRange);
        }
        Ok(Posterior { mean, sd })
    }

    /// Of the mean of one arm.
    ///
    /// # Errors
    ///
    /// [`TooFew`](NotEstimable::TooFew) than two users, [`NoVariance`](NotEstimable::NoVariance) where all are the same, and
    /// [`OutOfRange`](NotEstimable::OutOfRange) for a prior that is no distribution.
    pub fn of_mean(arm: Sample, prior: Prior) -> Result<Self, NotEstimable> {
        Posterior::after(prior, arm.mean(), variance_of_mean(arm)?)
    }

    /// Of the treatment's mean less the control's; the prior is one of this difference.
    ///
    /// # Errors
    ///
    /// Those of [`of_mean`](Posterior::of_mean), for either arm.
    pub fn of_difference(control: Sample, treatment: Sample, prior: Prior) -> Result<Self, NotEstimable> {
        let variance = variance_of_mean(control)? + variance_of_mean(treatment)?;
        Posterior::after(prior, treatment.mean() - control.mean(), variance)
    }

    fn after(prior: Prior, mean: f64, variance: f64) -> Result<Self, NotEstimable> {
        match prior {
            Prior::Flat => Posterior::new(mean, variance.sqrt()),
            Prior::Normal { mean: expected, sd } => {
                let prior = Posterior::new(expected, sd)?;
                // How much of the way from the data to the prior; with precisions, 1/variance could overflow.
                let drawn = variance / (variance + sd * sd);
                Posterior::new(mean + (prior.mean - mean) * drawn, sd * drawn.sqrt())
            }
        }
    }

    /// Its mean.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Its standard deviation.
    #[must_use]
    pub fn sd(&self) -> f64 {
        self.sd
    }

    /// The probability of being above a value, from 0 to 1; of a value that is NaN, 0.
    #[must_use]
    pub fn chance_above(&self, value: f64) -> f64 {
        if value.is_nan() { 0.0 } else { below((self.mean - value) / self.sd) }
    }

    /// The central credible interval.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](NotEstimable::OutOfRange) for ends that are not finite.
    pub fn interval(&self, alpha: Alpha) -> Result<Interval, NotEstimable> {
        let half = critical(alpha) * self.sd;
        finite(self.mean.abs() + half)?;
        Ok(Interval::around(self.mean, half))
    }
}

/// The Bayesian view of two arms. **Not protected against peeking.**
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct BayesianEffect {
    /// Of the treatment's mean less the control's, in the units of the metric.
    pub difference: Posterior,
    /// The central credible interval of that difference.
    pub interval: Interval,
    /// The probability that the treatment is better, from 0 to 1.
    pub chance_to_win: f64,
    /// What keeping the control loses on average, per user: E\[difference⁺\].
    pub loss_of_control: f64,
    /// What choosing the treatment loses on average, per user: E\[(−difference)⁺\].
    pub loss_of_treatment: f64,
}

/// Whether the treatment is better than the control, and what a wrong choice costs. **Not protected against peeking**: at the
/// day that looks best the chance to win is above 95 % far too often.
///
/// The credible interval leaves out a share of `alpha`. Source: `EffectBayesianABTest` of GrowthBook's `gbstats`,
/// absolute differences; the expected losses are the normal "risk" of Stucchio, *Bayesian A/B Testing at VWO* (2015).
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) than two users in an arm, [`NoVariance`](NotEstimable::NoVariance) in one, and
/// [`OutOfRange`](NotEstimable::OutOfRange) for a prior that is no distribution.
///
/// ```
/// use lastprice::stats::{Alpha, Prior, Sample, bayesian_effect};
///
/// let control = Sample::from_sums(1000, 5000.0, 90_000.0)?;
/// let treatment = Sample::from_sums(1000, 5600.0, 110_000.0)?;
/// let effect = bayesian_effect(control, treatment, Prior::Flat, Alpha::default())?;
/// assert!((effect.chance_to_win - 0.9432126).abs() < 1e-7);
/// assert!(effect.loss_of_treatment < effect.loss_of_control);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn bayesian_effect(
    control: Sample,
    treatment: Sample,
    prior: Prior,
    alpha: Alpha,
) -> Result<BayesianEffect, NotEstimable> {
    let difference = Posterior::of_difference(control, treatment, prior)?;
    let z = difference.mean / difference.sd;
    Ok(BayesianEffect {
        difference,
        interval: difference.interval(alpha)?,
        chance_to_win: difference.chance_above(0.0),
        loss_of_control: finite(difference.sd * unit_loss(-z))?,
        loss_of_treatment: finite(difference.sd * unit_loss(z))?,
    })
}

fn variance_of_mean(arm: Sample) -> Result<f64, NotEstimable> {
    match arm.variance_of_mean() {
        None => Err(NotEstimable::TooFew { what: "users", needed: 2, got: arm.n() }),
        Some(0.0) => Err(NotEstimable::NoVariance { what: "users of an arm" }),
        Some(variance) => finite(variance),
    }
}
