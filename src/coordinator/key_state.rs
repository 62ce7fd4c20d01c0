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
//! - In `BackOff` a **place in the storage's queue** is kept, if the storage gave one: when a
//!   message says that the lock is ours now, `BackOff` becomes `Held` without another attempt. The
//!   timer is for messages that never come.
//! - A lock **in parts**, as of several servers, has no queue: whoever waits is told when it is free,
//!   and asks after a random time. Each attempt has a token of its own, and one that was not granted
//!   is released at once: it may have got some of the parts.
//! - A **lease** outlives a holder's turn: when a turn is done and somebody waits here, the next
//!   turn starts on the same lease, without a word to the storage. Once another process wants it,
//!   [`HandoffLimit`] bounds this; then the lease is given up, and by the same step those who still
//!   wait here get a new place in the storage's queue (`Asking`).
//! - Each turn has a **fencing token** of its own, from the block that came with the lease. When the
//!   block is used up, the lease is given up, and the next one comes with more.
//! - A lease that nobody wants may be kept **idle** for a while, and is given back as soon as another
//!   process wants it. One that this process had come back for at once is **hot**, and may be kept for
//!   a moment.
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
        key_events::{
            Attempt, Effects, Ended, GiveBack, Granted, Outcome, Rejoin, Renewed, Sharing, Source,
            Step, Tick, TurnId,
        },
        lease::{Baseline, Claim, HOT, Lease, fencing_wanted},
        queue::{Place, Queue},
    },
    error::{LossReason, StorageError},
    storage::{OwnerToken, PushedGrant},
};

/// What a waiter wants, and how it is woken. `W` is the driver's way to wake it.
#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
struct Waiter<W> {
    ttl: Duration,
    max_hold: Duration,
    interval: Duration,
    wake: Option<W>,
    /// It is there for the outcome of one attempt, its own or another's.
    is_hurried: bool,
}

#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
enum Phase {
    /// This process neither owns the key nor asks for it.
    Idle,
    /// The first in the queue waits before it asks (again).
    BackOff {
        until: Timestamp,
        /// What an earlier attempt may have left in the storage.
        open: Option<Open>,
        /// It was denied, perhaps because of our own old token, whose release is on its way.
        own_release: bool,
        /// The word that the lock is free has been heard, and is no more news.
        told_free: bool,
    },
    /// An attempt is on its way.
    Asking {
        claim: Claim,
        sent: Timestamp,
        /// An attempt with this claim came before.
        repeated: bool,
        /// From that attempt, if it was given a place in the storage's queue.
        baseline: Option<Baseline>,
        /// A grant that arrived before the reply. In a box: it is rare, and the phase is moved with
        /// each lock.
        pushed: Option<Box<PushedGrant>>,
        /// Messages may have been missed since it was sent: a denial is not the last word.
        ask_again: bool,
        /// A release of ours was on its way when it was sent, and may be carried out after it.
        crosses_release: bool,
        /// That of a turn that had ended a moment before.
        is_hot: bool,
        /// Since it was sent, the lock was said to be free.
        told_free: bool,
        /// Since it was sent, the lock was said to have been given to it and taken away again.
        told_of_force: bool,
    },
    Held(Held),
}

/// A claim that the storage may know of: an attempt with it got no answer and may have been carried
/// out, or it stands in the storage's queue. The next attempt uses its token again, if the lock is
/// not in parts, to find out; the storage never gives a lock twice to one token.
#[derive(Clone, Copy, Debug)]
struct Open {
    claim: Claim,
    /// Since when it stands in the queue, if it is known to.
    baseline: Option<Baseline>,
}

#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
struct Held {
    lease: Lease,
    turn: Option<Turn>,
    /// What the lease served, from when it had to be shared.
    served: Served,
    /// Without a turn and without waiters, it is kept for a while.
    idle: Option<Idle>,
    doubt: Doubt,
}

/// Whether somebody said that the lock was taken away by force. Anybody may say so, rightly or not:
/// what a renewal sent since then finds is believed. Nobody else begins a turn until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    No,
    /// A renewal has to be sent, also if one is on its way: that may have been carried out before.
    Yes,
    /// The renewal is on its way.
    Asked,
}

/// A lease that is kept for whoever comes.
#[derive(Clone, Copy, Debug)]
struct Idle {
    until: Timestamp,
    /// It is but a moment, for which the driver has a timer of its own.
    is_brief: bool,
}

/// How much of a lease was used while others waited for it.
#[derive(Clone, Copy, Debug)]
struct Served {
    turns: u32,
    since: Timestamp,
}

/// A lease that is over.
#[derive(Clone, Copy, Debug)]
struct Lost {
    claim: Claim,
    /// It was lost by a holder.
    in_turn: bool,
    reason: LossReason,
}

#[derive(Clone, Copy, Debug)]
struct Turn {
    id: TurnId,
    /// `max_hold` ends the turn here.
    until: Timestamp,
    /// The turn was told that it is over but has not been given back yet.
    revoked: bool,
}

/// See the [module documentation](self).
#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
pub(crate) struct KeyState<W> {
    queue: Queue<Waiter<W>>,
    phase: Phase,
    /// Releases that were sent and not answered. While there are any, a denial may be about our own
    /// old token.
    releasing: u32,
    /// When a turn ended last with which the lease was given back, and nobody known to want it.
    gave_back: Option<Timestamp>,
    /// Denials and failures in a row, since the key was last held or idle.
    failures: u32,
    next_turn: u64,
    /// What is known of a holder elsewhere: it keeps the lock until then, unless it renews or
    /// releases it.
    held_elsewhere: Option<Timestamp>,
    /// Why the last attempt failed, if it did.
    last_error: Option<StorageError>,
    /// Whether others wait for the lease that we have or are about to get. Only a storage with a
    /// queue tells.
    wanted: bool,
    /// The lease that was lost last. A renewal that was on its way then may have prolonged it.
    lost: Option<Lost>,
    /// How many fencing tokens the last lease could have used.
    fencing_used: u32,
    /// The storage keeps locks in parts.
    in_parts: bool,
    /// Attempts in a row that got but parts of the lock, as those of others did.
    splits: u32,
    /// How many attempts have had an outcome: by this a caller knows one that it has seen from one
    /// that came since.
    landed: u32,
    /// How many of those in the queue are hurried.
    hurried: u32,
}

impl Held {
    /// A lease that has served a turn goes on only with enough time and a token for the next.
    fn can_begin_turn(&self, ttl: Duration, now: Timestamp) -> bool {
        let is_fit = self.lease.turns() == 0 || self.lease.can_be_handed_over(now);
        is_fit
            && !self.lease.fencing_is_used_up()
            && self.lease.claim.ttl == ttl
            && !self.lease.is_over(now)
    }

    /// Between turns nothing is renewed: a waiter that was given the lease and is never polled must
    /// not keep it from the rest of the world.
    fn is_renewed(&self) -> bool {
        let in_turn = self.turn.as_ref().is_some_and(|turn| !turn.revoked);
        in_turn || self.idle.is_some()
    }
}

impl<W> KeyState<W> {
    pub(crate) const fn new() -> Self {
        Self {
            queue: Queue::new(),
            phase: Phase::Idle,
            releasing: 0,
            gave_back: None,
            failures: 0,
            next_turn: 0,
            held_elsewhere: None,
            last_error: None,
            wanted: false,
            lost: None,
            fencing_used: 0,
            in_parts: false,
            splits: 0,
            landed: 0,
            hurried: 0,
        }
    }

    /// The same for a storage that keeps locks in parts, or not.
    pub(crate) fn in_parts(self, in_parts: bool) -> Self {
        Self { in_parts, ..self }
    }

    pub(crate) fn is_in_parts(&self) -> bool {
        self.in_parts
    }

    /// Whether there is nothing left to remember about this key.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.releasing == 0 && matches!(self.phase, Phase::Idle)
    }

    pub(crate) fn waiters(&self) -> usize {
        self.queue.len()
    }

    /// Whether somebody is known to have the lock, or to be given it, before a new arrival: a holder
    /// or waiters of this process, or whoever those waiters wait for. While a first answer of the
    /// storage is waited for, nobody is.
    pub(crate) fn is_busy(&self, now: Timestamp) -> bool {
        match &self.phase {
            Phase::Held(held) => held.turn.is_some() || !self.queue.is_empty(),
            Phase::BackOff { .. } => !self.queue.is_empty(),
            Phase::Idle | Phase::Asking { .. } => {
                !self.queue.is_empty() && self.holder_ttl(now).is_some()
            }
        }
    }

    /// How many attempts have had an outcome.
    pub(crate) fn landed(&self) -> u32 {
        self.landed
    }

    /// Whether an attempt is on its way.
    pub(crate) fn is_asking(&self) -> bool {
        matches!(self.phase, Phase::Asking { .. })
    }

    /// Whether the lock is there for the first in the queue, and this is it.
    pub(crate) fn is_for(&self, place: Place) -> bool {
        let is_free = matches!(&self.phase, Phase::Held(held) if held.turn.is_none());
        is_free && self.queue.is_first(place)
    }

    /// Whose the lock is, if it is this process's.
    pub(crate) fn owner(&self) -> Option<OwnerToken> {
        match &self.phase {
            Phase::Held(held) => Some(held.lease.claim.token),
            _ => None,
        }
    }

    /// Whether the lock is this token's, is asked for with it, or may be again.
    pub(crate) fn uses(&self, token: OwnerToken) -> bool {
        let claim = match &self.phase {
            Phase::Idle => None,
            Phase::BackOff { open, .. } => open.as_ref().map(|open| open.claim),
            Phase::Asking { claim, .. } => Some(*claim),
            Phase::Held(held) => Some(held.lease.claim),
        };
        claim.is_some_and(|claim| claim.token == token)
    }

    /// Whether a release is on its way.
    pub(crate) fn is_releasing(&self) -> bool {
        self.releasing > 0
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

    /// Why the lease of this claim was lost, if it was the last one that was.
    pub(crate) fn loss(&self, claim: Claim) -> Option<LossReason> {
        let lost = self.lost.filter(|lost| lost.claim == claim);
        lost.map(|lost| lost.reason)
    }

    /// How many attempts in a row brought nothing.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// How many attempts in a row got but parts of the lock.
    pub(crate) fn splits(&self) -> u32 {
        self.splits
    }

    /// Whether the lock was said to be free since the present attempt was sent.
    pub(crate) fn was_told_free(&self) -> bool {
        matches!(
            self.phase,
            Phase::Asking {
                told_free: true,
                ..
            }
        )
    }

    /// A caller wants the key.
    pub(crate) fn join(&mut self, ttl: Duration, max_hold: Duration, interval: Duration) -> Place {
        self.queue.push(Waiter {
            ttl,
            max_hold,
            interval,
            wake: None,
            is_hurried: false,
        })
    }

    /// This one does not wait for the lock, but for the outcome of an attempt that may be another's.
    pub(crate) fn hurry(&mut self, place: Place) {
        if let Some(waiter) = self.queue.get_mut(place)
            && !std::mem::replace(&mut waiter.is_hurried, true)
        {
            self.hurried += 1;
        }
    }

    /// Takes the wakers of those for whom the outcome of an attempt is the last word.
    pub(crate) fn wake_hurried(&mut self) -> Vec<W> {
        if self.hurried == 0 {
            return Vec::new();
        }
        let hurried = self.queue.iter_mut().filter(|waiter| waiter.is_hurried);
        hurried.filter_map(|waiter| waiter.wake.take()).collect()
    }

    fn remove(&mut self, place: Place) -> Option<Waiter<W>> {
        let removed = self.queue.remove(place)?;
        self.hurried -= u32::from(removed.is_hurried);
        Some(removed)
    }

    /// A caller that does not wait asks at once, or not at all.
    pub(crate) fn stop_giving_way(&mut self) {
        if matches!(self.phase, Phase::BackOff { .. }) && self.queue.is_empty() {
            self.phase = Phase::Idle;
        }
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

        let open = match &mut self.phase {
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
            // A fresh token for each attempt: parts that are released late must not be those of the
            // next.
            Phase::BackOff { .. } if self.in_parts => None,
            // Carried out late, it would set its own ttl on the token.
            Phase::BackOff {
                open: Some(open), ..
            } if open.claim.ttl != ttl => {
                let claim = open.claim;
                effects.release = self.release(claim).release;
                None
            }
            Phase::BackOff { open, .. } => *open,
            Phase::Idle => None,
            Phase::Held(held) if held.can_begin_turn(ttl, now) => {
                let source = match held.idle.take() {
                    Some(_) => Source::Linger,
                    None => held.lease.source(),
                };
                let id = TurnId(self.next_turn);
                self.next_turn += 1;
                held.served.turns += 1;
                let turn = Turn {
                    id,
                    until: now + max_hold,
                    revoked: false,
                };
                held.turn = Some(turn);
                let granted = Granted {
                    id,
                    claim: held.lease.claim,
                    source,
                    fencing: held.lease.begin_turn(),
                    deadline: held.lease.deadline.min(turn.until),
                    ends: turn.until,
                };
                self.remove(place);
                return (Step::Granted(granted), effects);
            }
            // A lease that is over, or has too little left of its time or its tokens, or lasts
            // longer or shorter than this waiter wants.
            Phase::Held(held) => {
                let claim = held.lease.claim;
                effects.release = self.release(claim).release;
                None
            }
        };

        let attempt = Attempt {
            claim: Claim {
                token: open.map_or_else(new_token, |open| open.claim.token),
                ttl,
            },
            again: open.is_some() || self.failures > 0,
            repeated: open.is_some(),
            fencing: fencing_wanted(self.queue.len(), self.fencing_used),
        };
        let gave_back = self.gave_back.take();
        let is_hot = self.releasing > 0 && gave_back.is_some_and(|at| now.since(at) <= HOT);
        // What was known of an earlier lease.
        self.wanted = false;
        self.phase = Phase::Asking {
            claim: attempt.claim,
            sent: now,
            repeated: open.is_some(),
            baseline: open.and_then(|open| open.baseline),
            pushed: None,
            ask_again: false,
            crosses_release: self.releasing > 0,
            is_hot,
            told_free: false,
            told_of_force: false,
        };
        (Step::Ask(attempt), effects)
    }

    /// A waiter has gone without a turn: dropped, or out of time.
    pub(crate) fn leave(&mut self, place: Place) -> Effects<W> {
        let was_first = self.queue.is_first(place);
        let left = self.remove(place);
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
        let (sent, repeated, baseline, pushed, ask_again, crosses_release, is_hot, forced) =
            match &mut self.phase {
                Phase::Asking {
                    claim: asked,
                    sent,
                    repeated,
                    baseline,
                    pushed,
                    ask_again,
                    crosses_release,
                    is_hot,
                    told_free: _,
                    told_of_force,
                } if *asked == claim => (
                    *sent,
                    *repeated,
                    *baseline,
                    pushed.take(),
                    *ask_again,
                    *crosses_release,
                    *is_hot,
                    *told_of_force,
                ),
                _ => {
                    debug_assert!(false, "a reply that nothing asked for");
                    return self.release(claim);
                }
            };
        self.phase = Phase::Idle;
        // Otherwise nothing was learnt, and the first in the queue asks at once.
        if !matches!(outcome, Outcome::NotQueued) {
            self.landed = self.landed.wrapping_add(1);
        }
        // Parts without the whole are given back anyway.
        if forced && (!self.in_parts || matches!(outcome, Outcome::Granted { .. })) {
            return self.got_and_lost(claim, outcome, now, retry_at);
        }

        let mut until = retry_at;
        let mut own_release = false;
        let mut left_behind = false;
        let open = match outcome {
            Outcome::Granted { wanted, fencing } => {
                self.wanted |= wanted || ask_again;
                self.held_elsewhere = None;
                self.last_error = None;
                let mut lease = Lease::granted(claim, sent, fencing);
                lease.is_hot = is_hot;
                if lease.is_over(now) {
                    // The reply lay somewhere for longer than the lease lasts. The next one may
                    // too, so not at once.
                    self.failures = self.failures.saturating_add(1);
                    return self.give_up(claim, until);
                }
                return self.hold(lease, now);
            }
            // The next attempt is a new one.
            Outcome::NotQueued => {
                let mut effects = self.wake_first();
                // Where it was given the lock, nobody looks at it any more.
                if pushed.is_some() {
                    effects.release = self.release(claim).release;
                }
                return effects;
            }
            outcome if self.in_parts => {
                return self.got_parts(claim, outcome, ask_again, now, until);
            }
            Outcome::Undecided => None,
            Outcome::Denied { holder_ttl, queued } => {
                self.last_error = None;
                self.held_elsewhere = holder_ttl.map(|ttl| now + ttl);
                // It may have met our own old token. That is gone by now, or will be when its
                // release is done.
                own_release = crosses_release;
                if ask_again || own_release && self.releasing == 0 {
                    until = now;
                }
                // Asked for without a place, it may still stand there from before.
                let baseline = queued.map(|stamp| Baseline { sent, stamp }).or(baseline);
                // And an attempt without an answer may have left a place that nothing is known of.
                left_behind = repeated && baseline.is_none();
                baseline.map(|baseline| Open {
                    claim,
                    baseline: Some(baseline),
                })
            }
            Outcome::Failed(error) => {
                // A refusal says that this one was not carried out, and nothing of those before it.
                let open = repeated || error.kind().is_transient();
                self.last_error = Some(error);
                open.then_some(Open { claim, baseline })
            }
        };
        // A grant for a token that is of no use any more: nobody would look at it.
        left_behind |= pushed.is_some() && open.is_none();
        self.failures = self.failures.saturating_add(1);
        self.back_off(until, open, own_release);
        let mut effects = match pushed {
            Some(pushed) if open.is_some() => self.pushed(&pushed, now),
            _ if self.queue.is_empty() => self.nobody_waits(),
            _ => self.wake_first(),
        };
        if left_behind {
            effects.release = self.release(claim).release;
        }
        effects
    }

    /// What this attempt was given is said to have been taken away already. Its token is of no use
    /// any more, whatever the reply is.
    fn got_and_lost(
        &mut self,
        claim: Claim,
        outcome: Outcome,
        now: Timestamp,
        retry_at: Timestamp,
    ) -> Effects<W> {
        let until = match outcome {
            Outcome::Failed(error) => {
                self.last_error = Some(error);
                self.failures = self.failures.saturating_add(1);
                retry_at
            }
            _ => {
                self.last_error = None;
                now
            }
        };
        self.give_up(claim, until)
    }

    /// Gives back what this claim may have. The next attempt is a new one.
    fn give_up(&mut self, claim: Claim, until: Timestamp) -> Effects<W> {
        self.back_off(until, None, false);
        let mut effects = self.wake_first();
        effects.release = self.release(claim).release;
        effects
    }

    /// An attempt at a lock in parts was not granted. What it may have got is given back, and what
    /// it may have left for us to be told is known by its claim, until nobody waits any more.
    fn got_parts(
        &mut self,
        claim: Claim,
        outcome: Outcome,
        ask_again: bool,
        now: Timestamp,
        mut until: Timestamp,
    ) -> Effects<W> {
        self.failures = self.failures.saturating_add(1);
        self.splits = match &outcome {
            Outcome::Undecided => self.splits.saturating_add(1),
            _ => 0,
        };
        let quiet = !matches!(outcome, Outcome::Failed(_));
        match outcome {
            Outcome::Failed(error) => self.last_error = Some(error),
            Outcome::Denied { holder_ttl, .. } => {
                self.last_error = None;
                self.held_elsewhere = holder_ttl.map(|ttl| now + ttl);
            }
            _ => self.last_error = None,
        }
        if ask_again && quiet {
            until = now;
        }
        let open = Open {
            claim,
            baseline: None,
        };
        self.back_off(until, Some(open), false);
        if self.queue.is_empty() {
            return self.nobody_waits();
        }
        let mut effects = self.wake_first();
        effects.release = self
            .release(claim)
            .release
            .map(|give_back| GiveBack { quiet, ..give_back });
        effects
    }

    /// The lock, or a part of it, was said to be free. Of those who hear this at the same time each
    /// asks at a time of its own: this one at `ask_at`.
    pub(crate) fn free(&mut self, ask_at: Timestamp) -> Effects<W> {
        match &mut self.phase {
            Phase::Asking { told_free, .. } => {
                *told_free = true;
                Effects::none()
            }
            Phase::BackOff {
                until, told_free, ..
            } if self.last_error.is_none() && !*told_free => {
                *told_free = true;
                *until = (*until).min(ask_at);
                self.wake_first()
            }
            _ => Effects::none(),
        }
    }

    /// A message says that a token of this process was given the lock.
    pub(crate) fn pushed(&mut self, grant: &PushedGrant, now: Timestamp) -> Effects<W> {
        match &mut self.phase {
            // Which of the two was carried out first is known when the reply is here.
            Phase::Asking { claim, pushed, .. } if claim.token == grant.token => {
                *pushed = Some(Box::new(grant.clone()));
                Effects::none()
            }
            Phase::BackOff {
                open: Some(open),
                until,
                ..
            } if open.claim.token == grant.token && !self.in_parts => {
                let claim = open.claim;
                let lease = open.baseline.and_then(|baseline| {
                    // What the storage gave, which may be less than was asked for.
                    let ttl = claim.ttl.min(grant.ttl);
                    let claim = Claim { ttl, ..claim };
                    Lease::pushed(claim, baseline, grant.stamp, grant.fencing, now)
                });
                match lease {
                    Some(lease) if lease.is_over(now) => {
                        // It lay somewhere for too long.
                        self.give_up(claim, now)
                    }
                    Some(mut lease) => {
                        lease.claim = claim;
                        self.wanted = grant.wanted;
                        self.last_error = None;
                        self.held_elsewhere = None;
                        self.hold(lease, now)
                    }
                    // When that was, nobody can tell. An attempt with this token finds out.
                    None if self.queue.is_empty() => self.nobody_waits(),
                    None => {
                        *until = now;
                        self.wake_first()
                    }
                }
            }
            // Confirmed by an attempt meanwhile.
            Phase::Held(held) if held.lease.claim.token == grant.token => Effects::none(),
            // Given up long ago: it is never used again.
            _ => self.release(Claim {
                token: grant.token,
                ttl: grant.ttl,
            }),
        }
    }

    /// Somebody in another process has begun to wait.
    pub(crate) fn wanted(&mut self, now: Timestamp) -> Effects<W> {
        match &mut self.phase {
            Phase::Held(held) if held.idle.is_some() && self.queue.is_empty() => {
                let mut effects = self.stop_idling();
                if let Some(release) = &mut effects.release {
                    release.wanted = Some(true);
                }
                return effects;
            }
            Phase::Held(held) if !self.wanted => {
                self.wanted = true;
                held.served = Served {
                    turns: 0,
                    since: now,
                };
            }
            // The word may have overtaken the reply that makes the lock ours.
            Phase::Asking { pushed, .. } => {
                self.wanted = true;
                if let Some(pushed) = pushed {
                    pushed.wanted = true;
                }
            }
            Phase::Held(_) | Phase::Idle | Phase::BackOff { .. } => {}
        }
        Effects::none()
    }

    /// Gives an idle lease back: somebody else wants it, or may want it without our hearing of it,
    /// or this process shuts down.
    pub(crate) fn stop_idling(&mut self) -> Effects<W> {
        let Phase::Held(held) = &mut self.phase else {
            return Effects::none();
        };
        // Whoever waits here has come for it already.
        if held.idle.take().is_some() && self.queue.is_empty() {
            self.nobody_waits()
        } else {
            Effects::none()
        }
    }

    /// Messages may have been missed: whoever waits has to ask, and whoever holds the lock has to
    /// assume that it is wanted.
    pub(crate) fn ask_again(&mut self, now: Timestamp) -> Effects<W> {
        match &mut self.phase {
            Phase::BackOff { until, .. } if self.last_error.is_none() => {
                *until = now;
                self.wake_first()
            }
            Phase::Asking { ask_again, .. } => {
                *ask_again = true;
                Effects::none()
            }
            // That others want it may have been among what was missed.
            Phase::Held(_) => self.wanted(now),
            _ => Effects::none(),
        }
    }

    fn hold(&mut self, lease: Lease, now: Timestamp) -> Effects<W> {
        self.failures = 0;
        self.splits = 0;
        self.phase = Phase::Held(Held {
            lease,
            turn: None,
            served: Served {
                turns: 0,
                since: now,
            },
            idle: None,
            doubt: Doubt::No,
        });
        if self.queue.is_empty() {
            self.nobody_waits()
        } else {
            self.wake_first()
        }
    }

    fn back_off(&mut self, until: Timestamp, open: Option<Open>, own_release: bool) {
        self.phase = if self.queue.is_empty() && open.is_none() {
            Phase::Idle
        } else {
            Phase::BackOff {
                until,
                open,
                own_release,
                told_free: false,
            }
        };
    }

    /// A holder gives its turn back. If the lease is given up to others while somebody of this
    /// process waits, `new_token` makes the token of their new place in the storage's queue.
    pub(crate) fn turn_done(
        &mut self,
        id: TurnId,
        claim: Claim,
        sharing: Sharing,
        now: Timestamp,
        new_token: impl FnOnce() -> OwnerToken,
    ) -> (Ended, Effects<W>) {
        let (held, turn) = match &mut self.phase {
            Phase::Held(held) => match held.turn {
                Some(turn) if turn.id == id => {
                    held.turn = None;
                    (held, turn)
                }
                _ => return (Ended::Lost, self.release_ended(claim, Ended::Lost, false)),
            },
            // The lease was lost while the turn went on. A renewal that was on its way then may
            // have prolonged it in the storage; if so, free it.
            _ => return (Ended::Lost, self.release_ended(claim, Ended::Lost, false)),
        };
        let (lease, served) = (&held.lease, held.served);
        let ended = if turn.revoked || lease.is_over(now) || now >= turn.until {
            Ended::Lost
        } else {
            Ended::Released
        };
        let next = self.queue.first_mut().map(|next| (next.ttl, next.interval));
        let limit = sharing.limit;
        let unshared = sharing.told && !self.wanted;
        let in_bounds = served.turns < limit.turns && now.since(served.since) < limit.time;
        let may_go_on = ended == Ended::Released
            && next.is_some_and(|(ttl, _)| ttl == lease.claim.ttl)
            && lease.can_be_handed_over(now)
            && (unshared || in_bounds);
        let is_sure = held.doubt == Doubt::No;
        let has_tokens = !lease.fencing_is_used_up();
        if may_go_on && has_tokens && is_sure {
            return (Ended::HandedOver, self.wake_first());
        }
        let is_brief = sharing.keeps_hot && lease.is_hot;
        let linger = if is_brief { HOT } else { sharing.linger };
        let is_ours = ended == Ended::Released && unshared;
        let may_idle = is_ours && next.is_none() && !linger.is_zero();
        if may_idle && has_tokens && is_sure {
            held.idle = Some(Idle {
                until: now + linger,
                is_brief,
            });
            return (Ended::Lingers, Effects::none());
        }

        // A lease that ends for want of tokens could have used more.
        let wants_tokens = !has_tokens && (may_go_on || may_idle && is_brief);
        self.fencing_used = lease
            .turns()
            .saturating_mul(if wants_tokens { 2 } else { 1 });
        self.gave_back = is_ours.then_some(now);
        let wanted = std::mem::take(&mut self.wanted);
        match next {
            _ if sharing.told && wanted && self.in_parts => {
                // There is no queue whose end we could go to. Nor may the next caller of this process
                // be quicker than those who are only just told.
                self.phase = Phase::BackOff {
                    until: now + sharing.give_way,
                    open: None,
                    own_release: false,
                    told_free: true,
                };
                let mut effects = self.wake_first();
                effects.release = self.release_ended(claim, ended, wanted).release;
                (ended, effects)
            }
            Some((ttl, interval)) if sharing.told && wanted => {
                // Behind the others, by the same step that gives the lock to the first of them.
                let requeue = Claim {
                    token: new_token(),
                    ttl,
                };
                self.phase = Phase::Asking {
                    claim: requeue,
                    sent: now,
                    repeated: false,
                    baseline: None,
                    pushed: None,
                    ask_again: false,
                    crosses_release: false,
                    is_hot: false,
                    told_free: false,
                    told_of_force: false,
                };
                let mut effects = self.release_ended(claim, ended, wanted);
                if let Some(release) = &mut effects.release {
                    release.rejoin = Some(Box::new(Rejoin {
                        claim: requeue,
                        interval,
                        fencing: fencing_wanted(self.queue.len(), self.fencing_used),
                    }));
                }
                (ended, effects)
            }
            _ => {
                self.phase = Phase::Idle;
                let mut effects = self.release_ended(claim, ended, wanted);
                effects.wake = self.wake_first().wake;
                (ended, effects)
            }
        }
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
        // Long enough have we left it to others.
        if self.due().is_some_and(|due| due <= now) && matches!(self.phase, Phase::BackOff { .. }) {
            self.phase = Phase::Idle;
        }
        let Phase::Held(held) = &mut self.phase else {
            tick.due = self.due();
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
        if held.idle.is_some_and(|idle| now >= idle.until) {
            tick.effects = self.stop_idling();
            tick.due = self.due();
            return tick;
        }
        if let Some(turn) = &mut held.turn
            && !turn.revoked
            && now >= turn.until
        {
            turn.revoked = true;
            tick.effects.lost = Some(LossReason::MaxHold);
        } else {
            tick.renew = self.renew(now);
        }
        tick.due = self.due();
        tick
    }

    /// The renewal that is due, if there is one. It is seen as sent.
    pub(crate) fn renew(&mut self, now: Timestamp) -> Option<Claim> {
        let Phase::Held(held) = &mut self.phase else {
            return None;
        };
        if !held.is_renewed() || !held.lease.renewal_is_due(now) {
            return None;
        }
        held.lease.renewing = true;
        if held.doubt == Doubt::Yes {
            held.doubt = Doubt::Asked;
        }
        Some(held.lease.claim)
    }

    /// When to look at the time again.
    pub(crate) fn due(&self) -> Option<Timestamp> {
        let held = match &self.phase {
            Phase::Held(held) => held,
            // Whoever waits looks by itself.
            Phase::BackOff { until, .. } if self.queue.is_empty() => return Some(*until),
            _ => return None,
        };
        let mut due = held.lease.deadline;
        let turn = held.turn.as_ref().filter(|turn| !turn.revoked);
        let idle = held.idle.filter(|idle| !idle.is_brief);
        let ends = turn.map(|turn| turn.until).or(idle.map(|idle| idle.until));
        due = ends.map_or(due, |ends| due.min(ends));
        if held.is_renewed() && !held.lease.renewing {
            due = due.min(held.lease.renew_at);
        }
        Some(due)
    }

    /// Until when the lease is kept, if that is but a moment: the driver has to come then with
    /// [`KeyState::stop_idling`]. It is not among what is [due](KeyState::due).
    pub(crate) fn moment_ends(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Held(Held {
                idle: Some(idle), ..
            }) if idle.is_brief => Some(idle.until),
            _ => None,
        }
    }

    /// Whether a renewal whose reply has just come should have come sooner. `None` if this process
    /// does not have the lease any more.
    pub(crate) fn renewal_is_late(&self, claim: Claim, now: Timestamp) -> Option<bool> {
        match &self.phase {
            Phase::Held(held) if held.lease.claim == claim => Some(held.lease.renewal_is_late(now)),
            _ => None,
        }
    }

    /// A renewal that was sent at `sent` has come to its end; `None`: no answer.
    pub(crate) fn renewed(
        &mut self,
        claim: Claim,
        sent: Timestamp,
        reply: Option<Renewed>,
        now: Timestamp,
    ) -> Effects<W> {
        let held = match &mut self.phase {
            Phase::Held(held) if held.lease.claim == claim => held,
            // Lost meanwhile: nobody else gives it back before its turn ends, if ever. One that was
            // given up has its release on the way.
            _ if matches!(reply, Some(Renewed::Ours { .. }))
                && self.lost.is_some_and(|lost| lost.claim == claim) =>
            {
                return self.release(claim);
            }
            _ => return Effects::none(),
        };
        match reply {
            // Too late: for a while nothing kept others out. A success now must not hide that.
            Some(Renewed::Ours { .. }) if held.lease.is_over(now) => {
                let mut effects = self.lose(LossReason::Expired);
                effects.release = self.release(claim).release;
                effects
            }
            Some(Renewed::Ours { wanted }) => {
                held.lease.renewed(sent);
                match held.doubt {
                    Doubt::No => {}
                    Doubt::Asked => held.doubt = Doubt::No,
                    Doubt::Yes => held.lease.renew_at = now,
                }
                let mut effects = Effects::none();
                effects.deadline = held.turn.map(|turn| held.lease.deadline.min(turn.until));
                if wanted {
                    let effect = self.wanted(now);
                    effects.release = effect.release;
                }
                effects
            }
            Some(Renewed::NotOurs) => {
                let reason = match held.doubt {
                    Doubt::No => LossReason::NotOurs,
                    Doubt::Yes | Doubt::Asked => LossReason::ForceReleased,
                };
                self.lose(reason)
            }
            None => {
                held.lease.renewal_failed(now);
                Effects::none()
            }
        }
    }

    /// Somebody says that the storage has taken the lock from this token by force. It may be so, or
    /// not, or not yet: the storage is asked. It may also be said before we know that we had it.
    pub(crate) fn told_of_force(&mut self, token: OwnerToken, now: Timestamp) -> Effects<W> {
        match &mut self.phase {
            Phase::Held(held) if held.lease.claim.token == token => {
                if held.turn.is_some() {
                    held.doubt = Doubt::Yes;
                    held.lease.renew_at = now;
                    return Effects::none();
                }
                // Nobody uses it: it costs little to take it anew.
                let claim = held.lease.claim;
                let mut effects = self.lose(LossReason::ForceReleased);
                effects.release = self.release(claim).release;
                effects
            }
            // The reply has been overtaken.
            Phase::Asking {
                claim,
                told_of_force,
                ..
            } if claim.token == token => {
                *told_of_force = true;
                Effects::none()
            }
            // And so has the message that gave it. In parts, what this claim had is given back.
            Phase::BackOff {
                open: Some(open), ..
            } if open.claim.token == token && !self.in_parts => {
                let claim = open.claim;
                self.give_up(claim, now)
            }
            // Given back, or lost, meanwhile.
            _ => Effects::none(),
        }
    }

    /// Takes the wakers of all waiters, so that each looks at the world again.
    pub(crate) fn wake_all(&mut self) -> Vec<W> {
        self.wake_some(|_| true)
    }

    /// The same for those whose time has come.
    pub(crate) fn wake_some(&mut self, mut is_time: impl FnMut(&W) -> bool) -> Vec<W> {
        let waiters = self.queue.iter_mut();
        waiters
            .filter_map(|waiter| waiter.wake.take_if(|wake| is_time(wake)))
            .collect()
    }

    fn lose(&mut self, reason: LossReason) -> Effects<W> {
        if let Phase::Held(held) = &self.phase {
            self.lost = Some(Lost {
                claim: held.lease.claim,
                in_turn: held.turn.is_some(),
                reason,
            });
        }
        self.phase = Phase::Idle;
        self.wanted = false;
        let mut effects = self.wake_first();
        effects.lost = Some(reason);
        effects
    }

    /// The last waiter has gone: what was got or asked for on its account is given back.
    fn nobody_waits(&mut self) -> Effects<W> {
        let claim = match &self.phase {
            Phase::Held(held) if held.turn.is_none() => Some(held.lease.claim),
            Phase::BackOff { open, .. } => open.map(|open| open.claim),
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
        effects.release = Some(GiveBack {
            claim,
            wanted: None,
            rejoin: None,
            was_lost: self
                .lost
                .is_some_and(|lost| lost.claim == claim && lost.in_turn),
            was_held: false,
            quiet: false,
        });
        effects
    }

    /// The same for the claim of a turn that ended so.
    fn release_ended(&mut self, claim: Claim, ended: Ended, wanted: bool) -> Effects<W> {
        let mut effects = self.release(claim);
        if let Some(release) = &mut effects.release {
            release.was_lost |= ended == Ended::Lost;
            release.was_held = ended == Ended::Released;
            // Of a lease that was lost, word may not have come.
            release.wanted = (wanted || release.was_held).then_some(wanted);
        }
        effects
    }

    fn wake_first(&mut self) -> Effects<W> {
        let mut effects = Effects::none();
        effects.wake = self.queue.first_mut().and_then(|waiter| waiter.wake.take());
        effects
    }
}

#[cfg(any(test, tower_distributed_lock_fuzzing))]
#[cfg_attr(
    tower_distributed_lock_fuzzing,
    allow(dead_code, unused_imports, reason = "only its world is fuzzed")
)]
#[path = "key_state_tests.rs"]
mod tests;
#[cfg(tower_distributed_lock_fuzzing)]
pub(crate) use tests::live;
