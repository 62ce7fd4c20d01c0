//! `hot_remote`: sections a second, one key that 16 tasks in each of 4 processes want all the time,
//! nothing done inside. `hot_remote_p99`: how long 99 % of the waits for it are at most; ours of the
//! process that fares worst, theirs of all together. `fairness`: the sections of the process that had
//! the fewest, over a fourth of all.

use crate::{
    Error,
    peers::Peer,
    report::{RSLOCKS, Unit, best, over},
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let work = Work::hot(4, 16);
    let [default, tuned] = RSLOCKS;
    // Fairness is ours alone.
    let against = bench.report.wants("hot_remote") || bench.report.wants("hot_remote_p99");
    let peers: &[Peer] = match against {
        true => &[Peer::Ours, default, tuned],
        false => &[Peer::Ours],
    };
    bench.check(peers, work)?;
    let rounds = bench.rounds(peers, work)?;
    let report = &bench.report;

    for &peer in peers {
        let rates = rounds.of(peer, Outcome::rate);
        report.figure("hot_remote", peer.name(), Unit::PerSecond, &rates);
    }
    let our_wait = rounds.of(Peer::Ours, Outcome::worst_p99_wait);
    report.figure(
        "hot_remote_p99",
        "ours, worst process",
        Unit::Time,
        &our_wait,
    );
    for &peer in peers {
        let waits = rounds.of(peer, Outcome::p99_wait);
        report.figure("hot_remote_p99", peer.name(), Unit::Time, &waits);
    }
    for &peer in peers {
        let shares = rounds.of(peer, Outcome::fairness);
        report.figure("fairness", peer.name(), Unit::Count, &shares);
    }

    if against {
        let their_rate = best(
            &rounds.of(default, Outcome::rate),
            &rounds.of(tuned, Outcome::rate),
            f64::max,
        );
        let ratios = over(&rounds.of(Peer::Ours, Outcome::rate), &their_rate);
        report.ratio("hot_remote", "rslock", &ratios);

        let their_wait = best(
            &rounds.of(default, Outcome::p99_wait),
            &rounds.of(tuned, Outcome::p99_wait),
            f64::min,
        );
        let ratios = over(&our_wait, &their_wait);
        report.ratio("hot_remote_p99", "rslock", &ratios);
    }
    report.ratio("fairness", "-", &rounds.of(Peer::Ours, Outcome::fairness));
    Ok(())
}
