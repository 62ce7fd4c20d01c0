//! The key that is in a header.

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use thiserror::Error;

use super::KeyFunction;
use crate::{error::BoxError, key::LockKey, middleware::request_key::RequestKey};

/// The value of a header is the key: `header("accounts", HeaderName::from_static("x-account"))`
/// locks `accounts/17` for a request with `x-account: 17`.
///
/// The header has to be there once and must not be empty: otherwise the request is rejected with
/// 400, and the error is a [`HeaderError`]. (If there were two, the handler might look at the
/// other.) The value counts as it is written, byte by byte.
///
/// ```
/// use http::HeaderName;
/// use tower_distributed_lock::{
///     DistributedLockLayer, LockFactory, middleware::key::{Header, header},
/// };
///
/// fn one_per_account(locks: LockFactory) -> DistributedLockLayer<Header> {
///     DistributedLockLayer::new(locks, header("accounts", HeaderName::from_static("x-account")))
/// }
/// ```
pub fn header(namespace: impl Into<String>, name: HeaderName) -> Header {
    Header {
        namespace: namespace.into(),
        name,
    }
}

/// The value of a header as the key. Made by [`header()`].
#[derive(Clone, Debug)]
pub struct Header {
    namespace: String,
    name: HeaderName,
}

impl<B> KeyFunction<Request<B>> for Header {
    fn request_key(&self, request: &mut Request<B>) -> Result<RequestKey, BoxError> {
        let value = only_value(request.headers(), &self.name)?;
        let parts = [self.namespace.as_bytes(), value.as_bytes()];
        Ok(RequestKey::one(LockKey::from_parts(parts)?))
    }
}

/// The value of a header that has to be there once.
pub(super) fn only_value<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<&'a HeaderValue, HeaderError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Err(HeaderError::Missing(name.clone())),
        (Some(_), Some(_)) => Err(HeaderError::Several(name.clone())),
        (Some(value), None) if value.is_empty() => Err(HeaderError::Empty(name.clone())),
        (Some(value), None) => Ok(value),
    }
}

/// A header that is to be the key cannot be it: see [`header()`] and [`metadata()`](super::metadata()).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It is not there.
    #[error("the header `{0}` is missing")]
    Missing(HeaderName),
    /// It is there more than once.
    #[error("the header `{0}` is there more than once")]
    Several(HeaderName),
    /// It is there without a value.
    #[error("the header `{0}` is empty")]
    Empty(HeaderName),
    /// It is binary gRPC metadata, and no base64.
    #[error("the header `{0}` is not valid base64")]
    NotBase64(HeaderName),
}
