//! The connection to a Redis server: one, shared by all commands, replaced when it is broken.
//!
//! Commands of many tasks go through one multiplexed connection, in the order in which they were
//! sent (`wire.rs`). bb8 has it made and replaced (`pool.rs`, `connector.rs`). It is asked for it only
//! when the present one is known to be dead; there is no PING and no checkout on a command's way.
//! `health.rs` says when it is dead.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    task::{Context, Poll, ready},
};

use arc_swap::ArcSwapOption;
use bb8_redis::bb8::{Pool, RunError};
use futures_util::future::BoxFuture;
use redis::Value;
use tokio::sync::{Notify, watch};

use super::{
    connector::Connector,
    durability::{Durability, Replicas},
    error::Failure,
    pool::{ConnectError, Failures, pool},
    sentinel::Master,
    wire::{Fact, Origin, Reply, Wire},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::AcquireRequest,
};

/// The connection, as commands use it.
pub(super) struct Connection {
    connector: Connector,
    pool: RwLock<Arc<Pool<Connector>>>,
    /// Not behind a lock, whose state all calls on all cores would change.
    present: ArcSwapOption<Wire>,
    taking_over: Mutex<()>,
    /// Which run of the server the present connection leads to, or led to if it is dead.
    run: watch::Sender<Option<u128>>,
    /// How often a server was left that another had replaced, or may have.
    replacements: AtomicU64,
    failures: Failures,
    /// `None`: a grant counts when the server has it.
    durability: Option<Durability>,
}

impl Connection {
    /// Does not connect yet.
    pub(super) fn new(connector: Connector, replicas: Option<Replicas>) -> Self {
        let failures = Failures::default();
        Self {
            durability: replicas.map(|replicas| Durability::new(replicas, &connector)),
            pool: RwLock::new(Arc::new(pool(&connector, &failures, 1))),
            connector,
            present: ArcSwapOption::empty(),
            taking_over: Mutex::default(),
            run: watch::Sender::new(None),
            replacements: AtomicU64::new(0),
            failures,
        }
    }

    pub(super) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Whether a grant counts only when replicas have it.
    pub(super) fn is_confirmed(&self) -> bool {
        self.durability.is_some()
    }

    /// Returns when as many replicas have the lock, which the request's token has, as is wanted.
    pub(super) async fn confirm(&self, request: &AcquireRequest) -> Result<(), StorageError> {
        let Some(durability) = &self.durability else {
            return Ok(());
        };
        let run = *self.run.borrow();
        // In a box, or every acquire's future would be as large as this.
        Box::pin(durability.confirm(request, run)).await
    }

    /// Connects, if there is no connection that works.
    pub(super) async fn connect(&self) -> Result<(), StorageError> {
        self.on_wire(|_| ()).await
    }

    /// Makes a call over the connection, which is made if there is none that works. The call is
    /// `None` if `send` sends nothing.
    pub(super) fn call<'a>(
        &'a self,
        send: impl FnOnce(&Wire) -> Option<Reply> + Send + 'a,
    ) -> Call<'a> {
        let send = move |wire: &Wire| send(wire).map(|reply| (reply, wire.origin()));
        let stage = match &*self.present.load() {
            Some(wire) if !wire.is_dead() => Stage::sent(send(wire)),
            _ => Stage::Connecting(Box::pin(self.on_wire(send))),
        };
        Call {
            connection: self,
            stage,
        }
    }

    /// A call was given up that was sent there.
    fn given_up(&self, origin: Origin) {
        let present = self.present.load();
        if let Some(wire) = &*present
            && wire.is_at(origin)
        {
            wire.given_up();
        }
    }

    async fn on_wire<R>(&self, send: impl FnOnce(&Wire) -> R) -> Result<R, StorageError> {
        if let Some(wire) = &*self.present.load()
            && !wire.is_dead()
        {
            return Ok(send(wire));
        }
        // In a box, or every command's future would be as large as this.
        let wire = Box::pin(self.pooled_wire()).await?;
        self.take_over(&wire);
        Ok(send(&wire))
    }

    /// Makes this the present connection.
    fn take_over(&self, wire: &Arc<Wire>) {
        let _alone = self
            .taking_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.run.send_if_modified(|run| {
            let differs = *run != wire.server_run();
            *run = wire.server_run();
            differs
        });
        let lost = self.present.swap(Some(Arc::clone(wire)));
        // It may lead to another server.
        if self.connector.is_replaceable() && lost.is_some_and(|lost| !Arc::ptr_eq(&lost, wire)) {
            self.replacements.fetch_add(1, Release);
        }
        // Since it was made, it may have been replaced, while nobody knew that we would use it.
        if self
            .connector
            .sentinels()
            .is_some_and(|it| wire.is_behind(it))
        {
            self.replacements.fetch_add(1, Release);
            wire.leave();
        }
    }

    /// Leaves a master that Sentinel has replaced, for as long as it is polled. It may not know yet
    /// that it is none, and go on giving locks away.
    pub(super) async fn follow(&self) {
        let Some(sentinels) = self.connector.sentinels() else {
            return;
        };
        let timeout = self.connector.timeout();
        let switched = Arc::new(Notify::new());
        let moving = async {
            loop {
                switched.notified().await;
                let Ok(master) = sentinels.find(timeout).await else {
                    continue;
                };
                if self.leave(&master) {
                    // Wake-ups follow the commands. Should it fail, the next command connects.
                    let _ = self.connect().await;
                }
            }
        };
        tokio::join!(sentinels.watch(timeout, &switched), moving);
    }

    /// Whether the present connection led to a master that this one replaces.
    fn leave(&self, master: &Master) -> bool {
        let present = self.present.load();
        let Some(wire) = &*present else {
            return false;
        };
        let is_replaced = wire.is_replaced_by(master);
        if is_replaced {
            self.replacements.fetch_add(1, Release);
            wire.leave();
        }
        is_replaced
    }

    /// Which run of the server commands go to.
    pub(super) fn run(&self) -> watch::Receiver<Option<u128>> {
        self.run.subscribe()
    }

    /// Whether the connection was lost to a server that may have been replaced since. It may have
    /// stood still, and be the last to hear of that.
    pub(super) fn is_in_doubt(&self) -> bool {
        let is_dead = || {
            let present = self.present.load();
            present.as_ref().is_some_and(|wire| wire.is_dead())
        };
        self.connector.is_replaceable() && is_dead()
    }

    /// Changes when another server has taken the place of the one that commands went to, or may have.
    /// What that one says it has done does not count any more.
    pub(super) fn replacements(&self) -> u64 {
        self.replacements.load(Acquire)
    }

    /// A reply from there has shown something.
    pub(super) fn learn(&self, origin: Origin, fact: Fact) {
        let present = self.present.load();
        if let Some(wire) = &*present
            && wire.is_at(origin)
        {
            wire.learn(fact);
        }
    }

    /// It may not be so any more.
    pub(super) fn unlearn(&self, fact: Fact) {
        let present = self.present.load();
        if let Some(wire) = &*present {
            wire.unlearn(fact);
        }
    }

    /// A pool that gives no connection and no reason may have lost the task that was to make one,
    /// with the runtime it ran on; it would wait for it for ever.
    fn replace(&self, broken: &Arc<Pool<Connector>>) {
        let mut present = self.pool.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&present, broken) {
            *present = Arc::new(pool(&self.connector, &self.failures, 1));
        }
    }

    async fn pooled_wire(&self) -> Result<Arc<Wire>, StorageError> {
        loop {
            let pool = Arc::clone(&self.pool.read().unwrap_or_else(PoisonError::into_inner));
            let failed = self.failures.happened();
            tokio::pin!(failed);
            // Before the pool is asked, so that a failure on this account is not missed.
            failed.as_mut().enable();
            // Counted over all callers: each may give up before.
            let left = self
                .connector
                .longest()
                .saturating_sub(self.failures.asked().elapsed());
            tokio::select! {
                biased;
                got = pool.get() => {
                    self.failures.answered();
                    return match got {
                        // Only a clone leaves the pool: the connection serves everybody at the same
                        // time.
                        Ok(wire) => Ok(Arc::clone(&wire)),
                        Err(RunError::User(ConnectError::Failed(error))) => Err(error),
                        Err(RunError::User(ConnectError::Dead) | RunError::TimedOut) => {
                            self.replace(&pool);
                            let text = "no connection in time";
                            Err(StorageError::with_source(StorageErrorKind::Unavailable, text))
                        }
                    };
                }
                () = failed => return Err(self.failures.last()),
                () = tokio::time::sleep(left) => {
                    self.replace(&pool);
                    self.failures.answered();
                }
            }
        }
    }
}

/// A call on its way. What is needed only while there is no connection is in a box, so that the
/// futures of all calls are small.
pub(super) struct Call<'a> {
    connection: &'a Connection,
    stage: Stage<'a>,
}

enum Stage<'a> {
    Connecting(BoxFuture<'a, Result<Option<(Reply, Origin)>, StorageError>>),
    Sent(Reply, Origin),
    Over,
}

impl Stage<'_> {
    fn sent(sent: Option<(Reply, Origin)>) -> Self {
        sent.map_or(Self::Over, |(reply, origin)| Self::Sent(reply, origin))
    }
}

impl Future for Call<'_> {
    type Output = Result<Option<(Result<Value, Failure>, Origin)>, StorageError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match &mut self.stage {
                Stage::Connecting(sent) => {
                    let sent = ready!(sent.as_mut().poll(cx));
                    self.stage = Stage::Over;
                    self.stage = Stage::sent(sent?);
                }
                Stage::Sent(reply, origin) => {
                    let (answer, origin) = (ready!(Pin::new(reply).poll(cx)), *origin);
                    self.stage = Stage::Over;
                    return Poll::Ready(Ok(Some((answer, origin))));
                }
                Stage::Over => return Poll::Ready(Ok(None)),
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        // The call does not hold the connection: all would count their references to it in one
        // place.
        if let Stage::Sent(_, origin) = self.stage {
            self.connection.given_up(origin);
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let present = self.present.load();
        let connected = present.as_ref().is_some_and(|wire| !wire.is_dead());
        f.debug_struct("Connection")
            .field("connected", &connected)
            .finish_non_exhaustive()
    }
}
