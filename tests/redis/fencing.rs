//! Fencing tokens: they grow from holder to holder whatever becomes of the counter, and where there
//! can be none, there is no lock.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::task::{JoinHandle, JoinSet};
use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked, error::LockError, storage::RedisStorage,
};

use super::{
    factory,
    kit::{
        FakeServer, LIMIT, Proxy, RedisServer, eventually, it_stands_in_the_queue, ms,
        no_key_is_left, options, patient, storage_error, token, within,
    },
    lock,
};

const COUNTER: &str = "{distributed-locks:}:fence";

/// Takes and gives back a lock by each factory in turn. Each token has to be above the one before;
/// answers the last.
async fn grow(factories: &[&LockFactory], mut last: u64) -> u64 {
    for factory in factories {
        let token = token(factory, "k").await;
        assert!(token > last, "{token} after {last}");
        assert!(token < 1 << 53);
        last = token;
    }
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_unique_and_grow_from_holder_to_holder_over_processes_and_keys() {
    const KEYS: usize = 10;
    let server = RedisServer::start().await;
    let factories = [factory(&server).await, factory(&server).await];
    let seen: Arc<[Mutex<Vec<u64>>; KEYS]> = Arc::default();
    let mut tasks = JoinSet::new();
    for task in 0..200 {
        let factory = factories[task % 2].clone();
        let seen = Arc::clone(&seen);
        tasks.spawn(async move {
            for round in 0..5 {
                let key = (task / 2 + round * 3) % KEYS;
                let lock = factory.create_lock(format!("key{key}")).unwrap();
                let guard = lock.lock(patient()).await.unwrap();
                // In here nobody else is: this is the order of the holders.
                seen[key].lock().unwrap().extend(guard.fencing_token());
            }
        });
    }
    within(4 * LIMIT, "all had their turns", tasks.join_all()).await;
    let mut all = BTreeSet::new();
    for tokens in seen.iter() {
        let tokens = tokens.lock().unwrap();
        assert_eq!(tokens.len(), 100, "each turn has one");
        let growing = tokens.windows(2).all(|pair| pair[0] < pair[1]);
        assert!(growing, "{tokens:?}");
        all.extend(tokens.iter().copied());
    }
    assert_eq!(all.len(), 1_000, "no two are the same");
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn tokens_grow_over_a_flush_and_over_the_loss_of_the_counter_alone() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let mut last = grow(&[&first, &second], 0).await;
    for loss in ["FLUSHALL".to_owned(), format!("DEL {COUNTER}")] {
        // Whoever comes first after it, and whatever it has seen.
        for next in [&first, &second] {
            let () = server.run(&loss).await;
            last = grow(&[next, &first, &second], last).await;
        }
        // A process that comes only now, with no more than the counter to know.
        let () = server.run(&loss).await;
        last = grow(&[&factory(&server).await], last).await;
    }
}

/// It knows the counter from being denied, and has no token to compare with.
#[tokio::test]
async fn tokens_grow_over_a_flush_also_for_a_process_that_has_never_had_one() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let held = first.create_lock("held").unwrap();
    let _held = held.lock(patient()).await.unwrap();
    let denied = second.create_lock("held").unwrap();
    let denied = denied.try_lock(patient()).await;
    assert!(matches!(denied, Err(LockError::NotObtained(_))));
    let last = grow(&[&first], 0).await;
    let () = server.run("FLUSHALL").await;
    grow(&[&second], last).await;
}

#[tokio::test]
async fn tokens_grow_over_a_flush_while_the_lock_is_held_and_wanted() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    for round in 0..3 {
        let lock = first.create_lock("k").unwrap();
        let guard = lock.lock(patient()).await.unwrap();
        let waiting = tokio::spawn(second.create_lock("k").unwrap().lock(patient()));
        it_stands_in_the_queue(&server).await;
        // With the counter go the lock and the queue.
        let () = server.run("FLUSHALL").await;
        let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
        let (old, new) = (guard.fencing_token(), next.fencing_token());
        assert!(new > old, "{new:?} after {old:?}, {round}");
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test]
async fn tokens_grow_over_a_restart_without_persistence() {
    let mut server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let mut last = grow(&[&first, &second], 0).await;
    for round in 0..3 {
        server.kill();
        server.restart().await;
        last = match round {
            0 => grow(&[&first, &second], last).await,
            1 => grow(&[&second, &first], last).await,
            // Nobody who comes has seen a token.
            _ => grow(&[&factory(&server).await], last).await,
        };
    }
}

#[tokio::test]
async fn tokens_grow_over_a_restart_from_an_old_snapshot() {
    let mut server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let saved = grow(&[&second, &first], 0).await;
    let () = server.run("SAVE").await;
    // The second factory knows none of these.
    let last = grow(&[&first; 20], saved).await;
    server.kill();
    server.restart().await;
    let counter: u64 = server.run(&format!("GET {COUNTER}")).await;
    assert!(counter < last, "the counter is an old one");
    grow(&[&second, &first], last).await;
}

/// As after a server whose clock was ahead: the clock alone would not do.
#[tokio::test]
async fn tokens_grow_over_a_restart_though_they_were_ahead_of_the_clock() {
    let mut server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let ahead = (1 << 52) + 7;
    let () = server.run(&format!("SET {COUNTER} {ahead}")).await;
    let mut last = grow(&[&second, &first], ahead).await;
    // The last of several that came together counts, which is known only where they went.
    let crowd = join_all((0..4).map(|_| token(&first, "k"))).await;
    last = crowd.into_iter().fold(last, u64::max);
    server.kill();
    server.restart().await;
    last = grow(&[&first, &second], last).await;
    // On an old connection too.
    let () = server.run("FLUSHALL").await;
    grow(&[&second], last).await;
}

#[tokio::test]
async fn tokens_grow_over_a_restart_though_the_last_came_by_a_message() {
    let mut server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let ahead = (1 << 52) + 7;
    let () = server.run(&format!("SET {COUNTER} {ahead}")).await;
    grow(&[&second], ahead).await;
    let guard = first.create_lock("k").unwrap().lock(patient()).await;
    // Asks once, and then for a minute not again.
    let options = LockOptions::builder()
        .interval(Duration::from_secs(60))
        .build();
    let waiting = tokio::spawn(second.create_lock("k").unwrap().lock(options.unwrap()));
    it_stands_in_the_queue(&server).await;
    assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    let last = guard.fencing_token().unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    server.kill();
    server.restart().await;
    grow(&[&second], last).await;
}

#[tokio::test]
async fn tokens_grow_over_a_failover_to_a_replica_that_lags_behind() {
    let mut master = RedisServer::start().await;
    let replica = RedisServer::start().await;
    // Or the first snapshot is sent after five seconds.
    let () = master.run("CONFIG SET repl-diskless-sync-delay 0").await;
    let link = Proxy::to(&master);
    let replicate = format!("REPLICAOF 127.0.0.1 {}", link.port());
    let () = replica.run(&replicate).await;

    let line = Proxy::to(&master);
    let connect = async || {
        let storage = RedisStorage::builder(line.url()).connect_timeout(LIMIT);
        LockFactory::new(storage.connect().await.unwrap())
    };
    let (first, second) = (connect().await, connect().await);
    let replicated = grow(&[&second, &first], 0).await;
    let counter = async || -> Option<u64> { replica.run(&format!("GET {COUNTER}")).await };
    // Also that the last of these locks was given back.
    eventually("it is replicated", LIMIT, async || {
        counter().await == Some(replicated) && replica.keys().await == 0
    })
    .await;
    link.black_hole();
    // The replica knows none of these, and the second factory neither.
    let last = grow(&[&first; 20], replicated).await;

    line.switch_to(&replica);
    master.kill();
    let () = replica.run("REPLICAOF NO ONE").await;
    assert_eq!(counter().await, Some(replicated), "it lags behind");
    grow(&[&second, &first], last).await;
    no_key_is_left(&replica).await;
}

/// What the counter must not be. Each can be told, and none heals by waiting.
const SPOILT: [&str; 4] = [
    "RPUSH {distributed-locks:}:fence a",
    "SET {distributed-locks:}:fence many",
    "SET {distributed-locks:}:fence 9007199254740992",
    "SET {distributed-locks:}:fence 9223372036854775807",
];

/// No lock without its token, none left behind by the attempt, and no harm to who wants no token.
async fn assert_no_tokens(server: &RedisServer, factory: &LockFactory, url: &str, why: &str) {
    let started = Instant::now();
    for _ in 0..2 {
        let lock = factory.create_lock("k").unwrap();
        let error = storage_error(lock.lock(patient()).await);
        assert!(!error.kind().is_transient(), "{why}: {error}");
        assert_eq!(server.keys().await, 0, "{why}");
    }
    assert!(started.elapsed() < LIMIT / 2, "{why}: nobody waits");

    let storage = RedisStorage::builder(url).connect_timeout(LIMIT);
    let plain = LockFactory::builder(storage.connect().await.unwrap()).fencing(false);
    let lock = plain.build().unwrap().create_lock("k").unwrap();
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.fencing_token(), None);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_counter_that_cannot_be_used_is_an_error_at_once_and_leaves_no_lock() {
    let server = RedisServer::start().await;
    let mut last = 0;
    for spoil in SPOILT {
        // The first lock of a connection is asked for in another way than all others.
        let (new, old) = (factory(&server).await, factory(&server).await);
        last = grow(&[&old], last).await;
        let () = server.run(&format!("DEL {COUNTER}")).await;
        let () = server.run(spoil).await;
        assert_no_tokens(&server, &new, &server.url(), spoil).await;
        assert_no_tokens(&server, &old, &server.url(), spoil).await;
        // Put right, it is at once.
        let () = server.run(&format!("DEL {COUNTER}")).await;
        last = grow(&[&new, &old], last).await;
    }
}

#[tokio::test]
async fn who_waits_hears_of_a_counter_that_cannot_be_used_and_leaves_no_lock() {
    let server = RedisServer::start().await;
    for spoil in SPOILT {
        let (first, second) = (lock(&server, "k").await, lock(&server, "k").await);
        let guard = first.lock(patient()).await.unwrap();
        let waiting = tokio::spawn(second.lock(patient()));
        it_stands_in_the_queue(&server).await;
        let () = server.run(&format!("DEL {COUNTER}")).await;
        let () = server.run(spoil).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        let error = storage_error(within(LIMIT, "an answer", waiting).await.unwrap());
        assert!(!error.kind().is_transient(), "{spoil}: {error}");
        no_key_is_left(&server).await;
        let () = server.run(&format!("DEL {COUNTER}")).await;
    }
}

/// The user that the documentation of `storage::redis` recommends, less some commands.
async fn user(server: &RedisServer, without: &[&str]) -> String {
    let mut rules = include_str!("../../src/storage/redis/acl.txt")
        .trim()
        .to_owned();
    for command in without {
        rules += &format!(" -{command}");
    }
    let () = server.run(&rules).await;
    let as_user = "redis://locks:password@";
    server.url().replace("redis://", as_user)
}

#[tokio::test]
async fn a_user_that_may_not_count_is_told_and_leaves_no_lock() {
    let server = RedisServer::start().await;
    let url = user(&server, &["incrby"]).await;
    let storage = RedisStorage::builder(&url).connect_timeout(LIMIT);
    let factory = LockFactory::new(storage.connect().await.unwrap());
    assert_no_tokens(&server, &factory, &url, "on a new connection").await;

    // It may at first.
    let url = user(&server, &[]).await;
    token(&factory, "k").await;
    user(&server, &["incrby"]).await;
    assert_no_tokens(&server, &factory, &url, "not any more").await;
}

#[tokio::test]
async fn the_documented_user_may_do_all_that_is_needed() {
    let server = RedisServer::start().await;
    let url = user(&server, &[]).await;
    let connect = async || {
        let storage = RedisStorage::builder(&url).connect_timeout(LIMIT);
        // That one asks for what it may be refused.
        LockFactory::new(storage.probe(false).connect().await.unwrap())
    };
    let (first, second) = (connect().await, connect().await);
    let mut last = grow(&[&first, &second, &first], 0).await;
    // Through the queue too, and with the counter lost.
    for spoil in ["PING".to_owned(), format!("DEL {COUNTER}")] {
        let lock = first.create_lock("k").unwrap();
        // Renewed meanwhile.
        let guard = lock.lock(options(ms(300), LIMIT)).await.unwrap();
        let () = server.run("CONFIG RESETSTAT").await;
        let waiting = tokio::spawn(second.create_lock("k").unwrap().lock(patient()));
        eventually("it is renewed, and wanted", LIMIT, async || {
            server.calls("pexpire").await > 1
        })
        .await;
        let _: redis::Value = server.run(&spoil).await;
        assert!(guard.fencing_token() > Some(last));
        last = guard.fencing_token().unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
        assert!(next.fencing_token() > Some(last));
        last = next.fencing_token().unwrap();
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    }
    no_key_is_left(&server).await;
    let refused: Vec<HashMap<String, redis::Value>> = server.run("ACL LOG").await;
    assert!(refused.is_empty(), "{refused:?}");
}

/// A caller that has taken the lock `k` and was not told, on its way through the proxy. Answers also
/// who has the lock.
async fn reply_lost(
    server: &RedisServer,
    proxy: &Proxy,
) -> (JoinHandle<Result<LockGuard, LockError>>, String) {
    let storage = RedisStorage::builder(proxy.url()).connect_timeout(LIMIT);
    let factory = LockFactory::builder(storage.connect().await.unwrap())
        .storage_timeout(ms(300))
        .build()
        .unwrap();
    token(&factory, "k").await;
    proxy.lose_replies();
    let waiting = tokio::spawn(factory.create_lock("k").unwrap().lock(patient()));
    let owner = async || -> Option<String> { server.run("GET distributed-locks:k").await };
    eventually("it is taken", LIMIT, async || owner().await.is_some()).await;
    (waiting, owner().await.unwrap())
}

#[tokio::test]
async fn a_lock_whose_reply_was_lost_comes_with_a_higher_token_when_it_is_found() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let (waiting, taken) = reply_lost(&server, &proxy).await;
    let lost: u64 = server.run(&format!("GET {COUNTER}")).await;
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    let owner: String = server.run("GET distributed-locks:k").await;
    assert_eq!(owner, taken, "found by its own token");
    assert!(guard.fencing_token() > Some(lost), "the first one is lost");
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_lock_whose_reply_was_lost_is_given_back_if_there_are_no_more_tokens() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let (waiting, _) = reply_lost(&server, &proxy).await;
    let () = server.run(&format!("SET {COUNTER} many")).await;
    let error = storage_error(within(LIMIT, "an answer", waiting).await.unwrap());
    assert!(!error.kind().is_transient(), "{error}");
    no_key_is_left(&server).await;
}

/// Between the plain commands anything may happen. A token that was not taken under the lock is not
/// given to anybody: the script is asked, and has the last word.
#[tokio::test]
async fn a_lock_that_was_gone_when_its_token_was_taken_is_not_granted() {
    let server = FakeServer::start(|_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'",
            // Somebody else has it, for another 5 s.
            "EVAL" | "EVALSHA" => "*1\r\n:5000",
            "INCRBY" => ":2000000000000001",
            "MGET" if words[1].ends_with("gone") => "*2\r\n$-1\r\n$-1",
            "MGET" => "*2\r\n$6\r\ntheirs\r\n$-1",
            _ => "+OK",
        })
    })
    .await;
    let storage = RedisStorage::connect(server.url()).await.unwrap();
    let factory = LockFactory::new(storage);
    // The first does not go by plain commands.
    for key in ["first", "gone", "first", "taken"] {
        let refused = factory.create_lock(key).unwrap().try_lock(patient()).await;
        let Err(LockError::NotObtained(refused)) = refused else {
            panic!("{key}: {refused:?}");
        };
        assert_eq!(refused.holder_ttl, Some(ms(5_000)), "{key}");
    }
}
