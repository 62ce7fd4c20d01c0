//! [`LockFactory`]: one storage, and this process's side of its locks.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    clock::Clock,
    coordinator::{Coordinator, Limits, key_events::HandoffLimit, note::MAX_LABEL},
    error::{InvalidKey, InvalidSettings},
    inspect::LockInspector,
    key::{KeyPrefix, LockKey, LockKeys},
    lock::{Lock, LockSet},
    options::LockOptions,
    storage::{self, LockStorage},
};

/// Makes locks over one storage.
///
/// A service makes one factory at its start and shares it: clones are cheap and are the same
/// factory. All waiters of a factory that want the same key queue in this process, and only the
/// first of them talks to the storage.
///
/// Must be used inside a tokio runtime with its timers enabled. Locks are renewed by one background
/// task on the runtime of the first caller; if that runtime ends, the next caller's takes over.
///
/// ```
/// use tower_distributed_lock::{LockFactory, LockOptions, Unlocked, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let factory = LockFactory::new(MemoryStorage::new());
/// let lock = factory.create_lock("orders/42")?;
///
/// let guard = lock.lock(LockOptions::default()).await?;
/// // Nobody else is in here.
/// assert_eq!(guard.unlock().await?, Unlocked::Held);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LockFactory {
    coordinator: Arc<Coordinator>,
    prefix: KeyPrefix,
}

impl LockFactory {
    /// A factory with the default settings: see [`LockFactoryBuilder`].
    pub fn new(storage: impl LockStorage) -> Self {
        let builder = Self::builder(storage);
        builder.finish(KeyPrefix::default())
    }

    /// A factory with settings of your own: see [`LockFactoryBuilder`].
    pub fn builder<S: LockStorage>(storage: S) -> LockFactoryBuilder<S> {
        LockFactoryBuilder {
            storage,
            prefix: KeyPrefix::DEFAULT.into(),
            clock: Clock::system(),
            limits: Limits {
                handoff: HandoffLimit {
                    turns: 2_048,
                    time: Duration::from_millis(5),
                },
                waiters_per_key: 10_000,
                waiters: 100_000,
                storage_timeout: Duration::from_secs(1),
                fencing: true,
                linger: None,
                lock_delay: Duration::ZERO,
                label: None,
                metrics_name: None,
            },
        }
    }

    /// A handle on the lock of this key. Nothing is asked of the storage yet.
    ///
    /// `key` is a [`LockKey`], or text that becomes one; each may be borrowed.
    ///
    /// ```
    /// use tower_distributed_lock::{LockFactory, LockKey, storage::MemoryStorage};
    ///
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let report = factory.create_lock("reports/monthly")?;
    ///
    /// // With what a client sent, keep the parts apart.
    /// let key = LockKey::from_parts(["tenants", "a/b"])?;
    /// let tenant = factory.create_lock(&key)?;
    /// assert_eq!(tenant.key().as_str(), "tenants/a%2Fb");
    /// # Ok::<(), tower_distributed_lock::error::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if the text is empty or too long.
    pub fn create_lock<K>(&self, key: K) -> Result<Lock, InvalidKey>
    where
        K: TryInto<LockKey>,
        InvalidKey: From<K::Error>,
    {
        let key = key.try_into()?;
        Ok(self.lock_of(&key))
    }

    /// A handle on the locks of several keys, which are had all or none. Nothing is asked of the
    /// storage yet.
    ///
    /// The order of the keys does not matter, and a key that is named twice is one.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if a text is empty or too long, if there is no key, or if there are more than
    /// [`LockSet::MAX_LEN`].
    pub fn create_lock_set<K>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<LockSet, InvalidKey>
    where
        K: TryInto<LockKey>,
        InvalidKey: From<K::Error>,
    {
        let keys = LockKeys::new(keys)?;
        Ok(self.lock_set_of(&keys))
    }

    pub(crate) fn lock_of(&self, key: &LockKey) -> Lock {
        Lock {
            coordinator: Arc::clone(&self.coordinator),
            name: self.prefix.name(key),
        }
    }

    pub(crate) fn lock_set_of(&self, keys: &LockKeys) -> LockSet {
        LockSet::new(keys.iter().map(|key| self.lock_of(key)).collect())
    }

    /// Shows the locks of all processes with this storage and prefix, and takes locks away: see
    /// [`inspect`](crate::inspect).
    pub fn inspector(&self) -> LockInspector {
        LockInspector::new(Arc::clone(&self.coordinator), self.prefix.clone())
    }

    pub(crate) fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Shuts down: refuses new locks at once, lets the holders finish, and gives back what is held.
    ///
    /// Callers that wait get [`Draining`](crate::error::LockError::Draining). Holders have `grace`
    /// to finish; those that have not are told that they have lost their lock (a request under the
    /// layer is cancelled then) and have one more
    /// [`storage_timeout`](LockFactoryBuilder::storage_timeout) to give it back.
    ///
    /// Then servers of a [`Redlock`](crate::Redlock) that have not heard of a release have as long
    /// again to hear of it.
    ///
    /// Answers how many keys are still in use: 0 means that this process left nothing behind, but on
    /// such a server. A key that is still in use belongs to a holder that did not react, or could not
    /// be released because the storage is away; its ttl frees it.
    ///
    /// Call it after the server has stopped (`axum::serve(..).with_graceful_shutdown(..)`), before
    /// the runtime ends. Begun when the server is told to stop, and again then, it also ends the
    /// requests that wait or hang, for which the server would wait: see
    /// `examples/graceful_shutdown.rs`.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it leaves the factory closed.
    pub async fn drain(&self, grace: Duration) -> usize {
        self.coordinator.drain(grace).await
    }

    /// How many keys this factory has to do with now: held, lingering, waited for, or being
    /// released.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let report = factory.create_lock("report")?;
    ///
    /// let guard = report.lock(LockOptions::default()).await?;
    /// let waiter = tokio::spawn(report.lock(LockOptions::default()));
    /// tokio::task::yield_now().await;
    /// assert_eq!((factory.keys(), factory.waiters()), (1, 1));
    ///
    /// drop(guard);
    /// drop(waiter.await?);
    /// assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn keys(&self) -> usize {
        self.coordinator.keys()
    }

    /// How many callers wait for a lock of this factory now. [`keys`](Self::keys) has an example.
    pub fn waiters(&self) -> usize {
        self.coordinator.waiters()
    }
}

impl fmt::Debug for LockFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockFactory")
            .field("prefix", &self.prefix)
            .field("coordinator", &self.coordinator)
            .finish()
    }
}

/// Sets up a [`LockFactory`]; made by [`LockFactory::builder`].
///
/// ```
/// use std::time::Duration;
/// use tower_distributed_lock::{LockFactory, storage::MemoryStorage};
///
/// let factory = LockFactory::builder(MemoryStorage::new())
///     .key_prefix("shop")
///     .storage_timeout(Duration::from_millis(300))
///     .max_waiters_per_key(100)
///     .label("shop-1")
///     .build()?;
/// # Ok::<(), tower_distributed_lock::error::InvalidSettings>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct LockFactoryBuilder<S> {
    storage: S,
    prefix: String,
    clock: Clock,
    limits: Limits,
}

impl<S: LockStorage> LockFactoryBuilder<S> {
    /// What the names of the locks start with in the storage, before a `:`. Default
    /// `distributed-locks`; 1 to 64 ASCII letters, digits, `-`, `_`, `.` or `/`. All processes that
    /// exclude each other use the same.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let storage = MemoryStorage::new();
    /// let shop = LockFactory::builder(storage.clone()).key_prefix("shop").build()?;
    /// let bank = LockFactory::builder(storage).key_prefix("bank").build()?;
    ///
    /// let _guard = shop.create_lock("accounts/7")?.lock(LockOptions::default()).await?;
    /// // Another lock: `bank:accounts/7`.
    /// assert!(bank.create_lock("accounts/7")?.try_lock(LockOptions::default()).await.is_ok());
    /// # Ok(())
    /// # }
    /// ```
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// How long one call of the storage may take. Default 1 s; at most 24 h. A caller that gives up
    /// earlier does not wait for it. If it is more than a third of the
    /// [ttl](crate::LockOptionsBuilder::ttl), a renewal that hangs leaves no time for another.
    pub fn storage_timeout(mut self, timeout: Duration) -> Self {
        self.limits.storage_timeout = timeout;
        self
    }

    /// How many callers may wait for one key, the one that is asking for it included. Default
    /// 10,000. One more gets [`TooManyWaiters`](crate::error::LockError::TooManyWaiters).
    pub fn max_waiters_per_key(mut self, waiters: usize) -> Self {
        self.limits.waiters_per_key = waiters;
        self
    }

    /// How many callers may wait in all, those that are asking included. Default 100,000.
    ///
    /// ```
    /// use tower_distributed_lock::{
    ///     LockFactory, LockOptions,
    ///     error::{LockError, WaiterScope},
    ///     storage::MemoryStorage,
    /// };
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let factory = LockFactory::builder(MemoryStorage::new()).max_waiters(1).build()?;
    /// let report = factory.create_lock("report")?;
    /// let _guard = report.lock(LockOptions::default()).await?;
    /// let _waiter = tokio::spawn(report.lock(LockOptions::default()));
    /// tokio::task::yield_now().await;
    ///
    /// match factory.create_lock("import")?.lock(LockOptions::default()).await {
    ///     Err(LockError::TooManyWaiters(error)) => assert_eq!(error.scope, WaiterScope::Factory),
    ///     other => panic!("{other:?}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn max_waiters(mut self, waiters: usize) -> Self {
        self.limits.waiters = waiters;
        self
    }

    /// How much this process may do with a lock that another process waits for. Defaults 2,048 and
    /// 5 ms.
    ///
    /// A lock that is given back while others of this process wait for it goes to the next of them
    /// at once, without the storage. Once another process wants it too, this goes on for at most
    /// `turns` holders and only for `time`; then that process has it, and this one stands at the
    /// end of the queue. With a storage that cannot tell who waits (one that does not
    /// [listen](crate::storage::LockStorage::listen)), every lock is treated as if another process
    /// wanted it.
    pub fn handoff_limit(mut self, turns: u32, time: Duration) -> Self {
        self.limits.handoff = HandoffLimit { turns, time };
        self
    }

    /// Whether locks come with [fencing tokens](crate::LockGuard::fencing_token). Default `true`.
    ///
    /// They cost the storage a little for each lock that it grants, and the caller no wait: with
    /// Redis two more plain commands in the same write. With `false` a lock that is free costs one
    /// `SET`.
    pub fn fencing(mut self, fencing: bool) -> Self {
        self.limits.fencing = fencing;
        self
    }

    /// How long this process keeps a lock that has been given back and that nobody waits for, in
    /// case its next caller is one of this process: that one has it without asking the storage. 0:
    /// not at all. At most 24 h.
    ///
    /// Not set, only the layer keeps a lock for its next request, and only one that is hot: this
    /// process had asked for it again within 1 ms, before its last release was done. When the handler
    /// is done, it is kept for 1 ms more (as fine as tokio's timers are). Not so a lock that is given
    /// back in another way: by [`await_release`](crate::DistributedLockLayer::await_release), at the
    /// end of the body, early, or by a guard. Nor one in parts, as of a `Redlock`.
    ///
    /// Another process that wants the lock meanwhile waits for about two round trips: the storage
    /// tells this one, which gives the lock up at once. One that does not wait (`try_lock`) is
    /// refused the first time. Clients that take the lock without this crate cannot tell, and wait.
    ///
    /// Call [`LockFactory::drain`] at the end: it gives up what lingers. Without it, or after a
    /// crash, such a lock stays for up to its ttl. So it does while the runtime stands still in which
    /// the factory was used first. A lock that lingers counts among
    /// [`LockFactory::keys`] and is renewed every third of its ttl. Has no effect where the storage
    /// cannot tell who waits.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.limits.linger = Some(linger);
        self
    }

    /// For how long a lock that its holder lost stays locked: for resources that cannot
    /// [fence](crate::LockGuard::fencing_token). Default 0: not at all. At most 24 h.
    ///
    /// A holder that stood still, or was cut off, is told that its lock is over, and its handler is
    /// dropped; but a write that it has sent may still be on its way. The storage keeps the lock for
    /// ttl + `lock_delay` from the last renewal on, and the holder counts on the ttl alone, so nobody
    /// else enters in between. Make it longer than the longest time that a write can take, time-outs
    /// and queues of the resource included.
    ///
    /// A holder that is done gives the lock back at once, as ever, and so does a handler that is
    /// dropped half-way while it has its lock, by its client or a time-out. One that lost it leaves it
    /// to the delay, unless the storage says that it is gone already; so do those whom
    /// [`LockFactory::drain`] takes it from. After a crash a lock stays for ttl + `lock_delay`. All
    /// processes that exclude each other use the same.
    ///
    /// This is a wait, not a proof: a holder that stands still for longer than the delay, right before
    /// it writes, still writes late. (Consul has the same under the same name.)
    pub fn lock_delay(mut self, delay: Duration) -> Self {
        self.limits.lock_delay = delay;
        self
    }

    /// What this process is called where the locks of all processes are
    /// [looked at](crate::inspect), such as its service and replica: `shop-1`. Default: nothing. Any
    /// text of 1 to 128 bytes.
    ///
    /// It is not written into the storage; whoever asks is told.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.limits.label = Some(label.into().into());
        self
    }

    /// A name for this factory in metrics: the value of the label `factory` of all that it counts.
    /// Default: there is no such label. For a process with more than one factory.
    ///
    /// ```
    /// use tower_distributed_lock::{LockFactory, storage::MemoryStorage};
    ///
    /// let orders = LockFactory::builder(MemoryStorage::new()).metrics_name("orders").build()?;
    /// // distributed_lock_waiters{factory="orders"} 0
    /// # Ok::<(), tower_distributed_lock::error::InvalidSettings>(())
    /// ```
    #[cfg(feature = "metrics")]
    #[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
    pub fn metrics_name(mut self, name: impl Into<std::borrow::Cow<'static, str>>) -> Self {
        self.limits.metrics_name = Some(name.into());
        self
    }

    /// The clock that leases are measured on. Default [`Clock::system`]. A `MemoryStorage` under
    /// this factory has to have the same.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Makes the factory.
    ///
    /// # Errors
    ///
    /// [`InvalidSettings`] says which setting is out of its range.
    pub fn build(self) -> Result<LockFactory, InvalidSettings> {
        let prefix = KeyPrefix::new(&self.prefix)?;
        let timeout = self.limits.storage_timeout;
        if timeout.is_zero() || timeout > LockOptions::MAX_DURATION {
            return Err(InvalidSettings::StorageTimeout);
        }
        let linger = self.limits.linger;
        if linger.is_some_and(|linger| linger > LockOptions::MAX_DURATION) {
            return Err(InvalidSettings::Linger);
        }
        if self.limits.lock_delay > LockOptions::MAX_DURATION {
            return Err(InvalidSettings::LockDelay);
        }
        if self.limits.waiters == 0 || self.limits.waiters_per_key == 0 {
            return Err(InvalidSettings::MaxWaiters);
        }
        let label = self.limits.label.as_ref();
        if label.is_some_and(|label| !(1..=MAX_LABEL).contains(&label.len())) {
            return Err(InvalidSettings::Label);
        }
        Ok(self.finish(prefix))
    }

    fn finish(self, prefix: KeyPrefix) -> LockFactory {
        LockFactory {
            coordinator: Coordinator::new(
                storage::shared(self.storage),
                self.clock,
                self.limits,
                prefix.text(),
            ),
            prefix,
        }
    }
}
