//! Is one tenant kept from another's rows, in this database and for this login? Reads the catalog, and changes nothing.

mod code;
mod hazard;
mod pooler;
mod report;
mod rights;
mod roles;
mod tables;

use deadpool_postgres::Object;
use postgres_protocol::escape::escape_literal;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

pub use hazard::Hazard;
pub use report::{IsolationFinding, IsolationReport};

use crate::error::{Error, ErrorKind, Result};
use crate::scope::{SCHEMA_VERSION, Session, tenant_tables};

/// Everything that is found, by a connection of its own that is closed afterwards: the client may refuse this login, and the
/// audit is there to say why.
pub(crate) async fn verify(session: &Session) -> Result<IsolationReport> {
    session
        .in_time(5, async {
            let connection = Object::take(session.unexamined().await?);
            let schema = session.catalog.schema();
            let mut findings = read_catalog(&connection, schema).await?;
            findings.extend(pooler::probe(&connection).await?);
            Ok(IsolationReport::new(schema, findings))
        })
        .await
}

/// All questions in one message, which even a pooler that knows no transactions leaves in one piece.
async fn read_catalog(connection: &Client, schema: &str) -> Result<Vec<IsolationFinding>> {
    let failed = |e| Error::from_driver(e, false);
    let home = escape_literal(schema);
    let questions = [roles::QUESTIONS, tables::QUESTIONS, rights::QUESTIONS, code::QUESTIONS].concat();
    // With nothing but the system's own names in the path, the catalog's texts say of every other one where it is from.
    let mut message =
        "BEGIN READ ONLY; SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL jit = off;".to_owned();
    message.push_str(&VERSION.replace("{home}", &home));
    for question in questions {
        message
            .push_str(&format!("; {}{question}", CONTEXT.replace("{home}", &home)).replace("{home}", &home));
    }
    message.push_str("; COMMIT");

    let answers = connection.simple_query(&message).await.map_err(failed)?;
    let mut rows = answers.into_iter().filter_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    check_version(rows.next().as_ref(), schema)?;
    rows.map(|row| finding(&row, schema)).collect()
}

/// From the catalog and not by calling it, since a stranger may lack the right.
fn check_version(row: Option<&SimpleQueryRow>, schema: &str) -> Result<()> {
    let found =
        row.and_then(|row| row.get(0)).and_then(|source| source.rsplit(' ').next()?.parse::<i32>().ok());
    match found {
        Some(version) if (SCHEMA_VERSION..=SCHEMA_VERSION + 1).contains(&version) => Ok(()),
        Some(version) => Err(Error::new(
            ErrorKind::SchemaMismatch,
            format!(
                "schema {schema} has version {version}, which this release of the crate does not work with"
            ),
        )),
        None => Err(Error::new(
            ErrorKind::SchemaMismatch,
            format!(
                "schema {schema} of this database does not hold lastprice: install it with `psql -f schema.sql` or \
                 `Admin::migrate`, or name the schema that holds it"
            ),
        )),
    }
}

fn finding(row: &SimpleQueryRow, schema: &str) -> Result<IsolationFinding> {
    let column = |i| row.try_get(i).ok().flatten().ok_or_else(|| Error::internal("a finding has no text"));
    let hazard = Hazard::from_name(column(0)?).ok_or_else(|| Error::internal("a finding has no name"))?;
    let mut fix = column(2)?.to_owned();
    // What is long to write down is taken from the schema itself: `@CREATE VIEW x` stands for that statement of it.
    if let Some((before, start)) = fix.split_once('@') {
        let statement = crate::SCHEMA_SQL
            .split_once(start)
            .and_then(|(_, rest)| rest.split_once(";\n"))
            .ok_or_else(|| Error::internal("a statement is not in the schema"))?;
        let create = start.replacen("CREATE VIEW", "CREATE OR REPLACE VIEW", 1);
        fix = format!("BEGIN; SET LOCAL search_path = {schema}; {before}{create}{}; COMMIT", statement.0);
    }
    Ok(IsolationFinding::new(hazard, column(1)?.to_owned(), fix))
}

/// The source of the function is `SELECT 1`. One row in any case, so that it is the first.
const VERSION: &str = "
    SELECT max(p.prosrc) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE quote_ident(n.nspname) IN ({home}, trim('\"' FROM {home})) AND p.proname = 'lastprice_schema_version'";

/// What all questions are about. `subject`: the login and the group role. `reach`: every role whose rights they have or may
/// take on, and 0 for PUBLIC; who bypasses isolation anyway is reported as that, and not by each of its rights.
/// `tenant_table`: our own, and the host's in the same schema with a `tenant_id` as ours that any of these may use.
const CONTEXT: &str = concat!(
    r#"
WITH RECURSIVE home AS (
  SELECT n.oid, quote_ident(n.nspname) AS name FROM pg_namespace n
  WHERE quote_ident(n.nspname) IN ({home}, trim('"' FROM {home}))
), known (relname) AS (
  SELECT unnest("#,
    tenant_tables!(),
    r#")
), ours AS (
  SELECT c.* FROM pg_class c JOIN home ON home.oid = c.relnamespace
  WHERE c.relname IN (SELECT relname FROM known)
     OR c.relname IN ('experiment_metrics', 'tenant_experiment_metrics', 'tenant_variant_metrics', 'tenant_usage', 'plan_limits')
), owner AS (
  SELECT DISTINCT c.relowner AS oid FROM ours c JOIN home ON true WHERE c.relname = 'tenants'
), subject AS (
  SELECT r.*, r.rolname = 'lastprice_app' AS is_app FROM pg_roles r
  WHERE r.rolname IN ('lastprice_app', session_user, current_user)
), bound AS (
  SELECT s.* FROM subject s WHERE NOT s.rolsuper AND s.oid NOT IN (SELECT oid FROM owner)
), privileged AS (
  SELECT oid FROM pg_roles WHERE rolsuper OR rolbypassrls UNION SELECT oid FROM owner
), reach AS (
  SELECT 0::oid AS oid, 'PUBLIC' AS name
  UNION SELECT r.oid, quote_ident(r.rolname) FROM pg_roles r JOIN bound s ON pg_has_role(s.oid, r.oid, 'MEMBER')
  WHERE NOT r.rolsuper AND r.oid NOT IN (SELECT oid FROM owner)
), child AS (
  SELECT i.inhrelid AS oid FROM pg_inherits i JOIN ours o ON o.oid = i.inhparent
  UNION SELECT i.inhrelid FROM pg_inherits i JOIN child ON child.oid = i.inhparent
), granted AS (
  SELECT c.oid, c.relname, c.relkind, NULL::name AS col, a.grantee, a.privilege_type AS priv, a.is_grantable, reach.name AS to_whom
  FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN reach ON reach.oid = a.grantee
  WHERE a.grantee <> c.relowner
  UNION ALL
  SELECT c.oid, c.relname, c.relkind, t.attname, a.grantee, a.privilege_type, a.is_grantable, reach.name
  FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid AND NOT t.attisdropped
  CROSS JOIN LATERAL aclexplode(t.attacl) a JOIN reach ON reach.oid = a.grantee
  WHERE a.grantee <> c.relowner
), tenant_table AS (
  SELECT c.oid, c.oid::regclass::text AS name, c.relname, c.relrowsecurity, home.name AS home,
         c.relname IN (SELECT relname FROM known) AS is_ours,
         CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END AS col
  FROM pg_class c JOIN home ON home.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p') AND c.oid NOT IN (SELECT oid FROM child)
    AND (c.relname IN (SELECT relname FROM known)
         OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND a.atttypid = 'uuid'::regtype
                     AND NOT a.attisdropped)
            AND EXISTS (SELECT FROM granted g WHERE g.oid = c.oid))
)"#
);
