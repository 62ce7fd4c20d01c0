//! One key's state machine: who of this process waits for the key, whether this process owns it,
//! and who uses it.
//!
//! It does no I/O, reads no clock and takes no lock. Whoever drives it tells it what happened and
//! when, and carries out the [`Effects`] it answers with. So the same code runs in production and
//! under tests that try event orders no network would show in a year.
//!
//! # The path of a key
//!
//! ```text
//!            first in the queue polls                    granted
//!   Idle ───────────────────────────────▶ Asking ────────────────────▶ Held, no turn
//!    ▲ ▲                                  │    ▲                        │         ▲
//!    │ │             denied, or no answer │    │ time is up, the        │ first   │ turn done,
//!    │ │                                  ▼    │ first polls            │ polls   │ handed over
//!    │ │                                 BackOff                        ▼         │
//!    │ └────────────────── everybody left ┘                            Held, a turn
//!    └───────────────────────── given up, or lost ────────────────────────────────┘
//! ```
//!
//! - Only the **first in the queue** makes anything happen: it asks the storage, or takes over a
//!   lease. All others sleep until they are first.
//! - **One attempt at a time**: while `Asking`, nobody else asks. If the caller of an attempt
//!   leaves, the attempt is still followed to its reply; whoever is first then gets what it
//!   brought.
//! - A **lease** outlives a holder's turn: when a turn is done and somebody waits here, the next
//!   turn starts on the same lease, without a word to the storage. [`HandoffLimit`] bounds this, so
//!   that other processes get theirs.
//! - A lease that is **over** (its deadline passed, or the storage said "not yours") is never
//!   handed over and never comes back to life.
//!
//! # What holds at every moment
//!
//! At most one turn exists whose deadline lies ahead; turns are given in the order of arrival; a
//! token that is no longer of use has been, or is about to be, released.

use std::time::Duration;

use crate::{
    clock::Timestamp,
    coordinator::{
        lease::{Claim, Lease},
        queue::{Place, Queue},
    },
    error::{LossReason, StorageError},
    storage::OwnerToken,
};

/// How much a lease may serve the waiters of this process before it is given up for those of
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HandoffLimit {
    /// Turns on one lease.
    pub(crate) turns: u32,
    /// How long a lease may go on to new turns, from its first.
    pub(crate) time: Duration,
}

/// What a waiter wants, and how it is woken. `W` is the driver's way to wake it.
#[derive(Debug)]
struct Waiter<W> {
    ttl: Duration,
    max_hold: Duration,
    wake: Option<W>,
}

#[derive(Debug)]
enum Phase {
    /// This process neither owns the key nor asks for it.
    Idle,
    /// The first in the queue waits before it asks (again).
    BackOff {
        until: Timestamp,
        /// An attempt with this claim got no answer and may have been carried out: the next one
        /// uses its token again.
        unanswered: Option<Claim>,
        /// It was denied, perhaps because of our own old token, whose release is on its way.
        own_release: bool,
    },
    /// An attempt is on its way.
    Asking {
        claim: Claim,
        sent: Timestamp,
        /// An attempt with this claim before got no answer.
        repeated: bool,
        /// A release of ours was on its way when it was sent, and may be carried out after it.
        crosses_release: bool,
    },
    Held(Held),
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    turn: Option<Turn>,
    /// Turns that this lease has served, the present one included.
    turns: u32,
    since: Timestamp,
}

#[derive(Clone, Copy, Debug)]
struct Turn {
    id: TurnId,
    /// `max_hold` ends the turn here.
    until: Timestamp,
    /// The turn was told that it is over but has not been given back yet.
    revoked: bool,
}

/// One holder's turn on a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TurnId(u64);

/// A turn that was given to a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) id: TurnId,
    pub(crate) claim: Claim,
    /// The holder must not act at or past this moment, unless a renewal moves it.
    pub(crate) deadline: Timestamp,
    /// When `max_hold` ends it.
    pub(crate) ends: Timestamp,
    /// When the keeper has to look at this key next.
    pub(crate) due: Timestamp,
}

/// An attempt the driver has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) claim: Claim,
    /// Not the first try of this wait.
    pub(crate) again: bool,
}

/// What a waiter that was polled has to do.
#[derive(Debug)]
pub(crate) enum Step {
    /// It has the lock and is no longer in the queue.
    Granted(Granted),
    /// It has to send this attempt and to report the reply.
    Ask(Attempt),
    /// It has to come again at this moment, or when woken.
    AskAt(Timestamp),
    /// It will be woken.
    Wait,
}

/// What an attempt brought.
#[derive(Debug)]
pub(crate) enum Outcome {
    Granted,
    Denied { holder_ttl: Option<Duration> },
    Failed(StorageError),
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The lock was ours to the end; the next waiter of this process has it now.
    HandedOver,
    /// The lock was ours to the end; it is being released.
    Released,
    /// The turn had been lost before.
    Lost,
}

/// What the driver has to do after an event.
#[derive(Debug)]
#[must_use]
pub(crate) struct Effects<W> {
    /// Wake this waiter.
    pub(crate) wake: Option<W>,
    /// Release this claim in the storage and report with [`KeyState::release_done`] when it is
    /// done.
    pub(crate) release: Option<Claim>,
    /// Tell the present turn that it has lost the lock.
    pub(crate) lost: Option<LossReason>,
    /// Tell the present turn its new deadline.
    pub(crate) deadline: Option<Timestamp>,
    /// Let go of this one, which will not be woken: outside the key's lock, because that may run
    /// other code.
    pub(crate) old: Option<W>,
}

impl<W> Effects<W> {
    fn none() -> Self {
        Self {
            wake: None,
            release: None,
            lost: None,
            deadline: None,
            old: None,
        }
    }

    pub(crate) fn is_none(&self) -> bool {
        self.wake.is_none()
            && self.release.is_none()
            && self.lost.is_none()
            && self.deadline.is_none()
    }
}

/// What the keeper has to do about a key, and when to look again.
#[derive(Debug)]
pub(crate) struct Tick<W> {
    pub(crate) effects: Effects<W>,
    /// Renew this claim and report with [`KeyState::renewed`].
    pub(crate) renew: Option<Claim>,
    pub(crate) due: Option<Timestamp>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct KeyState<W> {
    queue: Queue<Waiter<W>>,
    phase: Phase,
    /// Releases that were sent and not answered. While there are any, a denial may be about our own
    /// old token.
    releasing: u32,
    /// Denials and failures in a row, since the key was last held or idle.
    failures: u32,
    next_turn: u64,
    /// What is known of a holder elsewhere: it keeps the lock until then, unless it renews or
    /// releases it.
    held_elsewhere: Option<Timestamp>,
    /// Why the last attempt failed, if it did.
    last_error: Option<StorageError>,
}

impl<W> KeyState<W> {
    pub(crate) const fn new() -> Self {
        Self {
            queue: Queue::new(),
            phase: Phase::Idle,
            releasing: 0,
            failures: 0,
            next_turn: 0,
            held_elsewhere: None,
            last_error: None,
        }
    }

    /// Whether there is nothing left to remember about this key.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.releasing == 0 && matches!(self.phase, Phase::Idle)
    }

    pub(crate) fn waiters(&self) -> usize {
        self.queue.len()
    }

    /// Whether a new arrival would have to wait behind a holder or waiters of this process.
    pub(crate) fn is_busy(&self) -> bool {
        let in_turn = matches!(&self.phase, Phase::Held(held) if held.turn.is_some());
        in_turn || !self.queue.is_empty()
    }

    /// How long the present holder's lock lasts at least, as far as known.
    pub(crate) fn holder_ttl(&self, now: Timestamp) -> Option<Duration> {
        let until = match &self.phase {
            Phase::Held(held) => held.lease.deadline,
            _ => self.held_elsewhere?,
        };
        (until > now).then(|| until.since(now))
    }

    /// Why the storage could not be asked last time, if it could not.
    pub(crate) fn last_error(&self) -> Option<&StorageError> {
        self.last_error.as_ref()
    }

    /// How many attempts in a row brought nothing.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// A caller wants the key.
    pub(crate) fn join(&mut self, ttl: Duration, max_hold: Duration) -> Place {
        self.queue.push(Waiter {
            ttl,
            max_hold,
            wake: None,
        })
    }

    /// A waiter asks what it has to do. It is woken by `wake` when there may be something.
    pub(crate) fn poll(
        &mut self,
        place: Place,
        now: Timestamp,
        wake: impl FnOnce() -> W,
        new_token: impl FnOnce() -> OwnerToken,
    ) -> (Step, Effects<W>) {
        let mut effects = Effects::none();
        let is_first = self.queue.is_first(place);
        let Some(waiter) = self.queue.get_mut(place) else {
            debug_assert!(false, "polled by a waiter that is not in the queue");
            return (Step::Wait, effects);
        };
        // A waiter that goes on by itself needs no waking.
        effects.old = waiter.wake.take();
        let (ttl, max_hold) = (waiter.ttl, waiter.max_hold);

        let unanswered = match &mut self.phase {
            _ if !is_first => {
                waiter.wake = Some(wake());
                return (Step::Wait, effects);
            }
            Phase::Asking { .. } | Phase::Held(Held { turn: Some(_), .. }) => {
                waiter.wake = Some(wake());
                return (Step::Wait, effects);
            }
            Phase::BackOff { until, .. } if *until > now => {
                waiter.wake = Some(wake());
                return (Step::AskAt(*until), effects);
            }
            // Carried out late, it would set its own ttl on the token.
            Phase::BackOff {
                unanswered: Some(claim),
                ..
            } if claim.ttl != ttl => {
                effects.release = Some(*claim);
                self.releasing += 1;
                None
            }
            Phase::BackOff { unanswered, .. } => *unanswered,
            Phase::Idle => None,
            Phase::Held(held) if held.lease.claim.ttl == ttl && !held.lease.is_over(now) => {
                let id = TurnId(self.next_turn);
                self.next_turn += 1;
                held.turns += 1;
                let turn = Turn {
                    id,
                    until: now + max_hold,
                    revoked: false,
                };
                held.turn = Some(turn);
                let granted = Granted {
                    id,
                    claim: held.lease.claim,
                    deadline: held.lease.deadline.min(turn.until),
                    ends: turn.until,
                    due: held.lease.renew_at.min(turn.until),
                };
                self.queue.remove(place);
                return (Step::Granted(granted), effects);
            }
            // A lease that is over, or lasts longer or shorter than this waiter wants.
            Phase::Held(held) => {
                effects.release = Some(held.lease.claim);
                self.releasing += 1;
                None
            }
        };

        let attempt = Attempt {
            claim: Claim {
                token: unanswered.map_or_else(new_token, |claim| claim.token),
                ttl,
            },
            again: unanswered.is_some() || self.failures > 0,
        };
        self.phase = Phase::Asking {
            claim: attempt.claim,
            sent: now,
            repeated: unanswered.is_some(),
            crosses_release: self.releasing > 0,
        };
        (Step::Ask(attempt), effects)
    }

    /// A waiter has gone without a turn: dropped, or out of time.
    pub(crate) fn leave(&mut self, place: Place) -> Effects<W> {
        let was_first = self.queue.is_first(place);
        let left = self.queue.remove(place);
        let mut effects = if self.queue.is_empty() {
            self.nobody_waits()
        } else if was_first {
            self.wake_first()
        } else {
            Effects::none()
        };
        effects.old = left.and_then(|waiter| waiter.wake);
        effects
    }

    /// An attempt has come to its end. `retry_at` is when to ask again if it brought nothing.
    pub(crate) fn replied(
        &mut self,
        claim: Claim,
        outcome: Outcome,
        now: Timestamp,
        retry_at: Timestamp,
    ) -> Effects<W> {
        let (sent, repeated, crosses_release) = match self.phase {
            Phase::Asking {
                claim: asked,
                sent,
                repeated,
                crosses_release,
            } if asked == claim => (sent, repeated, crosses_release),
            _ => {
                debug_assert!(false, "a reply that nothing asked for");
                return self.release(claim);
            }
        };
        let mut until = retry_at;
        let mut own_release = false;
        let unanswered = match outcome {
            Outcome::Granted => {
                self.held_elsewhere = None;
                self.last_error = None;
                let lease = Lease::granted(claim, sent);
                if lease.is_over(now) {
                    // The reply lay somewhere for longer than the lease lasts. The next one may
                    // too, so not at once.
                    self.failures = self.failures.saturating_add(1);
                    self.phase = if self.queue.is_empty() {
                        Phase::Idle
                    } else {
                        Phase::BackOff {
                            until,
                            unanswered: None,
                            own_release: false,
                        }
                    };
                    let mut effects = self.wake_first();
                    effects.release = self.release(claim).release;
                    return effects;
                }
                self.failures = 0;
                self.phase = Phase::Held(Held {
                    lease,
                    turn: None,
                    turns: 0,
                    since: now,
                });
                if self.queue.is_empty() {
                    return self.nobody_waits();
                }
                return self.wake_first();
            }
            Outcome::Denied { holder_ttl } => {
                self.last_error = None;
                self.held_elsewhere = holder_ttl.map(|ttl| now + ttl);
                // It may have met our own old token. That is gone by now, or will be when its
                // release is done.
                own_release = crosses_release;
                if own_release && self.releasing == 0 {
                    until = now;
                }
                None
            }
            Outcome::Failed(error) => {
                // A refusal says that this one was not carried out, and nothing of those before it.
                let open = repeated || error.kind().is_transient();
                self.last_error = Some(error);
                open.then_some(claim)
            }
        };
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::BackOff {
            until,
            unanswered,
            own_release,
        };
        if self.queue.is_empty() {
            self.nobody_waits()
        } else {
            self.wake_first()
        }
    }

    /// A holder gives its turn back.
    pub(crate) fn turn_done(
        &mut self,
        id: TurnId,
        claim: Claim,
        limit: HandoffLimit,
        now: Timestamp,
    ) -> (Ended, Effects<W>) {
        let (lease, turn, turns, since) = match &mut self.phase {
            Phase::Held(held) => match held.turn {
                Some(turn) if turn.id == id => {
                    held.turn = None;
                    (&held.lease, turn, held.turns, held.since)
                }
                _ => return (Ended::Lost, self.release(claim)),
            },
            // The lease was lost while the turn went on. A renewal that was on its way then may
            // have prolonged it in the storage; if so, free it.
            _ => return (Ended::Lost, self.release(claim)),
        };
        let ended = if turn.revoked || lease.is_over(now) || now >= turn.until {
            Ended::Lost
        } else {
            Ended::Released
        };
        let ttl = lease.claim.ttl;
        let go_on = ended == Ended::Released
            && self.queue.first_mut().is_some_and(|next| next.ttl == ttl)
            && lease.can_be_handed_over(now)
            && turns < limit.turns
            && now.since(since) < limit.time;
        if go_on {
            return (Ended::HandedOver, self.wake_first());
        }
        self.phase = Phase::Idle;
        let mut effects = self.wake_first();
        effects.release = self.release(claim).release;
        (ended, effects)
    }

    /// A release has come to its end, whatever the storage said.
    pub(crate) fn release_done(&mut self) -> Effects<W> {
        debug_assert!(self.releasing > 0, "a release that nothing asked for");
        self.releasing = self.releasing.saturating_sub(1);
        match &mut self.phase {
            Phase::BackOff {
                until,
                own_release: true,
                ..
            } => {
                *until = Timestamp::from_nanos(0);
                self.wake_first()
            }
            _ => Effects::none(),
        }
    }

    /// Takes the present turn away for a reason that has nothing to do with the storage. Its lease
    /// is released when the turn is given back, or left to expire.
    pub(crate) fn revoke(&mut self) -> bool {
        match &mut self.phase {
            Phase::Held(Held {
                turn: Some(turn), ..
            }) => !std::mem::replace(&mut turn.revoked, true),
            _ => false,
        }
    }

    /// Looks at the time.
    pub(crate) fn tick(&mut self, now: Timestamp) -> Tick<W> {
        let mut tick = Tick {
            effects: Effects::none(),
            renew: None,
            due: None,
        };
        let Phase::Held(held) = &mut self.phase else {
            return tick;
        };
        if held.lease.is_over(now) {
            let (claim, turn) = (held.lease.claim, held.turn);
            tick.effects = self.lose(LossReason::Expired);
            if turn.is_none_or(|turn| turn.revoked) {
                tick.effects.lost = None;
            }
            // With a turn, its end brings the release.
            if turn.is_none() {
                tick.effects.release = self.release(claim).release;
            }
            return tick;
        }
        // Without a turn nothing is renewed: a waiter that was given the lease and is never polled
        // must not keep it from the rest of the world.
        if let Some(turn) = &mut held.turn
            && !turn.revoked
        {
            if now >= turn.until {
                turn.revoked = true;
                tick.effects.lost = Some(LossReason::MaxHold);
            } else {
                if held.lease.renewal_is_due(now) {
                    held.lease.renewing = true;
                    tick.renew = Some(held.lease.claim);
                }
            }
        }
        tick.due = self.due();
        tick
    }

    /// When to look at the time again.
    pub(crate) fn due(&self) -> Option<Timestamp> {
        let Phase::Held(held) = &self.phase else {
            return None;
        };
        let mut due = held.lease.deadline;
        if let Some(turn) = &held.turn
            && !turn.revoked
        {
            due = due.min(turn.until);
            if !held.lease.renewing {
                due = due.min(held.lease.renew_at);
            }
        }
        Some(due)
    }

    /// A renewal that was sent at `sent` has come to its end: `Some(true)` renewed, `Some(false)`
    /// not ours, `None` no answer.
    pub(crate) fn renewed(
        &mut self,
        claim: Claim,
        sent: Timestamp,
        reply: Option<bool>,
        now: Timestamp,
    ) -> Effects<W> {
        let held = match &mut self.phase {
            Phase::Held(held) if held.lease.claim == claim => held,
            // Lost or given up meanwhile. The renewal may have been carried out after the release.
            _ if reply == Some(true) => return self.release(claim),
            _ => return Effects::none(),
        };
        match reply {
            // Too late: for a while nothing kept others out. A success now must not hide that.
            Some(true) if held.lease.is_over(now) => {
                let mut effects = self.lose(LossReason::Expired);
                effects.release = self.release(claim).release;
                effects
            }
            Some(true) => {
                held.lease.renewed(sent);
                let mut effects = Effects::none();
                effects.deadline = held.turn.map(|turn| held.lease.deadline.min(turn.until));
                effects
            }
            Some(false) => self.lose(LossReason::NotOurs),
            None => {
                held.lease.renewal_failed(now);
                Effects::none()
            }
        }
    }

    /// Takes the wakers of all waiters, so that each looks at the world again.
    pub(crate) fn wake_all(&mut self) -> Vec<W> {
        self.queue
            .iter_mut()
            .filter_map(|waiter| waiter.wake.take())
            .collect()
    }

    fn lose(&mut self, reason: LossReason) -> Effects<W> {
        self.phase = Phase::Idle;
        let mut effects = self.wake_first();
        effects.lost = Some(reason);
        effects
    }

    /// The last waiter has gone: what was got or asked for on its account is given back.
    fn nobody_waits(&mut self) -> Effects<W> {
        let claim = match &self.phase {
            Phase::Held(held) if held.turn.is_none() => Some(held.lease.claim),
            Phase::BackOff { unanswered, .. } => *unanswered,
            // The reply, or the end of the turn, brings us back here.
            Phase::Held(_) | Phase::Asking { .. } | Phase::Idle => return Effects::none(),
        };
        self.phase = Phase::Idle;
        self.failures = 0;
        claim.map_or_else(Effects::none, |claim| self.release(claim))
    }

    fn release(&mut self, claim: Claim) -> Effects<W> {
        self.releasing += 1;
        let mut effects = Effects::none();
        effects.release = Some(claim);
        effects
    }

    fn wake_first(&mut self) -> Effects<W> {
        let mut effects = Effects::none();
        effects.wake = self.queue.first_mut().and_then(|waiter| waiter.wake.take());
        effects
    }
}

#[cfg(test)]
#[path = "key_state_tests.rs"]
mod tests;
