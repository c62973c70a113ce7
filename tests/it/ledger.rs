//! What follows a sale, and what comes before it.

use std::time::Duration;

use lastprice::{
    ConversionKind, ConversionOutcome, Currency, ErrorKind, LedgerRule, Money, NewConversion, Variants,
};

use crate::support_ledger::*;
use crate::support_repo::*;

#[tokio::test]
async fn a_subscription_is_locked_at_the_price_that_it_began_with() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let quote = assign(&two.acme, id, 1..2).await[0].price();
    let ledger = two.acme.conversions();
    let sub = || subscription("sub-1");
    let trial = NewConversion::trial_start(id, user(1), sub(), key("trial"));
    let entry = settled(&two.acme, &trial).await;
    assert_eq!(
        (entry.kind, entry.revenue, entry.quote_mismatch),
        (ConversionKind::TrialStart, usd("0"), None)
    );
    let renewal =
        |p: &str, net: Money, k: &str| NewConversion::renewal(sub(), period(p), net, key(k)).order(order(k));

    // Nothing was paid yet: there is nothing to go on with.
    let early = renewal("2026-10", quote, "early");
    assert_eq!(ledger.authorise(&early).await.unwrap(), ConversionOutcome::Unknown);
    let sold = NewConversion::sale(id, user(1), quote, key("sold")).subscription(sub()).order(order("first"));
    let sold = ledger.authorise(&sold).await.unwrap().entry().unwrap().unwrap();

    let paid = ledger.authorise(&renewal("2026-10", quote, "r1")).await.unwrap().entry().unwrap().unwrap();
    assert_eq!(
        (paid.kind, paid.sale_id, paid.list_price),
        (ConversionKind::Renewal, Some(sold.id), Some(quote))
    );
    assert_eq!((&paid.user_id, &paid.variant, paid.reason), (&user(1), &sold.variant, sold.reason));
    let two_seats = quote.checked_mul(2).unwrap();
    let seats = ledger.authorise(&renewal("2026-11", two_seats, "r2").quantity(2)).await.unwrap();
    assert!(matches!(seats, ConversionOutcome::Recorded(_)));
    // Another price, another currency, a period twice.
    let more = quote.checked_add(usd("1")).unwrap();
    assert_eq!(
        refused_by(&two.acme, &renewal("2026-12", more, "r3")).await,
        (vec![LedgerRule::Net], Some(quote))
    );
    let other = Money::of(quote.amount(), Currency::EUR).unwrap();
    assert_eq!(
        refused_by(&two.acme, &renewal("2026-12", other, "r3")).await,
        (vec![LedgerRule::Currency], None)
    );
    let twice = renewal("2026-10", quote, "r4");
    assert_eq!(refused_by(&two.acme, &twice).await, (vec![LedgerRule::Period], None));
    is_kind(ledger.authorise(&twice).await.unwrap().entry(), ErrorKind::Conflict);
    assert_eq!(settled(&two.acme, &twice).await.flags, [LedgerRule::Period]);
    let entry = settled(&two.acme, &renewal("2026-12", more, "r3")).await;
    assert_eq!((entry.flags, entry.quote_mismatch), (vec![LedgerRule::Net], Some(true)));

    // It adds revenue, and no conversion; and it can be refunded.
    let back = settled(&two.acme, &NewConversion::refund(order("r1"), quote, key("back"))).await;
    assert_eq!((back.sale_id, back.revenue.amount()), (Some(paid.id), -quote.amount()));
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!(counts.conversions, 1);
    // sale + r1 + r2 (2) + twice + r3 (more) - back
    let expected = quote.checked_mul(5).unwrap().checked_add(usd("1")).unwrap();
    assert_eq!(net(&two, id, Currency::USD).await, expected);
    let of_it = ledger.list_by_subscription(&sub(), 100, None).await.unwrap().items;
    assert_eq!(of_it.len(), 6, "{of_it:?}");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn no_more_goes_back_than_was_paid() {
    use LedgerRule::{BeyondChargeback, BeyondSale};
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let ledger = two.acme.conversions();
    let o = || order("o1");
    let refund = |amount: &str, k: &str| NewConversion::refund(o(), usd(amount), key(k));
    assert_eq!(ledger.authorise(&refund("1", "r0")).await.unwrap(), ConversionOutcome::Unknown);
    let sold = settled(&two.acme, &sale(id, 1, "29.00").order(o())).await;
    let back = ledger.authorise(&refund("9.50", "r1")).await.unwrap().entry().unwrap().unwrap();
    assert_eq!(
        (back.revenue, back.sale_id, back.order_id.as_ref()),
        (usd("-9.5"), Some(sold.id), Some(&o()))
    );
    assert_eq!(refused_by(&two.acme, &refund("19.51", "r2")).await, (vec![BeyondSale], Some(usd("19.50"))));
    is_kind(ledger.authorise(&refund("19.51", "r2")).await.unwrap().entry(), ErrorKind::RefundExceedsSale);
    let other = NewConversion::refund(o(), eur("1"), key("r3"));
    assert_eq!(refused_by(&two.acme, &other).await, (vec![LedgerRule::Currency], Some(usd("19.5"))));
    ledger.authorise(&refund("4.5", "r4")).await.unwrap().entry().unwrap().unwrap();
    // A chargeback of the rest, of which a part is won back and refunded.
    let charged = NewConversion::chargeback(o(), usd("15"), key("c1"));
    ledger.authorise(&charged).await.unwrap().entry().unwrap().unwrap();
    let won = |amount: &str, k: &str| NewConversion::chargeback_reversal(o(), usd(amount), key(k));
    assert_eq!(refused_by(&two.acme, &won("15.01", "w1")).await, (vec![BeyondChargeback], Some(usd("15"))));
    ledger.authorise(&won("5", "w2")).await.unwrap().entry().unwrap().unwrap();
    assert_eq!(refused_by(&two.acme, &won("10.01", "w3")).await, (vec![BeyondChargeback], Some(usd("10"))));
    assert_eq!(refused_by(&two.acme, &refund("5.01", "r5")).await, (vec![BeyondSale], Some(usd("5"))));
    ledger.authorise(&refund("5", "r6")).await.unwrap().entry().unwrap().unwrap();
    // The money has moved: written, and flagged.
    assert_eq!(settled(&two.acme, &refund("1", "r7")).await.flags, [BeyondSale]);
    assert_eq!(net(&two, id, Currency::USD).await, usd("-1"));

    // Of an order with several sales, the one that is named, or the one with most left.
    let y = active(&two.acme, "y").await.id;
    let line = |x, n: usize, amount: &str| {
        NewConversion::sale(x, user(n), usd(amount), new_key()).order(order("o2"))
    };
    let (small, large) =
        (settled(&two.acme, &line(id, 2, "10")).await, settled(&two.acme, &line(y, 2, "20")).await);
    let of_y = NewConversion::refund(order("o2"), usd("15"), key("of y")).of_experiment(y);
    assert_eq!(ledger.authorise(&of_y).await.unwrap().entry().unwrap().unwrap().sale_id, Some(large.id));
    let most = NewConversion::refund(order("o2"), usd("6"), key("most"));
    assert_eq!(ledger.authorise(&most).await.unwrap().entry().unwrap().unwrap().sale_id, Some(small.id));
    let beyond = NewConversion::refund(order("o2"), usd("6"), key("beyond"));
    assert_eq!(refused_by(&two.acme, &beyond).await, (vec![BeyondSale], Some(usd("5"))));
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refunds_at_once_are_decided_by_the_database() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    for round in 0..10 {
        let o = order(&format!("race-{round}"));
        let sale = NewConversion::sale(id, user(round), usd("29"), new_key()).order(o.clone());
        settled(&two.acme, &sale).await;
        let tasks = (0..8).map(|_| {
            let (client, tenant, o) = (two.client.clone(), two.id, o.clone());
            tokio::spawn(async move {
                let refund = NewConversion::refund(o, usd("10"), new_key());
                client.tenant(tenant).conversions().authorise(&refund).await.unwrap()
            })
        });
        let mut accepted = 0;
        for task in tasks.collect::<Vec<_>>() {
            match task.await.unwrap() {
                ConversionOutcome::Recorded(_) => accepted += 1,
                ConversionOutcome::Refused(refusal) => assert_eq!(refusal.rules, [LedgerRule::BeyondSale]),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(accepted, 2, "of 29, twice 10");
    }
    assert_eq!(net(&two, id, Currency::USD).await, usd("90"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_comes_before_its_sale_waits() {
    let two = two_tenants().await;
    let variants = Variants::new().add("a", 1, "29.00").add("b", 1, "29.00");
    let new = lastprice::NewExperiment::new("x", "X", Currency::USD, variants);
    let draft = two.acme.experiments().create(new).await.unwrap();
    let id = two.acme.experiments().activate(draft.id).await.unwrap().id;
    let ledger = two.acme.conversions();
    let waits = async |new: &NewConversion| {
        assert_eq!(ledger.settle(new).await.unwrap(), ConversionOutcome::Waiting, "{new:?}");
        assert_eq!(ledger.settle(new).await.unwrap(), ConversionOutcome::Waiting, "again");
    };
    let refund = NewConversion::refund(order("o1"), usd("5"), key("refund"));
    let won = NewConversion::chargeback_reversal(order("o2"), usd("7"), key("won"));
    let charged = NewConversion::chargeback(order("o2"), usd("7"), key("charged"));
    let renewal =
        NewConversion::renewal(subscription("s"), period("2"), usd("29"), key("renewal")).order(order("o2"));
    for early in [&refund, &won, &charged, &renewal] {
        waits(early).await;
    }
    assert_eq!((two.count("waiting_conversions").await, two.count("conversions").await), (4, 0));
    // The key is taken, even so.
    let other = NewConversion::refund(order("o1"), usd("6"), key("refund"));
    let ConversionOutcome::Conflict { stored: None, fields } = ledger.settle(&other).await.unwrap() else {
        panic!()
    };
    assert_eq!(fields, ["revenue"]);
    // The sale of the subscription brings its renewal, that the chargeback, and that what was won back.
    let sold = sale(id, 1, "29").subscription(subscription("s")).order(order("o1"));
    settled(&two.acme, &sold).await;
    assert_eq!(two.count("waiting_conversions").await, 0);
    assert_eq!(net(&two, id, Currency::USD).await, usd("53"));
    for known in [&refund, &won, &charged, &renewal] {
        let ConversionOutcome::Duplicate(entry) = ledger.settle(known).await.unwrap() else {
            panic!("{known:?}")
        };
        assert_eq!((&entry.user_id, entry.is_settled), (&user(1), true), "{entry:?}");
        // 29 is one of the prices that the user may have been quoted.
        assert!(entry.flags.iter().all(|rule| *rule == LedgerRule::Net), "{entry:?}");
    }
    // The same before a transaction of the host's.
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = two.client.within(&transaction, two.id);
    let refund = NewConversion::refund(order("o3"), usd("5"), key("refund 3"));
    assert_eq!(within.conversions().settle(&refund).await.unwrap(), ConversionOutcome::Waiting);
    let sold = NewConversion::sale(id, user(3), usd("29"), key("sale 3")).order(order("o3"));
    assert!(within.conversions().settle(&sold).await.unwrap().entry().unwrap().is_some());
    drop(within);
    transaction.commit().await.unwrap();
    assert_eq!(net(&two, id, Currency::USD).await, usd("77"));
    // What nobody may write by hand harms nobody else.
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_call_of_which_a_part_is_committed_says_so() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 1..2).await;
    let builder = lastprice::Client::builder().url(two.database.app_url());
    let impatient = builder.statement_timeout(Duration::from_millis(300)).build().unwrap();
    let tenant = impatient.tenant(two.id);
    // Nobody can be assigned meanwhile.
    let mut owner = two.database.connect_owner().await.unwrap();
    let lock = owner.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE assignments IN SHARE MODE").await.unwrap();
    let unassigned = sale(id, 2, "29");
    is_kind(tenant.conversions().settle(&unassigned).await, ErrorKind::Timeout);
    let both = [sale(id, 1, "29"), unassigned];
    is_kind(tenant.conversions().settle_many(&both).await, ErrorKind::OutcomeUnknown);
    lock.rollback().await.unwrap();
    assert_eq!(two.count("conversions").await, 1);
    let again = tenant.conversions().settle_many(&both).await.unwrap();
    assert!(
        matches!(again[..], [ConversionOutcome::Duplicate(_), ConversionOutcome::Recorded(_)]),
        "{again:?}"
    );
    two.bystander_saw_nothing().await;
}
