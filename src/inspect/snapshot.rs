//! What a look at the locks shows.

use std::{sync::Arc, time::Duration};

use crate::key::LockKey;

/// The locks of a storage at one moment, as far as it could be found out. See
/// [`LockInspector::locks`](crate::inspect::LockInspector::locks).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The locks that are held, by key.
    pub locks: Vec<LockInfo>,
    /// Whether there may be more locks than these.
    pub more: bool,
}

/// A lock that is held, in a [`Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockInfo {
    /// The key, without the prefix.
    pub key: LockKey,
    /// The process that has it.
    pub holder: Process,
    /// How long the lock lasts if it is not renewed, also if its process ends now. `None`: it never
    /// expires, as a lock of another client may.
    pub ttl: Option<Duration>,
    /// For how long its present holder, a [`LockGuard`](crate::LockGuard), has had it. `None` if the
    /// process did not answer, or keeps the lock for its next caller
    /// ([`linger`](crate::LockFactoryBuilder::linger)).
    pub held_for: Option<Duration>,
    /// The present holder's [fencing token](crate::LockGuard::fencing_token). `None` if it is not
    /// known or there is none.
    pub fencing_token: Option<u64>,
    /// Who waits: the callers of the holder's own process first, then the processes that stand in
    /// the storage's queue, in its order.
    pub waiters: Vec<Waiting>,
}

/// A lock that was taken away by [force](crate::inspect::LockInspector::force_release).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForceReleased {
    /// What it was just before.
    pub lock: LockInfo,
    /// Whether word was sent to the process that had it. If not, nobody listens there: it has ended,
    /// cannot be reached, cannot listen, or is a client of another kind. Then it finds out at its next
    /// renewal.
    pub holder_told: bool,
}

/// A process that has or wants a lock: a [`LockFactory`](crate::LockFactory), or a client of another
/// kind.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Process {
    /// What it [calls itself](crate::LockFactoryBuilder::label).
    pub label: Option<String>,
    /// Whether it is the one that looks.
    pub is_this: bool,
    /// Whether it said something of its locks in time. If not, it is gone, stands still, cannot be
    /// reached, or is not a process that uses this crate.
    pub answered: bool,
}

/// A process that waits for a lock, in [`LockInfo::waiters`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiting {
    /// The process.
    pub process: Process,
    /// How many callers wait for the lock there. `None` if the process did not answer.
    pub callers: Option<usize>,
}

impl Process {
    pub(super) fn this(label: Option<&Arc<str>>) -> Self {
        Self {
            is_this: true,
            ..Self::answering(label)
        }
    }

    pub(super) fn answering(label: Option<&Arc<str>>) -> Self {
        Self {
            label: label.map(|label| label.as_ref().to_owned()),
            is_this: false,
            answered: true,
        }
    }

    pub(super) fn silent() -> Self {
        Self {
            label: None,
            is_this: false,
            answered: false,
        }
    }
}
