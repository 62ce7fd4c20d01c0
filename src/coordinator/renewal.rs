//! Leases on their way to a longer life: many in one call.
//!
//! However it ends, the state machine of each key is told, once.

use std::sync::Arc;

use tokio::time::timeout;

use crate::{
    clock::Timestamp,
    coordinator::{Coordinator, lease::Claim, table::Cell},
    error::{StorageError, StorageErrorKind},
    storage::{RenewReply, RenewRequest},
};

/// How many leases one call carries at most.
pub(super) const BATCH: usize = 256;

pub(super) struct Renewal {
    coordinator: Arc<Coordinator>,
    leases: Vec<(Arc<Cell>, Claim)>,
}

impl Renewal {
    pub(super) fn new(coordinator: Arc<Coordinator>, leases: Vec<(Arc<Cell>, Claim)>) -> Self {
        Self {
            coordinator,
            leases,
        }
    }

    pub(super) async fn run(mut self) {
        let requests = self.leases.iter().map(|(cell, claim)| RenewRequest {
            name: cell.name.clone(),
            token: claim.token,
            ttl: claim.ttl,
        });
        let requests: Vec<_> = requests.collect();
        let coordinator = Arc::clone(&self.coordinator);
        let sent = coordinator.clock.now();
        let call = Arc::clone(&coordinator.storage).renew(requests);
        let count = self.leases.len();
        let replies = match timeout(coordinator.limits.storage_timeout, call).await {
            Ok(replies) if replies.len() == count => replies,
            Ok(_) => {
                tracing::error!("the lock storage broke its contract: not one reply per renewal");
                vec![Err(StorageError::new(StorageErrorKind::Rejected)); count]
            }
            Err(_) => vec![Err(StorageError::new(StorageErrorKind::Timeout)); count],
        };
        for ((cell, claim), reply) in std::mem::take(&mut self.leases).iter().zip(replies) {
            self.report(cell, *claim, sent, reply);
        }
        // The leases are due at another time now.
        let now = coordinator.clock.now();
        coordinator.keeper.look_by(&coordinator, now);
    }

    fn report(
        &self,
        cell: &Arc<Cell>,
        claim: Claim,
        sent: Timestamp,
        reply: Result<RenewReply, StorageError>,
    ) {
        let renewed = match reply {
            Ok(reply) => Some(reply == RenewReply::Renewed),
            Err(error) => {
                tracing::warn!(key = cell.name.key(), %error, "renewal failed, trying again");
                None
            }
        };
        let now = self.coordinator.clock.now();
        self.coordinator.update(cell, None, |slot| {
            ((), slot.state.renewed(claim, sent, renewed, now))
        });
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        // Only the end of a runtime leaves any.
        for (cell, claim) in std::mem::take(&mut self.leases) {
            let error = StorageError::new(StorageErrorKind::Unavailable);
            let now = self.coordinator.clock.now();
            self.report(&cell, claim, now, Err(error));
        }
    }
}
