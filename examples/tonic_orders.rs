//! A gRPC service to copy from: an order is worked on by one call at a time, to the end of its
//! stream.
//!
//! ```text
//! cargo run --example tonic_orders -- --demo                        # a server, two clients, and what they see
//! cargo run --example tonic_orders                                  # a server, locks in memory: one replica
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example tonic_orders # locks in Redis: any number
//! ```
//!
//! No protoc is needed: what `tonic-prost-build` would generate is written by hand in the modules
//! `orders` and `client`. With generated code the layer is put on in the same way.

use std::{env, net::SocketAddr, time::Duration};

use http::Request;
use tonic::{
    Code, Status,
    body::Body,
    service::LayerExt,
    transport::{Server, server::TcpIncoming},
};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, InvalidKey},
    storage::{MemoryStorage, RedisStorage},
};

use self::{client::OrdersClient, orders::OrdersServer};

/// The layer sees a call before its message is read, so the order is named in the metadata.
/// `fulfil` looks whether the message names the same.
const ORDER: &str = "order";

fn named_order(request: &Request<Body>) -> Result<LockKey, BoxError> {
    let order = request.headers().get(ORDER).ok_or("no order")?.to_str()?;
    Ok(order_key(order.parse()?)?)
}

fn order_key(order: u64) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["orders", &order.to_string()])
}

/// How long streams may go on once the service is told to end.
const GRACE: Duration = Duration::from_secs(5);

async fn serve(locks: LockFactory, incoming: TcpIncoming) -> Result<(), BoxError> {
    // Who comes second does not wait, and is told `ABORTED`.
    let options = LockOptions::builder().retries(0).build()?;
    let one_call_at_a_time = DistributedLockLayer::new(locks.clone(), named_order)
        .options(options)
        .hold_to_body_end();

    let draining = locks.clone();
    Server::builder()
        // For all services of the server: `.layer(one_call_at_a_time)`. For this one:
        .add_service(one_call_at_a_time.named_layer(OrdersServer))
        .serve_with_incoming_shutdown(incoming, async move {
            // Without a handler for the signal, nothing ends the server but a kill.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            // The server ends when its last stream has. Those that go on after the grace lose their
            // locks and are cut off.
            tokio::spawn(async move { draining.drain(GRACE).await });
        })
        .await?;
    locks.drain(GRACE).await;
    Ok(())
}

/// Two clients that want the same order, and one that names two.
#[allow(clippy::print_stdout, reason = "this is what it is for")]
async fn demo(address: SocketAddr) -> Result<(), BoxError> {
    let mut first = OrdersClient::connect(address).await?;
    let mut second = OrdersClient::connect(address).await?;

    let mut steps = first.fulfil(call(42)).await?;
    while let Some(step) = steps.message().await? {
        println!("first:  {}", step.text);
        if let Err(status) = second.fulfil(call(42)).await {
            println!("second: {:?}, {}", status.code(), status.message());
            assert_eq!(status.code(), Code::Aborted);
        }
    }
    println!("first:  the stream has ended");
    let mut steps = second.fulfil(call(42)).await?;
    while let Some(step) = steps.message().await? {
        println!("second: {}", step.text);
    }

    let mut two_orders = call(42);
    two_orders.get_mut().id = 43;
    if let Err(status) = second.fulfil(two_orders).await {
        println!("third:  {:?}, {}", status.code(), status.message());
    }
    Ok(())
}

/// A call for this order.
fn call(order: u64) -> tonic::Request<orders::Order> {
    let mut request = tonic::Request::new(orders::Order { id: order });
    request.metadata_mut().insert(ORDER, order.into());
    request
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    tracing_subscriber::fmt().init();
    let locks = match env::var("REDIS_URL") {
        Ok(url) => LockFactory::new(RedisStorage::connect(url).await?),
        Err(_) => LockFactory::new(MemoryStorage::new()),
    };
    if env::args().any(|argument| argument == "--demo") {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse()?)?;
        let address = incoming.local_addr()?;
        tokio::spawn(serve(locks, incoming));
        return demo(address).await;
    }
    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:50051".into());
    let incoming = TcpIncoming::bind(address.parse()?)?;
    tracing::info!("listening on http://{}", incoming.local_addr()?);
    serve(locks, incoming).await
}

/// What is done with an order, step by step. It is under the lock to the last.
async fn fulfil(
    request: tonic::Request<orders::Order>,
) -> Result<tonic::Response<orders::Steps>, Status> {
    let lock = request.extensions().get::<HeldLock>();
    let lock = lock.ok_or_else(|| Status::internal("no lock"))?.clone();
    let order = request.into_inner().id;
    // The metadata is the client's word, as the message is. Who names one order there and another
    // here would work on the other without its lock.
    let key = order_key(order).map_err(|error| Status::internal(error.to_string()))?;
    if key != lock.key() {
        let why = "the message names another order than the metadata";
        return Err(Status::invalid_argument(why));
    }
    let steps = ["reserved", "packed", "shipped"].into_iter();
    let steps = futures_util::stream::unfold(steps, move |mut steps| {
        let lock = lock.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let step = steps.next()?;
            // To be passed on with each write.
            let token = lock.fencing_token();
            tracing::debug!(order, step, token);
            let text = format!("order {order} is {step}");
            Some((Ok(orders::Step { text }), steps))
        }
    });
    Ok(tonic::Response::new(Box::pin(steps)))
}

/// The server's side of
///
/// ```text
/// package example;
/// service Orders {
///   rpc Fulfil(Order) returns (stream Step);
/// }
/// ```
mod orders {
    use std::{
        convert::Infallible,
        pin::Pin,
        task::{Context, Poll},
    };

    use futures_util::{Stream, future::BoxFuture};
    use http::{Request, Response};
    use tonic::{Status, body::Body, server::NamedService};
    use tonic_prost::ProstCodec;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Order {
        #[prost(uint64, tag = "1")]
        pub(super) id: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Step {
        #[prost(string, tag = "1")]
        pub(super) text: String,
    }

    pub(super) type Steps = Pin<Box<dyn Stream<Item = Result<Step, Status>> + Send>>;

    pub(super) const FULFIL: &str = "/example.Orders/Fulfil";

    #[derive(Clone, Copy, Debug)]
    pub(super) struct OrdersServer;

    impl NamedService for OrdersServer {
        const NAME: &'static str = "example.Orders";
    }

    impl tower::Service<Request<Body>> for OrdersServer {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            Box::pin(async move {
                if request.uri().path() != FULFIL {
                    return Ok(Status::unimplemented("no such call").into_http());
                }
                let mut grpc = tonic::server::Grpc::new(ProstCodec::<Step, Order>::default());
                let fulfil = tower::service_fn(super::fulfil);
                Ok(grpc.server_streaming(fulfil, request).await)
            })
        }
    }
}

/// The client's side of it.
mod client {
    use std::net::SocketAddr;

    use http::uri::PathAndQuery;
    use tonic::{
        Status, Streaming,
        client::Grpc,
        transport::{Channel, Endpoint},
    };
    use tonic_prost::ProstCodec;
    use tower_distributed_lock::error::BoxError;

    use super::orders::{FULFIL, Order, Step};

    pub(super) struct OrdersClient(Grpc<Channel>);

    impl OrdersClient {
        pub(super) async fn connect(address: SocketAddr) -> Result<Self, BoxError> {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
            Ok(Self(Grpc::new(endpoint.connect().await?)))
        }

        pub(super) async fn fulfil(
            &mut self,
            request: tonic::Request<Order>,
        ) -> Result<Streaming<Step>, Status> {
            let ready = self.0.ready().await;
            ready.map_err(|error| Status::unavailable(error.to_string()))?;
            let path = PathAndQuery::from_static(FULFIL);
            let codec = ProstCodec::<Order, Step>::default();
            Ok(self
                .0
                .server_streaming(request, path, codec)
                .await?
                .into_inner())
        }
    }
}
