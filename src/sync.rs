//! What threads share, as the standard library has it.
//!
//! The tests of schedules (`tests/schedules`) compile the modules that use this with another in its
//! place, which tries the orders in which threads may come by.

pub(crate) use std::{
    hint,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic},
    thread_local,
};
