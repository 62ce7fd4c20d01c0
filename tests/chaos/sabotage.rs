//! Storages that break the lock, to show that this is found out.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tower_distributed_lock::{
    error::StorageError,
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockStorage, RedisStorage, ReleaseReply,
        ReleaseRequest, RenewReply, RenewRequest,
    },
};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Renewals are said to have succeeded, and are not sent.
    DeafRenewals,
    /// A release takes the lock from whoever has it.
    BlindReleases,
    /// All holders get the same fencing tokens.
    SameTokens,
    /// The lock is never given back.
    NoReleases,
}

impl Sabotage {
    pub const ALL: [Self; 4] = [
        Self::DeafRenewals,
        Self::BlindReleases,
        Self::SameTokens,
        Self::NoReleases,
    ];

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| format!("{it:?}") == name)
    }
}

/// One Redis server, with that.
pub struct Sabotaged {
    pub storage: RedisStorage,
    pub how: Sabotage,
    pub server: MultiplexedConnection,
}

impl LockStorage for Sabotaged {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let reply = self.storage.acquire(request).await?;
        Ok(match reply {
            AcquireReply::Granted { .. } if self.how == Sabotage::SameTokens => {
                let block = FencingBlock { first: 7, count: 1 };
                AcquireReply::granted().with_fencing(Some(block))
            }
            reply => reply,
        })
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        match self.how {
            Sabotage::DeafRenewals => requests.iter().map(|_| Ok(RenewReply::Renewed)).collect(),
            _ => self.storage.renew(requests).await,
        }
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        match self.how {
            Sabotage::BlindReleases => {
                // Where it is late by a moment, another has the lock.
                tokio::time::sleep(Duration::from_millis(2)).await;
                let reply = self.storage.release(request).await;
                let mut server = self.server.clone();
                let deleting = redis::cmd("DEL").arg(request.name.as_str()).to_owned();
                let _: Result<u64, _> = deleting.query_async(&mut server).await;
                reply
            }
            Sabotage::NoReleases => Ok(ReleaseReply::Released),
            _ => self.storage.release(request).await,
        }
    }

    async fn listen(&self, inbox: Inbox) {
        // Grants that come by messages would pass by what is broken above.
        match self.how {
            Sabotage::SameTokens => drop(inbox),
            _ => self.storage.listen(inbox).await,
        }
    }
}
