//! What a client is told whose request has no key, and what the log.

use std::{
    io,
    sync::{Arc, Mutex},
};

use axum::{
    extract::{FromRequestParts, Path},
    response::IntoResponse,
    routing,
};
use http::request::Parts;
use tower::util::BoxCloneSyncService;
use tower_distributed_lock::{
    error::{LockError, LossReason},
    middleware::{DefaultOnReject, OnReject, ProblemDetails},
};

use super::*;

/// Asks who it is, as HTTP does.
struct LoggedIn;

impl<S: Sync> FromRequestParts<S> for LoggedIn {
    type Rejection = Response;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, Response> {
        let head = [("www-authenticate", "Basic"), ("content-language", "en")];
        Err((StatusCode::UNAUTHORIZED, head, "log in first").into_response())
    }
}

fn locks() -> LockFactory {
    LockFactory::new(MemoryStorage::new())
}

/// The body of problem details for a request whose key function fails like this.
async fn problem<K>(key: K) -> (StatusCode, serde_json::Value)
where
    K: KeyFunction<Request> + Send + Sync + 'static,
{
    let lock = DistributedLockLayer::new(locks(), key).on_reject(ProblemDetails::new());
    let (status, text) = send(lock.layer(Router::new()), post("/orders/1")).await;
    (status, serde_json::from_str(&text).unwrap())
}

#[tokio::test]
async fn a_client_gets_the_headers_of_the_extractor_that_refused() {
    let key = || extracted(|_: LoggedIn| LockKey::new("never"));
    let plain = DistributedLockLayer::new(locks(), key());
    let problems = plain.clone().on_reject(ProblemDetails::new());
    let services = [
        BoxCloneSyncService::new(plain.layer(Router::new())),
        BoxCloneSyncService::new(problems.layer(Router::new())),
    ];
    for service in services {
        let answer = service.oneshot(post("/orders/1")).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(answer.headers()["www-authenticate"], "Basic");
        // They say something of a body that the client does not get.
        assert!(!answer.headers().contains_key("content-language"));
        let json = "application/problem+json";
        let kind = answer.headers().get_all("content-type").iter();
        let kind: Vec<_> = kind.collect();
        assert!(kind.is_empty() || kind == [json], "{kind:?}");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(!body.starts_with(b"log in"));
    }
}

#[tokio::test]
async fn problem_details_blame_the_client_for_its_own_mistakes_alone() {
    // The layer is around the router, where no parameters are.
    let (status, misplaced) = problem(path_params("orders", ["id"])).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    let (status, unknown) = problem(extracted(|_: LoggedIn| LockKey::new("never"))).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    for body in [misplaced, unknown] {
        let detail = body["detail"].as_str().unwrap();
        assert!(!detail.contains("names no valid resource"), "{body}");
        assert!(detail.ends_with("not carried out."), "{body}");
    }
    let (status, invalid) = problem(|_: &Request| "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let detail = invalid["detail"].as_str().unwrap();
    assert!(detail.contains("names no valid resource"), "{invalid}");
}

#[test]
fn a_request_that_was_not_served_is_not_called_half_done() {
    let hook = ProblemDetails::new();
    let detail = |rejection| {
        let context = OnReject::<_, Response<String>, Infallible>::context(&hook, &post("/a"));
        let answer: Result<Response<String>, Infallible> =
            OnReject::<Request, _, _>::reject(&hook, context, rejection);
        let body: serde_json::Value = serde_json::from_str(answer.unwrap().body()).unwrap();
        assert_eq!(body["reason"], "lock_lost");
        body["detail"].as_str().unwrap().to_owned()
    };
    let waiting = Rejection::from(LockError::Lost(LossReason::Expired));
    assert_eq!(waiting.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(detail(waiting).contains("not carried out"));
    assert!(detail(Rejection::Lost(LossReason::Expired)).contains("may have been carried out"));
}

#[tokio::test(start_paused = true)]
async fn a_client_is_told_to_wait_no_longer_than_its_server_likes() {
    let world = World::new();
    let _held = world.taken_elsewhere("a").await;
    let at_once = LockOptions::default().within(Duration::ZERO);
    for (hook, after) in [
        (DefaultOnReject::new(), "10"),
        (DefaultOnReject::new().retry_after_at_most(ms(1_200)), "2"),
    ] {
        let lock = DistributedLockLayer::new(world.factory.clone(), |_: &Request| "a");
        let service = lock.options(at_once).on_reject(hook).layer(Router::new());
        let answer = service.oneshot(post("/a")).await.unwrap();
        assert_eq!(answer.status(), StatusCode::LOCKED);
        assert_eq!(answer.headers()["retry-after"], after);
    }
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines(&self, level: &str) -> usize {
        let log = self.0.lock().unwrap();
        let log = str::from_utf8(&log).unwrap();
        let is_one = |line: &&str| line.contains(level) && line.contains("request rejected");
        log.lines().filter(is_one).count()
    }
}

#[tokio::test]
async fn a_misplaced_layer_fills_no_log_however_many_requests_come() {
    // Without it, what other tests find first on their threads is not heard here.
    let deaf = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(io::sink);
    tracing::subscriber::set_global_default(deaf.finish()).unwrap();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer({
            let log = log.clone();
            move || log.clone()
        });
    let _here = tracing::subscriber::set_default(subscriber.finish());

    let lock = layer(extracted(|Path(id): Path<u64>| {
        LockKey::new(id.to_string())
    }));
    // `Router::layer` makes a service for each route, and one for paths that there are not.
    let app = Router::new()
        .route("/orders/{id}", routing::post(locked))
        .route("/health", routing::get(async || ()))
        .layer(lock);
    for path in ["/health", "/.env", "/health", "/wp-login.php", "/health"] {
        let (status, _) = send(app.clone(), post(path)).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}");
    }
    assert_eq!((log.lines("ERROR"), log.lines("DEBUG")), (1, 4));
}
