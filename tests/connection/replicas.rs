//! Locks that count only when replicas have them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tower_distributed_lock::{
    LockFactory, LockOptions, Unlocked,
    error::{LockError, StorageErrorKind},
    storage::redis::RedisStorageBuilder,
};

use super::{
    LONG, builder, factory, it_stands_in_the_queue,
    kit::{FakeServer, LIMIT, RedisServer, eventually, ms, within},
    no_key_is_left, options, patient, storage_error, texts,
};

/// A server and its replica.
async fn pair() -> (RedisServer, RedisServer) {
    let (server, replica) = (RedisServer::start().await, RedisServer::start().await);
    // Else it would wait 5 s for other replicas.
    let () = server.run("CONFIG SET repl-diskless-sync-delay 0").await;
    let () = replica
        .run(&format!("REPLICAOF 127.0.0.1 {}", server.port()))
        .await;
    eventually("the replica follows", LIMIT, async || {
        let seen = server.info("slave0").await;
        seen.is_some_and(|replica| replica.contains("state=online"))
    })
    .await;
    (server, replica)
}

/// A process that waits for so long for the replica.
async fn process(server: &RedisServer, timeout: Duration) -> LockFactory {
    let storage = builder(server.url()).replicas(1, timeout).connect().await;
    let factory = LockFactory::builder(storage.unwrap()).storage_timeout(2 * LIMIT);
    factory.build().unwrap()
}

const SHORT: Duration = ms(50);

async fn owner(server: &RedisServer) -> Option<String> {
    server.run("GET distributed-locks:k").await
}

#[tokio::test]
async fn a_lock_that_is_obtained_is_known_to_the_replica() {
    let (server, replica) = pair().await;
    let factories = [process(&server, LIMIT).await, process(&server, LIMIT).await];
    let locks = factories.each_ref().map(|it| it.create_lock("k").unwrap());
    let mut guard = locks[0].lock(patient()).await.unwrap();
    for turn in 1..=10 {
        assert_eq!(owner(&replica).await, owner(&server).await);
        assert!(owner(&replica).await.is_some());
        // Given by a message from now on.
        let waiting = tokio::spawn(locks[turn % 2].lock(patient()));
        it_stands_in_the_queue(&server).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        guard = within(LIMIT, "the next", waiting).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn without_the_replica_nobody_gets_a_lock_and_none_is_left() {
    let (server, replica) = pair().await;
    let factory = process(&server, SHORT).await;
    let lock = factory.create_lock("k").unwrap();
    let held = factory.create_lock("held").unwrap();
    let held = held.lock(options(ms(600), LIMIT)).await.unwrap();
    replica.pause();
    let paused = Instant::now();
    for attempt in [lock.try_lock(patient()), lock.lock(options(LONG, ms(300)))] {
        let error = storage_error(within(LIMIT, "an answer", attempt).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable);
        let why = "not enough replicas have heard of the lock in time";
        assert!(texts(&error).contains(why), "{error}");
        eventually("it was given back", LIMIT, async || {
            owner(&server).await.is_none()
        })
        .await;
    }
    // Who has a lock keeps it.
    while paused.elapsed() < ms(1_200) {
        assert!(held.is_held());
        tokio::time::sleep(ms(20)).await;
    }
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
    replica.resume();
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn a_flushed_script_cache_costs_no_confirmation() {
    let (server, _replica) = pair().await;
    let lock = process(&server, LIMIT).await.create_lock("k").unwrap();
    for _ in 0..2 {
        let guard = lock.try_lock(patient()).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        let () = server.run("SCRIPT FLUSH SYNC").await;
    }
}

#[tokio::test]
async fn a_waiter_has_the_lock_when_the_replica_is_back() {
    let (server, replica) = pair().await;
    let factory = process(&server, SHORT).await;
    let lock = factory.create_lock("k").unwrap();
    replica.pause();
    let waiting = tokio::spawn(lock.lock(patient()));
    eventually("it has asked twice", LIMIT, async || {
        server.calls("wait").await > 1
    })
    .await;
    assert!(!waiting.is_finished());
    replica.resume();
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_eq!(owner(&replica).await, owner(&server).await);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_lock_that_is_given_by_a_message_counts_only_with_the_replica() {
    let (server, replica) = pair().await;
    let (first, second) = (process(&server, SHORT).await, process(&server, SHORT).await);
    let guard = first
        .create_lock("k")
        .unwrap()
        .lock(patient())
        .await
        .unwrap();
    // It asks by itself only after a long time.
    let slow = LockOptions::builder().ttl(LONG).interval(LONG).retries(1);
    let lock = second.create_lock("k").unwrap();
    let waiting = tokio::spawn(lock.lock(slow.build().unwrap()));
    it_stands_in_the_queue(&server).await;
    let had = owner(&server).await;
    replica.pause();
    let waited = server.calls("wait").await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    eventually("it is confirmed in vain", LIMIT, async || {
        server.calls("wait").await > waited + 1
    })
    .await;
    assert_ne!(owner(&server).await, had, "the server has given it away");
    assert!(!waiting.is_finished());
    replica.resume();
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_eq!(owner(&replica).await, owner(&server).await);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_failover_to_the_replica_forgets_no_lock() {
    let (mut server, replica) = pair().await;
    let first = process(&server, LIMIT).await;
    for round in 0..5 {
        let lock = first.create_lock(format!("k{round}")).unwrap();
        std::mem::forget(lock.lock(patient()).await.unwrap());
    }
    server.kill();
    let () = replica.run("REPLICAOF NO ONE").await;
    let second = factory(builder(replica.url())).await;
    for round in 0..5 {
        let lock = second.create_lock(format!("k{round}")).unwrap();
        match lock.try_lock(patient()).await {
            Err(LockError::NotObtained(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_is_demoted_while_it_waits_for_replicas_grants_nothing() {
    let (server, replica) = pair().await;
    let lock = process(&server, LIMIT).await.create_lock("k").unwrap();
    drop(lock.lock(patient()).await.unwrap());
    no_key_is_left(&server).await;
    replica.pause();
    let asking = tokio::spawn(lock.try_lock(patient()));
    eventually("it waits", LIMIT, async || {
        server.info("blocked_clients").await.as_deref() == Some("1")
    })
    .await;
    let () = server
        .run(&format!("REPLICAOF 127.0.0.1 {}", replica.port()))
        .await;
    let answer = within(LIMIT, "an answer", asking).await.unwrap();
    let error = storage_error(answer);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    assert!(texts(&error).contains("UNBLOCKED"), "{error}");
    // It is given back when that can be written.
    let () = server.run("REPLICAOF NO ONE").await;
    no_key_is_left(&server).await;
}

/// Between the grant and its confirmation the lock may have run out, and be another's.
#[tokio::test]
async fn a_lock_that_is_gone_when_it_is_confirmed_is_not_granted() {
    let server = FakeServer::start(|_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'",
            // It cannot be renewed.
            "EVAL" | "EVALSHA" => ":0",
            "WAIT" => ":1",
            _ => "+OK",
        })
    })
    .await;
    let lock = unfenced(&server).await.create_lock("k").unwrap();
    for _ in 0..2 {
        let error = storage_error(lock.try_lock(patient()).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
        assert!(texts(&error).contains("the lock is gone again"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_has_taken_the_place_of_another_confirms_none_of_its_locks() {
    // The first connection after the one for locks leads to another server, and later ones do not.
    let connected = Arc::new(AtomicUsize::new(0));
    let server = FakeServer::start(move |_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'".to_owned(),
            "INFO" => {
                let run = usize::from(connected.fetch_add(1, SeqCst) == 1);
                format!("$47\r\nrun_id:{run:032x}{:08}", 0)
            }
            "EVAL" | "EVALSHA" | "WAIT" => ":1".to_owned(),
            _ => "+OK".to_owned(),
        })
    })
    .await;
    let lock = unfenced(&server).await.create_lock("k").unwrap();
    let error = storage_error(lock.try_lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    assert!(texts(&error).contains("replaced"), "{error}");
    // That one is not asked again.
    drop(lock.try_lock(patient()).await.unwrap());
}

/// Locks without tokens, which a replica has to have.
async fn unfenced(server: &FakeServer) -> LockFactory {
    let storage = builder(server.url()).replicas(1, LIMIT).probe(false);
    let factory = LockFactory::builder(storage.connect().await.unwrap()).fencing(false);
    factory.build().unwrap()
}

#[tokio::test]
async fn many_at_once_share_a_few_connections_and_hold_up_nobody() {
    let (server, replica) = pair().await;
    let factory = process(&server, LIMIT).await;
    let held = factory
        .create_lock("k")
        .unwrap()
        .lock(patient())
        .await
        .unwrap();
    let before: u64 = connections(&server).await;
    replica.pause();
    let wanted = (0..100).map(|number| {
        let lock = factory.create_lock(format!("k{number}")).unwrap();
        tokio::spawn(lock.lock(patient()))
    });
    let wanted: Vec<_> = wanted.collect();
    eventually("all connections wait", LIMIT, async || {
        server.info("blocked_clients").await.as_deref() == Some("16")
    })
    .await;
    assert!(connections(&server).await <= before + 16);
    // What others send goes on.
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    replica.resume();
    for guard in within(LIMIT, "all have theirs", join_all(wanted)).await {
        let guard = guard.unwrap().unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
    no_key_is_left(&server).await;
}

async fn connections(server: &RedisServer) -> u64 {
    let count = server.info("connected_clients").await;
    count.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_release_is_ahead_of_what_its_task_asks_for_next() {
    let (server, _replica) = pair().await;
    let factory = process(&server, LIMIT).await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..20 {
        let lock = factory.create_lock(format!("own-{task}")).unwrap();
        tasks.spawn(async move {
            for _ in 0..50 {
                drop(lock.try_lock(patient()).await.unwrap());
            }
        });
    }
    within(2 * LIMIT, "they end", tasks.join_all()).await;
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_user_that_may_not_wait_is_told_at_once_and_leaves_no_lock() {
    let (server, _replica) = pair().await;
    let () = server
        .run(include_str!("../../src/storage/redis/acl.txt").trim())
        .await;
    let url = server.url().replace("redis://", "redis://locks:password@");
    let storage = |url: &str| -> RedisStorageBuilder { builder(url).replicas(1, LIMIT) };
    let factory = factory(storage(&url)).await;
    let lock = factory.create_lock("k").unwrap();
    for _ in 0..2 {
        let error = storage_error(within(LIMIT / 2, "an answer", lock.lock(patient())).await);
        assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
        assert_eq!(server.keys().await, 0);
    }
    let () = server.run("ACL SETUSER locks +wait").await;
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn a_time_out_of_nothing_or_of_days_is_refused() {
    for timeout in [Duration::ZERO, Duration::from_micros(999), Duration::MAX] {
        let here = || builder("redis://127.0.0.1");
        for storage in [here().replicas(1, timeout), here().connect_timeout(timeout)] {
            let error = storage.connect_lazily().unwrap_err();
            assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
        }
        // Nobody is waited for.
        let none = here().replicas(0, timeout);
        assert!(none.connect_lazily().is_ok());
    }
}
