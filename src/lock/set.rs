//! Several locks at once: all or none.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::{join_all, select_all};
use pin_project::pin_project;
use tracing::Span;

use crate::{
    clock::Timestamp,
    error::{LockError, LossReason, NotObtained, StorageError},
    key::{LockKey, LockKeys},
    lock::{Lock, LockFuture, LockGuard, Unlocked},
    options::LockOptions,
};

/// A handle on several locks, for work that changes several resources at once: the two accounts of
/// a transfer. Made by [`LockFactory::create_lock_set`](crate::LockFactory::create_lock_set).
/// Clones are handles on the same locks.
///
/// The locks are taken one after the other in the order of their keys, the same in every process,
/// so two callers that want some of the same locks cannot wait for each other in a circle. That
/// holds for callers that take all they want in one set: whoever holds a lock and then waits for
/// another can still meet somebody who does it the other way round, until one of them gives up.
///
/// ```
/// use tower_distributed_lock::{LockFactory, LockOptions, Unlocked, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let factory = LockFactory::new(MemoryStorage::new());
/// let accounts = factory.create_lock_set(["accounts/7", "accounts/3"])?;
///
/// let guard = accounts.lock(LockOptions::default()).await?;
/// assert!(guard.is_held());
/// assert_eq!(guard.unlock().await?, Unlocked::Held);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LockSet {
    /// In the order of their keys.
    locks: Arc<[Lock]>,
}

impl LockSet {
    /// The most locks in a set. Each costs a round trip of its own, so a set is for a handful.
    pub const MAX_LEN: usize = LockKeys::MAX_LEN;

    pub(super) fn new(locks: Arc<[Lock]>) -> Self {
        Self { locks }
    }

    /// Waits for all the locks, for at most `retries` × `interval` in all. Those that it has are
    /// held and renewed while it waits for the others; if one cannot be had, they are given back.
    ///
    /// # Errors
    ///
    /// As [`Lock::lock`], for the first lock that could not be had; or [`LockError::Lost`], at once,
    /// if one is lost while the others are waited for.
    ///
    /// # Cancel safety
    ///
    /// As [`Lock::lock`]: dropping the future gives up the place in the queue and what it has.
    pub fn lock(&self, options: LockOptions) -> LockSetFuture {
        LockSetFuture {
            locks: Some(Arc::clone(&self.locks)),
            options,
            impatient: false,
            since: None,
            guards: Vec::with_capacity(self.locks.len()),
            next: None,
        }
    }

    /// Takes the locks if all of them are free; does not wait for any. The storage has
    /// [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout) to answer for each.
    ///
    /// # Errors
    ///
    /// [`LockError::NotObtained`] if somebody has one of them, otherwise as [`LockSet::lock`].
    ///
    /// # Cancel safety
    ///
    /// As [`LockSet::lock`].
    pub fn try_lock(&self, options: LockOptions) -> LockSetFuture {
        self.lock(options.without_wait())
    }

    /// The keys, in their order.
    ///
    /// ```
    /// use tower_distributed_lock::{LockFactory, storage::MemoryStorage};
    ///
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let accounts = factory.create_lock_set(["accounts/7", "accounts/3", "accounts/7"])?;
    /// let keys: Vec<_> = accounts.keys().map(|key| key.to_string()).collect();
    /// assert_eq!(keys, ["accounts/3", "accounts/7"]);
    /// # Ok::<(), tower_distributed_lock::error::InvalidKey>(())
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = LockKey> {
        self.locks.iter().map(Lock::key)
    }
}

/// The future of [`LockSet::lock`] and [`LockSet::try_lock`].
///
/// # Panics
///
/// If it is polled again after it has resolved, or has to wait and is polled outside of a tokio runtime
/// with timers.
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct LockSetFuture {
    /// In this order: the place in the queue is given up before the locks that others may want.
    #[pin]
    next: Option<LockFuture>,
    guards: Vec<LockGuard>,
    /// `None` when it has resolved.
    locks: Option<Arc<[Lock]>>,
    options: LockOptions,
    impatient: bool,
    /// When the wait for all of them began.
    since: Option<Timestamp>,
}

impl LockSetFuture {
    /// Gives up at the first failure of the storage.
    pub(crate) fn impatient(self) -> Self {
        Self {
            impatient: true,
            ..self
        }
    }
}

impl Future for LockSetFuture {
    type Output = Result<LockSetGuard, LockError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(locks) = this.locks else {
            panic!("polled after it was ready");
        };
        let result = loop {
            if let Some(next) = this.next.as_mut().as_pin_mut() {
                // Its span is inside those of the locks before it: whoever is in the last is in all.
                let before = this.guards.last();
                let span = before.map_or_else(Span::none, |guard| guard.turn().span());
                let result = span.in_scope(|| next.poll(cx));
                if result.is_pending() {
                    for guard in &*this.guards {
                        guard.turn().watch(cx.waker());
                    }
                }
                if let Some(reason) = this.guards.iter().find_map(LockGuard::loss) {
                    break Err(LockError::Lost(reason));
                }
                match ready!(result) {
                    Ok(guard) => this.guards.push(guard),
                    Err(error) => break Err(error),
                }
                this.next.set(None);
            }
            let Some(lock) = locks.get(this.guards.len()) else {
                break Ok(LockSetGuard {
                    guards: std::mem::take(this.guards),
                });
            };
            let now = lock.coordinator.clock().now();
            let since = *this.since.get_or_insert(now);
            let until = since + this.options.max_wait();
            let options = this.options.within(until.since(now));
            if options.max_wait().is_zero() && !this.options.max_wait().is_zero() {
                lock.coordinator.was_out_of_time();
                // No wait at all would be longer: it lasts until the storage has answered.
                break Err(LockError::NotObtained(NotObtained {
                    waited: now.since(since),
                    attempts: 0,
                    holder_ttl: None,
                }));
            }
            let next = lock.lock(options);
            this.next.set(Some(if *this.impatient {
                next.impatient()
            } else {
                next
            }));
        };
        let result = result.map_err(|mut error| {
            if let LockError::NotObtained(error) = &mut error
                && let (Some(since), Some(lock)) = (*this.since, locks.first())
            {
                error.waited = lock.coordinator.clock().now().since(since);
            }
            error
        });
        this.next.set(None);
        this.guards.clear();
        *this.locks = None;
        Poll::Ready(result)
    }
}

/// Several locks that are held. Dropping it gives all of them back, in the background.
///
/// What is said of a [`LockGuard`] holds for each of them.
#[derive(Debug)]
#[must_use = "a guard that is dropped at once gives the locks back at once"]
pub struct LockSetGuard {
    guards: Vec<LockGuard>,
}

impl LockSetGuard {
    /// Gives all the locks back and says whether all were still ours.
    ///
    /// # Errors
    ///
    /// The first [`StorageError`], if the storage could not be asked. See [`LockGuard::unlock`].
    ///
    /// # Cancel safety
    ///
    /// All releases are sent at the first poll. Dropping the future before or after that gives the
    /// locks back all the same.
    pub async fn unlock(self) -> Result<Unlocked, StorageError> {
        // All are waited for at the same time: one server that does not answer is no reason to keep
        // those waiting who want the others.
        let answers = join_all(self.guards.iter().map(LockGuard::give_back)).await;
        let lost = answers
            .into_iter()
            .try_fold(false, |lost, answer| Ok(lost || answer? == Unlocked::Lost));
        lost.map(|lost| match lost {
            true => Unlocked::Lost,
            false => Unlocked::Held,
        })
    }

    /// Whether all the locks can be relied on at this moment: see [`LockGuard::is_held`].
    pub fn is_held(&self) -> bool {
        self.guards.iter().all(LockGuard::is_held)
    }

    /// How long all of them can be relied on if no renewal succeeds from now on: the shortest
    /// [`LockGuard::remaining`]. Zero when one is lost.
    pub fn remaining(&self) -> Duration {
        let remaining = self.guards.iter().map(LockGuard::remaining);
        remaining.min().unwrap_or_default()
    }

    /// Resolves when one of the locks is lost, as [`LockGuard::lost`] does for one alone.
    ///
    /// # Cancel safety
    ///
    /// Can be dropped and called again; a loss is not forgotten.
    pub async fn lost(&self) -> LossReason {
        select_all(self.guards.iter().map(|guard| Box::pin(guard.lost())))
            .await
            .0
    }

    /// The locks, in the order of their keys. Each has a key and a fencing token of its own.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # fn write(_account: &str, _balance: i64, _token: Option<u64>) {}
    /// # let factory = LockFactory::new(MemoryStorage::new());
    /// let accounts = factory.create_lock_set(["accounts/3", "accounts/7"])?;
    /// let locks = accounts.lock(LockOptions::default()).await?;
    /// for (account, balance) in locks.guards().iter().zip([60, 40]) {
    ///     write(account.key().as_str(), balance, account.fencing_token());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn guards(&self) -> &[LockGuard] {
        &self.guards
    }

    /// The locks as guards of their own, in the order of their keys, to give them back one by one.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let factory = LockFactory::new(MemoryStorage::new());
    /// let tables = factory.create_lock_set(["tables/a", "tables/b"])?;
    /// for table in tables.lock(LockOptions::default()).await?.into_guards() {
    ///     println!("{} is done, and free for others", table.key());
    ///     drop(table);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "dropped, they give the locks back at once"]
    pub fn into_guards(self) -> Vec<LockGuard> {
        self.guards
    }
}
