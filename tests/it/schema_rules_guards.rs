//! What the triggers guard, whoever writes, and what the application role may not do.

use lastprice_testkit::TestDatabase;
use tokio_postgres::error::SqlState;

use crate::support_sql::*;

async fn database() -> (TestDatabase, tokio_postgres::Client, tokio_postgres::Client) {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let app = db.connect_app().await.unwrap();
    (db, owner, app)
}

#[tokio::test]
async fn the_life_of_an_experiment() {
    let (_db, owner, app) = database().await;
    let allowed = [
        ("draft", "active"),
        ("active", "paused"),
        ("paused", "active"),
        ("active", "completed"),
        ("paused", "completed"),
    ];
    let all = ["draft", "active", "paused", "completed"];
    for from in all {
        for to in all {
            let key = format!("{from}-{to}");
            let insert = format!(
                "INSERT INTO experiments (tenant_id, key, name, status, variants) VALUES ('{A}', '{key}', 'N', '{from}', '{ARMS}')"
            );
            as_tenant(&app, A, &insert).await.unwrap();
            let update = format!("UPDATE experiments SET status = '{to}' WHERE key = '{key}'");
            // The owner is bound by it as well.
            if from != to && !allowed.contains(&(from, to)) {
                for result in [as_tenant(&app, A, &update).await, rows(&owner, &update).await] {
                    let (code, constraint, _) = refusal(result);
                    assert_eq!(
                        (code, &*constraint),
                        (SqlState::CHECK_VIOLATION, "experiments_guard_transition"),
                        "{key}"
                    );
                }
                continue;
            }
            as_tenant(&app, A, &update).await.unwrap();
            let dates = format!(
                "SELECT concat_ws(' ', status, revision, start_date IS NOT NULL, end_date IS NOT NULL) FROM experiments WHERE key = '{key}'"
            );
            let started = from == "draft" && to == "active";
            let ended = from != to && to == "completed";
            let letter = |yes| if yes { "t" } else { "f" };
            let expected = format!("{to} 2 {} {}", letter(started), letter(ended));
            assert_eq!(value(&as_tenant(&app, A, &dates).await.unwrap()), expected, "{key}");
        }
    }
}

#[tokio::test]
async fn what_users_were_shown_is_frozen() {
    let (_db, owner, app) = database().await;
    let draft = "aaaaaaaa-0000-4000-8000-00000000000d";
    let insert = format!(
        "INSERT INTO experiments (tenant_id, id, key, name, variants, baseline) VALUES ('{A}', '{draft}', 'd', 'D', '{ARMS}', 'a')"
    );
    as_tenant(&app, A, &insert).await.unwrap();
    let frozen = [
        "key = 'z'",
        "currency = 'EUR'",
        "baseline = 'b'",
        "unit = 'account'",
        "eligibility = 'new_customers'",
        "plan = '{\"alpha\": 0.5}'",
        "layer = 'l', layer_start = 0, layer_end = 1",
        "traffic = 999999",
        r#"variants = '[{"name": "a", "weight": 1, "price": "11"}, {"name": "b", "weight": 1, "price": "1"}]'"#,
    ];
    for change in frozen {
        let update = |id| format!("UPDATE experiments SET {change} WHERE id = '{id}'");
        as_tenant(&app, A, &update(draft)).await.unwrap_or_else(|e| panic!("a draft: {change}: {e:?}"));
        for result in [as_tenant(&app, A, &update(XA)).await, rows(&owner, &update(XA)).await] {
            let (code, constraint, _) = refusal(result);
            assert_eq!(
                (code, &*constraint),
                (SqlState::CHECK_VIOLATION, "experiments_guard_frozen"),
                "{change}"
            );
        }
    }
    for change in ["salt = 'other'", "id = gen_random_uuid()", &format!("tenant_id = '{B}'")] {
        let result = rows(&owner, &format!("UPDATE experiments SET {change} WHERE id = '{draft}'")).await;
        assert_eq!(refusal(result).1, "experiments_guard_identity", "{change}");
    }
    let result = rows(&owner, &format!("UPDATE tenants SET id = gen_random_uuid() WHERE id = '{A}'")).await;
    assert_eq!(refusal(result).1, "tenants_guard");
    let result = rows(&owner, &format!("UPDATE tenants SET salt = 'other' WHERE id = '{A}'")).await;
    assert_eq!(refusal(result).1, "tenants_guard");

    // Who, and when; whatever the statement itself says about it.
    let update = "SET LOCAL app.actor = 'ann'; UPDATE experiments SET name = 'E', revision = 99, updated_by = 'mallory',
                    updated_at = 'epoch' WHERE key = 'z'; UPDATE tenants SET name = 'F'";
    as_tenant(&app, A, update).await.unwrap();
    let who = "SELECT concat_ws(' ', e.revision, e.updated_by, e.updated_at > now() - interval '1 minute', t.updated_by)
               FROM experiments e, tenants t WHERE e.key = 'z'";
    assert_eq!(value(&as_tenant(&app, A, who).await.unwrap()), "11 ann t ann");
    as_tenant(&app, A, "UPDATE experiments SET name = 'G' WHERE key = 'z'").await.unwrap();
    assert_eq!(value(&as_tenant(&app, A, who).await.unwrap()), "12 t ann", "nobody said who");
    assert_eq!(
        value(&rows(&owner, &format!("SELECT name FROM tenants WHERE id = '{B}'")).await.unwrap()),
        "B"
    );
}

#[tokio::test]
async fn a_phase_is_the_next_one_and_only_takes_more() {
    let (_db, owner, app) = database().await;
    let other = r#"variants = '[{"name": "a", "weight": 9, "price": "10.00"}, {"name": "c", "weight": 1, "price": "1"}]'"#;
    let attempt = |change: &str| format!("UPDATE experiments SET {change} WHERE id = '{XA}'");
    for change in ["phase = 0", "phase = 3", &format!("phase = 3, {other}")] {
        for result in [as_tenant(&app, A, &attempt(change)).await, rows(&owner, &attempt(change)).await] {
            assert_eq!(refusal(result).1, "experiments_guard_phase", "{change}");
        }
    }
    // What everyone outside sees stays.
    for dearer in [
        other.replace("10.00", "11"),
        other.replace(r#""10.00""#, r#""10", "prices": [{"item": "i", "currency": "EUR", "price": "1"}]"#),
    ] {
        let result = as_tenant(&app, A, &attempt(&format!("phase = 2, {dearer}"))).await;
        assert_eq!(refusal(result).1, "experiments_guard_frozen", "{dearer}");
    }
    as_tenant(&app, A, &attempt(&format!("phase = 2, traffic = 10000, {other}"))).await.unwrap();
    // The weights of then are kept, whatever anybody says of them, and none can be made up.
    let made_up = format!(
        "INSERT INTO experiments (tenant_id, key, name, variants, past_phases)
         VALUES ('{A}', 'past', 'N', '{ARMS}', '[{{\"phase\": 1, \"variants\": []}}]')"
    );
    let (code, ..) = refusal(as_tenant(&app, A, &made_up).await);
    assert_eq!(code, SqlState::INSUFFICIENT_PRIVILEGE);
    as_tenant(&app, A, &attempt("traffic = 20000, past_phases = '[]'")).await.unwrap();
    let past = format!(
        "SELECT past_phases -> 0 ->> 'phase', past_phases -> 0 -> 'variants' = '{ARMS}', jsonb_array_length(past_phases) FROM experiments WHERE id = '{XA}'"
    );
    let past = owner.query_one(&past, &[]).await.unwrap();
    assert_eq!((past.get::<_, &str>(0), past.get::<_, bool>(1), past.get::<_, i32>(2)), ("1", true, 1));
    for change in [
        "traffic = 10000",
        &*format!("{other}::jsonb || '[{{\"name\": \"d\", \"weight\": 1, \"price\": \"1\"}}]'"),
    ] {
        let result = as_tenant(&app, A, &attempt(change)).await;
        assert_eq!(refusal(result).1, "experiments_guard_frozen", "{change}");
    }
    as_tenant(&app, A, &attempt("status = 'completed'")).await.unwrap();
    assert_eq!(refusal(as_tenant(&app, A, &attempt("phase = 3")).await).1, "experiments_guard_phase");
}

#[tokio::test]
async fn a_part_of_a_layer_has_one_experiment() {
    let (db, _owner, app) = database().await;
    let insert = |key: &str, status: &str, range: (i32, i32)| {
        let (start, end) = range;
        format!(
            "INSERT INTO experiments (tenant_id, key, name, status, variants, layer, layer_start, layer_end)
             VALUES ('{A}', '{key}', 'N', '{status}', '{ARMS}', 'l', {start}, {end})"
        )
    };
    let status = |key: &str, to: &str| format!("UPDATE experiments SET status = '{to}' WHERE key = '{key}'");
    as_tenant(&app, A, &insert("first", "active", (0, 500_000))).await.unwrap();
    // Drafts have nothing yet; another tenant's layer of the same name is another layer.
    as_tenant(&app, A, &insert("draft", "draft", (0, 1_000_000))).await.unwrap();
    as_tenant(&app, B, &insert("b", "active", (0, 1_000_000)).replace(A, B)).await.unwrap();
    for attempt in
        [insert("x", "active", (499_999, 500_001)), insert("x", "paused", (1, 2)), status("draft", "active")]
    {
        assert_eq!(refusal(as_tenant(&app, A, &attempt).await).1, "experiments_layer_overlap", "{attempt}");
    }
    as_tenant(&app, A, &insert("second", "active", (500_000, 600_000))).await.unwrap();
    // Paused, it keeps its part; completed, it gives it back.
    as_tenant(&app, A, &status("first", "paused")).await.unwrap();
    assert!(as_tenant(&app, A, &insert("x", "active", (0, 1))).await.is_err());
    as_tenant(&app, A, &status("first", "active")).await.unwrap();
    as_tenant(&app, A, &status("first", "completed")).await.unwrap();
    as_tenant(&app, A, &insert("third", "active", (0, 500_000))).await.unwrap();
    as_tenant(&app, A, &insert("late", "draft", (600_000, 700_000))).await.unwrap();
    app.batch_execute("SET default_transaction_isolation = 'repeatable read'").await.unwrap();
    let late = status("late", "active");
    let result = as_tenant(&app, A, &late);
    assert!(refusal(result.await).2.contains("READ COMMITTED"));

    // Of two at once, one.
    for n in 0..10 {
        let (one, two) = (db.connect_app().await.unwrap(), db.connect_app().await.unwrap());
        let range = (700_000 + n * 1000, 700_000 + n * 1000 + 1000);
        let [first, second] = ["one", "two"].map(|key| insert(&format!("{key}-{n}"), "active", range));
        let both = futures_util::future::join(as_tenant(&one, A, &first), as_tenant(&two, A, &second)).await;
        assert_eq!(u8::from(both.0.is_ok()) + u8::from(both.1.is_ok()), 1, "{both:?}");
    }
}

#[tokio::test]
async fn what_the_hash_does_not_say_is_marked() {
    let (_db, owner, app) = database().await;
    let marked = async || {
        let sql = format!("SELECT exceptions FROM experiments WHERE id = '{XA}'");
        value(&rows(&owner, &sql).await.unwrap()).to_owned()
    };
    let assign = |user: &str, reason: &str| {
        format!(
            "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason)
             VALUES ('{A}', '{XA}', '{user}', 'a', 1, 'USD', '{reason}')"
        )
    };
    for reason in ["randomised", "forced", "late", "grandfathered"] {
        as_tenant(&app, A, &assign(reason, reason)).await.unwrap();
        assert_eq!(marked().await, "f", "{reason}");
    }
    let force = |list: &str| format!("UPDATE experiments SET forced = '{list}' WHERE id = '{XA}'");
    for (list, expected) in
        [(r#"{"u": "a"}"#, "f"), (r#"{"u": "a", "v": "b"}"#, "f"), (r#"{"u": "b", "v": "b"}"#, "t")]
    {
        as_tenant(&app, A, &force(list)).await.unwrap();
        assert_eq!(marked().await, expected, "{list}");
    }
    for reason in ["imported", "merged"] {
        rows(&owner, &format!("UPDATE experiments SET exceptions = false WHERE id = '{XA}'")).await.unwrap();
        as_tenant(&app, A, &assign(reason, reason)).await.unwrap();
        assert_eq!(marked().await, "t", "{reason}");
    }
}

#[tokio::test]
async fn explicit_dates_are_kept() {
    let (_db, owner, app) = database().await;
    let insert = format!(
        "INSERT INTO experiments (tenant_id, key, name, variants) VALUES ('{A}', 'd', 'D', '{ARMS}')"
    );
    as_tenant(&app, A, &insert).await.unwrap();
    let update = "UPDATE experiments SET status = 'active', start_date = '2026-01-01Z' WHERE key = 'd';
                  UPDATE experiments SET status = 'completed', end_date = '2026-02-01Z', winner = 'b' WHERE key = 'd'";
    as_tenant(&app, A, update).await.unwrap();
    let dates = "SELECT (start_date, end_date, winner) = ('2026-01-01Z', '2026-02-01Z', 'b') FROM experiments WHERE key = 'd'";
    assert_eq!(value(&rows(&owner, dates).await.unwrap()), "t");
}

#[tokio::test]
async fn what_the_application_may_not_do() {
    let (_db, owner, app) = database().await;
    let event = format!("(tenant_id, experiment_id, user_id, variant) VALUES ('{A}', '{XA}', 'u', 'a')");
    as_tenant(&app, A, &format!("INSERT INTO views {event}")).await.unwrap();

    let tables = [
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
        "metric_baselines",
        "archived_experiments",
        "identities",
        "erasures",
        "experiment_metrics",
        "tenant_experiment_metrics",
        "tenant_variant_metrics",
        "usage_totals",
        "plan_limits",
        "tenant_limits",
        "tenant_usage",
    ];
    let rights = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"];
    let mut granted = Vec::new();
    for table in tables {
        let has = format!(
            "SELECT string_agg(r, ' ') FROM unnest('{{{}}}'::text[]) r
             WHERE has_table_privilege('lastprice_service', '{table}', r) OR
               CASE WHEN r IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES') THEN has_any_column_privilege('lastprice_service', '{table}', r) END",
            rights.join(",")
        );
        granted.push(format!("{table}: {}", value(&rows(&owner, &has).await.unwrap())));
    }
    assert_eq!(
        granted,
        [
            "tenants: SELECT INSERT UPDATE",
            "experiments: SELECT INSERT UPDATE DELETE",
            "assignments: SELECT INSERT UPDATE",
            "views: SELECT INSERT",
            "conversions: SELECT INSERT",
            "usage: SELECT INSERT",
            "recommendations: SELECT INSERT UPDATE",
            "waiting_conversions: SELECT INSERT",
            "webhook_events: SELECT INSERT UPDATE",
            "ledger_locks: SELECT INSERT DELETE",
            "audit_trail: SELECT",
            "metric_totals: SELECT",
            "metric_deltas: SELECT",
            "metric_baselines: NULL",
            "archived_experiments: SELECT",
            "identities: SELECT",
            "erasures: SELECT",
            "experiment_metrics: NULL",
            "tenant_experiment_metrics: SELECT",
            "tenant_variant_metrics: SELECT",
            "usage_totals: SELECT",
            "plan_limits: SELECT",
            "tenant_limits: SELECT",
            "tenant_usage: SELECT"
        ]
    );
    for (table, right, columns) in [
        ("tenants", "UPDATE", "email holdout metadata mode name paid_api_key plan webhook_secret"),
        ("assignments", "UPDATE", "valid_until"),
        ("usage", "INSERT", "created_at day idempotency_key metric tenant_id value"),
        ("webhook_events", "UPDATE", "attempts idempotency_key processed_at status what"),
        ("webhook_events", "INSERT", "body body_hash id received_at seq tenant_id type"),
        ("recommendations", "UPDATE", "follow_up_id observed_revenue rejection_reason status"),
        (
            "recommendations",
            "INSERT",
            "confidence created_at currency expected_revenue experiment_id expires_at id inputs_hash model_version objective \
             price simulation source tenant_id",
        ),
    ] {
        let granted = format!(
            "SELECT string_agg(attname, ' ' ORDER BY attname) FROM pg_attribute WHERE attrelid = '{table}'::regclass
             AND attnum > 0 AND has_column_privilege('lastprice_service', attrelid, attnum, '{right}')"
        );
        assert_eq!(value(&rows(&owner, &granted).await.unwrap()), columns, "{right} on {table}");
    }
    // Not only on paper.
    let mut denied = vec![
        "UPDATE assignments SET price = 1".to_owned(),
        "UPDATE tenants SET billing_day = 28".to_owned(),
        "UPDATE tenants SET salt = 'other'".to_owned(),
        "UPDATE tenants SET updated_by = 'mallory'".to_owned(),
        "UPDATE recommendations SET price = 1".to_owned(),
        "UPDATE webhook_events SET body = ''".to_owned(),
        "DELETE FROM webhook_events".to_owned(),
        "UPDATE recommendations SET decided_by = 'somebody else'".to_owned(),
        format!(
            "INSERT INTO recommendations (tenant_id, experiment_id, price, currency, confidence, status) VALUES ('{A}', '{XA}', 1, 'USD', 1, 'approved')"
        ),
        "SELECT FROM experiment_metrics".to_owned(),
        "SELECT refresh_experiment_metrics()".to_owned(),
        "SELECT recount_experiment_metrics()".to_owned(),
        format!("SELECT fold_metric_deltas('{A}')"),
        "REFRESH MATERIALIZED VIEW experiment_metrics".to_owned(),
        "CREATE TABLE t (n int)".to_owned(),
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'".to_owned(),
        "ALTER TABLE views DISABLE ROW LEVEL SECURITY".to_owned(),
        "DROP POLICY tenant_isolation ON views".to_owned(),
        "CREATE TRIGGER t BEFORE INSERT ON views EXECUTE FUNCTION tenants_guard()".to_owned(),
        "ALTER TABLE views DISABLE TRIGGER ALL".to_owned(),
        "SET session_replication_role = replica".to_owned(),
        "INSERT INTO metric_totals DEFAULT VALUES".to_owned(),
        "UPDATE metric_totals SET views = 9".to_owned(),
        "DELETE FROM metric_deltas".to_owned(),
        "SELECT FROM metric_baselines".to_owned(),
        "DELETE FROM archived_experiments".to_owned(),
        "UPDATE identities SET known_id = 'me'".to_owned(),
        "DELETE FROM erasures".to_owned(),
        format!("SELECT locked_users('{A}', '{{u}}')"),
        format!("SELECT lock_entries('{A}', '{{u}}')"),
        "SELECT webhook_without('', '{u}', '{v}')".to_owned(),
        "DELETE FROM tenants".to_owned(),
        "INSERT INTO audit_trail SELECT * FROM audit_trail".to_owned(),
        "UPDATE audit_trail SET actor = 'nobody'".to_owned(),
        "DELETE FROM audit_trail".to_owned(),
        "TRUNCATE audit_trail".to_owned(),
        format!(
            "INSERT INTO usage (tenant_id, metric, day, value, folded) VALUES ('{A}', 'm', '2026-01-01', 1, true)"
        ),
        "DELETE FROM usage_totals".to_owned(),
        "INSERT INTO plan_limits (plan, metric) VALUES ('free', 'active_experiments')".to_owned(),
        format!("INSERT INTO tenant_limits (tenant_id, metric) VALUES ('{A}', 'active_experiments')"),
        "UPDATE tenant_limits SET quota = NULL".to_owned(),
        format!("SELECT fold_usage('{A}')"),
    ];
    for table in ["assignments", "views", "conversions", "usage", "recommendations"] {
        for sql in [
            format!("UPDATE {table} SET tenant_id = tenant_id"),
            format!("DELETE FROM {table}"),
            format!("TRUNCATE {table}"),
        ] {
            denied.push(sql);
        }
    }
    for sql in denied {
        assert_eq!(refusal(as_tenant(&app, A, &sql).await).0, SqlState::INSUFFICIENT_PRIVILEGE, "{sql}");
    }
}

/// A cascade from an experiment needs no DELETE right on the ledger.
#[tokio::test]
async fn only_drafts_without_sales_are_deleted() {
    let (db, owner, app) = database().await;
    for (tenant, prefix) in [(A, "a"), (B, "b")] {
        let sql = ["draft", "sold", "paused", "completed"].map(|key| {
            let status = if key == "sold" { "draft" } else { key };
            format!(
                "INSERT INTO experiments (tenant_id, id, key, name, status, variants)
                 VALUES ('{tenant}', md5('{prefix}{key}')::uuid, '{key}', 'N', '{status}', '{ARMS}');
                 INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', md5('{prefix}{key}')::uuid, 'u', 'a');"
            )
        });
        let sale = format!(
            "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency)
             VALUES ('{tenant}', md5('{prefix}sold')::uuid, 'u', 'a', 1, 'USD')"
        );
        as_tenant(&app, tenant, &(sql.concat() + &sale)).await.unwrap();
    }
    let deleted = as_tenant(&app, A, "DELETE FROM experiments RETURNING key").await.unwrap();
    assert_eq!(deleted, [[Some("draft".to_owned())]]);
    assert!(as_tenant(&app, A, "DELETE FROM experiments RETURNING key").await.unwrap().is_empty());
    let left = "SELECT (SELECT count(*) FROM experiments), (SELECT count(*) FROM views), (SELECT count(*) FROM conversions)";
    assert_eq!(rows(&owner, left).await.unwrap(), [["9", "7", "2"].map(|n| Some(n.to_owned()))]);
    assert_exact(&db.connect_superuser().await.unwrap(), "after the application deleted drafts").await;

    // The owner deletes what it likes.
    owner.batch_execute("DELETE FROM experiments WHERE key IN ('sold', 'completed')").await.unwrap();
    assert_exact(&db.connect_superuser().await.unwrap(), "after the owner deleted").await;
}
