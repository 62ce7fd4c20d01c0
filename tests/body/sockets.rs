//! Over real connections, HTTP/1 and HTTP/2.

use std::{
    convert::Infallible,
    net::{Shutdown, SocketAddr},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{
        Response,
        sse::{Event, Sse},
    },
    routing::{any, get},
};
use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Mutex, mpsc},
};
use tower::util::option_layer;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{InvalidKey, LossReason},
    middleware::{DefaultOnAcquired, DefaultOnReject, HoldToBodyEnd},
    storage::{LockStorage, MemoryStorage, RedisStorage},
};

use crate::{
    kit::{LIMIT, RedisServer, eventually, ms, within},
    told::{End, Step, Told},
};

fn path(request: &Request) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

type Key = fn(&Request) -> Result<LockKey, InvalidKey>;
type Layer = DistributedLockLayer<Key, DefaultOnReject, DefaultOnAcquired, HoldToBodyEnd>;

/// A request does not wait; one that comes second is rejected.
fn at_once() -> LockOptions {
    LockOptions::builder().retries(0).build().unwrap()
}

fn layer(locks: &LockFactory) -> Layer {
    let path: Key = path;
    DistributedLockLayer::new(locks.clone(), path)
        .options(at_once())
        .hold_to_body_end()
}

/// A body that the server has started to send.
struct Sent {
    teller: mpsc::UnboundedSender<Step>,
    end: End,
    lock: HeldLock,
}

impl Sent {
    fn tell(&self, step: Step) {
        assert!(self.teller.send(step).is_ok(), "the body is gone");
    }
}

#[derive(Clone)]
struct Server {
    address: SocketAddr,
    locks: LockFactory,
    sent: Arc<Mutex<mpsc::UnboundedReceiver<Sent>>>,
}

impl Server {
    /// `/told` streams what its test says, `/told/5` also says that these will be 5 bytes. All routes
    /// are under the lock.
    async fn start(storage: impl LockStorage, make: impl FnOnce(Layer) -> Layer) -> Self {
        let locks = LockFactory::new(storage);
        let (sender, sent) = mpsc::unbounded_channel();
        let told = |State(sender): State<mpsc::UnboundedSender<Sent>>,
                    lock: HeldLock,
                    request: Request| async move {
            let (mut body, teller, end) = Told::new(Some(lock.clone()));
            let last = request.uri().path().rsplit('/').next();
            body.length = last.and_then(|last| last.parse().ok());
            assert!(sender.send(Sent { teller, end, lock }).is_ok());
            Response::new(Body::new(body))
        };
        let app = Router::new()
            .route("/told", any(told))
            .route("/told/{length}", any(told))
            .route("/nothing", get(async || StatusCode::NO_CONTENT))
            .route("/text", get(async || "twelve bytes"))
            .route_layer(make(layer(&locks)))
            .with_state(sender);
        Self {
            address: serve(app).await,
            locks,
            sent: Arc::new(Mutex::new(sent)),
        }
    }

    /// The next body that is sent.
    async fn sent(&self) -> Sent {
        let sent = async { self.sent.lock().await.recv().await };
        within(LIMIT, "the handler runs", sent).await.unwrap()
    }

    async fn is_released(&self) {
        let locks = &self.locks;
        eventually("the lock is released", LIMIT, async || locks.keys() == 0).await;
    }
}

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

#[derive(Clone, Copy, Debug)]
enum Version {
    Http1,
    Http2,
}

const VERSIONS: [Version; 2] = [Version::Http1, Version::Http2];

enum Sender {
    Http1(conn::http1::SendRequest<Empty<Bytes>>),
    Http2(conn::http2::SendRequest<Empty<Bytes>>),
}

/// One connection.
struct Client {
    address: SocketAddr,
    sender: Sender,
    socket: std::net::TcpStream,
}

impl Client {
    async fn connect(version: Version, address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        // A size that the kernel does not adapt: it is soon felt that nobody reads.
        socket.set_recv_buffer_size(1 << 16).unwrap();
        let socket = socket.connect(address).await.unwrap();
        let socket = socket.into_std().unwrap();
        let io = TcpStream::from_std(socket.try_clone().unwrap()).unwrap();
        let io = TokioIo::new(io);
        let sender = match version {
            Version::Http1 => {
                let (sender, connection) = conn::http1::handshake(io).await.unwrap();
                tokio::spawn(connection);
                Sender::Http1(sender)
            }
            Version::Http2 => {
                let handshake = conn::http2::handshake(TokioExecutor::new(), io);
                let (sender, connection) = handshake.await.unwrap();
                tokio::spawn(connection);
                Sender::Http2(sender)
            }
        };
        Self {
            address,
            sender,
            socket,
        }
    }

    async fn send(&mut self, method: Method, path: &str) -> Response<Incoming> {
        let uri = format!("http://{}{path}", self.address);
        let host = self.address.to_string();
        let request = http::Request::builder()
            .method(method)
            .uri(uri)
            .header("host", host);
        let request = request.body(Empty::new()).unwrap();
        let response = async {
            match &mut self.sender {
                Sender::Http1(sender) => {
                    sender.ready().await.unwrap();
                    sender.send_request(request).await
                }
                Sender::Http2(sender) => {
                    sender.ready().await.unwrap();
                    sender.send_request(request).await
                }
            }
        };
        within(LIMIT, path, response).await.unwrap()
    }

    async fn get(&mut self, path: &str) -> Response<Incoming> {
        self.send(Method::GET, path).await
    }

    /// As a process that ends.
    fn disconnect(self) {
        self.socket.shutdown(Shutdown::Both).unwrap();
    }
}

/// What another client is told meanwhile.
async fn status(version: Version, address: SocketAddr, path: &str) -> StatusCode {
    Client::connect(version, address)
        .await
        .get(path)
        .await
        .status()
}

async fn data(response: &mut Response<Incoming>) -> Bytes {
    let frame = within(LIMIT, "a frame", response.frame()).await;
    frame.expect("a frame").unwrap().into_data().unwrap()
}

/// The body ends, and not well.
async fn is_cut_off(response: Response<Incoming>) {
    let rest = within(LIMIT, "the end", response.into_body().collect()).await;
    assert!(rest.is_err(), "a clean end: {rest:?}");
}

mod end {
    use super::*;

    type Events = mpsc::UnboundedReceiver<&'static str>;

    async fn events(
        State(events): State<Arc<Mutex<Option<Events>>>>,
    ) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
        let events = events.lock().await.take().unwrap();
        Sse::new(stream::unfold(events, async |mut events| {
            let event = Event::default().data(events.recv().await?);
            Some((Ok(event), events))
        }))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_event_stream_holds_the_lock_until_its_end() {
        for version in VERSIONS {
            let locks = LockFactory::new(MemoryStorage::new());
            let (sender, receiver) = mpsc::unbounded_channel();
            let lock = layer(&locks);
            let app = Router::new()
                .route("/events", get(events).route_layer(lock))
                .with_state(Arc::new(Mutex::new(Some(receiver))));
            let address = serve(app).await;
            let mut client = Client::connect(version, address).await;
            let mut response = client.get("/events").await;
            assert_eq!(response.headers()["content-type"], "text/event-stream");
            for event in ["one", "two"] {
                sender.send(event).unwrap();
                assert_eq!(data(&mut response).await, format!("data: {event}\n\n"));
                let other = status(version, address, "/events").await;
                assert_eq!(other, StatusCode::LOCKED, "{version:?}");
            }
            drop(sender);
            let rest = within(LIMIT, "the end", response.into_body().collect()).await;
            assert_eq!(rest.unwrap().to_bytes(), "", "a clean end");
            eventually("released", LIMIT, async || locks.keys() == 0).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_gets_the_lock_when_the_body_has_ended() {
        for version in VERSIONS {
            let patient = LockOptions::builder().retries(100).build().unwrap();
            let server = Server::start(MemoryStorage::new(), |lock| lock.options(patient)).await;
            let mut first = Client::connect(version, server.address).await;
            let mut first = first.get("/told").await;
            let first_sent = server.sent().await;
            let address = server.address;
            let second = tokio::spawn(async move {
                let mut client = Client::connect(version, address).await;
                let mut second = client.get("/told").await;
                data(&mut second).await
            });
            let locks = &server.locks;
            eventually("it waits", LIMIT, async || locks.waiters() == 1).await;
            first_sent.tell(Step::Last("all"));
            assert_eq!(data(&mut first).await, "all");
            let second_sent = server.sent().await;
            assert_eq!(first_sent.end.held(), Some(true), "one body at a time");
            second_sent.tell(Step::Last("all"));
            assert_eq!(second.await.unwrap(), "all");
            server.is_released().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_error_in_mid_stream_releases_and_the_client_sees_it() {
        for version in VERSIONS {
            let server = Server::start(MemoryStorage::new(), |lock| lock).await;
            let mut client = Client::connect(version, server.address).await;
            let mut response = client.get("/told").await;
            let sent = server.sent().await;
            sent.tell(Step::Data("half"));
            assert_eq!(data(&mut response).await, "half");
            assert_eq!(server.locks.keys(), 1);
            sent.tell(Step::Error("disk full"));
            is_cut_off(response).await;
            server.is_released().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_body_of_known_length_keeps_it_and_releases_with_its_last_byte() {
        for version in VERSIONS {
            let server = Server::start(MemoryStorage::new(), |lock| lock).await;
            let mut client = Client::connect(version, server.address).await;
            let mut response = client.get("/told/10").await;
            assert_eq!(response.headers()[header::CONTENT_LENGTH], "10");
            let sent = server.sent().await;
            sent.tell(Step::Data("01234"));
            assert_eq!(data(&mut response).await, "01234");
            assert_eq!(server.locks.keys(), 1, "{version:?}");
            sent.tell(Step::Last("56789"));
            assert_eq!(data(&mut response).await, "56789");
            server.is_released().await;
            assert_eq!(sent.end.held(), Some(true), "the work ends first");

            let response = client.get("/text").await;
            assert_eq!(response.headers()[header::CONTENT_LENGTH], "12");
            let text = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(text, "twelve bytes");
            server.is_released().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_response_without_a_body_releases() {
        for version in VERSIONS {
            let server = Server::start(MemoryStorage::new(), |lock| lock).await;
            let mut client = Client::connect(version, server.address).await;
            assert_eq!(client.get("/nothing").await.status(), 204);
            server.is_released().await;

            // What would be the body of a GET is not sent.
            let response = client.send(Method::HEAD, "/text").await;
            assert_eq!(response.headers()[header::CONTENT_LENGTH], "12");
            server.is_released().await;
            let response = client.send(Method::HEAD, "/told/10").await;
            assert_eq!(response.headers()[header::CONTENT_LENGTH], "10");
            assert!(server.sent().await.end.held().is_some());
            server.is_released().await;
            assert_eq!(client.get("/nothing").await.status(), 204);
        }
    }
}

mod disconnect {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_disconnects_in_mid_stream_releases() {
        for version in VERSIONS {
            let server = Server::start(MemoryStorage::new(), |lock| lock).await;
            let mut client = Client::connect(version, server.address).await;
            let mut response = client.get("/told").await;
            let sent = server.sent().await;
            sent.tell(Step::Data("half"));
            assert_eq!(data(&mut response).await, "half");
            assert_eq!(server.locks.keys(), 1);
            client.disconnect();
            // The body is silent: the server hears of it from the socket.
            server.is_released().await;
            assert_eq!(sent.end.held(), Some(true), "the work ends first");
            assert_eq!(status(version, server.address, "/nothing").await, 204);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_that_is_reset_releases_and_the_connection_goes_on() {
        let server = Server::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = Client::connect(Version::Http2, server.address).await;
        let response = client.get("/told").await;
        let sent = server.sent().await;
        assert_eq!(server.locks.keys(), 1);
        drop(response);
        server.is_released().await;
        assert_eq!(sent.end.held(), Some(true), "the work ends first");
        assert_eq!(client.get("/text").await.status(), StatusCode::OK);
    }

    /// It reads nothing, and all that the kernel would take for it is full.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_stops_reading_loses_the_lock_at_max_hold() {
        for version in VERSIONS {
            let options = LockOptions::builder()
                .ttl(ms(3000))
                .max_hold(ms(1000))
                .retries(0);
            let options = options.build().unwrap();
            let server = Server::start(MemoryStorage::new(), |lock| lock.options(options)).await;
            let mut client = Client::connect(version, server.address).await;
            let response = client.get("/told").await;
            let sent = server.sent().await;
            let flood: &'static str = "x".repeat(1 << 20).leak();
            for _ in 0..64 {
                sent.tell(Step::Data(flood));
            }
            let reason = within(LIMIT, "the loss", sent.lock.lost()).await;
            assert_eq!(reason, LossReason::MaxHold);
            let locks = &server.locks;
            let free = async || {
                let next = locks.create_lock("/told").unwrap();
                next.try_lock(at_once()).await.is_ok()
            };
            eventually("the next gets the lock", LIMIT, free).await;
            // It reads on, and sees that there is no more.
            is_cut_off(response).await;
            server.is_released().await;
        }
    }
}

mod lost {
    use super::*;

    fn quick() -> LockOptions {
        let options = LockOptions::builder().ttl(ms(3000)).retries(0);
        options.build().unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_client_sees_that_the_body_is_not_the_whole_when_the_lock_is_taken_away() {
        let redis = RedisServer::start().await;
        for version in VERSIONS {
            let storage = RedisStorage::connect(redis.url()).await.unwrap();
            let server = Server::start(storage, |lock| lock.options(quick())).await;
            // In chunks, and with a length.
            for route in ["/told", "/told/1000"] {
                let mut client = Client::connect(version, server.address).await;
                let mut response = client.get(route).await;
                let sent = server.sent().await;
                sent.tell(Step::Data("half"));
                assert_eq!(data(&mut response).await, "half");
                let key = format!("distributed-locks:{route}");
                let deleted: usize = redis.run(&format!("DEL {key}")).await;
                assert_eq!(deleted, 1);
                is_cut_off(response).await;
                assert!(sent.end.held().is_some(), "the body is dropped");
                server.is_released().await;
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_client_sees_that_the_body_is_not_the_whole_when_redis_is_away_for_too_long() {
        let mut redis = RedisServer::start().await;
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        let server = Server::start(storage, |lock| lock.options(quick())).await;
        let mut responses = Vec::new();
        for (version, route) in VERSIONS.into_iter().zip(["/told", "/told/1000"]) {
            let mut client = Client::connect(version, server.address).await;
            let mut response = client.get(route).await;
            let sent = server.sent().await;
            sent.tell(Step::Data("half"));
            assert_eq!(data(&mut response).await, "half");
            responses.push((client, response, sent));
        }
        redis.kill();
        for (_client, response, sent) in responses {
            is_cut_off(response).await;
            assert!(sent.end.held().is_some(), "the body is dropped");
        }
    }
}

mod placement {
    use super::*;

    /// The type of the response stays what it is.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_layer_fits_where_it_did() {
        let locks = LockFactory::new(MemoryStorage::new());
        let lock = || layer(&locks);
        let held = {
            let locks = locks.clone();
            async move || {
                let locks = locks.clone();
                Body::from_stream(stream::once(async move {
                    Ok::<_, Infallible>(locks.keys().to_string())
                }))
            }
        };
        let nested = Router::new()
            .route("/inner", get(held.clone()))
            .layer(lock());
        let app = Router::new()
            .route(
                "/optional",
                get(held.clone()).layer(option_layer(Some(lock()))),
            )
            .route("/not", get(held.clone()).layer(option_layer(None::<Layer>)))
            .route("/route", get(held.clone()).route_layer(lock()))
            .route("/method", get(held.clone()).layer(lock()))
            .nest("/nested", nested);
        let address = serve(app).await;
        for version in VERSIONS {
            for (path, keys) in [
                ("/optional", "1"),
                ("/not", "0"),
                ("/route", "1"),
                ("/method", "1"),
                ("/nested/inner", "1"),
            ] {
                let mut client = Client::connect(version, address).await;
                let body = client.get(path).await.into_body();
                let body = within(LIMIT, path, body.collect()).await.unwrap();
                assert_eq!(body.to_bytes(), keys, "{path}");
                eventually("released", LIMIT, async || locks.keys() == 0).await;
            }
        }
    }
}
