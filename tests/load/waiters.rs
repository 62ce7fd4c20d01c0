//! A crowd at one key.

use tokio::task::JoinSet;

use crate::world::{Cost, Meter, TIMES_LONGER, World, grows, options, paused, settle, warm_up};

/// What each of so many waiters costs.
struct Costs {
    /// To come, and to stand there.
    come: Cost,
    /// To have the lock and give it to the next.
    served: Cost,
    /// To leave without the lock.
    leave: Cost,
    /// What is left when all are gone.
    rest: isize,
}

async fn crowd(waiters: usize) -> Costs {
    let world = World::new();
    let lock = world.lock("key");
    drop(lock.lock(options()).await.unwrap());
    warm_up(waiters).await;
    settle().await;

    let before = Meter::start();
    let come_and_stay = async || {
        let guard = lock.lock(options()).await.unwrap();
        let meter = Meter::start();
        let mut tasks = JoinSet::new();
        for _ in 0..waiters {
            tasks.spawn(lock.lock(options()));
        }
        while world.factory.waiters() < waiters {
            settle().await;
        }
        (guard, tasks, meter.cost(waiters))
    };

    let (guard, mut tasks, come) = come_and_stay().await;
    let meter = Meter::start();
    drop(guard);
    while let Some(served) = tasks.join_next().await {
        drop(served.unwrap().unwrap());
    }
    let served = meter.cost(waiters);
    drop(tasks);
    settle().await;
    world.assert_empty();

    let (guard, mut tasks, _) = come_and_stay().await;
    let meter = Meter::start();
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    let leave = meter.cost(waiters);
    drop((guard, tasks));
    settle().await;
    world.assert_empty();
    Costs {
        come,
        served,
        leave,
        rest: before.cost(1).bytes,
    }
}

pub fn a_waiter_costs_the_same_in_a_crowd_of_a_hundred_thousand() {
    let [few, some, many] = [10, 1_000, 100_000].map(|waiters| {
        // The best of several: what else this machine does is not of interest.
        let runs = (10_000 / waiters).clamp(2, 100);
        let runs: Vec<_> = (0..runs).map(|_| paused(crowd(waiters))).collect();
        for run in &runs {
            assert_eq!(run.rest, 0, "bytes are left of {waiters}");
        }
        let least = |of: fn(&Costs) -> f64| runs.iter().map(of).fold(f64::MAX, f64::min);
        let bytes = least(|it| it.come.bytes_each());
        let nanos = [
            least(|it| it.come.nanos_each()),
            least(|it| it.served.nanos_each()),
            least(|it| it.leave.nanos_each()),
        ];
        println!(
            "{waiters:>6} waiters of one key, each with its task: {bytes:.0} B, \
             {nanos:.0?} ns to come, be served, leave"
        );
        (bytes, nanos)
    });
    grows("bytes of a waiter", some.0, many.0, 1.25);
    grows("bytes of a waiter", many.0, few.0, 1.25);
    for (step, what) in ["coming", "being served", "leaving"].iter().enumerate() {
        grows(what, some.1[step], many.1[step], TIMES_LONGER);
    }
}
