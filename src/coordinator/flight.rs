//! One attempt at the storage, from its sending to its reply.
//!
//! Whatever becomes of the caller, the key's state machine is told how the attempt ended, once. An
//! attempt whose caller has gone is followed by the keeper: if it turns out to be granted, the next
//! waiter gets the lease, or it is released.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        key_events::{Attempt, Outcome},
        lease::Claim,
        meters::Operation,
        table::Cell,
    },
    error::{StorageError, StorageErrorKind},
    storage::{AcquireReply, Call},
};

pub(crate) struct Flight {
    pub(super) claim: Claim,
    /// With the token of an attempt before.
    repeated: bool,
    /// A reply after this moment is not waited for.
    pub(crate) limit: Timestamp,
    reply: Call<Reply>,
}

type Reply = Result<AcquireReply, StorageError>;

impl Flight {
    pub(crate) fn new(attempt: Attempt, limit: Timestamp, reply: Call<Reply>) -> Self {
        Self {
            claim: attempt.claim,
            repeated: attempt.repeated,
            limit,
            reply,
        }
    }

    /// Whether the storage has answered at once.
    pub(crate) fn is_immediate(&self) -> bool {
        self.reply.is_done()
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Reply> {
        let reply = ready!(Pin::new(&mut self.reply).poll(cx));
        Poll::Ready(match reply {
            // It would be asked again at once, and for ever.
            Ok(AcquireReply::Unknown) if !self.repeated => Err(StorageError::with_source(
                StorageErrorKind::Rejected,
                "a reply that only a repeated attempt can get",
            )),
            reply => reply,
        })
    }

    /// Tells the key how it ended.
    pub(crate) fn land(
        self,
        coordinator: &Arc<Coordinator>,
        cell: &Arc<Cell>,
        interval: Duration,
        reply: Reply,
        now: Timestamp,
    ) {
        let is_overdue =
            !self.repeated && matches!(&reply, Err(error) if error.kind().is_transient());
        let outcome = match reply {
            Ok(AcquireReply::Granted { wanted, fencing }) => Outcome::Granted { wanted, fencing },
            Ok(AcquireReply::Held { ttl, queued }) => Outcome::Denied {
                holder_ttl: ttl,
                queued,
            },
            Ok(AcquireReply::Unknown) => Outcome::NotQueued,
            Ok(AcquireReply::Undecided) => Outcome::Undecided,
            Err(error) => {
                coordinator.meters.storage_error(Operation::Acquire, &error);
                Outcome::Failed(error)
            }
        };
        coordinator.replied(cell, self.claim, outcome, interval, now);
        if is_overdue {
            coordinator.not_answered(cell, self.claim);
        }
    }

    /// Follows an attempt whose caller has gone.
    pub(crate) fn follow(
        self,
        coordinator: Arc<Coordinator>,
        cell: Arc<Cell>,
        interval: Duration,
    ) -> impl Future<Output = ()> + Send {
        // Not in the future's first poll, which may never come.
        let mut followed = Followed {
            coordinator,
            cell,
            interval,
            flight: Some(self),
        };
        async move {
            let reply = followed.reply().await;
            followed.land(reply);
        }
    }
}

/// An attempt whose caller has gone. Dropped before its end, it failed.
struct Followed {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    interval: Duration,
    flight: Option<Flight>,
}

impl Followed {
    async fn reply(&mut self) -> Reply {
        let Some(flight) = &mut self.flight else {
            return Err(StorageError::new(StorageErrorKind::Unavailable));
        };
        let limit = self.coordinator.clock.timer(flight.limit);
        let reply = tokio::time::timeout_at(limit, poll_fn(|cx| flight.poll(cx))).await;
        reply.unwrap_or(Err(StorageError::new(StorageErrorKind::Timeout)))
    }

    fn land(&mut self, reply: Reply) {
        if let Some(flight) = self.flight.take() {
            let now = self.coordinator.clock.now();
            flight.land(&self.coordinator, &self.cell, self.interval, reply, now);
        }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // Only the end of a runtime leaves anything to land.
        self.land(Err(StorageError::new(StorageErrorKind::Unavailable)));
    }
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight")
            .field("claim", &self.claim)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}
