//! The layer in a tonic server, before a real tonic client: all four kinds of calls, held to the end
//! of the stream.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod kit;

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture, stream};
use http::{Request, uri::PathAndQuery};
use kit::{LIMIT, RedisServer, eventually, ms, within};
use tokio::sync::mpsc;
use tonic::{
    Code, Status, Streaming,
    body::Body,
    client::Grpc,
    server::NamedService,
    service::LayerExt,
    transport::{Channel, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tower::{Layer as _, service_fn, util::option_layer};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, LossReason},
    middleware::{DefaultOnAcquired, DefaultOnReject, HoldToBodyEnd},
    storage::{LockStorage, MemoryStorage, RedisStorage},
};

#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

fn text(text: &str) -> Text {
    Text { text: text.into() }
}

type Told = mpsc::UnboundedReceiver<Result<Text, Status>>;

/// What a call is answered with.
struct Call {
    teller: mpsc::UnboundedSender<Result<Text, Status>>,
    lock: Option<HeldLock>,
    /// Becomes whether the lock was held, when the stream of answers is dropped.
    held_at_end: Arc<Mutex<Option<bool>>>,
}

impl Call {
    fn tell(&self, answer: Result<Text, Status>) {
        assert!(self.teller.send(answer).is_ok(), "the stream is gone");
    }

    fn held_at_end(&self) -> Option<bool> {
        *self.held_at_end.lock().unwrap()
    }
}

/// The answers of a call.
struct Answers {
    told: Told,
    lock: Option<HeldLock>,
    held_at_end: Arc<Mutex<Option<bool>>>,
}

impl Stream for Answers {
    type Item = Result<Text, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.told.poll_recv(cx)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let held = self.lock.as_ref().map(HeldLock::is_held);
        *self.held_at_end.lock().unwrap() = Some(held.unwrap_or_default());
    }
}

/// `test.Feed`: `Say` and `Collect` answer once, `Watch` and `Talk` with a stream. Written by hand,
/// so that no protoc is needed.
#[derive(Clone)]
struct Feed {
    calls: mpsc::UnboundedSender<Call>,
}

impl NamedService for Feed {
    const NAME: &'static str = "test.Feed";
}

impl Feed {
    /// The test answers.
    fn answers<T>(&self, request: &tonic::Request<T>) -> Answers {
        let (teller, told) = mpsc::unbounded_channel();
        let lock: Option<HeldLock> = request.extensions().get().cloned();
        let held_at_end = Arc::new(Mutex::new(None));
        let call = Call {
            teller,
            lock: lock.clone(),
            held_at_end: Arc::clone(&held_at_end),
        };
        assert!(self.calls.send(call).is_ok());
        Answers {
            told,
            lock,
            held_at_end,
        }
    }

    async fn one(mut answers: Answers) -> Result<tonic::Response<Text>, Status> {
        let answer = answers.next().await.expect("an answer")?;
        Ok(tonic::Response::new(answer))
    }

    /// What came with the call, then what the test says.
    async fn echo_then(
        request: tonic::Request<Streaming<Text>>,
        answers: Answers,
    ) -> Result<Text, Status> {
        let mut all = String::new();
        let mut texts = request.into_inner();
        while let Some(part) = texts.message().await? {
            all += &part.text;
        }
        let answer = Self::one(answers).await?.into_inner().text;
        Ok(text(&format!("{all}{answer}")))
    }
}

impl tower::Service<Request<Body>> for Feed {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let feed = self.clone();
        async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Text, Text>::default());
            Ok(match request.uri().path() {
                "/test.Feed/Say" => {
                    let say = service_fn(move |request: tonic::Request<Text>| {
                        Feed::one(feed.answers(&request))
                    });
                    grpc.unary(say, request).await
                }
                "/test.Feed/Watch" => {
                    let watch = service_fn(move |request: tonic::Request<Text>| {
                        let answers = feed.answers(&request);
                        async move { Ok::<_, Status>(tonic::Response::new(answers)) }
                    });
                    grpc.server_streaming(watch, request).await
                }
                "/test.Feed/Collect" => {
                    let collect = service_fn(move |request: tonic::Request<Streaming<Text>>| {
                        let answers = feed.answers(&request);
                        async move {
                            let all = Feed::echo_then(request, answers).await?;
                            Ok::<_, Status>(tonic::Response::new(all))
                        }
                    });
                    grpc.client_streaming(collect, request).await
                }
                "/test.Feed/Talk" => {
                    let talk = service_fn(move |request: tonic::Request<Streaming<Text>>| {
                        let answers = feed.answers(&request);
                        let both = stream::select(request.into_inner(), answers);
                        async move { Ok::<_, Status>(tonic::Response::new(both)) }
                    });
                    grpc.streaming(talk, request).await
                }
                _ => Status::unimplemented("no such call").into_http(),
            })
        }
        .boxed()
    }
}

/// The lock of the account that the metadata names.
fn account(request: &Request<Body>) -> Result<LockKey, BoxError> {
    let account = request.headers().get("account").ok_or("no account")?;
    Ok(LockKey::from_parts([b"account", account.as_bytes()])?)
}

type Key = fn(&Request<Body>) -> Result<LockKey, BoxError>;
type Layer = DistributedLockLayer<Key, DefaultOnReject, DefaultOnAcquired, HoldToBodyEnd>;

fn at_once() -> LockOptions {
    LockOptions::builder().retries(0).build().unwrap()
}

fn layer(locks: &LockFactory) -> Layer {
    let key: Key = account;
    DistributedLockLayer::new(locks.clone(), key)
        .options(at_once())
        .hold_to_body_end()
}

fn address() -> (TcpIncoming, SocketAddr) {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    (incoming, address)
}

struct World {
    locks: LockFactory,
    calls: mpsc::UnboundedReceiver<Call>,
    address: SocketAddr,
}

impl World {
    /// A server with the layer around all of it.
    async fn start(storage: impl LockStorage, make: impl FnOnce(Layer) -> Layer) -> Self {
        let locks = LockFactory::new(storage);
        let (sender, calls) = mpsc::unbounded_channel();
        let (incoming, address) = address();
        let server = Server::builder()
            .layer(make(layer(&locks)))
            .add_service(Feed { calls: sender });
        tokio::spawn(server.serve_with_incoming(incoming));
        Self {
            locks,
            calls,
            address,
        }
    }

    async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    async fn call(&mut self) -> Call {
        let call = within(LIMIT, "the call arrives", self.calls.recv()).await;
        call.unwrap()
    }

    async fn is_released(&self) {
        let locks = &self.locks;
        eventually("the lock is released", LIMIT, async || locks.keys() == 0).await;
    }
}

#[derive(Clone)]
struct Client(Grpc<Channel>);

fn codec() -> ProstCodec<Text, Text> {
    ProstCodec::default()
}

fn to_account<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let account = "7".parse().unwrap();
    request.metadata_mut().insert("account", account);
    request
}

fn path(path: &'static str) -> PathAndQuery {
    PathAndQuery::from_static(path)
}

impl Client {
    async fn connect(address: SocketAddr) -> Self {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        Self(Grpc::new(channel.connect().await.unwrap()))
    }

    async fn ready(&mut self) -> &mut Grpc<Channel> {
        self.0.ready().await.unwrap();
        &mut self.0
    }

    async fn say(&mut self, request: tonic::Request<Text>) -> Result<String, Status> {
        let grpc = self.ready().await;
        let answer = grpc.unary(request, path("/test.Feed/Say"), codec());
        let answer = within(LIMIT, "an answer", answer).await?;
        Ok(answer.into_inner().text)
    }

    async fn watch(&mut self) -> Result<Streaming<Text>, Status> {
        let grpc = self.ready().await;
        let request = to_account(text("all"));
        let answers = grpc.server_streaming(request, path("/test.Feed/Watch"), codec());
        Ok(within(LIMIT, "an answer", answers).await?.into_inner())
    }

    async fn collect(
        &mut self,
        texts: impl Stream<Item = Text> + Send + 'static,
    ) -> Result<String, Status> {
        let grpc = self.ready().await;
        let request = to_account(texts);
        let answer = grpc.client_streaming(request, path("/test.Feed/Collect"), codec());
        let answer = within(LIMIT, "an answer", answer).await?;
        Ok(answer.into_inner().text)
    }

    async fn talk(
        &mut self,
        texts: impl Stream<Item = Text> + Send + 'static,
    ) -> Result<Streaming<Text>, Status> {
        let grpc = self.ready().await;
        let request = to_account(texts);
        let answers = grpc.streaming(request, path("/test.Feed/Talk"), codec());
        Ok(within(LIMIT, "an answer", answers).await?.into_inner())
    }
}

async fn message(stream: &mut Streaming<Text>) -> Result<Option<String>, Status> {
    let message = within(LIMIT, "a message", stream.message()).await?;
    Ok(message.map(|message| message.text))
}

fn stream_of(told: mpsc::UnboundedReceiver<Text>) -> impl Stream<Item = Text> + Send {
    stream::unfold(told, async |mut told| Some((told.recv().await?, told)))
}

mod end {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_unary_call_holds_the_lock_to_its_answer() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut other = client.clone();
        let saying = tokio::spawn(async move { client.say(to_account(text("hello"))).await });
        let call = world.call().await;
        assert_eq!(call.lock.as_ref().unwrap().key().as_str(), "account/7");
        let denied = other.say(to_account(text("hello"))).await.unwrap_err();
        assert_eq!(denied.code(), Code::Aborted);
        assert_eq!(denied.message(), "the resource is locked");
        call.tell(Ok(text("done")));
        assert_eq!(saying.await.unwrap().unwrap(), "done");
        world.is_released().await;

        let saying = tokio::spawn(async move { other.say(to_account(text("hello"))).await });
        let call = world.call().await;
        call.tell(Err(Status::not_found("no such account")));
        let status = saying.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        world.is_released().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_of_answers_holds_the_lock_to_its_end() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut watching = client.watch().await.unwrap();
        let call = world.call().await;
        for said in ["one", "two"] {
            call.tell(Ok(text(said)));
            assert_eq!(message(&mut watching).await.unwrap().unwrap(), said);
            let denied = client.watch().await.unwrap_err();
            assert_eq!(denied.code(), Code::Aborted);
        }
        let Call {
            teller,
            held_at_end,
            ..
        } = call;
        drop(teller);
        assert_eq!(message(&mut watching).await.unwrap(), None, "a clean end");
        assert!(
            watching.trailers().await.unwrap().is_some(),
            "with trailers"
        );
        world.is_released().await;
        assert_eq!(*held_at_end.lock().unwrap(), Some(true));
        client.watch().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_that_ends_with_an_error_releases_and_the_status_passes() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut watching = client.watch().await.unwrap();
        let call = world.call().await;
        call.tell(Ok(text("one")));
        assert_eq!(message(&mut watching).await.unwrap().unwrap(), "one");
        assert_eq!(world.locks.keys(), 1);
        call.tell(Err(Status::data_loss("half of it is gone")));
        let status = message(&mut watching).await.unwrap_err();
        assert_eq!(status.code(), Code::DataLoss);
        assert_eq!(status.message(), "half of it is gone");
        world.is_released().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stream_of_requests_is_under_the_lock_to_its_answer() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut other = client.clone();
        let (sender, texts) = mpsc::unbounded_channel();
        let collecting = tokio::spawn(async move { client.collect(stream_of(texts)).await });
        let call = world.call().await;
        for part in ["a", "b"] {
            sender.send(text(part)).unwrap();
            assert_eq!(other.watch().await.unwrap_err().code(), Code::Aborted);
        }
        drop(sender);
        call.tell(Ok(text("!")));
        assert_eq!(collecting.await.unwrap().unwrap(), "ab!");
        world.is_released().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_talk_holds_the_lock_until_both_sides_are_done() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let (sender, texts) = mpsc::unbounded_channel();
        let mut talk = client.talk(stream_of(texts)).await.unwrap();
        let call = world.call().await;
        sender.send(text("hello")).unwrap();
        assert_eq!(message(&mut talk).await.unwrap().unwrap(), "hello");
        call.tell(Ok(text("hello too")));
        assert_eq!(message(&mut talk).await.unwrap().unwrap(), "hello too");
        // The client has said all; the server has not.
        drop(sender);
        call.tell(Ok(text("and")));
        assert_eq!(message(&mut talk).await.unwrap().unwrap(), "and");
        assert_eq!(client.watch().await.unwrap_err().code(), Code::Aborted);
        drop(call);
        assert_eq!(message(&mut talk).await.unwrap(), None);
        world.is_released().await;
    }
}

mod leaving {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_drops_its_stream_releases() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut watching = client.watch().await.unwrap();
        let call = world.call().await;
        call.tell(Ok(text("one")));
        assert_eq!(message(&mut watching).await.unwrap().unwrap(), "one");
        assert_eq!(world.locks.keys(), 1);
        drop(watching);
        world.is_released().await;
        assert_eq!(call.held_at_end(), Some(true), "the work ends first");

        let (sender, texts) = mpsc::unbounded_channel();
        let talk = client.talk(stream_of(texts)).await.unwrap();
        let call = world.call().await;
        assert_eq!(world.locks.keys(), 1);
        drop(talk);
        // To a client, a call goes on for as long as either direction of it does.
        drop(sender);
        world.is_released().await;
        assert_eq!(call.held_at_end(), Some(true), "the work ends first");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_whose_time_is_over_releases() {
        let mut world = World::start(MemoryStorage::new(), |lock| lock).await;
        let mut client = world.client().await;
        let mut request = to_account(text("hello"));
        request.set_timeout(ms(1000));
        let saying = tokio::spawn(async move { client.say(request).await });
        let call = world.call().await;
        assert!(saying.await.unwrap().is_err());
        world.is_released().await;
        assert_eq!(call.held_at_end(), Some(true), "the work ends first");
    }
}

mod lost {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_sees_aborted_when_the_lock_is_taken_away() {
        let redis = RedisServer::start().await;
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        let quick = LockOptions::builder().ttl(ms(3000)).retries(0);
        let quick = quick.build().unwrap();
        let mut world = World::start(storage, |lock| lock.options(quick)).await;
        let mut client = world.client().await;
        let delete = async || {
            let deleted: usize = redis.run("DEL distributed-locks:account/7").await;
            assert_eq!(deleted, 1);
        };
        let is_aborted = |status: Status| {
            assert_eq!(status.code(), Code::Aborted, "{status:?}");
            assert_eq!(status.message(), "the lock on the resource was lost");
        };

        // In mid-stream, and before the first message.
        for said in [vec!["one", "two"], vec![]] {
            let mut watching = client.watch().await.unwrap();
            let call = world.call().await;
            for said in said {
                call.tell(Ok(text(said)));
                assert_eq!(message(&mut watching).await.unwrap().unwrap(), said);
            }
            delete().await;
            is_aborted(message(&mut watching).await.unwrap_err());
            assert!(call.held_at_end().is_some(), "the stream is dropped");
            world.is_released().await;
        }

        let (_sender, texts) = mpsc::unbounded_channel();
        let mut talk = client.talk(stream_of(texts)).await.unwrap();
        let call = world.call().await;
        delete().await;
        is_aborted(message(&mut talk).await.unwrap_err());
        assert!(call.held_at_end().is_some(), "the stream is dropped");

        // While the answer is not there yet, it is the rejection that says so.
        let mut saying = client.clone();
        let saying = tokio::spawn(async move { saying.say(to_account(text("hello"))).await });
        let call = world.call().await;
        delete().await;
        is_aborted(saying.await.unwrap().unwrap_err());
        assert!(call.held_at_end().is_some(), "the handler is dropped");
        world.is_released().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_sees_aborted_when_redis_is_away_for_too_long() {
        let mut redis = RedisServer::start().await;
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        let quick = LockOptions::builder().ttl(ms(2000)).retries(0);
        let quick = quick.build().unwrap();
        let mut world = World::start(storage, |lock| lock.options(quick)).await;
        let mut client = world.client().await;
        let mut watching = client.watch().await.unwrap();
        let call = world.call().await;
        redis.kill();
        let status = message(&mut watching).await.unwrap_err();
        assert_eq!(status.code(), Code::Aborted);
        let lost = call.lock.as_ref().unwrap().lost();
        assert_eq!(within(LIMIT, "the loss", lost).await, LossReason::Expired);

        let status = client.say(to_account(text("hello"))).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "the lock service is unavailable");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_sees_aborted_at_max_hold() {
        let quick = LockOptions::builder().ttl(ms(3000)).max_hold(ms(1000));
        let quick = quick.build().unwrap();
        let mut world = World::start(MemoryStorage::new(), |lock| lock.options(quick)).await;
        let mut client = world.client().await;
        let mut watching = client.watch().await.unwrap();
        let call = world.call().await;
        let status = message(&mut watching).await.unwrap_err();
        assert_eq!(status.code(), Code::Aborted);
        let lost = call.lock.as_ref().unwrap().lost();
        assert_eq!(within(LIMIT, "the loss", lost).await, LossReason::MaxHold);
        world.is_released().await;
    }
}

mod rejection {
    use super::*;

    /// The statuses of the module documentation, for each kind of call.
    #[tokio::test(flavor = "multi_thread")]
    async fn each_rejection_has_its_status() {
        let storage = MemoryStorage::new();
        let locks = LockFactory::builder(storage).max_waiters(1);
        let locks = locks.build().unwrap();
        let patient = LockOptions::builder().retries(1000).build().unwrap();
        let (sender, _calls) = mpsc::unbounded_channel();
        let (incoming, address) = address();
        let server = Server::builder()
            .layer(layer(&locks).options(patient))
            .add_service(Feed { calls: sender });
        tokio::spawn(server.serve_with_incoming(incoming));
        let mut client = Client::connect(address).await;

        let nameless = tonic::Request::new(text("hello"));
        let status = client.say(nameless).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "the request names no valid resource");

        let held = locks.create_lock("account/7").unwrap();
        let held = held.lock(patient).await.unwrap();
        let mut waits = client.clone();
        let waiting = tokio::spawn(async move { waits.watch().await.map(drop) });
        eventually("it waits", LIMIT, async || locks.waiters() == 1).await;
        let status = client.watch().await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "too many requests wait for the resource");
        let status = client.collect(stream::empty()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let status = client.talk(stream::empty()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);

        let drained = locks.drain(ms(100)).await;
        let status = waiting.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{drained}");
        let status = client.watch().await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "the service is shutting down");
        drop(held);
    }
}

mod placement {
    use super::*;

    /// Another service of the same server.
    #[derive(Clone)]
    struct Other(Feed);

    impl NamedService for Other {
        const NAME: &'static str = "test.Other";
    }

    impl tower::Service<Request<Body>> for Other {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, mut request: Request<Body>) -> Self::Future {
            *request.uri_mut() = "/test.Feed/Say".parse().unwrap();
            self.0.call(request)
        }
    }

    async fn says_under_a_lock(
        address: SocketAddr,
        calls: &mut mpsc::UnboundedReceiver<Call>,
        called: &'static str,
    ) -> bool {
        let mut client = Client::connect(address).await;
        let saying = tokio::spawn(async move {
            let grpc = client.ready().await;
            let said = grpc.unary(to_account(text("hello")), path(called), codec());
            within(LIMIT, "an answer", said).await.unwrap();
        });
        let call = within(LIMIT, "the call arrives", calls.recv()).await;
        let call = call.unwrap();
        call.tell(Ok(text("done")));
        saying.await.unwrap();
        call.lock.is_some()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_service_of_a_server_can_have_the_layer() {
        let locks = LockFactory::new(MemoryStorage::new());
        let (sender, mut calls) = mpsc::unbounded_channel();
        let feed = || Feed {
            calls: sender.clone(),
        };
        // By tonic's way to keep the name, and without: the layer keeps it itself.
        let (named, at_named) = address();
        let server = Server::builder()
            .add_service(layer(&locks).named_layer(feed()))
            .add_service(Other(feed()));
        tokio::spawn(server.serve_with_incoming(named));
        let (layered, at_layered) = address();
        let server = Server::builder()
            .add_service(layer(&locks).layer(feed()))
            .add_service(Other(feed()));
        tokio::spawn(server.serve_with_incoming(layered));

        for address in [at_named, at_layered] {
            assert!(says_under_a_lock(address, &mut calls, "/test.Feed/Say").await);
            assert!(!says_under_a_lock(address, &mut calls, "/test.Other/Say").await);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_layer_is_optional_for_a_whole_server() {
        let locks = LockFactory::new(MemoryStorage::new());
        let (sender, mut calls) = mpsc::unbounded_channel();
        for lock in [Some(layer(&locks)), None] {
            let locked = lock.is_some();
            let (incoming, address) = address();
            let server = Server::builder()
                .layer(option_layer(lock))
                .add_service(Feed {
                    calls: sender.clone(),
                });
            tokio::spawn(server.serve_with_incoming(incoming));
            let under = says_under_a_lock(address, &mut calls, "/test.Feed/Say").await;
            assert_eq!(under, locked);
        }
    }
}
