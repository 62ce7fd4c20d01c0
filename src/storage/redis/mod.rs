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
//! # What the server has to be
//!
//! Redis 2.6.12 or later, or Valkey. The user needs `SET`, `GET`, `PTTL`, `PEXPIRE`, `DEL`, `EVAL`
//! and `EVALSHA` on `prefix:*`.
//!
//! # What it can lose
//!
//! A lock is as durable as the server's memory: a restart without persistence, an eviction
//! (`maxmemory-policy` other than `noeviction`), `FLUSHALL`, and a failover to a replica that had
//! not heard of it yet, all let a second holder in while the first goes on. The first is told at
//! its next renewal, within a third of its ttl.

mod connection;
mod error;

use std::{fmt, sync::LazyLock, time::Duration};

use futures_util::future::join_all;
use redis::{Cmd, Value};

use self::connection::{Connection, Failure};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::LockName,
    storage::{
        AcquireReply, AcquireRequest, LockStorage, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest,
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

/// A script, and the name by which the server's cache knows it.
struct Script {
    text: &'static str,
    sha: LazyLock<String>,
}

static ACQUIRE: Script = Script {
    text: include_str!("scripts/acquire.lua"),
    sha: LazyLock::new(|| redis::Script::new(ACQUIRE.text).get_hash().into()),
};

static RENEW: Script = Script {
    text: include_str!("scripts/renew.lua"),
    sha: LazyLock::new(|| redis::Script::new(RENEW.text).get_hash().into()),
};

static RELEASE: Script = Script {
    text: include_str!("scripts/release.lua"),
    sha: LazyLock::new(|| redis::Script::new(RELEASE.text).get_hash().into()),
};

impl Script {
    /// Runs it from the server's cache; where it is not there (a new server, `SCRIPT FLUSH`), sends
    /// the text, which puts it there.
    async fn run(
        &self,
        connection: &Connection,
        name: &LockName,
        token: &str,
        ttl: Option<Duration>,
    ) -> Result<Value, StorageError> {
        let command = |verb: &str, script: &str| {
            let mut command = redis::cmd(verb);
            command.arg(script).arg(1).arg(name.as_str()).arg(token);
            if let Some(ttl) = ttl {
                command.arg(millis(ttl));
            }
            command
        };
        match connection.run(&command("EVALSHA", &self.sha)).await {
            Err(Failure::NoScript) => {}
            result => return value(result),
        }
        value(connection.run(&command("EVAL", self.text)).await)
    }
}

fn value(result: Result<Value, Failure>) -> Result<Value, StorageError> {
    result.map_err(|failure| match failure {
        Failure::Storage(error) => error,
        Failure::NoScript => unexpected(),
    })
}

fn millis(duration: Duration) -> u64 {
    // Options are bounded to 24 h.
    duration.as_millis() as u64
}

fn unexpected() -> StorageError {
    // Not a kind that means "not done": nobody knows what was.
    StorageError::with_source(
        StorageErrorKind::Unavailable,
        "a reply that the command cannot give",
    )
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

impl LockStorage for RedisStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let token = request.token.to_text();
        if !request.again {
            match value(self.connection.run(&set_if_free(request, &token)).await)? {
                Value::Okay => return Ok(AcquireReply::granted()),
                Value::Nil => {}
                _ => return Err(unexpected()),
            }
        }
        let ttl = Some(request.ttl);
        match ACQUIRE
            .run(&self.connection, &request.name, &token, ttl)
            .await?
        {
            Value::BulkString(owner) if owner == token.as_bytes() => Ok(AcquireReply::granted()),
            // Negative: the holder's key has no expiry.
            Value::Int(left) => {
                let ttl = u64::try_from(left).ok().map(Duration::from_millis);
                Ok(AcquireReply::held(ttl))
            }
            _ => Err(unexpected()),
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        // They travel together: the connection packs what is sent at the same time into one write.
        join_all(requests.iter().map(async |request| {
            let token = request.token.to_text();
            let ttl = Some(request.ttl);
            match RENEW
                .run(&self.connection, &request.name, &token, ttl)
                .await
            {
                Ok(Value::Int(1)) => Ok(RenewReply::Renewed),
                Ok(Value::Int(0)) => Ok(RenewReply::NotOurs),
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
        match RELEASE
            .run(&self.connection, &request.name, &token, None)
            .await
        {
            Ok(Value::Int(1)) => Ok(ReleaseReply::Released),
            Ok(Value::Int(0)) => Ok(ReleaseReply::NotOurs),
            Ok(_) => Err(unexpected()),
            Err(error) if error.kind() == StorageErrorKind::WrongType => Ok(ReleaseReply::NotOurs),
            Err(error) => Err(error),
        }
    }
}
