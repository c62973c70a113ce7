//! Our migrations by other people's tools, as docs/migrations.md says: the same definitions, once, and the crate works with them.
//! What comes from npm is installed by `scripts/check-migrations`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use lastprice::{Admin, Client};
use lastprice_testkit::{PrivateCluster, TestDatabase};

use crate::support_shop::assert_isolated;
use crate::support_sql::*;

const DOCUMENT: &str = include_str!("../../docs/migrations.md");
const MIGRATIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");

/// The files in their order, by their names.
fn files() -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(MIGRATIONS)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort_by_key(|name| number(name));
    files
}

fn number(name: &str) -> i32 {
    name[1..].split_once("__").unwrap().0.parse().unwrap()
}

/// The only block of a language below a heading of the document.
fn block(heading: &str, language: &str) -> &'static str {
    let section = DOCUMENT.split("\n## ").find(|section| section.starts_with(heading)).unwrap();
    let (_, rest) = section.split_once(&format!("```{language}\n")).unwrap();
    rest.split_once("\n```").unwrap().0
}

/// A project that has our files and the tools.
struct Project {
    dir: TemporaryDir,
    tools: Option<PathBuf>,
}

impl Project {
    fn new(test: &str, tools: Option<PathBuf>) -> Project {
        let project = Project { dir: TemporaryDir::new(test), tools };
        for place in ["lastprice", "migrations"] {
            fs::create_dir_all(project.dir.0.join(place)).unwrap();
        }
        for name in files() {
            fs::copy(Path::new(MIGRATIONS).join(&name), project.dir.0.join("lastprice").join(&name)).unwrap();
        }
        fs::copy(schema_sql(), project.dir.file("schema.sql")).unwrap();
        if let Some(tools) = &project.tools {
            std::os::unix::fs::symlink(tools.join("node_modules"), project.dir.0.join("node_modules"))
                .unwrap();
        }
        project
    }

    /// One with the tools of npm; `None` skips the test.
    fn with_npm(test: &str) -> Option<Project> {
        let Some(tools) = std::env::var_os("LASTPRICE_MIGRATION_TOOLS") else {
            skipped("scripts/check-migrations was not used, which installs the tool");
            return None;
        };
        Some(Project::new(test, Some(tools.into())))
    }

    /// The migration that the document shows for the first file, for each of the files; `name` has a `{}` for its number.
    fn write_migrations(&self, heading: &str, name: &str) {
        let first = block(heading, "js");
        assert!(first.contains("V1__initial.sql"));
        for file in files() {
            let path =
                self.dir.file(&format!("migrations/{}", name.replace("{}", &number(&file).to_string())));
            fs::write(path, first.replace("V1__initial.sql", &file)).unwrap();
        }
    }

    fn sh(&self, url: &str, commands: &str) -> Ran {
        let mut shell = Command::new("bash");
        shell.args(["-euc", commands]).current_dir(&self.dir.0).env("DATABASE_URL", url);
        // Into files: of what a pipe cannot take at once, node loses the rest when it exits.
        let [out, err] = ["out", "err"].map(|name| self.dir.file(name));
        shell.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let ran = run(shell.env("npm_config_update_notifier", "false"));
        let [out, err] = [out, err].map(|path| fs::read_to_string(path).unwrap());
        Ran { out, err, ..ran }
    }
}

/// By TCP, since not every tool knows sockets; with a database of the name `shop_<n>` that holds nothing, and the service.
struct Server {
    cluster: PrivateCluster,
    reference: String,
    pg_dump: PathBuf,
}

impl Server {
    async fn start() -> Option<Server> {
        let pg_dump = program("pg_dump")?;
        program("psql")?;
        let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
        let reference = definitions(&pg_dump, &cluster.database().await.unwrap().owner_url());
        Some(Server { cluster, reference, pg_dump })
    }

    async fn empty(&self) -> TestDatabase {
        self.cluster.database_builder().empty().create().await.unwrap()
    }

    /// What the tool has left is what we install, but for its own history; the crate takes it, and so does `schema.sql`.
    async fn assert_installed(&self, database: &TestDatabase, history: &str) {
        let owner = database.connect_owner().await.unwrap();
        let version: i32 = owner.query_one("SELECT lastprice_schema_version()", &[]).await.unwrap().get(0);
        assert_eq!(usize::try_from(version).unwrap(), files().len());
        let migration = Admin::connect(&database.owner_url()).await.unwrap().migrate().await.unwrap();
        let version = u32::try_from(version).unwrap();
        assert_eq!((migration.from, migration.to), (Some(version), version));
        owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
        let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
        assert_isolated(&client).await;
        let audit = client.verify_isolation().await.unwrap();
        assert!(audit.is_clean(), "{audit}");
        if !history.is_empty() {
            owner.batch_execute(&format!("DROP TABLE {history}")).await.unwrap();
        }
        let found = definitions(&self.pg_dump, &database.owner_url());
        assert!(found == self.reference, "{found}");
    }
}

/// refinery's and Flyway's, without Flyway's placeholders, and all there.
#[test]
fn the_files_are_named_and_written_as_tools_want_them() {
    for (file, expected) in files().iter().zip(1..) {
        assert_eq!(number(file), expected, "{file}");
        let (_, rest) = file.split_once("__").unwrap();
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(file.starts_with('V') && rest.strip_suffix(".sql").unwrap().chars().all(plain), "{file}");
        let text = fs::read_to_string(Path::new(MIGRATIONS).join(file)).unwrap();
        assert!(text.is_ascii() && !text.contains("${"), "{file}");
        assert!(!text.lines().any(|line| line.starts_with('\\')), "{file}: no psql commands");
        assert!(!text.contains("\nBEGIN;") && !text.contains("\nCOMMIT;"), "{file}: the tool's transaction");
    }
}

#[tokio::test]
async fn by_psql() {
    let Some(server) = Server::start().await else { return };
    let project = Project::new("by_psql", None);
    for language in ["sh", "sh-files"] {
        let database = server.empty().await;
        let install = || project.sh(&database.owner_url(), block("psql", language));
        install().expect_ok();
        let again = install();
        if language == "sh" {
            again.expect_ok();
        } else {
            again.expect_refusal(&["lastprice_schema_version", "already exists"]);
        }
        server.assert_installed(&database, "").await;
    }
}

#[tokio::test]
async fn by_node_pg_migrate() {
    let tool = "node-pg-migrate";
    let Some(project) = Project::with_npm(tool) else { return };
    let Some(server) = Server::start().await else { return };
    project.write_migrations(tool, "000{}_lastprice.cjs");
    let database = server.empty().await;
    project.sh(&database.owner_url(), block(tool, "sh")).expect_ok();
    let again = project.sh(&database.owner_url(), block(tool, "sh")).expect_ok();
    assert!(again.contains("No migrations to run!"), "{again}");
    server.assert_installed(&database, "pgmigrations").await;

    // Over what we have installed it stops, and changes nothing, unless it is told.
    let adopted = server.cluster.database().await.unwrap();
    project.sh(&adopted.owner_url(), block(tool, "sh")).expect_refusal(&["already exists"]);
    project.sh(&adopted.owner_url(), block(tool, "sh-adopt")).expect_ok();
    let again = project.sh(&adopted.owner_url(), block(tool, "sh")).expect_ok();
    assert!(again.contains("No migrations to run!"), "{again}");
    server.assert_installed(&adopted, "pgmigrations").await;

    let other = server.empty().await;
    project.sh(&other.owner_url(), block(tool, "sh-schema")).expect_ok();
    let client = Client::builder().url(other.app_url()).schema("pricing").require_app_role().build().unwrap();
    assert_isolated(&client).await;
    let audit = client.verify_isolation().await.unwrap();
    assert!(audit.is_clean(), "{audit}");
}

#[tokio::test]
async fn by_db_migrate() {
    let tool = "db-migrate";
    let Some(project) = Project::with_npm(tool) else { return };
    let Some(server) = Server::start().await else { return };
    project.write_migrations(tool, "0000000000000{}-lastprice.js");
    let database = server.empty().await;
    project.sh(&database.owner_url(), block(tool, "sh")).expect_ok();
    let again = project.sh(&database.owner_url(), block(tool, "sh")).expect_ok();
    assert!(again.contains("No migrations to run"), "{again}");
    server.assert_installed(&database, "migrations").await;

    let adopted = server.cluster.database().await.unwrap();
    project.sh(&adopted.owner_url(), block(tool, "sh")).expect_refusal(&["already exists"]);
    project.sh(&adopted.owner_url(), block(tool, "sh-adopt")).expect_ok();
    let again = project.sh(&adopted.owner_url(), block(tool, "sh")).expect_ok();
    assert!(again.contains("No migrations to run"), "{again}");
    server.assert_installed(&adopted, "migrations").await;
}
