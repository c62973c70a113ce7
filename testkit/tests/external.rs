//! `TEST_DATABASE_URL`: the server is somebody else's. Here it is a private cluster of the parent process.

use crate::{Scratch, is_child};
use lastprice_testkit::{PrivateCluster, TestDatabase};

#[tokio::test]
#[ignore = "started by other tests"]
async fn child_uses_the_server_of_the_environment() {
    if !is_child() {
        return;
    }
    let url = std::env::var("TEST_DATABASE_URL").unwrap();
    let database = TestDatabase::builder().setup_sql("CREATE TABLE orders (id int)").create().await.unwrap();
    assert_eq!(database.superuser_url().rsplit_once('/').unwrap().0, url.rsplit_once('/').unwrap().0);
    database.connect_owner().await.unwrap().batch_execute("INSERT INTO orders VALUES (1)").await.unwrap();
    database.connect_superuser().await.unwrap();
    assert_eq!(database.password_for("lastprice_service").unwrap().len(), 32);
    let service = database.connect_app().await.unwrap();
    let refused = service.batch_execute("SELECT * FROM orders").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "42501");
    // The janitor may not get to it before the end of the process.
    std::mem::forget(database);
}

async fn use_it(cluster: &PrivateCluster, role: &str) {
    let scratch = Scratch::new();
    let connect = async || {
        let url = cluster.superuser_url("postgres");
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    };
    let client = connect().await;
    let names = async |pattern: &str| -> Vec<String> {
        let sql = "SELECT datname::text FROM pg_database WHERE datname LIKE $1 ORDER BY 1";
        client.query(sql, &[&pattern]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    // None of these is a test database of a process that is no more.
    for name in ["lastprice_test_1_1", "lastprice_test_2000000000_production", "lastprice_test_x_1"] {
        client.batch_execute(&format!("DROP DATABASE IF EXISTS {name}")).await.unwrap();
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    }
    client.batch_execute("DROP DATABASE IF EXISTS lastprice_test_2000000000_1").await.unwrap();
    client.batch_execute(&format!("CREATE DATABASE lastprice_test_2000000000_1 OWNER {role}")).await.unwrap();

    for round in 0..3 {
        let exe = std::env::current_exe().unwrap();
        let mut command = scratch.child(&exe, "external::child_uses_the_server_of_the_environment");
        let status = command.env("TEST_DATABASE_URL", cluster.url_for(role, "postgres")).status().unwrap();
        assert!(status.success(), "round {round} as {role}");
        // Each process has swept what its predecessor left.
        let left = names("lastprice_test_%").await;
        assert_eq!(left.len(), 4, "{left:?}");
        assert!(!left.contains(&"lastprice_test_2000000000_1".to_owned()));
        assert_eq!(names("lastprice_template_%").await.len(), 1);
    }
    assert!(!scratch.state().exists(), "no server of our own was started");
}

#[tokio::test]
async fn a_server_with_passwords() {
    let cluster = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    use_it(&cluster, "postgres").await;
}

#[tokio::test]
async fn a_role_that_may_create_databases_and_roles_is_enough() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let url = cluster.superuser_url("postgres");
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let version = client.query_one("SELECT current_setting('server_version_num')::int", &[]).await.unwrap();
    if version.get::<_, i32>(0) < 130_000 {
        return; // the schema wants an extension there, which takes a superuser
    }
    client.batch_execute("CREATE ROLE dev LOGIN CREATEDB CREATEROLE").await.unwrap();
    use_it(&cluster, "dev").await;
}
