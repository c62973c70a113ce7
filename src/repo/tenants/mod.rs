//! Tenants, and their secrets.

mod model;
mod sql;

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;

use super::row::Fields;
use crate::error::{Error, Result};
use crate::scope::TenantScope;
use crate::secrets::{KeyContext, unavailable};

pub(crate) use model::check_email;
pub use model::{NewTenant, PaidCredentials, Plan, Tenant, TenantChange, TenantMode};
pub(crate) use sql::COLUMNS;
pub(super) use sql::STATEMENTS;

/// The columns of secrets, which are part of what a secret is bound to.
pub(crate) const PAID_API_KEY: &str = "paid_api_key";
pub(crate) const WEBHOOK_SECRET: &str = "webhook_secret";

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
    /// scope's; [`SecretUnavailable`](crate::ErrorKind::SecretUnavailable) if a secret is to be stored and no key is configured;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Timeout`](crate::ErrorKind::Timeout) of the key provider, too;
    /// [`Conflict`](crate::ErrorKind::Conflict) if the e-mail address or the id is taken. That an address is
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
        let paid_api_key = self.seal(PAID_API_KEY, new.paid_api_key.as_ref()).await?;
        let webhook_secret = self.seal_list(new.webhook_secrets.as_deref()).await?;
        let row = self
            .scope
            .query_opt(
                &sql::CREATE,
                &[
                    &new.id.uuid(),
                    &new.name,
                    &new.email,
                    &new.mode.as_str(),
                    &new.plan.as_str(),
                    &paid_api_key,
                    &new.metadata,
                    &webhook_secret,
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
        let row = self.scope.query_opt(&sql::GET, &[&self.scope.tenant_id().uuid()]).await?;
        row.map(|row| Tenant::from_row(&row)).transpose()
    }

    /// The key that pays for this tenant: its own, or the platform's.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// use lastprice::PaidCredentials;
    ///
    /// let (PaidCredentials::Managed(key) | PaidCredentials::Byok(key)) = tenant.tenants().paid_credentials().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant;
    /// [`SecretUnavailable`](crate::ErrorKind::SecretUnavailable) if the platform has no key, no key of secrets is configured, or what is
    /// stored does not open by those that are; [`Unavailable`](crate::ErrorKind::Unavailable) or
    /// [`Timeout`](crate::ErrorKind::Timeout) of the key provider, too.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect, but for a transaction: see [`TenantScope`].
    pub async fn paid_credentials(self) -> Result<PaidCredentials> {
        let row = self.stored_secrets().await?;
        match TenantMode::stored(row.field("mode")?)? {
            TenantMode::Managed => {
                let key = self.scope.vault().paid_api_key.clone();
                let missing =
                    || unavailable("the platform's own key is missing: `ClientBuilder::paid_api_key`");
                Ok(PaidCredentials::Managed(key.ok_or_else(missing)?))
            }
            TenantMode::Byok => {
                let key = self.open(PAID_API_KEY, row.field("paid_api_key")?).await?;
                Ok(PaidCredentials::Byok(key.ok_or_else(|| unavailable("the tenant's own key is missing"))?))
            }
        }
    }

    /// What the tenant's webhooks are signed with, the newest first; empty if nothing is stored.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let secrets = tenant.tenants().webhook_secrets().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`paid_credentials`](Tenants::paid_credentials).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect, but for a transaction: see [`TenantScope`].
    pub async fn webhook_secrets(self) -> Result<Vec<SecretString>> {
        let row = self.stored_secrets().await?;
        let joined = self.open(WEBHOOK_SECRET, row.field("webhook_secret")?).await?;
        Ok(joined
            .map_or_else(Vec::new, |all| all.expose_secret().split('\n').map(SecretString::from).collect()))
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
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant,
    /// [`SecretUnavailable`](crate::ErrorKind::SecretUnavailable) if a secret is to be stored and no key is configured.
    /// Nothing is written then. [`Unavailable`](crate::ErrorKind::Unavailable) or [`Timeout`](crate::ErrorKind::Timeout) of the key
    /// provider, too.
    pub async fn update(self, change: TenantChange) -> Result<Tenant> {
        change.check()?;
        let paid_api_key = self.seal(PAID_API_KEY, change.paid_api_key.as_ref()).await?;
        let webhook_secret = self.seal_list(change.webhook_secrets.as_deref()).await?;
        let row = self
            .scope
            .query_opt(
                &sql::UPDATE,
                &[
                    &self.scope.tenant_id().uuid(),
                    &change.name,
                    &change.mode.map(TenantMode::as_str),
                    &change.plan.map(Plan::as_str),
                    &paid_api_key,
                    &change.metadata,
                    &change.holdout.map(|share| share.millionths() as i32),
                    &webhook_secret,
                ],
            )
            .await?;
        Tenant::from_row(&row.ok_or_else(|| Error::not_found("tenant"))?)
    }

    async fn stored_secrets(self) -> Result<Row> {
        let row = self.scope.query_opt(&sql::SECRETS, &[&self.scope.tenant_id().uuid()]).await?;
        row.ok_or_else(|| Error::not_found("tenant"))
    }

    async fn seal(self, column: &'static str, secret: Option<&SecretString>) -> Result<Option<String>> {
        let Some(secret) = secret else { return Ok(None) };
        let context = KeyContext::new(self.scope.tenant_id(), column);
        self.scope.vault().keys()?.seal(&context, secret).await.map(Some)
    }

    /// One text of all, which is what a change is made of; an empty one for none, which removes them.
    async fn seal_list(self, secrets: Option<&[SecretString]>) -> Result<Option<String>> {
        match secrets {
            Some([]) => Ok(Some(String::new())),
            Some(secrets) => {
                let texts: Vec<&str> = secrets.iter().map(ExposeSecret::expose_secret).collect();
                self.seal(WEBHOOK_SECRET, Some(&texts.join("\n").into())).await
            }
            None => Ok(None),
        }
    }

    async fn open(self, column: &'static str, stored: Option<String>) -> Result<Option<SecretString>> {
        let Some(stored) = stored.filter(|stored| !stored.is_empty()) else { return Ok(None) };
        let context = KeyContext::new(self.scope.tenant_id(), column);
        self.scope.vault().keys()?.open(&context, &stored).await.map(Some)
    }
}
