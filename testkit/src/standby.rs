//! A streaming standby, by the server's own functions for backups: no client program is needed.

use crate::{
    error::{Context, Result},
    host::{Endpoint, Host, blocking, connect},
    postmaster,
    private::{PrivateCluster, Running, SOCKET_PORT, SUPERUSER},
};
use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::OnceCell;

impl PrivateCluster {
    /// Makes a streaming standby of this cluster, with a socket of its own and no TCP: read-only, a moment behind, and a server
    /// of its own, which may be stopped, killed and started again.
    ///
    /// Databases are made on the primary; [`url_for`](PrivateCluster::url_for) says where they are on the standby. A test that wants
    /// it to fall behind tells it so: `SELECT pg_wal_replay_pause()`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let primary = lastprice_testkit::PrivateCluster::builder().start().await?;
    /// let standby = primary.standby().await?;
    /// assert_ne!(standby.superuser_url("postgres"), primary.superuser_url("postgres"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the server is not running, or its files cannot be copied.
    pub async fn standby(&self) -> Result<PrivateCluster> {
        let failed = || "the server does not let its files be copied".to_owned();
        // Until it ends, what is torn in the copy is in the log as a whole.
        let backup = connect(&self.host.local.url(SUPERUSER, "postgres")).await?;
        let version = "SELECT current_setting('server_version_num')::integer";
        let version: i32 = backup.query_one(version, &[]).await.context(failed)?.get(0);
        let [start, stop] = if version >= 150_000 {
            ["SELECT pg_backup_start('standby', true)", "SELECT labelfile FROM pg_backup_stop(false)"]
        } else {
            [
                "SELECT pg_start_backup('standby', true, false)",
                "SELECT labelfile FROM pg_stop_backup(false, false)",
            ]
        };
        backup.batch_execute(start).await.context(failed)?;
        let primary = self.running.clone();
        let copy = blocking(move || primary.copy()).await?;
        let label: String = backup.query_one(stop, &[]).await.context(failed)?.get(0);

        let (primary, port) = (self.running.clone(), self.port());
        let running = blocking(move || copy.follow(&primary.dir, port, &label)).await?;
        let local = Endpoint::socket(&running.dir, SOCKET_PORT, self.host.public.passwords.clone());
        let host = Arc::new(Host {
            public: local.clone(),
            local,
            superuser: SUPERUSER.to_owned(),
            maintenance: "postgres".to_owned(),
            sweep: 0,
            prepared: OnceCell::new_with(Some(())), // by the primary
            _keep: Some(Box::new(running.clone())),
        });
        Ok(PrivateCluster { host, running })
    }
}

impl Running {
    /// One with the same files, not started.
    fn copy(&self) -> Result<Running> {
        let state = self.state.clone();
        let plot = {
            let lock = state.lock()?;
            state.make_plot('p', 0.0, &lock)?
        };
        let dir = plot.dir.clone();
        let copy = Running { state, plot: Some(plot), dir, server: Mutex::new(None) };
        let data = copy.dir.join("data");
        for tries in 1.. {
            let mut files = self.state.account.command("cp", &copy.dir);
            files.arg("-Rp").arg(self.dir.join("data")).arg(&data);
            match self.state.account.run(files) {
                Ok(()) => break,
                // The server has removed one of them meanwhile.
                Err(_) if tries < 20 => drop(fs::remove_dir_all(&data)),
                Err(error) => return Err(error),
            }
        }
        fs::remove_file(data.join("postmaster.pid"))
            .context(|| "a running server has no number".to_owned())?;
        Ok(copy)
    }

    /// Starts it as a standby of the server in `primary`.
    fn follow(self, primary: &Path, port: u16, label: &str) -> Result<Arc<Running>> {
        for (name, text) in [("backup_label", label), ("standby.signal", "")] {
            let path = self.dir.join("data").join(name);
            fs::write(&path, text).context(|| format!("cannot write {}", path.display()))?;
            self.state.account.give(&path)?;
        }
        let quoted = primary.to_string_lossy().replace('\\', "\\\\").replace('\'', "\\'");
        let primary = format!("host='{quoted}' port={port} user={SUPERUSER}");
        let (place, port) = (self.dir.to_string_lossy().into_owned(), SOCKET_PORT.to_string());
        let own = [
            ("primary_conninfo", &*primary),
            ("unix_socket_directories", &*place),
            ("listen_addresses", ""),
            ("port", &*port),
        ];
        postmaster::configure(&self.dir, own)?;
        let server = self.start_server()?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(Arc::new(self))
    }
}
