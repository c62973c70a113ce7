mod model;
mod process;
mod sql;

use uuid::Uuid;

use super::page::{Cursor, Page, rows_for};
use super::row::{Fields, rules};
use crate::error::{Error, Result};
use crate::scope::TenantScope;
use crate::webhook::{Delivery, paid};
pub use model::{WebhookEvent, WebhookOutcome, WebhookStatus};
pub(super) use sql::STATEMENTS;
use sql::{DISCARD, LIST, PENDING, REOPEN, STATUS, STORE};

/// Verified webhooks: stored as they were received, then made into entries of the ledger.
///
/// A [`Verifier`](crate::webhook::Verifier) makes the [`Delivery`] of which [`receive`](Webhooks::receive) makes an entry, as
/// [`settle`](crate::Conversions::settle) would: what was not charged as quoted is flagged, and what comes before its sale waits.
/// The body is committed first, so whatever happens then, nothing is lost.
///
/// It knows the events of Paid.ai and no others. A body of another provider's is verified and stored, and is then
/// [ignored](WebhookStatus::Ignored): **nothing of it is in the ledger**, and that is no error. Who has another provider verifies the body with
/// the same [`Verifier`](crate::webhook::Verifier), reads it, and [settles](crate::Conversions::settle) what it says.
///
/// What is understood:
///
/// | `type` | becomes | needs in `data` | counts once by |
/// |---|---|---|---|
/// | `subscription.created`, `subscription.activated` | sale | `customer_id`, `amount`, `order_id`, `metadata.experiment_id` | `order_id` |
/// | `trial.started`, `subscription.trial_started` | trial_start | `customer_id`, `subscription_id`, `metadata.experiment_id` | `subscription_id` |
/// | `subscription.renewed`, `invoice.paid` | renewal | `subscription_id`, `period`, `amount`, `currency`, `order_id` | `order_id` |
/// | `payment.refunded`, `charge.refunded`, `refund.created` | refund | `order_id`, `amount`, `currency` | `refund_id`, or else the event's `id` |
/// | `dispute.created`, `chargeback.created` | chargeback | `order_id`, `amount`, `currency` | `dispute_id`, or else the event's `id` |
/// | `dispute.won`, `chargeback.reversed` | chargeback_reversal | `order_id`, `amount`, `currency` | `dispute_id`, or else the event's `id` |
///
/// An invoice of the order by which the subscription was sold is that sale, and no renewal; one that comes before any sale of its
/// subscription is pending until that is there. What the ledger has under another key is that payment: a sale of the same order
/// and experiment, a trial of the same subscription and experiment, a renewal of the same subscription and order. With another amount, or
/// of another user, they fail with `conflict`.
///
/// Ids, `period` and `currency` are texts. `amount` is net, in units of the currency, a number or a text of digits with a point
/// at most, and read exactly: `19.90`, not `1.99e1`. Without `currency` it is in that of the experiment, if
/// `metadata.experiment_id` names one. `created_at` (RFC 3339, or seconds since 1970) is the time; without it, that of the receipt. Quantity, discount and tax are
/// not read: a sale that has them is flagged [`Net`](crate::LedgerRule::Net), not lost.
///
/// # Once
///
/// The key of an entry is `paid:<kind>:` with what it counts once by, as `paid:sale:order-1001`. Best send your own key along:
/// `data.metadata.idempotency_key` is taken as it is, and then the checkout's entry and the webhook's are one by their key, if both
/// say the same kind, user, amount and order. Of quantity, discount, tax and item a webhook knows nothing. What stands in the ledger is
/// what the first report says: have `subscription_id` sent along as well, or a webhook that comes first leaves its renewals without a sale.
///
/// Without it, a sale, trial or renewal that a checkout [authorises](crate::Conversions::authorise) or settles under a key of its own is
/// held to be what the webhook reports, by the rule above, whichever comes first, and also at the same moment, in transactions that are
/// READ COMMITTED. The second is a [`Duplicate`](crate::ConversionOutcome::Duplicate) of the first; with another amount, or of another
/// user (until [`merge`](crate::Users::merge) says that both are one), the checkout's is a [`Conflict`](crate::ConversionOutcome::Conflict);
/// so is a sale whose invoice came first and was taken for a renewal of an older sale of the subscription. `customer_id` must be the id that
/// the checkout uses: the account's, where the experiment goes by [accounts](crate::AssignmentUnit::Account).
///
/// So for an order of several sales the keys must be sent along: a webhook without one means the whole order. A sale that names no
/// order is not recognised. Of what goes back (refunds, chargebacks) two keys are always two: record a refund of your own under the
/// webhook's key, `paid:refund:<refund_id>`, and both are one. In a transaction with an older snapshot (REPEATABLE READ), what is
/// committed meanwhile is not seen and may count twice; a common key does not.
///
/// Have one type of event sent for each thing: two types that report one refund without a `refund_id` are two refunds.
///
/// # What to answer
///
/// | what happened | answer |
/// |---|---|
/// | any [`WebhookOutcome`] | 200: it is stored. `Pending` and `Failed` are yours to look at |
/// | [`BadSignature`](crate::ErrorKind::BadSignature) | 401; keep nothing |
/// | [`Conflict`](crate::ErrorKind::Conflict) | 200, and tell yourself: sent again it would be the same |
/// | [`InvalidInput`](crate::ErrorKind::InvalidInput) for `body` | 413 |
/// | [`InvalidInput`](crate::ErrorKind::InvalidInput) for `secrets` | 500: none is stored for this tenant, or none is usable |
/// | anything else | 500 or 503: it will be sent again |
///
/// # Reasons
///
/// The reason of what is not processed is the name of a field, or: `unknown_experiment`, `unknown_subscription` and `database`
/// (pending, tried again); `conflict` (the key, or the order under another key, stands in the ledger with other content), `refused` and
/// `idempotency_key` (failed); `discarded` (ignored).
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Webhooks<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Webhooks<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Webhooks { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Stores a delivery and commits it, then processes it in a transaction of its own. In a transaction
    /// ([`begin`](crate::TenantHandle::begin), [`within`](TenantScope::within)) both are done in that one, and what rolls it back, an error of this call too, takes the
    /// delivery away with it: answer the sender after the commit.
    ///
    /// Whatever the outcome, the delivery is stored: answer the sender with success.
    ///
    /// ```no_run
    /// # async fn f(
    /// #     tenant: lastprice::TenantHandle,
    /// #     verifier: lastprice::webhook::Verifier,
    /// #     request: (std::collections::HashMap<String, String>, Vec<u8>),
    /// # ) -> lastprice::Result<()> {
    /// let (headers, body) = request;
    /// let header = |name: &str| headers.get(name).map(String::as_str);
    /// let delivery = verifier.standard(header, &body, lastprice::chrono::Utc::now())?;
    /// println!("{:?}", tenant.webhooks().receive(&delivery).await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if the delivery's id stands for another body: the first one is kept;
    /// [`NotFound`](crate::ErrorKind::NotFound) for the tenant; [`InvalidInput`](crate::ErrorKind::InvalidInput) for a time that
    /// cannot be stored. [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown) if the database failed after it was stored, maybe.
    ///
    /// # Cancel safety
    ///
    /// Once it is stored, [`process_pending`](Webhooks::process_pending) completes what was dropped. Receiving it again counts
    /// once.
    pub async fn receive(self, delivery: &Delivery) -> Result<WebhookOutcome> {
        rules::time("received_at", delivery.received_at())?;
        let (kind, hash) = (paid::type_of(delivery.body()), delivery.body_hash());
        let stored = self
            .scope
            .query_opt(
                &STORE,
                &[
                    &self.tenant(),
                    &delivery.id(),
                    &Uuid::now_v7(),
                    &kind,
                    &delivery.body(),
                    &hash,
                    &delivery.received_at(),
                ],
            )
            .await?;
        let result = process::process(self.scope, delivery.id(), Some(&hash)).await;
        match result {
            Err(e) if stored.is_none() && e.kind() == crate::ErrorKind::NotFound => {
                Err(Error::not_found("tenant"))
            }
            Err(e) => Err(self.scope.after_writing(e)),
            Ok(outcome) => Ok(outcome),
        }
    }

    /// Processes up to 1000 pending webhooks, those that were tried least first, each in a transaction of its own; gives the id
    /// and outcome of each. Call it at intervals for each of your tenants: what another process has stored and not finished is completed here.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// for (id, outcome) in tenant.webhooks().process_pending(100).await? {
    ///     println!("{id}: {outcome:?}");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit. If the database fails, what was processed until then stays
    /// so.
    ///
    /// # Cancel safety
    ///
    /// Some may have been processed. Repeating the call is safe.
    pub async fn process_pending(self, limit: u32) -> Result<Vec<(String, WebhookOutcome)>> {
        rows_for(limit)?;
        let rows = self.scope.query(&PENDING, &[&self.tenant(), &i64::from(limit)]).await?;
        let mut outcomes = Vec::with_capacity(rows.len());
        for row in rows {
            let id: String = super::row::Fields::field(&row, "id")?;
            let outcome = process::process(self.scope, &id, None).await;
            let outcome =
                outcome.map_err(|e| if outcomes.is_empty() { e } else { self.scope.after_writing(e) })?;
            outcomes.push((id, outcome));
        }
        Ok(outcomes)
    }

    /// Tries one once more that failed or was ignored (or is pending): after a release that understands more, or when the
    /// ledger was put right. Of an ignored one that named a user who was [erased](crate::Users::erase) nothing is left: it fails with `body`.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let outcome = tenant.webhooks().retry("msg_2Lh9KRb0pzN4LePd3XiA4v12Axj").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if the tenant has no such webhook.
    ///
    /// # Cancel safety
    ///
    /// It may be left pending. Repeating the call is safe.
    pub async fn retry(self, id: &str) -> Result<WebhookOutcome> {
        check_id(id)?;
        self.scope.query(&REOPEN, &[&self.tenant(), &id]).await?;
        process::process(self.scope, id, None).await
    }

    /// Gives up one that failed or is pending: it is ignored from now on, until [`retry`](Webhooks::retry), and
    /// [`prune_webhooks`](crate::Admin::prune_webhooks) removes it in its time. Returns where it stands now: `Processed` if it is in the
    /// ledger, where it stays.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let status = tenant.webhooks().discard("msg_2Lh9KRb0pzN4LePd3XiA4v12Axj").await?;
    /// assert_eq!(status, lastprice::WebhookStatus::Ignored);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if the tenant has no such webhook.
    pub async fn discard(self, id: &str) -> Result<WebhookStatus> {
        check_id(id)?;
        let tenant = self.tenant();
        let row = match self.scope.query_opt(&DISCARD, &[&tenant, &id]).await? {
            Some(row) => row,
            // Who was processing it was waited for: how it ended is seen now.
            None => {
                let status = self.scope.query_opt(&STATUS, &[&tenant, &id]).await;
                status.map_err(|e| self.scope.after_writing(e))?.ok_or_else(unknown)?
            }
        };
        WebhookStatus::stored(row.field("status")?)
    }

    /// The webhooks of one status with their bodies, in the order in which they arrived; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let failed = tenant.webhooks().list(lastprice::WebhookStatus::Failed, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list(
        self,
        status: WebhookStatus,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<WebhookEvent>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&LIST, &[&self.tenant(), &status.as_str(), &after, &rows]).await?;
        let items = rows.iter().map(WebhookEvent::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |event: &WebhookEvent| event.seq))
    }
}

fn unknown() -> Error {
    Error::not_found("webhook")
}

/// No text of the database's has such a character.
fn check_id(id: &str) -> Result<()> {
    if id.contains('\0') { Err(unknown()) } else { Ok(()) }
}
