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
//! Fencing tokens come from one counter, the key `{prefix:}:fence`, which has no expiry. A lock that
//! is free is taken, and its token with it, by three plain commands in one write: `SET`, `INCRBY`,
//! and a `GET` that shows that the lock was ours when the token was taken. The counter starts at the
//! server's clock in microseconds, and is raised to it on each new connection and when it is lower
//! than a token seen before. So tokens keep growing after a restart without persistence, a
//! `FLUSHALL` or a failover, as long as the clocks of the servers do not differ by more than the
//! time that the failover takes, and all locks with the prefix together have had fewer than one
//! million holders a second, on average.
//!
//! # What the server has to be
//!
//! Redis 6 or later, or Valkey. Redis from 2.6.12 to 5 works too: waiters poll, and
//! [fencing](crate::LockFactoryBuilder::fencing) has to be switched off. The user needs
//!
//! - `SET`, `GET`, `PTTL`, `PEXPIRE`, `DEL`, `EXISTS`, `LRANGE`, `LINDEX`, `LPOP`, `RPUSH`, `LREM`,
//!   `INCRBY`, `TIME`, `EVAL`, `EVALSHA` on the keys `prefix:*` and `{prefix:*`,
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

mod batch;
mod connection;
mod error;
mod fencing;
mod inbox;
mod script;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::join_all;
use redis::{Cmd, Value};

use self::{
    connection::{Connection, Fact, Wire},
    error::unexpected,
    fencing::Seen,
    script::{ACQUIRE, RELEASE, RENEW},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockStorage, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest, Stamp,
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
        RedisStorageBuilder {
            url: url.into(),
            connect_timeout: Duration::from_secs(1),
        }
    }
}

impl fmt::Debug for RedisStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStorage")
            .field("connection", &self.connection)
            .finish()
    }
}

/// Sets up a [`RedisStorage`]; made by [`RedisStorage::builder`].
#[must_use]
pub struct RedisStorageBuilder {
    url: String,
    connect_timeout: Duration,
}

impl RedisStorageBuilder {
    /// How long making a connection may take, handshake included. Default 1 s.
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
        storage.connection.wire().await?;
        Ok(storage)
    }

    /// Connects when the first lock is wanted, so that a service can start while its Redis is away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL cannot be read.
    pub fn connect_lazily(self) -> Result<RedisStorage, StorageError> {
        let connection = Connection::new(&self.url, self.connect_timeout)?;
        Ok(RedisStorage {
            connection,
            fencing: Arc::default(),
        })
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

fn set_if_free(request: &AcquireRequest, token: &str) -> Cmd {
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

/// The server's time, as `TIME` gives it.
fn stamp(run: Option<u128>, seconds: i64, micros: i64) -> Stamp {
    let at =
        Duration::from_secs(seconds.unsigned_abs()) + Duration::from_micros(micros.unsigned_abs());
    Stamp { run, at }
}

/// Frees what an attempt took before it failed: its error says that it was not carried out. If that
/// fails too, nobody knows.
async fn give_back(wire: &Wire, request: &AcquireRequest, token: &str) -> Result<(), StorageError> {
    let arguments = |command: &mut Cmd| {
        command.arg(token);
    };
    match RELEASE.run(wire, &request.name, arguments).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind().is_transient() => Err(error),
        Err(error) => Err(StorageError::with_source(
            StorageErrorKind::Unavailable,
            error,
        )),
    }
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
        wire: &Wire,
        request: &AcquireRequest,
        token: &str,
    ) -> Result<Option<AcquireReply>, StorageError> {
        let seen = self.fencing.get();
        let name = request.name.as_str();
        let mut take = Cmd::with_capacity(3, name.len() + 32);
        take.arg("INCRBY")
            .arg(fencing::counter(&request.name))
            .arg(request.fencing);
        let mut look = Cmd::with_capacity(2, name.len() + 8);
        look.arg("GET").arg(name);
        let replies = wire.run_all(set_if_free(request, token), vec![take, look]);
        let Value::Array(replies) = replies.await? else {
            return Err(unexpected());
        };
        let Ok([set, last, owner]) = <[_; 3]>::try_from(replies) else {
            return Err(unexpected());
        };
        let [set, last, owner] = [set, last, owner].map(|reply| wire.value(reply));
        match set? {
            Value::Okay => {}
            Value::Nil => return Ok(None),
            _ => return Err(unexpected()),
        }
        let (last, owner) = match (last, owner) {
            (Ok(Value::Int(last)), Ok(Value::BulkString(owner))) => (last, owner),
            // It is gone already.
            (Ok(_), Ok(Value::Nil)) => return Ok(None),
            (Ok(_), Ok(_)) => return Err(unexpected()),
            (Err(error), _) | (_, Err(error)) => {
                // A lock without its tokens is not what was asked for.
                give_back(wire, request, token).await?;
                return Err(error.into());
            }
        };
        let first = last.saturating_sub(i64::from(request.fencing) - 1);
        match fencing::block(first, request.fencing) {
            Some(block) if block.first > seen && owner == token.as_bytes() => {
                self.fencing.update(block);
                Ok(Some(AcquireReply::granted().with_fencing(Some(block))))
            }
            _ => {
                // The counter went back, or somebody else has the lock already.
                wire.unlearn(Fact::CounterIsRight);
                Ok(None)
            }
        }
    }
}

impl LockStorage for RedisStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let token = request.token.to_text();
        let wire = self.connection.wire().await?;
        let fenced = request.fencing > 0;
        let mut may_be_taken = false;
        if !request.again && !fenced {
            match wire.run(set_if_free(request, &token)).await? {
                Value::Okay => return Ok(AcquireReply::granted()),
                Value::Nil => {}
                _ => return Err(unexpected()),
            }
        } else if !request.again && wire.knows(Fact::CounterIsRight) {
            if let Some(reply) = self.take_fenced(&wire, request, &token).await? {
                return Ok(reply);
            }
            may_be_taken = true;
        }

        let raise = fenced && !wire.knows(Fact::CounterIsRight);
        let seen = if raise { self.fencing.get() as i64 } else { -1 };
        let arguments = |command: &mut Cmd| {
            command
                .arg(&token)
                .arg(millis(request.ttl))
                .arg(request.fencing)
                .arg(seen);
            if let Some(place) = request.queue {
                command.arg(millis(place));
            }
        };
        let values = match ACQUIRE.run(&wire, &request.name, arguments).await {
            Ok(Value::Array(values)) => values,
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                if may_be_taken && !error.kind().is_transient() {
                    give_back(&wire, request, &token).await?;
                }
                return Err(error);
            }
        };
        if raise {
            wire.learn(Fact::CounterIsRight);
        }
        if let [
            Value::BulkString(owner),
            Value::Int(wanted),
            Value::Int(first),
        ] = &values[..]
            && owner == token.as_bytes()
        {
            let block = fencing::block(*first, request.fencing);
            block.iter().for_each(|block| self.fencing.update(*block));
            let granted = match wanted {
                0 => AcquireReply::granted(),
                _ => AcquireReply::granted_and_wanted(),
            };
            return Ok(granted.with_fencing(block));
        }
        match numbers(&values).as_deref() {
            Some([time]) => Ok(AcquireReply::held(left(*time))),
            Some([time, seconds, micros]) => {
                let stamp = stamp(wire.server_run, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let wire = match self.connection.wire().await {
            Ok(wire) => wire,
            Err(error) => return vec![Err(error); requests.len()],
        };
        // They travel together: the connection packs what is sent at the same time into one write.
        join_all(requests.iter().map(async |request| {
            let token = request.token.to_text();
            let arguments = |command: &mut Cmd| {
                command.arg(&token).arg(millis(request.ttl));
            };
            match RENEW.run(&wire, &request.name, arguments).await {
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
        let token = request.token.to_text();
        let requeue = request.requeue.map(|requeue| requeue.token.to_text());
        let arguments = |command: &mut Cmd| {
            command.arg(&token);
            if let (Some(requeue), Some(token)) = (&request.requeue, &requeue) {
                command
                    .arg(token)
                    .arg(millis(requeue.ttl))
                    .arg(requeue.fencing)
                    .arg(millis(requeue.place));
            }
        };
        let wire = self.connection.wire().await?;
        let reply = match RELEASE.run(&wire, &request.name, arguments).await {
            Err(error) if error.kind() == StorageErrorKind::WrongType => {
                return Ok(ReleaseReply::NotOurs);
            }
            reply => reply?,
        };
        match reply {
            Value::Int(0) => Ok(ReleaseReply::NotOurs),
            Value::Int(1) => Ok(ReleaseReply::Released),
            Value::Array(values) => match numbers(&values).as_deref() {
                Some([ttl, seconds, micros]) => Ok(ReleaseReply::Requeued {
                    ttl: left(*ttl).unwrap_or_default(),
                    stamp: stamp(wire.server_run, *seconds, *micros),
                }),
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    async fn listen(&self, inbox: Inbox) {
        inbox::listen(self.connection.connector(), inbox, &self.fencing).await;
    }
}
