//! Leases on their way to a longer life: many in one call.
//!
//! Calls that are due at the same time take turns: sent all at once, the last would wait behind the
//! first for as long as a call may take, and none of what the storage does for them would count. A
//! call that takes too long may do so for one of its leases alone, such as one that a node of a
//! cluster has which hangs: then each lease has a call of its own.
//!
//! However it ends, the state machine of each key is told, once.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

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

/// How many calls may be on their way before the next is sent.
const AT_ONCE: usize = 8;

/// A call that takes longer than this part of its time limit does not hold up the next.
const PATIENCE: u32 = 8;

/// Whose turn it is to be sent.
pub(super) fn turns() -> Semaphore {
    Semaphore::new(AT_ONCE)
}

type Reply = Result<RenewReply, StorageError>;

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

    /// Several tries have to fit between the first renewal and the deadline, also of the shortest
    /// lease.
    fn limit(&self) -> Duration {
        let shortest = self.leases.iter().map(|(_, claim)| claim.ttl).min();
        let limit = shortest.map_or(Duration::ZERO, |ttl| ttl / 5);
        limit.min(self.coordinator.limits.storage_timeout)
    }

    pub(super) async fn run(mut self) {
        let coordinator = Arc::clone(&self.coordinator);
        let turn = coordinator.renewals.acquire().await;
        let (sent, patience) = (coordinator.clock.now(), self.limit() / PATIENCE);
        let call = self.call();
        tokio::pin!(call);
        let answer = tokio::select! {
            // A simulation is the same each time.
            biased;
            answer = call.as_mut() => answer,
            () = sleep(patience) => {
                drop(turn);
                call.await
            }
        };
        match answer {
            Ok(replies) => self.report(sent, replies),
            Err(_) if self.leases.len() > 1 => {
                let leases = std::mem::take(&mut self.leases).into_iter();
                let alone = leases.map(|lease| Self::new(Arc::clone(&coordinator), vec![lease]));
                join_all(alone.map(Self::run_alone)).await;
            }
            Err(error) => self.report(sent, vec![Err(error)]),
        }
    }

    async fn run_alone(mut self) {
        let sent = self.coordinator.clock.now();
        let replies = self.call().await;
        self.report(sent, replies.unwrap_or_else(|error| vec![Err(error)]));
    }

    /// An error: the call has taken too long.
    fn call(&self) -> impl Future<Output = Result<Vec<Reply>, StorageError>> + use<> {
        let coordinator = &self.coordinator;
        let requests = self.leases.iter().map(|(cell, claim)| RenewRequest {
            name: cell.name.clone(),
            token: claim.token,
            ttl: coordinator.storage_ttl(claim.ttl),
        });
        let (count, limit) = (self.leases.len(), self.limit());
        let call = Arc::clone(&coordinator.storage).renew(requests.collect());
        async move {
            match timeout(limit, call).await {
                Ok(replies) if replies.len() == count => Ok(replies),
                Ok(_) => {
                    tracing::error!(
                        "the lock storage broke its contract: not one reply per renewal"
                    );
                    let error = StorageError::new(StorageErrorKind::Rejected);
                    Ok(vec![Err(error); count])
                }
                Err(_) => Err(StorageError::new(StorageErrorKind::Timeout)),
            }
        }
    }

    fn report(&mut self, sent: Timestamp, replies: Vec<Reply>) {
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
