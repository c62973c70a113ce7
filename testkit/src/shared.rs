//! The cluster that all test processes of a user share.

use crate::{
    error::{Context, Error, Result},
    host::{Endpoint, Host, Passwords},
    postmaster,
    state::{Plot, State},
    supervisor::Lease,
};
use std::{
    env, fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};
use tokio::sync::OnceCell;

/// Beyond the settings of all servers. Many tests run at once, and none of them waits for autovacuum or replicates.
const SETTINGS: [(&str, &str); 4] =
    [("max_connections", "300"), ("autovacuum", "off"), ("wal_level", "minimal"), ("max_wal_senders", "0")];

const PORT: u16 = 5432;
/// Long enough to live from one test binary to the next.
const LINGER_SECONDS: f64 = 5.0;

/// Joins the running cluster, or starts it. Once per process; a failure is not tried again, so that three hundred
/// tests do not each wait for it.
pub(crate) fn join() -> Result<Arc<Host>> {
    static SHARED: OnceLock<Result<Arc<Host>>> = OnceLock::new();
    SHARED.get_or_init(join_or_start).clone()
}

fn join_or_start() -> Result<Arc<Host>> {
    let state = State::open()?;
    let lock = state.lock()?;
    let running = state.plots().into_iter().find_map(|dir| Some((lease(&dir, &state.server.tag())?, dir)));
    let (dir, keep): (PathBuf, Box<dyn std::any::Any + Send + Sync>) = match running {
        Some((lease, dir)) => (dir, Box::new(lease)),
        None => {
            let plot = state.make_plot('s', linger()?, &lock)?;
            let dir = plot.dir.clone();
            (dir, Box::new((start(&state, &plot)?, plot)))
        }
    };
    let endpoint = Endpoint::socket(&dir, PORT, Passwords::Trust);
    Ok(Arc::new(Host {
        public: endpoint.clone(),
        local: endpoint,
        superuser: "postgres".to_owned(),
        maintenance: "postgres".to_owned(),
        // Each process pays for some of its predecessors, so that a runner with a process per test stays bounded.
        sweep: 3,
        prepared: OnceCell::new(),
        _keep: Some(keep),
    }))
}

fn start(state: &State, plot: &Plot) -> Result<std::process::Child> {
    state.fill(plot)?;
    let dir = plot.dir.to_string_lossy();
    let place = [("unix_socket_directories", &*dir)];
    postmaster::configure(&plot.dir, postmaster::SETTINGS.into_iter().chain(SETTINGS).chain(place))?;
    let child = postmaster::start(&state.account, &state.server, &plot.dir)?;
    fs::write(plot.dir.join("open"), state.server.tag()).context(|| format!("cannot write into {dir}"))?;
    Ok(child)
}

/// Joins the users of the server in `dir`, if it is running and of the kind `tag`.
///
/// The file `open` is the sign on the door: it says what is inside, and the supervisor takes it down when nobody
/// uses the server any more. Then the supervisor waits for whoever came before: still up means in time.
fn lease(dir: &Path, tag: &str) -> Option<Lease> {
    let is_open = || fs::read_to_string(dir.join("open")).is_ok_and(|sign| sign == tag);
    // The door itself is tried as well, since the server may have crashed.
    if !is_open() || UnixStream::connect(dir.join(format!(".s.PGSQL.{PORT}"))).is_err() {
        return None;
    }
    Lease::join(dir).filter(|_| is_open())
}

fn linger() -> Result<f64> {
    let Some(value) = env::var("LASTPRICE_TESTKIT_LINGER").ok().filter(|value| !value.is_empty()) else {
        return Ok(LINGER_SECONDS);
    };
    let seconds = value.parse::<f64>().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    seconds.ok_or_else(|| {
        Error::new(format!("LASTPRICE_TESTKIT_LINGER is {value:?}, but should be seconds, 0 to 3600"))
    })
}
