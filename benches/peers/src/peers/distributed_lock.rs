//! distributed-lock with its Redis backend: one `SET NX` an attempt, and a task for each lock that renews it.
//!
//! It does not wait: its `acquire` answers that the time is over when the first attempt finds the lock taken, whatever
//! time it was given. Over several servers it leaves locks behind on those that answered last, until they expire. So it
//! is measured on one server, where nobody else wants the lock.

use std::sync::Arc;

use distributed_lock_core::traits::{DistributedLock as _, LockHandle as _, LockProvider as _};
use distributed_lock_redis::{RedisLockHandle, RedisLockProvider};

use super::{Locks, TTL};
use crate::Error;

#[derive(Clone)]
pub(crate) struct DistributedLock {
    provider: Arc<RedisLockProvider>,
}

impl DistributedLock {
    pub(crate) async fn connect(urls: &str) -> Result<Self, Error> {
        let urls: Vec<&str> = urls.split(',').collect();
        let provider = RedisLockProvider::builder().urls(&urls).expiry(TTL).build();
        Ok(Self {
            provider: Arc::new(provider.await?),
        })
    }
}

impl Locks for DistributedLock {
    type Guard = RedisLockHandle;

    async fn lock(&self, key: &str) -> Result<RedisLockHandle, Error> {
        let lock = self.provider.create_lock(key);
        let handle = lock.try_acquire().await?;
        handle.ok_or_else(|| format!("the lock {key} is taken").into())
    }

    async fn release(&self, guard: RedisLockHandle) -> Result<(), Error> {
        Ok(guard.release().await?)
    }
}
