//! The metrics stay exact whatever happens at once, and writers do not get in each other's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lastprice_testkit::TestDatabase;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::support_sql::*;

/// The experiments of a tenant, `n` of them, all active.
async fn experiments(owner: &Client, tenant: &str, n: u32) -> Vec<String> {
    let sql = format!(
        "INSERT INTO experiments (tenant_id, key, name, status, variants)
         SELECT '{tenant}', 'e' || n, 'N', 'active', '{ARMS}' FROM generate_series(1, {n}) n RETURNING id"
    );
    rows(owner, &sql).await.unwrap().into_iter().map(|row| row[0].clone().unwrap()).collect()
}

/// A batch for some experiment: with duplicates, within it and with others.
fn batch(random: &mut Random, tenant: &str, experiments: &[String]) -> String {
    let x = &experiments[random.below(experiments.len() as u64) as usize];
    let variant = random.one_of(&["a", "b"]);
    let reason = random.one_of(&["randomised", "forced"]);
    let (first, count) = (random.below(60), 1 + random.below(12));
    let series = format!("generate_series({first}, {first} + {count}) n");
    let at = format!("timestamptz '2026-03-01 22:00Z' + n * interval '{} min'", random.below(40));
    match random.below(3) {
        0 => format!(
            "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason, assigned_at)
             SELECT '{tenant}', '{x}', 'u' || n, '{variant}', 10, 'USD', '{reason}', {at} FROM {series} ON CONFLICT DO NOTHING"
        ),
        1 => format!(
            "INSERT INTO views (tenant_id, id, experiment_id, user_id, variant, reason, occurred_at)
             SELECT '{tenant}', md5('{x}' || n % 7)::uuid, '{x}', 'u' || n, '{variant}', '{reason}', {at} FROM {series}
             ORDER BY 2 ON CONFLICT DO NOTHING"
        ),
        _ => {
            let (kind, amount) = random.one_of(&[&("sale", 5), &("renewal", 3), &("refund", -2), &("trial_start", 0)]);
            let currency = random.one_of(&["USD", "EUR"]);
            let key = if random.below(2) == 0 { format!("'{kind}-' || n") } else { "gen_random_uuid()::text".to_owned() };
            format!(
                "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, reason, kind, revenue, currency, idempotency_key, occurred_at)
                 SELECT '{tenant}', '{x}', 'u' || n, '{variant}', '{reason}', '{kind}', {amount} * 1.25, '{currency}', {key}, {at}
                 FROM {series} ORDER BY 9 ON CONFLICT (tenant_id, idempotency_key) DO NOTHING"
            )
        }
    }
}

/// A transaction of a service: batches, savepoints taken back, folds; and a rollback now and then.
fn transaction(random: &mut Random, tenant: &str, experiments: &[String]) -> String {
    let mut sql = format!("BEGIN; SELECT app_set_tenant('{tenant}');");
    for _ in 0..1 + random.below(3) {
        let batch = batch(random, tenant, experiments);
        sql += &match random.below(6) {
            0 => format!("SAVEPOINT s; {batch}; ROLLBACK TO s;"),
            1 => format!("SAVEPOINT s; {batch}; RELEASE s;"),
            2 => format!("{batch}; SELECT fold_experiment_metrics();"),
            _ => format!("{batch};"),
        };
    }
    sql + if random.below(5) == 0 { "ROLLBACK" } else { "COMMIT" }
}

/// What the owner does to events and metrics.
fn of_the_owner(random: &mut Random) -> String {
    let table = random.one_of(&["views", "assignments", "conversions"]);
    let user = format!("user_id = 'u{}'", random.below(70));
    match random.below(12) {
        0..3 => format!("UPDATE {table} SET variant = 'b', phase = phase % 2 + 1 WHERE {user}"),
        3 => format!(
            "BEGIN; UPDATE {table} SET reason = 'merged' WHERE {user}; DELETE FROM {table} WHERE {user}; ROLLBACK"
        ),
        4 => format!("UPDATE conversions SET revenue = revenue * 2, currency = 'USD' WHERE {user}"),
        5..8 => format!("DELETE FROM {table} WHERE {user}"),
        8 => "SELECT refresh_experiment_metrics()".to_owned(),
        9 => "SELECT recount_experiment_metrics()".to_owned(),
        _ => "SELECT fold_metric_deltas(NULL)".to_owned(),
    }
}

/// Errors that come of what the test does: rows deleted under a writer, and rows locked in different orders by
/// plain updates and deletes.
fn is_of_the_test(error: &tokio_postgres::Error) -> bool {
    [SqlState::FOREIGN_KEY_VIOLATION, SqlState::T_R_DEADLOCK_DETECTED]
        .iter()
        .any(|code| error.code() == Some(code))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_at_once() {
    let seed = Random::seed();
    eprintln!("LASTPRICE_SEED={seed}"); // shown if the test fails
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let superuser = db.connect_superuser().await.unwrap();
    for round in 0..3_u64 {
        let mut tasks = JoinSet::new();
        for (t, tenant) in [A, B].into_iter().enumerate() {
            let ids = experiments(&owner, tenant, 4).await;
            for w in 0..4 {
                let (db, ids, mut random) =
                    (db.clone(), ids.clone(), Random(seed ^ (round * 100 + t as u64 * 10 + w)));
                tasks.spawn(async move {
                    let app = db.connect_app().await.unwrap();
                    for _ in 0..25 {
                        if let Err(error) = app.batch_execute(&transaction(&mut random, tenant, &ids)).await {
                            assert!(is_of_the_test(&error), "{error:?}");
                            app.batch_execute("ROLLBACK").await.unwrap();
                        }
                    }
                });
            }
            // One experiment goes while it is written to, and comes back empty.
            let (db, doomed) = (db.clone(), ids[0].clone());
            tasks.spawn(async move {
                let owner = db.connect_owner().await.unwrap();
                for _ in 0..4 {
                    tokio::time::sleep(std::time::Duration::from_millis(60)).await;
                    let again = format!(
                        "DELETE FROM experiments WHERE id = '{doomed}';
                         INSERT INTO experiments (tenant_id, id, key, name, status, variants) VALUES ('{tenant}', '{doomed}', 'e1', 'N', 'active', '{ARMS}')"
                    );
                    if let Err(error) = owner.batch_execute(&again).await {
                        assert!(is_of_the_test(&error), "{error:?}");
                    }
                }
            });
        }
        let (owners, mut random) = (db.clone(), Random(seed ^ (round * 100 + 99)));
        tasks.spawn(async move {
            let owner = owners.connect_owner().await.unwrap();
            for _ in 0..60 {
                let sql = of_the_owner(&mut random);
                if let Err(error) = owner.batch_execute(&sql).await {
                    assert!(is_of_the_test(&error), "{sql}: {error:?}");
                    owner.batch_execute("ROLLBACK").await.unwrap();
                }
            }
        });
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert_exact(&superuser, &format!("round {round}")).await;
        let counted = value(&rows(&superuser, "SELECT count(*) FROM metric_totals").await.unwrap())
            .parse::<u32>()
            .unwrap();
        assert!(counted > 20, "{counted} totals: nothing much happened");
        owner.batch_execute("SELECT fold_metric_deltas(NULL)").await.unwrap();
        assert_exact(&superuser, &format!("round {round}, folded")).await;
        // A tenant goes altogether, in the end.
        if round == 2 {
            owner.batch_execute(&format!("DELETE FROM tenants WHERE id = '{A}'")).await.unwrap();
            assert_exact(&superuser, "without a tenant").await;
        }
        owner.batch_execute("DELETE FROM experiments WHERE key LIKE 'e%'").await.unwrap();
        assert_exact(&superuser, &format!("round {round}, deleted")).await;
    }
}

/// Sixteen writers, each with several experiments per transaction, in any order; folds and refreshes all the while.
async fn sixteen_writers(level: &'static str, folding: bool) {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let owner = db.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let ids = [experiments(&owner, A, 5).await, experiments(&owner, B, 5).await];
    let written = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let seed = Random::seed();
    eprintln!("LASTPRICE_SEED={seed}");

    let (background, ended) = (db.clone(), done.clone());
    let refresher = tokio::spawn(async move {
        let owner = background.connect_owner().await.unwrap();
        let mut folded = 0;
        while !ended.load(Ordering::Relaxed) {
            for sql in [
                "SELECT fold_metric_deltas(NULL)",
                "SELECT refresh_experiment_metrics()",
                "SELECT recount_experiment_metrics()",
            ] {
                folded += value(&rows(&owner, sql).await.unwrap()).parse::<u64>().unwrap_or(0);
            }
        }
        folded
    });
    let mut writers = JoinSet::new();
    for w in 0..16_usize {
        let (db, tenant, ids, written) = (db.clone(), [A, B][w % 2], ids[w % 2].clone(), written.clone());
        writers.spawn(async move {
            let app = db.connect_app().await.unwrap();
            let mut random = Random(seed ^ w as u64);
            for t in 0..12 {
                let mut sql = format!("BEGIN ISOLATION LEVEL {level}; SELECT app_set_tenant('{tenant}');");
                for _ in 0..4 {
                    let x = &ids[random.below(5) as usize];
                    let user = format!("w{w}-{t}-{}", random.below(1 << 40)); // distinct: nobody waits for a key
                    sql += &format!(
                        "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');
                         INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{tenant}', '{x}', '{user}', 'a');
                         INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency) VALUES ('{tenant}', '{x}', '{user}', 'a', 10, 'USD');"
                    );
                    if folding && random.below(3) == 0 {
                        sql += "SELECT fold_experiment_metrics();";
                    }
                }
                app.batch_execute(&(sql + "COMMIT")).await.unwrap_or_else(|e| panic!("{level}: {e:?}"));
                written.fetch_add(4, Ordering::Relaxed);
            }
        });
    }
    while let Some(result) = writers.join_next().await {
        result.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    assert!(refresher.await.unwrap() > 0, "the background did nothing");
    let superuser = db.connect_superuser().await.unwrap();
    assert_exact(&superuser, level).await;
    owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    let counted = rows(
        &owner,
        "SELECT sum(assignments), sum(views), sum(conversions), sum(revenue) FROM experiment_metrics",
    );
    let n = written.load(Ordering::Relaxed);
    assert_eq!(n, 16 * 12 * 4);
    assert_eq!(counted.await.unwrap(), [[n, n, n, n * 10].map(|n| Some(n.to_string()))]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_writers_who_fold() {
    sixteen_writers("READ COMMITTED", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_writers_with_old_snapshots() {
    sixteen_writers("REPEATABLE READ", false).await;
}
