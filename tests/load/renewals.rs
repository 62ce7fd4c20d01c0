//! Many locks that have to be renewed at the same time, by a storage that has other things to do.

use std::{future::pending, sync::Mutex, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};
use tower_distributed_lock::{
    Clock, LockFactory, LockGuard, LockOptions,
    error::StorageError,
    storage::{
        AcquireReply, AcquireRequest, LockStorage, MemoryStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

use crate::{kit::ms, world::paused};

const TTL: Duration = ms(3_000);

fn options() -> LockOptions {
    LockOptions::builder().ttl(TTL).build().unwrap()
}

/// Renews one after the other, and each takes a while; never those whose key begins with `hung`.
struct Slow {
    memory: MemoryStorage,
    each: Duration,
    /// When it is done with all that it was sent.
    done: Mutex<Instant>,
}

impl Slow {
    fn factory(each: Duration) -> LockFactory {
        let memory = MemoryStorage::with_clock(Clock::tokio());
        let done = Mutex::new(Instant::now());
        let slow = Self { memory, each, done };
        LockFactory::builder(slow)
            .clock(Clock::tokio())
            .build()
            .unwrap()
    }
}

impl LockStorage for Slow {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.memory.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let mut replies = Vec::new();
        let mut hangs = false;
        for request in requests {
            if request.name.key().starts_with("hung") {
                hangs = true;
            } else {
                replies.extend(self.memory.renew(std::slice::from_ref(request)).await);
            }
        }
        let done = {
            let mut done = self.done.lock().unwrap();
            *done = (*done).max(Instant::now()) + self.each * requests.len() as u32;
            *done
        };
        sleep_until(done).await;
        if hangs {
            // What the others have for an answer is not told either.
            return pending().await;
        }
        replies
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.memory.release(request).await
    }
}

async fn take(factory: &LockFactory, key: &str) -> LockGuard {
    let lock = factory.create_lock(key).unwrap();
    lock.try_lock(options()).await.unwrap()
}

pub fn a_lock_whose_renewal_hangs_takes_no_other_with_it() {
    paused(async {
        let factory = Slow::factory(Duration::ZERO);
        // As those are that a node of a cluster has which stands still.
        let hung = [
            take(&factory, "hung/1").await,
            take(&factory, "hung/2").await,
        ];
        let mut others = Vec::new();
        for number in 0..100 {
            others.push(take(&factory, &format!("other/{number}")).await);
        }
        sleep(10 * TTL).await;
        assert!(hung.iter().all(|guard| !guard.is_held()));
        let held = others.iter().filter(|guard| guard.is_held()).count();
        assert_eq!(held, 100);
    });
}

pub fn locks_that_are_due_at_once_are_renewed_in_turn() {
    paused(async {
        // 20,000 a second; all of these take 0.75 s of each second, and a call may take 0.6 s.
        let factory = Slow::factory(Duration::from_micros(50));
        let mut guards = Vec::new();
        for number in 0..15_000 {
            guards.push(take(&factory, &number.to_string()).await);
        }
        sleep(10 * TTL).await;
        let held = guards.iter().filter(|guard| guard.is_held()).count();
        assert_eq!(held, guards.len());
    });
}
