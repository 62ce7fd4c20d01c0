//! What is wrong with a history.
//!
//! A stay counts from the moment at which its holder was given the lock to the last moment at which
//! the guard said that it was held: what the library vouched for, and no more. Two such spans of a
//! key must not overlap. After a fault that makes a server forget, overlaps are told apart: they are
//! what the lock cannot prevent, as long as they end within a ttl.

use std::collections::{HashMap, HashSet};

use super::{
    client::{FENCED, PLAIN},
    record::{End, Line, Write},
};

/// One stay under a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    pub name: String,
    /// The number of the client.
    pub by: usize,
    pub key: String,
    pub asked: u64,
    pub granted: u64,
    /// Whether the lock was held when it was given.
    pub held: bool,
    pub token: u64,
    /// The last moment at which it was held for certain.
    pub until: u64,
    /// `None` if its process was killed before.
    pub end: Option<End>,
    /// The write that was made under it, and whether the lock was held when it was confirmed.
    pub write: Option<(Write, bool)>,
}

/// All that the clients have said.
#[derive(Debug, Default)]
pub struct History {
    pub stays: Vec<Stay>,
    /// How many callers did not get a lock, and why.
    pub refused: HashMap<String, usize>,
    /// Keys left by each client that has drained.
    pub drained: Vec<usize>,
}

impl History {
    pub fn of(lines: &[(usize, Line)]) -> Self {
        let mut this = Self::default();
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        for (by, line) in lines {
            let stay = |numbers: &HashMap<&str, usize>, stay: &str| numbers[stay];
            match line {
                Line::In {
                    stay,
                    key,
                    asked,
                    granted,
                    token,
                    held,
                } => {
                    numbers.insert(stay, this.stays.len());
                    this.stays.push(Stay {
                        name: stay.clone(),
                        by: *by,
                        key: key.clone(),
                        asked: *asked,
                        granted: *granted,
                        held: *held,
                        token: *token,
                        until: *granted,
                        end: None,
                        write: None,
                    });
                }
                Line::Still { stay: name, at } => {
                    let stay = &mut this.stays[stay(&numbers, name)];
                    stay.until = stay.until.max(*at);
                }
                Line::Wrote {
                    stay: name,
                    write,
                    held,
                } => this.stays[stay(&numbers, name)].write = Some((write.clone(), *held)),
                Line::Out {
                    stay: name, end, ..
                } => this.stays[stay(&numbers, name)].end = Some(*end),
                Line::Not { why } => *this.refused.entry(why.clone()).or_default() += 1,
                Line::Drained { keys } => this.drained.push(*keys),
            }
        }
        this.stays.sort_by_key(|stay| stay.granted);
        this
    }
}

/// When something was done to the servers, the network or the clients.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub from: u64,
    pub until: u64,
    /// Whether it breaks what the lock's promises rest on.
    pub breaks: bool,
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub violations: Vec<String>,
    /// How often two held the same lock because a server forgot it or its clock was wrong, and for
    /// how long at most.
    pub excused: usize,
    pub excused_for: u64,
    /// Tokens out of order for the same reason.
    pub out_of_order: usize,
    /// Holders who were told that they had lost their lock.
    pub told: usize,
    /// Updates that were lost though all who were there held the lock, for the same reason again.
    pub lost_excused: u64,
    /// Updates that were lost where a writer has been told that its lock was over, after it wrote.
    pub lost_told: u64,
    /// Late writes that the fencing token kept out.
    pub refused: usize,
}

impl Findings {
    fn violation(&mut self, text: String) {
        self.violations.push(text);
    }
}

/// Looks at a history. `ttl` in nanoseconds.
pub fn check(history: &History, faults: &[Fault], ttl: u64) -> Findings {
    let mut findings = Findings::default();
    // Who had a lock when it was forgotten is told within its ttl.
    let excused = |at: u64| {
        let near = |fault: &Fault| fault.breaks && fault.from <= at && at <= fault.until + ttl;
        faults.iter().any(near)
    };
    let mut keys: HashMap<&str, Vec<&Stay>> = HashMap::new();
    for stay in &history.stays {
        keys.entry(&stay.key).or_default().push(stay);
    }
    let mut keys: Vec<_> = keys.into_iter().collect();
    keys.sort_unstable_by_key(|(key, _)| *key);
    for (_, stays) in keys {
        overlaps(&stays, &excused, &mut findings);
        tokens(&stays, &excused, &mut findings);
    }
    findings.told = { history.stays.iter() }
        .filter(|stay| !stay.held || stay.end == Some(End::Told))
        .count();
    writes(history, &excused, &mut findings);
    findings
}

fn overlaps(stays: &[&Stay], excused: &impl Fn(u64) -> bool, findings: &mut Findings) {
    let mut before: Option<&Stay> = None;
    for stay in stays.iter().filter(|stay| stay.held) {
        if let Some(before) = before
            && stay.granted < before.until
        {
            let until = before.until.min(stay.until);
            // Also its end: after a ttl everybody has been told.
            if excused(stay.granted) && excused(until) {
                findings.excused += 1;
                findings.excused_for = findings.excused_for.max(until - stay.granted);
            } else {
                findings.violation(format!("two holders: {before:?} and {stay:?}"));
            }
        }
        if before.is_none_or(|before| before.until < stay.until) {
            before = Some(stay);
        }
    }
}

fn tokens(stays: &[&Stay], excused: &impl Fn(u64) -> bool, findings: &mut Findings) {
    let mut seen = HashSet::new();
    let mut highest: Option<&Stay> = None;
    for stay in stays {
        if stay.token == 0 {
            findings.violation(format!("no fencing token: {stay:?}"));
        } else if !seen.insert(stay.token) {
            findings.violation(format!("a fencing token was given twice: {stay:?}"));
        }
        // Of a grant that came too late, nobody can say where in the order it was.
        if !stay.held {
            continue;
        }
        if let Some(highest) = highest
            && stay.token < highest.token
        {
            if excused(stay.granted) {
                findings.out_of_order += 1;
            } else {
                findings.violation(format!("tokens out of order: {highest:?}, then {stay:?}"));
            }
            continue;
        }
        highest = Some(stay);
    }
}

fn writes(history: &History, excused: &impl Fn(u64) -> bool, findings: &mut Findings) {
    let names: HashMap<&str, &Stay> = { history.stays.iter() }
        .map(|stay| (stay.name.as_str(), stay))
        .collect();
    for stay in &history.stays {
        let Some((write, held)) = &stay.write else {
            continue;
        };
        match write {
            Write::Kept => {}
            Write::Refused => findings.refused += 1,
            Write::Lost { writes, last } if stay.key == FENCED => {
                findings.violation(format!(
                    "{writes} updates lost in spite of fencing: {stay:?} after {last}"
                ));
            }
            Write::Lost { writes, last } => {
                let other = names.get(last.as_str());
                let other_held = other
                    .and_then(|other| other.write.as_ref())
                    .is_some_and(|(_, held)| *held);
                // The update of a second holder may be overwritten later than the server forgot: by
                // the end of the stay of the first.
                let both_were_in = || {
                    other.is_some_and(|other| {
                        let from = stay.granted.max(other.granted);
                        let until = stay.until.min(other.until);
                        from < until && excused(from) && excused(until)
                    })
                };
                if !held || !other_held {
                    findings.lost_told += writes;
                } else if excused(stay.until) || both_were_in() {
                    findings.lost_excused += writes;
                } else {
                    findings.violation(format!(
                        "{writes} updates lost: {stay:?} overwrote {other:?} ({PLAIN})"
                    ));
                }
            }
        }
    }
}

/// How many grants of the same key went to others while one waited, at most: in a row in which nothing was `disturbed`.
/// How long others stay has no part in it.
pub fn passed(stays: &[Stay], disturbed: impl Fn(u64, u64) -> bool) -> usize {
    let mut most = 0;
    for (index, stay) in stays.iter().enumerate() {
        // They are in the order of their grants.
        let before = stays[..index].iter().rev();
        let meanwhile = before.take_while(|other| other.granted > stay.asked);
        let (mut in_a_row, mut later) = (0, stay.granted);
        for other in meanwhile.filter(|other| other.key == stay.key) {
            if disturbed(other.granted, later) {
                in_a_row = 0;
            }
            (in_a_row, later) = (in_a_row + 1, other.granted);
            most = most.max(in_a_row);
        }
    }
    most
}
