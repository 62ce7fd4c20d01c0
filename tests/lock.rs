//! What `LockFactory`, `Lock`, `LockGuard` and `LockFuture` promise, without a server: over
//! `MemoryStorage`, and over a storage that fails as it is told to. Where time matters it is
//! tokio's, paused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

mod faulty;

use std::{
    convert::Infallible,
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    task::Poll,
    thread,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    runtime::{self, Runtime},
    sync::oneshot,
    task::{JoinHandle, JoinSet, yield_now},
    time::{Instant, sleep, sleep_until, timeout},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, Lock, LockFactory, LockFactoryBuilder, LockFuture, LockGuard,
    LockKey, LockOptions, LockOptionsBuilder, Unlocked,
    error::{
        InvalidKey, InvalidOptions, InvalidSettings, LockError, LossReason, NotObtained,
        StorageError, StorageErrorKind, TooManyWaiters, WaiterScope,
    },
    storage::MemoryStorage,
};

use self::faulty::{Cut, Fault, FaultyStorage, Gate, Op, Valve};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A third of this is a whole second; 2,968 ms of it can be relied on.
const TTL: Duration = ms(3_000);
const VALIDITY: Duration = ms(2_968);

/// Waits 10 s.
fn options() -> LockOptionsBuilder {
    LockOptions::builder()
        .ttl(TTL)
        .interval(ms(100))
        .retries(100)
}

fn patient() -> LockOptions {
    options().build().unwrap()
}

/// A storage behind a line that can break, and a factory at the other end. `memory` is what others
/// see.
struct World {
    memory: MemoryStorage,
    storage: FaultyStorage,
    factory: LockFactory,
}

impl World {
    fn new() -> Self {
        Self::with(|builder| builder)
    }

    fn with(
        setup: impl FnOnce(LockFactoryBuilder<FaultyStorage>) -> LockFactoryBuilder<FaultyStorage>,
    ) -> Self {
        let memory = MemoryStorage::with_clock(Clock::tokio());
        let storage = FaultyStorage::new(memory.clone());
        let builder = LockFactory::builder(storage.clone()).clock(Clock::tokio());
        let factory = setup(builder).build().unwrap();
        Self {
            memory,
            storage,
            factory,
        }
    }

    fn lock(&self) -> Lock {
        self.factory.create_lock("key").unwrap()
    }

    /// The same lock, from another process.
    fn lock_elsewhere(&self) -> Lock {
        factory_over(&self.memory).create_lock("key").unwrap()
    }

    /// Nothing is left of any caller or holder.
    fn assert_empty(&self, when: &str) {
        assert_eq!(self.factory.keys(), 0, "keys, {when}");
        assert_eq!(self.factory.waiters(), 0, "waiters, {when}");
        assert!(self.memory.is_empty(), "{:?}, {when}", self.memory);
    }
}

fn factory_over(memory: &MemoryStorage) -> LockFactory {
    LockFactory::builder(memory.clone())
        .clock(Clock::tokio())
        .build()
        .unwrap()
}

fn not_obtained<T: std::fmt::Debug>(result: Result<T, LockError>) -> NotObtained {
    match result {
        Err(LockError::NotObtained(error)) => error,
        other => panic!("expected NotObtained: {other:?}"),
    }
}

fn storage_error<T: std::fmt::Debug>(result: Result<T, LockError>) -> StorageErrorKind {
    match result {
        Err(LockError::Storage(error)) => error.kind(),
        other => panic!("expected a storage error: {other:?}"),
    }
}

/// Lets every task that can go on go on. Paused time stands still meanwhile.
async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

/// Fails if `work` has not ended after 20 s of real time. What hangs is left hanging.
fn ends<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result
        .recv_timeout(Duration::from_secs(20))
        .expect("it panicked, or it hangs")
}

// --- lock, try_lock, unlock -------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_lock_can_be_taken_and_given_back() {
    let world = World::new();
    let lock = world.lock();
    assert_eq!(lock.key(), "key");

    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.key(), "key");
    assert!(guard.is_held());
    assert_eq!(guard.remaining(), VALIDITY);
    assert_eq!((world.factory.keys(), world.memory.len()), (1, 1));

    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    world.assert_empty("after unlock");

    let guard = lock.try_lock(patient()).await.unwrap();
    drop(guard);
    world.assert_empty("after drop");
}

#[tokio::test(start_paused = true)]
async fn a_lock_held_here_is_refused_to_try_lock_without_asking_the_storage() {
    let world = World::new();
    let _guard = world.lock().lock(patient()).await.unwrap();
    sleep(ms(68)).await;

    let error = not_obtained(world.lock().try_lock(patient()).await);
    assert_eq!((error.waited, error.attempts), (Duration::ZERO, 0));
    assert_eq!(error.holder_ttl, Some(ms(2_900)));
    assert_eq!(world.storage.count(Op::Acquire), 1);
    assert_eq!(world.factory.waiters(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lock_held_elsewhere_is_refused_to_try_lock_after_one_question() {
    let world = World::new();
    let _guard = world.lock_elsewhere().lock(patient()).await.unwrap();
    sleep(ms(500)).await;

    let error = not_obtained(world.lock().try_lock(patient()).await);
    assert_eq!((error.waited, error.attempts), (Duration::ZERO, 1));
    assert_eq!(error.holder_ttl, Some(ms(2_500)));
    assert_eq!(world.storage.count(Op::Acquire), 1);
    assert_eq!((world.factory.keys(), world.factory.waiters()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_caller_waits_for_retries_times_interval_to_the_millisecond() {
    let world = World::new();
    let elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    for (retries, interval) in [(1, 1), (3, 70), (7, 1_001), (100, 3)] {
        let options = LockOptions::builder()
            .retries(retries)
            .interval(ms(interval))
            .build()
            .unwrap();
        let (start, asked) = (Instant::now(), world.storage.count(Op::Acquire));
        let error = not_obtained(world.lock().lock(options).await);
        assert_eq!(start.elapsed(), ms(interval * u64::from(retries)));
        assert_eq!(error.waited, start.elapsed());
        let asked = world.storage.count(Op::Acquire) - asked;
        assert_eq!(error.attempts as usize, asked);
        // At least every interval, and no more than twice as often (and once at the start).
        assert!(
            (retries as usize..=2 * retries as usize + 1).contains(&asked),
            "{asked}"
        );
        assert!(
            error
                .holder_ttl
                .is_some_and(|ttl| ttl > ms(900) && ttl <= TTL)
        );
    }
    drop(elsewhere);
    settle().await;
    world.assert_empty("after they gave up");
}

#[tokio::test(start_paused = true)]
async fn a_caller_behind_others_of_its_factory_keeps_its_own_budget() {
    let world = World::new();
    let _guard = world.lock().lock(patient()).await.unwrap();
    let first = tokio::spawn(world.lock().lock(patient()));
    let start = Instant::now();
    let hurried = options().retries(1).interval(ms(250)).build().unwrap();
    let error = not_obtained(world.lock().lock(hurried).await);
    assert_eq!(
        (start.elapsed(), error.waited, error.attempts),
        (ms(250), ms(250), 0)
    );
    assert!(error.holder_ttl.is_some_and(|ttl| ttl <= TTL));
    assert_eq!(world.factory.waiters(), 1);
    first.abort();
}

#[tokio::test(start_paused = true)]
async fn a_lock_released_elsewhere_is_had_within_an_interval() {
    let world = World::new();
    let elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    let waiter = tokio::spawn(world.lock().lock(patient()));
    sleep(ms(1_234)).await;
    drop(elsewhere);
    let released = Instant::now();
    let _guard = waiter.await.unwrap().unwrap();
    assert!(released.elapsed() <= ms(101), "{:?}", released.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_holder_died_is_had_when_its_ttl_is_over() {
    let world = World::new();
    let storage = FaultyStorage::new(world.memory.clone());
    storage.always(Op::Renew, Fault::hangs());
    storage.always(Op::Release, Fault::hangs());
    let dead = LockFactory::builder(storage)
        .clock(Clock::tokio())
        .build()
        .unwrap();
    let _dead = dead
        .create_lock("key")
        .unwrap()
        .lock(patient())
        .await
        .unwrap();
    let start = Instant::now();
    // Asks rarely, but when the holder's time is up.
    let options = LockOptions::builder()
        .interval(ms(60_000))
        .retries(1)
        .build()
        .unwrap();
    let _guard = world.lock().lock(options).await.unwrap();
    assert!(
        (TTL..TTL + ms(15)).contains(&start.elapsed()),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn one_waiter_too_many_is_refused_per_key_and_in_all() {
    let world = World::with(|builder| builder.max_waiters_per_key(2).max_waiters(3));
    let _guard = world.lock().lock(patient()).await.unwrap();
    let mut waiting = JoinSet::new();
    waiting.spawn(world.lock().lock(patient()));
    waiting.spawn(world.lock().lock(patient()));
    settle().await;

    let refused = |result: Result<LockGuard, LockError>| match result {
        Err(LockError::TooManyWaiters(error)) => error,
        other => panic!("expected TooManyWaiters: {other:?}"),
    };
    let error = refused(world.lock().lock(patient()).await);
    assert_eq!((error.limit, error.scope), (2, WaiterScope::Key));
    assert_eq!(error.holder_ttl, Some(VALIDITY));

    // Another key: one more may wait in all.
    let other = world.factory.create_lock("other").unwrap();
    let guard = other.lock(patient()).await.unwrap();
    waiting.spawn(other.lock(patient()));
    settle().await;
    let error = refused(
        world
            .factory
            .create_lock("third")
            .unwrap()
            .lock(patient())
            .await,
    );
    assert_eq!((error.limit, error.scope), (3, WaiterScope::Factory));
    assert_eq!(error.holder_ttl, None);
    // Nothing was kept of those who were refused.
    assert_eq!((world.factory.keys(), world.factory.waiters()), (2, 3));

    // Who leaves makes room.
    waiting.shutdown().await;
    assert_eq!(world.factory.waiters(), 0);
    drop(guard);
    drop(other.lock(patient()).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn keys_and_settings_that_cannot_be_used_are_refused() {
    let memory = MemoryStorage::with_clock(Clock::tokio());
    let build = |prefix: &str| {
        LockFactory::builder(memory.clone())
            .clock(Clock::tokio())
            .key_prefix(prefix)
            .build()
    };
    for bad in ["", "a:b", "a b", "{a}", "ä", &"x".repeat(65)] {
        assert_eq!(build(bad).unwrap_err(), InvalidSettings::KeyPrefix, "{bad}");
    }
    let settings = || LockFactory::builder(memory.clone());
    for (bad, error) in [
        (
            settings().storage_timeout(Duration::ZERO),
            InvalidSettings::StorageTimeout,
        ),
        (
            settings().storage_timeout(Duration::MAX),
            InvalidSettings::StorageTimeout,
        ),
        (settings().linger(Duration::MAX), InvalidSettings::Linger),
        (settings().max_waiters(0), InvalidSettings::MaxWaiters),
        (
            settings().max_waiters_per_key(0),
            InvalidSettings::MaxWaiters,
        ),
    ] {
        assert_eq!(bad.build().unwrap_err(), error);
    }
    let (one, other) = (build("one").unwrap(), build("other").unwrap());
    assert_eq!(one.create_lock("").unwrap_err(), InvalidKey::Empty);
    assert_eq!(
        one.create_lock("x".repeat(1_025).as_str()).unwrap_err(),
        InvalidKey::TooLong
    );

    // The same key under two prefixes is two locks.
    let _one = one
        .create_lock("key")
        .unwrap()
        .try_lock(patient())
        .await
        .unwrap();
    let _other = other
        .create_lock("key")
        .unwrap()
        .try_lock(patient())
        .await
        .unwrap();
}

// --- the queue --------------------------------------------------------------------------------------------------------

/// So many callers, in this order, each holding the lock for so long. Answers who was served, in
/// order.
async fn crowd(lock: &Lock, callers: usize, options: LockOptions, hold: Duration) -> Vec<usize> {
    let (served, inside) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(AtomicBool::new(false)),
    );
    let mut tasks = JoinSet::new();
    for number in 0..callers {
        let (lock, served, inside) = (lock.clone(), Arc::clone(&served), Arc::clone(&inside));
        tasks.spawn(async move {
            let guard = lock.lock(options).await.unwrap();
            assert!(!inside.swap(true, SeqCst), "two are inside");
            served.lock().unwrap().push(number);
            if hold.is_zero() {
                yield_now().await;
            } else {
                sleep(hold).await;
            }
            assert!(guard.is_held());
            inside.store(false, SeqCst);
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    served.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn callers_of_one_factory_are_served_one_at_a_time_in_the_order_of_their_arrival() {
    let world = World::with(|builder| builder.handoff_limit(7, ms(200)));
    for op in [Op::Acquire, Op::Renew, Op::Release] {
        world.storage.always(op, Fault::slow());
    }
    for hold in [ms(0), ms(30)] {
        let served = crowd(&world.lock(), 100, patient(), hold).await;
        assert_eq!(served, (0..100).collect::<Vec<_>>());
        settle().await;
        world.assert_empty("after the crowd");
    }
}

#[test]
fn guards_of_one_factory_never_overlap_on_many_threads() {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let memory = MemoryStorage::new();
        // Two factories: handed over here, and contended from elsewhere.
        let factories = [(); 2].map(|()| {
            LockFactory::builder(memory.clone())
                .handoff_limit(5, ms(5))
                .build()
                .unwrap()
        });
        let options = LockOptions::builder()
            .interval(ms(1))
            .retries(60_000)
            .build()
            .unwrap();
        let (inside, served) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let mut tasks = JoinSet::new();
        for number in 0..400 {
            let lock = factories[number % 2].create_lock("key").unwrap();
            let (inside, served) = (Arc::clone(&inside), Arc::clone(&served));
            tasks.spawn(async move {
                let guard = lock.lock(options).await.unwrap();
                assert!(!inside.swap(true, SeqCst), "two are inside");
                yield_now().await;
                assert!(guard.is_held());
                served.fetch_add(1, SeqCst);
                inside.store(false, SeqCst);
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        assert_eq!(served.load(SeqCst), 400);
        for factory in &factories {
            assert_eq!((factory.keys(), factory.waiters()), (0, 0));
        }
        assert!(memory.is_empty());
    });
}

#[tokio::test(start_paused = true)]
async fn a_lock_goes_from_one_caller_to_the_next_without_the_storage() {
    let world = World::with(|builder| builder.fencing(false));
    crowd(&world.lock(), 50, patient(), Duration::ZERO).await;
    assert_eq!(world.storage.count(Op::Acquire), 1);
    assert_eq!(world.storage.count(Op::Release), 1);
}

#[tokio::test(start_paused = true)]
async fn fencing_tokens_for_a_crowd_come_in_few_and_growing_blocks() {
    let world = World::with(|builder| builder.handoff_limit(u32::MAX, ms(60_000)));
    crowd(&world.lock(), 1_000, patient(), Duration::ZERO).await;
    // 1 while nobody waits yet, then 64 for the first of the crowd, and twice as many each time.
    assert_eq!(world.storage.count(Op::Acquire), 6);
    assert_eq!(world.storage.count(Op::Release), 6);
}

#[tokio::test(start_paused = true)]
async fn each_guard_has_a_higher_fencing_token_however_it_was_got() {
    let world = World::new();
    let mut last = None;
    for lock in [world.lock(), world.lock_elsewhere(), world.lock()] {
        for tries in [false, true] {
            let guard = match tries {
                true => lock.try_lock(patient()).await,
                false => lock.lock(patient()).await,
            };
            let guard = guard.unwrap();
            let token = guard.fencing_token();
            assert!(token > last && token < Some(1 << 53), "{token:?}");
            assert_eq!(guard.fencing_token(), token, "it stays the same");
            last = token;
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn guards_of_a_factory_without_fencing_have_no_token() {
    let world = World::with(|builder| builder.fencing(false));
    let guard = world.lock().try_lock(patient()).await.unwrap();
    assert_eq!(guard.fencing_token(), None);
    // Neither has who waited for it, here or elsewhere.
    let (here, elsewhere) = (world.lock().lock(patient()), world.lock_elsewhere());
    let here = tokio::spawn(here);
    settle().await;
    drop(guard);
    let guard = here.await.unwrap().unwrap();
    assert_eq!(guard.fencing_token(), None);
    drop(guard);
    settle().await;
    let fenced = elsewhere.lock(patient()).await.unwrap();
    assert!(fenced.fencing_token().is_some());
    let waiting = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    drop(fenced);
    assert_eq!(waiting.await.unwrap().unwrap().fencing_token(), None);
}

#[tokio::test(start_paused = true)]
async fn the_handoff_limit_counts_turns() {
    let world = World::with(|builder| builder.handoff_limit(5, ms(60_000)).fencing(false));
    crowd(&world.lock(), 20, patient(), ms(10)).await;
    assert_eq!(world.storage.count(Op::Acquire), 4);
    assert_eq!(world.storage.count(Op::Release), 4);
}

#[tokio::test(start_paused = true)]
async fn the_handoff_limit_counts_time() {
    let world = World::with(|builder| builder.handoff_limit(1_000, ms(50)).fencing(false));
    crowd(&world.lock(), 20, patient(), ms(10)).await;
    assert_eq!(world.storage.count(Op::Acquire), 4);
    assert_eq!(world.storage.count(Op::Release), 4);
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_met_its_handoff_limit_is_free_before_this_factory_asks_for_it_again() {
    let world = World::with(|builder| builder.handoff_limit(2, ms(60_000)));
    let asks_again = Valve::shut();
    world.storage.next(Op::Acquire, Fault::default());
    world.storage.next(Op::Acquire, Fault::sent_by(&asks_again));
    let lock = world.lock();
    let ours = tokio::spawn(async move { crowd(&lock, 4, patient(), ms(10)).await });
    world.storage.sent_times(Op::Acquire, 2).await;
    // Two of the four have been served, and now others can have it.
    let elsewhere = world.lock_elsewhere().try_lock(patient()).await.unwrap();
    asks_again.open();
    sleep(ms(1_000)).await;
    assert!(elsewhere.is_held() && !ours.is_finished());
    drop(elsewhere);
    assert_eq!(ours.await.unwrap(), [0, 1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_lock_with_little_time_left_is_not_handed_over() {
    // Long enough that the limit does not decide.
    let world = World::with(|builder| builder.handoff_limit(64, ms(60_000)));
    world
        .storage
        .always(Op::Renew, Fault::fails(StorageErrorKind::Unavailable));
    let guard = world.lock().lock(patient()).await.unwrap();
    let next = tokio::spawn(world.lock().lock(patient()));
    sleep(ms(2_000)).await;
    drop(guard);
    let next = next.await.unwrap().unwrap();
    assert_eq!(next.remaining(), VALIDITY);
    assert_eq!(world.storage.count(Op::Acquire), 2);
}

#[tokio::test(start_paused = true)]
async fn waiters_with_another_ttl_get_a_lease_of_their_own() {
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    let longer = options().ttl(ms(6_000)).build().unwrap();
    let waiter = tokio::spawn(world.lock().lock(longer));
    settle().await;
    drop(guard);
    let guard = waiter.await.unwrap().unwrap();
    assert_eq!(guard.remaining(), ms(5_938));
    drop(guard);
    settle().await;
    world.assert_empty("after both");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_waiters_of_which_half_leave_are_served_in_order() {
    const WAITERS: usize = 10_000;
    let world = World::with(|builder| builder.max_waiters_per_key(WAITERS).max_waiters(WAITERS));
    let lock = world.lock();
    let first = lock.lock(patient()).await.unwrap();
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..WAITERS {
        let (lock, served) = (lock.clone(), Arc::clone(&served));
        tasks.push(tokio::spawn(async move {
            let _guard = lock.lock(patient()).await.unwrap();
            served.lock().unwrap().push(number);
        }));
    }
    while world.factory.waiters() < WAITERS {
        yield_now().await;
    }

    // Half of them leave while all wait, in no order, and the rest of that half while the others
    // are served.
    let mut numbers: Vec<_> = (0..WAITERS).collect();
    let mut random = fastrand::Rng::with_seed(42);
    random.shuffle(&mut numbers);
    let (leave, mut stay) = (
        numbers[..WAITERS / 2].to_vec(),
        numbers[WAITERS / 2..].to_vec(),
    );
    let (now, later) = leave.split_at(WAITERS / 4);
    now.iter().for_each(|number| tasks[*number].abort());
    while world.factory.waiters() > WAITERS - WAITERS / 4 {
        yield_now().await;
    }
    drop(first);
    for number in later {
        tasks[*number].abort();
        yield_now().await;
    }
    for task in tasks {
        assert!(
            task.await
                .map_or_else(|error| error.is_cancelled(), |()| true)
        );
    }
    let served = served.lock().unwrap().clone();
    assert!(served.is_sorted());
    stay.retain(|number| served.binary_search(number).is_err());
    assert_eq!(stay, [0; 0], "not served");
    settle().await;
    world.assert_empty("after ten thousand");
}

#[test]
fn a_million_keys_leave_nothing() {
    const KEYS: u32 = 1_000_000;
    const TASKS: u32 = 8;
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let memory = MemoryStorage::new();
    // Short names: what costs most here is hashing them, without optimization.
    let builder = LockFactory::builder(memory.clone()).key_prefix("m");
    let factory = builder.build().unwrap();
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for task in 0..TASKS {
            let factory = factory.clone();
            tasks.spawn(async move {
                for number in (0..KEYS).skip(task as usize).step_by(TASKS as usize) {
                    let lock = factory.create_lock(number.to_string().as_str()).unwrap();
                    let _guard = lock.try_lock(LockOptions::default()).await.unwrap();
                }
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
    });
    assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    assert!(memory.is_empty());
}

// --- a caller that goes ------------------------------------------------------------------------------------------------

/// What stands in the way of the caller under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scene {
    Free,
    HeldElsewhere,
    HeldHere,
    /// By a holder here, and then by one elsewhere: the caller is second, then first, then asks,
    /// waits, asks again.
    HeldHereThenElsewhere,
}

const SCENES: [Scene; 4] = [
    Scene::Free,
    Scene::HeldElsewhere,
    Scene::HeldHere,
    Scene::HeldHereThenElsewhere,
];
const CUTS: [Cut; 5] = [
    Cut::None,
    Cut::SendHangs,
    Cut::SendFails,
    Cut::ReplyHangs,
    Cut::ReplyFails,
];

/// Begins a scene; it ends by itself after some 100 ms.
async fn stage(world: &World, scene: Scene) {
    let (here, elsewhere) = (world.lock(), world.lock_elsewhere());
    match scene {
        Scene::Free => {}
        Scene::HeldElsewhere => {
            let guard = elsewhere.lock(patient()).await.unwrap();
            tokio::spawn(async move {
                sleep(ms(60)).await;
                drop(guard);
            });
        }
        Scene::HeldHere => {
            let guard = here.lock(patient()).await.unwrap();
            tokio::spawn(async move {
                sleep(ms(30)).await;
                drop(guard);
            });
        }
        Scene::HeldHereThenElsewhere => {
            let guard = here.lock(patient()).await.unwrap();
            let eager = options().interval(ms(1)).retries(1_000).build().unwrap();
            tokio::spawn(async move {
                sleep(ms(30)).await;
                // Too old to be handed over, and gone before we can ask.
                assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
                let guard = elsewhere.lock(eager).await.unwrap();
                sleep(ms(60)).await;
                drop(guard);
            });
        }
    }
}

/// Polls a caller so many times, whenever it was woken, and answers how often it was polled at
/// most.
///
/// Paused time goes on only where the caller waits for it.
async fn poll_times(
    caller: &mut tokio_test::task::Spawn<LockFuture>,
    polls: usize,
) -> (usize, Option<Result<LockGuard, LockError>>) {
    for polled in 1..=polls {
        if let Poll::Ready(result) = caller.poll() {
            return (polled, Some(result));
        }
        // The last poll leaves it as it is: woken or not.
        let mut patience = 10_000;
        while polled < polls && !caller.is_woken() {
            sleep(ms(1)).await;
            patience -= 1;
            assert_ne!(patience, 0, "never woken");
        }
    }
    (polls, None)
}

/// A world in which every call takes three polls, and a handoff limit that makes callers ask for
/// themselves.
fn slow_world(scene: Scene) -> World {
    let world = World::with(|builder| {
        let turns = if scene == Scene::HeldHereThenElsewhere {
            1
        } else {
            64
        };
        builder.handoff_limit(turns, ms(60_000))
    });
    world.storage.always(Op::Acquire, Fault::slow());
    world.storage.always(Op::Release, Fault::slow());
    // What is random in the pauses is the same in every run.
    fastrand::seed(7);
    world
}

async fn polls_needed(scene: Scene) -> usize {
    let world = slow_world(scene);
    stage(&world, scene).await;
    let mut caller = tokio_test::task::spawn(world.lock().lock(patient()));
    let (polls, result) = poll_times(&mut caller, usize::MAX).await;
    drop(result.unwrap().unwrap());
    polls
}

#[tokio::test(start_paused = true)]
async fn a_caller_dropped_at_any_point_leaves_nothing() {
    for scene in SCENES {
        let polls = polls_needed(scene).await;
        assert!(
            polls >= if scene == Scene::HeldHere { 2 } else { 3 },
            "{scene:?}: {polls}"
        );
        for (k, cut) in (0..=polls).flat_map(|k| CUTS.map(|cut| (k, cut))) {
            let case = format!("{scene:?}, dropped after {k} of {polls} polls, {cut:?}");
            let world = slow_world(scene);
            stage(&world, scene).await;
            let mut caller = tokio_test::task::spawn(world.lock().lock(patient()));
            let (_, result) = poll_times(&mut caller, k).await;
            assert_eq!(result.is_some(), k == polls, "{case}");
            world.storage.cut(Op::Acquire, cut);
            drop(caller);
            drop(result);

            // The scene is over, and what hangs has been given up; the ttl is far away.
            sleep(ms(1_300)).await;
            world.assert_empty(&case);

            world.storage.heal();
            let now = Instant::now();
            let guard = world.lock().lock(patient()).await.expect(&case);
            assert_eq!(now.elapsed(), Duration::ZERO, "{case}");
            drop(guard);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_first_is_dropped_at_any_point_the_next_gets_its_turn() {
    for scene in SCENES {
        let polls = polls_needed(scene).await;
        for (k, cut) in (0..=polls).flat_map(|k| CUTS.map(|cut| (k, cut))) {
            let case = format!("{scene:?}, dropped after {k} of {polls} polls, {cut:?}");
            let world = slow_world(scene);
            stage(&world, scene).await;
            let mut caller = tokio_test::task::spawn(world.lock().lock(patient()));
            let (polled, result) = poll_times(&mut caller, k).await;
            assert!(polled == k, "{case}");
            let next = tokio::spawn(world.lock().lock(patient()));
            settle().await;

            world.storage.cut(Op::Acquire, cut);
            drop(caller);
            drop(result);
            // The call that was on its way meets the cut; the next caller's own calls do not.
            settle().await;
            world.storage.cut(Op::Acquire, Cut::None);

            let guard = timeout(ms(1_300), next)
                .await
                .expect(&case)
                .unwrap()
                .expect(&case);
            assert!(guard.is_held(), "{case}");
            drop(guard);
            sleep(ms(1_300)).await;
            world.assert_empty(&case);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlock_dropped_at_any_point_gives_the_lock_back() {
    for (k, cut) in (0..4).flat_map(|k| CUTS.map(|cut| (k, cut))) {
        let case = format!("dropped after {k} polls, {cut:?}");
        let world = slow_world(Scene::Free);
        let guard = world.lock().lock(patient()).await.unwrap();
        let mut unlock = tokio_test::task::spawn(guard.unlock());
        for _ in 0..k {
            if unlock.poll().is_ready() {
                break;
            }
        }
        world.storage.cut(Op::Release, cut);
        drop(unlock);
        settle().await;
        world.storage.cut(Op::Release, Cut::None);
        sleep(ms(1_300)).await;
        world.assert_empty(&case);
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_was_given_the_lock_and_is_never_polled_blocks_it_for_a_ttl_at_most() {
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    let mut sleepy = tokio_test::task::spawn(world.lock().lock(patient()));
    assert!(sleepy.poll().is_pending());
    drop(guard);
    assert!(sleepy.is_woken());

    let start = Instant::now();
    let guard = world.lock_elsewhere().lock(patient()).await.unwrap();
    assert!(start.elapsed() <= TTL + ms(15), "{:?}", start.elapsed());
    // It wakes up late, and has to ask like anybody.
    assert!(sleepy.poll().is_pending());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let _guard = sleepy.await.unwrap();
}

#[test]
fn a_caller_dropped_on_a_plain_thread_leaves_nothing() {
    let runtime = Runtime::new().unwrap();
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    let factory = LockFactory::new(storage.clone());
    storage.always(
        Op::Acquire,
        Fault {
            reply: Gate::Once,
            ..Fault::default()
        },
    );
    let mut caller = Box::pin(factory.create_lock("key").unwrap().lock(patient()));
    runtime.block_on(async {
        assert!(caller.as_mut().now_or_never().is_none());
    });
    assert_eq!(memory.len(), 1);
    thread::spawn(move || drop(caller)).join().unwrap();
    runtime.block_on(async {
        let released = timeout(ms(1_500), storage.sent_times(Op::Release, 1)).await;
        assert!(
            released.is_ok(),
            "nobody releases what the caller had asked for"
        );
    });
}

// --- renewal and loss -------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_holder_that_lives_keeps_its_lock_by_renewal_every_third_of_the_ttl() {
    let world = World::new();
    let start = Instant::now();
    let guard = world.lock().lock(patient()).await.unwrap();
    for _ in 0..300 {
        sleep(ms(100)).await;
        assert!(guard.is_held());
        assert!(guard.remaining() > ms(1_900) && guard.remaining() <= VALIDITY);
    }
    not_obtained(world.lock_elsewhere().try_lock(patient()).await);
    let calls = world.storage.calls(Op::Renew);
    assert!((29..=31).contains(&calls.len()), "{}", calls.len());
    for (call, third) in calls.iter().zip(1..) {
        let at = call.at - start;
        assert!(at.abs_diff(ms(1_000 * third)) <= ms(third), "{at:?}");
        assert_eq!(call.token(), world.storage.calls(Op::Acquire)[0].token());
    }
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    world.assert_empty("after unlock");
    sleep(ms(5_000)).await;
    // What was given back is not renewed.
    assert_eq!(world.storage.count(Op::Renew), calls.len());
}

#[tokio::test(start_paused = true)]
async fn many_locks_are_renewed_in_few_calls() {
    let world = World::new();
    let mut guards = Vec::new();
    for number in 0..300 {
        let lock = world
            .factory
            .create_lock(format!("key {number}").as_str())
            .unwrap();
        guards.push(lock.lock(patient()).await.unwrap());
        // All within what a renewal may be early by.
        if number % 10 == 0 {
            sleep(ms(3)).await;
        }
    }
    sleep(ms(5_500)).await;
    assert!(guards.iter().all(LockGuard::is_held));
    // Five rounds of 300, at most 256 a call.
    let calls = world.storage.calls(Op::Renew);
    assert!(calls.iter().all(|call| call.locks.len() <= 256));
    assert!(calls.len() <= 12, "{} calls", calls.len());
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_leaves_the_deadline_and_is_tried_again() {
    let failures = [
        Fault::fails(StorageErrorKind::Unavailable),
        Fault::fails(StorageErrorKind::Unauthorized),
        Fault {
            error: Some(StorageErrorKind::Timeout),
            ..Fault::default()
        },
        Fault::hangs(),
        Fault::loses_its_reply(),
    ];
    for failure in failures {
        let world = World::with(|builder| builder.storage_timeout(ms(300)));
        let guard = world.lock().lock(patient()).await.unwrap();
        world.storage.next(Op::Renew, failure.clone());
        world.storage.next(Op::Renew, failure);
        sleep(ms(1_010)).await;
        assert_eq!(world.storage.count(Op::Renew), 1);
        assert_eq!(guard.remaining(), ms(1_958));
        // Two failures, at most 300 ms for each call and each pause.
        sleep(ms(1_200)).await;
        assert!(world.storage.count(Op::Renew) >= 3);
        assert!(guard.remaining() > ms(1_958), "{:?}", guard.remaining());
        sleep(ms(10_000)).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test(start_paused = true)]
async fn one_lost_renewal_reply_does_not_cost_the_shortest_lock() {
    for lost in [Fault::hangs(), Fault::loses_its_reply()] {
        // With the default limit of 1 s for calls of the storage, which is as long as the lock.
        let world = World::new();
        world.storage.next(Op::Renew, lost);
        let options = options().ttl(ms(1_000)).build().unwrap();
        let guard = world.lock().lock(options).await.unwrap();
        let lost = timeout(ms(3_000), guard.lost()).await;
        assert!(lost.is_err() && guard.is_held(), "{lost:?}");
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_cannot_be_renewed_is_lost_at_its_deadline_not_before_and_not_after() {
    let failures = [
        Fault::fails(StorageErrorKind::Unavailable),
        Fault::hangs(),
        // Renewed in the storage, but nobody here can know.
        Fault::loses_its_reply(),
    ];
    for failure in failures {
        let world = World::new();
        world.storage.always(Op::Renew, failure);
        let start = Instant::now();
        let guard = world.lock().lock(patient()).await.unwrap();
        let lost = async {
            let reason = guard.lost().await;
            (reason, start.elapsed())
        };
        let watch = async {
            sleep_until(start + VALIDITY - ms(1)).await;
            assert!(guard.is_held());
            assert_eq!(guard.remaining(), ms(1));
            sleep(ms(1)).await;
            assert!(!guard.is_held());
            assert_eq!(guard.remaining(), Duration::ZERO);
        };
        let (lost, ()) = tokio::join!(lost, watch);
        assert_eq!(lost, (LossReason::Expired, VALIDITY));
        // A loss is not forgotten.
        assert_eq!(guard.lost().await, LossReason::Expired);
        world.storage.heal();
        // Whoever unlocks late frees what a lost reply may have left.
        sleep(ms(100)).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
        settle().await;
        world.assert_empty("after the late unlock");
    }
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_seen_by_a_holder_that_only_looks() {
    // A holder that computes for long, on the thread that the background task would need: the clock
    // alone decides.
    let goes_on = |time| assert!(tokio::time::advance(time).now_or_never().is_none());
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    goes_on(VALIDITY - ms(1));
    assert!(guard.is_held());
    assert_eq!(guard.remaining(), ms(1));
    goes_on(ms(1));
    assert!(!guard.is_held());
    assert_eq!(guard.remaining(), Duration::ZERO);
    assert_eq!(guard.lost().now_or_never(), Some(LossReason::Expired));
    // The storage still has it, but that is luck.
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_answered_after_the_deadline_revives_nothing() {
    let world = World::with(|builder| builder.storage_timeout(ms(10_000)));
    let valve = Valve::shut();
    world.storage.always(Op::Renew, Fault::answered_by(&valve));
    let guard = world.lock().lock(patient()).await.unwrap();
    // The storage carries out what it does not answer. The renewal that is on its way at the
    // deadline, 2,968 ms, is given up after a fifth of the ttl.
    sleep(ms(3_050)).await;
    assert!(!guard.is_held());
    assert_eq!(world.memory.len(), 1);
    valve.open();
    settle().await;
    assert!(!guard.is_held());
    assert!(
        world.memory.is_empty(),
        "the renewed lock was not given back"
    );
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_and_the_deadline_that_come_together_revive_nothing() {
    // Which of the two the background task sees first is up to chance.
    for _ in 0..30 {
        let world = World::with(|builder| builder.storage_timeout(ms(10_000)));
        let valve = Valve::shut();
        world.storage.always(Op::Renew, Fault::answered_by(&valve));
        let guard = world.lock().lock(patient()).await.unwrap();
        sleep(ms(1_500)).await;
        valve.open();
        // No task runs before the time has gone on: this process was asleep.
        tokio::time::advance(ms(2_000)).await;
        settle().await;
        assert!(!guard.is_held());
        assert!(
            world.memory.is_empty(),
            "the renewed lock was not given back"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_the_storage_forgot_is_lost_at_the_next_renewal() {
    let world = World::new();
    let start = Instant::now();
    let guard = world.lock().lock(patient()).await.unwrap();
    sleep(ms(500)).await;
    world.memory.clear();
    assert_eq!(guard.lost().await, LossReason::NotOurs);
    assert!(start.elapsed() <= ms(1_001), "{:?}", start.elapsed());
    assert!(!guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    settle().await;
    world.assert_empty("after the loss");
}

#[tokio::test(start_paused = true)]
async fn an_unlock_tells_of_a_loss_that_nobody_had_noticed() {
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    world.memory.clear();
    let elsewhere = world.lock_elsewhere().try_lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(elsewhere.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn a_lock_held_for_longer_than_max_hold_is_lost() {
    let world = World::new();
    let start = Instant::now();
    let options = options().max_hold(ms(5_000)).build().unwrap();
    let guard = world.lock().lock(options).await.unwrap();
    let next = tokio::spawn(world.lock().lock(patient()));
    sleep(ms(4_999)).await;
    assert!(guard.is_held());
    assert_eq!(guard.remaining(), ms(1));
    assert_eq!(guard.lost().await, LossReason::MaxHold);
    assert_eq!(start.elapsed(), ms(5_000));
    assert!(!guard.is_held());
    // The work that was under it may still go on, so nobody else is let in before it ends, or the
    // ttl.
    settle().await;
    assert!(!next.is_finished());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    drop(next.await.unwrap().unwrap());
    assert!(start.elapsed() <= ms(5_001), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_never_reacts_to_max_hold_keeps_the_lock_for_a_ttl_at_most() {
    let world = World::new();
    let start = Instant::now();
    let options = options().max_hold(ms(5_000)).build().unwrap();
    let guard = world.lock().lock(options).await.unwrap();
    let _next = world.lock().lock(patient()).await.unwrap();
    assert!(start.elapsed() >= ms(5_000) && start.elapsed() <= ms(5_000) + TTL);
    assert!(!guard.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_late_unlock_does_not_free_the_lock_of_another() {
    let world = World::new();
    world.storage.always(Op::Renew, Fault::hangs());
    let late = world.lock().lock(patient()).await.unwrap();
    let elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    assert!(!late.is_held());
    world.storage.heal();
    assert_eq!(late.unlock().await.unwrap(), Unlocked::Lost);
    settle().await;
    not_obtained(world.lock().try_lock(patient()).await);
    sleep(ms(1_100)).await;
    assert!(elsewhere.is_held());
    assert_eq!(elsewhere.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn a_late_unlock_does_not_free_the_lock_of_the_next_caller_here() {
    let world = World::new();
    world.storage.always(Op::Renew, Fault::hangs());
    let late = world.lock().lock(patient()).await.unwrap();
    let next = world.lock().lock(patient()).await.unwrap();
    world.storage.heal();
    assert!(!late.is_held() && next.is_held());
    assert_eq!(late.unlock().await.unwrap(), Unlocked::Lost);
    settle().await;
    not_obtained(world.lock_elsewhere().try_lock(patient()).await);
    not_obtained(world.lock().try_lock(patient()).await);
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_comes_too_late_is_not_used_but_released() {
    let world = World::with(|builder| builder.storage_timeout(ms(9_000)));
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    let start = Instant::now();
    let caller = tokio::spawn(world.lock().lock(patient()));
    // A millisecond after what can be relied on; the storage still has the lock.
    sleep(VALIDITY + ms(1)).await;
    assert_eq!(world.memory.len(), 1);
    valve.open();
    let guard = caller.await.unwrap().unwrap();
    // Not at once: the next reply may come as late. And it counts from the sending of its own
    // attempt.
    assert!(start.elapsed() > VALIDITY + ms(1));
    assert_eq!(guard.remaining(), VALIDITY);
    let acquires = world.storage.calls(Op::Acquire);
    assert_eq!(acquires.len(), 2);
    assert_ne!(acquires[0].token(), acquires[1].token());
    assert_eq!(
        world.storage.calls(Op::Release)[0].token(),
        acquires[0].token()
    );
}

#[tokio::test(start_paused = true)]
async fn a_late_grant_is_counted_from_its_sending() {
    let world = World::with(|builder| builder.storage_timeout(ms(9_000)));
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    let caller = tokio::spawn(world.lock().lock(patient()));
    let renews = Valve::shut();
    world.storage.next(Op::Renew, Fault::sent_by(&renews));
    sleep(ms(2_000)).await;
    valve.open();
    let guard = caller.await.unwrap().unwrap();
    assert_eq!(guard.remaining(), VALIDITY - ms(2_000));
    // A renewal was overdue, and sent at once.
    let start = Instant::now();
    world.storage.sent_times(Op::Renew, 1).await;
    assert_eq!(start.elapsed(), Duration::ZERO);
    renews.open();
    settle().await;
    assert_eq!(guard.remaining(), VALIDITY);
}

#[tokio::test(start_paused = true)]
async fn a_caller_whose_reply_was_lost_finds_that_the_lock_is_its_own() {
    let losses = [
        Fault::loses_its_reply(),
        Fault {
            error: Some(StorageErrorKind::Unavailable),
            ..Fault::default()
        },
        Fault {
            error: Some(StorageErrorKind::Timeout),
            ..Fault::default()
        },
    ];
    for loss in losses {
        let world = World::with(|builder| builder.storage_timeout(ms(200)));
        world.storage.next(Op::Acquire, loss);
        let start = Instant::now();
        let guard = world.lock().lock(patient()).await.unwrap();
        assert!(start.elapsed() <= ms(220), "{:?}", start.elapsed());
        let acquires = world.storage.calls(Op::Acquire);
        assert_eq!(acquires.len(), 2);
        assert_eq!(acquires[0].token(), acquires[1].token());
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        world.assert_empty("after unlock");
    }
}

#[tokio::test(start_paused = true)]
async fn the_next_caller_need_not_wait_for_a_lock_whose_reply_was_lost() {
    let world = World::with(|builder| builder.storage_timeout(ms(200)));
    world.storage.next(Op::Acquire, Fault::loses_its_reply());
    let start = Instant::now();
    let first = tokio::spawn(world.lock().try_lock(patient()));
    settle().await;
    let next = tokio::spawn(world.lock().lock(patient()));
    assert_eq!(
        storage_error(first.await.unwrap()),
        StorageErrorKind::Timeout
    );
    let _guard = next.await.unwrap().unwrap();
    assert!(start.elapsed() <= ms(320), "{:?}", start.elapsed());
}

// --- a storage that is away -------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_storage_that_is_away_for_a_while_is_asked_again() {
    let world = World::new();
    world
        .storage
        .always(Op::Acquire, Fault::fails(StorageErrorKind::Unavailable));
    let caller = tokio::spawn(world.lock().lock(patient()));
    sleep(ms(2_000)).await;
    let asked = world.storage.count(Op::Acquire);
    // Backing off up to the interval: neither silent nor a storm.
    assert!((18..=60).contains(&asked), "{asked}");
    world.storage.heal();
    let healed = Instant::now();
    drop(caller.await.unwrap().unwrap());
    assert!(healed.elapsed() <= ms(101), "{:?}", healed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_stays_away_is_an_error_when_the_wait_is_over() {
    for kind in [StorageErrorKind::Unavailable, StorageErrorKind::Timeout] {
        let world = World::new();
        world.storage.always(Op::Acquire, Fault::fails(kind));
        let options = options().interval(ms(100)).retries(3).build().unwrap();
        let start = Instant::now();
        assert_eq!(storage_error(world.lock().lock(options).await), kind);
        assert_eq!(start.elapsed(), ms(300));
        assert!(world.storage.count(Op::Acquire) >= 3);
        settle().await;
        world.assert_empty("after the error");
    }
}

/// What a caller is told that waits for 5 s, asks about every second, is told that somebody holds
/// the lock, three times and the last time at `denied`, and whose storage is away from then on.
async fn told_three_times(denied: Duration) -> Result<LockGuard, LockError> {
    let world = World::with(|builder| builder.storage_timeout(ms(10_000)));
    let _elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    let third = Valve::shut();
    world.storage.next(Op::Acquire, Fault::default());
    world.storage.next(Op::Acquire, Fault::default());
    world.storage.next(Op::Acquire, Fault::answered_by(&third));
    world
        .storage
        .always(Op::Acquire, Fault::fails(StorageErrorKind::Unavailable));
    let options = options().interval(ms(1_000)).retries(5).build().unwrap();
    let start = Instant::now();
    let caller = tokio::spawn(world.lock().lock(options));
    sleep(denied).await;
    assert_eq!(world.storage.count(Op::Acquire), 3);
    third.open();
    let told = caller.await.unwrap();
    assert_eq!(start.elapsed(), ms(5_000));
    // And was away for the rest.
    assert!(world.storage.count(Op::Acquire) > 3);
    told
}

#[tokio::test(start_paused = true)]
async fn one_failure_at_the_end_does_not_hide_that_somebody_holds_the_lock() {
    // It asks again 500 to 1,000 ms later, and that fails.
    let error = not_obtained(told_three_times(ms(4_000)).await);
    assert_eq!(error.waited, ms(5_000));
    assert!(error.holder_ttl.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_storage_away_for_longer_than_an_interval_is_an_error_though_somebody_held_the_lock() {
    let kind = storage_error(told_three_times(ms(3_999)).await);
    assert_eq!(kind, StorageErrorKind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_refuses_is_an_error_at_once() {
    let kinds = [
        StorageErrorKind::Unauthorized,
        StorageErrorKind::WrongType,
        StorageErrorKind::Rejected,
    ];
    for kind in kinds {
        let world = World::new();
        world.storage.always(Op::Acquire, Fault::fails(kind));
        let start = Instant::now();
        let mut callers = JoinSet::new();
        for _ in 0..3 {
            callers.spawn(world.lock().lock(patient()));
        }
        while let Some(caller) = callers.join_next().await {
            assert_eq!(storage_error(caller.unwrap()), kind);
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(world.storage.count(Op::Acquire), 3);
        world.assert_empty("after the errors");
    }
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_never_answers_keeps_no_caller_longer_than_its_own_budget() {
    for (retries, fault) in [
        (5, Fault::hangs()),
        (25, Fault::hangs()),
        (5, Fault::loses_its_reply()),
        (25, Fault::loses_its_reply()),
    ] {
        let world = World::new();
        world.storage.always(Op::Acquire, fault);
        let options = options().retries(retries).build().unwrap();
        let start = Instant::now();
        // The second is behind the first all the time, and has the same budget.
        let second = tokio::spawn(world.lock().lock(options));
        let kind = storage_error(world.lock().lock(options).await);
        assert_eq!(kind, StorageErrorKind::Timeout);
        second.await.unwrap().unwrap_err();
        assert_eq!(start.elapsed(), ms(100) * retries);
        sleep(ms(1_100)).await;
        world.assert_empty("when what hangs was given up");
    }
}

#[tokio::test(start_paused = true)]
async fn the_storage_timeout_bounds_try_lock() {
    for fault in [Fault::hangs(), Fault::loses_its_reply()] {
        let world = World::with(|builder| builder.storage_timeout(ms(150)));
        world.storage.always(Op::Acquire, fault);
        let start = Instant::now();
        let kind = storage_error(world.lock().try_lock(patient()).await);
        assert_eq!(
            (kind, start.elapsed()),
            (StorageErrorKind::Timeout, ms(150))
        );
        settle().await;
        world.assert_empty("after try_lock");
    }
}

#[tokio::test(start_paused = true)]
async fn try_lock_does_not_wait_out_the_pause_of_a_caller_that_has_gone() {
    let world = World::new();
    let _elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    // Asks, and goes before the answer, which will be "held".
    let slow = LockOptions::builder()
        .interval(ms(60_000))
        .retries(10)
        .build()
        .unwrap();
    assert!(world.lock().lock(slow).now_or_never().is_none());

    let start = Instant::now();
    let caller = tokio::spawn(world.lock().try_lock(patient()));
    sleep(ms(100)).await;
    valve.open();
    not_obtained(caller.await.unwrap());
    assert!(
        start.elapsed() <= ms(1_100),
        "try_lock took {:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_release_that_fails_is_tried_again_until_it_succeeds() {
    let failures = [
        Fault::fails(StorageErrorKind::Unavailable),
        Fault::fails(StorageErrorKind::Timeout),
        Fault::hangs(),
    ];
    for failure in failures {
        let world = World::with(|builder| builder.storage_timeout(ms(200)));
        for _ in 0..4 {
            world.storage.next(Op::Release, failure.clone());
        }
        let guard = world.lock().lock(patient()).await.unwrap();
        let expected = failure.error.unwrap_or(StorageErrorKind::Timeout);
        assert_eq!(guard.unlock().await.unwrap_err().kind(), expected);
        assert_eq!(world.factory.keys(), 1);
        sleep(ms(1_200)).await;
        assert_eq!(world.storage.count(Op::Release), 5);
        world.assert_empty("long before the ttl is over");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_cannot_be_carried_out_is_left_to_the_ttl() {
    let world = World::new();
    world
        .storage
        .always(Op::Release, Fault::fails(StorageErrorKind::Unavailable));
    drop(world.lock().lock(patient()).await.unwrap());
    sleep(ms(2_900)).await;
    assert_eq!(world.factory.keys(), 1);
    sleep(ms(1_200)).await;
    world.assert_empty("after the ttl");
    let released = world.storage.count(Op::Release);
    sleep(ms(10_000)).await;
    assert_eq!(world.storage.count(Op::Release), released);

    // One that is refused is not tried again.
    world
        .storage
        .always(Op::Release, Fault::fails(StorageErrorKind::Unauthorized));
    drop(world.lock().lock(patient()).await.unwrap());
    settle().await;
    assert_eq!(world.storage.count(Op::Release), released + 1);
    assert_eq!(world.factory.keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_next_caller_does_not_wait_for_the_ttl_while_a_release_is_on_its_way() {
    let world = World::new();
    let valve = Valve::shut();
    world.storage.next(Op::Release, Fault::sent_by(&valve));
    drop(world.lock().lock(patient()).await.unwrap());
    let slow = LockOptions::builder()
        .ttl(TTL)
        .interval(ms(60_000))
        .build()
        .unwrap();
    let next = tokio::spawn(world.lock().lock(slow));
    sleep(ms(50)).await;
    assert_eq!(world.storage.count(Op::Acquire), 2);
    let start = Instant::now();
    valve.open();
    drop(next.await.unwrap().unwrap());
    assert_eq!(start.elapsed(), Duration::ZERO);
}

// --- shutting down ----------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn drain_refuses_new_callers_and_those_that_wait_and_lets_holders_finish() {
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    let waiter = tokio::spawn(world.lock().lock(patient()));
    let _elsewhere = world.lock_elsewhere();
    let other = factory_over(&world.memory).create_lock("other").unwrap();
    let _other = other.lock(patient()).await.unwrap();
    let asking = tokio::spawn(world.factory.create_lock("other").unwrap().lock(patient()));
    settle().await;

    let factory = world.factory.clone();
    let start = Instant::now();
    let drain = tokio::spawn(async move { factory.drain(ms(2_000)).await });
    settle().await;
    for refused in [waiter.await.unwrap(), asking.await.unwrap()] {
        assert!(matches!(refused, Err(LockError::Draining)), "{refused:?}");
    }
    for new in ["key", "new"].map(|key| world.factory.create_lock(key).unwrap()) {
        let refused = [new.lock(patient()).await, new.try_lock(patient()).await];
        assert!(
            refused
                .iter()
                .all(|r| matches!(r, Err(LockError::Draining))),
            "{refused:?}"
        );
    }
    assert_eq!(start.elapsed(), Duration::ZERO);

    sleep(ms(1_500)).await;
    assert!(guard.is_held() && !drain.is_finished());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(drain.await.unwrap(), 0);
    assert_eq!(start.elapsed(), ms(1_500));
    assert_eq!((world.factory.keys(), world.factory.waiters()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn drain_of_an_idle_factory_is_done_at_once() {
    let world = World::new();
    assert_eq!(world.factory.drain(ms(5_000)).now_or_never(), Some(0));
}

#[tokio::test(start_paused = true)]
async fn drain_waits_for_releases_on_their_way() {
    let world = World::new();
    let valve = Valve::shut();
    world.storage.next(Op::Release, Fault::sent_by(&valve));
    drop(world.lock().lock(patient()).await.unwrap());
    let factory = world.factory.clone();
    let drain = tokio::spawn(async move { factory.drain(ms(5_000)).await });
    sleep(ms(500)).await;
    assert!(!drain.is_finished());
    valve.open();
    assert_eq!(drain.await.unwrap(), 0);
    assert!(world.memory.is_empty());
}

#[tokio::test(start_paused = true)]
async fn drain_takes_the_lock_from_holders_that_do_not_finish_and_counts_those_that_do_not_react() {
    let world = World::with(|builder| builder.storage_timeout(ms(700)));
    let lock = |key: &str| world.factory.create_lock(key).unwrap().lock(patient());
    let deaf = [lock("a").await.unwrap(), lock("b").await.unwrap()];
    let reacts = lock("c").await.unwrap();
    let reacts = tokio::spawn(async move {
        let reason = reacts.lost().await;
        (reason, reacts.is_held(), reacts.unlock().await.unwrap())
    });
    let start = Instant::now();
    assert_eq!(world.factory.drain(ms(2_000)).await, 2);
    assert_eq!(start.elapsed(), ms(2_700));
    assert_eq!(
        reacts.await.unwrap(),
        (LossReason::Draining, false, Unlocked::Lost)
    );
    assert_eq!(world.memory.len(), 2);
    for guard in deaf {
        assert!(!guard.is_held());
        assert_eq!(guard.lost().await, LossReason::Draining);
        drop(guard);
    }
    settle().await;
    world.assert_empty("after the deaf have gone");
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_is_dropped_leaves_the_factory_closed() {
    let world = World::new();
    let guard = world.lock().lock(patient()).await.unwrap();
    assert!(
        timeout(ms(10), world.factory.drain(ms(1_000)))
            .await
            .is_err()
    );
    assert!(matches!(
        world.lock().lock(patient()).await,
        Err(LockError::Draining)
    ));
    assert!(guard.is_held());
    assert_eq!(world.factory.drain(Duration::ZERO).await, 1);
    drop(guard);
    assert_eq!(world.factory.drain(Duration::ZERO).await, 0);
}

// --- runtimes, threads, panics ----------------------------------------------------------------------------------------

fn one_thread() -> Runtime {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

fn many_threads() -> Runtime {
    let mut builder = runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// Watches a lock for a while that is longer than its ttl twice over.
async fn assert_kept(guard: &LockGuard) {
    let lost = timeout(ms(2_100), guard.lost()).await;
    assert!(lost.is_err() && guard.is_held(), "{lost:?}, {guard:?}");
}

const RUNTIMES: [fn() -> Runtime; 2] = [one_thread, many_threads];

/// For tests on the real clock.
fn short() -> LockOptions {
    LockOptions::builder()
        .ttl(ms(1_000))
        .interval(ms(20))
        .retries(250)
        .build()
        .unwrap()
}

#[test]
fn a_guard_that_outlives_its_runtime_can_be_dropped_and_the_factory_goes_on_in_another() {
    for new_runtime in RUNTIMES {
        let memory = MemoryStorage::new();
        let factory = LockFactory::new(memory.clone());
        let lock = factory.create_lock("key").unwrap();
        let runtime = new_runtime();
        let guard = runtime.block_on(lock.lock(short())).unwrap();
        runtime.block_on(async {
            let waiting = tokio::spawn(lock.lock(short()));
            while factory.waiters() == 0 {
                yield_now().await;
            }
            drop(waiting);
        });
        drop(runtime);
        assert_eq!((factory.keys(), factory.waiters()), (1, 0));
        drop(guard);
        assert_eq!(factory.keys(), 0);

        // Nobody could release it, so it is there when its ttl is over.
        let runtime = new_runtime();
        let guard = runtime.block_on(lock.lock(short())).unwrap();
        // And the new runtime renews and releases.
        runtime.block_on(async {
            assert_kept(&guard).await;
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        });
        assert!(memory.is_empty());
    }
}

/// Ends a runtime whose tasks hold, wait and ask. `releases` is what becomes of the releases.
fn end_a_runtime_in_use(new_runtime: fn() -> Runtime, releases: Fault) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let factory = LockFactory::new(storage.clone());
    let lock = {
        let factory = factory.clone();
        move |key: &str| factory.create_lock(key).unwrap().lock(short())
    };
    ends({
        let (storage, factory, lock) = (storage.clone(), factory.clone(), lock.clone());
        move || {
            let runtime = new_runtime();
            runtime.block_on(async {
                // The background task is older than the tasks below, and is shut down before some
                // of them.
                drop(lock("first").await.unwrap());
                storage.always(Op::Release, releases);
                for key in ["a", "b", "c", "d", "e"].repeat(3) {
                    let lock = lock(key);
                    tokio::spawn(async move {
                        let _guard = lock.await;
                        std::future::pending::<()>().await;
                    });
                }
                while (factory.keys(), factory.waiters()) != (5, 10) {
                    yield_now().await;
                }
                let asked = storage.count(Op::Acquire);
                storage.always(Op::Acquire, Fault::loses_its_reply());
                for key in ["f", "g"] {
                    tokio::spawn(lock(key));
                }
                storage.sent_times(Op::Acquire, asked + 2).await;
            });
            drop(runtime);
        }
    });
    assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    storage.heal();
    new_runtime().block_on(async {
        for key in ["a", "e", "f"] {
            assert_eq!(
                lock(key).await.unwrap().unlock().await.unwrap(),
                Unlocked::Held
            );
        }
    });
}

#[test]
fn a_runtime_can_end_while_its_tasks_hold_wait_and_ask() {
    for new_runtime in RUNTIMES {
        end_a_runtime_in_use(new_runtime, Fault::default());
    }
}

#[test]
fn a_runtime_can_end_while_its_tasks_hold_wait_and_ask_and_the_storage_is_slow() {
    // Not in one hanging test: each runtime has its own chance to fail.
    for new_runtime in RUNTIMES {
        end_a_runtime_in_use(new_runtime, Fault::slow());
        end_a_runtime_in_use(new_runtime, Fault::hangs());
    }
}

#[test]
fn a_guard_left_behind_by_a_dead_runtime_blocks_its_key_for_its_ttl_at_most() {
    let first = one_thread();
    let factory = LockFactory::new(MemoryStorage::new());
    let lock = factory.create_lock("key").unwrap();
    let left = first.block_on(lock.lock(short())).unwrap();
    drop(first);
    // There is no event to wait for: nobody is there to renew it, nor to see it expire.
    while left.is_held() {
        thread::sleep(left.remaining());
    }
    // Five seconds, for a lock that is over.
    let next = one_thread().block_on(lock.lock(short()));
    assert!(next.is_ok(), "{next:?}");
}

#[test]
fn a_loss_is_told_also_if_the_background_task_has_ended_with_its_runtime() {
    let first = one_thread();
    let factory = LockFactory::new(MemoryStorage::new());
    let lock = factory.create_lock("key").unwrap();
    let guard = first.block_on(lock.lock(short())).unwrap();
    one_thread().block_on(async {
        let lost = guard.lost();
        tokio::pin!(lost);
        assert_eq!(lost.as_mut().now_or_never(), None);
        thread::spawn(move || drop(first)).join().unwrap();
        // Nobody renews it from now on.
        let told = timeout(ms(3_000), lost).await;
        assert_eq!(told, Ok(LossReason::Expired));
    });
}

#[test]
fn a_lock_goes_on_being_renewed_when_the_runtime_of_another_caller_ends() {
    let first = one_thread();
    let factory = LockFactory::new(MemoryStorage::new());
    // The background task starts here, and dies with this runtime.
    let other = factory.create_lock("other").unwrap();
    drop(first.block_on(other.lock(short())).unwrap());
    one_thread().block_on(async {
        let guard = factory
            .create_lock("key")
            .unwrap()
            .lock(short())
            .await
            .unwrap();
        thread::spawn(move || drop(first)).join().unwrap();
        // Any caller starts it again, also one whose own lock need not be looked at for long.
        let _other = other.lock(LockOptions::default()).await.unwrap();
        assert_kept(&guard).await;
    });
}

#[test]
fn a_renewal_that_ended_with_its_runtime_is_sent_again() {
    let first = one_thread();
    let storage = FaultyStorage::new(MemoryStorage::new());
    let factory = LockFactory::new(storage.clone());
    let lock = factory.create_lock("key").unwrap();
    let guard = first.block_on(lock.lock(short())).unwrap();
    storage.next(Op::Renew, Fault::hangs());
    first.block_on(storage.sent_times(Op::Renew, 1));
    drop(first);
    one_thread().block_on(async {
        // Starts the background task again, which finds a renewal that nobody will answer.
        let other = factory.create_lock("other").unwrap();
        let _other = other.lock(short()).await.unwrap();
        assert_kept(&guard).await;
    });
}

#[test]
fn a_release_begun_on_a_runtime_that_ends_does_not_stop_the_background_task() {
    let (first, second) = (one_thread(), many_threads());
    let storage = FaultyStorage::new(MemoryStorage::new());
    let factory = LockFactory::new(storage.clone());
    // The background task runs on the second runtime, on a thread of its own.
    let kept = factory.create_lock("kept").unwrap();
    let kept = second.block_on(kept.lock(short())).unwrap();
    storage.next(Op::Release, Fault::hangs());
    first.block_on(async {
        drop(
            factory
                .create_lock("key")
                .unwrap()
                .lock(short())
                .await
                .unwrap(),
        );
    });
    // Once the renewals of the first lock have been seen, the background task has the release too.
    second.block_on(storage.sent_times(Op::Renew, 2));
    drop(first);
    second.block_on(assert_kept(&kept));
}

/// Releases that are not done at once. The last one needs a runtime that is alive and has timers.
fn unfinished_releases() -> [Fault; 3] {
    [
        Fault::fails(StorageErrorKind::Unavailable),
        Fault::hangs(),
        Fault::timed(ms(50)),
    ]
}

/// A lock held by a task of `runtime`, and nothing left over from another test.
fn held_on(runtime: &Runtime, releases: Fault) -> (LockFactory, LockGuard) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.always(Op::Release, releases);
    let factory = LockFactory::new(storage);
    let lock = factory.create_lock("key").unwrap();
    let guard = runtime.block_on(lock.lock(short())).unwrap();
    (factory, guard)
}

fn assert_drop_does_not_panic(guard: LockGuard, when: &str) {
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(guard)));
    assert!(dropped.is_ok(), "dropping a guard panicked: {when}");
}

/// Drops `guard` in a blocking task of `runtime`, after that runtime has ended.
fn drop_in_a_blocking_task_that_outlives(runtime: Runtime, guard: LockGuard, when: &str) {
    let (ended, has_ended) = mpsc::channel::<()>();
    let (result, told) = mpsc::channel();
    runtime.spawn_blocking(move || {
        has_ended.recv().unwrap();
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(guard)));
        result.send(dropped.is_ok()).unwrap();
    });
    // Waits for its threads, of which this one goes on: the others end long before.
    runtime.shutdown_timeout(ms(200));
    ended.send(()).unwrap();
    let dropped = told.recv_timeout(Duration::from_secs(20));
    assert_eq!(dropped, Ok(true), "dropping a guard panicked: {when}");
}

/// A runtime with timers takes the lock that a dropped guard may have left in the storage for its
/// ttl.
fn assert_goes_on(factory: &LockFactory) {
    let lock = factory.create_lock("key").unwrap();
    let next = one_thread().block_on(lock.lock(short()));
    assert!(next.is_ok(), "{next:?}");
}

#[test]
fn an_unlock_polled_outside_of_a_runtime_is_carried_out_by_the_background_task() {
    let runtime = many_threads();
    let (_factory, guard) = held_on(&runtime, Fault::timed(ms(50)));
    let mut unlock = tokio_test::task::spawn(guard.unlock());
    let unlocked = loop {
        match unlock.poll() {
            Poll::Ready(unlocked) => break unlocked,
            Poll::Pending => thread::yield_now(),
        }
    };
    assert_eq!(unlocked.unwrap(), Unlocked::Held);
}

#[test]
fn a_guard_dropped_in_a_blocking_task_that_outlives_its_runtime_does_not_panic() {
    for new_runtime in RUNTIMES {
        for releases in unfinished_releases() {
            let runtime = new_runtime();
            let (factory, guard) = held_on(&runtime, releases);
            drop_in_a_blocking_task_that_outlives(runtime, guard, "the background task has ended");
            assert_goes_on(&factory);
        }
    }
}

#[test]
fn a_guard_dropped_in_a_blocking_task_of_an_ended_runtime_does_not_panic_while_another_runtime_goes_on()
 {
    for new_runtime in RUNTIMES {
        for releases in unfinished_releases() {
            // The background task runs here.
            let alive = many_threads();
            let (factory, guard) = held_on(&alive, releases);
            drop_in_a_blocking_task_that_outlives(new_runtime(), guard, "it runs elsewhere");
            assert_goes_on(&factory);
        }
    }
}

#[test]
fn a_guard_dropped_within_an_ended_runtime_does_not_panic() {
    for new_runtime in RUNTIMES {
        for releases in unfinished_releases() {
            let runtime = new_runtime();
            let (factory, guard) = held_on(&runtime, releases.clone());
            let handle = runtime.handle().clone();
            drop(runtime);
            {
                let _within = handle.enter();
                assert_drop_does_not_panic(guard, "the background task has ended");
            }
            assert_goes_on(&factory);

            // The same while the background task runs in another runtime.
            let alive = many_threads();
            let (factory, guard) = held_on(&alive, releases);
            {
                let _within = handle.enter();
                assert_drop_does_not_panic(guard, "the background task runs elsewhere");
            }
            assert_goes_on(&factory);
        }
    }
}

#[test]
fn a_guard_dropped_in_a_runtime_without_timers_does_not_panic() {
    for releases in unfinished_releases() {
        let without = runtime::Builder::new_current_thread().build().unwrap();
        let runtime = many_threads();
        let (factory, guard) = held_on(&runtime, releases.clone());
        without.block_on(async { assert_drop_does_not_panic(guard, "another one has them") });
        assert_goes_on(&factory);

        // Also where nobody else is there to release it.
        let runtime = many_threads();
        let (factory, guard) = held_on(&runtime, releases);
        drop(runtime);
        without.block_on(async {
            assert_drop_does_not_panic(guard, "no other one is left");
            settle().await;
        });
        assert_goes_on(&factory);
    }
}

type Response = http::Response<()>;

/// A request under the layer's watch that waits for nothing, on `second`; the background task is on
/// `first`. It is answered only if its lock is lost.
fn request_on(
    second: &Runtime,
    first: &Runtime,
    factory: &LockFactory,
) -> JoinHandle<Result<Response, Infallible>> {
    let other = factory.create_lock("other").unwrap();
    drop(first.block_on(other.lock(short())).unwrap());
    let layer =
        DistributedLockLayer::new(factory.clone(), |_: &http::Request<()>| LockKey::new("key"));
    let service = layer.options(short()).layer(service_fn(|_| pending()));
    let request = second.spawn(service.oneshot(http::Request::new(())));
    // Until the handler runs: the caller has left the queue and there is nothing else that it waits
    // for.
    second.block_on(async {
        while (factory.keys(), factory.waiters()) != (1, 0) {
            yield_now().await;
        }
        settle().await;
    });
    request
}

#[test]
fn a_request_goes_on_being_renewed_when_the_runtime_of_the_background_task_ends() {
    let (first, second) = (one_thread(), one_thread());
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    let factory = LockFactory::new(storage.clone());
    let request = request_on(&second, &first, &factory);
    drop(first);
    second.block_on(async {
        // Three times per ttl; nobody calls meanwhile.
        let renewed = storage.sent_times(Op::Renew, storage.count(Op::Renew) + 6);
        let renewed = timeout(Duration::from_secs(20), renewed).await;
        assert!(renewed.is_ok(), "nobody renews the lock");
        assert!(!request.is_finished());
        let elsewhere = LockFactory::new(memory.clone()).create_lock("key").unwrap();
        not_obtained(elsewhere.try_lock(short()).await);
    });
}

#[test]
fn a_request_is_told_of_its_loss_when_the_runtime_of_the_background_task_has_ended() {
    let (first, second) = (one_thread(), one_thread());
    let storage = FaultyStorage::new(MemoryStorage::new());
    let factory = LockFactory::new(storage.clone());
    let request = request_on(&second, &first, &factory);
    storage.always(Op::Renew, Fault::fails(StorageErrorKind::Unavailable));
    drop(first);
    second.block_on(async {
        let response = timeout(Duration::from_secs(20), request).await;
        let response = response.expect("it waits for ever").unwrap().unwrap();
        assert!(response.status().is_server_error(), "{response:?}");
        assert!(storage.count(Op::Renew) > 1);
    });
}

#[test]
fn a_guard_dropped_on_a_plain_thread_is_released() {
    for new_runtime in RUNTIMES {
        let factory = LockFactory::new(MemoryStorage::new());
        let lock = factory.create_lock("key").unwrap();
        let runtime = new_runtime();
        let guard = runtime.block_on(lock.lock(patient())).unwrap();
        thread::spawn(move || drop(guard)).join().unwrap();
        runtime.block_on(async {
            let next = timeout(ms(1_500), lock.lock(patient())).await;
            assert!(next.is_ok(), "not released");
        });
    }
}

#[test]
fn a_guard_dropped_on_a_plain_thread_goes_to_the_next_caller() {
    let runtime = Runtime::new().unwrap();
    let storage = FaultyStorage::new(MemoryStorage::new());
    let factory = LockFactory::builder(storage.clone())
        .handoff_limit(64, ms(60_000))
        .fencing(false)
        .build()
        .unwrap();
    let lock = factory.create_lock("key").unwrap();
    let guard = runtime.block_on(lock.lock(patient())).unwrap();
    let next = runtime.spawn(lock.lock(patient()));
    runtime.block_on(async {
        while factory.waiters() == 0 {
            yield_now().await;
        }
    });
    thread::spawn(move || drop(guard)).join().unwrap();
    let next = runtime.block_on(next).unwrap().unwrap();
    assert!(next.is_held());
    assert_eq!(storage.count(Op::Acquire), 1);
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_holder_releases_the_lock() {
    let world = World::new();
    let (lock, (panics, told)) = (world.lock(), oneshot::channel::<()>());
    let holder = tokio::spawn(async move {
        let _guard = lock.lock(patient()).await.unwrap();
        told.await.unwrap();
        std::panic::resume_unwind(Box::new("the holder's panic"));
    });
    settle().await;
    let next = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    panics.send(()).unwrap();
    assert!(holder.await.unwrap_err().is_panic());
    drop(next.await.unwrap().unwrap());
    settle().await;
    world.assert_empty("after the panic");
}

#[tokio::test(start_paused = true)]
async fn the_background_task_ends_with_the_factory() {
    let world = World::new();
    drop(world.lock().lock(patient()).await.unwrap());
    // It has looked around, and sleeps.
    settle().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    assert_eq!(metrics.num_alive_tasks(), 1);
    drop(world.factory);
    settle().await;
    assert_eq!(metrics.num_alive_tasks(), 0);
}

// --- what can be moved where ------------------------------------------------------------------------------------------

#[test]
fn the_types_can_be_moved_and_shared_as_servers_need() {
    fn clone_send_sync<T: Clone + Send + Sync + 'static>() {}
    fn send_sync<T: Send + Sync + 'static>() {}
    fn send<T: Send + 'static>() {}
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}

    clone_send_sync::<LockFactory>();
    clone_send_sync::<LockFactoryBuilder<MemoryStorage>>();
    clone_send_sync::<Lock>();
    clone_send_sync::<LockOptions>();
    clone_send_sync::<MemoryStorage>();
    send::<LockFuture>();
    send_sync::<LockGuard>();
    error::<LockError>();
    error::<NotObtained>();
    error::<TooManyWaiters>();
    error::<StorageError>();
    error::<InvalidKey>();
    error::<InvalidSettings>();
    error::<InvalidOptions>();
    error::<LossReason>();

    // The futures of the guard as well.
    fn futures(guard: LockGuard, factory: LockFactory) -> [Box<dyn Send>; 2] {
        [
            Box::new(guard.unlock()),
            Box::new(async move { factory.drain(ms(1)).await }),
        ]
    }
    let _ = futures;
}
