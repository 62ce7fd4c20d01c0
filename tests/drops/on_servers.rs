//! Over real Redis servers: every command about locks and every reply and message, where the line
//! stands still while the caller is dropped.

use std::{
    env,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use tokio::{
    runtime::{self, Handle},
    sync::{oneshot, watch},
    time::Instant,
};
use tower_distributed_lock::{
    LockFactory, LockOptions, Redlock, Unlocked,
    storage::{LockStorage, RedisStorage},
};

use super::{
    Fate, Plan, Points,
    kit::{CommandProxy, LONG, Onward, Passing, RedisServer, Watch, asking, eventually},
    ms,
    scenes::{DRAINS, LAYERS, LOCKS, Scene},
    stage::{Patience, Setup, Stage, drive, no_task_is_left, nothing_is_left},
    visit_all,
};

/// How many runs go on at the same time: mostly they wait for a call that is given up.
const THREADS: usize = 10;

/// A call that finds no answer is given up after this. A busy machine is not a line that is lost.
const CALL: Duration = ms(1_000);

/// Far above what a busy machine needs, and far below the ttl.
const PATIENCE: Duration = Duration::from_secs(20);

/// The point at which the line stands still.
#[derive(Default)]
struct Stop {
    /// The server, and how to let it go on.
    held: Option<(usize, oneshot::Sender<Onward>)>,
    /// The caller is gone already: what it has left behind meets its fate at once.
    is_over: bool,
}

/// A connection to each server, to look at it.
#[derive(Clone)]
struct Looks {
    servers: Vec<MultiplexedConnection>,
    prefix: String,
}

impl Looks {
    async fn at(servers: &[RedisServer], prefix: &str) -> Self {
        let connections = servers.iter().map(async |server| {
            let client = redis::Client::open(server.url()).unwrap();
            client.get_multiplexed_async_connection().await.unwrap()
        });
        Self {
            servers: join_all(connections).await,
            prefix: prefix.to_owned(),
        }
    }

    /// Locks and queues. Fencing counters stay.
    async fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        for server in &self.servers {
            let mut command = redis::cmd("KEYS");
            command.arg(format!("*{}:*", self.prefix));
            let found: Vec<String> = command.query_async(&mut server.clone()).await.unwrap();
            keys.extend(found);
        }
        keys.retain(|key| !key.ends_with(":fence"));
        keys
    }

    /// Processes that are heard of by each server.
    async fn inboxes(&self) -> usize {
        let mut inboxes = 0;
        for server in &self.servers {
            let mut command = redis::cmd("PUBSUB");
            command.arg("CHANNELS").arg(format!("{}:*", self.prefix));
            let found: Vec<String> = command.query_async(&mut server.clone()).await.unwrap();
            inboxes = inboxes.max(found.len());
        }
        inboxes
    }

    async fn queued(&self, key: &str) -> usize {
        let mut queued = 0;
        for server in &self.servers {
            let queue = format!("{{{}:{key}}}:queue", self.prefix);
            let mut command = redis::cmd("GET");
            command.arg(queue);
            let queue: Option<String> = command.query_async(&mut server.clone()).await.unwrap();
            queued = queued.max(queue.unwrap_or_default().lines().count());
        }
        queued
    }
}

fn onward(fate: Fate) -> Onward {
    match fate {
        Fate::Through => Onward::Goes,
        Fate::NotSent | Fate::ReplyLost => Onward::Lost,
        Fate::NotSentFails | Fate::ReplyFails => Onward::Closed,
    }
}

fn factory(urls: &[String], prefix: &str, setup: Setup) -> LockFactory {
    fn build(storage: impl LockStorage, prefix: &str, setup: Setup) -> LockFactory {
        let builder = LockFactory::builder(storage).key_prefix(prefix);
        setup.apply(builder.storage_timeout(CALL)).build().unwrap()
    }
    let storage = |url: &String| {
        // Its look at how the server is set up is a task that waits for 5 s on a line that is lost.
        let builder = RedisStorage::builder(url.clone()).probe(false);
        builder.connect_lazily().unwrap()
    };
    match urls {
        [url] => build(storage(url), prefix, setup),
        _ => {
            let builder = urls
                .iter()
                .fold(Redlock::builder(), |all, url| all.node(storage(url)));
            build(builder.build().unwrap(), prefix, setup)
        }
    }
}

fn options(servers: &[RedisServer]) -> LockOptions {
    // On one server whoever waits is told; on several it may have to ask.
    let interval = if servers.len() == 1 { 10_000 } else { 50 };
    asking(LONG, Duration::from_secs(60), ms(interval))
}

fn run(servers: &[RedisServer], scene: &Scene, plan: Option<&Plan>) -> Vec<String> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(play(servers, scene, plan))
}

async fn play(servers: &[RedisServer], scene: &Scene, plan: Option<&Plan>) -> Vec<String> {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let prefix = format!("run-{}", RUNS.fetch_add(1, SeqCst));
    let looks = Looks::at(servers, &prefix).await;
    let own_tasks = Handle::current().metrics().num_alive_tasks();

    let points = Arc::new(Points::new(plan.map(|plan| plan.point)));
    let stop = Arc::new(Mutex::new(Stop::default()));
    let proxies: Vec<_> = servers
        .iter()
        .enumerate()
        .map(|(node, server)| {
            let (points, stop) = (Arc::clone(&points), Arc::clone(&stop));
            let fate = plan.map_or(Fate::Through, |plan| plan.fates[node]);
            let watch: Watch = Arc::new(move |passing| {
                let mut stop = stop.lock().unwrap();
                points.pass(|| name(&passing, node)).then(|| {
                    let (word, held) = oneshot::channel();
                    if stop.is_over {
                        let _ = word.send(onward(fate));
                    } else {
                        stop.held = Some((node, word));
                    }
                    held
                })
            });
            CommandProxy::to(server, watch)
        })
        .collect();
    let ways: Vec<_> = proxies.iter().map(CommandProxy::url).collect();
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();

    let options = options(servers);
    let here = factory(&ways, &prefix, scene.setup);
    // Connected, with the scripts known and the fencing counters right.
    {
        let lock = here.create_lock("first").unwrap();
        let guard = lock.lock(options).await.expect("the first lock");
        eventually("it listens", PATIENCE, async || looks.inboxes().await == 1).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        if scene.setup.linger.is_some() {
            // It lingers, and another process wants it.
            let there = factory(&urls, &prefix, Setup::default());
            let lock = there.create_lock("first").unwrap();
            drop(lock.lock(options).await.expect("what lingers is given up"));
        }
    }
    eventually("the first lock is free", PATIENCE, async || {
        here.keys() == 0 && looks.keys().await.is_empty() && looks.inboxes().await == 1
    })
    .await;
    let tasks = Handle::current().metrics().num_alive_tasks();

    let dropped = watch::Sender::new(None);
    let queue = looks.clone();
    let stage = Stage {
        here: here.clone(),
        there: factory(&urls, &prefix, Setup::default()),
        elsewhere: factory(&urls, &prefix, Setup::default()),
        options,
        limit: PATIENCE,
        work: ms(5),
        queued: Arc::new(move |key| {
            let queue = queue.clone();
            Box::pin(async move { queue.queued(key).await })
        }),
        has_queue: true,
        dropped: dropped.subscribe(),
    };
    let next = factory(&urls, &prefix, Setup::default());

    let mut act = (scene.set)(stage.clone()).await;
    let caller = std::mem::replace(&mut act.caller, Box::pin(std::future::pending()));
    let left = drive(&points, caller).await;
    dropped.send_replace(Some(Instant::now()));
    drop(left);
    let held = {
        let mut stop = stop.lock().unwrap();
        stop.is_over = true;
        stop.held.take()
    };
    if let Some(plan) = plan {
        let stopped_at = held.as_ref().map(|(node, _)| *node);
        for (node, (proxy, fate)) in proxies.iter().zip(&plan.fates).enumerate() {
            if stopped_at != Some(node) && *fate != Fate::Through {
                proxy.fail(onward(*fate));
            }
        }
        if let Some((node, word)) = held {
            let _ = word.send(onward(plan.fates[node]));
        }
    }

    let patience = Patience {
        next: PATIENCE,
        clean: PATIENCE,
    };
    let is_empty = async || looks.keys().await.is_empty();
    nothing_is_left(stage, act, patience, is_empty, next).await;
    eventually("one inbox is left", PATIENCE, async || {
        looks.inboxes().await == 1
    })
    .await;
    no_task_is_left(tasks, PATIENCE, "while the factory is there").await;
    drop(here);
    eventually("no inbox is left", PATIENCE, async || {
        looks.inboxes().await == 0
    })
    .await;
    eventually("no connection is left", PATIENCE, async || {
        proxies.iter().all(|proxy| proxy.open_connections() == 0)
    })
    .await;
    no_task_is_left(own_tasks, PATIENCE, "of the factory").await;
    assert_eq!(looks.keys().await, Vec::<String>::new());
    points.names()
}

fn name(passing: &Passing, node: usize) -> String {
    match passing {
        Passing::Command(name) => format!("{name} arrives at {node}"),
        Passing::Reply(name) => format!("the reply to {name} at {node}"),
        Passing::Message(text) => format!("the message {text:.1} at {node}"),
    }
}

/// What can become of what is on its way at this point, at its own server.
fn fates(point: &str) -> &'static [Fate] {
    if point.contains(" arrives ") {
        &[Fate::Through, Fate::NotSent, Fate::NotSentFails]
    } else if point.starts_with("the ") && point.contains(" at ") {
        &[Fate::Through, Fate::ReplyLost, Fate::ReplyFails]
    } else {
        &[Fate::Through]
    }
}

fn plans(point: usize, name: &str) -> Vec<Plan> {
    let plan = |fate: &Fate| Plan {
        point,
        fates: vec![*fate],
        outage: false,
    };
    fates(name).iter().map(plan).collect()
}

/// The next server goes on, or loses what is on its way too.
fn plans_of_three(point: usize, name: &str) -> Vec<Plan> {
    // "... at 2"
    let node = name
        .rsplit_once(" at ")
        .and_then(|(_, node)| node.parse::<usize>().ok());
    let mut plans = Vec::new();
    for fate in fates(name) {
        for next in [Fate::Through, Fate::NotSent] {
            let mut fates = vec![Fate::Through; 3];
            fates[node.unwrap_or(0)] = *fate;
            fates[(node.unwrap_or(0) + 1) % 3] = next;
            plans.push(Plan {
                point,
                fates,
                outage: false,
            });
        }
    }
    plans
}

/// In the suite; all scenes with `DROPS_ALL` set, or one point with `DROPS`.
const SOME: [&str; 6] = [
    "free",
    "held-there",
    "before-a-local",
    "set-held-there",
    "layer-body",
    "drain",
];

fn visit(nodes: usize, scenes: &[Scene]) {
    let all = ["DROPS", "DROPS_ALL"].map(env::var_os);
    let all = all.iter().any(Option::is_some);
    let runtime = runtime::Runtime::new().unwrap();
    let servers = runtime.block_on(join_all((0..nodes).map(|_| RedisServer::start())));
    for scene in scenes {
        if !all && !SOME.contains(&scene.name) {
            continue;
        }
        let run = |plan: Option<&Plan>| run(&servers, scene, plan);
        match nodes {
            1 => visit_all(&format!("{}-server", scene.name), THREADS, plans, run),
            _ => visit_all(
                &format!("{}-servers", scene.name),
                THREADS,
                plans_of_three,
                run,
            ),
        }
    }
}

#[test]
fn a_lock_dropped_anywhere_leaves_nothing_in_a_server() {
    visit(1, &LOCKS);
}

#[test]
fn a_request_dropped_anywhere_leaves_nothing_in_a_server() {
    visit(1, &LAYERS);
}

#[test]
fn a_drain_dropped_anywhere_leaves_nothing_in_a_server() {
    visit(1, &DRAINS);
}

#[test]
fn a_redlock_dropped_anywhere_leaves_nothing_in_its_servers() {
    visit(3, &LOCKS[..1]);
}
