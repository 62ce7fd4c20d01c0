//! The scripts, and how they are run.

use std::sync::LazyLock;

use redis::{Cmd, Value};

use super::connection::{Connection, Failure};
use crate::{error::StorageError, key::LockName};

/// A script, and the name by which the server's cache knows it.
pub(super) struct Script {
    text: &'static str,
    sha: LazyLock<String>,
}

macro_rules! script {
    ($name:ident, $($file:literal),+) => {
        pub(super) static $name: Script = Script {
            text: concat!($(include_str!(concat!("scripts/", $file))),+),
            sha: LazyLock::new(|| redis::Script::new($name.text).get_hash().into()),
        };
    };
}

script!(ACQUIRE, "pass_on.lua", "acquire.lua");
script!(RENEW, "renew.lua");
script!(
    RELEASE,
    "release_unwanted.lua",
    "pass_on.lua",
    "release_wanted.lua"
);

impl Script {
    /// Runs it on a lock and its queue, from the server's cache; where it is not there (a new
    /// server, `SCRIPT FLUSH`), sends the text, which puts it there.
    pub(super) async fn run(
        &self,
        connection: &Connection,
        name: &LockName,
        arguments: impl FnOnce(&mut Cmd) + Copy,
    ) -> Result<Reply, StorageError> {
        let queue = name.companion("queue");
        let command = |verb: &str, script: &str| {
            let mut command = redis::cmd(verb);
            command.arg(script).arg(2).arg(name.as_str()).arg(&queue);
            arguments(&mut command);
            command
        };
        match connection.run(&command("EVALSHA", &self.sha)).await {
            Err(Failure::NoScript) => {}
            result => return reply(result),
        }
        reply(connection.run(&command("EVAL", self.text)).await)
    }
}

/// What a script answered, and by which run of the server.
pub(super) struct Reply {
    pub(super) value: Value,
    pub(super) run: Option<u128>,
}

fn reply(result: Result<(Value, Option<u128>), Failure>) -> Result<Reply, StorageError> {
    match result {
        Ok((value, run)) => Ok(Reply { value, run }),
        Err(Failure::Storage(error)) => Err(error),
        Err(Failure::NoScript) => Err(super::error::unexpected()),
    }
}
