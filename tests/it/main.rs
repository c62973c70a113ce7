//! One integration binary; each test has a database of its own.

mod assignments;
mod backup;
mod bad_input;
mod events;
mod experiments;
mod host;
mod metrics_api;
mod metrics_exact;
mod metrics_exact_writers;
mod plans;
mod schema_install;
mod schema_install_roles;
mod schema_isolation;
mod schema_original;
mod schema_rules;
mod schema_rules_guards;
mod scope_cancel;
mod scope_rules;
mod scope_send;
mod scope_storm;
mod scope_wire;
mod support;
mod support_repo;
mod support_sql;
mod tenants;
mod wire;
