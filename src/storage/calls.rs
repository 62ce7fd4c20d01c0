//! What a storage is asked, and what it answers.

use std::time::Duration;

use super::{FencingBlock, OwnerToken, Stamp};
use crate::{
    key::LockName,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// What [`LockStorage::acquire`](super::LockStorage::acquire) is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AcquireRequest {
    /// The lock.
    pub name: LockName,
    /// Who wants it.
    pub token: OwnerToken,
    /// For how long, from the moment it is set. Whole milliseconds.
    pub ttl: Duration,
    /// Whether the lock was asked for before and not obtained, or the reply was lost. A storage
    /// that has a cheap form for the lock that is probably free, and another that tells more about
    /// the holder, takes the second then.
    pub again: bool,
    /// Whether an attempt before had this very token: its reply was lost, or it got a place in the
    /// queue. This one is only to find out what became of that, and to keep the place. A storage
    /// that [listens](super::LockStorage::listen) grants the lock to the token if it has it
    /// already, or if it is free and the token stands in its queue; if the token has neither the
    /// lock nor a place, nothing is done, and the reply is [`AcquireReply::Unknown`]. So no token
    /// is given the lock twice, and a message about the first time cannot be taken for one about
    /// the second. Other storages may treat it like any attempt. `again` is set then, too.
    pub repeated: bool,
    /// Whether the token should stand in the lock's queue if the lock is held by somebody else, so
    /// that it is given the lock when its turn comes, and a
    /// [`Message::Granted`](super::Message::Granted) is sent. Of a storage that does not
    /// [listen](super::LockStorage::listen) this is never asked. For how long the place is kept at
    /// least without being asked for again.
    pub queue: Option<Duration>,
    /// Whether the token's process should be told by a [`Message::Free`](super::Message::Free) when
    /// the lock is released, if the lock is held by somebody else; and for how long that is kept in
    /// mind at least. Once for all attempts of a process. Asked of a storage instead of
    /// [`queue`](Self::queue), and only of one that [listens](super::LockStorage::listen).
    pub hint: Option<Duration>,
    /// How many fencing tokens the grant should come with, now or from the queue. 0: none.
    pub fencing: u32,
    /// Set by who makes the call, when nothing more is to come of it.
    pub(crate) given_up: GivenUp,
}

impl AcquireRequest {
    /// Whether the token was released while this call is under way. A [`Redlock`](super::Redlock) may
    /// do so: it goes on without a node that is late. `false` does not mean that it was not.
    ///
    /// A storage that takes a lock in several steps, or waits before it sends, asks before each of
    /// them, and then ends the call with any reply but a grant. What it sent after the release would
    /// take the lock once more, for a moment, for somebody who has given it back. What it sent before
    /// is released again by whoever made the call.
    pub fn is_given_up(&self) -> bool {
        self.given_up.is_set()
    }
}

/// A word from those who made a call to those who carry it out, which all clones hear. The default
/// is for calls of which nobody will say it.
#[derive(Clone, Debug, Default)]
pub(crate) struct GivenUp(Option<Arc<AtomicBool>>);

impl GivenUp {
    pub(crate) fn not_yet() -> Self {
        Self(Some(Arc::new(AtomicBool::new(false))))
    }

    /// Nothing else is made known by it, so it orders nothing.
    pub(crate) fn set(&self) {
        if let Some(flag) = &self.0 {
            flag.store(true, Relaxed);
        }
    }

    fn is_set(&self) -> bool {
        self.0.as_ref().is_some_and(|flag| flag.load(Relaxed))
    }
}

/// What became of an acquire: the answer of [`LockStorage::acquire`](super::LockStorage::acquire).
///
/// ```
/// use std::time::Duration;
/// use tower_distributed_lock::storage::{AcquireReply, FencingBlock, Stamp};
///
/// // It was free, and comes with two fencing tokens: 7 and 8.
/// let tokens = FencingBlock { first: 7, count: 2 };
/// let granted = AcquireReply::granted().with_fencing(Some(tokens));
/// assert!(matches!(granted, AcquireReply::Granted { wanted: false, fencing: Some(_), .. }));
///
/// // The same, and others stand behind the new holder.
/// let wanted = AcquireReply::granted_and_wanted().with_fencing(Some(tokens));
/// assert!(matches!(wanted, AcquireReply::Granted { wanted: true, .. }));
///
/// // It is somebody else's for another 8 s. This storage has no queue.
/// let ttl = Some(Duration::from_secs(8));
/// assert!(matches!(AcquireReply::held(ttl), AcquireReply::Held { queued: None, .. }));
///
/// // This one has, and put the token into it.
/// let now = Stamp { run: Some(1), at: Duration::from_secs(100) };
/// assert!(matches!(AcquireReply::queued(ttl, now), AcquireReply::Held { queued: Some(_), .. }));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcquireReply {
    /// The lock is held by the request's token. Made by [`AcquireReply::granted`].
    #[non_exhaustive]
    Granted {
        /// Whether others stand in the lock's queue, as far as the storage knows.
        wanted: bool,
        /// The fencing tokens that came with it.
        fencing: Option<FencingBlock>,
    },
    /// The lock is held by somebody else. Made by [`AcquireReply::held`].
    #[non_exhaustive]
    Held {
        /// How long it will be held if it is not renewed, where the storage knows.
        ttl: Option<Duration>,
        /// When the storage saw the token standing in the lock's queue, if it does.
        queued: Option<Stamp>,
    },
    /// The token has neither the lock nor a place in its queue, and nothing was done. Only to an
    /// attempt that is [repeated](AcquireRequest::repeated).
    Unknown,
    /// Nobody is known to hold the lock, but it could not be had: several attempts at the same time
    /// got some of its parts each. Only of a storage that [is
    /// divided](super::LockStorage::is_divided).
    Undecided,
}

impl AcquireReply {
    /// The lock is held by the request's token. The least that a [storage](super::LockStorage#example)
    /// says is this and [`held`](Self::held).
    pub fn granted() -> Self {
        Self::Granted {
            wanted: false,
            fencing: None,
        }
    }

    /// The same, and others stand in the lock's queue, as in the [example](Self).
    pub fn granted_and_wanted() -> Self {
        Self::Granted {
            wanted: true,
            fencing: None,
        }
    }

    /// The same grant with these fencing tokens, as in the [example](Self). A lock that is held by
    /// somebody else has none.
    #[must_use]
    pub fn with_fencing(mut self, block: Option<FencingBlock>) -> Self {
        if let Self::Granted { fencing, .. } = &mut self {
            *fencing = block;
        }
        self
    }

    /// The lock is held by somebody else, for another `ttl` if it is not renewed, where the storage
    /// knows; and the token stands in [no queue](Self::queued).
    pub fn held(ttl: Option<Duration>) -> Self {
        Self::Held { ttl, queued: None }
    }

    /// The same, and the token stands in the lock's queue, as in the [example](Self).
    pub fn queued(ttl: Option<Duration>, stamp: Stamp) -> Self {
        Self::Held {
            ttl,
            queued: Some(stamp),
        }
    }
}

/// What [`LockStorage::renew`](super::LockStorage::renew) is asked, for one lock.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RenewRequest {
    /// The lock.
    pub name: LockName,
    /// Who holds it.
    pub token: OwnerToken,
    /// For how long from now. Whole milliseconds.
    pub ttl: Duration,
}

/// What became of a renewal: the answer of [`LockStorage::renew`](super::LockStorage::renew).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RenewReply {
    /// The lock is held by the request's token for the whole ttl.
    Renewed,
    /// The same, and others stand in the lock's queue, or have stood there since it was taken.
    RenewedAndWanted,
    /// The lock is free or held by somebody else. Nothing was changed.
    NotOurs,
}

/// What [`LockStorage::release`](super::LockStorage::release) is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReleaseRequest {
    /// The lock.
    pub name: LockName,
    /// Who holds it.
    pub token: OwnerToken,
    /// The ttl that the token asked for.
    pub ttl: Duration,
    /// Whether somebody else waits for the lock. It is a guess: word of it may not have come yet, or be
    /// old. `None`: nothing is known, also not that the token had the lock. With `Some(false)` a storage
    /// that has a cheap form for a lock without a queue tries it first; with `Some(true)` it may see to
    /// it that those who wait hear of the release before whoever made it.
    pub wanted: Option<bool>,
    /// Who wants a place at the end of the queue, once the lock has been given to its first. If the
    /// queue is empty, it gets none.
    pub requeue: Option<Requeue>,
    /// Whether those who asked to be [told](AcquireRequest::hint) are left to wait: what is
    /// released is but a part of the lock, of an attempt that did not get the whole. The token's
    /// own process waits on, too; a release that is not quiet ends its wait.
    pub quiet: bool,
}

/// Who wants a place in the queue of a lock that is released: see [`ReleaseRequest::requeue`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Requeue {
    /// A new token of the factory that releases.
    pub token: OwnerToken,
    /// For how long it wants the lock.
    pub ttl: Duration,
    /// How long the place is kept at least.
    pub place: Duration,
    /// How many fencing tokens its grant should come with. 0: none.
    pub fencing: u32,
}

/// What became of a release: the answer of [`LockStorage::release`](super::LockStorage::release).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReleaseReply {
    /// The lock was held by the request's token and is free now, or the first in the queue has it.
    Released,
    /// The first in the queue has the lock, and the token to requeue stands at the end:
    /// [`ReleaseReply::requeued`].
    #[non_exhaustive]
    Requeued {
        /// How long the new holder's lock lasts, if it is not renewed.
        ttl: Duration,
        /// When.
        stamp: Stamp,
    },
    /// The lock was free or held by somebody else. Nothing was changed.
    NotOurs,
}

impl ReleaseReply {
    /// [`Requeued`](Self::Requeued): the new holder's lock lasts for `ttl` from `stamp` on, if it is
    /// not renewed.
    pub fn requeued(ttl: Duration, stamp: Stamp) -> Self {
        Self::Requeued { ttl, stamp }
    }
}

/// What [`LockStorage::raise`](super::LockStorage::raise) is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RaiseRequest {
    /// The lock.
    pub name: LockName,
    /// Who holds it.
    pub token: OwnerToken,
    /// What all fencing tokens from now on are to be greater than. Below
    /// [`FencingBlock::LIMIT`].
    pub above: u64,
}

/// What became of it: the answer of [`LockStorage::raise`](super::LockStorage::raise).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RaiseReply {
    /// The lock is held by the request's token, and all fencing tokens from now on are greater.
    Raised,
    /// The lock is free or held by somebody else. Nothing was changed.
    NotOurs,
}
