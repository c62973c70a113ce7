//! From proposed to approved, rejected and expired; and whether the prediction was right.

use rust_decimal::Decimal;
use tokio_postgres::types::Type;

use super::new::check_revenue;
use super::{PriceBounds, Recommendation, RecommendationStatus, Recommendations, columns};
use crate::error::{Error, Result};
use crate::id::RecommendationId;
use crate::money::{Currency, Money};
use crate::repo::row::Fields;
use crate::scope::Statement;

/// A recommendation as it stands at this moment, by the clock of the database, beside its experiment.
pub(super) struct Standing {
    pub(super) recommendation: Recommendation,
    is_due: bool,
    /// The experiment's currency.
    currency: Currency,
    /// The price that everyone outside of the experiment sees.
    in_force: Money,
    /// The name of the variant of that price.
    pub(super) baseline: String,
}

impl Standing {
    /// Says why not, if not.
    pub(super) fn may_become(&self, to: RecommendationStatus) -> Result<()> {
        use RecommendationStatus::{Applied, Approved, Proposed, Rejected};
        let (status, price_in) = (self.recommendation.status, self.recommendation.price.currency());
        if !matches!((status, to), (Proposed, Approved | Rejected) | (Approved, Applied | Rejected)) {
            let error = Error::conflict(format!("a recommendation that is {status} cannot become {to}"));
            return Err(error.with_fields(vec!["status"]));
        }
        if to == Rejected {
            return Ok(());
        }
        if self.is_due {
            let error = Error::conflict(format!("the recommendation expired before it became {to}"));
            return Err(error.with_fields(vec!["expires_at"]));
        }
        if self.currency != price_in {
            let error = format!("the price is in {price_in}, and the experiment in {}", self.currency);
            return Err(Error::conflict(error).with_fields(vec!["currency"]));
        }
        Ok(())
    }
}

impl Recommendations<'_> {
    pub(super) async fn standing(self, id: RecommendationId) -> Result<Standing> {
        let row = self.scope.query_opt(&STANDING, &[&self.tenant(), &id.uuid()]).await?;
        let row = row.ok_or_else(|| Error::not_found("recommendation"))?;
        let currency = row.currency("experiment_currency")?;
        Ok(Standing {
            recommendation: Recommendation::from_row(&row)?,
            is_due: row.field("is_due")?,
            currency,
            in_force: Money::stored(row.field::<Decimal>("in_force")?, currency),
            baseline: row.field("baseline")?,
        })
    }

    /// Approves a proposal whose price is within bounds: proposed → approved. The actor of the
    /// [scope](crate::TenantScope::with_actor) is who decided.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// use lastprice::{Actor, Money, PriceBounds, bucketing::Share};
    ///
    /// let bounds = PriceBounds::new().ceiling(Money::new("49", "USD")?).max_change(Share::percent(20)?);
    /// let anna = tenant.with_actor(Actor::new("anna@example.com")?);
    /// let approved = anna.recommendations().approve(id, &bounds).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if the price is beyond a bound,
    /// [`conflicting_fields`](crate::Error::conflicting_fields) then names `floor`, `ceiling` or `max_change`, and the message the
    /// limit; if it is not proposed (`status`), has expired (`expires_at`), is not in the currency of the experiment
    /// (`currency`), or the price in force was changed meanwhile (`experiment`).
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for bounds that are none, or in another currency than the price;
    /// [`NotFound`](crate::ErrorKind::NotFound).
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`](crate::TenantScope). Repeating the call reports a conflict if it was approved.
    pub async fn approve(self, id: RecommendationId, bounds: &PriceBounds) -> Result<Recommendation> {
        bounds.check()?;
        let standing = self.standing(id).await?;
        standing.may_become(RecommendationStatus::Approved)?;
        bounds.allow(standing.recommendation.price, standing.in_force)?;
        let (in_force, currency) = (standing.in_force.amount(), standing.currency);
        let row = self
            .scope
            .query_opt(&APPROVE, &[&self.tenant(), &id.uuid(), &in_force, &currency.code()])
            .await?;
        if let Some(row) = row {
            return Recommendation::from_row(&row);
        }
        self.standing(id).await?.may_become(RecommendationStatus::Approved)?;
        let changed = Error::conflict("the price in force was changed since the bounds were looked at");
        Err(changed.with_fields(vec!["experiment"]))
    }

    /// Decides against it, for a reason of 1 to 1000 characters: proposed or approved → rejected, also when its time is over.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// tenant.recommendations().reject(id, "not before the holidays").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the reason, [`Conflict`](crate::ErrorKind::Conflict) that names the status
    /// if it is another, [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn reject(self, id: RecommendationId, reason: &str) -> Result<Recommendation> {
        if reason.trim().is_empty() || reason.chars().count() > 1000 || reason.contains('\0') {
            return Err(Error::invalid("reason", "is not a text of 1 to 1000 characters"));
        }
        if let Some(row) = self.scope.query_opt(&REJECT, &[&self.tenant(), &id.uuid(), &reason]).await? {
            return Recommendation::from_row(&row);
        }
        self.standing(id).await?.may_become(RecommendationStatus::Rejected)?;
        Err(Error::conflict("the recommendation was changed meanwhile").with_fields(vec!["status"]))
    }

    /// Marks those whose time is over, by the clock of the database, and says how many there were: proposed or approved →
    /// expired. Call it now and then, so that lists show them; they cannot be approved or applied before that either.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let expired = tenant.recommendations().expire_due().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn expire_due(self) -> Result<u64> {
        Ok(self.scope.query(&EXPIRE_DUE, &[&self.tenant()]).await?.len() as u64)
    }

    /// Stores what came of an applied one, once: net revenue per 1,000 assigned users, as
    /// [expected](crate::NewRecommendation::expected_revenue). [`Recommendation::deviation`] says how far off the prediction was.
    /// Scoring it again with the same amount changes nothing.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// let scored = tenant.recommendations().score(id, lastprice::Money::new("2565", "USD")?).await?;
    /// println!("off by {:?}", scored.deviation()); // -0.05, if 2700 were expected
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput), naming `observed`, for an amount that is none or in another currency than the
    /// price; [`Conflict`](crate::ErrorKind::Conflict) if it is not applied (`status`), expected nothing (`expected_revenue`), or
    /// has another score already (`observed_revenue`); [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn score(self, id: RecommendationId, observed: Money) -> Result<Recommendation> {
        check_revenue("observed", observed)?;
        let (amount, currency) = (observed.amount(), observed.currency());
        let row =
            self.scope.query_opt(&SCORE, &[&self.tenant(), &id.uuid(), &amount, &currency.code()]).await?;
        if let Some(row) = row {
            return Recommendation::from_row(&row);
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("recommendation"))?;
        if currency != stored.price.currency() {
            let price_in = stored.price.currency();
            return Err(Error::invalid(
                "observed",
                format_args!("is not in the currency of the price, {price_in}"),
            ));
        }
        let (why, field) = match stored.observed_revenue {
            Some(score) if score == observed => return Ok(stored),
            Some(_) => ("the recommendation has another score already".to_owned(), "observed_revenue"),
            None if stored.status != RecommendationStatus::Applied => {
                (format!("a recommendation that is {} has no score", stored.status), "status")
            }
            None => ("the recommendation expected no certain revenue".to_owned(), "expected_revenue"),
        };
        Err(Error::conflict(why).with_fields(vec![field]))
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&STANDING, &APPROVE, &REJECT, &EXPIRE_DUE, &SCORE];

/// Of an experiment. By hand, a price may have zeros that an amount has not.
macro_rules! in_force {
    () => {
        "round(({s}.baseline_prices(e.variants, e.baseline) -> 0)::numeric, 6)"
    };
}

static STANDING: Statement = Statement::read(
    "recommendations.standing",
    concat!(
        "SELECT ",
        columns!(),
        ", COALESCE(expires_at <= statement_timestamp(), false) AS is_due, experiment_currency, in_force, baseline
         FROM {s}.recommendations r CROSS JOIN LATERAL (
           SELECT e.currency AS experiment_currency, ",
        in_force!(),
        " AS in_force, COALESCE(e.baseline, e.variants -> 0 ->> 'name') AS baseline
           FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = r.experiment_id) e
         WHERE r.tenant_id = $1 AND r.id = $2"
    ),
    &[Type::UUID, Type::UUID],
);

// The bounds were looked at for this price in force.
static APPROVE: Statement = Statement::write(
    "recommendations.approve",
    concat!(
        "UPDATE {s}.recommendations r SET status = 'approved'
         WHERE tenant_id = $1 AND id = $2 AND status = 'proposed'
           AND (expires_at IS NULL OR expires_at > statement_timestamp())
           AND EXISTS (SELECT FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = r.experiment_id
                       AND e.currency = $4 AND ",
        in_force!(),
        " = $3)
         RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::NUMERIC, Type::TEXT],
);

static REJECT: Statement = Statement::write(
    "recommendations.reject",
    concat!(
        "UPDATE {s}.recommendations SET status = 'rejected', rejection_reason = $3
         WHERE tenant_id = $1 AND id = $2 AND status IN ('proposed', 'approved') RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::TEXT],
);

static EXPIRE_DUE: Statement = Statement::write(
    "recommendations.expire_due",
    "UPDATE {s}.recommendations SET status = 'expired'
     WHERE tenant_id = $1 AND status IN ('proposed', 'approved') AND expires_at <= statement_timestamp() RETURNING id",
    &[Type::UUID],
);

static SCORE: Statement = Statement::write(
    "recommendations.score",
    concat!(
        "UPDATE {s}.recommendations SET observed_revenue = $3
         WHERE tenant_id = $1 AND id = $2 AND status = 'applied' AND currency = $4
           AND expected_revenue IS NOT NULL AND observed_revenue IS NULL RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::NUMERIC, Type::TEXT],
);
