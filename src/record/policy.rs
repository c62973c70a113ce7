//! What goes into a batch, and what to do when one fails: pure, no clock, no runtime, no database.

use std::time::Duration;

use twox_hash::XxHash3_64;

use crate::error::{Error, ErrorKind};

/// As many rows as a statement takes.
pub(super) const ROWS: usize = 1000;

/// So much, and not much more, is sent at once.
const BYTES: usize = 4 << 20;

/// After so many statements that leave deltas of metrics or reported usage behind, a tenant's are folded. They leave no more rows
/// than a fold takes.
pub(super) const FOLD_AFTER: u32 = 50;

/// In which lane a unit's events are written, one after the other.
pub(super) fn lane_of(unit: &str, lanes: u32) -> u32 {
    let hash = XxHash3_64::oneshot(unit.as_bytes());
    (hash % u64::from(lanes.max(1))) as u32 // less than `lanes`
}

/// How many of the lanes may be busy with batches that have failed before: a tenant whose statements time out leaves the
/// others at least half of them. A single lane has to do for both.
pub(super) fn lanes_for_retries(lanes: u32) -> u32 {
    (lanes / 2).max(1)
}

/// The kinds of events, in the order in which a batch writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Assignment,
    View,
    Conversion,
    Usage,
}

/// What a batch has taken so far.
#[derive(Debug, Default)]
pub(super) struct Load {
    rows: [usize; 4],
    bytes: usize,
}

impl Load {
    /// Whether one more fits; the first one always does.
    pub(super) fn takes(&mut self, kind: Kind, bytes: usize) -> bool {
        let rows = &mut self.rows[kind as usize];
        if *rows == ROWS || self.bytes > 0 && self.bytes.saturating_add(bytes) > BYTES {
            return false;
        }
        *rows += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        true
    }
}

/// How long to wait after so many failures in a row: 10 ms, and twice as long each time, up to 5 s. Dice (any number) take
/// away up to half of it, so that many do not come back at once.
pub(super) fn pause(failures: u32, dice: u32) -> Duration {
    const FIRST: Duration = Duration::from_millis(10);
    const LAST: Duration = Duration::from_secs(5);
    let full = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(LAST);
    full / 2 + (full / 2).mul_f64(f64::from(dice) / f64::from(u32::MAX))
}

/// What to do with rows whose statement failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The same again, after a pause.
    Again,
    /// Half of them, after a pause: all together took too long.
    Smaller,
    /// Each half by itself, at once: one of them is at fault.
    Bisect,
    /// None of them will ever be written.
    Reject,
    /// Nothing will ever be written: the client was closed.
    Over,
}

pub(super) fn verdict(error: &Error, rows: usize) -> Verdict {
    if error.sqlstate().is_some_and(|state| is_of_the_server(state.code())) {
        return Verdict::Again;
    }
    match error.kind() {
        ErrorKind::Closed => Verdict::Over,
        ErrorKind::Timeout if rows > 1 && error.sqlstate().is_some() => Verdict::Smaller,
        // It is what all of them have in common that is not there: the tenant, or the experiment.
        ErrorKind::NotFound => Verdict::Reject,
        // Of the client's options, not of a row; and of an experiment that is being changed.
        ErrorKind::InvalidInput if error.field() == Some("url") => Verdict::Again,
        ErrorKind::Conflict if error.sqlstate().is_none() => Verdict::Again,
        ErrorKind::InvalidInput | ErrorKind::Conflict | ErrorKind::Internal if rows > 1 => Verdict::Bisect,
        ErrorKind::InvalidInput
        | ErrorKind::Conflict
        | ErrorKind::QuoteMismatch
        | ErrorKind::QuotaExceeded
        | ErrorKind::RefundExceedsSale
        | ErrorKind::BadSignature
        | ErrorKind::Internal => Verdict::Reject,
        ErrorKind::Unavailable
        | ErrorKind::Timeout
        | ErrorKind::OutcomeUnknown
        | ErrorKind::SchemaMismatch
        | ErrorKind::IsolationNotEnforced
        | ErrorKind::SecretUnavailable => Verdict::Again,
    }
}

/// Codes that say nothing of a row, though their kind would: what the server failed at (58), how transactions met (40, 25),
/// and statements that are not what they were (a changed table, a pooler).
fn is_of_the_server(code: &str) -> bool {
    ["58", "40", "25"].iter().any(|class| code.starts_with(class)) || ["0A000", "26000"].contains(&code)
}

/// Whether the rows may be there in spite of the error. A call may be two statements, of which the first one writes and is
/// committed by itself: only an error that no second one has tells that nothing is there.
pub(super) fn may_be_written(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Conflict | ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pauses_double_up_to_five_seconds() {
        let (least, most) = (|n| pause(n, 0).as_millis(), |n| pause(n, u32::MAX).as_millis());
        assert_eq!((least(1), most(1)), (5, 10));
        assert_eq!((least(2), most(2)), (10, 20));
        assert_eq!((least(9), most(9)), (1280, 2560));
        for n in [10, 11, 40, u32::MAX] {
            assert_eq!((least(n), most(n)), (2500, 5000), "{n}");
        }
        assert_eq!(most(0), 10);
    }

    #[test]
    fn what_an_error_is_about() {
        let of = |kind| verdict(&Error::new(kind, ""), 2);
        for kind in [
            ErrorKind::Unavailable,
            ErrorKind::Timeout,
            ErrorKind::OutcomeUnknown,
            ErrorKind::SchemaMismatch,
            ErrorKind::IsolationNotEnforced,
        ] {
            assert_eq!(of(kind), Verdict::Again);
            assert!(may_be_written(&Error::new(kind, "")));
        }
        assert_eq!(of(ErrorKind::Closed), Verdict::Over);
        assert_eq!(of(ErrorKind::NotFound), Verdict::Reject);
        assert_eq!(of(ErrorKind::Internal), Verdict::Bisect);
        assert_eq!(verdict(&Error::new(ErrorKind::Internal, ""), 1), Verdict::Reject);
        assert_eq!(verdict(&Error::invalid("metadata", ""), 2), Verdict::Bisect);
        assert_eq!(verdict(&Error::invalid("metadata", ""), 1), Verdict::Reject);
        assert_eq!(verdict(&Error::invalid("url", ""), 2), Verdict::Again);
        assert!(!may_be_written(&Error::invalid("metadata", "")));
    }

    #[test]
    fn codes_that_say_nothing_of_a_row() {
        for code in ["58030", "58P01", "40003", "25P02", "0A000", "26000"] {
            assert!(is_of_the_server(code), "{code}");
        }
        for code in ["22021", "23503", "23514", "54000", "P0001", "XX000", "57014", "", "5"] {
            assert!(!is_of_the_server(code), "{code}");
        }
    }

    #[test]
    fn retries_leave_lanes_to_others() {
        assert_eq!([1, 2, 3, 4, 64].map(lanes_for_retries), [1, 1, 1, 2, 32]);
    }

    proptest! {
        #[test]
        fn a_unit_has_one_lane(unit: String, lanes in 0u32..100) {
            let lane = lane_of(&unit, lanes);
            prop_assert!(lane < lanes.max(1));
            prop_assert_eq!(lane, lane_of(&unit, lanes));
        }

        #[test]
        fn pauses_are_within_bounds(failures: u32, dice: u32) {
            let pause = pause(failures, dice);
            prop_assert!((Duration::from_millis(5)..=Duration::from_secs(5)).contains(&pause));
        }

        #[test]
        fn a_load_has_its_limits(events in prop::collection::vec((0usize..4, 0usize..200_000), 1..5000)) {
            let kinds = [Kind::Assignment, Kind::View, Kind::Conversion, Kind::Usage];
            let (mut load, mut taken, mut bytes) = (Load::default(), [0; 4], 0);
            for (n, (kind, size)) in events.iter().enumerate() {
                if load.takes(kinds[*kind], *size) {
                    taken[*kind] += 1;
                    bytes += size;
                } else {
                    prop_assert!(n > 0 && (taken[*kind] == ROWS || bytes + size > BYTES));
                }
            }
            prop_assert!(taken.iter().all(|rows| *rows <= ROWS));
            prop_assert!(bytes <= BYTES);
        }
    }
}
