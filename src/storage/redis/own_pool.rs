//! A server that is reached through a pool of the user's.
//!
//! Nothing is checked out of the pool: its manager makes one more connection, for locks alone. A
//! connection that others check out as well would carry what they do there: a `SELECT` would let our
//! locks go to another database, a `MULTI` would take them for its own, a `BLPOP` would hold them
//! up. A new connection for each command, or several in turn, would let commands overtake each
//! other: an acquire whose caller has gone could be carried out after its release, and lock the key
//! for a ttl. And a checkout costs a PING, and with the server down all of the pool's
//! `connection_timeout`, without a word of why.
//!
//! Such a connection is as the pool's manager makes it. It cannot receive messages, nor tell that
//! the server has closed it while nobody used it.

use std::time::Duration;

use bb8_redis::{RedisConnectionManager, bb8::Pool};
use redis::{RedisError, aio::MultiplexedConnection};

#[derive(Clone)]
pub(super) struct OwnPool(Pool<RedisConnectionManager>);

impl OwnPool {
    /// How long making a connection may take. The manager goes by redis-rs's default.
    pub(super) const TIMEOUT: Duration = Duration::from_secs(1);

    pub(super) fn new(pool: Pool<RedisConnectionManager>) -> Self {
        tracing::warn!(
            "locks over a pool made elsewhere: no wake-ups, waiters poll every `interval`; \
             a connection that was closed while idle costs its next caller an error"
        );
        Self(pool)
    }

    pub(super) async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        self.0.dedicated_connection().await
    }
}
