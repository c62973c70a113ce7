//! The archive waits for nobody: what an open transaction has is left for the next night, and nobody else waits for it.

use std::time::Duration;

use lastprice::tokio_postgres::Client as Sql;
use lastprice::{
    Admin, ArchiveOptions, ArchiveProgress, ConversionOutcome, ExperimentId, MergePolicy, NewConversion,
    UserMerge,
};

use crate::support_docs::blocks;
use crate::support_repo::*;
use crate::support_retention::*;
use crate::support_sql::assert_exact;

/// While somebody else's transaction is open.
async fn archived(two: &TwoTenants) -> ArchiveProgress {
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    // Batches of which one has nothing that is in use.
    let archive = admin.archive_completed(ArchiveOptions::new().batch(30), |_| ());
    tokio::time::timeout(Duration::from_secs(20), archive).await.expect("it waits for nobody").unwrap()
}

/// A transaction of the owner's, with what it has locked.
async fn open(two: &TwoTenants, sql: &str) -> Sql {
    let other = two.database.connect_owner().await.unwrap();
    other.batch_execute(&format!("BEGIN; {sql}")).await.unwrap();
    other
}

async fn left(two: &TwoTenants, table: &str, id: ExperimentId) -> i64 {
    let sql = format!("SELECT count(*) FROM {table} WHERE experiment_id = $1");
    two.owner.query_one(&sql, &[&id.uuid()]).await.unwrap().get(0)
}

/// A host sells to somebody whose quote the archive would remove, and takes its time.
#[tokio::test]
async fn a_sale_in_an_open_transaction_stops_nobody() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let (id, next) = (with_history(&two, "old", 100).await, with_history(&two, "next", 50).await);
    completed(&two, id, 100).await;
    completed(&two, next, 100).await;
    let before = (told(&two, id).await, told(&two, next).await);
    let sale = |n: usize, at: &str| NewConversion::sale(id, user(n), usd("29"), key(at));
    for ends in ["ROLLBACK", "COMMIT"] {
        let host = two.acme.begin().await.unwrap();
        let sold = host.conversions().settle(&sale(6, ends)).await.unwrap();
        assert!(matches!(sold, ConversionOutcome::Recorded(_)), "{sold:?}");
        let done = archived(&two).await;
        let anothers = sale(7, &format!("another's, {ends}"));
        let rest = two.acme.conversions().settle(&anothers);
        let rest = tokio::time::timeout(Duration::from_secs(5), rest).await.expect("nobody waits").unwrap();
        assert!(matches!(rest, ConversionOutcome::Recorded(_)), "{rest:?}");
        // All but the one quote; and the other experiment as a whole.
        if ends == "ROLLBACK" {
            assert_eq!((done.experiments, done.in_use, done.promised), (1, 1, 0));
            assert_eq!((done.assignments, done.kept), (79 + 40, 21 + 10));
        } else {
            assert_eq!((done.experiments, done.in_use, done.assignments, done.kept), (0, 1, 0, 21));
        }
        assert_eq!((left(&two, "assignments", id).await, left(&two, "views", id).await), (21, 0));
        assert_exact(&superuser, "while it is open").await;
        match ends {
            "COMMIT" => host.commit().await.unwrap(),
            _ => host.rollback().await.unwrap(),
        }
    }
    // Who bought has his quote for good.
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.kept), (1, 0, 0, 21));
    assert_eq!(archived(&two).await, ArchiveProgress::default());
    assert_eq!(told(&two, next).await, before.1);
    assert_ne!(told(&two, id).await, before.0);
    assert_exact(&superuser, "at the end").await;
    two.bystander_saw_nothing().await;
}

/// And goes with the next call, if it came to nothing.
#[tokio::test]
async fn what_was_in_use_is_removed_by_the_next_call() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = with_history(&two, "old", 100).await;
    completed(&two, id, 100).await;
    let before = told(&two, id).await;
    // A quote, as a sale locks it; another that changes; and views that somebody is erased from.
    let host = open(
        &two,
        &"SELECT FROM assignments WHERE experiment_id = $1 AND user_id = 'user-1' FOR KEY SHARE;
          UPDATE assignments SET valid_until = now() - interval '1 day' WHERE experiment_id = $1 AND user_id = 'user-2';
          UPDATE views SET metadata = '{}' WHERE experiment_id = $1 AND user_id IN ('user-1', 'user-7')"
            .replace("$1", &format!("'{id}'")),
    )
    .await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.kept), (0, 1, 78, 22));
    assert_eq!((done.views, left(&two, "views", id).await), (294, 303));
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "while it is open").await;
    host.batch_execute("COMMIT").await.unwrap();
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.kept, done.views), (1, 0, 2, 20, 303));
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "at the end").await;
    assert_eq!(archived(&two).await, ArchiveProgress::default());
    two.bystander_saw_nothing().await;
}

/// Before it is begun, whatever changes it; afterwards, what deletes it.
#[tokio::test]
async fn an_experiment_in_use_does_not_stop_the_others() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let (first, next) = (with_history(&two, "first", 20).await, with_history(&two, "next", 20).await);
    completed(&two, first, 100).await;
    completed(&two, next, 100).await;
    let before = told(&two, first).await;
    let lock = format!("SELECT FROM experiments WHERE id = '{first}' FOR NO KEY UPDATE");
    let host = open(&two, &lock).await;
    let mut seen = Vec::new();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let archive = admin.archive_completed(ArchiveOptions::new(), |p| seen.push(*p));
    let done =
        tokio::time::timeout(Duration::from_secs(20), archive).await.expect("it waits for nobody").unwrap();
    assert_eq!((done.experiments, done.in_use, done.assignments), (1, 1, 16));
    assert_eq!((seen[0].in_use, seen.last()), (1, Some(&done)));
    assert_eq!((left(&two, "assignments", first).await, left(&two, "views", first).await), (20, 357));
    assert_eq!(left(&two, "archived_experiments", first).await, 0, "nothing of it was begun");
    host.batch_execute("ROLLBACK").await.unwrap();

    // Begun, and not finished.
    let begun = "INSERT INTO archived_experiments (tenant_id, experiment_id, views, viewers, suspects, views_of_suspects)
                 SELECT tenant_id, id, 357, 20, 1, 300 FROM experiments WHERE id = $1";
    two.owner.execute(begun, &[&first.uuid()]).await.unwrap();
    for lock in [lock.replace("NO KEY ", ""), "SELECT FROM archived_experiments FOR NO KEY UPDATE".to_owned()]
    {
        let host = open(&two, &lock).await;
        let done = archived(&two).await;
        assert_eq!((done.experiments, done.in_use, done.views, done.assignments), (0, 1, 0, 0), "{lock}");
        host.batch_execute("ROLLBACK").await.unwrap();
    }
    // What changes nothing that the archive needs does not stop it.
    let host = open(&two, &lock).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.views, done.assignments), (1, 0, 357, 16));
    host.batch_execute("ROLLBACK").await.unwrap();
    assert_exact(&superuser, "at the end").await;
    assert!(before.contains("\"suspects\""));
    two.bystander_saw_nothing().await;
}

/// `end_date` can be set by hand; when the last user came, too, decides whether all windows are over.
#[tokio::test]
async fn a_window_is_open_whatever_the_end_date_says() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = with_history(&two, "old", 20).await;
    completed(&two, id, 100).await;
    let came = async |days: i32| {
        let sql = "UPDATE assignments SET assigned_at = now() - make_interval(days => $2) WHERE experiment_id = $1 AND user_id = 'user-1'";
        two.owner.execute(sql, &[&id.uuid(), &days]).await.unwrap();
    };
    // The plan's window is 7 days; the day on which the user came is over when it begins to be counted.
    for days in [0, 7] {
        came(days).await;
        for folded in [false, true] {
            if folded {
                two.owner.execute("SELECT refresh_experiment_metrics()", &[]).await.unwrap();
            }
            let done = archived(&two).await;
            assert_eq!((done.not_due, done.views, done.kept), (1, 0, 0), "{days} {folded}");
        }
    }
    // Counted there no longer: not even if nobody has folded that.
    came(8).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.not_due, done.assignments), (1, 0, 16));
    assert_exact(&superuser, "archived").await;
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_promised_goes_when_the_promise_is_over() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = with_history(&two, "old", 40).await;
    completed(&two, id, 100).await;
    let before = told(&two, id).await;
    // Of a user who brought nothing, and of a buyer.
    let until = async |time: &str| {
        let sql = format!(
            "UPDATE assignments SET valid_until = {time} WHERE experiment_id = $1 AND user_id IN ('user-1', 'user-5')"
        );
        two.owner.execute(&sql, &[&id.uuid()]).await.unwrap();
    };
    until("now() + interval '1 hour'").await;
    for removed in [31, 0] {
        let done = archived(&two).await;
        assert_eq!((done.experiments, done.promised, done.in_use), (0, 1, 0));
        assert_eq!((done.assignments, done.kept), (removed, 9));
        assert_eq!(told(&two, id).await, before);
    }
    until("now() - interval '1 second'").await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.promised, done.assignments, done.kept), (1, 0, 1, 8));
    assert_eq!(archived(&two).await, ArchiveProgress::default(), "buyers are not looked at again");
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "at the end").await;
    two.bystander_saw_nothing().await;
}

/// The document says how to try it.
#[tokio::test]
async fn young_data_is_made_old_as_the_document_says() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let document = include_str!("../../docs/retention.md");
    let (_, recipe) = document.split_once("\n## To try it\n").unwrap();
    let steps = blocks(recipe.split("\n## ").next().unwrap(), "sql");
    let [opens, completes] = steps[..] else { panic!("{steps:?}") };

    let id = draft(&two.acme, "old-enough").await.id;
    let opens = opens.replace("pro-plan", "old-enough");
    let completes = completes.replace("pro-plan", "old-enough");
    two.owner.batch_execute(&opens).await.unwrap();
    assign(&two.acme, id, 0..20).await;
    for n in 0..20 {
        two.acme.views().record(&lastprice::NewView::new(id, user(n))).await.unwrap();
    }
    for n in 0..5 {
        two.acme.conversions().settle(&sale(id, n, "29")).await.unwrap().entry().unwrap().unwrap();
    }
    two.owner.batch_execute(&completes).await.unwrap();
    assert_exact(&superuser, "made older").await;
    let before = told(&two, id).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.views, done.assignments, done.kept), (1, 20, 15, 5));
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "archived").await;
    two.bystander_saw_nothing().await;
}

/// Of a merge and the archive of an experiment, one is first: the archive leaves what is being merged for the next call.
#[tokio::test]
async fn what_is_being_merged_is_archived_afterwards() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let (running, old) = (active(&two.acme, "running").await.id, with_history(&two, "old", 40).await);
    assign(&two.acme, running, 0..40).await;
    // It has exceptions already: a merge has nothing to write to its row.
    two.acme.users().merge(&user(3), &user(4), MergePolicy::FirstQuoteWins).await.unwrap();
    completed(&two, old, 100).await;
    let host = two.acme.begin().await.unwrap();
    host.conversions().settle(&sale(running, 1, "29")).await.unwrap().entry().unwrap().unwrap();
    let merge = merging(&two).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.views), (0, 1, 0, 0));
    host.commit().await.unwrap();
    assert_eq!(merge.await.unwrap().unwrap().shared, 2);
    assert_exact(&superuser, "merged").await;
    let before = told(&two, old).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.kept), (1, 0, 32, 8));
    assert_the_same(&two, &superuser, old, &before).await;
}

/// Or the merge leaves alone what is archived by the time at which it comes to it.
#[tokio::test]
async fn what_is_archived_meanwhile_is_not_merged() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let (running, old) = (active(&two.acme, "running").await.id, with_history(&two, "old", 40).await);
    assign(&two.acme, running, 0..40).await;
    completed(&two, old, 100).await;
    let before = told(&two, old).await;
    // It knows what there is to merge, and waits for the first of it.
    let host = open(&two, &format!("SELECT FROM experiments WHERE id = '{running}' FOR NO KEY UPDATE")).await;
    let merge = merging(&two).await;
    let done = archived(&two).await;
    assert_eq!((done.experiments, done.in_use, done.assignments, done.kept), (1, 0, 32, 8));
    host.batch_execute("COMMIT").await.unwrap();
    assert_eq!(merge.await.unwrap().unwrap().shared, 1);
    assert_the_same(&two, &superuser, old, &before).await;
}

/// Under way, and waiting.
async fn merging(two: &TwoTenants) -> tokio::task::JoinHandle<lastprice::Result<UserMerge>> {
    let acme = two.client.tenant(two.id);
    let merge =
        tokio::spawn(
            async move { acme.users().merge(&user(1), &user(2), MergePolicy::FirstQuoteWins).await },
        );
    two.one_waits().await;
    merge
}

/// Now, and after a recount.
async fn assert_the_same(two: &TwoTenants, superuser: &Sql, id: ExperimentId, before: &str) {
    for after in ["archived", "recounted"] {
        assert_eq!(told(two, id).await, before, "{after}");
        assert_exact(superuser, after).await;
        two.owner.batch_execute("SELECT recount_experiment_metrics()").await.unwrap();
    }
    two.bystander_saw_nothing().await;
}
