//! Locks in one Redis server.
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
//! Whoever is denied is put into the lock's queue by the same script: a string with one line a
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
//! Fencing tokens come from one counter, the key `{prefix:}:fence`, which has no expiry. A lock that
//! is free is taken, and its token with it, by three plain commands in one write: `SET`, `INCRBY`,
//! and an `MGET` that shows that the lock was ours when the token was taken. The counter starts at the
//! server's clock in microseconds, and is raised to it on each new connection and when it is lower
//! than a token seen before. So tokens keep growing after a restart without persistence, a
//! `FLUSHALL` or a failover, as long as the clocks of the servers do not differ by more than the
//! time that the failover takes, and all locks with the prefix together have had fewer than one
//! million holders a second, on average.
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
#[cfg(feature = "tls")]
mod tls;

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
use redis::{Cmd, Value};

use self::{
    address::{Address, refused},
    connection::{Connection, Connector, Fact, Wire},
    durability::Durability,
    error::{unexpected, value},
    fencing::Seen,
    own_pool::OwnPool,
    script::{ACQUIRE, FREE, RAISE, RELEASE, RENEW},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    options::LockOptions,
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockStorage, RaiseReply, RaiseRequest,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Stamp,
    },
};

/// Locks in one Redis server. See the [module documentation](self).
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
    connection: Connection,
    fencing: Arc<Seen>,
    /// `None`: a grant counts when the server has it.
    durability: Option<Durability>,
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
        self.connection.connect().await.map(drop)
    }

    /// A storage with settings of your own.
    pub fn builder(url: impl Into<String>) -> RedisStorageBuilder {
        RedisStorageBuilder {
            address: Address::new(url.into()),
            connect_timeout: Duration::from_secs(1),
            replicas: None,
            probe: true,
        }
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
        Self::over(Connector::to_own_pool(OwnPool::new(pool)).with_probe(true))
    }

    fn over(connector: Connector) -> Self {
        Self {
            connection: Connection::new(connector),
            fencing: Arc::default(),
            durability: None,
        }
    }
}

impl fmt::Debug for RedisStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStorage")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

/// Sets up a [`RedisStorage`]; made by [`RedisStorage::builder`].
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
    address: Address,
    connect_timeout: Duration,
    replicas: Option<(u32, Duration)>,
    probe: bool,
}

impl RedisStorageBuilder {
    /// How long making a connection may take, handshake included. Default 1 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The user to log in as, instead of the URL's. Default: the server's own default user.
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
        let connector = Connector::to_server(&self.address, self.connect_timeout)?;
        let durability = match self.replicas {
            None => None,
            Some((replicas, timeout)) => {
                if millis(timeout) == 0 || timeout > LockOptions::MAX_DURATION {
                    return Err(refused(
                        "the time-out for replicas is not from 1 ms to 24 h",
                    ));
                }
                Some(Durability::new(replicas, timeout, &connector))
            }
        };
        Ok(RedisStorage {
            durability,
            ..RedisStorage::over(connector.with_probe(self.probe))
        })
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
                wire.run([set_if_free(request, token), take, look])
            })
        };
        let seen = self.fencing.get();
        let Some(replies) = self.connection.on_wire(take).await? else {
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
                self.give_back(request, token).await?;
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
                let granted = granted(is_wanted);
                Ok(Some(granted.with_fencing(Some(block))))
            }
            _ => {
                // The counter went back, or somebody else has the lock already.
                self.connection.unlearn(Fact::CounterIsRight);
                Ok(None)
            }
        }
    }

    /// Frees what an attempt took before it failed: its error says that it was not carried out. If
    /// that fails too, nobody knows.
    async fn give_back(&self, request: &AcquireRequest, token: &[u8]) -> Result<(), StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token);
        };
        let given_back = RELEASE.run(&self.connection, &request.name, arguments);
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
    async fn take(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let token = request.token.text();
        let fenced = request.fencing > 0;
        if !request.again && !fenced {
            let set = set_if_free(request, &token);
            let reply = self.connection.on_wire(|wire| wire.run([set])).await?;
            match reply.await? {
                Value::Okay => return Ok(AcquireReply::granted()),
                Value::Nil => {}
                _ => return Err(unexpected()),
            }
        } else if !request.again
            && let Some(reply) = self.take_fenced(request, &token).await?
        {
            return Ok(reply);
        }

        let has_raised = AtomicBool::new(false);
        let arguments = |command: &mut Cmd, wire: &Wire| {
            let raise = fenced && !wire.knows(Fact::CounterIsRight);
            has_raised.store(raise, Relaxed);
            let seen = if raise { self.fencing.get() as i64 } else { -1 };
            command
                .arg(&*token)
                .arg(millis(request.ttl))
                .arg(request.fencing)
                .arg(seen);
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
        let acquired = ACQUIRE.run(&self.connection, &request.name, arguments);
        let (values, origin) = match acquired.await {
            Ok((Value::Array(values), origin)) => (values, origin),
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                // By the commands before, the lock may be ours.
                if fenced && !request.again && !error.kind().is_transient() {
                    self.give_back(request, &token).await?;
                }
                return Err(error);
            }
        };
        if has_raised.load(Relaxed) {
            self.connection.learn(origin, Fact::CounterIsRight);
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
                let stamp = stamp(origin.server_run, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
    }
}

impl LockStorage for RedisStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let reply = self.take(request).await?;
        if let (Some(durability), AcquireReply::Granted { .. }) = (&self.durability, &reply)
            && let Err(error) = durability.confirm(request).await
        {
            if !error.kind().is_transient() {
                // Nobody will ask for it again.
                self.give_back(request, request.token.text().as_ref())
                    .await?;
            }
            return Err(error);
        }
        Ok(reply)
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        // One for all, or each would try to connect.
        if let Err(error) = self.connection.connect().await {
            return vec![Err(error); requests.len()];
        }
        // They travel together: the connection packs what is sent at the same time into one write.
        join_all(requests.iter().map(async |request| {
            let token = request.token.text();
            let arguments = |command: &mut Cmd, _: &Wire| {
                command.arg(&*token).arg(millis(request.ttl));
            };
            let renewed = RENEW.run(&self.connection, &request.name, arguments);
            match renewed.await.map(|(value, _)| value) {
                Ok(Value::Int(0)) => Ok(RenewReply::NotOurs),
                Ok(Value::Int(1)) => Ok(RenewReply::Renewed),
                Ok(Value::Int(2)) => Ok(RenewReply::RenewedAndWanted),
                Ok(_) => Err(unexpected()),
                Err(error) if error.kind() == StorageErrorKind::WrongType => {
                    Ok(RenewReply::NotOurs)
                }
                Err(error) => Err(error),
            }
        }))
        .await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let token = request.token.text();
        if request.unwanted && !request.quiet {
            let arguments = |command: &mut Cmd, _: &Wire| {
                command.arg(&*token);
            };
            let freed = FREE.run(&self.connection, &request.name, arguments).await;
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
            command.arg(&*token);
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
        let released = RELEASE.run(&self.connection, &request.name, arguments);
        let (reply, origin) = released.await?;
        match reply {
            Value::Int(0) => Ok(ReleaseReply::NotOurs),
            Value::Int(1) => Ok(ReleaseReply::Released),
            Value::Array(values) => match numbers(&values).as_deref() {
                Some([ttl, seconds, micros]) => Ok(ReleaseReply::Requeued {
                    ttl: left(*ttl).unwrap_or_default(),
                    stamp: stamp(origin.server_run, *seconds, *micros),
                }),
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    async fn listen(&self, inbox: Inbox) {
        let connector = self.connection.connector();
        if connector.hears() {
            // A grant that was made by another process has to be confirmed, too.
            let confirm = self.durability.is_some();
            inbox::listen(connector, inbox, &self.fencing, confirm).await;
        }
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        let token = request.token.text();
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(&*token).arg(request.above);
        };
        let raised = RAISE
            .run(&self.connection, &request.name, arguments)
            .await?;
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
