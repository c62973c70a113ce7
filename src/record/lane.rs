//! A lane: takes a batch, writes it, takes the next.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument as _;
use tracing::field::Empty;

use super::event::{Rejection, Tracked};
use super::policy::{self, Verdict};
use super::shared::{InHand, Shared};
use super::telemetry;
use crate::error::Error;
use crate::repo::fold_all;
use crate::scope::{Session, TenantHandle};

/// One of the lanes. The last one that ends, however that happens, leaves nobody waiting.
pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) session: Arc<Session>,
}

impl Lane {
    pub(super) async fn run(self) {
        while let Some(in_hand) = self.shared.next().await {
            self.write(in_hand).await;
        }
    }

    async fn write(&self, mut in_hand: InHand) {
        let Some(id) = in_hand.batch().map(|batch| batch.shard.tenant) else { return };
        let tenant = TenantHandle::new(Arc::clone(&self.session), id);
        let mut wants_fold = false;
        while let Some(batch) = in_hand.batch()
            && let Some(unit) = batch.units.front_mut()
        {
            let (rows, started) = (unit.tickets.len(), Instant::now());
            let span = tracing::debug_span!(
                target: "lastprice",
                "lastprice.batch",
                tenant = %id,
                kind = unit.rows.kind(),
                rows,
                attempt = batch.failures + 1,
                outcome = Empty
            );
            let writing = self.session.in_time(2, unit.rows.write(&tenant)).instrument(span.clone());
            let written = match writing.await {
                Ok(outcomes) if outcomes.len() != rows => Err(Error::internal("rows have no outcomes")),
                written => written,
            };
            span.record("outcome", written.as_ref().map_or_else(|e| e.kind().as_str(), |_| "ok"));
            let error = match written {
                Ok(outcomes) => {
                    telemetry::committed(rows, started.elapsed());
                    wants_fold |= self.shared.wants_fold(id);
                    in_hand.settle(outcomes);
                    continue;
                }
                Err(error) => error,
            };
            unit.in_doubt |= policy::may_be_written(&error);
            match policy::verdict(&error, rows) {
                Verdict::Over => return self.shared.end(), // and what is in hand is dropped
                Verdict::Bisect => batch.split(),
                Verdict::Reject => in_hand.settle(rejected(error, rows)),
                verdict @ (Verdict::Again | Verdict::Smaller) => {
                    if verdict == Verdict::Smaller {
                        batch.split();
                    }
                    batch.failures = batch.failures.saturating_add(1);
                    let due = Instant::now() + policy::pause(batch.failures, dice());
                    in_hand.put_back(due, &error);
                    return;
                }
            }
        }
        in_hand.finish();
        if wants_fold {
            fold_all(Arc::clone(&self.session), id).await;
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shared.lane_ends();
    }
}

/// The same reason for each; the last one, which is the only one of a single row, has all that the error knows.
fn rejected(error: Error, rows: usize) -> Vec<Tracked> {
    let copies: Vec<Error> = (1..rows).map(|_| Error::new(error.kind(), error.to_string())).collect();
    copies.into_iter().chain([error]).map(|error| Tracked::Rejected(Rejection::Refused(error))).collect()
}

/// Random enough for a pause.
fn dice() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}
