//! The one background task of a factory: it renews leases, sends releases, and follows attempts
//! whose callers have gone.
//!
//! It runs on the tokio runtime of whoever first waits for a lock, and is started again by the next
//! caller, or the next poll of a request that holds a lock, if that runtime is shut down. It ends
//! with the factory's last handle and last guard.

use std::{fmt, pin::Pin};

use crossbeam_utils::atomic::AtomicCell;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    runtime::{self, Handle},
    sync::Notify,
};

use crate::{
    clock::Timestamp,
    coordinator::{Coordinator, lease::Claim, table::Cell},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

/// Work for the keeper: it polls it to its end. Dropped before its end, work puts its key's state
/// in order by itself.
pub(crate) type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The caller's runtime. To be asked seldom: a runtime counts who knows it, in one place for all
/// its threads.
pub(crate) fn here() -> Option<runtime::Id> {
    Some(Handle::try_current().ok()?.id())
}

pub(crate) struct Keeper {
    jobs: Mutex<Vec<Job>>,
    /// What is to be renewed as soon as it wakes.
    leases: Mutex<Vec<(Arc<Cell>, Claim)>>,
    /// Changed only under the lock of `jobs`, so that no job is left with nobody to take it.
    running: AtomicBool,
    /// The runtime on which it runs. Changed together with `running`.
    runtime: AtomicCell<Option<runtime::Id>>,
    wake: Notify,
    /// When the next lease has to be looked at; `u64::MAX` for never.
    due: AtomicU64,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self {
            jobs: Mutex::default(),
            leases: Mutex::default(),
            running: AtomicBool::new(false),
            runtime: AtomicCell::new(None),
            wake: Notify::new(),
            due: AtomicU64::new(u64::MAX),
        }
    }

    fn jobs(&self) -> MutexGuard<'_, Vec<Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leases(&self) -> MutexGuard<'_, Vec<(Arc<Cell>, Claim)>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the keeper on the caller's runtime, if it does not run and there is one.
    pub(crate) fn ensure_running(self: &Arc<Self>, coordinator: &Arc<Coordinator>) {
        if self.is_running() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let jobs = self.jobs();
        if self.running.swap(true, SeqCst) {
            return;
        }
        self.runtime.store(Some(runtime.id()));
        drop(jobs);
        // It looks at every lease at once: the last keeper may have left some.
        self.due.store(0, SeqCst);
        let alive = Alive {
            keeper: Arc::clone(self),
            coordinator: Arc::downgrade(coordinator),
        };
        // Outside the lock: a runtime that is shutting down drops the task in here, and `alive`
        // with it.
        runtime.spawn(run(alive));
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// Whether it runs on this runtime.
    pub(crate) fn is_on(&self, runtime: Option<runtime::Id>) -> bool {
        runtime.is_some() && self.runtime.load() == runtime
    }

    /// Gives the keeper something to do. Without a runtime to run on, the job is dropped.
    pub(crate) fn submit(self: &Arc<Self>, coordinator: &Arc<Coordinator>, job: Job) {
        self.ensure_running(coordinator);
        let mut jobs = self.jobs();
        if self.is_running() {
            jobs.push(job);
            drop(jobs);
            self.wake.notify_one();
        } else {
            // Outside the lock: what a job does when it is dropped may lead back here.
            drop(jobs);
            drop(job);
        }
    }

    /// A lease has to be renewed at once. Without a runtime to run on, the next keeper does it.
    pub(crate) fn renew(
        self: &Arc<Self>,
        coordinator: &Arc<Coordinator>,
        cell: &Arc<Cell>,
        claim: Claim,
    ) {
        self.leases().push((Arc::clone(cell), claim));
        self.ensure_running(coordinator);
        self.wake.notify_one();
    }

    /// A lease has to be looked at by then.
    pub(crate) fn look_by(self: &Arc<Self>, coordinator: &Arc<Coordinator>, due: Timestamp) {
        let due = due.as_nanos();
        if self.due.load(SeqCst) > due && self.due.fetch_min(due, SeqCst) > due {
            self.ensure_running(coordinator);
            self.wake.notify_one();
        }
    }

    /// Looks up from its sleep: there is something new to see.
    pub(crate) fn nudge(&self) {
        self.wake.notify_one();
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

/// Held by the running task. Its runtime may drop it at any await.
struct Alive {
    keeper: Arc<Keeper>,
    coordinator: Weak<Coordinator>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        // What nobody has taken up. A release that this brings is sent while there is a keeper, as
        // those are of the jobs that have just been dropped.
        let left = std::mem::take(&mut *self.keeper.jobs());
        drop(left);
        let left = {
            let mut jobs = self.keeper.jobs();
            self.keeper.running.store(false, SeqCst);
            self.keeper.runtime.store(None);
            std::mem::take(&mut *jobs)
        };
        // Outside the lock: what a job does when it is dropped may lead back to it.
        drop(left);
        // Whoever is polled on another runtime starts the next keeper.
        if let Some(coordinator) = self.coordinator.upgrade() {
            coordinator.wake_callers();
        }
    }
}

async fn run(alive: Alive) {
    let keeper = &*alive.keeper;
    let mut jobs: FuturesUnordered<Job> = FuturesUnordered::new();
    let timer = tokio::time::sleep(std::time::Duration::ZERO);
    tokio::pin!(timer);
    let mut timer_due = None;
    if let Some(coordinator) = alive.coordinator.upgrade() {
        jobs.push(coordinator.listen());
    }
    loop {
        jobs.extend(std::mem::take(&mut *keeper.jobs()));
        let Some(coordinator) = alive.coordinator.upgrade() else {
            // A job that the factory has to wait for holds the coordinator: there is none left.
            return;
        };
        let leases = std::mem::take(&mut *keeper.leases());
        coordinator.renew_at_once(leases, |job| jobs.push(job));
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
            // Every round looks at everything, so no order is unfair; and a simulation is the same
            // each time.
            biased;
            Some(()) = jobs.next(), if !jobs.is_empty() => {}
            () = keeper.wake.notified() => {}
            () = timer.as_mut(), if due.is_some() => timer_due = None,
        }
    }
}
