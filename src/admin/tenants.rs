use tokio_postgres::types::Type;

use super::Admin;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Actor, TenantId};
use crate::repo::{Cursor, Page, TENANT_COLUMNS, Tenant, check_email, rows_for};

/// The tenants of all, for their operator.
#[derive(Debug, Clone)]
pub struct AdminTenants<'a> {
    admin: &'a Admin,
    actor: Option<Actor>,
}

impl<'a> AdminTenants<'a> {
    pub(super) fn new(admin: &'a Admin) -> Self {
        AdminTenants { admin, actor: None }
    }

    /// Says who makes the changes, for the record (`updated_by`, and the [audit trail](crate::AuditTrail)).
    #[must_use]
    pub fn with_actor(mut self, actor: Actor) -> Self {
        self.actor = Some(actor);
        self
    }

    /// All tenants, by id; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let page = admin.tenants().list(100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list(self, limit: u32, after: Option<Cursor>) -> Result<Page<Tenant>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let sql = format!("SELECT {TENANT_COLUMNS} FROM {{s}}.tenants WHERE id >= $1 ORDER BY id LIMIT $2");
        let rows =
            self.admin.query(self.actor.as_ref(), &sql, &[(&after, Type::UUID), (&rows, Type::INT8)]).await?;
        let items = rows.iter().map(Tenant::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |t: &Tenant| t.id.uuid()))
    }

    /// The tenant of an e-mail address, in any case.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let acme = admin.tenants().by_email("ops@acme.example").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it is no address.
    pub async fn by_email(self, email: &str) -> Result<Option<Tenant>> {
        check_email(email)?;
        let sql = format!("SELECT {TENANT_COLUMNS} FROM {{s}}.tenants WHERE lower(email) = lower($1)");
        let rows = self.admin.query(self.actor.as_ref(), &sql, &[(&email, Type::TEXT)]).await?;
        rows.first().map(Tenant::from_row).transpose()
    }

    /// Changes the e-mail address of a tenant.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, id: lastprice::TenantId) -> lastprice::Result<()> {
    /// let acme = admin.tenants().set_email(id, "it@acme.example").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it is no address,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant,
    /// [`Conflict`](crate::ErrorKind::Conflict) if the address belongs to another one.
    pub async fn set_email(self, tenant: TenantId, email: &str) -> Result<Tenant> {
        check_email(email)?;
        let sql = format!("UPDATE {{s}}.tenants SET email = $2 WHERE id = $1 RETURNING {TENANT_COLUMNS}");
        let rows = self
            .admin
            .query(self.actor.as_ref(), &sql, &[(&tenant.uuid(), Type::UUID), (&email, Type::TEXT)])
            .await;
        let rows = rows.map_err(|e| match e.kind() {
            ErrorKind::Conflict => {
                Error::conflict("the e-mail address belongs to another tenant").with_source(e)
            }
            _ => e,
        })?;
        Tenant::from_row(rows.first().ok_or_else(|| Error::not_found("tenant"))?)
    }

    /// Deletes a tenant with everything it has: experiments, assignments, views, and its ledger. Returns whether
    /// there was one.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, id: lastprice::TenantId) -> lastprice::Result<()> {
    /// let was_there = admin.tenants().delete(id).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, the deletion goes on.
    pub async fn delete(self, tenant: TenantId) -> Result<bool> {
        let sql = "DELETE FROM {s}.tenants WHERE id = $1 RETURNING id";
        Ok(!self.admin.query(self.actor.as_ref(), sql, &[(&tenant.uuid(), Type::UUID)]).await?.is_empty())
    }
}
