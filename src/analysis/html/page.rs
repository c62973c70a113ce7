//! The page: what to do first, then what it rests on.

use std::fmt::Write;

use super::demand;
use super::figures::{self, Figure, MOST_ROWS};
use super::terms;
use super::text::{
    about, chance, count, esc, money, name, number, p_value, percent, price, sentence, signed, signed_percent,
};
use crate::analysis::{Comparison, PriceAnalysis, Report, Severity, Verdict};
use crate::repo::DecisionRule;

/// A page that loads nothing and runs nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

pub(super) fn page(report: &Report) -> String {
    let results = &report.results;
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n",
        esc(&results.name),
        include_str!("style.css")
    );
    header(&mut page, report);
    page.push_str("<main>\n");
    for (id, title, content) in [
        ("verdict", "Verdict", verdict(report)),
        ("variants", "What each variant brought", arms(report)),
        ("comparisons", "Against the baseline", comparisons(report)),
        ("days", "Day by day", days(report)),
        ("posterior", "How likely which lift", posterior(report)),
        ("prices", "Price and demand", prices(report)),
        ("plan", "How it is judged", terms::plan(report)),
        ("others", "Who is not in these numbers", terms::others(report)),
    ] {
        let _ = writeln!(page, "<section id=\"{id}\" aria-labelledby=\"{id}-title\">");
        let _ = writeln!(page, "<h2 id=\"{id}-title\">{title}</h2>\n{content}</section>");
    }
    page.push_str("</main>\n");
    let _ = writeln!(
        page,
        "<footer><p>Made by lastprice {}. This page has sums only, no users; it loads nothing.</p></footer>\n</body>\n</html>",
        env!("CARGO_PKG_VERSION")
    );
    page
}

fn header(page: &mut String, report: &Report) {
    let results = &report.results;
    let date = |date: Option<chrono::DateTime<chrono::Utc>>, word: &str| {
        date.map_or_else(String::new, |date| format!(", {word} {}", date.format("%-d %B %Y")))
    };
    let _ = writeln!(
        page,
        "<header>\n<p class=\"kicker\">Pricing experiment {}: {}{}{}</p>\n<h1><bdi>{}</bdi></h1>\n<p class=\"note\">As of {}.</p>\n</header>",
        name(&results.key),
        esc(results.status),
        date(results.start_date, "since"),
        date(results.end_date, "until"),
        esc(&results.name),
        results.as_of.format("%-d %B %Y, %H:%M UTC")
    );
}

fn verdict(report: &Report) -> String {
    let kind = match report.verdict {
        Verdict::Withheld { .. } | Verdict::GuardrailBroken { .. } => "stop",
        Verdict::Better { .. } => "go",
        _ => "wait",
    };
    let mut html =
        format!("<div class=\"verdict {kind}\">\n<p class=\"says\">{}</p>\n", sentence(&report.verdict));
    let because = because(report);
    if !because.is_empty() {
        let _ = writeln!(html, "<p>{because}</p>");
    }
    html.push_str("</div>\n");
    if report.findings.is_empty() {
        html.push_str("<p>All checks of the data passed: nothing stands in the way.</p>\n");
        return html;
    }
    html.push_str("<h3>What was found</h3>\n<ul class=\"findings\">\n");
    for finding in &report.findings {
        let (class, mark) = match finding.severity {
            Severity::Blocking => ("blocking", "In the way"),
            Severity::Warning => ("warning", "To know"),
        };
        let _ = writeln!(html, "<li class=\"{class}\"><strong>{mark}:</strong> {}</li>", sentence(finding));
    }
    html + "</ul>\n"
}

/// What the verdict rests on, in a sentence.
fn because(report: &Report) -> String {
    match &report.verdict {
        Verdict::Withheld { .. } => {
            "Until what stands in the way is mended, the numbers below are not to be acted upon.".to_owned()
        }
        Verdict::Better { variant, .. } | Verdict::GuardrailBroken { variant, .. } => {
            let chosen = report.comparisons.iter().find(|comparison| comparison.variant == *variant);
            chosen.map_or_else(String::new, |comparison| brings(report, comparison))
        }
        Verdict::Undecided => match (report.results.plan.rule, report.users_needed) {
            (_, Some(users)) => format!(
                "To find the smallest lift that is worth it, {}, takes about {} users per variant.",
                percent(report.results.plan.minimum_effect),
                about(users)
            ),
            (DecisionRule::FixedHorizon, None) => {
                format!("It is decided at {} users.", count(report.results.plan.target_sample_size))
            }
            _ => String::new(),
        },
        Verdict::KeepBaseline => {
            format!("What is worth it is {} more.", percent(report.results.plan.minimum_effect))
        }
    }
}

/// One comparison, in a sentence.
fn brings(report: &Report, comparison: &Comparison) -> String {
    let (variant, baseline) = (name(&comparison.variant), name(&report.results.baseline));
    let metric = report.metric();
    let found = match report.deciding(comparison) {
        Ok(found) => found,
        Err(reason) => return format!("{variant} cannot be compared with {baseline}: {}.", esc(reason)),
    };
    let word = if found.estimate < 0.0 { "less" } else { "more" };
    let mut html = format!(
        "{variant} brings {} {} {word} {metric} per user than {baseline}: between {} and {}.",
        number(found.estimate.abs()),
        esc(report.results.currency),
        signed(found.interval.low),
        signed(found.interval.high)
    );
    let _ = match &comparison.lift {
        Ok(lift) => write!(
            html,
            " In percent: {} (between {} and {}).",
            signed_percent(lift.estimate),
            signed_percent(lift.interval.low),
            signed_percent(lift.interval.high)
        ),
        Err(reason) => write!(html, " There is no percentage, as {}.", esc(reason)),
    };
    html
}

fn arms(report: &Report) -> String {
    let results = &report.results;
    if results.arms.is_empty() {
        return "<p>The experiment has no variants.</p>\n".to_owned();
    }
    let several = results.arms.iter().any(|arm| arm.phase > 1);
    let phase = if several { "<th scope=\"col\" class=\"number\">Phase</th>" } else { "" };
    let mut html = format!(
        "<div class=\"wide\" role=\"region\" aria-label=\"Table of the variants\" tabindex=\"0\">\n<table>\n\
         <caption>Judged: users whose {} days are over.</caption>\n<thead><tr><th scope=\"col\">Variant</th>{phase}\
         <th scope=\"col\" class=\"number\">Price</th><th scope=\"col\" class=\"number\">Users</th>\
         <th scope=\"col\" class=\"number\">Judged</th><th scope=\"col\" class=\"number\">Bought</th>\
         <th scope=\"col\" class=\"number\">Share</th><th scope=\"col\" class=\"number\">{} per user, {}</th></tr></thead>\n<tbody>\n",
        results.plan.window_days,
        capital(report.metric()),
        esc(results.currency)
    );
    for arm in &results.arms {
        let mature = arm.mature();
        let baseline = if arm.variant == results.baseline { " <small>baseline</small>" } else { "" };
        let phase = if several { format!("<td>{}</td>", arm.phase) } else { String::new() };
        let share = mature.conversion().rate().map_or_else(|| "–".to_owned(), percent);
        let mean = if mature.users() > 0 { number(mature.metric.mean()) } else { "–".to_owned() };
        let _ = writeln!(
            html,
            "<tr><th scope=\"row\">{}{baseline}</th>{phase}<td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{share}</td><td>{mean}</td></tr>",
            name(&arm.variant),
            price(arm.price),
            count(arm.counts.assignments),
            count(mature.users()),
            count(mature.buyers)
        );
    }
    html + "</tbody>\n</table>\n</div>\n"
}

fn comparisons(report: &Report) -> String {
    if report.comparisons.is_empty() {
        return "<p>There is no variant to compare the baseline with.</p>\n".to_owned();
    }
    let mut html = "<div class=\"charts\">\n".to_owned();
    html += &figures::intervals(report).map_or_else(String::new, |figure| one(&figure));
    html.push_str("<div>\n");
    html += &left_out(report.comparisons.iter().filter(|comparison| comparison.difference.is_ok()).count());
    html.push_str("<ul>\n");
    for comparison in &report.comparisons {
        let _ = write!(html, "<li>{}", brings(report, comparison));
        if let Ok(change) = &comparison.conversion {
            let points = |share: f64| signed(share * 100.0);
            let _ = write!(
                html,
                " The share of buyers changes by {} points (between {} and {}).",
                points(change.difference),
                points(change.interval.low),
                points(change.interval.high)
            );
        }
        if let (DecisionRule::FixedHorizon, Ok(planned)) = (report.results.plan.rule, &comparison.planned) {
            let _ = write!(html, " At the one planned look, {}.", p_value(planned.p_value));
        }
        html.push_str("</li>\n");
    }
    html.push_str("</ul>\n");
    if let Some(users) = report.users_needed {
        let least = percent(report.results.plan.minimum_effect);
        let _ = writeln!(
            html,
            "<p>To find {least} more in four of five experiments takes about {} users per variant.</p>",
            about(users)
        );
    }
    html + "</div>\n</div>\n"
}

fn days(report: &Report) -> String {
    let figures = figures::daily(report);
    if figures.is_empty() {
        let days = report.results.plan.window_days;
        return format!(
            "<p class=\"empty\">This cannot be drawn yet: no user has been in for {days} whole days, and users are judged when \
             their window is over.</p>\n"
        );
    }
    let shown = figures.len();
    let of: usize = report.comparisons.len();
    let more = if of > shown && shown >= MOST_ROWS { left_out(of) } else { String::new() };
    format!(
        "{}<p>How to read it: each line is the {} per user of all who were assigned until that day. The band around it has the true value \
         on all days together ({} level), however often one looks, and narrows as users come. Two bands that are apart differ; two that \
         overlap may still, and the comparison above tells. Bands of the first days may reach beyond the chart.</p>\n{more}",
        grid(&figures),
        report.metric(),
        percent(1.0 - report.results.plan.alpha)
    )
}

fn posterior(report: &Report) -> String {
    let mut html = "<div class=\"charts\">\n".to_owned();
    match figures::posterior(report) {
        Some(figure) => html += &one(&figure),
        None => html.push_str("<p class=\"empty\">This cannot be drawn yet.</p>\n"),
    }
    html.push_str("<div>\n");
    let unknown = report.comparisons.iter().filter_map(|c| Some((c, c.lift.err()?)));
    for (comparison, reason) in unknown.take(MOST_ROWS) {
        let _ = writeln!(html, "<p>{} is not drawn, as {}.</p>", name(&comparison.variant), esc(reason));
    }
    match &report.chances {
        Ok(chances) if !chances.is_empty() => {
            let _ = writeln!(
                html,
                "<div class=\"wide\" role=\"region\" aria-label=\"Table of chances\" tabindex=\"0\">\n<table>\n\
                 <caption>Which one is the best? Not protected against peeking.</caption>\n<thead><tr><th scope=\"col\">Variant</th>\
                 <th scope=\"col\" class=\"number\">Chance to be the best</th>\
                 <th scope=\"col\" class=\"number\">Expected loss per user if chosen, {}</th></tr></thead>\n<tbody>",
                esc(report.results.currency)
            );
            for one in chances {
                let (variant, best, loss) = (name(&one.variant), chance(one.best), loss(one.expected_loss));
                let _ =
                    writeln!(html, "<tr><th scope=\"row\">{variant}</th><td>{best}</td><td>{loss}</td></tr>");
            }
            html.push_str("</tbody>\n</table>\n</div>\n");
        }
        Ok(_) => {}
        Err(reason) => {
            let _ = writeln!(html, "<p>No chances are given, as {}.</p>", esc(reason));
        }
    }
    html + "</div>\n</div>\n"
}

fn prices(report: &Report) -> String {
    let Some(prices) = &report.prices else {
        return "<p class=\"empty\">There is no price to draw: the experiment has no variants.</p>\n"
            .to_owned();
    };
    let figures = demand::prices(report, prices);
    let mut html = if figures.is_empty() {
        "<p class=\"empty\">This cannot be drawn yet: no user's window is over.</p>\n".to_owned()
    } else {
        grid(&figures)
    };
    best_price(&mut html, report, prices);
    html.push_str("<ul>\n");
    for step in &prices.steps {
        let _ = write!(html, "<li>From {} to {}: ", price(step.from), price(step.to));
        match &step.elasticity {
            Ok(found) => {
                let _ = write!(
                    html,
                    "1{nbsp}% more price changes the share of buyers by {}{nbsp}% (between {} and {}).",
                    signed(found.estimate),
                    signed(found.interval.low),
                    signed(found.interval.high),
                    nbsp = '\u{a0}'
                );
            }
            Err(reason) => {
                let _ = write!(html, "elasticity unknown, as {}.", esc(reason));
            }
        }
        if let Ok(drop) = step.break_even_drop {
            let _ = write!(
                html,
                " The higher price pays while it loses less than {} of the buyers.",
                percent(drop)
            );
        }
        html.push_str("</li>\n");
    }
    // A list of nothing is no list.
    html = html.strip_suffix("<ul>\n").map(str::to_owned).unwrap_or_else(|| format!("{html}</ul>\n"));
    if report.results.arms.iter().any(|arm| arm.phase > 1) {
        let _ =
            writeln!(html, "<p>Of phase {}, which has most users; phases are not pooled.</p>", prices.phase);
    }
    html
}

fn best_price(html: &mut String, report: &Report, prices: &PriceAnalysis) {
    let currency = report.results.currency;
    if let Err(reason) = prices.demand {
        let _ = writeln!(html, "<p>No demand curve is drawn, as {}.</p>", esc(reason));
        return;
    }
    match &prices.best_price {
        Ok(best) => {
            let _ = write!(
                html,
                "<p>By the demand curve, {} is highest at <strong>{}</strong>, and the best price lies between {} and {} \
                 (shaded, as far as the charts reach).",
                report.metric(),
                money(best.price, currency),
                money(best.interval.low, currency),
                money(best.interval.high, currency)
            );
            if best.extrapolated {
                html.push_str(
                    " <strong>It was not tested</strong>: a direction for the next experiment, no price to set. Where the line is \
                     dashed, it is a guess.",
                );
            }
            if prices.points.len() == 3 {
                html.push_str(" Three prices hardly tell whether demand has this shape.");
            }
            html.push_str("</p>\n");
        }
        Err(reason) => {
            let _ = writeln!(html, "<p>No best price is named, as {}.</p>", esc(reason));
        }
    }
}

fn one(figure: &Figure) -> String {
    format!("<figure>{}<figcaption>{}</figcaption></figure>\n", figure.svg, figure.caption)
}

fn grid(figures: &[Figure]) -> String {
    format!("<div class=\"charts\">\n{}</div>\n", figures.iter().map(one).collect::<String>())
}

fn loss(loss: f64) -> String {
    if loss.abs() < 1e-6 { "about 0".to_owned() } else { number(loss) }
}

/// What a chart does not show.
fn left_out(of: usize) -> String {
    match of.checked_sub(MOST_ROWS) {
        None | Some(0) => String::new(),
        Some(more) => format!(
            "<p>Of {of} variants the first {MOST_ROWS} are drawn; {more} more are in the table.</p>\n"
        ),
    }
}

pub(super) fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
