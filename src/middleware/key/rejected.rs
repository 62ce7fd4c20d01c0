//! An error of a key function that knows its status.

use std::{error::Error as StdError, fmt};

use http::{HeaderMap, StatusCode, header};

use crate::error::BoxError;

/// Why a request has no key, with the status and the headers that its client gets. Any other error of
/// a key function is answered 400.
///
/// ```
/// use http::{Request, StatusCode};
/// use tower_distributed_lock::{LockKey, error::BoxError, middleware::key::KeyRejected};
///
/// fn account<B>(request: &Request<B>) -> Result<LockKey, BoxError> {
///     let Some(account) = request.headers().get("x-account") else {
///         return Err(KeyRejected::new(StatusCode::UNAUTHORIZED, "who are you?").into());
///     };
///     Ok(LockKey::from_parts([b"accounts", account.as_bytes()])?)
/// }
/// ```
#[derive(Debug)]
pub struct KeyRejected {
    status: StatusCode,
    headers: HeaderMap,
    error: BoxError,
}

impl KeyRejected {
    /// An error with its status.
    ///
    /// A status that is no error (a redirect, say) would tell the client something else than that
    /// its request was not served: it becomes 400.
    ///
    /// ```
    /// use http::StatusCode;
    /// use tower_distributed_lock::middleware::key::KeyRejected;
    ///
    /// let gone = KeyRejected::new(StatusCode::GONE, "the order was deleted");
    /// assert_eq!(gone.status(), StatusCode::GONE);
    /// assert_eq!(gone.to_string(), "the order was deleted");
    ///
    /// let moved = KeyRejected::new(StatusCode::FOUND, "the order is elsewhere");
    /// assert_eq!(moved.status(), StatusCode::BAD_REQUEST);
    /// ```
    pub fn new(status: StatusCode, error: impl Into<BoxError>) -> Self {
        let is_error = status.is_client_error() || status.is_server_error();
        Self {
            status: if is_error {
                status
            } else {
                StatusCode::BAD_REQUEST
            },
            headers: HeaderMap::new(),
            error: error.into(),
        }
    }

    /// Headers for the client, such as the `WWW-Authenticate` of a 401. An error of an extractor has
    /// those of its answer. Default: none.
    ///
    /// What describes a body (`Content-Type` and the like) is left out: the hook makes the body.
    ///
    /// ```
    /// use http::{HeaderMap, HeaderValue, StatusCode, header::WWW_AUTHENTICATE};
    /// use tower_distributed_lock::middleware::key::KeyRejected;
    ///
    /// let mut headers = HeaderMap::new();
    /// headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    /// let rejected = KeyRejected::new(StatusCode::UNAUTHORIZED, "no token").with_headers(headers);
    /// assert_eq!(rejected.headers()[WWW_AUTHENTICATE], "Bearer");
    /// ```
    #[must_use]
    pub fn with_headers(mut self, mut headers: HeaderMap) -> Self {
        for of_body in [
            header::CONTENT_TYPE,
            header::CONTENT_LENGTH,
            header::CONTENT_ENCODING,
            header::CONTENT_LANGUAGE,
            header::CONTENT_LOCATION,
            header::CONTENT_RANGE,
            header::TRANSFER_ENCODING,
            header::TRAILER,
        ] {
            headers.remove(of_body);
        }
        self.headers = headers;
        self
    }

    /// The HTTP status: 400 to 599, whatever [`new`](Self::new) was given.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers for the client: those of [`with_headers`](Self::with_headers), or none.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The error as it was given, for a hook that looks for one of its own:
    ///
    /// ```
    /// use tower_distributed_lock::middleware::{Rejection, key::{HeaderError, KeyRejected}};
    ///
    /// fn is_about_a_header(rejection: &Rejection) -> bool {
    ///     let Rejection::InvalidKey(error) = rejection else { return false };
    ///     let rejected = error.downcast_ref::<KeyRejected>();
    ///     error.is::<HeaderError>() || rejected.is_some_and(|it| it.get_ref().is::<HeaderError>())
    /// }
    /// ```
    pub fn get_ref(&self) -> &(dyn StdError + Send + Sync + 'static) {
        &*self.error
    }
}

impl fmt::Display for KeyRejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for KeyRejected {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // The error's own text is ours already.
        self.error.source()
    }
}
