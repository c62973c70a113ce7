//! Two tenants, as the ordinary role, in plain SQL: nothing of the one is seen, changed, counted or given away to the
//! other.

use lastprice_testkit::TestDatabase;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::support_sql::*;

const TABLES: [&str; 18] = [
    "tenants",
    "experiments",
    "assignments",
    "views",
    "conversions",
    "usage",
    "recommendations",
    "waiting_conversions",
    "webhook_events",
    "ledger_locks",
    "audit_trail",
    "metric_totals",
    "metric_deltas",
    "archived_experiments",
    "usage_totals",
    "tenant_limits",
    "identities",
    "erasures",
];
/// What a tenant can write, apart from its own row.
const WRITTEN: &[&str] = TABLES.split_at(10).0.split_at(1).1;

/// A row of a tenant; with the same keys for every tenant.
fn insert(table: &str, tenant: &str, experiment: &str) -> String {
    let id = "dddddddd-0000-4000-8000-000000000000";
    let (columns, values) = match table {
        "tenants" => ("id, name, email".to_owned(), format!("'{tenant}', 'N', 'n@example.com'")),
        "experiments" => (
            "tenant_id, id, key, name, variants".to_owned(),
            format!("'{tenant}', '{id}', 'same', 'N', '{ARMS}'"),
        ),
        "usage" => (
            "tenant_id, metric, day, value, idempotency_key".to_owned(),
            format!("'{tenant}', 'm', '2026-01-01', 1, 'same'"),
        ),
        "waiting_conversions" => (
            "tenant_id, idempotency_key, id, kind, ref, entry".to_owned(),
            format!("'{tenant}', 'same', '{id}', 'refund', 'o/same', '{{}}'"),
        ),
        "webhook_events" => (
            "tenant_id, id, seq, body, body_hash".to_owned(),
            format!("'{tenant}', 'same', '{id}', 'x', sha256('x')"),
        ),
        "ledger_locks" => ("tenant_id, ref".to_owned(), format!("'{tenant}', 'o/same'")),
        _ => {
            let (more, values) = match table {
                "assignments" => ("user_id, variant, price, currency", "'u', 'a', 1, 'USD'".to_owned()),
                "views" => ("id, user_id, variant", format!("'{id}', 'u', 'a'")),
                "conversions" => (
                    "id, user_id, variant, revenue, currency, idempotency_key",
                    format!("'{id}', 'u', 'a', 1, 'USD', 'same'"),
                ),
                _ => ("id, price, currency, confidence", format!("'{id}', 1, 'USD', 0.5")),
            };
            (format!("tenant_id, experiment_id, {more}"), format!("'{tenant}', '{experiment}', {values}"))
        }
    };
    format!("INSERT INTO {table} ({columns}) VALUES ({values})")
}

/// A and B, each with a row of every table, totals, pending deltas, and refreshed metrics.
async fn database() -> (TestDatabase, Client, Client) {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let app = db.connect_app().await.unwrap();
    for (tenant, experiment) in [(A, XA), (B, XB)] {
        for table in WRITTEN {
            // The same keys in both: they do not collide.
            as_tenant(&app, tenant, &insert(table, tenant, experiment))
                .await
                .unwrap_or_else(|e| panic!("{table}: {e:?}"));
        }
        for sql in ["SELECT merge_users('m', 'n', 'exclude')", "SELECT erase_user('n')"] {
            assert_eq!(as_tenant(&app, tenant, sql).await.unwrap().len(), 1, "{sql}");
        }
    }
    let archived = "INSERT INTO archived_experiments (tenant_id, experiment_id, views, viewers, suspects, views_of_suspects)
                    SELECT tenant_id, id, 1, 1, 0, 0 FROM experiments";
    owner.batch_execute(archived).await.unwrap();
    owner
        .batch_execute("INSERT INTO tenant_limits (tenant_id, metric) SELECT id, 'm' FROM tenants")
        .await
        .unwrap();
    assert_eq!(value(&rows(&owner, "SELECT refresh_experiment_metrics()").await.unwrap()), "t");
    for (tenant, experiment) in [(A, XA), (B, XB)] {
        let sql = format!(
            "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{experiment}', 'v', 'b')"
        );
        as_tenant(&app, tenant, &sql).await.unwrap();
    }
    (db, owner, app)
}

fn tenant_column(table: &str) -> &str {
    if table == "tenants" { "id" } else { "tenant_id" }
}

#[tokio::test]
async fn reading() {
    let (_db, owner, app) = database().await;
    for table in
        TABLES.into_iter().chain(["tenant_experiment_metrics", "tenant_variant_metrics", "tenant_usage"])
    {
        let column = tenant_column(table);
        let seen = format!("SELECT DISTINCT {column} FROM {table}");
        for tenant in [A, B] {
            assert_eq!(as_tenant(&app, tenant, &seen).await.unwrap(), [[Some(tenant.to_owned())]], "{table}");
        }
        let other = format!("SELECT FROM {table} WHERE {column} = '{B}'");
        assert!(as_tenant(&app, A, &other).await.unwrap().is_empty(), "{table}");
        // Nobody: no rows, and no error; before any tenant, after one, and with an empty setting.
        let fresh = _db.connect_app().await.unwrap();
        assert!(rows(&fresh, &seen).await.unwrap().is_empty(), "{table}");
        assert!(rows(&app, &seen).await.unwrap().is_empty(), "{table}");
        app.batch_execute("SET app.tenant_id = ''").await.unwrap();
        assert!(rows(&app, &seen).await.unwrap().is_empty(), "{table}");
        app.batch_execute("RESET app.tenant_id").await.unwrap();
    }
    assert_eq!(
        value(&rows(&owner, "SELECT count(DISTINCT tenant_id) FROM experiment_metrics").await.unwrap()),
        "2"
    );
    assert_eq!(
        refusal(as_tenant(&app, A, "SELECT FROM experiment_metrics").await).0,
        SqlState::INSUFFICIENT_PRIVILEGE
    );

    // A function in a condition does not get to see rows that the view would leave out.
    let leak = format!(
        "SELECT FROM tenant_experiment_metrics WHERE CASE tenant_id WHEN '{B}' THEN 1 / (tenant_id <> '{B}')::int ELSE 1 END = 1"
    );
    assert!(as_tenant(&app, A, &leak).await.is_ok());
}

#[tokio::test]
async fn writing() {
    let (_db, owner, app) = database().await;
    let snapshot = "SELECT jsonb_agg(to_jsonb(e) ORDER BY e.id), (SELECT jsonb_agg(to_jsonb(t) ORDER BY t.id) FROM tenants t) FROM experiments e";
    let before = rows(&owner, snapshot).await.unwrap();
    let count = |table: &str| format!("SELECT count(*) FROM {table}");
    for table in WRITTEN.iter().copied().chain(["tenants"]) {
        let rows_before = rows(&owner, &count(table)).await.unwrap();
        let other = "cccccccc-0000-4000-8000-000000000000";
        let of_another = insert(table, if table == "tenants" { other } else { B }, XB)
            .replace("same", "new")
            .replace("dddd", "eeee");
        let (code, _, message) = refusal(as_tenant(&app, A, &of_another).await);
        assert_eq!(code, SqlState::INSUFFICIENT_PRIVILEGE, "{table}: {message}");
        assert!(message.contains("row-level security"), "{table}: {message}");
        // Unbound.
        for setting in ["RESET app.tenant_id", "SET app.tenant_id = ''"] {
            app.batch_execute(setting).await.unwrap();
            assert_eq!(
                refusal(rows(&app, &of_another).await).0,
                SqlState::INSUFFICIENT_PRIVILEGE,
                "{table}: {setting}"
            );
        }
        assert_eq!(rows_before, rows(&owner, &count(table)).await.unwrap(), "{table}");
    }
    for sql in [
        format!("UPDATE experiments SET name = 'stolen' WHERE tenant_id = '{B}' RETURNING id"),
        format!("UPDATE tenants SET name = 'stolen' WHERE id = '{B}' RETURNING id"),
        format!("UPDATE recommendations SET status = 'approved' WHERE tenant_id = '{B}' RETURNING id"),
        format!("DELETE FROM experiments WHERE tenant_id = '{B}' RETURNING id"),
        format!("SELECT id FROM experiments WHERE tenant_id = '{B}' FOR UPDATE"),
    ] {
        assert!(as_tenant(&app, A, &sql).await.unwrap().is_empty(), "{sql}");
        assert!(rows(&app, &sql).await.unwrap().is_empty(), "unbound: {sql}");
    }
    assert!(rows(&app, "DELETE FROM experiments RETURNING id").await.unwrap().is_empty(), "unbound");
    assert!(rows(&app, "UPDATE tenants SET name = 'x' RETURNING id").await.unwrap().is_empty(), "unbound");
    let give_away = format!("UPDATE experiments SET tenant_id = '{B}' WHERE key = 'same'");
    assert!(as_tenant(&app, A, &give_away).await.is_err());
    assert_eq!(before, rows(&owner, snapshot).await.unwrap());
}

#[tokio::test]
async fn foreign_keys_reveal_nothing() {
    let (_db, _, app) = database().await;
    let nowhere = "ffffffff-0000-4000-8000-000000000000";
    for table in ["assignments", "views", "conversions", "recommendations"] {
        let attempt = |x: &str| {
            insert(table, A, x).replace("same", "new").replace("dddd", "eeee").replace("'u'", "'w'")
        };
        let of_b = refusal(as_tenant(&app, A, &attempt(XB)).await);
        let of_nobody = refusal(as_tenant(&app, A, &attempt(nowhere)).await);
        assert_eq!(of_b.0, SqlState::FOREIGN_KEY_VIOLATION, "{table}");
        assert_eq!(of_b, of_nobody, "{table}: another tenant's experiment looks like none");
    }
    // An upsert on another's key is an insert of one's own.
    let upsert = format!(
        "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, idempotency_key)
         VALUES ('{A}', '{XA}', 'u', 'a', 1, 'USD', 'only-b') ON CONFLICT (tenant_id, idempotency_key) DO NOTHING RETURNING 'inserted'"
    );
    as_tenant(&app, B, &upsert.replace(XA, XB).replace(A, B)).await.unwrap();
    assert_eq!(value(&as_tenant(&app, A, &upsert).await.unwrap()), "inserted");
    assert!(as_tenant(&app, A, &upsert).await.unwrap().is_empty());
}

#[tokio::test]
async fn functions() {
    let (_db, owner, app) = database().await;
    let pending = "SELECT string_agg(n::text, ' ' ORDER BY tenant_id) FROM
                   (SELECT tenant_id, count(*) n FROM metric_deltas GROUP BY 1) d";
    assert_eq!(value(&rows(&owner, pending).await.unwrap()), "1 1");
    assert_eq!(value(&rows(&app, "SELECT fold_experiment_metrics()").await.unwrap()), "0", "of nobody");
    assert_eq!(value(&as_tenant(&app, A, "SELECT fold_experiment_metrics()").await.unwrap()), "1");
    assert_eq!(value(&rows(&owner, pending).await.unwrap()), "1", "B's is still there");

    let callable = "SELECT string_agg(p.proname, ' ' ORDER BY p.proname) FROM pg_proc p LEFT JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
        WHERE p.pronamespace = 'public'::regnamespace AND d IS NULL AND p.prorettype <> 'trigger'::regtype
          AND has_function_privilege('lastprice_service', p.oid, 'EXECUTE')";
    assert_eq!(
        value(&rows(&owner, callable).await.unwrap()),
        "app_set_tenant app_tenant_id baseline_prices broken_price_rules consume_usage default_plan_limits erase_user \
         experiment_slot fold_experiment_metrics forced_variants_exist lastprice_schema_version merge_users quota_lock quoted_price tenant_limit usage_quota \
         variant_names_are_unique"
    );

    let tenant = "SELECT app_tenant_id()";
    assert_eq!(value(&rows(&app, tenant).await.unwrap()), "NULL");
    assert_eq!(value(&as_tenant(&app, A, tenant).await.unwrap()), A);
    assert_eq!(value(&rows(&app, tenant).await.unwrap()), "NULL", "it ended with the transaction");
    as_tenant(&app, A, &format!("SELECT app_set_tenant('{A}')")).await.unwrap();
    let (code, _, message) = refusal(as_tenant(&app, A, &format!("SELECT app_set_tenant('{B}')")).await);
    assert_eq!(code, SqlState::ACTIVE_SQL_TRANSACTION);
    assert!(!message.contains(A) && !message.contains(B), "{message}");
    let null = rows(&app, "BEGIN; SELECT app_set_tenant(NULL)").await;
    assert_eq!(refusal(null).0, SqlState::NULL_VALUE_NOT_ALLOWED);
    app.batch_execute("ROLLBACK").await.unwrap();
    // One after the other, each in its own transaction.
    for tenant in [A, B] {
        assert_eq!(value(&as_tenant(&app, tenant, "SELECT count(*) FROM tenants").await.unwrap()), "1");
    }
}

/// With the bare policy, which names no tenant in the statement, an index serves; and the function inlines.
#[tokio::test]
async fn the_policy_inlines() {
    let (_db, _, app) = database().await;
    let plan = as_tenant(&app, A, "EXPLAIN SELECT * FROM conversions").await.unwrap();
    let plan: String = plan.into_iter().map(|line| line[0].clone().unwrap() + "\n").collect();
    assert!(plan.contains("current_setting('app.tenant_id'") && !plan.contains("app_tenant_id()"), "{plan}");
}
