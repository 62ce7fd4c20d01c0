//! The promises of a lock that a majority of several Redis servers holds, while some of them fail.
//!
//! Each factory stands for a process: factories share nothing but the servers.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

mod kit;

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use http::{Request, Response, StatusCode};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tower::{Layer, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockGuard, LockOptions, Redlock, Unlocked,
    error::{InvalidSettings, LockError, LossReason, StorageErrorKind},
    storage::{MemoryStorage, RedisStorage, RedlockBuilder, conformance},
};

use self::kit::{
    FakeServer, LIMIT, LONG, Proxy, RedisServer, asking, eventually, ms, no_key_is_left, queued,
    storage_error, within,
};

const MINUTE: Duration = Duration::from_secs(60);

/// Servers that know nothing of each other, and a way to each of them that can fail.
struct World {
    servers: Vec<RedisServer>,
    proxies: Vec<Proxy>,
    /// How long making a connection may take.
    connect_timeout: Duration,
    /// Servers may be killed: answers and wake-ups are lost with them.
    some_die: bool,
    /// Whether locks come with fencing tokens.
    fencing: bool,
}

impl World {
    async fn of(nodes: usize) -> Self {
        let servers = join_all((0..nodes).map(|_| RedisServer::start())).await;
        let proxies = servers.iter().map(Proxy::to).collect();
        Self {
            servers,
            proxies,
            connect_timeout: LIMIT,
            some_die: false,
            fencing: true,
        }
    }

    /// Nothing comes from the server any more, nor goes there.
    fn cut_off(&self, node: usize) {
        self.proxies[node].swallow_next(usize::MAX);
        self.proxies[node].black_hole();
    }

    /// New connections are made.
    fn join(&self, node: usize) {
        self.proxies[node].swallow_next(0);
    }

    fn nodes(&self) -> impl Iterator<Item = RedisStorage> {
        self.proxies.iter().map(|proxy| {
            let builder = RedisStorage::builder(proxy.url());
            let builder = builder.connect_timeout(self.connect_timeout);
            builder.connect_lazily().unwrap()
        })
    }

    /// A busy machine is not a server that hangs, unless a test says so.
    async fn storage(&self, node_timeout: Duration) -> Redlock {
        let builder = Redlock::builder().node_timeout(node_timeout);
        { self.nodes() }
            .fold(builder, |all, node| all.node(node))
            .build()
            .unwrap()
    }

    async fn factory(&self) -> LockFactory {
        self.factory_with(ms(2_000)).await
    }

    async fn factory_with(&self, node_timeout: Duration) -> LockFactory {
        let builder = LockFactory::builder(self.storage(node_timeout).await);
        let factory = builder.storage_timeout(LIMIT).build().unwrap();
        // All nodes are connected, and know the scripts.
        let options = asking(LONG, LIMIT, ms(50));
        let first = factory.create_lock("first").unwrap().lock(options).await;
        assert_eq!(first.unwrap().unlock().await.unwrap(), Unlocked::Held);
        self.is_left_clean().await;
        factory
    }

    async fn is_left_clean(&self) {
        for server in &self.servers {
            no_key_is_left(server).await;
        }
    }

    /// Whose token the lock `k` has on this node.
    async fn owner(&self, node: usize) -> Option<String> {
        let owner: Option<String> = self.servers[node].run("GET distributed-locks:k").await;
        // With a mark if others wait.
        owner.map(|owner| owner.trim_end_matches('!').to_owned())
    }

    /// A grant comes with a majority.
    async fn all_have_heard(&self) {
        eventually("all have heard of it", LIMIT, async || {
            let owners = join_all((0..self.servers.len()).map(|node| self.owner(node))).await;
            owners.iter().all(Option::is_some)
        })
        .await;
    }
}

/// Asks again every 25 to 50 ms.
fn patient() -> LockOptions {
    asking(LONG, LIMIT, ms(50))
}

/// Whoever waits with these and gets the lock within the time of a test was woken.
fn woken() -> LockOptions {
    asking(LONG, 10 * MINUTE, MINUTE)
}

async fn take(factory: &LockFactory, options: LockOptions) -> Result<LockGuard, LockError> {
    let lock = factory.create_lock("k").unwrap();
    within(2 * LIMIT, "an answer", lock.lock(options)).await
}

async fn holds(factory: &LockFactory) -> LockGuard {
    take(factory, patient()).await.unwrap()
}

#[tokio::test]
async fn redlock_keeps_the_contract_of_a_storage() {
    join_all([1, 2, 3, 4].map(async |nodes| {
        let world = World::of(nodes).await;
        conformance::check(world.storage(LIMIT).await).await;
        world.is_left_clean().await;
    }))
    .await;
}

#[tokio::test]
async fn connects_to_a_majority_and_says_why_not() {
    let mut world = World::of(3).await;
    let urls = |world: &World| -> Vec<_> { world.servers.iter().map(RedisServer::url).collect() };
    world.servers[0].kill();
    let redlock = Redlock::connect(urls(&world)).await.unwrap();
    assert_eq!((redlock.nodes(), redlock.quorum()), (3, 2));
    world.servers[2].kill();
    let error = Redlock::connect(urls(&world)).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);

    let twice = vec![world.servers[1].url(); 2];
    let error = Redlock::connect(twice).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected);
    assert!(
        error
            .to_string()
            .contains(&InvalidSettings::SameNode.to_string()),
        "{error}"
    );
    let error = Redlock::connect(Vec::<String>::new()).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&InvalidSettings::NoNodes.to_string()),
        "{error}"
    );
}

/// So many of the servers can be lost, and not one more.
async fn a_minority_may_be_down(nodes: usize, minority: usize) {
    let mut world = World::of(nodes).await;
    let (ours, theirs) = (world.factory().await, world.factory().await);
    let held = holds(&ours).await;
    // Of a bare majority that loses a server, nobody can say that the lock was held.
    world.all_have_heard().await;
    for server in &mut world.servers[..minority] {
        server.kill();
    }
    let once = asking(LONG, ms(0), ms(50));
    let denied = take(&theirs, once).await;
    assert!(
        matches!(denied, Err(LockError::NotObtained(_))),
        "{denied:?}"
    );
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    let held = holds(&theirs).await;
    assert!(held.fencing_token().is_some());
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);

    world.servers[minority].kill();
    let error = storage_error(take(&ours, once).await);
    assert!(error.kind().is_transient(), "{error}");
    let answers = *error.quorum().unwrap();
    let left = nodes - minority - 1;
    assert_eq!((answers.nodes, answers.needed), (nodes, nodes / 2 + 1));
    assert_eq!((answers.ours, answers.not_ours), (left, 0), "{error}");
    assert_eq!(answers.late + answers.failed, minority + 1, "{error}");
    // The parts that it got are given back.
    for server in &world.servers[minority + 1..] {
        no_key_is_left(server).await;
    }
    // And all is well when enough of them are back.
    world.servers[minority].restart().await;
    let held = holds(&ours).await;
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn one_server_is_all_there_is() {
    a_minority_may_be_down(1, 0).await;
}

#[tokio::test]
async fn both_of_two_servers_are_needed() {
    a_minority_may_be_down(2, 0).await;
}

#[tokio::test]
async fn one_of_three_servers_may_be_down() {
    a_minority_may_be_down(3, 1).await;
}

#[tokio::test]
async fn one_of_four_servers_may_be_down() {
    a_minority_may_be_down(4, 1).await;
}

#[tokio::test]
async fn two_of_five_servers_may_be_down() {
    a_minority_may_be_down(5, 2).await;
}

#[tokio::test]
async fn a_server_that_hangs_keeps_nobody_waiting_and_nothing_stays_on_it() {
    let world = World::of(3).await;
    let factory = world.factory_with(LIMIT).await;
    world.servers[1].pause();
    let started = Instant::now();
    let mut token = None;
    for _ in 0..20 {
        let held = holds(&factory).await;
        assert!(held.fencing_token() > token);
        token = held.fencing_token();
        // Who does not wait for the answer is not kept waiting by it.
        drop(held);
    }
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    world.servers[1].resume();
    world.is_left_clean().await;
}

#[tokio::test]
async fn a_majority_that_hangs_is_told_and_nothing_stays_on_it() {
    let world = World::of(3).await;
    let factory = world.factory_with(ms(300)).await;
    world.servers[0].pause();
    world.servers[1].pause();
    let error = storage_error(take(&factory, asking(LONG, ms(0), ms(50))).await);
    assert_eq!(error.kind(), StorageErrorKind::Timeout);
    let answers = *error.quorum().unwrap();
    assert_eq!((answers.ours, answers.late), (1, 2), "{error}");
    world.servers[0].resume();
    world.servers[1].resume();
    world.is_left_clean().await;
    eventually("nothing is left here", LIMIT, async || factory.keys() == 0).await;
}

#[tokio::test]
async fn a_lock_survives_lost_replies_and_nothing_stays_behind() {
    let world = World::of(3).await;
    let factory = world.factory_with(ms(300)).await;
    // First of one server, then of all: what was asked for is carried out, and nobody hears of it.
    for lost in [1, 3] {
        for proxy in &world.proxies[..lost] {
            proxy.lose_replies();
        }
        let held = holds(&factory).await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
        world.is_left_clean().await;
    }
    eventually("nothing is left here", LIMIT, async || factory.keys() == 0).await;
}

#[tokio::test]
async fn a_partition_costs_a_holder_without_a_majority_its_lock() {
    let world = World::of(3).await;
    let (ours, theirs) = (world.factory_with(ms(300)).await, world.factory().await);
    let ttl = ms(3_000);
    let held = take(&ours, asking(ttl, LIMIT, ms(50))).await.unwrap();
    // Their own connections were made through the same proxies, so they go over new ones.
    for proxy in &world.proxies[..2] {
        proxy.black_hole();
        proxy.swallow_next(usize::MAX);
    }
    let reason = within(LIMIT, "the loss", held.lost()).await;
    assert_eq!(reason, LossReason::Expired);
    assert!(!held.is_held());
    for proxy in &world.proxies[..2] {
        proxy.swallow_next(0);
    }
    drop(held);
    let held = holds(&theirs).await;
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    world.is_left_clean().await;
}

#[tokio::test]
async fn a_server_that_lost_its_memory_is_given_the_lock_again() {
    let mut world = World::of(3).await;
    let (ours, theirs) = (world.factory().await, world.factory().await);
    let ttl = ms(3_000);
    let held = take(&ours, asking(ttl, LIMIT, ms(50))).await.unwrap();
    world.all_have_heard().await;
    // One after the other: never is more than one without it.
    for node in 0..3 {
        let owner = world.owner((node + 1) % 3).await;
        assert!(owner.is_some());
        world.servers[node].restart().await;
        assert_eq!(world.owner(node).await, None);
        eventually("it is ours on all servers again", LIMIT, async || {
            world.owner(node).await == owner
        })
        .await;
        assert!(held.is_held());
        let denied = take(&theirs, asking(ttl, ms(0), ms(50))).await;
        assert!(denied.is_err(), "{denied:?}");
    }
    let token = held.fencing_token();
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    world.is_left_clean().await;
    // None of the counters that gave its token is left.
    let held = holds(&theirs).await;
    assert!(held.fencing_token() > token);
    drop(held);
    world.is_left_clean().await;
}

#[tokio::test]
async fn a_lock_that_a_majority_has_lost_is_lost() {
    let world = World::of(3).await;
    let factory = world.factory().await;
    let held = take(&factory, asking(ms(3_000), LIMIT, ms(50)))
        .await
        .unwrap();
    // A renewal between the two would set it again on the first.
    let forget = async || {
        loop {
            for server in &world.servers[..2] {
                let () = server.run("FLUSHALL").await;
            }
            tokio::time::sleep(ms(20)).await;
        }
    };
    let lost = async {
        tokio::select! {
            reason = held.lost() => reason,
            () = forget() => unreachable!(),
        }
    };
    let reason = within(LIMIT, "the loss", lost).await;
    assert_eq!(reason, LossReason::NotOurs);
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Lost);
    world.is_left_clean().await;
}

#[tokio::test]
async fn a_release_wakes_those_who_wait() {
    let world = World::of(3).await;
    let mut factories = Vec::new();
    for _ in 0..4 {
        factories.push(world.factory().await);
    }
    let held = holds(&factories[3]).await;
    // Or it might leave word itself where the others come first.
    world.all_have_heard().await;
    let mut waiting = JoinSet::new();
    for factory in &factories[..3] {
        waiting.spawn(factory.create_lock("k").unwrap().lock(woken()));
    }
    for server in &world.servers {
        eventually("all wait", LIMIT, async || queued(server, "k").await == 3).await;
    }
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    for _ in 0..3 {
        let held = within(LIMIT, "a waiter has it", waiting.join_next()).await;
        let held = held.unwrap().unwrap().unwrap();
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    }
    world.is_left_clean().await;
}

#[tokio::test]
async fn a_waiter_that_left_leaves_nothing_behind() {
    let world = World::of(3).await;
    let (holder, other) = (world.factory().await, world.factory().await);
    let held = holds(&holder).await;
    // Where the other comes first, the holder's own attempt leaves word, too, until it gives the lock back.
    world.all_have_heard().await;
    let waiting = tokio::spawn(other.create_lock("k").unwrap().lock(woken()));
    for server in &world.servers {
        eventually("it waits", LIMIT, async || queued(server, "k").await == 1).await;
    }
    waiting.abort();
    for server in &world.servers {
        eventually("it has left", LIMIT, async || {
            queued(server, "k").await == 0
        })
        .await;
    }
    drop(held);
    world.is_left_clean().await;
    eventually("nothing is left here", LIMIT, async || other.keys() == 0).await;
}

#[tokio::test]
async fn an_attempt_that_is_dropped_at_any_point_leaves_nothing_behind() {
    let world = World::of(3).await;
    let factory = world.factory().await;
    for polls in 0..60 {
        let lock = factory.create_lock("k").unwrap();
        let mut attempt = Box::pin(lock.lock(patient()));
        for _ in 0..polls / 3 {
            if futures_util::poll!(&mut attempt).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(attempt);
        if polls % 10 == 0 {
            drop(holds(&factory).await);
        }
    }
    world.is_left_clean().await;
    eventually("nothing is left here", LIMIT, async || factory.keys() == 0).await;
}

/// Who was in when.
#[derive(Default)]
struct History {
    inside: AtomicBool,
    /// Who, and with which token, in the order in which they came in.
    stays: Mutex<Vec<(usize, Option<u64>)>>,
}

impl History {
    /// Some more have been in. Where a minority hangs, all others have to agree on one of those who
    /// want it. If they do not, nobody knows before the time limit of those that hang; and the longer
    /// a call takes on a busy machine, the more seldom they agree. So there is time for many rounds.
    async fn goes_on(&self) {
        let stays = || self.stays.lock().unwrap().len();
        let before = stays();
        eventually("they go on", 3 * LIMIT, async || stays() > before + 8).await;
    }

    async fn stay(&self, who: usize, guard: &LockGuard) {
        assert!(
            !self.inside.swap(true, SeqCst),
            "two holders at the same time"
        );
        let token = guard.fencing_token();
        self.stays.lock().unwrap().push((who, token));
        tokio::time::sleep(ms(1)).await;
        assert!(guard.is_held());
        self.inside.store(false, SeqCst);
    }
}

/// Processes, each with some tasks, that want one lock all the time, until each has had it so often
/// at least. Meanwhile `disturb` does what it likes; they go on until it is done.
async fn contend(
    world: &mut World,
    processes: usize,
    tasks: usize,
    stays: usize,
    disturb: impl AsyncFnOnce(&mut World, &History),
) {
    let history = Arc::new(History::default());
    let (some_die, fencing) = (world.some_die, world.fencing);
    // Half of the longer is longer than the test may take: wake-ups alone bring them the lock in
    // time, but for split votes.
    let interval = if some_die { ms(200) } else { 2 * MINUTE };
    let calm = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for who in 0..processes {
        let nodes: Vec<_> = world.nodes().collect();
        let (history, calm) = (Arc::clone(&history), Arc::clone(&calm));
        threads.push(thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let builder = { nodes.into_iter() }
                    .fold(Redlock::builder(), |all, node| all.node(node))
                    .node_timeout(ms(500));
                let builder = LockFactory::builder(builder.build().unwrap());
                let factory = builder.fencing(fencing).build().unwrap();
                let mut working = JoinSet::new();
                for _ in 0..tasks {
                    let (history, lock) = (Arc::clone(&history), factory.create_lock("k").unwrap());
                    let calm = Arc::clone(&calm);
                    working.spawn(async move {
                        let mut had = 0;
                        while had < stays || !calm.load(SeqCst) {
                            had += 1;
                            let guard = lock.lock(asking(LONG, 10 * MINUTE, interval)).await;
                            let guard = guard.unwrap();
                            history.stay(who, &guard).await;
                            match guard.unlock().await {
                                Ok(unlocked) => assert_eq!(unlocked, Unlocked::Held),
                                // It had a bare majority, and one of that was killed.
                                Err(error) if some_die => assert!(error.kind().is_transient()),
                                Err(error) => panic!("{error}"),
                            }
                        }
                    });
                }
                working.join_all().await;
                assert_eq!(factory.drain(LIMIT).await, 0);
            });
        }));
    }
    disturb(world, &history).await;
    calm.store(true, SeqCst);
    within(3 * LIMIT, "all have had their turns", async {
        for thread in threads {
            tokio::task::spawn_blocking(|| thread.join())
                .await
                .unwrap()
                .unwrap();
        }
    })
    .await;
    let stays_seen = history.stays.lock().unwrap().clone();
    assert!(stays_seen.len() >= processes * tasks * stays);
    let growing = stays_seen.windows(2).all(|pair| pair[0].1 < pair[1].1);
    assert!(
        growing || !fencing,
        "fencing tokens grow from holder to holder: {stays_seen:?}"
    );
    world.is_left_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_processes_that_contend_make_steady_progress() {
    let mut world = World::of(3).await;
    contend(&mut world, 4, 1, 50, async |_, _| {}).await;
}

async fn answer(_: Request<()>) -> Result<Response<()>, Infallible> {
    Ok(Response::new(()))
}

/// On one thread nobody hears of a release before the next lock is asked for. What is kept cannot give
/// way to others.
#[tokio::test]
async fn a_lock_that_requests_come_back_for_at_once_is_given_back_all_the_same() {
    const REQUESTS: u64 = 50;
    let world = World::of(3).await;
    let factory = world.factory().await;
    let layer = DistributedLockLayer::new(factory.clone(), |_: &Request<()>| "k");
    let service = layer.options(patient()).layer(service_fn(answer));
    let () = world.servers[0].run("CONFIG RESETSTAT").await;
    for _ in 0..REQUESTS {
        let answer = service.clone().oneshot(Request::new(())).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }
    let asked = world.servers[0].calls("set").await;
    assert!(asked >= REQUESTS, "{asked}");
    world.is_left_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_processes_give_way_to_each_other() {
    let mut world = World::of(3).await;
    contend(&mut world, 4, 8, 25, async |_, _| {}).await;
}

/// Without tokens a holder is not told at its grant that others wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_want_no_fencing_tokens_wake_each_other_too() {
    let mut world = World::of(3).await;
    world.fencing = false;
    contend(&mut world, 4, 2, 50, async |_, _| {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_even_number_of_servers_serves_too() {
    let mut world = World::of(4).await;
    contend(&mut world, 4, 2, 20, async |_, _| {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contenders_go_on_while_a_server_hangs_and_comes_back() {
    let mut world = World::of(3).await;
    contend(&mut world, 4, 2, 60, async |world, _| {
        for node in 0..3 {
            tokio::time::sleep(ms(300)).await;
            world.servers[node].pause();
            tokio::time::sleep(ms(300)).await;
            world.servers[node].resume();
        }
    })
    .await;
}

/// Of so many servers, this minority fails in each way, and is back.
async fn contenders_go_on(nodes: usize, minority: usize) {
    let mut world = World::of(nodes).await;
    // What hangs in a connection that is not made is not what is tested.
    world.connect_timeout = ms(1_000);
    world.some_die = true;
    contend(&mut world, 4, 2, 100, async |world, history| {
        history.goes_on().await;
        for node in 0..minority {
            world.servers[node].pause();
        }
        history.goes_on().await;
        for node in 0..minority {
            world.servers[node].resume();
        }
        // Others than before: whoever was not missed is.
        for node in nodes - minority..nodes {
            world.cut_off(node);
        }
        history.goes_on().await;
        for node in nodes - minority..nodes {
            world.join(node);
        }
        history.goes_on().await;
        for server in &mut world.servers[..minority] {
            server.kill();
        }
        // Nobody has a lock any more that was taken before.
        history.goes_on().await;
        for server in &mut world.servers[..minority] {
            server.restart().await;
        }
        history.goes_on().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contenders_go_on_while_one_of_three_servers_hangs_is_cut_off_and_is_killed() {
    contenders_go_on(3, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contenders_go_on_while_two_of_five_servers_hang_are_cut_off_and_are_killed() {
    contenders_go_on(5, 2).await;
}

/// A lock that is not free on a server is asked for by a script in a second step. Nobody has looked at
/// the server's first answer when the lock is given back.
#[tokio::test]
async fn a_server_is_asked_for_nothing_more_once_the_lock_is_given_back() {
    let (said, mut hears) = mpsc::unbounded_channel();
    let server = FakeServer::start(move |_, words| {
        let script = words[0].starts_with("EVAL");
        // Key, queue and counters, and then the token: a release has no time to live after it.
        let name = match (&*words[0], words.len()) {
            ("SET", _) => "set",
            (_, 7) if script => "release",
            _ if script => "acquire",
            _ => "",
        };
        if !name.is_empty() {
            said.send(name).unwrap();
        }
        Some(match (&*words[0], name) {
            ("HELLO", _) => "-ERR unknown command 'HELLO'",
            (_, "set") => "$-1",
            (_, "release" | "acquire") => ":0",
            _ => "+OK",
        })
    })
    .await;
    let storage = RedisStorage::builder(server.url()).probe(false);
    let redlock = Redlock::builder()
        .node(MemoryStorage::new())
        .node(MemoryStorage::new())
        .node(storage.connect().await.unwrap())
        .node_timeout(LIMIT);
    let factory = LockFactory::builder(redlock.build().unwrap()).storage_timeout(LIMIT);
    let factory = factory.fencing(false).build().unwrap();
    // Or after a while the call would be seen to.
    tokio::time::pause();
    let held = holds(&factory).await;
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    tokio::time::resume();
    assert_eq!(factory.drain(LIMIT).await, 0);
    let mut heard = Vec::new();
    while let Ok(name) = hears.try_recv() {
        heard.push(name);
    }
    assert!(heard.starts_with(&["set", "release"]), "{heard:?}");
    assert!(!heard.contains(&"acquire"), "{heard:?}");
}

#[tokio::test]
async fn a_server_that_is_reached_after_the_release_is_not_asked_for_the_lock() {
    let server = RedisServer::start().await;
    server.pause();
    let storage = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
    let redlock = Redlock::builder()
        .node(MemoryStorage::new())
        .node(MemoryStorage::new())
        .node(storage.connect_lazily().unwrap());
    let factory = LockFactory::builder(redlock.build().unwrap()).storage_timeout(LIMIT);
    for fencing in [false, true] {
        let factory = factory.clone().fencing(fencing).build().unwrap();
        assert_eq!(
            holds(&factory).await.unlock().await.unwrap(),
            Unlocked::Held
        );
    }
    server.resume();
    eventually("it is told of the release", LIMIT, async || {
        server.calls("eval").await + server.calls("evalsha").await > 0
    })
    .await;
    assert_eq!(factory.build().unwrap().drain(LIMIT).await, 0);
    let scripts = server.calls("eval").await + server.calls("evalsha").await;
    assert_eq!(server.calls("set").await, 0);
    no_key_is_left(&server).await;
    // Each lock by its release, and once more for what was on its way.
    assert!(scripts <= 4, "{scripts}");
}

/// There, each release looks whether somebody waits; but it is not known beforehand.
#[tokio::test]
async fn a_lock_that_nobody_waits_for_is_given_back_by_one_command_a_server() {
    let world = World::of(3).await;
    let factory = world.factory().await;
    drop(holds(&factory).await);
    world.is_left_clean().await;
    let () = world.servers[0].run("CONFIG RESETSTAT").await;
    for _ in 0..50 {
        let held = holds(&factory).await;
        assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    }
    let pings = world.servers[0].calls("ping").await;
    assert!(pings < 25, "{pings}");
}

#[tokio::test]
async fn a_shutdown_waits_for_what_a_server_has_still_to_hear() {
    let mut world = World::of(3).await;
    world.connect_timeout = ms(200);
    let builder = { world.nodes() }.fold(Redlock::builder(), RedlockBuilder::node);
    let redlock = builder.node_timeout(ms(2_000)).build().unwrap();
    let (entered, has_entered) = oneshot::channel();
    let (leave, may_leave) = oneshot::channel();
    let (drains, is_draining) = oneshot::channel();
    let service = thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let factory = LockFactory::builder(redlock).storage_timeout(LIMIT);
            let factory = factory.build().unwrap();
            let held = holds(&factory).await;
            entered.send(()).unwrap();
            may_leave.await.unwrap();
            assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
            drains.send(()).unwrap();
            factory.drain(LIMIT).await
        })
        // And with that, all that goes on in the background ends.
    });
    has_entered.await.unwrap();
    world.all_have_heard().await;
    world.cut_off(1);
    leave.send(()).unwrap();
    is_draining.await.unwrap();
    assert!(world.owner(1).await.is_some());
    world.join(1);
    let left = tokio::task::spawn_blocking(|| service.join());
    assert_eq!(within(LIMIT, "its end", left).await.unwrap().unwrap(), 0);
    for server in &world.servers {
        assert_eq!(server.keys().await, 0);
    }
}

#[tokio::test]
async fn a_shutdown_waits_for_a_server_that_is_gone_no_longer_than_for_a_call() {
    let mut world = World::of(3).await;
    let factory = LockFactory::builder(world.storage(ms(2_000)).await);
    let factory = factory.storage_timeout(ms(500)).build().unwrap();
    let held = holds(&factory).await;
    world.all_have_heard().await;
    world.servers[0].kill();
    assert_eq!(held.unlock().await.unwrap(), Unlocked::Held);
    let started = Instant::now();
    assert_eq!(factory.drain(LIMIT).await, 0);
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
}
