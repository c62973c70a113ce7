//! What an experiment tries: variants, with their weights and prices.

use std::collections::HashSet;

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use tokio_postgres::types::{FromSql, Type};

use crate::error::{Error, Result};
use crate::money::{Currency, Money, decimal};

/// One arm of an experiment, as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Variant {
    /// Its name, unique within the experiment.
    pub name: String,
    /// Its share of new users, relative to the sum of all weights; without a weight it gets none.
    #[serde(deserialize_with = "exact::whole")]
    pub weight: u32,
    /// Its headline price, in the experiment's currency.
    #[serde(with = "exact")]
    pub price: Decimal,
    /// Its further prices.
    #[serde(default, rename = "prices", skip_serializing_if = "PriceBook::is_empty")]
    pub book: PriceBook,
}

/// Prices by item (monthly, annual, seat …) and currency, beside the headline price.
///
/// ```
/// # use lastprice::{Money, Variants};
/// let variants = Variants::new()
///     .add("control", 1, "19.00")
///     .add("plus", 1, "29.00")
///     .book("plus", "annual", Money::new("290", "EUR")?);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PriceBook(Vec<BookPrice>);

/// One line of a [`PriceBook`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BookPrice {
    /// What is sold.
    pub item: String,
    #[serde(deserialize_with = "currency_from")]
    /// The currency of the price.
    pub currency: Currency,
    #[serde(with = "exact")]
    /// The price.
    pub price: Decimal,
}

impl PriceBook {
    /// The price of an item in a currency.
    #[must_use]
    pub fn price(&self, item: &str, currency: Currency) -> Option<Money> {
        let line = self.0.iter().find(|line| line.item == item && line.currency == currency)?;
        Some(Money::stored(line.price, line.currency))
    }

    /// All lines.
    pub fn iter(&self) -> impl Iterator<Item = &BookPrice> {
        self.0.iter()
    }

    /// Whether there is no line.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The variants of an experiment to be; checked when the experiment is created or edited.
///
/// ```
/// // 25 % of new users each pay 19 and 39, and half of them 29.
/// let variants = lastprice::Variants::new().add("low", 1, 19).add("middle", 2, 29).add("high", 1, "39.00");
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Variants {
    arms: Vec<(String, u32, String)>,
    book: Vec<(String, String, Money)>,
}

impl Variants {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more variant: its name, weight, and headline price in the experiment's currency. The price is anything
    /// that writes itself as a decimal: `"19.00"`, `19`, a `Decimal`.
    pub fn add(mut self, name: impl Into<String>, weight: u32, price: impl ToString) -> Self {
        self.arms.push((name.into(), weight, price.to_string()));
        self
    }

    /// A further price of a variant, in its price book.
    pub fn book(mut self, variant: impl Into<String>, item: impl Into<String>, price: Money) -> Self {
        self.book.push((variant.into(), item.into(), price));
        self
    }

    /// The same rules as the constraints of the table, and at least two variants.
    pub(crate) fn check(&self) -> Result<Vec<Variant>> {
        let field = "variants";
        if self.arms.len() < 2 || self.arms.len() > 1000 {
            return Err(Error::invalid(field, "are not between 2 and 1000"));
        }
        let mut names = HashSet::new();
        let mut variants = Vec::with_capacity(self.arms.len());
        for (name, weight, price) in &self.arms {
            if !is_printable(name) {
                return Err(Error::invalid(field, "have a name that is not 1 to 128 printable characters"));
            }
            if !names.insert(name.as_str()) {
                return Err(Error::invalid(field, format_args!("have two of the name `{name}`")));
            }
            // Exactly: `parse` would round what has too many digits.
            let price = decimal(price).filter(|p| !p.is_sign_negative());
            let price = price.and_then(|p| Money::checked(p).ok());
            let price = price.ok_or_else(|| {
                Error::invalid(
                    field,
                    format_args!("have a price, that of `{name}`, that is not a decimal from 0 to 10^12 with at most 6 digits after the point"),
                )
            })?;
            variants.push(Variant { name: name.clone(), weight: *weight, price, book: PriceBook::default() });
        }
        if self.arms.iter().all(|(_, weight, _)| *weight == 0) {
            return Err(Error::invalid(field, "have no positive weight"));
        }
        if self.book.len() > MAX_BOOK {
            return Err(Error::invalid("book", format_args!("has more than {MAX_BOOK} prices")));
        }
        let mut lines = HashSet::new();
        for (name, item, price) in &self.book {
            let variant = variants.iter_mut().find(|v| v.name == *name);
            let variant =
                variant.ok_or_else(|| Error::invalid("book", "names a variant that there is not"))?;
            if !is_printable(item) {
                return Err(Error::invalid(
                    "book",
                    format_args!("of `{name}` has an item that is not 1 to 128 printable characters"),
                ));
            }
            // Money of a sum, or of minor units, may be larger.
            let within = Money::checked(price.amount()).ok();
            let amount = within.filter(|p| *p >= Decimal::ZERO).ok_or_else(|| {
                Error::invalid(
                    "book",
                    format_args!("of `{name}` has a price, that of `{item}`, that is not from 0 to 10^12 with at most 6 digits after the point"),
                )
            })?;
            if !lines.insert((name, item, price.currency())) {
                return Err(Error::invalid(
                    "book",
                    format_args!("of `{name}` has two prices for `{item}` in one currency"),
                ));
            }
            variant.book.0.push(BookPrice { item: item.clone(), currency: price.currency(), price: amount });
        }
        Ok(variants)
    }
}

/// Prices in the books of all variants together: an experiment is read by every assignment.
const MAX_BOOK: usize = 10_000;

/// 1 to 128 characters, none of them of control. Line and paragraph separators are, by some locales of the database.
pub(super) fn is_printable(name: &str) -> bool {
    let controls = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    !name.is_empty() && name.chars().count() <= 128 && !name.chars().any(controls)
}

/// A `jsonb` column of variants, or of a price book.
#[derive(Debug)]
pub(crate) struct FromJsonb<T>(pub(crate) T);

impl<'a, T: Deserialize<'a>> FromSql<'a> for FromJsonb<T> {
    fn from_sql(
        _: &Type,
        raw: &'a [u8],
    ) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        match raw {
            [1, json @ ..] => Ok(FromJsonb(serde_json::from_slice(json)?)),
            _ => Err("an unknown version of jsonb".into()),
        }
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }
}

fn currency_from<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Currency, D::Error> {
    let code = String::deserialize(from)?;
    Currency::stored(&code).map_err(serde::de::Error::custom)
}

/// Prices are written as strings, and read from strings and numbers alike, by their digits: most readers of JSON
/// turn a number into a float. Weights that SQL wrote may be 50.0.
mod exact {
    use rust_decimal::prelude::ToPrimitive;

    use super::*;

    pub(super) fn serialize<S: Serializer>(price: &Decimal, out: S) -> std::result::Result<S::Ok, S::Error> {
        out.collect_str(price)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Decimal, D::Error> {
        let raw = Box::<RawValue>::deserialize(from)?;
        let digits = raw.get().trim_matches('"');
        // A number that SQL wrote may have any number of zeros at its end.
        let short = || digits.trim_end_matches('0').trim_end_matches('.');
        Decimal::from_str_exact(digits)
            .or_else(|e| if digits.contains('.') { Decimal::from_str_exact(short()) } else { Err(e) })
            .or_else(|_| Decimal::from_scientific(digits))
            .map_err(|_| serde::de::Error::custom("a price or weight is not a decimal"))
    }

    pub(super) fn whole<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<u32, D::Error> {
        let number = deserialize(from)?;
        let whole = number.to_u32().filter(|whole| Decimal::from(*whole) == number);
        whole.ok_or_else(|| serde::de::Error::custom("a weight is not a whole number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Variants {
        Variants::new().add("a", 1, "19.00").add("b", 1, 29)
    }

    #[test]
    fn prices_survive_json_to_the_digit() {
        let variants = two().book("b", "annual", Money::new("290.10", "EUR").unwrap()).check().unwrap();
        let json = serde_json::to_string(&variants).unwrap();
        assert!(json.contains(r#""price":"19.00""#), "{json}");
        assert_eq!(serde_json::from_str::<Vec<Variant>>(&json).unwrap(), variants);
        let numbers = r#"[{"name": "a", "weight": 1, "price": 123456789012.123456}]"#;
        let read: Vec<Variant> = serde_json::from_str(numbers).unwrap();
        assert_eq!(read[0].price.to_string(), "123456789012.123456");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |v: Variants, field| {
            let error = v.check().unwrap_err();
            assert_eq!(error.field(), Some(field));
            error.to_string()
        };
        refused(Variants::new().add("a", 1, 1), "variants");
        assert!(refused(two().add("a", 1, 1), "variants").contains("`a`"));
        refused(two().add("", 1, 1), "variants");
        refused(two().add("a\0", 1, 1), "variants");
        for price in ["-1", "NaN", "1.1234567", "1000000000000", "", "1e3", "Infinity"] {
            let said = refused(two().add("the third", 1, price), "variants");
            assert!(said.contains("that of `the third`, that is not a decimal"), "{said}");
        }
        refused(Variants::new().add("a", 0, 1).add("b", 0, 1), "variants");
        refused(two().book("zzz", "annual", Money::new("1", "USD").unwrap()), "book");
        refused(two().book("a", "", Money::new("1", "USD").unwrap()), "book");
        let said = refused(two().book("a", "x", Money::new("-1", "USD").unwrap()), "book");
        assert!(said.starts_with("`book` of `a` has a price, that of `x`"), "{said}");
        let twice = Money::new("1", "USD").unwrap();
        refused(two().book("a", "x", twice).book("a", "x", twice), "book");
    }
}
