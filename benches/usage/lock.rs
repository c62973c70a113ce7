//! What it costs a sale to lock its quote: two clients of one database, to which a proxy brings the statement of the second one
//! without the lock.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lastprice::{
    Client, ConversionOutcome, Currency, ExperimentId, IdempotencyKey, Money, NewConversion, NewExperiment,
    NewTenant, Plan, TenantId, UserId, Variants,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};

use crate::{Failure, WRITERS, cluster, median};

/// As the statement `conversions.open` has it.
const LOCK: &[u8] = b" FOR KEY SHARE";
const BATCH: usize = 100;
/// Short turns, and many: load that comes and goes hits both.
const TURNS_OF_A_ROUND: usize = 8;
const NAMES: [&str; 2] = ["with the lock", "without"];

/// Who sells, and how much in a call.
#[derive(Clone, Copy)]
struct Work {
    writers: usize,
    batch: usize,
}

const WORKS: [(&str, Work); 4] = [
    ("a sale, one writer", Work { writers: 1, batch: 1 }),
    ("a sale, eight writers", Work { writers: WRITERS, batch: 1 }),
    ("a batch of 100, one writer", Work { writers: 1, batch: BATCH }),
    ("a batch of 100, eight writers", Work { writers: WRITERS, batch: BATCH }),
];

/// The tables; `None` after a quick run, which only checks that all is sold.
pub(crate) async fn run(quick: bool, rounds: usize) -> Result<Option<String>, Failure> {
    let (singles, batches) = if quick { (8, 8) } else { (64, 8) };
    let each_round: usize =
        WORKS.iter().map(|(_, w)| if w.batch == 1 { singles } else { batches * BATCH }).sum();
    let rounds = if quick { 1 } else { rounds * TURNS_OF_A_ROUND };
    // Of each sale by itself, so that the median has no split of an index page in it.
    let probes = if quick { [5, 1] } else { [400, 101] };
    let users = 2 * ((rounds + 1) * each_round + probes[0] + probes[1]);

    let mut world = World::new(&cluster().await?, users).await?;
    let mut times: [[Vec<f64>; 2]; WORKS.len()] = Default::default();
    // The first round is not counted: connections, statements and caches are new.
    for round in 0..=rounds {
        for (n, (_, work)) in WORKS.iter().enumerate() {
            let calls = if work.batch == 1 { singles } else { batches };
            for turn in 0..2 {
                let who = (turn + round + n) % 2;
                let time = world.sell(who, *work, calls).await?.as_secs_f64();
                if round > 0 {
                    times[n][who].push(time / calls as f64);
                }
            }
        }
    }
    let mut wal: [[Vec<f64>; 2]; 2] = Default::default();
    for (n, wal) in wal.iter_mut().enumerate() {
        for turn in 0..2 * probes[n] {
            if n == 1 {
                world.superuser.batch_execute("CHECKPOINT").await?;
            }
            wal[turn % 2].push(world.wal(turn % 2).await?);
        }
    }
    world.check().await?;
    if quick {
        return Ok(None);
    }
    let version = world.superuser.query_one("SHOW server_version", &[]).await?;
    let cores = thread::available_parallelism()?;
    let mut text = format!(
        "PostgreSQL {} (fsync on) on the same machine, {cores} cores, median of {rounds} turns.\n\n\
         | a call | {} | {} | ratio | its quartiles |\n|---|--:|--:|--:|--:|\n",
        version.get::<_, &str>(0),
        NAMES[0],
        NAMES[1],
    );
    for ((name, _), [with, without]) in WORKS.iter().zip(&times) {
        let (a, b) = (median(with) * 1e3, median(without) * 1e3);
        let mut ratios: Vec<f64> = with.iter().zip(without).map(|(with, without)| with / without).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let [low, mid, high] = [1, 2, 3].map(|n| ratios[ratios.len() * n / 4]);
        text += &format!("| {name} | {a:.2} ms | {b:.2} ms | {mid:.3} | {low:.3} to {high:.3} |\n");
    }
    text += &format!("\n| WAL of a sale | {} | {} | difference |\n|---|--:|--:|--:|\n", NAMES[0], NAMES[1]);
    for (n, name) in
        ["its pages written since the checkpoint", "the first since the checkpoint"].iter().enumerate()
    {
        let [with, without] = wal[n].each_ref().map(|sales| median(sales));
        let more = with - without;
        text += &format!("| {name} | {with:.0} bytes | {without:.0} bytes | {more:.0} bytes |\n");
    }
    Ok(Some(text))
}

struct World {
    /// Of who locks, and of who does not.
    proxies: [Proxy; 2],
    clients: [Client; 2],
    tenant: TenantId,
    experiment: ExperimentId,
    superuser: tokio_postgres::Client,
    users: usize,
    sold: usize,
    _database: TestDatabase,
}

impl World {
    async fn new(cluster: &PrivateCluster, users: usize) -> Result<Self, Failure> {
        let database = cluster.database().await?;
        let superuser = database.connect_superuser().await?;
        let proxies = [Proxy::before(cluster.port(), true)?, Proxy::before(cluster.port(), false)?];
        let client = |proxy: &Proxy| {
            let (direct, via) = (format!(":{}/", cluster.port()), format!(":{}/", proxy.port));
            let builder = Client::builder().url(database.app_url().replace(&direct, &via));
            builder.pool_size(WRITERS).require_app_role().build()
        };
        let clients = [client(&proxies[0])?, client(&proxies[1])?];
        let client = &clients[0];
        let new = NewTenant::managed("T", "t@example.com").plan(Plan::Enterprise);
        let tenant = client.create_tenant(new).await?.id;
        let scope = client.tenant(tenant);
        let variants = Variants::new().add("19", 1, "19").add("29", 1, "29");
        let experiment =
            scope.experiments().create(NewExperiment::new("x", "X", Currency::USD, variants)).await?.id;
        scope.experiments().activate(experiment).await?;
        superuser.execute(QUOTES, &[&tenant.uuid(), &experiment.uuid(), &(users as i32)]).await?;
        // Locked once, so that each page is in the WAL as a whole already.
        superuser.batch_execute("VACUUM ANALYZE").await?;
        superuser.batch_execute("CHECKPOINT").await?;
        superuser.query_one("SELECT count(*) FROM (SELECT FROM assignments FOR KEY SHARE) a", &[]).await?;
        Ok(World { proxies, clients, tenant, experiment, superuser, users, sold: 0, _database: database })
    }

    /// How long so many calls take; each sale is to somebody else.
    async fn sell(&mut self, who: usize, work: Work, calls: usize) -> Result<Duration, Failure> {
        let sales: Vec<_> = (0..calls * work.batch).map(|_| self.sale()).collect::<Result<_, _>>()?;
        let started = Instant::now();
        let mut writers = tokio::task::JoinSet::new();
        for lot in sales.chunks(sales.len() / work.writers) {
            let (client, tenant, lot) = (self.clients[who].clone(), self.tenant, lot.to_vec());
            writers.spawn(async move {
                let scope = client.tenant(tenant);
                for call in lot.chunks(work.batch) {
                    let outcomes = match call {
                        [sale] => vec![scope.conversions().settle(sale).await?],
                        batch => scope.conversions().settle_many(batch).await?,
                    };
                    if !outcomes.iter().all(|outcome| matches!(outcome, ConversionOutcome::Recorded(_))) {
                        return Err(format!("{outcomes:?}").into());
                    }
                }
                Ok::<(), Failure>(())
            });
        }
        while let Some(writer) = writers.join_next().await {
            writer??;
        }
        Ok(started.elapsed())
    }

    /// To users in no order, as quotes lie on pages.
    fn sale(&mut self) -> Result<NewConversion, Failure> {
        let user = UserId::new(format!("user-{}", self.sold * 7919 % self.users))?;
        let key = IdempotencyKey::new(format!("charge-{}", self.sold))?;
        self.sold += 1;
        Ok(NewConversion::sale(self.experiment, user, Money::new("19", "USD")?, key))
    }

    /// Bytes that a sale writes ahead.
    async fn wal(&mut self, who: usize) -> Result<f64, Failure> {
        let at = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
        let before: f64 = self.superuser.query_one(at, &[]).await?.get(0);
        self.sell(who, WORKS[0].1, 1).await?;
        let after: f64 = self.superuser.query_one(at, &[]).await?.get(0);
        Ok(after - before)
    }

    /// All is sold, once to each user, and no statement came past its proxy.
    async fn check(&self) -> Result<(), Failure> {
        let row = self
            .superuser
            .query_one("SELECT count(*), count(DISTINCT user_id) FROM conversions", &[])
            .await?;
        let (sold, users) = (row.get::<_, i64>(0) as usize, row.get::<_, i64>(1) as usize);
        if sold != self.sold || users != sold {
            return Err(format!("{sold} sales to {users} users, of {}", self.sold).into());
        }
        for proxy in &self.proxies {
            let statements = proxy.statements.load(Ordering::Relaxed);
            if statements < WRITERS {
                return Err(format!("{statements} statements on {WRITERS} connections").into());
            }
        }
        Ok(())
    }
}

/// Brings each side what the other one says, but for the lock, which it may leave out.
struct Proxy {
    port: u16,
    /// With a lock, as the client sends them.
    statements: Arc<AtomicUsize>,
}

impl Proxy {
    fn before(server: u16, locks: bool) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let statements = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&statements);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if let Ok(server) = TcpStream::connect(("127.0.0.1", server)) {
                    drop(forward(client, server, locks, &seen));
                }
            }
        });
        Ok(Proxy { port, statements })
    }
}

fn forward(
    mut client: TcpStream,
    mut server: TcpStream,
    locks: bool,
    statements: &Arc<AtomicUsize>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
    // The system brings the bytes from the one to the other by itself.
    thread::spawn(move || io::copy(&mut from_server, &mut to_client));
    let statements = Arc::clone(statements);
    thread::spawn(move || {
        let mut buffer = vec![0; 1024 * 1024];
        loop {
            let read = client.read(&mut buffer)?;
            let bytes = &mut buffer[..read];
            let found = bytes.windows(LOCK.len()).position(|words| words == LOCK);
            if let Some(at) = found.filter(|_| !locks) {
                // As long as it was: the message says how long it is.
                bytes[at..at + LOCK.len()].fill(b' ');
            }
            server.write_all(bytes)?;
            if read == 0 {
                return server.shutdown(std::net::Shutdown::Both);
            }
            if found.is_some() {
                // A statement is sent once on each connection.
                statements.fetch_add(1, Ordering::Relaxed);
                return io::copy(&mut client, &mut server).map(drop);
            }
        }
    });
    Ok(())
}

const QUOTES: &str = "
    INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency)
    SELECT $1, $2, 'user-' || n, '19', 19, 'USD' FROM generate_series(0, $3 - 1) n";
