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
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey,
    error::{BoxError, InvalidKey},
    middleware::{ProblemDetails, key::extracted},
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
fn both_accounts(
    Query(Transfer { from, to, .. }): Query<Transfer>,
) -> Result<[LockKey; 2], InvalidKey> {
    Ok([account_key(from)?, account_key(to)?])
}

async fn transfer(
    State(accounts): State<Accounts>,
    Query(Transfer { from, to, amount }): Query<Transfer>,
    locks: HeldLock,
) -> Result<&'static str, Refused> {
    let (payer, payee) = (token_of(&locks, from), token_of(&locks, to));
    let rich = accounts.read(from, payer)?;
    let poor = accounts.read(to, payee)?;
    if rich < amount {
        return Err(Refused::NotEnoughMoney);
    }
    if from == to {
        return Ok("done\n");
    }
    // A query, a call to another service. Nobody else changes these two accounts meanwhile.
    tokio::time::sleep(Duration::from_millis(2)).await;
    accounts.write([(from, rich - amount, payer), (to, poor + amount, payee)])?;
    Ok("done\n")
}

/// Each lock has a fencing token of its own.
fn token_of(locks: &HeldLock, id: u64) -> u64 {
    let key = account_key(id).ok();
    let lock = locks.each().find(|lock| key == Some(lock.key()));
    lock.and_then(|lock| lock.fencing_token()).unwrap_or(0)
}

#[derive(Debug, PartialEq)]
enum Refused {
    UnknownAccount,
    NotEnoughMoney,
    /// A later holder of the lock has been here, so this one has lost it.
    TooLate,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self::UnknownAccount => (StatusCode::NOT_FOUND, "no such account\n"),
            Self::NotEnoughMoney => (StatusCode::CONFLICT, "not enough money\n"),
            Self::TooLate => (StatusCode::CONFLICT, "another transfer came first\n"),
        }
        .into_response()
    }
}

/// Stands for the database. `examples/fenced_sqlite` has one.
#[derive(Clone)]
struct Accounts {
    rows: Arc<Mutex<BTreeMap<u64, Row>>>,
}

struct Row {
    balance: u64,
    /// The greatest fencing token of those who read or wrote here.
    fence: u64,
}

impl Accounts {
    fn new() -> Self {
        let row = |id| {
            let (balance, fence) = (100, 0);
            (id, Row { balance, fence })
        };
        let rows = (1..=5).map(row).collect();
        Self {
            rows: Arc::new(Mutex::new(rows)),
        }
    }

    /// The balance. Leaves the token, so that no earlier holder can change what is read here: left by
    /// the write alone, it would be too late for one that comes in between.
    fn read(&self, id: u64, token: u64) -> Result<u64, Refused> {
        let mut rows = self.rows.lock().unwrap();
        let row = rows.get_mut(&id).ok_or(Refused::UnknownAccount)?;
        row.admit(token)?;
        row.fence = token;
        Ok(row.balance)
    }

    /// One transaction: both are written, or none if a later holder has been at one of them.
    fn write(&self, changes: [(u64, u64, u64); 2]) -> Result<(), Refused> {
        let mut rows = self.rows.lock().unwrap();
        for (id, _, token) in changes {
            rows.get(&id).ok_or(Refused::UnknownAccount)?.admit(token)?;
        }
        rows.extend(changes.map(|(id, balance, fence)| (id, Row { balance, fence })));
        Ok(())
    }
}

impl Row {
    fn admit(&self, token: u64) -> Result<(), Refused> {
        match self.fence <= token {
            true => Ok(()),
            false => Err(Refused::TooLate),
        }
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
    let both_locked = DistributedLockLayer::new(locks.clone(), extracted(both_accounts))
        .on_reject(ProblemDetails::new());
    let app = Router::new()
        .route("/transfer", post(transfer).route_layer(both_locked))
        .route("/accounts", get(balances))
        .with_state(Accounts::new());

    let address = env::var("ADDRESS").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    // `examples/graceful_shutdown.rs` has what a service does at its end.
    axum::serve(listener, app).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_later_holder_has_read_no_earlier_one_can_change() {
        let accounts = Accounts::new();
        let [early, late] = [7, 8];
        assert_eq!(accounts.read(1, early), Ok(100));
        assert_eq!(accounts.read(1, late), Ok(100));
        // It stood still since, and does not know that its lock is over.
        let written = accounts.write([(2, 110, early), (1, 90, early)]);
        assert_eq!(written, Err(Refused::TooLate));
        assert_eq!(accounts.read(1, early), Err(Refused::TooLate));
        assert_eq!(
            accounts.read(2, late),
            Ok(100),
            "none of the two was written"
        );
        assert_eq!(accounts.write([(2, 140, late), (1, 60, late)]), Ok(()));
        assert_eq!(accounts.read(1, late), Ok(60));
        assert_eq!(accounts.read(2, early), Err(Refused::TooLate));
    }
}
