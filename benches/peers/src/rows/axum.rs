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

/// A row: its name, ours, and those that it is compared with.
type Compared = (&'static str, Peer, &'static [(Peer, &'static str)]);

/// Out of the same rounds.
const DISTINCT: &[Compared] = &[
    (
        "axum_distinct",
        Peer::AxumOursUnfenced,
        &[
            (Peer::AxumByHand, "by_hand"),
            (Peer::AxumRslock, "rslock"),
            (Peer::AxumNone, "no_lock"),
        ],
    ),
    (
        "axum_distinct_fenced",
        Peer::AxumOurs,
        &[(Peer::AxumByHand, "by_hand")],
    ),
];

const HOT: &[Compared] = &[(
    "axum_hot",
    Peer::AxumOurs,
    &[
        (Peer::AxumByHand, "by_hand"),
        (Peer::AxumMutex, "mutex"),
        (Peer::AxumNone, "no_lock"),
    ],
)];

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    compare(bench, DISTINCT, Work::uncontended(64))?;
    compare(bench, HOT, Work::hot(1, 64))
}

fn compare(bench: &mut Bench, rows: &[Compared], work: Work) -> Result<(), Error> {
    let rows: Vec<&Compared> = { rows.iter() }
        .filter(|(row, _, _)| bench.report.wants(row))
        .collect();
    let mut peers = Vec::new();
    for (_, ours, against) in &rows {
        for peer in [*ours]
            .into_iter()
            .chain(against.iter().map(|(peer, _)| *peer))
        {
            if !peers.contains(&peer) {
                peers.push(peer);
            }
        }
    }
    let rounds = bench.rounds(&peers, work)?;

    // The mutexes, and no lock, have no server.
    let mut costed = vec![Peer::AxumMutex, Peer::AxumNone];
    for (row, ours, against) in rows {
        let our_rate = rounds.of(*ours, Outcome::rate);
        bench.report.figure(row, "ours", Unit::PerSecond, &our_rate);
        for (peer, name) in *against {
            let their_rate = rounds.of(*peer, Outcome::rate);
            bench.report.figure(row, name, Unit::PerSecond, &their_rate);
            bench.report.ratio(row, name, &over(&our_rate, &their_rate));
        }
        let mut named = vec![(*ours, "ours")];
        named.extend(against.iter().filter(|(peer, _)| !costed.contains(peer)));
        bench.costs(row, work, &rounds, &named)?;
        costed.extend(named.iter().map(|(peer, _)| *peer));
    }
    Ok(())
}
