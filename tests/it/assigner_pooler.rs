//! Assigners whose notifications do not arrive, or stop arriving: poolers, a standby, connections that end, a network
//! that says nothing.

use std::path::Path;
use std::time::Duration;

use lastprice::{
    Assigner, Client, ClientBuilder, ErrorKind, ExperimentId, NewTenant, Reason, StatementMode, TenantHandle,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::time::timeout;

use crate::support_pooler::{Pooler, beside, pgbouncer};
use crate::support_proxy::Network;
use crate::support_repo::{active, eventually, user};

/// Far more than anything here takes, far less than a hang.
const SOON: Duration = Duration::from_secs(30);
const BEAT: Duration = Duration::from_millis(200);
/// The name that the server knows the connections under test by.
const APPLICATION: &str = "the assigners";

/// A tenant with an active experiment, by a connection that has nothing to do with the assigner.
struct Side {
    tenant: TenantHandle,
    experiment: ExperimentId,
}

/// The tenant whose experiment changes, and the one who must not notice.
async fn two_sides(direct: &Client) -> [Side; 2] {
    let side = async |name: &str| {
        let new = NewTenant::managed(name, format!("ops@{name}.example"));
        let tenant = direct.tenant(direct.create_tenant(new).await.unwrap().id);
        let experiment = active(&tenant, "pro-plan").await.id;
        Side { tenant, experiment }
    };
    [side("acme").await, side("globex").await]
}

impl Side {
    async fn pause(&self) {
        self.tenant.experiments().pause(self.experiment).await.unwrap();
    }

    async fn resume(&self) {
        self.tenant.experiments().resume(self.experiment).await.unwrap();
    }
}

async fn assigners(client: &Client, [acme, globex]: &[Side; 2]) -> [Assigner; 2] {
    let open = async |side: &Side| client.assigner(side.tenant.tenant_id()).await.unwrap();
    [open(acme).await, open(globex).await]
}

/// The client under test: an ordinary role, and so few connections that none can be left on a dead one.
fn client(url: &str) -> ClientBuilder {
    Client::builder()
        .url(url)
        .pool_size(4)
        .poll_interval(BEAT)
        .application_name(APPLICATION)
        .require_app_role()
}

fn direct(url: &str) -> Client {
    Client::builder().url(url).pool_size(1).require_app_role().build().unwrap()
}

fn reason(assigner: &Assigner) -> Reason {
    assigner.assign("pro-plan", &user(1)).unwrap().reason()
}

async fn sees(assigner: &Assigner, expected: Reason) {
    eventually("the change is seen", async || reason(assigner) == expected).await;
}

async fn listens(assigner: &Assigner, expected: bool) {
    eventually("is_listening", async || assigner.status().is_listening == expected).await;
}

/// Nothing of this arrives by a notification; it is known to be current by polling.
async fn is_only_polled(assigner: &Assigner) {
    let (mut polls, mut before) = (0, Duration::ZERO);
    eventually("several polls", async || {
        let status = assigner.status();
        assert!(!status.is_listening, "it believes in notifications that do not arrive");
        polls += usize::from(status.age < before);
        before = status.age;
        polls == 6
    })
    .await;
}

/// A pooler in front of a database of its own server, and two tenants there.
struct Pooled {
    pooler: Pooler,
    sides: [Side; 2],
}

impl Pooled {
    async fn start(pgbouncer: &Path, mode: &str, pool_size: usize) -> Pooled {
        let pooler = Pooler::start(pgbouncer, mode, pool_size).await;
        let sides = two_sides(&direct(&pooler.database.app_url())).await;
        Pooled { pooler, sides }
    }
}

#[tokio::test]
async fn behind_a_pooler_in_transaction_mode_it_polls() {
    let Some(pgbouncer) = pgbouncer() else { return };
    for pool_size in [1, 4] {
        let pooled = Pooled::start(&pgbouncer, "transaction", pool_size).await;
        let client = client(&pooled.pooler.url()).statement_mode(StatementMode::Typed).build().unwrap();
        let [acme, globex] = assigners(&client, &pooled.sides).await;
        is_only_polled(&acme).await;
        if pool_size == 1 {
            // The one connection that all share does listen: probes come back, but to whoever sent them.
            let channels = listening_channels(&pooled.pooler.url()).await;
            assert_eq!(channels, ["lastprice"]);
        }

        let before = globex.version();
        pooled.sides[0].pause().await;
        sees(&acme, Reason::Paused).await;
        is_only_polled(&acme).await;
        assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
        assert!(globex.status().age < SOON && !globex.status().is_listening);
        pooled.sides[0].resume().await;
        sees(&acme, Reason::Randomised).await;
        // It writes through the pooler, too.
        let (shown, stored) =
            (acme.assign("pro-plan", &user(1)).unwrap(), acme.quote("pro-plan", &user(1)).await);
        assert_eq!(stored.unwrap().price(), shown.price());
    }
}

/// Of the server's connection that the pooler gives us.
async fn listening_channels(url: &str) -> Vec<String> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let rows = client.query_typed("SELECT pg_listening_channels()", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn behind_a_pooler_in_session_mode_it_listens() {
    let Some(pgbouncer) = pgbouncer() else { return };
    let pooled = Pooled::start(&pgbouncer, "session", 20).await;
    // Polling alone would be too late for any of this.
    let client = client(&pooled.pooler.url()).poll_interval(SOON * 10).build().unwrap();
    let [acme, globex] = assigners(&client, &pooled.sides).await;
    listens(&acme, true).await;
    let before = globex.version();
    pooled.sides[0].pause().await;
    sees(&acme, Reason::Paused).await;
    assert!(globex.status().is_listening);
    assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
}

#[tokio::test]
async fn on_a_standby_it_polls_and_survives_its_restart() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let sides = two_sides(&direct(&database.app_url())).await;
    let standby = cluster.standby().await.unwrap();
    let url = standby.url_for("lastprice_service", database.name());
    let client = client(&url).build().unwrap();
    let [acme, globex] = assigners(&client, &sides).await;
    is_only_polled(&acme).await;
    let before = globex.version();
    sides[0].pause().await;
    sees(&acme, Reason::Paused).await;
    assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
    let refused = globex.quote("pro-plan", &user(1)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "only the primary makes quotes: {refused:?}");

    standby.kill().await.unwrap();
    let lost = acme.confirm().await.unwrap_err();
    assert!(matches!(lost.kind(), ErrorKind::Unavailable | ErrorKind::Timeout), "{lost:?}");
    sides[0].resume().await;
    let silence = BEAT * 10;
    eventually("they grow older", async || {
        assert_eq!((reason(&acme), reason(&globex)), (Reason::Paused, Reason::Randomised));
        acme.status().age > silence && globex.status().age > silence
    })
    .await;

    standby.start_again().await.unwrap();
    sees(&acme, Reason::Randomised).await;
    eventually("they are current again", async || {
        acme.status().age < silence && globex.status().age < silence
    })
    .await;
    assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
    is_only_polled(&acme).await;
}

/// A database at which nobody new can connect for a while, except superusers.
struct Door {
    database: TestDatabase,
    superuser: tokio_postgres::Client,
}

impl Door {
    async fn of(database: TestDatabase) -> Door {
        Door { superuser: database.connect_superuser().await.unwrap(), database }
    }

    async fn limit(&self, connections: i32) {
        let sql = format!("ALTER DATABASE {} WITH CONNECTION LIMIT {connections}", self.database.name());
        self.superuser.batch_execute(&sql).await.unwrap();
    }

    /// Ends those connections under test whose last query begins like this.
    async fn terminate(&self, query: &str) {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = $1 AND starts_with(query, $2)";
        let ended = self.superuser.query(sql, &[&APPLICATION, &query]).await.unwrap();
        assert!(!ended.is_empty(), "there was none");
    }
}

#[tokio::test]
async fn what_changed_while_nobody_listened_is_read() {
    let door = Door::of(TestDatabase::new().await.unwrap()).await;
    let sides = two_sides(&direct(&door.database.app_url())).await;
    let client = client(&door.database.app_url()).build().unwrap();
    let [acme, globex] = assigners(&client, &sides).await;
    let before = globex.version();
    for all in [false, true] {
        listens(&acme, true).await;
        door.limit(0).await;
        door.terminate(if all { "" } else { "LISTEN" }).await;
        listens(&acme, false).await;
        if all {
            sides[0].resume().await;
            // Nor can anybody poll.
            eventually("it grows older", async || acme.status().age > BEAT * 5).await;
            assert_eq!(reason(&acme), Reason::Paused);
        } else {
            sides[0].pause().await;
        }
        door.limit(-1).await;
        sees(&acme, if all { Reason::Randomised } else { Reason::Paused }).await;
        listens(&acme, true).await;
        assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
    }
}

/// A probe that comes back tells nothing of what was committed before the LISTEN.
#[tokio::test]
async fn what_could_not_be_read_at_once_is_not_forgotten() {
    let door = Door::of(TestDatabase::new().await.unwrap()).await;
    let [writer, locker] =
        [door.database.connect_owner().await.unwrap(), door.database.connect_owner().await.unwrap()];
    let sides = two_sides(&direct(&door.database.app_url())).await;
    let client = client(&door.database.app_url()).statement_timeout(BEAT).build().unwrap();
    let [acme, globex] = assigners(&client, &sides).await;
    listens(&acme, true).await;
    door.limit(0).await;
    door.terminate("LISTEN").await;
    listens(&acme, false).await;

    // Nobody hears of the change, and nobody can read it: a lock waits behind it, ahead of all readers.
    let paused = sides[0].experiment;
    let pause = format!("UPDATE experiments SET status = 'paused' WHERE id = '{paused}'");
    writer.batch_execute(&format!("BEGIN; {pause}; SET CONSTRAINTS ALL IMMEDIATE")).await.unwrap();
    let lock = "BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE";
    let (locked, ()) = tokio::join!(locker.batch_execute(lock), async {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'
                       AND relation = 'tenants'::regclass AND database = (SELECT oid FROM pg_database
                                                                          WHERE datname = current_database())";
        eventually("the lock waits", async || {
            door.superuser.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        writer.batch_execute("COMMIT").await.unwrap();
    });
    locked.unwrap();

    door.limit(-1).await;
    listens(&acme, true).await;
    eventually("they are not taken for current", async || {
        acme.status().age > BEAT * 10 && globex.status().age > BEAT * 10
    })
    .await;
    assert!(acme.status().is_listening);
    assert_eq!((reason(&acme), reason(&globex)), (Reason::Randomised, Reason::Randomised));
    locker.batch_execute("ROLLBACK").await.unwrap();
    sees(&acme, Reason::Paused).await;
    eventually("both are current", async || acme.status().age < BEAT * 10 && globex.status().age < BEAT * 10)
        .await;
    assert_eq!(reason(&globex), Reason::Randomised);
}

#[tokio::test]
async fn a_silent_network_is_noticed_and_left_behind() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let sides = two_sides(&direct(&database.app_url())).await;
    let network = Network::before(cluster.port()).await;
    let url = beside(&cluster, &database, network.port);
    let limit = Duration::from_millis(500);
    let client = client(&url).acquire_timeout(limit).connect_timeout(limit).statement_timeout(limit);
    let client = client.build().unwrap();
    let [acme, globex] = assigners(&client, &sides).await;
    listens(&acme, true).await;
    let before = globex.version();

    network.is_silent.send_replace(true);
    listens(&acme, false).await;
    sides[0].pause().await;
    // Whoever asks gets an answer, though those who asked before have none.
    let lost = timeout(SOON, acme.confirm()).await.expect("it waits for ever").unwrap_err();
    assert!(matches!(lost.kind(), ErrorKind::Unavailable | ErrorKind::Timeout), "{lost:?}");
    eventually("they grow older", async || {
        assert!(!acme.status().is_listening);
        acme.status().age > BEAT * 20 && globex.status().age > BEAT * 20
    })
    .await;
    assert_eq!((reason(&acme), reason(&globex)), (Reason::Randomised, Reason::Randomised));

    network.is_silent.send_replace(false);
    sees(&acme, Reason::Paused).await;
    listens(&acme, true).await;
    eventually("both are current", async || acme.status().age < BEAT * 10 && globex.status().age < BEAT * 10)
        .await;
    assert_eq!((reason(&globex), globex.version()), (Reason::Randomised, before));
    eventually("nobody waits on a dead connection", async || {
        let pool = client.pool_status();
        pool.size > 0 && pool.available == pool.size
    })
    .await;
    sides[0].resume().await;
    sees(&acme, Reason::Randomised).await;
}
