//! Callers that are dropped, at every point at which that is possible and whatever becomes of the
//! calls that they have sent: nothing of them is left, and the next one gets its turn.
//!
//! A scene is run once to count its points, and then once for each point and each fate of what was
//! on its way. `DROPS` runs one of them alone; a failure says what to set it to.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

mod in_memory;
#[path = "../kit/mod.rs"]
mod kit;
mod network;
mod on_servers;
mod points;
mod scenes;
mod stage;

use std::time::Duration;

use self::points::{FATES, Fate, Plan, Points, visit_all};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
