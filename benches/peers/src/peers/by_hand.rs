//! The lock of the Redis documentation, written by hand: `SET NX PX`, and a script that deletes the
//! key if it has our token. Whoever finds the lock taken asks again after a random delay.

use std::{sync::Arc, time::Duration};

use redis::aio::MultiplexedConnection;

use super::{Locks, connect, load, release, set_if_free, token};
use crate::Error;

const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0";

/// The longest delay.
const RETRY: Duration = Duration::from_millis(5);

#[derive(Clone)]
pub(crate) struct ByHand {
    connection: MultiplexedConnection,
    release: Arc<str>,
}

impl ByHand {
    pub(crate) async fn connect(url: &str) -> Result<Self, Error> {
        let mut connection = connect(url).await?;
        let release = load(&mut connection, RELEASE).await?.into();
        Ok(Self {
            connection,
            release,
        })
    }
}

pub(crate) struct Guard {
    key: String,
    token: String,
}

impl Locks for ByHand {
    type Guard = Guard;

    async fn lock(&self, key: &str) -> Result<Guard, Error> {
        let token = token();
        while !set_if_free(&mut self.connection.clone(), key, &token).await? {
            tokio::time::sleep(RETRY.mul_f64(fastrand::f64())).await;
        }
        let key = key.to_owned();
        Ok(Guard { key, token })
    }

    async fn release(&self, guard: Guard) -> Result<(), Error> {
        let connection = &mut self.connection.clone();
        release(connection, &self.release, &guard.key, &guard.token).await
    }
}
