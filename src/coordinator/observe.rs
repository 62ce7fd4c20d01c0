//! What is seen of a lock from outside: a tracing span for each, and numbers.
//!
//! `docs/observability.md` is the account of it for people on call: names, fields, words, units.
//! The numbers are in `meters`, with the feature `metrics`; without it that file does nothing.
//!
//! The rest of the coordinator only says what happens: a caller [arrives](Observed::arrive), then
//! [goes without](Observed::rejected) the lock or [has it](Observed::acquired), loses it, gives it
//! back. Subscribers and recorders are code of others, so everything here is called outside the
//! locks of keys, and what they panic with [ends here](tell): a lock does not suffer from who looks
//! at it.
//!
//! Where nobody looks, an [`Observed`] is `None` and costs a caller one look at the level that
//! `tracing` has on.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tracing::{Span, Value, field::Empty, level_filters::LevelFilter};

use crate::{
    clock::Timestamp,
    coordinator::{
        key_events::Source,
        meters::{Meter, Meters},
        table::Cell,
    },
    error::{LockError, LossReason},
};

/// The target of the spans, by which they can be turned off.
const TARGET: &str = "tower_distributed_lock::lock";

/// What is said of a lock that another caller of this process has, if the process has no label.
const THIS_PROCESS: &str = "this process";

/// How a caller's wait ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waited {
    Acquired,
    NotObtained,
    TooManyWaiters,
    Storage,
    Draining,
    /// The caller has gone.
    Dropped,
}

impl Waited {
    #[cfg(feature = "metrics")]
    pub(super) const ALL: [Self; 6] = [
        Self::Acquired,
        Self::NotObtained,
        Self::TooManyWaiters,
        Self::Storage,
        Self::Draining,
        Self::Dropped,
    ];

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Acquired => "acquired",
            Self::NotObtained => "not_obtained",
            Self::TooManyWaiters => "too_many_waiters",
            Self::Storage => "storage",
            Self::Draining => "draining",
            Self::Dropped => "dropped",
        }
    }
}

impl From<&LockError> for Waited {
    fn from(error: &LockError) -> Self {
        match error {
            LockError::NotObtained(_) => Self::NotObtained,
            LockError::TooManyWaiters(_) => Self::TooManyWaiters,
            LockError::Storage(_) => Self::Storage,
            LockError::Draining => Self::Draining,
            // Said of several locks together, never of the one that is waited for.
            LockError::Lost(_) => Self::Dropped,
        }
    }
}

/// The outcome of a lock that was lost.
const fn lost(reason: LossReason) -> &'static str {
    match reason {
        LossReason::Expired => "lost:expired",
        LossReason::NotOurs => "lost:not_ours",
        LossReason::MaxHold => "lost:max_hold",
        LossReason::Draining => "lost:draining",
        LossReason::ForceReleased => "lost:force_released",
    }
}

/// Runs code of others, which the drop of a span is as well. `None` if it panicked; the panic hook
/// has said so.
pub(super) fn tell<R>(told: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(told)).ok()
}

/// The line in the log that each lost lock has.
pub(super) fn warn_of_loss(span: Span, key: &str, reason: LossReason) {
    tell(move || span.in_scope(|| tracing::warn!(key, %reason, "lock lost")));
}

/// One caller's lock as it is seen from outside, from the caller's arrival to the end of its turn.
#[derive(Debug, Default)]
pub(crate) struct Observed(Option<Inner>);

#[derive(Debug)]
struct Inner {
    /// In a box: a span costs its subscriber more than that, and mostly there is none.
    seen: Option<Box<Seen>>,
    meter: Option<Meter>,
    arrived: Timestamp,
    acquired: Option<Timestamp>,
    is_lost: bool,
}

/// What those see of it who look at spans.
#[derive(Debug)]
struct Seen {
    span: Span,
    label: Option<Arc<str>>,
}

impl Observed {
    /// A caller wants the lock of this key. Its span is a child of the one that the caller is in.
    #[inline]
    pub(super) fn arrive(
        meters: &Meters,
        label: Option<&Arc<str>>,
        key: &str,
        now: Timestamp,
    ) -> Self {
        if LevelFilter::current() < LevelFilter::INFO && !Meters::ARE_ON {
            return Self(None);
        }
        Self(tell(|| Inner::new(meters, label, key, now)).flatten())
    }

    /// It stands in the queue of this key.
    #[inline]
    pub(super) fn waits(&mut self, cell: &Cell) {
        if let Some(inner) = &mut self.0 {
            tell(|| inner.waits(cell));
        }
    }

    /// It does not get the lock. `now` is asked only if somebody looks.
    #[inline]
    pub(super) fn rejected(&mut self, error: &LockError, now: impl FnOnce() -> Timestamp) {
        if let Some(mut inner) = self.0.take() {
            tell(move || inner.without(error.into(), now()));
        }
    }

    /// It has gone before it got the lock. `now` is asked only if somebody looks.
    #[inline]
    pub(super) fn dropped(&mut self, now: impl FnOnce() -> Timestamp) {
        if let Some(mut inner) = self.0.take() {
            tell(move || inner.without(Waited::Dropped, now()));
        }
    }

    /// It has the lock.
    #[inline]
    pub(super) fn acquired(&mut self, source: Source, fencing: Option<u64>, now: Timestamp) {
        if let Some(inner) = &mut self.0 {
            tell(|| inner.with(source, fencing, now));
        }
    }

    /// It has lost the lock, and may not have noticed yet. Only the first loss counts.
    pub(super) fn lost(&mut self, reason: LossReason) {
        let Some(inner) = &mut self.0 else { return };
        if std::mem::replace(&mut inner.is_lost, true) {
            return;
        }
        tell(|| inner.loses(reason));
    }

    /// It has given the lock back, or what was left of it.
    pub(super) fn ended(self, now: Timestamp) {
        if let Some(mut inner) = self.0 {
            tell(move || inner.ends(now));
        }
    }

    #[inline]
    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Not enabled if nobody looks at spans.
    #[inline]
    pub(super) fn span(&self) -> Span {
        match &self.0 {
            Some(Inner {
                seen: Some(seen), ..
            }) => tell(|| seen.span.clone()).unwrap_or_else(Span::none),
            _ => Span::none(),
        }
    }
}

impl Inner {
    /// `None` if nobody looks.
    #[cold]
    fn new(
        meters: &Meters,
        label: Option<&Arc<str>>,
        key: &str,
        arrived: Timestamp,
    ) -> Option<Self> {
        let span = tracing::info_span!(
            target: TARGET,
            "lock",
            key,
            blocked_by = Empty,
            wait_ms = Empty,
            source = Empty,
            fencing_token = Empty,
            hold_ms = Empty,
            outcome = Empty,
        );
        let meter = meters.meter(arrived);
        let seen = (!span.is_disabled()).then(|| {
            let label = label.cloned();
            Box::new(Seen { span, label })
        });
        if seen.is_none() && meter.is_none() {
            return None;
        }
        Some(Self {
            seen,
            meter,
            arrived,
            acquired: None,
            is_lost: false,
        })
    }

    fn record(&self, field: &'static str, value: impl Value) {
        if let Some(seen) = &self.seen {
            seen.span.record(field, value);
        }
    }

    #[cold]
    fn waits(&mut self, cell: &Cell) {
        if let Some(meter) = &mut self.meter {
            meter.waits();
        }
        self.blocked(cell);
    }

    #[cold]
    fn blocked(&self, cell: &Cell) {
        let Some(seen) = &self.seen else { return };
        let slot = cell.lock();
        // A holder that has lost the lock is there until it gives up what it had.
        let by_this_process = slot.holder.is_some() && slot.state.owner().is_some();
        drop(slot);
        if by_this_process {
            let label = seen.label.as_deref();
            self.record("blocked_by", label.unwrap_or(THIS_PROCESS));
        }
    }

    #[cold]
    fn with(&mut self, source: Source, fencing: Option<u64>, now: Timestamp) {
        let waited = now.since(self.arrived);
        self.acquired = Some(now);
        self.record("wait_ms", ms(waited));
        self.record("source", source.word());
        if let Some(token) = fencing {
            self.record("fencing_token", token);
        }
        if let Some(meter) = &mut self.meter {
            meter.waited(Waited::Acquired, waited);
            meter.holds(source);
        }
    }

    #[cold]
    fn loses(&mut self, reason: LossReason) {
        self.record("outcome", lost(reason));
        if let Some(meter) = &mut self.meter {
            meter.lost(reason);
        }
    }

    #[cold]
    fn ends(&mut self, now: Timestamp) {
        let held = now.since(self.acquired.unwrap_or(now));
        self.record("hold_ms", ms(held));
        if !self.is_lost {
            self.record("outcome", "released");
        }
        if let Some(meter) = &mut self.meter {
            meter.held(held);
        }
    }

    #[cold]
    fn without(&mut self, how: Waited, now: Timestamp) {
        let waited = now.since(self.arrived);
        self.record("wait_ms", ms(waited));
        self.record("outcome", how.word());
        if let Some(meter) = &mut self.meter {
            meter.waited(how, waited);
        }
    }
}

fn ms(time: Duration) -> f64 {
    // Whole microseconds: more is noise, and more digits than anybody reads.
    time.as_micros() as f64 / 1_000.0
}
