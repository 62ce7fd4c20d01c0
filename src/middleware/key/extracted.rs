//! Key functions of axum extractors.

use std::{fmt, marker::PhantomData};

use axum_core::{
    body::Body,
    extract::FromRequestParts,
    response::{IntoResponse, Response},
};
use futures_util::{FutureExt, StreamExt};
use http::{Request, StatusCode};

use super::{KeyFunction, KeyRejected, loan::Loan};
use crate::{
    error::BoxError,
    middleware::request_key::{IntoRequestKey, RequestKey},
};

/// A key function written as a handler is, with 1 to 8 axum extractors:
///
/// ```
/// use axum::{extract::Path, http::HeaderMap};
/// use tower_distributed_lock::{LockKey, error::BoxError, middleware::key::extracted};
///
/// // `/orders/42` and `/orders/042` are one order; `/orders/x` is answered 400, as by the handler.
/// let order = extracted(|Path(id): Path<u64>| LockKey::from_parts(["orders", &id.to_string()]));
///
/// let order_of_tenant = extracted(|Path(id): Path<u64>, headers: HeaderMap| {
///     let tenant = headers.get("x-tenant").ok_or("no tenant")?.to_str()?;
///     Ok::<_, BoxError>(LockKey::from_parts(["orders", tenant, &id.to_string()])?)
/// });
/// ```
///
/// The function may return anything that is [`IntoRequestKey`]. Extractors that need the state of
/// the router are given it by [`Extracted::with_state`].
///
/// If an extractor rejects the request, so does the layer, with the extractor's status and headers:
/// the error is a [`KeyRejected`] with the text of its answer. The body is the hook's; the default has
/// none, so the client does not see the text.
///
/// # Around several routes
///
/// On a route (`post(handler).route_layer(lock)`) the extractors find what the handler finds. In
/// `Router::layer` they also see requests to other routes and to none, and `Path<u64>` answers those
/// with 500. What may not be there has to be optional:
///
/// ```
/// use axum::extract::Path;
/// use tower_distributed_lock::{LockKey, middleware::key::extracted};
///
/// // No lock where the route has no parameters, and for requests that are answered 404.
/// let order = extracted(|id: Option<Path<u64>>| {
///     id.map(|Path(id)| LockKey::from_parts(["orders", &id.to_string()]))
/// });
/// ```
///
/// The parameter of another route would still be taken for an order: `/users/7` would lock order 7.
///
/// # What extractors can be used
///
/// Those that need no body and no waiting, which is all that axum brings but those of the body. One
/// that does wait (asks a database for the session, say) is answered 500. It would do so twice, here
/// and in the handler, and here under no lock and no limit of time. Let a middleware outside of this
/// layer do it once and leave what it found in the request's extensions, and take
/// `Extension<..>` here.
///
/// The extractors run on the request's own head. What they change in it, the handler sees.
pub fn extracted<F, T>(function: F) -> Extracted<F, T>
where
    F: ExtractorFn<T>,
{
    Extracted {
        function,
        state: (),
        arguments: PhantomData,
    }
}

/// A key function of axum extractors. Made by [`extracted`].
///
/// `F` is the function, `T` the tuple of its arguments, `S` the state that they are taken with.
pub struct Extracted<F, T, S = ()> {
    function: F,
    state: S,
    arguments: PhantomData<fn() -> T>,
}

impl<F, T, S> Extracted<F, T, S> {
    /// The state for extractors that need it, as it is given to the router.
    ///
    /// ```
    /// use axum::extract::{FromRef, Path, State};
    /// use tower_distributed_lock::{LockKey, middleware::key::extracted};
    ///
    /// #[derive(Clone)]
    /// struct App {
    ///     shop: String,
    /// }
    ///
    /// let app = App { shop: "books".into() };
    /// let order = extracted(|State(app): State<App>, Path(id): Path<u64>| {
    ///     LockKey::from_parts([&app.shop, &id.to_string()])
    /// });
    /// let order = order.with_state(app);
    /// ```
    #[must_use]
    pub fn with_state<S2>(self, state: S2) -> Extracted<F, T, S2> {
        Extracted {
            function: self.function,
            state,
            arguments: PhantomData,
        }
    }
}

impl<B, F, T, S> KeyFunction<Request<B>> for Extracted<F, T, S>
where
    F: ExtractorFn<T>,
    T: FromRequestParts<S>,
{
    fn request_key(&self, request: &mut Request<B>) -> Result<RequestKey, BoxError> {
        // The loan ends before the function is called.
        let arguments = Loan::of(request).extract(&self.state);
        match arguments {
            Some(Ok(arguments)) => self.function.call(arguments),
            Some(Err(rejection)) => Err(rejected(rejection.into_response()).into()),
            None => Err(KeyRejected::new(StatusCode::INTERNAL_SERVER_ERROR, WAITS).into()),
        }
    }
}

const WAITS: &str = "an extractor of the lock's key function has to wait for something: only extractors that need no \
                     waiting can be used there (let a middleware outside of the lock's layer do the waiting, and take \
                     what it leaves in the extensions)";

/// An extractor's answer, with its body as text. The text is there at once if it is there at
/// all.
fn rejected(response: Response<Body>) -> KeyRejected {
    const MAX_TEXT: usize = 1024;
    let (parts, body) = response.into_parts();
    let text = match body.into_data_stream().next().now_or_never() {
        Some(Some(Ok(bytes))) => {
            String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)]).into_owned()
        }
        _ => format!("an extractor answered {}", parts.status),
    };
    KeyRejected::new(parts.status, text).with_headers(parts.headers)
}

impl<F: Clone, T, S: Clone> Clone for Extracted<F, T, S> {
    fn clone(&self) -> Self {
        Self {
            function: self.function.clone(),
            state: self.state.clone(),
            arguments: PhantomData,
        }
    }
}

impl<F, T, S> fmt::Debug for Extracted<F, T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extracted").finish_non_exhaustive()
    }
}

/// A function of 1 to 8 extractors that returns a key. `T` is the tuple of them.
///
/// Implemented for closures and functions, and for nothing else: the trait is sealed. It is what
/// [`extracted`] asks of its argument.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no function of 1 to 8 extractors that returns a key",
    label = "not a key function of extractors",
    note = "its arguments have types that are written out (`|Path(id): Path<u64>| ..`), and it returns a `LockKey`, a \
            `String`, an `Option` or `Result` of these, or anything else that is `IntoRequestKey`; it is not async"
)]
pub trait ExtractorFn<T>: sealed::Function<T> {
    /// Calls it.
    ///
    /// # Errors
    ///
    /// Those of the function.
    fn call(&self, arguments: T) -> Result<RequestKey, BoxError>;
}

mod sealed {
    /// Nobody else can name it, so nobody else can implement what needs it.
    pub trait Function<T> {}
}

macro_rules! functions_of {
    ($(($($extractor:ident)+))+) => {
        $(
            impl<F, $($extractor,)+ K> sealed::Function<($($extractor,)+)> for F
            where
                F: Fn($($extractor),+) -> K,
                K: IntoRequestKey,
            {
            }

            impl<F, $($extractor,)+ K> ExtractorFn<($($extractor,)+)> for F
            where
                F: Fn($($extractor),+) -> K,
                K: IntoRequestKey,
            {
                #[allow(non_snake_case, reason = "variables are named as their types")]
                fn call(&self, arguments: ($($extractor,)+)) -> Result<RequestKey, BoxError> {
                    let ($($extractor,)+) = arguments;
                    self($($extractor),+).into_request_key()
                }
            }
        )+
    };
}

functions_of! {
    (T1)
    (T1 T2)
    (T1 T2 T3)
    (T1 T2 T3 T4)
    (T1 T2 T3 T4 T5)
    (T1 T2 T3 T4 T5 T6)
    (T1 T2 T3 T4 T5 T6 T7)
    (T1 T2 T3 T4 T5 T6 T7 T8)
}
