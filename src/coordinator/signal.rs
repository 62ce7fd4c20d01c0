//! What a holder knows of its lock: is it still mine, and tell me when not.
//!
//! Shared by the holder, which looks, and the coordinator, which tells of renewals and of the loss.
//! Looking takes no lock.

use std::{fmt, task::Waker, time::Duration};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::{
    clock::{Clock, Timestamp},
    error::LossReason,
    sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst},
};

/// What a holder has of its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holding {
    /// The lock is the holder's.
    Held,
    /// The holder gave it back.
    GivenBack,
    /// It was lost first.
    Lost(LossReason),
}

pub(crate) struct Signal {
    clock: Clock,
    deadline: AtomicU64,
    /// When `max_hold` ends it, whatever the deadline.
    ends: Timestamp,
    state: AtomicU8,
    /// The task that polls the holder's work.
    watcher: AtomicWaker,
    lost: Notify,
}

const HELD: u8 = 0;
const GIVEN_BACK: u8 = 1;
const FIRST_REASON: u8 = 2;
const REASONS: [LossReason; 5] = [
    LossReason::Expired,
    LossReason::NotOurs,
    LossReason::ForceReleased,
    LossReason::MaxHold,
    LossReason::Draining,
];

fn decode(state: u8) -> Holding {
    match state {
        HELD => Holding::Held,
        GIVEN_BACK => Holding::GivenBack,
        lost => Holding::Lost(REASONS[usize::from(lost - FIRST_REASON)]),
    }
}

fn encode_loss(reason: LossReason) -> u8 {
    let index = REASONS
        .iter()
        .position(|known| *known == reason)
        .unwrap_or_default();
    FIRST_REASON + index as u8
}

impl Signal {
    pub(crate) fn new(clock: Clock, deadline: Timestamp, ends: Timestamp) -> Self {
        Self {
            clock,
            deadline: AtomicU64::new(deadline.as_nanos()),
            ends,
            state: AtomicU8::new(HELD),
            watcher: AtomicWaker::new(),
            lost: Notify::new(),
        }
    }

    /// Looks at the clock: a lock whose deadline has come is lost from then on, also if a renewal
    /// succeeds later.
    pub(crate) fn look(&self) -> Holding {
        self.look_at(self.clock.now())
    }

    /// The same, for whoever has just looked at the clock.
    pub(crate) fn look_at(&self, now: Timestamp) -> Holding {
        let state = decode(self.state.load(SeqCst));
        if state == Holding::Held && now.as_nanos() >= self.deadline.load(SeqCst) {
            let reason = if now >= self.ends {
                LossReason::MaxHold
            } else {
                LossReason::Expired
            };
            self.lose(reason);
            return decode(self.state.load(SeqCst));
        }
        state
    }

    /// How long the lock can be relied on if no renewal succeeds from now on. Zero when it is lost
    /// or given back.
    pub(crate) fn remaining(&self) -> Duration {
        match self.look() {
            Holding::Held => {
                let deadline = Timestamp::from_nanos(self.deadline.load(SeqCst));
                deadline.since(self.clock.now())
            }
            _ => Duration::ZERO,
        }
    }

    /// Wakes the watcher, lost or not.
    pub(crate) fn wake(&self) {
        self.watcher.wake();
    }

    /// Has `waker` woken when the lock is lost. There is one watcher: the latest.
    pub(crate) fn watch(&self, waker: &Waker) {
        self.watcher.register(waker);
    }

    /// Waits until the lock is lost. If it is given back first, this never ends.
    pub(crate) async fn lost(&self) -> LossReason {
        loop {
            let notified = self.lost.notified();
            tokio::pin!(notified);
            // From here on no notification is missed.
            notified.as_mut().enable();
            if let Holding::Lost(reason) = self.look() {
                return reason;
            }
            let deadline = Timestamp::from_nanos(self.deadline.load(SeqCst));
            // The keeper tells of a loss, but it may have ended with another runtime. A deadline
            // that has moved on meanwhile is waited for anew.
            let _ = tokio::time::timeout_at(self.clock.timer(deadline), notified).await;
        }
    }

    /// The lock is no longer the holder's. Whether this is news: it may have been lost or given
    /// back before.
    pub(crate) fn lose(&self, reason: LossReason) -> bool {
        let news = self.leave_held(encode_loss(reason));
        if news {
            self.watcher.wake();
            self.lost.notify_waiters();
        }
        news
    }

    /// A renewal succeeded. The first one of a pushed grant may bring the deadline forward.
    pub(crate) fn prolong(&self, deadline: Timestamp) {
        self.deadline.store(deadline.as_nanos(), SeqCst);
    }

    /// The holder gives the lock back.
    pub(crate) fn give_back(&self) {
        self.leave_held(GIVEN_BACK);
    }

    fn leave_held(&self, state: u8) -> bool {
        self.state
            .compare_exchange(HELD, state, SeqCst, SeqCst)
            .is_ok()
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signal")
            .field(&decode(self.state.load(SeqCst)))
            .finish()
    }
}
