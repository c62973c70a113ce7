mod config;
mod decider;
mod entry;
mod life;
mod live;
mod model;
mod plan;

use tokio_postgres::types::{Json, Type};

use super::page::{Cursor, Page, rows_for};
use super::row::rules;
use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::Currency;
use crate::scope::{Statement, TenantScope};
pub(crate) use config::{Config, LISTEN, PROBE};
pub use decider::Reason;
pub(crate) use decider::{Arm, Decided, Decider, decider_columns};
pub use entry::{AssignmentUnit, Eligibility, Layer};
use model::Entry;
pub(super) use model::check_key;
pub use model::{Experiment, ExperimentEdit, ExperimentStatus, NewExperiment, NewPhase};
pub use plan::{AnalysisPlan, DecisionRule, PrimaryMetric};

/// The tenant's experiments.
///
/// Transitions are decided by the database in one statement each, so of two callers one wins and the other gets a
/// [`Conflict`](crate::ErrorKind::Conflict).
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Experiments<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Experiments<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Experiments { scope }
    }

    fn tenant(&self) -> uuid::Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Creates a draft.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, new: lastprice::NewExperiment) -> lastprice::Result<()> {
    /// let draft = tenant.experiments().create(new).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the tenant has the key or the id already,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Repeating the call reports a conflict if the draft was created.
    pub async fn create(self, new: NewExperiment) -> Result<Experiment> {
        let variants = new.checked_variants()?;
        let baseline = new.baseline.as_deref().unwrap_or(&variants[0].name);
        let (tenant, id, currency) = (self.tenant(), new.id.uuid(), new.currency.code());
        let entry = EntryColumns::of(&new.entry, Some(new.currency))?;
        let row = self
            .scope
            .query_opt(
                &CREATE,
                &[
                    &tenant,
                    &id,
                    &new.key,
                    &new.name,
                    &currency,
                    &Json(&variants),
                    &baseline,
                    &new.metadata,
                    &entry.traffic.unwrap_or(share(Share::ALL)),
                    &entry.layer,
                    &entry.start,
                    &entry.end,
                    &entry.unit.unwrap_or(AssignmentUnit::User.as_str()),
                    &entry.eligibility.unwrap_or(Eligibility::Everyone.as_str()),
                    &entry.quote_validity,
                    &entry.plan,
                ],
            )
            .await?;
        match row {
            Some(row) => Experiment::from_row(&row),
            None if self.scope.tenants().get().await?.is_none() => Err(Error::not_found("tenant")),
            None => Err(Error::conflict("the tenant has an experiment of this key or id already")),
        }
    }

    /// One experiment, by its id.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().get(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn get(self, id: ExperimentId) -> Result<Option<Experiment>> {
        let row = self.scope.query_opt(&GET, &[&self.tenant(), &id.uuid()]).await?;
        row.map(|row| Experiment::from_row(&row)).transpose()
    }

    /// One experiment, by its key.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let experiment = tenant.experiments().by_key("pro-plan").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if the key is none that an experiment could have.
    pub async fn by_key(self, key: &str) -> Result<Option<Experiment>> {
        check_key("key", key)?;
        let row = self.scope.query_opt(&BY_KEY, &[&self.tenant(), &key]).await?;
        row.map(|row| Experiment::from_row(&row)).transpose()
    }

    /// The experiments, all or of one status, oldest id first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let active = Some(lastprice::ExperimentStatus::Active);
    /// let page = tenant.experiments().list(active, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list(
        self,
        status: Option<ExperimentStatus>,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<Experiment>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = match status {
            None => self.scope.query(&LIST, &[&self.tenant(), &after, &rows]).await?,
            Some(status) => {
                self.scope.query(&LIST_STATUS, &[&self.tenant(), &status.as_str(), &after, &rows]).await?
            }
        };
        let items = rows.iter().map(Experiment::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |e: &Experiment| e.id.uuid()))
    }

    /// Edits a draft. `revision` is the one that was read: if the draft was changed since, nothing happens.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, draft: lastprice::Experiment) -> lastprice::Result<()> {
    /// let edit = lastprice::ExperimentEdit::new().name("A better name");
    /// let edited = tenant.experiments().edit(draft.id, draft.revision, edit).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names what breaks a rule,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the revision is another or it is no draft any more,
    /// [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn edit(self, id: ExperimentId, revision: i64, edit: ExperimentEdit) -> Result<Experiment> {
        edit.name.as_deref().map_or(Ok(()), |name| rules::name("name", name))?;
        edit.metadata.as_ref().map_or(Ok(()), |m| rules::object("metadata", m))?;
        if edit.baseline.as_deref().is_some_and(|b| b.contains('\0')) {
            return Err(Error::invalid("baseline", "is none of the variants"));
        }
        let variants = edit.arms.as_ref().map(|(_, v)| v.check()).transpose()?;
        let currency = edit.arms.as_ref().map(|(currency, _)| currency.code());
        let json = variants.as_ref().map(Json);
        let entry = EntryColumns::of(&edit.entry, edit.arms.as_ref().map(|(own, _)| *own))?;
        let row = self
            .scope
            .query_opt(
                &EDIT,
                &[
                    &self.tenant(),
                    &id.uuid(),
                    &revision,
                    &edit.name,
                    &currency,
                    &json,
                    &edit.baseline,
                    &edit.metadata,
                    &entry.traffic,
                    &edit.entry.layer.is_some(),
                    &entry.layer,
                    &entry.start,
                    &entry.end,
                    &entry.unit,
                    &entry.eligibility,
                    &entry.quote_validity,
                    &entry.plan,
                ],
            )
            .await?;
        if let Some(row) = row {
            return Experiment::from_row(&row);
        }
        let stored = self.get(id).await?.ok_or_else(|| Error::not_found("experiment"))?;
        let arms = variants.as_ref().unwrap_or(&stored.variants);
        let lacks_forced = stored.forced.values().any(|name| arms.iter().all(|arm| arm.name != *name));
        Err(match stored.status {
            ExperimentStatus::Draft if stored.revision == revision && lacks_forced => {
                Error::invalid("variants", "lack one that is forced upon somebody")
            }
            ExperimentStatus::Draft if stored.revision == revision => {
                Error::invalid("baseline", "is none of the variants")
            }
            ExperimentStatus::Draft => Error::conflict("the draft was changed since it was read"),
            status => Error::conflict(format!("the experiment is {status}: only a draft can be edited")),
        })
    }
}

macro_rules! columns {
    () => {
        "id, key, name, status, currency, variants, baseline, winner, salt, phase, traffic, layer, layer_start, layer_end, \
         unit, eligibility, quote_validity, plan, forced, metadata, revision, start_date, end_date, created_at, updated_at, updated_by"
    };
}
pub(in crate::repo) use columns;

/// [`Entry`], as the columns have it.
struct EntryColumns<'e> {
    traffic: Option<i32>,
    layer: Option<&'e str>,
    start: Option<i32>,
    end: Option<i32>,
    unit: Option<&'static str>,
    eligibility: Option<&'static str>,
    quote_validity: Option<i32>,
    plan: Option<Json<&'e AnalysisPlan>>,
}

impl<'e> EntryColumns<'e> {
    fn of(entry: &'e Entry, own: Option<Currency>) -> Result<Self> {
        let layer = entry.layer.as_ref().and_then(Option::as_ref);
        let seconds = |validity: std::time::Duration| {
            let seconds = i32::try_from(validity.as_secs()).ok();
            seconds
                .filter(|s| validity.subsec_nanos() == 0 && (1..=10 * 365 * 86_400).contains(s))
                .ok_or_else(|| {
                    Error::invalid("quote_validity", "is not a whole number of seconds from one to ten years")
                })
        };
        Ok(EntryColumns {
            traffic: entry.traffic.map(share),
            layer: layer.map(Layer::name),
            start: layer.map(|layer| share(layer.range().start)),
            end: layer.map(|layer| share(layer.range().end)),
            unit: entry.unit.map(AssignmentUnit::as_str),
            eligibility: entry.eligibility.map(Eligibility::as_str),
            quote_validity: entry.quote_validity.map(seconds).transpose()?,
            plan: entry.plan.as_ref().map(|plan| plan.check(own).map(|()| Json(plan))).transpose()?,
        })
    }
}

/// Millionths, which are at most a million.
fn share(share: Share) -> i32 {
    share.millionths() as i32
}

pub(super) const STATEMENTS: &[&Statement] = &[&CREATE, &GET, &BY_KEY, &LIST, &LIST_STATUS, &EDIT];
pub(super) const LIFE_STATEMENTS: &[&Statement] = life::STATEMENTS;
pub(super) const LIVE_STATEMENTS: &[&Statement] = live::STATEMENTS;
pub(super) const CONFIG_STATEMENTS: &[&Statement] = config::STATEMENTS;

static CREATE: Statement = Statement::write(
    "experiments.create",
    // From its tenant: a tenant that is not there is no row, instead of an error that ends a host's transaction.
    concat!(
        "INSERT INTO {s}.experiments (tenant_id, id, key, name, currency, variants, baseline, metadata,
                                      traffic, layer, layer_start, layer_end, unit, eligibility, quote_validity, plan)
         SELECT t.id, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, COALESCE($16, '{}') FROM {s}.tenants t WHERE t.id = $1
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
        Type::JSONB,
        Type::TEXT,
        Type::JSONB,
        Type::INT4,
        Type::TEXT,
        Type::INT4,
        Type::INT4,
        Type::TEXT,
        Type::TEXT,
        Type::INT4,
        Type::JSONB,
    ],
);

static GET: Statement = Statement::read(
    "experiments.get",
    concat!("SELECT ", columns!(), " FROM {s}.experiments WHERE tenant_id = $1 AND id = $2"),
    &[Type::UUID, Type::UUID],
);

static BY_KEY: Statement = Statement::read(
    "experiments.by_key",
    concat!("SELECT ", columns!(), " FROM {s}.experiments WHERE tenant_id = $1 AND key = $2"),
    &[Type::UUID, Type::TEXT],
);

static LIST: Statement = Statement::read(
    "experiments.list",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.experiments WHERE tenant_id = $1 AND id >= $2 ORDER BY tenant_id, id LIMIT $3"
    ),
    &[Type::UUID, Type::UUID, Type::INT8],
);

static LIST_STATUS: Statement = Statement::read(
    "experiments.list_status",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.experiments WHERE tenant_id = $1 AND status = $2 AND id >= $3 ORDER BY tenant_id, status, id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);

static EDIT: Statement = Statement::write(
    "experiments.edit",
    concat!(
        "UPDATE {s}.experiments SET
           name = COALESCE($4, name), currency = COALESCE($5, currency), variants = COALESCE($6, variants),
           baseline = COALESCE($7, baseline), metadata = COALESCE($8, metadata), traffic = COALESCE($9, traffic),
           layer = CASE WHEN $10 THEN $11 ELSE layer END, layer_start = CASE WHEN $10 THEN $12 ELSE layer_start END,
           layer_end = CASE WHEN $10 THEN $13 ELSE layer_end END,
           unit = COALESCE($14, unit), eligibility = COALESCE($15, eligibility),
           quote_validity = COALESCE($16, quote_validity), plan = COALESCE($17, plan)
         WHERE tenant_id = $1 AND id = $2 AND status = 'draft' AND revision = $3
           AND (COALESCE($7, baseline) IS NULL
                OR COALESCE($6, variants) @> jsonb_build_array(jsonb_build_object('name', COALESCE($7, baseline))))
           AND {s}.forced_variants_exist(forced, COALESCE($6, variants))
         RETURNING ",
        columns!()
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::INT8,
        Type::TEXT,
        Type::TEXT,
        Type::JSONB,
        Type::TEXT,
        Type::JSONB,
        Type::INT4,
        Type::BOOL,
        Type::TEXT,
        Type::INT4,
        Type::INT4,
        Type::TEXT,
        Type::TEXT,
        Type::INT4,
        Type::JSONB,
    ],
);
