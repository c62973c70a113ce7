//! Newtyped ids: an experiment's id cannot be passed where a tenant's is meant.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::{Error, Result};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $field:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// A new one is a UUID version 7: ids made later sort later. A UUID of the host's own is accepted as
        /// well.
        ///
        /// ```
        #[doc = concat!("use lastprice::", stringify!($name), ";")]
        ///
        #[doc = concat!("let id = ", stringify!($name), "::new();")]
        #[doc = concat!("assert_eq!(id.to_string().parse::<", stringify!($name), ">().unwrap(), id);")]
        #[doc = concat!("assert_eq!(", stringify!($name), "::from(id.uuid()), id);")]
        /// ```
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id, from the clock and random bits.
            #[must_use]
            #[allow(clippy::new_without_default, reason = "a default id would be a surprise: each is new")]
            pub fn new() -> Self {
                $name(Uuid::now_v7())
            }

            /// The UUID.
            #[must_use]
            pub fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(&self.0)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                $name(id)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(s: &str) -> Result<Self> {
                s.parse().map($name).map_err(|_| Error::invalid($field, "is not a UUID"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    )*};
}

ids! {
    /// The id of a tenant.
    TenantId, "tenant_id";
    /// The id of an experiment, unique within its tenant.
    ExperimentId, "experiment_id";
    /// The id of a view: a view recorded twice under one id counts once.
    ViewId, "view_id";
    /// The id of a ledger entry.
    ConversionId, "conversion_id";
    /// The id of a recommendation.
    RecommendationId, "recommendation_id";
}

/// Text that was checked once, for memory and database alike: not empty, no NUL, at most `max` bytes.
fn checked(field: &'static str, value: &str, max: usize) -> Result<()> {
    if value.is_empty() {
        return Err(Error::invalid(field, "is empty"));
    }
    if value.len() > max {
        return Err(Error::invalid(field, format_args!("has {} bytes; {max} are allowed", value.len())));
    }
    if value.contains('\0') {
        return Err(Error::invalid(field, "contains a NUL character"));
    }
    Ok(())
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident, $field:literal, $max:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks the text and takes a copy of it.
            ///
            /// # Errors
            ///
            #[doc = concat!("[`InvalidInput`](crate::ErrorKind::InvalidInput), naming `", $field, "`: the text is empty, ")]
            #[doc = concat!("longer than ", $max, " bytes, or contains a NUL character.")]
            pub fn new(value: impl Into<String>) -> Result<Self> {
                let value = value.into();
                checked($field, &value, $max)?;
                Ok($name(value.into_boxed_str()))
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(s: &str) -> Result<Self> {
                Self::new(s)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = Error;

            fn try_from(s: &str) -> Result<Self> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(s: String) -> Result<Self> {
                Self::new(s)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:?})"), self.0)
            }
        }
    )*};
}

texts! {
    /// The id of a tenant's customer: any text of 1 to 512 bytes without NUL, compared byte by byte.
    ///
    /// It decides the variant, so issue it on the server: whoever may choose an id may search for a cheaper
    /// variant.
    ///
    /// ```
    /// use lastprice::UserId;
    ///
    /// assert_eq!(UserId::new("user-42")?.as_str(), "user-42");
    /// assert!(UserId::new("").is_err());
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    UserId, "user_id", 512;
    /// Names one piece of work, so that doing it again does nothing: 1 to 255 bytes without NUL, unique
    /// within a tenant.
    ///
    /// What is authorised before a charge and settled by its webhook is one payment only under one key: make it before the
    /// charge, and send it along to the payment provider. Of what comes from outside only, take what is repeated when it
    /// repeats itself: the id of a charge or a refund, not of a delivery.
    ///
    /// ```
    /// let key = lastprice::IdempotencyKey::new("order-1001:paid")?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    IdempotencyKey, "idempotency_key", 255;
    /// The host's id of an order: 1 to 255 bytes without NUL.
    ///
    /// ```
    /// let order = lastprice::OrderId::new("order-1001")?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    OrderId, "order_id", 255;
    /// The host's id of a subscription: 1 to 255 bytes without NUL.
    ///
    /// ```
    /// let subscription = lastprice::SubscriptionId::new("sub_88")?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    SubscriptionId, "subscription_id", 255;
    /// A period of a subscription, as the host names it, so that it is paid once: 1 to 255 bytes without NUL.
    ///
    /// ```
    /// let november = lastprice::Period::new("2026-11")?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    Period, "period", 255;
    /// Who makes a change, for the record: 1 to 255 bytes without NUL.
    ///
    /// ```
    /// let actor = lastprice::Actor::new("ops@example.com")?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    Actor, "actor", 255;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_checked_once_for_memory_and_database() {
        for good in ["a", "user-42", "ß", &"x".repeat(512), "日本語", "a b\tc"] {
            assert_eq!(UserId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "a\0b", "\0", &"x".repeat(513), &"é".repeat(257), &"x".repeat(1 << 20)] {
            let error = UserId::new(bad).unwrap_err();
            assert_eq!(error.field(), Some("user_id"));
            assert!(error.to_string().len() < 100, "the value is not repeated");
        }
    }

    #[test]
    fn later_ids_sort_later() {
        let ids: Vec<_> = (0..1000).map(|_| ViewId::new()).collect();
        assert!(ids.is_sorted());
    }
}
