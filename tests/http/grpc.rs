//! A tonic service and a tonic client, written by hand so that no protoc is needed.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use tonic::{
    Code, Status,
    body::Body,
    client::Grpc,
    server::{NamedService, UnaryService},
    transport::{Channel, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;

use super::*;

#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

/// `/test.Echo/Echo`.
#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl UnaryService<Text> for Echo {
    type Response = Text;
    type Future = std::future::Ready<Result<tonic::Response<Text>, Status>>;

    fn call(&mut self, request: tonic::Request<Text>) -> Self::Future {
        let lock = request
            .extensions()
            .get::<HeldLock>()
            .expect("a `HeldLock`");
        let text = format!("{} under {}", request.get_ref().text, lock.key());
        std::future::ready(Ok(tonic::Response::new(Text { text })))
    }
}

impl tower::Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = futures_util::future::BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Text, Text>::default());
            Ok(grpc.unary(Echo, request).await)
        })
    }
}

async fn client(locks: LockFactory) -> Grpc<Channel> {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let lock = DistributedLockLayer::new(locks, |request: &http::Request<Body>| {
        let account = request
            .headers()
            .get("account")
            .ok_or("no account")?
            .as_bytes();
        Ok::<_, tower_distributed_lock::error::BoxError>(LockKey::from_parts([
            b"account", account,
        ])?)
    })
    .options(LockOptions::builder().retries(0).build().unwrap());
    let server = Server::builder().layer(lock).add_service(Echo);
    tokio::spawn(server.serve_with_incoming(incoming));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    Grpc::new(channel.connect().await.unwrap())
}

async fn echo(client: &mut Grpc<Channel>, account: Option<&'static str>) -> Result<String, Status> {
    client.ready().await.unwrap();
    let mut request = tonic::Request::new(Text {
        text: "hello".into(),
    });
    if let Some(account) = account {
        request
            .metadata_mut()
            .insert("account", account.parse().unwrap());
    }
    let codec = ProstCodec::<Text, Text>::default();
    let path = http::uri::PathAndQuery::from_static("/test.Echo/Echo");
    let response = client.unary(request, path, codec).await?;
    Ok(response.into_inner().text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tonic_client_gets_its_answer_or_a_grpc_status() {
    let locks = LockFactory::new(MemoryStorage::new());
    let mut client = client(locks.clone()).await;
    assert_eq!(
        echo(&mut client, Some("7")).await.unwrap(),
        "hello under account/7"
    );

    let held = locks.create_lock("account/7").unwrap();
    let held = held.lock(LockOptions::default()).await.unwrap();
    assert_eq!(
        echo(&mut client, Some("7")).await.unwrap_err().code(),
        Code::Aborted
    );
    assert_eq!(
        echo(&mut client, Some("8")).await.unwrap(),
        "hello under account/8"
    );
    assert_eq!(
        echo(&mut client, None).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    drop(held);
    assert_eq!(
        echo(&mut client, Some("7")).await.unwrap(),
        "hello under account/7"
    );

    locks.drain(LIMIT).await;
    assert_eq!(
        echo(&mut client, Some("7")).await.unwrap_err().code(),
        Code::Unavailable
    );
}
