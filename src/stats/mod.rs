//! The statistics of prices, as pure functions: no database, no clock, no random numbers.
//!
//! Nearly all are functions of *sufficient statistics* ([`Sample`], [`Proportion`]), so that a million users cost what a
//! thousand do. What cannot be told from the data is refused with a reason, [`NotEstimable`]; numbers that no data has (NaN, more
//! buyers than users) are an [`Error`](crate::Error) where they are given.

mod sample;

pub use sample::{Interval, NotEstimable, Proportion, Sample};
