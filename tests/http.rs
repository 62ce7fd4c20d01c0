//! The layer in front of real connections: axum over HTTP/1, tonic over HTTP/2.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Path, Request},
    routing::{get, post},
};
use http::StatusCode;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tower::{ServiceBuilder, util::option_layer};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions, error::InvalidKey,
    storage::MemoryStorage,
};

const LIMIT: Duration = Duration::from_secs(20);

fn path<B>(request: &http::Request<B>) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

async fn send(method: &str, address: SocketAddr, path: &str) -> (StatusCode, String) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let request = hyper::Request::builder()
        .method(method)
        .uri(format!("http://{address}{path}"));
    let response = client
        .request(request.body(Empty::new()).unwrap())
        .await
        .unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// Waits for something that nothing tells of.
async fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let happens = async {
        while !happened() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, happens).await.is_ok(), "{what}");
}

/// Sends a request and leaves before the answer; says when the server has it by what `arrived`
/// waits for.
async fn request_and_leave(address: SocketAddr, path: &str, arrived: impl Future<Output = ()>) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    arrived.await;
    drop(socket);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_while_its_handler_runs_releases() {
    let locks = LockFactory::new(MemoryStorage::new());
    let started = Arc::new(Notify::new());
    let signal = Arc::clone(&started);
    let hangs = move || {
        let signal = Arc::clone(&signal);
        async move {
            signal.notify_one();
            std::future::pending::<()>().await;
        }
    };
    let lock = DistributedLockLayer::new(locks.clone(), path);
    let address = serve(Router::new().route("/a", post(hangs).route_layer(lock))).await;

    request_and_leave(address, "/a", started.notified()).await;
    eventually("the lock is released", || locks.keys() == 0).await;
    let next = locks
        .create_lock("/a")
        .unwrap()
        .try_lock(LockOptions::default())
        .await;
    assert!(next.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_while_it_waits_leaves_the_queue() {
    let locks = LockFactory::new(MemoryStorage::new());
    let held = locks
        .create_lock("/a")
        .unwrap()
        .lock(LockOptions::default())
        .await
        .unwrap();
    let lock = DistributedLockLayer::new(locks.clone(), path);
    let address = serve(Router::new().route("/a", post(async || ()).route_layer(lock))).await;

    let waits = eventually("the request waits", || locks.waiters() == 1);
    request_and_leave(address, "/a", waits).await;
    eventually("the queue is empty", || locks.waiters() == 0).await;
    assert!(held.is_held());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_response_head_comes_with_the_lock_released() {
    let locks = LockFactory::new(MemoryStorage::new());
    let lock = DistributedLockLayer::new(locks.clone(), path).await_release(true);
    let streams = async || {
        Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>())
    };
    let address = serve(Router::new().route("/a", post(streams).route_layer(lock))).await;

    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = "POST /a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0; 15];
    socket.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    // The body goes on, the lock does not: that is what the docs say of streamed bodies.
    assert_eq!(locks.keys(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_panics_or_times_out_outside_the_lock_releases_it() {
    use tower_http::{catch_panic::CatchPanicLayer, timeout::TimeoutLayer};

    async fn panics() {
        panic!("a bug in the handler")
    }

    let locks = LockFactory::new(MemoryStorage::new());
    let stack = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            Duration::from_millis(20),
        ))
        .layer(DistributedLockLayer::new(locks.clone(), path::<Body>));
    let app = Router::new()
        .route("/panics", post(panics))
        .route("/hangs", post(async || std::future::pending::<()>().await))
        .layer(stack);
    let address = serve(app).await;
    for (path, status) in [("/panics", 500), ("/hangs", 504)] {
        assert_eq!(send("POST", address, path).await.0, status);
        eventually("the lock is released", || locks.keys() == 0).await;
    }
}

mod placement {
    use super::*;

    /// Which requests take a lock, under each placement that the README names. Every path is held,
    /// so a request that takes a lock is answered with 423, and one that does not with what the
    /// router has for it.
    async fn locked(app: impl FnOnce(LockFactory) -> Router) -> [StatusCode; 4] {
        let locks = LockFactory::new(MemoryStorage::new());
        let address = serve(app(locks.clone())).await;
        let mut held = Vec::new();
        for path in ["/a/1", "/none"] {
            let lock = locks.create_lock(path).unwrap();
            held.push(lock.lock(LockOptions::default()).await.unwrap());
        }
        let mut seen = Vec::new();
        for (method, path) in [
            ("POST", "/a/1"),
            ("POST", "/none"),
            ("PUT", "/a/1"),
            ("HEAD", "/a/1"),
        ] {
            seen.push(send(method, address, path).await.0);
        }
        seen.try_into().unwrap()
    }

    fn lock(
        locks: LockFactory,
    ) -> DistributedLockLayer<
        impl Fn(&Request) -> Result<LockKey, InvalidKey> + Send + Sync + 'static,
    > {
        DistributedLockLayer::new(locks, path::<Body>)
            .options(LockOptions::builder().retries(0).build().unwrap())
    }

    const OK: StatusCode = StatusCode::OK;
    const NONE: StatusCode = StatusCode::NOT_FOUND;
    const METHOD: StatusCode = StatusCode::METHOD_NOT_ALLOWED;
    const LOCKED: StatusCode = StatusCode::LOCKED;

    #[tokio::test]
    async fn a_route_layer_on_the_method_locks_that_method_alone() {
        let app = |locks| {
            Router::new().route(
                "/a/{id}",
                post(async || ()).route_layer(lock(locks)).get(async || ()),
            )
        };
        assert_eq!(locked(app).await, [LOCKED, NONE, METHOD, OK]);
    }

    #[tokio::test]
    async fn a_layer_on_the_handler_locks_that_method_alone() {
        use axum::handler::Handler;
        async fn handler() {}
        let app = |locks| {
            Router::new().route("/a/{id}", post(handler.layer(lock(locks))).get(async || ()))
        };
        assert_eq!(locked(app).await, [LOCKED, NONE, METHOD, OK]);
    }

    #[tokio::test]
    async fn a_layer_on_the_method_router_runs_for_405_too() {
        let app = |locks| Router::new().route("/a/{id}", post(async || ()).layer(lock(locks)));
        assert_eq!(locked(app).await, [LOCKED, NONE, LOCKED, LOCKED]);
    }

    #[tokio::test]
    async fn a_route_layer_on_the_router_runs_for_all_methods_of_its_routes() {
        let app = |locks| {
            Router::new()
                .route("/a/{id}", post(async || ()).get(async || ()))
                .route_layer(lock(locks))
        };
        assert_eq!(locked(app).await, [LOCKED, NONE, LOCKED, LOCKED]);
    }

    #[tokio::test]
    async fn a_layer_on_the_router_runs_for_everything() {
        let app = |locks| {
            Router::new()
                .route("/a/{id}", post(async || ()).get(async || ()))
                .layer(lock(locks))
        };
        assert_eq!(locked(app).await, [LOCKED, LOCKED, LOCKED, LOCKED]);
    }

    #[tokio::test]
    async fn it_can_be_optional_and_part_of_a_stack() {
        for on in [true, false] {
            let app = |locks| {
                let stack = ServiceBuilder::new().layer(option_layer(on.then(|| lock(locks))));
                Router::new()
                    .route("/a/{id}", post(async || ()))
                    .layer(stack)
            };
            assert_eq!(locked(app).await[0], if on { LOCKED } else { OK });
        }
    }
}

mod extractor {
    use super::*;

    async fn handler(Path(id): Path<u64>, lock: HeldLock) -> String {
        format!("{id} {} {}", lock.key(), lock.is_held())
    }

    async fn with_or_without(lock: Option<HeldLock>) -> String {
        lock.is_some().to_string()
    }

    #[tokio::test]
    async fn a_handler_can_ask_for_its_lock() {
        let locks = LockFactory::new(MemoryStorage::new());
        let app = Router::new()
            .route("/a/{id}", post(handler))
            .route("/b", get(with_or_without))
            .layer(DistributedLockLayer::new(locks, path::<Body>));
        let address = serve(app).await;
        assert_eq!(
            send("POST", address, "/a/7").await,
            (StatusCode::OK, "7 /a/7 true".into())
        );
        assert_eq!(send("GET", address, "/b").await.1, "true");
    }

    #[tokio::test]
    async fn a_handler_without_its_layer_says_what_is_missing() {
        let app = Router::new()
            .route("/a/{id}", post(handler))
            .route("/b", get(with_or_without));
        let address = serve(app).await;
        let (status, text) = send("POST", address, "/a/7").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(
            text.contains("put a `DistributedLockLayer` around this route"),
            "{text}"
        );
        assert_eq!(
            send("GET", address, "/b").await,
            (StatusCode::OK, "false".into())
        );
    }
}

/// A tonic service and a tonic client, written by hand so that no protoc is needed.
mod grpc {
    use std::{
        convert::Infallible,
        task::{Context, Poll},
    };

    use tonic::{
        Code, Status,
        body::Body,
        client::Grpc,
        server::{NamedService, UnaryService},
        transport::{Channel, Server, server::TcpIncoming},
    };
    use tonic_prost::ProstCodec;

    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    /// `/test.Echo/Echo`.
    #[derive(Clone)]
    struct Echo;

    impl NamedService for Echo {
        const NAME: &'static str = "test.Echo";
    }

    impl UnaryService<Text> for Echo {
        type Response = Text;
        type Future = std::future::Ready<Result<tonic::Response<Text>, Status>>;

        fn call(&mut self, request: tonic::Request<Text>) -> Self::Future {
            let lock = request
                .extensions()
                .get::<HeldLock>()
                .expect("a `HeldLock`");
            let text = format!("{} under {}", request.get_ref().text, lock.key());
            std::future::ready(Ok(tonic::Response::new(Text { text })))
        }
    }

    impl tower::Service<http::Request<Body>> for Echo {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = futures_util::future::BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            Box::pin(async {
                let mut grpc = tonic::server::Grpc::new(ProstCodec::<Text, Text>::default());
                Ok(grpc.unary(Echo, request).await)
            })
        }
    }

    async fn client(locks: LockFactory) -> Grpc<Channel> {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let lock = DistributedLockLayer::new(locks, |request: &http::Request<Body>| {
            let account = request
                .headers()
                .get("account")
                .ok_or("no account")?
                .as_bytes();
            Ok::<_, tower_distributed_lock::error::BoxError>(LockKey::from_parts([
                b"account", account,
            ])?)
        })
        .options(LockOptions::builder().retries(0).build().unwrap());
        let server = Server::builder().layer(lock).add_service(Echo);
        tokio::spawn(server.serve_with_incoming(incoming));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        Grpc::new(channel.connect().await.unwrap())
    }

    async fn echo(
        client: &mut Grpc<Channel>,
        account: Option<&'static str>,
    ) -> Result<String, Status> {
        client.ready().await.unwrap();
        let mut request = tonic::Request::new(Text {
            text: "hello".into(),
        });
        if let Some(account) = account {
            request
                .metadata_mut()
                .insert("account", account.parse().unwrap());
        }
        let codec = ProstCodec::<Text, Text>::default();
        let path = http::uri::PathAndQuery::from_static("/test.Echo/Echo");
        let response = client.unary(request, path, codec).await?;
        Ok(response.into_inner().text)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tonic_client_gets_its_answer_or_a_grpc_status() {
        let locks = LockFactory::new(MemoryStorage::new());
        let mut client = client(locks.clone()).await;
        assert_eq!(
            echo(&mut client, Some("7")).await.unwrap(),
            "hello under account/7"
        );

        let held = locks.create_lock("account/7").unwrap();
        let held = held.lock(LockOptions::default()).await.unwrap();
        assert_eq!(
            echo(&mut client, Some("7")).await.unwrap_err().code(),
            Code::Aborted
        );
        assert_eq!(
            echo(&mut client, Some("8")).await.unwrap(),
            "hello under account/8"
        );
        assert_eq!(
            echo(&mut client, None).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        drop(held);
        assert_eq!(
            echo(&mut client, Some("7")).await.unwrap(),
            "hello under account/7"
        );

        locks.drain(LIMIT).await;
        assert_eq!(
            echo(&mut client, Some("7")).await.unwrap_err().code(),
            Code::Unavailable
        );
    }
}
