//! How long a request waited for its lock, for whoever looks at the response.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Response};

use crate::middleware::{
    hold::{Hold, RequestLock},
    on_reject::{OnReject, Rejection},
};

/// Puts the time that a request waited for its lock into its response, as
/// `Server-Timing: lock;dur=<ms>`; around another [`Hold`] or [`OnReject`], whose work it leaves as it
/// is. Made by [`DistributedLockLayer::server_timing`](super::DistributedLockLayer::server_timing).
pub struct ServerTiming<T> {
    inner: Arc<T>,
}

impl<T> ServerTiming<T> {
    pub(super) fn around(inner: Arc<T>) -> Self {
        Self { inner }
    }
}

impl<H, B> Hold<Response<B>> for ServerTiming<H>
where
    H: Hold<Response<B>>,
{
    fn keep(
        &self,
        mut response: Response<B>,
        lock: RequestLock,
    ) -> (Response<B>, Option<RequestLock>) {
        tell(response.headers_mut(), lock.waited());
        self.inner.keep(response, lock)
    }
}

impl<R, Req, B, E> OnReject<Req, Response<B>, E> for ServerTiming<R>
where
    R: OnReject<Req, Response<B>, E>,
{
    type Context = R::Context;

    fn context(&self, request: &Req) -> R::Context {
        self.inner.context(request)
    }

    fn patience(&self, request: &Req) -> Option<Duration> {
        self.inner.patience(request)
    }

    fn reject(&self, context: R::Context, rejection: Rejection) -> Result<Response<B>, E> {
        let waited = match &rejection {
            Rejection::NotObtained(error) => Some(error.waited),
            Rejection::TooManyWaiters(_) => Some(Duration::ZERO),
            // Either there was no wait, or the lock was not what took the time.
            _ => None,
        };
        let mut answer = self.inner.reject(context, rejection);
        if let (Ok(response), Some(waited)) = (&mut answer, waited) {
            tell(response.headers_mut(), waited);
        }
        answer
    }
}

fn tell(headers: &mut HeaderMap, waited: Duration) {
    let ms = waited.as_micros() as f64 / 1_000.0;
    if let Ok(value) = HeaderValue::try_from(format!("lock;dur={ms}")) {
        // Others may have something to tell as well: the header is a list, over as many lines as
        // there are.
        headers.append(HeaderName::from_static("server-timing"), value);
    }
}

// Written by hand: what is inside is shared, so it need not be `Clone`.
impl<T> Clone for ServerTiming<T> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<T> fmt::Debug for ServerTiming<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTiming").finish_non_exhaustive()
    }
}
