//! The lock of a request, or its locks: most have one, and pay for no more.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
};

use pin_project::pin_project;

use crate::{
    error::{LockError, LossReason, StorageError},
    lock::{LockFuture, LockGuard, LockSetFuture, LockSetGuard, Unlocked},
};

/// A request's way to its locks.
#[pin_project(project = AcquireProj)]
#[allow(
    clippy::large_enum_variant,
    reason = "a smaller enum would cost every request an allocation"
)]
pub(super) enum Acquire {
    One(#[pin] LockFuture),
    Several(#[pin] LockSetFuture),
}

impl Acquire {
    /// Gives up at the first failure of the storage.
    pub(super) fn impatient(self) -> Self {
        match self {
            Self::One(lock) => Self::One(lock.impatient()),
            Self::Several(locks) => Self::Several(locks.impatient()),
        }
    }
}

impl Future for Acquire {
    type Output = Result<Guards, LockError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            AcquireProj::One(lock) => lock.poll(cx).map_ok(Guards::One),
            AcquireProj::Several(locks) => locks.poll(cx).map_ok(Guards::Several),
        }
    }
}

/// What a request holds.
#[derive(Debug)]
pub(super) enum Guards {
    One(LockGuard),
    Several(LockSetGuard),
}

impl Guards {
    pub(super) fn as_slice(&self) -> &[LockGuard] {
        match self {
            Self::One(guard) => std::slice::from_ref(guard),
            Self::Several(guards) => guards.guards(),
        }
    }

    /// Has `waker` woken when one of them is lost.
    pub(super) fn watch(&self, waker: &Waker) {
        for guard in self.as_slice() {
            guard.turn().watch(waker);
        }
    }

    /// Why one of them cannot be relied on any more, if so.
    pub(super) fn loss(&self) -> Option<LossReason> {
        self.as_slice().iter().find_map(LockGuard::loss)
    }

    /// See [`LockGuard::unlock`].
    pub(super) async fn unlock(self) -> Result<Unlocked, StorageError> {
        match self {
            Self::One(guard) => guard.unlock().await,
            Self::Several(guards) => guards.unlock().await,
        }
    }
}
