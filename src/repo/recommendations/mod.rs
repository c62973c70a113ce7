mod bounds;
mod follow_up;
mod life;
mod model;
mod new;

use tokio_postgres::types::Type;
use uuid::Uuid;

use super::page::{Cursor, Page, rows_for};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, RecommendationId};
use crate::scope::{Params, Statement, TenantScope};
pub use bounds::PriceBounds;
pub use follow_up::FollowUp;
pub use model::{Objective, Recommendation, RecommendationStatus};
pub use new::NewRecommendation;

/// Recommended prices, and what becomes of them: somebody [approves](Recommendations::approve) one within bounds,
/// [applying](Recommendations::apply) it makes a draft that tries it, and later its prediction is
/// [scored](Recommendations::score) by what happened. Nobody is shown another price by any of that, before the draft is activated.
///
/// Transitions are decided by the database, so of two callers one wins and the other gets a
/// [`Conflict`](crate::ErrorKind::Conflict).
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
                    &new.source,
                    &new.model_version,
                    &new.inputs_hash,
                    &new.expires_at,
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

    /// One recommendation, by its id.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::RecommendationId) -> lastprice::Result<()> {
    /// let recommendation = tenant.recommendations().get(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn get(self, id: RecommendationId) -> Result<Option<Recommendation>> {
        let row = self.scope.query_opt(&GET, &[&self.tenant(), &id.uuid()]).await?;
        row.map(|row| Recommendation::from_row(&row)).transpose()
    }

    /// The newest recommendation of an experiment, whatever became of it.
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

    /// The recommendations of one status, of all experiments, oldest id first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let proposed = lastprice::RecommendationStatus::Proposed;
    /// let to_decide = tenant.recommendations().list_by_status(proposed, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_status(
        self,
        status: RecommendationStatus,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Recommendation>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let params: Params<'_> = &[&self.tenant(), &status.as_str(), &after, &rows];
        let rows = self.scope.query(&LIST_BY_STATUS, params).await?;
        let items = rows.iter().map(Recommendation::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |r: &Recommendation| r.id.uuid()))
    }
}

macro_rules! columns {
    () => {
        "id, experiment_id, price, currency, expected_revenue, confidence, objective, simulation, source, model_version, \
         inputs_hash, expires_at, created_at, status, decided_at, decided_by, rejection_reason, applied_at, applied_by, \
         follow_up_id, observed_revenue, scored_at"
    };
}
use columns;

pub(super) const STATEMENTS: &[&Statement] = &[&STORE, &GET, &LATEST, &LIST, &LIST_BY_STATUS];
pub(super) const LIFE_STATEMENTS: &[&Statement] = life::STATEMENTS;
pub(super) const FOLLOW_UP_STATEMENTS: &[&Statement] = follow_up::STATEMENTS;

static STORE: Statement = Statement::write(
    "recommendations.store",
    concat!(
        "INSERT INTO {s}.recommendations (tenant_id, id, experiment_id, price, currency, expected_revenue,
                                          confidence, objective, simulation, source, model_version, inputs_hash, expires_at)
         SELECT e.tenant_id, $2, e.id, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13
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
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::TIMESTAMPTZ,
    ],
);

static GET: Statement = Statement::read(
    "recommendations.get",
    concat!("SELECT ", columns!(), " FROM {s}.recommendations WHERE tenant_id = $1 AND id = $2"),
    &[Type::UUID, Type::UUID],
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

static LIST_BY_STATUS: Statement = Statement::read(
    "recommendations.list_by_status",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.recommendations WHERE tenant_id = $1 AND status = $2 AND id >= $3
         ORDER BY tenant_id, status, id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);
