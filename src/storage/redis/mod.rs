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
//! A queue has an expiry, and a lost message costs its waiter no more than an `interval`: then it
//! asks.
//!
//! # Fencing
//!
//! Fencing tokens come from one counter, the key `{prefix:}:fence`, which has no expiry; for a
//! Cluster, see [below](self#cluster). A lock that is free is taken, and its token with it, by three
//! plain commands in one write: `SET`, `INCRBY`, and a `GET` that shows that the lock was ours when
//! the token was taken. The counter starts at the server's clock in microseconds, and is raised to it
//! on each new connection, after 2 s without use, and when it is lower than a token seen before. So
//! tokens keep growing after a restart without persistence, a `FLUSHALL` or a failover, as long as
//! the clocks of the servers do not differ by more than the time that the failover takes, and all
//! locks with the prefix together have had fewer than one million holders a second, on average.
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
//! process has chosen for rustls (`CryptoProvider::install_default`); if it has not, when the first
//! storage with TLS is made, that is *ring*, from then on for all of the process.
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
//! Redis 6 or later, or Valkey. Redis from 2.6.12 to 5 works too: waiters poll, and
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
//! [fencing](crate::LockFactoryBuilder::fencing) has to be switched off. Everything else is needed.
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
//! The user of the Sentinels needs `SENTINEL MASTER`, and `SUBSCRIBE` and `PING` to hear of failovers;
//! that of the servers `ROLE`, or a replica is found out at the first write.
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
//! [`Unavailable`](StorageErrorKind::Unavailable): callers ask again in their own time.
//!
//! - While a slot is moving, Redis refuses commands about keys that are at two nodes. Locks in that
//!   slot are renewed, and freed if nobody waits for them, but none of them is given until the slot
//!   is at one node: milliseconds, where the slot holds few keys.
//! - A failover is as with Sentinel, for the locks of one master. From the end of the master to the
//!   first grant by the next it took `cluster-node-timeout` and 1 to 1.6 s. A master that is cut off
//!   from the others stops granting after `cluster-node-timeout`.
//!
//! The user needs `CLUSTER SLOTS` and `ASKING` too.
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
//! - a connection that the server has closed while nobody used it costs the next caller an error,
//!   if it does not wait; one that waits asks again;
//! - an answer that takes longer than redis-rs's 500 ms is given up, whatever the
//!   [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout).
//!
//! One warning says so, when the storage is made. One holder at a time, fencing tokens, renewal,
//! and that nothing is left behind: all that is as over a URL.

mod address;
mod batch;
mod cluster;
mod cluster_inbox;
mod connection;
mod durability;
mod error;
mod fencing;
mod health;
mod inbox;
mod names;
mod own_pool;
mod probe;
mod script;
mod sentinel;
mod slot;
#[cfg(feature = "tls")]
mod tls;
mod topology;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

pub use bb8_redis;
use bb8_redis::{RedisConnectionManager, bb8::Pool};
use futures_util::future::join_all;
use redis::{Cmd, ConnectionInfo, Value};

use self::{
    address::{Address, refused},
    cluster::{Cluster, Setup},
    connection::{Connection, Connector, Fact, Server, Wire},
    durability::Replicas,
    error::{connect_error, unexpected, value},
    fencing::Seen,
    own_pool::OwnPool,
    script::{ACQUIRE, FREE, RAISE, RELEASE, RENEW},
    sentinel::Sentinels,
    topology::{Line, Servers},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    options::LockOptions,
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockStorage, RaiseReply, RaiseRequest,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Stamp,
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
    pub async fn connect(url: impl Into<String>) -> Result<Self, StorageError> {
        Self::builder(url).connect().await
    }

    /// Waits until it is connected, or cannot be.
    pub(crate) async fn connected(&self) -> Result<(), StorageError> {
        self.servers.connect().await
    }

    /// A storage with settings of your own.
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

/// Sets up a [`RedisStorage`]; made by [`RedisStorage::builder`], [`RedisStorage::sentinel`] and
/// [`RedisStorage::cluster`].
///
/// ```no_run
/// # #[cfg(feature = "tls")]
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use tower_distributed_lock::storage::RedisStorage;
///
/// let storage = RedisStorage::builder("rediss://redis.internal:6380")
///     .username("locks")
///     .password(std::env::var("REDIS_PASSWORD")?)
///     .root_certificate(std::fs::read("/etc/redis/ca.pem")?)
///     .replicas(1, Duration::from_millis(200))
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct RedisStorageBuilder {
    target: Target,
    /// Without the URL.
    address: Address,
    connect_timeout: Duration,
    replicas: Option<(u32, Duration)>,
    probe: bool,
}

/// Where the locks are.
#[derive(Clone)]
enum Target {
    Server(String),
    Sentinel { service: String, urls: Vec<String> },
    Cluster(Vec<String>),
}

impl RedisStorageBuilder {
    fn to(target: Target) -> Self {
        Self {
            target,
            address: Address::default(),
            connect_timeout: Duration::from_secs(1),
            replicas: None,
            probe: true,
        }
    }

    /// How long making a connection may take, handshake included. Default 1 s. With Sentinel,
    /// finding the master may take as long again.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The user to log in as, instead of the URL's. Default: the server's own default user.
    ///
    /// With Sentinel, this and the password are the Redis servers': the Sentinels have those that
    /// are in their URLs. What is not given here is for the servers as in the first URL.
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.address.username = Some(username.into());
        self
    }

    /// The password to log in with, instead of the URL's. Nothing in it is encoded.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.address.password = Some(password.into());
        self
    }

    /// Whose certificates are trusted, in PEM: one issuer or several. From then on nobody else's
    /// are. Default: those that the system trusts. For URLs that begin with `rediss://`.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.address.certificates.roots = pem.into();
        self
    }

    /// The certificate to show to a server that asks for one (`tls-auth-clients`), with those of
    /// its issuers, and its private key, both in PEM. Default: none. For URLs that begin with
    /// `rediss://`.
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn client_certificate(
        mut self,
        certificate: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Self {
        self.address.certificates.client = Some((certificate.into(), key.into()));
        self
    }

    /// A lock counts as obtained only when so many replicas have it in their memory too (`WAIT`).
    /// Default 0: when the server has it. `timeout` is from 1 ms to 24 h, and of use only if shorter
    /// than [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout).
    ///
    /// So a failover to one of these replicas forgets no lock. To be sure that it is one of them,
    /// `replicas` has to be all there are; each of them that is away then keeps everybody from
    /// getting a lock: callers that wait ask again until their time is over, others get an error
    /// ([`Unavailable`](StorageErrorKind::Unavailable)), and what was not confirmed is given back.
    /// Locks that are held are not affected.
    ///
    /// What it costs: a lock that comes from the storage takes one more round trip, and that to the
    /// replicas, over connections of their own (up to 16, as many as locks are confirmed at the same
    /// time); so does one that is given by a message, which else takes none. A lock that goes from
    /// waiter to waiter inside this process costs nothing more. `docs/benchmarks.md` has a figure.
    ///
    /// Renewals and releases are not confirmed. So there is one gap left: a server that fails right
    /// after a renewal, before the replica has heard of it, and a holder that does not reach the
    /// new server for two thirds of its ttl, although others do. For the last third that holder
    /// counts on a renewal that was lost. Nor do replicas write to their disks before they answer.
    /// Where that matters, [fence](crate::LockGuard::fencing_token).
    pub fn replicas(mut self, replicas: u32, timeout: Duration) -> Self {
        self.replicas = (replicas > 0).then_some((replicas, timeout));
        self
    }

    /// Whether to look how the server is set up, a moment after the first connection to each run of
    /// it, and to warn (`tracing::warn!`) if it may evict locks or forgets them in a restart.
    /// Default `true`. It asks for `INFO`, and for `CONFIG GET save` if there is no append-only
    /// file; a user that may not do that is not warned, but shows in the server's `ACL LOG`.
    pub fn probe(mut self, probe: bool) -> Self {
        self.probe = probe;
        self
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// As [`RedisStorage::connect`], and as [`RedisStorageBuilder::connect_lazily`].
    pub async fn connect(self) -> Result<RedisStorage, StorageError> {
        let storage = self.connect_lazily()?;
        storage.connected().await?;
        Ok(storage)
    }

    /// Connects when the first lock is wanted, so that a service can start while its Redis is away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL or a certificate cannot be read, or a setting is out of its
    /// range.
    pub fn connect_lazily(self) -> Result<RedisStorage, StorageError> {
        let replicas = self.wanted_replicas()?;
        let (timeout, probe) = (self.connect_timeout, self.probe);
        match &self.target {
            Target::Server(url) => {
                let server = Server::new(&self.at(url).read()?).map_err(connect_error)?;
                let connector = Connector::to_server(server, timeout).with_probe(probe);
                Ok(RedisStorage::over(connector, replicas))
            }
            Target::Sentinel { service, urls } => {
                let (urls, template) = self.read_urls(urls, Self::at_sentinel)?;
                let sentinels =
                    Sentinels::new(service.clone(), urls, template).map_err(connect_error)?;
                let connector = Connector::to_master(sentinels, timeout).with_probe(probe);
                Ok(RedisStorage::over(connector, replicas))
            }
            Target::Cluster(urls) => {
                let (urls, template) = self.read_urls(urls, Self::at)?;
                let setup = Setup {
                    connect_timeout: timeout,
                    probe,
                    replicas,
                };
                let cluster = Cluster::new(&urls, template, setup)?;
                Ok(RedisStorage::on(Servers::Cluster(Arc::new(cluster))))
            }
        }
    }

    fn wanted_replicas(&self) -> Result<Option<Replicas>, StorageError> {
        let Some((count, timeout)) = self.replicas else {
            return Ok(None);
        };
        if millis(timeout) == 0 || timeout > LockOptions::MAX_DURATION {
            return Err(refused(
                "the time-out for replicas is not from 1 ms to 24 h",
            ));
        }
        Ok(Some(Replicas { count, timeout }))
    }

    /// The servers' address, where it is at `url`.
    fn at(&self, url: &str) -> Address {
        Address {
            url: url.to_owned(),
            ..self.address.clone()
        }
    }

    /// That of a Sentinel, which has a user and a password of its own.
    fn at_sentinel(&self, url: &str) -> Address {
        Address {
            username: None,
            password: None,
            ..self.at(url)
        }
    }

    /// The URLs, and the first of them as a server's.
    fn read_urls(
        &self,
        urls: &[String],
        at: impl Fn(&Self, &str) -> Address,
    ) -> Result<(Vec<ConnectionInfo>, ConnectionInfo), StorageError> {
        let first = urls.first().ok_or_else(|| refused("no URL is given"))?;
        let template = self.at(first).read()?;
        let urls = urls.iter().map(|url| at(self, url).read());
        Ok((urls.collect::<Result<_, _>>()?, template))
    }
}

impl fmt::Debug for RedisStorageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address may hold a password.
        f.debug_struct("RedisStorageBuilder")
            .field("connect_timeout", &self.connect_timeout)
            .field("replicas", &self.replicas)
            .field("probe", &self.probe)
            .finish_non_exhaustive()
    }
}

/// What the release script takes for a release that tells nobody.
const QUIET: &str = "quiet";

fn millis(duration: Duration) -> u64 {
    // Options are bounded to 24 h.
    duration.as_millis() as u64
}

fn set_if_free(request: &AcquireRequest, token: &[u8]) -> Cmd {
    let name = request.name.as_str();
    let mut command = Cmd::with_capacity(6, name.len() + 96);
    command
        .arg("SET")
        .arg(name)
        .arg(token)
        .arg("NX")
        .arg("PX")
        .arg(millis(request.ttl));
    command
}

/// The numbers of a reply, such as the time left and the server's time.
fn numbers(values: &[Value]) -> Option<Vec<i64>> {
    let number = |value: &Value| match value {
        Value::Int(number) => Some(*number),
        Value::BulkString(text) => str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    };
    values.iter().map(number).collect()
}

/// How long a holder has left. Negative: its key never expires.
fn left(millis: i64) -> Option<Duration> {
    u64::try_from(millis).ok().map(Duration::from_millis)
}

fn granted(wanted: bool) -> AcquireReply {
    match wanted {
        true => AcquireReply::granted_and_wanted(),
        false => AcquireReply::granted(),
    }
}

/// The server's time, as `TIME` gives it.
fn stamp(run: Option<u128>, seconds: i64, micros: i64) -> Stamp {
    let at =
        Duration::from_secs(seconds.unsigned_abs()) + Duration::from_micros(micros.unsigned_abs());
    Stamp { run, at }
}

impl RedisStorage {
    /// Takes the lock if it is free, together with its fencing tokens, by plain commands in one
    /// write. `None` if a script has to look.
    ///
    /// The last command sees to it that the lock was ours when the tokens were taken, whatever came
    /// between: a token that was taken before the lock, or after it had run out, could be lower than
    /// that of an earlier holder, or higher than that of a later one.
    async fn take_fenced(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<Option<AcquireReply>, StorageError> {
        let take = |wire: &Wire| {
            wire.knows(Fact::CounterIsRight).then(|| {
                let name = request.name.as_str();
                let mut take = Cmd::with_capacity(3, name.len() + 32);
                take.arg("INCRBY")
                    .arg(fencing::counter(&request.name))
                    .arg(request.fencing);
                let mut look = Cmd::with_capacity(3, 2 * name.len() + 16);
                look.arg("MGET").arg(name).arg(names::queue(&request.name));
                let reply = wire.run([set_if_free(request, token), take, look]);
                (reply, wire.origin())
            })
        };
        let seen = self.fencing.get();
        let Some((replies, origin)) = line.on_wire(take).await? else {
            return Ok(None);
        };
        let Value::Array(replies) = replies.await? else {
            return Err(unexpected());
        };
        let Ok([set, last, found]) = <[_; 3]>::try_from(replies) else {
            return Err(unexpected());
        };
        match value(set)? {
            Value::Okay => {}
            Value::Nil => return Ok(None),
            _ => return Err(unexpected()),
        }
        let (last, found) = match (value(last), value(found)) {
            (Ok(Value::Int(last)), Ok(Value::Array(found))) => (last, found),
            (Ok(_), Ok(_)) => return Err(unexpected()),
            (Err(error), _) | (_, Err(error)) => {
                // A lock without its tokens is not what was asked for.
                Box::pin(self.give_back(line, request, token)).await?;
                return Err(error.into());
            }
        };
        let (owner, is_wanted) = match &found[..] {
            [Value::BulkString(owner), queue] => (owner, *queue != Value::Nil),
            // It is gone already.
            [Value::Nil, _] => return Ok(None),
            _ => return Err(unexpected()),
        };
        // Others may have come to wait for it meanwhile, and have marked it.
        let is_ours = owner.strip_suffix(b"!").unwrap_or(owner) == token;
        let first = last.saturating_sub(i64::from(request.fencing) - 1);
        match fencing::block(first, request.fencing) {
            Some(block) if block.first > seen && is_ours => {
                self.fencing.update(block);
                line.learn(origin, Fact::CounterIsRight);
                let granted = granted(is_wanted);
                Ok(Some(granted.with_fencing(Some(block))))
            }
            _ => {
                // The counter went back, or somebody else has the lock already.
                line.unlearn(Fact::CounterIsRight);
                Ok(None)
            }
        }
    }

    /// Frees what an attempt took before it failed: its error says that it was not carried out. If
    /// that fails too, nobody knows.
    async fn give_back(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<(), StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token);
        };
        let given_back = RELEASE.run(line, &request.name, arguments);
        match given_back.await {
            Ok(_) => Ok(()),
            Err(error) if error.kind().is_transient() => Err(error),
            Err(error) => Err(StorageError::with_source(
                StorageErrorKind::Unavailable,
                error,
            )),
        }
    }

    /// Takes the lock if it is free, and asks for it otherwise.
    async fn take(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<AcquireReply, StorageError> {
        let fenced = request.fencing > 0;
        if !request.again && !fenced {
            let set = set_if_free(request, token);
            let reply = line.on_wire(|wire| wire.run([set])).await?;
            match reply.await? {
                Value::Okay => return Ok(AcquireReply::granted()),
                Value::Nil => {}
                _ => return Err(unexpected()),
            }
        } else if !request.again
            && let Some(reply) = self.take_fenced(line, request, token).await?
        {
            return Ok(reply);
        }

        let has_raised = AtomicBool::new(false);
        let arguments = |command: &mut Cmd, wire: &Wire| {
            let raise = fenced && !wire.knows(Fact::CounterIsRight);
            has_raised.store(raise, Relaxed);
            let seen = if raise { self.fencing.get() as i64 } else { -1 };
            command
                .arg(token)
                .arg(millis(request.ttl))
                .arg(request.fencing)
                .arg(seen)
                .arg(u8::from(request.repeated));
            match (request.queue, request.hint) {
                (Some(place), _) => {
                    command.arg(millis(place));
                }
                (None, Some(hint)) => {
                    command.arg(millis(hint)).arg("hint");
                }
                (None, None) => {}
            }
        };
        let acquired = ACQUIRE.run(line, &request.name, arguments);
        let (values, origin) = match Box::pin(acquired).await {
            Ok((Value::Array(values), origin)) => (values, origin),
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                // By the commands before, the lock may be ours.
                if fenced && !request.again && !error.kind().is_transient() {
                    Box::pin(self.give_back(line, request, token)).await?;
                }
                return Err(error);
            }
        };
        if has_raised.load(Relaxed) {
            line.learn(origin, Fact::CounterIsRight);
        }
        if let [
            Value::BulkString(owner),
            Value::Int(wanted),
            Value::Int(first),
        ] = &values[..]
            && owner[..] == *token
        {
            let block = fencing::block(*first, request.fencing);
            block.iter().for_each(|block| self.fencing.update(*block));
            return Ok(granted(*wanted > 0).with_fencing(block));
        }
        match numbers(&values).as_deref() {
            Some([]) => Ok(AcquireReply::Unknown),
            Some([time]) => Ok(AcquireReply::held(left(*time))),
            Some([time, seconds, micros]) => {
                let stamp = stamp(origin.clock, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
    }

    async fn acquire_over(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<AcquireReply, StorageError> {
        let reply = self.take(line, request, token).await?;
        if matches!(reply, AcquireReply::Granted { .. })
            && line.is_confirmed()
            // In a box, as is all that is seldom needed: or every call's future would be as large.
            && let Err(error) = Box::pin(line.confirm(request)).await
        {
            if !error.kind().is_transient() {
                // Nobody will ask for it again.
                Box::pin(self.give_back(line, request, token)).await?;
            }
            return Err(error);
        }
        Ok(reply)
    }

    async fn renew_over(
        &self,
        line: &Line<'_>,
        request: &RenewRequest,
        token: &[u8],
    ) -> Result<RenewReply, StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token).arg(millis(request.ttl));
        };
        let renewed = RENEW.run(line, &request.name, arguments);
        match renewed.await.map(|(value, _)| value) {
            Ok(Value::Int(0)) => Ok(RenewReply::NotOurs),
            Ok(Value::Int(1)) => Ok(RenewReply::Renewed),
            Ok(Value::Int(2)) => Ok(RenewReply::RenewedAndWanted),
            Ok(_) => Err(unexpected()),
            Err(error) if error.kind() == StorageErrorKind::WrongType => Ok(RenewReply::NotOurs),
            Err(error) => Err(error),
        }
    }

    async fn release_over(
        &self,
        line: &Line<'_>,
        request: &ReleaseRequest,
        token: &[u8],
    ) -> Result<ReleaseReply, StorageError> {
        if request.unwanted && !request.quiet {
            let arguments = |command: &mut Cmd, _: &Wire| {
                command.arg(token);
            };
            let freed = FREE.run(line, &request.name, arguments).await;
            match freed.map(|(value, _)| value) {
                Ok(Value::Int(0)) => return Ok(ReleaseReply::NotOurs),
                Ok(Value::Int(1)) => return Ok(ReleaseReply::Released),
                // Somebody has come to wait meanwhile.
                Ok(Value::Int(2)) => {}
                Ok(_) => return Err(unexpected()),
                Err(error) if error.kind() == StorageErrorKind::WrongType => {
                    return Ok(ReleaseReply::NotOurs);
                }
                Err(error) => return Err(error),
            }
        }

        let requeue = request.requeue.map(|requeue| requeue.token.text());
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token);
            if request.quiet {
                command.arg(QUIET);
            } else if let (Some(requeue), Some(token)) = (&request.requeue, &requeue) {
                command
                    .arg(&**token)
                    .arg(millis(requeue.ttl))
                    .arg(requeue.fencing)
                    .arg(millis(requeue.place));
            }
        };
        let released = RELEASE.run(line, &request.name, arguments);
        let (reply, origin) = released.await?;
        match reply {
            Value::Int(0) => Ok(ReleaseReply::NotOurs),
            Value::Int(1) => Ok(ReleaseReply::Released),
            Value::Array(values) => match numbers(&values).as_deref() {
                Some([ttl, seconds, micros]) => Ok(ReleaseReply::Requeued {
                    ttl: left(*ttl).unwrap_or_default(),
                    stamp: stamp(origin.clock, *seconds, *micros),
                }),
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    async fn raise_over(
        &self,
        line: &Line<'_>,
        request: &RaiseRequest,
        token: &[u8],
    ) -> Result<RaiseReply, StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token).arg(request.above);
        };
        let raised = RAISE.run(line, &request.name, arguments).await?;
        match raised.0 {
            Value::Int(0) => Ok(RaiseReply::NotOurs),
            Value::Int(1) => {
                // A counter that falls back below this was lost.
                self.fencing.update(FencingBlock {
                    first: request.above,
                    count: 1,
                });
                Ok(RaiseReply::Raised)
            }
            _ => Err(unexpected()),
        }
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
}
