//! How many round trips a call costs, and what that means 4 ms away from the server; side by side with peers.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench round_trips              counts and times
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench round_trips -- --quick   counts only
//! ```
//!
//! Round trips are exact, so they are asserted: exit code 1 if a call needs more than it promises. Times are printed.

mod proxy;

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use lastprice::chrono::{NaiveDate, Utc};
use lastprice::{
    Client, ConversionOutcome, Currency, ExperimentId, IdempotencyKey, Money, NewConversion, NewExperiment,
    NewTenant, NewUsage, NewView, StatementMode, TenantHandle, TenantId, UsageOutcome, UserId, Variants,
    ViewOutcome,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use proxy::{Proxy, Traffic};
use sqlx::{Connection as _, Row as _};
use tokio::sync::Mutex;
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;
type Op = Box<dyn FnMut() -> Pin<Box<dyn Future<Output = Result<Duration, Failure>>>>>;

const ONE_WAY: Duration = Duration::from_millis(2);
/// Enough for every statement to be prepared and to have got its generic plan.
const WARM_UP: u32 = 10;

// On one thread, so that nobody but the server and the proxy can come between a call and its clock.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Failure> {
    let quick = std::env::args().any(|arg| arg == "--quick" || arg == "--test");
    let (rounds, delay) = if quick { (5, Duration::ZERO) } else { (300, ONE_WAY) };

    let world = World::new().await?;
    let mut bench = Bench { world: &world, scenarios: Vec::new() };
    bench.baseline().await?;
    bench.ours().await?;
    bench.within().await?;
    bench.peers().await?;
    let mut scenarios = bench.scenarios;

    for scenario in &mut scenarios {
        for _ in 0..WARM_UP {
            (scenario.op)().await.map_err(|e| format!("{}: {e}", scenario.name))?;
        }
    }
    // What peers do behind the call's back is counted as well, but it belongs to the warm-up here.
    tokio::time::sleep(Duration::from_millis(100)).await;
    for scenario in &mut scenarios {
        scenario.proxy.set_delay(delay);
        scenario.before = scenario.proxy.traffic();
    }
    for _ in 0..rounds {
        for scenario in &mut scenarios {
            let time = (scenario.op)().await.map_err(|e| format!("{}: {e}", scenario.name))?;
            scenario.times.push(time);
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;

    println!("{}\n", world.describe().await?);
    let kept = report(&mut scenarios, quick);
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A server, a tenant, and two experiments: one that is written to, and one whose numbers are read.
struct World {
    cluster: PrivateCluster,
    database: TestDatabase,
    tenant: TenantId,
    experiment: ExperimentId,
    quiet: ExperimentId,
    user: UserId,
    next: Rc<Cell<u64>>,
}

impl World {
    async fn new() -> Result<Self, Failure> {
        let cluster = PrivateCluster::builder().tcp().start().await?;
        let database = cluster.database().await?;
        let client = Client::builder().url(database.app_url()).build()?;
        let tenant = client.create_tenant(NewTenant::managed("Acme", "acme@example.com")).await?.id;
        let scope = client.tenant(tenant);
        let user = UserId::new("user-42")?;
        let mut experiments = Vec::new();
        for key in ["busy", "quiet"] {
            let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00").add("39", 1, "39.00");
            let new = NewExperiment::new(key, "Price of the Pro plan", Currency::USD, variants);
            let id = scope.experiments().create(new).await?.id;
            scope.experiments().activate(id).await?;
            scope.assignments().assign(id, &user).await?;
            scope.views().record(&NewView::new(id, user.clone())).await?;
            experiments.push(id);
        }
        scope.metrics().fold().await?;
        database.connect_owner().await?.batch_execute("ANALYZE").await?;
        let (experiment, quiet) = (experiments[0], experiments[1]);
        Ok(World { cluster, database, tenant, experiment, quiet, user, next: Rc::default() })
    }

    /// A proxy, and the address behind it.
    fn proxied(&self, url: &str) -> Result<(Proxy, String), Failure> {
        let proxy = Proxy::before(self.cluster.port())?;
        let (direct, via) = (format!(":{}/", self.cluster.port()), format!(":{}/", proxy.port()));
        Ok((proxy, url.replace(&direct, &via)))
    }

    fn new_view(&self) -> impl Fn() -> NewView + use<> {
        let (experiment, user) = (self.experiment, self.user.clone());
        move || NewView::new(experiment, user.clone())
    }

    /// A number that was not used before.
    fn fresh(&self) -> impl Fn() -> u64 + use<> {
        let next = Rc::clone(&self.next);
        move || next.replace(next.get() + 1)
    }

    async fn describe(&self) -> Result<String, Failure> {
        let server = self.database.connect_superuser().await?;
        let row = server
            .query_one("SELECT current_setting('server_version'), current_setting('fsync')", &[])
            .await?;
        let (version, fsync): (&str, &str) = (row.get(0), row.get(1));
        let cores = std::thread::available_parallelism()?;
        let locked = |name| locked_version(name).unwrap_or("?");
        Ok(format!(
            "PostgreSQL {version} (fsync {fsync}) on the same machine, {cores} cores; tokio-postgres {}, sqlx {}",
            locked("tokio-postgres"),
            locked("sqlx"),
        ))
    }
}

fn locked_version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = include_str!("peers/Cargo.lock").split_once(&package)?;
    Some(rest.split_once('"')?.0)
}

struct Scenario {
    name: String,
    /// Round trips that a call may cost.
    bound: Option<u64>,
    /// Round trips of each run that are not the call's: the host's own BEGIN and COMMIT.
    frame: u64,
    proxy: Proxy,
    op: Op,
    before: Traffic,
    times: Vec<Duration>,
}

struct Bench<'w> {
    world: &'w World,
    scenarios: Vec<Scenario>,
}

impl Bench<'_> {
    fn add<F>(
        &mut self,
        name: &str,
        proxy: Proxy,
        promise: (Option<u64>, u64),
        mut op: impl FnMut() -> F + 'static,
    ) where
        F: Future<Output = Result<Duration, Failure>> + 'static,
    {
        let before = proxy.traffic();
        let op: Op = Box::new(move || Box::pin(op()));
        let (bound, frame) = promise;
        self.scenarios.push(Scenario {
            name: name.to_owned(),
            bound,
            frame,
            proxy,
            op,
            before,
            times: Vec::new(),
        });
    }

    /// A call of ours on a client of its own, with one connection.
    fn add_ours<F>(
        &mut self,
        name: &str,
        login: Login,
        bound: u64,
        op: impl Fn(Rc<TenantHandle>) -> F + 'static,
    ) -> Result<(), Failure>
    where
        F: Future<Output = Result<(), Failure>> + 'static,
    {
        let database = &self.world.database;
        let url = if login.is_owner { database.owner_url() } else { database.app_url() };
        let (proxy, url) = self.world.proxied(&url)?;
        let builder = Client::builder().url(url).pool_size(1).statement_mode(login.mode);
        let builder = if login.is_owner { builder } else { builder.require_app_role() };
        let tenant = Rc::new(builder.build()?.tenant(self.world.tenant));
        let name = format!("{name}{}", login.label);
        self.add(&name, proxy, (Some(bound), 0), move || timed(op(Rc::clone(&tenant))));
        Ok(())
    }

    async fn baseline(&mut self) -> Result<(), Failure> {
        let (proxy, url) = self.world.proxied(&self.world.database.app_url())?;
        let client = Rc::new(connect(&url).await?);
        let select = client.prepare("SELECT 1").await?;
        self.add("`SELECT 1`, prepared", proxy, (Some(1), 0), move || {
            let (client, select) = (Rc::clone(&client), select.clone());
            timed(async move { done(client.query_one(&select, &[]).await?.get::<_, i32>(0) == 1) })
        });
        Ok(())
    }

    async fn ours(&mut self) -> Result<(), Failure> {
        for login in LOGINS {
            let (experiment, quiet) = (self.world.experiment, self.world.quiet);
            let (view, fresh, user) = (self.world.new_view(), self.world.fresh(), self.world.user.clone());

            self.add_ours("read: `experiments().get`", login, 1, move |tenant| async move {
                done(tenant.experiments().get(experiment).await?.is_some())
            })?;
            self.add_ours("read: `metrics().by_variant`", login, 1, move |tenant| async move {
                done(tenant.metrics().by_variant(quiet).await?.len() == 3)
            })?;
            let known = user.clone();
            self.add_ours("read: `assignments().assign`, known user", login, 1, move |tenant| {
                let user = known.clone();
                async move { done(!tenant.assignments().assign(experiment, &user).await?.is_new()) }
            })?;
            let number = self.world.fresh();
            self.add_ours("read + write: `assignments().assign`, new user", login, 2, move |tenant| {
                let user = UserId::new(format!("new-{}", number()));
                async move { done(tenant.assignments().assign(experiment, &user?).await?.is_new()) }
            })?;
            let one = self.world.new_view();
            self.add_ours("write: `views().record`", login, 1, move |tenant| {
                let view = one();
                async move { done(tenant.views().record(&view).await? == ViewOutcome::Recorded) }
            })?;
            let (buyer, number) = (user.clone(), self.world.fresh());
            self.add_ours("write: `conversions().settle`", login, 1, move |tenant| {
                let sale = sale(experiment, &buyer, number());
                async move { done(is_recorded(&tenant.conversions().settle(&sale?).await?)) }
            })?;
            let (number, today) = (self.world.fresh(), Utc::now().date_naive());
            self.add_ours("write: `usage().add`", login, 1, move |tenant| {
                let usage = usage(today, number());
                async move { done(tenant.usage().add(&usage?).await? == UsageOutcome::Added) }
            })?;
            self.add_ours("transaction: 3 statements and a commit", login, 4, move |tenant| {
                let (view, sale, usage) = (view(), sale(experiment, &user, fresh()), usage(today, fresh()));
                async move {
                    let transaction = tenant.begin().await?;
                    done(transaction.views().record(&view).await? == ViewOutcome::Recorded)?;
                    done(is_recorded(&transaction.conversions().settle(&sale?).await?))?;
                    done(transaction.usage().add(&usage?).await? == UsageOutcome::Added)?;
                    Ok(transaction.commit().await?)
                }
            })?;
        }
        Ok(())
    }

    /// In a transaction that the host has begun and commits; the time is that of our statement alone.
    async fn within(&mut self) -> Result<(), Failure> {
        let (tenant, experiment) = (self.world.tenant, self.world.experiment);
        let database = &self.world.database;
        for (label, url) in [("", database.app_url()), (", as the owner", database.owner_url())] {
            let (proxy, via) = self.world.proxied(&url)?;
            let host = Rc::new(Mutex::new(connect(&via).await?));
            self.add(&format!("within: `experiments().get`{label}"), proxy, (Some(1), 2), move || {
                let host = Rc::clone(&host);
                async move {
                    let mut host = host.lock().await;
                    let transaction = host.transaction().await?;
                    let scope = lastprice::TenantScope::within(&transaction, tenant);
                    let time =
                        timed(async { done(scope.experiments().get(experiment).await?.is_some()) }).await?;
                    transaction.commit().await?;
                    Ok(time)
                }
            });
            let (proxy, via) = self.world.proxied(&url)?;
            let host = Rc::new(Mutex::new(connect(&via).await?));
            let view = self.world.new_view();
            self.add(&format!("within: `views().record`{label}"), proxy, (Some(1), 2), move || {
                let (host, view) = (Rc::clone(&host), view());
                async move {
                    let mut host = host.lock().await;
                    let transaction = host.transaction().await?;
                    let scope = lastprice::TenantScope::within(&transaction, tenant);
                    let record = async { done(scope.views().record(&view).await? == ViewOutcome::Recorded) };
                    let time = timed(record).await?;
                    transaction.commit().await?;
                    Ok(time)
                }
            });
        }
        Ok(())
    }

    /// What `views().record` does, as one writes it with others.
    async fn peers(&mut self) -> Result<(), Failure> {
        let (tenant, experiment) = (self.world.tenant.uuid(), self.world.experiment.uuid());
        let user = self.world.user.as_str().to_owned();
        let app = self.world.database.app_url();

        let (proxy, url) = self.world.proxied(&app)?;
        let client = connect(&url).await?;
        let statements = (client.prepare(BIND).await?, client.prepare(RECORD).await?);
        let state = Rc::new((Mutex::new(client), statements, user.clone()));
        self.add("tokio-postgres: the same write, sequential", proxy, (None, 0), move || {
            let state = Rc::clone(&state);
            timed(async move {
                let (client, (bind, record), user) = &*state;
                let mut client = client.lock().await;
                let transaction = client.transaction().await?;
                transaction.query_one(bind, &[&tenant.to_string()]).await?;
                transaction.query_one(record, &[&tenant, &experiment, user, &Uuid::new_v4()]).await?;
                Ok(transaction.commit().await?)
            })
        });

        // What the server needs for the row, its triggers and its commit: no tenant bound, no policy, one message.
        let (proxy, url) = self.world.proxied(&self.world.database.owner_url())?;
        let client = connect(&url).await?;
        let state = Rc::new((client.prepare(RECORD).await?, client, user.clone()));
        self.add(
            "tokio-postgres: the same write, bare, as the owner, unprotected",
            proxy,
            (None, 0),
            move || {
                let state = Rc::clone(&state);
                timed(async move {
                    let (record, client, user) = &*state;
                    client.query_one(record, &[&tenant, &experiment, user, &Uuid::new_v4()]).await?;
                    Ok(())
                })
            },
        );

        let (proxy, url) = self.world.proxied(&app)?;
        let connection = sqlx::PgConnection::connect(&url).await?;
        let state = Rc::new((Mutex::new(connection), user.clone()));
        self.add("sqlx: the same write, one bare connection", proxy, (None, 0), move || {
            let state = Rc::clone(&state);
            timed(async move {
                let mut connection = state.0.lock().await;
                with_sqlx(connection.begin().await?, tenant, experiment, &state.1).await
            })
        });

        let (proxy, url) = self.world.proxied(&app)?;
        let pool = sqlx::PgPool::connect(&url).await?;
        self.add("sqlx: the same write, its pool with its defaults", proxy, (None, 0), move || {
            let (pool, user) = (pool.clone(), user.clone());
            timed(async move { with_sqlx(pool.begin().await?, tenant, experiment, &user).await })
        });
        Ok(())
    }
}

/// Who the client logs in as, and how it sends statements.
#[derive(Clone, Copy)]
struct Login {
    label: &'static str,
    is_owner: bool,
    mode: StatementMode,
}

const LOGINS: [Login; 3] = [
    Login { label: "", is_owner: false, mode: StatementMode::Prepared },
    Login { label: ", `Typed`", is_owner: false, mode: StatementMode::Typed },
    Login { label: ", as the owner", is_owner: true, mode: StatementMode::Prepared },
];

const BIND: &str = "SELECT set_config('app.tenant_id', $1, true)";
const RECORD: &str = "
    INSERT INTO views (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata)
    SELECT a.tenant_id, $4, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, now(), '{}'
    FROM assignments a WHERE a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id = $3
    ON CONFLICT DO NOTHING RETURNING id";

async fn with_sqlx(
    mut transaction: sqlx::Transaction<'_, sqlx::Postgres>,
    tenant: Uuid,
    experiment: Uuid,
    user: &str,
) -> Result<(), Failure> {
    sqlx::query(BIND).bind(tenant.to_string()).execute(&mut *transaction).await?;
    let record = sqlx::query(RECORD).bind(tenant).bind(experiment).bind(user).bind(Uuid::new_v4());
    let _: Uuid = record.fetch_one(&mut *transaction).await?.try_get(0)?;
    Ok(transaction.commit().await?)
}

fn sale(experiment: ExperimentId, user: &UserId, number: u64) -> lastprice::Result<NewConversion> {
    let key = IdempotencyKey::new(format!("charge:{number}"))?;
    Ok(NewConversion::sale(experiment, user.clone(), Money::from_minor(2900, Currency::USD), key))
}

fn usage(day: NaiveDate, number: u64) -> lastprice::Result<NewUsage> {
    Ok(NewUsage::new("api_calls", day, 120, IdempotencyKey::new(format!("batch:{number}"))?))
}

async fn connect(url: &str) -> Result<tokio_postgres::Client, Failure> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A call that did something else than it is measured for fails the run.
fn done(as_expected: bool) -> Result<(), Failure> {
    if as_expected { Ok(()) } else { Err("it did something else".into()) }
}

fn is_recorded(sale: &ConversionOutcome) -> bool {
    matches!(sale, ConversionOutcome::Recorded(_))
}

async fn timed(call: impl Future<Output = Result<(), Failure>>) -> Result<Duration, Failure> {
    let started = Instant::now();
    call.await?;
    Ok(started.elapsed())
}

/// Prints the table; whether every promise was kept.
fn report(scenarios: &mut [Scenario], quick: bool) -> bool {
    println!(
        "| call | round trips | packets sent, received | bytes sent, received | p50 | of `SELECT 1` |\n|---|--:|--:|--:|--:|--:|"
    );
    let mut baseline = None;
    let mut broken = Vec::new();
    for s in scenarios {
        let calls = s.times.len() as u64;
        let now = s.proxy.traffic();
        let each = |now: u64, before: u64| (now - before) as f64 / calls as f64;
        let turns = each(now.turns, s.before.turns) - s.frame as f64;
        s.times.sort_unstable();
        let p50 = s.times[s.times.len() / 2].as_secs_f64() * 1e3;
        let ratio = p50 / *baseline.get_or_insert(p50);
        let times = if quick { "| ".to_owned() } else { format!("{p50:.2} ms | {ratio:.3}") };
        println!(
            "| {} | {turns:.2} | {:.1}, {:.1} | {:.0}, {:.0} | {times} |",
            s.name,
            each(now.packets_sent, s.before.packets_sent),
            each(now.packets_received, s.before.packets_received),
            each(now.bytes_sent, s.before.bytes_sent),
            each(now.bytes_received, s.before.bytes_received),
        );
        if let Some(bound) = s.bound.filter(|bound| turns > *bound as f64) {
            broken.push(format!("{}: {turns:.2} round trips instead of {bound}", s.name));
        }
    }
    for promise in &broken {
        eprintln!("BROKEN: {promise}");
    }
    broken.is_empty()
}
