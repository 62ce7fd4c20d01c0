//! One holder at a time: among tasks, between processes, and with clients of other kinds.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use tokio::task::JoinSet;
use tower_distributed_lock::{Unlocked, error::LockError, storage::conformance};

use super::{
    factory,
    kit::{LIMIT, LONG, RedisServer, eventually, no_key_is_left, options, patient, within},
    lock, storage,
};

#[tokio::test]
async fn redis_keeps_the_contract_of_a_storage() {
    let server = RedisServer::start().await;
    conformance::check(storage(&server).await).await;
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_client_of_another_kind_excludes_us_and_is_excluded() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "orders/42").await;
    let take = "SET distributed-locks:orders/42 theirs NX PX 300000";

    let taken: Option<String> = server.run(take).await;
    assert_eq!(taken.as_deref(), Some("OK"));
    match lock.try_lock(patient()).await {
        Err(LockError::NotObtained(refused)) => {
            let left = refused.holder_ttl.unwrap();
            assert!(left <= LONG && left > LONG / 2, "{left:?}");
        }
        other => panic!("{other:?}"),
    }

    // It sends no wake-up when it releases, and we come all the same.
    let waiting = tokio::spawn(lock.lock(patient()));
    eventually("the waiter has asked", LIMIT, async || {
        server.calls("evalsha").await > 1
    })
    .await;
    let theirs: String = server.run("GET distributed-locks:orders/42").await;
    assert_eq!(theirs, "theirs");
    let () = server.run("DEL distributed-locks:orders/42").await;
    let guard = within(LIMIT, "our turn", waiting).await.unwrap().unwrap();

    let refused: Option<String> = server.run(take).await;
    assert_eq!(refused, None);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let taken: Option<String> = server.run(take).await;
    assert_eq!(taken.as_deref(), Some("OK"));
}

#[tokio::test]
async fn a_late_unlock_does_not_free_the_lock_of_the_next_holder() {
    let server = RedisServer::start().await;
    let (first, second) = (lock(&server, "late").await, lock(&server, "late").await);

    let late = first.lock(patient()).await.unwrap();
    let () = server.run("DEL distributed-locks:late").await;
    let next = second.lock(patient()).await.unwrap();
    let owner: String = server.run("GET distributed-locks:late").await;

    assert_eq!(late.unlock().await.unwrap(), Unlocked::Lost);
    let still: Option<String> = server.run("GET distributed-locks:late").await;
    assert_eq!(still, Some(owner));
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_exclude_each_other_and_leave_no_key() {
    const KEYS: usize = 40;
    let server = RedisServer::start().await;
    let factories = [factory(&server).await, factory(&server).await];
    let inside: Arc<Vec<AtomicBool>> = Arc::new((0..KEYS).map(|_| false.into()).collect());
    let mut tasks = JoinSet::new();
    for task in 0..1000_usize {
        let factory = factories[task % 2].clone();
        let inside = Arc::clone(&inside);
        tasks.spawn(async move {
            // A walk over the keys that differs from task to task.
            let random = Cell::new(task * 7919 + 17);
            for _ in 0..3 {
                random.set(
                    random
                        .get()
                        .wrapping_mul(6364136223846793005)
                        .rotate_left(17)
                        | 1,
                );
                let key = (random.get() >> 8) % KEYS;
                let lock = factory.create_lock(format!("key{key}")).unwrap();
                let guard = lock.lock(options(LONG, 3 * LIMIT)).await.unwrap();
                assert!(!inside[key].swap(true, SeqCst), "two holders");
                tokio::task::yield_now().await;
                inside[key].store(false, SeqCst);
                if task % 3 == 0 {
                    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
                }
            }
        });
    }
    within(4 * LIMIT, "all had their turns", tasks.join_all()).await;
    no_key_is_left(&server).await;
    eventually("nothing is kept", LIMIT, async || {
        factories
            .iter()
            .all(|factory| factory.keys() == 0 && factory.waiters() == 0)
    })
    .await;
}
