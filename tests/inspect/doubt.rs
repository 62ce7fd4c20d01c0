//! A lock that is taken away while messages are late, lost or out of order.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tower_distributed_lock::{
    Clock, LockFactory, LockKey, LockOptions, Unlocked,
    error::{ForceReleaseError, LossReason, StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockName, LockRecord, LockStorage, MemoryStorage,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest,
    },
};

use super::kit::ms;

/// Far more than any test takes, so that no renewal comes by chance.
const LONG: Duration = Duration::from_secs(3_600);

/// A storage in memory that is reached over a bad network.
#[derive(Clone)]
struct Far {
    memory: MemoryStorage,
    /// How long the answer to an acquire takes.
    grants_after: Duration,
    /// A forced release is done and not answered.
    force_hangs: Arc<AtomicBool>,
    /// How many more messages to others cannot be sent.
    deaf: Arc<AtomicUsize>,
    /// Messages to others are sent, and that is not answered for a while; the first is announced.
    slow_to_tell: Option<Arc<Notify>>,
}

impl Far {
    fn new(memory: &MemoryStorage) -> Self {
        Self {
            memory: memory.clone(),
            grants_after: Duration::ZERO,
            force_hangs: Arc::default(),
            deaf: Arc::default(),
            slow_to_tell: None,
        }
    }
}

impl LockStorage for Far {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let reply = self.memory.acquire(request).await;
        tokio::time::sleep(self.grants_after).await;
        reply
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.memory.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.memory.release(request).await
    }

    async fn listen(&self, inbox: Inbox) {
        self.memory.listen(inbox).await;
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.memory.look(name).await
    }

    async fn force_release(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        let reply = self.memory.force_release(seen).await;
        if self.force_hangs.load(SeqCst) {
            pending::<()>().await;
        }
        reply
    }

    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        let lose_one = |left: usize| left.checked_sub(1);
        if self.deaf.fetch_update(SeqCst, SeqCst, lose_one).is_ok() {
            return Err(StorageError::new(StorageErrorKind::Unavailable));
        }
        let told = self.memory.tell(prefix, inbox, text).await;
        if let Some(first) = &self.slow_to_tell {
            tokio::time::sleep(ms(1)).await;
            first.notify_one();
            tokio::time::sleep(ms(100)).await;
        }
        told
    }
}

fn memory() -> MemoryStorage {
    MemoryStorage::with_clock(Clock::tokio())
}

fn factory(storage: impl LockStorage) -> LockFactory {
    let builder = LockFactory::builder(storage).clock(Clock::tokio());
    builder.build().unwrap()
}

fn patient() -> LockOptions {
    let builder = LockOptions::builder().ttl(LONG);
    builder.interval(LONG).retries(10).build().unwrap()
}

fn key() -> LockKey {
    LockKey::new("k").unwrap()
}

/// Listening, and by then nothing is on its way.
async fn settled(factories: &[&LockFactory]) {
    for factory in factories {
        let lock = factory.create_lock("another").unwrap();
        drop(lock.lock(patient()).await.unwrap());
    }
    tokio::time::sleep(ms(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_is_told_also_if_it_is_open_whether_its_lock_was_taken_away() {
    let memory = memory();
    let far = Far::new(&memory);
    let (one, two, looking) = (
        factory(memory.clone()),
        factory(memory.clone()),
        factory(far.clone()),
    );
    settled(&[&one, &two, &looking]).await;
    let first = one.create_lock("k").unwrap().lock(patient()).await.unwrap();
    let second = tokio::spawn(two.create_lock("k").unwrap().lock(patient()));
    tokio::time::sleep(ms(1)).await;
    far.force_hangs.store(true, SeqCst);
    let error = looking
        .inspector()
        .force_release(&key(), "r")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Timeout);
    let before = Instant::now();
    let second = second.await.unwrap().unwrap();
    assert_eq!(first.lost().await, LossReason::ForceReleased);
    assert!(before.elapsed() < ms(100), "{:?}", before.elapsed());
    assert!(second.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_taken_away_before_its_grant_arrives_is_not_entered() {
    let memory = memory();
    let slow = Far {
        grants_after: ms(500),
        ..Far::new(&memory)
    };
    let (one, two, looking) = (
        factory(slow),
        factory(memory.clone()),
        factory(memory.clone()),
    );
    settled(&[&one, &two, &looking]).await;
    let first = tokio::spawn(one.create_lock("k").unwrap().lock(patient()));
    tokio::time::sleep(ms(1)).await;
    let taken = looking.inspector().force_release(&key(), "r").await;
    assert!(taken.unwrap().unwrap().holder_told);
    let second = two.create_lock("k").unwrap().lock(patient()).await.unwrap();
    tokio::time::sleep(ms(2_000)).await;
    assert!(!first.is_finished(), "it has a lock that was taken away");
    let token = second.fencing_token();
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
    let first = first.await.unwrap().unwrap();
    assert!(first.fencing_token() > token);
    assert_eq!(first.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test(start_paused = true)]
async fn a_word_that_cannot_be_sent_is_sent_again() {
    let memory = memory();
    let far = Far::new(&memory);
    let (one, looking) = (factory(memory.clone()), factory(far.clone()));
    settled(&[&one, &looking]).await;
    let first = one.create_lock("k").unwrap().lock(patient()).await.unwrap();
    // The question, and the word twice.
    far.deaf.store(3, SeqCst);
    let taken = looking.inspector().force_release(&key(), "r").await;
    let taken = taken.unwrap().unwrap();
    assert!(!taken.lock.holder.answered && taken.holder_told);
    let told = tokio::time::timeout(ms(100), first.lost()).await;
    assert_eq!(told.unwrap(), LossReason::ForceReleased);

    // Nor for ever.
    let again = one.create_lock("k").unwrap().lock(patient()).await.unwrap();
    far.deaf.store(usize::MAX, SeqCst);
    let taken = looking.inspector().force_release(&key(), "r").await;
    assert!(!taken.unwrap().unwrap().holder_told);
    drop(again);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_came_meanwhile_keeps_its_lock() {
    let memory = memory();
    let asked = Arc::new(Notify::new());
    let slow = Far {
        slow_to_tell: Some(Arc::clone(&asked)),
        ..Far::new(&memory)
    };
    let (one, two, looking) = (
        factory(memory.clone()),
        factory(memory.clone()),
        factory(slow),
    );
    settled(&[&one, &two, &looking]).await;
    let first = one.create_lock("k").unwrap().lock(patient()).await.unwrap();
    let second = tokio::spawn(two.create_lock("k").unwrap().lock(patient()));
    tokio::time::sleep(ms(1)).await;
    let token = first.fencing_token().unwrap();
    let inspector = looking.inspector();
    let taking =
        tokio::spawn(async move { inspector.force_release_if(&key(), token, "it hangs").await });
    asked.notified().await;
    drop(first);
    let second = second.await.unwrap().unwrap();
    assert_eq!(taking.await.unwrap().unwrap(), None);
    assert!(
        tokio::time::timeout(ms(1_000), second.lost())
            .await
            .is_err()
    );

    let inspector = looking.inspector();
    let refused = inspector.force_release_if(&key(), token, "it hangs").await;
    assert!(matches!(refused, Err(ForceReleaseError::OtherHolder)));
    let token = second.fencing_token().unwrap();
    let taken = inspector.force_release_if(&key(), token, "it hangs").await;
    assert_eq!(taken.unwrap().unwrap().lock.fencing_token, Some(token));
    assert_eq!(second.lost().await, LossReason::ForceReleased);
}

#[tokio::test(start_paused = true)]
async fn a_caller_of_the_same_process_to_whom_the_lock_was_handed_keeps_it() {
    let memory = memory();
    let asked = Arc::new(Notify::new());
    let slow = Far {
        slow_to_tell: Some(Arc::clone(&asked)),
        ..Far::new(&memory)
    };
    let (one, two, looking) = (
        factory(memory.clone()),
        factory(memory.clone()),
        factory(slow),
    );
    settled(&[&one, &two, &looking]).await;
    // That somebody waited brings a lease with a fencing token for the next, too.
    let before = one.create_lock("k").unwrap().lock(patient()).await.unwrap();
    let first = tokio::spawn(one.create_lock("k").unwrap().lock(patient()));
    tokio::time::sleep(ms(1)).await;
    drop(before);
    let first = first.await.unwrap().unwrap();
    let next = tokio::spawn(one.create_lock("k").unwrap().lock(patient()));
    let other = tokio::spawn(two.create_lock("k").unwrap().lock(patient()));
    tokio::time::sleep(ms(1)).await;
    let token = first.fencing_token().unwrap();
    let inspector = looking.inspector();
    let taking =
        tokio::spawn(async move { inspector.force_release_if(&key(), token, "it hangs").await });
    asked.notified().await;
    drop(first);
    let next = next.await.unwrap().unwrap();
    assert!(next.fencing_token() > Some(token));
    let taken = taking.await.unwrap();
    assert!(
        matches!(taken, Err(ForceReleaseError::OtherHolder)),
        "{taken:?}"
    );
    assert!(next.is_held());
    other.abort();
}
