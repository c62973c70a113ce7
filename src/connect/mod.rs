//! Where the database is, and how a connection to it is made.

mod config;
mod tls;

pub use config::SslMode;
pub(crate) use config::Target;
pub(crate) use tls::connector;
