//! What a reviewer once broke by SQL of experiments: each test failed before its cause was mended.

use std::time::Duration;

use lastprice::bucketing::Share;
use lastprice::{Client, Layer, NewPhase, TenantScope};
use lastprice_testkit::TestDatabase;

use crate::support_repo::*;
use crate::support_sql::{TemporaryDir, as_tenant, program, psql, rows, run, schema_sql};

/// Two transactions of one tenant: one changes the tenant, then an experiment; the other that experiment only.
#[tokio::test]
async fn a_change_of_the_tenant_deadlocks_with_one_of_an_experiment() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let mut failed = Vec::new();
    for _ in 0..2 {
        let transaction = two.acme.begin().await.unwrap();
        transaction.tenants().update(lastprice::TenantChange::new().name("Acme 2")).await.unwrap();
        let handle = two.client.tenant(two.id);
        let other = tokio::spawn(async move { handle.experiments().raise_traffic(id, Share::ALL).await });
        tokio::time::sleep(Duration::from_millis(300)).await; // at its COMMIT, it waits for the tenant
        let ours = transaction.experiments().raise_traffic(id, Share::ALL).await;
        let ours = match ours {
            Ok(_) => transaction.commit().await,
            Err(e) => Err(e),
        };
        let theirs = other.await.unwrap();
        for e in [ours.err(), theirs.err()].into_iter().flatten() {
            failed.push(format!("{:?} {:?}", e.kind(), e.sqlstate().map(|s| s.code().to_owned())));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// Hosts whose transactions are REPEATABLE READ: two experiments of a tenant are not two rows any more.
#[tokio::test]
async fn repeatable_read_changes_of_two_experiments_fail_at_commit() {
    let two = two_tenants().await;
    let (x, y) = (active(&two.acme, "x").await.id, active(&two.acme, "y").await.id);
    let mut host = two.database.connect_app().await.unwrap();
    let builder =
        host.build_transaction().isolation_level(lastprice::tokio_postgres::IsolationLevel::RepeatableRead);
    let transaction = builder.start().await.unwrap();
    TenantScope::within(&transaction, two.id).experiments().pause(x).await.unwrap();
    two.acme.experiments().pause(y).await.unwrap();
    let committed = transaction.commit().await;
    assert!(committed.is_ok(), "{:?}", committed.unwrap_err().as_db_error().map(|e| e.message().to_owned()));
}

/// What a migration does: change rows, then the table, in one transaction. And two-phase commit.
#[tokio::test]
async fn one_transaction_changes_rows_and_the_table() {
    let two = two_tenants().await;
    active(&two.acme, "x").await;
    let mut refused = Vec::new();
    for sql in [
        "UPDATE experiments SET name = 'n'; ALTER TABLE experiments ADD COLUMN host_note text",
        "UPDATE experiments SET name = 'n'; CREATE INDEX host_idx ON experiments (name)",
        "UPDATE tenants SET holdout = 7; ALTER TABLE tenants ADD COLUMN host_note text",
    ] {
        two.owner.batch_execute("BEGIN").await.unwrap();
        if let Err(e) = two.owner.batch_execute(sql).await {
            refused.push(e.as_db_error().unwrap().message().to_owned());
        }
        two.owner.batch_execute("ROLLBACK").await.unwrap();
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

/// The tenant's row is locked by somebody who changes its name and takes time: no experiment can be paused meanwhile.
#[tokio::test]
async fn pausing_waits_for_whoever_holds_the_tenant() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let client = Client::builder()
        .url(two.database.app_url())
        .statement_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let slow = two.acme.begin().await.unwrap();
    slow.tenants().update(lastprice::TenantChange::new().name("Acme 2")).await.unwrap();
    let handle = client.tenant(two.id);
    let paused = tokio::time::timeout(Duration::from_secs(6), handle.experiments().pause(id)).await;
    slow.rollback().await.unwrap();
    // Neither does the statement's time limit end it: PostgreSQL ends that before deferred triggers run.
    assert!(paused.is_ok(), "no answer within 6 s, with a time limit of 1 s");
    assert!(paused.as_ref().unwrap().is_ok(), "{paused:?}");
}

/// Attempts on the guard of layers, by SQL of the application.
#[tokio::test]
async fn layers_cannot_be_taken_twice() {
    let two = two_tenants().await;
    let part = |from, to| Layer::new("l", percent(from)..percent(to)).unwrap();
    for (key, layer) in [("a", part(0, 50)), ("b", part(40, 60)), ("c", part(60, 80))] {
        two.acme.experiments().create(new_experiment(key).layer(layer)).await.unwrap();
    }
    let app = two.database.connect_app().await.unwrap();
    let tenant = two.id.to_string();
    let arms = r#"[{"name": "a", "weight": 1, "price": "10"}, {"name": "b", "weight": 1, "price": 12.5}]"#;
    let insert = |rows: &str| {
        format!(
            "INSERT INTO experiments (tenant_id, key, name, variants, status, layer, layer_start, layer_end) {rows}"
        )
    };
    let tries = [
        // Both in one statement.
        "UPDATE experiments SET status = 'active' WHERE key IN ('a', 'b')".to_owned(),
        // Moved and activated at once.
        "UPDATE experiments SET status = 'active' WHERE key = 'a';
         UPDATE experiments SET status = 'active', layer_start = 0, layer_end = 10 WHERE key = 'c'"
            .to_owned(),
        insert(&format!(
            "VALUES ('{tenant}', 'p', 'P', '{arms}', 'active', 'm', 0, 10), ('{tenant}', 'q', 'Q', '{arms}', 'paused', 'm', 5, 15)"
        )),
        insert(&format!(
            "SELECT '{tenant}', 'k' || n, 'P', '{arms}', 'active', 'm', n, n + 2 FROM generate_series(1, 2) n"
        )),
        format!(
            "{} ON CONFLICT (tenant_id, key) DO UPDATE SET status = 'active', layer_start = 0",
            insert(&format!(
                "VALUES ('{tenant}', 'a', 'A', '{arms}', 'active', 'l', 0, 500000), ('{tenant}', 'b', 'B', '{arms}', 'active', 'l', 900000, 910000)"
            ))
        ),
        "UPDATE experiments SET status = 'active' WHERE key = 'a'; UPDATE experiments SET layer_end = 700000 WHERE key = 'a'".to_owned(),
        "UPDATE experiments SET status = 'active' WHERE key = 'a'; UPDATE experiments SET status = 'draft' WHERE key = 'a'".to_owned(),
    ];
    for sql in tries {
        let done = as_tenant(&app, &tenant, &sql).await;
        assert!(done.is_err(), "{sql}");
    }
}

/// Layers, phases, lists and marks through every way of a restore.
#[tokio::test]
async fn restores_keep_what_decides() {
    let (Some(pg_dump), Some(pg_restore), Some(psql_program)) =
        (program("pg_dump"), program("pg_restore"), program("psql"))
    else {
        return;
    };
    let dir = TemporaryDir::new("review");
    let two = two_tenants().await;
    let part = |from, to| Layer::new("l", percent(from)..percent(to)).unwrap();
    for (key, layer) in [("a", part(0, 50)), ("b", part(50, 60)), ("c", part(60, 80))] {
        let id = two.acme.experiments().create(new_experiment(key).layer(layer)).await.unwrap().id;
        let live = two.acme.experiments().activate(id).await.unwrap();
        two.acme.experiments().force(id, &user(1), Some("39")).await.unwrap();
        if key == "b" {
            two.acme.experiments().force(id, &user(1), None).await.unwrap();
        }
        if key == "c" {
            let sql = "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason)
                       VALUES ($1, $2, 'i', '19', 18, 'USD', 'imported')";
            two.owner.execute(sql, &[&two.id.uuid(), &id.uuid()]).await.unwrap();
            let live = two.acme.experiments().get(live.id).await.unwrap().unwrap();
            two.acme.experiments().new_phase(id, live.revision, NewPhase::new(three())).await.unwrap();
        }
    }
    two.acme.tenants().update(lastprice::TenantChange::new().holdout(percent(3))).await.unwrap();
    let contents = "SELECT (SELECT string_agg(e::text, ';' ORDER BY e.id) FROM experiments e),
                           (SELECT string_agg(to_jsonb(t)::text, ';' ORDER BY t.id) FROM tenants t),
                           (SELECT string_agg(a::text, ';' ORDER BY a.experiment_id, a.user_id) FROM assignments a)";
    let expected = rows(&two.owner, contents).await.unwrap();
    let files = [("all.dump", "--no-comments"), ("data.dump", "--data-only")].map(|(file, what)| {
        let file = dir.file(file);
        let args = ["-d", &two.database.owner_url(), "-F", "c", what, "-f", &file];
        run(std::process::Command::new(&pg_dump).args(args)).expect_ok();
        file
    });
    for (args, installed) in [
        (vec!["--single-transaction"], false),
        (vec!["--data-only", "--single-transaction"], true),
        (vec!["--data-only", "--disable-triggers", "--single-transaction"], true),
        (vec!["--data-only", "--disable-triggers"], true),
    ] {
        let into = TestDatabase::builder().empty().create().await.unwrap();
        if installed {
            psql(&psql_program, &into.owner_url(), "", &["-f", schema_sql()]).expect_ok();
        }
        let superuser = args.contains(&"--disable-triggers");
        let url = if superuser { into.superuser_url() } else { into.owner_url() };
        let done = run(std::process::Command::new(&pg_restore)
            .args(["--exit-on-error", "-d", &url])
            .args(&args)
            .arg(&files[usize::from(installed)]));
        assert!(done.ok, "{args:?}: {}", done.err);
        let restored = rows(&into.connect_owner().await.unwrap(), contents).await.unwrap();
        assert_eq!(restored, expected, "{args:?}");
    }
}

/// A host whose default privileges let its service execute functions: the triggers' functions, which act as the owner,
/// do as well on a temporary table.
#[tokio::test]
async fn default_privileges_let_the_application_write_for_other_tenants() {
    let Some(psql_program) = program("psql") else { return };
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner
        .batch_execute("ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO lastprice_app")
        .await
        .unwrap();
    psql(&psql_program, &database.owner_url(), "", &["-f", schema_sql()]).expect_ok();
    crate::support_sql::two_tenants(&owner).await;
    let app = database.connect_app().await.unwrap();
    let mut allowed = Vec::new();
    for (name, sql) in [
        ("exceptions of B are marked", "CREATE TEMP TABLE t (tenant_id uuid, experiment_id uuid);
          CREATE TRIGGER t AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION assignments_are_exceptions();
          INSERT INTO t VALUES ('bbbbbbbb-0000-4000-8000-000000000000', 'bbbbbbbb-0000-4000-8000-000000000001')"),
        ("all hear of B", "CREATE TEMP TABLE u (tenant_id uuid);
          CREATE TRIGGER u AFTER INSERT ON u FOR EACH ROW EXECUTE FUNCTION config_changed();
          INSERT INTO u VALUES ('bbbbbbbb-0000-4000-8000-000000000000')"),
        ("metrics of B (as before this work)", "CREATE TEMP TABLE v (tenant_id uuid, experiment_id uuid, phase int, variant text, reason text, occurred_at timestamptz);
          CREATE TRIGGER v AFTER INSERT ON v REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_views();
          INSERT INTO v VALUES ('bbbbbbbb-0000-4000-8000-000000000000', 'bbbbbbbb-0000-4000-8000-000000000001', 1, 'a', 'randomised', now())"),
    ] {
        if app.batch_execute(sql).await.is_ok() {
            allowed.push(name);
        }
    }
    let marked = rows(&owner, "SELECT exceptions FROM experiments WHERE name = 'X of B'").await.unwrap();
    assert!(allowed.is_empty(), "{allowed:?}; B's experiment is marked: {marked:?}");
}

/// "Outcomes … are returned as data": a layer within a host's transaction with an older snapshot.
#[tokio::test]
async fn activating_in_a_layer_within_repeatable_read_ends_the_transaction() {
    let two = two_tenants().await;
    let layer = Layer::new("l", percent(0)..percent(50)).unwrap();
    let id = two.acme.experiments().create(new_experiment("x").layer(layer)).await.unwrap().id;
    let mut host = two.database.connect_app().await.unwrap();
    let builder =
        host.build_transaction().isolation_level(lastprice::tokio_postgres::IsolationLevel::RepeatableRead);
    let transaction = builder.start().await.unwrap();
    let activated = TenantScope::within(&transaction, two.id).experiments().activate(id).await;
    let usable = transaction.query("SELECT 1", &[]).await.is_ok();
    assert!(usable, "{:?}", activated.unwrap_err());
}
