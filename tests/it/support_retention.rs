//! Experiments that are over for long, with a history of every kind.

use lastprice::tokio_postgres::types::ToSql;
use lastprice::{AnalysisPlan, Currency, ExperimentId, NewExperiment, serde_json};

use crate::support_repo::*;

/// Everything that a result may depend on.
pub(crate) fn demanding_plan() -> AnalysisPlan {
    AnalysisPlan::default()
        .window_days(7)
        .exchange_rate(Currency::EUR, "1.25".parse().unwrap())
        .winsorise_at(0.95)
}

/// Active since a year; `users` of them assigned in the first 20 days, in two phases, for every reason; each fifth bought, some paid
/// otherwise, and some got it back. Three views each, and one user with 300.
pub(crate) async fn with_history(two: &TwoTenants, key: &str, users: i32) -> ExperimentId {
    let new = NewExperiment::new(key, key, Currency::USD, three()).baseline("29").plan(demanding_plan());
    let id = two.acme.experiments().create(new).await.unwrap().id;
    let params: [&(dyn ToSql + Sync); 3] = [&two.id.uuid(), &id.uuid(), &users];
    for sql in HISTORY {
        let params = if sql.contains("$3") { &params[..] } else { &params[..2] };
        two.owner.execute(*sql, params).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    id
}

/// Completed so many days ago.
pub(crate) async fn completed(two: &TwoTenants, id: ExperimentId, days: i32) {
    let sql = "UPDATE experiments SET status = 'completed', end_date = now() - make_interval(days => $3)
               WHERE tenant_id = $1 AND id = $2";
    two.owner.execute(sql, &[&two.id.uuid(), &id.uuid(), &days]).await.unwrap();
}

/// All that is said of an experiment, to the last digit.
pub(crate) async fn told(two: &TwoTenants, id: ExperimentId) -> String {
    let metrics = two.acme.metrics();
    let mut report = serde_json::to_value(metrics.report(id).await.unwrap()).unwrap();
    report["results"].as_object_mut().unwrap().remove("as_of").unwrap();
    let from = today() - lastprice::chrono::Days::new(380);
    let days = metrics.by_day(id, from, today()).await.unwrap();
    let variants = metrics.by_variant(id).await.unwrap();
    format!("{}\n{variants:#?}\n{days:#?}", serde_json::to_string_pretty(&report).unwrap())
}

const HISTORY: &[&str] = &[
    "UPDATE experiments SET status = 'active', start_date = now() - interval '365 days' WHERE tenant_id = $1 AND id = $2",
    "UPDATE experiments SET phase = 2, variants = jsonb_set(variants, '{0,weight}', '3') WHERE tenant_id = $1 AND id = $2",
    "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, phase, reason, assigned_at)
     SELECT $1, $2, 'user-' || n, v, v::numeric, 'USD', 1 + (n % 3 = 0)::int,
            CASE WHEN n % 11 = 0 THEN (ARRAY['forced', 'late', 'grandfathered', 'imported'])[1 + n % 4] ELSE 'randomised' END,
            now() - interval '360 days' + make_interval(days => n % 20, secs => n)
     FROM generate_series(1, $3::int) n, LATERAL (SELECT (ARRAY['19', '29', '29', '39'])[1 + n % 4] AS v) v",
    "INSERT INTO views (tenant_id, experiment_id, user_id, variant, phase, reason, occurred_at)
     SELECT a.tenant_id, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, a.assigned_at + make_interval(hours => n)
     FROM assignments a, generate_series(1, CASE a.user_id WHEN 'user-7' THEN 300 ELSE 3 END) n
     WHERE a.tenant_id = $1 AND a.experiment_id = $2",
    "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, phase, reason, assigned_at, revenue, currency, list_price,
                              quote_mismatch, order_id, subscription_id, idempotency_key, occurred_at)
     SELECT a.tenant_id, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, a.assigned_at,
            CASE WHEN n % 25 = 0 THEN a.price - 0.333333 ELSE a.price END, CASE WHEN n % 35 = 0 THEN 'EUR' ELSE 'USD' END, a.price,
            n % 25 = 0, 'order-' || n || '/' || a.experiment_id, 'sub-' || n || '/' || a.experiment_id, 'sale-' || n || '/' || a.experiment_id,
            a.assigned_at + make_interval(days => n % 9)
     FROM assignments a, LATERAL (SELECT substr(a.user_id, 6)::int AS n) n
     WHERE a.tenant_id = $1 AND a.experiment_id = $2 AND n % 5 = 0",
    "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, kind, revenue, currency, order_id, idempotency_key, occurred_at)
     SELECT c.tenant_id, c.experiment_id, c.user_id, c.variant, 'refund', round(-c.revenue / 4, 2), c.currency, c.order_id, 'back-' || c.idempotency_key,
            c.occurred_at + interval '1 hour'
     FROM conversions c WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.revenue = 29",
];
