use crate::{
    database::{TestDatabase, TestDatabaseBuilder},
    error::{Context, Result},
    host::{Endpoint, Host, Passwords, blocking},
    postmaster,
    state::{Plot, State},
};
use std::{
    fmt, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};
use tokio::sync::OnceCell;

/// A server for one test: to be killed and restarted, with settings, TLS and a log of its own.
///
/// It starts in a fraction of a second. It is stopped and removed when the last of it and its databases is
/// dropped, which takes a few hundredths of a second, and also when the test process is killed.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lastprice_testkit::PrivateCluster;
///
/// let cluster = PrivateCluster::builder().setting("log_statement", "all").start().await?;
/// let database = cluster.database().await?;
/// database.connect_owner().await?.batch_execute("CREATE TABLE t AS SELECT 1 AS kept").await?;
///
/// cluster.kill().await?;
/// cluster.start_again().await?;
///
/// let row = database.connect_owner().await?.query_one("SELECT kept FROM t", &[]).await?;
/// assert_eq!(row.get::<_, i32>(0), 1);
/// assert!(cluster.log().contains("CREATE TABLE t"));
/// # Ok(())
/// # }
/// ```
#[must_use = "the server is stopped and removed together with this"]
pub struct PrivateCluster {
    pub(crate) host: Arc<Host>,
    pub(crate) running: Arc<Running>,
}

/// What a [`PrivateCluster`] shall be like.
///
/// ```no_run
/// # async fn example() -> Result<(), lastprice_testkit::Error> {
/// let cluster = lastprice_testkit::PrivateCluster::builder()
///     .setting("max_connections", "20")
///     .tcp()
///     .password_auth()
///     .start()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "nothing happens before `start`"]
pub struct PrivateClusterBuilder {
    settings: Vec<(String, String)>,
    tcp: bool,
    tls: bool,
    #[cfg(feature = "tls")]
    expired: bool,
    password_auth: bool,
}

/// The processes and the folder behind a cluster and its databases.
pub(crate) struct Running {
    pub(crate) state: State,
    /// Taken apart on drop.
    pub(crate) plot: Option<Plot>,
    pub(crate) dir: PathBuf,
    pub(crate) server: Mutex<Option<Child>>,
}

pub(crate) const SOCKET_PORT: u16 = 5432;
pub(crate) const SUPERUSER: &str = "postgres";

impl PrivateCluster {
    /// The password of every role of a cluster with [`password_auth`](PrivateClusterBuilder::password_auth). Roles
    /// that a test makes by itself have to be given it, if they shall use [`url_for`](PrivateCluster::url_for).
    pub const PASSWORD: &'static str = "testkit";

    /// A cluster with a Unix socket, no TCP, and no passwords, unless told otherwise.
    pub fn builder() -> PrivateClusterBuilder {
        PrivateClusterBuilder::default()
    }

    /// Makes a database with the schema of `lastprice` on this cluster.
    ///
    /// # Errors
    ///
    /// When the server is not running, or when the schema does not install.
    pub async fn database(&self) -> Result<TestDatabase> {
        self.database_builder().create().await
    }

    /// For a database that starts with more than the schema, or with less.
    pub fn database_builder(&self) -> TestDatabaseBuilder {
        TestDatabaseBuilder::on(self.host.clone())
    }

    /// Stops the server by a fast shutdown, which tells its clients. Does nothing if it is not running.
    ///
    /// # Errors
    ///
    /// When it does not stop within 30 seconds.
    pub async fn stop(&self) -> Result<()> {
        self.with_server(|_, server| server.take().map_or(Ok(()), |mut child| postmaster::stop(&mut child)))
            .await
    }

    /// Kills the server process with SIGKILL, and waits until its children have noticed and ended. Does nothing if it
    /// is not running. Committed rows are there after [`start_again`](PrivateCluster::start_again).
    ///
    /// # Errors
    ///
    /// When a child of the server does not end.
    pub async fn kill(&self) -> Result<()> {
        self.with_server(|running, server| {
            server.take().map_or(Ok(()), |mut child| postmaster::kill(&mut child, &running.dir))
        })
        .await
    }

    /// Starts the server after [`stop`](PrivateCluster::stop) or [`kill`](PrivateCluster::kill), at the same address.
    /// Does nothing if it is running.
    ///
    /// # Errors
    ///
    /// When it does not start; [`log`](PrivateCluster::log) says why.
    pub async fn start_again(&self) -> Result<()> {
        self.with_server(|running, server| {
            if server.is_none() {
                *server = Some(running.start_server()?);
            }
            Ok(())
        })
        .await
    }

    /// Stops the server and starts it again.
    ///
    /// # Errors
    ///
    /// When it does not stop, or does not start.
    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// The port: of TCP, if asked for, and of the socket, whose name has it in any case.
    pub fn port(&self) -> u16 {
        self.host.public.port()
    }

    /// The folder of the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.running.dir
    }

    /// The URL of a database for the superuser; `postgres` is there from the start.
    pub fn superuser_url(&self, database: &str) -> String {
        self.url_for(SUPERUSER, database)
    }

    /// The URL of a database for some role: over TCP, if asked for, else over the socket.
    pub fn url_for(&self, role: &str, database: &str) -> String {
        self.host.public.url(role, database)
    }

    /// Where the server writes its log.
    pub fn log_path(&self) -> PathBuf {
        self.running.dir.join("log")
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The certificate, as PEM, of the authority that vouches for the server of a cluster with
    /// [`tls`](PrivateClusterBuilder::tls).
    #[cfg(feature = "tls")]
    pub fn ca_cert_path(&self) -> PathBuf {
        self.running.dir.join(crate::certificates::CA)
    }

    /// The certificate of another authority, which has nothing to do with this server: a client that trusts only this
    /// one must not connect.
    #[cfg(feature = "tls")]
    pub fn other_ca_cert_path(&self) -> PathBuf {
        self.running.dir.join(crate::certificates::OTHER_CA)
    }

    /// Runs `work` on the server process, where waiting holds up nobody.
    async fn with_server(
        &self,
        work: impl FnOnce(&Running, &mut Option<Child>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let running = self.running.clone();
        blocking(move || {
            let mut server = running.server.lock().unwrap_or_else(PoisonError::into_inner);
            work(&running, &mut server)
        })
        .await
    }
}

impl fmt::Debug for PrivateCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateCluster").field("dir", &self.running.dir).field("port", &self.port()).finish()
    }
}

impl PrivateClusterBuilder {
    /// A line of `postgresql.conf`; the last one of a name wins, also against the testkit's own: `fsync` and
    /// `full_page_writes` are off, `synchronous_commit` is on.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> PrivateClusterBuilder {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Listens on a free port of 127.0.0.1 as well, and has the URLs say so.
    pub fn tcp(mut self) -> PrivateClusterBuilder {
        self.tcp = true;
        self
    }

    /// Listens on TCP with TLS, and refuses TCP without it. The server is certified as `localhost`, which the URLs
    /// say, and 127.0.0.1, by an authority that is made for this cluster.
    #[cfg(feature = "tls")]
    pub fn tls(mut self) -> PrivateClusterBuilder {
        self.tls = true;
        self.tcp()
    }

    /// [`tls`](PrivateClusterBuilder::tls), with a certificate of the server's that ended years ago.
    #[cfg(feature = "tls")]
    pub fn tls_expired(mut self) -> PrivateClusterBuilder {
        self.expired = true;
        self.tls()
    }

    /// Asks every role for a password (SCRAM), except the superuser on the socket. The URLs have it:
    /// [`PrivateCluster::PASSWORD`].
    pub fn password_auth(mut self) -> PrivateClusterBuilder {
        self.password_auth = true;
        self
    }

    /// Starts the cluster.
    ///
    /// # Errors
    ///
    /// When there is no PostgreSQL on this machine, or when it does not start, for instance with these settings.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn start(self) -> Result<PrivateCluster> {
        let passwords =
            if self.password_auth { Passwords::Same(PrivateCluster::PASSWORD) } else { Passwords::Trust };
        let (tls, tcp, password_auth) = (self.tls, self.tcp, self.password_auth);
        let (running, port) = blocking(move || self.start_blocking()).await?;
        let local = Endpoint::socket(&running.dir, port, passwords.clone());
        let public = match (tls, tcp) {
            (true, _) => Endpoint::tcp("localhost", port, "", passwords),
            (_, true) => Endpoint::tcp("127.0.0.1", port, "", passwords),
            _ => local.clone(),
        };
        let host = Arc::new(Host {
            public,
            local,
            superuser: SUPERUSER.to_owned(),
            maintenance: "postgres".to_owned(),
            sweep: 0,
            prepared: OnceCell::new(),
            // A database that outlives this value still has a server.
            _keep: Some(Box::new(running.clone())),
        });
        if tcp && password_auth {
            // The superuser needs its password before anybody comes by TCP.
            host.admin().await?;
        }
        Ok(PrivateCluster { host, running })
    }

    fn start_blocking(self) -> Result<(Arc<Running>, u16)> {
        let state = State::open()?;
        let plot = {
            let lock = state.lock()?;
            state.make_plot('p', 0.0, &lock)?
        };
        let dir = plot.dir.clone();
        state.fill(&plot)?;
        // From here on, our own drop takes everything down again; until here, the supervisor.
        let running = Arc::new(Running { state, plot: Some(plot), dir, server: Mutex::new(None) });
        let dir = &*running.dir;
        fs::write(dir.join("data/pg_hba.conf"), self.pg_hba())
            .context(|| format!("cannot write into {}", dir.display()))?;
        #[cfg(feature = "tls")]
        if self.tls {
            crate::certificates::write(&running.state.account, dir, self.expired)?;
            postmaster::configure(dir, crate::certificates::SETTINGS)?;
        }
        let place = dir.to_string_lossy();
        let own = [("unix_socket_directories", &*place), ("password_encryption", "scram-sha-256")];
        postmaster::configure(dir, postmaster::SETTINGS.into_iter().chain(own))?;
        if self.tcp {
            postmaster::configure(dir, [("listen_addresses", "127.0.0.1")])?;
        }
        postmaster::configure(
            dir,
            self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())),
        )?;
        let port = self.start_at_free_port(&running)?;
        Ok((running, port))
    }

    /// A port that was free a moment ago may be taken by now; then there are others.
    fn start_at_free_port(&self, running: &Running) -> Result<u16> {
        let mut tries = 1;
        loop {
            let port = if self.tcp { free_port()? } else { SOCKET_PORT };
            postmaster::configure(&running.dir, [("port", port.to_string().as_str())])?;
            match running.start_server() {
                Ok(child) => {
                    *running.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
                    return Ok(port);
                }
                Err(error) if self.tcp && tries < 5 && format!("{error:?}").contains("TCP/IP socket") => {
                    tries += 1
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn pg_hba(&self) -> String {
        let method = if self.password_auth { "scram-sha-256" } else { "trust" };
        let host = if self.tls { "hostssl" } else { "host" };
        format!(
            "local all,replication {SUPERUSER} trust\nlocal all all {method}\n{host} all all 127.0.0.1/32 {method}\n"
        )
    }
}

fn free_port() -> Result<u16> {
    let bind = || TcpListener::bind("127.0.0.1:0")?.local_addr();
    Ok(bind().context(|| "cannot listen on 127.0.0.1".to_owned())?.port())
}

impl Running {
    /// A child that a killed server had just made is on no list of ours; PostgreSQL notices it, and says so.
    pub(crate) fn start_server(&self) -> Result<Child> {
        let mut tries = 1;
        loop {
            match postmaster::start(&self.state.account, &self.state.server, &self.dir) {
                Err(error) if tries < 50 && format!("{error:?}").contains("is still in use") => tries += 1,
                done => return done,
            }
            sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let server = self.server.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut child) = server.take() {
            let _ = postmaster::discard(&mut child);
        }
        let _ = fs::remove_dir_all(&self.dir);
        let Some(Plot { lease, mut supervisor, .. }) = self.plot.take() else { return };
        drop(lease);
        // It finds nothing to do, and ends; waited for, so that it does not stay as a zombie.
        let end = Instant::now() + Duration::from_secs(2);
        while supervisor.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < end {
            sleep(Duration::from_millis(2));
        }
    }
}
