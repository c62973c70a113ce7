//! Views and functions that run with somebody else's rights.

pub(super) const QUESTIONS: &[&str] = &[VIEWS, BARRIERS, DEFINERS, INTERNAL, TENANT_FUNCTION];

/// All functions of the schema that are not for everybody.
macro_rules! internal {
    () => {
        "'experiments_guard', 'experiments_layer_guard', 'experiments_delete_guard', 'recommendations_guard',
    'recommendations_let_go', 'assignments_are_exceptions', 'config_changed', 'audit_change', 'conversions_follow', 'conversions_once',
    'conversions_window',
    'match_waiting_conversions', 'conversions_opened', 'metrics_go', 'metrics_count_assignments', 'metrics_count_views',
    'metrics_count_conversions', 'fold_metric_deltas', 'fold_experiment_metrics', 'recount_experiment_metrics',
    'refresh_experiment_metrics', 'fold_usage', 'usage_stays', 'locked_users', 'lock_entries', 'merge_users', 'names_one',
    'webhook_without', 'erase_user'"
    };
}

/// A view reads with its owner's rights, and through other views.
const VIEWS: &str = "
, over AS (
  SELECT oid FROM tenant_table
  UNION SELECT oid FROM ours WHERE relname = 'experiment_metrics'
  UNION SELECT oid FROM child
  UNION SELECT r.ev_class FROM over JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = over.oid
    AND d.classid = 'pg_rewrite'::regclass JOIN pg_rewrite r ON r.oid = d.objid
  WHERE r.ev_class NOT IN (SELECT oid FROM ours)
)
SELECT 'view_leaks', c.oid::regclass::text,
       CASE WHEN c.relkind = 'v' AND current_setting('server_version_num')::int >= 150000
            THEN format('ALTER VIEW %s SET (security_invoker = true)', c.oid::regclass)
            ELSE (SELECT string_agg(DISTINCT format('REVOKE ALL ON %s FROM %s', c.oid::regclass, g.to_whom), '; ')
                  FROM granted g WHERE g.oid = c.oid) END
FROM pg_class c WHERE c.oid IN (SELECT oid FROM over) AND c.relkind IN ('v', 'm') AND c.oid NOT IN (SELECT oid FROM ours)
  AND (c.relkind = 'm' OR EXISTS (SELECT FROM privileged p WHERE pg_has_role(c.relowner, p.oid, 'MEMBER')))
  AND NOT COALESCE(c.reloptions && '{security_invoker=true,security_invoker=on,security_invoker=1,security_invoker=yes}', false)
  AND EXISTS (SELECT FROM granted g WHERE g.oid = c.oid)
ORDER BY 2";

/// These are how the application reads what no policy can guard.
const BARRIERS: &str = "
SELECT 'barrier_view_broken', format('%s.%s', home.name, w.relname), '@CREATE VIEW ' || w.relname || ' WITH (security_barrier)'
FROM home CROSS JOIN (VALUES ('tenant_experiment_metrics', 1), ('tenant_variant_metrics', 2), ('tenant_usage', 5)) w (relname, filters)
LEFT JOIN ours c ON c.relname = w.relname
CROSS JOIN LATERAL (SELECT CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END) d (definition)
WHERE NOT COALESCE(c.relkind = 'v' AND c.reloptions && '{security_barrier=true,security_barrier=on,security_barrier=1}'
  AND (length(d.definition) - length(replace(d.definition, 'tenant_id = ' || home.name || '.app_tenant_id()', '')))
      / length('tenant_id = ' || home.name || '.app_tenant_id()') = w.filters
  AND d.definition !~* '\\mor\\M', false)";

/// Without a pinned path a caller puts his own tables in the way; and where pg_temp is not named last, his temporary ones
/// come first whatever else is pinned. A schema in it that they may create in is as bad. What else the path names stays in it: a
/// function finds its tables there, a host's as one of another installation. Ours find theirs in their own schema and nowhere else.
const DEFINERS: &str = concat!(
    "
, writable AS (
  SELECT n.nspname, string_agg(DISTINCT format('REVOKE CREATE ON SCHEMA %I FROM %s', n.nspname, reach.name), '; ') AS revoke
  FROM pg_namespace n CROSS JOIN home
  CROSS JOIN LATERAL aclexplode(COALESCE(n.nspacl, acldefault('n', n.nspowner))) c JOIN reach ON reach.oid = c.grantee
  WHERE n.oid <> home.oid AND c.privilege_type = 'CREATE' GROUP BY n.nspname
), definer AS (
  SELECT p.oid, p.prokind, n.nspname, n.oid = home.oid AND p.proname IN (",
    internal!(),
    ") AS is_ours,
         home.name AS home, (SELECT substr(c, 13) FROM unnest(p.proconfig) c WHERE c LIKE 'search\\_path=%') AS path
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace CROSS JOIN home
  WHERE p.prosecdef AND n.nspname NOT IN ('pg_catalog', 'information_schema')
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
    AND EXISTS (SELECT FROM privileged x WHERE pg_has_role(p.proowner, x.oid, 'MEMBER'))
    AND (n.oid = home.oid OR EXISTS (
      SELECT FROM aclexplode(COALESCE(p.proacl, acldefault('f', p.proowner))) a JOIN reach ON reach.oid = a.grantee))
)
SELECT 'definer_without_search_path', d.oid::regprocedure::text,
       concat_ws('; ',
         CASE WHEN d.path IS DISTINCT FROM fixed.path
              THEN format('ALTER %s %s SET search_path = %s', CASE d.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END,
                          d.oid::regprocedure, fixed.path) END,
         CASE WHEN NOT d.is_ours THEN (SELECT w.revoke FROM writable w WHERE w.nspname = d.nspname AND COALESCE(s.names_own, true)) END,
         CASE WHEN has_function_privilege('public', d.oid, 'EXECUTE')
              THEN format('REVOKE ALL ON ROUTINE %s FROM PUBLIC', d.oid::regprocedure) END)
FROM definer d
CROSS JOIN LATERAL (
  SELECT bool_or(x.is_writable) AS has_writable, bool_or(x.schema = d.nspname) AS names_own,
         array_agg(x.schema ORDER BY x.nth) FILTER (WHERE x.schema <> 'pg_catalog') AS schemas,
         string_agg(x.name, ', ' ORDER BY x.nth) FILTER (
           WHERE x.schema NOT IN ('$user', 'pg_temp') AND (x.schema = d.nspname OR NOT x.is_writable)) AS keeps
  FROM (SELECT u.name, u.nth, z.schema, z.schema IN (SELECT nspname FROM writable) AS is_writable
        FROM unnest(string_to_array(d.path, ', ')) WITH ORDINALITY u (name, nth)
        CROSS JOIN LATERAL (SELECT replace(trim('\"' FROM u.name), '\"\"', '\"') AS schema) z) x) s
CROSS JOIN LATERAL (
  SELECT CASE WHEN d.is_ours THEN d.home
              ELSE COALESCE(s.keeps, NULLIF(quote_ident(d.nspname), d.home) || ', ' || d.home, d.home) END || ', pg_temp' AS path) fixed
WHERE CASE WHEN d.is_ours THEN s.schemas IS DISTINCT FROM ARRAY[d.nspname::text, 'pg_temp']
           ELSE d.path IS NULL OR d.path NOT IN ('\"\"', 'pg_catalog') AND (
                d.path !~ ', *\"?pg_temp\"?$' OR d.path ~ '\\$user' OR s.has_writable) END
ORDER BY 2"
);

/// What only triggers, the owner and other functions call.
const INTERNAL: &str = concat!(
    "
SELECT 'internal_function_granted', format('%s to %s', p.oid::regprocedure, reach.name),
       format('REVOKE ALL ON FUNCTION %s FROM %s CASCADE', p.oid::regprocedure, reach.name)
FROM pg_proc p JOIN home ON home.oid = p.pronamespace
CROSS JOIN LATERAL aclexplode(COALESCE(p.proacl, acldefault('f', p.proowner))) a JOIN reach ON reach.oid = a.grantee
WHERE p.proname IN (",
    internal!(),
    ")
  AND NOT (p.proname IN ('fold_experiment_metrics', 'merge_users', 'erase_user') AND a.grantee <> 0) AND a.grantee <> p.proowner
ORDER BY 2"
);

/// Every policy asks it.
const TENANT_FUNCTION: &str = "
SELECT 'tenant_function_replaced', home.name || '.app_tenant_id()',
       format('CREATE OR REPLACE FUNCTION %s.app_tenant_id() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE AS %L', home.name,
              ' SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid ')
FROM home WHERE NOT EXISTS (
  SELECT FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
  WHERE p.pronamespace = home.oid AND p.proname = 'app_tenant_id' AND p.pronargs = 0 AND l.lanname = 'sql'
    AND NOT p.prosecdef AND p.proconfig IS NULL
    AND btrim(p.prosrc) = 'SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid')";
