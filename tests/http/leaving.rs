//! However a request ends, its lock is given back: by a client that leaves, a panic, a time-out.

use std::net::Shutdown;

use http::Request as ClientRequest;
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tower::ServiceBuilder;

use super::*;

/// How a client lets a request go.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// HTTP/1 knows no other.
    Close,
    /// RST_STREAM: the connection stays.
    Reset,
    /// All requests of an HTTP/2 connection.
    CloseHttp2,
}

const WAYS: [Way; 3] = [Way::Close, Way::Reset, Way::CloseHttp2];

/// Sends a request and leaves before the answer, when the server has it by what `arrived` waits for.
async fn request_and_leave(
    way: Way,
    address: SocketAddr,
    path: &str,
    arrived: impl Future<Output = ()>,
) {
    let socket = TcpStream::connect(address)
        .await
        .unwrap()
        .into_std()
        .unwrap();
    // Another name of the same connection.
    let closing = socket.try_clone().unwrap();
    let mut socket = TcpStream::from_std(socket).unwrap();
    if let Way::Close = way {
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
        socket.write_all(head.as_bytes()).await.unwrap();
        arrived.await;
        closing.shutdown(Shutdown::Both).unwrap();
        return;
    }
    let (mut client, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = |path: &str| {
        ClientRequest::post(format!("http://{address}{path}"))
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    let answer = tokio::spawn(client.send_request(request(path)));
    arrived.await;
    match way {
        Way::Reset => {
            answer.abort();
            // The connection goes on, so it was the stream that was reset.
            let other = client.send_request(request("/other")).await.unwrap();
            assert_eq!(other.status(), StatusCode::NOT_FOUND);
        }
        _ => closing.shutdown(Shutdown::Both).unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_while_its_handler_runs_releases() {
    for way in WAYS {
        let locks = memory();
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

        let arrived = within(LIMIT, "the handler runs", started.notified());
        request_and_leave(way, address, "/a", arrived).await;
        eventually("the lock is released", LIMIT, async || locks.keys() == 0).await;
        let next = locks.create_lock("/a").unwrap().try_lock(at_once()).await;
        assert!(next.is_ok(), "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_while_it_waits_leaves_the_queue() {
    for way in WAYS {
        let locks = memory();
        let held = hold(&locks, "/a").await;
        let lock = DistributedLockLayer::new(locks.clone(), path).options(kit::patient());
        let address = serve(Router::new().route("/a", post(async || ()).route_layer(lock))).await;

        let waits = eventually("it waits", LIMIT, async || locks.waiters() == 1);
        request_and_leave(way, address, "/a", waits).await;
        eventually("the queue is empty", LIMIT, async || locks.waiters() == 0).await;
        assert!(held.is_held(), "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_response_head_comes_with_the_lock_released() {
    let locks = memory();
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

    let locks = memory();
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
    for version in VERSIONS {
        let client = Client::new(version, address);
        for (path, status) in [("/panics", 500), ("/hangs", 504)] {
            assert_eq!(client.send("POST", path).await.status, status);
            eventually("the lock is released", LIMIT, async || locks.keys() == 0).await;
        }
    }
}
