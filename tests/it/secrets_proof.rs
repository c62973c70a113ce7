//! The proof: a server that logs all it can, every operation with secrets, and no secret anywhere.

use lastprice::secrecy::SecretString;
use lastprice::{Admin, Client, Error, ErrorKind, KeyRing, NewTenant, Plan, SecretKeys, TenantChange};
use lastprice_testkit::{PrivateCluster, Server};

use crate::support_repo::*;
use crate::support_sql::skipped;

const PASSPHRASE: &str = "marker-passphrase";
const RAW: &[u8; 32] = b"marker-key-of-thirty-two-bytes!!";
const BASE64: &str = "bWFya2VyLWtleS1vZi10aGlydHktdHdvLWJ5dGVzISE=";
const HEX: &str = "6d61726b65722d6b65792d6f662d7468697274792d74776f2d62797465732121";

/// All begins with it: secrets, passphrase and key.
const MARKER: &str = "marker-";
/// The same in hex, and in base64 wherever it begins.
const DISGUISES: [&str; 5] = ["6d61726b65722d", "bWFya2Vy", "1hcmtlci", "tYXJrZXIt", HEX];

#[tokio::test]
async fn no_secret_reaches_the_servers_log_its_statistics_or_an_error() {
    let major: u32 = Server::find().unwrap().version().split('.').next().unwrap().parse().unwrap();
    let library = Server::find().unwrap();
    let statistics = ["../lib/pg_stat_statements.so", "../lib/postgresql/pg_stat_statements.so"]
        .iter()
        .any(|place| library.bindir().join(place).exists());
    let mut builder = PrivateCluster::builder()
        .setting("log_statement", "all")
        .setting("log_min_duration_statement", "0")
        .setting("log_min_messages", "debug1")
        .setting("track_activity_query_size", "65536");
    if major >= 13 {
        builder = builder.setting("log_parameter_max_length_on_error", "-1");
    }
    if statistics {
        builder = builder.setting("shared_preload_libraries", "pg_stat_statements");
    } else {
        skipped("pg_stat_statements is not installed: that part");
    }
    let cluster = builder.start().await.unwrap();
    let two = two_tenants_in(cluster.database().await.unwrap()).await;
    let superuser = two.database.connect_superuser().await.unwrap();
    if statistics {
        superuser.batch_execute("CREATE EXTENSION pg_stat_statements").await.unwrap();
    }
    let legacy = superuser.batch_execute("CREATE EXTENSION IF NOT EXISTS pgcrypto").await.is_ok();

    // What the original did, and what puts the markers there: before the log is looked at.
    let plain = "UPDATE tenants SET webhook_secret = 'marker-plain' WHERE id = $1";
    superuser.execute(plain, &[&two.id.uuid()]).await.unwrap();
    if legacy {
        let sql = "UPDATE tenants SET mode = 'byok', paid_api_key = pgp_sym_encrypt('marker-legacy', 'marker-passphrase')::text
                   WHERE id = $1";
        superuser.execute(sql, &[&two.id.uuid()]).await.unwrap();
    } else {
        skipped("pgcrypto is not installed: that part");
    }
    superuser.batch_execute("ALTER TABLE tenants ADD CONSTRAINT no_pro CHECK (plan <> 'pro')").await.unwrap();
    // Of a statement like this one, the statistics keep the constants.
    superuser.batch_execute("COMMENT ON CONSTRAINT no_pro ON tenants IS 'marker-comment'").await.unwrap();
    assert!(cluster.log().contains(MARKER), "the check cannot fail");
    assert_eq!(found(&superuser, statistics).await, statistics, "the check of the statistics cannot fail");
    if statistics {
        superuser.batch_execute("SELECT pg_stat_statements_reset()").await.unwrap();
    }
    let start = cluster.log().len();

    let keys = SecretKeys::from(
        format!("proof:{BASE64}").parse::<KeyRing>().unwrap().and_reading("test", [7; 32]).unwrap(),
    )
    .legacy_passphrase(PASSPHRASE);
    let builder = Client::builder().url(two.database.app_url()).require_app_role().keys(keys.clone());
    let builder = builder.paid_api_key("marker-platform");
    let mut said = format!("{builder:?} {keys:?} {:?}", KeyRing::new("proof", *RAW).unwrap());
    let client = builder.build().unwrap();
    let acme = client.tenant(two.id);
    let mut failed = |error: Error| {
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(now) = cause {
            said += &format!("{now} {now:?}\n");
            cause = now.source();
        }
    };
    if legacy {
        assert_eq!(own_key(&acme).await.as_deref(), Some("marker-legacy"));
    }
    failed(is_kind(acme.tenants().webhook_secrets().await, ErrorKind::SecretUnavailable));
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let report = admin.rewrap_secrets(&keys, |_| ()).await.unwrap();
    assert_eq!(report.total.rewrapped, 2 + u64::from(legacy));
    assert_eq!(acme.tenants().webhook_secrets().await.unwrap().len(), 1);

    let hooks = || ["marker-hook-1", "marker-hook-2"].map(SecretString::from);
    let change = || TenantChange::new().byok("marker-own").webhook_secrets(hooks());
    let new = || NewTenant::byok("Hooli", "h@h.example", "marker-new").webhook_secrets(hooks());
    acme.tenants().update(change()).await.unwrap();
    client.create_tenant(new()).await.unwrap();
    failed(is_kind(client.create_tenant(new()).await, ErrorKind::Conflict));
    failed(is_kind(acme.tenants().update(change().plan(Plan::Pro)).await, ErrorKind::InvalidInput));
    failed(is_kind(client.create_tenant(new().plan(Plan::Pro)).await, ErrorKind::InvalidInput));
    let bad = [SecretString::from("marker-\n")];
    failed(refused(acme.tenants().update(change().webhook_secrets(bad)).await, "webhook_secrets"));
    failed(format!("proof:{}", &BASE64[1..]).parse::<KeyRing>().unwrap_err());
    failed(format!("a:{BASE64},b:{BASE64}").parse::<KeyRing>().unwrap_err());
    failed(is_kind(two.acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable));
    let transaction = acme.begin().await.unwrap();
    transaction.tenants().update(change()).await.unwrap();
    let credentials = transaction.tenants().paid_credentials().await.unwrap();
    transaction.commit().await.unwrap();
    said += &format!("{credentials:?} {report:?} {:?} {:?} {client:?} {admin:?}", new(), change());

    let log = cluster.log();
    let log = &log[start..];
    assert!(log.contains("lp1:proof:"), "what is stored is logged, so that what is not would be");
    for marker in DISGUISES.iter().chain([&MARKER, &BASE64]) {
        let line = log.lines().find(|line| line.contains(marker));
        assert!(line.is_none(), "{marker} is in the log: {line:?}");
        assert!(!said.contains(marker), "{marker} is in: {said}");
    }
    assert!(!found(&superuser, statistics).await, "in the statistics, or in a session's last query");
    superuser.execute("SELECT $1::text", &[&"marker-deliberate"]).await.unwrap();
    assert!(cluster.log()[start..].contains("marker-deliberate"), "the check cannot fail");
}

/// In the statistics or in any session's last statement.
async fn found(superuser: &lastprice::tokio_postgres::Client, statistics: bool) -> bool {
    let mut queries = "SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()".to_owned();
    if statistics {
        queries += " UNION ALL SELECT query FROM pg_stat_statements";
    }
    let rows = superuser.query(&queries, &[]).await.unwrap();
    let all: Vec<String> = rows.iter().filter_map(|row| row.get(0)).collect();
    let looks = |text: &String| DISGUISES.iter().chain([&MARKER]).any(|marker| text.contains(marker));
    all.iter().any(looks)
}
