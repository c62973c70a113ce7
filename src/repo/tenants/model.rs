//! A tenant, and what to make or change of one.

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio_postgres::Row;

use crate::bucketing::Share;
use crate::error::{Error, Result};
use crate::id::TenantId;
use crate::repo::row::{Fields, rules, text_enum};

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

/// A tenant, as stored. Its secrets are not in it: see [`Tenants::paid_credentials`](crate::Tenants::paid_credentials)
/// and [`Tenants::webhook_secrets`](crate::Tenants::webhook_secrets).
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
/// let own_key = NewTenant::byok("Globex", "it@globex.example", "pk-4711").webhook_secrets(["whsec-1".into()]);
/// assert!(!format!("{own_key:?}").contains("4711"));
/// ```
#[derive(Clone)]
#[must_use]
pub struct NewTenant {
    /// Its id; a new one unless [`NewTenant::id`] said otherwise.
    pub(crate) id: TenantId,
    pub(super) name: String,
    pub(super) email: String,
    pub(super) mode: TenantMode,
    pub(super) plan: Plan,
    pub(super) paid_api_key: Option<SecretString>,
    pub(super) webhook_secrets: Option<Vec<SecretString>>,
    pub(super) metadata: Value,
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
            webhook_secrets: None,
            metadata: Value::Object(Default::default()),
        }
    }

    /// A tenant that brings its own key, of 1 to 8192 bytes. It is encrypted before it is stored: see
    /// [`ClientBuilder::keys`](crate::ClientBuilder::keys).
    pub fn byok(
        name: impl Into<String>,
        email: impl Into<String>,
        paid_api_key: impl Into<SecretString>,
    ) -> Self {
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

    /// What its webhooks are signed with, the newest first: 1 to 8 secrets, each of 1 to 1024 bytes without a line feed. They are
    /// encrypted before they are stored.
    pub fn webhook_secrets(mut self, newest_first: impl IntoIterator<Item = SecretString>) -> Self {
        self.webhook_secrets = Some(newest_first.into_iter().collect());
        self
    }

    /// A JSON object, at most 64 KiB. Default: `{}`.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        rules::name("name", &self.name)?;
        check_email(&self.email)?;
        if let Some(key) = &self.paid_api_key {
            check_key(key)?;
        }
        // A new tenant has none to remove: an empty list is one that was forgotten.
        if let Some(secrets) = &self.webhook_secrets {
            check_webhook_secrets(secrets, 1)?;
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
    pub(super) name: Option<String>,
    pub(super) mode: Option<TenantMode>,
    pub(super) plan: Option<Plan>,
    pub(super) holdout: Option<Share>,
    pub(super) paid_api_key: Option<SecretString>,
    pub(super) webhook_secrets: Option<Vec<SecretString>>,
    pub(super) metadata: Option<Value>,
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

    /// From now on with the tenant's own key, of 1 to 8192 bytes. It is encrypted before it is stored.
    pub fn byok(mut self, paid_api_key: impl Into<SecretString>) -> Self {
        (self.mode, self.paid_api_key) = (Some(TenantMode::Byok), Some(paid_api_key.into()));
        self
    }

    /// Other secrets of its webhooks, in place of the stored ones: see [`NewTenant::webhook_secrets`]. None at all removes them.
    pub fn webhook_secrets(mut self, newest_first: impl IntoIterator<Item = SecretString>) -> Self {
        self.webhook_secrets = Some(newest_first.into_iter().collect());
        self
    }

    /// Another JSON object, in place of the stored one.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = Some(metadata);
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        self.name.as_deref().map_or(Ok(()), |name| rules::name("name", name))?;
        self.paid_api_key.as_ref().map_or(Ok(()), check_key)?;
        self.webhook_secrets.as_ref().map_or(Ok(()), |secrets| check_webhook_secrets(secrets, 0))?;
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

fn check_key(key: &SecretString) -> Result<()> {
    let key = key.expose_secret();
    if key.is_empty() || key.len() > 8192 || key.contains('\0') {
        return Err(Error::invalid("paid_api_key", "is not a text of 1 to 8192 bytes"));
    }
    Ok(())
}

fn check_webhook_secrets(secrets: &[SecretString], at_least: usize) -> Result<()> {
    if secrets.len() < at_least || secrets.len() > 8 {
        return Err(Error::invalid("webhook_secrets", format_args!("are not {at_least} to 8")));
    }
    let right = |secret: &SecretString| {
        let secret = secret.expose_secret();
        (1..=1024).contains(&secret.len()) && !secret.contains(['\n', '\r', '\0'])
    };
    if secrets.iter().all(right) {
        return Ok(());
    }
    Err(Error::invalid("webhook_secrets", "are not each 1 to 1024 bytes without a line feed and NUL"))
}

/// Whose key pays, and the key. Its `Debug` output does not show it.
#[derive(Debug, Clone)]
pub enum PaidCredentials {
    /// The platform's: [`ClientBuilder::paid_api_key`](crate::ClientBuilder::paid_api_key).
    Managed(SecretString),
    /// The tenant's own.
    Byok(SecretString),
}
