//! The promises of the lock over a real Redis server, most of all while that server fails.
//!
//! Two factories in a test stand for two replicas of a service: they share nothing but the server.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

mod commands;
mod errors;
mod excluding;
mod fencing;
mod holding;
#[path = "../kit/mod.rs"]
mod kit;
mod leaving;
mod outages;
mod reconnecting;
mod runtimes;
mod set;

use tower_distributed_lock::{Lock, LockFactory, storage::RedisStorage};

use self::kit::{LIMIT, RedisServer};

async fn storage(server: &RedisServer) -> RedisStorage {
    // The limits are not what is tested, except where a test says so: a slow machine must not meet
    // them.
    RedisStorage::builder(server.url())
        .connect_timeout(LIMIT)
        .connect()
        .await
        .unwrap()
}

async fn factory(server: &RedisServer) -> LockFactory {
    LockFactory::new(storage(server).await)
}

async fn lock(server: &RedisServer, key: &str) -> Lock {
    factory(server).await.create_lock(key).unwrap()
}
