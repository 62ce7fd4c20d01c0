//! Callers that are dropped at any await: nothing of them is left.

use super::*;

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
