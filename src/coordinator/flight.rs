//! One attempt at the storage, from its sending to its reply.
//!
//! Whatever becomes of the caller, the key's state machine is told how the attempt ended, once. An
//! attempt whose caller has gone is followed by the keeper: if it turns out to be granted, the next
//! waiter gets the lease, or it is released.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use crate::{
    clock::Timestamp,
    coordinator::{Coordinator, key_events::Outcome, lease::Claim, table::Cell},
    error::{StorageError, StorageErrorKind},
    options::LockOptions,
    storage::{AcquireReply, BoxFuture},
};

pub(crate) struct Flight {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    claim: Claim,
    options: LockOptions,
    /// A reply after this moment is not waited for.
    pub(crate) limit: Timestamp,
    reply: BoxFuture<Result<AcquireReply, StorageError>>,
    landed: bool,
}

impl Flight {
    pub(crate) fn new(
        coordinator: Arc<Coordinator>,
        cell: Arc<Cell>,
        claim: Claim,
        options: LockOptions,
        limit: Timestamp,
        reply: BoxFuture<Result<AcquireReply, StorageError>>,
    ) -> Self {
        Self {
            coordinator,
            cell,
            claim,
            options,
            limit,
            reply,
            landed: false,
        }
    }

    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<AcquireReply, StorageError>> {
        self.reply.as_mut().poll(cx)
    }

    /// Tells the key how it ended.
    pub(crate) fn land(mut self, reply: Result<AcquireReply, StorageError>, now: Timestamp) {
        self.report(reply, now);
    }

    /// Follows an attempt whose caller has gone.
    pub(crate) async fn follow(mut self) {
        let limit = self.coordinator.clock.timer(self.limit);
        let reply = tokio::time::timeout_at(limit, self.reply.as_mut()).await;
        let reply = reply.unwrap_or(Err(StorageError::new(StorageErrorKind::Timeout)));
        let now = self.coordinator.clock.now();
        self.report(reply, now);
    }

    fn report(&mut self, reply: Result<AcquireReply, StorageError>, now: Timestamp) {
        self.landed = true;
        let outcome = match reply {
            Ok(AcquireReply::Granted { wanted, fencing }) => Outcome::Granted { wanted, fencing },
            Ok(AcquireReply::Held { ttl, queued }) => Outcome::Denied {
                holder_ttl: ttl,
                queued,
            },
            Err(error) => Outcome::Failed(error),
        };
        let interval = self.options.interval();
        self.coordinator
            .replied(&self.cell, self.claim, outcome, interval, now);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            // Only the end of a runtime leads here.
            let now = self.coordinator.clock.now();
            self.report(Err(StorageError::new(StorageErrorKind::Unavailable)), now);
        }
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
