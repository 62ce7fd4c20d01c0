//! The scripts, and how they are run.

use std::sync::{
    LazyLock,
    atomic::{AtomicU8, Ordering::Relaxed},
};

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
    /// Which one it is, for [`Known`].
    bit: u8,
}

/// The scripts that a server is known to have in its cache.
#[derive(Default)]
pub(super) struct Known(AtomicU8);

impl Known {
    fn has(&self, script: &Script) -> bool {
        self.0.load(Relaxed) & script.bit != 0
    }

    fn add(&self, script: &Script) {
        self.0.fetch_or(script.bit, Relaxed);
    }
}

macro_rules! script {
    ($name:ident, $bit:literal, $($file:literal),+) => {
        pub(super) static $name: Script = Script {
            bit: $bit,
            text: concat!($(include_str!(concat!("scripts/", $file))),+),
            sha: LazyLock::new(|| redis::Script::new($name.text).get_hash().into()),
        };
    };
}

script!(ACQUIRE, 1, "pass_on.lua", "acquire.lua");
script!(RENEW, 2, "renew.lua");
script!(
    RELEASE,
    4,
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
        if wire.scripts.has(self) {
            let reply = wire.run(command("EVALSHA", &self.sha, name, arguments));
            match reply.await {
                Err(Failure::NoScript) => {}
                result => return Ok(result?),
            }
        }
        let reply = wire
            .run(command("EVAL", self.text, name, arguments))
            .await?;
        wire.scripts.add(self);
        Ok(reply)
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
