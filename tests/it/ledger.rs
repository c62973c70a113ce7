//! Quote = charge; what follows a sale; whatever comes in whatever order.

use std::time::Duration;

use lastprice::chrono::{TimeDelta, Utc};
use lastprice::{
    AssignmentReason, Conversion, ConversionKind, ConversionOutcome, Currency, ErrorKind, IdempotencyKey,
    LedgerRule, Money, NewConversion, OrderId, Period, Refusal, SubscriptionId, TenantHandle, Variants,
};

use crate::support_repo::*;

fn order(id: &str) -> OrderId {
    OrderId::new(id).unwrap()
}

fn subscription(id: &str) -> SubscriptionId {
    SubscriptionId::new(id).unwrap()
}

fn period(id: &str) -> Period {
    Period::new(id).unwrap()
}

fn new_key() -> IdempotencyKey {
    key(&lastprice::uuid::Uuid::now_v7().to_string())
}

fn eur(amount: &str) -> Money {
    Money::new(amount, "EUR").unwrap()
}

async fn settled(tenant: &TenantHandle, new: &NewConversion) -> Conversion {
    match tenant.conversions().settle(new).await.unwrap() {
        ConversionOutcome::Recorded(entry) => entry,
        other => panic!("{other:?}"),
    }
}

async fn refused_by(tenant: &TenantHandle, new: &NewConversion) -> (Vec<LedgerRule>, Option<Money>) {
    match tenant.conversions().authorise(new).await.unwrap() {
        ConversionOutcome::Refused(Refusal { rules, allowed, .. }) => (rules, allowed),
        other => panic!("{other:?}"),
    }
}

/// All that the ledger adds up to, whoever counts: the metrics, and the entries themselves.
async fn net(two: &TwoTenants, experiment: lastprice::ExperimentId, currency: Currency) -> Money {
    let live = two.acme.metrics().experiment(experiment).await.unwrap().revenue(currency);
    let sql = "SELECT COALESCE(sum(revenue), 0) FROM conversions WHERE tenant_id = $1 AND experiment_id = $2 AND currency = $3";
    let row =
        two.owner.query_one(sql, &[&two.id.uuid(), &experiment.uuid(), &currency.code()]).await.unwrap();
    assert_eq!(live, Money::of(row.get(0), currency).unwrap());
    live
}

#[tokio::test]
async fn what_is_charged_is_what_was_quoted() {
    use LedgerRule::{Currency as NoPrice, ListPrice, Net};
    let two = two_tenants().await;
    let variants = Variants::new()
        .add("a", 1, "20.00")
        .add("b", 0, "30.00")
        .book("a", "annual", usd("200"))
        .book("a", "annual", eur("190"));
    let new = lastprice::NewExperiment::new("x", "X", Currency::USD, variants);
    let draft = two.acme.experiments().create(new).await.unwrap();
    let id = two.acme.experiments().activate(draft.id).await.unwrap().id;
    assign(&two.acme, id, 0..5).await;
    let sale = |net: Money| NewConversion::sale(id, user(1), net, new_key());

    // Within the law: through both doors.
    for good in [
        sale(usd("20")),
        sale(usd("20.000")).list_price(usd("20.0")),
        sale(usd("55.50")).quantity(3).discount(usd("4.5")),
        sale(usd("13.37")).proration(usd("-6.63")).tax(usd("2.54")),
        sale(usd("0")).discount(usd("20")),
        sale(usd("200")).item("annual"),
        sale(eur("185")).item("annual").discount(eur("5")),
        sale(usd("4000000000")).quantity(200_000_000),
    ] {
        let outcome = two.acme.conversions().authorise(&good).await.unwrap();
        let ConversionOutcome::Recorded(entry) = &outcome else { panic!("{outcome:?}") };
        assert_eq!(
            (entry.quote_mismatch, entry.flags.as_slice(), entry.is_settled),
            (Some(false), &[][..], false)
        );
        assert_eq!(entry.reason, Some(AssignmentReason::Randomised));
        assert_eq!(entry.list_price.unwrap().currency(), entry.revenue.currency());
        assert!(matches!(
            two.acme.conversions().settle(&good).await.unwrap(),
            ConversionOutcome::Duplicate(_)
        ));
    }
    // Against it: refused before, flagged after.
    for (bad, rules, allowed) in [
        (sale(usd("19.99")), vec![Net], Some(usd("20"))),
        (sale(usd("19.99")).list_price(usd("19.99")), vec![ListPrice, Net], Some(usd("20"))),
        (sale(usd("20")).list_price(usd("25")), vec![ListPrice], Some(usd("20"))),
        (sale(usd("20")).quantity(2), vec![Net], Some(usd("40"))),
        (sale(usd("20")).tax(usd("4")).discount(usd("1")), vec![Net], Some(usd("19"))),
        (sale(usd("24")).tax(usd("4")), vec![Net], Some(usd("20"))),
        (sale(usd("0")).discount(usd("25")), vec![Net], None),
        (sale(eur("20")), vec![NoPrice], None),
        (sale(usd("20")).item("monthly"), vec![NoPrice], None),
        (sale(Money::new("200", "JPY").unwrap()).item("annual"), vec![NoPrice], None),
    ] {
        let before = two.count("conversions").await;
        assert_eq!(refused_by(&two.acme, &bad).await, (rules.clone(), allowed), "{bad:?}");
        let error =
            is_kind(two.acme.conversions().authorise(&bad).await.unwrap().entry(), ErrorKind::QuoteMismatch);
        let names: Vec<_> = rules.iter().map(|rule| rule.as_str()).collect();
        assert_eq!((error.conflicting_fields(), error.is_retryable()), (names.as_slice(), false));
        assert_eq!(two.count("conversions").await, before, "nothing was written");
        let entry = settled(&two.acme, &bad).await;
        assert_eq!(
            (entry.quote_mismatch, &entry.flags, entry.is_settled),
            (Some(true), &rules, true),
            "{bad:?}"
        );
    }
    // What no ledger takes is named.
    let ledger = two.acme.conversions();
    for (bad, field) in [
        (sale(usd("-1")), "revenue"),
        (sale(usd("1")).discount(usd("-1")), "discount"),
        (sale(usd("1")).discount(eur("1")), "discount"),
        (sale(usd("1")).tax(eur("1")), "tax"),
        (sale(usd("1")).list_price(usd("-1")), "list_price"),
        (sale(usd("1")).proration(eur("0")), "proration"),
        (sale(usd("1")).quantity(0), "quantity"),
        (sale(usd("1")).quantity(u32::MAX), "quantity"),
        (sale(usd("1")).item(""), "item"),
        (sale(usd("1")).item("a\0"), "item"),
        (NewConversion::refund(order("o"), usd("-1"), new_key()), "revenue"),
        (NewConversion::refund(order("o"), usd("1"), new_key()).quantity(2), "quantity"),
        (NewConversion::refund(order("o"), usd("1"), new_key()).discount(usd("1")), "discount"),
        (
            NewConversion::chargeback(order("o"), usd("1"), new_key()).subscription(subscription("s")),
            "subscription_id",
        ),
        (NewConversion::trial_start(id, user(1), subscription("s"), new_key()).tax(usd("1")), "tax"),
    ] {
        refused(ledger.settle(&bad).await, field);
        refused(ledger.authorise(&bad).await, field);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_sale_without_a_quote_assigns_in_its_own_transaction() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await;
    let id = experiment.id;
    let ledger = two.acme.conversions();
    let entry = settled(&two.acme, &sale(id, 1, "29").order(order("o1"))).await;
    let quote = two.acme.assignments().get(id, &user(1)).await.unwrap().unwrap();
    assert_eq!((quote.reason, entry.reason), (AssignmentReason::Late, Some(AssignmentReason::Late)));
    assert_eq!((&entry.variant, entry.list_price), (&quote.variant, Some(quote.price)));
    assert_eq!(entry.quote_mismatch, Some(quote.price != usd("29")));
    // As the hash says, and as the memory does.
    let assigner = two.client.assigner(two.id).await.unwrap();
    assert_eq!(assigner.assign("x", &user(1)).unwrap().variant(), quote.variant);
    assert!(matches!(
        ledger.settle(&sale(id, 1, "29").order(order("o1"))).await.unwrap(),
        ConversionOutcome::Duplicate(_)
    ));

    // Whoever asks first may pay what the hash says; another amount is refused, and nothing is stored by that.
    let wrong = sale(id, 2, "1");
    let (rules, allowed) = refused_by(&two.acme, &wrong).await;
    assert_eq!(two.acme.assignments().get(id, &user(2)).await.unwrap(), None);
    assert_eq!(rules, [LedgerRule::Net]);
    let right = NewConversion::sale(id, user(2), allowed.unwrap(), key("right"));
    assert!(matches!(ledger.authorise(&right).await.unwrap(), ConversionOutcome::Recorded(_)));
    let quote = two.acme.assignments().get(id, &user(2)).await.unwrap().unwrap();
    assert_eq!((quote.reason, Some(quote.price)), (AssignmentReason::Late, allowed));

    // A batch of users with and without, of experiments that are there and not.
    assign(&two.acme, id, 10..12).await;
    let other = active(&two.acme, "y").await.id;
    let batch = [
        sale(id, 10, "29"),
        sale(id, 20, "29"),
        sale(other, 20, "29").order(order("o2")),
        NewConversion::sale(other, user(21), usd("29"), key("21")),
        NewConversion::sale(lastprice::ExperimentId::new(), user(21), usd("29"), key("nowhere")),
        sale(id, 11, "29"),
    ];
    let outcomes = ledger.settle_many(&batch).await.unwrap();
    let reasons: Vec<_> = outcomes
        .iter()
        .map(|o| match o {
            ConversionOutcome::Recorded(entry) => entry.reason.unwrap().as_str(),
            ConversionOutcome::Conflict { fields, .. } => fields[0],
            _ => "-",
        })
        .collect();
    // `charge:20` is a key twice: the first one stands.
    assert_eq!(reasons, ["randomised", "late", "experiment_id", "late", "-", "randomised"]);

    // Whom the experiment does not take: at the price that everyone outside sees, in the ledger, in no metric.
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    two.acme.experiments().pause(id).await.unwrap();
    let entry = settled(&two.acme, &NewConversion::sale(id, user(50), usd("29"), key("outside"))).await;
    assert_eq!((entry.reason, entry.variant.as_str(), entry.quote_mismatch), (None, "29", Some(false)));
    assert!(two.acme.assignments().get(id, &user(50)).await.unwrap().is_none());
    let wrong = NewConversion::sale(id, user(51), usd("19"), key("outside 2"));
    assert_eq!(refused_by(&two.acme, &wrong).await, (vec![LedgerRule::Net], Some(usd("29"))));
    assert_eq!(settled(&two.acme, &wrong).await.flags, [LedgerRule::Net]);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap(), counts);
    assert!(matches!(ledger.settle(&wrong).await.unwrap(), ConversionOutcome::Duplicate(_)));
    // A refund of it is outside as well.
    let entry =
        settled(&two.acme, &NewConversion::sale(id, user(52), usd("29"), key("o3")).order(order("o3"))).await;
    let back = settled(&two.acme, &NewConversion::refund(order("o3"), usd("9"), key("r3"))).await;
    assert_eq!((back.reason, back.sale_id, &back.user_id), (None, Some(entry.id), &user(52)));
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap(), counts);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_promise_has_a_validity_and_is_given_anew() {
    let two = two_tenants().await;
    let new = new_experiment("x").quotes_valid_for(Duration::from_secs(3600));
    let draft = two.acme.experiments().create(new).await.unwrap();
    assert_eq!(draft.quote_validity, Some(Duration::from_secs(3600)));
    let edit = lastprice::ExperimentEdit::new().quotes_valid_for(Duration::from_secs(7200));
    let draft = two.acme.experiments().edit(draft.id, draft.revision, edit).await.unwrap();
    assert_eq!(draft.quote_validity, Some(Duration::from_secs(7200)));
    for bad in [Duration::ZERO, Duration::from_millis(1500), Duration::from_secs(400_000_000)] {
        refused(
            two.acme.experiments().create(new_experiment("y").quotes_valid_for(bad)).await,
            "quote_validity",
        );
    }
    let id = two.acme.experiments().activate(draft.id).await.unwrap().id;
    let first = two.acme.assignments().assign(id, &user(1)).await.unwrap().quote().unwrap().clone();
    let until = first.valid_until.unwrap();
    assert_eq!(until - first.assigned_at, TimeDelta::seconds(7200));

    let sale = |k: &str| NewConversion::sale(id, user(1), first.price, key(k));
    // Settled, by when it happened; authorised, by now, whatever is said.
    let late = sale("late").at(until + TimeDelta::microseconds(1));
    assert_eq!(settled(&two.acme, &late).await.flags, [LedgerRule::Expired]);
    assert_eq!(settled(&two.acme, &sale("in time").at(until)).await.flags, []);
    let run_out = "UPDATE assignments SET valid_until = now() - interval '1 second' WHERE tenant_id = $1";
    two.owner.execute(run_out, &[&two.id.uuid()]).await.unwrap();
    let dated_back = sale("dated back").at(first.assigned_at);
    assert_eq!(refused_by(&two.acme, &dated_back).await, (vec![LedgerRule::Expired], Some(first.price)));
    let restore = "UPDATE assignments SET valid_until = $2 WHERE tenant_id = $1";
    two.owner.execute(restore, &[&two.id.uuid(), &until]).await.unwrap();
    let in_time = sale("now");
    assert!(matches!(
        two.acme.conversions().authorise(&in_time).await.unwrap(),
        ConversionOutcome::Recorded(_)
    ));

    // Asked again while more than half is left, it is the same promise; later, it is given anew, at the same price.
    let again = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    assert_eq!(again.quote(), Some(&first));
    let age = "UPDATE assignments SET valid_until = now() + interval '59 minutes' WHERE tenant_id = $1";
    two.owner.execute(age, &[&two.id.uuid()]).await.unwrap();
    let looked_up = two.acme.assignments().get(id, &user(1)).await.unwrap().unwrap();
    assert!(looked_up.valid_until.unwrap() < until, "looking up promises nothing");
    two.acme.experiments().pause(id).await.unwrap();
    let anew = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    let anew = anew.quote().unwrap();
    assert!(anew.valid_until.unwrap() > Utc::now() + TimeDelta::seconds(7100), "{anew:?}");
    assert_eq!(
        (anew.price, &anew.variant, anew.assigned_at),
        (first.price, &first.variant, first.assigned_at)
    );
    assert_eq!(two.acme.assignments().get(id, &user(1)).await.unwrap().as_ref(), Some(anew));
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!(counts.assignments, 1, "a promise given anew is no other user");
    two.bystander_saw_nothing().await;
}

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

#[tokio::test]
async fn by_account_nobody_is_assigned_by_a_sale() {
    let two = two_tenants().await;
    let new = new_experiment("x").unit(lastprice::AssignmentUnit::Account);
    let draft = two.acme.experiments().create(new).await.unwrap();
    let id = two.acme.experiments().activate(draft.id).await.unwrap().id;
    // Under the user's id, where the account's is meant: at the price that everyone outside sees, and in no metric.
    for n in 0..20 {
        let new = NewConversion::sale(id, user(n), usd("29"), new_key());
        let outcome = two.acme.conversions().authorise(&new).await.unwrap();
        assert!(
            matches!(outcome, ConversionOutcome::Recorded(Conversion { reason: None, .. })),
            "{outcome:?}"
        );
        let other = NewConversion::sale(id, user(n), usd("19"), new_key());
        assert_eq!(refused_by(&two.acme, &other).await, (vec![LedgerRule::Net], Some(usd("29"))));
    }
    assert_eq!(two.count("assignments").await, 0);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap(), lastprice::MetricCounts::default());
    two.bystander_saw_nothing().await;
}
