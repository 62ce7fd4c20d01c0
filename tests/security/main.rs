//! Who can forge, read and starve what: the promises of `docs/security.md`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

#[path = "../observability/capture.rs"]
mod capture;
mod debug;
mod docs;
mod errors;
mod forging;
#[path = "../kit/mod.rs"]
mod kit;
mod licences;

use tower_distributed_lock::{
    LockFactory,
    storage::{RedisStorage, redis::RedisStorageBuilder},
};

use self::kit::ms;

fn factory(storage: RedisStorageBuilder) -> LockFactory {
    LockFactory::new(storage.connect_lazily().unwrap())
}

fn url(server: &kit::RedisServer) -> RedisStorageBuilder {
    RedisStorage::builder(server.url())
}
