//! How long the lock of a request is held: to the head of its response, or longer.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use crate::{
    error::{LossReason, StorageError},
    lock::{LockGuard, Unlocked},
    middleware::{guards::Guards, held_lock::HeldLock, settings::OnLoss},
};

/// What becomes of a request's lock when its response is there.
///
/// [`HoldToHead`] gives it back, [`HoldToBodyEnd`] when the body has ended. Implement it yourself
/// for responses that go on in another way: whatever the lock is kept in gives it back when that is
/// dropped.
///
/// ```
/// use tower_distributed_lock::{
///     DistributedLockLayer, LockFactory, middleware::{Hold, RequestLock}, storage::MemoryStorage,
/// };
///
/// struct Job {
///     account: String,
/// }
///
/// /// Says that a job has started, and goes on until it is dropped.
/// struct Started {
///     lock: Option<RequestLock>,
/// }
///
/// struct HoldToEndOfJob;
///
/// impl Hold<Started> for HoldToEndOfJob {
///     fn keep(&self, mut started: Started, lock: RequestLock) -> (Started, Option<RequestLock>) {
///         started.lock = Some(lock);
///         (started, None)
///     }
/// }
///
/// let factory = LockFactory::new(MemoryStorage::new());
/// let layer = DistributedLockLayer::new(factory, |job: &Job| job.account.clone()).hold(HoldToEndOfJob);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot keep a lock in a `{Res}`",
    note = "`HoldToBodyEnd` is for axum's bodies with the feature `axum`, for tonic's with `tonic`, and for types that are \
            `HoldBody` with `body`"
)]
pub trait Hold<Res> {
    /// Puts the lock into the response, or hands it back: then it is released at once.
    ///
    /// Not called for the inner service's errors, for rejections, and for requests without a lock.
    fn keep(&self, response: Res, lock: RequestLock) -> (Res, Option<RequestLock>);
}

/// The lock is released when the response head is ready. The default of [`DistributedLockLayer`](super::DistributedLockLayer).
#[derive(Clone, Copy, Debug, Default)]
pub struct HoldToHead;

impl<Res> Hold<Res> for HoldToHead {
    fn keep(&self, response: Res, lock: RequestLock) -> (Res, Option<RequestLock>) {
        (response, Some(lock))
    }
}

/// The lock is released when the response body has ended, or is dropped. See
/// [`DistributedLockLayer::hold_to_body_end`](super::DistributedLockLayer::hold_to_body_end).
///
/// For responses of axum (feature `axum`) and tonic (feature `tonic`), for the boxed bodies of
/// `http-body-util`, and for every other body that is a `HoldBody` (feature `body`, which the first
/// two bring with them).
#[derive(Clone, Copy, Debug, Default)]
pub struct HoldToBodyEnd;

/// The lock of a request that is being served, or its locks, as a [`Hold`] is given it. Dropping it gives them back, in
/// the background.
#[derive(Debug)]
#[must_use = "a lock that is dropped at once is given back at once"]
pub struct RequestLock {
    guards: Guards,
    on_loss: OnLoss,
}

/// Whoever waits behind work that takes longer gains little by going before its response.
const BRIEF: Duration = Duration::from_micros(100);

impl RequestLock {
    pub(super) fn new(guards: Guards, on_loss: OnLoss) -> Self {
        Self { guards, on_loss }
    }

    /// A [handle](HeldLock) on it, as the request had one.
    pub fn handle(&self) -> HeldLock {
        HeldLock::new(&self.guards)
    }

    /// How long the request waited for it; of several, for all of them together.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::middleware::{Hold, RequestLock};
    ///
    /// /// As `HoldToHead`, but tells of long waits.
    /// struct Impatient;
    ///
    /// impl<Res> Hold<Res> for Impatient {
    ///     fn keep(&self, response: Res, lock: RequestLock) -> (Res, Option<RequestLock>) {
    ///         if lock.waited() > Duration::from_secs(1) {
    ///             println!("{}: waited {:?}", lock.handle().key(), lock.waited());
    ///         }
    ///         (response, Some(lock))
    ///     }
    /// }
    /// ```
    pub fn waited(&self) -> Duration {
        let guards = self.guards.as_slice().iter();
        guards.map(|guard| guard.turn().waited()).sum()
    }

    /// The span that the work under the lock is in.
    #[cfg(feature = "body")]
    pub(super) fn span(&self) -> tracing::Span {
        self.guards.span()
    }

    /// Ready when the work under the lock has to stop: the lock is lost, and the layer is set to
    /// [`OnLoss::Cancel`]. To be asked before each step of that work.
    ///
    /// If it is pending, the task is woken when that changes. There is one task to be woken: the
    /// one that asked last.
    ///
    /// ```
    /// use std::{pin::Pin, task::{Context, Poll, ready}};
    /// use tower_distributed_lock::{error::LossReason, middleware::RequestLock};
    ///
    /// /// Work that goes on after the response, under the lock of the request.
    /// struct Job<F> {
    ///     work: Pin<Box<F>>,
    ///     lock: RequestLock,
    /// }
    ///
    /// impl<F: Future<Output = ()>> Future for Job<F> {
    ///     type Output = Result<(), LossReason>;
    ///
    ///     fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
    ///         if let Poll::Ready(reason) = self.lock.poll_cancelled(cx) {
    ///             return Poll::Ready(Err(reason));
    ///         }
    ///         ready!(self.work.as_mut().poll(cx));
    ///         Poll::Ready(self.lock.cancelled().map_or(Ok(()), Err))
    ///     }
    /// }
    /// ```
    pub fn poll_cancelled(&self, cx: &mut Context<'_>) -> Poll<LossReason> {
        self.guards.watch(cx.waker());
        self.cancelled().map_or(Poll::Pending, Poll::Ready)
    }

    /// Why the work under the lock has to stop, if so. To be asked after each step of that work, as
    /// [`poll_cancelled`](Self::poll_cancelled) before it: it may have taken longer than the lock
    /// lasted.
    pub fn cancelled(&self) -> Option<LossReason> {
        match self.on_loss {
            OnLoss::Cancel => self.guards.loss(),
            OnLoss::Signal => None,
        }
    }

    /// Gives it back, in the background; of several, up to one that somebody who waited in this
    /// process has now. Whether there is such a one.
    pub(super) fn hand_over(&self) -> bool {
        // Those after it are given back when `self` is dropped.
        self.guards.as_slice().iter().any(LockGuard::hand_over)
    }

    /// Whether the work under it was a matter of moments.
    pub(super) fn is_brief(&self) -> bool {
        let mut guards = self.guards.as_slice().iter();
        guards.all(|guard| guard.turn().age() < BRIEF)
    }

    pub(super) async fn unlock(self) -> Result<Unlocked, StorageError> {
        self.guards.unlock().await
    }
}
