//! The rows, by the runs that they come out of.

mod axum;
mod handoff;
mod hot_local;
mod hot_remote;
mod latency;
mod redlock;
mod replica;
mod uncontended;
mod wait;

use crate::{Error, run::Bench};

/// Rows that are measured together.
pub(crate) struct Group {
    pub(crate) rows: &'static [&'static str],
    pub(crate) measure: fn(&mut Bench) -> Result<(), Error>,
}

pub(crate) const GROUPS: [Group; 9] = [
    Group {
        rows: uncontended::ROWS,
        measure: uncontended::measure,
    },
    Group {
        rows: &["latency_1"],
        measure: latency::measure,
    },
    Group {
        rows: &["hot_local", "hot_local_commands"],
        measure: hot_local::measure,
    },
    Group {
        rows: &["hot_remote", "hot_remote_p99", "hot_remote_max", "fairness"],
        measure: hot_remote::measure,
    },
    Group {
        rows: &["wait_p99_1ms"],
        measure: wait::measure,
    },
    Group {
        rows: &["handoff"],
        measure: handoff::measure,
    },
    Group {
        rows: replica::ROWS,
        measure: replica::measure,
    },
    Group {
        rows: redlock::ROWS,
        measure: redlock::measure,
    },
    Group {
        rows: axum::ROWS,
        measure: axum::measure,
    },
];
