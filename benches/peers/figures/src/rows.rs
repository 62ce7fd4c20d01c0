//! What the rows measure, in words, and what their ratios should be.

use crate::results::Goal::{self, AtLeast, AtMost};

/// What a row measures.
#[must_use]
pub fn what(row: &str) -> Option<&'static str> {
    Some(match row {
        "uncontended_64" => {
            "locks and confirmed releases per second, 64 tasks, a new key each time, fencing off"
        }
        "uncontended_64_fenced" => {
            "the same, ours with fencing tokens, which the others do not have"
        }
        "server_cpu" => "CPU time of the server per lock, fencing off",
        "server_cpu_fenced" => "the same, fencing on",
        "latency_1" => "what one caller waits for, lock after lock, median",
        "hot_local" => "sections per second, one key, 64 tasks of one process",
        "hot_local_commands" => "Redis commands per section there",
        "hot_remote" => "sections per second, one key, 4 processes × 16 tasks",
        "hot_remote_p99" => {
            "99th percentile of the wait there; ours of the process that fares worst, theirs of all together"
        }
        "hot_remote_max" => "the longest wait there",
        "fairness" => "sections of the process with the fewest, over its fair share",
        "wait_p99_1ms" => {
            "99th percentile of the wait, 4 × 16 tasks, a section of about 2 ms; over the queue's length times the section"
        }
        "handoff" => "from the release in one process to the entry in another, median",
        "uncontended_64_replica" => {
            "locks and confirmed releases per second, 64 tasks, when a lock counts only if a replica has it"
        }
        "latency_1_replica" => "the same for one caller: lock and confirmed release, median",
        "redlock_3" => {
            "locks and confirmed releases per second over 3 servers, 64 tasks, a new key each time, fencing off"
        }
        "redlock_5" => "the same over 5 servers",
        "redlock_3_hot" => "sections per second, one key over 3 servers, 4 processes × 16 tasks",
        "axum_distinct" => {
            "requests per second to a service with axum, 64 connections, a key each, fencing off"
        }
        "axum_distinct_fenced" => {
            "requests per second to a service with axum, 64 connections, a key each, ours with fencing tokens"
        }
        "axum_hot" => {
            "requests per second to a service with axum, 64 connections, one key for all, ours with fencing tokens"
        }
        _ => return None,
    })
}

/// What the ratio of a row to a peer should be, if anything was set.
#[must_use]
pub fn goal(row: &str, peer: &str) -> Option<Goal> {
    Some(match (row, peer) {
        ("uncontended_64", "by_hand") => AtLeast(1.0),
        ("uncontended_64", "rslock") => AtLeast(1.25),
        ("uncontended_64_fenced", "by_hand") => AtLeast(0.9),
        ("server_cpu", _) => AtMost(1.1),
        ("server_cpu_fenced", _) => AtMost(1.5),
        ("latency_1", _) => AtMost(1.25),
        ("hot_local", "rslock") => AtLeast(50.0),
        ("hot_local_commands", _) => AtMost(0.05),
        ("hot_remote", "rslock") => AtLeast(45.0),
        ("hot_remote_p99", "rslock") => AtMost(0.02),
        ("fairness", _) => AtLeast(0.9),
        ("wait_p99_1ms", _) => AtMost(1.2),
        ("handoff", "pubsub") => AtMost(0.85),
        ("redlock_3" | "redlock_5", "the_better") => AtLeast(1.1),
        ("axum_distinct", "by_hand") => AtLeast(0.95),
        ("axum_hot", "mutex") => AtLeast(0.8),
        _ => return None,
    })
}
