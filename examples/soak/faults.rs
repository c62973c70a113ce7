//! What goes wrong, at random.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lastprice_testkit::{PrivateCluster, TestDatabase};

use crate::load::{Dice, Load};
use crate::network::Network;
use crate::table::count;
use crate::{APPLICATION, CONNECTIONS, Failure};

/// One fault after another; when the time is up, the server runs.
pub(crate) async fn until(
    end: Instant,
    seed: u64,
    cluster: &PrivateCluster,
    network: &Network,
    load: &Load,
) -> Result<(), Failure> {
    let (mut dice, database) = (Dice(seed ^ 0xfa17), &*load.database);
    // The server is killed once a minute at the least, and once in a short run.
    let within = |dice: &mut Dice, left: Duration| {
        let far = left.mul_f64(0.7).min(Duration::from_secs(45));
        Instant::now() + far.mul_f64(0.3 + 0.7 * dice.share())
    };
    let mut next_kill = within(&mut dice, end.saturating_duration_since(Instant::now()));
    while Instant::now() < end {
        let left = end.saturating_duration_since(Instant::now());
        tokio::time::sleep(Duration::from_millis(300 + dice.below(2_000)).min(left)).await;
        if Instant::now() >= end {
            break;
        }
        count(&load.table.faults);
        if Instant::now() >= next_kill {
            cluster.kill().await?;
            tokio::time::sleep(Duration::from_millis(dice.below(1_500))).await;
            cluster.start_again().await?;
            load.table.kills.fetch_add(1, Ordering::Relaxed);
            next_kill = within(&mut dice, Duration::from_secs(60));
            continue;
        }
        match dice.below(16) {
            0..=3 => signal(database, "pg_terminate_backend", 1 + dice.below(CONNECTIONS as u64)).await?,
            4..=6 => signal(database, "pg_cancel_backend", 1 + dice.below(3)).await?,
            7 | 8 => exhaust(load, Duration::from_millis(200 + dice.below(1_500))).await,
            9 | 10 => lock(database, &mut dice).await?,
            11..=14 => {
                network.lose(20 + dice.below(100));
                tokio::time::sleep(Duration::from_millis(300 + dice.below(1_200))).await;
                network.lose(0);
            }
            _ => {
                cluster.stop().await?;
                tokio::time::sleep(Duration::from_millis(dice.below(1_000))).await;
                cluster.start_again().await?;
            }
        }
    }
    Ok(())
}

/// To some of the client's connections.
async fn signal(database: &TestDatabase, function: &str, how_many: u64) -> Result<(), Failure> {
    let superuser = database.connect_superuser().await?;
    let sql = format!(
        "SELECT count({function}(pid)) FROM (
           SELECT pid FROM pg_stat_activity WHERE application_name = $1 ORDER BY random() LIMIT {how_many}) chosen"
    );
    superuser.query_one(&sql, &[&APPLICATION]).await?;
    Ok(())
}

/// Somebody takes all connections, and does nothing with them.
async fn exhaust(load: &Load, how_long: Duration) {
    let shop = &load.shops[0];
    let taken = join_all((0..CONNECTIONS).map(|_| shop.tenant.begin())).await;
    tokio::time::sleep(how_long).await;
    drop(taken);
}

/// A migration of somebody's.
async fn lock(database: &TestDatabase, dice: &mut Dice) -> Result<(), Failure> {
    let table = ["views", "conversions", "assignments", "usage", "experiments", "metric_totals"];
    let table = table[dice.below(6) as usize];
    let owner = database.connect_owner().await?;
    let locking =
        format!("BEGIN; SET LOCAL lock_timeout = '1s'; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
    if owner.batch_execute(&locking).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(100 + dice.below(900))).await;
    }
    owner.batch_execute("ROLLBACK").await?;
    Ok(())
}
