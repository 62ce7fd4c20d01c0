//! [`LockGuard`]: a lock that is held.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use crate::{
    coordinator::{key_events::Ended, release::Release, signal::Holding, turn::Turn},
    error::{LossReason, StorageError},
    key::LockKey,
    storage::ReleaseReply,
};

/// A lock that is held. Dropping it gives the lock back, in the background.
///
/// The lock is renewed while the guard lives, up to
/// [`max_hold`](crate::LockOptionsBuilder::max_hold). It can be lost all the same: the storage may
/// be away for longer than the ttl, or forget it. Work that takes long should look at
/// [`LockGuard::is_held`] before each step that matters, or stop when [`LockGuard::lost`] resolves:
///
/// ```
/// use tower_distributed_lock::{LockFactory, LockOptions, Unlocked, storage::MemoryStorage};
///
/// # async fn work(token: Option<u64>) {}
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let factory = LockFactory::new(MemoryStorage::new());
/// let guard = factory.create_lock("import")?.lock(LockOptions::default()).await?;
///
/// tokio::select! {
///     () = work(guard.fencing_token()) => {}
///     reason = guard.lost() => return Err(reason.into()),
/// }
/// match guard.unlock().await? {
///     Unlocked::Held => {}
///     Unlocked::Lost => println!("somebody else may have imported at the same time"),
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "a guard that is dropped at once gives the lock back at once"]
pub struct LockGuard {
    turn: Arc<Turn>,
}

/// What [`LockGuard::unlock`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "work done under a lock that was lost may have been done twice"]
pub enum Unlocked {
    /// The lock was ours to the end.
    Held,
    /// The lock was lost before, and may have had another holder since. Nothing of theirs was
    /// touched.
    Lost,
}

impl LockGuard {
    pub(super) fn new(turn: Arc<Turn>) -> Self {
        Self { turn }
    }

    /// Gives the lock back and says whether it was still ours.
    ///
    /// If another caller of this factory waits, it mostly has the lock at once and the storage is
    /// not asked; nor is it if the lock [lingers](crate::LockFactoryBuilder::linger).
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the storage could not be asked. The release is tried again in the
    /// background until the ttl has passed.
    ///
    /// # Cancel safety
    ///
    /// The release is sent at the first poll. Dropping the future before or after that gives the
    /// lock back all the same.
    ///
    /// Keep polling it, or drop it: meanwhile a release that found no answer is not sent again.
    pub async fn unlock(self) -> Result<Unlocked, StorageError> {
        self.give_back().await
    }

    /// Sends the release, if there is one to send.
    pub(super) fn give_back(&self) -> GivenBack {
        GivenBack(self.turn.give_back())
    }

    /// Gives the lock of a request that is done back, in the background. Whether somebody who waited
    /// in this process has it now.
    pub(crate) fn hand_over(&self) -> bool {
        matches!(self.turn.hand_over(), Some((Ended::HandedOver, _)))
    }

    /// Whether the lock can be relied on at this moment.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # async fn import(_page: u32) {}
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let factory = LockFactory::new(MemoryStorage::new());
    /// let guard = factory.create_lock("import")?.lock(LockOptions::default()).await?;
    /// for page in 1..=3 {
    ///     if !guard.is_held() {
    ///         return Err(format!("the lock was lost before page {page}").into());
    ///     }
    ///     import(page).await;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_held(&self) -> bool {
        self.turn.look() == Holding::Held
    }

    /// How long the lock can be relied on if no renewal succeeds from now on. Zero when it is lost.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # async fn pay() {}
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let factory = LockFactory::new(MemoryStorage::new());
    /// let guard = factory.create_lock("orders/42")?.lock(LockOptions::default()).await?;
    /// // Given up before the lock can be somebody else's, whatever becomes of the renewals.
    /// tokio::time::timeout(guard.remaining(), pay()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn remaining(&self) -> Duration {
        self.turn.remaining()
    }

    /// Resolves when the lock is lost. [`LockGuard`] has an example;
    /// [`MemoryStorage::clear`](crate::storage::MemoryStorage::clear) one of a test in which that happens.
    ///
    /// # Cancel safety
    ///
    /// Can be dropped and called again; a loss is not forgotten.
    pub async fn lost(&self) -> LossReason {
        self.turn.lost().await
    }

    /// The key. [`LockKey::as_str`] is its text, [encoded](LockKey#encoding).
    pub fn key(&self) -> LockKey {
        self.turn.name().to_key()
    }

    /// The fencing token: a number below 2^53, greater than that of every holder of this key
    /// before. `None` if the factory was built [without](crate::LockFactoryBuilder::fencing), or the
    /// storage has none to give. What it rests on is said at the storage (`storage::redis`).
    ///
    /// A resource that remembers the highest token it has seen, and refuses writes with a lower
    /// one, is safe even from a holder that stood still for longer than its lock lasted and does
    /// not know it yet: `UPDATE .. SET fence = ?1, .. WHERE id = ?2 AND fence < ?1` (`<=` where one
    /// holder writes more than once). Kleppmann, "How to do distributed locking", describes it, and
    /// `examples/fenced_sqlite` does it.
    ///
    /// A holder that writes what it made of what it read has to leave its token when it reads, too:
    /// or a late write between its read and its write is taken, and then overwritten.
    pub fn fencing_token(&self) -> Option<u64> {
        self.turn.fencing_token()
    }

    /// Why the lock cannot be relied on any more, if so.
    pub(crate) fn loss(&self) -> Option<LossReason> {
        match self.turn.look() {
            Holding::Lost(reason) => Some(reason),
            _ => None,
        }
    }

    pub(crate) fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        drop(self.turn.give_back());
    }
}

/// A lock that was given back, and the release that this has sent. Resolves to the storage's word,
/// if it was asked. Dropped, the release goes on in the background.
pub(super) struct GivenBack(Option<(Ended, Option<Release>)>);

impl Future for GivenBack {
    type Output = Result<Unlocked, StorageError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match &mut self.0 {
            None | Some((Ended::HandedOver | Ended::Lingers, _)) => Ok(Unlocked::Held),
            Some((Ended::Released, Some(release))) => match ready!(Pin::new(release).poll(cx))? {
                ReleaseReply::Released | ReleaseReply::Requeued { .. } => Ok(Unlocked::Held),
                ReleaseReply::NotOurs => Ok(Unlocked::Lost),
            },
            Some(_) => Ok(Unlocked::Lost),
        })
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LockGuard").field(&self.turn).finish()
    }
}
