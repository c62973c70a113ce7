//! Tails and quantiles of the distributions that the tests need, exact in the far tail and for billions of users.
//!
//! By measurement against mpmath: `statrs` 0.19 loses the tail of Student's t as it grows (relative error 3e-6 at 2e9 degrees of
//! freedom, where log-gammas of 1e10 cancel), and its `erfc` has 10 digits. So `libm` gives `erfc` and `lgamma` (one unit in the
//! last place), and the few formulas on top of them are here, arranged as Loader (2000, "Fast and accurate computation of
//! binomial probabilities") does: large terms cancel on paper, not in the computer.

use std::f64::consts::{PI, SQRT_2};

/// The share of a standard normal above `z`.
pub(super) fn normal_tail(z: f64) -> f64 {
    0.5 * libm::erfc(z / SQRT_2)
}

/// Where the upper tail of a standard normal is `p`, in (0, 1).
pub(super) fn normal_quantile(p: f64) -> f64 {
    quantile(p, |z| (normal_tail(z), z * (-0.5 * z * z).exp() / (2.0 * PI).sqrt()))
}

/// The share of Student's t above `t`, at `df` degrees of freedom: half of I_x(df/2, 1/2) at x = df/(df + t²) for t > 0.
pub(super) fn t_tail(t: f64, df: f64) -> f64 {
    let (upper, _) = upper_t(t.abs(), df);
    if t < 0.0 { 1.0 - upper } else { upper }
}

/// Where the upper tail of Student's t is `p`, in (0, 1).
pub(super) fn t_quantile(p: f64, df: f64) -> f64 {
    quantile(p, |t| upper_t(t, df))
}

/// The tail above `t` ≥ 0, and `t` times the density there.
fn upper_t(t: f64, df: f64) -> (f64, f64) {
    let ratio = t * t / df;
    // Both written so that neither a tiny nor an infinite ratio makes NaN.
    let (x, y) = (1.0 / (1.0 + ratio), 1.0 / (1.0 + 1.0 / ratio));
    (0.5 * beta_regularised(0.5 * df, 0.5, x, y), beta_term(0.5 * df, 0.5, x, y))
}

/// Newton's method for ln(tail) over ln(t), where the tails of both distributions are concave: it converges from everywhere.
/// `tail` gives the tail above t > 0, and t times the density.
fn quantile(p: f64, tail: impl Fn(f64) -> (f64, f64)) -> f64 {
    if p > 0.5 {
        return -quantile(1.0 - p, tail);
    }
    if p == 0.5 {
        return 0.0;
    }
    // Abramowitz and Stegun 26.2.23: the normal quantile to 4.5e-4.
    let r = (-2.0 * p.ln()).sqrt();
    let numerator = 2.515517 + r * (0.802853 + r * 0.010328);
    let mut t = (r - numerator / (1.0 + r * (1.432788 + r * (0.189269 + r * 0.001308)))).max(1e-9);
    for _ in 0..100 {
        let (above, slope) = tail(t);
        let step = (above / p).ln() * above / slope;
        if !step.is_finite() {
            break;
        }
        t *= step.clamp(-3.0, 30.0).exp();
        if step.abs() < 4.0 * f64::EPSILON {
            break;
        }
    }
    t
}

/// The share of χ² above `x`, at `df` ≥ 1 degrees of freedom (Abramowitz and Stegun 26.4.4 and 26.4.5).
pub(super) fn chi_squared_tail(x: f64, df: u32) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let half = 0.5 * x;
    let odd = df % 2 == 1;
    let mut tail = if odd { libm::erfc(half.sqrt()) } else { 0.0 };
    let mut power = if odd { 0.5 } else { 0.0 };
    while power < 0.5 * f64::from(df) {
        // Each term by its logarithm: exp(-x/2) alone is 0 long before the sum is.
        tail += (power * half.ln() - half - libm::lgamma(power + 1.0)).exp();
        power += 1.0;
    }
    tail.min(1.0)
}

/// I_x(a, b), the regularised incomplete beta function, with y = 1 − x given apart, as near 1 it is more exact than x.
pub(super) fn beta_regularised(a: f64, b: f64, x: f64, y: f64) -> f64 {
    if x <= 0.0 {
        0.0
    } else if y <= 0.0 {
        1.0
    } else if a * y < b * x {
        1.0 - beta_term(b, a, y, x) / beta_fraction(b, a, y, x)
    } else {
        beta_term(a, b, x, y) / beta_fraction(a, b, x, y)
    }
}

/// x^a·y^b / B(a, b).
fn beta_term(a: f64, b: f64, x: f64, y: f64) -> f64 {
    if x <= 0.0 || y <= 0.0 {
        return 0.0;
    }
    let n = a + b;
    let log = stirling(n) - stirling(a) - stirling(b) - deviance(a, n * x) - deviance(b, n * y);
    (a / n * b / (2.0 * PI)).sqrt() * log.exp()
}

/// The continued fraction of Didonato and Morris (1992, "Algorithm 708", eq. 9), which does not cancel where a·y is little, by
/// the method of Lentz as Thompson and Barnett (1986) have it.
fn beta_fraction(a: f64, b: f64, x: f64, y: f64) -> f64 {
    let kept = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let lambda = a * y - b * x;
    let denominator = |n: f64| {
        n + n * (b - n) * x / (a + 2.0 * n - 1.0)
            + (a + n) / (a + 2.0 * n + 1.0) * (lambda + 1.0 + n * (1.0 + y))
    };
    let mut fraction = kept(a / (a + 1.0) * (lambda + 1.0));
    let (mut c, mut d) = (fraction, 0.0);
    // About √max(a, b) steps at the worst.
    for step in 1..200_000 {
        let n = f64::from(step);
        let twice = a + 2.0 * n - 1.0;
        let numerator = (a + n - 1.0) / twice * ((a + b + n - 1.0) / twice) * n * (b - n) * x * x;
        d = 1.0 / kept(denominator(n) + numerator * d);
        c = kept(denominator(n) + numerator / c);
        fraction *= c * d;
        if (c * d - 1.0).abs() < 2.0 * f64::EPSILON {
            break;
        }
    }
    fraction
}

/// ln P(k of n), if each of them has the chance p, and q = 1 − p (Loader 2000).
pub(super) fn ln_binomial(k: f64, n: f64, p: f64, q: f64) -> f64 {
    let rest = n - k;
    if k == 0.0 {
        return if n == 0.0 { 0.0 } else { n * (-p).ln_1p() };
    }
    if rest == 0.0 {
        return n * (-q).ln_1p();
    }
    stirling(n)
        - stirling(k)
        - stirling(rest)
        - deviance(k, n * p)
        - deviance(rest, n * q)
        - 0.5 * (2.0 * PI * k * (rest / n)).ln()
}

/// What Stirling's formula lacks of ln Γ(x): ln Γ(x) − (x − ½) ln x + x − ½ ln 2π.
pub(super) fn stirling(x: f64) -> f64 {
    if x < 15.0 {
        return libm::lgamma(x) - (x - 0.5) * x.ln() + x - 0.5 * (2.0 * PI).ln();
    }
    let r = 1.0 / (x * x);
    (1.0 / 12.0 - r * (1.0 / 360.0 - r * (1.0 / 1260.0 - r * (1.0 / 1680.0 - r / 1188.0)))) / x
}

/// k·ln(k/m) + m − k: how far k > 0 is from an expected m > 0, without the cancellation where they are near.
pub(super) fn deviance(k: f64, m: f64) -> f64 {
    let d = (m - k) / k;
    if d.abs() < 0.5 { k * (d - d.ln_1p()) } else { k * (k / m).ln() + m - k }
}
