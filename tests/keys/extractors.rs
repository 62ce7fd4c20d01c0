//! Key functions of axum extractors.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{
    extract::{FromRequestParts, Path, Query, State},
    response::{IntoResponse, Redirect},
    routing,
};
use http::{HeaderMap, Method, Uri, Version, request::Parts};

use super::*;

fn order(id: u64) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["orders", &id.to_string()])
}

/// The route `/orders/{id}` with this key function.
fn app<K>(key: K) -> Router
where
    K: KeyFunction<Request> + Send + Sync + 'static,
{
    Router::new().route(
        "/orders/{id}",
        routing::post(locked).route_layer(layer(key)),
    )
}

#[tokio::test]
async fn a_key_is_made_of_what_the_handler_understands() {
    let app = app(extracted(|Path(id): Path<u64>| order(id)));
    for path in ["/orders/42", "/orders/042", "/orders/%34%32", "/orders/+42"] {
        let answer = send(app.clone(), post(path)).await;
        assert_eq!(answer, (StatusCode::OK, "orders/42".into()), "{path}");
    }
    // What axum says to it.
    let handler = Router::new().route("/orders/{id}", routing::post(async |_: Path<u64>| ()));
    for path in [
        "/orders/x",
        "/orders/-1",
        "/orders/%FF",
        "/orders/99999999999999999999",
    ] {
        let (status, text) = send(app.clone(), post(path)).await;
        let (by_axum, text_by_axum) = send(handler.clone(), post(path)).await;
        assert_eq!(status, by_axum, "{path}");
        assert!(
            text.ends_with(&text_by_axum),
            "{text} is not {text_by_axum}"
        );
    }
}

#[tokio::test]
async fn a_key_function_takes_up_to_eight_extractors_and_returns_any_kind_of_key() {
    type None = Query<()>;
    let eight = extracted(
        |Path(id): Path<u64>,
         _: HeaderMap,
         method: Method,
         _: Uri,
         _: Version,
         _: None,
         _: None,
         _: None| { (method == Method::POST).then(|| order(id)) },
    );
    let answer = send(app(eight), post("/orders/42")).await;
    assert_eq!(answer, (StatusCode::OK, "orders/42".into()));

    fn two(Path(id): Path<u64>, headers: HeaderMap) -> Result<LockKey, BoxError> {
        let tenant = headers.get("x-tenant").ok_or("no tenant")?;
        Ok(LockKey::from_parts([
            tenant.as_bytes(),
            id.to_string().as_bytes(),
        ])?)
    }
    let app = app(extracted(two));
    let mut request = post("/orders/42");
    request
        .headers_mut()
        .insert("x-tenant", "a/b".parse().unwrap());
    assert_eq!(send(app.clone(), request).await.1, "a%2Fb/42");
    let (status, text) = send(app, post("/orders/42")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("no tenant"), "{text}");
}

#[tokio::test]
async fn extractors_have_the_state_that_they_need() {
    #[derive(Clone)]
    struct App {
        shop: &'static str,
    }
    let key = extracted(|State(app): State<App>, Path(id): Path<u64>| {
        LockKey::from_parts([app.shop, &id.to_string()])
    });
    let app = app(key.with_state(App { shop: "books" }));
    assert_eq!(send(app, post("/orders/42")).await.1, "books/42");
}

/// Answers as it is told to by the header `answer`, after it has marked the head.
struct Told;

impl<S: Sync> FromRequestParts<S> for Told {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        parts.extensions.insert("mark");
        let answer = parts
            .headers
            .get("answer")
            .map(|answer| answer.to_str().unwrap());
        let status = match answer {
            None => return Ok(Self),
            Some("panic") => panic!("a bug in the extractor"),
            Some("wait") => std::future::pending().await,
            Some("redirect") => return Err(Redirect::to("/login").into_response()),
            Some("long") => return Err((StatusCode::CONFLICT, "x".repeat(5_000)).into_response()),
            Some("stream") => {
                let never = futures_util::stream::pending::<Result<String, Infallible>>();
                return Err((StatusCode::GONE, Body::from_stream(never)).into_response());
            }
            Some(status) => StatusCode::from_bytes(status.as_bytes()).unwrap(),
        };
        Err((status, "told so").into_response())
    }
}

fn told(answer: &'static str) -> Request {
    let mut request = post("/orders/42");
    request
        .headers_mut()
        .insert("answer", answer.parse().unwrap());
    request
}

#[tokio::test]
async fn a_client_sees_the_status_of_the_extractor_that_refused() {
    let rejected = async |answer| {
        let app = app(extracted(|_: Told, Path(id): Path<u64>| order(id)));
        send(app, told(answer)).await
    };
    for status in [
        "400", "401", "403", "404", "415", "422", "429", "500", "503",
    ] {
        let (seen, text) = rejected(status).await;
        assert_eq!(seen.as_str(), status);
        assert!(text.ends_with("told so"), "{text}");
    }
    // An answer that does not say that the request was not served.
    assert_eq!(rejected("redirect").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(rejected("204").await.0, StatusCode::BAD_REQUEST);
    let (status, text) = rejected("long").await;
    assert!(
        status == StatusCode::CONFLICT && text.len() < 1_200,
        "{}",
        text.len()
    );
    let (status, text) = rejected("stream").await;
    assert!(status == StatusCode::GONE && text.contains("410"), "{text}");

    let (status, text) = rejected("wait").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(
        text.contains("only extractors that need no waiting can be used"),
        "{text}"
    );
}

#[tokio::test]
async fn a_grpc_client_sees_the_code_for_the_status() {
    let lock = DistributedLockLayer::new(
        LockFactory::new(MemoryStorage::new()),
        extracted(|_: Told| LockKey::new("never")),
    );
    let app = lock.layer(Router::new());
    for (status, code) in [
        ("400", "3"),
        ("401", "16"),
        ("403", "7"),
        ("404", "5"),
        ("409", "10"),
        ("412", "9"),
        ("415", "3"),
        ("429", "8"),
        ("500", "13"),
        ("503", "14"),
    ] {
        let mut request = told(status);
        let grpc = "application/grpc".parse().unwrap();
        request.headers_mut().insert("content-type", grpc);
        let response = app.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], code, "{status}");
    }
}

#[test]
fn a_request_keeps_its_head_whatever_the_extractors_do() {
    let key = extracted(|_: Told, _: HeaderMap, _: Uri| LockKey::new("all"));
    for answer in [None, Some("401"), Some("wait"), Some("panic")] {
        let mut request = http::Request::put("/a/b?c=d")
            .version(Version::HTTP_2)
            .header("x-one", "1")
            .header("x-one", "2")
            .extension(7_u8)
            .body("the body")
            .unwrap();
        if let Some(answer) = answer {
            request
                .headers_mut()
                .insert("answer", answer.parse().unwrap());
        }
        let headers = request.headers().clone();
        let ended = catch_unwind(AssertUnwindSafe(|| key.request_key(&mut request)));
        assert_eq!(ended.is_err(), answer == Some("panic"));
        assert_eq!(ended.is_ok_and(|key| key.is_ok()), answer.is_none());

        assert_eq!(request.method(), Method::PUT, "{answer:?}");
        assert_eq!(*request.uri(), "/a/b?c=d");
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(*request.headers(), headers);
        assert_eq!(request.extensions().get(), Some(&7_u8));
        assert_eq!(
            request.extensions().get(),
            Some(&"mark"),
            "what they did is kept"
        );
        assert_eq!(*request.body(), "the body");
    }
}

#[test]
fn a_key_function_that_panics_leaves_the_request_as_it_was() {
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&calls);
    let key = extracted(move |_: Uri| -> LockKey {
        seen.fetch_add(1, SeqCst);
        panic!("a bug in the key function")
    });
    let mut request = post("/a");
    assert!(catch_unwind(AssertUnwindSafe(|| key.request_key(&mut request))).is_err());
    assert_eq!((calls.load(SeqCst), request.uri().path()), (1, "/a"));
}

#[tokio::test]
async fn a_key_function_of_ones_own_can_choose_the_status() {
    let closure = |request: &Request| -> Result<LockKey, BoxError> {
        let why = KeyRejected::new(StatusCode::GONE, format!("{} is gone", request.uri()));
        Err(why.into())
    };
    let (status, text) = send(app(closure), post("/orders/42")).await;
    assert_eq!(status, StatusCode::GONE);
    assert!(text.ends_with("/orders/42 is gone"), "{text}");
}

#[test]
fn ready_made_key_functions_have_names_and_can_be_shared() {
    use tower_distributed_lock::middleware::key::{Extracted, Header, Metadata, PathParams};

    fn shared<T: Clone + std::fmt::Debug + Send + Sync + 'static>(_: &T) {}
    let path: PathParams = path_params("orders", ["id"]);
    let name = HeaderName::from_static("x");
    let head: Header = header("orders", name.clone());
    let meta: Metadata = metadata("orders", name);
    type Id = Path<u64>;
    let function: Extracted<fn(Id) -> String, (Id,), u8> =
        extracted((|Path(id): Path<u64>| id.to_string()) as fn(_) -> _).with_state(7);
    shared(&path);
    shared(&head);
    shared(&meta);
    shared(&function);
}
