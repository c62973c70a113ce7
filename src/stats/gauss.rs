//! The normal distribution, far into its tails, and Gauss–Legendre quadrature.

use std::f64::consts::TAU;

use super::special::{normal_quantile, normal_tail};
use super::{Alpha, NotEstimable};

/// Beyond it no double has anything left of a normal density.
pub(super) const REACH: f64 = 38.0;

/// The density of the standard normal distribution.
pub(super) fn density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / TAU.sqrt()
}

/// The share below. 1 − it, the share above, is `below(-z)`, with all its digits.
pub(super) fn below(z: f64) -> f64 {
    normal_tail(-z)
}

/// E[(X − z)⁺] of a standard normal X, the "unit normal loss": φ(z) − z (1 − Φ(z)).
pub(super) fn unit_loss(z: f64) -> f64 {
    if z < 3.0 {
        return density(z) - z * below(-z);
    }
    // The difference would lose its digits. The continued fraction of the ratio of repeated integrals of erfc (DLMF 7.18.13)
    // has no difference.
    let ratio = (2..=120).rev().fold(z, |rest, k| z + f64::from(k) / rest);
    below(-z) / ratio
}

/// The z that a normal variable stays within, to both sides, but for a share of alpha.
pub(super) fn critical(alpha: Alpha) -> f64 {
    normal_quantile(0.5 * alpha.get())
}

/// A number that can be computed with, or the reason why not.
pub(super) fn finite(value: f64) -> Result<f64, NotEstimable> {
    if value.is_finite() { Ok(value) } else { Err(NotEstimable::OutOfRange) }
}

/// Where to cut one side of a normal density, in standard deviations, so that [`integral`] is exact between two cuts: in
/// the far tail the density falls so fast that the cuts are closer.
pub(super) fn cuts() -> impl Iterator<Item = f64> {
    let near = (1..=16).map(f64::from);
    near.chain((1..).map(|half| 16.0 + 0.5 * f64::from(half)).take_while(|z| *z <= REACH))
}

/// The cuts of both sides, from −38 to 38, in no order.
pub(super) fn all_cuts() -> impl Iterator<Item = f64> {
    cuts().map(|z| -z).chain([0.0]).chain(cuts())
}

/// Of Gauss–Legendre quadrature with 16 points (Abramowitz and Stegun, table 25.4): points above the middle, with weights.
const POINTS: [(f64, f64); 8] = [
    (0.095_012_509_837_637_44, 0.189_450_610_455_068_5),
    (0.281_603_550_779_258_9, 0.182_603_415_044_923_58),
    (0.458_016_777_657_227_4, 0.169_156_519_395_002_54),
    (0.617_876_244_402_643_7, 0.149_595_988_816_576_73),
    (0.755_404_408_355_003, 0.124_628_971_255_533_87),
    (0.865_631_202_387_831_7, 0.095_158_511_682_492_78),
    (0.944_575_023_073_232_6, 0.062_253_523_938_647_89),
    (0.989_400_934_991_649_9, 0.027_152_459_411_754_095),
];

/// The points between two ends, with their weights.
pub(super) fn points(low: f64, high: f64) -> impl Iterator<Item = (f64, f64)> {
    let (middle, half) = (0.5 * (low + high), 0.5 * (high - low));
    POINTS.into_iter().flat_map(move |(x, weight)| [-x, x].map(|x| (middle + half * x, half * weight)))
}

/// The integral of a function that is smooth between the ends.
pub(super) fn integral(low: f64, high: f64, f: impl Fn(f64) -> f64) -> f64 {
    points(low, high).map(|(x, weight)| weight * f(x)).sum()
}
