//! A stream of bytes to a server that knows who we are.
//!
//! The socket is made here, or by the user's own [`Dial`], and redis-rs says over it who we are and what we want (`HELLO`,
//! `AUTH`, `SELECT`). Then the stream is taken back, for [`Pipe`](super::pipe::Pipe).

use std::{
    io,
    net::SocketAddr,
    panic::{self, AssertUnwindSafe},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, select_ok},
};
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ErrorKind, ProtocolVersion, RedisError,
    aio::MultiplexedConnection,
    io::tcp::socket2::{SockRef, TcpKeepalive},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, lookup_host},
};

use super::address::Endpoint;

/// For how long nothing has to come before the kernel asks whether anybody is there, and for how long it waits for what was
/// written to be received.
const SILENCE: Duration = Duration::from_secs(15);

/// Both directions of a stream.
pub(super) struct Ways {
    pub(super) read: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) write: Box<dyn AsyncWrite + Send + Unpin>,
}

/// Connects, and says who we are.
pub(super) async fn open(server: &Endpoint, protocol: ProtocolVersion) -> Result<Ways, RedisError> {
    let lent = Lent(Arc::new(Mutex::new(connect(server).await?)));
    let borrowed = Lent(Arc::clone(&lent.0));
    let config = AsyncConnectionConfig::new();
    let settings = server.info.redis_settings().clone().set_protocol(protocol);
    let greeted = MultiplexedConnection::new_with_config(&settings, borrowed, config).await;
    // It has read no further than the replies to what it has said.
    drop(greeted?);
    let stream = Arc::into_inner(lent.0).ok_or(io::Error::from(io::ErrorKind::Other))?;
    let stream = stream.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(stream.into_ways())
}

async fn connect(server: &Endpoint) -> Result<Box<dyn Stream>, RedisError> {
    match server.info.addr() {
        ConnectionAddr::Tcp(host, port) => Ok(to_host(server, host, *port, Plain).await?),
        #[cfg(feature = "tls")]
        ConnectionAddr::TcpTls { host, port, .. } => {
            let tls = server.tls.clone().ok_or_else(no_way)?;
            Ok(to_host(server, host, *port, tls).await?)
        }
        #[cfg(unix)]
        ConnectionAddr::Unix(path) => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
        _ => Err(no_way()),
    }
}

/// What is spoken over a stream.
pub(super) trait Speak: Clone + Send + Sync {
    fn speak(
        &self,
        host: &str,
        stream: impl Stream,
    ) -> impl Future<Output = io::Result<Box<dyn Stream>>> + Send;
}

#[derive(Clone)]
struct Plain;

impl Speak for Plain {
    async fn speak(&self, _: &str, stream: impl Stream) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(stream))
    }
}

/// The user's own way to a host and a port.
#[derive(Clone)]
pub(super) struct Dial(Arc<dyn Fn(String, u16) -> Dialing + Send + Sync>);

type Dialing = BoxFuture<'static, io::Result<Dialed>>;

impl Dial {
    pub(super) fn new<S, F>(dial: impl Fn(String, u16) -> F + Send + Sync + 'static) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        // A panic would end the task that renews locks, which listens for messages too.
        let panicked = |_| io::Error::other("the connector panicked");
        Self(Arc::new(move |host, port| {
            let dialing = panic::catch_unwind(AssertUnwindSafe(|| dial(host, port)));
            Box::pin(async move {
                let dialing = AssertUnwindSafe(dialing.map_err(panicked)?);
                let stream = dialing.catch_unwind().await.map_err(panicked)?;
                Ok(Dialed(Box::new(stream?)))
            })
        }))
    }
}

async fn to_host(
    server: &Endpoint,
    host: &str,
    port: u16,
    way: impl Speak,
) -> io::Result<Box<dyn Stream>> {
    match &server.dial {
        Some(Dial(dial)) => way.speak(host, dial(host.to_owned(), port).await?).await,
        None => to_any_of(host, port, way).await,
    }
}

fn no_way() -> RedisError {
    (ErrorKind::InvalidClientConfig, "no way to such an address").into()
}

/// A host may have several addresses: the first at which somebody is there who speaks as we do.
async fn to_any_of(host: &str, port: u16, way: impl Speak) -> io::Result<Box<dyn Stream>> {
    let addresses = lookup_host((host, port)).await?;
    let attempts: Vec<_> = addresses
        .map(|address| {
            let way = way.clone();
            Box::pin(async move { way.speak(host, tcp(address).await?).await })
        })
        .collect();
    if attempts.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(select_ok(attempts).await?.0)
}

async fn tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    // What comes together is written together, so there is nothing for Nagle's algorithm to wait for.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    // Half-open connections are found by the kernel too, where it can.
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    Ok(stream)
}

/// What bytes go over.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    fn into_ways(self: Box<Self>) -> Ways;
}

impl Stream for TcpStream {
    fn into_ways(self: Box<Self>) -> Ways {
        let (read, write) = self.into_split();
        Ways {
            read: Box::new(read),
            write: Box::new(write),
        }
    }
}

#[cfg(unix)]
impl Stream for tokio::net::UnixStream {
    fn into_ways(self: Box<Self>) -> Ways {
        let (read, write) = self.into_split();
        Ways {
            read: Box::new(read),
            write: Box::new(write),
        }
    }
}

#[cfg(feature = "tls")]
impl<S: Stream> Stream for tokio_rustls::client::TlsStream<S> {
    fn into_ways(self: Box<Self>) -> Ways {
        split(*self)
    }
}

fn split(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Ways {
    let (read, write) = tokio::io::split(stream);
    Ways {
        read: Box::new(read),
        write: Box::new(write),
    }
}

/// A stream that the user has made.
struct Dialed(Box<dyn Duplex>);

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

impl Stream for Dialed {
    fn into_ways(self: Box<Self>) -> Ways {
        split(self.0)
    }
}

impl AsyncRead for Dialed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Dialed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A stream that is lent, and comes back.
struct Lent(Arc<Mutex<Box<dyn Stream>>>);

impl Lent {
    fn with<R>(&self, job: impl FnOnce(Pin<&mut Box<dyn Stream>>) -> R) -> R {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        job(Pin::new(&mut *stream))
    }
}

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(cx, buffer))
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}
