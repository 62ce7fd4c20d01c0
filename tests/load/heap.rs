//! How much memory this process has allocated and not freed.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// In bytes, as they were asked for.
pub fn live() -> usize {
    let stats = ALLOCATOR.stats();
    // Read one after the other, while others may allocate.
    stats
        .bytes_allocated
        .saturating_sub(stats.bytes_deallocated)
}

/// How much of this process is in memory, in KB. `None` where the system does not tell.
pub fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}
