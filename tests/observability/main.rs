//! What is seen of locks from outside: spans, and metrics.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

mod capture;
#[path = "../lock/faulty.rs"]
mod faulty;
#[path = "../kit/mod.rs"]
mod kit;
mod metrics;
mod numbers;
mod panics;
mod secrets;
mod spans;
mod timing;

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};

use http::{Request, Response};
use tower_distributed_lock::{
    Clock, Lock, LockFactory, LockOptions, LockOptionsBuilder, storage::MemoryStorage,
};

use self::{
    faulty::{Fault, FaultyStorage, Op},
    kit::ms,
};

/// A third of this is a whole second; 2,968 ms of it can be relied on.
const TTL: Duration = ms(3_000);

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

fn impatient() -> LockOptions {
    options().retries(0).build().unwrap()
}

/// Over memory, on tokio's clock. Without fencing tokens, for want of which a lock would go back to
/// the storage instead of to the next caller here.
fn factory(memory: &MemoryStorage) -> LockFactory {
    LockFactory::builder(memory.clone())
        .clock(Clock::tokio())
        .fencing(false)
        .build()
        .unwrap()
}

fn memory() -> MemoryStorage {
    MemoryStorage::with_clock(Clock::tokio())
}

/// The same, to which messages of the storage come.
async fn listening(memory: &MemoryStorage) -> LockFactory {
    let factory = factory(memory);
    drop(factory.create_lock("first").unwrap().lock(patient()).await);
    settle().await;
    factory
}

/// A storage that fails as it is told to, and a factory over it.
fn faulty() -> (FaultyStorage, LockFactory) {
    faulty_over(&memory())
}

fn faulty_over(memory: &MemoryStorage) -> (FaultyStorage, LockFactory) {
    let storage = FaultyStorage::new(memory.clone());
    let factory = LockFactory::builder(storage.clone())
        .clock(Clock::tokio())
        .build()
        .unwrap();
    (storage, factory)
}

fn key(factory: &LockFactory) -> Lock {
    factory.create_lock("orders/42").unwrap()
}

/// Polls a future so often, and drops it. Whether it got to its end.
async fn polled<F: Future>(times: usize, future: F) -> bool {
    let mut future = pin!(future);
    for _ in 0..times {
        let is_ready = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await;
        if is_ready {
            return true;
        }
        tokio::task::yield_now().await;
    }
    false
}

/// Lets all tasks go on that can.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}
