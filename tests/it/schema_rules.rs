//! Every CHECK refuses what it names, under its name, as the ordinary role; and accepts what is just right.

use std::collections::BTreeSet;

use lastprice_testkit::TestDatabase;
use tokio_postgres::error::SqlState;

use crate::support_sql::*;

/// A tenant that is not there yet.
const C: &str = "cccccccc-0000-4000-8000-000000000000";

/// A good row of each table: column and expression.
const GOOD: [(&str, &str); 14] = [
    ("tenants", "id = 'cccccccc-0000-4000-8000-000000000000' & name = 'C' & email = 'c@example.com'"),
    (
        "experiments",
        "key = 'k' & name = 'N' & variants = '[{\"name\": \"a\", \"weight\": 1, \"price\": \"1\"}]'",
    ),
    ("assignments", "user_id = 'u' & variant = 'a' & price = 10 & currency = 'USD'"),
    ("views", "user_id = 'u' & variant = 'a'"),
    ("conversions", "user_id = 'u' & variant = 'a' & revenue = 10 & currency = 'USD'"),
    (
        "waiting_conversions",
        "idempotency_key = 'k' & id = '11111111-0000-4000-8000-000000000000' & kind = 'refund' & ref = 'o/1' & entry = '{}'",
    ),
    (
        "webhook_events",
        "id = 'e' & seq = '11111111-0000-4000-8000-000000000000' & body = 'x' & body_hash = sha256('x')",
    ),
    ("usage", "metric = 'api.calls' & day = '2026-01-31' & value = 1"),
    ("recommendations", "price = 10 & currency = 'USD' & confidence = 0.5"),
    (
        "audit_trail",
        "id = '11111111-0000-4000-8000-000000000000' & at = now() & role = 'r' & object = 'tenant' & object_id = '11111111-0000-4000-8000-000000000000' & action = 'changed' & changes = '{}'",
    ),
    ("plan_limits", "plan = 'pro' & metric = 'api.calls'"),
    ("tenant_limits", "metric = 'api.calls'"),
    ("identities", "user_id = 'u' & known_id = 'k' & policy = 'exclude'"),
    ("erasures", "pseudonym = 'p'"),
];

/// Table and constraint; what it refuses.
const REFUSED: &[(&str, &str, &[&str])] = &[
    ("tenants", "name", &["name = ''", "name = '  '", "name = repeat('n', 201)"]),
    (
        "tenants",
        "email",
        &["email = 'nobody'", "email = 'a@b@c'", "email = 'a b@c'", "email = 'a@' || repeat('b', 320)"],
    ),
    ("tenants", "mode", &["mode = 'MANAGED'", "mode = ''"]),
    ("tenants", "plan", &["plan = 'gold'"]),
    ("tenants", "byok_key", &["mode = 'byok'", "mode = 'byok' & paid_api_key = ''"]),
    ("tenants", "salt", &["salt = ''", "salt = repeat('s', 129)"]),
    ("tenants", "holdout", &["holdout = -1", "holdout = 1000001"]),
    ("tenants", "billing_day", &["billing_day = 0", "billing_day = 29"]),
    ("tenants", "metadata", &["metadata = '[]'", "metadata = 'null'"]),
    (
        "experiments",
        "key",
        &["key = ''", "key = '-a'", "key = 'a b'", "key = 'é'", "key = repeat('k', 129)", "key = E'a\\n'"],
    ),
    ("experiments", "name", &["name = ''", "name = repeat('n', 201)"]),
    ("experiments", "status", &["status = 'running'", "status = 'Draft'"]),
    (
        "experiments",
        "currency",
        &["currency = 'usd'", "currency = 'US'", "currency = 'USDT'", "currency = E'USD\\n'"],
    ),
    (
        "experiments",
        "variants",
        &[
            "variants = '{\"name\": \"a\", \"weight\": 1, \"price\": 1}'",
            "variants = (SELECT jsonb_agg(jsonb_build_object('name', n::text, 'weight', 1, 'price', '1')) FROM generate_series(0, 1000) n)",
        ],
    ),
    (
        "experiments",
        "variant_names",
        &[
            "variants = '[1]'",
            "variants = '{}'",
            "variants = 'null'",
            "variants = '[{\"weight\": 1, \"price\": 1}]'",
            "@name = 1",
            "@name = \"\"",
            "@name = \"a\\u0007\"",
            "@name = [\"a\"]",
            "@name = null",
            "variants = '[{\"name\": \"a\", \"weight\": 1, \"price\": 1}, {\"name\": \"a\", \"weight\": 1, \"price\": 2}]'",
            "variants = '[[{\"name\": \"a\", \"weight\": 1, \"price\": 1}]]'",
        ],
    ),
    (
        "experiments",
        "variant_weights",
        &[
            "variants = '[]'",
            "@weight = 0",
            "@weight = -1",
            "@weight = 1.5",
            "@weight = 4294967296",
            "@weight = \"1\"",
            "@weight = [1]",
            "@weight = null",
            "variants = '[{\"name\": \"a\", \"price\": 1}]'",
        ],
    ),
    (
        "experiments",
        "variant_prices",
        &[
            "@price = -1",
            "@price = \"-1\"",
            "@price = \"NaN\"",
            "@price = \"1e3\"",
            "@price = 1000000000000",
            "@price = 0.0000001",
            "@price = \"0.0000001\"",
            "@price = [\"1\"]",
            "@price = null",
            "@price = \"\"",
            "variants = '[{\"name\": \"a\", \"weight\": 1, \"price\": [1, 2]}, {\"name\": \"b\", \"weight\": 1}]'",
        ],
    ),
    (
        "experiments",
        "price_books",
        &[
            "@prices = {\"item\": \"i\", \"currency\": \"USD\", \"price\": \"1\"}",
            "@prices = null",
            "@prices = [null]",
            "@prices = [[{\"item\": \"i\", \"currency\": \"USD\", \"price\": \"1\"}]]",
            "@prices = [{\"item\": \"\", \"currency\": \"USD\", \"price\": \"1\"}]",
            "@prices = [{\"item\": \"i\", \"currency\": \"usd\", \"price\": \"1\"}]",
            "@prices = [{\"item\": \"i\", \"currency\": [\"USD\"], \"price\": \"1\"}]",
            "@prices = [{\"item\": \"i\", \"currency\": \"USD\", \"price\": \"-1\"}]",
            "@prices = [{\"item\": \"i\", \"currency\": \"USD\"}]",
        ],
    ),
    ("experiments", "baseline", &["baseline = 'z'", "baseline = ''"]),
    ("experiments", "winner", &["winner = 'a'", "status = 'completed' & winner = 'z'"]),
    ("experiments", "salt", &["salt = ''", "salt = repeat('s', 129)"]),
    ("experiments", "phase", &["phase = 0"]),
    ("experiments", "traffic", &["traffic = -1", "traffic = 1000001"]),
    (
        "experiments",
        "layer",
        &[
            "layer = 'l'",
            "layer_start = 0 & layer_end = 1",
            "layer = 'l' & layer_start = 0",
            "layer = '' & layer_start = 0 & layer_end = 1",
            "layer = 'l' & layer_start = 5 & layer_end = 5",
            "layer = 'l' & layer_start = -1 & layer_end = 5",
            "layer = 'l' & layer_start = 0 & layer_end = 1000001",
        ],
    ),
    ("experiments", "unit", &["unit = 'session'"]),
    ("experiments", "eligibility", &["eligibility = 'old_customers'"]),
    (
        "experiments",
        "forced",
        &[
            "forced = '[]'",
            "forced = 'null'",
            "forced = '{\"u\": \"z\"}'",
            "forced = '{\"u\": 1}'",
            "forced = '{\"\": \"a\"}'",
            "forced = (SELECT jsonb_object_agg(n::text, 'a') FROM generate_series(1, 1001) n)",
        ],
    ),
    ("experiments", "quote_validity", &["quote_validity = 0", "quote_validity = 315360001"]),
    (
        "experiments",
        "plan",
        &[
            "plan = '[]'",
            "plan = '{\"metric\": \"views\"}'",
            "plan = '{\"window_days\": 0}'",
            "plan = '{\"window_days\": 1.5}'",
            "plan = '{\"window_days\": 70000}'",
            "plan = '{\"window_days\": \"14\"}'",
            "plan = '{\"target_sample_size\": 18446744073709551615}'",
            "plan = '{\"alpha\": 2}'",
            "plan = '{\"alpha\": null}'",
            "plan = '{\"minimum_effect\": 0}'",
        ],
    ),
    ("experiments", "past_phases", &["past_phases = '{}'"]),
    ("experiments", "revision", &["revision = 0"]),
    ("experiments", "metadata", &["metadata = '\"x\"'"]),
    (
        "experiments",
        "dates",
        &[
            "start_date = '2026-01-02' & end_date = '2026-01-01'",
            "start_date = '-infinity'",
            "end_date = 'infinity'",
        ],
    ),
    ("assignments", "user", &["user_id = ''", "user_id = repeat('u', 513)"]),
    ("assignments", "variant", &["variant = ''"]),
    (
        "assignments",
        "price",
        &["price = -0.01", "price = 'NaN'", "price = 'Infinity'", "price = 1e12", "price = 0.1234567"],
    ),
    ("assignments", "currency", &["currency = 'eur'", "currency = ''"]),
    ("assignments", "book", &["book = '{}'"]),
    ("assignments", "phase", &["phase = 0"]),
    ("assignments", "reason", &["reason = 'random'"]),
    ("assignments", "assigned_at", &["assigned_at = 'infinity'"]),
    ("assignments", "valid_until", &["valid_until = 'infinity'", "valid_until = '10000-01-01 00:00:00+00'"]),
    ("assignments", "merged_into", &["merged_into = ''", "merged_into = 'u'"]),
    ("views", "user", &["user_id = ''", "user_id = repeat('ü', 257)"]),
    ("views", "variant", &["variant = ''"]),
    ("views", "phase", &["phase = -1"]),
    ("views", "reason", &["reason = ''"]),
    ("views", "occurred_at", &["occurred_at = 'infinity'", "occurred_at = '-infinity'"]),
    ("views", "metadata", &["metadata = '1'"]),
    ("conversions", "user", &["user_id = ''"]),
    ("conversions", "variant", &["variant = ''"]),
    ("conversions", "phase", &["phase = 0"]),
    ("conversions", "reason", &["reason = 'x'"]),
    ("conversions", "assigned_at", &["assigned_at = '-infinity'"]),
    ("conversions", "kind", &["kind = 'gift'"]),
    (
        "conversions",
        "revenue",
        &[
            "revenue = -1",
            "revenue = 'NaN'",
            "revenue = 'Infinity'",
            "revenue = '-Infinity' & kind = 'refund'",
            "revenue = 1e12",
            "revenue = 0.1234567",
            "kind = 'refund'",
            "kind = 'chargeback'",
            "kind = 'trial_start'",
            "kind = 'renewal' & revenue = -1",
            "kind = 'chargeback_reversal' & revenue = -1",
        ],
    ),
    ("conversions", "currency", &["currency = '$'"]),
    ("conversions", "list_price", &["list_price = -1", "list_price = 'NaN'", "list_price = 0.1234567"]),
    ("conversions", "quantity", &["quantity = 0"]),
    ("conversions", "discount", &["discount = -1", "discount = 'NaN'", "discount = 0.1234567"]),
    ("conversions", "proration", &["proration = 'NaN'", "proration = '-Infinity'", "proration = 0.1234567"]),
    ("conversions", "tax", &["tax = 'NaN'", "tax = 'Infinity'", "tax = 0.1234567"]),
    ("conversions", "item", &["item = ''", "item = repeat('i', 129)"]),
    ("conversions", "flags", &["flags = '{currency,other}'"]),
    (
        "conversions",
        "sale",
        &["id = '11111111-0000-4000-8000-000000000000' & sale_id = '11111111-0000-4000-8000-000000000000'"],
    ),
    ("conversions", "order", &["order_id = ''", "order_id = repeat('o', 256)"]),
    ("conversions", "subscription", &["subscription_id = ''"]),
    ("conversions", "period", &["period = ''"]),
    ("conversions", "idempotency", &["idempotency_key = ''", "idempotency_key = repeat('i', 256)"]),
    ("conversions", "occurred_at", &["occurred_at = 'infinity'"]),
    ("conversions", "metadata", &["metadata = '[]'"]),
    ("waiting_conversions", "kind", &["kind = 'sale'"]),
    ("waiting_conversions", "entry", &["entry = '[]'"]),
    ("identities", "user", &["user_id = ''", "user_id = repeat('u', 513)"]),
    ("identities", "known", &["known_id = ''", "known_id = 'u'", "known_id = repeat('k', 513)"]),
    ("identities", "policy", &["policy = 'last'"]),
    ("identities", "report", &["report = '[]'"]),
    ("erasures", "pseudonym", &["pseudonym = ''", "pseudonym = repeat('p', 513)"]),
    ("erasures", "counts", &["counts = '1'"]),
    ("webhook_events", "id", &["id = ''", "id = repeat('i', 256)"]),
    ("webhook_events", "type", &["type = ''", "type = repeat('t', 256)"]),
    ("webhook_events", "body", &["body = convert_to(repeat('b', 16777217), 'UTF8')"]),
    ("webhook_events", "body_hash", &["body_hash = ''"]),
    ("webhook_events", "received_at", &["received_at = 'infinity'"]),
    ("webhook_events", "status", &["status = 'done' & processed_at = now()"]),
    ("webhook_events", "attempts", &["attempts = -1"]),
    ("webhook_events", "what", &["what = ''", "what = 'An e-mail'", "what = repeat('w', 65)"]),
    ("webhook_events", "idempotency", &["idempotency_key = ''", "idempotency_key = repeat('i', 256)"]),
    ("audit_trail", "object", &["object = 'view'"]),
    ("audit_trail", "action", &["action = 'read'"]),
    ("audit_trail", "changes", &["changes = '[]'"]),
    ("webhook_events", "processed", &["status = 'processed'", "processed_at = now()"]),
    ("usage", "metric", &["metric = ''", "metric = 'Calls'", "metric = '1x'", "metric = repeat('m', 65)"]),
    ("usage", "day", &["day = 'infinity'"]),
    ("usage", "value", &["value = -1", "value = 1000000000001"]),
    ("usage", "idempotency", &["idempotency_key = ''"]),
    ("plan_limits", "plan", &["plan = 'gold'"]),
    ("plan_limits", "metric", &["metric = ''", "metric = 'Calls'"]),
    ("plan_limits", "period", &["period = 'year'"]),
    ("plan_limits", "quota", &["quota = -1"]),
    ("tenant_limits", "metric", &["metric = ''", "metric = 'Calls'"]),
    ("tenant_limits", "period", &["period = 'year'"]),
    ("tenant_limits", "quota", &["quota = -1"]),
    ("recommendations", "price", &["price = -1", "price = 'NaN'", "price = 0.1234567"]),
    ("recommendations", "currency", &["currency = 'usd'"]),
    (
        "recommendations",
        "expected_revenue",
        &["expected_revenue = 'NaN'", "expected_revenue = 1e15", "expected_revenue = 0.1234567"],
    ),
    (
        "recommendations",
        "confidence",
        &["confidence = -0.1", "confidence = 1.1", "confidence = 'NaN'", "confidence = 'Infinity'"],
    ),
    ("recommendations", "objective", &["objective = 'growth'"]),
    ("recommendations", "simulation", &["simulation = '1'"]),
    ("recommendations", "source", &["source = ''", "source = repeat('s', 201)"]),
    ("recommendations", "model_version", &["model_version = ''", "model_version = repeat('v', 201)"]),
    ("recommendations", "inputs_hash", &["inputs_hash = ''", "inputs_hash = repeat('h', 201)"]),
    ("recommendations", "expires_at", &["expires_at = 'infinity'", "expires_at = '10000-01-01 00:00:00+00'"]),
    ("recommendations", "status", &["status = 'Proposed'", "status = 'active'"]),
    (
        "recommendations",
        "rejection_reason",
        &[
            "rejection_reason = 'no'",
            "status = 'approved' & rejection_reason = 'no'",
            "status = 'rejected' & rejection_reason = ''",
            "status = 'rejected' & rejection_reason = repeat('r', 1001)",
        ],
    ),
    (
        "recommendations",
        "follow_up",
        &[
            "follow_up_id = 'eeeeeeee-0000-4000-8000-000000000000'",
            "status = 'expired' & follow_up_id = 'eeeeeeee-0000-4000-8000-000000000000'",
            "status = 'applied' & follow_up_id = 'aaaaaaaa-0000-4000-8000-000000000001'",
        ],
    ),
    (
        "recommendations",
        "observed_revenue",
        &[
            "expected_revenue = 1 & observed_revenue = 1",
            "status = 'approved' & expected_revenue = 1 & observed_revenue = 1",
            "status = 'applied' & observed_revenue = 1",
            "status = 'applied' & expected_revenue = 1 & observed_revenue = 'NaN'",
            "status = 'applied' & expected_revenue = 1 & observed_revenue = -1e15",
            "status = 'applied' & expected_revenue = 1 & observed_revenue = 0.1234567",
        ],
    ),
];

/// Just inside of what is refused.
const ACCEPTED: &[(&str, &[&str])] = &[
    (
        "tenants",
        &[
            "",
            "name = repeat('é', 200)",
            "email = 'Ö+x@b'",
            "mode = 'byok' & paid_api_key = 'k'",
            "plan = 'enterprise'",
        ],
    ),
    (
        "experiments",
        &[
            "",
            "key = 'A_b.c:d/e-9'",
            "key = repeat('k', 128)",
            "status = 'paused'",
            "status = 'active'",
            "currency = 'JPY'",
            "@name = \"é 名\"",
            "@weight = 4294967295",
            "@weight = 1e0",
            "@price = 0",
            "@price = \"999999999999.999999\"",
            "@price = 12.345678",
            "@prices = []",
            "@prices = [{\"item\": \"seat\", \"currency\": \"EUR\", \"price\": \"1.5\"}, {\"item\": \"seat\", \"currency\": \"USD\", \"price\": 2}]",
            "variants = '[{\"name\": \"a\", \"weight\": 0, \"price\": 1}, {\"name\": \"b\", \"weight\": 1, \"price\": \"1\", \"prices\": []}]'",
            "variants = (SELECT jsonb_agg(jsonb_build_object('name', n::text, 'weight', 1, 'price', '1')) FROM generate_series(1, 1000) n)",
            "baseline = 'a'",
            "status = 'completed' & winner = 'a'",
            "start_date = '2026-01-01' & end_date = '2026-01-01'",
            "end_date = '2026-01-01'",
        ],
    ),
    (
        "assignments",
        &["", "price = 0", "price = 999999999999.999999", "user_id = repeat('u', 512)", "reason = 'merged'"],
    ),
    ("views", &["", "reason = 'forced'", "phase = 2"]),
    (
        "conversions",
        &[
            "",
            "revenue = 0",
            "kind = 'refund' & revenue = -1",
            "kind = 'refund' & revenue = 0",
            "kind = 'chargeback' & revenue = -10",
            "kind = 'trial_start' & revenue = 0",
            "kind = 'renewal'",
            "kind = 'chargeback_reversal'",
            "list_price = 12.5 & quantity = 3 & discount = 1",
            "proration = -1 & tax = -2.5",
            "order_id = 'o' & subscription_id = 's' & period = '2026-01'",
            "reason = 'outside' & item = 'seat' & settled = false & flags = '{net,expired}'",
        ],
    ),
    ("waiting_conversions", &[""]),
    ("identities", &["", "policy = 'first_quote_wins'"]),
    ("erasures", &[""]),
    (
        "webhook_events",
        &[
            "",
            "id = repeat('i', 255) & type = repeat('t', 255) & body = ''",
            "status = 'failed' & what = 'data.amount' & attempts = 1 & processed_at = now()",
            "status = 'processed' & idempotency_key = 'k' & processed_at = now()",
        ],
    ),
    ("usage", &["", "value = 0", "value = 1000000000000"]),
    ("plan_limits", &["", "quota = 0 & period = 'ever'", "period = 'day'"]),
    ("tenant_limits", &["", "quota = 0 & period = 'ever'", "period = 'day'"]),
    (
        "recommendations",
        &[
            "",
            "confidence = 0",
            "confidence = 1",
            "expected_revenue = -5",
            "objective = 'market_share'",
            "simulation = '[]'",
            "source = repeat('é', 200) & model_version = '1' & inputs_hash = 'sha256:0' & expires_at = '2026-01-31'",
            "status = 'rejected' & rejection_reason = repeat('r', 1000)",
            "status = 'rejected'",
            "status = 'applied' & expected_revenue = 1 & observed_revenue = -5",
        ],
    ),
    (
        "audit_trail",
        &["", "object = 'recommendation' & action = 'created'", "object = 'experiment' & action = 'deleted'"],
    ),
];

/// An insert of the good row, but for some columns. `@member = …` changes one member of the only variant.
fn insert(table: &str, change: &str) -> String {
    let good = GOOD.iter().find(|(name, _)| *name == table).unwrap().1;
    let mut columns: Vec<(String, String)> = Vec::new();
    if !["tenants", "plan_limits"].contains(&table) {
        columns.push(("tenant_id".into(), format!("'{A}'")));
    }
    if ![
        "tenants",
        "experiments",
        "usage",
        "waiting_conversions",
        "webhook_events",
        "plan_limits",
        "tenant_limits",
        "identities",
        "erasures",
    ]
    .contains(&table)
    {
        columns.push(("experiment_id".into(), format!("'{XA}'")));
    }
    for part in good.split(" & ").chain(change.split(" & ").filter(|part| !part.is_empty())) {
        let (column, value) = part.split_once(" = ").unwrap();
        let (column, value) = match column.strip_prefix('@') {
            None => (column, value.to_owned()),
            Some(member) => {
                let arm = r#"'{"name": "a", "weight": 1, "price": "1"}'::jsonb"#;
                ("variants", format!("jsonb_build_array({arm} || '{{\"{member}\": {value}}}'::jsonb)"))
            }
        };
        columns.retain(|(name, _)| name != column);
        columns.push((column.to_owned(), value));
    }
    let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    format!("INSERT INTO {table} ({}) VALUES ({})", names.join(", "), values.join(", "))
}

#[tokio::test]
async fn every_check_refuses_under_its_name() {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let app = db.connect_app().await.unwrap();
    let insert_by = async |client: &tokio_postgres::Client, table: &str, change: &str| {
        let tenant = if table == "tenants" { C } else { A };
        client.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{tenant}'")).await.unwrap();
        let result = client.batch_execute(&insert(table, change)).await;
        client.batch_execute("ROLLBACK").await.unwrap();
        result
    };
    let attempt = async |table: &str, change: &str| {
        let result = insert_by(&app, table, change).await;
        // What became of a recommendation is not the application's to insert, nor what an experiment was before.
        match result.as_ref().map_err(|e| e.code()) {
            Err(Some(&SqlState::INSUFFICIENT_PRIVILEGE))
                if [
                    "recommendations",
                    "webhook_events",
                    "audit_trail",
                    "plan_limits",
                    "tenant_limits",
                    "identities",
                    "erasures",
                ]
                .contains(&table)
                    || change.starts_with("past_phases") =>
            {
                insert_by(&owner, table, change).await
            }
            _ => result,
        }
    };

    let version = version_num(&owner).await;
    let mut tried = BTreeSet::new();
    for (table, check, changes) in REFUSED {
        let name = format!("{table}_{check}_check");
        for change in *changes {
            let result = attempt(table, change).await;
            assert!(result.is_err(), "{name} accepts {change}");
            let (code, constraint, message) = refusal(result);
            // Before PostgreSQL 14 a numeric knows no infinity: the type refuses it, and no check is asked.
            if version < 140_000
                && code == SqlState::INVALID_TEXT_REPRESENTATION
                && change.contains("Infinity'")
            {
                continue;
            }
            assert_eq!(constraint, name, "{change}: {message}");
        }
        tried.insert(name);
    }
    for (table, changes) in ACCEPTED {
        for change in *changes {
            attempt(table, change).await.unwrap_or_else(|e| panic!("{table} refuses {change}: {e:?}"));
        }
    }
    let all = rows(
        &owner,
        "SELECT conname FROM pg_constraint WHERE contype = 'c' AND connamespace = 'public'::regnamespace",
    );
    let all: BTreeSet<_> = all.await.unwrap().into_iter().map(|row| row[0].clone().unwrap()).collect();
    assert_eq!(tried, all, "a check that no line above violates, or a line without a check");
}
