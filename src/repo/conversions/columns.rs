//! Entries, column by column, as the statements take them.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::new::{NewConversion, amount};
use crate::id::{OrderId, SubscriptionId};

/// What all statements that write entries take first; `sql::types` has their types, in the same order.
#[derive(Default)]
pub(super) struct Columns<'e> {
    ids: Vec<Uuid>,
    kinds: Vec<&'static str>,
    experiments: Vec<Option<Uuid>>,
    revenues: Vec<Decimal>,
    currencies: Vec<Option<String>>,
    items: Vec<Option<&'e str>>,
    list_prices: Vec<Option<Decimal>>,
    quantities: Vec<i32>,
    discounts: Vec<Decimal>,
    prorations: Vec<Decimal>,
    taxes: Vec<Decimal>,
    orders: Vec<Option<&'e str>>,
    subscriptions: Vec<Option<&'e str>>,
    keys: Vec<&'e str>,
    times: Vec<DateTime<Utc>>,
    metadata: Vec<&'e Value>,
}

impl<'e> Columns<'e> {
    pub(super) fn of(entries: impl Iterator<Item = &'e NewConversion>) -> Self {
        let mut c = Columns::default();
        for e in entries {
            c.ids.push(e.id.uuid());
            c.kinds.push(e.kind.as_str());
            c.experiments.push(e.experiment_id.map(|id| id.uuid()));
            c.revenues.push(e.revenue());
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

    pub(super) fn params(&self) -> [&(dyn ToSql + Sync); 16] {
        [
            &self.ids,
            &self.kinds,
            &self.experiments,
            &self.revenues,
            &self.currencies,
            &self.items,
            &self.list_prices,
            &self.quantities,
            &self.discounts,
            &self.prorations,
            &self.taxes,
            &self.orders,
            &self.subscriptions,
            &self.keys,
            &self.times,
            &self.metadata,
        ]
    }
}
