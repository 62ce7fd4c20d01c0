//! What a key function may return.

use crate::{error::BoxError, key::LockKey};

/// What a request has to lock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestKey {
    /// Nothing: the request runs without a lock.
    None,
    /// One key.
    One(LockKey),
}

/// What a key function may return: a [`LockKey`], owned text, an `Option` or a `Result` of these,
/// or both.
///
/// `None` means that the request runs without a lock; an error rejects it.
///
/// Name the resource, not the URL: a handler that takes `Path<u64>` treats `/orders/42` and
/// `/orders/042` as one, so the key function has to parse the id as well.
///
/// ```
/// use http::Request;
/// use tower_distributed_lock::{LockKey, error::InvalidKey};
///
/// // Locks nothing for GET requests, and the whole service for all others.
/// fn writes<B>(request: &Request<B>) -> Option<Result<LockKey, InvalidKey>> {
///     (request.method() != http::Method::GET).then(|| LockKey::new("writes"))
/// }
///
/// // Demands a header.
/// fn account<B>(request: &Request<B>) -> Result<LockKey, Box<dyn std::error::Error + Send + Sync>> {
///     let account = request.headers().get("x-account").ok_or("no x-account header")?;
///     Ok(LockKey::from_parts(["account".as_bytes(), account.as_bytes()])?)
/// }
/// ```
pub trait IntoRequestKey {
    /// The key, no key, or why there is none.
    ///
    /// # Errors
    ///
    /// The request is rejected with [`Rejection::InvalidKey`](super::Rejection::InvalidKey).
    fn into_request_key(self) -> Result<RequestKey, BoxError>;
}

impl IntoRequestKey for RequestKey {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        Ok(self)
    }
}

impl IntoRequestKey for LockKey {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        Ok(RequestKey::One(self))
    }
}

impl IntoRequestKey for String {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.as_str().into_request_key()
    }
}

impl IntoRequestKey for &str {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        let key = LockKey::new(self)?;
        Ok(RequestKey::One(key))
    }
}

impl<T: IntoRequestKey> IntoRequestKey for Option<T> {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.map_or(Ok(RequestKey::None), T::into_request_key)
    }
}

impl<T: IntoRequestKey, E: Into<BoxError>> IntoRequestKey for Result<T, E> {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.map_err(Into::into)?.into_request_key()
    }
}
