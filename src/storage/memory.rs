//! Locks of one process, in memory.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    clock::{Clock, Timestamp},
    error::StorageError,
    key::LockName,
    storage::{
        AcquireReply, AcquireRequest, LockStorage, OwnerToken, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

/// Locks kept in this process's memory.
///
/// For trying the crate out, for tests, and for a service that runs as a single replica. Clones
/// share their locks, so two [`LockFactory`](crate::LockFactory)s over clones of one
/// `MemoryStorage` exclude each other as two replicas over one Redis do.
#[derive(Clone, Default)]
pub struct MemoryStorage {
    clock: Clock,
    locks: Arc<Mutex<Locks>>,
}

#[derive(Default)]
struct Locks {
    owners: HashMap<LockName, Owner>,
    /// Expired locks are thrown out when there are this many.
    sweep_at: usize,
}

#[derive(Clone, Copy)]
struct Owner {
    token: OwnerToken,
    until: Timestamp,
}

impl MemoryStorage {
    /// A storage with no locks, on the system's clock. A factory with [another
    /// clock](Self::with_clock) has to have a storage with that clock.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage with no locks, whose locks expire by `clock`.
    pub fn with_clock(clock: Clock) -> Self {
        Self {
            clock,
            locks: Arc::default(),
        }
    }

    /// How many locks are held.
    pub fn len(&self) -> usize {
        let now = self.clock.now();
        let locks = self.locks();
        locks
            .owners
            .values()
            .filter(|owner| owner.until > now)
            .count()
    }

    /// Whether no lock is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Removes every lock, whoever holds it: what a flushed or restarted Redis does. Holders learn
    /// of it at their next renewal.
    pub fn clear(&self) {
        *self.locks() = Locks::default();
    }

    fn locks(&self) -> MutexGuard<'_, Locks> {
        // Nothing below panics while it holds the lock with the map half changed.
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire_now(&self, request: &AcquireRequest) -> AcquireReply {
        let now = self.clock.now();
        let mut locks = self.locks();
        match locks.owners.get(&request.name) {
            Some(owner) if owner.until > now && owner.token != request.token => {
                AcquireReply::held(Some(owner.until.since(now)))
            }
            _ => {
                let owner = Owner {
                    token: request.token,
                    until: now + request.ttl,
                };
                locks.insert(request.name.clone(), owner, now);
                AcquireReply::granted()
            }
        }
    }

    fn renew_now(&self, request: &RenewRequest) -> RenewReply {
        let now = self.clock.now();
        match self.locks().owners.get_mut(&request.name) {
            Some(owner) if owner.until > now && owner.token == request.token => {
                owner.until = now + request.ttl;
                RenewReply::Renewed
            }
            _ => RenewReply::NotOurs,
        }
    }

    fn release_now(&self, request: &ReleaseRequest) -> ReleaseReply {
        let now = self.clock.now();
        let mut locks = self.locks();
        match locks.owners.get(&request.name) {
            Some(owner) if owner.token == request.token => {
                let in_time = owner.until > now;
                locks.owners.remove(&request.name);
                if in_time {
                    ReleaseReply::Released
                } else {
                    ReleaseReply::NotOurs
                }
            }
            _ => ReleaseReply::NotOurs,
        }
    }
}

impl Locks {
    fn insert(&mut self, name: LockName, owner: Owner, now: Timestamp) {
        // Locks that were never released would pile up. Sweeping when their number has doubled
        // costs a constant time per insert.
        if self.owners.len() >= self.sweep_at {
            self.owners.retain(|_, owner| owner.until > now);
            self.sweep_at = (2 * self.owners.len()).max(64);
            self.owners.shrink_to(self.sweep_at);
        }
        self.owners.insert(name, owner);
    }
}

impl LockStorage for MemoryStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Ok(self.acquire_now(request))
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        requests
            .iter()
            .map(|request| Ok(self.renew_now(request)))
            .collect()
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        Ok(self.release_now(request))
    }
}

impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStorage")
            .field("locks", &self.len())
            .finish_non_exhaustive()
    }
}
