//! What is printed: `ratio <row> <peer> <number>`, and lines for people that begin with `#`. And what is kept for the
//! JSON file.

use std::{fs, path::Path, process::Command, thread, time::SystemTime};

use figures::{
    Results,
    results::{Cost, FORMAT, Figure, Machine, Plan as Planned, Ratio, Row, Series, Unit},
};

use crate::{Error, peers::Peer, run::Plan, worker::THREADS};

/// What has been measured so far.
pub(crate) struct Report {
    /// The rows that were asked for. Others are not reported, though they come out of the same runs.
    pub(crate) wanted: Vec<String>,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn of(wanted: Vec<String>) -> Self {
        Self {
            wanted,
            rows: Vec::new(),
        }
    }

    pub(crate) fn wants(&self, row: &str) -> bool {
        self.wanted.iter().any(|wanted| wanted == row)
    }

    /// The ratio of a row: the median of the rounds' ratios.
    pub(crate) fn ratio(&mut self, row: &str, peer: &str, ratios: &[f64]) {
        let Some(kept) = self.row(row) else { return };
        let ratio = Ratio::new(peer, Series::of(ratios), figures::goal(row, peer));
        let Series { min, max, .. } = ratio.series;
        let rounds = ratios.len();
        let goal = match (ratio.goal, ratio.reached) {
            (Some(goal), Some(true)) => format!("; {}: reached", goal.text()),
            (Some(goal), _) => format!("; {}: SHORT", goal.text()),
            (None, _) => String::new(),
        };
        println!("# {row} {peer}: {min:.4}..{max:.4} in {rounds} rounds{goal}");
        println!("ratio {row} {peer} {:.4}", ratio.series.median);
        kept.ratios.push(ratio);
    }

    /// The absolute figure of one peer.
    pub(crate) fn figure(&mut self, row: &str, who: &str, unit: Unit, values: &[f64]) {
        let Some(kept) = self.row(row) else { return };
        let series = Series::of(values);
        println!("# {row}: {who} {}", series.text(unit));
        let who = who.to_owned();
        kept.figures.push(Figure { who, unit, series });
    }

    /// What the sections of one peer cost the servers.
    pub(crate) fn cost(&mut self, row: &str, cost: Cost) {
        let Some(kept) = self.row(row) else { return };
        let Cost {
            who,
            server_cpu_seconds,
            server_commands,
            client_commands,
        } = &cost;
        let cpu = Unit::Seconds.text(server_cpu_seconds.median);
        let commands = Unit::Number.text(server_commands.median);
        let sent = client_commands
            .map(|sent| format!(", {} sent by clients", Unit::Number.text(sent)))
            .unwrap_or_default();
        println!("# {row}: {who} costs {cpu} of the server's CPU, {commands} commands{sent}");
        kept.costs.push(cost);
    }

    /// Where what is known of the row is kept. `None`: nobody wants to know.
    fn row(&mut self, name: &str) -> Option<&mut Row> {
        if !self.wants(name) {
            return None;
        }
        let position = self.rows.iter().position(|row| row.name == name);
        let position = position.unwrap_or_else(|| {
            self.rows.push(Row {
                name: name.to_owned(),
                what: figures::what(name).unwrap_or_default().to_owned(),
                figures: Vec::new(),
                ratios: Vec::new(),
                costs: Vec::new(),
            });
            self.rows.len() - 1
        });
        Some(&mut self.rows[position])
    }

    /// All that was measured, for the files.
    pub(crate) fn into_results(self, began: SystemTime, machine: Machine, plan: &Plan) -> Results {
        Results {
            format: FORMAT,
            measured: humantime::format_rfc3339_seconds(began).to_string(),
            commit: commit(),
            machine,
            plan: Planned {
                rounds: plan.rounds,
                window_seconds: plan.window.as_secs_f64(),
                threads: THREADS,
            },
            versions: figures::versions(include_str!("../Cargo.lock"), &LIBRARIES),
            rows: self.rows,
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

/// Those who wait for a lock that is taken: ours, rslock with two settings, and two more that ask again.
pub(crate) const WAITING: [Peer; 5] = [
    Peer::Ours,
    Peer::RslockDefault,
    Peer::RslockTuned,
    Peer::ByHand,
    Peer::RedisLock,
];

/// Where this is measured.
pub(crate) fn machine(redis: String) -> Machine {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()))
        .unwrap_or(std::env::consts::ARCH);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    Machine {
        cores: thread::available_parallelism().map_or(0, usize::from),
        cpu: cpu.to_owned(),
        os: format!("{} {}", std::env::consts::OS, kernel.trim()),
        redis,
        load_before: { load.split(' ').next() }
            .and_then(|load| load.parse().ok())
            .unwrap_or_default(),
    }
}

/// The first lines.
pub(crate) fn print_machine(machine: &Machine, plan: &Plan) {
    let Machine {
        cores,
        cpu,
        os,
        redis,
        load_before,
    } = machine;
    println!("# machine: {cores} cores, {cpu}, {os}, redis {redis}, load {load_before} before");
    let Plan { rounds, window, .. } = plan;
    println!(
        "# {rounds} rounds, {window:?} a run, {THREADS} runtime threads a process; ratios are ours \
         over theirs, medians of the rounds (smallest..largest)"
    );
}

/// The crate and its peers.
const LIBRARIES: [&str; 6] = [
    "axum",
    "distributed-lock-redis",
    "redis",
    "redis-lock",
    "rslock",
    "tower-distributed-lock",
];

/// What was built, if this is a git repository. `None` says that nobody knows, not that something failed.
fn commit() -> Option<String> {
    let described = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .ok()?;
    let name = String::from_utf8(described.stdout).ok()?;
    Some(name.trim().to_owned()).filter(|name| described.status.success() && !name.is_empty())
}

/// Writes the files into a folder.
pub(crate) fn write(results: &Results, folder: &Path) -> Result<(), Error> {
    for file in figures::write(results, folder)? {
        println!("# wrote {}", file.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::GROUPS;

    #[test]
    fn every_row_says_what_it_measures() {
        for row in GROUPS.iter().flat_map(|group| group.rows) {
            assert!(figures::what(row).is_some(), "{row}");
        }
    }

    #[test]
    fn rows_that_nobody_asked_for_are_not_kept() {
        let mut report = Report::of(vec!["hot_local".to_owned()]);
        report.ratio("hot_local", "rslock", &[49.0, 51.0, 60.0]);
        report.ratio("hot_remote", "rslock", &[1.0]);
        let [row] = &report.rows[..] else {
            panic!("one row");
        };
        assert_eq!(
            (row.name.as_str(), row.ratios[0].reached),
            ("hot_local", Some(true))
        );
    }
}
