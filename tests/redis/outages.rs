//! While the server is killed, paused or restarted nobody overlaps, and afterwards work goes on by
//! itself.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, task::JoinSet};
use tower_distributed_lock::{
    LockFactory, LockOptions, Unlocked,
    error::{LossReason, StorageErrorKind},
    storage::RedisStorage,
};

use super::{
    factory,
    kit::{
        CommandProxy, LIMIT, LONG, Onward, Passing, RedisServer, ServerOptions, eventually,
        it_stands_in_the_queue, ms, no_key_is_left, options, patient, storage_error, within,
    },
};

#[tokio::test]
async fn a_killed_server_is_an_error_in_the_callers_own_time_and_heals_by_itself() {
    let mut server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let held = first.create_lock("k").unwrap();
    let wanted = second.create_lock("k").unwrap();
    let guard = held.lock(patient()).await.unwrap();

    let budget = Duration::from_secs(2);
    let started = Instant::now();
    let mut waiters = JoinSet::new();
    for _ in 0..3 {
        let waiter = wanted.lock(options(LONG, budget));
        waiters.spawn(async move {
            let error = storage_error(waiter.await);
            (error, started.elapsed())
        });
    }
    eventually("they wait", LIMIT, async || server.calls("eval").await > 0).await;
    server.kill();

    // Also for a caller that comes now, on another key and to another factory.
    let came = Instant::now();
    let late = first.create_lock("other").unwrap();
    waiters.spawn(async move {
        let error = storage_error(late.lock(options(LONG, budget)).await);
        (error, came.elapsed())
    });
    let at_once = Instant::now();
    let error = storage_error(second.create_lock("k2").unwrap().try_lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    assert!(at_once.elapsed() < budget, "{:?}", at_once.elapsed());

    while let Some(told) = within(LIMIT, "all are told", waiters.join_next()).await {
        let (error, after) = told.unwrap();
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
        // Not before, because the server may come back; and not later.
        assert!(after >= budget, "{after:?}");
        assert!(after < budget + ms(1500), "{after:?}");
    }

    server.restart().await;
    let next = wanted.lock(patient()).await.unwrap();
    // This server has kept nothing on disk.
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn who_waits_asks_as_soon_as_the_server_is_back() {
    for durable in [false, true] {
        let options = ServerOptions {
            durable,
            ..ServerOptions::default()
        };
        let mut server = RedisServer::start_with(options).await;
        let (first, second) = (factory(&server).await, factory(&server).await);
        let guard = first.create_lock("k").unwrap().lock(patient()).await;
        // By itself it asks only after a long time.
        let slow = LockOptions::builder().ttl(LONG).interval(LONG).retries(1);
        let lock = second.create_lock("k").unwrap();
        let waiting = tokio::spawn(lock.lock(slow.build().unwrap()));
        it_stands_in_the_queue(&server).await;
        server.kill();
        server.restart().await;
        if durable {
            // The lock is still there, and so is the place behind it.
            eventually("they listen", LIMIT, async || {
                let inboxes = "PUBSUB CHANNELS distributed-locks:inbox:*";
                server.run::<Vec<String>>(inboxes).await.len() == 2
            })
            .await;
            assert!(!waiting.is_finished());
            assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
        }
        let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
        no_key_is_left(&server).await;
    }
}

/// When somebody relied on a lock: from a moment after it was granted to the last one at which it
/// said that it is held.
struct Stays(Mutex<Vec<(Instant, Instant)>>);

impl Stays {
    fn add(&self, from: Instant, to: Instant) {
        self.0.lock().unwrap().push((from, to));
    }

    fn assert_none_overlap(&self) -> usize {
        let mut stays = self.0.lock().unwrap();
        stays.sort();
        for pair in stays.windows(2) {
            let ((_, to), (from, _)) = (pair[0], pair[1]);
            assert!(to <= from, "two holders, for {:?}", to - from);
        }
        stays.len()
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_paused_beyond_the_ttl_costs_the_holder_its_lock_and_nobody_overlaps() {
    let server = RedisServer::start().await;
    let ttl = ms(1000);
    let factories = [factory(&server).await, factory(&server).await];

    let stays = Arc::new(Stays(Mutex::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for worker in 0..8 {
        let lock = factories[worker % 2].create_lock("busy").unwrap();
        let (stays, stop) = (Arc::clone(&stays), Arc::clone(&stop));
        workers.spawn(async move {
            while !stop.load(SeqCst) {
                // While the server stands still this fails, as it should.
                let Ok(guard) = lock.lock(options(ttl, ms(2000))).await else {
                    continue;
                };
                let from = Instant::now();
                let mut to = None;
                for _ in 0..5 {
                    let now = Instant::now();
                    if !guard.is_held() {
                        break;
                    }
                    to = Some(now);
                    tokio::time::sleep(ms(2)).await;
                }
                if let Some(to) = to {
                    stays.add(from, to);
                }
                let _ = guard.unlock().await;
            }
        });
    }

    for round in 0..2 {
        let key = format!("slow{round}");
        let slow = factories[0].create_lock(key.as_str()).unwrap();
        let guard = slow.lock(options(ttl, LIMIT)).await.unwrap();
        let before = stays.count();
        eventually("work goes on", LIMIT, async || stays.count() > before + 10).await;

        assert!(guard.is_held());
        let paused = Instant::now();
        server.pause();
        let reason = within(LIMIT, "the holder is told", guard.lost()).await;
        let told = paused.elapsed();
        assert_eq!(reason, LossReason::Expired);
        // The last renewal before the pause may have been sent up to a third of the ttl earlier, or
        // a moment later.
        assert!(told >= ttl / 2 && told < ttl + ms(2000), "{told:?}");
        assert!(!guard.is_held());
        assert_eq!(guard.remaining(), Duration::ZERO);
        // Let what is on its way to the server grow old.
        tokio::time::sleep(ttl / 2).await;
        let before = stays.count();
        server.resume();

        let other = factories[1].create_lock(key.as_str()).unwrap();
        let next = other.lock(options(LONG, LIMIT)).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
        eventually("work goes on", LIMIT, async || stays.count() > before + 10).await;
    }

    stop.store(true, SeqCst);
    within(LIMIT, "the workers end", workers.join_all()).await;
    stays.assert_none_overlap();
    no_key_is_left(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_under_load_let_nobody_overlap_and_leave_no_key() {
    let mut server = RedisServer::start_with(ServerOptions {
        durable: true,
        ..ServerOptions::default()
    })
    .await;
    let factories = [factory(&server).await, factory(&server).await];
    let counter = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for worker in 0..8 {
        let lock = factories[worker % 2].create_lock("counter").unwrap();
        let (counter, stop) = (Arc::clone(&counter), Arc::clone(&stop));
        workers.spawn(async move {
            let mut done = 0;
            while !stop.load(SeqCst) {
                // A lock that was left behind would be in the way for longer than anybody waits:
                // the ttl is longer.
                let guard = lock.lock(options(LONG, LIMIT)).await.unwrap();
                let seen = counter.load(SeqCst);
                tokio::time::sleep(ms(1)).await;
                // Whoever was in here meanwhile is forgotten.
                counter.store(seen + 1, SeqCst);
                done += 1;
                match guard.unlock().await {
                    Ok(unlocked) => assert_eq!(unlocked, Unlocked::Held),
                    Err(error) => assert!(error.kind().is_transient(), "{error}"),
                }
            }
            done
        });
    }
    for _ in 0..5 {
        let before = counter.load(SeqCst);
        eventually("work goes on", LIMIT, async || {
            counter.load(SeqCst) > before + 20
        })
        .await;
        server.kill();
        server.restart().await;
    }
    stop.store(true, SeqCst);
    let done: u64 = within(LIMIT, "the workers end", workers.join_all())
        .await
        .into_iter()
        .sum();
    assert_eq!(counter.load(SeqCst), done, "updates were lost");
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_service_starts_while_redis_is_away() {
    let mut server = RedisServer::start().await;
    server.kill();
    let error = RedisStorage::connect(server.url()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");

    let storage = RedisStorage::builder(server.url())
        .connect_lazily()
        .unwrap();
    let lock = LockFactory::new(storage).create_lock("k").unwrap();
    let error = storage_error(lock.try_lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");

    // A caller that has the time gets its lock when the server is there.
    let waiting = tokio::spawn(lock.lock(patient()));
    server.restart().await;
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_eq!(server.keys().await, 1);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn an_acquire_that_arrives_after_its_release_is_undone_long_before_the_ttl() {
    let server = RedisServer::start().await;
    let (stuck, mut reached) = oneshot::channel();
    let (on, held_back) = oneshot::channel();
    let first = Mutex::new(Some((stuck, held_back)));
    let behind = Arc::new(AtomicBool::new(false));
    let lost = Arc::clone(&behind);
    let watch = move |passing: Passing| {
        if !matches!(passing, Passing::Command(_)) {
            return None;
        }
        if let Some((stuck, held_back)) = first.lock().unwrap().take() {
            stuck.send(()).unwrap();
            return Some(held_back);
        }
        // Of the connection on which the first was stuck, nothing else arrives: not the release.
        lost.swap(false, SeqCst).then(|| {
            let (word, lost) = oneshot::channel();
            word.send(Onward::Lost).unwrap();
            lost
        })
    };
    let proxy = CommandProxy::to(&server, Arc::new(watch));
    let storage = RedisStorage::builder(proxy.url()).probe(false);
    let factory = LockFactory::builder(storage.connect().await.unwrap())
        .storage_timeout(ms(200))
        .fencing(false)
        .build()
        .unwrap();
    let lock = factory.create_lock("k").unwrap();
    let options = LockOptions::builder().ttl(LONG).build().unwrap();
    let error = storage_error(lock.try_lock(options).await);
    assert_eq!(error.kind(), StorageErrorKind::Timeout);
    within(LIMIT, "the acquire", &mut reached).await.unwrap();
    // The release is carried out, over another connection.
    eventually("it has nothing left", LIMIT, async || factory.keys() == 0).await;
    no_key_is_left(&server).await;

    behind.store(true, SeqCst);
    on.send(Onward::Goes).unwrap();
    eventually("it arrives", LIMIT, async || server.calls("set").await > 0).await;
    no_key_is_left(&server).await;
}
