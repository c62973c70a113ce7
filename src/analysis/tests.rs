use chrono::{Days, NaiveDate};
use proptest::prelude::*;

use super::compare::{chances, compare};
use super::health::findings;
use super::verdict::verdict;
use super::*;
use crate::money::{Currency, Money};
use crate::repo::{
    AnalysisPlan, ArmResults, Cohort, DecisionRule, MetricCounts, Objective, PriceBounds, PrimaryMetric,
    Results,
};
use crate::stats::{Alpha, NotEstimable, Sample};

/// An arm of one day: its name and price, users, buyers, and what each of them paid.
pub(super) fn arm(name: &str, users: u64, buyers: u64, paid: f64) -> ArmResults {
    let metric = Sample::from_sums(users, buyers as f64 * paid, buyers as f64 * paid * paid).unwrap();
    let cohort = Cohort { metric, buyers, sales: buyers, revenue: buyers as f64 * paid, ..Cohort::default() };
    ArmResults::for_tests(1, name, users, vec![(day(0), true, cohort)])
}

fn day(n: u64) -> NaiveDate {
    NaiveDate::from_ymd_opt(2026, 1, 1).unwrap() + Days::new(n)
}

pub(super) fn results(arms: Vec<ArmResults>) -> Results {
    Results::for_tests(arms)
}

pub(super) fn with(arms: Vec<ArmResults>, plan: AnalysisPlan) -> Report {
    Report::of(Results { plan, ..results(arms) }).unwrap()
}

fn better(report: &Report) -> Option<&str> {
    match &report.verdict {
        Verdict::Better { variant, .. } => Some(variant),
        _ => None,
    }
}

#[test]
fn the_rule_of_the_plan_decides() {
    let sound = three;
    let report = with(sound(), AnalysisPlan::default());
    assert_eq!(report.verdict, Verdict::Better { variant: "20".to_owned(), others: vec![] });
    assert!(report.is_healthy() && report.findings.is_empty(), "{report}");
    // A guardrail: 20 % of users buy at 10, and 14 % at 20.
    let guarded = with(sound(), AnalysisPlan::default().max_conversion_drop(0.29));
    let Verdict::GuardrailBroken { variant, conversion_drop } = &guarded.verdict else { panic!("{guarded}") };
    assert!(variant == "20" && (conversion_drop - 0.3).abs() < 1e-12);
    assert_eq!(better(&with(sound(), AnalysisPlan::default().max_conversion_drop(0.31))), Some("20"));
    // One that earns less, and is better and within, is taken in place of the best.
    let two = vec![arm("10", 5000, 1000, 10.0), arm("14", 5000, 950, 14.0), arm("20", 5000, 800, 20.0)];
    let second = with(two, AnalysisPlan::default().max_conversion_drop(0.1));
    assert_eq!(second.verdict, Verdict::Better { variant: "14".to_owned(), others: vec![] }, "{second}");
    // One that hardly anybody buys does not keep the others from being judged, and neither wins nor ends it all.
    let hopeless =
        || vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0), arm("3000", 5000, 99, 3000.0)];
    let report = with(hopeless(), AnalysisPlan::default());
    assert_eq!(better(&report), Some("20"), "{report}");
    assert_eq!(
        report.findings.iter().map(|f| (f.check, f.severity)).collect::<Vec<_>>(),
        [(Check::SampleSize, Severity::Warning)]
    );
    assert!(!report.comparisons[1].has_enough && report.comparisons[0].has_enough);

    // A fixed horizon waits for it, whatever there is to see.
    let planned = AnalysisPlan::default().rule(DecisionRule::FixedHorizon);
    assert_eq!(with(sound(), planned.clone().target_sample_size(15_001)).verdict, Verdict::Undecided);
    assert_eq!(better(&with(sound(), planned.clone().target_sample_size(15_000))), Some("20"));
    let equal = || vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 500, 20.0)];
    assert_eq!(with(equal(), planned).verdict, Verdict::KeepBaseline);

    // An expected loss: of a sure thing nothing, of a coin's toss something.
    let risk = |share| AnalysisPlan::default().rule(DecisionRule::ExpectedLoss(share));
    assert_eq!(better(&with(sound(), risk(0.001))), Some("20"));
    assert_eq!(with(equal(), risk(0.001)).verdict, Verdict::Undecided);
    assert_eq!(
        with(vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 300, 20.0)], risk(0.001)).verdict,
        Verdict::KeepBaseline
    );

    // With freedom to look, what cannot matter any more ends as well.
    assert_eq!(with(equal(), AnalysisPlan::default()).verdict, Verdict::Undecided);
    let many = vec![arm("10", 5_000_000, 1_000_000, 10.0), arm("20", 5_000_000, 500_000, 20.0)];
    assert_eq!(with(many, AnalysisPlan::default()).verdict, Verdict::KeepBaseline);
}

#[test]
fn a_verdict_is_withheld_for_each_cause_by_name() {
    let sound = || vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0)];
    let changed = |change: &dyn Fn(&mut Results)| {
        let mut results = results(sound());
        change(&mut results);
        Report::of(results).unwrap()
    };
    assert!(better(&changed(&|_| {})).is_some());
    type Change<'c> = &'c dyn Fn(&mut Results);
    let causes: [(Check, Change<'_>); 11] = [
        (Check::SampleRatio, &|r| r.arms[0].counts.assignments = 4600),
        (Check::SampleRatio, &|r| {
            r.arms.push(ArmResults { weight: 0, ..arm("30", 3, 1, 30.0) });
        }),
        (Check::Crossovers, &|r| r.crossovers = 18),
        (Check::QuoteMismatch, &|r| r.quote_mismatches = 18),
        (Check::Currencies, &|r| r.unconverted = 18),
        (Check::Maturity, &|r| r.arms[1].days[0].is_mature = false),
        (Check::SampleSize, &|r| r.arms = vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 99, 200.0)]),
        (Check::SampleSize, &|r| drop(r.arms.pop())),
        (Check::Phases, &|r| {
            for name in ["10", "20"] {
                let mut young = arm(name, 50, 10, 10.0);
                (young.phase, young.days[0].is_mature) = (2, false);
                r.arms.push(young);
            }
        }),
        (Check::Bots, &|r| {
            (r.recent_views.views, r.recent_views.viewers) = (1000, 300);
            (r.recent_views.suspects, r.recent_views.views_of_suspects) = (1, 250);
        }),
        (Check::Refunds, &|r| r.arms[1].days[0].cohort.refunded = 100),
    ];
    for (check, change) in causes {
        let report = changed(change);
        let blocking: Vec<Check> =
            report.findings.iter().filter(|f| f.severity == Severity::Blocking).map(|f| f.check).collect();
        assert_eq!((blocking, report.is_healthy()), (vec![check], false), "{report}");
        assert_eq!(report.verdict, Verdict::Withheld { findings: 1 }, "{check:?}");
        assert!(report.to_string().contains(&report.findings[0].message), "{report}");
    }
    // A little of it is to be known, no more.
    let slight: [(Check, Change<'_>); 6] = [
        (Check::Losses, &|r| {
            for (arm, mean) in r.arms.iter_mut().zip([-3.0, -1.0]) {
                let cohort = &mut arm.days[0].cohort;
                cohort.metric = Sample::from_deviations(5000, mean, 90_000.0).unwrap();
            }
        }),
        (Check::Crossovers, &|r| r.crossovers = 17),
        (Check::QuoteMismatch, &|r| r.quote_mismatches = 17),
        (Check::Currencies, &|r| r.unconverted = 17),
        (Check::Refunds, &|r| r.arms[1].days[0].cohort.refunded = 71),
        (Check::Bots, &|r| {
            (r.recent_views.views, r.recent_views.viewers) = (10_000, 300);
            (r.recent_views.suspects, r.recent_views.views_of_suspects) = (1, 250);
        }),
    ];
    for (check, change) in slight {
        let report = changed(change);
        let found: Vec<_> = report.findings.iter().map(|f| (f.check, f.severity)).collect();
        assert_eq!(found, [(check, Severity::Warning)]);
        assert!(better(&report).is_some(), "{report}");
    }
}

/// Within each phase the variant is worse, and pooled it would look better, as most of its users came in the better phase.
#[test]
fn phases_are_compared_each_for_itself() {
    let of_phase = |phase, arm: ArmResults| ArmResults { phase, ..arm };
    let arms = vec![
        of_phase(1, arm("10", 9000, 900, 10.0)),
        of_phase(1, ArmResults { weight: 1, ..arm("20", 1000, 45, 20.0) }),
        of_phase(2, arm("10", 1000, 300, 10.0)),
        of_phase(2, arm("20", 9000, 1305, 20.0)),
    ];
    let mut results = results(arms);
    for (arm, weight) in results.arms.iter_mut().zip([9, 1, 1, 9]) {
        arm.weight = weight;
    }
    let comparison = compare(&results, Alpha::default()).remove(0);
    assert_eq!(comparison.phases, [1, 2]);
    assert!(comparison.difference.unwrap().estimate < 0.0);
    let pooled = |name: &str| {
        let of = results.arms.iter().filter(|a| a.variant == name);
        of.fold(Sample::default(), |all, a| all.merge(a.mature().metric)).mean()
    };
    assert!(pooled("20") > pooled("10"));
    // A phase that showed the variant at another price says nothing of this one.
    results.arms[1].price = Money::new("21", "USD").unwrap();
    assert_eq!(compare(&results, Alpha::default())[0].phases, [2]);
    // Of one phase, the combination is what the phase says.
    let alone = Results { arms: results.arms.split_off(2), ..results.clone() };
    let (one, two) =
        (&compare(&results_of(&results, &alone), Alpha::default())[0], &compare(&alone, Alpha::default())[0]);
    assert_eq!((one.difference, one.lift), (two.difference, two.lift));
}

fn results_of(first: &Results, second: &Results) -> Results {
    Results { arms: first.arms.iter().chain(&second.arms).cloned().collect(), ..first.clone() }
}

#[test]
fn chances_are_those_of_the_arms_themselves() {
    let arms = vec![arm("10", 5000, 1000, 10.0), arm("20", 4000, 410, 20.0), arm("30", 4500, 310, 30.0)];
    let posteriors: Vec<_> = arms
        .iter()
        .map(|a| crate::stats::Posterior::of_mean(a.mature().metric, crate::stats::Prior::Flat).unwrap())
        .collect();
    let direct = crate::stats::best_arm(&posteriors).unwrap();
    let found = chances(&results(arms)).unwrap();
    assert_eq!(found.iter().map(|c| c.variant.as_str()).collect::<Vec<_>>(), ["10", "20", "30"]);
    for (found, direct) in found.iter().zip(direct) {
        assert!((found.best - direct.best).abs() < 1e-6, "{found:?} {direct:?}");
        assert!((found.expected_loss - direct.expected_loss).abs() < 1e-6);
    }
}

#[test]
fn prices_name_what_they_cannot_tell() {
    let two = with(vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0)], AnalysisPlan::default());
    let prices = two.prices.as_ref().unwrap();
    assert!(prices.steps[0].elasticity.unwrap().estimate < 0.0);
    assert_eq!(prices.steps[0].break_even_drop, Ok(0.5));
    assert!(matches!(prices.best_price, Err(NotEstimable::TooFew { needed: 3, got: 2, .. })), "{prices:?}");
    assert!(two.to_string().contains("No best price is named"), "{two}");

    // Demand that falls in one step has no curve's shape, and no best price by it.
    let step = vec![arm("10", 5000, 1500, 10.0), arm("20", 5000, 1500, 20.0), arm("30", 5000, 400, 30.0)];
    let step = with(step, AnalysisPlan::default());
    assert_eq!(step.prices.as_ref().unwrap().best_price, Err(NotEstimable::PoorFit));
    let tested = step.recommend(Objective::Revenue, &PriceBounds::new()).unwrap();
    assert_eq!(
        (tested.price, &tested.simulation["method"]),
        (Money::new("20", "USD").unwrap(), &"tested_prices".into())
    );

    let arms = || vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 600, 20.0), arm("30", 5000, 330, 30.0)];
    let three = with(arms(), AnalysisPlan::default());
    let best = three.prices.as_ref().unwrap().best_price.unwrap();
    let margin = with(arms(), AnalysisPlan::default().margin(5));
    assert_eq!(margin.results.plan.metric, PrimaryMetric::Margin);
    assert!(margin.prices.as_ref().unwrap().best_price.unwrap().price > best.price + 1.0);
    let prices = three.prices.as_ref().unwrap();
    assert!(prices.per_thousand_at(15.0, Alpha::default()).unwrap().estimate > 0.0);
    assert_eq!(prices.per_thousand_at(31.0, Alpha::default()).unwrap_err(), NotEstimable::Untested);
}

pub(super) fn three() -> Vec<ArmResults> {
    vec![arm("10", 5000, 1000, 10.0), arm("20", 5000, 700, 20.0), arm("30", 5000, 380, 30.0)]
}

/// 400 experiments of three equal arms, looked at on each of 30 days after the first hundred buyers: false winners stay at 5 %.
#[test]
fn looking_every_day_finds_no_winner_among_equals() {
    let mut random = 7_u64;
    let mut next = move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 40) as f64 / (1_u64 << 24) as f64
    };
    let (mut sequential, mut naive) = (0, 0);
    let experiments = 400;
    for _ in 0..experiments {
        let mut arms: Vec<ArmResults> =
            ["10", "20", "30"].iter().map(|name| ArmResults::for_tests(1, name, 0, vec![])).collect();
        let (mut was_better, mut was_significant) = (false, false);
        for today in 0..30 {
            for arm in &mut arms {
                let price: f64 = arm.variant.parse().unwrap();
                // As many users as bring the same: of a dearer price fewer buy.
                let (users, rate) = (120, 2.0 / price);
                let buyers = (0..users).filter(|_| next() < rate).count() as u64;
                let (sum, squares) = (buyers as f64 * price, buyers as f64 * price * price);
                let metric = Sample::from_sums(users, sum, squares).unwrap();
                let cohort = Cohort { metric, buyers, sales: buyers, revenue: sum, ..Cohort::default() };
                let more = ArmResults::for_tests(1, &arm.variant, users, vec![(day(today), true, cohort)]);
                arm.counts.assignments += users;
                arm.days.extend(more.days);
            }
            let results = results(arms.clone());
            let alpha = Alpha::default();
            let comparisons = compare(&results, alpha);
            let unknown = Err(NotEstimable::OutOfRange);
            let found = findings(&results, &comparisons, alpha);
            let sized = found.iter().all(|f| f.check != Check::SampleSize);
            was_better |= matches!(verdict(&results, &comparisons, &unknown, &found), Verdict::Better { .. });
            was_significant |= sized && comparisons.iter().any(|c| c.planned.is_ok_and(|e| e.p_value < 0.05));
        }
        sequential += usize::from(was_better);
        naive += usize::from(was_significant);
    }
    // Three standard deviations of a share of 5 % in 400: 5 % + 3.3 %. Winners are one of the two sides.
    assert!(sequential <= 33, "{sequential} of {experiments}");
    assert!(naive > 40, "peeking at a planned test is shown to be wrong: {naive} of {experiments}");
}

fn any_arm() -> impl Strategy<Value = ArmResults> {
    let number = prop_oneof![Just(0_u64), 1..5_u64, 1..10_000_u64, Just(1_000_000_000)];
    (
        0..4_usize,
        1..3_i32,
        number,
        0.0..=1.0_f64,
        prop_oneof![Just(0.0), -5.0..500.0_f64, Just(1e11)],
        any::<bool>(),
    )
        .prop_map(|(name, phase, users, share, paid, is_mature)| {
            let buyers = (users as f64 * share) as u64;
            let mut arm = arm(["10", "20", "30", "0.01"][name], users, buyers, paid);
            (arm.phase, arm.days[0].is_mature) = (phase, is_mature);
            arm
        })
}

proptest! {
    #[test]
    fn whatever_was_counted_there_is_a_report(arms in prop::collection::vec(any_arm(), 0..7), rule in 0..3) {
        let rule = [DecisionRule::Sequential, DecisionRule::FixedHorizon, DecisionRule::ExpectedLoss(0.01)][rule as usize];
        let report = with(arms, AnalysisPlan::default().rule(rule).max_conversion_drop(0.5));
        let text = report.to_string();
        prop_assert!(!text.contains("NaN") && !text.contains("inf"), "{}", text);
        // JSON has no number for what is not finite, and says null.
        let json = serde_json::to_value(&report).unwrap();
        prop_assert_eq!(json["verdict"]["verdict"].is_string(), true);
        if !report.is_healthy() {
            let is_withheld = matches!(report.verdict, Verdict::Withheld { .. });
            prop_assert!(is_withheld);
        }
    }
}

impl ArmResults {
    fn for_tests(phase: i32, name: &str, users: u64, days: Vec<(NaiveDate, bool, Cohort)>) -> Self {
        let mut arm = ArmResults::empty(phase, name, Money::new(name, "USD").unwrap(), 1);
        arm.counts = MetricCounts { assignments: users, ..MetricCounts::default() };
        arm.counts.conversions = days.iter().map(|(.., cohort)| cohort.sales).sum();
        arm.days = days
            .into_iter()
            .map(|(day, is_mature, cohort)| crate::repo::CohortDay { day, is_mature, cohort })
            .collect();
        arm
    }
}

impl Results {
    fn for_tests(arms: Vec<ArmResults>) -> Self {
        Results {
            experiment_id: crate::id::ExperimentId::new(),
            key: "k".to_owned(),
            name: "An experiment".to_owned(),
            status: crate::repo::ExperimentStatus::Active,
            baseline: "10".to_owned(),
            currency: Currency::USD,
            plan: AnalysisPlan::default(),
            as_of: chrono::Utc::now(),
            start_date: None,
            end_date: None,
            arms,
            others: Default::default(),
            quote_mismatches: 0,
            crossovers: 0,
            unconverted: 0,
            winsorised_above: None,
            recent_views: Default::default(),
        }
    }
}
