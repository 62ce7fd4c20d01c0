//! The layer: what is locked, for how long, and what happens when it cannot be.

use std::{fmt, sync::Arc};

use http::HeaderName;
use tower_layer::Layer;

use crate::{
    lock::LockFactory,
    middleware::{
        held_lock::{DefaultOnAcquired, FencingHeader},
        on_reject::DefaultOnReject,
        service::DistributedLock,
        settings::{OnLoss, OnStorageFailure, Policy, Settings},
    },
    options::LockOptions,
};

/// Serialises requests per key. See the [module documentation](super).
///
/// `K` is the [key function](super::key::KeyFunction), `R` the [`OnReject`](super::OnReject) and `A` the
/// [`OnAcquired`](super::OnAcquired) hook.
pub struct DistributedLockLayer<K, R = DefaultOnReject, A = DefaultOnAcquired> {
    settings: Settings<K, R, A>,
}

impl<K> DistributedLockLayer<K> {
    /// A layer that takes the lock key from each request with `key`: a function from `&Request` to
    /// anything that is [`IntoRequestKey`](super::IntoRequestKey), or one of [`key`](super::key).
    pub fn new(factory: LockFactory, key: K) -> Self {
        let settings = Settings {
            policy: Policy {
                factory,
                options: LockOptions::default(),
                on_loss: OnLoss::default(),
                on_storage_failure: OnStorageFailure::default(),
                await_release: false,
            },
            key: Arc::new(key),
            on_reject: Arc::new(DefaultOnReject),
            on_acquired: Arc::new(DefaultOnAcquired),
        };
        Self { settings }
    }
}

impl<K, R, A> DistributedLockLayer<K, R, A> {
    /// How long locks last and how long requests wait for them. Default [`LockOptions::default`].
    #[must_use]
    pub fn options(mut self, options: LockOptions) -> Self {
        self.settings.policy.options = options;
        self
    }

    /// What happens to a request whose lock is lost while its handler runs. Default
    /// [`OnLoss::Cancel`].
    #[must_use]
    pub fn on_loss(mut self, on_loss: OnLoss) -> Self {
        self.settings.policy.on_loss = on_loss;
        self
    }

    /// What happens to a request when the storage cannot be asked. Default
    /// [`OnStorageFailure::FailClosed`].
    #[must_use]
    pub fn on_storage_failure(mut self, on_storage_failure: OnStorageFailure) -> Self {
        self.settings.policy.on_storage_failure = on_storage_failure;
        self
    }

    /// Whether a response waits until the storage has confirmed the release. Default `false`.
    ///
    /// With `true` the client hears of its success only when the lock is free for its next request,
    /// and a lock that turns out to have been lost counts as lost (see [`OnLoss`]). It costs one
    /// round trip to the storage.
    #[must_use]
    pub fn await_release(mut self, await_release: bool) -> Self {
        self.settings.policy.await_release = await_release;
        self
    }

    /// What a rejected request gets. Default [`DefaultOnReject`].
    #[must_use]
    pub fn on_reject<R2>(self, on_reject: R2) -> DistributedLockLayer<K, R2, A> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: Arc::new(on_reject),
            on_acquired: self.settings.on_acquired,
        };
        DistributedLockLayer { settings }
    }

    /// What is done with a request that has its lock. Default [`DefaultOnAcquired`].
    #[must_use]
    pub fn on_acquired<A2>(self, on_acquired: A2) -> DistributedLockLayer<K, R, A2> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: self.settings.on_reject,
            on_acquired: Arc::new(on_acquired),
        };
        DistributedLockLayer { settings }
    }
}

impl<K, R> DistributedLockLayer<K, R> {
    /// Passes the [fencing token](super::HeldLock::fencing_token) on to the inner service, as a
    /// decimal number in this header of the request. Default: it is in the request's
    /// [`HeldLock`](super::HeldLock) alone.
    ///
    /// What a client sends in this header is removed, under exactly this name: a backend that takes
    /// `-` and `_` for the same needs more.
    ///
    /// This is a hook as [`on_acquired`](Self::on_acquired) sets it, and so is replaced by it.
    #[must_use]
    pub fn fencing_header(self, name: HeaderName) -> DistributedLockLayer<K, R, FencingHeader> {
        self.on_acquired(FencingHeader::new(name))
    }
}

impl<S, K, R, A> Layer<S> for DistributedLockLayer<K, R, A> {
    type Service = DistributedLock<S, K, R, A>;

    fn layer(&self, inner: S) -> Self::Service {
        DistributedLock::new(inner, Arc::new(self.settings.clone()))
    }
}

// Written by hand: the hooks are shared, so they need not be `Clone`.
impl<K, R, A> Clone for DistributedLockLayer<K, R, A> {
    fn clone(&self) -> Self {
        Self {
            settings: self.settings.clone(),
        }
    }
}

impl<K, R, A> fmt::Debug for DistributedLockLayer<K, R, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DistributedLockLayer")
            .field(&self.settings)
            .finish()
    }
}
