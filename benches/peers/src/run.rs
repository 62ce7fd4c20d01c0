//! Runs: one peer under one load on an empty server, checked; and rounds of them.

use std::time::Duration;

use figures::results::{Cost, Series};

use crate::{
    Error, clock,
    load::{self, Job, Tally, Window},
    peers::Peer,
    report::Report,
    server::{Server, Usage},
    team::Worker,
    worker::Errand,
};

/// How long the tasks run before it counts.
const WARM_UP: Duration = Duration::from_millis(300);

/// From the word that starts the workers to the moment when all have surely heard it.
const START: Duration = Duration::from_millis(20);

/// How long a run is in which only commands are counted.
const COUNTED: Duration = Duration::from_millis(300);

/// How long those who wait at the end may take to get their locks.
const DRAIN: Duration = Duration::from_secs(90);

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    /// One run under load.
    pub(crate) window: Duration,
    /// One run of `handoff`: so many, or as many as fit into the time.
    pub(crate) handoffs: usize,
    pub(crate) handoff_time: Duration,
}

impl Plan {
    pub(crate) const FULL: Self = Self {
        rounds: 7,
        window: Duration::from_secs(2),
        handoffs: 400,
        handoff_time: Duration::from_secs(6),
    };
    pub(crate) const QUICK: Self = Self {
        rounds: 3,
        window: Duration::from_millis(800),
        handoffs: 150,
        handoff_time: Duration::from_secs(3),
    };
}

/// A load, whoever bears it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) processes: usize,
    /// In each process.
    pub(crate) tasks: usize,
    pub(crate) random_keys: bool,
    pub(crate) section: Duration,
    pub(crate) pause: Duration,
}

impl Work {
    /// All tasks want the same key and do nothing with it.
    pub(crate) fn hot(processes: usize, tasks: usize) -> Self {
        Self {
            processes,
            tasks,
            random_keys: false,
            section: Duration::ZERO,
            pause: Duration::ZERO,
        }
    }

    /// Nobody waits for anybody.
    pub(crate) fn uncontended(tasks: usize) -> Self {
        Self {
            processes: 1,
            tasks,
            random_keys: true,
            section: Duration::ZERO,
            pause: Duration::ZERO,
        }
    }
}

/// What came out of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// By process.
    pub(crate) team: Vec<Tally>,
    /// All processes together.
    pub(crate) sum: Tally,
    seconds: f64,
    servers: Usage,
    client_commands: u64,
}

impl Outcome {
    /// Sections a second.
    pub(crate) fn rate(&self) -> f64 {
        self.sum.entered as f64 / self.seconds
    }

    /// The CPU time of all servers for one section, in seconds.
    pub(crate) fn server_cpu(&self) -> f64 {
        self.servers.cpu / self.sum.all as f64
    }

    /// The commands that all servers carried out for one section, those that scripts called among them.
    pub(crate) fn server_commands(&self) -> f64 {
        self.servers.commands as f64 / self.sum.all as f64
    }

    /// The commands that clients sent for one section. Only in runs that count them.
    pub(crate) fn client_commands(&self) -> f64 {
        self.client_commands as f64 / self.sum.all as f64
    }

    /// 99 % waited at most so long, in seconds.
    pub(crate) fn p99_wait(&self) -> f64 {
        self.sum.waits.quantile(0.99) / 1e9
    }

    /// The same of the process that fares worst, in seconds.
    ///
    /// Where all get the lock equally often this is the same. But who is kept waiting for long has
    /// few waits to show, and those who keep him waiting have many short ones: among all together,
    /// his would not be seen.
    pub(crate) fn worst_p99_wait(&self) -> f64 {
        let waits = self
            .team
            .iter()
            .map(|tally| tally.waits.quantile(0.99) / 1e9);
        waits.fold(0.0, f64::max)
    }

    /// Nobody waited longer, in seconds.
    pub(crate) fn longest_wait(&self) -> f64 {
        self.sum.waits.quantile(1.0) / 1e9
    }

    /// The smallest process's part of its fair share.
    pub(crate) fn fairness(&self) -> f64 {
        let smallest = self.team.iter().map(|tally| tally.entered).min();
        let fair = self.sum.entered as f64 / self.team.len() as f64;
        smallest.unwrap_or(0) as f64 / fair
    }

    /// The median time from asking for a lock to having released it, in seconds.
    pub(crate) fn median_cycle(&self) -> f64 {
        self.sum.cycles.quantile(0.5) / 1e9
    }

    /// The mean time for which the lock was held, in seconds.
    pub(crate) fn mean_section(&self) -> f64 {
        self.sum.section_nanos as f64 / self.sum.entered as f64 / 1e9
    }
}

/// What is done besides the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Besides {
    /// Nothing: these runs make the figures.
    Nothing,
    /// Holders make sure that they are alone.
    Checking,
    /// The clients' commands are counted.
    Counting,
}

/// The outcomes of several peers that took turns.
pub(crate) struct Rounds(Vec<(Peer, Vec<Outcome>)>);

impl Rounds {
    /// One figure of one peer, a round each.
    pub(crate) fn of(&self, peer: Peer, figure: impl Fn(&Outcome) -> f64) -> Vec<f64> {
        self.0
            .iter()
            .filter(|(other, _)| *other == peer)
            .flat_map(|(_, outcomes)| outcomes.iter().map(&figure))
            .collect()
    }
}

/// The servers, and what is to be measured on them.
pub(crate) struct Bench {
    /// One, but in the rows of Redlock.
    pub(crate) servers: Vec<Server>,
    pub(crate) plan: Plan,
    pub(crate) report: Report,
}

impl Bench {
    /// Has so many servers from now on.
    pub(crate) fn set_servers(&mut self, count: usize) -> Result<(), Error> {
        self.servers.truncate(count);
        while self.servers.len() < count {
            self.servers.push(Server::start()?);
        }
        Ok(())
    }

    /// The URLs of all servers, with commas in between.
    pub(crate) fn url(&self) -> String {
        let urls: Vec<_> = self.servers.iter().map(Server::url).collect();
        urls.join(",")
    }

    /// What all servers have done until now.
    pub(crate) fn usage(&mut self) -> Result<Usage, Error> {
        let mut sum = Usage::default();
        for server in &mut self.servers {
            let Usage { cpu, commands } = server.usage()?;
            sum.cpu += cpu;
            sum.commands += commands;
        }
        Ok(sum)
    }

    /// What all servers have done since then, without being asked.
    pub(crate) fn usage_since(&mut self, before: Usage) -> Result<Usage, Error> {
        let now = self.usage()?;
        Ok(Usage {
            cpu: now.cpu - before.cpu,
            // The first question was counted after its answer.
            commands: now.commands - before.commands - self.servers.len() as u64,
        })
    }

    /// Each peer in turn, and all over again.
    pub(crate) fn rounds(&mut self, peers: &[Peer], work: Work) -> Result<Rounds, Error> {
        self.rounds_of(self.plan.window, peers, work)
    }

    /// The same, and a run is this long.
    pub(crate) fn rounds_of(
        &mut self,
        window: Duration,
        peers: &[Peer],
        work: Work,
    ) -> Result<Rounds, Error> {
        let mut rounds: Vec<_> = peers.iter().map(|&peer| (peer, Vec::new())).collect();
        for _ in 0..self.plan.rounds {
            for (peer, outcomes) in &mut rounds {
                outcomes.push(self.run(*peer, work, window, Besides::Nothing)?);
            }
        }
        Ok(Rounds(rounds))
    }

    /// Makes sure that the peers never let two in at once under this load.
    pub(crate) fn check(&mut self, peers: &[Peer], work: Work) -> Result<(), Error> {
        for &peer in peers {
            let outcome = self.run(peer, work, self.plan.window / 2, Besides::Checking)?;
            let (name, sections) = (peer.name(), outcome.sum.all);
            println!("# checked: {name}, no two holders at once in {sections} sections");
        }
        Ok(())
    }

    /// A run in which the clients' commands are counted.
    pub(crate) fn count(&mut self, peer: Peer, work: Work) -> Result<Outcome, Error> {
        self.run(peer, work, self.plan.window / 2, Besides::Counting)
    }

    /// Puts down what the peers' sections in these rounds cost the servers, by the names that the peers have in the
    /// row. Counts their commands in a run of its own for each: MONITOR slows the server down.
    pub(crate) fn costs(
        &mut self,
        row: &str,
        work: Work,
        rounds: &Rounds,
        peers: &[(Peer, &str)],
    ) -> Result<(), Error> {
        if !self.report.wants(row) {
            return Ok(());
        }
        for &(peer, who) in peers {
            // Without a count the row is still whole. MONITOR is much for a machine that has other work to do: the
            // servers of a Redlock then answer too late, or have not heard of all releases at the end.
            let counted = match self.run(peer, work, COUNTED, Besides::Counting) {
                Ok(outcome) => Some(outcome.client_commands()),
                Err(error) => {
                    println!("# {row}: the commands of {who} were not counted: {error}");
                    None
                }
            };
            let cost = Cost {
                who: who.to_owned(),
                server_cpu_seconds: Series::of(&rounds.of(peer, Outcome::server_cpu)),
                server_commands: Series::of(&rounds.of(peer, Outcome::server_commands)),
                client_commands: counted,
            };
            self.report.cost(row, cost);
        }
        Ok(())
    }

    fn run(
        &mut self,
        peer: Peer,
        work: Work,
        length: Duration,
        besides: Besides,
    ) -> Result<Outcome, Error> {
        let run = new_run();
        let job = Job {
            peer,
            tasks: work.tasks,
            run: run.clone(),
            random_keys: work.random_keys,
            section: work.section,
            pause: work.pause,
            checked: besides == Besides::Checking,
        };
        for server in &mut self.servers {
            server.reset()?;
        }
        let errands = (0..work.processes).map(|_| Errand::Load(job.clone()));
        let mut team = Worker::team(&self.url(), errands)?;

        let counts = match besides {
            Besides::Counting => self
                .servers
                .iter_mut()
                .map(Server::count_commands)
                .collect(),
            _ => Ok(Vec::new()),
        }?;
        let usage = self.usage()?;
        let from = clock::now() + (START + WARM_UP).as_nanos() as u64;
        let window = Window {
            from,
            until: from + length.as_nanos() as u64,
        };
        for worker in &mut team {
            worker.tell(&format!("go {} {}", window.from, window.until))?;
        }
        let mut tallies = Vec::new();
        for worker in &team {
            let within = clock::until(window.until) + DRAIN;
            tallies.push(Tally::from_line(&worker.hear("done", within)?)?);
        }
        let usage = self.usage_since(usage)?;
        let mut client_commands = 0;
        for (count, server) in counts.into_iter().zip(&mut self.servers) {
            // The two questions for what the server has done are not the clients'.
            client_commands += count.stop(server)? - 2;
        }
        for worker in team {
            worker.end()?;
        }
        self.validate(peer, &run)?;

        let mut sum = Tally::default();
        for tally in &tallies {
            sum.merge(tally);
        }
        if sum.entered == 0 {
            return Err(format!("{} did not enter a single section", peer.name()).into());
        }
        Ok(Outcome {
            team: tallies,
            sum,
            seconds: window.seconds(),
            servers: usage,
            client_commands,
        })
    }

    /// A run counts only if no command failed and no lock of its is left, whatever the library under
    /// test says about errors.
    pub(crate) fn validate(&mut self, peer: Peer, run: &str) -> Result<(), Error> {
        let name = peer.name();
        // The locks alone: what a library keeps besides may stay until it expires.
        let lock = load::key(run, 0).replace('0', "?");
        for server in &mut self.servers {
            let failures = server.failures()?;
            if failures > 0 {
                let errors: String = server.run(&["INFO", "errorstats"])?;
                return Err(format!("{name}: {failures} commands failed: {errors}").into());
            }
            for prefix in ["", "distributed-locks:", "redlock:", "distributed-lock:"] {
                let left: Vec<String> = server.run(&["KEYS", &format!("{prefix}{lock}")])?;
                if let Some(key) = left.first() {
                    let count = left.len();
                    return Err(format!("{name}: {count} locks were left, such as {key}").into());
                }
            }
        }
        Ok(())
    }
}

/// What the keys of a run begin with.
pub(crate) fn new_run() -> String {
    // Letters alone, so that it means nothing in a pattern.
    let letters: String = std::iter::repeat_with(fastrand::lowercase)
        .take(8)
        .collect();
    format!("bench/{letters}")
}
