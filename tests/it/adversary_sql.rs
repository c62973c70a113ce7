//! The attacker runs SQL of its own, bound to its own tenant, as a host's mistake could: nothing of the other's is seen or
//! passed to its functions, and nothing that was left over from the other's transaction gives it away.

use lastprice_testkit::TestDatabase;
use tokio_postgres::{Client, NoTls};

use crate::support_sql::*;

/// Read by every tenant as its own; what is only by the tenant bound would be seen if the database gave it away.
const READ: [&str; 14] = [
    "experiments",
    "assignments",
    "views",
    "conversions",
    "usage",
    "recommendations",
    "waiting_conversions",
    "metric_totals",
    "metric_deltas",
    "tenant_experiment_metrics",
    "tenant_variant_metrics",
    "usage_totals",
    "tenant_limits",
    "tenant_usage",
];

/// A is the victim, and has three rows where B has one.
async fn database() -> (TestDatabase, Client, Client) {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let app = db.connect_app().await.unwrap();
    for (tenant, x, users) in [(A, XA, ["secret-1", "secret-2", "secret-3"].as_slice()), (B, XB, &["own"])] {
        for user in users {
            let sql = format!(
                "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');
                 INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', '{user}', 'a');
                 INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');
                 INSERT INTO usage (tenant_id, metric, day, value) VALUES ('{tenant}', 'calls', '2026-01-01', 7);
                 INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry) VALUES ('{tenant}', '{user}', gen_random_uuid(), 'refund', 'o/{user}', '{{}}');
                 INSERT INTO recommendations (tenant_id, experiment_id, price, currency, confidence) VALUES ('{tenant}', '{x}', 11, 'USD', 0.5)"
            );
            as_tenant(&app, tenant, &sql).await.unwrap();
        }
        if tenant == A {
            owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
        }
    }
    owner.batch_execute("INSERT INTO tenant_limits SELECT id, 'calls', 'day', 7 FROM tenants").await.unwrap();
    owner.batch_execute("SELECT refresh_experiment_metrics(); ANALYZE").await.unwrap();
    for (tenant, x) in [(A, XA), (B, XB)] {
        let sql = format!(
            "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', 'pending', 'a')"
        );
        as_tenant(&app, tenant, &sql).await.unwrap();
    }
    (db, owner, app)
}

/// Everything that is read, bound to B, without a word of ours about whose it should be.
async fn what_b_reads(app: &Client) -> String {
    let mut all = String::new();
    for table in READ.into_iter().chain(["tenants"]) {
        let found = as_tenant(app, B, &format!("SELECT x::text FROM {table} x ORDER BY 1")).await.unwrap();
        assert!(!found.is_empty(), "{table}: B has something in it");
        all += &found.concat().into_iter().flatten().collect::<Vec<_>>().join("\n");
    }
    all
}

fn shows_a(text: &str) -> bool {
    text.contains(A) || text.contains(XA) || text.contains("secret")
}

#[tokio::test]
async fn nothing_is_read_of_another() {
    let (_db, owner, app) = database().await;
    assert!(!shows_a(&what_b_reads(&app).await));
    // And the check can fail: one policy more, and it does.
    for table in ["conversions", "experiments", "metric_totals"] {
        owner.batch_execute(&format!("CREATE POLICY hole ON {table} USING (true)")).await.unwrap();
        assert!(shows_a(&what_b_reads(&app).await), "{table}: a hole is not noticed");
        owner.batch_execute(&format!("DROP POLICY hole ON {table}")).await.unwrap();
        assert!(!shows_a(&what_b_reads(&app).await));
        owner.batch_execute(&format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")).await.unwrap();
        assert!(shows_a(&what_b_reads(&app).await), "{table}: no policy is not noticed");
        owner.batch_execute(&format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")).await.unwrap();
    }
}

/// A function in a condition is asked about one's own rows only, though it is as cheap as can be.
#[tokio::test]
async fn functions_in_conditions_see_ones_own_rows() {
    let (db, _, _) = database().await;
    let (app, mut notices) = hearing(&db.app_url()).await;
    let leak = "CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001
                AS $$ BEGIN RAISE NOTICE 'leaked %', $1; RETURN true; END $$";
    app.batch_execute(leak).await.unwrap();
    for table in READ.into_iter().chain(["tenants"]) {
        let seen = as_tenant(&app, B, &format!("SELECT 1 FROM {table} x WHERE pg_temp.leak(x::text)")).await;
        assert!(!seen.unwrap().is_empty(), "{table}");
        let mut heard = Vec::new();
        while let Ok(notice) = notices.try_recv() {
            heard.push(notice);
        }
        assert!(!heard.is_empty(), "{table}: it was not asked at all");
        assert!(!heard.iter().any(|notice| shows_a(notice)), "{table}: {heard:?}");
    }
}

/// A connection, and what the server says on it besides.
async fn hearing(url: &str) -> (Client, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            let _ = match message {
                tokio_postgres::AsyncMessage::Notice(notice) => sender.send(notice.message().to_owned()),
                tokio_postgres::AsyncMessage::Notification(n) => sender.send(n.payload().to_owned()),
                _ => Ok(()),
            };
        }
    });
    (client, receiver)
}

#[tokio::test]
async fn what_is_left_of_anothers_transaction_is_bound_anew() {
    let (_db, _, app) = database().await;
    // Planned for A, and run for B.
    let prepared = app.prepare("SELECT user_id FROM assignments ORDER BY 1").await.unwrap();
    let run = async |tenant: &str| {
        app.batch_execute(&format!(
            "BEGIN; SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL app.tenant_id = '{tenant}'"
        ))
        .await
        .unwrap();
        let found = app.query(&prepared, &[]).await.unwrap();
        app.batch_execute("COMMIT").await.unwrap();
        found.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    for _ in 0..8 {
        assert_eq!(run(A).await, ["secret-1", "secret-2", "secret-3"]);
        assert_eq!(run(B).await, ["own"]);
    }
    as_tenant(&app, A, "PREPARE of_a AS SELECT user_id FROM assignments").await.unwrap();
    assert_eq!(as_tenant(&app, B, "EXECUTE of_a").await.unwrap(), [[Some("own".to_owned())]]);
    assert!(rows(&app, "EXECUTE of_a").await.unwrap().is_empty(), "unbound");

    // A cursor of a transaction ends with it.
    as_tenant(&app, A, "DECLARE c CURSOR FOR SELECT user_id FROM assignments").await.unwrap();
    assert!(as_tenant(&app, B, "FETCH ALL FROM c").await.is_err());

    // No savepoint brings back another tenant: it brings back what was bound then.
    app.batch_execute(&format!("BEGIN; SAVEPOINT s; SET LOCAL app.tenant_id = '{A}'")).await.unwrap();
    app.batch_execute("ROLLBACK TO SAVEPOINT s").await.unwrap();
    assert!(rows(&app, "SELECT FROM assignments").await.unwrap().is_empty());
    app.batch_execute(&format!("SET LOCAL app.tenant_id = '{B}'; SAVEPOINT t; RELEASE SAVEPOINT t"))
        .await
        .unwrap();
    assert_eq!(rows(&app, "SELECT user_id FROM assignments").await.unwrap(), [[Some("own".to_owned())]]);
    app.batch_execute("ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn a_binding_is_not_changed_by_our_function() {
    let (_db, _, app) = database().await;
    for (first, then) in [(B, A), (A, B)] {
        app.batch_execute(&format!("BEGIN; SELECT app_set_tenant('{first}'); SAVEPOINT s")).await.unwrap();
        let again = rows(&app, &format!("SELECT app_set_tenant('{then}')")).await;
        let (_, _, message) = refusal(again);
        assert!(!message.contains(A) && !message.contains(B), "{message}");
        app.batch_execute("ROLLBACK TO SAVEPOINT s").await.unwrap();
        assert_eq!(value(&rows(&app, "SELECT app_tenant_id()").await.unwrap()), first);
        app.batch_execute("ROLLBACK").await.unwrap();
    }
}

#[tokio::test]
async fn roles_copies_and_plans_give_nothing_away() {
    let (_db, _, app) = database().await;
    for role in ["lastprice_owner", "postgres"] {
        assert!(as_tenant(&app, B, &format!("SET LOCAL ROLE {role}")).await.is_err(), "{role}");
        assert!(as_tenant(&app, B, &format!("SET SESSION AUTHORIZATION {role}")).await.is_err(), "{role}");
    }
    for role in ["SET LOCAL ROLE lastprice_app", "RESET ROLE", "SET LOCAL row_security = on"] {
        let found = as_tenant(&app, B, &format!("{role}; SELECT user_id FROM assignments")).await.unwrap();
        assert_eq!(found, [[Some("own".to_owned())]], "{role}");
    }
    let off = as_tenant(&app, B, "SET LOCAL row_security = off; SELECT user_id FROM assignments").await;
    assert!(refusal(off).2.contains("row-level security"), "an error, and no rows");

    for table in READ.into_iter().chain(["tenants"]) {
        let explain = format!("EXPLAIN (ANALYZE, COSTS off, TIMING off, SUMMARY off) SELECT * FROM {table}");
        let plan = as_tenant(&app, B, &explain).await;
        let plan = plan.unwrap().concat().into_iter().flatten().collect::<Vec<_>>().join("\n");
        assert!(!plan.contains(A) && !plan.contains("secret"), "{table}: {plan}");
        // What stands in the columns is shown to whom row-level security does not bind.
        let stats = format!("SELECT FROM pg_stats WHERE schemaname = 'public' AND tablename = '{table}'");
        assert!(as_tenant(&app, B, &stats).await.unwrap().is_empty(), "{table}");
    }
    assert!(as_tenant(&app, B, "SELECT FROM pg_statistic").await.is_err());
    // COPY FROM is refused under row-level security, and COPY TO writes one's own rows.
    let out = async |table: &str| {
        use futures_util::TryStreamExt;
        app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{B}'")).await.unwrap();
        let stream = app.copy_out(&format!("COPY {table} TO STDOUT")).await.unwrap();
        let bytes: Vec<_> = stream.try_collect().await.unwrap();
        app.batch_execute("COMMIT").await.unwrap();
        String::from_utf8(bytes.concat()).unwrap()
    };
    for table in &READ[..9] {
        let copied = out(table).await;
        assert!(copied.contains(B) && !shows_a(&copied), "{table}: {copied}");
    }
}

/// What would show a row's values names one's own: those of the statement, never of what it met.
#[tokio::test]
async fn refusals_quote_nothing_of_another() {
    let (_db, _, app) = database().await;
    for sql in [
        format!(
            "INSERT INTO experiments (tenant_id, id, key, name, variants) VALUES ('{A}', '{XA}', 'x', 'X', '{ARMS}')"
        ),
        format!(
            "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{B}', '{XA}', 'own', 'a')"
        ),
        format!(
            "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency) VALUES ('{A}', '{XA}', 'guessed', 'a', 10, 'USD')"
        ),
        format!("UPDATE recommendations SET follow_up_id = '{XA}'"),
        format!("UPDATE experiments SET tenant_id = '{A}'"),
        "INSERT INTO tenants (id, name, email) VALUES (gen_random_uuid(), 'X', 'a@example.com')".to_owned(),
        "SELECT (user_id || 'x')::int FROM assignments".to_owned(),
    ] {
        let error = as_tenant(&app, B, &sql).await.expect_err(&sql);
        let db = error.as_db_error().unwrap();
        let said = format!("{} {:?} {:?} {:?}", db.message(), db.detail(), db.hint(), db.where_());
        assert!(
            !said.contains("secret") && !said.contains("X of A") && !said.contains("a@example.com"),
            "{sql}: {said}"
        );
    }
}

/// Tables and functions of one's own by our names are not what our functions meet.
#[tokio::test]
async fn names_in_front_of_ours_deceive_nobody() {
    let (_db, owner, app) = database().await;
    let shadows = "
        CREATE TEMP TABLE experiments (tenant_id uuid, id uuid, salt text, variants jsonb, status text, phase int, currency text);
        CREATE TEMP TABLE metric_deltas (tenant_id uuid, experiment_id uuid);
        CREATE TEMP TABLE metric_totals (tenant_id uuid, experiment_id uuid);
        CREATE TEMP TABLE tenants (id uuid, salt text);
        CREATE FUNCTION pg_temp.app_tenant_id() RETURNS uuid LANGUAGE sql AS $$ SELECT 'SOMEBODY'::uuid $$;
        CREATE FUNCTION pg_temp.fold_metric_deltas(uuid) RETURNS bigint LANGUAGE sql AS $$ SELECT 666::bigint $$;
        SET search_path = pg_temp, public";
    app.batch_execute(&shadows.replace("SOMEBODY", A)).await.unwrap();
    let pending = format!("SELECT count(*) FROM metric_deltas WHERE tenant_id = '{A}'");
    let before = rows(&owner, &pending).await.unwrap();
    assert_ne!(value(&before), "0");
    let folded = as_tenant(&app, B, "SELECT public.fold_experiment_metrics()").await.unwrap();
    assert_eq!(value(&folded), "1", "its own");
    assert_eq!(rows(&owner, &pending).await.unwrap(), before, "and not A's");
    let view = format!(
        "INSERT INTO public.views (tenant_id, experiment_id, user_id, variant) VALUES ('{B}', '{XB}', 'own', 'a')"
    );
    as_tenant(&app, B, &view).await.unwrap();
    let counted = format!("SELECT count(*) FROM metric_deltas WHERE tenant_id = '{B}'");
    assert_eq!(value(&rows(&owner, &counted).await.unwrap()), "1", "counted in our table");
    let seen = as_tenant(&app, B, "SELECT user_id FROM public.assignments").await.unwrap();
    assert_eq!(seen, [[Some("own".to_owned())]], "the policy is ours");
    for view in ["tenant_experiment_metrics", "tenant_variant_metrics"] {
        let seen =
            as_tenant(&app, B, &format!("SELECT DISTINCT tenant_id FROM public.{view}")).await.unwrap();
        assert_eq!(seen, [[Some(B.to_owned())]], "{view}");
    }
    assert_exact(&owner, "after the deception").await;
}

#[tokio::test]
async fn notifications_say_nothing_of_whom_they_are() {
    let (db, _, app) = database().await;
    let (listener, mut heard) = hearing(&db.app_url()).await;
    listener.batch_execute("LISTEN lastprice").await.unwrap();
    as_tenant(&app, A, "UPDATE experiments SET status = 'paused'").await.unwrap();
    let payload =
        tokio::time::timeout(std::time::Duration::from_secs(30), heard.recv()).await.unwrap().unwrap();
    assert!(payload.len() == 64 && payload.bytes().all(|b| b.is_ascii_hexdigit()), "{payload}");
    for name in [A, XA] {
        let hash = format!("SELECT encode(sha256(convert_to('lastprice/{name}', 'UTF8')), 'hex')");
        assert_ne!(value(&rows(&app, &hash).await.unwrap()), payload, "no hash of what can be guessed");
    }
}
