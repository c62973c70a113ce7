//! Helpers of the tests that speak SQL: the programs beside the server, two tenants, a seeded generator, and the
//! check that the metrics are exact.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use lastprice_testkit::Server;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage, error::SqlState};

/// Two tenants, and an active experiment of each.
pub(crate) const A: &str = "aaaaaaaa-0000-4000-8000-000000000000";
pub(crate) const B: &str = "bbbbbbbb-0000-4000-8000-000000000000";
pub(crate) const XA: &str = "aaaaaaaa-0000-4000-8000-000000000001";
pub(crate) const XB: &str = "bbbbbbbb-0000-4000-8000-000000000001";

/// Two arms; the first costs 10, the second 12.5.
pub(crate) const ARMS: &str =
    r#"[{"name": "a", "weight": 1, "price": "10"}, {"name": "b", "weight": 1, "price": 12.5}]"#;

pub(crate) fn schema_sql() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/schema.sql")
}

/// One of PostgreSQL's programs; `None` skips the test, and says so. Beside the server, or a client program of another
/// version, which `PATH` has: `psql` gets on with all of them, a dump is made by programs as new as the server.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let server = match Server::find() {
        Ok(server) => server,
        Err(error) => return skipped(&format!("{name}: {error}")),
    };
    if let Some(path) = server.program(name) {
        return Some(path);
    }
    let clients = ["psql", "createdb", "pg_dump", "pg_dumpall", "pg_restore"];
    let path = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|dir| dir.join(name))
        .find(|path| clients.contains(&name) && path.is_file());
    let Some(path) = path else { return skipped(&format!("{name} is not installed beside the server")) };
    // "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let major = |text: &str| text.split('.').next()?.parse::<u32>().ok();
    let said = run(Command::new(&path).arg("--version")).out;
    let version = said.split_once("(PostgreSQL) ").and_then(|(_, rest)| major(rest)).unwrap_or(0);
    let wanted = major(server.version()).unwrap_or(0);
    let fits = match name {
        "psql" | "createdb" => true,
        _ => version >= wanted,
    };
    if !fits {
        return skipped(&format!("{name} is of version {version}, the server of {wanted}"));
    }
    Some(path)
}

/// The version of the server as a number: 150018 is 15.18.
pub(crate) async fn version_num(client: &Client) -> i32 {
    value(&rows(client, "SHOW server_version_num").await.unwrap()).parse().unwrap()
}

/// Said past the test runner, which shows what a test prints only when it fails.
pub(crate) fn skipped(why: &str) -> Option<PathBuf> {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
    None
}

/// What a program did.
pub(crate) struct Ran {
    pub(crate) ok: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    #[track_caller]
    pub(crate) fn expect_ok(self) -> String {
        assert!(self.ok, "{}\n{}", self.err, self.out);
        self.out
    }

    #[track_caller]
    pub(crate) fn expect_refusal(self, words: &[&str]) {
        assert!(!self.ok, "it should have been refused: {}", self.out);
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in:\n{}", self.err);
        }
    }
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let output = command.env("LC_ALL", "C").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { ok: output.status.success(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// `psql -d url …`, which stops at the first error; `options` are settings, as in `PGOPTIONS`.
pub(crate) fn psql(psql: &Path, url: &str, options: &str, args: &[&str]) -> Ran {
    let mut command = Command::new(psql);
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url]).args(args);
    run(command.env("PGOPTIONS", options))
}

/// The definitions in a database, as `pg_dump` writes them; but for the random `\restrict` lines.
pub(crate) fn definitions(pg_dump: &Path, url: &str) -> String {
    let dump = run(Command::new(pg_dump).args(["--schema-only", "-d", url])).expect_ok();
    let keep = |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
    dump.lines().filter(keep).map(|line| line.to_owned() + "\n").collect()
}

/// A folder that is removed again.
pub(crate) struct TemporaryDir(pub(crate) PathBuf);

impl TemporaryDir {
    pub(crate) fn new(name: &str) -> TemporaryDir {
        let dir = std::env::temp_dir().join(format!("lastprice-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        TemporaryDir(dir)
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// As the owner: the tenants [`A`] and [`B`], each with an active experiment of two arms in USD.
pub(crate) async fn two_tenants(owner: &Client) {
    owner
        .batch_execute(&format!(
            "INSERT INTO tenants (id, name, email) VALUES ('{A}', 'A', 'a@example.com'), ('{B}', 'B', 'b@example.com');
             INSERT INTO experiments (tenant_id, id, key, name, status, variants) VALUES
               ('{A}', '{XA}', 'x', 'X of A', 'active', '{ARMS}'), ('{B}', '{XB}', 'x', 'X of B', 'active', '{ARMS}')"
        ))
        .await
        .unwrap();
}

/// A transaction of a tenant, committed.
pub(crate) async fn as_tenant(
    client: &Client,
    tenant: &str,
    sql: &str,
) -> Result<Vec<Vec<Option<String>>>, tokio_postgres::Error> {
    client.batch_execute("BEGIN").await?;
    client.simple_query(&format!("SELECT app_set_tenant('{tenant}')")).await?;
    let result = rows(client, sql).await;
    client.batch_execute(if result.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
    result
}

/// The rows of some statements, as text.
pub(crate) async fn rows(
    client: &Client,
    sql: &str,
) -> Result<Vec<Vec<Option<String>>>, tokio_postgres::Error> {
    let messages = client.simple_query(sql).await?;
    let texts = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect::<Vec<_>>())
        }
        _ => None,
    });
    Ok(texts.collect())
}

/// The first column of the first row, as text.
#[track_caller]
pub(crate) fn value(rows: &[Vec<Option<String>>]) -> &str {
    rows[0][0].as_deref().unwrap_or("NULL")
}

/// SQLSTATE, name of the constraint and message of an error.
#[track_caller]
pub(crate) fn refusal<T>(result: Result<T, tokio_postgres::Error>) -> (SqlState, String, String) {
    let Err(error) = result else { panic!("it should have been refused") };
    let db = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (db.code().clone(), db.constraint().unwrap_or_default().to_owned(), db.message().to_owned())
}

/// SplitMix64: the same numbers for the same seed, everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A new seed every time, unless `LASTPRICE_SEED` says which.
    pub(crate) fn seed() -> u64 {
        match std::env::var("LASTPRICE_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => u64::from_le_bytes(uuid::Uuid::new_v4().as_bytes()[..8].try_into().unwrap()),
        }
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub(crate) fn one_of<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Totals and pending deltas together are a recount of the events, per everything they are kept by; and no day,
/// variant or currency is counted that has no event. Says how many counts differ, and shows some.
pub(crate) async fn assert_exact(superuser: &Client, when: &str) {
    let differing = rows(superuser, DIFFERENCE).await.unwrap();
    assert!(differing.is_empty(), "{when}: {} counts differ: {:#?}", differing.len(), &differing[..1]);
}

/// Not the query of `recount_experiment_metrics()`: each event is a row of its own until the very last.
const DIFFERENCE: &str = "
    WITH event AS (
      SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX'::text AS currency,
             date_trunc('day', assigned_at, 'UTC') AS day, 1 AS a, 0 AS v, 0 AS c, 0 AS w, 0 AS b, 0.0 AS r FROM assignments
      WHERE merged_into IS NULL
      UNION ALL
      SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', date_trunc('day', occurred_at, 'UTC'), 0, 1, 0, 0, 0, 0 FROM views
      UNION ALL
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, date_trunc('day', occurred_at, 'UTC'),
             0, 0, (kind = 'sale')::int, (kind = 'renewal')::int, (kind = 'refund' OR kind = 'chargeback')::int, revenue FROM conversions
      UNION ALL
      SELECT tenant_id, experiment_id, phase, variant, reason, 'XXX', day::timestamp AT TIME ZONE 'UTC', assignments, views, 0, 0, 0, 0
      FROM metric_baselines
    ), counted AS (
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views, conversions, renewals, refunds, revenue FROM metric_totals
      UNION ALL
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views, conversions, renewals, refunds, revenue FROM metric_deltas
    ), both_sides AS (
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, (day AT TIME ZONE 'UTC')::date AS day, a, v, c, w, b, r FROM event
      UNION ALL
      SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, -assignments, -views, -conversions, -renewals, -refunds, -revenue FROM counted
    )
    SELECT tenant_id, experiment_id, phase, variant, reason, currency, day,
           'missing: assignments ' || sum(a) || ', views ' || sum(v) || ', conversions ' || sum(c) || ', renewals ' || sum(w) || ', refunds ' || sum(b) || ', revenue ' || sum(r)
    FROM both_sides GROUP BY 1, 2, 3, 4, 5, 6, 7
    HAVING sum(a) <> 0 OR sum(v) <> 0 OR sum(c) <> 0 OR sum(w) <> 0 OR sum(b) <> 0 OR sum(r) <> 0";
