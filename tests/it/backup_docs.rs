//! Every command of docs/backups.md, in its order: from one server into another, which knows nothing of ours before.

use std::process::Command;

use lastprice::{
    Client, ConversionOutcome, Currency, MetricCounts, NewConversion, NewUsage, NewView, OrderId,
    SubscriptionId, TenantHandle, TenantId,
};
use lastprice_testkit::PrivateCluster;

use crate::audit_doctor::doctor;
use crate::support_docs::run_all;
use crate::support_repo::*;
use crate::support_shop::assert_isolated;
use crate::support_sql::{TemporaryDir, assert_exact, connect, program, rows, run};

const DOCUMENT: &str = include_str!("../../docs/backups.md");

#[tokio::test]
async fn every_command_restores_roles_rows_isolation_and_metrics() {
    for tool in ["psql", "pg_dump", "pg_dumpall", "pg_restore"] {
        if program(tool).is_none() {
            return;
        }
    }
    let Some(doctor) = doctor() else { return };
    let old = PrivateCluster::builder().start().await.unwrap();
    let new = PrivateCluster::builder().password_auth().start().await.unwrap();
    let two = two_tenants_in(old.database().await.unwrap()).await;
    sell(&two).await;
    let superuser = two.database.connect_superuser().await.unwrap();
    // The new server asks for passwords: the service's comes with its role.
    let verifier = format!("ALTER ROLE lastprice_service PASSWORD '{}'", PrivateCluster::PASSWORD);
    superuser.batch_execute(&verifier).await.unwrap();
    let url = |role: &str, database: &str| new.url_for(role, database);

    let dir = TemporaryDir::new("backups");
    // What the document calls `shop` has a name of the testkit's on the old server.
    let mut shell = Command::new("bash");
    shell.current_dir(&dir.0);
    shell.env("OLD_URL", two.database.superuser_url()).env("NEW_SERVER", new.superuser_url("postgres"));
    shell.env("NEW_URL", new.superuser_url("shop")).env("SERVICE_URL", url("lastprice_service", "shop"));
    let stderr = run_all(DOCUMENT, "", &doctor, &mut shell).err;
    let errors: Vec<&str> = stderr.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(matches!(errors[..], [one] if one.contains("role \"postgres\" already exists")), "{stderr}");

    // Whom row-level security binds cannot make a backup with rows missing.
    let mut partial = Command::new(program("pg_dump").unwrap());
    run(partial.args(["--data-only", "-d", &two.database.app_url()])).expect_refusal(&["error"]);

    let expected = Saved::of(&two.client, &superuser, &two).await;
    for database in ["shop", "shop_in_two_parts"] {
        let service = Client::builder().url(url("lastprice_service", database)).require_app_role();
        let service = service.keys(ring()).paid_api_key("the platform's key").build().unwrap();
        let superuser = connect(&new.superuser_url(database)).await;
        let audit = service.verify_isolation().await.unwrap();
        assert!(audit.is_clean(), "{database}: {audit}");
        assert_exact(&superuser, database).await;
        assert_eq!(Saved::of(&service, &superuser, &two).await, expected, "{database}");
        superuser.batch_execute("SELECT recount_experiment_metrics()").await.unwrap();
        assert_eq!(Saved::of(&service, &superuser, &two).await, expected, "{database}, recounted");
        // The encrypted key opens with the key that the backup does not have.
        assert_eq!(own_key(&service.tenant(two.other_id)).await.as_deref(), Some("globex's key"));
        let globex = service.tenant(two.other_id).experiments().list(None, 10, None).await.unwrap().items;
        assert!(service.tenant(two.id).experiments().get(globex[0].id).await.unwrap().is_none());
        // And everything goes on, for these two tenants and for new ones.
        let again = sale(&two.acme, "charge:1", "19").await;
        let repeated = service.tenant(two.id).conversions().settle(&again).await.unwrap();
        assert!(matches!(repeated, ConversionOutcome::Duplicate(_)), "{repeated:?}");
        assert_isolated(&service).await;
        assert_exact(&superuser, "restored, and written to").await;
    }
}

/// All rows by table, and what the application reads of both tenants' metrics.
#[derive(Debug, PartialEq)]
struct Saved {
    rows: Vec<(String, String)>,
    metrics: Vec<MetricCounts>,
    usage: Vec<u64>,
}

impl Saved {
    async fn of(client: &Client, superuser: &tokio_postgres::Client, two: &TwoTenants) -> Saved {
        // Deltas and totals are where metrics and usage are kept; what they add up to is what counts. Rows that are restored apart
        // from their definitions are written down as new ones besides what the trail said of them.
        let tables = "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
                      AND c.relname NOT IN ('metric_totals', 'metric_deltas', 'usage', 'usage_totals', 'audit_trail')
                      UNION ALL VALUES ('(SELECT tenant_id, metric, day, value, idempotency_key, created_at FROM usage)'),
                        ('(SELECT * FROM audit_trail WHERE at <= (SELECT max(created_at) FROM usage))') ORDER BY 1";
        let mut saved = Saved { rows: Vec::new(), metrics: Vec::new(), usage: Vec::new() };
        for table in rows(superuser, tables).await.unwrap() {
            let table = table[0].clone().unwrap();
            let all =
                format!("SELECT COALESCE(string_agg(t::text, E'\\n' ORDER BY t::text), '') FROM {table} t");
            saved.rows.push((table, rows(superuser, &all).await.unwrap()[0][0].clone().unwrap()));
        }
        for tenant in [two.id, two.other_id] {
            saved.metrics.push(metrics_of(client, tenant).await);
            for metric in ["api_calls", "signals", "experiments"] {
                saved
                    .usage
                    .push(client.tenant(tenant).usage().total(metric, today(), today()).await.unwrap());
            }
        }
        saved
    }
}

async fn metrics_of(client: &Client, tenant: TenantId) -> MetricCounts {
    let tenant = client.tenant(tenant);
    let experiment = tenant.experiments().list(None, 10, None).await.unwrap().items[0].id;
    tenant.metrics().experiment(experiment).await.unwrap()
}

/// Acme has what Globex has, and more: in totals and, since, in deltas; and a refund that waits for its sale.
async fn sell(two: &TwoTenants) {
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..20).await;
    two.acme.views().record(&NewView::new(id, user(1))).await.unwrap();
    let first = sale(&two.acme, "charge:1", "19").await;
    two.acme.conversions().settle(&first).await.unwrap().entry().unwrap().unwrap();
    two.owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    let second =
        sale(&two.acme, "charge:2", "29.90").await.subscription(SubscriptionId::new("sub-2").unwrap());
    two.acme.conversions().settle(&second).await.unwrap().entry().unwrap().unwrap();
    let order = |name: &str| OrderId::new(name).unwrap();
    for (of, name) in [("charge:1", "back:1"), ("nothing yet", "back:2")] {
        let back = NewConversion::refund(order(of), usd("5"), key(name));
        let outcome = two.acme.conversions().settle(&back).await.unwrap();
        assert_eq!(matches!(outcome, ConversionOutcome::Waiting), of == "nothing yet", "{outcome:?}");
    }
    two.acme.views().record(&NewView::new(id, user(2))).await.unwrap();
    two.acme.usage().add(&NewUsage::new("api_calls", today(), 3, key("charge:1"))).await.unwrap();
    let metrics = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!((metrics.views, metrics.conversions, metrics.revenue(Currency::USD)), (2, 2, usd("43.90")));
}

/// A sale to the user 1, whose order has the name of its key.
async fn sale(tenant: &TenantHandle, name: &str, price: &str) -> NewConversion {
    let experiment = tenant.experiments().list(None, 10, None).await.unwrap().items[0].id;
    NewConversion::sale(experiment, user(1), usd(price), key(name)).order(OrderId::new(name).unwrap())
}
