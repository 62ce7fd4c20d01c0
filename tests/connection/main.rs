//! The ways to a Redis server: TLS, users, sockets, a pool of one's own, replicas; and what is said
//! of a server that may lose locks.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

#[path = "../kit/mod.rs"]
mod kit;

mod access;
mod connector;
mod health;
mod learning;
mod own_pool;
mod probe;
mod replicas;
mod tls;

use tower_distributed_lock::{
    Lock, LockFactory, Unlocked,
    storage::{RedisStorage, redis::RedisStorageBuilder},
};

use self::kit::{
    LIMIT, LONG, eventually, it_stands_in_the_queue, ms, no_key_is_left, options, patient,
    storage_error, texts, within,
};

/// The limits are not what is tested: a slow machine must not meet them.
fn builder(url: impl Into<String>) -> RedisStorageBuilder {
    RedisStorage::builder(url).connect_timeout(LIMIT)
}

async fn factory(builder: RedisStorageBuilder) -> LockFactory {
    LockFactory::new(builder.connect().await.unwrap())
}

/// A lock of each factory in turn, while the other waits for it: through the queue, and renewed.
async fn the_lock_goes_round(factories: [&LockFactory; 2]) {
    let locks = factories.map(|factory| factory.create_lock("k").unwrap());
    let mut guard = locks[0].lock(patient()).await.unwrap();
    for turn in 1..=4 {
        let next: &Lock = &locks[turn % 2];
        let waiting = tokio::spawn(next.lock(patient()));
        eventually("it waits", LIMIT, async || {
            factories[turn % 2].waiters() > 0
        })
        .await;
        let token = guard.fencing_token();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        guard = within(LIMIT, "its turn", waiting).await.unwrap().unwrap();
        assert!(guard.fencing_token() > token);
    }
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}
