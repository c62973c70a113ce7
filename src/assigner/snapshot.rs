use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use twox_hash::XxHash3_64;

use crate::error::Result;
use crate::repo::{Decider, NewExperiment};

/// A tenant's experiments as of one moment. Never changes.
pub(super) struct Snapshot {
    pub(super) version: u64,
    pub(super) deciders: Vec<Decider>,
    by_key: HashMap<Box<str>, u32, BuildHasherDefault<KeyHasher>>,
}

impl Snapshot {
    pub(super) fn new(version: u64, deciders: Vec<Decider>) -> Self {
        let by_key = deciders.iter().map(|decider| decider.key.clone()).zip(0..).collect();
        Snapshot { version, deciders, by_key }
    }

    pub(super) fn fixed(experiments: impl IntoIterator<Item = NewExperiment>) -> Result<Self> {
        let deciders = experiments.into_iter().map(|new| new.decider()).collect::<Result<_>>()?;
        Ok(Snapshot::new(0, deciders))
    }

    #[inline]
    pub(super) fn find(&self, key: &str) -> Option<u32> {
        self.by_key.get(key).copied()
    }
}

/// Keys are the tenant's own, a hundred or so: what the standard library does against hostile ones costs more than all
/// of the decision.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.0 = XxHash3_64::oneshot(bytes);
    }

    /// The end of a string.
    #[inline]
    fn write_u8(&mut self, _: u8) {}

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}
