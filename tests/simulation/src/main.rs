//! The whole stack on a simulated network, in simulated time: HTTP clients, replicas of an axum
//! service behind the layer, and the Redis servers that keep their locks: one, or three under a
//! Redlock. Processes crash and stand still, connections break, replies are lost. What happens follows from a number, the seed.
//!
//! ```text
//! simulation --seed 123        one, with all that happens in it
//! simulation --seeds 20000     those from 0 on
//! ```

mod history;
mod net;
mod randomness;
mod redis;
mod scenario;
mod service;
#[cfg(test)]
mod tests;
mod world;

use std::{process::ExitCode, sync::Mutex};

use self::{history::Stats, scenario::Outcome};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().ok();
    match arguments[..] {
        ["--seed", seed] if number(seed).is_some() => one(number(seed).unwrap_or(0)),
        ["--seeds", seeds] if number(seeds).is_some() => many(0..number(seeds).unwrap_or(0)),
        [] => many(0..1_000),
        _ => {
            eprintln!("simulation [--seed N | --seeds N]");
            ExitCode::FAILURE
        }
    }
}

fn one(seed: u64) -> ExitCode {
    let outcome = scenario::run(seed, true);
    println!("{} events, hash {:016x}", outcome.events, outcome.hash);
    for violation in &outcome.violations {
        println!("VIOLATION {violation}");
    }
    code(outcome.violations.is_empty())
}

fn many(seeds: std::ops::Range<u64>) -> ExitCode {
    let count = seeds.end - seeds.start;
    let total = Mutex::new((Stats::default(), 0_u64, Vec::<Outcome>::new()));
    scenario::run_all(seeds, |outcome| {
        let mut total = total.lock().unwrap();
        total.0.add(&outcome.stats);
        total.1 += outcome.events;
        if !outcome.violations.is_empty() {
            println!("seed {}: {}", outcome.seed, outcome.violations[0]);
            total.2.push(outcome);
        }
    });
    let (stats, events, bad) = total.into_inner().unwrap();
    println!("{count} seeds, {events} events, {stats:?}");
    println!("{} seeds with violations", bad.len());
    code(bad.is_empty())
}

fn code(is_good: bool) -> ExitCode {
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
