//! Revenue with whales: a few users who bring most of it.
//!
//! Sums and squares do not tell who brought what, so these functions take each buyer's total. Those who brought nothing are a number:
//! the cost follows the buyers, not the users.

use super::special::{normal_quantile, normal_tail};
use super::{Alpha, Interval, NotEstimable, Sample};
use crate::error::{Error, Result};

/// What each user of an arm brought.
///
/// ```
/// use lastprice::stats::Totals;
///
/// let arm = Totals::new(1000, vec![19.0, 29.0, 19.0])?; // 997 brought nothing
/// assert_eq!((arm.users(), arm.sample().sum()), (1000, 67.0));
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Totals {
    users: u64,
    /// Of those who brought something, ascending.
    buyers: Vec<f64>,
}

impl Totals {
    /// So many users, of whom these brought something (refunds may make it negative).
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more buyers than users, and what a [`Sample`] does not take.
    pub fn new(users: u64, mut buyers: Vec<f64>) -> Result<Self> {
        if buyers.len() as u64 > users {
            return Err(Error::invalid("buyers", "are more than there are users"));
        }
        Sample::of(&buyers)?;
        buyers.sort_by(f64::total_cmp);
        Ok(Totals { users, buyers })
    }

    /// How many users.
    #[must_use]
    pub fn users(&self) -> u64 {
        self.users
    }

    /// Their number, mean and variance, those with nothing included.
    #[must_use]
    pub fn sample(&self) -> Sample {
        self.clipped(|total| total)
    }

    fn zeros(&self) -> u64 {
        self.users - self.buyers.len() as u64
    }

    fn clipped(&self, clip: impl Fn(f64) -> f64) -> Sample {
        let one = |total: &f64| Sample::constant(1, clip(*total));
        self.buyers.iter().map(one).fold(Sample::constant(self.zeros(), clip(0.0)), Sample::merge)
    }
}

/// Arms without their extremes.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Winsorised {
    /// What was below or above was taken as this, in the unit of the totals.
    pub limits: Interval,
    /// The arms, in the order given, for [`difference`](super::difference) and the others.
    pub samples: Vec<Sample>,
}

/// Takes totals beyond two quantiles as these: `winsorise(&arms, 0.0, 0.999)` caps the top user of a thousand.
///
/// The quantiles are of the users of all arms together, those with nothing included, interpolated linearly (Hyndman and Fan 1996,
/// type 7); limits of each arm would take the effect of a price for a whale. The effect is then of the capped revenue, which is not
/// what the bank gets: a check, not the primary metric. If fewer than 1 − `upper` buy anything, the cap is 0 and takes all.
///
/// # Errors
///
/// [`InvalidInput`](crate::ErrorKind::InvalidInput) unless 0 ≤ `lower` < `upper` ≤ 1, and without users.
///
/// ```
/// use lastprice::stats::{winsorise, Totals};
///
/// let (baseline, other) = (Totals::new(100, vec![20.0; 30])?, Totals::new(100, [vec![25.0; 20], vec![9000.0]].concat())?);
/// let capped = winsorise(&[baseline, other], 0.0, 0.99)?;
/// assert_eq!(capped.limits.high, 25.0);
/// assert_eq!(capped.samples[1].sum(), 21.0 * 25.0);
/// # Ok::<(), lastprice::Error>(())
/// ```
pub fn winsorise(arms: &[Totals], lower: f64, upper: f64) -> Result<Winsorised> {
    if !(0.0 <= lower && lower < upper && upper <= 1.0) {
        return Err(Error::invalid("lower", "and upper are not two quantiles from 0 to 1, the lower first"));
    }
    let mut buyers: Vec<f64> = arms.iter().flat_map(|arm| &arm.buyers).copied().collect();
    buyers.sort_by(f64::total_cmp);
    let zeros = arms.iter().fold(0, |sum: u64, arm| sum.saturating_add(arm.zeros()));
    let negative = buyers.partition_point(|total| *total < 0.0) as u64;
    let users = zeros.saturating_add(buyers.len() as u64);
    if users == 0 {
        return Err(Error::invalid("arms", "have no users"));
    }
    let at = |rank: u64| match rank {
        _ if rank < negative => buyers[rank as usize],
        _ if rank - negative < zeros => 0.0,
        _ => buyers[((rank - zeros) as usize).min(buyers.len() - 1)],
    };
    let quantile = |level: f64| {
        let place = level * (users - 1) as f64;
        let rank = (place.floor() as u64).min(users - 1);
        let next = (rank + 1).min(users - 1);
        at(rank) + (at(next) - at(rank)) * (place - place.floor())
    };
    let limits = Interval { low: quantile(lower), high: quantile(upper) };
    // Not clamp(), which panics should rounding ever turn the limits around.
    let clip = |total: f64| total.max(limits.low).min(limits.high);
    Ok(Winsorised { limits, samples: arms.iter().map(|arm| arm.clipped(clip)).collect() })
}

/// Intervals that no assumption about the shape of revenue was made for.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Bootstrapped {
    /// Of the difference of means, in the unit of the totals.
    pub difference: Interval,
    /// Of the difference as a share of the baseline's mean; [`NoBaseline`](NotEstimable::NoBaseline) if a resample's was not above 0.
    pub lift: Result<Interval, NotEstimable>,
}

/// BCa bootstrap intervals (Efron 1987, "Better bootstrap confidence intervals") of `other` against `baseline`: draws users with
/// replacement, so many times (at least 1000; 10 000 are usual), and corrects the quantiles for bias and skew.
///
/// The same seed gives the same intervals, everywhere: random numbers are SplitMix64 (Steele, Lea and Flood 2014). The cost is of
/// buyers × resamples. For one planned look, like [`fixed_horizon`](super::Estimate::fixed_horizon).
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) unless both arms have two users, [`NoVariance`](NotEstimable::NoVariance) if all users of an arm
/// brought the same.
///
/// ```
/// use lastprice::stats::{bootstrap, Alpha, Totals};
///
/// let (baseline, other) = (Totals::new(200, vec![20.0; 40])?, Totals::new(200, vec![30.0; 38])?);
/// let intervals = bootstrap(&baseline, &other, Alpha::default(), 2000, 7)?;
/// assert!(intervals.difference.contains(1.7)); // 5.7 − 4
/// assert_eq!(intervals, bootstrap(&baseline, &other, Alpha::default(), 2000, 7)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn bootstrap(
    baseline: &Totals,
    other: &Totals,
    alpha: Alpha,
    resamples: u32,
    seed: u64,
) -> Result<Bootstrapped, NotEstimable> {
    let estimate = super::difference(baseline.sample(), other.sample())?;
    let (a, b) = (baseline.sample().mean(), other.sample().mean());
    let mut random = SplitMix64(seed);
    let means: Vec<(f64, f64)> =
        (0..resamples.max(1000)).map(|_| (random.mean_of(baseline), random.mean_of(other))).collect();

    let of_difference = means.iter().map(|(a, b)| b - a).collect();
    // What one user more moves the statistic: by the difference of the user from the mean, over the users.
    let influences = [(baseline, -1.0), (other, 1.0)];
    let difference = bca(of_difference, estimate.value(), acceleration(influences), alpha);
    if a <= 0.0 || means.iter().any(|(a, _)| *a <= 0.0) {
        return Ok(Bootstrapped { difference, lift: Err(NotEstimable::NoBaseline) });
    }
    let of_lift: Vec<f64> = means.iter().map(|(a, b)| (b - a) / a).collect();
    // A resample's baseline can be next to nothing.
    if !of_lift.iter().all(|lift| lift.abs() < 1e150) {
        return Ok(Bootstrapped { difference, lift: Err(NotEstimable::OutOfRange) });
    }
    let influences = [(baseline, -b / a), (other, 1.0)];
    let lift = Ok(bca(of_lift, (b - a) / a, acceleration(influences), alpha));
    Ok(Bootstrapped { difference, lift })
}

/// A sixth of the skewness of the statistic, by the third and second moments of the users' influences (Efron 1987, eq. 7.3).
fn acceleration(arms: [(&Totals, f64); 2]) -> f64 {
    let moment = |power: i32| -> f64 {
        let of_arm = |(arm, factor): (&Totals, f64)| {
            let (mean, scale) = (arm.sample().mean(), factor / arm.users as f64);
            let influence = |total: f64| (scale * (total - mean)).powi(power);
            arm.buyers.iter().map(|total| influence(*total)).sum::<f64>()
                + arm.zeros() as f64 * influence(0.0)
        };
        arms.into_iter().map(of_arm).sum()
    };
    let acceleration = moment(3) / (6.0 * moment(2).powf(1.5));
    if acceleration.is_finite() { acceleration } else { 0.0 }
}

/// The quantiles of the resamples that are bias-corrected and accelerated.
fn bca(mut resamples: Vec<f64>, estimate: f64, acceleration: f64, alpha: Alpha) -> Interval {
    resamples.sort_by(f64::total_cmp);
    let count = resamples.len() as f64;
    let below = resamples.partition_point(|x| *x < estimate) as f64;
    let equal = resamples.partition_point(|x| *x <= estimate) as f64 - below;
    let bias = -normal_quantile(((below + 0.5 * equal) / count).clamp(0.5 / count, 1.0 - 0.5 / count));
    let quantile = |z: f64| {
        let corrected = bias + z;
        let slope = 1.0 - acceleration * corrected;
        // Beyond its pole the correction says nothing but "the outermost".
        let level =
            if slope > 0.0 { 1.0 - normal_tail(bias + corrected / slope) } else { f64::from(z > 0.0) };
        let place = level * (count - 1.0);
        let (rank, next) = (place.floor() as usize, place.ceil() as usize);
        resamples[rank] + (resamples[next.min(resamples.len() - 1)] - resamples[rank]) * place.fract()
    };
    let z = normal_quantile(0.5 * alpha.get());
    Interval { low: quantile(-z), high: quantile(z) }
}

/// Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From above 0 to 1.
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// The mean of as many users as the arm has, drawn from it with replacement.
    fn mean_of(&mut self, arm: &Totals) -> f64 {
        let (buyers, zeros) = (arm.buyers.len() as u64, arm.zeros());
        let drawn = if buyers <= zeros {
            self.binomial(arm.users, buyers)
        } else {
            arm.users - self.binomial(arm.users, zeros)
        };
        // The high half of the product: an index below `buyers`.
        let one = |_| arm.buyers[((u128::from(self.next()) * u128::from(buyers)) >> 64) as usize];
        (0..drawn).map(one).sum::<f64>() / arm.users as f64
    }

    /// How many of n draws hit, if k of n do: exponential waiting times (Devroye 1986, ch. X.4.3), so it costs hits, not draws.
    fn binomial(&mut self, n: u64, k: u64) -> u64 {
        let limit = -(-(k as f64) / n as f64).ln_1p();
        let (mut hits, mut waited) = (0, 0.0);
        while hits < n {
            waited -= self.uniform().ln() / (n - hits) as f64;
            if waited > limit {
                break;
            }
            hits += 1;
        }
        hits
    }
}
