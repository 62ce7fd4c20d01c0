use std::{collections::BTreeMap, env, sync::Mutex, time::Duration};

use futures_util::FutureExt;
use tower_distributed_lock::storage::conformance;

use crate::{
    history::History,
    net::{Net, Weather},
    redis::Server,
    scenario::{alone, panicked, run, run_all},
    service::storage,
    world::World,
};

fn number(name: &str) -> Option<u64> {
    let number = env::var(name).ok();
    number.map(|number| number.parse().expect("a number"))
}

/// `SEED=123` runs that one alone, with all that happens in it; `SEEDS=20000` so many.
#[test]
fn a_thousand_seeds_keep_every_promise() {
    if let Some(seed) = number("SEED") {
        let violations = run(seed, true).violations;
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
        return;
    }
    let bad = Mutex::new(Vec::new());
    run_all(0..number("SEEDS").unwrap_or(1_000), |outcome| {
        if !outcome.violations.is_empty() {
            bad.lock().unwrap().push((outcome.seed, outcome.violations));
        }
    });
    let bad = bad.into_inner().unwrap();
    assert!(bad.is_empty(), "run one with SEED=<number>: {bad:#?}");
}

#[test]
fn a_seed_is_the_same_history_each_time() {
    let seeds = 0..number("SEEDS").unwrap_or(300);
    let known = Mutex::new(BTreeMap::new());
    let bad = Mutex::new(Vec::new());
    for _ in 0..2 {
        run_all(seeds.clone(), |outcome| {
            assert!(outcome.events > 0, "seed {}", outcome.seed);
            let this = (outcome.hash, outcome.events);
            let first = known.lock().unwrap().insert(outcome.seed, this);
            if first.is_some_and(|first| first != this) {
                bad.lock().unwrap().push(outcome.seed);
            }
        });
    }
    let bad = bad.into_inner().unwrap();
    assert!(bad.is_empty(), "seeds that were not the same: {bad:?}");
}

#[test]
#[expect(
    clippy::async_yields_async,
    reason = "the task is waited for step by step, outside of its runtime"
)]
fn the_storage_of_the_simulation_keeps_the_contract() {
    alone(1, || {
        let weather = Weather {
            latency: 2,
            lost: 0,
        };
        let net = Net::new(2, weather, 1);
        let history = History::new(2, 1, false);
        let mut world = World::new(2, net.clone(), history.clone());
        let server = async { Server::start(net.clone(), 0, history, false) };
        world.start(0, server);
        let mut checked = world.start(1, async {
            tokio::spawn(async move {
                conformance::check(storage(&net, 1, 0, Duration::from_secs(1))).await;
            })
        });
        while !checked.is_finished() {
            assert!(world.now < 60_000, "the contract is not kept");
            world.step();
        }
        let panicked = panicked();
        assert!(panicked.is_none(), "{panicked:?}");
        assert!(
            (&mut checked)
                .now_or_never()
                .is_some_and(|checked| checked.is_ok())
        );
    });
}
