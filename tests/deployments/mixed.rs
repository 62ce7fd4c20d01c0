//! Redlocks whose nodes are not single servers, nor all of a kind.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use tokio::task::JoinSet;
use tower_distributed_lock::{
    LockFactory, Redlock,
    storage::{
        MemoryStorage, RedisStorage, conformance,
        redis::bb8_redis::{RedisConnectionManager, bb8::Pool},
    },
};

use super::{
    cluster,
    kit::{Cluster, History, LIMIT, RedisServer, Sentinel, eventually, ms, within},
    lock, no_key_is_left, options, sentinel, the_lock_goes_round, unlock,
};

fn server(server: &RedisServer) -> RedisStorage {
    let storage = RedisStorage::builder(server.url());
    storage.connect_lazily().unwrap()
}

fn factory(redlock: Redlock) -> LockFactory {
    let factory = LockFactory::builder(redlock).storage_timeout(LIMIT);
    factory.build().unwrap()
}

/// All of its nodes are: before, calls need not be carried out in the order in which they were
/// made, and one may find parts of a lock that was given back.
async fn connected(redlock: Redlock) -> Redlock {
    let factory = factory(redlock.clone());
    // At all masters of a cluster.
    for number in 0..30 {
        unlock(lock(&factory, &format!("first-{number}")).await).await;
    }
    assert_eq!(factory.drain(LIMIT).await, 0);
    redlock
}

#[tokio::test]
async fn storages_of_all_kinds_may_be_nodes_of_one_redlock() {
    let redis = [RedisServer::start().await, RedisServer::start().await];
    let memory = MemoryStorage::new();
    let manager = RedisConnectionManager::new(redis[1].url()).unwrap();
    let pool = Pool::builder().build_unchecked(manager);
    let redlock = || {
        let nodes = Redlock::builder()
            .node(server(&redis[0]))
            // It has no wake-ups: a majority has.
            .node(RedisStorage::from_pool(pool.clone()))
            .node(memory.clone());
        nodes.node_timeout(LIMIT).build().unwrap()
    };
    conformance::check(connected(redlock()).await).await;
    let (first, second) = (factory(redlock()), factory(redlock()));
    the_lock_goes_round([&first, &second], "k").await;
    for server in &redis {
        no_key_is_left(server).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_notices_a_failover_in_one_node_of_a_redlock() {
    let mut sentinels = Sentinel::start().await;
    let mut nodes = Cluster::start().await;
    let single = RedisServer::start().await;
    let redlock = || {
        let redlock = Redlock::builder()
            .node(sentinel(&sentinels).connect_lazily().unwrap())
            .node(cluster(&nodes).connect_lazily().unwrap())
            .node(server(&single));
        // A busy machine is not a node that hangs.
        redlock.node_timeout(ms(2_000)).build().unwrap()
    };
    conformance::check(connected(redlock()).await).await;
    let factories = [factory(redlock()), factory(redlock())];
    // A release that a master's replica has not heard of is lost with the master: what takes its place
    // has the lock for as long as it was taken.
    let ttl = LIMIT / 2;
    let history = Arc::new(History::default());
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for worker in 0..4 {
        let lock = factories[worker % 2].create_lock("k").unwrap();
        let (history, stop) = (Arc::clone(&history), Arc::clone(&stop));
        workers.spawn(async move {
            while !stop.load(SeqCst) {
                let guard = lock.lock(options(ttl)).await.unwrap();
                let by = ["first", "second"][worker % 2];
                history
                    .stay(("k", by), guard, tokio::time::sleep(ms(1)))
                    .await;
            }
        });
    }
    let goes_on = async || {
        let before = history.len();
        eventually("work goes on", LIMIT, async || history.len() > before + 50).await;
    };
    goes_on().await;
    sentinels.servers[0].kill();
    goes_on().await;
    sentinels.is_master(1).await;
    goes_on().await;
    let owner = nodes.owner("k").await;
    nodes.nodes[owner].kill();
    goes_on().await;
    nodes.is_whole(5).await;
    goes_on().await;
    stop.store(true, SeqCst);
    let ends = async {
        while let Some(worker) = workers.join_next().await {
            worker.unwrap();
        }
    };
    within(LIMIT, "the workers end", ends).await;
    assert_eq!((history.check(), history.overlaps().0), (0, 0));
    let given_back = async || single.keys().await == 0;
    eventually("no key is left", ttl / 2, given_back).await;
    eventually("no key is left", LIMIT, async || nodes.keys().await == 0).await;
    no_key_is_left(&sentinels.servers[1]).await;
}
