//! rslock, a Redlock library: whoever finds a lock taken asks again after a random delay.
//!
//! It answers no error to a release that fails, and asks again after any error. So errors are looked
//! for in the server's own counts, and among the keys that are left: see `run.rs`.

use std::time::Duration;

use rslock::{LockGuard, LockManager};

use super::{Locks, TTL};
use crate::Error;

#[derive(Clone)]
pub(crate) struct Rslock {
    manager: LockManager,
}

impl Rslock {
    /// Three attempts up to 200 ms apart, and all over again until one succeeds.
    pub(crate) fn as_it_comes(url: &str) -> Self {
        Self {
            manager: LockManager::new(url.split(',').collect()),
        }
    }

    /// The delay is a random whole number of milliseconds below this one, and 0 is refused (by a
    /// panic): with 1, rslock asks again at once.
    pub(crate) fn tuned(url: &str) -> Self {
        let mut locks = Self::as_it_comes(url);
        locks.manager.set_retry(u32::MAX, Duration::from_millis(1));
        locks
    }
}

impl Locks for Rslock {
    type Guard = LockGuard;

    async fn lock(&self, key: &str) -> Result<LockGuard, Error> {
        Ok(self.manager.acquire(key, TTL).await?)
    }

    async fn release(&self, guard: LockGuard) -> Result<(), Error> {
        guard.release().await;
        Ok(())
    }
}
