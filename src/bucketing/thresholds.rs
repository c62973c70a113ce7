use crate::error::{Error, Result};

/// Where on the line of 2^64 one variant ends and the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Thresholds {
    /// Upper bounds, exclusive, of the variants before the last one with a weight. A variant of weight zero has
    /// the bound of the one before it, so no bucket falls to it.
    pub(super) bounds: Box<[u64]>,
    guide: Option<Guide>,
}

impl Thresholds {
    pub(super) fn new(weights: &[u32]) -> Result<Self> {
        let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
        let Some(last) = weights.iter().rposition(|&w| w > 0) else {
            return Err(Error::invalid("weights", "have no positive one"));
        };
        let mut sum = 0u64;
        let bounds: Box<[u64]> = weights[..last]
            .iter()
            .map(|&w| {
                sum += u64::from(w);
                // Below 2^64, since a later variant has a weight.
                ((u128::from(sum) << 64) / u128::from(total)) as u64
            })
            .collect();
        let guide = Guide::new(&bounds);
        Ok(Thresholds { bounds, guide })
    }

    /// How many bounds the bucket has passed. Counts instead of searching: a branch that depends on a hash cannot be
    /// predicted.
    #[inline]
    pub(super) fn passed(&self, bucket: u64) -> u32 {
        if let [only] = *self.bounds {
            return u32::from(bucket >= only);
        }
        match &self.guide {
            Some(guide) => guide.passed(&self.bounds, bucket),
            None if self.bounds.len() <= 16 => {
                self.bounds.iter().map(|bound| u32::from(bucket >= *bound)).sum()
            }
            None => self.bounds.partition_point(|bound| *bound <= bucket) as u32,
        }
    }
}

/// The line in cells of equal size, with at most one bound in each: one look at the cell and one comparison, however
/// many variants there are (the guide table of Chen and Asau, 1974, with exact bounds).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Guide {
    /// The bound to compare with, by cell; all before it were passed.
    cells: Box<[u16]>,
    shift: u32,
}

impl Guide {
    const MOST_CELLS: usize = 1024;

    /// `None` if few bounds are counted as fast, or two are too close.
    fn new(bounds: &[u64]) -> Option<Self> {
        if bounds.len() < 3 || bounds.len() > Self::MOST_CELLS {
            return None;
        }
        let mut size = (2 * bounds.len()).next_power_of_two();
        while size <= Self::MOST_CELLS {
            let shift = 64 - size.trailing_zeros();
            let cell = |bound: &u64| bound >> shift;
            if bounds.windows(2).all(|pair| cell(&pair[0]) < cell(&pair[1])) {
                let last = bounds.len() - 1;
                // Beyond the last bound: that one is compared, and passed.
                let first_in = |c: u64| bounds.partition_point(|bound| cell(bound) < c).min(last) as u16;
                return Some(Guide { cells: (0..size as u64).map(first_in).collect(), shift });
            }
            size *= 2;
        }
        None
    }

    #[inline]
    fn passed(&self, bounds: &[u64], bucket: u64) -> u32 {
        let next = usize::from(self.cells[(bucket >> self.shift) as usize]);
        next as u32 + u32::from(bucket >= bounds[next])
    }
}
