//! Locks held by a majority of several storages: Redlock.
//!
//! One Redis server is one point of failure, and a replica of it does not help: replication is
//! asynchronous, so a failover may forget a lock that is held. [`Redlock`] is the answer of the
//! Redis documentation ("Distributed Locks with Redis", the Redlock algorithm): N servers that know
//! nothing of each other, mostly 3 or 5, and a lock is ours when a majority of them, N/2 + 1, says
//! so. It goes on while a minority is down, and no minority that forgets, or is cut off from the
//! rest, can let a second holder in.
//!
//! ```no_run
//! # #[cfg(feature = "redis")]
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use tower_distributed_lock::{LockFactory, storage::Redlock};
//!
//! let storage = Redlock::connect([
//!     "redis://10.0.0.1:6379",
//!     "redis://10.0.0.2:6379",
//!     "redis://10.0.0.3:6379",
//! ])
//! .await?;
//! let factory = LockFactory::new(storage);
//! # Ok(())
//! # }
//! ```
//!
//! # How a lock is taken and kept
//!
//! - All nodes are asked at the same time, and each has a time to answer that is far below the ttl:
//!   [`RedlockBuilder::node_timeout`]. The attempt is over as soon as a majority has granted it, and
//!   its time counts from before the first byte was sent.
//! - An attempt that no majority granted is released on all nodes, also on those that have not
//!   answered: their late grants are released when they come. Whoever tries again takes a new token
//!   and waits a random time, which grows as long as attempts go on to split the votes.
//! - A renewal counts if a majority has the lock as ours. A node that does not have it, because it
//!   was restarted or was not reached before, is then given it again, if it is free there.
//! - A release goes to all nodes, and is sent again to those that do not answer, until the ttl is
//!   over. It was ours to the end if a majority still had it, and was lost if so many nodes did not
//!   have it that a majority of others is conceivable.
//! - There is no queue across servers, so waiters are not served in order. They are told by the
//!   nodes when the lock is free, and ask at random times; and who gave it up while others waited
//!   lets them go first.
//!
//! # Fencing
//!
//! Each node has a counter, and gives a grant numbers from it. The token is the highest number that
//! came with the grant, and before it is used a majority of the nodes that granted the lock has a
//! counter that is at least as high, raised there only while the lock is still ours
//! ([`LockStorage::raise`]). This second round is left out where a majority gave the same number
//! anyway. Any two majorities have a node in common: whoever has the lock later gets a higher number
//! there. A node that lost its memory starts from its clock, as a single server does. The price is a
//! second round trip for most locks; without [fencing](crate::LockFactoryBuilder::fencing) there is
//! none.
//!
//! # What it assumes, and what nobody can promise
//!
//! - **Clocks run at about the same rate**: the lock is used for 1 % and 2 ms less than its ttl. No
//!   clock needs to be right, but for fencing counters that were lost; none may jump forward.
//! - **A node that forgets its locks stays away for as long as they last.** A node that crashes
//!   and is back within the ttl, without its memory, may give a lock that is held to somebody
//!   else. Run the nodes with `appendonly yes` and `appendfsync always`, or restart them no sooner
//!   than the longest ttl after the crash ("delayed restarts" in the Redis documentation). Losing
//!   one node's memory alone does no harm while all others still have the lock: healing at each
//!   renewal makes this the usual case.
//! - **A holder that stands still for longer than its lock lasts does not know it.** Kleppmann ("How
//!   to do distributed locking") objects that no such lock is safe without a fencing token that
//!   grows from holder to holder, and that Redlock has none. He is right on the first, so this one
//!   has: [`LockGuard::fencing_token`](crate::LockGuard::fencing_token). Where what the lock protects
//!   can refuse an old token, neither pauses nor clocks can do harm; where it cannot, they can, with
//!   this as with any lock.
//!
//! An even number of nodes is allowed, and survives the loss of no more of them than one node fewer
//! would. One node is a single server with a little more work.

mod fence;
mod round;
mod stragglers;
mod survey;

#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    future::poll_fn,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

#[cfg(feature = "redis")]
use crossbeam_utils::CachePadded;
use futures_util::future::join_all;
use tokio::time::{Sleep, sleep};

use self::{
    fence::Agreement,
    round::{Call, Leave, Round},
    stragglers::{Renewing, Stragglers},
};
use crate::{
    error::{InvalidSettings, QuorumNotReached, StorageError, StorageErrorKind},
    key::LockName,
    options::LockOptions,
    storage::{
        self, AcquireReply, AcquireRequest, DynStorage, FencingBlock, GivenUp, Inbox, LockRecord,
        LockStorage, Message, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest, Survey, SurveyRequest,
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize},
    },
};

/// The longest time that a node has to answer if nothing else is said, and the part of the ttl.
const NODE_TIMEOUT: Duration = Duration::from_millis(200);
const PART_OF_TTL: u32 = 10;

/// Locks held by a majority of several storages. See the [module documentation](self).
///
/// Clones share their connections.
#[derive(Clone)]
pub struct Redlock {
    shared: Arc<Shared>,
}

/// What the calls to the nodes share, also those that go on after their callers have gone.
struct Shared {
    nodes: Vec<Node>,
    node_timeout: Option<Duration>,
    stragglers: Stragglers,
    #[cfg(test)]
    write_back: fence::WriteBack,
}

struct Node {
    storage: Arc<dyn DynStorage>,
    /// It did not answer in time when it was last asked: nobody waits for it who need not.
    is_late: AtomicBool,
    /// Calls that are followed in the background.
    behind: AtomicUsize,
}

#[cfg(feature = "redis")]
type Server = Arc<CachePadded<super::RedisStorage>>;

impl Redlock {
    /// Locks over these storages, one for each node. To mix storages of different types, see
    /// [`Redlock::builder`].
    ///
    /// # Errors
    ///
    /// [`InvalidSettings::NoNodes`] if there are none.
    pub fn new<S: LockStorage>(
        nodes: impl IntoIterator<Item = S>,
    ) -> Result<Self, InvalidSettings> {
        nodes
            .into_iter()
            .fold(Self::builder(), RedlockBuilder::node)
            .build()
    }

    /// Connects to the Redis servers at these URLs: see
    /// [`RedisStorage::connect`](crate::storage::RedisStorage::connect). A minority of them may be
    /// away; they are connected to when they are back.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if a URL cannot be read or is there twice, if there is none, or if no
    /// majority of the servers can be reached within 1 s.
    ///
    /// # Cancel safety
    ///
    /// As [`RedisStorage::connect`](crate::storage::RedisStorage::connect).
    #[cfg(feature = "redis")]
    pub async fn connect<U: Into<String>>(
        urls: impl IntoIterator<Item = U>,
    ) -> Result<Self, StorageError> {
        let (redlock, storages) = Self::over_servers(urls)?;
        let connected = join_all(storages.iter().map(|storage| storage.connected())).await;
        let reached = connected.iter().filter(|result| result.is_ok()).count();
        match connected.into_iter().find_map(Result::err) {
            Some(error) if reached < redlock.shared.quorum() => Err(error),
            _ => Ok(redlock),
        }
    }

    /// The same, but connects when the first lock is wanted, so that a service can start while its
    /// servers are away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if a URL cannot be read or is there twice, or if there is none.
    #[cfg(feature = "redis")]
    pub fn connect_lazily<U: Into<String>>(
        urls: impl IntoIterator<Item = U>,
    ) -> Result<Self, StorageError> {
        Ok(Self::over_servers(urls)?.0)
    }

    /// Not connected yet.
    #[cfg(feature = "redis")]
    fn over_servers<U: Into<String>>(
        urls: impl IntoIterator<Item = U>,
    ) -> Result<(Self, Vec<Server>), StorageError> {
        let refused =
            |error: InvalidSettings| StorageError::with_source(StorageErrorKind::Rejected, error);
        let mut known: Vec<String> = Vec::new();
        let mut storages = Vec::new();
        for url in urls {
            let url = url.into();
            if known.contains(&url) {
                return Err(refused(InvalidSettings::SameNode));
            }
            let storage = super::RedisStorage::builder(url.as_str()).connect_lazily()?;
            storages.push(Arc::new(CachePadded::new(storage)));
            known.push(url);
        }
        let mut builder = Self::builder();
        for storage in &storages {
            builder
                .nodes
                .push(Arc::clone(storage) as Arc<dyn DynStorage>);
        }
        Ok((builder.build().map_err(refused)?, storages))
    }

    /// A Redlock with settings of your own: see [`RedlockBuilder`].
    pub fn builder() -> RedlockBuilder {
        RedlockBuilder {
            nodes: Vec::new(),
            node_timeout: None,
        }
    }

    /// How many nodes there are; a [quorum](Self::quorum) of them has to agree.
    pub fn nodes(&self) -> usize {
        self.shared.nodes.len()
    }

    /// How many of them have to agree: more than half.
    ///
    /// ```
    /// use tower_distributed_lock::{Redlock, storage::MemoryStorage};
    ///
    /// let redlock = Redlock::new((0..5).map(|_| MemoryStorage::new()))?;
    /// // So two of them may be down.
    /// assert_eq!((redlock.nodes(), redlock.quorum()), (5, 3));
    /// # Ok::<(), tower_distributed_lock::error::InvalidSettings>(())
    /// ```
    pub fn quorum(&self) -> usize {
        self.shared.quorum()
    }
}

impl fmt::Debug for Redlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redlock")
            .field("nodes", &self.nodes())
            .field("node_timeout", &self.shared.node_timeout)
            .finish_non_exhaustive()
    }
}

/// Sets up a [`Redlock`]; made by [`Redlock::builder`].
///
/// ```
/// use std::time::Duration;
/// use tower_distributed_lock::{Redlock, storage::MemoryStorage};
///
/// // Nodes may be storages of different types.
/// let redlock = Redlock::builder()
///     .node(MemoryStorage::new())
///     .node(MemoryStorage::new())
///     .node(MemoryStorage::new())
///     .node_timeout(Duration::from_millis(50))
///     .build()?;
/// assert_eq!((redlock.nodes(), redlock.quorum()), (3, 2));
/// # Ok::<(), tower_distributed_lock::error::InvalidSettings>(())
/// ```
#[must_use]
pub struct RedlockBuilder {
    nodes: Vec<Arc<dyn DynStorage>>,
    node_timeout: Option<Duration>,
}

impl RedlockBuilder {
    /// Adds a node, which is a [storage](LockStorage) of any type. All processes that exclude each other
    /// have the same nodes, in any order.
    pub fn node(mut self, storage: impl LockStorage) -> Self {
        self.nodes.push(storage::shared(storage));
        self
    }

    /// How long a node has to answer before the others decide without it; an attempt that no
    /// majority has answered by then has failed. Default: a tenth of the
    /// [ttl](crate::LockOptionsBuilder::ttl), and 200 ms at most.
    ///
    /// What is longer than a lock lasts is of no use. The Redis documentation has 5 to 50 ms for a
    /// ttl of 10 s, where one server is asked after the other; here all are asked at the same time,
    /// and one that is slow delays nobody as long as the others are a majority.
    pub fn node_timeout(mut self, timeout: Duration) -> Self {
        self.node_timeout = Some(timeout);
        self
    }

    /// Makes the storage.
    ///
    /// # Errors
    ///
    /// [`InvalidSettings`] if there is no node, or the time limit is out of its range.
    pub fn build(self) -> Result<Redlock, InvalidSettings> {
        if self.nodes.is_empty() {
            return Err(InvalidSettings::NoNodes);
        }
        let range = Duration::from_nanos(1)..=LockOptions::MAX_DURATION;
        if self.node_timeout.is_some_and(|it| !range.contains(&it)) {
            return Err(InvalidSettings::NodeTimeout);
        }
        let nodes = self.nodes.into_iter().map(|storage| Node {
            storage,
            is_late: AtomicBool::new(false),
            behind: AtomicUsize::new(0),
        });
        let shared = Shared {
            nodes: nodes.collect(),
            node_timeout: self.node_timeout,
            stragglers: Stragglers::default(),
            #[cfg(test)]
            write_back: fence::WriteBack::default(),
        };
        Ok(Redlock {
            shared: Arc::new(shared),
        })
    }
}

impl fmt::Debug for RedlockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedlockBuilder")
            .field("nodes", &self.nodes.len())
            .field("node_timeout", &self.node_timeout)
            .finish()
    }
}

impl Shared {
    fn quorum(&self) -> usize {
        self.nodes.len() / 2 + 1
    }

    fn node_timeout(&self, ttl: Duration) -> Duration {
        self.node_timeout
            .unwrap_or_else(|| NODE_TIMEOUT.min(ttl / PART_OF_TTL))
    }

    fn storage(&self, node: usize) -> Arc<dyn DynStorage> {
        Arc::clone(&self.nodes[node].storage)
    }

    fn ask<'a, T>(
        &'a self,
        call: impl FnMut(usize) -> Option<Call<T>>,
        leave: Leave<'a, T>,
    ) -> Round<'a, T> {
        Round::new(self, (0..self.nodes.len()).map(call), leave)
    }

    /// No majority said the same. The kind is that of a refusal if refusals alone stood in the way.
    fn no_quorum<'a>(
        &self,
        ours: usize,
        not_ours: usize,
        late: usize,
        errors: impl IntoIterator<Item = &'a StorageError>,
    ) -> StorageError {
        let errors: Vec<_> = errors.into_iter().map(StorageError::kind).collect();
        let refusal = errors.iter().find(|kind| !kind.is_transient());
        let refusals = errors.iter().filter(|kind| !kind.is_transient()).count();
        let kind = match refusal {
            Some(kind) if refusals > self.nodes.len() - self.quorum() => *kind,
            _ if late > 0 => StorageErrorKind::Timeout,
            _ => StorageErrorKind::Unavailable,
        };
        let answers = QuorumNotReached {
            nodes: self.nodes.len(),
            needed: self.quorum(),
            ours,
            not_ours,
            late,
            failed: errors.len(),
        };
        StorageError::with_source(kind, answers)
    }
}

/// Waits until `done` says so, or for `limit`: then `done` is asked a last time, and told that time
/// is up. The timer is made only if something has to be waited for.
async fn within<T>(
    limit: Duration,
    mut done: impl FnMut(&mut Context<'_>, bool) -> Option<T>,
) -> T {
    let mut timer = pin!(None::<Sleep>);
    poll_fn(move |cx| {
        if let Some(result) = done(cx, false) {
            return Poll::Ready(result);
        }
        if timer.is_none() {
            timer.set(Some(sleep(limit)));
        }
        let up = timer
            .as_mut()
            .as_pin_mut()
            .is_none_or(|it| it.poll(cx).is_ready());
        match up.then(|| done(cx, true)) {
            Some(Some(result)) => Poll::Ready(result),
            _ => Poll::Pending,
        }
    })
    .await
}

// --- acquire ---------------------------------------------------------------------------------

/// What the nodes have said to an acquire.
#[derive(Default)]
struct Votes {
    granted: Vec<(usize, Option<FencingBlock>)>,
    wanted: bool,
    held: Vec<Option<Duration>>,
    errors: Vec<StorageError>,
}

impl Votes {
    fn count(&mut self, node: usize, answer: Result<AcquireReply, StorageError>) {
        match answer {
            Ok(AcquireReply::Granted { wanted, fencing }) => {
                self.granted.push((node, fencing));
                self.wanted |= wanted;
            }
            Ok(AcquireReply::Held { ttl, .. }) => self.held.push(ttl),
            Ok(AcquireReply::Undecided | AcquireReply::Unknown) => self.held.push(None),
            Err(error) => self.errors.push(error),
        }
    }

    /// When a majority may be free, as far as known.
    fn free_in(&mut self, quorum: usize) -> Option<Duration> {
        // Those that do not know come last.
        self.held.sort_by_key(|ttl| ttl.unwrap_or(Duration::MAX));
        self.held.get(quorum - 1).copied().flatten()
    }
}

impl Redlock {
    /// Asks all nodes. `Err`: it is not ours.
    async fn vote(
        &self,
        request: &AcquireRequest,
    ) -> Result<Votes, Result<AcquireReply, StorageError>> {
        let shared = &self.shared;
        let quorum = shared.quorum();
        let request = &AcquireRequest {
            given_up: GivenUp::not_yet(),
            ..request.clone()
        };
        let mut votes = Votes::default();
        let follow = |node, call| shared.follow(node, call, request);
        let call = |node: usize| {
            if shared.nodes[node].is_far_behind() {
                let text = "too many calls to this node are not answered";
                let error = StorageError::with_source(StorageErrorKind::Unavailable, text);
                votes.errors.push(error);
                return None;
            }
            Some(shared.storage(node).acquire(request.clone()))
        };
        let mut round = shared.ask(call, &follow);
        within(shared.node_timeout(request.ttl), |cx, time_is_up| {
            round.poll(cx, |node, answer| votes.count(node, answer));
            let granted = votes.granted.len();
            if granted >= quorum {
                // Who has not answered by now need not wake the caller any more.
                let mut cx = Context::from_waker(Waker::noop());
                round.poll(&mut cx, |node, answer| votes.count(node, answer));
                return Some(Ok(()));
            }
            // Who waits anyway can wait for what the rest say, and tell a split vote from a holder.
            let decided = granted + round.unanswered() < quorum && !round.is_waited_for();
            if !decided && !time_is_up {
                return None;
            }
            let late = round.unanswered();
            round.give_up();
            Some(Err(late))
        })
        .await
        .map(|()| {
            shared.put_aside(request, round.rest());
            std::mem::take(&mut votes)
        })
        .map_err(|late| {
            let (granted, held) = (votes.granted.len(), votes.held.len());
            if granted + held < quorum {
                Err(shared.no_quorum(granted, held, late, &votes.errors))
            } else if granted > 0 {
                Ok(AcquireReply::Undecided)
            } else {
                Ok(AcquireReply::held(votes.free_in(quorum)))
            }
        })
    }

    /// Sees to it that a majority of the nodes that granted the lock give higher tokens from now on.
    async fn agree(
        &self,
        request: &AcquireRequest,
        granted: &[(usize, Option<FencingBlock>)],
    ) -> Result<Option<FencingBlock>, Result<AcquireReply, StorageError>> {
        let shared = &self.shared;
        let quorum = shared.quorum();
        let Some(agreement) = Agreement::of(granted, request.fencing, quorum) else {
            return Ok(None);
        };
        #[cfg(test)]
        let agreement = shared.write_back.apply(agreement);
        let Agreement {
            block,
            mut agree,
            lower,
        } = agreement;
        if agree >= quorum {
            return Ok(Some(block));
        }
        let call = |node| {
            lower.contains(&node).then(|| {
                shared.storage(node).raise(RaiseRequest {
                    name: request.name.clone(),
                    token: request.token,
                    above: block.last(),
                })
            })
        };
        let mut round = shared.ask(call, &|_, _| ());
        let (mut lost, mut errors) = (0, Vec::new());
        let late = within(shared.node_timeout(request.ttl), |cx, time_is_up| {
            round.poll(cx, |_, answer| match answer {
                Ok(RaiseReply::Raised) => agree += 1,
                Ok(RaiseReply::NotOurs) => lost += 1,
                Err(error) => errors.push(error),
            });
            let decided = agree >= quorum || agree + round.unanswered() < quorum;
            (decided || time_is_up).then(|| round.unanswered())
        })
        .await;
        if agree >= quorum {
            Ok(Some(block))
        } else if lost > 0 {
            Err(Ok(AcquireReply::Undecided))
        } else {
            Err(Err(shared.no_quorum(agree, lost, late, &errors)))
        }
    }
}

// --- renew -----------------------------------------------------------------------------------

/// What the nodes have said to the renewal of one lock.
#[derive(Clone, Default)]
struct Renewal {
    ours: usize,
    wanted: bool,
    not_ours: Vec<usize>,
    errors: Vec<StorageError>,
}

impl Renewal {
    fn count(&mut self, node: usize, answer: Result<RenewReply, StorageError>) {
        match answer {
            Ok(RenewReply::Renewed) => self.ours += 1,
            Ok(RenewReply::RenewedAndWanted) => {
                self.ours += 1;
                self.wanted = true;
            }
            Ok(RenewReply::NotOurs) => self.not_ours.push(node),
            Err(error) => self.errors.push(error),
        }
    }
}

/// Renewals as one call of a node.
async fn renew_all(
    storage: Arc<dyn DynStorage>,
    requests: Vec<RenewRequest>,
) -> Result<Vec<Result<RenewReply, StorageError>>, StorageError> {
    Ok(storage.renew(requests).await)
}

// --- release ---------------------------------------------------------------------------------

impl LockStorage for Redlock {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let votes = match self.vote(request).await {
            Ok(votes) => votes,
            Err(reply) => return reply,
        };
        let fencing = match request.fencing {
            0 => None,
            _ => match self.agree(request, &votes.granted).await {
                Ok(fencing) => fencing,
                Err(reply) => return reply,
            },
        };
        let granted = match votes.wanted {
            false => AcquireReply::granted(),
            true => AcquireReply::granted_and_wanted(),
        };
        Ok(granted.with_fencing(fencing))
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let shared = &self.shared;
        let (nodes, quorum) = (shared.nodes.len(), shared.quorum());
        let renewing = Renewing::new(shared, requests);
        let mut renewals = vec![Renewal::default(); requests.len()];
        let call = |node| -> Option<Call<_>> {
            Some(Box::pin(renew_all(shared.storage(node), requests.to_vec())))
        };
        let mut round = shared.ask(call, &|_, _| ());
        let ttl = requests.iter().map(|request| request.ttl).min();
        let late = within(
            shared.node_timeout(ttl.unwrap_or_default()),
            |cx, time_is_up| {
                round.poll(cx, |node, answers| {
                    let answers = match answers {
                        Ok(answers) if answers.len() == requests.len() => answers,
                        _ => {
                            tracing::error!(
                                "the lock storage broke its contract: not one reply per renewal"
                            );
                            let error = StorageError::new(StorageErrorKind::Rejected);
                            vec![Err(error); requests.len()]
                        }
                    };
                    for (renewal, answer) in renewals.iter_mut().zip(answers) {
                        renewal.count(node, answer);
                    }
                });
                if time_is_up {
                    round.give_up();
                }
                // What a node does not have is seen only in its answer. Without a majority, our
                // caller knows best how long to wait.
                if round.is_waited_for() || round.unanswered() > nodes - quorum {
                    return None;
                }
                Some(round.unanswered())
            },
        )
        .await;
        let mut replies = Vec::with_capacity(requests.len());
        for (request, renewal) in requests.iter().zip(renewals) {
            let not_ours = renewal.not_ours.len();
            replies.push(if renewal.ours >= quorum {
                for node in renewal.not_ours {
                    renewing.heal(node, request);
                }
                match renewal.wanted {
                    false => Ok(RenewReply::Renewed),
                    true => Ok(RenewReply::RenewedAndWanted),
                }
            } else if not_ours > nodes - quorum {
                Ok(RenewReply::NotOurs)
            } else {
                Err(shared.no_quorum(renewal.ours, not_ours, late, &renewal.errors))
            });
        }
        replies
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let shared = &self.shared;
        let (nodes, quorum) = (shared.nodes.len(), shared.quorum());
        // Places in a queue are not to be had. And some may wait of whom we know nothing: grants that
        // are not waited for do not tell, nor do plain ones without tokens, and the mark of those who
        // wait goes with a part that is released quietly. So each node has to look: with the short form,
        // waiters were not woken while a server hung and came back. Nor do releases go behind another
        // command, of which each node would have one more: a gain from that was never measured here.
        let request = &ReleaseRequest {
            requeue: None,
            wanted: None,
            ..request.clone()
        };
        // What is on its way to a node may be carried out after this: then it is released again.
        let mut overtaken = shared.released(request);
        let insist = |node, call| shared.insist(node, Some(call), request);
        let call = |node| Some(shared.storage(node).release(request.clone()));
        let mut round = shared.ask(call, &insist);
        let (mut ours, mut not_ours, mut errors) = (0, 0, Vec::new());
        let late = within(shared.node_timeout(request.ttl), |cx, time_is_up| {
            round.poll(cx, |node, answer| match answer {
                Ok(ReleaseReply::NotOurs) => not_ours += 1,
                Ok(_) => {
                    ours += 1;
                    overtaken.was_released(node);
                }
                Err(error) => {
                    if error.kind().is_transient() {
                        shared.insist(node, None, request);
                    }
                    errors.push(error);
                }
            });
            let decided = ours >= quorum || not_ours > nodes - quorum;
            if time_is_up {
                round.give_up();
            }
            // All of them, so that nothing is left when this process ends. Without a majority, our
            // caller knows best how long to wait.
            if round.is_waited_for() || !decided && round.unanswered() > 0 {
                return None;
            }
            Some(round.unanswered())
        })
        .await;
        if ours >= quorum {
            Ok(ReleaseReply::Released)
        } else if not_ours > nodes - quorum {
            Ok(ReleaseReply::NotOurs)
        } else {
            Err(shared.no_quorum(ours, not_ours, late, &errors))
        }
    }

    async fn listen(&self, inbox: Inbox) {
        let hearing = Arc::new(Hearing {
            quorum: self.quorum(),
            nodes: Mutex::new(vec![false; self.nodes()]),
        });
        let nodes = self.shared.nodes.iter().enumerate();
        let listens = nodes.map(|(number, node)| {
            let (hearing, to) = (Arc::clone(&hearing), inbox.clone());
            let inbox = Inbox::new(inbox.id(), inbox.prefix().into(), move |message| {
                if let Some(message) = hearing.pass_on(number, message) {
                    to.deliver(message);
                }
            });
            Arc::clone(&node.storage).listen(inbox)
        });
        join_all(listens).await;
    }

    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        self.survey_all(request).await
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.look_for(name).await
    }

    async fn force_release(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        self.force(seen).await
    }

    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        self.tell_inbox(prefix, inbox, text).await
    }

    fn is_divided(&self) -> bool {
        true
    }

    async fn settled(&self) {
        self.shared.stragglers.have_ended().await;
        let nodes = self.shared.nodes.iter();
        join_all(nodes.map(|node| Arc::clone(&node.storage).settled())).await;
    }
}

/// Which nodes we hear.
struct Hearing {
    quorum: usize,
    nodes: Mutex<Vec<bool>>,
}

impl Hearing {
    /// What a node's message means for whoever waits for the lock of all.
    fn pass_on(&self, node: usize, message: Message) -> Option<Message> {
        let hears = match message {
            Message::Listening => true,
            Message::Deaf => false,
            // Nobody asks a node for a place in its queue.
            Message::Granted(_) => return None,
            message => return Some(message),
        };
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |nodes: &[bool]| nodes.iter().filter(|hears| **hears).count();
        let before = count(&nodes);
        nodes[node] = hears;
        let now = count(&nodes);
        drop(nodes);
        match message {
            // Also for each that comes later: some of its messages may have been missed.
            Message::Listening if now >= self.quorum => Some(message),
            Message::Deaf if before >= self.quorum && now < self.quorum => Some(message),
            _ => None,
        }
    }
}
