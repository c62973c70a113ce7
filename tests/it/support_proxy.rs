//! TCP proxies: one loses what a test wants lost, one falls silent.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What is lost of the next transaction, and the connection with it. Then the proxy is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Lose {
    /// The COMMIT: the server never sees it.
    Commit = 1,
    /// Its answer: the server has committed.
    Answer = 2,
    /// Every answer, from that to BEGIN on: the server has committed, or done what it was told.
    AllAnswers = 3,
}

pub(crate) struct Proxy {
    port: u16,
    armed: Arc<AtomicU8>,
    _connections: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed = Arc::new(AtomicU8::new(0));
        let mut accepting = JoinSet::new();
        let of_connections = Arc::clone(&armed);
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let armed = Arc::clone(&of_connections);
                connections.spawn(async move { drop(forward(client, server, &armed).await) });
            }
        });
        Proxy { port, armed, _connections: accepting }
    }

    /// The URL, by way of the proxy.
    pub(crate) fn url(&self, direct: &str, server: u16) -> String {
        let (from, to) = (format!(":{server}/"), format!(":{}/", self.port));
        assert!(direct.contains(&from), "{direct}");
        direct.replace(&from, &to)
    }

    pub(crate) fn lose(&self, what: Lose) {
        self.armed.store(what as u8, Ordering::SeqCst);
    }

    /// Whether what should be lost is lost.
    pub(crate) fn has_lost(&self) -> bool {
        self.armed.load(Ordering::SeqCst) == 0
    }
}

/// Returns when either side has ended, or something was lost; both connections end with it.
async fn forward(client: TcpStream, server: u16, armed: &AtomicU8) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", server)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        done = line(from_client, to_server, armed, [(Lose::Commit, COMMIT)].as_slice()) => done,
        done = line(from_server, to_client, armed, &[(Lose::Answer, COMMITTED), (Lose::AllAnswers, COMMITTED)]) => done,
    }
}

async fn line(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    armed: &AtomicU8,
    losses: &[(Lose, &[u8])],
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut kept = Vec::new();
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        kept.extend_from_slice(&buffer[..n]);
        let now = armed.load(Ordering::SeqCst);
        if let Some((what, message)) = losses.iter().find(|(what, _)| *what as u8 == now) {
            let at = kept.windows(message.len()).position(|bytes| bytes == *message);
            if let Some(at) = at {
                if *what != Lose::AllAnswers {
                    to.write_all(&kept[..at]).await?;
                    to.flush().await?;
                }
                armed.store(0, Ordering::SeqCst);
                return Ok(());
            }
            if *what == Lose::AllAnswers {
                continue;
            }
        }
        to.write_all(&kept).await?;
        kept.clear();
    }
}

/// A way to the server that can fall silent. What was connected by then stays so, and says nothing ever again.
pub(crate) struct Network {
    pub(crate) port: u16,
    pub(crate) is_silent: watch::Sender<bool>,
    _connections: JoinSet<()>,
}

impl Network {
    pub(crate) async fn before(server: u16) -> Network {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (is_silent, silence) = watch::channel(false);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let mut silence = silence.clone();
                connections.spawn(async move {
                    let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                    tokio::select! {
                        biased;
                        _ = silence.wait_for(|is_silent| *is_silent) => {}
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
                    }
                    pending::<()>().await;
                    drop((client, server));
                });
            }
        });
        Network { port, is_silent, _connections: accepting }
    }
}

/// The messages of PostgreSQL's protocol: Query, and CommandComplete.
const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";
const COMMITTED: &[u8] = b"C\0\0\0\x0bCOMMIT\0";
