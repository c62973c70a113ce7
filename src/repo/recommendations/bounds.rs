//! Within which a price may be approved.

use rust_decimal::Decimal;

use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::money::{MAX_AMOUNT, Money};

/// Within which a recommended price may be approved. What is not said is not bounded.
///
/// ```
/// use lastprice::{Money, PriceBounds, bucketing::Share};
///
/// let bounds = PriceBounds::new()
///     .floor(Money::new("15", "USD")?)
///     .ceiling(Money::new("49", "USD")?)
///     .max_change(Share::percent(20)?);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[must_use]
pub struct PriceBounds {
    floor: Option<Money>,
    ceiling: Option<Money>,
    max_change: Option<Share>,
}

impl PriceBounds {
    /// No bounds yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The lowest price, which itself is allowed.
    pub fn floor(mut self, price: Money) -> Self {
        self.floor = Some(price);
        self
    }

    /// The highest price, which itself is allowed.
    pub fn ceiling(mut self, price: Money) -> Self {
        self.ceiling = Some(price);
        self
    }

    /// By which share of it the price in force may change at most, up or down; that itself is allowed. In force is the headline
    /// price of the experiment's baseline, which everyone outside of the experiment sees. Of more than twice the price, a
    /// ceiling says so.
    pub fn max_change(mut self, share: Share) -> Self {
        self.max_change = Some(share);
        self
    }

    /// The lowest and the highest price that they allow in place of the one in force.
    pub(crate) fn range(&self, in_force: Money) -> Result<(Decimal, Decimal)> {
        self.check()?;
        let (mut low, mut high) = (Decimal::ZERO, Decimal::from(MAX_AMOUNT));
        for (field, bound) in [("floor", self.floor), ("ceiling", self.ceiling)] {
            if bound.is_some_and(|bound| bound.currency() != in_force.currency()) {
                return Err(Error::invalid(field, "is not in the currency of the experiment"));
            }
        }
        if let Some(share) = self.max_change {
            let change = in_force.amount() * Decimal::new(share.millionths().into(), 6);
            (low, high) = (in_force.amount() - change, in_force.amount() + change);
        }
        low = self.floor.map_or(low, |floor| low.max(floor.amount()));
        high = self.ceiling.map_or(high, |ceiling| high.min(ceiling.amount()));
        Ok((low, high))
    }

    /// Whether they are bounds at all.
    pub(super) fn check(&self) -> Result<()> {
        for (field, bound) in [("floor", self.floor), ("ceiling", self.ceiling)] {
            if bound.is_some_and(|bound| bound.amount() < Decimal::ZERO) {
                return Err(Error::invalid(field, "is negative"));
            }
        }
        if let (Some(floor), Some(ceiling)) = (self.floor, self.ceiling) {
            if floor.currency() != ceiling.currency() {
                return Err(Error::invalid("ceiling", "is not in the currency of the floor"));
            }
            if ceiling.amount() < floor.amount() {
                return Err(Error::invalid("ceiling", "is below the floor"));
            }
        }
        Ok(())
    }

    /// All bounds that a price breaks are named, and the limit of each. Both prices are in one currency.
    pub(super) fn allow(&self, price: Money, in_force: Money) -> Result<()> {
        for (field, bound) in [("floor", self.floor), ("ceiling", self.ceiling)] {
            if bound.is_some_and(|bound| bound.currency() != price.currency()) {
                return Err(Error::invalid(
                    field,
                    format_args!("is not in the currency of the price, {}", price.currency()),
                ));
            }
        }
        let (mut broken, mut limits) = (Vec::new(), Vec::new());
        if let Some(floor) = self.floor.filter(|floor| price.amount() < floor.amount()) {
            broken.push("floor");
            limits.push(format!("is below the floor of {floor}"));
        }
        if let Some(ceiling) = self.ceiling.filter(|ceiling| price.amount() > ceiling.amount()) {
            broken.push("ceiling");
            limits.push(format!("is above the ceiling of {ceiling}"));
        }
        if let Some(share) = self.max_change.filter(|share| changes_more(price, in_force, *share)) {
            broken.push("max_change");
            limits.push(format!("changes the price in force by more than {share}"));
        }
        if broken.is_empty() {
            return Ok(());
        }
        Err(Error::conflict(format!("the price {}", limits.join(", and "))).with_fields(broken))
    }
}

/// Exactly, without a division.
fn changes_more(price: Money, in_force: Money, share: Share) -> bool {
    let millionths = |share: Share| Decimal::from(share.millionths());
    let change = (price.amount() - in_force.amount()).abs().checked_mul(millionths(Share::ALL));
    let limit = in_force.amount().checked_mul(millionths(share));
    !matches!((change, limit), (Some(change), Some(limit)) if change <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usd(amount: &str) -> Money {
        Money::new(amount, "USD").unwrap()
    }

    #[test]
    fn a_bound_itself_is_within() {
        let percent = |n| PriceBounds::new().max_change(Share::percent(n).unwrap());
        let broken = |bounds: PriceBounds, price: &str, in_force: &str| -> Vec<&'static str> {
            let error = bounds.allow(usd(price), usd(in_force)).err();
            error.map_or_else(Vec::new, |error| error.conflicting_fields().to_vec())
        };
        let of = |floor: &str, ceiling: &str| PriceBounds::new().floor(usd(floor)).ceiling(usd(ceiling));
        for (bounds, price, in_force, expected) in [
            (PriceBounds::new(), "0", "19", &[][..]),
            (of("10", "20"), "10.00", "19", &[]),
            (of("10", "20"), "20.000000", "19", &[]),
            (of("10", "20"), "9.999999", "19", &["floor"]),
            (of("10", "20"), "20.000001", "19", &["ceiling"]),
            (percent(20), "12", "10", &[]),
            (percent(20), "8", "10", &[]),
            (percent(20), "12.000001", "10", &["max_change"]),
            (percent(20), "7.999999", "10", &["max_change"]),
            (percent(0), "19", "19.00", &[]),
            (percent(0), "19.000001", "19", &["max_change"]),
            (percent(100), "0", "19", &[]),
            (percent(100), "38", "19", &[]),
            (percent(100), "38.01", "19", &["max_change"]),
            // Of nothing, nothing is a share.
            (percent(100), "0", "0", &[]),
            (percent(100), "0.000001", "0", &["max_change"]),
            (percent(100), "999999999999.999999", "999999999999.999999", &[]),
            (percent(50).ceiling(usd("20")), "30", "19", &["ceiling", "max_change"]),
        ] {
            assert_eq!(broken(bounds, price, in_force), expected, "{bounds:?}: {price} for {in_force}");
        }
        let error = of("10", "20").max_change(Share::percent(5).unwrap()).allow(usd("20.5"), usd("19"));
        let text = error.unwrap_err().to_string();
        assert_eq!(
            text,
            "the price is above the ceiling of 20 USD, and changes the price in force by more than 5 %"
        );
    }

    #[test]
    fn what_is_no_bound_is_named() {
        let eur = Money::new("10", "EUR").unwrap();
        let new = PriceBounds::new();
        for (bounds, field) in [
            (new.floor(usd("-0.01")), "floor"),
            (new.ceiling(usd("-0.01")), "ceiling"),
            (new.floor(usd("2")).ceiling(usd("1")), "ceiling"),
            (new.floor(usd("2")).ceiling(eur), "ceiling"),
        ] {
            assert_eq!(bounds.check().unwrap_err().field(), Some(field));
        }
        for (bounds, field) in [(new.floor(eur), "floor"), (new.ceiling(eur), "ceiling")] {
            bounds.check().unwrap();
            assert_eq!(bounds.allow(usd("10"), usd("10")).unwrap_err().field(), Some(field));
        }
    }
}
