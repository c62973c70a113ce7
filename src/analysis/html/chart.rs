//! Charts as inline SVG: a scale, its round ticks, and what is drawn between two of them.
//!
//! All are 360 units wide and of classes only, so that the page's style decides about colours, in the light and in the dark, and
//! text has about its own size on a phone.

use std::fmt::Write;

use super::text::{esc, fixed, letters, scientific};

/// The width of each chart.
pub(super) const WIDTH: f64 = 360.0;
/// The width of a letter of a label, about.
pub(super) const LETTER: f64 = 6.9;

/// From where to where an axis reaches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Scale {
    /// Over all these values. It has a width also where they are one and the same, or none.
    pub(super) fn over(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.into_iter().filter(|v| v.abs() < 1e100) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            return Scale { low: 0.0, high: 1.0 };
        }
        let least = low.abs().max(high.abs()) * 1e-9;
        if high - low > least {
            return Scale { low, high };
        }
        let around = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
        Scale { low: low - around, high: high + around }
    }

    /// With a share of its width added below and above.
    pub(super) fn padded(self, below: f64, above: f64) -> Self {
        let width = self.high - self.low;
        Scale { low: self.low - below * width, high: self.high + above * width }
    }

    pub(super) fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// So many values with the same distance, the ends included.
    pub(super) fn steps(self, n: u32) -> impl Iterator<Item = f64> {
        (0..=n).map(move |i| self.low + (self.high - self.low) * f64::from(i) / f64::from(n.max(1)))
    }

    /// Where a value lies, from 0 to 1. What is beyond the ends is at them.
    fn share(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        if share.is_nan() { 0.0 } else { share }
    }
}

/// A scale with what is written at it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    pub(super) scale: Scale,
    pub(super) ticks: Vec<(f64, String)>,
    pub(super) title: String,
}

impl Axis {
    /// Round numbers, at most so many; fewer, if their labels take more letters than there are.
    pub(super) fn new(scale: Scale, most: u32, room: usize, unit: &str, title: &str) -> Self {
        let of = |most| round_ticks(scale, most, unit);
        let fits = |ticks: &Vec<(f64, String)>| {
            !ticks.is_empty() && ticks.iter().map(|t| letters(&t.1) + 2).sum::<usize>() <= room
        };
        let ticks = (2..=most).rev().map(of).find(fits);
        // A third of the axis is no step from one end to the other: one tick there is.
        let ticks = ticks.unwrap_or_else(|| of(most.max(3)).into_iter().take(1).collect());
        Axis { scale, ticks, title: title.to_owned() }
    }

    /// An axis that says nothing.
    pub(super) fn none() -> Self {
        Axis { scale: Scale { low: 0.0, high: 1.0 }, ticks: Vec::new(), title: String::new() }
    }
}

fn round_ticks(scale: Scale, most: u32, unit: &str) -> Vec<(f64, String)> {
    let raw = (scale.high - scale.low) / f64::from(most);
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|round| round * power).into_iter().find(|step| *step >= raw * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (scale.low / step).ceil();
    // 0.30000000000000004 is 0.3; and there are a few ticks only, whatever is lost in rounding.
    let values = (0..=most).map(|i| (first + f64::from(i)) * step).filter(|v| scale.contains(*v));
    values.map(|value| (value, format!("{}{unit}", tick_label(value, step, scale)))).collect()
}

/// With as many digits as tell it from the next one.
fn tick_label(value: f64, step: f64, scale: Scale) -> String {
    let decimals = |unit: f64| (-(step / unit * 1.001).log10().floor()).max(0.0);
    let largest = scale.low.abs().max(scale.high.abs());
    let units = [(1e15, ""), (1e12, "tn"), (1e9, "bn"), (1e6, "m"), (1e4, "k")];
    match units.into_iter().find(|(unit, _)| largest >= *unit) {
        _ if value.abs() < step / 2.0 => "0".to_owned(),
        Some((_, "")) => scientific(value),
        Some((1e4, name)) if decimals(1e3) <= 1.0 => {
            format!("{}{name}", fixed(value / 1e3, decimals(1e3) as usize))
        }
        Some((unit, name)) if unit > 1e4 && decimals(unit) <= 2.0 => {
            format!("{}{name}", fixed(value / unit, decimals(unit) as usize))
        }
        _ if decimals(1.0) > 6.0 && largest < 1.0 => scientific(value),
        _ => fixed(value, decimals(1.0).min(12.0) as usize),
    }
}

/// Where a text stands, seen from its point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// What is drawn.
pub(super) struct Plot {
    x: Scale,
    y: Scale,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    height: f64,
    svg: String,
    /// Where labels stand already: left, top, right, bottom.
    taken: Vec<[f64; 4]>,
}

impl Plot {
    /// An area with its axes; the height is that of the area alone.
    pub(super) fn new(height: f64, x: &Axis, y: &Axis) -> Self {
        let widest = y.ticks.iter().map(|(_, label)| letters(label)).max().unwrap_or(0);
        let left = if widest == 0 { 8.0 } else { 12.0 + LETTER * widest as f64 };
        let top = if y.title.is_empty() { 6.0 } else { 24.0 };
        let (right, bottom) = (WIDTH - 8.0, top + height);
        let below = if x.ticks.is_empty() { 6.0 } else { 22.0 } + if x.title.is_empty() { 0.0 } else { 18.0 };
        let (svg, taken) = (String::new(), Vec::new());
        let mut plot =
            Plot { x: x.scale, y: y.scale, left, right, top, bottom, height: bottom + below, svg, taken };
        for (value, label) in &y.ticks {
            let at = plot.at_y(*value);
            plot.line("grid", [left, at], [right, at]);
            plot.text("tick", [left - 6.0, at + 4.0], Anchor::End, label);
        }
        if !x.ticks.is_empty() {
            plot.line("axis", [left, bottom], [right, bottom]);
        }
        let mut free = 0.0;
        for (value, label) in &x.ticks {
            let (at, half) = (plot.at_x(*value), LETTER * letters(label) as f64 / 2.0);
            plot.line("axis", [at, bottom], [at, bottom + 4.0]);
            let middle = at.min(WIDTH - half).max(half);
            if middle - half >= free {
                plot.text("tick", [middle, bottom + 17.0], Anchor::Middle, label);
                free = middle + half + 4.0;
            }
        }
        plot.text("title", [2.0, 13.0], Anchor::Start, &y.title);
        plot.text("title", [right, bottom + 35.0], Anchor::End, &x.title);
        plot
    }

    pub(super) fn at_x(&self, value: f64) -> f64 {
        self.left + self.x.share(value) * (self.right - self.left)
    }

    pub(super) fn at_y(&self, value: f64) -> f64 {
        self.bottom - self.y.share(value) * (self.bottom - self.top)
    }

    pub(super) fn top(&self) -> f64 {
        self.top
    }

    pub(super) fn bottom(&self) -> f64 {
        self.bottom
    }

    pub(super) fn left(&self) -> f64 {
        self.left
    }

    pub(super) fn right(&self) -> f64 {
        self.right
    }

    pub(super) fn line(&mut self, class: &str, from: [f64; 2], to: [f64; 2]) {
        let ([x1, y1], [x2, y2]) = (from.map(unit), to.map(unit));
        let _ = write!(self.svg, "<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>");
    }

    /// A line through values.
    pub(super) fn curve(&mut self, class: &str, values: &[(f64, f64)]) {
        let points: Vec<[f64; 2]> = values.iter().map(|(x, y)| [self.at_x(*x), self.at_y(*y)]).collect();
        if points.len() > 1 {
            self.shape("polyline", class, &points);
        }
    }

    /// What lies between two lines: x, low, high.
    pub(super) fn band(&mut self, class: &str, values: &[(f64, f64, f64)]) {
        let lows = values.iter().map(|(x, low, _)| [self.at_x(*x), self.at_y(*low)]);
        let highs = values.iter().rev().map(|(x, _, high)| [self.at_x(*x), self.at_y(*high)]);
        let points: Vec<[f64; 2]> = lows.chain(highs).collect();
        if values.len() > 1 {
            self.shape("polygon", class, &points);
        }
    }

    pub(super) fn shape(&mut self, element: &str, class: &str, points: &[[f64; 2]]) {
        let _ = write!(self.svg, "<{element} class=\"{class}\" points=\"");
        for (i, [x, y]) in points.iter().enumerate() {
            let _ = write!(self.svg, "{}{},{}", if i == 0 { "" } else { " " }, unit(*x), unit(*y));
        }
        self.svg.push_str("\"/>");
    }

    /// A point, with what is shown of it under a mouse.
    pub(super) fn dot(&mut self, class: &str, [x, y]: [f64; 2], tip: &str) {
        let (x, y, tip) = (unit(x), unit(y), esc(tip));
        let _ = write!(
            self.svg,
            "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"4\"><title>{tip}</title></circle>"
        );
    }

    /// An upright interval, at a place.
    pub(super) fn whisker(&mut self, class: &str, x: f64, low: f64, high: f64) {
        let (low, high) = (self.at_y(low), self.at_y(high));
        self.line(class, [x, low], [x, high]);
        for end in [low, high] {
            self.line(class, [x - 4.0, end], [x + 4.0, end]);
        }
    }

    pub(super) fn text(&mut self, class: &str, [x, y]: [f64; 2], anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        if !text.is_empty() {
            let (x, y, text) = (unit(x), unit(y), esc(text));
            let _ = write!(
                self.svg,
                "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>"
            );
        }
    }

    /// A text around the first of these points at which it stands inside the area and on no other label; nothing, if there is none.
    pub(super) fn label(&mut self, class: &str, at: &[[f64; 2]], text: &str) -> bool {
        let half = LETTER * letters(text) as f64 / 2.0 + 3.0;
        for [x, y] in at {
            let x = x.max(self.left + half).min(self.right - half);
            let own = [x - half, y - 11.0, x + half, y + 4.0];
            let is_apart = |other: &[f64; 4]| {
                own[2] <= other[0] || other[2] <= own[0] || own[3] <= other[1] || other[3] <= own[1]
            };
            if own[1] >= self.top - 3.0 && own[3] <= self.bottom && self.taken.iter().all(is_apart) {
                self.taken.push(own);
                self.text(class, [x, *y], Anchor::Middle, text);
                return true;
            }
        }
        false
    }

    /// The whole, with its name and what it shows, for those who do not see it.
    pub(super) fn finish(self, name: &str, description: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\"><desc>{}</desc>{}</svg>",
            unit(self.height),
            esc(name),
            esc(description),
            self.svg
        )
    }
}

/// A tenth of a unit is less than a pixel. Not a number is nowhere.
fn unit(value: f64) -> f64 {
    let value = (value * 10.0).round() / 10.0;
    // Minus zero is zero.
    if value.is_finite() { value + 0.0 } else { 0.0 }
}
