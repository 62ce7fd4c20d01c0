//! What the layer is for, in figures.
//!
//! Two replicas of a small service, each with its own listener, share a table of stock levels. A
//! request takes one piece from the stock of one item: it reads the level, does its business for a
//! moment, and writes the level back. 200 such requests arrive at the same time, for 5 items, over
//! both replicas. Without a lock, some of them overwrite each other's result. With the layer, none
//! do.
//!
//! ```text
//! cargo run --release --example lost_update
//! cargo run --release --example lost_update -- --redis redis://127.0.0.1:6379
//! ```
//!
//! The locks are in memory by default (one storage that both replicas share, as they would share a
//! Redis), or in the Redis server named with `--redis`. Exits with 1 if an update was lost under
//! the layer, or a request turned away.

#![allow(clippy::unwrap_used, reason = "a poisoned mutex should end an example")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what it is for"
)]

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{Path, Request, State},
    routing::post,
};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, task::JoinSet};
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey, LockOptions,
    error::BoxError,
    storage::{MemoryStorage, RedisStorage},
};

const REQUESTS: usize = 200;
const ITEMS: usize = 5;
const START: i64 = 1_000;
/// The time between reading the level and writing it: a query, a call to another service.
const BUSINESS: Duration = Duration::from_millis(2);

/// What both replicas share: the "database". Each access is atomic; a read and a later write are
/// not.
type Stock = Arc<Mutex<Levels>>;

struct Levels {
    levels: [i64; ITEMS],
    /// How many times a level was written: one piece less each time, if nothing is lost.
    writes: i64,
}

/// Takes one piece. This is the handler that loses updates when two run at the same time.
async fn take(State(stock): State<Stock>, Path(item): Path<usize>) {
    let level = read(&stock, item);
    tokio::time::sleep(BUSINESS).await;
    write(&stock, item, level - 1);
}

fn read(stock: &Stock, item: usize) -> i64 {
    stock.lock().unwrap().levels[item]
}

fn write(stock: &Stock, item: usize, level: i64) {
    let mut stock = stock.lock().unwrap();
    stock.levels[item] = level;
    stock.writes += 1;
}

/// `/items/3/take` locks item 3.
fn item_key(request: &Request) -> Result<LockKey, BoxError> {
    let id = request.uri().path().split('/').nth(2).unwrap_or_default();
    let item: usize = id.parse()?;
    Ok(LockKey::from_parts(["items", &item.to_string()])?)
}

/// One replica of the service, with the layer if it is given the means to lock.
fn replica(stock: Stock, locks: Option<LockFactory>) -> Result<Router, BoxError> {
    let mut handler = post(take);
    if let Some(factory) = locks {
        // For 30 s at most; another replica's lock is asked for every 10 ms.
        let options = LockOptions::builder()
            .interval(Duration::from_millis(10))
            .retries(3_000)
            .build()?;
        let one_at_a_time = DistributedLockLayer::new(factory, item_key).options(options);
        handler = handler.route_layer(one_at_a_time);
    }
    Ok(Router::new()
        .route("/items/{item}/take", handler)
        .with_state(stock))
}

/// Where the locks are kept.
#[derive(Clone)]
enum Locks {
    Memory(MemoryStorage),
    Redis(String),
}

impl Locks {
    /// A factory such as each replica makes at its start.
    async fn factory(&self) -> Result<LockFactory, BoxError> {
        Ok(match self {
            Self::Memory(storage) => LockFactory::new(storage.clone()),
            Self::Redis(url) => LockFactory::new(RedisStorage::connect(url).await?),
        })
    }
}

struct Report {
    lost: i64,
    rejected: usize,
    throughput: f64,
    median: Duration,
    p99: Duration,
}

async fn run(locks: Option<&Locks>) -> Result<Report, BoxError> {
    let stock = Stock::new(Mutex::new(Levels {
        levels: [START; ITEMS],
        writes: 0,
    }));
    let mut replicas = Vec::new();
    for _ in 0..2 {
        let factory = match locks {
            Some(locks) => Some(locks.factory().await?),
            None => None,
        };
        let app = replica(Arc::clone(&stock), factory.clone())?;
        replicas.push((serve(app).await?, factory));
    }

    let client = Client::builder(TokioExecutor::new()).build_http();
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for number in 0..REQUESTS {
        let (address, _) = replicas[number % replicas.len()];
        let item = number / 2 % ITEMS;
        requests.spawn(request(client.clone(), address, item));
    }
    let mut times = Vec::new();
    let mut rejected = 0;
    while let Some(answer) = requests.join_next().await {
        match answer?? {
            Some(time) => times.push(time),
            None => rejected += 1,
        }
    }
    let elapsed = started.elapsed();

    for factory in replicas.into_iter().filter_map(|(_, factory)| factory) {
        factory.drain(Duration::from_secs(1)).await;
    }
    times.sort();
    let stock = stock.lock().unwrap();
    let taken: i64 = stock.levels.iter().map(|level| START - level).sum();
    Ok(Report {
        lost: stock.writes - taken,
        rejected,
        throughput: times.len() as f64 / elapsed.as_secs_f64(),
        median: percentile(&times, 50),
        p99: percentile(&times, 99),
    })
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted
        .get(sorted.len() * percent / 100)
        .copied()
        .unwrap_or_default()
}

async fn serve(app: Router) -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(address)
}

/// How long a request took, or nothing if it was turned away.
async fn request(
    client: Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
    item: usize,
) -> Result<Option<Duration>, BoxError> {
    let started = Instant::now();
    let request = hyper::Request::post(format!("http://{address}/items/{item}/take"));
    let response = client.request(request.body(Empty::new())?).await?;
    Ok(response.status().is_success().then(|| started.elapsed()))
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let mut arguments = std::env::args().skip(1);
    let locks = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Locks::Memory(MemoryStorage::new()),
        (Some("--redis"), Some(url)) => Locks::Redis(url),
        _ => {
            eprintln!("usage: lost_update [--redis redis://host:port]");
            return Ok(ExitCode::from(2));
        }
    };
    let place = match &locks {
        Locks::Memory(_) => "memory",
        Locks::Redis(_) => "Redis",
    };

    println!(
        "{REQUESTS} requests at once to 2 replicas, each takes 1 piece of 1 of {ITEMS} items; locks in {place}\n"
    );
    println!("              lost updates   rejected   requests/s   median      p99");
    let without = run(None).await?;
    print("no layer", &without);
    let with = run(Some(&locks)).await?;
    print("with the layer", &with);

    Ok(if with.lost == 0 && with.rejected == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(what: &str, report: &Report) {
    let Report {
        lost,
        rejected,
        throughput,
        median,
        p99,
    } = report;
    println!("{what:<14}{lost:>12}{rejected:>11}{throughput:>13.0}{median:>9.0?}{p99:>9.0?}");
}
