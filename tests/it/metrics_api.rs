//! Exact numbers, live.

use lastprice::chrono::{DateTime, NaiveDate, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::{
    Admin, Client, Currency, ErrorKind, ExperimentId, ExperimentStatus, MetricCounts, Money, NewConversion,
    NewExperiment, NewView, VariantMetrics, Variants,
};

use crate::support_repo::*;

fn at(time: &str) -> DateTime<Utc> {
    time.parse().unwrap()
}

/// `a` gets everybody; `b`, first in the order of names but not of arms, nobody.
fn lopsided() -> NewExperiment {
    let variants = Variants::new().add("z", 1, "10").add("b", 0, "20").add("a", 0, "30");
    NewExperiment::new("lopsided", "Lopsided", Currency::USD, variants)
}

#[tokio::test]
async fn every_variant_in_order_and_currencies_apart() {
    let two = two_tenants().await;
    let id = two.acme.experiments().create(lopsided()).await.unwrap().id;
    let metrics = two.acme.metrics();
    // Before anything has happened: all arms, all zero.
    let zeros = metrics.by_variant(id).await.unwrap();
    assert_eq!(zeros.iter().map(|v| v.variant.as_str()).collect::<Vec<_>>(), ["z", "b", "a"]);
    assert!(zeros.iter().all(|v| v.counts == MetricCounts::default()));
    let none = metrics.experiment(id).await.unwrap();
    assert_eq!(none, MetricCounts::default());
    assert_eq!((none.conversion_rate(), none.revenue_per_user(Currency::USD)), (None, None));
    assert_eq!(none.average_order_value(Currency::USD), None);
    assert_eq!(none.revenue(Currency::EUR), Money::zero(Currency::EUR));

    two.acme.experiments().activate(id).await.unwrap();
    assign(&two.acme, id, 0..8).await;
    for n in 0..3 {
        two.acme.views().record(&NewView::new(id, user(n))).await.unwrap();
    }
    let sell = async |n: usize, amount: &str, currency| {
        let new = NewConversion::sale(
            id,
            user(n),
            Money::new(amount, currency).unwrap(),
            key(&format!("{n} {currency}")),
        );
        two.acme.conversions().settle(&new).await.unwrap().entry().unwrap().unwrap();
    };
    sell(0, "10.00", "USD").await;
    sell(1, "0.01", "USD").await;
    sell(1, "9.999999", "EUR").await;
    sell(2, "1500", "JPY").await;
    sell(3, "0", "GBP").await;
    let check = |variants: Vec<VariantMetrics>| {
        let [z, b, a] = variants.try_into().unwrap();
        assert_eq!((b.counts, a.counts), (MetricCounts::default(), MetricCounts::default()));
        let z: MetricCounts = z.counts;
        assert_eq!((z.assignments, z.views, z.conversions), (8, 3, 5));
        let sales: Vec<_> = z.sales.iter().map(|s| (s.conversions, s.revenue.to_string())).collect();
        let expected = [(1, "9.999999 EUR"), (1, "0 GBP"), (1, "1500 JPY"), (2, "10.01 USD")];
        assert_eq!(sales, expected.map(|(n, revenue)| (n, revenue.to_owned())));
        assert_eq!(z.conversion_rate(), Some(0.625));
        assert_eq!(z.revenue_per_user(Currency::USD), Some(Decimal::new(125_125, 5)));
        assert_eq!(z.average_order_value(Currency::USD), Some(Decimal::new(5005, 3)));
        assert_eq!(z.average_order_value(Currency::GBP), Some(Decimal::ZERO));
        assert_eq!(z.revenue_per_user("CHF".parse().unwrap()), Some(Decimal::ZERO));
        assert_eq!(z.average_order_value("CHF".parse().unwrap()), None);
        z
    };
    let z = check(metrics.by_variant(id).await.unwrap());
    assert_eq!(metrics.experiment(id).await.unwrap(), z);
    // A fold moves deltas, and changes no number.
    assert!(metrics.fold().await.unwrap() > 0);
    assert_eq!(metrics.fold().await.unwrap(), 0);
    assert_eq!(two.count("metric_deltas").await, 0);
    check(metrics.by_variant(id).await.unwrap());
    // Half totals, half deltas.
    sell(4, "1", "USD").await;
    two.acme.views().record(&NewView::new(id, user(0))).await.unwrap();
    assign(&two.acme, id, 0..9).await;
    for fold in [false, true] {
        assert!(!fold || metrics.fold().await.unwrap() == 3);
        let all = metrics.experiment(id).await.unwrap();
        assert_eq!((all.assignments, all.views, all.conversions), (9, 4, 6));
        assert_eq!(all.revenue(Currency::USD), usd("11.01"));
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_day_is_of_utc_wherever_the_server_is() {
    let two = two_tenants().await;
    let alter = format!("ALTER DATABASE {} SET timezone = 'Pacific/Auckland'", two.database.name());
    two.owner.batch_execute(&alter).await.unwrap();
    let client = Client::builder().url(two.database.app_url()).require_app_role().build().unwrap();
    let acme = client.tenant(two.id);
    let id = acme.experiments().create(lopsided()).await.unwrap().id;
    acme.experiments().activate(id).await.unwrap();
    assign(&acme, id, 0..4).await;
    for (n, time) in [
        (0, "2024-02-28T23:59:59.999999Z"),
        (0, "2024-02-29T00:00:00Z"),
        (1, "2024-02-29T23:59:59.999999Z"),
        (1, "2024-03-01T00:00:00Z"),
    ] {
        acme.views().record(&NewView::new(id, user(n)).at(at(time))).await.unwrap();
        let new = NewConversion::sale(id, user(n), usd("1.5"), key(time)).at(at(time));
        acme.conversions().settle(&new).await.unwrap().entry().unwrap().unwrap();
    }
    let day = |m, d| NaiveDate::from_ymd_opt(2024, m, d).unwrap();
    for folded in [false, true] {
        if folded {
            assert!(acme.metrics().fold().await.unwrap() > 0);
        }
        let days = acme.metrics().by_day(id, day(2, 28), day(3, 1)).await.unwrap();
        let days: Vec<_> =
            days.iter().map(|d| (d.day, d.counts.views, d.counts.revenue(Currency::USD))).collect();
        assert_eq!(
            days,
            [(day(2, 28), 1, usd("1.5")), (day(2, 29), 2, usd("3")), (day(3, 1), 1, usd("1.5"))]
        );
        let one = acme.metrics().by_day(id, day(2, 29), day(2, 29)).await.unwrap();
        assert_eq!((one.len(), one[0].counts.conversions, one[0].variant.as_str()), (1, 2, "z"));
        assert_eq!(acme.metrics().by_day(id, day(3, 2), day(3, 9)).await.unwrap(), []);
        assert_eq!(acme.metrics().by_day(id, day(3, 1), day(2, 28)).await.unwrap(), []);
        // Of two kinds of events of one day and variant there is one line.
        let today = acme.metrics().by_day(id, today(), today()).await.unwrap();
        assert_eq!((today.len(), today[0].counts.assignments), (1, 4));
    }
    refused(acme.metrics().by_day(id, day(1, 1), NaiveDate::from_ymd_opt(2025, 2, 4).unwrap()).await, "to");
    acme.metrics().by_day(id, day(1, 1), NaiveDate::from_ymd_opt(2025, 2, 3).unwrap()).await.unwrap();
    for wild in [NaiveDate::MIN, NaiveDate::MAX] {
        refused(acme.metrics().by_day(id, wild, wild).await, "from");
        refused(acme.metrics().by_day(id, day(1, 1), wild).await, "to");
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn refreshed_numbers_are_those_of_the_last_refresh() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let id = two.acme.experiments().create(lopsided()).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let others: Vec<ExperimentId> =
        [draft(&two.acme, "x").await.id, draft(&two.acme, "y").await.id].into_iter().collect();
    assign(&two.acme, id, 0..4).await;
    two.acme.conversions().settle(&sale(id, 0, "10.5")).await.unwrap().entry().unwrap().unwrap();
    let eur = NewConversion::sale(id, user(1), Money::new("7", "EUR").unwrap(), key("eur"));
    two.acme.conversions().settle(&eur).await.unwrap().entry().unwrap().unwrap();
    let refreshed = two.acme.metrics().refreshed(10, None).await.unwrap();
    assert!(refreshed.items.is_empty(), "nothing was refreshed yet: {refreshed:?}");

    assert!(admin.refresh_metrics().await.unwrap());
    assign(&two.acme, id, 4..6).await; // not in it
    let all = two.acme.metrics().refreshed(10, None).await.unwrap();
    assert_eq!(all.items.iter().map(|s| s.experiment_id).collect::<Vec<_>>(), [id, others[0], others[1]]);
    let s = &all.items[0];
    assert_eq!(
        (s.key.as_str(), s.name.as_str(), s.status),
        ("lopsided", "Lopsided", ExperimentStatus::Active)
    );
    assert_eq!((s.assignments, s.views, s.conversions, s.revenue), (4, 0, 2, usd("10.5")));
    assert!(all.items[1].assignments == 0 && all.items[1].revenue == usd("0"));
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = two.acme.metrics().refreshed(1, after).await.unwrap();
        seen.extend(page.items);
        let Some(next) = page.next else { break };
        after = Some(next);
    }
    assert_eq!(seen, all.items);
    assert!(admin.refresh_metrics().await.unwrap());
    assert_eq!(two.acme.metrics().refreshed(1, None).await.unwrap().items[0].assignments, 6);
    // The other tenant's summary is its own.
    assert_eq!(two.globex.metrics().refreshed(10, None).await.unwrap().items.len(), 1);
    for limit in [0, 1001] {
        refused(two.acme.metrics().refreshed(limit, None).await, "limit");
    }
    is_kind(two.acme.metrics().experiment(ExperimentId::new()).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}

/// 1100 single views are 1100 deltas.
async fn with_many_deltas(two: &TwoTenants) -> ExperimentId {
    let id = two.acme.experiments().create(lopsided()).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    assign(&two.acme, id, 0..10).await;
    let sql =
        "INSERT INTO metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, views)
               SELECT $1, $2, 1, 'z', 'randomised', 'XXX', current_date, 1 FROM generate_series(1, 1100)";
    two.owner.execute(sql, &[&two.id.uuid(), &id.uuid()]).await.unwrap();
    id
}

#[tokio::test]
async fn a_reader_who_finds_many_deltas_folds_them() {
    let two = two_tenants().await;
    let id = with_many_deltas(&two).await;
    // In a transaction nobody is kept waiting by a fold.
    let transaction = two.acme.begin().await.unwrap();
    let before = transaction.metrics().by_variant(id).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(two.count("metric_deltas").await, 1101);
    assert_eq!((before[0].counts.views, before[0].counts.assignments), (1100, 10));

    assert_eq!(two.acme.metrics().by_variant(id).await.unwrap(), before);
    assert_eq!((two.count("metric_deltas").await, two.count("metric_totals").await), (0, 1));
    assert_eq!(two.acme.metrics().by_variant(id).await.unwrap(), before);
    let days = two.acme.metrics().by_day(id, today(), today()).await.unwrap();
    assert_eq!(days[0].counts, before[0].counts);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_reader_who_may_not_write_still_reads() {
    let two = two_tenants().await;
    let id = with_many_deltas(&two).await;
    let alter = format!("ALTER DATABASE {} SET default_transaction_read_only = on", two.database.name());
    two.owner.batch_execute(&alter).await.unwrap(); // as on a standby
    let reader =
        Client::builder().url(two.database.app_url()).require_app_role().build().unwrap().tenant(two.id);
    let metrics = reader.metrics().experiment(id).await.unwrap();
    assert_eq!((metrics.views, metrics.assignments), (1100, 10));
    let days = reader.metrics().by_day(id, today(), today()).await.unwrap();
    assert_eq!(days[0].counts.views, 1100);
    assert_eq!(two.count("metric_deltas").await, 1101);
    two.bystander_saw_nothing().await;
}
