//! The service: starts a request on its way.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use tower_service::Service;

use crate::middleware::{
    future::ResponseFuture,
    held_lock::OnAcquired,
    hold::{Hold, HoldToHead},
    key::KeyFunction,
    on_reject::OnReject,
    settings::Settings,
};

/// Serialises the requests of the service `S` per key. Made by
/// [`DistributedLockLayer`](super::DistributedLockLayer); see the [module documentation](super).
pub struct DistributedLock<S, K, R, A, H = HoldToHead> {
    inner: S,
    settings: Arc<Settings<K, R, A, H>>,
}

impl<S, K, R, A, H> DistributedLock<S, K, R, A, H> {
    pub(super) fn new(inner: S, settings: Arc<Settings<K, R, A, H>>) -> Self {
        Self { inner, settings }
    }

    /// The service inside.
    ///
    /// ```
    /// use tower::Layer;
    /// use tower_distributed_lock::{DistributedLockLayer, LockFactory, storage::MemoryStorage};
    ///
    /// struct Client {
    ///     url: String,
    /// }
    ///
    /// let locks = LockFactory::new(MemoryStorage::new());
    /// let lock = DistributedLockLayer::new(locks, |account: &String| account.clone());
    /// let mut client = lock.layer(Client { url: "http://10.0.0.1".into() });
    /// client.get_mut().url = "http://10.0.0.2".into();
    /// assert_eq!(client.get_ref().url, "http://10.0.0.2");
    /// ```
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service [inside](Self::get_ref), to change it. Requests that wait for their lock go on with
    /// what they were called on.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Takes the layer off: what is left is the service [inside](Self::get_ref).
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, Req, K, R, A, H> Service<Req> for DistributedLock<S, K, R, A, H>
where
    S: Service<Req> + Clone,
    K: KeyFunction<Req>,
    R: OnReject<Req, S::Response, S::Error>,
    A: OnAcquired<Req>,
    H: Hold<S::Response>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, Req, K, R, A, H>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Req) -> Self::Future {
        // The request waits with the service that said it was ready; the next request gets the
        // fresh clone.
        let fresh = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, fresh);
        let key = self.settings.key.request_key(&mut request);
        ResponseFuture::new(ready, request, key, Arc::clone(&self.settings))
    }
}

// Written by hand: the settings are shared, so they need not be `Clone`.
impl<S: Clone, K, R, A, H> Clone for DistributedLock<S, K, R, A, H> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            settings: Arc::clone(&self.settings),
        }
    }
}

impl<S: fmt::Debug, K, R, A, H> fmt::Debug for DistributedLock<S, K, R, A, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DistributedLock")
            .field("inner", &self.inner)
            .field("settings", &self.settings)
            .finish()
    }
}

// For `add_service(layer.layer(service))`, without tonic's `named_layer`.
#[cfg(feature = "tonic")]
impl<S, K, R, A, H> tonic::server::NamedService for DistributedLock<S, K, R, A, H>
where
    S: tonic::server::NamedService,
{
    const NAME: &'static str = S::NAME;
}
