use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::{Error, Result};

/// How many rows a page may have.
pub(crate) const MAX_PAGE: u32 = 1000;

/// One page of a list. Pages follow the key, not an offset, so rows that come and go meanwhile shift nothing.
///
/// ```no_run
/// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
/// let mut after = None;
/// loop {
///     let page = tenant.experiments().list(None, 100, after).await?;
///     for experiment in &page.items {
///         println!("{}", experiment.key);
///     }
///     after = page.next;
///     if after.is_none() {
///         break;
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Page<T> {
    /// The rows, in the order that the list documents.
    pub items: Vec<T>,
    /// Where the next page starts; `None` on the last one.
    pub next: Option<Cursor>,
}

impl<T> Page<T> {
    /// `items` was asked for with `limit + 1`: one more row is the first of the next page.
    pub(crate) fn new(mut items: Vec<T>, limit: u32, key: impl Fn(&T) -> Uuid) -> Self {
        let next = items.get(limit as usize).map(|first| Cursor(key(first)));
        items.truncate(limit as usize);
        Page { items, next }
    }
}

/// Checks the size of a page, and gives the number of rows to ask for.
pub(crate) fn rows_for(limit: u32) -> Result<i64> {
    if limit == 0 || limit > MAX_PAGE {
        return Err(Error::invalid("limit", format_args!("is not between 1 and {MAX_PAGE}")));
    }
    Ok(i64::from(limit) + 1)
}

/// Where the next page of a list starts; as text, it may travel through a client.
///
/// ```
/// use lastprice::Cursor;
///
/// let cursor: Cursor = "0192f1c4-7a3e-7c1e-8a53-0123456789ab".parse()?;
/// assert_eq!(cursor.to_string().parse::<Cursor>()?, cursor);
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cursor(pub(crate) Uuid);

impl Cursor {
    /// The key to start at, in a list of ascending keys; any UUID may be one, the first included.
    pub(crate) fn ascending(after: Option<Cursor>) -> Uuid {
        after.map_or(Uuid::nil(), |c| c.0)
    }

    /// The key to start at, in a list of descending keys.
    pub(crate) fn descending(after: Option<Cursor>) -> Uuid {
        after.map_or(Uuid::max(), |c| c.0)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        s.parse().map(Cursor).map_err(|_| Error::invalid("after", "is not a cursor of a page"))
    }
}
