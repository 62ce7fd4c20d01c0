//! How a connection is made: to one server, to the one that is the master now, to a node of a
//! cluster, or to the server of a pool of the user's.

use std::{sync::Arc, time::Duration};

use redis::{Cmd, ErrorKind, ProtocolVersion, RedisError, Value};
use tokio::time::timeout;

use super::{
    address::Endpoint,
    error::connect_error,
    health::Health,
    own_pool::{OwnConnection, OwnPool},
    pipe::{Pipe, Pushes},
    probe::Probe,
    sentinel::{self, Master, Sentinels},
    slot::Counters,
    stream,
    wire::{Link, Wire, run_of, run_query},
};
use crate::error::{StorageError, StorageErrorKind};

/// A server that connections are made to: with RESP3 first, and with RESP2 for servers before Redis 6.
#[derive(Clone)]
pub(super) struct Server(Arc<Endpoint>);

impl Server {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self(Arc::new(endpoint))
    }

    /// A connection for commands. `limit` is for each protocol.
    pub(super) async fn connect(
        &self,
        limit: Duration,
        health: &Arc<Health>,
    ) -> Result<Pipe, RedisError> {
        let open = async |protocol| within(limit, stream::open(&self.0, protocol)).await;
        let ways = match open(ProtocolVersion::RESP3).await {
            Err(error) if knows_no_resp3(&error) => open(ProtocolVersion::RESP2).await?,
            other => other?,
        };
        Ok(Pipe::new(ways, Arc::clone(health), None))
    }

    /// A connection that messages come through.
    pub(super) async fn listen(&self, limit: Duration, pushes: Pushes) -> Result<Pipe, RedisError> {
        let ways = within(limit, stream::open(&self.0, ProtocolVersion::RESP3)).await?;
        Ok(Pipe::new(ways, Arc::default(), Some(pushes)))
    }

    fn is_encrypted(&self) -> bool {
        self.0.is_encrypted()
    }
}

/// Which server connections lead to.
#[derive(Clone)]
enum Target {
    Server(Server),
    /// The one that is the master now.
    Master(Arc<Sentinels>),
    /// That of a pool of the user's.
    OwnPool(OwnPool),
}

/// A connection on which its server can be asked something.
trait Ask {
    async fn ask(&mut self, command: Cmd) -> Result<Value, RedisError>;
}

impl Ask for Pipe {
    async fn ask(&mut self, command: Cmd) -> Result<Value, RedisError> {
        self.call([command]).await
    }
}

impl Ask for Link {
    async fn ask(&mut self, command: Cmd) -> Result<Value, RedisError> {
        self.call([command]).await
    }
}

/// Makes connections for bb8.
#[derive(Clone)]
pub(super) struct Connector {
    target: Target,
    timeout: Duration,
    counters: Option<Arc<Counters>>,
    /// `None`: the user does not want it.
    probe: Option<Arc<Probe>>,
}

impl Connector {
    /// `timeout` bounds the making of a connection, handshake included.
    fn new(target: Target, timeout: Duration) -> Self {
        Self {
            target,
            timeout,
            counters: None,
            probe: None,
        }
    }

    /// Connections to one server.
    pub(super) fn to_server(server: Server, timeout: Duration) -> Self {
        Self::new(Target::Server(server), timeout)
    }

    /// Connections to the server that is the master when they are made.
    pub(super) fn to_master(sentinels: Sentinels, timeout: Duration) -> Self {
        Self::new(Target::Master(Arc::new(sentinels)), timeout)
    }

    /// Connections to a node of a cluster, which has fencing counters for its slots.
    pub(super) fn to_node(server: Server, timeout: Duration, counters: &Arc<Counters>) -> Self {
        Self {
            counters: Some(Arc::clone(counters)),
            ..Self::to_server(server, timeout)
        }
    }

    /// Connections to the server of a pool of the user's.
    pub(super) fn to_own_pool(pool: OwnPool) -> Self {
        Self::new(Target::OwnPool(pool), OwnPool::TIMEOUT)
    }

    pub(super) fn with_probe(mut self, probe: bool) -> Self {
        self.probe = probe.then(Arc::default);
        self
    }

    /// Whether messages can be received.
    pub(super) fn hears(&self) -> bool {
        !matches!(self.target, Target::OwnPool(_))
    }

    /// Whether another server may take the place of this one while this one is alive. It gives locks
    /// away until it hears of that: what it says by itself has to be confirmed.
    pub(super) fn is_replaceable(&self) -> bool {
        matches!(self.target, Target::Master(_))
    }

    /// Who says where the master is, if that may change.
    pub(super) fn sentinels(&self) -> Option<&Sentinels> {
        match &self.target {
            Target::Master(sentinels) => Some(sentinels),
            Target::Server(_) | Target::OwnPool(_) => None,
        }
    }

    /// What the making of a connection may take, to each server that is asked for it.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What asking where the master is, RESP3 and then RESP2 may take.
    fn limit(&self) -> Duration {
        match self.target {
            Target::Server(_) | Target::OwnPool(_) => self.timeout * 2,
            Target::Master(_) => self.timeout * 3,
        }
    }

    /// Longer than that.
    pub(super) fn longest(&self) -> Duration {
        self.limit() + self.timeout / 2
    }

    /// A connection made by `connect`, or by `own` out of a pool of the user's, to the server that is meant.
    async fn reach<C: Ask>(
        &self,
        connect: impl AsyncFnOnce(&Server) -> Result<C, RedisError>,
        own: impl AsyncFnOnce(&OwnPool) -> Result<C, RedisError>,
    ) -> Result<(C, Option<Master>), RedisError> {
        match &self.target {
            Target::Server(server) => Ok((connect(server).await?, None)),
            Target::Master(sentinels) => {
                let master = sentinels.find(self.timeout).await?;
                let mut connection = connect(&sentinels.server(&master)).await?;
                // They may not have heard yet that it is another.
                sentinel::check_role(connection.ask(redis::cmd("ROLE")).await)?;
                // It may have stood still while the connection was made, and not know it either.
                if sentinels.have_replaced(&master) {
                    return Err(sentinel::unavailable("the master was replaced"));
                }
                Ok((connection, Some(master)))
            }
            Target::OwnPool(pool) => Ok((own(pool).await?, None)),
        }
    }

    /// A connection for commands.
    pub(super) async fn open(&self) -> Result<Arc<Wire>, StorageError> {
        let health = Arc::new(Health::default());
        let opening = async {
            let connect = async |server: &Server| {
                let pipe = server.connect(self.timeout, &health).await?;
                Ok(Link::Pipe(pipe))
            };
            let own = async |pool: &OwnPool| {
                let connection = pool.connect().await?;
                let connection = OwnConnection::new(connection, Arc::clone(&health));
                Ok(Link::OwnPool(connection))
            };
            let (link, master) = self.reach(connect, own).await?;
            Ok(Wire::new(link, Arc::clone(&health), master, self.counters.clone()).await)
        };
        let opened = within(self.limit(), opening).await;
        let wire = opened.map_err(|error| self.connect_error(error))?;
        if let Some(probe) = &self.probe {
            probe.look(&wire);
        }
        Ok(wire)
    }

    /// A connection whose pushes go to `pushes`.
    pub(super) async fn open_resp3(
        &self,
        pushes: Pushes,
    ) -> Result<(Pipe, Option<u128>), StorageError> {
        let refuse = async |_: &OwnPool| {
            Err((
                ErrorKind::InvalidClientConfig,
                "no messages come through this pool",
            )
                .into())
        };
        let opening = async {
            let connect = async |server: &Server| server.listen(self.timeout, pushes).await;
            let (mut connection, _) = self.reach(connect, refuse).await?;
            let run = match &self.counters {
                None => connection.ask(run_query()).await.ok().and_then(run_of),
                Some(_) => None,
            };
            Ok((connection, run))
        };
        let opened = within(self.limit(), opening).await;
        opened.map_err(|error| self.connect_error(error))
    }

    fn connect_error(&self, error: RedisError) -> StorageError {
        let is_encrypted = match &self.target {
            Target::Server(server) => server.is_encrypted(),
            Target::Master(sentinels) => sentinels.is_encrypted(),
            Target::OwnPool(_) => false,
        };
        // Redis takes the first bytes of TLS for the beginning of a command, and waits for the rest.
        if is_encrypted && error.is_timeout() {
            let text = "no connection in time; perhaps the port does not speak TLS";
            return StorageError::with_source(StorageErrorKind::Unavailable, text);
        }
        connect_error(error)
    }
}

/// A server that is stopped between two steps of a handshake would never answer the second.
async fn within<T>(
    limit: Duration,
    opening: impl Future<Output = Result<T, RedisError>>,
) -> Result<T, RedisError> {
    let late = |_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
    timeout(limit, opening).await.unwrap_or_else(late)
}

/// Servers before Redis 6 do not know the command that chooses the protocol. redis-rs recognises
/// the wording of some of them.
fn knows_no_resp3(error: &RedisError) -> bool {
    let unknown = |text: &str| text.contains("unknown command") && text.contains("HELLO");
    error.kind() == ErrorKind::RESP3NotSupported || error.detail().is_some_and(unknown)
}
