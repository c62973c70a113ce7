//! Whatever happens to the server, the network or the process: what was acknowledged is there, once.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lastprice::{
    Client, Currency, ErrorKind, Event, ExperimentId, IdempotencyKey, Money, NewAssignment, NewConversion,
    NewUsage, NewView, NotTakenReason, RecorderHandle, RecorderOptions, TenantId, Tracked, UserId, ViewId,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::task::JoinSet;

use crate::support_pooler::beside;
use crate::support_proxy::{Lose, Network, Proxy};
use crate::support_recorder::Auditor;
use crate::support_repo::{eventually, today, two_tenants, user};
use crate::support_shop::Shop;

const LONG: Duration = Duration::from_secs(120);

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// What a tenant must have, in the end.
#[derive(Default)]
struct Acknowledged {
    views: HashSet<ViewId>,
    sales: u64,
    usage: u64,
}

/// The `n`th event of a shop: mostly views, each by one of a few users.
fn event(shop: &Shop, n: u64) -> (Event, Option<ViewId>) {
    let user = user(n as usize % 50);
    let key = IdempotencyKey::new(format!("charge:{n}")).unwrap();
    match n % 10 {
        0 => (
            NewConversion::sale(shop.experiment, user, Money::from_minor(1900, Currency::USD), key).into(),
            None,
        ),
        1 => (NewUsage::new("api_calls", today(), 1, key).into(), None),
        2..4 => (NewAssignment::new(shop.experiment, user).into(), None),
        _ => {
            let id = ViewId::new();
            (NewView::new(shop.experiment, user).id(id).into(), Some(id))
        }
    }
}

/// What is stored and counted is what was acknowledged: nothing less, nothing more, nothing twice.
async fn check(shop: &Shop, acknowledged: &Acknowledged, database: &TestDatabase) {
    let owner = database.connect_owner().await.unwrap();
    let tenant = shop.tenant.tenant_id().uuid();
    let rows = owner.query("SELECT id FROM views WHERE tenant_id = $1", &[&tenant]).await.unwrap();
    let there: HashSet<ViewId> =
        rows.iter().map(|row| ViewId::from(row.get::<_, lastprice::uuid::Uuid>(0))).collect();
    assert_eq!(acknowledged.views.difference(&there).count(), 0, "acknowledged, and not there");
    assert_eq!(there.len(), acknowledged.views.len(), "there, and not acknowledged");
    let counts = shop.tenant.metrics().experiment(shop.experiment).await.unwrap();
    assert_eq!((counts.views, counts.conversions), (there.len() as u64, acknowledged.sales));
    // It may have begun yesterday.
    let yesterday = today().pred_opt().unwrap();
    let used = shop.tenant.usage().total("api_calls", yesterday, today()).await.unwrap();
    assert_eq!(used, acknowledged.usage);
}

/// Many callers track events while the server is killed ten times, and connections are cut in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_once_whatever_happens_to_the_server() {
    const CALLERS: u64 = 2000;
    const CRASHES: u64 = 10;
    let events = from_env("LASTPRICE_EVENTS", 100_000).max(CALLERS);
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).pool_size(4).require_app_role().build().unwrap();
    let shops =
        Arc::new([Shop::open(&client, "acme").await.unwrap(), Shop::open(&client, "globex").await.unwrap()]);
    let users: Vec<UserId> = (0..50).map(user).collect();
    for shop in &*shops {
        shop.tenant.assignments().assign_many(shop.experiment, &users).await.unwrap();
    }
    let recorder = client.recorder();
    let auditor = Auditor::of(recorder.handle(), 100_000);
    let next = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let (shops, handle, next) = (Arc::clone(&shops), recorder.handle(), Arc::clone(&next));
        callers.spawn(async move {
            let which = (caller % 2) as usize;
            let (shop, mut mine, mut assignments) = (&shops[which], Acknowledged::default(), 0);
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= events {
                    return (which, mine, assignments);
                }
                let (event, view) = event(shop, n);
                let assigns = matches!(event, Event::Assignment(_));
                match handle.track(shop.tenant.tenant_id(), event).await.unwrap() {
                    // They were there before, unless a lost answer leaves that open.
                    Tracked::Written | Tracked::Duplicate if assigns => assignments += 1,
                    Tracked::Written if view.is_some() => mine.views.extend(view),
                    Tracked::Written if n.is_multiple_of(10) => mine.sales += 1,
                    Tracked::Written => mine.usage += 1,
                    other => panic!("{n}: {other:?}"),
                }
            }
        });
    }
    let server = database.connect_superuser().await.unwrap();
    let cut =
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'lastprice_service'";
    server.query_one(cut, &[]).await.unwrap();
    drop(server);
    for crash in 1..=CRASHES {
        let after = crash * events / (CRASHES + 1);
        eventually("it goes on", async || {
            recorder.stats().written >= after / 2 && next.load(Ordering::Relaxed) >= after
        })
        .await;
        cluster.kill().await.unwrap();
        cluster.start_again().await.unwrap();
        let server = database.connect_superuser().await.unwrap();
        server.query_one(cut, &[]).await.unwrap();
    }
    let mut of = [Acknowledged::default(), Acknowledged::default()];
    let mut assignments = 0;
    while let Some(done) = callers.join_next().await {
        let (which, mine, assigned) = done.unwrap();
        of[which].views.extend(mine.views);
        of[which].sales += mine.sales;
        of[which].usage += mine.usage;
        assignments += assigned;
    }
    auditor.finish();
    let stats = recorder.stats();
    assert_eq!((stats.accepted, stats.pending, stats.rejected, stats.dropped), (events, 0, 0, 0));
    assert!(stats.duplicate <= assignments, "an event of ours was counted as a duplicate of itself");

    // The server goes away for good: whoever waits is told, and what was not written is reported.
    cluster.kill().await.unwrap();
    let mut unacknowledged = JoinSet::new();
    for n in 0..100 {
        let (shops, handle) = (Arc::clone(&shops), recorder.handle());
        unacknowledged.spawn(async move {
            let shop = &shops[n % 2];
            handle.track(shop.tenant.tenant_id(), shop.view()).await
        });
    }
    eventually("they are accepted", async || recorder.stats().pending == 100).await;
    let report = recorder.shutdown(Duration::from_millis(100)).await;
    assert_eq!((report.stats.dropped, report.stats.pending), (100, 0));
    while let Some(told) = unacknowledged.join_next().await {
        let error = told.unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::OutcomeUnknown), "{error:?}");
    }
    cluster.start_again().await.unwrap();
    for (shop, acknowledged) in shops.iter().zip(&of) {
        check(shop, acknowledged, &database).await;
    }
}

/// The commit, or its answer, is lost: the event is tried again, with the same id, and is written once and counts as that.
#[tokio::test]
async fn a_lost_answer_does_not_count_twice() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let proxy = Proxy::before(cluster.port()).await;
    let url = proxy.url(&database.app_url(), cluster.port());
    let client = Client::builder().url(url).pool_size(1).require_app_role().build().unwrap();
    let direct = Client::builder().url(database.app_url()).build().unwrap();
    let (acme, globex) =
        (Shop::open(&direct, "acme").await.unwrap(), Shop::open(&direct, "globex").await.unwrap());
    let recorder = client.recorder();
    let tenant = acme.tenant.tenant_id();
    let (mut views, mut sales, mut usage, mut users) = (0, 0, 0, 1);
    let all_of = |shop: &Shop, name: &str| -> [Event; 4] {
        let key = IdempotencyKey::new(format!("batch:{name}")).unwrap();
        [
            shop.view().into(),
            shop.sale(&format!("charge:{name}")).into(),
            NewUsage::new("api_calls", today(), 1, key).into(),
            NewAssignment::new(shop.experiment, UserId::new(name).unwrap()).into(),
        ]
    };
    let mut accepted = 0;
    for lose in [Lose::Commit, Lose::Answer, Lose::AllAnswers] {
        for (n, event) in all_of(&acme, &format!("{lose:?}")).into_iter().enumerate() {
            // Everything is prepared on this connection, a fold as well: nothing but the transaction remains to be lost.
            client.tenant(globex.tenant.tenant_id()).metrics().fold().await.unwrap();
            for other in all_of(&globex, &format!("{lose:?}-{n}")) {
                assert!(recorder.track(globex.tenant.tenant_id(), other).await.unwrap().is_stored());
            }
            match event {
                Event::View(_) => views += 1,
                Event::Conversion(_) => sales += 1,
                Event::Usage(_) => usage += 1,
                _ => users += 1,
            }
            accepted += 5;
            proxy.lose(lose);
            let tracked = recorder.track(tenant, event.clone()).await.unwrap();
            assert!(proxy.has_lost());
            assert!(matches!(tracked, Tracked::Written), "{lose:?}, {event:?}: {tracked:?}");
        }
        let counts = acme.tenant.metrics().experiment(acme.experiment).await.unwrap();
        assert_eq!((counts.assignments, counts.views, counts.conversions), (users, views, sales));
        assert_eq!(acme.tenant.usage().total("api_calls", today(), today()).await.unwrap(), usage);
    }
    let report = recorder.shutdown(LONG).await;
    assert_eq!((report.stats.accepted, report.stats.written), (accepted, accepted));
    assert_eq!(globex.counts().await, (12, 12));
}

/// A fold of which nothing is heard any more holds up what comes after it no longer than its own limits, and is not lost.
#[tokio::test]
async fn a_fold_that_is_never_answered_is_given_up() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let network = Network::before(cluster.port()).await;
    let url = beside(&cluster, &database, network.port);
    let limit = Duration::from_secs(2);
    let client = Client::builder().url(url).require_app_role().pool_size(2);
    let client =
        client.acquire_timeout(limit).connect_timeout(limit).statement_timeout(limit).build().unwrap();
    let direct = Client::builder().url(database.app_url()).build().unwrap();
    let shops = [Shop::open(&direct, "acme").await.unwrap(), Shop::open(&direct, "globex").await.unwrap()];
    let recorder = client.recorder_with(RecorderOptions::new().lanes(1)).unwrap();
    let mut owner = database.connect_owner().await.unwrap();
    let lock = owner.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE metric_totals IN EXCLUSIVE MODE").await.unwrap();

    let acme = shops[0].tenant.tenant_id();
    for _ in 0..50 {
        assert!(recorder.track(acme, shops[0].view()).await.unwrap().is_stored());
    }
    let waits =
        "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'metric_totals'::regclass AND NOT granted)";
    eventually("the lane folds", async || lock.query_one(waits, &[]).await.unwrap().get::<_, bool>(0)).await;
    network.is_silent.send_replace(true);
    tokio::time::sleep(Duration::from_millis(50)).await; // what is said until then is heard
    lock.rollback().await.unwrap();
    network.is_silent.send_replace(false);

    for shop in &shops {
        let tracked = recorder.track(shop.tenant.tenant_id(), shop.view());
        let tracked = tokio::time::timeout(limit * 10, tracked).await.expect("a lane is held up").unwrap();
        assert!(tracked.is_stored());
    }
    assert_eq!((shops[0].counts().await, shops[1].counts().await), ((51, 0), (1, 0)));
    assert_eq!(recorder.shutdown(LONG).await.stats.dropped, 0);
}

/// While the server is away the queue fills to its limit and not beyond; when it is back, the recorder goes on.
#[tokio::test]
async fn a_server_that_is_away_fills_the_queue_and_no_more() {
    let away = Duration::from_secs(if std::env::var_os("LASTPRICE_LONG").is_some() { 30 } else { 2 });
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
    let shops = [Shop::open(&client, "acme").await.unwrap(), Shop::open(&client, "globex").await.unwrap()];
    let options = RecorderOptions::new().max_events(5000);
    let recorder = client.recorder_with(options).unwrap();
    let auditor = Auditor::of(recorder.handle(), 5000);
    recorder.record(shops[0].tenant.tenant_id(), shops[0].view()).unwrap();
    recorder.flush().await;

    cluster.stop().await.unwrap();
    let (mut taken, mut full) = ([1, 0], 0);
    let end = tokio::time::Instant::now() + away;
    while tokio::time::Instant::now() < end || full == 0 {
        for (shop, taken) in shops.iter().zip(&mut taken) {
            match recorder.record(shop.tenant.tenant_id(), shop.view()) {
                Ok(()) => *taken += 1,
                Err(not_taken) => {
                    assert!(matches!(not_taken.reason(), NotTakenReason::Full), "{not_taken:?}");
                    full += 1;
                }
            }
        }
        if full > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let stats = recorder.stats();
    assert_eq!((stats.pending, stats.accepted), (5000, 5001));
    // Who tracks waits for room, and gets it.
    let (events, tenant, view) = (recorder.handle(), shops[0].tenant.tenant_id(), shops[0].view());
    let waiting = tokio::spawn(async move { events.track(tenant, view).await });
    cluster.start_again().await.unwrap();
    assert!(matches!(waiting.await.unwrap().unwrap(), Tracked::Written));
    taken[0] += 1;
    auditor.finish();
    let report = recorder.shutdown(LONG).await;
    assert_eq!((report.stats.written, report.stats.accepted), (5002, 5002));
    for (shop, taken) in shops.iter().zip(taken) {
        assert_eq!(shop.counts().await, (taken, 0));
    }
}

/// The child says on a line of its own what was acknowledged, for as long as it lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by another test"]
async fn child_tracks() {
    let Ok(said) = std::env::var("LASTPRICE_RECORDER_CHILD") else { return };
    let mut said = said.split(' ');
    let url = said.next().unwrap().to_owned();
    let client = Client::builder().url(url).require_app_role().build().unwrap();
    let recorder = client.recorder();
    let mut tracking = JoinSet::new();
    while let (Some(tenant), Some(experiment)) = (said.next(), said.next()) {
        let (tenant, experiment): (TenantId, ExperimentId) =
            (tenant.parse().unwrap(), experiment.parse().unwrap());
        for caller in 0..50 {
            let events: RecorderHandle = recorder.handle();
            tracking.spawn(async move {
                loop {
                    let id = ViewId::new();
                    let view = NewView::new(experiment, user(caller)).id(id);
                    assert!(matches!(events.track(tenant, view).await.unwrap(), Tracked::Written));
                    println!("+{tenant} {id}");
                }
            });
        }
    }
    tracking.join_next().await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_the_process_is_killed() {
    let two = two_tenants().await;
    let acme = crate::support_repo::active(&two.acme, "pro-plan").await.id;
    let third = Shop::open(&two.client, "initech").await.unwrap();
    let users: Vec<UserId> = (0..50).map(user).collect();
    two.acme.assignments().assign_many(acme, &users).await.unwrap();
    third.tenant.assignments().assign_many(third.experiment, &users).await.unwrap();
    let said = format!(
        "{} {} {acme} {} {}",
        two.database.app_url(),
        two.id,
        third.tenant.tenant_id(),
        third.experiment
    );
    let acknowledged = tokio::task::spawn_blocking(move || {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "recorder_faults::child_tracks", "--ignored", "--nocapture"])
            .env("LASTPRICE_RECORDER_CHILD", said)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let (mut acknowledged, mut line) = (Vec::new(), String::new());
        while lines.read_line(&mut line).unwrap() > 0 {
            // What it said last may have been cut off.
            if let Some(said) = line.strip_suffix('\n').and_then(|line| Some(line.split_once('+')?.1)) {
                let (tenant, view) = said.split_once(' ').unwrap();
                acknowledged.push((tenant.parse::<TenantId>().unwrap(), view.parse::<ViewId>().unwrap()));
            }
            if acknowledged.len() == 2000 {
                child.kill().unwrap(); // SIGKILL; and what is in the pipe is read to its end
            }
            line.clear();
        }
        child.wait().unwrap();
        acknowledged
    });
    let acknowledged = acknowledged.await.unwrap();
    assert!(acknowledged.len() >= 2000);
    let rows = two.owner.query("SELECT tenant_id, id FROM views", &[]).await.unwrap();
    let there: HashSet<(TenantId, ViewId)> = rows
        .iter()
        .map(|row| {
            let (tenant, id): (lastprice::uuid::Uuid, lastprice::uuid::Uuid) = (row.get(0), row.get(1));
            (tenant.into(), id.into())
        })
        .collect();
    let lost: Vec<_> = acknowledged.iter().filter(|said| !there.contains(said)).collect();
    assert!(lost.is_empty(), "{} of {} are lost", lost.len(), acknowledged.len());
    assert_eq!(acknowledged.iter().collect::<HashSet<_>>().len(), acknowledged.len());
    let theirs = there.iter().filter(|(tenant, _)| *tenant == two.other_id).count();
    assert_eq!(theirs, 1, "the bystander has its own one");
    two.bystander_saw_nothing().await;
}
