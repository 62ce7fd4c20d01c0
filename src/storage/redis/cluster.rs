//! A Redis Cluster: its nodes, and what is known of them.
//!
//! There is one [`Connection`] for each node, as for a single server, so what holds of commands and
//! connections there holds here. A call goes to the node that has its lock's slot, as far as is
//! known (`cluster_way.rs`); a node that does not have it says who has (`MOVED`), or who will have it
//! and has part of it already (`ASK`). Nothing depends on what is known here being right: the nodes
//! check it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use redis::{Cmd, ConnectionAddr, Value};
use tokio::{sync::watch, time::timeout};

use super::{
    address::Endpoint,
    cluster_map::{Address, Map, Range, most, range},
    cluster_way::Way,
    connection::Connection,
    connector::{Connector, Server},
    durability::Replicas,
    error::unexpected,
    slot::{Counters, SLOTS, slot},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::LockName,
};

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
    template: Endpoint,
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
        seeds: &[Endpoint],
        template: Endpoint,
        setup: Setup,
    ) -> Result<Self, StorageError> {
        let seeds = seeds.iter().map(|seed| match seed.info.addr() {
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

    pub(super) fn present_map(&self) -> Arc<Map> {
        Arc::clone(&self.map.borrow())
    }

    /// The connection to a node, not made yet if there is none.
    pub(super) fn node(&self, address: &Address) -> Arc<Connection> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = nodes.get(address) {
            return Arc::clone(node);
        }
        drop(nodes);
        let Address(host, port) = address.clone();
        let server = Server::new(self.template.at(host, port));
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
        Arc::clone(node)
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
        let node = self.node(address);
        let mut command = Cmd::new();
        command.arg("CLUSTER").arg("SLOTS");
        let called = node.call(|wire| Some(wire.send([command]))).await?;
        match called.ok_or_else(unexpected)?.0? {
            Value::Array(ranges) => {
                let ranges: Option<Vec<_>> = ranges.iter().map(|one| range(one, address)).collect();
                ranges.ok_or_else(unexpected)
            }
            _ => Err(unexpected()),
        }
    }

    /// A node said that the slot is elsewhere.
    pub(super) fn moved(&self, slot: u16, to: &Address) {
        self.map.send_if_modified(|map| {
            match map.number_of(to) {
                Some(owner) => Arc::make_mut(map).give(slot, owner),
                // A node that is new, or was a replica until now: more has changed than this slot.
                None => self.doubt(),
            }
            // The masters are the same.
            false
        });
    }

    /// The nodes that have slots.
    pub(super) async fn masters(self: &Arc<Self>) -> Result<Vec<Arc<Connection>>, StorageError> {
        if self.is_stale() {
            self.look(self.present_map().version).await?;
        }
        let map = self.present_map();
        Ok(map.masters.iter().map(|master| self.node(master)).collect())
    }

    /// Whether the map is to be made anew before it is used.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Relaxed)
    }

    /// The map is to be made anew before it is used.
    pub(super) fn doubt(&self) {
        self.is_stale.store(true, Relaxed);
    }

    pub(super) fn way(self: &Arc<Self>, name: &LockName) -> Way<'_> {
        Way::new(self, slot(name.as_str()))
    }

    /// Connects, to see whether it is one.
    pub(super) async fn connect(self: &Arc<Self>) -> Result<(), StorageError> {
        self.look(self.present_map().version).await
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("masters", &self.present_map().masters.len())
            .finish_non_exhaustive()
    }
}
