//! Attempts without an answer that may still be carried out.
//!
//! What was sent over a connection that broke may lie somewhere for a while, and reach the storage
//! after the release that was to undo it. Then nobody holds the lock, and nobody gets it until its
//! ttl has run out. So the storage is asked again to let go of the attempt's token, after growing
//! pauses, until it has been of no use to this process for one ttl.

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
    async fn run(self, ttl: Duration) {
        let mut left = ttl;
        let mut pause = self.limit;
        while !left.is_zero() {
            pause = pause.min(left);
            sleep(pause).await;
            let Some(coordinator) = self.coordinator.upgrade() else {
                return;
            };
            match self.need() {
                // Only what comes after the token's last use is nobody's.
                Need::InUse => (left, pause) = (ttl, self.limit),
                Need::Unclear => left -= pause,
                Need::Unused => {
                    let release = self.request(&coordinator);
                    let call = Arc::clone(&coordinator.storage).release(release);
                    drop(coordinator);
                    // If it fails, so would another: until the next time.
                    let _ = timeout(self.limit, call).await;
                    left -= pause;
                    pause *= 2;
                }
            }
        }
    }

    fn need(&self) -> Need {
        let slot = self.cell.lock();
        // Who lost the lock may still work, and its last renewal may protect it.
        let is_held = slot.holder.as_ref().map(|turn| turn.token()) == Some(self.claim.token);
        if is_held || slot.state.uses(self.claim.token) {
            Need::InUse
        } else if slot.state.is_releasing() {
            Need::Unclear
        } else {
            Need::Unused
        }
    }

    fn request(&self, coordinator: &Coordinator) -> ReleaseRequest {
        ReleaseRequest {
            name: self.cell.name.clone(),
            token: self.claim.token,
            ttl: coordinator.storage_ttl(self.claim.ttl),
            wanted: None,
            requeue: None,
            quiet: false,
        }
    }
}

/// What this process needs the token for.
enum Need {
    InUse,
    /// The key is being released, perhaps by this token. Ahead of that release, another would make
    /// it look as if the lock had been lost.
    Unclear,
    Unused,
}
