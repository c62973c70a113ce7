//! From a stored body to the ledger, in one transaction with the mark that it is there.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::json;
use tokio_postgres::Row;
use uuid::Uuid;

use super::model::{WebhookOutcome, WebhookStatus};
use super::sql::{LOCK, MARK};
use crate::error::{Error, ErrorKind, Result};
use crate::id::IdempotencyKey;
use crate::money::{Currency, Money};
use crate::repo::page::MAX_PAGE;
use crate::repo::row::Fields;
use crate::repo::{Conversion, ConversionKind, ConversionOutcome, NewConversion};
use crate::scope::TenantScope;
use crate::webhook::paid::{self, Event, Said, What};

const UNKNOWN_EXPERIMENT: &str = "unknown_experiment";
const UNKNOWN_SUBSCRIPTION: &str = "unknown_subscription";
const CURRENCY: &str = "data.currency";
const CONFLICT: &str = "conflict";
const DATABASE: &str = "database";
const REFUSED: &str = "refused";

/// `hash`: of the body that was delivered now, if one was.
pub(super) async fn process(
    scope: &TenantScope<'_>,
    id: &str,
    hash: Option<&[u8]>,
) -> Result<WebhookOutcome> {
    let result = scope.unless_deadlocked(|| attempt(scope, id, hash)).await;
    match result {
        // The transaction is rolled back, the body is stored: say there why nothing became of it.
        Err(error) if scope.is_one_shot() && error.sqlstate().is_some() => {
            let outcome = match error.kind() {
                ErrorKind::InvalidInput => WebhookOutcome::Failed { reason: REFUSED },
                ErrorKind::OutcomeUnknown => return Err(error),
                // Whatever it is, it was tried: next time the others come first. If it is all of the database that fails, so does
                // this.
                _ => WebhookOutcome::Pending { reason: DATABASE },
            };
            if mark(scope, id, &outcome, None).await? {
                return Ok(outcome);
            }
            attempt(scope, id, hash).await // somebody else has processed it meanwhile, and says how
        }
        result => result,
    }
}

async fn attempt(scope: &TenantScope<'_>, id: &str, hash: Option<&[u8]>) -> Result<WebhookOutcome> {
    let own = scope.begin_if_alone().await?;
    let within: &TenantScope<'_> = own.as_deref().unwrap_or(scope);
    let row = within.query_opt(&LOCK, &[&within.tenant_id().uuid(), &id]).await?;
    let row = row.ok_or_else(|| Error::not_found("webhook"))?;
    let is_other = match hash {
        Some(hash) => hash != row.field::<&[u8]>("body_hash")?,
        None => false,
    };
    if is_other {
        let error = Error::conflict("the id of the delivery stands for another body, which was kept");
        return Err(error.with_fields(vec!["body"]));
    }
    let status = WebhookStatus::stored(row.field("status")?)?;
    if status != WebhookStatus::Pending {
        return Ok(WebhookOutcome::Duplicate(status));
    }
    let (outcome, key) = record(within, id, &row).await?;
    mark(within, id, &outcome, key.as_ref()).await?;
    if let Some(own) = own {
        own.commit().await?;
    }
    Ok(outcome)
}

async fn record(
    scope: &TenantScope<'_>,
    id: &str,
    row: &Row,
) -> Result<(WebhookOutcome, Option<IdempotencyKey>)> {
    let failed = |reason| Ok((WebhookOutcome::Failed { reason }, None));
    let later = |reason| Ok((WebhookOutcome::Pending { reason }, None));
    let event = match paid::read(row.field("body")?, id) {
        Ok(Said::Nothing) => return Ok((WebhookOutcome::Ignored, None)),
        Ok(Said::Entry(event)) => event,
        Err(reason) => return failed(reason),
    };
    let Ok(key) = IdempotencyKey::new(event.key.clone()) else { return failed("idempotency_key") };
    let currency = match (event.currency, event.experiment) {
        (Some(currency), _) => currency,
        (None, None) => return failed(CURRENCY),
        (None, Some(experiment)) => match scope.experiments().get(experiment).await? {
            Some(experiment) => experiment.currency,
            None => return later(UNKNOWN_EXPERIMENT),
        },
    };
    let entry = entry(&event, currency, key.clone(), row.field("received_at")?, id);
    // What is wrong with its form would be an error of the call, and stays one of the content here.
    let checked = entry.check();
    // Once more if it was not written: somebody else has recorded it at the same moment, and is seen now.
    for _ in 0..2 {
        if !event.has_own_key {
            match reported_before(scope, &event, currency).await? {
                Before::Nothing => {}
                Before::NoSale => return later(UNKNOWN_SUBSCRIPTION),
                Before::Same(entry) => {
                    let key = Some(entry.idempotency_key.clone());
                    return Ok((WebhookOutcome::Processed(ConversionOutcome::Duplicate(*entry)), key));
                }
                Before::Other => return failed(CONFLICT),
            }
        }
        if let Err(error) = &checked {
            return failed(error.field().unwrap_or(REFUSED));
        }
        match scope.conversions().settle(&entry).await? {
            ConversionOutcome::Unknown => {}
            ConversionOutcome::Conflict { .. } => return failed(CONFLICT),
            outcome => return Ok((WebhookOutcome::Processed(outcome), Some(key))),
        }
    }
    later(UNKNOWN_EXPERIMENT)
}

/// What the ledger says of a payment whose report names no key.
enum Before {
    Nothing,
    /// Of a subscription that was not sold: the ledger would keep it waiting, and count it besides the sale whose first invoice it is.
    NoSale,
    /// The sale with another key, or the sale whose first invoice this is.
    Same(Box<Conversion>),
    /// That, with another amount or of another user; or of a sale, an invoice that came before it and was taken for an older sale's.
    Other,
}

async fn reported_before(scope: &TenantScope<'_>, event: &Event, currency: Currency) -> Result<Before> {
    let ledger = scope.conversions();
    let is_opened = |c: &Conversion, kind| c.kind == kind && Some(c.experiment_id) == event.experiment;
    let (mut entries, user, amount) = match &event.what {
        What::Sale { user, amount, order, subscription } => {
            let mut sales = ledger.list_by_order(order, MAX_PAGE, None).await?.items;
            let is_invoice = |c: &Conversion| {
                c.kind == ConversionKind::Renewal
                    && (subscription.is_none() || c.subscription_id == *subscription)
            };
            sales.retain(|c| is_opened(c, ConversionKind::Sale) || is_invoice(c));
            (sales, Some(user), Some(*amount))
        }
        What::Renewal { subscription, amount, order, .. } => {
            let sold = ledger.list_by_subscription(subscription, MAX_PAGE, None).await?.items;
            if !sold.iter().any(|c| c.kind == ConversionKind::Sale) {
                return Ok(Before::NoSale);
            }
            let mut sales = ledger.list_by_order(order, MAX_PAGE, None).await?.items;
            let is_paid = |kind| matches!(kind, ConversionKind::Sale | ConversionKind::Renewal);
            sales.retain(|c| is_paid(c.kind) && c.subscription_id.as_ref().is_none_or(|s| s == subscription));
            (sales, None, Some(*amount))
        }
        What::Trial { user, subscription } => {
            let mut trials = ledger.list_by_subscription(subscription, MAX_PAGE, None).await?.items;
            trials.retain(|c| is_opened(c, ConversionKind::TrialStart));
            (trials, Some(user), None)
        }
        _ => return Ok(Before::Nothing),
    };
    entries.retain(|c| c.idempotency_key.as_str() != event.key);
    if entries.is_empty() {
        return Ok(Before::Nothing);
    }
    if let Some(user) = user {
        // Or of who that is by now: what was recorded while an id was a user of its own may still be under it.
        let persons = scope.users().persons(entries.iter().map(|c| &c.user_id).chain([user])).await?;
        entries.retain(|c| persons.is_of(&c.user_id, user));
    }
    let is_sale = matches!(event.what, What::Sale { .. });
    let is_same = |entry: &Conversion| {
        amount.is_none_or(|amount| entry.revenue == Money::stored(amount, currency))
            && !(is_sale && entry.kind == ConversionKind::Renewal)
    };
    Ok(match entries.into_iter().next() {
        Some(entry) if is_same(&entry) => Before::Same(Box::new(entry)),
        _ => Before::Other,
    })
}

fn entry(
    event: &Event,
    currency: Currency,
    key: IdempotencyKey,
    received_at: DateTime<Utc>,
    delivery: &str,
) -> NewConversion {
    let money = |amount: Decimal| Money::stored(amount, currency);
    let experiment = event.experiment;
    let opened = experiment.unwrap_or_else(|| Uuid::nil().into()); // of sales and trials there is one
    let new = match event.what.clone() {
        What::Trial { user, subscription } => NewConversion::trial_start(opened, user, subscription, key),
        What::Sale { user, amount, order, subscription } => {
            let sale = NewConversion::sale(opened, user, money(amount), key).order(order);
            match subscription {
                Some(subscription) => sale.subscription(subscription),
                None => sale,
            }
        }
        What::Renewal { subscription, period, amount, order } => {
            NewConversion::renewal(subscription, period, money(amount), key).order(order)
        }
        What::Refund { order, amount } => NewConversion::refund(order, money(amount), key),
        What::Chargeback { order, amount } => NewConversion::chargeback(order, money(amount), key),
        What::Reversal { order, amount } => NewConversion::chargeback_reversal(order, money(amount), key),
    };
    let new = match experiment {
        Some(experiment) if new.follows() => new.of_experiment(experiment),
        _ => new,
    };
    new.at(event.at.unwrap_or(received_at)).metadata(json!({ "webhook": delivery }))
}

async fn mark(
    scope: &TenantScope<'_>,
    id: &str,
    outcome: &WebhookOutcome,
    key: Option<&IdempotencyKey>,
) -> Result<bool> {
    let (status, what) = match outcome {
        WebhookOutcome::Processed(_) => (WebhookStatus::Processed, None),
        WebhookOutcome::Ignored => (WebhookStatus::Ignored, None),
        WebhookOutcome::Pending { reason } => (WebhookStatus::Pending, Some(*reason)),
        WebhookOutcome::Failed { reason } => (WebhookStatus::Failed, Some(*reason)),
        WebhookOutcome::Duplicate(_) => return Ok(false),
    };
    let (tenant, key) = (scope.tenant_id().uuid(), key.map(IdempotencyKey::as_str));
    Ok(scope.query_opt(&MARK, &[&tenant, &id, &status.as_str(), &what, &key]).await?.is_some())
}
