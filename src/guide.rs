//! What to know beyond the first page, in reading order. There is nothing here but text.
//!
//! To begin with:
//!
//! 1. [Start](start): a service with a lock, in five minutes
//! 2. [How it works](how_it_works), with a picture
//! 3. [Guarantees](guarantees): what it promises, and what no lock of this kind can
//!
//! To decide:
//!
//! 4. [Storages](storages): one Redis server, Sentinel, Cluster or Redlock, and what helps against what
//! 5. [Keys](keys): what is locked
//! 6. [Placement](placement) in axum and tonic, around streams and other services, and what a rejected request gets
//! 7. [Time](time): ttl, renewal, `max_hold`, and how long a caller waits
//! 8. [Fencing](fencing): what stops a holder that does not know that its lock is over
//! 9. [Shutdown](shutdown)
//!
//! To run it:
//!
//! 10. [Failures](failures): what goes wrong, what is seen of it, and what to do
//! 11. [Operations](operations): who holds what, spans and metrics
//! 12. [Tuning](tuning): all options
//!
//! To choose it, and to keep it:
//!
//! 13. [Migration](migration) from `SET NX` by hand, the JavaScript package, and others
//! 14. [Comparison](comparison) with other libraries
//! 15. [Versions](versions): what may change, and which other crates are part of the API

// For the links in the chapters.
#[allow(unused_imports, reason = "only the text uses them")]
use crate::{
    Clock, DistributedLockLayer, HeldLock, Lock, LockFactory, LockFactoryBuilder, LockGuard,
    LockKey, LockOptions, Redlock, Unlocked,
    error::StorageError,
    inspect,
    middleware::{self, Hold, OnAcquired, OnReject, ProblemDetails, Rejection, key::KeyFunction},
    storage::{self, LockStorage, RedlockBuilder},
};

/// The chapters name each other by files, for who reads these. The targets that come before a chapter's own are those
/// of this documentation. So a doc test is named by the file of these, and its line counts from there: it is the
/// chapter's line, and as many more as there are in that file.
macro_rules! chapters {
    ($($name:ident)+) => {
        $(
            #[doc = include_str!("guide/links.md")]
            #[doc = include_str!(concat!("../docs/guide/", stringify!($name), ".md"))]
            pub mod $name {}
        )+
    };
}

chapters! {
    start
    how_it_works
    guarantees
    storages
    keys
    placement
    time
    fencing
    shutdown
    failures
    operations
    tuning
    migration
    comparison
    versions
}
