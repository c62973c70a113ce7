//! Which of several arms is the best.

use super::gauss::{REACH, all_cuts, below, density, finite, points, unit_loss};
use super::{NotEstimable, Posterior};

/// What one arm has of being the best. **Not protected against peeking.**
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct ArmChance {
    /// The probability that its mean is the highest, from 0 to 1; of all arms, 1.
    pub best: f64,
    /// What choosing it loses on average, per user, in the units of the metric: E\[highest mean − its mean\].
    pub expected_loss: f64,
}

/// The chance of each arm to be the best, and what choosing it loses, in the order of the arms. **Not protected against
/// peeking.**
///
/// By numerical integration over the independent posteriors, without random draws: the same data gives the same numbers.
/// P(i is best) = ∫ φᵢ ∏ Φⱼ (Gupta, *Technometrics* 7, 1965); the loss of i is the mean of (xⱼ − xᵢ)⁺ where j is the best of
/// the others.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) than two arms; [`OutOfRange`](NotEstimable::OutOfRange) where the numbers of the arms lie
/// too far apart for a double.
///
/// ```
/// use lastprice::stats::{Posterior, best_arm};
///
/// let arms = [Posterior::new(5.0, 0.2)?, Posterior::new(5.0, 0.2)?, Posterior::new(4.0, 0.2)?];
/// let chances = best_arm(&arms)?;
/// assert!((chances[0].best - 0.5).abs() < 0.001);
/// assert!(chances[2].best < 0.001 && chances[2].expected_loss > 1.0);
/// # Ok::<(), lastprice::stats::NotEstimable>(())
/// ```
pub fn best_arm(arms: &[Posterior]) -> Result<Vec<ArmChance>, NotEstimable> {
    if arms.len() < 2 {
        return Err(NotEstimable::TooFew { what: "arms", needed: 2, got: arms.len() as u64 });
    }
    let mut chances = vec![ArmChance::default(); arms.len()];
    let mut others = Vec::with_capacity(arms.len());
    for best in 0..arms.len() {
        let cuts = cuts_of(arms, best)?;
        for (t, weight) in cuts.windows(2).flat_map(|ends| points(ends[0], ends[1])) {
            others.clear();
            let z = |j: usize| (arms[best].mean() - arms[j].mean() + arms[best].sd() * t) / arms[j].sd();
            others.extend((0..arms.len()).filter(|j| *j != best).map(|j| (j, z(j), 1.0)));
            let all_below = weight * density(t) * all_but_one(&mut others);
            chances[best].best += all_below;
            for (j, z, rest) in &others {
                let loss = weight * density(t) * rest * arms[*j].sd() * unit_loss(-z);
                chances[*j].expected_loss += loss;
            }
        }
    }
    for chance in &chances {
        finite(chance.best + chance.expected_loss)?;
    }
    Ok(chances)
}

/// Writes to each arm the probability that all but it are below; returns that of all. Without a division, as it may be by 0.
fn all_but_one(arms: &mut [(usize, f64, f64)]) -> f64 {
    let before = arms.iter_mut().fold(1.0, |product, (_, z, rest)| {
        *rest = product;
        product * below(*z)
    });
    arms.iter_mut().rev().fold(1.0, |product, (_, z, rest)| {
        *rest *= product;
        product * below(*z)
    });
    before
}

/// Where to cut the integral over one arm, in its own standard deviations. An arm that is known better bends the integrand on
/// a smaller scale, and adds its own cuts.
fn cuts_of(arms: &[Posterior], one: usize) -> Result<Vec<f64>, NotEstimable> {
    let (mean, sd) = (arms[one].mean(), arms[one].sd());
    let mut cuts: Vec<f64> = all_cuts().collect();
    let mut finest = 1.0_f64;
    for arm in arms {
        let middle = finite((arm.mean() - mean) / sd)?;
        let scale = arm.sd() / sd;
        if scale < 0.7 {
            finest = finest.min(scale);
            cuts.extend(all_cuts().map(|z| middle + scale * z).filter(|cut| cut.abs() < REACH));
        }
    }
    cuts.sort_by(f64::total_cmp);
    // Many arms cut the same place again and again; half the finest scale is enough.
    let mut previous = f64::NEG_INFINITY;
    cuts.retain(|cut| {
        let keep = *cut - previous > 0.4 * finest || *cut == REACH;
        if keep {
            previous = *cut;
        }
        keep
    });
    Ok(cuts)
}
