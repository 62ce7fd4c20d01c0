//! Processes that go on over a real Redis, and what grows meanwhile.
//!
//! They work for a while, then rest; at rest there should be exactly what there was at the rest
//! before. In every third round all connections are cut, and the server forgets its scripts.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::{
    kit::{LIMIT, RedisServer, eventually},
    replica::{Replica, Report},
    run, seconds,
};

const PROCESSES: usize = 3;

/// All processes and the server, at the end of a round.
#[derive(Clone, Copy, Debug)]
struct Rest {
    /// Of the process that has most.
    live: usize,
    resident: usize,
    tasks: usize,
    /// Of all.
    served: u64,
    refused: u64,
    lost: u64,
    errors: u64,
    p50: u64,
    p99: u64,
    slowest: u64,
    /// The server's connections, keys, and memory in bytes.
    connections: usize,
    keys: usize,
    used_memory: usize,
}

impl Rest {
    fn new(reports: &[Report], server: (usize, usize, usize)) -> Self {
        let most = |of: fn(&Report) -> usize| reports.iter().map(of).max().unwrap_or(0);
        let slowest = |of: fn(&Report) -> u64| reports.iter().map(of).max().unwrap_or(0);
        let all = |of: fn(&Report) -> u64| reports.iter().map(of).sum();
        let (connections, keys, used_memory) = server;
        Self {
            live: most(|it| it.live),
            resident: most(|it| it.resident),
            tasks: most(|it| it.tasks),
            served: all(|it| it.served),
            refused: all(|it| it.refused),
            lost: all(|it| it.lost),
            errors: all(|it| it.errors),
            p50: slowest(|it| it.p50),
            p99: slowest(|it| it.p99),
            slowest: slowest(|it| it.slowest),
            connections,
            keys,
            used_memory,
        }
    }

    fn line(&self, round: usize) -> String {
        let Self {
            live,
            resident,
            tasks,
            served,
            refused,
            lost,
            errors,
            connections,
            keys,
            used_memory,
            ..
        } = self;
        let [p50, p99, slowest] = [self.p50, self.p99, self.slowest].map(|it| it as f64 / 1e3);
        format!(
            "{round:>5} {resident:>8} {live:>9} {tasks:>5} {connections:>5} {keys:>4} \
             {used_memory:>9} {served:>8} {refused:>7} {lost:>5} {errors:>6} {p50:>8.1} {p99:>8.1} \
             {slowest:>8.1}"
        )
    }
}

const HEAD: &str = "round   RSS KB  live B  tasks conns keys  redis B    served refused  lost errors  \
                    p50 ms   p99 ms   max ms";

/// What has grown, if anything. Memory of the first round is that of a process that has just begun.
fn verdict(rests: &[Rest]) -> Result<String, String> {
    let third = (rests.len() / 3).max(1);
    let settled = &rests[1.min(rests.len() - 1)..];
    let (first, last) = (&settled[..third], &settled[settled.len() - third..]);
    let least = |of: fn(&Rest) -> usize| {
        let least = |rests: &[Rest]| rests.iter().map(of).min().unwrap_or(0);
        (least(first), least(last))
    };
    let all = |of: fn(&Rest) -> u64| rests.iter().map(of).sum::<u64>();
    let said = format!(
        "{} locks given, {} refused, {} lost, {} errors; at rest, first and last third: bytes {:?}, \
         RSS in KB {:?}, tasks {:?}, connections {:?}, bytes in Redis {:?}",
        all(|it| it.served),
        all(|it| it.refused),
        all(|it| it.lost),
        all(|it| it.errors),
        least(|it| it.live),
        least(|it| it.resident),
        least(|it| it.tasks),
        least(|it| it.connections),
        least(|it| it.used_memory),
    );
    // How much more there may be in the last third: the buffers of each new connection are as large
    // as its first minutes make them. In an hour, one byte a lock would come to more.
    type Figure = fn(&Rest) -> usize;
    let limits: [(&str, Figure, usize); 5] = [
        ("bytes", |it| it.live, 96 * 1024),
        ("RSS in KB", |it| it.resident, 4 * 1024),
        ("tasks", |it| it.tasks, 0),
        ("connections", |it| it.connections, 0),
        ("bytes in Redis", |it| it.used_memory, 256 * 1024),
    ];
    let grown = limits.into_iter().filter_map(|(what, of, more)| {
        let (first, last) = least(of);
        (last > first + more).then(|| format!("{what} grew from {first} to {last}"))
    });
    let left = rests.iter().map(|rest| rest.keys).max().unwrap_or(0);
    let left = (left > 0).then(|| format!("{left} keys were left in Redis"));
    let idle = (all(|it| it.served) == 0).then(|| "nothing was done".to_owned());
    let wrong: Vec<_> = grown.chain(left).chain(idle).collect();
    match wrong.is_empty() {
        true => Ok(said),
        false => Err(format!("{}\n{said}", wrong.join("\n"))),
    }
}

async fn soak(rounds: usize, round: Duration) -> Result<String, String> {
    let server = RedisServer::start().await;
    let mut replicas = Vec::new();
    for number in 0..PROCESSES {
        replicas.push(Replica::start(&server.url(), &format!("process-{number}")).await);
    }
    println!("{HEAD}");
    let mut rests = Vec::new();
    for number in 1..=rounds {
        let started = Instant::now();
        replicas.iter_mut().for_each(Replica::works);
        sleep(round / 2).await;
        if number % 3 == 0 {
            let () = server.run("SCRIPT FLUSH").await;
            let _: u64 = server.run("CLIENT KILL TYPE normal").await;
            let _: u64 = server.run("CLIENT KILL TYPE pubsub").await;
        }
        sleep(round.saturating_sub(started.elapsed())).await;
        replicas.iter_mut().for_each(Replica::rests);
        let mut reports = Vec::new();
        for replica in &mut replicas {
            reports.push(replica.report().await);
        }
        // Locks whose holders lost them are left to run out.
        eventually("all locks are gone", LIMIT, async || {
            server.keys().await == 0
        })
        .await;
        let clients: String = server.run("CLIENT LIST").await;
        let memory = server.info("used_memory").await;
        let memory = memory.and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        // Without the one that asks.
        let connections = clients.lines().count() - 1;
        let rest = Rest::new(&reports, (connections, server.keys().await, memory));
        println!("{}", rest.line(number));
        rests.push(rest);
    }
    for replica in replicas {
        replica.end().await;
    }
    eventually("all locks are gone", LIMIT, async || {
        server.keys().await == 0
    })
    .await;
    verdict(&rests)
}

/// `--minutes N`: so many rounds of a minute.
pub fn main(arguments: &[&str]) {
    let minutes = match arguments {
        [] => Ok(30),
        ["--minutes", minutes] => minutes.parse(),
        _ => "".parse::<usize>(),
    };
    let Ok(minutes @ 1..) = minutes else {
        println!("usage: scripts/soak [--minutes N]");
        std::process::exit(2);
    };
    match run(soak(minutes, seconds(55))) {
        Ok(said) => println!("\n{said}\nverdict: nothing grew"),
        Err(said) => {
            println!("\n{said}\nverdict: FAILED");
            std::process::exit(1);
        }
    }
}

pub fn nothing_grows_in_processes_that_go_on() {
    match run(soak(4, seconds(1))) {
        Ok(said) => println!("{said}"),
        Err(said) => panic!("{said}"),
    }
}
