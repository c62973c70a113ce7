//! What waits to be written, by tenant and lane, and the numbers of it: plain data, behind one short lock.
//!
//! A *shard* is a queue of events that are written in their order: those of the users of a tenant whose ids fall into one
//! lane. At most one batch of a shard is in hand, so that nothing overtakes anything; meanwhile the next one fills.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::batch::{Batch, Forming, Ticket};
use super::event::{Event, Tracked};
use super::options::RecorderStats;
use super::policy::{self, Load, ROWS};
use super::telemetry::Settled;
use crate::id::TenantId;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ShardId {
    pub(super) tenant: TenantId,
    lane: u32,
}

/// An assignment that other shards wait for: see [`Entry::Gate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gate {
    number: u64,
    shard: ShardId,
}

pub(super) struct Queued {
    pub(super) event: Event,
    pub(super) ticket: Ticket,
}

enum Entry {
    Event(Box<Queued>),
    /// Nothing behind it is written before the assignment of this number is: that is in the queue of the user, and may be
    /// stored under the id of an account whose views and sales come here. Nobody waits in a circle, since each waits for
    /// what was accepted before.
    Gate(u64),
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing can be written now.
    Rests,
    /// Waits for company until then.
    Lingers(Instant),
    /// Waits for a lane.
    Ready,
    /// A lane has a batch of it in hand.
    InHand,
    /// The batch has failed, and is tried again then.
    Fails(Instant),
}

struct Shard {
    entries: VecDeque<Entry>,
    events: usize,
    /// So many entries at the front are not to linger.
    hurry: usize,
    turn: Turn,
    /// What is left of a batch that has failed.
    failed: Option<Batch>,
}

/// What a lane is to do.
pub(super) enum Next {
    Write(Batch),
    /// Nothing, until this moment if nobody wakes it before.
    Wait(Option<Instant>),
    /// All is done, and no more will come.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Open,
    /// Takes no more, and writes what it has.
    Closing,
    /// Takes no more, and writes no more.
    Over,
}

pub(super) struct Queue {
    lanes: u32,
    max_age: Duration,
    pub(super) phase: Phase,
    pub(super) stats: RecorderStats,
    /// Of the dropped, how many may have been written.
    pub(super) in_doubt: u64,
    shards: HashMap<ShardId, Shard>,
    ready: VecDeque<ShardId>,
    /// Those of which a batch has failed, and is to be tried again.
    again: VecDeque<ShardId>,
    /// How many of those are in hand.
    retrying: u32,
    due: BTreeSet<(Instant, ShardId)>,
    closed_gates: HashSet<u64>,
    gates: u64,
    /// How many events are pending of those that were accepted before a flush, and of those between each and the next.
    epochs: BTreeMap<u64, u64>,
    epoch: u64,
    flushes: Vec<(u64, oneshot::Sender<()>)>,
    /// Statements since the last fold.
    unfolded: HashMap<TenantId, u32>,
}

impl Queue {
    pub(super) fn new(lanes: u32, max_age: Duration) -> Self {
        Queue {
            lanes,
            max_age,
            phase: Phase::Open,
            stats: RecorderStats::default(),
            in_doubt: 0,
            shards: HashMap::new(),
            ready: VecDeque::new(),
            again: VecDeque::new(),
            retrying: 0,
            due: BTreeSet::new(),
            closed_gates: HashSet::new(),
            gates: 0,
            epochs: BTreeMap::new(),
            epoch: 0,
            flushes: Vec::new(),
            unfolded: HashMap::new(),
        }
    }

    /// Accepts an event; somebody waits for it if there is a `reply`.
    pub(super) fn push(
        &mut self,
        tenant: TenantId,
        event: Event,
        bytes: usize,
        reply: Option<oneshot::Sender<crate::Result<Tracked>>>,
        now: Instant,
    ) {
        let (lanes, hurries) = (self.lanes, reply.is_some() || self.max_age.is_zero());
        let shard = |unit| ShardId { tenant, lane: policy::lane_of(unit, lanes) };
        let (user, account) = event.units();
        let id = shard(user);
        let gate = account.map(shard).filter(|other| *other != id).map(|other| {
            self.gates += 1;
            Gate { number: self.gates, shard: other }
        });
        if let Some(Gate { number, shard }) = gate {
            self.closed_gates.insert(number);
            self.shard(shard).entries.push_back(Entry::Gate(number));
        }
        let ticket = Ticket { at: now, epoch: self.epoch, bytes, gate, reply };
        self.stats.accepted += 1;
        self.stats.pending += 1;
        self.stats.pending_bytes += bytes as u64;
        *self.epochs.entry(self.epoch).or_default() += 1;
        let shard = self.shard(id);
        shard.entries.push_back(Entry::Event(Box::new(Queued { event, ticket })));
        shard.events += 1;
        if hurries {
            shard.hurry = shard.entries.len();
        }
        // What lingers is looked at again only if it need not.
        if shard.turn == Turn::Rests || hurries || shard.events == ROWS {
            self.ripen(id, now);
        }
    }

    fn shard(&mut self, id: ShardId) -> &mut Shard {
        self.shards.entry(id).or_insert_with(|| Shard {
            entries: VecDeque::new(),
            events: 0,
            hurry: 0,
            turn: Turn::Rests,
            failed: None,
        })
    }

    /// Finds out whose turn a shard's is, if that is not settled.
    fn ripen(&mut self, id: ShardId, now: Instant) {
        let Some(shard) = self.shards.get_mut(&id) else { return };
        if !matches!(shard.turn, Turn::Rests | Turn::Lingers(_)) {
            return;
        }
        shard.pass_gates(&self.closed_gates);
        let turn = match shard.entries.front() {
            None | Some(Entry::Gate(_)) => Turn::Rests,
            Some(Entry::Event(first)) => {
                let due = first.ticket.at + self.max_age;
                let ripe = shard.hurry > 0 || shard.events >= ROWS || due <= now;
                if ripe { Turn::Ready } else { Turn::Lingers(due) }
            }
        };
        let (before, is_empty) = (std::mem::replace(&mut shard.turn, turn), shard.entries.is_empty());
        if before != turn {
            if let Turn::Lingers(due) = before {
                self.due.remove(&(due, id));
            }
            match turn {
                Turn::Lingers(due) => _ = self.due.insert((due, id)),
                Turn::Ready => self.ready.push_back(id),
                _ => {}
            }
        }
        if is_empty {
            self.shards.remove(&id);
        }
    }

    /// The next batch, for a lane that has nothing in hand.
    pub(super) fn next(&mut self, now: Instant) -> Next {
        while let Some((_, id)) = self.due.first().filter(|(due, _)| *due <= now).copied() {
            self.due.pop_first();
            if let Some(shard) = self.shards.get_mut(&id) {
                let queue = if shard.failed.is_some() { &mut self.again } else { &mut self.ready };
                queue.push_back(id);
                shard.turn = Turn::Ready;
            }
        }
        // Those that failed first: each of them has waited, and there are not many at once.
        if self.retrying < policy::lanes_for_retries(self.lanes)
            && let Some(id) = self.again.pop_front()
            && let Some(shard) = self.shards.get_mut(&id)
            && let Some(batch) = shard.failed.take()
        {
            shard.turn = Turn::InHand;
            self.retrying += 1;
            return Next::Write(batch);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(shard) = self.shards.get_mut(&id) else { continue };
            shard.turn = Turn::InHand;
            return Next::Write(shard.form(id, &self.closed_gates));
        }
        match self.phase {
            Phase::Over => Next::End,
            Phase::Closing if self.stats.pending == 0 => Next::End,
            _ => Next::Wait(self.first_due()),
        }
    }

    /// Whether another lane has something to do.
    pub(super) fn has_work(&self) -> bool {
        !self.ready.is_empty()
            || !self.again.is_empty() && self.retrying < policy::lanes_for_retries(self.lanes)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let nobody_waits = self.epochs.is_empty() && self.flushes.is_empty() && self.closed_gates.is_empty();
        nobody_waits
            && self.shards.is_empty()
            && self.due.is_empty()
            && !self.has_work()
            && self.retrying == 0
    }

    /// When the next shard is due; a lane that waits for less has to know.
    pub(super) fn first_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// A batch has failed, and what is left of it is to be tried again. Given back if nothing is tried any more.
    pub(super) fn put_back(&mut self, mut batch: Batch, due: Instant) -> Option<Batch> {
        let id = batch.shard;
        self.retrying -= u32::from(std::mem::replace(&mut batch.is_retry, true));
        if self.phase == Phase::Over {
            return Some(batch);
        }
        let shard = self.shard(id);
        shard.turn = Turn::Fails(due);
        shard.failed = Some(batch);
        self.due.insert((due, id));
        None
    }

    /// A batch is done.
    pub(super) fn finish(&mut self, batch: &Batch, now: Instant) {
        self.retrying -= u32::from(batch.is_retry);
        if let Some(shard) = self.shards.get_mut(&batch.shard) {
            shard.turn = Turn::Rests;
            self.ripen(batch.shard, now);
        }
    }

    /// Counts one that is settled; the ticket goes on to whoever waits for it.
    pub(super) fn settle(
        &mut self,
        ticket: &Ticket,
        settled: &mut Settled,
        outcome: Option<&Tracked>,
        now: Instant,
    ) {
        let (stat, more) = match outcome {
            Some(Tracked::Written) => (&mut self.stats.written, &mut settled.written),
            Some(Tracked::Duplicate) => (&mut self.stats.duplicate, &mut settled.duplicate),
            Some(Tracked::Rejected(_)) => (&mut self.stats.rejected, &mut settled.rejected),
            None => (&mut self.stats.dropped, &mut settled.dropped),
        };
        *stat += 1;
        *more += 1;
        settled.bytes += ticket.bytes;
        self.stats.pending -= 1;
        self.stats.pending_bytes -= ticket.bytes as u64;
        if let Some(left) = self.epochs.get_mut(&ticket.epoch) {
            *left -= 1;
            if *left == 0 {
                self.epochs.remove(&ticket.epoch);
            }
        }
        if let Some(Gate { number, shard }) = ticket.gate {
            self.closed_gates.remove(&number);
            self.ripen(shard, now);
        }
    }

    /// Counts a statement of a tenant, which leaves deltas of metrics or reported usage behind; whether it is time to fold them.
    pub(super) fn wants_fold(&mut self, tenant: TenantId) -> bool {
        let statements = self.unfolded.entry(tenant).or_default();
        *statements += 1;
        *statements >= policy::FOLD_AFTER && self.unfolded.remove(&tenant).is_some()
    }

    /// Told when all that was accepted until now is settled; `None` if it is already.
    pub(super) fn flush(&mut self, now: Instant) -> Option<oneshot::Receiver<()>> {
        self.hurry(now);
        let last = *self.epochs.last_key_value()?.0;
        self.epoch = self.epoch.max(last + 1); // it may be settled, and the last pending one older
        let (told, done) = oneshot::channel();
        self.flushes.push((last, told));
        Some(done)
    }

    /// The flushes that are done, to be told.
    pub(super) fn flushed(&mut self) -> Vec<oneshot::Sender<()>> {
        let first = self.epochs.first_key_value().map_or(u64::MAX, |(epoch, _)| *epoch);
        let done = self.flushes.extract_if(.., |(last, _)| *last < first);
        done.map(|(_, told)| told).collect()
    }

    /// Nothing that is there lingers any longer. What has failed keeps its pause.
    pub(super) fn hurry(&mut self, now: Instant) {
        let ids: Vec<ShardId> = self.shards.keys().copied().collect();
        for id in ids {
            let shard = self.shard(id);
            shard.hurry = shard.entries.len();
            self.ripen(id, now);
        }
    }

    /// Gives up all that nobody has in hand.
    pub(super) fn give_up(&mut self) -> Vec<(Ticket, bool)> {
        self.phase = Phase::Over;
        let mut tickets = Vec::new();
        for (_, shard) in self.shards.drain() {
            tickets.extend(shard.failed.into_iter().flat_map(Batch::into_tickets));
            tickets.extend(shard.entries.into_iter().filter_map(|entry| match entry {
                Entry::Event(queued) => Some((queued.ticket, false)),
                Entry::Gate(_) => None,
            }));
        }
        self.ready.clear();
        self.again.clear();
        self.due.clear();
        tickets
    }
}

impl Shard {
    fn pass_gates(&mut self, closed: &HashSet<u64>) {
        while matches!(self.entries.front(), Some(Entry::Gate(number)) if !closed.contains(number)) {
            self.entries.pop_front();
            self.hurry = self.hurry.saturating_sub(1);
        }
    }

    /// As much from the front as goes into one batch.
    fn form(&mut self, id: ShardId, closed: &HashSet<u64>) -> Batch {
        let (mut batch, mut load) = (Forming::default(), Load::default());
        loop {
            self.pass_gates(closed);
            match self.entries.pop_front() {
                Some(Entry::Event(queued)) if load.takes(queued.event.kind(), queued.ticket.bytes) => {
                    self.events -= 1;
                    self.hurry = self.hurry.saturating_sub(1);
                    batch.push(*queued);
                }
                Some(entry) => {
                    self.entries.push_front(entry);
                    return batch.into_batch(id);
                }
                None => return batch.into_batch(id),
            }
        }
    }
}
