use std::fmt;

use serde::Serialize;

use super::Hazard;
use crate::error::{Error, ErrorKind, Result};

/// What [`Client::verify_isolation`](crate::Client::verify_isolation) found. `Display` is a table for people, `Serialize` the
/// same for programs; both name roles and objects of the database, and no row and no password.
///
/// ```no_run
/// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
/// let report = client.verify_isolation().await?;
/// println!("{report}");
/// report.into_result()
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct IsolationReport {
    /// The schema that was examined.
    pub schema: String,
    findings: Vec<IsolationFinding>,
}

/// One hazard of one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct IsolationFinding {
    /// What it is.
    pub hazard: Hazard,
    /// The role, table, policy, right or function concerned.
    pub object: String,
    /// What it means.
    pub meaning: &'static str,
    /// The SQL that mends it, for a superuser or the owner to read first; what begins with `--` cannot be mended by SQL.
    pub fix: String,
}

impl IsolationReport {
    pub(super) fn new(schema: &str, findings: Vec<IsolationFinding>) -> Self {
        IsolationReport { schema: schema.to_owned(), findings }
    }

    /// Everything that was found.
    #[must_use]
    pub fn findings(&self) -> &[IsolationFinding] {
        &self.findings
    }

    /// Nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// For a start-up that shall not go on otherwise.
    ///
    /// # Errors
    ///
    /// [`IsolationNotEnforced`](ErrorKind::IsolationNotEnforced), naming the hazards.
    pub fn into_result(self) -> Result<()> {
        if self.is_clean() {
            return Ok(());
        }
        let mut names: Vec<_> = self.findings.iter().map(|finding| finding.hazard.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let message = format!("tenants are not isolated in schema {}: {}", self.schema, names.join(", "));
        Err(Error::new(ErrorKind::IsolationNotEnforced, message))
    }
}

impl IsolationFinding {
    pub(super) fn new(hazard: Hazard, object: String, fix: String) -> Self {
        IsolationFinding { hazard, object, meaning: hazard.meaning(), fix }
    }
}

impl fmt::Display for IsolationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_clean() {
            return write!(f, "schema {}: tenants are isolated, nothing was found", self.schema);
        }
        write!(f, "schema {}: {} found", self.schema, self.findings.len())?;
        let width = self.findings.iter().map(|finding| finding.hazard.as_str().len()).max().unwrap_or(0);
        for IsolationFinding { hazard, object, meaning, fix } in &self.findings {
            write!(f, "\n  {hazard:width$}  {object}\n  {:width$}  {meaning}\n  {:width$}  {fix}", "", "")?;
        }
        Ok(())
    }
}
