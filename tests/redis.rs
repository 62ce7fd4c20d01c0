//! The promises of the lock over a real Redis server, most of all while that server fails.
//!
//! Two factories in a test stand for two replicas of a service: they share nothing but the server.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

mod kit;

use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap},
    fmt::Debug,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Waker},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::task::{JoinHandle, JoinSet};
use tower_distributed_lock::{
    Lock, LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, LossReason, StorageErrorKind},
    storage::{RedisStorage, conformance},
};

use self::kit::{
    FakeServer, LIMIT, LONG, Proxy, RedisServer, ServerOptions, eventually, it_stands_in_the_queue,
    ms, no_key_is_left, options, patient, storage_error, texts, token, within,
};

async fn storage(server: &RedisServer) -> RedisStorage {
    // The limits are not what is tested, except where a test says so: a slow machine must not meet
    // them.
    RedisStorage::builder(server.url())
        .connect_timeout(LIMIT)
        .connect()
        .await
        .unwrap()
}

async fn factory(server: &RedisServer) -> LockFactory {
    LockFactory::new(storage(server).await)
}

async fn lock(server: &RedisServer, key: &str) -> Lock {
    factory(server).await.create_lock(key).unwrap()
}

#[tokio::test]
async fn redis_keeps_the_contract_of_a_storage() {
    let server = RedisServer::start().await;
    conformance::check(storage(&server).await).await;
    assert_eq!(server.keys().await, 0);
}

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

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_calls_that_are_never_answered() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let factory = LockFactory::new(RedisStorage::connect(proxy.url()).await.unwrap());
    let lock = factory.create_lock("first").unwrap();
    drop(lock.lock(patient()).await.unwrap());
    no_key_is_left(&server).await;

    proxy.lose_replies();
    let () = server.run("CONFIG RESETSTAT").await;
    // So many that they are sent together.
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..30 {
        let lock = factory.create_lock(format!("never-{caller}")).unwrap();
        callers.spawn(lock.lock(patient()));
    }
    eventually("all have asked", LIMIT, async || {
        server.calls("set").await >= 30
    })
    .await;
    callers.shutdown().await;
    drop((lock, factory));
    // What they asked for is given back over a new connection, and that is closed, too.
    no_key_is_left(&server).await;
    eventually("no connection is left", LIMIT, async || {
        proxy.open_connections() == 0
    })
    .await;
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

const PASSWORD: &str = "hunter2-secret";

/// Neither the text nor the debug output of any of these may tell how to log in.
fn assert_no_secret(text: impl Debug, url: &str) {
    let text = format!("{text:?}\n{text:#?}");
    for secret in [PASSWORD, "guessed-secret", url] {
        assert!(!text.contains(secret), "{text}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_at_once_and_no_text_repeats_it() {
    let server = RedisServer::start_with(ServerOptions {
        password: Some(PASSWORD),
        ..ServerOptions::default()
    })
    .await;
    let none = server.url().replace(&format!(":{PASSWORD}@"), "");
    for url in [server.url_with_password("guessed-secret"), none] {
        let started = Instant::now();
        let builder = RedisStorage::builder(&url).connect_timeout(LIMIT);
        assert_no_secret(&builder, &url);
        let error = builder.connect().await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
        assert_no_secret(texts(&error), &url);

        let storage = RedisStorage::builder(&url).connect_lazily().unwrap();
        assert_no_secret(&storage, &url);
        let builder = LockFactory::builder(storage);
        assert_no_secret(&builder, &url);
        let factory = builder.build().unwrap();
        assert_no_secret(&factory, &url);
        let refused = factory.create_lock("k").unwrap().lock(patient()).await;
        let error = LockError::from(storage_error(refused));
        assert!(matches!(&error, LockError::Storage(error)
            if error.kind() == StorageErrorKind::Unauthorized));
        assert_no_secret(texts(&error), &url);
        // These callers were ready to wait for much longer.
        assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
        assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    }

    let storage = storage(&server).await;
    assert_no_secret(&storage, &server.url());
    let factory = LockFactory::new(storage);
    let lock = factory.create_lock("k").unwrap();
    let guard = lock.lock(patient()).await.unwrap();
    // Whoever knows the owner's token can free the lock.
    let token: String = server.run("GET distributed-locks:k").await;
    let (id, _) = token.split_once(':').unwrap();
    for text in [
        format!("{factory:?}"),
        format!("{lock:?}"),
        format!("{guard:?}"),
    ] {
        assert!(!text.contains(id), "{text}");
        assert_no_secret(text, &server.url());
    }
}

#[tokio::test]
async fn an_unreadable_url_is_refused_and_not_repeated() {
    for url in [
        "hunter2-secret",
        "http://user:hunter2-secret@localhost",
        "redis://:hunter2-secret@localhost:not-a-port",
        "redis://:hunter2-secret@localhost/not-a-database",
        "redis://user:hunter2-secret@",
    ] {
        let eager = RedisStorage::connect(url).await.unwrap_err();
        let lazy = RedisStorage::builder(url).connect_lazily().unwrap_err();
        for error in [eager, lazy] {
            assert_eq!(error.kind(), StorageErrorKind::Rejected, "{url}: {error}");
            assert_no_secret(texts(&error), url);
        }
    }
}

#[tokio::test]
async fn a_key_of_another_type_is_told_and_left_untouched() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "list").await;
    let push = "RPUSH distributed-locks:list a b";
    let list = async || -> Vec<String> { server.run("LRANGE distributed-locks:list 0 -1").await };

    let () = server.run(push).await;
    // It cannot heal by waiting, so nobody waits.
    let started = Instant::now();
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::WrongType);
    assert!(started.elapsed() < LIMIT / 2);
    assert_eq!(list().await, ["a", "b"]);

    // And when it takes the place of a lock that is held.
    let () = server.run("DEL distributed-locks:list").await;
    let guard = lock
        .lock(options(Duration::from_secs(6), LIMIT))
        .await
        .unwrap();
    let () = server.run("DEL distributed-locks:list").await;
    let () = server.run(push).await;
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert_eq!(reason, LossReason::NotOurs);
    let () = server.run("CONFIG RESETSTAT").await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    // What it may still have is given back in the background.
    eventually("it releases", LIMIT, async || {
        server.calls("eval").await + server.calls("evalsha").await > 0
    })
    .await;
    assert_eq!(list().await, ["a", "b"]);
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
async fn a_connection_that_the_server_closed_is_replaced_at_once() {
    let server = RedisServer::start().await;
    // Limits so long that whoever waits for them is found out.
    let factory = LockFactory::builder(storage(&server).await)
        .storage_timeout(LIMIT)
        .build()
        .unwrap();
    let lock = factory.create_lock("k").unwrap();
    for _ in 0..20 {
        let guard = lock.lock(patient()).await.unwrap();
        let closed: u64 = server.run("CLIENT KILL TYPE normal SKIPME yes").await;
        assert!(closed > 0);
        let started = Instant::now();
        let other = factory.create_lock("other").unwrap();
        let next = other.lock(patient()).await.unwrap();
        assert!(started.elapsed() < ms(1000), "{:?}", started.elapsed());
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_server_closed_is_noticed_without_a_command() {
    let server = RedisServer::start().await;
    let storage = storage(&server).await;
    assert!(format!("{storage:?}").contains("connected: true"));
    let () = server.run("CLIENT KILL TYPE normal SKIPME yes").await;
    eventually("it is noticed", LIMIT, async || {
        format!("{storage:?}").contains("connected: false")
    })
    .await;
}

#[test]
fn a_runtime_that_ends_while_it_connects_leaves_the_storage_to_later_callers() {
    let new_runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let runtime = new_runtime();
    let server = runtime.block_on(RedisServer::start());
    // With the default limits, of 1 s each, and with others.
    for limits in [None, Some((ms(500), ms(2_000))), Some((ms(2_000), ms(500)))] {
        let proxy = Proxy::to(&server);
        let mut storage = RedisStorage::builder(proxy.url());
        if let Some((connect, _)) = limits {
            storage = storage.connect_timeout(connect);
        }
        let mut factory = LockFactory::builder(storage.connect_lazily().unwrap());
        if let Some((_, command)) = limits {
            factory = factory.storage_timeout(command);
        }
        let lock = factory.build().unwrap().create_lock("k").unwrap();

        // The one for locks and the one for wake-ups.
        proxy.swallow_next(2);
        let ends = new_runtime();
        ends.block_on(async {
            let asking = tokio::spawn(lock.lock(patient()));
            eventually("it connects", LIMIT, async || proxy.connections() == 2).await;
            assert!(!asking.is_finished());
        });
        drop(ends);

        runtime.block_on(async {
            let guard = within(LIMIT, "the lock", lock.lock(patient())).await;
            let guard = guard.unwrap_or_else(|error| panic!("{limits:?}: {error:?}"));
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        });
    }
}

#[tokio::test]
async fn a_connection_that_became_a_black_hole_is_replaced_whatever_the_time_out() {
    let server = RedisServer::start().await;
    for timeout in [ms(200), ms(1_000)] {
        let proxy = Proxy::to(&server);
        let storage = RedisStorage::builder(proxy.url()).connect_timeout(LIMIT);
        let factory = LockFactory::builder(storage.connect().await.unwrap())
            .storage_timeout(timeout)
            .build()
            .unwrap();
        let lock = factory.create_lock("k").unwrap();
        for _ in 0..2 {
            let guard = lock.lock(patient()).await.unwrap();
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            let before = proxy.connections();
            proxy.black_hole();
            // One command after the other is given up. Without a new connection they would go on
            // being.
            let guard = lock.lock(patient()).await;
            let guard = guard.unwrap_or_else(|error| panic!("{timeout:?}: {error:?}"));
            assert!(proxy.connections() > before);
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        }
    }
}

#[tokio::test]
async fn the_error_of_an_old_attempt_to_connect_is_not_told_to_later_callers() {
    // Once there is a wrong password, and later no answer at all.
    let server = FakeServer::start(|connection, _| {
        // The one for locks and the one for wake-ups.
        (connection < 2).then_some("-WRONGPASS invalid username-password pair or user is disabled.")
    })
    .await;
    let storage = RedisStorage::builder(server.url_with_password(PASSWORD))
        .connect_timeout(ms(300))
        .connect_lazily()
        .unwrap();
    let factory = LockFactory::builder(storage)
        .storage_timeout(LIMIT)
        .build()
        .unwrap();
    let lock = factory.create_lock("k").unwrap();
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
    for _ in 0..5 {
        let error = storage_error(lock.try_lock(patient()).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
        let error = storage_error(lock.lock(options(LONG, ms(1_000))).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    }
}

#[tokio::test]
async fn a_cluster_that_keeps_the_key_elsewhere_is_an_error_at_once() {
    let server = FakeServer::start(|_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command `HELLO`, with args beginning with: `3`, ",
            "CLIENT" => "+OK",
            _ => "-MOVED 3999 127.0.0.1:6381",
        })
    })
    .await;
    let storage = RedisStorage::connect(server.url()).await.unwrap();
    let lock = LockFactory::new(storage).create_lock("k").unwrap();
    let started = Instant::now();
    // It cannot heal by waiting, so nobody waits.
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
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
async fn a_lock_is_renewed_for_as_long_as_it_is_held() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "renewed").await;
    let ttl = ms(1200);
    let guard = lock.lock(options(ttl, LIMIT)).await.unwrap();
    let owner: String = server.run("GET distributed-locks:renewed").await;
    let started = Instant::now();
    while started.elapsed() < 3 * ttl {
        let left: i64 = server.run("PTTL distributed-locks:renewed").await;
        assert!(
            left > 0 && left <= 1200,
            "{left} after {:?}",
            started.elapsed()
        );
        let still: Option<String> = server.run("GET distributed-locks:renewed").await;
        assert_eq!(still.as_ref(), Some(&owner));
        assert!(guard.is_held());
        tokio::time::sleep(ms(20)).await;
    }
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn the_server_keeps_a_lock_for_its_ttl_and_the_delay() {
    const DELAY: Duration = Duration::from_secs(600);
    let server = RedisServer::start().await;
    let connect = async || {
        let builder = LockFactory::builder(storage(&server).await).lock_delay(DELAY);
        builder.build().unwrap().create_lock("k").unwrap()
    };
    let (first, second) = (connect().await, connect().await);
    let guard = first.lock(patient()).await.unwrap();
    let assert_delayed = async |guard: &LockGuard| {
        assert!(guard.remaining() > LONG / 2 && guard.remaining() < LONG);
        let left: u64 = server.run("PTTL distributed-locks:k").await;
        assert!(ms(left) > LONG / 2 + DELAY && ms(left) <= LONG + DELAY);
    };
    assert_delayed(&guard).await;
    let waiting = tokio::spawn(second.lock(patient()));
    it_stands_in_the_queue(&server).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    // At once, and by a message.
    let guard = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_delayed(&guard).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_holder_whose_key_was_removed_is_told_by_the_next_renewal() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "removed").await;
    let ttl = Duration::from_secs(6);
    let guard = lock.lock(options(ttl, LIMIT)).await.unwrap();
    let () = server.run("DEL distributed-locks:removed").await;
    let removed = Instant::now();
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert_eq!(reason, LossReason::NotOurs);
    assert!(
        removed.elapsed() < ttl / 3 + ms(1500),
        "{:?}",
        removed.elapsed()
    );
    assert!(!guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(
        server.keys().await,
        0,
        "the renewal has not brought it back"
    );
}

#[tokio::test]
async fn a_caller_that_is_dropped_while_it_asks_leaves_no_key() {
    let server = RedisServer::start().await;
    let factory = factory(&server).await;
    let lock = factory.create_lock("dropped").unwrap();
    // Now there is a connection, and what is asked goes out at once.
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let () = server.run("CONFIG RESETSTAT").await;

    server.pause();
    {
        let mut asks = pin!(lock.lock(patient()));
        let polled = asks.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
    }
    server.resume();
    eventually("the key was taken and freed", LIMIT, async || {
        server.calls("set").await == 1 && server.keys().await == 0
    })
    .await;
    eventually("nothing is kept", LIMIT, async || factory.keys() == 0).await;
    assert_eq!(factory.waiters(), 0);
}

#[tokio::test]
async fn a_dropped_waiter_leaves_no_key() {
    let server = RedisServer::start().await;
    let (first, second) = (factory(&server).await, factory(&server).await);
    let lock = second.create_lock("k").unwrap();
    for round in 0..100_u64 {
        let guard = first
            .create_lock("k")
            .unwrap()
            .lock(patient())
            .await
            .unwrap();
        // Some stand behind others, some ask, some are about to have it; and all go at some moment.
        let mut waiters: Vec<_> = (0..4).map(|_| tokio::spawn(lock.lock(patient()))).collect();
        let wait = Duration::from_micros(round * 50);
        tokio::time::sleep(wait).await;
        let releasing = tokio::spawn(guard.unlock());
        tokio::time::sleep(wait).await;
        // Every other time the last one stays, and comes up whoever has gone before it.
        let stays = (round % 2 == 0).then(|| waiters.pop()).flatten();
        for waiter in waiters {
            waiter.abort();
            // A guard that it has got already is dropped here.
            let _ = waiter.await;
        }
        let released = within(LIMIT, "the release", releasing).await.unwrap();
        assert_eq!(released.unwrap(), Unlocked::Held);
        if let Some(waiter) = stays {
            let guard = within(2 * LIMIT, "its turn", waiter).await.unwrap();
            assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
        }
        // The next one is not held up. (It would be, until the ttl, by a key that was left.)
        let next = lock.lock(patient()).await.unwrap();
        assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    }
    no_key_is_left(&server).await;
    eventually("nothing is kept", LIMIT, async || {
        [&first, &second].map(|factory| (factory.keys(), factory.waiters())) == [(0, 0); 2]
    })
    .await;
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

/// In any number: few go by themselves, many together.
#[test]
fn a_storage_goes_on_when_the_runtime_that_connected_it_ends_with_calls_under_way() {
    let outer = runtime();
    for calls in [2, 10, 40] {
        let server = outer.block_on(RedisServer::start());
        let first = runtime();
        let storage = first.block_on(RedisStorage::connect(server.url())).unwrap();
        let factory = LockFactory::new(storage);
        first.block_on(async { drop(factory.create_lock("k").unwrap().lock(patient()).await) });
        let () = outer.block_on(server.run("CLIENT PAUSE 600 ALL"));
        first.block_on(async {
            let mut callers = tokio::task::JoinSet::new();
            for caller in 0..calls {
                let lock = factory.create_lock(format!("of-{caller}")).unwrap();
                callers.spawn(lock.lock(patient()));
            }
            // They have asked, and the runtime ends with them.
            eventually("all wait", LIMIT, async || factory.waiters() == calls).await;
            callers.detach_all();
        });
        drop(first);
        runtime().block_on(async {
            let lock = factory.create_lock("other").unwrap().lock(patient());
            drop(within(LIMIT, "the lock", lock).await.unwrap());
        });
    }
}

/// As when a `main` connects in a runtime of its own and goes on with another.
#[test]
fn a_connection_of_a_runtime_that_nobody_drives_is_replaced() {
    let outer = runtime();
    let server = outer.block_on(RedisServer::start());
    let idle = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let storage = idle.block_on(RedisStorage::connect(server.url())).unwrap();
    let builder = LockFactory::builder(storage).storage_timeout(ms(300));
    let factory = builder.build().unwrap();
    for callers in [1, 40] {
        outer.block_on(async {
            let locks = (0..callers).map(|caller| {
                let lock = factory.create_lock(format!("of-{caller}")).unwrap();
                lock.lock(patient())
            });
            let locks = futures_util::future::join_all(locks);
            for lock in within(LIMIT, "the locks", locks).await {
                drop(lock.unwrap());
            }
        });
    }
    drop(idle);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// A process that shuts down with requests under way: the runtime drops holders, waiters and the
/// keeper in any order.
#[test]
fn a_runtime_that_ends_while_locks_are_held_and_wanted_ends() {
    let runtime = runtime();
    let server = runtime.block_on(RedisServer::start());
    // The server stays here, so that it ends with the test even if the thread does not.
    let url = server.url();
    let (ended, has_ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for round in 0..20 {
            let runtime = self::runtime();
            runtime.block_on(async {
                let storage = RedisStorage::builder(&url).connect_timeout(LIMIT);
                let factory = LockFactory::new(storage.connect().await.unwrap());
                let held = Arc::new(tokio::sync::Semaphore::new(0));
                for task in 0..20 {
                    let lock = factory.create_lock(format!("key{round}/{task}")).unwrap();
                    let telling = Arc::clone(&held);
                    let waiting = lock.lock(patient());
                    tokio::spawn(async move {
                        let _guard = lock.lock(patient()).await;
                        telling.add_permits(1);
                        std::future::pending::<()>().await;
                    });
                    tokio::spawn(waiting);
                }
                // Half of them: the others are anywhere between asking and holding.
                let half = within(LIMIT, "half are held", held.acquire_many(10)).await;
                drop(half.unwrap());
            });
            drop(runtime);
        }
        // Nobody listens if it has taken too long.
        let _ = ended.send(());
    });
    // Outside of all runtimes: it is their end that is waited for.
    has_ended.recv_timeout(2 * LIMIT).expect("the runtime ends");
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

// --- fencing tokens ------------------------------------------------------------------------------

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
    eventually("it is replicated", LIMIT, async || {
        counter().await == Some(replicated)
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
    let mut rules = include_str!("../src/storage/redis/acl.txt")
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
