//! What we measure of our own: decisions side by side with a bare hash, one user in many experiments, and two threads.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lastprice::bucketing::{Allocation, Share, Unit};
use lastprice::{Assigner, Currency, NewExperiment, UserId, Variants};
use twox_hash::XxHash3_64;

use crate::{Contestant, Failure};

const EXPERIMENTS: usize = 50;

/// All the others are compared with the first.
pub(crate) fn all(users: &[String], variants: usize) -> Result<Vec<Contestant>, Failure> {
    let bare = Bare::new(variants);
    let allocation = Allocation::new("a-salt", &vec![1; variants])?;
    let half = Share::percent(50)?;
    let gated = allocation.clone().traffic(half).layer("a-layer", Share::NONE..half)?;
    let gated = gated.holdout("a-tenant", Share::percent(5)?);
    let assigner = Assigner::fixed(experiments(variants))?;
    let mut keys = (0..EXPERIMENTS).map(key).cycle();
    let (again, view) = (assigner.clone(), assigner.view());

    let id = |user: &str| UserId::new(user);
    Ok(vec![
        Contestant::new("lastprice", "`Allocation::variant(Unit::of(id))`", users, id, move |id| {
            Some(allocation.variant(Unit::of(id)) as usize)
        })?,
        Contestant::new("twox-hash", "seeded XXH3, thresholds counted", users, id, move |id| {
            Some(bare.variant(id.as_str().as_bytes()))
        })?,
        Contestant::new(
            "lastprice",
            "`Allocation::place`: holdout 5 %, half of a layer, 50 % traffic",
            users,
            id,
            move |id| gated.place(Unit::of(id)).variant().map(|variant| variant as usize),
        )?
        .who_leaves_some_out(),
        Contestant::new("lastprice", "`Assigner::assign(key, id)`, one of 50 keys", users, id, move |id| {
            Some(assigner.assign("experiment-37", id)?.variant_index())
        })?,
        Contestant::new(
            "lastprice",
            "`AssignerView::assign(key, id)`, one of 50 keys",
            users,
            id,
            move |id| Some(view.assign("experiment-37", id)?.variant_index()),
        )?,
        Contestant::new(
            "lastprice",
            "`Assigner::assign(key, id)`, 50 keys in turn",
            users,
            |user| {
                let key = keys.next().ok_or("there is always one more")?;
                Ok::<_, Failure>((UserId::new(user)?, key))
            },
            move |(id, key)| Some(again.assign(key, id)?.variant_index()),
        )?,
    ])
}

fn key(n: usize) -> String {
    format!("experiment-{n}")
}

fn experiments(variants: usize) -> Vec<NewExperiment> {
    let arms = (0..variants).fold(Variants::new(), |arms, n| arms.add(n.to_string(), 1, n));
    let new = |n| NewExperiment::new(key(n), "An experiment", Currency::USD, arms.clone());
    (0..EXPERIMENTS).map(new).collect()
}

/// The least that an assignment can be: one hash of the id, and a choice without branches.
struct Bare {
    seed: u64,
    thresholds: Vec<u64>,
}

impl Bare {
    fn new(variants: usize) -> Self {
        let step = u64::MAX / variants as u64;
        let thresholds = (1..variants as u64).map(|n| n * step).collect();
        Bare { seed: XxHash3_64::oneshot(b"a-salt"), thresholds }
    }

    #[inline]
    fn variant(&self, id: &[u8]) -> usize {
        let hash = XxHash3_64::oneshot_with_seed(self.seed, id);
        self.thresholds.iter().map(|&t| usize::from(hash >= t)).sum()
    }
}

/// Nanoseconds for each of 50 experiments of one user, whose id is hashed once: median and first decile.
pub(crate) fn of_many_experiments(
    users: &[String],
    variants: usize,
    rounds: usize,
) -> Result<[f64; 2], Failure> {
    let ids = users.iter().map(|user| UserId::new(user.as_str())).collect::<Result<Vec<_>, _>>()?;
    let weights = vec![1; variants];
    let allocations = (0..EXPERIMENTS).map(|n| Allocation::new(&key(n), &weights));
    let allocations = allocations.collect::<Result<Vec<_>, _>>()?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let started = Instant::now();
        for id in &ids {
            let unit = Unit::of(black_box(id));
            let sum: u32 = allocations.iter().map(|allocation| allocation.variant(unit)).sum();
            black_box(sum);
        }
        times.push(started.elapsed().as_nanos() as f64 / (ids.len() * EXPERIMENTS) as f64);
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[times.len() / 10]])
}

/// How many times as many decisions two threads make as one, while the snapshot is replaced every 10 ms; the median of
/// the rounds.
pub(crate) fn of_two_threads(users: &[String], rounds: usize) -> Result<f64, Failure> {
    let assigner = Assigner::fixed(experiments(3))?;
    let ids = users.iter().map(|user| UserId::new(user.as_str())).collect::<Result<Vec<_>, _>>()?;
    let decisions = |threads: usize| -> Result<f64, Failure> {
        let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
        let started = Instant::now();
        std::thread::scope(|scope| -> Result<(), Failure> {
            for _ in 0..threads {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        for id in &ids {
                            black_box(assigner.assign("experiment-7", black_box(id)));
                        }
                        made.fetch_add(ids.len() as u64, Ordering::Relaxed);
                    }
                });
            }
            let swapped = (0..30).try_for_each(|_| {
                std::thread::sleep(Duration::from_millis(10));
                lastprice::internals::swap(&assigner, experiments(3))
            });
            stop.store(true, Ordering::Relaxed);
            Ok(swapped?)
        })?;
        Ok(made.into_inner() as f64 / started.elapsed().as_secs_f64())
    };
    let mut ratios = Vec::new();
    for _ in 0..rounds {
        let (one, two) = (decisions(1)?, decisions(2)?);
        ratios.push(two / one);
    }
    ratios.sort_unstable_by(f64::total_cmp);
    Ok(ratios[ratios.len() / 2])
}
