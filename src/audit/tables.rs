//! Tables, their policies and keys.

pub(super) const QUESTIONS: &[&str] = &[RLS, POLICIES, RESTRICTIVE, KEYS, CHILDREN, TRIGGERS, RULES];

const RLS: &str = "
SELECT 'rls_disabled', name, format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', name)
FROM tenant_table WHERE NOT relrowsecurity ORDER BY 2";

/// Permissive policies are alternatives: one of them that says more is enough. Of a table with row-level security off
/// they are looked at as well, since it will be switched on.
const POLICIES: &str = "
, policy AS (
  SELECT t.oid, p.polname, p.polcmd, p.polroles, p.polqual, p.polwithcheck,
         row_number() OVER (PARTITION BY t.oid ORDER BY p.polname <> 'tenant_isolation', p.polname) AS nth,
         pg_get_expr(p.polqual, p.polrelid) AS seen, pg_get_expr(p.polwithcheck, p.polrelid) AS written
  FROM tenant_table t JOIN pg_policy p ON p.polrelid = t.oid AND p.polpermissive
), fine AS (
  SELECT t.oid, f.form FROM tenant_table t CROSS JOIN LATERAL (VALUES
    (format('(%s = %s.app_tenant_id())', t.col, t.home)),
    (format('(%s = ( SELECT %s.app_tenant_id() AS app_tenant_id))', t.col, t.home)),
    (format('(%s = (NULLIF(current_setting(''app.tenant_id''::text, true), ''''::text))::uuid)', t.col)),
    (format('(%s = (current_setting(''app.tenant_id''::text))::uuid)', t.col)),  -- an error where none is bound, and no rows
    (format('(%s = (current_setting(''app.tenant_id''::text, true))::uuid)', t.col))) f (form)
), wrong AS (
  SELECT t.oid, 'policy_missing' AS hazard, t.name AS object, NULL::name AS polname FROM tenant_table t
  WHERE NOT EXISTS (SELECT FROM policy p WHERE p.oid = t.oid)
  UNION ALL
  SELECT t.oid, f.hazard, p.polname || ' on ' || t.name, p.polname
  FROM tenant_table t JOIN policy p ON p.oid = t.oid AND p.nth = 1 CROSS JOIN LATERAL (VALUES
    ('policy_covers_part', p.polcmd <> '*'),
    ('policy_for_other_roles', p.polroles <> '{0}' AND NOT EXISTS (SELECT FROM subject s WHERE s.is_app AND s.oid = ANY (p.polroles))),
    ('policy_does_not_isolate',
     p.seen IS NOT NULL AND NOT EXISTS (SELECT FROM fine x WHERE x.oid = t.oid AND x.form = p.seen)
     OR p.written IS NOT NULL AND NOT EXISTS (SELECT FROM fine x WHERE x.oid = t.oid AND x.form = p.written))) f (hazard, is_so)
  WHERE f.is_so
)
SELECT w.hazard, w.object,
       CASE WHEN w.polname IS NULL THEN '' ELSE format('DROP POLICY %I ON %s; ', w.polname, t.name) END
       || format('CREATE POLICY tenant_isolation ON %1$s USING (%2$s = %3$s.app_tenant_id()) WITH CHECK (%2$s = %3$s.app_tenant_id())',
                 t.name, t.col, t.home)
FROM wrong w JOIN tenant_table t USING (oid)
UNION ALL
SELECT 'policy_second', p.polname || ' on ' || t.name, format('DROP POLICY %I ON %s', p.polname, t.name)
FROM policy p JOIN tenant_table t USING (oid) WHERE p.nth > 1
ORDER BY 1, 2";

const RESTRICTIVE: &str = "
SELECT 'guard_policy_missing', w.polname || ' on ' || t.name,
       format('DROP POLICY IF EXISTS %I ON %s; @CREATE POLICY %s ON experiments', w.polname, t.name, w.polname)
FROM tenant_table t JOIN (VALUES ('only_drafts_are_deleted', 'd'), ('no_past_at_first', 'a')) w (polname, polcmd)
  ON t.relname = 'experiments'
WHERE NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND p.polname = w.polname AND p.polcmd::text = w.polcmd
                    AND NOT p.polpermissive AND p.polroles = '{0}'
                    AND CASE p.polcmd WHEN 'd' THEN pg_get_expr(p.polqual, p.polrelid) LIKE '%''draft''%NOT (EXISTS%'
                             ELSE pg_get_expr(p.polwithcheck, p.polrelid) LIKE '%past_phases = ''[]''%' END)";

/// A key without the tenant (which an INCLUDE does not make a part of it) tells one tenant what another has; a foreign key without it takes another's row. The host's own
/// keys are its own affair: an id that nobody can guess tells nothing.
const KEYS: &str = "
SELECT 'foreign_key_without_tenant', k.conname || ' on ' || t.name, format('ALTER TABLE %s DROP CONSTRAINT %I', t.name, k.conname)
FROM tenant_table t JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype = 'f'
WHERE k.confrelid IN (SELECT oid FROM tenant_table) AND NOT EXISTS (
  SELECT FROM unnest(k.conkey, k.confkey) x (here, there)
  JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = x.here AND a.attname = t.col
  JOIN tenant_table o ON o.oid = k.confrelid
  JOIN pg_attribute b ON b.attrelid = o.oid AND b.attnum = x.there AND b.attname = o.col)
UNION ALL
SELECT 'key_without_tenant', i.relname || ' on ' || t.name,
       CASE WHEN k.oid IS NULL THEN 'DROP INDEX ' || i.oid::regclass ELSE format('ALTER TABLE %s DROP CONSTRAINT %I', t.name, k.conname) END
FROM tenant_table t JOIN pg_index x ON x.indrelid = t.oid AND (x.indisunique OR x.indisexclusion)
JOIN pg_class i ON i.oid = x.indexrelid LEFT JOIN pg_constraint k ON k.conindid = i.oid AND k.contype IN ('p', 'u', 'x')
WHERE t.is_ours AND NOT (t.relname = 'tenants' AND i.relname = 'tenants_email_key')
  AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = t.oid AND a.attname = t.col
                    AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1]))
ORDER BY 1, 2";

/// Who reads a child by its own name meets the child's policies, and not its parent's.
const CHILDREN: &str = "
SELECT 'partition_granted', g.oid::regclass::text || ' to ' || g.to_whom, format('REVOKE ALL ON %s FROM %s', g.oid::regclass, g.to_whom)
FROM (SELECT DISTINCT oid, to_whom FROM granted WHERE oid IN (SELECT oid FROM child)) g ORDER BY 2";

/// Those that guard a foreign key are internal, and only a superuser could have switched them off.
const TRIGGERS: &str = "
SELECT 'trigger_disabled', x.tgname || ' on ' || t.name,
       CASE WHEN x.tgisinternal THEN format('ALTER TABLE %s ENABLE TRIGGER ALL', t.name)
            ELSE format('ALTER TABLE %s ENABLE TRIGGER %I', t.name, x.tgname) END
FROM tenant_table t JOIN pg_trigger x ON x.tgrelid = t.oid AND x.tgenabled IN ('D', 'R') WHERE t.is_ours ORDER BY 2";

/// A rule runs with the rights of the table's owner.
const RULES: &str = "
SELECT 'rule_on_table', r.rulename || ' on ' || t.name, format('DROP RULE %I ON %s', r.rulename, t.name)
FROM tenant_table t JOIN pg_rewrite r ON r.ev_class = t.oid ORDER BY 2";
