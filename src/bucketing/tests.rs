use proptest::prelude::*;

use super::allocation::Gate;
use super::thresholds::Thresholds;
use super::*;

fn of_bucket(weights: &[u32], bucket: u64) -> u32 {
    Thresholds::new(weights).unwrap().passed(bucket)
}

fn inside(part: std::ops::Range<u32>, bucket: u64) -> bool {
    let share = |n| Share::per_million(n).unwrap();
    Gate::new(0, share(part.start)..share(part.end)).has_bucket(bucket)
}

#[test]
fn the_last_variant_with_a_weight_is_open_and_later_ones_do_not_exist() {
    assert_eq!(of_bucket(&[1, 1, 0], u64::MAX), 1);
    assert_eq!(of_bucket(&[1, 1, 0], 0), 0);
    assert_eq!(of_bucket(&[1, 1, 0], (1 << 63) - 1), 0);
    assert_eq!(of_bucket(&[1, 1, 0], 1 << 63), 1);
    assert_eq!(of_bucket(&[0, 1], 0), 1);
    assert_eq!(of_bucket(&[0, 0, 5, 0, 0], 0), 2);
    assert_eq!(of_bucket(&[0, 0, 5, 0, 0], u64::MAX), 2);
    assert_eq!(of_bucket(&[u32::MAX, u32::MAX, 1], u64::MAX), 2);
    assert!(Allocation::new("s", &[0, 0]).is_err());
    assert!(Allocation::new("s", &[]).is_err());
}

/// However the line is divided, and however the division is found: at every bound, and beside it.
#[test]
fn every_bound_is_exact_in_every_way_to_find_it() {
    let ramp = |n: u32| (1..=n).collect::<Vec<_>>();
    let mut skewed = vec![1; 40];
    skewed.push(u32::MAX);
    let retired = vec![1, 0, 1, 0, 1, 1, 0];
    for weights in [ramp(2), ramp(3), ramp(10), vec![1; 1000], vec![1; 1025], vec![1; 3000], skewed, retired]
    {
        let thresholds = Thresholds::new(&weights).unwrap();
        for bound in thresholds.bounds.iter().flat_map(|&bound| [bound.saturating_sub(1), bound, bound + 1]) {
            let by_count = thresholds.bounds.iter().filter(|&&b| bound >= b).count();
            assert_eq!(thresholds.passed(bound) as usize, by_count, "{} weights at {bound}", weights.len());
        }
        assert_eq!(thresholds.passed(u64::MAX) as usize, thresholds.bounds.len());
        assert_eq!(thresholds.passed(0) as usize, thresholds.bounds.iter().filter(|&&b| b == 0).count());
    }
}

#[test]
fn no_share_is_nobody_and_the_whole_is_open() {
    for bucket in [0, 1, u64::MAX - 1, u64::MAX] {
        assert!(!inside(0..0, bucket) && inside(0..1_000_000, bucket));
    }
    assert!(Share::percent(101).is_err() && Share::per_million(1_000_001).is_err());
    assert!(Share::percent(u32::MAX).is_err());
    assert_eq!(Share::per_million(1).unwrap().to_string(), "0.0001 %");
    assert_eq!(Share::per_million(125_000).unwrap().to_string(), "12.5 %");
    assert_eq!(Share::ALL.to_string(), "100 %");
    let layered = Allocation::new("s", &[1]).unwrap().layer("l", Share::ALL..Share::ALL);
    assert_eq!(layered.unwrap_err().field(), Some("layer"));
}

/// Every combination of the three gates: the first that holds, in the order that is documented.
#[test]
fn the_first_gate_that_is_closed_is_the_reason() {
    let unit = Unit::of(&UserId::new("user").unwrap());
    for closed in 0..8 {
        let (held, other, beyond) = (closed & 4 > 0, closed & 2 > 0, closed & 1 > 0);
        let share = |all| if all { Share::ALL } else { Share::NONE };
        // The part of the layer that has the unit, and one that has not.
        let half = Share::percent(50).unwrap();
        let of = |part| Allocation::new("s", &[0, 1]).unwrap().layer("l", part).unwrap();
        let (low, high) = (of(Share::NONE..half), of(half..Share::ALL));
        let in_low = low.place(unit) == Placement::Variant(1);
        let allocation = if in_low == other { high } else { low };
        let allocation = allocation.traffic(share(!beyond)).holdout("t", share(held));
        let expected = match (held, other, beyond) {
            (true, _, _) => Placement::HeldOut,
            (_, true, _) => Placement::OutsideLayer,
            (_, _, true) => Placement::OutsideTraffic,
            _ => Placement::Variant(1),
        };
        assert_eq!(allocation.place(unit), expected);
        let mut out = [Placement::HeldOut; 2];
        allocation.place_all(&[unit, unit], &mut out);
        assert_eq!(out, [expected; 2]);
    }
}

proptest! {
    #[test]
    fn any_weights_any_bucket(weights in prop::collection::vec(any::<u32>(), 1..50), bucket: u64) {
        let total: u128 = weights.iter().map(|&w| u128::from(w)).sum();
        prop_assume!(total > 0);
        let chosen = of_bucket(&weights, bucket);
        prop_assert!(weights[chosen as usize] > 0);
        // The definition, in exact arithmetic: the first i with bucket < floor(2^64 * sum / total).
        let mut sum = 0u128;
        let by_definition = weights.iter().position(|&w| {
            sum += u128::from(w);
            u128::from(bucket) < (sum << 64) / total
        });
        prop_assert_eq!(Some(chosen as usize), by_definition);
    }

    #[test]
    fn any_part_of_the_line(bounds in [0u32..=1_000_000, 0u32..=1_000_000], bucket: u64) {
        let (start, end) = (bounds[0].min(bounds[1]), bounds[0].max(bounds[1]));
        let bound = |n: u32| (u128::from(n) << 64) / 1_000_000;
        let expected = (bound(start)..bound(end)).contains(&u128::from(bucket));
        prop_assert_eq!(inside(start..end, bucket), expected);
        // Two parts with a common bound have no bucket in common, and leave none out.
        prop_assert!(inside(0..start, bucket) ^ inside(start..1_000_000, bucket));
    }

    #[test]
    fn more_traffic_only_adds(id in "[a-z0-9]{1,40}", less in 0u32..=1_000_000, more in 0u32..=1_000_000) {
        let unit = Unit::of(&UserId::new(id).unwrap());
        let at = |n| Allocation::new("s", &[1, 2, 3]).unwrap().traffic(Share::per_million(n).unwrap()).place(unit);
        let (less, more) = (at(less.min(more)), at(less.max(more)));
        prop_assert!(less == more || less == Placement::OutsideTraffic);
    }
}
