//! Frame by frame, on paused time.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{
    BodyExt, Full,
    combinators::{BoxBody, UnsyncBoxBody},
};
use tokio::{sync::mpsc::UnboundedSender, time::Instant};
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, InvalidKey, LossReason, StorageError},
    middleware::{Hold, HoldBody, OnLoss, RequestKey, RequestLock},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, MemoryStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

use crate::{
    kit::{LONG, within},
    told::{End, Step, Told},
};

type Req = Request<()>;
type Key = fn(&Req) -> Result<LockKey, InvalidKey>;

fn path(request: &Req) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

fn request() -> Req {
    Request::get("/a").body(()).unwrap()
}

const TTL: Duration = Duration::from_secs(3);
/// The ttl less 1 % and 2 ms.
const DEADLINE: Duration = Duration::from_millis(2968);

fn options() -> LockOptions {
    LockOptions::builder()
        .ttl(TTL)
        .interval(Duration::from_millis(10))
        .retries(0)
        .build()
        .unwrap()
}

/// A storage that renews nothing.
#[derive(Clone)]
struct NoRenewal(MemoryStorage);

impl LockStorage for NoRenewal {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }
    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        requests.iter().map(|_| Ok(RenewReply::NotOurs)).collect()
    }
    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }
}

/// A storage that answers no renewal.
#[derive(Clone)]
struct SilentRenewal(MemoryStorage);

impl LockStorage for SilentRenewal {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }
    async fn renew(&self, _: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        std::future::pending().await
    }
    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }
}

struct World {
    storage: MemoryStorage,
    factory: LockFactory,
}

fn factory(storage: impl LockStorage) -> LockFactory {
    let builder = LockFactory::builder(storage).clock(Clock::tokio());
    builder.build().unwrap()
}

impl World {
    fn new() -> Self {
        let storage = MemoryStorage::with_clock(Clock::tokio());
        Self {
            factory: factory(storage.clone()),
            storage,
        }
    }

    /// A world in which no lock outlives its ttl.
    fn without_renewal() -> Self {
        let storage = MemoryStorage::with_clock(Clock::tokio());
        Self {
            factory: factory(SilentRenewal(storage.clone())),
            storage,
        }
    }

    fn layer(&self) -> DistributedLockLayer<Key> {
        let path: Key = path;
        DistributedLockLayer::new(self.factory.clone(), path).options(options())
    }

    #[track_caller]
    fn assert_held(&self) {
        assert_eq!((self.factory.keys(), self.storage.len()), (1, 1));
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!((self.factory.keys(), self.factory.waiters()), (0, 0));
        assert!(self.storage.is_empty());
    }
}

/// A response whose body does what it is told.
struct Streamed<B = Body> {
    response: Response<B>,
    teller: UnboundedSender<Step>,
    end: End,
    lock: HeldLock,
}

type Made = Arc<Mutex<Option<(UnboundedSender<Step>, End, HeldLock)>>>;

/// Sends one request through `$layer`. The body of the answer does what it is told, once it was
/// made a response by `$make`.
macro_rules! stream {
    ($layer:expr) => {
        stream!($layer, |told| Response::new(Body::new(told)))
    };
    ($layer:expr, $make:expr) => {{
        let made = Made::default();
        let keep = Arc::clone(&made);
        let service = service_fn(move |request: Req| {
            let lock: HeldLock = request.extensions().get().cloned().expect("a `HeldLock`");
            let (told, teller, end) = Told::new(Some(lock.clone()));
            *keep.lock().unwrap() = Some((teller, end, lock));
            let make: fn(Told) -> Response<_> = $make;
            std::future::ready(Ok::<_, Infallible>(make(told)))
        });
        let response = $layer.layer(service).oneshot(request()).await.unwrap();
        let (teller, end, lock) = made.lock().unwrap().take().unwrap();
        Streamed {
            response,
            teller,
            end,
            lock,
        }
    }};
}

impl<B> Streamed<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    fn tell(&self, step: Step) {
        assert!(self.teller.send(step).is_ok(), "the body is gone");
    }

    async fn frame(&mut self) -> Option<Result<Frame<Bytes>, B::Error>> {
        within(LONG, "a frame", self.response.frame()).await
    }

    /// The next frame, which has data.
    async fn data(&mut self) -> Bytes {
        let frame = self.frame().await.expect("a frame").expect("no error");
        frame.into_data().expect("data")
    }
}

/// The loss that an error of a body tells of.
fn loss(error: &(dyn std::error::Error + 'static)) -> Option<LossReason> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(reason) = error.downcast_ref() {
            return Some(*reason);
        }
        next = error.source();
    }
    None
}

mod release {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn without_asking_for_it_the_lock_is_held_to_the_head_only() {
        let world = World::new();
        let mut streamed = stream!(world.layer());
        world.assert_nothing_left();
        streamed.tell(Step::Data("late"));
        assert_eq!(streamed.data().await, "late");
    }

    #[tokio::test(start_paused = true)]
    async fn the_lock_is_held_until_the_body_has_ended() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        world.assert_held();
        for text in ["one", "two"] {
            streamed.tell(Step::Data(text));
            assert_eq!(streamed.data().await, text);
            world.assert_held();
        }
        drop(std::mem::replace(
            &mut streamed.teller,
            tokio::sync::mpsc::unbounded_channel().0,
        ));
        assert!(streamed.frame().await.is_none());
        world.assert_nothing_left();
        assert_eq!(streamed.end.held(), Some(true), "the work ends first");
        assert!(streamed.frame().await.is_none(), "an end is an end");
    }

    #[tokio::test(start_paused = true)]
    async fn a_frame_that_is_known_to_be_the_last_releases() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        world.assert_held();
        assert!(!streamed.response.body().is_end_stream());
        streamed.tell(Step::Last("two"));
        assert_eq!(streamed.data().await, "two");
        world.assert_nothing_left();
        assert_eq!(streamed.end.held(), Some(true), "the work ends first");
        assert!(streamed.response.body().is_end_stream());
        assert_eq!(streamed.response.body().size_hint().exact(), Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn trailers_pass_and_release() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        world.assert_held();
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", 7.into());
        streamed.tell(Step::Trailers(trailers.clone()));
        let frame = streamed.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_trailers().ok(), Some(trailers));
        world.assert_nothing_left();
        assert_eq!(streamed.end.held(), Some(true), "the work ends first");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_of_the_body_passes_and_releases() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Error("disk full"));
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "disk full");
        world.assert_nothing_left();
        assert_eq!(streamed.end.held(), Some(true), "the work ends first");
        assert!(streamed.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_dropped_releases() {
        let world = World::new();
        let never_polled = stream!(world.layer().hold_to_body_end());
        world.assert_held();
        drop(never_polled.response);
        world.assert_nothing_left();
        assert_eq!(never_polled.end.held(), Some(true), "the work ends first");

        let mut half_sent = stream!(world.layer().hold_to_body_end());
        half_sent.tell(Step::Data("one"));
        assert_eq!(half_sent.data().await, "one");
        world.assert_held();
        drop(half_sent.response);
        world.assert_nothing_left();
        assert_eq!(half_sent.end.held(), Some(true), "the work ends first");
    }

    /// A body of each kind that is at its end when it is made.
    #[tokio::test(start_paused = true)]
    async fn a_response_without_a_body_releases_with_its_head() {
        let world = World::new();
        let empty = service_fn(async |_: Req| Ok::<_, Infallible>(Response::new(Body::empty())));
        let layer = world.layer().hold_to_body_end();
        let response = layer.layer(empty).oneshot(request()).await.unwrap();
        world.assert_nothing_left();
        drop(response);

        let empty = service_fn(async |_: Req| {
            Ok::<_, Infallible>(Response::new(tonic::body::Body::empty()))
        });
        let response = layer.layer(empty).oneshot(request()).await.unwrap();
        world.assert_nothing_left();
        drop(response);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_of_one_frame_releases_with_it() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end();
        let full = service_fn(async |_: Req| {
            Ok::<_, Infallible>(Response::new(Body::new(Full::from("all of it"))))
        });
        let mut response = layer.layer(full).oneshot(request()).await.unwrap();
        world.assert_held();
        assert_eq!(response.body().size_hint().exact(), Some(9));
        let frame = response.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "all of it");
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn the_length_of_the_body_is_known_as_before() {
        let world = World::new();
        let streamed = stream!(world.layer().hold_to_body_end(), |mut told| {
            told.length = Some(1234);
            Response::new(Body::new(told))
        });
        assert_eq!(streamed.response.body().size_hint().exact(), Some(1234));
        let streamed = stream!(World::new().layer().hold_to_body_end());
        assert_eq!(streamed.response.body().size_hint().exact(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn errors_and_rejections_hold_nothing() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end();
        let fails = service_fn(async |_: Req| Err::<Response<Body>, _>("no"));
        let error = layer.layer(fails).oneshot(request()).await.unwrap_err();
        assert_eq!(error, "no");
        world.assert_nothing_left();

        let first = stream!(layer.clone());
        let answers =
            service_fn(async |_: Req| Ok::<_, Infallible>(Response::new(Body::from("hello"))));
        let rejected = layer.layer(answers).oneshot(request()).await.unwrap();
        assert_eq!(rejected.status(), StatusCode::LOCKED);
        drop(first.response);
        world.assert_nothing_left();
        assert!(rejected.body().is_end_stream());
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_response_without_a_body_waits_for_its_release() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end().await_release(true);
        let mut streamed = stream!(layer.clone());
        world.assert_held();
        streamed.tell(Step::Last("all"));
        assert_eq!(streamed.data().await, "all");
        world.assert_nothing_left();

        // The storage says at the release that the lock was gone.
        let storage = world.storage.clone();
        let forgets = service_fn(move |_: Req| {
            let storage = storage.clone();
            async move {
                storage.clear();
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        });
        let rejected = layer.layer(forgets).oneshot(request()).await.unwrap();
        assert_eq!(rejected.status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_that_released_early_streams_on_without_the_lock() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Data("under the lock"));
        assert_eq!(streamed.data().await, "under the lock");
        assert!(streamed.lock.is_held());
        streamed.lock.release();
        world.assert_nothing_left();
        assert!(!streamed.lock.is_held());

        let next = stream!(world.layer().hold_to_body_end());
        tokio::time::sleep(TTL * 2).await;
        streamed.tell(Step::Data("without it"));
        assert_eq!(streamed.data().await, "without it");
        streamed.tell(Step::Last("to the end"));
        assert_eq!(streamed.data().await, "to the end");
        assert!(next.lock.is_held(), "the lock of the next is not touched");
    }

    #[tokio::test(start_paused = true)]
    async fn several_keys_are_held_and_released_together() {
        let world = World::new();
        let both = |_: &Req| RequestKey::all([LockKey::new("a")?, LockKey::new("b")?]);
        let layer = DistributedLockLayer::new(world.factory.clone(), both)
            .options(options())
            .hold_to_body_end();
        let mut streamed = stream!(layer);
        assert_eq!(world.storage.len(), 2);
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        assert_eq!(world.storage.len(), 2);
        streamed.tell(Step::Last("two"));
        assert_eq!(streamed.data().await, "two");
        world.assert_nothing_left();
    }
}

mod loss_of_the_lock {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_lock_is_renewed_while_the_body_is_silent() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        tokio::time::sleep(TTL * 10).await;
        world.assert_held();
        streamed.tell(Step::Last("after 30 s"));
        assert_eq!(streamed.data().await, "after 30 s");
        assert_eq!(streamed.end.held(), Some(true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_is_cut_off_when_the_lock_is_lost() {
        let world = World::new();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        let start = Instant::now();
        world.storage.clear();
        // Woken by the loss: nothing else happens.
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::NotOurs), "{error}");
        assert!(start.elapsed() <= TTL / 3, "at the next renewal");
        assert!(streamed.end.held().is_some(), "the body is dropped");
        assert!(streamed.frame().await.is_none());
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn no_frame_is_made_at_or_past_the_deadline() {
        let world = World::without_renewal();
        let start = Instant::now();
        let mut streamed = stream!(world.layer().hold_to_body_end(), |mut told| {
            told.tick = Some(tokio::time::interval(Duration::from_millis(1)));
            Response::new(Body::new(told))
        });
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::Expired), "{error}");
        assert_eq!(start.elapsed(), DEADLINE, "cut off at the deadline");
        let last = streamed.end.last_poll() - start;
        assert!(
            last < DEADLINE && last >= DEADLINE - Duration::from_millis(2),
            "{last:?}"
        );
    }

    /// Nobody has looked since the deadline, and a frame is ready.
    #[tokio::test(start_paused = true)]
    async fn a_frame_that_is_ready_past_the_deadline_is_not_sent() {
        let world = World::without_renewal();
        let mut streamed = stream!(world.layer().hold_to_body_end());
        streamed.tell(Step::Data("too late"));
        tokio::time::advance(DEADLINE).await;
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::Expired), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_frame_or_an_end_that_took_longer_than_the_lock_lasted_is_not_passed_off_as_good() {
        for last in [Some(Step::Data("late")), Some(Step::Last("late")), None] {
            let world = World::without_renewal();
            let mut streamed = stream!(world.layer().hold_to_body_end());
            streamed.tell(Step::Blocks(DEADLINE));
            if let Some(last) = last {
                streamed.tell(last);
            }
            drop(streamed.teller);
            let error = streamed.response.frame().await.unwrap().unwrap_err();
            assert_eq!(loss(&error), Some(LossReason::Expired), "{error}");
            assert!(streamed.response.frame().await.is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_only_told_goes_on() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end().on_loss(OnLoss::Signal);
        let mut streamed = stream!(layer);
        world.storage.clear();
        let reason = within(LONG, "the loss", streamed.lock.lost()).await;
        assert_eq!(reason, LossReason::NotOurs);
        streamed.tell(Step::Data("without the lock"));
        assert_eq!(streamed.data().await, "without the lock");
        streamed.tell(Step::Last("to the end"));
        assert_eq!(streamed.data().await, "to the end");
        assert_eq!(streamed.end.held(), Some(false));
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_goes_on_and_on_is_cut_off_at_max_hold() {
        let world = World::new();
        let options = LockOptions::builder().ttl(TTL);
        let options = options.max_hold(Duration::from_secs(20)).build().unwrap();
        let start = Instant::now();
        let mut streamed = stream!(world.layer().options(options).hold_to_body_end());
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::MaxHold), "{error}");
        assert_eq!(start.elapsed(), Duration::from_secs(20));
        world.assert_nothing_left();
    }

    /// As under a client that reads nothing, whose window is full.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_nobody_polls_blocks_others_for_max_hold_and_a_ttl_at_most() {
        let world = World::new();
        let max_hold = Duration::from_secs(20);
        let options = LockOptions::builder()
            .ttl(TTL)
            .max_hold(max_hold)
            .retries(60)
            .interval(Duration::from_secs(1))
            .build()
            .unwrap();
        let layer = world.layer().options(options).hold_to_body_end();
        let start = Instant::now();
        let stuck = stream!(layer.clone());
        let told = tokio::spawn({
            let lock = stuck.lock.clone();
            async move { (lock.lost().await, Instant::now()) }
        });
        let next = stream!(layer);
        assert!(next.lock.is_held());
        let waited = start.elapsed();
        assert!(
            waited > max_hold && waited <= max_hold + TTL,
            "the next got the lock after {waited:?}"
        );
        let (reason, at) = within(LONG, "the loss", told).await.unwrap();
        assert_eq!(reason, LossReason::MaxHold);
        assert_eq!(at - start, max_hold, "those who hold a handle are told");
        // Polled at last, it does nothing, and its end does not touch the lock of the next.
        let mut stuck = stuck;
        stuck.tell(Step::Data("too late"));
        let error = stuck.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::MaxHold), "{error}");
        assert!(next.lock.is_held());
        world.assert_held();
    }

    #[tokio::test(start_paused = true)]
    async fn of_several_locks_the_loss_of_one_is_enough() {
        let world = World::new();
        let renewed_not = factory(NoRenewal(world.storage.clone()));
        let both = |_: &Req| RequestKey::all([LockKey::new("a")?, LockKey::new("b")?]);
        let layer = DistributedLockLayer::new(renewed_not, both)
            .options(options())
            .hold_to_body_end();
        let mut streamed = stream!(layer);
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&error), Some(LossReason::NotOurs), "{error}");
        assert!(world.storage.is_empty(), "the other one is given back");
    }

    /// Also if a tonic service is nested in an axum router.
    #[tokio::test(start_paused = true)]
    async fn a_grpc_response_ends_with_a_status_when_the_lock_is_lost() {
        fn grpc<B>(body: B) -> Response<B> {
            let response = Response::builder().header(header::CONTENT_TYPE, "application/grpc");
            response.body(body).unwrap()
        }
        fn assert_aborted<E: std::fmt::Debug>(frame: Option<Result<Frame<Bytes>, E>>) {
            let trailers = frame.unwrap().unwrap().into_trailers().unwrap();
            assert_eq!(trailers["grpc-status"], "10");
            assert_eq!(
                trailers["grpc-message"],
                "the lock on the resource was lost"
            );
        }
        let world = World::new();
        let layer = world.layer().hold_to_body_end();
        let mut streamed = stream!(layer.clone(), |told| grpc(tonic::body::Body::new(told)));
        world.storage.clear();
        assert_aborted(streamed.frame().await);
        assert!(streamed.frame().await.is_none());

        let mut streamed = stream!(layer.clone(), |told| grpc(Body::new(told)));
        world.storage.clear();
        assert_aborted(streamed.frame().await);
        assert!(streamed.frame().await.is_none());

        // Nor is it lost where it is not gRPC that a tonic body has.
        let mut streamed = stream!(layer, |told| Response::new(tonic::body::Body::new(told)));
        world.storage.clear();
        let status = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::Aborted);
    }
}

mod types {
    use super::*;

    type Sendable = UnsyncBoxBody<Bytes, BoxError>;

    #[tokio::test(start_paused = true)]
    async fn boxed_bodies_can_hold_a_lock() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end();
        let mut streamed: Streamed<Sendable> =
            stream!(layer.clone(), |told| Response::new(Sendable::new(told)));
        world.assert_held();
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        world.storage.clear();
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert_eq!(loss(&*error), Some(LossReason::NotOurs), "{error}");

        let full = service_fn(async |_: Req| {
            let body = Full::<Bytes>::from("all").map_err(BoxError::from);
            Ok::<_, Infallible>(Response::new(BoxBody::new(body)))
        });
        let mut response = layer.layer(full).oneshot(request()).await.unwrap();
        world.assert_held();
        assert!(response.frame().await.is_some());
        world.assert_nothing_left();
    }

    /// A body type that this crate does not know.
    struct Own(Pin<Box<dyn http_body::Body<Data = Bytes, Error = BoxError> + Send>>);

    impl http_body::Body for Own {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            self.0.as_mut().poll_frame(cx)
        }
    }

    // What a rejected request gets.
    impl Default for Own {
        fn default() -> Self {
            Self(Box::pin(Full::default().map_err(BoxError::from)))
        }
    }

    impl HoldBody for Own {
        fn wrap(body: tower_distributed_lock::middleware::HeldBody<Self>) -> Self {
            Self(Box::pin(body))
        }

        fn lost(reason: LossReason) -> BoxError {
            format!("sorry: {reason}").into()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_type_of_ones_own_can_hold_a_lock() {
        let world = World::new();
        let layer = world.layer().hold_to_body_end();
        let mut streamed = stream!(layer, |told| Response::new(Own(Box::pin(told))));
        streamed.tell(Step::Data("one"));
        assert_eq!(streamed.data().await, "one");
        world.assert_held();
        world.storage.clear();
        let error = streamed.frame().await.unwrap().unwrap_err();
        assert!(error.to_string().starts_with("sorry: "), "{error}");
    }

    /// Keeps the lock in a response that is no HTTP.
    struct InTicket;

    #[derive(Default)]
    struct Ticket(Option<RequestLock>);

    impl Hold<Ticket> for InTicket {
        fn keep(&self, _: Ticket, lock: RequestLock) -> (Ticket, Option<RequestLock>) {
            (Ticket(Some(lock)), None)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn any_response_can_keep_the_lock() {
        let world = World::new();
        let layer = world
            .layer()
            .hold(InTicket)
            .on_reject(|_| Ticket::default());
        let answers = service_fn(async |_: Req| Ok::<_, Infallible>(Ticket::default()));
        let ticket = layer.layer(answers).oneshot(request()).await.unwrap();
        let lock = ticket.0.expect("the lock");
        assert!(lock.handle().is_held() && lock.cancelled().is_none());
        world.assert_held();

        let mut cancelled = task::spawn(poll_fn(|cx| lock.poll_cancelled(cx)));
        assert_pending!(cancelled.poll());
        world.storage.clear();
        let reason = within(LONG, "the loss", cancelled).await;
        assert_eq!(reason, LossReason::NotOurs);
        drop(lock);
        world.assert_nothing_left();
    }

    #[test]
    fn a_layer_is_clone_and_shareable_whatever_it_is_held_by() {
        struct NotClone;
        impl<Res> Hold<Res> for NotClone {
            fn keep(&self, response: Res, lock: RequestLock) -> (Res, Option<RequestLock>) {
                (response, Some(lock))
            }
        }
        fn check<T: Clone + std::fmt::Debug + Send + Sync + 'static>(_: &T) {}
        fn sendable<T: Send + std::fmt::Debug + 'static>(_: &T) {}
        let layer = DistributedLockLayer::new(LockFactory::new(MemoryStorage::new()), path);
        let own = layer.hold(NotClone);
        check(&own);
        let answers = async |_: Req| Ok::<_, Infallible>(Response::<tonic::body::Body>::default());
        let inner = tower::util::BoxCloneSyncService::new(service_fn(answers));
        let mut service = own.layer(inner.clone());
        check(&service);
        sendable(&service.call(request()));
        let mut service = own.hold_to_body_end().layer(inner);
        check(&service);
        sendable(&service.call(request()));
    }
}
