//! Chaos: real client processes take locks in real Redis servers while something breaks both and
//! what is between them; then their account of it is checked.
//!
//! This binary has no test harness of its own kind: called with the first argument `client` it is a
//! client process, with `run` it goes on for as long as it is told (`scripts/chaos`), and otherwise
//! it is a test: a short run with a fixed seed, and proofs that what is wrong is found.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    unreachable_pub
)]

mod check;
mod check_tests;
mod client;
mod episode;
#[path = "../kit/mod.rs"]
mod kit;
mod nemesis;
mod record;
mod report;
mod sabotage;
mod store;
mod watch;
mod world;

use std::{
    cell::RefCell,
    env,
    future::Future,
    process::ExitCode,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use libtest_mimic::{Arguments, Trial};

use self::{
    episode::{Episode, Outcome},
    nemesis::Nemesis,
    report::Report,
    sabotage::Sabotage,
    world::Deployment,
};

const USAGE: &str = "scripts/chaos [--minutes N] [--seed S] [--only nemesis,..] \
                     [--deployment single|redlock|sentinel|cluster] [--episodes N] [--lanes N]";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match &arguments[..] {
        ["client", words @ ..] => {
            client::main(words);
            return ExitCode::SUCCESS;
        }
        ["run", words @ ..] => {
            return match Plan::from_words(words) {
                Ok(plan) => plan.carry_out(),
                Err(error) => {
                    eprintln!("{error}\n{USAGE}");
                    ExitCode::FAILURE
                }
            };
        }
        _ => {}
    }
    let mut trials = check_tests::trials();
    let trial = |name, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    trials.push(trial("no_fault_lets_two_in_unnoticed", short_run));
    trials.push(trial("a_lock_that_is_broken_is_found_out", sabotaged_runs));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// What a run does.
#[derive(Debug)]
struct Plan {
    end: End,
    seed: u64,
    only: Vec<Nemesis>,
    deployments: Vec<Deployment>,
    /// How many episodes go on at the same time.
    lanes: usize,
    /// In each episode.
    faults: usize,
}

#[derive(Clone, Copy, Debug)]
enum End {
    After(Duration),
    Episodes(usize),
}

impl Plan {
    fn from_words(words: &[&str]) -> Result<Self, String> {
        let mut this = Self {
            end: End::After(Duration::from_secs(60)),
            seed: fastrand::u64(..1_000_000),
            only: Nemesis::ALL.to_vec(),
            deployments: Deployment::ALL.to_vec(),
            lanes: 2,
            faults: 4,
        };
        for pair in words.chunks(2) {
            let [option, value] = *pair else {
                return Err(format!("{pair:?} needs a value"));
            };
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("{value}: a number?"))
            };
            match option {
                "--minutes" => {
                    let minutes: f64 = value.parse().map_err(|_| format!("{value}: minutes?"))?;
                    let time = Duration::try_from_secs_f64(60.0 * minutes);
                    this.end = End::After(time.map_err(|error| error.to_string())?);
                }
                "--episodes" => this.end = End::Episodes(number()? as usize),
                "--seed" => this.seed = number()?,
                "--lanes" => this.lanes = number()?.max(1) as usize,
                "--only" => {
                    let names = value.split(',');
                    let named = names.map(|name| Nemesis::from_name(name).ok_or(name));
                    let named: Result<_, _> = named.collect();
                    this.only = named.map_err(|name| {
                        let all = Nemesis::ALL.map(Nemesis::name).join(", ");
                        format!("there is no nemesis {name}, but {all}")
                    })?;
                }
                "--deployment" => {
                    let deployment = Deployment::from_name(value);
                    this.deployments = vec![deployment.ok_or(format!("{value}: what is that?"))?];
                }
                _ => return Err(format!("{option}: what is that?")),
            }
        }
        if this.rounds().is_empty() {
            return Err("nothing of that can be done to that".to_owned());
        }
        Ok(this)
    }

    fn rounds(&self) -> Vec<(Deployment, Nemesis)> {
        let all = self.deployments.iter();
        all.flat_map(|deployment| self.only.iter().map(|nemesis| (*deployment, *nemesis)))
            .filter(|(deployment, nemesis)| nemesis.hits(*deployment))
            .collect()
    }

    /// The episode with this number: each is there once in as many as there are.
    fn episode(&self, number: usize) -> Episode {
        let mut rounds = self.rounds();
        let turn = (number / rounds.len()) as u64;
        fastrand::Rng::with_seed(self.seed.wrapping_add(turn)).shuffle(&mut rounds);
        let (deployment, nemesis) = rounds[number % rounds.len()];
        Episode {
            deployment,
            nemesis,
            faults: self.faults,
            // So that one episode can be had alone, by its own seed.
            seed: self.seed.wrapping_add(number as u64),
            sabotage: None,
        }
    }

    fn carry_out(self) -> ExitCode {
        println!("seed {}", self.seed);
        let report = run(self.report(|episode, number, outcome| {
            let (deployment, nemesis) = (episode.deployment.name(), episode.nemesis.name());
            let found = outcome.findings.violations.len();
            println!(
                "{number:>4} {deployment}/{nemesis}: {} grants, {found} violations",
                outcome.grants
            );
            for (from, until) in &outcome.replaced {
                println!(
                    "     a master was replaced that nothing was done to: {from} to {until} ms"
                );
            }
            for violation in outcome.findings.violations.iter().take(5) {
                println!("     VIOLATION {violation}");
            }
            if found > 0 {
                println!(
                    "     again: scripts/chaos --deployment {deployment} --only {nemesis} \
                     --episodes 1 --seed {}",
                    episode.seed
                );
                if let Some(folder) = &outcome.kept {
                    println!("     all of it: {}", folder.display());
                }
            }
        }));
        println!("\n{report}");
        match report.violations() {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }

    async fn report(&self, each: impl Fn(&Episode, usize, &Outcome)) -> Report {
        let started = Instant::now();
        let episodes = (0..).map_while(|number| {
            let goes_on = match self.end {
                End::After(time) => started.elapsed() < time,
                End::Episodes(episodes) => number < episodes,
            };
            goes_on.then(|| self.episode(number))
        });
        in_lanes(self.lanes, episodes, each).await
    }
}

/// Runs them in their order, so many at the same time.
async fn in_lanes(
    lanes: usize,
    episodes: impl Iterator<Item = Episode>,
    each: impl Fn(&Episode, usize, &Outcome),
) -> Report {
    let episodes = RefCell::new(episodes.enumerate());
    let report = RefCell::new(Report::default());
    join_all((0..lanes).map(async |_| {
        loop {
            let next = episodes.borrow_mut().next();
            let Some((number, episode)) = next else {
                return;
            };
            let outcome = episode.run().await;
            each(&episode, number, &outcome);
            report.borrow_mut().add(&episode, &outcome);
        }
    }))
    .await;
    report.into_inner()
}

// --- the tests ------------------------------------------------------------------------------------------------------

/// Each nemesis, once or twice, on one server or on what it is for.
fn short_run() {
    let mut rounds: Vec<_> = { Nemesis::ALL.into_iter() }
        .map(|nemesis| {
            let mut all = Deployment::ALL.into_iter();
            (all.find(|it| nemesis.hits(*it)).unwrap(), nemesis)
        })
        .collect();
    rounds.push((Deployment::Redlock, Nemesis::Partition));
    rounds.push((Deployment::Redlock, Nemesis::KillDurable));
    rounds.push((Deployment::Redlock, Nemesis::ClientPause));
    // What takes longest comes first.
    rounds.sort_by_key(|(deployment, _)| match deployment {
        Deployment::Sentinel | Deployment::Cluster => 0,
        _ => 1,
    });
    let episodes = rounds.into_iter().enumerate();
    let episodes = episodes.map(|(number, (deployment, nemesis))| Episode {
        deployment,
        nemesis,
        faults: match deployment {
            Deployment::Single => 2,
            _ => 1,
        },
        seed: 2_900 + number as u64,
        sabotage: None,
    });
    let report = run(in_lanes(3, episodes, |episode, _, outcome| {
        let found = &outcome.findings.violations;
        assert!(found.is_empty(), "{episode:?}: {found:#?}");
    }));
    println!("{report}");
}

/// Storages that break the lock, without any fault of a server: each shows as what it is. How soon is
/// chance: in a short episode it may be that no holder stays beyond its ttl, or that nobody stands in a
/// queue at the end. So each is attacked until it shows, as one would with `scripts/chaos`.
fn sabotaged_runs() {
    const EPISODES: u64 = 8;
    let shows = [
        (Sabotage::DeafRenewals, "two holders"),
        (Sabotage::BlindReleases, "two holders"),
        (Sabotage::SameTokens, "was given twice"),
        (Sabotage::NoReleases, "left after"),
    ];
    run(join_all(shows.map(async |(sabotage, what)| {
        let mut found = Vec::new();
        for seed in 7..7 + EPISODES {
            let episode = Episode {
                deployment: Deployment::Single,
                nemesis: Nemesis::ScriptFlush,
                faults: 1,
                seed,
                sabotage: Some(sabotage),
            };
            let outcome = episode.run().await;
            found.extend(outcome.findings.violations);
            if found.iter().any(|violation| violation.contains(what)) {
                return;
            }
        }
        panic!("{sabotage:?}: {found:#?}");
    })));
}
