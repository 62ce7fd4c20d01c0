//! `uncontended_64`: acquisitions and confirmed releases a second, 64 tasks in one process, a random
//! key each. `server_cpu`: what one of these cycles costs the server. `.._fenced`: the same with
//! fencing tokens, which nobody else has.

use figures::results::Unit;

use crate::{
    Error,
    peers::Peer,
    report::over,
    run::{Bench, Outcome, Work},
};

/// A way to use our library, and its rows.
struct Variant {
    ours: Peer,
    rate: &'static str,
    rate_against: &'static [(Peer, &'static str)],
    server_cpu: &'static str,
}

const VARIANTS: &[Variant] = &[
    Variant {
        ours: Peer::OursUnfenced,
        rate: "uncontended_64",
        // Its retry delay plays no part where all locks are free.
        rate_against: &[
            (Peer::ByHand, "by_hand"),
            (Peer::RslockDefault, "rslock"),
            (Peer::RedisLock, "redis-lock"),
            (Peer::DistributedLock, "distributed-lock"),
        ],
        server_cpu: "server_cpu",
    },
    Variant {
        ours: Peer::Ours,
        rate: "uncontended_64_fenced",
        rate_against: &[(Peer::ByHand, "by_hand")],
        server_cpu: "server_cpu_fenced",
    },
];

/// The rows of all variants.
pub(super) const ROWS: &[&str] = &[
    "uncontended_64",
    "uncontended_64_fenced",
    "server_cpu",
    "server_cpu_fenced",
];

pub(super) fn measure(bench: &mut Bench) -> Result<(), Error> {
    let wanted = |variant: &&Variant| {
        bench.report.wants(variant.rate) || bench.report.wants(variant.server_cpu)
    };
    let variants: Vec<&Variant> = VARIANTS.iter().filter(wanted).collect();
    let mut peers: Vec<Peer> = variants.iter().map(|variant| variant.ours).collect();
    peers.push(Peer::ByHand);
    for (peer, _) in variants.iter().flat_map(|variant| variant.rate_against) {
        if !peers.contains(peer) {
            peers.push(*peer);
        }
    }

    let work = Work::uncontended(64);
    let rounds = bench.rounds(&peers, work)?;
    // The same rounds, and so the same costs.
    let mut costed = Vec::new();
    for Variant {
        ours,
        rate,
        rate_against,
        server_cpu,
    } in variants
    {
        let report = &mut bench.report;
        let our_rate = rounds.of(*ours, Outcome::rate);
        report.figure(rate, "ours", Unit::PerSecond, &our_rate);
        for (peer, name) in *rate_against {
            let their_rate = rounds.of(*peer, Outcome::rate);
            report.figure(rate, name, Unit::PerSecond, &their_rate);
            report.ratio(rate, name, &over(&our_rate, &their_rate));
        }
        let our_cpu = rounds.of(*ours, Outcome::server_cpu);
        let their_cpu = rounds.of(Peer::ByHand, Outcome::server_cpu);
        report.figure(server_cpu, "ours", Unit::Seconds, &our_cpu);
        report.figure(server_cpu, "by_hand", Unit::Seconds, &their_cpu);
        report.ratio(server_cpu, "by_hand", &over(&our_cpu, &their_cpu));

        let mut named = vec![(*ours, "ours")];
        named.extend(
            rate_against
                .iter()
                .filter(|(peer, _)| !costed.contains(peer)),
        );
        bench.costs(rate, work, &rounds, &named)?;
        costed.extend(named.iter().map(|(peer, _)| *peer));
    }
    Ok(())
}
