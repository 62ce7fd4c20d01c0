//! Renewal, deadlines, and what a holder is told of a loss.

use super::*;

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

/// Or it would never be, while many have it for a moment each.
#[tokio::test(start_paused = true)]
async fn a_lock_that_came_by_a_message_is_renewed_once_though_no_turn_lasts_until_the_renewal() {
    let memory = MemoryStorage::with_clock(Clock::tokio());
    let storage = FaultyStorage::listening(memory.clone());
    // With tokens, the first lease would have one for a single turn.
    let world = World::over(storage, memory, |builder| builder.fencing(false));
    let held = world.lock_elsewhere().lock(patient()).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let lock = world.lock();
            tokio::spawn(async move {
                for _ in 0..50 {
                    drop(lock.lock(patient()).await.unwrap());
                }
            })
        })
        .collect();
    world.storage.sent_times(Op::Acquire, 1).await;
    settle().await;
    drop(held);
    for task in tasks {
        task.await.unwrap();
    }
    let [renewal] = &world.storage.calls(Op::Renew)[..] else {
        panic!("{:?}", world.storage.calls(Op::Renew));
    };
    let calls = world.storage.calls(Op::Acquire);
    assert_eq!(renewal.token(), calls.last().unwrap().token());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_came_by_a_message_and_was_given_back_at_once_is_not_renewed() {
    let world = World::listening();
    let held = world.lock_elsewhere().lock(patient()).await.unwrap();
    let lock = world.lock();
    let waiting = tokio::spawn(async move { drop(lock.lock(patient()).await.unwrap()) });
    world.storage.sent_times(Op::Acquire, 1).await;
    settle().await;
    drop(held);
    waiting.await.unwrap();
    settle().await;
    assert_eq!(world.storage.count(Op::Renew), 0);
    world.assert_empty("after the turn");
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
