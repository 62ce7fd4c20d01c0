//! What the machine promises: first one promise a test, in the order of a key's life; then a small
//! world of several processes around one storage, where whatever can happen happens in any order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "in a test a panic is a verdict"
)]

use super::*;
use crate::{
    coordinator::key_events::HandoffLimit,
    error::StorageErrorKind,
    key::LockName,
    storage::{FencingBlock, Stamp},
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const TTL: Duration = ms(10_000);
/// How long a lease of [`TTL`] may be used.
const VALID: Duration = ms(9_898);
const MAX_HOLD: Duration = ms(60_000);
const LINGER: Duration = ms(3_000);
/// How long the driver of these tests waits after a denial or a failure.
const PAUSE: Duration = ms(1_000);
const LIMIT: HandoffLimit = HandoffLimit {
    turns: 3,
    time: ms(4_000),
};

/// [`Effects`] that can be compared.
#[derive(Debug, Default, PartialEq)]
struct Told {
    wake: Option<Place>,
    release: Option<Claim>,
    lost: Option<LossReason>,
    deadline: Option<Timestamp>,
    rejoin: Option<Rejoin>,
    /// The release tells nobody.
    quiet: bool,
}

impl Told {
    fn nothing() -> Self {
        Self::default()
    }

    fn wake(place: Place) -> Self {
        Self {
            wake: Some(place),
            ..Self::default()
        }
    }

    fn release(claim: Claim) -> Self {
        Self {
            release: Some(claim),
            ..Self::default()
        }
    }

    /// A release of what may be parts of a lock.
    fn release_parts(claim: Claim) -> Self {
        Self {
            quiet: true,
            ..Self::release(claim)
        }
    }

    fn lost(reason: LossReason) -> Self {
        Self {
            lost: Some(reason),
            ..Self::default()
        }
    }

    fn and_wake(self, place: Place) -> Self {
        Self {
            wake: Some(place),
            ..self
        }
    }
}

impl From<Effects<Place>> for Told {
    fn from(effects: Effects<Place>) -> Self {
        let Effects {
            wake,
            release,
            lost,
            deadline,
            old: _,
        } = effects;
        Self {
            wake,
            release: release.as_ref().map(|give_back| give_back.claim),
            lost,
            deadline,
            quiet: release.as_ref().is_some_and(|give_back| give_back.quiet),
            rejoin: release
                .and_then(|give_back| give_back.rejoin)
                .map(|rejoin| *rejoin),
        }
    }
}

fn renewed(ours: bool) -> Renewed {
    if ours {
        Renewed::Ours { wanted: false }
    } else {
        Renewed::NotOurs
    }
}

fn later(stamp: Stamp, by: Duration) -> Stamp {
    Stamp {
        at: stamp.at + by,
        ..stamp
    }
}

/// A place in the storage's queue.
#[derive(Clone, Copy)]
struct Standing {
    claim: Claim,
    /// The baseline.
    sent: Timestamp,
    stamp: Stamp,
}

/// One machine, a clock that moves when told to, and waiters that are woken by their places.
struct Key {
    state: KeyState<Place>,
    now: Timestamp,
    tokens: u64,
    /// Whether messages of the storage arrive.
    told: bool,
    linger: Duration,
    keeps_hot: bool,
    give_way: Duration,
}

impl Key {
    fn new() -> Self {
        Self {
            state: KeyState::new(),
            now: Timestamp::ORIGIN + ms(1_000_000),
            tokens: 0,
            told: false,
            linger: Duration::ZERO,
            keeps_hot: false,
            give_way: Duration::ZERO,
        }
    }

    /// A key whose lock is kept in parts.
    fn in_parts() -> Self {
        Self {
            state: KeyState::new().in_parts(true),
            give_way: ms(8),
            ..Self::listening()
        }
    }

    fn listening() -> Self {
        Self {
            told: true,
            ..Self::new()
        }
    }

    /// A key whose lease is kept idle.
    fn idle() -> (Self, Claim) {
        let mut key = Self {
            linger: LINGER,
            ..Self::listening()
        };
        let turn = key.obtain_next();
        assert_eq!(key.done(turn), (Ended::Lingers, Told::nothing()));
        (key, turn.claim)
    }

    /// A key with a holder whose lease others want.
    fn wanted() -> (Self, Granted) {
        let mut key = Self::listening();
        let turn = key.obtain_next();
        assert_eq!(key.wants(), Told::nothing());
        (key, turn)
    }

    /// A key that was given to others, with a waiter, and the place that it may get.
    fn rejoined() -> (Self, Place, Standing) {
        let (mut key, turn) = Self::wanted();
        let place = key.join();
        key.sleep(place);
        key.pass(LIMIT.time);
        let sent = key.now;
        let (_, told) = key.done(turn);
        key.pass(ms(100));
        let standing = Standing {
            claim: told.rejoin.unwrap().claim,
            sent,
            stamp: key.stamp(),
        };
        (key, place, standing)
    }

    /// A key with a holder.
    fn held() -> (Self, Granted) {
        let mut key = Self::new();
        let place = key.join();
        let turn = key.obtain(place);
        (key, turn)
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn join(&mut self) -> Place {
        self.state.join(TTL, MAX_HOLD, PAUSE)
    }

    fn leave(&mut self, place: Place) -> Told {
        self.state.leave(place).into()
    }

    fn poll(&mut self, place: Place) -> (Step, Told) {
        let tokens = &mut self.tokens;
        let new_token = || {
            *tokens += 1;
            OwnerToken::new(1, *tokens)
        };
        let (step, effects) = self.state.poll(place, self.now, || place, new_token);
        (step, effects.into())
    }

    /// Polls a waiter that has to ask now.
    fn ask(&mut self, place: Place) -> Attempt {
        match self.poll(place) {
            (Step::Ask(attempt), told) if told == Told::nothing() => attempt,
            other => panic!("does not just ask: {other:?}"),
        }
    }

    /// Polls a waiter that has to ask with a fresh token, and to give back `old`.
    fn ask_anew(&mut self, place: Place, old: Claim) -> Attempt {
        match self.poll(place) {
            (Step::Ask(attempt), told) if told == Told::release(old) => {
                assert_ne!(attempt.claim.token, old.token);
                attempt
            }
            other => panic!("does not ask anew: {other:?}"),
        }
    }

    /// Polls a waiter that has to get a turn now.
    fn take(&mut self, place: Place) -> Granted {
        match self.poll(place) {
            (Step::Granted(granted), told) if told == Told::nothing() => granted,
            other => panic!("has no turn: {other:?}"),
        }
    }

    /// Polls a waiter that has to sleep until it is woken.
    fn sleep(&mut self, place: Place) {
        match self.poll(place) {
            (Step::Wait, told) if told == Told::nothing() => {}
            other => panic!("does not sleep: {other:?}"),
        }
    }

    /// Polls a waiter that has to come again later by itself.
    fn doze(&mut self, place: Place) -> Timestamp {
        match self.poll(place) {
            (Step::AskAt(at), told) if told == Told::nothing() => at,
            other => panic!("has no time to come again at: {other:?}"),
        }
    }

    fn replied(&mut self, claim: Claim, outcome: Outcome) -> Told {
        self.state
            .replied(claim, outcome, self.now, self.now + PAUSE)
            .into()
    }

    fn granted(&mut self, claim: Claim) -> Told {
        self.replied(
            claim,
            Outcome::Granted {
                wanted: false,
                fencing: None,
            },
        )
    }

    /// The same with the fencing tokens from `first` on, as many as were asked for.
    fn granted_from(&mut self, attempt: Attempt, first: u64) -> Told {
        let fencing = Some(FencingBlock {
            first,
            count: attempt.fencing,
        });
        let wanted = false;
        self.replied(attempt.claim, Outcome::Granted { wanted, fencing })
    }

    fn denied(&mut self, claim: Claim) -> Told {
        self.replied(
            claim,
            Outcome::Denied {
                holder_ttl: Some(ms(700)),
                queued: None,
            },
        )
    }

    fn failed(&mut self, claim: Claim, kind: StorageErrorKind) -> Told {
        self.replied(claim, Outcome::Failed(StorageError::new(kind)))
    }

    /// An attempt that is not answered, once a pause is over.
    fn failed_attempt(&mut self, place: Place) -> Claim {
        self.pass(PAUSE);
        let claim = self.ask(place).claim;
        assert_eq!(
            self.failed(claim, StorageErrorKind::Timeout),
            Told::nothing()
        );
        self.doze(place);
        claim
    }

    /// What the storage's clock shows.
    fn stamp(&self) -> Stamp {
        Stamp {
            run: Some(7),
            at: ms(5_000_000) + self.now.since(Timestamp::ORIGIN),
        }
    }

    fn queued(&mut self, claim: Claim, stamp: Stamp) -> Told {
        self.replied(
            claim,
            Outcome::Denied {
                holder_ttl: Some(ms(700)),
                queued: Some(stamp),
            },
        )
    }

    /// From the front of the queue to a place in the storage's.
    fn enqueue(&mut self, place: Place) -> Standing {
        let claim = self.ask(place).claim;
        let (sent, stamp) = (self.now, self.stamp());
        assert_eq!(self.queued(claim, stamp), Told::nothing());
        self.doze(place);
        Standing { claim, sent, stamp }
    }

    fn grant(&self, claim: Claim, stamp: Stamp) -> PushedGrant {
        PushedGrant {
            name: LockName::parse("lock", "lock:key").unwrap(),
            token: claim.token,
            ttl: claim.ttl,
            stamp,
            wanted: false,
            fencing: None,
        }
    }

    /// A grant that comes with two fencing tokens.
    fn grant_from(&self, claim: Claim, stamp: Stamp, first: u64) -> PushedGrant {
        PushedGrant {
            fencing: Some(FencingBlock { first, count: 2 }),
            ..self.grant(claim, stamp)
        }
    }

    fn pushed(&mut self, grant: &PushedGrant) -> Told {
        self.state.pushed(grant, self.now).into()
    }

    fn push(&mut self, claim: Claim, stamp: Stamp) -> Told {
        let grant = self.grant(claim, stamp);
        self.pushed(&grant)
    }

    fn ask_again(&mut self) -> Told {
        self.state.ask_again(self.now).into()
    }

    /// A newcomer that gets a turn by an attempt.
    fn obtain_next(&mut self) -> Granted {
        let place = self.join();
        self.obtain(place)
    }

    /// From one turn to that of a newcomer.
    fn hand_over(&mut self, turn: Granted) -> Granted {
        let next = self.join();
        self.sleep(next);
        assert_eq!(self.done(turn), (Ended::HandedOver, Told::wake(next)));
        self.take(next)
    }

    /// From the front of the queue through the storage to a turn.
    fn obtain(&mut self, place: Place) -> Granted {
        let claim = self.ask(place).claim;
        self.granted(claim);
        self.take(place)
    }

    fn done(&mut self, turn: Granted) -> (Ended, Told) {
        let (ended, effects) = self.give_back(turn);
        (ended, effects.into())
    }

    fn give_back(&mut self, turn: Granted) -> (Ended, Effects<Place>) {
        self.state.turn_done(
            turn.id,
            turn.claim,
            Sharing {
                limit: LIMIT,
                told: self.told,
                linger: self.linger,
                keeps_hot: self.keeps_hot,
                give_way: self.give_way,
            },
            self.now,
            || {
                assert!(self.told, "nobody would tell us of a grant");
                self.tokens += 1;
                OwnerToken::new(1, self.tokens)
            },
        )
    }

    /// Ticks, where nothing but a renewal or the next look can come of it.
    fn tick(&mut self) -> (Option<Claim>, Option<Timestamp>) {
        let tick = self.state.tick(self.now);
        assert!(tick.effects.is_none(), "{tick:?}");
        (tick.renew, tick.due)
    }

    /// Ticks when something ends.
    fn last_tick(&mut self) -> Told {
        let tick = self.state.tick(self.now);
        assert_eq!(tick.renew, None);
        tick.effects.into()
    }

    fn renewed(&mut self, claim: Claim, sent: Timestamp, reply: Option<Renewed>) -> Told {
        self.state.renewed(claim, sent, reply, self.now).into()
    }

    /// The storage says that another process waits.
    fn wants(&mut self) -> Told {
        self.state.wanted(self.now).into()
    }

    fn release_done(&mut self) -> Told {
        self.state.release_done().into()
    }
}

// --- asking --------------------------------------------------------------------------------------

#[test]
fn an_uncontended_key_is_asked_for_held_released_and_forgotten() {
    let mut key = Key::new();
    assert!(key.state.is_done() && !key.state.is_busy(key.now));
    let a = key.join();
    let attempt = key.ask(a);
    assert!(!key.state.is_busy(key.now), "nobody has it yet");
    assert!(!attempt.again);
    assert_eq!(attempt.claim.ttl, TTL);
    assert_eq!(key.granted(attempt.claim), Told::nothing());
    let turn = key.take(a);
    assert_eq!(turn.claim, attempt.claim);
    assert!(key.state.is_busy(key.now) && key.state.waiters() == 0);
    assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    assert!(!key.state.is_done(), "the release is on its way");
    assert_eq!(key.release_done(), Told::nothing());
    assert!(key.state.is_done());
}

#[test]
fn a_lease_counts_from_before_its_attempt_was_sent() {
    let mut key = Key::new();
    let a = key.join();
    let sent = key.now;
    let claim = key.ask(a).claim;
    key.pass(ms(2_000));
    key.granted(claim);
    let turn = key.take(a);
    assert_eq!(turn.deadline, sent + VALID);
    assert_eq!(key.state.due(), Some(sent + TTL / 3));
    assert_eq!(turn.ends, key.now + MAX_HOLD);
    assert_eq!(key.state.holder_ttl(key.now), Some(VALID - ms(2_000)));
}

#[test]
fn one_attempt_at_a_time() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.join());
    key.sleep(b);
    let claim = key.ask(a).claim;
    key.sleep(b);
    assert_eq!(key.leave(a), Told::wake(b));
    // The attempt goes on without its caller, so the second does not start another.
    key.sleep(b);
    assert_eq!(key.granted(claim), Told::wake(b));
    assert_eq!(key.take(b).claim, claim);
}

#[test]
fn a_denied_attempt_gets_a_fresh_token() {
    let mut key = Key::new();
    let a = key.join();
    let first = key.ask(a);
    assert_eq!(key.denied(first.claim), Told::nothing());
    assert_eq!(key.state.holder_ttl(key.now), Some(ms(700)));
    assert_eq!(key.doze(a), key.now + PAUSE);
    // It comes again by itself.
    assert_eq!(key.state.due(), None);
    key.pass(ms(700));
    assert_eq!(key.state.holder_ttl(key.now), None, "that is over");
    key.pass(PAUSE - ms(701));
    key.doze(a);
    key.pass(ms(1));
    let second = key.ask(a);
    assert!(second.again);
    assert_ne!(second.claim.token, first.claim.token);
    assert_eq!(key.state.holder_ttl(key.now), None, "that time is over");
}

#[test]
fn an_unanswered_attempt_is_repeated_with_its_own_token() {
    let mut key = Key::new();
    let a = key.join();
    let first = key.ask(a);
    assert_eq!(
        key.failed(first.claim, StorageErrorKind::Timeout),
        Told::nothing()
    );
    assert!(key.state.last_error().is_some());
    assert_eq!(key.doze(a), key.now + PAUSE);
    key.pass(PAUSE);
    let sent = key.now;
    let second = key.ask(a);
    assert!(second.again && second.repeated);
    assert_eq!(second.claim, first.claim);
    key.granted(second.claim);
    assert!(key.state.last_error().is_none());
    assert_eq!(key.take(a).deadline, sent + VALID);
}

#[test]
fn a_token_that_was_refused_and_given_the_lock_all_the_same_is_given_back() {
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.ask(a).claim;
    assert_eq!(key.push(claim, key.stamp()), Told::nothing());
    let told = key.failed(claim, StorageErrorKind::Unauthorized);
    assert_eq!(told, Told::release(claim));
    key.doze(a);
    key.pass(PAUSE);
    // The same without a place.
    let next = key.ask(a).claim;
    assert_ne!(next.token, claim.token);
    key.push(next, key.stamp());
    assert_eq!(key.denied(next), Told::release(next));
    key.doze(a);
    key.pass(PAUSE);
    // And where nobody waits any more.
    let last = key.ask(a).claim;
    assert_eq!(key.leave(a), Told::nothing());
    key.push(last, key.stamp());
    let told = key.failed(last, StorageErrorKind::Unauthorized);
    assert_eq!(told, Told::release(last));
    for _ in 0..3 {
        key.release_done();
    }
    assert!(key.state.is_done());
}

/// The first attempt may yet be carried out, after the second was granted, and would then set its
/// own ttl under the second's token.
#[test]
fn a_token_whose_place_is_used_up_is_not_used_again() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.doze(a);
    // The message that grants it lies somewhere, and its time runs out.
    let granted = key.grant_from(place.claim, place.stamp, 11);
    key.pass(PAUSE);
    let repeated = key.ask(a);
    assert_eq!((repeated.claim, repeated.repeated), (place.claim, true));
    assert_eq!(
        key.replied(repeated.claim, Outcome::NotQueued),
        Told::nothing()
    );
    let next = key.ask(a);
    assert_eq!((next.again, next.repeated), (true, false));
    assert_ne!(next.claim.token, place.claim.token);

    // Were it a lease now, a renewal could find the next lock of the same token.
    assert_eq!(key.pushed(&granted), Told::release(place.claim));
    assert_eq!(key.granted_from(next, 14), Told::nothing());
    assert_eq!(key.take(a).fencing, Some(14));

    // What was used up while a message about it waited is not there any more, either.
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.pass(PAUSE);
    let repeated = key.ask(a);
    key.sleep(a);
    key.push(place.claim, place.stamp);
    assert_eq!(
        key.replied(repeated.claim, Outcome::NotQueued),
        Told::release(place.claim).and_wake(a)
    );
    assert_ne!(key.ask(a).claim.token, place.claim.token);
}

#[test]
fn an_unanswered_attempt_is_released_and_not_repeated_by_a_waiter_with_another_ttl() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.state.join(6 * TTL, MAX_HOLD, PAUSE));
    key.sleep(b);
    let first = key.ask(a).claim;
    key.failed(first, StorageErrorKind::Timeout);
    assert_eq!(key.leave(a), Told::wake(b));
    key.pass(PAUSE);
    key.ask_anew(b, first);
}

#[test]
fn an_attempt_that_was_refused_was_not_carried_out_and_leaves_nothing_to_give_back() {
    let mut key = Key::new();
    let a = key.join();
    let first = key.ask(a).claim;
    key.failed(first, StorageErrorKind::Rejected);
    assert!(key.state.last_error().is_some());
    assert_eq!(key.leave(a), Told::nothing());
    assert!(key.state.is_done());
}

#[test]
fn a_refused_repetition_does_not_settle_the_attempt_that_got_no_answer() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.failed(claim, StorageErrorKind::Timeout);
    key.pass(PAUSE);
    assert_eq!(key.ask(a).claim, claim);
    key.failed(claim, StorageErrorKind::Rejected);
    assert_eq!(key.leave(a), Told::release(claim));
}

#[test]
fn failures_are_counted_until_the_key_is_had_or_nobody_wants_it() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.join());
    key.sleep(b);
    for failures in 0..3 {
        assert_eq!(key.state.failures(), failures);
        let claim = key.ask(a).claim;
        key.failed(claim, StorageErrorKind::Unavailable);
        key.pass(PAUSE);
    }
    let turn = key.obtain(a);
    assert_eq!(key.state.failures(), 0);
    key.done(turn);

    key.pass(VALID);
    let claim = key.ask_anew(b, turn.claim).claim;
    key.denied(claim);
    assert_eq!(key.state.failures(), 1);
    assert_eq!(key.leave(b), Told::nothing());
    assert_eq!(key.state.failures(), 0);
}

#[test]
fn a_late_grant_is_released_and_not_used() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.join());
    let claim = key.ask(a).claim;
    key.sleep(b);
    key.leave(a);
    key.sleep(b);
    key.pass(VALID);
    assert_eq!(key.granted(claim), Told::release(claim).and_wake(b));
    // The next reply may come as late, so it does not ask at once, nor when the release has landed.
    let at = key.doze(b);
    assert_eq!(key.release_done(), Told::nothing());
    key.pass(at.since(key.now));
    assert_ne!(key.ask(b).claim.token, claim.token);
}

#[test]
fn a_denial_while_our_own_release_is_on_its_way_is_retried_when_it_has_landed() {
    let (mut key, turn) = Key::held();
    key.done(turn);
    let a = key.join();
    let claim = key.ask(a).claim;
    key.denied(claim);
    key.doze(a);
    assert_eq!(key.release_done(), Told::wake(a));
    key.ask(a);
}

#[test]
fn a_denial_that_is_told_after_our_own_release_has_landed_is_retried_at_once() {
    let (mut key, turn) = Key::held();
    key.done(turn);
    let a = key.join();
    let claim = key.ask(a).claim;
    key.release_done();
    key.denied(claim);
    let claim = key.ask(a).claim;
    // Now nothing of ours can have been in the way.
    key.denied(claim);
    key.doze(a);
}

#[test]
fn a_release_that_lands_does_not_hurry_a_storage_in_trouble() {
    let (mut key, turn) = Key::held();
    key.done(turn);
    let a = key.join();
    let claim = key.ask(a).claim;
    key.failed(claim, StorageErrorKind::Unavailable);
    let at = key.doze(a);
    assert_eq!(key.release_done(), Told::nothing());
    assert_eq!(key.doze(a), at);
}

// --- waiting -------------------------------------------------------------------------------------

#[test]
fn turns_are_given_in_the_order_of_arrival() {
    let (mut key, mut turn) = Key::held();
    let places = [key.join(), key.join(), key.join()];
    // The last to poll is not the last to get it.
    places.iter().rev().for_each(|place| key.sleep(*place));
    for place in &places[..2] {
        let told = Told::wake(*place);
        assert_eq!(key.done(turn), (Ended::HandedOver, told));
        turn = key.take(*place);
    }
}

#[test]
fn nobody_passes_a_waiter_that_was_woken_and_has_not_come_yet() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.done(turn);
    let b = key.join();
    key.sleep(b);
    assert_eq!(key.take(a).claim, turn.claim);
}

#[test]
fn the_first_leaving_wakes_the_second() {
    let mut key = Key::new();
    let (a, b, c) = (key.join(), key.join(), key.join());
    key.sleep(b);
    key.sleep(c);
    let claim = key.ask(a).claim;
    key.denied(claim);
    let at = key.doze(a);
    assert_eq!(key.leave(a), Told::wake(b));
    assert_eq!(key.doze(b), at);
    assert_eq!(key.leave(c), Told::nothing(), "from the middle or the end");

    let (mut key, turn) = Key::held();
    let (a, b) = (key.join(), key.join());
    key.sleep(a);
    key.sleep(b);
    assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(a)));
    assert_eq!(key.leave(a), Told::wake(b), "a was woken in vain");
    assert_eq!(key.take(b).claim, turn.claim);
}

#[test]
fn the_last_leaving_gives_back_what_was_got_for_it() {
    // A lease that it did not take any more.
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.granted(claim);
    assert_eq!(key.leave(a), Told::release(claim));

    // An attempt that brings the lease only now.
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    assert_eq!(key.leave(a), Told::nothing());
    assert!(!key.state.is_done());
    assert_eq!(key.granted(claim), Told::release(claim));

    // An attempt that may have been carried out, known before it left or after.
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.failed(claim, StorageErrorKind::Timeout);
    assert_eq!(key.leave(a), Told::release(claim));
    key.release_done();
    assert!(key.state.is_done());
    let a = key.join();
    let claim = key.ask(a).claim;
    key.leave(a);
    assert_eq!(
        key.failed(claim, StorageErrorKind::Timeout),
        Told::release(claim)
    );

    // Nothing was got.
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.leave(a);
    assert_eq!(key.denied(claim), Told::nothing());
    assert!(key.state.is_done());
}

#[test]
fn everybody_can_be_made_to_look_up() {
    let (mut key, _) = Key::held();
    let places = [key.join(), key.join()];
    places.iter().for_each(|place| key.sleep(*place));
    assert_eq!(key.state.wake_all(), places);
    assert_eq!(key.state.wake_all(), [], "they are awake");
}

// --- handing over --------------------------------------------------------------------------------

#[test]
fn turns_are_bounded_by_count_and_by_time() {
    let (mut key, mut turn) = Key::held();
    for _ in 1..LIMIT.turns {
        let next = key.join();
        key.sleep(next);
        assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(next)));
        turn = key.take(next);
    }
    let next = key.join();
    key.sleep(next);
    assert_eq!(
        key.done(turn),
        (Ended::Released, Told::release(turn.claim).and_wake(next))
    );
    assert_ne!(key.ask(next).claim.token, turn.claim.token);

    for (held_for, ended) in [
        (LIMIT.time - ms(1), Ended::HandedOver),
        (LIMIT.time, Ended::Released),
    ] {
        let (mut key, turn) = Key::held();
        let next = key.join();
        key.sleep(next);
        key.pass(held_for);
        assert_eq!(key.done(turn).0, ended);
    }
}

#[test]
fn a_lease_that_is_over_is_not_handed_over() {
    // Over when the turn is done.
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.pass(VALID);
    assert_eq!(
        key.done(turn),
        (Ended::Lost, Told::release(turn.claim).and_wake(a))
    );
    assert_ne!(key.ask(a).claim.token, turn.claim.token);

    // Over before the next one comes.
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    assert_eq!(key.done(turn).0, Ended::HandedOver);
    key.pass(VALID);
    key.ask_anew(a, turn.claim);
}

/// Less than half the ttl left means that renewals fail.
#[test]
fn a_lease_that_nears_its_end_is_not_handed_over() {
    let limit = HandoffLimit {
        turns: 9,
        time: MAX_HOLD,
    };
    for (left, ended) in [
        (TTL / 2, Ended::HandedOver),
        (TTL / 2 - ms(1), Ended::Released),
    ] {
        let (mut key, turn) = Key::held();
        key.join();
        key.pass(VALID - left);
        let (how, _) = key.state.turn_done(
            turn.id,
            turn.claim,
            Sharing {
                limit,
                told: false,
                linger: Duration::ZERO,
                keeps_hot: false,
                give_way: Duration::ZERO,
            },
            key.now,
            || panic!("nobody would tell us of a grant"),
        );
        assert_eq!(how, ended);
    }
}

#[test]
fn a_waiter_with_another_ttl_gets_a_lease_of_its_own() {
    let (mut key, turn) = Key::held();
    let a = key.state.join(TTL / 2, MAX_HOLD, PAUSE);
    key.sleep(a);
    let told = Told::release(turn.claim).and_wake(a);
    assert_eq!(key.done(turn), (Ended::Released, told));
    let attempt = key.ask(a);
    assert_eq!(attempt.claim.ttl, TTL / 2);
    key.granted(attempt.claim);
    assert_eq!(key.take(a).claim, attempt.claim);
}

#[test]
fn a_lease_passed_on_by_a_waiter_that_left_is_not_for_one_with_another_ttl() {
    let (mut key, turn) = Key::held();
    let (a, b) = (key.join(), key.state.join(TTL / 2, MAX_HOLD, PAUSE));
    key.sleep(a);
    key.sleep(b);
    key.done(turn);
    assert_eq!(key.leave(a), Told::wake(b));
    let attempt = key.ask_anew(b, turn.claim);
    assert_eq!(attempt.claim.ttl, TTL / 2);
    key.release_done();
    assert_eq!(key.state.releasing, 0);
}

#[test]
fn a_turn_that_was_lost_ends_no_other() {
    let (mut key, lost) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.pass(VALID);
    assert_eq!(key.last_tick(), Told::lost(LossReason::Expired).and_wake(a));
    let other = key.obtain(a);
    // A renewal may have prolonged the lost one in the storage.
    assert_eq!(key.done(lost), (Ended::Lost, Told::release(lost.claim)));
    assert_eq!(
        key.done(other),
        (Ended::Released, Told::release(other.claim))
    );
}

// --- what ends a turn ----------------------------------------------------------------------------

#[test]
fn max_hold_ends_a_turn_and_its_lease_is_not_handed_over() {
    for is_told in [true, false] {
        let mut key = Key::new();
        let (a, b) = (key.state.join(TTL, ms(500), PAUSE), key.join());
        let lease_ends = key.now + VALID;
        let turn = key.obtain(a);
        key.sleep(b);
        assert_eq!(turn.ends, key.now + ms(500));
        assert_eq!(
            (turn.deadline, key.state.due()),
            (turn.ends, Some(turn.ends))
        );
        key.pass(ms(500));
        if is_told {
            assert_eq!(key.last_tick(), Told::lost(LossReason::MaxHold));
            // Once. It may still be at it, so nobody else gets the lease, which is left to run out.
            key.pass(TTL / 3);
            assert_eq!(key.tick(), (None, Some(lease_ends)));
            key.sleep(b);
        }
        assert_eq!(
            key.done(turn),
            (Ended::Lost, Told::release(turn.claim).and_wake(b))
        );
    }
}

#[test]
fn a_turn_that_never_ends_blocks_the_key_until_its_lease_is_over() {
    let mut key = Key::new();
    let (a, b) = (key.state.join(TTL, ms(500), PAUSE), key.join());
    key.obtain(a);
    key.sleep(b);
    key.pass(ms(500));
    key.last_tick();
    key.pass(VALID - ms(500));
    assert_eq!(key.last_tick(), Told::wake(b), "it was told already");
    key.ask(b);
}

#[test]
fn a_turn_is_revoked_once_and_neither_renewed_nor_handed_over() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    assert!(key.state.revoke());
    assert!(!key.state.revoke());
    key.pass(TTL / 3);
    assert_eq!(key.tick(), (None, Some(turn.deadline)));
    assert_eq!(
        key.done(turn),
        (Ended::Lost, Told::release(turn.claim).and_wake(a))
    );
    assert!(!key.state.revoke(), "there is no turn");
}

#[test]
fn a_renewal_never_outlasts_max_hold() {
    let mut key = Key::new();
    let a = key.state.join(TTL, TTL, PAUSE);
    let turn = key.obtain(a);
    key.pass(TTL / 2);
    let (renew, _) = key.tick();
    assert_eq!(
        key.renewed(
            renew.unwrap(),
            key.now,
            Some(Renewed::Ours { wanted: false })
        )
        .deadline,
        Some(turn.ends)
    );
}

// --- renewing ------------------------------------------------------------------------------------

#[test]
fn a_lease_in_use_is_renewed_at_a_third_of_its_ttl_and_counts_from_the_sending() {
    let (mut key, turn) = Key::held();
    let (due, slack) = (Some(key.now + TTL / 3), TTL / 30);
    key.pass(TTL / 3 - slack - ms(1));
    assert_eq!(key.tick(), (None, due));
    key.pass(ms(1));
    assert_eq!(key.tick(), (Some(turn.claim), Some(turn.deadline)));
    let sent = key.now;
    assert_eq!(key.tick().0, None, "one at a time");
    key.pass(ms(700));
    let told = key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false }));
    assert_eq!(told.deadline, Some(sent + VALID));
    assert_eq!(key.tick(), (None, Some(sent + TTL / 3)));
}

#[test]
fn a_failed_renewal_changes_no_deadline() {
    let (mut key, turn) = Key::held();
    key.pass(TTL / 3);
    assert_eq!(key.tick().0, Some(turn.claim));
    let sent = key.now;
    key.pass(TTL / 10);
    assert_eq!(key.renewed(turn.claim, sent, None), Told::nothing());
    assert_eq!(key.tick(), (None, Some(key.now + TTL / 10)));
    key.pass(TTL / 10);
    assert_eq!(key.tick(), (Some(turn.claim), Some(turn.deadline)));
    key.pass(turn.deadline.since(key.now));
    assert_eq!(key.last_tick(), Told::lost(LossReason::Expired));
}

#[test]
fn a_renewal_that_succeeds_at_or_after_the_deadline_revives_nothing() {
    for (early, told) in [
        (
            ms(1),
            Told {
                deadline: Some(Timestamp::ORIGIN + ms(1_000_000) + TTL / 3 + VALID),
                ..Told::nothing()
            },
        ),
        (
            ms(0),
            Told {
                lost: Some(LossReason::Expired),
                ..Told::release(Key::held().1.claim)
            },
        ),
    ] {
        let (mut key, turn) = Key::held();
        key.pass(TTL / 3);
        key.tick();
        let sent = key.now;
        key.pass(turn.deadline.since(sent) - early);
        assert_eq!(
            key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false })),
            told
        );
    }

    // After the tick that found it over.
    let (mut key, turn) = Key::held();
    key.pass(TTL / 3);
    key.tick();
    let sent = key.now;
    key.pass(VALID);
    assert_eq!(key.last_tick(), Told::lost(LossReason::Expired));
    assert_eq!(
        key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false })),
        Told::release(turn.claim)
    );
    assert_eq!(key.renewed(turn.claim, sent, None), Told::nothing());
}

#[test]
fn not_ours_is_lost_at_once() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.pass(TTL / 3);
    key.tick();
    assert_eq!(
        key.renewed(turn.claim, key.now, Some(Renewed::NotOurs)),
        Told::lost(LossReason::NotOurs).and_wake(a)
    );
    assert_ne!(key.ask(a).claim.token, turn.claim.token);
    assert_eq!(key.done(turn), (Ended::Lost, Told::release(turn.claim)));
}

impl Key {
    fn told_of_force(&mut self, claim: Claim) -> Told {
        self.state.told_of_force(claim.token, self.now).into()
    }

    /// That another token's lock was taken away is nothing to this one.
    fn told_of_force_on_another(&mut self, claim: Claim) {
        let token = OwnerToken::new(1, claim.token.number() + 1);
        let told = self.told_of_force(Claim { token, ..claim });
        assert_eq!(told, Told::nothing());
    }
}

#[test]
fn whoever_is_told_that_its_lock_was_taken_away_asks_the_storage_at_once() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    assert_eq!(key.told_of_force(turn.claim), Told::nothing());
    assert_eq!(key.state.due(), Some(key.now));
    let (renewal, _) = key.tick();
    assert_eq!(renewal, Some(turn.claim));
    assert_eq!(
        key.renewed(turn.claim, key.now, Some(Renewed::NotOurs)),
        Told::lost(LossReason::ForceReleased).and_wake(a)
    );
    // For a holder that gives it back before it is told.
    assert_eq!(key.state.loss(turn.claim), Some(LossReason::ForceReleased));
    assert_ne!(key.ask(a).claim.token, turn.claim.token);
    // Told again, it is no news.
    assert_eq!(key.told_of_force(turn.claim), Told::nothing());
    assert_eq!(key.done(turn), (Ended::Lost, Told::release(turn.claim)));
}

#[test]
fn who_is_told_wrong_that_its_lock_was_taken_away_keeps_it() {
    let (mut key, turn) = Key::held();
    key.told_of_force(turn.claim);
    key.tick();
    let sent = key.now;
    let told = key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false }));
    assert_eq!(told.lost, None);
    assert!(key.state.due() > Some(key.now));
    // What is found later has nothing to do with it.
    key.pass(TTL / 3);
    key.tick();
    let told = key.renewed(turn.claim, key.now, Some(Renewed::NotOurs));
    assert_eq!(told, Told::lost(LossReason::NotOurs));
}

#[test]
fn a_renewal_that_was_sent_before_the_word_says_nothing_about_it() {
    let (mut key, turn) = Key::held();
    key.pass(TTL / 3);
    let (renewal, _) = key.tick();
    assert_eq!(renewal, Some(turn.claim));
    key.told_of_force(turn.claim);
    let sent = key.now;
    key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false }));
    assert_eq!(key.state.due(), Some(key.now));
    let (renewal, _) = key.tick();
    assert_eq!(renewal, Some(turn.claim));
    let told = key.renewed(turn.claim, key.now, Some(Renewed::NotOurs));
    assert_eq!(told, Told::lost(LossReason::ForceReleased));
}

#[test]
fn what_a_renewal_finds_is_of_its_own_lease_only() {
    let (mut key, turn) = Key::held();
    key.pass(TTL / 3);
    let (renewal, _) = key.tick();
    assert_eq!(renewal, Some(turn.claim));
    let sent = key.now;
    assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    key.release_done();
    let next = key.obtain_next();
    for reply in [Some(Renewed::NotOurs), Some(renewed(true)), None] {
        assert_eq!(key.renewed(turn.claim, sent, reply), Told::nothing());
    }
    assert_eq!(key.done(next), (Ended::Released, Told::release(next.claim)));
}

#[test]
fn a_lock_that_is_taken_away_is_that_of_one_lease_only() {
    let (mut key, turn) = Key::held();
    key.told_of_force_on_another(turn.claim);
    assert!(key.state.due() > Some(key.now));
    let next = key.hand_over(turn);
    assert_eq!(next.claim, turn.claim);
    key.told_of_force(turn.claim);
    assert_eq!(key.state.due(), Some(key.now));
}

#[test]
fn a_lease_in_doubt_is_not_handed_on() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.told_of_force(turn.claim);
    let (ended, told) = key.done(turn);
    assert_eq!(ended, Ended::Released);
    assert_eq!(told.release, Told::release(turn.claim).release);
    assert_ne!(key.ask(a).claim.token, turn.claim.token);
}

#[test]
fn a_lease_without_a_turn_that_is_taken_away_is_given_back_all_the_same() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(a)));
    let told = key.told_of_force(turn.claim);
    assert_eq!(told.release, Told::release(turn.claim).release);
    assert_ne!(key.ask(a).claim.token, turn.claim.token);
}

#[test]
fn a_place_whose_lock_is_taken_away_before_its_message_comes_is_given_up() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.told_of_force_on_another(place.claim);
    key.doze(a);
    assert_eq!(
        key.told_of_force(place.claim),
        Told::release(place.claim).and_wake(a)
    );
    assert_ne!(key.ask(a).claim.token, place.claim.token);
}

#[test]
fn an_attempt_goes_on_if_the_lock_of_another_is_taken_away() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.told_of_force_on_another(claim);
    assert_eq!(key.granted(claim), Told::nothing());
    assert_eq!(key.take(a).claim, claim);
}

#[test]
fn an_attempt_whose_lock_is_taken_away_and_that_fails_waits_before_the_next() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.told_of_force(claim);
    let told = key.failed(claim, StorageErrorKind::Timeout);
    assert_eq!(told, Told::release(claim));
    assert!(key.state.last_error().is_some());
    assert_eq!(key.doze(a), key.now + PAUSE);
    key.pass(PAUSE);
    assert_ne!(key.ask(a).claim.token, claim.token);
}

#[test]
fn a_lock_that_is_taken_away_before_its_grant_is_heard_of_is_never_entered() {
    for outcome in [
        Outcome::Granted {
            wanted: false,
            fencing: None,
        },
        Outcome::Denied {
            holder_ttl: Some(TTL),
            queued: None,
        },
        Outcome::NotQueued,
    ] {
        let mut key = Key::new();
        let a = key.join();
        let attempt = key.ask(a);
        assert_eq!(key.told_of_force(attempt.claim), Told::nothing());
        let told: Told = key
            .state
            .replied(attempt.claim, outcome, key.now, key.now + TTL)
            .into();
        assert_eq!(told.release, Told::release(attempt.claim).release);
        assert_ne!(key.ask(a).claim.token, attempt.claim.token);
    }
}

#[test]
fn a_renewal_answered_after_the_turn_is_the_next_ones() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.pass(TTL / 3);
    key.tick();
    let sent = key.now;
    key.done(turn);
    assert_eq!(
        key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: false })),
        Told::nothing()
    );
    assert_eq!(key.take(a).deadline, sent + VALID);
}

#[test]
fn a_lease_without_a_turn_is_not_renewed() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.done(turn);
    key.pass(TTL / 3);
    assert_eq!(key.tick(), (None, Some(turn.deadline)));
}

/// The storage may hold it for much longer than it was valid here: it counts from when it got the
/// attempt.
#[test]
fn a_lease_that_runs_out_without_a_turn_is_released() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.done(turn);
    key.pass(VALID);
    assert_eq!(key.last_tick(), Told::release(turn.claim));
    assert_ne!(key.ask(a).claim.token, turn.claim.token);
}

// --- waiting in the storage's queue --------------------------------------------------------------

#[test]
fn a_queued_waiter_keeps_its_token_when_it_asks_again() {
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.enqueue(a).claim;
    for _ in 0..3 {
        assert_eq!(key.doze(a), key.now + PAUSE);
        key.pass(PAUSE);
        let attempt = key.ask(a);
        assert!(attempt.again);
        assert_eq!(attempt.claim, claim, "it would lose its place");
        assert_eq!(key.queued(claim, key.stamp()), Told::nothing());
    }
    assert_eq!(key.failed_attempt(a), claim);
    key.pass(PAUSE);
    assert_eq!(key.ask(a).claim, claim);
}

#[test]
fn a_place_is_left_to_the_next_waiter_of_this_process() {
    let mut key = Key::listening();
    let (a, b) = (key.join(), key.join());
    key.sleep(b);
    let place = key.enqueue(a);
    assert_eq!(key.leave(a), Told::wake(b));
    key.doze(b);
    assert_eq!(key.push(place.claim, key.stamp()), Told::wake(b));
    assert_eq!(key.take(b).claim, place.claim);
}

#[test]
fn the_last_leaving_gives_back_its_place() {
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.enqueue(a).claim;
    assert_eq!(key.leave(a), Told::release(claim));
    key.release_done();
    assert!(key.state.is_done());

    // It left before it was known to have a place.
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.ask(a).claim;
    assert_eq!(key.leave(a), Told::nothing());
    assert_eq!(key.queued(claim, key.stamp()), Told::release(claim));
    key.release_done();
    assert!(key.state.is_done());
}

#[test]
fn the_last_leaving_gives_back_a_grant_that_overtook_the_reply() {
    let runs = [Some(7), Some(8), None];
    for (run, is_answered) in [
        (runs[0], true),
        (runs[1], true),
        (runs[2], true),
        (runs[0], false),
    ] {
        let mut key = Key::listening();
        let a = key.join();
        let claim = key.ask(a).claim;
        key.leave(a);
        let stamp = key.stamp();
        key.pass(ms(1));
        assert_eq!(
            key.push(claim, Stamp { run, ..key.stamp() }),
            Told::nothing()
        );
        let told = if is_answered {
            key.queued(claim, stamp)
        } else {
            key.failed(claim, StorageErrorKind::Timeout)
        };
        assert_eq!(told, Told::release(claim), "{run:?}, {is_answered}");
        key.release_done();
        assert!(key.state.is_done(), "{:?}", key.state);
    }
}

#[test]
fn a_waiter_with_another_ttl_wants_a_place_of_its_own() {
    let mut key = Key::listening();
    let (a, b) = (key.join(), key.state.join(TTL / 2, MAX_HOLD, PAUSE));
    key.sleep(b);
    let place = key.enqueue(a);
    assert_eq!(key.leave(a), Told::wake(b));
    key.pass(PAUSE);
    let attempt = key.ask_anew(b, place.claim);
    assert_eq!(attempt.claim.ttl, TTL / 2);
    // The first one's grant was on its way.
    assert_eq!(
        key.push(place.claim, key.stamp()),
        Told::release(place.claim)
    );
}

#[test]
fn who_waits_asks_again_when_messages_arrive_again() {
    // The first ask of who was not told that it has a place.
    let mut key = Key::new();
    let (a, b) = (key.join(), key.join());
    key.sleep(b);
    let claim = key.ask(a).claim;
    key.denied(claim);
    key.doze(a);
    assert_eq!(key.ask_again(), Told::wake(a), "the others wait for it");
    key.ask(a);

    // And of who may have missed its grant.
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.enqueue(a).claim;
    key.doze(a);
    assert_eq!(key.ask_again(), Told::wake(a));
    assert_eq!(key.ask(a).claim, claim);

    // With a storage in trouble it would be one more that hurries.
    let mut key = Key::listening();
    let a = key.join();
    key.failed_attempt(a);
    let at = key.doze(a);
    assert_eq!(key.ask_again(), Told::nothing());
    assert_eq!(key.doze(a), at);

    // Who holds it, or is not here, has missed nothing.
    let (mut key, _) = Key::held();
    let a = key.join();
    key.sleep(a);
    assert_eq!(key.ask_again(), Told::nothing());
    assert_eq!(Key::new().ask_again(), Told::nothing());
}

/// The attempt may have been sent without asking for a place, or its place passed over while nobody
/// listened.
#[test]
fn who_was_asking_when_messages_arrive_again_asks_once_more() {
    for is_queued in [false, true] {
        let mut key = Key::new();
        let a = key.join();
        let claim = key.ask(a).claim;
        assert_eq!(key.ask_again(), Told::nothing());
        if is_queued {
            key.queued(claim, key.stamp());
        } else {
            key.denied(claim);
        }
        let next = key.ask(a).claim;
        key.queued(next, key.stamp());
        key.doze(a);
    }
}

/// Somebody may have begun to wait for the lock while nothing could be heard.
#[test]
fn a_lease_from_before_messages_arrive_is_taken_to_be_wanted() {
    for is_held in [true, false] {
        let mut key = Key::listening();
        let (a, b) = (key.join(), key.join());
        let claim = key.ask(a).claim;
        if !is_held {
            assert_eq!(key.ask_again(), Told::nothing());
        }
        key.granted(claim);
        let turn = key.take(a);
        if is_held {
            assert_eq!(key.ask_again(), Told::nothing());
        }
        key.sleep(b);
        key.pass(LIMIT.time);
        let (ended, told) = key.done(turn);
        assert_eq!(ended, Ended::Released);
        assert!(told.rejoin.is_some(), "{told:?}");
    }
}

/// Asked for while nobody listens, so without a place; but it stands there from before.
#[test]
fn a_denial_that_says_nothing_of_the_place_does_not_forget_it() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.pass(PAUSE);
    assert_eq!(key.ask(a).claim, place.claim);
    key.denied(place.claim);
    assert_eq!(key.leave(a), Told::release(place.claim));
}

/// An attempt that got no answer, repeated while nobody listens: only the first asked for a place.
#[test]
fn a_place_that_an_unanswered_attempt_may_have_left_is_given_back_with_its_token() {
    let mut key = Key::listening();
    let (a, b) = (key.join(), key.join());
    let first = key.ask(a);
    key.sleep(b);
    key.failed(first.claim, StorageErrorKind::Timeout);
    key.pass(PAUSE);
    let second = key.ask(a);
    assert_eq!((second.claim, second.repeated), (first.claim, true));
    key.sleep(a);
    assert_eq!(
        key.denied(second.claim),
        Told::release(first.claim).and_wake(a)
    );
    key.pass(PAUSE);
    let third = key.ask(a);
    assert_ne!(third.claim.token, first.claim.token);
    assert!(!third.repeated);
    // No attempt came before this one.
    key.sleep(a);
    assert_eq!(key.denied(third.claim), Told::wake(a));
}

// --- granted by a message ------------------------------------------------------------------------

#[test]
fn a_pushed_grant_counts_from_the_baseline_and_never_from_its_receipt() {
    for lay in [ms(0), ms(500), ms(5_000)] {
        let mut key = Key::listening();
        let a = key.join();
        let sent = key.now;
        let claim = key.ask(a).claim;
        key.pass(ms(200));
        let enqueued = key.stamp();
        key.pass(ms(100));
        key.queued(claim, enqueued);
        key.doze(a);
        key.pass(ms(600));
        let granted = later(enqueued, ms(700));
        key.pass(lay);
        assert_eq!(key.push(claim, granted), Told::wake(a));
        let turn = key.take(a);
        assert_eq!(turn.claim, claim);
        assert_eq!(turn.deadline, sent + ms(693) + VALID);
        assert_eq!(turn.ends, key.now + MAX_HOLD);
    }
}

#[test]
fn a_pushed_grant_that_lay_too_long_is_given_back_unused() {
    for (early, is_over) in [(Duration::from_nanos(1), false), (ms(0), true)] {
        let mut key = Key::listening();
        let (a, b) = (key.join(), key.join());
        key.sleep(b);
        let place = key.enqueue(a);
        key.doze(a);
        key.pass(VALID + ms(990) - early);
        let told = key.push(place.claim, later(place.stamp, ms(1_000)));
        if is_over {
            assert_eq!(told, Told::release(place.claim).and_wake(a));
            assert_ne!(key.ask(a).claim.token, place.claim.token);
        } else {
            assert_eq!(told, Told::wake(a));
            assert_eq!(key.take(a).deadline, key.now + early);
        }
    }
}

#[test]
fn a_grant_that_ran_out_before_its_waiter_came_is_given_back_unused() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    assert_eq!(key.push(place.claim, place.stamp), Told::wake(a));
    key.pass(VALID);
    key.ask_anew(a, place.claim);
}

#[test]
fn a_pushed_grant_that_cannot_be_dated_is_confirmed_before_anybody_enters() {
    let known = Key::new().stamp();
    let other_run = Stamp {
        run: Some(8),
        ..later(known, ms(1_000))
    };
    let set_back = Stamp {
        at: known.at - ms(1),
        ..known
    };
    let no_run = Stamp { run: None, ..known };
    for (enqueued, granted) in [
        (None, later(known, ms(1_000))),
        (Some(known), other_run),
        (Some(known), set_back),
        (Some(no_run), no_run),
        (Some(known), no_run),
        (Some(no_run), known),
    ] {
        let mut key = Key::listening();
        let a = key.join();
        let claim = key.ask(a).claim;
        match enqueued {
            Some(stamp) => key.queued(claim, stamp),
            None => key.failed(claim, StorageErrorKind::Timeout),
        };
        key.doze(a);
        key.pass(ms(5));
        assert_eq!(key.push(claim, granted), Told::wake(a));
        let sent = key.now;
        assert_eq!(key.ask(a).claim, claim, "{enqueued:?}, {granted:?}");
        key.pass(ms(5));
        assert_eq!(key.granted(claim), Told::nothing());
        let turn = key.take(a);
        assert_eq!((turn.claim, turn.deadline), (claim, sent + VALID));
    }
}

/// The last sending with the first time would make the deadline too late, and the other way round
/// proves nothing.
#[test]
fn asking_again_for_a_place_makes_a_new_pair() {
    let mut key = Key::listening();
    let a = key.join();
    let first = key.enqueue(a);
    key.pass(ms(3_000));
    let second = key.enqueue(a);
    assert_eq!(second.claim, first.claim);
    key.pass(ms(100));
    assert_eq!(
        key.push(first.claim, later(second.stamp, ms(100))),
        Told::wake(a)
    );
    assert_eq!(key.take(a).deadline, second.sent + ms(99) + VALID);
}

#[test]
fn an_attempt_without_a_reply_leaves_the_pair_of_the_one_before() {
    let mut key = Key::listening();
    let a = key.join();
    let first = key.enqueue(a);
    key.pass(ms(3_000));
    assert_eq!(key.failed_attempt(a), first.claim);
    assert_eq!(
        key.push(first.claim, later(first.stamp, ms(2_000))),
        Told::wake(a)
    );
    assert_eq!(key.take(a).deadline, first.sent + ms(1_980) + VALID);
}

#[test]
fn a_grant_from_before_the_pair_says_nothing_of_the_place_held_now() {
    let mut key = Key::listening();
    let a = key.join();
    let first = key.enqueue(a);
    key.pass(3 * TTL);
    // The grant was lost and ran out; who asks stands there anew.
    key.enqueue(a);
    assert_eq!(
        key.push(first.claim, later(first.stamp, ms(1_000))),
        Told::wake(a)
    );
    assert_eq!(key.ask(a).claim, first.claim);
}

#[test]
fn a_grant_that_overtakes_the_reply_waits_for_it() {
    let mut key = Key::listening();
    let a = key.join();
    let sent = key.now;
    let claim = key.ask(a).claim;
    let stamp = key.stamp();
    key.pass(ms(100));
    assert_eq!(key.push(claim, later(stamp, ms(100))), Told::nothing());
    key.sleep(a);
    assert_eq!(key.queued(claim, stamp), Told::wake(a));
    let turn = key.take(a);
    assert_eq!((turn.claim, turn.deadline), (claim, sent + ms(99) + VALID));

    // The reply is lost: it cannot be dated.
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.push(claim, key.stamp());
    key.sleep(a);
    assert_eq!(key.failed(claim, StorageErrorKind::Timeout), Told::wake(a));
    assert_eq!(key.ask(a).claim, claim);

    // It lay for too long.
    let mut key = Key::listening();
    let a = key.join();
    let claim = key.ask(a).claim;
    let stamp = key.stamp();
    key.push(claim, stamp);
    key.sleep(a);
    key.pass(VALID);
    assert_eq!(key.queued(claim, stamp), Told::release(claim).and_wake(a));
    assert_ne!(key.ask(a).claim.token, claim.token);
}

#[test]
fn a_granted_reply_beats_a_pushed_one() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.pass(ms(3_000));
    let sent = key.now;
    assert_eq!(key.ask(a).claim, place.claim);
    let granted = later(place.stamp, ms(2_000));
    assert_eq!(key.push(place.claim, granted), Told::nothing());
    key.sleep(a);
    assert_eq!(key.granted(place.claim), Told::wake(a));
    // Delivered twice, or late.
    assert_eq!(key.push(place.claim, granted), Told::nothing());
    let turn = key.take(a);
    assert_eq!(turn.deadline, sent + VALID);
    assert_eq!(key.state.due(), Some(sent + TTL / 3), "this one is sure");
    assert_eq!(key.push(place.claim, granted), Told::nothing());
}

#[test]
fn a_poll_that_finds_it_ours_already_counts_from_its_own_sending() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.pass(2 * TTL);
    let sent = key.now;
    assert_eq!(key.ask(a).claim, place.claim);
    key.pass(ms(50));
    key.granted(place.claim);
    assert_eq!(key.take(a).deadline, sent + VALID);
}

#[test]
fn a_grant_to_a_token_given_up_is_released_and_never_used() {
    let given_up = |key: &mut Key| {
        let a = key.join();
        let place = key.enqueue(a);
        assert_eq!(key.leave(a), Told::release(place.claim));
        place.claim
    };
    // Nobody wants it.
    let mut key = Key::listening();
    let old = given_up(&mut key);
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    key.release_done();
    key.release_done();
    assert!(key.state.is_done());

    // Somebody is about to ask, asks, stands in the queue, has it.
    let mut key = Key::listening();
    let old = given_up(&mut key);
    let a = key.join();
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    let claim = key.ask(a).claim;
    assert_ne!(claim.token, old.token);
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    key.queued(claim, key.stamp());
    key.doze(a);
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    key.doze(a);
    assert_eq!(key.push(claim, key.stamp()), Told::wake(a));
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    let turn = key.take(a);
    assert_eq!(turn.claim, claim);
    assert_eq!(key.push(old, key.stamp()), Told::release(old));
    assert_eq!(key.done(turn), (Ended::Released, Told::release(claim)));
    assert_eq!(key.push(claim, key.stamp()), Told::release(claim));
}

/// Otherwise each turn until the answer would have the lease looked at.
#[test]
fn a_renewal_that_is_on_its_way_is_not_due() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.push(place.claim, place.stamp);
    let turn = key.take(a);
    assert_eq!(key.state.renew(key.now), Some(place.claim));
    assert_eq!(key.state.renew(key.now), None);
    let turn = key.hand_over(turn);
    assert_eq!(key.state.due(), Some(turn.deadline));
    let sent = key.now;
    key.renewed(place.claim, sent, Some(renewed(true)));
    key.hand_over(turn);
    assert_eq!(key.state.due(), Some(sent + TTL / 3));
}

/// If the storage's clock was set forward while the grant was awaited, the deadline is too late.
#[test]
fn a_pushed_lease_is_renewed_at_once() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.pass(ms(1_000));
    key.push(place.claim, later(place.stamp, ms(1_000)));
    let turn = key.take(a);
    assert_eq!(key.state.due(), Some(key.now));
    assert_eq!(key.tick(), (Some(place.claim), Some(turn.deadline)));
    let sent = key.now;
    key.pass(ms(1));
    let told = key.renewed(place.claim, sent, Some(renewed(true)));
    assert_eq!(told.deadline, Some(sent + VALID));
    assert_eq!(key.tick(), (None, Some(sent + TTL / 3)));

    // It was too late: whoever entered is told after one round trip.
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.push(place.claim, later(place.stamp, 2 * TTL));
    let turn = key.take(a);
    assert!(turn.deadline > key.now + TTL, "wrong");
    assert_eq!(key.tick().0, Some(place.claim));
    assert_eq!(
        key.renewed(place.claim, key.now, Some(renewed(false))),
        Told::lost(LossReason::NotOurs)
    );
    assert_eq!(key.done(turn).0, Ended::Lost);
}

/// Else a step of the storage's clock by an hour would hide for an hour that renewals fail.
#[test]
fn the_first_renewal_of_a_pushed_lease_puts_its_deadline_right() {
    for is_handed_over in [false, true] {
        let mut key = Key::listening();
        let (a, b) = (key.join(), key.join());
        key.sleep(b);
        let place = key.enqueue(a);
        key.push(place.claim, later(place.stamp, 4 * TTL));
        let turn = key.take(a);
        assert!(turn.deadline > key.now + 4 * TTL, "wrong");
        assert_eq!(key.tick().0, Some(place.claim));
        let sent = key.now;
        if is_handed_over {
            key.done(turn);
            key.take(b);
        }
        let told = key.renewed(place.claim, sent, Some(renewed(true)));
        assert_eq!(told.deadline, Some(sent + VALID));
        key.pass(VALID);
        assert_eq!(key.last_tick().lost, Some(LossReason::Expired));
    }
}

#[test]
fn a_grant_for_a_shorter_time_counts_as_long_and_is_made_whole_by_its_renewal() {
    let mut key = Key::listening();
    let (a, b) = (key.join(), key.join());
    key.sleep(b);
    let place = key.enqueue(a);
    let granted = PushedGrant {
        ttl: ms(1_000),
        ..key.grant(place.claim, place.stamp)
    };
    assert_eq!(key.pushed(&granted), Told::wake(a));
    let turn = key.take(a);
    assert_eq!(turn.deadline, place.sent + ms(988));
    assert_eq!(turn.claim, place.claim);
    assert_eq!(key.tick().0, Some(place.claim));
    let sent = key.now;
    key.renewed(place.claim, sent, Some(renewed(true)));
    assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(b)));
    assert_eq!(key.take(b).deadline, sent + VALID);

    // Nor does a storage that promises more make the lease longer than it was asked for.
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    let granted = PushedGrant {
        ttl: 9 * TTL,
        ..key.grant(place.claim, place.stamp)
    };
    key.pushed(&granted);
    assert_eq!(key.take(a).deadline, place.sent + VALID);
}

#[test]
fn a_grant_clears_what_was_known_of_others() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    assert_eq!(key.failed_attempt(a), place.claim);
    assert!(key.state.last_error().is_some());
    key.push(place.claim, later(place.stamp, PAUSE));
    assert!(key.state.last_error().is_none());
    assert_eq!(key.state.failures(), 0);
}

// --- sharing with other processes ----------------------------------------------------------------

#[test]
fn an_unwanted_lease_goes_on_without_bound() {
    let (mut key, mut turn) = Key::held();
    key.told = true;
    for _ in 0..5 * LIMIT.turns {
        turn = key.hand_over(turn);
    }
    let sent = key.now;
    key.tick();
    key.pass(LIMIT.time);
    key.tick();
    key.renewed(turn.claim, sent + LIMIT.time, Some(renewed(true)));
    key.hand_over(turn);
}

/// Nobody would tell that it is wanted.
#[test]
fn without_messages_every_lease_is_bounded() {
    let (mut key, mut turn) = Key::held();
    key.told = true;
    for _ in 0..5 {
        turn = key.hand_over(turn);
    }
    assert_eq!(key.wants(), Told::nothing());
    key.pass(LIMIT.time);
    key.told = false;
    let next = key.join();
    key.sleep(next);
    assert_eq!(
        key.done(turn),
        (Ended::Released, Told::release(turn.claim).and_wake(next)),
        "nor is there a place to ask for"
    );
}

/// In each of the ways in which this process learns that others want its lease.
#[test]
fn a_wanted_lease_is_bounded_by_count_and_by_time_from_then_on() {
    type Learn = fn(&mut Key) -> Granted;
    let told: Learn = |key| {
        let turn = key.obtain_next();
        let turn = (0..2 * LIMIT.turns).fold(turn, |turn, _| key.hand_over(turn));
        assert_eq!(key.wants(), Told::nothing());
        // Told again it is no longer.
        key.hand_over(turn)
    };
    let told_before_the_reply: Learn = |key| {
        let a = key.join();
        let claim = key.ask(a).claim;
        assert_eq!(key.wants(), Told::nothing());
        key.granted(claim);
        key.take(a)
    };
    let in_the_reply: Learn = |key| {
        let a = key.join();
        let claim = key.ask(a).claim;
        key.replied(
            claim,
            Outcome::Granted {
                wanted: true,
                fencing: None,
            },
        );
        key.take(a)
    };
    let in_the_grant: Learn = |key| {
        let a = key.join();
        let place = key.enqueue(a);
        let granted = PushedGrant {
            wanted: true,
            fencing: None,
            ..key.grant(place.claim, place.stamp)
        };
        key.pushed(&granted);
        key.take(a)
    };
    let after_a_grant_that_waits_for_the_reply: Learn = |key| {
        let a = key.join();
        let claim = key.ask(a).claim;
        let stamp = key.stamp();
        key.push(claim, stamp);
        assert_eq!(key.wants(), Told::nothing());
        key.queued(claim, stamp);
        key.take(a)
    };
    let by_a_renewal: Learn = |key| {
        let turn = key.obtain_next();
        let turn = (0..2 * LIMIT.turns).fold(turn, |turn, _| key.hand_over(turn));
        let sent = key.now;
        key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: true }));
        key.hand_over(turn)
    };
    for (which, learn) in [
        told,
        told_before_the_reply,
        in_the_reply,
        in_the_grant,
        after_a_grant_that_waits_for_the_reply,
        by_a_renewal,
    ]
    .into_iter()
    .enumerate()
    {
        // By count.
        let mut key = Key::listening();
        let mut turn = learn(&mut key);
        for _ in 1..LIMIT.turns {
            assert_eq!(key.wants(), Told::nothing());
            turn = key.hand_over(turn);
        }
        let next = key.join();
        key.sleep(next);
        let (ended, told) = key.done(turn);
        assert_eq!(ended, Ended::Released, "way {which}");
        assert_eq!(told.release, Some(turn.claim), "way {which}");
        assert!(told.rejoin.is_some(), "way {which}");

        // By time.
        for (held_for, how) in [
            (LIMIT.time - ms(1), Ended::HandedOver),
            (LIMIT.time, Ended::Released),
        ] {
            let mut key = Key::listening();
            let turn = learn(&mut key);
            let next = key.join();
            key.sleep(next);
            key.pass(held_for);
            assert_eq!(key.wants(), Told::nothing());
            assert_eq!(key.done(turn).0, how, "way {which}");
        }
    }
}

#[test]
fn a_wanted_lease_that_nobody_here_waits_for_is_just_released() {
    let (mut key, turn) = Key::wanted();
    assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    key.release_done();
    assert!(key.state.is_done());
}

/// What is lost stays locked for the lock delay; what was held, and is not there, is told of.
#[test]
fn a_release_says_whether_the_lock_was_held_to_the_end_or_lost() {
    let how = |effects: Effects<Place>| {
        let release = effects.release.expect("it is given back");
        (release.was_held, release.was_lost)
    };
    let (mut key, turn) = Key::held();
    assert_eq!(how(key.give_back(turn).1), (true, false));

    // Nobody noticed before its end, or its holder was told.
    let (mut key, turn) = Key::held();
    key.pass(TTL);
    assert_eq!(how(key.give_back(turn).1), (false, true));
    let (mut key, turn) = Key::held();
    key.pass(TTL);
    let tick = key.state.tick(key.now);
    assert!(tick.effects.release.is_none());
    assert_eq!(how(key.give_back(turn).1), (false, true));
    // A renewal of it has come too late.
    let (mut key, turn) = Key::held();
    let sent = key.now;
    key.pass(TTL);
    let reply = Some(Renewed::Ours { wanted: false });
    let effects = key.state.renewed(turn.claim, sent, reply, key.now);
    assert_eq!(how(effects), (false, true));
    // What comes after it has nothing to do with it.
    let next = key.join();
    let attempt = key.ask(next);
    key.leave(next);
    let effects = key.state.replied(
        attempt.claim,
        Outcome::Granted {
            wanted: false,
            fencing: None,
        },
        key.now,
        key.now,
    );
    assert_eq!(how(effects), (false, false));

    // Nobody held it when it ran out.
    let (mut key, _) = Key::idle();
    key.pass(TTL);
    assert_eq!(how(key.state.tick(key.now).effects), (false, false));
}

#[test]
fn why_an_attempt_at_parts_failed_is_told_until_the_next_has_an_answer() {
    let mut key = Key::in_parts();
    let place = key.join();
    let claim = key.ask(place).claim;
    key.failed(claim, StorageErrorKind::Timeout);
    let kind = |key: &Key| key.state.last_error().map(StorageError::kind);
    assert_eq!(kind(&key), Some(StorageErrorKind::Timeout));
    key.pass(PAUSE);
    let claim = key.ask(place).claim;
    key.denied(claim);
    assert_eq!(kind(&key), None);
}

#[test]
fn whether_a_renewal_is_late_is_said_of_the_lease_that_we_have() {
    let (mut key, turn) = Key::held();
    let is_late = |key: &Key, claim| key.state.renewal_is_late(claim, key.now);
    assert_eq!(is_late(&key, turn.claim), Some(false));
    key.pass(TTL / 2);
    assert_eq!(is_late(&key, turn.claim), Some(true));
    let other = Claim {
        token: OwnerToken::new(9, 9),
        ..turn.claim
    };
    assert_eq!(is_late(&key, other), None);
    key.done(turn);
    assert_eq!(is_late(&key, turn.claim), None);
}

#[test]
fn a_key_tells_whose_it_is_what_it_uses_and_why_its_last_lease_was_lost() {
    let (mut key, turn) = Key::held();
    let (claim, other) = (turn.claim, OwnerToken::new(9, 9));
    assert_eq!(key.state.owner(), Some(claim.token));
    assert!(key.state.uses(claim.token) && !key.state.uses(other));
    assert_eq!(key.state.loss(claim), None);
    key.pass(TTL);
    let lost = Told::lost(LossReason::Expired);
    assert_eq!(key.last_tick(), lost);
    assert_eq!(key.state.owner(), None);
    assert!(!key.state.uses(claim.token));
    assert_eq!(key.state.loss(claim), Some(LossReason::Expired));
    let other = Claim {
        token: other,
        ..claim
    };
    assert_eq!(key.state.loss(other), None);
    assert!(!key.state.is_releasing());
    key.done(turn);
    assert!(key.state.is_releasing());
    key.release_done();
    assert!(!key.state.is_releasing());

    let place = key.join();
    let asked = key.ask(place).claim;
    assert_eq!(key.state.owner(), None);
    assert!(key.state.uses(asked.token));
}

/// If none do, the storage need not look; those who do are to hear of it first.
#[test]
fn a_release_says_what_was_heard_of_others_who_want_the_lock() {
    let is_wanted = |mut key: Key, turn| {
        let (_, effects) = key.give_back(turn);
        effects.release.expect("it is given back").wanted
    };
    let (key, turn) = Key::held();
    assert_eq!(is_wanted(key, turn), Some(false));
    let (key, turn) = Key::wanted();
    assert_eq!(is_wanted(key, turn), Some(true));
    let (mut key, turn) = Key::wanted();
    let next = key.join();
    key.sleep(next);
    key.pass(LIMIT.time);
    assert_eq!(is_wanted(key, turn), Some(true), "it wants it again");
    let mut key = Key::in_parts();
    let turn = key.obtain_next();
    key.wants();
    assert_eq!(is_wanted(key, turn), Some(true), "in parts");
    let (mut key, turn) = Key::held();
    key.state.revoke();
    assert_eq!(is_wanted(key, turn), None, "lost");
    let (mut key, turn) = Key::wanted();
    key.state.revoke();
    assert_eq!(is_wanted(key, turn), Some(true), "lost, and wanted");
    let (mut key, _) = Key::idle();
    let given_up = key.state.wanted(key.now).release.unwrap();
    assert_eq!(given_up.wanted, Some(true), "idle");
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    let left = key.state.leave(a).release.unwrap();
    assert_eq!((left.claim, left.wanted), (place.claim, None));
}

#[test]
fn an_unwanted_lease_that_is_given_up_asks_for_no_place() {
    let mut key = Key::listening();
    let turn = key.obtain_next();
    let a = key.join();
    key.sleep(a);
    key.state.revoke();
    assert_eq!(
        key.done(turn),
        (Ended::Lost, Told::release(turn.claim).and_wake(a))
    );
    key.ask(a);
}

/// What others wanted was an earlier lease.
#[test]
fn a_new_lease_is_not_wanted_because_the_last_one_was() {
    type End = fn(&mut Key, Granted);
    let released: End = |key, turn| {
        key.done(turn);
    };
    let left: End = |key, turn| {
        let a = key.join();
        key.sleep(a);
        assert_eq!(key.done(turn).0, Ended::HandedOver);
        assert_eq!(key.leave(a), Told::release(turn.claim));
    };
    let lost: End = |key, turn| {
        key.renewed(turn.claim, key.now, Some(renewed(false)));
        assert_eq!(key.done(turn).0, Ended::Lost);
    };
    let ran_out: End = |key, turn| {
        let a = key.join();
        key.sleep(a);
        key.done(turn);
        key.pass(VALID);
        let claim = key.ask_anew(a, turn.claim).claim;
        key.leave(a);
        assert_eq!(key.denied(claim), Told::nothing());
    };
    let not_queued: End = |key, turn| {
        let a = key.join();
        key.sleep(a);
        key.pass(LIMIT.time);
        let (_, told) = key.done(turn);
        assert_eq!(key.wants(), Told::nothing());
        key.leave(a);
        key.replied(told.rejoin.unwrap().claim, Outcome::NotQueued);
    };
    for (which, end) in [released, left, lost, ran_out, not_queued]
        .into_iter()
        .enumerate()
    {
        let (mut key, turn) = Key::wanted();
        end(&mut key, turn);
        while key.state.releasing > 0 {
            key.release_done();
        }
        assert!(key.state.is_done(), "way {which}");
        let mut turn = key.obtain_next();
        for _ in 0..2 * LIMIT.turns {
            let next = key.join();
            key.sleep(next);
            assert_eq!(key.done(turn).0, Ended::HandedOver, "way {which}");
            turn = key.take(next);
        }
    }
}

// --- giving it to others and wanting it again ----------------------------------------------------

#[test]
fn who_gives_it_to_others_asks_for_a_new_place_by_the_same_release() {
    let (mut key, turn) = Key::wanted();
    let a = key.state.join(TTL / 2, MAX_HOLD, PAUSE / 2);
    key.sleep(a);
    let (ended, told) = key.done(turn);
    assert_eq!(ended, Ended::Released);
    assert_eq!((told.release, told.wake), (Some(turn.claim), None));
    let rejoin = told.rejoin.unwrap();
    assert_ne!(rejoin.claim.token, turn.claim.token, "a token is used once");
    assert_eq!((rejoin.claim.ttl, rejoin.interval), (TTL / 2, PAUSE / 2));
    // It is as good as an attempt.
    let b = key.join();
    key.sleep(a);
    key.sleep(b);
    assert_eq!(key.state.waiters(), 2);
}

#[test]
fn a_new_place_is_as_good_as_one_that_was_asked_for() {
    let (mut key, a, place) = Key::rejoined();
    assert_eq!(key.queued(place.claim, place.stamp), Told::wake(a));
    assert_eq!(key.state.holder_ttl(key.now), Some(ms(700)));
    assert_eq!(key.doze(a), key.now + PAUSE);
    key.release_done();
    key.doze(a);
    key.pass(ms(500));
    assert_eq!(
        key.push(place.claim, later(place.stamp, ms(500))),
        Told::wake(a)
    );
    let turn = key.take(a);
    assert_eq!(turn.claim, place.claim);
    assert_eq!(turn.deadline, place.sent + ms(495) + VALID);
}

#[test]
fn a_new_place_is_kept_when_its_time_to_ask_has_come() {
    let (mut key, a, place) = Key::rejoined();
    key.queued(place.claim, place.stamp);
    key.release_done();
    key.pass(PAUSE);
    assert_eq!(key.ask(a).claim, place.claim);
}

#[test]
fn a_grant_that_overtakes_the_news_of_the_new_place_waits_for_it() {
    let (mut key, a, place) = Key::rejoined();
    key.sleep(a);
    assert_eq!(
        key.push(place.claim, later(place.stamp, ms(100))),
        Told::nothing()
    );
    assert_eq!(key.queued(place.claim, place.stamp), Told::wake(a));
    assert_eq!(key.take(a).deadline, place.sent + ms(99) + VALID);
}

#[test]
fn who_got_no_new_place_because_nobody_waits_asks_at_once() {
    let (mut key, a, place) = Key::rejoined();
    key.sleep(a);
    assert_eq!(key.replied(place.claim, Outcome::NotQueued), Told::wake(a));
    let attempt = key.ask(a);
    assert_ne!(attempt.claim.token, place.claim.token);
    // It has nothing to be measured from yet.
    key.push(attempt.claim, place.stamp);
    key.failed(attempt.claim, StorageErrorKind::Timeout);
    assert_eq!(key.ask(a).claim, attempt.claim);
}

#[test]
fn a_new_place_that_may_have_been_given_is_asked_for_with_its_token() {
    let (mut key, a, place) = Key::rejoined();
    key.sleep(a);
    assert_eq!(
        key.failed(place.claim, StorageErrorKind::Timeout),
        Told::wake(a)
    );
    assert_eq!(key.doze(a), key.now + PAUSE);
    key.pass(PAUSE);
    assert_eq!(key.ask(a).claim, place.claim);

    // Granted before it was asked for, it has to be confirmed.
    let (mut key, a, place) = Key::rejoined();
    key.failed(place.claim, StorageErrorKind::Timeout);
    key.doze(a);
    assert_eq!(key.push(place.claim, place.stamp), Told::wake(a));
    assert_eq!(key.ask(a).claim, place.claim);

    // If it was not given for sure, its token is not needed.
    let (mut key, a, place) = Key::rejoined();
    assert_eq!(
        key.failed(place.claim, StorageErrorKind::Rejected),
        Told::wake(a)
    );
    assert_eq!(key.leave(a), Told::nothing());
}

#[test]
fn a_new_place_that_nobody_wants_any_more_is_given_back() {
    type Reply = fn(&mut Key, Standing) -> Told;
    let queued: Reply = |key, place| key.queued(place.claim, place.stamp);
    let failed: Reply = |key, place| key.failed(place.claim, StorageErrorKind::Timeout);
    let none: Reply = |key, place| key.replied(place.claim, Outcome::NotQueued);
    for (reply, is_released) in [(queued, true), (failed, true), (none, false)] {
        let (mut key, a, place) = Key::rejoined();
        assert_eq!(key.leave(a), Told::nothing(), "the reply is awaited");
        let told = reply(&mut key, place);
        if is_released {
            assert_eq!(told, Told::release(place.claim));
            key.release_done();
        } else {
            assert_eq!(told, Told::nothing());
        }
        key.release_done();
        assert!(key.state.is_done());
    }
}

#[test]
fn a_turn_that_was_lost_makes_room_for_others_too() {
    // Revoked.
    let (mut key, turn) = Key::wanted();
    let a = key.join();
    key.sleep(a);
    key.state.revoke();
    let (ended, told) = key.done(turn);
    assert_eq!((ended, told.release), (Ended::Lost, Some(turn.claim)));
    assert!(told.rejoin.is_some());

    // Over.
    let (mut key, turn) = Key::wanted();
    let a = key.join();
    key.sleep(a);
    key.pass(VALID);
    let (ended, told) = key.done(turn);
    assert_eq!((ended, told.release), (Ended::Lost, Some(turn.claim)));
    let rejoin = told.rejoin.unwrap();
    key.replied(rejoin.claim, Outcome::NotQueued);
    key.ask(a);
}

#[test]
fn a_renewal_answered_after_the_lease_was_given_to_others_does_not_touch_the_new_place() {
    let (mut key, turn) = Key::wanted();
    let a = key.join();
    key.sleep(a);
    key.pass(LIMIT.time);
    assert_eq!(key.tick().0, Some(turn.claim));
    let sent = key.now;
    let (_, told) = key.done(turn);
    let rejoin = told.rejoin.unwrap();
    assert_eq!(
        key.renewed(turn.claim, sent, Some(Renewed::Ours { wanted: true })),
        // Its release is on the way already, and a second might overtake it.
        Told::nothing()
    );
    key.queued(rejoin.claim, key.stamp());
    key.doze(a);
    assert_eq!(key.push(rejoin.claim, key.stamp()), Told::wake(a));
    assert_eq!(key.take(a).claim, rejoin.claim);
}

// --- everything at once --------------------------------------------------------------------------

// --- fencing tokens ------------------------------------------------------------------------------

impl Key {
    /// As many waiters, of whom the first asks and the others sleep.
    fn crowd(&mut self, waiters: usize) -> Vec<Place> {
        let places: Vec<_> = (0..waiters).map(|_| self.join()).collect();
        places[1..].iter().for_each(|place| self.sleep(*place));
        places
    }
}

#[test]
fn turns_use_the_tokens_of_their_lease_in_order() {
    let mut key = Key::new();
    let places = key.crowd(3);
    let attempt = key.ask(places[0]);
    assert_eq!(attempt.fencing, 3, "one for each of them");
    key.granted_from(attempt, 10);
    let mut turn = key.take(places[0]);
    assert_eq!(turn.fencing, Some(10));
    for (place, token) in [(places[1], 11), (places[2], 12)] {
        assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(place)));
        turn = key.take(place);
        assert_eq!(turn.fencing, Some(token));
    }
}

#[test]
fn a_waiter_that_leaves_before_its_turn_costs_no_token() {
    let mut key = Key::new();
    let places = key.crowd(3);
    let attempt = key.ask(places[0]);
    key.granted_from(attempt, 10);
    let turn = key.take(places[0]);
    // Woken, and gone without a turn.
    assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(places[1])));
    assert_eq!(key.leave(places[1]), Told::wake(places[2]));
    assert_eq!(key.take(places[2]).fencing, Some(11));
}

#[test]
fn a_lease_without_tokens_left_is_given_up_and_the_next_takes_twice_as_many() {
    // Nobody else wants it, and nothing else bounds it.
    let mut key = Key::listening();
    let mut place = key.join();
    let mut next_token = 100;
    for tokens in [1, 2, 4, 8] {
        let attempt = key.ask(place);
        assert_eq!(attempt.fencing, tokens);
        key.granted_from(attempt, next_token);
        let mut turn = key.take(place);
        for _ in 1..tokens {
            turn = key.hand_over(turn);
        }
        assert_eq!(turn.fencing, Some(next_token + u64::from(tokens) - 1));
        place = key.join();
        key.sleep(place);
        let released = Told::release(turn.claim).and_wake(place);
        assert_eq!(key.done(turn), (Ended::Released, released));
        key.release_done();
        next_token += 1_000;
    }
}

#[test]
fn a_lease_that_ends_for_another_reason_says_how_many_tokens_are_used() {
    // Nobody waits any more.
    let mut key = Key::listening();
    let places = key.crowd(5);
    let attempt = key.ask(places[0]);
    key.granted_from(attempt, 10);
    let mut turn = key.take(places[0]);
    for place in &places[1..3] {
        assert_eq!(key.done(turn).0, Ended::HandedOver);
        turn = key.take(*place);
    }
    for place in &places[3..] {
        key.leave(*place);
    }
    assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    let next = key.join();
    assert_eq!(key.ask(next).fencing, 3);

    // It used all it had, and nobody would have used more.
    let mut key = Key::listening();
    let a = key.join();
    let attempt = key.ask(a);
    key.granted_from(attempt, 10);
    let turn = key.take(a);
    assert_eq!(key.done(turn).0, Ended::Released);
    let next = key.join();
    assert_eq!(key.ask(next).fencing, 1);

    // Others want it, and it has met the limit with tokens left.
    let mut key = Key::listening();
    let places = key.crowd(5);
    let attempt = key.ask(places[0]);
    key.granted_from(attempt, 10);
    let mut turn = key.take(places[0]);
    assert_eq!(key.wants(), Told::nothing());
    for place in &places[1..=LIMIT.turns as usize] {
        assert_eq!(key.done(turn).0, Ended::HandedOver);
        turn = key.take(*place);
    }
    // One waits, and the lease had a turn before it was wanted.
    let (ended, told) = key.done(turn);
    assert_eq!(ended, Ended::Released);
    assert_eq!(told.rejoin.unwrap().fencing, 1 + LIMIT.turns);
}

#[test]
fn who_gives_it_to_others_for_want_of_tokens_asks_for_twice_as_many_by_the_same_release() {
    let mut key = Key::listening();
    let places = key.crowd(2);
    let attempt = key.ask(places[0]);
    key.granted_from(attempt, 10);
    let turn = key.take(places[0]);
    assert_eq!(key.done(turn).0, Ended::HandedOver);
    let turn = key.take(places[1]);
    assert_eq!(key.wants(), Told::nothing());
    let place = key.join();
    key.sleep(place);
    let (ended, told) = key.done(turn);
    assert_eq!((ended, told.release), (Ended::Released, Some(turn.claim)));
    let rejoin = told.rejoin.unwrap();
    assert_eq!(rejoin.fencing, 4);

    // What its grant brings is used, in order.
    key.queued(rejoin.claim, key.stamp());
    key.doze(place);
    let grant = key.grant_from(rejoin.claim, key.stamp(), 50);
    assert_eq!(key.pushed(&grant), Told::wake(place));
    let turn = key.take(place);
    assert_eq!(turn.fencing, Some(50));
    assert_eq!(key.hand_over(turn).fencing, Some(51));
}

#[test]
fn a_repeated_attempt_asks_for_tokens_of_its_own() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    key.crowd(1);
    key.pass(PAUSE);
    let attempt = key.ask(a);
    assert_eq!((attempt.claim, attempt.fencing), (place.claim, 2));
    key.granted_from(attempt, 20);
    assert_eq!(key.take(a).fencing, Some(20));
}

/// The lock was given by a message, and an attempt found it so: the tokens of the attempt were
/// taken later, and those of the message must not come after them.
#[test]
fn the_tokens_of_a_message_are_never_used_after_those_of_an_attempt() {
    // It arrives before the reply, after it, and when it has been used.
    for arrives in 0..3 {
        let mut key = Key::listening();
        let a = key.join();
        let place = key.enqueue(a);
        key.pass(PAUSE);
        let attempt = key.ask(a);
        let (b, c) = (key.join(), key.join());
        key.sleep(b);
        key.sleep(c);
        let grant = key.grant_from(place.claim, later(place.stamp, ms(500)), 10);
        let arrive = |key: &mut Key, now| {
            if arrives <= now {
                assert_eq!(key.pushed(&grant), Told::nothing());
            }
        };
        arrive(&mut key, 0);
        let attempt = Attempt {
            fencing: 2,
            ..attempt
        };
        key.granted_from(attempt, 20);
        arrive(&mut key, 1);
        let turn = key.take(a);
        assert_eq!(turn.fencing, Some(20));
        arrive(&mut key, 2);
        assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(b)));
        arrive(&mut key, 2);
        let turn = key.take(b);
        assert_eq!(turn.fencing, Some(21));
        arrive(&mut key, 2);
        // The older ones are no reason to go on.
        assert_eq!(key.done(turn).0, Ended::Released);
    }
}

#[test]
fn the_tokens_of_a_message_that_had_to_be_confirmed_are_not_used() {
    let mut key = Key::listening();
    let a = key.join();
    let place = key.enqueue(a);
    let mut grant = key.grant_from(place.claim, place.stamp, 10);
    grant.stamp.run = None;
    assert_eq!(key.pushed(&grant), Told::wake(a));
    let attempt = key.ask(a);
    key.granted_from(attempt, 20);
    assert_eq!(key.take(a).fencing, Some(20));
}

#[test]
fn the_tokens_of_a_grant_given_up_are_never_used() {
    // Given to a token that nobody wants any more.
    let mut key = Key::listening();
    let a = key.join();
    let old = key.enqueue(a).claim;
    assert_eq!(key.leave(a), Told::release(old));
    let b = key.join();
    let attempt = key.ask(b);
    let grant = key.grant_from(old, key.stamp(), 10);
    assert_eq!(key.pushed(&grant), Told::release(old));
    key.granted_from(attempt, 20);
    assert_eq!(key.pushed(&grant), Told::release(old));
    let turn = key.take(b);
    assert_eq!(turn.fencing, Some(20));
    assert_eq!(key.pushed(&grant), Told::release(old));

    // A reply that lay for too long.
    let mut key = Key::new();
    let a = key.join();
    let late = key.ask(a);
    key.pass(VALID);
    assert_eq!(key.granted_from(late, 10), Told::release(late.claim));
    key.pass(PAUSE);
    let attempt = key.ask(a);
    key.granted_from(attempt, 20);
    assert_eq!(key.take(a).fencing, Some(20));
}

/// The storage keeps tokens growing also if it has lost its memory; here a lease is lost, and the
/// next one has nothing of it.
#[test]
fn a_lease_that_was_lost_leaves_none_of_its_tokens_to_the_next() {
    let mut key = Key::new();
    let places = key.crowd(2);
    let attempt = key.ask(places[0]);
    key.granted_from(attempt, 10);
    let turn = key.take(places[0]);
    let told = key.renewed(turn.claim, key.now, Some(renewed(false)));
    assert_eq!(told, Told::lost(LossReason::NotOurs).and_wake(places[1]));
    let attempt = key.ask(places[1]);
    key.granted_from(attempt, 20);
    assert_eq!(key.take(places[1]).fencing, Some(20));
}

#[test]
fn a_storage_that_cannot_fence_costs_no_lease_and_gives_no_token() {
    let (mut key, mut turn) = Key::held();
    key.told = true;
    for _ in 0..100 {
        assert_eq!(turn.fencing, None);
        turn = key.hand_over(turn);
    }
}

/// Several processes with a machine each, around one storage that keeps the contract of
/// [`LockStorage`](crate::storage::LockStorage) and no more: messages arrive late, in any order,
/// and replies get lost.
#[path = "key_state_world.rs"]
mod world;
#[cfg(tower_distributed_lock_fuzzing)]
pub(crate) use world::live;

// --- an idle lease -------------------------------------------------------------------------------

mod idle {
    use super::*;

    #[test]
    fn the_next_caller_has_an_idle_lease_without_the_storage() {
        let (mut key, claim) = Key::idle();
        assert!(!key.state.is_done() && !key.state.is_busy(key.now));
        key.pass(LINGER / 2);
        let place = key.join();
        let turn = key.take(place);
        assert_eq!(turn.claim, claim);
        assert_eq!(key.done(turn), (Ended::Lingers, Told::nothing()));
        // It lingers anew.
        key.pass(LINGER * 3 / 4);
        let place = key.join();
        key.take(place);
    }

    /// A key that keeps what is hot, and its first holder.
    fn keeps_hot() -> (Key, Granted) {
        let mut key = Key {
            keeps_hot: true,
            ..Key::listening()
        };
        let turn = key.obtain_next();
        (key, turn)
    }

    /// One that is hot, with a holder.
    fn hot() -> (Key, Granted) {
        let (mut key, first) = keeps_hot();
        assert_eq!(
            key.done(first),
            (Ended::Released, Told::release(first.claim))
        );
        key.pass(HOT);
        let turn = key.obtain_next();
        key.release_done();
        (key, turn)
    }

    #[test]
    fn a_lease_that_this_process_came_back_for_at_once_is_kept_for_a_moment() {
        let (mut key, mut turn) = hot();
        let claim = turn.claim;
        for _ in 0..2 {
            assert_eq!(key.state.moment_ends(), None);
            assert_eq!(key.done(turn), (Ended::Lingers, Told::nothing()));
            assert_eq!(key.state.moment_ends(), Some(key.now + HOT));
            // It is seen to by itself.
            assert!(key.state.due().unwrap() > key.now + HOT);
            key.pass(HOT / 2);
            let place = key.join();
            turn = key.take(place);
            assert_eq!(turn.claim, claim);
        }
        key.done(turn);
        key.pass(HOT);
        assert_eq!(key.last_tick(), Told::release(claim));
        assert_eq!(key.state.moment_ends(), None);
    }

    #[test]
    fn a_hot_lease_is_kept_as_any_other_where_nobody_keeps_what_is_hot() {
        let (mut key, turn) = hot();
        key.keeps_hot = false;
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));

        let (mut key, turn) = hot();
        key.keeps_hot = false;
        key.linger = LINGER;
        assert_eq!(key.done(turn), (Ended::Lingers, Told::nothing()));
        assert_eq!(key.state.moment_ends(), None);
        assert!(key.state.due().unwrap() <= key.now + LINGER);
    }

    #[test]
    fn a_lease_that_this_process_came_back_for_later_is_not_kept() {
        for (late, done) in [(HOT, true), (HOT + Duration::from_nanos(1), false)] {
            let (mut key, first) = keeps_hot();
            key.done(first);
            key.pass(late);
            if done {
                key.release_done();
            }
            let turn = key.obtain_next();
            assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
        }
    }

    #[test]
    fn a_hot_lease_that_had_too_few_tokens_brings_more_the_next_time() {
        let (mut key, first) = keeps_hot();
        key.done(first);
        let place = key.join();
        let attempt = key.ask(place);
        assert_eq!(attempt.fencing, 1);
        key.granted_from(attempt, 5);
        let turn = key.take(place);
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
        let place = key.join();
        assert_eq!(key.ask(place).fencing, 2);
    }

    #[test]
    fn a_key_is_hot_also_if_its_lease_had_no_token_for_who_waits() {
        let mut key = Key {
            keeps_hot: true,
            ..Key::listening()
        };
        let place = key.join();
        let attempt = key.ask(place);
        key.granted_from(attempt, 5);
        let turn = key.take(place);
        let next = key.join();
        key.sleep(next);
        let told = Told::release(turn.claim).and_wake(next);
        assert_eq!(key.done(turn), (Ended::Released, told));
        let turn = key.obtain(next);
        assert_eq!(key.done(turn), (Ended::Lingers, Told::nothing()));
    }

    #[test]
    fn an_idle_lease_is_given_back_when_its_time_is_over() {
        let (mut key, claim) = Key::idle();
        let until = key.now + LINGER;
        let due = key.state.due().unwrap();
        assert!(due <= until);
        key.now = until;
        assert_eq!(key.last_tick(), Told::release(claim));
        key.release_done();
        assert!(key.state.is_done());
    }

    #[test]
    fn an_idle_lease_is_given_back_as_soon_as_another_process_wants_it() {
        let (mut key, claim) = Key::idle();
        assert_eq!(key.wants(), Told::release(claim));

        // Or as soon as a renewal tells.
        let (mut key, claim) = Key::idle();
        key.pass(TTL / 3);
        let told = key.renewed(claim, key.now, Some(Renewed::Ours { wanted: true }));
        assert_eq!(told.release, Some(claim));

        // Or when it cannot be known.
        let (mut key, claim) = Key::idle();
        let told: Told = key.state.ask_again(key.now).into();
        assert_eq!(told, Told::release(claim));
    }

    #[test]
    fn a_lease_is_not_kept_idle_where_nobody_would_tell_who_wants_it() {
        let (mut key, claim) = Key::idle();
        let told: Told = key.state.stop_idling().into();
        assert_eq!(told, Told::release(claim));
        key.release_done();
        key.told = false;
        let turn = key.obtain_next();
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    }

    #[test]
    fn a_lease_that_others_want_is_not_kept_idle() {
        let (mut key, turn) = Key::wanted();
        key.linger = LINGER;
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    }

    #[test]
    fn a_lease_that_was_lost_is_not_kept_idle() {
        let (mut key, _) = Key::idle();
        let place = key.join();
        let turn = key.take(place);
        key.pass(TTL);
        assert_eq!(key.done(turn), (Ended::Lost, Told::release(turn.claim)));
    }

    #[test]
    fn an_idle_lease_is_renewed_and_never_handed_on_with_little_left() {
        let (mut key, claim) = Key::idle();
        key.linger = 10 * TTL;
        let place = key.join();
        let turn = key.take(place);
        key.done(turn);
        key.pass(TTL / 3);
        assert_eq!(key.tick().0, Some(claim));
        // The renewal brings no answer, and time goes by.
        key.pass(TTL / 3);
        let place = key.join();
        key.ask_anew(place, claim);
    }

    #[test]
    fn an_idle_lease_of_another_ttl_is_given_back_for_one_that_fits() {
        let (mut key, claim) = Key::idle();
        let place = key.state.join(2 * TTL, MAX_HOLD, PAUSE);
        assert_eq!(key.ask_anew(place, claim).claim.ttl, 2 * TTL);
    }

    #[test]
    fn a_lease_without_tokens_for_another_turn_is_not_kept_idle() {
        let mut key = Key {
            linger: LINGER,
            ..Key::listening()
        };
        let place = key.join();
        let attempt = key.ask(place);
        key.granted_from(attempt, 5);
        let turn = key.take(place);
        assert_eq!(turn.fencing, Some(5));
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
        // How many it should bring is up to who lets it linger.
        let place = key.join();
        assert_eq!(key.ask(place).fencing, 1);
    }

    #[test]
    fn a_lease_that_was_idle_begins_no_turn_with_little_time_left() {
        let (mut key, claim) = Key::idle();
        key.pass(TTL * 3 / 4);
        let place = key.join();
        // Whoever is in the queue has come for it; but the storage no longer tells who wants it.
        let told: Told = key.state.stop_idling().into();
        assert_eq!(told, Told::nothing());
        key.ask_anew(place, claim);
    }

    #[test]
    fn an_idle_lease_with_a_waiter_is_shared_once_another_process_wants_it() {
        let (mut key, _) = Key::idle();
        let place = key.join();
        assert_eq!(key.wants(), Told::nothing());
        let turn = key.take(place);
        assert_eq!(key.done(turn), (Ended::Released, Told::release(turn.claim)));
    }

    #[test]
    fn a_waiter_that_is_never_polled_does_not_keep_an_idle_lease() {
        let (mut key, _) = Key::idle();
        let sent = key.now;
        key.join();
        key.pass(LINGER);
        assert_eq!(key.tick(), (None, Some(sent + VALID)));
    }

    #[test]
    fn a_waiter_that_leaves_before_it_takes_an_idle_lease_leaves_nothing_behind() {
        let (mut key, claim) = Key::idle();
        let place = key.join();
        // Whoever wants it elsewhere is told of the next turn's end.
        assert_eq!(key.state.stop_idling().release, None);
        assert_eq!(key.leave(place), Told::release(claim));
        key.release_done();
        assert!(key.state.is_done());
    }
}

// --- callers that do not wait ------------------------------------------------------------------------

/// They are refused without a question to the storage.
#[test]
fn a_lock_is_busy_while_somebody_here_has_it_or_waits_for_who_has_it() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    assert!(!key.state.is_busy(key.now), "nothing is known yet");
    key.denied(claim);
    assert!(key.state.is_busy(key.now));
    key.ask_again();
    let claim = key.ask(a).claim;
    assert!(key.state.is_busy(key.now), "he may have it still");
    key.denied(claim);
    key.pass(PAUSE);
    let claim = key.ask(a).claim;
    assert!(!key.state.is_busy(key.now), "his time is over");
    key.granted(claim);
    assert!(key.state.is_busy(key.now), "it is for the one who waits");
    let turn = key.take(a);
    assert!(key.state.is_busy(key.now));

    let b = key.join();
    key.sleep(b);
    assert_eq!(key.done(turn), (Ended::HandedOver, Told::wake(b)));
    assert!(key.state.is_busy(key.now));
    key.leave(b);
    assert!(!key.state.is_busy(key.now));
}

#[test]
fn an_idle_lease_is_not_busy() {
    let (key, _) = Key::idle();
    assert!(!key.state.is_busy(key.now));
}

#[test]
fn nobody_is_known_to_have_it_when_who_asked_has_gone() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.denied(claim);
    key.ask_again();
    key.ask(a);
    key.leave(a);
    assert!(!key.state.is_busy(key.now));
}

#[test]
fn those_who_do_not_wait_can_be_woken_together_and_once() {
    let mut key = Key::new();
    let (a, b, c) = (key.join(), key.join(), key.join());
    assert!(key.state.wake_hurried().is_empty());
    for _ in 0..2 {
        key.state.hurry(b);
        assert_eq!(key.state.hurried, 1);
    }
    key.ask(a);
    key.sleep(b);
    key.sleep(c);
    assert_eq!(key.state.wake_hurried(), [b]);
    assert!(key.state.wake_hurried().is_empty());
    key.leave(b);
    assert_eq!(key.state.hurried, 0);
    key.sleep(c);
    assert!(key.state.wake_hurried().is_empty());
}

/// By this a caller knows whether an attempt that it found under way has brought something.
#[test]
fn an_outcome_is_one_that_says_something() {
    let mut key = Key::new();
    let a = key.join();
    assert!(!key.state.is_asking());
    let claim = key.ask(a).claim;
    assert!(key.state.is_asking());
    assert_eq!(key.state.landed(), 0);
    key.replied(claim, Outcome::NotQueued);
    assert!(!key.state.is_asking());
    assert_eq!(key.state.landed(), 0);
    let claim = key.ask(a).claim;
    key.denied(claim);
    assert_eq!(key.state.landed(), 1);
    assert!(!key.state.is_asking());
}

#[test]
fn a_free_lease_is_for_the_first() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.join());
    assert!(!key.state.is_for(a));
    let claim = key.ask(a).claim;
    key.granted(claim);
    assert!(key.state.is_for(a) && !key.state.is_for(b));
    let turn = key.take(a);
    assert!(!key.state.is_for(b));
    key.sleep(b);
    let _ = key.done(turn);
    assert!(key.state.is_for(b));
}

#[test]
fn a_caller_that_does_not_wait_leaves_what_others_wait_for() {
    let mut key = Key::new();
    let a = key.join();
    let claim = key.ask(a).claim;
    key.denied(claim);
    key.state.stop_giving_way();
    assert_eq!(key.doze(a), key.now + PAUSE);
    key.pass(PAUSE);
    let claim = key.ask(a).claim;
    key.leave(a);
    key.state.stop_giving_way();
    assert!(key.state.is_asking());
    assert_eq!(key.granted(claim), Told::release(claim));
}

// --- locks in parts --------------------------------------------------------------------------------

mod in_parts {
    use super::*;

    #[test]
    fn whatever_was_not_granted_is_released_and_never_asked_for_again() {
        let mut key = Key::in_parts();
        let place = key.join();
        let failure = StorageError::new(StorageErrorKind::Timeout);
        let refusal = StorageError::new(StorageErrorKind::Unauthorized);
        let denial = Outcome::Denied {
            holder_ttl: Some(ms(700)),
            queued: None,
        };
        let mut tokens = Vec::new();
        // Who waits for the lock is told of what may have been all of it.
        for (outcome, quiet) in [
            (denial, true),
            (Outcome::Undecided, true),
            (Outcome::Failed(failure), false),
            (Outcome::Failed(refusal), false),
        ] {
            let attempt = key.ask(place);
            assert_eq!(attempt.again, !tokens.is_empty());
            tokens.push(attempt.claim.token);
            let told = Told {
                quiet,
                ..Told::release(attempt.claim)
            };
            assert_eq!(key.replied(attempt.claim, outcome), told);
            let at = key.doze(place);
            assert_eq!(at, key.now + PAUSE);
            key.pass(PAUSE);
        }
        tokens.dedup();
        assert_eq!(tokens.len(), 4);
        let turn = key.obtain(place);
        assert!(!tokens.contains(&turn.claim.token));
    }

    #[test]
    fn the_last_waiter_to_leave_gives_up_what_its_process_was_to_be_told() {
        let mut key = Key::in_parts();
        let (first, second) = (key.join(), key.join());
        let claim = key.ask(first).claim;
        assert_eq!(key.denied(claim), Told::release_parts(claim));
        key.doze(first);
        key.release_done();
        assert_eq!(key.leave(first), Told::nothing());
        assert_eq!(key.leave(second), Told::release(claim));
        key.release_done();
        assert!(key.state.is_done());
    }

    #[test]
    fn an_attempt_whose_callers_have_gone_is_released_and_tells_others() {
        let mut key = Key::in_parts();
        let place = key.join();
        let claim = key.ask(place).claim;
        assert_eq!(key.leave(place), Told::nothing());
        assert_eq!(key.denied(claim), Told::release(claim));
        key.release_done();
        assert!(key.state.is_done());
    }

    #[test]
    fn the_word_that_it_is_free_is_news_once() {
        let mut key = Key::in_parts();
        let place = key.join();
        let claim = key.ask(place).claim;
        key.denied(claim);
        key.doze(place);
        let at = key.now + ms(3);
        assert_eq!(Told::from(key.state.free(at)), Told::wake(place));
        assert_eq!(key.doze(place), at);
        // The other parts say so, too.
        let sooner = key.now + ms(1);
        assert_eq!(Told::from(key.state.free(sooner)), Told::nothing());
        assert_eq!(key.doze(place), at);
    }

    /// What it had is given back already.
    #[test]
    fn a_token_that_was_denied_has_nothing_to_be_taken_away() {
        let mut key = Key::in_parts();
        let place = key.join();
        let claim = key.ask(place).claim;
        key.denied(claim);
        let at = key.doze(place);
        assert_eq!(key.told_of_force(claim), Told::nothing());
        assert_eq!(key.doze(place), at);
    }

    #[test]
    fn a_word_that_comes_during_an_attempt_is_remembered() {
        let mut key = Key::in_parts();
        let place = key.join();
        let claim = key.ask(place).claim;
        assert!(!key.state.was_told_free());
        assert_eq!(Told::from(key.state.free(key.now)), Told::nothing());
        assert!(key.state.was_told_free());
        key.denied(claim);
        assert!(!key.state.was_told_free());
    }

    #[test]
    fn a_word_does_not_hurry_a_storage_in_trouble() {
        let mut key = Key::in_parts();
        let place = key.join();
        let claim = key.ask(place).claim;
        key.failed(claim, StorageErrorKind::Unavailable);
        let at = key.doze(place);
        assert_eq!(Told::from(key.state.free(key.now)), Told::nothing());
        assert_eq!(key.doze(place), at);
    }

    #[test]
    fn split_votes_are_counted_until_somebody_has_the_lock() {
        let mut key = Key::in_parts();
        let place = key.join();
        for splits in 0..3 {
            let claim = key.ask(place).claim;
            assert_eq!(key.state.splits(), splits);
            key.replied(claim, Outcome::Undecided);
            key.pass(PAUSE);
        }
        let claim = key.ask(place).claim;
        key.denied(claim);
        assert_eq!(key.state.splits(), 0);
        assert_eq!(key.state.holder_ttl(key.now), Some(ms(700)));
    }

    #[test]
    fn who_gives_it_up_to_others_leaves_it_to_them_for_a_while() {
        let mut key = Key::in_parts();
        let turn = key.obtain_next();
        key.wants();
        let next = key.join();
        key.sleep(next);
        key.pass(LIMIT.time);
        let told = Told::release(turn.claim).and_wake(next);
        assert_eq!(key.done(turn), (Ended::Released, told));
        assert_eq!(key.doze(next), key.now + key.give_way);
        // That it is free is no news.
        assert_eq!(Told::from(key.state.free(key.now)), Told::nothing());
        key.release_done();
        key.pass(key.give_way);
        assert_ne!(key.ask(next).claim.token, turn.claim.token);
    }

    #[test]
    fn so_does_who_has_nobody_waiting_and_is_forgotten_after_it() {
        let mut key = Key::in_parts();
        let turn = key.obtain_next();
        key.wants();
        let (ended, told) = key.done(turn);
        assert_eq!((ended, told), (Ended::Released, Told::release(turn.claim)));
        key.release_done();
        assert!(!key.state.is_done());
        assert_eq!(key.state.due(), Some(key.now + key.give_way));
        // A newcomer waits like others.
        let place = key.join();
        assert_eq!(key.doze(place), key.now + key.give_way);
        assert_eq!(key.leave(place), Told::nothing());
        assert!(key.state.is_done());

        let turn = key.obtain_next();
        key.wants();
        let _ = key.done(turn);
        key.release_done();
        key.pass(key.give_way);
        assert_eq!(key.tick(), (None, None));
        assert!(key.state.is_done());
    }

    #[test]
    fn a_caller_that_does_not_wait_does_not_give_way() {
        let mut key = Key::in_parts();
        let turn = key.obtain_next();
        key.wants();
        let _ = key.done(turn);
        key.release_done();
        key.state.stop_giving_way();
        key.obtain_next();
    }

    #[test]
    fn a_lock_that_nobody_else_wants_is_asked_for_at_once() {
        let mut key = Key::in_parts();
        let turn = key.obtain_next();
        let _ = key.done(turn);
        key.release_done();
        assert!(key.state.is_done());
        key.obtain_next();
    }
}
