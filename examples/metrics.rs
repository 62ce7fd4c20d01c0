//! A service whose locks are on a dashboard: `/metrics` for Prometheus, the span of each lock in the
//! log, and `Server-Timing` for the browser.
//!
//! ```text
//! cargo run --example metrics --features metrics
//!
//! for i in 1 2 3; do curl -i -X POST localhost:3000/orders/42/pay & done; wait
//! curl localhost:3000/metrics
//! ```
//!
//! `docs/observability.md` says what each number means, how Prometheus is told to come for them, and
//! when to wake somebody.

#![allow(
    clippy::expect_used,
    reason = "a service whose metrics cannot be set up should say so and end"
)]

use std::{env, time::Duration};

use axum::{
    Router,
    extract::Path,
    http::header,
    response::IntoResponse,
    routing::{get, post},
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey,
    error::{BoxError, InvalidKey},
    middleware::key::extracted,
    storage::{MemoryStorage, RedisStorage},
};
use tracing_subscriber::fmt::format::FmtSpan;

async fn pay(Path(order): Path<u64>) -> String {
    // This line carries the key and the wait: the handler is in the span of its lock.
    tracing::info!("charging the card");
    tokio::time::sleep(Duration::from_millis(50)).await;
    format!("order {order} is paid\n")
}

fn order_key(Path(order): Path<u64>) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["orders", &order.to_string()])
}

/// Waits and holds from 1 ms to 10 s. Without buckets the exporter would make summaries, which cannot
/// be added up over replicas.
const BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

fn recorder() -> PrometheusHandle {
    let seconds = Matcher::Prefix("distributed_lock_".into());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(seconds, &BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .expect("the only recorder, with buckets");
    // What histograms were told is put into their buckets now and then, also if nobody scrapes.
    let handle = recorder.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            handle.run_upkeep();
        }
    });
    recorder
}

/// How long handlers may go on once the service is told to end.
const GRACE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // A line at the end of each span: the wait, the hold, the outcome.
    tracing_subscriber::fmt()
        .with_span_events(FmtSpan::CLOSE)
        .init();
    let metrics = recorder();
    let locks = match env::var("REDIS_URL") {
        Ok(url) => LockFactory::new(RedisStorage::connect(url).await?),
        Err(_) => LockFactory::new(MemoryStorage::new()),
    };
    let one_at_a_time =
        DistributedLockLayer::new(locks.clone(), extracted(order_key)).server_timing();
    let app = Router::new()
        .route("/orders/{id}/pay", post(pay).route_layer(one_at_a_time))
        .route(
            "/metrics",
            get(move || async move {
                let text = (header::CONTENT_TYPE, "text/plain; version=0.0.4");
                ([text], metrics.render()).into_response()
            }),
        );

    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    let draining = locks.clone();
    axum::serve(listener, app)
        .with_graceful_shutdown(async move {
            // Without a handler for the signal, nothing ends the service but a kill.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::spawn(async move { draining.drain(GRACE).await });
        })
        .await?;
    locks.drain(GRACE).await;
    Ok(())
}
