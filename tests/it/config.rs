//! How a client is told where the database is, and what it tells about that.

use std::process::Command;
use std::time::Duration;

use lastprice::{Admin, Client, ClientBuilder, ErrorKind, SslMode};
use lastprice_testkit::PrivateCluster;

use crate::support_shop::{all_of, assert_isolated};

#[test]
fn every_option_is_checked_and_named() {
    let url = || Client::builder().url("postgres://service@db.internal/shop");
    url().build().unwrap();
    let refused: Vec<(&str, ClientBuilder)> = vec![
        ("url", Client::builder().url("")),
        ("url", Client::builder().url("mysql://db.internal/shop")),
        ("url", Client::builder().url("postgres://service@db.internal:port/shop")),
        ("url", Client::builder().url("postgres://service@db.internal/shop?sslmode=none")),
        ("pool_size", url().pool_size(0)),
        ("acquire_timeout", url().acquire_timeout(Duration::ZERO)),
        ("connect_timeout", url().connect_timeout(Duration::ZERO)),
        ("statement_timeout", url().statement_timeout(Duration::ZERO)),
        ("statement_timeout", url().statement_timeout(Duration::from_micros(999))),
        ("statement_timeout", url().statement_timeout(Duration::from_millis(1 << 31))),
        ("schema", url().schema("")),
        ("schema", url().schema("s".repeat(64))),
        ("schema", url().schema("a\0b")),
        ("application_name", url().application_name("a\0b")),
        ("sslrootcert", url().ssl_mode(SslMode::VerifyFull).ssl_root_cert("/nonexistent/root.pem")),
        ("ssl_mode", url().ssl_mode(SslMode::Require).ssl_root_cert("system")),
    ];
    for (option, builder) in refused {
        let error = builder.clone().build().expect_err(option);
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some(option)), "{error:?}");
        assert!(error.to_string().contains(&format!("`{option}`")), "{error}");
    }
    for builder in [
        url().statement_timeout(None),
        url().statement_timeout(Duration::from_millis(1)),
        url().statement_timeout(Duration::from_millis((1 << 31) - 1)),
        url().acquire_timeout(Duration::from_nanos(1)),
        url().pool_size(1),
        url().schema("ä\" b"),
        url().application_name(""),
    ] {
        builder.build().unwrap();
    }
}

#[tokio::test]
async fn options_reach_the_server() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    let named = database.app_url() + if database.app_url().contains('?') { "&" } else { "?" };
    let named = named + "application_name=from-the-url";
    for (expected, builder) in [
        ("lastprice", Client::builder().url(database.app_url())),
        ("from-the-url", Client::builder().url(&named)),
        ("checkout", Client::builder().url(&named).application_name("checkout")),
    ] {
        let client = builder.build().unwrap();
        assert_isolated(&client).await;
        let seen =
            "SELECT DISTINCT application_name FROM pg_stat_activity WHERE usename = 'lastprice_service'";
        assert_eq!(server.query_one(seen, &[]).await.unwrap().get::<_, &str>(0), expected);
        client.close().await;
        let rest = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'lastprice_service'";
        while server.query_one(rest, &[]).await.unwrap().get::<_, i64>(0) > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test]
async fn a_password_is_never_shown() {
    const RIGHT: &str = "correct-horse-battery";
    const WRONG: &str = "hunter2-is-not-it";
    let cluster = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    for role in ["lastprice_service", "lastprice_owner"] {
        server.batch_execute(&format!("ALTER ROLE {role} PASSWORD '{RIGHT}'")).await.unwrap();
    }
    let with = |url: String, password: &str| {
        let given = format!(":{}@", PrivateCluster::PASSWORD);
        assert!(url.contains(&given));
        url.replace(&given, &if password.is_empty() { "@".to_owned() } else { format!(":{password}@") })
    };

    let builder = Client::builder().url(with(database.app_url(), RIGHT));
    let client = builder.clone().build().unwrap();
    let shown = format!("{client:?} {client:#?} {builder:?} {builder:#?}");
    assert_isolated(&client).await;
    let admin = Admin::connect(&with(database.owner_url(), RIGHT)).await.unwrap();
    let shown = format!("{shown} {client:?} {admin:?} {admin:#?}");
    assert!(shown.contains("127.0.0.1") && shown.contains("lastprice_service"), "{shown}");
    assert!(!shown.contains(RIGHT), "{shown}");

    for password in [WRONG, ""] {
        let client = Client::builder().url(with(database.app_url(), password)).build().unwrap();
        let expected = if password.is_empty() { ErrorKind::InvalidInput } else { ErrorKind::Unavailable };
        for refused in [
            client.ready().await.unwrap_err(),
            Admin::connect(&with(database.owner_url(), password)).await.unwrap_err(),
        ] {
            assert_eq!(refused.kind(), expected, "{refused:?}");
            assert!(!refused.is_retryable(), "the same password will not be right: {refused:?}");
            let shown = all_of(&refused) + &format!("{client:?}");
            assert!(!shown.contains(WRONG), "{shown}");
        }
    }
}

/// Run by the test below, in a process with an environment of its own.
#[tokio::test]
#[ignore = "a part of `a_client_from_the_environment`"]
async fn from_the_environment() {
    let verdict = async { Client::from_env()?.ready().await }.await;
    println!("verdict: {}", verdict.map_or_else(|e| all_of(&e), |()| "ready".to_owned()));
}

#[tokio::test]
async fn a_client_from_the_environment() {
    let cluster = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let port = cluster.port().to_string();
    let url = database.app_url();
    let word = PrivateCluster::PASSWORD;
    let apart = [
        ("DB_HOST", "127.0.0.1"),
        ("DB_PORT", &port),
        ("DB_NAME", database.name()),
        ("DB_USER", "lastprice_service"),
    ];
    let with = |more: &[(&'static str, &'static str)]| [&apart[..], more].concat();

    for vars in [
        vec![("DATABASE_URL", url.as_str())],
        vec![("DATABASE_URL", url.as_str()), ("DB_HOST", "not-this-one.invalid")],
        with(&[("DB_PASSWORD", word)]),
        with(&[("DB_PASSWORD", word), ("DB_SSLMODE", "disable"), ("DATABASE_URL", "")]),
    ] {
        assert_eq!(verdict(&vars), "ready", "{vars:?}");
    }
    for (vars, says) in [
        (vec![], "`DATABASE_URL` is not set, and neither is `DB_HOST`"),
        (vec![("DB_HOST", "127.0.0.1")], "`DB_NAME`"),
        (with(&[("DB_PASSWORD", word), ("DB_PORT", "many")]), "`DB_PORT`"),
        (with(&[("DB_PASSWORD", word), ("DB_SSLMODE", "strict")]), "`DB_SSLMODE`"),
        (with(&[("DB_PASSWORD", "hunter2-is-not-it")]), "28P01"),
        (vec![("DATABASE_URL", "postgres://service:hunter2-is-not-it@db:port/")], "`DATABASE_URL`"),
    ] {
        let verdict = verdict(&vars);
        assert!(verdict.contains(says) && !verdict.contains("hunter2"), "{vars:?}: {verdict}");
    }
}

/// What `from_the_environment` prints in a process that has these variables, and no others of ours.
fn verdict(vars: &[(&str, &str)]) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["config::from_the_environment", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("DB_") || text.starts_with("PG") || text.ends_with("DATABASE_URL") {
            child.env_remove(&name);
        }
    }
    let output = child.envs(vars.iter().copied()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed} {}", String::from_utf8_lossy(&output.stderr));
    let (_, verdict) = printed.split_once("verdict: ").expect("it ran");
    let (verdict, _) = verdict.split_once("\ntest result").unwrap_or((verdict, ""));
    verdict.lines().next().map_or("", |line| if line == "ready" { line } else { verdict }).to_owned()
}
