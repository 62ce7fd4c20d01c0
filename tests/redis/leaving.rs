//! Callers that go before they have a lock leave nothing behind, neither in the server nor here.

use std::{
    pin::pin,
    task::{Context, Waker},
    time::Duration,
};

use tower_distributed_lock::{LockFactory, Unlocked, storage::RedisStorage};

use super::{
    factory,
    kit::{LIMIT, Proxy, RedisServer, eventually, no_key_is_left, patient, within},
};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_calls_that_are_never_answered() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let factory = LockFactory::new(RedisStorage::connect(proxy.url()).await.unwrap());
    let lock = factory.create_lock("first").unwrap();
    drop(lock.lock(patient()).await.unwrap());
    no_key_is_left(&server).await;

    proxy.lose_replies();
    let () = server.run("CONFIG RESETSTAT").await;
    // So many that they are sent together.
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..30 {
        let lock = factory.create_lock(format!("never-{caller}")).unwrap();
        callers.spawn(lock.lock(patient()));
    }
    eventually("all have asked", LIMIT, async || {
        server.calls("set").await >= 30
    })
    .await;
    callers.shutdown().await;
    drop((lock, factory));
    // What they asked for is given back over a new connection, and that is closed, too.
    no_key_is_left(&server).await;
    eventually("no connection is left", LIMIT, async || {
        proxy.open_connections() == 0
    })
    .await;
}

#[tokio::test]
async fn a_caller_that_is_dropped_while_it_asks_leaves_no_key() {
    let server = RedisServer::start().await;
    let factory = factory(&server).await;
    let lock = factory.create_lock("dropped").unwrap();
    // Now there is a connection, and what is asked goes out at once.
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let () = server.run("CONFIG RESETSTAT").await;

    server.pause();
    {
        let mut asks = pin!(lock.lock(patient()));
        let polled = asks.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
    }
    server.resume();
    eventually("the key was taken and freed", LIMIT, async || {
        server.calls("set").await == 1 && server.keys().await == 0
    })
    .await;
    eventually("nothing is kept", LIMIT, async || factory.keys() == 0).await;
    assert_eq!(factory.waiters(), 0);
}

#[tokio::test]
async fn a_dropped_waiter_leaves_no_key() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let lock = second.create_lock("k").unwrap();
    for round in 0..100_u64 {
        let guard = first
            .create_lock("k")
            .unwrap()
            .lock(patient())
            .await
            .unwrap();
        // Some stand behind others, some ask, some are about to have it; and all go at some moment.
        let mut waiters: Vec<_> = (0..4).map(|_| tokio::spawn(lock.lock(patient()))).collect();
        let wait = Duration::from_micros(round * 50);
        tokio::time::sleep(wait).await;
        let releasing = tokio::spawn(guard.unlock());
        tokio::time::sleep(wait).await;
        // Every other time the last one stays, and comes up whoever has gone before it.
        let stays = (round % 2 == 0).then(|| waiters.pop()).flatten();
        for waiter in waiters {
            waiter.abort();
            // A guard that it has got already is dropped here.
            let _ = waiter.await;
        }
        let released = within(LIMIT, "the release", releasing).await.unwrap();
        assert_eq!(released.unwrap(), Unlocked::Held);
        if let Some(waiter) = stays {
            let guard = within(2 * LIMIT, "its turn", waiter).await.unwrap();
            assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
        }
        // The next one is not held up. (It would be, until the ttl, by a key that was left.)
        let next = lock.lock(patient()).await.unwrap();
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    }
    no_key_is_left(&server).await;
    eventually("nothing is kept", LIMIT, async || {
        [&first, &second].map(|factory| (factory.keys(), factory.waiters())) == [(0, 0); 2]
    })
    .await;
}
