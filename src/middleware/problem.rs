//! Rejections as problem details: an answer that programs can read (RFC 9457).

use std::{fmt::Write, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};

use crate::middleware::{
    on_reject::{Blame, OnReject, Protocol, Rejection, grpc_answer, http_answer},
    patience::client_patience,
};

/// Answers HTTP requests with problem details (RFC 9457): what [`DefaultOnReject`] answers, and a
/// JSON body with the content type `application/problem+json`.
///
/// ```
/// use axum::{Router, extract::Request, routing::post};
/// use tower_distributed_lock::{
///     DistributedLockLayer, LockFactory, middleware::ProblemDetails, storage::MemoryStorage,
/// };
///
/// let factory = LockFactory::new(MemoryStorage::new());
/// let lock = DistributedLockLayer::new(factory, |_: &Request| "reports".to_owned())
///     .on_reject(ProblemDetails::new().type_base("https://example.com/problems/"));
/// let app: Router = Router::new().route("/reports", post(|| async {}).route_layer(lock));
/// ```
///
/// ```text
/// HTTP/1.1 423 Locked
/// content-type: application/problem+json
/// retry-after: 7
///
/// {"type":"https://example.com/problems/not_obtained","title":"The resource is locked","status":423,
///  "detail":"Another request holds the resource. This one was not carried out and can be repeated.",
///  "reason":"not_obtained","retry_after_ms":6804}
/// ```
///
/// | member | |
/// |---|---|
/// | `type` | the base that was set, and the reason. Without a base `about:blank` |
/// | `title` | the same for all problems of a type; for `about:blank` the phrase of the status |
/// | `status` | that of the answer |
/// | `detail` | what became of the request, for people |
/// | `instance` | the id of this request, if [chosen](Self::instance_header) |
/// | `reason` | [`Rejection::reason`], for programs |
/// | `retry_after_ms` | what `Retry-After` says in whole seconds, where it is known |
///
/// Keys, causes and names of servers are in no member: write them to your log. For other members,
/// write a hook of your own; it is short.
///
/// For bodies that can be made of a `String`: axum's, `http_body_util::Full`, `String`. A gRPC request
/// gets what [`DefaultOnReject`] answers, without a body.
///
/// [`DefaultOnReject`]: super::DefaultOnReject
#[derive(Clone, Debug, Default)]
pub struct ProblemDetails {
    type_base: Option<Arc<str>>,
    instance_header: Option<HeaderName>,
    retry_after_at_most: Option<Duration>,
}

/// The longest `instance` that is taken from a request.
const MAX_INSTANCE: usize = 256;

impl ProblemDetails {
    /// Problem details of the type `about:blank`, without an [instance](Self::instance_header).
    pub fn new() -> Self {
        Self::default()
    }

    /// What the `type` of a problem begins with; the [reason](Rejection::reason) comes right behind
    /// it, so end it with `/` or `#`. A URI of yours, best one under which the problems are
    /// described. Default: none, all problems are `about:blank`.
    #[must_use]
    pub fn type_base(mut self, uri: impl Into<String>) -> Self {
        self.type_base = Some(uri.into().into());
        self
    }

    /// The header of a request whose value is the `instance` of its problem, such as an
    /// `x-request-id` that a layer outside has set. Default: no `instance`.
    ///
    /// A value that is no URI reference or longer than 256 bytes is left out.
    ///
    /// ```
    /// use axum::{Router, extract::Request, http::HeaderName, routing::post};
    /// use tower_distributed_lock::{
    ///     DistributedLockLayer, LockFactory, middleware::ProblemDetails, storage::MemoryStorage,
    /// };
    ///
    /// let factory = LockFactory::new(MemoryStorage::new());
    /// // With `x-request-id: b7e2` there is `"instance":"b7e2"` in the body.
    /// let lock = DistributedLockLayer::new(factory, |_: &Request| "reports").on_reject(
    ///     ProblemDetails::new().instance_header(HeaderName::from_static("x-request-id")),
    /// );
    /// let app: Router = Router::new().route("/reports", post(|| async {}).route_layer(lock));
    /// ```
    #[must_use]
    pub fn instance_header(mut self, name: HeaderName) -> Self {
        self.instance_header = Some(name);
        self
    }

    /// The most that clients are told to wait where the lock is known to last longer. Default: no
    /// limit.
    ///
    /// What is [known](Rejection::retry_after) is when the lock runs out if its holder crashed. If
    /// your handlers mostly take 200 ms, say a second: the lock will mostly be free by then.
    #[must_use]
    pub fn retry_after_at_most(mut self, limit: Duration) -> Self {
        self.retry_after_at_most = Some(limit);
        self
    }

    fn body(
        &self,
        context: &ProblemContext,
        rejection: &Rejection,
        after: Option<Duration>,
    ) -> String {
        let status = rejection.status();
        let reason = rejection.reason();
        let mut body = String::with_capacity(256);
        body.push_str(r#"{"type":""#);
        let title = match &self.type_base {
            Some(base) => {
                escape(base, &mut body);
                body.push_str(reason);
                title(rejection)
            }
            None => {
                body.push_str("about:blank");
                status.canonical_reason().unwrap_or_default()
            }
        };
        let code = status.as_u16();
        let detail = detail(rejection);
        // A `String` takes whatever is written.
        let _ = write!(
            body,
            r#"","title":"{title}","status":{code},"detail":"{detail}","#
        );
        if let Some(instance) = &context.instance {
            body.push_str(r#""instance":""#);
            escape(instance, &mut body);
            body.push_str(r#"","#);
        }
        let _ = write!(body, r#""reason":"{reason}""#);
        if let Some(after) = after {
            let _ = write!(body, r#","retry_after_ms":{}"#, after.as_millis());
        }
        body.push('}');
        body
    }
}

/// What [`ProblemDetails`] remembers of a request.
#[derive(Clone, Debug)]
pub struct ProblemContext {
    protocol: Protocol,
    instance: Option<Box<str>>,
}

impl<B, RB, E> OnReject<Request<B>, Response<RB>, E> for ProblemDetails
where
    RB: From<String>,
{
    type Context = ProblemContext;

    fn context(&self, request: &Request<B>) -> ProblemContext {
        let instance = self.instance_header.as_ref();
        ProblemContext {
            protocol: Protocol::of(request),
            instance: instance.and_then(|name| instance_of(request.headers(), name)),
        }
    }

    fn patience(&self, request: &Request<B>) -> Option<Duration> {
        client_patience(request)
    }

    fn reject(&self, context: ProblemContext, rejection: Rejection) -> Result<Response<RB>, E> {
        if context.protocol == Protocol::Grpc {
            return Ok(grpc_answer(&rejection, RB::from(String::new())));
        }
        let limit = self.retry_after_at_most.unwrap_or(Duration::MAX);
        let after = rejection.retry_after().map(|after| after.min(limit));
        let body = self.body(&context, &rejection, after);
        let mut response = http_answer(&rejection, after, RB::from(body));
        let json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        Ok(response)
    }
}

/// Whoever sends the request may have made the value up.
fn instance_of(headers: &HeaderMap, name: &HeaderName) -> Option<Box<str>> {
    let value = headers.get(name)?.to_str().ok()?;
    let is_reference =
        |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte);
    let is_good =
        !value.is_empty() && value.len() <= MAX_INSTANCE && value.bytes().all(is_reference);
    is_good.then(|| value.into())
}

/// The name of a kind of problem.
fn title(rejection: &Rejection) -> &'static str {
    match rejection {
        Rejection::NotObtained(_) => "The resource is locked",
        Rejection::TooManyWaiters(_) => "Too many requests wait",
        Rejection::Storage(_) => "The lock service is unavailable",
        Rejection::Draining => "The service is shutting down",
        Rejection::Lost(_) | Rejection::LostWhileWaiting(_) => "The lock was lost",
        Rejection::InvalidKey(_) => "No lock for the request",
    }
}

/// What became of the request, and what to do.
fn detail(rejection: &Rejection) -> &'static str {
    match rejection {
        Rejection::NotObtained(_) => {
            "Another request holds the resource. This one was not carried out and can be repeated."
        }
        Rejection::TooManyWaiters(_) => {
            "Too many requests wait already. This one was not carried out and can be repeated."
        }
        Rejection::Storage(_) => {
            "The lock service could not be asked. The request was not carried out and can be repeated."
        }
        Rejection::Draining => {
            "This instance is shutting down. The request was not carried out and can be repeated."
        }
        Rejection::Lost(_) => {
            "The lock was lost while the request was being served. It may have been carried out in \
             part or in full: look before you repeat it."
        }
        Rejection::LostWhileWaiting(_) => {
            "A lock was lost while the request waited for others. It was not carried out and can be \
             repeated."
        }
        Rejection::InvalidKey(_) => match rejection.blame() {
            Blame::Service => {
                "The service could not tell what to lock for the request. It was not carried out."
            }
            Blame::Sender => "The request was refused. It was not carried out.",
            Blame::Resource => "The request names no valid resource. It was not carried out.",
        },
    }
}

/// Writes text as the inside of a JSON string.
fn escape(text: &str, into: &mut String) {
    for char in text.chars() {
        match char {
            '"' | '\\' => into.extend(['\\', char]),
            '\0'..='\x1f' => {
                let _ = write!(into, "\\u{:04x}", u32::from(char));
            }
            _ => into.push(char),
        }
    }
}
