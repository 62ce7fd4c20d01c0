//! What a request gets that could not have its lock.

use std::{error::Error as StdError, fmt, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};

use crate::{
    error::{
        BoxError, LockError, LossReason, NotObtained, StorageError, TooManyWaiters, WaiterScope,
    },
    middleware::{key::KeyRejected, patience::client_patience},
};

/// Why a request was not served. An [`OnReject`] makes an answer of it.
///
/// A test of a hook makes one of a [`LockError`]:
///
/// ```
/// use http::{StatusCode, header::RETRY_AFTER};
/// use tower_distributed_lock::{LockFactory, LockOptions, middleware::Rejection, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let report = LockFactory::new(MemoryStorage::new()).create_lock("report")?;
/// let _guard = report.lock(LockOptions::default()).await?;
/// let error = report.try_lock(LockOptions::default()).await.unwrap_err();
///
/// let rejection = Rejection::from(error);
/// assert_eq!(rejection.reason(), "not_obtained");
/// assert_eq!(rejection.status(), StatusCode::LOCKED);
/// // The holder's lock lasts up to 10 s more, should it have crashed.
/// assert!(rejection.retry_after().is_some());
/// assert!(rejection.headers().contains_key(RETRY_AFTER));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Rejection {
    /// Somebody else held the lock for as long as the request was ready to wait. It was not served.
    NotObtained(NotObtained),
    /// As many requests as allowed wait already. It was not served.
    TooManyWaiters(TooManyWaiters),
    /// The storage could not be asked. The request was not served.
    Storage(StorageError),
    /// This process shuts down. The request was not served.
    Draining,
    /// The lock was lost while the request was being served. Its work was cut off, or ended too
    /// late: what it has done so far is done.
    Lost(LossReason),
    /// One of several locks was lost while the request still waited for the others. It was not
    /// served.
    LostWhileWaiting(LossReason),
    /// The key function failed. The request was not served. If the error is a [`KeyRejected`], it
    /// says with which status.
    InvalidKey(BoxError),
}

impl Rejection {
    /// The HTTP status for it. See the table in the [module documentation](super).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotObtained(_) => StatusCode::LOCKED,
            Self::TooManyWaiters(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Storage(_) | Self::Draining | Self::Lost(_) | Self::LostWhileWaiting(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::InvalidKey(_) => {
                let rejected = self.key_rejected();
                rejected.map_or(StatusCode::BAD_REQUEST, KeyRejected::status)
            }
        }
    }

    /// The gRPC status code for it. See the table in the [module documentation](super).
    pub fn grpc_code(&self) -> u8 {
        const INVALID_ARGUMENT: u8 = 3;
        const NOT_FOUND: u8 = 5;
        const PERMISSION_DENIED: u8 = 7;
        const RESOURCE_EXHAUSTED: u8 = 8;
        const FAILED_PRECONDITION: u8 = 9;
        const ABORTED: u8 = 10;
        const INTERNAL: u8 = 13;
        const UNAVAILABLE: u8 = 14;
        const UNAUTHENTICATED: u8 = 16;
        match self {
            Self::NotObtained(_) | Self::Lost(_) | Self::LostWhileWaiting(_) => ABORTED,
            Self::TooManyWaiters(_) => RESOURCE_EXHAUSTED,
            Self::Storage(_) | Self::Draining => UNAVAILABLE,
            Self::InvalidKey(_) => match self.status() {
                StatusCode::UNAUTHORIZED => UNAUTHENTICATED,
                StatusCode::FORBIDDEN => PERMISSION_DENIED,
                StatusCode::NOT_FOUND => NOT_FOUND,
                StatusCode::CONFLICT => ABORTED,
                StatusCode::PRECONDITION_FAILED => FAILED_PRECONDITION,
                StatusCode::TOO_MANY_REQUESTS => RESOURCE_EXHAUSTED,
                StatusCode::SERVICE_UNAVAILABLE => UNAVAILABLE,
                status if status.is_server_error() => INTERNAL,
                _ => INVALID_ARGUMENT,
            },
        }
    }

    /// A word for programs, for logs and for answers: `not_obtained`, `too_many_waiters`,
    /// `storage`, `draining`, `lock_lost` or `invalid_key`. It stays as it is in later
    /// versions. The [module documentation](super#rejections) has a hook that answers with it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotObtained(_) => "not_obtained",
            Self::TooManyWaiters(_) => "too_many_waiters",
            Self::Storage(_) => "storage",
            Self::Draining => "draining",
            Self::Lost(_) | Self::LostWhileWaiting(_) => "lock_lost",
            Self::InvalidKey(_) => "invalid_key",
        }
    }

    /// When it makes sense to come again, as far as known: when the lock in the way runs out, if it
    /// is not renewed. Until then nobody else is sure to get it; it may well be free much earlier.
    /// Clients are told by [`headers`](Self::headers), as in the [example](Self).
    ///
    /// `None` where nothing is known. How long holders mostly take is not remembered, and when a
    /// storage is back, when a process that shuts down is replaced, or when there is room among the
    /// waiters of all keys, nobody knows: a number would be made up.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotObtained(error) => error.holder_ttl,
            Self::TooManyWaiters(error) if error.scope == WaiterScope::Key => error.holder_ttl,
            _ => None,
        }
    }

    /// One sentence for the client: it says what happened, and nothing of keys, servers and causes.
    pub(super) fn public_message(&self) -> &'static str {
        match self {
            Self::NotObtained(_) => "the resource is locked",
            Self::TooManyWaiters(_) => "too many requests wait for the resource",
            Self::Storage(_) => "the lock service is unavailable",
            Self::Draining => "the service is shutting down",
            Self::Lost(_) | Self::LostWhileWaiting(_) => "the lock on the resource was lost",
            Self::InvalidKey(_) => match self.blame() {
                Blame::Service => "the service could not tell what to lock",
                Blame::Sender => "the request was refused",
                Blame::Resource => "the request names no valid resource",
            },
        }
    }

    /// What is wrong where there is no key, by the status.
    pub(super) fn blame(&self) -> Blame {
        match self.status() {
            status if status.is_server_error() => Blame::Service,
            StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND | StatusCode::UNPROCESSABLE_ENTITY => {
                Blame::Resource
            }
            _ => Blame::Sender,
        }
    }

    /// The headers of an HTTP answer: `Retry-After` where [known](Self::retry_after), and those of a
    /// [`KeyRejected`].
    ///
    /// With the [status](Self::status) this is what [`DefaultOnReject`] answers, for a hook that has
    /// a body of its own: `(rejection.status(), rejection.headers(), body)` is a response of axum.
    pub fn headers(&self) -> HeaderMap {
        self.headers_with(self.retry_after())
    }

    pub(super) fn headers_with(&self, retry_after: Option<Duration>) -> HeaderMap {
        let mut headers = match self.key_rejected() {
            Some(rejected) => rejected.headers().clone(),
            None => HeaderMap::new(),
        };
        if let Some(after) = retry_after {
            // Whole seconds; 0 would mean "at once".
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, seconds.max(1).into());
        }
        headers
    }

    fn key_rejected(&self) -> Option<&KeyRejected> {
        match self {
            Self::InvalidKey(error) => error.downcast_ref(),
            _ => None,
        }
    }

    /// As a gRPC status: of a response without a message body, or of its trailers.
    pub(super) fn write_grpc_status(&self, headers: &mut HeaderMap) {
        headers.insert("grpc-status", u16::from(self.grpc_code()).into());
        let message = HeaderValue::from_static(self.public_message());
        headers.insert("grpc-message", message);
    }
}

/// Whose mistake it is that a request has no key.
pub(super) enum Blame {
    /// The layer is in the wrong place, or something that the key is made with is out of order.
    Service,
    /// Whoever sent it may not, or not now or not like this.
    Sender,
    /// What it names.
    Resource,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotObtained(error) => error.fmt(f),
            Self::TooManyWaiters(error) => error.fmt(f),
            Self::Storage(error) => error.fmt(f),
            Self::Draining => LockError::Draining.fmt(f),
            Self::Lost(reason) | Self::LostWhileWaiting(reason) => reason.fmt(f),
            Self::InvalidKey(error) => write!(f, "no lock key in the request: {error}"),
        }
    }
}

impl StdError for Rejection {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // What went wrong is part of our own text already; what lies below it is the next link of
        // the chain.
        match self {
            Self::Storage(error) => error.source(),
            Self::InvalidKey(error) => error.source(),
            _ => None,
        }
    }
}

impl From<LockError> for Rejection {
    fn from(error: LockError) -> Self {
        match error {
            LockError::NotObtained(error) => Self::NotObtained(error),
            LockError::TooManyWaiters(error) => Self::TooManyWaiters(error),
            LockError::Storage(error) => Self::Storage(error),
            LockError::Draining => Self::Draining,
            LockError::Lost(reason) => Self::LostWhileWaiting(reason),
        }
    }
}

/// Makes the answer to a request that could not have its lock.
///
/// Implemented for closures from [`Rejection`] to the response. Implement it yourself if the answer
/// depends on the request, which is no longer there when the answer is made: what is needed of it
/// is taken out before, as [`Context`](OnReject::Context).
///
/// ```
/// use axum::{body::Body, extract::Request, http::{Response, StatusCode}};
/// use tower_distributed_lock::{DistributedLockLayer, LockFactory, middleware::Rejection, storage::MemoryStorage};
///
/// let factory = LockFactory::new(MemoryStorage::new());
/// let layer = DistributedLockLayer::new(factory, |_: &Request| "reports".to_owned())
///     .on_reject(|rejection: Rejection| {
///         let mut response = Response::new(Body::from(rejection.to_string()));
///         *response.status_mut() = StatusCode::CONFLICT;
///         response
///     });
/// ```
///
/// [`RejectWithError`] makes an error of it, [`ProblemDetails`](super::ProblemDetails) a body that
/// programs can read. An answer in the language of the request:
///
/// ```
/// use http::{HeaderValue, Request, Response, header};
/// use tower_distributed_lock::middleware::{OnReject, Rejection};
///
/// struct InTheirLanguage;
///
/// impl<B, E> OnReject<Request<B>, Response<String>, E> for InTheirLanguage {
///     type Context = Option<HeaderValue>;
///
///     fn context(&self, request: &Request<B>) -> Self::Context {
///         request.headers().get(header::ACCEPT_LANGUAGE).cloned()
///     }
///
///     fn reject(&self, language: Self::Context, rejection: Rejection) -> Result<Response<String>, E> {
///         let is_german = language.is_some_and(|it| it.as_bytes().starts_with(b"de"));
///         let text = if is_german { "bitte sp\u{e4}ter" } else { "later, please" };
///         let mut response = Response::new(text.to_owned());
///         *response.status_mut() = rejection.status();
///         Ok(response)
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot answer a `{Req}` with a `Result<{Res}, {Err}>`",
    note = "`DefaultOnReject` answers HTTP requests, with a body that is `Default`",
    note = "for other services and bodies use `.reject_with_error(..)` or `.on_reject(..)` of the layer"
)]
pub trait OnReject<Req, Res, Err> {
    /// What is remembered of a request in case it is rejected.
    type Context;

    /// Looks at a request that is about to wait for its lock.
    fn context(&self, request: &Req) -> Self::Context;

    /// How long the client waits for its answer, if known: the request waits for its lock no longer
    /// than that, nor longer than its [options](crate::LockOptions::max_wait) say. With 0 it is
    /// rejected at once, with [`Rejection::NotObtained`] and without asking the storage.
    ///
    /// Default: not known, which is so for closures. [`DefaultOnReject`] and
    /// [`ProblemDetails`](super::ProblemDetails) have [`client_patience`](super::client_patience).
    /// The other hook is [asked too](super::OnAcquired::patience); what is less counts. If neither
    /// knows, the options alone count.
    fn patience(&self, request: &Req) -> Option<Duration> {
        let _ = request;
        None
    }

    /// Makes the answer.
    ///
    /// # Errors
    ///
    /// The inner service's error type, for services that report rejections as errors.
    fn reject(&self, context: Self::Context, rejection: Rejection) -> Result<Res, Err>;
}

impl<F, Req, Res, Err> OnReject<Req, Res, Err> for F
where
    F: Fn(Rejection) -> Res,
{
    type Context = ();

    fn context(&self, _: &Req) {}

    fn reject(&self, (): (), rejection: Rejection) -> Result<Res, Err> {
        Ok(self(rejection))
    }
}

/// Makes a rejection an error of the service, by a function from [`Rejection`] to the inner service's
/// error, or to something that can be [made into](Into) it. Made by
/// [`DistributedLockLayer::reject_with_error`](super::DistributedLockLayer::reject_with_error).
#[derive(Clone, Copy, Debug)]
pub struct RejectWithError<F> {
    error: F,
}

impl<F> RejectWithError<F> {
    /// A hook that answers with the error that `error` makes, as `reject_with_error` sets it in the
    /// [module documentation](super#services-that-are-no-http-services).
    pub fn new<E>(error: F) -> Self
    where
        F: Fn(Rejection) -> E,
    {
        Self { error }
    }
}

impl<F, E, Req, Res, Err> OnReject<Req, Res, Err> for RejectWithError<F>
where
    F: Fn(Rejection) -> E,
    E: Into<Err>,
{
    type Context = ();

    fn context(&self, _: &Req) {}

    fn reject(&self, (): (), rejection: Rejection) -> Result<Res, Err> {
        Err((self.error)(rejection).into())
    }
}

/// Answers HTTP requests with a status and gRPC requests with a gRPC status, both without a body.
/// See the table in the [module documentation](super).
///
/// The `grpc-timeout` of a gRPC request limits its wait: see
/// [`client_patience`](super::client_patience).
#[derive(Clone, Copy, Debug, Default)]
pub struct DefaultOnReject {
    retry_after_at_most: Option<Duration>,
}

impl DefaultOnReject {
    /// Says all that is known, without a [limit](Self::retry_after_at_most).
    pub fn new() -> Self {
        Self::default()
    }

    /// The most that clients are told to wait where the lock is known to last longer. Default: no
    /// limit.
    ///
    /// What is [known](Rejection::retry_after) is when the lock runs out if its holder crashed. If
    /// your handlers mostly take 200 ms, say a second: the lock will mostly be free by then.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use axum::{Router, extract::Request, routing::post};
    /// use tower_distributed_lock::{
    ///     DistributedLockLayer, LockFactory, middleware::DefaultOnReject, storage::MemoryStorage,
    /// };
    ///
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// let lock = DistributedLockLayer::new(factory, |_: &Request| "reports")
    ///     .on_reject(DefaultOnReject::new().retry_after_at_most(Duration::from_secs(1)));
    /// let app: Router = Router::new().route("/reports", post(|| async {}).route_layer(lock));
    /// ```
    #[must_use]
    pub fn retry_after_at_most(mut self, limit: Duration) -> Self {
        self.retry_after_at_most = Some(limit);
        self
    }
}

/// What a client speaks: what [`DefaultOnReject`] remembers of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// Plain HTTP.
    Http,
    /// gRPC: a `POST` whose `content-type` is `application/grpc`, with or without a `+format`.
    ///
    /// gRPC-Web has another (`application/grpc-web`), and answers of another form. Put the layer that
    /// translates it, such as that of `tonic-web`, outside of the lock: then this is gRPC.
    Grpc,
}

impl Protocol {
    /// What the client that sent `request` speaks.
    ///
    /// ```
    /// use http::Request;
    /// use tower_distributed_lock::middleware::Protocol;
    ///
    /// let call = Request::post("/shop.Orders/Pay").header("content-type", "application/grpc+proto");
    /// assert_eq!(Protocol::of(&call.body(())?), Protocol::Grpc);
    ///
    /// let post = Request::post("/orders/42/pay").header("content-type", "application/json");
    /// assert_eq!(Protocol::of(&post.body(())?), Protocol::Http);
    /// # Ok::<(), http::Error>(())
    /// ```
    pub fn of<B>(request: &Request<B>) -> Self {
        // The answer is a 200 to whoever does not look for a gRPC status.
        match *request.method() {
            Method::POST => Self::of_headers(request.headers()),
            _ => Self::Http,
        }
    }

    pub(super) fn of_headers(headers: &HeaderMap) -> Self {
        let content_type = headers.get(header::CONTENT_TYPE);
        let rest =
            content_type.and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
        match rest {
            Some([] | [b'+' | b';' | b' ', ..]) => Self::Grpc,
            _ => Self::Http,
        }
    }
}

impl<B, RB, E> OnReject<Request<B>, Response<RB>, E> for DefaultOnReject
where
    RB: Default,
{
    type Context = Protocol;

    fn context(&self, request: &Request<B>) -> Protocol {
        Protocol::of(request)
    }

    fn patience(&self, request: &Request<B>) -> Option<Duration> {
        client_patience(request)
    }

    fn reject(&self, protocol: Protocol, rejection: Rejection) -> Result<Response<RB>, E> {
        Ok(match protocol {
            Protocol::Http => {
                let limit = self.retry_after_at_most.unwrap_or(Duration::MAX);
                let after = rejection.retry_after().map(|after| after.min(limit));
                http_answer(&rejection, after, RB::default())
            }
            Protocol::Grpc => grpc_answer(&rejection, RB::default()),
        })
    }
}

/// The status and the headers of a rejection.
pub(super) fn http_answer<B>(
    rejection: &Rejection,
    retry_after: Option<Duration>,
    body: B,
) -> Response<B> {
    let mut response = Response::new(body);
    *response.status_mut() = rejection.status();
    *response.headers_mut() = rejection.headers_with(retry_after);
    response
}

/// A gRPC error without a message body is an HTTP 200 whose headers carry the status
/// ("trailers-only"). `body` has to be empty.
pub(super) fn grpc_answer<B>(rejection: &Rejection, body: B) -> Response<B> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    let grpc = HeaderValue::from_static("application/grpc");
    headers.insert(header::CONTENT_TYPE, grpc);
    rejection.write_grpc_status(headers);
    response
}
