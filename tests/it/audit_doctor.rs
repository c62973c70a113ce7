//! The example `doctor`: its exit codes, and that it prints no password.

use std::path::PathBuf;
use std::process::Command;

use lastprice_testkit::TestDatabase;

use crate::support_sql::{run, skipped};

/// `cargo test` builds the examples, too; beside the folder of the tests.
pub(crate) fn doctor() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let doctor = test.ancestors().nth(2).unwrap().join("examples/doctor");
    if doctor.exists() { Some(doctor) } else { skipped("the example doctor was not built") }
}

#[tokio::test]
async fn the_doctor_says_how_it_is_by_its_exit_code() {
    let Some(doctor) = doctor() else { return };
    let database = TestDatabase::new().await.unwrap();
    let secret = "hunter-2-is-not-shown";
    let ask = |url: String, schema: &str| {
        let url = url.replacen('@', &format!(":{secret}@"), 1);
        let output = Command::new(&doctor).arg(schema).env("DATABASE_URL", url).output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!said.contains(secret), "{said}");
        (output.status.code(), said)
    };
    let (code, said) = ask(database.app_url(), "public");
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = ask(database.owner_url(), "public");
    assert!(code == Some(1) && said.contains("role_is_owner"), "{said}");
    let (code, said) = ask(database.app_url(), "nowhere");
    assert!(code == Some(2) && said.contains("does not hold lastprice"), "{said}");
    let (code, said) = ask(format!("{}?host=/nowhere", "postgres://svc@/db"), "public");
    assert!(code == Some(2) && said.contains("cannot be reached"), "{said}");
    run(Command::new(&doctor).env_remove("DATABASE_URL")).expect_ok();
}
