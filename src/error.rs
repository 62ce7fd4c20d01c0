//! What can go wrong, as types.
//!
//! No error holds a password, a URL or an owner token.
//!
//! ```
//! use tower_distributed_lock::{LockFactory, LockOptions, error::LockError, storage::MemoryStorage};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let factory = LockFactory::new(MemoryStorage::new());
//! let report = factory.create_lock("reports/monthly")?;
//! # let guard = report.lock(LockOptions::default()).await?;
//! match report.try_lock(LockOptions::default()).await {
//!     Ok(_guard) => println!("it is ours"),
//!     // Somebody else is at it.
//!     Err(LockError::NotObtained(error)) => println!("not before {:?}", error.holder_ttl),
//!     // Asking again may help, or somebody has to look at it.
//!     Err(LockError::Storage(error)) if error.kind().is_transient() => println!("later: {error}"),
//!     Err(error) => return Err(error.into()),
//! }
//! # drop(guard);
//! # Ok(())
//! # }
//! ```

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use thiserror::Error;

/// An error of any type, such as a [key function](crate::middleware::key::KeyFunction) may return.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a lock was not obtained. The [module documentation](self) has an example.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else held the lock for as long as the caller was ready to wait.
    #[error(transparent)]
    NotObtained(#[from] NotObtained),
    /// As many callers as allowed wait already, for this key or in all.
    #[error(transparent)]
    TooManyWaiters(#[from] TooManyWaiters),
    /// The storage could not be asked, or refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The factory is shutting down: [`LockFactory::drain`](crate::LockFactory::drain) was called.
    #[error("no new locks: this process is shutting down")]
    Draining,
    /// One lock of a [`LockSet`](crate::LockSet) was lost while the others were waited for.
    #[error(transparent)]
    Lost(LossReason),
}

/// Somebody else held the lock for as long as the caller was ready to wait. The
/// [module documentation](self) has an example.
#[doc(alias = "FailedToObtainKey")]
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the lock was not obtained: waited {waited:?}, asked the storage {attempts} times{}", Holder(*.holder_ttl))]
#[non_exhaustive]
pub struct NotObtained {
    /// How long the caller waited.
    pub waited: Duration,
    /// How many times the storage was asked on this caller's account. 0 if it stood behind others
    /// of this process all the time, or had no time to wait. Of several locks: for the one that was
    /// not obtained.
    pub attempts: u32,
    /// How long the holder's lock lasts if it is not renewed, as far as known. The lock may well be
    /// free earlier.
    pub holder_ttl: Option<Duration>,
}

struct Holder(Option<Duration>);

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(ttl) => write!(f, "; the holder's lock lasts {ttl:?} more"),
            None => Ok(()),
        }
    }
}

/// As many callers as allowed wait already: see
/// [`LockFactoryBuilder::max_waiters_per_key`](crate::LockFactoryBuilder::max_waiters_per_key).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("too many waiters: {limit} are allowed {scope}")]
#[non_exhaustive]
pub struct TooManyWaiters {
    /// The limit that was met.
    pub limit: usize,
    /// Whether it is the limit of one key or of the whole factory.
    pub scope: WaiterScope,
    /// How long the lease in the way lasts if it is not renewed, as far as known.
    pub holder_ttl: Option<Duration>,
}

/// What a limit on waiters counts. [`LockFactoryBuilder::max_waiters`](crate::LockFactoryBuilder::max_waiters)
/// has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaiterScope {
    /// The waiters of one key.
    Key,
    /// The waiters of all keys of a factory.
    Factory,
}

impl fmt::Display for WaiterScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "for one key",
            Self::Factory => "in all",
        })
    }
}

/// A storage could not do what was asked of it.
///
/// Cheap to clone: everybody who waited for the same answer gets it. A [storage](crate::storage::LockStorage) of your own
/// makes it:
///
/// ```
/// use std::io;
/// use tower_distributed_lock::error::{StorageError, StorageErrorKind};
///
/// let cause = io::Error::from(io::ErrorKind::ConnectionReset);
/// let error = StorageError::with_source(StorageErrorKind::Unavailable, cause);
/// assert!(error.kind().is_transient());
/// assert_eq!(error.to_string(), "the lock storage is unavailable: connection reset");
/// ```
#[derive(Clone, Debug)]
pub struct StorageError {
    kind: StorageErrorKind,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// What kind of failure a [`StorageError`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The storage cannot be reached or cannot serve now. Asking again may help.
    Unavailable,
    /// No answer in time. What was asked may or may not have been done.
    Timeout,
    /// The storage does not know us, or does not allow what we ask.
    Unauthorized,
    /// The lock's name is used for something else in the storage.
    WrongType,
    /// The storage understood and said no.
    Rejected,
}

impl StorageErrorKind {
    /// Whether asking again may help, as it may where the storage is away. The
    /// [module documentation](self) has an example.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Unavailable | Self::Timeout)
    }
}

impl StorageError {
    /// An error without a cause. One [with a cause](Self::with_source) says more to operators.
    pub fn new(kind: StorageErrorKind) -> Self {
        Self { kind, source: None }
    }

    /// An error with a cause, as in the [example](StorageError). The cause is shown to operators: keep
    /// secrets out of it.
    pub fn with_source(kind: StorageErrorKind, source: impl Into<BoxError>) -> Self {
        Self {
            kind,
            source: Some(Arc::from(source.into())),
        }
    }

    /// Which nodes answered what, if this is the error of a
    /// [`Redlock`](crate::storage::Redlock) that found no majority.
    pub fn quorum(&self) -> Option<&QuorumNotReached> {
        self.source.as_ref()?.downcast_ref()
    }

    /// What kind of failure this is; the [module documentation](self) looks whether it is
    /// [transient](StorageErrorKind::is_transient).
    pub fn kind(&self) -> StorageErrorKind {
        self.kind
    }

    /// The cause as it was given.
    #[cfg(feature = "redis")]
    pub(crate) fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|cause| cause as &(dyn StdError + 'static))
    }
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            StorageErrorKind::Unavailable => "the lock storage is unavailable",
            StorageErrorKind::Timeout => "the lock storage did not answer in time",
            StorageErrorKind::Unauthorized => "the lock storage denied access",
            StorageErrorKind::WrongType => "the lock's name holds something else in the storage",
            StorageErrorKind::Rejected => "the lock storage refused",
        })?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for StorageError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // The cause is part of our own text already; what lies below it is the next link of the
        // chain.
        self.source.as_ref().and_then(|source| source.source())
    }
}

/// Too few of a [`Redlock`](crate::storage::Redlock)'s nodes answered to say whether the lock is
/// ours. The cause of a [`StorageError`]: see [`StorageError::quorum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{needed} of {nodes} nodes are needed: {ours} said yes, {not_ours} said no, {late} did not \
     answer in time, {failed} failed"
)]
#[non_exhaustive]
pub struct QuorumNotReached {
    /// How many nodes there are.
    pub nodes: usize,
    /// How many have to agree.
    pub needed: usize,
    /// How many did what they were asked.
    pub ours: usize,
    /// How many said that the lock is free, or held by somebody else.
    pub not_ours: usize,
    /// How many did not answer within the
    /// [time limit of a node](crate::storage::RedlockBuilder::node_timeout).
    pub late: usize,
    /// How many could not be asked, or refused.
    pub failed: usize,
}

/// A lock was not taken from the holder that was meant. See
/// [`LockInspector::force_release_if`](crate::inspect::LockInspector::force_release_if).
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum ForceReleaseError {
    /// Nothing was done: somebody else holds the lock by now.
    #[error("the lock has another holder by now: nothing was done")]
    OtherHolder,
    /// The storage could not do it, or did not say.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Why a lock was lost before it was given back. [`LockGuard::lost`](crate::LockGuard::lost) resolves to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum LossReason {
    /// Its time ran out before a renewal succeeded.
    #[error("the lock's time ran out before it could be renewed")]
    Expired,
    /// The storage says that the lock is not ours: it was removed or has another owner.
    #[error("the lock is no longer ours in the storage")]
    NotOurs,
    /// Somebody [took it away](crate::inspect::LockInspector::force_release).
    #[error("the lock was released by force")]
    ForceReleased,
    /// It was held for longer than [`max_hold`](crate::LockOptionsBuilder::max_hold).
    #[error("the lock was held for longer than max_hold allows")]
    MaxHold,
    /// The factory was [drained](crate::LockFactory::drain) and this holder did not finish in time.
    #[error("the lock was taken back because this process is shutting down")]
    Draining,
}

/// A key that cannot be used: see [`LockKey::new`](crate::LockKey::new).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum InvalidKey {
    /// The key is empty.
    #[error("a lock key must not be empty")]
    Empty,
    /// The key is longer than [`LockKey::MAX_LEN`](crate::LockKey::MAX_LEN).
    #[error("a lock key has at most 1024 bytes")]
    TooLong,
    /// No key was given where several may be.
    #[error("a set of locks needs at least one key")]
    NoKeys,
    /// There are more keys than [`LockSet::MAX_LEN`](crate::LockSet::MAX_LEN).
    #[error("a set of locks has at most 64 keys")]
    TooMany,
    /// The text is not that of a stored key: see
    /// [`LockKey::from_encoded`](crate::LockKey::from_encoded).
    #[error("no lock key is stored like that")]
    NotEncoded,
}

/// A setting of a factory, or of a [`Redlock`](crate::Redlock), out of its range: see
/// [`LockFactoryBuilder::build`](crate::LockFactoryBuilder::build).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum InvalidSettings {
    /// The prefix is not 1 to 64 ASCII letters, digits, `-`, `_`, `.` or `/`.
    #[error("a key prefix is 1 to 64 ASCII letters, digits, `-`, `_`, `.` or `/`")]
    KeyPrefix,
    /// The storage time-out is zero or longer than 24 h.
    #[error("storage_timeout must be more than zero and at most 24 h")]
    StorageTimeout,
    /// The linger time is longer than 24 h.
    #[error("linger must be at most 24 h")]
    Linger,
    /// The lock delay is longer than 24 h.
    #[error("lock_delay must be at most 24 h")]
    LockDelay,
    /// A Redlock without nodes.
    #[error("a Redlock needs at least one node")]
    NoNodes,
    /// The same server twice among the nodes of a Redlock: its word would count twice.
    #[error("the nodes of a Redlock have to be different servers")]
    SameNode,
    /// The time limit of a Redlock's nodes is zero or longer than 24 h.
    #[error("node_timeout must be more than zero and at most 24 h")]
    NodeTimeout,
    /// Nobody could wait, and so nobody could ask.
    #[error("max_waiters and max_waiters_per_key must be at least 1")]
    MaxWaiters,
    /// The label is empty or longer than 128 bytes.
    #[error("a label has 1 to 128 bytes")]
    Label,
}

/// An option out of its range: see [`LockOptionsBuilder::build`](crate::LockOptionsBuilder::build).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum InvalidOptions {
    /// The ttl is shorter than 10 ms or longer than 24 h.
    #[error("ttl must be from 10 ms to 24 h")]
    Ttl,
    /// The interval is shorter than 1 ms or longer than 24 h.
    #[error("interval must be from 1 ms to 24 h")]
    Interval,
    /// `retries` × `interval` is longer than 24 h.
    #[error("retries times interval must not exceed 24 h")]
    Wait,
    /// `max_hold` is shorter than 10 ms or longer than 24 h.
    #[error("max_hold must be from 10 ms to 24 h")]
    MaxHold,
}

impl From<std::convert::Infallible> for InvalidKey {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}
