//! What happened: views, sales, usage, and what was recommended.

use lastprice::chrono::{DateTime, NaiveDate, Utc};
use lastprice::serde_json::json;
use lastprice::uuid::Uuid;
use lastprice::{
    ConversionKind, ConversionOutcome, Currency, ErrorKind, ExperimentId, Money, NewConversion,
    NewRecommendation, NewUsage, NewView, Objective, OrderId, UsageOutcome, ViewOutcome,
};

use crate::support_repo::*;

use ViewOutcome::{Duplicate, NotAssigned, Recorded};

#[tokio::test]
async fn a_view_counts_once() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let views = two.acme.views();
    let at = "2024-02-29T23:59:59.999999Z".parse::<DateTime<Utc>>().unwrap();
    let view = NewView::new(id, user(1)).at(at).metadata(json!({"page": "/pricing\\ \"x\""}));
    assert_eq!(views.record(&view).await.unwrap(), Recorded);
    assert_eq!(views.record(&view).await.unwrap(), Duplicate);
    let sql = "SELECT v.variant = a.variant AND v.phase = a.phase AND v.reason = a.reason, v.occurred_at, v.metadata ->> 'page'
               FROM views v JOIN assignments a USING (tenant_id, experiment_id, user_id) WHERE v.tenant_id = $1";
    let row = two.owner.query_one(sql, &[&two.id.uuid()]).await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), (true, at, "/pricing\\ \"x\""));

    // Who has no assignment views nothing, until there is one.
    let early = NewView::new(id, user(77));
    assert_eq!(views.record(&early).await.unwrap(), NotAssigned);
    assign(&two.acme, id, 77..78).await;
    assert_eq!(views.record(&early).await.unwrap(), Recorded);
    // A stored assignment goes on to view whatever becomes of the experiment.
    two.acme.experiments().complete(id, None).await.unwrap();
    assert_eq!(views.record(&NewView::new(id, user(2))).await.unwrap(), Recorded);
    assert_eq!(two.count("views").await, 3);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 3);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn views_of_a_batch_in_their_order() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let views = two.acme.views();
    let view = |n: u128, who| NewView::new(id, user(who)).id(Uuid::from_u128(n).into());
    // Descending ids: the statement sorts them, the outcomes are not.
    let batch = [view(9, 1), view(8, 99), view(7, 2), view(9, 1), view(6, 3), view(8, 99)];
    let outcomes = views.record_many(&batch).await.unwrap();
    assert_eq!(outcomes, [Recorded, NotAssigned, Recorded, Duplicate, Recorded, NotAssigned]);
    let batch = [view(5, 1), view(9, 1), view(8, 4), view(7, 99), NewView::new(ExperimentId::new(), user(1))];
    let outcomes = views.record_many(&batch).await.unwrap();
    assert_eq!(outcomes, [Recorded, Duplicate, Recorded, Duplicate, NotAssigned]);
    // One id for two users: the first who has an assignment is the one that is written.
    let outcomes = views.record_many(&[view(4, 99), view(4, 3), view(4, 2)]).await.unwrap();
    assert_eq!(outcomes, [Duplicate, Recorded, Duplicate]);
    for _ in 0..5 {
        let n = Uuid::now_v7().as_u128();
        assert_eq!(views.record_many(&[view(n, 3), view(n, 1)]).await.unwrap(), [Recorded, Duplicate]);
        let sql = "SELECT user_id FROM views WHERE tenant_id = $1 AND id = $2";
        let row = two.owner.query_one(sql, &[&two.id.uuid(), &Uuid::from_u128(n)]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "user-3");
    }
    assert_eq!(views.record_many(&[]).await.unwrap(), []);
    let many: Vec<NewView> = (0..1001).map(|n| NewView::new(id, user(n % 5))).collect();
    refused(views.record_many(&many).await, "views");
    assert!(views.record_many(&many[..1000]).await.unwrap().iter().all(|o| *o == Recorded));
    assert_eq!(two.count("views").await, 1011);
    // One bad view, and nothing of its batch is written.
    let bad = [view(1, 1), view(2, 1).at(DateTime::<Utc>::MAX_UTC)];
    refused(views.record_many(&bad).await, "occurred_at");
    assert_eq!(two.count("views").await, 1011);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 1011);
    // Ids belong to a tenant: the other one has its own.
    assert_eq!(two.globex.views().record(&view(9, 1)).await.unwrap(), NotAssigned);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_sale_counts_once() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let (ledger, order) = (two.acme.conversions(), OrderId::new("o '1' \\").unwrap());
    let at = "2024-01-01T00:00:00.000001Z".parse::<DateTime<Utc>>().unwrap();
    let new = NewConversion::sale(id, user(1), usd("19.9"), key("k \"1\" ✓")).order(order.clone()).at(at);
    let new = new.metadata(json!({"plan": "pro"}));
    let ConversionOutcome::Recorded(entry) = ledger.settle(&new).await.unwrap() else { panic!() };
    assert_eq!((entry.experiment_id, &entry.user_id, entry.kind), (id, &user(1), ConversionKind::Sale));
    assert_eq!(
        (entry.revenue.to_string(), entry.order_id.clone()),
        ("19.9 USD".to_owned(), Some(order.clone()))
    );
    assert_eq!((entry.occurred_at, &entry.metadata["plan"]), (at, &json!("pro")));
    let quote = two.acme.assignments().get(id, &user(1)).await.unwrap().unwrap();
    assert_eq!(entry.variant, quote.variant);
    assert_eq!(ledger.by_key(&entry.idempotency_key).await.unwrap().as_ref(), Some(&entry));

    // The same event again, from another process, later, with another spelling of the amount.
    let again = NewConversion::sale(id, user(1), usd("19.90"), key("k \"1\" ✓")).order(order.clone());
    assert_eq!(ledger.settle(&again).await.unwrap(), ConversionOutcome::Duplicate(entry.clone()));
    assert_eq!(ledger.settle(&new).await.unwrap().entry().unwrap().unwrap(), entry);

    // Other content under the key is named, field by field, and changes nothing.
    let other = active(&two.acme, "y").await.id;
    assign(&two.acme, other, 0..5).await;
    let k = || key("k \"1\" ✓");
    let eur = Money::new("19.9", "EUR").unwrap();
    let cases = [
        (NewConversion::sale(id, user(1), usd("19.91"), k()).order(order.clone()), vec!["revenue"]),
        (NewConversion::sale(id, user(1), eur, k()).order(order.clone()), vec!["currency"]),
        (NewConversion::sale(id, user(2), usd("19.9"), k()).order(order.clone()), vec!["user_id"]),
        (NewConversion::sale(other, user(1), usd("19.9"), k()).order(order.clone()), vec!["experiment_id"]),
        (NewConversion::sale(id, user(1), usd("19.9"), k()), vec!["order_id"]),
        (
            NewConversion::sale(other, user(2), usd("0"), k()),
            vec!["experiment_id", "user_id", "revenue", "order_id"],
        ),
        (NewConversion::sale(id, user(99), usd("19.9"), k()).order(order), vec!["user_id"]),
    ];
    for (sale, expected) in cases {
        let outcome = ledger.settle(&sale).await.unwrap();
        let ConversionOutcome::Conflict { stored, fields } = &outcome else { panic!("{outcome:?}") };
        assert_eq!((stored.as_deref(), fields), (Some(&entry), &expected));
        let error = is_kind(outcome.entry(), ErrorKind::Conflict);
        assert_eq!(error.conflicting_fields(), expected);
        assert!(!format!("{error:?}").contains("19.9"), "{error:?}");
    }
    let nobody = ledger.settle(&sale(ExperimentId::new(), 1, "1")).await.unwrap();
    assert_eq!(nobody, ConversionOutcome::Unknown);
    is_kind(nobody.entry(), ErrorKind::NotFound);
    assert_eq!(two.count("conversions").await, 1);
    // The key is the tenant's: the other one's `charge:0` is another sale than ours, in both directions.
    ledger.settle(&sale(id, 0, "5")).await.unwrap().entry().unwrap().unwrap();
    let charge = ledger.by_key(&key("charge:0")).await.unwrap().unwrap();
    assert_eq!(charge.revenue, usd("5"));
    let theirs = two.globex.conversions().by_key(&key("charge:0")).await.unwrap().unwrap();
    assert_eq!(theirs.revenue, usd("1234.50"));
    assert_eq!(two.globex.conversions().by_key(&k()).await.unwrap(), None);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn sales_of_a_batch_in_their_order() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let ledger = two.acme.conversions();
    let names = |outcomes: &[ConversionOutcome]| -> Vec<&'static str> {
        let name = |o: &ConversionOutcome| match o {
            ConversionOutcome::Recorded(_) => "recorded",
            ConversionOutcome::Duplicate(_) => "duplicate",
            ConversionOutcome::Conflict { .. } => "conflict",
            _ => "unknown",
        };
        outcomes.iter().map(name).collect()
    };
    // One value twice, as a retry queue has it, and one key with other content.
    let one = sale(id, 1, "19");
    let batch = [
        one.clone(),
        one.clone(),
        sale(id, 1, "19.00"),
        sale(id, 1, "20"),
        sale(ExperimentId::new(), 4, "1"),
        sale(id, 0, "7"),
    ];
    let outcomes = ledger.settle_many(&batch).await.unwrap();
    assert_eq!(names(&outcomes), ["recorded", "duplicate", "duplicate", "conflict", "unknown", "recorded"]);
    let outcomes = ledger.settle_many(&batch).await.unwrap();
    assert_eq!(names(&outcomes), ["duplicate", "duplicate", "duplicate", "conflict", "unknown", "duplicate"]);
    // The first of a key is the one that is written, whenever the values were made.
    for n in 100..110 {
        let made = |amount| NewConversion::sale(id, user(2), usd(amount), key(&format!("n{n}")));
        let (early, late) = (made("1"), made("2"));
        let outcomes =
            ledger.settle_many(&[late.clone(), early, late.order(OrderId::new("o").unwrap())]).await.unwrap();
        assert_eq!(names(&outcomes), ["recorded", "conflict", "conflict"]);
        let stored = ledger.by_key(&key(&format!("n{n}"))).await.unwrap().unwrap();
        assert_eq!((stored.revenue, stored.order_id), (usd("2"), None));
    }
    assert_eq!(names(&ledger.settle_many(&[]).await.unwrap()), [""; 0]);
    let many: Vec<NewConversion> = (0..1001)
        .map(|n| NewConversion::sale(id, user(n % 5), usd("1"), key(&format!("many {n}"))))
        .collect();
    refused(ledger.settle_many(&many).await, "entries");
    assert_eq!(two.count("conversions").await, 12);
    let outcomes = ledger.settle_many(&many[..1000]).await.unwrap();
    assert!(outcomes.iter().all(|o| matches!(o, ConversionOutcome::Recorded(_))));
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().revenue(Currency::USD), usd("1046"));
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_deliveries_of_the_same_sales() {
    let two = two_tenants().await;
    let id = active(&two.acme, "race").await.id;
    assign(&two.acme, id, 0..100).await;
    let deliveries = (0..16usize).map(|n| {
        let (client, tenant) = (two.client.clone(), two.id);
        tokio::spawn(async move {
            let tenant = client.tenant(tenant);
            // Made anew by each process, shuffled differently (37 and 100 have no common divisor).
            let mut sales: Vec<NewConversion> =
                (0..100).map(|i| (i * 37 + n * 11) % 100).map(|i| sale(id, i, &format!("{i}.01"))).collect();
            if n % 2 == 0 {
                sales.reverse();
            }
            let mut recorded = 0;
            for batch in sales.chunks(if n % 4 == 0 { 100 } else { 1 + n }) {
                for outcome in tenant.conversions().settle_many(batch).await.unwrap() {
                    match outcome {
                        ConversionOutcome::Recorded(_) => recorded += 1,
                        ConversionOutcome::Duplicate(_) => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
            recorded
        })
    });
    let recorded: usize =
        futures_util::future::join_all(deliveries).await.into_iter().map(|joined| joined.unwrap()).sum();
    assert_eq!((recorded, two.count("conversions").await), (100, 100));
    let counts = two.acme.metrics().experiment(id).await.unwrap();
    assert_eq!((counts.conversions, counts.revenue(Currency::USD)), (100, usd("4951.00")));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn the_ledger_by_user_and_order_in_pages() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let order = OrderId::new("order-0").unwrap(); // Globex has one of this name
    let new =
        |n: usize| NewConversion::sale(id, user(n % 2), usd("1"), key(&format!("k{n}"))).order(order.clone());
    let sales: Vec<NewConversion> = (0..7).map(new).collect();
    for sale in &sales {
        two.acme.conversions().settle(sale).await.unwrap().entry().unwrap().unwrap();
    }
    let ledger = two.acme.conversions();
    for limit in [1, 2, 3, 1000] {
        let (mut of_user, mut of_order, mut after) = (Vec::new(), Vec::new(), None);
        loop {
            let page = ledger.list_by_user(&user(0), limit, after).await.unwrap();
            of_user.extend(page.items.into_iter().map(|c| c.idempotency_key.to_string()));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        loop {
            let page = ledger.list_by_order(&order, limit, after).await.unwrap();
            of_order.extend(page.items.into_iter().map(|c| c.idempotency_key.to_string()));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(
            (of_user.join(" "), of_order.join(" ")),
            ("k0 k2 k4 k6".into(), "k0 k1 k2 k3 k4 k5 k6".into())
        );
    }
    for limit in [0, 1001] {
        refused(ledger.list_by_user(&user(0), limit, None).await, "limit");
        refused(ledger.list_by_order(&order, limit, None).await, "limit");
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn usage_adds_up_by_day() {
    let two = two_tenants().await;
    let usage = two.acme.usage();
    let day = |n| NaiveDate::from_ymd_opt(2024, 2, n).unwrap();
    let new = |n, amount, k: &str| NewUsage::new("api_calls", day(n), amount, key(k));
    assert_eq!(usage.add(&new(28, 5, "charge:0")).await.unwrap(), UsageOutcome::Added);
    assert_eq!(usage.add(&new(28, 5, "charge:0")).await.unwrap(), UsageOutcome::Duplicate);
    for (again, fields) in [
        (new(28, 6, "charge:0"), vec!["amount"]),
        (new(29, 5, "charge:0"), vec!["day"]),
        (new(29, 0, "charge:0"), vec!["day", "amount"]),
    ] {
        assert_eq!(is_kind(usage.add(&again).await, ErrorKind::Conflict).conflicting_fields(), fields);
    }
    usage.add(&new(28, 1_000_000_000_000, "b")).await.unwrap();
    usage.add(&new(29, 0, "c")).await.unwrap();
    usage.add(&new(1, 2, "d")).await.unwrap();
    // The key counts once for the metric: another metric has its own.
    let seats = NewUsage::new("seats.max_1", day(28), 3, key("charge:0"));
    assert_eq!(usage.add(&seats).await.unwrap(), UsageOutcome::Added);
    assert_eq!(usage.total("api_calls", day(1), day(29)).await.unwrap(), 1_000_000_000_007);
    assert_eq!(usage.total("api_calls", day(2), day(28)).await.unwrap(), 1_000_000_000_005);
    assert_eq!(usage.total("api_calls", day(29), day(1)).await.unwrap(), 0);
    assert_eq!(usage.total("nothing", day(1), day(29)).await.unwrap(), 0);
    let days = usage.by_day("api_calls", day(1), day(29)).await.unwrap();
    let days: Vec<_> = days.iter().map(|d| (d.day, d.amount)).collect();
    assert_eq!(days, [(day(1), 2), (day(28), 1_000_000_000_005), (day(29), 0)]);
    assert_eq!(usage.by_day("seats.max_1", day(28), day(28)).await.unwrap()[0].amount, 3);

    // Many at once, in their order: of one key the first in the call is added.
    let many = [
        new(3, 1, "e"),
        new(3, 1, "e"),
        new(3, 2, "e"),
        new(28, 5, "charge:0"),
        new(28, 6, "charge:0"),
        NewUsage::new("seats.max_1", day(3), 1, key("e")),
    ];
    let stands = |n, amount| UsageOutcome::Conflict { day: day(n), amount };
    let (added, duplicate) = (UsageOutcome::Added, UsageOutcome::Duplicate);
    let outcomes = [added, duplicate, stands(3, 1), duplicate, stands(28, 5), added];
    assert_eq!(usage.add_many(&many).await.unwrap(), outcomes);
    let outcomes = [duplicate, duplicate, stands(3, 1), duplicate, stands(28, 5), duplicate];
    assert_eq!(usage.add_many(&many).await.unwrap(), outcomes);
    assert_eq!(usage.add_many(&[]).await.unwrap(), []);
    let thousand: Vec<_> = (0..1001).map(|n| new(4, 1, &format!("many-{n}"))).collect();
    refused(usage.add_many(&thousand).await, "usage");
    assert_eq!(usage.add_many(&thousand[1..]).await.unwrap(), [added; 1000]);
    let bad = [new(5, 1, "f"), new(5, u64::MAX, "g")];
    refused(usage.add_many(&bad).await, "amount");
    assert_eq!(usage.total("api_calls", day(3), day(5)).await.unwrap(), 1001);
    let nobody = two.client.tenant(lastprice::TenantId::new());
    is_kind(nobody.usage().add_many(&many).await, ErrorKind::NotFound);

    for metric in ["", "A", "1a", "a b", "ä", "a\0", "a-b", &"a".repeat(65)] {
        refused(usage.add(&NewUsage::new(metric, day(1), 1, key("x"))).await, "metric");
        refused(usage.total(metric, day(1), day(2)).await, "metric");
        refused(usage.by_day(metric, day(1), day(2)).await, "metric");
    }
    for amount in [1_000_000_000_001, u64::MAX] {
        refused(usage.add(&new(1, amount, "x")).await, "amount");
    }
    refused(usage.by_day("api_calls", day(1), NaiveDate::from_ymd_opt(2025, 3, 7).unwrap()).await, "to");
    usage.by_day("api_calls", day(1), NaiveDate::from_ymd_opt(2025, 3, 6).unwrap()).await.unwrap();
    assert_eq!(two.count("usage").await, 1007);
    let theirs = two.globex.usage().total("api_calls", day(1), today()).await.unwrap();
    assert_eq!(theirs, 7);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn recommendations_newest_first() {
    let two = two_tenants().await;
    let id = draft(&two.acme, "x").await.id;
    let other = draft(&two.acme, "y").await.id;
    let recommendations = two.acme.recommendations();
    assert_eq!(recommendations.latest(id).await.unwrap(), None);
    let new = |n: u128| {
        NewRecommendation::new(id, usd("29.90"), 0.25, Objective::MarketShare).id(Uuid::from_u128(n).into())
    };
    for n in [3, u128::MAX, 0, 2] {
        let simulation = json!({"curve": [[19.5, 0.125], [29, 0.0625]], "n": n.to_string()});
        let new = new(n).expected_revenue(usd("-12.5")).simulation(simulation.clone());
        let stored = recommendations.store(&new).await.unwrap();
        assert_eq!((stored.id.uuid().as_u128(), stored.price.to_string()), (n, "29.90 USD".to_owned()));
        assert_eq!((stored.expected_revenue, stored.confidence), (Some(usd("-12.5")), 0.25));
        assert_eq!((stored.objective, &stored.simulation), (Objective::MarketShare, &simulation));
    }
    is_kind(recommendations.store(&new(2)).await, ErrorKind::Conflict);
    let elsewhere = NewRecommendation::new(other, usd("1"), 1.0, Objective::Profit);
    recommendations.store(&elsewhere.simulation(json!([]))).await.unwrap();
    // The latest is the one that was stored last, whatever its id.
    assert_eq!(recommendations.latest(id).await.unwrap().unwrap().id.uuid().as_u128(), 2);
    for limit in [1, 2, 3, 4, 1000] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = recommendations.list(id, limit, after).await.unwrap();
            seen.extend(page.items.iter().map(|r| r.id.uuid().as_u128()));
            let Some(next) = page.next else { break };
            after = Some(next);
        }
        assert_eq!(seen, [u128::MAX, 3, 2, 0], "{limit}");
    }
    let eur = Money::new("1", "EUR").unwrap();
    let huge = Money::from_minor(i64::MAX, Currency::USD);
    let with = |confidence| NewRecommendation::new(id, usd("1"), confidence, Objective::Revenue);
    for confidence in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-300, 1.0 + f64::EPSILON] {
        refused(recommendations.store(&with(confidence)).await, "confidence");
    }
    for (new, field) in [
        (NewRecommendation::new(id, usd("-0.01"), 0.5, Objective::Revenue), "price"),
        (NewRecommendation::new(id, huge, 0.5, Objective::Revenue), "price"),
        (with(0.5).expected_revenue(eur), "expected_revenue"),
        (with(0.5).expected_revenue(huge), "expected_revenue"),
        (with(0.5).simulation(json!("text")), "simulation"),
        (with(0.5).simulation(json!([{"a": "\0"}])), "simulation"),
    ] {
        refused(recommendations.store(&new).await, field);
    }
    for confidence in [0.0, -0.0, 1.0, f64::MIN_POSITIVE, 1e-320] {
        assert_eq!(recommendations.store(&with(confidence)).await.unwrap().confidence, confidence);
    }
    for limit in [0, 1001] {
        refused(recommendations.list(id, limit, None).await, "limit");
    }
    let unknown = NewRecommendation::new(ExperimentId::new(), usd("1"), 0.5, Objective::Revenue);
    is_kind(recommendations.store(&unknown).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}
