//! Who enters an experiment.

use std::ops::Range;

use tokio_postgres::Row;

use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::repo::row::{Fields, text_enum};

text_enum! {
    /// Whose id decides which variant is seen.
    AssignmentUnit, "unit" {
        /// The user's.
        User = "user",
        /// The account's: all of its users see one price. Wherever the experiment is named, the account's id then
        /// stands in place of the user's.
        Account = "account",
    }
}

text_enum! {
    /// Whom an experiment takes, before anything is left to the hash.
    Eligibility, "eligibility" {
        /// Whomever the host does not exclude: see [`Subject::eligible_if`](crate::Subject::eligible_if).
        Everyone = "everyone",
        /// Only who became a customer after the experiment's start, or is none yet. Existing customers keep their
        /// price (so let the baseline be the price that they have): they are assigned the baseline, and recorded as
        /// [`Grandfathered`](crate::AssignmentReason::Grandfathered). The host says who is one:
        /// see [`Subject::customer_since`](crate::Subject::customer_since).
        NewCustomersOnly = "new_customers",
    }
}

/// A part of a layer. Experiments of one layer share no user: each has a part of its range, from its activation until it
/// is completed. All live ones go by the same [unit](AssignmentUnit).
///
/// ```
/// use lastprice::Layer;
/// use lastprice::bucketing::Share;
///
/// let first_half = Layer::new("checkout", Share::NONE..Share::percent(50)?)?;
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    name: String,
    range: Range<Share>,
}

impl Layer {
    /// The range of the layer of this name (`A-Z a-z 0-9 _ . : / -`, at most 128, a letter or digit first).
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `layer`, for another name or an empty range.
    pub fn new(name: impl Into<String>, range: Range<Share>) -> Result<Self> {
        let name = name.into();
        if range.is_empty() {
            return Err(Error::invalid("layer", "has an empty range"));
        }
        super::model::check_key("layer", &name)?;
        Ok(Layer { name, range })
    }

    /// Its name, unique within the tenant.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The experiment's part, the end excluded.
    #[must_use]
    pub fn range(&self) -> Range<Share> {
        self.range.clone()
    }

    pub(super) fn from_row(row: &Row) -> Result<Option<Self>> {
        let Some(name) = row.field::<Option<String>>("layer")? else { return Ok(None) };
        Ok(Some(Layer { name, range: row.share("layer_start")?..row.share("layer_end")? }))
    }
}
