//! What the methods promise, on made-up shops. The seeds are fixed: a test fails always or never.

use super::random::Random;
use crate::stats::*;

const ALPHA: f64 = 0.05;

/// Four standard errors of a share that is p, in so many runs.
fn noise(p: f64, runs: u32) -> f64 {
    4.0 * (p * (1.0 - p) / f64::from(runs)).sqrt()
}

fn share(hits: u32, runs: u32) -> f64 {
    f64::from(hits) / f64::from(runs)
}

#[test]
fn equal_arms_are_called_different_as_often_as_alpha_says() {
    let (runs, mut random) = (3000, Random(1));
    let mut called = 0;
    for _ in 0..runs {
        let [a, b] = [4000, 4000].map(|users| random.revenue(users, 0.05, 1.0).1);
        let p = difference(a, b).unwrap().fixed_horizon(Alpha::default()).p_value;
        called += u32::from(p <= ALPHA);
    }
    let rate = share(called, runs);
    assert!((rate - ALPHA).abs() < noise(ALPHA, runs), "{rate}");
}

#[test]
fn daily_looks_fool_the_fixed_test_and_not_the_confidence_sequence() {
    let (runs, mut random) = (1000, Random(2));
    let (mut naive, mut sequential) = (0, 0);
    for _ in 0..runs {
        let mut arms = [(0, Sample::default()); 2];
        let (mut fooled, mut wrong) = (false, false);
        for _day in 0..30 {
            for arm in &mut arms {
                let (buyers, today) = random.revenue(200, 0.1, 1.0);
                *arm = (arm.0 + buyers, arm.1.merge(today));
            }
            let estimate = difference(arms[0].1, arms[1].1).unwrap();
            fooled |= estimate.fixed_horizon(Alpha::default()).p_value <= ALPHA;
            if arms[0].0.min(arms[1].0) >= MIN_BUYERS_PER_ARM {
                wrong |= !estimate.always_valid(Alpha::default(), 12_000).interval.contains(0.0);
            }
        }
        naive += u32::from(fooled);
        sequential += u32::from(wrong);
    }
    let (naive, sequential) = (share(naive, runs), share(sequential, runs));
    assert!(naive > 0.2, "{naive}");
    assert!(sequential <= ALPHA, "{sequential}");
}

#[test]
fn the_sequence_covers_a_real_effect_at_all_looks() {
    // A price three times as high, half as many buyers, one user of ten: 1.5 times the revenue.
    let (runs, mut random) = (500, Random(3));
    let mean = 0.1 * 20.0 * f64::exp(0.5);
    let mut missed = 0;
    for _ in 0..runs {
        let mut arms = [(0, Sample::default()); 2];
        let mut ever = false;
        for _day in 0..30 {
            for (arm, users, buying, price) in [(0, 1800, 0.1, 1.0), (1, 200, 0.05, 3.0)] {
                let (buyers, today) = random.revenue(users, buying, 1.0);
                let dearer = Sample::from_deviations(
                    today.n(),
                    today.mean() * price,
                    today.deviations() * price * price,
                );
                arms[arm] = (arms[arm].0 + buyers, arms[arm].1.merge(dearer.unwrap()));
            }
            if arms[0].0.min(arms[1].0) >= MIN_BUYERS_PER_ARM {
                let effect = difference(arms[0].1, arms[1].1).unwrap().always_valid(Alpha::default(), 60_000);
                ever |= !effect.interval.contains(0.5 * mean);
            }
        }
        missed += u32::from(ever);
    }
    assert!(share(missed, runs) <= ALPHA + noise(ALPHA, runs), "{}", share(missed, runs));
}

#[test]
fn intervals_cover_the_truth_at_their_level() {
    let (runs, mut random) = (3000, Random(4));
    let mean = |buying: f64| buying * 20.0 * f64::exp(0.125);
    let mut covered = [0; 3];
    for _ in 0..runs {
        let ((few, a), (_, b)) = (random.revenue(3000, 0.08, 0.5), random.revenue(2000, 0.1, 0.5));
        let alpha = Alpha::default();
        let inside = [
            difference(a, b).unwrap().fixed_horizon(alpha).interval.contains(mean(0.1) - mean(0.08)),
            lift(a, b).unwrap().fixed_horizon(alpha).interval.contains(0.25),
            wilson(Proportion::new(few, 3000).unwrap(), alpha).unwrap().contains(0.08),
        ];
        inside.iter().zip(&mut covered).for_each(|(inside, covered)| *covered += u32::from(*inside));
    }
    for covered in covered {
        let rate = share(covered, runs);
        assert!((rate - 0.95).abs() < noise(ALPHA, runs), "{rate}");
    }
}

#[test]
fn bootstrap_intervals_cover_the_truth_of_skewed_revenue() {
    let (runs, mut random) = (300, Random(5));
    let mut covered = 0;
    for seed in 0..runs {
        let [a, b] = [0.1, 0.15].map(|buying| {
            let buyers = (0..600).filter(|_| random.uniform() < buying).count();
            let users = (0..buyers).map(|_| 20.0 * (0.8 * random.normal()).exp()).collect();
            Totals::new(600, users).unwrap()
        });
        let truth = 0.05 * 20.0 * f64::exp(0.32);
        let found = bootstrap(&a, &b, Alpha::default(), 1000, u64::from(seed)).unwrap();
        covered += u32::from(found.difference.contains(truth));
    }
    assert!((share(covered, runs) - 0.95).abs() < noise(ALPHA, runs), "{}", share(covered, runs));
}

#[test]
fn arms_that_differ_in_delay_alone_are_equal_once_users_are_mature() {
    const WINDOW: usize = 7;
    const DAYS: usize = 45;
    let (runs, mut random) = (200, Random(6));
    let (mut immature, mut mature) = (0, 0);
    for _ in 0..runs {
        // Of each arm, by day of assignment and days until they bought.
        let mut bought = [[[0u64; WINDOW]; DAYS]; 2];
        for (arm, delays) in [(0, 1), (1, WINDOW as u64)] {
            for day in &mut bought[arm] {
                for _ in 0..400 {
                    if random.uniform() <= 0.1 {
                        day[(random.next() % delays) as usize] += 1;
                    }
                }
            }
        }
        let differ = |days: usize, counts: &dyn Fn(usize, usize) -> bool| {
            let arms = bought.map(|arm| {
                let all = (0..days).flat_map(|day| (0..WINDOW).map(move |delay| (day, delay)));
                let buyers =
                    all.filter(|(day, delay)| counts(*day, *delay)).map(|(day, delay)| arm[day][delay]).sum();
                Proportion::new(buyers, 400 * days as u64).unwrap()
            });
            let few = arms[0].successes().min(arms[1].successes()) < MIN_BUYERS_PER_ARM;
            let estimate = difference(arms[0].into(), arms[1].into()).unwrap();
            !few && !estimate.always_valid(Alpha::default(), 20_000).interval.contains(0.0)
        };
        // In the evening of each day: all users and what they bought so far, or those whose window is over.
        immature += u32::from((0..DAYS).any(|now| differ(now + 1, &|day, delay| day + delay <= now)));
        mature += u32::from((WINDOW..DAYS).any(|now| differ(now + 1 - WINDOW, &|_, _| true)));
    }
    assert!(share(mature, runs) <= ALPHA + noise(ALPHA, runs), "{}", share(mature, runs));
    assert!(share(immature, runs) > 0.5, "{}", share(immature, runs));
}

#[test]
fn sample_ratios_alarm_rarely_however_often_one_looks() {
    let (runs, mut random) = (1000, Random(7));
    let (mut chi_squared, mut always_valid) = (0, 0);
    for _ in 0..runs {
        let (mut arms, mut daily, mut ever) = ([(0, 1), (0, 1)], false, false);
        for _day in 0..30 {
            for _ in 0..5 {
                // 64 users by the bits of one number.
                let first = u64::from(random.next().count_ones());
                arms = [(arms[0].0 + first, 1), (arms[1].0 + 64 - first, 1)];
            }
            let found = sample_ratio(&arms).unwrap();
            daily |= found.p_value < SampleRatio::ALARM;
            ever |= found.always_valid_p_value <= ALPHA;
        }
        chi_squared += u32::from(daily);
        always_valid += u32::from(ever);
    }
    assert!(share(chi_squared, runs) < 0.02, "{}", share(chi_squared, runs));
    assert!(share(always_valid, runs) <= ALPHA, "{}", share(always_valid, runs));
}
