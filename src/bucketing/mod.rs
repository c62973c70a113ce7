//! Which variant a user gets: algorithm `v1`, a pure function without I/O or allocation.
//!
//! ```text
//! u      = XXH3_64(user id, seed 0)                                once per user
//! s_p    = XXH3_64("lastprice/v1/" + p + "/" + salt)               once per purpose p
//! bucket = mix13(u XOR s_p)
//! variant i where bucket < T_i,  T_i = floor(2^64 * (w_1 + … + w_i) / total)
//! ```
//!
//! `mix13` is variant 13 of Stafford's finalisers for MurmurHash3
//! (<https://zimbry.blogspot.com/2011/09/better-bit-mixing-improving-on.html>), the one of splitmix64. The last
//! variant with a positive weight is open to 2^64; those after it do not exist.

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::id::UserId;

/// A user id, hashed once for any number of experiments.
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
    /// Hashes a user id.
    #[inline]
    #[must_use]
    pub fn of(user: &UserId) -> Self {
        Unit(XxHash3_64::oneshot(user.as_str().as_bytes()))
    }
}

/// The weights and the salt of an experiment, compiled: maps a [`Unit`] to the index of a variant.
///
/// ```
/// use lastprice::bucketing::{Allocation, Unit};
/// use lastprice::UserId;
///
/// let allocation = Allocation::new("some-salt", &[1, 1, 0])?;
/// let variant = allocation.variant(Unit::of(&UserId::new("user-42")?));
/// assert!(variant < 2, "the third has no weight");
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    seed: u64,
    /// Upper bounds, exclusive, of the variants before the last one with a weight. A variant of weight zero has
    /// the bound of the one before it, so no bucket falls to it.
    thresholds: Box<[u64]>,
    variants: usize,
}

impl Allocation {
    /// Compiles weights, one per variant, in their order.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `weights`, if none is positive.
    pub fn new(salt: &str, weights: &[u32]) -> Result<Self> {
        let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
        let Some(last) = weights.iter().rposition(|&w| w > 0) else {
            return Err(Error::invalid("weights", "have no positive one"));
        };
        let mut sum = 0u64;
        let thresholds = weights[..last]
            .iter()
            .map(|&w| {
                sum += u64::from(w);
                // Below 2^64, since a later variant has a weight.
                ((u128::from(sum) << 64) / u128::from(total)) as u64
            })
            .collect();
        Ok(Allocation { seed: seed("variant", salt), thresholds, variants: weights.len() })
    }

    /// The index of the variant of a user.
    #[inline]
    #[must_use]
    pub fn variant(&self, unit: Unit) -> usize {
        self.variant_of_bucket(mix13(unit.0 ^ self.seed))
    }

    /// How many variants there are, those without a weight included.
    #[must_use]
    pub fn variants(&self) -> usize {
        self.variants
    }

    /// Counts instead of searching: a branch that depends on a hash cannot be predicted.
    #[inline]
    fn variant_of_bucket(&self, bucket: u64) -> usize {
        self.thresholds.iter().map(|&t| usize::from(bucket >= t)).sum()
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of_bucket(weights: &[u32], bucket: u64) -> usize {
        Allocation::new("s", weights).unwrap().variant_of_bucket(bucket)
    }

    #[test]
    fn the_last_variant_with_a_weight_is_open_and_later_ones_do_not_exist() {
        assert_eq!(of_bucket(&[1, 1, 0], u64::MAX), 1);
        assert_eq!(of_bucket(&[1, 1, 0], 0), 0);
        assert_eq!(of_bucket(&[1, 1, 0], (1 << 63) - 1), 0);
        assert_eq!(of_bucket(&[1, 1, 0], 1 << 63), 1);
        assert_eq!(of_bucket(&[0, 1], 0), 1);
        assert_eq!(of_bucket(&[0, 0, 5, 0, 0], 0), 2);
        assert_eq!(of_bucket(&[0, 0, 5, 0, 0], u64::MAX), 2);
        assert_eq!(of_bucket(&[u32::MAX, u32::MAX, 1], u64::MAX), 2);
        assert!(Allocation::new("s", &[0, 0]).is_err());
        assert!(Allocation::new("s", &[]).is_err());
    }

    /// Made with PyPI's `xxhash` 4.1.0 by `scripts/oracles/assignment.py`, which shares no code with this crate.
    #[test]
    fn agrees_with_an_independent_implementation() {
        let cases: &[(&str, &str, &[u32], usize)] = include!("vectors.in");
        for (salt, user, weights, expected) in cases {
            let unit = Unit::of(&UserId::new(*user).unwrap());
            assert_eq!(
                Allocation::new(salt, weights).unwrap().variant(unit),
                *expected,
                "{salt} {user} {weights:?}"
            );
        }
        let chosen: std::collections::HashSet<_> = cases.iter().map(|c| c.3).collect();
        assert!(chosen.len() > 3, "the vectors tell variants apart");
    }

    proptest! {
        #[test]
        fn any_weights_any_bucket(weights in prop::collection::vec(any::<u32>(), 1..50), bucket: u64) {
            let total: u128 = weights.iter().map(|&w| u128::from(w)).sum();
            prop_assume!(total > 0);
            let chosen = of_bucket(&weights, bucket);
            prop_assert!(weights[chosen] > 0);
            // The definition, in exact arithmetic: the first i with bucket < floor(2^64 * sum / total).
            let mut sum = 0u128;
            let by_definition = weights.iter().position(|&w| {
                sum += u128::from(w);
                u128::from(bucket) < (sum << 64) / total
            });
            prop_assert_eq!(Some(chosen), by_definition);
        }
    }
}
