//! A ledger entry, as stored.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::Row;

use crate::error::{Error, Result};
use crate::id::{ConversionId, ExperimentId, IdempotencyKey, OrderId, Period, SubscriptionId, UserId};
use crate::money::{Currency, Money};
use crate::repo::AssignmentReason;
use crate::repo::row::{Fields, text_enum};

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

text_enum! {
    /// What must hold of a ledger entry. *Quoted* is the user's stored quote; for a renewal, the list price of the sale that
    /// its subscription began with.
    LedgerRule, "flag" {
        /// A price was quoted for the item (there is such an item) in the currency; what goes back is in the currency of the
        /// sale.
        Currency = "currency",
        /// The list price is the quoted price.
        ListPrice = "list_price",
        /// net = quantity × quoted price − discount + proration.
        Net = "net",
        /// The sale happened while the quote was valid.
        Expired = "expired",
        /// A period of a subscription is paid once.
        Period = "period",
        /// No more goes back than was paid.
        BeyondSale = "beyond_sale",
        /// No more of a chargeback is reversed than was charged back.
        BeyondChargeback = "beyond_chargeback",
    }
}

impl LedgerRule {
    /// Whether it is about the price that was promised.
    pub(super) fn is_of_quote(self) -> bool {
        matches!(self, LedgerRule::Currency | LedgerRule::ListPrice | LedgerRule::Net | LedgerRule::Expired)
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
    /// The user; in an experiment by account, the account.
    pub user_id: UserId,
    /// The variant that the user was assigned, or whose price everyone outside sees.
    pub variant: String,
    /// Why the user has the variant; `None` for one who is not in the experiment, and whose entries count in no metric.
    pub reason: Option<AssignmentReason>,
    /// What it records.
    pub kind: ConversionKind,
    /// What it adds to net revenue, without tax; negative for what goes back to the customer.
    pub revenue: Money,
    /// The item of the price book; `None` for the headline price.
    pub item: Option<String>,
    /// The price of one.
    pub list_price: Option<Money>,
    /// How many.
    pub quantity: u32,
    /// What was taken off.
    pub discount: Money,
    /// What was added (or, negative, taken off) for a part of a period.
    pub proration: Money,
    /// The tax on top, which is no revenue.
    pub tax: Money,
    /// Recorded after the money had moved ([`settle`](crate::Conversions::settle)); otherwise before.
    pub is_settled: bool,
    /// Whether what was charged is what was quoted; `None` where there is nothing to compare, or nobody has.
    pub quote_mismatch: Option<bool>,
    /// The rules that it breaks.
    pub flags: Vec<LedgerRule>,
    /// The host's order.
    pub order_id: Option<OrderId>,
    /// The host's subscription.
    pub subscription_id: Option<SubscriptionId>,
    /// The period that a renewal pays.
    pub period: Option<Period>,
    /// The sale or renewal that it belongs to.
    pub sale_id: Option<ConversionId>,
    /// The key under which it counts once.
    pub idempotency_key: IdempotencyKey,
    /// When it happened.
    pub occurred_at: DateTime<Utc>,
    /// Whatever the host keeps with it: a JSON object.
    pub metadata: Value,
}

impl Conversion {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        let currency: Currency = row.currency("currency")?;
        let money = |column| -> Result<Money> { Ok(Money::stored(row.field::<Decimal>(column)?, currency)) };
        let flags: Vec<&str> = row.field("flags")?;
        Ok(Conversion {
            id: row.id("id")?,
            experiment_id: row.id("experiment_id")?,
            user_id: UserId::new(row.field::<String>("user_id")?)?,
            variant: row.field("variant")?,
            reason: match row.field("reason")? {
                OUTSIDE => None,
                reason => Some(AssignmentReason::stored(reason)?),
            },
            kind: ConversionKind::stored(row.field("kind")?)?,
            revenue: money("revenue")?,
            item: row.field("item")?,
            list_price: row
                .field::<Option<Decimal>>("list_price")?
                .map(|price| Money::stored(price, currency)),
            quantity: u32::try_from(row.field::<i32>("quantity")?)
                .map_err(|_| Error::internal("a stored quantity is negative"))?,
            discount: money("discount")?,
            proration: money("proration")?,
            tax: money("tax")?,
            is_settled: row.field("settled")?,
            quote_mismatch: row.field("quote_mismatch")?,
            flags: flags.into_iter().map(LedgerRule::stored).collect::<Result<_>>()?,
            order_id: row.field::<Option<String>>("order_id")?.map(OrderId::new).transpose()?,
            subscription_id: row
                .field::<Option<String>>("subscription_id")?
                .map(SubscriptionId::new)
                .transpose()?,
            period: row.field::<Option<String>>("period")?.map(Period::new).transpose()?,
            sale_id: row.field::<Option<uuid::Uuid>>("sale_id")?.map(ConversionId::from),
            idempotency_key: IdempotencyKey::new(row.field::<String>("idempotency_key")?)?,
            occurred_at: row.field("occurred_at")?,
            metadata: row.field("metadata")?,
        })
    }
}

/// The reason of entries of users who are not in the experiment.
pub(super) const OUTSIDE: &str = "outside";
