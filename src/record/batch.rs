//! Events of one shard that are written together.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use tokio::sync::oneshot;

use super::event::{Event, Tracked};
use super::queue::{Gate, Queued, ShardId};
use super::write::Rows;
use crate::error::Result;
use crate::id::ExperimentId;
use crate::repo::{NewAssignment, NewConversion, NewUsage, NewView};

/// What is known of an event besides itself.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) at: Instant,
    pub(super) epoch: u64,
    pub(super) bytes: usize,
    /// What it opens when it is settled.
    pub(super) gate: Option<Gate>,
    /// Who waits for it.
    pub(super) reply: Option<oneshot::Sender<Result<Tracked>>>,
}

/// Rows that go into one statement, and a ticket for each.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) rows: Rows,
    pub(super) tickets: Vec<Ticket>,
    /// An attempt may have written them.
    pub(super) in_doubt: bool,
}

impl Unit {
    fn new(rows: Rows, tickets: Vec<Ticket>) -> Self {
        Unit { rows, tickets, in_doubt: false }
    }

    /// Leaves the first half, and returns the second one.
    fn split(&mut self) -> Unit {
        let at = self.tickets.len() / 2;
        Unit { rows: self.rows.split_off(at), tickets: self.tickets.split_off(at), in_doubt: self.in_doubt }
    }
}

#[derive(Debug)]
pub(super) struct Batch {
    pub(super) shard: ShardId,
    /// In the order in which they are written: assignments, without which nothing else is taken, come first.
    pub(super) units: VecDeque<Unit>,
    /// How often it has failed in a row.
    pub(super) failures: u32,
    /// Whether it has failed before.
    pub(super) is_retry: bool,
}

impl Batch {
    /// Has the first unit written in two parts.
    pub(super) fn split(&mut self) {
        if let Some(mut unit) = self.units.pop_front() {
            let second = unit.split();
            self.units.push_front(second);
            self.units.push_front(unit);
        }
    }

    /// All that is in it, and whether it may have been written.
    pub(super) fn into_tickets(self) -> impl Iterator<Item = (Ticket, bool)> {
        let of = |unit: Unit| unit.tickets.into_iter().map(move |ticket| (ticket, unit.in_doubt));
        self.units.into_iter().flat_map(of)
    }
}

/// A batch that is being put together.
#[derive(Debug, Default)]
pub(super) struct Forming {
    assignments: Vec<(ExperimentId, Vec<NewAssignment>, Vec<Ticket>)>,
    by_experiment: HashMap<ExperimentId, usize>,
    views: (Vec<NewView>, Vec<Ticket>),
    conversions: (Vec<NewConversion>, Vec<Ticket>),
    usage: (Vec<NewUsage>, Vec<Ticket>),
}

impl Forming {
    pub(super) fn push(&mut self, Queued { event, ticket }: Queued) {
        let tickets = match event {
            Event::Assignment(row) => {
                let id = row.experiment_id;
                let at = *self.by_experiment.entry(id).or_insert(self.assignments.len());
                if at == self.assignments.len() {
                    self.assignments.push((id, Vec::new(), Vec::new()));
                }
                let (_, rows, tickets) = &mut self.assignments[at];
                rows.push(row);
                tickets
            }
            Event::View(row) => {
                self.views.0.push(row);
                &mut self.views.1
            }
            Event::Conversion(row) => {
                self.conversions.0.push(*row);
                &mut self.conversions.1
            }
            Event::Usage(row) => {
                self.usage.0.push(row);
                &mut self.usage.1
            }
        };
        tickets.push(ticket);
    }

    pub(super) fn into_batch(self, shard: ShardId) -> Batch {
        let assignments = self.assignments.into_iter();
        let units = assignments
            .map(|(experiment, rows, tickets)| Unit::new(Rows::Assignments(experiment, rows), tickets))
            .chain([
                Unit::new(Rows::Views(self.views.0), self.views.1),
                Unit::new(Rows::Conversions(self.conversions.0), self.conversions.1),
                Unit::new(Rows::Usage(self.usage.0), self.usage.1),
            ])
            .filter(|unit| !unit.tickets.is_empty())
            .collect();
        Batch { shard, units, failures: 0, is_retry: false }
    }
}
