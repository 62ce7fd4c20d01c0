//! Grants that count only when replicas have them.
//!
//! A lock is taken over the connection that all share, as ever, so that nothing overtakes anything.
//! Then it is confirmed over another: the lock is renewed there, if it is still ours, and `WAIT`
//! tells how many replicas have that write, and with it all that came before. `WAIT` blocks its
//! connection until they have, and so none that others use.
//!
//! A grant that is not confirmed in time is an error that leaves the outcome open, which is what
//! it is: the next attempt asks with the same token, meets the lock that is its own, and confirms
//! it; if the caller gives up, the lock is given back.
//!
//! Renewals are not confirmed. A replica that takes over has the lock for as long as the last
//! renewal that it heard of says, and the holder's next renewal goes to it.

use std::time::Duration;

use bb8_redis::bb8::Pool;
use redis::{Cmd, Value};

use super::{
    calls::millis,
    connector::Connector,
    error::unexpected,
    pool::{Failures, pool},
    script::RENEW,
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::AcquireRequest,
};

/// How many grants are confirmed at the same time, at most.
const CONNECTIONS: u32 = 16;

/// How many replicas have to have a grant, and how long they have for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replicas {
    pub(super) count: u32,
    pub(super) timeout: Duration,
}

/// The confirmations of one server's grants.
pub(super) struct Durability {
    replicas: Replicas,
    connections: Pool<Connector>,
    failures: Failures,
}

impl Durability {
    pub(super) fn new(replicas: Replicas, connector: &Connector) -> Self {
        let failures = Failures::default();
        Self {
            replicas,
            // Without the probe: the shared connection has done it.
            connections: pool(&connector.clone().with_probe(false), &failures, CONNECTIONS),
            failures,
        }
    }

    /// Returns when the lock, which the request's token has, is known to so many replicas. `run`: that
    /// of the server which gave it.
    pub(super) async fn confirm(
        &self,
        request: &AcquireRequest,
        run: Option<u128>,
    ) -> Result<(), StorageError> {
        let failed = self.failures.happened();
        tokio::pin!(failed);
        // Before the pool is asked, so that a failure on this account is not missed.
        failed.as_mut().enable();
        let wire = tokio::select! {
            biased;
            got = self.connections.get() => got.map_err(|_| self.failures.last())?,
            () = failed => return Err(self.failures.last()),
        };
        if wire.server_run() != run {
            // Another has taken its place, or that one's.
            wire.leave();
            return Err(unconfirmed("the server has been replaced meanwhile"));
        }
        let token = request.token.text();
        let arguments = |command: &mut Cmd| {
            command.arg(&*token).arg(millis(request.ttl));
        };
        let mut wait = redis::cmd("WAIT");
        wait.arg(self.replicas.count)
            .arg(millis(self.replicas.timeout));
        let replies = RENEW.run_and(&wire, &request.name, arguments, wait);
        match replies.await? {
            (Value::Int(0), _) => Err(unconfirmed("the lock is gone again")),
            (Value::Int(_), Value::Int(heard)) if heard >= i64::from(self.replicas.count) => Ok(()),
            (Value::Int(_), Value::Int(_)) => Err(unconfirmed(
                "not enough replicas have heard of the lock in time",
            )),
            _ => Err(unexpected()),
        }
    }
}

fn unconfirmed(text: &'static str) -> StorageError {
    StorageError::with_source(StorageErrorKind::Unavailable, text)
}
