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
mod health;
mod learning;
mod own_pool;
mod probe;
mod replicas;
mod tls;

use std::{error::Error, time::Duration};

use tower_distributed_lock::{
    Lock, LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, StorageError},
    storage::{RedisStorage, redis::RedisStorageBuilder},
};

use self::kit::{LIMIT, RedisServer, eventually, ms, within};

/// A ttl that does not end during a test: what disappears was removed.
const LONG: Duration = Duration::from_secs(300);

/// Waits for up to `wait`, asking every 10 to 20 ms.
fn options(ttl: Duration, wait: Duration) -> LockOptions {
    LockOptions::builder()
        .ttl(ttl)
        .interval(ms(20))
        .retries((wait.as_millis() / 20).try_into().unwrap())
        .build()
        .unwrap()
}

fn patient() -> LockOptions {
    options(LONG, LIMIT)
}

/// The limits are not what is tested: a slow machine must not meet them.
fn builder(url: impl Into<String>) -> RedisStorageBuilder {
    RedisStorage::builder(url).connect_timeout(LIMIT)
}

async fn factory(builder: RedisStorageBuilder) -> LockFactory {
    LockFactory::new(builder.connect().await.unwrap())
}

fn storage_error(result: Result<LockGuard, LockError>) -> StorageError {
    match result {
        Err(LockError::Storage(error)) => error,
        other => panic!("expected a storage error, got {other:?}"),
    }
}

async fn it_stands_in_the_queue(server: &RedisServer) {
    let exists = "EXISTS {distributed-locks:k}:queue";
    eventually("it stands in the queue", LIMIT, async || {
        server.run::<u64>(exists).await > 0
    })
    .await;
}

async fn no_key_is_left(server: &RedisServer) {
    eventually("no key is left", LIMIT, async || server.keys().await == 0).await;
}

/// All that an error says, to whomever.
fn texts(error: &dyn Error) -> String {
    let mut texts = format!("{error:?} {error:#?} {error}");
    let mut source = error.source();
    while let Some(error) = source {
        texts += &format!(" {error:?} {error}");
        source = error.source();
    }
    texts
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
