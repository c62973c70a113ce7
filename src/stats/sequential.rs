//! Looking while it runs.

use super::{Alpha, Effect, Estimate, Interval};

/// How many buyers each arm should have before [`Estimate::always_valid`] is believed.
///
/// By simulation of alpha 0.05, looked at with every 5 % more users: two arms of the same weight are wrong in 2 to 5 % of
/// experiments from 5 buyers on, if a buyer's total varies by up to three times its mean (lognormal, sigma 1.5). Arms of 10 % and
/// 90 % with a threefold price need these 100 buyers in the smaller arm (4.7 %) where totals vary by 1.3 times their mean (sigma 1);
/// where they vary by three times, it takes some 500 (13 % at 100), or [`winsorise`](super::winsorise).
pub const MIN_BUYERS_PER_ARM: u64 = 100;

impl Estimate {
    /// Interval and p value that hold at *all* looks together: however often one looks, and whatever makes one stop, the share of
    /// experiments whose interval ever misses the effect is at most alpha.
    ///
    /// The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas ("Time-uniform central limit theory and
    /// asymptotic confidence sequences", Annals of Statistics 2024, arXiv 2103.06476v7): the interval is eq. 9, the p value eq. 155,
    /// and rho by eq. 161 makes it narrowest when `target` users (all arms together) are in; 0 is taken as 1. It is wider than that
    /// of [`fixed_horizon`](Self::fixed_horizon) by about half there. `target` must not change while the experiment runs.
    ///
    /// "Asymptotic" asks for a minimum before the first look: [`MIN_BUYERS_PER_ARM`]. The estimates must be of mature outcomes, a
    /// fixed window after assignment: what still changes for users who are counted already is not covered.
    ///
    /// ```
    /// use lastprice::stats::{difference, Alpha, Sample};
    ///
    /// let (baseline, other) = (Sample::from_sums(1000, 5000.0, 90_000.0)?, Sample::from_sums(1000, 5600.0, 110_000.0)?);
    /// let effect = difference(baseline, other)?.always_valid(Alpha::default(), 5000);
    /// assert!((effect.interval.low - -0.5845006).abs() < 1e-7 && (effect.interval.high - 1.7845006).abs() < 1e-7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn always_valid(&self, alpha: Alpha, target: u64) -> Effect {
        let standard_error = self.variance().sqrt();
        let doubt = -2.0 * alpha.get().ln();
        let spread = spread_at_target(doubt) * self.n().max(1) as f64 / target.max(1) as f64;
        let score = self.value() / standard_error;
        let log_p = 0.5 * (spread.ln_1p() - score * score * spread / (spread + 1.0));
        Effect {
            estimate: self.value(),
            standard_error,
            interval: Interval::around(self.value(), critical(spread, doubt) * standard_error),
            p_value: log_p.exp().min(1.0),
        }
    }
}

/// n·rho² where n is the target, by eq. 161.
fn spread_at_target(doubt: f64) -> f64 {
    doubt + doubt.ln_1p()
}

/// Half the width of the interval, in standard errors, by eq. 9.
fn critical(spread: f64, doubt: f64) -> f64 {
    ((spread + 1.0) / spread * (spread.ln_1p() + doubt)).sqrt()
}

/// The same where n is the target.
pub(super) fn critical_at_target(alpha: Alpha) -> f64 {
    let doubt = -2.0 * alpha.get().ln();
    critical(spread_at_target(doubt), doubt)
}
