//! The promises of the lock over Redis Cluster: on all nodes, while slots move, and over failovers.
//!
//! Factories in a test stand for replicas of a service: they share nothing but the cluster.

// A test says what it expects by panicking, and has no users who read its documentation. How long a
// failover took is printed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod kit;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::net::TcpStream;
use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, LossReason, StorageErrorKind},
    storage::{RedisStorage, conformance},
};

use self::kit::{Cluster, LIMIT, LONG, Load, RedisServer, asking, eventually, ms, token, within};

fn storage(redis: &Cluster) -> RedisStorage {
    RedisStorage::cluster(redis.urls())
        .connect_lazily()
        .unwrap()
}

fn factory(redis: &Cluster) -> LockFactory {
    LockFactory::new(storage(redis))
}

/// Waits for up to [`LIMIT`], and asks every `interval` or half of it.
fn options(ttl: Duration, interval: Duration) -> LockOptions {
    asking(ttl, LIMIT.max(interval), interval)
}

/// Renewed every second.
const TTL: Duration = Duration::from_secs(3);

/// Whoever is served sooner was woken.
const NEVER: Duration = Duration::from_secs(60);

async fn lock(factory: &LockFactory, key: &str, ttl: Duration) -> LockGuard {
    let locking = factory
        .create_lock(key)
        .unwrap()
        .lock(options(ttl, ms(100)));
    within(LIMIT, "the lock", locking).await.unwrap()
}

async fn unlock(guard: LockGuard) {
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

async fn is_queued(redis: &Cluster, key: &str, count: usize) {
    kit::is_queued(redis.of(key).await, key, count).await;
}

async fn no_key_is_left(redis: &Cluster) {
    eventually("no key is left", LIMIT, async || redis.keys().await == 0).await;
}

/// So many factories listen, at each master.
async fn all_listen(redis: &Cluster, factories: usize) {
    for node in redis.up() {
        if node.info("role").await.as_deref() != Some("master") {
            continue;
        }
        eventually("they listen", LIMIT, async || {
            let inboxes: Vec<String> = node.run("PUBSUB CHANNELS *:inbox:*").await;
            inboxes.len() == factories
        })
        .await;
    }
}

#[tokio::test]
async fn a_cluster_keeps_the_contract_of_a_storage() {
    let redis = Cluster::start().await;
    conformance::check(storage(&redis)).await;
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_lock_counts_when_enough_replicas_of_its_node_have_it() {
    let redis = Cluster::start().await;
    let factory = |replicas, timeout| {
        let storage = RedisStorage::cluster(redis.urls()).replicas(replicas, timeout);
        let factory = LockFactory::builder(storage.connect_lazily().unwrap());
        factory.storage_timeout(2 * LIMIT).build().unwrap()
    };
    // Each master has one.
    let (confirmed, never) = (factory(1, LIMIT), factory(2, ms(50)));
    for node in 0..3 {
        let key = redis.key_at(node).await;
        let guard = lock(&confirmed, &key, LONG).await;
        assert!(redis.of(&key).await.calls("wait").await > 0);
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        let refused = never.create_lock(key.as_str()).unwrap();
        let refused = refused.try_lock(options(LONG, LIMIT)).await;
        let Err(LockError::Storage(error)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    }
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn processes_are_served_in_order_by_wake_ups_at_each_master() {
    let redis = Cluster::start().await;
    let factories = [(); 4].map(|()| factory(&redis));
    for factory in &factories {
        token(factory, "first").await;
    }
    all_listen(&redis, 4).await;
    for master in 0..3 {
        let key = redis.key_at(master).await;
        let mut last = token(&factories[0], &key).await;
        let guard = lock(&factories[0], &key, LONG).await;
        let mut waiting = Vec::new();
        for (place, factory) in factories[1..].iter().enumerate() {
            let lock = factory.create_lock(key.as_str()).unwrap();
            waiting.push(tokio::spawn(lock.lock(options(LONG, NEVER))));
            is_queued(&redis, &key, place + 1).await;
        }
        unlock(guard).await;
        for waiter in waiting {
            let guard = within(LIMIT, "its turn", waiter).await.unwrap().unwrap();
            let token = guard.fencing_token().unwrap();
            assert!(token > last, "{token} {last}");
            last = token;
            unlock(guard).await;
        }
    }
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn all_that_belongs_to_a_lock_is_in_its_slot_whatever_its_key() {
    let redis = Cluster::start().await;
    let urls = redis.urls();
    let connect = |prefix: &str| {
        let storage = RedisStorage::cluster(&urls).connect_lazily().unwrap();
        LockFactory::builder(storage)
            .key_prefix(prefix)
            .build()
            .unwrap()
    };
    for prefix in ["distributed-locks", "a", "0/._-"] {
        let (first, second) = (connect(prefix), connect(prefix));
        let keys = [
            "plain",
            "{a}",
            "{}",
            "}{",
            "{",
            "}",
            "a{b}c{d}",
            "%7B",
            "a:b",
            ":",
            "ä",
            "\0",
            "\r\n",
            "{distributed-locks:a}:queue",
            "0:}:fence",
            " ",
        ];
        for key in keys {
            let guard = lock(&first, key, LONG).await;
            let waiting = second.create_lock(key).unwrap().lock(options(LONG, ms(20)));
            let waiting = tokio::spawn(waiting);
            // The lock, its queue and a fencing counter.
            eventually("it stands in the queue", LIMIT, async || {
                redis.keys().await == 2
            })
            .await;
            for node in &redis.nodes[..3] {
                let mut names: Vec<String> = node.run("KEYS *").await;
                let is_there = names.iter().any(|name| name.ends_with("}:queue"));
                names.retain(|name| is_there || !name.ends_with("}:fence"));
                let mut slots = HashSet::new();
                for name in &names {
                    slots.insert(redis.slot(name).await);
                }
                assert_eq!(slots.len(), usize::from(is_there), "{names:?}");
            }
            unlock(guard).await;
            unlock(within(LIMIT, "the lock", waiting).await.unwrap().unwrap()).await;
            // Other slots have counters of their own.
            for node in &redis.nodes[..3] {
                let () = node.run("FLUSHALL").await;
            }
        }
    }
}

#[tokio::test]
async fn a_client_of_another_kind_excludes_us_and_is_excluded() {
    let redis = Cluster::start().await;
    let factory = factory(&redis);
    for master in 0..3 {
        let key = redis.key_at(master).await;
        let node = &redis.nodes[master];
        let set = format!("SET distributed-locks:{key} theirs NX PX 300000");
        let theirs: Option<String> = node.run(&set).await;
        assert_eq!(theirs.as_deref(), Some("OK"));
        let once = options(LONG, ms(20));
        let refused = factory
            .create_lock(key.as_str())
            .unwrap()
            .try_lock(once)
            .await;
        assert!(
            matches!(refused, Err(LockError::NotObtained(_))),
            "{refused:?}"
        );
        let _: u64 = node.run(&format!("DEL distributed-locks:{key}")).await;
        let guard = lock(&factory, &key, LONG).await;
        let theirs: Option<String> = node.run(&set).await;
        assert_eq!(theirs, None);
        unlock(guard).await;
    }
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_server_that_is_no_cluster_is_told_at_once() {
    let server = RedisServer::start().await;
    let connecting = RedisStorage::cluster([server.url()]).connect();
    let error = within(LIMIT, "the error", connecting).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error:?}");
    let none = RedisStorage::cluster([""; 0]).connect_lazily();
    assert_eq!(none.unwrap_err().kind(), StorageErrorKind::Rejected);
}

#[tokio::test]
async fn one_node_that_is_up_is_enough_to_find_the_others() {
    let redis = Cluster::start().await;
    let dead = RedisServer::start().await;
    let urls = [dead.url(), redis.nodes[4].url()];
    drop(dead);
    let storage = RedisStorage::cluster(urls).connect().await.unwrap();
    let factory = LockFactory::new(storage);
    for master in 0..3 {
        token(&factory, &redis.key_at(master).await).await;
    }
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn the_documented_user_may_do_all_that_is_needed() {
    let redis = Cluster::start().await;
    // The line that the documentation of `storage::redis` shows, and what it adds for a Cluster.
    let rules = include_str!("../src/storage/redis/acl.txt")
        .trim()
        .to_owned();
    let rules = rules + " " + include_str!("../src/storage/redis/acl_cluster.txt").trim();
    for node in &redis.nodes {
        let () = node.run(&rules).await;
    }
    let connect = || {
        // It may not look how the server is set up, and that would be seen.
        let storage = RedisStorage::cluster(redis.urls())
            .username("locks")
            .password("password")
            .probe(false);
        LockFactory::builder(storage.connect_lazily().unwrap())
    };
    let [first, second, unfenced] = [true, true, false].map(|fencing| {
        let factory = connect().fencing(fencing);
        factory.build().unwrap()
    });
    for master in 0..3 {
        let key = redis.key_at(master).await;
        let slot = redis.slot(&format!("distributed-locks:{key}")).await;
        let guard = lock(&first, &key, LONG).await;
        let waiting = second.create_lock(key.as_str()).unwrap();
        let waiting = tokio::spawn(waiting.lock(options(LONG, ms(100))));
        is_queued(&redis, &key, 1).await;
        let next = (master + 1) % 3;
        redis.move_slot(slot, master, next).await;
        unlock(guard).await;
        unlock(within(LIMIT, "the lock", waiting).await.unwrap().unwrap()).await;
        // On its way back, a free lock is taken where it is going.
        redis.begin_to_move(slot, next, master).await;
        let guard = lock(&unfenced, &key, LONG).await;
        assert!(redis.nodes[master].calls("asking").await > 0);
        redis.move_keys(slot, next, master).await;
        redis.end_of_move(slot, next, master).await.unwrap();
        unlock(guard).await;
    }
    no_key_is_left(&redis).await;
    for node in &redis.nodes {
        let refused: Vec<redis::Value> = node.run("ACL LOG").await;
        assert!(refused.is_empty(), "{refused:?}");
    }
}

// --- load -------------------------------------------------------------------------------------------------------------

fn load(redis: &Cluster, keys: &[&str], ttl: Duration) -> Load {
    let factories = [factory(redis), factory(redis)];
    Load::start(factories, keys, options(ttl, ms(100)))
}

#[tokio::test]
async fn a_slot_that_moves_under_load_gives_its_locks_once_and_loses_none() {
    let redis = Cluster::start().await;
    let keys = [redis.key_at(0).await, redis.key_at(1).await];
    let keys = [keys[0].as_str(), keys[1].as_str()];
    let slot = redis.slot(&format!("distributed-locks:{}", keys[0])).await;
    let load = load(&redis, &keys, LONG);
    load.goes_on().await;
    let mut moved = 0;
    for _ in 0..5 {
        moved += redis.move_slot(slot, 0, 2).await;
        load.goes_on().await;
        moved += redis.move_slot(slot, 2, 0).await;
        load.goes_on().await;
    }
    // The counter at least.
    assert!(moved >= 10, "{moved}");
    assert_eq!(load.ends().await, 0);
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_failover_under_load_gives_no_lock_twice_without_a_word() {
    let mut redis = Cluster::start().await;
    let keys = [redis.key_at(0).await, redis.key_at(1).await];
    let keys = [keys[0].as_str(), keys[1].as_str()];
    let load = load(&redis, &keys, TTL);
    load.goes_on().await;

    // In good order.
    let () = redis.nodes[3].run("CLUSTER FAILOVER").await;
    eventually("it is the master", LIMIT, async || {
        redis
            .owner_says(
                3,
                redis.slot(&format!("distributed-locks:{}", keys[0])).await,
            )
            .await
            == 3
    })
    .await;
    load.goes_on().await;
    redis.is_whole(6).await;

    // One that stands still, and comes back when there is another.
    redis.nodes[3].pause();
    eventually("another is the master", LIMIT, async || {
        redis
            .owner_says(
                1,
                redis.slot(&format!("distributed-locks:{}", keys[0])).await,
            )
            .await
            == 0
    })
    .await;
    load.goes_on().await;
    redis.nodes[3].resume();
    load.goes_on().await;
    redis.is_whole(6).await;

    // One that is gone.
    redis.nodes[1].kill();
    let killed = Instant::now();
    load.goes_on().await;
    println!("work goes on {:?} after the kill", killed.elapsed());
    load.ends().await;
    no_key_is_left(&redis).await;
}

// --- slots that move --------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_lock_is_renewed_while_its_slot_is_at_two_nodes_and_others_are_told_in_time() {
    let redis = Cluster::start().await;
    let key = redis.key_at(0).await;
    let name = format!("distributed-locks:{key}");
    let slot = redis.slot(&name).await;
    let (first, second) = (factory(&redis), factory(&redis));
    let guard = lock(&first, &key, TTL).await;
    let waiting = second.create_lock(key.as_str()).unwrap();
    // The queue stays where it is; the lock does not.
    let waiting = tokio::spawn(waiting.lock(options(LONG, ms(100))));
    is_queued(&redis, &key, 1).await;
    let renewed = async |node: usize| {
        let () = redis.nodes[node].run("CONFIG RESETSTAT").await;
        // For longer than its ttl.
        eventually("it is renewed", LIMIT, async || {
            redis.nodes[node].calls("pexpire").await >= 4
        })
        .await;
        assert!(guard.is_held());
    };
    redis.begin_to_move(slot, 0, 2).await;
    renewed(0).await;
    let port = redis.nodes[2].port();
    let migrate = format!("MIGRATE 127.0.0.1 {port} {name} 0 5000");
    let () = redis.nodes[0].run(&migrate).await;
    renewed(2).await;

    let asked = Instant::now();
    let other = factory(&redis).create_lock(key.as_str()).unwrap();
    let refused = other.try_lock(options(LONG, ms(100))).await;
    match refused {
        Err(LockError::Storage(error)) => {
            assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error:?}");
        }
        refused => panic!("{refused:?}"),
    }
    assert!(asked.elapsed() < ms(3_000), "{:?}", asked.elapsed());
    assert!(!waiting.is_finished());

    redis.move_keys(slot, 0, 2).await;
    redis.end_of_move(slot, 0, 2).await.unwrap();
    unlock(guard).await;
    unlock(within(LIMIT, "the lock", waiting).await.unwrap().unwrap()).await;
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_free_lock_without_a_token_is_taken_where_its_slot_is_going() {
    let redis = Cluster::start().await;
    let key = redis.key_at(1).await;
    let slot = redis.slot(&format!("distributed-locks:{key}")).await;
    let unfenced = LockFactory::builder(storage(&redis)).fencing(false).build();
    let locking = unfenced.unwrap().create_lock(key.as_str()).unwrap();
    redis.begin_to_move(slot, 1, 0).await;
    let locking = locking.lock(options(LONG, ms(100)));
    let guard = within(LIMIT, "the lock", locking).await.unwrap();
    assert_eq!(redis.nodes[0].keys().await, 1);
    redis.end_of_move(slot, 1, 0).await.unwrap();
    unlock(guard).await;
    no_key_is_left(&redis).await;
}

// --- failover ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_lock_that_the_replica_knows_outlives_its_master_and_its_waiters_are_served() {
    let mut redis = Cluster::start().await;
    let key = redis.key_at(0).await;
    let (first, second) = (factory(&redis), factory(&redis));
    let guard = lock(&first, &key, LONG).await;
    let waiting = second.create_lock(key.as_str()).unwrap();
    let waiting = tokio::spawn(waiting.lock(options(LONG, ms(200))));
    is_queued(&redis, &key, 1).await;
    eventually("it is replicated", LIMIT, async || {
        // The lock, its queue, the counter.
        let keys: Vec<String> = redis.nodes[3].run("KEYS *").await;
        keys.len() == 3
    })
    .await;
    redis.nodes[0].kill();
    let killed = Instant::now();
    // Nobody is there to hear of it, but it is not forgotten.
    assert!(guard.unlock().await.is_err());
    let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    println!("served {:?} after the kill", killed.elapsed());
    unlock(next).await;
    // Without a command of theirs they found the new master.
    all_listen(&redis, 2).await;
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_lock_that_the_replica_does_not_know_is_lost_and_its_holder_told() {
    let mut redis = Cluster::start().await;
    let key = redis.key_at(0).await;
    let (first, second) = (factory(&redis), factory(&redis));
    token(&second, &key).await;
    let () = redis.nodes[0].run("ACL SETUSER default -psync -sync").await;
    let _: u64 = redis.nodes[0].run("CLIENT KILL TYPE replica").await;
    let guard = lock(&first, &key, TTL).await;
    let waiting = second.create_lock(key.as_str()).unwrap();
    let waiting = tokio::spawn(waiting.lock(options(TTL, ms(200))));
    is_queued(&redis, &key, 1).await;
    redis.nodes[0].kill();
    let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    let granted = Instant::now();
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert!(matches!(reason, LossReason::NotOurs | LossReason::Expired));
    assert!(
        granted.elapsed() < TTL / 3 + ms(1_000),
        "{:?}",
        granted.elapsed()
    );
    assert!(guard.fencing_token() < next.fencing_token());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert!(next.is_held(), "a late unlock has not touched it");
    unlock(next).await;
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn tokens_grow_over_failovers_that_lose_the_counter() {
    let mut redis = Cluster::start().await;
    let key = redis.key_at(0).await;
    let factories = [factory(&redis), factory(&redis)];
    let mut last = token(&factories[0], &key).await;
    // Also with the release: or what takes the master's place has the lock still.
    eventually("the replica is in step", LIMIT, async || {
        let master = redis.nodes[0].info("master_repl_offset").await;
        master.is_some() && master == redis.nodes[3].info("master_repl_offset").await
    })
    .await;
    let () = redis.nodes[0].run("ACL SETUSER default -psync -sync").await;
    let _: u64 = redis.nodes[0].run("CLIENT KILL TYPE replica").await;
    // The replica never hears of these, nor does the first factory.
    for _ in 0..20 {
        let next = token(&factories[1], &key).await;
        assert!(next > last);
        last = next;
    }
    redis.nodes[0].kill();
    for factory in &factories {
        let next = token(factory, &key).await;
        assert!(next > last, "{next} {last}");
        last = next;
    }
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn tokens_grow_though_a_slot_comes_back_from_a_failover_elsewhere() {
    let mut redis = Cluster::start().await;
    let key = redis.key_at(0).await;
    let slot = redis.slot(&format!("distributed-locks:{key}")).await;
    let (first, second) = (factory(&redis), factory(&redis));
    // Its connection is in use all the time.
    let mut other = format!("{key}-0");
    for number in 1.. {
        if redis.owner(&other).await == 0 {
            break;
        }
        other = format!("{key}-{number}");
    }
    token(&first, &other).await;
    // It is not the first that knows how high the tokens of this one are.
    token(&second, &key).await;
    let in_use = {
        let first = first.clone();
        tokio::spawn(async move {
            loop {
                // Nobody answers while the cluster is down.
                let locking = first.create_lock(other.as_str()).unwrap();
                let _ = locking.lock(options(LONG, ms(100))).await;
                tokio::time::sleep(ms(50)).await;
            }
        })
    };
    redis.move_slot(slot, 0, 1).await;
    eventually("it is replicated", LIMIT, async || {
        let count = format!("CLUSTER COUNTKEYSINSLOT {slot}");
        redis.nodes[4].run::<u64>(&count).await == 1
    })
    .await;
    // The replica never hears of these.
    let () = redis.nodes[1].run("ACL SETUSER default -psync -sync").await;
    let _: u64 = redis.nodes[1].run("CLIENT KILL TYPE replica").await;
    let mut last = 0;
    for _ in 0..20 {
        last = token(&second, &key).await;
    }
    redis.nodes[1].kill();
    redis.is_whole(5).await;
    redis.move_slot(slot, 4, 0).await;
    assert!(token(&first, &key).await > last);
    in_use.abort();
    let _ = in_use.await;
    no_key_is_left(&redis).await;
}

#[tokio::test]
async fn a_cluster_that_is_down_is_an_error_in_the_callers_own_time_and_heals_by_itself() {
    let mut redis = Cluster::start().await;
    let key = redis.key_at(2).await;
    let factory = factory(&redis);
    let guard = lock(&factory, &key, TTL).await;
    // The one that is left cannot elect another.
    redis.nodes[0].kill();
    redis.nodes[1].kill();
    eventually("the cluster is down", LIMIT, async || {
        let info: String = redis.nodes[2].run("CLUSTER INFO").await;
        info.contains("cluster_state:fail")
    })
    .await;
    let wait = LockOptions::builder()
        .interval(ms(100))
        .retries(10)
        .build()
        .unwrap();
    for key in ["another", "a third", "a fourth"] {
        let asked = Instant::now();
        let locking = factory.create_lock(key).unwrap();
        match locking.lock(wait).await {
            Err(LockError::Storage(error)) => assert!(error.kind().is_transient(), "{error:?}"),
            other => panic!("{other:?}"),
        }
        let took = asked.elapsed();
        assert!(took >= ms(500) && took < ms(3_000), "{took:?}");
    }
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert_eq!(reason, LossReason::Expired);

    redis.nodes[0].restart().await;
    redis.nodes[1].restart().await;
    let locking = factory
        .create_lock(key.as_str())
        .unwrap()
        .lock(options(LONG, ms(100)));
    unlock(within(LIMIT, "the lock", locking).await.unwrap()).await;
    no_key_is_left(&redis).await;
}

/// As where the nodes know only the names that they have in their own network.
#[tokio::test]
async fn all_nodes_are_reached_by_the_users_connector() {
    let redis = Cluster::start().await;
    let ports: Vec<_> = redis.up().map(RedisServer::port).collect();
    let asked = Arc::new(Mutex::new(HashSet::new()));
    let (first, dialed) = (ports[0], Arc::clone(&asked));
    let storage = RedisStorage::cluster(["redis://seed.invalid:1"]).connector(move |host, port| {
        let port = if host == "seed.invalid" { first } else { port };
        dialed.lock().unwrap().insert(port);
        TcpStream::connect(("127.0.0.1", port))
    });
    let factory = LockFactory::new(storage.connect().await.unwrap());
    let masters = ports.len() / 2;
    for node in 0..masters {
        let key = redis.key_at(node).await;
        unlock(lock(&factory, &key, LONG).await).await;
    }
    assert!(
        asked.lock().unwrap().len() >= masters,
        "{asked:?} of {ports:?}"
    );
    no_key_is_left(&redis).await;
}
