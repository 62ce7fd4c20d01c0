//! The numbers: each metric's name, kind, unit and labels are here, and nowhere else.
//!
//! The recorder is asked for a handle of each series when a factory first has something to record,
//! and then only if another recorder has come, or after a [while](FRESH). The facade hands out
//! handles that belong to the recorder of the moment, so those from before a recorder is installed
//! would be deaf for ever; which recorder it is, is told by its address. And a recorder may forget a
//! series that nothing was recorded for (`idle_timeout` of `metrics-exporter-prometheus`): then its
//! old handle is deaf, too.
//!
//! A lock is counted by the recorder that was there when its caller arrived, to its end. So a gauge
//! that went up goes down again, whatever is installed meanwhile.

use std::{borrow::Cow, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};

use crate::{
    clock::{Clock, Timestamp},
    coordinator::{
        key_events::Source,
        observe::{Waited, tell},
    },
    error::{LossReason, StorageError, StorageErrorKind},
};

/// What a metric is.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A metric as it is described to the recorder.
struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Unit,
    description: &'static str,
}

const WAIT: Metric = Metric {
    name: "distributed_lock_wait_seconds",
    kind: Kind::Histogram,
    unit: Unit::Seconds,
    description: "How long callers waited for a lock, by how the wait ended",
};
const HOLD: Metric = Metric {
    name: "distributed_lock_hold_seconds",
    kind: Kind::Histogram,
    unit: Unit::Seconds,
    description: "How long holders kept a lock, lost or not",
};
const WAITERS: Metric = Metric {
    name: "distributed_lock_waiters",
    kind: Kind::Gauge,
    unit: Unit::Count,
    description: "Callers that wait for a lock now",
};
const HELD: Metric = Metric {
    name: "distributed_lock_held",
    kind: Kind::Gauge,
    unit: Unit::Count,
    description: "Locks that callers hold now",
};
const ACQUIRED: Metric = Metric {
    name: "distributed_lock_acquired_total",
    kind: Kind::Counter,
    unit: Unit::Count,
    description: "Locks that callers got, by where each came from",
};
const LOST: Metric = Metric {
    name: "distributed_lock_lost_total",
    kind: Kind::Counter,
    unit: Unit::Count,
    description: "Locks that were lost before they were given back, by reason",
};
const REJECTED: Metric = Metric {
    name: "distributed_lock_rejected_total",
    kind: Kind::Counter,
    unit: Unit::Count,
    description: "Callers that did not get the lock, by reason",
};
const RENEWALS: Metric = Metric {
    name: "distributed_lock_renewals_total",
    kind: Kind::Counter,
    unit: Unit::Count,
    description: "Renewals of locks, by outcome",
};
const STORAGE_ERRORS: Metric = Metric {
    name: "distributed_lock_storage_errors_total",
    kind: Kind::Counter,
    unit: Unit::Count,
    description: "What the storage did not do, by operation and kind of failure",
};

const METRICS: [&Metric; 9] = [
    &WAIT,
    &HOLD,
    &WAITERS,
    &HELD,
    &ACQUIRED,
    &LOST,
    &REJECTED,
    &RENEWALS,
    &STORAGE_ERRORS,
];

fn describe(recorder: &dyn Recorder) {
    for metric in METRICS {
        let (name, unit) = (metric.name.into(), Some(metric.unit));
        let description = metric.description.into();
        match metric.kind {
            Kind::Counter => recorder.describe_counter(name, unit, description),
            Kind::Gauge => recorder.describe_gauge(name, unit, description),
            Kind::Histogram => recorder.describe_histogram(name, unit, description),
        }
    }
}

// --- the words of the labels -----------------------------------------------------------------------

const LOSSES: [&str; 5] = [
    "expired",
    "not_ours",
    "max_hold",
    "draining",
    "force_released",
];

const fn loss(reason: LossReason) -> usize {
    match reason {
        LossReason::Expired => 0,
        LossReason::NotOurs => 1,
        LossReason::MaxHold => 2,
        LossReason::Draining => 3,
        LossReason::ForceReleased => 4,
    }
}

const REJECTIONS: [&str; 5] = [
    "not_obtained",
    "too_many_waiters",
    "storage",
    "draining",
    "invalid_key",
];
const NOT_OBTAINED: usize = 0;
const INVALID_KEY: usize = 4;

const fn rejection(how: Waited) -> Option<usize> {
    match how {
        Waited::NotObtained => Some(NOT_OBTAINED),
        Waited::TooManyWaiters => Some(1),
        Waited::Storage => Some(2),
        Waited::Draining => Some(3),
        Waited::Acquired | Waited::Dropped => None,
    }
}

/// A call of the storage that can fail.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Acquire,
    Renew,
    Release,
}

const OPERATIONS: [&str; 3] = ["acquire", "renew", "release"];

const KINDS: [&str; 5] = [
    "unavailable",
    "timeout",
    "unauthorized",
    "wrong_type",
    "rejected",
];

const fn kind(kind: StorageErrorKind) -> usize {
    match kind {
        StorageErrorKind::Unavailable => 0,
        StorageErrorKind::Timeout => 1,
        StorageErrorKind::Unauthorized => 2,
        StorageErrorKind::WrongType => 3,
        StorageErrorKind::Rejected => 4,
    }
}

/// What a renewal brought.
#[derive(Clone, Copy, Debug)]
pub(super) enum Renewal {
    InTime,
    /// Less than half of the lock's time was left, if any.
    Late,
    NotOurs,
    Failed,
}

const RENEWAL_OUTCOMES: [&str; 4] = ["in_time", "late", "not_ours", "failed"];

// --- a factory's numbers -----------------------------------------------------------------------------

/// Handles are asked for anew after so long. Shorter than any idle time-out that makes sense, and
/// long enough for some fifty look-ups to cost nothing.
const FRESH: Duration = Duration::from_secs(1);

/// A factory's way to the recorder.
pub(crate) struct Meters {
    /// The value of the label `factory`, if there is to be one.
    factory: Option<Cow<'static, str>>,
    clock: Clock,
    handles: ArcSwapOption<Handles>,
}

/// One handle for each series.
struct Handles {
    /// The address of the recorder that they are of.
    recorder: usize,
    /// When it was asked for them.
    since: Timestamp,
    waits: [Histogram; Waited::ALL.len()],
    hold: Histogram,
    waiters: Gauge,
    held: Gauge,
    acquired: [Counter; Source::ALL.len()],
    lost: [Counter; LOSSES.len()],
    rejected: [Counter; REJECTIONS.len()],
    renewals: [Counter; RENEWAL_OUTCOMES.len()],
    storage_errors: [[Counter; KINDS.len()]; OPERATIONS.len()],
}

impl Handles {
    fn new(recorder: &dyn Recorder, factory: Option<&Cow<'static, str>>, now: Timestamp) -> Self {
        let metadata = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));
        let key = |metric: &Metric, labels: &[(&'static str, &'static str)]| {
            let labels = labels.iter();
            let labels = labels.map(|(name, value)| Label::from_static_parts(name, value));
            let factory = factory.map(|name| Label::new("factory", name.clone()));
            let labels: Vec<_> = labels.chain(factory).collect();
            Key::from_parts(metric.name, labels)
        };
        let counter =
            |metric, labels: &[_]| recorder.register_counter(&key(metric, labels), &metadata);
        let gauge = |metric| recorder.register_gauge(&key(metric, &[]), &metadata);
        let histogram =
            |metric, labels: &[_]| recorder.register_histogram(&key(metric, labels), &metadata);
        Self {
            recorder: address(recorder),
            since: now,
            waits: Waited::ALL.map(|how| histogram(&WAIT, &[("outcome", how.word())])),
            hold: histogram(&HOLD, &[]),
            waiters: gauge(&WAITERS),
            held: gauge(&HELD),
            acquired: Source::ALL.map(|source| counter(&ACQUIRED, &[("source", source.word())])),
            lost: LOSSES.map(|reason| counter(&LOST, &[("reason", reason)])),
            rejected: REJECTIONS.map(|reason| counter(&REJECTED, &[("reason", reason)])),
            renewals: RENEWAL_OUTCOMES.map(|outcome| counter(&RENEWALS, &[("outcome", outcome)])),
            storage_errors: OPERATIONS.map(|operation| {
                KINDS.map(|kind| {
                    counter(&STORAGE_ERRORS, &[("operation", operation), ("kind", kind)])
                })
            }),
        }
    }
}

fn address(recorder: &dyn Recorder) -> usize {
    std::ptr::from_ref(recorder).addr()
}

impl Meters {
    pub(super) const ARE_ON: bool = true;

    pub(super) fn new(factory: Option<Cow<'static, str>>, clock: Clock) -> Self {
        Self {
            factory,
            clock,
            handles: ArcSwapOption::empty(),
        }
    }

    fn handles(&self, now: Timestamp) -> Arc<Handles> {
        metrics::with_recorder(|recorder| {
            let known = self.handles.load();
            let known = known.as_ref();
            let known = known.filter(|known| known.recorder == address(recorder));
            match known {
                Some(known) if now.since(known.since) < FRESH => return Arc::clone(known),
                Some(_) => {}
                None => describe(recorder),
            }
            let handles = Arc::new(Handles::new(recorder, self.factory.as_ref(), now));
            self.handles.store(Some(Arc::clone(&handles)));
            handles
        })
    }

    /// Called wherever something happens, in the midst of what must come to its end.
    fn count(&self, counter: impl FnOnce(&Handles) -> &Counter) {
        tell(|| counter(&self.handles(self.clock.now())).increment(1));
    }

    /// For a caller that arrives.
    pub(super) fn meter(&self, now: Timestamp) -> Option<Meter> {
        Some(Meter {
            handles: self.handles(now),
            stage: Stage::Arriving,
        })
    }

    pub(super) fn renewed(&self, outcome: Renewal) {
        self.count(|handles| &handles.renewals[outcome as usize]);
    }

    /// A release found that the lock had been lost, of which its holder knew nothing.
    pub(super) fn found_lost(&self) {
        self.count(|handles| &handles.lost[loss(LossReason::NotOurs)]);
    }

    pub(super) fn storage_error(&self, operation: Operation, error: &StorageError) {
        self.count(|handles| &handles.storage_errors[operation as usize][kind(error.kind())]);
    }

    /// A request was rejected because its key function failed.
    pub(crate) fn invalid_key(&self) {
        self.count(|handles| &handles.rejected[INVALID_KEY]);
    }

    /// A caller had no time left before it could ask for a lock.
    pub(crate) fn out_of_time(&self) {
        self.count(|handles| &handles.rejected[NOT_OBTAINED]);
    }
}

impl std::fmt::Debug for Meters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meters").finish_non_exhaustive()
    }
}

// --- a lock's numbers --------------------------------------------------------------------------------

/// What is counted of one caller's lock. It ends with [`Meter::waited`] or [`Meter::held`], which take
/// it out of the gauges.
pub(super) struct Meter {
    handles: Arc<Handles>,
    stage: Stage,
}

/// Which gauge counts the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Arriving,
    Waiting,
    Holding,
    Gone,
}

impl Meter {
    fn enter(&mut self, stage: Stage) {
        let left = std::mem::replace(&mut self.stage, stage);
        for (at, change) in [(left, -1.0), (stage, 1.0)] {
            match at {
                Stage::Waiting => self.handles.waiters.increment(change),
                Stage::Holding => self.handles.held.increment(change),
                Stage::Arriving | Stage::Gone => {}
            }
        }
    }

    pub(super) fn waits(&mut self) {
        self.enter(Stage::Waiting);
    }

    pub(super) fn waited(&mut self, how: Waited, waited: Duration) {
        self.enter(Stage::Gone);
        self.handles.waits[how as usize].record(waited);
        if let Some(reason) = rejection(how) {
            self.handles.rejected[reason].increment(1);
        }
    }

    pub(super) fn holds(&mut self, source: Source) {
        self.enter(Stage::Holding);
        self.handles.acquired[source as usize].increment(1);
    }

    pub(super) fn lost(&mut self, reason: LossReason) {
        self.enter(Stage::Gone);
        self.handles.lost[loss(reason)].increment(1);
    }

    pub(super) fn held(&mut self, held: Duration) {
        self.enter(Stage::Gone);
        self.handles.hold.record(held);
    }
}

impl std::fmt::Debug for Meter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Meter").field(&self.stage).finish()
    }
}
