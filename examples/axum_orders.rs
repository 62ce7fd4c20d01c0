//! A service to copy from: orders that must not be paid twice.
//!
//! ```text
//! cargo run --example axum_orders                                  # locks in memory: one replica
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example axum_orders # locks in Redis: any number
//!
//! curl -X POST localhost:3000/orders/42/pay
//! ```
//!
//! Send the `curl` twice at the same time: the first request pays, the second waits for it and
//! finds the order paid.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a poisoned mutex or a missing signal handler should end an example"
)]

use std::{
    collections::HashSet,
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, InvalidKey},
    middleware::key::extracted,
    storage::{MemoryStorage, RedisStorage},
};

/// Stands for the database.
type PaidOrders = Arc<Mutex<HashSet<u64>>>;

async fn pay(
    State(paid): State<PaidOrders>,
    Path(order): Path<u64>,
    lock: HeldLock,
) -> (StatusCode, String) {
    if is_paid(&paid, order) {
        return (
            StatusCode::CONFLICT,
            format!("order {order} is paid already\n"),
        );
    }
    charge_the_card().await;
    mark_paid(&paid, order);

    // The receipt can be printed without the lock: the next request for this order may start.
    lock.release();
    print_receipt().await;
    (StatusCode::OK, format!("order {order} is paid\n"))
}

fn is_paid(paid: &PaidOrders, order: u64) -> bool {
    paid.lock().unwrap().contains(&order)
}

fn mark_paid(paid: &PaidOrders, order: u64) {
    paid.lock().unwrap().insert(order);
}

async fn charge_the_card() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

async fn print_receipt() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// `/orders/42/pay` locks order 42, however the client spells it: `042` is the same order for the
/// handler, so it has to be the same key.
fn order_key(Path(order): Path<u64>) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["orders", &order.to_string()])
}

fn app(locks: &LockFactory) -> Result<Router, BoxError> {
    // A holder that crashes blocks its order for 5 s. A request waits for up to 10 × 200 ms.
    let options = LockOptions::builder()
        .ttl(Duration::from_secs(5))
        .retries(10)
        .interval(Duration::from_millis(200))
        .build()?;
    let one_payment_at_a_time =
        DistributedLockLayer::new(locks.clone(), extracted(order_key)).options(options);

    Ok(Router::new()
        // On the method, so that nothing but `POST /orders/{id}/pay` is locked.
        .route(
            "/orders/{id}/pay",
            post(pay).route_layer(one_payment_at_a_time),
        )
        .route("/health", get(|| async { "ok" }))
        .with_state(PaidOrders::default()))
}

/// Ctrl-C, or what an orchestrator sends.
async fn shutdown_signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};

        let mut terminate = signal(SignalKind::terminate()).expect("a signal handler");
        tokio::select! {
            result = interrupt => result.expect("a signal handler"),
            _ = terminate.recv() => {}
        }
    }
    #[cfg(not(unix))]
    interrupt.await.expect("a signal handler");
}

/// How long handlers may take to finish once the service is told to end.
const GRACE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    tracing_subscriber::fmt().init();
    let locks = match env::var("REDIS_URL") {
        Ok(url) => LockFactory::new(RedisStorage::connect(url).await?),
        Err(_) => LockFactory::new(MemoryStorage::new()),
    };
    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);

    let draining = locks.clone();
    axum::serve(listener, app(&locks)?)
        .with_graceful_shutdown(async move {
            shutdown_signal().await;
            // The server ends when its last request has. A handler that hangs loses its lock after
            // the grace and is cancelled, so that it does.
            tokio::spawn(async move { draining.drain(GRACE).await });
        })
        .await?;

    // The requests have ended; the release of the last locks may still be on its way.
    let left = locks.drain(GRACE).await;
    tracing::info!(left, "locks given back");
    Ok(())
}
