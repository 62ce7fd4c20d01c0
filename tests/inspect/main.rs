//! What a look at the locks shows, and what becomes of a lock that is taken away, over real Redis
//! servers.
//!
//! Factories in a test stand for processes: they share nothing but the servers.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

mod doubt;
mod force;
#[path = "../kit/mod.rs"]
mod kit;
mod looking;
mod memory;
mod servers;

use std::time::Duration;

use tokio::task::JoinHandle;
use tower_distributed_lock::{
    LockFactory, LockGuard,
    error::LockError,
    inspect::{LockInfo, Process, Snapshot},
    storage::{LockStorage, RedisStorage},
};

use self::kit::{LIMIT, LONG, RedisServer, asking, eventually, ms, within};

/// Whoever gets a lock sooner than it asks was given it.
const NEVER: Duration = Duration::from_secs(60);

fn labelled(storage: impl LockStorage, label: &str) -> LockFactory {
    let builder = LockFactory::builder(storage).label(label);
    // A busy machine is not a server that hangs.
    builder.storage_timeout(LIMIT).build().unwrap()
}

async fn factory(url: impl Into<String>, label: &str) -> LockFactory {
    let storage = RedisStorage::builder(url).connect_timeout(LIMIT);
    labelled(storage.connect().await.unwrap(), label)
}

async fn hold(factory: &LockFactory, key: &str) -> LockGuard {
    let options = asking(LONG, LIMIT.max(NEVER), NEVER);
    let lock = factory.create_lock(key).unwrap();
    within(LIMIT, "the lock", lock.lock(options)).await.unwrap()
}

/// Waits for a lock, in the background, without asking twice.
fn wait_for(factory: &LockFactory, key: &str) -> JoinHandle<Result<LockGuard, LockError>> {
    let lock = factory.create_lock(key).unwrap();
    tokio::spawn(async move { lock.lock(asking(LONG, 2 * NEVER, NEVER)).await })
}

async fn served(waiting: JoinHandle<Result<LockGuard, LockError>>) -> LockGuard {
    within(LIMIT, "its turn", waiting).await.unwrap().unwrap()
}

/// Until it shows what it should: what was sent to a server may take a moment.
async fn shown(
    by: &LockFactory,
    what: &str,
    key: &str,
    as_it_should: impl Fn(&LockInfo) -> bool,
) -> LockInfo {
    let key = key.parse().unwrap();
    let mut last = None;
    let limit = within(LIMIT, what, async {
        loop {
            let info = by.inspector().get(&key).await.unwrap();
            if let Some(info) = info
                && as_it_should(&info)
            {
                last = Some(info);
                return;
            }
            tokio::time::sleep(ms(5)).await;
        }
    });
    limit.await;
    last.unwrap()
}

/// All holders have answered: on a busy machine one may be late for once.
async fn all_answered(by: &LockFactory, limit: usize) -> Snapshot {
    let inspector = by.inspector();
    within(LIMIT, "they answer", async {
        loop {
            let snapshot = inspector.locks(limit).await.unwrap();
            let answered = |lock: &LockInfo| lock.held_for.is_some();
            if snapshot.locks.iter().all(answered) {
                return snapshot;
            }
        }
    })
    .await
}

/// The process that it was taken from, if it answered in time.
fn was_of(was: &LockInfo, label: &str) -> bool {
    !was.holder.answered || was.holder.label.as_deref() == Some(label)
}

fn labels(info: &LockInfo) -> Vec<&str> {
    let waiters = info.waiters.iter();
    waiters.map(|waiting| label(&waiting.process)).collect()
}

fn label(process: &Process) -> &str {
    process.label.as_deref().unwrap_or("")
}

async fn listens(server: &RedisServer, factories: u64) {
    eventually("they listen", LIMIT, async || {
        let inboxes: Vec<String> = server.run("PUBSUB CHANNELS *:inbox:*").await;
        inboxes.len() as u64 >= factories
    })
    .await;
}
