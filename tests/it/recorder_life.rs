//! A recorder that is full, closed, shut down, dropped or left alone: nobody waits for ever, and the numbers add up.

use std::time::Duration;

use futures_util::FutureExt;
use lastprice::serde_json::json;
use lastprice::{
    ErrorKind, Event, NewAssignment, NotTakenReason, Recorder, RecorderOptions, Tracked, ViewId,
};
use tokio::task::JoinSet;

use crate::support::poll_n;
use crate::support_recorder::{Auditor, LONG, adds_up, numbers, usage, view};
use crate::support_repo::*;

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
    eventually("the cancel has arrived", async || {
        server.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
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
