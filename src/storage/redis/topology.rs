//! The servers behind a storage: one, which Sentinel may exchange for another, or a cluster.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{
    cluster::Cluster,
    cluster_inbox, cluster_way,
    connection::{Call, Connection},
    fencing::Seen,
    inbox,
    wire::{Fact, Origin, Reply, Wire},
};
use crate::{
    error::StorageError,
    key::LockName,
    storage::{AcquireRequest, Inbox},
};

/// Where the locks are.
#[derive(Debug)]
pub(super) enum Servers {
    One(Box<Connection>),
    Cluster(Arc<Cluster>),
}

impl Servers {
    pub(super) async fn connect(&self) -> Result<(), StorageError> {
        match self {
            Self::One(connection) => connection.connect().await,
            Self::Cluster(cluster) => cluster.connect().await,
        }
    }

    /// Connects, if there is one server for all locks.
    pub(super) async fn connect_to_one(&self) -> Result<(), StorageError> {
        match self {
            Self::One(connection) => connection.connect().await,
            Self::Cluster(_) => Ok(()),
        }
    }

    /// A call's way to the server that has the lock. To be used as a loop: make a try over
    /// [`Way::line`], tell [`Way::after`] what became of it, and try again if it says so.
    pub(super) fn way(&self, name: &LockName) -> Way<'_> {
        match self {
            Self::One(connection) => Way::One(connection),
            Self::Cluster(cluster) => Way::Cluster(Box::new(cluster.way(name))),
        }
    }

    /// A connection to each server that has locks.
    pub(super) async fn lines(&self) -> Result<Vec<Line<'_>>, StorageError> {
        match self {
            Self::One(connection) => Ok(vec![Line::new(Held::Borrowed(connection), false)]),
            Self::Cluster(cluster) => {
                let masters = cluster.masters().await?.into_iter();
                Ok(masters
                    .map(|node| Line::new(Held::Shared(node), false))
                    .collect())
            }
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    pub(super) async fn listen(&self, inbox: Inbox, seen: &Arc<Seen>) {
        match self {
            Self::One(connection) if connection.connector().hears() => {
                // A grant that was made by another process has to be confirmed, too.
                let confirm = connection.is_confirmed();
                let listening = inbox::listen(connection, inbox, seen, confirm);
                tokio::join!(listening, connection.follow());
            }
            Self::One(_) => {}
            Self::Cluster(cluster) => cluster_inbox::listen(cluster, &inbox, seen).await,
        }
    }
}

/// See [`Servers::way`].
pub(super) enum Way<'a> {
    One(&'a Connection),
    Cluster(Box<cluster_way::Way<'a>>),
}

/// A connection, for one try.
pub(super) struct Line<'a> {
    connection: Held<'a>,
    /// For a slot that is on its way to that server.
    asking: bool,
    /// How many there had been when something was sent last.
    replacements: AtomicU64,
}

enum Held<'a> {
    Borrowed(&'a Connection),
    Shared(Arc<Connection>),
}

impl<'a> Line<'a> {
    fn new(connection: Held<'a>, asking: bool) -> Self {
        Self {
            connection,
            asking,
            replacements: AtomicU64::new(0),
        }
    }

    fn connection(&self) -> &Connection {
        match &self.connection {
            Held::Borrowed(connection) => connection,
            Held::Shared(connection) => connection,
        }
    }

    /// See [`Connection::call`].
    pub(super) fn call<'b>(
        &'b self,
        send: impl FnOnce(&Wire) -> Option<Reply> + Send + 'b,
    ) -> Call<'b> {
        let connection = self.connection();
        // Before the connection is chosen, or one that is replaced meanwhile would go unnoticed.
        self.replacements.store(connection.replacements(), Relaxed);
        connection.call(|wire| match self.asking {
            true => send(&wire.asking()),
            false => send(wire),
        })
    }

    pub(super) fn learn(&self, origin: Origin, fact: Fact) {
        self.connection().learn(origin, fact);
    }

    /// It may not be so any more.
    pub(super) fn unlearn(&self, fact: Fact) {
        self.connection().unlearn(fact);
    }

    /// See [`Connection::is_confirmed`].
    pub(super) fn is_confirmed(&self) -> bool {
        self.connection().is_confirmed()
    }

    /// See [`Connection::confirm`].
    pub(super) async fn confirm(&self, request: &AcquireRequest) -> Result<(), StorageError> {
        self.connection().confirm(request).await
    }

    /// Whether another server has taken the place of this one meanwhile, or may have.
    pub(super) fn is_replaced(&self) -> bool {
        let connection = self.connection();
        connection.replacements() != self.replacements.load(Relaxed) || connection.is_in_doubt()
    }
}

impl<'a> Way<'a> {
    pub(super) async fn line(&mut self) -> Result<Line<'a>, StorageError> {
        match self {
            Self::One(connection) => Ok(Line::new(Held::Borrowed(connection), false)),
            // In a box, or the futures of all commands would be as large as this.
            Self::Cluster(way) => {
                let (node, asking) = Box::pin(way.node()).await?;
                Ok(Line::new(Held::Shared(node), asking))
            }
        }
    }

    /// Whether the lock has gone to another server since this connection was chosen. If this one
    /// stood still meanwhile, it may not know; what it says it has given has to be asked for there.
    pub(super) fn has_changed(&self, line: &Line<'_>) -> bool {
        match self {
            Self::One(_) => line.is_replaced(),
            Self::Cluster(way) => way.has_changed(),
        }
    }

    /// `None`: try again.
    pub(super) async fn after<T>(
        &mut self,
        result: Result<T, StorageError>,
    ) -> Option<Result<T, StorageError>> {
        match self {
            Self::One(_) => Some(result),
            Self::Cluster(way) => Box::pin(way.after(result)).await,
        }
    }
}
