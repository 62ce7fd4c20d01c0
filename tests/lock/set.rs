//! Several locks at once: all or none, in one order, within one wait.

use tower_distributed_lock::{LockSet, LockSetFuture, LockSetGuard};

use super::*;

impl World {
    fn set(&self, keys: &[&str]) -> LockSet {
        self.factory.create_lock_set(keys.iter().copied()).unwrap()
    }

    /// The lock of `key`, held by another process.
    async fn held_elsewhere(&self, key: &str) -> LockGuard {
        let lock = factory_over(&self.memory).create_lock(key).unwrap();
        lock.lock(patient()).await.unwrap()
    }

    /// The keys that the storage was asked for, in order.
    fn asked(&self) -> Vec<String> {
        let calls = self.storage.calls(Op::Acquire);
        calls
            .into_iter()
            .map(|call| call.locks[0].0.clone())
            .collect()
    }
}

fn keys(guards: &LockSetGuard) -> Vec<String> {
    let guards = guards.guards().iter();
    guards.map(|guard| guard.key().to_string()).collect()
}

#[tokio::test(start_paused = true)]
async fn all_locks_are_taken_in_the_order_of_their_keys_and_each_once() {
    let world = World::new();
    let set = world.set(&["c", "a", "b", "a"]);
    let keys_of_set: Vec<_> = set.keys().map(|key| key.to_string()).collect();
    assert_eq!(keys_of_set, ["a", "b", "c"]);
    let guards = set.lock(patient()).await.unwrap();
    assert_eq!(world.asked(), ["a", "b", "c"]);
    assert_eq!(keys(&guards), ["a", "b", "c"]);
    assert_eq!(world.memory.len(), 3);
    assert!(guards.is_held());
    assert!(guards.remaining() > ms(2_900));
    assert_eq!(guards.unlock().await.unwrap(), Unlocked::Held);
    world.assert_empty("unlocked");
}

#[tokio::test(start_paused = true)]
async fn what_is_no_set_is_refused() {
    let world = World::new();
    let none = world.factory.create_lock_set(Vec::<LockKey>::new());
    assert_eq!(none.unwrap_err(), InvalidKey::NoKeys);
    let many = (0..=LockSet::MAX_LEN).map(|key| key.to_string());
    let many = world.factory.create_lock_set(many);
    assert_eq!(many.unwrap_err(), InvalidKey::TooMany);
    let empty = world.factory.create_lock_set(["a", ""]);
    assert_eq!(empty.unwrap_err(), InvalidKey::Empty);
}

#[tokio::test(start_paused = true)]
async fn if_one_lock_cannot_be_had_none_is_kept() {
    let world = World::new();
    let elsewhere = world.held_elsewhere("b").await;
    let set = world.set(&["a", "b", "c"]);

    let refused = not_obtained(set.try_lock(patient()).await);
    assert_eq!((refused.waited, refused.attempts), (Duration::ZERO, 1));
    assert_eq!(world.asked(), ["a", "b"], "and c is not asked for");
    settle().await;
    assert_eq!((world.factory.keys(), world.memory.len()), (0, 1));

    let wait = options().retries(5).build().unwrap();
    let start = Instant::now();
    let refused = not_obtained(set.lock(wait).await);
    assert_eq!(start.elapsed(), wait.max_wait());
    assert_eq!(refused.waited, wait.max_wait());
    settle().await;
    assert_eq!((world.factory.keys(), world.memory.len()), (0, 1));
    drop(elsewhere);
    settle().await;
    world.assert_empty("all have gone");
}

#[tokio::test(start_paused = true)]
async fn all_locks_together_are_waited_for_no_longer_than_one() {
    let world = World::new();
    let first = world.held_elsewhere("a").await;
    let _second = world.held_elsewhere("b").await;
    tokio::spawn(async move {
        sleep(ms(350)).await;
        drop(first);
    });
    let wait = options().retries(5).build().unwrap();
    let start = Instant::now();
    let refused = not_obtained(world.set(&["a", "b"]).lock(wait).await);
    assert!(world.asked().contains(&"b".to_owned()));
    assert_eq!(start.elapsed(), wait.max_wait());
    assert_eq!(
        refused.waited,
        wait.max_wait(),
        "not that for the last one alone"
    );
    settle().await;
    assert_eq!(world.factory.keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_lost_while_others_are_waited_for_ends_the_wait_at_once() {
    let world = World::new();
    let elsewhere = factory_over(&world.memory).create_lock("b").unwrap();
    let long = options().ttl(ms(60_000)).build().unwrap();
    let _elsewhere = elsewhere.lock(long).await.unwrap();
    world
        .storage
        .always(Op::Renew, Fault::fails(StorageErrorKind::Unavailable));
    // Asks every 5 to 10 s, and does not wait for the holder's ttl: nothing else wakes it.
    let sleepy = options().interval(ms(10_000)).retries(2).build().unwrap();
    let start = Instant::now();
    match world.set(&["a", "b"]).lock(sleepy).await {
        Err(LockError::Lost(LossReason::Expired)) => {}
        other => panic!("{other:?}"),
    }
    assert!(start.elapsed() >= VALIDITY, "{:?}", start.elapsed());
    assert!(start.elapsed() < VALIDITY + ms(50), "{:?}", start.elapsed());
    settle().await;
    assert_eq!((world.factory.keys(), world.factory.waiters()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_set_of_which_one_lock_is_lost_is_not_handed_out() {
    let world = World::new();
    world
        .storage
        .always(Op::Renew, Fault::fails(StorageErrorKind::Unavailable));
    // The reply for `b` and the end of `a` come in one poll.
    world.storage.next(Op::Acquire, Fault::default());
    let valve = Valve::shut();
    world.storage.next(Op::Acquire, Fault::answered_by(&valve));
    let mut caller = tokio_test::task::spawn(world.set(&["a", "b"]).lock(patient()));
    assert!(caller.poll().is_pending());
    tokio::time::advance(VALIDITY + ms(1)).await;
    valve.open();
    match caller.poll() {
        Poll::Ready(Err(LockError::Lost(LossReason::Expired))) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn held_locks_are_renewed_while_others_are_waited_for() {
    let world = World::new();
    let elsewhere = world.held_elsewhere("b").await;
    let caller = tokio::spawn(world.set(&["a", "b"]).lock(patient()));
    sleep(3 * TTL).await;
    drop(elsewhere);
    let guards = caller.await.unwrap().unwrap();
    assert!(guards.is_held());
    assert_eq!(guards.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn each_lock_has_a_fencing_token_of_its_own_key() {
    let world = World::new();
    let mut last = [0, 0];
    for _ in 0..3 {
        let guards = world.set(&["b", "a"]).lock(patient()).await.unwrap();
        let tokens: Vec<_> = guards
            .guards()
            .iter()
            .map(|guard| guard.fencing_token().unwrap())
            .collect();
        assert!(tokens.iter().zip(last).all(|(token, last)| *token > last));
        last = tokens.try_into().unwrap();
        drop(guards);
        settle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlock_sends_all_releases_before_it_waits_for_an_answer() {
    let world = World::new();
    let guards = world.set(&["a", "b", "c"]).lock(patient()).await.unwrap();
    let valve = Valve::shut();
    world
        .storage
        .always(Op::Release, Fault::answered_by(&valve));
    let mut unlock = tokio_test::task::spawn(guards.unlock());
    assert!(unlock.poll().is_pending());
    assert_eq!(world.storage.count(Op::Release), 3);
    assert!(world.memory.is_empty());
    valve.open();
    assert_eq!(unlock.await.unwrap(), Unlocked::Held);
    world.assert_empty("unlocked");
}

#[tokio::test(start_paused = true)]
async fn an_unlock_says_if_any_of_them_was_lost_and_an_error_if_nobody_knows() {
    let world = World::new();
    let set = world.set(&["a", "b", "c"]);
    let guards = set.lock(patient()).await.unwrap();
    world.memory.clear();
    let _thief = world.held_elsewhere("b").await;
    assert_eq!(guards.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(world.memory.len(), 1, "nothing of theirs was touched");

    let world = World::new();
    let guards = world.set(&["a", "b", "c"]).lock(patient()).await.unwrap();
    world.storage.next(Op::Release, Fault::default());
    world
        .storage
        .next(Op::Release, Fault::fails(StorageErrorKind::Unavailable));
    let error = guards.unlock().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    sleep(ms(1_300)).await;
    world.assert_empty("it is released all the same");
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_any_of_them_is_told() {
    let world = World::new();
    let guards = world.set(&["a", "b", "c"]).lock(patient()).await.unwrap();
    assert!(guards.lost().now_or_never().is_none());
    world.memory.clear();
    assert_eq!(guards.lost().await, LossReason::NotOurs);
    assert!(!guards.is_held());
    assert_eq!(guards.remaining(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_shuts_down_does_not_wait_on_with_what_it_has() {
    let world = World::new();
    let elsewhere = world.held_elsewhere("b").await;
    let caller = tokio::spawn(world.set(&["a", "b"]).lock(patient()));
    settle().await;
    assert_eq!(world.memory.len(), 2);
    let start = Instant::now();
    assert_eq!(world.factory.drain(ms(5_000)).await, 0);
    assert_eq!(
        start.elapsed(),
        Duration::ZERO,
        "nobody has to be waited for"
    );
    let result = caller.await.unwrap();
    assert!(matches!(result, Err(LockError::Draining)), "{result:?}");
    drop(elsewhere);
    settle().await;
    world.assert_empty("drained");
}

#[tokio::test(start_paused = true)]
async fn locks_of_a_set_can_go_on_as_locks_of_their_own() {
    let world = World::new();
    let guards = world.set(&["a", "b"]).lock(patient()).await.unwrap();
    let mut guards = guards.into_guards();
    let last = guards.pop().unwrap();
    assert_eq!(last.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(world.memory.len(), 1);
    assert!(guards[0].is_held());
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "polled after it was ready")]
async fn a_future_that_is_polled_after_its_end_panics() {
    let world = World::new();
    let mut caller = tokio_test::task::spawn(world.set(&["a", "b"]).lock(patient()));
    let Poll::Ready(Ok(_guards)) = caller.poll() else {
        panic!("memory answers at once")
    };
    let _ = caller.poll();
}

/// Two processes, and callers that want pairs of few locks in any order. If they could wait for each
/// other in a circle, somebody's time would be over.
#[tokio::test(start_paused = true)]
async fn callers_that_want_the_same_locks_in_opposite_orders_all_get_them() {
    const ACCOUNTS: usize = 4;
    let memory = MemoryStorage::with_clock(Clock::tokio());
    let factories = [factory_over(&memory), factory_over(&memory)];
    let inside: Arc<[AtomicBool; ACCOUNTS]> = Arc::default();
    let patient = options().interval(ms(10)).retries(6_000).build().unwrap();
    fastrand::seed(7);
    let mut callers = JoinSet::new();
    for caller in 0..200 {
        let from = fastrand::usize(..ACCOUNTS);
        let to = (from + fastrand::usize(1..ACCOUNTS)) % ACCOUNTS;
        let set = factories[caller % 2]
            .create_lock_set([from, to].map(|account| format!("accounts/{account}")))
            .unwrap();
        let inside = Arc::clone(&inside);
        callers.spawn(async move {
            sleep(ms(caller as u64 % 7)).await;
            let guards = set.lock(patient).await.unwrap();
            for account in [from, to] {
                assert!(!inside[account].swap(true, SeqCst), "two holders");
            }
            sleep(ms(1)).await;
            for account in [from, to] {
                inside[account].store(false, SeqCst);
            }
            assert_eq!(guards.unlock().await.unwrap(), Unlocked::Held);
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    settle().await;
    assert!(memory.is_empty());
    assert_eq!([factories[0].keys(), factories[1].keys()], [0, 0]);
}

mod leaving {
    use super::*;

    /// Which lock another process holds for a while.
    const SCENES: [Option<&str>; 4] = [None, Some("a"), Some("b"), Some("c")];
    const CUTS: [Cut; 5] = [
        Cut::None,
        Cut::SendHangs,
        Cut::SendFails,
        Cut::ReplyHangs,
        Cut::ReplyFails,
    ];

    /// A world in which every call takes three polls, and somebody else is in the way for 60 ms.
    async fn stage(held: Option<&str>) -> World {
        let world = World::new();
        world.storage.always(Op::Acquire, Fault::slow());
        world.storage.always(Op::Release, Fault::slow());
        fastrand::seed(7);
        if let Some(key) = held {
            let guard = world.held_elsewhere(key).await;
            tokio::spawn(async move {
                sleep(ms(60)).await;
                drop(guard);
            });
        }
        world
    }

    /// Polls a caller so many times, whenever it was woken.
    async fn poll_times(
        caller: &mut tokio_test::task::Spawn<LockSetFuture>,
        polls: usize,
    ) -> (usize, Option<Result<LockSetGuard, LockError>>) {
        for polled in 1..=polls {
            if let Poll::Ready(result) = caller.poll() {
                return (polled, Some(result));
            }
            let mut patience = 10_000;
            while polled < polls && !caller.is_woken() {
                sleep(ms(1)).await;
                patience -= 1;
                assert_ne!(patience, 0, "never woken");
            }
        }
        (polls, None)
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_dropped_at_any_point_leaves_nothing_of_any_lock() {
        for held in SCENES {
            let world = stage(held).await;
            let set = world.set(&["a", "b", "c"]);
            let mut caller = tokio_test::task::spawn(set.lock(patient()));
            let (polls, result) = poll_times(&mut caller, usize::MAX).await;
            drop(result.unwrap().unwrap());
            assert!(polls >= 7, "{held:?}: {polls}");

            for (k, cut) in (0..=polls).flat_map(|k| CUTS.map(|cut| (k, cut))) {
                let case = format!("{held:?}, dropped after {k} of {polls} polls, {cut:?}");
                let world = stage(held).await;
                let set = world.set(&["a", "b", "c"]);
                let mut caller = tokio_test::task::spawn(set.lock(patient()));
                let (_, result) = poll_times(&mut caller, k).await;
                assert_eq!(result.is_some(), k == polls, "{case}");
                world.storage.cut(Op::Acquire, cut);
                drop(caller);
                drop(result);

                sleep(ms(1_300)).await;
                world.assert_empty(&case);
                world.storage.heal();
                let now = Instant::now();
                let guards = set.lock(patient()).await.expect(&case);
                assert_eq!(now.elapsed(), Duration::ZERO, "{case}");
                drop(guards);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_unlock_dropped_at_any_point_gives_all_locks_back() {
        for (k, cut) in (0..8).flat_map(|k| CUTS.map(|cut| (k, cut))) {
            let case = format!("dropped after {k} polls, {cut:?}");
            let world = stage(None).await;
            let guards = world.set(&["a", "b", "c"]).lock(patient()).await.unwrap();
            let mut unlock = tokio_test::task::spawn(guards.unlock());
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
}

#[tokio::test(start_paused = true)]
async fn an_unlock_waits_for_all_answers_at_the_same_time() {
    let world = World::new();
    let keys: Vec<_> = (0..16).map(|key| key.to_string()).collect();
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    let guards = world.set(&keys).lock(patient()).await.unwrap();
    world.storage.always(Op::Release, Fault::hangs());
    let since = Instant::now();
    let error = guards.unlock().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Timeout);
    assert_eq!(since.elapsed(), Duration::from_secs(1), "one time-out");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_one_of_them_does_not_wait_for_the_answer_about_another() {
    let world = World::listening();
    let guards = world.set(&["a", "b"]).lock(patient()).await.unwrap();
    // Another process wants b, and then one more caller of this one: it is queued again.
    let other = factory_over(&world.memory);
    drop(other.create_lock("x").unwrap().lock(patient()).await);
    settle().await;
    let other = tokio::spawn(other.create_lock("b").unwrap().lock(patient()));
    settle().await;
    let here = tokio::spawn(world.factory.create_lock("b").unwrap().lock(patient()));
    settle().await;
    world.storage.next(Op::Release, Fault::hangs());
    let valve = Valve::shut();
    world.storage.next(Op::Release, Fault::sent_by(&valve));
    let since = Instant::now();
    // Polled once, and never again.
    let mut unlocking = tokio_test::task::spawn(guards.unlock());
    assert!(unlocking.poll().is_pending());
    settle().await;
    valve.open();
    drop(other.await.unwrap().unwrap());
    let here = here.await.unwrap().unwrap();
    assert_eq!(since.elapsed(), Duration::ZERO);
    assert!(here.is_held());
    drop(unlocking);
}
