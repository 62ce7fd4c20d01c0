//! What is true of every way in which Redis is deployed: the layer is the same over each, all of
//! them can be reached over TLS alone and with few rights, a service may start before them, and any
//! of them can be a node of a Redlock.
//!
//! Two factories in a test stand for two replicas of a service: they share nothing but the servers.

// A test says what it expects by panicking, and has no users who read its documentation. What a
// failover cost is printed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[path = "../kit/mod.rs"]
mod kit;

mod access;
mod failover;
mod layer;
mod mixed;
mod start;
mod tls;

use std::time::Duration;

use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked,
    storage::{RedisStorage, redis::RedisStorageBuilder},
};

use self::kit::{Cluster, LIMIT, RedisServer, Sentinel, eventually, ms, within};

/// A ttl that does not end during a test.
const LONG: Duration = Duration::from_secs(300);

/// Renewed every second.
const TTL: Duration = Duration::from_secs(3);

/// Waits for up to [`LIMIT`], and asks every 50 to 100 ms.
fn options(ttl: Duration) -> LockOptions {
    LockOptions::builder()
        .ttl(ttl)
        .interval(ms(100))
        .retries((LIMIT.as_millis() / 100) as u32)
        .build()
        .unwrap()
}

fn sentinel(redis: &Sentinel) -> RedisStorageBuilder {
    RedisStorage::sentinel(Sentinel::SERVICE, redis.urls())
}

fn cluster(redis: &Cluster) -> RedisStorageBuilder {
    RedisStorage::cluster(redis.urls())
}

fn factory(storage: RedisStorageBuilder) -> LockFactory {
    LockFactory::new(storage.connect_lazily().unwrap())
}

async fn lock(factory: &LockFactory, key: &str) -> LockGuard {
    let locking = factory.create_lock(key).unwrap().lock(options(LONG));
    within(LIMIT, "the lock", locking).await.unwrap()
}

async fn unlock(guard: LockGuard) {
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

/// The lock goes from one to the other, who waits for it in the queue, and back.
async fn the_lock_goes_round(factories: [&LockFactory; 2], key: &str) {
    let mut guard = lock(factories[0], key).await;
    for turn in 1..=4 {
        let next = factories[turn % 2];
        let waiting = tokio::spawn(next.create_lock(key).unwrap().lock(options(LONG)));
        eventually("it waits", LIMIT, async || next.waiters() > 0).await;
        let token = guard.fencing_token();
        unlock(guard).await;
        guard = within(LIMIT, "its turn", waiting).await.unwrap().unwrap();
        assert!(guard.fencing_token() > token);
    }
    unlock(guard).await;
}

async fn no_key_is_left(server: &RedisServer) {
    eventually("no key is left", LIMIT, async || server.keys().await == 0).await;
}
