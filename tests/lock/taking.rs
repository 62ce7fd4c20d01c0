//! Taking a lock and giving it back: who gets it, who waits how long, what is refused.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_lock_can_be_taken_and_given_back() {
    let world = World::new();
    let lock = world.lock();
    assert_eq!(lock.key().as_str(), "key");

    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.key().as_str(), "key");
    assert!(guard.is_held());
    assert_eq!(guard.remaining(), VALIDITY);
    assert_eq!((world.factory.keys(), world.memory.len()), (1, 1));

    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    world.assert_empty("after unlock");

    let guard = lock.try_lock(patient()).await.unwrap();
    drop(guard);
    world.assert_empty("after drop");
}

/// It says of each token that it has no place.
struct Forgetful;

impl LockStorage for Forgetful {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Ok(AcquireReply::Unknown)
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        vec![Ok(RenewReply::NotOurs); requests.len()]
    }

    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        Ok(ReleaseReply::NotOurs)
    }
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_does_not_know_what_it_was_not_asked_before_is_an_error_at_once() {
    let factory = LockFactory::new(Forgetful);
    let lock = factory.create_lock("key").unwrap();
    for refused in [lock.try_lock(patient()).await, lock.lock(patient()).await] {
        assert_eq!(storage_error(refused), StorageErrorKind::Rejected);
    }
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
