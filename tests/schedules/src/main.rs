//! The lock with everything under it, of Redis only how calls are sent, where shuttle says which thread runs next. See `models.rs`.
//!
//! It is a program and no test, because the modules bring their own tests, which are not for here.

#![allow(
    unused_imports,
    reason = "of modules that are but a part of their crate"
)]
#![allow(
    clippy::wrong_self_convention,
    reason = "of what is public there, where it is not asked for"
)]

mod calls;
#[path = "../../../src/clock.rs"]
mod clock;
#[path = "../../../src/coordinator/mod.rs"]
mod coordinator;
#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/inspect/mod.rs"]
mod inspect;
#[path = "../../../src/key.rs"]
mod key;
#[path = "../../../src/lock/mod.rs"]
mod lock;
mod models;
mod nodes;
#[path = "../../../src/options.rs"]
mod options;
#[path = "../../../src/storage/mod.rs"]
mod storage;
#[path = "../../../src/text.rs"]
mod text;

/// In the place of the crate's own.
mod sync {
    pub(crate) use shuttle::{
        hint,
        sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic},
        thread_local,
    };
}

pub use crate::{
    clock::Clock,
    key::LockKey,
    lock::{
        Lock, LockFactory, LockFactoryBuilder, LockFuture, LockGuard, LockSet, LockSetFuture,
        LockSetGuard, Unlocked,
    },
    options::{LockOptions, LockOptionsBuilder},
    storage::Redlock,
};

fn main() {
    models::run();
}
