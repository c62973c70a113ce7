//! Which variant a user gets: algorithm `v1`, a pure function without I/O or allocation.
//!
//! ```text
//! u      = XXH3_64(user id, seed 0)                                once per user
//! s_p    = XXH3_64("lastprice/v1/" + p + "/" + salt, seed 0)       once per purpose p
//! bucket = mix13(u XOR s_p)                                        p in { traffic, variant, layer, holdout }
//! variant i where bucket < T_i,  T_i = floor(2^64 * (w_1 + … + w_i) / total)
//! a share of n millionths where bucket < floor(2^64 * n / 1000000)
//! ```
//!
//! `mix13` is variant 13 of Stafford's finalisers for MurmurHash3
//! (<https://zimbry.blogspot.com/2011/09/better-bit-mixing-improving-on.html>), the one of splitmix64. The last
//! variant with a positive weight is open to 2^64, and those after it do not exist; a share of 100 % is open too.
//!
//! The buckets of two purposes, or of two salts, say nothing about each other: who is let in by the traffic gate does
//! not decide which price is seen. Everything is integer arithmetic, so any language gets the same answer; the
//! repository's `docs/assignment.md` says how, and `tests/vectors/assignment-v1.json` lets it check.
//!
//! Hosts who ask "which price does this user see" want [`Assignments`](crate::Assignments), which knows of stored
//! quotes as well. This module is for backfills, simulations
//! and tests.

mod allocation;
mod share;
mod thresholds;

use twox_hash::XxHash3_64;

pub use allocation::{Allocation, Placement};
pub use share::Share;

use crate::id::UserId;

/// An id, hashed once for any number of experiments.
///
/// ```
/// use lastprice::bucketing::Unit;
/// use lastprice::UserId;
///
/// let user = UserId::new("user-42")?;
/// assert_eq!(Unit::of(&user), Unit::of(&user.clone()));
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit(u64);

impl Unit {
    /// Hashes an id: of a user, or of an account where that is what prices are assigned to.
    #[inline]
    #[must_use]
    pub fn of(id: &UserId) -> Self {
        Unit(XxHash3_64::oneshot(id.as_str().as_bytes()))
    }

    /// Where this unit falls on the line of 2^64, in one domain.
    #[inline]
    fn bucket(self, seed: u64) -> u64 {
        mix13(self.0 ^ seed)
    }
}

/// The domain of one purpose: two decisions about one user that must not depend on each other have two.
fn seed(purpose: &str, salt: &str) -> u64 {
    XxHash3_64::oneshot(format!("lastprice/v1/{purpose}/{salt}").as_bytes())
}

#[inline]
fn mix13(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod quality;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
