//! Fencing tokens: numbers from one counter a prefix, which never goes back. (In a cluster, one for
//! each slot; see `slot.rs`.)
//!
//! The counter is one key, `{prefix:}:fence`, and so none is left behind for each lock. It starts at
//! the server's clock, in microseconds, and is raised to it again on every new connection, when it
//! has not been used for a while, and whenever it turns out to be lower than a token that was seen
//! before: a restart without persistence, a failover to a replica that lags behind, `FLUSHALL` and
//! eviction may all set it back. As long as tokens are used up more slowly than one a microsecond,
//! over all processes and on average, the clock is ahead of them.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::names::Pieces;
use crate::{key::LockName, storage::FencingBlock};

/// The counter's name. No lock has a name with braces.
pub(super) fn counter(name: &LockName) -> Pieces<'_> {
    Pieces(["{", name.prefix(), ":}:fence"])
}

/// The tokens that a reply or a message tells of: the first of so many.
pub(super) fn block(first: i64, count: u32) -> Option<FencingBlock> {
    let first = u64::try_from(first).ok().filter(|first| *first > 0)?;
    let end = first.checked_add(u64::from(count))?;
    (count > 0 && end <= FencingBlock::LIMIT).then_some(FencingBlock { first, count })
}

/// Whether a message that tells of these tokens may be believed. Anybody may have sent it, and a
/// counter that was raised to the end of the numbers would have no tokens left: so none of a year
/// from now. A server whose clock is that far ahead is asked instead.
pub(super) fn is_likely(block: FencingBlock) -> bool {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let latest = now.unwrap_or_default() + YEAR;
    u128::from(block.last()) <= latest.as_micros()
}

/// Below any clock in microseconds: a counter that is lower was lost. The scripts know it too.
const LOST: u64 = 1 << 50;

/// The highest token that this process has seen; at first, one that every token is above.
#[derive(Debug)]
pub(super) struct Seen(AtomicU64);

impl Default for Seen {
    fn default() -> Self {
        Self(AtomicU64::new(LOST))
    }
}

impl Seen {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(super) fn update(&self, block: FencingBlock) {
        self.0
            .fetch_max(block.first + u64::from(block.count - 1), Relaxed);
    }
}
