//! `PrivateCluster`.

use lastprice_testkit::PrivateCluster;
use std::fs;
use tokio_postgres::{Config, NoTls};

#[tokio::test]
async fn committed_rows_survive_kill_and_restart() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute("CREATE TABLE acknowledged (id int)").await.unwrap();
    let mut count = 0;
    for round in 0..3 {
        let client = database.connect_owner().await.unwrap();
        // Somebody else is in the middle of something.
        let busy = database.connect_owner().await.unwrap();
        let busy = tokio::spawn(async move { busy.batch_execute("SELECT pg_sleep(600)").await });
        for _ in 0..50 {
            client.batch_execute("INSERT INTO acknowledged VALUES (1)").await.unwrap();
            count += 1;
        }
        match round {
            0 => cluster.restart().await.unwrap(),
            _ => {
                cluster.kill().await.unwrap();
                assert!(database.connect_owner().await.is_err());
                cluster.start_again().await.unwrap();
            }
        }
        assert!(busy.await.unwrap().is_err());
        assert!(client.batch_execute("SELECT 1").await.is_err());
        let client = database.connect_owner().await.unwrap();
        assert_eq!(client.query("SELECT FROM acknowledged", &[]).await.unwrap().len(), count);
    }
    assert!(cluster.log().contains("automatic recovery in progress"), "{}", cluster.log());
}

#[tokio::test]
async fn stopping_twice_is_stopping() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    cluster.start_again().await.unwrap();
    cluster.stop().await.unwrap();
    cluster.stop().await.unwrap();
    cluster.kill().await.unwrap();
    assert!(cluster.database().await.is_err());
    cluster.restart().await.unwrap();
    drop(cluster.database_builder().empty().create().await.unwrap());
}

#[tokio::test]
async fn everything_goes_with_the_last_of_it() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let dir = cluster.socket_dir().to_owned();
    let postmaster = crate::postmaster_of(&dir);
    let database = cluster.database().await.unwrap();
    drop(cluster);
    database.connect_owner().await.unwrap();
    drop(database);
    assert!(!dir.exists());
    assert!(!crate::is_running(postmaster));
}

#[tokio::test]
async fn settings_are_set_and_wrong_ones_explained() {
    let cluster = PrivateCluster::builder()
        .setting("log_statement", "all")
        .setting("max_connections", "17")
        .setting("cluster_name", r"it's a \ test")
        .start()
        .await
        .unwrap();
    let database = cluster.database_builder().empty().create().await.unwrap();
    let client = database.connect_owner().await.unwrap();
    let row =
        client.query_one("SELECT current_setting('max_connections'), current_setting('cluster_name')", &[]);
    let row = row.await.unwrap();
    assert_eq!((row.get(0), row.get(1)), ("17", r"it's a \ test"));
    assert!(cluster.log().contains("current_setting('cluster_name')"));
    assert_eq!(fs::read_to_string(cluster.log_path()).unwrap(), cluster.log());

    let error = PrivateCluster::builder().setting("max_conections", "17").start().await.unwrap_err();
    assert!(error.to_string().starts_with("PostgreSQL did not start"), "{error}");
    assert!(format!("{error:?}").contains("unrecognized configuration parameter"), "{error:?}");
    let error = PrivateCluster::builder().setting("a\nb", "17").start().await.unwrap_err();
    assert!(error.to_string().contains("not a setting"), "{error}");
}

#[tokio::test]
async fn tcp_with_passwords() {
    let cluster = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let port = format!("@127.0.0.1:{}/", cluster.port());
    for url in [
        database.owner_url(),
        database.app_url(),
        database.superuser_url(),
        cluster.superuser_url("postgres"),
    ] {
        assert!(url.contains(&port), "{url}");
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("SELECT 1").await.unwrap();

        let mut config: Config = url.parse().unwrap();
        assert_eq!(config.get_password(), Some(PrivateCluster::PASSWORD.as_bytes()));
        let error = config.password("wrong").connect(NoTls).await.map(|_| ()).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "28P01");
    }
    database.connect_owner().await.unwrap();
    cluster.kill().await.unwrap();
    cluster.start_again().await.unwrap();
    assert!(database.owner_url().contains(&port));
    database.connect_app().await.unwrap();
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn tls_is_what_the_certificate_says() {
    let cluster = PrivateCluster::builder().tls().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let error = tokio_postgres::connect(&database.owner_url(), NoTls).await.map(|_| ()).unwrap_err();
    assert_eq!(error.code().unwrap().code(), "28000", "plain text is refused: {error:?}");

    let psql = |url: String| std::process::Command::new("psql").args([&url, "-XAtc", SQL]).output();
    let url = |ca: &std::path::Path| {
        format!("{}?sslmode=verify-full&sslrootcert={}", database.owner_url(), ca.display())
    };
    const SQL: &str = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let Ok(output) = psql(url(&cluster.ca_cert_path())) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("TLSv1."));
    let output = psql(url(&cluster.other_ca_cert_path())).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("certificate verify failed"));
}

#[tokio::test]
async fn a_standby_follows_and_goes_its_own_ways() {
    let primary = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = primary.database_builder().empty().create().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    let standby = primary.standby().await.unwrap();
    let dir = standby.socket_dir().to_owned();
    assert_ne!(dir, primary.socket_dir());
    owner.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let url = standby.url_for("lastprice_owner", database.name());
    let reader = async || {
        let config: Config = url.parse().unwrap();
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    };
    let client = reader().await;
    while client.query("SELECT FROM t", &[]).await.unwrap().len() != 1 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(client.batch_execute("INSERT INTO t VALUES (2)").await.is_err());
    standby.kill().await.unwrap();
    owner.batch_execute("INSERT INTO t VALUES (3)").await.unwrap();
    standby.start_again().await.unwrap();
    let client = reader().await;
    while client.query("SELECT FROM t", &[]).await.unwrap().len() != 2 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    drop((client, standby));
    assert!(!dir.exists());
    owner.batch_execute("INSERT INTO t VALUES (4)").await.unwrap();
}
