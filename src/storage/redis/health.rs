//! How it is found out that a connection is dead.
//!
//! - A reply says so: the connection broke, or its server is no longer one that can be written to.
//! - The server or the kernel closed it, also while it was idle (told by a RESP3 push of redis-rs).
//! - A call was given up, and for a while nothing at all came back: a half-open socket.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use redis::{RedisError, Value};
use tokio::{sync::watch, time::sleep};

use super::error::ends_connection;

/// When a call was given up and nothing at all has come back for this long, the connection is given
/// up too.
const STALLED: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub(super) struct Health {
    dead: AtomicBool,
    replies: AtomicU64,
}

impl Health {
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    pub(super) fn kill(&self) {
        self.dead.store(true, Relaxed);
    }

    /// Something came back.
    pub(super) fn replied(&self) {
        self.replies.fetch_add(1, Relaxed);
    }

    /// Looks at a reply, which may say that it is the last.
    pub(super) fn judge(&self, reply: &Result<Value, RedisError>) {
        let ends = match reply {
            Ok(Value::Array(values)) => values.iter().any(is_last),
            Ok(value) => is_last(value),
            // Only a connection that was made elsewhere has a time limit of its own.
            Err(error) => ends_connection(error) || error.is_timeout(),
        };
        if ends {
            self.kill();
        }
    }

    /// Waits for the reply to something that was sent just now. `None` if the connection is out of
    /// use before: it may be one on which nothing comes back.
    pub(super) async fn follow<T>(
        &self,
        reply: impl Future<Output = T>,
        mut in_use: watch::Receiver<()>,
        is_given_up: impl Fn() -> bool,
    ) -> Option<T> {
        tokio::pin!(reply);
        let mut replies = self.replies.load(Relaxed);
        loop {
            tokio::select! {
                biased;
                reply = reply.as_mut() => {
                    self.replied();
                    return Some(reply);
                }
                _ = in_use.changed() => return None,
                () = sleep(STALLED) => {
                    let before = std::mem::replace(&mut replies, self.replies.load(Relaxed));
                    if before == replies && is_given_up() {
                        self.kill();
                    }
                }
            }
        }
    }
}

fn is_last(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if ends_connection(&error.clone().into()))
}
