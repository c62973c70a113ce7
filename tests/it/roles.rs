//! Who we are in the database, and what is installed there.

use lastprice::{Client, ClientBuilder, ErrorKind};
use lastprice_testkit::{PrivateCluster, TestDatabase};

use crate::support_shop::{Shop, assert_isolated};

/// Roles that escape row-level security, or may become one that does; each is a member of `lastprice_app`, too.
const BYPASSING: &str = "
    CREATE ROLE bypass_group NOLOGIN BYPASSRLS;
    CREATE ROLE super_group NOLOGIN SUPERUSER;
    CREATE ROLE super LOGIN SUPERUSER;
    CREATE ROLE bypass LOGIN BYPASSRLS IN ROLE lastprice_app;
    CREATE ROLE in_bypass LOGIN IN ROLE bypass_group, lastprice_app;
    CREATE ROLE in_bypass_noinherit LOGIN NOINHERIT IN ROLE bypass_group, lastprice_app;
    CREATE ROLE in_super LOGIN IN ROLE super_group, lastprice_app;
    CREATE ROLE in_owner LOGIN IN ROLE lastprice_owner, lastprice_app;
    CREATE ROLE in_owner_noinherit LOGIN NOINHERIT IN ROLE lastprice_owner, lastprice_app;
    CREATE ROLE middle NOLOGIN IN ROLE lastprice_owner;
    CREATE ROLE in_in_owner LOGIN IN ROLE middle;
    CREATE ROLE ordinary LOGIN IN ROLE lastprice_app;
    CREATE ROLE ordinary_noinherit LOGIN NOINHERIT IN ROLE lastprice_app;
    CREATE ROLE group_of_services NOLOGIN IN ROLE lastprice_app;
    CREATE ROLE ordinary_indirect LOGIN IN ROLE group_of_services;
    CREATE ROLE outsider LOGIN;
";

/// Writes down as whom a view was written, and whether a policy bound that role.
const WITNESS: &str = "
    CREATE TABLE seen (login text, who text, bound boolean);
    GRANT INSERT ON seen TO lastprice_app, PUBLIC;
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      INSERT INTO public.seen VALUES (session_user, current_user, row_security_active('public.views'));
      RETURN NEW;
    END $$;
    GRANT EXECUTE ON FUNCTION see() TO lastprice_app;
    CREATE TRIGGER see BEFORE INSERT ON views FOR EACH ROW EXECUTE FUNCTION see();
";

fn login(database: &TestDatabase, role: &str) -> ClientBuilder {
    Client::builder().url(database.url_for(role))
}

#[tokio::test]
async fn a_login_that_escapes_row_level_security_is_refused_or_becomes_the_application_role() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database_builder().setup_sql(WITNESS).create().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    server.batch_execute(BYPASSING).await.unwrap();
    for role in [
        "postgres",
        "super",
        "lastprice_owner",
        "bypass",
        "in_bypass",
        "in_bypass_noinherit",
        "in_super",
        "in_owner",
        "in_owner_noinherit",
        "in_in_owner",
    ] {
        let strict = login(&database, role).require_app_role().build().unwrap();
        for refused in
            [strict.ready().await.unwrap_err(), Shop::open(&strict, "acme").await.err().expect(role)]
        {
            assert_eq!(refused.kind(), ErrorKind::IsolationNotEnforced, "{role}: {refused:?}");
            let says = refused.to_string();
            assert!(says.contains(&format!("`{role}`")) && says.contains("`lastprice_app`"), "{says}");
        }

        assert_isolated(&login(&database, role).build().unwrap()).await;
        let seen = "SELECT who, bound FROM seen WHERE login = $1";
        let seen = server.query(seen, &[&role]).await.unwrap();
        assert_eq!(seen.len(), 2, "{role}");
        for row in seen {
            let (who, bound): (&str, bool) = (row.get(0), row.get(1));
            assert_eq!((who, bound), ("lastprice_app", true), "{role}");
        }
    }
}

#[tokio::test]
async fn an_ordinary_member_is_accepted_and_a_stranger_is_told_what_is_missing() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database_builder().setup_sql(WITNESS).create().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    server.batch_execute(BYPASSING).await.unwrap();
    for role in ["ordinary", "ordinary_indirect", "ordinary_noinherit"] {
        for builder in [login(&database, role), login(&database, role).require_app_role()] {
            let client = builder.build().unwrap();
            client.ready().await.unwrap();
            assert_isolated(&client).await;
        }
        let unbound = "SELECT count(*) FILTER (WHERE bound), count(*) FROM seen WHERE login = $1";
        let row = server.query_one(unbound, &[&role]).await.unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (4, 4), "{role}");
    }
    for builder in [login(&database, "outsider"), login(&database, "outsider").require_app_role()] {
        let refused = builder.build().unwrap().ready().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::IsolationNotEnforced, "{refused:?}");
        let says = refused.to_string();
        assert!(says.contains("GRANT lastprice_app TO outsider"), "{says}");
    }

    // Once the grant is there, the same client works: what it found before was not kept.
    let client = login(&database, "outsider").build().unwrap();
    client.ready().await.unwrap_err();
    server.batch_execute("GRANT lastprice_app TO outsider").await.unwrap();
    assert_isolated(&client).await;
}

#[tokio::test]
async fn a_database_without_the_schema_says_how_to_install_it() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database_builder().empty().create().await.unwrap();
    let client = login(&database, "lastprice_service").build().unwrap();
    let refused = client.ready().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::SchemaMismatch, "{refused:?}");
    let says = refused.to_string();
    assert!(says.contains("schema.sql") && says.contains("Admin::migrate"), "{says}");
    assert!(says.contains("\"public\""), "{says}");

    let elsewhere = login(&database, "lastprice_service").schema("Else where").build().unwrap();
    let refused = elsewhere.ready().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::SchemaMismatch, "{refused:?}");
    assert!(refused.to_string().contains("\"Else where\""), "{refused}");

    // Once it is installed, the same client works.
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    server.batch_execute("GRANT lastprice_app TO lastprice_service").await.unwrap();
    assert_isolated(&client).await;
}

#[tokio::test]
async fn only_this_schema_version_and_the_next_are_accepted() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    for (version, does) in
        [(0, Err("run the migrations")), (1, Ok(())), (2, Ok(())), (3, Err("use a newer release"))]
    {
        let replace = format!(
            "CREATE OR REPLACE FUNCTION lastprice_schema_version() RETURNS integer
             LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT {version}'"
        );
        owner.batch_execute(&replace).await.unwrap();
        let client = Client::builder().url(database.app_url()).build().unwrap();
        match does {
            Ok(()) => assert_isolated(&client).await,
            Err(advice) => {
                let refused = client.ready().await.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::SchemaMismatch, "{refused:?}");
                let says = refused.to_string();
                assert!(says.contains(advice) && says.contains(&format!("version {version}")), "{says}");
            }
        }
    }
}

#[tokio::test]
async fn a_schema_that_is_dropped_while_running_is_a_mismatch_and_a_new_one_is_taken() {
    let database = TestDatabase::new().await.unwrap();
    let client = Client::builder().url(database.app_url()).build().unwrap();
    let acme = Shop::open(&client, "acme").await.unwrap();
    let globex = Shop::open(&client, "globex").await.unwrap();
    let owner = database.connect_superuser().await.unwrap();
    owner.batch_execute("DROP SCHEMA public CASCADE").await.unwrap();
    for shop in [&acme, &globex] {
        let transaction = shop.tenant.begin().await.unwrap();
        for lost in [
            shop.tenant.views().record(&shop.view()).await.unwrap_err(),
            shop.tenant.experiments().get(shop.experiment).await.unwrap_err(),
            transaction.experiments().get(shop.experiment).await.unwrap_err(),
        ] {
            assert_eq!(lost.kind(), ErrorKind::SchemaMismatch, "{lost:?}");
        }
    }

    owner.batch_execute("CREATE SCHEMA public AUTHORIZATION lastprice_owner").await.unwrap();
    // For PostgreSQL 12, where only a superuser can create it.
    owner.batch_execute("CREATE EXTENSION pgcrypto").await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
    assert_isolated(&client).await;
    assert!(acme.tenant.tenants().get().await.unwrap().is_none(), "they were dropped, too");
}
