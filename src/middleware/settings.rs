//! What a layer is set to.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use crate::{
    error::NotObtained,
    lock::LockFactory,
    middleware::{
        guards::Acquire,
        on_reject::Rejection,
        request_key::{Keys, RequestKey},
    },
    options::LockOptions,
};

/// What happens to a request whose lock is lost while its handler runs, or while the body of its
/// response does, if the lock is [held](super::DistributedLockLayer::hold_to_body_end) as long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnLoss {
    /// The response future is dropped at the first await after the loss, and the request is
    /// rejected with [`Rejection::Lost`](super::Rejection::Lost). What the handler has handed to
    /// other tasks goes on.
    ///
    /// A body is dropped at its first poll after the loss, and cut off: the client sees that it is
    /// not the whole. A gRPC response ends with the status `ABORTED`.
    #[default]
    Cancel,
    /// The handler, or the body, goes on. It can learn of the loss from its [`HeldLock`](super::HeldLock).
    Signal,
}

/// What happens to a request whose lock cannot be had because the storage could not be asked. The documentation of
/// [`middleware`](super#when-the-storage-is-away) has an example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnStorageFailure {
    /// It is rejected with [`Rejection::Storage`](super::Rejection::Storage).
    #[default]
    FailClosed,
    /// It is served without the lock, at the first failure, not at the end of its wait. For routes
    /// where an outage of the storage is worse than two requests at a time. Such a request carries
    /// no [`HeldLock`](super::HeldLock).
    ///
    /// Requests that could not be queued
    /// ([`Rejection::TooManyWaiters`](super::Rejection::TooManyWaiters)) are rejected all the same.
    FailOpen,
}

/// What a layer and its services are set to.
pub(super) struct Settings<K, R, A, H> {
    pub(super) policy: Policy,
    pub(super) key: Arc<K>,
    pub(super) on_reject: Arc<R>,
    pub(super) on_acquired: Arc<A>,
    pub(super) hold: Arc<H>,
}

/// The part of the settings that is not code.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) factory: LockFactory,
    pub(super) options: LockOptions,
    pub(super) on_loss: OnLoss,
    pub(super) on_storage_failure: OnStorageFailure,
    pub(super) await_release: bool,
    /// Whether the log has been told that the key function cannot work here.
    pub(super) complained: Arc<AtomicBool>,
}

impl Policy {
    /// Starts to wait for a request's locks, if it wants any. `patience` is how long the client
    /// waits, if it says so.
    pub(super) fn lock(
        &self,
        key: &RequestKey,
        patience: impl FnOnce() -> Option<Duration>,
    ) -> Result<Option<Acquire>, Rejection> {
        let options = || match patience() {
            // An answer of the storage could not be waited for.
            Some(Duration::ZERO) => Err(Rejection::NotObtained(NotObtained {
                waited: Duration::ZERO,
                attempts: 0,
                holder_ttl: None,
            })),
            Some(limit) => Ok(key.options.unwrap_or(self.options).within(limit)),
            None => Ok(key.options.unwrap_or(self.options)),
        };
        let acquire = match &key.keys {
            Keys::None => return Ok(None),
            Keys::One(key) => Acquire::One(self.factory.lock_of(key).lock(options()?)),
            Keys::Several(keys) => {
                Acquire::Several(self.factory.lock_set_of(keys).lock(options()?))
            }
        };
        Ok(Some(match self.on_storage_failure {
            OnStorageFailure::FailClosed => acquire,
            OnStorageFailure::FailOpen => acquire.impatient(),
        }))
    }
}

// Written by hand: the hooks are shared, so they need not be `Clone`.
impl<K, R, A, H> Clone for Settings<K, R, A, H> {
    fn clone(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            key: Arc::clone(&self.key),
            on_reject: Arc::clone(&self.on_reject),
            on_acquired: Arc::clone(&self.on_acquired),
            hold: Arc::clone(&self.hold),
        }
    }
}

impl<K, R, A, H> fmt::Debug for Settings<K, R, A, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}
