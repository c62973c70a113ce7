//! Does what is between us and the server keep a transaction together?

use tokio_postgres::Client;

use super::{Hazard, IsolationFinding};
use crate::error::{Error, Result};

/// A transaction in messages of their own, as scopes send it: bound inside, on one server connection, and unbound after it.
pub(super) async fn probe(connection: &Client) -> Result<Option<IsolationFinding>> {
    let begun = connection
        .batch_execute("BEGIN; SET LOCAL app.tenant_id = '00000000-0000-4000-8000-000000000000'")
        .await;
    // A pooler that refuses transactions says so in an error of its own; a network that breaks says nothing.
    if let Err(error) = begun {
        return if error.as_db_error().is_some() {
            Ok(Some(lost()))
        } else {
            Err(Error::from_driver(error, false))
        };
    }
    let ask = async || connection.query_typed_one(BOUND, &[]).await;
    let seen = async {
        let (first, second) = (ask().await?, ask().await?);
        connection.batch_execute("COMMIT").await?;
        let after = ask().await?;
        let bound = |row: &tokio_postgres::Row| row.try_get::<_, bool>(0);
        let server = |row: &tokio_postgres::Row| row.try_get::<_, i32>(1);
        Ok(bound(&first)? && bound(&second)? && !bound(&after)? && server(&first)? == server(&second)?)
    };
    match seen.await {
        Ok(true) => Ok(None),
        Ok(false) => Ok(Some(lost())),
        Err::<_, tokio_postgres::Error>(error) if error.as_db_error().is_some() => Ok(Some(lost())),
        Err(error) => Err(Error::from_driver(error, false)),
    }
}

fn lost() -> IsolationFinding {
    let fix = "-- no SQL: let the pooler keep transactions together (PgBouncer: pool_mode = transaction)";
    IsolationFinding::new(Hazard::PoolerLosesTransaction, "the connection".to_owned(), fix.to_owned())
}

const BOUND: &str = "
    SELECT COALESCE(current_setting('app.tenant_id', true), '') = '00000000-0000-4000-8000-000000000000', pg_backend_pid()";
