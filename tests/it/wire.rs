//! A proxy before the server: it sees what a client sends, and decides how much is answered.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_postgres::config::Host;

/// Answers arrive one at a time, so that a future which waits for several of them is polled in between.
pub(crate) struct Wire {
    url: String,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

struct Shared {
    /// What clients sent: `Q BEGIN…` for a simple query, else the letter of the message. Log-ins are left out.
    sent: Mutex<Vec<String>>,
    /// SQLSTATEs of warnings.
    warnings: Mutex<Vec<String>>,
    cancels: AtomicUsize,
    cancel_delay: Mutex<Duration>,
    /// How many more requests may be answered.
    answers: watch::Sender<usize>,
    gate: watch::Sender<Gate>,
}

/// A place in what goes over the wire, counted from 0 from when it is asked for. Log-ins do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Before the end of this request goes to the server, which has done what comes before that end, but says nothing.
    Request(usize),
    /// Before the end of this answer goes to the client: the server has done what it was asked.
    Answer(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Ahead(Hold),
    Held,
    Cut,
}

/// Whoever may answer everything.
const ALL: usize = usize::MAX / 2;

impl Wire {
    /// For clients that would go to `url`.
    pub(crate) async fn before(url: &str) -> Wire {
        let server: tokio_postgres::Config = url.parse().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let password = server.get_password().map(|word| String::from_utf8(word.to_vec()).unwrap());
        let url = format!(
            "host=127.0.0.1 port={port} user='{}' dbname='{}' password='{}' sslmode=disable",
            server.get_user().unwrap(),
            server.get_dbname().unwrap(),
            password.unwrap_or_default()
        );
        let shared = Arc::new(Shared {
            sent: Mutex::default(),
            warnings: Mutex::default(),
            cancels: AtomicUsize::new(0),
            cancel_delay: Mutex::default(),
            answers: watch::Sender::new(ALL),
            gate: watch::Sender::new(Gate::Open),
        });
        let for_all = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                client.set_nodelay(true).unwrap();
                let (server, shared) = (server.clone(), Arc::clone(&for_all));
                tokio::spawn(async move {
                    match (&server.get_hosts()[0], server.get_ports()[0]) {
                        (Host::Unix(dir), port) => {
                            let path: PathBuf = dir.join(format!(".s.PGSQL.{port}"));
                            shared.relay(client, UnixStream::connect(path).await.unwrap()).await;
                        }
                        (Host::Tcp(name), port) => {
                            shared
                                .relay(client, TcpStream::connect((name.as_str(), port)).await.unwrap())
                                .await;
                        }
                    }
                });
            }
        });
        Wire { url, shared, accepting }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// What was sent since the last call.
    pub(crate) fn take_sent(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.sent.lock().unwrap())
    }

    /// The SQLSTATEs of the warnings since the last call.
    pub(crate) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.warnings.lock().unwrap())
    }

    /// How many statements were cancelled so far.
    pub(crate) fn cancels(&self) -> usize {
        self.shared.cancels.load(Ordering::SeqCst)
    }

    /// Cancel requests come late.
    pub(crate) fn delay_cancels(&self, by: Duration) {
        *self.shared.cancel_delay.lock().unwrap() = by;
    }

    /// From now on only so many requests are answered.
    pub(crate) fn answer_only(&self, requests: usize) {
        self.shared.answers.send_replace(requests);
    }

    /// From now on every request is answered, those that wait included.
    pub(crate) fn answer_all(&self) {
        self.answer_only(ALL);
    }

    /// Whoever gets to this place first waits there, until [`let_go`](Wire::let_go) or [`cut`](Wire::cut).
    pub(crate) fn hold(&self, at: Hold) {
        self.shared.gate.send_replace(Gate::Ahead(at));
    }

    /// Returns when somebody waits there.
    pub(crate) async fn held(&self) {
        self.shared.gate.subscribe().wait_for(|gate| *gate == Gate::Held).await.unwrap();
    }

    pub(crate) fn let_go(&self) {
        self.shared.gate.send_replace(Gate::Open);
    }

    /// Who waits there loses its connection; all others, too, if they go on.
    pub(crate) fn cut(&self) {
        self.shared.gate.send_replace(Gate::Cut);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    async fn relay<S: AsyncRead + AsyncWrite + Send + 'static>(&self, client: TcpStream, server: S) {
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = split(server);
        // Whichever side ends ends both.
        tokio::select! {
            _ = self.requests(from_client, to_server) => {}
            _ = self.replies(from_server, to_client) => {}
        }
    }

    async fn requests(
        &self,
        mut client: impl AsyncRead + Unpin,
        mut server: impl AsyncWrite + Unpin,
    ) -> std::io::Result<()> {
        let length = client.read_i32().await?;
        let mut startup = vec![0; length as usize - 4];
        client.read_exact(&mut startup).await?;
        if startup.len() == 12 {
            self.cancels.fetch_add(1, Ordering::SeqCst);
            let delay = *self.cancel_delay.lock().unwrap();
            tokio::time::sleep(delay).await;
        }
        server.write_i32(length).await?;
        server.write_all(&startup).await?;
        loop {
            let (kind, body) = message(&mut client).await?;
            if kind != b'p' {
                let text = String::from_utf8_lossy(&body);
                self.sent.lock().unwrap().push(match kind {
                    b'Q' => format!("Q {}", text.trim_end_matches('\0')),
                    _ => char::from(kind).to_string(),
                });
            }
            if matches!(kind, b'Q' | b'S') {
                self.pass(false).await?;
            }
            forward(&mut server, kind, &body).await?;
        }
    }

    async fn replies(
        &self,
        mut server: impl AsyncRead + Unpin,
        mut client: impl AsyncWrite + Unpin,
    ) -> std::io::Result<()> {
        let mut logged_in = false;
        loop {
            let (kind, body) = message(&mut server).await?;
            if kind == b'N' {
                let code = body.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"C"));
                self.warnings.lock().unwrap().push(String::from_utf8_lossy(code.unwrap()).into_owned());
            }
            if logged_in {
                self.answers.subscribe().wait_for(|left| *left > 0).await.unwrap();
            }
            if kind == b'Z' && logged_in {
                self.pass(true).await?;
            }
            forward(&mut client, kind, &body).await?;
            if kind == b'Z' {
                if logged_in {
                    self.answers.send_modify(|left| *left = left.saturating_sub(1));
                }
                logged_in = true;
                // Turns for the client to take this answer by itself.
                for _ in 0..8 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Counts what passes, and waits where somebody is to be held.
    async fn pass(&self, is_answer: bool) -> std::io::Result<()> {
        self.gate.send_if_modified(|gate| {
            *gate = match *gate {
                Gate::Ahead(Hold::Request(0)) if !is_answer => Gate::Held,
                Gate::Ahead(Hold::Answer(0)) if is_answer => Gate::Held,
                Gate::Ahead(Hold::Request(n)) if !is_answer => Gate::Ahead(Hold::Request(n - 1)),
                Gate::Ahead(Hold::Answer(n)) if is_answer => Gate::Ahead(Hold::Answer(n - 1)),
                _ => return false,
            };
            true
        });
        match *self.gate.subscribe().wait_for(|gate| *gate != Gate::Held).await.unwrap() {
            Gate::Cut => Err(std::io::ErrorKind::ConnectionReset.into()),
            _ => Ok(()),
        }
    }
}

async fn message(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let mut body = vec![0; from.read_i32().await? as usize - 4];
    from.read_exact(&mut body).await?;
    Ok((kind, body))
}

async fn forward(to: &mut (impl AsyncWrite + Unpin), kind: u8, body: &[u8]) -> std::io::Result<()> {
    let mut whole = vec![kind];
    whole.extend((body.len() as i32 + 4).to_be_bytes());
    whole.extend(body);
    to.write_all(&whole).await
}
