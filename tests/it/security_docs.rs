//! Every command of docs/security.md, in its order, on a server with TLS, passwords and a pooler.

use std::fs;
use std::process::Command;

use lastprice::{Client, ErrorKind, KeyRing, NewTenant, StatementMode};
use lastprice_testkit::PrivateCluster;

use crate::audit_doctor::doctor;
use crate::support_docs::{blocks, run_all};
use crate::support_pooler::{Process, answers, beside, pgbouncer};
use crate::support_shop::assert_isolated;
use crate::support_sql::{program, skipped};

const DOCUMENT: &str = include_str!("../../docs/security.md");

#[tokio::test]
async fn every_command_does_what_is_said() {
    let (Some(_), Some(doctor)) = (program("psql"), doctor()) else { return };
    if Command::new("openssl").arg("version").output().is_err() {
        skipped("openssl is not installed");
        return;
    }
    let cluster = PrivateCluster::builder().tls().start().await.unwrap();
    // The document makes the roles and the schema itself.
    let database = cluster.database_builder().empty().create().await.unwrap();
    database.connect_superuser().await.unwrap().batch_execute("DROP ROLE IF EXISTS lastprice_app").await.ok();
    let mut shell = Command::new("bash");
    shell.current_dir(env!("CARGO_MANIFEST_DIR"));
    for (name, role) in
        [("ADMIN_URL", "postgres"), ("OWNER_URL", "shop_owner"), ("SERVICE_URL", "shop_service")]
    {
        shell.env(name, database.url_for(role));
    }
    shell.env("CA_FILE", cluster.ca_cert_path());
    let stdout = run_all(DOCUMENT, "echo \"LASTPRICE_KEYS=$LASTPRICE_KEYS\"", &doctor, &mut shell).out;

    // The key that the document makes is one, and what the document set up is isolated.
    let (_, keys) = stdout.split_once("LASTPRICE_KEYS=").unwrap();
    let ring: KeyRing = keys.lines().next().unwrap().parse().unwrap();
    let service = Client::builder().url(database.url_for("shop_service")).require_app_role();
    assert_isolated(&service.keys(ring).build().unwrap()).await;
}

#[tokio::test]
async fn the_pooler_that_is_described_works_as_described() {
    let Some(pgbouncer) = pgbouncer() else { return };
    let [ini] = blocks(DOCUMENT, "ini")[..] else { panic!("one pooler is described") };
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let (dir, name) = (cluster.socket_dir(), database.name());
    let ours = |described: &str, here: String| {
        assert!(ini.contains(described), "{ini}");
        (described.to_owned(), here)
    };
    let place = dir.display();
    let mut here = ini.to_owned();
    for (described, is) in [
        ours(
            "shop = host=db.internal port=5432 dbname=shop",
            format!("{name} = host={place} port={} dbname={name}", cluster.port()),
        ),
        ours("listen_addr = *", format!("unix_socket_dir = {place}")),
    ] {
        here = here.replace(&described, &is);
    }
    fs::write(dir.join("pgbouncer.ini"), here).unwrap();
    fs::write(dir.join("users.txt"), "\"lastprice_service\" \"\"\n").unwrap();
    let _pooler = Process::start(&cluster, "TERM", &pgbouncer, &["pgbouncer.ini"]);
    let url = beside(&cluster, &database, 6432);
    answers(&cluster, &pgbouncer, &url).await;

    let client = || Client::builder().url(&url).require_app_role();
    assert_isolated(&client().statement_mode(StatementMode::Typed).build().unwrap()).await;
    let refused = client().build().unwrap();
    let new = NewTenant::managed("Acme", "ops@acme.example");
    let refused = refused.create_tenant(new).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::IsolationNotEnforced, "{refused:?}");
    assert!(refused.to_string().contains("StatementMode::Typed"), "{refused}");
}
