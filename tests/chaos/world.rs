//! The servers that are attacked, and the ways to them.

use std::{env, fs, io::Write, path::PathBuf, process::Command, time::Duration};

use futures_util::future::join_all;

use super::{
    kit::{Cluster, Proxy, RedisServer, Sentinel, ServerOptions},
    nemesis::Nemesis,
};

/// How the servers belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deployment {
    Single,
    /// Three servers.
    Redlock,
    /// A master and a replica, three Sentinels.
    Sentinel,
    /// Three masters, a replica each.
    Cluster,
}

impl Deployment {
    pub const ALL: [Self; 4] = [Self::Single, Self::Redlock, Self::Sentinel, Self::Cluster];

    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Redlock => "redlock",
            Self::Sentinel => "sentinel",
            Self::Cluster => "cluster",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == name)
    }

    /// How long locks last. With failovers longer: some have to outlive one.
    pub fn ttls(self) -> &'static [u64] {
        match self {
            Self::Single | Self::Redlock => &[500, 800, 1_200],
            Self::Sentinel | Self::Cluster => &[1_500, 4_000],
        }
    }
}

/// All of it ends with this value.
pub struct World {
    /// Of a single server or a Redlock.
    pub servers: Vec<RedisServer>,
    /// For each client, the way to each of those.
    pub proxies: Vec<Vec<Proxy>>,
    pub sentinel: Option<Sentinel>,
    pub cluster: Option<Cluster>,
    pub clock: Option<Clock>,
    /// What the locks protect.
    pub store: RedisServer,
}

impl World {
    pub async fn start(deployment: Deployment, nemesis: Nemesis, clients: usize) -> Self {
        let mut this = Self {
            servers: Vec::new(),
            proxies: Vec::new(),
            sentinel: None,
            cluster: None,
            clock: nemesis.clock_rate().map(Clock::build),
            store: RedisServer::start().await,
        };
        match deployment {
            Deployment::Single | Deployment::Redlock => {
                let count = if deployment == Deployment::Single {
                    1
                } else {
                    3
                };
                this.servers = join_all((0..count).map(|number| {
                    // Of several clocks one is wrong.
                    let clock = this.clock.as_ref().filter(|_| number == 0);
                    RedisServer::start_with(ServerOptions {
                        durable: nemesis == Nemesis::KillDurable,
                        environment: clock.map(Clock::environment).unwrap_or_default(),
                        ..ServerOptions::default()
                    })
                }))
                .await;
                this.proxies = (0..clients)
                    .map(|_| this.servers.iter().map(Proxy::to).collect())
                    .collect();
            }
            Deployment::Sentinel => this.sentinel = Some(Sentinel::start().await),
            Deployment::Cluster => this.cluster = Some(Cluster::start().await),
        }
        this
    }

    pub fn urls(&self, client: usize) -> Vec<String> {
        match (&self.sentinel, &self.cluster) {
            (Some(sentinel), _) => sentinel.urls(),
            (_, Some(cluster)) => cluster.urls(),
            _ => self.proxies[client].iter().map(Proxy::url).collect(),
        }
    }

    /// All servers that hold locks, also those that are down.
    pub fn all(&self) -> &[RedisServer] {
        match (&self.sentinel, &self.cluster) {
            (Some(sentinel), _) => &sentinel.servers,
            (_, Some(cluster)) => &cluster.nodes,
            _ => &self.servers,
        }
    }

    /// Those that take writes.
    pub async fn masters(&self) -> Vec<&RedisServer> {
        let mut masters = Vec::new();
        for server in self.all() {
            if server.is_up() && server.info("role").await.as_deref() == Some("master") {
                masters.push(server);
            }
        }
        masters
    }

    /// What each server and Sentinel has written since it was started, with a name for it.
    pub fn logs(&self) -> Vec<(String, String)> {
        let named = |name: &str, servers: &[RedisServer]| -> Vec<_> {
            let servers = servers.iter().enumerate();
            servers
                .map(|(number, server)| (format!("{name}-{number}"), server.log()))
                .collect()
        };
        let sentinels = self.sentinel.as_ref().map_or(&[][..], |it| &it.sentinels);
        [named("server", self.all()), named("sentinel", sentinels)].concat()
    }

    /// What the clients should not have left: keys but for fencing counters, and subscriptions.
    pub async fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for server in self.masters().await {
            let keys: Vec<String> = server.run("KEYS *").await;
            // Those of a Cluster have a number: `{distributed-locks:7}:fence`.
            left.extend(keys.into_iter().filter(|key| !key.ends_with("}:fence")));
            let channels: Vec<String> = server.run("PUBSUB CHANNELS distributed-locks:*").await;
            left.extend(channels);
        }
        left
    }
}

/// A wall clock for redis-servers that runs as it is told. Its files end with this value.
pub struct Clock {
    folder: PathBuf,
    ppm: i64,
    forward: Duration,
}

impl Clock {
    /// Faster by so many millionths. Needs the C compiler that Rust links with.
    fn build(ppm: i64) -> Self {
        let folder = env::temp_dir();
        let folder = folder.join(format!(
            "chaos-clock-{}-{}",
            std::process::id(),
            fastrand::u64(..)
        ));
        fs::create_dir(&folder).expect("a directory can be made");
        fs::write(folder.join("clock.c"), include_str!("clock.c")).expect("it is ours");
        fs::write(folder.join("step"), 0_i64.to_ne_bytes()).expect("it is ours");
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o", "clock.so", "clock.c"])
            .current_dir(&folder)
            .status()
            .expect("cc can be run");
        assert!(status.success(), "cc: {status}");
        Self {
            folder,
            ppm,
            forward: Duration::ZERO,
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        let path = |name| self.folder.join(name).display().to_string();
        vec![
            ("LD_PRELOAD".to_owned(), path("clock.so")),
            ("CLOCK_PPM".to_owned(), self.ppm.to_string()),
            ("CLOCK_STEP".to_owned(), path("step")),
        ]
    }

    /// Sets it forward.
    pub fn forward(&mut self, by: Duration) {
        self.forward += by;
        // In place: the servers have mapped this very file.
        let file = fs::OpenOptions::new()
            .write(true)
            .open(self.folder.join("step"));
        let nanos = i64::try_from(self.forward.as_nanos()).expect("a short step");
        file.and_then(|mut file| file.write_all(&nanos.to_ne_bytes()))
            .expect("it is ours");
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
