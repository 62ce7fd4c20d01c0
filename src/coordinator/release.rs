//! A claim on its way out of the storage.
//!
//! It is sent again and again if the storage does not answer, until the claim has run out by
//! itself. However it ends, the key's state machine is told, once.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::timeout};

use crate::{
    coordinator::{Coordinator, backoff, lease::Claim, table::Cell},
    error::{StorageError, StorageErrorKind},
    storage::{BoxFuture, ReleaseReply, ReleaseRequest},
};

/// A release that is not answered is sent again at least this often.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Who wants to know what the storage said.
pub(crate) type Done = oneshot::Sender<Result<ReleaseReply, StorageError>>;

/// A claim on its way out of the storage.
pub(super) struct Release {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    claim: Claim,
}

impl Release {
    pub(super) fn new(coordinator: Arc<Coordinator>, cell: Arc<Cell>, claim: Claim) -> Self {
        Self {
            coordinator,
            cell,
            claim,
        }
    }

    /// The call, to be sent by its first poll.
    pub(super) fn send(&self) -> BoxFuture<Result<ReleaseReply, StorageError>> {
        let request = ReleaseRequest {
            name: self.cell.name.clone(),
            token: self.claim.token,
        };
        Arc::clone(&self.coordinator.storage).release(request)
    }

    /// Sends the release, again and again if the storage does not answer, until the claim has run
    /// out by itself.
    pub(super) async fn run(
        self,
        mut call: BoxFuture<Result<ReleaseReply, StorageError>>,
        mut done: Option<Done>,
    ) {
        let coordinator = &self.coordinator;
        let runs_out = coordinator.clock.now() + self.claim.ttl;
        let mut failures = 0;
        loop {
            let result = timeout(coordinator.limits.storage_timeout, call).await;
            let result = result.unwrap_or(Err(StorageError::new(StorageErrorKind::Timeout)));
            let error = result.as_ref().err().cloned();
            if let Some(done) = done.take() {
                // Nobody listens if the caller of `unlock` has gone.
                let _ = done.send(result);
            }
            let Some(error) = error else { return };
            if !error.kind().is_transient() || coordinator.clock.now() >= runs_out {
                tracing::warn!(key = self.cell.name.key(), %error, "release failed, the ttl will free the lock");
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
        self.coordinator
            .update(&self.cell, None, |slot| ((), slot.state.release_done()));
    }
}
