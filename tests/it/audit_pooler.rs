//! The audit behind a real PgBouncer: transaction mode is fine, statement mode is a hazard.

use std::fs::{self, File};
use std::os::unix::{fs::MetadataExt, process::CommandExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lastprice::{Client, Hazard, IsolationReport};
use lastprice_testkit::PrivateCluster;
use tokio::time::sleep;

use crate::support_sql::skipped;

fn pgbouncer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(more).map(|dir| dir.join("pgbouncer"));
    found.into_iter().find(|path| path.is_file()).or_else(|| skipped("pgbouncer is not installed"))
}

/// Ends with the test, whatever becomes of that: the shell waits for the end of its input.
struct Shell(Child);

impl Drop for Shell {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

async fn audited_behind(mode: &str) -> Option<IsolationReport> {
    const PORT: u16 = 6433;
    let pgbouncer = pgbouncer()?;
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let (dir, name, port) = (cluster.socket_dir(), database.name(), cluster.port());
    let place = dir.display();
    fs::write(dir.join("users"), "\"lastprice_service\" \"\"\n").unwrap();
    let ini = format!(
        "[databases]\n{name} = host={place} port={port} dbname={name}\n\
         [pgbouncer]\nunix_socket_dir = {place}\nlisten_port = {PORT}\nauth_type = trust\nauth_file = users\npool_mode = {mode}\n"
    );
    fs::write(dir.join("pgbouncer.ini"), ini).unwrap();
    let log = File::create(dir.join("log of pgbouncer")).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$0\" pgbouncer.ini & cat >/dev/null; kill $!; wait $!"]).arg(pgbouncer);
    shell.current_dir(dir).process_group(0).stdin(Stdio::piped());
    let (server, ours) = (fs::metadata(dir).unwrap(), log.metadata().unwrap());
    if server.uid() != ours.uid() {
        shell.uid(server.uid()).gid(server.gid());
    }
    shell.stdout(log.try_clone().unwrap()).stderr(log);
    let _pooler = Shell(shell.spawn().unwrap());

    let from = format!(":{port}/");
    let url = database.app_url().replace(&from, &format!(":{PORT}/"));
    let client = Client::builder().url(url).require_app_role().build().unwrap();
    let started = Instant::now();
    loop {
        match client.verify_isolation().await {
            Ok(report) => return Some(report),
            Err(error) => assert!(started.elapsed() < Duration::from_secs(30), "{error:?}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_pooler_in_transaction_mode_is_clean() {
    let Some(report) = audited_behind("transaction").await else { return };
    assert!(report.is_clean(), "{report}");
}

#[tokio::test]
async fn a_pooler_in_statement_mode_is_found() {
    let Some(report) = audited_behind("statement").await else { return };
    let hazards: Vec<_> = report.findings().iter().map(|finding| finding.hazard).collect();
    assert_eq!(hazards, [Hazard::PoolerLosesTransaction], "{report}");
}
