//! A way to a server that knows where a command begins and ends, and can stand still at each.

use std::{
    collections::VecDeque,
    future::pending,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink},
    net::{TcpListener, TcpStream},
    runtime::{self, Runtime},
    sync::{oneshot, watch},
};

use super::RedisServer;

/// Forwards every connection to a server, command by command and reply by reply. What goes through it
/// is shown to whoever made it, who can hold it back.
///
/// It runs on a runtime of its own, and ends with this value.
pub struct CommandProxy {
    port: u16,
    line: Arc<Line>,
    /// `None` in `drop` only.
    runtime: Option<Runtime>,
}

/// Something about locks that is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passing {
    /// A command, before the server has it. Its name; of a script, and the first of its hash.
    Command(String),
    /// The reply to a command, which has been carried out.
    Reply(String),
    /// A message of a subscription.
    Message(String),
}

/// How it goes on with something that was held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onward {
    /// As if nothing had been.
    Goes,
    /// It is lost, and so is all that follows on its connection, in both directions. Nobody is told.
    Lost,
    /// It is lost, and its connection is closed.
    Closed,
}

/// Asked about all that passes. `None` lets it through; else it is held back until there is word.
pub type Watch = Arc<dyn Fn(Passing) -> Option<oneshot::Receiver<Onward>> + Send + Sync>;

struct Line {
    server: u16,
    watch: Watch,
    open: AtomicUsize,
    /// What becomes of the connections of the moment.
    fail: watch::Sender<Onward>,
}

impl CommandProxy {
    pub fn to(server: &RedisServer, watch: Watch) -> Self {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime for the proxy can be made");
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("the proxy has a port of its own");
        let port = listener.local_addr().expect("it is bound").port();
        listener.set_nonblocking(true).expect("it can be polled");
        let line = Arc::new(Line {
            server: server.port(),
            watch,
            open: AtomicUsize::new(0),
            fail: watch::Sender::new(Onward::Goes),
        });
        let accepting = Arc::clone(&line);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it can be polled");
            while let Ok((client, _)) = listener.accept().await {
                let line = Arc::clone(&accepting);
                let fail = line.fail.subscribe();
                line.open.fetch_add(1, SeqCst);
                tokio::spawn(async move {
                    let _ = forward(client, &line, fail).await;
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

    /// How many connections the client keeps open.
    pub fn open_connections(&self) -> usize {
        self.line.open.load(SeqCst)
    }

    /// The present connections are lost or closed. New ones work.
    pub fn fail(&self, how: Onward) {
        self.line.fail.send_replace(how);
    }
}

impl Drop for CommandProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // It may be dropped inside another runtime, where nobody may wait.
            runtime.shutdown_background();
        }
    }
}

async fn forward(
    client: TcpStream,
    line: &Line,
    mut fail: watch::Receiver<Onward>,
) -> std::io::Result<()> {
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, line.server)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    // The commands that have no reply yet.
    let open = Mutex::new(VecDeque::new());
    let commands = pump(
        &mut from_client,
        &mut to_server,
        |frame| {
            let name = command(frame);
            // The answer to these is a push.
            if !name.ends_with("SUBSCRIBE") {
                open.lock().expect("no panic").push_back(name.clone());
            }
            is_about_locks(&name).then_some(Passing::Command(name))
        },
        line,
    );
    let replies = pump(
        &mut from_server,
        &mut to_client,
        |frame| {
            if frame[0] == b'>' {
                let text = String::from_utf8_lossy(frame);
                return Some(Passing::Message(text.split("\r\n").nth(6)?.to_owned()));
            }
            let name = open.lock().expect("no panic").pop_front()?;
            is_about_locks(&name).then_some(Passing::Reply(name))
        },
        line,
    );
    let failed = async {
        match fail.changed().await {
            Ok(()) => *fail.borrow(),
            Err(_) => pending().await,
        }
    };
    let end = tokio::select! {
        biased;
        end = failed => end,
        end = commands => end,
        end = replies => end,
    };
    if end == Onward::Lost {
        // Until the client has had enough. The server hears of it only then.
        copy(&mut from_client, &mut sink()).await?;
    }
    Ok(())
}

/// Forwards frame by frame until one does not go on, or an end is closed.
async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut what: impl FnMut(&[u8]) -> Option<Passing>,
    line: &Line,
) -> Onward {
    let mut buffer = Vec::new();
    loop {
        while let Some(length) = frame_length(&buffer) {
            let frame: Vec<u8> = buffer.drain(..length).collect();
            if let Some(word) = what(&frame).and_then(|what| (line.watch)(what)) {
                // Whoever holds it back and goes away lets it go.
                match word.await.unwrap_or(Onward::Goes) {
                    Onward::Goes => {}
                    end => return end,
                }
            }
            if to.write_all(&frame).await.is_err() {
                return Onward::Closed;
            }
        }
        match from.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return Onward::Closed,
            Ok(_) => {}
        }
    }
}

/// How long the first value in `bytes` is (RESP 2 and 3), if it is whole.
fn frame_length(bytes: &[u8]) -> Option<usize> {
    let line = bytes.windows(2).position(|two| two == b"\r\n")? + 2;
    let number = || -> Option<i64> { str::from_utf8(&bytes[1..line - 2]).ok()?.parse().ok() };
    let parts = match bytes[0] {
        b'$' | b'=' | b'!' => {
            let length = line + usize::try_from(number()?).map_or(0, |text| text + 2);
            return (bytes.len() >= length).then_some(length);
        }
        b'*' | b'~' | b'>' => number()?.max(0),
        b'%' => 2 * number()?,
        _ => 0,
    };
    (0..parts).try_fold(line, |length, _| {
        Some(length + frame_length(&bytes[length..])?)
    })
}

/// The command's name; a script's with the first of its hash.
fn command(frame: &[u8]) -> String {
    let text = String::from_utf8_lossy(frame);
    let mut words = text.split("\r\n").skip(2).step_by(2);
    let name = words.next().unwrap_or_default().to_uppercase();
    match name.as_str() {
        "EVALSHA" => format!("{name} {:.4}", words.next().unwrap_or_default()),
        _ => name,
    }
}

fn is_about_locks(command: &str) -> bool {
    ["SET", "INCRBY", "MGET", "EVAL"]
        .iter()
        .any(|name| command.starts_with(name))
}
