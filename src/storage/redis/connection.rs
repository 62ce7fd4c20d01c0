//! The connection to a Redis server: one, shared by all commands, replaced when it is broken.
//!
//! Commands of many tasks go through one multiplexed connection, in the order in which they were
//! sent, and into the same write where they come together (`batch.rs`). bb8 makes that
//! connection and replaces it. It is asked for it only when the present one is known to be dead;
//! there is no PING and no checkout on a command's way. `health.rs` says when it is dead.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bb8_redis::bb8::{ErrorSink, ManageConnection, Pool, RunError};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, PushInfo, PushKind, RedisError, Value,
    aio::{AsyncPushSender, MultiplexedConnection},
    io::tcp::TcpSettings,
};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use super::{
    batch::{self, Batches},
    error::{Failure, connect_error, value},
    health::Health,
    sentinel::{self, Master, Sentinels},
    slot::Counters,
};
use crate::error::{StorageError, StorageErrorKind};

/// For how long a fencing counter that was right stays so, if it is not used. In less time no server
/// is demoted, falls behind another and is promoted again, without its connections being closed.
const RIGHT: Duration = Duration::from_secs(2);

/// One connection and what is known of it.
pub(super) struct Wire {
    batches: Batches,
    health: Arc<Health>,
    origin: Origin,
    /// Which run of the server it leads to, if it tells.
    server_run: Option<u128>,
    /// What has been found out of the server over this connection.
    known: AtomicU8,
    made: Instant,
    /// When the fencing counter was last known to be right, in milliseconds since the connection was
    /// made.
    counter_right: AtomicU64,
    /// What Sentinel knew of the server when the connection was made.
    master: Option<Master>,
    /// The fencing counters, if the server is a node of a cluster.
    counters: Option<Arc<Counters>>,
    /// That each command is for a slot that is on its way to this node.
    asking: bool,
}

/// Where a reply comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    wire: u64,
    /// Which run of the server's clock it was, if it tells. Not known where messages may come from
    /// other servers.
    pub(super) clock: Option<u128>,
}

/// Something that can be found out of a server, and is forgotten with the connection.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Fact {
    HasAcquireScript = 1,
    HasRenewScript = 2,
    HasFreeScript = 4,
    HasReleaseScript = 8,
    /// The fencing counter is above all tokens that were ever given. To be learned with each use of
    /// it: forgotten if it is not used for a while.
    CounterIsRight = 16,
}

impl Wire {
    async fn new(
        mut connection: MultiplexedConnection,
        health: Arc<Health>,
        master: Option<Master>,
        counters: Option<Arc<Counters>>,
    ) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let server_run = match &counters {
            None => run_of(&mut connection).await,
            // A message may have come from another node.
            Some(_) => None,
        };
        let origin = Origin {
            wire: NUMBER.fetch_add(1, Relaxed),
            clock: server_run.filter(|_| master.is_none()),
        };
        Arc::new(Self {
            batches: Batches::new(connection, Arc::clone(&health)),
            health,
            origin,
            server_run,
            known: AtomicU8::new(0),
            made: Instant::now(),
            counter_right: AtomicU64::new(0),
            master,
            counters,
            asking: false,
        })
    }

    /// The same connection, for commands about a slot that is on its way to this node.
    pub(super) fn asking(&self) -> Self {
        Self {
            batches: self.batches.clone(),
            health: Arc::clone(&self.health),
            origin: self.origin,
            server_run: self.server_run,
            known: AtomicU8::new(self.known.load(Relaxed)),
            made: self.made,
            counter_right: AtomicU64::new(0),
            master: None,
            counters: self.counters.clone(),
            asking: true,
        }
    }

    /// The fencing counters, if the server is a node of a cluster.
    pub(super) fn counters(&self) -> Option<&Counters> {
        self.counters.as_deref()
    }

    /// Sends a command, or several that follow each other in one write; then the reply is an array
    /// of the replies to each (see [`value`](super::error::value)), and commands of other clients
    /// may be carried out between them. How long it may take, is the caller's business.
    pub(super) fn run<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        if !self.asking {
            return Reply {
                reply: self.batches.call(commands),
                asked: false,
            };
        }
        // `ASKING` counts for the next command only. In a cluster, commands go by themselves.
        debug_assert!(N == 1, "one command for a slot on its way");
        let command = commands.into_iter().next().unwrap_or_default();
        Reply {
            reply: self.batches.call([redis::cmd("ASKING"), command]),
            asked: true,
        }
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    pub(super) fn knows(&self, fact: Fact) -> bool {
        // A slot may go to another node, lose some of its counter in a failover there, and come back.
        let in_cluster = self.counters.is_some();
        self.known.load(Relaxed) & fact as u8 != 0
            && (!matches!(fact, Fact::CounterIsRight) || (!in_cluster && self.counter_is_fresh()))
    }

    fn learn(&self, fact: Fact) {
        if matches!(fact, Fact::CounterIsRight) {
            self.counter_right.store(self.age(), Relaxed);
        }
        self.known.fetch_or(fact as u8, Relaxed);
    }

    fn counter_is_fresh(&self) -> bool {
        let since = self.age().saturating_sub(self.counter_right.load(Relaxed));
        u128::from(since) < RIGHT.as_millis()
    }

    fn age(&self) -> u64 {
        self.made.elapsed().as_millis() as u64
    }

    pub(super) fn unlearn(&self, fact: Fact) {
        self.known.fetch_and(!(fact as u8), Relaxed);
    }
}

/// The reply to what was sent over a [`Wire`]. Dropped, it may be carried out or not.
pub(super) struct Reply {
    reply: batch::Reply,
    asked: bool,
}

impl Future for Reply {
    type Output = Result<Value, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let reply = ready!(Pin::new(&mut self.reply).poll(cx));
        Poll::Ready(match reply {
            // After the reply to `ASKING`.
            Ok(Value::Array(mut replies)) if self.asked => match replies.pop() {
                Some(last) => value(last),
                None => Ok(Value::Nil),
            },
            reply => reply,
        })
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

/// A server, as a client of it: with RESP3 first, as it tells of a closed connection while nobody
/// uses it, and with RESP2 for servers before Redis 6.
#[derive(Clone)]
pub(super) struct Server([Client; 2]);

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
        Ok(Self([
            client(ProtocolVersion::RESP3)?,
            client(ProtocolVersion::RESP2)?,
        ]))
    }

    pub(super) async fn connect_resp3(
        &self,
        config: &AsyncConnectionConfig,
    ) -> Result<MultiplexedConnection, RedisError> {
        let [resp3, _] = &self.0;
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
                let [_, resp2] = &self.0;
                resp2
                    .get_multiplexed_async_connection_with_config(old)
                    .await
            }
            other => other,
        }
    }
}

/// Which server connections lead to.
#[derive(Clone)]
enum Target {
    Server(Box<Server>),
    /// The one that is the master now.
    Master(Arc<Sentinels>),
}

/// Makes connections for bb8.
#[derive(Clone)]
pub(super) struct Connector {
    target: Target,
    timeout: Duration,
    counters: Option<Arc<Counters>>,
}

impl Connector {
    /// `timeout` bounds the making of a connection, handshake included.
    fn new(target: Target, timeout: Duration) -> Self {
        Self {
            target,
            timeout,
            counters: None,
        }
    }

    /// Connections to one server.
    pub(super) fn to_server(server: Server, timeout: Duration) -> Self {
        Self::new(Target::Server(Box::new(server)), timeout)
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

    /// Whether another server may take the place of this one while this one is alive. It gives locks
    /// away until it hears of that: what it says by itself has to be confirmed.
    pub(super) fn is_replaceable(&self) -> bool {
        matches!(self.target, Target::Master(_))
    }

    /// What asking where the master is, RESP3 and then RESP2 may take.
    fn limit(&self) -> Duration {
        match self.target {
            Target::Server(_) => self.timeout * 2,
            Target::Master(_) => self.timeout * 3,
        }
    }

    /// Longer than that.
    fn longest(&self) -> Duration {
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
        }
    }

    async fn open(&self) -> Result<Arc<Wire>, RedisError> {
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
        within(self.limit(), opening).await
    }

    /// A connection whose pushes go to `pushes`.
    pub(super) async fn open_resp3(
        &self,
        pushes: impl AsyncPushSender,
    ) -> Result<(MultiplexedConnection, Option<u128>), StorageError> {
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
        within(self.limit(), opening).await.map_err(connect_error)
    }

    fn config(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            // Whoever sends a command has its own limit; a second one here would cost a timer per
            // command.
            .set_response_timeout(None)
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

#[derive(Clone, Debug)]
pub(super) enum ConnectError {
    Dead,
    Failed(StorageError),
}

impl ManageConnection for Connector {
    type Connection = Arc<Wire>;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Arc<Wire>, ConnectError> {
        self.open()
            .await
            .map_err(|error| ConnectError::Failed(connect_error(error)))
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
struct Failures(Arc<FailuresInner>);

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

    fn last(&self) -> StorageError {
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
    /// Which run of the server the present connection leads to, or led to if it is dead.
    run: watch::Sender<Option<u128>>,
    /// How often a server was left for the one that had taken its place.
    replacements: AtomicU64,
    failures: Failures,
}

impl Connection {
    /// Does not connect yet.
    pub(super) fn new(connector: Connector) -> Self {
        let failures = Failures::default();
        Self {
            pool: RwLock::new(Arc::new(pool(&connector, &failures))),
            connector,
            present: RwLock::new(None),
            run: watch::Sender::new(None),
            replacements: AtomicU64::new(0),
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
    /// Whoever waits for a reply holds no part of the connection: counting all who do so would be
    /// the one thing about which every task on every core has to agree.
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
        self.run.send_if_modified(|run| {
            let differs = *run != wire.server_run;
            *run = wire.server_run;
            differs
        });
        *present = Some(wire);
        Ok(result)
    }

    /// Leaves a master that Sentinel has replaced, for as long as it is polled. It may not know yet
    /// that it is none, and go on giving locks away.
    pub(super) async fn follow(&self) {
        let Target::Master(sentinels) = &self.connector.target else {
            return;
        };
        let timeout = self.connector.timeout;
        let switched = Arc::new(Notify::new());
        let moving = async {
            loop {
                switched.notified().await;
                let Ok(master) = sentinels.find(timeout).await else {
                    continue;
                };
                if self.leave(&master) {
                    // Wake-ups follow the commands. Should it fail, the next command connects.
                    let _ = self.connect().await;
                }
            }
        };
        tokio::join!(sentinels.watch(timeout, &switched), moving);
    }

    /// Whether the present connection led to a master that this one replaces.
    fn leave(&self, master: &Master) -> bool {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        let Some(wire) = &*present else {
            return false;
        };
        let is_replaced = wire.master.as_ref().is_some_and(|old| master.replaces(old));
        if is_replaced {
            self.replacements.fetch_add(1, Relaxed);
            wire.health.kill();
        }
        is_replaced
    }

    /// Which run of the server commands go to.
    pub(super) fn run(&self) -> watch::Receiver<Option<u128>> {
        self.run.subscribe()
    }

    /// Whether the connection was lost to a server that may have been replaced since. It may have
    /// stood still, and be the last to hear of that.
    pub(super) fn is_in_doubt(&self) -> bool {
        let is_dead = || {
            let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
            present.as_ref().is_some_and(|wire| wire.health.is_dead())
        };
        self.connector.is_replaceable() && is_dead()
    }

    /// Changes when another server has taken the place of the one that commands went to. What that
    /// one says it has done does not count any more.
    pub(super) fn replacements(&self) -> u64 {
        self.replacements.load(Relaxed)
    }

    /// A reply from there has shown something.
    pub(super) fn learn(&self, origin: Origin, fact: Fact) {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(wire) = &*present
            && wire.origin.wire == origin.wire
        {
            wire.learn(fact);
        }
    }

    /// A pool that gives no connection and no reason may have lost the task that was to make one,
    /// with the runtime it ran on; it would wait for it for ever.
    fn replace(&self, broken: &Arc<Pool<Connector>>) {
        let mut present = self.pool.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&present, broken) {
            *present = Arc::new(pool(&self.connector, &self.failures));
        }
    }

    async fn pooled_wire(&self) -> Result<Arc<Wire>, StorageError> {
        loop {
            let pool = Arc::clone(&self.pool.read().unwrap_or_else(PoisonError::into_inner));
            let failed = self.failures.0.happened.notified();
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

/// A pool of one connection, none of it made yet.
fn pool(connector: &Connector, failures: &Failures) -> Pool<Connector> {
    Pool::builder()
        .max_size(1)
        // No reaper: it would be bound to the runtime that happens to make the pool.
        .max_lifetime(None)
        .idle_timeout(None)
        // bb8 would try again and again while the caller waits without a word. The caller knows how
        // long it can wait, so it is told, and comes again.
        .retry_connection(false)
        // Longer than a connection may take, so that whoever waits hears of the failure itself.
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

/// Reads a URL.
pub(super) fn parse_url(url: &str) -> Result<ConnectionInfo, StorageError> {
    url.into_connection_info().map_err(|_| {
        // redis-rs's own error is dropped: the text of a URL that cannot be read may hold a
        // password.
        let text = if url.starts_with("rediss:") || url.starts_with("valkeys:") {
            "TLS is not supported: the Redis URL should begin with redis://"
        } else {
            "the Redis URL cannot be read; it should look like redis://host:6379"
        };
        StorageError::with_source(StorageErrorKind::Rejected, text)
    })
}
