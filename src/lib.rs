// The links of the README are to files. These come first, and so count here.
#![doc = include_str!("guide/links.md")]
#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod clock;
mod coordinator;
#[cfg(feature = "dashboard")]
#[cfg_attr(docsrs, doc(cfg(feature = "dashboard")))]
pub mod dashboard;
pub mod error;
#[cfg(test)]
mod explorer;
#[cfg(tower_distributed_lock_fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(any(doc, doctest))]
pub mod guide;
pub mod inspect;
mod key;
mod lock;
pub mod middleware;
mod options;
pub mod storage;
mod sync;
mod text;

pub use crate::{
    clock::Clock,
    key::LockKey,
    lock::{
        Lock, LockFactory, LockFactoryBuilder, LockFuture, LockGuard, LockSet, LockSetFuture,
        LockSetGuard, Unlocked,
    },
    middleware::{DistributedLockLayer, HeldLock},
    options::{LockOptions, LockOptionsBuilder},
    storage::Redlock,
};
