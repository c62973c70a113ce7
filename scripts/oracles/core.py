#!/usr/bin/env python3
"""The vectors of src/stats, by implementations that share no code with the crate. README.md says how to run it.

    core.py             compares src/stats/vectors/core.json with what is computed here
    core.py --write     writes it

Numbers come from mpmath, at 50 digits and more, since the others lose the far tails and the large counts; each kind of case is
compared with the package that is its standard (gbstats, statsmodels, scipy, ssrm_test) wherever double precision lets that be right.
"""
import argparse
import itertools
import json
import math
import pathlib
import random
import warnings
from fractions import Fraction
from importlib.metadata import version

import mpmath as mp
import numpy as np
from mpmath import mpf
from scipy import stats
from statsmodels.stats import meta_analysis, multitest, power, proportion

warnings.simplefilter("ignore")
np.Inf = math.inf
from gbstats.frequentist import tests as gb  # noqa: E402
from gbstats.models import statistics as gbs  # noqa: E402
import ssrm_test.ssrm_test as ssrm  # noqa: E402

FILE = pathlib.Path(__file__).resolve().parents[2] / "src/stats/vectors/core.json"
PACKAGES = ["gbstats", "mpmath", "numpy", "pandas", "scipy", "ssrm-test", "statsmodels"]
mp.mp.dps = 50
rng = random.Random(20240607)
compared = {}


def same(kind, ours, theirs, tolerance=1e-9, scale=0.0):
    """Compares with the standard package."""
    ours, theirs = float(ours), float(theirs)
    assert abs(ours - theirs) <= tolerance * max(abs(ours), abs(theirs), scale), (kind, ours, theirs)
    compared[kind] = compared.get(kind, 0) + 1


def out(value):
    return [out(v) for v in value] if isinstance(value, (list, tuple)) else float(value)


# Distributions.

def normal_tail(z):
    return mp.erfc(mpf(z) / mp.sqrt(2)) / 2


def normal_quantile(p):
    p = mpf(p)
    return mp.findroot(lambda z: mp.log(normal_tail(z)) - mp.log(p), max(float(stats.norm.isf(float(p))), 1e-3))


def t_tail(t, df):
    t, df = mpf(t), mpf(df)
    if t < 0:
        return 1 - t_tail(-t, df)
    if df <= 5000:
        return mp.betainc(df / 2, mpf(1) / 2, 0, df / (df + t * t), regularized=True) / 2
    if t > 60:
        return mpf(0)  # below the smallest double
    # The series of 1 - I_y(1/2, df/2), with digits for what its difference from 1 loses.
    with mp.workdps(60 + int(t * t / 2 / 2.3)):
        a, b, y = mpf(1) / 2, df / 2, t * t / (df + t * t)
        term, total, k = mpf(1), mpf(1), 0
        while term > total * mp.eps:
            term *= (a + b + k) / (a + 1 + k) * y
            total += term
            k += 1
        log = mp.loggamma(a + b) - mp.loggamma(a) - mp.loggamma(b) + a * mp.log(y) + b * mp.log1p(-y)
        return (1 - mp.exp(log) / a * total) / 2


def t_quantile(p, df):
    p, df = mpf(p), mpf(df)
    t = mpf(float(stats.t.isf(float(p), float(df))))
    constant = mp.exp(mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2)) / mp.sqrt(df * mp.pi)
    for _ in range(3):
        t += (t_tail(t, df) - p) / (constant * mp.exp(-(df + 1) / 2 * mp.log1p(t * t / df)))
    return t


def chi2_tail(x, df):
    return mp.gammainc(mpf(df) / 2, mpf(x) / 2, mp.inf, regularized=True)


def distributions():
    for df in [1, 1.5, 3, 10.25, 100, 1998, 40000, 1e6, 2e9]:
        for t in [1e-8, 0.01, 1, 1.96, 5, 10, 37]:
            p = t_tail(t, df)
            if 1e-290 < p:
                yield dict(of="t", x=t, df=df, tail=out(p))
        for p in [0.4, 0.025, 1e-6, 1e-15]:
            yield dict(of="t_quantile", x=p, df=df, tail=out(t_quantile(p, df)))
    for z in [0, 1e-6, 0.5, 1.96, 6, 20, 37]:
        yield dict(of="normal", x=z, df=0, tail=out(normal_tail(z)))
    for p in [0.499, 0.3, 0.025, 1e-6, 1e-15]:
        yield dict(of="normal_quantile", x=p, df=0, tail=out(normal_quantile(p)))
    for df in [1, 2, 3, 9, 100, 1000]:
        for x in [1e-9, 0.01, 1, 3.84, 50, 1300]:
            yield dict(of="chi_squared", x=x, df=df, tail=out(chi2_tail(x, df)))


# Arms: users, sum, sum of squares; whole numbers, so that what doubles lose is lost in no one's input.

def arms():
    yield (1000, 5000, 90000), (1000, 5600, 110000)
    yield (2, 3, 5), (2, 30, 1000)
    yield (2, 1, 1), (10**9, 5 * 10**9, 9 * 10**10)
    yield (10**9, 5 * 10**9, 9 * 10**10), (10**9, 5001 * 10**6, 9 * 10**10)
    yield (10**9, 5 * 10**9, 9 * 10**10), (10**9, 5010 * 10**6, 9 * 10**10)
    yield (4 * 10**6, 20 * 10**6, 360 * 10**6), (4 * 10**6, 2069 * 10**4, 360 * 10**6)
    yield (50, 20 * 50, 21 * 20 * 50), (1000, 21 * 1000, 500000)
    yield (1000, 3 * 1000, 60000), (1000, 3 * 1000, 60000)
    yield (1000, 200, 40000), (1000, 0 + 1, 1)
    for _ in range(50):
        yield tuple(arm(int(10 ** rng.uniform(0.5, 9)) + 1) for _ in "ab")


def arm(n):
    buyers = rng.randint(1, max(1, n // rng.choice([2, 20, 200])))
    price = rng.choice([5, 19, 29, 999])
    return n, buyers * price, buyers * price * price * rng.choice([1, 1, 2, 9])


def moments(arm):
    n, total, squares = arm
    return Fraction(total, n), (squares - Fraction(total * total, n)) / (n - 1) / n


def welch(a, b, va=None, vb=None, adjusted=None):
    """Differences and lifts as (value, variance, df)."""
    (ma, plain_a), (mb, plain_b) = moments(a), moments(b)
    va, vb = va or plain_a, vb or plain_b
    df = (va + vb) ** 2 / (va**2 / (a[0] - 1) + vb**2 / (b[0] - 1))
    value = adjusted if adjusted is not None else mb - ma
    exact = lambda x: mpf(x.numerator) / mpf(x.denominator)
    difference = (exact(value), exact(va + vb), exact(df))
    lift = (exact(value / ma), exact(vb / ma**2 + va * mb**2 / ma**4), exact(df))
    return difference, lift


def fixed(estimate, alpha):
    value, variance, df = estimate
    half = t_quantile(mpf(alpha) / 2, df) * mp.sqrt(variance)
    return out([value, value - half, value + half, 2 * t_tail(abs(value) / mp.sqrt(variance), df)])


def sequential(estimate, n, target, alpha):
    value, variance, _ = estimate
    alpha = mpf(alpha)
    rho2 = (-2 * mp.log(alpha) + mp.log(-2 * mp.log(alpha) + 1)) / target
    half = mp.sqrt(variance * n) * mp.sqrt(2 * (n * rho2 + 1) * mp.log(mp.sqrt(n * rho2 + 1) / alpha) / (n * n * rho2))
    evalue = mp.exp(rho2 * value**2 * n / variance / (2 * (n * rho2 + 1))) / mp.sqrt(n * rho2 + 1)
    return out([value, value - half, value + half, min(1 / evalue, 1)])


def with_gbstats(kind, result, test, a, b, difference_type, **config):
    statistic = lambda s: s if isinstance(s, gbs.RegressionAdjustedStatistic) else gbs.SampleMeanStatistic(*s)
    config = (gb.SequentialConfig if "sequential_tuning_parameter" in config else gb.FrequentistConfig)(
        difference_type=difference_type, **config)
    theirs = test(statistic(a), statistic(b), config).compute_result()
    assert theirs.error_message is None, theirs
    scale = abs(result[2] - result[1])
    for ours, their in zip(result, [theirs.expected, *theirs.ci]):
        same(kind, ours, their, 1e-9, scale)
    same(kind + " p", result[3], theirs.p_value, 1e-9, 1e-3)


def means():
    for a, b in arms():
        alpha = rng.choice([0.05, 0.05, 0.1, 0.01])
        target = rng.choice([5000, 1000, 10**6])
        n = a[0] + b[0]
        difference, lift = welch(a, b)
        case = dict(baseline=a, other=b, alpha=alpha, target=target,
                    difference=fixed(difference, alpha), lift=fixed(lift, alpha),
                    sequential_difference=sequential(difference, n, target, alpha),
                    sequential_lift=sequential(lift, n, target, alpha))
        for name in ["difference", "lift"]:
            kind = {"difference": "absolute", "lift": "relative"}[name]
            # gbstats takes variances from differences of doubles, and 1 - cdf.
            with_gbstats("welch", case[name], gb.TwoSidedTTest, a, b, kind, alpha=alpha)
            with_gbstats("sequential", case["sequential_" + name], gb.SequentialTwoSidedTTest, a, b, kind,
                         alpha=alpha, sequential_tuning_parameter=target)
        yield case


# CUPED: post, pre, and the sum of their products.

def paired():
    yield [(1000, 5000, 90000), (1000, 4000, 60000), 55000], [(1000, 5600, 110000), (1000, 4100, 61000), 60000]
    for _ in range(55):
        yield pair(), pair()


def pair():
    rows = [(rng.choice([0, 0, 0, 19, 29, 58]), rng.choice([0, 0, 10, 20])) for _ in range(rng.randint(10, 300))]
    rows = [(post + pre * rng.randint(0, 2), pre) for post, pre in rows] + [(19, 10), (0, 20)]
    times = rng.choice([1, 1, 100, 10**6])
    total = lambda f: times * sum(f(post, pre) for post, pre in rows)
    n = times * len(rows)
    return [(n, total(lambda y, x: y), total(lambda y, x: y * y)), (n, total(lambda y, x: x), total(lambda y, x: x * x)),
            total(lambda y, x: x * y)]


def covariates():
    for a, b in paired():
        n, alpha = a[0][0] + b[0][0], 0.05
        whole = lambda i, j: a[i][j] + b[i][j]
        theta = (a[2] + b[2] - Fraction(whole(0, 1) * whole(1, 1), n)) / (whole(1, 2) - Fraction(whole(1, 1) ** 2, n))

        def adjust(of):
            (m, (post, pre, products)) = of[0][0], of
            (y, vy), (x, vx) = moments(post), moments(pre)
            covariance = (products - Fraction(post[1] * pre[1], m)) / (m - 1) / m
            return y - theta * x, vy + theta**2 * vx - 2 * theta * covariance, vy
        (ya, va, pa), (yb, vb, pb) = adjust(a), adjust(b)
        difference, lift = welch(a[0], b[0], va, vb, yb - ya)
        case = dict(baseline=a, other=b, alpha=alpha, theta=float(theta), difference=fixed(difference, alpha),
                    lift=fixed(lift, alpha), variance_reduction=float(1 - (va + vb) / (pa + pb)))
        statistic = lambda of, theta: gbs.RegressionAdjustedStatistic(
            n=of[0][0], post_statistic=gbs.SampleMeanStatistic(*of[0]), pre_statistic=gbs.SampleMeanStatistic(*of[1]),
            post_pre_sum_of_products=of[2], theta=theta)
        found = gbs.compute_theta(statistic(a, 0), statistic(b, 0))
        same("theta", theta, found)
        for name, kind in [("difference", "absolute"), ("lift", "relative")]:
            with_gbstats("cuped", case[name], gb.TwoSidedTTest, statistic(a, found), statistic(b, found), kind, alpha=alpha)
        yield case


# Proportions.

def wilson(k, n, z):
    k, n = mpf(k), mpf(n)
    root = z * mp.sqrt(z * z + 4 * k * (1 - k / n))
    return (2 * k + z * z - root) / (2 * (n + z * z)), (2 * k + z * z + root) / (2 * (n + z * z))


def fisher(k, n, m, total):
    """The small kind in the small arm, so that there are few tables."""
    least, most = max(0, n + m - total), min(n, m)
    ln = lambda a, b: mp.loggamma(a + 1) - mp.loggamma(b + 1) - mp.loggamma(a - b + 1)
    chance = lambda x: mp.exp(ln(m, x) + ln(total - m, n - x) - ln(total, n))
    observed = chance(k)
    mode = (n + 1) * (m + 1) // (total + 2)
    near = range(max(least, min(mode, k) - 400), min(most, max(mode, k) + 400) + 1)
    return min(mpf(1), sum(p for p in map(chance, near) if p <= observed * (1 + mpf(10) ** -14)))


def proportions():
    cases = [(0, 100, 0, 100), (0, 1, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1), (0, 40, 6, 40), (0, 1000, 3, 10), (5, 5, 0, 5),
             (3, 10**9, 0, 10**9), (0, 10**9, 40, 10**9), (10**9, 10**9, 10**9 - 3, 10**9), (1, 2, 5 * 10**8, 10**9),
             (10**8, 10**9, 100010000, 10**9), (10**8, 10**9, 100500000, 10**9), (90, 1000, 120, 1000), (2, 3, 10**6, 10**9),
             (0, 10, 200, 300), (0, 10**7, 900, 10**7), (60, 60, 1, 10**9)]
    while len(cases) < 80:
        n, m = int(10 ** rng.uniform(0, 6)), int(10 ** rng.uniform(0, 6))
        rate = 10 ** rng.uniform(-4, -0.3)
        cases.append((min(n, int(n * rate * rng.uniform(0.5, 2))), n, min(m, int(m * rate)), m))
    # Large enough for chi-squared. Of their own source, so that all that comes after stays as it was.
    more = random.Random(7)
    for _ in range(40):
        n, m = int(10 ** more.uniform(3, 9)), int(10 ** more.uniform(3, 9))
        rate = more.uniform(0.02, 0.6)
        cases.append((int(n * rate * more.uniform(0.97, 1.03)), n, int(m * rate), m))
    for place, (k, n, l, m) in enumerate(cases):
        alpha = (rng if place < 80 else more).choice([0.05, 0.05, 0.1, 0.001])
        z = normal_quantile(mpf(alpha) / 2)
        (low, high), (low2, high2) = wilson(k, n, z), wilson(l, m, z)
        a, b = mpf(k) / n, mpf(l) / m
        newcombe = [b - a - mp.sqrt((b - low2) ** 2 + (high - a) ** 2), b - a + mp.sqrt((high2 - b) ** 2 + (a - low) ** 2)]
        buyers, total = k + l, n + m
        small_n, small_m = min(n, m), min(buyers, total - buyers)
        exact = small_n * small_m < 5 * total
        if exact:
            of_small = (k, l)[n > m]
            p = fisher(of_small if buyers <= total - buyers else small_n - of_small, small_n, small_m, total)
        else:
            pooled = mpf(buyers) / total
            p = chi2_tail((b - a) ** 2 / (pooled * (1 - pooled) * (mpf(1) / n + mpf(1) / m)), 1)
        yield dict(baseline=[k, n], other=[l, m], alpha=alpha, wilson=out([max(low, 0), high]), newcombe=out(newcombe),
                   fisher=exact, p=out(p))
        for ours, theirs in zip((low, high), proportion.proportion_confint(k, n, alpha, method="wilson")):
            same("wilson", ours, theirs, 1e-9, 1e-6)
        theirs = proportion.confint_proportions_2indep(l, m, k, n, method="newcomb", compare="diff", alpha=alpha)
        for ours, their in zip(newcombe, theirs):
            same("newcombe", ours, their, 1e-9, 1e-6)
        if exact:
            if total < 10**8:
                same("fisher", p, stats.fisher_exact([[k, n - k], [l, m - l]])[1], 1e-8)
        elif p > 1e-290:
            same("chi-squared", p, stats.chi2_contingency([[k, n - k], [l, m - l]], correction=False)[1], 1e-8)


# The rest.

def combinations():
    for count in range(2, 62):
        estimates = [(rng.gauss(0.5, rng.choice([0.1, 1, 3])), 10 ** rng.uniform(-4, 2)) for _ in range(2 + count % 6)]
        values, variances = [[mpf(x) for x in column] for column in zip(*estimates)]
        weights = sum(1 / v for v in variances)
        mean = sum(x / v for x, v in zip(values, variances)) / weights
        q = sum((x - mean) ** 2 / v for x, v in zip(values, variances))
        theirs = meta_analysis.combine_effects(*map(np.array, zip(*estimates)))
        same("combine", mean, theirs.mean_effect_fe, 1e-9, 1e-3)
        same("combine", q, theirs.q, 1e-9, 1)
        yield dict(estimates=estimates, value=out(mean), variance=out(1 / weights), q=out(q), p=out(chi2_tail(q, len(values) - 1)))


def multiples():
    for count in range(60):
        p = [rng.choice([rng.random(), rng.random() ** 8, 0.0, 1.0, 1e-300, 0.01]) for _ in range(1 + count % 12)]
        holm, hochberg = (multitest.multipletests(p, method=m)[1].tolist() for m in ["holm", "fdr_bh"])
        yield dict(p=p, holm=holm, benjamini_hochberg=hochberg)


def ratios():
    cases = [([5010, 4990], [1, 1]), ([5200, 4800], [1, 1]), ([10**9, 10**9 + 10**5], [1, 1]), ([10**9, 10**9 + 10**6], [1, 1]),
             ([1, 0], [1, 1]), ([0, 1], [1, 10**6]), ([3, 10**9], [1, 4 * 10**9]), ([0, 1000], [1, 1]), ([10, 20, 30], [1, 2, 3])]
    while len(cases) < 60:
        weights = [rng.choice([1, 1, 2, 10, 50]) for _ in range(rng.randint(2, 6))]
        scale = 10 ** rng.uniform(0, 7)
        cases.append(([int(scale * w * (1 + rng.gauss(0, 1) * (scale * w) ** -0.5)) + 1 for w in weights], weights))
    for users, weights in cases:
        total, shares = sum(users), [mpf(w) / sum(weights) for w in weights]
        x = sum((k - total * s) ** 2 / (total * s) for k, s in zip(users, shares))
        p = chi2_tail(x, len(users) - 1)
        prior = mpf(10000)
        bayes = mp.loggamma(prior) - mp.loggamma(prior + total) + sum(
            mp.loggamma(prior * s + k) - mp.loggamma(prior * s) - k * mp.log(s) for k, s in zip(users, shares))
        always = min(mpf(1), mp.exp(-bayes))
        if p > 1e-290:
            same("sample ratio", p, stats.chisquare(users, [float(total * s) for s in shares])[1], 1e-8)
        # Its log-gammas of the counts cancel in doubles.
        if total < 10**6 and always > 1e-290:
            theirs = ssrm.sequential_p_values([users], np.array([float(s) for s in shares]))[0]
            same("always-valid sample ratio", always, theirs, 1e-6)
        yield dict(users=users, weights=weights, p=out(p), always_valid_p=out(always))


def powers():
    for alpha, strength, variance, effect in itertools.product([0.05, 0.01], [0.8, 0.9, 0.95], [65, 0.09, 1e6], [0.5, -0.01, 3]):
        z = normal_quantile(mpf(alpha) / 2) + normal_quantile(1 - mpf(strength))
        n = math.ceil(2 * variance * (z / mpf(effect)) ** 2)
        sd = math.sqrt(2 * variance)
        theirs = power.normal_sample_size_one_tail(effect, strength, alpha / 2, sd, sd)
        assert abs(theirs - n) <= 1 + 1e-9 * n, (theirs, n)
        base, other = rng.choice([(0.1, 0.12), (0.02, 0.025), (0.5, 0.4), (0.001, 0.0011)])
        share = proportion.samplesize_proportions_2indep_onetail(other - base, base, strength, 1, alpha, 0, "two-sided")
        yield dict(alpha=alpha, power=strength, variance=variance, difference=effect, users=max(n, 2),
                   detectable=out(z * mp.sqrt(2 * mpf(variance) / max(n, 2))), shares=[base, other], share_users=math.ceil(share))


def winsorised():
    for count in range(55):
        arms = [[rng.choice([19.0, 29.0, rng.paretovariate(1.2) * 20, -5.0]) for _ in range(rng.randint(0, 40))] for _ in "ab"]
        users = [len(arm) + rng.choice([0, 1, 30]) + 1 for arm in arms]
        lower, upper = rng.choice([(0, 0.99), (0.01, 0.95), (0, 1), (0.05, 0.9)])
        full = [np.array(arm + [0.0] * (n - len(arm))) for arm, n in zip(arms, users)]
        low, high = np.quantile(np.concatenate(full), [lower, upper])
        clipped = [arm.clip(low, high) for arm in full]
        yield dict(arms=arms, users=users, lower=lower, upper=upper, limits=[low, high],
                   sums=[float(arm.sum()) for arm in clipped],
                   deviations=[float(((arm - arm.mean()) ** 2).sum()) for arm in clipped])


def bootstraps():
    """scipy's BCa, of as many resamples that the Monte Carlo error is 2 % of the width or so."""
    for count in range(4):
        generator = np.random.default_rng(count)
        full = []
        for rate, price in [(0.1, 20), (0.08, 30)]:
            n = [400, 1000][count % 2]
            full.append(np.where(generator.random(n) < rate, price * generator.lognormal(0, 0.8, n).round(3), 0.0))
        intervals = []
        for statistic in [lambda a, b, axis: b.mean(axis) - a.mean(axis), lambda a, b, axis: b.mean(axis) / a.mean(axis) - 1]:
            found = stats.bootstrap(full, statistic, n_resamples=10000, vectorized=True, batch=500, method="BCa", random_state=7)
            intervals.append(list(found.confidence_interval))
        yield dict(users=[len(arm) for arm in full], buyers=[arm[arm > 0].tolist() for arm in full],
                   difference=intervals[0], lift=intervals[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    groups = dict(distributions=distributions, means=means, covariates=covariates, proportions=proportions,
                  combinations=combinations, multiples=multiples, ratios=ratios, powers=powers, winsorised=winsorised,
                  bootstraps=bootstraps)
    write = parser.parse_args().write
    vectors = dict(versions={name: version(name) for name in PACKAGES})
    vectors |= {name: list(make()) for name, make in groups.items()}
    print({name: len(cases) for name, cases in vectors.items() if name != "versions"}, "compared:", compared)
    lines = [f'"{name}": ' + (json.dumps(cases) if name == "versions" else
             "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]") for name, cases in vectors.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if write:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        raise SystemExit(f"{FILE} differs; --write makes it anew")


if __name__ == "__main__":
    main()
