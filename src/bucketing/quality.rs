//! Are the buckets as good as random? Chi-squared tests over fixed ids and salts: what they say never changes, so a
//! failure is a change of the algorithm, and no bad luck.
//!
//! The critical values are from `scipy.stats.chi2`; the call stands beside each.

use std::sync::LazyLock;

use uuid::{Builder, Uuid};

use super::*;

const USERS: usize = 1_000_000;
/// xorshift64*: numbers that have nothing to do with the hash under test.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn uuid(&mut self) -> Uuid {
        let (high, low) = (self.next(), self.next());
        Builder::from_random_bytes(((u128::from(high) << 64) | u128::from(low)).to_be_bytes()).into_uuid()
    }
}

fn units(id: impl FnMut(usize) -> String) -> Vec<Unit> {
    (0..USERS).map(id).map(|id| Unit::of(&UserId::new(id).unwrap())).collect()
}

fn email(n: usize) -> String {
    let first = ["anna", "ben", "chen", "dora", "emil", "fatima", "george"][n % 7];
    let domain = ["example.com", "mail.example.org", "firma.example"][n % 3];
    format!("{first}.{n}@{domain}")
}

// Hashed once for all tests: in a debug build that is what takes the time.
static SEQUENTIAL: LazyLock<Vec<Unit>> = LazyLock::new(|| units(|n| format!("user-{n}")));
static UUIDS: LazyLock<Vec<Unit>> = LazyLock::new(|| {
    let mut random = Random(1);
    units(|_| random.uuid().to_string())
});
static EMAILS: LazyLock<Vec<Unit>> = LazyLock::new(|| units(email));
static INTEGERS: LazyLock<Vec<Unit>> = LazyLock::new(|| units(|n| n.to_string()));

fn kinds() -> [(&'static str, &'static [Unit]); 4] {
    [("sequential", &SEQUENTIAL), ("UUIDs", &UUIDS), ("e-mails", &EMAILS), ("integers", &INTEGERS)]
}

fn salt(n: u64) -> String {
    Random(0x9e37_79b9_7f4a_7c15 ^ n).uuid().to_string()
}

fn share(percent: u32) -> Share {
    Share::percent(percent).unwrap()
}

/// There are about 160 checks against these: one in 6,000 such files would fail by chance.
fn critical(df: usize) -> f64 {
    match df {
        1 => 23.928,    // chi2.isf(1e-6, 1)
        2 => 27.631,    // chi2.isf(1e-6, 2)
        9 => 44.811,    // chi2.isf(1e-6, 9)
        255 => 377.078, // chi2.isf(1e-6, 255)
        _ => panic!("no critical value for {df} degrees of freedom"),
    }
}

/// Of counts, against weights. What has no weight must have no count.
fn chi2_of_fit(counts: &[u64], weights: &[u32]) -> f64 {
    let n = counts.iter().sum::<u64>() as f64;
    let total = weights.iter().map(|&w| f64::from(w)).sum::<f64>();
    let mut chi2 = 0.0;
    for (&count, &weight) in counts.iter().zip(weights) {
        if weight == 0 {
            assert_eq!(count, 0, "a weight of zero got somebody");
            continue;
        }
        let expected = n * f64::from(weight) / total;
        chi2 += (count as f64 - expected).powi(2) / expected;
    }
    chi2
}

/// Of a joint table: does the row say anything about the column?
fn chi2_of_independence<const R: usize, const C: usize>(table: &[[u64; C]; R]) -> f64 {
    let n = table.iter().flatten().sum::<u64>() as f64;
    let mut chi2 = 0.0;
    for row in table {
        for (column, &count) in row.iter().enumerate() {
            let of_column = table.iter().map(|row| row[column]).sum::<u64>() as f64;
            let expected = row.iter().sum::<u64>() as f64 * of_column / n;
            assert!(expected > 5.0, "too few for the test to mean something");
            chi2 += (count as f64 - expected).powi(2) / expected;
        }
    }
    chi2
}

#[test]
fn variants_are_as_likely_as_their_weights() {
    let mut nth = 0;
    for weights in [&[1, 1][..], &[1, 9], &[1, 1, 1], &[5, 3, 2], &[1; 10], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    {
        for (kind, units) in kinds() {
            nth += 1;
            let allocation = Allocation::new(&salt(nth), weights).unwrap();
            let mut counts = vec![0; weights.len()];
            for unit in units {
                counts[allocation.variant(*unit) as usize] += 1;
            }
            let chi2 = chi2_of_fit(&counts, weights);
            assert!(chi2 < critical(weights.len() - 1), "{kind} {weights:?}: {chi2}, {counts:?}");
        }
    }
}

/// Much finer than any experiment; and not more even than chance, as what merely counts would be.
#[test]
fn buckets_are_uniform() {
    for (nth, (kind, units)) in (100..).zip(kinds()) {
        for purpose in ["traffic", "variant"] {
            let seed = seed(purpose, &salt(nth));
            let mut counts = [0; 256];
            for unit in units {
                counts[(unit.bucket(seed) >> 56) as usize] += 1;
            }
            let chi2 = chi2_of_fit(&counts, &[1; 256]);
            assert!(chi2 < critical(255), "{kind} {purpose}: {chi2}");
            assert!(chi2 > 161.651, "{kind} {purpose}: {chi2}"); // chi2.ppf(1e-6, 255)
        }
    }
}

#[test]
fn experiments_say_nothing_about_each_other() {
    const EXPERIMENTS: usize = 40;
    const SAMPLE: usize = 200_000;
    for (kind, units) in [("sequential", &SEQUENTIAL), ("UUIDs", &UUIDS)] {
        let variants: Vec<Vec<usize>> = (0..EXPERIMENTS)
            .map(|n| {
                let allocation = Allocation::new(&salt(1_000 + n as u64), &[1, 1, 1]).unwrap();
                units[..SAMPLE].iter().map(|unit| allocation.variant(*unit) as usize).collect()
            })
            .collect();
        let (mut pairs, mut sum, mut worst) = (0, 0.0, 0.0f64);
        for (n, one) in variants.iter().enumerate() {
            for other in &variants[..n] {
                let mut table = [[0; 3]; 3];
                for (a, b) in one.iter().zip(other) {
                    table[*a][*b] += 1;
                }
                let chi2 = chi2_of_independence(&table);
                (pairs, sum, worst) = (pairs + 1, sum + chi2, worst.max(chi2));
            }
        }
        assert_eq!(pairs, 780);
        // Bonferroni, one in 1,000 for all pairs together: chi2.isf(1e-3 / 780, 4)
        assert!(worst < 32.850, "{kind}: {worst}");
        // And the pairs together: chi2.isf(1e-6, 4 * 780) / 780, chi2.ppf(1e-6, 4 * 780) / 780
        let mean = sum / 780.0;
        assert!((3.537..4.499).contains(&mean), "{kind}: {mean}");
    }
}

#[test]
fn who_is_let_in_says_nothing_about_the_variant() {
    for (nth, percent) in (200..).zip([1, 10, 50]) {
        let allocation = Allocation::new(&salt(nth), &[5, 3, 2]).unwrap().traffic(share(percent));
        let mut table = [[0; 3]; 2];
        for unit in &*SEQUENTIAL {
            let placement = allocation.place(*unit);
            let variant = allocation.variant(*unit);
            assert!(placement == Placement::OutsideTraffic || placement == Placement::Variant(variant));
            table[usize::from(placement.variant().is_some())][variant as usize] += 1;
        }
        let chi2 = chi2_of_independence(&table);
        assert!(chi2 < critical(2), "{percent} %: {chi2}, {table:?}");
        let inside = chi2_of_fit(&table[1], &[5, 3, 2]);
        assert!(inside < critical(2), "{percent} %: {inside}, {table:?}");
        let sizes = table.map(|row| row.iter().sum());
        let size = chi2_of_fit(&sizes, &[100 - percent, percent]);
        assert!(size < critical(1), "{percent} %: {size}, {sizes:?}");
    }
}

/// All with one salt: the purposes alone keep them apart.
#[test]
fn layer_holdout_traffic_and_variant_say_nothing_about_each_other() {
    let salt = salt(300);
    let all = || Allocation::new(&salt, &[1, 1]).unwrap();
    let holdout = all().holdout(&salt, share(5));
    let layer = all().layer(&salt, share(20)..share(50)).unwrap();
    let traffic = all().traffic(share(10));
    let variant = all();
    let mut tables = [[[[0; 2]; 2]; 4]; 4];
    for unit in &*SEQUENTIAL {
        let is = [
            holdout.place(*unit) == Placement::HeldOut,
            layer.place(*unit) != Placement::OutsideLayer,
            traffic.place(*unit) != Placement::OutsideTraffic,
            variant.variant(*unit) == 0,
        ]
        .map(usize::from);
        for a in 0..4 {
            for b in 0..a {
                tables[a][b][is[a]][is[b]] += 1;
            }
        }
    }
    let names = ["holdout", "layer", "traffic", "variant"];
    for a in 0..4 {
        for b in 0..a {
            let chi2 = chi2_of_independence(&tables[a][b]);
            assert!(chi2 < critical(1), "{} and {}: {chi2}, {:?}", names[a], names[b], tables[a][b]);
        }
    }
}

#[test]
fn a_ramp_moves_nobody_and_ends_with_all() {
    let units = &UUIDS[..20_000];
    let at = |percent| Allocation::new(&salt(400), &[5, 3, 2]).unwrap().traffic(share(percent));
    let mut before = vec![Placement::OutsideTraffic; units.len()];
    for percent in 0..=100 {
        let mut now = before.clone();
        at(percent).place_all(units, &mut now);
        for (before, now) in before.iter().zip(&now) {
            assert!(before == now || *before == Placement::OutsideTraffic, "{before:?} became {now:?}");
        }
        let inside = now.iter().filter(|placement| placement.variant().is_some()).count() as u64;
        let chi2 = chi2_of_fit(&[inside, units.len() as u64 - inside], &[percent, 100 - percent]);
        assert!(chi2 < critical(1), "{inside} users at {percent} %");
        before = now;
    }
    assert!(before.iter().all(|placement| placement.variant().is_some()));
}

#[test]
fn a_weight_of_zero_gets_nobody() {
    for (nth, weights) in (500..).zip([[0, 1, 0, 3, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [2, 0, 0, 0, 3]]) {
        let allocation = Allocation::new(&salt(nth), &weights).unwrap();
        let mut counts = [0; 5];
        for unit in &*INTEGERS {
            counts[allocation.variant(*unit) as usize] += 1;
        }
        let positive = weights.iter().filter(|&&w| w > 0).count();
        let chi2 = chi2_of_fit(&counts, &weights);
        assert!(positive == 1 || chi2 < critical(positive - 1), "{weights:?}: {chi2}, {counts:?}");
    }
}
