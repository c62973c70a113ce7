//! What merges and erasures leave to be known.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::Result;
use crate::id::{ExperimentId, UserId};
use crate::repo::row::{Fields, text_enum};
use crate::repo::variants::FromJsonb;

text_enum! {
    /// What becomes of a person who has a quote by each of two ids.
    MergePolicy, "policy" {
        /// The earlier quote is the price from now on, by every id of the person (but one that [`Exclude`](MergePolicy::Exclude) let keep another
        /// quote keeps it). If both are the same, the person is one user, assigned when the
        /// earlier one was. If they differ, the person is in no statistic of the experiment: what somebody does who saw two prices
        /// says nothing about one of them.
        FirstQuoteWins = "first_quote_wins",
        /// Each id keeps its quote, and the person is in no statistic of the experiment, whether the quotes differ or not.
        Exclude = "exclude",
    }
}

/// What [`Users::merge`](crate::Users::merge) did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UserMerge {
    pub(super) id: Uuid,
    /// The id that is no user of its own any more.
    pub anonymous: UserId,
    /// Whose it is. The last one, if that id was merged as well.
    pub known: UserId,
    /// What became of quotes that both had.
    pub policy: MergePolicy,
    /// In how many experiments only the anonymous id had a quote, which is the known user's now.
    pub taken_over: u64,
    /// In how many experiments both had one: each of them has one user less than before.
    pub shared: u64,
    /// How many ledger entries became the known user's.
    pub entries: u64,
    /// In which experiments the two quotes differed: the person has seen two prices.
    pub crossovers: Vec<ExperimentId>,
    /// In which experiments the person is in no statistic any more: the crossovers, and all that both were in if the policy says
    /// so, or an earlier merge has left one of them out.
    pub excluded: Vec<ExperimentId>,
    /// When.
    pub merged_at: DateTime<Utc>,
    /// By whom, if [somebody said so](crate::TenantScope::with_actor).
    pub merged_by: Option<String>,
}

#[derive(Deserialize)]
struct Report {
    taken_over: u64,
    shared: u64,
    entries: u64,
    crossovers: Vec<String>,
    excluded: Vec<String>,
}

impl UserMerge {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        let FromJsonb(report) = row.field::<FromJsonb<Report>>("report")?;
        let ids = |of: Vec<String>| of.iter().map(|id| id.parse()).collect::<Result<Vec<ExperimentId>>>();
        Ok(UserMerge {
            id: row.field("id")?,
            anonymous: UserId::new(row.field::<String>("user_id")?)?,
            known: UserId::new(row.field::<String>("known_id")?)?,
            policy: MergePolicy::stored(row.field("policy")?)?,
            taken_over: report.taken_over,
            shared: report.shared,
            entries: report.entries,
            crossovers: ids(report.crossovers)?,
            excluded: ids(report.excluded)?,
            merged_at: row.field("merged_at")?,
            merged_by: row.field("merged_by")?,
        })
    }
}

/// That a user was erased. The id is nowhere in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Erasure {
    pub(super) id: Uuid,
    /// What stands for the user now. Of the ids that were merged into it each has one of its own, which begins with this one.
    pub pseudonym: UserId,
    /// What was stored of the user.
    pub counts: ErasedCounts,
    /// When.
    pub erased_at: DateTime<Utc>,
    /// By whom, if [somebody said so](crate::TenantScope::with_actor); by a pseudonym of the user if it was the user.
    pub erased_by: Option<String>,
}

/// How much was stored of a user, by what it is. The first three still are, under the pseudonym.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[non_exhaustive]
pub struct ErasedCounts {
    /// Quotes.
    pub quotes: u64,
    /// Views.
    pub views: u64,
    /// Entries of the ledger.
    pub entries: u64,
    /// Where the id is still, in something that it is a part of (not next to a letter or digit): idempotency keys, orders and
    /// subscriptions of entries of the user and of all that wait for a sale, and metadata of these; keys of reported usage; ids of
    /// webhooks, and bodies that were kept. Of a short id some of it may mean something else.
    pub naming: u64,
    /// Entries that wait for a sale.
    pub waiting: u64,
    /// Bodies of webhooks that are empty now.
    pub webhooks: u64,
    /// Webhooks that are still to be processed, or failed, and are the pseudonym's now; the rest of their bodies says what it said.
    pub pending_webhooks: u64,
    /// Experiments whose list named the user.
    pub forced: u64,
    /// Ids that were merged into the user.
    pub merges: u64,
}

impl Erasure {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        Ok(Erasure {
            id: row.field("id")?,
            pseudonym: UserId::new(row.field::<String>("pseudonym")?)?,
            counts: row.field::<FromJsonb<ErasedCounts>>("counts")?.0,
            erased_at: row.field("erased_at")?,
            erased_by: row.field("erased_by")?,
        })
    }
}

/// Whether a user is one who was erased, as far as a name can tell.
pub(in crate::repo) fn is_pseudonym(user: &UserId) -> bool {
    let id = user.as_str().strip_prefix("erased-").and_then(|id| id.get(..36));
    id.is_some_and(|id| Uuid::parse_str(id).is_ok())
}
