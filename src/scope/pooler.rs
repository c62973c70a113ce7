//! Who stands between us and the server, and whether it lends our connection to others.
//!
//! A server that starts a process for a connection obeys the options that the connection was opened with; a pooler does not
//! pass them on. So one connection more, with an option that nobody can guess, tells a server from a pooler in one round
//! trip. Only behind a pooler it takes more: whose process answers, asked of two connections in turn.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{BoxFuture, Either, select};
use tokio_postgres::{Client, SimpleQueryMessage};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};

/// Opens one more connection, with an option if the server would obey it; `None` if that takes too long.
pub(crate) type Another =
    dyn Fn(Option<String>) -> BoxFuture<'static, Option<Result<Client, tokio_postgres::Error>>> + Send + Sync;

/// What stands between us and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Between {
    /// Nothing that could be noticed, or a pooler that gives each client a connection for as long as it stays.
    Nothing,
    /// A pooler that lends connections, by the transaction or by the statement.
    Lending,
}

/// Statements may be named, unless a pooler passes the names of several clients through to one connection.
pub(super) async fn allow_names(first: &Client, another: &Another) -> Result<()> {
    if look_between(first, another).await? == Between::Nothing || renames(first).await? {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::IsolationNotEnforced,
        "a pooler seems to lend this connection to others, and with it the names of prepared statements, by which one client could \
         run another's: set `statement_mode(StatementMode::Typed)`, which is right behind every pooler",
    ))
}

/// Whether the connection is lent to others. What cannot be found out, because the server has no connection left for the
/// question, is taken for nothing.
pub(crate) async fn look_between(first: &Client, another: &Another) -> Result<Between> {
    let tag = Uuid::new_v4().simple().to_string();
    match another(Some(format!("-c {TAG}={tag}"))).await {
        Some(Ok(second)) => compare(first, &second, &tag).await,
        // PgBouncer's words for an option that it does not know are a violation of the protocol.
        Some(Err(e)) if e.code().is_some_and(|code| code.code().starts_with("08")) => {
            match another(None).await {
                Some(Ok(second)) => compare(first, &second, &tag).await,
                Some(Err(e)) => Err(Error::from_connecting(e)),
                None => Err(Error::new(ErrorKind::Timeout, "connecting took longer than `connect_timeout`")),
            }
        }
        Some(Err(_)) | None => Ok(Between::Nothing),
    }
}

/// Asks both in turn who answers, unless the second one has its tag: then at once. One that is lent is answered by several, or by those that answer the other as well.
///
/// When both got the same process by chance again and again, behind a pooler under load, this errs; with two processes
/// about once in half a million, with more of them less.
async fn compare(first: &Client, second: &Client, tag: &str) -> Result<Between> {
    let ((ours, ours_tag), (theirs, theirs_tag)) = {
        // In a pool that has a single connection for each of its clients the second one waits for the first to hang up.
        let mut asked = pin!(identity(second));
        match select(&mut asked, pin!(identity(first))).await {
            Either::Left((theirs, ours)) => (ours.await?, theirs?),
            Either::Right((ours, waiting)) => match tokio::time::timeout(A_WHILE, waiting).await {
                Ok(theirs) => (ours?, theirs?),
                // Asked before us, and still waiting: what we have is not lent to it.
                Err(_) => return stays(first, ours?.0).await,
            },
        }
    };
    if ours == theirs {
        return Ok(Between::Lending);
    }
    if theirs_tag == tag && ours_tag != tag {
        return Ok(Between::Nothing); // started for us, by the server itself
    }
    for turn in 1..=TURNS {
        // First, second, second, first: a pooler that goes round would give each its own for ever, otherwise.
        for of_second in [turn % 2 == 0, turn % 2 == 1] {
            let (client, expected) = if of_second { (second, &theirs) } else { (first, &ours) };
            if identity(client).await?.0 != *expected {
                return Ok(Between::Lending);
            }
        }
    }
    Ok(Between::Nothing)
}

/// Whether the same process answers every time.
async fn stays(client: &Client, process: String) -> Result<Between> {
    for _ in 0..2 * TURNS {
        if identity(client).await?.0 != process {
            return Ok(Between::Lending);
        }
    }
    Ok(Between::Nothing)
}

/// The process that answers, and the option that it was started with.
async fn identity(client: &Client) -> Result<(String, String)> {
    let rows = simple(client, WHO_ANSWERS).await?;
    let row = rows.into_iter().next().ok_or_else(|| Error::internal("nobody answers"))?;
    let [process, tag] = row;
    Ok((process, tag))
}

/// Whether the pooler knows named statements, and gives them names of its own. Within one transaction, which is one connection.
async fn renames(client: &Client) -> Result<bool> {
    let failed = |e| Error::from_driver(e, false);
    let tag = Uuid::new_v4().simple();
    client.batch_execute("BEGIN").await.map_err(explain_no_transaction)?;
    // It fails where another client's statement has the name.
    let prepared = client.prepare_typed(&format!("SELECT 1 AS t{tag}"), &[]).await;
    let named = match &prepared {
        Ok(_) => simple(client, &format!("{NAMES} AND statement = 'SELECT 1 AS t{tag}'")).await,
        Err(_) => Ok(Vec::new()),
    };
    drop(prepared);
    client.batch_execute("ROLLBACK").await.map_err(failed)?;
    let is_drivers =
        |name: &str| name.strip_prefix('s').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    Ok(named?.first().is_some_and(|[name, _]| !is_drivers(name)))
}

/// What a pooler in statement mode says to a BEGIN, in our words.
pub(super) fn explain_no_transaction(error: tokio_postgres::Error) -> Error {
    let by_pooler = error.code().is_some_and(|code| code.code().starts_with("08"));
    let error = Error::from_driver(error, false);
    if !by_pooler {
        return error;
    }
    Error::new(
        ErrorKind::IsolationNotEnforced,
        "a pooler between here and the server keeps no transaction (statement mode): use transaction or session mode",
    )
    .with_source(error)
}

/// Two columns of each row.
async fn simple(client: &Client, sql: &str) -> Result<Vec<[String; 2]>> {
    let messages = client.simple_query(sql).await.map_err(|e| Error::from_driver(e, false))?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some([0, 1].map(|n| row.try_get(n).ok().flatten().unwrap_or_default().to_owned()))
        }
        _ => None,
    });
    Ok(rows.collect())
}

/// How often both are asked.
const TURNS: usize = 10;

/// Longer than a pooler takes to answer whom it does not make wait.
const A_WHILE: Duration = Duration::from_secs(1);

const TAG: &str = "lastprice.probe";

const WHO_ANSWERS: &str =
    "SELECT pg_catalog.pg_backend_pid(), pg_catalog.current_setting('lastprice.probe', true)";

const NAMES: &str = "SELECT name, '' FROM pg_catalog.pg_prepared_statements WHERE true";
