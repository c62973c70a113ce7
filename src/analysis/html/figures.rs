//! The charts of a report.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{Datelike, NaiveDate};

use super::chart::{Anchor, Axis, LETTER, Plot, Scale};
use super::text::{chance, fit, letters, name, number, percent, signed, signed_percent};
use crate::analysis::{Comparison, DailyMean, Report};
use crate::stats::{Effect, Posterior};

/// Panels of a phase, and rows of a chart: an experiment may have a thousand variants, and nobody looks at so many.
pub(super) const MOST_ROWS: usize = 12;
/// Phases that are drawn, the newest.
const MOST_PHASES: usize = 3;
/// Points of a line; a screen has no more.
const MOST_POINTS: usize = 200;

/// A chart with the sentence below it, which is HTML.
pub(super) struct Figure {
    pub(super) svg: String,
    pub(super) caption: String,
}

/// What is judged, in a word.
pub(super) fn title(metric: &str, rest: &str) -> String {
    let (first, others) = metric.split_at(1);
    format!("{}{others} {rest}", first.to_uppercase())
}

/// Each variant beside the baseline, day by day: one panel each, as more than two bands cover each other.
pub(super) fn daily(report: &Report) -> Vec<Figure> {
    let results = &report.results;
    let mut lines: BTreeMap<(i32, &str), Vec<&DailyMean>> = BTreeMap::new();
    for day in &report.daily {
        lines.entry((day.phase, &day.variant)).or_default().push(day);
    }
    let phases: BTreeSet<i32> = lines.keys().map(|(phase, _)| *phase).collect();
    let several = results.arms.iter().any(|arm| arm.phase > 1);
    let mut figures = Vec::new();
    for phase in phases.into_iter().rev().take(MOST_PHASES) {
        let baseline = lines.get(&(phase, results.baseline.as_str()));
        let in_phase =
            results.arms.iter().filter(|arm| arm.phase == phase && arm.variant != results.baseline);
        let mut others: Vec<_> =
            in_phase.filter_map(|arm| lines.get(&(phase, arm.variant.as_str()))).collect();
        others.truncate(MOST_ROWS);
        let of_phase = || baseline.iter().chain(&others).flat_map(|line| line.iter());
        let Some(days) = days(of_phase()) else { continue };
        let wide = others.len().max(1);
        let y = vertical(&baseline.into_iter().chain(others.iter().copied()).collect::<Vec<_>>());
        let per_user = format!("{} per user, {}", title(report.metric(), "").trim(), results.currency);
        let axes = (days, Axis::new(y, 5, usize::MAX, "", &per_user));
        for i in 0..wide {
            let line = others.get(i);
            let mut caption = match (line, baseline) {
                (Some(line), Some(_)) => {
                    format!(
                        "{} (solid) and the baseline {} (dashed)",
                        name(&line[0].variant),
                        name(&results.baseline)
                    )
                }
                (Some(line), None) => name(&line[0].variant),
                (None, _) => format!("The baseline {}", name(&results.baseline)),
            };
            if several {
                caption += &format!(", phase {phase}");
            }
            let svg = panel(&axes, baseline.map(Vec::as_slice), line.map(|line| line.as_slice()), report);
            figures.push(Figure { svg, caption: caption + "." });
        }
    }
    figures
}

/// Days are counted from the first of all.
fn day_number(day: NaiveDate) -> f64 {
    f64::from(day.num_days_from_ce())
}

fn days<'d>(days: impl Iterator<Item = &'d &'d DailyMean>) -> Option<Axis> {
    let all: BTreeSet<NaiveDate> = days.map(|day| day.day).collect();
    let (first, last) = (*all.first()?, *all.last()?);
    let scale = match first == last {
        true => Scale { low: day_number(first) - 1.0, high: day_number(first) + 1.0 },
        false => Scale { low: day_number(first), high: day_number(last) },
    };
    let long = (last - first).num_days();
    let mut ticks = Vec::new();
    if long <= 70 {
        let step = [1, 2, 7, 14].into_iter().find(|step| long / step < 6).unwrap_or(14) as usize;
        // No time zone, no leap: a day after a day.
        let days = first.iter_days().take_while(|day| *day <= last).step_by(step);
        ticks.extend(days.map(|day| (day_number(day), day.format("%-d %b").to_string())));
    } else {
        let month = |day: NaiveDate| day.year() * 12 + day.month0() as i32;
        let months = month(last) - month(first);
        let step =
            [1, 2, 3, 6, 12, 24, 60].into_iter().find(|step| months / step < 5).unwrap_or(1 + months / 4);
        let firsts = (month(first)..=month(last)).filter(|month| month.rem_euclid(step) == 0);
        let day =
            |month: i32| NaiveDate::from_ymd_opt(month.div_euclid(12), month.rem_euclid(12) as u32 + 1, 1);
        let firsts = firsts.filter_map(day).filter(|day| *day >= first);
        ticks.extend(firsts.map(|day| (day_number(day), day.format("%b %Y").to_string())));
    }
    let title =
        format!("Day of assignment (UTC), {} to {}", first.format("%-d %b %Y"), last.format("%-d %b %Y"));
    Some(Axis { scale, ticks, title })
}

/// The first days have too few users to say anything; their bands run out of the picture, so that the others can be seen.
fn vertical(lines: &[&Vec<&DailyMean>]) -> Scale {
    let mut values = Vec::new();
    for line in lines {
        let last = line.last().map_or(0, |day| day.users);
        for day in line.iter().filter(|day| day.users >= last / 5) {
            values.push(day.mean);
            values.extend(day.interval.iter().flat_map(|interval| [interval.low, interval.high]));
        }
    }
    Scale::over(values).padded(0.05, 0.1)
}

fn panel(
    axes: &(Axis, Axis),
    baseline: Option<&[&DailyMean]>,
    other: Option<&[&DailyMean]>,
    report: &Report,
) -> String {
    let currency = report.results.currency;
    let mut plot = Plot::new(190.0, &axes.0, &axes.1);
    let lines = [(baseline, "base"), (other, "other")];
    let thin = |line: &[&DailyMean]| -> Vec<DailyMean> {
        let every = line.len().div_ceil(MOST_POINTS).max(1);
        // Counted from the last one, which is what counts.
        let mut kept: Vec<DailyMean> = line.iter().rev().step_by(every).map(|day| (*day).clone()).collect();
        kept.reverse();
        kept
    };
    let lines = lines.map(|(line, class)| (line.map(thin).unwrap_or_default(), class));
    for (line, class) in &lines {
        let band = line.iter().filter_map(|d| d.interval.map(|i| (day_number(d.day), i.low, i.high)));
        plot.band(&format!("{class} band"), &band.collect::<Vec<_>>());
    }
    let lasts = lines.each_ref().map(|(line, _)| line.last().map_or(f64::NAN, |day| day.mean));
    let (mut shown, mut labels) = (Vec::new(), Vec::new());
    for (i, (line, class)) in lines.iter().enumerate() {
        let Some(last) = line.last() else { continue };
        let values: Vec<(f64, f64)> = line.iter().map(|d| (day_number(d.day), d.mean)).collect();
        plot.curve(&format!("{class} line"), &values);
        let (mut at_x, at_y) = (plot.at_x(day_number(last.day)), plot.at_y(last.mean));
        if let (1, Some(interval)) = (line.len(), last.interval) {
            // One day makes no line; and two intervals of it stand side by side.
            at_x += if i == 0 { -8.0 } else { 8.0 };
            plot.whisker(&format!("{class} whisker"), at_x, interval.low, interval.high);
        }
        let mean = format!("{} {currency}", number(last.mean));
        let between = last.interval.map_or_else(String::new, |interval| {
            format!(", between {} and {}", number(interval.low), number(interval.high))
        });
        let tip = format!("{} on {}: {mean} of {} users{between}", last.variant, last.day, last.users);
        plot.dot(class, [at_x, at_y], &tip);
        shown.push(tip);
        // Above its line if it is the upper one, else below.
        let (above, below) = ([at_x, at_y - 9.0], [at_x, at_y + 18.0]);
        let is_upper =
            lasts[1 - i].is_nan() || last.mean > lasts[1 - i] || (last.mean == lasts[1 - i] && i == 1);
        let places = if is_upper { [above, below] } else { [below, above] };
        // The mark keeps the number on the right of a name that runs to the left.
        let label = format!("{}\u{200e} {}", fit(&last.variant, 16), number(last.mean));
        let far = [[at_x, plot.top() + 14.0], [at_x, plot.bottom() - 6.0]];
        labels.push((format!("{class} label"), [places, far].concat(), label));
    }
    // Above all lines.
    for (class, places, label) in labels {
        plot.label(&class, &places, &label);
    }
    plot.finish(&format!("{} day by day", title(report.metric(), "per user")), &shown.join("; "))
}

/// One row for each variant: its name, what is known of it, and room for a drawing.
struct Rows {
    plot: Plot,
    each: f64,
    next: f64,
    /// Upright lines that go through all drawings: class and value.
    marks: Vec<(&'static str, f64)>,
}

impl Rows {
    fn new(rows: usize, each: f64, x: &Axis, marks: Vec<(&'static str, f64)>) -> Self {
        let plot = Plot::new(rows as f64 * each + 4.0, x, &Axis::none());
        let next = plot.top();
        Rows { plot, each, next, marks }
    }

    /// Begins a row; returns the height of what is drawn in it.
    fn row(&mut self, variant: &str, said: &str) -> f64 {
        let (left, right, at) = (self.plot.left(), self.plot.right(), self.next);
        let room = ((right - left) / LETTER) as usize - letters(said).min(34) - 2;
        self.plot.text("name-label", [left, at + 13.0], Anchor::Start, &fit(variant, room));
        self.plot.text("said", [right, at + 13.0], Anchor::End, said);
        self.next += self.each;
        for (class, value) in &self.marks {
            let x = self.plot.at_x(*value);
            self.plot.line(class, [x, at + 19.0], [x, self.next]);
        }
        self.next - 12.0
    }
}

/// Where the difference of each variant lies, by the confidence sequence that decides; none, if there is none to draw.
pub(super) fn intervals(report: &Report) -> Option<Figure> {
    let known = report.comparisons.iter().filter_map(|c| Some((c, report.deciding(c).ok()?)));
    let known: Vec<_> = known.take(MOST_ROWS).collect();
    let ends = known.iter().flat_map(|(_, found)| [found.interval.low, found.interval.high]);
    let scale = Scale::over(ends.chain([0.0])).padded(0.04, 0.04);
    let more = format!("{} per user than the baseline", title("more", report.metric()));
    let axis = Axis::new(scale, 6, 44, "", &format!("{more}, {}", report.results.currency));
    if known.is_empty() {
        return None;
    }
    let mut rows = Rows::new(known.len(), 44.0, &axis, vec![("zero", 0.0)]);
    let mut shown = Vec::new();
    for (comparison, found) in &known {
        let between = format!("{} to {}", signed(found.interval.low), signed(found.interval.high));
        let said = format!("{} ({between})", signed(found.estimate));
        let short = if letters(&said) > 34 { signed(found.estimate) } else { said.clone() };
        let at = rows.row(&comparison.variant, &short);
        let [x, low, high] =
            [found.estimate, found.interval.low, found.interval.high].map(|value| rows.plot.at_x(value));
        rows.plot.line("other interval", [low, at], [high, at]);
        for end in [low, high] {
            rows.plot.line("other interval", [end, at - 5.0], [end, at + 5.0]);
        }
        let tip = format!("{}: {said} {}", comparison.variant, report.results.currency);
        rows.plot.dot("other", [x, at], &tip);
        shown.push(tip);
    }
    let svg = rows.plot.finish("Each variant less the baseline, with its interval", &shown.join("; "));
    let caption = "How to read it: the point is the best guess, the line has every difference that the data allows. Right of 0 is more than the baseline; a line that does not touch 0 is a clear difference. In percent one is a \
                   little less sure, as the baseline is a guess, too."
        .to_owned();
    Some(Figure { svg, caption })
}

/// The posterior of the lift of each variant.
pub(super) fn posterior(report: &Report) -> Option<Figure> {
    let known = known_lifts(report).into_iter().filter_map(|(comparison, lift)| {
        let posterior = Posterior::new(lift.estimate, lift.standard_error).ok()?;
        Some((comparison, posterior, posterior.interval(report.alpha()).ok()?))
    });
    let known: Vec<_> = known.collect();
    let ends = known.iter().flat_map(|(_, p, _)| [p.mean() - 3.2 * p.sd(), p.mean() + 3.2 * p.sd()]);
    let scale = Scale::over(ends.chain([0.0]).map(|share| share * 100.0)).padded(0.04, 0.04);
    let axis =
        Axis::new(scale, 6, 44, "\u{a0}%", &format!("{} than the baseline", title("more", report.metric())));
    if known.is_empty() {
        return None;
    }
    let mut rows = Rows::new(known.len(), 76.0, &axis, vec![("zero", 0.0)]);
    let mut shown = Vec::new();
    for (comparison, posterior, interval) in &known {
        let wins = comparison.chance_to_win.map_or_else(|_| "chance unknown".to_owned(), chance);
        let at = rows.row(&comparison.variant, &format!("better: {wins}"));
        let whole = Scale {
            low: posterior.mean() - 3.2 * posterior.sd(),
            high: posterior.mean() + 3.2 * posterior.sd(),
        };
        let height =
            |lift: f64| at - 38.0 * (-0.5 * ((lift - posterior.mean()) / posterior.sd()).powi(2)).exp();
        // Cut at zero: below it, the variant is worse.
        let cut = 0f64.clamp(whole.low, whole.high);
        for (class, part) in [
            ("hill worse", Scale { low: whole.low, high: cut }),
            ("hill better", Scale { low: cut, high: whole.high }),
        ] {
            if part.high > part.low {
                let hill = part.steps(60).map(|lift| [rows.plot.at_x(lift * 100.0), height(lift)]);
                let ends = [part.high, part.low].map(|lift| [rows.plot.at_x(lift * 100.0), at]);
                let points: Vec<[f64; 2]> = hill.chain(ends).collect();
                rows.plot.shape("polygon", class, &points);
            }
        }
        let [x, low, high] =
            [posterior.mean(), interval.low, interval.high].map(|lift| rows.plot.at_x(lift * 100.0));
        rows.plot.line("other interval", [low, at], [high, at]);
        let between = format!("{} to {}", signed_percent(interval.low), signed_percent(interval.high));
        let tip = format!(
            "{}: {} ({between}), better: {wins}",
            comparison.variant,
            signed_percent(posterior.mean())
        );
        rows.plot.dot("other", [x, at], &tip);
        shown.push(tip);
    }
    let svg = rows.plot.finish("The posterior of each variant's lift", &shown.join("; "));
    let caption = format!(
        "How to read it: the higher the hill, the likelier the lift; the filled part, right of 0, is the chance to be better than the \
         baseline. The line below has {} of the hill. Not protected against peeking: it is for one look, and does not replace the \
         intervals above.",
        percent(1.0 - report.results.plan.alpha)
    );
    Some(Figure { svg, caption })
}

fn known_lifts(report: &Report) -> Vec<(&Comparison, Effect)> {
    report.comparisons.iter().filter_map(|c| Some((c, c.lift.ok()?))).take(MOST_ROWS).collect()
}
