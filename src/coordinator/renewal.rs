//! Leases on their way to a longer life: many in one call.
//!
//! However it ends, the state machine of each key is told, once.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        key_events::Renewed,
        lease::Claim,
        meters::{self, Operation},
        table::Cell,
    },
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
        let coordinator = Arc::clone(&self.coordinator);
        let requests = self.leases.iter().map(|(cell, claim)| RenewRequest {
            name: cell.name.clone(),
            token: claim.token,
            ttl: coordinator.storage_ttl(claim.ttl),
        });
        let requests: Vec<_> = requests.collect();
        let sent = coordinator.clock.now();
        let call = Arc::clone(&coordinator.storage).renew(requests);
        let count = self.leases.len();
        // Several tries have to fit between the first renewal and the deadline, also of the
        // shortest lease.
        let shortest = self.leases.iter().map(|(_, claim)| claim.ttl).min();
        let limit = shortest.map_or(Duration::ZERO, |ttl| ttl / 5);
        let limit = limit.min(coordinator.limits.storage_timeout);
        let replies = match timeout(limit, call).await {
            Ok(replies) if replies.len() == count => replies,
            Ok(_) => {
                tracing::error!("the lock storage broke its contract: not one reply per renewal");
                vec![Err(StorageError::new(StorageErrorKind::Rejected)); count]
            }
            Err(_) => vec![Err(StorageError::new(StorageErrorKind::Timeout)); count],
        };
        self.report(sent, replies);
    }

    fn report(&mut self, sent: Timestamp, replies: Vec<Result<RenewReply, StorageError>>) {
        let coordinator = &self.coordinator;
        let now = coordinator.clock.now();
        let mut next: Option<Timestamp> = None;
        let mut failed = (0, None);
        for ((cell, claim), reply) in std::mem::take(&mut self.leases).iter().zip(replies) {
            let renewed = match reply {
                Ok(RenewReply::Renewed) => Some(Renewed::Ours { wanted: false }),
                Ok(RenewReply::RenewedAndWanted) => Some(Renewed::Ours { wanted: true }),
                Ok(RenewReply::NotOurs) => Some(Renewed::NotOurs),
                Err(error) => {
                    coordinator.meters.storage_error(Operation::Renew, &error);
                    failed = (failed.0 + 1, Some(error));
                    None
                }
            };
            let (due, is_late) = coordinator.update(cell, |slot| {
                let is_late = slot.state.renewal_is_late(*claim, now);
                let effects = slot.state.renewed(*claim, sent, renewed, now);
                ((slot.state.due(), is_late), effects)
            });
            match (renewed, is_late) {
                (None, _) => coordinator.meters.renewed(meters::Renewal::Failed),
                // Given back meanwhile: whatever the storage said is no news of a holder's lock.
                (Some(_), None) => {}
                (Some(Renewed::NotOurs), _) => coordinator.meters.renewed(meters::Renewal::NotOurs),
                (_, Some(true)) => coordinator.meters.renewed(meters::Renewal::Late),
                (_, Some(false)) => coordinator.meters.renewed(meters::Renewal::InTime),
            }
            next = due.map_or(next, |due| Some(next.map_or(due, |next| next.min(due))));
        }
        if let (leases, Some(error)) = failed {
            tracing::warn!(leases, %error, "renewal failed, trying again");
        }
        if let Some(next) = next {
            coordinator.keeper.look_by(coordinator, next);
        }
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        // Only the end of a runtime leaves any.
        let error = Err(StorageError::new(StorageErrorKind::Unavailable));
        let replies = vec![error; self.leases.len()];
        self.report(self.coordinator.clock.now(), replies);
    }
}
