//! The one background task of a factory: it renews leases, sends releases, and follows attempts whose callers have
//! gone.
//!
//! It runs on the tokio runtime of whoever first waits for a lock, and is started again by the next caller if that
//! runtime is shut down. It ends with the factory's last handle and last guard.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{runtime::Handle, sync::Notify};

use crate::{clock::Timestamp, coordinator::Coordinator};

/// Work for the keeper: it polls it to its end. Dropped before its end, work puts its key's state in order by itself.
pub(crate) type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) struct Keeper {
    inbox: Mutex<Inbox>,
    wake: Notify,
    /// When the next lease has to be looked at; `u64::MAX` for never.
    due: AtomicU64,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<Job>,
    running: bool,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self {
            inbox: Mutex::default(),
            wake: Notify::new(),
            due: AtomicU64::new(u64::MAX),
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the keeper something to do. Without a runtime to run on, the job is dropped.
    pub(crate) fn submit(self: &Arc<Self>, coordinator: &Arc<Coordinator>, job: Job) {
        let runtime = Handle::try_current().ok();
        let mut inbox = self.inbox();
        if !inbox.running && runtime.is_none() {
            drop(inbox);
            // Outside the lock: what a job does when it is dropped may lead back here.
            return drop(job);
        }
        inbox.jobs.push(job);
        self.start(inbox, runtime, coordinator);
        self.wake.notify_one();
    }

    /// A lease has to be looked at by then.
    pub(crate) fn look_by(self: &Arc<Self>, coordinator: &Arc<Coordinator>, due: Timestamp) {
        if self.due.load(SeqCst) > due.as_nanos()
            && self.due.fetch_min(due.as_nanos(), SeqCst) > due.as_nanos()
        {
            self.start(self.inbox(), Handle::try_current().ok(), coordinator);
            self.wake.notify_one();
        }
    }

    /// Looks up from its sleep: there is something new to see.
    pub(crate) fn nudge(&self) {
        self.wake.notify_one();
    }

    /// Starts the keeper if it does not run.
    fn start(
        self: &Arc<Self>,
        mut inbox: MutexGuard<'_, Inbox>,
        runtime: Option<Handle>,
        coordinator: &Arc<Coordinator>,
    ) {
        if !inbox.running
            && let Some(runtime) = runtime
        {
            inbox.running = true;
            // A runtime that is shutting down drops the new task inside `spawn`, and `Alive` wants the inbox.
            drop(inbox);
            let alive = Alive(Arc::clone(self));
            runtime.spawn(run(alive, Arc::downgrade(coordinator)));
        }
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

/// Held by the running task. Its runtime may drop it at any await.
struct Alive(Arc<Keeper>);

impl Drop for Alive {
    fn drop(&mut self) {
        let jobs = {
            let mut inbox = self.0.inbox();
            inbox.running = false;
            // The next keeper looks at every lease anew.
            self.0.due.store(u64::MAX, SeqCst);
            std::mem::take(&mut inbox.jobs)
        };
        drop(jobs);
    }
}

async fn run(alive: Alive, coordinator: Weak<Coordinator>) {
    let keeper = &*alive.0;
    let mut jobs: FuturesUnordered<Job> = FuturesUnordered::new();
    let timer = tokio::time::sleep(std::time::Duration::ZERO);
    tokio::pin!(timer);
    let mut timer_due = None;
    loop {
        jobs.extend(std::mem::take(&mut keeper.inbox().jobs));
        let Some(coordinator) = coordinator.upgrade() else {
            // Every job holds the coordinator, so there is none left either.
            return;
        };
        if keeper.due.load(SeqCst) <= coordinator.clock.now().as_nanos() {
            // Before the look, so that a lease granted meanwhile is not overwritten.
            keeper.due.store(u64::MAX, SeqCst);
            let next = coordinator.look(|job| jobs.push(job));
            keeper
                .due
                .fetch_min(next.map_or(u64::MAX, Timestamp::as_nanos), SeqCst);
        }
        let due = match keeper.due.load(SeqCst) {
            u64::MAX => None,
            due => Some(Timestamp::from_nanos(due)),
        };
        if let Some(due) = due
            && timer_due != Some(due)
        {
            timer.as_mut().reset(coordinator.clock.timer(due));
        }
        timer_due = due;
        drop(coordinator);

        tokio::select! {
            () = keeper.wake.notified() => {}
            Some(()) = jobs.next(), if !jobs.is_empty() => {}
            () = timer.as_mut(), if due.is_some() => timer_due = None,
        }
    }
}
