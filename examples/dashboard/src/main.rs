//! Orders that are paid one request at a time, and a page that shows who is at it.
//!
//! ```text
//! cargo run --manifest-path examples/dashboard/Cargo.toml
//! ```
//!
//! It says where its dashboard is. Then let some requests wait, and look at it:
//!
//! ```text
//! for order in 41 42 42 42 43; do curl -X POST localhost:3000/orders/$order/pay & done
//! ```
//!
//! Environment variables, none of which has to be set:
//!
//! - `ADDRESS`: where it listens, `127.0.0.1:3000`.
//! - `REDIS_URL`: where locks are kept; in memory without it. With it, start several of these and see
//!   them in each other's dashboard.
//! - `LABEL`: by what name others see this process, `shop-1`.
//! - `PASSWORD`: opens the dashboard. Without it one is made up and printed.
//!
//! For more than a try, serve it over TLS: basic authentication sends the password with each request.

mod login;

use std::{env, time::Duration};

use axum::{Router, extract::Path, routing::post};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockFactoryBuilder, LockKey, LockOptions,
    dashboard::Dashboard,
    error::{BoxError, InvalidKey},
    middleware::key::extracted,
    storage::{LockStorage, MemoryStorage, RedisStorage},
};

use login::Login;

async fn pay(Path(order): Path<u64>) -> String {
    // Stands for a slow bank, so that there is something to see.
    tokio::time::sleep(Duration::from_secs(5)).await;
    format!("order {order} is paid\n")
}

fn order_key(Path(order): Path<u64>) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["orders", &order.to_string()])
}

fn app(locks: &LockFactory, login: Login) -> Result<Router, BoxError> {
    let waits_for_a_minute = LockOptions::builder().retries(60).build()?;
    let one_payment_at_a_time =
        DistributedLockLayer::new(locks.clone(), extracted(order_key)).options(waits_for_a_minute);

    // The login goes around all of the dashboard before it becomes a part of the service.
    let dashboard: Router = Dashboard::new(locks.inspector())
        .allow_release()
        .router()
        .layer(axum::middleware::from_fn_with_state(login, login::demand));

    Ok(Router::new()
        .route(
            "/orders/{id}/pay",
            post(pay).route_layer(one_payment_at_a_time),
        )
        .nest_service("/admin/locks", dashboard))
}

fn locks<S: LockStorage>(builder: LockFactoryBuilder<S>) -> Result<LockFactory, BoxError> {
    let label = env::var("LABEL").unwrap_or_else(|_| "shop-1".into());
    Ok(builder.label(label).build()?)
}

/// How long handlers may go on once the service is told to end.
const GRACE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    tracing_subscriber::fmt().init();
    let locks = match env::var("REDIS_URL") {
        Ok(url) => locks(LockFactory::builder(RedisStorage::connect(url).await?))?,
        Err(_) => locks(LockFactory::builder(MemoryStorage::new()))?,
    };
    let (login, shown) = match env::var("PASSWORD") {
        Ok(password) => (Login::new(password), "PASSWORD".into()),
        Err(_) => Login::made_up()?,
    };
    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tracing::info!("dashboard: http://{address}/admin/locks, password: {shown}");

    let draining = locks.clone();
    axum::serve(listener, app(&locks, login)?)
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
