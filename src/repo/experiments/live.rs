//! What may change of an experiment while it assigns users.

use tokio_postgres::types::{Json, Type};

use super::{Experiment, ExperimentStatus, Experiments, NewPhase, columns, share};
use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::id::{ExperimentId, UserId};
use crate::scope::Statement;

impl Experiments<'_> {
    /// Takes more users. Who is in stays in, with the variant that they have; to take fewer, start a
    /// [new phase](Experiments::new_phase).
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// use lastprice::bucketing::Share;
    /// let experiment = tenant.experiments().raise_traffic(id, Share::percent(50)?).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if it takes more already, or is over;
    /// [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn raise_traffic(self, id: ExperimentId, traffic: Share) -> Result<Experiment> {
        let row = self.scope.query_opt(&RAISE, &[&self.tenant(), &id.uuid(), &share(traffic)]).await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("experiment"))?;
        Err(Error::conflict(match stored.status {
            ExperimentStatus::Completed => "the experiment is completed".to_owned(),
            _ => format!("the experiment takes {} already, and a phase only takes more", stored.traffic),
        }))
    }

    /// Starts the next phase of an active or paused experiment: other weights or variants, for new users. Stored quotes
    /// stand, and the phase is stored with each, so that results can be told apart. `revision` is the one that was read.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, live: lastprice::Experiment) -> lastprice::Result<()> {
    /// use lastprice::{NewPhase, Variants};
    /// let phase = NewPhase::new(Variants::new().add("19", 1, 19).add("29", 9, 29));
    /// let experiment = tenant.experiments().new_phase(live.id, live.revision, phase).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for variants that break a rule, lack the baseline with the prices it
    /// has (they are what everyone outside sees), or lack one that is forced upon somebody; [`Conflict`](crate::ErrorKind::Conflict) if the revision is another, or the experiment
    /// neither active nor paused; [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn new_phase(self, id: ExperimentId, revision: i64, phase: NewPhase) -> Result<Experiment> {
        let variants = phase.variants.check()?;
        let traffic = phase.traffic.map(share);
        let (tenant, id) = (self.tenant(), id.uuid());
        let row =
            self.scope.query_opt(&NEW_PHASE, &[&tenant, &id, &revision, &Json(&variants), &traffic]).await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let stored = self.get(id.into()).await?.ok_or_else(|| Error::not_found("experiment"))?;
        Err(match stored.status {
            ExperimentStatus::Active | ExperimentStatus::Paused if stored.revision == revision => {
                let new = |name: &str| variants.iter().find(|v| v.name == name);
                let rule = match new(&stored.baseline) {
                    None => "lack the baseline",
                    Some(_) if stored.forced.values().any(|name| new(name).is_none()) => {
                        "lack one that is forced upon somebody"
                    }
                    Some(_) => "give the baseline other prices, which everyone outside the experiment sees",
                };
                Error::invalid("variants", rule)
            }
            ExperimentStatus::Active | ExperimentStatus::Paused => {
                Error::conflict("the experiment was changed since it was read")
            }
            status => Error::conflict(format!("an experiment that is {status} has no next phase")),
        })
    }

    /// Shows one user a certain variant, for testing, whatever else is said; `None` takes them off the list. At most 1000
    /// of an experiment. In an experiment [by account](crate::AssignmentUnit::Account), give the account's id.
    ///
    /// While the experiment is active, who has no quote yet gets one of this variant, with the reason
    /// [`Forced`](crate::AssignmentReason::Forced), which stands afterwards as any quote does. Who has another quote already
    /// is shown the forced variant, but keeps the quote, and a sale counts for that.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let tester = lastprice::UserId::new("qa-anna")?;
    /// tenant.experiments().force(id, &tester, Some("39")).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if there is no such variant,
    /// [`Conflict`](crate::ErrorKind::Conflict) beyond 1000, [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn force(self, id: ExperimentId, unit: &UserId, variant: Option<&str>) -> Result<Experiment> {
        if variant.is_some_and(|name| name.contains('\0')) {
            return Err(Error::invalid("variant", "is none of the experiment's"));
        }
        let (tenant, uuid) = (self.tenant(), id.uuid());
        let row = self.scope.query_opt(&FORCE, &[&tenant, &uuid, &unit.as_str(), &variant]).await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("experiment"))?;
        Err(match variant {
            Some(name) if stored.variant(name).is_none() => {
                Error::invalid("variant", "is none of the experiment's")
            }
            _ => Error::conflict("a variant is forced upon 1000 already"),
        })
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&RAISE, &NEW_PHASE, &FORCE];

static RAISE: Statement = Statement::write(
    "experiments.raise_traffic",
    concat!(
        "UPDATE {s}.experiments SET traffic = $3
         WHERE tenant_id = $1 AND id = $2 AND status <> 'completed' AND traffic <= $3 RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::INT4],
);

static NEW_PHASE: Statement = Statement::write(
    "experiments.new_phase",
    concat!(
        "UPDATE {s}.experiments SET variants = $4, phase = phase + 1, traffic = COALESCE($5, traffic),
           baseline = COALESCE(baseline, variants -> 0 ->> 'name')
         WHERE tenant_id = $1 AND id = $2 AND revision = $3 AND status IN ('active', 'paused')
           AND {s}.baseline_prices($4, COALESCE(baseline, variants -> 0 ->> 'name')) = {s}.baseline_prices(variants, baseline)
           AND {s}.forced_variants_exist(forced, $4)
         RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::INT8, Type::JSONB, Type::INT4],
);

static FORCE: Statement = Statement::write(
    "experiments.force",
    concat!(
        "UPDATE {s}.experiments SET
           forced = CASE WHEN $4 IS NULL THEN forced - $3 ELSE forced || jsonb_object(ARRAY[$3, $4]) END
         WHERE tenant_id = $1 AND id = $2
           AND ($4 IS NULL OR {s}.forced_variants_exist(forced || jsonb_object(ARRAY[$3, $4]), variants))
         RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::TEXT, Type::TEXT],
);
