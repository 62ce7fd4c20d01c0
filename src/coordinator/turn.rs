//! One holder's turn, as the holder sees it: is the lock still mine, tell me when not, take it back.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst},
    },
    task::Waker,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::sync::{Notify, oneshot};

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        key_state::{Ended, Granted, TurnId},
        lease::Claim,
        table::Cell,
    },
    error::{LossReason, StorageError},
    storage::ReleaseReply,
};

/// The state of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TurnState {
    /// The lock is the holder's.
    Held,
    /// The holder gave it back.
    GivenBack,
    /// It was lost first.
    Lost(LossReason),
}

/// Shared by the holder's guard, its handles, and the coordinator.
pub(crate) struct Turn {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    id: TurnId,
    claim: Claim,
    /// When `max_hold` ends it.
    ends: Timestamp,
    deadline: AtomicU64,
    state: AtomicU8,
    given_back: AtomicBool,
    /// The task that polls the holder's work.
    watcher: AtomicWaker,
    lost: Notify,
}

const HELD: u8 = 0;
const GIVEN_BACK: u8 = 1;
const REASONS: [LossReason; 4] = [
    LossReason::Expired,
    LossReason::NotOurs,
    LossReason::MaxHold,
    LossReason::Draining,
];
const FIRST_REASON: u8 = 2;

fn decode(state: u8) -> TurnState {
    match state {
        HELD => TurnState::Held,
        GIVEN_BACK => TurnState::GivenBack,
        lost => TurnState::Lost(REASONS[usize::from(lost - FIRST_REASON)]),
    }
}

fn encode_loss(reason: LossReason) -> u8 {
    let index = REASONS
        .iter()
        .position(|known| *known == reason)
        .unwrap_or_default();
    FIRST_REASON + index as u8
}

impl Turn {
    pub(crate) fn new(coordinator: Arc<Coordinator>, cell: Arc<Cell>, granted: Granted) -> Self {
        Self {
            coordinator,
            cell,
            id: granted.id,
            claim: granted.claim,
            ends: granted.ends,
            deadline: AtomicU64::new(granted.deadline.as_nanos()),
            state: AtomicU8::new(HELD),
            given_back: AtomicBool::new(false),
            watcher: AtomicWaker::new(),
            lost: Notify::new(),
        }
    }

    pub(crate) fn id(&self) -> TurnId {
        self.id
    }

    pub(crate) fn key(&self) -> &str {
        self.cell.name.key()
    }

    /// Looks at the clock: a turn whose deadline has come is lost from then on, also if a renewal succeeds later.
    pub(crate) fn check(&self) -> TurnState {
        let state = decode(self.state.load(SeqCst));
        if state == TurnState::Held {
            let now = self.coordinator.clock.now();
            if now.as_nanos() >= self.deadline.load(SeqCst) {
                self.lose(if now >= self.ends {
                    LossReason::MaxHold
                } else {
                    LossReason::Expired
                });
                return decode(self.state.load(SeqCst));
            }
        }
        state
    }

    /// How long the lock can be relied on if no renewal succeeds from now on. Zero when it is lost or given back.
    pub(crate) fn remaining(&self) -> Duration {
        match self.check() {
            TurnState::Held => {
                let deadline = Timestamp::from_nanos(self.deadline.load(SeqCst));
                deadline.since(self.coordinator.clock.now())
            }
            _ => Duration::ZERO,
        }
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
            if let TurnState::Lost(reason) = self.check() {
                return reason;
            }
            notified.await;
        }
    }

    /// Tells the holder that the lock is no longer its own.
    pub(crate) fn lose(&self, reason: LossReason) {
        let told = self
            .state
            .compare_exchange(HELD, encode_loss(reason), SeqCst, SeqCst);
        if told.is_ok() {
            tracing::warn!(key = self.key(), %reason, "lock lost");
            self.watcher.wake();
            self.lost.notify_waiters();
        }
    }

    /// A renewal succeeded.
    pub(crate) fn prolong(&self, deadline: Timestamp) {
        self.deadline.fetch_max(deadline.as_nanos(), SeqCst);
    }

    /// Gives the turn back. Only the first call does anything; it says how the turn ended. `done` is told what the
    /// storage said, if it is asked.
    pub(crate) fn give_back(
        &self,
        done: Option<oneshot::Sender<Result<ReleaseReply, StorageError>>>,
    ) -> Option<Ended> {
        if self.given_back.swap(true, SeqCst) {
            return None;
        }
        let was_lost = matches!(self.check(), TurnState::Lost(_));
        let _ = self
            .state
            .compare_exchange(HELD, GIVEN_BACK, SeqCst, SeqCst);
        let ended = self
            .coordinator
            .turn_done(&self.cell, self.id, self.claim, done);
        Some(if was_lost { Ended::Lost } else { ended })
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn")
            .field("key", &self.key())
            .field("state", &decode(self.state.load(SeqCst)))
            .finish_non_exhaustive()
    }
}
