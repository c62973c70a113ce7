//! A ledger entry, as it is given.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::Row;
use uuid::Uuid;

use super::model::{Conversion, ConversionKind, LedgerRule};
use crate::error::{Error, Result};
use crate::id::{ConversionId, ExperimentId, IdempotencyKey, OrderId, Period, SubscriptionId, UserId};
use crate::money::{Currency, Money};
use crate::repo::row::{Fields, heap_of, rules};

/// An entry for the ledger. Amounts are without tax, and never negative: a refund of 5 is given as 5.
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId, quoted: lastprice::Money) -> lastprice::Result<()> {
/// use lastprice::{IdempotencyKey, Money, NewConversion, OrderId, UserId};
///
/// let user = UserId::new("user-42")?;
/// let key = IdempotencyKey::new("charge:ch_123")?;
/// let discount = Money::new("5.00", "USD")?;
/// let net = quoted.checked_mul(3)?.checked_sub(discount)?;
/// let sale = NewConversion::sale(experiment, user, net, key)
///     .order(OrderId::new("order-1001")?)
///     .quantity(3)
///     .discount(discount);
///
/// let key = IdempotencyKey::new("refund:re_77")?;
/// let refund = NewConversion::refund(OrderId::new("order-1001")?, Money::new("2.50", "USD")?, key);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewConversion {
    pub(super) id: ConversionId,
    pub(super) kind: ConversionKind,
    pub(super) experiment_id: Option<ExperimentId>,
    pub(super) user_id: Option<UserId>,
    /// Of a trial there is none.
    pub(super) net: Option<Money>,
    pub(super) item: Option<String>,
    pub(super) list_price: Option<Money>,
    pub(super) quantity: u32,
    pub(super) discount: Option<Money>,
    pub(super) proration: Option<Money>,
    pub(super) tax: Option<Money>,
    pub(super) order_id: Option<OrderId>,
    pub(super) subscription_id: Option<SubscriptionId>,
    pub(super) period: Option<Period>,
    pub(super) idempotency_key: IdempotencyKey,
    pub(super) occurred_at: DateTime<Utc>,
    pub(super) metadata: Value,
}

impl NewConversion {
    fn new(kind: ConversionKind, net: Option<Money>, key: IdempotencyKey) -> Self {
        NewConversion {
            id: ConversionId::new(),
            kind,
            experiment_id: None,
            user_id: None,
            net,
            item: None,
            list_price: None,
            quantity: 1,
            discount: None,
            proration: None,
            tax: None,
            order_id: None,
            subscription_id: None,
            period: None,
            idempotency_key: key,
            occurred_at: Utc::now(),
            metadata: Value::Object(Default::default()),
        }
    }

    /// A sale: who bought, and the net amount, without tax. With nothing else said, that is one at the quoted price.
    ///
    /// [Name the order](NewConversion::order): without it nothing can go back, and it cannot be reconciled. In an experiment by
    /// account, the user is the account: the id that [the quote](crate::Quote::user_id) has; under another one the sale counts
    /// as one from outside of the experiment.
    pub fn sale(experiment: ExperimentId, user: UserId, net: Money, key: IdempotencyKey) -> Self {
        let new = NewConversion::new(ConversionKind::Sale, Some(net), key);
        NewConversion { experiment_id: Some(experiment), user_id: Some(user), ..new }
    }

    /// A trial of a subscription, of which nothing is paid yet. The payment that ends it is a [`sale`](NewConversion::sale).
    /// It prolongs no quote: where quotes have a validity, ask for the price again before that payment.
    pub fn trial_start(
        experiment: ExperimentId,
        user: UserId,
        subscription: SubscriptionId,
        key: IdempotencyKey,
    ) -> Self {
        let new = NewConversion::new(ConversionKind::TrialStart, None, key).subscription(subscription);
        NewConversion { experiment_id: Some(experiment), user_id: Some(user), ..new }
    }

    /// A further payment of a subscription, which began with a [`sale`](NewConversion::sale) that
    /// [names it](NewConversion::subscription): the price that is locked is the list price of that sale (of several, the
    /// latest before the renewal). The period is paid once: under another key it is refused, or settled and flagged.
    pub fn renewal(subscription: SubscriptionId, period: Period, net: Money, key: IdempotencyKey) -> Self {
        let new = NewConversion::new(ConversionKind::Renewal, Some(net), key).subscription(subscription);
        NewConversion { period: Some(period), ..new }
    }

    /// Goes back to the customer, of an order that a sale or renewal [named](NewConversion::order); all of it or a part.
    pub fn refund(order: OrderId, amount: Money, key: IdempotencyKey) -> Self {
        NewConversion::new(ConversionKind::Refund, Some(amount), key).order(order)
    }

    /// Was taken back by the customer's bank, of an order that a sale or renewal named.
    pub fn chargeback(order: OrderId, amount: Money, key: IdempotencyKey) -> Self {
        NewConversion::new(ConversionKind::Chargeback, Some(amount), key).order(order)
    }

    /// A chargeback of the order was decided for us.
    pub fn chargeback_reversal(order: OrderId, amount: Money, key: IdempotencyKey) -> Self {
        NewConversion::new(ConversionKind::ChargebackReversal, Some(amount), key).order(order)
    }

    /// The host's order.
    pub fn order(mut self, order: OrderId) -> Self {
        self.order_id = Some(order);
        self
    }

    /// The subscription that a sale begins.
    pub fn subscription(mut self, subscription: SubscriptionId) -> Self {
        self.subscription_id = Some(subscription);
        self
    }

    /// Which sale of the order, if there are several: that of this experiment. Otherwise what goes back is taken from the one of
    /// which most is left.
    pub fn of_experiment(mut self, experiment: ExperimentId) -> Self {
        self.experiment_id = Some(experiment);
        self
    }

    /// What was sold, as the price book calls it. Default: what the headline price is for.
    pub fn item(mut self, item: impl Into<String>) -> Self {
        self.item = Some(item.into());
        self
    }

    /// How many. Default: 1.
    pub fn quantity(mut self, quantity: u32) -> Self {
        self.quantity = quantity;
        self
    }

    /// The price of one, as the host knows it. Default: as quoted.
    pub fn list_price(mut self, price: Money) -> Self {
        self.list_price = Some(price);
        self
    }

    /// What was taken off. Default: nothing.
    pub fn discount(mut self, discount: Money) -> Self {
        self.discount = Some(discount);
        self
    }

    /// What was added, or taken off if negative, for a part of a period. Default: nothing.
    pub fn proration(mut self, proration: Money) -> Self {
        self.proration = Some(proration);
        self
    }

    /// The tax on top, which is no revenue. Default: nothing.
    pub fn tax(mut self, tax: Money) -> Self {
        self.tax = Some(tax);
        self
    }

    /// When it happened. Default: now. What is settled is held against the quote's validity at this time, so give the payment
    /// provider's; what is authorised, at the database's. A repeated report may name another time: the first one stands.
    pub fn at(mut self, time: DateTime<Utc>) -> Self {
        self.occurred_at = time;
        self
    }

    /// A JSON object, at most 64 KiB. Default: `{}`. A repeated report may carry another: the first one stands.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    /// What it is best written in order with: the user, or else the subscription or order that it belongs to.
    pub(crate) fn unit(&self) -> &str {
        let user = self.user_id.as_ref().map(UserId::as_str);
        let subscription = || self.subscription_id.as_ref().map(SubscriptionId::as_str);
        let order = || self.order_id.as_ref().map(OrderId::as_str);
        user.or_else(subscription).or_else(order).unwrap_or_default()
    }

    /// What it holds on the heap, about, in bytes.
    pub(crate) fn heap(&self) -> usize {
        let text = |of: Option<&str>| of.map_or(0, str::len);
        text(self.user_id.as_ref().map(UserId::as_str))
            + text(self.order_id.as_ref().map(OrderId::as_str))
            + text(self.subscription_id.as_ref().map(SubscriptionId::as_str))
            + text(self.period.as_ref().map(Period::as_str))
            + text(self.item.as_deref())
            + self.idempotency_key.as_str().len()
            + heap_of(&self.metadata)
    }

    pub(crate) fn check(&self) -> Result<()> {
        use ConversionKind::{Renewal, Sale, TrialStart};
        let has_price = matches!(self.kind, Sale | Renewal);
        for (field, is_given) in [
            ("item", self.item.is_some()),
            ("list_price", self.list_price.is_some()),
            ("quantity", self.quantity != 1),
            ("discount", self.discount.is_some()),
            ("proration", self.proration.is_some()),
        ] {
            if is_given && !has_price {
                return Err(Error::invalid(field, format_args!("is nothing that a {} has", self.kind)));
            }
        }
        if self.subscription_id.is_some() && !has_price && self.kind != TrialStart {
            return Err(Error::invalid(
                "subscription_id",
                format_args!("is nothing that a {} has", self.kind),
            ));
        }
        let currency = self.net.map(|net| net.currency());
        for (field, amount, may_be_negative) in [
            ("revenue", self.net, false),
            ("list_price", self.list_price, false),
            ("discount", self.discount, false),
            ("proration", self.proration, true),
            ("tax", self.tax, true),
        ] {
            let Some(amount) = amount else { continue };
            if amount.amount() < Decimal::ZERO && !may_be_negative {
                return Err(Error::invalid(field, "is negative"));
            }
            if Some(amount.currency()) != currency {
                return Err(Error::invalid(field, "is in another currency than the revenue"));
            }
            // Money of a sum, or of minor units, may be larger.
            Money::of(amount.amount(), amount.currency()).map_err(|_| {
                Error::invalid(field, "is not below 10^12 with at most 6 digits after the point")
            })?;
        }
        if !(1..=i32::MAX as u32).contains(&self.quantity) {
            return Err(Error::invalid("quantity", "is not between 1 and 2147483647"));
        }
        if let Some(item) = &self.item
            && (item.is_empty() || item.chars().count() > 128 || item.contains('\0'))
        {
            return Err(Error::invalid("item", "is not a text of 1 to 128 characters"));
        }
        rules::time("occurred_at", self.occurred_at)?;
        rules::object("metadata", &self.metadata)
    }

    /// Whether it belongs to an entry that is there before it.
    pub(crate) fn follows(&self) -> bool {
        !matches!(self.kind, ConversionKind::Sale | ConversionKind::TrialStart)
    }

    pub(super) fn currency(&self) -> Option<Currency> {
        self.net.map(|net| net.currency())
    }

    /// What it adds to net revenue.
    pub(super) fn revenue(&self) -> Decimal {
        let net = amount(self.net);
        match self.kind {
            ConversionKind::Refund | ConversionKind::Chargeback => -net,
            _ => net,
        }
    }

    /// What the law makes of it at a quoted price (the database decides by the same): the rules that do not hold, and
    /// what would have been the net amount.
    pub(super) fn law(&self, quoted: Option<Money>) -> (Vec<LedgerRule>, Option<Money>) {
        let Some(quoted) = quoted.filter(|q| Some(q.currency()) == self.currency()) else {
            return (vec![LedgerRule::Currency], None);
        };
        let net = quoted.amount().checked_mul(self.quantity.into());
        let net =
            net.and_then(|net| net.checked_sub(amount(self.discount))?.checked_add(amount(self.proration)));
        let mut broken = Vec::new();
        if self.list_price.is_some_and(|list| list.amount() != quoted.amount()) {
            broken.push(LedgerRule::ListPrice);
        }
        if net != self.net.map(|net| net.amount()) {
            broken.push(LedgerRule::Net);
        }
        let allowed = net.filter(|net| !net.is_sign_negative());
        (broken, allowed.map(|net| Money::stored(net, quoted.currency())))
    }

    /// What a repeated report must have in common with the first one.
    pub(super) fn differences(&self, stored: &Conversion) -> Vec<&'static str> {
        let same_amount = |given: Option<Money>, stored: Money| amount(given) == stored.amount();
        differing([
            ("kind", stored.kind != self.kind),
            ("experiment_id", self.experiment_id.is_some_and(|id| stored.experiment_id != id)),
            ("user_id", self.user_id.as_ref().is_some_and(|id| stored.user_id != *id)),
            ("revenue", stored.revenue.amount() != self.revenue()),
            ("currency", self.currency().is_some_and(|currency| stored.revenue.currency() != currency)),
            ("item", self.item.is_some() && stored.item != self.item),
            ("list_price", self.list_price.is_some_and(|price| stored.list_price != Some(price))),
            ("quantity", stored.quantity != self.quantity),
            ("discount", !same_amount(self.discount, stored.discount)),
            ("proration", !same_amount(self.proration, stored.proration)),
            ("tax", !same_amount(self.tax, stored.tax)),
            ("order_id", stored.order_id != self.order_id),
            ("subscription_id", stored.subscription_id != self.subscription_id),
            ("period", stored.period != self.period),
        ])
    }

    /// The same with one that waits, as far as it is known: what neither says, the entry that they belong to will.
    pub(super) fn differences_to_waiting(&self, row: &Row) -> Result<Vec<&'static str>> {
        let text = |column| row.field::<Option<&str>>(column);
        let number = |column| row.field::<Option<Decimal>>(column);
        let both = |given: Option<Decimal>, waiting: Option<Decimal>| given.is_some() && given != waiting;
        let experiment = self.experiment_id.map(|id| id.uuid());
        let waiting_for = row.field::<Option<Uuid>>("experiment_id")?;
        let list_price = self.list_price.map(|price| price.amount());
        Ok(differing([
            ("kind", text("kind")? != Some(self.kind.as_str())),
            ("experiment_id", waiting_for.is_some() && experiment.is_some() && experiment != waiting_for),
            ("revenue", number("revenue")? != Some(self.revenue())),
            ("currency", self.currency().is_some_and(|c| text("currency").ok().flatten() != Some(c.code()))),
            ("item", self.item.is_some() && text("item")? != self.item.as_deref()),
            ("list_price", both(list_price, number("list_price")?)),
            ("quantity", row.field::<Option<i32>>("quantity")?.map(i64::from) != Some(self.quantity.into())),
            ("discount", both(Some(amount(self.discount)), number("discount")?)),
            ("proration", both(Some(amount(self.proration)), number("proration")?)),
            ("tax", both(Some(amount(self.tax)), number("tax")?)),
            ("order_id", text("order_id")? != self.order_id.as_ref().map(OrderId::as_str)),
            (
                "subscription_id",
                text("subscription_id")? != self.subscription_id.as_ref().map(SubscriptionId::as_str),
            ),
            ("period", text("period")? != self.period.as_ref().map(Period::as_str)),
        ]))
    }
}

fn differing<const N: usize>(fields: [(&'static str, bool); N]) -> Vec<&'static str> {
    fields.into_iter().filter_map(|(field, differs)| differs.then_some(field)).collect()
}

pub(super) fn amount(money: Option<Money>) -> Decimal {
    money.map_or(Decimal::ZERO, |money| money.amount())
}
