//! Skeleton; the tour follows.

mod admin;
pub mod bucketing;
mod client;
mod error;
mod id;
mod money;
mod repo;
mod scope;

#[cfg(feature = "migrate")]
pub use admin::Migration;
pub use admin::{Admin, AdminTenants};
pub use client::{Client, ClientBuilder, PoolStatus, SslMode};
pub use error::{Error, ErrorKind, Result};
pub use id::{
    Actor, ConversionId, ExperimentId, IdempotencyKey, OrderId, RecommendationId, TenantId, UserId, ViewId,
};
pub use money::{Currency, Money};
pub use repo::*;
pub use scope::{StatementMode, TenantHandle, TenantScope, TenantTransaction};

/// The drivers whose types are in this crate's interface, in the versions that it was built with.
pub use {chrono, rust_decimal, serde_json, tokio_postgres, uuid};

/// The whole current schema, as `psql -f schema.sql` installs it: one statement, no psql commands.
pub const SCHEMA_SQL: &str = include_str!("../schema.sql");

/// For this crate's own tests: every statement it can send, with its parameter types.
#[doc(hidden)]
pub mod internals {
    /// Name, text with `{s}` for the schema, parameter types.
    pub fn statements() -> Vec<(&'static str, &'static str, &'static [tokio_postgres::types::Type])> {
        crate::repo::statements().map(|s| (s.name, s.sql, s.params)).collect()
    }
}
