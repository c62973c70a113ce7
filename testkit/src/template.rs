//! Template databases: what a test database starts with is installed once per server, and then copied.

use crate::{
    error::{Context, Error, Result},
    host::{Host, connect, fnv1a},
    roles::{self, ADVISORY_LOCK, OWNER},
};
use std::time::{Duration, Instant};
use tokio_postgres::{Client, error::SqlState};

/// What a test database starts with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Contents {
    /// Without the schema of `lastprice`.
    pub(crate) empty: bool,
    /// Statements that come after it.
    pub(crate) setup_sql: String,
}

impl Contents {
    fn schema(&self) -> &'static str {
        if self.empty { "" } else { lastprice::SCHEMA_SQL }
    }

    fn template(&self) -> String {
        let kind = if self.empty { "empty" } else { "full" };
        format!("lastprice_template_{:016x}", fnv1a(&["v2", kind, self.schema(), &self.setup_sql]))
    }
}

/// Returns the name of the template with these contents, after making it if this server does not have it yet.
pub(crate) async fn ensure(host: &Host, admin: &Client, contents: &Contents) -> Result<String> {
    let name = contents.template();
    if !is_finished(admin, &name).await? {
        let lock = format!("SELECT pg_advisory_lock({ADVISORY_LOCK})");
        admin.batch_execute(&lock).await.context(|| "cannot lock the making of templates".to_owned())?;
        // From here on an error, or nobody waiting for us any more, ends the session and with it the lock.
        if !is_finished(admin, &name).await? {
            drop_old(admin).await;
            build(host, admin, contents, &name).await?;
        }
        let unlock = format!("SELECT pg_advisory_unlock({ADVISORY_LOCK})");
        admin.batch_execute(&unlock).await.context(|| "cannot unlock the making of templates".to_owned())?;
    }
    Ok(name)
}

/// A template is finished once it is closed to connections: whoever was killed before that has left half of one.
async fn is_finished(admin: &Client, name: &str) -> Result<bool> {
    let sql = "SELECT FROM pg_database WHERE datname = $1 AND datistemplate AND NOT datallowconn";
    let row = admin
        .query_opt(sql, &[&name])
        .await
        .context(|| "cannot look for the template database".to_owned())?;
    Ok(row.is_some())
}

async fn build(host: &Host, admin: &Client, contents: &Contents, name: &str) -> Result<()> {
    let run = async |sql: String| {
        let done = admin.batch_execute(&sql).await;
        done.context(|| format!("cannot make the template database {name}"))
    };
    if !contents.empty {
        roles::prepare_app_role(admin).await?;
    }
    run(format!("DROP DATABASE IF EXISTS {name}")).await?;
    run(format!("CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0")).await?;
    {
        let superuser = connect(&host.local.url(&host.superuser, name)).await?;
        let prepared = superuser.batch_execute(PREPARE).await;
        prepared.context(|| "cannot prepare the template database".to_owned())?;
        let owner = connect(&host.local.url(OWNER, name)).await?;
        let installed = owner.batch_execute(contents.schema()).await;
        installed.context(|| "the schema of lastprice does not install".to_owned())?;
        let set_up = owner.batch_execute(&contents.setup_sql).await;
        set_up.context(|| "the setup_sql of the test database fails".to_owned())?;
    }
    until_nobody_is_in(admin, name).await?;
    let made = "lastprice-testkit ";
    run(format!(
        "DO $$ BEGIN
             EXECUTE format('COMMENT ON DATABASE {name} IS %L', '{made}' || now());
         END $$"
    ))
    .await?;
    run(format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false IS_TEMPLATE true")).await
}

/// Done by the superuser before the owner installs anything. From PostgreSQL 15 on, `public` belongs to the database's
/// owner anyway, and nobody else may create in it; before, only a superuser can give it away. And PostgreSQL 12 has
/// `gen_random_uuid()` in an extension that only a superuser can install.
const PREPARE: &str = "DO $$ BEGIN
    ALTER SCHEMA public OWNER TO lastprice_owner;
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    IF current_setting('server_version_num')::int < 130000 THEN
        CREATE EXTENSION IF NOT EXISTS pgcrypto;
    END IF;
EXCEPTION WHEN insufficient_privilege OR undefined_file OR feature_not_supported THEN NULL;
END $$";

/// A database can be copied only while nobody is connected to it, and a session outlives its client for a moment.
async fn until_nobody_is_in(admin: &Client, name: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
        let rows =
            admin.query(sql, &[&name]).await.context(|| "cannot look at pg_stat_activity".to_owned())?;
        if rows.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(Error::new(format!("a session stays in the template database {name}")));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// On a server that stays, templates of schemas that have changed since would pile up. Best effort.
async fn drop_old(admin: &Client) {
    let Ok(rows) = admin.query(OLD, &[]).await else { return };
    for row in rows {
        let name: &str = row.get(0);
        let _ = admin.batch_execute(&format!("ALTER DATABASE {name} WITH IS_TEMPLATE false")).await;
        let _ = admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name}")).await;
    }
}

const OLD: &str = "SELECT datname::text FROM pg_database d
     WHERE datname ~ '^lastprice_template_[0-9a-f]{16}$' AND datistemplate AND NOT datallowconn
       AND shobj_description(d.oid, 'pg_database') ~ '^lastprice-testkit \\d{4}-'
       AND substr(shobj_description(d.oid, 'pg_database'), 19)::timestamptz < now() - interval '7 days'";

/// Copies a template. `false` means that there is a database of this name already.
pub(crate) async fn copy(admin: &Client, template: &str, name: &str) -> Result<bool> {
    let row = admin.query_one("SELECT current_setting('server_version_num')::int", &[]).await;
    let version: i32 = row.context(|| "cannot ask the server for its version".to_owned())?.get(0);
    // The other strategy, which is the default, writes every page to the log.
    let strategy = if version >= 150_000 { " STRATEGY file_copy" } else { "" };
    let sql = format!("CREATE DATABASE {name} OWNER {OWNER} TEMPLATE {template}{strategy}");
    let mut tries = 1;
    loop {
        match admin.batch_execute(&sql).await {
            Ok(()) => return Ok(true),
            Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => return Ok(false),
            // Somebody, such as a monitor, is looking at all databases of a server that is not ours.
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && tries < 20 => {}
            Err(error) => return Err(error).context(|| format!("cannot create the test database {name}")),
        }
        tries += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
