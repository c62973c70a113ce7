//! Random users, the same in every run.

use crate::stats::Sample;

/// SplitMix64, as in `robust`, written again: a test of one must not be of the other.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^ (z >> 31)
    }

    /// From above 0 to 1.
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller (1958).
    pub(super) fn normal(&mut self) -> f64 {
        let (r, turn) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        r * turn.cos()
    }

    /// So many users, of whom a share buys: for a price of 20 times a lognormal with this sigma. The buyers, and what all brought.
    pub(super) fn revenue(&mut self, users: u64, share: f64, sigma: f64) -> (u64, Sample) {
        let (mut buyers, mut sum, mut squares, mut at) = (0, 0.0, 0.0, 0.0);
        loop {
            // Jumps over those who do not buy: a million users cost what their buyers do.
            at += 1.0 + (self.uniform().ln() / (-share).ln_1p()).floor();
            if at > users as f64 {
                return (buyers, Sample::from_sums(users, sum, squares).unwrap());
            }
            let total = 20.0 * (sigma * self.normal()).exp();
            (buyers, sum, squares) = (buyers + 1, sum + total, squares + total * total);
        }
    }
}
