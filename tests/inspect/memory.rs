//! The same over a storage in memory, and over one that cannot be inspected.

use tower_distributed_lock::{
    LockFactory, LockKey, LockOptions, Unlocked,
    error::{LossReason, StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, LockName, LockOwner, LockRecord, LockStorage, MemoryStorage,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest,
    },
};

use super::{
    hold,
    kit::{LIMIT, eventually, within},
    label, labelled, labels, served, shown, wait_for, was_of,
};

#[tokio::test]
async fn locks_in_memory_are_shown_and_taken_away() {
    let storage = MemoryStorage::new();
    let [one, two, looking] =
        ["one", "two", "looking"].map(|label| labelled(storage.clone(), label));
    let first = hold(&one, "k").await;
    let second = wait_for(&two, "k");
    let info = shown(&looking, "it waits", "k", |info| info.waiters.len() == 1).await;
    assert_eq!(
        (label(&info.holder), &labels(&info)[..]),
        ("one", &["two"][..])
    );
    assert_eq!(info.waiters[0].callers, Some(1));
    assert_eq!(info.fencing_token, first.fencing_token());
    let snapshot = looking.inspector().locks(0).await.unwrap();
    assert!(snapshot.more && snapshot.locks.is_empty());

    let key = LockKey::new("k").unwrap();
    let taken = looking.inspector().force_release(&key, "r").await.unwrap();
    let taken = taken.unwrap();
    assert!(was_of(&taken.lock, "one") && taken.holder_told);
    assert_eq!(
        within(LIMIT, "it is told", first.lost()).await,
        LossReason::ForceReleased
    );
    let second = served(second).await;
    assert!(second.fencing_token() > first.fencing_token());
    drop(first);
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
    eventually("nothing is left", LIMIT, async || storage.is_empty()).await;
}

#[tokio::test]
async fn a_lock_that_lingers_is_held_by_nobody_in_particular() {
    let storage = MemoryStorage::new();
    let one = LockFactory::builder(storage).label("one").linger(LIMIT);
    let one = one.build().unwrap();
    let lock = one.create_lock("k").unwrap();
    let inspector = one.inspector();
    // Who does not listen yet keeps no lock that others may want.
    eventually("it lingers", LIMIT, async || {
        let guard = lock.lock(LockOptions::default()).await.unwrap();
        let _ = guard.unlock().await.unwrap();
        !inspector.locks(1).await.unwrap().locks.is_empty()
    })
    .await;
    let snapshot = inspector.locks(1).await.unwrap();
    let info = &snapshot.locks[0];
    assert_eq!(label(&info.holder), "one");
    assert_eq!((info.held_for, info.fencing_token), (None, None));
}

/// A storage of a user that does only what has to be done.
struct Plain(MemoryStorage);

impl LockStorage for Plain {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.0.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }
}

/// A storage that says whose a lock was a moment ago.
struct Stale(MemoryStorage);

impl LockStorage for Stale {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.0.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        let mut seen = self.0.look(name).await?.unwrap();
        let inbox = seen.owner.token().unwrap().inbox();
        seen.owner = LockOwner::from_value(format!("{inbox:032x}:999").as_bytes());
        Ok(Some(seen))
    }
}

#[tokio::test]
async fn what_a_process_says_of_another_grant_is_not_taken_for_this_one() {
    let one = labelled(Stale(MemoryStorage::new()), "one");
    let guard = hold(&one, "k").await;
    let key = LockKey::new("k").unwrap();
    let info = one.inspector().get(&key).await.unwrap().unwrap();
    assert_eq!(label(&info.holder), "one");
    assert_eq!((info.held_for, info.fencing_token), (None, None));
    // It has the lock by another grant, which is nobody's business here.
    assert_eq!(
        one.inspector().force_release(&key, "r").await.unwrap(),
        None
    );
    assert!(guard.is_held());
}

#[tokio::test]
async fn a_storage_that_cannot_be_inspected_says_so() {
    let one = labelled(Plain(MemoryStorage::new()), "one");
    let _guard = hold(&one, "k").await;
    let key = LockKey::new("k").unwrap();
    let inspector = one.inspector();
    let errors = [
        inspector.locks(1).await.unwrap_err(),
        inspector.get(&key).await.unwrap_err(),
        inspector.force_release(&key, "r").await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), StorageErrorKind::Rejected);
    }
}
