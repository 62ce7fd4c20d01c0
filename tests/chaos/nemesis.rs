//! What is done to servers, networks and clients while locks are taken.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    client::{Client, Orders, Record},
    kit::{LIMIT, Proxy, RedisServer, Sentinel, eventually, ms},
    record::now,
    world::{Deployment, World},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nemesis {
    KillDurable,
    KillForgets,
    PauseServer,
    Slow,
    Partition,
    HalfOpen,
    LostReplies,
    ScriptFlush,
    FlushAll,
    Eviction,
    Failover,
    FailoverConfirmed,
    ClientPause,
    ClientKill,
    SubscriberKill,
    ClockWithin,
    ClockSlow,
    ClockFast,
    ClockStep,
}

use Deployment::{Cluster, Redlock, Single};
use Nemesis::*;

impl Nemesis {
    pub const ALL: [Self; 19] = [
        KillDurable,
        KillForgets,
        PauseServer,
        Slow,
        Partition,
        HalfOpen,
        LostReplies,
        ScriptFlush,
        FlushAll,
        Eviction,
        Failover,
        FailoverConfirmed,
        ClientPause,
        ClientKill,
        SubscriberKill,
        ClockWithin,
        ClockSlow,
        ClockFast,
        ClockStep,
    ];

    pub fn name(self) -> &'static str {
        match self {
            KillDurable => "kill-durable",
            KillForgets => "kill-forgets",
            PauseServer => "pause-server",
            Slow => "slow",
            Partition => "partition",
            HalfOpen => "half-open",
            LostReplies => "lost-replies",
            ScriptFlush => "script-flush",
            FlushAll => "flushall",
            Eviction => "eviction",
            Failover => "failover",
            FailoverConfirmed => "failover-confirmed",
            ClientPause => "client-pause",
            ClientKill => "client-kill",
            SubscriberKill => "subscriber-kill",
            ClockWithin => "clock-within",
            ClockSlow => "clock-slow",
            ClockFast => "clock-fast",
            ClockStep => "clock-step",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == name)
    }

    /// Where it makes sense. Sentinel and Cluster name their servers themselves, so nothing stands
    /// between those and the clients.
    pub fn hits(self, deployment: Deployment) -> bool {
        match self {
            Failover => matches!(deployment, Deployment::Sentinel | Cluster),
            FailoverConfirmed => deployment == Deployment::Sentinel,
            ScriptFlush | ClientPause | ClientKill | SubscriberKill => true,
            ClockWithin | ClockSlow | ClockFast => matches!(deployment, Single | Redlock),
            ClockStep => deployment == Single,
            _ => matches!(deployment, Single | Redlock),
        }
    }

    /// Whether it breaks what the promise of one holder at a time rests on: that the server keeps
    /// the lock for its ttl, and that its clock runs at our clock's rate within 1 %.
    pub fn breaks(self) -> bool {
        matches!(
            self,
            KillForgets | FlushAll | Eviction | Failover | ClockFast | ClockStep
        )
    }

    /// Whether another server takes a master's place.
    pub fn replaces_masters(self) -> bool {
        matches!(self, Failover | FailoverConfirmed)
    }

    /// Whether it goes on from the first to the last moment.
    pub fn is_lasting(self) -> bool {
        matches!(self, ClockWithin | ClockSlow | ClockFast)
    }

    /// By how many millionths a server's clock is faster than ours.
    pub fn clock_rate(self) -> Option<i64> {
        match self {
            ClockWithin => Some(8_000),
            ClockSlow => Some(-300_000),
            ClockFast => Some(300_000),
            ClockStep => Some(0),
            _ => None,
        }
    }

    /// How many replicas are asked to confirm.
    pub fn replicas(self) -> u32 {
        u32::from(self == FailoverConfirmed)
    }
}

/// The clients of a run.
pub struct Fleet {
    pub clients: Vec<Client>,
    pub orders: Vec<Orders>,
    pub record: Record,
    /// How many were started in the place of others.
    pub replaced: usize,
}

/// One fault, from its beginning to its end: when this returns, all is as it was before. Answers
/// when it began.
pub async fn strike(
    nemesis: Nemesis,
    world: &mut World,
    fleet: &mut Fleet,
    rng: &mut fastrand::Rng,
    ttl: Duration,
) -> u64 {
    // From a moment to well beyond the ttl.
    let time = ttl.mul_f64(0.1 + 2.0 * rng.f64());
    let server = rng.usize(..world.all().len());
    let client = rng.usize(..fleet.clients.len());
    let from = now();
    match nemesis {
        KillDurable => {
            world.servers[server].kill();
            sleep(time).await;
            world.servers[server].restart().await;
        }
        KillForgets => {
            world.servers[server].kill();
            sleep(time / 4).await;
            world.servers[server].restart().await;
        }
        PauseServer => {
            world.servers[server].pause();
            sleep(time).await;
            world.servers[server].resume();
        }
        Slow => {
            let ways = ways(world, rng);
            // Longer than the time limits of a call, now and then.
            let delay = ms(10 + rng.u64(..300));
            ways.iter().for_each(|way| way.delay(delay));
            sleep(time).await;
            ways.iter().for_each(|way| way.delay(Duration::ZERO));
        }
        Partition => {
            let ways = ways(world, rng);
            ways.iter().for_each(|way| way.hold());
            sleep(time).await;
            ways.iter().for_each(|way| way.release());
        }
        HalfOpen => ways(world, rng).iter().for_each(|way| way.black_hole()),
        LostReplies => ways(world, rng).iter().for_each(|way| way.lose_replies()),
        ScriptFlush => {
            for _ in 0..20 {
                for master in world.masters().await {
                    let () = master.run("SCRIPT FLUSH SYNC").await;
                }
                sleep(ms(rng.u64(..20))).await;
            }
        }
        FlushAll => {
            let () = world.servers[server].run("FLUSHALL").await;
        }
        Eviction => {
            let server = &world.servers[server];
            let () = server.run("CONFIG SET maxmemory-policy volatile-lru").await;
            let () = server.run("CONFIG SET maxmemory 1").await;
            sleep(ms(rng.u64(..50))).await;
            let () = server.run("CONFIG SET maxmemory 0").await;
        }
        Failover | FailoverConfirmed => fail_over(world, rng).await,
        ClientPause => {
            fleet.clients[client].pause();
            sleep(time).await;
            fleet.clients[client].resume();
        }
        ClientKill => {
            fleet.clients[client].kill();
            sleep(time / 4).await;
            fleet.replaced += 1;
            let mut orders = fleet.orders[client].clone();
            orders.name += &format!("+{}", fleet.replaced);
            fleet.clients[client] = Client::start(client, &orders, &fleet.record);
        }
        SubscriberKill => {
            for _ in 0..5 {
                for master in world.masters().await {
                    cut_subscribers(master).await;
                }
                sleep(ms(rng.u64(..50))).await;
            }
        }
        ClockWithin | ClockSlow | ClockFast => sleep(time).await,
        ClockStep => {
            let clock = world.clock.as_mut().expect("it has one");
            clock.forward(time);
        }
    }
    from
}

/// All but the Sentinels': one that loses its subscription while its last ping is half a second old
/// takes the master for dead.
async fn cut_subscribers(master: &RedisServer) {
    let subscribers: String = master.run("CLIENT LIST TYPE pubsub").await;
    for subscriber in subscribers.lines() {
        let mut words = subscriber.split(' ');
        if let Some(id) = words.next().and_then(|word| word.strip_prefix("id="))
            && !words.any(|word| word.starts_with("name=sentinel-"))
        {
            // It may be gone by now.
            let _: u64 = master.run(&format!("CLIENT KILL ID {id}")).await;
        }
    }
}

/// The ways of one client or of all, to one server or to all.
fn ways<'a>(world: &'a World, rng: &mut fastrand::Rng) -> Vec<&'a Proxy> {
    let client = rng.bool().then(|| rng.usize(..world.proxies.len()));
    let server = rng.bool().then(|| rng.usize(..world.servers.len()));
    let mut ways = Vec::new();
    for (number, proxies) in world.proxies.iter().enumerate() {
        if client.is_none_or(|client| client == number) {
            let chosen = proxies.iter().enumerate();
            let chosen = chosen.filter(|(number, _)| server.is_none_or(|server| server == *number));
            ways.extend(chosen.map(|(_, proxy)| proxy));
        }
    }
    ways
}

/// A master is killed, or stands still until it has been replaced, and comes back as a replica.
async fn fail_over(world: &mut World, rng: &mut fastrand::Rng) {
    let pauses = rng.bool();
    let is_master = async |server: &RedisServer| {
        server.is_up() && server.info("role").await.as_deref() == Some("master")
    };
    if let Some(sentinel) = &mut world.sentinel {
        let old = usize::from(!is_master(&sentinel.servers[0]).await);
        match pauses {
            true => sentinel.servers[old].pause(),
            false => sentinel.servers[old].kill(),
        }
        Sentinel::is_master(sentinel, 1 - old).await;
        match pauses {
            true => sentinel.servers[old].resume(),
            false => sentinel.servers[old].restart().await,
        }
        sentinel.follow().await;
    }
    if let Some(cluster) = &mut world.cluster {
        let mut masters = Vec::new();
        for (number, node) in cluster.nodes.iter().enumerate() {
            if is_master(node).await {
                masters.push(number);
            }
        }
        let old = masters[rng.usize(..masters.len())];
        // A node that stands still would keep the look at all of them waiting.
        cluster.nodes[old].kill();
        cluster.is_whole(5).await;
        cluster.nodes[old].restart().await;
        let started = Instant::now();
        cluster.is_whole(6).await;
        eventually("it has become a replica", LIMIT, async || {
            started.elapsed() > ms(200) && !is_master(&cluster.nodes[old]).await
        })
        .await;
    }
}
