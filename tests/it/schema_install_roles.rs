//! Installing as all sorts of owners, and at the same time. Roles belong to the whole server: hence servers of our own.

use lastprice::{Admin, Client, ErrorKind, NewTenant};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::task::JoinSet;

use crate::support_sql::*;

/// An empty database that belongs to a role, with its schema.
async fn empty_of(cluster: &PrivateCluster, role: &str) -> TestDatabase {
    let db = cluster.database_builder().empty().create().await.unwrap();
    let superuser = db.connect_superuser().await.unwrap();
    let sql = format!("ALTER DATABASE {} OWNER TO {role}; ALTER SCHEMA public OWNER TO {role}", db.name());
    superuser.batch_execute(&sql).await.unwrap();
    db
}

async fn app_role_is_there(db: &TestDatabase) -> bool {
    let superuser = db.connect_superuser().await.unwrap();
    !superuser.query("SELECT FROM pg_roles WHERE rolname = 'lastprice_app'", &[]).await.unwrap().is_empty()
}

#[tokio::test]
async fn as_an_owner_who_is_no_superuser() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let db = cluster.database_builder().empty().create().await.unwrap();
    let superuser = db.connect_superuser().await.unwrap();
    superuser.batch_execute("CREATE ROLE plain LOGIN; CREATE ROLE maker LOGIN CREATEROLE").await.unwrap();

    // Without CREATEROLE, and without the role: what to do, and nothing left.
    let db = empty_of(&cluster, "plain").await;
    let url = db.url_for("plain");
    let bare = definitions(&pg_dump, &url);
    let what = "the role lastprice_app is missing, and role plain may not create roles";
    let hint = "Let a role with CREATEROLE run: CREATE ROLE lastprice_app NOLOGIN; then install again.";
    psql(&psql_path, &url, "", &["-f", schema_sql()]).expect_refusal(&[what, hint]);
    let error = Admin::connect(&url).await.unwrap().migrate().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SchemaMismatch);
    assert!(error.to_string().contains(what) && error.to_string().contains(hint), "{error}");
    assert_eq!(bare, definitions(&pg_dump, &url));
    assert!(!app_role_is_there(&db).await);

    // The role made beforehand, as the hint says.
    superuser.batch_execute("CREATE ROLE lastprice_app NOLOGIN").await.unwrap();
    let ran = psql(&psql_path, &url, "", &["-f", schema_sql()]);
    assert!(ran.err.contains("role plain cannot become lastprice_app by SET ROLE"), "{}", ran.err);
    ran.expect_ok();
    superuser.batch_execute("CREATE ROLE service LOGIN IN ROLE lastprice_app").await.unwrap();
    let client = Client::builder().url(db.url_for("service")).require_app_role().build().unwrap();
    let tenant = client.create_tenant(NewTenant::managed("T", "t@example.com")).await.unwrap();
    assert!(client.tenant(tenant.id).tenants().get().await.unwrap().is_some());
    assert!(Admin::connect(&url).await.unwrap().refresh_metrics().await.unwrap());

    // A role that bypasses row-level security is refused.
    let other = empty_of(&cluster, "plain").await;
    for attribute in ["BYPASSRLS", "SUPERUSER"] {
        superuser.batch_execute(&format!("ALTER ROLE lastprice_app {attribute}")).await.unwrap();
        psql(&psql_path, &other.url_for("plain"), "", &["-f", schema_sql()])
            .expect_refusal(&["lastprice_app bypasses row-level security", "NOSUPERUSER NOBYPASSRLS"]);
        superuser.batch_execute(&format!("ALTER ROLE lastprice_app NO{attribute}")).await.unwrap();
    }
    assert_eq!(
        bare.replace("plain", ""),
        definitions(&pg_dump, &other.url_for("plain")).replace("plain", "")
    );

    // With CREATEROLE, from nothing; and the owner can then act as the application.
    drop(client);
    drop(db);
    let drop_roles = "DROP OWNED BY lastprice_app; DROP ROLE lastprice_app";
    for _ in 0..100 {
        // The databases that are being dropped still depend on it.
        if superuser.batch_execute(drop_roles).await.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let db = empty_of(&cluster, "maker").await;
    assert!(!app_role_is_there(&db).await);
    Admin::connect(&db.url_for("maker")).await.unwrap().migrate().await.unwrap();
    let client = Client::builder().url(db.url_for("maker")).build().unwrap();
    client.create_tenant(NewTenant::managed("T", "t@example.com")).await.unwrap();
}

/// Somebody who may make tables in a schema of the database, and nothing else in it.
#[tokio::test]
async fn without_rights_on_the_database_it_works_but_for_pgcrypto() {
    let Some(psql_path) = program("psql") else { return };
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let db = cluster.database_builder().empty().create().await.unwrap();
    let superuser = db.connect_superuser().await.unwrap();
    superuser
        .batch_execute(
            "CREATE ROLE guest LOGIN; CREATE ROLE lastprice_app; CREATE ROLE service LOGIN IN ROLE lastprice_app;
             CREATE SCHEMA room AUTHORIZATION guest; CREATE SCHEMA hall; GRANT USAGE, CREATE ON SCHEMA hall TO guest",
        )
        .await
        .unwrap();
    let install = |schema: &str| {
        psql(&psql_path, &db.url_for("guest"), &format!("-c search_path={schema}"), &["-f", schema_sql()])
    };
    if version_num(&superuser).await < 130_000 {
        // There it has what else is built in, and who may create it does so beforehand, in whatever schema.
        superuser.batch_execute("DROP EXTENSION pgcrypto").await.unwrap();
        install("room").expect_refusal(&[
            "before PostgreSQL 13 the extension pgcrypto is needed",
            "CREATE EXTENSION pgcrypto",
        ]);
        let elsewhere = "CREATE SCHEMA \"Else where\"; GRANT USAGE ON SCHEMA \"Else where\" TO PUBLIC;
            CREATE EXTENSION pgcrypto SCHEMA \"Else where\"";
        superuser.batch_execute(elsewhere).await.unwrap();
        install("room").expect_ok();
    } else {
        let ran = install("room");
        assert!(ran.err.contains("extension pgcrypto is not there"), "{}", ran.err);
        ran.expect_ok();
    }
    let client =
        Client::builder().url(db.url_for("service")).schema("room").require_app_role().build().unwrap();
    client.create_tenant(NewTenant::managed("T", "t@example.com")).await.unwrap();

    // Whose schema it is not cannot let the application in, and says who can.
    install("hall").expect_refusal(&[
        "may not let lastprice_app use the schema hall",
        "GRANT USAGE ON SCHEMA hall TO lastprice_app",
    ]);
    superuser.batch_execute("GRANT USAGE ON SCHEMA hall TO lastprice_app").await.unwrap();
    install("hall").expect_ok();
    install("pg_catalog").expect_refusal(&["role guest may not create tables in schema pg_catalog"]);
}

/// A host may have changed what new functions and tables are open to.
#[tokio::test]
async fn whatever_the_default_privileges_are() {
    let Some(psql_path) = program("psql") else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    let setting = "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
        ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC, lastprice_app;
        CREATE SCHEMA pricing; REVOKE ALL ON SCHEMA public FROM PUBLIC";
    let made_elsewhere = TestDatabase::new().await.unwrap(); // and with it the role
    owner.batch_execute(setting).await.unwrap();
    drop(made_elsewhere);
    psql(&psql_path, &db.owner_url(), "-c search_path=pricing", &["-f", schema_sql()]).expect_ok();
    let client = Client::builder().url(db.app_url()).schema("pricing").require_app_role().build().unwrap();
    let tenant = client.create_tenant(NewTenant::managed("T", "t@example.com")).await.unwrap();
    assert_eq!(client.tenant(tenant.id).metrics().fold().await.unwrap(), 0);
    let app = db.connect_app().await.unwrap();
    for sql in [
        "SELECT FROM pricing.experiment_metrics",
        "DELETE FROM pricing.conversions",
        "TRUNCATE pricing.views",
    ] {
        assert!(refusal(app.batch_execute(sql).await).2.contains("permission denied"), "{sql}");
    }
}

async fn install_together(psql_path: &std::path::Path, places: Vec<(String, String)>) -> usize {
    let mut installing = JoinSet::new();
    for (i, (url, schema)) in places.into_iter().enumerate() {
        let psql_path = psql_path.to_owned();
        installing.spawn(async move {
            if i % 2 == 0 {
                let admin = Admin::connect_schema(&url, &schema).await.unwrap();
                return admin.migrate().await.unwrap_or_else(|e| panic!("{e:?}")).from.is_none();
            }
            let run =
                move || psql(&psql_path, &url, &format!("-c search_path={schema}"), &["-f", schema_sql()]);
            let ran = tokio::task::spawn_blocking(run).await.unwrap();
            let found = ran.err.contains("nothing to do");
            ran.expect_ok();
            !found
        });
    }
    installing.join_all().await.into_iter().filter(|installed| *installed).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_at_once() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let reference = TestDatabase::new().await.unwrap();
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let place = (db.owner_url(), "public".to_owned());
    assert_eq!(install_together(&psql_path, vec![place; 8]).await, 1);
    assert_eq!(definitions(&pg_dump, &reference.owner_url()), definitions(&pg_dump, &db.owner_url()));
}

/// What installations into different places share: the role, its membership, and the extension.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn into_several_places_at_once() {
    let Some(psql_path) = program("psql") else { return };
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let mut kept = Vec::new();
    let mut places = Vec::new();
    for _ in 0..3 {
        let db = cluster.database_builder().empty().create().await.unwrap();
        db.connect_owner()
            .await
            .unwrap()
            .batch_execute("CREATE SCHEMA one; CREATE SCHEMA two")
            .await
            .unwrap();
        places.extend([(db.owner_url(), "one".to_owned()), (db.owner_url(), "two".to_owned())]);
        kept.push(db);
    }
    assert_eq!(install_together(&psql_path, places).await, 6);
    // The same, slowly: each gets as far as it can before the first one is done.
    let superuser = kept[0].connect_superuser().await.unwrap();
    let version = version_num(&superuser).await;
    // Since PostgreSQL 16 the owner has the role twice, by itself and as its creator: that one lets it grant the other again.
    let own = if version >= 160_000 { " GRANTED BY lastprice_owner" } else { "" };
    superuser.batch_execute(&format!("REVOKE lastprice_app FROM lastprice_owner{own}")).await.unwrap();
    let made = version >= 130_000; // before, only a superuser makes the extension
    let (first, second) = (kept[0].connect_owner().await.unwrap(), kept[1].connect_owner().await.unwrap());
    for (client, step) in [
        (&first, if made { "DROP EXTENSION pgcrypto" } else { "" }),
        (&first, "CREATE SCHEMA x; CREATE SCHEMA y"),
        (&second, "CREATE SCHEMA x"),
    ] {
        client.batch_execute(step).await.unwrap();
    }
    first.batch_execute(&format!("SET search_path = x; BEGIN; {}", lastprice::SCHEMA_SQL)).await.unwrap();
    let mut waiting = JoinSet::new();
    for (url, schema) in [(kept[1].owner_url(), "x"), (kept[0].owner_url(), "y")] {
        waiting.spawn(async move {
            let client = connect(&url).await;
            client.batch_execute(&format!("SET search_path = {schema}; {}", lastprice::SCHEMA_SQL)).await
        });
    }
    let blocked = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    for _ in 0..200 {
        if superuser.query(blocked, &[]).await.unwrap().len() == 2 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(superuser.query(blocked, &[]).await.unwrap().len(), 2, "both should wait for the first");
    first.batch_execute("COMMIT").await.unwrap();
    for done in waiting.join_all().await {
        done.unwrap();
    }
}
