//! What metering costs who writes, what a limit costs who takes from it, and what a sale pays for the lock on its quote: eight
//! writers on one tenant.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench usage    prints the tables
//! … -- --write                    puts them into RESULTS.md
//! … -- --quick                    a short run that only checks that all is counted
//! … -- --rounds N                 other than 15
//! … -- --only lock                or usage: one of the two parts
//! ```
//!
//! A time counts only if the numbers are right: exit code 1 if a signal is missing in the usage, more is taken than allowed, or a
//! sale is missing in the ledger.

#[path = "usage/lock.rs"]
mod lock;
#[path = "results.rs"]
mod results;

use std::time::{Duration, Instant};

use lastprice::chrono::Utc;
use lastprice::{
    Admin, Client, ConsumeOutcome, Currency, ExperimentId, IdempotencyKey, LimitPeriod, Money, NewConversion,
    NewExperiment, NewTenant, NewUsage, OrderId, Plan, TenantId, UserId, Variants,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const WRITERS: usize = 8;

/// What there is in a database to meter with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Metering {
    /// As the schema is.
    Metered,
    /// Without all that usage adds to the metrics.
    Unmetered,
    /// Without the metrics as well.
    Uncounted,
}

/// What each writer does, again and again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// A user is assigned, and buys: two signals, in a call each.
    Sell,
    Add,
    Consume {
        limited: bool,
    },
}

struct World {
    metering: Metering,
    admin: Admin,
    client: Client,
    tenant: TenantId,
    experiment: ExperimentId,
    superuser: tokio_postgres::Client,
    signals: u64,
    _database: TestDatabase,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().collect();
    let asked_for = |flag: &str| args.iter().any(|arg| arg == flag);
    let quick = asked_for("--quick") || asked_for("--test");
    let rounds = args.iter().skip_while(|arg| *arg != "--rounds").nth(1);
    let rounds = if quick { 1 } else { rounds.map_or(Ok(15), |rounds| rounds.parse())? };
    let only = args.iter().skip_while(|arg| *arg != "--only").nth(1);
    for part in ["usage", "lock"].into_iter().filter(|part| only.is_none_or(|only| only == part)) {
        let report = match part {
            "lock" => lock::run(quick, rounds).await?,
            _ => usage(quick, rounds).await?,
        };
        match report {
            Some(report) if asked_for("--write") => results::write(part, &report)?,
            Some(report) => println!("{report}"),
            None => println!("{part}: all is counted, and no more"),
        }
    }
    Ok(())
}

/// The tables; `None` after a quick run, which only checks that all is counted.
async fn usage(quick: bool, rounds: usize) -> Result<Option<String>, Failure> {
    let calls = if quick { 5 } else { 60 };
    let cluster = cluster().await?;
    let mut worlds = Vec::new();
    for metering in [Metering::Metered, Metering::Unmetered, Metering::Uncounted] {
        worlds.push(World::new(&cluster, metering).await?);
    }
    let mut sold: [Vec<f64>; 3] = Default::default();
    let jobs = [Work::Add, Work::Consume { limited: false }, Work::Consume { limited: true }];
    let mut taken: [Vec<f64>; 3] = Default::default();
    // The first round is not counted: connections, statements and caches are new.
    for round in 0..=rounds {
        let mut times = [0.0; 3];
        for turn in 0..3 {
            let n = (turn + round) % 3;
            times[n] = worlds[n].turn(Work::Sell, calls, round).await?.as_secs_f64();
        }
        let mut taking = [0.0; 3];
        for turn in 0..3 {
            let n = (turn + round) % 3;
            taking[n] = worlds[0].turn(jobs[n], calls, round).await?.as_secs_f64();
        }
        for n in 0..3 {
            if round > 0 {
                sold[n].push(times[n]);
                taken[n].push(taking[n]);
            }
        }
    }
    if quick {
        return Ok(None);
    }
    let row = worlds[0].superuser.query_one("SHOW server_version", &[]).await?;
    let cores = std::thread::available_parallelism()?;
    Ok(Some(format!(
        "PostgreSQL {} (fsync on) on the same machine, {cores} cores, median of {rounds} rounds.\n{}",
        row.get::<_, &str>(0),
        tables(&sold, &taken, calls)
    )))
}

fn tables(sold: &[Vec<f64>; 3], taken: &[Vec<f64>; 3], calls: usize) -> String {
    let each = (WRITERS * calls) as f64;
    let mut text = "\n### Metering: eight writers on one tenant\n\n\
        | | assignments and sales/s | metered / this |\n|---|--:|--:|\n"
        .to_owned();
    let names = ["metered", "unmetered: metrics only", "without metrics"];
    for (name, times) in names.iter().zip(sold) {
        text += &format!("| {name} | {:.0} | {:.2} |\n", 2.0 * each / median(times), ratio(times, &sold[0]));
    }
    let metered = ratio(&sold[1], &sold[0]);
    let missed = if metered >= 0.9 { "" } else { " (missed)" };
    text += &format!(
        "\n| ratio | target | measured |\n|---|--:|--:|\n| metered / unmetered | ≥ 0.9 | {metered:.2}{missed} |\n"
    );
    text += "\n### Quotas: eight writers on one metric of one tenant\n\n| | calls/s | of `add` |\n|---|--:|--:|\n";
    let names = ["`add`", "`try_consume`, unlimited", "`try_consume`, limited"];
    for (name, times) in names.iter().zip(taken) {
        text += &format!("| {name} | {:.0} | {:.2} |\n", each / median(times), ratio(&taken[0], times));
    }
    text
}

async fn cluster() -> Result<PrivateCluster, Failure> {
    Ok(PrivateCluster::builder()
        .tcp()
        .setting("fsync", "on")
        .setting("full_page_writes", "on")
        // Done here, between turns; else it falls on whoever is at his turn.
        .setting("autovacuum", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "4GB")
        .start()
        .await?)
}

impl World {
    async fn new(cluster: &PrivateCluster, metering: Metering) -> Result<Self, Failure> {
        let database = cluster.database().await?;
        let superuser = database.connect_superuser().await?;
        if metering != Metering::Metered {
            superuser.batch_execute(UNMETERED).await?;
        }
        if metering == Metering::Uncounted {
            superuser.batch_execute(UNCOUNTED).await?;
        }
        let client =
            Client::builder().url(database.app_url()).pool_size(WRITERS).require_app_role().build()?;
        let new = NewTenant::managed("T", "t@example.com").plan(Plan::Enterprise);
        let tenant = client.create_tenant(new).await?.id;
        let variants = Variants::new().add("19", 1, "19").add("29", 1, "29");
        let new = NewExperiment::new("x", "X", Currency::USD, variants);
        let experiments = client.tenant(tenant);
        let experiment = experiments.experiments().create(new).await?.id;
        experiments.experiments().activate(experiment).await?;
        let admin = Admin::connect(&database.owner_url()).await?;
        admin.limits().set_tenant(tenant, "limited", LimitPeriod::Month, Some(1_000_000_000)).await?;
        Ok(World { metering, admin, client, tenant, experiment, superuser, signals: 0, _database: database })
    }

    /// How long the writers take. What they did is looked at, and tidied up, after that.
    async fn turn(&mut self, work: Work, calls: usize, round: usize) -> Result<Duration, Failure> {
        let started = Instant::now();
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let (client, tenant, experiment) = (self.client.clone(), self.tenant, self.experiment);
            writers.spawn(async move {
                for n in 0..calls {
                    call(&client, tenant, experiment, work, &format!("{round}-{writer}-{n}")).await?;
                }
                Ok::<(), Failure>(())
            });
        }
        while let Some(writer) = writers.join_next().await {
            writer??;
        }
        let time = started.elapsed();
        if work == Work::Sell {
            self.signals += 2 * (WRITERS * calls) as u64;
            let today = Utc::now().date_naive();
            let yesterday = today.pred_opt().ok_or("there is no yesterday")?;
            let counted = self.client.tenant(self.tenant).usage().total("signals", yesterday, today).await?;
            if self.metering == Metering::Metered && counted != self.signals {
                return Err(format!("{counted} signals, of {}", self.signals).into());
            }
        }
        self.admin.refresh_metrics().await?;
        self.superuser.batch_execute("VACUUM ANALYZE").await?;
        Ok(time)
    }
}

async fn call(
    client: &Client,
    tenant: TenantId,
    experiment: ExperimentId,
    work: Work,
    name: &str,
) -> Result<(), Failure> {
    let tenant = client.tenant(tenant);
    let key = IdempotencyKey::new(format!("{work_name}-{name}", work_name = of(work)))?;
    match work {
        Work::Sell => {
            let user = UserId::new(name)?;
            tenant.assignments().assign(experiment, &user).await?;
            let sale = NewConversion::sale(experiment, user, Money::new("19", "USD")?, key);
            let _ = tenant.conversions().settle(&sale.order(OrderId::new(name)?)).await?;
        }
        Work::Add => {
            let _ = tenant.usage().add(&NewUsage::new("added", Utc::now().date_naive(), 1, key)).await?;
        }
        Work::Consume { .. } => match tenant.usage().try_consume(of(work), 1, &key).await? {
            ConsumeOutcome::Consumed(quota) if quota.limit.is_none_or(|limit| quota.used <= limit) => {}
            other => return Err(format!("{other:?}").into()),
        },
    }
    Ok(())
}

fn of(work: Work) -> &'static str {
    match work {
        Work::Sell => "sold",
        Work::Add => "added",
        Work::Consume { limited: true } => "limited",
        Work::Consume { limited: false } => "unlimited",
    }
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

const UNMETERED: &str = "
    DROP INDEX metric_totals_day_idx;
    DROP TRIGGER usage_stays ON experiments;
    CREATE OR REPLACE FUNCTION fold_usage(only_tenant uuid) RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint'";
const UNCOUNTED: &str = "
    DROP TRIGGER metrics_added ON assignments;
    DROP TRIGGER metrics_added ON conversions";
