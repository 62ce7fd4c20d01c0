//! What a layer is set to.

use std::{fmt, sync::Arc};

use crate::{lock::LockFactory, options::LockOptions};

/// What happens to a request whose lock is lost while its handler runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// The response future is dropped at the first await after the loss, and the request is rejected with
    /// [`Rejection::Lost`](super::Rejection::Lost). What the handler has handed to other tasks goes on.
    #[default]
    Cancel,
    /// The handler goes on. It can learn of the loss from its [`HeldLock`](super::HeldLock).
    Signal,
}

/// What happens to a request whose lock cannot be had because the storage could not be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnStorageFailure {
    /// It is rejected with [`Rejection::Storage`](super::Rejection::Storage).
    #[default]
    FailClosed,
    /// It is served without the lock. For routes where an outage is worse than two requests at a time.
    FailOpen,
}

/// What a layer and its services are set to.
pub(super) struct Settings<K, R, A> {
    pub(super) factory: LockFactory,
    pub(super) options: LockOptions,
    pub(super) on_loss: OnLoss,
    pub(super) on_storage_failure: OnStorageFailure,
    pub(super) await_release: bool,
    pub(super) key: Arc<K>,
    pub(super) on_reject: Arc<R>,
    pub(super) on_acquired: Arc<A>,
}

// Written by hand: the hooks are shared, so they need not be `Clone`.
impl<K, R, A> Clone for Settings<K, R, A> {
    fn clone(&self) -> Self {
        Self {
            factory: self.factory.clone(),
            options: self.options,
            on_loss: self.on_loss,
            on_storage_failure: self.on_storage_failure,
            await_release: self.await_release,
            key: Arc::clone(&self.key),
            on_reject: Arc::clone(&self.on_reject),
            on_acquired: Arc::clone(&self.on_acquired),
        }
    }
}

impl<K, R, A> fmt::Debug for Settings<K, R, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("factory", &self.factory)
            .field("options", &self.options)
            .field("on_loss", &self.on_loss)
            .field("on_storage_failure", &self.on_storage_failure)
            .field("await_release", &self.await_release)
            .finish_non_exhaustive()
    }
}
