//! What the tests of the recorder share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lastprice::{ExperimentId, NewUsage, NewView, RecorderHandle, RecorderStats};

use crate::support_repo::{key, today, user};

/// Far more than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) fn view(experiment: ExperimentId, n: usize) -> NewView {
    NewView::new(experiment, user(n))
}

pub(crate) fn usage(n: usize) -> NewUsage {
    NewUsage::new("api_calls", today(), 1, key(&format!("batch:{n}")))
}

#[track_caller]
pub(crate) fn adds_up(stats: RecorderStats) {
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

pub(crate) fn numbers(stats: RecorderStats) -> [u64; 6] {
    [stats.accepted, stats.written, stats.duplicate, stats.rejected, stats.dropped, stats.pending]
}
