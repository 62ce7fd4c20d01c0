//! What anybody may publish to a factory's channel, while it holds a lock and has a caller that waits
//! for another: it may be told wrong, but nothing panics, and in the end nothing is left.
#![no_main]

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use tokio::time::timeout;
use tower_distributed_lock::{
    Clock, LockFactory, LockOptions,
    error::StorageError,
    fuzzing,
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockStorage, MemoryStorage, ReleaseReply,
        ReleaseRequest, RenewReply, RenewRequest,
    },
};

/// Stands in the messages for the inbox's own number.
const INBOX: &str = "ABCDEF";

/// A storage that lets others into its inbox.
struct Open {
    storage: MemoryStorage,
    inbox: Arc<OnceLock<Inbox>>,
}

impl LockStorage for Open {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.storage.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.storage.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.storage.release(request).await
    }

    async fn listen(&self, inbox: Inbox) {
        let _ = self.inbox.set(inbox.clone());
        self.storage.listen(inbox).await;
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(hear(text));
});

async fn hear(text: &str) {
    let storage = MemoryStorage::with_clock(Clock::tokio());
    let inbox = Arc::new(OnceLock::new());
    let others = LockFactory::builder(storage.clone())
        .key_prefix("p")
        .clock(Clock::tokio());
    let others = others.build().expect("settings");
    let open = Open {
        storage,
        inbox: Arc::clone(&inbox),
    };
    let factory = LockFactory::builder(open)
        .key_prefix("p")
        .clock(Clock::tokio());
    let factory = factory.build().expect("settings");

    let lock = |factory: &LockFactory, key| {
        let lock = factory.create_lock(key).expect("a key");
        lock.lock(LockOptions::default())
    };
    let theirs = lock(&others, "b").await.expect("free");
    let ours = lock(&factory, "a").await.expect("free");
    let waits = lock(&factory, "b");
    let waiting = tokio::spawn(async move { drop(waits.await) });
    tokio::task::yield_now().await;
    let inbox = inbox.get().expect("it listens");
    let id = format!("{:032x}", inbox.id());
    for (number, line) in text.lines().enumerate() {
        let run = (number % 2 == 1).then_some(number as u128);
        if let Some(message) = fuzzing::message(&line.replace(INBOX, &id), inbox.id(), run) {
            inbox.deliver(message);
        }
        if number % 3 == 2 {
            tokio::task::yield_now().await;
        }
    }
    drop(ours);
    drop(theirs);
    waiting.await.expect("no panic");
    // What was made up is forgotten, and all can be had by others.
    assert_eq!(
        factory.drain(Duration::from_secs(1)).await,
        0,
        "something is left"
    );
    for key in ["a", "b"] {
        let taken = timeout(Duration::from_secs(60), lock(&others, key)).await;
        drop(taken.expect("in time").expect("free"));
    }
}
