//! What a webhook has reported before, under a key that is made of the order: whoever records the same payment under a key of his
//! own has it there. The database writes no second entry (`conversions_once`); here it is told which one is meant.

use super::model::{Conversion, ConversionKind};
use super::new::NewConversion;
use crate::id::{IdempotencyKey, OrderId, SubscriptionId};
use crate::repo::users::is_pseudonym;
use crate::webhook::paid;

/// The key under which a webhook would have reported it, if that is another one than its own.
pub(super) fn key_of(entry: &NewConversion) -> Option<IdempotencyKey> {
    made(entry).filter(|key| *key != entry.idempotency_key)
}

/// Whether it is what a webhook without a key reports. Where it is not written, somebody else's entry may be the reason.
pub(super) fn is_report(entry: &NewConversion) -> bool {
    made(entry).is_some_and(|key| key == entry.idempotency_key) && entry.metadata.get("webhook").is_some()
}

fn made(entry: &NewConversion) -> Option<IdempotencyKey> {
    let id = match entry.kind {
        ConversionKind::Sale | ConversionKind::Renewal => entry.order_id.as_ref().map(OrderId::as_str),
        ConversionKind::TrialStart => entry.subscription_id.as_ref().map(SubscriptionId::as_str),
        _ => None,
    };
    IdempotencyKey::new(paid::key_of(entry.kind.as_str(), id?)).ok()
}

/// Whether what stands under that key is this payment.
pub(super) fn is_same(entry: &NewConversion, stored: &Conversion) -> bool {
    stored.kind == entry.kind
        && (is_pseudonym(&stored.user_id) || stored.metadata.get("webhook").is_some())
        && match entry.kind {
            ConversionKind::TrialStart => stored.subscription_id == entry.subscription_id,
            _ => stored.order_id == entry.order_id,
        }
        && match entry.kind {
            ConversionKind::Renewal => stored.subscription_id == entry.subscription_id,
            _ => entry.experiment_id == Some(stored.experiment_id),
        }
}

/// Of what else they say only amount and user matter: a webhook knows of no items, discounts or taxes.
pub(super) fn differences(entry: &NewConversion, stored: &Conversion) -> Vec<&'static str> {
    let mut fields = entry.differences(stored);
    fields.retain(|field| ["user_id", "revenue", "currency"].contains(field));
    fields
}
