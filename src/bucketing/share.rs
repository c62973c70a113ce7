use std::fmt;

use crate::error::{Error, Result};

/// A share of all users, in millionths.
///
/// ```
/// use lastprice::bucketing::Share;
///
/// let share = Share::percent(5)?;
/// assert_eq!(share, Share::per_million(50_000)?);
/// assert_eq!(share.to_string(), "5 %");
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u32);

impl Share {
    /// Nobody.
    pub const NONE: Share = Share(0);
    /// Everybody.
    pub const ALL: Share = Share(1_000_000);

    /// Whole percents, 0 to 100.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `share`, for more than 100.
    pub fn percent(percent: u32) -> Result<Self> {
        Share::per_million(percent.saturating_mul(10_000))
    }

    /// Millionths, 0 to 1,000,000: the precision of every share.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `share`, for more than a million.
    pub fn per_million(millionths: u32) -> Result<Self> {
        if millionths > Share::ALL.0 {
            return Err(Error::invalid("share", "is more than 100 %"));
        }
        Ok(Share(millionths))
    }

    /// In millionths.
    #[must_use]
    pub fn millionths(self) -> u32 {
        self.0
    }

    /// The first bucket that is beyond the share; none, if it is open.
    pub(super) fn threshold(self) -> Option<u64> {
        let bound = (u128::from(self.0) << 64) / u128::from(Share::ALL.0);
        u64::try_from(bound).ok()
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 10_000, self.0 % 10_000);
        if rest == 0 {
            return write!(f, "{whole} %");
        }
        let rest = format!("{rest:04}");
        write!(f, "{whole}.{} %", rest.trim_end_matches('0'))
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Share({self})")
    }
}
