//! A ledger entry, as stored and as it is given.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::Row;

use crate::error::{Error, Result};
use crate::id::{ConversionId, ExperimentId, IdempotencyKey, OrderId, UserId};
use crate::money::Money;
use crate::repo::row::{Fields, rules, text_enum};

text_enum! {
    /// What a ledger entry records.
    ConversionKind, "kind" {
        /// A trial began; no money moved.
        TrialStart = "trial_start",
        /// Something was sold: the one kind that counts as a conversion.
        Sale = "sale",
        /// A subscription went on.
        Renewal = "renewal",
        /// Money went back to the customer.
        Refund = "refund",
        /// The customer's bank took money back.
        Chargeback = "chargeback",
        /// A chargeback was decided for us.
        ChargebackReversal = "chargeback_reversal",
    }
}

/// A ledger entry, as stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Conversion {
    /// Its id.
    pub id: ConversionId,
    /// The experiment.
    pub experiment_id: ExperimentId,
    /// The user.
    pub user_id: UserId,
    /// The variant that the user was assigned.
    pub variant: String,
    /// What it records.
    pub kind: ConversionKind,
    /// What it adds to net revenue, without tax; negative for what goes back to the customer.
    pub revenue: Money,
    /// The host's order.
    pub order_id: Option<OrderId>,
    /// The key under which it counts once.
    pub idempotency_key: IdempotencyKey,
    /// When it happened.
    pub occurred_at: DateTime<Utc>,
    /// Whatever the host keeps with it: a JSON object.
    pub metadata: Value,
}

impl Conversion {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        Ok(Conversion {
            id: row.id("id")?,
            experiment_id: row.id("experiment_id")?,
            user_id: UserId::new(row.field::<String>("user_id")?)?,
            variant: row.field("variant")?,
            kind: ConversionKind::stored(row.field("kind")?)?,
            revenue: row.money("revenue", "currency")?,
            order_id: row.field::<Option<String>>("order_id")?.map(OrderId::new).transpose()?,
            idempotency_key: IdempotencyKey::new(row.field::<String>("idempotency_key")?)?,
            occurred_at: row.field("occurred_at")?,
            metadata: row.field("metadata")?,
        })
    }
}

/// A sale to record.
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId) -> lastprice::Result<()> {
/// use lastprice::{IdempotencyKey, Money, NewSale, OrderId, UserId};
///
/// let sale = NewSale::new(
///     experiment,
///     UserId::new("user-42")?,
///     Money::from_minor(2900, "USD".parse()?),
///     IdempotencyKey::new("charge:ch_123")?,
/// )
/// .order(OrderId::new("order-1001")?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewSale {
    pub(super) id: ConversionId,
    pub(super) experiment_id: ExperimentId,
    pub(super) user_id: UserId,
    pub(super) revenue: Money,
    pub(super) idempotency_key: IdempotencyKey,
    pub(super) order_id: Option<OrderId>,
    pub(super) occurred_at: DateTime<Utc>,
    pub(super) metadata: Value,
}

impl NewSale {
    /// A sale that happens now: who bought, and what it adds to net revenue, without tax.
    pub fn new(experiment: ExperimentId, user: UserId, revenue: Money, key: IdempotencyKey) -> Self {
        NewSale {
            id: ConversionId::new(),
            experiment_id: experiment,
            user_id: user,
            revenue,
            idempotency_key: key,
            order_id: None,
            occurred_at: Utc::now(),
            metadata: Value::Object(Default::default()),
        }
    }

    /// The host's order.
    pub fn order(mut self, order: OrderId) -> Self {
        self.order_id = Some(order);
        self
    }

    /// When it happened. Default: now. A repeated report may name another time: the first one stands.
    pub fn at(mut self, time: DateTime<Utc>) -> Self {
        self.occurred_at = time;
        self
    }

    /// A JSON object, at most 64 KiB. Default: `{}`. A repeated report may carry another: the first one stands.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.revenue.amount() < Decimal::ZERO {
            return Err(Error::invalid("revenue", "of a sale is negative"));
        }
        // Money of a sum, or of minor units, may be larger.
        Money::of(self.revenue.amount(), self.revenue.currency()).map_err(|_| {
            Error::invalid("revenue", "is not below 10^12 with at most 6 digits after the point")
        })?;
        rules::time("occurred_at", self.occurred_at)?;
        rules::object("metadata", &self.metadata)
    }

    /// What a repeated report must have in common with the first one.
    pub(super) fn differences(&self, stored: &Conversion) -> Vec<&'static str> {
        [
            ("kind", stored.kind != ConversionKind::Sale),
            ("experiment_id", stored.experiment_id != self.experiment_id),
            ("user_id", stored.user_id != self.user_id),
            ("revenue", stored.revenue.amount() != self.revenue.amount()),
            ("currency", stored.revenue.currency() != self.revenue.currency()),
            ("order_id", stored.order_id != self.order_id),
        ]
        .into_iter()
        .filter_map(|(field, differs)| differs.then_some(field))
        .collect()
    }
}

/// What became of a sale.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[must_use = "a sale that was not written is not counted"]
pub enum SaleOutcome {
    /// It was written, and counts.
    Recorded(Conversion),
    /// It is there already, under the same key and with the same content; nothing was written.
    Duplicate(Conversion),
    /// The key is there already, with other content; nothing was written.
    Conflict {
        /// What stands under the key.
        stored: Conversion,
        /// The fields that differ.
        fields: Vec<&'static str>,
    },
    /// The tenant has no such experiment, or nothing is stored for this user in it; nothing was written.
    NotAssigned,
}

impl SaleOutcome {
    /// The entry that stands in the ledger for this sale; `None` if the user is not in the experiment, which is no
    /// reason to refuse an order. A conflict is an error.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) with the names of the fields that differ.
    pub fn entry(self) -> Result<Option<Conversion>> {
        match self {
            SaleOutcome::Recorded(entry) | SaleOutcome::Duplicate(entry) => Ok(Some(entry)),
            SaleOutcome::Conflict { fields, .. } => Err(Error::conflict(format!(
                "the idempotency key stands for another sale, with another {}",
                fields.join(", ")
            ))
            .with_fields(fields)),
            SaleOutcome::NotAssigned => Ok(None),
        }
    }
}
