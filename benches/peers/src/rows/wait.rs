//! `wait_p99_1ms`: how long 99 % of the waits are at most, 16 tasks in each of 4 processes that want
//! one key all the time and keep it for 1 ms; of the process that fares worst. Against the ideal: each waits for one section of each
//! of the 63 others, at the length that was measured, and passing the lock on takes no time.

use std::time::Duration;

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let work = Work {
        section: Duration::from_millis(1),
        ..Work::hot(4, 16)
    };
    let others = (work.processes * work.tasks - 1) as f64;
    // Of each process, so few waits are in a second that the 99th percentile would be the longest.
    let window = bench.plan.window.max(Duration::from_secs(2));
    let rounds = bench.rounds_of(window, &[Peer::Ours], work)?;
    let waits = rounds.of(Peer::Ours, Outcome::worst_p99_wait);
    let sections = rounds.of(Peer::Ours, Outcome::mean_section);
    let ideal: Vec<f64> = sections.iter().map(|section| others * section).collect();

    let report = &mut bench.report;
    report.figure("wait_p99_1ms", "measured section", Unit::Seconds, &sections);
    report.figure("wait_p99_1ms", "ideal", Unit::Seconds, &ideal);
    report.figure("wait_p99_1ms", "ours, worst process", Unit::Seconds, &waits);
    let all = rounds.of(Peer::Ours, Outcome::p99_wait);
    report.figure("wait_p99_1ms", "ours, all together", Unit::Seconds, &all);
    let shares = rounds.of(Peer::Ours, Outcome::fairness);
    report.figure("wait_p99_1ms", "ours, fairness", Unit::Number, &shares);
    report.ratio("wait_p99_1ms", "ideal", &over(&waits, &ideal));
    Ok(())
}
