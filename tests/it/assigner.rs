//! The assigner: what it knows, how soon, and that it goes on.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lastprice::{Client, ErrorKind, NewTenant, Reason, TenantChange, tokio_postgres};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::support::poll_n;
use crate::support_repo::*;

/// Long enough that nothing is seen by polling while a test runs.
const NEVER: Duration = Duration::from_secs(3600);

/// What anybody who has a login hears.
async fn listen(database: &TestDatabase) -> (tokio_postgres::Client, UnboundedReceiver<String>) {
    let config: tokio_postgres::Config = database.app_url().parse().unwrap();
    let (client, mut connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let (sender, heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(note) = message {
                drop(sender.send(note.payload().to_owned()));
            }
        }
    });
    client.batch_execute("LISTEN lastprice").await.unwrap();
    (client, heard)
}

#[tokio::test]
async fn what_assignments_are_made_by_is_told_and_nothing_else() {
    let two = two_tenants().await;
    let (listener, mut heard) = listen(&two.database).await;
    let mut told = async || {
        // In the order of commits: whatever came before this has arrived when it has.
        listener.batch_execute("NOTIFY lastprice, 'end'").await.unwrap();
        let mut before = 0;
        while heard.recv().await.unwrap() != "end" {
            before += 1;
        }
        before
    };
    let experiments = two.acme.experiments();
    let id = draft(&two.acme, "x").await.id;
    assert_eq!(told().await, 1, "a draft");
    experiments.activate(id).await.unwrap();
    assert_eq!(told().await, 1, "an active one");
    experiments.force(id, &user(1), Some("39")).await.unwrap();
    assert_eq!(told().await, 1, "a list");
    assign(&two.acme, id, 0..10).await;
    two.acme.tenants().update(TenantChange::new().name("Other")).await.unwrap();
    assert_eq!(told().await, 0, "quotes, and a tenant's name");
    two.acme.tenants().update(TenantChange::new().holdout(lastprice::bucketing::Share::ALL)).await.unwrap();
    assert_eq!(told().await, 1, "a holdout");
    let transaction = two.acme.begin().await.unwrap();
    transaction.experiments().pause(id).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(told().await, 0, "what was rolled back");
    let imported =
        "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason)
                    VALUES ($1, $2, 'u', '19', 1, 'USD', 'imported')";
    two.owner.execute(imported, &[&two.id.uuid(), &id.uuid()]).await.unwrap();
    assert_eq!(told().await, 1, "the first quote that the hash does not say");
    two.owner.execute("DELETE FROM tenants WHERE id = $1", &[&two.id.uuid()]).await.unwrap();
    assert!(told().await > 0, "the end");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn it_answers_from_memory_and_the_database_makes_the_quote() {
    let two = two_tenants().await;
    let live = active(&two.acme, "pro").await;
    let assigner = two.client.assigner(two.id).await.unwrap();
    assert_eq!(assigner.status().experiments, 1);
    let mut prices = HashSet::new();
    for n in 0..200 {
        let decision = assigner.assign("pro", &user(n)).unwrap();
        assert!(decision.is_certain() && decision.reason() == Reason::Randomised);
        assert_eq!((decision.experiment_id(), decision.phase()), (live.id, 1));
        let quote = assigner.quote("pro", &user(n)).await.unwrap();
        assert_eq!((quote.variant(), quote.price()), (decision.variant(), decision.price()));
        assert!(quote.is_new() && quote.book() == decision.book());
        prices.insert(decision.price());
    }
    assert_eq!(prices.len(), 3);
    assert!(!assigner.quote("pro", &user(1)).await.unwrap().is_new());
    // Another tenant's key is no key of this one's.
    assert!(assigner.assign("pro-plan", &user(1)).is_none());
    is_kind(assigner.quote("pro-plan", &user(1)).await, ErrorKind::NotFound);
    refused(assigner.quote("no key", &user(1)).await, "key");
    let theirs = two.client.assigner(two.other_id).await.unwrap();
    assert!(theirs.assign("pro-plan", &user(1)).is_some() && theirs.assign("pro", &user(1)).is_none());
    is_kind(two.client.assigner(lastprice::TenantId::new()).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn changes_arrive_by_notification() {
    let two = two_tenants().await;
    let client = two.client_that_polls(NEVER);
    let (assigner, theirs) =
        (client.assigner(two.id).await.unwrap(), client.assigner(two.other_id).await.unwrap());
    eventually("it hears", async || assigner.status().is_listening).await;
    let version = theirs.version();
    let now = |what: fn(&lastprice::Decision<'_>) -> bool| {
        let assigner = assigner.clone();
        async move || assigner.assign("x", &user(1)).is_some_and(|decision| what(&decision))
    };
    let id = draft(&two.acme, "x").await.id;
    eventually("a draft", now(|d| d.reason() == Reason::Draft && d.variant() == "29")).await;
    two.acme.experiments().activate(id).await.unwrap();
    eventually("active", now(|d| d.reason() == Reason::Randomised && d.is_certain())).await;
    two.acme.experiments().pause(id).await.unwrap();
    eventually("paused", now(|d| d.reason() == Reason::Paused && !d.is_certain())).await;
    two.acme.experiments().resume(id).await.unwrap();
    two.acme.experiments().force(id, &user(1), Some("39")).await.unwrap();
    eventually("forced", now(|d| d.reason() == Reason::Forced && d.variant() == "39")).await;
    two.acme.experiments().force(id, &user(1), None).await.unwrap();
    let all = lastprice::bucketing::Share::ALL;
    two.acme.tenants().update(TenantChange::new().holdout(all)).await.unwrap();
    eventually("held out", now(|d| d.reason() == Reason::HeldOut)).await;
    two.acme.experiments().complete(id, None).await.unwrap();
    eventually("completed", now(|d| d.reason() == Reason::Completed)).await;
    assert_eq!(theirs.version(), version, "the other tenant's snapshot was left alone");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_created_after_the_snapshot_can_be_quoted() {
    let two = two_tenants().await;
    let client = two.client_that_polls(NEVER);
    let assigner = client.assigner(two.id).await.unwrap();
    client.close().await; // hears of nothing any more
    let assigner_of_nothing = assigner.assign("x", &user(1));
    assert!(assigner_of_nothing.is_none());
    is_kind(assigner.quote("x", &user(1)).await, ErrorKind::Closed);
    let other = two.client.assigner(two.id).await.unwrap();
    let id = active(&two.acme, "x").await.id;
    assert_eq!(other.quote("x", &user(1)).await.unwrap().quote().unwrap().experiment_id, id);
    two.bystander_saw_nothing().await;
}

/// As soon as `pause` has returned, whoever has that version gives nobody a variant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_assigned_by_the_version_of_a_pause_or_a_later_one() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let client = two.client_that_polls(Duration::from_millis(50));
    let assigner = client.assigner(two.id).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (assigner, stop) = (assigner.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut seen = HashSet::new();
                for n in 0.. {
                    let decision = assigner.assign("x", &user(n % 100)).unwrap();
                    seen.insert((decision.version(), decision.reason()));
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                seen
            })
        })
        .collect();
    let mut paused = HashSet::new();
    let experiments = two.acme.experiments();
    for _ in 0..50 {
        experiments.pause(id).await.unwrap();
        let confirmed = assigner.confirm().await.unwrap();
        assert!(paused.insert(confirmed) && assigner.version() == confirmed, "no version comes twice");
        assert_eq!(assigner.assign("x", &user(1)).unwrap().reason(), Reason::Paused);
        experiments.resume(id).await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let mut swaps = HashSet::new();
    for reader in readers {
        for (version, reason) in tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap() {
            let expected = if paused.contains(&version) { Reason::Paused } else { Reason::Randomised };
            assert_eq!(reason, expected, "version {version}");
            swaps.insert(version);
        }
    }
    assert!(swaps.len() > 20, "the readers saw {} versions", swaps.len());
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn nobody_listens_for_nobody() {
    let two = two_tenants().await;
    let client = two.client_that_polls(Duration::from_millis(50));
    let superuser = two.database.connect_superuser().await.unwrap();
    let listeners = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'";
        superuser.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)
    };
    for _ in 0..3 {
        let (ours, theirs) =
            (client.assigner(two.id).await.unwrap(), client.assigner(two.other_id).await.unwrap());
        eventually("it hears", async || ours.status().is_listening && listeners().await == 1).await;
        drop(ours);
        drop(theirs);
        eventually("the connection is closed", async || listeners().await == 0).await;
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn many_tenants_listen_on_one_connection_that_says_nothing_to_strangers() {
    let two = two_tenants().await;
    let client = two.client_that_polls(NEVER);
    let mut assigners = vec![client.assigner(two.id).await.unwrap()];
    let mut tenants = Vec::new();
    for n in 0..30 {
        let new = NewTenant::managed(format!("T{n}"), format!("t{n}@x.example"));
        let id = client.create_tenant(new).await.unwrap().id;
        tenants.push(id);
        assigners.push(client.assigner(id).await.unwrap());
    }
    eventually("it hears", async || assigners[0].status().is_listening).await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let listeners = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name = 'lastprice' AND query LIKE 'LISTEN%'";
        superuser.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)
    };
    assert_eq!(listeners().await, 1);

    // A stranger listens as well: what arrives has nothing of the tenant's, and is the same each time.
    let (_stranger, mut heard) = listen(&two.database).await;
    let mut payloads = HashSet::new();
    for tenant in &tenants {
        draft(&client.tenant(*tenant), "secret-key").await;
        let payload = heard.recv().await.unwrap();
        assert!(payload.len() == 64 && payload.bytes().all(|b| b.is_ascii_hexdigit()), "{payload}");
        assert!(!payload.contains(&tenant.to_string()) && payloads.insert(payload));
    }
    for assigner in &assigners[1..] {
        eventually("each has its own", async || assigner.assign("secret-key", &user(1)).is_some()).await;
    }
    assert!(assigners[0].assign("secret-key", &user(1)).is_none());

    // Asked again it is the same; once nobody uses it, nobody keeps it.
    assert!(format!("{:?}", client.assigner(two.id).await.unwrap()).contains(&two.id.to_string()));
    assert_eq!(listeners().await, 1);
    let last = assigners.pop().unwrap();
    drop(assigners);
    client.close().await;
    eventually("its connection is closed", async || listeners().await == 0).await;
    assert!(last.assign("secret-key", &user(1)).is_some(), "it goes on with what it has");
    is_kind(last.confirm().await, ErrorKind::Closed);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn changes_arrive_though_calls_are_dropped_at_any_point() {
    let two = two_tenants().await;
    let client = two.client_that_polls(NEVER);
    let id = active(&two.acme, "x").await.id;
    let assigner = client.assigner(two.id).await.unwrap();
    eventually("it hears", async || assigner.status().is_listening).await;
    let experiments = two.acme.experiments();
    for n in 0..20 {
        experiments.pause(id).await.unwrap();
        drop(poll_n(n, assigner.confirm()).await);
        drop(poll_n(n, assigner.quote("x", &user(n))).await);
        drop(poll_n(n, client.assigner(two.other_id)).await);
        let paused = async || assigner.assign("x", &user(1)).unwrap().reason() == Reason::Paused;
        eventually("paused", paused).await;
        experiments.resume(id).await.unwrap();
        eventually("resumed", async || !paused().await).await;
    }
    assert!(client.assigner(two.other_id).await.unwrap().assign("pro-plan", &user(1)).is_some());
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn without_its_database_it_goes_on_and_says_how_old_it_is() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder()
        .url(database.app_url())
        .poll_interval(Duration::from_millis(50))
        .acquire_timeout(Duration::from_millis(500))
        .build()
        .unwrap();
    let mut tenants = Vec::new();
    for name in ["one", "two"] {
        let new = NewTenant::managed(name, format!("{name}@x.example"));
        let tenant = client.tenant(client.create_tenant(new).await.unwrap().id);
        active(&tenant, name).await;
        let assigner = client.assigner(tenant.tenant_id()).await.unwrap();
        tenants.push((tenant, assigner, name));
    }
    let before: Vec<_> =
        tenants.iter().map(|(_, a, name)| a.assign(name, &user(1)).unwrap().price()).collect();
    cluster.kill().await.unwrap();
    for ((_, assigner, name), price) in tenants.iter().zip(&before) {
        eventually("its age tells", async || assigner.status().age > Duration::from_millis(600)).await;
        assert!(!assigner.status().is_listening);
        assert_eq!(assigner.assign(name, &user(1)).unwrap().price(), *price);
        assert!(assigner.confirm().await.unwrap_err().is_retryable());
    }
    cluster.start_again().await.unwrap();
    for (tenant, assigner, name) in &tenants {
        eventually("it hears again", async || assigner.status().is_listening).await;
        let id = tenant.experiments().by_key(name).await.unwrap().unwrap().id;
        tenant.experiments().pause(id).await.unwrap();
        eventually("paused", async || assigner.assign(name, &user(1)).unwrap().reason() == Reason::Paused)
            .await;
        eventually("young", async || assigner.status().age < Duration::from_millis(600)).await;
    }
    client.close().await;
}
