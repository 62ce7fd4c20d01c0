//! What `drain` does to callers, holders and releases on their way.

use super::*;

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
