//! Every command of docs/upgrade.md, on a database that was filled through the original's SQL.

use std::process::Command;

use lastprice::Client;
use lastprice_testkit::TestDatabase;

use crate::support_docs::blocks;
use crate::support_shop::assert_isolated;
use crate::support_sql::*;
use crate::upgrade::{DATA, ORIGINAL, login};

const DOCUMENT: &str = include_str!("../../docs/upgrade.md");

#[tokio::test]
async fn every_command_does_what_is_said() {
    let (Some(psql), Some(_)) = (program("psql"), program("pg_dump")) else { return };
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let superuser = database.connect_superuser().await.unwrap();
    if superuser.batch_execute("CREATE EXTENSION IF NOT EXISTS pgcrypto").await.is_err() {
        skipped("pgcrypto is not installed");
        return;
    }
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute(ORIGINAL).await.unwrap();
    owner.batch_execute(DATA).await.unwrap();

    let dir = TemporaryDir::new("upgrade");
    std::fs::create_dir_all(dir.file("upgrade")).unwrap();
    let files = [
        "schema.sql",
        "upgrade/move-original.sql",
        "upgrade/from-original.sql",
        "upgrade/back-to-original.sql",
    ];
    for file in files {
        std::fs::copy(format!("{}/{file}", env!("CARGO_MANIFEST_DIR")), dir.file(file)).unwrap();
    }
    let path = format!("{}:{}", psql.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
    let sh = |command: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-e", "-c", command])
            .current_dir(&dir.0)
            .env("PATH", &path)
            .env("OWNER_URL", database.owner_url());
        run(&mut sh).expect_ok()
    };
    let [backup, upgrade, look, drop, back] = blocks(DOCUMENT, "sh")[..] else { panic!("four commands") };
    sh(backup);
    assert!(std::fs::metadata(dir.file("before-lastprice.dump")).unwrap().len() > 10_000);
    let said = sh(upgrade);
    assert!(said.contains("revenue in USD") && said.contains("its revenue is negative: a refund"), "{said}");
    let said = sh(look);
    assert!(said.contains("Seats") && said.contains("there is no such experiment"), "{said}");

    // There and back, and there again.
    sh(back);
    assert_eq!(rows(&owner, "SELECT FROM assignments WHERE variant = 'removed'").await.unwrap().len(), 1);
    assert!(refusal(owner.batch_execute("SELECT FROM original.tenants").await).2.contains("does not exist"));
    let said = sh(upgrade);
    assert!(said.contains("revenue in USD"), "{said}");
    sh(drop);
    assert!(refusal(owner.batch_execute("SELECT FROM original.tenants").await).2.contains("does not exist"));

    // And a service goes on from there.
    login(&database).await;
    let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
    client.verify_isolation().await.unwrap().into_result().unwrap();
    assert_isolated(&client).await;
}
