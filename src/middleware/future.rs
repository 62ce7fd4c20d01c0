//! The way of one request: wait for the lock, run the handler, give the lock back.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use pin_project::pin_project;
use tower_service::Service;
use tracing::{Instrument, Span, instrument::Instrumented};

use crate::{
    error::{BoxError, LockError, LossReason, StorageError},
    lock::Unlocked,
    middleware::{
        guards::{Acquire, Guards},
        held_lock::{HeldLock, OnAcquired},
        hold::{Hold, HoldToHead, RequestLock},
        on_reject::{OnReject, Rejection},
        patience::shorter,
        request_key::RequestKey,
        settings::{OnLoss, OnStorageFailure, Settings},
    },
};

type Answer<S, Req> = Result<<S as Service<Req>>::Response, <S as Service<Req>>::Error>;
type Unlocking = Pin<Box<dyn Future<Output = Result<Unlocked, StorageError>> + Send>>;

/// The response future of [`DistributedLock`](super::DistributedLock).
///
/// Dropping it at any time ends the handler, if it runs, and gives back the lock or the place in
/// the queue.
///
/// If the handler took less than 100 µs, and somebody else in this process waited for the lock and
/// has it now, that one mostly runs first: the future is pending once more when the handler is done
/// and the lock given back, and woken at once. Dropped there, it loses the response and nothing else.
/// Not with [`await_release`](super::DistributedLockLayer::await_release), nor where the response
/// keeps the lock.
///
/// # Panics
///
/// If it is polled again after it has resolved, or has to wait for a lock and is polled outside of a
/// tokio runtime with timers.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct ResponseFuture<S, Req, K, R, A, H = HoldToHead>
where
    S: Service<Req>,
    R: OnReject<Req, S::Response, S::Error>,
{
    #[pin]
    state: State<S, Req, R::Context>,
    settings: Arc<Settings<K, R, A, H>>,
}

#[pin_project(project = StateProj)]
#[allow(
    clippy::large_enum_variant,
    reason = "a smaller enum would cost every request an allocation"
)]
enum State<S, Req, C>
where
    S: Service<Req>,
{
    /// The request waits for its lock.
    Waiting {
        #[pin]
        lock: Acquire,
        waiting: Option<Waiting<S, Req, C>>,
    },
    /// The handler runs. Fields are dropped in this order: the work ends before the lock is given
    /// back.
    Running {
        /// In the lock's span, so that what the handler logs carries the key.
        #[pin]
        response: Instrumented<S::Future>,
        held: Option<Held<C>>,
    },
    /// The response is there and waits for the lock's release.
    Releasing {
        unlocking: Unlocking,
        answer: Option<(Answer<S, Req>, C)>,
    },
    /// The response is there, and the lock is another's, who runs first. Otherwise that one, and all
    /// behind it, would wait for what is done with this response, such as writing it.
    LettingPass(Option<Answer<S, Req>>),
    /// The request cannot be served.
    Rejecting(Option<(C, Rejection)>),
    Done,
}

/// A request that has no lock yet.
struct Waiting<S, Req, C> {
    service: S,
    request: Req,
    context: C,
}

/// The lock of a request that is being served.
struct Held<C> {
    lock: RequestLock,
    context: C,
}

impl<S, Req, K, R, A, H> ResponseFuture<S, Req, K, R, A, H>
where
    S: Service<Req>,
    R: OnReject<Req, S::Response, S::Error>,
    A: OnAcquired<Req>,
{
    pub(super) fn new(
        mut service: S,
        mut request: Req,
        key: Result<RequestKey, BoxError>,
        settings: Arc<Settings<K, R, A, H>>,
    ) -> Self {
        let patience = || {
            let (on_reject, on_acquired) = (&settings.on_reject, &settings.on_acquired);
            shorter(on_reject.patience(&request), on_acquired.patience(&request))
        };
        let lock = key.map_err(Rejection::InvalidKey);
        let state = match lock.and_then(|key| settings.policy.lock(&key, patience)) {
            Ok(None) => {
                settings.on_acquired.on_skipped(&mut request);
                State::Running {
                    response: service.call(request).instrument(Span::none()),
                    held: None,
                }
            }
            Ok(Some(lock)) => State::Waiting {
                lock,
                waiting: Some(Waiting {
                    context: settings.on_reject.context(&request),
                    service,
                    request,
                }),
            },
            Err(rejection) => {
                let coordinator = settings.policy.factory.coordinator();
                match rejection {
                    Rejection::InvalidKey(_) => coordinator.key_was_invalid(),
                    Rejection::NotObtained(_) => coordinator.was_out_of_time(),
                    _ => {}
                }
                let context = settings.on_reject.context(&request);
                State::Rejecting(Some((context, rejection)))
            }
        };
        Self { state, settings }
    }
}

impl<S, Req, K, R, A, H> Future for ResponseFuture<S, Req, K, R, A, H>
where
    S: Service<Req>,
    R: OnReject<Req, S::Response, S::Error>,
    A: OnAcquired<Req>,
    H: Hold<S::Response>,
{
    type Output = Answer<S, Req>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let settings = &**this.settings;
        loop {
            let next = match this.state.as_mut().project() {
                StateProj::Waiting { lock, waiting } => {
                    let result = ready!(lock.poll(cx));
                    waiting
                        .take()
                        .unwrap_or_else(polled_again)
                        .serve(result, settings)
                }
                StateProj::Running {
                    response,
                    held: None,
                } => return response.poll(cx),
                StateProj::Running {
                    response,
                    held: slot @ Some(_),
                } => {
                    let Some(held) = slot else { continue };
                    // Before the poll: the handler does nothing at or past the deadline. And after
                    // it, because one poll may have taken longer than the lock lasted.
                    let mut answer = None;
                    if held.lock.cancelled().is_none() {
                        match response.poll(cx) {
                            Poll::Ready(ready) => answer = Some(ready),
                            // Only now is there anybody to be woken.
                            Poll::Pending if held.lock.poll_cancelled(cx).is_pending() => {
                                return Poll::Pending;
                            }
                            Poll::Pending => {}
                        }
                    }
                    let lost = held.lock.cancelled();
                    let Held { lock, context } = slot.take().unwrap_or_else(polled_again);
                    // The work ends before the lock is given back.
                    this.state.set(State::Done);
                    match (lost, answer) {
                        (None, Some(answer)) => {
                            let (answer, lock) = settings.keep(answer, lock);
                            match lock {
                                Some(lock) if settings.policy.await_release => State::Releasing {
                                    unlocking: Box::pin(lock.unlock()),
                                    answer: Some((answer, context)),
                                },
                                Some(lock) if lock.hand_over() && lock.is_brief() => {
                                    // The runtime has others run, and comes back.
                                    cx.waker().wake_by_ref();
                                    this.state.set(State::LettingPass(Some(answer)));
                                    return Poll::Pending;
                                }
                                _ => return Poll::Ready(answer),
                            }
                        }
                        (lost, _) => {
                            let reason = lost.unwrap_or(LossReason::Expired);
                            State::Rejecting(Some((context, Rejection::Lost(reason))))
                        }
                    }
                }
                StateProj::Releasing { unlocking, answer } => {
                    let unlocked = ready!(unlocking.as_mut().poll(cx));
                    let (answer, context) = answer.take().unwrap_or_else(polled_again);
                    match unlocked {
                        Ok(Unlocked::Lost) if settings.policy.on_loss == OnLoss::Cancel => {
                            let rejection = Rejection::Lost(LossReason::NotOurs);
                            State::Rejecting(Some((context, rejection)))
                        }
                        // A release that failed goes on in the background.
                        _ => return Poll::Ready(answer),
                    }
                }
                StateProj::LettingPass(answer) => {
                    return Poll::Ready(answer.take().unwrap_or_else(polled_again));
                }
                StateProj::Rejecting(rejecting) => {
                    let (context, rejection) = rejecting.take().unwrap_or_else(polled_again);
                    match &rejection {
                        // A mistake in how the service is put together: once said is enough, or
                        // whoever scans for paths fills the log.
                        Rejection::InvalidKey(_)
                            if rejection.status().is_server_error()
                                && !settings.policy.complained.swap(true, Relaxed) =>
                        {
                            tracing::error!(%rejection, "request rejected");
                        }
                        _ => tracing::debug!(%rejection, "request rejected"),
                    }
                    return Poll::Ready(settings.on_reject.reject(context, rejection));
                }
                StateProj::Done => polled_again(),
            };
            this.state.set(next);
        }
    }
}

impl<S, Req, C> Waiting<S, Req, C>
where
    S: Service<Req>,
{
    /// The wait is over.
    fn serve<K, R, A, H>(
        self,
        result: Result<Guards, LockError>,
        settings: &Settings<K, R, A, H>,
    ) -> State<S, Req, C>
    where
        A: OnAcquired<Req>,
    {
        let Self {
            mut service,
            mut request,
            context,
        } = self;
        match result {
            Ok(guards) => {
                settings
                    .on_acquired
                    .on_acquired(&mut request, HeldLock::new(&guards));
                let span = guards.span();
                let lock = RequestLock::new(guards, settings.policy.on_loss);
                let response = span.in_scope(|| service.call(request));
                State::Running {
                    response: response.instrument(span),
                    held: Some(Held { lock, context }),
                }
            }
            Err(LockError::Storage(error))
                if settings.policy.on_storage_failure == OnStorageFailure::FailOpen =>
            {
                tracing::warn!(%error, "serving a request without its lock");
                settings.on_acquired.on_skipped(&mut request);
                State::Running {
                    response: service.call(request).instrument(Span::none()),
                    held: None,
                }
            }
            Err(error) => State::Rejecting(Some((context, error.into()))),
        }
    }
}

impl<K, R, A, H> Settings<K, R, A, H> {
    /// What becomes of the lock of a request that has its answer.
    fn keep<Res, Err>(
        &self,
        answer: Result<Res, Err>,
        lock: RequestLock,
    ) -> (Result<Res, Err>, Option<RequestLock>)
    where
        H: Hold<Res>,
    {
        match answer {
            Ok(response) => {
                let (response, lock) = self.hold.keep(response, lock);
                (Ok(response), lock)
            }
            Err(error) => (Err(error), Some(lock)),
        }
    }
}

/// A future that has given its result may do anything when it is polled again; this is what the
/// standard library's do.
fn polled_again<T>() -> T {
    panic!("`ResponseFuture` polled after completion")
}

impl<S, Req, K, R, A, H> fmt::Debug for ResponseFuture<S, Req, K, R, A, H>
where
    S: Service<Req>,
    R: OnReject<Req, S::Response, S::Error>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Waiting { .. } => "waiting",
            State::Running { held: Some(_), .. } => "running",
            State::Running { held: None, .. } => "running without a lock",
            State::Releasing { .. } => "releasing",
            State::LettingPass(_) => "letting the next pass",
            State::Rejecting(_) => "rejecting",
            State::Done => "done",
        };
        f.debug_struct("ResponseFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
