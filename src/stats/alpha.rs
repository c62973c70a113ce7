//! How often a statement may be wrong.

use crate::error::{Error, Result};

/// The share of statements that may be wrong by chance: 0.05 makes 95 % intervals, and calls 5 % of equal arms different.
///
/// ```
/// use lastprice::stats::Alpha;
///
/// assert_eq!(Alpha::default().get(), 0.05);
/// assert_eq!(Alpha::new(0.06)?.shared_by(3).get(), 0.02); // three arms against one baseline
/// assert!(Alpha::new(0.0).is_err());
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, serde::Serialize)]
#[serde(transparent)]
pub struct Alpha(f64);

impl Alpha {
    /// The smallest that there is.
    const MIN: f64 = 1e-15;

    /// A share.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it is not from 1e-15 to below 1.
    pub fn new(alpha: f64) -> Result<Self> {
        if (Alpha::MIN..1.0).contains(&alpha) {
            Ok(Alpha(alpha))
        } else {
            Err(Error::invalid("alpha", "is not from 1e-15 to below 1"))
        }
    }

    /// The share, from 0 to 1.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }

    /// What each of so many statements gets, that all of them together be wrong no more often (Bonferroni).
    #[must_use]
    pub fn shared_by(self, statements: u32) -> Self {
        Alpha((self.0 / f64::from(statements.max(1))).max(Alpha::MIN))
    }
}

impl Default for Alpha {
    /// 0.05.
    fn default() -> Self {
        Alpha(0.05)
    }
}
