//! Tasks that lock and release for a while, and what they saw. All rows but `handoff` are this.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;

use crate::{
    Error, clock,
    peers::{self, Locks, Peer},
    stats::Histogram,
};

/// What the tasks of one process do.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) peer: Peer,
    pub(crate) tasks: usize,
    /// All keys of a run begin with this.
    pub(crate) run: String,
    /// A new key for each lock, or one for all.
    pub(crate) random_keys: bool,
    /// How long a holder keeps the lock.
    pub(crate) section: Duration,
    /// How long a task does something else after each release.
    pub(crate) pause: Duration,
    /// Whether each holder makes sure that it is the only one. Too slow for figures.
    pub(crate) checked: bool,
}

impl Job {
    /// As arguments of a process.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        vec![
            self.peer.name().to_owned(),
            self.tasks.to_string(),
            self.run.clone(),
            self.random_keys.to_string(),
            self.section.as_nanos().to_string(),
            self.pause.as_nanos().to_string(),
            self.checked.to_string(),
        ]
    }

    pub(crate) fn from_arguments(arguments: &[String]) -> Result<Self, Error> {
        let [peer, tasks, run, random_keys, section, pause, checked] = arguments else {
            return Err("a job has seven arguments".into());
        };
        Ok(Self {
            peer: Peer::named(peer)?,
            tasks: tasks.parse()?,
            run: run.clone(),
            random_keys: random_keys.parse()?,
            section: Duration::from_nanos(section.parse()?),
            pause: Duration::from_nanos(pause.parse()?),
            checked: checked.parse()?,
        })
    }

    fn key(&self) -> String {
        let number = if self.random_keys {
            fastrand::u64(..)
        } else {
            0
        };
        key(&self.run, number)
    }
}

/// The name of a lock of this run.
pub(crate) fn key(run: &str, number: u64) -> String {
    format!("{run}-{number:016x}")
}

/// The time that counts, on [`clock`]. The tasks begin before it, to be warm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) from: u64,
    pub(crate) until: u64,
}

impl Window {
    fn has(self, time: u64) -> bool {
        (self.from..self.until).contains(&time)
    }

    pub(crate) fn seconds(self) -> f64 {
        (self.until - self.from) as f64 / 1e9
    }
}

/// What tasks saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Sections that began within the window.
    pub(crate) entered: u64,
    /// All sections, also those before and after it.
    pub(crate) all: u64,
    /// How long the sections in the window were, all together.
    pub(crate) section_nanos: u64,
    /// From asking for the lock to holding it. All waits count that were going on at some time in the
    /// window: whoever was kept waiting from before it to after it must not be missing.
    pub(crate) waits: Histogram,
    /// From asking for the lock to having released it, likewise.
    pub(crate) cycles: Histogram,
}

impl Tally {
    pub(crate) fn merge(&mut self, other: &Self) {
        self.entered += other.entered;
        self.all += other.all;
        self.section_nanos += other.section_nanos;
        self.waits.merge(&other.waits);
        self.cycles.merge(&other.cycles);
    }

    /// As a line.
    pub(crate) fn to_line(&self) -> String {
        let Self {
            entered,
            all,
            section_nanos,
            waits,
            cycles,
        } = self;
        format!("{entered} {all} {section_nanos} {waits} {cycles}")
    }

    pub(crate) fn from_line(line: &str) -> Result<Self, Error> {
        let words: Vec<&str> = line.split(' ').collect();
        let [entered, all, section_nanos, waits, cycles] = words[..] else {
            return Err(format!("not a tally: {line:.40}").into());
        };
        Ok(Self {
            entered: entered.parse()?,
            all: all.parse()?,
            section_nanos: section_nanos.parse()?,
            waits: Histogram::parse(waits)?,
            cycles: Histogram::parse(cycles)?,
        })
    }
}

/// Does the job until the window is over and all have released what they waited for.
///
/// The first error ends it.
pub(crate) async fn run<L: Locks>(
    locks: L,
    job: &Job,
    window: Window,
    check: Option<Check>,
) -> Result<Tally, Error> {
    let mut tasks = JoinSet::new();
    for _ in 0..job.tasks {
        tasks.spawn(task(locks.clone(), job.clone(), window, check.clone()));
    }
    let mut tally = Tally::default();
    while let Some(task) = tasks.join_next().await {
        tally.merge(&task??);
    }
    locks.finish().await?;
    Ok(tally)
}

async fn task<L: Locks>(
    locks: L,
    job: Job,
    window: Window,
    mut check: Option<Check>,
) -> Result<Tally, Error> {
    let mut tally = Tally::default();
    let mut asked = clock::now();
    while asked < window.until {
        let guard = locks.lock(&job.key()).await?;
        let entered = clock::now();
        let mut left = entered;
        if let Some(check) = &mut check {
            check.alone().await?;
        }
        if !job.section.is_zero() {
            tokio::time::sleep(job.section).await;
            left = clock::now();
        }
        locks.release(guard).await?;
        let released = clock::now();

        tally.all += 1;
        if window.has(entered) {
            tally.entered += 1;
            tally.section_nanos += left - entered;
        }
        if entered >= window.from {
            tally.waits.add(entered - asked);
            tally.cycles.add(released - asked);
        }
        asked = released;
        if !job.pause.is_zero() {
            tokio::time::sleep(job.pause).await;
            asked = clock::now();
        }
    }
    Ok(tally)
}

/// Counts in Redis who is inside, on a connection of its own.
#[derive(Clone)]
pub(crate) struct Check {
    connection: MultiplexedConnection,
    counter: String,
}

impl Check {
    pub(crate) async fn connect(url: &str, run: &str) -> Result<Self, Error> {
        Ok(Self {
            connection: peers::connect(url).await?,
            counter: format!("{run}:inside"),
        })
    }

    /// Called by a holder, before it releases the lock.
    async fn alone(&mut self) -> Result<(), Error> {
        let inside = self.add(1).await?;
        if inside != 1 {
            return Err(format!("EXCLUSION VIOLATED: {inside} holders of one lock at once").into());
        }
        // Leaves others the time to come in, if something lets them.
        tokio::task::yield_now().await;
        let left = self.add(-1).await?;
        if left != 0 {
            return Err(format!("EXCLUSION VIOLATED: {left} holders beside this one").into());
        }
        Ok(())
    }

    async fn add(&mut self, by: i64) -> Result<i64, Error> {
        let mut incr = redis::cmd("INCRBY");
        incr.arg(&self.counter).arg(by);
        Ok(incr.query_async(&mut self.connection).await?)
    }
}
