//! How it is found out that a connection is dead.
//!
//! - A reply says so: the connection broke, or its server is no longer one that can be written to.
//! - The server or the kernel closed it, also while it was idle: somebody always reads from it.
//! - Calls were given up, and for a while nothing at all came back: a half-open socket, or a runtime
//!   that nobody drives any more. Those who give up find that out, wherever they run.
//!
//! Time is that of tokio, so that it can be simulated: in a test with a paused clock, a server that is real seems silent.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use redis::{RedisError, Value};
use tokio::time::Instant;

use super::error::ends_connection;

/// When a call is given up, and nothing at all has come back for this long, the connection is given
/// up too.
const STALLED: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Health {
    dead: AtomicBool,
    made: Instant,
    /// Since when nothing has come back, though it was waited for: in nanoseconds after the
    /// connection was made.
    silent_since: AtomicU64,
    /// Whether a call was given up since then.
    in_doubt: AtomicBool,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            dead: AtomicBool::new(false),
            made: Instant::now(),
            silent_since: AtomicU64::new(0),
            in_doubt: AtomicBool::new(false),
        }
    }
}

impl Health {
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    pub(super) fn kill(&self) {
        self.dead.store(true, Relaxed);
    }

    /// A call was made, and no other is open.
    pub(super) fn first_call(&self) {
        // The calls before may have been given up.
        if !self.in_doubt.load(Relaxed) {
            self.is_heard();
        }
    }

    /// Something came back.
    pub(super) fn replied(&self) {
        self.is_heard();
        // Written only when it is news: other cores read it for each call.
        if self.in_doubt.load(Relaxed) {
            self.in_doubt.store(false, Relaxed);
        }
    }

    /// A call was given up.
    pub(super) fn given_up(&self) {
        self.in_doubt.store(true, Relaxed);
        if self.age().saturating_sub(self.last_heard()) >= STALLED {
            self.kill();
        }
    }

    /// How old the connection is.
    pub(super) fn age(&self) -> Duration {
        self.made.elapsed()
    }

    /// How old it was when something last came back.
    pub(super) fn last_heard(&self) -> Duration {
        Duration::from_nanos(self.silent_since.load(Relaxed))
    }

    fn is_heard(&self) {
        self.silent_since
            .store(self.age().as_nanos() as u64, Relaxed);
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
}

fn is_last(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if ends_connection(&error.clone().into()))
}

/// A call on its way. If it is dropped without its reply, `given_up` is run.
pub(super) struct Unanswered<F: FnMut()> {
    given_up: F,
    is_answered: bool,
}

impl<F: FnMut()> Unanswered<F> {
    pub(super) fn new(given_up: F) -> Self {
        Self {
            given_up,
            is_answered: false,
        }
    }

    pub(super) fn answered(mut self) {
        self.is_answered = true;
    }
}

impl<F: FnMut()> Drop for Unanswered<F> {
    fn drop(&mut self) {
        if !self.is_answered {
            (self.given_up)();
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
        health.first_call();
        health.given_up();
        sleep(STALLED);
        health.replied();
        health.given_up();
        assert!(!health.is_dead());
    }

    #[test]
    fn calls_that_are_given_up_at_once_end_their_connection_when_it_was_silent_for_long() {
        let health = Health::default();
        health.first_call();
        health.given_up();
        assert!(!health.is_dead());
        sleep(STALLED);
        health.first_call();
        health.given_up();
        assert!(health.is_dead());
    }

    #[test]
    fn a_connection_that_nobody_used_was_not_silent() {
        let health = Health::default();
        health.first_call();
        health.replied();
        sleep(STALLED);
        health.first_call();
        health.given_up();
        assert!(!health.is_dead());
    }
}
