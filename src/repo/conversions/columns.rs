//! Entries, column by column, as the statements take them.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use uuid::Uuid;

use super::new::{NewConversion, amount};
use crate::id::{OrderId, SubscriptionId};

/// What both kinds of statements take, column by column.
#[derive(Default)]
pub(super) struct Columns<'e> {
    pub(super) ids: Vec<Uuid>,
    pub(super) kinds: Vec<&'static str>,
    pub(super) experiments: Vec<Option<Uuid>>,
    pub(super) currencies: Vec<Option<String>>,
    pub(super) items: Vec<Option<&'e str>>,
    pub(super) list_prices: Vec<Option<Decimal>>,
    pub(super) quantities: Vec<i32>,
    pub(super) discounts: Vec<Decimal>,
    pub(super) prorations: Vec<Decimal>,
    pub(super) taxes: Vec<Decimal>,
    pub(super) orders: Vec<Option<&'e str>>,
    pub(super) subscriptions: Vec<Option<&'e str>>,
    pub(super) keys: Vec<&'e str>,
    pub(super) times: Vec<DateTime<Utc>>,
    pub(super) metadata: Vec<&'e Value>,
}

impl<'e> Columns<'e> {
    pub(super) fn of(entries: impl Iterator<Item = &'e NewConversion>) -> Self {
        let mut c = Columns::default();
        for e in entries {
            c.ids.push(e.id.uuid());
            c.kinds.push(e.kind.as_str());
            c.experiments.push(e.experiment_id.map(|id| id.uuid()));
            c.currencies.push(e.currency().map(|currency| currency.code().to_owned()));
            c.items.push(e.item.as_deref());
            c.list_prices.push(e.list_price.map(|price| price.amount()));
            c.quantities.push(i32::try_from(e.quantity).unwrap_or(i32::MAX)); // checked
            c.discounts.push(amount(e.discount));
            c.prorations.push(amount(e.proration));
            c.taxes.push(amount(e.tax));
            c.orders.push(e.order_id.as_ref().map(OrderId::as_str));
            c.subscriptions.push(e.subscription_id.as_ref().map(SubscriptionId::as_str));
            c.keys.push(e.idempotency_key.as_str());
            c.times.push(e.occurred_at);
            c.metadata.push(&e.metadata);
        }
        c
    }
}
