//! All experiments of a tenant at once, for who keeps them in memory.

use std::time::Instant;

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Decider, Experiments, decider_columns};
use crate::error::Result;
use crate::repo::row::Fields;
use crate::scope::Statement;

/// What a tenant's assignments are made by, as of one moment.
pub(crate) struct Config {
    /// Another one after every change.
    pub(crate) version: u64,
    /// What a notification of a change of it says.
    pub(crate) token: String,
    pub(crate) deciders: Vec<Decider>,
}

impl Experiments<'_> {
    /// `None` if there is no such tenant.
    pub(crate) async fn config(self) -> Result<Option<Config>> {
        let rows = self.scope.query(&CONFIG, &[&self.tenant()]).await?;
        let Some(tenant) = rows.first() else { return Ok(None) };
        let mut deciders = Vec::with_capacity(rows.len());
        for row in rows.iter().filter(|row| matches!(row.field::<Option<&str>>("key"), Ok(Some(_)))) {
            match Decider::from_row(row) {
                Ok(decider) => deciders.push(decider),
                // One that was written past the rules must not take the others away.
                Err(error) => {
                    let id = row.field::<uuid::Uuid>("id").ok();
                    tracing::warn!(experiment = ?id, %error, "an experiment cannot be read, and is left out");
                }
            }
        }
        Ok(Some(Config { version: version(tenant)?, token: tenant.field("token")?, deciders }))
    }

    /// `None` if there is no such tenant.
    pub(crate) async fn config_version(self) -> Result<Option<u64>> {
        self.scope.query_opt(&VERSION, &[&self.tenant()]).await?.as_ref().map(version).transpose()
    }

    /// What it is for a replica, and as of when that is; `None` without one that is current enough.
    pub(crate) async fn replicated_version(self) -> Result<Option<(u64, Instant)>> {
        let Some(answer) = self.scope.ask_replica(&VERSION, &[&self.tenant()]).await? else {
            return Ok(None);
        };
        answer.rows.first().map(|row| Ok((version(row)?, answer.as_of))).transpose()
    }
}

fn version(row: &Row) -> Result<u64> {
    Ok(row.field::<i64>("version")?.cast_unsigned())
}

/// How to hear of changes. Every role of a database may, so what is heard says nothing by itself.
pub(crate) const LISTEN: &str = "LISTEN lastprice";
/// Sends what a listener is to hear, to know that it hears.
pub(crate) const PROBE: &str = "SELECT pg_catalog.pg_notify('lastprice', $1)";

pub(super) const STATEMENTS: &[&Statement] = &[&CONFIG, &VERSION];

/// What is the same only while holdout and experiments are: every change of an experiment raises its revision.
macro_rules! version {
    () => {
        "(SELECT hashtextextended(concat(t.holdout, string_agg(concat(',', v.id, ' ', v.revision), '' ORDER BY v.id)), 0)
          FROM {s}.experiments v WHERE v.tenant_id = $1)"
    };
}

// The version and the experiments in one statement, hence of one moment. The token is the one of the table's trigger.
static CONFIG: Statement = Statement::read(
    "experiments.config",
    concat!(
        "SELECT ",
        decider_columns!("e.variants, e.forced"),
        ", v.version, encode(sha256(convert_to('lastprice/' || t.salt, 'UTF8')), 'hex') AS token
         FROM {s}.tenants t CROSS JOIN LATERAL (SELECT ",
        version!(),
        " AS version) v LEFT JOIN {s}.experiments e ON e.tenant_id = $1
         WHERE t.id = $1"
    ),
    &[Type::UUID],
);

static VERSION: Statement = Statement::read(
    "experiments.config_version",
    concat!("SELECT ", version!(), " AS version FROM {s}.tenants t WHERE t.id = $1"),
    &[Type::UUID],
);
