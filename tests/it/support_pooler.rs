//! Programs that run beside the server of a test: PgBouncer, in front of a database of its own, and others.

use std::fs::{self, File};
use std::os::unix::{fs::MetadataExt, process::CommandExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::time::sleep;

use crate::support_sql::skipped;

/// Far more than anything here takes, far less than a hang.
const SOON: Duration = Duration::from_secs(30);

/// PgBouncer in front of a database of its own server.
pub(crate) struct Pooler {
    _process: Process,
    pub(crate) database: TestDatabase,
    pub(crate) cluster: PrivateCluster,
}

impl Pooler {
    /// In mode `session`, `transaction` or `statement`, with so many connections to the server for each user.
    pub(crate) async fn start(pgbouncer: &Path, mode: &str, pool_size: usize) -> Pooler {
        Pooler::start_in(pgbouncer, mode, pool_size, "").await
    }

    /// With more lines of configuration.
    pub(crate) async fn start_in(pgbouncer: &Path, mode: &str, pool_size: usize, more: &str) -> Pooler {
        let cluster = PrivateCluster::builder().start().await.unwrap();
        let database = cluster.database().await.unwrap();
        let (dir, name, port) = (cluster.socket_dir(), database.name(), cluster.port());
        let users = ["lastprice_service", "lastprice_owner", "postgres"];
        let users: String = users.iter().map(|user| format!("\"{user}\" \"\"\n")).collect();
        fs::write(dir.join("users"), users).unwrap();
        let place = dir.display();
        let ini = format!(
            "[databases]\n{name} = host={place} port={port} dbname={name}\n\
             [pgbouncer]\nunix_socket_dir = {place}\nlisten_port = {PORT}\nauth_type = trust\nauth_file = users\n\
             pool_mode = {mode}\ndefault_pool_size = {pool_size}\n{more}\n"
        );
        fs::write(dir.join("pgbouncer.ini"), ini).unwrap();
        let process = Process::start(&cluster, "TERM", pgbouncer, &["pgbouncer.ini"]);
        let pooler = Pooler { _process: process, database, cluster };
        answers(&pooler.cluster, pgbouncer, &pooler.url()).await;
        pooler
    }

    /// Of the ordinary role, through the pooler.
    pub(crate) fn url(&self) -> String {
        self.through(&self.database.app_url())
    }

    /// A URL of the server, through the pooler.
    pub(crate) fn through(&self, direct: &str) -> String {
        let from = format!(":{}/", self.cluster.port());
        assert!(direct.contains(&from), "{direct}");
        direct.replace(&from, &format!(":{PORT}/"))
    }
}

/// The name of a socket in the cluster's own folder.
const PORT: u16 = 6432;

/// Whether anybody answers, in whatever mode.
async fn asks(url: &str) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute("SELECT 1").await
}

/// A program that ends with this, and with the test process, whatever becomes of that: the shell waits for the end of its
/// input, and then sends the signal.
pub(crate) struct Process {
    shell: Child,
}

const UNTIL_WE_END: &str = r#"signal=$1; shift; "$@" & cat >/dev/null; kill -s "$signal" $!; wait $!"#;

impl Process {
    /// As the account of the server, since neither PostgreSQL nor PgBouncer runs as root, and in its folder, which the
    /// cluster removes.
    pub(crate) fn start(
        cluster: &PrivateCluster,
        signal: &str,
        program: &Path,
        arguments: &[&str],
    ) -> Process {
        let dir = cluster.socket_dir();
        let log = File::create(log_of(cluster, program)).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", UNTIL_WE_END, "sh", signal]).arg(program).args(arguments);
        shell.current_dir(dir).process_group(0).stdin(Stdio::piped());
        become_the_server(&mut shell, cluster, &log);
        shell.stdout(log.try_clone().unwrap()).stderr(log);
        Process { shell: shell.spawn().unwrap() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

pub(crate) fn log_of(cluster: &PrivateCluster, program: &Path) -> PathBuf {
    cluster.socket_dir().join(format!("log of {}", program.file_name().unwrap().display()))
}

/// `ours` is a file that we have made, and tells who we are.
pub(crate) fn become_the_server(command: &mut Command, cluster: &PrivateCluster, ours: &File) {
    let (server, ours) = (fs::metadata(cluster.socket_dir()).unwrap(), ours.metadata().unwrap());
    if server.uid() != ours.uid() {
        command.uid(server.uid()).gid(server.gid());
    }
}

/// Until the address takes connections; if it never does, the program's log says why.
pub(crate) async fn answers(cluster: &PrivateCluster, program: &Path, url: &str) {
    let started = Instant::now();
    while let Err(error) = asks(url).await {
        let log = || fs::read_to_string(log_of(cluster, program)).unwrap_or_default();
        assert!(started.elapsed() < SOON, "{error:?}\n{}", log());
        sleep(Duration::from_millis(20)).await;
    }
}

/// The URL of what listens beside the server: the same folder, another port.
pub(crate) fn beside(cluster: &PrivateCluster, database: &TestDatabase, port: u16) -> String {
    let (url, from) = (database.app_url(), format!(":{}/", cluster.port()));
    assert!(url.contains(&from), "{url}");
    url.replace(&from, &format!(":{port}/"))
}

/// The pooler; not on everybody's PATH.
pub(crate) fn pgbouncer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(more).map(|dir| dir.join("pgbouncer"));
    found.into_iter().find(|path| path.is_file()).or_else(|| skipped("pgbouncer is not installed"))
}
