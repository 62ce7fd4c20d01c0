//! The layer in front of real connections: axum over HTTP/1 and HTTP/2, tonic over HTTP/2.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends where it fails, and documents itself by its name"
)]

mod extractor;
mod grpc;
mod leaving;
#[cfg(feature = "redis")]
mod outages;
mod placement;
mod rejections;

#[path = "../kit/mod.rs"]
mod kit;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router, ServiceExt,
    body::Body,
    extract::{Path, Request},
    response::Response,
    routing::{get, post},
};
use http::{HeaderMap, StatusCode, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, sync::Notify};
use tower::Service;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockGuard, LockKey, LockOptions,
    error::InvalidKey, storage::MemoryStorage,
};

use self::kit::{LIMIT, eventually, ms, within};

/// Each promise is kept over both.
const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

fn path<B>(request: &http::Request<B>) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

/// Does not wait for the lock.
fn at_once() -> LockOptions {
    LockOptions::builder().retries(0).build().unwrap()
}

fn memory() -> LockFactory {
    LockFactory::new(MemoryStorage::new())
}

/// Takes a lock that is free.
async fn hold(locks: &LockFactory, key: &str) -> LockGuard {
    let lock = locks.create_lock(key).unwrap();
    lock.lock(LockOptions::default()).await.unwrap()
}

async fn serve<S>(app: S) -> SocketAddr
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = ServiceExt::<Request>::into_make_service(app);
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// A client of one server that speaks one version of HTTP.
#[derive(Clone)]
struct Client {
    http: legacy::Client<HttpConnector, Empty<Bytes>>,
    version: Version,
    address: SocketAddr,
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        Some(self.headers.get(name)?.to_str().unwrap())
    }
}

impl Client {
    fn new(version: Version, address: SocketAddr) -> Self {
        let http = legacy::Client::builder(TokioExecutor::new())
            .http2_only(version == Version::HTTP_2)
            .build_http();
        Self {
            http,
            version,
            address,
        }
    }

    async fn send(&self, method: &str, path: &str) -> Answer {
        self.send_with(method, path, &[]).await
    }

    async fn send_with(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = self.http.request(request.body(Empty::new()).unwrap());
        let response = within(LIMIT, "an answer", request).await.unwrap();
        assert_eq!(response.version(), self.version);
        let (head, body) = response.into_parts();
        let body = within(LIMIT, "a body", body.collect()).await.unwrap();
        Answer {
            status: head.status,
            headers: head.headers,
            text: String::from_utf8(body.to_bytes().to_vec()).unwrap(),
        }
    }
}
