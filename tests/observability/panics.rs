//! Subscribers and recorders that panic: a lock does not suffer from who looks at it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use ::metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use tower_distributed_lock::{Unlocked, error::StorageErrorKind};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::*;

/// Panics at the call with this number, counted from 0, or at all of them.
struct Bomb {
    at: Option<usize>,
    calls: AtomicUsize,
}

impl Bomb {
    fn new(at: Option<usize>) -> Arc<Self> {
        Arc::new(Self {
            at,
            calls: AtomicUsize::new(0),
        })
    }

    fn tick(&self) {
        let call = self.calls.fetch_add(1, SeqCst);
        if self.at.is_none_or(|at| at == call) {
            // Without a word on stderr for each.
            std::panic::resume_unwind(Box::new("a bomb"));
        }
    }
}

/// What is behind each handle.
struct Handle(Arc<Bomb>);

impl CounterFn for Handle {
    fn increment(&self, _: u64) {
        self.0.tick();
    }
    fn absolute(&self, _: u64) {}
}

impl GaugeFn for Handle {
    fn increment(&self, _: f64) {
        self.0.tick();
    }
    fn decrement(&self, _: f64) {
        self.0.tick();
    }
    fn set(&self, _: f64) {}
}

impl HistogramFn for Handle {
    fn record(&self, _: f64) {
        self.0.tick();
    }
}

struct Recording(Arc<Bomb>);

impl Recording {
    fn handle(&self) -> Arc<Handle> {
        Arc::new(Handle(Arc::clone(&self.0)))
    }
}

impl Recorder for Recording {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
        self.0.tick();
    }
    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.handle())
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.handle())
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.handle())
    }
}

/// A layer of a subscriber.
struct Seeing(Arc<Bomb>);

impl<S: tracing::Subscriber> Layer<S> for Seeing {
    fn on_new_span(&self, _: &tracing::span::Attributes<'_>, _: &tracing::Id, _: Context<'_, S>) {
        self.0.tick();
    }
    fn on_record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>, _: Context<'_, S>) {
        self.0.tick();
    }
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event
            .metadata()
            .target()
            .starts_with("tower_distributed_lock")
        {
            self.0.tick();
        }
    }
}

/// All that can happen to a lock, on a key each time that has to be free again at once.
async fn a_day() {
    let behind = memory();
    let (storage, factory) = faulty_over(&behind);
    let lock = key(&factory);
    let guard = lock.lock(patient()).await.unwrap();
    let next = tokio::spawn(lock.lock(patient()));
    settle().await;
    lock.try_lock(patient()).await.unwrap_err();
    assert!(!polled(2, lock.lock(patient())).await);
    drop(guard);
    assert_eq!(
        next.await.unwrap().unwrap().unlock().await.unwrap(),
        Unlocked::Held
    );
    storage.next(Op::Acquire, Fault::fails(StorageErrorKind::WrongType));
    lock.lock(patient()).await.unwrap_err();

    // It is lost, and the next one has it.
    let guard = lock.lock(patient()).await.unwrap();
    let next = tokio::spawn(lock.lock(patient()));
    settle().await;
    behind.clear();
    guard.lost().await;
    let next = next.await.unwrap().unwrap();
    assert!(next.is_held());
    drop((guard, next));
    // Only its release finds out.
    let guard = lock.lock(patient()).await.unwrap();
    behind.clear();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    settle().await;
    assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    assert!(behind.is_empty(), "{behind:?}");
}

#[tokio::test(start_paused = true)]
async fn a_recorder_that_panics_costs_no_lock() {
    let count = Bomb::new(Some(usize::MAX));
    let recorder: &'static Recording = Box::leak(Box::new(Recording(Arc::clone(&count))));
    let local = ::metrics::set_default_local_recorder(recorder);
    a_day().await;
    drop(local);
    let calls = count.calls.load(SeqCst);
    assert!(calls > 30, "{calls}");

    for at in (0..calls).map(Some).chain([None]) {
        let recorder: &'static Recording = Box::leak(Box::new(Recording(Bomb::new(at))));
        let _local = ::metrics::set_default_local_recorder(recorder);
        a_day().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_panics_costs_no_lock() {
    let mut gone_off = 0;
    // More than a day has.
    for at in (0..60).map(Some).chain([None]) {
        let bomb = Bomb::new(at);
        let registry = tracing_subscriber::registry().with(Seeing(Arc::clone(&bomb)));
        let _default = tracing::subscriber::set_default(registry);
        a_day().await;
        gone_off += usize::from(bomb.calls.load(SeqCst) > at.unwrap_or(0));
    }
    // Not all: tests at the same time may keep `tracing` from showing this one some of it.
    assert!(gone_off > 20, "{gone_off}");
}
