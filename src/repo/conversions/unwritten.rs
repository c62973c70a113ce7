//! Why an entry was not written: it waits, or was refused.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use tokio_postgres::Row;

use super::model::{ConversionKind, LedgerRule};
use super::new::{NewConversion, amount};
use super::outcome::{ConversionOutcome, Refusal};
use super::record::{Door, Recording};
use super::sql::{LEFT, LOCKED_PRICE, WAITING_KEYS};
use crate::error::{Error, Result};
use crate::id::OrderId;
use crate::money::{Currency, Money};
use crate::repo::row::Fields;
use crate::repo::variants::PriceBook;
use crate::scope::Params;

impl Recording<'_> {
    /// Refunds and their like that were not written: they wait, or were refused.
    pub(super) async fn explain(&mut self, places: &[usize]) -> Result<()> {
        self.waiting(places).await?;
        if self.door == Door::Settle {
            self.missing(places).await?; // matched meanwhile
            return Ok(());
        }
        for &at in places {
            if !self.known.contains_key(&at) {
                let refused = self.refused(&self.entries[at]).await?;
                self.known.insert(at, refused.map_or(ConversionOutcome::Unknown, ConversionOutcome::Refused));
            }
        }
        Ok(())
    }

    /// Whose keys something waits under.
    pub(super) async fn waiting(&mut self, places: &[usize]) -> Result<()> {
        let keys: Vec<&str> = self.of(places, |e| e.idempotency_key.as_str());
        let waiting = self.scope.query(&WAITING_KEYS, &[&self.tenant(), &keys]).await?;
        let waiting: HashMap<&str, &Row> =
            waiting.iter().map(|row| Ok((row.field("idempotency_key")?, row))).collect::<Result<_>>()?;
        for &at in places {
            let entry = &self.entries[at];
            if let Some(row) = waiting.get(entry.idempotency_key.as_str()) {
                self.known.insert(at, waits(entry, row)?);
            }
        }
        Ok(())
    }

    /// What the rules say of one that was not authorised; `None` if it belongs to nothing.
    async fn refused(&self, entry: &NewConversion) -> Result<Option<Refusal>> {
        let (tenant, currency) = (self.tenant(), entry.currency());
        let refusal = if let (Some(subscription), Some(period)) = (&entry.subscription_id, &entry.period) {
            let (subscription, period) = (subscription.as_str(), period.as_str());
            let params: Params<'_> = &[&tenant, &subscription, &period, &entry.occurred_at];
            let Some(row) = self.scope.query_opt(&LOCKED_PRICE, params).await? else { return Ok(None) };
            let locked: Option<Decimal> = row.field("price")?;
            let locked_in = row.currency("currency")?;
            let (mut rules, allowed) = entry.law(locked.map(|price| Money::stored(price, locked_in)));
            if row.field("is_paid")? {
                rules.push(LedgerRule::Period);
                return Ok(Some(Refusal { rules, allowed: None }));
            }
            Refusal { rules, allowed }
        } else {
            let is_reversal = entry.kind == ConversionKind::ChargebackReversal;
            let order = entry.order_id.as_ref().map(OrderId::as_str);
            let experiment = entry.experiment_id.map(|id| id.uuid());
            let code = currency.as_ref().map(Currency::code);
            let params: Params<'_> = &[&tenant, &order, &experiment, &code, &is_reversal];
            let Some(row) = self.scope.query_opt(&LEFT, params).await? else { return Ok(None) };
            let left_in = row.currency("currency")?;
            let (column, rule) = if is_reversal {
                ("left_of_chargeback", LedgerRule::BeyondChargeback)
            } else {
                ("left_of_sale", LedgerRule::BeyondSale)
            };
            let left: Decimal = row.field(column)?;
            let rules = if currency != Some(left_in) {
                vec![LedgerRule::Currency]
            } else if amount(entry.net) > left {
                vec![rule]
            } else {
                Vec::new()
            };
            Refusal { rules, allowed: Some(Money::stored(left, left_in)) }
        };
        if refusal.rules.is_empty() {
            return Err(Error::conflict(
                "renewals and what goes back are authorised in a READ COMMITTED transaction, or the ledger was changed meanwhile",
            ));
        }
        Ok(Some(refusal))
    }
}

/// Why a sale is not authorised at these prices; `None` if it may be.
pub(super) fn refusal(
    entry: &NewConversion,
    price: Money,
    book: &PriceBook,
    until: Option<DateTime<Utc>>,
) -> Option<Refusal> {
    if entry.kind != ConversionKind::Sale {
        return None;
    }
    let quoted = match (&entry.item, entry.currency()) {
        (Some(item), Some(currency)) => book.price(item, currency),
        _ => Some(price),
    };
    let (mut rules, allowed) = entry.law(quoted);
    if until.is_some_and(|until| Utc::now() > until) {
        rules.push(LedgerRule::Expired);
    }
    (!rules.is_empty()).then_some(Refusal { rules, allowed })
}

/// What stands in the queue under the entry's key.
fn waits(entry: &NewConversion, row: &Row) -> Result<ConversionOutcome> {
    let fields = entry.differences_to_waiting(row)?;
    Ok(match fields.is_empty() {
        true => ConversionOutcome::Waiting,
        false => ConversionOutcome::Conflict { stored: None, fields },
    })
}
