//! This library.

use std::time::Duration;

use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Redlock, Unlocked,
    storage::{LockStorage, RedisStorage},
};

use super::{Locks, TTL};
use crate::Error;

#[derive(Clone)]
pub(crate) struct Ours {
    pub(super) factory: LockFactory,
    pub(super) options: LockOptions,
}

impl Ours {
    /// The defaults but for the wait: nobody gives up within a run.
    pub(crate) async fn connect(url: &str) -> Result<Self, Error> {
        Self::over(RedisStorage::connect(url).await?, true)
    }

    pub(crate) async fn unfenced(url: &str) -> Result<Self, Error> {
        Self::over(RedisStorage::connect(url).await?, false)
    }

    pub(crate) async fn replicated(url: &str) -> Result<Self, Error> {
        let storage = RedisStorage::builder(url).replicas(1, Duration::from_millis(500));
        Self::over(storage.connect().await?, false)
    }

    /// Over the servers at these URLs, with commas in between.
    pub(crate) async fn redlock(urls: &str, fencing: bool) -> Result<Self, Error> {
        Self::over(Redlock::connect(urls.split(',')).await?, fencing)
    }

    fn over(storage: impl LockStorage, fencing: bool) -> Result<Self, Error> {
        let options = LockOptions::builder()
            .ttl(TTL)
            .interval(Duration::from_millis(100))
            .retries(600)
            .build()?;
        Ok(Self {
            factory: LockFactory::builder(storage).fencing(fencing).build()?,
            options,
        })
    }
}

impl Locks for Ours {
    type Guard = LockGuard;

    async fn lock(&self, key: &str) -> Result<LockGuard, Error> {
        Ok(self.factory.create_lock(key)?.lock(self.options).await?)
    }

    async fn release(&self, guard: LockGuard) -> Result<(), Error> {
        match guard.unlock().await? {
            Unlocked::Held => Ok(()),
            Unlocked::Lost => Err("a lock was lost".into()),
        }
    }

    async fn finish(&self) -> Result<(), Error> {
        match self.factory.drain(Duration::from_secs(5)).await {
            0 => Ok(()),
            keys => Err(format!("{keys} keys were still in use at the end").into()),
        }
    }
}

/// The same, but nobody waits for the server's word about a release.
#[derive(Clone)]
pub(crate) struct Dispatched(pub(crate) Ours);

impl Locks for Dispatched {
    type Guard = LockGuard;

    async fn lock(&self, key: &str) -> Result<LockGuard, Error> {
        self.0.lock(key).await
    }

    async fn release(&self, guard: LockGuard) -> Result<(), Error> {
        drop(guard);
        Ok(())
    }

    async fn finish(&self) -> Result<(), Error> {
        self.0.finish().await
    }
}
