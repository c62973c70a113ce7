use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::page::{Cursor, Page, rows_for};
use super::row::{Fields, text_enum};
use super::variants::FromJsonb;
use crate::error::{Error, Result};
use crate::id::{ExperimentId, RecommendationId};
use crate::scope::{Statement, TenantScope};

text_enum! {
    /// What was done to it.
    AuditAction, "action" {
        /// It was made.
        Created = "created",
        /// It was changed.
        Changed = "changed",
        /// It was deleted.
        Deleted = "deleted",
    }
}

/// What was created, changed or deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditObject {
    /// The tenant itself.
    Tenant,
    /// An experiment of the tenant's: its prices, its status, whatever else.
    Experiment(ExperimentId),
    /// A recommendation for an experiment.
    Recommendation(RecommendationId),
}

/// A column before and after.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AuditChange {
    /// What it was; `None` if it was empty, or is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Value>,
    /// What it is since; `None` if it is empty, or is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Value>,
}

/// One change, and who made it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AuditEntry {
    /// A UUID version 7, of the server's clock: entries made later sort later.
    #[serde(serialize_with = "as_text")]
    pub id: Uuid,
    /// When, by the server's clock. The change was committed after that.
    pub at: DateTime<Utc>,
    /// Who, as the host says: see [`TenantHandle::with_actor`](crate::TenantHandle::with_actor).
    pub actor: Option<String>,
    /// The role that had logged in to the database: a service's, or the owner's.
    pub role: String,
    /// What.
    pub object: AuditObject,
    /// What was done to it.
    pub action: AuditAction,
    /// The columns that are not as they were; a tenant's [own limits](crate::AdminLimits::set_tenant) as `limit.` and the metric. Of secrets (`paid_api_key`, `webhook_secret`) and of `forced`, which has ids of users, it says that they are
    /// others, and neither what they were nor what they are.
    pub changes: BTreeMap<String, AuditChange>,
}

impl AuditEntry {
    fn from_row(row: &Row) -> Result<Self> {
        let id: Uuid = row.field("object_id")?;
        Ok(AuditEntry {
            id: row.field("id")?,
            at: row.field("at")?,
            actor: row.field("actor")?,
            role: row.field("role")?,
            object: match row.field("object")? {
                "tenant" => AuditObject::Tenant,
                "experiment" => AuditObject::Experiment(id.into()),
                "recommendation" => AuditObject::Recommendation(id.into()),
                _ => return Err(Error::internal("a stored `object` is none that this release knows")),
            },
            action: AuditAction::stored(row.field("action")?)?,
            changes: row.field::<FromJsonb<_>>("changes")?.0,
        })
    }
}

/// Who changed what: every change of the tenant, its experiments and its recommendations, newest first.
///
/// Triggers write it, in the transaction of the change, whoever makes it: also what is done by hand in SQL. A service can only read
/// it. A draft that is deleted leaves its trail; a tenant that is deleted takes it along, apart from who deleted it. What the owner of
/// the tables does by TRUNCATE, or with triggers disabled, is not in it.
///
/// Who it was, the host says ([`with_actor`](crate::TenantHandle::with_actor)): nobody checks that, so a host that is taken over may say
/// anything. The role that had logged in is what the database knows. A host's own SQL says it by `SET LOCAL app.actor = 'ann'`.
///
/// ```
/// use lastprice::*;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let database = lastprice_testkit::TestDatabase::new().await?;
/// # let client = Client::builder().url(database.app_url()).require_app_role().build()?;
/// # let acme = client.create_tenant(NewTenant::managed("Acme", "ops@acme.example")).await?;
/// let ann = client.tenant(acme.id).with_actor(Actor::new("ann@acme.example")?);
/// let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00");
/// let draft = ann.experiments().create(NewExperiment::new("pro", "Pro plan", Currency::USD, variants)).await?;
/// ann.experiments().activate(draft.id).await?;
///
/// let trail = client.tenant(acme.id).audit_trail().of_experiment(draft.id, 10, None).await?;
/// let newest = &trail.items[0];
/// assert_eq!(newest.actor.as_deref(), Some("ann@acme.example"));
/// assert_eq!(newest.changes["status"].old, Some("draft".into()));
/// assert_eq!(newest.changes["status"].new, Some("active".into()));
/// # Ok(()) }
/// ```
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct AuditTrail<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> AuditTrail<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        AuditTrail { scope }
    }

    /// All changes, newest first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// for entry in tenant.audit_trail().list(100, None).await?.items {
    ///     println!("{} {:?} {} {:?}", entry.at, entry.actor, entry.action, entry.object);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list(self, limit: u32, after: Option<Cursor>) -> Result<Page<AuditEntry>> {
        let (rows, before) = (rows_for(limit)?, Cursor::descending(after));
        let rows = self.scope.query(&LIST, &[&self.tenant(), &before, &rows]).await?;
        page(&rows, limit)
    }

    /// The changes of one experiment and of the recommendations for it, newest first, also when it has been deleted; at most 1000
    /// a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let trail = tenant.audit_trail().of_experiment(id, 100, None).await?;
    /// let prices = trail.items.iter().filter(|entry| entry.changes.contains_key("variants"));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn of_experiment(
        self,
        experiment: ExperimentId,
        limit: u32,
        after: Option<Cursor>,
    ) -> Result<Page<AuditEntry>> {
        let (rows, before) = (rows_for(limit)?, Cursor::descending(after));
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
            [&self.tenant(), &experiment.uuid(), &before, &rows];
        page(&self.scope.query(&OF_EXPERIMENT, &params).await?, limit)
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }
}

fn as_text<S: serde::Serializer>(id: &Uuid, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn page(rows: &[Row], limit: u32) -> Result<Page<AuditEntry>> {
    let entries = rows.iter().map(AuditEntry::from_row).collect::<Result<_>>()?;
    Ok(Page::new(entries, limit, |entry: &AuditEntry| entry.id))
}

pub(super) const STATEMENTS: &[&Statement] = &[&LIST, &OF_EXPERIMENT];

static LIST: Statement = Statement::read(
    "audit_trail.list",
    "SELECT id, at, actor, role, object, object_id, action, changes FROM {s}.audit_trail
     WHERE tenant_id = $1 AND id <= $2 ORDER BY tenant_id DESC, id DESC LIMIT $3",
    &[Type::UUID, Type::UUID, Type::INT8],
);

static OF_EXPERIMENT: Statement = Statement::read(
    "audit_trail.of_experiment",
    "SELECT id, at, actor, role, object, object_id, action, changes FROM {s}.audit_trail
     WHERE tenant_id = $1 AND experiment_id = $2 AND id <= $3 ORDER BY tenant_id DESC, experiment_id DESC, id DESC LIMIT $4",
    &[Type::UUID, Type::UUID, Type::UUID, Type::INT8],
);
