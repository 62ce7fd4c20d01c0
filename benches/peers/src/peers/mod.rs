//! What is compared: our library, and what others use or write by hand.

pub(crate) mod by_hand;
pub(crate) mod distributed_lock;
pub(crate) mod ours;
pub(crate) mod ping;
pub(crate) mod pubsub;
pub(crate) mod redis_lock;
pub(crate) mod rslock;
pub(crate) mod service;

use std::time::Duration;

use redis::{AsyncConnectionConfig, aio::MultiplexedConnection};

use crate::Error;

/// The ttl of every lock: long enough that none runs out in a run.
const TTL: Duration = Duration::from_secs(30);

/// A way to lock, connected to the server.
pub(crate) trait Locks: Clone + Send + Sync + 'static {
    type Guard: Send;

    /// Returns when the lock is held.
    fn lock(&self, key: &str) -> impl Future<Output = Result<Self::Guard, Error>> + Send;

    /// Returns when the caller of this library may go on.
    fn release(&self, guard: Self::Guard) -> impl Future<Output = Result<(), Error>> + Send;

    /// Returns when nothing is under way any more.
    fn finish(&self) -> impl Future<Output = Result<(), Error>> + Send {
        async { Ok(()) }
    }
}

/// The names by which the rows and the worker processes know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// This library as it comes, with fencing tokens; the release is waited for.
    Ours,
    /// This library without fencing tokens.
    OursUnfenced,
    /// This library; the guard is dropped, as the layer does it.
    OursDispatched,
    /// This library without fencing tokens, and each lock counts when a replica has it.
    OursReplicated,
    /// `SET NX PX` and compare-and-delete; whoever finds the lock taken asks again.
    ByHand,
    /// rslock as it comes.
    RslockDefault,
    /// rslock with the shortest retry delay that it allows.
    RslockTuned,
    /// No lock: one round trip.
    Ping,
    /// `SET NX PX` and a published message that wakes who waits.
    Pubsub,
    /// This library over several servers, with fencing tokens.
    OursRedlock,
    /// The same without.
    OursRedlockUnfenced,
    /// redis-lock, over any number of servers.
    RedisLock,
    /// distributed-lock with its Redis backend. It does not wait.
    DistributedLock,
    /// A service with axum and our layer.
    AxumOurs,
    /// The same without fencing tokens.
    AxumOursUnfenced,
    /// Its handler has the lock of `ByHand`.
    AxumByHand,
    /// Its handler has a lock of rslock.
    AxumRslock,
    /// Its handler has one of the mutexes of the process.
    AxumMutex,
    /// Its handler has no lock.
    AxumNone,
}

impl Peer {
    const ALL: [Self; 19] = [
        Self::Ours,
        Self::OursUnfenced,
        Self::OursDispatched,
        Self::OursReplicated,
        Self::ByHand,
        Self::RslockDefault,
        Self::RslockTuned,
        Self::Ping,
        Self::Pubsub,
        Self::OursRedlock,
        Self::OursRedlockUnfenced,
        Self::RedisLock,
        Self::DistributedLock,
        Self::AxumOurs,
        Self::AxumOursUnfenced,
        Self::AxumByHand,
        Self::AxumRslock,
        Self::AxumMutex,
        Self::AxumNone,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::OursUnfenced => "ours_unfenced",
            Self::OursDispatched => "ours_dispatched",
            Self::OursReplicated => "ours_replicated",
            Self::ByHand => "by_hand",
            Self::RslockDefault => "rslock_default",
            Self::RslockTuned => "rslock_tuned",
            Self::Ping => "ping",
            Self::Pubsub => "pubsub",
            Self::OursRedlock => "ours_redlock",
            Self::OursRedlockUnfenced => "ours_redlock_unfenced",
            Self::RedisLock => "redis-lock",
            Self::DistributedLock => "distributed-lock",
            Self::AxumOurs => "axum_ours",
            Self::AxumOursUnfenced => "axum_ours_unfenced",
            Self::AxumByHand => "axum_by_hand",
            Self::AxumRslock => "axum_rslock",
            Self::AxumMutex => "axum_mutex",
            Self::AxumNone => "axum_none",
        }
    }

    pub(crate) fn named(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|peer| peer.name() == name)
            .ok_or_else(|| format!("no peer is named {name}").into())
    }
}

/// The one connection of the peers that are written by hand here: redis-rs's own settings, less its
/// time-out per command. A timer for each command costs 10 % of the throughput, and an own deadline
/// around the whole acquisition does as well.
pub(crate) async fn connect(url: &str) -> Result<MultiplexedConnection, Error> {
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let client = redis::Client::open(url)?;
    Ok(client
        .get_multiplexed_async_connection_with_config(&config)
        .await?)
}

/// A value that no other acquisition has.
fn token() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// Takes the lock if it is free.
async fn set_if_free(
    connection: &mut MultiplexedConnection,
    key: &str,
    token: &str,
) -> Result<bool, Error> {
    let reply: Option<String> = redis::cmd("SET")
        .arg(key)
        .arg(token)
        .arg("NX")
        .arg("PX")
        .arg(TTL.as_millis() as u64)
        .query_async(connection)
        .await?;
    Ok(reply.is_some())
}

/// Loads a script; the answer is its name.
async fn load(connection: &mut MultiplexedConnection, script: &str) -> Result<String, Error> {
    Ok(redis::cmd("SCRIPT")
        .arg("LOAD")
        .arg(script)
        .query_async(connection)
        .await?)
}

/// Releases the lock by a script that looks at the token first.
async fn release(
    connection: &mut MultiplexedConnection,
    script: &str,
    key: &str,
    token: &str,
) -> Result<(), Error> {
    let released: u64 = redis::cmd("EVALSHA")
        .arg(script)
        .arg(1)
        .arg(key)
        .arg(token)
        .query_async(connection)
        .await?;
    match released {
        1 => Ok(()),
        _ => Err(format!("the lock {key} was not ours at its release").into()),
    }
}
