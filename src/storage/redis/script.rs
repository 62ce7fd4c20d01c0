//! The scripts, and how they are run.

use std::sync::LazyLock;

use redis::{Cmd, Value};

use super::{
    error::{Failure, unexpected, value},
    fencing, names,
    topology::Line,
    wire::{Fact, Origin, Wire},
};
use crate::{error::StorageError, key::LockName};

/// A script, and the name by which the server's cache knows it.
pub(super) struct Script {
    text: &'static str,
    sha: LazyLock<String>,
    /// That the server has it in its cache.
    cached: Fact,
    /// 1: the lock. 3: its queue and the fencing counter too.
    keys: u8,
}

macro_rules! script {
    ($name:ident, $cached:ident, $keys:literal, $($file:literal),+) => {
        pub(super) static $name: Script = Script {
            cached: Fact::$cached,
            keys: $keys,
            text: concat!($(include_str!(concat!("scripts/", $file))),+),
            sha: LazyLock::new(|| redis::Script::new($name.text).get_hash().into()),
        };
    };
}

script!(ACQUIRE, HasAcquireScript, 3, "queue.lua", "acquire.lua");
script!(RENEW, HasRenewScript, 1, "renew.lua");
script!(FREE, HasFreeScript, 1, "free.lua");
script!(
    RELEASE,
    HasReleaseScript,
    3,
    "alone.lua",
    "queue.lua",
    "release.lua"
);
script!(RAISE, HasRaiseScript, 3, "raise.lua");

impl Script {
    /// Runs it on a lock.
    ///
    /// The first time over a connection the text is sent, which puts it into the server's cache:
    /// asked to run what it does not have, the server would do so only after what was sent next.
    /// Should it have left the cache since (`SCRIPT FLUSH`), the text is sent again.
    pub(super) async fn run(
        &self,
        line: &Line<'_>,
        name: &LockName,
        arguments: impl Fn(&mut Cmd, &Wire) + Sync,
    ) -> Result<(Value, Origin), StorageError> {
        self.run_telling(false, line, name, arguments).await
    }

    /// The same. If it tells another client something, that client hears of it first.
    pub(super) async fn run_telling(
        &self,
        tells: bool,
        line: &Line<'_>,
        name: &LockName,
        arguments: impl Fn(&mut Cmd, &Wire) + Sync,
    ) -> Result<(Value, Origin), StorageError> {
        let called = self.run_while(|| true, tells, line, name, arguments);
        called.await?.ok_or_else(unexpected)
    }

    /// The same, as long as it is wanted. `None`: it no longer was when there was a connection for
    /// it.
    pub(super) async fn run_while(
        &self,
        is_wanted: impl Fn() -> bool + Sync,
        tells: bool,
        line: &Line<'_>,
        name: &LockName,
        arguments: impl Fn(&mut Cmd, &Wire) + Sync,
    ) -> Result<Option<(Value, Origin)>, StorageError> {
        let send = |wire: &Wire, verb, script| {
            let mut command = self.command(verb, script, name, wire);
            arguments(&mut command, wire);
            match tells {
                true => wire.send_telling(command),
                false => wire.send([command]),
            }
        };
        let by_name = |wire: &Wire| {
            let may_send = is_wanted() && wire.knows(self.cached);
            may_send.then(|| send(wire, "EVALSHA", &self.sha))
        };
        match line.call(by_name).await? {
            None | Some((Err(Failure::NoScript), _)) => {}
            Some((reply, origin)) => return Ok(Some((reply?, origin))),
        }
        let by_text = |wire: &Wire| is_wanted().then(|| send(wire, "EVAL", self.text));
        let Some((reply, origin)) = line.call(by_text).await? else {
            return Ok(None);
        };
        let value = reply?;
        line.learn(origin, self.cached);
        Ok(Some((value, origin)))
    }

    /// Runs it over one connection, and then another command there: what both brought.
    pub(super) async fn run_and(
        &self,
        wire: &Wire,
        name: &LockName,
        arguments: impl Fn(&mut Cmd),
        next: Cmd,
    ) -> Result<(Value, Value), StorageError> {
        let command = |verb, script| {
            let mut command = self.command(verb, script, name, wire);
            arguments(&mut command);
            command
        };
        if wire.knows(self.cached) {
            let by_name = command("EVALSHA", &self.sha);
            let Value::Array(replies) = wire.run([by_name, next.clone()]).await? else {
                return Err(unexpected());
            };
            let Ok([reply, after]) = <[_; 2]>::try_from(replies) else {
                return Err(unexpected());
            };
            match value(reply) {
                Err(Failure::NoScript) => {}
                reply => return Ok((reply?, value(after)?)),
            }
        }
        let reply = wire.run([command("EVAL", self.text)]).await?;
        wire.learn(self.cached);
        Ok((reply, wire.run([next]).await?))
    }

    fn command(&self, verb: &str, script: &str, name: &LockName, wire: &Wire) -> Cmd {
        // Room for the script, its keys and the longest arguments, two tokens.
        let room = script.len() + usize::from(self.keys) * name.as_str().len() + 256;
        let mut command = Cmd::with_capacity(12, room);
        command
            .arg(verb)
            .arg(script)
            .arg(self.keys)
            .arg(name.as_str());
        if self.keys > 1 {
            command.arg(names::queue(name));
            match wire.counters() {
                Some(counters) => command.arg(counters.of(name)),
                None => command.arg(fencing::counter(name)),
            };
        }
        command
    }
}
