//! What takes the key from a request.

use crate::{
    error::BoxError,
    middleware::request_key::{IntoRequestKey, RequestKey},
};

/// Takes from a request what it has to lock.
///
/// Implemented for functions and closures from `&Req` to anything that is
/// [`IntoRequestKey`], and for the ready-made ones of [`key`](crate::middleware::key).
///
/// Implement it for a type of your own to give a layer with its key function a name:
///
/// ```
/// use axum::extract::Request;
/// use tower_distributed_lock::{
///     DistributedLockLayer, LockFactory, LockKey,
///     error::BoxError,
///     middleware::{RequestKey, key::KeyFunction},
/// };
///
/// struct Tenant;
///
/// impl<B> KeyFunction<http::Request<B>> for Tenant {
///     fn request_key(&self, request: &mut http::Request<B>) -> Result<RequestKey, BoxError> {
///         let host = request.headers().get("host").ok_or("no host")?;
///         Ok(RequestKey::one(LockKey::from_parts([b"tenants", host.as_bytes()])?))
///     }
/// }
///
/// fn one_at_a_time(locks: LockFactory) -> DistributedLockLayer<Tenant> {
///     DistributedLockLayer::new(locks, Tenant)
/// }
/// # let _ = axum::Router::<()>::new().layer(one_at_a_time(LockFactory::new(
/// #     tower_distributed_lock::storage::MemoryStorage::new(),
/// # )));
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no key function for `{Req}`",
    label = "takes no key from a `{Req}`",
    note = "a key function is a function or closure from `&{Req}` to a `LockKey`, a `String`, an `Option` or `Result` of \
            these, or anything else that is `IntoRequestKey`",
    note = "or one of those in `tower_distributed_lock::middleware::key`; `extracted` takes axum extractors that need no \
            body, and the state that they need by `with_state`"
)]
pub trait KeyFunction<Req> {
    /// The key of `request`, no key, or why there is none.
    ///
    /// The request goes on as this leaves it.
    ///
    /// # Errors
    ///
    /// The request is rejected with [`Rejection::InvalidKey`](crate::middleware::Rejection::InvalidKey):
    /// status 400, or that of a [`KeyRejected`](super::KeyRejected).
    fn request_key(&self, request: &mut Req) -> Result<RequestKey, BoxError>;
}

impl<F, Req, T> KeyFunction<Req> for F
where
    F: Fn(&Req) -> T,
    T: IntoRequestKey,
{
    fn request_key(&self, request: &mut Req) -> Result<RequestKey, BoxError> {
        self(request).into_request_key()
    }
}
