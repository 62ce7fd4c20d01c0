//! Several locks at once, over a server and between processes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::task::JoinSet;
use tower_distributed_lock::Unlocked;

use super::{
    factory,
    kit::{LIMIT, LONG, RedisServer, eventually, ms, no_key_is_left, options, patient, within},
};

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_two_processes_that_want_the_same_locks_in_opposite_orders_all_get_them() {
    const ACCOUNTS: usize = 4;
    let server = RedisServer::start().await;
    let factories = [factory(&server).await, factory(&server).await];
    let inside: Arc<[AtomicBool; ACCOUNTS]> = Arc::default();
    let mut callers = JoinSet::new();
    for caller in 0..200 {
        let from = caller % ACCOUNTS;
        let to = (from + 1 + caller / ACCOUNTS % (ACCOUNTS - 1)) % ACCOUNTS;
        let accounts = [from, to].map(|account| format!("accounts/{account}"));
        let set = factories[caller / 2 % 2].create_lock_set(accounts).unwrap();
        let inside = Arc::clone(&inside);
        callers.spawn(async move {
            let guards = set.lock(options(LONG, 3 * LIMIT)).await.unwrap();
            for account in [from, to] {
                assert!(!inside[account].swap(true, SeqCst), "two holders");
            }
            tokio::task::yield_now().await;
            for account in [from, to] {
                inside[account].store(false, SeqCst);
            }
            assert_eq!(guards.unlock().await.unwrap(), Unlocked::Held);
        });
    }
    within(4 * LIMIT, "all have had their turn", async {
        while let Some(caller) = callers.join_next().await {
            caller.unwrap();
        }
    })
    .await;
    no_key_is_left(&server).await;
    for factory in factories {
        assert_eq!(factory.drain(LIMIT).await, 0);
    }
}

#[tokio::test]
async fn a_set_that_another_process_has_a_lock_of_is_had_whole_or_not_at_all() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let lock = first.create_lock("b").unwrap();
    let guard = lock.lock(patient()).await.unwrap();
    let set = second.create_lock_set(["c", "b", "a"]).unwrap();

    assert!(set.try_lock(patient()).await.is_err());
    eventually("`a` is given back", LIMIT, async || {
        server.keys().await == 1
    })
    .await;

    let waiting = tokio::spawn(set.lock(patient()));
    eventually("it has `a` and waits for `b`", LIMIT, async || {
        second.waiters() == 1 && server.run::<u64>("EXISTS distributed-locks:a").await == 1
    })
    .await;
    let holds = server.run::<u64>("EXISTS distributed-locks:c").await;
    assert_eq!(holds, 0, "what comes behind `b` is left to others");
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let guards = within(LIMIT, "its turn", waiting).await.unwrap().unwrap();
    let names = guards.guards().iter().map(|guard| guard.key().to_string());
    let names: Vec<_> = names.collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(guards.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_dropped_caller_leaves_no_key_of_any_lock() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let set = second.create_lock_set(["a", "b", "c"]).unwrap();
    for round in 0..60_u64 {
        let blocked = ["a", "b", "c", "free"][round as usize % 4];
        let guard = first.create_lock(blocked).unwrap().lock(patient()).await;
        let mut callers: Vec<_> = (0..3).map(|_| tokio::spawn(set.lock(patient()))).collect();
        tokio::time::sleep(Duration::from_micros(round * 50)).await;
        drop(guard.unwrap());
        tokio::time::sleep(Duration::from_micros(round * 30)).await;
        let stays = callers.pop().unwrap();
        for caller in callers {
            caller.abort();
            // What it has got already is dropped here.
            let _ = caller.await;
        }
        let guards = within(2 * LIMIT, "its turn", stays).await.unwrap();
        assert_eq!(guards.unwrap().unlock().await.unwrap(), Unlocked::Held);
    }
    no_key_is_left(&server).await;
    eventually("nothing is kept", LIMIT, async || {
        [&first, &second].map(|factory| (factory.keys(), factory.waiters())) == [(0, 0); 2]
    })
    .await;
}

#[tokio::test]
async fn a_lock_that_the_server_forgets_while_another_is_waited_for_ends_the_wait() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let _guard = first.create_lock("b").unwrap().lock(patient()).await;
    let set = second.create_lock_set(["a", "b"]).unwrap();
    let waiting = tokio::spawn(set.lock(options(ms(900), 3 * LIMIT)));
    eventually("it has `a`", LIMIT, async || {
        server.run::<u64>("EXISTS distributed-locks:a").await == 1
    })
    .await;
    let () = server.run("DEL distributed-locks:a").await;
    let ended = within(LIMIT, "the renewal tells", waiting).await.unwrap();
    assert!(
        matches!(
            ended,
            Err(tower_distributed_lock::error::LockError::Lost(_))
        ),
        "{ended:?}"
    );
}
