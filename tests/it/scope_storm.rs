//! A thousand drops at random moments, half of them as each kind of role, among calls that must not notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lastprice::{Client, Result, StatementMode};

use crate::scope_wire::make_slow;
use crate::support::{Dice, Login, Side, World, poll_n};
use crate::wire::Wire;

const TASKS: u64 = 8;

/// What a task did that stays in the database: views that were acknowledged, and views that may be there.
#[derive(Default)]
struct Tally {
    acknowledged: AtomicUsize,
    open: AtomicUsize,
    dropped: AtomicUsize,
}

/// Most of the tries are dropped in time; at least `drops` must be.
async fn storm(login: Login, mode: StatementMode, tries: u64, drops: usize) {
    let world = Arc::new(World::new().await);
    make_slow(&world, 0.002).await;
    let wire = Wire::before(&world.url(login)).await;
    wire.delay_cancels(Duration::from_millis(3));
    let client = world.client((login, mode)).url(wire.url()).pool_size(3).build().unwrap();
    for side in [world.ours, world.theirs] {
        side.assign(&client, &["slow", "slow-unfinished", "other"]).await;
    }
    let tally = Arc::new(Tally::default());
    let tasks: Vec<_> = (0..TASKS)
        .map(|n| tokio::spawn(task(n, tries / TASKS, client.clone(), Arc::clone(&world), Arc::clone(&tally))))
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    world.settle(3).await;

    let (acknowledged, open) = (tally.acknowledged.load(Ordering::SeqCst), tally.open.load(Ordering::SeqCst));
    let there = world.rows_of("slow").await.0 as usize;
    assert!((acknowledged..=acknowledged + open).contains(&there), "{acknowledged} + {open}, but {there}");
    assert_eq!(world.rows_of("slow-unfinished").await, (0, 0), "no row without its commit");
    assert_eq!(world.rows_of("other").await.0 as u64, tries / TASKS * TASKS);
    // Every row is in a tenant's own experiment; a transaction's two rows came together.
    let torn = "SELECT count(*) FROM (SELECT metadata ->> 'pair' FROM views WHERE metadata ? 'pair'
                                      GROUP BY 1 HAVING count(*) <> 2 OR count(DISTINCT xmin::text) <> 1) torn";
    assert_eq!(world.count(torn).await, 0);
    assert!(!wire.take_warnings().contains(&"25001".to_owned()), "nobody met an open transaction");
    world.check_next_user(&client).await;
    world.check_books(&client).await;
    let dropped = tally.dropped.load(Ordering::SeqCst);
    println!("{login:?}, {mode:?}: {dropped} of {tries} were dropped, {} cancelled", wire.cancels());
    assert!(dropped >= drops && wire.cancels() > drops / 20);
}

async fn task(n: u64, tries: u64, client: Client, world: Arc<World>, tally: Arc<Tally>) {
    let mut dice = Dice(n);
    for round in 0..tries {
        let (us, them) =
            if dice.below(2) == 0 { (world.ours, world.theirs) } else { (world.theirs, world.ours) };
        let (kind, rows) = match dice.below(4) {
            0 => (Kind::OneShot, 1),
            1 => (Kind::Committed, 2),
            _ => (Kind::Unfinished, 0),
        };
        let work = kind.run(client.clone(), us, format!("{n}-{round}"));
        let done = if dice.below(2) == 0 {
            poll_n(dice.below(9) as usize, work).await
        } else {
            tokio::time::timeout(Duration::from_micros(dice.below(6_000)), work).await.ok()
        };
        match done {
            Some(done) => {
                done.unwrap();
                tally.acknowledged.fetch_add(rows, Ordering::SeqCst);
            }
            None => {
                tally.open.fetch_add(rows, Ordering::SeqCst);
                tally.dropped.fetch_add(1, Ordering::SeqCst);
            }
        }
        // The innocent: they are never cancelled, never in a stranger's transaction, never another tenant.
        let next = client.tenant(them.tenant);
        next.views().record(&them.view("other")).await.unwrap();
        assert_eq!(next.experiments().get(them.experiment).await.unwrap().unwrap().id, them.experiment);
        assert!(next.experiments().get(us.experiment).await.unwrap().is_none());
    }
}

enum Kind {
    OneShot,
    Committed,
    Unfinished,
}

impl Kind {
    async fn run(self, client: Client, us: Side, pair: String) -> Result<()> {
        let pair = lastprice::serde_json::json!({ "pair": pair });
        let tenant = client.tenant(us.tenant);
        match self {
            Kind::OneShot => tenant.views().record(&us.view("slow")).await.map(drop),
            Kind::Committed => {
                let transaction = tenant.begin().await?;
                transaction.views().record(&us.view("slow").metadata(pair.clone())).await?;
                transaction.views().record(&us.view("slow").metadata(pair)).await?;
                transaction.commit().await
            }
            Kind::Unfinished => {
                let transaction = tenant.begin().await?;
                transaction.tenants().get().await?;
                transaction.views().record(&us.view("slow-unfinished")).await.map(drop)
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordinary_role() {
    storm(Login::App, StatementMode::Prepared, 720, 500).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bypassing_role() {
    storm(Login::Superuser, StatementMode::Typed, 720, 500).await;
}
