//! A body that does what its test says, and remembers how it ended.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::{sync::mpsc, time::Instant};
use tower_distributed_lock::{HeldLock, error::BoxError};

/// What a body does next. That it ends is said by dropping the [`Teller`]'s sender.
pub(crate) enum Step {
    Data(&'static str),
    /// The body knows that this is its last frame.
    Last(&'static str),
    Trailers(HeaderMap),
    Error(&'static str),
    /// Time passes within one poll, as in a body that blocks its thread.
    Blocks(Duration),
}

/// What is known of a body's end.
#[derive(Clone, Debug, Default)]
pub(crate) struct End {
    /// Whether the lock was held when the body was dropped.
    held: Arc<Mutex<Option<bool>>>,
    polls: Arc<Mutex<Vec<Instant>>>,
}

impl End {
    /// `None`: the body is still there.
    pub(crate) fn held(&self) -> Option<bool> {
        *self.held.lock().unwrap()
    }

    pub(crate) fn last_poll(&self) -> Instant {
        *self.polls.lock().unwrap().last().expect("a poll")
    }
}

pub(crate) struct Told {
    steps: mpsc::UnboundedReceiver<Step>,
    pub(crate) length: Option<u64>,
    is_end: bool,
    lock: Option<HeldLock>,
    end: End,
    /// Wakes the body's task every millisecond of paused time.
    pub(crate) tick: Option<tokio::time::Interval>,
}

impl Told {
    pub(crate) fn new(lock: Option<HeldLock>) -> (Self, mpsc::UnboundedSender<Step>, End) {
        let (teller, steps) = mpsc::unbounded_channel();
        let end = End::default();
        let body = Self {
            steps,
            length: None,
            is_end: false,
            lock,
            end: end.clone(),
            tick: None,
        };
        (body, teller, end)
    }
}

impl Body for Told {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        assert!(!self.is_end, "polled after its end");
        self.end.polls.lock().unwrap().push(Instant::now());
        if let Some(tick) = &mut self.tick {
            while tick.poll_tick(cx).is_ready() {}
        }
        Poll::Ready(loop {
            match ready!(self.steps.poll_recv(cx)) {
                None => {
                    self.is_end = true;
                    break None;
                }
                Some(Step::Data(text)) => break Some(Ok(Frame::data(text.into()))),
                Some(Step::Last(text)) => {
                    self.is_end = true;
                    break Some(Ok(Frame::data(text.into())));
                }
                Some(Step::Trailers(trailers)) => break Some(Ok(Frame::trailers(trailers))),
                Some(Step::Error(text)) => break Some(Err(text.into())),
                Some(Step::Blocks(time)) => {
                    let advance = std::pin::pin!(tokio::time::advance(time));
                    let _ = advance.poll(cx);
                }
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.is_end
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map(SizeHint::with_exact).unwrap_or_default()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let held = self.lock.as_ref().map(HeldLock::is_held);
        *self.end.held.lock().unwrap() = Some(held.unwrap_or_default());
    }
}
