//! `latency_1`: what one task waits for, median: from asking for a free lock to having let go of its
//! guard; the release goes on in the background. Against one PING round trip, measured in the same
//! way.
//!
//! The task asks again at once, so each acquisition queues behind the release before it. For people
//! there are also the figures of a task that does something else for a millisecond in between, as a
//! service with one request at a time would.

use std::time::Duration;

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let peers = [Peer::OursDispatched, Peer::Ping];
    let at_once = Work::uncontended(1);
    let paused = Work {
        pause: Duration::from_millis(1),
        ..at_once
    };

    let rounds = bench.rounds(&peers, paused)?;
    let [ours, ping] = peers.map(|peer| rounds.of(peer, Outcome::median_cycle));
    let report = &mut bench.report;
    report.figure("latency_1", "ours after a pause", Unit::Seconds, &ours);
    report.figure("latency_1", "ping after a pause", Unit::Seconds, &ping);
    let ratios = over(&ours, &ping);
    report.figure(
        "latency_1",
        "ours over ping after a pause",
        Unit::Number,
        &ratios,
    );

    let rounds = bench.rounds(&peers, at_once)?;
    let [ours, ping] = peers.map(|peer| rounds.of(peer, Outcome::median_cycle));
    let report = &mut bench.report;
    report.figure("latency_1", "ours", Unit::Seconds, &ours);
    report.figure("latency_1", "ping", Unit::Seconds, &ping);
    report.ratio("latency_1", "ping", &over(&ours, &ping));
    Ok(())
}
