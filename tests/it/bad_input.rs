//! Whatever is thrown at it: refused with the name of the field, or stored and read back as it was. Never a panic, and
//! never an error of the database.

use std::cell::Cell;
use std::time::Duration;

use lastprice::chrono::{DateTime, NaiveDate, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::serde_json::{Map, Value, json};
use lastprice::{
    Actor, AssignOutcome, Client, ConversionOutcome, Currency, ErrorKind, ExperimentEdit, ExperimentId,
    IdempotencyKey, Money, NewConversion, NewExperiment, NewRecommendation, NewTenant, NewUsage, NewView,
    Objective, OrderId, TenantChange, UserId, Variants, ViewOutcome,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support_repo::*;

/// Texts that have broken other programs.
const ODD: [&str; 14] = [
    " ",
    "'",
    "\"",
    "\\",
    "'; DROP TABLE tenants; --",
    "E'\\x27'",
    "$1 %s {s} ${x}",
    "\r\n\t\u{1b}[2J",
    "NULL",
    "日本語 ünï \u{1F468}\u{200D}\u{1F469}",
    "\u{FEFF}\u{202E}abc",
    "\u{FFFF}\u{10FFFF}",
    "{\"a\": [1]}",
    "-0.00e+5",
];

#[tokio::test]
async fn ids_and_keys_of_any_text() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let megabyte = "é".repeat(1 << 19);
    for bad in ["", "\0", "a\0", &megabyte] {
        let errors = [
            refused(UserId::new(bad), "user_id"),
            refused(IdempotencyKey::new(bad), "idempotency_key"),
            refused(OrderId::new(bad), "order_id"),
            refused(Actor::new(bad), "actor"),
            refused(two.acme.experiments().by_key(bad).await, "key"),
            refused(two.acme.experiments().create(new_experiment(bad)).await, "key"),
            refused(two.acme.usage().total(bad, today(), today()).await, "metric"),
            refused(two.client.create_tenant(NewTenant::managed("N", bad)).await, "email"),
            refused(two.client.create_tenant(NewTenant::byok("N", "n@n", bad)).await, "paid_api_key"),
            refused(two.acme.tenants().update(TenantChange::new().name(bad)).await, "name"),
        ];
        for error in errors {
            assert!(format!("{error} {error:?}").len() < 400, "an error repeats its input");
        }
    }
    for (n, odd) in ODD.into_iter().enumerate() {
        let user = UserId::new(odd).unwrap();
        let (key, order) = (IdempotencyKey::new(odd).unwrap(), OrderId::new(odd).unwrap());
        let outcome = two.acme.assignments().assign(id, &user).await.unwrap();
        assert_eq!(outcome.quote().unwrap().user_id, user);
        assert_eq!(two.acme.assignments().get(id, &user).await.unwrap().as_ref(), outcome.quote());
        let sale = NewConversion::sale(id, user.clone(), usd("1"), key.clone()).order(order.clone());
        let entry = two.acme.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        assert_eq!(
            (&entry.user_id, &entry.idempotency_key, &entry.order_id),
            (&user, &key, &Some(order.clone()))
        );
        assert_eq!(two.acme.conversions().by_key(&key).await.unwrap(), Some(entry.clone()));
        assert_eq!(
            two.acme.conversions().list_by_order(&order, 9, None).await.unwrap().items,
            std::slice::from_ref(&entry)
        );
        assert_eq!(two.acme.conversions().list_by_user(&user, 9, None).await.unwrap().items, [entry]);
        let view = NewView::new(id, user).metadata(json!({ odd: odd }));
        assert_eq!(two.acme.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
        two.acme.usage().add(&NewUsage::new("m", today(), 1, key)).await.unwrap();
        assert_eq!(two.acme.usage().total("m", today(), today()).await.unwrap(), n as u64 + 1);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn actors_names_winners_and_baselines_of_any_text() {
    let two = two_tenants().await;
    let id = draft(&two.acme, "x").await.id;
    for (n, odd) in ODD.into_iter().enumerate() {
        let scope = two.client.tenant(two.id).with_actor(Actor::new(odd).unwrap());
        let changed = scope.tenants().update(TenantChange::new().byok(odd)).await.unwrap();
        assert_eq!(changed.updated_by.as_deref(), Some(odd));
        assert_eq!(own_key(&scope).await.as_deref(), Some(odd));
        let renamed = scope.tenants().update(TenantChange::new().name(odd)).await;
        match odd.trim() {
            "" => drop(refused(renamed, "name")),
            _ => assert_eq!(renamed.unwrap().name, odd),
        }
        refused(scope.experiments().edit(id, 1, ExperimentEdit::new().baseline(odd)).await, "baseline");
        refused(scope.experiments().create(new_experiment("y").baseline(odd)).await, "baseline");

        // As the name of a variant it may be baseline and winner.
        let variants = Variants::new().add(odd, 1, 1).add("other", 1, 2).book(odd, odd, usd("3"));
        let new = NewExperiment::new(format!("odd-{n}"), "Odd", Currency::USD, variants).baseline(odd);
        match scope.experiments().create(new).await {
            Err(e) => {
                assert!(odd.contains(char::is_control), "{odd:?}");
                refused::<()>(Err(e), "variants");
            }
            Ok(created) => {
                assert_eq!((created.baseline.as_str(), created.updated_by.as_deref()), (odd, Some(odd)));
                assert_eq!(created.variants[0].book.price(odd, Currency::USD), Some(usd("3")));
                scope.experiments().activate(created.id).await.unwrap();
                assign(&scope, created.id, 0..20).await;
                let metrics = scope.metrics().by_variant(created.id).await.unwrap();
                assert!(metrics[0].variant == odd && metrics[0].counts.assignments > 0, "{metrics:?}");
                let done = scope.experiments().complete(created.id, Some(odd)).await.unwrap();
                assert_eq!(done.winner.as_deref(), Some(odd));
            }
        }
    }
    two.bystander_saw_nothing().await;
}

/// `levels` objects in each other.
fn nested(levels: usize) -> Value {
    (1..levels).fold(json!({}), |inner, _| Value::Object(Map::from_iter([("a".to_owned(), inner)])))
}

#[tokio::test]
async fn metadata_of_any_form() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let draft = draft(&two.acme, "draft").await.id;
    assign(&two.acme, id, 0..5).await;
    let many: Map<String, Value> = (0..4000).map(|n| (format!("k{n}"), json!(n))).collect();
    let good = [
        json!({}),
        nested(100),
        Value::Object(many),
        json!({"text": "x".repeat(65_000)}),
        json!({"floats": [0.1 + 0.2, 5e-324, f64::MAX, -1.5e-7, 1.7976931348623157e308, 123456789.12345679, 2.2250738585072014e-308]}),
        json!({"integers": [u64::MAX, i64::MIN, 0, -1]}),
        json!({"": {"\\": ["\"", "'", "\u{1}", "\u{7f}", "\\u0000", "é\u{1F600}"]}}),
    ];
    for metadata in good {
        let changed =
            two.acme.tenants().update(TenantChange::new().metadata(metadata.clone())).await.unwrap();
        assert_eq!(changed.metadata, metadata);
        let edit = ExperimentEdit::new().metadata(metadata.clone());
        let revision = two.acme.experiments().get(draft).await.unwrap().unwrap().revision;
        assert_eq!(two.acme.experiments().edit(draft, revision, edit).await.unwrap().metadata, metadata);
        let new = NewRecommendation::new(id, usd("1"), 0.5, Objective::Revenue).simulation(metadata.clone());
        assert_eq!(two.acme.recommendations().store(&new).await.unwrap().simulation, metadata);
        let new =
            NewConversion::sale(id, user(1), usd("1"), key(&two.count("conversions").await.to_string()));
        let outcome = two.acme.conversions().settle(&new.metadata(metadata.clone())).await.unwrap();
        assert_eq!(outcome.entry().unwrap().unwrap().metadata, metadata);
        let view = NewView::new(id, user(1)).metadata(metadata);
        assert_eq!(two.acme.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
    }
    let bad = [
        Value::Null,
        json!([]),
        json!("{}"),
        json!(1.5),
        json!({"a\0": 1}),
        json!({"a": {"b": [{"c": "x\0y"}]}}),
        json!({"text": "x".repeat(66_000)}),
        json!({"text": "\u{1}".repeat(20_000)}), // six bytes each, written out
        nested(101),
        nested(130),
        nested(300),
    ];
    for metadata in bad {
        let new = NewTenant::managed("N", "n@n.example").metadata(metadata.clone());
        refused(two.client.create_tenant(new).await, "metadata");
        refused(two.acme.tenants().update(TenantChange::new().metadata(metadata.clone())).await, "metadata");
        refused(
            two.acme.experiments().create(new_experiment("y").metadata(metadata.clone())).await,
            "metadata",
        );
        let edit = ExperimentEdit::new().metadata(metadata.clone());
        refused(two.acme.experiments().edit(draft, 1, edit).await, "metadata");
        let view = NewView::new(id, user(1)).metadata(metadata.clone());
        refused(two.acme.views().record(&view).await, "metadata");
        let sale = sale(id, 1, "1").metadata(metadata.clone());
        refused(two.acme.conversions().settle(&sale).await, "metadata");
        if metadata != json!([]) {
            let new = NewRecommendation::new(id, usd("1"), 0.5, Objective::Revenue).simulation(metadata);
            refused(two.acme.recommendations().store(&new).await, "simulation");
        }
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn times_and_days_at_the_end_of_the_calendar() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
    let last = "9999-12-31T23:59:59.999999Z";
    for bad in [
        DateTime::<Utc>::MIN_UTC,
        DateTime::<Utc>::MAX_UTC,
        at("1969-12-31T23:59:59.999Z"),
        at("+10000-01-01T00:00:00Z"),
    ] {
        refused(two.acme.views().record(&NewView::new(id, user(1)).at(bad)).await, "occurred_at");
        refused(two.acme.conversions().settle(&sale(id, 1, "1").at(bad)).await, "occurred_at");
        let day = bad.date_naive();
        refused(two.acme.usage().add(&NewUsage::new("m", day, 1, key("k"))).await, "day");
        for (from, to, field) in [(day, today(), "from"), (today(), day, "to")] {
            refused(two.acme.usage().total("m", from, to).await, field);
            refused(two.acme.usage().by_day("m", from, to).await, field);
            refused(two.acme.metrics().by_day(id, from, to).await, field);
        }
    }
    for (n, good) in ["1970-01-01T00:00:00Z", last, "2024-02-29T12:00:00.000001Z"].into_iter().enumerate() {
        let new = NewConversion::sale(id, user(n), usd("1"), key(good)).at(at(good));
        let entry = two.acme.conversions().settle(&new).await.unwrap().entry().unwrap().unwrap();
        assert_eq!(entry.occurred_at, at(good));
        two.acme.views().record(&NewView::new(id, user(n)).at(at(good))).await.unwrap();
        let day = at(good).date_naive();
        let days = two.acme.metrics().by_day(id, day, day).await.unwrap();
        assert_eq!((days.len(), days[0].counts.views, days[0].counts.conversions), (1, 1, 1));
        two.acme.usage().add(&NewUsage::new("m", day, 2, key(good))).await.unwrap();
    }
    let (from, to) =
        (NaiveDate::from_ymd_opt(1970, 1, 1).unwrap(), NaiveDate::from_ymd_opt(9999, 12, 31).unwrap());
    assert_eq!(two.acme.usage().total("m", from, to).await.unwrap(), 6);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn amounts_of_any_size() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    for bad in [
        "",
        "NaN",
        "inf",
        "1e3",
        "1,5",
        "0x10",
        "1.0000001",
        "1000000000000",
        "-1000000000000",
        &"9".repeat(400),
    ] {
        refused(Money::new(bad, "USD"), "amount");
    }
    refused(Money::new(&format!("0.1{}1", "0".repeat(40)), "USD"), "amount"); // not rounded
    refused(Money::of(Decimal::MAX, Currency::USD), "amount");
    refused(Money::of(Decimal::MIN, Currency::USD), "amount");
    refused(Money::of(Decimal::new(1, 28), Currency::USD), "amount");
    let with = |revenue| NewConversion::sale(id, user(1), revenue, key("bad"));
    for revenue in [
        usd("-0.000001"),
        Money::from_minor(-1, Currency::JPY),
        Money::from_minor(i64::MAX, Currency::JPY),
        Money::from_minor(i64::MIN, Currency::JPY),
        Money::from_minor(100_000_000_000_000, Currency::USD),
    ] {
        refused(two.acme.conversions().settle(&with(revenue)).await, "revenue");
    }
    for (n, good) in
        ["0", "-0", "0.000001", "999999999999.999999", "000012.50", "0.10000000"].into_iter().enumerate()
    {
        let new = NewConversion::sale(id, user(n % 5), usd(good), key(&format!("good {n}")));
        let entry = two.acme.conversions().settle(&new).await.unwrap().entry().unwrap().unwrap();
        assert_eq!(entry.revenue, usd(good));
        assert_eq!(entry.revenue.to_string(), usd(good).to_string());
    }
    let sum = two.acme.metrics().experiment(id).await.unwrap().revenue(Currency::USD);
    assert_eq!(sum.to_string(), "1000000000012.600000 USD");
    refused(two.acme.conversions().settle(&with(sum)).await, "revenue"); // a sum is no price
    for limit in [0, 1001, u32::MAX] {
        refused(two.acme.experiments().list(None, limit, None).await, "limit");
    }
    refused("x'; --".parse::<lastprice::Cursor>(), "after");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_refused_leaves_the_transaction_usable() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let transaction = two.acme.begin().await.unwrap();
    transaction.assignments().assign(id, &user(1)).await.unwrap();
    refused(transaction.conversions().settle(&sale(id, 1, "-1")).await, "revenue");
    refused(transaction.views().record(&NewView::new(id, user(1)).metadata(json!(1))).await, "metadata");
    refused(transaction.experiments().complete(id, Some("none")).await, "winner");
    refused(transaction.experiments().list(None, 0, None).await, "limit");
    // Nor does what is told as an outcome, or as "not found" or "conflict".
    is_kind(transaction.experiments().activate(id).await, ErrorKind::Conflict);
    is_kind(transaction.experiments().pause(ExperimentId::new()).await, ErrorKind::NotFound);
    is_kind(transaction.experiments().create(new_experiment("x")).await, ErrorKind::Conflict);
    let unknown = NewRecommendation::new(ExperimentId::new(), usd("1"), 0.5, Objective::Revenue);
    is_kind(transaction.recommendations().store(&unknown).await, ErrorKind::NotFound);
    let unknown = transaction.conversions().settle(&sale(ExperimentId::new(), 1, "1")).await.unwrap();
    assert_eq!(unknown, ConversionOutcome::Unknown);
    let wrong = transaction.conversions().authorise(&sale(id, 1, "1")).await.unwrap();
    assert!(matches!(wrong, ConversionOutcome::Refused(_)));
    let sold = transaction.conversions().settle(&sale(id, 1, "29")).await.unwrap();
    assert!(matches!(sold, ConversionOutcome::Recorded(_)));
    let other = transaction.conversions().settle(&sale(id, 1, "30")).await.unwrap();
    assert!(matches!(other, ConversionOutcome::Conflict { .. }));
    transaction.commit().await.unwrap();
    assert_eq!((two.count("assignments").await, two.count("conversions").await), (1, 1));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn errors_know_no_secret() {
    let two = two_tenants().await;
    let client = Client::builder()
        .url("postgres://ann:hunter2@127.0.0.1:1/shop")
        .connect_timeout(Duration::from_secs(2));
    let shown = format!("{client:?}");
    let client = client.build().unwrap();
    let error = is_kind(client.tenant(two.id).tenants().get().await, ErrorKind::Unavailable);
    let source = std::error::Error::source(&error).map(ToString::to_string);
    let shown = format!("{shown} {client:?} {error} {error:?} {source:?}");
    assert!(!shown.contains("hunter2"), "{shown}");

    // A constraint that somebody added: the server's own words would quote the row.
    let sql = "ALTER TABLE tenants ADD CONSTRAINT no_pro CHECK (plan <> 'pro')";
    two.owner.batch_execute(sql).await.unwrap();
    let change = TenantChange::new().byok("s3cret key").name("s3cret name").plan(lastprice::Plan::Pro);
    let error = is_kind(two.acme.tenants().update(change).await, ErrorKind::InvalidInput);
    let shown = format!("{error} {error:?} {:?}", std::error::Error::source(&error).unwrap().to_string());
    assert!(shown.contains("no_pro") && !shown.contains("s3cret"), "{shown}");
    two.bystander_saw_nothing().await;
}

/// Any characters, mostly few, NUL and controls now and then.
fn text(max: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(any::<char>(), 0..max).prop_map(String::from_iter)
}

fn amount() -> impl Strategy<Value = String> {
    prop_oneof![
        (0u64..1_000_000_000_000, 0u32..7)
            .prop_map(|(units, scale)| Decimal::new(units as i64, scale).to_string()),
        (any::<i64>(), 0u32..29).prop_map(|(units, scale)| Decimal::new(units, scale).to_string()),
        any::<f64>().prop_map(|f| f.to_string()),
        text(8),
    ]
}

#[test]
fn random_input_is_refused_or_stored() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let two = runtime.block_on(two_tenants());
    let fixed = runtime.block_on(active(&two.acme, "fixed")).id;
    let (stored, turned_down) = (Cell::new(0u32), Cell::new(0u32));
    let arms = prop::collection::vec((text(6), any::<u32>(), amount()), 2..4);
    let inputs = (arms, text(6), text(20), amount(), text(12));
    let mut runner = TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    let count =
        |good: bool| if good { stored.set(stored.get() + 1) } else { turned_down.set(turned_down.get() + 1) };
    let result = runner.run(&inputs, |(arms, item, id, price, name)| {
        runtime.block_on(async {
            let refused = |e: lastprice::Error| {
                prop_assert_eq!(e.kind(), ErrorKind::InvalidInput, "{:?}", e);
                count(false);
                Ok(())
            };
            // An experiment, read back to the digit.
            let mut variants =
                arms.iter().fold(Variants::new(), |v, (name, w, p)| v.add(name.clone(), *w, p));
            let book = Money::new(&price, "EUR");
            if let Ok(book) = book {
                variants = variants.book(arms[0].0.clone(), item.clone(), book);
            }
            let new =
                NewExperiment::new(ExperimentId::new().to_string(), name.clone(), Currency::USD, variants)
                    .metadata(json!({ item.as_str(): name }));
            let mut experiment = fixed;
            match two.acme.experiments().create(new).await {
                Err(e) => refused(e)?,
                Ok(created) => {
                    let read = two.acme.experiments().get(created.id).await.unwrap().unwrap();
                    prop_assert_eq!(&read.name, &name);
                    for (variant, (name, weight, price)) in read.variants.iter().zip(&arms) {
                        prop_assert_eq!((&variant.name, variant.weight), (name, *weight));
                        prop_assert_eq!(variant.price, Decimal::from_str_exact(price).unwrap());
                    }
                    prop_assert_eq!(read.variants[0].book.price(&item, Currency::EUR), book.ok());
                    two.acme.experiments().activate(created.id).await.unwrap();
                    experiment = created.id;
                    count(true);
                }
            }
            // A user and a sale.
            let user = match UserId::new(id.clone()) {
                Err(e) => return refused(e),
                Ok(user) => user,
            };
            let outcome = two.acme.assignments().assign(experiment, &user).await.unwrap();
            let AssignOutcome::Assigned { quote, .. } = &outcome else { unreachable!("{outcome:?}") };
            prop_assert_eq!(quote.user_id.as_str(), id.as_str());
            let read = two.acme.assignments().get(experiment, &user).await.unwrap();
            prop_assert_eq!(read.as_ref(), Some(quote));
            let revenue = match Money::new(&price, "USD") {
                Err(e) => return refused(e),
                Ok(revenue) => revenue,
            };
            let key = IdempotencyKey::new(format!("{experiment}{id}")).unwrap();
            let new =
                NewConversion::sale(experiment, user, revenue, key.clone()).metadata(json!({ name: item }));
            match two.acme.conversions().settle(&new).await {
                Err(e) => refused(e)?,
                Ok(outcome) => {
                    let Ok(entry) = outcome.entry() else { return Ok(()) }; // one id twice at `fixed`
                    let read = two.acme.conversions().by_key(&key).await.unwrap();
                    prop_assert_eq!(read.as_ref(), entry.as_ref());
                    count(true);
                }
            }
            Ok(())
        })
    });
    result.unwrap();
    assert!(stored.get() > 20 && turned_down.get() > 20, "{stored:?} stored, {turned_down:?} refused");
    runtime.block_on(two.bystander_saw_nothing());
}
