//! What a key's state machine is told, and what it answers: the words between
//! [`KeyState`](super::key_state::KeyState) and its driver.

use std::time::Duration;

use crate::{
    clock::Timestamp,
    coordinator::lease::Claim,
    error::{LossReason, StorageError},
    storage::{FencingBlock, Stamp},
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

/// How a lease is shared with other processes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sharing {
    pub(crate) limit: HandoffLimit,
    /// Whether we would be told if somebody else wanted it. If not, every lease is treated as if
    /// somebody did.
    pub(crate) told: bool,
    /// How long a lease that nobody wants is kept, should somebody of this process come back.
    pub(crate) linger: Duration,
    /// Whether one that [is hot](super::lease::Lease::is_hot) is kept for a moment all the same.
    pub(crate) keeps_hot: bool,
    /// How long this process leaves a lock in parts to others that want it.
    pub(crate) give_way: Duration,
}

/// What a renewal brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewed {
    Ours { wanted: bool },
    NotOurs,
}

/// One holder's turn on a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TurnId(pub(super) u64);

/// Where a holder's lock came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The storage was asked, and gave it.
    Storage,
    /// It was this process's turn in the storage's queue: the storage gave it by a message.
    Queue,
    /// The holder before, of this process, left it to the next here.
    Handoff,
    /// This process had kept it after its last holder.
    Linger,
}

impl Source {
    #[cfg(feature = "metrics")]
    pub(super) const ALL: [Self; 4] = [Self::Storage, Self::Queue, Self::Handoff, Self::Linger];

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::Queue => "queue",
            Self::Handoff => "handoff",
            Self::Linger => "linger",
        }
    }
}

/// A turn that was given to a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) id: TurnId,
    pub(crate) claim: Claim,
    pub(crate) source: Source,
    pub(crate) fencing: Option<u64>,
    /// The holder must not act at or past this moment, unless a renewal moves it.
    pub(crate) deadline: Timestamp,
    /// When `max_hold` ends it.
    pub(crate) ends: Timestamp,
}

/// An attempt the driver has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) claim: Claim,
    /// Not the first try of this wait.
    pub(crate) again: bool,
    /// With the token of an attempt before.
    pub(crate) repeated: bool,
    /// How many fencing tokens it should bring.
    pub(crate) fencing: u32,
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
    Granted {
        wanted: bool,
        fencing: Option<FencingBlock>,
    },
    Denied {
        holder_ttl: Option<Duration>,
        queued: Option<Stamp>,
    },
    /// Some parts of the lock were got, if any, and nobody is known to have the whole.
    Undecided,
    /// The claim has neither the lock nor a place in the queue: a release that was to give it a new
    /// one met an empty queue, or it has used up what an attempt before had brought.
    NotQueued,
    Failed(StorageError),
}

/// A claim to be released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GiveBack {
    pub(crate) claim: Claim,
    /// Whether others want it, as far as was heard. `None`: nothing is known, also not that it was held.
    pub(crate) wanted: Option<bool>,
    /// Who gets a place in the storage's queue by the same step. In a box: seldom needed, and this
    /// is moved with each release.
    pub(crate) rejoin: Option<Box<Rejoin>>,
    /// A holder had it, and was told that it has lost it: what it has begun may still go on.
    pub(crate) was_lost: bool,
    /// A holder had it to the end, as far as this process knows.
    pub(crate) was_held: bool,
    /// Only parts of the lock are given back: whoever waits for it is not told, and this process
    /// waits on.
    pub(crate) quiet: bool,
}

/// A claim of waiters that gave the lock to others and want it again. What became of it has to be
/// reported with [`KeyState::replied`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rejoin {
    pub(crate) claim: Claim,
    /// How often the first of them wants to ask.
    pub(crate) interval: Duration,
    /// How many fencing tokens its grant should bring.
    pub(crate) fencing: u32,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The lock was ours to the end; the first who waits in this process has it next.
    HandedOver,
    /// The lock was ours to the end; this process keeps it for a while, for whoever comes.
    Lingers,
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
    /// Release this in the storage and report with [`KeyState::release_done`] when it is done.
    pub(crate) release: Option<GiveBack>,
    /// Tell the present turn that it has lost the lock.
    pub(crate) lost: Option<LossReason>,
    /// Tell the present turn its new deadline.
    pub(crate) deadline: Option<Timestamp>,
    /// Let go of this one, which will not be woken: outside the key's lock, because that may run
    /// other code.
    pub(crate) old: Option<W>,
}

impl<W> Effects<W> {
    pub(super) fn none() -> Self {
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
