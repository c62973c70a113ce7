use rust_decimal::prelude::ToPrimitive;

use super::tests::{arm, results, three, with};
use super::*;
use crate::money::Money;
use crate::repo::{AnalysisPlan, Objective, PriceBounds, Results};
use crate::stats::Alpha;

#[test]
fn a_recommendation_is_what_the_data_speaks_for() {
    let report = with(three(), AnalysisPlan::default().margin(4).item_cost("seat", 1));
    let free = PriceBounds::new();
    let of = |objective| report.recommend(objective, &free).unwrap();
    let (revenue, profit) = (of(Objective::Revenue), of(Objective::Profit));
    let best = |cost| {
        let curve = report.prices.as_ref().unwrap().demand.unwrap();
        curve.optimal_price(cost, Alpha::default()).unwrap()
    };
    assert_eq!(revenue.price.amount().to_f64().unwrap(), (best(0.0).price * 100.0).round() / 100.0);
    assert_eq!(profit.price.amount().to_f64().unwrap(), (best(4.0).price * 100.0).round() / 100.0);
    assert!(revenue.price.amount() < profit.price.amount());
    let expected = revenue.expected_revenue.unwrap().amount().to_f64().unwrap();
    // As much above the curve as the tested prices were, which lie close to it.
    assert!((expected / best(0.0).per_thousand - 1.0).abs() < 0.03, "{expected}");
    assert!(revenue.confidence > 0.99 && profit.confidence > 0.99);

    // Who bought also renews: twice the revenue of the curve.
    let mut twice = results(three());
    for arm in &mut twice.arms {
        arm.days[0].cohort.revenue *= 2.0;
    }
    let twice = Report::of(twice).unwrap().recommend(Objective::Revenue, &free).unwrap();
    let ratio = twice.expected_revenue.unwrap().amount() / revenue.expected_revenue.unwrap().amount();
    assert!((ratio.to_f64().unwrap() - 2.0).abs() < 1e-4, "{ratio}");

    // The lowest price has the most buyers: the one in force.
    assert!(matches!(report.recommend(Objective::Conversion, &free), Err(NoRecommendation::NothingBetter)));
    let dear = Report::of(Results { baseline: "30".to_owned(), ..results(three()) }).unwrap();
    let of = |objective| dear.recommend(objective, &free).unwrap();
    assert_eq!(of(Objective::Conversion).price, Money::new("10", "USD").unwrap());
    // The lowest price that is likely enough to earn no less than 30.
    let share = of(Objective::MarketShare);
    let curve = dear.prices.as_ref().unwrap().demand.unwrap();
    let as_much = |at: f64| curve.margin_beyond(at, 30.0, 0.0).unwrap().chance_above(0.0);
    let price = share.price.amount().to_f64().unwrap();
    assert!(as_much(price) >= 0.8 && as_much(price - 0.02) < 0.8, "{}", share.price);
    assert!((share.confidence - as_much(price)).abs() < 1e-9);

    // Bounds, which are met; and other currencies' are none.
    let usd = |amount| Money::new(amount, "USD").unwrap();
    let to = |bounds: PriceBounds| report.recommend(Objective::Revenue, &bounds);
    assert_eq!(to(free.ceiling(usd("15"))).unwrap().price, usd("15"));
    assert_eq!(to(free.max_change(crate::bucketing::Share::percent(20).unwrap())).unwrap().price, usd("12"));
    let out = to(free.ceiling(usd("9.99"))).unwrap_err();
    assert_eq!(out.to_string(), "the bounds leave out all tested prices, which are from 10 USD to 30 USD");
    // The plan's guardrail: of 20 % buyers, no more than a tenth may be lost.
    let guarded = with(three(), AnalysisPlan::default().max_conversion_drop(0.1));
    let kept = guarded.recommend(Objective::Revenue, &free).unwrap().price.amount().to_f64().unwrap();
    let curve = guarded.prices.as_ref().unwrap().demand.unwrap();
    let rate = |at: f64| curve.rate_at(at, Alpha::default()).unwrap().estimate;
    assert!(rate(kept) >= 0.9 * rate(10.0) && rate(kept + 0.02) < 0.9 * rate(10.0), "{kept}");
    assert!(matches!(to(free.floor(Money::new("1", "EUR").unwrap())), Err(NoRecommendation::Bounds(_))));

    // The same inputs have the same hash, whenever they are read, and others another.
    let hash =
        |results| Report::of(results).unwrap().recommend(Objective::Revenue, &free).unwrap().inputs_hash;
    let first = Results { experiment_id: report.results.experiment_id, ..results(three()) };
    let later = Results { as_of: first.as_of + chrono::TimeDelta::days(1), ..first.clone() };
    let mut other = first.clone();
    other.arms[0].days[0].cohort.refunds = 1;
    assert_eq!(hash(first.clone()), hash(later));
    assert_ne!(hash(first), hash(other));
}

#[test]
fn two_prices_recommend_one_of_them_or_none() {
    let free = PriceBounds::new();
    let two = |buyers, plan| with(vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, buyers, 20.0)], plan);
    let better = two(700, AnalysisPlan::default());
    let found = better.recommend(Objective::Revenue, &free).unwrap();
    assert_eq!(
        (found.price, found.simulation["method"].as_str()),
        (Money::new("20", "USD").unwrap(), Some("tested_prices"))
    );
    assert_eq!(found.expected_revenue, better.observed_revenue("20"));
    // As sure as the comparison is: that of other numbers is another.
    assert!((found.confidence - better.comparisons[0].chance_to_win.unwrap()).abs() < 1e-9);
    let less = two(550, AnalysisPlan::default()).recommend(Objective::Revenue, &free).unwrap();
    assert!(less.confidence < found.confidence && less.confidence > 0.5);
    let nothing = |report: &Report, objective| report.recommend(objective, &free).unwrap_err();
    let worse = two(400, AnalysisPlan::default());
    assert!(matches!(nothing(&worse, Objective::Revenue), NoRecommendation::NothingBetter));
    assert!(matches!(nothing(&worse, Objective::MarketShare), NoRecommendation::NothingBetter));
    assert!(matches!(nothing(&better, Objective::Conversion), NoRecommendation::NothingBetter));
    assert!(matches!(nothing(&better, Objective::Profit), NoRecommendation::NoUnitCost));
    let profit = two(550, AnalysisPlan::default().margin(6)).recommend(Objective::Profit, &free).unwrap();
    assert_eq!(profit.price, Money::new("20", "USD").unwrap());

    let mut sick = results(three());
    sick.quote_mismatches = 1000;
    let refusal = nothing(&Report::of(sick).unwrap(), Objective::Revenue);
    assert!(matches!(&refusal, NoRecommendation::Unhealthy(findings) if findings.len() == 1));
    assert!(refusal.to_string().contains("quoted"), "{refusal}");
    assert!(matches!(
        nothing(&Report::of(results(vec![])).unwrap(), Objective::Revenue),
        NoRecommendation::Unhealthy(_)
    ));
}
