//! A server with two tenants, and a standby of it.

use std::time::Duration;

use lastprice::{Client, ClientBuilder, Experiment, NewView, ReplicaStatus};
use lastprice_testkit::PrivateCluster;

use crate::support_repo::*;

/// Far longer than a test takes.
pub(crate) const LONG: Duration = Duration::from_secs(3600);

/// Two tenants on a server, and a standby of it.
pub(crate) struct Pair {
    pub(crate) primary: PrivateCluster,
    pub(crate) standby: PrivateCluster,
    pub(crate) two: TwoTenants,
    /// Of Acme.
    pub(crate) live: Experiment,
}

impl Pair {
    pub(crate) async fn start() -> Pair {
        let primary = PrivateCluster::builder().start().await.unwrap();
        let two = two_tenants_in(primary.database().await.unwrap()).await;
        let live = active(&two.acme, "pro").await;
        assign(&two.acme, live.id, 0..10).await;
        let standby = primary.standby().await.unwrap();
        Pair { primary, standby, two, live }
    }

    pub(crate) fn url(&self, role: &str) -> String {
        self.standby.url_for(role, self.two.database.name())
    }

    /// One that has a standby.
    pub(crate) fn builder(&self, max_staleness: Duration) -> ClientBuilder {
        let url = self.two.database.app_url();
        let builder = Client::builder().url(url).replica(self.url("lastprice_service"));
        builder.max_staleness(max_staleness).require_app_role()
    }

    /// The superuser of the standby.
    pub(crate) async fn connect_standby(&self) -> tokio_postgres::Client {
        let database = self.two.database.name();
        let config: tokio_postgres::Config = self.standby.superuser_url(database).parse().unwrap();
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub(crate) async fn on_standby(&self, sql: &str) {
        self.connect_standby().await.batch_execute(sql).await.unwrap();
    }

    pub(crate) async fn pause(&self) {
        self.on_standby("SELECT pg_wal_replay_pause()").await;
        // Before it stops, it may replay what it has begun.
        let sql = "SELECT count(*) FROM pg_stat_activity";
        self.on_standby(sql).await;
    }

    /// The views of Acme's experiment, as this client's tenant sees them.
    pub(crate) async fn views(&self, client: &Client) -> u64 {
        client.tenant(self.two.id).metrics().experiment(self.live.id).await.unwrap().views
    }

    pub(crate) async fn record(&self, n: usize) {
        let _ = self.two.acme.views().record(&NewView::new(self.live.id, user(n))).await.unwrap();
    }

    /// Until the standby answers what is asked of it.
    pub(crate) async fn until_answered(&self, client: &Client) {
        let before = status(client).answered;
        eventually("the replica answers", async || {
            self.views(client).await;
            status(client).answered > before
        })
        .await;
    }
}

pub(crate) fn status(client: &Client) -> ReplicaStatus {
    client.replica_status().unwrap()
}
