//! The numbers of an experiment, against a count by hand.

use std::collections::BTreeMap;

use lastprice::chrono::{DateTime, Days, Duration, NaiveDate, TimeDelta, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::{
    AnalysisPlan, Cohort, Currency, ErrorKind, ExperimentId, Money, NewConversion, NewExperiment, NewPhase,
    Results, Variants,
};

use crate::support_ledger::*;
use crate::support_repo::*;

fn plan() -> AnalysisPlan {
    AnalysisPlan::default().window_days(7).exchange_rate(Currency::EUR, "1.25".parse().unwrap())
}

async fn with_plan(two: &TwoTenants, key: &str, plan: AnalysisPlan) -> ExperimentId {
    let new = NewExperiment::new(key, key, Currency::USD, three()).baseline("29").plan(plan);
    let draft = two.acme.experiments().create(new).await.unwrap();
    two.acme.experiments().activate(draft.id).await.unwrap().id
}

/// Assigned in the past: only SQL can say so.
async fn assigned_at(two: &TwoTenants, id: ExperimentId, n: usize, variant: &str, time: DateTime<Utc>) {
    let sql =
        "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, assigned_at)
               VALUES ($1, $2, $3, $4, $5, 'USD', $6)";
    let price: Decimal = variant.parse().unwrap();
    let params: [&(dyn lastprice::tokio_postgres::types::ToSql + Sync); 6] =
        [&two.id.uuid(), &id.uuid(), &format!("user-{n}"), &variant, &price, &time];
    two.owner.execute(sql, &params).await.unwrap();
}

fn arm<'r>(results: &'r Results, variant: &str) -> &'r lastprice::ArmResults {
    results.arms.iter().find(|a| a.variant == variant).unwrap()
}

fn numbers(cohort: &Cohort) -> (u64, u64, u64, u64, u64, u64) {
    let c = cohort;
    (c.users(), c.buyers, c.refunded, c.sales, c.renewals, c.refunds)
}

#[tokio::test]
async fn what_users_bring_within_their_window() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    let other = with_plan(&two, "other", plan()).await;
    let now = Utc::now();
    let ago = |days: i64| now - TimeDelta::days(days);
    for n in 0..4 {
        assigned_at(&two, id, n, "29", ago(20)).await;
    }
    assigned_at(&two, id, 4, "39", ago(20)).await;
    assigned_at(&two, id, 5, "29", ago(3)).await; // too young
    assigned_at(&two, other, 0, "29", ago(20)).await;
    let sell = |n: usize, amount: Money, at: DateTime<Utc>, o: &str| {
        NewConversion::sale(id, user(n), amount, new_key()).order(order(o)).at(at)
    };
    settled(
        &two.acme,
        &sell(0, usd("29"), ago(20) + TimeDelta::hours(1), "a").subscription(subscription("s")),
    )
    .await;
    settled(&two.acme, &renewal("s", "second", "29", "r").at(ago(15))).await;
    settled(&two.acme, &renewal("s", "third", "29", "late").at(ago(5))).await; // the window is over
    settled(&two.acme, &sell(1, usd("29"), ago(19), "b")).await;
    settled(&two.acme, &refund("b", "9.5", "f").at(ago(18))).await;
    settled(&two.acme, &sell(2, eur("8"), ago(18), "c")).await; // 10 USD; not as quoted
    settled(&two.acme, &sell(3, usd("29"), ago(13) + TimeDelta::seconds(1), "d")).await; // a second too late
    settled(&two.acme, &sell(4, usd("39"), ago(20), "e")).await;
    settled(&two.acme, &sell(5, usd("29"), ago(2), "f")).await;
    let elsewhere = NewConversion::sale(other, user(0), usd("29"), new_key()).at(ago(20));
    settled(&two.acme, &elsewhere).await;

    let results = two.acme.metrics().results(id).await.unwrap();
    let mature = arm(&results, "29").mature();
    assert_eq!(numbers(&mature), (4, 3, 1, 3, 1, 1));
    // 58 + 19.5 + 10 + 0
    assert_eq!((mature.metric.mean(), mature.revenue), (21.875, 87.5));
    let squares = 58.0 * 58.0 + 19.5 * 19.5 + 100.0;
    assert!((mature.metric.sum_squares() - squares).abs() < 1e-9 * squares);
    assert_eq!(numbers(&arm(&results, "39").mature()), (1, 1, 0, 1, 0, 0));
    assert_eq!(numbers(&arm(&results, "19").mature()), (0, 0, 0, 0, 0, 0));
    let young: Vec<_> = arm(&results, "29").days.iter().filter(|d| !d.is_mature).collect();
    assert_eq!((young.len(), numbers(&young[0].cohort)), (1, (1, 1, 0, 1, 0, 0)));
    // Whatever the window, all is counted.
    let counts = &arm(&results, "29").counts;
    assert_eq!((counts.assignments, counts.conversions, counts.renewals, counts.refunds), (5, 5, 2, 1));
    assert_eq!(counts.revenue(Currency::USD), usd("164.5"));
    assert_eq!((results.quote_mismatches, results.crossovers, results.unconverted), (1, 0, 0));
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().renewals, 2);

    // Without a rate, a sale in another currency is in no sum.
    let poor = with_plan(&two, "poor", AnalysisPlan::default()).await;
    assigned_at(&two, poor, 0, "29", ago(20)).await;
    settled(&two.acme, &NewConversion::sale(poor, user(0), eur("8"), new_key()).at(ago(20))).await;
    let results = two.acme.metrics().results(poor).await.unwrap();
    assert_eq!((results.unconverted, arm(&results, "29").mature().metric.mean()), (1, 0.0));

    is_kind(two.globex.metrics().results(id).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn margin_is_revenue_without_what_was_sold_has_cost() {
    let two = two_tenants().await;
    let new = AnalysisPlan::default().window_days(7).margin(4).item_cost("seat", Decimal::new(15, 1));
    let id = with_plan(&two, "x", new).await;
    let past = Utc::now() - TimeDelta::days(30);
    for n in 0..2 {
        assigned_at(&two, id, n, "29", past).await;
    }
    settled(
        &two.acme,
        &NewConversion::sale(id, user(0), usd("58"), key("a")).quantity(2).order(order("o")).at(past),
    )
    .await;
    settled(&two.acme, &refund("o", "8", "f").at(past)).await; // gives money back, not what it has cost
    settled(
        &two.acme,
        &NewConversion::sale(id, user(1), usd("10"), key("b")).item("seat").quantity(4).at(past),
    )
    .await;
    let results = two.acme.metrics().results(id).await.unwrap();
    let mature = arm(&results, "29").mature();
    assert_eq!((mature.metric.sum(), mature.revenue), ((58.0 - 8.0 - 8.0) + (10.0 - 6.0), 60.0));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn large_totals_are_taken_for_the_percentile_of_all_arms() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan().winsorise_at(0.75)).await;
    let now = Utc::now();
    let ago = |days: i64| now - TimeDelta::days(days);
    // Of the users whose window is over: 0, 0, 10, 90 and 20, 20, 20, 1000. The percentile 0.75 is at the place 5.25 of 0 to 7: 37.5.
    let paid = ["", "", "10", "90", "20", "20", "20", "1000"];
    for (n, paid) in paid.into_iter().enumerate() {
        assigned_at(&two, id, n, if n < 4 { "29" } else { "39" }, ago(20)).await;
        if !paid.is_empty() {
            let sale = NewConversion::sale(id, user(n), usd(paid), new_key()).at(ago(19));
            settled(&two.acme, &sale).await;
        }
    }
    // Neither the young nor what is too late says what is large.
    assigned_at(&two, id, 8, "29", ago(3)).await;
    settled(&two.acme, &NewConversion::sale(id, user(8), usd("5000"), new_key()).at(ago(2))).await;
    settled(&two.acme, &NewConversion::sale(id, user(0), usd("7000"), new_key()).at(ago(1))).await;

    let results = two.acme.metrics().results(id).await.unwrap();
    assert_eq!(results.winsorised_above, Some(37.5));
    let judged = |variant| arm(&results, variant).mature().metric;
    let close = |a: f64, b: f64| (a - b).abs() < 1e-9 * b.abs().max(1.0);
    assert_eq!((judged("29").n(), judged("39").n(), judged("19").n()), (4, 4, 0));
    assert!(close(judged("29").sum(), 10.0 + 37.5) && close(judged("39").sum(), 60.0 + 37.5));
    assert!(close(judged("29").sum_squares(), 100.0 + 37.5 * 37.5));
    // Only what is judged: money is money.
    assert_eq!((arm(&results, "39").mature().revenue, arm(&results, "29").mature().buyers), (1060.0, 2));
    let report = lastprice::Report::of(results).unwrap().to_string();
    assert!(report.contains("A total above 37.5000 USD, the percentile 75 of all users"), "{report}");

    let plain = with_plan(&two, "plain", plan()).await;
    let results = two.acme.metrics().results(plain).await.unwrap();
    assert_eq!((results.winsorised_above, results.arms[0].winsorised), (None, None));
    two.bystander_saw_nothing().await;
}

/// Of an entry that somebody writes by hand, the database finds out when its user was assigned: the tenant's own user.
#[tokio::test]
async fn what_a_hand_writes_has_a_window() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    assigned_at(&two, id, 0, "29", Utc::now() - TimeDelta::days(20)).await;
    let sql =
        "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency, occurred_at)
               VALUES ($1, $2, $3, '29', 29, 'USD', now() - interval '19 days')";
    for name in ["user-0", "user-19"] {
        two.owner.execute(sql, &[&two.id.uuid(), &id.uuid(), &name]).await.unwrap();
    }
    let results = two.acme.metrics().results(id).await.unwrap();
    assert_eq!(numbers(&arm(&results, "29").mature()), (1, 1, 0, 1, 0, 0));
    let unknown = "SELECT user_id FROM conversions WHERE tenant_id = $1 AND assigned_at IS NULL";
    let unknown = two.owner.query(unknown, &[&two.id.uuid()]).await.unwrap();
    assert_eq!(unknown.iter().map(|row| row.get(0)).collect::<Vec<&str>>(), ["user-19"]);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn phases_and_the_not_randomised_are_told_apart() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    two.acme.experiments().force(id, &user(9), Some("39")).await.unwrap();
    assign(&two.acme, id, 0..10).await;
    let sale = NewConversion::sale(id, user(9), usd("39"), key("tester"));
    settled(&two.acme, &sale).await;
    let live = two.acme.experiments().get(id).await.unwrap().unwrap();
    let variants = Variants::new().add("29", 1, "29.00").add("49", 3, "49.00").add("39", 0, "39.00");
    two.acme.experiments().new_phase(id, live.revision, NewPhase::new(variants)).await.unwrap();
    assign(&two.acme, id, 10..15).await;

    let results = two.acme.metrics().results(id).await.unwrap();
    let arms: Vec<_> =
        results.arms.iter().map(|a| (a.phase, a.variant.as_str(), a.weight, a.price)).collect();
    assert_eq!(
        arms,
        [
            (1, "19", 1, usd("19")),
            (1, "29", 2, usd("29")),
            (1, "39", 1, usd("39")),
            (2, "29", 1, usd("29")),
            (2, "49", 3, usd("49")),
            (2, "39", 0, usd("39")),
        ]
    );
    let assigned =
        |phase| results.arms.iter().filter(|a| a.phase == phase).map(|a| a.counts.assignments).sum::<u64>();
    assert_eq!((assigned(1), assigned(2)), (9, 5));
    let users = |phase| {
        let days = results.arms.iter().filter(|a| a.phase == phase).flat_map(|a| &a.days);
        days.map(|d| d.cohort.users()).sum::<u64>()
    };
    assert_eq!((users(1), users(2)), (9, 5));
    let forced = &results.others["forced"];
    assert_eq!((results.others.len(), forced.assignments, forced.conversions), (1, 1, 1));
    assert_eq!(results.arms.iter().map(|a| a.counts.conversions).sum::<u64>(), 0);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn who_looks_too_often_is_seen() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    assign(&two.acme, id, 0..3).await;
    let look = async |n: usize, times: usize| {
        let views: Vec<_> = (0..times).map(|_| lastprice::NewView::new(id, user(n))).collect();
        two.acme.views().record_many(&views).await.unwrap();
    };
    look(0, 200).await;
    look(1, 201).await;
    look(2, 3).await;
    let recent = two.acme.metrics().results(id).await.unwrap().recent_views;
    assert_eq!((recent.views, recent.viewers, recent.suspects, recent.views_of_suspects), (404, 3, 1, 201));
    two.bystander_saw_nothing().await;
}

/// A chargeback that was reversed took nothing; testers are no programs; and who was removed by hand breaks no report.
#[tokio::test]
async fn what_looks_like_a_fault_and_is_none() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    let past = Utc::now() - TimeDelta::days(20);
    for n in 0..4 {
        assigned_at(&two, id, n, "29", past).await;
        let sale =
            NewConversion::sale(id, user(n), usd("29"), new_key()).order(order(&n.to_string())).at(past);
        settled(&two.acme, &sale).await;
    }
    for (n, reversed) in [(0, true), (1, false)] {
        let (o, money) = (order(&n.to_string()), usd("29"));
        settled(&two.acme, &NewConversion::chargeback(o.clone(), money, new_key()).at(past)).await;
        if reversed {
            settled(&two.acme, &NewConversion::chargeback_reversal(o, money, new_key()).at(past)).await;
        }
    }
    two.acme.experiments().force(id, &user(9), Some("39")).await.unwrap();
    assign(&two.acme, id, 9..10).await;
    let views: Vec<_> = (0..300).map(|_| lastprice::NewView::new(id, user(9))).collect();
    two.acme.views().record_many(&views).await.unwrap();
    let results = two.acme.metrics().results(id).await.unwrap();
    let mature = arm(&results, "29").mature();
    assert_eq!((mature.refunded, mature.refunds, mature.revenue), (1, 2, 87.0));
    assert_eq!((results.recent_views.views, results.recent_views.suspects), (0, 0));

    let sql = "DELETE FROM assignments WHERE tenant_id = $1 AND user_id IN ('user-1', 'user-2', 'user-3')";
    two.owner.execute(sql, &[&two.id.uuid()]).await.unwrap();
    let results = two.acme.metrics().results(id).await.unwrap();
    assert_eq!(arm(&results, "29").mature().users(), 4);
    two.bystander_saw_nothing().await;
}

/// One thing that happened: to whom, when, and how much money moved.
#[derive(Clone)]
struct Moved {
    user: usize,
    order: String,
    cents: i64,
    at: DateTime<Utc>,
}

impl Moved {
    fn entry(&self, id: ExperimentId) -> NewConversion {
        let amount = Money::of(Decimal::new(self.cents.abs(), 2), Currency::USD).unwrap();
        let k = key(&format!("{} {}", self.order, self.cents < 0));
        let new = match self.cents {
            0.. => NewConversion::sale(id, user(self.user), amount, k).order(order(&self.order)),
            _ => NewConversion::refund(order(&self.order), amount, k),
        };
        new.at(self.at)
    }
}

type Assigned = (usize, &'static str, DateTime<Utc>);

fn history(start: DateTime<Utc>) -> (Vec<Assigned>, Vec<Moved>) {
    let mut random = 1_u64;
    let mut next = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let (mut users, mut moved) = (Vec::new(), Vec::new());
    for n in 0..120 {
        let assigned = start + Duration::hours(next(24 * 20) as i64);
        users.push((n, ["19", "29", "39"][next(3) as usize], assigned));
        for line in 0..next(3) {
            let (order, at) = (format!("{n}-{line}"), assigned + Duration::hours(next(24 * 14) as i64));
            let cents = 2 + 2 * next(3000) as i64;
            moved.push(Moved { user: n, order: order.clone(), cents, at });
            if next(4) == 0 {
                let at = at + Duration::hours(next(100) as i64);
                moved.push(Moved { user: n, order, cents: -cents / 2, at });
            }
        }
    }
    (users, moved)
}

/// By hand, user by user and entry by entry: users, sum and sum of squares in cents.
fn by_hand(users: &[Assigned], moved: &[Moved]) -> BTreeMap<(String, NaiveDate), (u64, i64, i64)> {
    let mut cohorts: BTreeMap<_, (u64, i64, i64)> = BTreeMap::new();
    for (n, variant, assigned) in users {
        let within = |m: &&Moved| m.user == *n && m.at < *assigned + Duration::days(7);
        let total: i64 = moved.iter().filter(within).map(|m| m.cents).sum();
        let (count, sum, squares) =
            cohorts.entry(((*variant).to_owned(), assigned.date_naive())).or_default();
        (*count, *sum, *squares) = (*count + 1, *sum + total, *squares + total * total);
    }
    cohorts
}

#[tokio::test]
async fn neither_order_nor_batches_nor_folds_change_a_number() {
    let start = Utc::now().date_naive().and_hms_opt(0, 0, 0).unwrap().and_utc() - Days::new(60);
    let (users, moved) = history(start);
    let expected = by_hand(&users, &moved);
    let two = two_tenants().await;
    let admin = lastprice::Admin::connect(&two.database.owner_url()).await.unwrap();
    let mut seen: Option<Vec<lastprice::ArmResults>> = None;
    for (run, batch) in [1_usize, 7, 1000].into_iter().enumerate() {
        let id = with_plan(&two, &format!("run-{run}"), plan()).await;
        for (n, variant, at) in &users {
            assigned_at(&two, id, *n, variant, *at).await;
        }
        // Shuffled, another way each time; refunds before their sales as well.
        let mut entries: Vec<NewConversion> = moved
            .iter()
            .map(|m| Moved { order: format!("{run} {}", m.order), ..m.clone() }.entry(id))
            .collect();
        let len = entries.len();
        for at in 0..len {
            entries.swap(at, (at * 31 + run * 17) % len);
        }
        for (n, batch) in entries.chunks(batch).enumerate() {
            two.acme.conversions().settle_many(batch).await.unwrap();
            if n % 40 == 3 {
                two.acme.metrics().fold().await.unwrap();
                admin.refresh_metrics().await.unwrap();
            }
        }
        let results = two.acme.metrics().results(id).await.unwrap();
        let mut counted = BTreeMap::new();
        for arm in &results.arms {
            for day in &arm.days {
                assert!(day.is_mature);
                let metric = day.cohort.metric;
                let cents = |value: f64, scale: f64| (value * scale).round() as i64;
                let sums = (metric.n(), cents(metric.sum(), 100.0), cents(metric.sum_squares(), 10_000.0));
                counted.insert((arm.variant.clone(), day.day), sums);
            }
        }
        assert_eq!(counted, expected, "batches of {batch}");
        two.acme.metrics().fold().await.unwrap();
        assert_eq!(
            two.acme.metrics().results(id).await.unwrap().arms,
            results.arms,
            "folding changes nothing"
        );
        if let Some(seen) = &seen {
            assert_eq!(*seen, results.arms, "to the last digit, in batches of {batch}");
        }
        seen = Some(results.arms);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_window_begins_when_the_price_was_shown() {
    let two = two_tenants().await;
    let id = with_plan(&two, "x", plan()).await;
    let past: DateTime<Utc> = "2026-01-02T03:04:05.678901Z".parse().unwrap();
    let users = users(0..3);
    let shown = async |user: &lastprice::UserId, time| {
        let subject = lastprice::Subject::new(user).shown_at(time);
        let outcome = two.acme.assignments().assign(id, subject).await.unwrap();
        outcome.quote().unwrap().assigned_at
    };
    assert_eq!(shown(&users[0], past).await, past);
    // A stored quote keeps its time, and nobody is shown a price tomorrow.
    assert_eq!(shown(&users[0], past + TimeDelta::days(1)).await, past);
    assert!(shown(&users[1], Utc::now() + TimeDelta::days(1)).await <= Utc::now() + TimeDelta::minutes(1));
    refused(
        two.acme
            .assignments()
            .assign(id, lastprice::Subject::new(&users[2]).shown_at(DateTime::<Utc>::MAX_UTC))
            .await,
        "shown_at",
    );

    // What is recorded later begins when it was made.
    let made = lastprice::NewAssignment::new(id, users[2].clone());
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let before = Utc::now();
    let recorder = two.client.recorder();
    assert!(recorder.track(two.id, made).await.unwrap().is_stored());
    let _ = recorder.shutdown(std::time::Duration::from_secs(10)).await;
    let quote = two.acme.assignments().get(id, &users[2]).await.unwrap().unwrap();
    assert!(quote.assigned_at < before, "{} {before}", quote.assigned_at);
    two.bystander_saw_nothing().await;
}
