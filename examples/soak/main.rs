//! Many tenants, mixed load and random faults, for as long as you like: `cargo run --release --example soak -- --minutes 10`.
//!
//! It starts a PostgreSQL of its own, kills it, cuts its connections, loses its answers and exhausts the pool, while it assigns, sells, refunds and
//! records; and it keeps books of everything that was acknowledged. Exit code 1: something that was acknowledged is not there,
//! something that was not done is there, something is there twice or for somebody else, numbers do not add up, or a connection
//! was left behind. 2: it could not run. The same `--seed` throws the same dice; what threads make of them is not the same.

mod faults;
mod load;
mod network;
mod oracle;
mod shop;
mod table;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lastprice::{Admin, Client, RecorderOptions, RefresherOptions};
use lastprice_testkit::PrivateCluster;

use tokio::task::JoinSet;

use load::Load;
use network::Network;
use oracle::Oracle;
use shop::Shop;
use table::Table;

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The name that the server knows the client by.
pub(crate) const APPLICATION: &str = "lastprice soak";

/// Callers at once: more than there are connections.
const CALLERS: u64 = 24;
const CONNECTIONS: usize = 8;

/// What is asked for on the command line.
struct Asked {
    minutes: f64,
    tenants: usize,
    seed: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let asked = match Asked::from_args(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(usage) => {
            eprintln!("{usage}\nsoak [--minutes <n>] [--tenants <n>] [--seed <n>]");
            return ExitCode::from(2);
        }
    };
    match soak(&asked).await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(failure) => {
            eprintln!("it could not run: {failure}");
            let mut cause = failure.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::from(2)
        }
    }
}

impl Asked {
    fn from_args(mut args: impl Iterator<Item = String>) -> Result<Asked, String> {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
        let mut asked = Asked { minutes: 1.0, tenants: 8, seed: now };
        while let Some(name) = args.next() {
            let value = args.next().ok_or(format!("{name} has no value"))?;
            let wrong = |_| format!("{name} {value} is no number");
            match name.as_str() {
                "--minutes" => asked.minutes = value.parse().map_err(|_| format!("{name} {value}"))?,
                "--tenants" => asked.tenants = value.parse().map_err(wrong)?,
                "--seed" => asked.seed = value.parse().map_err(wrong)?,
                _ => return Err(format!("{name} is not known")),
            }
        }
        let is_fine = (0.05..=100_000.0).contains(&asked.minutes) && (2..=1000).contains(&asked.tenants);
        if is_fine { Ok(asked) } else { Err("at least 0.05 minutes and 2 to 1000 tenants".to_owned()) }
    }
}

/// How many rules were broken.
async fn soak(asked: &Asked) -> Result<usize, Failure> {
    let Asked { minutes, tenants, seed } = *asked;
    println!("{minutes} minutes, {tenants} tenants, seed {seed}");
    let cluster = PrivateCluster::builder().tcp().start().await?;
    let database = Arc::new(cluster.database().await?);
    let network = Network::before(cluster.port(), seed).await?;
    let client = Client::builder()
        .url(network.url(&database.app_url(), cluster.port()))
        .application_name(APPLICATION)
        .require_app_role()
        .pool_size(CONNECTIONS)
        .acquire_timeout(Duration::from_secs(1))
        .connect_timeout(Duration::from_secs(2))
        .statement_timeout(Duration::from_secs(5))
        .poll_interval(Duration::from_secs(1))
        .build()?;
    let oracle = Arc::new(Oracle::new());
    let mut shops = Vec::new();
    for number in 0..tenants {
        shops.push(Shop::open(&client, number).await?);
    }
    let shops: Arc<[Shop]> = shops.into();
    let recorder = client.recorder_with(RecorderOptions::new().max_events(20_000))?;
    let every = RefresherOptions::new().every(Duration::from_secs(5));
    let refresher = Admin::connect(&database.owner_url()).await?.refresher_with(every)?;

    let (stop, calm) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let table = Arc::new(Table::default());
    let load = Arc::new(Load {
        shops: Arc::clone(&shops),
        client: client.clone(),
        database: Arc::clone(&database),
        events: recorder.handle(),
        oracle: Arc::clone(&oracle),
        table: Arc::clone(&table),
    });
    let mut callers = JoinSet::new();
    for n in 0..CALLERS {
        callers.spawn(Arc::clone(&load).run(seed ^ (n << 32), Arc::clone(&stop)));
    }
    let watching = tokio::spawn(oracle::watch(Arc::clone(&load), Arc::clone(&calm)));
    let counting = oracle::audit(recorder.handle(), Arc::clone(&oracle), Arc::clone(&calm));
    let printing = tokio::spawn(table::print(Arc::clone(&load), Arc::clone(&calm)));

    let end = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    faults::until(end, seed, &cluster, &network, &load).await?;
    stop.store(true, Ordering::Relaxed);
    let ended = async {
        while let Some(ended) = callers.join_next().await {
            ended?;
        }
        Ok::<(), Failure>(())
    };
    match tokio::time::timeout(Duration::from_secs(60), ended).await {
        Ok(ended) => ended?,
        Err(_) => oracle.broken("calls do not come to an end though the server runs"),
    }
    if tokio::time::timeout(Duration::from_secs(60), recorder.flush()).await.is_err() {
        oracle.broken("the recorder did not become empty in a minute");
    }
    let report = recorder.shutdown(Duration::from_secs(30)).await;
    calm.store(true, Ordering::Relaxed);
    let refreshed = refresher.shutdown(Duration::from_secs(30)).await;
    watching.await?;
    printing.await?;
    counting.join().map_err(|_| "the auditor has panicked")?;
    if report.stats.dropped + report.stats.rejected > 0 || report.in_doubt > 0 {
        oracle.broken(format!("the recorder has lost something: {report:?}"));
    }
    match tokio::time::timeout(Duration::from_secs(120), oracle::settle_accounts(&load)).await {
        Ok(settled) => settled?,
        Err(_) => oracle.broken("the accounts cannot be settled"),
    }

    let broken = oracle.count();
    table.sum_up(&load, &refreshed, network.lost());
    println!("lost = {}, rules broken: {broken}, seed {seed}", oracle.lost());
    match broken {
        0 => println!("PASS: nothing lost, doubled or seen by another tenant"),
        _ => println!("FAIL: what begins with BROKEN above"),
    }
    Ok(broken)
}
