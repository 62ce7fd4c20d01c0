//! A Redis Cluster: which node has which slot, and a call's way to it.
//!
//! There is one [`Connection`] for each node, as for a single server, so what holds of commands and
//! connections there holds here. A call goes to the node that has its lock's slot, as far as is
//! known; a node that does not have it says who has (`MOVED`), or who will have it and has part of it
//! already (`ASK`). Nothing depends on what is known here being right: the nodes check it.
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

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use redis::{Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    connection::Connection,
    connector::{Connector, Server},
    durability::Replicas,
    error::{connect_error, unexpected},
    sentinel::at,
    slot::{Counters, SLOTS, slot},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::LockName,
};

/// How often a call follows a redirection: more often means that the nodes do not agree.
const HOPS: u32 = 8;

/// For how long a call comes back to a cluster that is being changed.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long it waits before it comes back, at first; then longer.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Where a node is: host and port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Address(pub(super) String, pub(super) u16);

/// Which node has which slot.
#[derive(Clone, Debug)]
pub(super) struct Map {
    /// Nodes that have slots.
    pub(super) masters: Vec<Address>,
    /// By slot, which of them; none if the number is too high.
    owners: Vec<u16>,
    /// Grows with each look at the cluster.
    pub(super) version: u64,
}

impl Map {
    /// `owners`: by slot.
    pub(super) fn new(owners: &[Option<&Address>], version: u64) -> Self {
        let mut masters: Vec<Address> = Vec::new();
        let number = |owner: &Option<&Address>| {
            let Some(owner) = *owner else {
                return u16::MAX;
            };
            let known = masters.iter().position(|master| master == owner);
            let number = known.unwrap_or_else(|| {
                masters.push(owner.clone());
                masters.len() - 1
            });
            number as u16
        };
        let owners = owners.iter().map(number).collect();
        Self {
            masters,
            owners,
            version,
        }
    }

    pub(super) fn owner_of(&self, name: &LockName) -> Option<&Address> {
        self.owner(slot(name.as_str()))
    }

    fn owner(&self, slot: u16) -> Option<&Address> {
        let owner = *self.owners.get(usize::from(slot))?;
        self.masters.get(usize::from(owner))
    }
}

/// What became of a look at the cluster, when it has come to its end.
type Looked = Option<Result<(), StorageError>>;

/// What the user wants of the connections to the nodes.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) connect_timeout: Duration,
    pub(super) probe: bool,
    pub(super) replicas: Option<Replicas>,
}

/// A cluster.
pub(super) struct Cluster {
    /// How to connect to a node, up to its address.
    template: ConnectionInfo,
    setup: Setup,
    /// The nodes that the user named.
    seeds: Vec<Address>,
    nodes: RwLock<HashMap<Address, Arc<Connection>>>,
    counters: Arc<Counters>,
    map: watch::Sender<Arc<Map>>,
    /// That the map is to be made anew before it is used.
    is_stale: AtomicBool,
    /// The look at the cluster that is under way, if one is.
    looking: Mutex<Option<watch::Receiver<Looked>>>,
}

impl Cluster {
    /// Does not connect yet.
    pub(super) fn new(
        seeds: &[ConnectionInfo],
        template: ConnectionInfo,
        setup: Setup,
    ) -> Result<Self, StorageError> {
        let seeds = seeds.iter().map(|seed| match seed.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                Ok(Address(host.clone(), *port))
            }
            _ => Err(StorageError::with_source(
                StorageErrorKind::Rejected,
                "a node of a cluster has a host and a port",
            )),
        });
        let map = Map::new(&[None; SLOTS], 0);
        Ok(Self {
            template,
            setup,
            seeds: seeds.collect::<Result<_, _>>()?,
            nodes: RwLock::default(),
            counters: Arc::default(),
            map: watch::Sender::new(Arc::new(map)),
            is_stale: AtomicBool::new(true),
            looking: Mutex::default(),
        })
    }

    /// Which node has which slot, as it changes.
    pub(super) fn map(&self) -> watch::Receiver<Arc<Map>> {
        self.map.subscribe()
    }

    fn present_map(&self) -> Arc<Map> {
        Arc::clone(&self.map.borrow())
    }

    /// The connection to a node, not made yet if there is none.
    pub(super) fn node(&self, address: &Address) -> Result<Arc<Connection>, StorageError> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = nodes.get(address) {
            return Ok(Arc::clone(node));
        }
        drop(nodes);
        let Address(host, port) = address.clone();
        let address_of_node = at(self.template.addr(), host, port);
        let server =
            Server::new(&self.template.clone().set_addr(address_of_node)).map_err(connect_error)?;
        let Setup {
            connect_timeout,
            probe,
            replicas,
        } = self.setup;
        let connector =
            Connector::to_node(server, connect_timeout, &self.counters).with_probe(probe);
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let node = nodes
            .entry(address.clone())
            .or_insert_with(|| Arc::new(Connection::new(connector, replicas)));
        Ok(Arc::clone(node))
    }

    /// Looks which node has which slot, unless that was done since the map had this version.
    ///
    /// Many may want that at the same time. A task does it for all of them, which goes on whoever of
    /// them stops polling.
    pub(super) async fn look(self: &Arc<Self>, version: u64) -> Result<(), StorageError> {
        let mut looking = {
            let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
            if self.present_map().version != version {
                return Ok(());
            }
            match &*looking {
                // An error: the runtime of the task has ended.
                Some(looking) if looking.has_changed().is_ok() => looking.clone(),
                _ => {
                    let (done, under_way) = watch::channel(None);
                    *looking = Some(under_way.clone());
                    let cluster = Arc::clone(self);
                    tokio::spawn(async move {
                        let result = cluster.look_now().await;
                        let mut looking = cluster
                            .looking
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner);
                        *looking = None;
                        done.send_replace(Some(result));
                    });
                    under_way
                }
            }
        };
        let looked = looking.wait_for(Option::is_some).await;
        match looked.as_deref() {
            Ok(Some(result)) => result.clone(),
            _ => Err(StorageError::new(StorageErrorKind::Unavailable)),
        }
    }

    async fn look_now(&self) -> Result<(), StorageError> {
        let present = self.present_map();
        let mut asked = HashSet::new();
        let nodes = present.masters.iter().chain(&self.seeds);
        let nodes = nodes.filter(|address| asked.insert(*address));
        let mut answering: FuturesUnordered<_> = nodes
            .map(|address| async move {
                let answer = timeout(self.setup.connect_timeout, self.ask(address)).await;
                answer.unwrap_or_else(|_| Err(StorageError::new(StorageErrorKind::Unavailable)))
            })
            .collect();
        let enough = answering.len() / 2 + 1;
        let mut answers = Vec::new();
        let mut failed = None;
        while let Some(answer) = answering.next().await {
            match answer {
                Ok(answer) => answers.push(answer),
                // One that cannot be reached now may know what the others do not.
                Err(error) if !error.kind().is_transient() => failed = failed.or(Some(error)),
                Err(error) => failed = Some(error),
            }
            if answers.len() == enough {
                break;
            }
        }
        if answers.is_empty() {
            return Err(failed.unwrap_or_else(unexpected));
        }
        // One node that was cut off does not know better than the others.
        let map = most(&answers, present.version + 1);
        let keep: HashSet<_> = map.masters.iter().chain(&self.seeds).collect();
        self.nodes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|address, _| keep.contains(address));
        self.is_stale.store(false, Relaxed);
        self.map.send_replace(Arc::new(map));
        Ok(())
    }

    async fn ask(&self, address: &Address) -> Result<Vec<Range>, StorageError> {
        let node = self.node(address)?;
        let mut command = Cmd::new();
        command.arg("CLUSTER").arg("SLOTS");
        let reply = node.on_wire(|wire| wire.run([command])).await?;
        match reply.await? {
            Value::Array(ranges) => {
                let ranges: Option<Vec<_>> = ranges.iter().map(|one| range(one, address)).collect();
                ranges.ok_or_else(unexpected)
            }
            _ => Err(unexpected()),
        }
    }

    /// A node said that the slot is elsewhere.
    fn moved(&self, slot: u16, to: &Address) {
        self.map.send_if_modified(|map| {
            match map.masters.iter().position(|master| master == to) {
                Some(owner) => {
                    if let Some(known) = Arc::make_mut(map).owners.get_mut(usize::from(slot)) {
                        *known = owner as u16;
                    }
                }
                // A node that is new, or was a replica until now: more has changed than this slot.
                None => self.is_stale.store(true, Relaxed),
            }
            // The masters are the same.
            false
        });
    }

    pub(super) fn way(self: &Arc<Self>, name: &LockName) -> Way<'_> {
        Way {
            cluster: self,
            slot: slot(name.as_str()),
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

    /// Connects, to see whether it is one.
    pub(super) async fn connect(self: &Arc<Self>) -> Result<(), StorageError> {
        self.look(self.present_map().version).await
    }
}

/// Some slots and the node that has them.
struct Range {
    first: u16,
    last: u16,
    owner: Address,
}

/// One element of the answer to `CLUSTER SLOTS`: the first slot, the last, the master, its replicas.
fn range(value: &Value, asked: &Address) -> Option<Range> {
    let Value::Array(parts) = value else {
        return None;
    };
    let number = |value: &Value| match value {
        Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    };
    let [first, last, Value::Array(master), ..] = &parts[..] else {
        return None;
    };
    let host = match master.first()? {
        Value::BulkString(host) if !host.is_empty() => String::from_utf8(host.clone()).ok()?,
        // The one that was asked.
        _ => asked.0.clone(),
    };
    Some(Range {
        first: number(first)?,
        last: number(last)?,
        owner: Address(host, number(master.get(1)?)?),
    })
}

/// What most of the answers say.
fn most(answers: &[Vec<Range>], version: u64) -> Map {
    let mut masters: Vec<Address> = Vec::new();
    // By slot: whom the answers name, and how often.
    let mut votes: Vec<Vec<(u16, usize)>> = vec![Vec::new(); SLOTS];
    for range in answers.iter().flatten() {
        let known = masters.iter().position(|master| *master == range.owner);
        let owner = known.unwrap_or_else(|| {
            masters.push(range.owner.clone());
            masters.len() - 1
        }) as u16;
        let slots = usize::from(range.first)..=usize::from(range.last);
        for votes in votes.get_mut(slots).into_iter().flatten() {
            match votes.iter_mut().find(|(voted, _)| *voted == owner) {
                Some((_, count)) => *count += 1,
                None => votes.push((owner, 1)),
            }
        }
    }
    let owners: Vec<_> = votes
        .iter()
        .map(|votes| {
            let most = votes.iter().max_by_key(|(_, count)| *count);
            most.map(|(owner, _)| &masters[usize::from(*owner)])
        })
        .collect();
    Map::new(&owners, version)
}

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

impl Way<'_> {
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
            let node = self.cluster.node(address)?;
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
        if self.cluster.is_stale.load(Relaxed) {
            let version = self.cluster.present_map().version;
            self.cluster.look(version).await?;
        }
        let map = self.cluster.present_map();
        match map.owner(self.slot) {
            Some(owner) => Ok((owner.clone(), map.version)),
            None => {
                self.cluster.is_stale.store(true, Relaxed);
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
                self.cluster.is_stale.store(true, Relaxed);
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
            Refusal::Moved(_) | Refusal::Ask(_) => self.cluster.is_stale.store(true, Relaxed),
            Refusal::NotNow { look } => {
                if look {
                    self.cluster.is_stale.store(true, Relaxed);
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
            self.cluster.is_stale.store(true, Relaxed);
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

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("masters", &self.present_map().masters.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address("host".to_owned(), port)
    }

    fn view(ranges: &[(u16, u16, u16)]) -> Vec<Range> {
        let range = |&(first, last, port)| Range {
            first,
            last,
            owner: address(port),
        };
        ranges.iter().map(range).collect()
    }

    #[test]
    fn most_nodes_say_whose_a_slot_is_and_nobody_else_counts_as_a_master() {
        let old = view(&[(0, 99, 1), (100, 16_382, 2)]);
        let new = || view(&[(0, 99, 3), (100, 16_382, 2)]);
        let map = most(&[old, new(), new()], 7);
        assert_eq!(map.masters, [address(3), address(2)]);
        assert_eq!(map.owner(0), Some(&address(3)));
        assert_eq!(map.owner(99), Some(&address(3)));
        assert_eq!(map.owner(100), Some(&address(2)));
        assert_eq!(map.owner(16_383), None, "nobody's");
        assert_eq!(map.version, 7);
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
