//! Backups, by the commands of the description: whole, and definitions and data apart. The README shows the same
//! commands, with the names of databases for the URLs; into another server: `backup_docs.rs`.

use std::path::PathBuf;
use std::process::Command;

use lastprice_testkit::TestDatabase;

use crate::support_sql::*;

struct Tools {
    psql: PathBuf,
    pg_dump: PathBuf,
    pg_restore: PathBuf,
    dir: TemporaryDir,
}

fn tools(test: &str) -> Option<Tools> {
    let (psql, pg_dump, pg_restore) = (program("psql")?, program("pg_dump")?, program("pg_restore")?);
    Some(Tools { psql, pg_dump, pg_restore, dir: TemporaryDir::new(test) })
}

impl Tools {
    /// `pg_dump -d url …`
    fn dump(&self, from: &TestDatabase, args: &[&str]) {
        run(Command::new(&self.pg_dump).args(["-d", &from.owner_url()]).args(args)).expect_ok();
    }

    /// Who restores definitions: the owner. Before PostgreSQL 13 the dump has the extension pgcrypto in it, which only a
    /// superuser can make; everything else belongs to the owner all the same.
    async fn restorer(&self, into: &TestDatabase) -> String {
        let before_13 = version_num(&into.connect_owner().await.unwrap()).await < 130_000;
        if before_13 { into.superuser_url() } else { into.owner_url() }
    }

    /// `psql -d url …`; like `ON_ERROR_STOP=1` in all of them, so that no error is passed over.
    fn psql(&self, into: &TestDatabase, args: &[&str]) -> String {
        psql(&self.psql, &into.owner_url(), "", args).expect_ok()
    }
}

/// Two tenants with events in totals, and others that are still pending; refreshed in between.
async fn with_events() -> TestDatabase {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let app = db.connect_app().await.unwrap();
    for user in ["u", "v"] {
        for (tenant, x) in [(A, XA), (B, XB)] {
            let sql = format!(
                "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');
                 INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', '{user}', 'a');
                 INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');
                 INSERT INTO usage (tenant_id, metric, day, value) VALUES ('{tenant}', 'calls', '2026-01-01', 7);
                 INSERT INTO recommendations (tenant_id, experiment_id, price, currency, confidence) VALUES ('{tenant}', '{x}', 11, 'USD', 0.5)"
            );
            as_tenant(&app, tenant, &sql).await.unwrap();
        }
        if user == "u" {
            owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
        }
    }
    // A checkout and a webhook without a key, of which neither saw the other; and what was given back of the second one.
    for (tenant, x) in [(A, XA), (B, XB)] {
        let sql = format!(
            "SET row_security = off;
             INSERT INTO conversions (tenant_id, id, experiment_id, user_id, variant, revenue, currency, order_id, idempotency_key, metadata) VALUES
               ('{tenant}', gen_random_uuid(), '{x}', 'u', 'a', 5, 'USD', 'o', 'checkout', '{{}}'),
               ('{tenant}', gen_random_uuid(), '{x}', 'u', 'a', 5, 'USD', 'o', 'paid:sale:o', '{{\"webhook\": \"w\"}}');
             INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, kind, revenue, currency, order_id, sale_id)
             SELECT tenant_id, experiment_id, user_id, variant, 'refund', -5, 'USD', 'o', id FROM conversions
             WHERE tenant_id = '{tenant}' AND idempotency_key = 'paid:sale:o';
             RESET row_security"
        );
        owner.batch_execute(&sql).await.unwrap();
    }
    // A recommendation that was applied, and one that was approved.
    for (tenant, follow_up) in
        [(A, "aaaaaaaa-0000-4000-8000-00000000000f"), (B, "bbbbbbbb-0000-4000-8000-00000000000f")]
    {
        let sql = format!(
            "UPDATE recommendations SET status = 'approved';
             INSERT INTO experiments (tenant_id, id, key, name, variants) VALUES ('{tenant}', '{follow_up}', 'y', 'Y', '{ARMS}');
             UPDATE recommendations SET status = 'applied', follow_up_id = '{follow_up}'
             WHERE id = (SELECT id FROM recommendations ORDER BY id LIMIT 1)"
        );
        as_tenant(&app, tenant, &sql).await.unwrap();
    }
    db
}

async fn empty() -> TestDatabase {
    TestDatabase::builder().empty().create().await.unwrap()
}

const CONTENTS: &str = "SELECT jsonb_build_array(
    (SELECT jsonb_agg(to_jsonb(t) ORDER BY t.id) FROM tenants t), (SELECT jsonb_agg(to_jsonb(e) ORDER BY e.id) FROM experiments e),
    (SELECT jsonb_agg(to_jsonb(a) ORDER BY a.tenant_id, a.user_id) FROM assignments a), (SELECT jsonb_agg(to_jsonb(v) ORDER BY v.id) FROM views v),
    (SELECT jsonb_agg(to_jsonb(c) ORDER BY c.id) FROM conversions c), (SELECT jsonb_agg(to_jsonb(u) ORDER BY u.idempotency_key) FROM usage u),
    (SELECT jsonb_agg(to_jsonb(r) ORDER BY r.id) FROM recommendations r))";

const LIVE_VIEWS: &str = "SELECT (SELECT coalesce(sum(views), 0) FROM metric_totals) + (SELECT coalesce(sum(views), 0) FROM metric_deltas)";

/// The same definitions and rows; the tenants apart; exact metrics; and everything goes on.
async fn assert_restored(tools: &Tools, from: &TestDatabase, into: &TestDatabase) {
    let contents =
        async |db: &TestDatabase| rows(&db.connect_owner().await.unwrap(), CONTENTS).await.unwrap();
    assert_eq!(contents(from).await, contents(into).await);
    assert_eq!(
        definitions(&tools.pg_dump, &from.owner_url()),
        definitions(&tools.pg_dump, &into.owner_url())
    );
    let superuser = into.connect_superuser().await.unwrap();
    assert_exact(&superuser, "restored").await;

    let app = into.connect_app().await.unwrap();
    assert!(rows(&app, "SELECT FROM conversions").await.unwrap().is_empty(), "unbound");
    for (tenant, x) in [(A, XA), (B, XB)] {
        for table in [
            "experiments",
            "assignments",
            "views",
            "conversions",
            "usage",
            "recommendations",
            "tenant_variant_metrics",
        ] {
            let seen =
                as_tenant(&app, tenant, &format!("SELECT DISTINCT tenant_id FROM {table}")).await.unwrap();
            assert_eq!(seen, [[Some(tenant.to_owned())]], "{table}");
        }
        let sql = format!(
            "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', 'w', 'b')"
        );
        as_tenant(&app, tenant, &sql).await.unwrap();
        assert!(
            as_tenant(&app, if tenant == A { B } else { A }, &sql).await.is_err(),
            "another tenant's row"
        );
        assert!(as_tenant(&app, tenant, "DELETE FROM conversions").await.is_err());
    }
    assert_eq!(tools.psql(into, &["-c", "SELECT refresh_experiment_metrics();"]).trim(), "t");
    assert_exact(&superuser, "restored, and written to").await;
    let summary = "SELECT concat_ws(' ', assignments, views, conversions, revenue) FROM experiment_metrics WHERE key = 'x'";
    assert_eq!(rows(&superuser, summary).await.unwrap(), vec![vec![Some("2 3 4 25".to_owned())]; 2]);
}

#[tokio::test]
async fn whole() {
    let Some(tools) = tools("whole") else { return };
    let (from, into) = (with_events().await, empty().await);
    let file = tools.dir.file("lastprice_backup.dump");
    tools.dump(&from, &["-F", "c", "-f", &file]);
    let url = tools.restorer(&into).await;
    run(Command::new(&tools.pg_restore).args(["--exit-on-error", "-d", &url, &file])).expect_ok();
    // The triggers come after the data: nothing is counted twice. The materialized view is filled as well.
    let owner = into.connect_owner().await.unwrap();
    assert_eq!(value(&rows(&owner, "SELECT count(*) FROM experiment_metrics").await.unwrap()), "4");
    assert_restored(&tools, &from, &into).await;
}

#[tokio::test]
async fn definitions_then_data() {
    let Some(tools) = tools("split") else { return };
    let (from, into) = (with_events().await, empty().await);
    let (definitions, data) = (tools.dir.file("lastprice_schema.sql"), tools.dir.file("lastprice_data.sql"));
    tools.dump(&from, &["--schema-only", "-f", &definitions]);
    tools.dump(&from, &["--data-only", "-f", &data]);

    psql(&tools.psql, &tools.restorer(&into).await, "", &["-f", &definitions]).expect_ok();
    let owner = into.connect_owner().await.unwrap();
    let populated = "SELECT relispopulated FROM pg_class WHERE relname = 'experiment_metrics'";
    assert_eq!(value(&rows(&owner, populated).await.unwrap()), "f");
    assert_eq!(tools.psql(&into, &["-c", "SELECT refresh_experiment_metrics();"]).trim(), "t");
    assert_eq!(value(&rows(&owner, populated).await.unwrap()), "t");

    tools.psql(&into, &["-f", &data]);
    assert_eq!(
        value(&rows(&owner, LIVE_VIEWS).await.unwrap()),
        "8",
        "four views, counted by the triggers once more"
    );
    tools.psql(&into, &["-c", "SELECT recount_experiment_metrics();"]);
    assert_eq!(value(&rows(&owner, LIVE_VIEWS).await.unwrap()), "4");
    assert_restored(&tools, &from, &into).await;
}

#[tokio::test]
async fn data_onto_a_fresh_installation() {
    let Some(tools) = tools("data") else { return };
    let (from, into) = (with_events().await, empty().await);
    let data = tools.dir.file("lastprice_data.sql");
    tools.dump(&from, &["--data-only", "-f", &data]);

    tools.psql(&into, &["-f", schema_sql()]);
    tools.psql(&into, &["--single-transaction", "-f", &data]);
    let owner = into.connect_owner().await.unwrap();
    assert_eq!(value(&rows(&owner, LIVE_VIEWS).await.unwrap()), "8");
    tools.psql(&into, &["-c", "SELECT recount_experiment_metrics();"]);
    assert_restored(&tools, &from, &into).await;
}
