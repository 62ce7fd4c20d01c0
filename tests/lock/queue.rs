//! The queue of one factory: order, handoff in memory and its limits, fencing tokens, crowds.

use super::*;

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
