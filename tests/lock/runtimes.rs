//! Runtimes that end, threads without one, and panics.

use super::*;

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
        // Its calls need a runtime.
        let factory = LockFactory::new(FaultyStorage::new(memory.clone()));
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

#[test]
fn a_lock_in_memory_is_free_at_once_when_its_guard_is_dropped_outside_of_a_runtime() {
    let memory = MemoryStorage::new();
    let factory = LockFactory::new(memory.clone());
    let lock = factory.create_lock("key").unwrap();
    let runtime = one_thread();
    let guard = runtime.block_on(lock.lock(short())).unwrap();
    drop(runtime);
    drop(guard);
    assert!(memory.is_empty());
    assert_eq!(factory.keys(), 0);
}

/// Panics wherever it is asked to answer at once.
struct Panics(MemoryStorage);

impl LockStorage for Panics {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.0.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }

    fn acquire_at_once(&self, _: &AcquireRequest) -> Option<Result<AcquireReply, StorageError>> {
        panic!("a storage that panics")
    }
}

#[test]
fn a_storage_that_panics_when_it_is_asked_is_unavailable_and_leaves_no_key_behind() {
    one_thread().block_on(async {
        let factory = LockFactory::new(Panics(MemoryStorage::new()));
        let lock = factory.create_lock("key").unwrap();
        let error = lock.try_lock(short()).await.unwrap_err();
        assert!(
            matches!(&error, LockError::Storage(error) if error.kind() == StorageErrorKind::Unavailable),
            "{error:?}"
        );
        while factory.keys() > 0 {
            yield_now().await;
        }
    });
}

#[test]
fn who_waits_is_woken_when_the_runtime_of_the_background_task_ends_and_gives_up_in_time_on_another()
{
    for new_runtime in RUNTIMES {
        let factory = LockFactory::new(MemoryStorage::new());
        let lock = factory.create_lock("key").unwrap();
        let runtime = new_runtime();
        let guard = runtime.block_on(lock.lock(short())).unwrap();
        let mut waiting = tokio_test::task::spawn(lock.lock(short().within(ms(100))));
        runtime.block_on(async { assert!(waiting.poll().is_pending()) });
        drop(runtime);
        assert!(waiting.is_woken());

        let other = new_runtime();
        let waited = other.block_on(async { timeout(ms(900), waiting).await });
        let error = waited.unwrap().unwrap_err();
        assert!(matches!(error, LockError::NotObtained(_)), "{error:?}");
        drop(guard);
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

/// A factory whose background task is on a runtime that nobody drives any more.
fn left_alone(idle: &Runtime) -> (FaultyStorage, LockFactory) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let builder = LockFactory::builder(storage.clone()).storage_timeout(ms(200));
    let factory = builder.build().unwrap();
    let first = factory.create_lock("first").unwrap();
    let first = idle.block_on(first.lock(short())).unwrap();
    assert_eq!(idle.block_on(first.unlock()).unwrap(), Unlocked::Held);
    (storage, factory)
}

#[test]
fn a_call_ends_in_time_though_the_background_task_stands_still() {
    let idle = one_thread();
    let (storage, factory) = left_alone(&idle);
    ends(move || {
        one_thread().block_on(async {
            let lock = factory.create_lock("key").unwrap();
            let guard = lock.lock(short()).await.unwrap();
            storage.always(Op::Release, Fault::hangs());
            let kind = guard.unlock().await.unwrap_err().kind();
            assert_eq!(kind, StorageErrorKind::Timeout);

            storage.always(Op::Acquire, Fault::hangs());
            let other = factory.create_lock("other").unwrap();
            let kind = storage_error(other.try_lock(short()).await);
            assert_eq!(kind, StorageErrorKind::Timeout);
        });
    });
    drop(idle);
}

/// A thread that has entered a runtime, and waits for it from outside.
#[test]
fn a_call_that_outlives_the_background_task_ends() {
    let runtime = one_thread();
    let (storage, factory) = left_alone(&runtime);
    let lock = factory.create_lock("key").unwrap();
    let guard = runtime.block_on(lock.lock(short())).unwrap();
    storage.always(Op::Release, Fault::hangs());
    let handle = runtime.handle().clone();
    let (ended, has_ended) = mpsc::channel();
    thread::spawn(move || {
        let _within = handle.enter();
        // It may panic, for want of a runtime that has timers.
        let mut unlock = tokio_test::task::spawn(guard.unlock());
        let unlocked = catch_unwind(AssertUnwindSafe(|| {
            loop {
                match unlock.poll() {
                    Poll::Ready(unlocked) => break unlocked.is_ok(),
                    Poll::Pending => {
                        while !unlock.is_woken() {
                            thread::yield_now();
                        }
                    }
                }
            }
        }));
        ended.send(unlocked.unwrap_or(false)).unwrap();
    });
    // The first was that of another lock.
    while storage.count(Op::Release) < 2 {
        thread::yield_now();
    }
    drop(runtime);
    let unlocked = has_ended.recv_timeout(Duration::from_secs(20));
    assert_eq!(unlocked, Ok(false), "it hangs");
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
fn an_unlock_in_a_runtime_without_timers_is_carried_out_by_the_background_task() {
    for releases in unfinished_releases() {
        let runtime = many_threads();
        let (factory, guard) = held_on(&runtime, releases);
        let without = runtime::Builder::new_current_thread().build().unwrap();
        let unlock = AssertUnwindSafe(|| without.block_on(guard.unlock()));
        // What it says depends on the storage, which may need timers itself.
        let _ = catch_unwind(unlock).expect("it does not panic");
        assert_goes_on(&factory);
    }
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

/// Locks that all is granted of; it notes where its releases are polled.
#[derive(Clone, Default)]
struct Anywhere {
    outside: Arc<AtomicBool>,
}

impl LockStorage for Anywhere {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Ok(AcquireReply::granted())
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        vec![Ok(RenewReply::Renewed); requests.len()]
    }

    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let is_outside = runtime::Handle::try_current().is_err();
        self.outside.fetch_or(is_outside, SeqCst);
        Ok(ReleaseReply::Released)
    }
}

/// A task's output that is dropped with its handle believes that it is still in that task.
#[test]
fn a_release_is_polled_in_a_runtime_only() {
    let runtime = many_threads();
    let storage = Anywhere::default();
    let factory = LockFactory::new(storage.clone());
    let lock = factory.create_lock("key").unwrap();
    let (done, is_done) = mpsc::channel::<()>();
    let task = runtime.spawn(async move {
        let _done = done;
        lock.lock(patient()).await.unwrap()
    });
    assert!(is_done.recv().is_err());
    while !task.is_finished() {
        thread::yield_now();
    }
    drop(task);
    assert_eq!(runtime.block_on(factory.drain(ms(10_000))), 0);
    assert!(!storage.outside.load(SeqCst));
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
