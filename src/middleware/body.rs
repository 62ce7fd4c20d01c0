//! A response body that is under a lock.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;

use crate::{
    error::LossReason,
    middleware::{
        hold::{Hold, HoldToBodyEnd, RequestLock},
        on_reject::{Protocol, Rejection},
    },
};

/// A body type that can hold a lock and stays what it is.
///
/// Implemented for the bodies of axum and tonic, and for the boxed bodies of `http-body-util` if
/// their errors can be made of a [`LossReason`], as boxed errors can. For a body type of your own:
///
/// ```
/// use std::{error::Error, pin::Pin, task::{Context, Poll}};
///
/// use bytes::Bytes;
/// use http_body::{Body, Frame};
/// use tower_distributed_lock::{error::LossReason, middleware::{HeldBody, HoldBody}};
///
/// enum Page {
///     Text(Bytes),
///     Stream(Pin<Box<dyn Body<Data = Bytes, Error = Box<dyn Error + Send + Sync>> + Send>>),
/// }
///
/// impl HoldBody for Page {
///     fn wrap(body: HeldBody<Self>) -> Self {
///         Page::Stream(Box::pin(body))
///     }
///
///     fn lost(reason: LossReason) -> Self::Error {
///         reason.into()
///     }
/// }
/// # impl Body for Page {
/// #     type Data = Bytes;
/// #     type Error = Box<dyn Error + Send + Sync>;
/// #     fn poll_frame(
/// #         self: Pin<&mut Self>,
/// #         cx: &mut Context<'_>,
/// #     ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
/// #         match self.get_mut() {
/// #             Page::Text(text) if text.is_empty() => Poll::Ready(None),
/// #             Page::Text(text) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(text))))),
/// #             Page::Stream(body) => body.as_mut().poll_frame(cx),
/// #         }
/// #     }
/// # }
/// ```
pub trait HoldBody: Body + Sized {
    /// Makes a body that has a lock one of this type. It has to keep it: the lock is released when
    /// it is dropped.
    fn wrap(body: HeldBody<Self>) -> Self;

    /// The error that ends a body whose lock is lost, so that the client does not take what it has
    /// got for the whole.
    fn lost(reason: LossReason) -> Self::Error;
}

impl<B: HoldBody> Hold<Response<B>> for HoldToBodyEnd {
    fn keep(&self, response: Response<B>, lock: RequestLock) -> (Response<B>, Option<RequestLock>) {
        // A body type may throw away what is wrapped into it if that is at its end already.
        if response.body().is_end_stream() {
            return (response, Some(lock));
        }
        let protocol = Protocol::of_headers(response.headers());
        let response = response.map(|body| {
            B::wrap(HeldBody {
                running: Some(body),
                lock: Some(lock),
                protocol,
            })
        });
        (response, None)
    }
}

/// A body that gives a lock back at its end: after its last frame or an error, or when it is
/// dropped. Made by [`HoldToBodyEnd`].
///
/// If the lock is lost before, and the layer does not only
/// [signal](super::OnLoss::Signal) that, the body is dropped and ends as one that was cut off: with
/// an error, or, for a gRPC response, with trailers that say `ABORTED`.
#[pin_project]
pub struct HeldBody<B> {
    // In this order: the work ends before the lock is given back.
    #[pin]
    running: Option<B>,
    lock: Option<RequestLock>,
    protocol: Protocol,
}

impl<B: HoldBody> Body for HeldBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let (Some(mut running), Some(lock)) = (this.running.as_mut().as_pin_mut(), &this.lock)
        else {
            return Poll::Ready(None);
        };
        // Before the poll: the body does nothing at or past the deadline. And after it, because one
        // poll may have taken longer than the lock lasted.
        let mut frame = None;
        let mut lost = match lock.poll_cancelled(cx) {
            Poll::Ready(reason) => Some(reason),
            Poll::Pending => None,
        };
        if lost.is_none() {
            frame = ready!(running.as_mut().poll_frame(cx));
            lost = lock.cancelled();
        }
        let ends = match &frame {
            Some(Ok(frame)) => frame.is_trailers() || running.is_end_stream(),
            Some(Err(_)) | None => true,
        };
        if ends || lost.is_some() {
            // The work ends before the lock is given back.
            this.running.set(None);
            *this.lock = None;
        }
        Poll::Ready(match lost {
            None => frame,
            Some(reason) => Some(cut_off::<B>(*this.protocol, reason)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.running.as_ref().is_none_or(B::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.running {
            Some(running) => running.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}

/// The last that a client sees of a body whose lock is lost.
fn cut_off<B: HoldBody>(
    protocol: Protocol,
    reason: LossReason,
) -> Result<Frame<B::Data>, B::Error> {
    let rejection = Rejection::Lost(reason);
    tracing::debug!(%rejection, "response body cut off");
    match protocol {
        Protocol::Http => Err(B::lost(reason)),
        Protocol::Grpc => {
            let mut trailers = HeaderMap::with_capacity(2);
            rejection.write_grpc_status(&mut trailers);
            Ok(Frame::trailers(trailers))
        }
    }
}

impl<B> fmt::Debug for HeldBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldBody")
            .field("lock", &self.lock)
            .finish_non_exhaustive()
    }
}

mod boxed {
    use bytes::Buf;
    use http_body_util::combinators::{BoxBody, UnsyncBoxBody};

    use super::{HeldBody, HoldBody};
    use crate::error::LossReason;

    impl<D, E> HoldBody for BoxBody<D, E>
    where
        D: Buf + 'static,
        E: From<LossReason> + 'static,
    {
        fn wrap(body: HeldBody<Self>) -> Self {
            Self::new(body)
        }

        fn lost(reason: LossReason) -> E {
            reason.into()
        }
    }

    impl<D, E> HoldBody for UnsyncBoxBody<D, E>
    where
        D: Buf + 'static,
        E: From<LossReason> + 'static,
    {
        fn wrap(body: HeldBody<Self>) -> Self {
            Self::new(body)
        }

        fn lost(reason: LossReason) -> E {
            reason.into()
        }
    }
}

#[cfg(feature = "axum")]
impl HoldBody for axum_core::body::Body {
    fn wrap(body: HeldBody<Self>) -> Self {
        Self::new(body)
    }

    fn lost(reason: LossReason) -> axum_core::Error {
        axum_core::Error::new(reason)
    }
}

#[cfg(feature = "tonic")]
impl HoldBody for tonic::body::Body {
    fn wrap(body: HeldBody<Self>) -> Self {
        Self::new(body)
    }

    fn lost(reason: LossReason) -> tonic::Status {
        let rejection = Rejection::Lost(reason);
        tonic::Status::aborted(rejection.public_message())
    }
}
