//! One holder at a time: among tasks, between processes, and with clients of other kinds.

use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use futures_util::future::{join, join_all};
use tokio::task::JoinSet;
use tower_distributed_lock::{Unlocked, error::LockError, storage::conformance};

use super::{
    factory,
    kit::{LIMIT, LONG, RedisServer, eventually, ms, no_key_is_left, options, patient, within},
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

/// The script that the Redis documentation has for a release.
const FREE_BY_HAND: &str = "if redis.call('get', KEYS[1]) == ARGV[1] then
    return redis.call('del', KEYS[1]) else return 0 end";

#[tokio::test]
async fn clients_of_another_kind_and_ours_take_turns_and_leave_each_other_alone() {
    const TURNS: u64 = 40;
    let server = RedisServer::start().await;
    let factories = [factory(&server).await, factory(&server).await];
    let (inside, turns) = (AtomicBool::new(false), RefCell::new(Vec::new()));
    let stay = async |who: &'static str| {
        assert!(!inside.swap(true, SeqCst), "two holders");
        turns.borrow_mut().push(who);
        tokio::time::sleep(ms(1)).await;
        inside.store(false, SeqCst);
    };
    let ours = join_all(factories.iter().map(async |factory| {
        let lock = factory.create_lock("k").unwrap();
        for turn in 0..TURNS {
            let guard = lock.lock(options(LONG, 3 * LIMIT)).await.unwrap();
            stay("ours").await;
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            tokio::time::sleep(ms(turn % 7)).await;
        }
    }));
    let theirs = join_all((0..2).map(async |client| {
        for turn in 0..TURNS {
            let token = format!("d9428888-122b-11e1-b85c-{client:02}{turn:010}");
            let take = format!("SET distributed-locks:k {token} NX PX 300000");
            while server.run::<Option<String>>(&take).await.is_none() {
                tokio::time::sleep(ms(1)).await;
            }
            stay("theirs").await;
            let free = ["EVAL", FREE_BY_HAND, "1", "distributed-locks:k", &token];
            assert_eq!(server.run_words::<u64>(&free).await, 1, "it was theirs");
            tokio::time::sleep(ms(turn % 7)).await;
        }
    }));
    within(4 * LIMIT, "all had their turns", join(ours, theirs)).await;
    // Else they ran one after the other, and the test has shown nothing.
    let turns = turns.into_inner();
    let changes = turns.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes > 4, "{turns:?}");
    no_key_is_left(&server).await;
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
