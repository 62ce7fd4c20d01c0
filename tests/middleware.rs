//! The layer as tower sees it: readiness, one call for each ready, and a lock that is given back in
//! every case.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

use std::{
    convert::Infallible,
    future::{Future, pending, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use tokio::sync::Notify;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_distributed_lock::{
    Clock, DistributedLockLayer, HeldLock, LockFactory, LockGuard, LockKey, LockOptions, Unlocked,
    error::{BoxError, InvalidKey, LossReason, NotObtained, StorageError, StorageErrorKind},
    middleware::{OnLoss, OnStorageFailure, Protocol, Rejection},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, MemoryStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};
use tower_test::mock;

type Req = Request<()>;
type Res = Response<()>;

fn path(request: &Req) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

fn request(path: &str) -> Req {
    Request::post(path).body(()).unwrap()
}

fn grpc(path: &str) -> Req {
    Request::post(path)
        .header("content-type", "application/grpc+proto")
        .body(())
        .unwrap()
}

fn options() -> LockOptions {
    LockOptions::builder()
        .ttl(Duration::from_secs(3))
        .interval(Duration::from_millis(10))
        .retries(10)
        .build()
        .unwrap()
}

/// A storage and a factory on paused time, and a second factory that plays the other replica.
struct World {
    storage: MemoryStorage,
    factory: LockFactory,
    other: LockFactory,
}

impl World {
    fn new() -> Self {
        let clock = Clock::tokio();
        let storage = MemoryStorage::with_clock(clock);
        let factory = || {
            LockFactory::builder(storage.clone())
                .clock(clock)
                .build()
                .unwrap()
        };
        Self {
            factory: factory(),
            other: factory(),
            storage,
        }
    }

    /// The other replica takes the lock of `path`.
    async fn taken_elsewhere(&self, path: &str) -> LockGuard {
        self.other
            .create_lock(path)
            .unwrap()
            .try_lock(LockOptions::default())
            .await
            .unwrap()
    }

    fn assert_nothing_left(&self) {
        assert_eq!((self.factory.keys(), self.factory.waiters()), (0, 0));
        assert!(self.storage.is_empty());
    }
}

/// An inner service that runs until it is told to stop, and says what it sees.
#[derive(Clone, Default)]
struct Handler {
    running: Arc<AtomicUsize>,
    started: Arc<Notify>,
    stop: Arc<Notify>,
    lock: Arc<Mutex<Option<HeldLock>>>,
    /// Whether the lock was held when the handler's future was dropped.
    held_at_end: Arc<Mutex<Option<bool>>>,
}

impl Handler {
    async fn run(self, request: Req) -> Result<Res, Infallible> {
        struct End(Handler);
        impl Drop for End {
            fn drop(&mut self) {
                self.0.running.fetch_sub(1, SeqCst);
                let lock = self.0.lock.lock().unwrap();
                *self.0.held_at_end.lock().unwrap() = lock.as_ref().map(HeldLock::is_held);
            }
        }
        *self.lock.lock().unwrap() = request.extensions().get().cloned();
        self.running.fetch_add(1, SeqCst);
        self.started.notify_one();
        let end = End(self);
        end.0.stop.notified().await;
        Ok(Res::new(()))
    }

    fn service(&self) -> BoxCloneSyncService<Req, Res, Infallible> {
        let handler = self.clone();
        BoxCloneSyncService::new(service_fn(move |request| handler.clone().run(request)))
    }

    fn running(&self) -> usize {
        self.running.load(SeqCst)
    }

    fn lock(&self) -> HeldLock {
        self.lock
            .lock()
            .unwrap()
            .clone()
            .expect("the request carries a `HeldLock`")
    }
}

/// A storage that is away.
#[derive(Clone)]
struct Away;

impl LockStorage for Away {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Err(StorageError::new(StorageErrorKind::Unavailable))
    }
    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        requests
            .iter()
            .map(|_| Err(StorageError::new(StorageErrorKind::Unavailable)))
            .collect()
    }
    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        Err(StorageError::new(StorageErrorKind::Unavailable))
    }
}

/// Lets everything that can go on go on; paused time does not move.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

mod contract {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn readiness_is_that_of_the_inner_service() {
        let layer = DistributedLockLayer::new(World::new().factory, path);
        let (mut service, mut inner) = mock::spawn_layer::<Req, Res, _>(layer);
        inner.allow(0);
        assert_pending!(service.poll_ready());
        inner.allow(1);
        assert_ready_ok!(service.poll_ready());
        inner.send_error("broken");
        assert!(assert_ready!(service.poll_ready()).is_err());
    }

    /// Panics if it is called without having been ready, or twice for one ready. A clone is not
    /// ready.
    #[derive(Default)]
    struct Strict {
        ready: bool,
    }

    impl Clone for Strict {
        fn clone(&self) -> Self {
            Self { ready: false }
        }
    }

    impl Service<Req> for Strict {
        type Response = Res;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Res, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            self.ready = true;
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Req) -> Self::Future {
            assert!(
                std::mem::take(&mut self.ready),
                "called without being ready"
            );
            std::future::ready(Ok(Res::new(())))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_service_that_was_ready_is_the_one_that_is_called() {
        let world = World::new();
        let mut service =
            DistributedLockLayer::new(world.factory.clone(), path).layer(Strict::default());
        for _ in 0..3 {
            service
                .ready()
                .await
                .unwrap()
                .call(request("/a"))
                .await
                .unwrap();
        }
        // Two at a time: the second waits for its lock with a service of its own.
        let first = service.ready().await.unwrap().call(request("/a"));
        let second = service.ready().await.unwrap().call(request("/a"));
        let (first, second) = tokio::join!(first, second);
        assert!(first.is_ok() && second.is_ok());
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn the_inner_service_is_called_once_and_only_under_the_lock() {
        let world = World::new();
        let elsewhere = world.taken_elsewhere("/a").await;
        let layer = DistributedLockLayer::new(world.factory.clone(), path).options(options());
        let (mut service, mut inner) = mock::spawn_layer::<Req, Res, _>(layer);
        assert_ready_ok!(service.poll_ready());
        let mut response = task::spawn(service.call(request("/a")));
        assert_pending!(response.poll());
        let mut called = pin!(inner.next_request());
        assert!(
            futures_util::poll!(&mut called).is_pending(),
            "called without the lock"
        );

        assert_eq!(elsewhere.unlock().await.unwrap(), Unlocked::Held);
        tokio::time::advance(Duration::from_millis(11)).await;
        assert_pending!(response.poll());
        let (seen, send) = called.await.unwrap();
        assert_eq!(seen.uri().path(), "/a");
        send.send_response(Res::new(()));
        response.await.unwrap();
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn the_inner_services_error_is_passed_on_and_the_lock_released() {
        let world = World::new();
        let layer = DistributedLockLayer::new(world.factory.clone(), path);
        let (mut service, mut inner) = mock::spawn_layer::<Req, Res, _>(layer);
        assert_ready_ok!(service.poll_ready());
        let response = tokio::spawn(service.call(request("/a")));
        let (_, send) = inner.next_request().await.unwrap();
        assert_eq!(world.factory.keys(), 1);
        send.send_error("no");
        assert_eq!(response.await.unwrap().unwrap_err().to_string(), "no");
        world.assert_nothing_left();
    }

    #[test]
    fn a_layer_is_clone_and_shareable_whatever_its_hooks_are() {
        struct NotClone;
        fn check<T: Clone + Send + Sync + 'static>(_: &T) {}
        fn sendable<T: Send + 'static>(_: &T) {}
        let key = NotClone;
        let hook = NotClone;
        let layer = DistributedLockLayer::new(
            LockFactory::new(MemoryStorage::new()),
            move |request: &Req| {
                let _ = &key;
                path(request)
            },
        )
        .on_reject(move |_: Rejection| {
            let _ = &hook;
            Res::new(())
        });
        check(&layer);
        let mut service = layer.layer(Handler::default().service());
        check(&service);
        sendable(&service.call(request("/a")));
    }
}

mod release {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_lock_is_held_until_the_response_is_ready() {
        let world = World::new();
        let handler = Handler::default();
        let service =
            DistributedLockLayer::new(world.factory.clone(), path).layer(handler.service());
        let response = tokio::spawn(service.oneshot(request("/a")));
        handler.started.notified().await;
        assert_eq!(world.storage.len(), 1);
        handler.stop.notify_one();
        assert_eq!(response.await.unwrap().unwrap().status(), StatusCode::OK);
        world.assert_nothing_left();
        assert_eq!(
            *handler.held_at_end.lock().unwrap(),
            Some(true),
            "the work ends first"
        );
    }

    /// Who waits does not wait for what becomes of the response before, such as its way to the client.
    #[tokio::test(start_paused = true)]
    async fn the_next_request_runs_before_the_response_to_brief_work_goes_on() {
        let world = World::new();
        // A lock that comes with fencing tokens is handed over only until they are used up.
        let builder = LockFactory::builder(world.storage.clone()).clock(Clock::tokio());
        let factory = builder.fencing(false).build().unwrap();
        let handler = Handler::default();
        let mut service = DistributedLockLayer::new(factory.clone(), path).layer(handler.service());
        let mut call = || task::spawn(service.call(request("/a")));
        let mut requests = [call(), call(), call()];
        for request in &mut requests {
            assert_pending!(request.poll());
        }
        let [mut first, mut second, mut third] = requests;
        handler.stop.notify_one();
        assert_pending!(first.poll());
        assert_eq!(handler.running(), 0);
        assert!(first.is_woken() && second.is_woken());
        assert_pending!(second.poll());
        assert_eq!(handler.running(), 1);
        assert_ready_ok!(first.poll());

        // A client that goes now.
        handler.stop.notify_one();
        assert_pending!(second.poll());
        drop(second);
        assert_pending!(third.poll());
        assert_eq!(handler.running(), 1);

        // Work that took longer, and a response that nobody waits behind.
        let mut fourth = call();
        assert_pending!(fourth.poll());
        tokio::time::advance(Duration::from_millis(1)).await;
        handler.stop.notify_one();
        assert_ready_ok!(third.poll());
        assert_pending!(fourth.poll());
        handler.stop.notify_one();
        assert_ready_ok!(fourth.poll());
        assert_eq!((factory.keys(), factory.waiters()), (0, 0));
        assert!(world.storage.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_in_the_handler_releases() {
        let world = World::new();
        let layer = DistributedLockLayer::new(world.factory.clone(), path);
        let service = layer.layer(service_fn(async |_: Req| -> Result<Res, Infallible> {
            tokio::task::yield_now().await;
            panic!("a bug in the handler")
        }));
        assert!(
            tokio::spawn(service.oneshot(request("/a")))
                .await
                .unwrap_err()
                .is_panic()
        );
        world.assert_nothing_left();

        // Not only in the future: also in the call that makes it.
        let layer = DistributedLockLayer::new(world.factory.clone(), path);
        let service = layer.layer(service_fn(
            |_: Req| -> std::future::Ready<Result<Res, Infallible>> {
                panic!("a bug in the service")
            },
        ));
        assert!(
            tokio::spawn(service.oneshot(request("/a")))
                .await
                .unwrap_err()
                .is_panic()
        );
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_dropped_in_any_phase_leaves_nothing() {
        let world = World::new();
        let handler = Handler::default();
        let mut service = DistributedLockLayer::new(world.factory.clone(), path)
            .options(options())
            .layer(handler.service());

        drop(
            service
                .ready()
                .await
                .unwrap()
                .call(request("/never-polled")),
        );
        world.assert_nothing_left();

        let elsewhere = world.taken_elsewhere("/a").await;
        let mut waiting = task::spawn(service.ready().await.unwrap().call(request("/a")));
        assert_pending!(waiting.poll());
        assert_eq!((world.factory.waiters(), handler.running()), (1, 0));
        drop(waiting);
        assert_eq!((world.factory.waiters(), world.factory.keys()), (0, 0));
        assert_eq!(elsewhere.unlock().await.unwrap(), Unlocked::Held);

        let mut running = task::spawn(service.ready().await.unwrap().call(request("/a")));
        assert_pending!(running.poll());
        assert_eq!(handler.running(), 1);
        drop(running);
        assert_eq!(
            *handler.held_at_end.lock().unwrap(),
            Some(true),
            "the work ends first"
        );
        assert_eq!(handler.running(), 0);
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_sees_the_fencing_token_of_its_lock() {
        let world = World::new();
        let before = world.taken_elsewhere("/a").await;
        let last = before.fencing_token();
        assert_eq!(before.unlock().await.unwrap(), Unlocked::Held);

        let handler = Handler::default();
        let service =
            DistributedLockLayer::new(world.factory.clone(), path).layer(handler.service());
        let response = tokio::spawn(service.oneshot(request("/a")));
        handler.started.notified().await;
        let lock = handler.lock();
        let token = lock.fencing_token();
        assert!(token > last, "{token:?} after {last:?}");
        handler.stop.notify_one();
        response.await.unwrap().unwrap();
        settle().await;
        assert_eq!(lock.fencing_token(), token, "also when it is over");
        let after = world.taken_elsewhere("/a").await;
        assert!(after.fencing_token() > token);

        let without = LockFactory::builder(world.storage.clone())
            .clock(Clock::tokio())
            .fencing(false);
        let layer = DistributedLockLayer::new(without.build().unwrap(), path);
        let handler = Handler::default();
        let response = tokio::spawn(layer.layer(handler.service()).oneshot(request("/b")));
        handler.started.notified().await;
        assert_eq!(handler.lock().fencing_token(), None);
        handler.stop.notify_one();
        response.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_can_release_early_and_goes_on() {
        let world = World::new();
        let handler = Handler::default();
        let service =
            DistributedLockLayer::new(world.factory.clone(), path).layer(handler.service());
        let response = tokio::spawn(service.oneshot(request("/a")));
        handler.started.notified().await;
        handler.lock().release();
        handler.lock().release();
        settle().await;
        world.assert_nothing_left();
        assert_eq!(handler.running(), 1);
        assert!(!handler.lock().is_held());
        tokio::time::advance(Duration::from_secs(60)).await;
        handler.stop.notify_one();
        assert_eq!(
            response.await.unwrap().unwrap().status(),
            StatusCode::OK,
            "not taken for a loss"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_waits_for_the_release_only_if_asked_to() {
        for await_release in [false, true] {
            let slow = SlowRelease::default();
            let factory = LockFactory::new(slow.clone());
            let layer = DistributedLockLayer::new(factory, path).await_release(await_release);
            let mut service =
                layer.layer(service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(()))));
            let mut response = task::spawn(service.ready().await.unwrap().call(request("/a")));
            if await_release {
                assert_pending!(response.poll());
                slow.go_on.notify_one();
            }
            assert_eq!(response.await.unwrap().status(), StatusCode::OK);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_awaited_release_that_finds_the_lock_gone_is_a_loss() {
        let world = World::new();
        let storage = world.storage.clone();
        let forgets = service_fn(move |_: Req| {
            storage.clear();
            async { Ok::<_, Infallible>(Res::new(())) }
        });
        let layer = DistributedLockLayer::new(world.factory.clone(), path).await_release(true);
        let cancelled = layer
            .layer(forgets.clone())
            .oneshot(request("/a"))
            .await
            .unwrap();
        assert_eq!(cancelled.status(), StatusCode::SERVICE_UNAVAILABLE);
        let signalled = layer
            .on_loss(OnLoss::Signal)
            .layer(forgets)
            .oneshot(request("/a"))
            .await
            .unwrap();
        assert_eq!(signalled.status(), StatusCode::OK);
        world.assert_nothing_left();
    }

    /// Locks in memory whose release waits to be let go on.
    #[derive(Clone, Default)]
    struct SlowRelease {
        locks: MemoryStorage,
        go_on: Arc<Notify>,
    }

    impl LockStorage for SlowRelease {
        async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
            self.locks.acquire(request).await
        }
        async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
            self.locks.renew(requests).await
        }
        async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
            self.go_on.notified().await;
            self.locks.release(request).await
        }
    }
}

mod keys {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_of_one_key_go_one_at_a_time_and_others_pass() {
        let world = World::new();
        let handler = Handler::default();
        let service = DistributedLockLayer::new(world.factory.clone(), |request: &Req| {
            (request.uri().path() != "/free").then(|| path(request))
        })
        .layer(handler.service());
        let responses: Vec<_> = ["/a", "/a", "/a", "/b", "/free", "/free"]
            .map(|path| tokio::spawn(service.clone().oneshot(request(path))))
            .into();
        settle().await;
        assert_eq!(handler.running(), 4, "one of /a, one of /b, two of /free");
        for _ in 0..6 {
            handler.stop.notify_one();
            settle().await;
        }
        for response in responses {
            assert_eq!(response.await.unwrap().unwrap().status(), StatusCode::OK);
        }
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_a_lock_carries_no_held_lock() {
        let world = World::new();
        let handler = Handler::default();
        let layer = DistributedLockLayer::new(world.factory, |_: &Req| None::<LockKey>);
        handler.stop.notify_one();
        layer
            .layer(handler.service())
            .oneshot(request("/a"))
            .await
            .unwrap();
        assert!(handler.lock.lock().unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_function_may_return_text_or_an_error() {
        let world = World::new();
        let ok = || service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(())));
        let layer =
            DistributedLockLayer::new(world.factory.clone(), |r: &Req| r.uri().path().to_owned());
        assert_eq!(
            layer
                .layer(ok())
                .oneshot(request("/a"))
                .await
                .unwrap()
                .status(),
            StatusCode::OK
        );

        let layer = DistributedLockLayer::new(world.factory.clone(), |_: &Req| {
            Err::<LockKey, BoxError>("no account in the request".into())
        });
        let response = layer.layer(ok()).oneshot(request("/a")).await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let too_long =
            DistributedLockLayer::new(world.factory.clone(), |_: &Req| "x".repeat(2_000));
        let response = too_long.layer(ok()).oneshot(request("/a")).await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        world.assert_nothing_left();
    }
}

mod loss {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_handler_whose_lock_is_lost_is_cancelled() {
        let world = World::new();
        let handler = Handler::default();
        let layer = DistributedLockLayer::new(world.factory.clone(), path).options(options());
        let response = tokio::spawn(layer.layer(handler.service()).oneshot(request("/a")));
        handler.started.notified().await;
        world.storage.clear();
        // The next renewal, at a third of the ttl, finds out.
        let response = response.await.unwrap().unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(handler.running(), 0);
        assert_eq!(*handler.held_at_end.lock().unwrap(), Some(false));
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_may_choose_to_be_told_only() {
        let world = World::new();
        let handler = Handler::default();
        let layer = DistributedLockLayer::new(world.factory.clone(), path)
            .options(options())
            .on_loss(OnLoss::Signal);
        let response = tokio::spawn(layer.layer(handler.service()).oneshot(request("/a")));
        handler.started.notified().await;
        world.storage.clear();
        assert_eq!(handler.lock().lost().await, LossReason::NotOurs);
        assert_eq!((handler.running(), handler.lock().is_held()), (1, false));
        handler.stop.notify_one();
        assert_eq!(response.await.unwrap().unwrap().status(), StatusCode::OK);
        world.assert_nothing_left();
    }

    /// Locks in memory that cannot be renewed.
    struct NoRenewal(MemoryStorage);

    impl LockStorage for NoRenewal {
        async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
            self.0.acquire(request).await
        }
        async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
            requests
                .iter()
                .map(|_| Err(StorageError::new(StorageErrorKind::Unavailable)))
                .collect()
        }
        async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
            self.0.release(request).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_handler_is_not_polled_at_or_past_the_deadline() {
        let clock = Clock::tokio();
        let storage = NoRenewal(MemoryStorage::with_clock(clock));
        let factory = LockFactory::builder(storage).clock(clock).build().unwrap();
        let polls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&polls);
        let start = tokio::time::Instant::now();
        let busy = service_fn(move |_: Req| {
            let seen = Arc::clone(&seen);
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            poll_fn(move |cx| {
                seen.lock().unwrap().push(start.elapsed());
                while tick.poll_tick(cx).is_ready() {}
                Poll::<Result<Res, Infallible>>::Pending
            })
        });
        let layer = DistributedLockLayer::new(factory, path).options(options());
        let response = layer.layer(busy).oneshot(request("/a")).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);

        // 3 s less 1 % and 2 ms.
        let deadline = Duration::from_millis(2968);
        assert_eq!(start.elapsed(), deadline, "cancelled at the deadline");
        let polls = polls.lock().unwrap();
        let last = *polls.last().unwrap();
        assert!(
            last < deadline && last >= deadline - Duration::from_millis(2),
            "{last:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_took_longer_than_the_lock_lasted_is_not_passed_off_as_good() {
        let clock = Clock::tokio();
        let storage = NoRenewal(MemoryStorage::with_clock(clock));
        let factory = LockFactory::builder(storage).clock(clock).build().unwrap();
        let blocks = service_fn(|_: Req| {
            let mut advance = Box::pin(tokio::time::advance(Duration::from_secs(4)));
            poll_fn(move |cx| {
                // Time passes within one poll, as under a handler that blocks its thread.
                let _ = advance.as_mut().poll(cx);
                Poll::Ready(Ok::<_, Infallible>(Res::new(())))
            })
        });
        let layer = DistributedLockLayer::new(factory, path).options(options());
        let response = layer.layer(blocks).oneshot(request("/a")).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_that_runs_on_and_on_loses_its_lock_at_max_hold() {
        let world = World::new();
        let options = LockOptions::builder()
            .ttl(Duration::from_secs(3))
            .max_hold(Duration::from_secs(20))
            .build()
            .unwrap();
        let layer = DistributedLockLayer::new(world.factory.clone(), path).options(options);
        let start = tokio::time::Instant::now();
        let hangs = service_fn(|_: Req| pending::<Result<Res, Infallible>>());
        let response = layer.layer(hangs).oneshot(request("/a")).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(start.elapsed(), Duration::from_secs(20));
        world.assert_nothing_left();
    }
}

mod rejection {
    use super::*;

    fn ok() -> BoxCloneSyncService<Req, Res, Infallible> {
        BoxCloneSyncService::new(service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(()))))
    }

    fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
        headers.get(name).map(|value| value.to_str().unwrap())
    }

    #[track_caller]
    fn assert_http(response: &Res, status: u16, retry_after: Option<&str>) {
        assert_eq!(response.status(), status);
        assert_eq!(header(response.headers(), "retry-after"), retry_after);
        assert_eq!(header(response.headers(), "grpc-status"), None);
    }

    #[track_caller]
    fn assert_grpc(response: &Res, code: &str) {
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(
            header(response.headers(), "content-type"),
            Some("application/grpc")
        );
        assert_eq!(header(response.headers(), "grpc-status"), Some(code));
        assert!(header(response.headers(), "grpc-message").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_not_obtained_is_423_or_aborted() {
        let world = World::new();
        let _elsewhere = world.taken_elsewhere("/a").await;
        let service = DistributedLockLayer::new(world.factory.clone(), path)
            .options(options())
            .layer(ok());
        let start = tokio::time::Instant::now();
        let response = service.clone().oneshot(request("/a")).await.unwrap();
        assert_eq!(start.elapsed(), options().max_wait());
        // The other replica holds it for 10 s more, unless it renews.
        assert_http(&response, 423, Some("10"));
        assert_grpc(&service.oneshot(grpc("/a")).await.unwrap(), "10");
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_waiters_is_429_or_resource_exhausted() {
        let world = World::new();
        let factory = LockFactory::builder(world.storage.clone())
            .max_waiters_per_key(1)
            .build()
            .unwrap();
        let handler = Handler::default();
        let service = DistributedLockLayer::new(factory, path).layer(handler.service());
        let first = tokio::spawn(service.clone().oneshot(request("/a")));
        handler.started.notified().await;
        let second = tokio::spawn(service.clone().oneshot(request("/a")));
        settle().await;
        let third = service.clone().oneshot(request("/a")).await.unwrap();
        assert_http(&third, 429, Some("10"));
        assert_grpc(&service.oneshot(grpc("/a")).await.unwrap(), "8");
        handler.stop.notify_one();
        first.await.unwrap().unwrap();
        handler.stop.notify_one();
        second.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_invalid_key_is_400_or_invalid_argument() {
        let world = World::new();
        let service = DistributedLockLayer::new(world.factory, |_: &Req| String::new()).layer(ok());
        assert_http(
            &service.clone().oneshot(request("/a")).await.unwrap(),
            400,
            None,
        );
        assert_grpc(&service.oneshot(grpc("/a")).await.unwrap(), "3");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_lock_is_503_or_aborted() {
        let world = World::new();
        let layer = DistributedLockLayer::new(world.factory.clone(), path);
        let hangs = service_fn(|_: Req| pending::<Result<Res, Infallible>>());
        let service = layer.layer(hangs);
        let http = tokio::spawn(service.clone().oneshot(request("/a")));
        let grpc = tokio::spawn(service.oneshot(grpc("/b")));
        settle().await;
        world.storage.clear();
        assert_http(&http.await.unwrap().unwrap(), 503, None);
        assert_grpc(&grpc.await.unwrap().unwrap(), "10");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_shuts_down_answers_503_or_unavailable() {
        let world = World::new();
        let handler = Handler::default();
        let service =
            DistributedLockLayer::new(world.factory.clone(), path).layer(handler.service());
        let running = tokio::spawn(service.clone().oneshot(request("/a")));
        handler.started.notified().await;
        let waiting = tokio::spawn(service.clone().oneshot(request("/a")));
        settle().await;

        let factory = world.factory.clone();
        let drained = tokio::spawn(async move { factory.drain(Duration::from_secs(5)).await });
        assert_http(&waiting.await.unwrap().unwrap(), 503, None);
        assert_grpc(&service.oneshot(grpc("/b")).await.unwrap(), "14");
        assert!(!drained.is_finished(), "a holder may finish");
        handler.stop.notify_one();
        assert_http(&running.await.unwrap().unwrap(), 200, None);
        assert_eq!(drained.await.unwrap(), 0);
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_that_does_not_finish_while_draining_is_cancelled() {
        let world = World::new();
        let layer = DistributedLockLayer::new(world.factory.clone(), path);
        let hangs = service_fn(|_: Req| pending::<Result<Res, Infallible>>());
        let response = tokio::spawn(layer.layer(hangs).oneshot(request("/a")));
        settle().await;
        assert_eq!(world.factory.drain(Duration::from_secs(5)).await, 0);
        assert_http(&response.await.unwrap().unwrap(), 503, None);
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_storage_that_is_away_fails_closed_within_the_wait_unless_told_to_fail_open() {
        let called = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&called);
        let inner = service_fn(move |request: Req| {
            seen.store(request.extensions().get::<HeldLock>().is_none(), SeqCst);
            async { Ok::<_, Infallible>(Res::new(())) }
        });
        let factory = LockFactory::builder(Away)
            .clock(Clock::tokio())
            .build()
            .unwrap();
        let layer = DistributedLockLayer::new(factory, path).options(options());
        let start = tokio::time::Instant::now();
        let closed = layer.layer(inner.clone());
        assert_http(
            &closed.clone().oneshot(request("/a")).await.unwrap(),
            503,
            None,
        );
        assert_eq!(start.elapsed(), options().max_wait());
        assert_grpc(&closed.oneshot(grpc("/a")).await.unwrap(), "14");
        assert!(!called.load(SeqCst));

        let open = layer
            .on_storage_failure(OnStorageFailure::FailOpen)
            .layer(inner);
        let start = tokio::time::Instant::now();
        assert_http(&open.oneshot(request("/a")).await.unwrap(), 200, None);
        assert!(called.load(SeqCst), "served, and without a `HeldLock`");
        assert_eq!(start.elapsed(), Duration::ZERO, "at the first failure");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hook_of_ones_own_makes_the_answer() {
        let world = World::new();
        let _elsewhere = world.taken_elsewhere("/a").await;
        let service = DistributedLockLayer::new(world.factory.clone(), path)
            .options(options())
            .on_reject(|rejection: Rejection| {
                let mut response = Res::new(());
                if matches!(
                    rejection,
                    Rejection::NotObtained(NotObtained { attempts: 1.., .. })
                ) {
                    *response.status_mut() = StatusCode::CONFLICT;
                }
                response
            })
            .layer(ok());
        assert_eq!(
            service.oneshot(request("/a")).await.unwrap().status(),
            StatusCode::CONFLICT
        );
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        let protocol = |content_type: &str| {
            Protocol::of(
                &Request::post("/")
                    .header("content-type", content_type)
                    .body(())
                    .unwrap(),
            )
        };
        for grpc in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc;charset=utf-8",
        ] {
            assert_eq!(protocol(grpc), Protocol::Grpc, "{grpc}");
        }
        for http in [
            "application/json",
            "application/grpc-web",
            "application/grpcx",
        ] {
            assert_eq!(protocol(http), Protocol::Http, "{http}");
        }
        assert_eq!(Protocol::of(&request("/")), Protocol::Http);
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_is_not_answered_200_to_a_client_that_only_says_it_speaks_grpc() {
        let world = World::new();
        let _held = world.taken_elsewhere("/a").await;
        let at_once = LockOptions::default().within(Duration::ZERO);
        let lock = DistributedLockLayer::new(world.factory.clone(), path);
        let service = lock.options(at_once).layer(ok());
        for method in ["GET", "PUT", "DELETE", "HEAD"] {
            let mut request = grpc("/a");
            *request.method_mut() = method.parse().unwrap();
            let response = service.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::LOCKED, "{method}");
            assert!(!response.headers().contains_key("grpc-status"));
        }
    }
}

/// A service whose requests are no HTTP requests.
#[tokio::test(start_paused = true)]
async fn any_tower_service_can_have_the_layer() {
    struct Job {
        account: &'static str,
        lock: Option<HeldLock>,
    }
    #[derive(Debug, PartialEq)]
    enum Outcome {
        Done,
        Busy,
    }

    let world = World::new();
    let _elsewhere = world.taken_elsewhere("account/2").await;
    let layer = DistributedLockLayer::new(world.factory.clone(), |job: &Job| {
        LockKey::from_parts(["account", job.account])
    })
    .options(options())
    .on_acquired(|job: &mut Job, lock: HeldLock| job.lock = Some(lock))
    .on_reject(|_: Rejection| Outcome::Busy);
    let service = layer.layer(service_fn(async |job: Job| {
        assert!(job.lock.is_some_and(|lock| lock.is_held()));
        Ok::<_, Infallible>(Outcome::Done)
    }));
    let job = |account| Job {
        account,
        lock: None,
    };
    assert_eq!(
        service.clone().oneshot(job("1")).await.unwrap(),
        Outcome::Done
    );
    assert_eq!(service.oneshot(job("2")).await.unwrap(), Outcome::Busy);
}

mod fencing {
    use super::*;

    const HEADER: HeaderName = HeaderName::from_static("fencing-token");

    /// Answers with what it has got: the header's values, and the token of its lock.
    async fn tell(request: Req) -> Result<Response<(Vec<String>, Option<u64>)>, Infallible> {
        let values = request.headers().get_all(HEADER).iter();
        let values = values.map(|value| value.to_str().unwrap().to_owned());
        let token = request.extensions().get().and_then(HeldLock::fencing_token);
        Ok(Response::new((values.collect(), token)))
    }

    /// As a client sends it that would like to be the latest holder.
    fn forged() -> Req {
        let mut request = request("/a");
        for _ in 0..2 {
            let token = HeaderValue::from(9_007_199_254_740_991_u64);
            request.headers_mut().append(HEADER, token);
        }
        request
    }

    /// A rejection has nothing to tell.
    fn no_answer(_: Rejection) -> Response<(Vec<String>, Option<u64>)> {
        Response::default()
    }

    #[tokio::test(start_paused = true)]
    async fn the_inner_service_gets_the_token_in_a_header_and_nothing_that_a_client_made_up() {
        let world = World::new();
        let layer = DistributedLockLayer::new(world.factory.clone(), path)
            .on_reject(no_answer)
            .fencing_header(HEADER);
        let service = layer.layer(service_fn(tell));
        let mut last = 0;
        for _ in 0..3 {
            let answer = service.clone().oneshot(forged()).await.unwrap();
            let (header, token) = answer.into_body();
            let token = token.unwrap();
            assert_eq!(header, [token.to_string()]);
            assert!(token > last, "{token} after {last}");
            last = token;
        }
        world.assert_nothing_left();
    }

    #[tokio::test(start_paused = true)]
    async fn a_hook_of_ones_own_has_the_header_around_it() {
        let seen = Arc::new(Mutex::new(None));
        let sees = Arc::clone(&seen);
        let layer = DistributedLockLayer::new(World::new().factory, path)
            .on_reject(no_answer)
            .on_acquired(move |_: &mut Req, lock: HeldLock| {
                *sees.lock().unwrap() = lock.fencing_token();
            })
            .fencing_header(HEADER);
        let answer = layer.layer(service_fn(tell)).oneshot(forged()).await;
        let token = seen.lock().unwrap().unwrap();
        assert_eq!(answer.unwrap().into_body(), (vec![token.to_string()], None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_an_inner_layer_lets_through_does_not_pass_an_outer_lock_off_as_its_own()
    {
        let away = LockFactory::builder(Away).clock(Clock::tokio());
        let none = |_: &Req| None::<LockKey>;
        let fails_open = DistributedLockLayer::new(away.build().unwrap(), path)
            .on_storage_failure(OnStorageFailure::FailOpen)
            .on_reject(no_answer);
        let no_key =
            DistributedLockLayer::new(World::new().factory, none as fn(&Req) -> Option<LockKey>)
                .on_reject(no_answer);
        let services = [
            BoxCloneSyncService::new(fails_open.layer(service_fn(tell))),
            BoxCloneSyncService::new(fails_open.fencing_header(HEADER).layer(service_fn(tell))),
            BoxCloneSyncService::new(no_key.layer(service_fn(tell))),
            BoxCloneSyncService::new(no_key.fencing_header(HEADER).layer(service_fn(tell))),
        ];
        for inner in services {
            let outer = DistributedLockLayer::new(World::new().factory, |_: &Req| "tenant")
                .on_reject(no_answer);
            let answer = outer.layer(inner).oneshot(request("/a")).await.unwrap();
            assert_eq!(answer.into_body(), (vec![], None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_a_token_has_no_header_whoever_sent_it() {
        let storage = MemoryStorage::with_clock(Clock::tokio());
        let unfenced = LockFactory::builder(storage)
            .clock(Clock::tokio())
            .fencing(false);
        let layer = DistributedLockLayer::new(unfenced.build().unwrap(), path)
            .on_reject(no_answer)
            .fencing_header(HEADER);
        let answer = layer.layer(service_fn(tell)).oneshot(forged()).await;
        assert_eq!(answer.unwrap().into_body(), (vec![], None));

        let no_key = |_: &Req| None::<LockKey>;
        let layer = DistributedLockLayer::new(World::new().factory, no_key)
            .on_reject(no_answer)
            .fencing_header(HEADER);
        let answer = layer.layer(service_fn(tell)).oneshot(forged()).await;
        assert_eq!(answer.unwrap().into_body(), (vec![], None));

        let away = LockFactory::builder(Away).clock(Clock::tokio());
        let layer = DistributedLockLayer::new(away.build().unwrap(), path)
            .on_storage_failure(OnStorageFailure::FailOpen)
            .on_reject(no_answer)
            .fencing_header(HEADER);
        let answer = layer.layer(service_fn(tell)).oneshot(forged()).await;
        assert_eq!(answer.unwrap().into_body(), (vec![], None));
    }
}
