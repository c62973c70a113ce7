//! What numbers cost when history grows: live totals, a refresh, and results, side by side with a materialized view that
//! recomputes everything.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench metrics    prints the tables
//! … -- --write                    puts them into RESULTS.md
//! … -- --quick                    a short run that only checks that all numbers agree
//! … -- --rounds N                 other than 9
//! ```
//!
//! A time counts only if the numbers are right: exit code 1 if the live ones, the refreshed ones and the recomputed ones differ.

#[path = "results.rs"]
mod results;
#[path = "metrics/world.rs"]
mod world;

use std::time::{Duration, Instant};

use world::{Arm, World, cluster};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How much there is, and how often it is measured.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    rounds: usize,
    /// The lengths of the histories, in views.
    views: [u64; 3],
    /// Of the experiment that is the same in all.
    fixed_users: u64,
    /// What is new in each round.
    events: u64,
}

/// What was measured in one database, in milliseconds, by round.
#[derive(Default)]
struct Times {
    live: Vec<f64>,
    live_pending: Vec<f64>,
    refresh: Vec<f64>,
    recompute: Vec<f64>,
    results_grown: Vec<f64>,
    results_fixed: Vec<f64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().collect();
    let asked_for = |flag: &str| args.iter().any(|arg| arg == flag);
    let quick = asked_for("--quick") || asked_for("--test");
    let rounds = args.iter().skip_while(|arg| *arg != "--rounds").nth(1);
    let size = if quick {
        Size { rounds: 1, views: [1000, 10_000, 50_000], fixed_users: 1000, events: 1000 }
    } else {
        let rounds = rounds.map_or(Ok(9), |rounds| rounds.parse())?;
        Size { rounds, views: [100_000, 1_000_000, 5_000_000], fixed_users: 100_000, events: 10_000 }
    };

    let cluster = cluster().await?;
    let mut worlds = Vec::new();
    for views in size.views {
        worlds.push((World::new(&cluster, size, views).await?, Times::default()));
    }
    // The first round is not counted: connections, statements and caches are new.
    for round in 0..=size.rounds {
        for (world, times) in &mut worlds {
            if round == 1 {
                *times = Times::default();
            }
            play(world, times, size.events, round % 2 == 0).await?;
        }
    }
    if quick {
        println!("live, refreshed and recomputed numbers agree");
        return Ok(());
    }
    let report =
        format!("{}, median of {} rounds.\n{}", worlds[0].0.describe().await?, size.rounds, tables(&worlds));
    if asked_for("--write") {
        results::write("metrics", &report)?;
    } else {
        println!("{report}");
    }
    Ok(())
}

async fn play(world: &World, times: &mut Times, events: u64, ours_first: bool) -> Result<(), Failure> {
    world.happen(events).await?;
    let live = async || median_of(20, async || world.tenant.metrics().by_variant(world.grown.id).await).await;
    times.live_pending.push(live().await?);
    if !ours_first {
        times.recompute.push(ms(world.recompute().await?));
    }
    let (time, refreshed) = timed(world.admin.refresh_metrics()).await;
    if !refreshed? {
        return Err("nothing was refreshed".into());
    }
    times.refresh.push(ms(time));
    if ours_first {
        times.recompute.push(ms(world.recompute().await?));
    }
    world.settle().await?;
    times.live.push(live().await?);
    let results = async |arm: Arm| median_of(3, async || world.tenant.metrics().results(arm.id).await).await;
    times.results_grown.push(results(world.grown).await?);
    times.results_fixed.push(results(world.fixed).await?);
    Ok(())
}

fn tables(worlds: &[(World, Times)]) -> String {
    let mut text = "\n### Totals\n\n| views | live totals | with new events pending | refresh | everything recomputed | of ours |\n\
                    |--:|--:|--:|--:|--:|--:|\n"
        .to_owned();
    for (world, times) in worlds {
        text += &format!(
            "| {} | {:.2} ms | {:.2} ms | {:.1} ms | {:.1} ms | {:.1} |\n",
            world.views,
            median(&times.live),
            median(&times.live_pending),
            median(&times.refresh),
            median(&times.recompute),
            ratio(&times.recompute, &times.refresh),
        );
    }
    let [(_, small), .., (last, large)] = worlds else { return text };
    text += "\n| longest history / shortest | target | measured |\n|---|--:|--:|\n";
    let growth: [(&str, &Vec<f64>, &Vec<f64>); 3] = [
        ("live totals", &large.live, &small.live),
        ("live totals, with new events pending", &large.live_pending, &small.live_pending),
        ("refresh", &large.refresh, &small.refresh),
    ];
    for (name, large, small) in growth {
        let grown = ratio(large, small);
        text += &format!("| {name} | < 2 | {grown:.2}{} |\n", missed(grown < 2.0));
    }
    text += &format!("| everything recomputed | | {:.1} |\n", ratio(&large.recompute, &small.recompute));

    text += "\n### Results\n\n| views | assigned | buyers | `results` | per 1000 buyers |\n|--:|--:|--:|--:|--:|\n";
    let rows = worlds.iter().flat_map(|(world, times)| {
        [(world, world.fixed, &times.results_fixed), (world, world.grown, &times.results_grown)]
    });
    for (world, arm, times) in rows {
        let time = median(times);
        let each = time * 1000.0 / arm.buyers as f64;
        text += &format!(
            "| {} | {} | {} | {time:.1} ms | {each:.2} ms |\n",
            world.views / 2,
            arm.users,
            arm.buyers
        );
    }
    let (live, results) = (median(&large.live), median(&large.results_grown));
    let flat = ratio(&large.results_fixed, &small.results_fixed);
    text += &format!(
        "\n| | target | measured |\n|---|--:|--:|\n\
         | live totals after {} views | ≤ 1 ms | {live:.2} ms{} |\n\
         | `results` of {} buyers | ≤ 150 ms | {results:.0} ms{} |\n\
         | `results` of the same buyers, longest history / shortest | < 2 | {flat:.2}{} |\n",
        last.views,
        missed(live <= 1.0),
        last.grown.buyers,
        missed(results <= 150.0),
        missed(flat < 2.0),
    );
    text
}

fn missed(kept: bool) -> &'static str {
    if kept { "" } else { " (missed)" }
}

pub(crate) async fn timed<T>(work: impl Future<Output = T>) -> (Duration, T) {
    let started = Instant::now();
    let done = work.await;
    (started.elapsed(), done)
}

async fn median_of<T>(calls: usize, call: impl AsyncFn() -> lastprice::Result<T>) -> Result<f64, Failure> {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let (time, done) = timed(call()).await;
        done?;
        times.push(ms(time));
    }
    Ok(median(&times))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median of what it is in each round, so that load that comes and goes hits both.
fn ratio(of: &[f64], to: &[f64]) -> f64 {
    median(&of.iter().zip(to).map(|(of, to)| of / to).collect::<Vec<_>>())
}
