//! `handoff`: from the release in one process to the entry of the one task that waits in another,
//! median. The two change places after each. All waiters sit still by then: nobody else wants the
//! lock, and nothing else runs.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::{
    Error, load,
    peers::Peer,
    report::{Unit, over},
    run::{Bench, new_run},
    stats::median,
    team::{PROMPT, Worker},
    worker::Errand,
};

/// How long an acquisition may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The first handoffs do not count: connections and scripts are new to them.
const WARM_UP: usize = 5;

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let (mut ours, mut pubsub) = (Vec::new(), Vec::new());
    for _ in 0..bench.plan.rounds {
        ours.push(round(bench, Peer::Ours)?);
        pubsub.push(round(bench, Peer::Pubsub)?);
    }
    bench.report.figure("handoff", "ours", Unit::Time, &ours);
    bench
        .report
        .figure("handoff", "pubsub", Unit::Time, &pubsub);
    bench
        .report
        .ratio("handoff", "pubsub", &over(&ours, &pubsub));
    Ok(())
}

/// The median of many handoffs, in seconds.
fn round(bench: &mut Bench, peer: Peer) -> Result<f64, Error> {
    let run = new_run();
    let errand = || Errand::Handoff(peer, load::key(&run, 0));
    bench.servers[0].reset()?;
    let mut team = Worker::team(&bench.url(), [errand(), errand()])?;
    let [holder, waiter] = &mut team[..] else {
        return Err("a handoff is between two".into());
    };
    let (mut holder, mut waiter) = (holder, waiter);

    holder.tell("lock")?;
    holder.hear("asking", PROMPT)?;
    holder.hear("entered", LIMIT)?;
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < WARM_UP + bench.plan.handoffs {
        if times.len() > 2 * WARM_UP && started.elapsed() > bench.plan.handoff_time {
            break;
        }
        waiter.tell("lock")?;
        waiter.hear("asking", PROMPT)?;
        // By then it has found the lock taken and waits. Not the same time for all, so that nobody
        // who polls happens to ask at the right moment each time.
        thread::sleep(Duration::from_micros(fastrand::u64(5_000..10_000)));
        holder.tell("release")?;
        let released: u64 = holder.hear("released", PROMPT)?.parse()?;
        let entered: u64 = waiter.hear("entered", LIMIT)?.parse()?;
        let time = entered
            .checked_sub(released)
            .ok_or("EXCLUSION VIOLATED: entered before it was released")?;
        times.push(time as f64 / 1e9);
        (holder, waiter) = (waiter, holder);
    }
    holder.tell("release")?;
    holder.hear("released", PROMPT)?;
    for worker in &mut team {
        worker.tell("end")?;
        worker.hear("done", PROMPT)?;
    }
    for worker in team {
        worker.end()?;
    }
    bench.validate(peer, &run)?;
    Ok(median(&times[WARM_UP..]))
}
