//! Attempts without an answer that may still be carried out.
//!
//! What was sent over a connection that broke may lie somewhere for a while, and reach the storage
//! after the release that was to undo it. Then nobody holds the lock, and nobody gets it until its
//! ttl has run out. So the storage is asked again to let go of the attempt's token, after growing
//! pauses and for one ttl, unless this process has a use for the token.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};

use crate::{
    coordinator::{Coordinator, lease::Claim, table::Cell},
    storage::ReleaseRequest,
};

/// The most attempts that are looked after at the same time. A storage that is away fails all, and
/// most of them were never sent.
const MOST: usize = 1_024;

/// The attempts that are looked after.
pub(super) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MOST))
}

impl Coordinator {
    /// An attempt with a new token got no answer.
    pub(super) fn not_answered(self: &Arc<Self>, cell: &Arc<Cell>, claim: Claim) {
        // A storage in parts looks after the calls to each of them itself. And a lock that its
        // holder lost must stay locked for the `lock_delay`.
        if self.storage.is_divided() || !self.limits.lock_delay.is_zero() {
            return;
        }
        let Ok(place) = Arc::clone(&self.overdue).try_acquire_owned() else {
            return;
        };
        let overdue = Overdue {
            // The factory may end: then the ttl has to free the lock.
            coordinator: Arc::downgrade(self),
            cell: Arc::clone(cell),
            claim,
            limit: self.limits.storage_timeout,
            _place: place,
        };
        let job = overdue.run(self.storage_ttl(claim.ttl));
        self.keeper.submit(self, Box::pin(job));
    }
}

struct Overdue {
    coordinator: Weak<Coordinator>,
    cell: Arc<Cell>,
    claim: Claim,
    /// For one call.
    limit: Duration,
    _place: OwnedSemaphorePermit,
}

impl Overdue {
    /// The later an attempt comes, the rarer that is: a lock that is nobody's lasts about as long
    /// as its attempt was late.
    async fn run(self, mut left: Duration) {
        let mut pause = self.limit;
        while !left.is_zero() {
            pause = pause.min(left);
            sleep(pause).await;
            let Some(coordinator) = self.coordinator.upgrade() else {
                return;
            };
            let call = (!self.cell.lock().state.uses(self.claim.token))
                .then(|| Arc::clone(&coordinator.storage).release(self.request(&coordinator)));
            drop(coordinator);
            if let Some(call) = call {
                // If it fails, so would another: until the next time.
                let _ = timeout(self.limit, call).await;
            }
            left -= pause;
            pause *= 2;
        }
    }

    fn request(&self, coordinator: &Coordinator) -> ReleaseRequest {
        ReleaseRequest {
            name: self.cell.name.clone(),
            token: self.claim.token,
            ttl: coordinator.storage_ttl(self.claim.ttl),
            unwanted: false,
            requeue: None,
            quiet: false,
        }
    }
}
