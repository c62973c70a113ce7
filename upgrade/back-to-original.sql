-- The way back from an upgrade: drops lastprice, version 1, and moves the tables of the original Last Price back to where
-- move-original.sql found them, as they are. As the owner of both; stop what uses them first. See docs/upgrade.md.
--
--   psql -X -1 -v ON_ERROR_STOP=1 -d lastprice -f upgrade/back-to-original.sql
--
-- One statement: all of it or nothing. Where there is money, a quote, a tenant or an erasure that came after the upgrade, and
-- that the original therefore does not have, it stops and says how much; `SET lastprice.discard = 'yes'` lets that go.
--
-- What is dropped is what schema.sql and partition-views.sql made, by name, and never with CASCADE: a foreign key, view, policy or
-- function of the host's that needs any of it stops all of it, and PostgreSQL says which. What the host added to a table
-- of ours (a column, an index, a trigger, a policy) is a part of that table and goes with it. The role lastprice_app stays,
-- and the extension pgcrypto. Of `original`, `way_back`, `reconciliation` and `upgrade_log` go: who wants them copies them before.

DO $back$
DECLARE
  ours name;
  lost text;
  made boolean;
  old  record;
BEGIN
  -- 1. Is there a way back? ----------------------------------------------------------------------------------

  IF to_regclass('original.reconciliation') IS NULL OR to_regclass('original.way_back') IS NULL THEN
    RAISE EXCEPTION 'nothing was upgraded here: the schema original holds no reconciliation, or does not say what was moved';
  END IF;
  SELECT w.home INTO ours FROM original.way_back w WHERE w.what = 'INSTALLATION';
  IF to_regprocedure(format('%I.lastprice_schema_version()', ours)) IS NULL THEN
    RAISE EXCEPTION 'schema % does not hold lastprice any more', ours;
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'with an older snapshot it would not see what is committed while it waits'
      USING HINT = 'SET TRANSACTION ISOLATION LEVEL READ COMMITTED; before it.';
  END IF;
  -- From here on, a name without a schema is one of ours.
  PERFORM set_config('search_path', quote_ident(ours) || ', pg_temp', true), set_config('row_security', 'off', true),
          pg_advisory_xact_lock(hashtext('lastprice/install'), hashtext(ours));
  IF lastprice_schema_version() <> 1 THEN
    RAISE EXCEPTION 'schema % holds version % of lastprice, and this file drops version 1', ours, lastprice_schema_version();
  END IF;

  -- 2. What would be lost? -----------------------------------------------------------------------------------

  -- Nobody adds anything between the count and the end.
  LOCK TABLE tenants, experiments, assignments, views, conversions, waiting_conversions, webhook_events, usage, erasures
    IN ACCESS EXCLUSIVE MODE;
  SELECT string_agg(c.n || ' ' || c.what, ', ' ORDER BY c.nth) INTO lost FROM (
    SELECT 1 AS nth, 'entries of the ledger' AS what, count(*) AS n FROM conversions c
      WHERE NOT EXISTS (SELECT FROM original.conversions o
                        WHERE 'original:' || COALESCE(to_jsonb(o) ->> 'id', o.ctid::text) = c.idempotency_key)
    UNION ALL SELECT 2, 'entries that wait', count(*) FROM waiting_conversions
    UNION ALL SELECT 3, 'webhooks that are not processed', count(*) FROM webhook_events WHERE status IN ('pending', 'failed')
    UNION ALL SELECT 4, 'quotes', count(*) FROM assignments WHERE reason <> 'imported'
    UNION ALL SELECT 5, 'amounts of usage', count(*) FROM usage WHERE idempotency_key NOT LIKE 'original:%'
    UNION ALL SELECT 6, 'tenants', count(*) FROM tenants t WHERE NOT EXISTS (SELECT FROM original.tenants o WHERE o.id::text = t.id::text)
    UNION ALL SELECT 7, 'experiments', count(*) FROM experiments e
      WHERE NOT EXISTS (SELECT FROM original.experiments o WHERE o.id::text = e.id::text)
    -- Whom we forgot, the original remembers.
    UNION ALL SELECT 8, 'erasures of users', count(*) FROM erasures) c
  WHERE c.n > 0;
  IF lost IS NULL THEN
    NULL;
  ELSIF COALESCE(current_setting('lastprice.discard', true), '') = 'yes' THEN
    RAISE WARNING 'discarded, since the original does not have it: %', lost;
  ELSE
    RAISE EXCEPTION 'the original does not have what came after the upgrade: %', lost
      USING HINT = 'SET lastprice.discard = ''yes''; if that may go. Users who were erased here are to be erased there as well.';
  END IF;

  -- 3. Ours go -----------------------------------------------------------------------------------------------

  -- What needs others before what it needs; of one kind in one statement, since they need each other.
  DROP VIEW tenant_usage, tenant_experiment_metrics, tenant_variant_metrics;
  DROP MATERIALIZED VIEW experiment_metrics;
  DROP FUNCTION merge_users(text, text, text, uuid), erase_user(text, uuid);  -- they return rows of tables
  DROP TABLE tenants, experiments, assignments, views, conversions, waiting_conversions, webhook_events, ledger_locks, usage,
    recommendations, audit_trail, metric_totals, metric_deltas, metric_baselines, archived_experiments, identities, erasures,
    usage_totals, plan_limits, tenant_limits;
  DROP FUNCTION lastprice_schema_version(), app_tenant_id(), app_set_tenant(uuid), variant_names_are_unique(jsonb),
    forced_variants_exist(jsonb, jsonb), baseline_prices(jsonb, text), tenants_guard(), experiments_guard(),
    experiments_layer_guard(), experiments_delete_guard(), recommendations_guard(), recommendations_let_go(),
    assignments_are_exceptions(), broken_price_rules(numeric, numeric, integer, numeric, numeric, numeric, boolean),
    quoted_price(numeric, text, jsonb, text, text), conversions_follow(), conversions_once(), conversions_window(),
    match_waiting_conversions(uuid, text[]), conversions_opened(), config_changed(), audit_change(), metrics_go(),
    metrics_count_assignments(), metrics_count_views(), metrics_count_conversions(), fold_metric_deltas(uuid),
    fold_experiment_metrics(), recount_experiment_metrics(), refresh_experiment_metrics(), locked_users(uuid, text[]),
    lock_entries(uuid, text[]), names_one(text, text[]), webhook_without(bytea, text[], text[]), default_plan_limits(), fold_usage(uuid),
    usage_stays(), tenant_limit(uuid, text), usage_quota(uuid, text), consume_usage(uuid, text, bigint, text),
    quota_lock(uuid, text), experiment_slot(uuid);
  -- Of partition-views.sql; the partitions went with their table.
  DROP FUNCTION IF EXISTS view_partition_bound(timestamptz), create_view_partitions(integer), close_view_partition(regclass),
    empty_view_partition(regclass), drop_view_partition(regclass);
  IF NOT EXISTS (SELECT FROM original.way_back w WHERE w.what = 'USAGE' AND w.home = ours) THEN
    EXECUTE format('REVOKE USAGE ON SCHEMA %I FROM lastprice_app', ours);
  END IF;

  -- 4. The original comes back -------------------------------------------------------------------------------

  FOR old IN SELECT w.* FROM original.way_back w WHERE w.what IN ('TABLE', 'MATERIALIZED VIEW', 'VIEW', 'FUNCTION') LOOP
    EXECUTE format('ALTER %s original.%s SET SCHEMA %I', old.what, old.name, old.home);
    IF old.forced THEN
      EXECUTE format('ALTER TABLE %I.%s FORCE ROW LEVEL SECURITY', old.home, old.name);
    END IF;
  END LOOP;
  made := EXISTS (SELECT FROM original.way_back w WHERE w.what = 'SCHEMA');
  DROP TABLE IF EXISTS original.upgrade_log;
  DROP TABLE original.reconciliation, original.way_back;
  IF made THEN
    BEGIN
      DROP SCHEMA original;
    EXCEPTION WHEN dependent_objects_still_exist THEN
      RAISE NOTICE 'the schema original stays, since it holds more';
    END;
  END IF;
END $back$;
