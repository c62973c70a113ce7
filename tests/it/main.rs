//! One integration binary; each test has a database of its own.

mod host;
mod quick;
mod scope_cancel;
mod scope_rules;
mod scope_send;
mod scope_storm;
mod scope_wire;
mod support;
mod wire;
