-- Spreads the tables of lastprice over the nodes of a Citus cluster, by tenant. Run it once, on the coordinator, by a superuser, in the
-- database and with the search_path that schema.sql was installed with, before there is data worth waiting for:
--
--   psql -v ON_ERROR_STOP=1 -d lastprice -f schema.sql -f citus.sql
--
-- What is different afterwards stands in docs/scaling.md. In short: metrics are as of the last refresh, which recounts; what
-- waits for its sale comes in at a refresh; assigners poll. Run with Citus 13.2 on PostgreSQL 15.

BEGIN;

DO $$
DECLARE
  home constant text := quote_ident(current_schema());
  f regprocedure;
  t text;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
    RAISE EXCEPTION 'there is no Citus in this database' USING HINT = 'CREATE EXTENSION citus; and add the workers.';
  END IF;
  IF lastprice_schema_version() <> 1 THEN
    RAISE EXCEPTION 'schema % has version % of lastprice, and this file is for version 1', home, lastprice_schema_version();
  END IF;

  -- Statement triggers with transition tables there are not.
  FOREACH t IN ARRAY ARRAY['assignments', 'views', 'conversions'] LOOP
    EXECUTE format('DROP TRIGGER metrics_added ON %1$I; DROP TRIGGER metrics_changed ON %1$I; DROP TRIGGER metrics_removed ON %1$I', t);
  END LOOP;
  DROP TRIGGER conversions_opened ON conversions;
  -- Nobody listens at a worker.
  DROP TRIGGER config_changed ON experiments;
  DROP TRIGGER config_changed ON tenants;
  DROP TRIGGER config_gone ON tenants;
  -- Every node has all tenants, and each would write it down.
  DROP TRIGGER audit_trail ON tenants;
  -- A policy cannot look into another table; that there is no ledger is still looked at by experiments_delete_guard.
  DROP POLICY only_drafts_are_deleted ON experiments;
  CREATE POLICY only_drafts_are_deleted ON experiments AS RESTRICTIVE FOR DELETE USING (status = 'draft');

  -- The other triggers run at the shard, and look at rows of their own tenant only, which are on the same node.
  FOREACH f IN ARRAY ARRAY[
    'experiments_layer_guard()', 'experiments_delete_guard()', 'recommendations_let_go()', 'assignments_are_exceptions()',
    'conversions_follow()', 'conversions_once()', 'conversions_window()', 'match_waiting_conversions(uuid, text[])', 'metrics_go()',
    'audit_change()', 'usage_stays()', 'tenant_limit(uuid, text)', 'experiment_slot(uuid)']
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET citus.allow_nested_distributed_execution = on', f);
  END LOOP;

  -- No volatile function may be asked by an UPDATE. So of two experiments that are activated at once one may be too many.
  ALTER FUNCTION experiment_slot(uuid) STABLE;

  PERFORM set_config('citus.enable_unsafe_triggers', 'on', true);
  PERFORM set_config('citus.enable_local_reference_table_foreign_keys', 'off', true);
  PERFORM create_reference_table('tenants');
  PERFORM create_reference_table('plan_limits');
  PERFORM create_distributed_table('experiments', 'tenant_id', colocate_with => 'none');
  FOREACH t IN ARRAY ARRAY['assignments', 'views', 'conversions', 'waiting_conversions', 'webhook_events', 'ledger_locks', 'usage',
                           'recommendations', 'audit_trail', 'metric_totals', 'metric_deltas', 'metric_baselines', 'archived_experiments',
                           'usage_totals', 'tenant_limits', 'identities', 'erasures'] LOOP
    PERFORM create_distributed_table(t::regclass, 'tenant_id', colocate_with => 'experiments');
  END LOOP;
END $$;

-- Rights on columns do not reach the shards. What guards rows of these stays: policies and triggers.
GRANT INSERT ON usage TO lastprice_app;
GRANT INSERT, UPDATE ON recommendations, webhook_events TO lastprice_app;
GRANT UPDATE ON tenants TO lastprice_app;

-- What it does in one statement for each table, Citus 13.2 ends the connection for.
CREATE OR REPLACE FUNCTION erase_user(of_user text, erasure uuid DEFAULT gen_random_uuid()) RETURNS SETOF erasures
  LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  RAISE EXCEPTION 'users cannot be erased on a cluster' USING ERRCODE = 'feature_not_supported';
END $$;

-- There are no deltas.
CREATE OR REPLACE FUNCTION fold_metric_deltas(only_tenant uuid) RETURNS bigint
  LANGUAGE sql SECURITY DEFINER AS 'SELECT 0::bigint';

-- As two statements: each of them runs at the shards, and both are committed together.
CREATE OR REPLACE FUNCTION recount_experiment_metrics() RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  counted bigint;
BEGIN
  DELETE FROM metric_totals;
  INSERT INTO metric_totals
    (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views, conversions, renewals, refunds, revenue)
  SELECT tenant_id, experiment_id, phase, variant, reason, currency, day,
         sum(assignments), sum(views), sum(conversions), sum(renewals), sum(refunds), sum(revenue)
  FROM (
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX' AS currency, (assigned_at AT TIME ZONE 'UTC')::date AS day,
           count(*) AS assignments, 0 AS views, 0 AS conversions, 0 AS renewals, 0 AS refunds, 0::numeric AS revenue
    FROM assignments WHERE merged_into IS NULL GROUP BY 1, 2, 3, 4, 5, 7
    UNION ALL
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', (occurred_at AT TIME ZONE 'UTC')::date, 0, count(*), 0, 0, 0, 0
    FROM views GROUP BY 1, 2, 3, 4, 5, 7
    UNION ALL
    SELECT tenant_id, experiment_id, phase, variant, reason, currency, (occurred_at AT TIME ZONE 'UTC')::date, 0, 0,
           count(*) FILTER (WHERE kind = 'sale'), count(*) FILTER (WHERE kind = 'renewal'),
           count(*) FILTER (WHERE kind IN ('refund', 'chargeback')), sum(revenue)
    FROM conversions GROUP BY 1, 2, 3, 4, 5, 6, 7
    UNION ALL
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', day, assignments, views, 0, 0, 0, 0 FROM metric_baselines) events
  GROUP BY 1, 2, 3, 4, 5, 6, 7;
  GET DIAGNOSTICS counted = ROW_COUNT;
  RETURN counted;
END $$;

CREATE OR REPLACE FUNCTION refresh_experiment_metrics() RETURNS boolean
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  waiting record;
BEGIN
  -- On the coordinator, where all refreshes run.
  IF NOT pg_try_advisory_xact_lock('experiment_metrics'::regclass::oid::bigint::bit(32)::int, 0) THEN
    RETURN false;
  END IF;
  FOR waiting IN SELECT w.tenant_id, array_agg(DISTINCT w.ref) AS refs FROM waiting_conversions w GROUP BY w.tenant_id LOOP
    PERFORM match_waiting_conversions(waiting.tenant_id, waiting.refs);
  END LOOP;
  PERFORM recount_experiment_metrics();
  IF (SELECT relispopulated FROM pg_class WHERE oid = 'experiment_metrics'::regclass) THEN
    REFRESH MATERIALIZED VIEW CONCURRENTLY experiment_metrics;
  ELSE
    REFRESH MATERIALIZED VIEW experiment_metrics;
  END IF;
  RETURN true;
END $$;

-- What CREATE OR REPLACE has taken away.
DO $$
DECLARE
  f regprocedure;
  home constant text := quote_ident(current_schema());
BEGIN
  FOREACH f IN ARRAY ARRAY[
    'erase_user(text, uuid)', 'fold_metric_deltas(uuid)', 'recount_experiment_metrics()', 'refresh_experiment_metrics()']
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %s, pg_temp', f, home);
  END LOOP;
END $$;

COMMIT;
