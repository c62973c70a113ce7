//! What reviews found: phases that were weighed wrongly, and recommendations that nobody could charge.

use rust_decimal::prelude::ToPrimitive;

use super::compare::chances;
use super::tests::{arm, results, with};
use super::*;
use crate::bucketing::Share;
use crate::money::Money;
use crate::repo::{AnalysisPlan, ArmResults, DecisionRule, Objective, PriceBounds, PrimaryMetric, Results};
use crate::stats::{NotEstimable, Sample};

const RULES: [DecisionRule; 3] =
    [DecisionRule::Sequential, DecisionRule::FixedHorizon, DecisionRule::ExpectedLoss(0.01)];

fn of(phase: i32, arm: ArmResults) -> ArmResults {
    ArmResults { phase, ..arm }
}

fn weighing(weight: u32, arm: ArmResults) -> ArmResults {
    ArmResults { weight, ..arm }
}

fn is_better(report: &Report) -> bool {
    matches!(report.verdict, Verdict::Better { .. })
}

#[test]
fn a_phase_in_which_a_variant_sells_nothing_is_not_forgotten() {
    let arms = vec![
        of(1, arm("10", 5000, 1000, 10.0)),
        of(1, arm("20", 5000, 700, 20.0)),
        of(2, arm("10", 50_000, 10_000, 10.0)),
        of(2, arm("20", 50_000, 0, 20.0)),
    ];
    for rule in RULES {
        let report = with(arms.clone(), AnalysisPlan::default().rule(rule));
        assert!(!is_better(&report), "{report}");
        assert_eq!(report.comparisons[0].phases, [1, 2]);
        assert!(matches!(report.comparisons[0].difference, Err(NotEstimable::NoVariance { .. })), "{report}");
    }
}

#[test]
fn a_few_users_of_a_phase_outweigh_nobody() {
    let mut arms = vec![
        of(1, arm("10", 5000, 1000, 10.0)),
        of(1, arm("20", 5000, 300, 20.0)),
        of(2, arm("10", 3, 3, 10.0)),
        of(2, arm("20", 3, 3, 20.0)),
    ];
    for (arm, paid) in arms[2..].iter_mut().zip([[10.0, 10.0, 10.5], [20.0, 20.0, 20.5]]) {
        arm.days[0].cohort.metric = Sample::of(&paid).unwrap();
    }
    let report = with(arms, AnalysisPlan::default());
    assert_eq!(report.comparisons[0].phases, [1], "{report}");
    assert!(report.comparisons[0].difference.unwrap().estimate < 0.0);
    for objective in [Objective::Revenue, Objective::Conversion] {
        assert!(report.recommend(objective, &PriceBounds::new()).is_err());
    }
}

/// The baseline has enough, but not in the phase that has the variant.
#[test]
fn users_of_other_phases_are_not_counted_as_compared() {
    for rule in RULES {
        let arms = vec![
            of(1, arm("10", 5000, 1000, 10.0)),
            of(1, arm("30", 5000, 300, 30.0)),
            of(2, arm("10", 30, 1, 10.0)),
            weighing(99, of(2, arm("20", 2970, 260, 20.0))),
        ];
        let report = with(arms, AnalysisPlan::default().rule(rule).target_sample_size(2000));
        assert!(!report.is_healthy() && !is_better(&report), "{report}");
    }
    // Nor are those of a variant that was dropped, for the horizon.
    let arms = vec![
        of(1, arm("10", 500, 150, 10.0)),
        of(1, arm("20", 500, 150, 20.0)),
        weighing(18_000, of(1, arm("30", 9_000_000, 1000, 30.0))),
        of(2, arm("10", 500, 150, 10.0)),
        of(2, arm("20", 500, 150, 20.0)),
    ];
    let report = with(arms, AnalysisPlan::default().rule(DecisionRule::FixedHorizon));
    assert_eq!(report.verdict, Verdict::Undecided, "{report}");
}

/// Variants that were tried and dropped were looked at as well.
#[test]
fn dropping_losers_does_not_sharpen_the_test() {
    for buyers in (560..640).step_by(10) {
        let mut arms = vec![of(1, arm("10", 5000, 1000, 10.0)), of(1, arm("20", 5000, buyers, 20.0))];
        arms.extend((21..29).map(|n| of(1, arm(&n.to_string(), 5000, 300, 20.0))));
        let plan = || AnalysisPlan::default().rule(DecisionRule::FixedHorizon).target_sample_size(10_000);
        let before = with(arms.clone(), plan());
        arms.extend([of(2, arm("10", 30, 6, 10.0)), of(2, arm("20", 30, 3, 20.0))]);
        let after = with(arms, plan());
        let (before, after) = (&before.comparisons[0], &after.comparisons[0]);
        let p_values = (before.planned.unwrap().p_value, after.planned.unwrap().p_value);
        assert!(p_values.1 >= p_values.0, "{buyers}: {p_values:?}");
        assert_eq!(before.difference, after.difference);
    }
}

#[test]
fn what_a_planned_look_has_said_stands() {
    let day = |n: u64, buyers: u64| {
        [arm("10", 500, 100, 10.0), arm("20", 500, buyers, 20.0)].map(|mut arm| {
            arm.days[0].day = chrono::NaiveDate::from_ymd_opt(2026, 1, 1).unwrap() + chrono::Days::new(n);
            arm
        })
    };
    let until = |days: u64| {
        let mut arms = day(0, 52).to_vec();
        for n in 1..days {
            for (all, more) in arms.iter_mut().zip(day(n, if n < 10 { 52 } else { 90 })) {
                all.counts.assignments += 500;
                all.days.extend(more.days);
            }
        }
        with(arms, AnalysisPlan::default().rule(DecisionRule::FixedHorizon).target_sample_size(10_000))
    };
    assert_eq!(until(9).verdict, Verdict::Undecided);
    let planned = until(10);
    assert_eq!(planned.verdict, Verdict::KeepBaseline, "{planned}");
    // What comes later is better, and was not waited for.
    assert_eq!((until(40).verdict, &until(40).comparisons), (Verdict::KeepBaseline, &planned.comparisons));
}

#[test]
fn a_drop_of_buyers_is_of_one_phase() {
    let arms = vec![
        weighing(9, of(1, arm("10", 9000, 900, 10.0))),
        of(1, arm("20", 1000, 60, 20.0)),
        of(2, arm("10", 1500, 900, 10.0)),
        weighing(9, of(2, arm("20", 13_500, 6480, 20.0))),
    ];
    let report = with(arms, AnalysisPlan::default());
    assert!((report.comparisons[0].conversion_drop.unwrap() - 0.2).abs() < 1e-9, "60 % to 48 %");
}

#[test]
fn a_phase_without_a_buyer_takes_no_chances_away() {
    let arms = vec![
        of(1, arm("10", 5000, 1000, 10.0)),
        of(1, arm("20", 5000, 700, 20.0)),
        of(2, arm("10", 5, 0, 10.0)),
        of(2, arm("20", 5, 1, 20.0)),
    ];
    assert_eq!(chances(&results(arms)).unwrap().len(), 2);
    let many: Vec<_> = (10..30).map(|n| arm(&n.to_string(), 5000, 1000, 10.0)).collect();
    assert!(
        matches!(chances(&results(many)), Err(NotEstimable::TooMany { at_most: 12, .. })),
        "minutes of integrals"
    );
}

#[test]
fn a_variant_that_was_dropped_stands_in_nobodys_way() {
    let mut bad = of(1, arm("30", 5000, 500, 30.0));
    bad.days[0].cohort.refunded = 200;
    let arms = vec![
        of(1, arm("10", 5000, 1000, 10.0)),
        of(1, arm("20", 5000, 700, 20.0)),
        bad,
        of(2, arm("10", 50_000, 10_000, 10.0)),
        of(2, arm("20", 50_000, 7000, 20.0)),
    ];
    let report = with(arms, AnalysisPlan::default());
    assert!(is_better(&report) && report.findings[0].check == Check::Refunds, "{report}");
}

#[test]
fn what_is_recommended_can_be_charged() {
    let mut arms = vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0), arm("30", 5000, 380, 30.0)];
    arms[0].price = Money::new("9.99", "USD").unwrap();
    let report = with(arms, AnalysisPlan::default());
    for millionths in [150_000, 123_456, 999_999] {
        let bounds = PriceBounds::new().max_change(Share::per_million(millionths).unwrap());
        let price = report.recommend(Objective::Revenue, &bounds).unwrap().price;
        assert!(price.minor().is_some(), "{price}");
        let change = price.amount().to_f64().unwrap() / 9.99 - 1.0;
        assert!(
            change <= f64::from(millionths) / 1e6 && change > f64::from(millionths) / 1e6 - 0.01
                || change > 0.6,
            "{price}"
        );
    }
}

#[test]
fn an_objective_that_the_plan_does_not_measure_is_refused() {
    let two = || vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0)];
    let margin = with(two(), AnalysisPlan::default().item_cost("seat", 9));
    let refusal = |report: &Report, objective| report.recommend(objective, &PriceBounds::new()).unwrap_err();
    assert!(matches!(refusal(&margin, Objective::Revenue), NoRecommendation::OfMargin));
    let mut plan = AnalysisPlan::default().margin(9);
    plan.metric = PrimaryMetric::NetRevenue;
    assert!(matches!(refusal(&with(two(), plan), Objective::Profit), NoRecommendation::NoUnitCost));
}

#[test]
fn a_plan_that_sql_has_written_is_an_error() {
    for plan in [AnalysisPlan::default().target_sample_size(u64::MAX), AnalysisPlan::default().alpha(2.0)] {
        let error = Report::of(Results { plan, ..results(vec![]) }).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::InvalidInput);
    }
}
