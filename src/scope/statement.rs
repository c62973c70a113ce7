//! The SQL statements of the crate, as data: name, text, parameter types.

use std::collections::HashMap;

use tokio_postgres::types::Type;

use crate::error::{Error, Result};

/// One statement. Its text names tables as `{s}.table`, so that it runs whatever the search_path is.
#[derive(Debug)]
pub(crate) struct Statement {
    /// `repository.operation`, as an operator would look for it.
    pub(crate) name: &'static str,
    pub(crate) sql: &'static str,
    /// Declared, so that no statement costs a round trip to describe its parameters.
    pub(crate) params: &'static [Type],
    /// Whether a lost connection leaves open if it took effect.
    pub(crate) writes: bool,
    /// Whether a replica may answer it, as of a moment ago.
    pub(crate) may_be_stale: bool,
}

impl Statement {
    pub(crate) const fn read(name: &'static str, sql: &'static str, params: &'static [Type]) -> Self {
        Statement { name, sql, params, writes: false, may_be_stale: false }
    }

    /// A read whose answer may be some moments old: the same in a [replica](crate::ClientBuilder::replica), which cannot lock or write.
    pub(crate) const fn report(name: &'static str, sql: &'static str, params: &'static [Type]) -> Self {
        Statement { name, sql, params, writes: false, may_be_stale: true }
    }

    pub(crate) const fn write(name: &'static str, sql: &'static str, params: &'static [Type]) -> Self {
        Statement { name, sql, params, writes: true, may_be_stale: false }
    }
}

/// The texts of all statements for one schema. A statement that is not in it does not run, so the tests that
/// walk the catalog (plans, tenants) see every statement there is.
#[derive(Debug)]
pub(crate) struct Catalog {
    schema: String,
    texts: HashMap<&'static str, String>,
}

impl Catalog {
    pub(crate) fn new<'s>(schema: &str, statements: impl Iterator<Item = &'s Statement>) -> Self {
        let schema = quote_identifier(schema);
        let texts = statements.map(|s| (s.name, s.sql.replace("{s}", &schema))).collect();
        Catalog { schema, texts }
    }

    /// The schema, quoted.
    pub(crate) fn schema(&self) -> &str {
        &self.schema
    }

    pub(crate) fn text(&self, statement: &Statement) -> Result<&str> {
        self.texts
            .get(statement.name)
            .map(String::as_str)
            .ok_or_else(|| Error::internal(format!("statement `{}` is not in the catalog", statement.name)))
    }
}

fn quote_identifier(name: &str) -> String {
    postgres_protocol::escape::escape_identifier(name)
}
