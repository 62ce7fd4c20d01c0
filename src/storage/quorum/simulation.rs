//! A Redlock in a world in which everything that can go wrong does, by seeds: requests and replies
//! are lost or late and overtake each other, nodes forget locks early, or all they knew.
//!
//! Time is tokio's, paused, and all that is random comes from the seed, so that a seed that fails
//! fails again.

use std::sync::atomic::AtomicU64;

use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{fence::WriteBack, *};
use crate::{
    clock::Clock,
    coordinator::lease::validity,
    key::{KeyPrefix, LockKey, LockName},
    lock::{LockFactory, Unlocked},
    storage::{GivenUp, MemoryStorage, OwnerToken},
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Parts in a hundred of the requests, and of the replies.
    lost: u32,
    late: u32,
    /// How often a node forgets its locks, or its counter too, in an attempt's time.
    expires: u32,
    forgets: u32,
}

struct World {
    weather: Mutex<Weather>,
    started: Instant,
    nodes: Vec<MemoryStorage>,
}

impl World {
    fn new(nodes: usize, weather: Weather) -> Arc<Self> {
        let world = Self {
            weather: Mutex::new(weather),
            started: Instant::now(),
            nodes: (0..nodes)
                .map(|_| MemoryStorage::with_clock(Clock::tokio()))
                .collect(),
        };
        // The clocks do not show quite the same.
        for node in &world.nodes {
            node.restart(world.time() + fastrand::u64(..500));
        }
        Arc::new(world)
    }

    fn weather(&self) -> Weather {
        *self.weather.lock().unwrap()
    }

    fn calm(&self) {
        *self.weather.lock().unwrap() = Weather::default();
    }

    /// In microseconds, as a node's clock shows it.
    fn time(&self) -> u64 {
        1_000_000_000 + self.started.elapsed().as_micros() as u64
    }

    fn redlock(self: &Arc<Self>, write_back: WriteBack) -> Redlock {
        let lines = (0..self.nodes.len()).map(|node| Line {
            world: Arc::clone(self),
            node,
        });
        let mut redlock = Redlock::new(lines).unwrap();
        Arc::get_mut(&mut redlock.shared).unwrap().write_back = write_back;
        redlock
    }

    /// A node loses something now and then.
    async fn decay(self: Arc<Self>) {
        loop {
            sleep(ms(fastrand::u64(1..20))).await;
            let Weather {
                expires, forgets, ..
            } = self.weather();
            let node = fastrand::choice(&self.nodes).unwrap();
            if fastrand::u32(..100) < expires {
                node.clear();
            }
            if fastrand::u32(..100) < forgets {
                node.restart(self.time() + fastrand::u64(..500));
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.nodes.iter().all(MemoryStorage::is_empty)
    }
}

/// The way to one node.
struct Line {
    world: Arc<World>,
    node: usize,
}

impl Line {
    /// One direction.
    async fn travel(&self) {
        let weather = self.world.weather();
        if fastrand::u32(..100) < weather.lost {
            std::future::pending::<()>().await;
        }
        let longest = match fastrand::u32(..100) < weather.late {
            true => 200_000,
            false => 2_000,
        };
        sleep(Duration::from_micros(fastrand::u64(..longest))).await;
    }

    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        self.travel().await;
        let answer = call.await;
        self.travel().await;
        answer
    }

    fn node(&self) -> &MemoryStorage {
        &self.world.nodes[self.node]
    }
}

impl LockStorage for Line {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.call(self.node().acquire(request)).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.call(self.node().renew(requests)).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.call(self.node().release(request)).await
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        self.call(self.node().raise(request)).await
    }

    async fn listen(&self, inbox: Inbox) {
        self.node().listen(inbox).await;
    }
}

fn name() -> LockName {
    let key = LockKey::from_parts(["k"]).unwrap();
    KeyPrefix::default().name(&key)
}

/// A grant, as the one who got it saw it.
#[derive(Clone, Copy, Debug)]
struct Grant {
    asked: Instant,
    granted: Instant,
    /// Until when it could be relied on: it was given back then, or its time was over.
    until: Instant,
    block: FencingBlock,
}

const TTL: Duration = ms(150);

/// Somebody who takes the lock now and then, without a coordinator.
async fn client(redlock: Redlock, id: u128, grants: Arc<Mutex<Vec<Grant>>>) {
    let name = name();
    for number in 0..20 {
        sleep(ms(fastrand::u64(..15))).await;
        let request = AcquireRequest {
            name: name.clone(),
            token: OwnerToken::new(id, number),
            ttl: TTL,
            again: number > 0,
            repeated: false,
            queue: None,
            hint: None,
            fencing: fastrand::u32(1..4),
            given_up: GivenUp::default(),
        };
        let asked = Instant::now();
        // Callers leave at any time.
        let patience = ms(fastrand::u64(1..120));
        let reply = timeout(patience, redlock.acquire(&request)).await;
        let mut quiet = fastrand::bool();
        if let Ok(Ok(AcquireReply::Granted { fencing, .. })) = reply {
            let granted = Instant::now();
            let over = asked + validity(TTL);
            if granted < over {
                sleep(ms(fastrand::u64(..30))).await;
                grants.lock().unwrap().push(Grant {
                    asked,
                    granted,
                    until: Instant::now().min(over),
                    block: fencing.expect("all nodes fence"),
                });
            }
            quiet = false;
        }
        if fastrand::u32(..8) > 0 {
            let release = ReleaseRequest {
                name: name.clone(),
                token: request.token,
                ttl: TTL,
                requeue: None,
                wanted: None,
                quiet,
            };
            // A majority may never answer.
            let _ = timeout(ms(500), redlock.release(&release)).await;
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Faults {
    /// Tokens that two grants had.
    duplicates: usize,
    /// Grants with a token below that of a grant that was there before they were asked for.
    inversions: usize,
    /// Grants that were relied on at the same time, or with tokens out of order.
    overlaps: usize,
    grants: usize,
}

fn faults(mut grants: Vec<Grant>) -> Faults {
    grants.sort_by_key(|grant| grant.granted);
    let mut faults = Faults {
        grants: grants.len(),
        ..Faults::default()
    };
    for (number, after) in grants.iter().enumerate() {
        for before in &grants[..number] {
            let (a, b) = (before.block, after.block);
            let apart = a.last() < b.first || b.last() < a.first;
            faults.duplicates += usize::from(!apart);
            let inverted = b.first <= a.last();
            faults.inversions += usize::from(before.granted < after.asked && inverted);
            faults.overlaps += usize::from(after.granted < before.until || inverted);
        }
    }
    faults
}

/// One world from its seed.
fn run(seed: u64, weather: Weather, write_back: WriteBack) -> Faults {
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let world = World::new([3, 5, 4, 3, 2][seed as usize % 5], weather);
        let grants = Arc::default();
        let decay = tokio::spawn(Arc::clone(&world).decay());
        let mut clients = JoinSet::new();
        let mut redlocks = Vec::new();
        for id in 1..=3 {
            let redlock = world.redlock(write_back);
            redlocks.push(redlock.clone());
            clients.spawn(client(redlock, id, Arc::clone(&grants)));
        }
        clients.join_all().await;
        decay.abort();
        world.calm();
        // What was not released runs out; what was released does not come back.
        sleep(TTL + 3 * ms(1_000)).await;
        assert!(world.is_empty(), "seed {seed}: locks stay behind");
        for redlock in redlocks {
            let left = redlock.shared.stragglers.len();
            assert_eq!(left, 0, "seed {seed}: calls stay behind");
        }
        faults(Arc::into_inner(grants).unwrap().into_inner().unwrap())
    })
}

/// Enough to see each of the faults; a release build has time for more.
const SEEDS: u64 = if cfg!(debug_assertions) { 400 } else { 10_000 };

/// The seeds that fail.
fn run_all(
    weather: Weather,
    write_back: WriteBack,
    fails: impl Fn(&Faults) -> bool,
) -> Vec<(u64, Faults)> {
    let (mut failed, mut grants) = (Vec::new(), 0);
    for seed in 0..SEEDS {
        let faults = run(seed, weather, write_back);
        grants += faults.grants;
        if fails(&faults) {
            failed.push((seed, faults));
        }
    }
    assert!(grants > 3 * SEEDS as usize, "only {grants} grants");
    failed
}

fn tokens_fail(faults: &Faults) -> bool {
    faults.duplicates > 0 || faults.inversions > 0
}

const STORM: Weather = Weather {
    lost: 5,
    late: 5,
    expires: 10,
    forgets: 0,
};

#[test]
fn tokens_are_unique_and_in_order_whatever_is_lost_late_or_expires_early() {
    assert_eq!(run_all(STORM, WriteBack::Done, tokens_fail), []);
}

#[test]
fn tokens_are_unique_and_in_order_also_where_nodes_lose_their_counters() {
    let weather = Weather {
        forgets: 5,
        ..STORM
    };
    assert_eq!(run_all(weather, WriteBack::Done, tokens_fail), []);
}

#[test]
fn nobody_relies_on_the_lock_while_somebody_else_does() {
    let weather = Weather {
        expires: 0,
        ..STORM
    };
    let fails = |faults: &Faults| faults.overlaps > 0 || tokens_fail(faults);
    assert_eq!(run_all(weather, WriteBack::Done, fails), []);
}

/// The check can fail.
#[test]
fn without_the_second_round_tokens_are_neither_unique_nor_in_order() {
    let duplicates = |faults: &Faults| faults.duplicates > 0;
    let inversions = |faults: &Faults| faults.inversions > 0;
    assert_ne!(run_all(STORM, WriteBack::LeftOut, duplicates), []);
    assert_ne!(run_all(STORM, WriteBack::LeftOut, inversions), []);
}

/// Processes with all that belongs to them, on a network that loses and delays.
fn processes(seed: u64, weather: Weather) {
    const TURNS: usize = 4;
    const TASKS: usize = 2;
    const PROCESSES: usize = 4;

    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let world = World::new([3, 5, 4, 3, 1][seed as usize % 5], weather);
        let started = Instant::now();
        let (highest, inside) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicUsize::new(0)));
        let factories: Vec<_> = (0..PROCESSES)
            .map(|_| {
                let builder = LockFactory::builder(world.redlock(WriteBack::Done));
                builder.clock(Clock::tokio()).build().unwrap()
            })
            .collect();
        let mut tasks = JoinSet::new();
        for task in 0..PROCESSES * TASKS {
            let lock = factories[task % PROCESSES].create_lock("k").unwrap();
            let (highest, inside) = (Arc::clone(&highest), Arc::clone(&inside));
            tasks.spawn(async move {
                let options = LockOptions::builder()
                    .ttl(ms(10_000))
                    .interval(ms(1_000))
                    .retries(600)
                    .build()
                    .unwrap();
                for turn in 0..TURNS {
                    if turn == 1 {
                        // Callers leave at any time.
                        let gone = timeout(ms(fastrand::u64(..20)), lock.lock(options)).await;
                        drop(gone);
                    }
                    let guard = lock.lock(options).await.unwrap();
                    let others = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    assert_eq!(others, 0, "seed {seed}: two holders at the same time");
                    let token = guard.fencing_token().unwrap();
                    let before = highest.swap(token, std::sync::atomic::Ordering::SeqCst);
                    assert!(before < token, "seed {seed}: {token} after {before}");
                    sleep(ms(fastrand::u64(..5))).await;
                    assert!(guard.is_held());
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    if fastrand::bool() {
                        match guard.unlock().await {
                            Ok(Unlocked::Held) => {}
                            // A release whose answer was lost is sent again.
                            other => assert!(weather.lost > 0, "seed {seed}: {other:?}"),
                        }
                    }
                }
            });
        }
        tasks.join_all().await;
        let turns = (PROCESSES * TASKS * TURNS) as u32;
        assert!(
            started.elapsed() < turns * ms(1_000),
            "seed {seed}: no progress: {:?}",
            started.elapsed()
        );
        world.calm();
        sleep(ms(4_000)).await;
        for factory in &factories {
            assert_eq!(factory.keys(), 0, "seed {seed}: keys stay behind");
        }
        assert!(
            world.is_empty(),
            "seed {seed}: locks stay behind: {:?}",
            world.nodes
        );
    });
}

#[test]
fn processes_take_turns_and_leave_nothing_behind() {
    for seed in 0..SEEDS / 4 {
        processes(seed, Weather::default());
    }
}

#[test]
fn processes_take_turns_on_a_network_that_loses_and_delays() {
    let weather = Weather {
        lost: 2,
        late: 3,
        ..Weather::default()
    };
    for seed in 0..SEEDS / 4 {
        processes(seed, weather);
    }
}
