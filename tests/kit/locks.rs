//! Locks as the tests over a server take them: for how long, what is left of them in the server, and
//! what an error says.

use std::{error::Error, time::Duration};

use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, StorageError},
};

use super::{LIMIT, RedisServer, eventually, ms};

/// A ttl that does not end during a test: what disappears was removed.
pub const LONG: Duration = Duration::from_secs(300);

/// Waits for up to `wait`, asking every `interval` or half of it.
pub fn asking(ttl: Duration, wait: Duration, interval: Duration) -> LockOptions {
    let retries = wait.as_millis() / interval.as_millis();
    LockOptions::builder()
        .ttl(ttl)
        .interval(interval)
        .retries(retries.try_into().expect("few retries"))
        .build()
        .expect("valid options")
}

/// Waits for up to `wait`, asking every 10 to 20 ms.
pub fn options(ttl: Duration, wait: Duration) -> LockOptions {
    asking(ttl, wait, ms(20))
}

pub fn patient() -> LockOptions {
    options(LONG, LIMIT)
}

/// Takes a free lock and gives it back: the fencing token that it came with.
pub async fn token(factory: &LockFactory, key: &str) -> u64 {
    let lock = factory.create_lock(key).expect("a valid key");
    let guard = lock.lock(patient()).await.expect("the lock");
    let token = guard.fencing_token().expect("a fencing token");
    assert_eq!(guard.unlock().await.expect("an answer"), Unlocked::Held);
    token
}

/// How many processes wait for the lock, as this server knows.
pub async fn queued(server: &RedisServer, key: &str) -> usize {
    let queue = format!("GET {{distributed-locks:{key}}}:queue");
    let queue: Option<String> = server.run(&queue).await;
    queue.unwrap_or_default().lines().count()
}

/// So many processes wait for the lock.
pub async fn is_queued(server: &RedisServer, key: &str, count: usize) {
    eventually("it stands in the queue", LIMIT, async || {
        queued(server, key).await == count
    })
    .await;
}

/// Somebody waits for the lock `k`.
pub async fn it_stands_in_the_queue(server: &RedisServer) {
    let exists = "EXISTS {distributed-locks:k}:queue";
    eventually("it stands in the queue", LIMIT, async || {
        server.run::<u64>(exists).await > 0
    })
    .await;
}

pub async fn no_key_is_left(server: &RedisServer) {
    eventually("no key is left", LIMIT, async || server.keys().await == 0).await;
}

/// The error of the storage that a caller was told.
pub fn storage_error(result: Result<LockGuard, LockError>) -> StorageError {
    match result {
        Err(LockError::Storage(error)) => error,
        other => panic!("expected a storage error, got {other:?}"),
    }
}

/// All that an error says, to whomever.
pub fn texts(error: &dyn Error) -> String {
    let mut texts = format!("{error:?} {error:#?} {error}");
    let mut source = error.source();
    while let Some(error) = source {
        texts += &format!(" {error:?} {error}");
        source = error.source();
    }
    texts
}
