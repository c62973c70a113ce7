mod driver;

use std::borrow::Cow;
use std::fmt;

use chrono::{DateTime, Utc};
use tokio_postgres::error::SqlState;

/// A `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller would *do* about an [`Error`].
///
/// | kind | what to do | HTTP |
/// |---|---|---|
/// | [`InvalidInput`](ErrorKind::InvalidInput) | correct the input that [`Error::field`] names | 422 |
/// | [`NotFound`](ErrorKind::NotFound) | the id is unknown to this tenant (another tenant's id looks the same) | 404 |
/// | [`Conflict`](ErrorKind::Conflict) | read the current state, decide again | 409 |
/// | [`QuoteMismatch`](ErrorKind::QuoteMismatch) | do not charge: look the quote up, show the price again | 409 |
/// | [`QuotaExceeded`](ErrorKind::QuotaExceeded) | wait for [`ExceededQuota::resets_at`], or raise the limit | 429 |
/// | [`RefundExceedsSale`](ErrorKind::RefundExceedsSale) | do not pay out: look at what went back already | 409 |
/// | [`BadSignature`](ErrorKind::BadSignature) | keep nothing of the webhook: it is not from whom it should be | 401 |
/// | [`Unavailable`](ErrorKind::Unavailable) | try again later | 503 |
/// | [`Timeout`](ErrorKind::Timeout) | try again later, or raise the limit | 504 |
/// | [`OutcomeUnknown`](ErrorKind::OutcomeUnknown) | send the same id or idempotency key again | 503 |
/// | [`SchemaMismatch`](ErrorKind::SchemaMismatch) | migrate the database | 500 |
/// | [`IsolationNotEnforced`](ErrorKind::IsolationNotEnforced) | log in as an ordinary role; set what the sentence says for a pooler | 500 |
/// | [`SecretUnavailable`](ErrorKind::SecretUnavailable) | look at the keys: one is missing, or the wrong one | 500 |
/// | [`Closed`](ErrorKind::Closed) | open a new scope or client | 500 |
/// | [`Internal`](ErrorKind::Internal) | report it | 500 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value that the caller gave breaks a rule; [`Error::field`] names it. Nothing was written.
    InvalidInput,
    /// The tenant has no such row. Another tenant's id cannot be told from an unknown one.
    NotFound,
    /// The database holds something that contradicts the request: a taken key, a changed revision, a
    /// transition that the current status does not allow, an idempotency key used with other content.
    Conflict,
    /// What is to be charged is not what was quoted; [`Error::conflicting_fields`] has the names of the rules. Nothing was
    /// written.
    QuoteMismatch,
    /// The tenant's limit leaves less than that; [`Error::exceeded_quota`] has the numbers. Nothing was written.
    QuotaExceeded,
    /// More would go back to the customer than is left of the sale. Nothing was written.
    RefundExceedsSale,
    /// A webhook's signature does not fit its body, its secret or its time.
    BadSignature,
    /// The database, or what keeps the keys, cannot be reached or does not accept work now; nothing was written.
    Unavailable,
    /// A time limit passed: waiting for a connection, connecting, or the statement itself; nothing was written.
    Timeout,
    /// The connection broke after a commit was sent: the work is either done or not. Repeating it with the
    /// same ids and idempotency keys is safe.
    OutcomeUnknown,
    /// The database has no `lastprice` schema, or one of a version that this crate does not work with.
    SchemaMismatch,
    /// The login role bypasses row-level security and [`require_app_role`] forbids that; or a pooler stands between, through
    /// which statements of several clients could be mixed up.
    ///
    /// [`require_app_role`]: crate::ClientBuilder::require_app_role
    IsolationNotEnforced,
    /// A stored secret cannot be read, or a new one not be encrypted: no key is configured, its key is not among those that
    /// are, or the stored text was made for another tenant or column. Nothing was written.
    SecretUnavailable,
    /// The client was closed, or an earlier statement of this scope failed and its transaction was rolled back.
    Closed,
    /// A bug in this crate or a database that was changed by hand.
    Internal,
}

impl ErrorKind {
    /// Its name in logs and metrics, in snake case.
    ///
    /// ```
    /// assert_eq!(lastprice::ErrorKind::OutcomeUnknown.as_str(), "outcome_unknown");
    /// ```
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::InvalidInput => "invalid_input",
            ErrorKind::NotFound => "not_found",
            ErrorKind::Conflict => "conflict",
            ErrorKind::QuoteMismatch => "quote_mismatch",
            ErrorKind::RefundExceedsSale => "refund_exceeds_sale",
            ErrorKind::QuotaExceeded => "quota_exceeded",
            ErrorKind::BadSignature => "bad_signature",
            ErrorKind::Unavailable => "unavailable",
            ErrorKind::Timeout => "timeout",
            ErrorKind::OutcomeUnknown => "outcome_unknown",
            ErrorKind::SchemaMismatch => "schema_mismatch",
            ErrorKind::IsolationNotEnforced => "isolation_not_enforced",
            ErrorKind::SecretUnavailable => "secret_unavailable",
            ErrorKind::Closed => "closed",
            ErrorKind::Internal => "internal",
        }
    }

    /// The HTTP status that a service would usually answer with.
    ///
    /// ```
    /// assert_eq!(lastprice::ErrorKind::Conflict.http_status(), 409);
    /// ```
    #[must_use]
    pub fn http_status(self) -> u16 {
        match self {
            ErrorKind::InvalidInput => 422,
            ErrorKind::BadSignature => 401,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::QuoteMismatch | ErrorKind::RefundExceedsSale => 409,
            ErrorKind::QuotaExceeded => 429,
            ErrorKind::Unavailable | ErrorKind::OutcomeUnknown => 503,
            ErrorKind::Timeout => 504,
            ErrorKind::SchemaMismatch
            | ErrorKind::IsolationNotEnforced
            | ErrorKind::SecretUnavailable
            | ErrorKind::Closed
            | ErrorKind::Internal => 500,
        }
    }
}

/// A limit that leaves too little, for [`ErrorKind::QuotaExceeded`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExceededQuota {
    /// What is limited.
    pub metric: String,
    /// How much was asked for.
    pub requested: u64,
    /// How much is allowed.
    pub limit: u64,
    /// How much is used.
    pub used: u64,
    /// When nothing is used again; `None` if that does not come by itself.
    pub resets_at: Option<DateTime<Utc>>,
}

/// The one error of this crate: opaque, one pointer wide.
///
/// [`kind`](Error::kind) says what to do about it. `Display` is one sentence; the cause is in
/// [`source`](std::error::Error::source). Neither holds a parameter, a row or a secret: of a server's error
/// they keep the code and the names of the constraint, table and column.
///
/// ```
/// let error = lastprice::UserId::new("").unwrap_err();
/// assert_eq!(error.kind(), lastprice::ErrorKind::InvalidInput);
/// assert_eq!(error.field(), Some("user_id"));
/// ```
pub struct Error(Box<Repr>);

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Repr {
    kind: ErrorKind,
    message: Cow<'static, str>,
    field: Option<&'static str>,
    fields: Vec<&'static str>,
    quota: Option<ExceededQuota>,
    retryable: bool,
    sqlstate: Option<SqlState>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// What a caller would do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The name of the input that broke a rule, for [`ErrorKind::InvalidInput`].
    #[must_use]
    pub fn field(&self) -> Option<&'static str> {
        self.0.field
    }

    /// The names of the fields whose stored content differs, for a [`ErrorKind::Conflict`] over an
    /// idempotency key; of the [rules](crate::LedgerRule) that do not hold, for an entry that was refused; of the
    /// [bounds](crate::PriceBounds) that are broken, or of what stands in the way, for a recommendation; empty otherwise.
    #[must_use]
    pub fn conflicting_fields(&self) -> &[&'static str] {
        &self.0.fields
    }

    /// The limit, how much of it is used and when it is free again, for [`ErrorKind::QuotaExceeded`].
    ///
    /// ```no_run
    /// # fn f(error: lastprice::Error) {
    /// if let Some(quota) = error.exceeded_quota() {
    ///     println!("{} of {} are used, until {:?}", quota.used, quota.limit, quota.resets_at);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn exceeded_quota(&self) -> Option<&ExceededQuota> {
        self.0.quota.as_ref()
    }

    /// The server's code, if the server reported the error.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.0.sqlstate.as_ref()
    }

    /// Whether the same work may be tried again as it is: it provably did not happen. In a transaction that is the
    /// whole transaction, from its beginning.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    /// Of a later statement of a call, whose earlier ones are committed.
    pub(crate) fn after_a_commit(self) -> Self {
        match self.kind() {
            ErrorKind::Unavailable | ErrorKind::Timeout => {
                Error::new(ErrorKind::OutcomeUnknown, "a part of the work is done, and it is not known which")
                    .with_source(self)
            }
            _ => self,
        }
    }

    /// The server chose this transaction to end a deadlock, and has rolled it back.
    pub(crate) fn is_deadlock(&self) -> bool {
        self.0.sqlstate.as_ref() == Some(&SqlState::T_R_DEADLOCK_DETECTED)
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        let retryable = matches!(kind, ErrorKind::Unavailable);
        Error(Box::new(Repr {
            kind,
            message: message.into(),
            field: None,
            fields: Vec::new(),
            quota: None,
            retryable,
            sqlstate: None,
            source: None,
        }))
    }

    pub(crate) fn invalid(field: &'static str, rule: impl fmt::Display) -> Self {
        let mut e = Error::new(ErrorKind::InvalidInput, format!("`{field}` {rule}"));
        e.0.field = Some(field);
        e
    }

    pub(crate) fn not_found(what: &str) -> Self {
        let message = match what {
            "tenant" => "there is no such tenant".to_owned(),
            _ => format!("this tenant has no such {what}"),
        };
        Error::new(ErrorKind::NotFound, message)
    }

    pub(crate) fn conflict(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(ErrorKind::Conflict, message)
    }

    pub(crate) fn quota_exceeded(quota: ExceededQuota) -> Self {
        let ExceededQuota { metric, requested, limit, used, resets_at } = &quota;
        let verbs = |n: u64| if n == 1 { ("was", "is") } else { ("were", "are") };
        let left = limit.saturating_sub(*used);
        let (was, is) = (verbs(*requested).0, verbs(left).1);
        let mut message = format!("{requested} of `{metric}` {was} asked for, {left} of {limit} {is} left");
        if let Some(resets_at) = resets_at {
            message.push_str(&resets_at.format(" until %Y-%m-%d %H:%M UTC").to_string());
        }
        let mut e = Error::new(ErrorKind::QuotaExceeded, message);
        e.0.quota = Some(quota);
        e
    }

    pub(crate) fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(ErrorKind::Internal, message)
    }

    pub(crate) fn with_fields(mut self, fields: Vec<&'static str>) -> Self {
        self.0.fields = fields;
        self
    }

    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut d = f.debug_struct("Error");
        d.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(field) = self.0.field {
            d.field("field", &field);
        }
        if !self.0.fields.is_empty() {
            d.field("conflicting_fields", &self.0.fields);
        }
        if let Some(quota) = &self.0.quota {
            d.field("exceeded_quota", quota);
        }
        if let Some(source) = &self.0.source {
            d.field("source", source);
        }
        d.finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
