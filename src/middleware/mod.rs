//! The tower middleware: one request at a time for each key, across all replicas of a service.
//!
//! [`DistributedLockLayer`] takes a lock key from each request with a function of yours, obtains
//! that lock, calls the inner service, holds the lock while the response future is polled, and
//! releases it when that completes or is dropped.
//!
//! ```
//! # #[cfg(feature = "axum")] {
//! use axum::{Router, extract::Path, routing::post};
//! use tower_distributed_lock::{
//!     DistributedLockLayer, LockFactory, LockKey, error::InvalidKey, middleware::key::extracted,
//!     storage::MemoryStorage,
//! };
//!
//! async fn pay() -> &'static str {
//!     "paid"
//! }
//!
//! fn order_key(Path(order): Path<u64>) -> Result<LockKey, InvalidKey> {
//!     LockKey::from_parts(["orders", &order.to_string()])
//! }
//!
//! let factory = LockFactory::new(MemoryStorage::new());
//! let one_at_a_time = DistributedLockLayer::new(factory, extracted(order_key));
//! let app: Router = Router::new().route("/orders/{id}/pay", post(pay).route_layer(one_at_a_time));
//! # }
//! ```
//!
//! # The path of a request
//!
//! 1. The [key function](key) sees the request. [No key](RequestKey): the request runs without a lock. An
//!    error: it is rejected.
//! 2. The request waits for the lock, for as long as the [options](crate::LockOptions) allow and the
//!    client waits (a gRPC client [says so](client_patience)). The
//!    inner service is not called meanwhile, though it is already reserved: do not put a
//!    `ConcurrencyLimit` inside this layer, or requests that wait for a lock use up its permits.
//! 3. The inner service is called. The request carries a [`HeldLock`] in its extensions, and by
//!    choice the fencing token in a [header](DistributedLockLayer::fencing_header).
//! 4. Before each poll of the response future the lock's deadline is looked at. If the lock is
//!    lost, the future is dropped and the request rejected (or the handler is only told, see
//!    [`OnLoss`]).
//! 5. When the response future is done or dropped, so is the lock: first the work ends, then the
//!    lock is released. The response does not wait for that (see
//!    [`DistributedLockLayer::await_release`]). A body that is streamed after the response head is
//!    no longer under the lock.
//!
//! A request whose client disconnects is dropped by the server, and so is its lock or its place in
//! the queue.
//!
//! # Rejections
//!
//! What a rejected request gets is up to [`OnReject`]; the default, [`DefaultOnReject`], speaks
//! HTTP and gRPC:
//!
//! | [`Rejection`] | HTTP | gRPC |
//! |---|---|---|
//! | `NotObtained`: somebody else held the lock for too long | 423 Locked, `Retry-After` where known | `ABORTED` |
//! | `TooManyWaiters` | 429 Too Many Requests, `Retry-After` where known | `RESOURCE_EXHAUSTED` |
//! | `Storage`: the storage could not be asked | 503 Service Unavailable | `UNAVAILABLE` |
//! | `Draining`: this process shuts down | 503 Service Unavailable | `UNAVAILABLE` |
//! | `Lost`: the lock was lost while the handler ran | 503 Service Unavailable | `ABORTED` |
//! | `InvalidKey`: the key function failed | 400 Bad Request, or the status of a [`KeyRejected`](key::KeyRejected) | `INVALID_ARGUMENT`, or what fits that status |

pub mod future;
mod guards;
mod held_lock;
pub mod key;
mod layer;
mod on_reject;
mod patience;
mod request_key;
mod service;
mod settings;

pub use self::{
    held_lock::{DefaultOnAcquired, FencingHeader, HeldLock, OnAcquired},
    layer::DistributedLockLayer,
    on_reject::{DefaultOnReject, OnReject, Protocol, Rejection},
    patience::client_patience,
    request_key::{IntoRequestKey, RequestKey},
    service::DistributedLock,
    settings::{OnLoss, OnStorageFailure},
};

#[cfg(feature = "axum")]
pub use self::held_lock::MissingLock;
