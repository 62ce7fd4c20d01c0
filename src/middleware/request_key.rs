//! What a key function may return.

use crate::{
    error::{BoxError, InvalidKey},
    key::{LockKey, LockKeys},
    options::LockOptions,
};

/// What a request has to lock, and how. Key functions mostly return something that becomes one: see [`IntoRequestKey`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestKey {
    pub(crate) keys: Keys,
    pub(super) options: Option<LockOptions>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    None,
    One(LockKey),
    Several(LockKeys),
}

impl RequestKey {
    /// Nothing: the request runs without a lock.
    ///
    /// ```
    /// use http::Request;
    /// use tower_distributed_lock::{LockKey, error::InvalidKey, middleware::RequestKey};
    ///
    /// fn account<B>(request: &Request<B>) -> Result<RequestKey, InvalidKey> {
    ///     let Some(account) = request.headers().get("x-account") else {
    ///         return Ok(RequestKey::none());
    ///     };
    ///     LockKey::from_parts([b"accounts", account.as_bytes()]).map(RequestKey::one)
    /// }
    ///
    /// assert_eq!(account(&Request::new(())), Ok(RequestKey::none()));
    /// ```
    pub fn none() -> Self {
        Self::of(Keys::None)
    }

    /// One key. [`none`](Self::none) has an example.
    pub fn one(key: LockKey) -> Self {
        Self::of(Keys::One(key))
    }

    /// Several keys, all or none: see [`LockSet`](crate::LockSet). Their order does not matter, and
    /// a key that is named twice is one.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if there is no key, or if there are more than
    /// [`LockSet::MAX_LEN`](crate::LockSet::MAX_LEN).
    pub fn all(keys: impl IntoIterator<Item = LockKey>) -> Result<Self, InvalidKey> {
        let keys = LockKeys::new(keys)?;
        Ok(match keys.single() {
            Some(key) => Self::one(key.clone()),
            None => Self::of(Keys::Several(keys)),
        })
    }

    /// The options of this request, in place of [those of the layer](super::DistributedLockLayer::options),
    /// all of them: what is not set here has its default, whatever the layer says. Build them
    /// [from the layer's](LockOptions::to_builder) to change some alone.
    #[must_use]
    pub fn with_options(mut self, options: LockOptions) -> Self {
        self.options = Some(options);
        self
    }

    fn of(keys: Keys) -> Self {
        Self {
            keys,
            options: None,
        }
    }
}

/// What a key function may return: a [`LockKey`], text, several keys (an array or a `Vec` of
/// [`LockKey`]s or of text), a pair of one of these and [`LockOptions`], an `Option` or a `Result` of all that,
/// or both. The options replace those of the layer [wholly](RequestKey::with_options).
///
/// `None` means that the request runs without a lock; an error rejects it, and so does an empty
/// list.
///
/// Name the resource, not the URL: a handler that takes `Path<u64>` treats `/orders/42` and
/// `/orders/042` as one, so the key function has to parse the id as well.
///
/// ```
/// use std::time::Duration;
///
/// use http::Request;
/// use tower_distributed_lock::{LockKey, LockOptions, error::InvalidKey};
///
/// // Locks nothing for GET requests, and the whole service for all others.
/// fn writes<B>(request: &Request<B>) -> Option<Result<LockKey, InvalidKey>> {
///     (request.method() != http::Method::GET).then(|| LockKey::new("writes"))
/// }
///
/// // Demands a header.
/// fn account<B>(request: &Request<B>) -> Result<LockKey, Box<dyn std::error::Error + Send + Sync>> {
///     let account = request.headers().get("x-account").ok_or("no x-account header")?;
///     Ok(LockKey::from_parts(["account".as_bytes(), account.as_bytes()])?)
/// }
///
/// // Two resources, all or none, and no wait.
/// fn transfer(from: u64, to: u64) -> Result<([LockKey; 2], LockOptions), InvalidKey> {
///     let account = |id: u64| LockKey::from_parts(["account", &id.to_string()]);
///     let at_once = LockOptions::default().within(Duration::ZERO);
///     Ok(([account(from)?, account(to)?], at_once))
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "a key function cannot return `{Self}`",
    label = "not a lock key",
    note = "it returns a `LockKey`, a `String`, a `RequestKey`, an array or `Vec` of `LockKey`s or of text, a pair of one of these \
            and `LockOptions`, or an `Option` or `Result` of all that"
)]
pub trait IntoRequestKey {
    /// The key, no key, or why there is none.
    ///
    /// # Errors
    ///
    /// The request is rejected with [`Rejection::InvalidKey`](super::Rejection::InvalidKey).
    fn into_request_key(self) -> Result<RequestKey, BoxError>;
}

impl IntoRequestKey for RequestKey {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        Ok(self)
    }
}

impl IntoRequestKey for LockKey {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        Ok(RequestKey::one(self))
    }
}

impl IntoRequestKey for String {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.as_str().into_request_key()
    }
}

impl IntoRequestKey for &str {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        let key = LockKey::new(self)?;
        Ok(RequestKey::one(key))
    }
}

impl<T> IntoRequestKey for Vec<T>
where
    T: TryInto<LockKey, Error: Into<BoxError>>,
{
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        all(self)
    }
}

impl<const N: usize, T> IntoRequestKey for [T; N]
where
    T: TryInto<LockKey, Error: Into<BoxError>>,
{
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        all(self)
    }
}

fn all<T>(keys: impl IntoIterator<Item = T>) -> Result<RequestKey, BoxError>
where
    T: TryInto<LockKey, Error: Into<BoxError>>,
{
    let keys = keys.into_iter().map(TryInto::try_into);
    let keys: Result<Vec<_>, _> = keys.collect();
    Ok(RequestKey::all(keys.map_err(Into::into)?)?)
}

impl<T: IntoRequestKey> IntoRequestKey for (T, LockOptions) {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        let (key, options) = self;
        Ok(key.into_request_key()?.with_options(options))
    }
}

impl<T: IntoRequestKey> IntoRequestKey for Option<T> {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.map_or(Ok(RequestKey::none()), T::into_request_key)
    }
}

impl<T: IntoRequestKey, E: Into<BoxError>> IntoRequestKey for Result<T, E> {
    fn into_request_key(self) -> Result<RequestKey, BoxError> {
        self.map_err(Into::into)?.into_request_key()
    }
}
