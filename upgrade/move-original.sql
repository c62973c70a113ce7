-- Moves the tables of the original Last Price out of the way, as they are, into the schema `original`: then schema.sql can
-- install ours where they were, and from-original.sql can copy. See docs/upgrade.md.
--
-- One statement: all of it or nothing. It looks first whether these are the tables that are meant. Indexes, constraints,
-- triggers, policies, and views of the host's own that read the tables, go on as before. What still writes by the old
-- names fails from now on: stop it first. What it changes it writes into `original.way_back`, for back-to-original.sql.

DO $move$
DECLARE
  home  constant name := current_schema();
  names constant name[] := '{tenants,experiments,assignments,views,conversions,usage,recommendations,experiment_metrics}';
  wrong text;
  fresh boolean;
  old   record;
BEGIN
  IF home IS NULL OR home = 'original' THEN
    RAISE EXCEPTION 'search_path (%) does not begin with the schema of the original''s tables', current_setting('search_path')
      USING HINT = 'SET search_path = public; or wherever they are.';
  END IF;
  IF to_regprocedure(format('%I.lastprice_schema_version()', home)) IS NOT NULL THEN
    RAISE EXCEPTION 'schema % holds lastprice already, and not the original', home;
  END IF;
  SELECT string_agg(n.t || '.' || n.c, ', ') INTO wrong
  FROM (VALUES ('tenants', 'id'), ('tenants', 'name'), ('tenants', 'email'), ('experiments', 'id'), ('experiments', 'tenant_id'),
               ('experiments', 'name'), ('experiments', 'status'), ('experiments', 'variants'),
               ('assignments', 'experiment_id'), ('assignments', 'user_id'), ('views', 'experiment_id'), ('views', 'user_id'),
               ('conversions', 'experiment_id'), ('conversions', 'user_id'), ('conversions', 'variant')) n (t, c)
  WHERE NOT EXISTS (SELECT FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid AND r.relkind IN ('r', 'p')
                    WHERE r.oid = to_regclass(format('%I.%I', home, n.t)) AND a.attname = n.c AND NOT a.attisdropped);
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'schema % does not hold the original''s tables: there is no %', home, wrong;
  END IF;
  fresh := to_regnamespace('original') IS NULL;
  CREATE SCHEMA IF NOT EXISTS original;
  SELECT string_agg(relname, ', ') INTO wrong FROM pg_class
  WHERE relnamespace = 'original'::regnamespace AND relname = ANY (names || '{way_back}');
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'the schema original has tables by these names already: %', wrong;
  END IF;

  CREATE TABLE original.way_back (what text NOT NULL, name text NOT NULL, home name, forced boolean NOT NULL DEFAULT false);
  COMMENT ON COLUMN original.way_back.what IS 'what moved; SCHEMA: it was made; USAGE: lastprice_app had it; INSTALLATION: where ours are';
  COMMENT ON COLUMN original.way_back.forced IS 'FORCE ROW LEVEL SECURITY was on';
  INSERT INTO original.way_back (what, name, home)
  SELECT 'SCHEMA', 'original', NULL WHERE fresh
  UNION ALL SELECT 'USAGE', 'lastprice_app', n.nspname FROM pg_namespace n, aclexplode(n.nspacl) a
    WHERE a.privilege_type = 'USAGE' AND a.grantee <> 0 AND pg_get_userbyid(a.grantee) = 'lastprice_app'
  UNION ALL SELECT 'FUNCTION', 'refresh_experiment_metrics()', home
    WHERE to_regprocedure(format('%I.refresh_experiment_metrics()', home)) IS NOT NULL;
  INSERT INTO original.way_back
  SELECT CASE c.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, c.relname, home, c.relforcerowsecurity
  FROM pg_class c WHERE c.relnamespace = quote_ident(home)::regnamespace AND c.relname = ANY (names) AND c.relkind IN ('r', 'p', 'm', 'v');

  FOR old IN SELECT w.what, w.name, w.forced FROM original.way_back w WHERE w.what IN ('TABLE', 'MATERIALIZED VIEW', 'VIEW', 'FUNCTION')
  LOOP
    IF old.forced THEN
      EXECUTE format('ALTER TABLE %I.%s NO FORCE ROW LEVEL SECURITY', home, old.name);  -- else its owner would copy nothing
    END IF;
    EXECUTE format('ALTER %s %I.%s SET SCHEMA original', old.what, home, old.name);
  END LOOP;
END $move$;
