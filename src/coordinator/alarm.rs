//! How a caller is woken when its call of the storage, or its wait in the queue, takes too long.
//!
//! Almost every call is answered long before that, and almost every wait is over. Still, a timer of
//! tokio's for each would be much of what a lock costs: a runtime keeps its timers in one place for
//! all its threads. So a caller leaves in its key's cell when it has to be woken, and the keeper,
//! which looks at the cells when something is due there, wakes it. (A key stays in the table for as
//! long as somebody waits for it, or an attempt, or the release of a lock that was held to the end,
//! is on its way.)
//!
//! This is good only where the keeper runs on the caller's own runtime. Another may stand still, or
//! end; there, a caller has a timer of its own. When the keeper ends, it wakes all whom it was to
//! wake, and they look where it is now.

use std::{sync::Arc, task::Waker, time::Duration};

use tokio::runtime;

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator, keeper,
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

/// How somebody in the queue is woken.
#[derive(Debug)]
pub(crate) struct Bell {
    waker: Waker,
    /// When its wait is over.
    ends: Timestamp,
}

impl Bell {
    pub(super) fn new(waker: &Waker, ends: Timestamp) -> Self {
        Self {
            waker: waker.clone(),
            ends,
        }
    }

    pub(super) fn ring(self) {
        self.waker.wake();
    }
}

impl Coordinator {
    /// Whether somebody in the queue, who has left a [`Bell`] there, is woken when its wait is over.
    /// If not, it has to see to that by itself. To be called at each poll.
    pub(super) fn rings(self: &Arc<Self>, ends: Timestamp) -> bool {
        // A keeper that ends after this look finds the bell.
        let rings = self.keeper.is_on(keeper::here());
        if rings {
            self.keeper.look_by(self, ends);
        }
        rings
    }

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

    /// Adds those whom to wake now to `late`. When somebody has to be woken next.
    pub(super) fn ring(&mut self, now: Timestamp, late: &mut Vec<Waker>) -> Timestamp {
        if let Some(alarm) = self.alarm.take_if(|alarm| alarm.at <= now) {
            late.push(alarm.waker);
        }
        if self.ends <= now {
            // Whoever it was may have gone long ago.
            let mut next = Timestamp::NEVER;
            let over = self.state.wake_some(|bell| {
                let is_over = bell.ends <= now;
                if !is_over {
                    next = next.min(bell.ends);
                }
                is_over
            });
            late.extend(over.into_iter().map(|bell| bell.waker));
            self.ends = next;
        }
        let alarm = self.alarm.as_ref();
        alarm.map_or(self.ends, |alarm| alarm.at.min(self.ends))
    }

    /// Whom to wake because nobody will do it later.
    pub(super) fn ring_early(&mut self) -> Vec<Waker> {
        let waiters = self.state.wake_all().into_iter();
        let caller = self.alarm.take().map(|alarm| alarm.waker);
        waiters.map(|bell| bell.waker).chain(caller).collect()
    }
}
