#!/usr/bin/env python3
"""What other implementations say of src/stats: posteriors, elasticity, demand curves and prices.

How it is run: README.md, beside this file.

The numbers come from mpmath with 50 digits, by other formulas than the crate's (no scaled prices, no log-odds, numerical
derivatives), and are compared with statsmodels, scipy and gbstats here, where those have the digits.
"""
import json
import pathlib
import random
import sys
from fractions import Fraction

import mpmath as mp
import numpy
import scipy

mp.mp.dps = 50
OUT = pathlib.Path(__file__).resolve().parents[2] / "src/stats/vectors"
RANDOM = random.Random(20240607)
LEVELS = [0.5, 0.8, 0.9, 0.95, 0.99, 0.999]


def near(ours, theirs, tolerance, what):
    assert abs(ours - theirs) <= tolerance * abs(ours), (what, ours, theirs)


def number(x):
    x = float(x)
    assert x == x and abs(x) != float("inf")
    return x


def critical(level):
    return mp.sqrt(2) * mp.erfinv(mp.mpf(level))


def loss(z):
    "E[(X - z)+] of a standard normal X"
    mp.mp.dps += 20
    value = mp.npdf(z) - z * mp.ncdf(-z)
    mp.mp.dps -= 20
    return value


def normals():
    cases = []
    for z in [0, 1e-12, 0.5, 1, 1.96, 2.999, 3, 3.001, 5, 8, 10, 16, 20, 25, 30, 35, 37]:
        for z in {z, -z}:
            cases.append({"z": z, "below": number(mp.ncdf(z)), "loss": number(loss(mp.mpf(z)))})
    for _ in range(40):
        z = RANDOM.uniform(-37, 37)
        cases.append({"z": z, "below": number(mp.ncdf(z)), "loss": number(loss(mp.mpf(z)))})
    levels = LEVELS + [1e-9, 0.01, 1 - 1e-9, 1 - 1e-12] + [RANDOM.random() for _ in range(50)]
    return {"cases": cases, "critical": [{"level": l, "z": number(critical(l))} for l in levels]}


# Several arms. Two have closed forms; the tails of more would need more digits than quadrature has.

def best(arms):
    mp.mp.dps = 30
    means, sds = [mp.mpf(m) for m, _ in arms], [mp.mpf(s) for _, s in arms]
    if len(arms) == 2:
        sd = mp.sqrt(sds[0] ** 2 + sds[1] ** 2)
        z = (means[0] - means[1]) / sd
        result = [(mp.ncdf(z), sd * loss(z)), (mp.ncdf(-z), sd * loss(-z))]
    else:
        cuts = sorted({m + s * h for m, s in zip(means, sds) for h in (-13, -6, -3, -1, 0, 1, 3, 6, 13)})
        top = max(means)

        def all_below(x):
            return mp.fprod(mp.ncdf((x - m) / s) for m, s in zip(means, sds))
        low, high = [c for c in cuts if c < top] + [top], [top] + [c for c in cuts if c > top]
        highest = top + mp.quad(lambda x: 1 - all_below(x), high) - mp.quad(all_below, low)
        result = []
        for i, (m, s) in enumerate(zip(means, sds)):
            inside = [c for c in cuts if abs(c - m) <= 13 * s]
            p = mp.quad(lambda x: mp.npdf((x - m) / s) / s * mp.fprod(
                mp.ncdf((x - means[j]) / sds[j]) for j in range(len(arms)) if j != i), inside)
            result.append((p, highest - m))
    mp.mp.dps = 50
    draws = numpy.random.default_rng(1).normal([m for m, _ in arms], [s for _, s in arms], (200_000, len(arms)))
    for i, (p, lost) in enumerate(result):
        assert abs(float(p) - (draws.argmax(1) == i).mean()) < 0.006, (arms, result)
        gaps = draws.max(1) - draws[:, i]
        assert abs(float(lost) - gaps.mean()) <= 6 * gaps.std() / 200_000 ** 0.5 + 1e-5, (arms, result)
    return {"arms": arms, "best": [number(p) for p, _ in result], "loss": [number(l) for _, l in result]}


def arms():
    cases = [[(5, 0.5), (5 + d, 0.5)] for d in (0, 1e-9, 0.1, 1, 5, 15, 20, 25)]
    cases += [[(0, 1e-6), (1e-3, 1)], [(1e6, 1e-3), (1e6 + 1, 1e3)], [(-3, 2), (3, 1e-9)], [(1e12, 1), (1e12 + 3, 2)]]
    cases += [[(RANDOM.uniform(-3, 3), 10 ** RANDOM.uniform(-2, 2)) for _ in range(2)] for _ in range(20)]
    cases += [[(5, 0.2), (5, 0.2), (5, 0.2)], [(5, 0.2), (5, 0.2), (4, 0.2)], [(1, 1), (2, 1e-3), (3, 1e3)],
              [(0, 1), (0.5, 1e-4), (0.6, 1e-4)], [(1e-7, 1e-8), (1.1e-7, 1e-8), (1.2e-7, 2e-8)]]
    cases += [[(RANDOM.gauss(5, 1), RANDOM.uniform(0.1, 2)) for _ in range(k)] for k in [3] * 12 + [4] * 6 + [5] * 3 + [7]]
    return [best(case) for case in cases]


# Conversion.

def beta_parts(a, b, x):
    "The shares of Beta(a, b) below and above x, integrated over the rate itself."
    a, b, x = mp.mpf(a), mp.mpf(b), mp.mpf(x)
    log_b = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)

    def density(t):
        return mp.exp((a - 1) * mp.log(t) + (b - 1) * mp.log1p(-t) - log_b) if 0 < t < 1 else mp.mpf(0)
    mean = a / (a + b)
    sd = mp.sqrt(mean * (1 - mean) / (a + b))
    cuts = {mean + sd * h for h in (-40, -30, -20, -14, -10, -7, -5, -3, -2, -1, 0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 40, 60, 100, 200, 400, 800)}
    # From the point outwards, in steps of the scale on which the density falls there.
    slope = abs((a - 1) / x - (b - 1) / (1 - x))
    cuts |= {x + h / slope * k for h in (1, 2, 4, 8, 16, 32, 64, 128) for k in (-1, 1)} if slope > 0 else set()
    cuts |= {mp.mpf(10) ** -k for k in (12, 40, 100, 300, 700)} if a < 5 else set()
    cuts |= {1 - mp.mpf(10) ** -k for k in (12, 20, 30)} if b < 5 else set()
    below = [mp.mpf(0)] + sorted(c for c in cuts if 0 < c < x) + [x]
    above = [x] + sorted(c for c in cuts if x < c < 1) + [mp.mpf(1)]
    low, high = mp.quad(density, below), mp.quad(density, above)
    assert abs(low + high - 1) < 1e-12, (a, b, x, low + high)
    return low, high


def post(x, n, prior):
    half = {"jeffreys": 0.5, "uniform": 1.0}[prior]
    return x + half, n - x + half


def betas():
    cases = []
    counts = [(0, 1), (0, 1000), (0, 10**9), (1, 10), (1, 10**6), (3, 10**9), (120, 1000), (90, 1000), (500, 1000), (999, 1000),
              (1000, 1000), (10**5, 10**6), (10**8, 10**9), (999_999_000, 10**9), (5 * 10**8, 10**9), (0, 0), (7, 7), (2, 10**4)]
    mp.mp.dps = 30
    for x, n in counts:
        for prior in ("jeffreys", "uniform"):
            a, b = post(x, n, prior)
            mean, sd = a / (a + b), (a * b / (a + b) ** 2 / (a + b + 1)) ** 0.5
            # 30 deviations below are p near 1e-200; where a is small, rates near 0 have p that is not.
            for z in (-30, -8, -2, -0.5, 0, 1, 3):
                rate = mean + z * sd if z >= -0.5 or mean + z * sd > 0 else mean * 10.0 ** z
                if not 0 < rate < 1:
                    continue
                low, high = beta_parts(a, b, rate)
                theirs = scipy.special.betainc(a, b, rate)
                if low > 1e-200 and n <= 1000:
                    near(low, theirs, 1e-9, ("betainc", a, b, rate))
                # The probability whose quantile is this very rate would be rounded; so ask for it where it has its digits.
                cases.append({"x": x, "n": n, "prior": prior, "rate": rate, "below": number(low), "above": number(high)})
    mp.mp.dps = 50
    return cases


def miller(one, other):
    "P(B > A) for a whole a_B (Miller, Formulas for Bayesian A/B testing), the terms by their ratio."
    (a, b), (c, d) = [(mp.mpf(a), mp.mpf(b)) for a, b in (other, one)]
    term = mp.exp(mp.loggamma(a) + mp.loggamma(b + d) - mp.loggamma(a + b + d) - mp.loggamma(a) - mp.loggamma(b)
                  + mp.loggamma(a + b))  # i = 0: B(a, b + d) / B(a, b)
    total = mp.mpf(0)
    for i in range(int(c)):
        total += term
        term *= (a + i) / (a + b + d + i) * (d + i) / (i + 1)
    return total


def by_quadrature(one, other):
    "P(B > A) over the rate, with scipy's incomplete beta."
    mp.mp.dps = 30
    (a, b), (c, d) = one, other
    log_b = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    cuts = set()
    for p, q in (one, other):
        mean = p / (p + q)
        sd = (mean * (1 - mean) / (p + q + 1)) ** 0.5
        cuts |= {mean + sd * h for h in numpy.arange(-14, 14.5, 0.5)}
    cuts = [c for c in sorted(cuts) if 0 < c < 1]
    x, w = numpy.polynomial.legendre.leggauss(12)
    total = mp.mpf(0)
    for low, high in zip(cuts, cuts[1:]):
        for point, weight in zip(x, w):
            t = (low + high) / 2 + (high - low) / 2 * point
            density = mp.exp((a - 1) * mp.log(t) + (b - 1) * mp.log1p(-t) - log_b)
            total += density * scipy.special.betainc(c, d, t) * weight * (high - low) / 2
    mp.mp.dps = 50
    return total


def beta_pairs():
    cases = []
    whole = [((0, 1000), (0, 1000)), ((0, 10**9), (0, 10**9)), ((0, 10**9), (5, 10**9)), ((5, 10**9), (0, 10**9)),
             ((90, 1000), (120, 1000)), ((120, 1000), (90, 1000)), ((0, 10), (10, 10)), ((10, 10), (0, 10)),
             ((3, 100), (200, 10**9)), ((300, 10**9), (1, 10)), ((0, 1000), (1000, 1000)), ((20, 1000), (800, 1000)),
             ((0, 0), (5, 9)), ((4000, 10**6), (5000, 10**6)), ((3000, 10**5), (5000, 10**5)), ((10, 1000), (600, 1000)),
             ((10000, 10**9), (10100, 10**9)), ((1, 10**9), (400, 10**9)), ((0, 400), (320, 330))]
    whole += [((RANDOM.randint(0, 60), 10 ** RANDOM.randint(2, 9)), (RANDOM.randint(0, 60), 10 ** RANDOM.randint(2, 9)))
              for _ in range(25)]
    for one, other in whole:
        a, b = post(*one, "uniform"), post(*other, "uniform")
        cases.append({"one": one, "other": other, "prior": "uniform", "above": number(miller(a, b))})
    big = [((10**8, 10**9), (10**8, 10**9)), ((10**8 + 9000, 10**9), (10**8, 10**9)), ((10**8, 10**9), (10**8 + 30000, 10**9)),
           ((90, 1000), (120, 1000)), ((120, 1000), (90, 1000)), ((120, 1000), (10**8, 10**9)), ((5 * 10**8, 10**9), (499990000, 10**9)),
           ((950, 1000), (930, 1000)), ((10**5, 10**6), (100500, 10**6)), ((999_000_000, 10**9), (999_001_000, 10**9))]
    for one, other in big:
        a, b = post(*one, "jeffreys"), post(*other, "jeffreys")
        cases.append({"one": one, "other": other, "prior": "jeffreys", "above": number(by_quadrature(a, b))})
    return cases


# Two prices.

def arcs():
    cases = []
    counts = [((1, 500), (2, 600)), ((120, 1000), (90, 1000)), ((10**8, 10**9), (10**8 + 1, 10**9)), ((1, 10**9), (9 * 10**8, 10**9)),
              ((10**9 - 1, 10**9), (1, 2)), ((5, 10), (500_000, 10**9))]
    counts += [tuple((RANDOM.randint(1, n - 1), n) for n in (10 ** RANDOM.randint(1, 9), 10 ** RANDOM.randint(1, 9))) for _ in range(50)]
    prices = [(19, 29), (29, 19), (0, 5), (1e-6, 2e-6), (1e12, 1e12 + 1), (0.01, 1e9), (9.99, 10)]
    for i, ((x0, n0), (x1, n1)) in enumerate(counts):
        p, level = prices[i % len(prices)], LEVELS[i % len(LEVELS)]
        p0, p1 = Fraction(p[0]), Fraction(p[1])
        q0, q1 = Fraction(x0, n0), Fraction(x1, n1)
        estimate = ((q1 - q0) / ((q0 + q1) / 2)) / ((p1 - p0) / ((p0 + p1) / 2))
        of_prices = mp.mpf((p1 - p0).numerator) / (p1 - p0).denominator / (mp.mpf((p0 + p1).numerator) / (p0 + p1).denominator / 2)
        m0, m1 = mp.mpf(x0) / n0, mp.mpf(x1) / n1

        def arc(u, v):
            return (v - u) / ((u + v) / 2) / of_prices
        se = mp.sqrt(mp.diff(lambda u: arc(u, m1), m0) ** 2 * m0 * (1 - m0) / n0
                     + mp.diff(lambda v: arc(m0, v), m1) ** 2 * m1 * (1 - m1) / n1)
        katz = mp.sqrt((1 - m0) / (n0 * m0) + (1 - m1) / (n1 * m1))
        ends = sorted(arc(1, m1 / m0 * mp.exp(s * critical(level) * katz)) for s in (-1, 1))
        cases.append({"prices": p, "counts": [(x0, n0), (x1, n1)], "level": level, "estimate": number(mp.mpf(estimate.numerator) / estimate.denominator),
                      "se": number(se), "low": number(ends[0]), "high": number(ends[1])})
    return cases


# Demand.

def logit(points):
    "Newton's method on the prices as they are, with 50 digits; (a, b) and the covariance matrix."
    mp.mp.dps = 80
    p = [mp.mpf(price) for price, _, _ in points]
    x, n = [[mp.mpf(point[i]) for point in points] for i in (1, 2)]
    a, b = mp.log(sum(x) + 0.5) - mp.log(sum(n) - sum(x) + 0.5), mp.mpf(0)

    def log_likelihood(a, b):
        return sum(x * e - n * (mp.log1p(mp.exp(e)) if e < 0 else e + mp.log1p(mp.exp(-e)))
                   for x, n, e in zip(x, n, [a + b * p for p in p]))
    for _ in range(300):
        q = [1 / (1 + mp.exp(-a - b * p)) for p in p]
        w = [n * q * (1 - q) for n, q in zip(n, q)]
        info = [sum(w), sum(w * p for w, p in zip(w, p)), sum(w * p * p for w, p in zip(w, p))]
        score = [sum(x - n * q for x, n, q in zip(x, n, q)), sum((x - n * q) * p for x, n, q, p in zip(x, n, q, p))]
        det = info[0] * info[2] - info[1] ** 2
        cov = [[info[2] / det, -info[1] / det], [-info[1] / det, info[0] / det]]
        step = [cov[0][0] * score[0] + cov[0][1] * score[1], cov[1][0] * score[0] + cov[1][1] * score[1]]
        share, now = mp.mpf(1), log_likelihood(a, b)
        while log_likelihood(a + share * step[0], b + share * step[1]) < now - mp.mpf(10) ** -50 and share > 1e-6:
            share /= 2
        a, b = a + share * step[0], b + share * step[1]
        if abs(step[0]) + abs(step[1]) * max(p) < mp.mpf(10) ** -45:
            mp.mp.dps = 50
            return a, b, cov
    raise AssertionError(points)


def demand(points, query, cost, level):
    a, b, cov = logit(points)
    z = critical(level)
    q = {p: 1 / (1 + mp.exp(-a - b * p)) for p, _, _ in points}
    deviance = 2 * sum((x * mp.log(x / (n * q[p])) if x else 0) + ((n - x) * mp.log((n - x) / (n * (1 - q[p]))) if x < n else 0)
                       for p, x, n in points)
    pearson = sum((x - n * q[p]) ** 2 / (n * q[p] * (1 - q[p])) for p, x, n in points)
    fit_p = mp.gammainc(mp.mpf(len(points) - 2) / 2, deviance / 2, mp.inf, regularized=True)

    def delta(f):
        da, db = mp.diff(lambda a: f(a, b), a), mp.diff(lambda b: f(a, b), b)
        return mp.sqrt(da * da * cov[0][0] + 2 * da * db * cov[0][1] + db * db * cov[1][1])
    t, c = mp.mpf(query), mp.mpf(cost)
    odds, around = a + b * t, z * mp.sqrt(cov[0][0] + 2 * t * cov[0][1] + t * t * cov[1][1])
    rate, low, high = (1 / (1 + mp.exp(-o)) for o in (odds, odds - around, odds + around))

    def elasticity(a, b):
        return b * t / (1 + mp.exp(a + b * t))
    e, e_around = elasticity(a, b), z * delta(elasticity)
    case = {"points": points, "query": query, "cost": cost, "level": level, "a": number(a), "b": number(b),
            "cov": [number(cov[0][0]), number(cov[0][1]), number(cov[1][1])], "deviance": number(deviance),
            "pearson": number(pearson), "fit_p": number(fit_p), "rate": [number(rate), number(low), number(high)],
            "elasticity": [number(e), number(e - e_around), number(e + e_around)], "optimum": None}
    if b + z * mp.sqrt(cov[1][1]) < 0:
        def p_star(a, b):
            # mpmath's own W; its exponents have no limit, but its start is a double's.
            y = a + b * c - 1
            w = mp.lambertw(mp.exp(y)).real
            assert abs(w + mp.log(w) - y) < mp.mpf(10) ** -35 * (1 + abs(y)), y
            return c + (1 + w) / -b
        best = p_star(a, b)
        if max(p for p, _, _ in points) > 10 * (max(p for p, _, _ in points) - min(p for p, _, _ in points)):
            mp.mp.dps = 80

        def clear(p):
            e = mp.exp(a + b * p)
            g, ga, gb = 1 + e + b * (p - c), e, p * e + p - c
            return g * g > z * z * (ga * ga * cov[0][0] + 2 * ga * gb * cov[0][1] + gb * gb * cov[1][1])

        def end(sign):
            inside, outside = best, None
            step = (best - c) / 300
            while outside is None:
                there = inside + sign * step
                if there <= c:
                    return c
                if clear(there):
                    outside = there
                else:
                    inside, step = there, step * mp.mpf("1.02")
            for _ in range(120):
                middle = (inside + outside) / 2
                inside, outside = (inside, middle) if clear(middle) else (middle, outside)
            return inside
        q_best = 1 / (1 + mp.exp(-a - b * best))
        case["optimum"] = {"price": number(best), "se": number(delta(p_star)), "low": number(end(-1)), "high": number(end(1)),
                           "per_thousand": number(1000 * (best - c) * q_best)}
        mp.mp.dps = 50
    return case


def check_statsmodels(case):
    import statsmodels.api as sm
    p, x, n = (numpy.array([point[i] for point in case["points"]], float) for i in range(3))
    fit = sm.GLM(numpy.column_stack([x, n - x]), sm.add_constant(p), family=sm.families.Binomial()).fit(tol=1e-14, maxiter=200)
    for ours, theirs in zip([case["a"], case["b"], case["cov"][0], case["cov"][1], case["cov"][2]],
                            [*fit.params, fit.cov_params()[0, 0], fit.cov_params()[0, 1], fit.cov_params()[1, 1]]):
        near(ours, theirs, 1e-6, case)
    assert abs(case["deviance"] - fit.deviance) < 1e-6 * (1 + case["deviance"]), case
    assert abs(case["pearson"] - fit.pearson_chi2) < 1e-6 * (1 + case["pearson"]), case
    assert abs(case["fit_p"] - scipy.stats.chi2.sf(fit.deviance, len(p) - 2)) < 1e-6, case
    return 1


def demands():
    golden = [(19.0, 120, 1000), (29.0, 90, 1000), (39.0, 60, 1000)]
    cases = [demand(golden, 35.0, 0.0, 0.95), demand(golden, 50.0, 12.0, 0.9),
             demand([(19.0, 3, 100), (29.0, 2, 100), (39.0, 1, 100)], 20.0, 0.0, 0.95),
             demand([(19.0, 1, 10**9), (29.0, 2, 10**9), (39.0, 1, 10**9)], 20.0, 0.0, 0.95),
             demand([(19.0, 120, 1000), (29.0, 90 * 10**6, 10**9), (39.0, 6, 100)], 30.0, 5.0, 0.95),
             demand([(1e-6, 300, 1000), (2e-6, 200, 1000), (3e-6, 120, 1000)], 2.5e-6, 5e-7, 0.95),
             demand([(1e12, 300, 1000), (1e12 + 1, 200, 1000), (1e12 + 2, 120, 1000)], 1e12 + 1.5, 1e12 - 1, 0.95),
             demand([(0.0, 900, 1000), (5.0, 400, 1000), (10.0, 90, 1000)], 0.0, 0.0, 0.95),
             demand([(19.0, 60, 1000), (29.0, 90, 1000), (39.0, 120, 1000)], 35.0, 0.0, 0.95),
             demand([(10.0, 10**9 - 1, 10**9), (20.0, 5 * 10**8, 10**9), (30.0, 1, 10**9)], 12.0, 3.0, 0.99),
             demand([(10.0, 10**8, 10**9), (20.0, 9 * 10**7, 10**9), (30.0, 10**7, 10**9)], 12.0, 3.0, 0.99),
             demand([(10.0, 500, 1000), (20.0, 480, 1000), (30.0, 300, 1000)], 12.0, 28.0, 0.95),
             demand([(10.0, 0, 1000), (20.0, 5, 1000), (30.0, 0, 1000)], 12.0, 0.0, 0.95),
             demand([(10.0, 1000, 1000), (20.0, 999, 1000), (30.0, 1000, 1000), (40.0, 2, 1000)], 12.0, 0.0, 0.95)]
    # A fit whose p-value is next to nothing.
    cases.append(demand([(10.0, 300, 5000), (20.0, 1500, 5000), (30.0, 100, 5000)], 12.0, 0.0, 0.95))
    while len(cases) < 75:
        scale, k = 10.0 ** RANDOM.randint(-5, 8), RANDOM.choice([3, 3, 4, 5, 8])
        prices = sorted({round(RANDOM.uniform(5, 60), 2) for _ in range(k)})
        slope, start = -RANDOM.uniform(0.01, 0.15), RANDOM.uniform(-4, 3)
        points = []
        for price in prices:
            n = int(10 ** RANDOM.uniform(2, 9))
            rate = 1 / (1 + numpy.exp(-(start + slope * price)))
            points.append((price * scale, int(numpy.random.default_rng(RANDOM.randint(0, 10**9)).binomial(n, rate)), n))
        if len(points) < 3 or sum(0 < x < n for _, x, n in points) < 2:
            continue
        cases.append(demand(points, RANDOM.uniform(3, 70) * scale, RANDOM.choice([0, 0, 3, 20]) * scale, RANDOM.choice(LEVELS)))
    checked = sum(check_statsmodels(case) for case in cases
                  if 0.1 < case["points"][0][0] < 100 and case["points"][1][0] != 20.0 and case["points"][0][1] > 1)
    print(checked, "curves agree with statsmodels;", sum(bool(c["optimum"]) for c in cases), "have an optimum")
    return cases


def lamberts():
    cases = []
    for y in [-745, -700, -100, -41, -40, -39.9, -20, -5, -1, -1e-9, 0, 0.5, 1, 2.99, 3, 3.01, 10, 100, 700, 710, 1e4, 1e9, 1e15, 1e300] + \
            [RANDOM.uniform(-60, 60) for _ in range(40)]:
        y = mp.mpf(y)
        w = mp.lambertw(mp.exp(y)).real if y < 1e5 else mp.findroot(lambda w: w + mp.log(w) - y, y - mp.log(y))
        if -30 < y < 700:
            near(w, scipy.special.lambertw(float(mp.exp(y))).real, 1e-12, y)
        cases.append({"y": number(y), "w": number(w)})
    return cases


def break_evens():
    cases = []
    for i in range(60):
        old, new = RANDOM.randint(1, 10**6), RANDOM.randint(1, 10**6)
        cost = RANDOM.choice([0, RANDOM.randint(0, min(old, new) - 1)])
        cases.append({"old": old, "new": new, "cost": cost, "drop": float(1 - Fraction(old - cost, new - cost))})
    return cases


# The effect, by gbstats.

def effects():
    import gbstats
    from gbstats.bayesian.tests import EffectBayesianABTest, EffectBayesianConfig, GaussianPrior
    from gbstats.models.statistics import SampleMeanStatistic
    cases = []
    arms = [((1000, 5000, 90000), (1000, 5600, 110000))]
    for _ in range(70):
        pair = []
        for _ in range(2):
            n, mean = int(10 ** RANDOM.uniform(0.5, 9)), RANDOM.uniform(1, 20)
            pair.append((n, round(n * mean), round(n * (mean * mean + RANDOM.uniform(5, 500)))))
        arms.append(tuple(pair))
    arms += [((10**6, 5 * 10**6, 90 * 10**6), (10**6, 5 * 10**6 + d, 90 * 10**6 + 10 * d)) for d in (0, 1, 10**4, 10**5, 2 * 10**5, 3 * 10**5)]
    for i, (control, treatment) in enumerate(arms):
        prior = None if i % 2 == 0 else {"mean": RANDOM.uniform(-1, 1), "sd": 10 ** RANDOM.uniform(-2, 1)}
        level = 0.95 if i == 0 else LEVELS[i % len(LEVELS)]
        stats = [SampleMeanStatistic(n=n, sum=s, sum_squares=q) for n, s, q in (control, treatment)]
        config = EffectBayesianConfig(difference_type="absolute", prior_type="absolute", alpha=1 - level,
                                      prior_effect=GaussianPrior(prior["mean"], prior["sd"] ** 2, True) if prior else GaussianPrior(proper=False))
        theirs = EffectBayesianABTest(*stats, config).compute_result()
        # The same with all digits.
        def mean_and_variance(n, s, q):
            m = Fraction(s, n)
            return m, (q - s * m) / (n - 1) / n
        (m0, v0), (m1, v1) = mean_and_variance(*control), mean_and_variance(*treatment)
        d, v = m1 - m0, v0 + v1
        if prior:
            w0, w1 = 1 / Fraction(prior["sd"]) ** 2, 1 / v
            d, v = (Fraction(prior["mean"]) * w0 + d * w1) / (w0 + w1), 1 / (w0 + w1)
        d, sd = mp.mpf(d.numerator) / d.denominator, mp.sqrt(mp.mpf(v.numerator) / v.denominator)
        z = critical(level)
        case = {"control": control, "treatment": treatment, "prior": prior, "level": level, "mean": number(d), "sd": number(sd),
                "low": number(d - z * sd), "high": number(d + z * sd), "win": number(mp.ncdf(d / sd)),
                "loss_of_control": number(sd * loss(-d / sd)), "loss_of_treatment": number(sd * loss(d / sd))}
        near(case["mean"], theirs.expected, 1e-7, (case, theirs))
        near(case["sd"], theirs.uplift.stddev, 1e-7, (case, theirs))
        if 1e-6 < case["win"] < 1 - 1e-6:
            near(case["win"], theirs.chance_to_win, 1e-7, (case, theirs))
            near(case["loss_of_control"], theirs.risk[0], 1e-6, (case, theirs))
            near(case["loss_of_treatment"], theirs.risk[1], 1e-6, (case, theirs))
        for ours, end in zip((case["low"], case["high"]), theirs.ci):
            assert abs(ours - end) < 1e-7 * (abs(ours) + case["sd"]), (case, theirs)
        cases.append(case)
    return cases


def write(name, versions, parts):
    OUT.mkdir(exist_ok=True)
    parts = {"versions": versions | {"python": sys.version.split()[0], "mpmath": mp.__version__, "numpy": numpy.__version__,
                                     "scipy": scipy.__version__}} | parts
    lines = []
    for key, value in parts.items():
        if isinstance(value, list):
            body = ",\n".join("  " + json.dumps(case, allow_nan=False) for case in value)
            lines.append(f"{json.dumps(key)}: [\n{body}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        print(name, key, len(value))
    (OUT / name).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["gbstats"]:
        from importlib.metadata import version
        write("price_effect.json", {"gbstats": version("gbstats")}, {"effects": effects()})
    else:
        import scipy.special
        import scipy.stats
        import statsmodels
        write("price.json", {"statsmodels": statsmodels.__version__}, {
            "normals": normals(), "arms": arms(), "betas": betas(), "pairs": beta_pairs(), "arcs": arcs(),
            "demands": demands(), "lamberts": lamberts(), "break_evens": break_evens()})
