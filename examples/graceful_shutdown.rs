//! A service that is told to end (SIGTERM, Ctrl-C) while requests run and wait: nobody's work is
//! cut off without need, and no lock stays behind for its ttl.
//!
//! ```text
//! cargo run --example graceful_shutdown                                  # locks in memory
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example graceful_shutdown # locks in Redis
//!
//! curl -X POST localhost:3000/reports/7    # takes 2 s: end the service meanwhile
//! ```
//!
//! The order is what matters:
//!
//! 1. The signal comes. The server takes no more connections, and `drain` begins: requests that wait
//!    for a lock are answered with 503 at once, so that another replica can have them.
//! 2. Requests that run have [`GRACE`] to finish. Those that have not lose their lock then: their
//!    handlers are dropped and they are answered with 503.
//! 3. So the server ends, and after it `drain` once more: the last releases are on their way still.
//! 4. Only now the runtime ends. The process exits with 1 if a lock was left behind.

#![allow(clippy::expect_used, reason = "no signal handler, no example")]
#![allow(clippy::print_stdout, reason = "it is there to be watched")]

use std::{env, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::{Path, Request},
    routing::post,
};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey,
    error::{BoxError, InvalidKey},
    middleware::key::extracted,
    storage::{MemoryStorage, RedisStorage},
};

/// How long handlers may go on once the service is told to end. An orchestrator's own limit
/// (`terminationGracePeriodSeconds`, say) has to be some seconds longer.
const GRACE: Duration = Duration::from_secs(5);

/// `POST /reports/7`: two seconds of work under the lock of report 7.
async fn report(Path(id): Path<u64>) -> String {
    println!("report {id}: begun");
    tokio::time::sleep(Duration::from_secs(2)).await;
    format!("report {id} is written\n")
}

fn report_key(Path(report): Path<u64>) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["reports", &report.to_string()])
}

/// What never ends by itself: it is ended.
async fn hang() {
    println!("hang: begun");
    std::future::pending().await
}

fn app(locks: &LockFactory) -> Router {
    let reports = DistributedLockLayer::new(locks.clone(), extracted(report_key));
    let hangs = DistributedLockLayer::new(locks.clone(), |_: &Request| "hang");
    Router::new()
        .route("/reports/{id}", post(report).route_layer(reports))
        .route("/hang", post(hang).route_layer(hangs))
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let locks = match env::var("REDIS_URL") {
        Ok(url) => LockFactory::new(RedisStorage::connect(url).await?),
        Err(_) => LockFactory::new(MemoryStorage::new()),
    };
    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);

    let draining = locks.clone();
    axum::serve(listener, app(&locks))
        .with_graceful_shutdown(async move {
            told_to_end().await;
            println!("ending: requests have {GRACE:?} to finish");
            // Not awaited here: the server stops accepting when this future is over.
            tokio::spawn(async move { draining.drain(GRACE).await });
        })
        .await?;

    let left = locks.drain(GRACE).await;
    println!("ended: {left} locks left behind");
    Ok(ExitCode::from(u8::from(left > 0)))
}

/// What an orchestrator sends, or Ctrl-C.
async fn told_to_end() {
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
