//! Whether the arms have the users that their weights give them.

use super::NotEstimable;
use super::special::{chi_squared_tail, deviance, stirling};

/// Whether users came as the weights say. If not, something drops users of one arm (a slow page, a bot filter, a broken tracker), and
/// no number of the experiment can be believed.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct SampleRatio {
    /// How often a sound experiment is as far off as this, at one look: Pearson's chi-squared test.
    pub p_value: f64,
    /// The same for looks at any time: a sound experiment *ever* gets below p with at most chance p. By Lindon and Malek (2022,
    /// "Anytime-valid inference for multinomial count data"), from a prior that is worth 10 000 users.
    pub always_valid_p_value: f64,
    /// Users in arms of weight 0, where nobody should be. They are not part of the tests.
    pub stray_users: u64,
}

impl SampleRatio {
    /// Below which [`p_value`](Self::p_value) to alarm. A daily look at 0.05 would alarm falsely in 29 of 100 experiments of 30 days.
    pub const ALARM: f64 = 0.001;

    /// The prior's weight in users: what is thought possible before, is off by about 1 %.
    const CONCENTRATION: f64 = 10_000.0;

    /// Whether to alarm: [`p_value`](Self::p_value) below [`ALARM`](Self::ALARM), or somebody where nobody should be.
    #[must_use]
    pub fn is_mismatch(&self) -> bool {
        self.p_value < SampleRatio::ALARM || self.stray_users > 0
    }
}

/// Tests the users of each arm against the arms' weights: (users, weight).
///
/// Arms of weight 0 are left out of the test; counting them among its degrees of freedom, as `gbstats` 0.8 does, hides a mismatch.
///
/// # Errors
///
/// [`TooFew`](NotEstimable::TooFew) without a user, or with fewer than two arms of a positive weight.
///
/// ```
/// use lastprice::stats::sample_ratio;
///
/// assert!(!sample_ratio(&[(5010, 1), (4990, 1)])?.is_mismatch());
/// assert!(sample_ratio(&[(5200, 1), (4800, 1), (0, 0)])?.is_mismatch());
/// assert_eq!(sample_ratio(&[(5010, 1), (4990, 1), (3, 0)])?.stray_users, 3);
/// # Ok::<(), lastprice::stats::NotEstimable>(())
/// ```
pub fn sample_ratio(arms: &[(u64, u32)]) -> Result<SampleRatio, NotEstimable> {
    let weighted = || arms.iter().filter(|(_, weight)| *weight > 0);
    let count = weighted().count() as u64;
    if count < 2 {
        return Err(NotEstimable::TooFew { what: "arms of a positive weight", needed: 2, got: count });
    }
    let users: f64 = weighted().map(|(users, _)| *users as f64).sum();
    if users == 0.0 {
        return Err(NotEstimable::TooFew { what: "users", needed: 1, got: 0 });
    }
    let weights: f64 = weighted().map(|(_, weight)| f64::from(*weight)).sum();
    let shares = || weighted().map(|(users, weight)| (*users as f64, f64::from(*weight) / weights));

    let distance: f64 = shares().map(|(k, share)| (k - users * share).powi(2) / (users * share)).sum();
    let df = u32::try_from(count - 1).map_err(|_| NotEstimable::OutOfRange)?;

    // ln of the Bayes factor of any shares (Dirichlet) against those of the weights. It depends on the counts alone, not on when they
    // came; by Stirling's formula the log-gammas become deviances, which do not cancel.
    let prior = SampleRatio::CONCENTRATION;
    let all = prior + users;
    let evidence: f64 = shares()
        .map(|(k, share)| {
            let (before, after) = (prior * share, prior * share + k);
            deviance(after, all * share) - 0.5 * (after / before).ln() + stirling(after) - stirling(before)
        })
        .sum();
    let evidence = evidence + 0.5 * (all / prior).ln() - stirling(all) + stirling(prior);
    Ok(SampleRatio {
        p_value: chi_squared_tail(distance, df),
        always_valid_p_value: (-evidence).exp().min(1.0),
        stray_users: arms.iter().filter(|arm| arm.1 == 0).fold(0, |sum: u64, arm| sum.saturating_add(arm.0)),
    })
}
