//! Deliveries as webhooks make them: shuffled, repeated, at once. And what a hand that writes SQL can do.

use std::collections::BTreeMap;

use lastprice::rust_decimal::Decimal;
use lastprice::{
    Conversion, ConversionOutcome, Currency, LedgerRule, Money, NewConversion, OrderId, Period,
    SubscriptionId,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support_repo::*;

fn order(n: usize) -> OrderId {
    OrderId::new(format!("order-{n}")).unwrap()
}

/// A shop's thousand events: sales, renewals, refunds, chargebacks, of which some were won back. Made anew by each delivery,
/// as webhooks are.
fn events(id: lastprice::ExperimentId) -> Vec<NewConversion> {
    let mut events = Vec::new();
    for n in 0..300 {
        let subscription = SubscriptionId::new(format!("sub-{n}")).unwrap();
        let sale = NewConversion::sale(id, user(n), usd("29"), key(&format!("sale {n}"))).order(order(n));
        events.push(if n % 2 == 0 { sale.subscription(subscription.clone()) } else { sale });
        if n % 2 == 0 {
            for month in 0..3 {
                let k = key(&format!("renewal {n} {month}"));
                let renewal = NewConversion::renewal(
                    subscription.clone(),
                    Period::new(format!("{month}")).unwrap(),
                    usd("29"),
                    k,
                );
                events.push(renewal.order(order(1000 + n * 3 + month)));
            }
        }
        match n % 6 {
            0 => {
                events.push(NewConversion::refund(order(1000 + n * 3), usd("10"), key(&format!("back {n}"))))
            }
            1 => {
                events.push(NewConversion::refund(order(n), usd("9"), key(&format!("back {n}"))));
                events.push(NewConversion::refund(order(n), usd("20"), key(&format!("all {n}"))));
            }
            3 => {
                events.push(NewConversion::chargeback(order(n), usd("29"), key(&format!("bank {n}"))));
                events.push(NewConversion::chargeback_reversal(
                    order(n),
                    usd("29"),
                    key(&format!("won {n}")),
                ));
            }
            _ => {}
        }
    }
    assert_eq!(events.len(), 1000);
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_deliveries_in_any_order_give_one_net_revenue() {
    let two = two_tenants().await;
    let mut nets = Vec::new();
    for seed in 0..2u64 {
        let experiment = active(&two.acme, &format!("x{seed}")).await.id;
        // Every run is a tenant's own world of keys.
        let owner = &two.owner;
        owner.execute("DELETE FROM conversions WHERE tenant_id = $1", &[&two.id.uuid()]).await.unwrap();
        let tasks = (0..8u64).map(|task| {
            let (client, tenant) = (two.client.clone(), two.id);
            tokio::spawn(async move {
                let tenant = client.tenant(tenant);
                let mut events = events(experiment);
                // Each event goes to two or three of the tasks.
                let mut n = 0u64;
                events.retain(|_| {
                    n += 1;
                    n % 8 == task || (n * 5 + seed) % 8 == task || (n * 3) % 8 == task
                });
                shuffle(&mut events, seed * 8 + task);
                let mut waited = 0;
                // Alone, and in batches.
                let (alone, batches) = events.split_at(events.len() / 2);
                for event in alone {
                    let outcome = tenant.conversions().settle(event).await.unwrap();
                    assert!(
                        !matches!(outcome, ConversionOutcome::Conflict { .. } | ConversionOutcome::Unknown),
                        "{outcome:?}"
                    );
                    waited += usize::from(outcome == ConversionOutcome::Waiting);
                }
                for batch in batches.chunks(40) {
                    for outcome in tenant.conversions().settle_many(batch).await.unwrap() {
                        assert!(
                            !matches!(
                                outcome,
                                ConversionOutcome::Conflict { .. } | ConversionOutcome::Unknown
                            ),
                            "{outcome:?}"
                        );
                        waited += usize::from(outcome == ConversionOutcome::Waiting);
                    }
                }
                waited
            })
        });
        let mut waited = 0;
        for task in tasks.collect::<Vec<_>>() {
            waited += task.await.unwrap();
        }
        assert!(waited > 50, "the order was no other one: {waited}");
        assert_eq!((two.count("conversions").await, two.count("waiting_conversions").await), (1000, 0));
        let net = two.acme.metrics().experiment(experiment).await.unwrap().revenue(Currency::USD);
        let sum = "SELECT sum(revenue) FROM conversions WHERE tenant_id = $1";
        let sum: Decimal = owner.query_one(sum, &[&two.id.uuid()]).await.unwrap().get(0);
        assert_eq!(net.amount(), sum);
        let beyond =
            "SELECT count(*) FROM conversions WHERE flags && '{beyond_sale,period}' AND tenant_id = $1";
        assert_eq!(owner.query_one(beyond, &[&two.id.uuid()]).await.unwrap().get::<_, i64>(0), 0);
        nets.push(net);
    }
    // 300 sales and 450 renewals at 29, less 50 x 10 and 50 x 29; what the bank took it gave back.
    assert_eq!(nets, [usd("19800"); 2]);
    two.bystander_saw_nothing().await;
}

fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for i in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        items.swap(i, (state % (i as u64 + 1)) as usize);
    }
}

/// The law, once more, by whole cents: an implementation of its own to compare with.
fn law(
    quoted: i64,
    list: Option<i64>,
    quantity: i64,
    discount: i64,
    proration: i64,
    net: i64,
) -> Vec<LedgerRule> {
    let mut broken = Vec::new();
    if list.is_some_and(|list| list != quoted) {
        broken.push(LedgerRule::ListPrice);
    }
    if net != quoted * quantity - discount + proration {
        broken.push(LedgerRule::Net);
    }
    broken
}

#[test]
fn what_is_authorised_keeps_the_law_and_what_is_settled_against_it_is_flagged() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let two = runtime.block_on(two_tenants());
    let (id, price) = runtime.block_on(async {
        let id = active(&two.acme, "x").await.id;
        (id, assign(&two.acme, id, 1..2).await[0].price())
    });
    let quoted = price.minor().unwrap();
    let cents = |n: i64| Money::from_minor(n, Currency::USD);
    // Near the law, so that both sides of it are seen.
    let near = (1i64..4, 0i64..3000, -3000i64..3000, -1i64..=1, prop::option::of(-1i64..=1), 0i64..500);
    let mut runner = TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    let mut seen = BTreeMap::new();
    let count = std::cell::RefCell::new(&mut seen);
    let n = std::cell::Cell::new(0);
    let case = |(quantity, discount, proration, off, list, tax): (i64, i64, i64, i64, Option<i64>, i64)| {
        let net: i64 = quoted * quantity - discount + proration + off;
        prop_assume!(net >= 0);
        let list: Option<i64> = list.map(|off: i64| quoted + off);
        let broken = law(quoted, list, quantity, discount, proration, net);
        n.set(n.get() + 1);
        let new = |door: &str| {
            let key = key(&format!("{door} {}", n.get()));
            let new = NewConversion::sale(id, user(1), cents(net), key).quantity(quantity as u32);
            let new = new.discount(cents(discount)).proration(cents(proration)).tax(cents(tax));
            match list {
                Some(list) => new.list_price(cents(list)),
                None => new,
            }
        };
        let (asked, told) = runtime.block_on(async {
            let ledger = two.acme.conversions();
            (ledger.authorise(&new("asked")).await.unwrap(), ledger.settle(&new("told")).await.unwrap())
        });
        match asked {
            ConversionOutcome::Recorded(entry) => {
                prop_assert!(broken.is_empty(), "accepted {broken:?}");
                prop_assert_eq!(entry.quote_mismatch, Some(false));
            }
            ConversionOutcome::Refused(refusal) => {
                prop_assert_eq!(&refusal.rules, &broken);
                let right = quoted * quantity - discount + proration;
                prop_assert_eq!(refusal.allowed, (right >= 0).then(|| cents(right)));
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let ConversionOutcome::Recorded(Conversion { flags, quote_mismatch, .. }) = told else {
            panic!("{told:?}")
        };
        prop_assert_eq!((&flags, quote_mismatch), (&broken, Some(!broken.is_empty())));
        *count.borrow_mut().entry(format!("{broken:?}")).or_insert(0) += 1;
        Ok(())
    };
    runner.run(&near, case).unwrap();
    assert_eq!(seen.len(), 4, "every side of the law: {seen:?}");
    runtime.block_on(two.bystander_saw_nothing());
}

#[tokio::test]
async fn what_a_hand_writes_stays_its_tenants() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let app = two.database.connect_app().await.unwrap();
    let as_acme = async |sql: String| {
        app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{}'", two.id)).await.unwrap();
        let result = app.batch_execute(&sql).await;
        app.batch_execute(if result.is_ok() { "COMMIT" } else { "ROLLBACK" }).await.unwrap();
        result.map_err(|e| e.code().unwrap().code().to_owned())
    };
    // The bystander has an order-0. Nobody else can refund it, or make anything wait for it.
    let refund = |tenant: lastprice::TenantId, settled: bool| {
        format!(
            "INSERT INTO conversions (tenant_id, kind, order_id, revenue, currency, idempotency_key, settled)
             VALUES ('{tenant}', 'refund', 'order-0', -1, 'USD', 'mine', {settled})"
        )
    };
    for settled in [true, false] {
        assert_eq!(as_acme(refund(two.other_id, settled)).await, Err("42501".to_owned()));
    }
    let other = two.other_id;
    let waiting = format!(
        "INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
         VALUES ('{other}', 'k', '{other}', 'refund', 'o/order-0', '{{}}')"
    );
    assert_eq!(as_acme(waiting).await, Err("42501".to_owned()));
    // A refund by hand finds its sale, is bound by it, and waits for it.
    as_acme(refund(two.id, true)).await.unwrap();
    assert_eq!(two.count("waiting_conversions").await, 1);
    // What waits and is no entry is nobody's but its writer's; and no sale fails for it.
    let forged = |key: &str, entry: String| {
        format!(
            "INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
             VALUES ('{}', '{key}', gen_random_uuid(), 'refund', 'o/order-0', '{entry}')",
            two.id
        )
    };
    as_acme(forged("no entry", r#"{"revenue": 5}"#.to_owned())).await.unwrap();
    let entry = format!(
        r#"{{"tenant_id": "{other}", "idempotency_key": "charge:0", "kind": "sale", "order_id": "order-0", "revenue": -2, "currency": "USD",
            "quantity": 1, "discount": 0, "proration": 0, "tax": 0, "settled": true, "occurred_at": "2026-01-01Z", "metadata": {{}}}}"#
    );
    as_acme(forged("of another", entry)).await.unwrap();
    let sold = NewConversion::sale(id, user(1), usd("29"), key("sold")).order(order(0));
    two.acme.conversions().settle(&sold).await.unwrap().entry().unwrap().unwrap();
    let entries = two.acme.conversions().list_by_order(&order(0), 10, None).await.unwrap().items;
    let mut revenues: Vec<String> = entries.iter().map(|e| e.revenue.amount().to_string()).collect();
    revenues.sort();
    assert_eq!(revenues, ["-1", "-2", "29"]);
    assert_eq!(two.count("waiting_conversions").await, 1, "what is no entry waits on");
    // By hand no more goes back either, where permission is asked.
    let ask =
        |amount: &str| refund(two.id, false).replace(" -1,", &format!(" {amount},")).replace("mine", amount);
    as_acme(ask("-26.01")).await.unwrap();
    as_acme(ask("-26")).await.unwrap();
    let entries = two.acme.conversions().list_by_order(&order(0), 10, None).await.unwrap().items;
    assert_eq!(entries.len(), 4, "{entries:?}");
    two.bystander_saw_nothing().await;
}

/// What a session plans when there is nothing, or next to nothing, it keeps when there is much. With a hundred entries the index of
/// the primary key is smaller than those of the keys and orders, and for the planner no worse.
#[tokio::test]
async fn a_plan_made_for_few_does_for_many() {
    for few in [0, 120] {
        let two = two_tenants().await;
        let id = active(&two.acme, "x").await.id;
        let sold = |from: usize, n: usize| {
            format!(
                "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, list_price, order_id,
                                          subscription_id, idempotency_key, metadata)
                 SELECT '{0}', '{id}', 'user-' || n, '29', 29, 'USD', 29, o, o, CASE n % 2 WHEN 0 THEN o ELSE 'paid:sale:' || o END,
                        CASE n % 2 WHEN 0 THEN '{{}}' ELSE '{{\"webhook\": \"w\"}}' END::jsonb
                 FROM generate_series({from}, {from} + {n} - 1) n, LATERAL (SELECT lpad(n::text, 36, 'o')) o (o)",
                two.id
            )
        };
        two.owner.batch_execute("ALTER TABLE conversions SET (autovacuum_enabled = off)").await.unwrap();
        two.owner.batch_execute(&sold(0, few)).await.unwrap();
        let session = two.database.connect_owner().await.unwrap();
        session.batch_execute(&format!("BEGIN; {}", sold(few, 5000))).await.unwrap();
        let read = "SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid))::bigint FROM pg_index
                    WHERE indrelid IN ('conversions'::regclass, 'ledger_locks'::regclass)";
        let read: i64 = session.query_one(read, &[]).await.unwrap().get(0);
        session.batch_execute("COMMIT").await.unwrap();
        // The two locks of each.
        assert!((10_000..20_000).contains(&read), "each reads those before it: {read}");
        two.bystander_saw_nothing().await;
    }
}

/// What the triggers of the ledger look for, they find by an index, however much there is.
#[tokio::test]
async fn what_follows_a_sale_finds_it_by_an_index() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let fill = format!(
        "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, list_price, order_id, subscription_id,
                                  idempotency_key)
         SELECT '{0}', '{id}', 'user-' || n, '29', 29, 'USD', 29, 'order-' || n, 'sub-' || n, 'sale ' || n
         FROM generate_series(1, 20000) n;
         INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
         SELECT '{0}', 'waiting ' || n, gen_random_uuid(), 'refund', 'o/waiting-' || n, '{{}}' FROM generate_series(1, 20000) n;
         ANALYZE",
        two.id
    );
    two.owner.batch_execute(&fill).await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = two.client.within(&transaction, two.id);
    let sub = SubscriptionId::new("sub-7").unwrap();
    let batch = [
        NewConversion::refund(order(7), usd("1"), key("back")),
        NewConversion::chargeback(order(8), usd("1"), key("bank")),
        NewConversion::refund(order(30_000), usd("1"), key("waits")),
        NewConversion::renewal(sub, Period::new("1").unwrap(), usd("29"), key("on")).order(order(40_000)),
        NewConversion::sale(id, user(1), usd("29"), key("new")).order(order(30_000)),
    ];
    for outcome in within.conversions().settle_many(&batch).await.unwrap() {
        assert!(matches!(outcome, ConversionOutcome::Recorded(_)), "{outcome:?}");
    }
    let scans = "SELECT relname::text, seq_scan FROM pg_stat_xact_user_tables
                 WHERE relname IN ('conversions', 'waiting_conversions') AND (seq_scan > 0 OR idx_scan > 0)";
    let scans: Vec<(String, i64)> =
        transaction.query(scans, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(scans.len() == 2 && scans.iter().all(|(_, whole)| *whole == 0), "read as a whole: {scans:?}");
    drop(within);
    transaction.rollback().await.unwrap();
    two.bystander_saw_nothing().await;
}
