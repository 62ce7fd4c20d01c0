//! How it is found out that a connection is dead.
//!
//! - A reply says so: the connection broke, or its server is no longer one that can be written to.
//! - The server or the kernel closed it, also while it was idle (told by a RESP3 push of redis-rs).
//! - Calls were given up, and for a while nothing at all came back: a half-open socket, or a runtime
//!   that nobody drives any more. Those who give up find that out, wherever they run.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use redis::{RedisError, Value};

use super::error::ends_connection;

/// When calls are given up and nothing at all has come back for this long, their connection is given
/// up too.
const STALLED: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub(super) struct Health {
    dead: AtomicBool,
    replies: AtomicU64,
    /// When the first of those calls was sent that were given up since the last reply, and how many
    /// replies there had been.
    silent_since: Mutex<Option<(Instant, u64)>>,
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

    /// A call that was sent at `sent`, after so many replies, was given up.
    fn given_up(&self, sent: Instant, replies: u64) {
        if self.replies.load(Relaxed) != replies {
            return;
        }
        let mut silent_since = self
            .silent_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let since = match *silent_since {
            Some((since, at)) if at == replies => since,
            _ => sent,
        };
        *silent_since = Some((since, replies));
        if since.elapsed() >= STALLED {
            self.kill();
        }
    }
}

fn is_last(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if ends_connection(&error.clone().into()))
}

/// A call on its way. Dropped without its reply, it looks whether the connection still gives any.
pub(super) struct Unanswered {
    pub(super) health: Arc<Health>,
    replies: u64,
    sent: Instant,
    answered: bool,
}

impl Unanswered {
    pub(super) fn new(health: &Arc<Health>) -> Self {
        Self {
            health: Arc::clone(health),
            replies: health.replies.load(Relaxed),
            sent: Instant::now(),
            answered: false,
        }
    }

    pub(super) fn answered(&mut self) {
        self.answered = true;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if !self.answered {
            self.health.given_up(self.sent, self.replies);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn a_silence_that_has_ended_is_forgotten() {
        let health = Health::default();
        health.given_up(Instant::now(), 0);
        sleep(STALLED);
        health.replied();
        // Sent a moment ago, however slow this machine is.
        health.given_up(Instant::now() + STALLED, 1);
        assert!(!health.is_dead());
    }

    #[test]
    fn calls_that_are_given_up_at_once_end_their_connection_when_it_was_silent_for_long() {
        let health = Health::default();
        health.given_up(Instant::now(), 0);
        assert!(!health.is_dead());
        sleep(STALLED);
        health.given_up(Instant::now(), 0);
        assert!(health.is_dead());
    }
}
