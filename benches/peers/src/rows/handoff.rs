//! `handoff`: from the release in one process to the entry of the one task that waits in another,
//! median. The two change places after each. All waiters sit still by then: nobody else wants the
//! lock, and nothing else runs.

use std::{
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use figures::results::{Cost, Series, Unit, median};

use crate::{
    Error, load,
    peers::Peer,
    report::over,
    run::{Bench, Plan, new_run},
    team::{PROMPT, Worker},
    worker::Errand,
};

/// How long an acquisition may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The first handoffs do not count: connections and scripts are new to them.
const WARM_UP: usize = 5;

/// Those who ask again after a while, and how far a round of theirs goes: most of it is waiting, and what a round
/// comes to is the delay between their questions.
const POLLING: [Peer; 4] = [
    Peer::ByHand,
    Peer::RslockDefault,
    Peer::RslockTuned,
    Peer::RedisLock,
];
const PART_FOR_POLLING: u32 = 2;

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let Plan {
        rounds,
        handoffs,
        handoff_time,
        ..
    } = bench.plan;
    let peers = [&[Peer::Ours, Peer::Pubsub], &POLLING[..]].concat();
    let mut results: Vec<_> = peers.iter().map(|&peer| (peer, Vec::new())).collect();
    for _ in 0..rounds {
        for (peer, rounds) in &mut results {
            let limits = match POLLING.contains(peer) {
                true => Limits {
                    handoffs: handoffs / PART_FOR_POLLING as usize,
                    time: handoff_time / PART_FOR_POLLING,
                    // redis-lock asks again after 100 ms: all moments of that time are equally likely.
                    held: 5_000..105_000,
                },
                false => Limits {
                    handoffs,
                    time: handoff_time,
                    held: 5_000..10_000,
                },
            };
            rounds.push(round(bench, *peer, limits)?);
        }
    }

    let times: Vec<Vec<f64>> = { results.iter() }
        .map(|(_, rounds)| rounds.iter().map(|round| round.time).collect())
        .collect();
    for ((peer, rounds), times) in results.iter().zip(&times) {
        let who = peer.name();
        bench.report.figure("handoff", who, Unit::Seconds, times);
        let of = |cost: fn(&Round) -> f64| Series::of(&rounds.iter().map(cost).collect::<Vec<_>>());
        let cost = Cost {
            who: who.to_owned(),
            server_cpu_seconds: of(|round| round.server_cpu),
            server_commands: of(|round| round.server_commands),
            client_commands: None,
        };
        bench.report.cost("handoff", cost);
    }
    for ((peer, _), theirs) in results.iter().zip(&times).skip(1) {
        let ratios = over(&times[0], theirs);
        bench.report.ratio("handoff", peer.name(), &ratios);
    }
    Ok(())
}

/// What a round comes to.
struct Round {
    /// The median of many handoffs, in seconds.
    time: f64,
    /// The server's CPU time for one, in seconds.
    server_cpu: f64,
    /// The commands that the server carried out for one.
    server_commands: f64,
}

/// How far a round goes: so many handoffs, or as many as fit into the time.
struct Limits {
    handoffs: usize,
    time: Duration,
    /// How long a holder keeps the lock when somebody has begun to wait, in microseconds.
    held: Range<u64>,
}

fn round(bench: &mut Bench, peer: Peer, limits: Limits) -> Result<Round, Error> {
    let Limits {
        handoffs,
        time: limit,
        held,
    } = limits;
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
    let usage = bench.usage()?;
    let started = Instant::now();
    while times.len() < WARM_UP + handoffs {
        if times.len() > 2 * WARM_UP && started.elapsed() > limit {
            break;
        }
        waiter.tell("lock")?;
        waiter.hear("asking", PROMPT)?;
        // By then it has found the lock taken and waits. Not the same time for all, so that nobody
        // who polls happens to ask at the right moment each time.
        thread::sleep(Duration::from_micros(fastrand::u64(held.clone())));
        holder.tell("release")?;
        let released: u64 = holder.hear("released", PROMPT)?.parse()?;
        let entered: u64 = waiter.hear("entered", LIMIT)?.parse()?;
        let time = entered
            .checked_sub(released)
            .ok_or("EXCLUSION VIOLATED: entered before it was released")?;
        times.push(time as f64 / 1e9);
        (holder, waiter) = (waiter, holder);
    }
    let usage = bench.usage_since(usage)?;
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
    let count = times.len() as f64;
    Ok(Round {
        time: median(&times[WARM_UP..]),
        server_cpu: usage.cpu / count,
        server_commands: usage.commands as f64 / count,
    })
}
