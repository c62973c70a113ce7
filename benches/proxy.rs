//! A TCP proxy in this process that counts round trips as a client on a slow network has them, and makes the network
//! slow.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Listens on a port of its own until the process ends. Threads, not tasks: the timers of tokio have a precision of
/// a millisecond.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// One way, in nanoseconds.
    delay: AtomicU64,
    turns: AtomicU64,
    packets_sent: AtomicU64,
    bytes_sent: AtomicU64,
    packets_received: AtomicU64,
    bytes_received: AtomicU64,
}

/// What has passed so far.
#[derive(Clone, Copy)]
pub struct Traffic {
    /// How often a client, having got something from the server, sent something again: round trips.
    pub turns: u64,
    /// Reads from the client.
    pub packets_sent: u64,
    pub bytes_sent: u64,
    /// Reads from the server.
    pub packets_received: u64,
    pub bytes_received: u64,
}

impl Proxy {
    /// A proxy before 127.0.0.1:`server`.
    pub fn before(server: u16) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared::default());
        let of_connections = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // Refused by the server: the client sees its connection closed.
                if let Ok(server) = TcpStream::connect(("127.0.0.1", server)) {
                    drop(forward(client, server, &of_connections));
                }
            }
        });
        Ok(Proxy { port, shared })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on everything takes this long, each way.
    pub fn set_delay(&self, one_way: Duration) {
        self.shared.delay.store(u64::try_from(one_way.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub fn traffic(&self) -> Traffic {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            turns: now(&self.shared.turns),
            packets_sent: now(&self.shared.packets_sent),
            bytes_sent: now(&self.shared.bytes_sent),
            packets_received: now(&self.shared.packets_received),
            bytes_received: now(&self.shared.bytes_received),
        }
    }
}

fn forward(client: TcpStream, server: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    // The client got something since it last sent something; so does it begin.
    let answered = Arc::new(AtomicBool::new(true));
    let (there, seen) = (Arc::clone(shared), Arc::clone(&answered));
    let sent = move |bytes: usize| {
        there.packets_sent.fetch_add(1, Ordering::Relaxed);
        there.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
        if seen.swap(false, Ordering::SeqCst) {
            there.turns.fetch_add(1, Ordering::Relaxed);
        }
    };
    let back = Arc::clone(shared);
    let received = move |bytes: usize| {
        back.packets_received.fetch_add(1, Ordering::Relaxed);
        back.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    };
    line(client.try_clone()?, server.try_clone()?, shared, sent, || ());
    line(server, client, shared, received, move || answered.store(true, Ordering::SeqCst));
    Ok(())
}

/// One direction: a thread that reads, and one that writes what has waited long enough, in its order.
fn line(
    mut from: TcpStream,
    mut to: TcpStream,
    shared: &Arc<Shared>,
    read: impl Fn(usize) + Send + 'static,
    before_write: impl Fn() + Send + 'static,
) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let due = Instant::now() + Duration::from_nanos(shared.delay.load(Ordering::Relaxed));
            read(n);
            if sender.send((due, buffer[..n].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            before_write();
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // The other side is told, and the thread that reads from it ends.
        to.shutdown(Shutdown::Both).ok();
    });
}
