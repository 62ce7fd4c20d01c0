//! What a storage says without being asked.

use std::{fmt, sync::Arc, time::Duration};

use super::{FencingBlock, OwnerToken};
use crate::key::LockName;

/// A moment on the storage's own clock, as a [grant](PushedGrant) or a [place in a queue](super::AcquireReply::Held) has it.
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
    /// A lock, or a part of it, was released, and we had [asked](super::AcquireRequest::hint) to be
    /// told. It is free for whoever asks first.
    Free(LockName),
    /// Another factory has something to say: the text that it gave to
    /// [`LockStorage::tell`](super::LockStorage::tell), as it is.
    Told(String),
}

impl Message {
    /// The longest text that one factory [tells](super::LockStorage::tell) another, in bytes.
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
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::storage::{Inbox, Message, OwnerToken, PushedGrant, Stamp};
    ///
    /// /// `None`: what has come is not for this inbox.
    /// fn hear(inbox: &Inbox, name: &str, token: &str, ttl: Duration, stamp: Stamp) -> Option<()> {
    ///     let token = OwnerToken::from_text(token)?;
    ///     let mut grant = PushedGrant::new(inbox.name(name)?, token, ttl, stamp);
    ///     grant.wanted = true;
    ///     inbox.deliver(Message::Granted(grant));
    ///     Some(())
    /// }
    /// ```
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

/// Where the messages for one factory are delivered. See
/// [`LockStorage::listen`](super::LockStorage::listen).
#[derive(Clone)]
pub struct Inbox {
    id: u128,
    prefix: Arc<str>,
    sink: Arc<dyn Fn(Message) + Send + Sync>,
}

impl Inbox {
    /// An inbox whose messages go to `sink`: for a storage that stands between a factory and another
    /// storage, such as a server that keeps locks for others, and for tests.
    ///
    /// ```
    /// use std::sync::mpsc;
    /// use tower_distributed_lock::storage::{Inbox, Message};
    ///
    /// let (sink, messages) = mpsc::channel();
    /// let inbox = Inbox::new(7, "shop".into(), move |message| drop(sink.send(message)));
    ///
    /// let name = inbox.name("shop:orders/42").ok_or("a lock of another factory")?;
    /// inbox.deliver(Message::Free(name));
    /// assert!(matches!(messages.recv()?, Message::Free(name) if name.key() == "orders/42"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(id: u128, prefix: Arc<str>, sink: impl Fn(Message) + Send + Sync + 'static) -> Self {
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

    /// What the names of the factory's locks begin with: its
    /// [`key_prefix`](crate::LockFactoryBuilder::key_prefix).
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A lock's name, as it came in a message. `None` if it is not one of the factory's. [`LockName`]
    /// has an example.
    pub fn name(&self, name: &str) -> Option<LockName> {
        LockName::parse(&self.prefix, name)
    }

    /// Hands a message to the factory, such as a [grant](PushedGrant::new). Does not block, but may wake
    /// tasks and start calls of this storage: hold no lock meanwhile.
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
