//! `hot_remote`: sections a second, one key that 16 tasks in each of 4 processes want all the time,
//! nothing done inside. `hot_remote_p99`: how long 99 % of the waits for it are at most; ours of the
//! process that fares worst, theirs of all together. `hot_remote_max`: the longest wait of all, which
//! 99 % say nothing of where few waits are for another process. `fairness`: the sections of the process that had
//! the fewest, over a fourth of all.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::{WAITING, best, over},
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let work = Work::hot(4, 16);
    // Fairness is ours alone.
    let against = ["hot_remote", "hot_remote_p99", "hot_remote_max"]
        .iter()
        .any(|row| bench.report.wants(row));
    let peers: &[Peer] = match against {
        true => &WAITING,
        false => &[Peer::Ours],
    };
    bench.check(peers, work)?;
    let rounds = bench.rounds(peers, work)?;
    let report = &mut bench.report;

    for &peer in peers {
        let rates = rounds.of(peer, Outcome::rate);
        report.figure("hot_remote", peer.name(), Unit::PerSecond, &rates);
        let waits = rounds.of(peer, Outcome::p99_wait);
        report.figure("hot_remote_p99", peer.name(), Unit::Seconds, &waits);
        let longest = rounds.of(peer, Outcome::longest_wait);
        report.figure("hot_remote_max", peer.name(), Unit::Seconds, &longest);
        let shares = rounds.of(peer, Outcome::fairness);
        report.figure("fairness", peer.name(), Unit::Number, &shares);
    }
    let our_wait = rounds.of(Peer::Ours, Outcome::worst_p99_wait);
    report.figure(
        "hot_remote_p99",
        "ours_worst_process",
        Unit::Seconds,
        &our_wait,
    );

    if against {
        let [our_rate, default, tuned, by_hand, redis_lock] =
            WAITING.map(|peer| rounds.of(peer, Outcome::rate));
        let rslock = best(&default, &tuned, f64::max);
        for (name, rate) in [
            ("rslock", &rslock),
            ("by_hand", &by_hand),
            ("redis-lock", &redis_lock),
        ] {
            report.ratio("hot_remote", name, &over(&our_rate, rate));
        }
        let [_, default, tuned, by_hand, redis_lock] =
            WAITING.map(|peer| rounds.of(peer, Outcome::p99_wait));
        let rslock = best(&default, &tuned, f64::min);
        for (name, wait) in [
            ("rslock", &rslock),
            ("by_hand", &by_hand),
            ("redis-lock", &redis_lock),
        ] {
            report.ratio("hot_remote_p99", name, &over(&our_wait, wait));
        }
        let [our_longest, default, tuned, by_hand, redis_lock] =
            WAITING.map(|peer| rounds.of(peer, Outcome::longest_wait));
        let rslock = best(&default, &tuned, f64::min);
        for (name, longest) in [
            ("rslock", &rslock),
            ("by_hand", &by_hand),
            ("redis-lock", &redis_lock),
        ] {
            report.ratio("hot_remote_max", name, &over(&our_longest, longest));
        }
    }
    report.ratio("fairness", "-", &rounds.of(Peer::Ours, Outcome::fairness));
    match against {
        true => bench.costs(
            "hot_remote",
            work,
            &rounds,
            &WAITING.map(|peer| (peer, peer.name())),
        ),
        false => Ok(()),
    }
}
