use std::ops::Range;

use super::thresholds::Thresholds;
use super::{Share, Unit, seed};
use crate::error::{Error, Result};

/// What an experiment's configuration says of a [`Unit`], compiled: who is in, and which variant they get.
///
/// ```
/// use lastprice::UserId;
/// use lastprice::bucketing::{Allocation, Placement, Share, Unit};
///
/// // Half of all users, in the first fifth of a layer, without the 5 % who are in no experiment at all.
/// let allocation = Allocation::new("some-salt", &[1, 1, 0])?
///     .traffic(Share::percent(50)?)
///     .layer("salt-of-the-layer", Share::NONE..Share::percent(20)?)?
///     .holdout("salt-of-the-tenant", Share::percent(5)?);
/// match allocation.place(Unit::of(&UserId::new("user-42")?)) {
///     Placement::Variant(variant) => assert!(variant < 2, "the third has no weight"),
///     outside => println!("{outside:?}"),
/// }
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    seed: u64,
    pub(super) thresholds: Thresholds,
    variants: u32,
    traffic_seed: u64,
    /// None of the gates is closed to anybody: the common case, and no work.
    gates: Option<Gates>,
}

/// Where a [`Unit`] is placed; the first that holds, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// Among those who are in no experiment of the tenant.
    HeldOut,
    /// In a part of the layer that is not this experiment's.
    OutsideLayer,
    /// Beyond the share of users that the experiment takes.
    OutsideTraffic,
    /// The index of a variant.
    Variant(u32),
}

impl Placement {
    /// The index of the variant, if there is one.
    #[inline]
    #[must_use]
    pub fn variant(self) -> Option<u32> {
        match self {
            Placement::Variant(index) => Some(index),
            _ => None,
        }
    }
}

impl Allocation {
    /// Compiles weights, one per variant, in their order. All users are in.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `weights`, if none is positive.
    pub fn new(salt: &str, weights: &[u32]) -> Result<Self> {
        let thresholds = Thresholds::new(weights)?;
        let variants =
            u32::try_from(weights.len()).map_err(|_| Error::invalid("weights", "are more than 2^32"))?;
        Ok(Allocation {
            seed: seed("variant", salt),
            traffic_seed: seed("traffic", salt),
            thresholds,
            variants,
            gates: None,
        })
    }

    /// Takes only this share of users, by the experiment's salt. A larger share has all users of a smaller one, with
    /// the variants that they have there.
    #[must_use]
    pub fn traffic(mut self, share: Share) -> Self {
        self.gates().traffic = Gate::new(self.traffic_seed, Share::NONE..share);
        self
    }

    /// Takes only the users in this part of a layer. Experiments in parts that do not overlap share no user. The layer's salt
    /// is the tenant's, a slash, and the layer's name: [`Experiment::allocation`](crate::Experiment::allocation) knows it.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `layer`, for an empty part.
    pub fn layer(mut self, layer_salt: &str, part: Range<Share>) -> Result<Self> {
        if part.is_empty() {
            return Err(Error::invalid("layer", "has an empty range"));
        }
        self.gates().layer = Gate::new(seed("layer", layer_salt), part);
        Ok(self)
    }

    /// Leaves out the share of users who are in no experiment.
    #[must_use]
    pub fn holdout(mut self, tenant_salt: &str, share: Share) -> Self {
        self.gates().holdout = Gate::new(seed("holdout", tenant_salt), Share::NONE..share);
        self
    }

    fn gates(&mut self) -> &mut Gates {
        self.gates.get_or_insert(Gates { holdout: Gate::CLOSED, layer: Gate::OPEN, traffic: Gate::OPEN })
    }

    /// Whether the user is in, and the variant.
    #[inline]
    #[must_use]
    pub fn place(&self, unit: Unit) -> Placement {
        let variant = Placement::Variant(self.variant(unit));
        match &self.gates {
            None => variant,
            Some(gates) => gates.place(unit, variant),
        }
    }

    /// [`place`](Allocation::place) for many: `out[i]` is where `units[i]` is placed.
    ///
    /// ```
    /// # use lastprice::UserId;
    /// # use lastprice::bucketing::{Allocation, Placement, Unit};
    /// let allocation = Allocation::new("some-salt", &[1, 1])?;
    /// let ids: Vec<UserId> = (0..100).map(|n| UserId::new(format!("user-{n}"))).collect::<Result<_, _>>()?;
    /// let units: Vec<Unit> = ids.iter().map(Unit::of).collect();
    /// let mut placements = vec![Placement::HeldOut; units.len()];
    /// allocation.place_all(&units, &mut placements);
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    ///
    /// # Panics
    ///
    /// If the slices differ in length.
    pub fn place_all(&self, units: &[Unit], out: &mut [Placement]) {
        assert_eq!(units.len(), out.len(), "one placement per unit");
        for (out, unit) in out.iter_mut().zip(units) {
            *out = self.place(*unit);
        }
    }

    /// The index of the variant that a user who is in gets.
    #[inline]
    #[must_use]
    pub fn variant(&self, unit: Unit) -> u32 {
        self.thresholds.passed(unit.bucket(self.seed))
    }

    /// How many variants there are, those without a weight included.
    #[must_use]
    pub fn variants(&self) -> u32 {
        self.variants
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Gates {
    holdout: Gate,
    layer: Gate,
    traffic: Gate,
}

impl Gates {
    #[inline]
    fn place(&self, unit: Unit, variant: Placement) -> Placement {
        // All three, then the choice: none of them can be predicted, so a way out early costs more than it saves.
        let (holdout, layer, traffic) =
            (self.holdout.has(unit), self.layer.has(unit), self.traffic.has(unit));
        let inside = if traffic { variant } else { Placement::OutsideTraffic };
        let inside = if layer { inside } else { Placement::OutsideLayer };
        if holdout { Placement::HeldOut } else { inside }
    }
}

/// A part of the line of one purpose: buckets from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gate {
    seed: u64,
    first: u64,
    last: u64,
}

impl Gate {
    const OPEN: Gate = Gate { seed: 0, first: 0, last: u64::MAX };
    const CLOSED: Gate = Gate { seed: 0, first: 1, last: 0 };

    pub(super) fn new(seed: u64, part: Range<Share>) -> Self {
        match (part.start.threshold(), part.end.threshold()) {
            (Some(first), None) => Gate { seed, first, last: u64::MAX },
            (Some(first), Some(end)) if first < end => Gate { seed, first, last: end - 1 },
            _ => Gate { seed, ..Gate::CLOSED },
        }
    }

    #[inline]
    fn has(&self, unit: Unit) -> bool {
        self.has_bucket(unit.bucket(self.seed))
    }

    #[inline]
    pub(super) fn has_bucket(&self, bucket: u64) -> bool {
        (self.first <= bucket) & (bucket <= self.last)
    }
}
