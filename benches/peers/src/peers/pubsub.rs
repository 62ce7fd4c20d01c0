//! What one would write by hand to be woken: the release publishes a message, and all who wait try
//! again when it comes.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use redis::aio::MultiplexedConnection;
use tokio::{sync::Notify, task::JoinHandle, time::timeout};

use super::{Locks, connect, load, release, set_if_free, token};
use crate::Error;

/// Where releases are published.
const CHANNEL: &str = "lock-bench:released";

const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
    redis.call('PUBLISH', 'lock-bench:released', KEYS[1])
    return 1
end
return 0";

/// When to try again if no message comes: its sender may have crashed.
const FALLBACK: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(crate) struct Pubsub {
    connection: MultiplexedConnection,
    release: Arc<str>,
    released: Arc<Notify>,
    /// Ends only if the subscription is lost.
    listener: Arc<JoinHandle<()>>,
}

impl Pubsub {
    pub(crate) async fn connect(url: &str) -> Result<Self, Error> {
        let mut connection = connect(url).await?;
        let release = load(&mut connection, RELEASE).await?.into();
        let mut subscription = redis::Client::open(url)?.get_async_pubsub().await?;
        subscription.subscribe(CHANNEL).await?;
        let released = Arc::new(Notify::new());
        let notify = Arc::clone(&released);
        let listener = tokio::spawn(async move {
            let mut messages = subscription.into_on_message();
            while messages.next().await.is_some() {
                notify.notify_waiters();
            }
        });
        Ok(Self {
            connection,
            release,
            released,
            listener: Arc::new(listener),
        })
    }
}

pub(crate) struct Guard {
    key: String,
    token: String,
}

impl Locks for Pubsub {
    type Guard = Guard;

    async fn lock(&self, key: &str) -> Result<Guard, Error> {
        let mut connection = self.connection.clone();
        let token = token();
        loop {
            // Listens from before the attempt, so that a release right after it is not missed.
            let mut released = pin!(self.released.notified());
            released.as_mut().enable();
            if set_if_free(&mut connection, key, &token).await? {
                let key = key.to_owned();
                return Ok(Guard { key, token });
            }
            if timeout(FALLBACK, released).await.is_err() && self.listener.is_finished() {
                return Err("the subscription was lost".into());
            }
        }
    }

    async fn release(&self, guard: Guard) -> Result<(), Error> {
        let connection = &mut self.connection.clone();
        release(connection, &self.release, &guard.key, &guard.token).await
    }
}
