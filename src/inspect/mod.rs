//! Who holds which lock, for how long, and who waits: for the people on call, and for the page that
//! shows it to them.
//!
//! ```
//! use tower_distributed_lock::{LockFactory, LockOptions, storage::MemoryStorage};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let factory = LockFactory::builder(MemoryStorage::new())
//!     .label("shop-1")
//!     .build()?;
//! let guard = factory.create_lock("orders/42")?.lock(LockOptions::default()).await?;
//!
//! let snapshot = factory.inspector().locks(100).await?;
//! for lock in &snapshot.locks {
//!     println!("{} is held by {:?} for {:?}", lock.key, lock.holder.label, lock.held_for);
//! }
//! assert_eq!(snapshot.locks[0].key.as_str(), "orders/42");
//! assert_eq!(snapshot.locks[0].fencing_token, guard.fencing_token());
//! # drop(guard);
//! # Ok(())
//! # }
//! ```
//!
//! Any process with the same storage and prefix can look, also one that takes no locks itself: it
//! sees those of all. Give each a [label](crate::LockFactoryBuilder::label), such as its service and
//! replica: nothing is made up where there is none.
//!
//! # Where it comes from
//!
//! From the storage: which locks are held, for how much longer, and which processes stand in the
//! queue. From the processes themselves, which are asked at that moment: their labels, since when
//! the lock is held, its fencing token, and how many callers wait there. So a lock that nobody looks
//! at costs nothing for being visible.
//!
//! A process has 250 ms to answer. One that does not is listed with
//! [`answered`](Process::answered) `false`: it was killed, stands still, or cannot be reached, and
//! its locks will be free when their ttl is over. A lock that another client took, in another
//! language, has such a holder too.
//!
//! A snapshot is not of one instant: while it is made, locks come and go. What a process says of a
//! lock counts only if it still has it by the same grant.
//!
//! # Taking a lock away
//!
//! [`LockInspector::force_release`] frees a lock whoever has it, and the first in the queue gets it at
//! once. The process that had it is told at the same time to look for itself. It finds that the lock
//! is another's: its guard is [lost](crate::error::LossReason::ForceReleased), a request under the
//! layer is cancelled. Until then, for a round trip or two, there are two holders, and for up to a
//! third of the ttl, until the next renewal, if the word does not reach it
//! ([`holder_told`](ForceReleased::holder_told) `false`). What it has sent already is not undone. A
//! [fencing token](crate::LockGuard::fencing_token) is what stops its late writes, and
//! [`lock_delay`](crate::LockFactoryBuilder::lock_delay) does not. Each is logged by
//! `tracing` with the target `tower_distributed_lock::audit`, at the level `WARN`, with the fields
//! `key`, `reason`, `holder` (its label) and `fencing_token`, as far as they are known, and
//! `holder_told`, in the span of the caller.
//!
//! Between a snapshot and the decision of a human the lock may have gone on to the next holder.
//! [`LockInspector::force_release_if`] takes it from the one that was meant, or from nobody.
//!
//! # What it takes
//!
//! | storage | |
//! |---|---|
//! | [`MemoryStorage`](crate::storage::MemoryStorage) | all of it, for the factories of this process |
//! | Redis: one server, Sentinel, Cluster | all of it; the user needs `scan` too (`storage::redis` has the line). It goes through all keys of the database in small steps, for up to 2 s; what it has found until then is the answer, with [`more`](Snapshot::more) |
//! | [`Redlock`](crate::storage::Redlock) | a lock that a majority has; there is no queue, so waiters are in no order |
//! | `RedisStorage::from_pool` | it cannot hear answers, so only what the server knows, and what this process does. Nor can it be told that its lock was taken away: it finds out at its next renewal |
//! | your own | see [`LockStorage::survey`](crate::storage::LockStorage::survey) |
//!
//! Nothing here shows a token of ownership, or anything else by which a lock could be taken or freed.

mod snapshot;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use tokio::sync::oneshot;
use tracing::Instrument;

pub use self::snapshot::{ForceReleased, LockInfo, Process, Snapshot, Waiting};
use crate::{
    coordinator::{Account, Coordinator},
    error::{ForceReleaseError, StorageError, StorageErrorKind},
    key::{KeyPrefix, LockKey, LockName},
    storage::{LockRecord, ReleaseReply},
};

/// Looks at the locks of all processes, and takes locks away. Made by
/// [`LockFactory::inspector`](crate::LockFactory::inspector); see the
/// [module documentation](self).
///
/// Clones are cheap. Like a clone of its factory, it keeps it alive.
#[derive(Clone)]
pub struct LockInspector {
    coordinator: Arc<Coordinator>,
    prefix: KeyPrefix,
}

impl LockInspector {
    pub(crate) fn new(coordinator: Arc<Coordinator>, prefix: KeyPrefix) -> Self {
        Self {
            coordinator,
            prefix,
        }
    }

    /// The locks that are held under the factory's prefix, by whichever process, in the order of
    /// their keys. If there are more than `limit`, it is open which of them these are.
    ///
    /// Takes up to 250 ms if a process does not answer, and as long as the storage needs.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the storage cannot be asked, or cannot list its locks.
    ///
    /// # Cancel safety
    ///
    /// It changes nothing, and can be dropped at any time.
    pub async fn locks(&self, limit: usize) -> Result<Snapshot, StorageError> {
        let survey = self.coordinator.survey(limit).await?;
        let more = survey.more || survey.locks.len() > limit;
        let mut records = survey.locks;
        records.truncate(limit);
        let mut locks = self.ask_about(records).await;
        locks.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(Snapshot { locks, more })
    }

    /// One lock. `None` if nobody holds it.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the storage cannot be asked, or cannot tell.
    ///
    /// # Cancel safety
    ///
    /// It changes nothing, and can be dropped at any time.
    pub async fn get(&self, key: &LockKey) -> Result<Option<LockInfo>, StorageError> {
        match self.coordinator.look_at(&self.prefix.name(key)).await? {
            Some(record) => Ok(self.ask_about(vec![record]).await.pop()),
            None => Ok(None),
        }
    }

    /// Takes a lock from whoever holds it. `None` if nobody held it, or if it was given back at that
    /// moment; then nothing was done.
    ///
    /// The first in the queue has it at once. The old holder is told, and nothing that it does with
    /// the lock afterwards, late or not, touches the next one's; see the [module
    /// documentation](self#taking-a-lock-away) for what it may still do. `reason` is for those who
    /// read the logs.
    ///
    /// Takes up to 250 ms if a process does not answer, and as long as the storage needs.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the storage cannot be asked, or cannot do it. As with every call, one that
    /// is [transient](crate::error::StorageErrorKind::is_transient) leaves open whether it was done;
    /// the holder is told to look all the same.
    ///
    /// # Cancel safety
    ///
    /// Once it is begun it is carried through and logged, also if this future is dropped.
    pub async fn force_release(
        &self,
        key: &LockKey,
        reason: &str,
    ) -> Result<Option<ForceReleased>, StorageError> {
        match self.begin_force_release(key, None, reason).await? {
            Taking::Done(released) => Ok(Some(released)),
            Taking::NotHeld | Taking::OtherHolder => Ok(None),
        }
    }

    /// The same, if the holder is the one with this [fencing token](LockInfo::fencing_token): for
    /// whoever decided it by a [snapshot](Self::locks) that is some seconds old.
    ///
    /// What is compared is what is released: a holder that comes to the lock meanwhile by a grant of
    /// its own keeps it. Where callers of one process hand the lock on among themselves, without the
    /// storage, the last look is a round trip before the release, and a hand-over within that time
    /// goes unseen. A holder that cannot say its token any more, because its process stands still or
    /// is a client of another kind, is taken for the one that was meant.
    ///
    /// # Errors
    ///
    /// [`ForceReleaseError::OtherHolder`] if the lock has another holder by now; nothing was done.
    /// [`ForceReleaseError::Storage`] as for [`force_release`](Self::force_release).
    ///
    /// # Cancel safety
    ///
    /// That of [`force_release`](Self::force_release).
    pub async fn force_release_if(
        &self,
        key: &LockKey,
        fencing_token: u64,
        reason: &str,
    ) -> Result<Option<ForceReleased>, ForceReleaseError> {
        let meant = Some(fencing_token);
        match self.begin_force_release(key, meant, reason).await? {
            Taking::Done(released) => Ok(Some(released)),
            Taking::NotHeld => Ok(None),
            Taking::OtherHolder => Err(ForceReleaseError::OtherHolder),
        }
    }

    async fn begin_force_release(
        &self,
        key: &LockKey,
        meant: Option<u64>,
        reason: &str,
    ) -> Result<Taking, StorageError> {
        let (done, result) = oneshot::channel();
        let (this, key, reason) = (self.clone(), key.clone(), reason.to_owned());
        let job = async move {
            // Nobody listens if the caller has gone.
            let _ = done.send(this.force_release_now(&key, meant, &reason).await);
        };
        // Whoever reads the log may want to know in whose request it was.
        let job = job.in_current_span();
        self.coordinator.carry_through(Box::pin(job));
        // An error: the runtime that was to carry it out has ended.
        let gone = |_| Err(StorageError::new(StorageErrorKind::Unavailable));
        result.await.unwrap_or_else(gone)
    }

    async fn force_release_now(
        &self,
        key: &LockKey,
        meant: Option<u64>,
        reason: &str,
    ) -> Result<Taking, StorageError> {
        let name = self.prefix.name(key);
        let Some(record) = self.coordinator.look_at(&name).await? else {
            return Ok(Taking::NotHeld);
        };
        let Some(mut lock) = self.ask_about(vec![record.clone()]).await.pop() else {
            return Ok(Taking::NotHeld);
        };
        if meant.is_some() && lock.holder.answered && !record.queue.is_empty() {
            // While others took their time to answer, it may have been handed on there.
            let mut alone = record.clone();
            alone.queue.clear();
            let again = self.ask_about(vec![alone]).await.pop();
            if let Some(again) = again.filter(|again| again.holder.answered) {
                (lock.held_for, lock.fencing_token) = (again.held_for, again.fencing_token);
            }
        }
        if let (Some(meant), Some(present)) = (meant, lock.fencing_token)
            && meant != present
        {
            return Ok(Taking::OtherHolder);
        }
        let (released, holder_told) = self.coordinator.force_release(record).await;
        let log = |outcome: &str| {
            tracing::warn!(
                target: "tower_distributed_lock::audit",
                key = name.key(),
                reason,
                holder = lock.holder.label.as_deref(),
                fencing_token = lock.fencing_token,
                holder_told,
                "{outcome}"
            );
        };
        match released {
            Ok(ReleaseReply::NotOurs) => Ok(Taking::NotHeld),
            Ok(_) => {
                log("lock released by force");
                Ok(Taking::Done(ForceReleased { lock, holder_told }))
            }
            Err(error) => {
                if error.kind().is_transient() {
                    log("lock perhaps released by force: the storage did not answer");
                }
                Err(error)
            }
        }
    }

    /// Asks the processes that have to do with these locks, each once.
    async fn ask_about(&self, records: Vec<LockRecord>) -> Vec<LockInfo> {
        let mut about = HashMap::<u128, Vec<LockName>>::new();
        for record in &records {
            let owner = record.owner.token().map(|token| token.inbox());
            let mut known = HashSet::from([self.coordinator.id()]);
            for inbox in owner.iter().chain(&record.queue) {
                if known.insert(*inbox) {
                    about.entry(*inbox).or_default().push(record.name.clone());
                }
            }
        }
        let mut accounts = self.coordinator.ask(about).await;
        let this = self.coordinator.id();
        let label = self.coordinator.label().cloned();
        let known = records.iter().map(|record| &record.name);
        let details = known.map(|name| (name.clone(), self.coordinator.describe(name)));
        let details = details.collect();
        accounts.insert(this, Account { label, details });
        let info = |record| self.info(record, &accounts);
        records.iter().map(info).collect()
    }

    fn info(&self, record: &LockRecord, accounts: &HashMap<u128, Account>) -> LockInfo {
        let this = self.coordinator.id();
        let process = |inbox: u128| match accounts.get(&inbox) {
            Some(account) if inbox == this => Process::this(account.label.as_ref()),
            Some(account) => Process::answering(account.label.as_ref()),
            None => Process::silent(),
        };
        let detail = |inbox: u128| accounts.get(&inbox)?.details.get(&record.name);
        let waiting = |inbox: u128| Waiting {
            process: process(inbox),
            callers: detail(inbox).map(|detail| detail.callers),
        };

        let token = record.owner.token();
        let holder = token.map(|token| token.inbox());
        let said = holder.and_then(detail);
        // By another grant it may be another's by now.
        let of_this_grant = said.filter(|said| said.lease == token.map(|token| token.number()));
        let mut waiters = Vec::new();
        let mut listed = HashSet::new();
        if let Some(holder) = holder
            && said.is_some_and(|said| said.callers > 0)
        {
            listed.insert(holder);
            waiters.push(waiting(holder));
        }
        let queue = record.queue.iter().filter(|inbox| listed.insert(**inbox));
        waiters.extend(queue.map(|inbox| waiting(*inbox)));
        // They may poll instead of standing in a queue.
        if detail(this).is_some_and(|detail| detail.callers > 0) && listed.insert(this) {
            waiters.push(waiting(this));
        }
        LockInfo {
            key: record.name.to_key(),
            holder: holder.map_or_else(Process::silent, process),
            ttl: record.ttl,
            held_for: of_this_grant.and_then(|said| said.held_for),
            fencing_token: of_this_grant.and_then(|said| said.fencing),
            waiters,
        }
    }
}

/// How an attempt to take a lock away ended.
enum Taking {
    NotHeld,
    OtherHolder,
    Done(ForceReleased),
}

impl fmt::Debug for LockInspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockInspector")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}
