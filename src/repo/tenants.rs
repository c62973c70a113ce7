use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::row::{Fields, rules, text_enum};
use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::id::TenantId;
use crate::scope::{Statement, TenantScope};

text_enum! {
    /// Whose Paid.ai key a tenant uses.
    TenantMode, "mode" {
        /// The platform's.
        Managed = "managed",
        /// The tenant's own: bring your own key.
        Byok = "byok",
    }
}

text_enum! {
    /// What a tenant has subscribed to.
    Plan, "plan" {
        /// The default.
        Free = "free",
        /// The first paid plan.
        Starter = "starter",
        /// For growing businesses.
        Pro = "pro",
        /// By contract.
        Enterprise = "enterprise",
    }
}

/// A tenant, as stored. Its keys are not in it: see [`Tenants::paid_api_key`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Tenant {
    /// Its id.
    pub id: TenantId,
    /// Its name.
    pub name: String,
    /// Its e-mail address, unique in the installation in any case.
    pub email: String,
    /// Whose key it uses.
    pub mode: TenantMode,
    /// Its plan.
    pub plan: Plan,
    /// The share of all users (and, apart from it, of all accounts) who are in no experiment.
    pub holdout: Share,
    /// Decides, with a user's id, who is held out, and in which part of a layer. Random, never changes.
    pub salt: String,
    /// Whatever the host keeps with it: a JSON object.
    pub metadata: Value,
    /// When it was created.
    pub created_at: DateTime<Utc>,
    /// When it was changed last.
    pub updated_at: DateTime<Utc>,
    /// Who changed it last, if they said so.
    pub updated_by: Option<String>,
}

impl Tenant {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        Ok(Tenant {
            id: row.id("id")?,
            name: row.field("name")?,
            email: row.field("email")?,
            mode: TenantMode::stored(row.field("mode")?)?,
            plan: Plan::stored(row.field("plan")?)?,
            holdout: row.share("holdout")?,
            salt: row.field("salt")?,
            metadata: row.field("metadata")?,
            created_at: row.field("created_at")?,
            updated_at: row.field("updated_at")?,
            updated_by: row.field("updated_by")?,
        })
    }
}

/// A tenant to create.
///
/// ```
/// use lastprice::{NewTenant, Plan};
///
/// let managed = NewTenant::managed("Acme", "ops@acme.example").plan(Plan::Pro);
/// let own_key = NewTenant::byok("Globex", "it@globex.example", "the key, encrypted");
/// assert!(!format!("{own_key:?}").contains("encrypted"));
/// ```
#[derive(Clone)]
#[must_use]
pub struct NewTenant {
    /// Its id; a new one unless [`NewTenant::id`] said otherwise.
    pub(crate) id: TenantId,
    name: String,
    email: String,
    mode: TenantMode,
    plan: Plan,
    paid_api_key: Option<String>,
    metadata: Value,
}

impl NewTenant {
    /// A tenant that uses the platform's key.
    pub fn managed(name: impl Into<String>, email: impl Into<String>) -> Self {
        NewTenant {
            id: TenantId::new(),
            name: name.into(),
            email: email.into(),
            mode: TenantMode::Managed,
            plan: Plan::Free,
            paid_api_key: None,
            metadata: Value::Object(Default::default()),
        }
    }

    /// A tenant that brings its own key. The key is stored as it is given: encrypt it first.
    pub fn byok(name: impl Into<String>, email: impl Into<String>, paid_api_key: impl Into<String>) -> Self {
        NewTenant {
            mode: TenantMode::Byok,
            paid_api_key: Some(paid_api_key.into()),
            ..NewTenant::managed(name, email)
        }
    }

    /// Takes the id that the host knows the tenant by.
    pub fn id(mut self, id: TenantId) -> Self {
        self.id = id;
        self
    }

    /// Default: [`Plan::Free`].
    pub fn plan(mut self, plan: Plan) -> Self {
        self.plan = plan;
        self
    }

    /// A JSON object, at most 64 KiB. Default: `{}`.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    fn check(&self) -> Result<()> {
        rules::name("name", &self.name)?;
        check_email(&self.email)?;
        if let Some(key) = &self.paid_api_key {
            check_key(key)?;
        }
        rules::object("metadata", &self.metadata)
    }
}

impl std::fmt::Debug for NewTenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewTenant")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// What to change of a tenant; what is not set stays. Its e-mail address is changed by
/// [`AdminTenants::set_email`](crate::AdminTenants::set_email).
///
/// ```
/// let change = lastprice::TenantChange::new().plan(lastprice::Plan::Pro).managed();
/// ```
#[derive(Clone, Default)]
#[must_use]
pub struct TenantChange {
    name: Option<String>,
    mode: Option<TenantMode>,
    plan: Option<Plan>,
    holdout: Option<Share>,
    paid_api_key: Option<String>,
    metadata: Option<Value>,
}

impl TenantChange {
    /// Changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Another plan.
    pub fn plan(mut self, plan: Plan) -> Self {
        self.plan = Some(plan);
        self
    }

    /// The share of all users who are in no experiment, so that all experiments together can be compared with none.
    /// Who has a quote keeps it. In experiments by account it is a share of accounts, which is another draw.
    pub fn holdout(mut self, share: Share) -> Self {
        self.holdout = Some(share);
        self
    }

    /// From now on with the platform's key; the tenant's own is removed.
    pub fn managed(mut self) -> Self {
        (self.mode, self.paid_api_key) = (Some(TenantMode::Managed), None);
        self
    }

    /// From now on with the tenant's own key, stored as it is given: encrypt it first.
    pub fn byok(mut self, paid_api_key: impl Into<String>) -> Self {
        (self.mode, self.paid_api_key) = (Some(TenantMode::Byok), Some(paid_api_key.into()));
        self
    }

    /// Another JSON object, in place of the stored one.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = Some(metadata);
        self
    }

    fn check(&self) -> Result<()> {
        self.name.as_deref().map_or(Ok(()), |name| rules::name("name", name))?;
        self.paid_api_key.as_deref().map_or(Ok(()), check_key)?;
        self.metadata.as_ref().map_or(Ok(()), |m| rules::object("metadata", m))
    }
}

impl std::fmt::Debug for TenantChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TenantChange")
            .field("mode", &self.mode)
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_email(email: &str) -> Result<()> {
    let mut parts = email.split('@');
    let sides = [parts.next(), parts.next()];
    let looks_right = sides.iter().all(|s| s.is_some_and(|s| !s.is_empty()))
        && parts.next().is_none()
        && !email.contains(|c: char| c.is_whitespace() || c == '\0')
        && email.chars().count() <= 320;
    if looks_right { Ok(()) } else { Err(Error::invalid("email", "is not an e-mail address")) }
}

fn check_key(key: &str) -> Result<()> {
    if key.is_empty() || key.len() > 8192 || key.contains('\0') {
        return Err(Error::invalid("paid_api_key", "is not a text of 1 to 8192 bytes"));
    }
    Ok(())
}

/// The bound tenant itself. See [`Client::create_tenant`](crate::Client::create_tenant) for the short way to a new one.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Tenants<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Tenants<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Tenants { scope }
    }

    /// Creates the tenant that the scope is bound to.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let id = tenant.tenant_id();
    /// let new = lastprice::NewTenant::managed("Acme", "ops@acme.example").id(id);
    /// let acme = tenant.tenants().create(new).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a field that breaks a rule, or an id that is not the
    /// scope's; [`Conflict`](crate::ErrorKind::Conflict) if the e-mail address or the id is taken. That an address is
    /// taken is the one thing that tenants can learn of each other.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Repeating the call reports a conflict if the tenant was created.
    pub async fn create(self, new: NewTenant) -> Result<Tenant> {
        new.check()?;
        if new.id != self.scope.tenant_id() {
            return Err(Error::invalid("id", "is not that of the scope's tenant"));
        }
        let row = self
            .scope
            .query_opt(
                &CREATE,
                &[
                    &new.id.uuid(),
                    &new.name,
                    &new.email,
                    &new.mode.as_str(),
                    &new.plan.as_str(),
                    &new.paid_api_key,
                    &new.metadata,
                ],
            )
            .await?;
        let row =
            row.ok_or_else(|| Error::conflict("the e-mail address or the id belongs to a tenant already"))?;
        Tenant::from_row(&row)
    }

    /// The tenant, if it exists.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let plan = tenant.tenants().get().await?.map(|tenant| tenant.plan);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn get(self) -> Result<Option<Tenant>> {
        let row = self.scope.query_opt(&GET, &[&self.scope.tenant_id().uuid()]).await?;
        row.map(|row| Tenant::from_row(&row)).transpose()
    }

    /// The tenant's own Paid.ai key, as it was stored; `None` for a managed tenant.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let encrypted = tenant.tenants().paid_api_key().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn paid_api_key(self) -> Result<Option<String>> {
        let row = self.scope.query_opt(&PAID_API_KEY, &[&self.scope.tenant_id().uuid()]).await?;
        row.ok_or_else(|| Error::not_found("tenant"))?.field("paid_api_key")
    }

    /// Changes the tenant.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let change = lastprice::TenantChange::new().plan(lastprice::Plan::Pro);
    /// let acme = tenant.tenants().update(change).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a field that breaks a rule,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn update(self, change: TenantChange) -> Result<Tenant> {
        change.check()?;
        let row = self
            .scope
            .query_opt(
                &UPDATE,
                &[
                    &self.scope.tenant_id().uuid(),
                    &change.name,
                    &change.mode.map(TenantMode::as_str),
                    &change.plan.map(Plan::as_str),
                    &change.paid_api_key,
                    &change.metadata,
                    &change.holdout.map(|share| share.millionths() as i32),
                ],
            )
            .await?;
        Tenant::from_row(&row.ok_or_else(|| Error::not_found("tenant"))?)
    }
}

macro_rules! columns {
    () => {
        "id, name, email, mode, plan, holdout, salt, metadata, created_at, updated_at, updated_by"
    };
}
pub(crate) const COLUMNS: &str = columns!();

pub(super) const STATEMENTS: &[&Statement] = &[&CREATE, &GET, &PAID_API_KEY, &UPDATE];

static CREATE: Statement = Statement::write(
    "tenants.create",
    concat!(
        "INSERT INTO {s}.tenants (id, name, email, mode, plan, paid_api_key, metadata)
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::JSONB],
);

static GET: Statement = Statement::read(
    "tenants.get",
    concat!("SELECT ", columns!(), " FROM {s}.tenants WHERE id = $1"),
    &[Type::UUID],
);

static PAID_API_KEY: Statement = Statement::read(
    "tenants.paid_api_key",
    "SELECT paid_api_key FROM {s}.tenants WHERE id = $1",
    &[Type::UUID],
);

static UPDATE: Statement = Statement::write(
    "tenants.update",
    concat!(
        "UPDATE {s}.tenants SET
           name = COALESCE($2, name), mode = COALESCE($3, mode), plan = COALESCE($4, plan),
           paid_api_key = CASE WHEN $3 = 'managed' THEN NULL ELSE COALESCE($5, paid_api_key) END,
           metadata = COALESCE($6, metadata), holdout = COALESCE($7, holdout)
         WHERE id = $1 RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::JSONB, Type::INT4],
);
