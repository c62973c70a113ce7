//! What a decision costs: `cargo bench --bench bucketing`; `-- --test` runs each once.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lastprice::bucketing::{Allocation, Placement, Share, Unit};
use lastprice::{Assigner, Currency, NewExperiment, UserId, Variants};
use twox_hash::XxHash3_64;

const USERS: usize = 1024;

/// Ids as services have them: numbers, prefixed numbers and UUIDs, 12 to 36 bytes.
fn users() -> Vec<UserId> {
    let id = |n: usize| match n % 3 {
        0 => format!("{:012}", n * 7_919),
        1 => format!("customer-{:09}", n * 104_729),
        _ => uuid::Uuid::from_u64_pair(n as u64 * 0x9e37_79b9_7f4a_7c15, n as u64).to_string(),
    };
    (0..USERS).map(|n| UserId::new(id(n)).expect("a valid id")).collect()
}

fn allocation(variants: usize) -> Allocation {
    Allocation::new("a-salt-of-an-experiment", &vec![1; variants]).expect("positive weights")
}

fn experiment(n: usize) -> NewExperiment {
    let variants = Variants::new().add("19", 1, 19).add("29", 1, 29);
    NewExperiment::new(format!("experiment-{n}"), "An experiment", Currency::USD, variants)
}

fn bucketing(c: &mut Criterion) {
    let users = users();
    let mut group = c.benchmark_group("bucketing");
    group.throughput(Throughput::Elements(USERS as u64)); // so that the times are per 1024 decisions

    group.bench_function("bare XXH3", |b| {
        b.iter(|| {
            let hash = |user: &UserId| XxHash3_64::oneshot(user.as_str().as_bytes());
            users.iter().fold(0u64, |sum, user| sum.wrapping_add(hash(black_box(user))))
        });
    });
    for variants in [2, 3, 10] {
        let allocation = allocation(variants);
        group.bench_function(BenchmarkId::new("hash and choose", variants), |b| {
            b.iter(|| {
                let choose = |user: &UserId| allocation.variant(Unit::of(user));
                users.iter().map(|user| choose(black_box(user))).sum::<u32>()
            });
        });
    }
    let units: Vec<Unit> = users.iter().map(Unit::of).collect();
    for variants in [2, 3, 10] {
        let allocation = allocation(variants);
        group.bench_function(BenchmarkId::new("choose, hashed before", variants), |b| {
            b.iter(|| units.iter().map(|unit| allocation.variant(black_box(*unit))).sum::<u32>());
        });
    }
    let half = Share::percent(50).expect("at most 100");
    let gated = allocation(2).traffic(half).layer("a-layer", Share::NONE..half).expect("a range");
    let gated = gated.holdout("a-tenant", Share::percent(5).expect("at most 100"));
    group.bench_function("hash and place: holdout, layer, traffic, variant", |b| {
        b.iter(|| {
            let place = |user: &UserId| gated.place(Unit::of(user)).variant();
            users.iter().filter_map(|user| place(black_box(user))).sum::<u32>()
        });
    });
    let mut placements = vec![Placement::HeldOut; units.len()];
    group.bench_function("place all, hashed before", |b| {
        b.iter(|| gated.place_all(black_box(&units), &mut placements));
    });
    let assigner = Assigner::fixed((0..50).map(experiment)).expect("valid experiments");
    group.bench_function("Assigner::assign by key, of 50", |b| {
        b.iter(|| {
            let assign = |user: &UserId| assigner.assign("experiment-37", user).map(|d| d.variant_index());
            users.iter().filter_map(|user| assign(black_box(user))).sum::<usize>()
        });
    });
    let view = assigner.view();
    group.bench_function("AssignerView::assign by key, of 50", |b| {
        b.iter(|| {
            let assign = |user: &UserId| view.assign("experiment-37", user).map(|d| d.variant_index());
            users.iter().filter_map(|user| assign(black_box(user))).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group!(benches, bucketing);
criterion_main!(benches);
