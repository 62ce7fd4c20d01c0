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

#[cfg(feature = "conformance")]
pub mod conformance;
mod memory;
pub mod quorum;
#[cfg(feature = "redis")]
pub mod redis;
mod survey;

use std::{fmt, future::Future, ops::Deref, pin::Pin, sync::Arc, time::Duration};

use crossbeam_utils::CachePadded;

#[cfg(feature = "redis")]
pub use self::redis::RedisStorage;
pub use self::{
    memory::MemoryStorage,
    quorum::{Redlock, RedlockBuilder},
    survey::{LockOwner, LockRecord, Survey, SurveyRequest},
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
///    keeps the order saves its callers a wait.
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
/// [inspected](crate::inspect) nor heard of. Those are [`listen`](LockStorage::listen),
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
        unwanted: false,
        requeue: None,
        quiet: false,
    })
}

/// What [`LockStorage::acquire`] is asked.
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
    /// that [listens](LockStorage::listen) grants the lock to the token if it has it already, or if
    /// it is free and the token stands in its queue; if the token has neither the lock nor a place,
    /// nothing is done, and the reply is [`AcquireReply::Unknown`]. So no token is given the lock
    /// twice, and a message about the first time cannot be taken for one about the second. Other
    /// storages may treat it like any attempt. `again` is set then, too.
    pub repeated: bool,
    /// Whether the token should stand in the lock's queue if the lock is held by somebody else, so
    /// that it is given the lock when its turn comes, and a [`Message::Granted`] is sent. Of a
    /// storage that does not [listen](LockStorage::listen) this is never asked. For how long the
    /// place is kept at least without being asked for again.
    pub queue: Option<Duration>,
    /// Whether the token's process should be told by a [`Message::Free`] when the lock is released,
    /// if the lock is held by somebody else; and for how long that is kept in mind at least. Once
    /// for all attempts of a process. Asked of a storage instead of [`queue`](Self::queue), and
    /// only of one that [listens](LockStorage::listen).
    pub hint: Option<Duration>,
    /// How many fencing tokens the grant should come with, now or from the queue. 0: none.
    pub fencing: u32,
}

/// What became of an acquire.
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
    /// got some of its parts each. Only of a storage that [is divided](LockStorage::is_divided).
    Undecided,
}

/// Fencing tokens that came with a grant: consecutive numbers, to be used in their order.
///
/// A block is for the holders of one process that share a grant, one after the other. They need no
/// word with the storage between them, yet each has a token of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FencingBlock {
    /// The lowest of them.
    pub first: u64,
    /// How many they are. At least 1.
    pub count: u32,
}

impl FencingBlock {
    /// Tokens are below this: a number that JSON, Lua and signed SQL columns hold exactly.
    pub const LIMIT: u64 = 1 << 53;

    /// The highest of them.
    pub(crate) fn last(&self) -> u64 {
        self.first
            .saturating_add(u64::from(self.count))
            .saturating_sub(1)
    }

    /// Takes the lowest token out of the block.
    pub(crate) fn take(&mut self) -> Option<u64> {
        self.count = self.count.checked_sub(1)?;
        let token = self.first;
        self.first = self.first.saturating_add(1);
        Some(token)
    }

    /// Whether it is what the contract of a storage asks for.
    pub(crate) fn is_sound(&self) -> bool {
        let end = self.first.checked_add(u64::from(self.count));
        self.count > 0 && end.is_some_and(|end| end <= Self::LIMIT)
    }
}

/// A moment on the storage's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Which run of the storage's clock this is: another after a restart or on another server.
    /// `None` where it cannot be known; then no two stamps can be compared.
    pub run: Option<u128>,
    /// The time on that clock, from any origin.
    pub at: Duration,
}

/// What comes into an [`Inbox`].
#[derive(Clone)]
#[non_exhaustive]
pub enum Message {
    /// From now on messages arrive. Whoever waits should ask again: some may have been missed.
    Listening,
    /// Messages may be missed from now on.
    Deaf,
    /// A lock was given to a token of ours that stood in its queue.
    Granted(PushedGrant),
    /// Somebody began to wait for a lock that we hold.
    Wanted(LockName),
    /// A lock, or a part of it, was released, and we had [asked](AcquireRequest::hint) to be told.
    /// It is free for whoever asks first.
    Free(LockName),
    /// Another factory has something to say: the text that it gave to [`LockStorage::tell`], as it
    /// is.
    Told(String),
}

impl Message {
    /// The longest text that one factory [tells](LockStorage::tell) another, in bytes.
    pub const MAX_TEXT: usize = 16 * 1024;
}

/// What another process says may have its inbox in it, which is nobody's business.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening => f.write_str("Listening"),
            Self::Deaf => f.write_str("Deaf"),
            Self::Granted(grant) => f.debug_tuple("Granted").field(grant).finish(),
            Self::Wanted(name) => f.debug_tuple("Wanted").field(name).finish(),
            Self::Free(name) => f.debug_tuple("Free").field(name).finish(),
            Self::Told(text) => write!(f, "Told({} bytes)", text.len()),
        }
    }
}

/// A lock that was given to a token in its queue. Made by [`PushedGrant::new`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PushedGrant {
    /// The lock.
    pub name: LockName,
    /// Who has it now.
    pub token: OwnerToken,
    /// For how long, from [`stamp`](Self::stamp) on.
    pub ttl: Duration,
    /// When it was given.
    pub stamp: Stamp,
    /// Whether others stand in the queue behind it.
    pub wanted: bool,
    /// The fencing tokens that came with it.
    pub fencing: Option<FencingBlock>,
}

impl PushedGrant {
    /// A lock that `token` has for `ttl` from `stamp` on, without fencing tokens and with nobody
    /// behind it in the queue.
    pub fn new(name: LockName, token: OwnerToken, ttl: Duration, stamp: Stamp) -> Self {
        Self {
            name,
            token,
            ttl,
            stamp,
            wanted: false,
            fencing: None,
        }
    }
}

/// Where the messages for one factory are delivered. See [`LockStorage::listen`].
#[derive(Clone)]
pub struct Inbox {
    id: u128,
    prefix: Arc<str>,
    sink: Arc<dyn Fn(Message) + Send + Sync>,
}

impl Inbox {
    pub(crate) fn new(
        id: u128,
        prefix: Arc<str>,
        sink: impl Fn(Message) + Send + Sync + 'static,
    ) -> Self {
        Self {
            id,
            prefix,
            sink: Arc::new(sink),
        }
    }

    /// The number that all tokens of the factory have in common: [`OwnerToken::inbox`].
    pub fn id(&self) -> u128 {
        self.id
    }

    /// What the names of the factory's locks begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A lock's name, as it came in a message. `None` if it is not one of the factory's.
    pub fn name(&self, name: &str) -> Option<LockName> {
        LockName::parse(&self.prefix, name)
    }

    /// Hands a message to the factory. Does not block, but may wake tasks and start calls of this
    /// storage: hold no lock meanwhile.
    pub fn deliver(&self, message: Message) {
        (self.sink)(message);
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl AcquireReply {
    /// The lock is held by the request's token.
    pub fn granted() -> Self {
        Self::Granted {
            wanted: false,
            fencing: None,
        }
    }

    /// The same, and others stand in the lock's queue.
    pub fn granted_and_wanted() -> Self {
        Self::Granted {
            wanted: true,
            fencing: None,
        }
    }

    /// The same grant with these fencing tokens. A lock that is held by somebody else has none.
    #[must_use]
    pub fn with_fencing(mut self, block: Option<FencingBlock>) -> Self {
        if let Self::Granted { fencing, .. } = &mut self {
            *fencing = block;
        }
        self
    }

    /// The lock is held by somebody else, for another `ttl` if it is not renewed, where the storage
    /// knows.
    pub fn held(ttl: Option<Duration>) -> Self {
        Self::Held { ttl, queued: None }
    }

    /// The same, and the token stands in the lock's queue.
    pub fn queued(ttl: Option<Duration>, stamp: Stamp) -> Self {
        Self::Held {
            ttl,
            queued: Some(stamp),
        }
    }
}

/// What [`LockStorage::renew`] is asked, for one lock.
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

/// What became of a renewal.
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

/// What [`LockStorage::release`] is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReleaseRequest {
    /// The lock.
    pub name: LockName,
    /// Who holds it.
    pub token: OwnerToken,
    /// The ttl that the token asked for.
    pub ttl: Duration,
    /// Whether the lock was held, and nobody else is known to wait for it. A storage that has a
    /// cheap form for a lock without a queue tries it first then.
    pub unwanted: bool,
    /// Who wants a place at the end of the queue, once the lock has been given to its first. If the
    /// queue is empty, it gets none.
    pub requeue: Option<Requeue>,
    /// Whether those who asked to be [told](AcquireRequest::hint) are left to wait: what is released
    /// is but a part of the lock, of an attempt that did not get the whole. The token's own process
    /// waits on, too; a release that is not quiet ends its wait.
    pub quiet: bool,
}

/// Who wants a place in the queue of a lock that is released.
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

/// What became of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReleaseReply {
    /// The lock was held by the request's token and is free now, or the first in the queue has it.
    Released,
    /// The first in the queue has the lock, and the token to requeue stands at the end.
    Requeued {
        /// How long the new holder's lock lasts, if it is not renewed.
        ttl: Duration,
        /// When.
        stamp: Stamp,
    },
    /// The lock was free or held by somebody else. Nothing was changed.
    NotOurs,
}

/// What [`LockStorage::raise`] is asked.
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

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RaiseReply {
    /// The lock is held by the request's token, and all fencing tokens from now on are greater.
    Raised,
    /// The lock is free or held by somebody else. Nothing was changed.
    NotOurs,
}

/// Who owns a lock: an id of the factory that took it, 128 random bits, and a number that is new
/// for every attempt.
///
/// Whoever knows a token can free its lock, so `Debug` shows the number alone;
/// [`OwnerToken::to_text`] is what a storage writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerToken {
    factory: u128,
    number: u64,
}

impl OwnerToken {
    pub(crate) fn new(factory: u128, number: u64) -> Self {
        Self { factory, number }
    }

    /// The token as a storage keeps it: 32 hex digits, `:`, a decimal number.
    pub fn to_text(&self) -> String {
        self.text().iter().copied().map(char::from).collect()
    }

    /// The same without an allocation, and without the formatter: it is needed for every command.
    pub(crate) fn text(&self) -> TokenText {
        let mut bytes = [0; TokenText::LONGEST];
        let (factory, rest) = bytes.split_at_mut(32);
        let pairs = factory.as_chunks_mut().0;
        for (pair, byte) in pairs.iter_mut().zip(self.factory.to_be_bytes()) {
            *pair = HEX[usize::from(byte)];
        }
        rest[0] = b':';
        let digits = self.number.checked_ilog10().unwrap_or(0) as usize + 1;
        let mut left = self.number;
        for digit in rest[1..=digits].iter_mut().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
        }
        TokenText {
            bytes,
            length: 33 + digits,
        }
    }

    /// Reads what [`OwnerToken::to_text`] wrote.
    pub fn from_text(text: &str) -> Option<Self> {
        let (factory, number) = text.split_once(':')?;
        Some(Self {
            factory: u128::from_str_radix(factory, 16).ok()?,
            number: number.parse().ok()?,
        })
    }

    /// What tells it from all others of its factory.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Which [`Inbox`] messages for this owner go to.
    pub fn inbox(&self) -> u128 {
        self.factory
    }
}

/// Each byte in hex. Tokens are written for every call, so it is done two digits at a time.
const HEX: [[u8; 2]; 256] = {
    let digits = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [digits[byte >> 4], digits[byte & 15]];
        byte += 1;
    }
    pairs
};

/// An [`OwnerToken`] as text.
pub(crate) struct TokenText {
    bytes: [u8; Self::LONGEST],
    length: usize,
}

impl TokenText {
    /// The factory's number, a colon and the largest `u64`.
    const LONGEST: usize = 32 + 1 + 20;
}

impl Deref for TokenText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Debug for OwnerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerToken(..:{})", self.number)
    }
}

pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Reply<T> = Result<T, StorageError>;

/// For all who use it. Padded, because each call changes the count of references next to it, which
/// those on other cores would otherwise have to get anew together with the storage.
pub(crate) fn shared(storage: impl LockStorage) -> Arc<dyn DynStorage> {
    Arc::new(CachePadded::new(storage))
}

/// A [`LockStorage`] without its type. Its futures own what they need, so that a call whose caller
/// has gone can be followed to its end by another task.
pub(crate) trait DynStorage: Send + Sync + 'static {
    fn acquire(self: Arc<Self>, request: AcquireRequest) -> BoxFuture<Reply<AcquireReply>>;
    fn renew(self: Arc<Self>, requests: Vec<RenewRequest>) -> BoxFuture<Vec<Reply<RenewReply>>>;
    fn release(self: Arc<Self>, request: ReleaseRequest) -> BoxFuture<Reply<ReleaseReply>>;
    fn listen(self: Arc<Self>, inbox: Inbox) -> BoxFuture<()>;
    fn raise(self: Arc<Self>, request: RaiseRequest) -> BoxFuture<Reply<RaiseReply>>;
    fn survey(self: Arc<Self>, request: SurveyRequest) -> BoxFuture<Reply<Survey>>;
    fn look(self: Arc<Self>, name: LockName) -> BoxFuture<Reply<Option<LockRecord>>>;
    fn force_release(self: Arc<Self>, seen: LockRecord) -> BoxFuture<Reply<ReleaseReply>>;
    fn tell(
        self: Arc<Self>,
        prefix: Arc<str>,
        inbox: u128,
        text: Arc<str>,
    ) -> BoxFuture<Reply<bool>>;
    fn is_divided(&self) -> bool;
    fn settled(self: Arc<Self>) -> BoxFuture<()>;
}

impl<S: LockStorage> DynStorage for CachePadded<S> {
    fn acquire(self: Arc<Self>, request: AcquireRequest) -> BoxFuture<Reply<AcquireReply>> {
        Box::pin(async move { LockStorage::acquire(&**self, &request).await })
    }

    fn renew(self: Arc<Self>, requests: Vec<RenewRequest>) -> BoxFuture<Vec<Reply<RenewReply>>> {
        Box::pin(async move { LockStorage::renew(&**self, &requests).await })
    }

    fn release(self: Arc<Self>, request: ReleaseRequest) -> BoxFuture<Reply<ReleaseReply>> {
        Box::pin(async move { LockStorage::release(&**self, &request).await })
    }

    fn listen(self: Arc<Self>, inbox: Inbox) -> BoxFuture<()> {
        Box::pin(async move { LockStorage::listen(&**self, inbox).await })
    }

    fn raise(self: Arc<Self>, request: RaiseRequest) -> BoxFuture<Reply<RaiseReply>> {
        Box::pin(async move { LockStorage::raise(&**self, &request).await })
    }

    fn survey(self: Arc<Self>, request: SurveyRequest) -> BoxFuture<Reply<Survey>> {
        Box::pin(async move { LockStorage::survey(&**self, &request).await })
    }

    fn look(self: Arc<Self>, name: LockName) -> BoxFuture<Reply<Option<LockRecord>>> {
        Box::pin(async move { LockStorage::look(&**self, &name).await })
    }

    fn force_release(self: Arc<Self>, seen: LockRecord) -> BoxFuture<Reply<ReleaseReply>> {
        Box::pin(async move { LockStorage::force_release(&**self, &seen).await })
    }

    fn tell(
        self: Arc<Self>,
        prefix: Arc<str>,
        inbox: u128,
        text: Arc<str>,
    ) -> BoxFuture<Reply<bool>> {
        Box::pin(async move { LockStorage::tell(&**self, &prefix, inbox, &text).await })
    }

    fn is_divided(&self) -> bool {
        LockStorage::is_divided(&**self)
    }

    fn settled(self: Arc<Self>) -> BoxFuture<()> {
        Box::pin(async move { LockStorage::settled(&**self).await })
    }
}

#[cfg(test)]
mod tests {
    use super::FencingBlock;

    #[test]
    fn a_block_gives_each_of_its_tokens_once_and_in_order() {
        let mut block = FencingBlock { first: 7, count: 3 };
        let tokens = [(); 5].map(|()| block.take());
        assert_eq!(tokens, [Some(7), Some(8), Some(9), None, None]);
    }
}
