//! A network that loses answers: what the server did is done, and nobody is told.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};

use crate::load::Dice;

pub(crate) struct Network {
    port: u16,
    state: Arc<State>,
}

struct State {
    dice: Mutex<Dice>,
    /// Of a thousand answers so many are lost, and the connection with them.
    loses: AtomicU64,
    lost: AtomicU64,
}

impl Network {
    pub(crate) async fn before(server: u16, seed: u64) -> io::Result<Network> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State {
            dice: Mutex::new(Dice(seed)),
            loses: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let of_connections = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = Arc::clone(&of_connections);
                tokio::spawn(async move { drop(forward(client, server, &state).await) });
            }
        });
        Ok(Network { port, state })
    }

    /// The URL, by way of this network.
    pub(crate) fn url(&self, direct: &str, server: u16) -> String {
        direct.replace(&format!(":{server}/"), &format!(":{}/", self.port))
    }

    /// How many answers were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.state.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn lose(&self, of_a_thousand: u64) {
        self.state.loses.store(of_a_thousand, Ordering::Relaxed);
    }
}

/// Until either side has ended, or an answer is lost; both connections end with it.
async fn forward(client: TcpStream, server: u16, state: &State) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", server)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let answers = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = from_server.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            let loses = state.loses.load(Ordering::Relaxed);
            if state.dice.lock().unwrap_or_else(PoisonError::into_inner).below(1000) < loses {
                state.lost.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            to_client.write_all(&buffer[..n]).await?;
        }
    };
    tokio::select! {
        done = copy(&mut from_client, &mut to_server) => done.map(drop),
        done = answers => done,
    }
}
