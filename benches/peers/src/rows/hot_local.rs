//! `hot_local`: sections a second, one key that 64 tasks of one process want all the time, nothing
//! done inside. `hot_local_commands`: how many commands the process sends for one section, in a run
//! of its own under MONITOR.

use crate::{
    Error,
    peers::Peer,
    report::{RSLOCKS, Unit, best, over},
    run::{Bench, Outcome, Work},
};

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let work = Work::hot(1, 64);
    let [default, tuned] = RSLOCKS;
    let peers = [Peer::Ours, default, tuned];

    if bench.report.wants("hot_local") {
        bench.check(&peers, work)?;
        let rounds = bench.rounds(&peers, work)?;
        let rates = peers.map(|peer| rounds.of(peer, Outcome::rate));
        for (peer, rates) in peers.iter().zip(&rates) {
            bench
                .report
                .figure("hot_local", peer.name(), Unit::PerSecond, rates);
        }
        let [ours, default, tuned] = &rates;
        let ratios = over(ours, &best(default, tuned, f64::max));
        bench.report.ratio("hot_local", "rslock", &ratios);
    }

    if bench.report.wants("hot_local_commands") {
        let mut commands = Vec::new();
        for _ in 0..bench.plan.rounds {
            commands.push(bench.count(Peer::Ours, work)?.commands());
        }
        bench.report.ratio("hot_local_commands", "-", &commands);
    }
    Ok(())
}
