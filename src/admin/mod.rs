//! The owner's door: what row-level security does not bind.

mod archive;
mod explain;
#[cfg(feature = "migrate")]
mod install;
mod limits;
mod prune;
mod refresher;
mod secrets;
mod tenants;

use std::fmt;
use std::time::Duration;

use futures_util::future::join3;
use tokio::sync::{Mutex, MutexGuard};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSqlOwned, ToSql, Type};
use tokio_postgres::{Client, Row, row::RowIndex};

pub use archive::{ArchiveOptions, ArchiveProgress};
#[cfg(feature = "migrate")]
pub use install::Migration;
pub use limits::{AdminLimits, LimitSource, UsageLimit};
pub use refresher::{Refresher, RefresherOptions, RefresherStatus};
pub use secrets::{RewrapFailure, RewrapProgress, RewrapReport};
pub use tenants::AdminTenants;

use crate::connect::{Target, connector};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Actor;
use crate::repo::FULL_FOLD;
use crate::scope::push_actor;

/// What the owner of the tables does: migrate, refresh, recount, and see tenants of all.
///
/// A type of its own, over one connection of its own, so that a service's [`Client`](crate::Client) cannot do any of
/// it by accident. A lost connection is opened again by the next call.
///
/// ```no_run
/// # async fn f() -> lastprice::Result<()> {
/// let admin = lastprice::Admin::connect("postgres://owner:secret@db.internal/shop").await?;
/// # #[cfg(feature = "migrate")]
/// admin.migrate().await?;
/// admin.refresh_metrics().await?;
/// # Ok(()) }
/// ```
pub struct Admin {
    target: Target,
    schema: String,
    actor: Option<Actor>,
    connection: Mutex<Option<Client>>,
}

impl Admin {
    /// Connects as the owner of the tables, or of the database to be; the tables are in schema `public`.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the URL,
    /// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Timeout`](crate::ErrorKind::Timeout) if there is no
    /// connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn connect(owner_url: &str) -> Result<Self> {
        Admin::connect_schema(owner_url, "public").await
    }

    /// [`connect`](Admin::connect), for tables in a schema of their own. It must exist before
    /// [`migrate`](Admin::migrate).
    ///
    /// ```no_run
    /// # async fn f() -> lastprice::Result<()> {
    /// let admin = lastprice::Admin::connect_schema("postgres://owner@db.internal/shop", "pricing").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`connect`](Admin::connect).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn connect_schema(owner_url: &str, schema: &str) -> Result<Self> {
        if schema.is_empty() || schema.len() > 63 || schema.contains('\0') {
            return Err(Error::invalid("schema", "is not a name of 1 to 63 bytes"));
        }
        let mut target = Target::from_url(owner_url)?;
        target.pg.connect_timeout(Duration::from_secs(10));
        if target.pg.get_application_name().is_none() {
            target.pg.application_name("lastprice admin");
        }
        let schema = postgres_protocol::escape::escape_identifier(schema);
        let admin = Admin { target, schema, actor: None, connection: Mutex::new(None) };
        drop(admin.connection().await?);
        Ok(admin)
    }

    /// Says who makes the changes, for the record (`updated_by`, and the [audit trail](crate::AuditTrail)).
    ///
    /// ```no_run
    /// # async fn f() -> lastprice::Result<()> {
    /// let admin = lastprice::Admin::connect("postgres://owner:secret@db.internal/shop").await?;
    /// let admin = admin.with_actor(lastprice::Actor::new("nightly job")?);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn with_actor(mut self, actor: Actor) -> Self {
        self.actor = Some(actor);
        self
    }

    /// The tenants of all.
    #[must_use]
    pub fn tenants(&self) -> AdminTenants<'_> {
        AdminTenants::new(self)
    }

    /// What plans and tenants may use.
    #[must_use]
    pub fn limits(&self) -> AdminLimits<'_> {
        AdminLimits::new(self)
    }

    /// Folds pending deltas and refreshes `experiment_metrics`, as `SELECT refresh_experiment_metrics()` does. Returns
    /// false if another refresh was under way: then it did nothing.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let refreshed = admin.refresh_metrics().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch) if the schema is not installed; else those of the
    /// connection.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the refresh goes on.
    pub async fn refresh_metrics(&self) -> Result<bool> {
        let refreshed = self.value("SELECT {s}.refresh_experiment_metrics()").await?;
        // It folds a part of what was reported of usage. The rest each in a transaction of its own: however long it takes, it gets done.
        let mut may_be_more = refreshed;
        while may_be_more {
            let folded: i64 = self.value("SELECT {s}.fold_metric_deltas(NULL)").await?;
            may_be_more = folded.unsigned_abs() >= FULL_FOLD;
        }
        Ok(refreshed)
    }

    /// Rebuilds the totals from the events, as `SELECT recount_experiment_metrics()` does: after a data-only restore
    /// or a TRUNCATE. Writers may go on meanwhile. Returns how many totals were written.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let totals = admin.recount_metrics().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch) if the schema is not installed; else those of the
    /// connection.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the recount goes on.
    pub async fn recount_metrics(&self) -> Result<u64> {
        let counted: i64 = self.value("SELECT {s}.recount_experiment_metrics()").await?;
        u64::try_from(counted).map_err(|_| Error::internal("a count is negative"))
    }

    async fn value<T: FromSqlOwned>(&self, sql: &str) -> Result<T> {
        let rows = self.query(None, sql, &[]).await?;
        let row = rows.first().ok_or_else(|| Error::internal("a function has no row"))?;
        column(row, 0)
    }

    /// One statement, in a transaction of its own, in one flight.
    async fn query(&self, actor: Option<&Actor>, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let sql = sql.replace("{s}", &self.schema);
        // With row_security off PostgreSQL refuses what it would otherwise filter in silence: a role that is not the
        // owner would find no tenant at all.
        let mut begin = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL row_security = off".to_owned();
        if let Some(actor) = actor.or(self.actor.as_ref()) {
            push_actor(&mut begin, actor);
        }
        // Held to the end: another call between these three would run in their transaction.
        let connection = self.connection().await?;
        let client = connection.as_ref().ok_or_else(|| Error::internal("the admin has no connection"))?;
        let (begun, rows, committed) = join3(
            client.batch_execute(&begin),
            client.query_typed(&sql, params),
            client.batch_execute("COMMIT"),
        )
        .await;
        let failed = |e: tokio_postgres::Error| match e.code() {
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                Error::invalid("owner_url", "is not of the owner of the tables")
                    .with_source(Error::from_driver(e, false))
            }
            _ => Error::from_driver(e, true),
        };
        begun.map_err(failed)?;
        let rows = rows.map_err(failed)?;
        committed.map_err(failed)?;
        Ok(rows)
    }

    async fn connection(&self) -> Result<MutexGuard<'_, Option<Client>>> {
        let mut slot = self.connection.lock().await;
        if slot.as_ref().is_none_or(Client::is_closed) {
            *slot = Some(self.open().await?);
        }
        Ok(slot)
    }

    async fn open(&self) -> Result<Client> {
        let tls = connector(&self.target)?;
        let connecting = self.target.pg.connect(tls);
        let (client, connection) = tokio::time::timeout(Duration::from_secs(10), connecting)
            .await
            .map_err(|_| Error::new(ErrorKind::Timeout, "connecting took longer than 10 s"))?
            .map_err(Error::from_connecting)?;
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!(error = %Error::from_driver(e, false), "the admin connection ended");
            }
        });
        Ok(client)
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("address", &self.target.describe())
            .field("schema", &self.schema)
            .finish()
    }
}

type Param<'a> = (&'a (dyn ToSql + Sync), Type);

fn column<T: FromSqlOwned>(row: &Row, index: impl RowIndex + fmt::Display) -> Result<T> {
    row.try_get(index).map_err(|e| Error::from_driver(e, false))
}
