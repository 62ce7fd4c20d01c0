//! The service: starts a request on its way.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use tower_service::Service;

use crate::middleware::{
    future::ResponseFuture, held_lock::OnAcquired, key::KeyFunction, on_reject::OnReject,
    settings::Settings,
};

/// Serialises the requests of the service `S` per key. Made by
/// [`DistributedLockLayer`](super::DistributedLockLayer); see the [module documentation](super).
pub struct DistributedLock<S, K, R, A> {
    inner: S,
    settings: Arc<Settings<K, R, A>>,
}

impl<S, K, R, A> DistributedLock<S, K, R, A> {
    pub(super) fn new(inner: S, settings: Arc<Settings<K, R, A>>) -> Self {
        Self { inner, settings }
    }

    /// The service inside.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, to change it. Requests that wait for their lock go on with what they
    /// were called on.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Takes the layer off.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, Req, K, R, A> Service<Req> for DistributedLock<S, K, R, A>
where
    S: Service<Req> + Clone,
    K: KeyFunction<Req>,
    R: OnReject<Req, S::Response, S::Error>,
    A: OnAcquired<Req>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, Req, K, R, A>;

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
impl<S: Clone, K, R, A> Clone for DistributedLock<S, K, R, A> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            settings: Arc::clone(&self.settings),
        }
    }
}

impl<S: fmt::Debug, K, R, A> fmt::Debug for DistributedLock<S, K, R, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DistributedLock")
            .field("inner", &self.inner)
            .field("settings", &self.settings)
            .finish()
    }
}
