//! `Server-Timing` in responses.

use axum::body::{Body, Bytes};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, LockKey, error::StorageErrorKind, middleware::RequestKey,
};

use super::{capture::Capture, *};

fn told<B>(response: &Response<B>) -> Vec<&str> {
    let told = response.headers().get_all("server-timing").iter();
    told.map(|value| value.to_str().unwrap()).collect()
}

async fn answer(_: Request<Body>) -> Result<Response<Body>, Infallible> {
    Ok(Response::new(Body::empty()))
}

fn request() -> Request<Body> {
    Request::new(Body::empty())
}

#[tokio::test(start_paused = true)]
async fn a_response_tells_how_long_its_request_waited() {
    let factory = factory(&memory());
    let layer = DistributedLockLayer::new(factory.clone(), |_: &Request<Body>| "orders/42")
        .options(patient())
        .server_timing();
    let mut service = layer.layer(service_fn(answer));
    let response = service.call(request()).await.unwrap();
    assert_eq!(told(&response), ["lock;dur=0"]);

    let guard = key(&factory).lock(patient()).await.unwrap();
    let waiting = tokio::spawn(service.call(request()));
    settle().await;
    tokio::time::sleep(Duration::from_micros(70_125)).await;
    drop(guard);
    let waited = told(&waiting.await.unwrap().unwrap())[0].to_owned();
    let waited: f64 = waited.strip_prefix("lock;dur=").unwrap().parse().unwrap();
    // Timers of tokio have milliseconds, and the lock may be asked for at the next poll.
    assert!((70.0..200.0).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn what_others_tell_stays() {
    let layer = DistributedLockLayer::new(factory(&memory()), |_: &Request<Body>| "orders/42")
        .server_timing();
    let mut service = layer.layer(service_fn(async |request| {
        let mut response = answer(request).await?;
        let theirs = "db;dur=53".parse().unwrap();
        response.headers_mut().insert("server-timing", theirs);
        Ok::<_, Infallible>(response)
    }));
    let response = service.call(request()).await.unwrap();
    assert_eq!(told(&response), ["db;dur=53", "lock;dur=0"]);
}

#[tokio::test(start_paused = true)]
async fn a_response_to_a_request_without_a_lock_tells_nothing() {
    let layer =
        DistributedLockLayer::new(factory(&memory()), |_: &Request<Body>| RequestKey::none())
            .server_timing();
    let response = layer.layer(service_fn(answer)).oneshot(request()).await;
    assert!(told(&response.unwrap()).is_empty());
    // Nor does one that nobody asked to.
    let layer = DistributedLockLayer::new(factory(&memory()), |_: &Request<Body>| "orders/42");
    let response = layer.layer(service_fn(answer)).oneshot(request()).await;
    assert!(told(&response.unwrap()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_rejection_tells_how_long_its_request_waited_for_others() {
    let factory = LockFactory::builder(memory())
        .clock(Clock::tokio())
        .max_waiters_per_key(1)
        .build()
        .unwrap();
    let _guard = key(&factory).lock(patient()).await.unwrap();
    let layer = DistributedLockLayer::new(factory, |_: &Request<Body>| "orders/42")
        .options(options().retries(2).build().unwrap())
        .server_timing();
    let mut service = layer.layer(service_fn(answer));
    let waiting = tokio::spawn(service.call(request()));
    settle().await;
    let response = service.call(request()).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(told(&response), ["lock;dur=0"]);
    let response = waiting.await.unwrap().unwrap();
    assert_eq!(response.status(), 423);
    assert_eq!(told(&response), ["lock;dur=200"]);

    let (storage, factory) = faulty();
    storage.always(Op::Acquire, Fault::fails(StorageErrorKind::Rejected));
    let layer = DistributedLockLayer::new(factory, |_: &Request<Body>| "orders/42").server_timing();
    let response = layer.layer(service_fn(answer)).oneshot(request()).await;
    assert!(told(&response.unwrap()).is_empty(), "nobody held it up");
}

#[tokio::test(start_paused = true)]
async fn several_locks_are_told_as_one() {
    let factory = factory(&memory());
    let held = ["a", "b"].map(|key| factory.create_lock(key).unwrap());
    let [a, b] = [held[0].lock(patient()).await, held[1].lock(patient()).await];
    let keys =
        |_: &Request<Body>| RequestKey::all(["b", "a"].map(|key| LockKey::new(key).unwrap()));
    let layer = DistributedLockLayer::new(factory, keys)
        .options(patient())
        .server_timing();
    let waiting = tokio::spawn(layer.layer(service_fn(answer)).oneshot(request()));
    settle().await;
    tokio::time::sleep(ms(100)).await;
    drop(a);
    settle().await;
    tokio::time::sleep(ms(100)).await;
    drop(b);
    let response = waiting.await.unwrap().unwrap();
    let waited: f64 = told(&response)[0]["lock;dur=".len()..].parse().unwrap();
    assert!((200.0..400.0).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn a_body_is_held_and_seen_to_its_end_all_the_same() {
    let (seen, _default) = Capture::start(tracing_subscriber::filter::LevelFilter::TRACE);
    let factory = factory(&memory());
    let layer = DistributedLockLayer::new(factory.clone(), |_: &Request<Body>| "orders/42")
        .hold_to_body_end()
        .server_timing();
    let frames = service_fn(async |_: Request<Body>| {
        let frames = [1, 2].map(|frame| {
            tracing::debug!(frame);
            Ok::<_, Infallible>(Bytes::from_static(b"frame"))
        });
        let frames = stream::iter(frames).map(|frame| {
            tracing::debug!("frame");
            frame
        });
        Ok::<_, Infallible>(Response::new(Body::from_stream(frames)))
    });
    let mut response = layer.layer(frames).oneshot(request()).await.unwrap();
    assert_eq!(told(&response), ["lock;dur=0"]);
    assert_eq!(factory.keys(), 1);
    tokio::time::sleep(ms(100)).await;
    while let Some(frame) = response.body_mut().frame().await {
        frame.unwrap();
    }
    settle().await;
    assert_eq!(factory.keys(), 0);
    let span = seen.lock();
    assert!(span.is_closed);
    assert_eq!(span.field("hold_ms"), Some("100.0"));
    for line in seen.lines() {
        assert_eq!(line.spans, ["lock:orders/42"], "{line:?}");
    }
    assert_eq!(seen.lines().len(), 4);
}
