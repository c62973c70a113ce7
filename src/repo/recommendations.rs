use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::page::{Cursor, Page, rows_for};
use super::row::{Fields, rules, text_enum};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, RecommendationId};
use crate::money::Money;
use crate::scope::{Statement, TenantScope};

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

/// A recommended price, as stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Recommendation {
    /// Its id.
    pub id: RecommendationId,
    /// The experiment it was made from.
    pub experiment_id: ExperimentId,
    /// The price.
    pub price: Money,
    /// What the price is expected to bring, in its currency; the unit is the recommender's.
    pub expected_revenue: Option<Money>,
    /// How sure the recommender is, from 0 to 1.
    pub confidence: f64,
    /// What it is meant to maximise.
    pub objective: Objective,
    /// What it was computed from: a JSON object or array.
    pub simulation: Value,
    /// When it was stored.
    pub created_at: DateTime<Utc>,
}

impl Recommendation {
    fn from_row(row: &Row) -> Result<Self> {
        let currency = row.currency("currency")?;
        Ok(Recommendation {
            id: row.id("id")?,
            experiment_id: row.id("experiment_id")?,
            price: row.money("price", "currency")?,
            expected_revenue: row
                .field::<Option<Decimal>>("expected_revenue")?
                .map(|amount| Money::stored(amount, currency)),
            confidence: row.field("confidence")?,
            objective: Objective::stored(row.field("objective")?)?,
            simulation: row.field("simulation")?,
            created_at: row.field("created_at")?,
        })
    }
}

/// A recommendation to store.
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId) -> lastprice::Result<()> {
/// use lastprice::{Money, NewRecommendation, Objective};
///
/// let new = NewRecommendation::new(experiment, Money::new("29.00", "USD")?, 0.8, Objective::Revenue)
///     .expected_revenue(Money::new("2700", "USD")?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewRecommendation {
    id: RecommendationId,
    experiment_id: ExperimentId,
    price: Money,
    expected_revenue: Option<Money>,
    confidence: f64,
    objective: Objective,
    simulation: Value,
}

impl NewRecommendation {
    /// A price for an experiment, with a confidence from 0 to 1.
    pub fn new(experiment: ExperimentId, price: Money, confidence: f64, objective: Objective) -> Self {
        NewRecommendation {
            id: RecommendationId::new(),
            experiment_id: experiment,
            price,
            expected_revenue: None,
            confidence,
            objective,
            simulation: Value::Object(Default::default()),
        }
    }

    /// Its id. Default: a new one.
    pub fn id(mut self, id: RecommendationId) -> Self {
        self.id = id;
        self
    }

    /// What the price is expected to bring, in the currency of the price.
    pub fn expected_revenue(mut self, revenue: Money) -> Self {
        self.expected_revenue = Some(revenue);
        self
    }

    /// What it was computed from: a JSON object or array of at most 64 KiB.
    pub fn simulation(mut self, simulation: Value) -> Self {
        self.simulation = simulation;
        self
    }

    fn check(&self) -> Result<()> {
        if self.price.amount() < Decimal::ZERO
            || Money::of(self.price.amount(), self.price.currency()).is_err()
        {
            return Err(Error::invalid(
                "price",
                "is not from 0 to 10^12 with at most 6 digits after the point",
            ));
        }
        if let Some(revenue) = self.expected_revenue {
            if revenue.currency() != self.price.currency() {
                return Err(Error::invalid("expected_revenue", "is not in the currency of the price"));
            }
            if Money::of(revenue.amount(), revenue.currency()).is_err() {
                return Err(Error::invalid(
                    "expected_revenue",
                    "is not below 10^12 with at most 6 digits after the point",
                ));
            }
        }
        if !(0.0..=1.0).contains(&self.confidence) {
            return Err(Error::invalid("confidence", "is not from 0 to 1"));
        }
        if !self.simulation.is_object() && !self.simulation.is_array() {
            return Err(Error::invalid("simulation", "is not a JSON object or array"));
        }
        rules::json("simulation", &self.simulation)
    }
}

/// Recommended prices.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Recommendations<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Recommendations<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Recommendations { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Stores a recommendation.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, new: lastprice::NewRecommendation) -> lastprice::Result<()> {
    /// let stored = tenant.recommendations().store(&new).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the id is taken.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Repeating the call reports a conflict if it was stored.
    pub async fn store(self, new: &NewRecommendation) -> Result<Recommendation> {
        new.check()?;
        let row = self
            .scope
            .query_opt(
                &STORE,
                &[
                    &self.tenant(),
                    &new.id.uuid(),
                    &new.experiment_id.uuid(),
                    &new.price.amount(),
                    &new.price.currency().code(),
                    &new.expected_revenue.map(|m| m.amount()),
                    &new.confidence,
                    &new.objective.as_str(),
                    &new.simulation,
                ],
            )
            .await?;
        match row {
            Some(row) => Recommendation::from_row(&row),
            None if self.scope.experiments().get(new.experiment_id).await?.is_none() => {
                Err(Error::not_found("experiment"))
            }
            None => Err(Error::conflict("the tenant has a recommendation of this id already")),
        }
    }

    /// The newest recommendation of an experiment.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let price = tenant.recommendations().latest(id).await?.map(|r| r.price);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn latest(self, experiment: ExperimentId) -> Result<Option<Recommendation>> {
        let row = self.scope.query_opt(&LATEST, &[&self.tenant(), &experiment.uuid()]).await?;
        row.map(|row| Recommendation::from_row(&row)).transpose()
    }

    /// The recommendations of an experiment, newest id first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let newest = tenant.recommendations().list(id, 10, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list(
        self,
        experiment: ExperimentId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Recommendation>> {
        let (rows, before) = (rows_for(limit)?, Cursor::descending(after));
        let rows = self.scope.query(&LIST, &[&self.tenant(), &experiment.uuid(), &before, &rows]).await?;
        let items = rows.iter().map(Recommendation::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |r: &Recommendation| r.id.uuid()))
    }
}

macro_rules! columns {
    () => {
        "id, experiment_id, price, currency, expected_revenue, confidence, objective, simulation, created_at"
    };
}

pub(super) const STATEMENTS: &[&Statement] = &[&STORE, &LATEST, &LIST];

static STORE: Statement = Statement::write(
    "recommendations.store",
    concat!(
        "INSERT INTO {s}.recommendations (tenant_id, id, experiment_id, price, currency, expected_revenue,
                                          confidence, objective, simulation)
         SELECT e.tenant_id, $2, e.id, $4, $5, $6, $7, $8, $9
         FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = $3
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::NUMERIC,
        Type::TEXT,
        Type::NUMERIC,
        Type::FLOAT8,
        Type::TEXT,
        Type::JSONB,
    ],
);

static LATEST: Statement = Statement::read(
    "recommendations.latest",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.recommendations WHERE tenant_id = $1 AND experiment_id = $2
         ORDER BY tenant_id DESC, experiment_id DESC, created_at DESC, id DESC LIMIT 1"
    ),
    &[Type::UUID, Type::UUID],
);

static LIST: Statement = Statement::read(
    "recommendations.list",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.recommendations WHERE tenant_id = $1 AND experiment_id = $2 AND id <= $3
         ORDER BY tenant_id DESC, experiment_id DESC, id DESC LIMIT $4"
    ),
    &[Type::UUID, Type::UUID, Type::UUID, Type::INT8],
);
