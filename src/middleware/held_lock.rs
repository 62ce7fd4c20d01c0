//! The lock as the handler of a request sees it.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::select_all;
use http::HeaderName;

use crate::{
    coordinator::{signal::Holding, turn::Turn},
    error::LossReason,
    key::LockKey,
    lock::LockGuard,
    middleware::{
        guards::Guards,
        patience::{client_patience, shorter},
    },
};

/// The lock under which a request runs.
///
/// The layer puts it into the request's extensions; with the feature `axum` it is an extractor.
/// Clones are handles on the same lock. Keeping one does not keep the lock.
///
/// ```
/// # #[cfg(feature = "axum")] {
/// use tower_distributed_lock::HeldLock;
///
/// async fn handler(lock: HeldLock) -> String {
///     format!("{} is ours for another {:?}", lock.key(), lock.remaining())
/// }
/// # let _ = axum::routing::post::<_, _, ()>(handler);
/// # }
/// ```
#[derive(Clone)]
pub struct HeldLock {
    turns: Turns,
}

#[derive(Clone)]
enum Turns {
    One(Arc<Turn>),
    Several(Arc<[Arc<Turn>]>),
}

impl HeldLock {
    pub(super) fn new(guards: &Guards) -> Self {
        let turn = |guard: &LockGuard| Arc::clone(guard.turn());
        let turns = match guards.as_slice() {
            [guard] => Turns::One(turn(guard)),
            several => Turns::Several(several.iter().map(turn).collect()),
        };
        Self { turns }
    }

    fn turns(&self) -> &[Arc<Turn>] {
        match &self.turns {
            Turns::One(turn) => std::slice::from_ref(turn),
            Turns::Several(turns) => turns,
        }
    }

    /// The key. Of several, the first: see [`HeldLock::each`].
    pub fn key(&self) -> LockKey {
        // There is one at least.
        self.turns()[0].name().to_key()
    }

    /// The locks of a request that has [several](super::RequestKey::all), in the order of their
    /// keys; of one that has one lock, that.
    ///
    /// ```
    /// use tower_distributed_lock::{HeldLock, LockKey};
    ///
    /// fn tokens(lock: &HeldLock) -> Vec<(LockKey, Option<u64>)> {
    ///     let each = lock.each();
    ///     each.map(|lock| (lock.key(), lock.fencing_token())).collect()
    /// }
    /// ```
    pub fn each(&self) -> impl Iterator<Item = HeldLock> {
        self.turns().iter().map(|turn| Self {
            turns: Turns::One(Arc::clone(turn)),
        })
    }

    /// Whether the lock can be relied on at this moment: see [`LockGuard::is_held`]. Of several: all
    /// of them.
    pub fn is_held(&self) -> bool {
        self.turns().iter().all(|turn| turn.look() == Holding::Held)
    }

    /// How long the lock can be relied on if no renewal succeeds from now on: see
    /// [`LockGuard::remaining`]. Zero when it is lost or released. Of several: the shortest.
    pub fn remaining(&self) -> Duration {
        let remaining = self.turns().iter().map(|turn| turn.remaining());
        remaining.min().unwrap_or_default()
    }

    /// Resolves when the lock is lost; never, if it is released first. Of several: when one is lost.
    ///
    /// ```
    /// use http::StatusCode;
    /// use tower_distributed_lock::HeldLock;
    ///
    /// # async fn export() {}
    /// # async fn remove_what_is_there() {}
    /// // Under a layer with `OnLoss::Signal`; with `OnLoss::Cancel` it drops the handler.
    /// async fn handler(lock: HeldLock) -> Result<(), StatusCode> {
    ///     tokio::select! {
    ///         () = export() => Ok(()),
    ///         _reason = lock.lost() => {
    ///             remove_what_is_there().await;
    ///             Err(StatusCode::SERVICE_UNAVAILABLE)
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Can be dropped and called again; a loss is not forgotten.
    pub async fn lost(&self) -> LossReason {
        match &self.turns {
            Turns::One(turn) => turn.lost().await,
            Turns::Several(turns) => {
                let lost = turns.iter().map(|turn| Box::pin(turn.lost()));
                select_all(lost).await.0
            }
        }
    }

    /// The fencing token, to be passed on with each write: see [`LockGuard::fencing_token`]. `None`
    /// if there are several locks, as each of them has [its own](Self::each).
    pub fn fencing_token(&self) -> Option<u64> {
        match &self.turns {
            Turns::One(turn) => turn.fencing_token(),
            Turns::Several(_) => None,
        }
    }

    /// Releases the lock, or all of them, before the response is ready. Say so when the part that
    /// needs it is done: the rest of the handler runs without the lock, and losing it no longer
    /// matters.
    ///
    /// Does nothing if it was released before.
    ///
    /// ```
    /// use tower_distributed_lock::HeldLock;
    ///
    /// # async fn charge() {}
    /// # async fn mail_receipt() {}
    /// async fn pay(lock: HeldLock) -> &'static str {
    ///     charge().await;
    ///     // Nobody has to wait for the mail.
    ///     lock.release();
    ///     mail_receipt().await;
    ///     "paid"
    /// }
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let order = LockFactory::new(MemoryStorage::new()).create_lock("orders/42")?;
    /// # let guard = order.lock(LockOptions::default()).await?;
    /// # assert_eq!(pay(HeldLock::from(&guard)).await, "paid");
    /// # assert!(!guard.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub fn release(&self) {
        for turn in self.turns() {
            drop(turn.give_back());
        }
    }
}

/// A handle on a lock that was taken without the layer, to give it to what takes a handle: a function
/// that a handler shares with a background job, or a handler in a unit test.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_distributed_lock::{HeldLock, LockFactory, LockOptions, storage::MemoryStorage};
///
/// async fn key_of(lock: HeldLock) -> String {
///     lock.key().to_string()
/// }
///
/// let locks = LockFactory::new(MemoryStorage::new());
/// let guard = locks.create_lock("orders/42")?.lock(LockOptions::default()).await?;
/// assert_eq!(key_of(HeldLock::from(&guard)).await, "orders/42");
/// # Ok(())
/// # }
/// ```
impl From<&LockGuard> for HeldLock {
    fn from(guard: &LockGuard) -> Self {
        Self {
            turns: Turns::One(Arc::clone(guard.turn())),
        }
    }
}

impl fmt::Debug for HeldLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HeldLock").field(&self.turns()).finish()
    }
}

/// What is done with a request that has obtained its lock, before it goes on to the inner service.
///
/// Implemented for closures: `|request: &mut Job, lock: HeldLock| request.lock = Some(lock)`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not know what to do with a `{Req}`",
    note = "`DefaultOnAcquired` puts the `HeldLock` into the extensions of HTTP requests",
    note = "for other requests use `.on_acquired(..)` or `.without_held_lock()` of the layer"
)]
pub trait OnAcquired<Req> {
    /// The lock is held.
    fn on_acquired(&self, request: &mut Req, lock: HeldLock);

    /// The request goes on without a lock: it has no key, or the storage could not be asked and the
    /// layer [fails open](super::OnStorageFailure::FailOpen). Does nothing unless overridden.
    ///
    /// A layer outside may have left the handle on its own lock in the request: whoever takes that
    /// for this layer's lock is mistaken.
    fn on_skipped(&self, request: &mut Req) {
        let _ = request;
    }

    /// How long the client waits for its answer, if known: see
    /// [`OnReject::patience`](super::OnReject::patience). Both hooks are asked, so that a closure in
    /// the place of one does not make the layer forget it; what is less counts.
    ///
    /// Default: not known, which is so for closures and [`NoHeldLock`]. [`DefaultOnAcquired`] and
    /// [`FencingHeader`] have [`client_patience`].
    fn patience(&self, request: &Req) -> Option<Duration> {
        let _ = request;
        None
    }
}

impl<F, Req> OnAcquired<Req> for F
where
    F: Fn(&mut Req, HeldLock),
{
    fn on_acquired(&self, request: &mut Req, lock: HeldLock) {
        self(request, lock);
    }
}

/// Puts the [`HeldLock`] into the extensions of an HTTP request.
///
/// There it replaces that of a layer outside: the inner service sees the lock of the innermost
/// layer. If a request has no lock in that layer, it has no [`HeldLock`] at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct DefaultOnAcquired;

impl<B> OnAcquired<http::Request<B>> for DefaultOnAcquired {
    fn on_acquired(&self, request: &mut http::Request<B>, lock: HeldLock) {
        request.extensions_mut().insert(lock);
    }

    fn on_skipped(&self, request: &mut http::Request<B>) {
        request.extensions_mut().remove::<HeldLock>();
    }

    fn patience(&self, request: &http::Request<B>) -> Option<Duration> {
        client_patience(request)
    }
}

/// Leaves requests of any type as they are: the inner service does not see its lock. Made by
/// [`DistributedLockLayer::without_held_lock`](super::DistributedLockLayer::without_held_lock).
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHeldLock;

impl<Req> OnAcquired<Req> for NoHeldLock {
    fn on_acquired(&self, _: &mut Req, _: HeldLock) {}
}

/// Does what the hook `A` does, and puts the fencing token into a header of the request, for inner
/// services that pass their headers on. Made by
/// [`DistributedLockLayer::fencing_header`](super::DistributedLockLayer::fencing_header).
///
/// A request with [several](super::RequestKey::all) locks has the header once for each, in the order
/// of their keys.
///
/// Whatever a client sends under that name is removed, also from requests without a lock: the inner
/// service sees a token of the lock or none.
pub struct FencingHeader<A = DefaultOnAcquired> {
    name: HeaderName,
    inner: Arc<A>,
}

impl<A> FencingHeader<A> {
    pub(super) fn around(inner: Arc<A>, name: HeaderName) -> Self {
        Self { name, inner }
    }
}

impl<A, B> OnAcquired<http::Request<B>> for FencingHeader<A>
where
    A: OnAcquired<http::Request<B>>,
{
    fn on_acquired(&self, request: &mut http::Request<B>, lock: HeldLock) {
        let headers = request.headers_mut();
        headers.remove(&self.name);
        for token in lock.each().filter_map(|lock| lock.fencing_token()) {
            headers.append(self.name.clone(), token.into());
        }
        self.inner.on_acquired(request, lock);
    }

    fn on_skipped(&self, request: &mut http::Request<B>) {
        request.headers_mut().remove(&self.name);
        self.inner.on_skipped(request);
    }

    fn patience(&self, request: &http::Request<B>) -> Option<Duration> {
        shorter(self.inner.patience(request), client_patience(request))
    }
}

// Written by hand: the hook is shared, so it need not be `Clone`.
impl<A> Clone for FencingHeader<A> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<A> fmt::Debug for FencingHeader<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FencingHeader")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "axum")]
mod extract {
    use std::convert::Infallible;

    use axum_core::{
        extract::{FromRequestParts, OptionalFromRequestParts},
        response::{IntoResponse, Response},
    };
    use http::{StatusCode, request::Parts};

    use super::HeldLock;

    /// A handler wants a [`HeldLock`] but its request runs without one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
    #[error(
        "this request holds no lock: put a `DistributedLockLayer` around this route, and have its key function return a \
         key (a handler that runs with and without takes `Option<HeldLock>`)"
    )]
    #[non_exhaustive]
    pub struct MissingLock;

    impl IntoResponse for MissingLock {
        fn into_response(self) -> Response {
            (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
        }
    }

    impl<S: Sync> FromRequestParts<S> for HeldLock {
        type Rejection = MissingLock;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingLock> {
            parts.extensions.get::<Self>().cloned().ok_or(MissingLock)
        }
    }

    impl<S: Sync> OptionalFromRequestParts<S> for HeldLock {
        type Rejection = Infallible;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
            Ok(parts.extensions.get::<Self>().cloned())
        }
    }
}

#[cfg(feature = "axum")]
pub use extract::MissingLock;
