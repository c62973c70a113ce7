//! A recommendation, as stored.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::Row;

use crate::error::Result;
use crate::id::{ExperimentId, RecommendationId};
use crate::money::Money;
use crate::repo::row::{Fields, text_enum};

text_enum! {
    /// What a recommended price is meant to maximise.
    Objective, "objective" {
        /// Revenue.
        Revenue = "revenue",
        /// The share of users who buy.
        Conversion = "conversion",
        /// Revenue without costs.
        Profit = "profit",
        /// The number of customers.
        MarketShare = "market_share",
    }
}

text_enum! {
    /// What became of a recommendation: proposed → approved → applied, or rejected or expired before that.
    RecommendationStatus, "status" {
        /// Waits for a decision.
        Proposed = "proposed",
        /// Within the bounds of whoever approved it; waits to be applied.
        Approved = "approved",
        /// There is an experiment that tries it.
        Applied = "applied",
        /// Somebody decided against it.
        Rejected = "rejected",
        /// Its time was over before it was applied.
        Expired = "expired",
    }
}

/// A recommended price, as stored. What was recommended never changes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Recommendation {
    /// Its id.
    pub id: RecommendationId,
    /// The experiment it was made from.
    pub experiment_id: ExperimentId,
    /// The price.
    pub price: Money,
    /// What the price is expected to bring: net revenue per 1,000 assigned users.
    pub expected_revenue: Option<Money>,
    /// How sure the recommender is, from 0 to 1.
    pub confidence: f64,
    /// What it is meant to maximise.
    pub objective: Objective,
    /// What it was computed from: a JSON object or array.
    pub simulation: Value,
    /// Who made it.
    pub source: Option<String>,
    /// The version of the model that made it.
    pub model_version: Option<String>,
    /// A hash of what it was computed from.
    pub inputs_hash: Option<String>,
    /// From when on it cannot be approved or applied any more; `None` means never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When it was stored.
    pub created_at: DateTime<Utc>,
    /// What became of it. One whose time is over stays as it is until [`expire_due`](crate::Recommendations::expire_due).
    pub status: RecommendationStatus,
    /// When it was approved or rejected, whichever came last.
    pub decided_at: Option<DateTime<Utc>>,
    /// Who decided that, if they said so.
    pub decided_by: Option<String>,
    /// Why it was rejected.
    pub rejection_reason: Option<String>,
    /// When it was applied.
    pub applied_at: Option<DateTime<Utc>>,
    /// Who applied it, if they said so.
    pub applied_by: Option<String>,
    /// The experiment that was made by applying it; `None` also if that was deleted as a draft.
    pub follow_up_id: Option<ExperimentId>,
    /// What came of it, in the unit of `expected_revenue`.
    pub observed_revenue: Option<Money>,
    /// When that was stored.
    pub scored_at: Option<DateTime<Utc>>,
}

impl Recommendation {
    pub(super) fn from_row(row: &Row) -> Result<Self> {
        let currency = row.currency("currency")?;
        let revenue = |column| -> Result<Option<Money>> {
            let amount = row.field::<Option<Decimal>>(column)?;
            Ok(amount.map(|amount| Money::stored(amount, currency)))
        };
        Ok(Recommendation {
            id: row.id("id")?,
            experiment_id: row.id("experiment_id")?,
            price: row.money("price", "currency")?,
            expected_revenue: revenue("expected_revenue")?,
            confidence: row.field("confidence")?,
            objective: Objective::stored(row.field("objective")?)?,
            simulation: row.field("simulation")?,
            source: row.field("source")?,
            model_version: row.field("model_version")?,
            inputs_hash: row.field("inputs_hash")?,
            expires_at: row.field("expires_at")?,
            created_at: row.field("created_at")?,
            status: RecommendationStatus::stored(row.field("status")?)?,
            decided_at: row.field("decided_at")?,
            decided_by: row.field("decided_by")?,
            rejection_reason: row.field("rejection_reason")?,
            applied_at: row.field("applied_at")?,
            applied_by: row.field("applied_by")?,
            follow_up_id: row.field::<Option<uuid::Uuid>>("follow_up_id")?.map(ExperimentId::from),
            observed_revenue: revenue("observed_revenue")?,
            scored_at: row.field("scored_at")?,
        })
    }

    /// By which share of the expected revenue the observed one is off: 0.1 if it is 10 % more, -0.1 if it is 10 % less,
    /// 0 if the prediction was right. `None` before [`score`](crate::Recommendations::score), and where nothing was
    /// expected, of which nothing is a share.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// let off = tenant.recommendations().get(id).await?.and_then(|r| r.deviation());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn deviation(&self) -> Option<Decimal> {
        let (observed, expected) = (self.observed_revenue?.amount(), self.expected_revenue?.amount());
        observed.checked_sub(expected)?.checked_div(expected.abs())
    }
}
