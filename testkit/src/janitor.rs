//! Drops test databases that nobody uses any more.

use crate::{
    error::{Context, Result},
    host::connect,
    postmaster::is_alive,
};
use std::{
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};
use tokio_postgres::Client;

const PREFIX: &str = "lastprice_test_";
const LIMIT: Duration = Duration::from_secs(10);

/// A database to drop, and the URL of a superuser's connection to another one.
pub(crate) struct Discarded {
    pub(crate) name: String,
    pub(crate) admin_url: String,
}

/// The name of a test database of process `pid`.
pub(crate) fn name(pid: u32, n: u32) -> String {
    format!("{PREFIX}{pid}_{n}")
}

/// Has a database dropped by a thread of its own: a `Drop` cannot wait, and the test's runtime is about to end. When
/// the process ends first, the database waits for the next sweep.
pub(crate) fn discard(database: Discarded) {
    static QUEUE: OnceLock<Option<mpsc::Sender<Discarded>>> = OnceLock::new();
    let queue = QUEUE.get_or_init(|| {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("lastprice-testkit".to_owned());
        thread.spawn(move || work(&receiver)).ok().map(|_| sender)
    });
    if let Some(queue) = queue {
        let _ = queue.send(database);
    }
}

fn work(queue: &mpsc::Receiver<Discarded>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    while let Ok(Discarded { name, admin_url }) = queue.recv() {
        let _ = runtime.block_on(async {
            tokio::time::timeout(LIMIT, async { drop_database(&connect(&admin_url).await?, &name).await })
                .await
        });
    }
}

/// Drops up to `limit` databases of processes that are no more.
///
/// One that somebody is connected to is left alone: a server may have clients on other machines, whose process numbers
/// mean nothing here.
pub(crate) async fn sweep(admin: &Client, limit: usize) -> Result<()> {
    if limit == 0 {
        return Ok(());
    }
    let rows = admin
        .query(UNUSED, &[])
        .await
        .context(|| "cannot list the databases of the test server".to_owned())?;
    let names = rows.iter().map(|row| row.get::<_, &str>(0));
    for name in names.filter(|name| pid_in(name).is_some_and(|pid| !is_alive(pid))).take(limit) {
        // Another process may be at it, too.
        let _ = drop_database(admin, name).await;
    }
    Ok(())
}

const UNUSED: &str = "SELECT datname::text FROM pg_database d
     WHERE datname ~ '^lastprice_test_[0-9]+_[0-9]+$' AND NOT datistemplate
       AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.datid = d.oid)
     ORDER BY d.oid";

async fn drop_database(admin: &Client, name: &str) -> Result<()> {
    let failed = || format!("cannot drop the test database {name}");
    let row = admin.query_one("SELECT current_setting('server_version_num')::int", &[]).await;
    let version: i32 = row.context(failed)?.get(0);
    let sql = if version >= 130_000 {
        format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    } else {
        let sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
        admin.query(sessions, &[&name]).await.context(failed)?;
        format!("DROP DATABASE IF EXISTS {name}")
    };
    admin.batch_execute(&sql).await.context(failed)
}

/// The process that made a database; `None` when the name is not one of ours.
fn pid_in(name: &str) -> Option<u32> {
    let (pid, n) = name.strip_prefix(PREFIX)?.split_once('_')?;
    let number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u32>().ok())?;
    number(n)?;
    number(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_swept() {
        assert_eq!(pid_in(&name(4711, 12)), Some(4711));
        for other in
            ["lastprice_test_", "lastprice_test_1", "lastprice_test_1_", "lastprice_test_+1_2", "test_1_2"]
        {
            assert_eq!(pid_in(other), None, "{other}");
        }
        assert_eq!(pid_in("lastprice_test_1_2_production"), None);
        assert_eq!(pid_in("lastprice_test_1_production"), None);
    }
}
