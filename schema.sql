-- The whole schema of lastprice, version 1. Made by scripts/schema from migrations/: do not edit.
--
--   psql -d lastprice -f schema.sql                                  into the database's default schema
--   PGOPTIONS='-c search_path=pricing' psql -d shop -f schema.sql    into a schema of its own
--   PGOPTIONS='-c lastprice.demo=on' psql -d lastprice -f schema.sql with two demo tenants
--
-- One statement, so all of it or nothing. Over the same version it does nothing; over anything else that is in
-- its way it stops and says what it found.

DO $install$
DECLARE
  version constant integer := 1;
  found   integer;
  strange text;
  demo_key text := 'demo-not-a-key';
BEGIN
  IF current_schema() IS NULL THEN
    RAISE EXCEPTION 'no schema to install into: search_path (%) names none that exists', current_setting('search_path')
      USING HINT = 'CREATE SCHEMA first, or set search_path.';
  END IF;
  PERFORM pg_advisory_xact_lock(hashtext('lastprice/install'), hashtext(current_schema()));
  IF to_regprocedure(format('%I.lastprice_schema_version()', current_schema())) IS NOT NULL THEN
    EXECUTE format('SELECT %I.lastprice_schema_version()', current_schema()) INTO found;
    IF found <> version THEN
      RAISE EXCEPTION 'schema % holds version % of lastprice, and this file installs version %', current_schema(), found, version
        USING HINT = 'Upgrade with the migrations after that version, or with Admin::migrate().';
    END IF;
    RAISE NOTICE 'schema % holds version % of lastprice already: nothing to do', current_schema(), found;
  ELSE
    SELECT string_agg(c.relname, ', ' ORDER BY c.relname) INTO strange FROM pg_class c
    WHERE c.relnamespace = quote_ident(current_schema())::regnamespace AND c.relname IN
      ('tenants', 'experiments', 'assignments', 'views', 'conversions', 'usage', 'recommendations', 'experiment_metrics');
    IF strange IS NOT NULL THEN
      RAISE EXCEPTION 'schema % holds tables of another origin by our names: %', current_schema(), strange
        USING HINT = 'Install into a schema of its own (search_path), or move those tables away first: those of the original Last Price as docs/upgrade.md says.';
    END IF;
    EXECUTE $schema$

-- lastprice, schema version 1. Installs into the first schema of search_path.
--
-- The reader's order: what must be there first; who a session is; tables; what the database itself guards;
-- metrics; usage; isolation; rights. Every key starts with the tenant, every constraint has a name.

-- 1. What must be there first -------------------------------------------------------------------------------

DO $$
DECLARE
  bypasses boolean;
BEGIN
  IF current_setting('server_version_num')::int < 120000 THEN
    RAISE EXCEPTION 'lastprice needs PostgreSQL 12 or newer, this is %', current_setting('server_version');
  END IF;
  IF current_schema() IS NULL THEN
    RAISE EXCEPTION 'no schema to install into: search_path (%) names none that exists', current_setting('search_path')
      USING HINT = 'CREATE SCHEMA first, or set search_path.';
  END IF;
  IF NOT has_schema_privilege(current_schema(), 'CREATE') THEN
    RAISE EXCEPTION 'role % may not create tables in schema %', current_user, current_schema()
      USING HINT = format('GRANT CREATE ON SCHEMA %I TO %I;', current_schema(), current_user);
  END IF;

  -- The application's group role. It is cluster-wide: another database's installation may be making it too.
  SELECT rolsuper OR rolbypassrls INTO bypasses FROM pg_roles WHERE rolname = 'lastprice_app';
  IF NOT FOUND THEN
    BEGIN
      CREATE ROLE lastprice_app NOLOGIN;
    EXCEPTION
      WHEN duplicate_object OR unique_violation THEN NULL;
      WHEN insufficient_privilege THEN
        RAISE EXCEPTION 'the role lastprice_app is missing, and role % may not create roles', current_user
          USING HINT = 'Let a role with CREATEROLE run: CREATE ROLE lastprice_app NOLOGIN; then install again.';
    END;
  ELSIF bypasses THEN
    RAISE EXCEPTION 'the role lastprice_app bypasses row-level security'
      USING HINT = 'ALTER ROLE lastprice_app NOSUPERUSER NOBYPASSRLS; then install again.';
  END IF;
  -- So that a service which logs in as the owner (development) can act as the application.
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    BEGIN
      EXECUTE format('GRANT lastprice_app TO %I', current_user);
    EXCEPTION
      WHEN unique_violation THEN NULL;  -- another database's installation has just done it
      WHEN insufficient_privilege THEN
        IF NOT pg_has_role('lastprice_app', 'MEMBER') THEN
          RAISE NOTICE 'role % cannot become lastprice_app by SET ROLE; services log in as another member of it', current_user;
        END IF;
    END;
  END IF;

  -- gen_random_uuid() is built in since 13. pgp_sym_encrypt() serves those who encrypt keys in SQL.
  BEGIN
    CREATE EXTENSION IF NOT EXISTS pgcrypto;
  EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;  -- an installation into another schema has just done it
    WHEN insufficient_privilege OR undefined_file OR feature_not_supported THEN
      IF to_regproc('gen_random_uuid') IS NULL THEN
        RAISE EXCEPTION 'before PostgreSQL 13 the extension pgcrypto is needed, and role % cannot create it', current_user
          USING HINT = 'Let a superuser run: CREATE EXTENSION pgcrypto; in this database, then install again.';
      END IF;
      RAISE NOTICE 'extension pgcrypto is not there: pgp_sym_encrypt() is unavailable, all else works';
  END;
  -- Before 13, and where it was created in a schema that search_path does not name: the defaults below are to find it.
  IF to_regproc('gen_random_uuid') IS NULL THEN
    PERFORM set_config('search_path', current_setting('search_path') || ', ' || quote_ident(n.nspname), true)
    FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace WHERE x.extname = 'pgcrypto';
  END IF;
END $$;

-- Raised by every migration: what the program and schema.sql read to know what they find.
CREATE FUNCTION lastprice_schema_version() RETURNS integer
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT 1';

-- 2. Who a session is ---------------------------------------------------------------------------------------

-- The tenant of this transaction, or NULL. Once a transaction-local setting has ended it reads back as '',
-- hence NULLIF: unset means no rows, never an error. It must inline, so it has no SET clause.
CREATE FUNCTION app_tenant_id() RETURNS uuid
  LANGUAGE sql STABLE PARALLEL SAFE
  AS $$ SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid $$;

-- Binds a tenant to the rest of this transaction. A utility statement, not set_config(), because only that
-- reaches the shards of a distributed database.
CREATE FUNCTION app_set_tenant(tenant uuid) RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  bound text := NULLIF(current_setting('app.tenant_id', true), '');
BEGIN
  IF tenant IS NULL THEN
    RAISE EXCEPTION 'the tenant is null' USING ERRCODE = 'null_value_not_allowed';
  END IF;
  IF bound IS NOT NULL AND bound::uuid <> tenant THEN
    RAISE EXCEPTION 'this transaction is bound to another tenant' USING ERRCODE = 'active_sql_transaction';
  END IF;
  PERFORM set_config('citus.propagate_set_commands', 'local', true);  -- a placeholder where there is no Citus
  EXECUTE format('SET LOCAL app.tenant_id = %L', tenant);
END $$;

-- 3. Tables -------------------------------------------------------------------------------------------------

CREATE TABLE tenants (
  id             uuid        NOT NULL DEFAULT gen_random_uuid(),
  name           text        NOT NULL,
  email          text        NOT NULL,
  mode           text        NOT NULL DEFAULT 'managed',
  plan           text        NOT NULL DEFAULT 'free',
  paid_api_key   text,
  webhook_secret text,
  salt           text        NOT NULL DEFAULT gen_random_uuid()::text,
  holdout        integer     NOT NULL DEFAULT 0,
  billing_day    integer     NOT NULL DEFAULT 1,
  metadata       jsonb       NOT NULL DEFAULT '{}',
  created_at     timestamptz NOT NULL DEFAULT now(),
  updated_at     timestamptz NOT NULL DEFAULT now(),
  updated_by     text        DEFAULT NULLIF(current_setting('app.actor', true), ''),
  CONSTRAINT tenants_pkey PRIMARY KEY (id),
  CONSTRAINT tenants_name_check CHECK (btrim(name) <> '' AND char_length(name) <= 200),
  CONSTRAINT tenants_email_check CHECK (email ~ '^[^[:space:]@]+@[^[:space:]@]+$' AND char_length(email) <= 320),
  CONSTRAINT tenants_mode_check CHECK (mode IN ('managed', 'byok')),
  CONSTRAINT tenants_plan_check CHECK (plan IN ('free', 'starter', 'pro', 'enterprise')),
  CONSTRAINT tenants_byok_key_check CHECK (mode <> 'byok' OR COALESCE(paid_api_key, '') <> ''),
  CONSTRAINT tenants_salt_check CHECK (salt <> '' AND octet_length(salt) <= 128),
  CONSTRAINT tenants_holdout_check CHECK (holdout BETWEEN 0 AND 1000000),
  CONSTRAINT tenants_billing_day_check CHECK (billing_day BETWEEN 1 AND 28),
  CONSTRAINT tenants_metadata_check CHECK (jsonb_typeof(metadata) = 'object')
);
-- The one key without a tenant: an address belongs to one tenant of the whole installation.
CREATE UNIQUE INDEX tenants_email_key ON tenants (lower(email));
COMMENT ON COLUMN tenants.holdout IS 'millionths of all users who are in no experiment';
COMMENT ON COLUMN tenants.billing_day IS 'the day of each month, in UTC, with which a billing period begins';
COMMENT ON COLUMN tenants.paid_api_key IS 'encrypted by the client (lp1:key id:...), or by the original (pgp_sym_encrypt); never plaintext';
COMMENT ON COLUMN tenants.webhook_secret IS 'encrypted by the client (lp1:key id:...): the secrets of webhooks, newest first, one a line';

CREATE FUNCTION variant_names_are_unique(variants jsonb) RETURNS boolean
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT count(DISTINCT v ->> 'name') = count(*)
  FROM jsonb_array_elements(CASE jsonb_typeof(variants) WHEN 'array' THEN variants ELSE '[]' END) v
$$;

-- forced: {"user-42": "plus"}. Each names a variant that there is.
CREATE FUNCTION forced_variants_exist(forced jsonb, variants jsonb) RETURNS boolean
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT count(*) <= 1000 AND COALESCE(bool_and(octet_length(f.key) BETWEEN 1 AND 512
    AND jsonb_typeof(f.value) = 'string' AND variants @> jsonb_build_array(jsonb_build_object('name', f.value))), true)
  FROM jsonb_each(CASE jsonb_typeof(forced) WHEN 'object' THEN forced ELSE '{}' END) f
$$;

-- What everyone outside an experiment sees: a price and a book.
CREATE FUNCTION baseline_prices(variants jsonb, baseline text) RETURNS jsonb
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT jsonb_build_array((v ->> 'price')::numeric, COALESCE(v -> 'prices', '[]'))
  FROM jsonb_array_elements(variants) v WHERE v ->> 'name' = COALESCE(baseline, variants -> 0 ->> 'name')
$$;

-- variants: [{"name": "control", "weight": 1, "price": "19.00", "prices": [{"item": "annual", "currency": "EUR", "price": "190"}]}].
-- A price is a decimal in a string, or a JSON number. The checks count the elements that are as they should
-- be, since a jsonpath filter on a missing member is neither true nor false; and they name the members inside of
-- the filter, since a filter looks into an array: '$.price ? (@ > 0)' is content with [1].
-- No method on parentheses, as in (@ * 10).floor(): PostgreSQL prints it without them, and the dump does not restore.
CREATE TABLE experiments (
  tenant_id   uuid        NOT NULL,
  id          uuid        NOT NULL DEFAULT gen_random_uuid(),
  key         text        NOT NULL,
  name        text        NOT NULL,
  status      text        NOT NULL DEFAULT 'draft',
  currency    text        NOT NULL DEFAULT 'USD',
  variants    jsonb       NOT NULL,
  baseline    text,
  winner      text,
  salt        text        NOT NULL DEFAULT gen_random_uuid()::text,
  phase       integer     NOT NULL DEFAULT 1,
  traffic     integer     NOT NULL DEFAULT 1000000,
  layer       text,
  layer_start integer,
  layer_end   integer,
  unit        text        NOT NULL DEFAULT 'user',
  eligibility text        NOT NULL DEFAULT 'everyone',
  forced      jsonb       NOT NULL DEFAULT '{}',
  exceptions  boolean     NOT NULL DEFAULT false,
  quote_validity integer,
  plan        jsonb       NOT NULL DEFAULT '{}',
  past_phases jsonb       NOT NULL DEFAULT '[]',
  metadata    jsonb       NOT NULL DEFAULT '{}',
  revision    bigint      NOT NULL DEFAULT 1,
  start_date  timestamptz,
  end_date    timestamptz,
  created_at  timestamptz NOT NULL DEFAULT now(),
  updated_at  timestamptz NOT NULL DEFAULT now(),
  updated_by  text        DEFAULT NULLIF(current_setting('app.actor', true), ''),
  CONSTRAINT experiments_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT experiments_key_key UNIQUE (tenant_id, key),
  CONSTRAINT experiments_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT experiments_key_check CHECK (key ~ '^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}$'),
  CONSTRAINT experiments_name_check CHECK (btrim(name) <> '' AND char_length(name) <= 200),
  CONSTRAINT experiments_status_check CHECK (status IN ('draft', 'active', 'paused', 'completed')),
  CONSTRAINT experiments_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
  CONSTRAINT experiments_variants_check CHECK (
    CASE jsonb_typeof(variants) WHEN 'array' THEN jsonb_array_length(variants) BETWEEN 1 AND 1000 ELSE false END),
  CONSTRAINT experiments_variant_names_check CHECK (
    variant_names_are_unique(variants)
    AND jsonb_array_length(jsonb_path_query_array(variants,
          '$[*] ? (@.name.type() == "string" && @.name like_regex "^[^\\u0001-\\u001f\\u007f-\\u009f]{1,128}$")'))
        = jsonb_array_length(jsonb_path_query_array(variants, '$[*]'))),
  CONSTRAINT experiments_variant_weights_check CHECK (
    jsonb_path_exists(variants, '$[*].weight ? (@ > 0)')
    AND jsonb_array_length(jsonb_path_query_array(variants,
          '$[*] ? (@.weight.type() == "number" && @.weight >= 0 && @.weight <= 4294967295 && @.weight.floor() == @.weight)'))
        = jsonb_array_length(jsonb_path_query_array(variants, '$[*]'))),
  CONSTRAINT experiments_variant_prices_check CHECK (
    jsonb_array_length(jsonb_path_query_array(variants,
      '$[*] ? ((@.price.type() == "string" && @.price like_regex "^[0-9]{1,12}([.][0-9]{1,6})?$")
            || (@.price.type() == "number" && @.price >= 0 && @.price < 1000000000000
                && @.price % 0.000001 == 0))'))
    = jsonb_array_length(jsonb_path_query_array(variants, '$[*]'))),
  CONSTRAINT experiments_price_books_check CHECK (
    NOT jsonb_path_exists(variants, '$[*].prices.type() ? (@ != "array")')
    AND NOT jsonb_path_exists(variants, '$[*].prices[*].type() ? (@ != "object")')
    AND jsonb_array_length(jsonb_path_query_array(variants,
      '$[*].prices[*] ? (@.item.type() == "string" && @.item != "" && @.currency.type() == "string" && @.currency like_regex "^[A-Z]{3}$"
         && ((@.price.type() == "string" && @.price like_regex "^[0-9]{1,12}([.][0-9]{1,6})?$")
          || (@.price.type() == "number" && @.price >= 0 && @.price < 1000000000000
              && @.price % 0.000001 == 0)))'))
    = jsonb_array_length(jsonb_path_query_array(variants, '$[*].prices[*]'))),
  CONSTRAINT experiments_baseline_check CHECK (
    baseline IS NULL OR variants @> jsonb_build_array(jsonb_build_object('name', baseline))),
  CONSTRAINT experiments_winner_check CHECK (
    winner IS NULL OR (status = 'completed' AND variants @> jsonb_build_array(jsonb_build_object('name', winner)))),
  CONSTRAINT experiments_salt_check CHECK (salt <> '' AND octet_length(salt) <= 128),
  CONSTRAINT experiments_phase_check CHECK (phase >= 1),
  CONSTRAINT experiments_traffic_check CHECK (traffic BETWEEN 0 AND 1000000),
  CONSTRAINT experiments_layer_check CHECK (
    CASE WHEN layer IS NULL THEN layer_start IS NULL AND layer_end IS NULL
         ELSE COALESCE(layer ~ '^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}$' AND 0 <= layer_start AND layer_start < layer_end
                       AND layer_end <= 1000000, false) END),
  CONSTRAINT experiments_unit_check CHECK (unit IN ('user', 'account')),
  CONSTRAINT experiments_eligibility_check CHECK (eligibility IN ('everyone', 'new_customers')),
  CONSTRAINT experiments_forced_check CHECK (jsonb_typeof(forced) = 'object' AND forced_variants_exist(forced, variants)),
  CONSTRAINT experiments_quote_validity_check CHECK (quote_validity BETWEEN 1 AND 315360000),
  CONSTRAINT experiments_plan_check CHECK (
    jsonb_typeof(plan) = 'object'
    AND COALESCE(plan ->> 'metric', 'net_revenue') IN ('net_revenue', 'margin')
    AND NOT jsonb_path_exists(plan, '$.keyvalue() ? (@.key == "window_days" || @.key == "target_sample_size" || @.key == "alpha"
          || @.key == "minimum_effect").value ? (@.type() != "number")')
    AND NOT jsonb_path_exists(plan, '$.window_days ? (@ < 1 || @ > 730 || @.floor() != @)')
    AND NOT jsonb_path_exists(plan, '$.target_sample_size ? (@ < 100 || @ > 1000000000000 || @.floor() != @)')
    AND NOT jsonb_path_exists(plan, '$.alpha ? (@ < 0.0001 || @ > 0.5)')
    AND NOT jsonb_path_exists(plan, '$.minimum_effect ? (@ <= 0 || @ > 1)')),
  CONSTRAINT experiments_past_phases_check CHECK (jsonb_typeof(past_phases) = 'array'),
  CONSTRAINT experiments_revision_check CHECK (revision >= 1),
  CONSTRAINT experiments_metadata_check CHECK (jsonb_typeof(metadata) = 'object'),
  CONSTRAINT experiments_dates_check CHECK (
    isfinite(start_date) AND start_date < '10000-01-01 00:00:00+00' AND isfinite(end_date)
    AND end_date < '10000-01-01 00:00:00+00' AND end_date >= start_date)
);
CREATE INDEX experiments_status_idx ON experiments (tenant_id, status, id);
CREATE INDEX experiments_layer_idx ON experiments (tenant_id, layer) WHERE layer IS NOT NULL;
COMMENT ON COLUMN experiments.traffic IS 'millionths of the users whom the experiment takes';
COMMENT ON COLUMN experiments.layer IS 'experiments of one layer share no user: each has the part from layer_start to layer_end, in millionths';
COMMENT ON COLUMN experiments.unit IS 'whose id decides: in an experiment by account, user_id is the account''s wherever the experiment is named';
COMMENT ON COLUMN experiments.forced IS 'for testing: which variant a user sees whatever else is said';
COMMENT ON COLUMN experiments.exceptions IS 'some stored quotes may differ from what the hash says: they were imported, merged, or forced once';
COMMENT ON COLUMN experiments.quote_validity IS 'seconds for which a price is promised when it is shown; NULL means for ever';
COMMENT ON COLUMN experiments.plan IS 'how the results are judged; what it does not say is as the library''s defaults are';
COMMENT ON COLUMN experiments.past_phases IS 'the variants of the phases before this one, whose results are judged by the weights of then: kept by a trigger';
COMMENT ON COLUMN experiments.baseline IS 'the variant whose prices everyone outside the experiment sees; NULL means the first';
COMMENT ON COLUMN experiments.revision IS 'raised by every update; an edit names the one it has read';

-- A row is the quote: what this user was promised, as it was then.
CREATE TABLE assignments (
  tenant_id     uuid        NOT NULL,
  experiment_id uuid        NOT NULL,
  user_id       text        NOT NULL,
  variant       text        NOT NULL,
  price         numeric     NOT NULL,
  currency      text        NOT NULL,
  book          jsonb       NOT NULL DEFAULT '[]',
  phase         integer     NOT NULL DEFAULT 1,
  reason        text        NOT NULL DEFAULT 'randomised',
  assigned_at   timestamptz NOT NULL DEFAULT now(),
  valid_until   timestamptz,
  merged_into   text,
  CONSTRAINT assignments_pkey PRIMARY KEY (tenant_id, experiment_id, user_id),
  CONSTRAINT assignments_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE,
  CONSTRAINT assignments_user_check CHECK (octet_length(user_id) BETWEEN 1 AND 512),
  CONSTRAINT assignments_variant_check CHECK (char_length(variant) BETWEEN 1 AND 128),
  CONSTRAINT assignments_price_check CHECK (price >= 0 AND price < 1e12 AND scale(price) <= 6),
  CONSTRAINT assignments_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
  CONSTRAINT assignments_book_check CHECK (jsonb_typeof(book) = 'array'),
  CONSTRAINT assignments_phase_check CHECK (phase >= 1),
  CONSTRAINT assignments_reason_check CHECK (reason IN ('randomised', 'forced', 'late', 'imported', 'merged', 'grandfathered')),
  CONSTRAINT assignments_assigned_at_check CHECK (isfinite(assigned_at) AND assigned_at < '10000-01-01 00:00:00+00'),
  CONSTRAINT assignments_valid_until_check CHECK (isfinite(valid_until) AND valid_until < '10000-01-01 00:00:00+00'),
  CONSTRAINT assignments_merged_into_check CHECK (merged_into <> user_id AND octet_length(merged_into) BETWEEN 1 AND 512)
);
CREATE INDEX assignments_user_idx ON assignments (tenant_id, user_id, experiment_id);
COMMENT ON COLUMN assignments.valid_until IS 'until when the price may be charged without asking again; NULL means for ever. The price itself stays';
COMMENT ON COLUMN assignments.merged_into IS 'of an id that turned out to be this user: who has the quote that counts. This row leads there, and is no user';

-- phase and reason are the assignment's, kept with the event so that counting needs no join.
CREATE TABLE views (
  tenant_id     uuid        NOT NULL,
  id            uuid        NOT NULL DEFAULT gen_random_uuid(),
  experiment_id uuid        NOT NULL,
  user_id       text        NOT NULL,
  variant       text        NOT NULL,
  phase         integer     NOT NULL DEFAULT 1,
  reason        text        NOT NULL DEFAULT 'randomised',
  occurred_at   timestamptz NOT NULL DEFAULT now(),
  metadata      jsonb       NOT NULL DEFAULT '{}',
  CONSTRAINT views_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT views_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE,
  CONSTRAINT views_user_check CHECK (octet_length(user_id) BETWEEN 1 AND 512),
  CONSTRAINT views_variant_check CHECK (char_length(variant) BETWEEN 1 AND 128),
  CONSTRAINT views_phase_check CHECK (phase >= 1),
  CONSTRAINT views_reason_check CHECK (reason IN ('randomised', 'forced', 'late', 'imported', 'merged', 'grandfathered')),
  CONSTRAINT views_occurred_at_check CHECK (isfinite(occurred_at) AND occurred_at < '10000-01-01 00:00:00+00'),
  CONSTRAINT views_metadata_check CHECK (jsonb_typeof(metadata) = 'object')
);
CREATE INDEX views_experiment_idx ON views (tenant_id, experiment_id, occurred_at);

-- The ledger: append-only. revenue is what the entry adds to net revenue, without tax; negative for what
-- goes back to the customer. A sale keeps how its revenue came about, and flags name what does not agree.
-- Renewals belong to the sale of their subscription, and what goes back to the sale or renewal of its order: sale_id.
CREATE TABLE conversions (
  tenant_id       uuid        NOT NULL,
  id              uuid        NOT NULL DEFAULT gen_random_uuid(),
  experiment_id   uuid        NOT NULL,
  user_id         text        NOT NULL,
  variant         text        NOT NULL,
  phase           integer     NOT NULL DEFAULT 1,
  reason          text        NOT NULL DEFAULT 'randomised',
  assigned_at     timestamptz,
  kind            text        NOT NULL DEFAULT 'sale',
  revenue         numeric     NOT NULL,
  currency        text        NOT NULL,
  item            text,
  list_price      numeric,
  quantity        integer     NOT NULL DEFAULT 1,
  discount        numeric     NOT NULL DEFAULT 0,
  proration       numeric     NOT NULL DEFAULT 0,
  tax             numeric     NOT NULL DEFAULT 0,
  settled         boolean     NOT NULL DEFAULT true,
  quote_mismatch  boolean,
  flags           text[]      NOT NULL DEFAULT '{}',
  order_id        text,
  subscription_id text,
  period          text,
  sale_id         uuid,
  idempotency_key text        NOT NULL DEFAULT gen_random_uuid()::text,
  occurred_at     timestamptz NOT NULL DEFAULT now(),
  metadata        jsonb       NOT NULL DEFAULT '{}',
  CONSTRAINT conversions_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE,
  CONSTRAINT conversions_user_check CHECK (octet_length(user_id) BETWEEN 1 AND 512),
  CONSTRAINT conversions_variant_check CHECK (char_length(variant) BETWEEN 1 AND 128),
  CONSTRAINT conversions_phase_check CHECK (phase >= 1),
  CONSTRAINT conversions_reason_check CHECK (
    reason IN ('randomised', 'forced', 'late', 'imported', 'merged', 'grandfathered', 'outside')),
  CONSTRAINT conversions_assigned_at_check CHECK (isfinite(assigned_at) AND assigned_at < '10000-01-01 00:00:00+00'),
  CONSTRAINT conversions_kind_check CHECK (
    kind IN ('trial_start', 'sale', 'renewal', 'refund', 'chargeback', 'chargeback_reversal')),
  CONSTRAINT conversions_revenue_check CHECK (
    revenue > -1e12 AND revenue < 1e12 AND scale(revenue) <= 6
    AND CASE WHEN kind = 'trial_start' THEN revenue = 0
             WHEN kind IN ('refund', 'chargeback') THEN revenue <= 0
             ELSE revenue >= 0 END),
  CONSTRAINT conversions_currency_check CHECK (currency ~ '^[A-Z]{3}$' AND currency <> 'XXX'),
  CONSTRAINT conversions_item_check CHECK (char_length(item) BETWEEN 1 AND 128),
  CONSTRAINT conversions_list_price_check CHECK (list_price >= 0 AND list_price < 1e12 AND scale(list_price) <= 6),
  CONSTRAINT conversions_quantity_check CHECK (quantity >= 1),
  CONSTRAINT conversions_discount_check CHECK (discount >= 0 AND discount < 1e12 AND scale(discount) <= 6),
  CONSTRAINT conversions_proration_check CHECK (
    proration > -1e12 AND proration < 1e12 AND scale(proration) <= 6),
  CONSTRAINT conversions_tax_check CHECK (tax > -1e12 AND tax < 1e12 AND scale(tax) <= 6),
  CONSTRAINT conversions_flags_check CHECK (
    flags <@ '{currency,list_price,net,expired,period,beyond_sale,beyond_chargeback}'::text[]),
  CONSTRAINT conversions_order_check CHECK (octet_length(order_id) BETWEEN 1 AND 255),
  CONSTRAINT conversions_subscription_check CHECK (octet_length(subscription_id) BETWEEN 1 AND 255),
  CONSTRAINT conversions_period_check CHECK (octet_length(period) BETWEEN 1 AND 255),
  CONSTRAINT conversions_sale_check CHECK (sale_id <> id),
  CONSTRAINT conversions_idempotency_check CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
  CONSTRAINT conversions_occurred_at_check CHECK (isfinite(occurred_at) AND occurred_at < '10000-01-01 00:00:00+00'),
  CONSTRAINT conversions_metadata_check CHECK (jsonb_typeof(metadata) = 'object')
);
-- With all that results are made of: they read every entry of an experiment, by user.
CREATE INDEX conversions_experiment_idx ON conversions (tenant_id, experiment_id, user_id)
  INCLUDE (phase, variant, reason, kind, revenue, currency, item, quantity, quote_mismatch, assigned_at, occurred_at);
CREATE INDEX conversions_user_idx ON conversions (tenant_id, user_id, id);
CREATE INDEX conversions_time_idx ON conversions (tenant_id, occurred_at, id);
CREATE INDEX conversions_order_idx ON conversions (tenant_id, order_id, id) WHERE order_id IS NOT NULL;
CREATE INDEX conversions_subscription_idx ON conversions (tenant_id, subscription_id, id) WHERE subscription_id IS NOT NULL;
CREATE INDEX conversions_sale_idx ON conversions (tenant_id, sale_id) WHERE sale_id IS NOT NULL;
-- The keys come last. A plan that was made while the table was empty is kept for a while, and of indexes that cost the same it takes
-- the youngest: a look-up of one entry must not read all of its tenant's.
ALTER TABLE conversions
  ADD CONSTRAINT conversions_pkey PRIMARY KEY (tenant_id, id),
  ADD CONSTRAINT conversions_idempotency_key UNIQUE (tenant_id, idempotency_key);
ALTER TABLE conversions ADD CONSTRAINT conversions_sale_fkey FOREIGN KEY (tenant_id, sale_id)
  REFERENCES conversions (tenant_id, id) ON DELETE CASCADE;
COMMENT ON COLUMN conversions.reason IS 'the assignment''s; outside: of a user who is not in the experiment, at the price that everyone outside sees';
COMMENT ON COLUMN conversions.assigned_at IS 'the assignment''s, kept with the entry so that a window after it needs no join';
COMMENT ON COLUMN conversions.list_price IS 'for one; as quoted, or as locked by the subscription''s sale, unless somebody said otherwise';
COMMENT ON COLUMN conversions.settled IS 'recorded after the money had moved; false: before, when it could still be refused';
COMMENT ON COLUMN conversions.quote_mismatch IS 'what was charged is not what was quoted; NULL while nobody has compared';
COMMENT ON COLUMN conversions.flags IS 'the rules that the entry breaks, which was recorded nevertheless';

-- What was reported before the entry that it belongs to: counts when that one comes.
CREATE TABLE waiting_conversions (
  tenant_id       uuid        NOT NULL,
  idempotency_key text        NOT NULL,
  id              uuid        NOT NULL,
  kind            text        NOT NULL,
  ref             text        NOT NULL,
  entry           jsonb       NOT NULL,
  received_at     timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT waiting_conversions_pkey PRIMARY KEY (tenant_id, idempotency_key),
  CONSTRAINT waiting_conversions_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT waiting_conversions_kind_check CHECK (kind IN ('renewal', 'refund', 'chargeback', 'chargeback_reversal')),
  CONSTRAINT waiting_conversions_entry_check CHECK (jsonb_typeof(entry) = 'object')
);
CREATE INDEX waiting_conversions_ref_idx ON waiting_conversions (tenant_id, ref);
CREATE INDEX waiting_conversions_user_idx ON waiting_conversions (tenant_id, (entry ->> 'user_id')) WHERE entry ->> 'user_id' IS NOT NULL;
COMMENT ON COLUMN waiting_conversions.ref IS 'what it waits for: o/ and an order, or s/ and a subscription';

-- Verified webhooks as they were received, stored before anything is made of them.
CREATE TABLE webhook_events (
  tenant_id       uuid        NOT NULL,
  id              text        NOT NULL,
  seq             uuid        NOT NULL,
  type            text,
  body            bytea       NOT NULL,
  body_hash       bytea       NOT NULL,
  received_at     timestamptz NOT NULL DEFAULT now(),
  status          text        NOT NULL DEFAULT 'pending',
  attempts        integer     NOT NULL DEFAULT 0,
  what            text,
  idempotency_key text,
  processed_at    timestamptz,
  CONSTRAINT webhook_events_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT webhook_events_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT webhook_events_id_check CHECK (octet_length(id) BETWEEN 1 AND 255),
  CONSTRAINT webhook_events_type_check CHECK (octet_length(type) BETWEEN 1 AND 255),
  CONSTRAINT webhook_events_body_check CHECK (octet_length(body) <= 16777216),
  CONSTRAINT webhook_events_body_hash_check CHECK (octet_length(body_hash) = 32),
  CONSTRAINT webhook_events_received_at_check CHECK (isfinite(received_at)),
  CONSTRAINT webhook_events_status_check CHECK (status IN ('pending', 'processed', 'ignored', 'failed')),
  CONSTRAINT webhook_events_attempts_check CHECK (attempts >= 0),
  CONSTRAINT webhook_events_what_check CHECK (what ~ '^[a-z_.]{1,64}$'),
  CONSTRAINT webhook_events_idempotency_check CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
  CONSTRAINT webhook_events_processed_check CHECK ((status = 'pending') = (processed_at IS NULL))
);
CREATE INDEX webhook_events_status_idx ON webhook_events (tenant_id, status, seq);
CREATE INDEX webhook_events_pending_idx ON webhook_events (tenant_id, attempts, seq) WHERE status = 'pending';
COMMENT ON COLUMN webhook_events.id IS 'the delivery''s: the same when it is delivered again';
COMMENT ON COLUMN webhook_events.seq IS 'a UUID version 7: the order of arrival';
COMMENT ON COLUMN webhook_events.body IS 'as it was signed';
COMMENT ON COLUMN webhook_events.what IS 'why it is not processed: a name, never data';
COMMENT ON COLUMN webhook_events.idempotency_key IS 'of the ledger entry that it became';

-- Always empty: a transaction that writes to an order or subscription inserts a row and deletes it, so that the next one that does
-- waits until the first has ended. Rows wait without filling the table of locks, as a thousand advisory locks would. Each is
-- deleted by itself: of several at once, a plan made for an empty table reads all that are dead.
CREATE UNLOGGED TABLE ledger_locks (
  tenant_id uuid NOT NULL,
  ref       text NOT NULL,
  CONSTRAINT ledger_locks_pkey PRIMARY KEY (tenant_id, ref)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- One row per reported amount, so that a repeated report adds nothing; a day's usage is their sum. The fold adds a row to
-- usage_totals and marks it.
CREATE TABLE usage (
  tenant_id       uuid        NOT NULL,
  metric          text        NOT NULL,
  day             date        NOT NULL,
  value           bigint      NOT NULL,
  idempotency_key text        NOT NULL DEFAULT gen_random_uuid()::text,
  created_at      timestamptz NOT NULL DEFAULT now(),
  folded          boolean     NOT NULL DEFAULT false,
  CONSTRAINT usage_pkey PRIMARY KEY (tenant_id, metric, idempotency_key),
  CONSTRAINT usage_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT usage_metric_check CHECK (metric ~ '^[a-z][a-z0-9_.]{0,63}$'),
  CONSTRAINT usage_day_check CHECK (isfinite(day)),
  CONSTRAINT usage_value_check CHECK (value BETWEEN 0 AND 1000000000000),
  CONSTRAINT usage_idempotency_check CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255)
  -- Each row dies once, when it is folded, and is in the way of who looks for pending ones until it is removed. Not as small as that
  -- of metric_deltas: this table is kept, and its key is read as a whole each time.
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200000);
CREATE INDEX usage_pending_idx ON usage (tenant_id, metric, day) INCLUDE (value) WHERE NOT folded;

-- What was recommended, from where, and what became of it: proposed -> approved -> applied, or rejected or expired before that.
CREATE TABLE recommendations (
  tenant_id        uuid        NOT NULL,
  id               uuid        NOT NULL DEFAULT gen_random_uuid(),
  experiment_id    uuid        NOT NULL,
  price            numeric     NOT NULL,
  currency         text        NOT NULL,
  expected_revenue numeric,
  confidence       float8      NOT NULL,
  objective        text        NOT NULL DEFAULT 'revenue',
  simulation       jsonb       NOT NULL DEFAULT '{}',
  source           text,
  model_version    text,
  inputs_hash      text,
  expires_at       timestamptz,
  created_at       timestamptz NOT NULL DEFAULT now(),
  status           text        NOT NULL DEFAULT 'proposed',
  decided_at       timestamptz,
  decided_by       text,
  rejection_reason text,
  applied_at       timestamptz,
  applied_by       text,
  follow_up_id     uuid,
  observed_revenue numeric,
  scored_at        timestamptz,
  CONSTRAINT recommendations_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT recommendations_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE,
  -- Not SET NULL, which would take the tenant with it: recommendations_let_go does that.
  CONSTRAINT recommendations_follow_up_fkey FOREIGN KEY (tenant_id, follow_up_id) REFERENCES experiments (tenant_id, id),
  CONSTRAINT recommendations_price_check CHECK (price >= 0 AND price < 1e12 AND scale(price) <= 6),
  CONSTRAINT recommendations_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
  CONSTRAINT recommendations_expected_revenue_check CHECK (
    expected_revenue > -1e15 AND expected_revenue < 1e15 AND scale(expected_revenue) <= 6),
  CONSTRAINT recommendations_confidence_check CHECK (confidence >= 0 AND confidence <= 1),
  CONSTRAINT recommendations_objective_check CHECK (
    objective IN ('revenue', 'conversion', 'profit', 'market_share')),
  CONSTRAINT recommendations_simulation_check CHECK (jsonb_typeof(simulation) IN ('object', 'array')),
  CONSTRAINT recommendations_source_check CHECK (char_length(source) BETWEEN 1 AND 200),
  CONSTRAINT recommendations_model_version_check CHECK (char_length(model_version) BETWEEN 1 AND 200),
  CONSTRAINT recommendations_inputs_hash_check CHECK (char_length(inputs_hash) BETWEEN 1 AND 200),
  CONSTRAINT recommendations_expires_at_check CHECK (isfinite(expires_at) AND expires_at < '10000-01-01 00:00:00+00'),
  CONSTRAINT recommendations_status_check CHECK (status IN ('proposed', 'approved', 'applied', 'rejected', 'expired')),
  CONSTRAINT recommendations_rejection_reason_check CHECK (
    rejection_reason IS NULL OR status = 'rejected' AND char_length(rejection_reason) BETWEEN 1 AND 1000),
  CONSTRAINT recommendations_follow_up_check CHECK (
    follow_up_id IS NULL OR status = 'applied' AND follow_up_id <> experiment_id),
  CONSTRAINT recommendations_observed_revenue_check CHECK (
    observed_revenue IS NULL OR status = 'applied' AND expected_revenue IS NOT NULL
    AND observed_revenue > -1e15 AND observed_revenue < 1e15 AND scale(observed_revenue) <= 6)
);
CREATE INDEX recommendations_experiment_idx ON recommendations (tenant_id, experiment_id, id);
CREATE INDEX recommendations_latest_idx ON recommendations (tenant_id, experiment_id, created_at, id);
CREATE INDEX recommendations_status_idx ON recommendations (tenant_id, status, id);
CREATE INDEX recommendations_due_idx ON recommendations (tenant_id, expires_at) WHERE status IN ('proposed', 'approved');
CREATE UNIQUE INDEX recommendations_follow_up_key ON recommendations (tenant_id, follow_up_id) WHERE follow_up_id IS NOT NULL;
COMMENT ON COLUMN recommendations.expected_revenue IS 'net revenue per 1,000 assigned users at this price, in its currency';
COMMENT ON COLUMN recommendations.observed_revenue IS 'what came of it, in the unit of expected_revenue';
COMMENT ON COLUMN recommendations.source IS 'who made it; model_version and inputs_hash say how, and from what';
COMMENT ON COLUMN recommendations.decided_at IS 'when it was approved or rejected';
COMMENT ON COLUMN recommendations.follow_up_id IS 'the experiment that was made by applying it; NULL again if that was deleted as a draft';

-- Who changed what: a row for each change of a tenant, an experiment or a recommendation, written by a trigger whoever writes, and
-- changed by nobody but the owner. No foreign key: it outlives what it tells of. Ids are UUIDs version 7 that the server makes.
CREATE TABLE audit_trail (
  tenant_id     uuid        NOT NULL,
  id            uuid        NOT NULL,
  at            timestamptz NOT NULL,
  actor         text,
  role          text        NOT NULL,
  object        text        NOT NULL,
  object_id     uuid        NOT NULL,
  experiment_id uuid,
  action        text        NOT NULL,
  changes       jsonb       NOT NULL,
  CONSTRAINT audit_trail_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT audit_trail_object_check CHECK (object IN ('tenant', 'experiment', 'recommendation')),
  CONSTRAINT audit_trail_action_check CHECK (action IN ('created', 'changed', 'deleted')),
  CONSTRAINT audit_trail_changes_check CHECK (jsonb_typeof(changes) = 'object')
);
CREATE INDEX audit_trail_experiment_idx ON audit_trail (tenant_id, experiment_id, id);
COMMENT ON COLUMN audit_trail.actor IS 'who it was, as the host says (app.actor)';
COMMENT ON COLUMN audit_trail.role IS 'who had logged in, as the database knows';
COMMENT ON COLUMN audit_trail.experiment_id IS 'the experiment, also of a recommendation for it';
COMMENT ON COLUMN audit_trail.changes IS 'by column: old and new; of a secret, and of a list of users, only that it is another one';

-- 4. What the database itself guards ------------------------------------------------------------------------

CREATE FUNCTION tenants_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (NEW.id, NEW.salt) IS DISTINCT FROM (OLD.id, OLD.salt) THEN
    RAISE EXCEPTION 'id and salt of a tenant cannot change' USING ERRCODE = 'check_violation', CONSTRAINT = 'tenants_guard';
  END IF;
  NEW.updated_at := now();
  NEW.updated_by := NULLIF(current_setting('app.actor', true), '');
  RETURN NEW;
END $$;
CREATE TRIGGER tenants_guard BEFORE UPDATE ON tenants FOR EACH ROW EXECUTE FUNCTION tenants_guard();

-- Whoever writes: the life of an experiment is draft -> active <-> paused -> completed, and what users were
-- shown is frozen once it has been active.
CREATE FUNCTION experiments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (NEW.tenant_id, NEW.id, NEW.salt) IS DISTINCT FROM (OLD.tenant_id, OLD.id, OLD.salt) THEN
    RAISE EXCEPTION 'tenant, id and salt of an experiment cannot change'
      USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_guard_identity';
  END IF;
  IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
    ('draft', 'active'), ('active', 'paused'), ('paused', 'active'), ('active', 'completed'), ('paused', 'completed'))
  THEN
    RAISE EXCEPTION 'an experiment that is % cannot become %', OLD.status, NEW.status
      USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_guard_transition';
  END IF;
  IF OLD.status <> 'draft' THEN
    IF NEW.phase <> OLD.phase AND (NEW.phase <> OLD.phase + 1 OR OLD.status = 'completed') THEN
      RAISE EXCEPTION 'an experiment that is % and in phase % cannot have phase %', OLD.status, OLD.phase, NEW.phase
        USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_guard_phase';
    END IF;
    IF (NEW.key, NEW.currency, COALESCE(NEW.baseline, NEW.variants -> 0 ->> 'name'), NEW.layer, NEW.layer_start, NEW.layer_end, NEW.unit, NEW.eligibility,
        NEW.start_date, NEW.plan, baseline_prices(NEW.variants, NEW.baseline))
       IS DISTINCT FROM (OLD.key, OLD.currency, COALESCE(OLD.baseline, OLD.variants -> 0 ->> 'name'), OLD.layer, OLD.layer_start, OLD.layer_end, OLD.unit, OLD.eligibility,
           OLD.start_date, OLD.plan, baseline_prices(OLD.variants, OLD.baseline))
    THEN
      RAISE EXCEPTION 'key, currency, baseline and its prices, layer, unit, eligibility, plan and start are frozen once an experiment has been active'
        USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_guard_frozen';
    END IF;
    IF NEW.phase = OLD.phase AND (NEW.variants IS DISTINCT FROM OLD.variants OR NEW.traffic < OLD.traffic) THEN
      RAISE EXCEPTION 'within a phase, variants are frozen once an experiment has been active, and traffic can only be raised'
        USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_guard_frozen';
    END IF;
  END IF;
  NEW.past_phases := OLD.past_phases;
  IF OLD.status <> 'draft' AND NEW.phase <> OLD.phase THEN
    NEW.past_phases := OLD.past_phases || jsonb_build_array(jsonb_build_object('phase', OLD.phase, 'variants', OLD.variants));
  END IF;
  -- Who was on the list keeps the quote of then; and a mark is for good.
  NEW.exceptions := NEW.exceptions OR OLD.exceptions OR NOT NEW.forced @> OLD.forced;
  IF NEW.status <> OLD.status THEN
    IF OLD.status = 'draft' AND NEW.start_date IS NOT DISTINCT FROM OLD.start_date THEN
      NEW.start_date := GREATEST(now(), OLD.created_at);
    END IF;
    IF NEW.status = 'completed' AND NEW.end_date IS NOT DISTINCT FROM OLD.end_date THEN
      -- now() is when this transaction began, which may be before another one activated it.
      NEW.end_date := GREATEST(now(), NEW.start_date);
    END IF;
  END IF;
  NEW.revision := OLD.revision + 1;
  NEW.updated_at := now();
  NEW.updated_by := NULLIF(current_setting('app.actor', true), '');
  RETURN NEW;
END $$;
CREATE TRIGGER experiments_guard BEFORE UPDATE ON experiments FOR EACH ROW EXECUTE FUNCTION experiments_guard();

-- A part of a layer belongs to one experiment from when it is activated until it is completed. A user and the account of
-- that user are in different parts, so all of a layer go by one unit.
CREATE FUNCTION experiments_layer_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    -- With an older snapshot it would not see who was activated meanwhile.
    RAISE EXCEPTION 'an experiment of a layer is activated in a READ COMMITTED transaction'
      USING ERRCODE = 'check_violation', CONSTRAINT = 'experiments_layer_guard';
  END IF;
  PERFORM pg_advisory_xact_lock(hashtext('lastprice/layer'), hashtext(NEW.tenant_id::text || '/' || NEW.layer));
  IF EXISTS (SELECT FROM experiments e WHERE e.tenant_id = NEW.tenant_id AND e.layer = NEW.layer AND e.id <> NEW.id
             AND e.status IN ('active', 'paused')
             AND (e.unit <> NEW.unit OR e.layer_start < NEW.layer_end AND NEW.layer_start < e.layer_end)) THEN
    RAISE EXCEPTION 'another experiment has a part of this range of layer %, or goes by another unit', NEW.layer
      USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'experiments_layer_overlap';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER experiments_layer_taken BEFORE UPDATE ON experiments FOR EACH ROW
  WHEN (OLD.status = 'draft' AND NEW.status IN ('active', 'paused') AND NEW.layer IS NOT NULL)
  EXECUTE FUNCTION experiments_layer_guard();
CREATE TRIGGER experiments_layer_inserted BEFORE INSERT ON experiments FOR EACH ROW
  WHEN (NEW.status IN ('active', 'paused') AND NEW.layer IS NOT NULL)
  EXECUTE FUNCTION experiments_layer_guard();

-- The policy only_drafts_are_deleted, once more when nobody is inserting a sale any longer: the row is locked by now.
CREATE FUNCTION experiments_delete_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF row_security_active(TG_RELID) AND (
    current_setting('transaction_isolation') <> 'read committed'  -- with an older snapshot it would not see it
    OR EXISTS (SELECT FROM conversions c WHERE c.tenant_id = OLD.tenant_id AND c.experiment_id = OLD.id)) THEN
    RETURN NULL;
  END IF;
  RETURN OLD;
END $$;
CREATE TRIGGER experiments_delete_guard BEFORE DELETE ON experiments FOR EACH ROW EXECUTE FUNCTION experiments_delete_guard();

-- Whoever writes: what was recommended never changes, what becomes of it is decided once, and after it has expired nobody
-- approves or applies it. The clock is the statement's, so that who looks in the statement that writes sees the same.
CREATE FUNCTION recommendations_guard() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  life constant text[] := '{status,decided_at,decided_by,rejection_reason,applied_at,applied_by,follow_up_id,observed_revenue,scored_at}';
  actor constant text := NULLIF(current_setting('app.actor', true), '');
  moves constant boolean := NEW.status <> OLD.status;
BEGIN
  IF to_jsonb(NEW) - life IS DISTINCT FROM to_jsonb(OLD) - life THEN
    RAISE EXCEPTION 'what was recommended, by whom and from what cannot change'
      USING ERRCODE = 'check_violation', CONSTRAINT = 'recommendations_guard_frozen';
  END IF;
  IF moves AND (OLD.status, NEW.status) NOT IN (
    ('proposed', 'approved'), ('proposed', 'rejected'), ('proposed', 'expired'),
    ('approved', 'applied'), ('approved', 'rejected'), ('approved', 'expired'))
  THEN
    RAISE EXCEPTION 'a recommendation that is % cannot become %', OLD.status, NEW.status
      USING ERRCODE = 'check_violation', CONSTRAINT = 'recommendations_guard_transition';
  END IF;
  IF moves AND NEW.status <> 'rejected'
    AND COALESCE(NEW.expires_at <= statement_timestamp(), false) <> (NEW.status = 'expired') THEN
    RAISE EXCEPTION 'a recommendation expires when its time is over, and is not approved or applied afterwards'
      USING ERRCODE = 'check_violation', CONSTRAINT = 'recommendations_guard_expiry';
  END IF;
  -- A follow-up is named when it is made, and forgotten when it is deleted, by recommendations_let_go, which is the owner.
  IF moves AND NEW.status = 'applied' AND NEW.follow_up_id IS NULL
    OR NOT moves AND NEW.follow_up_id IS DISTINCT FROM OLD.follow_up_id
       AND (NEW.follow_up_id IS NOT NULL OR row_security_active(TG_RELID))
    OR NOT moves AND NEW.rejection_reason IS DISTINCT FROM OLD.rejection_reason
    OR OLD.observed_revenue IS NOT NULL AND NEW.observed_revenue IS DISTINCT FROM OLD.observed_revenue
  THEN
    RAISE EXCEPTION 'follow-up, reason and observed revenue of a recommendation are written once, each at its time'
      USING ERRCODE = 'check_violation', CONSTRAINT = 'recommendations_guard_once';
  END IF;
  -- Who and when, whatever the statement itself says about it.
  NEW.decided_at := OLD.decided_at;
  NEW.decided_by := OLD.decided_by;
  NEW.applied_at := OLD.applied_at;
  NEW.applied_by := OLD.applied_by;
  NEW.scored_at := OLD.scored_at;
  IF moves AND NEW.status IN ('approved', 'rejected') THEN
    NEW.decided_at := statement_timestamp();
    NEW.decided_by := actor;
  ELSIF moves AND NEW.status = 'applied' THEN
    NEW.applied_at := statement_timestamp();
    NEW.applied_by := actor;
  END IF;
  IF OLD.observed_revenue IS NULL AND NEW.observed_revenue IS NOT NULL THEN
    NEW.scored_at := statement_timestamp();
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER recommendations_guard BEFORE UPDATE ON recommendations FOR EACH ROW EXECUTE FUNCTION recommendations_guard();

-- A follow-up that is deleted as a draft is forgotten. Before the delete, since the foreign key looks right after it; and after
-- experiments_delete_guard, by its name, since that may keep the experiment.
CREATE FUNCTION recommendations_let_go() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  UPDATE recommendations r SET follow_up_id = NULL WHERE r.tenant_id = OLD.tenant_id AND r.follow_up_id = OLD.id;
  RETURN OLD;
END $$;
CREATE TRIGGER recommendations_let_go BEFORE DELETE ON experiments FOR EACH ROW EXECUTE FUNCTION recommendations_let_go();

-- What these rows say and the hash does not.
CREATE FUNCTION assignments_are_exceptions() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  UPDATE experiments SET exceptions = true
  WHERE tenant_id = NEW.tenant_id AND id = NEW.experiment_id AND NOT exceptions;
  RETURN NULL;
END $$;
CREATE TRIGGER assignments_exceptions AFTER INSERT OR UPDATE ON assignments FOR EACH ROW
  WHEN (NEW.reason IN ('imported', 'merged')) EXECUTE FUNCTION assignments_are_exceptions();

-- The law between what was quoted and what is charged: the rules that do not hold. NULL for the list price means: as quoted;
-- nothing was quoted for another currency, or an unknown item.
CREATE FUNCTION broken_price_rules(list_price numeric, quoted numeric, quantity integer, discount numeric, proration numeric,
                                   net numeric, is_expired boolean) RETURNS text[]
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN quoted IS NULL THEN ARRAY['currency']
              ELSE CASE WHEN list_price <> quoted THEN ARRAY['list_price'] ELSE '{}' END
                || CASE WHEN net <> quantity * quoted - discount + proration THEN ARRAY['net'] ELSE '{}' END END
         || CASE WHEN is_expired THEN ARRAY['expired'] ELSE '{}' END
$$;

-- The quoted price of an item: of the book if it is named, else the headline price. JSON keeps zeros that an amount has not.
CREATE FUNCTION quoted_price(price numeric, price_currency text, book jsonb, item text, currency text) RETURNS numeric
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN scale(p.quoted) > 6 THEN round(p.quoted, 6) ELSE p.quoted END FROM (
    SELECT CASE WHEN item IS NOT NULL THEN (SELECT (line ->> 'price')::numeric FROM jsonb_array_elements(book) line
                                            WHERE line ->> 'item' = item AND line ->> 'currency' = currency LIMIT 1)
                WHEN currency = price_currency THEN price END AS quoted) p
$$;

-- A renewal, a refund, a chargeback or its reversal: finds what it belongs to, takes over who and what from there, and looks at
-- the rules. Where one does not hold, what was settled is flagged, and what asks for permission is not written. What was settled
-- and belongs to nothing yet waits. Runs as whoever inserts, bound by row-level security.
CREATE FUNCTION conversions_follow() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  meets  constant text := CASE NEW.kind WHEN 'renewal' THEN 's/' || NEW.subscription_id ELSE 'o/' || NEW.order_id END;
  parent record;   -- a sale or renewal; what went back of it (back), and what of that the bank holds (banked), are negative
  broken text[] := '{}';
BEGIN
  -- Whoever else writes to this order or subscription has ended, and is seen by what follows.
  INSERT INTO ledger_locks (tenant_id, ref) VALUES (NEW.tenant_id, meets) ON CONFLICT DO NOTHING;
  DELETE FROM ledger_locks l WHERE l.tenant_id = NEW.tenant_id AND l.ref = meets;
  -- Who has the key has it, in the ledger or waiting.
  IF EXISTS (SELECT FROM conversions c WHERE c.tenant_id = NEW.tenant_id AND c.idempotency_key = NEW.idempotency_key)
     OR EXISTS (SELECT FROM waiting_conversions w
                WHERE w.tenant_id = NEW.tenant_id AND w.idempotency_key = NEW.idempotency_key AND w.id <> NEW.id) THEN
    RETURN NULL;
  END IF;

  IF NEW.kind = 'renewal' THEN
    SELECT * INTO parent FROM conversions c
    WHERE c.tenant_id = NEW.tenant_id AND c.subscription_id = NEW.subscription_id AND c.kind = 'sale'
    ORDER BY c.occurred_at <= NEW.occurred_at DESC, c.occurred_at DESC, c.id DESC LIMIT 1;
  ELSE
    SELECT c.*, b.* INTO parent FROM conversions c CROSS JOIN LATERAL (
      SELECT COALESCE(sum(b.revenue), 0) AS back, COALESCE(sum(b.revenue) FILTER (WHERE b.kind <> 'refund'), 0) AS banked
      FROM conversions b WHERE b.tenant_id = NEW.tenant_id AND b.sale_id = c.id AND b.currency = c.currency AND b.kind <> 'renewal') b
    WHERE c.tenant_id = NEW.tenant_id AND c.order_id = NEW.order_id AND c.kind IN ('sale', 'renewal')
      AND c.experiment_id = COALESCE(NEW.experiment_id, c.experiment_id) AND c.user_id = COALESCE(NEW.user_id, c.user_id)
      AND (NEW.kind <> 'chargeback_reversal' OR b.banked < 0)
    -- Of an order with several, the one with the most left.
    ORDER BY c.currency = NEW.currency DESC, CASE NEW.kind WHEN 'chargeback_reversal' THEN -b.banked ELSE c.revenue + b.back END DESC, c.id
    LIMIT 1;
  END IF;

  IF NOT FOUND THEN
    IF NEW.settled THEN
      INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
      VALUES (NEW.tenant_id, NEW.idempotency_key, NEW.id, NEW.kind, meets, to_jsonb(NEW)) ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
  END IF;

  IF NEW.kind = 'renewal' THEN
    broken := broken_price_rules(NEW.list_price, CASE WHEN NEW.currency = parent.currency THEN parent.list_price END,
                                 NEW.quantity, NEW.discount, NEW.proration, NEW.revenue, false);
    NEW.quote_mismatch := broken <> '{}';
    NEW.list_price := COALESCE(NEW.list_price, parent.list_price);
    NEW.item := COALESCE(NEW.item, parent.item);
    IF EXISTS (SELECT FROM conversions c WHERE c.tenant_id = NEW.tenant_id AND c.subscription_id = NEW.subscription_id
               AND c.kind = 'renewal' AND c.period = NEW.period) THEN
      broken := broken || ARRAY['period'];
    END IF;
  ELSIF NEW.currency <> parent.currency THEN
    broken := ARRAY['currency'];
  ELSIF NEW.kind = 'chargeback_reversal' THEN
    IF NEW.revenue + parent.banked > 0 THEN
      broken := ARRAY['beyond_chargeback'];
    END IF;
  ELSIF parent.revenue + parent.back + NEW.revenue < 0 THEN
    broken := ARRAY['beyond_sale'];
  END IF;
  -- With an older snapshot, what was paid and went back meanwhile is not seen.
  IF NOT NEW.settled AND (broken <> '{}' OR current_setting('transaction_isolation') <> 'read committed') THEN
    RETURN NULL;
  END IF;
  NEW.flags := broken;
  NEW.sale_id := parent.id;
  NEW.experiment_id := parent.experiment_id;
  NEW.user_id := parent.user_id;
  NEW.variant := parent.variant;
  NEW.phase := parent.phase;
  NEW.reason := parent.reason;
  NEW.assigned_at := parent.assigned_at;
  RETURN NEW;
END $$;
CREATE TRIGGER conversions_follow BEFORE INSERT ON conversions FOR EACH ROW
  WHEN (NEW.sale_id IS NULL AND (NEW.kind = 'renewal' AND NEW.subscription_id IS NOT NULL
        OR NEW.kind IN ('refund', 'chargeback', 'chargeback_reversal') AND NEW.order_id IS NOT NULL))
  EXECUTE FUNCTION conversions_follow();

-- A payment that a webhook has reported under no key of its own (its key is made of the order, or of the subscription of a trial)
-- is the one that somebody else records under another key, whichever comes first and whoever is said to have paid (two ids may turn out
-- to be one person): the second is not written. An invoice may be that of a sale. Several entries of an order by others are several.
-- By its name after conversions_follow. Subscriptions are locked before orders, here as everywhere.
CREATE FUNCTION conversions_once() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  is_trial constant boolean := NEW.kind = 'trial_start';
  kinds    constant text[] := CASE WHEN is_trial THEN ARRAY['trial_start'] ELSE ARRAY['sale', 'renewal'] END;
  -- conversions_follow has locked the subscription of a renewal.
  locks    constant text[] := array_remove(ARRAY[
    CASE NEW.kind WHEN 'trial_start' THEN 't/' WHEN 'sale' THEN 's/' END || NEW.subscription_id,
    CASE WHEN NOT is_trial THEN 'o/' || NEW.order_id END], NULL);
  one      text;
  reported text[];  -- the keys
  is_reported boolean;
  others   uuid[];
BEGIN
  -- Whoever else writes to this order or subscription has ended, and is seen by what follows.
  FOREACH one IN ARRAY locks LOOP
    INSERT INTO ledger_locks (tenant_id, ref) VALUES (NEW.tenant_id, one) ON CONFLICT DO NOTHING;
    DELETE FROM ledger_locks l WHERE l.tenant_id = NEW.tenant_id AND l.ref = one;
  END LOOP;
  IF NOT is_trial AND NEW.order_id IS NULL THEN
    RETURN NEW;
  END IF;
  FOR n IN 1 .. cardinality(kinds) LOOP
    reported[n] := 'paid:' || kinds[n] || ':' || CASE WHEN is_trial THEN NEW.subscription_id ELSE NEW.order_id END;
    IF octet_length(reported[n]) > 255 THEN
      reported[n] := 'paid:' || kinds[n] || ':sha256:' || encode(sha256(convert_to(reported[n], 'UTF8')), 'hex');
    END IF;
  END LOOP;
  is_reported := NEW.idempotency_key = ANY (reported) AND NEW.metadata ? 'webhook';
  -- Sorted by what they look for, while sorting is switched off: so only the index of that is left to choose. A plan that was made for
  -- an almost empty table, and is kept for a while, would read all of the tenant's entries.
  IF NOT is_reported THEN
    others := ARRAY(SELECT c.id FROM conversions c WHERE c.tenant_id = NEW.tenant_id
                      AND c.idempotency_key BETWEEN reported[1] AND reported[1] ORDER BY c.idempotency_key)
           || ARRAY(SELECT c.id FROM conversions c WHERE c.tenant_id = NEW.tenant_id
                      AND c.idempotency_key BETWEEN reported[2] AND reported[2] ORDER BY c.idempotency_key);
  ELSIF is_trial THEN
    others := ARRAY(SELECT c.id FROM conversions c WHERE c.tenant_id = NEW.tenant_id
                      AND c.subscription_id BETWEEN NEW.subscription_id AND NEW.subscription_id ORDER BY c.subscription_id);
  ELSE
    others := ARRAY(SELECT c.id FROM conversions c WHERE c.tenant_id = NEW.tenant_id
                      AND c.order_id BETWEEN NEW.order_id AND NEW.order_id ORDER BY c.order_id);
  END IF;
  -- What a backup has is restored as it was, and what belongs to it as well: it switches row_security off.
  IF others = '{}' OR current_setting('row_security') = 'off' THEN
    RETURN NEW;
  END IF;
  IF EXISTS (
    SELECT FROM conversions c
    WHERE c.tenant_id = NEW.tenant_id AND c.id = ANY (others) AND c.kind = ANY (kinds) AND c.idempotency_key <> NEW.idempotency_key
      AND (is_reported OR c.metadata ? 'webhook' OR c.user_id ~ '^erased-[0-9a-f-]{36}')
      AND CASE WHEN is_trial THEN c.subscription_id = NEW.subscription_id ELSE c.order_id = NEW.order_id END
      -- A sale need not name its subscription.
      AND CASE WHEN NEW.kind = 'renewal' OR c.kind = 'renewal'
               THEN COALESCE(c.subscription_id, NEW.subscription_id) = COALESCE(NEW.subscription_id, c.subscription_id)
               ELSE c.experiment_id = NEW.experiment_id END) THEN
    RETURN NULL;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER conversions_once BEFORE INSERT ON conversions FOR EACH ROW
  WHEN (NEW.kind IN ('sale', 'renewal') AND NEW.order_id IS NOT NULL OR NEW.kind IN ('sale', 'trial_start') AND NEW.subscription_id IS NOT NULL)
  EXECUTE FUNCTION conversions_once();

-- An entry that is written by hand, and does not say when its user was assigned. By its name after conversions_follow, which may
-- know. So results need no look-up: the mere chance of one makes the planner sort all buyers.
CREATE FUNCTION conversions_window() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.assigned_at := (SELECT a.assigned_at FROM assignments a
    WHERE a.tenant_id = NEW.tenant_id AND a.experiment_id = NEW.experiment_id AND a.user_id = NEW.user_id);
  RETURN NEW;
END $$;
CREATE TRIGGER conversions_window BEFORE INSERT ON conversions FOR EACH ROW
  WHEN (NEW.assigned_at IS NULL AND NEW.reason <> 'outside')
  EXECUTE FUNCTION conversions_window();

-- Takes what waits for these into the ledger; what still belongs to nothing stays as it is.
CREATE FUNCTION match_waiting_conversions(of_tenant uuid, refs text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  waiting waiting_conversions;
BEGIN
  FOR waiting IN
    SELECT w.* FROM waiting_conversions w WHERE w.tenant_id = of_tenant AND w.ref = ANY (refs) ORDER BY w.ref, w.received_at
  LOOP
    BEGIN
      -- Whatever the entry says, it is this tenant's.
      INSERT INTO conversions SELECT e.* FROM jsonb_populate_record(NULL::conversions, waiting.entry || jsonb_build_object(
        'tenant_id', waiting.tenant_id, 'id', waiting.id, 'kind', waiting.kind, 'idempotency_key', waiting.idempotency_key)) e
      ON CONFLICT DO NOTHING;
    EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN  -- written by hand: no sale fails for it
      CONTINUE;
    END;
    -- Now, or before: the same report of a writer with an older snapshot. Another amount of its key waits for somebody to look.
    IF EXISTS (SELECT FROM conversions c
               WHERE c.tenant_id = of_tenant AND c.idempotency_key = waiting.idempotency_key
                 AND (c.id = waiting.id OR c.kind = waiting.kind AND to_jsonb(c.revenue) = waiting.entry -> 'revenue'
                      AND to_jsonb(c.currency) = waiting.entry -> 'currency')) THEN
      DELETE FROM waiting_conversions w WHERE w.tenant_id = of_tenant AND w.idempotency_key = waiting.idempotency_key;
    END IF;
  END LOOP;
END $$;

-- An entry that others may belong to: they come in.
CREATE FUNCTION conversions_opened() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  opened record;
BEGIN
  FOR opened IN
    SELECT a.tenant_id, array_agg(DISTINCT r.ref) AS refs
    FROM added a, LATERAL (VALUES ('o/' || a.order_id), (CASE a.kind WHEN 'sale' THEN 's/' || a.subscription_id END)) r (ref)
    WHERE r.ref IS NOT NULL AND a.kind IN ('sale', 'renewal', 'chargeback')
    GROUP BY a.tenant_id ORDER BY a.tenant_id
  LOOP
    -- They are locked since they were written: whoever reports something that belongs to them at this moment sees them, or is seen here.
    IF EXISTS (SELECT FROM waiting_conversions w WHERE w.tenant_id = opened.tenant_id AND w.ref = ANY (opened.refs)) THEN
      PERFORM match_waiting_conversions(opened.tenant_id, opened.refs);
    END IF;
  END LOOP;
  RETURN NULL;
END $$;
CREATE TRIGGER conversions_opened AFTER INSERT ON conversions REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION conversions_opened();

-- Tells the programs that keep experiments in memory that there is something new. The payload says nothing to whoever does
-- not know the tenant's salt.
CREATE FUNCTION config_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  told text;
BEGIN
  IF TG_TABLE_NAME = 'tenants' THEN
    told := OLD.salt;
  ELSIF TG_OP = 'DELETE' THEN
    told := (SELECT salt FROM tenants WHERE id = OLD.tenant_id);
  ELSE
    told := (SELECT salt FROM tenants WHERE id = NEW.tenant_id);
  END IF;
  PERFORM pg_notify('lastprice', encode(sha256(convert_to('lastprice/' || told, 'UTF8')), 'hex')) WHERE told IS NOT NULL;
  RETURN NULL;
END $$;
CREATE TRIGGER config_changed AFTER INSERT OR UPDATE OR DELETE ON experiments
  FOR EACH ROW EXECUTE FUNCTION config_changed();
CREATE TRIGGER config_changed AFTER UPDATE ON tenants
  FOR EACH ROW WHEN (NEW.holdout <> OLD.holdout) EXECUTE FUNCTION config_changed();
CREATE TRIGGER config_gone AFTER DELETE ON tenants
  FOR EACH ROW EXECUTE FUNCTION config_changed();

-- For the audit trail. What the database keeps by itself, or the row itself keeps for ever, is no change to tell of. A tenant's trail goes
-- with the tenant; that it went, and by whom, stays.
CREATE FUNCTION audit_change() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  of_table constant text := regexp_replace(TG_TABLE_NAME, '_[0-9]+$', '');  -- on a cluster, a shard's name
  is_limit constant boolean := of_table = 'tenant_limits';
  quiet  constant text[] := '{id,tenant_id,salt,created_at,updated_at,updated_by,revision,exceptions,past_phases,simulation,decided_at,decided_by,applied_at,applied_by,scored_at}';
  unsaid constant text[] := '{paid_api_key,webhook_secret,forced,metadata,rejection_reason}';
  before jsonb := CASE TG_OP WHEN 'INSERT' THEN '{}' ELSE to_jsonb(OLD) END;
  since  jsonb := CASE TG_OP WHEN 'DELETE' THEN '{}' ELSE to_jsonb(NEW) END;
  named  constant jsonb := before || since;
  owned  constant uuid := CASE of_table WHEN 'tenants' THEN named ->> 'id' ELSE named ->> 'tenant_id' END;
  moment constant timestamptz := clock_timestamp();
  micros constant bigint := extract(epoch FROM moment) * 1000000;
  of_experiment constant uuid := CASE of_table WHEN 'experiments' THEN named ->> 'id' ELSE named ->> 'experiment_id' END;
  what   constant text := CASE TG_OP WHEN 'INSERT' THEN 'created' WHEN 'UPDATE' THEN 'changed' ELSE 'deleted' END;
  told   jsonb := '{}';
BEGIN
  IF of_table = 'tenants' AND TG_OP = 'DELETE' THEN
    DELETE FROM audit_trail t WHERE t.tenant_id = owned;
  ELSIF TG_OP <> 'INSERT' AND NOT EXISTS (SELECT FROM tenants t WHERE t.id = owned) THEN
    RETURN NULL;  -- it goes with its tenant
  ELSE
    IF is_limit THEN  -- a change of the tenant, in what is called as the metric is
      before := CASE WHEN before <> '{}' THEN jsonb_build_object('limit.' || (before ->> 'metric'), before - '{tenant_id,metric}'::text[]) ELSE '{}' END;
      since := CASE WHEN since <> '{}' THEN jsonb_build_object('limit.' || (since ->> 'metric'), since - '{tenant_id,metric}'::text[]) ELSE '{}' END;
    END IF;
    SELECT COALESCE(jsonb_object_agg(k, CASE WHEN k = ANY (unsaid) THEN '{}' ELSE
             CASE WHEN before -> k <> 'null' THEN jsonb_build_object('old', before -> k) ELSE '{}' END
             || CASE WHEN since -> k <> 'null' THEN jsonb_build_object('new', since -> k) ELSE '{}' END END), '{}')
    INTO told FROM jsonb_object_keys(before || since) k
    WHERE k <> ALL (quiet) AND COALESCE(NULLIF(before -> k, '{}'), 'null') <> COALESCE(NULLIF(since -> k, '{}'), 'null');
    IF TG_OP = 'UPDATE' AND told = '{}' THEN
      RETURN NULL;
    END IF;
  END IF;
  INSERT INTO audit_trail (tenant_id, id, at, actor, role, object, object_id, experiment_id, action, changes)
  VALUES (owned,
    -- Milliseconds, version, what is left of them in 4096ths, variant, chance.
    (lpad(to_hex(micros / 1000), 12, '0') || '7' || lpad(to_hex(micros % 1000 * 4096 / 1000), 3, '0') || substr('89ab', 1 + floor(random() * 4)::int, 1)
     || lpad(to_hex(floor(random() * 1152921504606846976)::bigint), 15, '0'))::uuid,
    moment, NULLIF(current_setting('app.actor', true), ''), session_user,
    CASE WHEN is_limit THEN 'tenant' ELSE rtrim(of_table, 's') END,
    CASE WHEN is_limit THEN owned ELSE (named ->> 'id')::uuid END, of_experiment,
    CASE WHEN is_limit THEN 'changed' ELSE what END, told);
  RETURN NULL;
END $$;
CREATE TRIGGER audit_trail AFTER INSERT OR UPDATE OR DELETE ON tenants FOR EACH ROW EXECUTE FUNCTION audit_change();
CREATE TRIGGER audit_trail AFTER INSERT OR UPDATE OR DELETE ON experiments FOR EACH ROW EXECUTE FUNCTION audit_change();
CREATE TRIGGER audit_trail AFTER INSERT OR UPDATE OR DELETE ON recommendations FOR EACH ROW EXECUTE FUNCTION audit_change();

-- 5. Metrics: exact, live, locking nothing ------------------------------------------------------------------
--
-- Writers insert deltas; a fold moves deltas into totals; live = totals + pending deltas, read in one
-- statement. Always: totals + pending deltas = a recount of the events + the baselines of what was removed.

CREATE TABLE metric_totals (
  tenant_id     uuid    NOT NULL,
  experiment_id uuid    NOT NULL,
  phase         integer NOT NULL,
  variant       text    NOT NULL,
  reason        text    NOT NULL,
  currency      text    NOT NULL,
  day           date    NOT NULL,
  assignments   bigint  NOT NULL DEFAULT 0,
  views         bigint  NOT NULL DEFAULT 0,
  conversions   bigint  NOT NULL DEFAULT 0,
  renewals      bigint  NOT NULL DEFAULT 0,
  refunds       bigint  NOT NULL DEFAULT 0,
  revenue       numeric NOT NULL DEFAULT 0,
  CONSTRAINT metric_totals_pkey PRIMARY KEY (tenant_id, experiment_id, day, variant, phase, reason, currency),
  CONSTRAINT metric_totals_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE
) WITH (fillfactor = 80);
-- For the whole tenant's, in tenant_usage. Without the numbers: a fold changes them, and rewrites no index. By day + 0, so that the
-- planner does not take it for one experiment's days: it would read those of all.
CREATE INDEX metric_totals_day_idx ON metric_totals (tenant_id, (day + 0));
COMMENT ON COLUMN metric_totals.currency IS 'XXX (ISO 4217: no currency) for assignments and views';
COMMENT ON COLUMN metric_totals.day IS 'UTC';
COMMENT ON COLUMN metric_totals.refunds IS 'refunds and chargebacks';

-- A random id, so that a data-only restore, which fires the triggers, never meets the restored deltas' ids. No foreign key: the
-- check of each delta was a third of what counting cost; the events that are counted have one, and a trigger removes the
-- deltas of an experiment with it.
CREATE TABLE metric_deltas (
  tenant_id     uuid    NOT NULL,
  id            uuid    NOT NULL DEFAULT gen_random_uuid(),
  experiment_id uuid    NOT NULL,
  phase         integer NOT NULL,
  variant       text    NOT NULL,
  reason        text    NOT NULL,
  currency      text    NOT NULL,
  day           date    NOT NULL,
  assignments   bigint  NOT NULL DEFAULT 0,
  views         bigint  NOT NULL DEFAULT 0,
  conversions   bigint  NOT NULL DEFAULT 0,
  renewals      bigint  NOT NULL DEFAULT 0,
  refunds       bigint  NOT NULL DEFAULT 0,
  revenue       numeric NOT NULL DEFAULT 0,
  CONSTRAINT metric_deltas_pkey PRIMARY KEY (tenant_id, experiment_id, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE FUNCTION metrics_go() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  DELETE FROM metric_deltas d WHERE d.tenant_id = OLD.tenant_id AND d.experiment_id = OLD.id;
  RETURN NULL;
END $$;
CREATE TRIGGER metrics_go AFTER DELETE ON experiments FOR EACH ROW EXECUTE FUNCTION metrics_go();

-- What the owner's archive has removed, and still counts: assignments and views that no row stands for any longer. Written in
-- the transaction that removes them, so that a recount at any moment finds each once.
CREATE TABLE metric_baselines (
  tenant_id     uuid    NOT NULL,
  experiment_id uuid    NOT NULL,
  phase         integer NOT NULL,
  variant       text    NOT NULL,
  reason        text    NOT NULL,
  day           date    NOT NULL,
  assignments   bigint  NOT NULL DEFAULT 0,
  views         bigint  NOT NULL DEFAULT 0,
  CONSTRAINT metric_baselines_pkey PRIMARY KEY (tenant_id, experiment_id, day, variant, phase, reason),
  CONSTRAINT metric_baselines_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE
) WITH (fillfactor = 80);
COMMENT ON COLUMN metric_baselines.day IS 'UTC';

-- The experiments whose events are being archived, or were: with what results say of their newest views, which were still there.
CREATE TABLE archived_experiments (
  tenant_id         uuid        NOT NULL,
  experiment_id     uuid        NOT NULL,
  views             bigint      NOT NULL,
  viewers           bigint      NOT NULL,
  suspects          bigint      NOT NULL,
  views_of_suspects bigint      NOT NULL,
  began_at          timestamptz NOT NULL DEFAULT now(),
  finished_at       timestamptz,
  CONSTRAINT archived_experiments_pkey PRIMARY KEY (tenant_id, experiment_id),
  CONSTRAINT archived_experiments_experiment_fkey FOREIGN KEY (tenant_id, experiment_id)
    REFERENCES experiments (tenant_id, id) ON DELETE CASCADE
);
COMMENT ON COLUMN archived_experiments.views IS 'of the newest 10,000; whose they were, and of whom there were too many';

-- Removed rows count only while their experiment is there: when a cascade removes both, nothing stays behind.
CREATE FUNCTION metrics_count_assignments() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments)
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', (assigned_at AT TIME ZONE 'UTC')::date, count(*)
    FROM added WHERE merged_into IS NULL GROUP BY 1, 2, 3, 4, 5, 7;
  END IF;
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments)
    SELECT r.tenant_id, r.experiment_id, r.phase, r.variant, r.reason, 'XXX', (r.assigned_at AT TIME ZONE 'UTC')::date, -count(*)
    FROM removed r JOIN experiments e ON e.tenant_id = r.tenant_id AND e.id = r.experiment_id
    WHERE r.merged_into IS NULL GROUP BY 1, 2, 3, 4, 5, 7;
  END IF;
  RETURN NULL;
END $$;

CREATE FUNCTION metrics_count_views() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', (occurred_at AT TIME ZONE 'UTC')::date, count(*)
    FROM added GROUP BY 1, 2, 3, 4, 5, 7;
  END IF;
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
    SELECT r.tenant_id, r.experiment_id, r.phase, r.variant, r.reason, 'XXX', (r.occurred_at AT TIME ZONE 'UTC')::date, -count(*)
    FROM removed r JOIN experiments e ON e.tenant_id = r.tenant_id AND e.id = r.experiment_id
    GROUP BY 1, 2, 3, 4, 5, 7;
  END IF;
  RETURN NULL;
END $$;

-- A conversion is a sale.
CREATE FUNCTION metrics_count_conversions() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, conversions, renewals, refunds, revenue)
    SELECT tenant_id, experiment_id, phase, variant, reason, currency, (occurred_at AT TIME ZONE 'UTC')::date,
           count(*) FILTER (WHERE kind = 'sale'), count(*) FILTER (WHERE kind = 'renewal'),
           count(*) FILTER (WHERE kind IN ('refund', 'chargeback')), sum(revenue)
    FROM added GROUP BY 1, 2, 3, 4, 5, 6, 7;
  END IF;
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, conversions, renewals, refunds, revenue)
    SELECT r.tenant_id, r.experiment_id, r.phase, r.variant, r.reason, r.currency, (r.occurred_at AT TIME ZONE 'UTC')::date,
           -count(*) FILTER (WHERE r.kind = 'sale'), -count(*) FILTER (WHERE r.kind = 'renewal'),
           -count(*) FILTER (WHERE r.kind IN ('refund', 'chargeback')), -sum(r.revenue)
    FROM removed r JOIN experiments e ON e.tenant_id = r.tenant_id AND e.id = r.experiment_id
    GROUP BY 1, 2, 3, 4, 5, 6, 7;
  END IF;
  RETURN NULL;
END $$;

DO $$
DECLARE
  t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['assignments', 'views', 'conversions'] LOOP
    EXECUTE format('CREATE TRIGGER metrics_added AFTER INSERT ON %I REFERENCING NEW TABLE AS added
                    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_%1$s()', t);
    EXECUTE format('CREATE TRIGGER metrics_changed AFTER UPDATE ON %I REFERENCING OLD TABLE AS removed NEW TABLE AS added
                    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_%1$s()', t);
    EXECUTE format('CREATE TRIGGER metrics_removed AFTER DELETE ON %I REFERENCING OLD TABLE AS removed
                    FOR EACH STATEMENT EXECUTE FUNCTION metrics_count_%1$s()', t);
  END LOOP;
END $$;

-- Who folds: one at a time per tenant, or one for all tenants; a fold never waits for another.
-- The locks are the pairs (table, tenant) and (table, 0).
--
-- FOR KEY SHARE SKIP LOCKED: the fold passes over an experiment that is being deleted instead of waiting for
-- it, since that delete will wait for the fold's rows.
CREATE FUNCTION fold_metric_deltas(only_tenant uuid) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  all_tenants constant int := 'metric_totals'::regclass::oid::bigint::bit(32)::int;
  one_tenant  constant int := 'metric_deltas'::regclass::oid::bigint::bit(32)::int;
  folded bigint;
BEGIN
  -- With an older snapshot the fold would collide with those before it, and fail its caller's transaction.
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RETURN 0;
  END IF;
  IF only_tenant IS NULL THEN
    IF NOT pg_try_advisory_xact_lock(all_tenants, 0) THEN
      RETURN 0;
    END IF;
  ELSIF NOT pg_try_advisory_xact_lock_shared(all_tenants, 0)
     OR NOT pg_try_advisory_xact_lock(one_tenant, hashtext(only_tenant::text)) THEN
    RETURN 0;
  END IF;
  EXECUTE format($fold$
    WITH e AS MATERIALIZED (
      SELECT tenant_id, id FROM experiments e
      WHERE %s EXISTS (SELECT FROM metric_deltas d WHERE d.tenant_id = e.tenant_id AND d.experiment_id = e.id)
      FOR KEY SHARE SKIP LOCKED
    ), d AS (
      DELETE FROM metric_deltas d USING e WHERE d.tenant_id = e.tenant_id AND d.experiment_id = e.id
      RETURNING d.*
    ), t AS (
      INSERT INTO metric_totals AS m
        (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views, conversions, renewals, refunds, revenue)
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, day,
             sum(assignments), sum(views), sum(conversions), sum(renewals), sum(refunds), sum(revenue)
      FROM d GROUP BY 1, 2, 3, 4, 5, 6, 7
      ON CONFLICT (tenant_id, experiment_id, day, variant, phase, reason, currency) DO UPDATE SET
        assignments = m.assignments + excluded.assignments, views = m.views + excluded.views,
        conversions = m.conversions + excluded.conversions, renewals = m.renewals + excluded.renewals,
        refunds = m.refunds + excluded.refunds, revenue = m.revenue + excluded.revenue
    )
    SELECT count(*) FROM d $fold$,
    CASE WHEN only_tenant IS NULL THEN '' ELSE 'e.tenant_id = $1 AND' END)
  INTO folded USING only_tenant;
  RETURN folded + fold_usage(only_tenant);
END $$;

-- For the application: folds its own tenant's deltas and reported usage, and says how many.
CREATE FUNCTION fold_experiment_metrics() RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  IF app_tenant_id() IS NULL THEN
    RETURN 0;
  END IF;
  RETURN fold_metric_deltas(app_tenant_id());
END $$;

-- Rebuilds the totals from the events and baselines: after a data-only restore (whose triggers count twice) or a TRUNCATE.
-- One statement, hence one snapshot: the deltas it removes are exactly those of the events it counts, and
-- writers of events go on meanwhile. Changes of experiments wait: a delete would deadlock with the count, or leave it
-- with totals of no experiment. Returns how many totals it wrote.
CREATE FUNCTION recount_experiment_metrics() RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  counted bigint;
BEGIN
  PERFORM pg_advisory_xact_lock('metric_totals'::regclass::oid::bigint::bit(32)::int, 0);
  LOCK TABLE experiments IN SHARE MODE;
  WITH gone AS (
    DELETE FROM metric_deltas RETURNING 1
  ), events AS (
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
    SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', day, assignments, views, 0, 0, 0, 0 FROM metric_baselines
    UNION ALL  -- what is there now, as zeros, so that a total without events becomes zero
    SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, 0, 0, 0, 0, 0, 0 FROM metric_totals
  )
  INSERT INTO metric_totals AS m
    (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views, conversions, renewals, refunds, revenue)
  SELECT tenant_id, experiment_id, phase, variant, reason, currency, day,
         sum(assignments), sum(views), sum(conversions), sum(renewals), sum(refunds), sum(revenue)
  FROM events GROUP BY 1, 2, 3, 4, 5, 6, 7
  ON CONFLICT (tenant_id, experiment_id, day, variant, phase, reason, currency) DO UPDATE SET
    assignments = excluded.assignments, views = excluded.views,
    conversions = excluded.conversions, renewals = excluded.renewals, refunds = excluded.refunds, revenue = excluded.revenue;
  GET DIAGNOSTICS counted = ROW_COUNT;
  DELETE FROM metric_totals WHERE assignments = 0 AND views = 0 AND conversions = 0 AND renewals = 0 AND refunds = 0 AND revenue = 0;
  RETURN counted;
END $$;

CREATE MATERIALIZED VIEW experiment_metrics AS
SELECT e.tenant_id, e.id AS experiment_id, e.key, e.name, e.status, e.currency,
       COALESCE(sum(m.assignments), 0)::bigint AS assignments,
       COALESCE(sum(m.views), 0)::bigint AS views,
       COALESCE(sum(m.conversions), 0)::bigint AS conversions,
       COALESCE(sum(m.revenue) FILTER (WHERE m.currency = e.currency), 0) AS revenue,
       sum(m.conversions) / NULLIF(sum(m.assignments), 0) AS conversion_rate,
       sum(m.revenue) FILTER (WHERE m.currency = e.currency)
         / NULLIF(sum(m.conversions) FILTER (WHERE m.currency = e.currency), 0) AS average_order_value,
       now() AS refreshed_at
FROM experiments e
LEFT JOIN (
  SELECT tenant_id, experiment_id, currency, assignments, views, conversions, revenue FROM metric_totals WHERE reason <> 'outside'
  UNION ALL
  SELECT tenant_id, experiment_id, currency, assignments, views, conversions, revenue FROM metric_deltas WHERE reason <> 'outside'
) m ON m.tenant_id = e.tenant_id AND m.experiment_id = e.id
GROUP BY e.tenant_id, e.id;
CREATE UNIQUE INDEX experiment_metrics_key ON experiment_metrics (tenant_id, experiment_id);
COMMENT ON COLUMN experiment_metrics.revenue IS 'in the currency of the experiment; other currencies are never added to it';
COMMENT ON COLUMN experiment_metrics.conversion_rate IS 'sales per assigned user';
COMMENT ON COLUMN experiment_metrics.average_order_value IS 'revenue per sale, both in the currency of the experiment';

-- Folds, then refreshes; single-flight: false where another refresh is under way.
CREATE FUNCTION refresh_experiment_metrics() RETURNS boolean
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  populated boolean;
  since     timestamptz;
BEGIN
  IF NOT pg_try_advisory_xact_lock('experiment_metrics'::regclass::oid::bigint::bit(32)::int, 0) THEN
    RETURN false;
  END IF;
  populated := (SELECT relispopulated FROM pg_class WHERE oid = 'experiment_metrics'::regclass);
  -- For writers with an older snapshot, who did not see each other. What still belongs to nothing is left alone: its locks may
  -- be held by a transaction of a host's. Once a day all, and else what came since the last look, in a transaction of at most an hour.
  IF populated THEN
    since := (SELECT m.refreshed_at - interval '1 hour' FROM experiment_metrics m
              WHERE (m.refreshed_at AT TIME ZONE 'UTC')::date = (now() AT TIME ZONE 'UTC')::date LIMIT 1);
  END IF;
  PERFORM match_waiting_conversions(w.tenant_id, w.refs)
  FROM (SELECT w.tenant_id, array_agg(DISTINCT w.ref) AS refs FROM waiting_conversions w
        WHERE w.received_at >= COALESCE(since, '-infinity') AND CASE w.kind WHEN 'renewal' THEN (
          SELECT c.id FROM conversions c
          WHERE c.tenant_id = w.tenant_id AND c.subscription_id = substr(w.ref, 3) AND c.kind = 'sale' LIMIT 1)
        ELSE (
          SELECT c.id FROM conversions c WHERE c.tenant_id = w.tenant_id AND c.order_id = substr(w.ref, 3)
            AND CASE w.kind WHEN 'chargeback_reversal' THEN c.kind = 'chargeback' ELSE c.kind IN ('sale', 'renewal') END LIMIT 1)
        END IS NOT NULL
        GROUP BY w.tenant_id) w;
  PERFORM fold_metric_deltas(NULL);
  IF populated THEN
    REFRESH MATERIALIZED VIEW CONCURRENTLY experiment_metrics;
  ELSE  -- after a schema-only restore there is nothing to compare with
    REFRESH MATERIALIZED VIEW experiment_metrics;
  END IF;
  RETURN true;
END $$;

-- 5b. Users: who is one person, and who is forgotten --------------------------------------------------------
--
-- The application has no right to change what is stored of a user; it may ask these two functions to, for its own tenant.

-- An id that turned out to be another one's: known_id is the last of a chain, never one that was merged itself.
CREATE TABLE identities (
  tenant_id uuid        NOT NULL,
  id        uuid        NOT NULL DEFAULT gen_random_uuid(),
  user_id   text        NOT NULL,
  known_id  text        NOT NULL,
  policy    text        NOT NULL,
  report    jsonb       NOT NULL DEFAULT '{}',
  merged_at timestamptz NOT NULL DEFAULT now(),
  merged_by text        DEFAULT NULLIF(current_setting('app.actor', true), ''),
  CONSTRAINT identities_pkey PRIMARY KEY (tenant_id, user_id),
  CONSTRAINT identities_id_key UNIQUE (tenant_id, id),
  CONSTRAINT identities_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT identities_user_check CHECK (octet_length(user_id) BETWEEN 1 AND 512),
  CONSTRAINT identities_known_check CHECK (known_id <> user_id AND octet_length(known_id) BETWEEN 1 AND 512),
  CONSTRAINT identities_policy_check CHECK (policy IN ('first_quote_wins', 'exclude')),
  CONSTRAINT identities_report_check CHECK (jsonb_typeof(report) = 'object')
);
CREATE INDEX identities_known_idx ON identities (tenant_id, known_id);
COMMENT ON COLUMN identities.report IS 'what the merge did: counts, and ids of experiments';

-- That somebody was forgotten, and never who.
CREATE TABLE erasures (
  tenant_id uuid        NOT NULL,
  id        uuid        NOT NULL DEFAULT gen_random_uuid(),
  pseudonym text        NOT NULL,
  counts    jsonb       NOT NULL DEFAULT '{}',
  erased_at timestamptz NOT NULL DEFAULT now(),
  erased_by text        DEFAULT NULLIF(current_setting('app.actor', true), ''),
  CONSTRAINT erasures_pkey PRIMARY KEY (tenant_id, id),
  CONSTRAINT erasures_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT erasures_pseudonym_check CHECK (octet_length(pseudonym) BETWEEN 1 AND 512),
  CONSTRAINT erasures_counts_check CHECK (jsonb_typeof(counts) = 'object')
);

-- Locks users and gives who they are by now, who are locked as well: whoever merges or erases one of them waits. In one order,
-- so that nobody waits for somebody who waits.
CREATE FUNCTION locked_users(of_tenant uuid, ids text[]) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
  are    text[];
  before text[];
  one    text;
BEGIN
  LOOP
    are := '{}';
    FOREACH one IN ARRAY ids LOOP
      are := are || COALESCE((SELECT i.known_id FROM identities i WHERE i.tenant_id = of_tenant AND i.user_id = one), one);
    END LOOP;
    IF are = before THEN
      RETURN are;  -- nobody else has become known while we waited
    END IF;
    before := are;
    PERFORM pg_advisory_xact_lock(hashtext('lastprice/user'), h.h)
    FROM (SELECT DISTINCT hashtext(of_tenant::text || '/' || u) AS h FROM unnest(ids || are) u ORDER BY 1) h;
  END LOOP;
END $$;

-- Whoever writes what belongs to an entry of these users (a refund, a renewal) has ended, and is seen by what follows; or waits until
-- this transaction has ended, and sees whose the entry is by then. In the order in which a batch of theirs is locked.
CREATE FUNCTION lock_entries(of_tenant uuid, ids text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  refs text[] := ARRAY(
    SELECT r.ref
    FROM conversions c, LATERAL (VALUES ('o/' || c.order_id), (CASE c.kind WHEN 'sale' THEN 's/' || c.subscription_id END)) r (ref)
    WHERE c.tenant_id = of_tenant AND c.user_id = ANY (ids) AND c.kind IN ('sale', 'renewal') AND r.ref IS NOT NULL
    GROUP BY r.ref ORDER BY min(c.subscription_id), r.ref LIKE 'o/%', r.ref);
  one  text;
BEGIN
  FOREACH one IN ARRAY refs LOOP
    INSERT INTO ledger_locks (tenant_id, ref) VALUES (of_tenant, one) ON CONFLICT DO NOTHING;
    DELETE FROM ledger_locks l WHERE l.tenant_id = of_tenant AND l.ref = one;
  END LOOP;
END $$;

-- From now on, anonymous is known. In every experiment in which one of them has a quote both have it afterwards: known's is the
-- one that counts, and anonymous's (merged_into) leads to it, so that what comes in late counts there. Where both had one they
-- are one user from the earlier of the two on; or, if they saw different prices, or by the policy exclude, in no statistic
-- (reason merged). Views stay with the id that saw them. Called again, it takes over what came in meanwhile. What was archived
-- stays as it was: of it nobody knows any more who saw what.
CREATE FUNCTION merge_users(anonymous text, known text, how text, merge_id uuid DEFAULT gen_random_uuid())
  RETURNS TABLE (outcome text, merged identities) LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  tenant  constant uuid := app_tenant_id();
  master  text;           -- who known is by now
  before  identities;
  ids     text[];         -- anonymous, and who was merged into one of the two
  x       uuid;
  of_anonymous assignments;
  of_master    assignments;
  was          assignments;  -- of_master before
  taken   bigint;
  lent    bigint;
  entries bigint;
  taken_over integer := 0;
  shared    uuid[] := '{}';
  crossed   uuid[] := '{}';
  left_out  uuid[] := '{}';
  touched   uuid[];
BEGIN
  IF anonymous = known OR NOT EXISTS (SELECT FROM tenants t WHERE t.id = tenant) THEN
    RETURN;
  END IF;
  before.tenant_id := tenant;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RETURN QUERY SELECT 'isolation', before;  -- with an older snapshot it would not see who was merged meanwhile
    RETURN;
  END IF;
  master := (locked_users(tenant, ARRAY[anonymous, known]))[2];
  SELECT * INTO before FROM identities i WHERE i.tenant_id = tenant AND i.user_id = anonymous;
  IF before.known_id <> master OR before.policy <> how THEN
    RETURN QUERY SELECT CASE WHEN before.known_id <> master THEN 'elsewhere' ELSE 'policy' END, before;
    RETURN;
  END IF;
  IF master = anonymous THEN
    RETURN QUERY SELECT 'circle', i FROM identities i WHERE i.tenant_id = tenant AND i.user_id = known;
    RETURN;
  END IF;
  ids := anonymous || ARRAY(
    SELECT i.user_id FROM identities i WHERE i.tenant_id = tenant AND i.known_id IN (anonymous, master) AND i.user_id <> anonymous);

  touched := ARRAY(
    SELECT q.experiment_id FROM assignments q WHERE q.tenant_id = tenant AND q.user_id = anonymous AND q.merged_into IS NULL
    UNION
    SELECT q.experiment_id FROM assignments q WHERE q.tenant_id = tenant AND q.user_id = master AND NOT EXISTS (
      SELECT FROM assignments o WHERE o.tenant_id = tenant AND o.experiment_id = q.experiment_id AND o.user_id = anonymous)
    EXCEPT
    SELECT r.experiment_id FROM archived_experiments r WHERE r.tenant_id = tenant
    ORDER BY 1);
  -- What the hash says of these is no longer all there is to say. Before all else, and in one order. And of those that are over, the
  -- archive begins with none from here on: it waits for the row, or has begun, and is seen. With others it begins a day later at the earliest.
  PERFORM FROM experiments e WHERE e.tenant_id = tenant AND e.id = ANY (touched) AND (NOT e.exceptions OR e.status = 'completed')
  ORDER BY e.id FOR NO KEY UPDATE;
  touched := ARRAY(SELECT unnest(touched) EXCEPT SELECT r.experiment_id FROM archived_experiments r WHERE r.tenant_id = tenant ORDER BY 1);
  UPDATE experiments e SET exceptions = true WHERE e.tenant_id = tenant AND e.id = ANY (touched) AND NOT e.exceptions;

  FOREACH x IN ARRAY touched LOOP
    -- Who has no quote gets the other's; who got one of his own meanwhile has it.
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, book, phase, reason, assigned_at, valid_until)
    SELECT tenant, x, master, q.variant, q.price, q.currency, q.book, q.phase, q.reason, q.assigned_at, q.valid_until
    FROM assignments q WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = anonymous ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS taken = ROW_COUNT;
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, book, phase, reason, assigned_at, valid_until, merged_into)
    SELECT tenant, x, anonymous, q.variant, q.price, q.currency, q.book, q.phase, q.reason, q.assigned_at, q.valid_until, master
    FROM assignments q WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = master ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS lent = ROW_COUNT;
    CONTINUE WHEN lent > 0;  -- it leads to master's, of which nothing changes
    -- Whoever sells to one of them at this moment has ended, and is seen by what follows.
    PERFORM FROM assignments q WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = ANY (ids || master)
      AND (q.user_id IN (anonymous, master) OR q.merged_into IN (anonymous, master)) ORDER BY q.user_id FOR UPDATE;
    SELECT * INTO of_anonymous FROM assignments q WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = anonymous;
    SELECT * INTO of_master FROM assignments q WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = master;
    was := of_master;
    taken_over := taken_over + taken;
    IF taken = 0 THEN
      shared := shared || x;
      -- One assignment less is counted. What was used stays used.
      INSERT INTO usage (tenant_id, metric, day, value)
      VALUES (tenant, 'signals', (CASE how WHEN 'exclude' THEN of_anonymous.assigned_at
        ELSE GREATEST(of_anonymous.assigned_at, of_master.assigned_at) END AT TIME ZONE 'UTC')::date, 1);
      IF (of_anonymous.variant, of_anonymous.price, of_anonymous.currency, of_anonymous.book)
         IS DISTINCT FROM (of_master.variant, of_master.price, of_master.currency, of_master.book) THEN
        crossed := crossed || x;
      END IF;
      IF how = 'exclude' OR x = ANY (crossed) OR 'merged' IN (of_anonymous.reason, of_master.reason) THEN
        left_out := left_out || x;
        of_anonymous.reason := 'merged';
        of_master.reason := 'merged';
      END IF;
      IF how <> 'exclude' THEN
        -- The same price is promised as long as by either of them.
        IF NOT x = ANY (crossed) THEN
          of_master.valid_until := CASE WHEN of_master.valid_until IS NOT NULL AND of_anonymous.valid_until IS NOT NULL
            THEN GREATEST(of_master.valid_until, of_anonymous.valid_until) END;
          of_anonymous.valid_until := of_master.valid_until;
        END IF;
        IF of_anonymous.assigned_at < of_master.assigned_at THEN
          of_master := of_anonymous;
        END IF;
      END IF;
      UPDATE assignments q SET (variant, price, currency, book, phase, reason, assigned_at, valid_until)
        = (of_master.variant, of_master.price, of_master.currency, of_master.book, of_master.phase, of_master.reason,
           of_master.assigned_at, of_master.valid_until)
      WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = master;
    END IF;
    -- The ids lead to it, at its price; but one that was left out with a price of its own keeps that.
    UPDATE assignments q SET (variant, price, currency, book, phase, assigned_at, valid_until)
      = (of_master.variant, of_master.price, of_master.currency, of_master.book, of_master.phase, of_master.assigned_at,
         of_master.valid_until)
    WHERE how <> 'exclude' AND q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = ANY (ids)
      AND (q.user_id = anonymous OR q.merged_into IN (anonymous, master)) AND (q.variant, q.price, q.currency, q.book)
        IN ((of_anonymous.variant, of_anonymous.price, of_anonymous.currency, of_anonymous.book),
            (was.variant, was.price, was.currency, was.book));
    UPDATE assignments q SET merged_into = master, reason = of_master.reason
    WHERE q.tenant_id = tenant AND q.experiment_id = x AND q.user_id = ANY (ids)
      AND (q.user_id = anonymous OR q.merged_into IN (anonymous, master));
  END LOOP;
  UPDATE identities i SET known_id = master WHERE i.tenant_id = tenant AND i.known_id = anonymous;

  -- The ledger: each entry once, by one user, with the assignment that counts; sums stay.
  PERFORM lock_entries(tenant, CASE shared WHEN '{}' THEN ARRAY[anonymous] ELSE ARRAY[anonymous, master] END);
  entries := (SELECT count(*) FROM conversions c WHERE c.tenant_id = tenant AND c.user_id = anonymous
    AND NOT EXISTS (SELECT FROM archived_experiments r WHERE r.tenant_id = tenant AND r.experiment_id = c.experiment_id));
  UPDATE conversions c SET user_id = master,
    reason = CASE WHEN u.reason = 'merged' OR c.variant = u.variant THEN u.reason ELSE c.reason END,
    phase = CASE WHEN u.reason <> 'merged' AND c.variant = u.variant THEN u.phase ELSE c.phase END,
    assigned_at = CASE WHEN u.reason <> 'merged' AND c.variant = u.variant THEN u.assigned_at ELSE c.assigned_at END
  FROM assignments u
  WHERE c.tenant_id = tenant AND c.user_id IN (anonymous, master) AND c.reason <> 'outside'
    AND (c.user_id = anonymous OR c.experiment_id = ANY (shared))
    AND NOT EXISTS (SELECT FROM archived_experiments r WHERE r.tenant_id = tenant AND r.experiment_id = c.experiment_id)
    AND u.tenant_id = tenant AND u.experiment_id = c.experiment_id AND u.user_id = master;
  UPDATE conversions c SET user_id = master WHERE c.tenant_id = tenant AND c.user_id = anonymous
    AND NOT EXISTS (SELECT FROM archived_experiments r WHERE r.tenant_id = tenant AND r.experiment_id = c.experiment_id);
  UPDATE waiting_conversions w SET entry = jsonb_set(w.entry, '{user_id}', to_jsonb(master))
  WHERE w.tenant_id = tenant AND w.entry ->> 'user_id' = anonymous;

  -- With what was merged before, if it was: this user is locked.
  before.report := jsonb_build_object(
    'taken_over', COALESCE((before.report ->> 'taken_over')::int, 0) + taken_over,
    'shared', COALESCE((before.report ->> 'shared')::int, 0) + cardinality(shared),
    'entries', COALESCE((before.report ->> 'entries')::bigint, 0) + entries,
    'crossovers', COALESCE(before.report -> 'crossovers', '[]') || to_jsonb(crossed),
    'excluded', COALESCE(before.report -> 'excluded', '[]') || to_jsonb(left_out));
  INSERT INTO identities AS i (tenant_id, id, user_id, known_id, policy, report)
  VALUES (tenant, merge_id, anonymous, master, how, before.report)
  ON CONFLICT (tenant_id, user_id) DO UPDATE SET report = excluded.report WHERE i.report <> excluded.report;
  RETURN QUERY SELECT 'merged', i FROM identities i WHERE i.tenant_id = tenant AND i.user_id = anonymous;
END $$;

-- Whether one of these ids is in a text, and not within a longer word or number.
CREATE FUNCTION names_one(said text, ids text[]) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  RETURN EXISTS (SELECT FROM unnest(ids) id WHERE position(id IN said) > 0
    AND said ~ ('(^|[^[:alnum:]])' || regexp_replace(id, '([!-/:-@[-`{-~])', '\\\1', 'g') || '($|[^[:alnum:]])'));
END $$;

-- Whether a webhook's body says one of these users: true, if a text, a number or the name of a member of its JSON is the id and nothing
-- else, or if it is no JSON and the id is in it; false, if the id is in something else of it; NULL, if it is not. And what is left of the
-- body with another name for its customer. What else is the id stays, since it may be an order's: its name decides what counts once.
CREATE FUNCTION webhook_without(body bytea, ids text[], names text[], OUT says boolean, OUT rest bytea) LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  plain text;
  said  jsonb;
  him   integer;
BEGIN
  rest := body;
  BEGIN
    -- Every backslash begins an escape now. What the ledger reads and jsonb refuses, a zero and half of a pair, is set aside for a while.
    plain := replace(convert_from(body, 'UTF8'), '\\', '\u005c');
    IF plain ~ '\\u(0000|[dD][89a-fA-F])' THEN
      plain := regexp_replace(plain, '\\u(0000|[dD][89abAB][[:xdigit:]]{2}(?!\\u[dD][c-fC-F]))', '\\u001a=\1=', 'g');
      plain := regexp_replace(plain, '(?<!\\u[dD][89abAB][[:xdigit:]]{2})\\u([dD][c-fC-F][[:xdigit:]]{2})', '\\u001a=\1=', 'g');
    END IF;
    said := plain::jsonb;
    says := jsonb_path_exists(said, '$.** ? (@ == $ids[*] || exists (@.keyvalue() ? (@.key == $ids[*])))', jsonb_build_object('ids',
      to_jsonb(ids) || (SELECT COALESCE(jsonb_agg(id::numeric), '[]') FROM unnest(ids) id WHERE id ~ '^-?(0|[1-9]\d*)(\.\d+)?$')));
    him := array_position(ids, said #>> '{data,customer_id}');
    IF him IS NOT NULL THEN
      said := jsonb_set(said, '{data,customer_id}', to_jsonb(names[him]));
      rest := convert_to(regexp_replace(said::text, '\\u001a=([[:xdigit:]]{4})=', '\\u\1', 'g'), 'UTF8');
    ELSIF NOT says THEN
      plain := plain || ' ' || said;  -- of a member that is there twice jsonb has one
      says := NULL;
      IF EXISTS (SELECT FROM unnest(ids) id WHERE position(replace(id, '\', '') IN replace(plain, '\', '')) > 0)
         AND names_one(regexp_replace(regexp_replace(plain, '\\[bfnrt]|\\u....', ' ', 'g'), '\\(.)', '\1', 'g'), ids) THEN
        says := false;
      END IF;
    END IF;
  EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    says := NULLIF(CASE WHEN plain IS NOT NULL THEN names_one(plain, ids)
      ELSE EXISTS (SELECT FROM unnest(ids) id WHERE position(convert_to(id, 'UTF8') IN body) > 0) END, false);
  END;
END $$;

-- A user becomes a pseudonym, the same one wherever he is stored, and free-form data of his becomes empty: counts, sums and what
-- each user brought stay as they are. With him go the ids that were merged into him. What comes in later is a new user's.
-- Nothing is returned where nothing is stored.
CREATE FUNCTION erase_user(of_user text, erasure uuid DEFAULT gen_random_uuid()) RETURNS SETOF erasures
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  tenant constant uuid := app_tenant_id();
  actor  constant text := current_setting('app.actor', true);
  him    text;
  ids    text[];
  names  text[];
  saying text[];  -- webhooks to be changed
  mentions text[];  -- and those that have the id in something
  done   text[];
  keys   text[];
  refs   text[];
  hooks  text[];
  quotes bigint;
  seen   bigint;
  entries  bigint;
  naming   bigint;
  waiting  bigint;
  emptied  bigint;
  pending  bigint;
  forced   bigint;
  merges   bigint;
  named    bigint;
  hidden   bytea;
BEGIN
  IF tenant IS NULL THEN
    RETURN;
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RETURN QUERY SELECT tenant, erasure, '', '{}'::jsonb, now(), NULL::text;  -- with an older snapshot some of it would not be seen
    RETURN;
  END IF;
  him := (locked_users(tenant, ARRAY[of_user]))[1];
  ids := him || ARRAY(SELECT i.user_id FROM identities i WHERE i.tenant_id = tenant AND i.known_id = him ORDER BY i.user_id);
  names := ARRAY(SELECT 'erased-' || erasure || CASE n WHEN 1 THEN '' ELSE '/' || n END FROM generate_series(1, cardinality(ids)) n ORDER BY n);

  -- JSON can write any letter by \u, and these by a backslash.
  hidden := CASE WHEN array_to_string(ids, '') ~ '[/"\\[:cntrl:]]' THEN '\x5c' ELSE '\x5c75' END;

  -- Few bodies need a look into their JSON: those that have the id as it is, or something in another way than it is.
  SELECT array_agg(w.id) FILTER (WHERE w.goes), array_agg(w.id) FILTER (WHERE NOT w.goes) INTO saying, mentions
  FROM (
    SELECT w.id, s.says IS TRUE AND (w.status NOT IN ('pending', 'failed') OR s.rest <> w.body) AS goes
    FROM webhook_events w CROSS JOIN LATERAL webhook_without(w.body, ids, names) s
    WHERE w.tenant_id = tenant AND (position(hidden IN w.body) > 0
        OR EXISTS (SELECT FROM unnest(ids) id WHERE position(convert_to(id, 'UTF8') IN w.body) > 0 OR position(id IN w.id) > 0))
      AND (s.says IS NOT NULL OR names_one(w.id, ids))) w;
  -- As whoever processes one of them does it: first the webhook, then the quote.
  PERFORM FROM webhook_events w WHERE w.tenant_id = tenant AND w.id IN (SELECT unnest(saying)) ORDER BY w.id FOR UPDATE OF w;
  PERFORM FROM experiments e WHERE e.tenant_id = tenant AND e.forced ?| ids ORDER BY e.id FOR NO KEY UPDATE;

  UPDATE assignments q SET user_id = names[array_position(ids, q.user_id)], merged_into = CASE WHEN q.merged_into IS NOT NULL THEN names[1] END
  WHERE q.tenant_id = tenant AND q.user_id = ANY (ids);
  GET DIAGNOSTICS quotes = ROW_COUNT;
  PERFORM lock_entries(tenant, ids);
  -- What leads from his entries to what else was said of them: now, since whoever was selling to him was waited for.
  SELECT array_agg(c.idempotency_key), array_agg('o/' || c.order_id) || array_agg('s/' || c.subscription_id),
         array_agg(c.metadata ->> 'webhook'),
         count(*) FILTER (WHERE names_one(concat_ws(' ', c.idempotency_key, c.order_id, c.subscription_id), ids))
  INTO keys, refs, hooks, naming
  FROM conversions c WHERE c.tenant_id = tenant AND c.user_id = ANY (ids);
  UPDATE conversions c SET user_id = names[array_position(ids, c.user_id)], metadata = '{}'
  WHERE c.tenant_id = tenant AND c.user_id = ANY (ids);
  GET DIAGNOSTICS entries = ROW_COUNT;
  UPDATE views v SET user_id = names[array_position(ids, v.user_id)], metadata = '{}'
  WHERE v.tenant_id = tenant AND v.user_id = ANY (ids);
  GET DIAGNOSTICS seen = ROW_COUNT;
  WITH w AS (
    UPDATE waiting_conversions w SET entry = w.entry || '{"metadata": {}}' || CASE WHEN w.entry ->> 'user_id' = ANY (ids)
      THEN jsonb_build_object('user_id', names[array_position(ids, w.entry ->> 'user_id')]) ELSE '{}' END
    WHERE w.tenant_id = tenant AND (w.entry ->> 'user_id' = ANY (ids) OR w.entry -> 'metadata' <> '{}'
      AND (w.ref = ANY (refs) OR (webhook_without(convert_to(w.entry ->> 'metadata', 'UTF8'), ids, names)).says))
    RETURNING w.idempotency_key
  )
  SELECT count(*), keys || array_agg(w.idempotency_key) INTO waiting, keys FROM w;
  -- One that is still to be processed, or may be tried again, is money to come: under the pseudonym.
  WITH w AS (
    UPDATE webhook_events w
    SET body = CASE WHEN w.status IN ('pending', 'failed') THEN (webhook_without(w.body, ids, names)).rest ELSE '' END
    WHERE w.tenant_id = tenant AND w.body <> '' AND (w.id IN (SELECT unnest(saying))
      OR w.status NOT IN ('pending', 'failed') AND (w.idempotency_key = ANY (keys) OR w.id = ANY (hooks)))
    RETURNING w.id, w.body
  )
  SELECT count(*) FILTER (WHERE w.body = ''), count(*) FILTER (WHERE w.body <> ''), array_agg(w.id),
         count(*) FILTER (WHERE names_one(w.id, ids) OR (webhook_without(w.body, ids, names)).says IS NOT NULL)
  INTO emptied, pending, done, named FROM w;
  naming := naming + named + (SELECT count(*) FROM (SELECT unnest(mentions) EXCEPT SELECT unnest(done)) m)
    + (SELECT count(*) FROM waiting_conversions w WHERE w.tenant_id = tenant AND names_one(concat_ws(' ', w.idempotency_key, w.ref,
         w.entry ->> 'order_id', w.entry ->> 'subscription_id', w.entry ->> 'metadata'), ids))
    + (SELECT count(*) FROM usage u WHERE u.tenant_id = tenant
         AND EXISTS (SELECT FROM unnest(ids) id WHERE position(id IN u.idempotency_key) > 0) AND names_one(u.idempotency_key, ids));
  -- Whoever asks for his own erasure is not named by it.
  IF actor = ANY (ids) THEN
    PERFORM set_config('app.actor', names[array_position(ids, actor)], true);
  END IF;
  UPDATE experiments e SET forced = e.forced - ids WHERE e.tenant_id = tenant AND e.forced ?| ids;
  GET DIAGNOSTICS forced = ROW_COUNT;
  UPDATE identities i SET user_id = names[array_position(ids, i.user_id)], known_id = names[1],
    merged_by = COALESCE(names[array_position(ids, i.merged_by)], i.merged_by)
  WHERE i.tenant_id = tenant AND i.known_id = him;
  GET DIAGNOSTICS merges = ROW_COUNT;

  IF quotes + seen + entries + waiting + emptied + pending + forced + merges > 0 THEN
    RETURN QUERY INSERT INTO erasures (tenant_id, id, pseudonym, counts)
    VALUES (tenant, erasure, names[1], jsonb_build_object('quotes', quotes, 'views', seen, 'entries', entries, 'naming', naming,
      'waiting', waiting, 'webhooks', emptied, 'pending_webhooks', pending, 'forced', forced, 'merges', merges))
    RETURNING *;
  END IF;
  IF actor = ANY (ids) THEN
    PERFORM set_config('app.actor', actor, true);
  END IF;
END $$;

-- 6. Usage and quotas ---------------------------------------------------------------------------------------
--
-- Reported usage is rows, which the fold adds up by day. What the library does is not written a second time: signals
-- (assignments and sales) are read from the metrics, which count them in the transaction that makes them, and experiments from
-- the experiments. tenant_usage has it all.

CREATE TABLE usage_totals (
  tenant_id uuid    NOT NULL,
  metric    text    NOT NULL,
  day       date    NOT NULL,
  value     numeric NOT NULL DEFAULT 0,
  CONSTRAINT usage_totals_pkey PRIMARY KEY (tenant_id, metric, day),
  CONSTRAINT usage_totals_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
) WITH (fillfactor = 80);
COMMENT ON COLUMN usage_totals.value IS 'of the rows of usage that are folded';

-- What a plan allows, where the host says other than default_plan_limits(). The same for all tenants, hence without a tenant.
CREATE TABLE plan_limits (
  plan   text   NOT NULL,
  metric text   NOT NULL,
  period text   NOT NULL DEFAULT 'month',
  quota  bigint,
  CONSTRAINT plan_limits_pkey PRIMARY KEY (plan, metric),
  CONSTRAINT plan_limits_plan_check CHECK (plan IN ('free', 'starter', 'pro', 'enterprise')),
  CONSTRAINT plan_limits_metric_check CHECK (metric ~ '^[a-z][a-z0-9_.]{0,63}$'),
  CONSTRAINT plan_limits_period_check CHECK (period IN ('day', 'month', 'ever')),
  CONSTRAINT plan_limits_quota_check CHECK (quota >= 0)
);
COMMENT ON COLUMN plan_limits.quota IS 'NULL means unlimited';

-- What one tenant is allowed, whatever its plan says.
CREATE TABLE tenant_limits (
  tenant_id uuid   NOT NULL,
  metric    text   NOT NULL,
  period    text   NOT NULL DEFAULT 'month',
  quota     bigint,
  CONSTRAINT tenant_limits_pkey PRIMARY KEY (tenant_id, metric),
  CONSTRAINT tenant_limits_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
  CONSTRAINT tenant_limits_metric_check CHECK (metric ~ '^[a-z][a-z0-9_.]{0,63}$'),
  CONSTRAINT tenant_limits_period_check CHECK (period IN ('day', 'month', 'ever')),
  CONSTRAINT tenant_limits_quota_check CHECK (quota >= 0)
);
COMMENT ON COLUMN tenant_limits.quota IS 'NULL means unlimited';
CREATE TRIGGER audit_trail AFTER INSERT OR UPDATE OR DELETE ON tenant_limits FOR EACH ROW EXECUTE FUNCTION audit_change();

-- What is not here is unlimited. Not rows of plan_limits: a data-only restore would meet them.
CREATE FUNCTION default_plan_limits() RETURNS TABLE (plan text, metric text, period text, quota bigint)
  LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  VALUES ('free', 'active_experiments', 'ever', 10::bigint), ('free', 'signals', 'month', 10000), ('free', 'api_calls', 'month', 10000),
    ('starter', 'active_experiments', 'ever', 25), ('starter', 'signals', 'month', 100000), ('starter', 'api_calls', 'month', 100000),
    ('pro', 'active_experiments', 'ever', 100), ('pro', 'signals', 'month', 1000000), ('pro', 'api_calls', 'month', 1000000)
$$;

-- Moves what was reported into the totals: 50,000 rows at the most, so that no call takes long, whatever waits; the rest is the
-- next call's, which who finds so many moved makes at once. Only fold_metric_deltas calls it, whose locks it relies on. A tenant that
-- is being deleted is passed over.
CREATE FUNCTION fold_usage(only_tenant uuid) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  folded bigint;
BEGIN
  EXECUTE format($fold$
    WITH t AS MATERIALIZED (
      SELECT t.id FROM tenants t
      WHERE %s EXISTS (SELECT FROM usage u WHERE u.tenant_id = t.id AND NOT u.folded)
      FOR KEY SHARE SKIP LOCKED
    ), p AS MATERIALIZED (
      SELECT of.place FROM t
      CROSS JOIN LATERAL (SELECT u.ctid AS place FROM usage u WHERE u.tenant_id = t.id AND NOT u.folded LIMIT 50000) of LIMIT 50000
    ), u AS (
      UPDATE usage u SET folded = true WHERE u.ctid = ANY (ARRAY(SELECT p.place FROM p)) AND NOT u.folded
      RETURNING u.tenant_id, u.metric, u.day, u.value
    ), added AS (
      INSERT INTO usage_totals AS m (tenant_id, metric, day, value)
      SELECT tenant_id, metric, day, sum(value) FROM u GROUP BY 1, 2, 3
      ON CONFLICT (tenant_id, metric, day) DO UPDATE SET value = m.value + excluded.value
    )
    SELECT count(*) FROM u $fold$,
    CASE WHEN only_tenant IS NULL THEN '' ELSE 't.id = $1 AND' END)
  INTO folded USING only_tenant;
  RETURN folded;
END $$;

-- What an experiment used stays used when it is deleted. Before the delete, when the row is locked and nobody is writing for it
-- any more; and by its name after what may keep the experiment. When its tenant goes as well, nothing stays.
CREATE FUNCTION usage_stays() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  INSERT INTO usage (tenant_id, metric, day, value)
  SELECT OLD.tenant_id, u.metric, u.day, LEAST(sum(u.value), 1000000000000) FROM (
    SELECT 'signals' AS metric, m.day, m.assignments + m.conversions AS value FROM metric_totals m
    WHERE m.tenant_id = OLD.tenant_id AND m.experiment_id = OLD.id
    UNION ALL
    SELECT 'signals', d.day, d.assignments + d.conversions FROM metric_deltas d
    WHERE d.tenant_id = OLD.tenant_id AND d.experiment_id = OLD.id
    UNION ALL
    SELECT 'experiments', (COALESCE(OLD.start_date, OLD.created_at) AT TIME ZONE 'UTC')::date, 1 WHERE OLD.status <> 'draft') u
  WHERE EXISTS (SELECT FROM tenants t WHERE t.id = OLD.tenant_id)
  GROUP BY u.metric, u.day HAVING sum(u.value) > 0;
  RETURN OLD;
END $$;
CREATE TRIGGER usage_stays BEFORE DELETE ON experiments FOR EACH ROW EXECUTE FUNCTION usage_stays();

-- What the bound tenant used, by metric and day: one or more rows each, to be added up. pending: not yet folded.
CREATE VIEW tenant_usage WITH (security_barrier) AS
SELECT t.tenant_id, t.metric, t.day, t.value, false AS pending FROM usage_totals t WHERE t.tenant_id = app_tenant_id()
UNION ALL
SELECT u.tenant_id, u.metric, u.day, u.value, true FROM usage u WHERE u.tenant_id = app_tenant_id() AND NOT u.folded
UNION ALL
SELECT m.tenant_id, 'signals', m.day + 0, m.assignments + m.conversions, false FROM metric_totals m WHERE m.tenant_id = app_tenant_id()
UNION ALL
SELECT d.tenant_id, 'signals', d.day, d.assignments + d.conversions, true FROM metric_deltas d WHERE d.tenant_id = app_tenant_id()
UNION ALL
SELECT e.tenant_id, 'experiments', (COALESCE(e.start_date, e.created_at) AT TIME ZONE 'UTC')::date, 1, false FROM experiments e
WHERE e.tenant_id = app_tenant_id() AND e.status <> 'draft';
COMMENT ON VIEW tenant_usage IS 'live; the bound tenant''s own';

-- The limit of a tenant: its own, or else its plan's. No period: there is no such tenant. No quota: unlimited.
CREATE FUNCTION tenant_limit(of_tenant uuid, of_metric text, OUT quota bigint, OUT period text, OUT billing_day integer)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  of_plan text;
BEGIN
  SELECT t.plan, t.billing_day INTO of_plan, billing_day FROM tenants t WHERE t.id = of_tenant;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  SELECT o.quota, o.period INTO quota, period FROM tenant_limits o WHERE o.tenant_id = of_tenant AND o.metric = of_metric;
  IF NOT FOUND THEN
    SELECT p.quota, p.period INTO quota, period FROM plan_limits p WHERE p.plan = of_plan AND p.metric = of_metric;
    IF NOT FOUND THEN
      SELECT d.quota, d.period INTO quota, period FROM default_plan_limits() d WHERE d.plan = of_plan AND d.metric = of_metric;
    END IF;
  END IF;
  period := COALESCE(period, 'month');
END $$;

-- How much of a quota is used in the current period, which ends before resets_at. No period: there is no such tenant, or it is not
-- the bound one, whose use alone is seen, whoever asks. Active experiments are counted as they are.
CREATE FUNCTION usage_quota(of_tenant uuid, of_metric text, OUT quota bigint, OUT period text, OUT used bigint,
                            OUT first_day date, OUT resets_at timestamptz, OUT pending bigint)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  today constant date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
  next_day date;
  billing integer;
  since date;  -- a COALESCE in the condition would keep it out of the view: PostgreSQL does not know that it leaks nothing
  until date;
BEGIN
  IF app_tenant_id() IS DISTINCT FROM of_tenant THEN
    RETURN;
  END IF;
  SELECT l.quota, l.period, l.billing_day - 1 INTO quota, period, billing FROM tenant_limit(of_tenant, of_metric) l;
  IF of_metric = 'active_experiments' AND period IS NOT NULL THEN
    period := 'ever';
    SELECT count(*), 0 INTO used, pending FROM experiments e WHERE e.tenant_id = of_tenant AND e.status = 'active';
    RETURN;
  END IF;
  IF period = 'day' THEN
    first_day := today;
    next_day := today + 1;
  ELSIF period = 'month' THEN
    first_day := date_trunc('month', (today - billing)::timestamp)::date + billing;
    next_day := (first_day + interval '1 month')::date;
  END IF;
  resets_at := next_day::timestamp AT TIME ZONE 'UTC';
  since := COALESCE(first_day, '-infinity');
  until := COALESCE(next_day, 'infinity');
  SELECT GREATEST(LEAST(COALESCE(sum(u.value), 0), 9223372036854775807), 0), count(*) FILTER (WHERE u.pending) INTO used, pending
  FROM tenant_usage u
  WHERE u.tenant_id = of_tenant AND u.metric = of_metric AND u.day >= since AND u.day < until;
END $$;

-- Whether this transaction has a tenant's metric to itself from now on. Whoever has it already is waited for, for a second: then others
-- are served by this connection, and two that wait for each other both go on. Not in the queue of the lock: who waits there may be
-- ended as the victim of a deadlock, or have somebody else ended.
CREATE FUNCTION quota_lock(of_tenant uuid, of_metric text) RETURNS boolean
  LANGUAGE plpgsql AS $$
DECLARE
  lock constant bigint := hashtextextended('lastprice/quota/' || of_tenant::text || '/' || of_metric, 0);
  until constant timestamptz := clock_timestamp() + interval '1 second';
BEGIN
  WHILE NOT pg_try_advisory_xact_lock(lock) LOOP
    IF clock_timestamp() >= until THEN
      RETURN false;
    END IF;
    PERFORM pg_sleep(0.002 + random() * 0.008);
  END LOOP;
  RETURN true;
END $$;

-- Adds an amount if the quota allows it, once for a key; after it, used is with the amount. Whoever consumes of the same limited
-- metric of a tenant waits until this transaction has ended: then each sees what the others have. Nothing is raised; outcome says
-- consumed, exceeded, duplicate (standing: the amount that the key has, and its day, of whatever period), busy: somebody has had the
-- metric for a second, or isolation: with an older snapshot the others are not seen. Of the last two there is no quota; and none, nor
-- an outcome, of a tenant that is not there or not bound.
CREATE FUNCTION consume_usage(of_tenant uuid, of_metric text, amount bigint, key text, OUT outcome text, OUT standing bigint, OUT standing_day date,
                              OUT quota bigint, OUT period text, OUT used bigint, OUT first_day date, OUT resets_at timestamptz,
                              OUT pending bigint)
  LANGUAGE plpgsql AS $$
BEGIN
  IF app_tenant_id() IS DISTINCT FROM of_tenant THEN
    RETURN;
  ELSIF current_setting('transaction_isolation') <> 'read committed' THEN  -- nor is a key, which then fails the transaction
    outcome := 'isolation';
    RETURN;
  ELSIF (SELECT l.quota FROM tenant_limit(of_tenant, of_metric) l) IS NOT NULL AND NOT quota_lock(of_tenant, of_metric) THEN
    outcome := 'busy';
    RETURN;
  END IF;
  SELECT q.* INTO quota, period, used, first_day, resets_at, pending FROM usage_quota(of_tenant, of_metric) q;
  IF period IS NULL THEN
    RETURN;
  END IF;
  SELECT u.value, u.day INTO standing, standing_day FROM usage u
  WHERE u.tenant_id = of_tenant AND u.metric = of_metric AND u.idempotency_key = key;
  IF FOUND THEN
    outcome := 'duplicate';
  ELSIF used::numeric + amount > quota THEN
    outcome := 'exceeded';
  ELSE
    INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
    VALUES (of_tenant, of_metric, (clock_timestamp() AT TIME ZONE 'UTC')::date, amount, key) ON CONFLICT DO NOTHING;
    IF FOUND THEN
      outcome := 'consumed';
      used := LEAST(used::numeric + amount, 9223372036854775807);
    ELSE  -- somebody has added it meanwhile, which waits for nobody
      SELECT u.value, u.day INTO standing, standing_day FROM usage u
      WHERE u.tenant_id = of_tenant AND u.metric = of_metric AND u.idempotency_key = key;
      outcome := 'duplicate';
    END IF;
  END IF;
END $$;

-- Whether the tenant may activate one more experiment. Whoever asks next, if there is a limit, waits until this transaction has
-- ended: then they see whether it did. Nobody knows (NULL) when that takes more than a second.
CREATE FUNCTION experiment_slot(of_tenant uuid) RETURNS boolean
  LANGUAGE plpgsql AS $$
DECLARE
  allowed constant bigint := (SELECT l.quota FROM tenant_limit(of_tenant, 'active_experiments') l);
BEGIN
  IF allowed IS NULL THEN
    RETURN true;
  ELSIF current_setting('transaction_isolation') <> 'read committed' THEN
    RETURN false;  -- with an older snapshot it would not see who was activated meanwhile
  END IF;
  IF NOT quota_lock(of_tenant, 'active_experiments') THEN
    RETURN NULL;
  END IF;
  RETURN (SELECT count(*) FROM experiments e WHERE e.tenant_id = of_tenant AND e.status = 'active') < allowed;
END $$;

-- 7. Isolation ----------------------------------------------------------------------------------------------

-- A materialized view cannot have row-level security: the application reads these instead.
CREATE VIEW tenant_experiment_metrics WITH (security_barrier) AS
SELECT * FROM experiment_metrics WHERE tenant_id = app_tenant_id();

CREATE VIEW tenant_variant_metrics WITH (security_barrier) AS
SELECT m.tenant_id, m.experiment_id, e.key, m.variant, m.phase,
       sum(m.assignments)::bigint AS assignments, sum(m.views)::bigint AS views,
       sum(m.conversions)::bigint AS conversions,
       COALESCE(sum(m.revenue) FILTER (WHERE m.currency = e.currency), 0) AS revenue, e.currency,
       sum(m.conversions) / NULLIF(sum(m.assignments), 0) AS conversion_rate
FROM (
  SELECT tenant_id, experiment_id, variant, phase, currency, assignments, views, conversions, revenue FROM metric_totals
  WHERE reason <> 'outside'
  UNION ALL
  SELECT tenant_id, experiment_id, variant, phase, currency, assignments, views, conversions, revenue FROM metric_deltas
  WHERE reason <> 'outside'
) m
JOIN experiments e ON e.tenant_id = m.tenant_id AND e.id = m.experiment_id
WHERE m.tenant_id = app_tenant_id() AND e.tenant_id = app_tenant_id()
GROUP BY m.tenant_id, m.experiment_id, e.key, m.variant, m.phase, e.currency;
COMMENT ON VIEW tenant_variant_metrics IS 'live; the bound tenant''s own';

DO $$
DECLARE
  t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['tenants', 'experiments', 'assignments', 'views', 'conversions', 'usage', 'recommendations',
                           'waiting_conversions', 'webhook_events', 'ledger_locks', 'audit_trail', 'metric_totals', 'metric_deltas',
                           'metric_baselines', 'archived_experiments',
                           'usage_totals', 'tenant_limits',
                           'identities', 'erasures'] LOOP
    -- ENABLE without FORCE: the owner refreshes and archives.
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE format('CREATE POLICY tenant_isolation ON %1$I USING (%2$I = app_tenant_id()) WITH CHECK (%2$I = app_tenant_id())',
                   t, CASE t WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END);
  END LOOP;
END $$;

-- Deleting an experiment deletes its ledger, with no DELETE right on the ledger: hence only a draft without one.
CREATE POLICY only_drafts_are_deleted ON experiments AS RESTRICTIVE FOR DELETE USING (
  status = 'draft' AND NOT EXISTS (
    SELECT FROM conversions c WHERE c.tenant_id = experiments.tenant_id AND c.experiment_id = experiments.id));

-- What was shown in phases before this one is for the trigger to say.
CREATE POLICY no_past_at_first ON experiments AS RESTRICTIVE FOR INSERT WITH CHECK (past_phases = '[]');

-- 8. Rights -------------------------------------------------------------------------------------------------

DO $$
DECLARE
  f regprocedure;
  home constant text := quote_ident(current_schema());
BEGIN
  -- Every function that names a table finds it here, whatever the caller's search_path is.
  FOREACH f IN ARRAY ARRAY[
    'experiments_guard()', 'experiments_layer_guard()', 'experiments_delete_guard()', 'recommendations_guard()', 'recommendations_let_go()',
    'assignments_are_exceptions()', 'config_changed()', 'audit_change()', 'conversions_follow()', 'conversions_once()',
    'conversions_window()', 'match_waiting_conversions(uuid, text[])', 'conversions_opened()', 'metrics_go()',
    'metrics_count_assignments()', 'metrics_count_views()', 'metrics_count_conversions()', 'fold_metric_deltas(uuid)',
    'fold_experiment_metrics()', 'recount_experiment_metrics()', 'refresh_experiment_metrics()', 'fold_usage(uuid)', 'usage_stays()',
    'tenant_limit(uuid, text)', 'usage_quota(uuid, text)', 'consume_usage(uuid, text, bigint, text)', 'experiment_slot(uuid)',
    'locked_users(uuid, text[])', 'lock_entries(uuid, text[])', 'merge_users(text, text, text, uuid)', 'names_one(text, text[])',
    'webhook_without(bytea, text[], text[])', 'erase_user(text, uuid)']
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %s, pg_temp', f, home);
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC, lastprice_app', f);
  END LOOP;
  -- A table that is always empty is read as a whole, and what is dead of it as well: plans made when it was small are kept.
  FOREACH f IN ARRAY ARRAY[
    'conversions_follow()', 'conversions_once()', 'conversions_window()', 'match_waiting_conversions(uuid, text[])', 'conversions_opened()',
    'tenant_limit(uuid, text)', 'usage_quota(uuid, text)', 'consume_usage(uuid, text, bigint, text)', 'experiment_slot(uuid)',
    'lock_entries(uuid, text[])', 'merge_users(text, text, text, uuid)']
  LOOP
    EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off', f);
  END LOOP;
  EXECUTE format('ALTER FUNCTION %I.conversions_once() SET enable_sort = off', current_schema());
  -- The one that reads all views of a tenant, which have no index by user.
  EXECUTE format('ALTER FUNCTION %I.erase_user(text, uuid) SET enable_seqscan = on', current_schema());
  -- A host's default privileges may have granted more than is meant.
  FOREACH f IN ARRAY ARRAY[
    'app_tenant_id()', 'app_set_tenant(uuid)', 'fold_experiment_metrics()', 'variant_names_are_unique(jsonb)',
    'forced_variants_exist(jsonb, jsonb)', 'baseline_prices(jsonb, text)',
    'broken_price_rules(numeric, numeric, integer, numeric, numeric, numeric, boolean)', 'quoted_price(numeric, text, jsonb, text, text)',
    'default_plan_limits()', 'tenant_limit(uuid, text)', 'usage_quota(uuid, text)', 'quota_lock(uuid, text)',
    'consume_usage(uuid, text, bigint, text)', 'experiment_slot(uuid)', 'merge_users(text, text, text, uuid)', 'erase_user(text, uuid)']
  LOOP
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC, lastprice_app', f);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO lastprice_app', f);
  END LOOP;
  EXECUTE format('GRANT USAGE ON SCHEMA %s TO lastprice_app', home);
  IF NOT has_schema_privilege('lastprice_app', current_schema(), 'USAGE') THEN
    RAISE EXCEPTION 'role % may not let lastprice_app use the schema %', current_user, current_schema()
      USING HINT = format('Let its owner run: GRANT USAGE ON SCHEMA %s TO lastprice_app; then install again.', home);
  END IF;
  IF has_schema_privilege('lastprice_app', current_schema(), 'CREATE') THEN
    RAISE WARNING 'everyone may create objects in schema %, as before PostgreSQL 15', current_schema()
      USING HINT = format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC;', home);
  END IF;
END $$;

-- Whatever the host's default privileges: a client asks for the version before it is anybody.
GRANT EXECUTE ON FUNCTION lastprice_schema_version() TO PUBLIC;

REVOKE ALL ON tenants, experiments, assignments, views, conversions, usage, recommendations, waiting_conversions, webhook_events, ledger_locks, audit_trail,
  metric_totals, metric_deltas, metric_baselines, archived_experiments, identities, erasures, experiment_metrics, tenant_experiment_metrics, tenant_variant_metrics,
  usage_totals, plan_limits, tenant_limits, tenant_usage FROM PUBLIC, lastprice_app;
-- When a period begins is the owner's to say: with another day a spent quota would be there anew.
GRANT SELECT, INSERT, UPDATE (name, email, mode, plan, paid_api_key, webhook_secret, holdout, metadata) ON tenants TO lastprice_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON experiments TO lastprice_app;
GRANT SELECT, INSERT ON assignments, views, conversions, waiting_conversions TO lastprice_app;
GRANT SELECT, INSERT (tenant_id, metric, day, value, idempotency_key, created_at) ON usage TO lastprice_app;
GRANT SELECT ON usage_totals, plan_limits, tenant_limits, tenant_usage TO lastprice_app;
-- Who recommends says nothing of what became of it.
GRANT SELECT, INSERT (tenant_id, id, experiment_id, price, currency, expected_revenue, confidence, objective, simulation, source,
  model_version, inputs_hash, expires_at, created_at), UPDATE (status, rejection_reason, follow_up_id, observed_revenue)
  ON recommendations TO lastprice_app;
-- What was received stays as it was; what became of it is said later.
GRANT SELECT, INSERT (tenant_id, id, seq, type, body, body_hash, received_at),
  UPDATE (status, attempts, what, idempotency_key, processed_at) ON webhook_events TO lastprice_app;
GRANT UPDATE (valid_until) ON assignments TO lastprice_app;
GRANT SELECT, INSERT, DELETE ON ledger_locks TO lastprice_app;
GRANT SELECT ON identities, erasures TO lastprice_app;
GRANT SELECT ON audit_trail, metric_totals, metric_deltas, archived_experiments, tenant_experiment_metrics, tenant_variant_metrics TO lastprice_app;

$schema$;
  END IF;

  IF current_setting('lastprice.demo', true) = 'on' THEN
    IF to_regprocedure('pgp_sym_encrypt(text, text)') IS NOT NULL THEN
      EXECUTE $demo$ SELECT pgp_sym_encrypt('demo_api_key', 'encryption_passphrase')::text $demo$ INTO demo_key;
    END IF;
    EXECUTE $demo$
      INSERT INTO tenants (name, email, mode, plan, paid_api_key) VALUES
        ('Demo', 'demo@example.com', 'managed', 'pro', NULL),
        ('Demo with its own key', 'byok@example.com', 'byok', 'enterprise', $1)
      ON CONFLICT DO NOTHING
    $demo$ USING demo_key;
  END IF;
END $install$;
