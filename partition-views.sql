-- lastprice, optional: views as partitions by month, of which old ones are dropped at once instead of deleted row by row.
--
--   psql -1 -v ON_ERROR_STOP=1 -d lastprice -f partition-views.sql                                 as the owner of the tables
--   PGOPTIONS='-c search_path=pricing' psql -1 -v ON_ERROR_STOP=1 -d shop -f partition-views.sql   for a schema of its own
--
-- Over version 1 of the schema, PostgreSQL 12 to 18, in one transaction; run again it does nothing. It reads the table once, while writers
-- of views and of experiments wait. What is there becomes the first partition, up to the end of the month. Nothing is copied, and no
-- program has to know: it goes on reading and writing views.
--
-- Partitions are by id, which begins with the time at which it was made (UUID version 7), as ids of the library do and, from now on,
-- those that the database makes. Views with other ids are in views_other. Then:
--
--   SELECT create_view_partitions(3);                      every month, or every night: this month's, and the next three
--   SELECT empty_view_partition('views_2026_01');          what it holds becomes counts; services go on, and numbers stay;
--                                                          an error if somebody has looked into it: then once more
--   SELECT drop_view_partition('views_2026_01');           false if a view has come in between: then once more
--
-- These are for the owner, who may call them as often as he likes. What waits longer than 5 seconds for a lock gives up (to empty one,
-- half a second for the partition itself); nothing is done then. Each of them is a transaction of its own: two in one may stop each other and writers.
--
-- Rights on columns of views, if you have granted any, are to be granted again. Partitions have row-level security without any policy and
-- are granted to nobody: who reads them by their own name gets nothing.

-- 1. What the owner calls -----------------------------------------------------------------------------------

-- The smallest id that is made at this time or later.
CREATE OR REPLACE FUNCTION view_partition_bound(since timestamptz) RETURNS uuid
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT (lpad(to_hex((extract(epoch FROM since) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- The months after the last partition, up to so many after this one. Returns how many it made. Ids that were not expected to be of
-- this time, and are in views_other, move; nobody counts that.
CREATE OR REPLACE FUNCTION create_view_partitions(months integer DEFAULT 3) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  -- Hexadecimal digits sort as texts.
  done constant text := (SELECT max(substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \(''([0-9a-f-]{36})''\)') COLLATE "C")
                         FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'views'::regclass);
  month timestamp := timestamp '1970-01-01'
    + make_interval(secs => ('x' || left(replace(done, '-', ''), 12))::bit(48)::bigint / 1000.0);
  last constant timestamp := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => months);
  made integer := 0;
  part name;
  low  uuid;
  high uuid;
BEGIN
  IF months NOT BETWEEN 0 AND 120 THEN
    RAISE EXCEPTION 'months is not from 0 to 120' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF month > last THEN
    RETURN 0;
  END IF;
  -- First, since who deletes an experiment has it, and comes for the views then.
  LOCK TABLE experiments IN SHARE ROW EXCLUSIVE MODE;
  LOCK TABLE views_other IN ACCESS EXCLUSIVE MODE;
  WHILE month <= last LOOP
    part := 'views_' || to_char(month, 'YYYY_MM');
    low := view_partition_bound(month AT TIME ZONE 'UTC');
    month := month + interval '1 month';
    high := view_partition_bound(month AT TIME ZONE 'UTC');
    EXECUTE format('CREATE TABLE %I (LIKE views INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', part);
    EXECUTE format('WITH moved AS (DELETE FROM views_other WHERE id >= $1 AND id < $2 RETURNING *) INSERT INTO %I SELECT * FROM moved', part)
      USING low, high;
    EXECUTE format('ALTER TABLE views ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', part, low, high);
    PERFORM close_view_partition(part::text::regclass);
    made := made + 1;
  END LOOP;
  RETURN made;
END $$;

-- Whatever the host's default privileges have granted.
CREATE OR REPLACE FUNCTION close_view_partition(partition regclass) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  granted record;
BEGIN
  EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', partition);
  FOR granted IN
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS name
    FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = partition AND a.grantee <> c.relowner
  LOOP
    EXECUTE format('REVOKE ALL ON %s FROM %s', partition, granted.name);
  END LOOP;
END $$;

-- Its views become counts of the baseline, in one transaction. Returns how many. Who writes a view of its time meanwhile waits, as who
-- reads all of them does; who writes others does not.
CREATE OR REPLACE FUNCTION empty_view_partition(partition regclass) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  counted bigint;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = 'views'::regclass AND i.inhrelid = partition) THEN
    RAISE EXCEPTION '% is no partition of views', partition USING ERRCODE = 'wrong_object_type';
  END IF;
  -- No recount: a table that was truncated is empty for those as well who cannot see the baseline yet.
  PERFORM pg_advisory_xact_lock('metric_totals'::regclass::oid::bigint::bit(32)::int, 0);
  -- Before the table: who deletes an experiment has it, and comes for the views then.
  EXECUTE format('SELECT count(*) FROM (SELECT FROM experiments e WHERE EXISTS (
    SELECT FROM %s v WHERE v.tenant_id = e.tenant_id AND v.experiment_id = e.id) FOR KEY SHARE) held', partition);
  -- As TRUNCATE needs it: with less, a transaction that has read views and then writes one waits for this one, and this one for it.
  -- Not for long, since everybody who comes later waits as well; and shorter than it takes to look for a deadlock, if there is one.
  SET LOCAL lock_timeout = '500ms';
  EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', partition);
  SET LOCAL lock_timeout = '5s';
  EXECUTE format($count$
    WITH counted AS MATERIALIZED (
      SELECT tenant_id, experiment_id, phase, variant, reason, (occurred_at AT TIME ZONE 'UTC')::date AS day, count(*) AS n
      FROM %s GROUP BY 1, 2, 3, 4, 5, 6
    ), based AS (
      INSERT INTO metric_baselines AS b (tenant_id, experiment_id, phase, variant, reason, day, views)
      SELECT * FROM counted ORDER BY 1, 2, 6, 4, 3, 5
      ON CONFLICT (tenant_id, experiment_id, day, variant, phase, reason) DO UPDATE SET views = b.views + excluded.views
    )
    SELECT COALESCE(sum(n), 0)::bigint FROM counted $count$, partition) INTO counted;
  IF counted > 0 THEN
    -- Not a DELETE, which nobody would count on a partition, either: it takes no time.
    EXECUTE format('TRUNCATE %s', partition);
  END IF;
  RETURN counted;
END $$;

-- At once, if it is empty. Everybody waits for as long as that takes.
CREATE OR REPLACE FUNCTION drop_view_partition(partition regclass) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  is_empty boolean;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = 'views'::regclass AND i.inhrelid = partition
                 AND i.inhrelid <> 'views_other'::regclass) THEN
    RAISE EXCEPTION '% is no partition of views that can be dropped', partition USING ERRCODE = 'wrong_object_type';
  END IF;
  LOCK TABLE views IN ACCESS EXCLUSIVE MODE;
  EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s)', partition) INTO is_empty;
  IF is_empty THEN
    EXECUTE format('DROP TABLE %s', partition);
  END IF;
  RETURN is_empty;
END $$;

DO $$
DECLARE
  f regprocedure;
BEGIN
  FOREACH f IN ARRAY ARRAY[
    'view_partition_bound(timestamptz)', 'create_view_partitions(integer)', 'close_view_partition(regclass)',
    'empty_view_partition(regclass)', 'drop_view_partition(regclass)']
  LOOP
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC, lastprice_app', f);
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', f, current_schema());
    EXECUTE format('ALTER FUNCTION %s SET lock_timeout = %L', f, '5s');
  END LOOP;
  -- Many rows become few counts, whatever is thought of a table that nobody has analysed: they are not sorted for that.
  ALTER FUNCTION empty_view_partition(regclass) SET enable_sort = off;
  ALTER FUNCTION empty_view_partition(regclass) SET work_mem = '64MB';
END $$;

-- 2. The table ----------------------------------------------------------------------------------------------

DO $$
DECLARE
  rest    name := 'views_until_' || to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month', 'YYYY_MM');
  bound   uuid := view_partition_bound((date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC');
  granted record;
  was     pg_class;
  strange text;
BEGIN
  IF to_regprocedure(format('%I.lastprice_schema_version()', current_schema())) IS NULL OR lastprice_schema_version() <> 1 THEN
    RAISE EXCEPTION 'schema % does not hold version 1 of lastprice', current_schema()
      USING HINT = 'Name the schema that does: PGOPTIONS=''-c search_path=...''.';
  END IF;
  SELECT * INTO STRICT was FROM pg_class WHERE oid = format('%I.views', current_schema())::regclass;
  IF was.relkind = 'p' THEN
    RAISE NOTICE 'views has partitions already: nothing to do';
    RETURN;
  END IF;
  IF was.relowner <> (SELECT oid FROM pg_roles WHERE rolname = current_user) THEN
    RAISE EXCEPTION 'only % makes partitions: the owner of views', pg_get_userbyid(was.relowner);
  END IF;
  -- First, since who deletes an experiment has it, and comes for the views then.
  LOCK TABLE experiments IN SHARE ROW EXCLUSIVE MODE;
  LOCK TABLE views IN ACCESS EXCLUSIVE MODE;
  -- What is somebody else's would stay with the first partition.
  SELECT string_agg(what, ', ') INTO strange FROM (
    SELECT 'trigger ' || t.tgname AS what FROM pg_trigger t
    WHERE t.tgrelid = was.oid AND NOT t.tgisinternal AND t.tgname NOT IN ('metrics_added', 'metrics_changed', 'metrics_removed')
    UNION ALL
    SELECT 'policy ' || p.polname FROM pg_policy p WHERE p.polrelid = was.oid AND p.polname <> 'tenant_isolation'
    UNION ALL
    SELECT DISTINCT 'view ' || r.ev_class::regclass FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = was.oid
    UNION ALL
    SELECT 'child ' || i.inhrelid::regclass FROM pg_inherits i WHERE i.inhparent = was.oid
    UNION ALL
    SELECT 'foreign key ' || k.conname FROM pg_constraint k WHERE k.confrelid = was.oid
    UNION ALL
    SELECT 'publication ' || p.pubname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = was.oid) s;
  IF strange IS NOT NULL THEN
    RAISE EXCEPTION 'views has what is not of this schema: %', strange
      USING HINT = 'Drop it, make partitions, and create it again.';
  END IF;

  DROP TRIGGER metrics_added ON views;
  DROP TRIGGER metrics_changed ON views;
  DROP TRIGGER metrics_removed ON views;
  DROP POLICY tenant_isolation ON views;
  EXECUTE format('ALTER TABLE views RENAME TO %I', rest);
  EXECUTE format('ALTER INDEX views_pkey RENAME TO %I', rest || '_pkey');
  EXECUTE format('ALTER INDEX views_experiment_idx RENAME TO %I', rest || '_experiment_idx');

  EXECUTE format('CREATE TABLE views (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING COMMENTS) PARTITION BY RANGE (id)', rest);
  ALTER TABLE views
    ALTER id SET DEFAULT encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid()) PLACING
      substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid,
    ADD CONSTRAINT views_pkey PRIMARY KEY (tenant_id, id),
    ADD CONSTRAINT views_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
      REFERENCES experiments (tenant_id, id) ON DELETE CASCADE;
  CREATE INDEX views_experiment_idx ON views (tenant_id, experiment_id, occurred_at);
  CREATE TABLE views_other (LIKE views INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
  EXECUTE format('WITH moved AS (DELETE FROM %I WHERE id >= $1 RETURNING *) INSERT INTO views_other SELECT * FROM moved', rest) USING bound;
  EXECUTE format('ALTER TABLE views ATTACH PARTITION %I FOR VALUES FROM (MINVALUE) TO (%L)', rest, bound);
  ALTER TABLE views ATTACH PARTITION views_other DEFAULT;

  CREATE TRIGGER metrics_added AFTER INSERT ON views REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_views();
  CREATE TRIGGER metrics_changed AFTER UPDATE ON views REFERENCING OLD TABLE AS removed NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_views();
  CREATE TRIGGER metrics_removed AFTER DELETE ON views REFERENCING OLD TABLE AS removed
    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_views();
  ALTER TABLE views ENABLE ROW LEVEL SECURITY;
  CREATE POLICY tenant_isolation ON views USING (tenant_id = app_tenant_id()) WITH CHECK (tenant_id = app_tenant_id());

  -- The rights of before, and no others.
  PERFORM close_view_partition('views'::regclass);
  FOR granted IN
    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS name, a.privilege_type, a.is_grantable
    FROM aclexplode(was.relacl) a WHERE a.grantee <> was.relowner
  LOOP
    EXECUTE format('GRANT %s ON views TO %s%s', granted.privilege_type, granted.name,
                   CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
  END LOOP;
  PERFORM close_view_partition(format('%I', rest)::regclass), close_view_partition('views_other'::regclass);
  PERFORM create_view_partitions(3);
END $$;

ANALYZE views;
