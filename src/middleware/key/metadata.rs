//! The key that is in gRPC metadata.

use http::{HeaderName, Request};

use super::{KeyFunction, base64, header};
use crate::{error::BoxError, key::LockKey, middleware::request_key::RequestKey};

/// A value of the gRPC metadata is the key: `metadata("accounts", HeaderName::from_static("account"))`
/// locks `accounts/17` for a call with `account: 17`.
///
/// As [`header()`](super::header()), but a name that ends in `-bin` has binary values, and the key
/// is made of what they say: with padding or without, equal bytes are equal keys.
///
/// ```
/// use http::HeaderName;
/// use tower_distributed_lock::{DistributedLockLayer, LockFactory, middleware::key::metadata};
///
/// # let locks = LockFactory::new(tower_distributed_lock::storage::MemoryStorage::new());
/// let lock = DistributedLockLayer::new(
///     locks,
///     metadata("accounts", HeaderName::from_static("account-bin")),
/// );
/// // tonic::transport::Server::builder().layer(lock)
/// # let _ = lock;
/// ```
pub fn metadata(namespace: impl Into<String>, name: HeaderName) -> Metadata {
    Metadata {
        namespace: namespace.into(),
        name,
    }
}

/// A value of the gRPC metadata as the key. Made by [`metadata()`].
#[derive(Clone, Debug)]
pub struct Metadata {
    namespace: String,
    name: HeaderName,
}

impl<B> KeyFunction<Request<B>> for Metadata {
    fn request_key(&self, request: &mut Request<B>) -> Result<RequestKey, BoxError> {
        let value = header::only_value(request.headers(), &self.name)?;
        let namespace = self.namespace.as_bytes();
        let key = if self.name.as_str().ends_with("-bin") {
            let bytes = base64::decode(value.as_bytes())
                .ok_or_else(|| header::HeaderError::NotBase64(self.name.clone()))?;
            LockKey::from_parts([namespace, &bytes])
        } else {
            LockKey::from_parts([namespace, value.as_bytes()])
        };
        Ok(RequestKey::one(key?))
    }
}
