//! `hot_local`: sections a second, one key that 64 tasks of one process want all the time, nothing
//! done inside. `hot_local_commands`: how many commands the process sends for one section, in a run
//! of its own under MONITOR.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::{WAITING, best, over},
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let work = Work::hot(1, 64);
    let row = "hot_local";

    if bench.report.wants(row) {
        bench.check(&WAITING, work)?;
        let rounds = bench.rounds(&WAITING, work)?;
        let rates = WAITING.map(|peer| rounds.of(peer, Outcome::rate));
        let report = &mut bench.report;
        for (peer, rates) in WAITING.iter().zip(&rates) {
            report.figure(row, peer.name(), Unit::PerSecond, rates);
        }
        let [ours, default, tuned, by_hand, redis_lock] = &rates;
        let rslock = best(default, tuned, f64::max);
        report.ratio(row, "rslock", &over(ours, &rslock));
        report.ratio(row, "by_hand", &over(ours, by_hand));
        report.ratio(row, "redis-lock", &over(ours, redis_lock));
        let named = WAITING.map(|peer| (peer, peer.name()));
        bench.costs(row, work, &rounds, &named)?;
    }

    if bench.report.wants("hot_local_commands") {
        let mut commands = Vec::new();
        for _ in 0..bench.plan.rounds {
            commands.push(bench.count(Peer::Ours, work)?.client_commands());
        }
        bench.report.ratio("hot_local_commands", "-", &commands);
    }
    Ok(())
}
