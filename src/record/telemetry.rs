//! What is told to the outside: warnings, each kind of them now and then only, and metrics if they are wanted.

use std::time::{Duration, Instant};

use crate::telemetry;
pub(super) use crate::telemetry::{recorder_accepted as accepted, recorder_committed as committed};

/// At most one warning in this time.
const SELDOM: Duration = Duration::from_secs(10);

/// Lets the first of many pass, and then now and then one, with the number of those it stands for.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    last: Option<Instant>,
    held_back: u64,
}

impl Seldom {
    /// How many are to be told of now; `None` if nobody is to be bothered.
    pub(super) fn tell(&mut self, more: u64, now: Instant) -> Option<u64> {
        self.held_back += more;
        let is_time = self.last.is_none_or(|last| now.saturating_duration_since(last) >= SELDOM);
        if self.held_back == 0 || !is_time {
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

/// What becomes of events at once.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) written: u64,
    pub(super) duplicate: u64,
    pub(super) rejected: u64,
    pub(super) dropped: u64,
    pub(super) bytes: usize,
}

impl Settled {
    pub(super) fn events(&self) -> u64 {
        self.written + self.duplicate + self.rejected + self.dropped
    }
}

pub(super) fn settled(settled: &Settled) {
    let counts = [settled.written, settled.duplicate, settled.rejected, settled.dropped];
    telemetry::recorder_settled(counts, settled.bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what is counted, by name.
    #[cfg(feature = "metrics")]
    #[derive(Default)]
    struct Exporter(
        std::sync::Mutex<std::collections::BTreeMap<String, std::sync::Arc<std::sync::atomic::AtomicU64>>>,
    );

    #[cfg(feature = "metrics")]
    impl Exporter {
        fn cell(&self, key: &metrics::Key) -> std::sync::Arc<std::sync::atomic::AtomicU64> {
            self.0.lock().unwrap().entry(key.name().to_owned()).or_default().clone()
        }

        fn get(&self, name: &str) -> u64 {
            let name = format!("lastprice_recorder_{name}");
            self.0.lock().unwrap()[&name].load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    #[cfg(feature = "metrics")]
    impl metrics::Recorder for Exporter {
        fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
        fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
        fn describe_histogram(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }

        fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
            metrics::Counter::from_arc(self.cell(key))
        }

        fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
            metrics::Gauge::from_arc(self.cell(key))
        }

        fn register_histogram(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
            self.cell(key).store(1, std::sync::atomic::Ordering::Relaxed);
            metrics::Histogram::noop()
        }
    }

    #[test]
    #[cfg(feature = "metrics")]
    fn an_exporter_is_told_all_numbers() {
        let exporter = Exporter::default();
        metrics::with_local_recorder(&exporter, || {
            (1..=9).for_each(|_| accepted(100));
            settled(&Settled { written: 3, duplicate: 2, rejected: 1, dropped: 1, bytes: 700 });
            committed(7, Duration::from_millis(3));
        });
        for (name, expected) in
            [("accepted", 9), ("written", 3), ("duplicate", 2), ("rejected", 1), ("dropped", 1)]
        {
            assert_eq!(exporter.get(&format!("{name}_total")), expected, "{name}");
        }
        // A gauge holds the bits of its number.
        assert_eq!(f64::from_bits(exporter.get("pending_events")), 2.0);
        assert_eq!(f64::from_bits(exporter.get("pending_bytes")), 200.0);
        assert_eq!((exporter.get("batch_rows"), exporter.get("commit_seconds")), (1, 1));
    }

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.tell(0, start), None);
        assert_eq!(seldom.tell(3, start), Some(3));
        assert_eq!(seldom.tell(1, start + SELDOM / 2), None);
        assert_eq!(seldom.tell(1, start + SELDOM), Some(2));
        assert_eq!(seldom.tell(0, start + SELDOM * 2), None);
    }
}
