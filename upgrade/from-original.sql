-- Copies what the original Last Price has collected into the tables of lastprice, version 1, and says what became of it. The
-- original's tables are in the schema `original` (move-original.sql), ours are installed, and
-- `lastprice.currency` names the currency of the original's amounts, which have none:
--
--   psql -X -1 -v ON_ERROR_STOP=1 -d lastprice -c "SET lastprice.currency = 'USD'" \
--        -f upgrade/move-original.sql -f schema.sql -f upgrade/from-original.sql
--
-- One statement and a report: all is copied or nothing. No row of the original's is changed. In `original` it leaves `upgrade_log`, with
-- each row that was not taken, or not as it was, and why; and `reconciliation`, with the counts and sums of both sides. If these
-- do not differ by exactly what the log says, nothing is copied.
--
-- The columns that the original's description names must be there, others may: a row is read as JSON, so that a column that is
-- missing reads as NULL, and one that we know nothing of is kept in `metadata`, under `original`.

DO $upgrade$
DECLARE
  home     constant name := current_schema();
  money    constant text := current_setting('lastprice.currency', true);
  coin     constant text := '^(?!XXX)[A-Z]{3}$';
  mail     constant text := '^[^[:space:]@]+@[^[:space:]@]+$';
  is_uuid  constant text := '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$';
  too_late constant timestamptz := '10000-01-01 00:00:00+00';
  any_key  constant text := 'key|secret|token|passw|credential';
  api_key  constant text := 'api.?key|secret|token|passw|credential';  -- an experiment has a key, and so have its variants
  leaves_out constant text := 'what a column''s or a member''s name calls a key, secret, token, password or credential is left out';
  version  integer;
  wrong    text;
BEGIN
  -- 1. Is everything as it must be? ------------------------------------------------------------------------

  IF COALESCE(money !~ coin, true) THEN
    RAISE EXCEPTION 'the setting lastprice.currency does not name a currency'
      USING HINT = 'SET lastprice.currency = ''USD''; or in which the original''s prices are, by its three letters.';
  END IF;
  IF to_regclass('original.conversions') IS NULL OR to_regclass('original.way_back') IS NULL OR home = 'original' THEN
    RAISE EXCEPTION 'the schema original does not hold the original''s tables' USING HINT = 'Run upgrade/move-original.sql first.';
  END IF;
  IF to_regprocedure(format('%I.lastprice_schema_version()', home)) IS NOT NULL THEN
    EXECUTE format('SELECT %I.lastprice_schema_version()', home) INTO version;
  END IF;
  IF version IS DISTINCT FROM 1 THEN
    RAISE EXCEPTION 'schema % does not hold version 1 of lastprice', home USING HINT = 'Run schema.sql first.';
  END IF;
  IF to_regclass('original.reconciliation') IS NOT NULL THEN
    RAISE EXCEPTION 'this was done before: see original.reconciliation';
  END IF;
  PERFORM set_config('search_path', quote_ident(home) || ', pg_temp', true), set_config('row_security', 'off', true),
          set_config('app.actor', 'upgrade/from-original.sql', true);
  LOCK TABLE original.tenants, original.experiments, original.assignments, original.views, original.conversions IN SHARE MODE;

  -- Its text depends on the server's locale: who knows what 1.234 is?
  SELECT string_agg(format('original.%I.%I', c.relname, a.attname), ', ') INTO wrong
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  WHERE c.relnamespace = 'original'::regnamespace AND a.atttypid = 'money'::regtype AND a.attnum > 0 AND NOT a.attisdropped;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'these columns have the type money, which has no currency: %', wrong
      USING HINT = 'In the original: ALTER TABLE … ALTER … TYPE numeric; and begin again.';
  END IF;

  CREATE TABLE original.upgrade_log (
    source text NOT NULL, key text NOT NULL, of text, fate text NOT NULL, reason text NOT NULL, amount numeric
  );
  COMMENT ON COLUMN original.upgrade_log.key IS 'the id of the row in the table that source names; of a table without ids, its ctid';
  COMMENT ON COLUMN original.upgrade_log.of IS 'the experiment, or the tenant where there is none';
  COMMENT ON COLUMN original.upgrade_log.fate IS 'rejected: it was not taken; changed: not as it was; made: it was not there';
  CREATE TABLE original.reconciliation (
    of text, name text, what text NOT NULL, original numeric NOT NULL, lastprice numeric NOT NULL, explained numeric NOT NULL, why text
  );
  COMMENT ON COLUMN original.reconciliation.explained IS 'what the reasons in why add up to: lastprice - original';

  -- A number in a text, or NULL.
  CREATE FUNCTION pg_temp.number(t text) RETURNS numeric LANGUAGE sql IMMUTABLE AS $f$
    SELECT CASE WHEN t ~ '^\s*[-+]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][-+]?[0-9]{1,3})?\s*$' THEN t::numeric END $f$;
  -- As an amount is stored: six decimals at the most.
  CREATE FUNCTION pg_temp.amount(n numeric) RETURNS numeric LANGUAGE sql IMMUTABLE AS $f$
    SELECT CASE WHEN scale(n) > 6 THEN round(n, 6) ELSE n END $f$;
  -- Where a row without an id is; of a partition, with its name.
  CREATE FUNCTION pg_temp.place(of oid, row_is tid) RETURNS text LANGUAGE sql STABLE AS $f$
    SELECT CASE WHEN (SELECT c.relispartition FROM pg_class c WHERE c.oid = of) THEN of::regclass::text ELSE '' END || row_is $f$;
  -- A time, or a document, in a text, or NULL.
  CREATE FUNCTION pg_temp.time(t text) RETURNS timestamptz LANGUAGE plpgsql STABLE AS $f$
    BEGIN RETURN t::timestamptz; EXCEPTION WHEN data_exception THEN RETURN NULL; END $f$;
  CREATE FUNCTION pg_temp.json(t text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $f$
    BEGIN RETURN t::jsonb; EXCEPTION WHEN data_exception THEN RETURN NULL; END $f$;
  -- A row that its own columns say is no more.
  CREATE FUNCTION pg_temp.is_deleted(j jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $f$
    SELECT COALESCE(j ->> 'deleted_at', j ->> 'voided_at') IS NOT NULL OR 'true' IN (j ->> 'deleted', j ->> 'is_deleted', j ->> 'voided', j ->> 'is_voided')
      OR lower(j ->> 'status') IN ('deleted', 'void', 'voided') $f$;
  -- Whatever its name says is a secret, at any depth, is left out.
  CREATE FUNCTION pg_temp.without_secrets(j jsonb, names text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $f$
    BEGIN RETURN CASE jsonb_typeof(j)
      WHEN 'object' THEN (SELECT COALESCE(jsonb_object_agg(m.key, pg_temp.without_secrets(m.value, names)), '{}') FROM jsonb_each(j) m
                          WHERE m.key !~* names)
      WHEN 'array' THEN (SELECT COALESCE(jsonb_agg(pg_temp.without_secrets(e.e, names) ORDER BY e.n), '[]') FROM jsonb_array_elements(j) WITH ORDINALITY e (e, n))
      ELSE j END; END $f$;
  -- The metadata of a row: its own, and of all other columns those that we do not know, under `original`.
  CREATE FUNCTION pg_temp.metadata(j jsonb, known text[]) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $f$
    SELECT CASE jsonb_typeof(j -> 'metadata') WHEN 'object' THEN j -> 'metadata' ELSE '{}' END
      || COALESCE((SELECT jsonb_build_object('original', jsonb_object_agg(c.key, c.value)) FROM jsonb_each(j - known) c
                   WHERE c.value <> 'null' AND NOT (c.key = 'metadata' AND jsonb_typeof(c.value) = 'object')), '{}') $f$;
  CREATE FUNCTION pg_temp.id(source text, key text) RETURNS uuid LANGUAGE sql IMMUTABLE AS $f$
    SELECT CASE WHEN key ~ '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' THEN key::uuid ELSE substr(encode(sha256(convert_to('original/' || source || '/' || key, 'UTF8')), 'hex'), 1, 32)::uuid END $f$;

  -- 2. Tenants: all of them, or it stops -------------------------------------------------------------------

  CREATE TEMP TABLE upgrade_tenants ON COMMIT DROP AS
  SELECT j, j ->> 'id' AS key, btrim(j ->> 'email') AS email, NULLIF(btrim(left(btrim(j ->> 'name'), 200)), '') AS name,
         CASE WHEN lower(j ->> 'mode') = 'byok' AND j ->> 'paid_api_key' <> '' THEN 'byok' ELSE 'managed' END AS mode,
         CASE WHEN lower(j ->> 'plan') IN ('starter', 'pro', 'enterprise') THEN lower(j ->> 'plan') ELSE 'free' END AS plan,
         pg_temp.time(j ->> 'created_at') AS created_at
  FROM (SELECT to_jsonb(whole) AS j FROM original.tenants whole) o;
  SELECT left(string_agg(t.key, ', '), 1000) INTO wrong FROM upgrade_tenants t
  WHERE NOT COALESCE(t.key ~ is_uuid AND t.email ~ mail AND char_length(t.email) <= 320, false);
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'these tenants have an id that is no UUID, or no e-mail address: %', wrong
      USING HINT = 'Correct the original''s rows, and begin again: no tenant is left out.';
  END IF;
  SELECT left(string_agg(t.key, ', '), 1000) INTO wrong FROM upgrade_tenants t
  WHERE EXISTS (SELECT FROM upgrade_tenants u WHERE lower(u.email) = lower(t.email) AND u.key <> t.key)
     OR EXISTS (SELECT FROM tenants u WHERE lower(u.email) = lower(t.email) OR u.id = t.key::uuid);
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'these tenants have an e-mail address that another one has, upper and lower case being the same, or are there already: %', wrong
      USING HINT = 'Correct the original''s rows, and begin again: no tenant is left out.';
  END IF;

  -- The secrets are taken as they are: Admin::rewrap_secrets() encrypts them. A column of a secret that we do not know stays where it is.
  INSERT INTO tenants (id, name, email, mode, plan, paid_api_key, webhook_secret, metadata, created_at)
  SELECT key::uuid, COALESCE(name, left(email, 200)), email, mode, plan, NULLIF(j ->> 'paid_api_key', ''), NULLIF(j ->> 'webhook_secret', ''),
         pg_temp.metadata(pg_temp.without_secrets(j, any_key), '{id,name,email,mode,plan,created_at,updated_at}'),
         CASE WHEN isfinite(created_at) AND created_at < too_late THEN created_at ELSE now() END
  FROM upgrade_tenants;
  INSERT INTO original.upgrade_log
  SELECT 'tenants', t.key, t.key, 'changed', n.note FROM upgrade_tenants t CROSS JOIN LATERAL (VALUES
    (t.name IS DISTINCT FROM t.j ->> 'name', 'its name is empty or has spaces around it, or more than 200 characters: trimmed, or its e-mail address'),
    (t.mode IS DISTINCT FROM lower(t.j ->> 'mode'), 'its mode is neither managed nor byok with a key: managed'),
    (pg_temp.is_deleted(t.j), 'it was deleted: it is here, its experiments are completed'),
    (pg_temp.without_secrets(t.j, any_key) <> t.j - '{paid_api_key,webhook_secret}'::text[], leaves_out),
    (t.plan IS DISTINCT FROM lower(t.j ->> 'plan'), 'its plan is none of free, starter, pro and enterprise: free')) n (holds, note)
  WHERE n.holds;

  -- 3. Experiments: those whose prices can be read -----------------------------------------------------------

  -- A variant is an element of a list, or a member of an object by its name.
  CREATE TEMP TABLE upgrade_variants ON COMMIT DROP AS
  SELECT o.id::text AS of, v.n, v.v, NULL::text AS name, pg_temp.amount(pg_temp.number(v.v ->> 'price')) AS price,
         round(pg_temp.number(translate(COALESCE(v.v ->> 'weight', v.v ->> 'allocation', v.v ->> 'percentage'), '%', '')), 6) AS weight
  FROM original.experiments o CROSS JOIN LATERAL (
    SELECT CASE jsonb_typeof(j.list) WHEN 'string' THEN pg_temp.json(j.list #>> '{}') ELSE j.list END AS list FROM (SELECT to_jsonb(o) -> 'variants') j (list)
  ) l CROSS JOIN LATERAL (
    SELECT n, CASE jsonb_typeof(e) WHEN 'object' THEN e ELSE jsonb_build_object('name', e) END
    FROM jsonb_array_elements(CASE jsonb_typeof(l.list) WHEN 'array' THEN l.list ELSE '[]' END) WITH ORDINALITY a (e, n)
    UNION ALL
    SELECT row_number() OVER (ORDER BY m.key), jsonb_build_object('name', m.key) || CASE jsonb_typeof(m.value) WHEN 'object' THEN m.value - 'name'
      ELSE jsonb_build_object('price', m.value) END
    FROM jsonb_each(CASE jsonb_typeof(l.list) WHEN 'object' THEN l.list ELSE '{}' END) m) v (n, v);
  -- What the events call a variant by: the member that says what most of them say.
  CREATE TEMP TABLE upgrade_seen ON COMMIT DROP AS
  SELECT j ->> 'experiment_id' AS of, COALESCE(j ->> 'variant', j ->> 'variant_id') AS variant FROM (
    SELECT to_jsonb(whole) AS j FROM original.assignments whole UNION ALL SELECT to_jsonb(whole) FROM original.views whole
    UNION ALL SELECT to_jsonb(whole) FROM original.conversions whole OFFSET 0) o
  GROUP BY 1, 2;
  ANALYZE upgrade_variants, upgrade_seen;  -- the planner would think them small
  UPDATE upgrade_variants v SET name = v.v ->> best.member FROM (
    SELECT DISTINCT ON (c.of) c.of, c.member FROM (
      SELECT v.of, m.member, m.nth, count(s.variant) AS said FROM upgrade_variants v
      CROSS JOIN (VALUES ('name', 1), ('id', 2), ('key', 3), ('variant', 4)) m (member, nth)
      LEFT JOIN upgrade_seen s ON s.of = v.of AND s.variant = v.v ->> m.member
      GROUP BY 1, 2, 3 HAVING count(DISTINCT v.v ->> m.member) = count(DISTINCT v.n)) c
    ORDER BY c.of, c.said DESC, c.nth) best
  WHERE best.of = v.of;
  CREATE INDEX ON upgrade_variants (of, name);
  ANALYZE upgrade_tenants, upgrade_variants, upgrade_seen;

  CREATE TEMP TABLE upgrade_experiments ON COMMIT DROP AS
  SELECT o.j, o.j ->> 'id' AS of, t.key::uuid AS tenant_id, lower(btrim(o.j ->> 'status')) AS said,
         NULLIF(btrim(left(btrim(o.j ->> 'name'), 200)), '') AS name,
         COALESCE(upper(NULLIF(btrim(o.j ->> 'currency'), '')), money) AS currency,
         CASE WHEN isfinite(d.start_date) THEN LEAST(d.start_date, '9999-12-31Z') END AS start_date,
         CASE WHEN isfinite(d.end_date) THEN LEAST(d.end_date, '9999-12-31Z') END AS end_date,
         CASE WHEN isfinite(d.created_at) THEN LEAST(d.created_at, now()) ELSE now() END AS created_at,
         pg_temp.is_deleted(o.j) OR COALESCE(pg_temp.is_deleted(t.j), false) AS is_deleted,
         EXISTS (SELECT FROM upgrade_seen s WHERE s.of = o.j ->> 'id') AS has_events, v.variants, v.weighted, v.control,
         NULL::text AS status, NULL::text AS key,
         CASE WHEN NOT COALESCE(o.j ->> 'id' ~ is_uuid, false) THEN 'its id is no UUID'
              WHEN t.key IS NULL THEN 'there is no such tenant'
              WHEN COALESCE(v.n, 0) NOT BETWEEN 1 AND 1000 THEN 'its variants are no list of 1 to 1000'
              WHEN NOT v.named THEN 'a variant has no name of its own'
              WHEN NOT v.priced THEN 'a variant has no price that can be read'
              WHEN COALESCE(upper(NULLIF(btrim(o.j ->> 'currency'), '')) !~ coin, false) THEN 'its currency is none' END AS fault
  FROM (SELECT to_jsonb(whole) AS j FROM original.experiments whole) o
  CROSS JOIN LATERAL (SELECT pg_temp.time(o.j ->> 'start_date') AS start_date, pg_temp.time(o.j ->> 'end_date') AS end_date,
                             pg_temp.time(o.j ->> 'created_at') AS created_at) d
  LEFT JOIN upgrade_tenants t ON t.key = o.j ->> 'tenant_id'
  LEFT JOIN LATERAL (
    -- Weights are whole numbers: 33.4 % and 66.6 % are 334 and 666.
    SELECT count(*) AS n, bool_and(COALESCE(v.name ~ '^[^\u0001-\u001f\u007f-\u009f]{1,128}$', false)) AND count(DISTINCT v.name) = count(*) AS named,
           bool_and(COALESCE(v.price >= 0 AND v.price < 1e12, false)) AS priced, bool_and(w.ok) AS weighted,
           min(v.name) FILTER (WHERE lower(v.name) = 'control' OR 'true' IN (v.v ->> 'is_control', v.v ->> 'control')) AS control,
           jsonb_agg(jsonb_build_object('name', v.name, 'weight', CASE WHEN w.ok THEN (v.weight * w.scale)::bigint ELSE 1 END, 'price', v.price::text)
                     ORDER BY v.n) AS variants
    FROM upgrade_variants v CROSS JOIN (
      SELECT s.scale, COALESCE(bool_and(u.weight IS NOT NULL AND u.weight >= 0 AND u.weight * s.scale <= 4294967295) AND sum(u.weight) > 0, false) AS ok
      FROM upgrade_variants u CROSS JOIN (VALUES (1::numeric), (10), (100), (1000), (10000), (100000), (1000000)) s (scale)
      WHERE u.of = o.j ->> 'id' GROUP BY s.scale
      ORDER BY bool_and(u.weight * s.scale = floor(u.weight * s.scale)) DESC NULLS LAST, s.scale LIMIT 1) w
    WHERE v.of = o.j ->> 'id') v ON true;
  ANALYZE upgrade_experiments;
  -- A draft may be changed at will, and what is active gives new users a price: neither, where we are not sure.
  UPDATE upgrade_experiments x SET
    status = CASE WHEN m.status = 'draft' AND x.has_events OR m.status = 'active' AND NOT x.weighted THEN 'paused' ELSE m.status END,
    key = CASE WHEN k.nth = 1 AND k.slug ~ '^[A-Za-z0-9]' THEN left(k.slug, 128) ELSE left('x-' || k.slug, 90) || '-' || x.of END
  FROM (SELECT of, CASE WHEN is_deleted THEN 'completed'
                        WHEN said IN ('draft', 'pending', 'scheduled', 'new') THEN 'draft'
                        WHEN said IN ('active', 'running', 'live', 'started') THEN 'active'
                        WHEN said IN ('completed', 'complete', 'ended', 'finished', 'archived', 'stopped') THEN 'completed'
                        ELSE 'paused' END AS status FROM upgrade_experiments) m,
       (SELECT of, slug, row_number() OVER (PARTITION BY tenant_id, slug ORDER BY created_at, of) AS nth FROM (
          SELECT of, tenant_id, created_at, left(btrim(regexp_replace(lower(name), '[^a-z0-9_.]+', '-', 'g'), '-'), 128) AS slug
          FROM upgrade_experiments) s) k
  WHERE m.of = x.of AND k.of = x.of AND x.fault IS NULL;
  UPDATE upgrade_experiments SET key = 'x-' || of WHERE fault IS NULL AND key IS NULL;  -- without a name
  SELECT string_agg(DISTINCT fault, '; ') INTO wrong FROM upgrade_experiments HAVING count(*) > 0 AND count(*) = count(fault);
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'not one experiment can be taken: %', wrong USING HINT = 'Correct the original''s rows, and begin again.';
  END IF;

  INSERT INTO experiments (tenant_id, id, key, name, status, currency, variants, baseline, exceptions, metadata, start_date, end_date, created_at)
  SELECT tenant_id, of::uuid, key, COALESCE(name, key), status, currency, variants, control, has_events,
         pg_temp.metadata(pg_temp.without_secrets(j - 'variants', api_key) || jsonb_build_object('variants', j -> 'variants'),
                          '{id,tenant_id,name,status,currency,start_date,end_date,created_at,updated_at}'),
         start_date, CASE WHEN end_date < start_date THEN NULL ELSE end_date END, created_at
  FROM upgrade_experiments WHERE fault IS NULL;
  INSERT INTO original.upgrade_log
  SELECT 'experiments', COALESCE(x.of, '?'), COALESCE(x.of, '?'), CASE WHEN x.fault IS NULL THEN 'changed' ELSE 'rejected' END, n.note
  FROM upgrade_experiments x CROSS JOIN LATERAL (VALUES
    (x.fault IS NOT NULL, x.fault),
    (x.fault IS NULL AND x.name IS DISTINCT FROM x.j ->> 'name', 'its name is empty or has spaces around it, or more than 200 characters: trimmed, or its key'),
    (x.fault IS NULL AND NOT x.weighted, 'its weights cannot be read: all are 1'),
    (x.fault IS NULL AND x.is_deleted, 'it was deleted, or its tenant was: completed'),
    (x.fault IS NULL AND pg_temp.without_secrets(x.j - 'variants', api_key) <> x.j - 'variants', leaves_out),
    (x.fault IS NULL AND x.status IS DISTINCT FROM x.said, format('its status %s is %s', COALESCE(left(x.said, 20), 'NULL'), x.status)),
    (x.fault IS NULL AND x.end_date < x.start_date, 'it ends before it starts: without an end'),
    (x.fault IS NULL AND EXISTS (SELECT FROM upgrade_variants v WHERE v.of = x.of AND v.price <> pg_temp.number(v.v ->> 'price')),
     'a price has more than 6 decimals: rounded')) n (holds, note)
  WHERE n.holds;

  -- 4. Events: their tenant is their experiment's -------------------------------------------------------------

  CREATE TEMP TABLE upgrade_events ON COMMIT DROP AS
  SELECT o.source, o.key, o.j, COALESCE(o.j ->> 'experiment_id', '?') AS of, x.tenant_id, x.of::uuid AS experiment_id, o.j ->> 'user_id' AS user_id,
         v.price, x.currency AS quoted_in, u.variant, COALESCE(u.at, x.start_date, x.created_at) AS at, u.at IS NULL AS timeless,
         m.amount AS said, pg_temp.amount(m.amount) AS amount,
         CASE o.source WHEN 'conversions' THEN COALESCE(upper(NULLIF(btrim(o.j ->> 'currency'), '')), x.currency, money) END AS currency,
         COALESCE(o.j ->> 'order_id', o.j ->> 'transaction_id') AS order_id,
         CASE WHEN x.of IS NULL THEN CASE WHEN EXISTS (SELECT FROM upgrade_experiments y WHERE y.of = o.j ->> 'experiment_id')
                                          THEN 'its experiment was not taken' ELSE 'there is no such experiment' END
              WHEN NOT COALESCE(octet_length(o.j ->> 'user_id') BETWEEN 1 AND 512, false) THEN 'its user id is empty or has more than 512 bytes'
              WHEN pg_temp.is_deleted(o.j) THEN 'it was deleted'
              WHEN NOT COALESCE(isfinite(u.at) AND u.at < too_late, true) THEN 'its time is none'
              WHEN char_length(u.variant) NOT BETWEEN 1 AND 128 THEN 'its variant is empty or has more than 128 characters'
              WHEN o.source = 'assignments' AND v.of IS NULL THEN 'its variant is none of its experiment, so it has no price'
              WHEN o.source <> 'conversions' THEN NULL
              WHEN m.amount IS NULL THEN 'its revenue is no number'
              WHEN abs(m.amount) >= 1e12 THEN 'its revenue has more than 12 digits'
              WHEN COALESCE(upper(NULLIF(btrim(o.j ->> 'currency'), '')) !~ coin, false) THEN 'its currency is none' END AS fault
  FROM (SELECT r.source, r.stamp, COALESCE(r.j ->> 'id', r.place) AS key, r.j FROM (
          SELECT 'assignments' AS source, 'assigned_at' AS stamp, pg_temp.place(whole.tableoid, whole.ctid) AS place, to_jsonb(whole) AS j FROM original.assignments whole
          UNION ALL SELECT 'views', 'viewed_at', pg_temp.place(whole.tableoid, whole.ctid), to_jsonb(whole) FROM original.views whole
          UNION ALL SELECT 'conversions', 'converted_at', pg_temp.place(whole.tableoid, whole.ctid), to_jsonb(whole) FROM original.conversions whole
          OFFSET 0) r) o  -- else the planner writes to_jsonb() wherever a member is asked for
  CROSS JOIN LATERAL (SELECT COALESCE(o.j ->> 'variant', o.j ->> 'variant_id') AS variant,
    pg_temp.time(COALESCE(o.j ->> o.stamp, o.j ->> 'occurred_at', o.j ->> 'timestamp', o.j ->> 'created_at')) AS at) u
  CROSS JOIN LATERAL (SELECT CASE WHEN o.source = 'conversions' THEN pg_temp.number(COALESCE(o.j ->> 'revenue', o.j ->> 'amount', '0')) END AS amount) m
  LEFT JOIN upgrade_experiments x ON x.of = o.j ->> 'experiment_id' AND x.fault IS NULL
  LEFT JOIN upgrade_variants v ON v.of = x.of AND v.name = u.variant;
  ANALYZE upgrade_events;
  UPDATE upgrade_events e SET fault = 'its user has an earlier one in the experiment' FROM (
    SELECT key, row_number() OVER (PARTITION BY of, user_id ORDER BY at, key) AS nth FROM upgrade_events WHERE source = 'assignments' AND fault IS NULL) d
  WHERE e.source = 'assignments' AND e.key = d.key AND d.nth > 1;
  -- Not what went back: equal parts of an order may be refunded one after the other.
  UPDATE upgrade_events e SET fault = 'its order and amount are those of an earlier one' FROM (
    SELECT key, row_number() OVER (PARTITION BY of, user_id, order_id, amount, e.currency ORDER BY at, key) AS nth FROM upgrade_events e
    WHERE source = 'conversions' AND fault IS NULL AND amount >= 0 AND octet_length(order_id) BETWEEN 1 AND 255) d
  WHERE e.source = 'conversions' AND e.key = d.key AND d.nth > 1;

  IF (SELECT count(*) > 0 AND count(amount) = 0 FROM upgrade_events
      WHERE source = 'conversions' AND COALESCE(j ->> 'revenue', j ->> 'amount') IS NOT NULL) THEN
    RAISE EXCEPTION 'not one revenue of original.conversions is a number' USING HINT = 'Correct the original''s rows, and begin again.';
  END IF;

  INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason, assigned_at)
  SELECT tenant_id, experiment_id, user_id, variant, price, quoted_in, 'imported', at
  FROM upgrade_events WHERE source = 'assignments' AND fault IS NULL;
  ANALYZE assignments;
  UPDATE upgrade_events e SET variant = a.variant FROM assignments a
  WHERE e.variant IS NULL AND a.tenant_id = e.tenant_id AND a.experiment_id = e.experiment_id AND a.user_id = e.user_id;
  UPDATE upgrade_events SET fault = 'it names no variant, and its user has none' WHERE variant IS NULL AND fault IS NULL;
  -- Who saw a price, or paid it, keeps it, also where nobody wrote down the assignment.
  WITH made AS (
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason, assigned_at)
    SELECT DISTINCT ON (tenant_id, experiment_id, user_id) tenant_id, experiment_id, user_id, variant, price, quoted_in, 'imported', at
    FROM upgrade_events WHERE source <> 'assignments' AND fault IS NULL AND price IS NOT NULL
    ORDER BY tenant_id, experiment_id, user_id, at, key
    ON CONFLICT DO NOTHING RETURNING experiment_id, user_id)
  INSERT INTO original.upgrade_log SELECT 'assignments', user_id, experiment_id, 'made', 'of the first view or conversion of a user without one' FROM made;
  ANALYZE assignments;

  INSERT INTO views (tenant_id, id, experiment_id, user_id, variant, reason, occurred_at, metadata)
  SELECT tenant_id, pg_temp.id(source, key), experiment_id, user_id, variant, 'imported', at,
         pg_temp.metadata(j, '{id,experiment_id,user_id,variant,variant_id,viewed_at,occurred_at,timestamp,created_at,tenant_id}')
  FROM upgrade_events WHERE source = 'views' AND fault IS NULL;
  -- Sales first: what went back of an order finds it. Where nobody knows the order it stands by itself.
  FOR pass IN 0..1 LOOP
    INSERT INTO conversions (tenant_id, id, experiment_id, user_id, variant, reason, assigned_at, kind, revenue, currency, order_id,
                             idempotency_key, occurred_at, metadata)
    SELECT e.tenant_id, pg_temp.id(e.source, e.key), e.experiment_id, e.user_id, e.variant, 'imported', a.assigned_at,
           CASE pass WHEN 0 THEN 'sale' ELSE 'refund' END, e.amount, e.currency,
           CASE WHEN octet_length(e.order_id) BETWEEN 1 AND 255 AND (pass = 0 OR EXISTS (
             SELECT FROM conversions c WHERE c.tenant_id = e.tenant_id AND c.order_id = e.order_id AND c.experiment_id = e.experiment_id
               AND c.user_id = e.user_id)) THEN e.order_id END,
           'original:' || e.key, e.at,
           pg_temp.metadata(j, '{id,experiment_id,user_id,variant,variant_id,revenue,currency,converted_at,occurred_at,timestamp,created_at,tenant_id}')
    FROM upgrade_events e LEFT JOIN assignments a ON a.tenant_id = e.tenant_id AND a.experiment_id = e.experiment_id AND a.user_id = e.user_id
    WHERE e.source = 'conversions' AND e.fault IS NULL AND (e.amount < 0) = (pass = 1);
  END LOOP;
  INSERT INTO original.upgrade_log
  SELECT e.source, e.key, e.of, CASE WHEN e.fault IS NULL THEN 'changed' ELSE 'rejected' END, n.note, e.said
  FROM upgrade_events e CROSS JOIN LATERAL (VALUES
    (e.fault IS NOT NULL, e.fault),
    (e.fault IS NULL AND e.timeless, 'it has no time: when its experiment began'),
    (e.fault IS NULL AND e.price IS NULL AND NOT EXISTS (SELECT FROM upgrade_variants v WHERE v.of = e.of AND v.name = e.variant),
     'its variant is none of its experiment: counted under its name'),
    (e.fault IS NULL AND e.source = 'conversions' AND COALESCE(e.j ->> 'revenue', e.j ->> 'amount') IS NULL, 'its revenue is NULL: 0'),
    (e.fault IS NULL AND e.amount < 0, 'its revenue is negative: a refund'),
    (e.fault IS NULL AND e.amount <> e.said, 'its revenue has more than 6 decimals: rounded')) n (holds, note)
  WHERE n.holds;

  -- 5. Usage and recommendations, if there are any --------------------------------------------------------------

  CREATE TEMP TABLE upgrade_usage (key text, of text, metric text, day date, said numeric, fault text) ON COMMIT DROP;
  IF to_regclass('original.usage') IS NOT NULL THEN
    -- A row has a metric, or a column for each.
    INSERT INTO upgrade_usage
    SELECT u.key, u.of, u.metric, u.day, u.said,
           CASE WHEN t.key IS NULL THEN 'there is no such tenant'
                WHEN NOT COALESCE(u.metric ~ '^[a-z][a-z0-9_.]{0,63}$', false) THEN 'its metric is not 1 to 64 of a-z, 0-9, _ and .'
                WHEN NOT COALESCE(isfinite(u.day), false) THEN 'it has no day'
                WHEN NOT COALESCE(u.said BETWEEN 0 AND 1000000000000 AND u.said = floor(u.said), false) THEN 'its amount is no whole number from 0 to 10^12' END
    FROM (SELECT o.key || CASE WHEN o.j ? 'metric' THEN '' ELSE '/' || m.metric END AS key, COALESCE(o.j ->> 'tenant_id', '?') AS of,
                 regexp_replace(lower(m.metric), '[^a-z0-9_.]', '_', 'g') AS metric, pg_temp.number(m.amount) AS said,
                 pg_temp.time(COALESCE(o.j ->> 'date', o.j ->> 'day', o.j ->> 'usage_date'))::date AS day
          FROM (SELECT COALESCE(to_jsonb(whole) ->> 'id', whole.ctid::text) AS key, to_jsonb(whole) AS j FROM original.usage whole) o
          CROSS JOIN LATERAL (
            SELECT o.j ->> 'metric', COALESCE(o.j ->> 'value', o.j ->> 'count', o.j ->> 'amount') WHERE o.j ? 'metric'
            UNION ALL SELECT c.key, c.value::text FROM jsonb_each(o.j - 'id') c WHERE NOT o.j ? 'metric' AND jsonb_typeof(c.value) = 'number') m (metric, amount)) u
    LEFT JOIN upgrade_tenants t ON t.key = u.of;
    -- What is metered by itself is metered of the rows above, too: the original's own count beside it would double it.
    INSERT INTO original.upgrade_log
    SELECT 'usage', key, of, CASE WHEN fault IS NULL THEN 'changed' ELSE 'rejected' END,
           COALESCE(fault, format('its metric is metered by itself: it is original.%s', metric)), said
    FROM upgrade_usage WHERE fault IS NOT NULL OR metric IN ('signals', 'experiments', 'active_experiments');
    INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
    SELECT of::uuid, CASE WHEN metric IN ('signals', 'experiments', 'active_experiments') THEN 'original.' ELSE '' END || metric,
           day, said::bigint, 'original:' || key
    FROM upgrade_usage WHERE fault IS NULL;
  END IF;

  CREATE TEMP TABLE upgrade_recommendations (key text, j jsonb, of text, tenant_id uuid, price numeric, currency text, sure numeric, status text, fault text)
    ON COMMIT DROP;
  IF to_regclass('original.recommendations') IS NOT NULL THEN
    INSERT INTO upgrade_recommendations
    SELECT o.key, o.j, COALESCE(o.j ->> 'experiment_id', '?'), x.tenant_id, p.price, x.currency, pg_temp.number(o.j ->> 'confidence'),
           CASE WHEN s.said IN ('approved', 'applied', 'rejected', 'expired') THEN s.said ELSE 'proposed' END,
           CASE WHEN x.of IS NULL THEN 'it is of no experiment that was taken'
                WHEN NOT COALESCE(p.price >= 0 AND p.price < 1e12, false) THEN 'it has no price that can be read' END
    FROM (SELECT COALESCE(to_jsonb(whole) ->> 'id', whole.ctid::text) AS key, to_jsonb(whole) AS j FROM original.recommendations whole) o
    CROSS JOIN LATERAL (SELECT pg_temp.amount(pg_temp.number(COALESCE(o.j ->> 'recommended_price', o.j ->> 'price'))) AS price) p
    CROSS JOIN LATERAL (SELECT lower(o.j ->> 'status') AS said) s
    LEFT JOIN upgrade_experiments x ON x.of = o.j ->> 'experiment_id' AND x.fault IS NULL;
    -- What the original expected has no unit: it is kept, and not compared.
    INSERT INTO recommendations (tenant_id, id, experiment_id, price, currency, confidence, simulation, source, created_at, status)
    SELECT tenant_id, pg_temp.id('recommendations', key), of::uuid, price, currency,
           CASE WHEN sure BETWEEN 0 AND 1 THEN sure WHEN sure BETWEEN 1 AND 100 THEN sure / 100 ELSE 0 END,
           jsonb_build_object('original', j - '{id,tenant_id,experiment_id}'::text[]), 'jale', COALESCE(pg_temp.time(j ->> 'created_at'), now()), status
    FROM upgrade_recommendations WHERE fault IS NULL;
    INSERT INTO original.upgrade_log
    SELECT 'recommendations', r.key, r.of, CASE WHEN r.fault IS NULL THEN 'changed' ELSE 'rejected' END, n.note
    FROM upgrade_recommendations r CROSS JOIN LATERAL (VALUES
      (r.fault IS NOT NULL, r.fault),
      (r.fault IS NULL AND r.status IS DISTINCT FROM lower(r.j ->> 'status'), 'its status is none of ours: proposed'),
      (r.fault IS NULL AND NOT COALESCE(r.sure BETWEEN 0 AND 100, false), 'its confidence cannot be read: 0')) n (holds, note)
    WHERE n.holds;
  END IF;

  -- 6. Both sides, and what is between them ---------------------------------------------------------------------

  WITH theirs (of, what, n) AS (
    SELECT '', 'tenants', count(*)::numeric FROM original.tenants
    UNION ALL SELECT '', 'experiments', count(*) FROM original.experiments
    UNION ALL SELECT x.of, w, 0 FROM upgrade_experiments x
      CROSS JOIN LATERAL unnest(ARRAY['assignments', 'views', 'conversions', 'revenue in ' || x.currency]) w WHERE x.fault IS NULL
    UNION ALL SELECT COALESCE(experiment_id::text, '?'), 'assignments', count(*) FROM original.assignments GROUP BY 1
    UNION ALL SELECT COALESCE(experiment_id::text, '?'), 'views', count(*) FROM original.views GROUP BY 1
    UNION ALL SELECT COALESCE(experiment_id::text, '?'), 'conversions', count(*) FROM original.conversions GROUP BY 1
    UNION ALL SELECT e.of, 'revenue in ' || e.currency, sum(e.said) FROM upgrade_events e WHERE e.said IS NOT NULL GROUP BY 1, 2
    UNION ALL SELECT of, 'usage', sum(said) FROM upgrade_usage WHERE said IS NOT NULL GROUP BY 1
    UNION ALL SELECT of, 'recommendations', count(*) FROM upgrade_recommendations GROUP BY 1
  ), ours (of, what, n) AS (
    SELECT '', 'tenants', count(*)::numeric FROM tenants t JOIN upgrade_tenants u ON u.key::uuid = t.id
    UNION ALL SELECT '', 'experiments', count(*) FROM experiments e JOIN upgrade_tenants u ON u.key::uuid = e.tenant_id
    UNION ALL SELECT a.experiment_id::text, 'assignments', count(*) FROM assignments a JOIN upgrade_tenants u ON u.key::uuid = a.tenant_id GROUP BY 1
    UNION ALL SELECT v.experiment_id::text, 'views', count(*) FROM views v JOIN upgrade_tenants u ON u.key::uuid = v.tenant_id GROUP BY 1
    UNION ALL SELECT c.experiment_id::text, 'conversions', count(*) FILTER (WHERE c.kind = 'sale')
      FROM conversions c JOIN upgrade_tenants u ON u.key::uuid = c.tenant_id GROUP BY 1
    UNION ALL SELECT c.experiment_id::text, 'revenue in ' || c.currency, sum(c.revenue)
      FROM conversions c JOIN upgrade_tenants u ON u.key::uuid = c.tenant_id GROUP BY 1, 2
    UNION ALL SELECT s.tenant_id::text, 'usage', sum(s.value) FROM usage s JOIN upgrade_tenants u ON u.key::uuid = s.tenant_id GROUP BY 1
    UNION ALL SELECT r.experiment_id::text, 'recommendations', count(*) FROM recommendations r JOIN upgrade_tenants u ON u.key::uuid = r.tenant_id GROUP BY 1
  ), effects (of, what, reason, n) AS (
    SELECT CASE l.source WHEN 'experiments' THEN '' ELSE l.of END, l.source, l.reason,
           sum(CASE WHEN l.fate = 'made' THEN 1 WHEN l.source = 'usage' THEN -COALESCE(l.amount, 0) ELSE -1 END)
    FROM original.upgrade_log l WHERE l.fate <> 'changed' OR l.reason = 'its revenue is negative: a refund' GROUP BY 1, 2, 3
    UNION ALL SELECT e.of, 'revenue in ' || e.currency, COALESCE(e.fault, 'its revenue has more than 6 decimals: rounded'),
                     sum(CASE WHEN e.fault IS NULL THEN e.amount ELSE 0 END - e.said)
      FROM upgrade_events e WHERE e.said IS NOT NULL AND (e.fault IS NOT NULL OR e.amount <> e.said) GROUP BY 1, 2, 3
  )
  INSERT INTO original.reconciliation
  SELECT s.of, x.name, s.what, sum(s.theirs), sum(s.ours), sum(s.effect),
         string_agg(CASE WHEN s.effect <> 0 THEN s.effect || ': ' || s.reason END, '; ' ORDER BY s.reason COLLATE "C")
  FROM (SELECT of, what, n AS theirs, 0 AS ours, 0 AS effect, NULL::text AS reason FROM theirs
        UNION ALL SELECT of, what, 0, n, 0, NULL FROM ours
        UNION ALL SELECT of, what, 0, 0, n, reason FROM effects) s
  LEFT JOIN upgrade_experiments x ON x.of = s.of
  GROUP BY s.of, x.name, s.what;
  SELECT string_agg(format('%s of %s: %s and %s', r.what, r.of, r.original, r.lastprice), '; ') INTO wrong
  FROM original.reconciliation r WHERE r.lastprice - r.original <> r.explained;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'the numbers of both sides do not agree, so nothing is copied: %', left(wrong, 1000);
  END IF;

  -- What back-to-original.sql would drop.
  INSERT INTO original.way_back (what, name, home) VALUES ('INSTALLATION', 'lastprice', home);
  PERFORM refresh_experiment_metrics();
  ANALYZE tenants, experiments, assignments, views, conversions, usage, recommendations;
  DROP FUNCTION pg_temp.number(text), pg_temp.amount(numeric), pg_temp.metadata(jsonb, text[]), pg_temp.id(text, text), pg_temp.place(oid, tid),
    pg_temp.time(text), pg_temp.json(text), pg_temp.is_deleted(jsonb), pg_temp.without_secrets(jsonb, text);
END $upgrade$;

SELECT name AS experiment, what, original, lastprice, lastprice - original AS difference, why, of AS id
FROM original.reconciliation ORDER BY of COLLATE "C", what COLLATE "C";

SELECT source, fate, reason, count(*) AS rows FROM original.upgrade_log GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
