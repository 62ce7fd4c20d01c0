//! The scripts, and how they are run.

use std::sync::LazyLock;

use redis::{Cmd, Value};

use super::{
    connection::{Failure, Wire},
    fencing,
};
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
    /// Runs it on a lock, its queue and the fencing counter, from the server's cache; where it is
    /// not there (a new server, `SCRIPT FLUSH`), sends the text, which puts it there.
    pub(super) async fn run(
        &self,
        wire: &Wire,
        name: &LockName,
        arguments: impl FnOnce(&mut Cmd) + Copy,
    ) -> Result<Value, StorageError> {
        match wire
            .run(command("EVALSHA", &self.sha, name, arguments))
            .await
        {
            Err(Failure::NoScript) => {}
            result => return Ok(result?),
        }
        Ok(wire
            .run(command("EVAL", self.text, name, arguments))
            .await?)
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
