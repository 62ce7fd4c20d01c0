//! What goes over the wire: how many commands a lock costs, in which order they go, and that one
//! which fails is nobody else's trouble.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinSet;
use tower_distributed_lock::{
    LockFactory, Unlocked, error::StorageErrorKind, storage::RedisStorage,
};

use super::{
    factory,
    kit::{
        FakeServer, LIMIT, RedisServer, eventually, no_key_is_left, options, patient,
        storage_error, within,
    },
    lock, storage,
};

#[tokio::test]
async fn a_free_lock_costs_one_set_and_one_evalsha() {
    let server = RedisServer::start().await;
    let builder = LockFactory::builder(storage(&server).await).fencing(false);
    // `get` and `del` are those inside the script.
    let expected = ["del", "evalsha", "get", "set"];
    let expected = expected.map(|name| (name, 1));
    a_free_lock_costs(&server, builder.build().unwrap(), &expected).await;
}

#[tokio::test]
async fn a_fencing_token_costs_two_plain_commands_more() {
    let server = RedisServer::start().await;
    let expected = ["del", "evalsha", "get", "incrby", "mget", "set"];
    let expected = expected.map(|name| (name, 1));
    a_free_lock_costs(&server, factory(&server).await, &expected).await;
}

async fn a_free_lock_costs(server: &RedisServer, factory: LockFactory, expected: &[(&str, u64)]) {
    let lock = factory.create_lock("cheap").unwrap();
    let turn = async || {
        let guard = lock.lock(patient()).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        // The test's own connections say hello and ask for this.
        let mut calls = server.all_calls().await;
        calls.retain(|(name, _)| {
            !["hello", "client", "config", "info", "subscribe", "ping"]
                .contains(&name.split('|').next().unwrap())
        });
        calls
    };
    let costs = |turns| {
        let costs = expected
            .iter()
            .map(|(name, calls)| ((*name).to_owned(), calls * turns));
        costs.collect::<Vec<_>>()
    };
    // The first lock and the first release teach the server their scripts, and a lease from before
    // messages arrive is taken to be wanted.
    eventually("it is as cheap as it gets", LIMIT, async || {
        let () = server.run("CONFIG RESETSTAT").await;
        turn().await == costs(1)
    })
    .await;
    for turns in 2..=5 {
        assert_eq!(turn().await, costs(turns));
    }
}

#[tokio::test]
async fn a_crowd_of_one_process_costs_the_server_next_to_nothing() {
    const TASKS: u64 = 64;
    const TURNS: u64 = 300;
    let server = RedisServer::start().await;
    let factory = factory(&server).await;
    // Before it can hear who else wants the lock, it does not keep it for long.
    eventually("it is as cheap as it gets", LIMIT, async || {
        let () = server.run("CONFIG RESETSTAT").await;
        let mut crowd = JoinSet::new();
        for _ in 0..TASKS {
            let lock = factory.create_lock("hot").unwrap();
            crowd.spawn(async move {
                for _ in 0..TURNS {
                    let guard = lock.lock(patient()).await.unwrap();
                    assert!(guard.fencing_token().is_some());
                    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
                }
            });
        }
        crowd.join_all().await;
        let calls = ["set", "get", "mget", "incrby", "eval", "evalsha", "del"];
        let calls = join_all(calls.map(|command| server.calls(command))).await;
        // One command for 100 turns, or fewer.
        calls.iter().sum::<u64>() * 100 <= TASKS * TURNS
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_release_is_ahead_of_what_its_task_asks_for_next() {
    let server = RedisServer::start().await;
    let factory = factory(&server).await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..60 {
        let lock = factory.create_lock(format!("own-{task}")).unwrap();
        tasks.spawn(async move {
            // Nobody else wants it, so a refusal has met a release that was overtaken.
            for _ in 0..1_000 {
                drop(lock.try_lock(patient()).await.unwrap());
            }
        });
    }
    tasks.join_all().await;
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_command_that_fails_does_not_fail_those_sent_with_it() {
    let server = RedisServer::start().await;
    let factory = factory(&server).await;
    let () = server.run("RPUSH distributed-locks:list a b").await;
    let mut callers = JoinSet::new();
    for number in 0..40 {
        let bad = number % 4 == 0;
        let key = if bad {
            "list".to_owned()
        } else {
            number.to_string()
        };
        let lock = factory.create_lock(key).unwrap();
        callers.spawn(async move {
            let guard = lock.lock(patient()).await;
            match guard {
                Err(error) if bad => assert_eq!(
                    storage_error(Err(error)).kind(),
                    StorageErrorKind::WrongType
                ),
                guard => assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held),
            }
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
}

#[tokio::test]
async fn a_flushed_script_cache_changes_nothing() {
    let server = RedisServer::start().await;
    let (first, second) = (lock(&server, "flush").await, lock(&server, "flush").await);
    let options = options(Duration::from_secs(2), LIMIT);
    let flush = async || -> () {
        let () = server.run("SCRIPT FLUSH SYNC").await;
        let () = server.run("CONFIG RESETSTAT").await;
    };

    // Renewal, of a lease that would run out.
    let guard = first.lock(options).await.unwrap();
    for _ in 0..2 {
        flush().await;
        eventually("it is renewed", LIMIT, async || {
            server.calls("pexpire").await > 0
        })
        .await;
        assert!(server.calls("eval").await > 0, "the cache was empty");
    }
    // Acquire, by a waiter that is asking already.
    let waiter = tokio::spawn(second.lock(options));
    eventually("it asks", LIMIT, async || server.calls("pttl").await > 0).await;
    flush().await;
    eventually("it asks", LIMIT, async || server.calls("pttl").await > 0).await;
    // Release.
    flush().await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let next = within(LIMIT, "the next turn", waiter)
        .await
        .unwrap()
        .unwrap();
    flush().await;
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_server_that_knows_only_the_old_protocol_is_spoken_to_in_it() {
    // The wording of Redis 4 and before.
    let server = FakeServer::start(|_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'",
            "EVAL" | "EVALSHA" => ":1",
            _ => "+OK",
        })
    })
    .await;
    let storage = RedisStorage::connect(server.url()).await.unwrap();
    let factory = LockFactory::builder(storage).fencing(false).build();
    let lock = factory.unwrap().create_lock("k").unwrap();
    let guard = lock.lock(patient()).await;
    assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
}
