//! Text that may stand in a page: escaped, and numbers as people read them.

use std::fmt::Display;

use crate::money::{Currency, Money};

/// A space at which no line ends.
const NARROW: char = '\u{a0}';

/// Text of anybody's, as text: in an element as well as in a quoted attribute.
///
/// Controls are no text, and those of the direction would turn around what stands beside them; they are shown as �.
pub(super) fn esc(text: impl Display) -> String {
    let mut escaped = String::new();
    for c in text.to_string().chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => escaped.push('\u{fffd}'),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c if c.is_control() && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A name, escaped, that runs in its own direction and leaves what is beside it alone.
pub(super) fn name(name: &str) -> String {
    format!("<bdi class=\"name\">{}</bdi>", esc(name))
}

/// A sentence whose names stand in backticks, escaped, with a capital letter and a full stop.
pub(super) fn sentence(text: impl Display) -> String {
    let text = text.to_string();
    let mut html = String::new();
    for (i, part) in text.split('`').enumerate() {
        match part.chars().next() {
            _ if i % 2 == 1 => html.push_str(&name(part)),
            Some(first) if i == 0 => {
                html.extend(first.to_uppercase());
                html.push_str(&esc(&part[first.len_utf8()..]));
            }
            _ => html.push_str(&esc(part)),
        }
    }
    html + "."
}

/// What fits into so many letters; wide characters are two.
pub(super) fn fit(text: &str, letters: usize) -> String {
    let mut left = letters;
    let mut end = 0;
    for (at, c) in text.char_indices() {
        let wide = if c < '\u{1100}' { 1 } else { 2 };
        if wide > left {
            // One letter less, for the dots.
            let kept = text[..end].char_indices().next_back().map_or(0, |(last, _)| last);
            return format!("{}…", &text[..kept]);
        }
        left -= wide;
        end = at + c.len_utf8();
    }
    text.to_owned()
}

/// How many letters wide a text is, about.
pub(super) fn letters(text: &str) -> usize {
    text.chars().map(|c| if c < '\u{1100}' { 1 } else { 2 }).sum()
}

/// A number with as many digits as are worth reading.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        return "unknown".to_owned();
    }
    if size != 0.0 && !(1e-6..1e15).contains(&size) {
        return scientific(value);
    }
    let decimals = match size {
        0.0 | 1.0..100.0 => 2,
        100.0..1000.0 => 1,
        1000.0.. => 0,
        _ => 1 + (-size.log10()).ceil() as usize,
    };
    fixed(value, decimals)
}

/// The same, with a plus where it is one.
pub(super) fn signed(value: f64) -> String {
    plus(value, number(value))
}

/// A share in percent.
pub(super) fn percent(share: f64) -> String {
    let value = share * 100.0;
    let text = match value.abs() {
        0.0 | 1.0..1000.0 => fixed(value, 1),
        0.01..1.0 => fixed(value, 2),
        1000.0.. => number(value),
        size if size < 0.01 => fixed(value, 2),
        _ => number(value),
    };
    format!("{text}{NARROW}%")
}

/// The same, with a plus where it is one.
pub(super) fn signed_percent(share: f64) -> String {
    plus(share, percent(share))
}

/// A probability, which is never said to be certain.
pub(super) fn chance(chance: f64) -> String {
    match chance {
        c if c > 0.999 => format!("over 99.9{NARROW}%"),
        c if c < 0.001 => format!("below 0.1{NARROW}%"),
        c => format!("{}{NARROW}%", fixed(c * 100.0, 1)),
    }
}

/// An amount in minor units, unless there is less of it.
pub(super) fn money(value: f64, currency: Currency) -> String {
    // Cents of a large amount are noise.
    let digits = if value.abs() < 10_000.0 { currency.minor_digits() } else { 0 };
    let shown = value == 0.0 || (10f64.powi(-(digits as i32))..1e15).contains(&value.abs());
    let text = if shown { fixed(value, digits as usize) } else { number(value) };
    format!("{text}{NARROW}{}", esc(currency))
}

/// About so many: three digits are as many as are known.
pub(super) fn about(n: u64) -> String {
    let unit = 10u64.pow(n.max(1).ilog10().saturating_sub(2));
    count((n / unit + u64::from(n % unit >= unit.div_ceil(2) && unit > 1)).saturating_mul(unit))
}

/// A price, exactly.
pub(super) fn price(price: Money) -> String {
    let text = price.amount().to_string();
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("−", digits));
    format!("{sign}{}{rest}{NARROW}{}", grouped(digits), price.currency())
}

/// A p-value, which is never 0.
pub(super) fn p_value(p: f64) -> String {
    if p < 0.001 { "p below 0.001".to_owned() } else { format!("p = {p:.3}") }
}

pub(super) fn count(n: u64) -> String {
    grouped(&n.to_string())
}

/// So many digits after the point, and commas before it.
pub(super) fn fixed(value: f64, decimals: usize) -> String {
    let text = format!("{:.decimals$}", value.abs());
    let sign = if value < 0.0 && text.contains(|c: char| ('1'..='9').contains(&c)) { "−" } else { "" };
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    format!("{sign}{}{rest}", grouped(whole))
}

pub(super) fn scientific(value: f64) -> String {
    format!("{value:.1e}").replace('-', "−").replace(".0e", "e")
}

fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn plus(value: f64, text: String) -> String {
    if value > 0.0 && value.is_finite() { format!("+{text}") } else { text }
}
