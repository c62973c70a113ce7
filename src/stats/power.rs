//! How many users an experiment needs, or what it can find with those it gets.

use super::Alpha;
use super::sequential::critical_at_target;
use super::special::normal_quantile;
use crate::error::{Error, Result};

/// What an experiment of two equal arms can find, before it runs.
///
/// Normal approximations (Fleiss, Levin and Paik 2003, ch. 4, without a correction for continuity). All are of users *per arm*; a
/// target sample size of the whole experiment is that times the number of arms.
///
/// ```
/// use lastprice::stats::{Alpha, PowerAnalysis};
///
/// let plan = PowerAnalysis::fixed_horizon(Alpha::default(), 0.8)?;
/// let needed = plan.users_per_arm(65.0, 0.5)?; // variance of revenue per user, and the difference worth finding
/// assert_eq!(needed, 4082);
/// assert!(plan.detectable_difference(65.0, needed)? <= 0.5);
/// assert_eq!(plan.users_per_arm_for_shares(0.10, 0.12)?, 3841);
///
/// // Freedom to look at any time has a price.
/// assert!(PowerAnalysis::always_valid(Alpha::default(), 0.8)?.users_per_arm(65.0, 0.5)? > needed);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct PowerAnalysis {
    /// Standard errors from zero from which on an effect counts.
    critical: f64,
    /// Standard errors that the true effect must be further out, to be seen that often.
    reserve: f64,
}

impl PowerAnalysis {
    /// Of an experiment with one look at its end, two-sided. `power` is how often the effect is to be found if it is there: 0.8 usually.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if `power` is not from 0.5 to 0.999.
    pub fn fixed_horizon(alpha: Alpha, power: f64) -> Result<Self> {
        PowerAnalysis::new(normal_quantile(0.5 * alpha.get()), power)
    }

    /// Of an experiment that is judged by [`always_valid`](super::Estimate::always_valid) intervals, whose target is the users of this
    /// analysis. Of what is found at the target; earlier looks find some more, so it is on the safe side.
    ///
    /// # Errors
    ///
    /// As [`fixed_horizon`](Self::fixed_horizon).
    pub fn always_valid(alpha: Alpha, power: f64) -> Result<Self> {
        PowerAnalysis::new(critical_at_target(alpha), power)
    }

    fn new(critical: f64, power: f64) -> Result<Self> {
        if !(0.5..=0.999).contains(&power) {
            return Err(Error::invalid("power", "is not from 0.5 to 0.999"));
        }
        Ok(PowerAnalysis { critical, reserve: normal_quantile(1.0 - power) })
    }

    /// Users per arm to find a difference of means, of numbers of this variance (such as revenue per user, with the zeros).
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless the variance is above 0 and the difference is not 0.
    pub fn users_per_arm(&self, variance: f64, difference: f64) -> Result<u64> {
        positive("variance", variance)?;
        positive("difference", difference.abs())?;
        let score = (self.critical + self.reserve) / difference;
        Ok(users(2.0 * variance * score * score))
    }

    /// The smallest difference of means that so many users per arm find.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless the variance is above 0 and there are users.
    pub fn detectable_difference(&self, variance: f64, users_per_arm: u64) -> Result<f64> {
        positive("variance", variance)?;
        positive("users_per_arm", users_per_arm as f64)?;
        Ok((self.critical + self.reserve) * (2.0 * variance / users_per_arm as f64).sqrt())
    }

    /// Users per arm to tell two shares apart, such as conversions of 10 % and 12 %.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless both are from 0 to 1, and different.
    pub fn users_per_arm_for_shares(&self, baseline: f64, other: f64) -> Result<u64> {
        let share = 0.0..=1.0;
        if !(share.contains(&baseline) && share.contains(&other) && baseline != other) {
            return Err(Error::invalid("baseline", "and other are not two different shares from 0 to 1"));
        }
        Ok(users(self.needed(baseline, other)))
    }

    /// The smallest share above the baseline that so many users per arm tell from it.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless the baseline is from 0 to 1, and there are users enough to find any.
    pub fn detectable_share(&self, baseline: f64, users_per_arm: u64) -> Result<f64> {
        if !(0.0..1.0).contains(&baseline) {
            return Err(Error::invalid("baseline", "is not a share from 0 to below 1"));
        }
        let enough = |other: f64| self.needed(baseline, other) <= users_per_arm as f64;
        if !enough(1.0) {
            return Err(Error::invalid("users_per_arm", "are too few to find any difference"));
        }
        // More users are needed for smaller differences, so the boundary is found by halving.
        let (mut missed, mut found) = (baseline, 1.0);
        for _ in 0..200 {
            let middle = 0.5 * (missed + found);
            if middle > missed && enough(middle) { found = middle } else { missed = middle }
        }
        Ok(found)
    }

    /// The variance of equal shares decides what counts, that of the different ones how often.
    fn needed(&self, baseline: f64, other: f64) -> f64 {
        let variance = |share: f64| share * (1.0 - share);
        let equal = 2.0 * variance(0.5 * (baseline + other));
        let different = variance(baseline) + variance(other);
        ((self.critical * equal.sqrt() + self.reserve * different.sqrt()) / (other - baseline)).powi(2)
    }
}

fn users(count: f64) -> u64 {
    (count.ceil() as u64).max(2)
}

fn positive(field: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(Error::invalid(field, "is not a finite number above 0"))
    }
}
