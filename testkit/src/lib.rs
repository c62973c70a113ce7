#![doc = include_str!("../README.md")]

#[cfg(not(unix))]
compile_error!("lastprice-testkit runs PostgreSQL with Unix sockets and signals");

mod account;
mod binaries;
#[cfg(feature = "tls")]
mod certificates;
mod database;
mod error;
mod external;
mod host;
mod janitor;
mod postmaster;
mod private;
mod roles;
mod shared;
mod standby;
mod state;
mod supervisor;
mod template;
mod users;
pub mod webhook;

pub use binaries::Server;
pub use database::{TestDatabase, TestDatabaseBuilder};
pub use error::Error;
pub use private::{PrivateCluster, PrivateClusterBuilder};
pub use users::users_of_variant;
