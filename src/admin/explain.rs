//! The plans of our statements, for an operator.

use futures_util::future::join3;
use tokio_postgres::types::{Kind, Type};
use tokio_postgres::{SimpleQueryMessage, error::SqlState};

use super::Admin;
use crate::error::{Error, Result};
use crate::repo;
use crate::scope::Statement;

impl Admin {
    /// The names of all statements that a [`Client`](crate::Client) can send, sorted, as logs, spans and metrics have them.
    ///
    /// ```
    /// assert!(lastprice::Admin::statements().contains(&"views.record"));
    /// ```
    #[must_use]
    pub fn statements() -> Vec<&'static str> {
        let mut names: Vec<&str> = repo::statements().map(|statement| statement.name).collect();
        names.sort_unstable();
        names
    }

    /// The plan of one of our statements as the server makes it now, as the text of EXPLAIN: for the application role, whoever
    /// the tenant and whatever the parameters are, with the settings of a client in
    /// [`StatementMode::Prepared`](crate::StatementMode::Prepared). The statement is not run, and nothing is written.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// println!("{}", admin.explain("views.record").await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a `name` that is not among [`statements`](Admin::statements), and for an
    /// `owner_url` whose role cannot become `lastprice_app`;
    /// [`SchemaMismatch`](crate::ErrorKind::SchemaMismatch) if the schema is not installed; else those of the connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    pub async fn explain(&self, name: &str) -> Result<String> {
        let statement = repo::statements().find(|statement| statement.name == name);
        let statement = statement.ok_or_else(|| Error::invalid("name", NO_STATEMENT))?;
        let connection = self.connection().await?;
        let client = connection.as_ref().ok_or_else(|| Error::internal("the admin has no connection"))?;
        let (prepare, explain) = (prepare(statement, &self.schema), explain(statement));
        // All are sent at the first poll, so that a dropped call leaves nothing behind. A named statement outlives its
        // transaction; where it was not made, that there is none is no error.
        let (prepared, lines, _) =
            join3(client.batch_execute(&prepare), client.simple_query(&explain), client.batch_execute(TIDY))
                .await;
        prepared.map_err(|e| match e.code() {
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Error::invalid(
                "owner_url",
                "is of a role that cannot become `lastprice_app`: grant it that role",
            )
            .with_source(Error::from_driver(e, false)),
            _ => Error::from_driver(e, false),
        })?;
        let lines = lines.map_err(|e| Error::from_driver(e, false))?;
        let lines = lines.iter().filter_map(|line| match line {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }
}

const NO_STATEMENT: &str = "is no name of a statement (nor is a method's): `Admin::statements()` lists them, and the table \"Which call sends what\" in \
     docs/observability.md says which ones a call sends";

/// As a client would be when it plans: see `Session::begin`. The tenant is nobody, which a plan does not depend on.
fn prepare(statement: &Statement, schema: &str) -> String {
    let types: Vec<String> = statement.params.iter().map(type_name).collect();
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL statement_timeout = 10000; SET LOCAL jit = off; \
         SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off; SET LOCAL ROLE lastprice_app; \
         SET LOCAL app.tenant_id = '00000000-0000-0000-0000-000000000000'; \
         PREPARE lastprice_explained{} AS {}",
        in_parentheses(&types),
        statement.sql.replace("{s}", schema)
    )
}

fn explain(statement: &Statement) -> String {
    let nulls = vec!["NULL".to_owned(); statement.params.len()];
    format!("EXPLAIN EXECUTE lastprice_explained{}", in_parentheses(&nulls))
}

const TIDY: &str = "ROLLBACK; DEALLOCATE lastprice_explained";

fn type_name(of: &Type) -> String {
    match of.kind() {
        Kind::Array(of) => format!("pg_catalog.{}[]", of.name()),
        _ => format!("pg_catalog.{}", of.name()),
    }
}

/// An empty list has none.
fn in_parentheses(list: &[String]) -> String {
    if list.is_empty() { String::new() } else { format!("({})", list.join(", ")) }
}
