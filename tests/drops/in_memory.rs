//! Over storages in memory, on paused time: every poll of the caller, and both ends of every call of
//! its process.

use std::{env, sync::Arc, time::Duration};

use tokio::runtime;
use tower_distributed_lock::{
    Clock, LockFactory, LockOptions, Redlock,
    storage::{LockStorage, MemoryStorage},
};

use super::{
    FATES, Fate, Plan, Points, ms,
    network::{Fates, Network},
    scenes::{DRAINS, LAYERS, LOCKS, Scene},
    stage::{Patience, Setup, Stage, drive, no_task_is_left, nothing_is_left},
    visit_all,
};

/// Far above all that a run takes: what is free before was given back.
const TTL: Duration = Duration::from_secs(30);

/// The kind of storage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With a queue, and grants that come by messages.
    Told,
    /// Waiters ask.
    Polled,
    /// Three servers.
    Redlock,
}

fn factory(storage: impl LockStorage, clock: Clock, setup: Setup) -> LockFactory {
    let builder = LockFactory::builder(storage).clock(clock);
    setup.apply(builder).build().unwrap()
}

struct World {
    kind: Kind,
    clock: Clock,
    memories: Vec<MemoryStorage>,
    networks: Vec<Network>,
}

impl World {
    fn new(kind: Kind, fates: &Arc<Fates>) -> Self {
        let clock = Clock::tokio();
        let nodes = if kind == Kind::Redlock { 3 } else { 1 };
        let memories: Vec<_> = (0..nodes)
            .map(|_| MemoryStorage::with_clock(clock))
            .collect();
        let network = |(node, memory): (usize, &MemoryStorage)| {
            let listens = kind != Kind::Polled;
            Network::new(node, memory.clone(), Arc::clone(fates), listens)
        };
        let networks = memories.iter().enumerate().map(network).collect();
        Self {
            kind,
            clock,
            memories,
            networks,
        }
    }

    fn here(&self, setup: Setup) -> LockFactory {
        self.over(&self.networks, setup)
    }

    fn elsewhere(&self) -> LockFactory {
        self.over(&self.memories, Setup::default())
    }

    fn over<S: LockStorage + Clone>(&self, nodes: &[S], setup: Setup) -> LockFactory {
        match self.kind {
            Kind::Redlock => {
                let builder = Redlock::builder();
                let all = nodes
                    .iter()
                    .cloned()
                    .fold(builder, |all, node| all.node(node));
                factory(all.build().unwrap(), self.clock, setup)
            }
            _ => factory(nodes[0].clone(), self.clock, setup),
        }
    }

    /// Where a message tells who waits, they hardly ever ask by themselves.
    fn options(&self) -> LockOptions {
        let (interval, retries) = match self.kind {
            Kind::Told => (Duration::from_secs(10), 6),
            Kind::Polled | Kind::Redlock => (ms(50), 1_200),
        };
        let builder = LockOptions::builder()
            .ttl(TTL)
            .interval(interval)
            .retries(retries);
        builder.build().unwrap()
    }
}

fn run(kind: Kind, scene: &Scene, plan: Option<&Plan>) -> Vec<String> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(play(kind, scene, plan))
}

async fn play(kind: Kind, scene: &Scene, plan: Option<&Plan>) -> Vec<String> {
    // What is random in the pauses is the same in every run.
    fastrand::seed(7);
    let points = Arc::new(Points::new(plan.map(|plan| plan.point)));
    let fates = Fates::new(Arc::clone(&points), plan.cloned());
    let world = World::new(kind, &fates);
    let networks = world.networks.clone();
    let stage = Stage {
        here: world.here(scene.setup),
        there: world.elsewhere(),
        elsewhere: world.elsewhere(),
        options: world.options(),
        limit: ms(40),
        // Long enough for a renewal.
        work: TTL / 3 + ms(500),
        queued: Arc::new(move |key| {
            let networks = networks.clone();
            Box::pin(async move {
                let mut queued = 0;
                for network in &networks {
                    queued = queued.max(network.queued(key).await);
                }
                queued
            })
        }),
        has_queue: kind != Kind::Polled,
        dropped: fates.dropped(),
    };
    let next = world.elsewhere();

    let mut act = (scene.set)(stage.clone()).await;
    let caller = std::mem::replace(&mut act.caller, Box::pin(std::future::pending()));
    let left = drive(&points, caller).await;
    fates.strike();
    drop(left);

    let harmless = plan.is_none_or(|plan| plan.fates.iter().all(|fate| *fate == Fate::Through));
    let patience = Patience {
        next: if harmless { ms(400) } else { ms(3_500) },
        clean: if harmless { ms(400) } else { ms(3_500) },
    };
    let memories = world.memories.clone();
    let is_empty = async || memories.iter().all(MemoryStorage::is_empty);
    let here = stage.here.clone();
    let tasks = patience.clean;
    nothing_is_left(stage, act, patience, is_empty, next).await;
    // The tasks of the others end with their factories.
    no_task_is_left(1, tasks, "while the factory is there").await;
    drop(here);
    no_task_is_left(0, tasks, "of the factory").await;
    points.names()
}

/// Every fate for one server, of what is on its way and of what comes after the drop.
fn plans(point: usize, _: &str) -> Vec<Plan> {
    let mut plans = Vec::new();
    for fate in FATES {
        for outage in [false, true] {
            if fate != Fate::Through || !outage {
                let fates = vec![fate];
                plans.push(Plan {
                    point,
                    fates,
                    outage,
                });
            }
        }
    }
    plans
}

/// Every server's fate on its own. Of the 27 ways for three servers 9 are taken at each point, others
/// at the next one, so that any two servers meet any two fates; all of them with `DROPS_ALL` set.
fn plans_of_three(point: usize, _: &str) -> Vec<Plan> {
    let all = env::var_os("DROPS_ALL").is_some();
    let fates = [Fate::Through, Fate::NotSent, Fate::ReplyLost];
    let mut plans = Vec::new();
    for a in 0..3 {
        for b in 0..3 {
            for c in 0..3 {
                if all || (a + b + point) % 3 == c {
                    plans.push(Plan {
                        point,
                        fates: vec![fates[a], fates[b], fates[c]],
                        outage: true,
                    });
                }
            }
        }
    }
    plans
}

fn visit(kind: Kind, scenes: &[Scene]) {
    for scene in scenes {
        let name = match kind {
            Kind::Told => scene.name.to_owned(),
            Kind::Polled => format!("{}-polled", scene.name),
            Kind::Redlock => format!("{}-redlock", scene.name),
        };
        let run = |plan: Option<&Plan>| run(kind, scene, plan);
        match kind {
            Kind::Redlock => visit_all(&name, 1, plans_of_three, run),
            _ => visit_all(&name, 1, plans, run),
        }
    }
}

#[test]
fn a_lock_dropped_anywhere_leaves_nothing() {
    visit(Kind::Told, &LOCKS);
}

#[test]
fn a_lock_that_is_polled_for_dropped_anywhere_leaves_nothing() {
    visit(Kind::Polled, &LOCKS);
}

#[test]
fn a_request_dropped_anywhere_leaves_nothing() {
    visit(Kind::Told, &LAYERS);
}

#[test]
fn a_drain_dropped_anywhere_leaves_nothing() {
    visit(Kind::Told, &DRAINS);
}

#[test]
fn a_redlock_dropped_anywhere_leaves_nothing() {
    visit(Kind::Redlock, &LOCKS);
}
