//! A storage that does not answer, refuses, or is late.

use http::{Request, Response};
use tower_distributed_lock::middleware::OnStorageFailure;

use super::*;

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
    // The pauses are chosen by chance, and the longest would end with the wait: without a fourth attempt.
    fastrand::seed(1);
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
        let kind = storage_error(second.await.unwrap());
        assert_eq!(kind, StorageErrorKind::Timeout);
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

/// The next attempt fails after 200 ms.
fn fails_late() -> Fault {
    Fault {
        error: Some(StorageErrorKind::Unavailable),
        not_executed: true,
        ..Fault::timed(ms(200))
    }
}

#[tokio::test(start_paused = true)]
async fn callers_that_do_not_wait_share_the_failure_of_an_attempt_that_they_find_under_way() {
    let world = World::new();
    world.storage.always(Op::Acquire, fails_late());
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..6 {
        callers.spawn(world.lock().try_lock(patient()));
    }
    while let Some(result) = callers.join_next().await {
        let kind = storage_error(result.unwrap());
        assert_eq!(
            (kind, start.elapsed()),
            (StorageErrorKind::Unavailable, ms(200))
        );
    }
    assert_eq!(world.storage.count(Op::Acquire), 1);
    settle().await;
    sleep(TTL).await;
    world.assert_empty("after they were told");
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_fails_open_serves_all_requests_of_a_key_while_the_storage_is_away() {
    for retries in [0, 3] {
        let world = World::new();
        world.storage.always(Op::Acquire, fails_late());
        let layer = DistributedLockLayer::new(world.factory.clone(), |_: &Request<()>| "key")
            .options(options().retries(retries).build().unwrap())
            .on_storage_failure(OnStorageFailure::FailOpen);
        let mut requests = JoinSet::new();
        for _ in 0..6 {
            let service = layer.layer(service_fn(async |_: Request<()>| {
                Ok::<_, Infallible>(Response::new(()))
            }));
            requests.spawn(service.oneshot(Request::new(())));
        }
        while let Some(response) = requests.join_next().await {
            assert_eq!(response.unwrap().unwrap().status(), 200, "{retries}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_wait_is_told_what_the_attempt_under_way_brought_another() {
    let world = World::new();
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    let first = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    let hurried = tokio::spawn(world.lock().try_lock(patient()));
    settle().await;
    assert!(!hurried.is_finished(), "nobody is known to have the lock");
    valve.open();
    let guard = first.await.unwrap().unwrap();
    let refused = not_obtained(hurried.await.unwrap());
    assert_eq!(refused.holder_ttl, Some(VALIDITY));
    assert_eq!(world.storage.count(Op::Acquire), 1);
    drop(guard);
    world.assert_empty("after unlock");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_wait_does_not_wait_with_those_who_do() {
    let world = World::new();
    let elsewhere = world.lock_elsewhere().lock(patient()).await.unwrap();
    world.storage.next(Op::Acquire, Fault::timed(ms(50)));
    let start = Instant::now();
    let patient_one = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    not_obtained(world.lock().try_lock(patient()).await);
    assert_eq!(start.elapsed(), ms(50));
    // Known to be held, whether the one that waits is asking just now or not.
    not_obtained(world.lock().try_lock(patient()).await);
    assert_eq!(start.elapsed(), ms(50));
    drop(elsewhere);
    drop(patient_one.await.unwrap().unwrap());

    world.storage.always(Op::Acquire, fails_late());
    let start = Instant::now();
    let patient_one = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    storage_error(world.lock().try_lock(patient()).await);
    assert_eq!(start.elapsed(), ms(200));
    // The one that waits has asked, and will ask again.
    storage_error(world.lock().try_lock(patient()).await);
    assert_eq!(start.elapsed(), ms(200));
    patient_one.abort();
}

#[tokio::test(start_paused = true)]
async fn who_does_not_wait_has_the_lock_that_came_for_a_caller_that_has_gone() {
    let world = World::new();
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    let gone = tokio::spawn(world.lock().lock(patient()));
    settle().await;
    let hurried = [0, 1].map(|_| tokio::spawn(world.lock().try_lock(patient())));
    settle().await;
    gone.abort();
    settle().await;
    valve.open();
    let [first, second] = hurried;
    let guard = first.await.unwrap().unwrap();
    not_obtained(second.await.unwrap());
    assert_eq!(world.storage.count(Op::Acquire), 1);
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn the_storage_timeout_bounds_who_does_not_wait_behind_a_caller_that_is_not_polled() {
    let world = World::with(|builder| builder.storage_timeout(ms(150)));
    world.storage.always(Op::Acquire, Fault::hangs());
    let mut stuck = Box::pin(world.lock().lock(patient()));
    assert!(stuck.as_mut().now_or_never().is_none());
    let start = Instant::now();
    let kind = storage_error(world.lock().try_lock(patient()).await);
    assert_eq!(
        (kind, start.elapsed()),
        (StorageErrorKind::Timeout, ms(150))
    );
    drop(stuck);
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_hangs_is_not_taken_for_a_holder() {
    let world = World::new();
    world.storage.always(Op::Acquire, Fault::hangs());
    // What the first has sent is still under way when the second gives up.
    for wait in [90, 450] {
        let options = options().retries(1).interval(ms(wait)).build().unwrap();
        let start = Instant::now();
        let kind = storage_error(world.lock().lock(options).await);
        assert_eq!(
            (kind, start.elapsed()),
            (StorageErrorKind::Timeout, ms(wait))
        );
    }
}

/// Whose calls are given up after 200 ms.
fn hurried_world() -> World {
    World::with(|builder| builder.storage_timeout(ms(200)))
}

#[tokio::test(start_paused = true)]
async fn an_acquire_that_comes_after_its_release_is_undone_long_before_the_ttl() {
    let world = hurried_world();
    let late = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.next(Op::Acquire, late);
    storage_error(world.lock().try_lock(patient()).await);
    settle().await;
    assert_eq!(world.storage.count(Op::Release), 1);
    world.assert_empty("after its release");

    sleep(ms(250)).await;
    let late = world.storage.carry_out_late(0).await;
    assert!(matches!(late, AcquireReply::Granted { .. }), "{late:?}");
    let start = Instant::now();
    drop(world.lock_elsewhere().lock(patient()).await.unwrap());
    // Not after 3 s: the storage is asked 200 and 600 ms after the failure.
    assert_eq!(start.elapsed(), ms(350));
    settle().await;
    world.assert_empty("in the end");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_without_an_answer_is_followed_for_its_ttl_and_no_longer() {
    let world = hurried_world();
    let late = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.next(Op::Acquire, late);
    storage_error(world.lock().try_lock(patient()).await);
    let failed = Instant::now();
    sleep(10 * TTL).await;
    let calls = world.storage.calls(Op::Release);
    let after: Vec<_> = calls.iter().map(|call| call.at - failed).collect();
    assert_eq!(after, [0, 200, 600, 1_400, 3_000].map(ms));
    assert!(
        calls
            .iter()
            .all(|call| call.token() == world.storage.calls(Op::Acquire)[0].token())
    );
}

#[tokio::test(start_paused = true)]
async fn a_token_without_an_answer_is_left_alone_while_it_may_be_of_use() {
    let world = hurried_world();
    // The lock is taken, and nobody hears of it.
    world.storage.next(Op::Acquire, reply_lost());
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.always(Op::Acquire, fails);
    let caller = tokio::spawn(world.lock().lock(patient()));
    sleep(ms(1_000)).await;
    world.storage.heal();
    let guard = caller.await.unwrap().unwrap();
    sleep(2 * TTL).await;
    assert!(guard.is_held());
    assert_eq!(world.storage.count(Op::Release), 0);
    let asked = world.storage.calls(Op::Acquire);
    assert!(asked.iter().all(|call| call.token() == asked[0].token()));
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    world.assert_empty("in the end");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_is_made_again_and_again_is_followed_once() {
    let world = hurried_world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.always(Op::Acquire, fails);
    let options = options().retries(3).build().unwrap();
    storage_error(world.lock().lock(options).await);
    assert!(world.storage.count(Op::Acquire) >= 3);
    sleep(10 * TTL).await;
    // Once when the caller gave up, and 200, 600, 1,400 and 3,000 ms after it was last seen.
    assert_eq!(world.storage.count(Op::Release), 5);
}

#[tokio::test(start_paused = true)]
async fn of_very_many_attempts_without_an_answer_a_thousand_are_followed() {
    let world = hurried_world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.always(Op::Acquire, fails);
    for number in 0..1_100 {
        let lock = world.factory.create_lock(format!("key-{number}")).unwrap();
        storage_error(lock.try_lock(patient()).await);
    }
    sleep(ms(199)).await;
    assert_eq!(world.storage.count(Op::Release), 1_100);
    sleep(ms(2)).await;
    assert_eq!(world.storage.count(Op::Release), 1_100 + 1_024);
    // And then those that come next.
    sleep(2 * TTL).await;
    let before = world.storage.count(Op::Release);
    storage_error(world.lock().try_lock(patient()).await);
    sleep(ms(201)).await;
    assert_eq!(world.storage.count(Op::Release), before + 2);
}

#[tokio::test(start_paused = true)]
async fn with_a_lock_delay_an_attempt_without_an_answer_is_left_to_its_ttl() {
    let delay = ms(1_000);
    let world = World::with(|builder| builder.storage_timeout(ms(200)).lock_delay(delay));
    let late = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.next(Op::Acquire, late);
    storage_error(world.lock().try_lock(patient()).await);
    sleep(10 * TTL).await;
    assert_eq!(world.storage.count(Op::Release), 1);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_without_an_answer_does_not_keep_a_factory_alive() {
    let world = hurried_world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.next(Op::Acquire, fails);
    storage_error(world.lock().try_lock(patient()).await);
    settle().await;
    assert_eq!(world.factory.drain(ms(1)).await, 0);
    drop(world.factory);
    settle().await;
    assert_eq!(runtime::Handle::current().metrics().num_alive_tasks(), 0);
}

/// Carried out, and its reply is lost.
fn reply_lost() -> Fault {
    Fault {
        error: Some(StorageErrorKind::Unavailable),
        ..Fault::default()
    }
}

#[tokio::test(start_paused = true)]
async fn the_release_of_a_guard_is_not_overtaken_by_that_of_its_unanswered_attempt() {
    let world = hurried_world();
    world.storage.next(Op::Acquire, reply_lost());
    let guard = world.lock().lock(patient()).await.unwrap();
    // The storage is about to be asked again, 200 ms after the failure.
    sleep(ms(150)).await;
    let valve = Valve::shut();
    world.storage.next(Op::Release, Fault::sent_by(&valve));
    let unlocking = tokio::spawn(guard.unlock());
    sleep(ms(100)).await;
    assert_eq!(world.storage.count(Op::Release), 1);
    valve.open();
    assert_eq!(unlocking.await.unwrap().unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_is_followed_for_its_ttl_after_the_last_use_of_its_token() {
    let world = hurried_world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.always(Op::Acquire, fails);
    let caller = tokio::spawn(world.lock().lock(patient()));
    sleep(TTL + ms(100)).await;
    world.storage.heal();
    drop(caller.await.unwrap().unwrap());
    settle().await;
    world.assert_empty("after the guard");
    let late = world.storage.carry_out_late(0).await;
    assert!(matches!(late, AcquireReply::Granted { .. }), "{late:?}");
    let start = Instant::now();
    drop(world.lock_elsewhere().lock(patient()).await.unwrap());
    assert!(start.elapsed() < TTL / 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_last_renewal_of_a_lost_lock_protects_a_holder_that_still_works() {
    let world = hurried_world();
    world.storage.next(Op::Acquire, reply_lost());
    // Renewals are carried out, and nobody hears of it.
    world.storage.cut(Op::Renew, Cut::ReplyFails);
    let guard = world.lock().lock(patient()).await.unwrap();
    let elsewhere = tokio::spawn(world.lock_elsewhere().lock(patient()));
    sleep(TTL - ms(10)).await;
    assert!(!guard.is_held());
    let _other = elsewhere.await.unwrap().unwrap();
    let renewed = world.storage.calls(Op::Renew).last().unwrap().at;
    assert!(renewed.elapsed() >= TTL, "{:?}", renewed.elapsed());
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn a_release_that_hangs_does_not_keep_a_factory_alive() {
    let world = hurried_world();
    let fails = Fault::fails(StorageErrorKind::Unavailable);
    world.storage.next(Op::Acquire, fails);
    storage_error(world.lock().try_lock(patient()).await);
    settle().await;
    world.storage.always(Op::Release, Fault::hangs());
    sleep(ms(250)).await;
    assert_eq!(world.storage.count(Op::Release), 2);
    drop(world.factory);
    settle().await;
    assert_eq!(runtime::Handle::current().metrics().num_alive_tasks(), 0);
}
