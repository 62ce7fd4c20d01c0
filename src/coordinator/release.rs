//! A claim on its way out of the storage.
//!
//! It is sent again and again if the storage does not answer, until the claim has run out by
//! itself. However it ends, the key's state machine is told, once; and so it is told of the place
//! in the queue that the first sending asked for.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::timeout};

use crate::{
    coordinator::{
        Coordinator, backoff,
        key_events::{GiveBack, Outcome, Rejoin},
        lease::Claim,
        table::Cell,
    },
    error::{StorageError, StorageErrorKind},
    storage::{BoxFuture, ReleaseReply, ReleaseRequest, Requeue},
};

/// A release that is not answered is sent again at least this often.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Who wants to know what the storage said.
pub(crate) type Done = oneshot::Sender<Result<ReleaseReply, StorageError>>;

type Answer = Result<ReleaseReply, StorageError>;

pub(super) struct Release {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    claim: Claim,
    /// Until the first answer.
    rejoin: Option<Rejoin>,
    done: Option<Done>,
}

impl Release {
    pub(super) fn new(
        coordinator: Arc<Coordinator>,
        cell: Arc<Cell>,
        give_back: GiveBack,
        done: Option<Done>,
    ) -> Self {
        Self {
            coordinator,
            cell,
            claim: give_back.claim,
            rejoin: give_back.rejoin,
            done,
        }
    }

    /// The call, to be sent by its first poll.
    pub(super) fn send(&self) -> BoxFuture<Answer> {
        let request = ReleaseRequest {
            name: self.cell.name.clone(),
            token: self.claim.token,
            ttl: self.claim.ttl,
            requeue: self.rejoin.map(|rejoin| Requeue {
                token: rejoin.claim.token,
                ttl: rejoin.claim.ttl,
                place: place(rejoin.claim.ttl, rejoin.interval),
                fencing: self.coordinator.fencing(rejoin.fencing),
            }),
        };
        Arc::clone(&self.coordinator.storage).release(request)
    }

    /// Tells those who wait for the answer.
    pub(super) fn answered(&mut self, answer: Answer) {
        if let Some(rejoin) = self.rejoin.take() {
            let outcome = match &answer {
                Ok(ReleaseReply::Requeued { ttl, stamp }) => Outcome::Denied {
                    holder_ttl: Some(*ttl),
                    queued: Some(*stamp),
                },
                Ok(_) => Outcome::NotQueued,
                Err(error) => Outcome::Failed(error.clone()),
            };
            self.coordinator
                .replied(&self.cell, rejoin.claim, outcome, rejoin.interval);
        }
        if let Some(done) = self.done.take() {
            // Nobody listens if the caller of `unlock` has gone.
            let _ = done.send(answer);
        }
    }

    /// Follows the release to its end, and sends it again if need be.
    pub(super) async fn run(mut self, mut call: BoxFuture<Answer>) {
        let coordinator = Arc::clone(&self.coordinator);
        let runs_out = coordinator.clock.now() + self.claim.ttl;
        let mut failures = 0;
        loop {
            let answer = timeout(coordinator.limits.storage_timeout, call).await;
            let answer = answer.unwrap_or(Err(StorageError::new(StorageErrorKind::Timeout)));
            let error = answer.as_ref().err().cloned();
            self.answered(answer);
            let Some(error) = error else { return };
            if !error.kind().is_transient() || coordinator.clock.now() >= runs_out {
                let key = self.cell.name.key();
                tracing::warn!(key, %error, "release failed, the ttl will free the lock");
                return;
            }
            let pause = backoff::after_failure(failures, LONGEST_PAUSE, fastrand::f64());
            failures += 1;
            tokio::time::sleep(pause).await;
            call = self.send();
        }
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        // Only the end of a runtime leaves anybody without an answer.
        self.answered(Err(StorageError::new(StorageErrorKind::Unavailable)));
        self.coordinator
            .update(&self.cell, None, |slot| ((), slot.state.release_done()));
    }
}

/// For how long a place in the storage's queue has to be kept: until the present holder's lease has
/// run out and its waiter has come to ask, and as long again.
pub(super) fn place(ttl: Duration, interval: Duration) -> Duration {
    2 * (ttl + interval)
}
