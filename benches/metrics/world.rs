//! Databases with histories of different lengths, and what is new in them.

use std::time::Duration;

use lastprice::{Admin, Client, ExperimentId, TenantHandle, TenantId};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use uuid::Uuid;

use crate::{Failure, Size, timed};

/// A database in which so much has happened. Two experiments share its views: one grows with them, with a fifth as many users, of
/// whom a tenth bought; the other one has the same users and buyers in every database.
pub(crate) struct World {
    pub(crate) views: u64,
    pub(crate) admin: Admin,
    pub(crate) tenant: TenantHandle,
    pub(crate) grown: Arm,
    pub(crate) fixed: Arm,
    superuser: tokio_postgres::Client,
    _client: Client,
    _database: TestDatabase,
}

/// An experiment.
#[derive(Clone, Copy)]
pub(crate) struct Arm {
    pub(crate) id: ExperimentId,
    pub(crate) users: u64,
    pub(crate) buyers: u64,
}

impl Arm {
    fn with_users(users: u64) -> Self {
        Arm { id: ExperimentId::from(Uuid::now_v7()), users, buyers: users / 10 }
    }
}

pub(crate) async fn cluster() -> Result<PrivateCluster, Failure> {
    Ok(PrivateCluster::builder()
        .tcp()
        .setting("fsync", "on")
        .setting("full_page_writes", "on")
        .setting("shared_buffers", "512MB")
        // Done here, between turns; else it falls on whoever is at his turn.
        .setting("autovacuum", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "4GB")
        .start()
        .await?)
}

impl World {
    pub(crate) async fn new(cluster: &PrivateCluster, size: Size, views: u64) -> Result<Self, Failure> {
        let database = cluster.database().await?;
        let superuser = database.connect_superuser().await?;
        let tenant = TenantId::new();
        let (grown, fixed) = (Arm::with_users(views / 5), Arm::with_users(size.fixed_users));
        superuser.execute(TENANT, &[&tenant.uuid()]).await?;
        for arm in [grown, fixed] {
            superuser.execute(EXPERIMENT, &[&tenant.uuid(), &arm.id.uuid()]).await?;
        }
        // Without triggers, which count and check each row: the totals are counted from the rows at the end.
        superuser.batch_execute("SET session_replication_role = replica").await?;
        for arm in [grown, fixed] {
            let ids = (tenant.uuid(), arm.id.uuid());
            superuser.execute(ASSIGNMENTS, &[&ids.0, &ids.1, &(arm.users as i64)]).await?;
            superuser.execute(VIEWS, &[&ids.0, &ids.1, &(arm.users as i64), &(views as i64 / 2)]).await?;
            superuser.execute(SALES, &[&ids.0, &ids.1]).await?;
        }
        superuser.batch_execute("SET session_replication_role = origin").await?;
        superuser.batch_execute(RECOMPUTED).await?;
        superuser.batch_execute("VACUUM ANALYZE").await?;
        superuser.batch_execute("CHECKPOINT").await?;
        let admin = Admin::connect(&database.owner_url()).await?;
        admin.recount_metrics().await?;
        admin.refresh_metrics().await?;
        superuser.batch_execute("VACUUM ANALYZE").await?;
        let client = Client::builder().url(database.app_url()).pool_size(1).require_app_role().build()?;
        let tenant = client.tenant(tenant);
        Ok(World { views, admin, tenant, grown, fixed, superuser, _client: client, _database: database })
    }

    /// New views and sales, in statements of a thousand rows, as a recorder writes them, with all triggers.
    pub(crate) async fn happen(&self, events: u64) -> Result<(), Failure> {
        let (tenant, per_statement) = (self.tenant.tenant_id().uuid(), 1000.min(events / 10));
        for n in 0..10 {
            let arm = if n % 2 == 0 { self.grown } else { self.fixed };
            let sql = if n == 9 { NEW_SALES } else { NEW_VIEWS };
            let of: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
                [&tenant, &arm.id.uuid(), &(arm.users as i64), &(per_statement as i64)];
            self.superuser.execute(sql, &of).await?;
        }
        Ok(())
    }

    /// How long it takes to recompute everything.
    pub(crate) async fn recompute(&self) -> Result<Duration, Failure> {
        let (time, done) =
            timed(self.superuser.batch_execute("REFRESH MATERIALIZED VIEW CONCURRENTLY recomputed_metrics"))
                .await;
        Ok(done.map(|()| time)?)
    }

    /// Fails unless both views, and the live numbers, say the same. And makes room.
    pub(crate) async fn settle(&self) -> Result<(), Failure> {
        let different: i64 = self.superuser.query_one(DIFFERENT, &[]).await?.get(0);
        let mut live = 0;
        for arm in [self.grown, self.fixed] {
            live += self.tenant.metrics().experiment(arm.id).await?.views;
        }
        let counted: i64 = self.superuser.query_one("SELECT count(*) FROM views", &[]).await?.get(0);
        if different != 0 || live != counted as u64 {
            return Err(format!("{different} rows differ; {live} views live, of {counted}").into());
        }
        let clean =
            "VACUUM metric_deltas, metric_totals, experiment_metrics, recomputed_metrics, conversions";
        Ok(self.superuser.batch_execute(clean).await?)
    }

    pub(crate) async fn describe(&self) -> Result<String, Failure> {
        let row = self.superuser.query_one("SHOW server_version", &[]).await?;
        let cores = std::thread::available_parallelism()?;
        Ok(format!("PostgreSQL {} (fsync on) on the same machine, {cores} cores", row.get::<_, &str>(0)))
    }
}

const TENANT: &str = "INSERT INTO tenants (id, name, email) VALUES ($1, 'T', 't@example.com')";
const EXPERIMENT: &str = r#"
    INSERT INTO experiments (tenant_id, id, key, name, status, variants, start_date)
    VALUES ($1, $2, 'key-' || $2::uuid, 'Price of the Pro plan', 'active',
            '[{"name": "19", "weight": 1, "price": "19.00"}, {"name": "29", "weight": 1, "price": "29.00"}]',
            now() - interval '60 days')"#;
// Over 30 days that ended a month ago, so that the window of all is over. Ids in no order, as real ones are.
const ASSIGNMENTS: &str = "
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, assigned_at)
    SELECT $1, $2, md5(n::text), CASE n % 2 WHEN 0 THEN '19' ELSE '29' END, CASE n % 2 WHEN 0 THEN 19 ELSE 29 END, 'USD',
           now() - interval '60 days' + n * interval '30 days' / $3::bigint
    FROM generate_series(1, $3::bigint) n";
const VIEWS: &str = "
    INSERT INTO views (tenant_id, experiment_id, user_id, variant, occurred_at)
    SELECT $1, $2, md5((1 + n % $3::bigint)::text), CASE (1 + n % $3::bigint) % 2 WHEN 0 THEN '19' ELSE '29' END,
           now() - interval '60 days' + n * interval '60 days' / $4::bigint
    FROM generate_series(1, $4::bigint) n";
// A tenth bought, half of them more than once; a tenth of them had money back.
const SALES: &str = "
    INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, kind, revenue, currency, assigned_at, order_id,
                             quote_mismatch, occurred_at)
    SELECT tenant_id, experiment_id, user_id, variant, CASE k WHEN 3 THEN 'refund' ELSE 'sale' END,
           CASE k WHEN 3 THEN -round(price / 2, 2) ELSE price END, 'USD', assigned_at, user_id || k, CASE WHEN k < 3 THEN false END,
           assigned_at + k * interval '1 day'
    FROM (SELECT *, row_number() OVER (ORDER BY assigned_at) AS n FROM assignments
          WHERE tenant_id = $1 AND experiment_id = $2) a, generate_series(1, 3) k
    WHERE n % 10 = 0 AND (k = 1 OR k = 2 AND n % 20 = 0 OR k = 3 AND n % 100 = 0) ORDER BY assigned_at";
const NEW_VIEWS: &str = "
    INSERT INTO views (tenant_id, experiment_id, user_id, variant)
    SELECT $1, $2, md5((1 + n % $3::bigint)::text), '19' FROM generate_series(1, $4::bigint) n";
// Long after the window of those who buy.
const NEW_SALES: &str = "
    INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, assigned_at)
    SELECT a.tenant_id, a.experiment_id, a.user_id, a.variant, a.price, 'USD', a.assigned_at
    FROM generate_series(1, $4::bigint) n
    JOIN assignments a ON a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id = md5((1 + n % $3::bigint)::text)";
// As people write it, with each table counted by itself, so that no join multiplies anything.
const RECOMPUTED: &str = "
    CREATE MATERIALIZED VIEW recomputed_metrics AS
    SELECT e.tenant_id, e.id AS experiment_id, e.name, COALESCE(a.n, 0) AS assignments, COALESCE(v.n, 0) AS views,
           COALESCE(c.n, 0) AS conversions, COALESCE(c.revenue, 0) AS revenue
    FROM experiments e
    LEFT JOIN (SELECT tenant_id, experiment_id, count(*) AS n FROM assignments GROUP BY 1, 2) a
      ON a.tenant_id = e.tenant_id AND a.experiment_id = e.id
    LEFT JOIN (SELECT tenant_id, experiment_id, count(*) AS n FROM views GROUP BY 1, 2) v
      ON v.tenant_id = e.tenant_id AND v.experiment_id = e.id
    LEFT JOIN (SELECT tenant_id, experiment_id, count(*) FILTER (WHERE kind = 'sale') AS n, sum(revenue) AS revenue
               FROM conversions GROUP BY 1, 2) c
      ON c.tenant_id = e.tenant_id AND c.experiment_id = e.id;
    CREATE UNIQUE INDEX ON recomputed_metrics (tenant_id, experiment_id)";
const DIFFERENT: &str = "
    SELECT count(*) FROM (
      SELECT experiment_id, assignments, views, conversions, revenue FROM recomputed_metrics EXCEPT
      SELECT experiment_id, assignments, views, conversions, revenue FROM experiment_metrics) other";
