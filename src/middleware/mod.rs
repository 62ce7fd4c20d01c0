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
//! 1. The [key function](key) sees the request. [No key](RequestKey): the request runs without a
//!    lock. An error: it is rejected.
//! 2. The request waits for the lock, for as long as the [options](crate::LockOptions) allow and the
//!    client waits (a gRPC client [says so](client_patience)). The inner service is not called
//!    meanwhile, though it is already reserved: do not put a `ConcurrencyLimit` inside this layer,
//!    or requests that wait for a lock use up its permits.
//! 3. The inner service is called, in the `tracing` span of its lock, which has the key: so what it
//!    logs has it too. The request carries a [`HeldLock`] in its extensions, and by choice the
//!    fencing token in a [header](DistributedLockLayer::fencing_header).
//! 4. Before each poll of the response future the lock's deadline is looked at. If the lock is
//!    lost, the future is dropped and the request rejected (or the handler is only told, see
//!    [`OnLoss`]).
//! 5. When the response future is done or dropped, so is the lock: first the work ends, then the
//!    lock is released. The response does not wait for that (see
//!    [`DistributedLockLayer::await_release`]). A body that is streamed after the response head is
//!    no longer under the lock, unless the layer is told to hold it [to the end of the
//!    body](#streams).
//!
//! A request whose client disconnects is dropped by the server, and so is its lock or its place in
//! the queue.
//!
//! # Streams
//!
//! With [`DistributedLockLayer::hold_to_body_end`] the lock goes on into the body of the response,
//! for downloads, server-sent events and gRPC streams. The response keeps its type: the bodies of
//! axum and tonic, and others that are boxed, can wrap one of their own kind (`HoldBody`).
//!
//! - The lock is released with the last frame: trailers, a frame after which the body says that it
//!   is at its end, or the end itself. So it is by an error of the body, and when the body is
//!   dropped, as the server does when the client disconnects, resets its HTTP/2 stream, or asked
//!   with `HEAD`. A response without a body gives the lock back with its head, also one that
//!   upgrades the connection.
//! - First the body is dropped, then the lock is released. Nobody waits for that: of
//!   [`await_release`](DistributedLockLayer::await_release) only responses without a body take
//!   notice.
//! - Before each poll of the body, and after it, the lock's deadline is looked at: no frame is
//!   passed on at or past it. If the lock is lost, the body is dropped and ends with an error. An
//!   HTTP/1 connection is closed and an HTTP/2 stream reset, so the client does not take what it
//!   has got for the whole; a gRPC response (by its `content-type`) ends with the status `ABORTED`.
//!   With [`OnLoss::Signal`] it goes on. The [`OnReject`] hook is not asked: the head has been sent.
//! - A [`HeldLock`] works as it does in the handler, so a stream can look at it, pass the fencing
//!   token on, or [release](HeldLock::release) early and go on without.
//! - The lock is renewed meanwhile, up to [`max_hold`](crate::LockOptionsBuilder::max_hold), 5
//!   minutes unless set: no stream lasts longer than that.
//! - A client that reads nothing keeps the server from polling the body. The lock is lost at
//!   `max_hold` all the same, and others have it at most a ttl later; the body itself stays until
//!   the client reads on or goes.
//! - A client that has gone without a word is known to be gone when a write fails, so send
//!   something from time to time (`KeepAlive` of axum's `Sse`, HTTP/2 pings of a tonic server).
//!
//! # tonic
//!
//! `Server::builder().layer(lock)` locks the calls of all services, `add_service(lock.named_layer(..))`
//! with tonic's `LayerExt` those of one. Keys come from the metadata, which are the headers of the
//! request: its message is not read yet. By default a unary call is locked to its answer and a
//! stream to its head; [`hold_to_body_end`](DistributedLockLayer::hold_to_body_end) (feature
//! `tonic`) holds to the end of all kinds of calls.
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
//! | `Lost`, `LostWhileWaiting`: the lock was lost while the handler ran (see above for [streams](#streams)), or one of several before | 503 Service Unavailable | `ABORTED` |
//! | `InvalidKey`: the key function failed | 400 Bad Request, or the status and headers of a [`KeyRejected`](key::KeyRejected) | `INVALID_ARGUMENT`, or what fits that status |
//!
//! [`ProblemDetails`] adds a body that says so to programs (RFC 9457). A hook of your own is a
//! function from the rejection to the response:
//!
//! ```
//! use axum::{Json, extract::Request, response::IntoResponse};
//! # use tower_distributed_lock::{DistributedLockLayer, LockFactory, middleware::Rejection, storage::MemoryStorage};
//! # let factory = LockFactory::new(MemoryStorage::new());
//! # let key = |_: &Request| "reports".to_owned();
//! # let layer =
//! DistributedLockLayer::new(factory, key).on_reject(|rejection: Rejection| {
//!     // The headers: `Retry-After` where known, and those of an extractor that refused.
//!     (rejection.status(), rejection.headers(), Json([rejection.reason()])).into_response()
//! })
//! # ;
//! # let _: axum::Router = axum::Router::new().route("/", axum::routing::get(|| async {}).route_layer(layer));
//! ```
//!
//! # When the storage is away
//!
//! Each layer decides for its own routes. Here payments are refused, and reports are served without
//! a lock:
//!
//! ```
//! use axum::{Router, extract::Request, routing::{get, post}};
//! use tower_distributed_lock::{
//!     DistributedLockLayer, LockFactory, middleware::OnStorageFailure, storage::MemoryStorage,
//! };
//!
//! let locks = LockFactory::new(MemoryStorage::new());
//! let lock = DistributedLockLayer::new(locks, |request: &Request| request.method().to_string());
//! let open = lock.clone().on_storage_failure(OnStorageFailure::FailOpen);
//! let app: Router = Router::new()
//!     .route("/pay", post(|| async { "paid" }).route_layer(lock))
//!     .route("/report", get(|| async { "all is well" }).route_layer(open));
//! ```
//!
//! # Services that are no HTTP services
//!
//! Nothing but the defaults of the two hooks knows of HTTP. A queue's worker, say, has requests, answers
//! and errors of its own:
//!
//! ```
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//! use tower_distributed_lock::{
//!     DistributedLockLayer, HeldLock, LockFactory, LockKey, middleware::Rejection,
//!     storage::MemoryStorage,
//! };
//!
//! struct Job {
//!     account: u64,
//!     lock: Option<HeldLock>,
//! }
//!
//! #[derive(Debug)]
//! enum JobError {
//!     /// To be put back into the queue.
//!     Rejected(Rejection),
//!     Failed,
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), JobError> {
//! let locks = LockFactory::new(MemoryStorage::new());
//! let one_at_a_time = DistributedLockLayer::new(locks, |job: &Job| {
//!     LockKey::from_parts(["accounts", &job.account.to_string()])
//! })
//! .reject_with_error(JobError::Rejected)
//! // Or `without_held_lock()`, if the job need not know.
//! .on_acquired(|job: &mut Job, lock: HeldLock| job.lock = Some(lock));
//!
//! let worker = ServiceBuilder::new()
//!     .layer(one_at_a_time)
//!     .service(service_fn(async |job: Job| job.lock.ok_or(JobError::Failed)));
//! worker.oneshot(Job { account: 7, lock: None }).await?;
//! # Ok(())
//! # }
//! ```
//!
//! In front of a client it is the same, and a client whose error type has no room for a rejection
//! takes its errors as [`BoxError`](crate::error::BoxError):
//!
//! ```
//! # use tower::{ServiceBuilder, ServiceExt, service_fn};
//! # use tower_distributed_lock::{DistributedLockLayer, LockFactory, error::BoxError, storage::MemoryStorage};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! # let locks = LockFactory::new(MemoryStorage::new());
//! # let client = service_fn(async |account: String| Ok::<_, std::io::Error>(account.len()));
//! let one_at_a_time = DistributedLockLayer::new(locks, |account: &String| account.clone())
//!     .reject_with_error(|rejection| rejection)
//!     .without_held_lock();
//! let client = ServiceBuilder::new()
//!     .layer(one_at_a_time)
//!     .map_err(BoxError::from)
//!     .service(client);
//! client.oneshot("account-7".to_owned()).await?;
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "body")]
mod body;
pub mod future;
mod guards;
mod held_lock;
mod hold;
pub mod key;
mod layer;
mod on_reject;
mod patience;
mod problem;
pub(crate) mod request_key;
mod server_timing;
mod service;
mod settings;

pub use self::{
    held_lock::{DefaultOnAcquired, FencingHeader, HeldLock, NoHeldLock, OnAcquired},
    hold::{Hold, HoldToBodyEnd, HoldToHead, RequestLock},
    layer::DistributedLockLayer,
    on_reject::{DefaultOnReject, OnReject, Protocol, RejectWithError, Rejection},
    patience::client_patience,
    problem::{ProblemContext, ProblemDetails},
    request_key::{IntoRequestKey, RequestKey},
    server_timing::ServerTiming,
    service::DistributedLock,
    settings::{OnLoss, OnStorageFailure},
};

#[cfg(feature = "body")]
pub use self::body::{HeldBody, HoldBody};
#[cfg(feature = "axum")]
pub use self::held_lock::MissingLock;
