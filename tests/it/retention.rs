//! What is archived is counted as before: at every moment, whatever interrupts it.

use std::time::Duration;

use lastprice::{Admin, ArchiveOptions, ArchiveProgress, ErrorKind, MergePolicy, NewConversion, NewView};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::block_in_place;

use crate::support_repo::*;
use crate::support_retention::*;
use crate::support_sql::assert_exact;

async fn admin(two: &TwoTenants) -> Admin {
    Admin::connect(&two.database.owner_url()).await.unwrap()
}

async fn archived(two: &TwoTenants) -> ArchiveProgress {
    admin(two).await.archive_completed(ArchiveOptions::new(), |_| ()).await.unwrap()
}

#[tokio::test]
async fn the_numbers_are_the_same_to_the_last_digit() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let admin = admin(&two).await;
    let (id, other) = (with_history(&two, "old", 400).await, with_history(&two, "running", 60).await);
    completed(&two, id, 100).await;
    admin.refresh_metrics().await.unwrap();
    let refreshed = async || {
        let page = two.acme.metrics().refreshed(10, None).await.unwrap();
        page.items
            .into_iter()
            .map(|s| (s.key, s.assignments, s.views, s.conversions, s.revenue))
            .collect::<Vec<_>>()
    };
    let (before, others, summary) = (told(&two, id).await, told(&two, other).await, refreshed().await);
    assert!(before.contains(r#""suspects": 1"#) && before.contains("winsorised_above"), "{before}");
    assert!(before.contains(r#""forced""#) && before.contains(r#""phase": 2"#), "{before}");

    let mut seen = Vec::new();
    let options = ArchiveOptions::new().batch(90);
    let done = admin.archive_completed(options.clone(), |p| seen.push(*p)).await.unwrap();
    assert_eq!((done.experiments, done.views, done.assignments, done.kept), (1, 1497, 320, 80));
    assert!(seen.len() > 20 && seen.windows(2).all(|w| w[0].views <= w[1].views && w[0].kept <= w[1].kept));
    assert_eq!(seen.last(), Some(&done));
    assert_eq!((two.count("assignments").await, two.count("views").await), (80 + 60, 60 * 3 + 297));
    // What was counted for the batches is folded: nothing is left of it but the baseline.
    let zero = "SELECT count(*) FROM metric_deltas WHERE experiment_id = $1";
    assert_eq!(two.owner.query_one(zero, &[&id.uuid()]).await.unwrap().get::<_, i64>(0), 0);

    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "archived").await;
    admin.recount_metrics().await.unwrap();
    admin.refresh_metrics().await.unwrap();
    assert_eq!(told(&two, id).await, before, "after a recount");
    assert_eq!(refreshed().await, summary);
    assert_exact(&superuser, "recounted").await;
    let again = admin.archive_completed(options, |_| panic!("there is nothing to do")).await.unwrap();
    assert_eq!(again, ArchiveProgress::default());

    assert_eq!(told(&two, other).await, others);
    // The owner's plain DELETE takes all of it, and leaves nothing.
    two.owner
        .batch_execute(
            "DELETE FROM experiments WHERE status = 'completed' AND end_date < now() - interval '90 days'",
        )
        .await
        .unwrap();
    for table in ["metric_baselines", "archived_experiments"] {
        assert_eq!(two.count(table).await, 0, "{table}");
    }
    assert_exact(&superuser, "deleted").await;
    assert_eq!(told(&two, other).await, others);
    two.bystander_saw_nothing().await;
}

/// Ids that were merged count as the user that they turned out to be, who is archived with them or stays with them.
#[tokio::test]
async fn users_who_were_merged_are_counted_as_before() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = with_history(&two, "old", 200).await;
    for (anonymous, known) in [(1, 2), (3, 5), (7, 11), (10, 20), (13, 100)] {
        let policy = if anonymous == 7 { MergePolicy::Exclude } else { MergePolicy::FirstQuoteWins };
        two.acme.users().merge(&user(anonymous), &user(known), policy).await.unwrap();
    }
    completed(&two, id, 100).await;
    let before = told(&two, id).await;
    assert!(before.contains("merged"), "{before}");
    let done = archived(&two).await;
    assert_eq!(
        (done.assignments, done.kept),
        (158, 42),
        "40 buyers, one of them by now another, and two ids that lead to one"
    );
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "archived").await;
    admin(&two).await.recount_metrics().await.unwrap();
    assert_eq!(told(&two, id).await, before, "after a recount");
    assert_exact(&superuser, "recounted").await;
    two.bystander_saw_nothing().await;
}

/// Ended at its first batch, its second, and so on: dropped, or its connection killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn interrupted_anywhere_it_goes_on_where_it_was() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let admin = admin(&two).await;
    let id = with_history(&two, "old", 200).await;
    completed(&two, id, 100).await;
    let before = told(&two, id).await;
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                WHERE application_name = 'lastprice admin' AND datname = current_database()";
    // The next batch waits, so that it is killed in its midst.
    let lock = "BEGIN; LOCK TABLE views, assignments, experiments IN EXCLUSIVE MODE";
    let (mut ends, mut killed) = (0, 0);
    let last = loop {
        ends += 1;
        let (reached, mut left, kills) = (Notify::new(), ends, ends % 2 == 0);
        let archive = admin.archive_completed(ArchiveOptions::new().batch(50), |_| {
            left -= 1;
            if left == 0 {
                if kills {
                    block_in_place(|| Handle::current().block_on(superuser.batch_execute(lock))).unwrap();
                }
                reached.notify_one();
            }
        });
        let end = async {
            reached.notified().await;
            if kills {
                two.one_waits().await;
                superuser.query_one(kill, &[]).await.unwrap();
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! { biased; () = end => None, done = archive => Some(done) };
        superuser.batch_execute("ROLLBACK").await.unwrap();
        match ended {
            Some(Ok(done)) => break done,
            Some(Err(e)) => {
                assert!(matches!(e.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown), "{e:?}");
                killed += 1;
            }
            None => {}
        }
        assert_eq!(told(&two, id).await, before, "interrupted {ends} times");
        assert_exact(&superuser, "interrupted").await;
        if ends % 3 == 0 {
            admin.recount_metrics().await.unwrap();
            assert_eq!(told(&two, id).await, before, "recounted");
        }
    };
    assert!(
        ends >= 6 && killed >= 2,
        "it was interrupted {ends} times, {killed} of them by a lost connection"
    );
    // None, if the last interruption came when all was done.
    assert!(last.experiments <= 1, "{last:?}");
    assert_eq!((two.count("views").await, two.count("assignments").await), (0, 40));
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "at the end").await;
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_not_over_for_long_is_left_alone() {
    let two = two_tenants().await;
    let running = with_history(&two, "running", 10).await;
    let young = with_history(&two, "young", 10).await;
    completed(&two, young, 89).await;
    let paused = with_history(&two, "paused", 10).await;
    two.acme.experiments().pause(paused).await.unwrap();
    // A window of 300 days, of which the last user's is open.
    let open = with_history(&two, "open", 10).await;
    let sql = "ALTER TABLE experiments DISABLE TRIGGER experiments_guard;
               UPDATE experiments SET plan = plan || '{\"window_days\": 300.0}' WHERE key = 'open';
               ALTER TABLE experiments ENABLE TRIGGER experiments_guard";
    two.owner.batch_execute(sql).await.unwrap();
    completed(&two, open, 300).await;
    let before = (two.count("views").await, two.count("assignments").await);
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.views, done.kept, done.not_due), (0, 0, 0, 2));
    assert_eq!((two.count("views").await, two.count("assignments").await), before);

    let admin = admin(&two).await;
    let options = || ArchiveOptions::new().older_than(Duration::from_secs(88 * 86_400));
    let done = admin.archive_completed(options(), |_| ()).await.unwrap();
    assert_eq!((done.experiments, done.assignments, done.not_due), (1, 8, 1));
    for id in [running, paused, open] {
        let sql = "SELECT count(*) FROM assignments WHERE experiment_id = $1";
        assert_eq!(two.owner.query_one(sql, &[&id.uuid()]).await.unwrap().get::<_, i64>(0), 10);
    }
    // The window is what keeps it, whatever the age.
    let done = admin.archive_completed(options().older_than(Duration::ZERO), |_| ()).await.unwrap();
    assert_eq!(done.experiments, 0);
    completed(&two, open, 302).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.not_due), (1, 0));

    refused(admin.archive_completed(options().older_than(Duration::MAX), |_| ()).await, "older_than");
    for rows in [0, 100_001] {
        refused(admin.archive_completed(options().batch(rows), |_| ()).await, "batch");
    }
    two.bystander_saw_nothing().await;
}

/// An experiment of 6,000 views beside which others are written, and a host's transaction that holds what it wrote.
#[tokio::test]
async fn others_go_on_meanwhile() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    two.owner
        .batch_execute(&format!("ALTER DATABASE {} SET lock_timeout = '5s'", two.database.name()))
        .await
        .unwrap();
    let (id, going) = (with_history(&two, "old", 2000).await, with_history(&two, "deleted", 1000).await);
    completed(&two, id, 100).await;
    completed(&two, going, 100).await;
    let running = active(&two.acme, "running").await.id;
    // A view and a sale in the very experiment, in a transaction that outlasts the archive.
    let host = two.acme.begin().await.unwrap();
    host.views().record(&NewView::new(id, user(5))).await.unwrap();
    host.conversions()
        .settle(&NewConversion::sale(id, user(10), usd("29"), key("a host's")))
        .await
        .unwrap()
        .entry()
        .unwrap()
        .unwrap();

    let archive = async {
        let admin = admin(&two).await;
        let (mut one, mut two_) = (ArchiveProgress::default(), ArchiveProgress::default());
        let another = Admin::connect(&two.database.owner_url()).await.unwrap();
        let options = || ArchiveOptions::new().batch(200);
        // Two at once share the work.
        let (a, b) = tokio::join!(
            admin.archive_completed(options(), |p| one = *p),
            another.archive_completed(options(), |p| two_ = *p)
        );
        (a.unwrap(), b.unwrap())
    };
    let writes = async {
        for n in 0..30 {
            assign(&two.acme, running, n..n + 1).await;
            two.acme.views().record(&NewView::new(running, user(n))).await.unwrap();
            two.acme.conversions().settle(&sale(running, n, "29")).await.unwrap().entry().unwrap().unwrap();
            if n == 5 {
                two.owner.execute("DELETE FROM experiments WHERE id = $1", &[&going.uuid()]).await.unwrap();
            }
        }
    };
    let ((a, b), ()) = tokio::join!(archive, writes);
    assert!(a.views + b.views >= 6297 && a.assignments + b.assignments >= 1600, "{a:?} {b:?}");
    host.commit().await.unwrap();
    assert_exact(&superuser, "others went on").await;
    let counts = two.acme.metrics().experiment(running).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions), (30, 30, 30));
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!((counts.assignments, counts.views), (2000, 6298));
    // What came later is taken the next time.
    assert_eq!(archived(&two).await.views, 1);
    assert_exact(&superuser, "once more").await;
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap(), counts);
    two.bystander_saw_nothing().await;
}
