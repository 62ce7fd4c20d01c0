//! Runtimes that end or stand still, and what is left of their connections to others.

use std::sync::Arc;

use tower_distributed_lock::{LockFactory, Unlocked, storage::RedisStorage};

use super::kit::{LIMIT, Proxy, RedisServer, eventually, ms, patient, within};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
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
