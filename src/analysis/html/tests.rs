use std::collections::{BTreeMap, HashSet};

use chrono::{DateTime, Days, NaiveDate, Utc};
use proptest::prelude::*;
use roxmltree::{Document, Node, ParsingOptions};

use super::chart::{Axis, Scale};
use super::text::{chance, esc, fit, money, number, percent, sentence};
use crate::analysis::Report;
use crate::id::ExperimentId;
use crate::money::{Currency, Money};
use crate::repo::{
    AnalysisPlan, ArmResults, Cohort, CohortDay, DecisionRule, ExperimentStatus, MetricCounts, RecentViews,
    Results,
};
use crate::stats::{Effect, Interval, NotEstimable, Sample};

/// What a name may be made of, and what a browser must not make of it.
const EVIL: [&str; 6] = [
    "</script><img src=x onerror=alert(1)>",
    "\"' onload='x' a=\"&amp;&lt;",
    "\u{202e}gnp.exe\u{202c}",
    "מחיר גבוה",
    "👩‍👩‍👧‍👦🚀 `tick`",
    "]]><!-- --></title></style></svg>",
];

fn day(n: u64) -> NaiveDate {
    NaiveDate::from_ymd_opt(2026, 3, 1).unwrap() + Days::new(n)
}

/// An experiment of arms: name, price, share of buyers.
fn results(arms: &[(&str, &str, f64)], days: u64, users_a_day: u64) -> Results {
    let as_of: DateTime<Utc> = day(days + 15).and_hms_opt(9, 30, 0).unwrap().and_utc();
    let arm = |(i, (variant, price, share)): (usize, &(&str, &str, f64))| {
        let price = Money::new(price, "USD").unwrap();
        let amount: f64 = price.amount().to_string().parse().unwrap();
        let cohort = |n: u64| {
            // More or fewer, without chance.
            let wave = 1.0 + 0.3 * ((n * 7 + i as u64 * 3) as f64).sin();
            let buyers = ((users_a_day as f64 * share * wave).round() as u64).min(users_a_day);
            let sum = buyers as f64 * amount;
            Cohort {
                metric: Sample::from_sums(users_a_day, sum, sum * amount).unwrap(),
                buyers,
                sales: buyers,
                revenue: sum,
                ..Cohort::default()
            }
        };
        ArmResults {
            phase: 1,
            variant: (*variant).to_owned(),
            price,
            weight: 1,
            counts: MetricCounts { assignments: days * users_a_day, ..MetricCounts::default() },
            days: (0..days).map(|n| CohortDay { day: day(n), is_mature: true, cohort: cohort(n) }).collect(),
            winsorised: None,
        }
    };
    Results {
        experiment_id: ExperimentId::new(),
        key: "pro-plan".to_owned(),
        name: "Price of the Pro plan".to_owned(),
        status: ExperimentStatus::Active,
        baseline: arms.first().map_or_else(String::new, |arm| arm.0.to_owned()),
        currency: Currency::USD,
        plan: AnalysisPlan::default(),
        as_of,
        start_date: Some(day(0).and_hms_opt(0, 0, 0).unwrap().and_utc()),
        end_date: None,
        arms: arms.iter().enumerate().map(arm).collect(),
        others: BTreeMap::new(),
        quote_mismatches: 0,
        crossovers: 0,
        unconverted: 0,
        winsorised_above: None,
        recent_views: RecentViews::default(),
    }
}

fn report(results: Results) -> Report {
    Report::of(results).unwrap()
}

fn three_prices() -> Results {
    results(&[("standard", "19.00", 0.14), ("plus", "29.00", 0.12), ("premium", "39.00", 0.085)], 40, 120)
}

/// Parses a page as XML, and holds it against what all pages have in common.
fn check(page: &str) {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let document = Document::parse_with_options(page, options).expect("well-formed");
    let root = document.root_element();
    assert_eq!((root.tag_name().name(), root.attribute("lang")), ("html", Some("en")));
    let all = |name: &str| root.descendants().filter(|n| n.has_tag_name(name)).collect::<Vec<Node<'_, '_>>>();
    assert_eq!(
        (all("h1").len(), all("head")[0].children().filter(|n| n.has_tag_name("title")).count()),
        (1, 1)
    );

    // Nothing is run, and nothing is loaded.
    let allowed = "html head meta title style body header main section footer h1 h2 h3 p ul li strong small bdi div table caption thead \
                   tbody tr th td dl dt dd figure figcaption svg desc line polyline polygon circle text";
    let allowed: HashSet<&str> = allowed.split_whitespace().collect();
    let mut ids = HashSet::new();
    for node in root.descendants().filter(Node::is_element) {
        assert!(allowed.contains(node.tag_name().name()), "<{}>", node.tag_name().name());
        for attribute in node.attributes() {
            let known = "lang charset http-equiv name content class id role tabindex scope viewBox points text-anchor x y x1 x2 y1 y2 \
                         cx cy r aria-label aria-labelledby";
            assert!(known.split_whitespace().any(|name| name == attribute.name()), "{}", attribute.name());
            if attribute.name() == "id" {
                assert!(ids.insert(attribute.value()), "two of {}", attribute.value());
            }
        }
    }
    assert!(page.contains("default-src 'none'; style-src 'unsafe-inline'"));
    let style = all("style")[0].text().unwrap();
    assert!(!style.contains("url(") && !style.contains("@import"));

    for heading in all("section") {
        assert!(ids.contains(heading.attribute("aria-labelledby").unwrap()));
    }
    for cell in all("th") {
        assert!(matches!(cell.attribute("scope"), Some("row" | "col")));
    }
    for list in all("ul").into_iter().chain(all("tbody")).chain(all("dl")) {
        assert!(list.children().any(|n| n.is_element()), "an empty list");
    }
    for svg in all("svg") {
        assert_eq!(svg.attribute("role"), Some("img"));
        assert!(svg.attribute("aria-label").is_some_and(|label| !label.is_empty()));
        assert!(svg.children().any(|n| n.has_tag_name("desc")));
        check_numbers(svg);
    }
    for word in ["NaN", "nan", "inf", "-inf", "∞", "Infinity"] {
        let is_one =
            |text: &str| text.split(|c: char| !c.is_alphabetic() && c != '-' && c != '∞').any(|w| w == word);
        let texts = root.descendants().filter(|n| n.is_text() && !n.parent().unwrap().has_tag_name("style"));
        for text in texts.filter_map(|n| n.text()) {
            assert!(!is_one(text), "{word} in {text}");
        }
    }
}

/// All within the picture.
fn check_numbers(svg: Node<'_, '_>) {
    let number = |text: &str| text.parse::<f64>().unwrap();
    let size: Vec<f64> = svg.attribute("viewBox").unwrap().split(' ').map(number).collect();
    let is_within =
        |value: f64, limit: f64| assert!((-1.0..=limit + 1.0).contains(&value), "{value} of {limit}");
    for node in svg.descendants() {
        for attribute in node.attributes() {
            match attribute.name() {
                "x" | "x1" | "x2" | "cx" => is_within(number(attribute.value()), size[2]),
                "y" | "y1" | "y2" | "cy" => is_within(number(attribute.value()), size[3]),
                "points" => {
                    for point in attribute.value().split(' ') {
                        let (x, y) = point.split_once(',').unwrap();
                        is_within(number(x), size[2]);
                        is_within(number(y), size[3]);
                    }
                }
                _ => {}
            }
        }
    }
}

fn svgs(page: &str) -> usize {
    page.matches("<svg ").count()
}

#[test]
fn a_page_of_three_prices() {
    let report = report(three_prices());
    let page = report.to_html();
    check(&page);
    assert_eq!(svgs(&page), 6, "two panels of days, the intervals, the posterior, two over the price");
    for text in [
        "standard",
        "premium",
        "Net revenue per user, USD",
        "How to read it",
        "Not protected against peeking",
        "best: ",
    ] {
        assert!(page.contains(text), "{text}");
    }
    let verdict = page.find("id=\"verdict\"").unwrap();
    assert!(verdict < page.find("id=\"variants\"").unwrap());
    assert_eq!(page, report.clone().to_html(), "the same report, the same bytes");
}

#[test]
fn other_results_give_other_pages() {
    let mut other = three_prices();
    other.arms[1].days.truncate(20);
    assert_ne!(report(three_prices()).to_html(), report(other).to_html());
}

#[test]
fn names_are_text() {
    for evil in EVIL {
        let mut results =
            results(&[("a", "19.00", 0.14), (evil, "29.00", 0.12), ("c", "39.00", 0.085)], 40, 120);
        results.name = format!("{evil} n");
        results.key = evil.to_owned();
        results.others.insert(evil.to_owned(), MetricCounts::default());
        results.plan = results.plan.item_cost(evil, 1).margin(3);
        let page = report(results.clone()).to_html();
        check(&page);
        results.baseline = evil.to_owned();
        check(&report(results).to_html());
        let document =
            Document::parse_with_options(&page, ParsingOptions { allow_dtd: true, ..Default::default() });
        let document = document.unwrap();
        let shown: String =
            evil.chars().map(|c| if matches!(c, '\u{202a}'..='\u{202e}') { '\u{fffd}' } else { c }).collect();
        let rows =
            document.descendants().filter(|n| n.has_tag_name("th")).filter_map(|n| n.first_element_child());
        assert!(rows.filter_map(|n| n.text()).any(|name| name == shown), "{evil}");
        assert!(!page.contains('\u{202e}'));
    }
}

#[test]
fn says_what_cannot_be_drawn_and_why() {
    let nothing = report(results(&[], 0, 0)).to_html();
    check(&nothing);
    assert_eq!(svgs(&nothing), 0);

    let young = report(results(&[("a", "19", 0.1), ("b", "29", 0.1)], 0, 0)).to_html();
    check(&young);
    assert!(young.contains("no user has been in for 14 whole days") && young.contains("In the way"));

    let one_arm = report(results(&[("a", "19", 0.1)], 30, 100)).to_html();
    check(&one_arm);
    assert!(one_arm.contains("no variant to compare"));

    let two = report(results(&[("a", "19", 0.1), ("b", "29", 0.1)], 30, 100)).to_html();
    check(&two);
    assert!(two.contains("No demand curve is drawn, as 3 different prices are needed, and 2 are there."));

    let rising = report(results(&[("a", "19", 0.1), ("b", "29", 0.2), ("c", "39", 0.3)], 30, 100)).to_html();
    check(&rising);
    assert!(rising.contains("No best price is named, as demand does not fall"));

    let same = report(results(&[("a", "19", 0.1), ("b", "19", 0.2), ("c", "19", 0.3)], 30, 100)).to_html();
    check(&same);

    // The verdict stands on the difference, and so do the interval that is drawn and the sentence about it.
    let clear = report(results(&[("control", "19.00", 0.1), ("higher", "24.00", 0.1)], 30, 150));
    assert!(clear.comparisons[0].is_clear() && clear.comparisons[0].lift.unwrap().interval.low < 0.0);
    assert!(clear.to_html().contains("brings 0.42 USD more net revenue per user"));

    let free = report(results(&[("a", "0", 0.1), ("b", "5", 0.08), ("c", "9", 0.05)], 30, 100)).to_html();
    check(&free);
    assert!(free.contains("is not drawn, as the baseline&#39;s mean is not above zero"));
}

#[test]
fn an_optimum_that_was_not_tested_is_marked() {
    let cheap = [("a", "5", 0.1978), ("b", "7", 0.1915), ("c", "9", 0.1854), ("d", "11", 0.1795)];
    let report = report(results(&cheap, 60, 400));
    assert!(report.prices.as_ref().unwrap().best_price.unwrap().extrapolated);
    let page = report.to_html();
    check(&page);
    assert!(page.contains("not tested") && page.contains("It was not tested"));
}

#[test]
fn few_days_many_days_many_arms_and_phases() {
    for days in [1, 2, 9, 70, 71, 400, 2000] {
        let page = report(results(&[("a", "19", 0.1), ("b", "29", 0.09)], days, 50)).to_html();
        check(&page);
        assert!(page.len() < 100_000, "{days} days make {} bytes", page.len());
    }
    let names: Vec<String> = (0..30).map(|i| format!("a variant with a long name {i}")).collect();
    let prices: Vec<String> = (0..30).map(|i| format!("{}", 10 + i)).collect();
    let arms: Vec<_> =
        names.iter().zip(&prices).map(|(name, price)| (name.as_str(), price.as_str(), 0.1)).collect();
    check(&report(results(&arms[..10], 30, 100)).to_html());
    let page = report(results(&arms, 30, 100)).to_html();
    check(&page);
    assert!(page.contains("Of 29 variants the first 12 are drawn; 17 more are in the table."));

    let mut phased = three_prices();
    for phase in 2..6 {
        let mut next = three_prices().arms;
        next.iter_mut().for_each(|arm| arm.phase = phase);
        phased.arms.extend(next);
    }
    let page = report(phased).to_html();
    check(&page);
    assert!(page.contains(", phase 5.") && page.contains("phases are not pooled"));
}

#[test]
fn the_rule_and_the_guardrails_are_there() {
    let mut results = three_prices();
    let plan = AnalysisPlan::default().rule(DecisionRule::FixedHorizon).max_conversion_drop(0.01);
    results.plan = plan.margin(3).exchange_rate(Currency::EUR, "1.08".parse().unwrap()).winsorise_at(0.99);
    let page = report(results).to_html();
    check(&page);
    for text in [
        "once, at 10,000 users",
        "Guardrail",
        "1 EUR = 1.08 USD",
        "At the one planned look",
        "Margin per user, USD",
    ] {
        assert!(page.contains(text), "{text}");
    }
}

#[test]
fn numbers_that_nobody_counted() {
    let mut report = report(three_prices());
    let wild = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, -1e60];
    for (i, value) in wild.into_iter().enumerate() {
        report.daily[i].mean = value;
        report.daily[i + 40].interval = Some(Interval { low: -value, high: value });
        let effect = Effect { estimate: value, ..report.comparisons[0].lift.unwrap() };
        report.comparisons[0].lift = Ok(effect);
        report.comparisons[1].lift = Ok(Effect { standard_error: value, ..effect });
        report.chances = Err(NotEstimable::OutOfRange);
        let prices = report.prices.as_mut().unwrap();
        prices.points[0].per_thousand = value;
        prices.best_price.as_mut().unwrap().price = value;
        check(&report.to_html());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn any_results_make_a_page(
        arms in prop::collection::vec(("\\PC{1,12}", 0u64..2_000_000_000_000, 0u32..7, 0.0..1.0f64, -4i32..40), 0..6),
        days in 0u64..40,
        users in 0u64..3000,
        baseline in 0usize..6,
    ) {
        let prices: Vec<String> = arms
            .iter()
            .map(|(_, price, scale, _, _)| rust_decimal::Decimal::new((*price % 1_000_000_000_000) as i64, *scale).to_string())
            .collect();
        let given: Vec<_> =
            arms.iter().zip(&prices).map(|(arm, price)| (arm.0.as_str(), price.as_str(), arm.3)).collect();
        let mut results = results(&given, days, users);
        if let Some((name, ..)) = arms.get(baseline) {
            results.baseline = name.clone();
        }
        for (arm, (_, _, _, _, power)) in results.arms.iter_mut().zip(&arms) {
            for day in &mut arm.days {
                // Refunds beyond what was paid, and totals that no shop has.
                let scale = 10f64.powi(*power) * if *power % 3 == 0 { -1.0 } else { 1.0 };
                let (n, mean) = (day.cohort.metric.n(), day.cohort.metric.mean() * scale);
                let spread = day.cohort.metric.deviations() * scale * scale;
                day.cohort.metric = Sample::from_deviations(n, mean, spread).unwrap_or_default();
            }
        }
        let report = Report::of(results).unwrap();
        let page = report.to_html();
        check(&page);
        prop_assert_eq!(page, report.to_html());
    }

    #[test]
    fn ticks_are_few_round_and_inside(low in -1e12..1e12f64, width in 1e-9..1e12f64, most in 2u32..8) {
        let scale = Scale::over([low, low + width]);
        let axis = Axis::new(scale, most, usize::MAX, "", "");
        prop_assert!((1..=most as usize + 1).contains(&axis.ticks.len()), "{:?}", axis);
        for pair in axis.ticks.windows(2) {
            prop_assert!(pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1, "{:?}", pair);
        }
        prop_assert!(axis.ticks.iter().all(|tick| scale.contains(tick.0)));
    }
}

#[test]
fn ticks() {
    let labels = |low: f64, high: f64| {
        let ticks = Axis::new(Scale { low, high }, 5, usize::MAX, "", "").ticks;
        ticks.into_iter().map(|tick| tick.1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(labels(0.3, 4.9), "1 2 3 4");
    assert_eq!(labels(-0.12, 0.31), "−0.1 0 0.1 0.2 0.3");
    assert_eq!(labels(900.0, 2900.0), "1,000 1,500 2,000 2,500");
    assert_eq!(labels(0.0, 95_000.0), "0 20k 40k 60k 80k");
    assert_eq!(labels(0.0, 4_200_000.0), "0 1m 2m 3m 4m");
    assert_eq!(labels(1_000_000.0, 1_000_004.0), "1,000,000 1,000,001 1,000,002 1,000,003 1,000,004");
    assert_eq!(labels(0.0, 4e-9), "0 1e−9 2e−9 3e−9 4e−9");
    assert_eq!(labels(0.0, 4e30), "0 1e30 2e30 3e30 4e30");
}

#[test]
fn numbers_as_people_read_them() {
    for (value, text) in [
        (0.0, "0.00"),
        (-0.0, "0.00"),
        (1234.567, "1,235"),
        (-1234567.0, "−1,234,567"),
        (123.46, "123.5"),
        (2.345, "2.35"),
        (0.012345, "0.012"),
        (-0.5, "−0.50"),
        (1e20, "1e20"),
        (2.5e-9, "2.5e−9"),
        (f64::NAN, "unknown"),
    ] {
        assert_eq!(number(value), text, "{value}");
    }
    assert_eq!(percent(0.1234), "12.3\u{a0}%");
    assert_eq!(percent(0.00123), "0.12\u{a0}%");
    assert_eq!(percent(-0.000001), "0.00\u{a0}%");
    assert_eq!(chance(0.99999), "over 99.9\u{a0}%");
    assert_eq!(money(29.304, Currency::USD), "29.30\u{a0}USD");
    assert_eq!(money(29.304, Currency::JPY), "29\u{a0}JPY");
    assert_eq!(money(0.0004, Currency::USD), "0.00040\u{a0}USD");
    assert_eq!(fit("short", 5), "short");
    assert_eq!(fit("longer", 5), "long…");
    assert_eq!(fit("價格價格", 5), "價…");
    assert_eq!(
        esc("<a b='c' d=\"e\">&\u{7}\u{202e}"),
        "&lt;a b=&#39;c&#39; d=&quot;e&quot;&gt;&amp;\u{fffd}\u{fffd}"
    );
    assert_eq!(sentence("take `a<b`"), "Take <bdi class=\"name\">a&lt;b</bdi>.");
    assert_eq!(sentence("`x` earns"), "<bdi class=\"name\">x</bdi> earns.");
}
