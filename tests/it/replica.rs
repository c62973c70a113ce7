//! A streaming standby that answers reads: which ones, how old they are, and what happens when it cannot.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lastprice::{Client, Currency, ErrorKind, NewView, SlowStatement, StatementMode};

use crate::support::{Login, WAYS};
use crate::support_replica::*;
use crate::support_repo::*;

#[tokio::test]
async fn it_answers_what_may_be_some_moments_old_and_nothing_else() {
    let pair = Pair::start().await;
    let (two, live) = (&pair.two, &pair.live);
    for (way, (login, mode)) in WAYS.into_iter().enumerate() {
        let builder = match login {
            Login::App => pair.builder(LONG),
            Login::Superuser => {
                let superuser = pair.standby.superuser_url(two.database.name());
                let builder = Client::builder().url(two.database.superuser_url()).replica(superuser);
                builder.max_staleness(LONG)
            }
        };
        let client = builder.statement_mode(mode).build().unwrap();
        client.ready().await.unwrap();
        let (acme, globex) = (client.tenant(two.id), client.tenant(two.other_id));
        let before = pair.views(&two.client).await;
        // Nothing is known of it at first.
        assert_eq!(pair.views(&client).await, before);
        assert_eq!((status(&client).answered, status(&client).stale), (0, 1));
        assert!(status(&client).staleness.is_none());
        pair.until_answered(&client).await;
        assert!(status(&client).staleness.unwrap() < LONG);

        // It has what it had; whoever asks for more gets more.
        pair.pause().await;
        pair.record(way).await;
        assert_eq!(pair.views(&client).await, before);
        assert_eq!(acme.metrics().by_variant(live.id).await.unwrap().len(), 3);
        let results = acme.metrics().results(live.id).await.unwrap();
        assert_eq!(results.arms.iter().map(|arm| arm.counts.views).sum::<u64>(), before);
        let days = acme.metrics().by_day(live.id, today(), today()).await.unwrap();
        assert_eq!(days.iter().map(|day| day.counts.views).sum::<u64>(), before);
        let answered = status(&client).answered;
        assert!(answered > 4, "{answered}");

        let fresh = client.tenant(two.id).fresh();
        assert_eq!(fresh.metrics().experiment(live.id).await.unwrap().views, before + 1);
        let transaction = acme.begin().await.unwrap();
        assert_eq!(transaction.metrics().experiment(live.id).await.unwrap().views, before + 1);
        transaction.commit().await.unwrap();
        let mut host = two.database.connect_app().await.unwrap();
        let transaction = host.transaction().await.unwrap();
        let within = client.within(&transaction, two.id);
        assert_eq!(within.metrics().experiment(live.id).await.unwrap().views, before + 1);
        drop(transaction);
        // What is not made for it goes to the primary, as every write does.
        let quote = acme.assignments().assign(live.id, &user(1000 + way)).await.unwrap();
        assert!(quote.is_new());
        assert!(acme.assignments().get(live.id, &user(1000 + way)).await.unwrap().is_some());
        assert_eq!(status(&client).answered, answered);

        // What it does not have yet is asked of the primary, which knows.
        let (stale, empty) = (status(&client).stale, status(&client).empty);
        let new = active(&acme, &format!("new-{way}")).await;
        assert_eq!(acme.metrics().experiment(new.id).await.unwrap().assignments, 0);
        assert_eq!(acme.metrics().results(new.id).await.unwrap().arms.len(), 3);
        is_kind(globex.metrics().by_variant(live.id).await, ErrorKind::NotFound);
        is_kind(globex.metrics().results(live.id).await, ErrorKind::NotFound);
        assert!(
            status(&client).empty >= empty + 4 && status(&client).stale == stale,
            "{:?}",
            status(&client)
        );
        pair.on_standby("SELECT pg_wal_replay_resume()").await;
        client.close().await;
        is_kind(acme.metrics().experiment(live.id).await, ErrorKind::Closed);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn row_level_security_binds_on_the_standby_as_well() {
    let pair = Pair::start().await;
    let url = pair.url("lastprice_service");
    let config: tokio_postgres::Config = url.parse().unwrap();
    let (app, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for table in ["experiments", "assignments", "metric_totals", "metric_deltas", "tenant_experiment_metrics"]
    {
        let sql = format!("SELECT count(*) FROM {table} WHERE tenant_id <> '{}'", pair.two.other_id);
        app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{}'", pair.two.other_id))
            .await
            .unwrap();
        assert_eq!(app.query_one(&sql, &[]).await.unwrap().get::<_, i64>(0), 0, "{table}");
        app.batch_execute("ROLLBACK").await.unwrap();
    }
    // A login that it does not bind is refused there, too, and answers come from where it does.
    let client = pair.builder(LONG).replica(pair.standby.superuser_url(pair.two.database.name()));
    let client = client.build().unwrap();
    is_kind(client.ready().await, ErrorKind::IsolationNotEnforced);
    let failed = async || {
        assert_eq!(pair.views(&client).await, 0);
        status(&client).failed > 0
    };
    eventually("it is refused", failed).await;
    assert_eq!(status(&client).answered, 0);
}

#[tokio::test]
async fn one_that_is_too_far_behind_is_not_believed() {
    let pair = Pair::start().await;
    let client = pair.builder(Duration::from_secs(2)).build().unwrap();
    pair.until_answered(&client).await;
    pair.pause().await;
    pair.record(0).await;
    let written = Instant::now();
    let mut old = 0;
    while pair.views(&client).await == 0 {
        // From before the limit, by a clock that began before the read did.
        old += 1;
        assert!(written.elapsed() < Duration::from_secs(3), "older than it may be");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(old > 0, "it was not asked at all");
    let stale = status(&client);
    assert!(stale.stale > 0 && stale.failed == 0, "{stale:?}");
    for _ in 0..20 {
        assert_eq!(pair.views(&client).await, 1, "it went back in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(status(&client).staleness.unwrap() > Duration::from_secs(2));
    pair.on_standby("SELECT pg_wal_replay_resume()").await;
    pair.until_answered(&client).await;
    assert_eq!(pair.views(&client).await, 1);
    pair.two.bystander_saw_nothing().await;
}

/// What it replayed last is old because nothing was written, and it is current all the same.
#[tokio::test]
async fn an_idle_primary_does_not_make_it_stale() {
    let pair = Pair::start().await;
    let client = pair.builder(Duration::from_millis(800)).build().unwrap();
    let mut in_a_row = 0;
    eventually("it answers for twice as long as it may be behind", async || {
        let before = status(&client).answered;
        pair.views(&client).await;
        in_a_row = if status(&client).answered > before { in_a_row + 1 } else { 0 };
        tokio::time::sleep(Duration::from_millis(20)).await;
        in_a_row == 80
    })
    .await;
    assert!(status(&client).staleness.unwrap() <= Duration::from_millis(800));
}

/// The next record of the log begins behind the header of a page, while the last one ended before it.
#[tokio::test]
async fn a_new_file_of_the_log_does_not_make_it_stale() {
    let pair = Pair::start().await;
    let superuser = pair.two.database.connect_superuser().await.unwrap();
    let end = async || {
        let row = superuser.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
        row.get::<_, String>(0)
    };
    // Every quarter of a minute the server writes to an idle log by itself.
    eventually("it answers while nothing is written to the new file", async || {
        let client = pair.builder(Duration::from_secs(10)).build().unwrap();
        superuser.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        let switched = end().await;
        if !switched.ends_with("000028") {
            return false; // not behind the header of a file's first page: something was written to it already
        }
        eventually("it is asked until it answers", async || {
            pair.views(&client).await;
            status(&client).answered > 0 || end().await != switched
        })
        .await;
        end().await == switched
    })
    .await;
}

/// Nothing waits to be replayed, since nothing arrives any more; it does not know, and we do.
#[tokio::test]
async fn one_that_hears_nothing_any_more_is_not_believed() {
    let pair = Pair::start().await;
    let client = pair.builder(Duration::from_secs(1)).build().unwrap();
    pair.until_answered(&client).await;
    // In every version: a login that the primary refuses, and nothing new for the standby.
    let hba = pair.primary.socket_dir().join("data/pg_hba.conf");
    let rules = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(&hba, format!("local replication all reject\n{rules}")).unwrap();
    let superuser = pair.two.database.connect_superuser().await.unwrap();
    superuser.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    eventually("the standby is cut off", async || {
        superuser.batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_replication").await.unwrap();
        let sql = "SELECT count(*) FROM pg_stat_replication";
        superuser.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    pair.record(0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(pair.views(&client).await, 1);
    let before = status(&client).answered;
    assert_eq!(pair.views(&client).await, 1);
    assert_eq!(status(&client).answered, before);
}

#[tokio::test]
async fn while_it_is_away_the_primary_answers_without_delay() {
    let pair = Pair::start().await;
    let client = pair.builder(LONG).build().unwrap();
    pair.until_answered(&client).await;
    pair.standby.kill().await.unwrap();
    client.ready().await.unwrap();
    pair.record(0).await;
    for _ in 0..20 {
        let asked = Instant::now();
        assert_eq!(pair.views(&client).await, 1);
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    }
    assert!(status(&client).failed >= 20, "{:?}", status(&client));
    pair.standby.start_again().await.unwrap();
    pair.until_answered(&client).await;
    pair.two.bystander_saw_nothing().await;
    // And the other way round: no write goes where it cannot be written.
    pair.primary.stop().await.unwrap();
    let view = NewView::new(pair.live.id, user(1));
    is_kind(client.tenant(pair.two.id).views().record(&view).await, ErrorKind::Unavailable);
    assert_eq!(pair.views(&client).await, 1, "it has what it has, for as long as it may be behind");
    pair.primary.start_again().await.unwrap();
}

/// Numbers are exact there too: totals and pending deltas as of one moment. Whoever finds many of them there has them folded where
/// that can be done.
#[tokio::test]
async fn what_is_pending_there_is_folded_on_the_primary() {
    let pair = Pair::start().await;
    let (two, live) = (&pair.two, &pair.live);
    let client = pair.builder(LONG).build().unwrap();
    pair.until_answered(&client).await;
    two.acme.metrics().fold().await.unwrap();
    let insert = "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ($1, $2, 'u', '19')";
    let insert = two.owner.prepare(insert).await.unwrap();
    for _ in 0..1100 {
        two.owner.execute(&insert, &[&two.id.uuid(), &live.id.uuid()]).await.unwrap();
    }
    assert!(two.count("metric_deltas").await >= 1100);
    let answered = status(&client).answered;
    eventually("all of them, and folded", async || {
        let views = pair.views(&client).await;
        assert!(views <= 1100);
        views == 1100 && two.count("metric_deltas").await == 0
    })
    .await;
    assert!(status(&client).answered > answered);
    eventually("the fold arrives, and no number changes", async || {
        assert_eq!(pair.views(&client).await, 1100);
        let sales = client.tenant(two.id).metrics().experiment(live.id).await.unwrap();
        assert_eq!((sales.assignments, sales.revenue(Currency::USD)), (10, usd("0")));
        true
    })
    .await;
    two.bystander_saw_nothing().await;
}

/// The wait for a connection to the standby is told apart from what it took to answer.
#[tokio::test]
async fn a_wait_for_its_pool_is_told() {
    let pair = Pair::start().await;
    let notes: Arc<Mutex<Vec<SlowStatement>>> = Arc::default();
    let kept = Arc::clone(&notes);
    let hook = move |slow: &SlowStatement| kept.lock().unwrap().push(*slow);
    let client = pair.builder(LONG).pool_size(1).on_slow_statement(Duration::from_millis(300), hook);
    let client = client.build().unwrap();
    pair.until_answered(&client).await;
    let (lock, standby) = (pair.two.database.connect_owner().await.unwrap(), pair.connect_standby().await);
    lock.batch_execute("BEGIN; LOCK TABLE metric_totals IN ACCESS EXCLUSIVE MODE").await.unwrap();
    pair.record(0).await;
    let sql = "SELECT count(*) FROM pg_locks WHERE relation = 'metric_totals'::regclass AND mode = 'AccessExclusiveLock'";
    let is_locked = async || standby.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1;
    eventually("it is locked on the standby", is_locked).await;
    notes.lock().unwrap().clear();
    let before = status(&client).answered;
    let release = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        lock.batch_execute("ROLLBACK").await.unwrap();
        pair.record(1).await;
    };
    tokio::join!(pair.views(&client), pair.views(&client), release);
    assert_eq!(status(&client).answered, before + 2);
    let mut waited: Vec<Duration> = notes.lock().unwrap().iter().map(|slow| slow.waited).collect();
    waited.sort_unstable();
    assert_eq!(waited.len(), 2);
    assert!(waited[0] < Duration::from_millis(100) && waited[1] >= Duration::from_millis(400), "{waited:?}");
}

/// A list that is kept by hand: a statement that is on it can neither lock nor write, and may be some moments old.
#[test]
fn only_these_are_asked_of_it() {
    let mut names = lastprice::internals::replicated();
    names.sort_unstable();
    let known = [
        "metrics.by_day",
        "metrics.by_variant",
        "metrics.refreshed",
        "results.cohorts",
        "results.counts",
        "results.recent_views",
        "results.setup",
        "results.totals",
    ];
    assert_eq!(names, known);
    for (name, sql, _) in lastprice::internals::statements() {
        if names.contains(&name) || name == "experiments.config_version" {
            let text = sql.to_lowercase();
            for word in [
                "insert ",
                "update ",
                "delete ",
                " for share",
                " for key",
                "lock",
                "notify",
                "nextval",
                "fold_",
            ] {
                assert!(!text.contains(word), "{name} has {word:?}");
            }
        }
    }
}

#[test]
fn options_are_checked() {
    let builder = || Client::builder().url("postgres://a@localhost/x");
    for limit in [Duration::ZERO, Duration::from_millis(99), Duration::from_secs(86_401)] {
        refused(builder().max_staleness(limit).build(), "max_staleness");
    }
    refused(builder().replica("postgres://a@localhost/x?sslmode=what").build(), "replica");
    let error = refused(builder().replica("postgres://a:geheim@localhost/x?what=1").build(), "replica");
    assert!(!format!("{error:?} {error}").contains("geheim"));
    assert!(builder().build().unwrap().replica_status().is_none());
    let with = builder().replica("postgres://a:geheim@localhost/x").statement_mode(StatementMode::Typed);
    assert!(!format!("{with:?}").contains("geheim"));
    assert_eq!(with.build().unwrap().replica_status().unwrap().answered, 0);
}
