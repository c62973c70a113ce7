//! Servers that stop, networks that lose, pools that run dry.

use std::time::{Duration, Instant};

use lastprice::{
    Client, ConversionOutcome, ErrorKind, IdempotencyKey, NewUsage, StatementMode, UsageOutcome, ViewOutcome,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::support_proxy::{Lose, Proxy};
use crate::support_shop::Shop;

/// Far more than anything here takes, far less than a hang.
const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn an_exhausted_pool_is_a_timeout_and_recovers() {
    let database = TestDatabase::new().await.unwrap();
    let limit = Duration::from_millis(200);
    let client =
        Client::builder().url(database.app_url()).pool_size(2).acquire_timeout(limit).build().unwrap();
    let acme = Shop::open(&client, "acme").await.unwrap();
    let globex = Shop::open(&client, "globex").await.unwrap();

    let held = (acme.tenant.begin().await.unwrap(), globex.tenant.begin().await.unwrap());
    held.0.views().record(&acme.view()).await.unwrap();
    let status = client.pool_status();
    assert_eq!((status.max_size, status.size, status.available, status.waiting), (2, 2, 0, 0));
    let started = Instant::now();
    let refused = acme.tenant.tenants().get().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Timeout);
    assert!(refused.to_string().contains("`acquire_timeout`"), "{refused}");
    assert!((limit..SOON).contains(&started.elapsed()), "{:?}", started.elapsed());
    assert_eq!(acme.tenant.begin().await.unwrap_err().kind(), ErrorKind::Timeout);

    // Who waits is seen, and served by the connection that comes back, whose transaction is rolled back.
    let waiting = tokio::spawn({
        let tenant = client.tenant(globex.tenant.tenant_id());
        async move { tenant.tenants().get().await }
    });
    while client.pool_status().waiting == 0 && !waiting.is_finished() {
        tokio::task::yield_now().await;
    }
    drop(held);
    assert_eq!(waiting.await.unwrap().unwrap().map(|t| t.id), Some(globex.tenant.tenant_id()));
    assert_eq!(acme.counts().await, (0, 0));
    assert_eq!(client.pool_status().available, 2);
}

#[tokio::test]
async fn a_stopped_or_killed_server_comes_back_to_the_same_client() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).pool_size(3).build().unwrap();
    let (acme, globex) =
        (Shop::open(&client, "acme").await.unwrap(), Shop::open(&client, "globex").await.unwrap());
    for kill in [false, true] {
        // All connections of the pool are open, and one has a transaction.
        let held = [acme.tenant.begin().await.unwrap(), globex.tenant.begin().await.unwrap()];
        held[0].views().record(&acme.view()).await.unwrap();
        acme.counts().await;
        assert_eq!(client.pool_status().size, 3);

        if kill {
            cluster.kill().await.unwrap()
        } else {
            cluster.stop().await.unwrap()
        }
        let broken = held[0].views().record(&acme.view()).await.unwrap_err();
        assert_eq!(broken.kind(), ErrorKind::Unavailable, "{broken:?}");
        let [broken, idle] = held;
        assert_eq!(broken.commit().await.unwrap_err().kind(), ErrorKind::Closed);
        drop(idle);
        let refused = acme.tenant.tenants().get().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
        assert!(refused.is_retryable());

        cluster.start_again().await.unwrap();
        for shop in [&acme, &globex] {
            assert!(shop.tenant.experiments().get(shop.experiment).await.unwrap().is_some());
            assert_eq!(shop.counts().await, (0, 0));
        }
    }
}

/// Writers go on while the server is killed, and repeat with the same ids what failed.
#[tokio::test]
async fn what_is_repeated_after_a_crash_counts_once() {
    const WRITERS: usize = 4;
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).pool_size(WRITERS).build().unwrap();
    let acme = Shop::open(&client, "acme").await.unwrap();
    let globex = Shop::open(&client, "globex").await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..WRITERS {
        let shop = if n % 2 == 0 { acme.through(&client) } else { globex.through(&client) };
        let stopped = stopped.clone();
        writers.spawn(async move {
            let (mut written, mut failed) = (0, 0);
            while !*stopped.borrow() {
                let view = shop.view();
                while let Err(e) = shop.tenant.views().record(&view).await {
                    assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown), "{e:?}");
                    failed += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                written += 1;
            }
            (n % 2 == 0, written, failed)
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cluster.kill().await.unwrap();
        cluster.start_again().await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    stop.send(true).unwrap();
    let (mut of_acme, mut of_globex, mut failures) = (0, 0, 0);
    while let Some(writer) = writers.join_next().await {
        let (is_acme, written, failed) = writer.unwrap();
        *(if is_acme { &mut of_acme } else { &mut of_globex }) += written;
        failures += failed;
    }
    assert!(failures > 0, "the crashes hit nobody");
    assert_eq!((acme.counts().await, globex.counts().await), ((of_acme, 0), (of_globex, 0)));
}

#[tokio::test]
async fn a_commit_without_an_answer_is_an_unknown_outcome_and_can_be_repeated() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let proxy = Proxy::before(cluster.port()).await;
    let url = proxy.url(&database.app_url(), cluster.port());
    let client = Client::builder().url(url).pool_size(1).build().unwrap();
    let direct = Client::builder().url(database.app_url()).build().unwrap();
    for (lose, written) in [(Lose::Commit, 0), (Lose::Answer, 1), (Lose::AllAnswers, 1)] {
        let acme = Shop::open(&direct, "acme").await.unwrap();
        let globex = Shop::open(&direct, "globex").await.unwrap();
        let cut = acme.through(&client);
        // Everything is prepared on this connection: nothing but the transaction remains to be lost.
        globex.through(&client).tenant.views().record(&globex.view()).await.unwrap();
        let (view, sale) = (acme.view(), acme.sale("charge:1"));

        proxy.lose(lose);
        let unknown = cut.tenant.views().record(&view).await.unwrap_err();
        assert!(proxy.has_lost());
        assert_eq!(unknown.kind(), ErrorKind::OutcomeUnknown, "{lose:?}: {unknown:?}");
        assert!(!unknown.is_retryable(), "not provably undone");
        settled(&database).await;
        assert_eq!(acme.counts().await, (written, 0), "{lose:?}");
        let again = cut.tenant.views().record(&view).await.unwrap();
        let expected = if written == 1 { ViewOutcome::Duplicate } else { ViewOutcome::Recorded };
        assert_eq!(again, expected, "{lose:?}");

        // A transaction of several statements.
        let transaction = cut.tenant.begin().await.unwrap();
        let _ = transaction.conversions().settle(&sale).await.unwrap();
        transaction.views().record(&acme.view()).await.unwrap();
        proxy.lose(lose);
        let unknown = transaction.commit().await.unwrap_err();
        assert!(proxy.has_lost());
        assert_eq!(unknown.kind(), ErrorKind::OutcomeUnknown, "{lose:?}: {unknown:?}");
        settled(&database).await;
        assert_eq!(acme.counts().await, (1 + written, written), "{lose:?}");
        let again = cut.tenant.conversions().settle(&sale).await.unwrap();
        assert_eq!(matches!(again, ConversionOutcome::Duplicate(_)), written == 1, "{lose:?}");

        // Nothing is unknown about a read, and it can be repeated.
        assert!(cut.tenant.experiments().get(cut.experiment).await.unwrap().is_some());
        proxy.lose(lose);
        let broken = cut.tenant.experiments().get(cut.experiment).await.unwrap_err();
        assert!(proxy.has_lost());
        assert_eq!(broken.kind(), ErrorKind::Unavailable, "{lose:?}: {broken:?}");
        assert!(broken.is_retryable());
        assert!(cut.tenant.experiments().get(cut.experiment).await.unwrap().is_some());

        assert_eq!(acme.counts().await.1, 1, "{lose:?}");
        assert_eq!(globex.counts().await, (1, 0), "{lose:?}");
    }
}

/// Until the server has noticed that its client is gone, and rolled back.
async fn settled(database: &TestDatabase) {
    let server = database.connect_superuser().await.unwrap();
    let open = "SELECT count(*) FROM pg_stat_activity
                WHERE usename = 'lastprice_service' AND state LIKE 'idle in transaction%' AND datname = current_database()";
    let started = Instant::now();
    while server.query_one(open, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(started.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_slow_statement_is_a_timeout() {
    let database = TestDatabase::new().await.unwrap();
    let limit = Duration::from_millis(200);
    let client = Client::builder().url(database.app_url()).statement_timeout(limit).build().unwrap();
    let (acme, globex) =
        (Shop::open(&client, "acme").await.unwrap(), Shop::open(&client, "globex").await.unwrap());
    let owner = database.connect_owner().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    owner.batch_execute("BEGIN; LOCK TABLE views, experiments IN ACCESS EXCLUSIVE MODE").await.unwrap();

    let started = Instant::now();
    let view = acme.view();
    // The server waits for the lock while it parses what this connection has not prepared yet, ...
    let unprepared = acme.tenant.views().record(&view).await.unwrap_err();
    assert_eq!(unprepared.kind(), ErrorKind::Timeout, "{unprepared:?}");
    // ... and is not left waiting.
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE usename = 'lastprice_service' AND datname = current_database() AND wait_event_type = 'Lock'";
    while server.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(started.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let typed = Client::builder().url(database.app_url()).statement_timeout(limit);
    let typed = typed.statement_mode(StatementMode::Typed).build().unwrap();
    for slow in [
        acme.through(&typed).tenant.views().record(&view).await.unwrap_err(),
        globex.through(&typed).tenant.experiments().get(globex.experiment).await.unwrap_err(),
    ] {
        assert_eq!(slow.kind(), ErrorKind::Timeout, "{slow:?}");
        assert_eq!(slow.sqlstate().map(|s| s.code()), Some("57014"));
    }
    let transaction = acme.tenant.begin().await.unwrap();
    assert_eq!(transaction.views().record(&view).await.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(transaction.views().record(&view).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(started.elapsed() < SOON);

    owner.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(acme.tenant.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
    assert_eq!((acme.counts().await, globex.counts().await), ((1, 0), (0, 0)));
}

#[tokio::test]
async fn a_closed_port_is_unavailable_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let url = format!("postgres://service@127.0.0.1:{port}/shop");
    let client = Client::builder().url(&url).connect_timeout(SOON).build().unwrap();
    let started = Instant::now();
    let refused = client.ready().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
    assert!(refused.is_retryable());
    let refused = lastprice::Admin::connect(&url).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
    assert!(started.elapsed() < SOON / 2);
}

#[tokio::test]
async fn of_several_hosts_the_one_that_answers_is_used() {
    let full = black_hole().await;
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let (hole, port, name) = (full.port, cluster.port(), database.name());
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={hole},{port} dbname={name} user=lastprice_service sslmode=disable"
    );
    let client = Client::builder().url(url).connect_timeout(Duration::from_secs(1)).build().unwrap();
    client.ready().await.unwrap();
}

/// An address at which nobody accepts, and the system's queue is full.
struct BlackHole {
    port: u16,
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

async fn black_hole() -> BlackHole {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queue = Vec::new();
    let wait = Duration::from_millis(500);
    while let Ok(connected) = tokio::time::timeout(wait, TcpStream::connect(address)).await {
        queue.push(connected.unwrap());
        assert!(queue.len() < 100, "this system's queue has no end");
    }
    BlackHole { port: address.port(), _listener: listener, _queue: queue }
}

/// One server accepts and says nothing; the other one does not even accept.
#[tokio::test]
async fn a_black_hole_is_a_timeout() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let full = black_hole().await;
    let limit = Duration::from_millis(300);
    for (port, times) in [(silent.local_addr().unwrap().port(), 1), (full.port, 5)] {
        let url = format!("postgres://service@127.0.0.1:{port}/shop?sslmode=disable");
        let client = Client::builder().url(url).connect_timeout(limit).build().unwrap();
        for _ in 0..times {
            let started = Instant::now();
            let lost = client.ready().await.unwrap_err();
            assert_eq!(lost.kind(), ErrorKind::Timeout, "{lost:?}");
            assert!((limit..SOON).contains(&started.elapsed()), "{:?}", started.elapsed());
        }
    }
}

#[tokio::test]
async fn a_client_that_closes_lets_calls_finish_and_takes_no_new_ones() {
    let database = TestDatabase::new().await.unwrap();
    let client = Client::builder().url(database.app_url()).pool_size(2).build().unwrap();
    let acme = Shop::open(&client, "acme").await.unwrap();
    let globex = Shop::open(&client, "globex").await.unwrap();
    let transaction = acme.tenant.begin().await.unwrap();
    transaction.views().record(&acme.view()).await.unwrap();

    let closing = tokio::spawn({
        let client = client.clone();
        async move { client.close().await }
    });
    let started = Instant::now();
    let refused = loop {
        match globex.tenant.tenants().get().await {
            Err(refused) => break refused,
            Ok(_) => assert!(started.elapsed() < SOON),
        }
    };
    assert_eq!(refused.kind(), ErrorKind::Closed, "{refused:?}");
    assert!(!closing.is_finished(), "a transaction is still open");
    let usage =
        NewUsage::new("api_calls", "2026-11-22".parse().unwrap(), 1, IdempotencyKey::new("batch:1").unwrap());
    assert_eq!(transaction.usage().add(&usage).await.unwrap(), UsageOutcome::Added);
    transaction.commit().await.unwrap();
    tokio::time::timeout(SOON, closing).await.unwrap().unwrap();
    assert_eq!(client.pool_status().size, 0);

    client.close().await; // once more does no harm
    for refused in [client.ready().await, globex.tenant.begin().await.map(drop)] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Closed);
    }
    let other = Client::builder().url(database.app_url()).build().unwrap();
    assert_eq!(acme.through(&other).counts().await, (1, 0));
    assert_eq!(globex.through(&other).counts().await, (0, 0));
}
