//! From draft to active, paused and completed.

use tokio_postgres::types::Type;

use super::{Experiment, ExperimentStatus, Experiments, columns};
use crate::error::{Error, ErrorKind, Result};
use crate::id::ExperimentId;
use crate::repo::row::Fields;
use crate::repo::usage::ACTIVE_EXPERIMENTS;
use crate::scope::Statement;

impl Experiments<'_> {
    /// Starts assigning users: draft → active. Sets the start date.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().activate(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is no draft, or if a live experiment has a part of its range of
    /// a layer, or is in that layer by another unit, or if the host's transaction is not `READ COMMITTED` and there is a limit;
    /// [`QuotaExceeded`](crate::ErrorKind::QuotaExceeded) if as many are active as the tenant's limit of `active_experiments`
    /// allows; [`NotFound`](crate::ErrorKind::NotFound).
    ///
    /// Where there is a limit, who activates another one of the tenant waits until this transaction, the host's as well, has
    /// ended: of two that ask for the last place, one gets it. After a second of that it is
    /// [`Unavailable`](crate::ErrorKind::Unavailable), and nothing was changed.
    pub async fn activate(self, id: ExperimentId) -> Result<Experiment> {
        self.transition(id, &["draft"], ExperimentStatus::Active, None).await
    }

    /// Stops assigning new users: active → paused. Stored quotes stand.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().pause(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is not active, [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn pause(self, id: ExperimentId) -> Result<Experiment> {
        self.transition(id, &["active"], ExperimentStatus::Paused, None).await
    }

    /// Goes on assigning: paused → active.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().resume(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is not paused,
    /// [`QuotaExceeded`](crate::ErrorKind::QuotaExceeded) and [`Unavailable`](crate::ErrorKind::Unavailable) as of
    /// [`activate`](Experiments::activate),
    /// [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn resume(self, id: ExperimentId) -> Result<Experiment> {
        self.transition(id, &["paused"], ExperimentStatus::Active, None).await
    }

    /// Ends it: active or paused → completed, with or without a winner. Sets the end date. Stored quotes stand; new
    /// users see the baseline, whoever won: the winner is recorded, and making it everybody's price is the host's to do.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().complete(id, Some("29")).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if the winner is none of the variants,
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is neither active nor paused,
    /// [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn complete(self, id: ExperimentId, winner: Option<&str>) -> Result<Experiment> {
        if winner.is_some_and(|w| w.contains('\0')) {
            return Err(Error::invalid("winner", "is none of the variants"));
        }
        self.transition(id, &["active", "paused"], ExperimentStatus::Completed, winner).await
    }

    async fn transition(
        self,
        id: ExperimentId,
        from: &[&str],
        to: ExperimentStatus,
        winner: Option<&str>,
    ) -> Result<Experiment> {
        let row = self
            .scope
            .query_opt(&TRANSITION, &[&self.tenant(), &id.uuid(), &from, &to.as_str(), &winner])
            .await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("experiment"))?;
        if from.contains(&stored.status.as_str()) && winner.is_some_and(|w| stored.variant(w).is_none()) {
            return Err(Error::invalid("winner", "is none of the variants"));
        }
        if to == ExperimentStatus::Active && from.contains(&stored.status.as_str()) {
            let quota = self.scope.usage().check_quota(ACTIVE_EXPERIMENTS).await?;
            if quota.remaining() == Some(0) {
                return Err(quota.exceeded(1));
            }
            // There is room now. Unless something else is in the way, it was not known whether there was.
            let row = self.scope.query_opt(&HINDRANCE, &[&self.tenant(), &id.uuid()]).await?;
            let row = row.ok_or_else(|| Error::not_found("experiment"))?;
            if quota.limit.is_some() && !row.field::<bool>("is_taken")? {
                return Err(match row.field("is_current")? {
                    true => Error::new(
                        ErrorKind::Unavailable,
                        "whether there is room for one more experiment is not known until another transaction has ended",
                    ),
                    false => Error::conflict(
                        "the host's transaction is not READ COMMITTED: it does not see what others activate",
                    ),
                });
            }
        }
        if let (true, Some(layer)) = (from.contains(&stored.status.as_str()), &stored.layer) {
            let (name, range) = (layer.name(), layer.range());
            return Err(Error::conflict(format!(
                "a live experiment has a part of {} to {} of layer `{name}`, or goes by another unit; or the host's \
                 transaction is not READ COMMITTED",
                range.start, range.end
            )));
        }
        Err(Error::conflict(format!("an experiment that is {} cannot become {to}", stored.status)))
    }

    /// Deletes a draft.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// tenant.experiments().delete_draft(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is no draft any more, or has sales;
    /// [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn delete_draft(self, id: ExperimentId) -> Result<()> {
        if self.scope.query_opt(&DELETE_DRAFT, &[&self.tenant(), &id.uuid()]).await?.is_some() {
            return Ok(());
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("experiment"))?;
        Err(Error::conflict(format!(
            "the experiment is {}, or has sales: only a draft without sales can be deleted",
            stored.status
        )))
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&TRANSITION, &HINDRANCE, &DELETE_DRAFT];

static TRANSITION: Statement = Statement::write(
    "experiments.transition",
    concat!(
        "UPDATE {s}.experiments e SET status = $4, winner = $5
         WHERE tenant_id = $1 AND id = $2 AND status = ANY ($3)
           AND ($5 IS NULL OR variants @> jsonb_build_array(jsonb_build_object('name', $5)))
           AND (layer IS NULL OR status <> 'draft' OR current_setting('transaction_isolation') = 'read committed' AND NOT EXISTS (
             SELECT FROM {s}.experiments o
             WHERE o.tenant_id = $1 AND o.layer = e.layer AND o.id <> $2 AND o.status IN ('active', 'paused')
               AND (o.unit <> e.unit OR o.layer_start < e.layer_end AND e.layer_start < o.layer_end)))
           AND ($4 <> 'active' OR {s}.experiment_slot($1))
         RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::TEXT_ARRAY, Type::TEXT, Type::TEXT],
);

// What but the limit keeps a draft from being activated: somebody else in its layer, or a snapshot that does not show it.
static HINDRANCE: Statement = Statement::read(
    "experiments.hindrance",
    "SELECT current_setting('transaction_isolation') = 'read committed' AS is_current,
            e.status = 'draft' AND EXISTS (
              SELECT FROM {s}.experiments o
              WHERE o.tenant_id = $1 AND o.layer = e.layer AND o.id <> $2 AND o.status IN ('active', 'paused')
                AND (o.unit <> e.unit OR o.layer_start < e.layer_end AND e.layer_start < o.layer_end)) AS is_taken
     FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = $2",
    &[Type::UUID, Type::UUID],
);

static DELETE_DRAFT: Statement = Statement::write(
    "experiments.delete_draft",
    "DELETE FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = $2 AND e.status = 'draft'
       AND NOT EXISTS (SELECT FROM {s}.conversions c WHERE c.tenant_id = $1 AND c.experiment_id = $2)
     RETURNING id",
    &[Type::UUID, Type::UUID],
);
