//! What the end of a server costs those who are at work, and that whoever loses a lock by it is
//! told. The figures are printed: `cargo test --test deployments failover -- --nocapture`.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Instant,
};

use tokio::task::JoinSet;
use tower_distributed_lock::{
    LockFactory, LockGuard, Redlock, Unlocked, error::LockError,
    storage::redis::RedisStorageBuilder,
};

use super::{
    LONG, TTL, cluster, factory,
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

/// Tasks of a factory that take a new lock each time, and keep it, until an attempt fails.
struct Takers {
    taken: Arc<Mutex<Vec<(String, LockGuard)>>>,
    tasks: JoinSet<()>,
}

impl Takers {
    fn start(factory: &LockFactory) -> Self {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for task in 0..16 {
            let (factory, taken, stop) = (factory.clone(), Arc::clone(&taken), Arc::clone(&stop));
            tasks.spawn(async move {
                for number in 0.. {
                    let key = format!("{task}-{number}");
                    let lock = factory.create_lock(key.as_str()).unwrap();
                    match lock.try_lock(options(LONG)).await {
                        Ok(guard) => taken.lock().unwrap().push((key, guard)),
                        // What is not known to be ours does not count.
                        Err(_) => stop.store(true, SeqCst),
                    }
                    if stop.load(SeqCst) {
                        return;
                    }
                }
            });
        }
        Self { taken, tasks }
    }

    fn count(&self) -> usize {
        self.taken.lock().unwrap().len()
    }

    async fn take_more(&self) {
        let before = self.count();
        eventually("locks are taken", LIMIT, async || {
            self.count() > before + 300
        })
        .await;
    }

    async fn have_ended(&mut self) {
        while let Some(task) = within(LIMIT, "an error", self.tasks.join_next()).await {
            task.unwrap();
        }
    }

    /// Each holder is told whether the servers still have its lock. Answers how many have not.
    async fn are_told(mut self, what: &str, kept: &HashSet<String>) -> usize {
        self.have_ended().await;
        let taken = std::mem::take(&mut *self.taken.lock().unwrap());
        let (mut forgotten, count) = (0, taken.len());
        for (key, guard) in taken {
            let told = match kept.contains(&format!("distributed-locks:{key}")) {
                true => Unlocked::Held,
                false => Unlocked::Lost,
            };
            let unlocked = within(LIMIT, "an answer", guard.unlock()).await.unwrap();
            assert_eq!(unlocked, told, "{key}");
            forgotten += usize::from(told == Unlocked::Lost);
        }
        println!("{what}: of {count} locks {forgotten} were forgotten");
        forgotten
    }
}

/// A busy machine is not a server that is gone.
fn patient(storage: RedisStorageBuilder) -> LockFactory {
    let factory = LockFactory::builder(storage.connect_lazily().unwrap());
    factory.storage_timeout(2 * LIMIT).build().unwrap()
}

/// The replica hears nothing any more.
async fn cut_off_replicas(master: &RedisServer) {
    let () = master.run("ACL SETUSER default -psync -sync").await;
    let _: u64 = master.run("CLIENT KILL TYPE replica").await;
}

async fn names(server: &RedisServer) -> HashSet<String> {
    server.run("KEYS distributed-locks:*").await
}

/// A master that Sentinel replaces is killed while locks are taken, with its replica at hand or not.
async fn forgotten_by_sentinel(replicas: u32, cut_off: bool) -> usize {
    let mut redis = Sentinel::start().await;
    // A replica that has been cut off for more than five seconds is not made the master.
    let factory = patient(sentinel(&redis).replicas(replicas, ms(1_500)));
    let mut takers = Takers::start(&factory);
    takers.take_more().await;
    if cut_off {
        cut_off_replicas(&redis.servers[0]).await;
        match replicas {
            0 => takers.take_more().await,
            _ => takers.have_ended().await,
        }
    }
    redis.servers[0].kill();
    redis.is_master(1).await;
    let kept = names(&redis.servers[1]).await;
    let what = format!("Sentinel, {replicas} replicas confirm, cut off: {cut_off}");
    takers.are_told(&what, &kept).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_sentinels_next_master_has_not_heard_of_is_told_to_each_holder() {
    forgotten_by_sentinel(0, false).await;
    assert!(forgotten_by_sentinel(0, true).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_has_confirmed_is_not_forgotten() {
    assert_eq!(forgotten_by_sentinel(1, false).await, 0);
    assert_eq!(forgotten_by_sentinel(1, true).await, 0);
}

async fn forgotten_by_a_cluster(cut_off: bool) -> usize {
    let mut redis = Cluster::start().await;
    let factory = patient(cluster(&redis));
    let takers = Takers::start(&factory);
    takers.take_more().await;
    if cut_off {
        cut_off_replicas(&redis.nodes[0]).await;
        takers.take_more().await;
    }
    redis.nodes[0].kill();
    redis.is_whole(5).await;
    let mut kept = HashSet::new();
    for node in redis.up() {
        if node.info("role").await.as_deref() == Some("master") {
            kept.extend(names(node).await);
        }
    }
    let what = format!("Cluster, cut off: {cut_off}");
    takers.are_told(&what, &kept).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_next_master_of_a_cluster_has_not_heard_of_is_told_to_each_holder() {
    forgotten_by_a_cluster(false).await;
    assert!(forgotten_by_a_cluster(true).await > 0);
}
