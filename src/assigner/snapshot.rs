use crate::error::Result;
use crate::repo::{Decided, Decider, NewExperiment, Subject};

/// A tenant's experiments as of one moment. Never changes.
pub(super) struct Snapshot {
    pub(super) version: u64,
    pub(super) deciders: Vec<Decider>,
    /// Where an experiment is, by the hash of its key and, if that is taken, after it. At least half of the slots are
    /// [`FREE`]. (Of the time that a decision takes, a general hash map took a third.)
    slots: Box<[u32]>,
}

const FREE: u32 = u32::MAX;

impl Snapshot {
    pub(super) fn new(version: u64, deciders: Vec<Decider>) -> Self {
        let slots = vec![FREE; (4 * deciders.len()).next_power_of_two().max(4)].into_boxed_slice();
        let mut snapshot = Snapshot { version, deciders, slots };
        for (decider, index) in snapshot.deciders.iter().zip(0..) {
            let mut slot = snapshot.first_slot(&decider.key);
            while snapshot.slots[slot] != FREE {
                slot = snapshot.next_slot(slot);
            }
            snapshot.slots[slot] = index;
        }
        snapshot
    }

    pub(super) fn fixed(experiments: impl IntoIterator<Item = NewExperiment>) -> Result<Self> {
        let deciders = experiments.into_iter().map(|new| new.decider()).collect::<Result<_>>()?;
        Ok(Snapshot::new(0, deciders))
    }

    /// Where the experiment is, and what it says.
    #[inline]
    pub(super) fn decide(&self, key: &str, subject: &Subject<'_>) -> Option<(u32, Decided)> {
        let index = self.find(key)?;
        let decider = &self.deciders[index as usize];
        Some((index, decider.decide_without_quote(subject)))
    }

    #[inline]
    pub(super) fn find(&self, key: &str) -> Option<u32> {
        let mut slot = self.first_slot(key);
        loop {
            let index = self.slots[slot];
            let decider = self.deciders.get(index as usize)?; // none is at FREE
            if *decider.key == *key {
                return Some(index);
            }
            slot = self.next_slot(slot);
        }
    }

    /// By the upper bits of the hash, which every byte has a say in.
    #[inline]
    fn first_slot(&self, key: &str) -> usize {
        (hash(key.as_bytes()) >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    #[inline]
    fn next_slot(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }
}

/// Quick for texts of some ten bytes. Keys are the tenant's own, so nobody makes them collide but to their own harm.
#[inline]
fn hash(key: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| (hash.rotate_left(29) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let (words, rest) = key.as_chunks::<8>();
    let hash = words.iter().fold(key.len() as u64, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    let rest = match key.last_chunk::<8>() {
        Some(last) => u64::from_le_bytes(*last),
        None => rest.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    mix(hash, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::Currency;
    use crate::repo::Variants;

    #[test]
    fn every_key_is_found_and_no_other() {
        let arms = || Variants::new().add("a", 1, 1).add("b", 1, 2);
        let new = |key: String| NewExperiment::new(key, "N", Currency::USD, arms());
        // Of all lengths, and such that differ in one place only.
        let long = |n: usize| format!("{}{:0>4}{}", "x".repeat(n % 60), n, "y".repeat(n % 41));
        for count in [0, 1, 2, 3, 50, 1000] {
            let kinds = [
                |n: usize| format!("k{n}"),
                |n| format!("experiment-{n}"),
                |n| format!("{n}-of-the-experiments"),
            ];
            let key = |n: usize| kinds.get(n % 4).map_or_else(|| long(n), |kind| kind(n));
            let keys: Vec<String> = (0..count).map(key).collect();
            let snapshot = Snapshot::fixed(keys.iter().cloned().map(new)).unwrap();
            for (key, index) in keys.iter().zip(0..) {
                assert_eq!(snapshot.find(key), Some(index), "{key}");
                assert_eq!(snapshot.find(&format!("{key}z")), None);
            }
            assert_eq!(snapshot.find(""), None);
            let distance = |(key, index): (&String, u32)| {
                let at = snapshot.slots.iter().position(|slot| *slot == index).unwrap();
                at.wrapping_sub(snapshot.first_slot(key)) & (snapshot.slots.len() - 1)
            };
            let far: usize = keys.iter().zip(0..).map(distance).sum();
            assert!(far <= count, "{count} keys are {far} slots from their places");
        }
    }
}
