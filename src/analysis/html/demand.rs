//! The charts over the price.

use rust_decimal::prelude::ToPrimitive;

use super::chart::{Axis, Plot, Scale, WIDTH};
use super::figures::{Figure, title};
use super::text::{fit, money, number, percent, price};
use crate::analysis::{PriceAnalysis, PricePoint, Report};
use crate::money::Currency;
use crate::stats::{AtPrice, DemandCurve, Interval, NotEstimable, OptimalPrice};

/// The share of buyers over the price, and what that brings.
pub(super) fn prices(report: &Report, prices: &PriceAnalysis) -> Vec<Figure> {
    if prices.points.is_empty() {
        return Vec::new();
    }
    let currency = report.results.currency;
    let alpha = report.alpha();
    let x = horizontal(prices, &format!("Price, {currency}"));
    let rate = |curve: &DemandCurve, price: f64| {
        let at = curve.rate_at(price, alpha)?;
        Ok(AtPrice { estimate: at.estimate * 100.0, interval: times(at.interval, 100.0), ..at })
    };
    let rates = prices.points.iter().map(|point| {
        let share = point.conversion.rate().unwrap_or_default() * 100.0;
        (share, point.interval.ok().map(|interval| times(interval, 100.0)))
    });
    let demand = Drawing {
        x: &x,
        title: "Share of users who buy".to_owned(),
        unit: "\u{a0}%",
        observed: rates.collect(),
        curve: curve(prices, &x, rate),
        name: "The demand curve",
        say: |value| percent(value / 100.0),
    };
    let earned = |curve: &DemandCurve, price: f64| curve.margin_at(price, prices.unit_cost, alpha);
    let brought = Drawing {
        x: &x,
        title: format!("{} per 1,000 users, {currency}", title(report.metric(), "").trim()),
        unit: "",
        observed: prices.points.iter().map(|point| (point.per_thousand, None)).collect(),
        curve: curve(prices, &x, earned),
        name: "What each price brings",
        say: number,
    };
    let cost = if prices.unit_cost > 0.0 { " less the unit cost" } else { "" };
    let lines = match prices.demand {
        Ok(_) => [
            " The line is the demand curve that fits them best, the band is where it may lie.".to_owned(),
            format!(" The line counts one sale at the price{cost}; where it is highest, the price is best."),
        ],
        Err(_) => Default::default(),
    };
    let captions = [
        format!(
            "How to read it: each point is a tested price with the interval of its share of buyers.{}",
            lines[0]
        ),
        format!(
            "How to read it: each point is what users at a price really brought, with all quantities, renewals, discounts and refunds.{}",
            lines[1]
        ),
    ];
    let figures = [demand, brought].into_iter().zip(captions);
    figures.map(|(drawing, caption)| Figure { svg: drawing.draw(report, prices), caption }).collect()
}

fn times(interval: Interval, by: f64) -> Interval {
    Interval { low: interval.low * by, high: interval.high * by }
}

fn price_of(point: &PricePoint) -> f64 {
    point.price.amount().to_f64().unwrap_or_default()
}

/// The tested prices, and the best one unless it is too far away to see both.
fn horizontal(prices: &PriceAnalysis, title: &str) -> Axis {
    let tested = Scale::over(prices.points.iter().map(price_of));
    let near = tested.padded(1.0, 1.0);
    let best = prices.best_price.ok().map(|best| best.price).filter(|best| near.contains(*best));
    let scale = Scale::over([tested.low, tested.high].into_iter().chain(best)).padded(0.12, 0.12);
    let scale = if tested.low >= 0.0 { Scale { low: scale.low.max(0.0), ..scale } } else { scale };
    Axis::new(scale, 6, 44, "", title)
}

fn curve(
    prices: &PriceAnalysis,
    x: &Axis,
    of: impl Fn(&DemandCurve, f64) -> Result<AtPrice, NotEstimable>,
) -> Vec<(f64, AtPrice)> {
    let Ok(curve) = &prices.demand else { return Vec::new() };
    let mut places: Vec<f64> = x.scale.steps(100).collect();
    // The ends of what was tested, where the line becomes a dashed one.
    places.extend([curve.tested.low, curve.tested.high]);
    places.sort_by(f64::total_cmp);
    places.into_iter().filter_map(|price| Some((price, of(curve, price).ok()?))).collect()
}

/// One chart over the price.
struct Drawing<'a> {
    x: &'a Axis,
    title: String,
    unit: &'a str,
    observed: Vec<(f64, Option<Interval>)>,
    curve: Vec<(f64, AtPrice)>,
    name: &'a str,
    say: fn(f64) -> String,
}

impl Drawing<'_> {
    fn draw(&self, report: &Report, prices: &PriceAnalysis) -> String {
        let currency = report.results.currency;
        let (line, points): (Vec<_>, Vec<_>) = (
            self.curve.iter().map(|(_, at)| at.estimate).collect(),
            self.observed.iter().map(|(value, _)| *value).collect(),
        );
        let within = self.curve.iter().filter(|(_, at)| !at.extrapolated);
        let ends = within.flat_map(|(_, at)| [at.interval.low, at.interval.high]);
        let whiskers = self.observed.iter().flat_map(|(_, i)| i.iter().flat_map(|i| [i.low, i.high]));
        let best = prices.best_price.ok();
        let above = if best.is_some() { 0.25 } else { 0.12 };
        let scale = Scale::over(ends.chain(whiskers).chain(line).chain(points)).padded(0.06, above);
        let mut plot = Plot::new(200.0, self.x, &Axis::new(scale, 5, usize::MAX, self.unit, &self.title));
        let band: Vec<_> = self.curve.iter().map(|(x, at)| (*x, at.interval.low, at.interval.high)).collect();
        plot.band("other band", &band);
        let mut shown = Vec::new();
        if let Some(best) = best {
            shown.push(draw_best(&mut plot, self.x.scale, &best, currency));
        }
        // Solid where prices were tested, dashed where it is a guess.
        for part in self.curve.chunk_by(|one, other| one.1.extrapolated == other.1.extrapolated) {
            let class = if part[0].1.extrapolated { "other line guess" } else { "other line" };
            plot.curve(class, &part.iter().map(|(x, at)| (*x, at.estimate)).collect::<Vec<_>>());
        }
        let mut labels = Vec::new();
        for (i, (point, (value, interval))) in prices.points.iter().zip(&self.observed).enumerate() {
            // Those of one price stand side by side.
            let same =
                |points: &[PricePoint]| points.iter().filter(|other| other.price == point.price).count();
            let aside = same(&prices.points[..i]) as f64 - (same(&prices.points) as f64 - 1.0) / 2.0;
            let x = plot.at_x(price_of(point)) + (14.0 * aside).clamp(-20.0, 20.0);
            let (low, high) = interval.map_or((*value, *value), |interval| (interval.low, interval.high));
            if interval.is_some() {
                plot.whisker("point whisker", x, low, high);
            }
            let tip = format!("{} at {}: {}", point.variant, price(point.price), (self.say)(*value));
            plot.dot("point", [x, plot.at_y(*value)], &tip);
            shown.push(tip);
            let places = [[x, plot.at_y(high) - 8.0], [x, plot.at_y(low) + 17.0]];
            labels.push((fit(&point.variant, 14), places));
        }
        for (label, places) in labels {
            plot.label("point label", &places, &label);
        }
        plot.finish(self.name, &shown.join("; "))
    }
}

fn draw_best(plot: &mut Plot, x: Scale, best: &OptimalPrice, currency: Currency) -> String {
    let (at, top, bottom) = (plot.at_x(best.price), plot.top(), plot.bottom());
    let [low, high] = [best.interval.low, best.interval.high].map(|price| plot.at_x(price));
    plot.shape("polygon", "best range", &[[low, top], [high, top], [high, bottom], [low, bottom]]);
    let caution = if best.extrapolated { ", not tested" } else { "" };
    if x.contains(best.price) {
        plot.line("best mark", [at, top], [at, bottom]);
        plot.label(
            "best label",
            &[[at, top + 12.0]],
            &format!("best: {}{caution}", money(best.price, currency)),
        );
    } else {
        let aside = if best.price > x.high { WIDTH } else { 0.0 };
        let label = format!("best: {}{caution}, off the chart", money(best.price, currency));
        plot.label("best label", &[[aside, top + 12.0]], &label);
    }
    format!(
        "the best price is {}{caution}, between {} and {}",
        money(best.price, currency),
        money(best.interval.low, currency),
        money(best.interval.high, currency)
    )
}
