//! The ledger against the host's orders: every difference is named.

use lastprice::chrono::{DateTime, Utc};
use lastprice::{
    ConversionOutcome, Currency, Difference, ErrorKind, HostOrder, Money, NewConversion, OrderAmount,
    Reconciliation,
};

use crate::support_ledger::order;
use crate::support_repo::*;

fn at(day: &str) -> DateTime<Utc> {
    format!("2026-{day}T12:00:00Z").parse().unwrap()
}

#[tokio::test]
async fn every_difference_is_named() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let ledger = two.acme.conversions();
    let sold = |o: &str, amount: Money| {
        NewConversion::sale(id, user(1), amount, key(&format!("sale {o}"))).order(order(o)).at(at("11-05"))
    };
    let eur = |amount| Money::new(amount, "EUR").unwrap();
    let refund = NewConversion::refund(order("agreed"), usd("9"), key("refund")).at(at("12-01"));
    let waits = NewConversion::refund(order("nowhere"), usd("3"), key("waits"));
    let entries = [
        sold("agreed", usd("29.00")).tax(usd("5.51")),
        refund,
        sold("less", usd("20")),
        sold("dollars", usd("29")),
        sold("more", usd("19")),
        sold("both", usd("19")),
        NewConversion::sale(id, user(1), eur("5"), key("both 2")).order(order("both")).at(at("11-05")),
        sold("unknown", usd("39")),
        NewConversion::sale(id, user(1), usd("29"), key("no order")).at(at("11-06")),
        sold("october", usd("29")).at(at("10-31")),
        sold("december", usd("29")).at(at("12-01")),
        waits,
    ];
    for outcome in ledger.settle_many(&entries).await.unwrap() {
        assert!(
            matches!(outcome, ConversionOutcome::Recorded(_) | ConversionOutcome::Waiting),
            "{outcome:?}"
        );
    }

    let host = two.database.connect_owner().await.unwrap();
    host.batch_execute(
        "CREATE TABLE orders (id varchar(20), paid numeric(12, 2), currency char(3), paid_at timestamptz);
         INSERT INTO orders VALUES ('agreed', 12, 'USD', '2026-11-05Z'), ('agreed', 8, 'USD', '2026-11-05Z'),
           ('less', 29, 'USD', '2026-11-05Z'), ('dollars', 29, 'EUR', '2026-11-05Z'), ('more', 18.99, 'USD', '2026-11-05Z'),
           ('both', 19, 'USD', '2026-11-05Z'), ('missing', 29, 'USD', '2026-11-07Z'), ('october', 29, 'USD', '2026-11-01Z')",
    )
    .await
    .unwrap();
    let rows = host.query("SELECT id::text, paid, currency::text FROM orders", &[]).await.unwrap();
    let orders: Vec<HostOrder> = rows.iter().map(|row| HostOrder::from_row(row).unwrap()).collect();
    let november = at("11-01")..at("12-01");
    let report = ledger.reconcile(orders.clone(), november.clone(), OrderAmount::Net).await.unwrap();
    let entry = ledger.by_key(&key("no order")).await.unwrap().unwrap();
    let o = order;
    let expected = [
        Difference::Currency { order_id: o("both"), host: usd("19"), ledger: eur("5") },
        Difference::Currency { order_id: o("dollars"), host: eur("29"), ledger: usd("29") },
        Difference::Amount { order_id: o("less"), host: usd("29"), ledger: usd("20"), is_flagged: true },
        Difference::NotInLedger { order_id: o("missing"), host: usd("29") },
        Difference::Amount { order_id: o("more"), host: usd("18.99"), ledger: usd("19"), is_flagged: true },
        Difference::WithoutOrder { id: entry.id, ledger: usd("29") },
        Difference::NotAtHost { order_id: o("unknown"), ledger: usd("39") },
        Difference::Waiting {
            idempotency_key: key("waits"),
            kind: lastprice::ConversionKind::Refund,
            ledger: usd("-3"),
        },
    ];
    assert_eq!(report.agreed, 2, "{report}");
    let quoted = two.acme.assignments().get(id, &user(1)).await.unwrap().unwrap().price;
    for (difference, expected) in report.differences.iter().zip(&expected) {
        match (difference, expected) {
            // What was quoted is one of the two.
            (Difference::Amount { ledger, is_flagged, .. }, Difference::Amount { ledger: expected, .. }) => {
                assert_eq!((ledger, *is_flagged), (expected, *ledger != quoted));
            }
            _ => assert_eq!(difference, expected),
        }
    }
    assert_eq!(report.differences.len(), expected.len(), "{report}");
    assert_eq!((report.host, report.ledger), (vec![eur("29"), usd("144.99")], vec![eur("5"), usd("136")]));
    assert!(!Reconciliation::is_clean(
        &ledger.reconcile([], november.clone(), OrderAmount::Net).await.unwrap()
    ));

    // The same order by other amounts of it.
    let of = |amount: &str| vec![HostOrder::new(order("agreed"), usd(amount))];
    let day = at("11-02")..at("11-02");
    for (by, amount) in [(OrderAmount::Net, "20"), (OrderAmount::Sold, "29"), (OrderAmount::Charged, "34.51")]
    {
        let report = ledger.reconcile(of(amount), day.clone(), by).await.unwrap();
        assert_eq!((report.agreed, report.differences.len()), (1, 1), "{by:?} {report}");
    }
    // The other tenant's order of the same name is nobody's here, nor are ours there.
    let theirs = two.globex.conversions().reconcile(orders, november, OrderAmount::Net).await.unwrap();
    let own = Difference::NotAtHost { order_id: order("order-0"), ledger: usd("1234.50") };
    let strange = |d: &&Difference| !matches!(d, Difference::NotInLedger { .. }) && **d != own;
    assert_eq!((theirs.agreed, theirs.differences.iter().find(strange)), (0, None), "{theirs}");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn thousands_of_orders_agree() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let mut orders = Vec::new();
    for batch in 0..3 {
        let numbers = batch * 1000..(batch + 1) * 1000;
        let sales: Vec<NewConversion> = numbers
            .clone()
            .map(|n| {
                let sale = NewConversion::sale(id, user(n % 5), usd("29"), key(&format!("k{n}")));
                // Many at one moment, as imports have them.
                sale.order(order(&format!("o{n}"))).at(at("11-05"))
            })
            .collect();
        two.acme.conversions().settle_many(&sales).await.unwrap();
        orders.extend(numbers.map(|n| HostOrder::new(order(&format!("o{n}")), usd("29.00"))));
    }
    let november = at("11-01")..at("12-01");
    let reconcile = async |orders: &[HostOrder]| {
        two.acme.conversions().reconcile(orders.to_vec(), november.clone(), OrderAmount::Net).await.unwrap()
    };
    let report = reconcile(&orders).await;
    assert!(report.is_clean() && report.agreed == 3000, "{report}");
    assert_eq!((report.host, report.ledger), (vec![usd("87000")], vec![usd("87000")]));
    assert_eq!(reconcile(&orders[5..]).await.differences.len(), 5);
    let backwards = at("11-05")..at("11-01");
    refused(two.acme.conversions().reconcile([], backwards, OrderAmount::Net).await, "to");
    let never = DateTime::<Utc>::MIN_UTC..at("11-01");
    refused(two.acme.conversions().reconcile([], never, OrderAmount::Net).await, "from");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_row_that_is_no_order_is_named() {
    let two = two_tenants().await;
    for (sql, field) in [
        ("SELECT 1, 1::numeric, 'USD'", "order_id"),
        ("SELECT '', 1::numeric, 'USD'", "order_id"),
        ("SELECT 'a', 1, 'USD'", "amount"),
        ("SELECT 'a', 1e12::numeric, 'USD'", "amount"),
        ("SELECT 'a', NULL::numeric, 'USD'", "amount"),
        ("SELECT 'a', 1::numeric, 'usd'", "currency"),
        ("SELECT 'a', 1::numeric", "currency"),
    ] {
        let row = two.owner.query_one(sql, &[]).await.unwrap();
        let error = HostOrder::from_row(&row).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some(field)), "{sql}");
    }
    let row = two.owner.query_one("SELECT 'a', 1.50::numeric, 'USD'", &[]).await.unwrap();
    assert_eq!(
        HostOrder::from_row(&row).unwrap(),
        HostOrder::new(order("a"), Money::from_minor(150, Currency::USD))
    );
}
