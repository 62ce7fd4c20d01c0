//! What the end of a server costs those who are at work, and that whoever loses a lock by it is
//! told. The figures are printed: `cargo test --test deployments failover -- --nocapture`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Instant,
};

use tokio::task::JoinSet;
use tower_distributed_lock::{LockFactory, Redlock, error::LockError};

use super::{
    TTL, cluster, factory,
    kit::{Cluster, History, LIMIT, RedisServer, Sentinel, eventually, ms, within},
    options, sentinel,
};

/// Two factories, of which each has two tasks at each key, all at work while `fails` goes on.
/// Answers how many locks were lost, and how often two were in at the same time.
async fn work(
    what: &str,
    factories: [LockFactory; 2],
    keys: &[String],
    fails: impl AsyncFnOnce(),
) -> (usize, usize) {
    let history = Arc::new(History::default());
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for worker in 0..4 * keys.len() {
        let key = keys[worker / 4].clone();
        let lock = factories[worker % 2].create_lock(key.as_str()).unwrap();
        let (history, stop) = (Arc::clone(&history), Arc::clone(&stop));
        workers.spawn(async move {
            let by = ["first", "second"][worker % 2];
            while !stop.load(SeqCst) {
                match lock.lock(options(TTL)).await {
                    Ok(guard) => {
                        let work = tokio::time::sleep(ms(5));
                        history.stay((&key, by), guard, work).await;
                    }
                    Err(LockError::Storage(error)) => {
                        assert!(error.kind().is_transient(), "{error:?}");
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
    }
    let goes_on = async || {
        let from = Instant::now();
        eventually("work goes on under each key", 2 * LIMIT, async || {
            let stays = history.stays();
            keys.iter().all(|key| {
                let after = stays.iter().filter(|stay| stay.entered > from);
                after.filter(|stay| stay.key == *key).count() > 10
            })
        })
        .await;
    };
    goes_on().await;
    fails().await;
    goes_on().await;
    stop.store(true, SeqCst);
    within(LIMIT, "the workers end", async {
        while let Some(worker) = workers.join_next().await {
            worker.unwrap();
        }
    })
    .await;
    let lost = history.check();
    let stays = history.stays();
    let unknown = stays.iter().filter(|stay| stay.told && !stay.lost).count();
    let (overlaps, longest) = history.overlaps();
    println!(
        "{what}: nobody came in for {:?}; of {} stays {lost} were lost and {unknown} may have been; \
         two were in {overlaps} times, for {longest:?} at most",
        history.longest_pause(),
        stays.len(),
    );
    (lost, overlaps)
}

fn keys() -> Vec<String> {
    (0..8).map(|number| format!("key-{number}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_by_sentinel_is_never_silent() {
    let mut redis = Sentinel::start().await;
    let factories = [(); 2].map(|()| factory(sentinel(&redis)));
    work("Sentinel", factories, &keys(), async || {
        redis.servers[0].kill();
        redis.is_master(1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_in_a_cluster_is_never_silent() {
    let mut redis = Cluster::start().await;
    let factories = [(); 2].map(|()| factory(cluster(&redis)));
    let mut keys = Vec::new();
    for number in 0.. {
        let key = format!("key-{number}");
        if redis.owner(&key).await == 0 {
            keys.push(key);
        }
        if keys.len() == 8 {
            break;
        }
    }
    work("Cluster", factories, &keys, async || redis.nodes[0].kill()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_server_of_a_redlock_costs_no_lock() {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(RedisServer::start().await);
    }
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let mut factories = Vec::new();
    for _ in 0..2 {
        let redlock = Redlock::connect(urls.clone()).await.unwrap();
        factories.push(LockFactory::new(redlock));
    }
    let factories = <[_; 2]>::try_from(factories).unwrap();
    let keys = keys();
    let lost = work("Redlock", factories, &keys, async || servers[0].kill());
    assert_eq!(lost.await, (0, 0));
}
