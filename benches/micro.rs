//! What one lock costs without a server. One thread, locks in `MemoryStorage`.
//!
//! `cargo bench` runs it with the features that the tests have, metrics among them;
//! `cargo bench --manifest-path benches/peers/Cargo.toml` as most services are built.
//!
//! Loads take turns, and each figure is the median of the rounds. The allocator counts, which costs
//! every allocation a few nanoseconds. What needs a server is in `scripts/bench`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark that fails should end, and it prints"
)]

use std::{
    alloc::System,
    collections::HashMap,
    convert::Infallible,
    env,
    hint::black_box,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use http::{Request, Response};
use lockable::LockPool;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::{
    runtime::{self, Runtime},
    task::{JoinSet, yield_now},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, Lock, LockFactory, LockGuard, LockOptions, Unlocked,
    storage::MemoryStorage,
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How much is done. `cargo test --benches` only tries whether it runs.
struct Plan {
    rounds: usize,
    locks: u32,
    sizes: &'static [usize],
}

fn main() {
    let plan = match env::args().any(|argument| argument == "--bench") {
        true => Plan {
            rounds: 15,
            locks: 50_000,
            sizes: &[10, 100, 1_000, 10_000, 100_000, 1_000_000],
        },
        false => Plan {
            rounds: 1,
            locks: 10,
            sizes: &[10, 100],
        },
    };
    one_lock(&plan);
    one_request(&plan);
    keys(&plan);
    waiters(&plan);
}

fn one_lock(plan: &Plan) {
    let runtime = runtime();
    let lock = factory().create_lock("key").unwrap();
    let by_key = factory();
    let options = options();
    let mutex = Arc::new(tokio::sync::Mutex::new(()));
    let mutexes = Mutexes::default();
    let pool = LockPool::new();
    let times = plan.locks;
    let mut nanos: [Vec<f64>; 6] = Default::default();
    let mut allocations = 0.0;
    for _ in 0..plan.rounds {
        let loads = [
            runtime.block_on(measure(times, async || {
                give_back(lock.lock(options).await.unwrap()).await;
            })),
            runtime.block_on(measure(times, async || {
                drop(lock.lock(options).await.unwrap());
            })),
            runtime.block_on(measure(times, async || {
                let lock = by_key.create_lock(black_box("key")).unwrap();
                give_back(lock.lock(options).await.unwrap()).await;
            })),
            runtime.block_on(measure(times, async || {
                drop(Arc::clone(&mutex).lock_owned().await);
            })),
            runtime.block_on(measure(times, async || {
                mutexes.with(black_box("key")).await;
            })),
            runtime.block_on(measure(times, async || {
                let key = black_box("key").to_owned();
                drop(pool.async_lock(key).await);
            })),
        ];
        allocations = loads[0].1;
        for (nanos, load) in nanos.iter_mut().zip(loads) {
            nanos.push(load.0);
        }
    }
    println!("a lock that nobody else wants, and its release, ns:");
    let names = [
        "this crate, release confirmed",
        "this crate, guard dropped",
        "the same by its key, release confirmed",
        "tokio::sync::Mutex",
        "a map of tokio::sync::Mutex, by its key",
        "lockable::LockPool, by its key",
    ];
    for (name, nanos) in names.iter().zip(&nanos) {
        println!("  {name:<40} {}", summary(nanos));
    }
    println!("  allocations of one lock: {allocations:.2}");
}

/// Mutexes by key, those in use alone, as one would write it by hand.
#[derive(Default)]
struct Mutexes(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Mutexes {
    async fn with(&self, key: &str) {
        let mutex = Arc::clone(self.0.lock().unwrap().entry(key.to_owned()).or_default());
        let guard = Arc::clone(&mutex).lock_owned().await;
        drop(guard);
        let mut mutexes = self.0.lock().unwrap();
        // This one's and the map's.
        if Arc::strong_count(&mutex) == 2 {
            mutexes.remove(key);
        }
    }
}

fn one_request(plan: &Plan) {
    async fn handle(request: Request<()>) -> Result<Response<()>, Infallible> {
        drop(black_box(request));
        Ok(Response::new(()))
    }
    async fn call<S>(service: &mut S)
    where
        S: Service<Request<()>, Response = Response<()>, Error = Infallible>,
    {
        let request = Request::new(());
        let response = service.ready().await.unwrap().call(request).await.unwrap();
        assert!(response.status().is_success());
    }

    let runtime = runtime();
    let layer = DistributedLockLayer::new(factory(), |_: &Request<()>| "key").options(options());
    let mut bare = service_fn(handle);
    let mut dropped = layer.clone().layer(service_fn(handle));
    let mut confirmed = layer.clone().await_release(true).layer(service_fn(handle));
    let mut lean = layer.without_held_lock().layer(service_fn(handle));
    let mut rounds: [Vec<(f64, f64)>; 4] = Default::default();
    for _ in 0..plan.rounds {
        let loads = [
            runtime.block_on(measure(plan.locks, async || call(&mut bare).await)),
            runtime.block_on(measure(plan.locks, async || call(&mut dropped).await)),
            runtime.block_on(measure(plan.locks, async || call(&mut confirmed).await)),
            runtime.block_on(measure(plan.locks, async || call(&mut lean).await)),
        ];
        for (rounds, load) in rounds.iter_mut().zip(loads) {
            rounds.push(load);
        }
    }
    println!("a request, ns and allocations:");
    let names = [
        "no layer",
        "the layer as it comes",
        "the layer, await_release",
        "the layer, without_held_lock",
    ];
    for (name, rounds) in names.iter().zip(&rounds) {
        let nanos: Vec<f64> = rounds.iter().map(|round| round.0).collect();
        let allocations: Vec<f64> = rounds.iter().map(|round| round.1).collect();
        let allocations = median(&allocations);
        println!(
            "  {name:<40} {}, {allocations:.2} allocations",
            summary(&nanos)
        );
    }
}

/// Nanoseconds and allocations of each time, the background task's included.
async fn measure(times: u32, mut once: impl AsyncFnMut()) -> (f64, f64) {
    // What is made once, and lists that grow.
    for _ in 0..times / 10 + 1 {
        once().await;
    }
    settle().await;
    let region = Region::new(ALLOCATOR);
    let started = Instant::now();
    for _ in 0..times {
        once().await;
    }
    settle().await;
    let nanos = started.elapsed().as_nanos() as f64;
    let change = region.change();
    let allocations = change.allocations + change.reallocations;
    let times = f64::from(times);
    (nanos / times, allocations as f64 / times)
}

/// So many locks are held; what one more costs then, and how much memory each takes.
fn keys(plan: &Plan) {
    println!("keys that are held: ns to take and to give back one of them, bytes of one");
    for &size in plan.sizes {
        let runtime = runtime();
        let (taken, given, one_more, bytes) = runtime.block_on(async {
            let factory = factory();
            let options = options();
            // What a process has once.
            give_back(take(&factory, "first", options).await).await;
            let names: Vec<String> = (0..size).map(|number| number.to_string()).collect();
            let mut guards = Vec::with_capacity(size);
            let before = live();
            let started = Instant::now();
            for name in &names {
                guards.push(take(&factory, name, options).await);
            }
            let taken = started.elapsed();
            let bytes = (live() - before) as f64 / size as f64;

            let one_more = factory.create_lock("one more").unwrap();
            let (one_more, _) = measure(plan.locks, async || {
                give_back(one_more.lock(options).await.unwrap()).await;
            })
            .await;

            let started = Instant::now();
            for guard in guards {
                give_back(guard).await;
            }
            let given = started.elapsed();
            assert_eq!(factory.keys(), 0);
            (taken, given, one_more, bytes)
        });
        let [taken, given] = [taken, given].map(|time| time.as_nanos() as f64 / size as f64);
        println!(
            "  {size:>9} keys: {taken:>5.0} and {given:>5.0}, {bytes:>5.0} B; \
             a lock and release of one more: {one_more:.0}"
        );
    }
}

/// So many tasks wait for one key, and then have it one after the other.
fn waiters(plan: &Plan) {
    println!("waiters for one key, a task each: bytes of one, ns to come, ns of one turn");
    for &size in plan.sizes {
        let [ours, mutex] = [false, true].map(|mutex| {
            let runtime = runtime();
            runtime.block_on(async {
                let factory = factory();
                let lock = factory.create_lock("key").unwrap();
                // The runtime keeps room for as many tasks as were ready at once.
                warm_up(size).await;
                if mutex {
                    let mutex = Arc::new(tokio::sync::Mutex::new(()));
                    let held = Arc::clone(&mutex).lock_owned().await;
                    let waiter = move || {
                        let mutex = Arc::clone(&mutex);
                        async move { drop(mutex.lock_owned().await) }
                    };
                    wait(size, waiter, || drop(held)).await
                } else {
                    let held = lock.lock(options()).await.unwrap();
                    let waiter = {
                        let lock: Lock = lock.clone();
                        move || {
                            let waiting = lock.lock(options());
                            async move { drop(waiting.await.unwrap()) }
                        }
                    };
                    let seen = wait(size, waiter, || drop(held)).await;
                    assert_eq!((factory.keys(), factory.waiters()), (0, 0));
                    seen
                }
            })
        });
        let text = |(bytes, come, turn): (f64, f64, f64)| {
            format!("{bytes:>5.0} B, {come:>5.0}, {turn:>5.0}")
        };
        println!(
            "  {size:>9} waiters: {}; tokio::sync::Mutex: {}",
            text(ours),
            text(mutex)
        );
    }
}

async fn warm_up(tasks: usize) {
    let mut ready = JoinSet::new();
    (0..tasks).for_each(|_| drop(ready.spawn(async {})));
    while ready.join_next().await.is_some() {}
}

/// Bytes of a waiter, its task included; nanoseconds to begin, and of one turn.
async fn wait<F>(size: usize, waiter: impl Fn() -> F, start: impl FnOnce()) -> (f64, f64, f64)
where
    F: Future<Output = ()> + Send + 'static,
{
    let before = live();
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..size {
        tasks.spawn(waiter());
    }
    settle_for(size).await;
    let come = started.elapsed();
    let bytes = (live() - before) as f64 / size as f64;
    let started = Instant::now();
    start();
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let turns = started.elapsed();
    settle().await;
    let each = |time: Duration| time.as_nanos() as f64 / size as f64;
    (bytes, each(come), each(turns))
}

async fn take(factory: &LockFactory, name: &str, options: LockOptions) -> LockGuard {
    let lock = factory.create_lock(name).unwrap();
    lock.try_lock(options).await.unwrap()
}

async fn give_back(guard: LockGuard) {
    // A lock that was lost is another load than this one.
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

/// Whoever can go on without a timer has done so.
async fn settle() {
    settle_for(1_000).await;
}

async fn settle_for(tasks: usize) {
    // A runtime of one thread polls a few dozen tasks between two looks at this one.
    for _ in 0..20 + tasks / 16 {
        yield_now().await;
    }
}

fn live() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

fn runtime() -> Runtime {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

fn factory() -> LockFactory {
    LockFactory::builder(MemoryStorage::new())
        // The storage's map grows in one step, which takes a second at a million keys.
        .storage_timeout(Duration::from_secs(60))
        .max_waiters(usize::MAX)
        .max_waiters_per_key(usize::MAX)
        .build()
        .unwrap()
}

/// No lock is renewed and no caller asks again while something is measured.
fn options() -> LockOptions {
    LockOptions::builder()
        .ttl(Duration::from_secs(3_600))
        .interval(Duration::from_secs(60))
        .retries(60)
        .build()
        .unwrap()
}

/// The middle, and from which to which.
fn summary(values: &[f64]) -> String {
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(0.0, f64::max);
    format!("{:>6.0} ({min:.0}..{max:.0})", median(values))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
