//! The key that is in the path of an axum route.

use axum::extract::{RawPathParams, rejection::RawPathParamsRejection};
use http::{Request, StatusCode};
use thiserror::Error;

use super::{KeyFunction, KeyRejected, loan::Loan};
use crate::{error::BoxError, key::LockKey, middleware::request_key::RequestKey};

/// Parameters of the matched route are the key: on the route `/shops/{shop}/orders/{id}`,
/// `path_params("orders", ["shop", "id"])` locks `orders/7/42` for `/shops/7/orders/42`.
///
/// The parameters are percent-decoded, as handlers get them, and each is
/// [a part](LockKey::from_parts) of the key. With no names, all requests have the key that is the
/// namespace alone.
///
/// They are text: **`42` and `042` are different keys**. If the handler takes a number, or anything
/// else that has more than one spelling, use [`extracted`](super::extracted()) with the handler's
/// type.
///
/// axum has the parameters where the route is known: in a layer of the handler or the method
/// (`post(pay).route_layer(lock)`), of the router (`Router::route_layer`), but not around the whole
/// router. A parameter that is not there is a mistake in how the service is put together, so it is
/// answered 500, and logged once for the layer as an error; the error is a [`PathParamsError`] in a
/// [`KeyRejected`]. In `Router::layer` that is the answer to all requests to other routes, and to
/// those that would have been 404: take [`extracted`](super::extracted()) with an `Option<Path<..>>`
/// there.
///
/// ```
/// use axum::{Router, routing::post};
/// use tower_distributed_lock::{
///     DistributedLockLayer, LockFactory, middleware::key::path_params, storage::MemoryStorage,
/// };
///
/// # async fn pay() {}
/// let locks = LockFactory::new(MemoryStorage::new());
/// let lock = DistributedLockLayer::new(locks, path_params("orders", ["shop", "id"]));
/// let app: Router =
///     Router::new().route("/shops/{shop}/orders/{id}", post(pay).route_layer(lock));
/// ```
pub fn path_params<N: Into<String>>(
    namespace: impl Into<String>,
    names: impl IntoIterator<Item = N>,
) -> PathParams {
    PathParams {
        namespace: namespace.into(),
        names: names.into_iter().map(Into::into).collect(),
    }
}

/// Parameters of the matched axum route as the key. Made by [`path_params()`].
#[derive(Clone, Debug)]
pub struct PathParams {
    namespace: String,
    names: Vec<String>,
}

impl<B> KeyFunction<Request<B>> for PathParams {
    fn request_key(&self, request: &mut Request<B>) -> Result<RequestKey, BoxError> {
        let params = match Loan::of(request).extract(&()) {
            Some(Ok(params)) => Some(params),
            Some(Err(RawPathParamsRejection::InvalidUtf8InPathParam(error))) => {
                return Err(KeyRejected::new(error.status(), error).into());
            }
            _ => None,
        };
        let mut parts = Vec::with_capacity(1 + self.names.len());
        parts.push(self.namespace.as_str());
        for name in &self.names {
            let value = value(params.as_ref(), name);
            parts.push(
                value
                    .map_err(|error| KeyRejected::new(StatusCode::INTERNAL_SERVER_ERROR, error))?,
            );
        }
        Ok(RequestKey::one(LockKey::from_parts(parts)?))
    }
}

fn value<'a>(params: Option<&'a RawPathParams>, name: &str) -> Result<&'a str, PathParamsError> {
    let mut values = params
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| (key == name).then_some(value));
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value),
        (Some(_), Some(_)) => Err(PathParamsError::Twice(name.to_owned())),
        (None, _) => Err(PathParamsError::Missing(name.to_owned())),
    }
}

/// A parameter of the route that is to be in the key is not to be had: see [`path_params()`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PathParamsError {
    /// The matched route has none of this name, or no route was matched yet.
    #[error(
        "the matched route has no path parameter `{0}`: name it in the route (`/orders/{{{0}}}`), and put the lock's \
         layer on that route (`post(handler).route_layer(lock)`), as a layer around the whole `Router` sees no parameters"
    )]
    Missing(String),
    /// It is there more than once, in nested routers.
    #[error(
        "the matched route has the path parameter `{0}` more than once: give them different names"
    )]
    Twice(String),
}
