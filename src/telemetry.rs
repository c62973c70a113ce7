//! What exporters are told, by the crate `metrics`: every name with its unit, in one place. Without the feature, nothing.
//!
//! The names are an interface: `docs/observability.md` has them all, and a test compares the two.
//!
//! Of the gauges the changes are told, and not the levels: whatever their order, and however many clients and recorders there
//! are, the sums are right. (But for a staleness, of which a sum would say nothing.)

use std::time::Duration;

/// Numbers of a pool at one moment, and what was last told of it.
#[derive(Debug)]
pub(crate) struct PoolGauges {
    #[cfg(feature = "metrics")]
    server: &'static str,
    #[cfg(feature = "metrics")]
    told: std::sync::Mutex<[usize; 4]>,
}

/// The current number of each gauge of a pool, in the order of [`PoolGauges::NAMES`].
pub(crate) type PoolNumbers = [usize; 4];

#[cfg(feature = "metrics")]
mod exporter {
    use std::sync::PoisonError;

    use metrics::{Unit, counter, gauge, histogram};

    use super::*;

    impl PoolGauges {
        const NAMES: [&'static str; 4] = [
            "lastprice_pool_max",
            "lastprice_pool_size",
            "lastprice_pool_available",
            "lastprice_pool_waiting",
        ];

        /// Of the pool of the `primary`, or of a `replica`.
        pub(crate) fn of(server: &'static str) -> Self {
            PoolGauges { server, told: std::sync::Mutex::default() }
        }

        /// Tells what has changed. The numbers are read under the lock, so that an older one never follows a newer one.
        pub(crate) fn tell(&self, now: impl FnOnce() -> PoolNumbers) {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            let now = now();
            for ((name, now), told) in Self::NAMES.into_iter().zip(now).zip(told.iter_mut()) {
                if now != *told {
                    gauge!(name, "server" => self.server).increment(now as f64 - *told as f64);
                    *told = now;
                }
            }
        }
    }

    impl Drop for PoolGauges {
        fn drop(&mut self) {
            self.tell(|| [0; 4]);
        }
    }

    /// `error` is the name of its kind, or `dropped`.
    pub(crate) fn statement(
        operation: &'static str,
        took: Duration,
        retries: u32,
        error: Option<&'static str>,
    ) {
        histogram!("lastprice_statement_seconds", "operation" => operation).record(took.as_secs_f64());
        if retries > 0 {
            counter!("lastprice_statement_retries_total", "operation" => operation)
                .increment(u64::from(retries));
        }
        if let Some(kind) = error {
            counter!("lastprice_statement_errors_total", "operation" => operation, "kind" => kind)
                .increment(1);
        }
    }

    /// What came of a read that a replica might have answered.
    pub(crate) fn replica_read(outcome: &'static str) {
        counter!("lastprice_replica_reads_total", "outcome" => outcome).increment(1);
    }

    pub(crate) fn replica_staleness(staleness: Duration) {
        gauge!("lastprice_replica_staleness_seconds").set(staleness.as_secs_f64());
    }

    pub(crate) fn reloaded(outcome: &'static str) {
        counter!("lastprice_assigner_reloads_total", "outcome" => outcome).increment(1);
    }

    pub(crate) fn listens(is_listening: bool) {
        gauge!("lastprice_assigner_listening").increment(if is_listening { 1.0 } else { -1.0 });
    }

    pub(crate) fn refresher_turn(outcome: &'static str, took: Duration) {
        counter!("lastprice_refresher_turns_total", "outcome" => outcome).increment(1);
        histogram!("lastprice_refresher_turn_seconds").record(took.as_secs_f64());
    }

    pub(crate) fn recorder_accepted(bytes: u32) {
        counter!("lastprice_recorder_accepted_total").increment(1);
        gauge!("lastprice_recorder_pending_events").increment(1.0);
        gauge!("lastprice_recorder_pending_bytes").increment(f64::from(bytes));
    }

    pub(crate) fn recorder_settled(counts: [u64; 4], bytes: usize) {
        let names = [
            "lastprice_recorder_written_total",
            "lastprice_recorder_duplicate_total",
            "lastprice_recorder_rejected_total",
            "lastprice_recorder_dropped_total",
        ];
        for (name, more) in names.into_iter().zip(counts) {
            counter!(name).increment(more);
        }
        gauge!("lastprice_recorder_pending_events").decrement(counts.iter().sum::<u64>() as f64);
        gauge!("lastprice_recorder_pending_bytes").decrement(bytes as f64);
    }

    pub(crate) fn recorder_committed(rows: usize, took: Duration) {
        histogram!("lastprice_recorder_batch_rows").record(rows as f64);
        histogram!("lastprice_recorder_commit_seconds").record(took.as_secs_f64());
    }

    /// Tells the exporter what the names mean. Again and again does no harm.
    pub(crate) fn describe() {
        use metrics::{
            describe_counter as counter, describe_gauge as gauge, describe_histogram as histogram,
        };
        let seconds = Unit::Seconds;
        histogram!(
            "lastprice_statement_seconds",
            seconds,
            "How long statements took, with the wait for a connection"
        );
        counter!(
            "lastprice_statement_errors_total",
            Unit::Count,
            "Statements that failed, or whose future was dropped"
        );
        counter!("lastprice_statement_retries_total", Unit::Count, "Statements that were sent again");
        gauge!("lastprice_pool_max", Unit::Count, "Connections that there may be");
        gauge!("lastprice_pool_size", Unit::Count, "Connections that there are");
        gauge!("lastprice_pool_available", Unit::Count, "Connections that are free");
        gauge!("lastprice_pool_waiting", Unit::Count, "Calls that wait for a connection");
        counter!(
            "lastprice_replica_reads_total",
            Unit::Count,
            "Reads that a replica might have answered, by what came of it"
        );
        gauge!(
            "lastprice_replica_staleness_seconds",
            seconds,
            "How old the data of a replica was at the most when one last answered"
        );
        gauge!(
            "lastprice_assigner_listening",
            Unit::Count,
            "Clients whose assigners hear of changes at once"
        );
        counter!(
            "lastprice_assigner_reloads_total",
            Unit::Count,
            "Loads of a tenant's experiments into an assigner"
        );
        counter!("lastprice_refresher_turns_total", Unit::Count, "Turns of refreshers");
        histogram!("lastprice_refresher_turn_seconds", seconds, "How long turns of refreshers took");
        counter!("lastprice_recorder_accepted_total", Unit::Count, "Events that recorders took");
        counter!("lastprice_recorder_written_total", Unit::Count, "Events that were written");
        counter!("lastprice_recorder_duplicate_total", Unit::Count, "Events that were there already");
        counter!("lastprice_recorder_rejected_total", Unit::Count, "Events that the database refused");
        counter!(
            "lastprice_recorder_dropped_total",
            Unit::Count,
            "Events that were given up after acceptance"
        );
        gauge!("lastprice_recorder_pending_events", Unit::Count, "Events that wait to be written");
        gauge!("lastprice_recorder_pending_bytes", Unit::Bytes, "What they hold in memory");
        histogram!("lastprice_recorder_batch_rows", Unit::Count, "Rows of the statements of recorders");
        histogram!("lastprice_recorder_commit_seconds", seconds, "How long these took, to the commit");
    }
}

#[cfg(feature = "metrics")]
pub(crate) use exporter::*;

#[cfg(not(feature = "metrics"))]
mod silence {
    use super::*;

    impl PoolGauges {
        pub(crate) fn of(_: &'static str) -> Self {
            PoolGauges {}
        }

        pub(crate) fn tell(&self, _: impl FnOnce() -> PoolNumbers) {}
    }

    pub(crate) fn statement(_: &'static str, _: Duration, _: u32, _: Option<&'static str>) {}

    pub(crate) fn replica_read(_: &'static str) {}

    pub(crate) fn replica_staleness(_: Duration) {}

    pub(crate) fn reloaded(_: &'static str) {}

    pub(crate) fn listens(_: bool) {}

    pub(crate) fn refresher_turn(_: &'static str, _: Duration) {}

    pub(crate) fn recorder_accepted(_: u32) {}

    pub(crate) fn recorder_settled(_: [u64; 4], _: usize) {}

    pub(crate) fn recorder_committed(_: usize, _: Duration) {}

    pub(crate) fn describe() {}
}

#[cfg(not(feature = "metrics"))]
pub(crate) use silence::*;
