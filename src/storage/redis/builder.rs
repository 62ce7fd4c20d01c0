//! What a storage is set up with, before it connects: where the servers are, who we are to them, and
//! what a grant needs. What cannot be meant is refused here, before anything is sent.

use std::{fmt, io, sync::Arc, time::Duration};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    RedisStorage,
    address::{Address, Endpoint, refused},
    calls::millis,
    cluster::{Cluster, Setup},
    connector::{Connector, Server},
    durability::Replicas,
    sentinel::Sentinels,
    stream::Dial,
    topology::Servers,
};
use crate::{error::StorageError, options::LockOptions};

/// Sets up a [`RedisStorage`]; made by [`RedisStorage::builder`], [`RedisStorage::sentinel`] and
/// [`RedisStorage::cluster`].
///
/// ```no_run
/// # #[cfg(feature = "tls")]
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use tower_distributed_lock::storage::RedisStorage;
///
/// let storage = RedisStorage::builder("rediss://redis.internal:6380")
///     .username("locks")
///     .password(std::env::var("REDIS_PASSWORD")?)
///     .root_certificate(std::fs::read("/etc/redis/ca.pem")?)
///     .replicas(1, Duration::from_millis(200))
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct RedisStorageBuilder {
    target: Target,
    /// Without the URL.
    address: Address,
    connect_timeout: Duration,
    replicas: Option<(u32, Duration)>,
    probe: bool,
}

/// Where the locks are.
#[derive(Clone)]
pub(super) enum Target {
    Server(String),
    Sentinel { service: String, urls: Vec<String> },
    Cluster(Vec<String>),
}

impl RedisStorageBuilder {
    pub(super) fn to(target: Target) -> Self {
        Self {
            target,
            address: Address::default(),
            connect_timeout: Duration::from_secs(1),
            replicas: None,
            probe: true,
        }
    }

    /// How long making a connection may take, handshake included: from 1 ms to 24 h, default 1 s. With
    /// Sentinel, finding the master may take as long again.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// // A server far away, with TLS.
    /// let storage = RedisStorage::builder("rediss://redis.example.com")
    ///     .connect_timeout(Duration::from_secs(3))
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The user to log in as, instead of the URL's. Default: the server's own default user.
    ///
    /// With Sentinel, this and the password are the Redis servers': the Sentinels have those that
    /// are in their URLs. What is not given here is for the servers as in the first URL.
    ///
    /// ```no_run
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let storage = RedisStorage::builder("redis://redis.internal")
    ///     .username("locks")
    ///     // In a URL it would be `p%23ss%2Fword`.
    ///     .password("p#ss/word")
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.address.username = Some(username.into());
        self
    }

    /// The password to log in with, instead of the URL's. Nothing in it is encoded, as the example of
    /// [`username`](Self::username) has it.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.address.password = Some(password.into());
        self
    }

    /// How a stream to a host and its port is made, instead of by TCP: through a proxy or a tunnel, to
    /// another address than the servers of a Cluster or Sentinel tell of themselves, or inside a test.
    ///
    /// It is asked for every connection, to Sentinels and to nodes of a Cluster too, and TLS is spoken over
    /// what it makes. It has [`connect_timeout`](Self::connect_timeout), greeting included, and is dropped
    /// when that is over. It must not block its thread, on which locks are renewed; a panic in it is an error.
    /// The stream is polled on any thread that makes a call, and dropped without a shutdown. That small writes
    /// are sent at once (TCP: `nodelay`), and that peers are missed that are gone without a word (keepalive),
    /// is its own business; calls that are not answered end a connection all the same. Default: TCP with both,
    /// to the first address of the host that answers.
    ///
    /// ```
    /// use tokio::net::TcpStream;
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// // The nodes of a Cluster in containers, which know only their own network.
    /// let storage = RedisStorage::cluster(["redis://10.0.0.1:7001"])
    ///     .connector(async |_host, port| {
    ///         let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    ///         stream.set_nodelay(true)?;
    ///         Ok(stream)
    ///     })
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn connector<S, F>(
        mut self,
        connect: impl Fn(String, u16) -> F + Send + Sync + 'static,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        self.address.dial = Some(Dial::new(connect));
        self
    }

    /// Whose certificates are trusted, in PEM: one issuer or several. From then on nobody else's
    /// are. Default: those that the system trusts. For URLs that begin with `rediss://`, as in the
    /// [example](Self).
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.address.certificates.roots = pem.into();
        self
    }

    /// The certificate to show to a server that asks for one (`tls-auth-clients`), with those of
    /// its issuers, and its private key, both in PEM. Default: none. For URLs that begin with
    /// `rediss://`.
    ///
    /// ```no_run
    /// use std::fs::read;
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let storage = RedisStorage::builder("rediss://redis.internal:6380")
    ///     .root_certificate(read("/etc/redis/ca.pem")?)
    ///     .client_certificate(read("/etc/shop/redis.pem")?, read("/etc/shop/redis.key")?)
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "tls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn client_certificate(
        mut self,
        certificate: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Self {
        self.address.certificates.client = Some((certificate.into(), key.into()));
        self
    }

    /// A lock counts as obtained only when so many replicas have it in their memory too (`WAIT`).
    /// Default 0: when the server has it. `timeout` is from 1 ms to 24 h, and of use only if shorter
    /// than [`storage_timeout`](crate::LockFactoryBuilder::storage_timeout).
    ///
    /// So a failover to one of these replicas forgets no lock. To be sure that it is one of them,
    /// `replicas` has to be all there are; each of them that is away then keeps everybody from
    /// getting a lock: callers that wait ask again until their time is over, others get an error
    /// ([`Unavailable`](crate::error::StorageErrorKind::Unavailable)), and what was not confirmed is
    /// given back. Locks that are held are not affected.
    ///
    /// What it costs: a lock that comes from the storage takes one more round trip, and that to the
    /// replicas, over connections of their own (up to 16, as many as locks are confirmed at the same
    /// time); so does one that is given by a message, which else takes none. A lock that goes from
    /// waiter to waiter inside this process costs nothing more. `docs/benchmarks.md` has a figure.
    ///
    /// Renewals and releases are not confirmed. So there is one gap left: a server that fails right
    /// after a renewal, before the replica has heard of it, and a holder that does not reach the
    /// new server for two thirds of its ttl, although others do. For the last third that holder
    /// counts on a renewal that was lost. Nor do replicas write to their disks before they answer.
    /// Where that matters, [fence](crate::LockGuard::fencing_token).
    pub fn replicas(mut self, replicas: u32, timeout: Duration) -> Self {
        self.replicas = (replicas > 0).then_some((replicas, timeout));
        self
    }

    /// Whether to look how the server is set up, a moment after the first connection to each run of
    /// it, and to warn (`tracing::warn!`) if it may evict locks or forgets them in a restart.
    /// Default `true`. It asks for `INFO`, and for `CONFIG GET save` if there is no append-only
    /// file; a user that may not do that is not warned, but shows in the server's `ACL LOG`.
    ///
    /// ```no_run
    /// use tower_distributed_lock::storage::RedisStorage;
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// // A server of somebody else, who knows that it keeps nothing on disk.
    /// let storage = RedisStorage::builder("redis://redis.internal").probe(false).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn probe(mut self, probe: bool) -> Self {
        self.probe = probe;
        self
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// As [`RedisStorage::connect`], and as [`RedisStorageBuilder::connect_lazily`].
    ///
    /// # Cancel safety
    ///
    /// As [`RedisStorage::connect`].
    pub async fn connect(self) -> Result<RedisStorage, StorageError> {
        let storage = self.connect_lazily()?;
        storage.connected().await?;
        Ok(storage)
    }

    /// Connects when the first lock is wanted, so that a service can start while its Redis is away.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if the URL or a certificate cannot be read, or a setting is out of its
    /// range.
    pub fn connect_lazily(self) -> Result<RedisStorage, StorageError> {
        let replicas = self.wanted_replicas()?;
        if !is_time_limit(self.connect_timeout) {
            return Err(refused(
                "the time-out for connections is not from 1 ms to 24 h",
            ));
        }
        let (timeout, probe) = (self.connect_timeout, self.probe);
        match &self.target {
            Target::Server(url) => {
                let server = Server::new(self.at(url).read()?);
                let connector = Connector::to_server(server, timeout).with_probe(probe);
                Ok(RedisStorage::over(connector, replicas))
            }
            Target::Sentinel { service, urls } => {
                let (urls, template) = self.read_urls(urls, Self::at_sentinel)?;
                let sentinels = Sentinels::new(service.clone(), urls, template);
                let connector = Connector::to_master(sentinels, timeout).with_probe(probe);
                Ok(RedisStorage::over(connector, replicas))
            }
            Target::Cluster(urls) => {
                let (urls, template) = self.read_urls(urls, Self::at)?;
                let setup = Setup {
                    connect_timeout: timeout,
                    probe,
                    replicas,
                };
                let cluster = Cluster::new(&urls, template, setup)?;
                Ok(RedisStorage::on(Servers::Cluster(Arc::new(cluster))))
            }
        }
    }

    fn wanted_replicas(&self) -> Result<Option<Replicas>, StorageError> {
        let Some((count, timeout)) = self.replicas else {
            return Ok(None);
        };
        if !is_time_limit(timeout) {
            return Err(refused(
                "the time-out for replicas is not from 1 ms to 24 h",
            ));
        }
        Ok(Some(Replicas { count, timeout }))
    }

    /// The servers' address, where it is at `url`.
    fn at(&self, url: &str) -> Address {
        Address {
            url: url.to_owned(),
            ..self.address.clone()
        }
    }

    /// That of a Sentinel, which has a user and a password of its own.
    fn at_sentinel(&self, url: &str) -> Address {
        Address {
            username: None,
            password: None,
            ..self.at(url)
        }
    }

    /// The URLs, and the first of them as a server's.
    fn read_urls(
        &self,
        urls: &[String],
        at: impl Fn(&Self, &str) -> Address,
    ) -> Result<(Vec<Endpoint>, Endpoint), StorageError> {
        let first = urls.first().ok_or_else(|| refused("no URL is given"))?;
        let template = self.at(first).read()?;
        let urls = urls.iter().map(|url| at(self, url).read());
        Ok((urls.collect::<Result<_, _>>()?, template))
    }
}

fn is_time_limit(time: Duration) -> bool {
    millis(time) > 0 && time <= LockOptions::MAX_DURATION
}

impl fmt::Debug for RedisStorageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address may hold a password.
        f.debug_struct("RedisStorageBuilder")
            .field("connect_timeout", &self.connect_timeout)
            .field("replicas", &self.replicas)
            .field("probe", &self.probe)
            .finish_non_exhaustive()
    }
}
