//! Where a request's key comes from: [`KeyFunction`], and some that are ready to use.
//!
//! | key function | the key | feature |
//! |---|---|---|
//! | a closure or function of `&Request` | what it returns: see [`IntoRequestKey`](super::IntoRequestKey) | |
//! | [`header("accounts", name)`](header()) | `accounts/<value of the header>` | |
//! | [`metadata("accounts", name)`](metadata()) | `accounts/<value of the gRPC metadata>`, also if it is binary | |
#![cfg_attr(
    feature = "axum",
    doc = "| [`path_params(\"orders\", [\"id\"])`](path_params()) | `orders/<id>` of the matched axum route | `axum` |
| <code>[extracted]\\(\\|Path(id): Path\\<u64\\>\\| ..)</code> | what a function of axum extractors returns | `axum` |"
)]
//!
//! ```
//! # #[cfg(feature = "axum")] {
//! use axum::{Router, extract::Path, routing::{delete, post}};
//! use tower_distributed_lock::{
//!     DistributedLockLayer, LockFactory, LockKey,
//!     middleware::key::{extracted, path_params},
//!     storage::MemoryStorage,
//! };
//!
//! # async fn rename() {}
//! # async fn pay() {}
//! let locks = LockFactory::new(MemoryStorage::new());
//!
//! // `/files/a.txt/rename` locks `files/a.txt`.
//! let file = DistributedLockLayer::new(locks.clone(), path_params("files", ["name"]));
//!
//! // `/orders/42/pay` and `/orders/042/pay` lock `orders/42`; `/orders/x/pay` is answered 400.
//! let order = DistributedLockLayer::new(
//!     locks,
//!     extracted(|Path(id): Path<u64>| LockKey::from_parts(["orders", &id.to_string()])),
//! );
//!
//! let app: Router = Router::new()
//!     .route("/files/{name}/rename", post(rename).route_layer(file))
//!     .route("/orders/{id}/pay", post(pay).route_layer(order));
//! # }
//! ```
//!
//! # What a client can do
//!
//! The ready-made functions put a *namespace* of yours in front of what the client sends, as the
//! first of the [parts](crate::LockKey::from_parts) of the key. Whatever is sent, `/` and `%2F`
//! included, stays in its own part: it cannot name another resource, another namespace or another
//! key prefix. What is longer than [`LockKey::MAX_LEN`](crate::LockKey::MAX_LEN) is refused.
//!
//! They take what the client wrote. If the handler understands two spellings as one thing (`42` and
//! `042`, upper and lower case), the key has to be made of what it understood
#![cfg_attr(feature = "axum", doc = "(see [`extracted`])")]
//! or two requests for one thing run at once.
//!
//! # The body
//!
//! A key function does not see the body: it has not arrived yet. If the name of the resource is in
//! there, take the lock in the handler, with a [`LockFactory`](crate::LockFactory).

mod base64;
#[cfg(feature = "axum")]
mod extracted;
mod function;
mod header;
#[cfg(feature = "axum")]
mod loan;
mod metadata;
#[cfg(feature = "axum")]
mod path_params;
mod rejected;

pub use self::{
    function::KeyFunction,
    header::{Header, HeaderError, header},
    metadata::{Metadata, metadata},
    rejected::KeyRejected,
};

#[cfg(feature = "axum")]
pub use self::{
    extracted::{Extracted, ExtractorFn, extracted},
    path_params::{PathParams, PathParamsError, path_params},
};
