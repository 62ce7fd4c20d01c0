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
//! process in one round trip, in order, and wakes exactly one. A denied acquire also tells the
//! holder that it is wanted.
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
//! # What the server has to be
//!
//! Redis 6 or later, or Valkey. Redis from 2.6.12 to 5 works too: waiters poll, and
//! [fencing](crate::LockFactoryBuilder::fencing) has to be switched off. The user needs
//!
//! - `SET`, `GET`, `MGET`, `APPEND`, `PTTL`, `PEXPIRE`, `DEL`, `INCRBY`, `TIME`, `EVAL`, `EVALSHA` on
//!   the keys `prefix:*` and `{prefix:*`,
//! - `PUBLISH`, `SUBSCRIBE` and `PING` on the channels `prefix:inbox:*`; without these, waiters
//!   poll,
//! - `INFO`, to tell one run of the server from another; without it, a lock that is given by a
//!   message is confirmed by a round trip before it is used.
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

mod batch;
mod cluster;
mod cluster_inbox;
mod connection;
mod error;
mod fencing;
mod health;
mod inbox;
mod names;
mod script;
mod sentinel;
mod slot;
mod topology;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::join_all;
use redis::{Cmd, ConnectionInfo, Value};

use self::{
    cluster::Cluster,
    connection::{Connection, Connector, Fact, Server, Wire, parse_url},
    error::{unexpected, value},
    fencing::Seen,
    script::{ACQUIRE, FREE, RELEASE, RENEW},
    sentinel::Sentinels,
    topology::{Line, Servers},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockStorage, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest, Stamp,
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
    /// Connects to the server at `url`: `redis://[user[:password]@]host[:port][/db]`.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL cannot be read, the server cannot be reached within 1 s, or it
    /// does not accept us. To start without a server, see [`RedisStorageBuilder::connect_lazily`].
    pub async fn connect(url: impl Into<String>) -> Result<Self, StorageError> {
        Self::builder(url).connect().await
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
    /// servers too; see [`RedisStorageBuilder::server_credentials`].
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
}

impl fmt::Debug for RedisStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStorage")
            .field("servers", &self.servers)
            .finish()
    }
}

/// Sets up a [`RedisStorage`]; made by [`RedisStorage::builder`], [`RedisStorage::sentinel`] and
/// [`RedisStorage::cluster`].
#[must_use]
pub struct RedisStorageBuilder {
    target: Target,
    connect_timeout: Duration,
    server_credentials: Option<(String, String)>,
}

/// Where the locks are.
enum Target {
    Server(String),
    Sentinel { service: String, urls: Vec<String> },
    Cluster(Vec<String>),
}

impl RedisStorageBuilder {
    fn to(target: Target) -> Self {
        Self {
            target,
            connect_timeout: Duration::from_secs(1),
            server_credentials: None,
        }
    }

    /// The user and the password of the Redis servers, where they are not those of the URL: with
    /// Sentinel, the URLs lead to the Sentinels, which have users and passwords of their own. Where
    /// there is a password only, the user is `default`.
    pub fn server_credentials(
        mut self,
        username: impl Into<String>,
        password: impl Into<String>,
    ) -> Self {
        self.server_credentials = Some((username.into(), password.into()));
        self
    }

    /// How long making a connection may take, handshake included. Default 1 s. With Sentinel,
    /// finding the master may take as long again.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// As [`RedisStorage::connect`].
    pub async fn connect(self) -> Result<RedisStorage, StorageError> {
        let storage = self.connect_lazily()?;
        storage.servers.connect().await?;
        Ok(storage)
    }

    /// Connects when the first lock is wanted, so that a service can start while its Redis is away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL cannot be read.
    pub fn connect_lazily(self) -> Result<RedisStorage, StorageError> {
        Ok(RedisStorage {
            servers: self.servers()?,
            fencing: Arc::default(),
        })
    }
}

impl RedisStorageBuilder {
    fn servers(&self) -> Result<Servers, StorageError> {
        let refused = |error| StorageError::with_source(StorageErrorKind::Rejected, error);
        let timeout = self.connect_timeout;
        match &self.target {
            Target::Server(url) => {
                let info = self.as_server(parse_url(url)?);
                let server = Server::new(&info).map_err(refused)?;
                let connector = Connector::to_server(server, timeout);
                Ok(Servers::One(Box::new(Connection::new(connector))))
            }
            Target::Sentinel { service, urls } => {
                let (urls, template) = self.parse_urls(urls)?;
                let sentinels = Sentinels::new(service.clone(), urls, template).map_err(refused)?;
                let connector = Connector::to_master(sentinels, timeout);
                Ok(Servers::One(Box::new(Connection::new(connector))))
            }
            Target::Cluster(urls) => {
                let (urls, template) = self.parse_urls(urls)?;
                let cluster = Cluster::new(&urls, template, timeout)?;
                Ok(Servers::Cluster(Arc::new(cluster)))
            }
        }
    }

    /// The URLs, and the first of them as a server's.
    fn parse_urls(
        &self,
        urls: &[String],
    ) -> Result<(Vec<ConnectionInfo>, ConnectionInfo), StorageError> {
        let urls = urls.iter().map(|url| parse_url(url));
        let urls: Vec<_> = urls.collect::<Result<_, _>>()?;
        let first = urls.first().cloned().ok_or_else(|| {
            StorageError::with_source(StorageErrorKind::Rejected, "no URL is given")
        })?;
        Ok((urls, self.as_server(first)))
    }

    fn as_server(&self, info: ConnectionInfo) -> ConnectionInfo {
        match &self.server_credentials {
            None => info,
            Some((username, password)) => {
                let settings = info.redis_settings().clone();
                let settings = settings.set_username(username).set_password(password);
                info.set_redis_settings(settings)
            }
        }
    }
}

impl fmt::Debug for RedisStorageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password.
        f.debug_struct("RedisStorageBuilder")
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

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
                self.give_back(line, request, token).await?;
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
                let forget = |wire: &Wire| wire.unlearn(Fact::CounterIsRight);
                line.on_wire(forget).await?;
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
}

impl RedisStorage {
    async fn acquire_over(
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

        let arguments = |command: &mut Cmd, wire: &Wire| {
            let raise = fenced && !wire.knows(Fact::CounterIsRight);
            let seen = if raise { self.fencing.get() as i64 } else { -1 };
            command
                .arg(token)
                .arg(millis(request.ttl))
                .arg(request.fencing)
                .arg(seen);
            if let Some(place) = request.queue {
                command.arg(millis(place));
            }
        };
        let acquired = ACQUIRE.run(line, &request.name, arguments);
        let (values, origin) = match acquired.await {
            Ok((Value::Array(values), origin)) => (values, origin),
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                // By the commands before, the lock may be ours.
                if fenced && !request.again && !error.kind().is_transient() {
                    self.give_back(line, request, token).await?;
                }
                return Err(error);
            }
        };
        if fenced {
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
            Some([time]) => Ok(AcquireReply::held(left(*time))),
            Some([time, seconds, micros]) => {
                let stamp = stamp(origin.clock, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
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
        if request.unwanted {
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
            if let (Some(requeue), Some(token)) = (&request.requeue, &requeue) {
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
}
