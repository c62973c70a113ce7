//! How a recorder works, and what it has done.

use std::time::Duration;

use crate::error::{Error, Result};

/// The options of a [`Recorder`](crate::Recorder). Setters never fail;
/// [`Client::recorder_with`](crate::Client::recorder_with) does, and names the option.
///
/// ```
/// # async fn f(client: lastprice::Client) -> lastprice::Result<()> {
/// use lastprice::RecorderOptions;
///
/// let recorder = client.recorder_with(RecorderOptions::new().max_events(10_000).lanes(4))?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct RecorderOptions {
    pub(super) max_events: usize,
    pub(super) max_bytes: usize,
    pub(super) lanes: u32,
    pub(super) max_age: Duration,
}

impl Default for RecorderOptions {
    fn default() -> Self {
        RecorderOptions::new()
    }
}

impl RecorderOptions {
    /// The defaults.
    pub fn new() -> Self {
        RecorderOptions {
            max_events: 100_000,
            max_bytes: 64 << 20,
            lanes: 2,
            max_age: Duration::from_millis(50),
        }
    }

    /// How many events may wait to be written, those under way included. Default: 100,000.
    pub fn max_events(mut self, events: usize) -> Self {
        self.max_events = events;
        self
    }

    /// How much memory they may take, by an estimate: their ids, keys and metadata, and about 300 bytes for each event. A
    /// value of metadata counts as what it takes parsed (32 bytes on most machines, and its text), not as its JSON.
    /// Default: 64 MiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// How many batches are written at once, each on one connection of the client's pool. Default: 2, which is what one
    /// database server gains from.
    pub fn lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes;
        self
    }

    /// How long an event that nobody waits for may wait for company, in quiet times. Zero: not at all. Default: 50 ms.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=10_000_000).contains(&self.max_events) {
            return Err(Error::invalid("max_events", "is not between 1 and 10 million"));
        }
        if !(4096..=tokio::sync::Semaphore::MAX_PERMITS).contains(&self.max_bytes) {
            return Err(Error::invalid("max_bytes", "is less than 4096, or more than can be counted"));
        }
        if !(1..=64).contains(&self.lanes) {
            return Err(Error::invalid("lanes", "is not between 1 and 64"));
        }
        if self.max_age > Duration::from_secs(60) {
            return Err(Error::invalid("max_age", "is more than a minute"));
        }
        Ok(())
    }
}

/// The numbers of a [`Recorder`](crate::Recorder), all of one moment.
///
/// At every moment `accepted == written + duplicate + rejected + dropped + pending`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecorderStats {
    /// Events that were accepted.
    pub accepted: u64,
    /// Those that are committed.
    pub written: u64,
    /// Those that were there already.
    pub duplicate: u64,
    /// Those that the database, or what it holds, refused for good.
    pub rejected: u64,
    /// Those that were given up: at the deadline of a shutdown, or because the worker ended.
    pub dropped: u64,
    /// Those that wait to be written, or are being written.
    pub pending: u64,
    /// The memory that the pending ones take, by an estimate: see [`RecorderOptions::max_bytes`].
    pub pending_bytes: u64,
}

/// What a [`Recorder`](crate::Recorder) had done when it was [shut down](crate::Recorder::shutdown).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "it says what was lost"]
pub struct RecorderReport {
    /// The numbers at the end; none is pending.
    pub stats: RecorderStats,
    /// Of the dropped events, those of which it is not known whether they were written: a statement with them was under
    /// way, or had failed without an answer. The others were not written.
    pub in_doubt: u64,
}
