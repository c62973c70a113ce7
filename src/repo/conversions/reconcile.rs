//! The ledger against the host's orders.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Conversions;
use super::model::ConversionKind;
use crate::error::{Error, Result};
use crate::id::{ConversionId, IdempotencyKey, OrderId};
use crate::money::{Currency, Money};
use crate::repo::page::MAX_PAGE;
use crate::repo::row::{Fields, rules};
use crate::scope::Statement;

/// An order, as the host knows it.
///
/// ```no_run
/// # async fn f(tenant: lastprice::TenantHandle, host: tokio_postgres::Client,
/// #     november: std::ops::Range<lastprice::chrono::DateTime<lastprice::chrono::Utc>>) -> Result<(), Box<dyn std::error::Error>> {
/// use lastprice::{HostOrder, OrderAmount};
///
/// let sql = "SELECT id::text, paid, currency FROM orders WHERE paid_at >= $1 AND paid_at < $2";
/// let rows = host.query(sql, &[&november.start, &november.end]).await?;
/// let orders = rows.iter().map(HostOrder::from_row).collect::<Result<Vec<_>, _>>()?;
/// let report = tenant.conversions().reconcile(orders, november, OrderAmount::Net).await?;
/// println!("{report}");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOrder {
    order_id: OrderId,
    amount: Money,
}

impl HostOrder {
    /// An order and its amount; of several with one id and currency, the amounts are added up.
    #[must_use]
    pub fn new(order: OrderId, amount: Money) -> Self {
        HostOrder { order_id: order, amount }
    }

    /// The first three columns of a row: the id as `text`, the amount as `numeric`, the currency's code as `text`.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what is not so: `order_id`, `amount` or `currency`.
    pub fn from_row(row: &Row) -> Result<Self> {
        let order: String =
            row.try_get(0).map_err(|_| Error::invalid("order_id", "is not the first column, as text"))?;
        let amount: Decimal =
            row.try_get(1).map_err(|_| Error::invalid("amount", "is not the second column, as numeric"))?;
        let currency: String =
            row.try_get(2).map_err(|_| Error::invalid("currency", "is not the third column, as text"))?;
        Ok(HostOrder { order_id: OrderId::new(order)?, amount: Money::of(amount, currency.parse()?)? })
    }
}

/// Which amount of an order the host's is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OrderAmount {
    /// Sales and renewals less what went back, without tax: net revenue.
    Net,
    /// Sales and renewals, without tax.
    Sold,
    /// Sales and renewals, with tax.
    Charged,
}

/// The ledger against the host's orders: see [`Conversions::reconcile`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Reconciliation {
    /// Orders on which both agree.
    pub agreed: u64,
    /// The sum of the host's orders, by currency.
    pub host: Vec<Money>,
    /// The sum of what the ledger has of the orders of both, by currency.
    pub ledger: Vec<Money>,
    /// All that does not agree.
    pub differences: Vec<Difference>,
}

/// A difference between the ledger and the host's orders.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// The host has an order that the ledger has nothing of.
    NotInLedger {
        /// The order.
        order_id: OrderId,
        /// The host's amount.
        host: Money,
    },
    /// The ledger has a sale or renewal of the time, and the host has no such order.
    NotAtHost {
        /// The order.
        order_id: OrderId,
        /// What the ledger has of it.
        ledger: Money,
    },
    /// Both have the order, with different amounts.
    Amount {
        /// The order.
        order_id: OrderId,
        /// The host's amount.
        host: Money,
        /// The ledger's, in the same currency.
        ledger: Money,
        /// Some of its entries break a [rule](crate::LedgerRule), which may be why.
        is_flagged: bool,
    },
    /// Both have the order, the ledger in another currency than the host.
    Currency {
        /// The order.
        order_id: OrderId,
        /// The host's amount.
        host: Money,
        /// The ledger's.
        ledger: Money,
    },
    /// The ledger has a sale or renewal of the time that names no order.
    WithoutOrder {
        /// The entry.
        id: ConversionId,
        /// What it adds to net revenue.
        ledger: Money,
    },
    /// It was reported, and what it belongs to is not there: it counts nowhere so far.
    Waiting {
        /// The key of the report.
        idempotency_key: IdempotencyKey,
        /// What it records.
        kind: ConversionKind,
        /// What it would add to net revenue.
        ledger: Money,
    },
}

impl Reconciliation {
    /// Whether everything agrees.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.differences.is_empty()
    }
}

impl fmt::Display for Reconciliation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |of: &[Money]| of.iter().map(Money::to_string).collect::<Vec<_>>().join(", ");
        let differ = self.differences.len();
        writeln!(
            f,
            "{} orders agree, {differ} differences; the host's orders are {}, in the ledger {}",
            self.agreed,
            sum(&self.host),
            sum(&self.ledger)
        )?;
        self.differences.iter().try_for_each(|difference| writeln!(f, "- {difference}"))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::NotInLedger { order_id, host } => {
                write!(f, "order {order_id}: {host} at the host, nothing in the ledger")
            }
            Difference::NotAtHost { order_id, ledger } => {
                write!(f, "order {order_id}: {ledger} in the ledger, no order at the host")
            }
            Difference::Amount { order_id, host, ledger, is_flagged } => {
                let why = if *is_flagged { " (an entry breaks a rule)" } else { "" };
                write!(f, "order {order_id}: {host} at the host, {ledger} in the ledger{why}")
            }
            Difference::Currency { order_id, host, ledger } => {
                write!(f, "order {order_id}: {host} at the host, {ledger} in the ledger, in another currency")
            }
            Difference::WithoutOrder { id, ledger } => write!(f, "entry {id}: {ledger} of no order"),
            Difference::Waiting { idempotency_key, kind, ledger } => {
                write!(f, "{kind} {idempotency_key}: {ledger} waits for what it belongs to")
            }
        }
    }
}

/// What the ledger has of an order in one currency.
#[derive(Debug, Clone, Copy)]
struct Entries {
    amount: Decimal,
    is_flagged: bool,
}

impl Conversions<'_> {
    /// Compares the ledger with the host's orders, and names each difference: every order of the host's with all that the
    /// ledger has of it, every sale and renewal of the time (its end is not of it) with the host's orders, and what waits.
    ///
    /// Reads a thousand orders at a time, each from its own snapshot; in a host's REPEATABLE READ transaction
    /// ([`Client::within`](crate::Client::within)), all from one. The orders are held in memory.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the time.
    ///
    /// # Cancel safety
    ///
    /// It reads only.
    pub async fn reconcile(
        self,
        orders: impl IntoIterator<Item = HostOrder>,
        time: Range<DateTime<Utc>>,
        by: OrderAmount,
    ) -> Result<Reconciliation> {
        rules::time("from", time.start)?;
        rules::time("to", time.end)?;
        if time.end < time.start {
            return Err(Error::invalid("to", "is before `from`"));
        }
        let mut host: BTreeMap<OrderId, BTreeMap<Currency, Decimal>> = BTreeMap::new();
        for HostOrder { order_id, amount } in orders {
            let sum = host.entry(order_id).or_default().entry(amount.currency()).or_default();
            *sum = sum
                .checked_add(amount.amount())
                .ok_or_else(|| Error::invalid("amount", "adds up to too much"))?;
        }
        let mut report =
            Reconciliation { agreed: 0, host: Vec::new(), ledger: Vec::new(), differences: Vec::new() };
        let mut sums = [BTreeMap::new(), BTreeMap::new()];
        let ids: Vec<&OrderId> = host.keys().collect();
        for ids in ids.chunks(MAX_PAGE as usize) {
            let entries = self.entries_of(ids, by).await?;
            for &id in ids {
                let none = BTreeMap::new();
                compare(id, &host[id], entries.get(id).unwrap_or(&none), &mut report, &mut sums);
            }
        }
        self.not_at_host(&host, time, by, &mut report).await?;
        self.waiting(&mut report).await?;
        let [of_host, of_ledger] = sums.map(|sums| {
            sums.into_iter()
                .map(|(currency, sum): (Currency, Decimal)| Money::stored(sum, currency))
                .collect()
        });
        (report.host, report.ledger) = (of_host, of_ledger);
        Ok(report)
    }

    async fn entries_of(
        self,
        orders: &[&OrderId],
        by: OrderAmount,
    ) -> Result<HashMap<OrderId, BTreeMap<Currency, Entries>>> {
        let orders: Vec<&str> = orders.iter().map(|id| id.as_str()).collect();
        let mut entries: HashMap<OrderId, BTreeMap<Currency, Entries>> = HashMap::new();
        for row in &self.scope.query(&BY_ORDERS, &[&self.tenant(), &orders]).await? {
            let (net, sold, tax): (Decimal, Decimal, Decimal) =
                (row.field("net")?, row.field("sold")?, row.field("tax")?);
            let amount = match by {
                OrderAmount::Net => net,
                OrderAmount::Sold => sold,
                OrderAmount::Charged => sold + tax,
            };
            let of_order = entries.entry(OrderId::new(row.field::<String>("order_id")?)?).or_default();
            of_order
                .insert(row.currency("currency")?, Entries { amount, is_flagged: row.field("is_flagged")? });
        }
        Ok(entries)
    }

    async fn not_at_host(
        self,
        host: &BTreeMap<OrderId, BTreeMap<Currency, Decimal>>,
        time: Range<DateTime<Utc>>,
        by: OrderAmount,
        report: &mut Reconciliation,
    ) -> Result<()> {
        let (mut from, mut after) = (time.start, Uuid::nil());
        let mut told = HashSet::new();
        loop {
            let params: crate::scope::Params<'_> =
                &[&self.tenant(), &from, &after, &time.end, &i64::from(MAX_PAGE)];
            let rows = self.scope.query(&SOLD, params).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            (from, after) = (last.field("occurred_at")?, last.field("id")?);
            let mut unknown = Vec::new();
            for row in &rows {
                match row.field::<Option<String>>("order_id")? {
                    None => report.differences.push(Difference::WithoutOrder {
                        id: row.id("id")?,
                        ledger: row.money("revenue", "currency")?,
                    }),
                    Some(id) => {
                        let id = OrderId::new(id)?;
                        if !host.contains_key(&id) && told.insert(id.clone()) {
                            unknown.push(id);
                        }
                    }
                }
            }
            let entries = self.entries_of(&unknown.iter().collect::<Vec<_>>(), by).await?;
            for order_id in unknown {
                for (currency, entries) in entries.get(&order_id).into_iter().flatten() {
                    let (order_id, ledger) = (order_id.clone(), Money::stored(entries.amount, *currency));
                    report.differences.push(Difference::NotAtHost { order_id, ledger });
                }
            }
        }
    }

    async fn waiting(self, report: &mut Reconciliation) -> Result<()> {
        let mut after = String::new();
        loop {
            let rows = self.scope.query(&WAITING, &[&self.tenant(), &after, &i64::from(MAX_PAGE)]).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            after = last.field("idempotency_key")?;
            for row in &rows {
                report.differences.push(Difference::Waiting {
                    idempotency_key: IdempotencyKey::new(row.field::<String>("idempotency_key")?)?,
                    kind: ConversionKind::stored(row.field("kind")?)?,
                    ledger: row.money("revenue", "currency")?,
                });
            }
        }
    }
}

fn compare(
    id: &OrderId,
    host: &BTreeMap<Currency, Decimal>,
    ledger: &BTreeMap<Currency, Entries>,
    report: &mut Reconciliation,
    [of_host, of_ledger]: &mut [BTreeMap<Currency, Decimal>; 2],
) {
    for (&currency, amount) in host {
        *of_host.entry(currency).or_default() += amount;
    }
    for (&currency, entries) in ledger {
        *of_ledger.entry(currency).or_default() += entries.amount;
    }
    let before = report.differences.len();
    for (&currency, &amount) in host {
        let (order_id, host) = (id.clone(), Money::stored(amount, currency));
        match ledger.get(&currency) {
            Some(entries) if entries.amount == amount => {}
            Some(entries) => report.differences.push(Difference::Amount {
                order_id,
                host,
                ledger: Money::stored(entries.amount, currency),
                is_flagged: entries.is_flagged,
            }),
            None if ledger.is_empty() => report.differences.push(Difference::NotInLedger { order_id, host }),
            None => {} // told by what follows
        }
    }
    let Some((&first, &amount)) = host.first_key_value() else { return };
    for (&currency, entries) in ledger.iter().filter(|(currency, _)| !host.contains_key(currency)) {
        report.differences.push(Difference::Currency {
            order_id: id.clone(),
            host: Money::stored(amount, first),
            ledger: Money::stored(entries.amount, currency),
        });
    }
    report.agreed += u64::from(report.differences.len() == before);
}

pub(crate) const STATEMENTS: &[&Statement] = &[&BY_ORDERS, &SOLD, &WAITING];

// One look-up per order: as a list, a plan made for an average tenant reads all orders of this one.
static BY_ORDERS: Statement = Statement::read(
    "conversions.by_orders",
    "SELECT o.id AS order_id, c.* FROM unnest($2) AS o (id) CROSS JOIN LATERAL (
       SELECT currency, sum(revenue) AS net, COALESCE(sum(revenue) FILTER (WHERE kind IN ('sale', 'renewal')), 0) AS sold,
              COALESCE(sum(tax) FILTER (WHERE kind IN ('sale', 'renewal')), 0) AS tax, bool_or(flags <> '{}') AS is_flagged
       FROM {s}.conversions WHERE tenant_id = $1 AND order_id = o.id AND kind <> 'trial_start' GROUP BY currency) c",
    &[Type::UUID, Type::TEXT_ARRAY],
);

static SOLD: Statement = Statement::read(
    "conversions.sold",
    "SELECT occurred_at, id, order_id, revenue, currency FROM {s}.conversions
     WHERE tenant_id = $1 AND (occurred_at, id) > ($2, $3) AND occurred_at < $4 AND kind IN ('sale', 'renewal')
     ORDER BY tenant_id, occurred_at, id LIMIT $5",
    &[Type::UUID, Type::TIMESTAMPTZ, Type::UUID, Type::TIMESTAMPTZ, Type::INT8],
);

static WAITING: Statement = Statement::read(
    "conversions.waiting",
    "SELECT idempotency_key, kind, (entry ->> 'revenue')::numeric AS revenue, entry ->> 'currency' AS currency
     FROM {s}.waiting_conversions WHERE tenant_id = $1 AND idempotency_key > $2
     ORDER BY tenant_id, idempotency_key LIMIT $3",
    &[Type::UUID, Type::TEXT, Type::INT8],
);
