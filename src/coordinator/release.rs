//! A claim on its way out of the storage.
//!
//! It is sent again and again if the storage does not answer, until the claim has run out by
//! itself. However it ends, the key's state machine is told, once; and so it is told of the place
//! in the queue that the first sending asked for.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    runtime::{self, Handle},
    sync::oneshot,
    time::{Sleep, sleep, timeout},
};
use tracing::Span;

use crate::{
    clock::Timestamp,
    coordinator::{
        Coordinator, backoff, keeper,
        key_events::{GiveBack, Outcome},
        lease::Claim,
        meters::Operation,
        observe,
        table::Cell,
    },
    error::{LossReason, StorageError, StorageErrorKind},
    storage::{self, Call, ReleaseReply, ReleaseRequest, Requeue},
};

/// A release that is not answered is sent again at least this often.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

type Answer = Result<ReleaseReply, StorageError>;

/// A release that has been sent, and what the storage says to it. If it cannot be asked, the keeper
/// asks again.
///
/// Dropped before its end, it is followed by the keeper.
pub(crate) struct Release(State);

enum State {
    Sent(Sent),
    /// The keeper follows it, and tells.
    Followed(oneshot::Receiver<Answer>),
    Answered(Answer),
    Over,
}

struct Sent {
    errand: Errand,
    call: Call<Answer>,
    /// The runtime from which it was sent.
    here: Option<runtime::Id>,
    /// Since it is waited for.
    limit: Option<Limit>,
}

impl Release {
    /// Sends it. Sent from here, it is ahead of whatever the caller sends next, such as an acquire
    /// of the same key; and no other task has to wake up before the next process gets its turn.
    pub(super) fn send(
        coordinator: &Arc<Coordinator>,
        cell: &Arc<Cell>,
        give_back: GiveBack,
    ) -> Self {
        let mut call =
            storage::release(&coordinator.storage, request(coordinator, cell, &give_back));
        if let Call::Done(Some(Ok(ReleaseReply::Released))) = call
            && give_back.rejoin.is_none()
        {
            coordinator.release_is_done(cell, give_back.claim);
            return Self(State::Answered(Ok(ReleaseReply::Released)));
        }
        let mut errand = Errand::new(coordinator, cell, give_back);
        let mut here = None;
        let can_be_sent = call.is_done() || {
            coordinator.keeper.ensure_running(coordinator);
            here = keeper::here();
            coordinator.keeper.is_running() && here.is_some()
        };
        // Only the call itself is polled: a timer made here would end with this runtime, which need
        // not be the one that follows it.
        if can_be_sent {
            let mut cx = Context::from_waker(Waker::noop());
            // A storage with timers of its own panics in a runtime that has none, or that has ended
            // while the keeper goes on in another. This may be a `drop`, where nobody can catch
            // that.
            match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut call).poll(&mut cx))) {
                Ok(Poll::Ready(Ok(reply))) => {
                    errand.answered(&Ok(reply));
                    return Self(State::Answered(Ok(reply)));
                }
                Ok(Poll::Ready(failed)) => call = Call::done(failed),
                Ok(Poll::Pending) => {}
                Err(_) => call = errand.call(),
            }
        }
        Self(State::Sent(Sent {
            errand,
            call,
            here,
            limit: None,
        }))
    }

    /// A claim that is not sent out, but left to run out by itself.
    pub(super) fn leave(
        coordinator: &Arc<Coordinator>,
        cell: &Arc<Cell>,
        give_back: GiveBack,
    ) -> Self {
        let answer = Ok(ReleaseReply::NotOurs);
        // Those who wait here stand behind it as behind anybody else's.
        Errand::new(coordinator, cell, give_back).answered(&answer);
        Self(State::Answered(answer))
    }

    /// Leaves it to the keeper.
    fn hand_over(&mut self) {
        if let State::Sent(sent) = std::mem::replace(&mut self.0, State::Over) {
            let coordinator = Arc::clone(&sent.errand.coordinator);
            let job = Box::pin(sent.errand.run(sent.call));
            coordinator.keeper.submit(&coordinator, job);
        }
    }
}

impl Future for Release {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        if let State::Sent(sent) = &mut self.0
            && !sent.is_waited_for()
        {
            let (done, told) = oneshot::channel();
            sent.errand.done = Some(done);
            self.hand_over();
            self.0 = State::Followed(told);
        }
        let answer = match &mut self.0 {
            State::Sent(sent) => ready!(sent.poll(cx)),
            // An error: the runtime that was to carry it out has ended.
            State::Followed(told) => {
                ready!(Pin::new(told).poll(cx)).unwrap_or_else(|_| Err(unavailable()))
            }
            State::Answered(answer) => answer.clone(),
            State::Over => panic!("polled after it was ready"),
        };
        match &answer {
            Ok(_) => self.0 = State::Over,
            Err(_) => self.hand_over(),
        }
        Poll::Ready(answer)
    }
}

impl Sent {
    /// Whether whoever asks can wait for the answer itself.
    fn is_waited_for(&mut self) -> bool {
        if self.limit.is_none() && self.errand.give_back.rejoin.is_none() {
            self.limit = Limit::new(&self.errand, self.here);
        }
        // Others of this process wait for the answer as well, if it is about their place: then it
        // must not depend on how often the release is polled.
        self.limit.is_some()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Answer> {
        let answer = match (Pin::new(&mut self.call).poll(cx), &mut self.limit) {
            (Poll::Ready(answer), _) => answer,
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(limit)) => {
                ready!(limit.poll(&self.errand, cx));
                Err(StorageError::new(StorageErrorKind::Timeout))
            }
        };
        self.errand.answered(&answer);
        if let Err(error) = &answer {
            self.call = Call::done(Err(error.clone()));
        }
        Poll::Ready(answer)
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// For how long a release is waited for.
struct Limit {
    at: Timestamp,
    here: Option<runtime::Id>,
    /// Where the keeper does not keep it.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Limit {
    /// `None` outside of a runtime, and in one that has no timers.
    fn new(errand: &Errand, here: Option<runtime::Id>) -> Option<Self> {
        let coordinator = &errand.coordinator;
        let timeout = coordinator.limits.storage_timeout;
        let timer = match coordinator.keeper.is_on(here) {
            true => None,
            false => Some(Box::pin(timer(timeout)?)),
        };
        Some(Self {
            at: coordinator.clock.now() + timeout,
            here,
            timer,
        })
    }

    fn poll(&mut self, errand: &Errand, cx: &mut Context<'_>) -> Poll<()> {
        let (coordinator, cell) = (&errand.coordinator, &errand.cell);
        if let Some(timer) = &mut self.timer {
            return timer.as_mut().poll(cx);
        }
        let is_armed = coordinator.arm(cell, errand.give_back.claim, self.at, cx.waker(), || {
            self.here
        });
        let now = coordinator.clock.now();
        if now >= self.at {
            return Poll::Ready(());
        }
        if is_armed {
            return Poll::Pending;
        }
        match timer(self.at.since(now)) {
            Some(own) => self.timer.insert(Box::pin(own)).as_mut().poll(cx),
            None => Poll::Ready(()),
        }
    }
}

/// `None` outside of a runtime, and in one that has no timers.
fn timer(after: Duration) -> Option<Sleep> {
    Handle::try_current().ok()?;
    // There is no other way to find out.
    catch_unwind(|| sleep(after)).ok()
}

fn unavailable() -> StorageError {
    StorageError::new(StorageErrorKind::Unavailable)
}

/// What the storage is asked.
fn request(coordinator: &Coordinator, cell: &Cell, give_back: &GiveBack) -> ReleaseRequest {
    ReleaseRequest {
        name: cell.name.clone(),
        token: give_back.claim.token,
        ttl: coordinator.storage_ttl(give_back.claim.ttl),
        wanted: give_back.wanted,
        requeue: give_back.rejoin.as_ref().map(|rejoin| Requeue {
            token: rejoin.claim.token,
            ttl: coordinator.storage_ttl(rejoin.claim.ttl),
            place: coordinator.place(rejoin.claim.ttl, rejoin.interval),
            fencing: coordinator.fencing(rejoin.fencing),
        }),
        quiet: give_back.quiet,
    }
}

impl Coordinator {
    /// A release has come to its end, whatever the storage said.
    fn release_is_done(self: &Arc<Self>, cell: &Arc<Cell>, claim: Claim) {
        let alarm = self.update(cell, |slot| (slot.disarm(claim), slot.state.release_done()));
        drop(alarm);
    }
}

/// What is to be done about a claim that is given up, whoever does it.
struct Errand {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    /// Its `rejoin` and its `was_held` are there until the first answer: a release that was carried
    /// out before it finds nothing either.
    give_back: GiveBack,
    /// Who is told the first answer.
    done: Option<oneshot::Sender<Answer>>,
}

impl Errand {
    fn new(coordinator: &Arc<Coordinator>, cell: &Arc<Cell>, give_back: GiveBack) -> Self {
        Self {
            coordinator: Arc::clone(coordinator),
            cell: Arc::clone(cell),
            give_back,
            done: None,
        }
    }

    /// The call, to be sent by its first poll.
    fn call(&self) -> Call<Answer> {
        let request = request(&self.coordinator, &self.cell, &self.give_back);
        storage::release(&self.coordinator.storage, request)
    }

    /// Tells those who wait for the answer.
    fn answered(&mut self, answer: &Answer) {
        if let Some(rejoin) = self.give_back.rejoin.take() {
            let outcome = match answer {
                Ok(ReleaseReply::Requeued { ttl, stamp }) => Outcome::Denied {
                    holder_ttl: Some(*ttl),
                    queued: Some(*stamp),
                },
                Ok(_) => Outcome::NotQueued,
                Err(error) => Outcome::Failed(error.clone()),
            };
            let now = self.coordinator.clock.now();
            self.coordinator
                .replied(&self.cell, rejoin.claim, outcome, rejoin.interval, now);
        }
        if std::mem::take(&mut self.give_back.was_held)
            && matches!(answer, Ok(ReleaseReply::NotOurs))
        {
            self.coordinator.meters.found_lost();
            let key = self.cell.name.key();
            observe::warn_of_loss(Span::none(), key, LossReason::NotOurs);
        }
        if let Some(done) = self.done.take() {
            // Nobody listens if the caller of `unlock` has gone.
            let _ = done.send(answer.clone());
        }
    }

    /// Follows the release to its end, and sends it again if need be.
    async fn run(mut self, mut call: Call<Answer>) {
        let coordinator = Arc::clone(&self.coordinator);
        let runs_out = coordinator.clock.now() + coordinator.storage_ttl(self.give_back.claim.ttl);
        let mut failures = 0;
        loop {
            let answer = timeout(coordinator.limits.storage_timeout, call).await;
            let answer = answer.unwrap_or(Err(StorageError::new(StorageErrorKind::Timeout)));
            self.answered(&answer);
            let Err(error) = answer else { return };
            coordinator.meters.storage_error(Operation::Release, &error);
            if !error.kind().is_transient() || coordinator.clock.now() >= runs_out {
                let key = self.cell.name.key();
                tracing::warn!(key, %error, "release failed, the ttl will free the lock");
                return;
            }
            let pause = backoff::after_failure(failures, LONGEST_PAUSE, fastrand::f64());
            failures += 1;
            sleep(pause).await;
            call = self.call();
        }
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        // Only the end of a runtime leaves anybody without an answer.
        self.answered(&Err(unavailable()));
        let claim = self.give_back.claim;
        self.coordinator.release_is_done(&self.cell, claim);
    }
}
