//! Several keys in one request, and options of its own.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use axum::{extract::Path, routing};
use http::HeaderValue;
use tower::service_fn;
use tower_distributed_lock::{
    LockSet,
    error::StorageError,
    middleware::{IntoRequestKey, OnLoss, key::ExtractorFn},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest,
    },
};

use super::*;

fn account(id: u64) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["accounts", &id.to_string()])
}

fn both(Path((from, to)): Path<(u64, u64)>) -> Result<[LockKey; 2], InvalidKey> {
    Ok([account(from)?, account(to)?])
}

fn options() -> LockOptions {
    let options = LockOptions::builder().ttl(ms(3_000)).interval(ms(10));
    options.retries(10).build().unwrap()
}

fn transfer(
    factory: &LockFactory,
) -> DistributedLockLayer<impl KeyFunction<Request> + Send + Sync + 'static> {
    DistributedLockLayer::new(factory.clone(), extracted(both)).options(options())
}

/// What the handler of a transfer sees of its locks.
async fn tell(lock: HeldLock) -> String {
    let all = (lock.key().to_string(), lock.fencing_token().is_some());
    let each: Vec<_> = lock
        .each()
        .map(|lock| {
            (
                lock.key().to_string(),
                lock.fencing_token().is_some(),
                lock.is_held(),
            )
        })
        .collect();
    format!("{all:?} {each:?}")
}

#[tokio::test(start_paused = true)]
async fn a_transfer_holds_both_accounts_in_whatever_order_they_are_named() {
    let world = World::new();
    let handler = routing::post(tell).route_layer(transfer(&world.factory));
    let app = Router::new().route("/transfer/{from}/{to}", handler);
    let both = r#"("accounts/3", false) [("accounts/3", true, true), ("accounts/7", true, true)]"#;
    for path in ["/transfer/3/7", "/transfer/7/3"] {
        let answer = send(app.clone(), post(path)).await;
        assert_eq!(answer, (StatusCode::OK, both.to_owned()));
    }
    // One account is one lock.
    let one = r#"("accounts/3", true) [("accounts/3", true, true)]"#;
    let answer = send(app, post("/transfer/3/3")).await;
    assert_eq!(answer, (StatusCode::OK, one.to_owned()));
    settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn transfers_in_opposite_directions_all_come_through_one_at_a_time() {
    const ACCOUNTS: u64 = 4;
    let world = World::new();
    let inside: Arc<[AtomicBool; ACCOUNTS as usize]> = Arc::default();
    let seen = Arc::clone(&inside);
    let work = move |Path(accounts): Path<(usize, usize)>| {
        let inside = Arc::clone(&seen);
        async move {
            let accounts: [usize; 2] = accounts.into();
            for account in accounts {
                assert!(!inside[account].swap(true, SeqCst), "two transfers");
            }
            tokio::time::sleep(ms(1)).await;
            for account in accounts {
                inside[account].store(false, SeqCst);
            }
        }
    };
    let patient = LockOptions::builder().interval(ms(10)).retries(6_000);
    let patient = patient.build().unwrap();
    let apps = [&world.factory, &world.other].map(|factory| {
        let lock = transfer(factory).options(patient);
        Router::new().route(
            "/transfer/{from}/{to}",
            routing::post(work.clone()).route_layer(lock),
        )
    });
    let mut requests = tokio::task::JoinSet::new();
    for request in 0..200 {
        let from = request % ACCOUNTS;
        let to = (from + 1 + request / ACCOUNTS % (ACCOUNTS - 1)) % ACCOUNTS;
        let app = apps[request as usize / 2 % 2].clone();
        requests.spawn(async move { send(app, post(&format!("/transfer/{from}/{to}"))).await });
    }
    while let Some(answer) = requests.join_next().await {
        assert_eq!(answer.unwrap().0, StatusCode::OK);
    }
    settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_cannot_have_both_accounts_has_none() {
    let world = World::new();
    let elsewhere = world.taken_elsewhere("accounts/7").await;
    let called = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&called);
    let handler = async move || seen.store(true, SeqCst);
    let handler = routing::post(handler).route_layer(transfer(&world.factory));
    let app = Router::new().route("/transfer/{from}/{to}", handler);
    let start = tokio::time::Instant::now();
    let (status, _) = send(app, post("/transfer/3/7")).await;
    assert_eq!(status, StatusCode::LOCKED);
    assert_eq!(start.elapsed(), options().max_wait());
    assert!(!called.load(SeqCst));
    settle().await;
    assert_eq!((world.factory.keys(), world.storage.len()), (0, 1));
    drop(elsewhere);
    settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn no_key_and_too_many_are_refused() {
    for count in [0, LockSet::MAX_LEN as u64 + 1] {
        let keys = move |_: &Request| (0..count).map(account).collect::<Result<Vec<_>, _>>();
        let app = layer(keys).layer(Router::new());
        assert_eq!(
            send(app, post("/")).await.0,
            StatusCode::BAD_REQUEST,
            "{count}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_inner_service_gets_all_tokens_in_the_order_of_the_keys_and_no_others() {
    const HEADER: HeaderName = HeaderName::from_static("fencing-token");
    let world = World::new();
    let tell = async |lock: HeldLock, headers: http::HeaderMap| {
        let values: Vec<u64> = headers
            .get_all(HEADER)
            .iter()
            .map(|value| value.to_str().unwrap().parse().unwrap())
            .collect();
        let tokens: Vec<_> = lock
            .each()
            .map(|lock| lock.fencing_token().unwrap())
            .collect();
        assert_eq!(values, tokens);
        assert_eq!(values.len(), 2);
        format!("{values:?}")
    };
    let lock = transfer(&world.factory).fencing_header(HEADER);
    let app = Router::new().route(
        "/transfer/{from}/{to}",
        routing::post(tell).route_layer(lock),
    );
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut request = post("/transfer/7/3");
        for _ in 0..3 {
            let forged = HeaderValue::from(9_007_199_254_740_991_u64);
            request.headers_mut().append(HEADER, forged);
        }
        seen.push(send(app.clone(), request).await);
        settle().await;
    }
    assert!(seen.iter().all(|(status, _)| *status == StatusCode::OK));
    assert_ne!(seen[0], seen[1]);
}

/// Forgets one lock: its renewals are told that it is not theirs.
#[derive(Clone)]
struct Forgetful {
    memory: MemoryStorage,
    forgotten: Arc<Mutex<Option<String>>>,
}

impl LockStorage for Forgetful {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.memory.acquire(request).await
    }
    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let mut replies = self.memory.renew(requests).await;
        let forgotten = self.forgotten.lock().unwrap().clone();
        for (request, reply) in requests.iter().zip(&mut replies) {
            if Some(request.name.key()) == forgotten.as_deref() {
                *reply = Ok(RenewReply::NotOurs);
            }
        }
        replies
    }
    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.memory.release(request).await
    }
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_either_account_ends_the_transfer() {
    for forgotten in ["accounts/3", "accounts/7"] {
        let storage = Forgetful {
            memory: MemoryStorage::with_clock(Clock::tokio()),
            forgotten: Arc::new(Mutex::new(Some(forgotten.to_owned()))),
        };
        let factory = World::factory(storage.clone());
        let keys = |_: &Request| Ok::<_, InvalidKey>([account(3)?, account(7)?]);
        let lock = DistributedLockLayer::new(factory.clone(), keys).options(options());
        let dropped = Arc::new(AtomicUsize::new(0));
        struct Dropped(Arc<AtomicUsize>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.fetch_add(1, SeqCst);
            }
        }
        let seen = Arc::clone(&dropped);
        let hangs = service_fn(move |_: Request| {
            let work = Dropped(Arc::clone(&seen));
            async move {
                let _work = work;
                std::future::pending::<Result<Response, Infallible>>().await
            }
        });
        let start = tokio::time::Instant::now();
        let (status, _) = send(lock.clone().layer(hangs), post("/")).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{forgotten}");
        assert_eq!(start.elapsed(), ms(1_000), "at the first renewal");
        assert_eq!(dropped.load(SeqCst), 1);

        // Or the handler is told.
        let told = service_fn(async |request: Request| {
            let lock = request.extensions().get::<HeldLock>().unwrap().clone();
            let reason = lock.lost().await;
            let each: Vec<_> = lock.each().map(|lock| lock.is_held()).collect();
            assert_eq!((lock.is_held(), lock.remaining()), (false, Duration::ZERO));
            let text = format!("{reason:?} {each:?}");
            Ok::<_, Infallible>(Response::new(Body::from(text)))
        });
        let told = lock.on_loss(OnLoss::Signal).layer(told);
        let (status, text) = send(told, post("/")).await;
        let each = ["accounts/3", "accounts/7"].map(|key| key != forgotten);
        assert_eq!(
            (status, text),
            (StatusCode::OK, format!("NotOurs {each:?}"))
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_can_give_all_its_locks_back_early() {
    let world = World::new();
    let storage = world.storage.clone();
    let handler = async move |lock: HeldLock| {
        assert_eq!(storage.len(), 2);
        lock.release();
        settle().await;
        storage.len().to_string()
    };
    let handler = routing::post(handler).route_layer(transfer(&world.factory));
    let app = Router::new().route("/transfer/{from}/{to}", handler);
    let answer = send(app, post("/transfer/3/7")).await;
    assert_eq!(answer, (StatusCode::OK, "0".into()));
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_request_can_have_a_ttl_and_a_wait_of_its_own() {
    let world = World::new();
    // `/<ttl>/<wait>`, in milliseconds, `/-` for those of the layer, anything else without a lock.
    let key = |request: &Request| -> Option<Result<(LockKey, LockOptions), BoxError>> {
        let path = request.uri().path().to_owned();
        let mut parts = path.split('/').skip(1).map(str::parse::<u64>);
        let (Some(Ok(ttl)), Some(Ok(wait))) = (parts.next(), parts.next()) else {
            return None;
        };
        let options = LockOptions::builder().ttl(ms(ttl)).build();
        Some((|| Ok((LockKey::new("one")?, options?.within(ms(wait)))))())
    };
    let lock = DistributedLockLayer::new(world.factory.clone(), key).options(options());
    let other = DistributedLockLayer::new(world.other.clone(), key).options(options());
    let storage = world.storage.clone();
    let inner = service_fn(move |request: Request| {
        let storage = storage.clone();
        async move {
            assert_eq!(
                request.extensions().get::<HeldLock>().is_some(),
                !storage.is_empty()
            );
            if !storage.is_empty() {
                tokio::time::sleep(ms(100)).await;
            }
            Ok::<_, Infallible>(Response::default())
        }
    });
    let (lock, other) = (lock.layer(inner.clone()), other.layer(inner));

    assert_eq!(send(lock.clone(), post("/none")).await.0, StatusCode::OK);

    let holder = tokio::spawn(send(lock.clone(), post("/7000/0")));
    settle().await;
    // Its ttl is in the storage: that is when others had better come again.
    let start = tokio::time::Instant::now();
    let refused = other.clone().oneshot(post("/5000/50")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::LOCKED);
    assert_eq!(refused.headers()["retry-after"], "7");
    assert_eq!(start.elapsed(), ms(50), "its wait, not the layer's");
    let served = send(other.clone(), post("/5000/2000")).await;
    assert_eq!(served.0, StatusCode::OK);
    assert_eq!(holder.await.unwrap().0, StatusCode::OK);

    // A ttl that cannot be is the request's own mistake.
    assert_eq!(send(lock, post("/1/0")).await.0, StatusCode::BAD_REQUEST);
    settle().await;
    world.assert_nothing_left();
}

#[test]
fn several_keys_may_be_text() {
    let keys = ["a", "b"].map(|key| LockKey::new(key).unwrap());
    let both = RequestKey::all(keys).unwrap();
    assert_eq!(["b", "a"].into_request_key().unwrap(), both);
    let owned = vec!["b".to_owned(), "a".to_owned()];
    assert_eq!(owned.into_request_key().unwrap(), both);
    let error = ["a", ""].into_request_key().unwrap_err();
    assert!(error.is::<InvalidKey>());
}

/// A function of extractors is one wherever it is written.
#[test]
fn functions_of_extractors_can_be_named_in_bounds() {
    fn check<T>(_: impl ExtractorFn<T>) {}
    check(both);
}
