//! PgBouncer between us and the server: everything works in session and in transaction mode, nobody gets another's rows,
//! and what could not be safe there is refused.

use std::path::PathBuf;
use std::time::Duration;

use lastprice::{
    Admin, Client, ClientBuilder, ConversionOutcome, Currency, Error, ErrorKind, NewRecommendation,
    NewTenant, NewUsage, NewView, Objective, OrderId, Period, StatementMode, SubscriptionId, TenantHandle,
    TenantScope,
};
use lastprice_testkit::TestDatabase;
use tokio::task::JoinSet;

use crate::support_pooler::{Pooler, pgbouncer};
use crate::support_repo::*;
use crate::support_sql::{Random, connect};
use crate::wire::Wire;

fn through(url: &str, mode: StatementMode) -> ClientBuilder {
    Client::builder().url(url).pool_size(2).statement_mode(mode).require_app_role()
}

async fn new_tenant(client: &Client, name: &str) -> TenantHandle {
    let new = NewTenant::managed(name, format!("ops@{name}.example"));
    client.tenant(client.create_tenant(new).await.unwrap().id)
}

/// Every repository, by whatever form of scope: an experiment's life, and all that is stored in it.
async fn tour(scope: &TenantScope<'_>, name: &str, amount: u64) {
    assert!(scope.tenants().get().await.unwrap().is_some());
    let experiments = scope.experiments();
    let id = experiments.create(new_experiment(name)).await.unwrap().id;
    let revision = scope.experiments().get(id).await.unwrap().unwrap().revision;
    let edit = lastprice::ExperimentEdit::new().name("Another name");
    scope.experiments().edit(id, revision, edit).await.unwrap();
    scope.experiments().activate(id).await.unwrap();
    assert_eq!(scope.experiments().by_key(name).await.unwrap().unwrap().id, id);
    assert!(scope.experiments().list(None, 100, None).await.unwrap().items.iter().any(|e| e.id == id));
    scope.experiments().pause(id).await.unwrap();
    scope.experiments().resume(id).await.unwrap();

    let buyer = lastprice::UserId::new(format!("buyer of {name}")).unwrap();
    let quote = scope.assignments().assign(id, &buyer).await.unwrap();
    assert_eq!(scope.assignments().get(id, &buyer).await.unwrap().unwrap().price, quote.price());
    assert_eq!(scope.assignments().list_by_user(&buyer, 10, None).await.unwrap().items.len(), 1);
    let _ = scope.views().record(&NewView::new(id, buyer.clone())).await.unwrap();

    let order = OrderId::new(format!("order of {name}")).unwrap();
    let subscription = SubscriptionId::new(format!("subscription of {name}")).unwrap();
    let k = |what: &str| key(&format!("{what} of {name}"));
    let sale = lastprice::NewConversion::sale(id, buyer.clone(), quote.price(), k("sale"))
        .order(order.clone())
        .subscription(subscription.clone());
    let authorised = scope.conversions().authorise(&sale).await.unwrap();
    assert!(matches!(authorised, ConversionOutcome::Recorded(_)), "{authorised:?}");
    assert!(matches!(scope.conversions().settle(&sale).await.unwrap(), ConversionOutcome::Duplicate(_)));
    let period = Period::new("2026-02").unwrap();
    let renewal =
        lastprice::NewConversion::renewal(subscription.clone(), period, quote.price(), k("renewal"));
    scope.conversions().settle(&renewal).await.unwrap().entry().unwrap().unwrap();
    let refund = lastprice::NewConversion::refund(order.clone(), usd("1"), k("refund"));
    scope.conversions().authorise(&refund).await.unwrap().entry().unwrap().unwrap();
    assert!(scope.conversions().by_key(&k("sale")).await.unwrap().is_some());
    assert_eq!(scope.conversions().list_by_user(&buyer, 10, None).await.unwrap().items.len(), 3);
    assert_eq!(scope.conversions().list_by_order(&order, 10, None).await.unwrap().items.len(), 2);
    assert_eq!(
        scope.conversions().list_by_subscription(&subscription, 10, None).await.unwrap().items.len(),
        2
    );

    let _ = scope.usage().add(&NewUsage::new(name, today(), amount, k("usage"))).await.unwrap();
    assert_eq!(scope.usage().total(name, today(), today()).await.unwrap(), amount);
    assert_eq!(scope.usage().by_day(name, today(), today()).await.unwrap().len(), 1);

    let new = NewRecommendation::new(id, usd("29"), 0.5, Objective::Revenue);
    let recommended = scope.recommendations().store(&new).await.unwrap().id;
    assert!(scope.recommendations().latest(id).await.unwrap().is_some());
    scope.recommendations().reject(recommended, "not now").await.unwrap();
    assert!(scope.recommendations().get(recommended).await.unwrap().is_some());

    let counts = scope.metrics().experiment(id).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions), (1, 1, 1));
    let revenue = quote.price().checked_add(quote.price()).unwrap().checked_sub(usd("1")).unwrap();
    assert_eq!(counts.revenue(Currency::USD), revenue);
    assert!(!scope.metrics().by_variant(id).await.unwrap().is_empty());
    assert_eq!(scope.metrics().by_day(id, today(), today()).await.unwrap().len(), 1);
    scope.metrics().fold().await.unwrap();
    scope.metrics().refreshed(10, None).await.unwrap();
    scope.metrics().report(id).await.unwrap();
    scope.experiments().complete(id, None).await.unwrap();
}

/// The three forms of a scope, the recorder and the assigner.
async fn every_form(client: &Client, url: &str, tenant: &TenantHandle, amount: u64) {
    tour(tenant, "alone", amount).await;
    let transaction = tenant.begin().await.unwrap();
    tour(&transaction, "together", amount).await;
    transaction.commit().await.unwrap();
    let undone = tenant.begin().await.unwrap();
    undone.experiments().create(new_experiment("undone")).await.unwrap();
    undone.rollback().await.unwrap();
    assert!(tenant.experiments().by_key("undone").await.unwrap().is_none());

    let mut host = connect(url).await;
    // As a host behind such a pooler begins and ends: by simple messages, and no named statement of its own.
    let transaction = host.transaction().await.unwrap();
    tour(&client.within(&transaction, tenant.tenant_id()), "within", amount).await;
    transaction.commit().await.unwrap();

    let experiment = active(tenant, "recorded").await.id;
    assign(tenant, experiment, 0..3).await;
    let recorder = client.recorder();
    for n in 0..3 {
        let tracked = recorder.track(tenant.tenant_id(), NewView::new(experiment, user(n))).await.unwrap();
        assert!(tracked.is_stored(), "{tracked:?}");
    }
    assert_eq!(recorder.shutdown(Duration::from_secs(10)).await.stats.written, 3);
    let assigner = client.assigner(tenant.tenant_id()).await.unwrap();
    let shown = assigner.assign("recorded", &user(7)).unwrap().price();
    assert_eq!(assigner.quote("recorded", &user(7)).await.unwrap().price(), shown);
}

#[tokio::test]
async fn everything_works_in_session_and_in_transaction_mode() {
    let Some(pgbouncer) = pgbouncer() else { return };
    for (pooled, mode) in [
        ("transaction", StatementMode::Typed),
        ("session", StatementMode::Typed),
        ("session", StatementMode::Prepared),
    ] {
        let pooler = Pooler::start(&pgbouncer, pooled, 20).await;
        let client = through(&pooler.url(), mode).build().unwrap();
        let [acme, globex] = [new_tenant(&client, "acme").await, new_tenant(&client, "globex").await];
        for (tenant, amount) in [(&acme, 7), (&globex, 11)] {
            every_form(&client, &pooler.url(), tenant, amount).await;
        }
        for (tenant, amount) in [(&acme, 7), (&globex, 11)] {
            assert_eq!(tenant.usage().total("alone", today(), today()).await.unwrap(), amount);
            assert_eq!(tenant.experiments().list(None, 100, None).await.unwrap().items.len(), 4);
        }
        let owner = pooler.database.connect_owner().await.unwrap();
        let strangers = "SELECT count(*) FROM usage WHERE (tenant_id, value) NOT IN (($1, 7), ($2, 11))";
        let (a, b) = (acme.tenant_id().uuid(), globex.tenant_id().uuid());
        assert_eq!(owner.query_one(strangers, &[&a, &b]).await.unwrap().get::<_, i64>(0), 0);
    }
}

/// Clients of a dozen tenants, each with connections of its own to the pooler, on four connections to the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dozen_clients_share_four_connections() {
    const CLIENTS: u64 = 12;
    const CALLS: u64 = 30;
    let Some(pgbouncer) = pgbouncer() else { return };
    let pooler = Pooler::start(&pgbouncer, "transaction", 4).await;
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let url = pooler.url();
        clients.spawn(async move {
            let mut random = Random(n);
            let client = through(&url, StatementMode::Typed).pool_size(1 + n as usize % 2).build().unwrap();
            let tenant = new_tenant(&client, &format!("tenant-{n}")).await;
            let experiment = active(&tenant, "pro-plan").await.id;
            // A user, an order, a metric: the same names for everybody, and an amount that tells whose it is.
            let amount = n + 1;
            let (mut added, mut viewed) = (0, 0);
            for call in 0..CALLS {
                let k = key(&format!("key-{call}"));
                match random.below(5) {
                    0 => {
                        let usage = NewUsage::new("calls", today(), amount, k);
                        let _ = tenant.usage().add(&usage).await.unwrap();
                        added += amount;
                    }
                    1 => {
                        let transaction = tenant.begin().await.unwrap();
                        transaction.assignments().assign(experiment, &user(0)).await.unwrap();
                        let view = NewView::new(experiment, user(0));
                        let _ = transaction.views().record(&view).await.unwrap();
                        transaction.commit().await.unwrap();
                        viewed += 1;
                    }
                    2 => {
                        let transaction = tenant.begin().await.unwrap();
                        let usage = NewUsage::new("calls", today(), 1_000_000, k);
                        let _ = transaction.usage().add(&usage).await.unwrap();
                        drop(transaction); // and nothing of it remains
                    }
                    3 => {
                        let mut host = connect(&url).await;
                        let transaction = host.transaction().await.unwrap();
                        let scope = client.within(&transaction, tenant.tenant_id());
                        let _ = scope.usage().add(&NewUsage::new("calls", today(), amount, k)).await.unwrap();
                        transaction.commit().await.unwrap();
                        added += amount;
                    }
                    _ => {
                        let all = tenant.experiments().list(None, 10, None).await.unwrap().items;
                        assert_eq!(all.iter().map(|e| e.id).collect::<Vec<_>>(), [experiment]);
                        let name = tenant.tenants().get().await.unwrap().unwrap().name;
                        assert_eq!(name, format!("tenant-{n}"));
                    }
                }
                assert_eq!(tenant.usage().total("calls", today(), today()).await.unwrap(), added);
            }
            assert_eq!(tenant.metrics().experiment(experiment).await.unwrap().views, viewed);
            (tenant.tenant_id(), amount)
        });
    }
    let tenants = clients.join_all().await;
    let owner = pooler.database.connect_owner().await.unwrap();
    for (tenant, amount) in tenants {
        let strange = "SELECT count(*) FROM usage WHERE (tenant_id = $1) <> (value = $2::int8)";
        let amount = i64::try_from(amount).unwrap();
        let strange = owner.query_one(strange, &[&tenant.uuid(), &amount]).await.unwrap();
        assert_eq!(strange.get::<_, i64>(0), 0, "rows of this amount are this tenant's, and no others");
    }
    let backends = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'lastprice_service'";
    let superuser = pooler.database.connect_superuser().await.unwrap();
    assert!(superuser.query_one(backends, &[]).await.unwrap().get::<_, i64>(0) <= 4);
}

/// As without a pooler: all that is sent for a call is sent before anything is answered.
#[tokio::test]
async fn a_call_is_one_flight_through_the_pooler() {
    let Some(pgbouncer) = pgbouncer() else { return };
    let pooler = Pooler::start(&pgbouncer, "transaction", 4).await;
    let wire = Wire::before(&pooler.url()).await;
    let client = through(wire.url(), StatementMode::Typed).pool_size(1).build().unwrap();
    let [acme, globex] = [new_tenant(&client, "acme").await, new_tenant(&client, "globex").await];
    for _ in 0..20 {
        for tenant in [&acme, &globex] {
            wire.take_sent();
            wire.answer_only(0);
            let tenants = tenant.tenants();
            let mut call = std::pin::pin!(tenants.get());
            let mut sent = Vec::new();
            for _ in 0..1000 {
                tokio::time::timeout(Duration::from_millis(10), &mut call).await.unwrap_err();
                sent.extend(wire.take_sent());
                if sent.len() >= 7 {
                    break;
                }
            }
            assert_eq!((sent.len(), sent.last().unwrap().as_str()), (7, "Q COMMIT"), "{sent:?}");
            wire.answer_all();
            assert_eq!(call.await.unwrap().unwrap().id, tenant.tenant_id());
            assert_eq!(wire.take_sent(), [""; 0], "one round trip");
        }
    }
}

fn is_refused<T: std::fmt::Debug>(result: Result<T, Error>, word: &str) {
    let error = result.expect_err(word);
    assert_eq!(error.kind(), ErrorKind::IsolationNotEnforced, "{error:?}");
    assert!(error.to_string().contains(word), "{error}");
}

const TYPED: &str = "statement_mode(StatementMode::Typed)";

/// `ignore_startup_parameters` lets options pass that PgBouncer does not know, and forgets them.
const IGNORES: [&str; 2] = ["", "ignore_startup_parameters = options"];

#[tokio::test]
async fn named_statements_are_refused_where_connections_are_lent() {
    let Some(pgbouncer) = pgbouncer() else { return };
    for more in IGNORES {
        for (size, round_robin) in [(1, 0), (2, 1), (4, 0), (4, 1)] {
            let more = format!("{more}\nserver_round_robin = {round_robin}");
            let pooler = Pooler::start_in(&pgbouncer, "transaction", size, &more).await;
            for _ in 0..5 {
                let client = through(&pooler.url(), StatementMode::Prepared).pool_size(1).build().unwrap();
                is_refused(client.ready().await, TYPED);
                is_refused(client.ready().await, TYPED);
            }
            through(&pooler.url(), StatementMode::Typed).build().unwrap().ready().await.unwrap();
        }
    }
}

/// Under load connections are the same ones by chance, now and then.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_client_slips_through_under_load() {
    let Some(pgbouncer) = pgbouncer() else { return };
    for size in [2, 4] {
        let pooler = Pooler::start_in(&pgbouncer, "transaction", size, IGNORES[1]).await;
        let mut load = JoinSet::new();
        for n in 0..8 {
            let url = pooler.url();
            load.spawn(async move {
                let client = through(&url, StatementMode::Typed).pool_size(1).build().unwrap();
                let tenant = new_tenant(&client, &format!("load-{n}")).await;
                loop {
                    tenant.tenants().get().await.unwrap();
                }
            });
        }
        let mut clients = JoinSet::new();
        for _ in 0..12 {
            let url = pooler.url();
            clients.spawn(async move {
                for _ in 0..5 {
                    let client = through(&url, StatementMode::Prepared).pool_size(1).build().unwrap();
                    is_refused(client.ready().await, TYPED);
                }
            });
        }
        clients.join_all().await;
        load.shutdown().await;
    }
}

#[tokio::test]
async fn named_statements_are_allowed_where_connections_are_ones_own() {
    let direct = TestDatabase::new().await.unwrap();
    through(&direct.app_url(), StatementMode::Prepared).build().unwrap().ready().await.unwrap();
    let Some(pgbouncer) = pgbouncer() else { return };
    for more in IGNORES {
        // With a single connection the one that asks waits for itself.
        for size in [1, 20] {
            let pooler = Pooler::start_in(&pgbouncer, "session", size, more).await;
            let client = through(&pooler.url(), StatementMode::Prepared).pool_size(1).build().unwrap();
            let [acme, globex] = [new_tenant(&client, "acme").await, new_tenant(&client, "globex").await];
            for tenant in [acme, globex] {
                let id = tenant.tenants().get().await.unwrap().unwrap().id;
                assert_eq!(id, tenant.tenant_id());
            }
        }
    }
}

/// A server that has no connection left for the question is worked with all the same.
#[tokio::test]
async fn a_server_with_a_single_connection_is_enough() {
    let database = TestDatabase::new().await.unwrap();
    let superuser = database.connect_superuser().await.unwrap();
    let limit = format!("ALTER DATABASE {} WITH CONNECTION LIMIT 1", database.name());
    superuser.batch_execute(&limit).await.unwrap();
    // The superuser's own counts.
    superuser.batch_execute(&limit.replace("LIMIT 1", "LIMIT 2")).await.unwrap();
    let client = through(&database.app_url(), StatementMode::Prepared).pool_size(1).build().unwrap();
    client.ready().await.unwrap();
}

#[tokio::test]
async fn statement_mode_is_refused_in_plain_words() {
    let Some(pgbouncer) = pgbouncer() else { return };
    let pooler = Pooler::start(&pgbouncer, "statement", 4).await;
    for mode in [StatementMode::Typed, StatementMode::Prepared] {
        let client = through(&pooler.url(), mode).build().unwrap();
        is_refused(client.ready().await, "statement mode");
        is_refused(client.create_tenant(NewTenant::managed("Acme", "a@example.com")).await, "statement mode");
    }
    let owner = pooler.database.connect_owner().await.unwrap();
    assert_eq!(owner.query_one("SELECT count(*) FROM tenants", &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn an_admin_does_not_migrate_where_connections_are_lent() {
    let Some(pgbouncer) = pgbouncer() else { return };
    let owner = async |mode: &str, pgbouncer: &PathBuf| {
        let pooler = Pooler::start(pgbouncer, mode, 4).await;
        let admin = Admin::connect(&pooler.through(&pooler.database.owner_url())).await.unwrap();
        (pooler, admin)
    };
    let (pooler, admin) = owner("transaction", &pgbouncer).await;
    is_refused(admin.migrate().await, "server itself");
    // All else goes through.
    assert!(admin.refresh_metrics().await.unwrap());
    admin.recount_metrics().await.unwrap();
    assert!(admin.tenants().list(10, None).await.unwrap().items.is_empty());
    Admin::connect(&pooler.database.owner_url()).await.unwrap().migrate().await.unwrap();
    let (_pooler, admin) = owner("session", &pgbouncer).await;
    admin.migrate().await.unwrap();
}
