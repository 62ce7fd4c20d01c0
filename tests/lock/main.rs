//! What `LockFactory`, `Lock`, `LockGuard` and `LockFuture` promise, without a server: over
//! `MemoryStorage`, and over a storage that fails as it is told to. Where time matters it is
//! tokio's, paused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

mod away;
mod delay;
mod faulty;
mod leaving;
mod loss;
mod queue;
mod runtimes;
mod set;
mod shutdown;
mod taking;

use std::{
    convert::Infallible,
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    task::Poll,
    thread,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    runtime::{self, Runtime},
    sync::oneshot,
    task::{JoinHandle, JoinSet, yield_now},
    time::{Instant, sleep, sleep_until, timeout},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, Lock, LockFactory, LockFactoryBuilder, LockFuture, LockGuard,
    LockKey, LockOptions, LockOptionsBuilder, Unlocked,
    error::{
        InvalidKey, InvalidSettings, LockError, LossReason, NotObtained, StorageError,
        StorageErrorKind, WaiterScope,
    },
    storage::{
        AcquireReply, AcquireRequest, LockStorage, MemoryStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

use self::faulty::{Cut, Fault, FaultyStorage, Gate, Op, Valve};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A third of this is a whole second; 2,968 ms of it can be relied on.
const TTL: Duration = ms(3_000);
const VALIDITY: Duration = ms(2_968);

/// Waits 10 s.
fn options() -> LockOptionsBuilder {
    LockOptions::builder()
        .ttl(TTL)
        .interval(ms(100))
        .retries(100)
}

fn patient() -> LockOptions {
    options().build().unwrap()
}

/// A storage behind a line that can break, and a factory at the other end. `memory` is what others
/// see.
struct World {
    memory: MemoryStorage,
    storage: FaultyStorage,
    factory: LockFactory,
}

impl World {
    fn new() -> Self {
        Self::with(|builder| builder)
    }

    fn with(
        setup: impl FnOnce(LockFactoryBuilder<FaultyStorage>) -> LockFactoryBuilder<FaultyStorage>,
    ) -> Self {
        let memory = MemoryStorage::with_clock(Clock::tokio());
        Self::over(FaultyStorage::new(memory.clone()), memory, setup)
    }

    fn over(
        storage: FaultyStorage,
        memory: MemoryStorage,
        setup: impl FnOnce(LockFactoryBuilder<FaultyStorage>) -> LockFactoryBuilder<FaultyStorage>,
    ) -> Self {
        let builder = LockFactory::builder(storage.clone()).clock(Clock::tokio());
        let factory = setup(builder).build().unwrap();
        Self {
            memory,
            storage,
            factory,
        }
    }

    /// Where waiters are told that the lock is theirs.
    fn listening() -> Self {
        let memory = MemoryStorage::with_clock(Clock::tokio());
        Self::over(
            FaultyStorage::listening(memory.clone()),
            memory,
            |builder| builder,
        )
    }

    fn lock(&self) -> Lock {
        self.factory.create_lock("key").unwrap()
    }

    /// The same lock, from another process.
    fn lock_elsewhere(&self) -> Lock {
        factory_over(&self.memory).create_lock("key").unwrap()
    }

    /// Nothing is left of any caller or holder.
    fn assert_empty(&self, when: &str) {
        assert_eq!(self.factory.keys(), 0, "keys, {when}");
        assert_eq!(self.factory.waiters(), 0, "waiters, {when}");
        assert!(self.memory.is_empty(), "{:?}, {when}", self.memory);
    }
}

fn factory_over(memory: &MemoryStorage) -> LockFactory {
    LockFactory::builder(memory.clone())
        .clock(Clock::tokio())
        .build()
        .unwrap()
}

fn not_obtained<T: std::fmt::Debug>(result: Result<T, LockError>) -> NotObtained {
    match result {
        Err(LockError::NotObtained(error)) => error,
        other => panic!("expected NotObtained: {other:?}"),
    }
}

fn storage_error<T: std::fmt::Debug>(result: Result<T, LockError>) -> StorageErrorKind {
    match result {
        Err(LockError::Storage(error)) => error.kind(),
        other => panic!("expected a storage error: {other:?}"),
    }
}

/// Lets every task that can go on go on. Paused time stands still meanwhile.
async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

/// Fails if `work` has not ended after 20 s of real time. What hangs is left hanging.
fn ends<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result
        .recv_timeout(Duration::from_secs(20))
        .expect("it panicked, or it hangs")
}
