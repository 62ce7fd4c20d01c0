//! How a caller is woken when its call of the storage takes too long.
//!
//! Almost every call is answered long before that. Still, a timer of tokio's for each would be much
//! of what a lock costs that nobody else wants: a runtime keeps its timers in one place for all its
//! threads. So a caller leaves in its key's cell when it has to be woken, and the keeper, which
//! looks at the cells when something is due there, wakes it. (A key stays in the table for as long
//! as an attempt, or the release of a lock that was held to the end, is on its way.)
//!
//! This is good only where the keeper runs on the caller's own runtime. Another may stand still, or
//! end; there, a caller has a timer of its own. When the keeper ends, it wakes all whom it was to
//! wake, and they look where it is now.

use std::{sync::Arc, task::Waker, time::Duration};

use tokio::runtime;

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        lease::Claim,
        table::{Cell, Slot},
    },
};

/// A storage that hangs may have thousands of calls, each with a moment of its own. For those that
/// are this close together the keeper looks at all cells but once.
pub(super) const COARSE: Duration = Duration::from_millis(5);

/// Whoever made a call for `claim` is to be woken.
#[derive(Debug)]
pub(super) struct Alarm {
    claim: Claim,
    at: Timestamp,
    waker: Waker,
}

impl Coordinator {
    /// Has `waker` woken at this time, unless [`Slot::disarm`] comes before. `false`: the caller
    /// has to see to that by itself. To be called at each poll, from the runtime `here`.
    pub(super) fn arm(
        self: &Arc<Self>,
        cell: &Cell,
        claim: Claim,
        at: Timestamp,
        waker: &Waker,
        here: impl FnOnce() -> Option<runtime::Id>,
    ) -> bool {
        let mut slot = cell.lock();
        let old = match &mut slot.alarm {
            Some(alarm) if alarm.claim != claim => return false,
            Some(alarm) if alarm.waker.will_wake(waker) => return true,
            Some(alarm) => Some(std::mem::replace(&mut alarm.waker, waker.clone())),
            none => {
                *none = Some(Alarm {
                    claim,
                    at,
                    waker: waker.clone(),
                });
                None
            }
        };
        drop(slot);
        // Outside the lock, because that may run other code.
        drop(old);
        // A keeper that ends after this look finds the alarm.
        if self.keeper.is_on(here()) {
            self.keeper.look_by(self, at);
            return true;
        }
        let alarm = cell.lock().disarm(claim);
        drop(alarm);
        false
    }
}

impl Slot {
    /// The call for this claim is over, or nobody waits for it. The alarm has to be dropped outside
    /// the key's lock.
    #[must_use]
    pub(super) fn disarm(&mut self, claim: Claim) -> Option<Alarm> {
        self.alarm.take_if(|alarm| alarm.claim == claim)
    }

    /// Whom to wake now, or when somebody has to be woken.
    pub(super) fn ring(&mut self, now: Timestamp) -> (Option<Waker>, Option<Timestamp>) {
        match self.alarm.take_if(|alarm| alarm.at <= now) {
            Some(alarm) => (Some(alarm.waker), None),
            None => (None, self.alarm.as_ref().map(|alarm| alarm.at)),
        }
    }

    /// Whom to wake because nobody will do it later.
    pub(super) fn ring_early(&mut self) -> Option<Waker> {
        self.alarm.take().map(|alarm| alarm.waker)
    }
}
