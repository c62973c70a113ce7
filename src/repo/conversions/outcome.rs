//! What becomes of an entry.

use super::model::{Conversion, LedgerRule};
use crate::error::{Error, ErrorKind, Result};
use crate::money::Money;

/// What became of an entry.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[must_use = "what was not written does not count"]
pub enum ConversionOutcome {
    /// It was written, and counts.
    Recorded(Conversion),
    /// It is there already, under the same key and with the same content, or as [a webhook](crate::Webhooks#once) that names no key has
    /// reported it; nothing was written.
    Duplicate(Conversion),
    /// It was [settled](crate::Conversions::settle) before the entry that it belongs to: it is kept, and counts when that
    /// one comes.
    Waiting,
    /// The key is there already, or waiting, with other content; or [a webhook](crate::Webhooks#once) that names no key has reported the
    /// payment with another amount, of another user, or as another kind. Nothing was written.
    Conflict {
        /// What stands there; `None` if that is waiting.
        stored: Option<Box<Conversion>>,
        /// The fields that differ.
        fields: Vec<&'static str>,
    },
    /// It was not [authorised](crate::Conversions::authorise); nothing was written.
    Refused(Refusal),
    /// The tenant has no such experiment; or, of what was to be authorised, nothing that it belongs to. Nothing was
    /// written.
    Unknown,
}

/// Why an entry was not authorised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The rules that it breaks.
    pub rules: Vec<LedgerRule>,
    /// The net amount at the quoted price, or what is left of the sale (or chargeback); `None` if no amount would do. Of an
    /// [expired](LedgerRule::Expired) quote, ask for the price again first.
    pub allowed: Option<Money>,
}

impl ConversionOutcome {
    /// The entry that stands in the ledger; `None` while it waits for the one that it belongs to. What contradicts the ledger is
    /// an error.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) with the names of the fields that differ,
    /// [`QuoteMismatch`](crate::ErrorKind::QuoteMismatch) or [`RefundExceedsSale`](crate::ErrorKind::RefundExceedsSale) for
    /// what was refused, with the names of the rules, [`NotFound`](crate::ErrorKind::NotFound).
    pub fn entry(self) -> Result<Option<Conversion>> {
        match self {
            ConversionOutcome::Recorded(entry) | ConversionOutcome::Duplicate(entry) => Ok(Some(entry)),
            ConversionOutcome::Waiting => Ok(None),
            ConversionOutcome::Conflict { fields, .. } => Err(Error::conflict(format!(
                "the idempotency key, or a webhook's of the same order, stands for an entry with another {}",
                fields.join(", ")
            ))
            .with_fields(fields)),
            ConversionOutcome::Refused(refusal) => Err(refusal.into_error()),
            ConversionOutcome::Unknown => {
                Err(Error::not_found("experiment, or no sale that the entry belongs to"))
            }
        }
    }
}

impl Refusal {
    fn into_error(self) -> Error {
        let names: Vec<&'static str> = self.rules.iter().map(|rule| rule.as_str()).collect();
        let (kind, what) = if self.rules.iter().any(|rule| rule.is_of_quote()) {
            (ErrorKind::QuoteMismatch, "what is to be charged is not what was quoted")
        } else if self.rules.contains(&LedgerRule::Period) {
            (ErrorKind::Conflict, "the period of the subscription is paid already")
        } else {
            (ErrorKind::RefundExceedsSale, "more would go back than is left")
        };
        Error::new(kind, format!("{what} ({})", names.join(", "))).with_fields(names)
    }
}
