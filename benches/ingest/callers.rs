//! Many callers at once, each with one view at a time, each waiting until it is committed.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use lastprice::ViewOutcome;
use tokio::task::JoinSet;
use tokio_postgres::{NoTls, types::ToSql};

use crate::recorder::track;
use crate::turns::{cpu, median, quantile};
use crate::world::{Event, Shape, World};
use crate::{Failure, Size, ours, peers};

pub(crate) const CALLERS: usize = 64;

type Call = Arc<dyn Fn(Event) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>> + Send + Sync>;

/// A way to write one view.
pub(crate) struct Way {
    name: String,
    call: Call,
    callers: usize,
    rounds: Vec<Round>,
}

struct Round {
    seconds: f64,
    p50: f64,
    p99: f64,
    cpu: Option<[f64; 2]>,
}

impl Way {
    pub(crate) fn new<F>(name: &str, call: impl Fn(Event) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let call: Call = Arc::new(move |event| Box::pin(call(event)));
        Way { name: name.to_owned(), call, callers: CALLERS, rounds: Vec::new() }
    }

    async fn round(&mut self, world: &World, calls: usize) -> Result<(), Failure> {
        // So that all connections are there, and know their statements.
        let warm_up = self.callers * 8;
        self.all_call(world.events(Shape::OneTenant, warm_up)).await?;
        let events = world.events(Shape::OneTenant, calls);
        let before = cpu(world).await?;
        let started = Instant::now();
        let times = self.all_call(events).await?;
        let seconds = started.elapsed().as_secs_f64() / calls as f64;
        let spent = before.zip(cpu(world).await?).map(|(from, to)| [to[0] - from[0], to[1] - from[1]]);
        let cpu = spent.map(|cpu| cpu.map(|s| s / calls as f64 * 1e6));
        let at = |share| quantile(times.iter().copied(), share);
        self.rounds.push(Round { seconds, p50: at(0.5), p99: at(0.99), cpu });
        world.settle(warm_up + calls, true).await
    }

    /// The seconds that each call took.
    async fn all_call(&self, events: Vec<Event>) -> Result<Vec<f64>, Failure> {
        let mut callers = JoinSet::new();
        for part in events.chunks(events.len().div_ceil(self.callers)) {
            let (part, call) = (part.to_vec(), Arc::clone(&self.call));
            callers.spawn(async move {
                let mut times = Vec::with_capacity(part.len());
                for event in part {
                    let started = Instant::now();
                    call(event).await?;
                    times.push(started.elapsed().as_secs_f64());
                }
                Ok::<_, Failure>(times)
            });
        }
        let times: Result<Vec<Vec<f64>>, Failure> = callers.join_all().await.into_iter().collect();
        Ok(times?.concat())
    }
}

pub(crate) async fn run(world: &World, size: Size) -> Result<String, Failure> {
    let mut ways =
        vec![bare(world).await?, track(world, 1)?, track(world, 2)?, record(world, 16)?, record(world, 1)?];
    ways.push(sqlx(world, 16).await?);
    ways.push(sqlx(world, 1).await?);
    let len = ways.len();
    for round in 0..size.rounds {
        world.checkpoint().await?;
        for i in 0..len {
            let way = &mut ways[(i + round) % len];
            let turn = way.round(world, size.single_rows).await;
            turn.map_err(|e| format!("{}: {e}", way.name))?;
        }
    }
    let speed = |other: &Way| {
        let rounds = ways[1].rounds.iter().zip(&other.rounds);
        median(rounds.map(|(own, other)| other.seconds / own.seconds))
    };
    let mut text = table(&ways);
    for other in &ways[5..] {
        text += &format!("\n- {} is {:.1}x {} (asked: 20)", ways[1].name, speed(other), other.name);
    }
    Ok(text + "\n")
}

fn table(ways: &[Way]) -> String {
    let mut table =
        "| | views/s | p50 | p99 | p50, in commits | p99, in commits | client CPU | server CPU |\n\
                     |---|--:|--:|--:|--:|--:|--:|--:|\n"
            .to_owned();
    for Way { name, rounds, .. } in ways {
        let of = |value: fn(&Round) -> f64| median(rounds.iter().map(value));
        // In each round, in units of the commit of that round.
        let commits = |value: fn(&Round) -> f64| {
            median(rounds.iter().zip(&ways[0].rounds).map(|(own, bare)| value(own) / bare.p50))
        };
        let cpu = |i: usize| {
            let all: Option<Vec<f64>> = rounds.iter().map(|round| Some(round.cpu?[i])).collect();
            all.map_or("-".to_owned(), |all| format!("{:.0} µs", median(all.into_iter())))
        };
        table += &format!(
            "| {name} | {:.0} | {:.2} ms | {:.2} ms | {:.1} | {:.1} | {} | {} |\n",
            1.0 / of(|round| round.seconds),
            of(|round| round.p50) * 1e3,
            of(|round| round.p99) * 1e3,
            commits(|round| round.p50),
            commits(|round| round.p99),
            cpu(0),
            cpu(1),
        );
    }
    table
}

const INSERT: &str = "
    INSERT INTO views (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata)
    VALUES ($1, $2, $3, $4, $5, 1, 'randomised', $6, $7)";

/// One caller, and what the server needs for the row, its triggers and its commit: the unit.
async fn bare(world: &World) -> Result<Way, Failure> {
    let (client, connection) = tokio_postgres::connect(&world.database.superuser_url(), NoTls).await?;
    tokio::spawn(connection);
    let insert = client.prepare(INSERT).await?;
    let state = Arc::new((client, insert));
    let mut way = Way::new("a bare insert and its commit, one caller, superuser", move |e| {
        let state = Arc::clone(&state);
        async move {
            let (client, insert) = &*state;
            let tenant = e.tenant.uuid();
            let row: [&(dyn ToSql + Sync); 7] =
                [&tenant, &e.id, &e.experiment, &e.user, &e.variant, &e.at, &e.metadata];
            client.execute(insert, &row).await?;
            Ok(())
        }
    });
    way.callers = 1;
    Ok(way)
}

fn record(world: &World, connections: usize) -> Result<Way, Failure> {
    let client = Arc::new(ours::client(world, connections)?);
    let name = format!("`views().record`, connections: {connections}");
    Ok(Way::new(&name, move |event| {
        let client = Arc::clone(&client);
        async move {
            let tenant = client.tenant(event.tenant);
            match tenant.views().record(&ours::view(event)?).await? {
                ViewOutcome::Recorded => Ok(()),
                other => Err(format!("{other:?}").into()),
            }
        }
    }))
}

async fn sqlx(world: &World, connections: u32) -> Result<Way, Failure> {
    let pool = peers::pool(world, connections).await?;
    let name = format!("sqlx, one by one, connections: {connections}");
    Ok(Way::new(&name, move |e| {
        let pool = pool.clone();
        async move {
            let mut transaction = pool.begin().await?;
            let tenant = e.tenant.uuid();
            sqlx::query(peers::BIND).bind(tenant.to_string()).execute(&mut *transaction).await?;
            let insert = sqlx::query(INSERT).bind(tenant).bind(e.id).bind(e.experiment).bind(&e.user);
            let insert = insert.bind(e.variant).bind(e.at).bind(&e.metadata);
            insert.execute(&mut *transaction).await?;
            Ok(transaction.commit().await?)
        }
    }))
}
