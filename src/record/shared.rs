//! What the handles and the lanes of a recorder share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, Semaphore, TryAcquireError, oneshot};

use super::batch::{Batch, Ticket, Unit};
use super::event::{Event, NotTaken, NotTakenReason, Tracked, closed};
use super::options::{RecorderOptions, RecorderReport, RecorderStats};
use super::queue::{Next, Phase, Queue};
use super::telemetry::{self, Seldom, Settled};
use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;

pub(super) struct Shared {
    queue: Mutex<Queue>,
    /// Room for so many events and bytes: who waits for it is served in turn.
    events: Semaphore,
    bytes: Semaphore,
    max_bytes: usize,
    /// Wakes a lane.
    wake: Notify,
    /// How many lanes there are.
    lanes: AtomicU32,
    warnings: Mutex<Warnings>,
}

#[derive(Default)]
struct Warnings {
    not_taken: Seldom,
    lost: Seldom,
    failing: Seldom,
}

impl Shared {
    pub(super) fn new(options: &RecorderOptions) -> Arc<Self> {
        Arc::new(Shared {
            queue: Mutex::new(Queue::new(options.lanes, options.max_age)),
            events: Semaphore::new(options.max_events),
            bytes: Semaphore::new(options.max_bytes),
            max_bytes: options.max_bytes,
            wake: Notify::new(),
            lanes: AtomicU32::new(options.lanes),
            warnings: Mutex::default(),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stats(&self) -> RecorderStats {
        self.queue().stats
    }

    pub(super) fn report(&self) -> RecorderReport {
        let queue = self.queue();
        RecorderReport { stats: queue.stats, in_doubt: queue.in_doubt }
    }

    /// The bytes of an event that may be taken at all.
    fn check(&self, event: &Event) -> Result<u32> {
        event.check()?;
        let bytes = event.bytes();
        let too_large = || Error::invalid("event", "is larger than `max_bytes` of the recorder");
        u32::try_from(bytes).ok().filter(|_| bytes <= self.max_bytes).ok_or_else(too_large)
    }

    pub(super) fn record(&self, tenant: TenantId, event: Event) -> Result<(), NotTaken> {
        let bytes = match self.check(&event) {
            Ok(bytes) => bytes,
            Err(error) => return Err(NotTaken::new(event, NotTakenReason::Invalid(error))),
        };
        let room = self.events.try_acquire().and_then(|one| Ok((one, self.bytes.try_acquire_many(bytes)?)));
        let taken = match room {
            Ok((event_room, byte_room)) => self.accept(tenant, event, bytes, None).map(|()| {
                event_room.forget();
                byte_room.forget();
            }),
            Err(TryAcquireError::Closed) => Err(NotTaken::new(event, NotTakenReason::Closed)),
            Err(TryAcquireError::NoPermits) => Err(NotTaken::new(event, NotTakenReason::Full)),
        };
        taken.inspect_err(|not_taken| {
            if let Some(events) = self.warnings().not_taken.tell(1, Instant::now()) {
                tracing::warn!(events, reason = %not_taken, "the recorder did not take events");
            }
        })
    }

    pub(super) async fn track(&self, tenant: TenantId, event: Event) -> Result<Tracked> {
        let bytes = self.check(&event)?;
        let done = {
            let (event_room, byte_room) = (
                self.events.acquire().await.map_err(|_| closed())?,
                self.bytes.acquire_many(bytes).await.map_err(|_| closed())?,
            );
            let (reply, done) = oneshot::channel();
            self.accept(tenant, event, bytes, Some(reply)).map_err(|_| closed())?;
            event_room.forget();
            byte_room.forget();
            done
        };
        done.await.unwrap_or_else(|_| Err(Error::internal("the recorder lost sight of an event")))
    }

    /// Takes an event for which there is room; gives it back if the recorder is closed.
    fn accept(
        &self,
        tenant: TenantId,
        event: Event,
        bytes: u32,
        reply: Option<oneshot::Sender<Result<Tracked>>>,
    ) -> Result<(), NotTaken> {
        let mut queue = self.queue();
        if queue.phase != Phase::Open {
            return Err(NotTaken::new(event, NotTakenReason::Closed));
        }
        let before = queue.first_due();
        queue.push(tenant, event, bytes as usize, reply, Instant::now());
        // A lane that sleeps until a later moment, or for ever, has to look again.
        let is_urgent =
            queue.has_work() || queue.first_due().is_some_and(|due| before.is_none_or(|b| due < b));
        drop(queue);
        if is_urgent {
            self.wake.notify_one();
        }
        telemetry::accepted(bytes);
        Ok(())
    }

    /// What a lane is to do next; waits until there is something.
    pub(super) async fn next(self: &Arc<Self>) -> Option<InHand> {
        loop {
            let woken = self.wake.notified(); // before the look, so that nothing comes between
            let next = {
                let mut queue = self.queue();
                let next = queue.next(Instant::now());
                // Who goes to work does not look at the clock: somebody else has to.
                let is_more = queue.has_work() || queue.first_due().is_some();
                if matches!(next, Next::Write(_)) && is_more {
                    self.wake.notify_one();
                }
                next
            };
            match next {
                Next::Write(batch) => return Some(InHand { shared: Arc::clone(self), batch: Some(batch) }),
                Next::Wait(None) => woken.await,
                Next::Wait(Some(due)) => drop(tokio::time::timeout_at(due.into(), woken).await),
                Next::End => {
                    self.wake.notify_waiters();
                    return None;
                }
            }
        }
    }

    /// Settles a unit whose statement is committed.
    fn settle(&self, unit: Unit, outcomes: Vec<Tracked>) {
        let (mut sums, now) = (Settled::default(), Instant::now());
        let in_doubt = unit.in_doubt;
        let outcomes = outcomes.into_iter().map(|outcome| match outcome {
            // It was this very event, by an attempt whose answer was lost.
            Tracked::Duplicate if in_doubt => Tracked::Written,
            outcome => outcome,
        });
        let settled: Vec<(Ticket, Tracked)> = unit.tickets.into_iter().zip(outcomes).collect();
        let flushed = {
            let mut queue = self.queue();
            for (ticket, outcome) in &settled {
                queue.settle(ticket, &mut sums, Some(outcome), now);
            }
            if queue.has_work() {
                self.wake.notify_one(); // a gate was opened
            }
            queue.flushed()
        };
        self.make_room(&sums);
        self.warn_of_lost(&sums);
        for (ticket, outcome) in settled {
            if let Some(reply) = ticket.reply {
                let _ = reply.send(Ok(outcome)); // nobody may be left who waits
            }
        }
        tell(flushed);
    }

    /// Gives up events; some may have been written.
    fn drop_all(&self, tickets: Vec<(Ticket, bool)>) {
        let (mut sums, now) = (Settled::default(), Instant::now());
        let flushed = {
            let mut queue = self.queue();
            for (ticket, in_doubt) in &tickets {
                queue.settle(ticket, &mut sums, None, now);
                queue.in_doubt += u64::from(*in_doubt);
            }
            queue.flushed()
        };
        self.make_room(&sums);
        self.warn_of_lost(&sums);
        for (ticket, in_doubt) in tickets {
            let error = || match in_doubt {
                true => Error::new(
                    ErrorKind::OutcomeUnknown,
                    "the recorder ended before it was known whether the event was written",
                ),
                false => Error::new(
                    ErrorKind::Closed,
                    "the recorder ended before the event was written: it was not",
                ),
            };
            if let Some(reply) = ticket.reply {
                let _ = reply.send(Err(error()));
            }
        }
        tell(flushed);
        self.wake.notify_waiters();
    }

    fn make_room(&self, sums: &Settled) {
        self.events.add_permits(usize::try_from(sums.events()).unwrap_or(0));
        self.bytes.add_permits(sums.bytes);
        telemetry::settled(sums);
    }

    fn warnings(&self) -> MutexGuard<'_, Warnings> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn warn_of_lost(&self, sums: &Settled) {
        if sums.rejected + sums.dropped == 0 {
            return;
        }
        let told = self.warnings().lost.tell(sums.rejected + sums.dropped, Instant::now());
        if let Some(events) = told {
            tracing::warn!(events, "events were rejected or dropped, and are not written");
        }
    }

    fn warn_of_failure(&self, error: &Error, failures: u32) {
        if let Some(attempts) = self.warnings().failing.tell(1, Instant::now()) {
            tracing::warn!(%error, failures, attempts, "events cannot be written now; they are tried again");
        }
    }

    pub(super) fn wants_fold(&self, tenant: TenantId) -> bool {
        self.queue().wants_fold(tenant)
    }

    pub(super) async fn flush(&self) {
        let done = self.queue().flush(Instant::now());
        self.wake.notify_waiters();
        if let Some(done) = done {
            let _ = done.await; // it is told in any case: all events are settled, or dropped
        }
    }

    /// Takes no more events. How many are pending.
    pub(super) fn close(&self) -> u64 {
        self.events.close();
        self.bytes.close();
        let pending = {
            let mut queue = self.queue();
            if queue.phase == Phase::Open {
                queue.phase = Phase::Closing;
            }
            queue.hurry(Instant::now());
            queue.stats.pending
        };
        self.wake.notify_waiters();
        pending
    }

    /// The last one to end leaves nobody waiting.
    pub(super) fn lane_ends(&self) {
        if self.lanes.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end();
        }
    }

    /// Gives up what nobody has in hand, and takes no more.
    pub(super) fn end(&self) {
        self.close();
        let tickets = self.queue().give_up();
        self.drop_all(tickets);
    }
}

fn tell(flushed: Vec<oneshot::Sender<()>>) {
    for told in flushed {
        let _ = told.send(()); // nobody may be left who waits
    }
}

/// A batch that a lane has in hand. Let go without a word, because the lane was aborted or has panicked, its events are
/// dropped; whoever waits for one is told.
pub(super) struct InHand {
    shared: Arc<Shared>,
    /// `None` only after it was given back.
    batch: Option<Batch>,
}

impl InHand {
    pub(super) fn batch(&mut self) -> Option<&mut Batch> {
        self.batch.as_mut()
    }

    /// The first unit is written, or never will be.
    pub(super) fn settle(&mut self, outcomes: Vec<Tracked>) {
        if let Some(batch) = &mut self.batch
            && let Some(unit) = batch.units.pop_front()
        {
            batch.failures = 0;
            self.shared.settle(unit, outcomes);
        }
    }

    /// Has it tried again after a pause.
    pub(super) fn put_back(mut self, due: Instant, error: &Error) {
        let Some(batch) = self.batch.take() else { return };
        self.shared.warn_of_failure(error, batch.failures);
        let refused = self.shared.queue().put_back(batch, due);
        if let Some(batch) = refused {
            self.shared.drop_all(batch.into_tickets().collect());
        }
    }

    pub(super) fn finish(mut self) {
        if let Some(batch) = self.batch.take() {
            self.shared.queue().finish(&batch, Instant::now());
        }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let Some(mut batch) = self.batch.take() else { return };
        // It may have been on its way.
        if let Some(unit) = batch.units.front_mut() {
            unit.in_doubt = true;
        }
        self.shared.queue().finish(&batch, Instant::now());
        self.shared.drop_all(batch.into_tickets().collect());
    }
}
