//! What an operator asks when something is slow: the hook, and the plans.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lastprice::{Admin, Client, ClientBuilder, ErrorKind, NewView, SlowStatement};
use lastprice_testkit::TestDatabase;

use crate::support_repo::*;

type Notes = Arc<Mutex<Vec<SlowStatement>>>;

/// A client with one connection, and what its hook hears.
fn watched(two: &TwoTenants, threshold: Duration) -> (Client, Notes) {
    let notes = Notes::default();
    let kept = Arc::clone(&notes);
    let hook = move |slow: &SlowStatement| kept.lock().unwrap().push(*slow);
    (builder(two).on_slow_statement(threshold, hook).build().unwrap(), notes)
}

fn builder(two: &TwoTenants) -> ClientBuilder {
    Client::builder().url(two.database.app_url()).require_app_role().pool_size(1)
}

fn heard(notes: &Notes) -> Vec<SlowStatement> {
    std::mem::take(&mut *notes.lock().unwrap())
}

#[tokio::test]
async fn the_hook_hears_of_every_statement_that_took_so_long() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..2).await;
    let (client, notes) = watched(&two, Duration::ZERO);
    let tenant = client.tenant(two.id);
    tenant.views().record(&NewView::new(id, user(0))).await.unwrap();
    let transaction = tenant.begin().await.unwrap();
    transaction.views().record(&NewView::new(id, user(0))).await.unwrap();
    transaction.commit().await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    let of_host = host.transaction().await.unwrap();
    client.within(&of_host, two.id).views().record(&NewView::new(id, user(1))).await.unwrap();
    of_host.commit().await.unwrap();
    let all = heard(&notes);
    let operations: Vec<_> = all.iter().map(|slow| slow.operation).collect();
    assert_eq!(operations, ["views.record", "begin", "views.record", "commit", "views.record"]);
    for slow in &all {
        assert_eq!((slow.tenant, slow.error, slow.dropped), (two.id, None, false), "{slow:?}");
        assert_eq!(slow.rows, Some(usize::from(slow.operation == "views.record")), "{slow:?}");
        assert!(slow.elapsed > Duration::ZERO && slow.waited <= slow.elapsed, "{slow:?}");
    }

    // Another one hears only of those that waited: for a lock, given up by the caller, and for the one connection.
    let (client, notes) = watched(&two, Duration::from_secs(600));
    client.tenant(two.id).views().record(&NewView::new(id, user(0))).await.unwrap();
    assert_eq!(heard(&notes), [], "a quick one");
    let (client, notes) = watched(&two, Duration::from_millis(250));
    let tenant = client.tenant(two.id);
    tenant.views().record(&NewView::new(id, user(0))).await.unwrap();
    assert!(heard(&notes).iter().all(|slow| slow.elapsed >= Duration::from_millis(250)), "of a busy machine");
    let lock = two.database.connect_owner().await.unwrap();
    lock.batch_execute("BEGIN; LOCK TABLE views IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let view = NewView::new(id, user(0));
    let given_up = tokio::time::timeout(Duration::from_millis(300), tenant.views().record(&view)).await;
    given_up.unwrap_err();
    lock.batch_execute("ROLLBACK").await.unwrap();
    let all = heard(&notes);
    assert_eq!((all.len(), all[0].operation, all[0].rows, all[0].dropped), (1, "views.record", None, true));
    assert!(all[0].elapsed >= Duration::from_millis(290), "{all:?}");
    let holder = tenant.begin().await.unwrap();
    let release = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(holder);
    };
    let (me, ()) = tokio::join!(tenant.tenants().get(), release);
    me.unwrap().unwrap();
    let all = heard(&notes);
    assert_eq!((all.len(), all[0].operation, all[0].rows), (1, "tenants.get", Some(1)));
    assert!(all[0].waited >= Duration::from_millis(290) && all[0].waited <= all[0].elapsed, "{all:?}");
    // So does a transaction, before its first statement, and one that is given up.
    let holder = tenant.begin().await.unwrap();
    tokio::time::timeout(Duration::from_millis(300), tenant.begin()).await.unwrap_err();
    let release = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(holder);
    };
    let (mine, ()) = tokio::join!(tenant.begin(), release);
    mine.unwrap().rollback().await.unwrap();
    let all = heard(&notes);
    let operations: Vec<_> = all.iter().map(|slow| (slow.operation, slow.rows, slow.dropped)).collect();
    assert_eq!(operations, [("begin", None, true), ("begin", Some(0), false)]);
    for slow in all {
        assert!(slow.waited >= Duration::from_millis(290) && slow.waited <= slow.elapsed, "{slow:?}");
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_hook_that_panics_breaks_no_call_and_no_transaction() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..3).await;
    let hook = |slow: &SlowStatement| panic!("a fault of the host's, at {}", slow.operation);
    let client = builder(&two).on_slow_statement(Duration::ZERO, hook).build().unwrap();
    let tenant = client.tenant(two.id);
    tenant.views().record(&NewView::new(id, user(0))).await.unwrap();
    let transaction = tenant.begin().await.unwrap();
    transaction.views().record(&NewView::new(id, user(1))).await.unwrap();
    transaction.views().record(&NewView::new(id, user(2))).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(two.count("views").await, 3);
    assert_eq!(client.pool_status().available, 1);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn every_statement_has_a_plan_for_whoever_runs_it() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let names = Admin::statements();
    assert!(names.is_sorted() && names.len() == lastprice::internals::statements().len());
    for name in &names {
        let plan = admin.explain(name).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert!(plan.contains("cost=") && !plan.contains("Seq Scan on"), "{name}: {plan}");
    }
    // As the application role, whom row-level security binds, and of parameters that are not known.
    let plan = admin.explain("views.record").await.unwrap();
    assert!(plan.contains("Insert on views") && plan.contains("app.tenant_id"), "{plan}");
    assert!(plan.contains("$1"), "{plan}");
    // Nothing was written, nothing is left: not even a name, after an error neither.
    for name in ["views", "conversions.authorise", "views.record; DROP TABLE views", ""] {
        let refusal = refused(admin.explain(name).await, "name").to_string();
        assert!(
            refusal.contains("Admin::statements()") && refusal.contains("docs/observability.md"),
            "{refusal}"
        );
    }
    two.owner.batch_execute("ALTER TABLE views RENAME TO views_elsewhere").await.unwrap();
    is_kind(admin.explain("views.record").await, ErrorKind::SchemaMismatch);
    two.owner.batch_execute("ALTER TABLE views_elsewhere RENAME TO views").await.unwrap();
    admin.explain("views.record").await.unwrap();
    // Dropped at its first poll, it leaves nothing that the next call could notice.
    let _ = tokio::time::timeout(Duration::ZERO, admin.explain("views.record")).await;
    admin.explain("views.record").await.unwrap();
    admin.refresh_metrics().await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_plan_is_for_the_owner_of_the_tables() {
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute("CREATE SCHEMA \"Pricing 2\"; SET search_path = \"Pricing 2\"").await.unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
    let admin = Admin::connect_schema(&database.owner_url(), "Pricing 2").await.unwrap();
    assert!(admin.explain("views.record").await.unwrap().contains("Insert on views"));
    let superuser = Admin::connect_schema(&database.superuser_url(), "Pricing 2").await.unwrap();
    assert!(superuser.explain("views.record").await.unwrap().contains("app.tenant_id"));
    // Where there is no schema, that is said.
    let elsewhere = Admin::connect(&database.owner_url()).await.unwrap();
    is_kind(elsewhere.explain("views.record").await, ErrorKind::SchemaMismatch);
    // Who cannot become the application role is told so.
    let stranger = format!("stranger_of_{}", database.name());
    let password = database.password_for(&stranger).unwrap_or_default();
    owner.batch_execute(&format!("CREATE ROLE {stranger} LOGIN PASSWORD '{password}'")).await.unwrap();
    let refusal = Admin::connect_schema(&database.url_for(&stranger), "Pricing 2").await.unwrap();
    let refusal = refused(refusal.explain("views.record").await, "owner_url");
    assert!(refusal.to_string().contains("lastprice_app"), "{refusal}");
    owner.batch_execute(&format!("DROP ROLE {stranger}")).await.unwrap();
}
