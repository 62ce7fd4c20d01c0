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

    /// The HTTP status: 400 to 599.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers for the client.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The error as it was given.
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
