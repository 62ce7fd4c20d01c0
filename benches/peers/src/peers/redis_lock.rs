//! redis-lock, a Redlock library: whoever finds a lock taken asks again after 100 ms.
//!
//! It locks around a future. Its connections stand behind mutexes, held for whole round trips: here
//! each task has its own, around clones of one multiplexed connection a server.

use std::{sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, Either, select};
use redis_0_27::{Client, aio::MultiplexedConnection};
use redis_lock::{LockAcrossOptions, lock_across};
use tokio::sync::{Mutex, oneshot};

use super::{Locks, TTL};
use crate::Error;

pub(crate) struct RedisLock {
    connections: Vec<Arc<Mutex<MultiplexedConnection>>>,
    plain: Vec<MultiplexedConnection>,
}

impl RedisLock {
    pub(crate) async fn connect(urls: &str) -> Result<Self, Error> {
        let mut plain = Vec::new();
        for url in urls.split(',') {
            let client = Client::open(url)?;
            plain.push(client.get_multiplexed_async_connection().await?);
        }
        Ok(Self::with(plain))
    }

    fn with(plain: Vec<MultiplexedConnection>) -> Self {
        let own = plain.iter().cloned().map(Mutex::new).map(Arc::new);
        Self {
            connections: own.collect(),
            plain,
        }
    }
}

/// For a task of its own.
impl Clone for RedisLock {
    fn clone(&self) -> Self {
        Self::with(self.plain.clone())
    }
}

pub(crate) struct Guard {
    leave: oneshot::Sender<()>,
    lock: BoxFuture<'static, Result<(), Error>>,
}

impl Locks for RedisLock {
    type Guard = Guard;

    async fn lock(&self, key: &str) -> Result<Guard, Error> {
        let (enter, entered) = oneshot::channel();
        let (leave, left) = oneshot::channel();
        let (connections, key) = (self.connections.clone(), key.to_owned());
        let lock = Box::pin(async move {
            let section = async move {
                let _ = enter.send(());
                let _ = left.await;
            };
            let options = LockAcrossOptions {
                ttl: TTL,
                duration: Duration::from_secs(60),
                ..LockAcrossOptions::default()
            };
            let result = lock_across(&connections, &key, section, options).await;
            result.map_err(|error| error.to_string().into())
        });
        match select(lock as BoxFuture<'static, Result<(), Error>>, entered).await {
            Either::Left((result, _)) => {
                result?;
                Err("a section that nobody left is over".into())
            }
            Either::Right((_, lock)) => Ok(Guard { leave, lock }),
        }
    }

    async fn release(&self, guard: Guard) -> Result<(), Error> {
        let _ = guard.leave.send(());
        guard.lock.await
    }
}
