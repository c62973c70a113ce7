//! From a driver's error to one of ours.

use std::fmt;

use tokio_postgres::error::SqlState;

use super::{Error, ErrorKind};

impl Error {
    /// The only place that turns a driver's error into one of ours. `sent_commit`: a commit travelled with
    /// the statement, so a broken connection leaves the outcome open.
    pub(crate) fn from_driver(error: tokio_postgres::Error, sent_commit: bool) -> Self {
        let Some(db) = error.as_db_error() else {
            return Self::from_broken_connection(error, sent_commit);
        };
        let code = db.code().clone();
        if sent_commit && ["08", "57P"].iter().any(|c| code.code().starts_with(c)) {
            let mut e = Error::new(
                ErrorKind::OutcomeUnknown,
                "the connection broke after the commit was sent: the work is either done or not",
            );
            e.0.sqlstate = Some(code);
            return e.with_source(ServerError::from(db));
        }
        let (kind, message, retryable) = classify(&code);
        let mut e = Error::new(kind, message);
        e.0.retryable = retryable;
        e.0.sqlstate = Some(code);
        e.with_source(ServerError::from(db))
    }

    /// The same for opening a connection: nothing of the caller's was sent yet.
    pub(crate) fn from_connecting(error: tokio_postgres::Error) -> Self {
        if error.as_db_error().is_some() {
            return Self::from_driver(error, false);
        }
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        if error.to_string().starts_with("invalid configuration") {
            return Error::invalid("url", format_args!("does not do for this server: {cause}"));
        }
        let io = std::error::Error::source(&error).and_then(|s| s.downcast_ref::<std::io::Error>());
        let failed = match io.map(std::io::Error::kind) {
            Some(std::io::ErrorKind::TimedOut) => {
                Error::new(ErrorKind::Timeout, "connecting took longer than `connect_timeout`")
            }
            _ => Error::new(ErrorKind::Unavailable, "the database cannot be reached"),
        };
        failed.with_source(ConnectionFault(cause))
    }

    fn from_broken_connection(error: tokio_postgres::Error, sent_commit: bool) -> Self {
        let io = std::error::Error::source(&error)
            .and_then(|s| s.downcast_ref::<std::io::Error>())
            .map(std::io::Error::kind);
        if error.is_closed() || io.is_some() {
            let cause = ConnectionFault(
                std::error::Error::source(&error).map_or("closed".to_owned(), ToString::to_string),
            );
            let broken = if sent_commit {
                Error::new(
                    ErrorKind::OutcomeUnknown,
                    "the connection broke after the commit was sent: the work is either done or not",
                )
            } else {
                Error::new(ErrorKind::Unavailable, "the connection to the database broke")
            };
            return broken.with_source(cause);
        }
        // What is left are encoding and decoding errors, whose text may hold a value: keep their kind only.
        Error::internal(format!("the driver failed: {}", DriverFault::of(&error)))
    }
}

/// SQLSTATE to what a caller does about it.
fn classify(code: &SqlState) -> (ErrorKind, &'static str, bool) {
    use ErrorKind as K;
    match code.code() {
        "40001" | "40P01" => (K::Unavailable, "the database asked to try the transaction again", true),
        "55P03" => (K::Timeout, "a lock was not granted in time", true),
        "57014" => (K::Timeout, "the statement was cancelled, usually by its time limit", false),
        "25P02" => (K::Closed, "an earlier statement of this transaction failed", false),
        "55000" => (K::Unavailable, "it has to be filled first: refresh_experiment_metrics()", false),
        "25006" => (K::Unavailable, "the server is read-only (a standby?)", false),
        "42501" => (
            K::IsolationNotEnforced,
            "the login role lacks a right: a client's role is a member of `lastprice_app`, an admin's owns the tables",
            false,
        ),
        "3F000" | "42P01" | "42703" | "42883" | "42704" => (
            K::SchemaMismatch,
            "the database lacks a part of the `lastprice` schema: run the migrations",
            false,
        ),
        // Names of statements are ours alone, unless somebody lends our connection to others.
        "26000" | "42P05" => (
            K::IsolationNotEnforced,
            "a pooler mixes up the named statements of its clients: set `statement_mode(StatementMode::Typed)`",
            false,
        ),
        "23514" => (K::InvalidInput, "a value breaks a rule of the table", false),
        c if c.starts_with("22") => (K::InvalidInput, "a value cannot be stored", false),
        "23505" => (K::Conflict, "a row with the same key is there already", false),
        c if c.starts_with("23") => {
            (K::Conflict, "the database refused the row: a constraint does not hold", false)
        }
        c if c.starts_with("28") => (K::Unavailable, "the database refused the login", false),
        "3D000" => (K::Unavailable, "the database does not exist", false),
        c if c.starts_with("08") || c.starts_with("53") || c.starts_with("57P") => {
            (K::Unavailable, "the database does not accept work now", true)
        }
        _ => (K::Internal, "the database refused the statement", false),
    }
}

/// What may be shown of a server's error: never its detail, and its message only where no value can be in it.
#[derive(Debug, thiserror::Error)]
struct ServerError {
    code: String,
    message: Option<String>,
    constraint: Option<String>,
    table: Option<String>,
    column: Option<String>,
}

impl From<&tokio_postgres::error::DbError> for ServerError {
    fn from(db: &tokio_postgres::error::DbError) -> Self {
        let code = db.code().code();
        // Data exceptions (22), integrity (23), PL/pgSQL messages (P0) and syntax errors quote what they were given.
        let may_quote = ["22", "23", "P0", "42601", "XX"].iter().any(|class| code.starts_with(class));
        ServerError {
            code: code.to_owned(),
            message: (!may_quote).then(|| db.message().to_owned()),
            constraint: db.constraint().map(str::to_owned),
            table: db.table().map(str::to_owned),
            column: db.column().map(str::to_owned),
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SQLSTATE {}", self.code)?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        for (what, name) in
            [("constraint", &self.constraint), ("table", &self.table), ("column", &self.column)]
        {
            if let Some(name) = name {
                write!(f, ", {what} `{name}`")?;
            }
        }
        Ok(())
    }
}

/// Why there is no connection: an I/O or TLS error, which knows no row and no password.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct ConnectionFault(String);

struct DriverFault;

impl DriverFault {
    fn of(error: &tokio_postgres::Error) -> &'static str {
        let text = error.to_string();
        [
            "serializing parameter",
            "deserializing column",
            "TLS",
            "authentication",
            "configuration",
            "connecting",
        ]
        .into_iter()
        .find(|what| text.contains(what))
        .unwrap_or("an unexpected message")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_codes() {
        let kind = |c: &str| classify(&SqlState::from_code(c)).0;
        assert_eq!(kind("40P01"), ErrorKind::Unavailable);
        assert_eq!(kind("57014"), ErrorKind::Timeout);
        assert_eq!(kind("57P01"), ErrorKind::Unavailable);
        assert_eq!(kind("42P01"), ErrorKind::SchemaMismatch);
        assert_eq!(kind("23503"), ErrorKind::Conflict);
        assert_eq!(kind("23514"), ErrorKind::InvalidInput);
        assert_eq!(kind("22008"), ErrorKind::InvalidInput);
        assert_eq!(kind("26000"), ErrorKind::IsolationNotEnforced);
        assert_eq!(kind("42P05"), ErrorKind::IsolationNotEnforced);
        assert_eq!(kind("99999"), ErrorKind::Internal);
    }
}
