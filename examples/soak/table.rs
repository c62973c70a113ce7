//! What is seen while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lastprice::RefresherStatus;

use crate::load::Load;

/// Eight to each doubling, from a microsecond to an hour.
const BUCKETS: usize = 8 * 32;

pub(crate) struct Table {
    started: Instant,
    latencies: [AtomicU64; BUCKETS],
    pub(crate) open: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) decisions: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) kills: AtomicU64,
}

impl Default for Table {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Table {
            started: Instant::now(),
            latencies: std::array::from_fn(|_| zero()),
            open: zero(),
            failed: zero(),
            dropped: zero(),
            decisions: zero(),
            faults: zero(),
            kills: zero(),
        }
    }
}

pub(crate) fn count(of: &AtomicU64) {
    of.fetch_add(1, Ordering::Relaxed);
}

impl Table {
    /// A call was answered.
    pub(crate) fn done(&self, took: Duration) {
        let micros = took.as_micros().max(1) as f64;
        let bucket = (micros.log2() * 8.0) as usize;
        count(&self.latencies[bucket.min(BUCKETS - 1)]);
    }

    pub(crate) fn calls(&self) -> u64 {
        self.snapshot().iter().sum()
    }

    fn snapshot(&self) -> Vec<u64> {
        self.latencies.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }

    pub(crate) fn sum_up(&self, load: &Load, refresher: &RefresherStatus, answers: u64) {
        let get = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let (all, stats) = (self.snapshot(), load.events.stats());
        println!(
            "{} calls in {:?}: p50 {}, p99 {}, p99.9 {}; {} failed, {} open, {} of them dropped; {} decisions",
            self.calls(),
            Duration::from_secs(self.started.elapsed().as_secs()),
            percentile(&all, 0.5),
            percentile(&all, 0.99),
            percentile(&all, 0.999),
            get(&self.failed),
            get(&self.open),
            get(&self.dropped),
            get(&self.decisions)
        );
        println!(
            "recorder: {} accepted = {} written + {} duplicate + {} rejected + {} dropped + {} pending",
            stats.accepted, stats.written, stats.duplicate, stats.rejected, stats.dropped, stats.pending
        );
        println!(
            "{} faults, of them {} kills of the server; {answers} answers of it were lost; refreshed {} times, failed {}",
            get(&self.faults),
            get(&self.kills),
            refresher.refreshed,
            refresher.failed
        );
    }
}

/// A line a second.
pub(crate) async fn print(load: Arc<Load>, calm: Arc<AtomicBool>) {
    let table = &load.table;
    println!(
        "p50, p99: of the calls' times. failed: the outcome is known, and it is an error; open: it is not known. queue: events in the recorder,"
    );
    println!(
        "and written those it wrote. pool: connections in use / open. rss: memory of this process. faults and lost: until now, and lost is to be 0."
    );
    println!(
        "   time   calls/s      p50      p99  failed/s  open/s   queue  written/s  pool    rss  faults  lost"
    );
    let (mut before, mut failed, mut open, mut written) = (table.snapshot(), 0, 0, 0);
    while !calm.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = table.snapshot();
        let new: Vec<u64> = now.iter().zip(&before).map(|(now, before)| now - before).collect();
        let since = |of: &AtomicU64, before: &mut u64| {
            let now = of.load(Ordering::Relaxed);
            now - std::mem::replace(before, now)
        };
        let (stats, pool) = (load.events.stats(), load.client.pool_status());
        println!(
            "{:6}s {:9} {:>8} {:>8} {:9} {:7} {:7} {:10} {:>5} {:>6} {:7} {:5}",
            table.started.elapsed().as_secs(),
            new.iter().sum::<u64>(),
            percentile(&new, 0.5),
            percentile(&new, 0.99),
            since(&table.failed, &mut failed),
            since(&table.open, &mut open),
            stats.pending,
            stats.written - std::mem::replace(&mut written, stats.written),
            format!("{}/{}", pool.size - pool.available.min(pool.size), pool.size),
            resident().map_or("?".to_owned(), |megabytes| format!("{megabytes}M")),
            table.faults.load(Ordering::Relaxed),
            load.oracle.lost()
        );
        before = now;
    }
}

/// The upper end of the bucket.
fn percentile(buckets: &[u64], share: f64) -> String {
    let all: u64 = buckets.iter().sum();
    let (wanted, mut seen) = ((all as f64 * share).ceil() as u64, 0);
    for (n, count) in buckets.iter().enumerate() {
        seen += count;
        if all > 0 && seen >= wanted {
            let millis = 2f64.powf((n + 1) as f64 / 8.0) / 1000.0;
            return format!("{millis:.1}ms");
        }
    }
    "-".to_owned()
}

/// In megabytes, where the system says so.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? / 1024)
}
