//! Locks of one process, in memory.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::mpsc::{self, UnboundedSender};

use crate::{
    clock::{Clock, Timestamp},
    error::StorageError,
    key::LockName,
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockRecord, LockStorage, Message,
        OwnerToken, PushedGrant, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest, Stamp, Survey, SurveyRequest,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Locks kept in this process's memory.
///
/// For trying the crate out, for tests, and for a service that runs as a single replica. Clones
/// share their locks, so two [`LockFactory`](crate::LockFactory)s over clones of one
/// `MemoryStorage` exclude each other as two replicas over one Redis do, and are served in order.
/// Fencing tokens count on from the system's time in microseconds, so they grow from one run of the
/// process to the next.
///
/// ```
/// use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let storage = MemoryStorage::new();
/// // As two replicas.
/// let (one, two) = (LockFactory::new(storage.clone()), LockFactory::new(storage.clone()));
///
/// let guard = one.create_lock("report")?.lock(LockOptions::default()).await?;
/// assert!(two.create_lock("report")?.try_lock(LockOptions::default()).await.is_err());
/// assert_eq!(storage.len(), 1);
/// # drop(guard);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct MemoryStorage {
    clock: Clock,
    locks: Arc<Mutex<Locks>>,
}

struct Locks {
    locks: HashMap<LockName, Lock>,
    /// Who listens, by inbox.
    inboxes: HashMap<u128, UnboundedSender<Message>>,
    /// Locks that nobody has any more are thrown out when there are this many.
    sweep_at: usize,
    /// The last fencing token that was given.
    fencing: u64,
}

#[derive(Default)]
struct Lock {
    owner: Option<Owner>,
    queue: VecDeque<Place>,
    hints: Vec<Hint>,
}

#[derive(Clone, Copy)]
struct Owner {
    token: OwnerToken,
    until: Timestamp,
}

/// A token that waits for a lock.
#[derive(Clone, Copy)]
struct Place {
    token: OwnerToken,
    ttl: Duration,
    fencing: u32,
    /// Whoever has not come to ask until then has gone.
    until: Timestamp,
}

/// A process that wants to hear that a lock is free.
#[derive(Clone, Copy)]
struct Hint {
    inbox: u128,
    until: Timestamp,
}

impl MemoryStorage {
    /// A storage with no locks, on the system's clock. A factory with
    /// [another clock](Self::with_clock) has to have a storage with that clock.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage with no locks, whose locks expire by `clock`. [`Clock`] has an example.
    pub fn with_clock(clock: Clock) -> Self {
        Self {
            clock,
            locks: Arc::default(),
        }
    }

    /// How many locks are held, by whichever factory.
    ///
    /// ```
    /// # use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let storage = MemoryStorage::new();
    /// let factory = LockFactory::new(storage.clone());
    ///
    /// let guard = factory.create_lock("report")?.lock(LockOptions::default()).await?;
    /// assert_eq!(storage.len(), 1);
    /// drop(guard);
    /// assert!(storage.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub fn len(&self) -> usize {
        let now = self.clock.now();
        let locks = self.locks();
        let held = locks
            .locks
            .values()
            .filter(|lock| lock.owner(now).is_some());
        held.count()
    }

    /// Whether no lock is held: [`len`](Self::len) is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Removes every lock and every queue, whoever holds it: what a flushed or restarted Redis
    /// does. Fencing tokens go on. Holders learn of it at their next renewal, waiters when they ask
    /// again.
    ///
    /// ```
    /// use tower_distributed_lock::{
    ///     Clock, LockFactory, LockOptions, error::LossReason, storage::MemoryStorage,
    /// };
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // In a test with paused time the renewal is there at once.
    /// let clock = Clock::tokio();
    /// let storage = MemoryStorage::with_clock(clock);
    /// let factory = LockFactory::builder(storage.clone()).clock(clock).build()?;
    /// let guard = factory.create_lock("report")?.lock(LockOptions::default()).await?;
    ///
    /// storage.clear();
    /// assert_eq!(guard.lost().await, LossReason::NotOurs);
    /// # Ok(())
    /// # }
    /// ```
    pub fn clear(&self) {
        self.locks().locks.clear();
    }

    /// What a restart without memory does, if the clock shows `time`.
    #[cfg(test)]
    pub(crate) fn restart(&self, time: u64) {
        let mut locks = self.locks();
        locks.locks.clear();
        locks.fencing = time;
    }

    fn locks(&self) -> MutexGuard<'_, Locks> {
        // Nothing below panics while it holds the lock with the map half changed.
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire_now(&self, request: &AcquireRequest) -> AcquireReply {
        let now = self.clock.now();
        let mut locks = self.locks();
        if !request.repeated
            && let Entry::Vacant(free) = locks.locks.entry(request.name.clone())
        {
            free.insert(Lock::owned(request, now));
            let fencing = locks.fencing(request.fencing);
            locks.sweep(now);
            return AcquireReply::granted().with_fencing(fencing);
        }
        if request.repeated && !locks.knows(&request.name, request.token, now) {
            return AcquireReply::Unknown;
        }
        let owner = match locks
            .locks
            .get(&request.name)
            .and_then(|lock| lock.owner(now))
        {
            None => locks.pass_on(&request.name, Some(request.token), now),
            owner => owner,
        };
        if let Some(owner) = owner
            && owner.token != request.token
        {
            let ttl = Some(owner.until.since(now));
            locks.tell(owner.token.inbox(), Message::Wanted(request.name.clone()));
            if let Some(place) = request.hint {
                locks.hint(&request.name, request.token.inbox(), now + place);
            }
            let Some(place) = request.queue else {
                return AcquireReply::held(ttl);
            };
            let until = now + place;
            let place = Place {
                token: request.token,
                ttl: request.ttl,
                fencing: request.fencing,
                until,
            };
            locks.stand(&request.name, place);
            return AcquireReply::queued(ttl, stamp(now));
        }
        locks.sweep(now);
        let fencing = locks.fencing(request.fencing);
        let lock = locks.locks.entry(request.name.clone()).or_default();
        lock.queue.retain(|place| place.token != request.token);
        lock.forget_hint(request.token.inbox());
        lock.owner = Some(Owner::of(request, now));
        let reply = if lock.has_no_waiters() {
            AcquireReply::granted()
        } else {
            AcquireReply::granted_and_wanted()
        };
        reply.with_fencing(fencing)
    }

    fn renew_now(&self, request: &RenewRequest) -> RenewReply {
        let now = self.clock.now();
        let mut locks = self.locks();
        let Some(lock) = locks.locks.get_mut(&request.name) else {
            return RenewReply::NotOurs;
        };
        match &mut lock.owner {
            Some(owner) if owner.until > now && owner.token == request.token => {
                owner.until = now + request.ttl;
            }
            _ => return RenewReply::NotOurs,
        }
        if lock.has_no_waiters() {
            RenewReply::Renewed
        } else {
            RenewReply::RenewedAndWanted
        }
    }

    fn release_now(&self, request: &ReleaseRequest) -> ReleaseReply {
        let now = self.clock.now();
        let mut locks = self.locks();
        let Entry::Occupied(mut known) = locks.locks.entry(request.name.clone()) else {
            return ReleaseReply::NotOurs;
        };
        let lock = known.get_mut();
        let owner = lock.owner(now);
        let ours = owner.is_some_and(|owner| owner.token == request.token);
        if !request.quiet {
            lock.forget_hint(request.token.inbox());
        }
        if !ours {
            lock.queue.retain(|place| place.token != request.token);
            if owner.is_none() && lock.has_no_waiters() {
                known.remove();
                locks.shrink();
            }
            return ReleaseReply::NotOurs;
        }
        lock.owner = None;
        if lock.has_no_waiters() {
            known.remove();
            locks.shrink();
            return ReleaseReply::Released;
        }
        if request.quiet {
            return ReleaseReply::Released;
        }
        for hint in std::mem::take(&mut lock.hints) {
            locks.tell(hint.inbox, Message::Free(request.name.clone()));
        }
        let next = locks.pass_on(&request.name, None, now);
        match (next, request.requeue) {
            (None, _) => {
                locks.locks.remove(&request.name);
                locks.shrink();
                ReleaseReply::Released
            }
            (Some(_), None) => ReleaseReply::Released,
            (Some(next), Some(requeue)) => {
                let until = now + requeue.place;
                let place = Place {
                    token: requeue.token,
                    ttl: requeue.ttl,
                    fencing: requeue.fencing,
                    until,
                };
                locks.stand(&request.name, place);
                locks.tell(next.token.inbox(), Message::Wanted(request.name.clone()));
                ReleaseReply::Requeued {
                    ttl: next.until.since(now),
                    stamp: stamp(now),
                }
            }
        }
    }
}

/// The clock of a storage in memory has one run: it ends with the storage.
fn stamp(now: Timestamp) -> Stamp {
    Stamp {
        run: Some(1),
        at: Duration::from_nanos(now.as_nanos()),
    }
}

impl Default for Locks {
    fn default() -> Self {
        // Whoever keeps the highest token it has seen may be older than this process.
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            locks: HashMap::new(),
            inboxes: HashMap::new(),
            sweep_at: 0,
            fencing: since_1970.map_or(0, |time| time.as_micros() as u64),
        }
    }
}

impl Owner {
    fn of(request: &AcquireRequest, now: Timestamp) -> Self {
        Self {
            token: request.token,
            until: now + request.ttl,
        }
    }
}

impl Lock {
    fn owned(request: &AcquireRequest, now: Timestamp) -> Self {
        Self {
            owner: Some(Owner::of(request, now)),
            ..Self::default()
        }
    }

    fn owner(&self, now: Timestamp) -> Option<Owner> {
        self.owner.filter(|owner| owner.until > now)
    }

    fn has_no_waiters(&self) -> bool {
        self.queue.is_empty() && self.hints.is_empty()
    }

    /// What is known of it, if somebody has it.
    fn record(&self, name: &LockName, now: Timestamp) -> Option<LockRecord> {
        let owner = self.owner(now)?;
        let ttl = Some(owner.until.since(now));
        let mut record = LockRecord::new(name.clone(), owner.token.into(), ttl);
        let places = self.queue.iter().filter(|place| place.until > now);
        let hints = self.hints.iter().filter(|hint| hint.until > now);
        let places = places.map(|place| place.token.inbox());
        record.queue = places.chain(hints.map(|hint| hint.inbox)).collect();
        Some(record)
    }

    fn forget_hint(&mut self, inbox: u128) {
        self.hints.retain(|hint| hint.inbox != inbox);
    }
}

impl Locks {
    /// Gives a free lock to the first in its queue that listens, and says who has it now. If
    /// `asking` comes first, nobody gets it: who asks takes it.
    fn pass_on(
        &mut self,
        name: &LockName,
        asking: Option<OwnerToken>,
        now: Timestamp,
    ) -> Option<Owner> {
        loop {
            let lock = self.locks.get_mut(name)?;
            let first = *lock.queue.front()?;
            if Some(first.token) == asking {
                return None;
            }
            lock.queue.pop_front();
            let listens = self.inboxes.contains_key(&first.token.inbox());
            if first.until <= now || !listens {
                continue;
            }
            let owner = Owner {
                token: first.token,
                until: now + first.ttl,
            };
            lock.owner = Some(owner);
            let wanted = !lock.queue.is_empty();
            let grant = PushedGrant {
                name: name.clone(),
                token: first.token,
                ttl: first.ttl,
                stamp: stamp(now),
                wanted,
                fencing: self.fencing(first.fencing),
            };
            self.tell(first.token.inbox(), Message::Granted(grant));
            return Some(owner);
        }
    }

    /// Whether a token has a lock or stands in its queue.
    fn knows(&self, name: &LockName, token: OwnerToken, now: Timestamp) -> bool {
        self.locks.get(name).is_some_and(|lock| {
            lock.owner(now).is_some_and(|owner| owner.token == token)
                || lock.queue.iter().any(|place| place.token == token)
        })
    }

    /// Gives a token a place at the end of the queue, if it has none yet.
    fn stand(&mut self, name: &LockName, new: Place) {
        let lock = self.locks.entry(name.clone()).or_default();
        match lock.queue.iter_mut().find(|place| place.token == new.token) {
            Some(place) => *place = new,
            None => lock.queue.push_back(new),
        }
    }

    /// Keeps in mind that a process wants to hear when the lock is free.
    fn hint(&mut self, name: &LockName, inbox: u128, until: Timestamp) {
        let lock = self.locks.entry(name.clone()).or_default();
        lock.forget_hint(inbox);
        lock.hints.push(Hint { inbox, until });
    }

    /// The next `count` fencing tokens.
    fn fencing(&mut self, count: u32) -> Option<FencingBlock> {
        let block = FencingBlock {
            first: self.fencing + 1,
            count,
        };
        self.fencing += u64::from(count);
        (count > 0).then_some(block)
    }

    fn tell(&self, inbox: u128, message: Message) {
        if let Some(inbox) = self.inboxes.get(&inbox) {
            // An inbox that has just been closed: its owner asks again.
            let _ = inbox.send(message);
        }
    }

    /// A lock was removed.
    fn shrink(&mut self) {
        // What a crowd needed is given back when it has gone.
        if self.locks.capacity() > 64 && self.locks.len() < self.locks.capacity() / 8 {
            self.sweep_at = self.locks.capacity() / 4;
            self.locks.shrink_to(self.sweep_at);
        }
    }

    fn sweep(&mut self, now: Timestamp) {
        // Locks that were never released would pile up. Sweeping when their number has doubled
        // costs a constant time per acquire.
        if self.locks.len() >= self.sweep_at {
            self.locks.retain(|_, lock| {
                lock.queue.retain(|place| place.until > now);
                lock.hints.retain(|hint| hint.until > now);
                lock.owner(now).is_some() || !lock.has_no_waiters()
            });
            self.sweep_at = (2 * self.locks.len()).max(64);
            self.locks.shrink_to(self.sweep_at);
        }
    }
}

impl LockStorage for MemoryStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Ok(self.acquire_now(request))
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        requests
            .iter()
            .map(|request| Ok(self.renew_now(request)))
            .collect()
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        Ok(self.release_now(request))
    }

    fn acquire_at_once(
        &self,
        request: &AcquireRequest,
    ) -> Option<Result<AcquireReply, StorageError>> {
        Some(Ok(self.acquire_now(request)))
    }

    fn release_at_once(
        &self,
        request: &ReleaseRequest,
    ) -> Option<Result<ReleaseReply, StorageError>> {
        Some(Ok(self.release_now(request)))
    }

    async fn listen(&self, inbox: Inbox) {
        let (sender, mut messages) = mpsc::unbounded_channel();
        self.locks().inboxes.insert(inbox.id(), sender);
        let _open = Open {
            storage: self,
            id: inbox.id(),
        };
        inbox.deliver(Message::Listening);
        while let Some(message) = messages.recv().await {
            inbox.deliver(message);
        }
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        let now = self.clock.now();
        let mut locks = self.locks();
        let lock = locks.locks.get(&request.name);
        let owner = lock.and_then(|lock| lock.owner(now));
        if owner.is_none_or(|owner| owner.token != request.token) {
            return Ok(RaiseReply::NotOurs);
        }
        locks.fencing = locks.fencing.max(request.above);
        Ok(RaiseReply::Raised)
    }

    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        let now = self.clock.now();
        let locks = self.locks();
        let ours = locks.locks.iter();
        let ours = ours.filter(|(name, _)| name.prefix() == &*request.prefix);
        let mut records = ours.filter_map(|(name, lock)| lock.record(name, now));
        let found = records.by_ref().take(request.limit).collect();
        Ok(Survey::new(found, records.next().is_some()))
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        let now = self.clock.now();
        let locks = self.locks();
        let lock = locks.locks.get(name);
        Ok(lock.and_then(|lock| lock.record(name, now)))
    }

    async fn tell(&self, _: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        let locks = self.locks();
        let listens = locks.inboxes.contains_key(&inbox);
        locks.tell(inbox, Message::Told(text.to_owned()));
        Ok(listens)
    }
}

/// An inbox that is listened to.
struct Open<'a> {
    storage: &'a MemoryStorage,
    id: u128,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.storage.locks().inboxes.remove(&self.id);
    }
}

impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStorage")
            .field("locks", &self.len())
            .finish_non_exhaustive()
    }
}
