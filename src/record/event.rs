//! What is recorded, and what becomes of it.

use std::fmt;

use super::policy::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::repo::{NewAssignment, NewConversion, NewUsage, NewView, Reason};

/// Something to be written. Each of the inputs is one by `into()`.
///
/// It has its id, or idempotency key, before it is recorded, so that it counts once however often it has to be tried.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A quote to be stored, as [`Assignments::assign_many`](crate::Assignments::assign_many) does it.
    Assignment(NewAssignment),
    /// A price was seen.
    View(NewView),
    /// Money moved: an entry of the ledger, as [`Conversions::settle`](crate::Conversions::settle) records it.
    Conversion(Box<NewConversion>),
    /// Something was used.
    Usage(NewUsage),
}

macro_rules! into_event {
    ($($input:ident => $kind:ident),*) => {$(
        impl From<$input> for Event {
            fn from(input: $input) -> Self {
                Event::$kind(input)
            }
        }
    )*};
}

into_event!(NewAssignment => Assignment, NewView => View, NewUsage => Usage);

impl From<NewConversion> for Event {
    fn from(input: NewConversion) -> Self {
        Event::Conversion(Box::new(input)) // three times the size of the others
    }
}

/// What is kept of an event besides itself: a place in the queue, and who waits for it.
const KEPT: usize = 128;

impl Event {
    /// Checks what can be checked without the database.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Event::Assignment(_) => Ok(()),
            Event::View(view) => view.check(),
            Event::Conversion(entry) => entry.check(),
            Event::Usage(usage) => usage.check(),
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Event::Assignment(_) => Kind::Assignment,
            Event::View(_) => Kind::View,
            Event::Conversion(_) => Kind::Conversion,
            Event::Usage(_) => Kind::Usage,
        }
    }

    /// What it takes in memory, about. Events that pass the check are not nested deeper than can be counted.
    pub(super) fn bytes(&self) -> usize {
        let heap = match self {
            Event::Assignment(quote) => quote.heap(),
            Event::View(view) => view.heap(),
            Event::Conversion(entry) => size_of::<NewConversion>() + entry.heap(),
            Event::Usage(usage) => usage.heap(),
        };
        size_of::<Event>() + KEPT + heap
    }

    /// Events of one unit are written in their order. An assignment may be of two: a user's, or an account's.
    pub(super) fn units(&self) -> (&str, Option<&str>) {
        match self {
            Event::Assignment(quote) => {
                let (user, account) = quote.units();
                (user.as_str(), account.map(AsRef::as_ref))
            }
            Event::View(view) => (view.user_id().as_str(), None),
            Event::Conversion(entry) => (entry.unit(), None),
            Event::Usage(usage) => (usage.metric(), None),
        }
    }
}

/// What became of an event.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "an event that was rejected is not there"]
pub enum Tracked {
    /// It is committed, by this call (an entry that waits for the one that it belongs to is kept): also if an earlier attempt, whose outcome was open, turns out to have done it.
    Written,
    /// It was there already, by its id or its idempotency key, with the same content; nothing was written.
    Duplicate,
    /// It was not written, and will not be.
    Rejected(Rejection),
}

impl Tracked {
    /// Whether the event is stored now: by this call, or before.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        matches!(self, Tracked::Written | Tracked::Duplicate)
    }
}

/// Why an event was not written.
#[derive(Debug)]
#[non_exhaustive]
pub enum Rejection {
    /// A view: the tenant has no such experiment, or nothing is stored for this user in it.
    NotAssigned,
    /// An assignment: the user is no part of the experiment, for this reason.
    Outside(Reason),
    /// Anything else: [`Conflict`](ErrorKind::Conflict) where a key stands for something else,
    /// [`NotFound`](ErrorKind::NotFound) where there is no such tenant or experiment,
    /// [`InvalidInput`](ErrorKind::InvalidInput) or [`Internal`](ErrorKind::Internal) where the database does not take it.
    Refused(Error),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::NotAssigned => f.write_str("nothing is stored for this user in the experiment"),
            Rejection::Outside(reason) => write!(f, "the user is no part of the experiment: {reason}"),
            Rejection::Refused(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Rejection {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Rejection::Refused(error) => error.source(),
            _ => None,
        }
    }
}

/// An event that was not accepted, and why. It is given back, for another try or another place.
///
/// As an [`Error`], for callers who have no use for the event: [`Unavailable`](ErrorKind::Unavailable) and retryable if
/// the queue was full, [`Closed`](ErrorKind::Closed), or [`InvalidInput`](ErrorKind::InvalidInput).
pub struct NotTaken(Box<(Event, NotTakenReason)>);

/// Why an event was not accepted.
#[derive(Debug)]
#[non_exhaustive]
pub enum NotTakenReason {
    /// As many events, or bytes, as there may be wait to be written.
    Full,
    /// The recorder was shut down or dropped, or its worker has ended.
    Closed,
    /// The event breaks a rule; [`Error::field`] names what does.
    Invalid(Error),
}

impl NotTaken {
    pub(super) fn new(event: Event, reason: NotTakenReason) -> Self {
        NotTaken(Box::new((event, reason)))
    }

    /// Why.
    #[must_use]
    pub fn reason(&self) -> &NotTakenReason {
        &self.0.1
    }

    /// The event.
    #[must_use]
    pub fn into_event(self) -> Event {
        self.0.0
    }
}

impl fmt::Debug for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who unwraps one should not find a user's data in the log.
        f.debug_struct("NotTaken").field("reason", self.reason()).finish_non_exhaustive()
    }
}

impl fmt::Display for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason() {
            NotTakenReason::Full => f.write_str(FULL),
            NotTakenReason::Closed => f.write_str(CLOSED),
            NotTakenReason::Invalid(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NotTaken {}

impl From<NotTaken> for Error {
    fn from(not_taken: NotTaken) -> Self {
        match not_taken.0.1 {
            NotTakenReason::Full => Error::new(ErrorKind::Unavailable, FULL),
            NotTakenReason::Closed => closed(),
            NotTakenReason::Invalid(error) => error,
        }
    }
}

const FULL: &str = "the recorder's queue is full";
const CLOSED: &str = "the recorder takes no more events";

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, CLOSED)
}
