//! A page for people on call: who holds which lock, for how long, who waits, and a button that takes
//! a lock away. An axum router (feature `dashboard`).
//!
//! It has no login of its own. **Whoever reaches it sees all keys and, where you
//! [allow it](Dashboard::allow_release), can take any lock away**, so put your own middleware around it
//! before you nest it:
//!
//! ```
//! use axum::{
//!     Router,
//!     extract::Request,
//!     http::{HeaderMap, StatusCode, header::AUTHORIZATION},
//!     middleware::Next,
//!     response::Response,
//! };
//! use tower_distributed_lock::{LockFactory, dashboard::Dashboard, storage::MemoryStorage};
//!
//! /// Stands for what your service has: a session, single sign-on, a network of its own.
//! async fn people_on_call(
//!     headers: HeaderMap,
//!     request: Request,
//!     next: Next,
//! ) -> Result<Response, StatusCode> {
//! #   fn is_on_call(_: &axum::http::HeaderValue) -> bool { true }
//!     match headers.get(AUTHORIZATION) {
//!         Some(who) if is_on_call(who) => Ok(next.run(request).await),
//!         _ => Err(StatusCode::UNAUTHORIZED),
//!     }
//! }
//!
//! let locks = LockFactory::new(MemoryStorage::new());
//! let dashboard: Router = Dashboard::new(locks.inspector())
//!     .allow_release()
//!     .router()
//!     .layer(axum::middleware::from_fn(people_on_call));
//! let app: Router = Router::new().nest_service("/admin/locks", dashboard);
//! ```
//!
//! The page is then at `/admin/locks` and `/admin/locks/` ([`Router::nest`], which works as well,
//! has no route for the second). It can be anywhere, also behind a proxy that changes the path.
//! [`Router::route_layer`] covers all that there is too, and leaves a path that is not there a 404.
//! `examples/dashboard` is a service with a dashboard behind basic authentication, to copy from.
//!
//! # What it serves
//!
//! | request | answer |
//! |---|---|
//! | `GET` the mount | the page: one document, nothing is loaded from elsewhere |
//! | `GET locks.json` | [what is held](#json) |
//! | `POST release` | takes a lock away: [`LockInspector::force_release`]. Only there if it is [allowed](Dashboard::allow_release) |
//!
//! The page asks once a second while it is looked at. However many look, the storage is asked at most
//! twice a second by one router: an answer is shared for 500 ms.
//!
//! # JSON
//!
//! `GET locks.json` answers, sorted by key:
//!
//! ```json
//! {
//!   "more": false,
//!   "locks": [{
//!     "key": "orders/42",
//!     "holder": { "label": "shop-1", "this": true, "answered": true },
//!     "ttl_ms": 8123,
//!     "held_ms": 12,
//!     "fencing_token": 7,
//!     "waiters": [{ "label": "shop-2", "this": false, "answered": true, "callers": 3 }]
//!   }]
//! }
//! ```
//!
//! What is not known is `null`; a lock whose `ttl_ms` is `null` never expires. The fields are those of
//! [`LockInfo`](crate::inspect::LockInfo), with `this` for
//! [`Process::is_this`](crate::inspect::Process::is_this). `more` says that there are more locks than
//! the [limit](Dashboard::limit), or than could be listed in time.
//!
//! `POST release` takes `{"key": "orders/42", "reason": "its worker hangs"}`, with the key as it is
//! in `locks.json` and a reason of up to 500 characters, and answers `{"released": true}`, or `false`
//! if nobody held the lock, or it was given back at that moment. With `"fencing_token": 7` beside them
//! the lock is taken from that holder or from nobody
//! ([`LockInspector::force_release_if`]): if it is known to be another one by now, the answer is 409.
//!
//! What is refused is answered with `{"error": "a sentence"}`:
//!
//! | status | why |
//! |---|---|
//! | 400 | the JSON is not as above, the key is none, or the reason is blank or too long |
//! | 403 | a browser says that the request comes from another site |
//! | 409 | the lock has another holder than the one that was meant |
//! | 413 | the body has more than 16 KiB |
//! | 415 | the `content-type` is not `application/json` |
//! | 503 | the storage could not be asked |
//!
//! # Security
//!
//! - A foreign page cannot send `release` with the cookies of somebody who is logged in: the demanded
//!   `content-type` makes browsers ask first (CORS), and this router does not agree. Do not put a
//!   permissive `CorsLayer` around it.
//! - Keys and labels are shown as text. Should markup get in all the same, nothing in it runs: a
//!   `Content-Security-Policy` lets only the page's own script run, by a nonce.
//! - No answer may be cached, framed by another page, or embedded in one.
//! - No owner token, inbox or URL of a server is shown.
//! - Each forced release is [logged](crate::inspect#taking-a-lock-away) with its reason. For the name
//!   of who did it, instrument your middleware's `next.run(request)` with a span that has it, as the
//!   example does.

mod api;
mod page;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, post},
};

use crate::inspect::LockInspector;

/// Sets up the dashboard's router.
///
/// ```
/// # use axum::Router;
/// # use tower_distributed_lock::{LockFactory, dashboard::Dashboard, storage::MemoryStorage};
/// # let locks = LockFactory::new(MemoryStorage::new());
/// let to_look_at: Router = Dashboard::new(locks.inspector()).router();
/// let to_work_with: Router = Dashboard::new(locks.inspector()).allow_release().router();
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Dashboard {
    inspector: LockInspector,
    allow_release: bool,
    limit: usize,
}

impl Dashboard {
    /// A dashboard of the locks that `inspector` sees:
    /// [`LockFactory::inspector`](crate::LockFactory::inspector).
    pub fn new(inspector: LockInspector) -> Self {
        Self {
            inspector,
            allow_release: false,
            limit: 1000,
        }
    }

    /// Lets whoever reaches the page take locks away, so [protect it](self). Without it there is no
    /// route for that, and no button.
    pub fn allow_release(mut self) -> Self {
        self.allow_release = true;
        self
    }

    /// How many locks are shown at most. Default 1,000. If there are more, the page says so.
    ///
    /// ```
    /// # use axum::Router;
    /// # use tower_distributed_lock::{LockFactory, dashboard::Dashboard, storage::MemoryStorage};
    /// # let locks = LockFactory::new(MemoryStorage::new());
    /// let dashboard: Router = Dashboard::new(locks.inspector()).limit(100).router();
    /// ```
    pub fn limit(mut self, locks: usize) -> Self {
        self.limit = locks;
        self
    }

    /// Makes the router. [Protect it](self), then nest it, or serve it by itself on an address of its
    /// own. It is one of axum 0.8, which is part of this crate's API with the feature `dashboard`.
    pub fn router<S>(self) -> Router<S>
    where
        S: Clone + Send + Sync + 'static,
    {
        let mut router = Router::new()
            .route("/", get(page::page))
            .route("/locks.json", get(api::locks));
        if self.allow_release {
            router = router.route("/release", post(api::release));
        }
        router
            .layer(DefaultBodyLimit::max(api::MAX_BODY))
            .layer(middleware::map_response(page::secure))
            .with_state(Arc::new(Shared {
                page: page::Page::new(self.allow_release),
                locks: api::Locks::new(self.inspector, self.limit),
            }))
    }
}

/// What all requests of a router share.
struct Shared {
    page: page::Page,
    locks: api::Locks,
}
