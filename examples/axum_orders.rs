//! A service to copy from: orders that must not be paid twice.
//!
//! ```text
//! cargo run --example axum_orders                                  # locks in memory: one replica
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example axum_orders # locks in Redis: any number
//!
//! curl -X POST localhost:3000/orders/42/pay
//! ```
//!
//! Send the `curl` twice at the same time: the first request pays, the second waits for it and finds the order paid.

#![allow(clippy::unwrap_used, reason = "a poisoned mutex should end an example")]

use std::{
    collections::HashSet,
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{Path, Request, State},
    http::StatusCode,
    routing::{get, post},
};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::BoxError,
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

fn app(locks: &LockFactory) -> Result<Router, BoxError> {
    // A holder that crashes blocks its order for 5 s. A request waits for up to 10 × 200 ms.
    let options = LockOptions::builder()
        .ttl(Duration::from_secs(5))
        .retries(10)
        .interval(Duration::from_millis(200))
        .build()?;
    let one_payment_at_a_time = DistributedLockLayer::new(locks.clone(), |request: &Request| {
        LockKey::new(request.uri().path())
    })
    .options(options);

    Ok(Router::new()
        // On the method, so that nothing but `POST /orders/{id}/pay` is locked.
        .route(
            "/orders/{id}/pay",
            post(pay).route_layer(one_payment_at_a_time),
        )
        .route("/health", get(|| async { "ok" }))
        .with_state(PaidOrders::default()))
}

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

    axum::serve(listener, app(&locks)?)
        .with_graceful_shutdown(async {
            // An error means that no signal can ever arrive; then the service just runs.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
        .await?;

    // The requests have ended; their releases may still be on their way.
    let left = locks.drain(Duration::from_secs(5)).await;
    tracing::info!(left, "locks given back");
    Ok(())
}
