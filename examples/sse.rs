//! A service to copy from: whoever has a document's event stream open is its only writer.
//!
//! ```text
//! cargo run --example sse                                  # locks in memory: one replica
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example sse # locks in Redis: any number
//!
//! curl -N localhost:3000/documents/42/write
//! ```
//!
//! Send the `curl` twice at the same time: the second is told that the document is locked, until the
//! stream of the first has ended or its client has gone. Delete the lock in Redis meanwhile, and the
//! stream is cut off: nothing is written without the lock.

use std::{env, io, time::Duration};

use axum::{
    Router,
    extract::Path,
    response::sse::{Event, KeepAlive, Sse},
    routing::get,
};
use futures_util::{Stream, stream};
use tokio::{net::TcpListener, time::sleep};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, InvalidKey},
    middleware::key::extracted,
    storage::{MemoryStorage, RedisStorage},
};

/// Writes the document, and tells of each chapter. It does so while the client reads the stream:
/// each step is under the lock.
async fn write(
    Path(document): Path<u64>,
    lock: HeldLock,
) -> Sse<impl Stream<Item = Result<Event, io::Error>>> {
    let chapters = stream::try_unfold(1, move |chapter| {
        let lock = lock.clone();
        async move {
            if chapter > 5 {
                return Ok(None);
            }
            save(document, chapter, &lock).await?;
            let event = Event::default()
                .event("saved")
                .data(format!("document {document}, chapter {chapter}"));
            Ok(Some((event, chapter + 1)))
        }
    });
    Sse::new(chapters).keep_alive(KeepAlive::default())
}

/// Stands for the database. It would compare the fencing token with that of the last writer.
async fn save(document: u64, chapter: u32, lock: &HeldLock) -> io::Result<()> {
    sleep(Duration::from_millis(200)).await;
    let token = lock.fencing_token();
    tracing::info!(document, chapter, token, "saved");
    Ok(())
}

/// `/documents/42/write` locks document 42, however the client spells it.
fn document_key(Path(document): Path<u64>) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["documents", &document.to_string()])
}

fn app(locks: &LockFactory) -> Result<Router, BoxError> {
    // Who comes second does not wait. A stream that is still open after an hour is cut off.
    let options = LockOptions::builder()
        .retries(0)
        .max_hold(Duration::from_secs(3600))
        .build()?;
    let one_writer = DistributedLockLayer::new(locks.clone(), extracted(document_key))
        .options(options)
        .hold_to_body_end();

    Ok(Router::new().route("/documents/{id}/write", get(write).route_layer(one_writer)))
}

/// How long streams may go on once the service is told to end.
const GRACE: Duration = Duration::from_secs(2);

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
            // Without a handler for the signal, nothing ends the service but a kill.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            // The server ends when its last stream has. Those that go on after the grace lose their
            // locks and are cut off.
            tokio::spawn(async move { draining.drain(GRACE).await });
        })
        .await?;
    let left = locks.drain(GRACE).await;
    tracing::info!(left, "locks given back");
    Ok(())
}
