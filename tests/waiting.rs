//! Waiting for a lock that another process holds: in order, woken by the release, nothing left
//! behind.
//!
//! Each factory stands for a process: factories share nothing but their storage. Callers here ask
//! only once a minute by themselves, so whoever gets a lock sooner was woken.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod kit;

use std::{
    convert::Infallible,
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use tokio::task::{JoinHandle, JoinSet};
use tower::{Layer, ServiceExt, service_fn};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, StorageError},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockStorage, MemoryStorage, RedisStorage,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest,
    },
};

use self::kit::{LIMIT, RedisServer, asking, eventually, ms, no_key_is_left, within};

const MINUTE: Duration = Duration::from_secs(60);

/// A lock that lasts for long, for callers that hardly ever ask.
fn options() -> LockOptions {
    options_with(Duration::from_secs(300), MINUTE)
}

fn options_with(ttl: Duration, interval: Duration) -> LockOptions {
    asking(ttl, 100 * interval, interval)
}

type Waiting = JoinHandle<Result<LockGuard, LockError>>;

/// Many callers of two processes take one lock again and again, with nothing but the storage to
/// agree on an order. Each writes down its fencing token while nobody else is inside.
async fn assert_tokens_grow_from_holder_to_holder(factories: [LockFactory; 2]) {
    const TURNS: usize = 10;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for task in 0..60 {
        let lock = factories[task % 2].create_lock("k").unwrap();
        let seen = Arc::clone(&seen);
        tasks.spawn(async move {
            for _ in 0..TURNS {
                let guard = lock.lock(options()).await.unwrap();
                seen.lock().unwrap().extend(guard.fencing_token());
                tokio::task::yield_now().await;
            }
        });
    }
    within(3 * LIMIT, "all had their turns", tasks.join_all()).await;
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 60 * TURNS, "each turn has a token");
    let growing = seen.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(growing, "{seen:?}");
}

mod memory {
    use super::*;

    struct World {
        storage: MemoryStorage,
        clock: Clock,
    }

    impl World {
        fn new() -> Self {
            let clock = Clock::tokio();
            let storage = MemoryStorage::with_clock(clock);
            Self { storage, clock }
        }

        fn factory(&self) -> LockFactory {
            let builder = LockFactory::builder(self.storage.clone());
            builder.clock(self.clock).build().unwrap()
        }
    }

    fn wait(factory: &LockFactory) -> Waiting {
        tokio::spawn(factory.create_lock("k").unwrap().lock(options()))
    }

    /// Lets everything that can go on go on; paused time does not move.
    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_release_wakes_the_waiter_of_another_process_at_once() {
        let world = World::new();
        let (ours, theirs) = (world.factory(), world.factory());
        let held = wait(&ours).await.unwrap().unwrap();
        let waiting = wait(&theirs);
        tokio::time::sleep(ms(1_234)).await;
        assert!(!waiting.is_finished());
        let start = tokio::time::Instant::now();
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        let held = waiting.await.unwrap().unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(held.is_held());
        drop(held);
        settle().await;
        assert!(world.storage.is_empty());
        assert_eq!((ours.keys(), theirs.keys()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn processes_are_served_in_the_order_in_which_they_came() {
        let world = World::new();
        let factories: Vec<_> = (0..10).map(|_| world.factory()).collect();
        let held = wait(&factories[0]).await.unwrap().unwrap();
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        for (number, factory) in factories.iter().enumerate().skip(1) {
            let (waiting, served) = (wait(factory), Arc::clone(&served));
            tasks.spawn(async move {
                let guard = waiting.await.unwrap().unwrap();
                served.lock().unwrap().push(number);
                tokio::task::yield_now().await;
                drop(guard);
            });
            settle().await;
        }
        drop(held);
        tasks.join_all().await;
        assert_eq!(*served.lock().unwrap(), (1..10).collect::<Vec<_>>());
        settle().await;
        assert!(world.storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_left_is_passed_over_at_once() {
        let world = World::new();
        let (a, b, c) = (world.factory(), world.factory(), world.factory());
        let held = wait(&a).await.unwrap().unwrap();
        let leaves = wait(&b);
        settle().await;
        let stays = wait(&c);
        settle().await;
        leaves.abort();
        settle().await;
        assert_eq!(b.keys(), 0, "its place was given back");
        let start = tokio::time::Instant::now();
        drop(held);
        let held = stays.await.unwrap().unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
        drop(held);
        settle().await;
        assert!(world.storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_ended_is_passed_over_at_once() {
        let world = World::new();
        let (a, c) = (world.factory(), world.factory());
        let held = wait(&a).await.unwrap().unwrap();
        // Its runtime ends while it waits, and its inbox with it.
        let b = world.factory();
        let waits = b.create_lock("k").unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async {
                let waiting = tokio::spawn(waits.lock(options()));
                settle().await;
                assert!(!waiting.is_finished());
            });
        })
        .join()
        .unwrap();
        let stays = wait(&c);
        settle().await;
        let start = tokio::time::Instant::now();
        drop(held);
        drop(stays.await.unwrap().unwrap());
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_process_does_not_keep_others_waiting() {
        let world = World::new();
        let (busy, other) = (world.factory(), world.factory());
        let mut crowd = JoinSet::new();
        for _ in 0..900 {
            let lock = busy.create_lock("k").unwrap();
            crowd.spawn(async move {
                let guard = lock.lock(options()).await.unwrap();
                tokio::time::sleep(ms(10)).await;
                drop(guard);
            });
        }
        settle().await;
        let start = tokio::time::Instant::now();
        let guard = wait(&other).await.unwrap().unwrap();
        // What a lease may go on for while others want it, and the section that ran.
        assert!(start.elapsed() <= ms(20), "{:?}", start.elapsed());
        drop(guard);
        crowd.join_all().await;
        settle().await;
        assert!(world.storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_nobody_else_wants_goes_on_without_end() {
        let world = World::new();
        let factory = world.factory();
        let mut crowd = JoinSet::new();
        for _ in 0..1_000 {
            let lock = factory.create_lock("k").unwrap();
            crowd.spawn(async move { lock.lock(options()).await.unwrap().remaining() });
        }
        let remaining = crowd.join_all().await;
        assert!(
            remaining.windows(2).all(|pair| pair[0] == pair[1]),
            "no lease but one"
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn tokens_grow_from_holder_to_holder_of_two_busy_processes() {
        let storage = MemoryStorage::new();
        let factory = || LockFactory::new(storage.clone());
        assert_tokens_grow_from_holder_to_holder([factory(), factory()]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_grow_over_a_flush() {
        let world = World::new();
        let (ours, theirs) = (world.factory(), world.factory());
        let mut last = None;
        for factory in [&ours, &theirs, &ours] {
            let guard = wait(factory).await.unwrap().unwrap();
            assert!(guard.fencing_token() > last, "{:?}", guard.fencing_token());
            last = guard.fencing_token();
            world.storage.clear();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flushed_storage_costs_a_waiter_its_place_and_no_more_than_an_interval() {
        let world = World::new();
        let (ours, theirs) = (world.factory(), world.factory());
        let held = wait(&ours).await.unwrap().unwrap();
        let waiting = wait(&theirs);
        settle().await;
        world.storage.clear();
        let start = tokio::time::Instant::now();
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Lost);
        drop(waiting.await.unwrap().unwrap());
        assert!(start.elapsed() <= MINUTE, "{:?}", start.elapsed());
    }
}

mod lingering {
    use tokio::{sync::Notify, time::Instant};
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    const LINGER: Duration = ms(2_000);

    /// A factory that keeps its locks for a while, and one that does not, over one storage.
    fn pair() -> (MemoryStorage, LockFactory, LockFactory) {
        let clock = Clock::tokio();
        let storage = MemoryStorage::with_clock(clock);
        let builder = || LockFactory::builder(storage.clone()).clock(clock);
        let keeps = builder().linger(LINGER).build().unwrap();
        let other = builder().build().unwrap();
        (storage, keeps, other)
    }

    async fn take(factory: &LockFactory) -> LockGuard {
        let lock = factory.create_lock("k").unwrap();
        lock.lock(options()).await.unwrap()
    }

    /// Takes the lock once it can be known who waits for it, and gives it back.
    async fn keep(factory: &LockFactory, storage: &MemoryStorage) {
        loop {
            assert_eq!(take(factory).await.unlock().await.unwrap(), Unlocked::Held);
            tokio::task::yield_now().await;
            if !storage.is_empty() {
                return;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_nobody_wants_is_kept_for_a_while_and_then_given_back() {
        let (storage, keeps, _) = pair();
        keep(&keeps, &storage).await;
        let start = Instant::now();
        drop(take(&keeps).await);
        while !storage.is_empty() {
            tokio::time::sleep(ms(1)).await;
        }
        let kept = start.elapsed();
        assert!(kept >= LINGER && kept <= LINGER + ms(2), "{kept:?}");
        assert_eq!(keeps.keys(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_does_not_linger_if_nothing_was_said_and_its_release_was_done() {
        let (storage, _, other) = pair();
        for _ in 0..10 {
            serve(&other).await;
            assert!(storage.is_empty());
            // It is told who waits.
            tokio::time::sleep(ms(10)).await;
        }
    }

    /// Its locks are free before it says so.
    struct Slow(MemoryStorage);

    impl LockStorage for Slow {
        async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
            self.0.acquire(request).await
        }
        async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
            self.0.renew(requests).await
        }
        async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
            let reply = self.0.release(request).await;
            tokio::task::yield_now().await;
            reply
        }
        async fn listen(&self, inbox: Inbox) {
            self.0.listen(inbox).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_hot_lock_is_kept_for_a_millisecond_after_the_last_of_its_requests() {
        let clock = Clock::tokio();
        let storage = MemoryStorage::with_clock(clock);
        let builder = LockFactory::builder(Slow(storage.clone())).clock(clock);
        // With tokens, it would now and then be given back to get more.
        let factory = builder.fencing(false).build().unwrap();
        serve(&factory).await;
        while storage.is_empty() {
            // It is told who waits.
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            serve(&factory).await;
            serve(&factory).await;
        }
        for _ in 0..20 {
            tokio::time::advance(Duration::from_micros(600)).await;
            assert!(!storage.is_empty());
            serve(&factory).await;
        }
        let start = Instant::now();
        while !storage.is_empty() {
            tokio::time::sleep(ms(1)).await;
        }
        let kept = start.elapsed();
        assert!(kept >= ms(1) && kept <= ms(3), "{kept:?}");
        tokio::task::yield_now().await;
        assert_eq!(factory.keys(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_does_not_wait_for_the_moment_of_a_hot_lock() {
        let clock = Clock::tokio();
        let storage = MemoryStorage::with_clock(clock);
        let builder = LockFactory::builder(Slow(storage.clone())).clock(clock);
        let factory = builder.fencing(false).build().unwrap();
        while storage.is_empty() {
            tokio::task::yield_now().await;
            serve(&factory).await;
            serve(&factory).await;
        }
        // It has the lock that lingers, and ends under the drain.
        let layer = DistributedLockLayer::new(factory.clone(), |_: &Request<()>| "k");
        let end = Arc::new(Notify::new());
        let ends = Arc::clone(&end);
        let handler = service_fn(move |request| {
            let ends = Arc::clone(&ends);
            async move {
                ends.notified().await;
                answer(request).await
            }
        });
        let service = layer.options(options()).layer(handler);
        let mut request = task::spawn(service.oneshot(Request::new(())));
        assert_pending!(request.poll());
        let start = Instant::now();
        let (left, ()) = tokio::join!(factory.drain(MINUTE), async {
            end.notify_one();
            assert_ready!(request.poll()).unwrap();
        });
        assert_eq!((left, start.elapsed()), (0, Duration::ZERO));
        assert!(storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn another_process_has_a_lingering_lock_at_once() {
        let (storage, keeps, other) = pair();
        keep(&keeps, &storage).await;
        let start = Instant::now();
        let held = take(&other).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        assert_eq!(keeps.keys(), 0);
        assert!(storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_wait_is_refused_a_lingering_lock_once() {
        let (storage, keeps, other) = pair();
        keep(&keeps, &storage).await;
        let lock = other.create_lock("k").unwrap();
        let refused = lock.try_lock(options()).await;
        assert!(
            matches!(refused, Err(LockError::NotObtained(_))),
            "{refused:?}"
        );
        while !storage.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(lock.try_lock(options()).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lingering_lock_outlives_its_ttl_and_is_still_ours() {
        let (storage, keeps, other) = pair();
        let options = LockOptions::builder().ttl(LINGER / 4).build().unwrap();
        let lock = keeps.create_lock("k").unwrap();
        while storage.is_empty() {
            drop(lock.lock(options).await.unwrap());
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(LINGER * 3 / 4).await;
        // Standard clients only see that it is held.
        assert!(!storage.is_empty());
        let start = Instant::now();
        let held = lock.lock(options).await.unwrap();
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        drop(take(&other).await);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_gives_lingering_locks_back() {
        let (storage, keeps, _) = pair();
        keep(&keeps, &storage).await;
        let start = Instant::now();
        assert_eq!(keeps.drain(MINUTE).await, 0);
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_leaves_no_lock_lingering_that_is_given_back_meanwhile() {
        let (storage, keeps, _) = pair();
        keep(&keeps, &storage).await;
        let held = take(&keeps).await;
        let start = Instant::now();
        let (left, ()) = tokio::join!(keeps.drain(MINUTE), async { drop(held) });
        assert_eq!((left, start.elapsed()), (0, Duration::ZERO));
        assert!(storage.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn in_redis_a_lingering_lock_costs_next_to_nothing_and_goes_to_who_wants_it() {
        let server = RedisServer::start().await;
        let builder = LockFactory::builder(connect(&server).await);
        let keeps = builder.linger(MINUTE).build().unwrap();
        eventually("it lingers", LIMIT, async || {
            take(&keeps).await.unlock().await.unwrap() == Unlocked::Held && server.keys().await == 1
        })
        .await;
        let () = server.run("CONFIG RESETSTAT").await;
        let mut last = 0;
        for _ in 0..100 {
            let held = take(&keeps).await;
            let token = held.fencing_token().unwrap();
            assert!(token > last, "{token} after {last}");
            last = token;
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        }
        // It comes with 16 fencing tokens, and is had anew when they are used up.
        let calls = server.calls("set").await;
        assert!(calls <= 7, "{calls}");

        let other = LockFactory::new(connect(&server).await);
        let held = within(LIMIT, "the lock", take(&other)).await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        eventually("nothing is kept", LIMIT, async || {
            keeps.keys() == 0 && server.keys().await == 0
        })
        .await;

        // Who cannot be told that a lock is wanted does not keep it.
        eventually("it lingers", LIMIT, async || {
            take(&keeps).await.unlock().await.unwrap() == Unlocked::Held && server.keys().await == 1
        })
        .await;
        let _: u64 = server.run("CLIENT KILL TYPE pubsub").await;
        eventually("it is given back", LIMIT, async || server.keys().await == 0).await;
    }

    async fn connect(server: &RedisServer) -> RedisStorage {
        let builder = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
        builder.connect().await.unwrap()
    }

    async fn answer(_: Request<()>) -> Result<Response<()>, Infallible> {
        Ok(Response::new(()))
    }

    /// A request under the lock of all requests, and its answer.
    async fn serve(factory: &LockFactory) {
        let layer = DistributedLockLayer::new(factory.clone(), |_: &Request<()>| "k");
        let service = layer.options(options()).layer(service_fn(answer));
        let answer = service.oneshot(Request::new(())).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }

    /// How often Redis is asked for a lock that is wanted a hundred times, one after the other.
    async fn asked(server: &RedisServer, mut wants: impl AsyncFnMut()) -> u64 {
        let () = server.run("CONFIG RESETSTAT").await;
        for _ in 0..100 {
            wants().await;
        }
        server.calls("set").await
    }

    /// A server, and a factory whose requests have had a lock that is hot. On one thread nobody hears
    /// of a release before the next lock is asked for.
    async fn hot() -> (RedisServer, LockFactory) {
        let server = RedisServer::start().await;
        let factory = LockFactory::new(connect(&server).await);
        // Once it can be told who waits.
        eventually("it lingers", LIMIT, async || {
            asked(&server, async || serve(&factory).await).await <= 50
        })
        .await;
        (server, factory)
    }

    #[tokio::test]
    async fn a_lock_that_requests_come_back_for_at_once_lingers_for_a_moment() {
        let (server, factory) = hot().await;
        eventually("it is given back", LIMIT, async || factory.keys() == 0).await;
        assert_eq!(server.keys().await, 0);

        // What is not a request's is given back at once.
        let taken = asked(&server, async || drop(take(&factory).await)).await;
        assert!(taken >= 100, "{taken}");

        let never = LockFactory::builder(connect(&server).await).linger(Duration::ZERO);
        let never = never.build().unwrap();
        for _ in 0..2 {
            let served = asked(&server, async || serve(&never).await).await;
            assert!(served >= 100, "{served}");
        }
    }

    #[tokio::test]
    async fn another_process_has_a_lock_that_lingers_all_the_time() {
        let (server, factory) = hot().await;
        let other = LockFactory::new(connect(&server).await);
        let requests = tokio::spawn(async move {
            loop {
                serve(&factory).await;
                tokio::task::yield_now().await;
            }
        });
        for _ in 0..10 {
            let held = within(LIMIT, "the lock", take(&other)).await;
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        }
        requests.abort();
        no_key_is_left(&server).await;
    }

    /// After so many requests in a row their lock lingers, mostly: of the tokens that it comes with,
    /// some are left.
    const IN_A_ROW: std::ops::Range<usize> = 3..9;

    #[tokio::test]
    async fn a_drain_gives_a_hot_lock_back() {
        for requests in IN_A_ROW {
            let (server, factory) = hot().await;
            for _ in 0..requests {
                serve(&factory).await;
            }
            assert_eq!(factory.drain(LIMIT).await, 0);
            assert_eq!(server.keys().await, 0);
        }
    }

    #[tokio::test]
    async fn a_hot_lock_is_given_back_though_nobody_has_its_factory_any_more() {
        for requests in IN_A_ROW {
            let (server, factory) = hot().await;
            for _ in 0..requests {
                serve(&factory).await;
            }
            drop(factory);
            no_key_is_left(&server).await;
        }
    }

    #[test]
    fn a_hot_lock_is_given_back_though_the_runtime_of_its_requests_ends() {
        let runtime = || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(1).enable_all().build().unwrap()
        };
        let stays = runtime();
        for requests in IN_A_ROW {
            let ends = runtime();
            let (server, factory) = stays.block_on(async {
                let server = RedisServer::start().await;
                let factory = LockFactory::new(connect(&server).await);
                (server, factory)
            });
            ends.block_on(async {
                eventually("it lingers", LIMIT, async || {
                    asked(&server, async || serve(&factory).await).await <= 50
                })
                .await;
                for _ in 0..requests {
                    serve(&factory).await;
                }
            });
            drop(ends);
            stays.block_on(async {
                no_key_is_left(&server).await;
                eventually("nothing is kept", LIMIT, async || factory.keys() == 0).await;
            });
        }
    }
}

mod redis_server {
    use super::*;

    async fn factory(server: &RedisServer) -> LockFactory {
        let storage = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
        LockFactory::new(storage.connect().await.unwrap())
    }

    fn wait(factory: &LockFactory) -> Waiting {
        tokio::spawn(factory.create_lock("k").unwrap().lock(options()))
    }

    const QUEUE: &str = "{distributed-locks:k}:queue";

    async fn queued(server: &RedisServer, count: usize) {
        kit::is_queued(server, "k", count).await;
    }

    async fn got(waiting: Waiting) -> LockGuard {
        within(LIMIT, "the lock", waiting).await.unwrap().unwrap()
    }

    /// Holds the lock with one factory and has others wait for it, in order.
    async fn line(
        server: &RedisServer,
        waiters: usize,
    ) -> (LockGuard, Vec<(LockFactory, Waiting)>) {
        let held = got(wait(&factory(server).await)).await;
        let mut line = Vec::new();
        for number in 0..waiters {
            let factory = factory(server).await;
            let waiting = wait(&factory);
            queued(server, number + 1).await;
            line.push((factory, waiting));
        }
        (held, line)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lock_goes_from_process_to_process_in_order_and_without_polling() {
        let server = RedisServer::start().await;
        let (mut held, line) = line(&server, 5).await;
        let () = server.run("CONFIG RESETSTAT").await;
        for (_factory, waiting) in line {
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
            held = got(waiting).await;
        }
        // Each release sets the next holder, and the queue if that was not the last. Whoever asks and
        // is denied is told a PTTL: nobody was.
        assert_eq!(server.calls("set").await, 5 + 4);
        assert_eq!(server.calls("pttl").await, 0);
        drop(held);
        no_key_is_left(&server).await;
    }

    /// The waiter would ask again after half a minute at the earliest.
    #[tokio::test(flavor = "multi_thread")]
    async fn who_comes_first_when_a_holder_is_dead_gives_the_lock_to_those_who_wait() {
        let server = RedisServer::start().await;
        let newcomer = factory(&server).await;
        // The first lock over a connection does not come by plain commands.
        drop(newcomer.create_lock("other").unwrap().lock(options()).await);
        let (dead, mut line) = line(&server, 1).await;
        let _: u64 = server.run("DEL distributed-locks:k").await;
        let first = got(wait(&newcomer)).await;
        assert_eq!(first.unlock().await.unwrap(), Unlocked::Held);
        let (_factory, waiting) = line.remove(0);
        drop(got(waiting).await);
        assert_eq!(dead.unlock().await.unwrap(), Unlocked::Lost);
        no_key_is_left(&server).await;
    }

    /// It compares the whole value when it releases its lock.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_lock_of_a_client_of_another_kind_is_left_as_it_is_while_we_wait_for_it() {
        let server = RedisServer::start().await;
        for theirs in ["2f1c6d6e", "d9428888-122b-11e1-b85c-61cd3cbb3210", "a:1"] {
            let _: String = server
                .run(&format!("SET distributed-locks:k {theirs} PX 60000"))
                .await;
            let factory = factory(&server).await;
            let waiting = wait(&factory);
            queued(&server, 1).await;
            let owner: String = server.run("GET distributed-locks:k").await;
            assert_eq!(owner, theirs);
            waiting.abort();
            let _: u64 = server.run("DEL distributed-locks:k").await;
            no_key_is_left(&server).await;
        }
    }

    /// Whoever waits is to be woken before whoever has done with the lock.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_lock_is_given_on_behind_another_command() {
        let server = RedisServer::start().await;
        let (held, mut line) = line(&server, 1).await;
        let () = server.run("CONFIG RESETSTAT").await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        let calls = server.all_calls().await;
        let (factory, waiting) = line.remove(0);
        let _held = got(waiting).await;
        assert!(calls.iter().any(|(name, _)| name == "ping"), "{calls:?}");

        // Where nobody waits, it would only cost. (Now and then one goes to see whether the server is there.)
        let () = server.run("CONFIG RESETSTAT").await;
        for _ in 0..50 {
            let lock = factory.create_lock("other").unwrap();
            let other = lock.lock(options()).await.unwrap();
            assert_eq!(other.unlock().await.unwrap(), Unlocked::Held);
        }
        let pings = server.calls("ping").await;
        assert!(pings < 25, "{pings}");
    }

    /// What that rests on.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_sent_behind_another_command_tells_others_before_it_is_answered() {
        let server = RedisServer::start().await;
        let mut ends = [(); 2].map(|()| TcpStream::connect(("127.0.0.1", server.port())).unwrap());
        let [hears, says] = &mut ends;
        hears.write_all(b"SUBSCRIBE c\r\n").unwrap();
        let mut subscribed = [0; b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n".len()];
        hears.read_exact(&mut subscribed).unwrap();
        hears.set_nonblocking(true).unwrap();
        for _ in 0..100 {
            says.write_all(b"PING\r\nPUBLISH c m\r\n").unwrap();
            let mut answered = [0; b"+PONG\r\n:1\r\n".len()];
            says.read_exact(&mut answered).unwrap();
            hears
                .read_exact(&mut [0; b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n".len()])
                .unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pushed_grant_is_renewed_at_once() {
        let server = RedisServer::start().await;
        let (held, mut line) = line(&server, 1).await;
        let () = server.run("CONFIG RESETSTAT").await;
        drop(held);
        let (_factory, waiting) = line.remove(0);
        let _held = got(waiting).await;
        eventually("it is renewed", LIMIT, async || {
            server.calls("pexpire").await == 1
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_waiter_that_left_or_died_is_passed_over() {
        let server = RedisServer::start().await;
        let (held, mut line) = line(&server, 4).await;
        // The first is dropped, the second and its inbox end with their runtime's connection.
        let (_left, leaves) = line.remove(0);
        leaves.abort();
        queued(&server, 3).await;
        let (dies, waiting) = line.remove(0);
        waiting.abort();
        drop(dies);
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        for (_factory, waiting) in line {
            drop(got(waiting).await);
        }
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_queue_that_somebody_left_does_not_stay_for_good() {
        let server = RedisServer::start().await;
        let (_held, mut line) = line(&server, 4).await;
        // Out of the middle, its end and its beginning.
        for (place, left) in [(1, 3), (2, 2), (0, 1)] {
            let (_factory, leaves) = line.remove(place);
            leaves.abort();
            queued(&server, left).await;
            let kept: i64 = server.run(&format!("PTTL {QUEUE}")).await;
            assert!(kept > 0, "{kept}");
        }
    }

    /// Those before it may need the queue for less long, or for longer.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_queue_that_somebody_goes_back_into_lives_as_long_as_the_longest_needs() {
        let server = RedisServer::start().await;
        let short = || options_with(Duration::from_secs(1), ms(100));
        for (before, back) in [(short(), options()), (options(), short())] {
            let storage = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
            let storage = storage.connect().await.unwrap();
            let ours = LockFactory::builder(storage).handoff_limit(0, MINUTE);
            let ours = ours.build().unwrap();
            let held = got(wait(&ours)).await;
            let theirs = factory(&server).await;
            let other = theirs.create_lock("other").unwrap();
            let theirs_first = other.lock(options()).await.unwrap();
            let word = tokio::spawn(ours.create_lock("other").unwrap().lock(options()));
            kit::is_queued(&server, "other", 1).await;
            let waiting = tokio::spawn(theirs.create_lock("k").unwrap().lock(before));
            queued(&server, 1).await;
            // Messages come in order: with this one, ours has heard that the lock is wanted.
            assert_eq!(theirs_first.unlock().await.unwrap(), Unlocked::Held);
            drop(got(word).await);
            // Its own process asks no server while it has the lock.
            let again = tokio::spawn(ours.create_lock("k").unwrap().lock(back));
            eventually("it waits", LIMIT, async || ours.waiters() == 1).await;
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
            let kept: i64 = server.run(&format!("PTTL {QUEUE}")).await;
            assert!(kept > 60_000, "{kept}");
            drop(got(waiting).await);
            drop(got(again).await);
            no_key_is_left(&server).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_without_memory_to_spare_gives_the_lock_on() {
        let server = RedisServer::start().await;
        let (held, mut line) = line(&server, 2).await;
        let () = server.run("CONFIG SET maxmemory 1").await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        for (_factory, waiting) in line.drain(..) {
            drop(got(waiting).await);
        }
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_entry_of_a_process_without_an_inbox_is_skipped() {
        let server = RedisServer::start().await;
        let (held, mut line) = line(&server, 1).await;
        // As a process that was killed leaves it, in front of the other; and one that no process
        // has written.
        let queue: String = server.run(&format!("GET {QUEUE}")).await;
        let queue = format!("nonsense\n{:032x}:7 300000 1\n{queue}", 42);
        let client = redis::Client::open(server.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd("SET");
        command.arg(QUEUE).arg(queue);
        let () = command.query_async(&mut connection).await.unwrap();
        drop(held);
        let (_factory, waiting) = line.remove(0);
        drop(got(waiting).await);
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_waiter_whose_inbox_is_cut_again_and_again_waits_no_longer_than_an_interval() {
        let server = RedisServer::start().await;
        let factories = [factory(&server).await, factory(&server).await];
        let stop = Arc::new(AtomicBool::new(false));
        let turns = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let mut workers = JoinSet::new();
        for worker in 0..8 {
            let lock = factories[worker % 2].create_lock("k").unwrap();
            let (stop, turns) = (Arc::clone(&stop), Arc::clone(&turns));
            workers.spawn(async move {
                while !stop.load(SeqCst) {
                    let options = options_with(Duration::from_secs(5), ms(200));
                    let guard = lock.lock(options).await.unwrap();
                    tokio::task::yield_now().await;
                    turns[worker % 2].fetch_add(1, SeqCst);
                    drop(guard);
                }
            });
        }
        for _ in 0..20 {
            let before: u64 = turns.iter().map(|turns| turns.load(SeqCst)).sum();
            let _: redis::Value = server.run("CLIENT KILL TYPE pubsub").await;
            eventually("it goes on", LIMIT, async || {
                turns.iter().map(|turns| turns.load(SeqCst)).sum::<u64>() > before + 20
            })
            .await;
        }
        stop.store(true, SeqCst);
        within(LIMIT, "the workers end", workers.join_all()).await;
        drop(factories);
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn two_busy_processes_share_a_key_fairly() {
        let server = RedisServer::start().await;
        let factories = [factory(&server).await, factory(&server).await];
        let turns = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let stop = Arc::new(AtomicBool::new(false));
        let inside = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        for worker in 0..16 {
            let lock = factories[worker % 2].create_lock("k").unwrap();
            let (turns, stop, inside) =
                (Arc::clone(&turns), Arc::clone(&stop), Arc::clone(&inside));
            workers.spawn(async move {
                while !stop.load(SeqCst) {
                    let guard = lock.lock(options()).await.unwrap();
                    assert!(!inside.swap(true, SeqCst), "two at a time");
                    tokio::time::sleep(ms(1)).await;
                    inside.store(false, SeqCst);
                    turns[worker % 2].fetch_add(1, SeqCst);
                    drop(guard);
                }
            });
        }
        eventually("a thousand turns", 3 * LIMIT, async || {
            turns.iter().map(|turns| turns.load(SeqCst)).sum::<u64>() >= 1_000
        })
        .await;
        stop.store(true, SeqCst);
        within(LIMIT, "the workers end", workers.join_all()).await;
        let turns = [turns[0].load(SeqCst), turns[1].load(SeqCst)];
        let smallest = turns[0].min(turns[1]) as f64 / (turns[0] + turns[1]) as f64;
        assert!(smallest > 0.45, "{turns:?}");
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn tokens_grow_from_holder_to_holder_of_two_busy_processes() {
        let server = RedisServer::start().await;
        let factories = [factory(&server).await, factory(&server).await];
        assert_tokens_grow_from_holder_to_holder(factories).await;
        no_key_is_left(&server).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lock_given_by_a_release_has_a_higher_token_though_the_counter_was_lost() {
        let server = RedisServer::start().await;
        let (mut held, line) = line(&server, 4).await;
        let () = server.run("CONFIG RESETSTAT").await;
        for (_factory, waiting) in line {
            let last = held.fencing_token();
            let () = server.run("DEL {distributed-locks:}:fence").await;
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
            held = got(waiting).await;
            let token = held.fencing_token();
            assert!(token > last, "{token:?} after {last:?}");
            // What is left of the queue does not stay for good; -2: nothing is left.
            let kept: i64 = server.run(&format!("PTTL {QUEUE}")).await;
            assert_ne!(kept, -1);
        }
        // The message brings the token: one `SET` for each lock, one for each counter, and one for
        // the queue if that was not the last.
        assert_eq!(server.calls("set").await, 2 * 4 + 3);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_pub_sub_waiters_poll() {
        let server = RedisServer::start().await;
        let () = server
            .run("ACL SETUSER app on >secret ~* resetchannels +@all -subscribe -publish")
            .await;
        let url = server.url().replace("redis://", "redis://app:secret@");
        let mut factories = Vec::new();
        for _ in 0..2 {
            let storage = RedisStorage::builder(&url).connect_timeout(LIMIT);
            factories.push(LockFactory::new(storage.connect().await.unwrap()));
        }
        let options = options_with(Duration::from_secs(300), ms(50));
        let lock = |number: usize| factories[number].create_lock("k").unwrap();
        let held = lock(0).lock(options).await.unwrap();
        let waiting = tokio::spawn(lock(1).lock(options));
        eventually("it asks", LIMIT, async || server.calls("pttl").await > 3).await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        drop(got(waiting).await);
        no_key_is_left(&server).await;
    }
}
