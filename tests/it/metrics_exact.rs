//! The metrics by a small case that was computed by hand; and folding, refreshing and recounting side by side.

use std::time::{Duration, Instant};

use lastprice_testkit::TestDatabase;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::support_sql::*;

/// `None` in a column is NULL.
fn text(rows: &[Vec<Option<String>>]) -> Vec<String> {
    rows.iter()
        .map(|row| row.iter().map(|v| v.as_deref().unwrap_or("-")).collect::<Vec<_>>().join(" "))
        .collect()
}

async fn database() -> (TestDatabase, Client, Client, Client) {
    let db = TestDatabase::new().await.unwrap();
    // So that a wait that should not be fails the test instead of hanging it.
    let patience = format!("ALTER DATABASE {} SET lock_timeout = '10s'", db.name());
    db.connect_owner().await.unwrap().batch_execute(&patience).await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let (app, superuser) = (db.connect_app().await.unwrap(), db.connect_superuser().await.unwrap());
    (db, owner, app, superuser)
}

/// Some views of both tenants: three pending deltas each.
async fn some_views(app: &Client) {
    for (tenant, experiment) in [(A, XA), (B, XB)] {
        for variant in ["a", "b", "a"] {
            let sql = format!(
                "INSERT INTO views (tenant_id, experiment_id, user_id, variant)
                 SELECT '{tenant}', '{experiment}', n::text, '{variant}' FROM generate_series(1, 5) n"
            );
            as_tenant(app, tenant, &sql).await.unwrap();
        }
    }
}

async fn number(client: &Client, sql: &str) -> i64 {
    value(&rows(client, sql).await.unwrap()).parse().unwrap()
}

/// Until some session waits for a lock.
async fn somebody_waits(superuser: &Client) {
    let waiting =
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let end = Instant::now() + Duration::from_secs(5);
    while superuser.query(waiting, &[]).await.unwrap().is_empty() {
        assert!(Instant::now() < end, "nobody waits");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn computed_by_hand() {
    let (_db, owner, app, superuser) = database().await;
    for (tenant, x) in [(A, XA), (B, XB)] {
        // a: 3 users, 2 sales of 10 and 12; one of them refunded by 4; and one sale in euros. b: 1 user, nothing sold.
        let sql = format!(
            "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency)
               SELECT '{tenant}', '{x}', 'u' || n, CASE WHEN n < 4 THEN 'a' ELSE 'b' END, 10, 'USD' FROM generate_series(1, 4) n;
             INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', 'u1', 'a'), ('{tenant}', '{x}', 'u1', 'a'),
               ('{tenant}', '{x}', 'u4', 'b');
             INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, kind, revenue, currency) VALUES
               ('{tenant}', '{x}', 'u1', 'a', 'sale', 10, 'USD'), ('{tenant}', '{x}', 'u2', 'a', 'sale', 12, 'USD'),
               ('{tenant}', '{x}', 'u2', 'a', 'refund', -4, 'USD'), ('{tenant}', '{x}', 'u3', 'a', 'sale', 1000, 'EUR')"
        );
        as_tenant(&app, tenant, &sql).await.unwrap();
    }
    let by_variant = "SELECT variant, phase, assignments, views, conversions, revenue, currency, round(conversion_rate, 4) FROM tenant_variant_metrics ORDER BY 1";
    let expected = ["a 1 3 2 3 18 USD 1.0000", "b 1 1 1 0 0 USD 0.0000"];
    assert_eq!(text(&as_tenant(&app, A, by_variant).await.unwrap()), expected, "live, before any fold");
    let whole = "SELECT assignments, views, conversions, revenue, round(conversion_rate, 4), round(average_order_value, 4) FROM experiment_metrics";
    assert!(rows(&owner, whole).await.unwrap().is_empty(), "as of the last refresh");

    assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    // 3 sales of 4 users; 18 USD from 2 sales in USD.
    assert_eq!(text(&rows(&owner, whole).await.unwrap()), ["4 3 3 18 0.7500 9.0000"; 2]);
    assert_eq!(number(&owner, "SELECT count(*) FROM metric_deltas").await, 0);
    assert_eq!(text(&as_tenant(&app, A, by_variant).await.unwrap()), expected, "live, after the fold");
    let summary = "SELECT key, name, status, currency, conversions FROM tenant_experiment_metrics";
    assert_eq!(text(&as_tenant(&app, A, summary).await.unwrap()), ["x X of A active USD 3"]);

    // Another sale: seen live at once, and nothing to divide by is NULL, not an error.
    let sale = format!(
        "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency) VALUES ('{A}', '{XA}', 'u4', 'b', 12.5, 'USD')"
    );
    as_tenant(&app, A, &sale).await.unwrap();
    assert_eq!(text(&as_tenant(&app, A, by_variant).await.unwrap())[1], "b 1 1 1 1 12.5 USD 1.0000");
    assert_eq!(text(&as_tenant(&app, B, by_variant).await.unwrap())[1], "b 1 1 1 0 0 USD 0.0000");
    let bare = format!(
        "INSERT INTO experiments (tenant_id, key, name, variants) VALUES ('{A}', 'bare', 'Bare', '{ARMS}')"
    );
    as_tenant(&app, A, &bare).await.unwrap();
    owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    assert_eq!(text(&rows(&owner, &format!("{whole} WHERE key = 'bare'")).await.unwrap()), ["0 0 0 0 - -"]);
    assert_exact(&superuser, "by hand").await;

    // The day is the one in UTC, wherever the writer is.
    let late = format!(
        "SET LOCAL TimeZone = 'America/Los_Angeles'; INSERT INTO views (tenant_id, experiment_id, user_id, variant, occurred_at)
         VALUES ('{A}', '{XA}', 'u1', 'a', '2026-03-01 23:30:00-08')"
    );
    as_tenant(&app, A, &late).await.unwrap();
    assert_eq!(number(&owner, "SELECT sum(views) FROM metric_deltas WHERE day = '2026-03-02'").await, 1);
}

#[tokio::test]
async fn events_that_change_and_go() {
    let (_db, owner, app, superuser) = database().await;
    some_views(&app).await;
    let other = "aaaaaaaa-0000-4000-8000-000000000002";
    owner
        .batch_execute(&format!(
            "INSERT INTO experiments (tenant_id, id, key, name, variants) VALUES ('{A}', '{other}', 'y', 'Y', '{ARMS}');
             SELECT fold_metric_deltas(NULL);
             UPDATE views SET variant = 'b', phase = 2, occurred_at = now() - interval '3 days' WHERE user_id IN ('1', '2');
             UPDATE views SET experiment_id = '{other}' WHERE user_id = '3' AND tenant_id = '{A}';
             DELETE FROM views WHERE user_id = '5'; DELETE FROM views WHERE false"
        ))
        .await
        .unwrap();
    assert_exact(&superuser, "updates and deletes by the owner").await;
    assert_eq!(number(&superuser, "SELECT sum(views) FROM metric_totals").await, 30);
    owner.batch_execute("SELECT fold_metric_deltas(NULL)").await.unwrap();
    assert_eq!(number(&superuser, "SELECT sum(views) FROM metric_totals").await, 24);
    assert_exact(&superuser, "folded").await;

    // A cascade leaves nothing behind: of an experiment, and of a tenant.
    for (sql, left) in [
        (format!("DELETE FROM experiments WHERE id = '{XA}'"), 15),
        (format!("DELETE FROM tenants WHERE id = '{B}'"), 3),
    ] {
        owner.batch_execute(&sql).await.unwrap();
        assert_exact(&superuser, &sql).await;
        assert_eq!(number(&superuser, "SELECT (SELECT sum(views) FROM metric_totals) + coalesce((SELECT sum(views) FROM metric_deltas), 0)").await, left);
    }
}

#[tokio::test]
async fn truncate_and_recount() {
    let (_db, owner, app, superuser) = database().await;
    some_views(&app).await;
    owner.batch_execute("SELECT fold_metric_deltas(NULL)").await.unwrap();
    some_views(&app).await;
    owner.batch_execute("TRUNCATE views").await.unwrap();
    assert_eq!(
        number(&superuser, "SELECT sum(views) FROM metric_totals").await,
        30,
        "a TRUNCATE fires no trigger"
    );
    owner.batch_execute("SELECT recount_experiment_metrics()").await.unwrap();
    assert_exact(&superuser, "recounted").await;
    assert_eq!(
        number(
            &superuser,
            "SELECT (SELECT count(*) FROM metric_totals) + (SELECT count(*) FROM metric_deltas)"
        )
        .await,
        0
    );
    some_views(&app).await;
    assert_eq!(number(&owner, "SELECT recount_experiment_metrics()").await, 4, "two variants of two tenants");
    assert_exact(&superuser, "recounted again").await;
}

#[tokio::test]
async fn a_fold_never_waits() {
    let (db, owner, app, superuser) = database().await;
    some_views(&app).await;
    let holder = db.connect_owner().await.unwrap();
    holder.batch_execute(&format!("BEGIN; SELECT fold_metric_deltas('{A}')")).await.unwrap();
    for client in [&owner, &app] {
        client.batch_execute("SET lock_timeout = '2s'").await.unwrap();
    }
    for (sql, folded) in [
        (format!("SELECT fold_metric_deltas('{A}')"), 0),
        ("SELECT fold_metric_deltas(NULL)".to_owned(), 0),
        (format!("SELECT fold_metric_deltas('{B}')"), 3),
    ] {
        let start = Instant::now();
        assert_eq!(number(&owner, &sql).await, folded, "{sql}");
        assert!(start.elapsed() < Duration::from_secs(1), "{sql}");
    }
    assert_eq!(value(&as_tenant(&app, A, "SELECT fold_experiment_metrics()").await.unwrap()), "0");
    // A refresh meanwhile does not wait either, and counts what is pending.
    assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    assert_eq!(number(&owner, "SELECT sum(views) FROM experiment_metrics").await, 30);
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_exact(&superuser, "after the rollback of a fold").await;
    assert_eq!(number(&owner, "SELECT fold_metric_deltas(NULL)").await, 3);
    // All tenants exclude each one.
    some_views(&app).await;
    holder.batch_execute("BEGIN; SELECT fold_metric_deltas(NULL)").await.unwrap();
    assert_eq!(value(&as_tenant(&app, A, "SELECT fold_experiment_metrics()").await.unwrap()), "0");
    holder.batch_execute("COMMIT").await.unwrap();
    assert_exact(&superuser, "at the end").await;
}

/// Nor does it remove what it has not counted: deltas that are committed while it is at work.
#[tokio::test]
async fn a_fold_counts_what_it_removes() {
    let (db, owner, app, superuser) = database().await;
    some_views(&app).await;
    owner.batch_execute("SELECT fold_metric_deltas(NULL)").await.unwrap();
    some_views(&app).await;
    let holder = db.connect_superuser().await.unwrap();
    holder.batch_execute("BEGIN; SELECT FROM metric_totals FOR UPDATE").await.unwrap();
    let fold = tokio::spawn(async move { number(&owner, "SELECT fold_metric_deltas(NULL)").await });
    somebody_waits(&superuser).await;
    some_views(&app).await;
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(fold.await.unwrap(), 6);
    assert_exact(&superuser, "committed meanwhile").await;
}

#[tokio::test]
async fn a_fold_with_an_old_snapshot_does_nothing() {
    let (db, owner, app, superuser) = database().await;
    some_views(&app).await;
    let old = db.connect_app().await.unwrap();
    let owner_old = db.connect_owner().await.unwrap();
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        old.batch_execute(&format!(
            "BEGIN ISOLATION LEVEL {level}; SELECT app_set_tenant('{A}'); SELECT FROM views"
        ))
        .await
        .unwrap();
        owner_old.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT FROM views")).await.unwrap();
        some_views(&app).await;
        owner.batch_execute("SELECT fold_metric_deltas(NULL)").await.unwrap();
        assert_eq!(number(&old, "SELECT fold_experiment_metrics()").await, 0);
        assert_eq!(number(&owner_old, "SELECT fold_metric_deltas(NULL)").await, 0);
        let insert = format!(
            "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{A}', '{XA}', 'late', 'a')"
        );
        old.batch_execute(&insert).await.unwrap();
        old.batch_execute("COMMIT").await.unwrap();
        owner_old.batch_execute("COMMIT").await.unwrap();
    }
    assert_exact(&superuser, "old snapshots").await;
}

/// The delete of an experiment waits for the fold's rows, so the fold must not wait for the delete.
#[tokio::test]
async fn a_fold_and_a_delete_do_not_meet() {
    let (db, owner, app, superuser) = database().await;
    some_views(&app).await;
    // The experiment is locked as by a delete that has just begun; its cascade has not come to the deltas yet.
    let deleting = db.connect_owner().await.unwrap();
    deleting
        .batch_execute(&format!("BEGIN; SELECT FROM experiments WHERE id = '{XA}' FOR UPDATE"))
        .await
        .unwrap();
    owner.batch_execute("SET statement_timeout = '5s'").await.unwrap();
    owner.batch_execute("BEGIN").await.unwrap();
    assert_eq!(number(&owner, "SELECT fold_metric_deltas(NULL)").await, 3, "it passes over A's");
    deleting.batch_execute(&format!("DELETE FROM experiments WHERE id = '{XA}'; COMMIT")).await.unwrap();
    owner.batch_execute("COMMIT").await.unwrap();
    assert_exact(&superuser, "the delete came first").await;

    // The other way round: the fold came first.
    some_views_of_b(&app).await;
    owner.batch_execute("BEGIN").await.unwrap();
    assert_eq!(number(&owner, "SELECT fold_metric_deltas(NULL)").await, 2, "and what A's had used");
    let delete = tokio::spawn(async move { deleting.batch_execute("DELETE FROM experiments").await });
    somebody_waits(&superuser).await;
    owner.batch_execute("SELECT refresh_experiment_metrics(); COMMIT").await.unwrap();
    delete.await.unwrap().unwrap();
    assert_exact(&superuser, "the fold came first").await;
    assert_eq!(
        number(
            &superuser,
            "SELECT (SELECT count(*) FROM metric_totals) + (SELECT count(*) FROM metric_deltas)"
        )
        .await,
        0
    );
}

async fn some_views_of_b(app: &Client) {
    let sql = format!(
        "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{B}', '{XB}', 'w', 'a')"
    );
    as_tenant(app, B, &sql).await.unwrap();
}

/// A recount waits for deletes that are under way, and those that come later wait for it; writers do not.
#[tokio::test]
async fn a_recount_and_a_delete_take_turns() {
    let (db, owner, app, superuser) = database().await;
    some_views(&app).await;
    let deleting = db.connect_owner().await.unwrap();
    deleting.batch_execute(&format!("BEGIN; DELETE FROM experiments WHERE id = '{XA}'")).await.unwrap();
    let recount =
        tokio::spawn(async move { owner.batch_execute("SELECT recount_experiment_metrics()").await });
    somebody_waits(&superuser).await;
    some_views_of_b(&app).await;
    deleting.batch_execute("COMMIT").await.unwrap();
    recount.await.unwrap().unwrap();
    assert_exact(&superuser, "the delete came first").await;

    let owner = db.connect_owner().await.unwrap();
    owner.batch_execute("BEGIN; SELECT recount_experiment_metrics()").await.unwrap();
    let delete = tokio::spawn(async move { deleting.batch_execute("DELETE FROM experiments").await });
    somebody_waits(&superuser).await;
    some_views_of_b(&app).await;
    assert_eq!(value(&as_tenant(&app, B, "SELECT fold_experiment_metrics()").await.unwrap()), "0");
    owner.batch_execute("COMMIT").await.unwrap();
    delete.await.unwrap().unwrap();
    assert_exact(&superuser, "the recount came first").await;
}

#[tokio::test]
async fn refreshing_is_single_flight() {
    let (db, owner, app, _superuser) = database().await;
    let other = db.connect_owner().await.unwrap();
    some_views(&app).await;
    other.batch_execute("BEGIN").await.unwrap();
    assert_eq!(value(&rows(&other, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    let start = Instant::now();
    assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "f");
    assert!(start.elapsed() < Duration::from_secs(2), "it does not wait");
    // Readers and writers go on meanwhile.
    some_views(&app).await;
    as_tenant(&app, A, "SELECT FROM tenant_experiment_metrics").await.unwrap();
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    assert_eq!(number(&owner, "SELECT sum(views) FROM experiment_metrics").await, 60);

    owner.batch_execute("REFRESH MATERIALIZED VIEW experiment_metrics WITH NO DATA").await.unwrap();
    let unread = as_tenant(&app, A, "SELECT FROM tenant_experiment_metrics").await;
    assert_eq!(refusal(unread).0, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    for _ in 0..2 {
        assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    }
    assert_eq!(number(&owner, "SELECT sum(views) FROM experiment_metrics").await, 60);
}
