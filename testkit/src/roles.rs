//! The roles that tests run as. They belong to the whole server, so processes may be making them at the same time.

use crate::{
    error::{Context, Result},
    host::{Host, Passwords},
    janitor,
};
use tokio_postgres::Client;

/// Owns the test databases and installs the schema: a role that can create roles, but no superuser.
pub(crate) const OWNER: &str = "lastprice_owner";
/// What a service logs in as: an ordinary member of [`APP`].
pub(crate) const SERVICE: &str = "lastprice_service";
/// The group that the schema grants to.
const APP: &str = "lastprice_app";

/// Held while roles or a template are being made.
pub(crate) const ADVISORY_LOCK: i64 = 0x6c61_7374_7072;

/// Makes the roles that log in, and drops what dead processes have left behind.
pub(crate) async fn prepare(host: &Host, admin: &Client) -> Result<()> {
    let mut sql = format!("SELECT pg_advisory_xact_lock({ADVISORY_LOCK});");
    sql += &create(OWNER, "LOGIN NOSUPERUSER CREATEROLE");
    sql += &create(SERVICE, "LOGIN NOSUPERUSER");
    for role in [OWNER, SERVICE] {
        if let Some(word) = host.local.passwords.of(role) {
            sql += &format!("ALTER ROLE {role} PASSWORD '{word}';");
        }
    }
    if let Passwords::Same(word) = host.local.passwords {
        sql += &format!("ALTER ROLE CURRENT_USER PASSWORD '{word}';");
    }
    sql += GRANT_IF_THERE;
    admin.batch_execute(&sql).await.context(|| {
        format!("cannot make the roles {OWNER} and {SERVICE}: the server's role has to be one that may create roles")
    })?;
    janitor::sweep(admin, host.sweep).await
}

/// Makes the group before the schema does, so that it does not matter which database's owner came first; the owner
/// may pass it on, as if it had made it.
pub(crate) async fn prepare_app_role(admin: &Client) -> Result<()> {
    let mut sql = create(APP, "NOLOGIN");
    sql += &format!("GRANT {APP} TO {OWNER} WITH ADMIN OPTION;");
    sql += GRANT_IF_THERE;
    admin.batch_execute(&sql).await.context(|| format!("cannot make the role {APP} and grant it to {OWNER}"))
}

/// Two sessions that create the same role at once get one of these two errors, or the other.
fn create(role: &str, attributes: &str) -> String {
    format!(
        "DO $$ BEGIN
             IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '{role}') THEN
                 CREATE ROLE {role} {attributes};
             END IF;
         EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
         END $$;"
    )
}

/// A superuser need not be a member. Others make the databases of the owner only as a member of it; from PostgreSQL
/// 16 on, having created a role is not enough. And whoever has made the group, the service belongs to it.
const GRANT_IF_THERE: &str = "DO $$ BEGIN
    IF NOT pg_catalog.pg_has_role(current_user, 'lastprice_owner', 'USAGE') THEN
        EXECUTE format('GRANT lastprice_owner TO %I', current_user);
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'lastprice_app')
       AND NOT pg_catalog.pg_has_role('lastprice_service', 'lastprice_app', 'MEMBER') THEN
        GRANT lastprice_app TO lastprice_service;
    END IF;
END $$;";
