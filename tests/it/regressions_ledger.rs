//! What the ledger once got wrong.

use std::time::Duration;

use lastprice::{ConversionOutcome, Currency, ErrorKind, ExperimentId, LedgerRule, Money, NewConversion};

use crate::support_ledger::*;
use crate::support_repo::*;

#[track_caller]
fn conflict(outcome: ConversionOutcome, fields: &[&str]) {
    match outcome {
        ConversionOutcome::Conflict { fields: differ, .. } => assert_eq!(differ, fields),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_key_of_what_waits_is_taken() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    assign(&two.acme, id, 1..3).await;
    let ledger = two.acme.conversions();
    let waits = refund("o1", "5", "k");
    assert_eq!(ledger.settle(&waits).await.unwrap(), ConversionOutcome::Waiting);
    // By a sale, of a user with a quote and of one without; by both doors.
    for n in [1, 7] {
        let sale = NewConversion::sale(id, user(n), usd("29"), key("k")).order(order("o1"));
        for outcome in [ledger.settle(&sale).await.unwrap(), ledger.authorise(&sale).await.unwrap()] {
            conflict(outcome, &["kind", "revenue"]);
        }
    }
    // By what belongs to something that is there.
    let there = NewConversion::sale(id, user(2), usd("29"), key("there")).order(order("o2"));
    settled(&two.acme, &there.subscription(subscription("s2"))).await;
    conflict(ledger.settle(&refund("o2", "5", "k")).await.unwrap(), &["order_id"]);
    conflict(ledger.authorise(&refund("o2", "5", "k")).await.unwrap(), &["order_id"]);
    let outcome = ledger.settle(&renewal("s2", "1", "29", "k")).await.unwrap();
    conflict(outcome, &["kind", "revenue", "order_id", "subscription_id", "period"]);
    // It is the same as ever for itself, and counts.
    assert_eq!(ledger.settle(&waits).await.unwrap(), ConversionOutcome::Waiting);
    assert_eq!(ledger.authorise(&waits).await.unwrap(), ConversionOutcome::Waiting);
    settled(&two.acme, &NewConversion::sale(id, user(1), usd("29"), key("o1")).order(order("o1"))).await;
    assert_eq!(net(&two, id, Currency::USD).await, usd("53"), "29 + 29 - 5");
    assert!(matches!(ledger.settle(&waits).await.unwrap(), ConversionOutcome::Duplicate(_)));
    two.bystander_saw_nothing().await;
}

/// What a waiting report differs in is what it will differ in once it is in the ledger.
#[tokio::test]
async fn what_waits_is_compared_as_a_whole() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let ledger = two.acme.conversions();
    let first = || renewal("s", "1", "29", "k");
    assert_eq!(ledger.settle(&first()).await.unwrap(), ConversionOutcome::Waiting);
    let others: [(NewConversion, &[&str]); 7] = [
        (first(), &[]),
        (renewal("s", "2", "29", "k"), &["period"]),
        (renewal("t", "1", "29", "k"), &["subscription_id"]),
        (first().order(order("o")), &["order_id"]),
        (first().quantity(2), &["quantity"]),
        (first().discount(usd("1")).tax(usd("3")), &["discount", "tax"]),
        (first().proration(usd("-1")), &["proration"]),
    ];
    for (other, fields) in &others {
        match ledger.settle(other).await.unwrap() {
            ConversionOutcome::Waiting => assert!(fields.is_empty(), "{other:?}"),
            outcome => conflict(outcome, fields),
        }
    }
    let sold = NewConversion::sale(id, user(1), usd("29"), key("sold")).subscription(subscription("s"));
    settled(&two.acme, &sold).await;
    for (other, fields) in &others {
        match ledger.settle(other).await.unwrap() {
            ConversionOutcome::Duplicate(_) => assert!(fields.is_empty(), "{other:?}"),
            outcome => conflict(outcome, fields),
        }
    }
}

/// JSON keeps zeros: 19.9900000000 is a price like any other.
#[tokio::test]
async fn a_price_may_be_written_with_many_zeros() {
    let two = two_tenants().await;
    let variants = r#"[{"name": "a", "weight": 1, "price": 19.9900000000,
                        "prices": [{"item": "annual", "currency": "USD", "price": 199.0000000000}]}]"#;
    let sql = format!(
        "INSERT INTO experiments (tenant_id, key, name, status, variants) VALUES ('{}', 'x', 'X', 'active', '{variants}') RETURNING id",
        two.id
    );
    let row = two.owner.query_one(&sql, &[]).await.unwrap();
    let id = ExperimentId::from(row.get::<_, lastprice::uuid::Uuid>(0));
    let sale = |n: usize, amount: &str, k: &str| NewConversion::sale(id, user(n), usd(amount), key(k));
    for (n, door) in [(1, "quoted"), (2, "outside")] {
        if n == 2 {
            two.acme.experiments().pause(id).await.unwrap();
        }
        for (item, amount) in [(None, "19.99"), (Some("annual"), "199")] {
            let k = |how: &str| format!("{door} {item:?} {how}");
            let sale = |how: &str| match item {
                Some(item) => sale(n, amount, &k(how)).item(item),
                None => sale(n, amount, &k(how)),
            };
            let asked = two.acme.conversions().authorise(&sale("asked")).await.unwrap();
            let entry = asked.entry().unwrap().unwrap();
            assert_eq!((entry.list_price, entry.quote_mismatch), (Some(usd(amount)), Some(false)));
            assert_eq!(settled(&two.acme, &sale("told")).await.list_price, Some(usd(amount)));
        }
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_period_is_paid_once_whatever_the_isolation() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let sold = NewConversion::sale(id, user(1), usd("29"), key("sold")).subscription(subscription("s"));
    settled(&two.acme, &sold).await;
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = repeatable(&mut host).await;
    let paid = two.acme.conversions().authorise(&renewal("s", "1", "29", "first")).await.unwrap();
    paid.entry().unwrap().unwrap();
    let within = two.client.within(&transaction, two.id);
    // As with what goes back, nobody can say so with an older snapshot.
    let again = within.conversions().authorise(&renewal("s", "1", "29", "second")).await;
    is_kind(again, ErrorKind::Conflict);
    drop(within);
    transaction.commit().await.unwrap();
    assert_eq!(net(&two, id, Currency::USD).await, usd("58"));
}

#[tokio::test]
async fn a_promise_is_never_shortened() {
    let two = two_tenants().await;
    let new = new_experiment("x").quotes_valid_for(Duration::from_secs(3600));
    let draft = two.acme.experiments().create(new).await.unwrap();
    let id = two.acme.experiments().activate(draft.id).await.unwrap().id;
    assign(&two.acme, id, 1..2).await;
    let age = "UPDATE assignments SET valid_until = now() + interval '10 minutes' WHERE tenant_id = $1";
    two.owner.execute(age, &[&two.id.uuid()]).await.unwrap();

    // One transaction is older, and renews later.
    let mut hosts = (two.database.connect_app().await.unwrap(), two.database.connect_app().await.unwrap());
    let older = hosts.0.transaction().await.unwrap();
    older.batch_execute("SELECT now()").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let newer = hosts.1.transaction().await.unwrap();
    let scope = two.client.within(&newer, two.id);
    let promised = scope.assignments().assign(id, &user(1)).await.unwrap().quote().unwrap().clone();
    drop(scope);
    let (scope, user_1) = (two.client.within(&older, two.id), user(1));
    let waits = scope.assignments().assign(id, &user_1);
    let commits = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        newer.commit().await.unwrap();
    };
    let (second, ()) = futures_util::future::join(waits, commits).await;
    assert!(second.unwrap().quote().unwrap().valid_until >= promised.valid_until);
    drop(scope);
    older.commit().await.unwrap();
    let now = two.acme.assignments().get(id, &user(1)).await.unwrap().unwrap();
    assert!(now.valid_until >= promised.valid_until, "{now:?} was promised as {promised:?}");

    // Once promises are for ever, those that ran out are as well, when they are given anew.
    let sql = "UPDATE assignments SET valid_until = now() - interval '1 minute' WHERE tenant_id = $1";
    two.owner.execute(sql, &[&two.id.uuid()]).await.unwrap();
    let sql = "UPDATE experiments SET quote_validity = NULL WHERE tenant_id = $1";
    two.owner.execute(sql, &[&two.id.uuid()]).await.unwrap();
    let anew = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    assert_eq!(anew.quote().unwrap().valid_until, None);
    let sale = NewConversion::sale(id, user(1), anew.price(), key("sale"));
    two.acme.conversions().authorise(&sale).await.unwrap().entry().unwrap().unwrap();
    two.bystander_saw_nothing().await;
}

/// What waits keeps its place and its time while it waits.
#[tokio::test]
async fn what_still_belongs_to_nothing_is_not_written_anew() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let won = NewConversion::chargeback_reversal(order("o1"), usd("5"), key("won"));
    let outcome = two.acme.conversions().settle(&won).await.unwrap();
    assert_eq!(outcome, ConversionOutcome::Waiting);
    let received = "SELECT received_at::text FROM waiting_conversions";
    let before: String = two.owner.query_one(received, &[]).await.unwrap().get(0);
    let sale = NewConversion::sale(id, user(1), usd("29"), key("sale")).order(order("o1"));
    settled(&two.acme, &sale).await;
    assert_eq!(two.owner.query_one(received, &[]).await.unwrap().get::<_, String>(0), before);
    let charged = NewConversion::chargeback(order("o1"), usd("5"), key("charged"));
    settled(&two.acme, &charged).await;
    assert_eq!((two.count("waiting_conversions").await, net(&two, id, Currency::USD).await), (0, usd("29")));
}

/// A tester pays what the tester is shown, even with a quote from before.
#[tokio::test]
async fn a_tester_pays_what_a_tester_is_shown() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let quote = assign(&two.acme, id, 1..2).await[0].price();
    let other = if quote == usd("19") { "39" } else { "19" };
    two.acme.experiments().force(id, &user(1), Some(other)).await.unwrap();
    let shown = two.acme.assignments().assign(id, &user(1)).await.unwrap().price();
    assert_eq!(shown, usd(other));
    let sale = |net: Money, k: &str| NewConversion::sale(id, user(1), net, key(k));
    for (k, told) in [("asked", false), ("told", true)] {
        let entry = match told {
            true => settled(&two.acme, &sale(shown, k)).await,
            false => {
                let asked = two.acme.conversions().authorise(&sale(shown, k)).await.unwrap();
                asked.entry().unwrap().unwrap()
            }
        };
        assert_eq!((entry.quote_mismatch, entry.variant.as_str()), (Some(false), other), "{k}");
        assert_eq!(entry.reason, Some(lastprice::AssignmentReason::Forced));
    }
    // What is not shown is not charged.
    let wrong = two.acme.conversions().authorise(&sale(quote, "not shown")).await.unwrap();
    let ConversionOutcome::Refused(refusal) = wrong else { panic!("{wrong:?}") };
    assert_eq!((refusal.rules.as_slice(), refusal.allowed), (&[LedgerRule::Net][..], Some(shown)));
    assert_eq!(settled(&two.acme, &sale(quote, "charged")).await.flags, [LedgerRule::Net]);
}

/// What hangs together is restored together, by the commands of the description.
#[tokio::test]
async fn a_data_only_dump_of_a_ledger_is_restored_as_it_was() {
    let (Some(psql), Some(pg_dump)) =
        (crate::support_sql::program("psql"), crate::support_sql::program("pg_dump"))
    else {
        return;
    };
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let ledger = two.acme.conversions();
    let mut host = two.database.connect_app().await.unwrap();
    for n in 0..3 {
        let (o, s) = (format!("o{n}"), format!("s{n}"));
        let sale = NewConversion::sale(id, user(n), usd("29"), key(&format!("sale {n}")));
        let sale = sale.order(order(&o)).subscription(subscription(&s));
        let after = [
            refund(&o, "20", &format!("back {n}")),
            refund(&o, "20", &format!("beyond {n}")),
            renewal(&s, "1", "30", &format!("flagged {n}")).order(order(&format!("r{n}"))),
            renewal(&s, "1", "29", &format!("twice {n}")),
            refund(&format!("r{n}"), "1", &format!("of renewal {n}")),
            NewConversion::chargeback_reversal(order(&o), usd("7"), key(&format!("waits {n}"))),
            refund(&format!("later {n}"), "1", &format!("waits too {n}")),
        ];
        if n == 1 {
            // Entries before their sale in the table, and one that its sale did not see.
            ledger.settle_many(&after).await.unwrap();
            settled(&two.acme, &sale).await;
            let transaction = repeatable(&mut host).await;
            ledger.settle(&refund("unseen", "3", "unseen back")).await.unwrap().entry().unwrap();
            let within = two.client.within(&transaction, two.id);
            let unseen = NewConversion::sale(id, user(9), usd("29"), key("unseen")).order(order("unseen"));
            within.conversions().settle(&unseen).await.unwrap().entry().unwrap().unwrap();
            drop(within);
            transaction.commit().await.unwrap();
        } else {
            settled(&two.acme, &sale).await;
            ledger.settle_many(&after).await.unwrap();
        }
    }
    let contents = "SELECT (SELECT jsonb_agg(to_jsonb(c) ORDER BY id)::text FROM conversions c),
                           (SELECT jsonb_agg(to_jsonb(w) ORDER BY id)::text FROM waiting_conversions w)";
    let row = two.owner.query_one(contents, &[]).await.unwrap();
    let before: (String, String) = (row.get(0), row.get(1));
    let mut dump = std::process::Command::new(&pg_dump);
    let dump = dump.args(["-d", &two.database.owner_url(), "--data-only"]);
    let text = crate::support_sql::run(dump).expect_ok();
    let dir = crate::support_sql::TemporaryDir::new("ledger");
    let file = dir.file("data.sql");
    std::fs::write(&file, text).unwrap();
    let into = lastprice_testkit::TestDatabase::builder().empty().create().await.unwrap();
    let run = |args: &[&str]| crate::support_sql::psql(&psql, &into.owner_url(), "", args).expect_ok();
    run(&["-f", crate::support_sql::schema_sql()]);
    run(&["--single-transaction", "-f", &file]);
    run(&["-c", "SELECT recount_experiment_metrics()"]);
    let restored = into.connect_owner().await.unwrap();
    let row = restored.query_one(contents, &[]).await.unwrap();
    assert_eq!((row.get::<_, String>(0), row.get::<_, String>(1)), before);
    crate::support_sql::assert_exact(&into.connect_superuser().await.unwrap(), "restored").await;
    // And what was not seen is seen by a refresh, here as there.
    let mut nets = Vec::new();
    for db in [&two.owner, &restored] {
        db.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
        let row = db.query_one("SELECT sum(revenue)::text, count(*) FROM conversions", &[]).await.unwrap();
        nets.push((row.get::<_, String>(0), row.get::<_, i64>(1)));
    }
    assert_eq!(nets[0], nets[1]);
    two.bystander_saw_nothing().await;
}
