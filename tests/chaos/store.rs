//! What the locks protect: counters in a store of its own, which no nemesis touches.
//!
//! It sees each write together with what the writer had read before, so it knows which updates were
//! lost, whatever the writers believe.

use redis::{AsyncConnectionConfig, aio::MultiplexedConnection};

use super::{
    kit::{LIMIT, RedisServer},
    record::Write,
};

/// Leaves the token, so that no earlier holder can change what is read here.
const READ: &str = "
    if ARGV[1] ~= '0' then
      if tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[1], 'fence') or '0') then
        return false
      end
      redis.call('HSET', KEYS[1], 'fence', ARGV[1])
    end
    return tonumber(redis.call('HGET', KEYS[1], 'value') or '0')";

/// Adds one to what was read. Answers how many updates that overwrote, and who wrote last.
const WRITE: &str = "
    if ARGV[1] ~= '0' then
      if tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[1], 'fence') or '0') then
        return false
      end
      redis.call('HSET', KEYS[1], 'fence', ARGV[1])
    end
    local value = tonumber(redis.call('HGET', KEYS[1], 'value') or '0')
    local last = redis.call('HGET', KEYS[1], 'last') or 'nobody'
    redis.call('HSET', KEYS[1], 'value', ARGV[2] + 1, 'last', ARGV[3])
    redis.call('HINCRBY', KEYS[1], 'writes', 1)
    return { value - ARGV[2], last }";

/// A way to it. A token makes reads and writes conditional.
#[derive(Clone)]
pub struct Store(MultiplexedConnection);

impl Store {
    pub async fn open(url: &str) -> Self {
        let client = redis::Client::open(url).unwrap();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(LIMIT))
            .set_response_timeout(Some(LIMIT));
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        Self(connecting.await.unwrap())
    }

    /// `None` if it was refused.
    pub async fn read(&mut self, key: &str, token: Option<u64>) -> Option<u64> {
        redis::cmd("EVAL")
            .arg((READ, 1, key, token.unwrap_or(0)))
            .query_async(&mut self.0)
            .await
            .unwrap()
    }

    pub async fn write(&mut self, key: &str, token: Option<u64>, read: u64, who: &str) -> Write {
        let written: Option<(i64, String)> = redis::cmd("EVAL")
            .arg((WRITE, 1, key, token.unwrap_or(0)))
            .arg((read, who))
            .query_async(&mut self.0)
            .await
            .unwrap();
        match written {
            None => Write::Refused,
            Some((0, _)) => Write::Kept,
            // What was read cannot lie ahead of what is there, unless updates were lost before.
            Some((writes, last)) => Write::Lost {
                writes: writes.unsigned_abs(),
                last,
            },
        }
    }
}

/// How many updates of a counter are gone: writes that were taken, less what it shows.
pub async fn lost(store: &RedisServer, key: &str) -> u64 {
    let fields: (Option<u64>, Option<u64>) = store.run(&format!("HMGET {key} writes value")).await;
    fields.0.unwrap_or(0) - fields.1.unwrap_or(0)
}
