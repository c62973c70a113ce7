//! On a Citus cluster, where one is given: `CITUS_URL`, of a superuser on the coordinator; the other nodes let the role
//! `lastprice_citus_service` in without a password. And how the client binds a tenant there, which any server can show.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lastprice::serde_json::Value;
use lastprice::tokio_postgres::types::Kind;
use lastprice::{
    Actor, Client, Currency, ErrorKind, MergePolicy, NewConversion, NewTenant, NewUsage, NewView, OrderId,
    Period, SubscriptionId, TenantHandle, tokio_postgres,
};
use lastprice_testkit::TestDatabase;

use crate::plans::{TENANT, expected};
use crate::support_repo::*;
use crate::support_sql::{schema_sql, skipped};

const SERVICE: &str = "lastprice_citus_service";

/// A schema of its own in the cluster's database.
struct Cluster {
    owner: tokio_postgres::Client,
    schema: String,
    service: String,
}

impl Cluster {
    /// `None` skips the test.
    async fn start() -> Option<Cluster> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let Ok(url) = std::env::var("CITUS_URL") else {
            skipped("CITUS_URL names no Citus cluster");
            return None;
        };
        let owner = connect(&url).await;
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let schema = format!("lastprice_citus_{}_{n}", std::process::id());
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        let (install, spread) = (read(schema_sql()), read(concat!(env!("CARGO_MANIFEST_DIR"), "/citus.sql")));
        owner
            .batch_execute(&format!(
                "SET client_min_messages = error; SET citus.shard_count = 4; CREATE SCHEMA {schema}; SET search_path = {schema}"
            ))
            .await
            .unwrap();
        owner.batch_execute(&install).await.unwrap();
        owner.batch_execute(&spread).await.unwrap();
        let role = format!(
            "DO $$ BEGIN IF to_regrole('{SERVICE}') IS NULL THEN CREATE ROLE {SERVICE} LOGIN; END IF; END $$; GRANT lastprice_app TO {SERVICE}"
        );
        // Another test may be making it at the same time.
        eventually("the role is there", async || owner.batch_execute(&role).await.is_ok()).await;
        let (before, after) = url.split_once("://").unwrap();
        let place = after.split_once('@').map_or(after, |(_, place)| place);
        let service = format!("{before}://{SERVICE}@{place}");
        Some(Cluster { owner, schema, service })
    }

    fn client(&self) -> Client {
        let builder = Client::builder().url(&self.service).schema(&self.schema).require_app_role();
        builder.pool_size(4).poll_interval(Duration::from_millis(100)).build().unwrap()
    }

    async fn refresh(&self) {
        let sql = "SELECT refresh_experiment_metrics()";
        assert!(self.owner.query_one(sql, &[]).await.unwrap().get::<_, bool>(0));
    }

    async fn drop(self) {
        self.owner.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.schema)).await.unwrap();
    }
}

async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// They insert what a volatile function (the clock) had a say in: the rows are made at the coordinator and then sent. Citus runs
/// them, and cannot explain them with parameters.
const BY_COORDINATOR: [&str; 2] = ["conversions.open", "conversions.open_outside"];

/// Planned by Citus, as they are sent, with the tenant bound: each goes to the one node that has the tenant. (What the last refresh has made is
/// on the coordinator.)
#[tokio::test]
async fn every_statement_is_one_task() {
    let Some(cluster) = Cluster::start().await else { return };
    let app = connect(&cluster.service).await;
    let (known, mut complaints) = (expected(10), Vec::new());
    for (name, sql, types) in lastprice::internals::statements() {
        let sql = sql.replace("{s}", &cluster.schema);
        let types: Vec<String> = types
            .iter()
            .map(|t| match t.kind() {
                Kind::Array(of) => format!("{of}[]"),
                _ => t.to_string(),
            })
            .collect();
        let list =
            |list: &[String]| if list.is_empty() { String::new() } else { format!("({})", list.join(", ")) };
        let begin = format!("BEGIN; SELECT {}.app_set_tenant({TENANT})", cluster.schema);
        app.batch_execute(&begin).await.unwrap();
        let explained = async {
            app.batch_execute(&format!("PREPARE s {} AS {sql}", list(&types))).await?;
            let explain = format!("EXPLAIN (FORMAT JSON) EXECUTE s {}", list(&known[name].0));
            app.query_one(&explain, &[]).await
        };
        match explained.await {
            Ok(row) => {
                let plan: Value = row.get(0);
                let mut tasks = Vec::new();
                count_tasks(&plan, &mut tasks);
                let reads_tables = name != "metrics.refreshed" && !known[name].1.is_empty();
                if tasks.iter().any(|n| *n != 1) || (reads_tables && tasks.is_empty()) {
                    complaints.push(format!("{name}: tasks {tasks:?}"));
                }
            }
            Err(error) if BY_COORDINATOR.contains(&name) => {
                assert_eq!(error.code().map(|code| code.code()), Some("0A000"), "{name}: {error:?}");
                app.batch_execute(&format!("ROLLBACK; {begin}")).await.unwrap();
                let execute = format!("EXECUTE s {}", list(&known[name].0));
                app.batch_execute(&execute).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
            }
            Err(error) => {
                let said = error.as_db_error().map(ToString::to_string);
                complaints.push(format!("{name}: {}", said.unwrap_or_else(|| error.to_string())));
            }
        }
        app.batch_execute("ROLLBACK; DEALLOCATE ALL").await.unwrap();
    }
    cluster.drop().await;
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

fn count_tasks(value: &Value, tasks: &mut Vec<u64>) {
    match value {
        Value::Array(items) => items.iter().for_each(|v| count_tasks(v, tasks)),
        Value::Object(map) => {
            tasks.extend(map.get("Task Count").and_then(Value::as_u64));
            map.values().for_each(|v| count_tasks(v, tasks));
        }
        _ => {}
    }
}

/// What a tenant does from the first price to the last refund; tenants are on all nodes.
#[tokio::test]
async fn repositories_recorder_and_metrics_do_the_same() {
    let Some(cluster) = Cluster::start().await else { return };
    let client = cluster.client();
    client.ready().await.unwrap();
    let mut tenants = Vec::new();
    for n in 0..8 {
        let new = NewTenant::managed(format!("T{n}"), format!("ops@t{n}.example"));
        tenants.push(client.tenant(client.create_tenant(new).await.unwrap().id));
    }
    let taken = client.create_tenant(NewTenant::managed("Other", "OPS@t0.example")).await;
    is_kind(taken, ErrorKind::Conflict);
    let recorder = client.recorder();
    let mut lives = Vec::new();
    for tenant in &tenants {
        let live = active(tenant, "pro").await;
        assert_eq!(assign(tenant, live.id, 0..20).await.len(), 20);
        assert!(!tenant.assignments().assign(live.id, &user(3)).await.unwrap().is_new());
        let views: Vec<_> = (0..20).map(|n| NewView::new(live.id, user(n))).collect();
        tenant.views().record_many(&views).await.unwrap();
        tenant.views().record_many(&views).await.unwrap();
        for n in 20..60 {
            recorder.record(tenant.tenant_id(), NewView::new(live.id, user(n % 20))).unwrap();
        }
        ledger(tenant, live.id).await;
        let usage = NewUsage::new("api_calls", today(), 7, key("k"));
        tenant.usage().add(&usage).await.unwrap();
        tenant.usage().add(&usage).await.unwrap();
        lives.push(live.id);
    }
    let report = recorder.shutdown(Duration::from_secs(30)).await;
    assert_eq!(report.stats.written, 320, "{report:?}");
    // Exact, as of the refresh.
    cluster.refresh().await;
    for (tenant, id) in tenants.iter().zip(&lives) {
        let counts = tenant.metrics().experiment(*id).await.unwrap();
        assert_eq!((counts.assignments, counts.views, counts.conversions), (20, 60, 2));
        assert_eq!((counts.renewals, counts.refunds), (1, 2));
        let paid = quoted(tenant, *id, 1).await + quoted(tenant, *id, 1).await + quoted(tenant, *id, 2).await;
        let back = lastprice::rust_decimal::Decimal::from(8);
        assert_eq!(counts.revenue(Currency::USD).amount(), paid - back);
        let results = tenant.metrics().results(*id).await.unwrap();
        assert_eq!(results.arms.iter().map(|arm| arm.counts.assignments).sum::<u64>(), 20);
        assert_eq!(tenant.metrics().refreshed(10, None).await.unwrap().items.len(), 1);
    }
    for (tenant, id) in tenants.iter().zip(&lives) {
        let consumed = tenant.usage().try_consume("api_calls", 1, &key("c")).await.unwrap();
        assert_eq!(consumed.quota().used, 8);
        assert_eq!(tenant.usage().total("signals", today(), today()).await.unwrap(), 22);
        let merge = tenant.users().merge(&user(90), &user(3), MergePolicy::FirstQuoteWins).await.unwrap();
        assert_eq!(merge.crossovers, []);
        is_kind(tenant.users().erase(&user(4)).await, ErrorKind::Internal); // and nothing is lost: see docs/scaling.md
        assert!(tenant.assignments().get(*id, &user(4)).await.unwrap().is_some());
        assert!(!tenant.audit_trail().of_experiment(*id, 10, None).await.unwrap().items.is_empty());
    }
    // Nobody sees or touches what is another's.
    for (n, tenant) in tenants.iter().enumerate() {
        let other = lives[(n + 1) % lives.len()];
        assert!(tenant.experiments().get(other).await.unwrap().is_none());
        is_kind(tenant.metrics().by_variant(other).await, ErrorKind::NotFound);
        is_kind(tenant.experiments().pause(other).await, ErrorKind::NotFound);
        is_kind(tenant.assignments().assign(other, &user(1)).await, ErrorKind::NotFound);
        assert_eq!(tenant.experiments().list(None, 10, None).await.unwrap().items.len(), 1);
    }
    client.close().await;
    cluster.drop().await;
}

async fn quoted(
    tenant: &TenantHandle,
    id: lastprice::ExperimentId,
    n: usize,
) -> lastprice::rust_decimal::Decimal {
    tenant.assignments().get(id, &user(n)).await.unwrap().unwrap().price.amount()
}

/// Two sales, one of them after its refund, a renewal, and a refund; each twice.
async fn ledger(tenant: &TenantHandle, id: lastprice::ExperimentId) {
    let price = async |n: usize| tenant.assignments().get(id, &user(n)).await.unwrap().unwrap().price;
    let (order, late) = (OrderId::new("o1").unwrap(), OrderId::new("o2").unwrap());
    let subscription = SubscriptionId::new("s1").unwrap();
    let sale = NewConversion::sale(id, user(1), price(1).await, key("sale"));
    let entries = [
        sale.order(order.clone()).subscription(subscription.clone()),
        NewConversion::renewal(subscription, Period::new("2026-12").unwrap(), price(1).await, key("renewal")),
        NewConversion::refund(order, usd("5"), key("refund")),
        NewConversion::refund(late.clone(), usd("3"), key("early")),
        NewConversion::sale(id, user(2), price(2).await, key("late")).order(late),
    ];
    for entry in &entries {
        let first = tenant.conversions().settle(entry).await.unwrap();
        let again = tenant.conversions().settle(entry).await.unwrap();
        let _ = (first, again);
    }
    let dear = NewConversion::sale(id, user(4), usd("1"), key("dear"));
    is_kind(tenant.conversions().authorise(&dear).await.unwrap().entry(), ErrorKind::QuoteMismatch);
}

/// One connection, tenants in turn, calls that fail and transactions that are dropped: nothing of one is left for the next.
#[tokio::test]
async fn no_binding_is_left_on_any_node() {
    let Some(cluster) = Cluster::start().await else { return };
    let builder = Client::builder().url(&cluster.service).schema(&cluster.schema).require_app_role();
    let client = builder.pool_size(1).build().unwrap();
    let mut tenants = Vec::new();
    for n in 0..6 {
        let new = NewTenant::managed(format!("T{n}"), format!("ops@t{n}.example"));
        let tenant = client.tenant(client.create_tenant(new).await.unwrap().id);
        tenants.push((draft(&tenant, "x").await.id, tenant));
    }
    for round in 0..3 {
        for (id, tenant) in &tenants {
            let transaction = tenant.begin().await.unwrap();
            assert_eq!(transaction.experiments().get(*id).await.unwrap().unwrap().revision, 1 + round);
            transaction
                .experiments()
                .edit(*id, 99, lastprice::ExperimentEdit::new().name("No"))
                .await
                .unwrap_err();
            drop(transaction);
            let edit = lastprice::ExperimentEdit::new().name(format!("Round {round}"));
            tenant.experiments().edit(*id, 1 + round, edit).await.unwrap();
            let all = tenant.experiments().list(None, 10, None).await.unwrap().items;
            assert_eq!(all.iter().map(|e| e.id).collect::<Vec<_>>(), [*id]);
        }
    }
    // What is not bound sees nothing, on whatever node it is.
    let app = connect(&cluster.service).await;
    for table in ["tenants", "experiments"] {
        let sql = format!("SELECT count(*) FROM {}.{table}", cluster.schema);
        assert_eq!(app.query_one(&sql, &[]).await.unwrap().get::<_, i64>(0), 0);
    }
    // Layers are kept apart, and only drafts are deleted.
    let (id, tenant) = &tenants[0];
    tenant.experiments().activate(*id).await.unwrap();
    let new = lastprice::NewExperiment::new("y", "Y", Currency::USD, three());
    let y = tenant.experiments().create(new).await.unwrap().id;
    tenant.experiments().delete_draft(y).await.unwrap();
    is_kind(tenant.experiments().delete_draft(*id).await, ErrorKind::Conflict);
    let assigner = client.assigner(tenant.tenant_id()).await.unwrap();
    tenant.experiments().pause(*id).await.unwrap();
    assigner.confirm().await.unwrap();
    assert_eq!(assigner.assign("x", &user(1)).unwrap().reason(), lastprice::Reason::Paused);
    client.close().await;
    cluster.drop().await;
}

/// What the client does where it finds the extension, on a server that has it by name only.
#[tokio::test]
async fn where_citus_is_found_the_tenant_is_bound_by_the_function() {
    let two = two_tenants().await;
    let traced = "CREATE TABLE bound (tenant uuid); GRANT INSERT ON bound TO lastprice_app;
                  ALTER FUNCTION app_set_tenant(uuid) RENAME TO app_set_tenant_itself;
                  CREATE FUNCTION app_set_tenant(tenant uuid) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
                    INSERT INTO bound VALUES (tenant); PERFORM app_set_tenant_itself(tenant); END $$";
    two.owner.batch_execute(traced).await.unwrap();
    let bound =
        async || two.owner.query_one("SELECT count(*) FROM bound", &[]).await.unwrap().get::<_, i64>(0);
    let client = two.client_that_polls(Duration::from_secs(3600));
    client.tenant(two.id).tenants().get().await.unwrap();
    assert_eq!(bound().await, 0, "not where there is none");
    client.close().await;

    extension(&two.database).await;
    let client = two.client_that_polls(Duration::from_secs(3600));
    let acme = client.tenant(two.id).with_actor(Actor::new("ann").unwrap());
    assert_eq!(acme.tenants().get().await.unwrap().unwrap().id, two.id);
    assert_eq!(bound().await, 1, "in the same flight");
    let live = active(&acme, "pro").await;
    assert_eq!(live.updated_by.as_deref(), Some("ann"));
    let transaction = acme.begin().await.unwrap();
    assert!(transaction.assignments().assign(live.id, &user(1)).await.unwrap().is_new());
    transaction.views().record(&NewView::new(live.id, user(1))).await.unwrap();
    transaction.commit().await.unwrap();
    let globex = client.tenant(two.other_id);
    assert!(globex.experiments().get(live.id).await.unwrap().is_none());
    assert_eq!(acme.metrics().experiment(live.id).await.unwrap().views, 1);
    two.bystander_saw_nothing().await;
}

/// Its name, and nothing of it.
async fn extension(database: &TestDatabase) {
    let superuser = database.connect_superuser().await.unwrap();
    let sql = "INSERT INTO pg_catalog.pg_extension
               SELECT 999999, 'citus', extowner, extnamespace, extrelocatable, '0', NULL, NULL
               FROM pg_catalog.pg_extension WHERE extname = 'plpgsql'";
    superuser.batch_execute(sql).await.unwrap();
}
