//! The trust boundary, shown: what whoever may run SQL as the application's role can do and see. None of this is a fault,
//! and all of it is documented; a change of it should be noticed.

use std::time::Duration;

use tokio_postgres::{AsyncMessage, NoTls};

use crate::support_sql::*;

async fn database() -> lastprice_testkit::TestDatabase {
    let db = lastprice_testkit::TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    owner.batch_execute("ANALYZE").await.unwrap();
    db
}

#[tokio::test]
async fn raw_sql_can_bind_any_tenant_and_reads_it() {
    let db = database().await;
    let app = db.connect_app().await.unwrap();
    for (tenant, name) in [(A, "X of A"), (B, "X of B")] {
        let found = as_tenant(&app, tenant, "SELECT name FROM experiments").await.unwrap();
        assert_eq!(found, [[Some(name.to_owned())]]);
    }
    // Even in the middle of another's transaction, by the setting itself.
    app.batch_execute(&format!("BEGIN; SELECT app_set_tenant('{B}'); SET LOCAL app.tenant_id = '{A}'"))
        .await
        .unwrap();
    assert_eq!(value(&rows(&app, "SELECT name FROM experiments").await.unwrap()), "X of A");
    app.batch_execute("ROLLBACK").await.unwrap();
    // And what it keeps in a cursor beyond the transaction, or in a table, is no longer ours to protect.
    as_tenant(&app, A, "DECLARE held CURSOR WITH HOLD FOR SELECT name FROM experiments").await.unwrap();
    assert_eq!(value(&as_tenant(&app, B, "FETCH ALL FROM held").await.unwrap()), "X of A");
}

#[tokio::test]
async fn sizes_of_tables_are_visible() {
    let db = database().await;
    let app = db.connect_app().await.unwrap();
    let sql = "SELECT pg_relation_size('experiments') > 0,
                      (SELECT reltuples FROM pg_class WHERE oid = 'experiments'::regclass)";
    let of_all = [[Some("t".to_owned()), Some("2".to_owned())]];
    assert_eq!(as_tenant(&app, B, sql).await.unwrap(), of_all, "the rows of all tenants are counted");
    let activity = "SELECT count(*) FROM pg_stat_user_tables WHERE relname = 'experiments'";
    assert_eq!(value(&as_tenant(&app, B, activity).await.unwrap()), "1");
}

/// Without our condition on the tenant, a plan counts what was passed over.
#[tokio::test]
async fn a_plan_counts_the_rows_that_it_passed_over() {
    let db = database().await;
    let app = db.connect_app().await.unwrap();
    let explain = "EXPLAIN (ANALYZE, COSTS off, TIMING off, SUMMARY off) SELECT * FROM experiments";
    let plan = async |sql: &str| {
        let sql = format!("SET LOCAL enable_indexscan = off; SET LOCAL enable_bitmapscan = off; {sql}");
        as_tenant(&app, B, &sql).await.unwrap().concat().into_iter().flatten().collect::<Vec<_>>().join("\n")
    };
    let bare = plan(explain).await;
    assert!(bare.contains("Rows Removed by Filter: 1"), "{bare}");
}

#[tokio::test]
async fn that_somebody_changed_something_can_be_heard() {
    let db = database().await;
    let (listener, mut connection) = tokio_postgres::connect(&db.app_url(), NoTls).await.unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = sender.send(notification.channel().to_owned());
            }
        }
    });
    listener.batch_execute("LISTEN lastprice").await.unwrap();
    let app = db.connect_app().await.unwrap();
    as_tenant(&app, A, "UPDATE experiments SET status = 'paused'").await.unwrap();
    let channel = tokio::time::timeout(Duration::from_secs(30), heard.recv()).await.unwrap();
    assert_eq!(channel.as_deref(), Some("lastprice"));
}
