//! Locks over a pool that the user made.

use std::time::Instant;

use tokio::task::JoinSet;
use tower_distributed_lock::{
    LockFactory, Unlocked,
    error::StorageErrorKind,
    storage::{
        RedisStorage, conformance,
        redis::bb8_redis::{RedisConnectionManager, bb8::Pool},
    },
};

use super::{
    LONG,
    kit::{LIMIT, Proxy, RedisServer, eventually, ms, within},
    no_key_is_left, options, patient,
    probe::Log,
    storage_error,
};

/// The smallest pool, with bb8's and bb8-redis's own settings.
fn pool(url: String) -> Pool<RedisConnectionManager> {
    let manager = RedisConnectionManager::new(url).unwrap();
    Pool::builder().max_size(1).build_unchecked(manager)
}

fn factory(server: &RedisServer) -> LockFactory {
    LockFactory::new(RedisStorage::from_pool(pool(server.url())))
}

#[tokio::test]
async fn it_keeps_the_contract_of_a_storage() {
    let server = RedisServer::start().await;
    conformance::check(RedisStorage::from_pool(pool(server.url()))).await;
    assert_eq!(server.keys().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_two_processes_exclude_each_other_and_leave_no_key() {
    let server = RedisServer::start().await;
    let factories = [factory(&server), factory(&server)];
    let () = server.run("SET counter 0").await;
    let mut workers = JoinSet::new();
    for worker in 0..8 {
        let lock = factories[worker % 2].create_lock("counter").unwrap();
        let server = redis::Client::open(server.url()).unwrap();
        workers.spawn(async move {
            let mut connection = server.get_multiplexed_async_connection().await.unwrap();
            let mut last = 0;
            for _ in 0..10 {
                let guard = lock.lock(patient()).await.unwrap();
                let counter: u64 = redis::cmd("GET")
                    .arg("counter")
                    .query_async(&mut connection)
                    .await
                    .unwrap();
                let mut set = redis::cmd("SET");
                set.arg("counter").arg(counter + 1);
                let () = set.query_async(&mut connection).await.unwrap();
                assert!(guard.fencing_token() > Some(last), "tokens grow");
                last = guard.fencing_token().unwrap();
                assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            }
        });
    }
    within(2 * LIMIT, "the workers end", workers.join_all()).await;
    assert_eq!(server.run::<u64>("GET counter").await, 80);
    let () = server.run("DEL counter").await;
    no_key_is_left(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_release_is_ahead_of_what_its_task_asks_for_next() {
    let server = RedisServer::start().await;
    let factory = factory(&server);
    let mut tasks = JoinSet::new();
    for task in 0..40 {
        let lock = factory.create_lock(format!("own-{task}")).unwrap();
        tasks.spawn(async move {
            // Nobody else wants it, so a refusal has met a release that was overtaken.
            for _ in 0..200 {
                drop(lock.try_lock(patient()).await.unwrap());
            }
        });
    }
    tasks.join_all().await;
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn what_others_do_with_the_pools_connections_does_not_concern_the_locks() {
    let server = RedisServer::start().await;
    let pool = pool(server.url());
    // All of the pool's connections are out, and in use for what only one user at a time can do.
    let mut theirs = pool.get().await.unwrap();
    let run = async |connection: &mut redis::aio::MultiplexedConnection, command: &str| {
        redis::cmd(command)
            .query_async::<redis::Value>(connection)
            .await
            .unwrap()
    };
    redis::cmd("SELECT")
        .arg(5)
        .query_async::<()>(&mut *theirs)
        .await
        .unwrap();
    run(&mut theirs, "MULTI").await;
    let factory = LockFactory::new(RedisStorage::from_pool(pool.clone()));
    let lock = factory.create_lock("k").unwrap();
    for _ in 0..2 {
        let guard = lock.lock(patient()).await.unwrap();
        let owner: Option<String> = server.run("GET distributed-locks:k").await;
        assert!(owner.is_some(), "it is in the pool's own database");
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
    // And the other way round.
    assert_eq!(
        run(&mut theirs, "EXEC").await,
        redis::Value::Array(Vec::new())
    );
    assert_eq!(pool.state().connections, 1);
}

#[tokio::test]
async fn no_command_costs_a_ping() {
    let server = RedisServer::start().await;
    let factory = factory(&server);
    for turn in 0..10 {
        let lock = factory.create_lock(format!("k{turn}")).unwrap();
        let guard = lock.lock(patient()).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
    assert_eq!(server.calls("ping").await, 0);
}

#[tokio::test]
async fn a_connection_that_was_closed_is_replaced_also_where_the_pool_would_not() {
    let server = RedisServer::start().await;
    let manager = RedisConnectionManager::new(server.url()).unwrap();
    let careless = Pool::builder()
        .test_on_check_out(false)
        .build_unchecked(manager);
    for pool in [pool(server.url()), careless] {
        let factory = LockFactory::new(RedisStorage::from_pool(pool));
        let lock = factory.create_lock("k").unwrap();
        for _ in 0..2 {
            drop(lock.lock(patient()).await.unwrap());
            no_key_is_left(&server).await;
            let _: u64 = server.run("CLIENT KILL TYPE normal").await;
        }
        let guard = lock.lock(patient()).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test]
async fn a_connection_that_became_a_black_hole_is_replaced() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let factory = LockFactory::new(RedisStorage::from_pool(pool(proxy.url())));
    let lock = factory.create_lock("k").unwrap();
    drop(lock.lock(patient()).await.unwrap());
    no_key_is_left(&server).await;
    proxy.black_hole();
    let guard = within(LIMIT / 2, "a lock", lock.lock(patient()))
        .await
        .unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn a_caller_that_is_dropped_while_it_asks_leaves_no_key() {
    let server = RedisServer::start().await;
    let factory = factory(&server);
    drop(
        factory
            .create_lock("first")
            .unwrap()
            .lock(patient())
            .await
            .unwrap(),
    );
    server.pause();
    for caller in 0..20 {
        let lock = factory.create_lock(format!("k{caller}")).unwrap();
        let asking = tokio::time::timeout(ms(5), lock.lock(options(LONG, LIMIT)));
        assert!(asking.await.is_err(), "it is not answered");
    }
    server.resume();
    no_key_is_left(&server).await;
    eventually("nothing is left here", LIMIT, async || factory.keys() == 0).await;
}

#[tokio::test]
async fn a_server_that_is_away_is_told_at_once_and_comes_back() {
    let mut server = RedisServer::start().await;
    let factory = factory(&server);
    let lock = factory.create_lock("k").unwrap();
    server.kill();
    // bb8's own limit is 30 s.
    let started = Instant::now();
    let error = storage_error(lock.try_lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    assert!(error.to_string().contains("refused"), "{error}");
    server.restart().await;
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn what_it_cannot_do_is_logged_once() {
    let server = RedisServer::start().await;
    let (log, _logging) = Log::start();
    let factory = factory(&server);
    assert_eq!(log.lines("WARN", "waiters poll"), 1);
    for key in ["a", "b"] {
        drop(
            factory
                .create_lock(key)
                .unwrap()
                .lock(patient())
                .await
                .unwrap(),
        );
    }
    factory.drain(LIMIT).await;
    assert_eq!(log.lines("WARN", "waiters poll"), 1);
}
