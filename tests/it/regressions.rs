//! What a reviewer once broke: each test failed before its cause was mended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lastprice::{
    Actor, Admin, Client, ErrorKind, Money, NewRecommendation, Objective, StatementMode, ViewOutcome,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_postgres::config::Host;

use crate::support::{APPLICATION, Login, WAYS, World};

/// Two tasks share a transaction, and both are first: neither may overtake the BEGIN.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn two_first_calls_are_both_behind_the_begin() {
    for login in [Login::App, Login::Superuser] {
        let world = World::new().await;
        let client = world.client((login, StatementMode::Prepared)).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        us.views().record(&world.ours.view("user")).await.unwrap();
        let before = world.rows_of("user").await;
        for _ in 0..400 {
            let transaction = Arc::new(us.begin().await.unwrap());
            let ready = Arc::new(AtomicUsize::new(0));
            let calls: Vec<_> = (0..2)
                .map(|_| {
                    let (transaction, ready) = (Arc::clone(&transaction), Arc::clone(&ready));
                    let view = world.ours.view("user");
                    tokio::spawn(async move {
                        ready.fetch_add(1, Ordering::SeqCst);
                        for _ in 0..100_000 {
                            if ready.load(Ordering::SeqCst) == 2 {
                                break;
                            }
                            std::hint::spin_loop();
                        }
                        transaction.views().record(&view).await
                    })
                })
                .collect();
            for call in calls {
                assert_eq!(call.await.unwrap().unwrap(), ViewOutcome::Recorded, "{login:?}");
            }
            Arc::try_unwrap(transaction).unwrap().rollback().await.unwrap();
        }
        assert_eq!(world.rows_of("user").await, before, "{login:?}: a row survived its rollback");
    }
}

/// A connection that the server has ended is nobody's next one.
#[tokio::test]
async fn the_call_after_a_terminated_one_works() {
    let world = World::new().await;
    let client = world.client(WAYS[0]).build().unwrap();
    let us = client.tenant(world.ours.tenant);
    us.views().record(&world.ours.view("user")).await.unwrap();
    us.experiments().get(world.ours.experiment).await.unwrap();
    for _ in 0..20 {
        world.superuser.batch_execute("BEGIN; LOCK TABLE views IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let (client, side, view) = (client.clone(), world.ours, world.ours.view("user"));
        let calls = tokio::spawn(async move {
            let us = client.tenant(side.tenant);
            (us.views().record(&view).await, us.experiments().get(side.experiment).await)
        });
        let sql = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = '{APPLICATION}' \
             AND datname = current_database() AND wait_event_type = 'Lock'"
        );
        while world.superuser.query_one(&sql, &[]).await.unwrap().get::<_, i64>(0) == 0
            && !calls.is_finished()
        {}
        let (terminated, next) = calls.await.unwrap();
        world.superuser.batch_execute("ROLLBACK").await.unwrap();
        // It was ended as it was prepared, or as it ran.
        let kind = terminated.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::OutcomeUnknown), "{kind:?}");
        assert!(next.unwrap().is_some());
    }
}

/// A pooler that loses its server says so in the place of the answer to COMMIT, which may have happened.
#[tokio::test]
async fn a_fatal_error_in_place_of_the_commit_leaves_the_outcome_open() {
    let world = World::new().await;
    let lossy = Arc::new(AtomicBool::new(false));
    let url = loses_commits(&world.url(Login::App), Arc::clone(&lossy)).await;
    let client = Client::builder().url(url).build().unwrap();
    let us = client.tenant(world.ours.tenant);
    us.views().record(&world.ours.view("user")).await.unwrap();

    lossy.store(true, Ordering::SeqCst);
    let error = us.conversions().settle(&world.ours.sale("user", "s1")).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::OutcomeUnknown, false));
    lossy.store(false, Ordering::SeqCst);
    assert_eq!(world.rows_of("user").await.1, 1, "it was committed");

    let transaction = us.begin().await.unwrap();
    transaction.conversions().settle(&world.ours.sale("user", "s2")).await.unwrap().entry().unwrap().unwrap();
    lossy.store(true, Ordering::SeqCst);
    let error = transaction.commit().await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::OutcomeUnknown, false));
}

/// Forwards, and answers the first COMMIT that the server has done with a pooler's FATAL error instead.
async fn loses_commits(url: &str, lossy: Arc<AtomicBool>) -> String {
    let server: tokio_postgres::Config = url.parse().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (host, port) = (server.get_hosts()[0].clone(), server.get_ports()[0]);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            type Halves = (Box<dyn AsyncRead + Unpin + Send>, Box<dyn AsyncWrite + Unpin + Send>);
            let (mut from_server, mut to_server): Halves = match &host {
                Host::Tcp(name) => {
                    let (r, w) =
                        tokio::net::TcpStream::connect((name.as_str(), port)).await.unwrap().into_split();
                    (Box::new(r), Box::new(w))
                }
                Host::Unix(dir) => {
                    let socket = dir.join(format!(".s.PGSQL.{port}"));
                    let (r, w) = tokio::net::UnixStream::connect(socket).await.unwrap().into_split();
                    (Box::new(r), Box::new(w))
                }
            };
            let (mut from_client, mut to_client) = client.into_split();
            tokio::spawn(async move { drop(tokio::io::copy(&mut from_client, &mut to_server).await) });
            let lossy = Arc::clone(&lossy);
            tokio::spawn(async move {
                let mut buffer = vec![0; 65536];
                while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                    let data = &buffer[..n];
                    let commit = data.windows(12).position(|bytes| bytes == b"C\0\0\0\x0bCOMMIT\0");
                    let Some(at) = commit.filter(|_| lossy.load(Ordering::SeqCst)) else {
                        to_client.write_all(data).await.unwrap();
                        continue;
                    };
                    let fields = b"SFATAL\0VFATAL\0C08P01\0Mserver conn crashed?\0\0";
                    let mut answer = data[..at].to_vec();
                    answer.push(b'E');
                    answer.extend((fields.len() as u32 + 4).to_be_bytes());
                    answer.extend(fields);
                    to_client.write_all(&answer).await.unwrap();
                    return;
                }
            });
        }
    });
    let (user, database) = (server.get_user().unwrap(), server.get_dbname().unwrap());
    let password = server.get_password().map(|p| String::from_utf8_lossy(p).into_owned()).unwrap_or_default();
    format!(
        "host=127.0.0.1 port={} user={user} dbname={database} password='{password}' sslmode=disable",
        address.port()
    )
}

/// A database whose transactions are REPEATABLE READ by default folds all the same.
#[tokio::test]
async fn deltas_are_folded_whatever_the_default_isolation() {
    let world = World::new().await;
    let name = world.database.name();
    let sql = format!("ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'");
    world.superuser.batch_execute(&sql).await.unwrap();
    let client = world.client(WAYS[0]).build().unwrap();
    for side in [world.ours, world.theirs] {
        client.tenant(side.tenant).views().record(&side.view("user")).await.unwrap();
    }
    assert!(client.tenant(world.ours.tenant).metrics().fold().await.unwrap() > 0);
    let admin = Admin::connect(&world.database.owner_url()).await.unwrap();
    assert!(admin.refresh_metrics().await.unwrap());
    assert_eq!(world.count("SELECT count(*) FROM metric_deltas").await, 0);
}

/// One tenant's odd import does not keep the others from their numbers.
#[tokio::test]
async fn no_variant_is_too_long_to_be_counted() {
    let world = World::new().await;
    let app = world.database.connect_app().await.unwrap();
    let sql = format!(
        "BEGIN; SELECT app_set_tenant('{0}'); INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, \
         currency) SELECT '{0}', '{1}', 'imported', string_agg(md5(n::text), ''), 1, 'USD' FROM generate_series(1, 200) n",
        world.ours.tenant, world.ours.experiment
    );
    let refused = app.batch_execute(&sql).await.unwrap_err();
    assert_eq!(refused.as_db_error().unwrap().constraint(), Some("assignments_variant_check"));
    let admin = Admin::connect(&world.database.owner_url()).await.unwrap();
    assert!(admin.refresh_metrics().await.unwrap());
}

/// A transaction that has folded and goes on does not meet a recount that waits for it.
#[tokio::test]
async fn a_recount_waits_behind_a_fold_without_a_deadlock() {
    let world = World::new().await;
    let client = world.client(WAYS[0]).build().unwrap();
    let transaction = client.tenant(world.ours.tenant).begin().await.unwrap();
    transaction.metrics().fold().await.unwrap();
    let admin = Admin::connect(&world.database.owner_url()).await.unwrap();
    let recount = tokio::spawn(async move { admin.recount_metrics().await });
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while world.count(waiting).await == 0 {}
    transaction.experiments().pause(world.ours.experiment).await.unwrap();
    transaction.commit().await.unwrap();
    recount.await.unwrap().unwrap();
}

/// An admin who is not the owner is told so, instead of finding nobody.
#[tokio::test]
async fn an_admin_is_the_owner() {
    let world = World::new().await;
    let admin = Admin::connect(&world.database.app_url()).await.unwrap();
    let refused = [
        admin.tenants().list(10, None).await.unwrap_err(),
        admin.tenants().by_email("ours@example.com").await.unwrap_err(),
        admin.tenants().set_email(world.ours.tenant, "x@example.com").await.unwrap_err(),
        admin.tenants().delete(world.ours.tenant).await.unwrap_err(),
        admin.refresh_metrics().await.unwrap_err(),
    ];
    for error in refused {
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some("owner_url")), "{error:?}");
    }
    let owner = Admin::connect(&world.database.owner_url()).await.unwrap();
    let ann = owner.tenants().with_actor(Actor::new("ann").unwrap());
    let renamed = ann.set_email(world.ours.tenant, "new@example.com").await.unwrap();
    assert_eq!(renamed.updated_by.as_deref(), Some("ann"));
}

/// Ids that SQL made are random: the latest is the one that was stored last.
#[tokio::test]
async fn the_latest_recommendation_is_the_latest() {
    let world = World::new().await;
    let client = world.client(WAYS[0]).build().unwrap();
    let us = client.tenant(world.ours.tenant);
    let price = Money::new("29", "USD").unwrap();
    us.recommendations()
        .store(&NewRecommendation::new(world.ours.experiment, price, 0.5, Objective::Revenue))
        .await
        .unwrap();
    let sql = "INSERT INTO recommendations (tenant_id, id, experiment_id, price, currency, confidence)
               VALUES ($1, '00000000-0000-4000-8000-000000000001', $2, 31, 'USD', 0.5)";
    let (tenant, experiment) = (world.ours.tenant.uuid(), world.ours.experiment.uuid());
    world.superuser.execute(sql, &[&tenant, &experiment]).await.unwrap();
    let latest = us.recommendations().latest(world.ours.experiment).await.unwrap().unwrap();
    assert_eq!(latest.price, Money::new("31", "USD").unwrap());
    assert!(
        client
            .tenant(world.theirs.tenant)
            .recommendations()
            .latest(world.ours.experiment)
            .await
            .unwrap()
            .is_none()
    );
}
