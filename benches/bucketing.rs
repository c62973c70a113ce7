//! What a decision costs: `cargo bench --bench bucketing`; `-- --test` runs each once.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lastprice::UserId;
use lastprice::bucketing::{Allocation, Unit};
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
    group.finish();
}

criterion_group!(benches, bucketing);
criterion_main!(benches);
