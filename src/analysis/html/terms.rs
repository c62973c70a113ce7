//! The end of the page: by which terms it was judged, and whom.

use std::fmt::Write;

use super::page::capital;
use super::text::{count, esc, name, percent};
use crate::analysis::Report;
use crate::analysis::text::why;
use crate::repo::{AnalysisPlan, DecisionRule, PrimaryMetric};

pub(super) fn plan(report: &Report) -> String {
    let plan = &report.results.plan;
    let currency = report.results.currency;
    let mut rows = vec![
        ("What is raised", format!("{} per assigned user, in {}", capital(report.metric()), esc(currency))),
        (
            "Window",
            format!(
                "{} days after a user's assignment; users are judged when theirs is over",
                plan.window_days
            ),
        ),
        ("Rule", rule(plan)),
        ("Level", percent(1.0 - plan.alpha)),
        ("What is worth it", format!("{} more than the baseline", percent(plan.minimum_effect))),
        ("Decision hoped for at", format!("{} users, all variants together", count(plan.target_sample_size))),
    ];
    if let Some(drop) = plan.max_conversion_drop {
        rows.push(("Guardrail", format!("no more than {} of the buyers may be lost", percent(drop))));
    }
    if let Some(rate) = plan.max_refund_rate {
        rows.push(("Guardrail", format!("no more than {} of the buyers may get money back", percent(rate))));
    }
    if plan.metric == PrimaryMetric::Margin {
        let items =
            plan.unit_costs.iter().map(|(item, cost)| format!("; {} {} {currency}", name(item), esc(cost)));
        rows.push(("Unit cost", format!("{} {currency}{}", esc(plan.unit_cost), items.collect::<String>())));
    }
    for (other, rate) in &plan.exchange_rates {
        rows.push(("Exchange rate", format!("1 {} = {} {}", esc(other), esc(rate), esc(currency))));
    }
    if let Some(at) = plan.winsorise_at {
        rows.push(("Large totals", format!("those above the percentile {} are taken for it", percent(at))));
    }
    let rows = rows.into_iter().map(|(what, value)| format!("<div><dt>{what}</dt><dd>{value}</dd></div>\n"));
    format!("<p>Written down before there were numbers.</p>\n<dl>\n{}</dl>\n", rows.collect::<String>())
}

fn rule(plan: &AnalysisPlan) -> String {
    match plan.rule {
        DecisionRule::Sequential => "by a confidence sequence, at any look".to_owned(),
        DecisionRule::FixedHorizon => format!("once, at {} users", count(plan.target_sample_size)),
        DecisionRule::ExpectedLoss(loss) => {
            format!(
                "at an expected loss below {} of the baseline's mean; not protected against peeking",
                percent(loss)
            )
        }
    }
}

pub(super) fn others(report: &Report) -> String {
    if report.results.others.is_empty() {
        return "<p>Nobody was left out.</p>\n".to_owned();
    }
    let mut html = "<div class=\"wide\" role=\"region\" aria-label=\"Table of those left out\" tabindex=\"0\">\n<table>\n\
         <caption>These users were not randomised, and are in no statistic.</caption>\n<thead><tr><th scope=\"col\">Why</th>\
         <th scope=\"col\" class=\"number\">Users</th><th scope=\"col\" class=\"number\">Sales</th></tr></thead>\n<tbody>\n"
        .to_owned();
    for (reason, counts) in &report.results.others {
        let why = capital(&name(why(reason)));
        let (users, sales) = (count(counts.assignments), count(counts.conversions));
        let _ = writeln!(html, "<tr><th scope=\"row\">{why}</th><td>{users}</td><td>{sales}</td></tr>");
    }
    html + "</tbody>\n</table>\n</div>\n"
}
