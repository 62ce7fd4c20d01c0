//! The connection to a Redis server: one, shared by all commands, replaced when it is broken.
//!
//! Commands of many tasks go through one multiplexed connection, in the order in which they were
//! sent, and into the same write where they come together (`batch.rs`). bb8 makes that
//! connection and replaces it. It is asked for it only when the present one is known to be dead;
//! there is no PING and no checkout on a command's way. `health.rs` says when it is dead.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bb8_redis::bb8::{ErrorSink, ManageConnection, Pool, RunError};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, ProtocolVersion, PushInfo, PushKind, RedisError,
    aio::{AsyncPushSender, MultiplexedConnection},
    io::tcp::TcpSettings,
};
use tokio::sync::{Notify, futures::Notified};

use super::{
    address::{self, Address, refused},
    batch::{Batches, Reply},
    error::connect_error,
    health::Health,
    own_pool::OwnPool,
    probe::Probe,
};
use crate::error::{StorageError, StorageErrorKind};

/// One connection and what is known of it.
pub(super) struct Wire {
    batches: Batches,
    health: Arc<Health>,
    origin: Origin,
    /// What has been found out of the server over this connection.
    known: AtomicU8,
}

/// Where a reply comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    wire: u64,
    /// Which run of the server it was, if it tells.
    pub(super) server_run: Option<u128>,
}

/// Something that can be found out of a server, and is forgotten with the connection.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Fact {
    HasAcquireScript = 1,
    HasRenewScript = 2,
    HasFreeScript = 4,
    HasReleaseScript = 8,
    /// The fencing counter is above all tokens that were ever given.
    CounterIsRight = 16,
    HasRaiseScript = 32,
}

impl Wire {
    async fn new(mut connection: MultiplexedConnection, health: Arc<Health>) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let origin = Origin {
            wire: NUMBER.fetch_add(1, Relaxed),
            server_run: run_of(&mut connection).await,
        };
        Arc::new(Self {
            batches: Batches::new(connection, Arc::clone(&health)),
            health,
            origin,
            known: AtomicU8::new(0),
        })
    }

    /// Sends a command, or several that follow each other in one write; then the reply is an array
    /// of the replies to each (see [`value`](super::error::value)), and commands of other clients
    /// may be carried out between them. How long it may take, is the caller's business.
    pub(super) fn run<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        self.batches.call(commands)
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    pub(super) fn knows(&self, fact: Fact) -> bool {
        self.known.load(Relaxed) & fact as u8 != 0
    }

    /// Remembers what was found out.
    pub(super) fn learn(&self, fact: Fact) {
        self.known.fetch_or(fact as u8, Relaxed);
    }
}

/// The id of the server's run: it changes with every start, and every server has its own. Not every
/// user may ask for it.
async fn run_of(connection: &mut MultiplexedConnection) -> Option<u128> {
    let info = redis::cmd("INFO").arg("server").to_owned();
    let info = connection.send_packed_command(&info).await.ok()?;
    let info: String = redis::from_redis_value(info).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("run_id:"))?;
    u128::from_str_radix(id.trim().get(..32)?, 16).ok()
}

async fn connect(
    client: &Client,
    config: &AsyncConnectionConfig,
) -> Result<MultiplexedConnection, RedisError> {
    client
        .get_multiplexed_async_connection_with_config(config)
        .await
}

/// Makes connections for bb8.
#[derive(Clone)]
pub(super) struct Connector {
    way: Way,
    timeout: Duration,
    /// `None`: the user does not want it.
    probe: Option<Arc<Probe>>,
}

/// How a server is reached.
#[derive(Clone)]
enum Way {
    /// RESP3 first: it tells of a closed connection while nobody uses it. RESP2 for servers before
    /// Redis 6.
    Server(Arc<[Client; 2]>),
    OwnPool(OwnPool),
}

impl Connector {
    /// A server of which we know where it is. `timeout` bounds the making of a connection, handshake
    /// included.
    pub(super) fn to_server(address: &Address, timeout: Duration) -> Result<Self, StorageError> {
        let info = address.read()?;
        // Half-open connections are found by the kernel too, where it can.
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(
            redis::io::tcp::socket2::TcpKeepalive::new().with_time(Duration::from_secs(15)),
        );
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let tcp = tcp.set_user_timeout(Duration::from_secs(15));
        let info = info.set_tcp_settings(tcp);
        let client = |protocol| {
            let settings = info.redis_settings().clone().set_protocol(protocol);
            Client::open(info.clone().set_redis_settings(settings)).map_err(connect_error)
        };
        Ok(Self {
            way: Way::Server(Arc::new([
                client(ProtocolVersion::RESP3)?,
                client(ProtocolVersion::RESP2)?,
            ])),
            timeout,
            probe: None,
        })
    }

    /// The server of a pool of the user's.
    pub(super) fn to_own_pool(pool: OwnPool) -> Self {
        Self {
            way: Way::OwnPool(pool),
            timeout: OwnPool::TIMEOUT,
            probe: None,
        }
    }

    pub(super) fn with_probe(mut self, probe: bool) -> Self {
        self.probe = probe.then(Arc::default);
        self
    }

    /// Whether messages can be received.
    pub(super) fn hears(&self) -> bool {
        matches!(self.way, Way::Server(_))
    }

    /// Longer than RESP3 and then RESP2 may take.
    pub(super) fn longest(&self) -> Duration {
        self.timeout * 5 / 2
    }

    async fn open(&self) -> Result<Arc<Wire>, StorageError> {
        let health = Arc::new(Health::default());
        let connection = match &self.way {
            Way::Server(clients) => self.open_server(clients, &health).await,
            Way::OwnPool(pool) => pool.connect().await,
        };
        let connection = connection.map_err(|error| self.connect_error(error))?;
        let wire = Wire::new(connection, health).await;
        if let Some(probe) = &self.probe {
            probe.look(&wire);
        }
        Ok(wire)
    }

    async fn open_server(
        &self,
        [resp3, resp2]: &[Client; 2],
        health: &Arc<Health>,
    ) -> Result<MultiplexedConnection, RedisError> {
        let told = Arc::clone(health);
        let config = self.config().set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Disconnection {
                told.kill();
            }
            Ok::<_, std::convert::Infallible>(())
        });
        match connect(resp3, &config).await {
            Err(error) if knows_no_resp3(&error) => connect(resp2, &self.config()).await,
            other => other,
        }
    }

    /// A connection whose pushes go to `pushes`.
    pub(super) async fn open_resp3(
        &self,
        pushes: impl AsyncPushSender,
    ) -> Result<(MultiplexedConnection, Option<u128>), StorageError> {
        let Way::Server(clients) = &self.way else {
            return Err(refused("no messages come through this pool"));
        };
        let [resp3, _] = &**clients;
        let config = self.config().set_push_sender(pushes);
        let mut connection = connect(resp3, &config)
            .await
            .map_err(|error| self.connect_error(error))?;
        let run = run_of(&mut connection).await;
        Ok((connection, run))
    }

    fn config(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            // Whoever sends a command has its own limit; a second one here would cost a timer per
            // command.
            .set_response_timeout(None)
    }

    fn connect_error(&self, error: RedisError) -> StorageError {
        match &self.way {
            // Redis takes the first bytes of TLS for the beginning of a command, and waits for the
            // rest.
            Way::Server(clients)
                if error.is_timeout()
                    && address::is_encrypted(clients[0].get_connection_info()) =>
            {
                let text = "no connection in time; perhaps the port does not speak TLS";
                StorageError::with_source(StorageErrorKind::Unavailable, text)
            }
            _ => connect_error(error),
        }
    }
}

/// Servers before Redis 6 do not know the command that chooses the protocol. redis-rs recognises
/// the wording of some of them.
fn knows_no_resp3(error: &RedisError) -> bool {
    let unknown = |text: &str| text.contains("unknown command") && text.contains("HELLO");
    error.kind() == ErrorKind::RESP3NotSupported || error.detail().is_some_and(unknown)
}

#[derive(Clone, Debug)]
pub(super) enum ConnectError {
    Dead,
    Failed(StorageError),
}

impl ManageConnection for Connector {
    type Connection = Arc<Wire>;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Arc<Wire>, ConnectError> {
        self.open().await.map_err(ConnectError::Failed)
    }

    async fn is_valid(&self, wire: &mut Arc<Wire>) -> Result<(), ConnectError> {
        if wire.health.is_dead() {
            Err(ConnectError::Dead)
        } else {
            Ok(())
        }
    }

    fn has_broken(&self, wire: &mut Arc<Wire>) -> bool {
        wire.health.is_dead()
    }
}

/// Where bb8 says why it could not connect. Whoever waits for a connection is told at once, instead
/// of after bb8's whole time-out.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures(Arc<FailuresInner>);

#[derive(Debug, Default)]
struct FailuresInner {
    last: Mutex<Option<StorageError>>,
    happened: Notify,
    /// When the pool was first asked for a connection since it last gave one or said why not.
    asked: Mutex<Option<Instant>>,
}

impl Failures {
    fn asked(&self) -> Instant {
        let mut asked = self.0.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked.get_or_insert_with(Instant::now)
    }

    fn answered(&self) {
        *self.0.asked.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Resolves at the next failure from its first poll on, or from when it is enabled.
    pub(super) fn happened(&self) -> Notified<'_> {
        self.0.happened.notified()
    }

    pub(super) fn last(&self) -> StorageError {
        let last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
            .unwrap_or_else(|| StorageError::new(StorageErrorKind::Unavailable))
    }
}

impl ErrorSink<ConnectError> for Failures {
    fn sink(&self, error: ConnectError) {
        if let ConnectError::Failed(error) = error {
            self.answered();
            *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            self.0.happened.notify_waiters();
        }
    }

    fn boxed_clone(&self) -> Box<dyn ErrorSink<ConnectError>> {
        Box::new(self.clone())
    }
}

/// The connection, as commands use it.
pub(super) struct Connection {
    connector: Connector,
    pool: RwLock<Arc<Pool<Connector>>>,
    present: RwLock<Option<Arc<Wire>>>,
    failures: Failures,
}

impl Connection {
    /// Does not connect yet.
    pub(super) fn new(connector: Connector) -> Self {
        let failures = Failures::default();
        Self {
            pool: RwLock::new(Arc::new(pool(&connector, &failures, 1))),
            connector,
            present: RwLock::new(None),
            failures,
        }
    }

    pub(super) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Connects, if there is no connection that works.
    pub(super) async fn connect(&self) -> Result<(), StorageError> {
        self.on_wire(|_| ()).await
    }

    /// Has something sent over the connection, which is made if there is none that works.
    ///
    /// Whoever waits for a reply does not hold the connection.
    pub(super) async fn on_wire<R>(
        &self,
        send: impl FnOnce(&Wire) -> R,
    ) -> Result<R, StorageError> {
        if let Some(wire) = &*self.present.read().unwrap_or_else(PoisonError::into_inner)
            && !wire.health.is_dead()
        {
            return Ok(send(wire));
        }
        // In a box, or every command's future would be as large as this.
        let wire = Box::pin(self.pooled_wire()).await?;
        let result = send(&wire);
        let mut present = self.present.write().unwrap_or_else(PoisonError::into_inner);
        *present = Some(wire);
        Ok(result)
    }

    /// A reply from there has shown something.
    pub(super) fn learn(&self, origin: Origin, fact: Fact) {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(wire) = &*present
            && wire.origin.wire == origin.wire
        {
            wire.known.fetch_or(fact as u8, Relaxed);
        }
    }

    /// It may not be so any more.
    pub(super) fn unlearn(&self, fact: Fact) {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(wire) = &*present {
            wire.known.fetch_and(!(fact as u8), Relaxed);
        }
    }

    /// A pool that gives no connection and no reason may have lost the task that was to make one,
    /// with the runtime it ran on; it would wait for it for ever.
    fn replace(&self, broken: &Arc<Pool<Connector>>) {
        let mut present = self.pool.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&present, broken) {
            *present = Arc::new(pool(&self.connector, &self.failures, 1));
        }
    }

    async fn pooled_wire(&self) -> Result<Arc<Wire>, StorageError> {
        loop {
            let pool = Arc::clone(&self.pool.read().unwrap_or_else(PoisonError::into_inner));
            let failed = self.failures.happened();
            tokio::pin!(failed);
            // Before the pool is asked, so that a failure on this account is not missed.
            failed.as_mut().enable();
            // Counted over all callers: each may give up before.
            let left = self
                .connector
                .longest()
                .saturating_sub(self.failures.asked().elapsed());
            tokio::select! {
                biased;
                got = pool.get() => {
                    self.failures.answered();
                    return match got {
                        // Only a clone leaves the pool: the connection serves everybody at the same
                        // time.
                        Ok(wire) => Ok(Arc::clone(&wire)),
                        Err(RunError::User(ConnectError::Failed(error))) => Err(error),
                        Err(RunError::User(ConnectError::Dead) | RunError::TimedOut) => {
                            self.replace(&pool);
                            let text = "no connection in time";
                            Err(StorageError::with_source(StorageErrorKind::Unavailable, text))
                        }
                    };
                }
                () = failed => return Err(self.failures.last()),
                () = tokio::time::sleep(left) => {
                    self.replace(&pool);
                    self.failures.answered();
                }
            }
        }
    }
}

/// A pool of so many connections, none of them made yet.
pub(super) fn pool(connector: &Connector, failures: &Failures, size: u32) -> Pool<Connector> {
    Pool::builder()
        .max_size(size)
        // No reaper: it would be bound to the runtime that happens to make the pool.
        .max_lifetime(None)
        .idle_timeout(None)
        // bb8 would try again and again while the caller waits without a word. The caller knows how
        // long it can wait, so it is told, and comes again.
        .retry_connection(false)
        // Longer than RESP3 and then RESP2 may take, so that whoever waits hears of the failure
        // itself.
        .connection_timeout(connector.longest())
        .error_sink(Box::new(failures.clone()))
        .build_unchecked(connector.clone())
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        let connected = present.as_ref().is_some_and(|wire| !wire.health.is_dead());
        f.debug_struct("Connection")
            .field("connected", &connected)
            .finish_non_exhaustive()
    }
}
