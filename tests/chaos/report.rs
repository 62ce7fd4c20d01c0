//! The table that a run ends with.

use std::{fmt, time::Duration};

use super::{
    episode::{Episode, Outcome},
    nemesis::Nemesis,
    world::Deployment,
};

/// The sums of what came of the episodes of one nemesis on one deployment.
#[derive(Debug)]
struct Row {
    deployment: Deployment,
    nemesis: Nemesis,
    faults: usize,
    grants: usize,
    violations: usize,
    excused: usize,
    excused_for: u64,
    told: usize,
    lost: u64,
    refused: usize,
    recoveries: Vec<Duration>,
    longest_wait: Duration,
    passed: usize,
}

/// All rows.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

impl Report {
    pub fn add(&mut self, episode: &Episode, outcome: &Outcome) {
        let (deployment, nemesis) = (episode.deployment, episode.nemesis);
        let same = |row: &Row| (row.deployment, row.nemesis) == (deployment, nemesis);
        let found = self.rows.iter().position(same);
        let row = found.unwrap_or_else(|| {
            self.rows.push(Row {
                deployment,
                nemesis,
                faults: 0,
                grants: 0,
                violations: 0,
                excused: 0,
                excused_for: 0,
                told: 0,
                lost: 0,
                refused: 0,
                recoveries: Vec::new(),
                longest_wait: Duration::ZERO,
                passed: 0,
            });
            self.rows.len() - 1
        });
        let row = &mut self.rows[row];
        let findings = &outcome.findings;
        row.faults += outcome.faults;
        row.grants += outcome.grants;
        row.violations += findings.violations.len();
        row.excused += findings.excused;
        row.excused_for = row.excused_for.max(findings.excused_for);
        row.told += findings.told;
        row.lost += outcome.lost;
        row.refused += findings.refused;
        row.recoveries.extend(&outcome.recoveries);
        row.longest_wait = row.longest_wait.max(outcome.longest_wait);
        row.passed = row.passed.max(outcome.passed);
    }

    pub fn violations(&self) -> usize {
        self.rows.iter().map(|row| row.violations).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "                            |                 |            | by assumption     |       \
             | updates      | recovery ms   | longest |"
        )?;
        writeln!(
            f,
            "deployment nemesis            faults   grants   violations   overlaps      ms    told \
             | lost refused   p50      max | wait ms | passed"
        )?;
        let mut rows: Vec<_> = self.rows.iter().collect();
        let place = |row: &&Row| {
            (
                Deployment::ALL.iter().position(|it| *it == row.deployment),
                Nemesis::ALL.iter().position(|it| *it == row.nemesis),
            )
        };
        rows.sort_by_key(place);
        let mut all: Vec<Duration> = Vec::new();
        for row in &rows {
            all.extend(&row.recoveries);
            let (p50, max) = spread(&row.recoveries);
            let overlaps = match row.nemesis.breaks() || row.excused > 0 {
                true => format!("{:>8} {:>7}", row.excused, row.excused_for / 1_000_000),
                // There are none: each would be a violation.
                false => format!("{:>8} {:>7}", "-", "-"),
            };
            writeln!(
                f,
                "{:<10} {:<18} {:>6} {:>8}   {:>10}   {overlaps} {:>7} | {:>4} {:>7} {:>5} {:>8} | {:>7} | {:>6}",
                row.deployment.name(),
                row.nemesis.name(),
                row.faults,
                row.grants,
                row.violations,
                row.told,
                row.lost,
                row.refused,
                p50,
                max,
                row.longest_wait.as_millis(),
                row.passed,
            )?;
        }
        let sum = |of: fn(&Row) -> usize| rows.iter().map(|row| of(row)).sum::<usize>();
        let (p50, max) = spread(&all);
        writeln!(
            f,
            "all: {} faults, {} grants checked, {} violations, {} overlaps by assumption, {} told, \
             recovery p50 {p50} ms, max {max} ms",
            sum(|row| row.faults),
            sum(|row| row.grants),
            sum(|row| row.violations),
            sum(|row| row.excused),
            sum(|row| row.told),
        )
    }
}

/// The middle one and the longest, in milliseconds.
fn spread(times: &[Duration]) -> (u128, u128) {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at = |index: usize| times.get(index).map_or(0, Duration::as_millis);
    (at(times.len() / 2), at(times.len().saturating_sub(1)))
}
