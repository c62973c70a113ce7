//! What the login, its groups and PUBLIC were granted beyond what the schema gives.

pub(super) const QUESTIONS: &[&str] = &[RELATIONS, HOST_TABLES, SEQUENCES, SCHEMA, DEFAULT_PRIVILEGES];

/// A REVOKE from a table takes the rights on its columns along: what the schema gives is granted again.
const RELATIONS: &str = "
, meant (relname, priv, col) AS (
  SELECT r, p, NULL::text FROM (VALUES
    ('tenants', '{SELECT,INSERT}'), ('experiments', '{SELECT,INSERT,UPDATE,DELETE}'),
    ('assignments', '{SELECT,INSERT}'), ('views', '{SELECT,INSERT}'), ('conversions', '{SELECT,INSERT}'),
    ('usage', '{SELECT}'), ('usage_totals', '{SELECT}'), ('tenant_limits', '{SELECT}'), ('plan_limits', '{SELECT}'), ('tenant_usage', '{SELECT}'),
    ('waiting_conversions', '{SELECT,INSERT}'), ('recommendations', '{SELECT}'), ('webhook_events', '{SELECT}'),
    ('ledger_locks', '{SELECT,INSERT,DELETE}'), ('audit_trail', '{SELECT}'), ('metric_totals', '{SELECT}'), ('metric_deltas', '{SELECT}'),
    ('archived_experiments', '{SELECT}'), ('identities', '{SELECT}'), ('erasures', '{SELECT}'),
    ('tenant_experiment_metrics', '{SELECT}'), ('tenant_variant_metrics', '{SELECT}')) x (r, ps), unnest(x.ps::text[]) p
  UNION ALL SELECT 'assignments', 'UPDATE', 'valid_until'
  UNION ALL SELECT 'tenants', 'UPDATE', unnest('{name,email,mode,plan,paid_api_key,webhook_secret,holdout,metadata}'::text[])
  UNION ALL SELECT 'usage', 'INSERT', unnest('{tenant_id,metric,day,value,idempotency_key,created_at}'::text[])
  UNION ALL SELECT 'recommendations', 'INSERT', unnest('{tenant_id,id,experiment_id,price,currency,expected_revenue,confidence,objective,simulation,source,model_version,inputs_hash,expires_at,created_at}'::text[])
  UNION ALL SELECT 'recommendations', 'UPDATE', unnest('{status,rejection_reason,follow_up_id,observed_revenue}'::text[])
  UNION ALL SELECT 'webhook_events', 'INSERT', unnest('{tenant_id,id,seq,type,body,body_hash,received_at}'::text[])
  UNION ALL SELECT 'webhook_events', 'UPDATE', unnest('{status,attempts,what,idempotency_key,processed_at}'::text[])
), again AS (
  SELECT relname, priv, string_agg(col, ', ') AS cols FROM meant WHERE col IS NOT NULL GROUP BY 1, 2
), excess AS (
  SELECT g.*, g.priv || COALESCE(' (' || quote_ident(g.col) || ')', '') AS what,
         EXISTS (SELECT FROM meant m WHERE m.relname = g.relname AND m.priv = g.priv AND (m.col IS NULL OR m.col = g.col)) AS is_meant
  FROM granted g WHERE g.oid IN (SELECT oid FROM ours)
)
SELECT CASE WHEN e.grantee = 0 THEN 'granted_to_public'
            WHEN e.relname = 'experiment_metrics' THEN 'materialized_view_granted'
            WHEN e.priv IN ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN') THEN 'table_right_of_owner'
            WHEN e.is_meant THEN 'granted_in_excess'
            WHEN e.relname IN ('metric_totals', 'metric_deltas', 'metric_baselines', 'archived_experiments', 'usage_totals') AND e.priv <> 'SELECT' THEN 'metric_tables_writable'
            WHEN e.relname IN ('conversions', 'waiting_conversions', 'webhook_events', 'views', 'usage', 'assignments', 'identities', 'erasures') THEN 'ledger_writable'
            ELSE 'granted_in_excess' END,
       format('%s on %s to %s', e.what, e.oid::regclass, e.to_whom),
       CASE WHEN e.is_meant AND e.grantee <> 0 THEN format('REVOKE GRANT OPTION FOR %s ON %s FROM %s CASCADE', e.what, e.oid::regclass, e.to_whom)
            ELSE format('REVOKE %s ON %s FROM %s CASCADE', e.what, e.oid::regclass, e.to_whom)
                 || COALESCE((SELECT format('; GRANT %s (%s) ON %s TO lastprice_app', e.priv, a.cols, e.oid::regclass) FROM again a
                              WHERE a.relname = e.relname AND a.priv = e.priv AND e.col IS NULL AND e.to_whom = 'lastprice_app'), '') END
FROM excess e WHERE e.grantee = 0 OR NOT e.is_meant OR e.is_grantable ORDER BY 1, 2";

/// What row-level security does not bind. All else about the host's own tables is the host's to say.
const HOST_TABLES: &str = "
SELECT 'table_right_of_owner', format('%s on %s to %s', g.priv, t.name, g.to_whom),
       format('REVOKE %s ON %s FROM %s CASCADE', g.priv, t.name, g.to_whom)
FROM tenant_table t JOIN granted g ON g.oid = t.oid AND g.priv IN ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
WHERE NOT t.is_ours ORDER BY 2";

const SEQUENCES: &str = "
SELECT CASE g.grantee WHEN 0 THEN 'granted_to_public' ELSE 'granted_in_excess' END,
       format('%s on sequence %s to %s', g.priv, g.oid::regclass, g.to_whom),
       format('REVOKE %s ON SEQUENCE %s FROM %s CASCADE', g.priv, g.oid::regclass, g.to_whom)
FROM granted g JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = g.oid AND d.refobjid IN (SELECT oid FROM ours)
WHERE g.relkind = 'S' AND d.deptype IN ('a', 'i') ORDER BY 2";

/// Who creates objects beside ours can put one in the way of ours.
const SCHEMA: &str = "
SELECT 'schema_create', format('%s to %s', home.name, reach.name), format('REVOKE CREATE ON SCHEMA %s FROM %s CASCADE', home.name, reach.name)
FROM home JOIN pg_namespace n ON n.oid = home.oid CROSS JOIN LATERAL aclexplode(n.nspacl) a JOIN reach ON reach.oid = a.grantee
WHERE a.privilege_type = 'CREATE' AND a.grantee <> n.nspowner
UNION ALL
SELECT 'schema_create', format('%s, which %s owns', home.name, s.rolname),
       format('ALTER SCHEMA %s OWNER TO %s', home.name, (SELECT quote_ident(rolname) FROM pg_roles JOIN owner USING (oid)))
FROM home JOIN pg_namespace n ON n.oid = home.oid JOIN bound s ON pg_has_role(s.oid, n.nspowner, 'MEMBER')
WHERE n.nspowner NOT IN (SELECT oid FROM privileged) AND (s.is_app OR NOT EXISTS (
  SELECT FROM bound a WHERE a.is_app AND pg_has_role(a.oid, n.nspowner, 'MEMBER')))
ORDER BY 2";

/// The next table of the owner's would be open from the start.
const DEFAULT_PRIVILEGES: &str = "
SELECT DISTINCT 'default_privileges', format('tables of %s%s to %s', r.rolname, COALESCE(' in ' || n.nspname, ''), reach.name),
       format('ALTER DEFAULT PRIVILEGES FOR ROLE %I%s REVOKE ALL ON TABLES FROM %s', r.rolname,
              COALESCE(' IN SCHEMA ' || quote_ident(n.nspname), ''), reach.name)
FROM pg_default_acl d JOIN pg_roles r ON r.oid = d.defaclrole LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace
CROSS JOIN LATERAL aclexplode(d.defaclacl) a JOIN reach ON reach.oid = a.grantee
WHERE d.defaclobjtype = 'r' AND d.defaclrole IN (SELECT oid FROM owner)
  AND (d.defaclnamespace = 0 OR d.defaclnamespace IN (SELECT oid FROM home)) ORDER BY 2";
