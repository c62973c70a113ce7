//! Quote = charge: before the money moves, after it has moved, late, and too late.

use std::time::Duration;

use lastprice::chrono::{TimeDelta, Utc};
use lastprice::{
    AssignmentReason, Conversion, ConversionOutcome, Currency, ErrorKind, LedgerRule, Money, NewConversion,
    Variants,
};

use crate::support_ledger::*;
use crate::support_repo::*;

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
