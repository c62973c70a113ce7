//! From rows to values, and from texts to enumerations.

use rust_decimal::Decimal;
use tokio_postgres::Row;
use tokio_postgres::types::FromSql;
use uuid::Uuid;

use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::money::{Currency, Money};

/// Reads columns by name. A column that is not as the schema says is an error, never a panic.
pub(crate) trait Fields {
    fn field<'a, T: FromSql<'a>>(&'a self, name: &str) -> Result<T>;

    fn id<T: From<Uuid>>(&self, name: &str) -> Result<T> {
        self.field::<Uuid>(name).map(T::from)
    }

    fn count(&self, name: &str) -> Result<u64> {
        u64::try_from(self.field::<i64>(name)?)
            .map_err(|_| Error::internal(format!("column `{name}` is negative")))
    }

    /// A share, in millionths.
    fn share(&self, name: &str) -> Result<Share> {
        let millionths = u32::try_from(self.field::<i32>(name)?).ok();
        millionths
            .and_then(|n| Share::per_million(n).ok())
            .ok_or_else(|| Error::internal(format!("column `{name}` is no share")))
    }

    fn currency(&self, name: &str) -> Result<Currency> {
        Currency::stored(self.field(name)?)
    }

    fn money(&self, amount: &str, currency: &str) -> Result<Money> {
        Ok(Money::stored(self.field::<Decimal>(amount)?, self.currency(currency)?))
    }
}

impl Fields for Row {
    fn field<'a, T: FromSql<'a>>(&'a self, name: &str) -> Result<T> {
        // The driver's error may quote the value.
        self.try_get(name)
            .map_err(|_| Error::internal(format!("column `{name}` does not hold what the schema says")))
    }
}

/// An enumeration that the database holds as text.
macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident, $field:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl $name {
            /// The name, as the database holds it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }

            #[allow(dead_code, reason = "some enumerations are only written")]
            pub(crate) fn stored(text: &str) -> crate::Result<Self> {
                match text {
                    $($text => Ok($name::$variant),)*
                    _ => Err(crate::Error::internal(concat!("a stored `", $field, "` is none that this release knows"))),
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = crate::Error;

            fn from_str(s: &str) -> crate::Result<Self> {
                match s {
                    $($text => Ok($name::$variant),)*
                    _ => Err(crate::Error::invalid($field, concat!("is none of" $(, " `", $text, "`")*))),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
pub(crate) use text_enum;

/// About what a JSON value holds on the heap, in bytes: the size of each value, and its texts. Recurses, so check the depth
/// before.
pub(crate) fn heap_of(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    const EACH: usize = size_of::<Value>();
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| EACH + heap_of(item)).sum(),
        // A key is a string of its own, in a node of the tree.
        Value::Object(map) => map.iter().map(|(key, item)| 2 * EACH + key.len() + heap_of(item)).sum(),
        _ => 0,
    }
}

/// Rules that several inputs share; the database has the same ones as constraints.
pub(crate) mod rules {
    use chrono::{DateTime, Datelike, NaiveDate, Utc};
    use serde_json::Value;

    use crate::error::{Error, Result};

    pub(crate) fn name(field: &'static str, name: &str) -> Result<()> {
        if name.trim().is_empty() || name.chars().count() > 200 || name.contains('\0') {
            return Err(Error::invalid(field, "is not a text of 1 to 200 characters"));
        }
        Ok(())
    }

    /// Within what PostgreSQL and the calendar of any reader can hold.
    pub(crate) fn time(field: &'static str, time: DateTime<Utc>) -> Result<()> {
        day(field, time.date_naive())
    }

    pub(crate) fn day(field: &'static str, day: NaiveDate) -> Result<()> {
        if !(1970..=9999).contains(&day.year()) {
            return Err(Error::invalid(field, "is not between the years 1970 and 9999"));
        }
        Ok(())
    }

    /// At most 64 KiB and 100 levels, no NUL: `jsonb` takes none, and readers give up on deep nesting (serde_json
    /// at 128).
    pub(crate) fn object(field: &'static str, value: &Value) -> Result<()> {
        if !value.is_object() {
            return Err(Error::invalid(field, "is not a JSON object"));
        }
        json(field, value)
    }

    pub(crate) fn json(field: &'static str, value: &Value) -> Result<()> {
        // First, since what follows recurses.
        if is_deeper(value, 100) {
            return Err(Error::invalid(field, "is nested more than 100 levels deep"));
        }
        if value.to_string().len() > 64 * 1024 {
            return Err(Error::invalid(field, "has more than 64 KiB"));
        }
        if has_nul(value) {
            return Err(Error::invalid(field, "contains a NUL character"));
        }
        Ok(())
    }

    fn is_deeper(value: &Value, levels: u32) -> bool {
        match value {
            Value::Array(items) => levels == 0 || items.iter().any(|v| is_deeper(v, levels - 1)),
            Value::Object(map) => levels == 0 || map.values().any(|v| is_deeper(v, levels - 1)),
            _ => false,
        }
    }

    fn has_nul(value: &Value) -> bool {
        match value {
            Value::String(s) => s.contains('\0'),
            Value::Array(items) => items.iter().any(has_nul),
            Value::Object(map) => map.iter().any(|(k, v)| k.contains('\0') || has_nul(v)),
            _ => false,
        }
    }
}
