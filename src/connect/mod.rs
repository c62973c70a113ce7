//! Where the database is, and how a connection to it is made.

mod config;
mod listen;
mod tls;

pub use config::SslMode;
pub(crate) use config::Target;
pub(crate) use listen::Line;
pub(crate) use tls::connector;
