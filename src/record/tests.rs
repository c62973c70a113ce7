//! The queue under anything that callers and lanes may do, and what becomes of a batch that is let go.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::sync::oneshot;

use super::batch::Batch;
use super::event::{Event, Tracked};
use super::options::RecorderOptions;
use super::queue::{Next, Phase, Queue};
use super::shared::Shared;
use super::telemetry::Settled;
use crate::error::ErrorKind;
use crate::id::{ExperimentId, TenantId, UserId};
use crate::repo::{NewAssignment, NewView};

fn user(name: &str, n: u8) -> UserId {
    UserId::new(format!("{name}-{n}")).unwrap()
}

fn view(user: UserId) -> Event {
    NewView::new(ExperimentId::new(), user).into()
}

#[derive(Debug, Clone)]
enum Step {
    /// A view of a user's of a tenant, which somebody may wait for.
    View(u8, u8, bool),
    /// An assignment of a user's with an account, and then a view of the account's.
    ByAccount(u8, u8, u8),
    Take,
    Finish(u8),
    Fail(u8),
    Flush,
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..3, 0u8..8, any::<bool>()).prop_map(|(t, u, w)| Step::View(t, u, w)),
        2 => (0u8..3, 0u8..8, 0u8..8).prop_map(|(t, u, a)| Step::ByAccount(t, u, a)),
        4 => Just(Step::Take),
        3 => any::<u8>().prop_map(Step::Finish),
        1 => any::<u8>().prop_map(Step::Fail),
        1 => Just(Step::Flush),
        2 => any::<u8>().prop_map(Step::Wait),
    ]
}

/// Callers and lanes, and what they know. An event is known by its bytes, which are its number.
struct Model {
    queue: Queue,
    now: Instant,
    tenants: Vec<TenantId>,
    pushed: usize,
    /// By what they are written under, in the order of their acceptance.
    order: HashMap<usize, Vec<usize>>,
    in_hand: Vec<Batch>,
    settled: HashSet<usize>,
    flushes: Vec<(usize, oneshot::Receiver<()>)>,
}

impl Model {
    fn push(&mut self, tenant: u8, event: Event, tracked: bool, after: &[usize]) -> usize {
        self.pushed += 1;
        let reply = tracked.then(|| oneshot::channel().0);
        self.queue.push(self.tenants[tenant as usize], event, self.pushed, reply, self.now);
        self.order.insert(self.pushed, after.to_vec());
        self.pushed
    }

    fn take(&mut self) -> bool {
        match self.queue.next(self.now) {
            Next::Write(batch) => {
                assert!(self.in_hand.iter().all(|other| other.shard != batch.shard), "two of a shard");
                assert!(batch.units.iter().all(|unit| !unit.tickets.is_empty()));
                self.in_hand.push(batch);
                true
            }
            _ => false,
        }
    }

    fn finish(&mut self, at: usize) {
        let batch = self.in_hand.swap_remove(at);
        let mut sums = Settled::default();
        for ticket in batch.units.iter().flat_map(|unit| &unit.tickets) {
            for before in &self.order[&ticket.bytes] {
                assert!(self.settled.contains(before), "{} before {before}", ticket.bytes);
            }
            assert!(!self.settled.contains(&ticket.bytes), "{} twice", ticket.bytes);
            self.settled.insert(ticket.bytes);
            self.queue.settle(ticket, &mut sums, Some(&Tracked::Written), self.now);
        }
        self.queue.finish(&batch, self.now);
        self.queue.flushed().into_iter().for_each(|told| told.send(()).unwrap());
    }

    fn check(&mut self) {
        let stats = self.queue.stats;
        assert_eq!((stats.accepted, stats.written), (self.pushed as u64, self.settled.len() as u64));
        assert_eq!(stats.accepted, stats.written + stats.pending);
        let waiting: usize = (1..=self.pushed).filter(|n| !self.settled.contains(n)).sum();
        assert_eq!(stats.pending_bytes, waiting as u64);
        for (until, done) in &mut self.flushes {
            let is_done = (1..=*until).all(|n| self.settled.contains(&n));
            assert!(!is_done || done.try_recv().is_ok() || done.is_terminated());
            assert!(is_done || done.try_recv().is_err(), "flushed too early");
        }
        self.flushes.retain(|(_, done)| !done.is_terminated());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn whatever_happens_every_event_is_written_once_and_in_its_order(
        steps in prop::collection::vec(step(), 1..200),
        lanes in 1u32..5,
    ) {
        let max_age = Duration::from_millis(50);
        let mut model = Model {
            queue: Queue::new(lanes, max_age),
            now: Instant::now(),
            tenants: (0..3).map(|_| TenantId::new()).collect(),
            pushed: 0,
            order: HashMap::new(),
            in_hand: Vec::new(),
            settled: HashSet::new(),
            flushes: Vec::new(),
        };
        // Of a batch, assignments are written first: one may overtake a view, and a view nothing.
        let mut quotes: HashMap<(u8, UserId), usize> = HashMap::new();
        let mut views: HashMap<(u8, UserId), usize> = HashMap::new();
        for step in steps {
            match step {
                Step::View(tenant, n, tracked) => {
                    let key = (tenant, user("user", n));
                    let after: Vec<usize> = [&quotes, &views].iter().filter_map(|m| m.get(&key)).copied().collect();
                    let event = view(key.1.clone());
                    views.insert(key, model.push(tenant, event, tracked, &after));
                }
                Step::ByAccount(tenant, n, account) => {
                    let (user, account) = ((tenant, user("user", n)), (tenant, user("account", account)));
                    let quote = NewAssignment::new(ExperimentId::new(), user.1.clone()).account(account.1.clone());
                    let after: Vec<usize> = quotes.get(&user).copied().into_iter().collect();
                    let number = model.push(tenant, quote.into(), false, &after);
                    quotes.insert(user, number);
                    let before = views.get(&account).copied();
                    let after: Vec<usize> = before.into_iter().chain([number]).collect();
                    let event = view(account.1.clone());
                    views.insert(account, model.push(tenant, event, false, &after));
                }
                Step::Take if model.in_hand.len() < lanes as usize => _ = model.take(),
                Step::Take => {}
                Step::Finish(_) | Step::Fail(_) if model.in_hand.is_empty() => {}
                Step::Finish(at) => model.finish(at as usize % model.in_hand.len()),
                Step::Fail(at) => {
                    let at = at as usize % model.in_hand.len();
                    let batch = model.in_hand.swap_remove(at);
                    let due = model.now + Duration::from_millis(20);
                    prop_assert!(model.queue.put_back(batch, due).is_none());
                }
                Step::Flush => {
                    let done = model.queue.flush(model.now);
                    prop_assert_eq!(done.is_none(), model.pushed == model.settled.len());
                    model.flushes.extend(done.map(|done| (model.pushed, done)));
                }
                Step::Wait(millis) => model.now += Duration::from_millis(millis.into()),
            }
            model.check();
        }
        // Left to themselves, the lanes write all of it, and end.
        model.queue.phase = Phase::Closing;
        model.queue.hurry(model.now);
        while model.settled.len() < model.pushed {
            if !model.take() {
                if model.in_hand.is_empty() {
                    let due = model.queue.first_due();
                    prop_assert!(due.is_some_and(|due| due > model.now), "nobody will ever come");
                    model.now = due.unwrap_or(model.now);
                } else {
                    model.finish(0);
                }
            }
            model.check();
        }
        while !model.in_hand.is_empty() {
            model.finish(0);
        }
        prop_assert!(model.flushes.is_empty());
        prop_assert!(matches!(model.queue.next(model.now), Next::End));
        prop_assert!(model.queue.is_empty());
    }
}

#[test]
fn a_flush_does_not_wait_for_what_comes_after_it() {
    let (mut queue, now) = (Queue::new(64, Duration::ZERO), Instant::now());
    let mut sums = Settled::default();
    let mut write = |queue: &mut Queue| {
        let Next::Write(batch) = queue.next(now) else { panic!("nothing to do") };
        batch.units.iter().flat_map(|unit| &unit.tickets).for_each(|ticket| {
            queue.settle(ticket, &mut sums, Some(&Tracked::Written), now);
        });
        queue.finish(&batch, now);
        queue.flushed().into_iter().for_each(|told| told.send(()).unwrap());
    };
    queue.push(TenantId::new(), view(user("user", 0)), 1, None, now);
    let Next::Write(slow) = queue.next(now) else { panic!("nothing to do") };
    // Others come and go meanwhile, and each time somebody wants to know.
    let mut flushes = Vec::new();
    for _ in 0..3 {
        flushes.extend(queue.flush(now));
        queue.push(TenantId::new(), view(user("user", 0)), 1, None, now);
        flushes.extend(queue.flush(now));
        write(&mut queue);
    }
    flushes.extend(queue.flush(now));
    queue.push(TenantId::new(), view(user("user", 0)), 1, None, now);
    assert!(flushes.iter_mut().all(|done| done.try_recv().is_err()), "the slow one is not settled");
    assert!(queue.put_back(slow, now).is_none());
    write(&mut queue);
    assert!(flushes.iter_mut().all(|done| done.try_recv().is_ok()), "a flush waits for a later event");
}

/// As if a lane had panicked, or its runtime had gone.
#[tokio::test]
async fn who_waits_for_a_batch_that_is_let_go_is_told() {
    let shared = Shared::new(&RecorderOptions::new().lanes(1));
    let tenant = TenantId::new();
    let mut tracking = tokio::task::JoinSet::new();
    for n in 0..3 {
        let (shared, event) = (shared.clone(), view(user("user", n)));
        tracking.spawn(async move { shared.track(tenant, event).await });
    }
    let quote = NewAssignment::new(ExperimentId::new(), user("user", 0));
    while shared.stats().pending < 3 {
        tokio::task::yield_now().await;
    }
    shared.record(tenant, quote.into()).unwrap();
    drop(shared.next().await.unwrap());
    while let Some(told) = tracking.join_next().await {
        // The assignment was first, so only that may have been under way.
        assert_eq!(told.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    }
    let report = shared.report();
    assert_eq!((report.stats.dropped, report.stats.pending, report.in_doubt), (4, 0, 1));
    shared.flush().await;

    // What nobody has in hand is given up with the last lane.
    shared.record(tenant, view(user("user", 1))).unwrap();
    shared.lane_ends();
    assert_eq!((shared.stats().dropped, shared.stats().pending), (5, 0));
    assert!(shared.record(tenant, view(user("user", 1))).is_err());
    assert!(shared.next().await.is_none());
}
