//! The future of one caller that wants a lock.
//!
//! It stands in its key's queue. When it is first, it talks to the storage itself, inside its own
//! `poll`: an uncontended acquire needs no other task. If it is dropped meanwhile, the keeper takes
//! over what it has begun.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::time::Sleep;

use crate::{
    clock::{Clock, Timestamp},
    coordinator::{
        Coordinator, Next, Polled, flight::Flight, keeper, observe::Observed, queue::Place,
        table::Cell, turn::Turn,
    },
    error::{LockError, NotObtained, StorageError, StorageErrorKind},
    key::LockName,
    options::LockOptions,
    storage::AcquireReply,
};

/// Resolves when the lock is obtained, or not to be had.
#[derive(Debug)]
pub(crate) struct Acquire {
    caller: Caller,
    /// In a box: few have one, and this is moved with each request.
    timer: Option<Pin<Box<Sleep>>>,
    timer_at: Option<Timestamp>,
}

#[derive(Debug)]
enum Caller {
    /// It was not polled yet.
    Arriving(Arrival),
    Waiting(Waiter),
    /// It has got what it came for, or has been told that it cannot have it.
    Gone,
}

#[derive(Debug)]
struct Arrival {
    coordinator: Arc<Coordinator>,
    name: LockName,
    options: LockOptions,
    patient: bool,
}

impl Acquire {
    pub(crate) fn new(coordinator: Arc<Coordinator>, name: LockName, options: LockOptions) -> Self {
        Self {
            caller: Caller::Arriving(Arrival {
                coordinator,
                name,
                options,
                patient: true,
            }),
            timer: None,
            timer_at: None,
        }
    }

    /// Gives up at the first failure of the storage instead of asking again until the wait is over.
    pub(crate) fn impatient(mut self) -> Self {
        if let Caller::Arriving(arrival) = &mut self.caller {
            arrival.patient = false;
        }
        self
    }
}

impl Caller {
    /// Joins the queue, if it has not yet; then, when it had done so.
    fn arrive(&mut self) -> Result<Option<Timestamp>, LockError> {
        // Looked at first: a waiter is not moved at each poll.
        if !matches!(self, Self::Arriving(_)) {
            return Ok(None);
        }
        let Self::Arriving(arrival) = std::mem::replace(self, Self::Gone) else {
            return Ok(None);
        };
        let now = arrival.coordinator.clock.now();
        let (waiter, now) = Waiter::join(arrival, now)?;
        *self = Self::Waiting(waiter);
        Ok(Some(now))
    }
}

impl Future for Acquire {
    type Output = Result<Arc<Turn>, LockError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let mut joined = this.caller.arrive()?;
        loop {
            let Caller::Waiting(waiter) = &mut this.caller else {
                panic!("polled after it was ready");
            };
            // One look at the clock serves for all that happens at once.
            let now = joined
                .take()
                .unwrap_or_else(|| waiter.coordinator.clock.now());
            let come_again = match waiter.advance(cx, now) {
                Ok(Progress::Granted(turn)) => {
                    this.caller = Caller::Gone;
                    return Poll::Ready(Ok(turn));
                }
                Ok(Progress::Until(at)) => at,
                Ok(Progress::Armed) => return Poll::Pending,
                Err(error) => {
                    waiter.rejected(&error);
                    this.caller = Caller::Gone;
                    return Poll::Ready(Err(error));
                }
            };
            if this.timer_at.replace(come_again) != Some(come_again) {
                let at = Clock::timer_from(now, come_again);
                match &mut this.timer {
                    Some(timer) => timer.as_mut().reset(at),
                    none => *none = Some(Box::pin(tokio::time::sleep_until(at))),
                }
            }
            if let Some(timer) = &mut this.timer {
                ready!(timer.as_mut().poll(cx));
                this.timer_at = None;
            }
        }
    }
}

enum Progress {
    Granted(Arc<Turn>),
    /// Nothing to do but when woken, or at this time.
    Until(Timestamp),
    /// Nothing to do but when woken, as will be done in time.
    Armed,
}

/// A caller's place in the queue. Dropping it leaves the queue, and nothing behind.
#[derive(Debug)]
struct Waiter {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    place: Place,
    queued: bool,
    options: LockOptions,
    patient: bool,
    since: Timestamp,
    /// How many attempts at the key had had an outcome when this caller came.
    landed: u32,
    attempts: u32,
    /// When the storage last told this caller that somebody holds the lock.
    denied_at: Option<Timestamp>,
    flight: Option<Flight>,
    observed: Observed,
}

impl Waiter {
    /// With its place in the queue, and when it had that.
    fn join(arrival: Arrival, since: Timestamp) -> Result<(Self, Timestamp), LockError> {
        let Arrival {
            coordinator,
            name,
            options,
            patient,
        } = arrival;
        let mut observed =
            Observed::arrive(&coordinator.meters, coordinator.label(), name.key(), since);
        let joined = coordinator.join(&name, options, since);
        let (cell, place, landed, now) =
            joined.inspect_err(|error| observed.rejected(error, || since))?;
        let mut waiter = Self {
            coordinator,
            cell,
            place,
            queued: true,
            options,
            patient,
            since,
            landed,
            attempts: 0,
            denied_at: None,
            flight: None,
            observed,
        };
        waiter.observed.waits(&waiter.cell);
        Ok((waiter, now))
    }

    /// Goes on as far as possible now.
    fn advance(&mut self, cx: &mut Context<'_>, mut now: Timestamp) -> Result<Progress, LockError> {
        loop {
            let gives_up_at = self.gives_up_at();
            if let Some(flight) = &mut self.flight {
                match flight.poll(cx) {
                    Poll::Ready(reply) => {
                        // What a reply brings is judged by what the clock shows after it. One that
                        // came at once has taken no time.
                        if !flight.is_immediate() {
                            now = self.coordinator.clock.now();
                        }
                        self.landed(reply, now)?;
                    }
                    Poll::Pending => {
                        let (claim, limit) = (flight.claim, flight.limit);
                        if gives_up_at.is_some_and(|end| now >= end) {
                            return Err(self.given_up(now));
                        }
                        if now < limit {
                            let until = gives_up_at.map_or(limit, |end| end.min(limit));
                            let is_armed = self.coordinator.arm(
                                &self.cell,
                                claim,
                                until,
                                cx.waker(),
                                keeper::here,
                            );
                            return Ok(match is_armed {
                                true => Progress::Armed,
                                false => Progress::Until(until),
                            });
                        }
                        let timed_out = StorageError::new(StorageErrorKind::Timeout);
                        self.landed(Err(timed_out), now)?;
                    }
                }
            }

            if self.coordinator.is_draining() {
                return Err(LockError::Draining);
            }
            let end = self
                .gives_up_at()
                .unwrap_or(now + LockOptions::MAX_DURATION);
            if now >= end {
                return Err(self.given_up(now));
            }
            let hurried = self.options.max_wait().is_zero();
            let polled = Polled {
                place: self.place,
                since: self.since,
                ends: end,
                shared: hurried.then_some(self.landed),
                waker: cx.waker(),
            };
            match self.coordinator.step(&self.cell, &polled, now) {
                Next::Turn(turn) => {
                    self.queued = false;
                    turn.observe(std::mem::take(&mut self.observed), now);
                    return Ok(Progress::Granted(turn));
                }
                Next::Ask(attempt) => {
                    let flight = self
                        .coordinator
                        .send(&self.cell, attempt, self.options, now);
                    self.flight = Some(flight);
                }
                // Another caller's attempt, which this one found under way, brought nothing.
                Next::Over => return Err(self.given_up(now)),
                Next::WaitUntil(_) if hurried => return Err(self.given_up(now)),
                Next::WaitUntil(_) if !self.patient && self.storage_fails() => {
                    return Err(self.given_up(now));
                }
                Next::WaitUntil(at) => return Ok(Progress::Until(at.min(end))),
                Next::Wait if self.coordinator.rings(end) => return Ok(Progress::Armed),
                Next::Wait => return Ok(Progress::Until(end)),
            }
        }
    }

    /// The attempt has come to its end. An error if there is no point in another.
    fn landed(
        &mut self,
        reply: Result<AcquireReply, StorageError>,
        now: Timestamp,
    ) -> Result<(), LockError> {
        let Some(flight) = self.flight.take() else {
            return Ok(());
        };
        self.attempts += 1;
        let waits = !self.options.max_wait().is_zero();
        let verdict = match &reply {
            Ok(AcquireReply::Granted { .. } | AcquireReply::Unknown) => Ok(()),
            Ok(AcquireReply::Held { .. } | AcquireReply::Undecided) if waits => {
                self.denied_at = Some(now);
                Ok(())
            }
            Ok(denied @ (AcquireReply::Held { .. } | AcquireReply::Undecided)) => {
                Err(LockError::NotObtained(NotObtained {
                    waited: now.since(self.since),
                    attempts: self.attempts,
                    holder_ttl: match denied {
                        AcquireReply::Held { ttl, .. } => *ttl,
                        _ => None,
                    },
                }))
            }
            Err(error) if waits && self.patient && error.kind().is_transient() => Ok(()),
            Err(error) => Err(LockError::Storage(error.clone())),
        };
        let interval = self.options.interval();
        flight.land(&self.coordinator, &self.cell, interval, reply, now);
        verdict
    }

    fn rejected(&mut self, error: &LockError) {
        let clock = self.coordinator.clock;
        self.observed.rejected(error, || clock.now());
    }

    fn storage_fails(&self) -> bool {
        self.cell.lock().state.last_error().is_some()
    }

    /// A caller that does not wait for the lock waits for an answer of the storage. `None` while it
    /// asks itself: its attempt has its own limit.
    fn gives_up_at(&self) -> Option<Timestamp> {
        let wait = self.options.max_wait();
        if !wait.is_zero() {
            return Some(self.since + wait);
        }
        let limit = self.coordinator.limits.storage_timeout;
        self.flight.is_none().then(|| self.since + limit)
    }

    fn given_up(&self, now: Timestamp) -> LockError {
        let slot = self.cell.lock();
        // A storage that failed just once at the end has said before that somebody holds the lock.
        // One that has been away for longer is what the caller should hear of.
        let told = self
            .denied_at
            .is_some_and(|at| now.since(at) <= self.options.interval());
        if !told {
            if let Some(error) = slot.state.last_error() {
                return LockError::Storage(error.clone());
            }
            // Not a word since this caller came, to it or to the one that asks before it.
            let is_silent = slot.state.is_asking()
                && slot.state.landed() == self.landed
                && slot.state.holder_ttl(now).is_none();
            if is_silent || self.flight.is_some() && self.attempts == 0 {
                return LockError::Storage(StorageError::new(StorageErrorKind::Timeout));
            }
        }
        LockError::NotObtained(NotObtained {
            waited: now.since(self.since),
            attempts: self.attempts,
            holder_ttl: slot.state.holder_ttl(now),
        })
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.queued {
            self.coordinator.leave(&self.cell, self.place);
        }
        if let Some(flight) = self.flight.take() {
            let interval = self.options.interval();
            self.coordinator.follow(&self.cell, flight, interval);
        }
        self.observed.dropped(|| self.coordinator.clock.now());
    }
}
