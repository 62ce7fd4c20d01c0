//! One holder's turn: the way to look at its lock and to give it back.

use std::{
    fmt,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::Waker,
};

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        key_events::{Ended, Granted, TurnId},
        lease::Claim,
        release::Release,
        signal::{Holding, Signal},
        table::Cell,
    },
    error::LossReason,
};

/// Shared by the guard of a lock and its handles. It can be looked at as the [`Signal`] it holds.
pub(crate) struct Turn {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    id: TurnId,
    claim: Claim,
    fencing: Option<u64>,
    since: Timestamp,
    signal: Signal,
    given_back: AtomicBool,
}

impl Turn {
    pub(super) fn new(
        coordinator: Arc<Coordinator>,
        cell: Arc<Cell>,
        granted: Granted,
        since: Timestamp,
    ) -> Self {
        Self {
            signal: Signal::new(coordinator.clock, granted.deadline, granted.ends),
            coordinator,
            cell,
            id: granted.id,
            claim: granted.claim,
            fencing: granted.fencing,
            since,
            given_back: AtomicBool::new(false),
        }
    }

    pub(super) fn id(&self) -> TurnId {
        self.id
    }

    /// When it began.
    pub(super) fn since(&self) -> Timestamp {
        self.since
    }

    pub(crate) fn key(&self) -> &str {
        self.cell.name.key()
    }

    pub(crate) fn fencing_token(&self) -> Option<u64> {
        self.fencing
    }

    /// Has `waker` woken when the lock is lost, and sees to it that somebody is there to do so.
    pub(crate) fn watch(&self, waker: &Waker) {
        self.signal.watch(waker);
        self.coordinator.keeper.ensure_running(&self.coordinator);
    }

    /// Waits until the lock is lost. If it is given back first, this never ends.
    pub(crate) async fn lost(&self) -> LossReason {
        self.coordinator.keeper.ensure_running(&self.coordinator);
        self.signal.lost().await
    }

    /// Gives the turn back. Only the first call does anything; it says how the turn ended, and has
    /// the release if one was sent.
    pub(crate) fn give_back(&self) -> Option<(Ended, Option<Release>)> {
        if self.given_back.swap(true, SeqCst) {
            return None;
        }
        let now = self.coordinator.clock.now();
        let was_lost = matches!(self.signal.look_at(now), Holding::Lost(_));
        self.signal.give_back();
        let (ended, release) = self
            .coordinator
            .turn_done(&self.cell, self.id, self.claim, now);
        Some((if was_lost { Ended::Lost } else { ended }, release))
    }
}

impl Deref for Turn {
    type Target = Signal;

    fn deref(&self) -> &Signal {
        &self.signal
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn")
            .field("key", &self.key())
            .field("signal", &self.signal)
            .finish_non_exhaustive()
    }
}
