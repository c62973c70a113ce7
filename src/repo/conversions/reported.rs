//! What a webhook has reported before, under a key that is made of the order: whoever records the same payment under a key of his
//! own has it there. The database writes no second entry (`conversions_once`); here it is told which one is meant.

use super::model::{Conversion, ConversionKind};
use super::new::NewConversion;
use crate::id::{IdempotencyKey, OrderId, SubscriptionId};
use crate::repo::users::is_pseudonym;
use crate::webhook::paid;

/// The keys under which a webhook would have reported it, if they are others than its own. An invoice may be that of a sale.
pub(super) fn keys_of(entry: &NewConversion) -> impl Iterator<Item = IdempotencyKey> + '_ {
    made(entry).filter(|key| *key != entry.idempotency_key)
}

/// Whether it is what a webhook without a key reports. Where it is not written, somebody else's entry may be the reason.
pub(super) fn is_report(entry: &NewConversion) -> bool {
    made(entry).any(|key| key == entry.idempotency_key) && says_webhook(&entry.metadata)
}

fn made(entry: &NewConversion) -> impl Iterator<Item = IdempotencyKey> {
    let id = match entry.kind {
        ConversionKind::TrialStart => entry.subscription_id.as_ref().map(SubscriptionId::as_str),
        _ => entry.order_id.as_ref().map(OrderId::as_str),
    };
    let key = move |kind: &ConversionKind| IdempotencyKey::new(paid::key_of(kind.as_str(), id?)).ok();
    kinds(entry.kind).iter().filter_map(key)
}

/// Of those that a webhook may have reported, or may report, in place of one of this kind.
fn kinds(kind: ConversionKind) -> &'static [ConversionKind] {
    use ConversionKind::{Renewal, Sale, TrialStart};
    match kind {
        Sale | Renewal => &[Sale, Renewal],
        TrialStart => &[TrialStart],
        _ => &[],
    }
}

/// Whether what stands under that key is this payment.
pub(super) fn is_same(entry: &NewConversion, stored: &Conversion) -> bool {
    let is_of_order = match entry.kind {
        ConversionKind::TrialStart => stored.subscription_id == entry.subscription_id,
        _ => stored.order_id == entry.order_id,
    };
    let is_renewal = [entry.kind, stored.kind].contains(&ConversionKind::Renewal);
    is_webhooks(stored)
        && kinds(entry.kind).contains(&stored.kind)
        && is_of_order
        && match (is_renewal, &entry.subscription_id, &stored.subscription_id) {
            (true, Some(subscription), Some(stored)) => subscription == stored,
            (true, ..) => true, // a sale need not name its subscription
            (false, ..) => entry.experiment_id == Some(stored.experiment_id),
        }
}

/// What of a repeated report is another payment, or somebody else's. A webhook knows of no items, discounts or taxes, and may not know
/// of the subscription; where it names no key, the order is what says which payment is meant.
pub(super) fn differences(entry: &NewConversion, stored: &Conversion) -> Vec<&'static str> {
    let mut fields = entry.differences(stored);
    let has_key = entry.idempotency_key == stored.idempotency_key;
    if has_key && !says_webhook(&entry.metadata) && !says_webhook(&stored.metadata) {
        return fields;
    }
    let both_say = entry.subscription_id.is_some() && stored.subscription_id.is_some();
    let is_invoice_of_sale = has_key
        && says_webhook(&entry.metadata)
        && (entry.kind, stored.kind) == (ConversionKind::Renewal, ConversionKind::Sale);
    fields.retain(|field| match *field {
        "kind" => !is_invoice_of_sale,
        "period" => has_key && !is_invoice_of_sale,
        "user_id" | "revenue" | "currency" => true,
        "experiment_id" | "order_id" => has_key,
        "subscription_id" => has_key && both_say,
        _ => false,
    });
    fields
}

/// Whether a webhook has reported it. Of an erased user that is not known any more.
fn is_webhooks(stored: &Conversion) -> bool {
    is_pseudonym(&stored.user_id) || says_webhook(&stored.metadata)
}

fn says_webhook(metadata: &serde_json::Value) -> bool {
    metadata.get("webhook").is_some()
}
