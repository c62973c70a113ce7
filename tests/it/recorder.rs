//! Events that are written in the background: all of them, each once, in their order, and the numbers are right.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use lastprice::serde_json::json;
use lastprice::{
    AssignmentUnit, ErrorKind, Event, ExperimentId, NewAssignment, NewTenant, NewUsage, NewView,
    NotTakenReason, Recorder, RecorderHandle, RecorderOptions, RecorderStats, Rejection, Tracked, UserId,
    ViewId,
};
use tokio::task::JoinSet;

use crate::support::poll_n;
use crate::support_repo::*;

const LONG: Duration = Duration::from_secs(60);

fn view(experiment: ExperimentId, n: usize) -> NewView {
    NewView::new(experiment, user(n))
}

fn usage(n: usize) -> NewUsage {
    NewUsage::new("api_calls", today(), 1, key(&format!("batch:{n}")))
}

#[track_caller]
fn adds_up(stats: RecorderStats) {
    let settled = stats.written + stats.duplicate + stats.rejected + stats.dropped;
    assert_eq!(stats.accepted, settled + stats.pending, "{stats:?}");
    assert_eq!(stats.pending == 0, stats.pending_bytes == 0, "{stats:?}");
}

/// Looks at the numbers all the time, until it is stopped.
pub(crate) struct Auditor {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Auditor {
    pub(crate) fn of(events: RecorderHandle, max_events: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut looks, mut before) = (0, RecorderStats::default());
            while !stopped.load(Ordering::Relaxed) {
                let stats = events.stats();
                adds_up(stats);
                assert!(stats.pending <= max_events, "{stats:?}");
                let of = |s: RecorderStats| [s.accepted, s.written, s.duplicate, s.rejected, s.dropped];
                assert!(of(before).iter().zip(of(stats)).all(|(b, s)| *b <= s), "{before:?}, then {stats:?}");
                before = stats;
                looks += 1;
                std::thread::sleep(Duration::from_micros(200));
            }
            looks
        });
        Auditor { stop, thread }
    }

    pub(crate) fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        assert!(self.thread.join().unwrap() > 0);
    }
}

fn numbers(stats: RecorderStats) -> [u64; 6] {
    [stats.accepted, stats.written, stats.duplicate, stats.rejected, stats.dropped, stats.pending]
}

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

/// Nothing is written while this is held.
async fn hold(two: &TwoTenants) -> lastprice::tokio_postgres::Client {
    let lock = two.database.connect_owner().await.unwrap();
    lock.batch_execute("BEGIN; LOCK TABLE views, usage IN ACCESS EXCLUSIVE MODE").await.unwrap();
    lock
}

async fn release(lock: lastprice::tokio_postgres::Client) {
    lock.batch_execute("ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn a_full_queue_gives_back_what_does_not_fit_and_lets_who_tracks_wait() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..40).await;
    let by_events = RecorderOptions::new().max_events(20);
    // Room for less than 20 of these.
    let by_bytes = RecorderOptions::new().max_bytes(20_000);
    let large = json!({ "a": "x".repeat(1000) });
    for (options, least, most_bytes) in [(by_events, 20, 40_000), (by_bytes, 10, 20_000)] {
        let recorder = two.client.recorder_with(options).unwrap();
        let auditor = Auditor::of(recorder.handle(), 20);
        let lock = hold(&two).await;
        let mut taken = Vec::new();
        let given_back = loop {
            let new = view(id, taken.len()).metadata(large.clone());
            let event = Event::View(new.clone());
            match recorder.record(two.id, event) {
                Ok(()) => taken.push(new),
                Err(not_taken) => break not_taken,
            }
        };
        assert!((least..=20).contains(&taken.len()), "{}", taken.len());
        assert!(matches!(given_back.reason(), NotTakenReason::Full), "{given_back:?}");
        let stats = recorder.stats();
        assert_eq!(stats.pending, taken.len() as u64);
        assert!(stats.pending_bytes <= most_bytes);
        let Event::View(given_back) = given_back.into_event() else { panic!("another event") };
        let error: lastprice::Error = recorder.record(two.id, given_back.clone()).unwrap_err().into();
        assert!(error.is_retryable() && error.kind() == ErrorKind::Unavailable);

        // Waits for room; who does not want to wait any more has not recorded anything.
        let impatient = view(id, 39).metadata(large.clone());
        assert!(recorder.track(two.id, impatient).now_or_never().is_none());
        let (events, tenant) = (recorder.handle(), two.id);
        let patient = tokio::spawn(async move { events.track(tenant, given_back).await });
        tokio::task::yield_now().await;
        assert_eq!(recorder.stats().accepted, taken.len() as u64);
        release(lock).await;
        assert!(matches!(patient.await.unwrap().unwrap(), Tracked::Written));
        recorder.flush().await;
        let n = taken.len() as u64 + 1;
        assert_eq!(numbers(recorder.stats()), [n, n, 0, 0, 0, 0]);
        auditor.finish();
        let _ = recorder.shutdown(LONG).await;
    }
    let seen =
        two.owner.query_one("SELECT count(*) FROM views WHERE user_id = 'user-39'", &[]).await.unwrap();
    assert_eq!(seen.get::<_, i64>(0), 0);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_recorder_that_is_closed_takes_nothing_and_says_so() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..40).await;
    let recorder = two.client.recorder_with(RecorderOptions::new().max_events(5)).unwrap();
    let events = recorder.handle();
    let lock = hold(&two).await;
    for n in 0..5 {
        events.record(two.id, view(id, n)).unwrap();
    }
    // It waits for room, which there will not be.
    let (waits, tenant) = (events.clone(), two.id);
    let waiting = tokio::spawn(async move { waits.track(tenant, view(id, 6)).await });
    tokio::task::yield_now().await;
    let down = tokio::spawn(recorder.shutdown(LONG));
    is_kind(waiting.await.unwrap(), ErrorKind::Closed);
    let not_taken = events.record(two.id, view(id, 7)).unwrap_err();
    assert!(matches!(not_taken.reason(), NotTakenReason::Closed), "{not_taken:?}");
    is_kind(events.track(two.id, view(id, 7)).await, ErrorKind::Closed);
    release(lock).await;
    assert_eq!(numbers(down.await.unwrap().stats), [5, 5, 0, 0, 0, 0]);
    events.flush().await;
    is_kind(events.record(two.id, view(id, 7)).map_err(Into::into), ErrorKind::Closed);
    assert_eq!(two.count("views").await, 5);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn at_the_deadline_the_rest_is_dropped_and_counted() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..40).await;
    let recorder = two.client.recorder_with(RecorderOptions::new().lanes(1)).unwrap();
    let auditor = Auditor::of(recorder.handle(), 100_000);
    let events = recorder.handle();
    let first = recorder.track(two.id, view(id, 0)).await.unwrap();
    assert!(matches!(first, Tracked::Written));
    let lock = hold(&two).await;
    let track = |n| {
        let (events, tenant) = (events.clone(), two.id);
        tokio::spawn(async move { events.track(tenant, view(id, n)).await })
    };
    // One is under way, and the others are behind it.
    let under_way = track(1);
    let server = two.database.connect_superuser().await.unwrap();
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("a statement is under way", async || {
        server.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    let behind = track(2);
    eventually("it is accepted", async || events.stats().accepted == 3).await;
    for n in 3..10 {
        events.record(two.id, view(id, n)).unwrap();
    }
    let report = recorder.shutdown(Duration::from_millis(50)).await;
    assert_eq!(numbers(report.stats), [10, 1, 0, 0, 9, 0]);
    assert_eq!(report.in_doubt, 1, "the one that was under way");
    is_kind(under_way.await.unwrap(), ErrorKind::OutcomeUnknown);
    is_kind(behind.await.unwrap(), ErrorKind::Closed);
    auditor.finish();
    release(lock).await;
    assert_eq!(two.count("views").await, 1, "the statement was cancelled with its lane");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_recorder_that_is_dropped_goes_on_in_the_background() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    let recorder = two.client.recorder();
    let events = recorder.handle();
    for n in 0..100 {
        events.record(two.id, NewAssignment::new(id, user(n))).unwrap();
    }
    drop(recorder);
    is_kind(events.record(two.id, usage(1)).map_err(Into::into), ErrorKind::Closed);
    events.flush().await;
    assert_eq!(numbers(events.stats()), [100, 100, 0, 0, 0, 0]);

    // And so does one whose shutdown was not waited for.
    let recorder = two.client.recorder();
    let events = recorder.handle();
    events.record(two.id, usage(1)).unwrap();
    assert!(poll_n(1, recorder.shutdown(LONG)).await.is_none());
    events.flush().await;
    assert_eq!(numbers(events.stats()), [1, 1, 0, 0, 0, 0]);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn whoever_goes_away_changes_nothing_for_the_event() {
    let two = two_tenants().await;
    let id = active(&two.acme, "pro-plan").await.id;
    assign(&two.acme, id, 0..40).await;
    let recorder = two.client.recorder();
    let auditor = Auditor::of(recorder.handle(), 100_000);
    let mut ready = 0;
    for polls in 0..12 {
        let before = recorder.stats().accepted;
        let new = view(id, polls).id(ViewId::new());
        ready += usize::from(poll_n(polls, recorder.track(two.id, new)).await.is_some());
        // Not polled, it has no effect; once polled, it goes its way.
        assert_eq!(recorder.stats().accepted - before, u64::from(polls > 0));
        let _ = poll_n(polls, recorder.flush()).await;
    }
    assert!(ready > 0);
    recorder.flush().await;
    assert_eq!(two.count("views").await, 11);
    assert_eq!(numbers(recorder.stats()), [11, 11, 0, 0, 0, 0]);
    auditor.finish();
    let _ = recorder.shutdown(LONG).await;
    two.bystander_saw_nothing().await;
}

/// Whoever waits for an event is told when the worker goes away with its runtime, or the client is closed.
#[test]
fn nobody_waits_for_a_worker_that_is_gone() {
    let outer = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let two = outer.block_on(two_tenants());
    let id = outer.block_on(active(&two.acme, "pro-plan")).id;
    outer.block_on(assign(&two.acme, id, 0..40));
    for close in [true, false] {
        let inner =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let client = two.client_that_polls(LONG);
        let recorder: Recorder = inner.block_on(async { client.recorder() });
        let lock = outer.block_on(hold(&two));
        let mut tracked = JoinSet::new();
        for n in 0..10 {
            let (events, tenant) = (recorder.handle(), two.id);
            tracked.spawn_on(async move { events.track(tenant, view(id, n)).await }, outer.handle());
        }
        outer.block_on(eventually("they are accepted", async || recorder.stats().accepted == 10));
        if close {
            inner.spawn({
                let client = client.clone();
                async move { client.close().await }
            });
            outer.block_on(eventually("it is closed", async || client.ready().await.is_err()));
        } else {
            inner.shutdown_background();
        }
        outer.block_on(release(lock));
        outer.block_on(async {
            while let Some(told) = tracked.join_next().await {
                match told.unwrap() {
                    Ok(tracked) => assert!(tracked.is_stored()),
                    Err(e) => {
                        assert!(matches!(e.kind(), ErrorKind::Closed | ErrorKind::OutcomeUnknown), "{e:?}")
                    }
                }
            }
            eventually("it ends", async || recorder.record(two.id, view(id, 11)).is_err()).await;
            recorder.flush().await;
            is_kind(recorder.record(two.id, view(id, 11)).map_err(Into::into), ErrorKind::Closed);
            is_kind(recorder.track(two.id, view(id, 11)).await, ErrorKind::Closed);
            adds_up(recorder.stats());
            assert_eq!(recorder.stats().pending, 0);
        });
        let _ = outer.block_on(recorder.shutdown(LONG));
    }
    outer.block_on(two.bystander_saw_nothing());
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
