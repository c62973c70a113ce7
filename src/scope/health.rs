//! When a standby that did not answer is asked again.
//!
//! One that is away refuses at once, and one that is frozen, or behind a network that says nothing any more, lets each caller
//! wait for as long as it may. So nobody is sent there for a while, which is twice as long after each failure; and then one caller
//! is, and no other one before that has an answer.

use std::time::{Duration, Instant};

/// For how long nobody is sent to a standby that has failed once, or is behind.
pub(super) const REST: Duration = Duration::from_secs(1);

/// For how long at the most, however often it has failed.
const LONGEST: Duration = Duration::from_secs(30);

/// How it was with the last ones who asked.
#[derive(Default)]
pub(super) struct Health {
    /// In a row. Those who were sent together fail together, which is one failure.
    failures: u32,
    /// Nobody is sent before.
    rest: Option<Instant>,
    /// Somebody was sent after a failure, and has no answer yet.
    probed: bool,
    /// The last failure was that nothing was said.
    is_silent: bool,
}

/// Leave to ask, and how many failures were known when it was given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leave {
    failures: u32,
}

impl Health {
    /// `None` while it is useless to ask.
    pub(super) fn leave(&mut self, now: Instant) -> Option<Leave> {
        if self.probed || self.rest.is_some_and(|until| now < until) {
            return None;
        }
        self.probed = self.failures > 0;
        Some(Leave { failures: self.failures })
    }

    /// For who is to say what is wrong with it: `None` only where that could not be told, after a long wait.
    pub(super) fn leave_to_examine(&mut self, now: Instant) -> Option<Leave> {
        if self.is_silent { self.leave(now) } else { Some(Leave { failures: self.failures }) }
    }

    pub(super) fn answered(&mut self) {
        *self = Health::default();
    }

    pub(super) fn failed(&mut self, leave: Leave, is_silent: bool, now: Instant) {
        if leave.failures < self.failures {
            return; // known from another one who was sent with it
        }
        self.failures += 1;
        self.probed = false;
        self.is_silent = is_silent;
        let pause = REST.saturating_mul(1 << (self.failures - 1).min(5)).min(LONGEST);
        self.rest = Some(now + pause);
    }

    /// Whoever was sent has gone away, and there is nothing to say of it.
    pub(super) fn withdrawn(&mut self, leave: Leave) {
        if leave.failures == self.failures {
            self.probed = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_for_longer_after_each_failure_and_then_one_is_sent() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        // Sent together.
        let leaves = [(); 10].map(|()| health.leave(now).unwrap());
        for leave in leaves {
            health.failed(leave, false, now);
        }
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            now += Duration::from_secs(seconds) - Duration::from_millis(1);
            assert!(health.leave(now).is_none(), "before {seconds} s");
            now += Duration::from_millis(1);
            let leave = health.leave(now).unwrap();
            assert!(health.leave(now).is_none(), "one is enough");
            health.withdrawn(leave);
            let leave = health.leave(now).expect("that one went away");
            assert!(health.leave_to_examine(now).is_some(), "it says something");
            health.failed(leaves[0], false, now);
            assert!(health.leave(now).is_none(), "one of the first, at last");
            health.failed(leave, false, now);
        }
        // A late answer to one of the first ends it.
        health.answered();
        let leave = health.leave(now).unwrap();
        health.failed(leave, true, now);
        assert!(health.leave_to_examine(now).is_none(), "it says nothing");
        assert!(health.leave(now + REST).is_some(), "as after the first failure");
        assert!(health.leave_to_examine(now + REST).is_none(), "somebody is there");
    }
}
