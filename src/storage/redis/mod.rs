//! Locks in Redis: in one server, in the master that Sentinel names, or in a Cluster.
//!
//! A lock is a plain string: its name is `prefix:key`, its value the owner's token, its expiry the
//! ttl. It is taken by `SET name token NX PX ttl`, and renewed and released by scripts that look at
//! the token first, as the Redis documentation has it ("Distributed Locks with Redis"). So a client
//! in any language that keeps to the same three steps on the same name excludes us and is excluded.
//!
//! A lock that is free costs one round trip. Where `SET` finds it taken, a script asks again: it
//! tells how long the holder has left, and recognises our own token if an earlier reply was lost.
//!
//! # Waiting
//!
//! Whoever is denied is put into the lock's queue by the same script: a list with one entry a
//! process, `{prefix:key}:queue`. A release gives the lock to the first in it and publishes that to
//! the process's own channel, `prefix:inbox:<id>`. `PUBLISH` answers how many have heard it; nobody
//! means that the process is gone, and the next one gets the lock. So a lock goes from process to
//! process in one round trip, in order, and wakes exactly one.
//!
//! A denied acquire also tells the holder that it is wanted, and puts a mark, `!`, behind its token:
//! a release that meets no mark deletes the lock and need not look for a queue. Whoever compares
//! values by hand has to expect it. Clients of other kinds know no marks, and their locks get none,
//! as long as their tokens do not look like ours (32 hex digits, a colon, a number): who waits for
//! such a lock asks for it when its ttl has run out, and every `interval` before.
//!
//! Processes also ask and tell each other about their locks through these channels, when somebody
//! [looks at them](crate::inspect).
//!
//! A queue has an expiry, and a lost message costs its waiter no more than an `interval`: then it
//! asks.
//!
//! # Fencing
//!
//! Fencing tokens come from one counter, the key `{prefix:}:fence`, which has no expiry; for a
//! Cluster, see [below](self#cluster). A lock that is free is taken, and its token with it, by plain
//! commands in one write: `SET`, `INCRBY`, and an `MGET` that shows that the lock was ours when the
//! token was taken. The counter starts at the server's clock in microseconds, and is raised to it
//! on each new connection, after 2 s without use, and when it is lower than a token seen before. So
//! tokens keep growing after a restart without persistence, a `FLUSHALL` or a failover, as long as
//! the clocks of the servers do not differ by more than the time that the failover takes, and all
//! locks with the prefix together take fewer than one million tokens a second, on average. (Who asks
//! for the first time takes tokens also if the lock is not to be had.)
//!
//! # Where the server is
//!
//! | URL | |
//! |---|---|
//! | `redis://[user[:password]@]host[:port][/db]`, `valkey://..` | over TCP; port 6379 and database 0 unless it says otherwise |
//! | `rediss://..`, `valkeys://..` | the same over TLS, with the feature `tls` |
//! | `unix:///path[?db=..&user=..&pass=..]`, `redis+unix:///..`, `valkey+unix:///..` | through a socket of this machine |
//!
//! In a URL, `#`, `?`, `/`, `@` and `%` of a password are written `%23`, `%3F`, `%2F`, `%40` and
//! `%25`; [`RedisStorageBuilder::password`] takes it as it is. What a URL cannot mean here is
//! refused, not passed over.
//!
//! With TLS, the server's certificate has to be valid, for the host that the URL names, and issued
//! by somebody whom the system trusts, or by the one that you name (`RedisStorageBuilder::root_certificate`). There is no way to switch
//! that off, and a server that does not speak TLS is not spoken to. The cryptography is what the
//! process has chosen for rustls (`CryptoProvider::install_default`), or *ring* if it has not. The
//! system's certificates are read when the storage is made.
//!
//! | what is wrong | [kind](crate::error::StorageErrorKind) |
//! |---|---|
//! | certificate expired, of another host, or of an issuer that is not trusted; the server wants one of ours; it answers, but not in TLS | `Rejected` |
//! | user or password wrong or missing; not permitted | `Unauthorized` |
//! | a URL or a certificate that cannot be read | `Rejected`, when the storage is made |
//! | nobody there, no answer in time | `Unavailable` |
//!
//! Callers hear of the first three at once, and wait out the last. No text of an error holds a
//! password or a URL.
//!
//! # What the server has to be
//!
//! Redis 6 or later, or Valkey; the tests pass with Redis 6.2, 7.0 and 7.4 and Valkey 8.0. Redis from
//! 2.6.12 to 5 works too: waiters poll, and
//! [fencing](crate::LockFactoryBuilder::fencing) has to be switched off.
//!
//! A user of its own is enough, that may do this and nothing else (before Redis 6.2 without the
//! words `resetchannels` and `&..`; with another `key_prefix`, that in all three places):
//!
//! ```text
#![doc = include_str!("acl.txt")]
//! ```
//!
//! Without `publish` or `subscribe`, or on other channels, waiters poll. Without `ping`, the
//! connection for messages is made anew every few seconds, and without `info`, a lock that is given
//! by a message is confirmed by a round trip before it is used. Without `incrby`,
//! [fencing](crate::LockFactoryBuilder::fencing) has to be switched off. Without `scan`, locks cannot
//! be [listed](crate::inspect); it shows the names of all keys of the database, also of those that
//! the user may not read. Everything else is needed.
//! A database other than 0 takes `+select`, and [replicas](RedisStorageBuilder::replicas) take
//! `+wait`.
//!
//! Whoever else may write these keys, or publish to these channels, can take and give locks as it
//! likes: keep others from them by an ACL.
//!
//! # What it can lose
//!
//! A lock is as durable as the server's memory: a restart without persistence, an eviction
//! (`maxmemory-policy` other than `noeviction`), `FLUSHALL`, and a failover to a replica that had
//! not heard of it yet, all let a second holder in while the first goes on. The first is told at
//! its next renewal, within a third of its ttl.
//!
//! A moment after it has connected, the storage looks whether the server may evict keys or keeps
//! nothing on disk, and if so says it once for each run of the server, by `tracing::warn!`
//! ([`RedisStorageBuilder::probe`]). Against failovers there is [`RedisStorageBuilder::replicas`].
//!
//! # Sentinel
//!
//! [`RedisStorage::sentinel`] finds the master through Redis Sentinel. For each new connection all
//! Sentinels are asked, at the same time, and the answer that knows of the latest failover counts;
//! the server itself is asked for its role. A connection is left when a Sentinel tells of another
//! master, when the server closes it, as it does when Sentinel makes it a replica, when a write is
//! refused because it is one, or when nothing comes back any more. Whoever waits asks the new master,
//! in its old place if that was replicated, and wake-ups come from there. A lock that is given by a
//! message is confirmed by a round trip before it is used: a master that has been replaced may still
//! give locks away.
//!
//! During a failover
//!
//! - nobody gets a lock. From the end of the master to the first grant by the next it takes what
//!   Sentinel waits (`down-after-milliseconds`), and 1.5 to 2 s more for it to choose and to tell; a
//!   master that stands still instead of being gone costs 1 to 2 s more (the time-outs). If the
//!   Sentinels do not agree at once, it is twice `failover-timeout` later that they try again.
//! - whoever holds a lock that was replicated keeps it, if its ttl is longer than the failover takes:
//!   with the default of 30 s for `down-after-milliseconds`, a ttl of a minute.
//! - a lock that was not replicated yet, taken in the last milliseconds before, is lost. Its holder
//!   is told, at its next renewal, when it gives it back, or when its time is over. Until then there
//!   may be a second holder, whose fencing token is higher. (Whoever gives it back to another caller
//!   of the same process before anybody has noticed is not told; that one is.)
//!
//! A master that is replaced while it is alive, by hand or because Sentinel alone could not reach it,
//! goes on giving locks to whoever has not heard of it yet: for milliseconds, and to clients that
//! cannot reach any Sentinel for as long as Sentinel cannot reach it. Such a lock may be taken and
//! given back with nobody being told that another had it too. To rule that out, have at least three
//! servers, with `min-replicas-to-write 1`: a master that has been replaced has no replicas, and
//! refuses.
//!
//! The user of the servers takes `+role` too, or a replica is found out at the first write. For that of
//! the Sentinels this is enough; without `subscribe` and `ping` it does not hear of failovers:
//!
//! ```text
#![doc = include_str!("acl_sentinel.txt")]
//! ```
//!
//! # Cluster
//!
//! [`RedisStorage::cluster`] keeps each lock in the node that has the slot of its name; a lock's
//! queue is in the same slot. Fencing counters are one for each slot that is in use,
//! `{prefix:N}:fence`, where `N` is the lowest number that brings it there: tokens grow for each
//! lock, not over all of them. Counters move with their slots, and are raised to the server's clock
//! by each acquire.
//!
//! There is one connection to each node for commands, and one to each master for wake-ups. Where we
//! do not listen at a master, a release there passes us over, and we ask after an `interval`. As a
//! message may come from a node that does not know yet that it has lost its slots, a lock that is
//! given by a message is confirmed by a round trip before it is used.
//!
//! What nodes say of where a slot is (`MOVED`, `ASK`) is followed; `TRYAGAIN` and `CLUSTERDOWN` are
//! waited out for up to 500 ms, and then an error of the kind
//! [`Unavailable`](crate::error::StorageErrorKind::Unavailable): callers ask again in their own
//! time.
//!
//! - While a slot is moving, Redis refuses commands about keys that are at two nodes. Locks in that
//!   slot are renewed, and freed if nobody waits for them, but none of them is given until the slot
//!   is at one node: milliseconds, where the slot holds few keys. Callers wait for it as they wait
//!   for a lock. (One that is free is given meanwhile without
//!   [fencing](crate::LockFactoryBuilder::fencing): a token could be made at the new node, but the
//!   counter that is still at the old one could not be moved there any more.)
//! - A failover is as with Sentinel, for the locks of one master. From the end of the master to the
//!   first grant by the next it took `cluster-node-timeout` and 1 to 2 s. A master that is cut off
//!   from the others stops granting after `cluster-node-timeout`. `docs/benchmarks.md` has what
//!   failovers cost in a test.
//!
//! The user takes two commands more, on all nodes:
//!
//! ```text
#![doc = include_str!("acl_cluster.txt")]
//! ```
//!
//! # Credentials, certificates and replicas of several servers
//!
//! With Sentinel, [`username`](RedisStorageBuilder::username) and
//! [`password`](RedisStorageBuilder::password) are the servers'; each Sentinel has those of its own
//! URL. With Cluster they are those of all nodes. What they leave open is as in the first URL, and so
//! is TLS: if that begins with `rediss://`, so does the way to every server, and certificates have to
//! be valid for the hosts that Sentinel or the cluster names (Redis: `sentinel announce-hostnames`,
//! `tls-replication`, `tls-cluster`).
//!
//! [`replicas`](RedisStorageBuilder::replicas) are those of the master, and in a Cluster those of the
//! node that has the lock.
//!
//! # A pool of your own
//!
//! [`RedisStorage::from_pool`] takes a `bb8::Pool<RedisConnectionManager>` of `bb8-redis`, which is
//! re-exported here as [`bb8_redis`]. Its manager makes one connection for the locks, beside those
//! of the pool: a connection that is lent to others too would carry their `SELECT`, `MULTI` and
//! `BLPOP`. So the pool may be as small as you like, and nothing of it is used up.
//!
//! The stock manager makes connections that cannot receive messages and do not tell of their end.
//! So, other than over a URL,
//!
//! - there are no wake-ups and no queue: waiters of other processes ask every `interval`, or when
//!   the holder's ttl is over, and who of them is first is left to luck;
//! - who [looks at the locks](crate::inspect) from here hears no answer of other processes, and sees
//!   what the server knows; others see of this process's locks that it does not answer;
//! - a connection that the server has closed while nobody used it costs the next caller an error,
//!   if it does not wait; one that waits asks again;
//! - an answer that takes longer than redis-rs's 500 ms is given up, whatever the
//!   [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout).
//!
//! One warning says so, when the storage is made. One holder at a time, fencing tokens, renewal,
//! and that nothing is left behind: all that is as over a URL.

mod address;
mod builder;
mod calls;
mod cluster;
mod cluster_inbox;
mod cluster_map;
mod cluster_way;
mod connection;
mod connector;
mod durability;
mod error;
mod fencing;
mod frame;
mod health;
mod inbox;
mod names;
mod own_pool;
mod pipe;
mod pool;
mod probe;
#[cfg(any(test, tower_distributed_lock_fuzzing))]
pub(crate) mod promises;
mod replies;
mod script;
mod sentinel;
mod slot;
mod stream;
mod survey;
#[cfg(feature = "tls")]
mod tls;
mod topology;
mod wire;

use std::{fmt, sync::Arc};

pub use bb8_redis;
use bb8_redis::{RedisConnectionManager, bb8::Pool};
use futures_util::future::join_all;

pub use self::builder::RedisStorageBuilder;
use self::{
    builder::Target, connection::Connection, connector::Connector, durability::Replicas,
    fencing::Seen, own_pool::OwnPool, topology::Servers,
};
use crate::{
    error::StorageError,
    key::LockName,
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockRecord, LockStorage, RaiseReply, RaiseRequest,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Survey, SurveyRequest,
    },
};

/// Locks in Redis. See the [module documentation](self).
///
/// ```no_run
/// use tower_distributed_lock::{LockFactory, storage::RedisStorage};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let storage = RedisStorage::connect("redis://127.0.0.1:6379").await?;
/// let factory = LockFactory::new(storage);
/// # Ok(())
/// # }
/// ```
pub struct RedisStorage {
    servers: Servers,
    fencing: Arc<Seen>,
}

impl RedisStorage {
    /// Connects to the server at `url`: `redis://[user[:password]@]host[:port][/db]`, or another
    /// of the [forms](self#where-the-server-is) that a URL can have.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL cannot be read, the server cannot be reached within 1 s, or it
    /// does not accept us. To start without a server, see [`RedisStorageBuilder::connect_lazily`].
    ///
    /// # Cancel safety
    ///
    /// Can be dropped at any time. Nothing is asked of the server yet but who it is and how it is set up.
    pub async fn connect(url: impl Into<String>) -> Result<Self, StorageError> {
        Self::builder(url).connect().await
    }

    /// Waits until it is connected, or cannot be.
    pub(crate) async fn connected(&self) -> Result<(), StorageError> {
        self.servers.connect().await
    }

    /// A storage with settings of your own: see [`RedisStorageBuilder`].
    pub fn builder(url: impl Into<String>) -> RedisStorageBuilder {
        RedisStorageBuilder::to(Target::Server(url.into()))
    }

    /// A storage in the servers that Redis Sentinel watches under the name `service`. Locks are in
    /// the one that is the master; after a failover in the next. See
    /// [Sentinel](self#sentinel) for what a failover means for locks.
    ///
    /// `urls` are those of the Sentinels, `redis://host:26379`, one for each; not all of them have
    /// to be reachable. The user, the password and the database of the first URL are those of the
    /// servers too, unless [`RedisStorageBuilder::username`] and
    /// [`RedisStorageBuilder::password`] say otherwise.
    ///
    /// ```no_run
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let sentinels = ["redis://10.0.0.1:26379", "redis://10.0.0.2:26379", "redis://10.0.0.3:26379"];
    /// let storage = RedisStorage::sentinel("mymaster", sentinels).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn sentinel(
        service: impl Into<String>,
        urls: impl IntoIterator<Item = impl Into<String>>,
    ) -> RedisStorageBuilder {
        RedisStorageBuilder::to(Target::Sentinel {
            service: service.into(),
            urls: urls.into_iter().map(Into::into).collect(),
        })
    }

    /// A storage in a Redis Cluster. Each lock is in the node that has its slot; see
    /// [Cluster](self#cluster) for what a failover and a moving slot mean for locks.
    ///
    /// `urls` are those of some of its nodes, `redis://host:6379`: not all of them have to be named,
    /// nor be reachable. The user and the password of the first URL are those of all nodes.
    ///
    /// ```no_run
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let nodes = ["redis://10.0.0.1:6379", "redis://10.0.0.2:6379", "redis://10.0.0.3:6379"];
    /// let storage = RedisStorage::cluster(nodes).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cluster(urls: impl IntoIterator<Item = impl Into<String>>) -> RedisStorageBuilder {
        RedisStorageBuilder::to(Target::Cluster(urls.into_iter().map(Into::into).collect()))
    }

    /// The server that a pool of your own connects to. What this cannot do that a URL can, is said
    /// in the [module documentation](self#a-pool-of-your-own); it is logged once, here.
    ///
    /// Connects when the first lock is wanted, and takes nothing from the pool.
    ///
    /// ```no_run
    /// use tower_distributed_lock::storage::{RedisStorage, redis::bb8_redis};
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let manager = bb8_redis::RedisConnectionManager::new("redis://127.0.0.1:6379")?;
    /// let pool = bb8_redis::bb8::Pool::builder().build(manager).await?;
    ///
    /// let storage = RedisStorage::from_pool(pool.clone());
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_pool(pool: Pool<RedisConnectionManager>) -> Self {
        Self::over(
            Connector::to_own_pool(OwnPool::new(pool)).with_probe(true),
            None,
        )
    }

    fn over(connector: Connector, replicas: Option<Replicas>) -> Self {
        Self::on(Servers::One(Box::new(Connection::new(connector, replicas))))
    }

    fn on(servers: Servers) -> Self {
        Self {
            servers,
            fencing: Arc::default(),
        }
    }
}

impl fmt::Debug for RedisStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStorage")
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}
impl LockStorage for RedisStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let token = request.token.text();
        let mut way = self.servers.way(&request.name);
        loop {
            let line = way.line().await?;
            let result = self.acquire_over(&line, request, &token).await;
            // Asked again with the same token, it is granted again if it was really ours.
            if matches!(result, Ok(AcquireReply::Granted { .. })) && way.has_changed(&line) {
                continue;
            }
            if let Some(result) = way.after(result).await {
                return result;
            }
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        // One for all, or each would try to connect.
        if let Err(error) = self.servers.connect_to_one().await {
            return vec![Err(error); requests.len()];
        }
        // They travel together: the connection packs what is sent at the same time into one write.
        join_all(requests.iter().map(async |request| {
            let token = request.token.text();
            let mut way = self.servers.way(&request.name);
            loop {
                let line = way.line().await?;
                let result = self.renew_over(&line, request, &token).await;
                if result.is_ok() && way.has_changed(&line) {
                    continue;
                }
                if let Some(result) = way.after(result).await {
                    return result;
                }
            }
        }))
        .await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let token = request.token.text();
        let mut way = self.servers.way(&request.name);
        loop {
            let line = way.line().await?;
            let result = self.release_over(&line, request, &token).await;
            if result.is_ok() && line.is_replaced() {
                continue;
            }
            if let Some(result) = way.after(result).await {
                return result;
            }
        }
    }

    async fn listen(&self, inbox: Inbox) {
        self.servers.listen(inbox, &self.fencing).await;
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        let token = request.token.text();
        let mut way = self.servers.way(&request.name);
        loop {
            let line = way.line().await?;
            let result = self.raise_over(&line, request, &token).await;
            if matches!(result, Ok(RaiseReply::Raised)) && way.has_changed(&line) {
                continue;
            }
            if let Some(result) = way.after(result).await {
                return result;
            }
        }
    }

    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        self.survey_all(request).await
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.look_for(name).await
    }

    async fn force_release(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        let mut way = self.servers.way(&seen.name);
        let mut was_done = None;
        loop {
            let line = way.line().await?;
            let mut result = self.force_over(&line, seen).await;
            // The server that took its place may have known of it, and then finds nothing to do.
            match &mut result {
                Ok(ReleaseReply::NotOurs) => result = Ok(was_done.unwrap_or(ReleaseReply::NotOurs)),
                Ok(reply) => was_done = Some(*reply),
                Err(_) => {}
            }
            if result.is_ok() && line.is_replaced() {
                continue;
            }
            if let Some(result) = way.after(result).await {
                return result;
            }
        }
    }

    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        self.tell_inbox(prefix, inbox, text).await
    }
}
