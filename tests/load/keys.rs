//! A great many keys.

use std::time::Duration;

use tokio::time::sleep;
use tower_distributed_lock::LockGuard;

use crate::world::{Cost, Meter, TIMES_LONGER, World, grows, options, paused, settle, warm_up};

/// What each of so many locks costs that are held at once.
struct Costs {
    take: Cost,
    renew: Cost,
    give_back: Cost,
    /// What is left when all are gone.
    rest: isize,
}

async fn take(world: &World, first: usize, locks: usize) -> Vec<LockGuard> {
    let mut guards = Vec::with_capacity(locks);
    for number in first..first + locks {
        let lock = world.lock(&number.to_string());
        guards.push(lock.try_lock(options()).await.unwrap());
    }
    guards
}

/// So many locks are held at once, renewed, and given back.
async fn batch(world: &World, first: usize, locks: usize) -> Costs {
    let before = Meter::start();
    let meter = Meter::start();
    let guards = take(world, first, locks).await;
    let take = meter.cost(locks);
    assert_eq!(world.factory.keys(), locks);

    let meter = Meter::start();
    sleep(Duration::from_secs(35)).await;
    settle().await;
    let renew = meter.cost(3 * locks);
    assert!(guards.iter().all(LockGuard::is_held));
    assert_eq!(world.memory.len(), locks);

    let meter = Meter::start();
    drop(guards);
    settle().await;
    let give_back = meter.cost(locks);
    world.assert_empty();
    Costs {
        take,
        renew,
        give_back,
        rest: before.cost(1).bytes,
    }
}

pub fn a_held_lock_costs_the_same_among_a_hundred_thousand() {
    let [few, some, many] = [10, 1_000, 100_000].map(|locks| {
        let runs: Vec<_> = paused(async {
            let world = World::new();
            warm_up(1_000).await;
            // Makes what a process has once, such as its background task.
            batch(&world, 0, 1).await;
            let mut costs = Vec::new();
            for _ in 0..(10_000 / locks).clamp(2, 100) {
                costs.push(batch(&world, 0, locks).await);
            }
            costs
        });
        // Tables keep room for a few of those that were there.
        let rest = runs.iter().map(|it| it.rest).sum::<isize>();
        assert!(rest < 64 * 1024, "{rest} bytes are left of {locks}");
        let least = |of: fn(&Costs) -> f64| runs.iter().map(of).fold(f64::MAX, f64::min);
        let bytes = least(|it| it.take.bytes_each());
        let nanos = [
            least(|it| it.take.nanos_each()),
            least(|it| it.renew.nanos_each()),
            least(|it| it.give_back.nanos_each()),
        ];
        println!(
            "{locks:>6} locks held, storage and guard included: {bytes:.0} B each, \
             {nanos:.0?} ns to take, renew, give back; {rest} B left of all"
        );
        (bytes, nanos)
    });
    grows("bytes of a lock", some.0, many.0, 1.25);
    grows("bytes of a lock", many.0, few.0, 2.0);
    for (step, what) in ["taking", "renewing", "giving back"].iter().enumerate() {
        grows(what, some.1[step], many.1[step], TIMES_LONGER);
    }
}

pub fn a_million_keys_leave_nothing() {
    const AT_ONCE: usize = 10_000;
    paused(async {
        let world = World::with(|builder| builder.key_prefix("m"));
        warm_up(1_000).await;
        let mut rests = Vec::new();
        for first in (0..1_000_000).step_by(AT_ONCE) {
            let before = Meter::start();
            let guards = take(&world, first, AT_ONCE).await;
            drop(guards);
            settle().await;
            world.assert_empty();
            rests.push(before.cost(1).bytes);
        }
        println!("{} B left of the first {AT_ONCE} keys", rests[0]);
        // What the first leave is room that the next use again. Some list may grow once more (576
        // bytes have been seen); a byte for each hundredth key may not.
        let grown: isize = rests[1..].iter().sum();
        assert!(grown < 10_000, "{rests:?}");
    });
}

/// A lock that lingers is a key in the table, and no more.
pub fn a_key_that_lingers_costs_the_same_among_a_hundred_thousand() {
    let [some, many] = [1_000, 100_000].map(|keys| {
        paused(async {
            let world = World::with(|builder| builder.linger(Duration::from_secs(3_600)));
            // Once it can be told who waits, locks linger; this one began before.
            drop(world.lock("key").try_lock(options()).await.unwrap());
            warm_up(1_000).await;
            let before = Meter::start();
            for number in 0..keys {
                let lock = world.lock(&number.to_string());
                drop(lock.try_lock(options()).await.unwrap());
            }
            settle().await;
            let cost = before.cost(keys);
            assert_eq!(world.factory.keys(), keys);
            let meter = Meter::start();
            assert_eq!(world.factory.drain(Duration::from_secs(1)).await, 0);
            settle().await;
            world.assert_empty();
            println!(
                "{keys:>6} locks that linger: {cost} each, {} to drain",
                meter.cost(keys)
            );
            cost.bytes_each()
        })
    });
    grows("bytes of a key", some, many, 1.25);
}
