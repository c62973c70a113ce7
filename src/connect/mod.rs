//! Where the database is, and how a connection to it is made.

mod again;
mod config;
mod listen;
mod tls;

pub(crate) use again::open_another;
pub use config::SslMode;
pub(crate) use config::Target;
pub(crate) use listen::Line;
pub(crate) use tls::connector;
