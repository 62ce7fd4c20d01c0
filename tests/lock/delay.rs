//! Locks that stay locked for a while after their holder has lost them.

use super::*;

const DELAY: Duration = ms(5_000);

fn world() -> World {
    World::with(|builder| builder.lock_delay(DELAY).storage_timeout(ms(300)))
}

/// Waits long enough for any of these, asking often; with the same delay.
fn wait_elsewhere(world: &World) -> JoinHandle<Instant> {
    let builder = LockFactory::builder(world.memory.clone()).clock(Clock::tokio());
    let lock = builder
        .lock_delay(DELAY)
        .build()
        .unwrap()
        .create_lock("key");
    let long = options().interval(ms(10)).retries(10_000).build().unwrap();
    let lock = lock.unwrap().lock(long);
    tokio::spawn(async move {
        let guard = lock.await.unwrap();
        assert!(guard.remaining() <= VALIDITY);
        let entered = Instant::now();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        entered
    })
}

#[tokio::test(start_paused = true)]
async fn the_storage_keeps_a_lock_for_longer_than_its_holder_counts_on_it() {
    let world = world();
    let guard = world.lock().lock(patient()).await.unwrap();
    for _ in 0..100 {
        assert!(guard.remaining() <= VALIDITY);
        let refused = not_obtained(world.lock_elsewhere().try_lock(patient()).await);
        // Renewed every third of the ttl, it has at least the other two before it, and the delay.
        let left = refused.holder_ttl.unwrap();
        assert!(left >= ms(1_990) + DELAY && left <= TTL + DELAY, "{left:?}");
        sleep(ms(100)).await;
    }
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_is_done_makes_room_at_once() {
    let world = world();
    let start = Instant::now();
    for wanted in [false, true] {
        let guard = world.lock().lock(patient()).await.unwrap();
        let waiting = wanted.then(|| wait_elsewhere(&world));
        settle().await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        if let Some(waiting) = waiting {
            waiting.await.unwrap();
        }
        drop(world.lock_elsewhere().try_lock(patient()).await.unwrap());
        settle().await;
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    world.assert_empty("at the end");
}

/// Nobody enters for the delay after a holder heard that its lock is lost, and then somebody does;
/// `waiters` of them wait here, and one elsewhere.
async fn assert_delayed(world: &World, guard: LockGuard, reason: LossReason, waiters: usize) {
    let here = (0..waiters).map(|_| {
        let long = options().retries(1_000).build().unwrap();
        let lock = world.lock().lock(long);
        tokio::spawn(async move {
            drop(lock.await.unwrap());
            Instant::now()
        })
    });
    let here: Vec<_> = here.collect();
    let elsewhere = wait_elsewhere(world);
    assert_eq!(guard.lost().await, reason);
    let lost = Instant::now();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    settle().await;
    not_obtained(world.lock_elsewhere().try_lock(patient()).await);
    for waiter in here.into_iter().chain([elsewhere]) {
        let after = waiter.await.unwrap() - lost;
        assert!(after >= DELAY, "{after:?} after the loss");
        assert!(after < DELAY + TTL + ms(1_000), "{after:?} after the loss");
    }
    settle().await;
    world.assert_empty("at the end");
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_lost_stays_locked_for_the_delay() {
    for waiters in [0, 2] {
        for failure in [
            Fault::fails(StorageErrorKind::Unavailable),
            Fault::hangs(),
            // Renewed, but nobody here can know.
            Fault::loses_its_reply(),
        ] {
            let world = world();
            world.storage.always(Op::Renew, failure);
            let guard = world.lock().lock(patient()).await.unwrap();
            assert_delayed(&world, guard, LossReason::Expired, waiters).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_held_for_too_long_stays_locked_for_the_delay() {
    for waiters in [0, 2] {
        let world = world();
        let short = options().max_hold(ms(4_321)).build().unwrap();
        let guard = world.lock().lock(short).await.unwrap();
        assert_delayed(&world, guard, LossReason::MaxHold, waiters).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_succeeds_too_late_does_not_cut_the_delay_short() {
    let world = world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.always(Op::Renew, fails);
    let guard = world.lock().lock(patient()).await.unwrap();
    sleep(ms(2_600)).await;
    // The last one is carried out at once, and its reply is there when the lease is over.
    let late = Fault {
        reply: Gate::Timer(ms(250)),
        ..Fault::default()
    };
    world.storage.always(Op::Renew, late);
    assert_eq!(guard.lost().await, LossReason::Expired);
    let lost = Instant::now();
    // The reply comes before the holder has let go.
    sleep(ms(200)).await;
    not_obtained(world.lock_elsewhere().try_lock(patient()).await);
    drop(guard);
    let entered = wait_elsewhere(&world).await.unwrap();
    assert!(entered - lost >= DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_shutdown_takes_from_its_holder_stays_locked_for_the_delay() {
    let world = world();
    let guard = world.lock().lock(patient()).await.unwrap();
    let draining = {
        let factory = world.factory.clone();
        tokio::spawn(async move { factory.drain(ms(1_000)).await })
    };
    assert_eq!(guard.lost().await, LossReason::Draining);
    let lost = Instant::now();
    drop(guard);
    // Nothing is left that this process would have to do.
    assert_eq!(draining.await.unwrap(), 0);
    let entered = wait_elsewhere(&world).await.unwrap();
    assert!(entered - lost >= DELAY);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_used_is_not_delayed() {
    let world = world();
    // The caller goes while it asks, and the lock comes for nobody.
    let slow = Fault {
        reply: Gate::Timer(ms(100)),
        ..Fault::default()
    };
    world.storage.next(Op::Acquire, slow);
    assert!(timeout(ms(50), world.lock().lock(patient())).await.is_err());
    sleep(ms(100)).await;
    drop(world.lock_elsewhere().try_lock(patient()).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn what_its_last_holder_was_done_with_is_not_delayed() {
    // A lease without tokens serves one holder after the other.
    let world = World::with(|builder| builder.lock_delay(DELAY).fencing(false));
    let guard = world.lock().lock(patient()).await.unwrap();
    // It is next, and is not polled when its turn comes.
    let mut idle = Box::pin(world.lock().lock(patient()));
    assert!(idle.as_mut().now_or_never().is_none());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    not_obtained(world.lock_elsewhere().try_lock(patient()).await);
    sleep(VALIDITY + ms(10)).await;
    drop(world.lock_elsewhere().try_lock(patient()).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn without_a_delay_a_lost_lock_is_free_when_its_holder_gives_it_back() {
    let world = World::new();
    let short = options().max_hold(ms(1_000)).build().unwrap();
    let guard = world.lock().lock(short).await.unwrap();
    assert_eq!(guard.lost().await, LossReason::MaxHold);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    drop(world.lock_elsewhere().try_lock(patient()).await.unwrap());
}

#[test]
fn a_delay_of_more_than_a_day_is_refused() {
    let build = |delay| {
        let builder = LockFactory::builder(MemoryStorage::new());
        builder.lock_delay(delay).build().map(|_| ())
    };
    assert_eq!(build(LockOptions::MAX_DURATION), Ok(()));
    let more = LockOptions::MAX_DURATION + ms(1);
    assert_eq!(build(more), Err(InvalidSettings::LockDelay));
}
