//! The scripts, and how they are run.

use std::sync::LazyLock;

use redis::{Cmd, Value};

use super::{
    connection::{Fact, Failure, Wire},
    error::unexpected,
    fencing,
};
use crate::{error::StorageError, key::LockName};

/// A script, and the name by which the server's cache knows it.
pub(super) struct Script {
    text: &'static str,
    sha: LazyLock<String>,
    /// That the server has it in its cache.
    cached: Fact,
}

macro_rules! script {
    ($name:ident, $cached:ident, $($file:literal),+) => {
        pub(super) static $name: Script = Script {
            cached: Fact::$cached,
            text: concat!($(include_str!(concat!("scripts/", $file))),+),
            sha: LazyLock::new(|| redis::Script::new($name.text).get_hash().into()),
        };
    };
}

script!(ACQUIRE, HasAcquireScript, "pass_on.lua", "acquire.lua");
script!(RENEW, HasRenewScript, "renew.lua");
script!(
    RELEASE,
    HasReleaseScript,
    "release_unwanted.lua",
    "pass_on.lua",
    "release_wanted.lua"
);

impl Script {
    /// Runs it on a lock, its queue and the fencing counter.
    ///
    /// The first time over a connection the text is sent, which puts it into the server's cache:
    /// asked to run what it does not have, the server would do so only after what was sent next.
    /// Should it have left the cache since (`SCRIPT FLUSH`), the text is sent again.
    pub(super) async fn run(
        &self,
        wire: &Wire,
        name: &LockName,
        arguments: impl FnOnce(&mut Cmd) + Copy,
    ) -> Result<Value, StorageError> {
        if wire.knows(self.cached) {
            let reply = wire.run(command("EVALSHA", &self.sha, name, arguments));
            match reply.await {
                Err(Failure::NoScript) => {}
                result => return Ok(result?),
            }
        }
        let reply = wire
            .run(command("EVAL", self.text, name, arguments))
            .await?;
        wire.learn(self.cached);
        Ok(reply)
    }

    /// The same, and then another command over the same connection: what both brought.
    pub(super) async fn run_and(
        &self,
        wire: &Wire,
        name: &LockName,
        arguments: impl FnOnce(&mut Cmd) + Copy,
        next: Cmd,
    ) -> Result<(Value, Value), StorageError> {
        if wire.knows(self.cached) {
            let script = command("EVALSHA", &self.sha, name, arguments);
            let Value::Array(replies) = wire.run_all(script, vec![next.clone()]).await? else {
                return Err(unexpected());
            };
            let Ok([reply, after]) = <[_; 2]>::try_from(replies) else {
                return Err(unexpected());
            };
            match wire.value(reply) {
                Err(Failure::NoScript) => {}
                reply => return Ok((reply?, wire.value(after)?)),
            }
        }
        let reply = self.run(wire, name, arguments).await?;
        Ok((reply, wire.run(next).await?))
    }
}

fn command(verb: &str, script: &str, name: &LockName, arguments: impl FnOnce(&mut Cmd)) -> Cmd {
    // Room for the script, its keys and the longest arguments, two tokens.
    let room = script.len() + 3 * name.as_str().len() + 256;
    let mut command = Cmd::with_capacity(12, room);
    command
        .arg(verb)
        .arg(script)
        .arg(3)
        .arg(name.as_str())
        .arg(name.companion("queue"))
        .arg(fencing::counter(name));
    arguments(&mut command);
    command
}
