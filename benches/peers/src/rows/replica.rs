//! `uncontended_64_replica`, `latency_1_replica`: what it costs that a lock counts only when a replica
//! has it, beside the same without, on a server with a replica on the same machine: locks and
//! confirmed releases a second of 64 tasks, and the median cycle of one.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

pub(super) const ROWS: &[&str] = &["uncontended_64_replica", "latency_1_replica"];

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let _replica = bench.servers[0].add_replica()?;
    let peers = [Peer::OursReplicated, Peer::OursUnfenced];
    type Figure = fn(&Outcome) -> f64;
    let rate: (_, _, Figure, _) = (64, Unit::PerSecond, Outcome::rate, ROWS[0]);
    let cycle: (_, _, Figure, _) = (1, Unit::Seconds, Outcome::median_cycle, ROWS[1]);
    for (tasks, unit, figure, row) in [rate, cycle] {
        let rounds = bench.rounds(&peers, Work::uncontended(tasks))?;
        let [with, without] = peers.map(|peer| rounds.of(peer, figure));
        let report = &mut bench.report;
        report.figure(row, "ours", unit, &with);
        report.figure(row, "ours without", unit, &without);
        report.ratio(row, "without", &over(&with, &without));
    }
    Ok(())
}
