//! Migrations: each in one transaction with what it is checked against, under a transaction-level lock, so that
//! several processes may start at once. A pooler that lends connections by the transaction is refused: whatever fails
//! there fails on a connection that others use.

use std::time::Duration;

use futures_util::FutureExt;

use super::Admin;
use crate::connect::{connector, open_another};
use crate::error::{Error, ErrorKind, Result};
use crate::scope::{Between, SCHEMA_VERSION, look_between};

/// The migrations, in their order; `schema.sql` is their sum.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [include_str!("../../migrations/V1__initial.sql")];

/// What [`Admin::migrate`] found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// The version that was there; `None` if none was.
    pub from: Option<u32>,
    /// The version that is there now.
    pub to: u32,
}

impl Admin {
    /// Installs the schema, or brings an older version up to date. Over the current version, or the next one (of a
    /// newer release, which this one works with), it does nothing.
    ///
    /// Several processes may call it at the same time: one works, the others wait for it.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let migration = admin.migrate().await?;
    /// println!("version {}", migration.to);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch) if tables of another origin are in the way, or the version
    /// is newer than this release knows; otherwise what the database refused (say, a right that the role lacks), with
    /// its own words as the source. [`IsolationNotEnforced`](crate::ErrorKind::IsolationNotEnforced) through a pooler in
    /// transaction mode: connect to the server itself, or to a pool in session mode. Nothing is left half done.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it rolls back, or finishes the migration that it was in.
    pub async fn migrate(&self) -> Result<Migration> {
        // A connection of its own: the search_path that the migration is found by must not linger.
        let mut client = self.open().await?;
        let (pg, tls) = (self.target.pg.clone(), connector(&self.target)?);
        let another =
            move |option| open_another(pg.clone(), tls.clone(), Duration::from_secs(10), option).boxed();
        if look_between(&client, &another).await? == Between::Lending {
            return Err(Error::new(
                ErrorKind::IsolationNotEnforced,
                "a pooler lends this connection to others between transactions: connect to the server itself to migrate",
            ));
        }
        let transaction = client.transaction().await.map_err(failed)?;
        transaction
            .batch_execute(&format!(
                "SET LOCAL search_path = {0}; \
                 SELECT pg_advisory_xact_lock(hashtext('lastprice/install'), hashtext(current_schema()))",
                self.schema
            ))
            .await
            .map_err(failed)?;
        let from = self.installed(&transaction).await?;
        if let Some(version) = from
            && !(1..=SCHEMA_VERSION + 1).contains(&version)
        {
            return Err(Error::new(
                ErrorKind::SchemaMismatch,
                format!("schema {} has version {version}, which this release does not know", self.schema),
            ));
        }
        let missing = usize::try_from(from.unwrap_or(0)).unwrap_or(0).min(MIGRATIONS.len());
        for migration in &MIGRATIONS[missing..] {
            transaction.batch_execute(migration).await.map_err(|e| {
                let reason = e.as_db_error().map(|db| {
                    // Our own words, and PostgreSQL's on rights: no row of anybody is in a schema change.
                    [Some(db.message()), db.hint()].into_iter().flatten().collect::<Vec<_>>().join(". ")
                });
                let message = match reason {
                    Some(reason) => format!("the schema cannot be installed: {reason}"),
                    None => "the schema cannot be installed".to_owned(),
                };
                Error::new(ErrorKind::SchemaMismatch, message).with_source(failed(e))
            })?;
        }
        transaction.commit().await.map_err(|e| Error::from_driver(e, true))?;
        let version = |v: i32| u32::try_from(v).unwrap_or(0);
        Ok(Migration { from: from.map(version), to: version(from.unwrap_or(0).max(SCHEMA_VERSION)) })
    }

    async fn installed(&self, transaction: &tokio_postgres::Transaction<'_>) -> Result<Option<i32>> {
        let row = transaction.query_one(FOUND, &[]).await.map_err(failed)?;
        let (schema, ours, strange): (Option<String>, bool, Option<String>) =
            (row.get(0), row.get(1), row.get(2));
        if schema.is_none() {
            return Err(Error::new(
                ErrorKind::SchemaMismatch,
                format!("there is no schema {0}: CREATE SCHEMA {0}", self.schema),
            ));
        }
        if ours {
            let sql = format!("SELECT {}.lastprice_schema_version()", self.schema);
            let row = transaction.query_one(&sql, &[]).await.map_err(failed)?;
            return Ok(Some(row.get(0)));
        }
        match strange {
            None => Ok(None),
            Some(tables) => Err(Error::new(
                ErrorKind::SchemaMismatch,
                format!(
                    "schema {} holds tables of another origin by our names: {tables}; install into a schema of its own, or \
                     move those away first",
                    self.schema
                ),
            )),
        }
    }
}

/// The same question as `schema.sql` asks: is it ours, or is something in the way?
const FOUND: &str = "
    SELECT current_schema()::text,
           to_regprocedure(quote_ident(current_schema()) || '.lastprice_schema_version()') IS NOT NULL,
           (SELECT string_agg(c.relname, ', ' ORDER BY c.relname) FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = current_schema() AND c.relname IN
              ('tenants', 'experiments', 'assignments', 'views', 'conversions', 'usage', 'recommendations',
               'experiment_metrics'))";

fn failed(e: tokio_postgres::Error) -> Error {
    Error::from_driver(e, false)
}
