//! One process's locks over a storage in memory, on paused time, and what they cost.

use std::{fmt, time::Duration};

use tokio::{
    runtime,
    task::{JoinSet, yield_now},
};
use tower_distributed_lock::{
    Clock, Lock, LockFactory, LockFactoryBuilder, LockOptions, storage::MemoryStorage,
};

use crate::heap;

/// Runs on one thread, so that what it costs is what this thread does, and on paused time.
pub fn paused<T>(future: impl Future<Output = T>) -> T {
    runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

/// Whoever can go on without a timer has done so.
pub async fn settle() {
    for _ in 0..20 {
        yield_now().await;
    }
}

/// A ttl that is renewed every 10 s; who waits does so for up to 20 h.
pub fn options() -> LockOptions {
    LockOptions::builder()
        .ttl(Duration::from_secs(30))
        .interval(Duration::from_secs(10))
        .retries(7_200)
        .build()
        .unwrap()
}

pub struct World {
    pub memory: MemoryStorage,
    pub factory: LockFactory,
}

impl World {
    pub fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub fn with(
        setup: impl FnOnce(LockFactoryBuilder<MemoryStorage>) -> LockFactoryBuilder<MemoryStorage>,
    ) -> Self {
        let memory = MemoryStorage::with_clock(Clock::tokio());
        let builder = LockFactory::builder(memory.clone()).clock(Clock::tokio());
        let builder = builder
            .max_waiters(usize::MAX)
            .max_waiters_per_key(usize::MAX);
        let factory = setup(builder).build().unwrap();
        Self { memory, factory }
    }

    pub fn lock(&self, key: &str) -> Lock {
        self.factory.create_lock(key).unwrap()
    }

    /// Nothing is left of any caller or holder.
    pub fn assert_empty(&self) {
        assert_eq!((self.factory.keys(), self.factory.waiters()), (0, 0));
        assert!(self.memory.is_empty());
    }
}

/// Has the runtime make room for so many tasks that are ready at once: it keeps that, and it is not
/// ours.
pub async fn warm_up(tasks: usize) {
    let mut ready = JoinSet::new();
    (0..tasks).for_each(|_| drop(ready.spawn(async {})));
    while ready.join_next().await.is_some() {}
}

/// What a step has cost, for each of so many.
#[derive(Clone, Copy)]
pub struct Cost {
    /// Bytes that were allocated and not freed.
    pub bytes: isize,
    pub time: Duration,
    of: usize,
}

impl Cost {
    pub fn bytes_each(&self) -> f64 {
        self.bytes as f64 / self.of as f64
    }

    pub fn nanos_each(&self) -> f64 {
        self.time.as_nanos() as f64 / self.of as f64
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} B {:.0} ns", self.bytes_each(), self.nanos_each())
    }
}

/// Begins to count.
pub struct Meter {
    live: usize,
    since: Duration,
}

impl Meter {
    pub fn start() -> Self {
        Self {
            live: heap::live(),
            since: thread_time(),
        }
    }

    /// What this thread has done since, for each of so many.
    pub fn cost(&self, of: usize) -> Cost {
        Cost {
            bytes: heap::live() as isize - self.live as isize,
            time: thread_time() - self.since,
            of,
        }
    }
}

/// How long this thread has had a processor, where the system tells: others may be busy too.
#[cfg(unix)]
pub fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(not(unix))]
pub fn thread_time() -> Duration {
    static START: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    START.elapsed()
}

/// What a step may take longer among a hundred times as many: caches hold the few and not the many, and
/// less where other processes use them too. What goes through all of them takes a hundred times as long.
pub const TIMES_LONGER: f64 = 10.0;

/// A figure of many is that of few, or so many times that at most.
pub fn grows(what: &str, few: f64, many: f64, times: f64) {
    assert!(
        many <= times * few,
        "{what}: {few:.0}, and {many:.0} of many"
    );
}
