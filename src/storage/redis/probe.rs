//! A look at how a server is set up: whether it may throw locks away, or forgets them when it
//! restarts.
//!
//! It is taken once for each run of the server, a moment after the connection is made, and tells
//! the operator; nothing depends on it.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use redis::Value;

use super::wire::Wire;

/// Whoever has just connected wants a lock: that comes first.
const PAUSE: Duration = Duration::from_millis(100);

/// Which run of the server was looked at last. `Some(None)`: one that does not tell which it is.
#[derive(Default)]
pub(super) struct Probe(Mutex<Option<Option<u128>>>);

impl Probe {
    /// Looks, in the background.
    pub(super) fn look(&self, wire: &Arc<Wire>) {
        let run = Some(wire.server_run());
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *last, run) == run {
            return;
        }
        // A connection that nobody uses any more is not kept open for this.
        tokio::spawn(report(Arc::downgrade(wire)));
    }
}

async fn report(wire: Weak<Wire>) {
    tokio::time::sleep(PAUSE).await;
    let Some(wire) = wire.upgrade() else { return };
    // A server that never answers is found out by those who wait for locks.
    let Ok(found) = tokio::time::timeout(Duration::from_secs(5), Findings::of(&wire)).await else {
        return;
    };
    if let Some(Eviction::Evicts(policy)) = &found.eviction {
        tracing::warn!(
            policy,
            "Redis throws keys away when its memory is full, and so may lose locks: \
             set `maxmemory-policy` to noeviction"
        );
    }
    if found.persists == Some(false) {
        tracing::warn!(
            "Redis keeps nothing on disk and forgets all locks when it restarts: set `appendonly`, \
             or fence what the locks protect"
        );
    }
    let Findings { eviction, persists } = found;
    tracing::debug!(
        ?eviction,
        ?persists,
        "how Redis is set up; `None`: it does not tell"
    );
}

/// What could be found out.
#[derive(Debug, PartialEq, Eq)]
struct Findings {
    eviction: Option<Eviction>,
    persists: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Eviction {
    Keeps,
    Evicts(String),
}

impl Findings {
    /// `INFO` is asked first: the user that the documentation recommends may do that, and whoever
    /// may not has it in the server's log (`ACL LOG`).
    async fn of(wire: &Wire) -> Self {
        let memory = ask(wire, &["INFO", "memory"]).await;
        let persistence = ask(wire, &["INFO", "persistence"]).await;
        let appends = persistence
            .as_deref()
            .and_then(|info| field(info, "aof_enabled"));
        let save = match appends {
            Some("0") => ask(wire, &["CONFIG", "GET", "save"]).await,
            _ => None,
        };
        Self::read(memory.as_deref(), appends, save.as_deref())
    }

    fn read(memory: Option<&str>, appends: Option<&str>, save: Option<&str>) -> Self {
        let eviction = memory.and_then(|memory| {
            let policy = field(memory, "maxmemory_policy")?;
            match field(memory, "maxmemory")? {
                "0" => Some(Eviction::Keeps),
                _ if policy == "noeviction" => Some(Eviction::Keeps),
                _ => Some(Eviction::Evicts(policy.to_owned())),
            }
        });
        let persists = match appends {
            Some("1") => Some(true),
            // `save` and when it is done: nothing, if never.
            _ => save.map(|save| save.split_ascii_whitespace().nth(1).is_some()),
        };
        Self { eviction, persists }
    }
}

/// What the server says, as text: names and values in turn, if it is several. `None` if it does not.
async fn ask(wire: &Wire, words: &[&str]) -> Option<String> {
    let mut command = redis::cmd(words.first()?);
    command.arg(&words[1..]);
    text(wire.run([command]).await.ok()?)
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(text) => String::from_utf8(text).ok(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text),
        Value::Array(values) => {
            let texts: Option<Vec<_>> = values.into_iter().map(text).collect();
            texts.map(|texts| texts.join(" "))
        }
        Value::Map(pairs) => {
            let values = pairs.into_iter().flat_map(|(name, value)| [name, value]);
            text(Value::Array(values.collect()))
        }
        _ => None,
    }
}

/// A field of `INFO`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = info.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_is_understood() {
        let keeps = Some(Eviction::Keeps);
        let evicts = |policy: &str| Some(Eviction::Evicts(policy.to_owned()));
        let memory =
            |max, policy| format!("# Memory\r\nmaxmemory:{max}\r\nmaxmemory_policy:{policy}\r\n");
        for (memory, eviction) in [
            (memory(0, "allkeys-lru"), keeps),
            (memory(1_000, "noeviction"), Some(Eviction::Keeps)),
            (memory(1_000, "volatile-ttl"), evicts("volatile-ttl")),
            ("OK".to_owned(), None),
        ] {
            assert_eq!(Findings::read(Some(&memory), None, None).eviction, eviction);
        }
        assert_eq!(Findings::read(None, None, None).eviction, None);
        for (appends, save, persists) in [
            (Some("1"), None, Some(true)),
            (Some("0"), Some("save 3600 1"), Some(true)),
            (Some("0"), Some("save "), Some(false)),
            (Some("0"), None, None),
            (None, None, None),
        ] {
            assert_eq!(Findings::read(None, appends, save).persists, persists);
        }
    }
}
