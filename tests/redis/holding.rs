//! A lock that is held stays: it is renewed, it outlasts its ttl by the delay, and a holder that lost
//! it is told.

use std::time::{Duration, Instant};

use tower_distributed_lock::{LockFactory, LockGuard, Unlocked, error::LossReason};

use super::{
    kit::{
        LIMIT, LONG, RedisServer, it_stands_in_the_queue, ms, no_key_is_left, options, patient,
        within,
    },
    lock, storage,
};

#[tokio::test]
async fn a_lock_is_renewed_for_as_long_as_it_is_held() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "renewed").await;
    let ttl = ms(1200);
    let guard = lock.lock(options(ttl, LIMIT)).await.unwrap();
    let owner: String = server.run("GET distributed-locks:renewed").await;
    let started = Instant::now();
    while started.elapsed() < 3 * ttl {
        let left: i64 = server.run("PTTL distributed-locks:renewed").await;
        assert!(
            left > 0 && left <= 1200,
            "{left} after {:?}",
            started.elapsed()
        );
        let still: Option<String> = server.run("GET distributed-locks:renewed").await;
        assert_eq!(still.as_ref(), Some(&owner));
        assert!(guard.is_held());
        tokio::time::sleep(ms(20)).await;
    }
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn the_server_keeps_a_lock_for_its_ttl_and_the_delay() {
    const DELAY: Duration = Duration::from_secs(600);
    let server = RedisServer::start().await;
    let connect = async || {
        let builder = LockFactory::builder(storage(&server).await).lock_delay(DELAY);
        builder.build().unwrap().create_lock("k").unwrap()
    };
    let (first, second) = (connect().await, connect().await);
    let guard = first.lock(patient()).await.unwrap();
    let assert_delayed = async |guard: &LockGuard| {
        assert!(guard.remaining() > LONG / 2 && guard.remaining() < LONG);
        let left: u64 = server.run("PTTL distributed-locks:k").await;
        assert!(ms(left) > LONG / 2 + DELAY && ms(left) <= LONG + DELAY);
    };
    assert_delayed(&guard).await;
    let waiting = tokio::spawn(second.lock(patient()));
    it_stands_in_the_queue(&server).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    // At once, and by a message.
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_delayed(&guard).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_holder_whose_key_was_removed_is_told_by_the_next_renewal() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "removed").await;
    let ttl = Duration::from_secs(6);
    let guard = lock.lock(options(ttl, LIMIT)).await.unwrap();
    let () = server.run("DEL distributed-locks:removed").await;
    let removed = Instant::now();
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert_eq!(reason, LossReason::NotOurs);
    assert!(
        removed.elapsed() < ttl / 3 + ms(1500),
        "{:?}",
        removed.elapsed()
    );
    assert!(!guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(
        server.keys().await,
        0,
        "the renewal has not brought it back"
    );
}
