//! What the machine promises: first one promise a test, in the order of a key's life; then a small world of several
//! processes around one storage, where whatever can happen happens in any order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "in a test a panic is a verdict"
)]

use super::*;
use crate::error::StorageErrorKind;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const TTL: Duration = ms(10_000);
/// How long a lease of [`TTL`] may be used.
const VALID: Duration = ms(9_898);
const MAX_HOLD: Duration = ms(60_000);
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
        } = effects;
        Self {
            wake,
            release,
            lost,
            deadline,
        }
    }
}

/// One machine, a clock that moves when told to, and waiters that are woken by their places.
struct Key {
    state: KeyState<Place>,
    now: Timestamp,
    tokens: u64,
}

impl Key {
    fn new() -> Self {
        Self {
            state: KeyState::new(),
            now: Timestamp::ORIGIN + ms(1_000_000),
            tokens: 0,
        }
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
        self.state.join(TTL, MAX_HOLD)
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
        self.replied(claim, Outcome::Granted)
    }

    fn denied(&mut self, claim: Claim) -> Told {
        self.replied(
            claim,
            Outcome::Denied {
                holder_ttl: Some(ms(700)),
            },
        )
    }

    fn failed(&mut self, claim: Claim, kind: StorageErrorKind) -> Told {
        self.replied(claim, Outcome::Failed(StorageError::new(kind)))
    }

    /// From the front of the queue through the storage to a turn.
    fn obtain(&mut self, place: Place) -> Granted {
        let claim = self.ask(place).claim;
        self.granted(claim);
        self.take(place)
    }

    fn done(&mut self, turn: Granted) -> (Ended, Told) {
        let (ended, effects) = self
            .state
            .turn_done(turn.id, turn.claim, LIMIT, self.now);
        (ended, effects.into())
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

    fn renewed(&mut self, claim: Claim, sent: Timestamp, reply: Option<bool>) -> Told {
        self.state.renewed(claim, sent, reply, self.now).into()
    }

    fn release_done(&mut self) -> Told {
        self.state.release_done().into()
    }
}

// --- asking -----------------------------------------------------------------------------------------------------

#[test]
fn an_uncontended_key_is_asked_for_held_released_and_forgotten() {
    let mut key = Key::new();
    assert!(key.state.is_done() && !key.state.is_busy());
    let a = key.join();
    assert!(key.state.is_busy());
    let attempt = key.ask(a);
    assert!(!attempt.again);
    assert_eq!(attempt.claim.ttl, TTL);
    assert_eq!(key.granted(attempt.claim), Told::nothing());
    let turn = key.take(a);
    assert_eq!(turn.claim, attempt.claim);
    assert!(key.state.is_busy() && key.state.waiters() == 0);
    assert_eq!(
        key.done(turn),
        (Ended::Released, Told::release(turn.claim))
    );
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
    assert_eq!(turn.due, sent + TTL / 3);
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
    key.pass(PAUSE - ms(1));
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
    assert!(second.again);
    assert_eq!(second.claim, first.claim);
    key.granted(second.claim);
    assert!(key.state.last_error().is_none());
    assert_eq!(key.take(a).deadline, sent + VALID);
}

/// The first attempt may yet be carried out, after the second was granted, and would then set its own ttl under the
/// second's token.
#[test]
fn an_unanswered_attempt_is_released_and_not_repeated_by_a_waiter_with_another_ttl() {
    let mut key = Key::new();
    let (a, b) = (key.join(), key.state.join(6 * TTL, MAX_HOLD));
    key.sleep(b);
    let first = key.ask(a).claim;
    key.failed(first, StorageErrorKind::Timeout);
    assert_eq!(key.leave(a), Told::wake(b));
    key.pass(PAUSE);
    let (step, told) = key.poll(b);
    let Step::Ask(second) = step else {
        panic!("does not ask: {step:?}");
    };
    assert_ne!(second.claim.token, first.token);
    assert_eq!(told, Told::release(first));
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
    let (_, told) = key.poll(b);
    assert_eq!(told, Told::release(turn.claim), "over");
    let Phase::Asking { claim, .. } = key.state.phase else {
        panic!("{:?}", key.state.phase);
    };
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

// --- waiting ----------------------------------------------------------------------------------------------------

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
    [b, c].map(|place| key.sleep(place));
    let claim = key.ask(a).claim;
    key.denied(claim);
    let at = key.doze(a);
    assert_eq!(key.leave(a), Told::wake(b));
    assert_eq!(key.doze(b), at);
    assert_eq!(key.leave(c), Told::nothing(), "from the middle or the end");

    let (mut key, turn) = Key::held();
    let (a, b) = (key.join(), key.join());
    [a, b].map(|place| key.sleep(place));
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
    places.map(|place| key.sleep(place));
    assert_eq!(key.state.wake_all(), places);
    assert_eq!(key.state.wake_all(), [], "they are awake");
}

// --- handing over -----------------------------------------------------------------------------------------------

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
    let (step, told) = key.poll(a);
    let Step::Ask(attempt) = step else {
        panic!("does not ask: {step:?}");
    };
    assert_ne!(attempt.claim.token, turn.claim.token);
    assert_eq!(told, Told::release(turn.claim));
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
        let (how, _) = key.state.turn_done(turn.id, turn.claim, limit, key.now);
        assert_eq!(how, ended);
    }
}

#[test]
fn a_waiter_with_another_ttl_gets_a_lease_of_its_own() {
    let (mut key, turn) = Key::held();
    let a = key.state.join(TTL / 2, MAX_HOLD);
    key.sleep(a);
    key.done(turn);
    let (step, told) = key.poll(a);
    let Step::Ask(attempt) = step else {
        panic!("does not ask: {step:?}");
    };
    assert_eq!(attempt.claim.ttl, TTL / 2);
    assert_ne!(attempt.claim.token, turn.claim.token);
    assert_eq!(told, Told::release(turn.claim));
    key.granted(attempt.claim);
    assert_eq!(key.take(a).claim, attempt.claim);
    key.release_done();
    assert_eq!(key.state.releasing, 0);
}

#[test]
fn a_turn_is_given_back_once() {
    let (mut key, turn) = Key::held();
    let a = key.join();
    key.sleep(a);
    key.done(turn);
    let next = key.take(a);
    key.pass(VALID);
    key.last_tick();
    // Whatever comes of a turn that is no longer the present one, it ends no other.
    let b = key.join();
    let other = key.obtain(b);
    assert_eq!(key.done(next), (Ended::Lost, Told::release(next.claim)));
    assert_eq!(key.done(other).0, Ended::Released);
}

// --- max_hold ---------------------------------------------------------------------------------------------------

#[test]
fn max_hold_ends_a_turn_and_its_lease_is_not_handed_over() {
    let mut key = Key::new();
    let a = key.state.join(TTL, ms(500));
    let turn = key.obtain(a);
    assert_eq!(turn.ends, key.now + ms(500));
    assert_eq!((turn.deadline, turn.due), (turn.ends, turn.ends));
    let b = key.join();
    key.sleep(b);
    key.pass(ms(500));
    assert_eq!(key.last_tick(), Told::lost(LossReason::MaxHold));
    // Told once. The holder may still be at it, so nobody else gets the lease before it is over.
    assert_eq!(key.tick(), (None, Some(turn.claim_deadline(&key))));
    key.sleep(b);
    assert_eq!(
        key.done(turn),
        (Ended::Lost, Told::release(turn.claim).and_wake(b))
    );

    // Also if nobody looked in time.
    let a = key.join();
    key.leave(b);
    let (mut key, _) = (Key::new(), a);
    let a = key.state.join(TTL, ms(500));
    let turn = key.obtain(a);
    let b = key.join();
    key.sleep(b);
    key.pass(ms(500));
    assert_eq!(
        key.done(turn),
        (Ended::Lost, Told::release(turn.claim).and_wake(b))
    );
}
