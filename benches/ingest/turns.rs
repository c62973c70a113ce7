//! Contestants take turns; times, processor time, and what the ones are in units of the others.

use std::fs::read_to_string;
use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use crate::Failure;
use crate::world::{Event, Shape, World};

type Run = Pin<Box<dyn Future<Output = Result<(), Failure>>>>;

/// Somebody who writes views.
pub(crate) struct Contestant {
    name: String,
    /// Called untimed, to make of the events what the client takes; what it returns is timed.
    write: Box<dyn FnMut(Vec<Event>) -> Run>,
    triggers: bool,
    turns: Vec<Turn>,
}

struct Turn {
    /// Of a row.
    seconds: f64,
    /// Of the whole turn, in seconds.
    cpu: Option<[f64; 2]>,
    rows: usize,
}

impl Contestant {
    pub(crate) fn new<F>(name: impl Into<String>, mut write: impl FnMut(Vec<Event>) -> F + 'static) -> Self
    where
        F: Future<Output = Result<(), Failure>> + 'static,
    {
        let write = Box::new(move |events| Box::pin(write(events)) as Run);
        Contestant { name: name.into(), write, triggers: true, turns: Vec::new() }
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    pub(crate) fn without_triggers(mut self) -> Self {
        self.triggers = false;
        self
    }

    async fn turn(&mut self, world: &World, shape: Shape, rows: usize) -> Result<(), Failure> {
        world.set_triggers(self.triggers).await?;
        // After a change of the tables, sessions look everything up again and make new plans.
        let first = rows.min(2000);
        (self.write)(world.events(shape, first)).await?;
        let run = (self.write)(world.events(shape, rows));
        let cpu = cpu(world).await?;
        let started = Instant::now();
        run.await?;
        let seconds = started.elapsed().as_secs_f64() / rows as f64;
        let spent = cpu.zip(self::cpu(world).await?).map(|(from, to)| [to[0] - from[0], to[1] - from[1]]);
        self.turns.push(Turn { seconds, cpu: spent, rows });
        world.settle(first + rows, self.triggers).await
    }

    /// Of a row, in microseconds, of client and server; over all turns, since the system counts in hundredths of a second.
    fn cpu(&self) -> Option<[f64; 2]> {
        let all: Vec<[f64; 2]> = self.turns.iter().filter_map(|turn| turn.cpu).collect();
        let rows: usize = self.turns.iter().map(|turn| turn.rows).sum();
        let each = |i: usize| all.iter().map(|cpu| cpu[i]).sum::<f64>() * 1e6 / rows as f64;
        (all.len() == self.turns.len()).then(|| [each(0), each(1)])
    }

    /// The time of the other one in units of ours: the median of what it is in each round, so that load that comes and
    /// goes hits both.
    fn speed_of(&self, other: &Contestant) -> f64 {
        median(self.turns.iter().zip(&other.turns).map(|(own, other)| other.seconds / own.seconds))
    }
}

/// Everybody writes as many rows, in turn; another one begins each round.
pub(crate) async fn play(
    world: &World,
    contestants: &mut [Contestant],
    shape: Shape,
    rounds: usize,
    rows: usize,
) -> Result<(), Failure> {
    for round in 0..rounds {
        world.checkpoint().await?;
        for i in 0..contestants.len() {
            let contestant = &mut contestants[(i + round) % contestants.len()];
            let turn = contestant.turn(world, shape, rows).await;
            turn.map_err(|e| format!("{}: {e}", contestant.name))?;
        }
    }
    world.set_triggers(true).await
}

pub(crate) fn table(contestants: &[Contestant]) -> String {
    let mut table =
        "| | views/s | of the first | client CPU | server CPU |\n|---|--:|--:|--:|--:|\n".to_owned();
    for contestant in contestants {
        let rate = 1.0 / median(contestant.turns.iter().map(|turn| turn.seconds));
        let ratio = contestant.speed_of(&contestants[0]);
        let [client, server] = match contestant.cpu() {
            Some(cpu) => cpu.map(|micros| format!("{micros:.1} µs")),
            None => ["-".to_owned(), "-".to_owned()],
        };
        table += &format!("| {} | {rate:.0} | {ratio:.2} | {client} | {server} |\n", contestant.name);
    }
    table
}

/// What a ratio is meant to be.
pub(crate) struct Target {
    text: String,
    ratio: f64,
    kept: bool,
}

impl Target {
    /// The rate of the one is at least so many times that of the other.
    pub(crate) fn at_least(least: f64, one: &Contestant, other: &Contestant) -> Self {
        let ratio = one.speed_of(other);
        let text = format!("{} / {} | ≥ {least}", one.name, other.name);
        Target { text, ratio, kept: ratio >= least }
    }

    /// The time of the one is at most so many times that of the other.
    pub(crate) fn time_at_most(most: f64, one: &Contestant, other: &Contestant) -> Self {
        let ratio = other.speed_of(one);
        let text = format!("time {} / {} | ≤ {most}", one.name, other.name);
        Target { text, ratio, kept: ratio <= most }
    }
}

pub(crate) fn targets(targets: &[Target]) -> String {
    let mut table = "\n| ratio | target | measured |\n|---|--:|--:|\n".to_owned();
    for Target { text, ratio, kept } in targets {
        let missed = if *kept { "" } else { " (missed)" };
        table += &format!("| {text} | {ratio:.2}{missed} |\n");
    }
    table
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

pub(crate) fn quantile(values: impl Iterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len().saturating_sub(1) as f64;
    values.get((last * share) as usize).copied().unwrap_or(f64::NAN)
}

/// Seconds that we and the server's processes have used so far; where the system says so.
pub(crate) async fn cpu(world: &World) -> Result<Option<[f64; 2]>, Failure> {
    let Some(own) = seconds_of("self") else { return Ok(None) };
    let backends = world.backends().await?;
    Ok(Some([own, backends.iter().filter_map(|pid| seconds_of(&pid.to_string())).sum()]))
}

fn seconds_of(process: &str) -> Option<f64> {
    let stat = read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / 100.0)
}
