//! What was received and has been dealt with, removed after a time.

use std::time::Duration;

use tokio_postgres::types::Type;
use uuid::Uuid;

use super::archive::check_age;
use super::{Admin, Param, column};
use crate::error::{Error, Result};

impl Admin {
    /// Removes the webhooks of all tenants that were processed or ignored so long ago; those that are pending or failed stay. Returns
    /// how many. In batches of 5000, each a transaction of its own; what is under way elsewhere goes on.
    ///
    /// What they became stays in the ledger, and is known there by its key: a webhook that is delivered once more adds nothing.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let removed = admin.prune_webhooks(std::time::Duration::from_secs(30 * 86_400)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 100 years; otherwise those of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, what was removed stays removed, and one batch more may be.
    pub async fn prune_webhooks(&self, older_than: Duration) -> Result<u64> {
        self.prune(WEBHOOKS, older_than).await
    }

    /// Removes what has waited in all tenants for so long for a sale that never came: refunds, chargebacks and renewals of orders
    /// that are in no experiment, mostly. Returns how many. In batches of 5000, each a transaction of its own.
    ///
    /// They are in no number. If their sale comes after all, it is as if they had never been reported: give it a time by which
    /// every sale has come, a year say.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let removed = admin.prune_waiting_conversions(std::time::Duration::from_secs(365 * 86_400)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 100 years; otherwise those of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, what was removed stays removed, and one batch more may be.
    pub async fn prune_waiting_conversions(&self, older_than: Duration) -> Result<u64> {
        self.prune(WAITING, older_than).await
    }

    /// Removes what was [reported](crate::Usage) in all tenants so long ago, and has been added up; the totals of each day stay. Returns
    /// how many reports. In batches of 5000, each a transaction of its own.
    ///
    /// With a report goes its idempotency key: what is reported once more under it, counts once more. Give it a time after which
    /// nobody tries again.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let removed = admin.prune_usage(std::time::Duration::from_secs(90 * 86_400)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 100 years; otherwise those of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, what was removed stays removed, and one batch more may be.
    pub async fn prune_usage(&self, older_than: Duration) -> Result<u64> {
        self.prune(USAGE, older_than).await
    }

    /// Along the primary key, once through the table.
    async fn prune(&self, sql: &str, older_than: Duration) -> Result<u64> {
        check_age(older_than)?;
        let age = older_than.as_secs_f64();
        let (mut after, mut removed) = ((Uuid::nil(), vec![String::new(); 2]), 0);
        loop {
            let params: [Param<'_>; 4] = [
                (&after.0, Type::UUID),
                (&after.1, Type::TEXT_ARRAY),
                (&age, Type::FLOAT8),
                (&BATCH, Type::INT8),
            ];
            let rows = self.query(None, sql, &params).await?;
            let row = rows.first().ok_or_else(|| Error::internal("a batch has no counts"))?;
            removed += column::<i64>(row, 1)?.unsigned_abs();
            if column::<i64>(row, 0)? < BATCH {
                return Ok(removed);
            }
            after = (column(row, 2)?, column(row, 3)?);
        }
    }
}

const BATCH: i64 = 5000;

macro_rules! batch {
    ($table:literal, $key:literal, $after:literal, $is_due:literal) => {
        concat!(
            "WITH page AS MATERIALIZED (
       SELECT w.ctid AS place, w.tenant_id, ARRAY[",
            $key,
            "] AS key, ",
            $is_due,
            " AS is_due FROM {s}.",
            $table,
            " w
       WHERE (w.tenant_id, ",
            $key,
            ") > ($1, ",
            $after,
            ") ORDER BY w.tenant_id, ",
            $key,
            " LIMIT $4
     ), gone AS (
       DELETE FROM {s}.",
            $table,
            " w WHERE w.ctid = ANY (ARRAY(SELECT p.place FROM page p WHERE p.is_due)) AND ",
            $is_due,
            " RETURNING 1
     )
     SELECT (SELECT count(*) FROM page), (SELECT count(*) FROM gone), l.tenant_id, l.key
     FROM (VALUES (1)) one LEFT JOIN (SELECT tenant_id, key FROM page ORDER BY tenant_id DESC, key DESC LIMIT 1) l ON true"
        )
    };
}

const WEBHOOKS: &str = batch!(
    "webhook_events",
    "w.id",
    "$2[1]",
    "(w.status IN ('processed', 'ignored') AND w.processed_at < now() - make_interval(secs => $3))"
);

const WAITING: &str = batch!(
    "waiting_conversions",
    "w.idempotency_key",
    "$2[1]",
    "(w.received_at < now() - make_interval(secs => $3))"
);

const USAGE: &str = batch!(
    "usage",
    "w.metric, w.idempotency_key",
    "$2[1], $2[2]",
    "(w.folded AND w.created_at < now() - make_interval(secs => $3))"
);
