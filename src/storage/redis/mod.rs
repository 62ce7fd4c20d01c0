//! Locks in one Redis server.
//!
//! A lock is a plain string: its name is `prefix:key`, its value the owner's token, its expiry the
//! ttl. It is taken by `SET name token NX PX ttl`, and renewed and released by scripts that look at
//! the token first, as the Redis documentation has it ("Distributed Locks with Redis"). So a client
//! in any language that keeps to the same three steps on the same name excludes us and is excluded.
//!
//! A lock that is free costs one round trip and one plain command. Where `SET` finds it taken, a
//! script asks again: it tells how long the holder has left, and recognises our own token if an
//! earlier reply was lost.
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
//! # What the server has to be
//!
//! Redis 6 or later, or Valkey. With Redis from 2.6.12 on waiters poll, because there is no way to
//! subscribe and ask on one connection. The user needs
//!
//! - `SET`, `GET`, `PTTL`, `PEXPIRE`, `DEL`, `EXISTS`, `LRANGE`, `LINDEX`, `LPOP`, `RPUSH`, `LREM`,
//!   `TIME`, `EVAL`, `EVALSHA` on the keys `prefix:*` and `{prefix:*`,
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

mod connection;
mod error;
mod inbox;
mod script;

use std::{fmt, time::Duration};

use futures_util::future::join_all;
use redis::{Cmd, Value};

use self::{
    connection::{Connection, Failure},
    error::unexpected,
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
        storage.connection.connect().await?;
        Ok(storage)
    }

    /// Connects when the first lock is wanted, so that a service can start while its Redis is away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL cannot be read.
    pub fn connect_lazily(self) -> Result<RedisStorage, StorageError> {
        let connection = Connection::new(&self.url, self.connect_timeout)?;
        Ok(RedisStorage { connection })
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
    let mut command = redis::cmd("SET");
    command
        .arg(request.name.as_str())
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

impl LockStorage for RedisStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let token = request.token.to_text();
        if !request.again {
            match self.connection.run(&set_if_free(request, &token)).await {
                Ok((Value::Okay, _)) => return Ok(AcquireReply::granted()),
                Ok((Value::Nil, _)) => {}
                Ok(_) | Err(Failure::NoScript) => return Err(unexpected()),
                Err(Failure::Storage(error)) => return Err(error),
            }
        }
        let arguments = |command: &mut Cmd| {
            command.arg(&token).arg(millis(request.ttl));
            if let Some(place) = request.queue {
                command.arg(millis(place));
            }
        };
        let reply = ACQUIRE
            .run(&self.connection, &request.name, arguments)
            .await?;
        let Value::Array(values) = reply.value else {
            return Err(unexpected());
        };
        if let [Value::BulkString(owner), Value::Int(wanted)] = &values[..]
            && owner == token.as_bytes()
        {
            return Ok(match wanted {
                0 => AcquireReply::granted(),
                _ => AcquireReply::granted_and_wanted(),
            });
        }
        match numbers(&values).as_deref() {
            Some([time]) => Ok(AcquireReply::held(left(*time))),
            Some([time, seconds, micros]) => {
                let stamp = stamp(reply.run, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        // They travel together: the connection packs what is sent at the same time into one write.
        join_all(requests.iter().map(async |request| {
            let token = request.token.to_text();
            let arguments = |command: &mut Cmd| {
                command.arg(&token).arg(millis(request.ttl));
            };
            match RENEW.run(&self.connection, &request.name, arguments).await {
                Ok(reply) => match reply.value {
                    Value::Int(0) => Ok(RenewReply::NotOurs),
                    Value::Int(1) => Ok(RenewReply::Renewed),
                    Value::Int(2) => Ok(RenewReply::RenewedAndWanted),
                    _ => Err(unexpected()),
                },
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
                    .arg(millis(requeue.place));
            }
        };
        let reply = RELEASE.run(&self.connection, &request.name, arguments);
        let reply = match reply.await {
            Err(error) if error.kind() == StorageErrorKind::WrongType => {
                return Ok(ReleaseReply::NotOurs);
            }
            reply => reply?,
        };
        match reply.value {
            Value::Int(0) => Ok(ReleaseReply::NotOurs),
            Value::Int(1) => Ok(ReleaseReply::Released),
            Value::Array(values) => match numbers(&values).as_deref() {
                Some([ttl, seconds, micros]) => Ok(ReleaseReply::Requeued {
                    ttl: left(*ttl).unwrap_or_default(),
                    stamp: stamp(reply.run, *seconds, *micros),
                }),
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    async fn listen(&self, inbox: Inbox) {
        inbox::listen(self.connection.connector(), inbox).await;
    }
}
