//! `redlock_3`, `redlock_5`: acquisitions and confirmed releases a second over 3 and 5 servers, 64 tasks
//! in one process, a random key each, without fencing tokens, which the others do not have. For
//! people, the same with tokens. `redlock_3_hot`: sections a second where 4 processes want one key all
//! the time; redis-lock cannot be in it, for an attempt that splits the votes keeps its part until that expires.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

pub(super) const ROWS: &[&str] = &["redlock_3", "redlock_5", "redlock_3_hot"];

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    for (row, servers) in [("redlock_3", 3), ("redlock_5", 5)] {
        if bench.report.wants(row) {
            bench.set_servers(servers)?;
            uncontended(bench, row)?;
        }
    }
    if bench.report.wants("redlock_3_hot") {
        bench.set_servers(3)?;
        hot(bench)?;
    }
    bench.set_servers(1)
}

fn uncontended(bench: &mut Bench, row: &str) -> Result<(), Error> {
    let peers = [
        Peer::OursRedlockUnfenced,
        Peer::RslockDefault,
        Peer::RedisLock,
        Peer::OursRedlock,
    ];
    let work = Work::uncontended(64);
    let rounds = bench.rounds(&peers, work)?;
    let [ours, rslock, redis_lock, fenced] = peers.map(|peer| rounds.of(peer, Outcome::rate));
    let report = &mut bench.report;
    report.figure(row, "ours", Unit::PerSecond, &ours);
    report.figure(row, "ours_with_tokens", Unit::PerSecond, &fenced);
    let best: Vec<f64> = { rslock.iter().zip(&redis_lock) }
        .map(|(rslock, redis_lock)| rslock.max(*redis_lock))
        .collect();
    for (name, rate) in [("rslock", &rslock), ("redis-lock", &redis_lock)] {
        report.figure(row, name, Unit::PerSecond, rate);
    }
    let [ours, fenced] = [ours, fenced].map(|ours| over(&ours, &best));
    report.figure(row, "with tokens over the better", Unit::Number, &fenced);
    report.ratio(row, "the_better", &ours);
    bench.costs(row, work, &rounds, &peers.map(|peer| (peer, name(peer))))
}

/// What a peer is called in these rows.
fn name(peer: Peer) -> &'static str {
    match peer {
        Peer::OursRedlockUnfenced => "ours",
        Peer::OursRedlock => "ours_with_tokens",
        Peer::RslockDefault => "rslock",
        other => other.name(),
    }
}

fn hot(bench: &mut Bench) -> Result<(), Error> {
    let row = "redlock_3_hot";
    let peers = [Peer::OursRedlock, Peer::RslockDefault];
    let work = Work::hot(4, 16);
    bench.check(&[Peer::OursRedlock], work)?;
    let rounds = bench.rounds(&peers, work)?;
    let [ours, theirs] = peers.map(|peer| rounds.of(peer, Outcome::rate));
    let report = &mut bench.report;
    report.figure(row, "ours", Unit::PerSecond, &ours);
    report.figure(row, "rslock", Unit::PerSecond, &theirs);
    let waits = rounds.of(Peer::OursRedlock, Outcome::worst_p99_wait);
    report.figure(row, "ours, p99 of the worst process", Unit::Seconds, &waits);
    let fairness = rounds.of(Peer::OursRedlock, Outcome::fairness);
    report.figure(row, "ours, fairness", Unit::Number, &fairness);
    report.ratio(row, "rslock", &over(&ours, &theirs));
    let named = [(Peer::OursRedlock, "ours"), (Peer::RslockDefault, "rslock")];
    bench.costs(row, work, &rounds, &named)
}
