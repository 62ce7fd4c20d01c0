//! A replica: an axum service behind the layer, as anybody would write it.

use std::time::Duration;

use axum::{
    Router,
    extract::{Path, Request, State},
    http::HeaderMap,
    routing::post,
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::time::sleep;
use tower_distributed_lock::{
    Clock, DistributedLockLayer, HeldLock, LockFactory, LockOptions,
    storage::{LockStorage, RedisStorage, Redlock},
};

use crate::{
    history::History,
    net::{HostId, Net},
};

/// What all replicas are set to.
#[derive(Clone, Debug)]
pub struct Settings {
    pub options: LockOptions,
    pub connect_timeout: Duration,
    pub storage_timeout: Duration,
    pub node_timeout: Duration,
    pub handoff: (u32, Duration),
    pub linger: Option<Duration>,
    pub lock_delay: Duration,
    pub await_release: bool,
}

#[derive(Clone)]
struct App {
    history: History,
    host: HostId,
}

/// The locks of a process on the host `from`, in the server on the host `to`.
pub fn storage(net: &Net, from: HostId, to: HostId, connect_timeout: Duration) -> RedisStorage {
    let net = net.clone();
    let builder = RedisStorage::builder(format!("redis://{to}"))
        .connector(move |_, _| {
            let net = net.clone();
            async move { net.connect(from, to).await }
        })
        .connect_timeout(connect_timeout);
    builder.connect_lazily().unwrap()
}

fn factory(storage: impl LockStorage, settings: &Settings) -> LockFactory {
    let builder = LockFactory::builder(storage)
        .clock(Clock::tokio())
        .storage_timeout(settings.storage_timeout)
        .handoff_limit(settings.handoff.0, settings.handoff.1)
        .lock_delay(settings.lock_delay);
    let builder = match settings.linger {
        Some(linger) => builder.linger(linger),
        None => builder,
    };
    builder.build().unwrap()
}

/// Starts the service on the runtime of its host, with its locks in the servers `0..servers`.
pub async fn start(
    (net, history): (Net, History),
    host: HostId,
    servers: usize,
    settings: &Settings,
) -> LockFactory {
    let storage = |server| storage(&net, host, server, settings.connect_timeout);
    let factory = if servers == 1 {
        factory(storage(0), settings)
    } else {
        let nodes = (0..servers).map(storage);
        let redlock = nodes.fold(Redlock::builder(), |builder, node| builder.node(node));
        let redlock = redlock.node_timeout(settings.node_timeout);
        factory(redlock.build().unwrap(), settings)
    };
    let arrivals = history.clone();
    let key = move |request: &Request| {
        arrivals.arrived(number(request.headers(), "x-request"));
        request.uri().path().to_owned()
    };
    let lock = DistributedLockLayer::new(factory.clone(), key)
        .options(settings.options)
        .await_release(settings.await_release);
    let app = Router::new()
        .route("/{key}", post(change))
        .layer(lock)
        .with_state(App { history, host });
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(net.accept(host).await);
            let service = TowerToHyperService::new(app.clone());
            tokio::spawn(async move {
                let connection = hyper::server::conn::http1::Builder::new();
                let _ = connection.serve_connection(stream, service).await;
            });
        }
    });
    factory
}

async fn change(
    State(app): State<App>,
    Path(key): Path<usize>,
    headers: HeaderMap,
    lock: HeldLock,
) {
    let request = number(&headers, "x-request");
    let inside = app.history.enter(app.host, key, request, &lock);
    for _ in 0..number(&headers, "x-work") {
        sleep(Duration::from_millis(1)).await;
        inside.goes_on(app.host, &lock);
    }
    if headers.contains_key("x-panic") {
        // Without the hook, which counts those that nobody meant.
        std::panic::resume_unwind(Box::new("as the client wants"));
    }
    inside.writes();
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}
