//! Assigners that are kept current by polling a standby.

use std::time::{Duration, Instant};

use lastprice::{Client, Reason};

use crate::support_pooler::{Pooler, pgbouncer};
use crate::support_repo::*;

const LIMIT: Duration = Duration::from_secs(2);

#[tokio::test]
async fn it_polls_the_replica_and_asks_the_primary_what_is_new() {
    let Some(pgbouncer) = pgbouncer() else { return };
    // No notification arrives through it.
    let pooler = Pooler::start(&pgbouncer, "transaction", 4).await;
    let standby = pooler.cluster.standby().await.unwrap();
    let direct = Client::builder().url(pooler.database.app_url()).require_app_role().build().unwrap();
    let new = |name: &str| lastprice::NewTenant::managed(name, format!("ops@{name}.example"));
    let id = direct.create_tenant(new("acme")).await.unwrap().id;
    let other = direct.create_tenant(new("globex")).await.unwrap().id;
    let (acme, globex) = (direct.tenant(id), direct.tenant(other));
    let live = active(&acme, "pro").await;
    active(&globex, "pro").await;

    let client = Client::builder()
        .url(pooler.url())
        .statement_mode(lastprice::StatementMode::Typed)
        .replica(standby.url_for("lastprice_service", pooler.database.name()))
        .max_staleness(LIMIT)
        .poll_interval(Duration::from_millis(50))
        .require_app_role()
        .build()
        .unwrap();
    let (assigner, theirs) = (client.assigner(id).await.unwrap(), client.assigner(other).await.unwrap());
    let reason = || assigner.assign("pro", &user(1)).unwrap().reason();
    let answered = || client.replica_status().unwrap().answered;
    eventually("it polls there", async || answered() > 20).await;
    assert!(!assigner.status().is_listening);

    // Something new arrives with the first polls that the standby answers otherwise; a round of polls waits for the one before.
    let config: tokio_postgres::Config = standby.superuser_url(pooler.database.name()).parse().unwrap();
    let (superuser, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let theirs_before = theirs.version();
    for expected in [Reason::Paused, Reason::Randomised, Reason::Paused, Reason::Randomised] {
        let change = if expected == Reason::Paused {
            acme.experiments().pause(live.id).await
        } else {
            acme.experiments().resume(live.id).await
        };
        let revision = change.unwrap().revision;
        let sql = "SELECT revision = $2 FROM experiments WHERE id = $1";
        let arrived =
            async || superuser.query_one(sql, &[&live.id.uuid(), &revision]).await.unwrap().get::<_, bool>(0);
        eventually("the standby has it", arrived).await;
        let before = answered();
        eventually("it polls there", async || answered() >= before + 6).await;
        assert_eq!(reason(), expected);
    }
    let before = answered();
    eventually("it polls there again", async || answered() > before + 10).await;

    // While the standby stands still: nothing is new, as it says, until it is too far behind to be believed.
    superuser.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    acme.experiments().pause(live.id).await.unwrap();
    let written = Instant::now();
    eventually("paused, in time", async || {
        // A snapshot is as old as what says so.
        assert!(assigner.status().age < LIMIT + Duration::from_secs(1), "{:?}", assigner.status());
        reason() == Reason::Paused
    })
    .await;
    assert!(written.elapsed() < LIMIT + Duration::from_secs(2), "{:?}", written.elapsed());

    // And never back: the standby says what was before.
    acme.experiments().resume(live.id).await.unwrap();
    assigner.confirm().await.unwrap();
    assert_eq!(reason(), Reason::Randomised);
    superuser.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
    for _ in 0..100 {
        assert_eq!(reason(), Reason::Randomised);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before = answered();
    eventually("it polls there once more", async || answered() > before + 10).await;
    assert_eq!((reason(), theirs.version()), (Reason::Randomised, theirs_before));
}
