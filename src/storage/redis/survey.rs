//! A look at the locks that are in the servers: which they are, whose, and who waits for them.
//!
//! It reads only, by plain commands in small steps, so that others are not held up: `SCAN` goes
//! through the keys of a database a few hundred at a time, and of each lock that it finds the value,
//! the time left and the queue are read.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use redis::{Cmd, Value};
use tokio::time::{Instant, sleep};

use super::{RedisStorage, error::unexpected, names, script::RELEASE, topology::Line, wire::Wire};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::LockName,
    storage::{LockOwner, LockRecord, OwnerToken, ReleaseReply, Survey, SurveyRequest},
};

/// How many keys the server looks at in one step: about a tenth of a millisecond of its time.
const STEP: usize = 500;

/// How long one node of a cluster has to tell something before another is asked to.
const NEXT_NODE: Duration = Duration::from_millis(20);

/// What a prefix is for `SCAN`, which takes patterns.
fn pattern(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 8);
    for letter in prefix.chars() {
        if r"*?[]^\-".contains(letter) {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern + ":*"
}

/// Whose lock this is. Those who wait for one of ours leave a mark behind its token.
pub(super) fn owner(value: &[u8]) -> LockOwner {
    let marked = value.strip_suffix(b"!").map(LockOwner::from_value);
    marked
        .filter(|owner| owner.token().is_some())
        .unwrap_or_else(|| LockOwner::from_value(value))
}

/// The processes that stand in a queue. Lines that make no sense are passed over, as by the scripts.
pub(super) fn inboxes(queue: &[u8]) -> Vec<u128> {
    let lines = str::from_utf8(queue).unwrap_or_default().lines();
    let inbox = |line: &str| {
        let who = line.split(' ').next()?;
        // A process that only wants to hear that the lock is free stands there without a number.
        let token = match who.len() {
            32 => OwnerToken::from_text(&[who, ":0"].concat()),
            _ => OwnerToken::from_text(who),
        };
        token.map(|token| token.inbox())
    };
    lines.filter_map(inbox).collect()
}

/// A step of `SCAN`: where to go on, and the names that were found.
pub(super) fn step(reply: Value) -> Option<(String, Vec<Value>)> {
    let Value::Array(parts) = reply else {
        return None;
    };
    match <[_; 2]>::try_from(parts) {
        Ok([Value::BulkString(next), Value::Array(names)]) => {
            Some((String::from_utf8(next).ok()?, names))
        }
        _ => None,
    }
}

async fn ask(line: &Line<'_>, command: Cmd) -> Result<Value, StorageError> {
    let called = line.call(|wire| Some(wire.send([command]))).await?;
    Ok(called.ok_or_else(unexpected)?.0?)
}

fn command(verb: &str, name: &LockName) -> Cmd {
    let mut command = redis::cmd(verb);
    command.arg(name.as_str());
    command
}

impl RedisStorage {
    pub(super) async fn survey_all(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        let until = Instant::now() + request.time;
        let mut found = Found {
            records: Vec::new(),
            known: HashSet::new(),
            more: false,
        };
        for line in self.servers.lines().await? {
            self.survey_one(&line, request, until, &mut found).await?;
        }
        let Found { records, more, .. } = found;
        Ok(Survey::new(records, more))
    }

    async fn survey_one(
        &self,
        line: &Line<'_>,
        request: &SurveyRequest,
        until: Instant,
        found: &mut Found,
    ) -> Result<(), StorageError> {
        let pattern = pattern(&request.prefix);
        let mut next = "0".to_owned();
        while !found.more {
            let mut scan = redis::cmd("SCAN");
            scan.arg(&next).arg("MATCH").arg(&pattern);
            scan.arg("COUNT").arg(STEP);
            let names;
            (next, names) = step(ask(line, scan).await?).ok_or_else(unexpected)?;
            let mut names: Vec<_> = names
                .iter()
                .filter_map(|name| found.news(request, name))
                .collect();
            while !names.is_empty() {
                let rest = names.split_off(names.len().min(STEP));
                let looks = names.iter().map(|name| self.look_for(name));
                for record in join_all(looks).await {
                    match record {
                        Ok(Some(record)) if found.records.len() < request.limit => {
                            found.records.push(record);
                        }
                        Ok(Some(_)) => found.more = true,
                        Ok(None) => {}
                        // Whatever it is, it is no lock.
                        Err(error) if error.kind() == StorageErrorKind::WrongType => {}
                        Err(error) => return Err(error),
                    }
                }
                names = rest;
                if found.more {
                    break;
                }
            }
            if next == "0" {
                break;
            }
            found.more |= Instant::now() >= until;
        }
        Ok(())
    }

    /// What is known of one lock, where it is.
    pub(super) async fn look_for(
        &self,
        name: &LockName,
    ) -> Result<Option<LockRecord>, StorageError> {
        let mut get_queue = redis::cmd("GET");
        get_queue.arg(names::queue(name));
        // Each finds its own way: while a slot is on its way, one of two keys may be here and the
        // other there.
        let (value, left, queue) = tokio::join!(
            self.ask_about(name, command("GET", name)),
            self.ask_about(name, command("PTTL", name)),
            self.ask_about(name, get_queue),
        );
        let Value::BulkString(value) = value? else {
            return Ok(None);
        };
        let left = match left? {
            // It has gone in between.
            Value::Int(-2) => return Ok(None),
            Value::Int(left) => u64::try_from(left).ok().map(Duration::from_millis),
            _ => return Err(unexpected()),
        };
        let mut record = LockRecord::new(name.clone(), owner(&value), left);
        if let Value::BulkString(queue) = queue? {
            record.queue = inboxes(&queue);
        }
        Ok(Some(record))
    }

    /// Runs a command with one key where the lock is.
    async fn ask_about(&self, name: &LockName, command: Cmd) -> Result<Value, StorageError> {
        let mut way = self.servers.way(name);
        loop {
            let line = way.line().await?;
            let result = ask(&line, command.clone()).await;
            if let Some(result) = way.after(result).await {
                return result;
            }
        }
    }

    /// Runs the release script as its owner would.
    pub(super) async fn force_over(
        &self,
        line: &Line<'_>,
        seen: &LockRecord,
    ) -> Result<ReleaseReply, StorageError> {
        let value = seen.owner.value();
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(&*value);
        };
        match RELEASE.run(line, &seen.name, arguments).await?.0 {
            Value::Int(0) => Ok(ReleaseReply::NotOurs),
            Value::Int(1) => Ok(ReleaseReply::Released),
            _ => Err(unexpected()),
        }
    }

    /// Publishes to an inbox.
    pub(super) async fn tell_inbox(
        &self,
        prefix: &str,
        inbox: u128,
        text: &str,
    ) -> Result<bool, StorageError> {
        let mut publish = redis::cmd("PUBLISH");
        publish
            .arg(format!("{prefix}:inbox:{inbox:032x}"))
            .arg(["t ", text].concat());
        // In a cluster, any node tells all others. One that stands still must not be in the way.
        let lines = self.servers.lines().await?;
        let mut telling: FuturesUnordered<_> = (0u32..)
            .zip(&lines)
            .map(async |(number, line)| {
                sleep(NEXT_NODE * number).await;
                ask(line, publish.clone()).await
            })
            .collect();
        let mut failed = None;
        while let Some(told) = telling.next().await {
            match told {
                Ok(Value::Int(heard)) => return Ok(heard > 0 || self.servers.is_cluster()),
                Ok(_) => return Err(unexpected()),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(unexpected))
    }
}

/// What a survey has found.
struct Found {
    records: Vec<LockRecord>,
    /// `SCAN` may find a key more than once.
    known: HashSet<Arc<str>>,
    more: bool,
}

impl Found {
    /// A lock that was not there yet.
    fn news(&mut self, request: &SurveyRequest, name: &Value) -> Option<LockName> {
        let Value::BulkString(name) = name else {
            return None;
        };
        let name = request.name(str::from_utf8(name).ok()?)?;
        self.known.insert(name.as_str().into()).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_stands_for_itself() {
        assert_eq!(pattern("a.b/c_d"), "a.b/c_d:*");
        assert_eq!(pattern(r"a*[b]?^\-"), r"a\*\[b\]\?\^\\\-:*");
    }

    #[test]
    fn a_mark_is_not_part_of_a_token_but_of_another_clients_value() {
        let token = OwnerToken::from_text(&format!("{:032x}:7", 5)).unwrap();
        let text = token.to_text();
        for value in [text.clone(), format!("{text}!")] {
            assert_eq!(owner(value.as_bytes()).token(), Some(token));
        }
        for value in ["client!", &format!("{text}!!")] {
            assert_eq!(&*owner(value.as_bytes()).value(), value.as_bytes());
        }
    }

    #[test]
    fn a_queue_is_read_in_its_order() {
        let queue = format!(
            "{0:032x}:1 10 1\nnonsense\n{1:032x} 0 0\n{2:032x}:4 5 0\n",
            7, 8, 9
        );
        assert_eq!(inboxes(queue.as_bytes()), [7, 8, 9]);
        assert_eq!(inboxes(b"\xFF\n"), [0; 0]);
    }
}
