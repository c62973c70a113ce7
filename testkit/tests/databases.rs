//! `TestDatabase` on the shared server, or on the one that the environment names.

use lastprice_testkit::TestDatabase;
use std::collections::HashSet;
use tokio_postgres::Client;

async fn text(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn flag(client: &Client, sql: &str) -> bool {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn the_roles_are_what_they_say() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    assert_eq!(text(&owner, "SELECT current_user::text").await, "lastprice_owner");
    assert_eq!(text(&owner, "SELECT current_database()::text").await, database.name());
    assert!(
        !flag(&owner, "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user").await
    );
    assert!(flag(&owner, "SELECT rolcreaterole FROM pg_roles WHERE rolname = current_user").await);
    owner.batch_execute("CREATE TABLE mine (id int)").await.unwrap();

    let service = database.connect_app().await.unwrap();
    assert!(flag(&service, "SELECT pg_has_role('lastprice_service', 'lastprice_app', 'USAGE')").await);
    assert!(
        flag(
            &service,
            "SELECT NOT rolsuper AND NOT rolcreaterole FROM pg_roles WHERE rolname = current_user"
        )
        .await
    );
    let refused = service.batch_execute("SELECT * FROM mine").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "42501");

    let superuser = database.connect_superuser().await.unwrap();
    let sql = "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = current_database()";
    assert_eq!(text(&superuser, sql).await, "lastprice_owner");
}

#[tokio::test]
async fn eight_at_once_are_eight() {
    let making: Vec<_> = (0..8)
        .map(|_| {
            let builder = TestDatabase::builder().empty().setup_sql("CREATE TABLE counted (id int)");
            tokio::spawn(builder.create())
        })
        .collect();
    let mut databases = Vec::new();
    for database in making {
        databases.push(database.await.unwrap().unwrap());
    }
    let names: HashSet<_> = databases.iter().map(TestDatabase::name).collect();
    assert_eq!(names.len(), 8);
    for database in &databases {
        let owner = database.connect_owner().await.unwrap();
        assert_eq!(owner.execute("INSERT INTO counted VALUES (1)", &[]).await.unwrap(), 1);
        assert_eq!(owner.query("SELECT id FROM counted", &[]).await.unwrap().len(), 1);
    }
}

#[tokio::test]
async fn setup_sql_comes_after_the_schema_and_adds_up() {
    let database = TestDatabase::builder()
        .setup_sql("CREATE TABLE orders (id int); INSERT INTO orders VALUES (1); -- no semicolon at the end")
        .setup_sql("INSERT INTO orders VALUES (2)")
        .create()
        .await
        .unwrap();
    let owner = database.connect_owner().await.unwrap();
    assert_eq!(owner.query("SELECT id FROM orders", &[]).await.unwrap().len(), 2);
    assert_eq!(
        text(&owner, "SELECT tableowner::text FROM pg_tables WHERE tablename = 'orders'").await,
        "lastprice_owner"
    );
}

#[tokio::test]
async fn wrong_setup_sql_says_what_is_wrong() {
    let builder = TestDatabase::builder().empty().setup_sql("CREATE TABEL orders (id int)");
    for _ in 0..2 {
        let error = builder.clone().create().await.unwrap_err();
        assert_eq!(error.to_string(), "the setup_sql of the test database fails");
        assert!(format!("{error:?}").contains("syntax error at or near \"TABEL\""), "{error:?}");
    }
}

#[tokio::test]
async fn an_empty_database_has_nothing_but_its_owner() {
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    assert!(
        !flag(&owner, "SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace)")
            .await
    );
    // Enough to install whatever there is.
    owner
        .batch_execute("REVOKE ALL ON SCHEMA public FROM PUBLIC; CREATE SCHEMA other; CREATE TABLE t ()")
        .await
        .unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
}

#[tokio::test]
async fn urls_are_for_psql_too() {
    let database = TestDatabase::new().await.unwrap();
    for (url, role) in [(database.owner_url(), "lastprice_owner"), (database.app_url(), "lastprice_service")]
    {
        let psql = std::process::Command::new("psql").args([&url, "-XAtc", "SELECT current_user"]).output();
        let Ok(output) = psql else { return };
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), role, "{url}");
    }
}

#[tokio::test]
async fn a_dropped_database_goes_with_its_connections() {
    let other = TestDatabase::builder().empty().create().await.unwrap();
    let observer = other.connect_superuser().await.unwrap();
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let name = database.name().to_owned();
    let connected = database.connect_owner().await.unwrap();
    drop(database);

    let gone = format!("SELECT NOT EXISTS (SELECT FROM pg_database WHERE datname = '{name}')");
    for _ in 0..500 {
        if flag(&observer, &gone).await {
            assert!(connected.batch_execute("SELECT 1").await.is_err());
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("{name} is still there");
}
