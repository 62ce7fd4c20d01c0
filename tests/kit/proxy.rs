//! A way to a server that can fail as networks do.

use std::{
    future::pending,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{
            AtomicU16, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use tokio::{
    io::{copy, copy_bidirectional, sink},
    net::{TcpListener, TcpStream},
    runtime::{self, Runtime},
    sync::watch,
};

use super::RedisServer;

/// Forwards every connection to a server, both on the loopback interface, until it is told
/// otherwise. It runs on a runtime of its own, so that it outlives those of a test, and ends with
/// this value.
pub struct Proxy {
    port: u16,
    line: Arc<Line>,
    /// `None` in `drop` only.
    runtime: Option<Runtime>,
}

struct Line {
    /// The server's port.
    server: AtomicU16,
    /// How many connections were accepted.
    accepted: AtomicUsize,
    /// How many of them the client has not closed.
    open: AtomicUsize,
    /// How many of the next connections are swallowed.
    swallow: AtomicUsize,
    /// Changes when the connections of that moment are cut off.
    cut: watch::Sender<Cut>,
}

/// What a connection that was cut off still carries.
#[derive(Clone, Copy)]
enum Cut {
    Nothing,
    Commands,
}

impl Proxy {
    /// Can be called inside and outside a runtime.
    pub fn to(server: &RedisServer) -> Self {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime for the proxy can be made");
        // The kernel chooses the port.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("the proxy has a port of its own");
        let port = listener.local_addr().expect("it is bound").port();
        listener.set_nonblocking(true).expect("it can be polled");
        let line = Arc::new(Line {
            server: server.port().into(),
            accepted: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            swallow: AtomicUsize::new(0),
            cut: watch::Sender::new(Cut::Nothing),
        });
        let accepting = Arc::clone(&line);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it can be polled");
            while let Ok((client, _)) = listener.accept().await {
                accepting.accepted.fetch_add(1, Relaxed);
                let less = |left: usize| left.checked_sub(1);
                let swallowed = accepting.swallow.fetch_update(SeqCst, SeqCst, less).is_ok();
                // Before the first byte: whoever is connected now is cut off by a cut from now on.
                let cut = accepting.cut.subscribe();
                let server = (Ipv4Addr::LOCALHOST, accepting.server.load(SeqCst)).into();
                let line = Arc::clone(&accepting);
                tokio::spawn(async move {
                    line.open.fetch_add(1, SeqCst);
                    forward(client, server, swallowed, cut).await;
                    line.open.fetch_sub(1, SeqCst);
                });
            }
        });
        Self {
            port,
            line,
            runtime: Some(runtime),
        }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many connections there have been, swallowed ones among them.
    pub fn connections(&self) -> usize {
        self.line.accepted.load(Relaxed)
    }

    /// How many connections the client keeps open, if none was made a black hole or swallowed.
    pub fn open_connections(&self) -> usize {
        self.line.open.load(SeqCst)
    }

    /// So many of the next connections are accepted, and never forwarded, answered or closed:
    /// whoever makes one hangs in its handshake.
    pub fn swallow_next(&self, connections: usize) {
        self.line.swallow.store(connections, SeqCst);
    }

    /// The present connections become a black hole: they stay open, and nothing goes through in
    /// either direction. New ones work.
    pub fn black_hole(&self) {
        self.line.cut.send_replace(Cut::Nothing);
    }

    /// On the present connections what is sent arrives, and no reply comes back. New ones work.
    pub fn lose_replies(&self) {
        self.line.cut.send_replace(Cut::Commands);
    }

    /// New connections lead to this server.
    pub fn switch_to(&self, server: &RedisServer) {
        self.line.server.store(server.port(), SeqCst);
    }
}

async fn forward(
    mut client: TcpStream,
    server: SocketAddr,
    swallowed: bool,
    mut cut: watch::Receiver<Cut>,
) {
    if swallowed {
        // Here too: `client` stays open.
        return pending().await;
    }
    let Ok(mut server) = TcpStream::connect(server).await else {
        return;
    };
    tokio::select! {
        biased;
        _ = cut.changed() => {}
        // However it ends, both ends are closed.
        _ = copy_bidirectional(&mut client, &mut server) => return,
    }
    let how = *cut.borrow();
    match how {
        Cut::Nothing => pending().await,
        Cut::Commands => {
            let (mut commands, _replies) = client.split();
            let (mut answers, mut asks) = server.split();
            let mut nowhere = sink();
            let swallow = async {
                let _ = copy(&mut answers, &mut nowhere).await;
                pending().await
            };
            // Until the client has had enough.
            tokio::select! {
                _ = copy(&mut commands, &mut asks) => {}
                () = swallow => {}
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // It may be dropped inside another runtime, where nobody may wait.
            runtime.shutdown_background();
        }
    }
}
