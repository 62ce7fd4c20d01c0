//! A service may start before its Redis does, or not, as it chooses.

use std::time::Instant;

use tower_distributed_lock::{
    LockFactory, Redlock,
    error::StorageErrorKind,
    storage::{LockStorage, redis::RedisStorageBuilder},
};

use super::{
    LONG, cluster, factory,
    kit::{Cluster, LIMIT, RedisServer, Sentinel, ms, within},
    options, sentinel, unlock,
};

/// Nobody there: it is told soon.
async fn is_told<T: std::fmt::Debug>(
    connecting: impl Future<Output = Result<T, tower_distributed_lock::error::StorageError>>,
) {
    let started = Instant::now();
    let error = within(LIMIT, "an answer", connecting).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    assert!(started.elapsed() < ms(5_000), "{:?}", started.elapsed());
}

/// A lock that was wanted while nobody was there is had when they come.
async fn waits(factory: LockFactory, come: impl AsyncFnOnce()) {
    let lock = factory.create_lock("k").unwrap();
    let waiting = tokio::spawn(lock.lock(options(LONG)));
    while factory.waiters() == 0 {
        tokio::task::yield_now().await;
    }
    come().await;
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    unlock(guard).await;
}

fn over(storage: impl LockStorage) -> LockFactory {
    LockFactory::new(storage)
}

#[tokio::test]
async fn a_service_may_start_before_its_sentinels() {
    let mut redis = Sentinel::start().await;
    let storage: RedisStorageBuilder = sentinel(&redis);
    storage.clone().connect().await.unwrap();
    redis.sentinels.iter_mut().for_each(RedisServer::kill);
    is_told(storage.clone().connect()).await;
    waits(factory(storage), async || {
        for sentinel in &mut redis.sentinels {
            sentinel.restart().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_service_may_start_before_its_cluster() {
    let mut redis = Cluster::start().await;
    let storage = cluster(&redis);
    storage.clone().connect().await.unwrap();
    redis.nodes.iter_mut().for_each(RedisServer::kill);
    is_told(storage.clone().connect()).await;
    waits(factory(storage), async || {
        for node in &mut redis.nodes {
            node.restart().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_service_may_start_before_the_servers_of_its_redlock() {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(RedisServer::start().await);
    }
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    servers.iter_mut().for_each(RedisServer::kill);
    is_told(Redlock::connect(urls.clone())).await;
    let lazy = Redlock::connect_lazily(urls.clone()).unwrap();
    waits(over(lazy), async || {
        // A majority will do.
        for server in &mut servers[1..] {
            server.restart().await;
        }
    })
    .await;

    let twice = [urls[0].as_str(), urls[0].as_str()];
    let none: [&str; 0] = [];
    for error in [
        Redlock::connect_lazily(twice).unwrap_err(),
        Redlock::connect_lazily(none).unwrap_err(),
        Redlock::connect_lazily(["nothing"]).unwrap_err(),
    ] {
        assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    }
}
