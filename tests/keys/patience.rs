//! Clients that say how long they wait.

use tokio::time::Instant;
use tower::{service_fn, util::BoxCloneSyncService};
use tower_distributed_lock::{
    middleware::{OnReject, client_patience},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest,
    },
};

use super::*;

type Req = http::Request<()>;
type Res = http::Response<()>;
type Key = fn(&Req) -> Result<LockKey, InvalidKey>;

fn key(request: &Req) -> Result<LockKey, InvalidKey> {
    LockKey::new(request.uri().path())
}

fn grpc(timeout: Option<&str>) -> Req {
    let mut request = http::Request::post("/a").header("content-type", "application/grpc");
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    request.body(()).unwrap()
}

/// Waits 3 s, if the client does.
async fn wait_of<R>(layer: DistributedLockLayer<Key, R>, request: Req) -> Duration
where
    R: OnReject<Req, Res, Infallible>,
{
    let inner = service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(())));
    let start = Instant::now();
    let response = layer.layer(inner).oneshot(request).await.unwrap();
    if response.headers().contains_key("content-type") {
        assert_eq!(response.headers()["grpc-status"], "10", "ABORTED");
        assert_eq!(response.headers()["grpc-message"], "the resource is locked");
    } else {
        assert_ne!(response.status(), StatusCode::OK);
    }
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_grpc_client_gets_its_answer_before_it_gives_up() {
    let world = World::new();
    let _elsewhere = world.taken_elsewhere("/a").await;
    for (timeout, wait) in [
        (Some("1S"), ms(900)),
        (Some("100m"), ms(90)),
        (Some("5000u"), ms(3)),
        // Longer than the layer's.
        (Some("1H"), ms(3_000)),
        (None, ms(3_000)),
        // Cannot be read.
        (Some("1s"), ms(3_000)),
        (Some("123456789m"), ms(3_000)),
    ] {
        let layer = DistributedLockLayer::new(world.factory.clone(), key as Key);
        assert_eq!(wait_of(layer, grpc(timeout)).await, wait, "{timeout:?}");
    }
    // Only gRPC has it.
    let mut http = grpc(Some("100m"));
    http.headers_mut().remove("content-type");
    let layer = DistributedLockLayer::new(world.factory.clone(), key as Key);
    assert_eq!(wait_of(layer, http).await, ms(3_000));
}

#[tokio::test(start_paused = true)]
async fn the_limit_goes_for_options_of_the_request_and_for_several_keys_too() {
    let world = World::new();
    let first = world.taken_elsewhere("a").await;
    let _second = world.taken_elsewhere("b").await;
    tokio::spawn(async move {
        tokio::time::sleep(ms(300)).await;
        drop(first);
    });
    let keys = |_: &Req| {
        let keys = [LockKey::new("a")?, LockKey::new("b")?];
        let patient = LockOptions::builder().interval(ms(10)).retries(1_000);
        Ok::<_, BoxError>((keys, patient.build()?))
    };
    let inner = service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(())));
    let layer = DistributedLockLayer::new(world.factory.clone(), keys);
    let start = Instant::now();
    let response = layer.layer(inner).oneshot(grpc(Some("5S"))).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "10");
    // More than the layer's options allow.
    assert_eq!(start.elapsed(), ms(4_900));
}

/// A storage that nobody may ask.
struct Untouchable;

impl LockStorage for Untouchable {
    async fn acquire(
        &self,
        _: &AcquireRequest,
    ) -> Result<AcquireReply, tower_distributed_lock::error::StorageError> {
        panic!("asked for a client that is not there any more")
    }
    async fn renew(
        &self,
        _: &[RenewRequest],
    ) -> Vec<Result<RenewReply, tower_distributed_lock::error::StorageError>> {
        vec![]
    }
    async fn release(
        &self,
        _: &ReleaseRequest,
    ) -> Result<ReleaseReply, tower_distributed_lock::error::StorageError> {
        Ok(ReleaseReply::NotOurs)
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_no_time_is_refused_without_asking_the_storage() {
    for timeout in ["0S", "1m", "2m", "2000u", "99n"] {
        let layer = DistributedLockLayer::new(World::factory(Untouchable), key as Key);
        assert_eq!(
            wait_of(layer, grpc(Some(timeout))).await,
            Duration::ZERO,
            "{timeout}"
        );
    }
    // A request that wants no lock is served whatever time it has.
    let layer =
        DistributedLockLayer::new(World::factory(Untouchable), |_: &Req| RequestKey::none());
    let inner = service_fn(async |_: Req| Ok::<_, Infallible>(Res::new(())));
    let response = layer.layer(inner).oneshot(grpc(Some("0S"))).await.unwrap();
    assert!(response.headers().is_empty());
}

/// Reads how long a client waits from a header of its own, and leaves the rest to the default.
struct Patient;

impl OnReject<Req, Res, Infallible> for Patient {
    type Context = ();

    fn context(&self, _: &Req) {}

    fn patience(&self, request: &Req) -> Option<Duration> {
        let seconds = request.headers().get("prefer-wait").map(|value| {
            let seconds = value.to_str().ok().and_then(|value| value.parse().ok());
            Duration::from_secs(seconds.unwrap_or_default())
        });
        seconds.or_else(|| client_patience(request))
    }

    fn reject(&self, (): (), rejection: Rejection) -> Result<Res, Infallible> {
        let mut response = Res::new(());
        *response.status_mut() = rejection.status();
        Ok(response)
    }
}

#[tokio::test(start_paused = true)]
async fn a_hook_of_ones_own_says_how_long_its_clients_wait() {
    let world = World::new();
    let _elsewhere = world.taken_elsewhere("/a").await;
    let layer = || DistributedLockLayer::new(world.factory.clone(), key as Key).on_reject(Patient);
    assert_eq!(wait_of(layer(), grpc(Some("1S"))).await, ms(900));
    let mut request = grpc(None);
    request.headers_mut().insert("prefer-wait", 2.into());
    assert_eq!(wait_of(layer(), request).await, ms(2_000));
    // The other hook says less.
    let mut request = grpc(Some("1S"));
    request.headers_mut().insert("prefer-wait", 2.into());
    assert_eq!(wait_of(layer(), request).await, ms(900));
}

/// As a function of one's own answers.
fn locked_out(rejection: Rejection) -> Res {
    let mut response = Res::new(());
    *response.status_mut() = rejection.status();
    response
}

#[tokio::test(start_paused = true)]
async fn a_client_s_time_out_counts_whatever_the_layer_is_set_to() {
    const HEADER: HeaderName = HeaderName::from_static("fencing-token");
    let world = World::new();
    let _elsewhere = world.taken_elsewhere("/a").await;
    let lock = || DistributedLockLayer::new(world.factory.clone(), key as Key);
    let inner = || service_fn(async |_: Req| Ok::<_, BoxError>(Res::new(())));
    let services = [
        BoxCloneSyncService::new(lock().layer(inner())),
        BoxCloneSyncService::new(lock().server_timing().layer(inner())),
        BoxCloneSyncService::new(lock().on_reject(locked_out).layer(inner())),
        BoxCloneSyncService::new(
            lock()
                .on_reject(locked_out)
                .server_timing()
                .fencing_header(HEADER)
                .layer(inner()),
        ),
        BoxCloneSyncService::new(lock().reject_with_error(|r| r).layer(inner())),
        BoxCloneSyncService::new(lock().without_held_lock().layer(inner())),
        BoxCloneSyncService::new(
            lock()
                .on_acquired(|_: &mut Req, _: HeldLock| ())
                .layer(inner()),
        ),
    ];
    for (which, service) in services.into_iter().enumerate() {
        for (timeout, wait) in [("1S", 900), ("1m", 0)] {
            let start = Instant::now();
            // Some answer with an error, some with a response.
            let _ = service.clone().oneshot(grpc(Some(timeout))).await;
            assert_eq!(start.elapsed(), ms(wait), "{which}");
        }
    }
}

/// A tonic client with a time-out, and a tonic server, over a socket.
mod tonic_client {
    use std::task::{Context, Poll};

    use tonic::{
        Code, Status,
        body::Body,
        client::Grpc,
        server::{NamedService, UnaryService},
        transport::{Channel, Server, server::TcpIncoming},
    };
    use tonic_prost::ProstCodec;

    use super::*;

    /// `/test.Empty/Call`: takes nothing, gives nothing.
    #[derive(Clone)]
    struct Empty;

    impl NamedService for Empty {
        const NAME: &'static str = "test.Empty";
    }

    impl UnaryService<()> for Empty {
        type Response = ();
        type Future = std::future::Ready<Result<tonic::Response<()>, Status>>;

        fn call(&mut self, _: tonic::Request<()>) -> Self::Future {
            std::future::ready(Ok(tonic::Response::new(())))
        }
    }

    impl Service<http::Request<Body>> for Empty {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = futures_util::future::BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            Box::pin(async {
                let mut grpc = tonic::server::Grpc::new(ProstCodec::<(), ()>::default());
                Ok(grpc.unary(Empty, request).await)
            })
        }
    }

    async fn call(
        client: &mut Grpc<Channel>,
        account: &[u8],
        timeout: Duration,
    ) -> Result<(), Status> {
        client.ready().await.unwrap();
        let mut request = tonic::Request::new(());
        request.set_timeout(timeout);
        let account = tonic::metadata::MetadataValue::from_bytes(account);
        request.metadata_mut().insert_bin("account-bin", account);
        let path = http::uri::PathAndQuery::from_static("/test.Empty/Call");
        let codec = ProstCodec::<(), ()>::default();
        client.unary(request, path, codec).await.map(|_| ())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_with_a_time_out_hears_that_the_resource_is_locked() {
        let locks = LockFactory::new(MemoryStorage::new());
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let account = HeaderName::from_static("account-bin");
        let patient = LockOptions::builder().retries(60).build().unwrap();
        let lock = DistributedLockLayer::new(locks.clone(), metadata("accounts", account));
        let server = Server::builder()
            .layer(lock.options(patient))
            .add_service(Empty);
        tokio::spawn(server.serve_with_incoming(incoming));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        let mut client = Grpc::new(channel.connect().await.unwrap());

        let key = LockKey::from_parts([&b"accounts"[..], b"a/b\xff"]).unwrap();
        let held = locks.create_lock(key).unwrap();
        let held = held.lock(LockOptions::default()).await.unwrap();
        // It would wait for a minute.
        let refused = call(&mut client, b"a/b\xff", ms(1_500)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted, "{refused:?}");
        assert_eq!(refused.message(), "the resource is locked");
        // Another account is not locked, and this one is free in time.
        call(&mut client, b"a/b", ms(10_000)).await.unwrap();
        let (served, ()) = tokio::join!(call(&mut client, b"a/b\xff", ms(20_000)), async {
            while locks.waiters() == 0 {
                tokio::time::sleep(ms(1)).await;
            }
            drop(held);
        });
        served.unwrap();
    }
}
