//! A server as in production, tenants with assigned users, and the views that they make.

use std::sync::atomic::{AtomicU64, Ordering};

use lastprice::TenantId;
use lastprice::chrono::{DateTime, SubsecRound as _, Utc};
use lastprice::serde_json::{Value, json};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::Failure;

pub(crate) const EXPERIMENTS: usize = 50;
pub(crate) const TENANTS: usize = 100;
/// Assigned in each experiment of the one tenant that has many.
const USERS: usize = 2000;
/// Assigned in the one experiment of each of the others.
const USERS_OF_EACH: usize = 200;
const VARIANTS: [&str; 2] = ["19", "29"];

/// Who sees prices.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    OneTenant,
    OneExperiment,
    /// One after the other, as they come in.
    ManyTenants,
}

/// What is to be written, in no client's types yet.
#[derive(Clone)]
pub(crate) struct Event {
    pub(crate) tenant: TenantId,
    pub(crate) experiment: Uuid,
    pub(crate) user: String,
    pub(crate) variant: &'static str,
    pub(crate) id: Uuid,
    pub(crate) at: DateTime<Utc>,
    pub(crate) metadata: Value,
}

pub(crate) struct World {
    _cluster: PrivateCluster,
    pub(crate) database: TestDatabase,
    admin: Client,
    one: (TenantId, Vec<Uuid>),
    many: Vec<(TenantId, Uuid)>,
    next: AtomicU64,
}

impl World {
    pub(crate) async fn new() -> Result<Self, Failure> {
        let cluster = PrivateCluster::builder()
            .tcp()
            .setting("fsync", "on")
            .setting("full_page_writes", "on")
            // What they do falls on whoever is at his turn; `settle` does it between turns.
            .setting("autovacuum", "off")
            .setting("checkpoint_timeout", "1h")
            .setting("max_wal_size", "8GB")
            .start()
            .await?;
        let database = cluster.database().await?;
        let admin = database.connect_superuser().await?;
        let tenant = || TenantId::new();
        let one = (tenant(), (0..EXPERIMENTS).map(|_| Uuid::now_v7()).collect::<Vec<_>>());
        let many: Vec<_> = (0..TENANTS).map(|_| (tenant(), Uuid::now_v7())).collect();
        let all = one.1.iter().map(|id| (one.0, *id, USERS));
        for (tenant, _) in &many {
            admin.execute(TENANT, &[&tenant.uuid()]).await?;
            // As many as in an installation: a handful would be read as a whole for each check of a foreign key.
            admin.execute(IDLE_EXPERIMENTS, &[&tenant.uuid(), &(EXPERIMENTS as i32 - 1)]).await?;
        }
        for (tenant, experiment, users) in all.chain(many.iter().map(|(t, e)| (*t, *e, USERS_OF_EACH))) {
            let (tenant, users) = (tenant.uuid(), users as i32);
            admin.execute(TENANT, &[&tenant]).await?;
            admin.execute(EXPERIMENT, &[&tenant, &experiment]).await?;
            admin.execute(ASSIGNMENTS, &[&tenant, &experiment, &users]).await?;
        }
        admin.batch_execute("SELECT refresh_experiment_metrics()").await?;
        admin.batch_execute("VACUUM ANALYZE").await?;
        Ok(World { _cluster: cluster, database, admin, one, many, next: AtomicU64::new(0) })
    }

    pub(crate) async fn describe(&self) -> Result<String, Failure> {
        let sql = "SELECT current_setting('server_version'), current_setting('fsync')";
        let row = self.admin.query_one(sql, &[]).await?;
        let (version, fsync): (&str, &str) = (row.get(0), row.get(1));
        let cores = std::thread::available_parallelism()?;
        let mut text = format!("PostgreSQL {version} (fsync {fsync}) on the same machine, {cores} cores");
        for name in ["tokio-postgres", "sqlx", "diesel-async"] {
            text += &format!(", {name} {}", locked_version(name).unwrap_or("?"));
        }
        Ok(text)
    }

    pub(crate) fn events(&self, shape: Shape, count: usize) -> Vec<Event> {
        let event = |i| {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let (tenant, experiment, users) = match shape {
                Shape::OneTenant => (self.one.0, self.one.1[i % EXPERIMENTS], USERS),
                Shape::OneExperiment => (self.one.0, self.one.1[0], USERS),
                Shape::ManyTenants => {
                    let (tenant, experiment) = self.many[i % TENANTS];
                    (tenant, experiment, USERS_OF_EACH)
                }
            };
            let user = mixed(n) as usize % users;
            Event {
                tenant,
                experiment,
                user: format!("user-{user}"),
                variant: VARIANTS[user % 2],
                id: Uuid::now_v7(),
                at: Utc::now().trunc_subsecs(6),
                metadata: json!({"page": "/pricing"}),
            }
        };
        (0..count).map(event).collect()
    }

    /// Fails unless so many views arrived, and were counted; then makes room for the next turn.
    pub(crate) async fn settle(&self, sent: usize, triggers: bool) -> Result<(), Failure> {
        let row = self.admin.query_one(ARRIVED, &[]).await?;
        let (views, counted): (i64, i64) = (row.get(0), row.get(1));
        let expected = [sent, if triggers { sent } else { 0 }];
        if [views as usize, counted as usize] != expected {
            return Err(format!("{views} views and {counted} counted, of {sent} sent").into());
        }
        Ok(self.admin.batch_execute("TRUNCATE views, metric_deltas, metric_totals").await?)
    }

    pub(crate) async fn checkpoint(&self) -> Result<(), Failure> {
        Ok(self.admin.batch_execute("CHECKPOINT").await?)
    }

    pub(crate) async fn set_triggers(&self, on: bool) -> Result<(), Failure> {
        let how = if on { "ENABLE" } else { "DISABLE" };
        Ok(self.admin.batch_execute(&format!("ALTER TABLE views {how} TRIGGER metrics_added")).await?)
    }

    /// The processes of all who are connected, but for us.
    pub(crate) async fn backends(&self) -> Result<Vec<i32>, Failure> {
        let rows = self.admin.query(BACKENDS, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

const TENANT: &str = "
    INSERT INTO tenants (id, name, email) VALUES ($1, 'T', $1::uuid || '@example.com') ON CONFLICT DO NOTHING";
const EXPERIMENT: &str = r#"
    INSERT INTO experiments (tenant_id, id, key, name, status, variants, start_date)
    VALUES ($1, $2, 'key-' || $2::uuid, 'Price of the Pro plan', 'active',
            '[{"name": "19", "weight": 1, "price": "19.00"}, {"name": "29", "weight": 1, "price": "29.00"}]', now())"#;
const IDLE_EXPERIMENTS: &str = r#"
    INSERT INTO experiments (tenant_id, key, name, status, variants, start_date)
    SELECT $1, 'key-' || n, 'Price of the Pro plan', 'active',
           '[{"name": "19", "weight": 1, "price": "19.00"}, {"name": "29", "weight": 1, "price": "29.00"}]', now()
    FROM generate_series(1, $2) n"#;
const ASSIGNMENTS: &str = "
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency)
    SELECT $1, $2, 'user-' || n, CASE n % 2 WHEN 0 THEN '19' ELSE '29' END, 19, 'USD' FROM generate_series(0, $3 - 1) n";
const ARRIVED: &str = "
    SELECT (SELECT count(*) FROM views), (SELECT COALESCE(sum(views), 0)::bigint FROM (
      SELECT views FROM metric_deltas UNION ALL SELECT views FROM metric_totals) live)";
const BACKENDS: &str = "
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";

/// A number that follows from another one, in no order.
fn mixed(n: u64) -> u64 {
    let z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn locked_version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = include_str!("../peers/Cargo.lock").split_once(&package)?;
    Some(rest.split_once('"')?.0)
}
