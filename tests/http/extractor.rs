//! The lock in the hands of a handler.

use axum::{Extension, extract::State};
use http::{HeaderName, header};
use tokio::sync::oneshot;
use tower_distributed_lock::{error::LossReason, middleware::OnLoss};

use super::*;

async fn shows(Path(id): Path<u64>, lock: HeldLock) -> String {
    let has_time = lock.remaining() > Duration::from_secs(5);
    format!("{id} {} {} {has_time}", lock.key(), lock.is_held())
}

async fn with_or_without(lock: Option<HeldLock>) -> String {
    lock.is_some().to_string()
}

#[tokio::test]
async fn a_handler_can_ask_for_its_lock() {
    let writes = |request: &Request| (request.method() != "GET").then(|| path(request));
    let app = Router::new()
        .route("/a/{id}", post(shows))
        .route("/b", post(with_or_without).get(with_or_without))
        .layer(DistributedLockLayer::new(memory(), writes));
    let address = serve(app).await;
    for version in VERSIONS {
        let client = Client::new(version, address);
        let answer = client.send("POST", "/a/7").await;
        assert_eq!(
            (answer.status, &*answer.text),
            (StatusCode::OK, "7 /a/7 true true")
        );
        assert_eq!(client.send("POST", "/b").await.text, "true");
        assert_eq!(
            client.send("GET", "/b").await.text,
            "false",
            "it has no key"
        );
    }
}

#[tokio::test]
async fn a_handler_without_its_layer_says_what_is_missing() {
    let app = Router::new()
        .route("/a/{id}", post(shows))
        .route("/b", get(with_or_without));
    let address = serve(app).await;
    for version in VERSIONS {
        let client = Client::new(version, address);
        let Answer { status, text, .. } = client.send("POST", "/a/7").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(
            text.contains("put a `DistributedLockLayer` around this route"),
            "{text}"
        );
        let answer = client.send("GET", "/b").await;
        assert_eq!((answer.status, &*answer.text), (StatusCode::OK, "false"));
    }
}

/// What a test and a handler say to each other.
#[derive(Clone, Default)]
struct Steps {
    released: Arc<Notify>,
    go_on: Arc<Notify>,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_releases_early_goes_on_while_the_next_is_in() {
    async fn first(lock: HeldLock, State(steps): State<Steps>) -> String {
        lock.release();
        steps.released.notify_one();
        steps.go_on.notified().await;
        format!("{} {:?}", lock.is_held(), lock.remaining())
    }
    for version in VERSIONS {
        let steps = Steps::default();
        let locks = memory();
        let lock = DistributedLockLayer::new(locks.clone(), |_: &Request| "k".to_owned());
        let app = Router::new()
            .route("/first", post(first))
            .route("/second", post(with_or_without))
            .layer(lock)
            .with_state(steps.clone());
        let client = Client::new(version, serve(app).await);
        let other = client.clone();
        let first = tokio::spawn(async move { other.send("POST", "/first").await });
        within(LIMIT, "an early release", steps.released.notified()).await;
        assert_eq!(client.send("POST", "/second").await.text, "true");
        assert!(!first.is_finished());
        steps.go_on.notify_one();
        let answer = first.await.unwrap();
        // What has been given back cannot be lost: the request is answered as if nothing had been.
        assert_eq!(
            (answer.status, &*answer.text),
            (StatusCode::OK, "false 0ns")
        );
        eventually("nothing is left", LIMIT, async || locks.keys() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_waits_for_the_loss_is_told_and_may_answer() {
    /// Says that it runs.
    type Running = Arc<Notify>;

    async fn told(lock: HeldLock, Extension(running): Extension<Running>) -> String {
        running.notify_one();
        let lost = within(LIMIT, "the loss", lock.lost()).await;
        assert!(!lock.is_held());
        assert_eq!(lost, lock.lost().await, "it is not forgotten");
        assert_eq!(lost, LossReason::NotOurs);
        lost.to_string()
    }
    for version in VERSIONS {
        let storage = MemoryStorage::new();
        let running = Running::default();
        let options = LockOptions::builder().ttl(ms(300)).build().unwrap();
        let lock = DistributedLockLayer::new(LockFactory::new(storage.clone()), path)
            .options(options)
            .on_loss(OnLoss::Signal);
        let app = Router::new()
            .route("/a", post(told).route_layer(lock))
            .layer(Extension(Arc::clone(&running)));
        let client = Client::new(version, serve(app).await);
        let answer = tokio::spawn(async move { client.send("POST", "/a").await });
        running.notified().await;
        // As if somebody had deleted it.
        storage.clear();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.text, LossReason::NotOurs.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_not_to_run_on_is_dropped_at_the_loss() {
    /// Tells the test when it is dropped.
    async fn hangs(State(steps): State<Steps>) {
        struct Told(Arc<Notify>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let _told = Told(steps.released);
        steps.go_on.notify_one();
        std::future::pending::<()>().await;
    }
    for version in VERSIONS {
        let storage = MemoryStorage::new();
        let steps = Steps::default();
        let options = LockOptions::builder().ttl(ms(300)).build().unwrap();
        let lock =
            DistributedLockLayer::new(LockFactory::new(storage.clone()), path).options(options);
        let app = Router::new()
            .route("/a", post(hangs).route_layer(lock))
            .with_state(steps.clone());
        let client = Client::new(version, serve(app).await);
        let answer = tokio::spawn(async move { client.send("POST", "/a").await });
        steps.go_on.notified().await;
        storage.clear();
        within(LIMIT, "the handler's end", steps.released.notified()).await;
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fencing_token_is_passed_on_to_another_service_in_order() {
    const FENCE: HeaderName = HeaderName::from_static("x-fencing-token");

    /// A service further on, that answers with the token that it has got.
    async fn backend(headers: HeaderMap) -> String {
        let tokens = headers.get_all(FENCE).iter();
        let tokens: Vec<_> = tokens.map(|token| token.to_str().unwrap()).collect();
        tokens.join(",")
    }
    /// Passes its headers on, as a proxy does, and shows what it was itself told.
    async fn front(
        lock: HeldLock,
        State(backend): State<Client>,
        mut headers: HeaderMap,
    ) -> String {
        for own in [header::HOST, header::CONTENT_LENGTH] {
            headers.remove(own);
        }
        let headers: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
            .collect();
        let seen = backend.send_with("POST", "/", &headers).await.text;
        assert_eq!(seen, lock.fencing_token().unwrap().to_string());
        seen
    }
    for version in VERSIONS {
        let backend = serve(Router::new().route("/", post(backend))).await;
        let lock = DistributedLockLayer::new(memory(), path).fencing_header(FENCE);
        let app = Router::new()
            .route("/a", post(front).route_layer(lock))
            .with_state(Client::new(version, backend));
        let client = Client::new(version, serve(app).await);
        let mut last = 0;
        for _ in 0..3 {
            let forged = [("x-fencing-token", "9007199254740991")];
            let answer = client.send_with("POST", "/a", &forged).await;
            let token: u64 = answer.text.parse().unwrap();
            assert!(token > last, "{token} after {last}");
            last = token;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_a_handler_keeps_is_released_with_its_request_all_the_same() {
    /// Hands its lock to a task that outlives the request.
    async fn keeps(lock: HeldLock, State(kept): State<Kept>) {
        let sender = kept.lock().unwrap().take().unwrap();
        sender.send(lock).unwrap();
    }
    type Kept = Arc<std::sync::Mutex<Option<oneshot::Sender<HeldLock>>>>;

    for version in VERSIONS {
        let (sender, kept) = oneshot::channel();
        let locks = memory();
        let lock = DistributedLockLayer::new(locks.clone(), path);
        let app = Router::new()
            .route("/a", post(keeps).route_layer(lock))
            .with_state(Kept::new(Some(sender).into()));
        let client = Client::new(version, serve(app).await);
        assert_eq!(client.send("POST", "/a").await.status, StatusCode::OK);
        let kept = kept.await.unwrap();
        eventually("nothing is held", LIMIT, async || locks.keys() == 0).await;
        assert!(!kept.is_held());
    }
}
