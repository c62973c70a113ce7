//! A standby that looks like a good one: of another database, promoted, or frozen.

use std::process::Command;
use std::time::{Duration, Instant};

use lastprice::{Client, ErrorKind, Reason};

use crate::support_replica::*;
use crate::support_repo::*;

/// The assignments of Acme's experiment, of which there are ten.
async fn assignments(pair: &Pair, client: &Client) -> u64 {
    client.tenant(pair.two.id).metrics().experiment(pair.live.id).await.unwrap().assignments
}

/// The log is the cluster's, and so is its identity: a database's is neither.
#[tokio::test]
async fn one_of_another_database_is_refused_and_never_believed() {
    let pair = Pair::start().await;
    let other = pair.primary.database().await.unwrap();
    // The same tenant and experiment, and nobody there.
    let superuser = other.connect_superuser().await.unwrap();
    superuser.batch_execute("SET session_replication_role = replica").await.unwrap();
    for (table, id) in [("tenants", pair.two.id.uuid()), ("experiments", pair.live.id.uuid())] {
        let sql = format!("SELECT t::text FROM {table} t WHERE id = $1");
        let row: String = pair
            .two
            .database
            .connect_superuser()
            .await
            .unwrap()
            .query_one(&sql, &[&id])
            .await
            .unwrap()
            .get(0);
        let sql = format!("INSERT INTO {table} SELECT (($1::text)::{table}).*");
        superuser.execute(&sql, &[&row]).await.unwrap();
    }
    let lsn: String = superuser.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let standby = pair.connect_standby().await;
    let sql = "SELECT pg_last_wal_replay_lsn() >= ($1::text)::pg_lsn";
    let arrived = async || standby.query_one(sql, &[&lsn]).await.unwrap().get::<_, bool>(0);
    eventually("the standby has it", arrived).await;

    let url = pair.standby.url_for("lastprice_service", other.name());
    let client = pair.builder(LONG).replica(url).build().unwrap();
    eventually("it is found to be another one", async || {
        assert_eq!(assignments(&pair, &client).await, 10);
        status(&client).stale > 3 && client.replica_status().unwrap().pool.size > 0
    })
    .await;
    assert_eq!((status(&client).answered, status(&client).empty), (0, 0));
    let refusal = refused(client.ready().await, "replica");
    assert!(refusal.to_string().contains("another database"), "{refusal}");
    // And the right one is not.
    let client = pair.builder(LONG).build().unwrap();
    client.ready().await.unwrap();
    pair.until_answered(&client).await;
    assert_eq!(assignments(&pair, &client).await, 10);
    pair.two.bystander_saw_nothing().await;
}

/// What it replayed last stays as far as the primary's log, while that has nothing to do.
#[tokio::test]
async fn one_that_was_promoted_is_not_believed_any_more() {
    let pair = Pair::start().await;
    let client = pair.builder(LONG).poll_interval(Duration::from_millis(100)).build().unwrap();
    pair.until_answered(&client).await;
    pair.on_standby("SELECT pg_promote()").await;
    // Somebody writes there.
    let id = pair.two.id;
    let sql = format!("UPDATE experiments SET status = 'paused' WHERE tenant_id = '{id}'");
    pair.on_standby(&sql).await;
    pair.on_standby(&format!("DELETE FROM metric_deltas WHERE tenant_id = '{id}'")).await;
    pair.on_standby(&format!("DELETE FROM metric_totals WHERE tenant_id = '{id}'")).await;
    let answered = status(&client).answered;
    for _ in 0..100 {
        assert_eq!(assignments(&pair, &client).await, 10);
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(status(&client).answered, answered);
    assert!(status(&client).failed > 0, "{:?}", status(&client));
    // Nor by an assigner.
    let assigner = client.assigner(id).await.unwrap();
    for _ in 0..20 {
        assert_eq!(assigner.assign("pro", &user(1)).unwrap().reason(), Reason::Randomised);
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(status(&client).answered, answered);
    client.ready().await.unwrap();
    pair.two.bystander_saw_nothing().await;
}

/// A server that stands still, until it is dropped: its processes are there, and say nothing.
struct Frozen(Vec<String>);

impl Frozen {
    async fn freeze(pair: &Pair) -> Frozen {
        let standby = pair.connect_standby().await;
        let sql = "SELECT pid::text FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let mut pids: Vec<String> =
            standby.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
        drop(standby);
        let file = std::fs::read_to_string(pair.standby.socket_dir().join("data/postmaster.pid")).unwrap();
        pids.extend(file.lines().next().map(str::to_owned));
        let frozen = Frozen(pids);
        frozen.signal("-STOP");
        frozen
    }

    fn signal(&self, which: &str) {
        assert!(Command::new("kill").arg(which).args(&self.0).status().unwrap().success());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_frozen_is_waited_for_by_one_caller_and_ever_more_rarely() {
    let pair = Pair::start().await;
    let (wait, time) = (Duration::from_secs(1), Duration::from_secs(14));
    let client = pair.builder(LONG).connect_timeout(wait).build().unwrap();
    pair.until_answered(&client).await;
    let frozen = Frozen::freeze(&pair).await;
    let began = Instant::now();
    let caller = async || {
        let mut slow = 0;
        while began.elapsed() < time {
            let asked = Instant::now();
            assert_eq!(assignments(&pair, &client).await, 10);
            slow += u32::from(asked.elapsed() >= wait);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        slow
    };
    let (a, b, c, d) = tokio::join!(caller(), caller(), caller(), caller());
    // All of them at first, and then one after 1, 2, 4 and 8 seconds. (All after each second would be 28.)
    let slow = [a, b, c, d];
    assert!((4..=9).contains(&slow.iter().sum::<u32>()), "{slow:?}");
    assert!(status(&client).failed > 100, "{:?}", status(&client));
    // Who asks whether all is well is not made to wait again and again either.
    let asked = Instant::now();
    for _ in 0..5 {
        client.ready().await.unwrap();
    }
    assert!(asked.elapsed() < 3 * wait, "{:?}", asked.elapsed());
    drop(frozen);
    pair.until_answered(&client).await;
    pair.two.bystander_saw_nothing().await;
}

/// Whoever gives up before the limit of the client's has learnt that it is frozen, and the next ones need not.
#[tokio::test]
async fn callers_with_less_patience_find_out_as_well() {
    let pair = Pair::start().await;
    let client = pair.builder(LONG).build().unwrap();
    pair.until_answered(&client).await;
    let frozen = Frozen::freeze(&pair).await;
    let (mut given_up, mut asked) = (0, 0);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        let asking = tokio::time::timeout(Duration::from_millis(500), assignments(&pair, &client)).await;
        asked += 1;
        match asking {
            Ok(assignments) => assert_eq!(assignments, 10),
            Err(_) => given_up += 1,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // At once, and after 1 and 2 seconds.
    assert!((1..=4).contains(&given_up) && asked > 20, "{given_up} of {asked}");
    drop(frozen);
    pair.until_answered(&client).await;
    is_kind(client.tenant(pair.two.other_id).metrics().by_variant(pair.live.id).await, ErrorKind::NotFound);
}
