//! Requests a second to a service with axum, over 64 connections that are kept open.
//! `axum_distinct`: each request with a key of its own; `axum_distinct_fenced`: the same with fencing
//! tokens, which nobody else has. `axum_hot`: all with the same key.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

pub(super) const ROWS: &[&str] = &["axum_distinct", "axum_distinct_fenced", "axum_hot"];

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    row(
        bench,
        "axum_distinct",
        Work::uncontended(64),
        Peer::AxumOursUnfenced,
        &[
            (Peer::AxumByHand, "by_hand"),
            (Peer::AxumRslock, "rslock"),
            (Peer::AxumNone, "no_lock"),
        ],
    )?;
    row(
        bench,
        "axum_distinct_fenced",
        Work::uncontended(64),
        Peer::AxumOurs,
        &[(Peer::AxumByHand, "by_hand")],
    )?;
    row(
        bench,
        "axum_hot",
        Work::hot(1, 64),
        Peer::AxumOurs,
        &[
            (Peer::AxumByHand, "by_hand"),
            (Peer::AxumMutex, "mutex"),
            (Peer::AxumNone, "no_lock"),
        ],
    )
}

fn row(
    bench: &mut Bench,
    row: &str,
    work: Work,
    ours: Peer,
    against: &[(Peer, &str)],
) -> Result<(), Error> {
    if !bench.report.wants(row) {
        return Ok(());
    }
    let mut peers = vec![ours];
    peers.extend(against.iter().map(|(peer, _)| *peer));
    let rounds = bench.rounds(&peers, work)?;
    let our_rate = rounds.of(ours, Outcome::rate);
    bench.report.figure(row, "ours", Unit::PerSecond, &our_rate);
    for (peer, name) in against {
        let their_rate = rounds.of(*peer, Outcome::rate);
        bench.report.figure(row, name, Unit::PerSecond, &their_rate);
        bench.report.ratio(row, name, &over(&our_rate, &their_rate));
    }
    // The mutexes, and no lock, have no server.
    let with_server = |peer: &Peer| !matches!(peer, Peer::AxumMutex | Peer::AxumNone);
    let mut named = vec![(ours, "ours")];
    named.extend(against.iter().filter(|(peer, _)| with_server(peer)));
    bench.costs(row, work, &rounds, &named)
}
