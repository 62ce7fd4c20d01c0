//! Money from one account to another: a request that needs two locks, all or none.
//!
//! ```text
//! cargo run --example transfer                                  # locks in memory: one replica
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --example transfer # locks in Redis: any number
//!
//! curl -X POST 'localhost:3000/transfer?from=1&to=2&amount=10'
//! curl localhost:3000/accounts
//! ```
//!
//! Two transfers in opposite directions do not wait for each other in a circle: the layer takes the
//! locks in the order of their keys, whatever the order in the request. Transfers that have no
//! account in common run at the same time.

#![allow(clippy::unwrap_used, reason = "a poisoned mutex should end an example")]
#![allow(clippy::print_stdout, reason = "it is there to be watched")]

use std::{
    collections::BTreeMap,
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Query, Request, State},
    http::StatusCode,
    routing::{get, post},
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey,
    error::{BoxError, InvalidKey},
    middleware::ProblemDetails,
    storage::{MemoryStorage, RedisStorage},
};

#[derive(Clone, Copy, Deserialize)]
struct Transfer {
    from: u64,
    to: u64,
    amount: u64,
}

fn account_key(id: u64) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["accounts", &id.to_string()])
}

/// Both accounts, parsed as the handler does it. From an account to itself, it is one lock.
fn both_accounts(request: &Request) -> Result<[LockKey; 2], BoxError> {
    let Query(Transfer { from, to, .. }) = Query::try_from_uri(request.uri())?;
    Ok([account_key(from)?, account_key(to)?])
}

async fn transfer(
    State(accounts): State<Accounts>,
    Query(Transfer { from, to, amount }): Query<Transfer>,
    locks: HeldLock,
) -> Result<&'static str, (StatusCode, &'static str)> {
    const UNKNOWN: (StatusCode, &str) = (StatusCode::NOT_FOUND, "no such account\n");
    const TOO_LATE: (StatusCode, &str) = (StatusCode::CONFLICT, "another transfer came first\n");

    let rich = accounts.balance(from).ok_or(UNKNOWN)?;
    let poor = accounts.balance(to).ok_or(UNKNOWN)?;
    if rich < amount {
        return Err((StatusCode::CONFLICT, "not enough money\n"));
    }
    if from == to {
        return Ok("done\n");
    }
    // A query, a call to another service. Nobody else changes these two accounts meanwhile.
    tokio::time::sleep(Duration::from_millis(2)).await;
    let changes = [(from, rich - amount), (to, poor + amount)];
    match accounts.write(changes.map(|(id, balance)| (id, balance, token_of(&locks, id)))) {
        true => Ok("done\n"),
        false => Err(TOO_LATE),
    }
}

/// Each lock has a fencing token of its own.
fn token_of(locks: &HeldLock, id: u64) -> u64 {
    let key = account_key(id).ok();
    let is_ours = |lock: &HeldLock| key.as_ref().is_some_and(|key| key.as_str() == lock.key());
    let lock = locks.each().find(is_ours);
    lock.and_then(|lock| lock.fencing_token()).unwrap_or(0)
}

/// Stands for the database.
#[derive(Clone)]
struct Accounts {
    rows: Arc<Mutex<BTreeMap<u64, Row>>>,
}

#[derive(Clone, Copy)]
struct Row {
    balance: u64,
    /// The greatest fencing token of those who wrote here.
    fence: u64,
}

impl Accounts {
    fn balance(&self, id: u64) -> Option<u64> {
        Some(self.rows.lock().unwrap().get(&id)?.balance)
    }

    /// One transaction: both are written, or none if a later holder has been at one of them.
    fn write(&self, changes: [(u64, u64, u64); 2]) -> bool {
        let mut rows = self.rows.lock().unwrap();
        let is_late = |(id, _, token)| rows.get(&id).is_none_or(|row| row.fence >= token);
        if changes.into_iter().any(is_late) {
            return false;
        }
        rows.extend(changes.map(|(id, balance, fence)| (id, Row { balance, fence })));
        true
    }
}

async fn balances(State(accounts): State<Accounts>) -> Json<BTreeMap<u64, u64>> {
    let rows = accounts.rows.lock().unwrap();
    Json(rows.iter().map(|(id, row)| (*id, row.balance)).collect())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let locks = match env::var("REDIS_URL") {
        Ok(url) => LockFactory::new(RedisStorage::connect(url).await?),
        Err(_) => LockFactory::new(MemoryStorage::new()),
    };
    let rich = Row {
        balance: 100,
        fence: 0,
    };
    let accounts = Accounts {
        rows: Arc::new(Mutex::new((1..=5).map(|id| (id, rich)).collect())),
    };
    let both_locked =
        DistributedLockLayer::new(locks.clone(), both_accounts).on_reject(ProblemDetails::new());
    let app = Router::new()
        .route("/transfer", post(transfer).route_layer(both_locked))
        .route("/accounts", get(balances))
        .with_state(accounts);

    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    // `examples/graceful_shutdown.rs` has what a service does at its end.
    axum::serve(listener, app).await?;
    Ok(())
}
