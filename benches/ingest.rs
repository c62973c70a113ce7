//! How fast views get in: ours, which is bound by row-level security, side by side with COPY, which is not, and with the
//! inserts of other clients.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --features peers --bench ingest    prints the tables
//! … -- --write                    puts them into RESULTS.md
//! … -- --quick                    a short run that only checks what was written
//! … -- --only NAME                the part whose title has NAME in it
//! … -- --rounds N                 fewer than 15, on a busy machine
//! ```
//!
//! Without the feature, all but diesel, which takes minutes to build.
//!
//! A time counts only if what was timed has arrived: exit code 1 if the views, or the metrics of them, are not as many
//! as were sent.

#[path = "ingest/callers.rs"]
mod callers;
#[cfg(feature = "peers")]
#[path = "ingest/diesel.rs"]
mod diesel;
#[path = "ingest/ours.rs"]
mod ours;
#[path = "ingest/peers.rs"]
mod peers;
#[path = "ingest/recorder.rs"]
mod recorder;
#[path = "results.rs"]
mod results;
#[path = "ingest/turns.rs"]
mod turns;
#[path = "ingest/world.rs"]
mod world;

use std::fmt::Write as _;

use turns::{Contestant, Target, play};
use world::{Shape, World};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How much is done.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Odd, so that there is a median.
    pub(crate) rounds: usize,
    /// Of a turn.
    pub(crate) rows: usize,
    /// Of a turn that commits each row by itself.
    pub(crate) single_rows: usize,
}

// Two threads, so that two connections of ours are no slower than two processes would be.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().collect();
    let asked_for = |flag: &str| args.iter().any(|arg| arg == flag);
    let quick = asked_for("--quick") || asked_for("--test");
    let only = args.iter().skip_while(|arg| *arg != "--only").nth(1);
    let rounds = args.iter().skip_while(|arg| *arg != "--rounds").nth(1);
    let size = if quick {
        Size { rounds: 1, rows: 2000, single_rows: 128 }
    } else {
        let rounds = rounds.map_or(Ok(15), |rounds| rounds.parse())?;
        Size { rounds, rows: 20_000, single_rows: 1280 }
    };

    let world = World::new().await?;
    let mut report = format!("{}, median of {} rounds.\n", world.describe().await?, size.rounds);
    for part in PARTS.iter().filter(|part| only.is_none_or(|only| part.title().contains(only.as_str()))) {
        let title = part.title();
        let text = part.run(&world, size).await.map_err(|e| format!("{title}: {e}"))?;
        write!(report, "\n### {title}\n\n{text}")?;
        if quick {
            println!("{title}: all that was sent is there");
        }
    }

    if asked_for("--write") && !quick {
        results::write("ingest", &report)?;
    } else if !quick {
        println!("{report}");
    }
    Ok(())
}

/// A part of the report.
#[derive(Clone, Copy)]
enum Part {
    OneTenant,
    ManyTenants,
    Callers,
    Triggers(Shape, usize),
}

const PARTS: [Part; 6] = [
    Part::OneTenant,
    Part::ManyTenants,
    Part::Callers,
    Part::Triggers(Shape::OneExperiment, 1000),
    Part::Triggers(Shape::OneTenant, 100),
    Part::Triggers(Shape::OneTenant, 1),
];

impl Part {
    fn title(self) -> String {
        match self {
            Part::OneTenant => "One tenant".to_owned(),
            Part::ManyTenants => format!("{} tenants", world::TENANTS),
            Part::Callers => format!("{} callers, a view each, waiting for it", callers::CALLERS),
            Part::Triggers(_, 1) => "Triggers of the metrics: single views".to_owned(),
            Part::Triggers(Shape::OneExperiment, batch) => {
                format!("Triggers of the metrics: batches of {batch} of one experiment")
            }
            Part::Triggers(_, batch) => {
                format!("Triggers of the metrics: batches of {batch} over {} experiments", world::EXPERIMENTS)
            }
        }
    }

    async fn run(self, world: &World, size: Size) -> Result<String, Failure> {
        match self {
            Part::OneTenant => bulk(world, size, Shape::OneTenant).await,
            Part::ManyTenants => bulk(world, size, Shape::ManyTenants).await,
            Part::Callers => callers::run(world, size).await,
            Part::Triggers(shape, batch) => triggers(world, size, shape, batch).await,
        }
    }
}

/// Many views at once.
async fn bulk(world: &World, size: Size, shape: Shape) -> Result<String, Failure> {
    let mut contestants = vec![
        ours::record_many(world, 1, 1000)?,
        ours::record_many(world, 2, 1000)?,
        peers::copy(world, 1, 1000).await?,
        peers::copy(world, 1, usize::MAX).await?,
        peers::copy(world, 2, usize::MAX).await?,
        peers::sqlx(world, peers::SQLX_ROWS).await?,
        peers::sqlx(world, 1000).await?,
        peers::staged_copy(world, 1000).await?,
        peers::sqlx_checked(world, 1000).await?,
        recorder::record(world)?,
    ];
    #[cfg(feature = "peers")]
    contestants.push(diesel::insert(world, 1000).await?);
    play(world, &mut contestants, shape, size.rounds, size.rows).await?;
    let mut text = turns::table(&contestants);
    if shape == Shape::OneTenant {
        text += &turns::targets(&[
            Target::at_least(0.9, &contestants[0], &contestants[2]),
            Target::at_least(1.0, &contestants[1], &contestants[3]),
            Target::at_least(1.0, &contestants[1], &contestants[4]),
            Target::at_least(1.8, &contestants[0], &contestants[5]),
            Target::at_least(1.8, &contestants[0], &contestants[6]),
            Target::at_least(1.0, &contestants[0], &contestants[7]),
            Target::at_least(1.0, &contestants[0], &contestants[8]),
            Target::at_least(0.9, &contestants[9], &contestants[2]),
            Target::at_least(1.0, &contestants[9], &contestants[4]),
        ]);
    }
    Ok(text)
}

/// The same writes with the triggers of the metrics, and without.
async fn triggers(world: &World, size: Size, shape: Shape, batch: usize) -> Result<String, Failure> {
    let mut contestants = vec![
        ours::record_many(world, 1, batch)?.named("with triggers"),
        ours::record_many(world, 1, batch)?.named("without").without_triggers(),
    ];
    let rows = if batch == 1 { size.single_rows } else { size.rows };
    play(world, &mut contestants, shape, size.rounds, rows).await?;
    let most = match (batch, shape) {
        (1, _) => 1.25,
        (_, Shape::OneExperiment) => 1.15,
        _ => 1.3,
    };
    let [with, without]: &[Contestant; 2] = contestants.first_chunk().ok_or("there are two")?;
    Ok(turns::table(&contestants) + &turns::targets(&[Target::time_at_most(most, with, without)]))
}
