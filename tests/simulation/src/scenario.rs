//! What happens in the simulation with a given number: who asks for what and when, and what goes
//! wrong.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use fastrand::Rng;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};
use tower_distributed_lock::{LockFactory, LockOptions};

use crate::{
    history::{Calm, History, Stats},
    net::{HostId, Net, Weather},
    randomness,
    redis::Server,
    service::{self, Settings},
    world::World,
};

/// How often a caller asks by itself where nothing goes wrong, in milliseconds.
const INTERVAL: u64 = 300;

/// When all is well again where something went wrong at first, in milliseconds: after the longest wait, and the longest
/// pause before the next connection is tried.
const HEALED: u64 = 6_000;

/// What became of a simulation.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seed: u64,
    /// Of all events.
    pub hash: u64,
    pub events: u64,
    pub violations: Vec<String>,
    pub stats: Stats,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A process stands still.
    Pause(HostId, u64),
    /// A replica ends at once, and another is started in its place after so long.
    Crash(HostId, u64),
    /// A lock server ends, and is there again after so long.
    ServerCrash(HostId, u64),
    /// A lock server forgets the scripts that it knows.
    FlushScripts(HostId),
    /// Nothing arrives for so long, one way or both.
    Hold(HostId, HostId, u64),
    /// Connections break.
    Cut(HostId, HostId),
    /// Connections carry nothing any more.
    Mute(HostId, HostId),
}

#[derive(Clone, Copy, Debug)]
struct Request {
    number: u64,
    at: u64,
    replica: HostId,
    key: usize,
    work: u64,
    /// When the client leaves.
    patience: Option<u64>,
    panics: bool,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Course {
    /// Nothing.
    Calm,
    /// Something at first. After [`HEALED`], nothing any more.
    Heals,
    /// Something all the time, where also the time limits are short.
    Storm,
}

impl Course {
    fn of(seed: u64) -> Self {
        match seed % 4 {
            0 => Self::Calm,
            2 => Self::Heals,
            _ => Self::Storm,
        }
    }
}

/// All that follows from a seed before anything happens.
#[derive(Debug)]
struct Plan {
    /// The first hosts.
    servers: usize,
    /// Those after them. The clients are the last.
    replicas: usize,
    keys: usize,
    /// From which request on nothing goes wrong.
    first_calm: Option<u64>,
    forgets: bool,
    weather: Weather,
    drift: Option<(u64, bool)>,
    settings: Settings,
    requests: Vec<Request>,
    faults: Vec<(u64, Fault)>,
    /// Everything is over by then.
    end: u64,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Plan {
    fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let random = &mut random;
        let course = Course::of(seed);
        let is_calm = course == Course::Calm;
        let is_crowded = seed.is_multiple_of(8);
        let forgets = !is_calm && random.u32(..8) == 0;
        let servers = if random.u32(..3) == 0 { 3 } else { 1 };
        let replicas = random.usize(2..=3);
        let keys = if random.bool() { 1 } else { 2 };
        let (server_hosts, replica_hosts) = (0..servers, servers..servers + replicas);
        let clients = servers + replicas;

        let scale = if random.u32(..4) == 0 { 4 } else { 1 };
        let (ttl, interval, wait) = match course {
            Course::Calm => (random.u64(100..600), INTERVAL, 6_000),
            Course::Heals => (random.u64(100..600), INTERVAL, 2_100),
            Course::Storm => (
                random.u64(24..90) * scale,
                random.u64(5..40) * scale,
                random.u64(20..200) * scale,
            ),
        };
        let max_hold = if !is_calm && random.u32(..6) == 0 {
            40
        } else {
            10_000
        };
        let options = LockOptions::builder()
            .ttl(ms(ttl))
            .interval(ms(interval))
            .retries((wait / interval).max(1) as u32)
            .max_hold(ms(max_hold));
        let lock_delay = if random.u32(..6) == 0 {
            random.u64(5..20)
        } else {
            0
        };
        let settings = Settings {
            options: options.build().unwrap(),
            connect_timeout: ms(random.u64(60..200)),
            storage_timeout: ms(match course {
                Course::Calm | Course::Heals => 1_000,
                Course::Storm => random.u64(12..60),
            }),
            node_timeout: ms(random.u64(8..30)),
            handoff: (random.u32(1..6), ms(random.u64(1..12))),
            linger: (random.u32(..4) == 0).then(|| ms(random.u64(5..30))),
            lock_delay: ms(lock_delay),
            await_release: random.u32(..4) == 0,
        };

        // Bursts meet more than an even rain does.
        let span = random.u64(10..100);
        let requests = (1..=random.u64(8..20)).map(|number| Request {
            number,
            at: 8 + random.u64(..span),
            replica: random.usize(replica_hosts.clone()),
            key: random.usize(..keys),
            work: match random.u32(..6) {
                0 => 0,
                1 if !is_calm => random.u64(20..80) * scale,
                // Longer than a lock that is not renewed.
                1 if !is_crowded && random.u32(..3) == 0 => random.u64(ttl..2 * ttl),
                _ => random.u64(1..8),
            },
            patience: (random.u32(..5) == 0).then(|| random.u64(1..50)),
            panics: !is_calm && random.u32(..30) == 0,
        });
        let mut requests = Vec::from_iter(requests);
        if is_crowded {
            crowd_at_one(&mut requests, servers, seed);
        }
        let first_calm = match course {
            Course::Calm => Some(0),
            Course::Heals => Some(1 + requests.len() as u64),
            Course::Storm => None,
        };
        if course == Course::Heals {
            let later = (1..=10).map(|more| Request {
                number: requests.len() as u64 + more,
                at: HEALED + random.u64(..40),
                replica: random.usize(replica_hosts.clone()),
                key: random.usize(..keys),
                work: random.u64(..6),
                patience: None,
                panics: false,
            });
            let later = Vec::from_iter(later);
            requests.extend(later);
        }

        let faults = match is_calm {
            true => 0,
            false => random.u64(2..9),
        };
        let faults = (0..faults).map(|_| {
            let server = random.usize(server_hosts.clone());
            let replica = random.usize(replica_hosts.clone());
            let longest = if random.bool() { 20 } else { ttl + 40 };
            let time = random.u64(3..longest);
            let fault = match random.u32(..20) {
                0..4 => Fault::Pause(replica, time),
                4 => Fault::Pause(server, time),
                5..7 => Fault::Crash(replica, time),
                7..9 => Fault::ServerCrash(server, time.min(40)),
                9..11 => Fault::Hold(replica, server, time),
                11..13 => Fault::Hold(server, replica, time),
                13..15 => Fault::Cut(replica, server),
                // That a connection for commands carries nothing is found out by the next call, not before.
                15..17 if course == Course::Heals => Fault::Cut(replica, server),
                15..17 => Fault::Mute(replica, server),
                17 => Fault::FlushScripts(server),
                18 => Fault::Cut(clients, replica),
                _ => Fault::Hold(replica, clients, time),
            };
            (random.u64(8..8 + span + 60), fault)
        });
        let faults = Vec::from_iter(faults);
        let weather = Weather {
            latency: random.u64(1..=3),
            lost: match course {
                Course::Calm | Course::Heals => 0,
                Course::Storm => random.u32(..6),
            },
        };
        let drift = (random.u32(..3) == 0).then(|| (random.u64(150..400), random.bool()));
        let worked: u64 = requests.iter().map(|request| request.work).sum();
        // The last fault, the longest of them, a lock that nobody gives back, and all the work.
        let end =
            600 + match course {
                Course::Heals => HEALED,
                _ => span,
            } + 2 * (ttl + interval + lock_delay)
                + wait
                + worked
                + 400;
        Self {
            servers,
            replicas,
            keys,
            first_calm,
            forgets,
            weather,
            drift,
            settings,
            requests,
            faults,
            end,
        }
    }
}

impl Plan {
    fn print(&self) {
        let Self {
            servers,
            replicas,
            first_calm,
            forgets,
            weather,
            drift,
            settings,
            ..
        } = self;
        println!(
            "{servers} servers, {replicas} replicas, calm from request {first_calm:?}, server forgets {forgets}, {weather:?}, drift {drift:?}"
        );
        println!("{settings:?}");
        self.requests
            .iter()
            .for_each(|request| println!("{request:?}"));
        self.faults
            .iter()
            .for_each(|(at, fault)| println!("at {at} ms {fault:?}"));
    }
}

/// Most want one lock in one process, for longer than it may keep it from the others.
fn crowd_at_one(requests: &mut Vec<Request>, first: HostId, seed: u64) {
    let mut random = Rng::with_seed(!seed);
    let others = random.usize(1..4);
    for request in requests.iter_mut().skip(others) {
        (request.replica, request.key, request.patience) = (first, 0, None);
        (request.at, request.work) = (8 + random.u64(..6), random.u64(3..8));
    }
    for request in requests.iter_mut().take(others) {
        (request.replica, request.key, request.patience) = (first + 1, 0, None);
        // When all listen, and the crowd is not served yet.
        request.at = 50 + random.u64(..80);
    }
    let last = requests.last().map_or(1, |last| last.number);
    requests.extend((1..16).map(|more| Request {
        number: last + more,
        at: 8 + random.u64(..6),
        replica: first,
        key: 0,
        work: random.u64(3..8),
        patience: None,
        panics: false,
    }));
}

/// A simulation under way.
struct Run {
    plan: Plan,
    world: World,
    servers: Vec<Server>,
    factories: Vec<Option<LockFactory>>,
    /// What is started again, and when.
    restarts: Vec<(u64, HostId)>,
    open: Arc<AtomicUsize>,
}

impl Run {
    fn new(seed: u64, prints: bool) -> Self {
        let plan = Plan::new(seed);
        let hosts = plan.servers + plan.replicas + 1;
        let history = History::new(hosts, plan.keys, prints);
        let longest = plan.requests.iter().map(|request| request.work).max();
        let section = longest.unwrap_or(0) + 5 * plan.weather.latency + 5;
        let calm = |first| Calm {
            first,
            // A few messages, long before it would ask by itself. Where callers have split the votes of several servers,
            // each asks again after a time of its own, up to an interval.
            soon: 60 + if plan.servers > 1 { INTERVAL } else { 0 },
            // The time that is set, a section, and a few messages.
            kept: plan.settings.handoff.1 + ms(section),
        };
        history.expect(plan.forgets, plan.first_calm.map(calm));
        if prints {
            plan.print();
        }
        let net = Net::new(hosts, plan.weather, !seed);
        let mut run = Self {
            world: World::new(hosts, net, history),
            servers: Vec::new(),
            factories: vec![None; hosts],
            restarts: Vec::new(),
            open: Arc::new(AtomicUsize::new(plan.requests.len())),
            plan,
        };
        let alone = run.plan.servers == 1;
        for host in 0..run.plan.servers {
            let (net, history) = (run.world.net.clone(), run.world.history.clone());
            let server = async { Server::start(net, host, history, alone) };
            let server = run.world.start(host, server);
            run.servers.push(server);
        }
        if let Some((period, is_fast)) = run.plan.drift {
            run.world.drifts(0, period, is_fast);
        }
        let first = run.plan.servers;
        (first..first + run.plan.replicas).for_each(|replica| run.start_replica(replica));
        run.start_clients();
        run
    }

    fn start_replica(&mut self, replica: HostId) {
        let around = (self.world.net.clone(), self.world.history.clone());
        let (servers, settings) = (self.plan.servers, &self.plan.settings);
        let program = service::start(around, replica, servers, settings);
        let factory = self.world.start(replica, program);
        self.factories[replica] = Some(factory);
    }

    fn start_clients(&mut self) {
        let (net, history) = (self.world.net.clone(), self.world.history.clone());
        let (requests, open) = (self.plan.requests.clone(), Arc::clone(&self.open));
        let host = self.plan.servers + self.plan.replicas;
        self.world.start(host, async {
            for request in requests {
                let (net, history, open) = (net.clone(), history.clone(), Arc::clone(&open));
                tokio::spawn(async move {
                    sleep(ms(request.at)).await;
                    let asking = ask(&net, host, request);
                    let answer = match request.patience {
                        Some(patience) => {
                            timeout(ms(patience), asking).await.unwrap_or(Err("left"))
                        }
                        None => asking.await,
                    };
                    history.answered(request.number, answer);
                    open.fetch_sub(1, Relaxed);
                });
            }
        });
    }

    fn strike(&mut self, fault: Fault) {
        let now = self.world.now;
        self.world.history.fault(format_args!("FAULT    {fault:?}"));
        match fault {
            Fault::Pause(host, time) => self.world.pause(host, time),
            Fault::Crash(host, time) => {
                if self.world.is_up(host) {
                    let quietly = self.world.net.random(2) == 0;
                    self.factories[host] = None;
                    // A client would wait for ever; a server that is not told goes on publishing.
                    let servers = self.plan.servers;
                    self.world.crash(host, |peer| peer >= servers || !quietly);
                    self.restarts.push((now + time, host));
                }
            }
            // It is down already.
            Fault::ServerCrash(server, _)
                if self.restarts.iter().any(|(_, host)| *host == server) => {}
            Fault::ServerCrash(server, time) => {
                let quietly = self.world.net.random(2) == 0;
                self.world.net.kill(server, |_| !quietly);
                self.restarts.push((now + time, server));
            }
            Fault::FlushScripts(server) => self.servers[server].flush_scripts(),
            Fault::Hold(from, to, time) => {
                self.world.net.hold(from, to, now + time);
                if self.world.net.random(2) == 0 {
                    self.world.net.hold(to, from, now + time);
                }
            }
            Fault::Cut(a, b) => self.world.net.cut(a, b),
            Fault::Mute(a, b) => self.world.net.mute(a, b),
        }
    }

    fn restart(&mut self, host: HostId) {
        self.world
            .history
            .log(format_args!("         host {host} is there again"));
        if let Some(server) = self.servers.get(host) {
            let forgets = self.plan.forgets;
            self.world.on(host, || server.restarted(forgets));
            self.world.net.revive(host);
        } else {
            self.start_replica(host);
        }
    }

    /// What is left of locks and queues at the servers.
    fn left(&self) -> Vec<String> {
        let servers = self.servers.iter().enumerate();
        let left = servers.map(|(host, server)| self.world.on(host, || server.left()));
        left.flatten().collect()
    }

    fn is_over(&self) -> bool {
        self.open.load(Relaxed) == 0
            && self.restarts.is_empty()
            && self.world.history.is_quiet()
            && self
                .factories
                .iter()
                .flatten()
                .all(|factory| factory.keys() == 0)
            && self.left().is_empty()
    }

    fn run(mut self, seed: u64) -> Outcome {
        let history = self.world.history.clone();
        let faults = self.plan.faults.clone();
        let last = faults.iter().map(|(at, _)| *at).max().unwrap_or(0);
        while self.world.now < self.plan.end && (self.world.now <= last || !self.is_over()) {
            self.world.step();
            let now = self.world.now;
            for (_, fault) in faults.iter().filter(|(at, _)| *at == now) {
                self.strike(*fault);
            }
            let (due, later) = self.restarts.drain(..).partition(|(at, _)| *at <= now);
            self.restarts = later;
            let due: Vec<(u64, HostId)> = due;
            due.into_iter().for_each(|(_, host)| self.restart(host));
        }
        let open = self.open.load(Relaxed);
        if open > 0 {
            history.violated(&format!("{open} requests have had no answer"));
        }
        for (host, factory) in self.factories.iter().enumerate() {
            let Some(factory) = factory else { continue };
            if factory.keys() > 0 || factory.waiters() > 0 {
                history.violated(&format!("host {host} has something left: {factory:?}"));
            }
        }
        for left in self.left() {
            history.violated(&format!("left: {left}"));
        }
        history.finish();
        if let Some(panicked) = panicked() {
            history.violated(&format!("a panic: {panicked}"));
        }
        self.factories.clear();
        let (hash, events, violations, stats) = history.outcome();
        Outcome {
            seed,
            hash,
            events,
            violations,
            stats,
        }
    }
}

/// One request over a connection of its own: its status, or what became of it.
async fn ask(net: &Net, host: HostId, request: Request) -> Result<u16, &'static str> {
    let Request {
        number, key, work, ..
    } = request;
    let panics = if request.panics { "x-panic: 1\r\n" } else { "" };
    let head = format!(
        "POST /{key} HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-request: {number}\r\nx-work: {work}\r\n{panics}\r\n"
    );
    let mut stream = net
        .connect(host, request.replica)
        .await
        .map_err(|_| "refused")?;
    stream
        .write_all(head.as_bytes())
        .await
        .map_err(|_| "broken")?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .await
        .map_err(|_| "broken")?;
    let status = answer
        .get(9..12)
        .and_then(|status| std::str::from_utf8(status).ok());
    status
        .and_then(|status| status.parse().ok())
        .ok_or("broken")
}

thread_local! {
    static PANICKED: RefCell<Option<String>> = const { RefCell::new(None) };
    static SIMULATES: RefCell<bool> = const { RefCell::new(false) };
}

/// Panics of tasks are kept by their runtime; here they are counted.
fn count_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if SIMULATES.with_borrow(|it| *it) {
                PANICKED.with_borrow_mut(|it| {
                    it.get_or_insert_with(|| info.to_string());
                });
            } else {
                usual(info);
            }
        }));
    });
}

/// What the first panic on this thread said, if there was one.
pub fn panicked() -> Option<String> {
    PANICKED.take()
}

/// Runs `work` on a thread of its own, where all random numbers follow from the seed.
pub fn alone<T: Send>(seed: u64, work: impl FnOnce() -> T + Send) -> T {
    count_panics();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            randomness::seed(seed);
            SIMULATES.set(true);
            panic::catch_unwind(AssertUnwindSafe(work)).map_err(|_| panicked().unwrap_or_default())
        });
        match thread.join() {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(message)) => panic!("the simulation of seed {seed} panicked: {message}"),
            Err(_) => panic!("the simulation of seed {seed} panicked"),
        }
    })
}

/// Runs the simulation with this number. `prints`: with all that happens in it.
pub fn run(seed: u64, prints: bool) -> Outcome {
    alone(seed, || Run::new(seed, prints).run(seed))
}

/// Runs simulations on all cores, and hands over what became of each.
pub fn run_all(seeds: std::ops::Range<u64>, each: impl Fn(Outcome) + Sync) {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    each(run(seed, false));
                }
            });
        }
    });
}
