use std::collections::HashSet;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::page::MAX_PAGE;
use super::row::{Fields, heap_of, rules};
use crate::error::{Error, Result};
use crate::id::{ExperimentId, UserId, ViewId};
use crate::scope::{Statement, TenantScope};

/// A user saw a price. The variant is the one that is stored for the user.
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId) -> lastprice::Result<()> {
/// let view = lastprice::NewView::new(experiment, lastprice::UserId::new("user-42")?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewView {
    id: ViewId,
    experiment_id: ExperimentId,
    user_id: UserId,
    occurred_at: DateTime<Utc>,
    metadata: Value,
}

impl NewView {
    /// A view that happens now.
    pub fn new(experiment: ExperimentId, user: UserId) -> Self {
        NewView {
            id: ViewId::new(),
            experiment_id: experiment,
            user_id: user,
            occurred_at: Utc::now(),
            metadata: Value::Object(Default::default()),
        }
    }

    /// The id of the view, under which it counts once. Default: a new one, made here, so that the same value can be
    /// recorded again after an unknown outcome.
    pub fn id(mut self, id: ViewId) -> Self {
        self.id = id;
        self
    }

    /// When it happened. Default: now.
    pub fn at(mut self, time: DateTime<Utc>) -> Self {
        self.occurred_at = time;
        self
    }

    /// A JSON object, at most 64 KiB. Default: `{}`.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    /// Checks what can be checked without the database.
    pub(crate) fn check(&self) -> Result<()> {
        rules::time("occurred_at", self.occurred_at)?;
        rules::object("metadata", &self.metadata)
    }

    pub(crate) fn user_id(&self) -> &UserId {
        &self.user_id
    }

    /// What it holds on the heap, about, in bytes.
    pub(crate) fn heap(&self) -> usize {
        self.user_id.as_str().len() + heap_of(&self.metadata)
    }
}

/// What became of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ViewOutcome {
    /// It was written, and counts.
    Recorded,
    /// One of this id is there already; nothing was written.
    Duplicate,
    /// The tenant has no such experiment, or nothing is stored for this user in it; nothing was written. Who sees
    /// the baseline from outside an experiment does not view a variant.
    NotAssigned,
}

/// Who saw a price.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Views<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Views<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Views { scope }
    }

    /// Records one view, once.
    ///
    /// One round trip, and a second one to tell a duplicate from a user without an assignment.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let view = lastprice::NewView::new(id, user);
    /// let outcome = tenant.views().record(&view).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the time or the metadata.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Recording the same value again counts once.
    pub async fn record(self, view: &NewView) -> Result<ViewOutcome> {
        let outcomes = self.record_many(std::slice::from_ref(view)).await?;
        outcomes.first().copied().ok_or_else(|| Error::internal("one view has no outcome"))
    }

    /// Records up to 1000 views in one statement; the outcomes are in the views' order.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, views: Vec<lastprice::NewView>) -> lastprice::Result<()> {
    /// let outcomes = tenant.views().record_many(&views).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than 1000 views, a time or metadata; then
    /// nothing is written.
    pub async fn record_many(self, views: &[NewView]) -> Result<Vec<ViewOutcome>> {
        if views.len() > MAX_PAGE as usize {
            return Err(Error::invalid("views", format_args!("are more than {MAX_PAGE}")));
        }
        views.iter().try_for_each(NewView::check)?;
        if views.is_empty() {
            return Ok(Vec::new());
        }
        let tenant = self.scope.tenant_id().uuid();
        let ids: Vec<Uuid> = views.iter().map(|v| v.id.uuid()).collect();
        let experiments: Vec<Uuid> = views.iter().map(|v| v.experiment_id.uuid()).collect();
        let users: Vec<&str> = views.iter().map(|v| v.user_id.as_str()).collect();
        let times: Vec<DateTime<Utc>> = views.iter().map(|v| v.occurred_at).collect();
        let metadata: Vec<&Value> = views.iter().map(|v| &v.metadata).collect();
        let written =
            self.scope.query(&INSERT, &[&tenant, &ids, &experiments, &users, &times, &metadata]).await?;
        // A view is one row or none, as its user has one assignment or none.
        if written.len() == views.len() {
            return Ok(vec![ViewOutcome::Recorded; views.len()]);
        }

        // Of views of one id in one call, the first whose user has an assignment was written.
        let mut ours = HashSet::new();
        for row in &written {
            let experiment: ExperimentId = row.id("experiment_id")?;
            ours.insert((row.id::<ViewId>("id")?, experiment, row.field::<&str>("user_id")?));
        }
        let mut there: HashSet<ViewId> = ours.iter().map(|(id, ..)| *id).collect();
        let others: Vec<Uuid> =
            ids.iter().copied().filter(|id| !there.contains(&ViewId::from(*id))).collect();
        if !others.is_empty() {
            let existing = self.scope.query(&EXISTING, &[&tenant, &others]).await;
            for row in &existing.map_err(|e| self.scope.after_writing(e))? {
                there.insert(row.id("id")?);
            }
        }
        Ok(views
            .iter()
            .map(|view| {
                if ours.remove(&(view.id, view.experiment_id, view.user_id.as_str())) {
                    ViewOutcome::Recorded
                } else if there.contains(&view.id) {
                    ViewOutcome::Duplicate
                } else {
                    ViewOutcome::NotAssigned
                }
            })
            .collect())
    }
}

pub(super) const STATEMENTS: &[&Statement] = &[&INSERT, &EXISTING];

// In the order of the ids: two batches with the same ones wait for each other in one order. Of one id's views the
// first in the call is written. LIMIT keeps it at one look-up per view: as a plain join, a plan that is made before anybody has
// analysed the tables compares each of the tenant's assignments with each view.
static INSERT: Statement = Statement::write(
    "views.record",
    "INSERT INTO {s}.views (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata)
     SELECT a.tenant_id, x.id, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, x.occurred_at, x.metadata
     FROM unnest($2, $3, $4, $5, $6) WITH ORDINALITY AS x (id, experiment_id, user_id, occurred_at, metadata, n)
     CROSS JOIN LATERAL (
       SELECT * FROM {s}.assignments a
       WHERE a.tenant_id = $1 AND a.experiment_id = x.experiment_id AND a.user_id = x.user_id LIMIT 1) a
     ORDER BY x.id, x.n
     ON CONFLICT DO NOTHING RETURNING id, experiment_id, user_id",
    &[
        Type::UUID,
        Type::UUID_ARRAY,
        Type::UUID_ARRAY,
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
        Type::JSONB_ARRAY,
    ],
);

static EXISTING: Statement = Statement::read(
    "views.existing",
    "SELECT id FROM {s}.views WHERE tenant_id = $1 AND id = ANY ($2)",
    &[Type::UUID, Type::UUID_ARRAY],
);
