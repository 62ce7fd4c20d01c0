//! Keys from requests: what the ready-made key functions make of what clients send, several keys in
//! one request, options of a request's own, and clients that say how long they wait.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends where it fails, and documents itself by its name"
)]

mod extractors;
mod headers;
mod paths;
mod patience;
mod refusals;
mod several;

use std::{convert::Infallible, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use http::{HeaderName, StatusCode};
use http_body_util::BodyExt;
use tower::{Layer, Service, ServiceExt};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, HeldLock, LockFactory, LockGuard, LockKey, LockOptions,
    error::{BoxError, InvalidKey},
    middleware::{
        Rejection, RequestKey,
        key::{KeyFunction, KeyRejected, extracted, header, metadata, path_params},
    },
    storage::MemoryStorage,
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A layer that says in the body why it rejects.
fn layer<K>(key: K) -> DistributedLockLayer<K, impl Fn(Rejection) -> Response + Clone> {
    DistributedLockLayer::new(LockFactory::new(MemoryStorage::new()), key).on_reject(
        |rejection: Rejection| {
            let mut response = Response::new(Body::from(rejection.to_string()));
            *response.status_mut() = rejection.status();
            response
        },
    )
}

/// A handler that says what is locked.
async fn locked(lock: HeldLock) -> String {
    lock.key().to_string()
}

async fn send<S>(service: S, request: Request) -> (StatusCode, String)
where
    S: Service<Request, Response = Response, Error = Infallible>,
{
    let response = service.oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

fn post(path: &str) -> Request {
    Request::post(path).body(Body::empty()).unwrap()
}

/// Two replicas on paused time.
struct World {
    storage: MemoryStorage,
    factory: LockFactory,
    other: LockFactory,
}

impl World {
    fn new() -> Self {
        let storage = MemoryStorage::with_clock(Clock::tokio());
        Self {
            factory: Self::factory(storage.clone()),
            other: Self::factory(storage.clone()),
            storage,
        }
    }

    fn factory(storage: impl tower_distributed_lock::storage::LockStorage) -> LockFactory {
        let builder = LockFactory::builder(storage).clock(Clock::tokio());
        builder.build().unwrap()
    }

    /// The other replica has the lock of `key`.
    async fn taken_elsewhere(&self, key: &str) -> LockGuard {
        let lock = self.other.create_lock(key).unwrap();
        lock.try_lock(LockOptions::default()).await.unwrap()
    }

    fn assert_nothing_left(&self) {
        assert_eq!((self.factory.keys(), self.factory.waiters()), (0, 0));
        assert!(self.storage.is_empty());
    }
}

/// Lets everything that can go on go on; paused time does not move.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}
