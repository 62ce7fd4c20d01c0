//! What a scene plays on, and what must be left of it when its caller was dropped.

use std::{any::Any, future::poll_fn, pin::Pin, sync::Arc, task::Poll, time::Duration};

use futures_util::future::{BoxFuture, LocalBoxFuture};
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tower_distributed_lock::{LockFactory, LockFactoryBuilder, LockGuard, LockOptions, Unlocked};

use super::{Points, ms};

/// How the factory under test is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    pub linger: Option<Duration>,
    pub handoff: Option<(u32, Duration)>,
}

impl Setup {
    pub fn apply<S>(self, builder: LockFactoryBuilder<S>) -> LockFactoryBuilder<S>
    where
        S: tower_distributed_lock::storage::LockStorage,
    {
        let builder = match self.linger {
            Some(linger) => builder.linger(linger),
            None => builder,
        };
        match self.handoff {
            Some((turns, time)) => builder.handoff_limit(turns, time),
            None => builder,
        }
    }
}

/// Processes and their storage. The process whose caller is dropped is `here`; the others reach the
/// storage without faults.
#[derive(Clone)]
pub struct Stage {
    pub here: LockFactory,
    pub there: LockFactory,
    pub elsewhere: LockFactory,
    pub options: LockOptions,
    /// How long a scene waits for what should come next.
    pub limit: Duration,
    /// How long the caller's work takes.
    pub work: Duration,
    /// How many processes stand in the queue of a lock that is held.
    pub queued: Arc<dyn Fn(&'static str) -> BoxFuture<'static, usize> + Send + Sync>,
    /// Whether waiters stand in a queue at all.
    pub has_queue: bool,
    pub dropped: watch::Receiver<Option<Instant>>,
}

/// A scene that is set.
pub struct Act {
    /// The future that is dropped.
    pub caller: LocalBoxFuture<'static, Box<dyn Any>>,
    /// Others that have to get their turn whatever becomes of the caller.
    pub others: Vec<JoinHandle<()>>,
    pub keys: Vec<&'static str>,
    /// The factory is closed at the end, so that nothing lingers.
    pub drains: bool,
}

impl Stage {
    /// Takes a lock, works, and gives it back.
    pub async fn turn(self, factory: LockFactory, key: &'static str) {
        let guard = factory.create_lock(key).unwrap().lock(self.options).await;
        let guard = guard.expect("its turn comes");
        sleep(ms(1)).await;
        // A loss is what a storage that is away may bring.
        let _ = guard.unlock().await;
    }

    /// So many processes wait for the lock, or the caller was dropped, or it does not get that far.
    pub async fn waits(&self, key: &'static str, count: usize) {
        let begin = Instant::now();
        while self.dropped.borrow().is_none() && begin.elapsed() < self.limit {
            if self.has_queue && (self.queued)(key).await >= count {
                return;
            }
            sleep(ms(1)).await;
        }
    }

    /// So many callers wait here, or the caller was dropped, or it does not get that far.
    pub async fn waits_here(&self, count: usize) {
        let begin = Instant::now();
        while self.dropped.borrow().is_none() && begin.elapsed() < self.limit {
            if self.here.waiters() >= count {
                return;
            }
            sleep(ms(1)).await;
        }
    }

    pub async fn take(&self, factory: &LockFactory, key: &'static str) -> LockGuard {
        let lock = factory.create_lock(key).unwrap();
        lock.lock(self.options).await.expect("it is free")
    }

    /// Another process has the lock, until somebody else waits for it.
    pub async fn hold_there(&self, key: &'static str) -> JoinHandle<()> {
        let guard = self.take(&self.there, key).await;
        let stage = self.clone();
        tokio::spawn(async move {
            stage.waits(key, 1).await;
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        })
    }
}

/// Polls the caller to the point at which it is dropped, and drops it there. Work that has come to its end
/// is dropped with what it has brought.
pub async fn drive(
    points: &Points,
    mut caller: Pin<Box<dyn Future<Output = Box<dyn Any>>>>,
) -> Box<dyn Any> {
    points.open();
    if points.pass(|| "before the first poll".to_owned()) {
        return Box::new(caller);
    }
    let mut polls = 0;
    let result = poll_fn(|cx| {
        if points.has_stopped(cx.waker()) {
            return Poll::Ready(None);
        }
        if let Poll::Ready(result) = caller.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        polls += 1;
        if points.pass(|| format!("after poll {polls}")) || points.has_stopped(cx.waker()) {
            return Poll::Ready(None);
        }
        Poll::Pending
    })
    .await;
    points.pass(|| "at its end".to_owned());
    Box::new((caller, result))
}

/// How long what has to happen at once may take.
pub struct Patience {
    /// Until the next caller of any process has the lock.
    pub next: Duration,
    /// Until nothing is left.
    pub clean: Duration,
}

/// The caller has been dropped: the others get their turn, the next process gets its own, and then
/// nothing is left.
pub async fn nothing_is_left(
    stage: Stage,
    act: Act,
    patience: Patience,
    is_empty: impl AsyncFn() -> bool,
    next: LockFactory,
) {
    let begin = Instant::now();
    let Act {
        caller: _,
        others,
        keys,
        drains,
    } = act;
    for &key in &keys {
        let lock = next.create_lock(key).unwrap();
        let took = timeout(patience.next, lock.lock(stage.options)).await;
        let guard = took.unwrap_or_else(|_| panic!("the next process waits for {key:?}"));
        let guard = guard.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
    for other in others {
        let left = (begin + patience.next).saturating_duration_since(Instant::now());
        let ended = timeout(left, other).await;
        ended
            .expect("the others get their turn")
            .expect("the others have no error");
    }
    if drains {
        assert_eq!(
            stage.here.drain(patience.clean).await,
            0,
            "keys after a drain"
        );
    }
    let begin = Instant::now();
    while stage.here.keys() + stage.here.waiters() > 0 || !is_empty().await {
        assert!(
            begin.elapsed() < patience.clean,
            "{} keys and {} waiters are left; the storage is empty: {}",
            stage.here.keys(),
            stage.here.waiters(),
            is_empty().await
        );
        sleep(ms(5)).await;
    }
    for &key in &keys {
        let lock = next.create_lock(key).unwrap();
        let begin = Instant::now();
        let guard = lock
            .try_lock(stage.options)
            .await
            .expect("it is free at once");
        assert!(begin.elapsed() <= patience.next / 2, "it is free at once");
        assert_eq!((stage.queued)(key).await, 0, "places in the queue are left");
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    }
}

/// No task is left but `tasks`.
pub async fn no_task_is_left(tasks: usize, patience: Duration, of: &str) {
    let begin = Instant::now();
    let alive = || Handle::current().metrics().num_alive_tasks();
    while alive() > tasks {
        assert!(
            begin.elapsed() < patience,
            "{} tasks are left {of}, not {tasks}",
            alive()
        );
        sleep(ms(5)).await;
    }
}
