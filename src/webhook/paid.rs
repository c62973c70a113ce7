//! Events of Paid.ai, read strictly where money is concerned: what is not understood is named, never guessed.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::hex;
use crate::id::{ExperimentId, OrderId, Period, SubscriptionId, UserId};
use crate::money::{Currency, Money, decimal};

/// Of an idempotency key, in bytes. An order's id may be as long, without what we put before it.
const MAX_KEY: usize = 255;

/// Why an event will not become an entry: the name of a field, never its content.
pub(crate) type Wrong = &'static str;

/// What an event says.
#[derive(Debug)]
pub(crate) enum Said {
    /// Of a type that means nothing to the ledger.
    Nothing,
    Entry(Box<Event>),
}

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) at: Option<DateTime<Utc>>,
    pub(crate) experiment: Option<ExperimentId>,
    /// None: that of the experiment.
    pub(crate) currency: Option<Currency>,
    /// What makes the key of the entry: two deliveries that agree in it are one.
    pub(crate) key: String,
    /// The sender says the key: nothing else is the same entry.
    pub(crate) has_own_key: bool,
    pub(crate) what: What,
}

#[derive(Debug, Clone)]
pub(crate) enum What {
    Trial { user: UserId, subscription: SubscriptionId },
    Sale { user: UserId, amount: Decimal, order: OrderId, subscription: Option<SubscriptionId> },
    Renewal { subscription: SubscriptionId, period: Period, amount: Decimal, order: OrderId },
    Refund { order: OrderId, amount: Decimal },
    Chargeback { order: OrderId, amount: Decimal },
    Reversal { order: OrderId, amount: Decimal },
}

#[derive(Clone, Copy)]
enum Kind {
    Trial,
    Sale,
    Renewal,
    Refund,
    Chargeback,
    Reversal,
}

/// JSON that was not looked into yet: whatever is in a field, the others can be read.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    created_at: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    customer_id: Option<&'a RawValue>,
    #[serde(borrow)]
    amount: Option<&'a RawValue>,
    #[serde(borrow)]
    currency: Option<&'a RawValue>,
    #[serde(borrow)]
    order_id: Option<&'a RawValue>,
    #[serde(borrow)]
    subscription_id: Option<&'a RawValue>,
    #[serde(borrow)]
    period: Option<&'a RawValue>,
    #[serde(borrow)]
    refund_id: Option<&'a RawValue>,
    #[serde(borrow)]
    dispute_id: Option<&'a RawValue>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    experiment_id: Option<&'a RawValue>,
    #[serde(borrow)]
    idempotency_key: Option<&'a RawValue>,
}

/// The type of a body, as far as it can be stored.
pub(crate) fn type_of(body: &[u8]) -> Option<String> {
    text(envelope(body)?.kind?).filter(|kind| (1..=255).contains(&kind.len()) && !kind.contains('\0'))
}

/// What a body says. `delivery` stands in for the id of an event that has none.
pub(crate) fn read(body: &[u8], delivery: &str) -> Result<Said, Wrong> {
    let envelope = envelope(body).ok_or("body")?;
    let Some(kind) = Kind::of(&envelope.kind.and_then(text).ok_or("type")?) else { return Ok(Said::Nothing) };
    let event_id = match envelope.id {
        Some(id) => text(id).filter(|id| !id.is_empty()).ok_or("id")?,
        None => delivery.to_owned(),
    };
    let at = envelope.created_at.map(|at| time(at).ok_or("created_at")).transpose()?;
    let data: Data<'_> = parse(envelope.data.ok_or("data")?).ok_or("data")?;
    let metadata: Option<Metadata<'_>> =
        data.metadata.map(|of| parse(of).ok_or("data.metadata")).transpose()?;
    let given = metadata.as_ref().and_then(|of| of.idempotency_key);
    let given = checked(given, "data.metadata.idempotency_key", |key| (!key.is_empty()).then_some(key))?;
    let experiment = metadata.and_then(|of| of.experiment_id);
    let experiment = checked(experiment, "data.metadata.experiment_id", |id| id.parse().ok())?;
    let currency = checked(data.currency, "data.currency", |code| Currency::new(&code).ok())?;

    let user = || required(data.customer_id, "data.customer_id", |id| UserId::new(id).ok());
    let order = || required(data.order_id, "data.order_id", |id| OrderId::new(id).ok());
    let subscription =
        || checked(data.subscription_id, "data.subscription_id", |id| SubscriptionId::new(id).ok());
    let amount = || data.amount.and_then(amount).ok_or("data.amount");
    let own = |id: Option<&RawValue>, name| {
        checked(id, name, |id| (!id.is_empty()).then_some(id)).map(|id| id.unwrap_or(event_id.clone()))
    };
    let (key, what) = match kind {
        Kind::Trial => {
            let subscription = subscription()?.ok_or("data.subscription_id")?;
            (subscription.as_str().to_owned(), What::Trial { user: user()?, subscription })
        }
        Kind::Sale => {
            let order = order()?;
            let what = What::Sale {
                user: user()?,
                amount: amount()?,
                order: order.clone(),
                subscription: subscription()?,
            };
            (order.as_str().to_owned(), what)
        }
        Kind::Renewal => {
            let subscription = subscription()?.ok_or("data.subscription_id")?;
            let period = required(data.period, "data.period", |period| Period::new(period).ok())?;
            let order = order()?;
            (order.as_str().to_owned(), What::Renewal { subscription, period, amount: amount()?, order })
        }
        Kind::Refund => {
            (own(data.refund_id, "data.refund_id")?, What::Refund { order: order()?, amount: amount()? })
        }
        Kind::Chargeback => (
            own(data.dispute_id, "data.dispute_id")?,
            What::Chargeback { order: order()?, amount: amount()? },
        ),
        Kind::Reversal => {
            (own(data.dispute_id, "data.dispute_id")?, What::Reversal { order: order()?, amount: amount()? })
        }
    };
    if experiment.is_none() && matches!(kind, Kind::Trial | Kind::Sale) {
        return Err("data.metadata.experiment_id");
    }
    let has_own_key = given.is_some();
    let key = given.unwrap_or_else(|| key_of(kind.as_str(), &key));
    Ok(Said::Entry(Box::new(Event { at, experiment, currency, key, has_own_key, what })))
}

/// Of an entry that is reported under no key of the sender's. The database makes it in the same way.
pub(crate) fn key_of(kind: &str, id: &str) -> String {
    let key = format!("paid:{kind}:{id}");
    if key.len() > MAX_KEY { format!("paid:{kind}:sha256:{}", hex(&Sha256::digest(key))) } else { key }
}

impl Kind {
    fn of(kind: &str) -> Option<Self> {
        Some(match kind {
            "trial.started" | "subscription.trial_started" => Kind::Trial,
            "subscription.created" | "subscription.activated" => Kind::Sale,
            "subscription.renewed" | "invoice.paid" => Kind::Renewal,
            "payment.refunded" | "charge.refunded" | "refund.created" => Kind::Refund,
            "dispute.created" | "chargeback.created" => Kind::Chargeback,
            "dispute.won" | "chargeback.reversed" => Kind::Reversal,
            _ => return None,
        })
    }

    fn as_str(self) -> &'static str {
        match self {
            Kind::Trial => "trial_start",
            Kind::Sale => "sale",
            Kind::Renewal => "renewal",
            Kind::Refund => "refund",
            Kind::Chargeback => "chargeback",
            Kind::Reversal => "chargeback_reversal",
        }
    }
}

fn envelope(body: &[u8]) -> Option<Envelope<'_>> {
    // A list would do for a struct as well.
    body.trim_ascii_start().starts_with(b"{").then(|| serde_json::from_slice(body).ok()).flatten()
}

fn parse<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    raw.get().starts_with('{').then(|| serde_json::from_str(raw.get()).ok()).flatten()
}

fn text(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

fn checked<T>(
    raw: Option<&RawValue>,
    name: Wrong,
    make: impl Fn(String) -> Option<T>,
) -> Result<Option<T>, Wrong> {
    raw.map(|raw| text(raw).and_then(&make).ok_or(name)).transpose()
}

fn required<T>(raw: Option<&RawValue>, name: Wrong, make: impl Fn(String) -> Option<T>) -> Result<T, Wrong> {
    checked(raw, name, make)?.ok_or(name)
}

/// Digits with a point at most, as a number or a text. Its digits are read, so 19.90 is 19.90; 1e2 is refused.
fn amount(raw: &RawValue) -> Option<Decimal> {
    let json = raw.get();
    let digits = if json.starts_with('"') { text(raw)? } else { json.to_owned() };
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_digit);
    if !ends(digits.as_bytes().first()) || !ends(digits.as_bytes().last()) {
        return None; // a sign, or a bare point
    }
    decimal(&digits).and_then(|amount| Money::checked(amount).ok())
}

/// RFC 3339, or whole seconds since 1970.
fn time(raw: &RawValue) -> Option<DateTime<Utc>> {
    if raw.get().starts_with('"') {
        return Some(DateTime::parse_from_rfc3339(&text(raw)?).ok()?.with_timezone(&Utc));
    }
    DateTime::from_timestamp(raw.get().parse().ok()?, 0)
}
