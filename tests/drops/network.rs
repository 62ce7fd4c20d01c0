//! A storage in memory behind a network: each call takes its time to arrive and to be answered, and
//! both are points at which a caller can be dropped.

use std::{
    collections::HashMap,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tower_distributed_lock::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockName, LockRecord, LockStorage, MemoryStorage,
        RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest, RenewReply, RenewRequest,
    },
};

use super::{Fate, Plan, Points, ms};

/// From here to the server, and from there to here.
const WAY: Duration = ms(1);

/// For how long an outage goes on after the drop.
pub const OUTAGE: Duration = ms(300);

/// What all servers of one run have in common.
pub struct Fates {
    points: Arc<Points>,
    plan: Option<Plan>,
    dropped_at: watch::Sender<Option<Instant>>,
    calls: AtomicUsize,
}

impl Fates {
    pub fn new(points: Arc<Points>, plan: Option<Plan>) -> Arc<Self> {
        Arc::new(Self {
            points,
            plan,
            dropped_at: watch::Sender::new(None),
            calls: AtomicUsize::new(0),
        })
    }

    /// The caller has just been dropped.
    pub fn strike(&self) {
        self.dropped_at.send_replace(Some(Instant::now()));
    }

    pub fn dropped(&self) -> watch::Receiver<Option<Instant>> {
        self.dropped_at.subscribe()
    }

    /// What becomes of a call now.
    fn of(&self, node: usize, is_hit: bool) -> Fate {
        let (Some(plan), Some(at)) = (&self.plan, *self.dropped_at.borrow()) else {
            return Fate::Through;
        };
        match is_hit || plan.outage && at.elapsed() < OUTAGE {
            true => plan.fates[node],
            false => Fate::Through,
        }
    }
}

/// The way to one server. Clones are the same way.
#[derive(Clone)]
pub struct Network {
    node: usize,
    memory: MemoryStorage,
    fates: Arc<Fates>,
    /// Whether messages of the server arrive.
    listens: bool,
    names: Arc<Mutex<HashMap<String, LockName>>>,
}

impl Network {
    pub fn new(node: usize, memory: MemoryStorage, fates: Arc<Fates>, listens: bool) -> Self {
        Self {
            node,
            memory,
            fates,
            listens,
            names: Arc::default(),
        }
    }

    /// How many processes stand in the queue of a lock that is held, if it was ever asked for here.
    pub async fn queued(&self, key: &str) -> usize {
        let Some(name) = self.names.lock().unwrap().get(key).cloned() else {
            return 0;
        };
        let record = self.memory.look(&name).await.unwrap();
        record.map_or(0, |record| record.queue.len())
    }

    async fn call<T>(
        &self,
        what: &str,
        name: Option<&LockName>,
        execute: impl Future<Output = T>,
    ) -> Result<T, StorageError> {
        if let Some(name) = name {
            let mut names = self.names.lock().unwrap();
            names.insert(name.key().to_owned(), name.clone());
        }
        let number = self.fates.calls.fetch_add(1, SeqCst);
        let mut is_hit = self.fates.dropped_at.borrow().is_none();
        is_hit |= self
            .goes(|| format!("call {number}, {what} at {}, arrives", self.node))
            .await;
        let sent = self.fates.of(self.node, is_hit);
        match sent {
            Fate::NotSent => pending().await,
            Fate::NotSentFails => return Err(StorageError::new(StorageErrorKind::Unavailable)),
            _ => {}
        }
        let reply = execute.await;
        is_hit |= self
            .goes(|| format!("call {number}, {what} at {}, is answered", self.node))
            .await;
        let answered = self.fates.of(self.node, is_hit);
        if [sent, answered].contains(&Fate::ReplyLost) {
            pending().await
        }
        if [sent, answered].contains(&Fate::ReplyFails) {
            return Err(StorageError::new(StorageErrorKind::Unavailable));
        }
        Ok(reply)
    }

    /// Whether this is the point at which the caller was dropped.
    async fn goes(&self, point: impl FnOnce() -> String) -> bool {
        sleep(WAY).await;
        let stopped = self.fates.points.pass(point);
        if stopped {
            // It stands still until the caller is gone.
            let mut dropped = self.fates.dropped();
            let _ = dropped.wait_for(Option::is_some).await;
        }
        stopped
    }
}

impl LockStorage for Network {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let execute = async { self.memory.acquire(request).await };
        self.call("acquire", Some(&request.name), execute).await?
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let execute = async { self.memory.renew(requests).await };
        let replies = self.call("renew", None, execute).await;
        replies.unwrap_or_else(|error| vec![Err(error); requests.len()])
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let execute = async { self.memory.release(request).await };
        self.call("release", Some(&request.name), execute).await?
    }

    async fn listen(&self, inbox: Inbox) {
        if self.listens {
            self.memory.listen(inbox).await;
        }
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        let execute = async { self.memory.raise(request).await };
        self.call("raise", Some(&request.name), execute).await?
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.memory.look(name).await
    }

    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        self.memory.tell(prefix, inbox, text).await
    }
}
