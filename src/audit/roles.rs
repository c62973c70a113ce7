//! Who the login is, and whom it may become.

/// Name of the hazard, object, and what mends it.
pub(super) const QUESTIONS: &[&str] = &[ATTRIBUTES, OWNED, MEMBERSHIPS, NO_MEMBER, DEFAULTS];

const ATTRIBUTES: &str = "
SELECT f.hazard, s.rolname::text,
       CASE WHEN s.oid = 10 THEN 'CREATE ROLE lastprice_service LOGIN IN ROLE lastprice_app -- and log in as that'
            ELSE format('ALTER ROLE %I %s', s.rolname, f.fix) END
FROM subject s CROSS JOIN LATERAL (VALUES
  ('role_is_superuser', s.rolsuper, 'NOSUPERUSER'),
  ('role_bypasses_rls', s.rolbypassrls AND NOT s.rolsuper, 'NOBYPASSRLS'),
  ('role_creates_roles', s.rolcreaterole AND NOT s.rolsuper, 'NOCREATEROLE'),
  ('role_replicates', s.rolreplication AND NOT s.rolsuper, 'NOREPLICATION')) f (hazard, is_so, fix)
WHERE f.is_so ORDER BY 1, 2";

/// An owner escapes row-level security, or can replace what enforces it.
const OWNED: &str = "
SELECT 'role_is_owner', s.rolname::text || ' owns '
         || CASE WHEN s.oid IN (SELECT oid FROM owner) THEN 'the tables' ELSE string_agg(o.what, ', ' ORDER BY o.what) END,
       CASE WHEN s.oid IN (SELECT oid FROM owner)
            THEN 'CREATE ROLE lastprice_service LOGIN IN ROLE lastprice_app -- and log in as that'
            ELSE string_agg(format('ALTER %s %s OWNER TO %s', o.kind, o.what,
                                   (SELECT quote_ident(rolname) FROM pg_roles JOIN owner USING (oid))), '; ' ORDER BY o.what) END
FROM subject s JOIN (
  SELECT c.relowner AS oid, c.oid::regclass::text AS what,
         CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END AS kind FROM ours c
  UNION ALL
  SELECT p.proowner, p.oid::regprocedure::text, 'FUNCTION' FROM pg_proc p JOIN home ON home.oid = p.pronamespace
  WHERE p.proname IN ('app_tenant_id', 'app_set_tenant', 'fold_experiment_metrics', 'refresh_experiment_metrics',
                      'recount_experiment_metrics', 'fold_metric_deltas')
) o ON o.oid = s.oid
WHERE NOT s.rolsuper GROUP BY s.oid, s.rolname";

/// What the group role may become is reported of it, and not of each of its members as well. Since PostgreSQL 16 several roles can
/// have granted the same membership; a REVOKE that does not say whose takes away the bootstrap superuser's, or nothing.
const MEMBERSHIPS: &str = "
SELECT f.hazard, s.rolname || ' may become ' || r.rolname,
       (SELECT string_agg(DISTINCT format('REVOKE %I FROM %I%s', r.rolname, m.rolname,
                                          CASE WHEN current_setting('server_version_num')::int >= 160000
                                               THEN format(' GRANTED BY %I CASCADE', pg_get_userbyid(e.grantor)) ELSE '' END), '; ')
        FROM pg_auth_members e JOIN pg_roles m ON m.oid = e.member
        WHERE e.roleid = r.oid AND NOT m.rolsuper AND pg_has_role(s.oid, m.oid, 'MEMBER'))
FROM bound s JOIN pg_roles r ON r.oid <> s.oid AND r.rolname <> 'lastprice_app' AND pg_has_role(s.oid, r.oid, 'MEMBER')
CROSS JOIN LATERAL (SELECT CASE
  WHEN r.oid IN (SELECT oid FROM owner) THEN 'role_may_become_owner'
  WHEN r.rolsuper OR r.rolbypassrls THEN 'role_may_bypass_rls'
  WHEN r.rolcreaterole OR r.rolreplication THEN 'role_may_bypass_rls'
  WHEN r.rolname IN ('pg_read_all_data', 'pg_write_all_data', 'pg_execute_server_program', 'pg_read_server_files',
                     'pg_write_server_files', 'pg_maintain') THEN 'role_reads_around_rls' END) f (hazard)
WHERE f.hazard IS NOT NULL
  AND EXISTS (SELECT FROM pg_auth_members e JOIN pg_roles m ON m.oid = e.member
              WHERE e.roleid = r.oid AND NOT m.rolsuper AND pg_has_role(s.oid, m.oid, 'MEMBER'))
  AND (s.is_app OR NOT EXISTS (SELECT FROM bound a WHERE a.is_app AND pg_has_role(a.oid, r.oid, 'MEMBER')))
ORDER BY 1, 2";

const NO_MEMBER: &str = "
SELECT 'role_lacks_app_role', s.rolname::text, format('%sGRANT lastprice_app TO %I',
         CASE WHEN EXISTS (SELECT FROM subject WHERE is_app) THEN '' ELSE 'CREATE ROLE lastprice_app NOLOGIN; ' END, s.rolname)
FROM subject s WHERE NOT s.is_app AND NOT s.rolsuper
  AND NOT EXISTS (SELECT FROM subject a WHERE a.is_app AND pg_has_role(s.oid, a.oid, 'MEMBER'))";

/// A setting that every session starts with, or that this one has kept.
const DEFAULTS: &str = "
, preset AS (
  SELECT COALESCE(r.rolname::text, 'ALL') AS who, d.datname AS place, x.setrole, x.setdatabase
  FROM pg_db_role_setting x LEFT JOIN pg_roles r ON r.oid = x.setrole LEFT JOIN pg_database d ON d.oid = x.setdatabase
  WHERE EXISTS (SELECT FROM unnest(x.setconfig) c WHERE lower(c) LIKE 'app.tenant\\_id=_%')
    AND (x.setdatabase = 0 OR d.datname = current_database())
    AND (x.setrole = 0 OR x.setrole IN (SELECT oid FROM subject))
)
SELECT 'tenant_bound_by_default',
       CASE WHEN setrole = 0 THEN 'database ' || place ELSE 'role ' || who || COALESCE(' in database ' || place, '') END,
       CASE WHEN setrole = 0 AND setdatabase <> 0 THEN format('ALTER DATABASE %I RESET app.tenant_id', place)
            ELSE format('ALTER ROLE %s%s RESET app.tenant_id', CASE setrole WHEN 0 THEN 'ALL' ELSE quote_ident(who) END,
                        COALESCE(' IN DATABASE ' || quote_ident(place), '')) END
FROM preset
UNION ALL
SELECT 'tenant_left_bound', session_user::text, 'DISCARD ALL -- and find out who sets app.tenant_id without LOCAL'
WHERE NULLIF(current_setting('app.tenant_id', true), '') IS NOT NULL AND NOT EXISTS (SELECT FROM preset)";
