//! Where locks are kept: the [`LockStorage`] trait and the storages that come with the crate.
//!
//! | storage | for |
//! |---|---|
//! | [`MemoryStorage`] | one process: trying it out, tests, a single replica |
//! | `RedisStorage` (feature `redis`) | many processes: one Redis server, Sentinel, or Cluster |
//! | [`Redlock`] | many processes, and locks that outlive the loss of a server: a majority of several |
//! | your own | whatever can compare and set with an expiry |
//!
//! A storage does three things, each in one step that nothing can come between: set a name to a
//! token if the name is free, set its expiry anew if it still holds the token, delete it if it
//! still holds the token. It knows nothing of callers, queues and deadlines; these are the business
//! of [`LockFactory`](crate::LockFactory).

mod calls;
#[cfg(feature = "conformance")]
pub mod conformance;
mod dynamic;
mod fencing;
mod inbox;
mod memory;
pub mod quorum;
#[cfg(feature = "redis")]
pub mod redis;
mod survey;
mod token;

use std::future::Future;

pub(crate) use self::calls::GivenUp;
pub(crate) use self::dynamic::{BoxFuture, Call, DynStorage, acquire, release, shared};
#[cfg(feature = "redis")]
pub use self::redis::RedisStorage;
pub use self::{
    calls::{
        AcquireReply, AcquireRequest, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest, Requeue,
    },
    fencing::FencingBlock,
    inbox::{Inbox, Message, PushedGrant, Stamp},
    memory::MemoryStorage,
    quorum::{Redlock, RedlockBuilder},
    survey::{LockOwner, LockRecord, Survey, SurveyRequest},
    token::OwnerToken,
};
use crate::error::{StorageError, StorageErrorKind};
pub use crate::key::LockName;

/// A place where locks are kept.
///
/// # Contract
///
/// What an implementation must keep (`conformance::check`, with the feature `conformance`, tests
/// it):
///
/// 1. Each call is atomic, against other calls and other processes.
/// 2. **acquire** answers [`AcquireReply::Granted`] only if the name was free, or already held by
///    the very same token, and now holds the token for the whole `ttl`. An attempt that is sent
///    again after a lost reply has to succeed: it meets its own token.
/// 3. **renew** touches a name only if it holds the request's token, and then sets its time to live
///    to the whole `ttl`. It never brings back a name that has expired.
/// 4. **release** deletes a name only if it holds the request's token. Releasing what is not held
///    changes nothing.
/// 5. A name disappears by itself when its time to live is over, also if no process is left to ask.
///    It may disappear up to 0.1 % late but never early.
/// 6. An error leaves the outcome open: callers assume neither that it was done nor that it was
///    not. An error of a kind that is not [transient](crate::error::StorageErrorKind::is_transient)
///    means that it was not done.
/// 7. Calls started one after the other need not be carried out in that order, but a storage that
///    keeps the order saves its callers a wait. An acquire of several steps begins none of them
///    once it is [given up](AcquireRequest::is_given_up).
/// 8. A storage that [listens](LockStorage::listen) keeps a queue for each lock. A denied acquire
///    that asks for it stands at its end, once, however often it is repeated; the holder is told
///    that its lock is wanted. A release gives the lock to the first in the queue that can be
///    told, in the same step. A release with the token of somebody in the queue takes it out. Who
///    [asks for a word](AcquireRequest::hint) instead of a place is told [`Message::Free`] at the
///    next release that is not [quiet](ReleaseRequest::quiet).
/// 9. A storage that can fence gives each grant the [`FencingBlock`] that was asked for: numbers
///    below 2^53, greater than all that a grant of this lock came with before, also if the storage
///    has lost its memory since. One that cannot never gives any. What it gives is also above
///    whatever it was [raised](LockStorage::raise) to.
/// 10. A storage that [is divided](LockStorage::is_divided) may be left with parts of a lock by an
///     acquire that was not granted, until the token is released.
/// 11. A storage that can be [inspected](crate::inspect) lists a lock from its grant to its end, and
///     changes nothing by that. A [forced release](LockStorage::force_release) frees what is still
///     held by whom it was seen with, and nothing else; the first in the queue has it then, as
///     after any release.
///
/// # Around another storage
///
/// A storage that passes its calls on to another, to count or delay them, has to pass on all of them,
/// also those that have a default here: with the defaults, locks over it can be neither
/// [inspected](crate::inspect) nor heard of. (Without [`acquire_at_once`](LockStorage::acquire_at_once)
/// and [`release_at_once`](LockStorage::release_at_once) all calls come by the other two.) Those are [`listen`](LockStorage::listen),
/// [`raise`](LockStorage::raise), [`survey`](LockStorage::survey), [`look`](LockStorage::look),
/// [`force_release`](LockStorage::force_release), [`tell`](LockStorage::tell),
/// [`is_divided`](LockStorage::is_divided) and [`settled`](LockStorage::settled).
///
/// # Cancel safety
///
/// A call's future may be dropped at any time, and also be moved to another task half-way. Dropped
/// after its first poll, the call may be carried out or not.
///
/// # Time limits
///
/// An implementation need not limit its own time: a call that takes longer than the factory's
/// [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout) is dropped.
///
/// # Example
///
/// The least that a storage can be: it has no queue, so waiters poll, and no fencing tokens.
///
/// ```
/// use std::{
///     collections::HashMap,
///     sync::{Mutex, PoisonError},
///     time::Instant,
/// };
/// use tower_distributed_lock::{
///     LockFactory,
///     error::StorageError,
///     storage::{
///         AcquireReply, AcquireRequest, LockName, LockStorage, OwnerToken, ReleaseReply,
///         ReleaseRequest, RenewReply, RenewRequest,
///     },
/// };
///
/// #[derive(Default)]
/// struct Table(Mutex<HashMap<LockName, (OwnerToken, Instant)>>);
///
/// impl Table {
///     /// Does something with a lock in one step: it is told who has the lock, and until when.
///     fn at<T>(
///         &self,
///         name: &LockName,
///         step: impl FnOnce(&mut Option<(OwnerToken, Instant)>) -> T,
///     ) -> T {
///         let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
///         let mut owner = locks.remove(name).filter(|(_, until)| *until > Instant::now());
///         let result = step(&mut owner);
///         locks.extend(owner.map(|owner| (name.clone(), owner)));
///         result
///     }
/// }
///
/// impl LockStorage for Table {
///     async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
///         let until = Instant::now() + request.ttl;
///         Ok(self.at(&request.name, |owner| match owner {
///             Some((token, until)) if *token != request.token => {
///                 AcquireReply::held(Some(until.saturating_duration_since(Instant::now())))
///             }
///             _ => {
///                 *owner = Some((request.token, until));
///                 AcquireReply::granted()
///             }
///         }))
///     }
///
///     async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
///         let renew = |request: &RenewRequest| match self.at(&request.name, |owner| {
///             let ours = owner.as_mut().filter(|(token, _)| *token == request.token);
///             ours.map(|(_, until)| *until = Instant::now() + request.ttl)
///         }) {
///             Some(()) => Ok(RenewReply::Renewed),
///             None => Ok(RenewReply::NotOurs),
///         };
///         requests.iter().map(renew).collect()
///     }
///
///     async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
///         Ok(self.at(&request.name, |owner| {
///             match owner.take_if(|(token, _)| *token == request.token) {
///                 Some(_) => ReleaseReply::Released,
///                 None => ReleaseReply::NotOurs,
///             }
///         }))
///     }
/// }
///
/// # #[tokio::main]
/// # async fn main() {
/// // With the feature `conformance`, in a test.
/// # #[cfg(feature = "conformance")]
/// tower_distributed_lock::storage::conformance::check(Table::default()).await;
///
/// let factory = LockFactory::new(Table::default());
/// # }
/// ```
pub trait LockStorage: Send + Sync + 'static {
    /// Takes the lock for `request.token` if it is free.
    fn acquire(
        &self,
        request: &AcquireRequest,
    ) -> impl Future<Output = Result<AcquireReply, StorageError>> + Send;

    /// Sets the time to live of each lock anew where it still belongs to the request's token. One
    /// reply per request, in their order.
    fn renew(
        &self,
        requests: &[RenewRequest],
    ) -> impl Future<Output = Vec<Result<RenewReply, StorageError>>> + Send;

    /// Frees the lock if it still belongs to `request.token`, and takes back the token's place in
    /// the queue, if it has one.
    ///
    /// A storage with a queue gives the lock to the first in it whose inbox is listened to, and
    /// then puts `request.requeue` at the end.
    fn release(
        &self,
        request: &ReleaseRequest,
    ) -> impl Future<Output = Result<ReleaseReply, StorageError>> + Send;

    /// Carries an [`acquire`](Self::acquire) out here and now, where nothing has to be waited for: it
    /// saves each caller a future. `None`, as the default answers, means that nothing was done;
    /// then [`acquire`](Self::acquire) is called.
    ///
    /// It may be called outside of a runtime. A panic in it counts as an error of the kind
    /// [`Unavailable`](crate::error::StorageErrorKind::Unavailable).
    fn acquire_at_once(
        &self,
        request: &AcquireRequest,
    ) -> Option<Result<AcquireReply, StorageError>> {
        let _ = request;
        None
    }

    /// The same for a [`release`](Self::release).
    fn release_at_once(
        &self,
        request: &ReleaseRequest,
    ) -> Option<Result<ReleaseReply, StorageError>> {
        let _ = request;
        None
    }

    /// Listens to messages for this process, as long as it is polled, and delivers them.
    ///
    /// This is how a waiter learns that it has been given the lock, without asking. A storage that
    /// can do this keeps a queue for each lock, says [`Message::Listening`] when a grant could
    /// reach us from now on, and [`Message::Deaf`] when not; then
    /// [`AcquireRequest::queue`] asks for a place in that queue. The default does nothing: waiters
    /// poll.
    fn listen(&self, inbox: Inbox) -> impl Future<Output = ()> + Send {
        drop(inbox);
        std::future::ready(())
    }

    /// Makes sure that all fencing tokens from now on are above `request.above`, if the lock
    /// belongs to `request.token`. It may be done for other locks as well.
    ///
    /// With it several storages agree on a token: [`Redlock`] needs it of its nodes. The default
    /// says that it cannot, by an error of the kind
    /// [`Rejected`](crate::error::StorageErrorKind::Rejected); locks over such nodes have no fencing
    /// tokens.
    fn raise(
        &self,
        request: &RaiseRequest,
    ) -> impl Future<Output = Result<RaiseReply, StorageError>> + Send {
        let _ = request;
        std::future::ready(Err(cannot("this storage cannot raise its fencing tokens")))
    }

    /// Lists the locks that are held. The default says that it cannot, by an error of the kind
    /// [`Rejected`](crate::error::StorageErrorKind::Rejected).
    ///
    /// It must not stop others from using the storage meanwhile, however many locks there are.
    fn survey(
        &self,
        request: &SurveyRequest,
    ) -> impl Future<Output = Result<Survey, StorageError>> + Send {
        let _ = request;
        std::future::ready(Err(cannot("this storage cannot list its locks")))
    }

    /// Who has one lock, if somebody has it. The default says that it cannot tell, by an error of
    /// the kind [`Rejected`](crate::error::StorageErrorKind::Rejected).
    fn look(
        &self,
        name: &LockName,
    ) -> impl Future<Output = Result<Option<LockRecord>, StorageError>> + Send {
        let _ = name;
        std::future::ready(Err(cannot("this storage cannot tell who has a lock")))
    }

    /// Frees a lock, if it is still held by whom it was seen with, and gives it to the first in its
    /// queue. The default [releases](Self::release) it with that one's token, and for a client of
    /// another kind says that it cannot, by an error of the kind
    /// [`Rejected`](crate::error::StorageErrorKind::Rejected).
    fn force_release(
        &self,
        seen: &LockRecord,
    ) -> impl Future<Output = Result<ReleaseReply, StorageError>> + Send {
        let request = release_of(seen);
        async move {
            match request {
                Some(request) => self.release(&request).await,
                None => Err(cannot("this storage cannot free another client's lock")),
            }
        }
    }

    /// Has a [`Message::Told`] delivered to another process's inbox, under the same prefix. `false`
    /// if it is certain that nobody listens there.
    ///
    /// `text` has no line breaks and at most [`Message::MAX_TEXT`] bytes. It may arrive more than once, or
    /// not at all. The default tells nobody.
    fn tell(
        &self,
        prefix: &str,
        inbox: u128,
        text: &str,
    ) -> impl Future<Output = Result<bool, StorageError>> + Send {
        let _ = (prefix, inbox, text);
        std::future::ready(Ok(false))
    }

    /// Whether a lock is kept in parts that are taken one by one, as [`Redlock`] does on several
    /// servers. Default `false`.
    ///
    /// An attempt that was not granted, or whose reply was lost, may have taken some of them. So a
    /// factory releases its token and takes a new one for the next attempt, where a token of
    /// another storage would be used again; it asks for [words](AcquireRequest::hint), not for
    /// places in a queue, and then waits a random time, so that those who are told at the same
    /// time do not meet again.
    fn is_divided(&self) -> bool {
        false
    }

    /// Returns when nothing is on its way any more that goes on by itself after its call has ended,
    /// such as the releases that a server of a [`Redlock`] has not answered. A factory that
    /// [shuts down](crate::LockFactory::drain) waits for it. The default returns at once.
    fn settled(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

fn cannot(text: &'static str) -> StorageError {
    StorageError::with_source(StorageErrorKind::Rejected, text)
}

/// The release of a lock by the token that it was seen with, if it is one of this crate's.
fn release_of(seen: &LockRecord) -> Option<ReleaseRequest> {
    Some(ReleaseRequest {
        name: seen.name.clone(),
        token: seen.owner.token()?,
        ttl: seen.ttl.unwrap_or_default(),
        wanted: None,
        requeue: None,
        quiet: false,
    })
}
