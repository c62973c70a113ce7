mod model;

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::page::{Cursor, MAX_PAGE, Page, rows_for};
use crate::error::{Error, Result};
use crate::id::{ConversionId, IdempotencyKey, OrderId, UserId};
use crate::money::Currency;
use crate::scope::{Statement, TenantScope};
pub use model::{Conversion, ConversionKind, NewSale, SaleOutcome};

/// The ledger of what was paid: append-only, each entry once.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Conversions<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Conversions<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Conversions { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Records one sale, once.
    ///
    /// One round trip, and a second one if it was not written, to say why.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, sale: lastprice::NewSale) -> lastprice::Result<()> {
    /// let entry = tenant.conversions().record_sale(&sale).await?.entry()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule. What the ledger says about
    /// the sale is the outcome, not an error: see [`SaleOutcome::entry`] to treat it as one.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Recording the same sale again counts once.
    pub async fn record_sale(self, sale: &NewSale) -> Result<SaleOutcome> {
        let mut outcomes = self.record_sales(std::slice::from_ref(sale)).await?;
        outcomes.pop().ok_or_else(|| Error::internal("one sale has no outcome"))
    }

    /// Records up to 1000 sales in one statement; the outcomes are in the sales' order.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, sales: Vec<lastprice::NewSale>) -> lastprice::Result<()> {
    /// for outcome in tenant.conversions().record_sales(&sales).await? {
    ///     outcome.entry()?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 1000 sales, or one that breaks a rule; then
    /// nothing is written.
    pub async fn record_sales(self, sales: &[NewSale]) -> Result<Vec<SaleOutcome>> {
        if sales.len() > MAX_PAGE as usize {
            return Err(Error::invalid("sales", format_args!("are more than {MAX_PAGE}")));
        }
        sales.iter().try_for_each(NewSale::check)?;
        if sales.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<Uuid> = sales.iter().map(|s| s.id.uuid()).collect();
        let experiments: Vec<Uuid> = sales.iter().map(|s| s.experiment_id.uuid()).collect();
        let users: Vec<&str> = sales.iter().map(|s| s.user_id.as_str()).collect();
        let amounts: Vec<Decimal> = sales.iter().map(|s| s.revenue.amount()).collect();
        let currencies: Vec<Currency> = sales.iter().map(|s| s.revenue.currency()).collect();
        let currencies: Vec<&str> = currencies.iter().map(Currency::code).collect();
        let keys: Vec<&str> = sales.iter().map(|s| s.idempotency_key.as_str()).collect();
        let orders: Vec<Option<&str>> =
            sales.iter().map(|s| s.order_id.as_ref().map(OrderId::as_str)).collect();
        let times: Vec<DateTime<Utc>> = sales.iter().map(|s| s.occurred_at).collect();
        let metadata: Vec<&Value> = sales.iter().map(|s| &s.metadata).collect();
        let written = self
            .scope
            .query(
                &INSERT,
                &[
                    &self.tenant(),
                    &ids,
                    &experiments,
                    &users,
                    &amounts,
                    &currencies,
                    &keys,
                    &orders,
                    &times,
                    &metadata,
                ],
            )
            .await?;

        // What stands under each key. A value that is in the call twice was written once, where it comes first.
        let mut standing: HashMap<IdempotencyKey, Conversion> = HashMap::new();
        let mut ours: HashSet<ConversionId> = HashSet::new();
        for row in &written {
            let entry = Conversion::from_row(row)?;
            ours.insert(entry.id);
            standing.insert(entry.idempotency_key.clone(), entry);
        }
        let others = sales.iter().map(|s| &s.idempotency_key).filter(|key| !standing.contains_key(key));
        let others: Vec<&str> = others.map(IdempotencyKey::as_str).collect();
        if !others.is_empty() {
            for row in &self.scope.query(&BY_KEYS, &[&self.tenant(), &others]).await? {
                let entry = Conversion::from_row(row)?;
                standing.insert(entry.idempotency_key.clone(), entry);
            }
        }
        Ok(sales
            .iter()
            .map(|sale| {
                let Some(stored) = standing.get(&sale.idempotency_key).cloned() else {
                    return SaleOutcome::NotAssigned;
                };
                if stored.id == sale.id && ours.remove(&sale.id) {
                    return SaleOutcome::Recorded(stored);
                }
                match sale.differences(&stored) {
                    fields if fields.is_empty() => SaleOutcome::Duplicate(stored),
                    fields => SaleOutcome::Conflict { stored, fields },
                }
            })
            .collect())
    }

    /// The entry of an idempotency key.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, key: lastprice::IdempotencyKey) -> lastprice::Result<()> {
    /// let entry = tenant.conversions().by_key(&key).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn by_key(self, key: &IdempotencyKey) -> Result<Option<Conversion>> {
        let row = self.scope.query_opt(&BY_KEYS, &[&self.tenant(), &[key.as_str()].as_slice()]).await?;
        row.map(|row| Conversion::from_row(&row)).transpose()
    }

    /// All entries of a user, oldest id first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let entries = tenant.conversions().list_by_user(&user, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_user(
        self,
        user: &UserId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Conversion>> {
        self.list(&BY_USER, user.as_str(), limit, after).await
    }

    /// All entries of an order, oldest id first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, order: lastprice::OrderId) -> lastprice::Result<()> {
    /// let entries = tenant.conversions().list_by_order(&order, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_order(
        self,
        order: &OrderId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Conversion>> {
        self.list(&BY_ORDER, order.as_str(), limit, after).await
    }

    async fn list(
        self,
        statement: &'static Statement,
        of: &str,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Conversion>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(statement, &[&self.tenant(), &of, &after, &rows]).await?;
        let items = rows.iter().map(Conversion::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |c: &Conversion| c.id.uuid()))
    }
}

macro_rules! columns {
    () => {
        "id, experiment_id, user_id, variant, kind, revenue, currency, order_id, idempotency_key, occurred_at, metadata"
    };
}

pub(super) const STATEMENTS: &[&Statement] = &[&INSERT, &BY_KEYS, &BY_USER, &BY_ORDER];

// In the order of the keys: two batches with the same ones wait for each other in one order. Of one key's sales the
// first in the call is written.
static INSERT: Statement = Statement::write(
    "conversions.record_sales",
    concat!(
        "INSERT INTO {s}.conversions (tenant_id, id, experiment_id, user_id, variant, phase, reason, kind,
                                      revenue, currency, list_price, idempotency_key, order_id, occurred_at, metadata)
         SELECT a.tenant_id, x.id, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, 'sale',
                x.revenue, x.currency, CASE WHEN x.currency = a.currency THEN a.price END, x.idempotency_key, x.order_id, x.occurred_at, x.metadata
         FROM unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) WITH ORDINALITY
           AS x (id, experiment_id, user_id, revenue, currency, idempotency_key, order_id, occurred_at, metadata, n)
         JOIN {s}.assignments a
           ON a.tenant_id = $1 AND a.experiment_id = x.experiment_id AND a.user_id = x.user_id
         ORDER BY x.idempotency_key, x.n
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[
        Type::UUID,
        Type::UUID_ARRAY,
        Type::UUID_ARRAY,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::JSONB_ARRAY,
    ],
);

static BY_KEYS: Statement = Statement::read(
    "conversions.by_keys",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.conversions WHERE tenant_id = $1 AND idempotency_key = ANY ($2)"
    ),
    &[Type::UUID, Type::TEXT_ARRAY],
);

static BY_USER: Statement = Statement::read(
    "conversions.list_by_user",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.conversions WHERE tenant_id = $1 AND user_id = $2 AND id >= $3
         ORDER BY tenant_id, user_id, id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);

static BY_ORDER: Statement = Statement::read(
    "conversions.list_by_order",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.conversions WHERE tenant_id = $1 AND order_id = $2 AND id >= $3
         ORDER BY tenant_id, order_id, id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);
