//! How a connection is made: to one server, to the one that is the master now, to a node of a
//! cluster, or to the server of a pool of the user's.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, ErrorKind, ProtocolVersion, PushInfo, PushKind,
    RedisError,
    aio::{AsyncPushSender, MultiplexedConnection},
    io::tcp::TcpSettings,
};
use tokio::time::timeout;

use super::{
    address::{is_encrypted, refused},
    error::connect_error,
    health::Health,
    own_pool::OwnPool,
    probe::Probe,
    sentinel::{self, Master, Sentinels},
    slot::Counters,
    wire::{Wire, run_of},
};
use crate::error::{StorageError, StorageErrorKind};

/// A server, as a client of it: with RESP3 first, as it tells of a closed connection while nobody
/// uses it, and with RESP2 for servers before Redis 6.
#[derive(Clone)]
pub(super) struct Server(Arc<[Client; 2]>);

impl Server {
    pub(super) fn new(info: &ConnectionInfo) -> Result<Self, RedisError> {
        // Half-open connections are found by the kernel too, where it can.
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(
            redis::io::tcp::socket2::TcpKeepalive::new().with_time(Duration::from_secs(15)),
        );
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let tcp = tcp.set_user_timeout(Duration::from_secs(15));
        let info = info.clone().set_tcp_settings(tcp);
        let client = |protocol| {
            let settings = info.redis_settings().clone().set_protocol(protocol);
            Client::open(info.clone().set_redis_settings(settings))
        };
        Ok(Self(Arc::new([
            client(ProtocolVersion::RESP3)?,
            client(ProtocolVersion::RESP2)?,
        ])))
    }

    pub(super) async fn connect_resp3(
        &self,
        config: &AsyncConnectionConfig,
    ) -> Result<MultiplexedConnection, RedisError> {
        let [resp3, _] = &*self.0;
        resp3
            .get_multiplexed_async_connection_with_config(config)
            .await
    }

    /// `old`: how to connect to a server that knows no RESP3.
    pub(super) async fn connect(
        &self,
        config: &AsyncConnectionConfig,
        old: &AsyncConnectionConfig,
    ) -> Result<MultiplexedConnection, RedisError> {
        match self.connect_resp3(config).await {
            Err(error) if knows_no_resp3(&error) => {
                let [_, resp2] = &*self.0;
                resp2
                    .get_multiplexed_async_connection_with_config(old)
                    .await
            }
            other => other,
        }
    }

    fn is_encrypted(&self) -> bool {
        is_encrypted(self.0[0].get_connection_info())
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

    /// A connection made by `connect`, to the server that is meant.
    async fn reach(
        &self,
        connect: impl AsyncFnOnce(&Server) -> Result<MultiplexedConnection, RedisError>,
    ) -> Result<(MultiplexedConnection, Option<Master>), RedisError> {
        match &self.target {
            Target::Server(server) => Ok((connect(server).await?, None)),
            Target::Master(sentinels) => {
                let master = sentinels.find(self.timeout).await?;
                let mut connection = connect(&sentinels.server(&master)?).await?;
                // They may not have heard yet that it is another.
                sentinel::check_role(&mut connection).await?;
                // It may have stood still while the connection was made, and not know it either.
                if sentinels.have_replaced(&master) {
                    return Err(sentinel::unavailable("the master was replaced"));
                }
                Ok((connection, Some(master)))
            }
            Target::OwnPool(pool) => Ok((pool.connect().await?, None)),
        }
    }

    /// A connection for commands.
    pub(super) async fn open(&self) -> Result<Arc<Wire>, StorageError> {
        let health = Arc::new(Health::default());
        let told = Arc::clone(&health);
        let config = self.config().set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Disconnection {
                told.kill();
            }
            Ok::<_, std::convert::Infallible>(())
        });
        let opening = async {
            let connect = async |server: &Server| server.connect(&config, &self.config()).await;
            let (connection, master) = self.reach(connect).await?;
            Ok(Wire::new(connection, health, master, self.counters.clone()).await)
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
        pushes: impl AsyncPushSender,
    ) -> Result<(MultiplexedConnection, Option<u128>), StorageError> {
        if !self.hears() {
            return Err(refused("no messages come through this pool"));
        }
        let config = self.config().set_push_sender(pushes);
        let opening = async {
            let connect = async |server: &Server| server.connect_resp3(&config).await;
            let (mut connection, _) = self.reach(connect).await?;
            let run = match &self.counters {
                None => run_of(&mut connection).await,
                Some(_) => None,
            };
            Ok((connection, run))
        };
        let opened = within(self.limit(), opening).await;
        opened.map_err(|error| self.connect_error(error))
    }

    fn config(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            // Whoever sends a command has its own limit; a second one here would cost a timer per
            // command.
            .set_response_timeout(None)
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
