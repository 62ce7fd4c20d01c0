//! This process's side of every lock: who waits here, what is held, and who talks to the storage.
//!
//! | file | what it is |
//! |---|---|
//! | `key_state` | one key's state machine: no I/O, no clock, no lock |
//! | `key_events` | what it is told, and what it answers |
//! | `queue` | the first-come-first-served queue in it |
//! | `lease` | how long the storage's word can be relied on |
//! | `backoff` | when to ask again |
//! | `table` | the keys in use |
//! | `acquire`, `flight` | a caller that wants a lock, and its attempt at the storage |
//! | `overdue` | attempts without an answer that may still be carried out |
//! | `alarm` | how a caller is woken when a call, or its wait, takes too long |
//! | `renewal`, `release` | leases on their way to a longer life, claims on their way out |
//! | `linger` | the moment for which a lease is kept whose key is hot |
//! | `turn`, `signal` | a holder's way to give its lock back, and what it is told of it |
//! | `spin` | a short look, before a caller queues up, whether the lock is given back at once |
//! | `inquiry`, `note` | what processes ask and tell each other about their locks, and how it is written |
//! | `observe`, `meters` | what is seen of a lock from outside: its span, and numbers |
//! | `keeper` | the background task: renewals, releases, attempts whose callers have gone |
//!
//! Here they are put together: every method feeds one event into a key's machine and carries out
//! what the machine answers, outside all locks.

mod acquire;
mod alarm;
mod backoff;
mod flight;
mod inquiry;
mod keeper;
pub(crate) mod key_events;
mod key_state;
pub(crate) mod lease;
mod linger;
#[cfg_attr(not(feature = "metrics"), path = "meters_off.rs")]
mod meters;
pub(crate) mod note;
mod observe;
mod overdue;
mod queue;
pub(crate) mod release;
mod renewal;
pub(crate) mod signal;
mod spin;
pub(crate) mod table;
pub(crate) mod turn;

use std::{borrow::Cow, fmt, task::Waker, time::Duration};

use crossbeam_utils::CachePadded;
use tokio::{
    sync::{Notify, Semaphore},
    time::timeout,
};

#[cfg(tower_distributed_lock_fuzzing)]
pub(crate) use self::key_state::live;
pub(crate) use self::{acquire::Acquire, inquiry::Account};
use self::{
    alarm::Bell,
    flight::Flight,
    inquiry::{Hearing, Inquiries},
    keeper::{Job, Keeper},
    key_events::{Attempt, Effects, Ended, HandoffLimit, Outcome, Sharing, Step, TurnId},
    lease::Claim,
    meters::Meters,
    queue::Place,
    release::Release,
    renewal::Renewal,
    table::{Cell, Slot, Table},
    turn::Turn,
};
use crate::{
    clock::{Clock, Timestamp},
    error::{LockError, LossReason, NotObtained, TooManyWaiters, WaiterScope},
    key::LockName,
    options::LockOptions,
    storage::{self, AcquireRequest, DynStorage, GivenUp, Inbox, Message, OwnerToken},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
};

/// What a factory's builder can set.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) handoff: HandoffLimit,
    pub(crate) waiters_per_key: usize,
    pub(crate) waiters: usize,
    pub(crate) storage_timeout: Duration,
    /// Whether locks come with fencing tokens.
    pub(crate) fencing: bool,
    /// `None`: leases that are hot are kept for a moment after a request, others not at all.
    pub(crate) linger: Option<Duration>,
    /// How much longer the storage keeps a lock than we rely on it.
    pub(crate) lock_delay: Duration,
    /// What this process is called where others look at its locks.
    pub(crate) label: Option<Arc<str>>,
    /// What the factory is called in metrics.
    pub(crate) metrics_name: Option<Cow<'static, str>>,
}

/// A caller's place in its key's queue, how many attempts at that key have had an outcome by then, and when that was.
type Joined = (Arc<Cell>, Place, u32, Timestamp);

/// How many fencing tokens a lease that may linger comes with at least.
const LINGERING_FENCING: u32 = 16;

/// See the [module documentation](self).
pub(crate) struct Coordinator {
    storage: Arc<dyn DynStorage>,
    clock: Clock,
    limits: Limits,
    factory: u128,
    /// Padded, as is whatever each call changes: those on other cores would have to get the rest
    /// anew, too.
    next_token: CachePadded<AtomicU64>,
    table: Table,
    keeper: Arc<Keeper>,
    renewals: Semaphore,
    overdue: Arc<Semaphore>,
    waiting: CachePadded<AtomicUsize>,
    draining: AtomicBool,
    /// Notified, while draining, when a key is forgotten.
    forgotten: Notify,
    prefix: Arc<str>,
    /// Whether messages of the storage reach us.
    listening: AtomicBool,
    inquiries: Inquiries,
    meters: Meters,
}

impl Coordinator {
    pub(crate) fn new(
        storage: Arc<dyn DynStorage>,
        clock: Clock,
        limits: Limits,
        prefix: Arc<str>,
    ) -> Arc<Self> {
        Arc::new(Self {
            table: Table::new(storage.is_divided()),
            meters: Meters::new(limits.metrics_name.clone(), clock),
            storage,
            clock,
            limits,
            factory: random_id(),
            next_token: AtomicU64::new(1).into(),
            keeper: Arc::new(Keeper::new()),
            renewals: renewal::turns(),
            overdue: overdue::places(),
            waiting: AtomicUsize::new(0).into(),
            draining: AtomicBool::new(false),
            forgotten: Notify::new(),
            prefix,
            listening: AtomicBool::new(false),
            inquiries: Inquiries::new(),
        })
    }

    fn is_listening(&self) -> bool {
        self.listening.load(Relaxed)
    }

    /// Keys that anybody of this process waits for, holds, or is giving back.
    pub(crate) fn keys(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// Callers that wait for a lock.
    pub(crate) fn waiters(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// A request was rejected because its key function failed.
    pub(crate) fn key_was_invalid(&self) {
        self.meters.invalid_key();
    }

    /// A caller had no time left before it could ask for a lock.
    pub(crate) fn was_out_of_time(&self) {
        self.meters.out_of_time();
    }

    fn is_draining(&self) -> bool {
        self.draining.load(SeqCst)
    }

    /// How many fencing tokens to ask for, where so many could be used.
    fn fencing(&self, usable: u32) -> u32 {
        match self.limits {
            Limits { fencing: false, .. } => 0,
            // A lease that lingers is there for callers that have not come yet.
            Limits {
                linger: Some(linger),
                ..
            } if !linger.is_zero() => usable.max(LINGERING_FENCING),
            _ => usable,
        }
    }

    /// How long the storage keeps a lock of this ttl.
    fn storage_ttl(&self, ttl: Duration) -> Duration {
        ttl + self.limits.lock_delay
    }

    /// For how long a place in the storage's queue has to be kept: until the present holder's lease
    /// has run out and its waiter has come to ask, and as long again.
    fn place(&self, ttl: Duration, interval: Duration) -> Duration {
        2 * (self.storage_ttl(ttl) + interval)
    }

    fn new_token(&self) -> OwnerToken {
        OwnerToken::new(self.factory, self.next_token.fetch_add(1, Relaxed))
    }

    // --- a caller's way to a turn ----------------------------------------------------------------

    fn join(
        self: &Arc<Self>,
        name: &LockName,
        options: LockOptions,
        now: Timestamp,
    ) -> Result<Joined, LockError> {
        if self.is_draining() {
            return Err(LockError::Draining);
        }
        // Whoever waits needs it: to follow its attempt if it goes, and to end the lease of a
        // holder that never does.
        self.keeper.ensure_running(self);
        let waits = !options.max_wait().is_zero();
        let joined = self.table.enter(name, |cell, slot| {
            match spin::ends_soon(slot, now).filter(|_| waits) {
                Some(turn) => Err(turn),
                None => Ok(self.queue_up(cell, slot, options, now)),
            }
        });
        let joined = joined.unwrap_or_else(|turn| {
            let now = spin::watch(&turn, || self.clock.now());
            self.table
                .enter(name, |cell, slot| self.queue_up(cell, slot, options, now))
        });
        if joined.is_err() && self.is_draining() {
            // The key may have been made for this caller, and have gone with it.
            self.forgotten.notify_waiters();
        }
        joined
    }

    /// Takes a place at the end of the key's queue, if the limits and the caller's options have one.
    fn queue_up(
        &self,
        cell: &Arc<Cell>,
        slot: &mut Slot,
        options: LockOptions,
        now: Timestamp,
    ) -> Result<Joined, LockError> {
        let state = &mut slot.state;
        let holder_ttl = state.holder_ttl(now);
        let hurried = options.max_wait().is_zero();
        if hurried && state.is_busy(now) {
            // Those who wait may do so because the storage is away.
            return Err(match state.last_error() {
                Some(error) => LockError::Storage(error.clone()),
                None => LockError::NotObtained(NotObtained {
                    waited: Duration::ZERO,
                    attempts: 0,
                    holder_ttl,
                }),
            });
        }
        let too_many = |limit, scope| {
            LockError::TooManyWaiters(TooManyWaiters {
                limit,
                scope,
                holder_ttl,
            })
        };
        if state.waiters() >= self.limits.waiters_per_key {
            return Err(too_many(self.limits.waiters_per_key, WaiterScope::Key));
        }
        if self.waiting.fetch_add(1, Relaxed) >= self.limits.waiters {
            self.waiting.fetch_sub(1, Relaxed);
            return Err(too_many(self.limits.waiters, WaiterScope::Factory));
        }
        if hurried {
            state.stop_giving_way();
        }
        let place = state.join(options.ttl(), options.max_hold(), options.interval());
        if hurried {
            state.hurry(place);
        }
        Ok((Arc::clone(cell), place, state.landed(), now))
    }

    fn step(self: &Arc<Self>, cell: &Arc<Cell>, poll: &Polled<'_>, now: Timestamp) -> Next {
        let Polled {
            place, since, ends, ..
        } = *poll;
        let mut renew = None;
        let (next, due) = self.update(cell, |slot| {
            let state = &slot.state;
            let shared = poll.shared;
            if shared.is_some_and(|landed| landed != state.landed()) && !state.is_for(place) {
                return ((Next::Over, None), Effects::none());
            }
            let bell = || Bell::new(poll.waker, ends);
            let (step, effects) = slot.state.poll(place, now, bell, || self.new_token());
            let next = match step {
                Step::Granted(granted) => {
                    let (coordinator, waited) = (Arc::clone(self), now.since(since));
                    let turn = Turn::new(coordinator, Arc::clone(cell), granted, now, waited);
                    let turn = Arc::new(turn);
                    slot.holder = Some(Arc::clone(&turn));
                    // By the time that the keeper looks the turn may be over, and the next may be, and so on:
                    // it would find nothing to be renewed, and be woken by each.
                    renew = slot.state.renew(now);
                    (Next::Turn(turn), slot.state.due())
                }
                Step::Ask(attempt) => (Next::Ask(attempt), None),
                Step::AskAt(at) => (Next::WaitUntil(at), None),
                Step::Wait => {
                    slot.ends = slot.ends.min(ends);
                    (Next::Wait, None)
                }
            };
            (next, effects)
        });
        if matches!(next, Next::Turn(_)) {
            self.waiting.fetch_sub(1, Relaxed);
        }
        if let Some(due) = due {
            self.keeper.look_by(self, due);
        }
        if let Some(claim) = renew {
            self.keeper.renew(self, cell, claim);
        }
        next
    }

    fn leave(self: &Arc<Self>, cell: &Arc<Cell>, place: Place) {
        self.waiting.fetch_sub(1, Relaxed);
        self.update(cell, |slot| ((), slot.state.leave(place)));
    }

    fn send(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        attempt: Attempt,
        options: LockOptions,
        now: Timestamp,
    ) -> Flight {
        // Who does not wait wants no place in the queue.
        let waits = !options.max_wait().is_zero();
        let place =
            (waits && self.is_listening()).then(|| self.place(options.ttl(), options.interval()));
        let in_parts = self.storage.is_divided();
        let request = AcquireRequest {
            name: cell.name.clone(),
            token: attempt.claim.token,
            ttl: self.storage_ttl(attempt.claim.ttl),
            again: attempt.again,
            repeated: attempt.repeated,
            queue: place.filter(|_| !in_parts),
            hint: place.filter(|_| in_parts),
            fencing: self.fencing(attempt.fencing),
            given_up: GivenUp::default(),
        };
        let reply = storage::acquire(&self.storage, request);
        Flight::new(attempt, now + self.limits.storage_timeout, reply)
    }

    /// An attempt whose caller has gone.
    fn follow(self: &Arc<Self>, cell: &Arc<Cell>, flight: Flight, interval: Duration) {
        let alarm = cell.lock().disarm(flight.claim);
        drop(alarm);
        let followed = flight.follow(Arc::clone(self), Arc::clone(cell), interval);
        self.keeper.submit(self, Box::pin(followed));
    }

    fn replied(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        claim: Claim,
        outcome: Outcome,
        interval: Duration,
        now: Timestamp,
    ) {
        let (alarm, hurried) = self.update(cell, |slot| {
            let random = fastrand::f64;
            let pause = match &outcome {
                Outcome::Denied { .. } if slot.state.was_told_free() => {
                    backoff::after_hint(random())
                }
                Outcome::Undecided => backoff::after_split(slot.state.splits(), interval, random()),
                Outcome::Denied { holder_ttl, .. } => {
                    backoff::after_denial(*holder_ttl, interval, random())
                }
                Outcome::NotQueued => Duration::ZERO,
                // The caller is told; the next one may ask at once.
                Outcome::Failed(error) if !error.kind().is_transient() => Duration::ZERO,
                Outcome::Failed(_) => {
                    backoff::after_failure(slot.state.failures(), interval, random())
                }
                // It may have come too late to be of use, and so may the next.
                Outcome::Granted { .. } => backoff::after_late(slot.state.failures(), interval),
            };
            let effects = slot.state.replied(claim, outcome, now, now + pause);
            ((slot.disarm(claim), slot.state.wake_hurried()), effects)
        });
        drop(alarm);
        hurried.into_iter().for_each(Bell::ring);
    }

    // --- a holder's turn -------------------------------------------------------------------------

    /// How the turn ended, why it was lost if the key knows, and the release that its end has
    /// brought, if one was sent.
    fn turn_done(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        id: TurnId,
        claim: Claim,
        is_request: bool,
        now: Timestamp,
    ) -> (Ended, Option<LossReason>, Option<Release>) {
        let ((ended, loss, due, is_brief), release) = self.update_and_send(cell, |slot| {
            if let Some(turn) = slot.holder.take_if(|turn| turn.id() == id) {
                turn.ends();
            }
            // Under the key's lock: whoever shuts down, or becomes deaf, looks at each key once,
            // after having said so.
            let (stays, in_parts) = (!self.is_draining(), slot.state.is_in_parts());
            let linger = self.limits.linger;
            let sharing = Sharing {
                limit: self.limits.handoff,
                told: self.is_listening(),
                linger: linger.filter(|_| stays).unwrap_or_default(),
                // A lock in parts gives way to others when it is given back; at the end of a moment it
                // would not.
                keeps_hot: linger.is_none() && stays && is_request && !in_parts,
                give_way: match in_parts {
                    true => backoff::after_giving_way(fastrand::f64()),
                    false => Duration::ZERO,
                },
            };
            let (ended, effects) = slot
                .state
                .turn_done(id, claim, sharing, now, || self.new_token());
            let state = &slot.state;
            let is_brief = state.moment_ends().is_some();
            ((ended, state.loss(claim), state.due(), is_brief), effects)
        });
        if let Some(due) = due {
            self.keeper.look_by(self, due);
        }
        if is_brief {
            self.watch(cell);
        }
        (ended, loss, release)
    }

    // --- the keeper's work -----------------------------------------------------------------------

    /// Looks at every lease: hands out the renewals that are due, and says when to look again.
    fn look(self: &Arc<Self>, mut job: impl FnMut(Job)) -> Option<Timestamp> {
        let now = self.clock.now();
        let mut next: Option<Timestamp> = None;
        let mut renewals = Vec::new();
        let mut effects = Vec::new();
        let mut done = Vec::new();
        let mut late = Vec::new();
        self.table.visit(|cell, slot| {
            let at = slot.ring(now, &mut late);
            if at != Timestamp::NEVER {
                let at = at.max(now + alarm::COARSE);
                next = Some(next.map_or(at, |next| next.min(at)));
            }
            let tick = slot.state.tick(now);
            if slot.state.is_done() {
                done.push(Arc::clone(cell));
            }
            if let Some(due) = tick.due {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
            if let Some(claim) = tick.renew {
                renewals.push((Arc::clone(cell), claim));
            }
            if !tick.effects.is_none() {
                effects.push((
                    Arc::clone(cell),
                    Told::take(slot, &tick.effects),
                    tick.effects,
                ));
            }
        });
        late.into_iter().for_each(Waker::wake);
        for (cell, told, effect) in effects {
            drop(self.carry_out(&cell, told, effect));
        }
        done.iter().for_each(|cell| self.forget(cell));
        self.renew_in_batches(renewals, &mut job);
        next
    }

    /// Hands out the renewals that do not wait for the next look.
    fn renew_at_once(
        self: &Arc<Self>,
        mut leases: Vec<(Arc<Cell>, Claim)>,
        mut job: impl FnMut(Job),
    ) {
        // A lease of a lock that all want may have been given on since.
        leases.retain(|(cell, claim)| cell.lock().state.uses(claim.token));
        self.renew_in_batches(leases, &mut job);
    }

    fn renew_in_batches(
        self: &Arc<Self>,
        mut leases: Vec<(Arc<Cell>, Claim)>,
        job: &mut impl FnMut(Job),
    ) {
        while !leases.is_empty() {
            let rest = leases.split_off(leases.len().min(renewal::BATCH));
            let batch = std::mem::replace(&mut leases, rest);
            job(Box::pin(Renewal::new(Arc::clone(self), batch).run()));
        }
    }

    // --- messages from the storage ----------------------------------------------------------------

    /// Listens for as long as it is polled, and as long as the factory is there.
    fn listen(self: &Arc<Self>) -> Job {
        let coordinator = Arc::downgrade(self);
        let inbox = Inbox::new(self.factory, Arc::clone(&self.prefix), move |message| {
            if let Some(coordinator) = coordinator.upgrade() {
                coordinator.deliver(message);
            }
        });
        let listening = Arc::clone(&self.storage).listen(inbox);
        let coordinator = Arc::downgrade(self);
        Box::pin(async move {
            listening.await;
            if let Some(coordinator) = coordinator.upgrade() {
                coordinator.inquiries.hears(Hearing::Never);
            }
        })
    }

    fn deliver(self: &Arc<Self>, message: Message) {
        let now = self.clock.now();
        match message {
            Message::Granted(mut grant) => {
                grant.ttl = grant.ttl.saturating_sub(self.limits.lock_delay);
                let cell = self.table.find_or_stray(&grant.name);
                self.update(&cell, |slot| ((), slot.state.pushed(&grant, now)));
            }
            Message::Wanted(name) => {
                if let Some(cell) = self.table.find(&name) {
                    self.update(&cell, |slot| ((), slot.state.wanted(now)));
                }
            }
            Message::Free(name) => {
                if let Some(cell) = self.table.find(&name) {
                    let ask_at = now + backoff::after_hint(fastrand::f64());
                    self.update(&cell, |slot| ((), slot.state.free(ask_at)));
                }
            }
            Message::Told(text) => self.told(&text),
            Message::Listening => {
                self.listening.store(true, Relaxed);
                self.inquiries.hears(Hearing::Yes);
                for cell in self.table.cells() {
                    self.update(&cell, |slot| ((), slot.state.ask_again(now)));
                }
            }
            Message::Deaf => {
                self.listening.store(false, Relaxed);
                self.inquiries.hears(Hearing::NotYet);
                self.stop_idling();
            }
        }
    }

    fn stop_idling(self: &Arc<Self>) {
        for cell in self.table.cells() {
            self.update(&cell, |slot| ((), slot.state.stop_idling()));
        }
    }

    /// Wakes the tasks that hold a lock, wait for one, or have called the storage, so that they look
    /// at the world again.
    fn wake_callers(&self) {
        for cell in self.table.cells() {
            let mut slot = cell.lock();
            let (holder, callers) = (slot.holder.clone(), slot.ring_early());
            drop(slot);
            if let Some(holder) = holder {
                holder.wake();
            }
            callers.into_iter().for_each(Waker::wake);
        }
    }

    // --- shutdown --------------------------------------------------------------------------------

    /// See [`crate::LockFactory::drain`].
    pub(crate) async fn drain(self: &Arc<Self>, grace: Duration) -> usize {
        self.draining.store(true, SeqCst);
        for cell in self.table.cells() {
            let wakers = cell.lock().state.wake_all();
            wakers.into_iter().for_each(Bell::ring);
        }
        self.stop_idling();
        if timeout(grace, self.emptied()).await.is_err() {
            for cell in self.table.cells() {
                let mut slot = cell.lock();
                let holder = if slot.state.revoke() {
                    slot.holder.clone()
                } else {
                    None
                };
                drop(slot);
                if let Some(holder) = holder {
                    holder.lose(LossReason::Draining);
                    holder.tell_loss(LossReason::Draining);
                }
            }
            let _ = timeout(self.limits.storage_timeout, self.emptied()).await;
        }
        // A lock that is given back may be so on a majority of servers only.
        let settled = Arc::clone(&self.storage).settled();
        let _ = timeout(self.limits.storage_timeout, settled).await;
        self.table.len()
    }

    async fn emptied(&self) {
        loop {
            let forgotten = self.forgotten.notified();
            tokio::pin!(forgotten);
            forgotten.as_mut().enable();
            if self.table.is_empty() {
                return;
            }
            forgotten.await;
        }
    }

    // --- putting it together ---------------------------------------------------------------------

    /// Feeds one event into a key's machine and carries out its effects.
    fn update<R>(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        event: impl FnOnce(&mut Slot) -> (R, Effects<Bell>),
    ) -> R {
        self.update_and_send(cell, event).0
    }

    /// The same, for whoever wants to know what becomes of the release, if there is one.
    fn update_and_send<R>(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        event: impl FnOnce(&mut Slot) -> (R, Effects<Bell>),
    ) -> (R, Option<Release>) {
        let mut slot = cell.lock();
        let (result, effects) = event(&mut slot);
        let told = Told::take(&mut slot, &effects);
        let is_done = slot.state.is_done();
        drop(slot);
        let release = self.carry_out(cell, told, effects);
        if is_done {
            self.forget(cell);
        }
        (result, release)
    }

    fn carry_out(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        told: Told,
        effects: Effects<Bell>,
    ) -> Option<Release> {
        let lost = told.lost.zip(effects.lost);
        if let Some((holder, reason)) = &lost {
            holder.lose(*reason);
        }
        if let (Some(holder), Some(deadline)) = (told.prolonged, effects.deadline) {
            holder.prolong(deadline);
        }
        // Before the next waiter is woken, who may ask at once.
        let release = effects.release.map(|give_back| {
            if give_back.was_lost && !self.limits.lock_delay.is_zero() {
                Release::leave(self, cell, give_back)
            } else {
                Release::send(self, cell, give_back)
            }
        });
        if let Some(bell) = effects.wake {
            bell.ring();
        }
        drop(effects.old);
        // Last: this runs code of others.
        if let Some((holder, reason)) = lost {
            holder.tell_loss(reason);
        }
        release
    }

    fn forget(&self, cell: &Arc<Cell>) {
        self.table.forget(cell);
        if self.is_draining() {
            self.forgotten.notify_waiters();
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.keeper.nudge();
    }
}

impl fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coordinator")
            .field("keys", &self.keys())
            .field("waiters", &self.waiters())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// A waiter that was polled.
struct Polled<'a> {
    place: Place,
    /// When it came.
    since: Timestamp,
    /// When its wait is over.
    ends: Timestamp,
    /// Of one that is content with one outcome: how many there were when it came.
    shared: Option<u32>,
    waker: &'a Waker,
}

/// What a waiter does next.
enum Next {
    /// It has the lock.
    Turn(Arc<Turn>),
    /// It sends this attempt.
    Ask(Attempt),
    /// It comes again at this time, or when woken.
    WaitUntil(Timestamp),
    /// It will be woken.
    Wait,
    /// The attempt that it shared has had its outcome, and has not brought it the lock.
    Over,
}

/// Whom an event concerns, taken from under the lock.
struct Told {
    lost: Option<Arc<Turn>>,
    prolonged: Option<Arc<Turn>>,
}

impl Told {
    fn take(slot: &mut Slot, effects: &Effects<Bell>) -> Self {
        Self {
            prolonged: effects.deadline.and_then(|_| slot.holder.clone()),
            lost: effects.lost.and_then(|_| slot.holder.clone()),
        }
    }
}

/// 128 bits that no other factory has.
#[expect(
    clippy::expect_used,
    reason = "std's own maps panic too where the system has no random numbers"
)]
fn random_id() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the operating system gives random numbers");
    u128::from_ne_bytes(bytes)
}
