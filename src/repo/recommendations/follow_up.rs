//! The experiment that tries a recommended price.

use tokio_postgres::types::Type;

use super::{RecommendationStatus, Recommendations};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, RecommendationId};
use crate::repo::experiments::{Experiment, check_key, columns};
use crate::repo::row::rules;
use crate::repo::variants::is_printable;
use crate::scope::Statement;

/// The draft that is made by [applying](Recommendations::apply) a recommendation: the experiment's baseline, at its price, against
/// the recommended price. The price books of both are the baseline's. All else is as in the experiment that the recommendation
/// was made from: currency, traffic, layer, unit, eligibility, validity of quotes, analysis plan. A draft can be edited. Complete the experiment before you activate it: else users of
/// both see two prices.
///
/// ```
/// let follow_up = lastprice::FollowUp::new("pro-plan-2026-12").weights(9, 1); // a tenth of the users see it
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct FollowUp {
    id: ExperimentId,
    key: String,
    name: Option<String>,
    variant: String,
    weights: (u32, u32),
}

impl FollowUp {
    /// A draft with a key of its own.
    pub fn new(key: impl Into<String>) -> Self {
        FollowUp {
            id: ExperimentId::new(),
            key: key.into(),
            name: None,
            variant: "recommended".to_owned(),
            weights: (1, 1),
        }
    }

    /// Takes an id that the host made: applying the same recommendation again with this id finds the same draft.
    pub fn id(mut self, id: ExperimentId) -> Self {
        self.id = id;
        self
    }

    /// What people call it. Default: the name of the experiment before, and `(follow-up)`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The name of the variant that has the recommended price. Default: `recommended`.
    pub fn variant(mut self, name: impl Into<String>) -> Self {
        self.variant = name.into();
        self
    }

    /// The weights of the baseline and of the recommended price. Default: 1 and 1.
    pub fn weights(mut self, baseline: u32, recommended: u32) -> Self {
        self.weights = (baseline, recommended);
        self
    }

    fn check(&self) -> Result<()> {
        check_key("key", &self.key)?;
        self.name.as_deref().map_or(Ok(()), |name| rules::name("name", name))?;
        if !is_printable(&self.variant) {
            return Err(Error::invalid("variant", "is not 1 to 128 printable characters"));
        }
        if self.weights == (0, 0) {
            return Err(Error::invalid("weights", "are both zero"));
        }
        Ok(())
    }
}

impl Recommendations<'_> {
    /// Makes the draft that tries an approved price: approved → applied, once. Nobody sees the price before the draft is
    /// [activated](crate::Experiments::activate).
    ///
    /// Draft and status are written by one statement, so that there are both or none.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// let follow_up = lastprice::FollowUp::new("pro-plan-2026-12");
    /// let draft = tenant.recommendations().apply(id, &follow_up).await?;
    /// tenant.experiments().activate(draft.id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is not approved, or applied by another call already
    /// ([`conflicting_fields`](crate::Error::conflicting_fields) names `status`), has expired (`expires_at`), or is not in the currency
    /// of the experiment (`currency`); and if the tenant has an experiment of this key or id (`follow_up`).
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what of the follow-up breaks a rule, `variant` if the baseline has
    /// that name; [`NotFound`](crate::ErrorKind::NotFound).
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`](crate::TenantScope). Repeating the call with the same [`FollowUp`], or one of the same id, gives its
    /// experiment if it was applied.
    pub async fn apply(self, id: RecommendationId, follow_up: &FollowUp) -> Result<Experiment> {
        follow_up.check()?;
        let (baseline, recommended) = follow_up.weights;
        let row = self
            .scope
            .query_opt(
                &APPLY,
                &[
                    &self.tenant(),
                    &id.uuid(),
                    &follow_up.id.uuid(),
                    &follow_up.key,
                    &follow_up.name,
                    &follow_up.variant,
                    &i64::from(baseline),
                    &i64::from(recommended),
                ],
            )
            .await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let standing = self.standing(id).await?;
        if standing.recommendation.follow_up_id == Some(follow_up.id)
            && let Some(applied) = self.scope.experiments().get(follow_up.id).await?
        {
            return Ok(applied);
        }
        standing.may_become(RecommendationStatus::Applied)?;
        if standing.baseline == follow_up.variant {
            return Err(Error::invalid("variant", "is the name of the baseline"));
        }
        let taken = Error::conflict("the tenant has an experiment of this key or id already");
        Err(taken.with_fields(vec!["follow_up"]))
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&APPLY];

// The lock makes two at once wait for each other before either has made a draft. The rest of `r` is looked at again by then.
static APPLY: Statement = Statement::write(
    "recommendations.apply",
    concat!(
        "WITH approved AS MATERIALIZED (
           SELECT r.price, e.*, b.control FROM {s}.recommendations r
           JOIN {s}.experiments e ON e.tenant_id = $1 AND e.id = r.experiment_id AND e.currency = r.currency
           CROSS JOIN LATERAL (
             SELECT v AS control FROM jsonb_array_elements(e.variants) v
             WHERE v ->> 'name' = COALESCE(e.baseline, e.variants -> 0 ->> 'name') AND v ->> 'name' <> $6) b
           WHERE r.tenant_id = $1 AND r.id = $2 AND r.status = 'approved'
             AND (r.expires_at IS NULL OR r.expires_at > statement_timestamp())
           FOR NO KEY UPDATE OF r
         ), draft AS (
           INSERT INTO {s}.experiments (tenant_id, id, key, name, currency, variants, baseline, traffic,
                                        layer, layer_start, layer_end, unit, eligibility, quote_validity, plan)
           SELECT tenant_id, $3, $4, COALESCE($5, left(name, 188) || ' (follow-up)'), currency,
                  jsonb_build_array(control || jsonb_build_object('weight', $7),
                                    control || jsonb_build_object('name', $6, 'weight', $8, 'price', price::text)),
                  control ->> 'name', traffic, layer, layer_start, layer_end, unit, eligibility, quote_validity, plan
           FROM approved ON CONFLICT DO NOTHING RETURNING ",
        columns!(),
        "), applied AS (
           UPDATE {s}.recommendations r SET status = 'applied', follow_up_id = d.id FROM draft d
           WHERE r.tenant_id = $1 AND r.id = $2
         )
         SELECT ",
        columns!(),
        " FROM draft"
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::INT8,
        Type::INT8,
    ],
);
