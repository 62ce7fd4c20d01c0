//! A connection that is broken, closed or silent is replaced.

use std::time::Instant;

use tower_distributed_lock::{LockFactory, Unlocked, storage::RedisStorage};

use super::{
    kit::{LIMIT, Proxy, RedisServer, eventually, ms, patient},
    storage,
};

#[tokio::test]
async fn a_connection_that_the_server_closed_is_replaced_at_once() {
    let server = RedisServer::start().await;
    // Limits so long that whoever waits for them is found out.
    let factory = LockFactory::builder(storage(&server).await)
        .storage_timeout(LIMIT)
        .build()
        .unwrap();
    let lock = factory.create_lock("k").unwrap();
    for _ in 0..20 {
        let guard = lock.lock(patient()).await.unwrap();
        let closed: u64 = server.run("CLIENT KILL TYPE normal SKIPME yes").await;
        assert!(closed > 0);
        let started = Instant::now();
        let other = factory.create_lock("other").unwrap();
        let next = other.lock(patient()).await.unwrap();
        assert!(started.elapsed() < ms(1000), "{:?}", started.elapsed());
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_server_closed_is_noticed_without_a_command() {
    let server = RedisServer::start().await;
    let storage = storage(&server).await;
    assert!(format!("{storage:?}").contains("connected: true"));
    let () = server.run("CLIENT KILL TYPE normal SKIPME yes").await;
    eventually("it is noticed", LIMIT, async || {
        format!("{storage:?}").contains("connected: false")
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_became_a_black_hole_is_replaced_whatever_the_time_out() {
    let server = RedisServer::start().await;
    for timeout in [ms(200), ms(1_000)] {
        let proxy = Proxy::to(&server);
        let storage = RedisStorage::builder(proxy.url()).connect_timeout(LIMIT);
        let factory = LockFactory::builder(storage.connect().await.unwrap())
            .storage_timeout(timeout)
            .build()
            .unwrap();
        let lock = factory.create_lock("k").unwrap();
        for _ in 0..2 {
            let guard = lock.lock(patient()).await.unwrap();
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            let before = proxy.connections();
            proxy.black_hole();
            // One command after the other is given up. Without a new connection they would go on
            // being.
            let guard = lock.lock(patient()).await;
            let guard = guard.unwrap_or_else(|error| panic!("{timeout:?}: {error:?}"));
            assert!(proxy.connections() > before);
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        }
    }
}
