//! The layer: what is locked, for how long, and what happens when it cannot be.

use std::{fmt, sync::Arc};

use http::HeaderName;
use tower_layer::Layer;

use crate::{
    lock::LockFactory,
    middleware::{
        held_lock::{DefaultOnAcquired, FencingHeader, NoHeldLock},
        hold::{HoldToBodyEnd, HoldToHead},
        on_reject::{DefaultOnReject, RejectWithError, Rejection},
        server_timing::ServerTiming,
        service::DistributedLock,
        settings::{OnLoss, OnStorageFailure, Policy, Settings},
    },
    options::LockOptions,
};

/// Serialises requests per key. See the [module documentation](super).
///
/// `K` is the [key function](super::key::KeyFunction), `R` the [`OnReject`](super::OnReject) and `A`
/// the [`OnAcquired`](super::OnAcquired) hook. `H` says how long the lock is [held](super::Hold).
///
/// The order of the settings does not matter, but for those that go around others:
/// [`fencing_header`](Self::fencing_header) comes after [`on_acquired`](Self::on_acquired), and
/// [`server_timing`](Self::server_timing) after [`on_reject`](Self::on_reject) and
/// [`hold`](Self::hold). Each of these replaces what was set before, also by the settings that are
/// short for them ([`reject_with_error`](Self::reject_with_error),
/// [`hold_to_body_end`](Self::hold_to_body_end)).
pub struct DistributedLockLayer<K, R = DefaultOnReject, A = DefaultOnAcquired, H = HoldToHead> {
    settings: Settings<K, R, A, H>,
}

impl<K> DistributedLockLayer<K> {
    /// A layer that takes the lock key from each request with `key`: a function from `&Request` to
    /// anything that is [`IntoRequestKey`](super::IntoRequestKey), or one of [`key`](super::key).
    pub fn new(factory: LockFactory, key: K) -> Self {
        let settings = Settings {
            policy: Policy {
                factory,
                options: LockOptions::default(),
                on_loss: OnLoss::default(),
                on_storage_failure: OnStorageFailure::default(),
                await_release: false,
                complained: Arc::default(),
            },
            key: Arc::new(key),
            on_reject: Arc::new(DefaultOnReject::new()),
            on_acquired: Arc::new(DefaultOnAcquired),
            hold: Arc::new(HoldToHead),
        };
        Self { settings }
    }
}

impl<K, R, A, H> DistributedLockLayer<K, R, A, H> {
    /// How long locks last and how long requests wait for them. Default [`LockOptions::default`].
    #[must_use]
    pub fn options(mut self, options: LockOptions) -> Self {
        self.settings.policy.options = options;
        self
    }

    /// What happens to a request whose lock is lost while its handler runs. Default
    /// [`OnLoss::Cancel`].
    #[must_use]
    pub fn on_loss(mut self, on_loss: OnLoss) -> Self {
        self.settings.policy.on_loss = on_loss;
        self
    }

    /// What happens to a request when the storage cannot be asked. Default
    /// [`OnStorageFailure::FailClosed`].
    #[must_use]
    pub fn on_storage_failure(mut self, on_storage_failure: OnStorageFailure) -> Self {
        self.settings.policy.on_storage_failure = on_storage_failure;
        self
    }

    /// Whether a response waits until the storage has confirmed the release. Default `false`.
    ///
    /// With `true` the client hears of its success only when the lock is free for its next request,
    /// and a lock that turns out to have been lost counts as lost (see [`OnLoss`]). It costs one
    /// round trip to the storage.
    ///
    /// No body waits: if the lock is [held to its end](Self::hold_to_body_end), this is for
    /// responses without one.
    #[must_use]
    pub fn await_release(mut self, await_release: bool) -> Self {
        self.settings.policy.await_release = await_release;
        self
    }

    /// What a rejected request gets. Default [`DefaultOnReject`].
    #[must_use]
    pub fn on_reject<R2>(self, on_reject: R2) -> DistributedLockLayer<K, R2, A, H> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: Arc::new(on_reject),
            on_acquired: self.settings.on_acquired,
            hold: self.settings.hold,
        };
        DistributedLockLayer { settings }
    }

    /// Makes a rejection an error of the service: by the inner service's error type, or anything
    /// that can be [made into](Into) it. For services whose answers cannot say "locked". Default: it
    /// is [`DefaultOnReject`] that answers, with a response.
    ///
    /// This is a hook as [`on_reject`](Self::on_reject) sets it, and so is replaced by it.
    #[must_use]
    pub fn reject_with_error<F, E>(
        self,
        error: F,
    ) -> DistributedLockLayer<K, RejectWithError<F>, A, H>
    where
        F: Fn(Rejection) -> E,
    {
        self.on_reject(RejectWithError::new(error))
    }

    /// Holds the lock to the end of the response body, for bodies that are streamed: downloads,
    /// server-sent events, gRPC streams. Default: to the response head.
    ///
    /// The lock is released with the body's last frame, or when the body fails or is dropped, as it
    /// is when the client disconnects. Meanwhile it is renewed, up to
    /// [`max_hold`](crate::LockOptionsBuilder::max_hold): set that to the longest that a stream may
    /// last. What happens when the lock is lost is up to [`OnLoss`]. The type of the response stays
    /// what it is; [`HoldToBodyEnd`] has the body types that it is for.
    ///
    /// ```
    /// # #[cfg(feature = "axum")] {
    /// use std::{convert::Infallible, time::Duration};
    ///
    /// use axum::{Router, extract::Request, response::sse::{Event, Sse}, routing::get};
    /// use futures_util::stream;
    /// use tower_distributed_lock::{DistributedLockLayer, LockFactory, LockOptions, storage::MemoryStorage};
    ///
    /// async fn progress() -> Sse<impl futures_util::Stream<Item = Result<Event, Infallible>>> {
    ///     let steps = ["reading", "writing", "done"];
    ///     Sse::new(stream::iter(steps.map(|step| Ok(Event::default().data(step)))))
    /// }
    ///
    /// # fn build() -> Result<(), tower_distributed_lock::error::InvalidOptions> {
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let an_hour = LockOptions::builder().max_hold(Duration::from_secs(3600)).build()?;
    /// let one_import = DistributedLockLayer::new(factory, |_: &Request| "import")
    ///     .options(an_hour)
    ///     .hold_to_body_end();
    /// let app: Router = Router::new().route("/import", get(progress).route_layer(one_import));
    /// # Ok(()) }
    /// # build().unwrap();
    /// # }
    /// ```
    #[must_use]
    pub fn hold_to_body_end(self) -> DistributedLockLayer<K, R, A, HoldToBodyEnd> {
        self.hold(HoldToBodyEnd)
    }

    /// Tells in each response how long its request waited for the lock, in milliseconds:
    /// `Server-Timing: lock;dur=12.345`. The browser's developer tools show it beside what others tell
    /// there. Default: no such header.
    ///
    /// A response that has the header already gets one more line of it. Rejected requests are told as
    /// well, if they waited for the lock or could not: `NotObtained` and `TooManyWaiters`. The wait
    /// for a lock says something of the traffic of others; leave it out where that is nobody's
    /// business.
    ///
    /// It goes around [`hold`](Self::hold) and [`on_reject`](Self::on_reject) as they are set, so it
    /// comes after them: an `on_reject` after it replaces both, and rejections tell nothing.
    ///
    /// ```
    /// use axum::{Router, extract::Request, routing::post};
    /// use tower_distributed_lock::{DistributedLockLayer, LockFactory, storage::MemoryStorage};
    ///
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let lock = DistributedLockLayer::new(factory, |_: &Request| "reports").server_timing();
    /// let app: Router = Router::new().route("/reports", post(|| async {}).route_layer(lock));
    /// ```
    #[must_use]
    pub fn server_timing(self) -> DistributedLockLayer<K, ServerTiming<R>, A, ServerTiming<H>> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: Arc::new(ServerTiming::around(self.settings.on_reject)),
            on_acquired: self.settings.on_acquired,
            hold: Arc::new(ServerTiming::around(self.settings.hold)),
        };
        DistributedLockLayer { settings }
    }

    /// How long the lock is held. Default [`HoldToHead`].
    #[must_use]
    pub fn hold<H2>(self, hold: H2) -> DistributedLockLayer<K, R, A, H2> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: self.settings.on_reject,
            on_acquired: self.settings.on_acquired,
            hold: Arc::new(hold),
        };
        DistributedLockLayer { settings }
    }

    /// Passes the [fencing token](super::HeldLock::fencing_token) on to the inner service, as a
    /// decimal number in this header of the request. Default: it is in the request's
    /// [`HeldLock`](super::HeldLock) alone.
    ///
    /// What a client sends in this header is removed, under exactly this name: a backend that takes
    /// `-` and `_` for the same needs more.
    ///
    /// It goes around the hook that is set, which does what it did. A hook that would drop the
    /// header again, and so let a client's through, cannot be set after it.
    #[must_use]
    pub fn fencing_header(
        self,
        name: HeaderName,
    ) -> DistributedLockLayer<K, R, FencingHeader<A>, H> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: self.settings.on_reject,
            on_acquired: Arc::new(FencingHeader::around(self.settings.on_acquired, name)),
            hold: self.settings.hold,
        };
        DistributedLockLayer { settings }
    }
}

// Only in place of the default: another hook would be dropped without a word.
impl<K, R, H> DistributedLockLayer<K, R, DefaultOnAcquired, H> {
    /// What is done with a request that has its lock. Default [`DefaultOnAcquired`].
    ///
    /// Can be set once, and before [`fencing_header`](Self::fencing_header), which goes around it.
    #[must_use]
    pub fn on_acquired<A>(self, on_acquired: A) -> DistributedLockLayer<K, R, A, H> {
        let settings = Settings {
            policy: self.settings.policy,
            key: self.settings.key,
            on_reject: self.settings.on_reject,
            on_acquired: Arc::new(on_acquired),
            hold: self.settings.hold,
        };
        DistributedLockLayer { settings }
    }

    /// Puts nothing into requests, which may be of any type. Default: [`DefaultOnAcquired`] puts the
    /// [`HeldLock`](super::HeldLock) into HTTP requests.
    ///
    /// This is a hook in the place of [`on_acquired`](Self::on_acquired).
    #[must_use]
    pub fn without_held_lock(self) -> DistributedLockLayer<K, R, NoHeldLock, H> {
        self.on_acquired(NoHeldLock)
    }
}

impl<S, K, R, A, H> Layer<S> for DistributedLockLayer<K, R, A, H> {
    type Service = DistributedLock<S, K, R, A, H>;

    fn layer(&self, inner: S) -> Self::Service {
        DistributedLock::new(inner, Arc::new(self.settings.clone()))
    }
}

// Written by hand: the hooks are shared, so they need not be `Clone`.
impl<K, R, A, H> Clone for DistributedLockLayer<K, R, A, H> {
    fn clone(&self) -> Self {
        Self {
            settings: self.settings.clone(),
        }
    }
}

impl<K, R, A, H> fmt::Debug for DistributedLockLayer<K, R, A, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DistributedLockLayer")
            .field(&self.settings)
            .finish()
    }
}
