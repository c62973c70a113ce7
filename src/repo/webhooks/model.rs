//! A webhook, as stored, and what became of it.

use std::fmt;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::id::IdempotencyKey;
use crate::repo::ConversionOutcome;
use crate::repo::row::{Fields, text_enum};

text_enum! {
    /// Where a stored webhook stands.
    WebhookStatus, "status" {
        /// Not processed yet; [`process_pending`](crate::Webhooks::process_pending) tries it.
        Pending = "pending",
        /// It is in the ledger, or waits there for the sale that it belongs to.
        Processed = "processed",
        /// Its type means nothing to the ledger.
        Ignored = "ignored",
        /// It will not be processed as it is: its content lacks something, or contradicts the ledger.
        Failed = "failed",
    }
}

/// A webhook, as stored. `Debug` does not show the body.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WebhookEvent {
    /// The delivery's id.
    pub id: String,
    /// The type that the body names, if it names one.
    pub event_type: Option<String>,
    /// The body, as it was signed.
    pub body: Vec<u8>,
    /// When it was received first.
    pub received_at: DateTime<Utc>,
    /// Where it stands.
    pub status: WebhookStatus,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it is not processed: the field of the body that is missing or wrong, or one of the names that
    /// [`Webhooks`](crate::Webhooks) lists.
    pub reason: Option<String>,
    /// The key of the ledger entry that it became.
    pub idempotency_key: Option<IdempotencyKey>,
    /// When it was found to be processed, ignored or failed.
    pub processed_at: Option<DateTime<Utc>>,
    pub(super) seq: Uuid,
}

/// What became of a webhook. However it is, it is stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[must_use = "what is pending or failed does not count"]
#[allow(clippy::large_enum_variant, reason = "one a webhook, and a box could not be matched through")]
pub enum WebhookOutcome {
    /// It is in the ledger: recorded, there before under the same key, or waiting for its sale.
    Processed(ConversionOutcome),
    /// An earlier delivery had been dealt with already, with this result. Nothing was done.
    Duplicate(WebhookStatus),
    /// Its type means nothing to the ledger.
    Ignored,
    /// It cannot be processed now, and is tried again by [`process_pending`](crate::Webhooks::process_pending).
    Pending {
        /// Why.
        reason: &'static str,
    },
    /// It will not be processed as it is.
    Failed {
        /// Why: a field of the body, or one of the names that [`Webhooks`](crate::Webhooks) lists.
        reason: &'static str,
    },
}

impl WebhookEvent {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        let key: Option<String> = row.field("idempotency_key")?;
        Ok(WebhookEvent {
            id: row.field("id")?,
            event_type: row.field("type")?,
            body: row.field("body")?,
            received_at: row.field("received_at")?,
            status: WebhookStatus::stored(row.field("status")?)?,
            attempts: u32::try_from(row.field::<i32>("attempts")?)
                .map_err(|_| Error::internal("a stored number of attempts is negative"))?,
            reason: row.field("what")?,
            idempotency_key: key.map(IdempotencyKey::new).transpose()?,
            processed_at: row.field("processed_at")?,
            seq: row.field("seq")?,
        })
    }
}

impl fmt::Debug for WebhookEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookEvent")
            .field("id", &self.id)
            .field("event_type", &self.event_type)
            .field("received_at", &self.received_at)
            .field("status", &self.status)
            .field("attempts", &self.attempts)
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}
