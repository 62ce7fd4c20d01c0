//! A way to a server that can fail as networks do.

use std::{
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{
            AtomicU16, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, sink},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime::{self, Runtime},
    sync::watch,
    time::sleep,
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
    /// What all connections go through.
    weather: watch::Sender<Weather>,
}

/// How bytes get on, in both directions.
#[derive(Clone, Copy, Default)]
struct Weather {
    /// They are kept until this is over.
    held: bool,
    /// The longest time that each piece takes; a random part of it.
    delay: Duration,
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
            weather: watch::Sender::default(),
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
                    let weather = line.weather.subscribe();
                    forward(client, server, swallowed, (cut, weather)).await;
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

    /// Nothing gets through in either direction until [`Proxy::release`], on old connections and on
    /// new ones. Then all of it arrives, late.
    pub fn hold(&self) {
        self.line.weather.send_modify(|weather| weather.held = true);
    }

    pub fn release(&self) {
        self.line
            .weather
            .send_modify(|weather| weather.held = false);
    }

    /// Whatever is sent takes up to so long, in each direction. Zero: no longer than it takes.
    pub fn delay(&self, delay: Duration) {
        self.line.weather.send_modify(|it| it.delay = delay);
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
    (mut cut, weather): (watch::Receiver<Cut>, watch::Receiver<Weather>),
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
        () = carry_both(&mut client, &mut server, weather) => return,
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

/// Until both ends have closed, or one has failed.
async fn carry_both(
    client: &mut TcpStream,
    server: &mut TcpStream,
    weather: watch::Receiver<Weather>,
) {
    let (mut commands, mut replies) = client.split();
    let (mut answers, mut asks) = server.split();
    let there = carry(&mut commands, &mut asks, weather.clone());
    let back = carry(&mut answers, &mut replies, weather);
    // An error is the end of the connection, like any other.
    let _ = tokio::try_join!(there, back);
}

async fn carry(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    mut weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut piece = vec![0; 16 * 1024];
    loop {
        let bytes = from.read(&mut piece).await?;
        // The other end of this is the proxy, which outlives its connections.
        let now = weather.wait_for(|weather| !weather.held).await;
        let delay = now.map(|weather| weather.delay).unwrap_or_default();
        if !delay.is_zero() {
            sleep(delay.mul_f64(fastrand::f64())).await;
        }
        if bytes == 0 {
            return to.shutdown().await;
        }
        to.write_all(&piece[..bytes]).await?;
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
