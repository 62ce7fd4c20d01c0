//! A Redis Cluster: three masters with a replica each.

use redis::{RedisError, Value};

use super::{LIMIT, RedisServer, ServerOptions, Tls, eventually};

/// All nodes are processes, which end with this value.
pub struct Cluster {
    /// Masters at the beginning are the first three; the replica of each is the one three further.
    pub nodes: Vec<RedisServer>,
}

impl Cluster {
    const MASTERS: usize = 3;

    /// Returns when all nodes know each other and their slots, and the replicas follow.
    pub async fn start() -> Self {
        Self::start_with(&[], None).await
    }

    /// The same, where all speak TLS to each other. Whoever connects to them has to show a
    /// certificate of `tls.clients`, as they do.
    pub async fn start_with_tls(tls: Tls) -> Self {
        let settings = ["--tls-cluster", "yes", "--tls-replication", "yes"];
        Self::start_with(&settings, Some(tls)).await
    }

    async fn start_with(more: &[&str], tls: Option<Tls>) -> Self {
        let settings = [
            ["--cluster-enabled", "yes"],
            // In milliseconds. A master counts as down when it has not answered for so long.
            ["--cluster-node-timeout", "1000"],
            // However long ago it heard from its master, a replica may take its place.
            ["--cluster-replica-validity-factor", "0"],
            ["--cluster-allow-replica-migration", "no"],
            ["--repl-diskless-sync-delay", "0"],
        ];
        let settings = settings.concat();
        let settings = settings.iter().chain(more);
        let options = ServerOptions {
            settings: settings.map(|word| (*word).to_owned()).collect(),
            tls,
            ..ServerOptions::default()
        };
        let mut nodes = Vec::new();
        for number in 0..2 * Self::MASTERS {
            let node = RedisServer::start_with(options.clone()).await;
            // Different ones, or the nodes have to come to an agreement first.
            let epoch = format!("CLUSTER SET-CONFIG-EPOCH {}", number + 1);
            let () = node.run(&epoch).await;
            nodes.push(node);
        }
        let this = Self { nodes };
        for (number, node) in this.nodes.iter().enumerate() {
            for other in &this.nodes[..number] {
                let meet = format!("CLUSTER MEET 127.0.0.1 {}", other.best_port());
                let () = node.run(&meet).await;
            }
        }
        for (number, node) in this.nodes[..Self::MASTERS].iter().enumerate() {
            let slots = number * 16_384 / Self::MASTERS..(number + 1) * 16_384 / Self::MASTERS;
            let mut command = "CLUSTER ADDSLOTS".to_owned();
            for slot in slots {
                command += &format!(" {slot}");
            }
            let () = node.run(&command).await;
        }
        for number in Self::MASTERS..2 * Self::MASTERS {
            let node = &this.nodes[number];
            let master = this.id(number - Self::MASTERS).await;
            eventually("they know each other", LIMIT, async || {
                let replicate = format!("CLUSTER REPLICATE {master}");
                node.try_run::<()>(&replicate).await.is_ok()
            })
            .await;
        }
        this.is_whole(2 * Self::MASTERS).await;
        this
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RedisServer::best_url).collect()
    }

    async fn id(&self, number: usize) -> String {
        self.nodes[number].run("CLUSTER MYID").await
    }

    /// So many nodes are up, agree on the slots, and have their replicas at hand.
    pub async fn is_whole(&self, up: usize) {
        eventually("the cluster is whole", LIMIT, async || {
            let mut whole = 0;
            let mut views = Vec::new();
            for node in self.up() {
                let info: String = node.run("CLUSTER INFO").await;
                let link = node.info("master_link_status").await;
                let role = node.info("role").await;
                let follows = role.as_deref() == Some("master") || link.as_deref() == Some("up");
                let knows = info.contains("cluster_known_nodes:6\r\n");
                if info.contains("cluster_state:ok") && knows && follows {
                    whole += 1;
                }
                let mut masters: Vec<(u16, u16, u16)> = slots(node).await;
                masters.sort_unstable();
                views.push(masters);
            }
            whole == up && views.windows(2).all(|views| views[0] == views[1])
        })
        .await;
    }

    /// Nodes whose process is there, also if it stands still.
    pub fn up(&self) -> impl Iterator<Item = &RedisServer> {
        self.nodes.iter().filter(|node| node.is_up())
    }

    pub async fn slot(&self, key: &str) -> u16 {
        let node = self.up().next().expect("a node is up");
        node.run(&format!("CLUSTER KEYSLOT {key}")).await
    }

    /// Which node has the slot, in the eyes of this one.
    pub async fn owner_says(&self, node: usize, slot: u16) -> usize {
        let slots = slots(&self.nodes[node]).await;
        let owner = slots
            .iter()
            .find(|(first, last, _)| (*first..=*last).contains(&slot));
        let (_, _, port) = owner.expect("somebody has the slot");
        let number = self.nodes.iter().position(|node| node.port() == *port);
        number.expect("it is one of the nodes")
    }

    /// Which node has the lock's slot.
    pub async fn owner(&self, key: &str) -> usize {
        let slot = self.slot(&format!("distributed-locks:{key}")).await;
        let node = self.nodes.iter().position(RedisServer::is_up);
        self.owner_says(node.expect("a node is up"), slot).await
    }

    /// The node that has the lock.
    pub async fn of(&self, key: &str) -> &RedisServer {
        &self.nodes[self.owner(key).await]
    }

    /// A key of a lock that this node has.
    pub async fn key_at(&self, node: usize) -> String {
        let mut number = 0;
        loop {
            let key = format!("key-{number}");
            if self.owner(&key).await == node {
                return key;
            }
            number += 1;
        }
    }

    /// How many keys there are, but for fencing counters.
    pub async fn keys(&self) -> usize {
        let mut keys = 0;
        for node in self.up() {
            if node.info("role").await.as_deref() == Some("master") {
                keys += node.keys().await;
            }
        }
        keys
    }

    /// Begins to move a slot: from now on what is not there any more is at the other.
    pub async fn begin_to_move(&self, slot: u16, from: usize, to: usize) {
        let [source, target] = [self.id(from).await, self.id(to).await];
        let importing = format!("CLUSTER SETSLOT {slot} IMPORTING {source}");
        let () = self.nodes[to].run(&importing).await;
        let migrating = format!("CLUSTER SETSLOT {slot} MIGRATING {target}");
        let () = self.nodes[from].run(&migrating).await;
    }

    /// Moves the keys of a slot. Answers how many.
    pub async fn move_keys(&self, slot: u16, from: usize, to: usize) -> usize {
        let mut moved = 0;
        loop {
            let list = format!("CLUSTER GETKEYSINSLOT {slot} 10");
            let keys: Vec<String> = self.nodes[from].run(&list).await;
            if keys.is_empty() {
                return moved;
            }
            for key in keys {
                let port = self.nodes[to].best_port();
                let migrate = format!("MIGRATE 127.0.0.1 {port} {key} 0 5000");
                let () = self.nodes[from].run(&migrate).await;
                moved += 1;
            }
        }
    }

    /// The slot is the other's. All of its keys have to be there.
    pub async fn end_of_move(&self, slot: u16, from: usize, to: usize) -> Result<(), RedisError> {
        let owner = format!("CLUSTER SETSLOT {slot} NODE {}", self.id(to).await);
        self.nodes[to].try_run::<()>(&owner).await?;
        self.nodes[from].try_run::<()>(&owner).await
    }

    /// Moves a slot with all its keys, as `redis-cli --cluster reshard` does. Answers how many keys
    /// there were.
    pub async fn move_slot(&self, slot: u16, from: usize, to: usize) -> usize {
        self.begin_to_move(slot, from, to).await;
        let mut moved = 0;
        loop {
            moved += self.move_keys(slot, from, to).await;
            // Unless there is a new key meanwhile.
            if self.end_of_move(slot, from, to).await.is_ok() {
                return moved;
            }
        }
    }
}

/// First and last slot, and the port of their master.
async fn slots(node: &RedisServer) -> Vec<(u16, u16, u16)> {
    let ranges: Vec<Vec<Value>> = node.run("CLUSTER SLOTS").await;
    let ranges = ranges.into_iter().map(|range| {
        let [
            Value::Int(first),
            Value::Int(last),
            Value::Array(master),
            ..,
        ] = &range[..]
        else {
            panic!("{range:?}");
        };
        let Value::Int(port) = master[1] else {
            panic!("{range:?}");
        };
        (*first as u16, *last as u16, port as u16)
    });
    ranges.collect()
}
