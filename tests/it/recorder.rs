//! Events that are written in the background: all of them, each once, in their order, and the numbers are right.

use std::time::Duration;

use lastprice::serde_json::json;
use lastprice::{
    AssignmentUnit, Client, ErrorKind, Event, NewAssignment, NewTenant, NewUsage, NewView, NotTakenReason,
    RecorderOptions, Rejection, Tracked, UserId, ViewId,
};
use tokio::task::JoinSet;

use crate::support_recorder::{Auditor, LONG, numbers, usage, view};
use crate::support_repo::*;
use crate::support_shop::Shop;

#[tokio::test]
async fn every_kind_is_written_for_its_tenant() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    let recorder = two.client.recorder();
    let auditor = Auditor::of(recorder.handle(), 100_000);
    for n in 0..50 {
        recorder.record(two.id, NewAssignment::new(id, user(n))).unwrap();
        recorder.record(two.id, view(id, n)).unwrap();
        recorder.record(two.id, sale(id, n, "19.00")).unwrap();
        recorder.record(two.id, usage(n)).unwrap();
    }
    recorder.flush().await;
    assert_eq!(numbers(recorder.stats()), [200, 200, 0, 0, 0, 0]);
    for table in ["assignments", "views", "conversions", "usage"] {
        assert_eq!(two.count(table).await, 50, "{table}");
    }
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions), (50, 50, 50));
    // The quotes are those that the other way would have stored.
    let again = assign(&two.acme, id, 0..50).await;
    assert!(again.iter().all(|quote| !quote.is_new()));

    // A tenant of which there is nothing: the database says so, and only to it.
    let nobody = lastprice::TenantId::new();
    let lost = [
        recorder.track(nobody, NewAssignment::new(id, user(1))).await.unwrap(),
        recorder.track(nobody, view(id, 1)).await.unwrap(),
        recorder.track(nobody, sale(id, 1, "1")).await.unwrap(),
        recorder.track(nobody, usage(1)).await.unwrap(),
    ];
    let [quote, seen, sold, used] = lost.map(|tracked| match tracked {
        Tracked::Rejected(rejection) => rejection,
        other => panic!("{other:?}"),
    });
    assert!(matches!(quote, Rejection::Refused(e) if e.kind() == ErrorKind::NotFound));
    assert!(matches!(seen, Rejection::NotAssigned));
    assert!(matches!(sold, Rejection::Refused(e) if e.kind() == ErrorKind::NotFound));
    assert!(matches!(used, Rejection::Refused(e) if e.kind() == ErrorKind::NotFound));
    assert_eq!(numbers(recorder.stats()), [204, 200, 0, 4, 0, 0]);
    auditor.finish();
    let report = recorder.shutdown(LONG).await;
    assert_eq!((numbers(report.stats), report.in_doubt), ([204, 200, 0, 4, 0, 0], 0));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_a_user_does_is_written_in_its_order() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    // In an experiment by account, the quote is stored under the account's id, and its views come under that.
    let by_account = new_experiment("seats").unit(AssignmentUnit::Account);
    let by_account = two.acme.experiments().create(by_account).await.unwrap().id;
    two.acme.experiments().activate(by_account).await.unwrap();
    let options = RecorderOptions::new().lanes(4).max_age(Duration::ZERO);
    let recorder = two.client.recorder_with(options).unwrap();
    let mut writers = JoinSet::new();
    for task in 0..4 {
        let (events, tenant) = (recorder.handle(), two.id);
        writers.spawn(async move {
            for n in (0..150).map(|n| n * 4 + task) {
                let account = UserId::new(format!("account-{n}")).unwrap();
                let with_account = |id| NewAssignment::new(id, user(n)).account(account.clone());
                events.record(tenant, with_account(id)).unwrap();
                events.record(tenant, with_account(by_account)).unwrap();
                events.record(tenant, view(id, n)).unwrap();
                events.record(tenant, NewView::new(by_account, account)).unwrap();
                events.record(tenant, sale(id, n, "19.00")).unwrap();
                if n % 7 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    let report = recorder.shutdown(LONG).await;
    assert_eq!(numbers(report.stats), [3000, 3000, 0, 0, 0, 0], "an event came before its assignment");
    let counts = two.acme.metrics().experiment(by_account).await.unwrap();
    assert_eq!((counts.assignments, counts.views), (600, 600));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn many_tenants_share_a_recorder() {
    let two = two_tenants().await;
    let recorder = two.client.recorder();
    let mut tenants = Vec::new();
    for n in 0..12 {
        let new = NewTenant::managed(format!("T{n}"), format!("t{n}@tenants.example"));
        let tenant = two.client.tenant(two.client.create_tenant(new).await.unwrap().id);
        tenants.push((active(&tenant, "pro-plan").await.id, tenant));
    }
    // The same users and keys at each.
    for n in 0..40 {
        for (id, tenant) in &tenants {
            recorder.record(tenant.tenant_id(), NewAssignment::new(*id, user(n))).unwrap();
            recorder.record(tenant.tenant_id(), sale(*id, n, "2")).unwrap();
            recorder.record(tenant.tenant_id(), usage(n)).unwrap();
        }
    }
    // An experiment of another tenant's is none.
    let foreign = recorder.track(tenants[0].1.tenant_id(), view(tenants[1].0, 1)).await.unwrap();
    assert!(matches!(foreign, Tracked::Rejected(Rejection::NotAssigned)), "{foreign:?}");
    recorder.flush().await;
    for (id, tenant) in &tenants {
        let counts = tenant.metrics().experiment(*id).await.unwrap();
        assert_eq!((counts.assignments, counts.views, counts.conversions), (40, 0, 40));
        assert_eq!(tenant.usage().total("api_calls", today(), today()).await.unwrap(), 40);
    }
    let report = recorder.shutdown(LONG).await;
    assert_eq!(numbers(report.stats), [12 * 120 + 1, 12 * 120, 0, 1, 0, 0]);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_there_already_is_a_duplicate_or_a_conflict() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    let recorder = two.client.recorder();
    let (quote, seen, sold, used) =
        (NewAssignment::new(id, user(1)), view(id, 1), sale(id, 1, "19"), usage(1));
    for again in [false, true, true] {
        let all: [Event; 4] =
            [quote.clone().into(), seen.clone().into(), sold.clone().into(), used.clone().into()];
        for event in all {
            let tracked = recorder.track(two.id, event).await.unwrap();
            assert!(tracked.is_stored());
            assert_eq!(matches!(tracked, Tracked::Duplicate), again, "{tracked:?}");
        }
    }
    // Twice in one batch.
    let (quote, seen) = (NewAssignment::new(id, user(2)), view(id, 2));
    let (sold, used) = (sale(id, 2, "19"), usage(2));
    for _ in 0..2 {
        recorder.record(two.id, quote.clone()).unwrap();
        recorder.record(two.id, seen.clone()).unwrap();
        recorder.record(two.id, sold.clone()).unwrap();
        recorder.record(two.id, used.clone()).unwrap();
    }
    recorder.flush().await;
    assert_eq!(numbers(recorder.stats()), [20, 8, 12, 0, 0, 0]);

    // The same key with other content, among others that are written.
    recorder.record(two.id, usage(3)).unwrap();
    let other = NewUsage::new("api_calls", today(), 5, key("batch:1"));
    let conflicts = [
        (recorder.track(two.id, other).await.unwrap(), "amount"),
        (recorder.track(two.id, sale(id, 1, "20")).await.unwrap(), "revenue"),
    ];
    for (conflict, field) in conflicts {
        let Tracked::Rejected(Rejection::Refused(error)) = conflict else { panic!("{conflict:?}") };
        assert_eq!((error.kind(), error.conflicting_fields()), (ErrorKind::Conflict, &[field][..]));
    }
    // Who is not in the experiment is not stored, and the reason is told.
    let paused = active(&two.acme, "paused").await.id;
    two.acme.experiments().pause(paused).await.unwrap();
    let outside = recorder.track(two.id, NewAssignment::new(paused, user(1))).await.unwrap();
    assert!(
        matches!(outside, Tracked::Rejected(Rejection::Outside(lastprice::Reason::Paused))),
        "{outside:?}"
    );
    recorder.flush().await;
    assert_eq!(numbers(recorder.stats()), [24, 9, 12, 3, 0, 0]);
    assert_eq!(two.count("conversions").await, 2);
    assert_eq!(two.count("usage").await, 3);
    let _ = recorder.shutdown(LONG).await;
    two.bystander_saw_nothing().await;
}

/// The owner forbids what the API allows: the database refuses the statement as a whole.
#[tokio::test]
async fn a_bad_row_is_rejected_alone() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..500).await;
    for table in ["views", "conversions"] {
        let rule = format!("ALTER TABLE {table} ADD CONSTRAINT no_poison CHECK (NOT metadata ? 'poison')");
        two.owner.batch_execute(&rule).await.unwrap();
    }
    let recorder = two.client.recorder();
    let is_bad = |n: usize| [0, 77, 78, 250, 499].contains(&n);
    let metadata = |n: usize| if is_bad(n) { json!({"poison": "hunter2"}) } else { json!({"n": n}) };
    let mut tracked = JoinSet::new();
    for n in 0..500 {
        for event in [
            Event::from(view(id, n).metadata(metadata(n))),
            Event::from(sale(id, n, "3").metadata(metadata(n))),
        ] {
            let (events, tenant) = (recorder.handle(), two.id);
            tracked.spawn(async move { (n, events.track(tenant, event).await.unwrap()) });
        }
    }
    while let Some(done) = tracked.join_next().await {
        let (n, outcome) = done.unwrap();
        match outcome {
            Tracked::Written => assert!(!is_bad(n), "{n}"),
            Tracked::Rejected(Rejection::Refused(error)) => {
                assert!(is_bad(n), "{n}: {error:?}");
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
                let shown = format!("{error} {error:?}");
                assert!(shown.contains("no_poison") && !shown.contains("hunter2"), "{shown}");
            }
            other => panic!("{n}: {other:?}"),
        }
    }
    let report = recorder.shutdown(LONG).await;
    assert_eq!(numbers(report.stats), [1000, 990, 0, 10, 0, 0]);
    assert_eq!((two.count("views").await, two.count("conversions").await), (495, 495));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_breaks_a_rule_is_refused_before_it_is_accepted() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    let recorder = two.client.recorder();
    let long_ago = "1066-10-14T00:00:00Z".parse().unwrap();
    let deep = (0..200).fold(json!({}), |inner, _| json!({ "a": inner }));
    let huge = json!({ "a": "x".repeat(70_000) });
    let bad: [(Event, &str); 8] = [
        (view(id, 1).at(long_ago).into(), "occurred_at"),
        (view(id, 1).metadata(json!([])).into(), "metadata"),
        (view(id, 1).metadata(deep).into(), "metadata"),
        (view(id, 1).metadata(huge).into(), "metadata"),
        (sale(id, 1, "1").at(long_ago).into(), "occurred_at"),
        (sale(id, 1, "1").metadata(json!({"a": "\0"})).into(), "metadata"),
        (NewUsage::new("Not a metric", today(), 1, key("x")).into(), "metric"),
        (NewUsage::new("m", today(), u64::MAX, key("x")).into(), "amount"),
    ];
    for (event, field) in bad {
        refused(recorder.track(two.id, event.clone()).await, field);
        let not_taken = recorder.record(two.id, event).unwrap_err();
        let shown = format!("{not_taken} {not_taken:?}");
        assert!(shown.contains(field) && !shown.contains("user-1"), "{shown}");
        assert!(matches!(not_taken.reason(), NotTakenReason::Invalid(e) if e.field() == Some(field)));
        refused::<()>(Err(not_taken.into()), field);
    }
    // One that can never fit would wait for ever.
    let small = two.client.recorder_with(RecorderOptions::new().max_bytes(4096)).unwrap();
    let large = view(id, 1).metadata(json!({ "a": "x".repeat(5000) }));
    refused(small.track(two.id, large.clone()).await, "event");
    refused(small.record(two.id, large).map_err(Into::into), "event");
    for (options, field) in [
        (RecorderOptions::new().max_events(0), "max_events"),
        (RecorderOptions::new().max_events(usize::MAX), "max_events"),
        (RecorderOptions::new().max_bytes(1), "max_bytes"),
        (RecorderOptions::new().max_bytes(usize::MAX), "max_bytes"),
        (RecorderOptions::new().lanes(0), "lanes"),
        (RecorderOptions::new().lanes(u32::MAX), "lanes"),
        (RecorderOptions::new().max_age(Duration::MAX), "max_age"),
    ] {
        refused(two.client.recorder_with(options), field);
    }
    for recorder in [recorder, small] {
        assert_eq!(numbers(recorder.shutdown(LONG).await.stats), [0; 6]);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn deltas_do_not_pile_up() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..10).await;
    let recorder = two.client.recorder();
    for n in 0..200 {
        let tracked = recorder.track(two.id, view(id, n % 10)).await.unwrap();
        assert!(matches!(tracked, Tracked::Written));
    }
    let _ = recorder.shutdown(LONG).await;
    let deltas = two.count("metric_deltas").await;
    assert!(deltas < 150, "{deltas} deltas were never folded");
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 200);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn reported_usage_does_not_pile_up() {
    let two = two_tenants().await;
    let recorder = two.client.recorder();
    for n in 0..200 {
        let usage = NewUsage::new("api_calls", today(), 1, key(&format!("call:{n}")));
        let tracked = recorder.track(two.id, usage).await.unwrap();
        assert!(matches!(tracked, Tracked::Written));
    }
    let _ = recorder.shutdown(LONG).await;
    let waits = "SELECT count(*) FROM usage WHERE tenant_id = $1 AND NOT folded";
    let waits: i64 = two.owner.query_one(waits, &[&two.id.uuid()]).await.unwrap().get(0);
    assert!(waits < 150, "{waits} rows were never folded");
    assert_eq!(two.acme.usage().total("api_calls", today(), today()).await.unwrap(), 200);
    two.bystander_saw_nothing().await;
}

/// Acme's batches wait for a lock until their time is up, again and again. Another tenant does not notice.
#[tokio::test]
async fn a_tenant_that_fails_does_not_hold_up_the_others() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..40).await;
    let limit = Duration::from_millis(100);
    let client = Client::builder().url(two.database.app_url()).require_app_role().statement_timeout(limit);
    let client = client.build().unwrap();
    let other = Shop::open(&client, "initech").await.unwrap();
    let recorder = client.recorder();
    // Somebody else is about to write views of these ids. Both lanes meet one.
    let locked: Vec<NewView> = (0..40).map(|n| view(id, n).id(ViewId::new())).collect();
    let mut lock = two.database.connect_owner().await.unwrap();
    let held = lock.transaction().await.unwrap();
    let their_id = ViewId::new();
    let insert = "INSERT INTO views (tenant_id, id, experiment_id, user_id, variant)
                  SELECT tenant_id, $2, experiment_id, user_id, variant FROM assignments WHERE tenant_id = $1 AND user_id = 'user-0'";
    held.execute(insert, &[&two.id.uuid(), &their_id.uuid()]).await.unwrap();
    for (n, new) in locked.iter().enumerate() {
        let bad = n < 8; // whatever lane a user is in
        let new = if bad { view(id, n).id(their_id) } else { new.clone() };
        recorder.record(two.id, new).unwrap();
    }
    for _ in 0..50 {
        let tracked = recorder.track(other.tenant.tenant_id(), other.view()).await.unwrap();
        assert!(matches!(tracked, Tracked::Written));
    }
    assert!(recorder.stats().pending >= 8, "{:?}", recorder.stats());
    held.rollback().await.unwrap();
    recorder.flush().await;
    // One of the eight is the first of its id. That a retry takes the others for its own is what it cannot know.
    let stats = recorder.stats();
    assert_eq!((stats.accepted, stats.rejected, stats.dropped, stats.pending), (90, 0, 0, 0));
    assert_eq!(two.count("views").await, 33);
    assert_eq!(other.counts().await, (50, 0));

    // Nor one that is deleted while its events wait.
    let gone = Shop::open(&two.client, "hooli").await.unwrap();
    let tenant = gone.tenant.tenant_id();
    two.owner.execute("DELETE FROM tenants WHERE id = $1", &[&tenant.uuid()]).await.unwrap();
    for n in 0..3000 {
        recorder.record(tenant, NewAssignment::new(gone.experiment, user(n))).unwrap();
        recorder.record(tenant, usage(n)).unwrap();
    }
    let tracked = recorder.track(other.tenant.tenant_id(), other.view()).await.unwrap();
    assert!(matches!(tracked, Tracked::Written));
    let report = recorder.shutdown(LONG).await;
    assert_eq!((report.stats.rejected, report.stats.dropped, report.stats.accepted), (6000, 0, 6091));
    two.bystander_saw_nothing().await;
}
