//! A refresher that runs by itself: for all tenants, once in an interval, and until it is told to stop.

use std::time::{Duration, Instant};

use lastprice::{Admin, ErrorKind, Refresher, RefresherOptions, TenantHandle};
use lastprice_testkit::PrivateCluster;

use crate::support_repo::*;

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(600);

fn every(interval: Duration) -> RefresherOptions {
    RefresherOptions::new().every(interval)
}

async fn started(two: &TwoTenants, interval: Duration) -> Refresher {
    Admin::connect(&two.database.owner_url()).await.unwrap().refresher_with(every(interval)).unwrap()
}

/// Of each experiment of a tenant, how many were assigned at the last refresh.
async fn assigned(tenant: &TenantHandle) -> Vec<u64> {
    let page = tenant.metrics().refreshed(100, None).await.unwrap();
    page.items.iter().map(|summary| summary.assignments).collect()
}

async fn connections(two: &TwoTenants) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'lastprice admin'";
    two.owner.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn every_tenant_has_fresh_numbers_of_its_own() {
    let two = two_tenants().await;
    let theirs = two.globex.metrics().refreshed(100, None).await.unwrap().items;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    let refresher = started(&two, SHORT).await;
    eventually("the first refresh is seen", async || assigned(&two.acme).await == [5]).await;
    assign(&two.acme, id, 5..7).await;
    eventually("so is the next one", async || assigned(&two.acme).await == [7]).await;
    let now = two.globex.metrics().refreshed(100, None).await.unwrap().items;
    assert_eq!(now.len(), theirs.len().max(1));
    assert!(now.iter().all(|summary| summary.experiment_id != id && summary.assignments > 0));
    let status = refresher.shutdown(LONG).await;
    assert!(status.refreshed >= 2 && status.failed == 0, "{status:?}");
    assert!(status.last_success.is_some() && status.last_error.is_none());
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn many_refresh_once_in_an_interval() {
    let two = two_tenants().await;
    let first = started(&two, LONG).await;
    eventually("the first one refreshes", async || first.status().refreshed == 1).await;
    let others = [started(&two, LONG).await, started(&two, LONG).await];
    for other in &others {
        eventually("the others look", async || other.status().skipped == 1).await;
        assert_eq!((other.status().refreshed, other.status().failed), (0, 0));
    }
    for refresher in others.into_iter().chain([first]) {
        refresher.shutdown(LONG).await;
    }

    let interval = Duration::from_millis(300);
    let began = Instant::now();
    let all = [started(&two, interval).await, started(&two, interval).await, started(&two, interval).await];
    let refreshed = || all.iter().map(|refresher| refresher.status().refreshed).sum::<u64>();
    eventually("time goes by", async || refreshed() >= 8).await;
    // On their own they would be three times as many. A few more than one may come when two look at the same moment.
    let intervals = began.elapsed().as_millis() / interval.as_millis() + 1;
    assert!(u128::from(refreshed()) <= intervals + intervals / 2, "{} in {intervals}", refreshed());
    let looked = all.iter().map(|refresher| refresher.status().skipped).sum::<u64>();
    assert!(looked > 0, "somebody found the work done");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn it_goes_on_when_the_database_is_back() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let refresher =
        Admin::connect(&database.owner_url()).await.unwrap().refresher_with(every(SHORT)).unwrap();
    eventually("it refreshes", async || refresher.status().refreshed > 0).await;
    cluster.stop().await.unwrap();
    eventually("it fails more than once", async || refresher.status().failed > 1).await;
    let status = refresher.status();
    assert!(
        matches!(status.last_error, Some(ErrorKind::Unavailable | ErrorKind::OutcomeUnknown)),
        "{status:?}"
    );
    cluster.start_again().await.unwrap();
    let back =
        async || refresher.status().last_error.is_none() && refresher.status().refreshed > status.refreshed;
    eventually("it refreshes again", back).await;
    let ended = refresher.shutdown(LONG).await;
    assert!(ended.last_success > status.last_success);
}

#[tokio::test]
async fn a_connection_that_is_cut_is_opened_again() {
    let two = two_tenants().await;
    let refresher = started(&two, SHORT).await;
    for _ in 0..3 {
        let before = refresher.status().refreshed;
        let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = 'lastprice admin'";
        two.database.connect_superuser().await.unwrap().execute(cut, &[]).await.unwrap();
        eventually("it goes on", async || refresher.status().refreshed > before + 1).await;
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn nothing_is_left_of_one_that_has_ended() {
    let two = two_tenants().await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for shut_down in [true, false] {
        let refresher = started(&two, SHORT).await;
        eventually("it works", async || refresher.status().refreshed > 0).await;
        assert!(tasks() > before);
        if shut_down {
            refresher.shutdown(LONG).await;
        } else {
            drop(refresher);
        }
        eventually("no task is left", async || tasks() == before).await;
        eventually("nor a connection", async || connections(&two).await == 0).await;
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_shutdown_waits_for_the_refresh_but_not_for_ever() {
    let two = two_tenants().await;
    let lock = two.database.connect_owner().await.unwrap();
    for patient in [true, false] {
        two.owner.batch_execute("REFRESH MATERIALIZED VIEW experiment_metrics WITH NO DATA").await.unwrap();
        lock.batch_execute("BEGIN; LOCK TABLE metric_totals IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let refresher = started(&two, LONG).await;
        let stuck = "SELECT count(*) > 0 FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'lastprice admin' AND wait_event_type = 'Lock'";
        eventually("it waits", async || two.owner.query_one(stuck, &[]).await.unwrap().get(0)).await;
        if patient {
            let ended = tokio::spawn(refresher.shutdown(LONG));
            tokio::task::yield_now().await;
            assert!(!ended.is_finished());
            lock.batch_execute("ROLLBACK").await.unwrap();
            assert_eq!(ended.await.unwrap().refreshed, 1);
        } else {
            let status = refresher.shutdown(SHORT).await;
            assert_eq!((status.refreshed, status.failed), (0, 0));
            lock.batch_execute("ROLLBACK").await.unwrap();
        }
        eventually("no connection is left", async || connections(&two).await == 0).await;
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn an_interval_out_of_bounds_is_named() {
    let two = two_tenants().await;
    for interval in [Duration::ZERO, Duration::from_millis(99), Duration::from_secs(86_401), Duration::MAX] {
        let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
        let error = admin.refresher_with(every(interval)).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some("every")));
    }
}
