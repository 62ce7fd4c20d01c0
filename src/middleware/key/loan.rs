//! The head of a request, as axum's extractors want it.

use std::{
    mem::swap,
    pin::pin,
    task::{Context, Poll, Waker},
};

use axum_core::extract::FromRequestParts;
use http::{Request, request::Parts};

/// The head of a request, taken out of it without a copy. Dropping this puts it back, also in a
/// panic.
pub(super) struct Loan<'a, B> {
    request: &'a mut Request<B>,
    parts: Parts,
}

impl<'a, B> Loan<'a, B> {
    pub(super) fn of(request: &'a mut Request<B>) -> Self {
        // Of an empty request, which has allocated nothing.
        let (parts, ()) = Request::new(()).into_parts();
        let mut loan = Self { request, parts };
        loan.exchange();
        loan
    }

    /// Runs an extractor that needs no waiting. `None` for one that does.
    pub(super) fn extract<T, S>(&mut self, state: &S) -> Option<Result<T, T::Rejection>>
    where
        T: FromRequestParts<S>,
    {
        let extracting = pin!(T::from_request_parts(&mut self.parts, state));
        match extracting.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result),
            Poll::Pending => None,
        }
    }

    fn exchange(&mut self) {
        let Self { request, parts } = self;
        swap(request.method_mut(), &mut parts.method);
        swap(request.uri_mut(), &mut parts.uri);
        swap(request.version_mut(), &mut parts.version);
        swap(request.headers_mut(), &mut parts.headers);
        swap(request.extensions_mut(), &mut parts.extensions);
    }
}

impl<B> Drop for Loan<'_, B> {
    fn drop(&mut self) {
        self.exchange();
    }
}
