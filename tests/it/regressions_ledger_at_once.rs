//! What the ledger once got wrong when several were at it.

use std::time::Duration;

use lastprice::tokio_postgres::IsolationLevel;
use lastprice::{ConversionOutcome, Currency, ErrorKind, NewConversion};

use crate::support_ledger::*;
use crate::support_repo::*;

/// Two batches of new users, in many experiments and the other way round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_of_users_without_quotes_do_not_stop_each_other() {
    let two = two_tenants().await;
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(one_price(&two.acme, &format!("x{n}")).await);
    }
    let paused = one_price(&two.acme, "paused").await;
    two.acme.experiments().pause(paused).await.unwrap();
    for round in 0..6 {
        let tasks = (0..8).map(|task| {
            let (client, tenant, ids) = (two.client.clone(), two.id, ids.clone());
            tokio::spawn(async move {
                let mut sales = Vec::new();
                for n in 0..20 {
                    let line = |id, what: &str| {
                        let key = key(&format!("{round} {task} {what} {n}"));
                        NewConversion::sale(id, user(1000 * round + n), usd("29"), key)
                    };
                    // The orders of those inside and outside go the other way round in one of them.
                    let (a, b) = match task {
                        0 => (100 + n, n),
                        1 => (n, 100 + n),
                        _ => (1000 * task + n, 1000 * task + 100 + n),
                    };
                    sales.push(line(ids[(n + task) % 6], "in").order(order(&format!("{round} {a}"))));
                    sales.push(line(paused, "out").order(order(&format!("{round} {b}"))));
                }
                client.tenant(tenant).conversions().settle_many(&sales).await
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            for outcome in task.await.unwrap().unwrap() {
                assert!(matches!(outcome, ConversionOutcome::Recorded(_)), "{outcome:?}");
            }
        }
    }
    assert_eq!(two.count("conversions").await, 6 * 8 * 40);
    two.bystander_saw_nothing().await;
}

/// A refresh leaves alone what still belongs to nothing: it waits for no host's transaction, and takes no lock that one
/// waits for.
#[tokio::test]
async fn a_refresh_waits_for_nobody() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let ledger = two.acme.conversions();
    for k in ["a", "b"] {
        assert_eq!(ledger.settle(&refund("o1", "5", k)).await.unwrap(), ConversionOutcome::Waiting);
    }
    let waiting =
        "SELECT string_agg(w::text || xmin::text, ',' ORDER BY idempotency_key) FROM waiting_conversions w";
    let before: String = two.owner.query_one(waiting, &[]).await.unwrap().get(0);
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = two.client.within(&transaction, two.id);
    assert_eq!(
        within.conversions().settle(&refund("o1", "5", "c")).await.unwrap(),
        ConversionOutcome::Waiting
    );
    drop(within);
    two.owner
        .batch_execute("SET lock_timeout = '2s'; SELECT refresh_experiment_metrics(); RESET lock_timeout")
        .await
        .unwrap();
    assert_eq!(two.owner.query_one(waiting, &[]).await.unwrap().get::<_, String>(0), before);
    transaction.rollback().await.unwrap();

    // And takes in what two transactions with older snapshots did not see of each other.
    let transaction = repeatable(&mut host).await;
    assert_eq!(ledger.settle(&refund("o2", "5", "d")).await.unwrap(), ConversionOutcome::Waiting);
    let within = two.client.within(&transaction, two.id);
    let sale = NewConversion::sale(id, user(1), usd("29"), key("sale")).order(order("o2"));
    within.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
    drop(within);
    transaction.commit().await.unwrap();
    assert_eq!(net(&two, id, Currency::USD).await, usd("29"));
    two.owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    assert_eq!(net(&two, id, Currency::USD).await, usd("24"));
    assert_eq!(two.count("waiting_conversions").await, 2);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_draft_is_not_deleted_under_a_sale() {
    let two = two_tenants().await;
    let id = draft(&two.acme, "x").await.id;
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = two.client.within(&transaction, two.id);
    let sale = NewConversion::sale(id, user(1), usd("29"), key("sale"));
    within.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
    drop(within);
    let deletes = {
        let (client, tenant) = (two.client.clone(), two.id);
        tokio::spawn(async move { client.tenant(tenant).experiments().delete_draft(id).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    transaction.commit().await.unwrap();
    is_kind(deletes.await.unwrap(), ErrorKind::Conflict);
    assert_eq!(two.count("conversions").await, 1, "what was paid is in the ledger");
    // The owner may, and takes the ledger along.
    two.owner.execute("DELETE FROM experiments WHERE id = $1", &[&id.uuid()]).await.unwrap();
    assert_eq!(two.count("conversions").await, 0);
    two.bystander_saw_nothing().await;
}

/// Hosts that roll back, wholly or to a savepoint, under any isolation, while webhooks deliver the same entries.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_roll_back_leave_nothing_behind() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let entries = move |n: usize| {
        let (o, s) = (format!("o{n}"), format!("s{n}"));
        let sale = NewConversion::sale(id, user(n), usd("29"), key(&format!("sale {n}")));
        let sale = sale.order(order(&o)).subscription(subscription(&s));
        let paid = renewal(&s, "1", "29", &format!("renewal {n}")).order(order(&format!("r{n}")));
        let won = NewConversion::chargeback_reversal(order(&o), usd("7"), key(&format!("won {n}")));
        let charged = NewConversion::chargeback(order(&o), usd("7"), key(&format!("charged {n}")));
        let of_renewal = refund(&format!("r{n}"), "4", &format!("of renewal {n}"));
        [sale, refund(&o, "5", &format!("back {n}")), paid, won, charged, of_renewal]
    };
    const ORDERS: usize = 30;
    let tasks = (0..8u64).map(|task| {
        let (client, tenant, url) = (two.client.clone(), two.id, two.database.app_url());
        tokio::spawn(async move {
            let mut dice = crate::support::Dice(task);
            let mut host = crate::support_sql::connect(&url).await;
            for _ in 0..60 {
                let entry = entries(dice.below(ORDERS as u64) as usize)[dice.below(6) as usize].clone();
                let other = entries(dice.below(ORDERS as u64) as usize)[dice.below(6) as usize].clone();
                if task % 2 == 0 {
                    client.tenant(tenant).conversions().settle_many(&[entry, other]).await.unwrap();
                    continue;
                }
                let isolation = match dice.below(3) {
                    0 => IsolationLevel::ReadCommitted,
                    1 => IsolationLevel::RepeatableRead,
                    _ => IsolationLevel::Serializable,
                };
                let transaction = host.build_transaction().isolation_level(isolation).start().await.unwrap();
                let within = client.within(&transaction, tenant);
                // A failed one (a deadlock, a serialization failure) is the host's to repeat.
                let mut sound = within.conversions().settle(&entry).await.is_ok();
                if sound && dice.below(2) == 0 {
                    transaction.batch_execute("SAVEPOINT s").await.unwrap();
                    sound = within.conversions().settle(&other).await.is_ok();
                    let end = if dice.below(3) == 0 { "RELEASE s" } else { "ROLLBACK TO s" };
                    if sound || end == "ROLLBACK TO s" {
                        transaction.batch_execute(end).await.unwrap();
                        sound = true;
                    }
                }
                drop(within);
                if sound && dice.below(3) > 0 {
                    let _ = transaction.commit().await;
                } else {
                    transaction.rollback().await.unwrap();
                }
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    crate::support_sql::assert_exact(&two.database.connect_superuser().await.unwrap(), "after the storm")
        .await;
    // In the end, everything is delivered once more.
    let all: Vec<_> = (0..ORDERS).rev().flat_map(entries).collect();
    for outcome in two.acme.conversions().settle_many(&all).await.unwrap() {
        let known = matches!(
            outcome,
            ConversionOutcome::Recorded(_) | ConversionOutcome::Duplicate(_) | ConversionOutcome::Waiting
        );
        assert!(known, "{outcome:?}");
    }
    two.owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    assert_eq!(
        (two.count("conversions").await, two.count("waiting_conversions").await),
        (6 * ORDERS as i64, 0)
    );
    assert_eq!(two.count("ledger_locks").await, 0);
    assert_eq!(
        net(&two, id, Currency::USD).await,
        usd("49").checked_mul(ORDERS as u32).unwrap(),
        "58 - 5 - 4 each"
    );
    let flagged = "SELECT count(*) FROM conversions WHERE flags <> '{}' AND tenant_id = $1";
    assert_eq!(two.owner.query_one(flagged, &[&two.id.uuid()]).await.unwrap().get::<_, i64>(0), 0);
    two.bystander_saw_nothing().await;
}

/// A session's plans are made when it first needs them, and nobody may hold a lock then.
#[tokio::test]
async fn what_is_planned_for_nothing_is_quick_for_much() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let sold = |n: usize| {
        NewConversion::sale(id, user(n), usd("29"), key(&format!("sale {n}"))).order(order(&format!("o{n}")))
    };
    settled(&two.acme, &sold(0)).await;
    superuser.batch_execute("VACUUM ANALYZE ledger_locks").await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    for n in 1..9 {
        let transaction = host.transaction().await.unwrap();
        let within = two.client.within(&transaction, two.id);
        let batch = [
            sold(n),
            refund(&format!("o{n}"), "1", &format!("back {n}")),
            refund("none", "1", &format!("waits {n}")),
        ];
        for outcome in within.conversions().settle_many(&batch).await.unwrap() {
            assert!(
                matches!(outcome, ConversionOutcome::Recorded(_) | ConversionOutcome::Waiting),
                "{outcome:?}"
            );
        }
        drop(within);
        let scans = "SELECT relname::text || ' ' || seq_scan FROM pg_stat_xact_user_tables
                     WHERE relname = 'ledger_locks' AND seq_scan > 0";
        let scans: Vec<String> =
            transaction.query(scans, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
        assert!(scans.is_empty(), "read as a whole: {scans:?}");
        transaction.rollback().await.unwrap();
    }
    two.bystander_saw_nothing().await;
}
