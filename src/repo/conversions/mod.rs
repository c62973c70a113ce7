mod columns;
mod model;
mod new;
mod outcome;
mod reconcile;
mod record;
mod reported;
mod sql;
mod unwritten;

use uuid::Uuid;

use super::page::{Cursor, MAX_PAGE, Page, rows_for};
use crate::error::{Error, Result};
use crate::id::{IdempotencyKey, OrderId, SubscriptionId, UserId};
use crate::scope::{Statement, TenantScope};
pub use model::{Conversion, ConversionKind, LedgerRule};
pub use new::NewConversion;
pub use outcome::{ConversionOutcome, Refusal};
pub(super) use reconcile::STATEMENTS as RECONCILE_STATEMENTS;
pub use reconcile::{Difference, HostOrder, OrderAmount, Reconciliation};
use record::{Door, Recording};
pub(super) use sql::STATEMENTS;
use sql::{BY_KEYS, BY_ORDER, BY_SUBSCRIPTION, BY_USER};

/// The ledger of what was paid: append-only, each entry once.
///
/// There are two doors. [`authorise`](Conversions::authorise) is asked *before* the money moves, and refuses what breaks a
/// [rule](LedgerRule). [`settle`](Conversions::settle) is told *after* it has moved (webhooks, imports): it always writes, and
/// flags the rules that do not hold.
///
/// The law of prices: the list price is the quoted one, and net = quantity × list price − discount + proration, without
/// tax. A sale of a user without a quote assigns the user in its own transaction, marked as
/// [late](crate::AssignmentReason::Late) (not in experiments by account: nobody says whether the id is an account's); of one
/// whom the experiment does not take, it is recorded at the price that everyone outside sees, and counts in no metric.
/// Discount and proration are taken as given.
///
/// What is reported before the entry that it belongs to (a refund before its sale) waits, and counts when that one comes. Whatever
/// the order in which entries arrive, and however often, the sums are the same.
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

    /// Records an entry before the money moves; one that breaks a rule is refused.
    ///
    /// One round trip for a user with a quote; more to say why nothing was written, or to assign the user.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, sale: lastprice::NewConversion) -> lastprice::Result<()> {
    /// use lastprice::ConversionOutcome;
    ///
    /// match tenant.conversions().authorise(&sale).await? {
    ///     ConversionOutcome::Refused(why) => println!("not charged: {:?}, {:?} would be right", why.rules, why.allowed),
    ///     outcome => println!("charge for {:?}", outcome.entry()?),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule of form. What the ledger says about the
    /// entry is the outcome, not an error: see [`ConversionOutcome::entry`] to treat it as one. Of renewals and what goes back
    /// to the customer, [`Conflict`](crate::ErrorKind::Conflict) in a transaction of the host's that is not READ COMMITTED.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Recording the same entry again counts once.
    pub async fn authorise(self, entry: &NewConversion) -> Result<ConversionOutcome> {
        self.one(Door::Authorise, entry).await
    }

    /// Records an entry after the money has moved: it is written, whatever the rules say, and those that do not hold are
    /// [flagged](Conversion::flags).
    ///
    /// One round trip for a user with a quote; more if it was there already, or to assign the user.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, reported: lastprice::NewConversion) -> lastprice::Result<()> {
    /// let entry = tenant.conversions().settle(&reported).await?.entry()?; // None while it waits for its sale
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule of form. [`Conflict`](crate::ErrorKind::Conflict) if the user is erased at the
    /// same moment, again and again; then nothing is written.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Recording the same entry again counts once.
    pub async fn settle(self, entry: &NewConversion) -> Result<ConversionOutcome> {
        self.one(Door::Settle, entry).await
    }

    /// [`settle`](Conversions::settle) for up to 1000 entries, in one statement for sales and one for what belongs to them; the
    /// outcomes are in the entries' order.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, reported: Vec<lastprice::NewConversion>) -> lastprice::Result<()> {
    /// for outcome in tenant.conversions().settle_many(&reported).await? {
    ///     outcome.entry()?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 1000 entries, or one that breaks a rule of form; then
    /// nothing is written.
    ///
    /// # Cancel safety
    ///
    /// As [`settle`](Conversions::settle); some of the entries may have been written.
    pub async fn settle_many(self, entries: &[NewConversion]) -> Result<Vec<ConversionOutcome>> {
        if entries.len() > MAX_PAGE as usize {
            return Err(Error::invalid("entries", format_args!("are more than {MAX_PAGE}")));
        }
        entries.iter().try_for_each(NewConversion::check)?;
        Recording::run(self.scope, Door::Settle, entries).await
    }

    async fn one(self, door: Door, entry: &NewConversion) -> Result<ConversionOutcome> {
        entry.check()?;
        let mut outcomes = Recording::run(self.scope, door, std::slice::from_ref(entry)).await?;
        outcomes.pop().ok_or_else(|| Error::internal("one entry has no outcome"))
    }

    /// The entry of an idempotency key. A payment that [a webhook](crate::Webhooks#once) has reported first stands under the webhook's key:
    /// look for its order.
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

    /// All entries that name a subscription, oldest id first; at most 1000 a page. What went back of them names their orders.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::SubscriptionId) -> lastprice::Result<()> {
    /// let entries = tenant.conversions().list_by_subscription(&id, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_subscription(
        self,
        subscription: &SubscriptionId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Conversion>> {
        self.list(&BY_SUBSCRIPTION, subscription.as_str(), limit, after).await
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
