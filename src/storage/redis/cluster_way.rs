//! A call's way to the node of a cluster that has its lock.
//!
//! # What is sent again
//!
//! After a redirection, `TRYAGAIN` or `CLUSTERDOWN` a command was not carried out, and the call
//! starts anew elsewhere or a little later. After anything else it ends with its error; whoever made
//! it asks again with the same token. So no command is sent twice on one call's account, but for one
//! case: of a call's several commands (`SET`, then a script) the first may have been carried out when
//! a later one is redirected. Then `SET NX` finds the lock taken, and the script, which comes after
//! it, sees by the token that it is our own. The scripts may be repeated for the same reason: taking
//! a lock that has our token takes it again with new fencing tokens, standing in the queue looks for
//! our token first, and renewing or releasing what is not ours changes nothing.

use std::{sync::Arc, time::Duration};

use redis::{ErrorKind, RedisError, ServerErrorKind};
use tokio::time::{Instant, sleep};

use super::{cluster::Cluster, cluster_map::Address, connection::Connection};
use crate::error::{StorageError, StorageErrorKind};

/// How often a call follows a redirection: more often means that the nodes do not agree.
const HOPS: u32 = 8;

/// For how long a call comes back to a cluster that is being changed.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long it waits before it comes back, at first; then longer.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A call's way to the node that has its lock.
pub(super) struct Way<'a> {
    cluster: &'a Arc<Cluster>,
    slot: u16,
    /// Where the last try went.
    tried: Option<Address>,
    /// Who had the slot then, as far as was known.
    known: Option<Address>,
    /// It went there though the slot is not there yet.
    has_asked: bool,
    /// Who was named as having part of the slot already.
    ask: Option<Address>,
    /// Who was named as having the slot.
    moved: Option<Address>,
    hops: u32,
    failing_since: Option<Instant>,
    pause: Duration,
    /// That a command is on its way.
    is_open: bool,
}

impl<'a> Way<'a> {
    pub(super) fn new(cluster: &'a Arc<Cluster>, slot: u16) -> Self {
        Self {
            cluster,
            slot,
            tried: None,
            known: None,
            has_asked: false,
            ask: None,
            moved: None,
            hops: 0,
            failing_since: None,
            pause: FIRST_PAUSE,
            is_open: false,
        }
    }

    /// The connection over which to try next, and whether its node has to be asked for a slot that
    /// is on its way there.
    pub(super) async fn node(&mut self) -> Result<(Arc<Connection>, bool), StorageError> {
        loop {
            let (owner, version) = self.owner().await?;
            let asking = self.ask.take();
            let address = asking.as_ref().unwrap_or(&owner);
            self.tried = Some(address.clone());
            self.known = self.cluster.present_map().owner(self.slot).cloned();
            self.has_asked = asking.is_some();
            let node = self.cluster.node(address);
            self.is_open = true;
            let error = match node.connect().await {
                Ok(()) => return Ok((node, self.has_asked)),
                Err(error) => error,
            };
            self.is_open = false;
            // Nothing was sent. Perhaps another has its slots by now.
            self.hops += 1;
            let looked = self.cluster.look(version).await;
            let other = self.cluster.present_map().owner(self.slot) != Some(address);
            if looked.is_err() || !other || self.hops > HOPS {
                return Err(error);
            }
        }
    }

    async fn owner(&mut self) -> Result<(Address, u64), StorageError> {
        if let Some(moved) = self.moved.take() {
            return Ok((moved, self.cluster.present_map().version));
        }
        if self.cluster.is_stale() {
            let version = self.cluster.present_map().version;
            self.cluster.look(version).await?;
        }
        let map = self.cluster.present_map();
        match map.owner(self.slot) {
            Some(owner) => Ok((owner.clone(), map.version)),
            None => {
                self.cluster.doubt();
                let text = "no node has the lock's slot";
                Err(StorageError::with_source(
                    StorageErrorKind::Unavailable,
                    text,
                ))
            }
        }
    }

    /// Whether another node has the slot by now, as far as is known.
    pub(super) fn has_changed(&self) -> bool {
        let map = self.cluster.present_map();
        let owner = map.owner(self.slot);
        !self.has_asked && owner != self.tried.as_ref() && owner != self.known.as_ref()
    }

    /// What became of the try. `None`: try again.
    pub(super) async fn after<T>(
        &mut self,
        result: Result<T, StorageError>,
    ) -> Option<Result<T, StorageError>> {
        self.is_open = false;
        let error = match result {
            Ok(value) => return Some(Ok(value)),
            Err(error) => error,
        };
        let cause = error.cause().and_then(|cause| cause.downcast_ref());
        let tried = self.tried.as_ref();
        let Some(cause) = cause.and_then(|cause| refusal(cause, tried)) else {
            if error.kind().is_transient() {
                self.cluster.doubt();
            }
            return Some(Err(error));
        };
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        self.hops += 1;
        match cause {
            _ if since.elapsed() >= PATIENCE => {}
            Refusal::Moved(to) if self.hops <= HOPS => {
                self.cluster.moved(self.slot, &to);
                self.moved = Some(to);
                return None;
            }
            Refusal::Ask(to) if self.hops <= HOPS => {
                self.ask = Some(to);
                return None;
            }
            Refusal::Moved(_) | Refusal::Ask(_) => self.cluster.doubt(),
            Refusal::NotNow { look } => {
                if look {
                    self.cluster.doubt();
                }
                self.hops = 0;
                sleep(self.pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                return None;
            }
        }
        // In a cluster, all of these heal.
        Some(Err(match error.kind() {
            kind if kind.is_transient() => error,
            _ => StorageError::with_source(StorageErrorKind::Unavailable, error),
        }))
    }
}

impl Drop for Way<'_> {
    fn drop(&mut self) {
        // Given up, perhaps for a node that stands still.
        if self.is_open {
            self.cluster.doubt();
        }
    }
}

/// That a node did not carry out a command, and what to do about it.
enum Refusal {
    Moved(Address),
    Ask(Address),
    /// Come back later, and if so with a look at the map.
    NotNow {
        look: bool,
    },
}

fn refusal(error: &RedisError, tried: Option<&Address>) -> Option<Refusal> {
    let ErrorKind::Server(kind) = error.kind() else {
        return None;
    };
    let named = || {
        let (address, _) = error.redirect_node()?;
        let (host, port) = address.rsplit_once(':')?;
        let host = match host {
            // The same as that of the node that says it.
            "" => tried?.0.clone(),
            host => host.to_owned(),
        };
        Some(Address(host, port.parse().ok()?))
    };
    match kind {
        ServerErrorKind::Moved => named().map(Refusal::Moved),
        ServerErrorKind::Ask => named().map(Refusal::Ask),
        ServerErrorKind::TryAgain => Some(Refusal::NotNow { look: false }),
        ServerErrorKind::ClusterDown
        | ServerErrorKind::BusyLoading
        | ServerErrorKind::MasterDown => Some(Refusal::NotNow { look: true }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address("host".to_owned(), port)
    }

    #[test]
    fn a_redirection_without_a_host_leads_to_the_host_that_sent_it() {
        let tried = address(1);
        for (text, expected) in [
            ("3999 10.0.0.1:6381", Address("10.0.0.1".to_owned(), 6381)),
            ("3999 :6381", address(6381)),
            ("3999 ::1:6381", Address("::1".to_owned(), 6381)),
        ] {
            let kind = ErrorKind::Server(ServerErrorKind::Moved);
            let error = RedisError::from((kind, "An error was signalled", text.to_owned()));
            let Some(Refusal::Moved(to)) = refusal(&error, Some(&tried)) else {
                panic!("{text}");
            };
            assert_eq!(to, expected);
        }
    }
}
