//! A lease: this process's ownership of a key in the storage, and for how long it can be relied on.
//!
//! The storage forgets a lock one ttl after it carried out the command, by its own clock. When that
//! was, nobody here knows; but not before the command was sent. So a lease is counted from the
//! moment *before* the first byte of the command that set the expiry was sent, and a little is kept
//! back because clocks run at different rates:
//!
//! ```text
//! deadline = sent + ttl - (1 % of ttl + 2 ms)
//! ```
//!
//! The 1 % is far above the error of any quartz clock; the 2 ms cover the millisecond in which
//! Redis counts expiries on either side. The formula is that of the Redlock algorithm in the Redis
//! documentation ("Distributed Locks with Redis").

use std::time::Duration;

use crate::{
    clock::Timestamp,
    coordinator::key_events::Source,
    storage::{FencingBlock, OwnerToken, Stamp},
};

/// How many fencing tokens a lease takes at most.
const MAX_FENCING: u32 = 16 * 1024;

/// How many fencing tokens it takes at most on the word of its queue alone.
const FIRST_FENCING: usize = 64;

/// Within this time after its last turn a key is hot: whoever comes for it by then may well be followed
/// by others. So long is a lease kept then. The requests of one process come back for it in less, and
/// for anybody else it is no time.
pub(crate) const HOT: Duration = Duration::from_millis(1);

/// How long a lock of this ttl may be used, from the moment its command was sent.
pub(crate) fn validity(ttl: Duration) -> Duration {
    ttl.saturating_sub(ttl / 100 + Duration::from_millis(2))
}

/// How long before its time a renewal may be sent along with others that are due.
pub(crate) fn renewal_slack(ttl: Duration) -> Duration {
    ttl / 30
}

/// A token that the storage may hold under the key, for up to `ttl` after the last command that set
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) token: OwnerToken,
    pub(crate) ttl: Duration,
}

/// A moment on two clocks: a request that was sent at one, and what the storage's clock showed when
/// it carried that request out. Both of one and the same request: mixed, they prove nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Baseline {
    pub(crate) sent: Timestamp,
    pub(crate) stamp: Stamp,
}

impl Baseline {
    /// A moment on our clock that is not after `stamp` on the storage's: nobody knows how long a
    /// message was on its way, but the storage's clock tells how long after the baseline it was
    /// sent. Less 1 %, because clocks run at different rates. `None` if the two stamps are not of
    /// the same run of the storage's clock, or that clock was set back.
    fn not_after(&self, stamp: Stamp) -> Option<Timestamp> {
        let comparable = stamp.run.is_some() && stamp.run == self.stamp.run;
        let since = stamp.at.checked_sub(self.stamp.at)?;
        comparable.then(|| self.sent + (since - since / 100))
    }
}

/// How many fencing tokens to ask for while `waiting` callers of this process want the key, and the
/// last lease could have used so many.
///
/// One for a key that nobody else wants. The storage's counter starts at its clock in microseconds,
/// and must not run ahead of it by tokens that nobody uses: if the counter is lost, the clock is what
/// keeps the next tokens above the last.
pub(crate) fn fencing_wanted(waiting: usize, used: u32) -> u32 {
    let waiting = waiting.min(FIRST_FENCING) as u32;
    used.max(waiting).clamp(1, MAX_FENCING)
}

/// This process's ownership of a key.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) claim: Claim,
    /// The lease is over at this moment, whatever the storage says.
    pub(crate) deadline: Timestamp,
    pub(crate) renew_at: Timestamp,
    /// Whether a renewal was sent and not answered.
    pub(crate) renewing: bool,
    /// This process had come back for it within [`HOT`], before its last release was done.
    pub(crate) is_hot: bool,
    /// The deadline rests on the storage's clock. The first renewal puts it right, also backwards.
    is_unsure: bool,
    /// The fencing tokens that are left, if the storage gave any.
    fencing: Option<FencingBlock>,
    turns: u32,
}

impl Lease {
    /// The lease that a command sent at `sent` and answered with "granted" gives.
    pub(crate) fn granted(claim: Claim, sent: Timestamp, fencing: Option<FencingBlock>) -> Self {
        Self {
            claim,
            deadline: sent + validity(claim.ttl),
            renew_at: sent + claim.ttl / 3,
            renewing: false,
            is_hot: false,
            is_unsure: false,
            // What breaks the contract of a storage is as good as none.
            fencing: fencing.filter(FencingBlock::is_sound),
            turns: 0,
        }
    }

    /// The lease that a message gives: the lock became ours at `stamp` on the storage's clock.
    /// `None` if the baseline cannot tell when that was.
    ///
    /// A clock of the storage that was set forward meanwhile makes the deadline too late. So it is
    /// renewed at once: a wrong deadline lives for one round trip.
    pub(crate) fn pushed(
        claim: Claim,
        baseline: Baseline,
        stamp: Stamp,
        fencing: Option<FencingBlock>,
        now: Timestamp,
    ) -> Option<Self> {
        let start = baseline.not_after(stamp)?;
        Some(Self {
            renew_at: now,
            is_unsure: true,
            ..Self::granted(claim, start, fencing)
        })
    }

    pub(crate) fn is_over(&self, now: Timestamp) -> bool {
        now >= self.deadline
    }

    /// Whether a renewal sent with others at `now` should include this lease.
    pub(crate) fn renewal_is_due(&self, now: Timestamp) -> bool {
        !self.renewing && now + renewal_slack(self.claim.ttl) >= self.renew_at
    }

    /// Where the next turn on it comes from.
    pub(crate) fn source(&self) -> Source {
        match self.turns {
            // Nothing is renewed before the first turn.
            0 if self.is_unsure => Source::Queue,
            0 => Source::Storage,
            _ => Source::Handoff,
        }
    }

    /// A turn on this lease begins: its fencing token.
    pub(crate) fn begin_turn(&mut self) -> Option<u64> {
        self.turns = self.turns.saturating_add(1);
        self.fencing.as_mut().and_then(FencingBlock::take)
    }

    /// What nobody else can see of it: whether its deadline rests on the storage's clock, its fencing
    /// tokens, and its turns.
    #[cfg(test)]
    pub(crate) fn inside(&self) -> (bool, Option<FencingBlock>, u32) {
        (self.is_unsure, self.fencing, self.turns)
    }

    /// Whether the next turn would have no fencing token, though the lease came with some.
    pub(crate) fn fencing_is_used_up(&self) -> bool {
        self.fencing.is_some_and(|block| block.count == 0)
    }

    /// How many turns it has served.
    pub(crate) fn turns(&self) -> u32 {
        self.turns
    }

    /// A renewal that was sent at `sent` succeeded. Only this moves the deadline.
    pub(crate) fn renewed(&mut self, sent: Timestamp) {
        self.renewing = false;
        let deadline = sent + validity(self.claim.ttl);
        self.deadline = if std::mem::take(&mut self.is_unsure) {
            deadline
        } else {
            self.deadline.max(deadline)
        };
        self.renew_at = sent + self.claim.ttl / 3;
    }

    /// A renewal failed in a way that says nothing of the lock: try again, often enough to have
    /// several more tries before the deadline.
    pub(crate) fn renewal_failed(&mut self, now: Timestamp) {
        self.renewing = false;
        self.renew_at = now + self.claim.ttl / 10;
    }

    /// Whether so little is left that renewals before this one must have failed, or been held up.
    pub(crate) fn renewal_is_late(&self, now: Timestamp) -> bool {
        // How much a pushed grant came with is up to the storage.
        !self.is_unsure && !self.can_be_handed_over(now)
    }

    /// Whether enough is left to start another holder on this lease. With renewals at a third of
    /// the ttl, less than half means that they fail.
    pub(crate) fn can_be_handed_over(&self, now: Timestamp) -> bool {
        self.deadline.since(now) >= self.claim.ttl / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::LockOptions;

    const SECOND: Duration = Duration::from_secs(1);

    fn lease() -> Lease {
        let claim = Claim {
            token: OwnerToken::new(1, 1),
            ttl: 10 * SECOND,
        };
        Lease::granted(claim, Timestamp::ORIGIN, None)
    }

    #[test]
    fn a_lease_ends_before_the_storage_forgets_it() {
        assert_eq!(validity(10 * SECOND), Duration::from_millis(9898));
        assert_eq!(validity(LockOptions::MIN_TTL), Duration::from_micros(7900));
        assert_eq!(validity(Duration::from_millis(1)), Duration::ZERO);
        let lease = lease();
        assert!(!lease.is_over(Timestamp::ORIGIN + Duration::from_nanos(9_897_999_999)));
        assert!(lease.is_over(Timestamp::ORIGIN + Duration::from_millis(9898)));
    }

    #[test]
    fn as_many_tokens_are_asked_for_as_are_wanted_or_were_used_within_bounds() {
        for (waiting, used, wanted) in [
            (0, 0, 1),
            (1, 0, 1),
            (5, 0, 5),
            (5, 7, 7),
            // A crowd may be of another ttl, or leave: what nobody uses runs ahead of the clock.
            (10_000, 0, 64),
            (10_000, 100, 100),
            (1, u32::MAX, 16 * 1_024),
        ] {
            assert_eq!(fencing_wanted(waiting, used), wanted, "{waiting}, {used}");
        }
    }

    #[test]
    fn a_renewal_counts_from_its_own_sending_and_never_backwards() {
        let mut lease = lease();
        lease.renewed(Timestamp::ORIGIN + 3 * SECOND);
        assert_eq!(
            lease.deadline,
            Timestamp::ORIGIN + Duration::from_millis(12_898)
        );
        lease.renewed(Timestamp::ORIGIN + SECOND);
        assert_eq!(
            lease.deadline,
            Timestamp::ORIGIN + Duration::from_millis(12_898)
        );
    }

    /// A lease that a message gave, half a second after its place in the queue.
    fn pushed() -> Lease {
        let stamp = |at| Stamp { run: Some(1), at };
        let baseline = Baseline {
            sent: Timestamp::ORIGIN,
            stamp: stamp(SECOND),
        };
        let claim = lease().claim;
        let pushed = Lease::pushed(
            claim,
            baseline,
            stamp(SECOND * 3 / 2),
            None,
            Timestamp::ORIGIN + SECOND,
        );
        pushed.expect("the baseline tells when that was")
    }

    #[test]
    fn a_turn_tells_where_its_lease_came_from() {
        for (mut lease, source) in [(lease(), Source::Storage), (pushed(), Source::Queue)] {
            assert_eq!(lease.source(), source);
            lease.begin_turn();
            assert_eq!(lease.source(), Source::Handoff);
            lease.renewed(Timestamp::ORIGIN + SECOND);
            assert_eq!(lease.source(), Source::Handoff);
        }
    }

    #[test]
    fn a_renewal_is_late_when_less_than_half_of_the_ttl_is_left() {
        let half = Timestamp::ORIGIN + (validity(10 * SECOND) - 5 * SECOND);
        let after = half + Duration::from_nanos(1);
        let mut granted = lease();
        assert!(!granted.renewal_is_late(half));
        assert!(granted.renewal_is_late(after));
        granted.renewed(Timestamp::ORIGIN + SECOND);
        assert!(!granted.renewal_is_late(after));

        // How much time a message leaves is up to the storage.
        let mut pushed = pushed();
        assert!(!pushed.renewal_is_late(half + SECOND));
        pushed.renewed(Timestamp::ORIGIN);
        assert!(pushed.renewal_is_late(after));
    }

    #[test]
    fn tokens_are_used_up_when_the_last_of_those_that_came_is() {
        let mut lease = lease();
        lease.begin_turn();
        assert!(!lease.fencing_is_used_up());
        let block = FencingBlock { first: 7, count: 2 };
        let mut lease = Lease::granted(lease.claim, Timestamp::ORIGIN, Some(block));
        for (token, used_up) in [(Some(7), false), (Some(8), true), (None, true)] {
            assert_eq!(lease.begin_turn(), token);
            assert_eq!(lease.fencing_is_used_up(), used_up);
        }
    }

    #[test]
    fn a_failed_renewal_leaves_the_deadline_and_tries_again_in_time() {
        let mut lease = lease();
        let deadline = lease.deadline;
        lease.renewing = true;
        lease.renewal_failed(Timestamp::ORIGIN + 4 * SECOND);
        assert_eq!(lease.deadline, deadline);
        assert!(!lease.renewal_is_due(Timestamp::ORIGIN + 4 * SECOND));
        assert!(lease.renewal_is_due(Timestamp::ORIGIN + 5 * SECOND));
    }
}
