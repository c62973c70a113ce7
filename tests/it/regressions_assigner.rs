//! What a reviewer once broke of the assigner and its feed: each test failed before its cause was mended.

use std::time::{Duration, Instant};

use lastprice::{Client, NewTenant, Reason};
use lastprice_testkit::PrivateCluster;

use crate::support_repo::*;
use crate::support_sql::version_num;

/// The connection that listens breaks; an experiment is paused meanwhile; when it is back, the one look at the version
/// fails (a timeout, a busy pool), and the probe does not. Nobody looks again.
#[tokio::test]
async fn a_change_in_a_gap_is_lost_for_good_when_one_look_fails() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder()
        .url(database.app_url())
        .poll_interval(Duration::from_millis(300))
        .statement_timeout(Duration::from_millis(250))
        .build()
        .unwrap();
    let tenant = client.create_tenant(NewTenant::managed("A", "a@x.example")).await.unwrap().id;
    let live = active(&client.tenant(tenant), "x").await;
    let assigner = client.assigner(tenant).await.unwrap();
    assert!(soon(Duration::from_secs(5), async || assigner.status().is_listening).await);

    let superuser = database.connect_superuser().await.unwrap();
    let (changes, blocks) =
        (database.connect_owner().await.unwrap(), database.connect_owner().await.unwrap());
    changes.batch_execute("BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let pause = "UPDATE experiments SET status = 'paused' WHERE id = $1";
    changes.execute(pause, &[&live.id.uuid()]).await.unwrap();
    let blocks = tokio::spawn(async move {
        blocks.batch_execute("BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE").await.unwrap();
        blocks
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    superuser.batch_execute("ALTER ROLE lastprice_service NOLOGIN").await.unwrap();
    superuser
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        .await
        .unwrap();
    assert!(soon(Duration::from_secs(5), async || !assigner.status().is_listening).await);
    changes.batch_execute("COMMIT").await.unwrap(); // paused; nobody hears it
    let blocks = blocks.await.unwrap();
    superuser.batch_execute("ALTER ROLE lastprice_service LOGIN").await.unwrap();
    assert!(soon(Duration::from_secs(5), async || assigner.status().is_listening).await);
    tokio::time::sleep(Duration::from_millis(600)).await; // the look at the version times out
    blocks.batch_execute("ROLLBACK").await.unwrap();

    // All is well from here on, for ten beats.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (decision, status) = (assigner.assign("x", &user(1)).unwrap(), assigner.status());
    assert_eq!(decision.reason(), Reason::Paused, "certain: {}, {status:?}", decision.is_certain());
}

/// Two callers open the same assigner; the first is dropped before it has confirmed what it loaded.
#[tokio::test]
async fn a_dropped_opener_leaves_the_other_with_a_stale_snapshot() {
    let two = two_tenants().await;
    let client = two.client_that_polls(Duration::from_millis(100));
    let keeps = client.assigner(two.other_id).await.unwrap();
    assert!(soon(Duration::from_secs(5), async || keeps.status().is_listening).await);
    let (mut stale, mut stages) = (Vec::new(), Vec::new());
    for polls in 1..14 {
        let new = NewTenant::managed(format!("T{polls}"), format!("t{polls}@x.example"));
        let id = two.client.create_tenant(new).await.unwrap().id;
        let experiment = active(&two.client.tenant(id), "x").await.id;
        let mut opening = Box::pin(client.assigner(id));
        let mut is_paused = false;
        for _ in 0..polls {
            let handle = two.client.tenant(id);
            let experiments = handle.experiments();
            if is_paused {
                experiments.resume(experiment).await.unwrap();
            } else {
                experiments.pause(experiment).await.unwrap();
            }
            is_paused = !is_paused;
            tokio::time::sleep(Duration::from_millis(15)).await; // the feed hears it
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(opening.as_mut().poll(cx))).await;
            if polled.is_ready() {
                stages.push(polls);
                break;
            }
            tokio::time::sleep(Duration::from_millis(15)).await; // what it sent is answered
        }
        let second = client.assigner(id).await.unwrap(); // everything above was committed before
        drop(opening);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let shown = second.assign("x", &user(1)).unwrap().reason();
        if (shown == Reason::Paused) != is_paused {
            stale.push(format!(
                "after {polls} polls: shows {shown}, paused is {is_paused}; {:?}",
                second.status()
            ));
        }
    }
    assert!(stale.is_empty(), "{stale:#?}, ready: {stages:?}");
    eprintln!("ready: {stages:?}");
}

/// The runtime that the feed runs on ends; the assigner is used, and asked for again, on another.
#[test]
fn a_runtime_that_ends_leaves_it_deaf_and_says_it_listens() {
    let main = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let two = main.block_on(two_tenants());
    let id = main.block_on(active(&two.acme, "x")).id;
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let client = two.client_that_polls(Duration::from_millis(100));
    let assigner = first.block_on(async {
        let assigner = client.assigner(two.id).await.unwrap();
        assert!(soon(Duration::from_secs(5), async || assigner.status().is_listening).await);
        assigner
    });
    first.shutdown_timeout(Duration::from_secs(1));
    main.block_on(async {
        let again = client.assigner(two.id).await.unwrap();
        two.acme.experiments().pause(id).await.unwrap();
        let paused = async || again.assign("x", &user(1)).unwrap().reason() == Reason::Paused;
        assert!(soon(Duration::from_secs(3), paused).await, "{:?}", assigner.status());
    });
}

/// "Never poll" said as it is usually said.
#[tokio::test]
async fn the_longest_interval_panics_in_the_feed() {
    let two = two_tenants().await;
    let built = Client::builder().url(two.database.app_url()).poll_interval(Duration::MAX).build();
    refused(built, "poll_interval");
}

/// Nobody is told of a tenant that is deleted, and the snapshot is confirmed for ever.
#[tokio::test]
async fn a_deleted_tenant_stays_young() {
    let two = two_tenants().await;
    active(&two.acme, "x").await;
    let client = two.client_that_polls(Duration::from_millis(100));
    let assigner = client.assigner(two.id).await.unwrap();
    assert!(soon(Duration::from_secs(5), async || assigner.status().is_listening).await);
    two.owner.execute("DELETE FROM tenants WHERE id = $1", &[&two.id.uuid()]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let status = assigner.status();
    let decision = assigner.assign("x", &user(1));
    assert!(
        decision.is_none() || status.age > Duration::from_secs(1),
        "{status:?}, certain: {:?}, quote: {:?}",
        decision.map(|d| d.is_certain()),
        assigner.quote("x", &user(1)).await.unwrap_err().kind()
    );
}

/// The database does not answer: every beat begins another round of polls, on top of those that wait.
#[tokio::test]
async fn rounds_of_polls_pile_up() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder()
        .url(database.app_url())
        .pool_size(2)
        .poll_interval(Duration::from_millis(20))
        .build()
        .unwrap();
    let mut assigners = Vec::new();
    for n in 0..20 {
        let new = NewTenant::managed("T", format!("t{n}@x.example"));
        let id = client.create_tenant(new).await.unwrap().id;
        assigners.push(client.assigner(id).await.unwrap());
    }
    let (superuser, owner) =
        (database.connect_superuser().await.unwrap(), database.connect_owner().await.unwrap());
    superuser.batch_execute("ALTER ROLE lastprice_service NOLOGIN").await.unwrap();
    superuser
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        .await
        .unwrap();
    assert!(soon(Duration::from_secs(5), async || !assigners[0].status().is_listening).await);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    owner.batch_execute("BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE").await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let after = metrics.num_alive_tasks();
    let waiting = client.pool_status().waiting;
    owner.batch_execute("ROLLBACK").await.unwrap();
    superuser.batch_execute("ALTER ROLE lastprice_service LOGIN").await.unwrap();
    assert!(after < before + 10, "{before} tasks, {after} after 150 beats; {waiting} wait for the pool");
}

/// A probe has to be back within one beat: an interval that is shorter than the way there and back opens connections
/// without end, and never listens.
#[tokio::test]
async fn a_short_interval_is_a_storm_of_connections() {
    let cluster = PrivateCluster::builder().setting("log_connections", "on").start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client =
        Client::builder().url(database.app_url()).poll_interval(Duration::from_millis(1)).build().unwrap();
    let id = client.create_tenant(NewTenant::managed("A", "a@x.example")).await.unwrap().id;
    let (sessions, listening) = sessions_of(&cluster, &client, id).await;
    assert!(sessions < 50, "{sessions} connections in 2 s; listening at the end: {listening}");
}

/// A connection that ends soon after LISTEN is opened again at once, without a pause.
#[tokio::test]
async fn a_connection_that_ends_is_opened_again_without_a_pause() {
    let cluster = PrivateCluster::builder().setting("log_connections", "on").start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).build().unwrap();
    let id = client.create_tenant(NewTenant::managed("A", "a@x.example")).await.unwrap().id;
    let superuser = database.connect_superuser().await.unwrap();
    if version_num(&superuser).await >= 140_000 {
        superuser.batch_execute("ALTER ROLE lastprice_service SET idle_session_timeout = 20").await.unwrap();
    } else {
        // Which has no such setting.
        tokio::spawn(async move {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE usename = 'lastprice_service' AND state = 'idle' AND state_change < now() - interval '20 ms'";
            while superuser.query(end, &[]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    let (sessions, listening) = sessions_of(&cluster, &client, id).await;
    assert!(sessions < 50, "{sessions} connections in 2 s, at an interval of 5 s; listening: {listening}");
}

/// How often the service connects within two seconds, by the server's log; and whether it listens at the end.
async fn sessions_of(
    cluster: &PrivateCluster,
    client: &Client,
    tenant: lastprice::TenantId,
) -> (usize, bool) {
    let sessions = || cluster.log().matches("connection authorized: user=lastprice_service").count();
    let assigner = client.assigner(tenant).await.unwrap();
    let before = sessions();
    assert!(before > 0, "connections are logged");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let listening = assigner.status().is_listening;
    client.close().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    (sessions() - before, listening)
}

/// A reload that was queued when the runtime ended is queued for ever: later changes begin none.
#[test]
fn a_queued_reload_that_was_lost_ends_reloading() {
    let build =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (main, first) = (build(), build());
    let two = main.block_on(two_tenants());
    let id = main.block_on(active(&two.acme, "x")).id;
    let client = two.client_that_polls(Duration::from_secs(3600));
    let assigner = first.block_on(async {
        let assigner = client.assigner(two.id).await.unwrap();
        assert!(soon(Duration::from_secs(5), async || assigner.status().is_listening).await);
        assigner
    });
    main.block_on(async {
        two.owner.batch_execute("BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let sql = "SELECT encode(sha256(convert_to('lastprice/' || salt, 'UTF8')), 'hex') FROM tenants WHERE id = $1";
        let token: String = two.owner.query_one(sql, &[&two.id.uuid()]).await.unwrap().get(0);
        let app = two.database.connect_app().await.unwrap();
        for _ in 0..3 {
            app.execute("SELECT pg_notify('lastprice', $1)", &[&token]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    first.shutdown_timeout(Duration::from_secs(1));
    main.block_on(async {
        two.owner.batch_execute("ROLLBACK").await.unwrap();
        let another = client.assigner(two.other_id).await.unwrap(); // starts the feed again
        tokio::time::sleep(Duration::from_millis(500)).await;
        assigner.confirm().await.unwrap();
        let before = another.version();
        draft(&two.globex, "g").await;
        let hears = soon(Duration::from_secs(3), async || another.version() != before).await;
        assert!(hears, "the feed runs again");
        two.acme.experiments().pause(id).await.unwrap();
        let paused = async || assigner.assign("x", &user(1)).unwrap().reason() == Reason::Paused;
        assert!(soon(Duration::from_secs(3), paused).await, "{:?}; {before}", assigner.status());
    });
}

/// Changes at any moment of an opening, with no poll to help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_while_it_is_opened_arrive() {
    let two = two_tenants().await;
    let client = two.client_that_polls(Duration::from_secs(3600));
    let keeps = client.assigner(two.other_id).await.unwrap();
    assert!(soon(Duration::from_secs(5), async || keeps.status().is_listening).await);
    let id = active(&two.acme, "x").await.id;
    let mut is_paused = false;
    for n in 0..150u64 {
        let opening = tokio::spawn({
            let (client, tenant) = (client.clone(), two.id);
            async move {
                tokio::time::sleep(Duration::from_micros(n * 37 % 5000)).await;
                client.assigner(tenant).await.unwrap()
            }
        });
        tokio::time::sleep(Duration::from_micros(n * 91 % 6000)).await;
        if is_paused {
            two.acme.experiments().resume(id).await.unwrap();
        } else {
            two.acme.experiments().pause(id).await.unwrap();
        }
        is_paused = !is_paused;
        let assigner = opening.await.unwrap();
        let arrived =
            async || (assigner.assign("x", &user(1)).unwrap().reason() == Reason::Paused) == is_paused;
        assert!(soon(Duration::from_secs(2), arrived).await, "{n}: {:?}", assigner.status());
    }
}

/// Assigners that are opened, cloned and dropped on two threads while notifications arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_and_dropping_never_locks_up() {
    let two = two_tenants().await;
    let client = two.client_that_polls(Duration::from_millis(5));
    let id = active(&two.acme, "x").await.id;
    let until = Instant::now() + Duration::from_secs(4);
    let mut tasks = Vec::new();
    for n in 0..6 {
        let (client, tenant) = (client.clone(), if n % 2 == 0 { two.id } else { two.other_id });
        tasks.push(tokio::spawn(async move {
            let mut opened = 0;
            while Instant::now() < until {
                let assigner = client.assigner(tenant).await.unwrap();
                drop(assigner.clone());
                if opened % 3 == 0 {
                    tokio::task::yield_now().await;
                }
                opened += 1;
            }
            opened
        }));
    }
    while Instant::now() < until {
        two.acme.experiments().pause(id).await.unwrap();
        two.acme.experiments().resume(id).await.unwrap();
    }
    for task in tasks {
        let opened =
            tokio::time::timeout(Duration::from_secs(20), task).await.expect("it locked up").unwrap();
        assert!(opened > 10);
    }
    client.close().await;
}
