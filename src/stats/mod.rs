//! The statistics of prices, as pure functions: no database, no clock, no hidden randomness.
//!
//! Nearly all are functions of *sufficient statistics* ([`Sample`], [`Proportion`], [`PairedSample`]), so that a million users cost
//! what a thousand do. A question is asked in two steps: what is estimated ([`difference`], [`lift`], their `adjusted_` and
//! [`combine`]d forms), which gives an [`Estimate`]; and how sure it is: [`Estimate::fixed_horizon`] for one look that was planned,
//! [`Estimate::always_valid`] for looks at any time.
//!
//! ```
//! use lastprice::stats::{difference, lift, Alpha, Sample};
//!
//! let baseline = Sample::from_sums(1000, 5000.0, 90_000.0)?; // users, revenue, revenue²
//! let other = Sample::from_sums(1000, 5600.0, 110_000.0)?;
//! let alpha = Alpha::default(); // 5 %
//!
//! let planned = difference(baseline, other)?.fixed_horizon(alpha);
//! assert!((planned.p_value - 0.113734589).abs() < 1e-9);
//! let looked = difference(baseline, other)?.always_valid(alpha, 5000);
//! assert!(looked.interval.low < planned.interval.low); // the price of looking whenever you like
//! assert!((lift(baseline, other)?.value() - 0.12).abs() < 1e-12);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What cannot be told from the data is refused with a reason, [`NotEstimable`]; numbers that no data has (NaN, more buyers than
//! users) are an [`Error`](crate::Error) where they are given. So no result is NaN or infinite.

mod alpha;
mod bayes;
mod best;
mod conversion;
mod covariate;
mod demand;
mod elasticity;
mod estimate;
mod gauss;
mod means;
mod multiple;
mod power;
mod price;
#[cfg(test)]
mod price_tests;
mod proportions;
mod robust;
mod sample;
mod sample_ratio;
mod sequential;
mod special;

pub use alpha::Alpha;
pub use bayes::{BayesianEffect, Posterior, Prior, bayesian_effect};
pub use best::{ArmChance, best_arm};
pub use conversion::{BetaPosterior, BetaPrior};
pub use covariate::{Adjusted, PairedSample, adjusted_difference, adjusted_lift};
pub use demand::{AtPrice, DemandCurve, fit_demand};
pub use elasticity::{Elasticity, arc_elasticity, break_even_drop};
pub use estimate::{Combined, Effect, Estimate, combine};
pub use means::{difference, lift};
pub use multiple::{benjamini_hochberg, holm};
pub use power::PowerAnalysis;
pub use price::OptimalPrice;
pub use proportions::{ProportionDifference, ProportionTest, compare_proportions, wilson};
pub use robust::{Bootstrapped, Totals, Winsorised, bootstrap, winsorise};
pub use sample::{Interval, NotEstimable, Proportion, Sample};
pub use sample_ratio::{SampleRatio, sample_ratio};
pub use sequential::MIN_BUYERS_PER_ARM;

#[cfg(test)]
mod tests;
