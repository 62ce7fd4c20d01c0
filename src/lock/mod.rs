//! Locks as a program sees them: [`LockFactory`] makes [`Lock`]s, a [`Lock`] gives a [`LockGuard`].
//!
//! | file | what it is |
//! |---|---|
//! | `mod` | one lock, and the way to it |
//! | `factory` | what makes locks, and is set up once |
//! | `guard` | a lock that is held |
//! | `set` | several locks at once |

mod factory;
mod guard;
mod set;

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

pub use self::{
    factory::{LockFactory, LockFactoryBuilder},
    guard::{LockGuard, Unlocked},
    set::{LockSet, LockSetFuture, LockSetGuard},
};
use crate::{
    coordinator::{Acquire, Coordinator},
    error::LockError,
    key::{LockKey, LockName},
    options::LockOptions,
};

/// A handle on one lock. Clones are handles on the same lock.
///
/// ```
/// use tower_distributed_lock::{LockFactory, LockOptions, error::LockError, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let factory = LockFactory::new(MemoryStorage::new());
/// let lock = factory.create_lock("jobs/nightly")?;
///
/// let guard = lock.lock(LockOptions::default()).await?;
/// let second = lock.try_lock(LockOptions::default()).await;
/// assert!(matches!(second, Err(LockError::NotObtained(_))));
/// drop(guard);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Lock {
    coordinator: Arc<Coordinator>,
    name: LockName,
}

impl Lock {
    /// Waits for the lock, first come first served among the callers of this factory, for at most
    /// `retries` × `interval`.
    ///
    /// # Errors
    ///
    /// [`LockError`]. A storage that is away is asked again until the wait is over; one that
    /// refuses (a wrong password, say) ends it at once.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue. A lock that was being obtained goes to
    /// the next waiter or is released, in the background.
    ///
    /// Keep polling it, or drop it: the first in the queue that is neither polled nor dropped keeps
    /// those behind it waiting.
    pub fn lock(&self, options: LockOptions) -> LockFuture {
        LockFuture {
            acquire: Acquire::new(Arc::clone(&self.coordinator), self.name.clone(), options),
        }
    }

    /// Takes the lock if it is free. Does not wait for it: `retries` is taken to be 0. The storage
    /// has [`storage_timeout`](LockFactoryBuilder::storage_timeout) to answer. If another caller of
    /// this factory is asking already, its answer is this one's, too.
    ///
    /// # Errors
    ///
    /// [`LockError::NotObtained`] if somebody has it, or was asking for it and got it;
    /// [`LockError::Storage`] if the storage fails whoever asks, this caller or one before it;
    /// otherwise as [`Lock::lock`].
    ///
    /// # Cancel safety
    ///
    /// As [`Lock::lock`].
    pub fn try_lock(&self, options: LockOptions) -> LockFuture {
        self.lock(options.without_wait())
    }

    /// The key. [`LockKey::as_str`] is its text, [encoded](LockKey#encoding).
    pub fn key(&self) -> LockKey {
        self.name.to_key()
    }
}

impl fmt::Debug for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lock").field(&self.name).finish()
    }
}

/// The future of [`Lock::lock`] and [`Lock::try_lock`].
///
/// # Panics
///
/// If it is polled again after it has resolved, or has to wait and is polled outside of a tokio runtime
/// with timers.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct LockFuture {
    acquire: Acquire,
}

impl Future for LockFuture {
    type Output = Result<LockGuard, LockError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let turn = Pin::new(&mut self.get_mut().acquire).poll(cx);
        turn.map(|result| result.map(LockGuard::new))
    }
}

impl LockFuture {
    /// Gives up at the first failure of the storage.
    pub(crate) fn impatient(self) -> Self {
        Self {
            acquire: self.acquire.impatient(),
        }
    }
}
