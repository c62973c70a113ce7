//! Every statement names its tenant, and finds its rows by an index, at the size of a real installation.

use std::collections::{BTreeMap, BTreeSet};

use lastprice::serde_json::Value;
use lastprice::tokio_postgres::Client;
use lastprice::tokio_postgres::types::{Kind, Type};
use lastprice_testkit::TestDatabase;

use crate::support_repo::{active, assign, eventually, key, two_tenants, usd, users};

pub(crate) const TENANT: &str = "'00000000-0000-7000-8000-000000000001'";
/// Of its experiments a small part of all.
const OTHER: &str = "'00000000-0000-7000-8000-000000000002'";
const EXPERIMENT: &str = "'00000000-0000-7000-9000-000000000001'";
/// One of many of its size: all of the first one's entries are a good part of the whole table.
const SMALL: &str = "'00000000-0000-7000-9000-000000000002'";
const DRAFT: &str = "'00000000-0000-7000-9000-000000000004'";
const RECOMMENDATION: &str = "'00000000-0000-7000-c000-000000000001'";
const VARIANTS: &str =
    r#"'[{"name": "a", "weight": 1, "price": "19.00"}, {"name": "b", "weight": 1, "price": "29.00"}]'"#;

/// Indexes, of which one must be used, and the columns besides the tenant that it must be searched by. Where there are
/// two, both hold all columns that the statement searches by, and the planner may take either. `?`: it need not be used.
pub(crate) type Expected = (&'static str, &'static str);

/// Statement -> parameters as SQL literals for a batch of `n`, and the indexes. None: the statement scans no table.
pub(crate) fn expected(n: usize) -> BTreeMap<&'static str, (Vec<String>, Vec<Expected>)> {
    let array = |of: &dyn Fn(usize) -> String| {
        let items: Vec<String> = (0..n).map(of).collect();
        format!("ARRAY[{}]", items.join(","))
    };
    let users = || array(&|i| format!("'user-{i}'"));
    let ids = || array(&|i| format!("'00000000-0000-7000-a000-{i:012x}'::uuid"));
    let experiments = || array(&|_| format!("{EXPERIMENT}::uuid"));
    let times = || array(&|_| "'2024-01-02'::timestamptz".to_owned());
    let objects = || array(&|_| "'{}'::jsonb".to_owned());
    let metrics = || array(&|_| "'api_calls'".to_owned());
    let keys = || array(&|i| format!("'sale-{i}'"));
    let same = |value: &str| array(&|_| value.to_owned());
    let nothing = || same("NULL::text");
    let open = || {
        [
            vec![TENANT.to_owned(), "true".to_owned(), ids(), same("'sale'"), experiments()],
            vec![same("1.5::numeric"), same("'USD'"), nothing(), same("NULL::numeric"), same("1")],
            vec![same("0::numeric"), same("0::numeric"), same("0::numeric"), nothing(), nothing()],
            vec![keys(), times(), objects(), users()],
        ]
        .concat()
    };
    let texts = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let nil = "'00000000-0000-0000-0000-000000000000'";
    let max = "'ffffffff-ffff-ffff-ffff-ffffffffffff'";

    let tenant = || vec![("tenants_pkey", "id")];
    let experiment = || vec![("experiments_pkey", "id")];
    let recommendation = || vec![("recommendations_pkey", "id")];
    let of_recommendations = || vec![("recommendations_pkey|recommendations_status_idx", "id")];
    let quote = || vec![("assignments_pkey|assignments_user_idx", "experiment_id user_id")];
    let waiting = || vec![("waiting_conversions_pkey", "idempotency_key")];
    let archived = || vec![("archived_experiments_pkey", "experiment_id")];
    let webhook = || vec![("webhook_events_pkey", "id")];
    let of_status = || vec![("experiments_pkey|experiments_status_idx", "id")];
    let live = || vec![("metric_totals_pkey", "experiment_id"), ("metric_deltas_pkey", "experiment_id")];
    let of_tenant = || vec![("experiments_pkey|experiments_key_key|experiments_status_idx", "")];
    let used = || {
        vec![
            ("usage_totals_pkey", "metric day"),
            ("usage_pending_idx", "metric day"),
            ("metric_totals_day_idx", "day"),
            ("metric_deltas_pkey", ""),
            // Not of a metric that is known to be another.
            ("?experiments_pkey|experiments_key_key|experiments_status_idx", ""),
        ]
    };
    let fresh = "'00000000-0000-7000-a000-ffffffffffff'";
    BTreeMap::from([
        (
            "tenants.create",
            (texts(&[fresh, "'N'", "'n@n'", "'managed'", "'free'", "NULL", "'{}'", "NULL"]), vec![]),
        ),
        ("tenants.get", (texts(&[TENANT]), tenant())),
        ("tenants.secrets", (texts(&[TENANT]), tenant())),
        (
            "tenants.update",
            (texts(&[TENANT, "'N'", "NULL", "'pro'", "NULL", "'{}'", "1000", "'lp1:k:a:b'"]), tenant()),
        ),
        (
            "experiments.create",
            (
                [
                    texts(&[TENANT, fresh, "'k'", "'N'", "'USD'", VARIANTS, "'a'", "'{}'"]),
                    texts(&["1000000", "'l'", "0", "500000", "'user'", "'everyone'", "NULL", "NULL"]),
                ]
                .concat(),
                tenant(),
            ),
        ),
        ("experiments.get", (texts(&[TENANT, EXPERIMENT]), experiment())),
        ("experiments.by_key", (texts(&[TENANT, "'key-7'"]), vec![("experiments_key_key", "key")])),
        ("experiments.list", (texts(&[TENANT, nil, "101"]), experiment())),
        (
            "experiments.list_status",
            (texts(&[TENANT, "'active'", nil, "101"]), vec![("experiments_status_idx", "id")]),
        ),
        (
            "experiments.edit",
            (
                [
                    texts(&[TENANT, EXPERIMENT, "1", "'N'", "NULL", VARIANTS, "'a'", "NULL"]),
                    texts(&["NULL", "true", "'l'", "0", "500000", "NULL", "NULL", "NULL", "NULL"]),
                ]
                .concat(),
                of_status(),
            ),
        ),
        (
            "experiments.transition",
            (
                texts(&[TENANT, EXPERIMENT, "ARRAY['active']", "'completed'", "'a'"]),
                [of_status(), vec![("experiments_layer_idx", "layer")]].concat(),
            ),
        ),
        (
            "experiments.hindrance",
            (texts(&[TENANT, EXPERIMENT]), [experiment(), vec![("experiments_layer_idx", "layer")]].concat()),
        ),
        ("experiments.raise_traffic", (texts(&[TENANT, EXPERIMENT, "1000000"]), of_status())),
        ("experiments.new_phase", (texts(&[TENANT, EXPERIMENT, "1", VARIANTS, "NULL"]), of_status())),
        ("experiments.force", (texts(&[TENANT, EXPERIMENT, "'user-7'", "'a'"]), experiment())),
        ("experiments.config", (texts(&[TENANT]), [tenant(), of_tenant()].concat())),
        ("experiments.config_version", (texts(&[TENANT]), [tenant(), of_tenant()].concat())),
        (
            "experiments.delete_draft",
            (
                texts(&[TENANT, DRAFT]),
                [of_status(), vec![("conversions_experiment_idx", "experiment_id")]].concat(),
            ),
        ),
        (
            "assignments.read",
            (
                [texts(&[TENANT, EXPERIMENT]), vec![users(), array(&|_| "NULL::text".to_owned())]].concat(),
                [tenant(), of_status(), quote()].concat(),
            ),
        ),
        (
            "assignments.insert",
            (
                [
                    texts(&[TENANT, EXPERIMENT, "1"]),
                    vec![users(), array(&|i| (i % 2).to_string()), same("'randomised'"), times()],
                ]
                .concat(),
                of_status(),
            ),
        ),
        (
            "assignments.renew",
            (
                vec![TENANT.to_owned(), EXPERIMENT.to_owned(), "'user-7'".to_owned()],
                [experiment(), quote()].concat(),
            ),
        ),
        ("assignments.get", (texts(&[TENANT, EXPERIMENT, "'user-7'"]), quote())),
        (
            "assignments.list_by_user",
            (texts(&[TENANT, "'user-7'", nil, "101"]), vec![("assignments_user_idx", "experiment_id")]),
        ),
        (
            "views.record",
            (vec![TENANT.to_owned(), ids(), experiments(), users(), times(), objects()], quote()),
        ),
        ("views.existing", (vec![TENANT.to_owned(), ids()], vec![("views_pkey", "id")])),
        ("conversions.open", (open(), [quote(), of_status(), waiting()].concat())),
        (
            "conversions.open_outside",
            (
                [open(), vec![same("'a'"), same("'outside'")]].concat(),
                [of_status(), waiting(), archived()].concat(),
            ),
        ),
        (
            "conversions.follow",
            (
                [
                    vec![TENANT.to_owned(), "true".to_owned(), ids(), same("'refund'"), same("NULL::uuid")],
                    vec![same("-1::numeric"), same("'USD'"), nothing(), same("NULL::numeric"), same("1")],
                    vec![same("0::numeric"), same("0::numeric"), same("0::numeric"), same("'order-7'")],
                    vec![nothing(), keys(), times(), objects(), nothing()],
                ]
                .concat(),
                tenant(),
            ),
        ),
        ("conversions.waiting_keys", (vec![TENANT.to_owned(), keys()], waiting())),
        (
            "conversions.locked_price",
            (
                texts(&[TENANT, "'sub-7'", "'2026-11'", "now()"]),
                vec![("conversions_subscription_idx", "subscription_id")],
            ),
        ),
        (
            "conversions.left",
            (
                texts(&[TENANT, "'order-7'", "NULL", "'USD'", "false"]),
                vec![("conversions_order_idx", "order_id"), ("conversions_sale_idx", "sale_id")],
            ),
        ),
        (
            "conversions.by_orders",
            (
                vec![TENANT.to_owned(), array(&|i| format!("'order-{i}'"))],
                vec![("conversions_order_idx", "order_id")],
            ),
        ),
        (
            "conversions.sold",
            (
                texts(&[TENANT, "'2024-01-02'", nil, "'2024-01-09'", "1000"]),
                vec![("conversions_time_idx", "occurred_at")],
            ),
        ),
        (
            "conversions.waiting",
            (
                texts(&[TENANT, "''", "1000"]),
                vec![("waiting_conversions_pkey|waiting_conversions_ref_idx", "")],
            ),
        ),
        (
            "conversions.list_by_subscription",
            (texts(&[TENANT, "'sub-7'", nil, "101"]), vec![("conversions_subscription_idx", "id")]),
        ),
        (
            "conversions.by_keys",
            (vec![TENANT.to_owned(), keys()], vec![("conversions_idempotency_key", "idempotency_key")]),
        ),
        (
            "conversions.list_by_user",
            (texts(&[TENANT, "'user-7'", nil, "101"]), vec![("conversions_user_idx", "id")]),
        ),
        (
            "conversions.list_by_order",
            (texts(&[TENANT, "'order-7'", nil, "101"]), vec![("conversions_order_idx", "id")]),
        ),
        (
            "usage.add",
            (
                vec![
                    TENANT.to_owned(),
                    metrics(),
                    array(&|_| "'2024-01-02'::date".to_owned()),
                    array(&|_| "1::bigint".to_owned()),
                    keys(),
                ],
                tenant(),
            ),
        ),
        (
            "usage.by_keys",
            (vec![TENANT.to_owned(), metrics(), keys()], vec![("usage_pkey", "metric idempotency_key")]),
        ),
        ("usage.billing_day", (texts(&[TENANT]), tenant())),
        ("usage.total", (texts(&[OTHER, "'signals'", "'2024-01-02'", "'2024-01-09'"]), used())),
        ("usage.by_day", (texts(&[OTHER, "'signals'", "'2024-01-02'", "'2024-01-09'"]), used())),
        // What the functions read is what the two above read.
        ("usage.quota", (texts(&[TENANT, "'signals'"]), tenant())),
        ("usage.consume", (texts(&[TENANT, "'exports'", "1", "'k'"]), tenant())),
        (
            "recommendations.store",
            (
                [
                    texts(&[TENANT, fresh, EXPERIMENT, "1", "'USD'", "NULL", "0.5", "'revenue'", "'{}'"]),
                    texts(&["'jale'", "'v'", "'h'", "now()"]),
                ]
                .concat(),
                experiment(),
            ),
        ),
        ("recommendations.get", (texts(&[TENANT, RECOMMENDATION]), recommendation())),
        (
            "recommendations.list_by_status",
            (texts(&[TENANT, "'proposed'", nil, "101"]), vec![("recommendations_status_idx", "id")]),
        ),
        (
            "recommendations.standing",
            (texts(&[TENANT, RECOMMENDATION]), [recommendation(), experiment()].concat()),
        ),
        (
            "recommendations.approve",
            (texts(&[TENANT, RECOMMENDATION, "19", "'USD'"]), [of_recommendations(), experiment()].concat()),
        ),
        ("recommendations.reject", (texts(&[TENANT, RECOMMENDATION, "'why'"]), of_recommendations())),
        ("recommendations.expire_due", (texts(&[TENANT]), vec![("recommendations_due_idx", "expires_at")])),
        ("recommendations.score", (texts(&[TENANT, RECOMMENDATION, "19", "'USD'"]), of_recommendations())),
        (
            "recommendations.apply",
            (
                texts(&[TENANT, RECOMMENDATION, fresh, "'k'", "NULL", "'recommended'", "1", "1"]),
                [of_recommendations(), experiment()].concat(),
            ),
        ),
        (
            "recommendations.latest",
            (texts(&[TENANT, EXPERIMENT]), vec![("recommendations_latest_idx", "experiment_id")]),
        ),
        (
            "recommendations.list",
            (texts(&[TENANT, EXPERIMENT, max, "101"]), vec![("recommendations_experiment_idx", "id")]),
        ),
        (
            "webhooks.store",
            (texts(&[TENANT, "'new'", fresh, "'t'", "'{}'::bytea", "sha256('x')", "now()"]), tenant()),
        ),
        ("webhooks.lock", (texts(&[TENANT, "'event-7'"]), webhook())),
        ("webhooks.mark", (texts(&[TENANT, "'event-7'", "'failed'", "'type'", "NULL"]), webhook())),
        ("webhooks.reopen", (texts(&[TENANT, "'event-7'"]), webhook())),
        ("webhooks.discard", (texts(&[TENANT, "'event-7'"]), webhook())),
        ("webhooks.status", (texts(&[TENANT, "'event-7'"]), webhook())),
        ("webhooks.pending", (texts(&[TENANT, "101"]), vec![("webhook_events_pending_idx", "")])),
        (
            "webhooks.list",
            (texts(&[TENANT, "'failed'", nil, "101"]), vec![("webhook_events_status_idx", "seq")]),
        ),
        ("audit_trail.list", (texts(&[TENANT, max, "101"]), vec![("audit_trail_pkey", "id")])),
        (
            "audit_trail.of_experiment",
            (
                texts(&[TENANT, EXPERIMENT, max, "101"]),
                vec![("audit_trail_experiment_idx", "experiment_id id")],
            ),
        ),
        ("users.erase", (texts(&[TENANT, "'user-7'", fresh]), vec![])),
        ("users.erasures", (texts(&[TENANT, nil, "101"]), vec![("erasures_pkey", "id")])),
        ("users.known", (texts(&[TENANT, "'{cookie-7,account-7}'"]), vec![("identities_pkey", "user_id")])),
        ("users.merge", (texts(&[TENANT, "'user-7'", "'user-8'", "'exclude'", fresh]), vec![])),
        ("users.merged", (texts(&[TENANT, "'cookie-7'"]), vec![("identities_pkey", "user_id")])),
        ("users.merges", (texts(&[TENANT, nil, "101"]), vec![("identities_id_key", "id")])),
        ("metrics.by_variant", (texts(&[TENANT, EXPERIMENT]), [live(), experiment()].concat())),
        (
            "metrics.by_day",
            (
                texts(&[TENANT, EXPERIMENT, "'2024-01-02'", "'2024-01-09'"]),
                vec![("metric_totals_pkey", "day"), ("metric_deltas_pkey", "experiment_id")],
            ),
        ),
        (
            "metrics.refreshed",
            (texts(&[TENANT, nil, "101"]), vec![("experiment_metrics_key", "experiment_id")]),
        ),
        ("metrics.fold", (vec![], vec![])),
        ("results.setup", (texts(&[TENANT, EXPERIMENT]), experiment())),
        ("results.counts", (texts(&[TENANT, EXPERIMENT]), live())),
        (
            "results.cohorts",
            (
                texts(&[TENANT, SMALL, "336", "ARRAY['USD']", "ARRAY[1]", "ARRAY['i']", "ARRAY[0]", "0"]),
                [live(), vec![("conversions_experiment_idx", "experiment_id")]].concat(),
            ),
        ),
        (
            "results.totals",
            (
                [
                    texts(&[TENANT, SMALL, "336", "ARRAY['USD']", "ARRAY[1]", "ARRAY['i']", "ARRAY[0]", "0"]),
                    texts(&["'2024-01-02'"]),
                ]
                .concat(),
                vec![("conversions_experiment_idx", "experiment_id")],
            ),
        ),
        (
            "results.recent_views",
            (
                texts(&[TENANT, EXPERIMENT, "200"]),
                [vec![("views_experiment_idx", "experiment_id")], archived()].concat(),
            ),
        ),
    ])
}

/// 2,000 tenants, of whom 500 do something and one is big.
const LOAD: &str = "
    -- What checks and counts row by row plays no part in a plan.
    ALTER TABLE assignments DISABLE TRIGGER metrics_added, DROP CONSTRAINT assignments_experiment_fkey;
    ALTER TABLE views DISABLE TRIGGER metrics_added, DROP CONSTRAINT views_experiment_fkey;
    ALTER TABLE conversions DISABLE TRIGGER metrics_added, DROP CONSTRAINT conversions_experiment_fkey;
    ALTER TABLE usage DROP CONSTRAINT usage_tenant_fkey;
    ALTER TABLE usage_totals DROP CONSTRAINT usage_totals_tenant_fkey;
    ALTER TABLE experiments DISABLE TRIGGER config_changed;
    CREATE FUNCTION pg_temp.id(kind text, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS
      $$ SELECT ('00000000-0000-7000-' || kind || '-' || lpad(to_hex(n), 12, '0'))::uuid $$;
    INSERT INTO tenants (id, name, email)
      SELECT pg_temp.id('8000', n), 'T' || n, 't' || n || '@example.com' FROM generate_series(1, 2000) n;
    -- The first 1,000 experiments are of the big tenant, the others of 499; every fourth one is a draft.
    INSERT INTO experiments (tenant_id, id, key, name, status, variants, start_date)
      SELECT pg_temp.id('8000', CASE WHEN n <= 1000 THEN 1 ELSE 2 + n % 499 END), pg_temp.id('9000', n), 'key-' || n,
             'Name', (ARRAY['draft', 'active', 'paused', 'completed'])[1 + n % 4],
             '[{\"name\": \"a\", \"weight\": 1, \"price\": \"19.00\"}, {\"name\": \"b\", \"weight\": 1, \"price\": \"29.00\"}]', now()
      FROM generate_series(1, 10000) n;
    -- The first experiment has a fifth of the users.
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency)
      SELECT e.tenant_id, e.id, 'user-' || n / 5, 'a', 19, 'USD' FROM generate_series(1, 75000) n
      JOIN experiments e ON e.id = pg_temp.id('9000', CASE WHEN n % 5 = 0 THEN 1 ELSE 1 + n % 10000 END) AND e.status <> 'draft'
      ON CONFLICT DO NOTHING;
    INSERT INTO views (tenant_id, experiment_id, user_id, variant, id)
      SELECT a.tenant_id, a.experiment_id, a.user_id, a.variant, pg_temp.id('b' || lpad(n::text, 3, '0'), row_number() OVER ())
      FROM assignments a, generate_series(1, 2) n;
    INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, idempotency_key, order_id,
                             subscription_id)
      SELECT tenant_id, experiment_id, user_id, variant, 19, 'USD', 'sale-' || row_number() OVER (),
             CASE WHEN user_id LIKE '%7' THEN 'order-' || row_number() OVER () END,
             CASE WHEN user_id LIKE '%8' THEN 'sub-' || row_number() OVER () END
      FROM assignments LIMIT 30000;
    INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, kind, revenue, currency, idempotency_key, sale_id)
      SELECT tenant_id, experiment_id, user_id, variant, 'refund', -1, 'USD', 'back-' || idempotency_key, id
      FROM conversions WHERE order_id IS NOT NULL LIMIT 3000;
    INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
      SELECT pg_temp.id('8000', 1 + n % 500), 'sale-' || n, gen_random_uuid(), 'refund', 'o/' || n, '{}'
      FROM generate_series(1, 5000) n;
    INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash, status, processed_at)
      SELECT pg_temp.id('8000', CASE WHEN n % 3 = 0 THEN 1 ELSE 1 + n % 500 END), 'event-' || n, gen_random_uuid(), 'x', sha256('x'), s,
             CASE WHEN s <> 'pending' THEN now() END
      FROM generate_series(1, 20000) n, LATERAL (SELECT (ARRAY['processed', 'processed', 'processed', 'failed', 'pending'])[1 + n % 5] AS s) s;
    INSERT INTO identities (tenant_id, user_id, known_id, policy)
      SELECT pg_temp.id('8000', CASE WHEN n % 3 = 0 THEN 1 ELSE 1 + n % 500 END), 'cookie-' || n, 'user-' || n / 2, 'exclude'
      FROM generate_series(1, 10000) n;
    INSERT INTO erasures (tenant_id, pseudonym)
      SELECT pg_temp.id('8000', CASE WHEN n % 3 = 0 THEN 1 ELSE 1 + n % 500 END), 'p' || n FROM generate_series(1, 10000) n;
    INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
      SELECT pg_temp.id('8000', CASE WHEN n % 3 = 0 THEN 1 ELSE 1 + n % 500 END), (ARRAY['api_calls', 'seats', 'exports'])[1 + n % 3],
             '2023-01-01'::date + n % 700, n, 'k-' || n
      FROM generate_series(1, 50000) n;
    INSERT INTO usage_totals (tenant_id, metric, day, value)
      SELECT pg_temp.id('8000', n), m, '2023-01-01'::date + d * 20, 1
      FROM generate_series(1, 500) n, unnest('{api_calls,seats,signals}'::text[]) m, generate_series(1, 30) d;
    INSERT INTO recommendations (tenant_id, id, experiment_id, price, currency, confidence, status, expires_at)
      SELECT e.tenant_id, pg_temp.id('c000', n), e.id, 29, 'USD', 0.5,
             (ARRAY['proposed', 'approved', 'applied', 'rejected', 'expired'])[1 + n % 5], now() + make_interval(mins => n - 100)
      FROM generate_series(1, 10000) n JOIN experiments e ON e.id = pg_temp.id('9000', n);
    INSERT INTO metric_totals (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
      SELECT tenant_id, id, 1, 'a', 'randomised', 'XXX', '2024-01-01'::date + d, 1 FROM experiments, generate_series(1, 2) d;
    INSERT INTO archived_experiments (tenant_id, experiment_id, views, viewers, suspects, views_of_suspects)
      SELECT tenant_id, id, 0, 0, 0, 0 FROM experiments WHERE id > pg_temp.id('9000', 5000);
    INSERT INTO metric_totals (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
      SELECT tenant_id, id, 1, 'a', 'randomised', 'XXX', '2023-01-01'::date + d, 1 FROM experiments, generate_series(1, 200) d
      WHERE tenant_id = pg_temp.id('8000', 2);
    INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
      SELECT e.tenant_id, e.id, 1, 'a', 'randomised', 'XXX', '2024-01-01'::date + n % 9, 1 FROM generate_series(1, 3000) n
      JOIN experiments e ON e.id = pg_temp.id('9000', CASE WHEN n % 20 = 0 THEN 1 ELSE 1 + n % 10000 END);
    REFRESH MATERIALIZED VIEW experiment_metrics;
    ANALYZE;";

#[test]
fn every_statement_names_its_tenant() {
    for (name, sql, types) in lastprice::internals::statements() {
        let placeholders = (1..=types.len()).all(|n| sql.contains(&format!("${n}")));
        assert!(placeholders && !sql.contains(&format!("${}", types.len() + 1)), "{name}: parameters");
        assert!(sql.contains("{s}."), "{name}: tables are named with their schema");
        if name == "metrics.fold" {
            // Calls a function that folds the deltas of app_tenant_id() only, the tenant that the scope has bound.
            assert_eq!(sql, "SELECT {s}.fold_experiment_metrics() AS folded");
            continue;
        }
        assert_eq!(types.first(), Some(&Type::UUID), "{name}: the tenant is the first parameter");
        let flat = sql.split_whitespace().collect::<Vec<_>>().join(" ");
        if name.starts_with("tenants.") {
            let creates = flat.starts_with("INSERT INTO {s}.tenants (id,") && flat.contains("VALUES ($1,");
            assert!(creates || flat.contains("WHERE id = $1"), "{name}");
            continue;
        }
        // A row that is written takes its tenant from a row that was found by `= $1`.
        let found = flat.contains("tenant_id = $1") || flat.contains("t.id = $1");
        assert!(found, "{name}: tenant_id = $1");
        // And every table that is read is read for that tenant.
        let tables =
            ["FROM {s}.", "JOIN {s}.", "UPDATE {s}."].iter().map(|t| flat.matches(t).count()).sum::<usize>();
        let bound = flat.matches("tenant_id = $1").count() + flat.matches("t.id = $1").count();
        assert!(bound >= tables, "{name}: {tables} tables, {bound} of them for the tenant");
    }
}

#[tokio::test]
async fn every_statement_uses_its_index() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute(LOAD).await.unwrap();
    let app = database.connect_app().await.unwrap();
    let statements = lastprice::internals::statements();
    let table: BTreeSet<&str> = expected(1).into_keys().collect();
    let all: BTreeSet<&str> = statements.iter().map(|(name, ..)| *name).collect();
    assert_eq!(table, all, "the table of this test and the statements of the crate differ");

    // A thousand of a table of this size are found sooner by reading it as a whole, if the planner sees them. With ten
    // times the rows it uses the index [ran once: 600,000 assignments, 1.2 million views, 300,000 conversions].
    let (custom, generic) = ("force_custom_plan", "force_generic_plan");
    let mut wrong = Vec::new();
    for (batch, mode) in [(1, custom), (1, generic), (100, custom), (100, generic), (1000, generic)] {
        let mut expected = expected(batch);
        for (name, sql, types) in &statements {
            let (args, indexes) = expected.remove(name).unwrap();
            let plan = explain(&app, sql, types, &args, mode).await;
            for complaint in complaints(name, &plan, &indexes) {
                wrong.push(format!("{name} ({mode}, batch of {batch}): {complaint}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Of an installation that is new, or not analysed yet, the planner knows nothing, and what it plans then is kept while the tables
/// grow: so it must not be left to it to compare each entry of a list with each row of the tenant's. Planned as the client does it.
#[tokio::test]
async fn a_list_is_looked_up_by_the_whole_key_before_anything_is_analysed() {
    let database = TestDatabase::new().await.unwrap(); // autovacuum is off
    let app = database.connect_app().await.unwrap();
    let (mut wrong, mut lists) = (Vec::new(), BTreeSet::new());
    for batch in [1, 1000] {
        let mut expected = expected(batch);
        for (name, sql, types) in lastprice::internals::statements() {
            let (args, indexes) = expected.remove(name).unwrap();
            let mode = "force_generic_plan; SET LOCAL enable_seqscan = off";
            let plan = explain(&app, sql, types, &args, mode).await;
            let mut nodes = Vec::new();
            collect(&plan, &mut nodes);
            let has_list = types.iter().any(|t| matches!(t.kind(), Kind::Array(_)));
            if has_list && nodes.iter().any(|node| node["Node Type"] == "Function Scan") {
                lists.insert(name);
                let complaints = complaints(name, &plan, &indexes).into_iter();
                wrong.extend(complaints.map(|said| format!("{name} (batch of {batch}): {said}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for name in
        ["assignments.read", "views.record", "conversions.open", "usage.by_keys", "conversions.by_orders"]
    {
        assert!(lists.contains(name), "{name} is none of {lists:?}");
    }
}

/// What was planned while a table had a page goes by the index when it has grown, though nobody has analysed it since.
#[tokio::test]
async fn tables_that_grow_are_not_read_as_a_whole() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..20).await;
    two.owner.batch_execute("ANALYZE").await.unwrap();
    let client = lastprice::Client::builder().url(two.database.app_url()).pool_size(1).build().unwrap();
    let tenant = client.tenant(two.id);
    let call = async |n: usize| {
        let users = users(n..n + 10);
        tenant.assignments().assign_many(id, &users).await.unwrap();
        let views: Vec<_> = users.iter().map(|user| lastprice::NewView::new(id, user.clone())).collect();
        tenant.views().record_many(&views).await.unwrap();
        tenant.views().record_many(&views).await.unwrap();
        for user in users {
            let key = key(&format!("{n} {user}"));
            let sale = lastprice::NewConversion::sale(id, user, usd("29"), key)
                .order(lastprice::OrderId::new("o").unwrap());
            tenant.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        }
    };
    for n in 0..8 {
        call(n).await;
    }
    let fill = format!(
        "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency)
         SELECT '{}', '{id}', 'other-' || n, '29', 29, 'USD' FROM generate_series(1, 20000) n",
        two.id
    );
    two.owner.batch_execute(&fill).await.unwrap();
    for n in 8..16 {
        call(n).await;
    }
    client.close().await; // what a session has counted is there when it has ended
    let scans = "SELECT string_agg(relname || ' ' || seq_scan, ', ') FROM pg_stat_user_tables
                 WHERE relname IN ('assignments', 'views', 'conversions', 'waiting_conversions') AND seq_scan > 1";
    let seen = "SELECT COALESCE(sum(n_tup_ins), 0)::bigint >= 320 FROM pg_stat_user_tables WHERE relname IN ('views', 'conversions')";
    eventually("the counts are there", async || two.owner.query_one(seen, &[]).await.unwrap().get(0)).await;
    // The test itself reads the tables of two tenants, once each at the most.
    let scans: Option<String> = two.owner.query_one(scans, &[]).await.unwrap().get(0);
    assert_eq!(scans, None, "read as a whole");
    two.bystander_saw_nothing().await;
}

/// As the application, with the tenant bound, the statement as it is sent.
async fn explain(app: &Client, sql: &str, types: &[Type], args: &[String], mode: &str) -> Value {
    let sql = sql.replace("{s}", "public");
    let types: Vec<String> = types
        .iter()
        .map(|t| match t.kind() {
            Kind::Array(of) => format!("{of}[]"),
            _ => t.to_string(),
        })
        .collect();
    let parameters =
        |list: &[String]| if list.is_empty() { String::new() } else { format!("({})", list.join(", ")) };
    let setup = format!(
        "BEGIN; SET LOCAL app.tenant_id = {TENANT}; SET LOCAL plan_cache_mode = {mode}; PREPARE s {} AS {sql}",
        parameters(&types)
    );
    app.batch_execute(&setup).await.unwrap_or_else(|e| panic!("{setup}: {e:?}"));
    let explain = format!("EXPLAIN (FORMAT JSON) EXECUTE s {}", parameters(args));
    let row = app.query_one(&explain, &[]).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    app.batch_execute("DEALLOCATE s; ROLLBACK").await.unwrap();
    row.get(0)
}

fn complaints(name: &str, plan: &Value, expected: &[Expected]) -> Vec<String> {
    let (mut nodes, mut complaints) = (Vec::new(), Vec::new());
    collect(plan, &mut nodes);
    assert!(!nodes.is_empty(), "{name}: no plan in {plan}");
    let text = |node: &Value, key: &str| node[key].as_str().unwrap_or_default().to_owned();
    let mut used = BTreeSet::new();
    let not_run = alternatives(&nodes);
    for node in &nodes {
        if not_run.contains(node["Subplan Name"].as_str().unwrap_or_default()) {
            continue;
        }
        if text(node, "Node Type") == "Seq Scan" {
            complaints.push(format!("scans all of {}", text(node, "Relation Name")));
        }
        let index = text(node, "Index Name");
        if index.is_empty() {
            continue;
        }
        let condition = text(node, "Index Cond");
        match expected
            .iter()
            .find(|(names, _)| names.trim_start_matches('?').split('|').any(|name| name == index))
        {
            None => complaints.push(format!("uses {index} ({condition})")),
            Some((names, columns)) => {
                let words = || condition.split(|c: char| !c.is_alphanumeric() && c != '_');
                let tenant = if index == "tenants_pkey" { "id" } else { "tenant_id" };
                if !columns.split(' ').chain([tenant]).all(|column| words().any(|word| word == column)) {
                    complaints.push(format!("searches {index} by {condition} only, not by {columns}"));
                }
                used.insert(*names);
            }
        }
    }
    let missing = expected.iter().filter(|(names, _)| !names.starts_with('?') && !used.contains(names));
    complaints.extend(missing.map(|(names, _)| format!("does not use {names}")));
    complaints
}

/// Before PostgreSQL 14 the plan shows both ways to answer an EXISTS, and the executor takes one: the first, unless it expects
/// to ask very often. "(alternatives: SubPlan 1 or hashed SubPlan 2)"
fn alternatives(nodes: &[&Value]) -> BTreeSet<String> {
    let conditions =
        nodes.iter().flat_map(|node| node.as_object().unwrap().values()).filter_map(Value::as_str);
    let hashed = conditions.flat_map(|text| {
        text.split("alternatives: ")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once(" or hashed ")?.1.split(')').next()?.to_owned()))
    });
    hashed.collect()
}

/// All nodes of a plan.
fn collect<'p>(value: &'p Value, nodes: &mut Vec<&'p Value>) {
    match value {
        Value::Array(items) => items.iter().for_each(|v| collect(v, nodes)),
        Value::Object(map) => {
            if map.contains_key("Node Type") {
                nodes.push(value);
            }
            map.values().for_each(|v| collect(v, nodes));
        }
        _ => {}
    }
}
