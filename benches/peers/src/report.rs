//! What is printed: `ratio <row> <peer> <number>`, and lines for people that begin with `#`.

use std::{fs, thread};

use crate::{
    peers::Peer,
    run::Plan,
    stats::{median, spread},
    worker::THREADS,
};

/// The unit of a figure, and how it is best read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    PerSecond,
    /// The value is in seconds.
    Time,
    /// A plain number.
    Count,
}

impl Unit {
    fn text(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{value:.0}/s"),
            Self::Time if value < 100e-6 => format!("{:.2}us", value * 1e6),
            Self::Time if value < 1e-3 => format!("{:.0}us", value * 1e6),
            Self::Time => format!("{:.2}ms", value * 1e3),
            Self::Count => format!("{value:.4}"),
        }
    }
}

/// Which rows were asked for. Others are not printed, though they come out of the same runs.
pub(crate) struct Report {
    pub(crate) rows: Vec<String>,
}

impl Report {
    pub(crate) fn wants(&self, row: &str) -> bool {
        self.rows.iter().any(|wanted| wanted == row)
    }

    /// The ratio of a row: the median of the rounds' ratios.
    pub(crate) fn ratio(&self, row: &str, peer: &str, ratios: &[f64]) {
        if self.wants(row) {
            let (min, max) = spread(ratios);
            let rounds = ratios.len();
            println!("# {row} {peer}: {min:.4}..{max:.4} in {rounds} rounds");
            println!("ratio {row} {peer} {:.4}", median(ratios));
        }
    }

    /// The absolute figure of one peer.
    pub(crate) fn figure(&self, row: &str, who: &str, unit: Unit, values: &[f64]) {
        if self.wants(row) {
            let (min, max) = spread(values);
            let [middle, min, max] = [median(values), min, max].map(|value| unit.text(value));
            println!("# {row}: {who} {middle} ({min}..{max})");
        }
    }
}

/// Ours over theirs, round by round.
pub(crate) fn over(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter()
        .zip(theirs)
        .map(|(ours, theirs)| ours / theirs)
        .collect()
}

/// Of two peers the better one, round by round, by what is better.
pub(crate) fn best(one: &[f64], other: &[f64], better: fn(f64, f64) -> f64) -> Vec<f64> {
    one.iter()
        .zip(other)
        .map(|(&one, &other)| better(one, other))
        .collect()
}

/// The settings under which rslock is measured where there is contention.
pub(crate) const RSLOCKS: [Peer; 2] = [Peer::RslockDefault, Peer::RslockTuned];

/// Where and how this was measured.
pub(crate) fn print_machine(redis: &str, plan: &Plan) {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()))
        .unwrap_or(std::env::consts::ARCH);
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    println!(
        "# machine: {cores} cores, {cpu}, {} {}, redis {redis}, load {} before",
        std::env::consts::OS,
        kernel.trim(),
        load.split(' ').next().unwrap_or_default(),
    );
    let Plan { rounds, window, .. } = plan;
    println!(
        "# {rounds} rounds, {window:?} a run, {THREADS} runtime threads a process; ratios are ours \
         over theirs, medians of the rounds (smallest..largest)"
    );
}
