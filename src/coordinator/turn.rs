//! One holder's turn: the way to look at its lock and to give it back.

use std::{fmt, ops::Deref, sync::OnceLock, task::Waker, time::Duration};

use tracing::Span;

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator,
        key_events::{Ended, Granted, Source, TurnId},
        lease::Claim,
        observe::{self, Observed},
        release::Release,
        signal::{Holding, Signal},
        spin::Thread,
        table::Cell,
    },
    error::LossReason,
    key::LockName,
    storage::OwnerToken,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// Shared by the guard of a lock and its handles. It can be looked at as the [`Signal`] it holds.
pub(crate) struct Turn {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    id: TurnId,
    claim: Claim,
    source: Source,
    waited: Duration,
    fencing: Option<u64>,
    since: Timestamp,
    began_on: Thread,
    signal: Signal,
    given_back: AtomicBool,
    /// The lock is the next one's, or nobody's.
    is_over: AtomicBool,
    /// Its loss has been told of.
    loss_is_told: AtomicBool,
    /// Unset where nobody looks.
    observed: OnceLock<Mutex<Observed>>,
}

impl Turn {
    pub(super) fn new(
        coordinator: Arc<Coordinator>,
        cell: Arc<Cell>,
        granted: Granted,
        since: Timestamp,
        waited: Duration,
    ) -> Self {
        Self {
            signal: Signal::new(coordinator.clock, granted.deadline, granted.ends),
            coordinator,
            cell,
            id: granted.id,
            claim: granted.claim,
            source: granted.source,
            waited,
            fencing: granted.fencing,
            since,
            began_on: Thread::here(),
            given_back: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            loss_is_told: AtomicBool::new(false),
            observed: OnceLock::new(),
        }
    }

    pub(super) fn id(&self) -> TurnId {
        self.id
    }

    /// The owner token of its lease.
    pub(super) fn token(&self) -> OwnerToken {
        self.claim.token
    }

    /// When it began.
    pub(super) fn since(&self) -> Timestamp {
        self.since
    }

    /// Which thread polled its holder then.
    pub(super) fn began_on(&self) -> Thread {
        self.began_on
    }

    /// Whether the lock is the next one's, or nobody's.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(SeqCst)
    }

    /// The key has been told that it was given back.
    pub(super) fn ends(&self) {
        self.is_over.store(true, SeqCst);
    }

    /// For how long it has gone on.
    pub(crate) fn age(&self) -> Duration {
        self.coordinator.clock.now().since(self.since)
    }

    pub(crate) fn name(&self) -> &LockName {
        &self.cell.name
    }

    /// How long its holder waited for it.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    pub(crate) fn fencing_token(&self) -> Option<u64> {
        self.fencing
    }

    /// From now on the caller that is given this turn is seen as its holder.
    pub(super) fn observe(&self, mut observed: Observed, now: Timestamp) {
        if !observed.is_none() {
            observed.acquired(self.source, self.fencing, now);
            let _ = self.observed.set(Mutex::new(observed));
        }
    }

    /// The loss is seen from outside, also if the holder does not react, and whoever notices it
    /// first. Once.
    pub(super) fn tell_loss(&self, reason: LossReason) {
        if self.loss_is_told.swap(true, SeqCst) {
            return;
        }
        let mut span = Span::none();
        if let Some(observed) = self.observed.get() {
            let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
            observed.lost(reason);
            span = observed.span();
        }
        observe::warn_of_loss(span, self.name().key(), reason);
    }

    /// The lock's span, until it is given back.
    pub(crate) fn span(&self) -> Span {
        let observed = self.observed.get();
        observed.map_or_else(Span::none, |observed| {
            let observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
            observed.span()
        })
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
        self.end(false)
    }

    /// The same when a request is done: others like it may follow, so a lease that is hot is kept for
    /// a moment.
    pub(crate) fn hand_over(&self) -> Option<(Ended, Option<Release>)> {
        self.end(true)
    }

    fn end(&self, is_request: bool) -> Option<(Ended, Option<Release>)> {
        if self.given_back.swap(true, SeqCst) {
            return None;
        }
        let now = self.coordinator.clock.now();
        let mut loss = match self.signal.look_at(now) {
            Holding::Lost(reason) => Some(reason),
            _ => None,
        };
        self.signal.give_back();
        let (ended, known, release) = self
            .coordinator
            .turn_done(&self.cell, self.id, self.claim, is_request, now);
        if ended == Ended::Lost {
            // Lost at this very moment: nobody was told yet.
            let guess = match self.coordinator.is_draining() {
                true => LossReason::Draining,
                false => LossReason::NotOurs,
            };
            loss = loss.or(known).or(Some(guess));
        }
        if let Some(reason) = loss {
            self.tell_loss(reason);
        }
        if let Some(observed) = self.observed.get() {
            let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *observed).ended(now);
        }
        let ended = loss.map_or(ended, |_| Ended::Lost);
        Some((ended, release))
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
            .field("key", &self.name().key())
            .field("signal", &self.signal)
            .finish_non_exhaustive()
    }
}
