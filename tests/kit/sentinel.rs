//! Redis Sentinel: a master, its replicas, and three Sentinels that watch them.

use std::collections::HashMap;

use super::{LIMIT, RedisServer, ServerOptions, Tls, eventually, ms};

/// All of them are processes, which end with this value.
pub struct Sentinel {
    /// The first is the master at the beginning. After it, the first that is up becomes the next.
    pub servers: Vec<RedisServer>,
    pub sentinels: Vec<RedisServer>,
}

impl Sentinel {
    /// The name of the service.
    pub const SERVICE: &str = "locks";

    /// A master counts as down when it has not answered for so many milliseconds.
    const DOWN_AFTER: u64 = 500;

    /// A master and a replica.
    pub async fn start() -> Self {
        Self::start_with(2, &[], None).await
    }

    /// The same, where all speak TLS to each other. Whoever connects to them has to show a
    /// certificate of `tls.clients`, as they do.
    pub async fn start_with_tls(tls: Tls) -> Self {
        let settings = ["--tls-replication", "yes"];
        Self::start_with(2, &settings, Some(tls)).await
    }

    /// A master and two replicas. A master without any takes no writes: it may have been replaced.
    pub async fn start_guarded() -> Self {
        Self::start_with(3, &["--min-replicas-to-write", "1"], None).await
    }

    /// Returns when the Sentinels know the replicas and each other.
    async fn start_with(count: usize, settings: &[&str], tls: Option<Tls>) -> Self {
        let mut servers: Vec<RedisServer> = Vec::new();
        for number in 0..count {
            // The lowest is the first to become a master.
            let priority = [100, 100, 200][number].to_string();
            let mut settings = settings.to_vec();
            settings.extend(["--replica-priority", &priority]);
            // Or the first snapshot is sent after five seconds.
            settings.extend(["--repl-diskless-sync-delay", "0"]);
            let options = ServerOptions {
                settings: settings.into_iter().map(str::to_owned).collect(),
                tls: tls.clone(),
                ..ServerOptions::default()
            };
            let server = RedisServer::start_with(options).await;
            if let Some(master) = servers.first() {
                let replicate = format!("REPLICAOF 127.0.0.1 {}", master.best_port());
                let () = server.run(&replicate).await;
            }
            servers.push(server);
        }
        let mut this = Self {
            servers,
            sentinels: Vec::new(),
        };
        this.are_in_step().await;

        let down_after = Self::DOWN_AFTER;
        let (name, port) = (Self::SERVICE, this.servers[0].best_port());
        let configuration = format!(
            "sentinel monitor {name} 127.0.0.1 {port} 2\n\
             sentinel down-after-milliseconds {name} {down_after}\n\
             sentinel failover-timeout {name} 3000\n"
        );
        let settings = match tls {
            Some(_) => vec!["--tls-replication".to_owned(), "yes".to_owned()],
            None => Vec::new(),
        };
        for _ in 0..3 {
            let sentinel = RedisServer::start_with(ServerOptions {
                settings: settings.clone(),
                sentinel: Some(configuration.clone()),
                tls: tls.clone(),
                ..ServerOptions::default()
            });
            let sentinel = sentinel.await;
            // Only how often they look at each other and at the servers. Before Redis 7 that cannot
            // be set, and all takes longer.
            let _: Result<(), _> = sentinel
                .try_run("SENTINEL DEBUG INFO-PERIOD 200 PUBLISH-PERIOD 200 ASK-PERIOD 200")
                .await;
            this.sentinels.push(sentinel);
        }
        let known = async |sentinel: &RedisServer, who: &str| {
            let ask = format!("SENTINEL {who} {name}");
            sentinel.run::<Vec<redis::Value>>(&ask).await.len()
        };
        let quorum = format!("SENTINEL CKQUORUM {name}");
        for sentinel in &this.sentinels {
            eventually("the Sentinels know each other", LIMIT, async || {
                known(sentinel, "SENTINELS").await == 2
                    && known(sentinel, "REPLICAS").await == count - 1
                    && sentinel.try_run::<String>(&quorum).await.is_ok()
            })
            .await;
        }
        this.are_known_to_be_well().await;
        this
    }

    pub fn urls(&self) -> Vec<String> {
        self.sentinels.iter().map(RedisServer::best_url).collect()
    }

    /// The replicas have all that the master has. Under load that may never be seen.
    pub async fn are_in_step(&self) {
        self.follow().await;
        // A replica that has been given all that there was is sent nothing before it has said so,
        // which may be a second later. Until then it is in step only with a master that is idle.
        for server in &self.servers {
            let _: u64 = server.run("PUBLISH kit anything").await;
        }
        eventually("the replicas are in step", LIMIT, async || {
            let mut offsets = Vec::new();
            for server in &self.servers {
                offsets.push(server.info("master_repl_offset").await);
            }
            offsets.windows(2).all(|offsets| offsets[0] == offsets[1])
        })
        .await;
    }

    /// All servers are up, and all but the master follow it.
    pub async fn follow(&self) {
        eventually("the replicas follow", LIMIT, async || {
            let mut links = 0;
            for server in &self.servers {
                let link = server.info("master_link_status").await;
                links += usize::from(link.as_deref() == Some("up"));
            }
            links == self.servers.len() - 1
        })
        .await;
        self.are_known_to_be_well().await;
    }

    /// All Sentinels have seen that all servers are up and follow the master. Before that, one may
    /// pass over the server whose turn it is.
    async fn are_known_to_be_well(&self) {
        let name = Self::SERVICE;
        let (master, replicas) = (
            format!("SENTINEL MASTER {name}"),
            format!("SENTINEL REPLICAS {name}"),
        );
        type Fields = HashMap<String, String>;
        for sentinel in &self.sentinels {
            let is_well = |server: &Fields, flags| server["flags"] == flags;
            eventually("the Sentinels know that all are well", LIMIT, async || {
                let master: Fields = sentinel.run(&master).await;
                let replicas: Vec<Fields> = sentinel.run(&replicas).await;
                let well = replicas.iter().filter(|replica| {
                    is_well(replica, "slave")
                        && replica["master-link-status"] == "ok"
                        && replica["master-port"] == master["port"]
                });
                is_well(&master, "master") && well.count() == self.servers.len() - 1
            })
            .await;
        }
    }

    /// The server with this number is a master, and all Sentinels say so.
    pub async fn is_master(&self, number: usize) {
        let port = self.servers[number].best_port().to_string();
        let ask = format!("SENTINEL GET-MASTER-ADDR-BY-NAME {}", Self::SERVICE);
        for sentinel in &self.sentinels {
            // Each time that they do not agree, they wait for six seconds.
            let mut said = String::new();
            let knows = async {
                while said != port {
                    said = sentinel.run::<(String, String)>(&ask).await.1;
                    tokio::time::sleep(ms(5)).await;
                }
            };
            let known = tokio::time::timeout(3 * LIMIT, knows).await;
            assert!(
                known.is_ok(),
                "the master is {said}, not {port}, says Sentinel"
            );
        }
        eventually("it is the master", LIMIT, async || {
            self.servers[number].info("role").await.as_deref() == Some("master")
        })
        .await;
    }
}
