//! One process of the soak: does all that can be done with locks, until it is told to rest, and then
//! says what is left.

use std::{
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{Router, body::Body, routing::post};
use http::Request;
use http_body_util::BodyExt;
use tokio::{
    io::AsyncBufReadExt,
    runtime::Handle,
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::ServiceExt;
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey, LockOptions,
    error::{InvalidKey, LockError},
    storage::RedisStorage,
};

use crate::{
    heap,
    kit::{LIMIT, eventually, ms, within},
    run,
};

/// What a process says when it rests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Bytes that are allocated.
    pub live: usize,
    /// Memory of the process, in KB.
    pub resident: usize,
    /// Tasks of its runtime.
    pub tasks: usize,
    /// Since the last report: locks that were given,
    pub served: u64,
    /// refused,
    pub refused: u64,
    /// lost by their holders,
    pub lost: u64,
    /// and errors of the storage.
    pub errors: u64,
    /// Waits for a lock that others want too, in microseconds.
    pub p50: u64,
    pub p99: u64,
    pub slowest: u64,
}

impl Report {
    fn to_line(self) -> String {
        let numbers = [
            self.live as u64,
            self.resident as u64,
            self.tasks as u64,
            self.served,
            self.refused,
            self.lost,
            self.errors,
            self.p50,
            self.p99,
            self.slowest,
        ];
        numbers.map(|number| number.to_string()).join(" ")
    }
}

impl FromStr for Report {
    type Err = std::num::ParseIntError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let mut numbers = line.split(' ').map(str::parse::<u64>);
        let mut next = || numbers.next().unwrap_or(Ok(0));
        Ok(Self {
            live: next()? as usize,
            resident: next()? as usize,
            tasks: next()? as usize,
            served: next()?,
            refused: next()?,
            lost: next()?,
            errors: next()?,
            p50: next()?,
            p99: next()?,
            slowest: next()?,
        })
    }
}

/// What the workers have seen. Takes no memory that grows.
struct Tally {
    served: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    errors: AtomicU64,
    slowest: AtomicU64,
    /// Waits, by the number of bits of their microseconds and the three bits after the first.
    waits: [AtomicU64; 8 * 64],
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            served: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            slowest: AtomicU64::new(0),
            waits: [const { AtomicU64::new(0) }; 8 * 64],
        }
    }
}

impl Tally {
    fn waited(&self, since: Instant) {
        let micros = since.elapsed().as_micros() as u64;
        self.slowest.fetch_max(micros, Relaxed);
        let shift = (64 - micros.leading_zeros()).saturating_sub(4);
        let bucket = 8 * shift as usize + (micros >> shift) as usize;
        self.waits[bucket.min(8 * 64 - 1)].fetch_add(1, Relaxed);
    }

    /// The upper end of the bucket in which so much of all waits lies.
    fn quantile(&self, part: f64) -> u64 {
        let total: u64 = self.waits.iter().map(|count| count.load(Relaxed)).sum();
        let mut left = (total as f64 * part).ceil() as u64;
        for (bucket, count) in self.waits.iter().enumerate() {
            left = left.saturating_sub(count.load(Relaxed));
            if left == 0 {
                let shift = (bucket / 8).saturating_sub(1);
                return ((bucket - 8 * shift) as u64 + 1) << shift;
            }
        }
        u64::MAX
    }

    /// An error that may come; any other is a failure.
    fn failed(&self, error: &LockError) {
        match error {
            LockError::NotObtained(_) => self.refused.fetch_add(1, Relaxed),
            // One of several, while the others were waited for.
            LockError::Lost(_) => self.lost.fetch_add(1, Relaxed),
            LockError::Storage(error) if error.kind().is_transient() => {
                self.errors.fetch_add(1, Relaxed)
            }
            other => panic!("{other:?}"),
        };
    }

    fn report(&self) -> Report {
        let report = Report {
            live: heap::live(),
            resident: heap::resident().unwrap_or(0),
            tasks: Handle::current().metrics().num_alive_tasks(),
            served: self.served.swap(0, Relaxed),
            refused: self.refused.swap(0, Relaxed),
            lost: self.lost.swap(0, Relaxed),
            errors: self.errors.swap(0, Relaxed),
            p50: self.quantile(0.5),
            p99: self.quantile(0.99),
            slowest: self.slowest.swap(0, Relaxed),
        };
        self.waits.iter().for_each(|count| count.store(0, Relaxed));
        report
    }
}

// --- inside the process ------------------------------------------------------------------------------

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

pub fn main(url: &str, name: &str) {
    run(live(url, name));
}

async fn live(url: &str, name: &str) {
    let storage = RedisStorage::builder(url).connect_timeout(LIMIT);
    let storage = storage.connect().await.unwrap();
    let builder = LockFactory::builder(storage).storage_timeout(LIMIT);
    let worker = Worker {
        factory: builder.label(name).build().unwrap(),
        server: redis::Client::open(url).unwrap(),
        name: name.to_owned(),
        number: Arc::default(),
        stop: Arc::default(),
        tally: Arc::default(),
    };
    let mut orders = tokio::io::BufReader::new(tokio::io::stdin()).lines();
    let mut workers = JoinSet::new();
    say("ready");
    while let Some(order) = orders.next_line().await.unwrap() {
        match &*order {
            "work" => {
                worker.stop.store(false, Relaxed);
                worker.start(&mut workers);
            }
            "rest" => {
                worker.stop.store(true, Relaxed);
                while let Some(ended) = workers.join_next().await {
                    ended.unwrap();
                }
                workers = JoinSet::new();
                eventually("nothing is waited for or held", 3 * LIMIT, async || {
                    (worker.factory.keys(), worker.factory.waiters()) == (0, 0)
                })
                .await;
                // What was sent last is answered, and freed.
                sleep(ms(500)).await;
                say(&worker.tally.report().to_line());
            }
            _ => panic!("an order that it does not know"),
        }
    }
    assert_eq!(worker.factory.drain(LIMIT).await, 0);
}

#[derive(Clone)]
struct Worker {
    factory: LockFactory,
    server: redis::Client,
    name: String,
    number: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
}

/// Renewed every 300 ms.
const TTL: Duration = ms(900);

fn options() -> LockOptions {
    LockOptions::builder()
        .ttl(TTL)
        .interval(ms(100))
        .retries(100)
        .build()
        .unwrap()
}

fn millis(range: std::ops::Range<u64>) -> Duration {
    ms(fastrand::u64(range))
}

fn hot() -> String {
    format!("hot/{}", fastrand::u8(0..2))
}

impl Worker {
    fn start(&self, workers: &mut JoinSet<()>) {
        for _ in 0..6 {
            workers.spawn(self.clone().wants_what_all_want());
            workers.spawn(self.clone().has_a_key_of_its_own());
        }
        for _ in 0..3 {
            workers.spawn(self.clone().leaves_while_it_waits());
            workers.spawn(self.clone().serves_requests());
        }
        for _ in 0..2 {
            workers.spawn(self.clone().holds_for_long());
            workers.spawn(self.clone().does_not_wait());
            workers.spawn(self.clone().wants_several());
        }
        workers.spawn(self.clone().loses_its_lock());
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Relaxed)
    }

    /// Never the same again, in no process.
    fn new_key(&self) -> String {
        let number = self.number.fetch_add(1, Relaxed);
        format!("{}/{number}", self.name)
    }

    fn count<T>(&self, result: Result<T, LockError>) -> Option<T> {
        match result {
            Ok(guard) => {
                self.tally.served.fetch_add(1, Relaxed);
                Some(guard)
            }
            Err(error) => {
                self.tally.failed(&error);
                None
            }
        }
    }

    async fn wants_what_all_want(self) {
        while self.goes_on() {
            let lock = self.factory.create_lock(&*hot()).unwrap();
            let since = Instant::now();
            let guard = self.count(lock.lock(options()).await);
            self.tally.waited(since);
            sleep(millis(0..3)).await;
            drop(guard);
            sleep(millis(0..60)).await;
        }
    }

    async fn has_a_key_of_its_own(self) {
        while self.goes_on() {
            let lock = self.factory.create_lock(&*self.new_key()).unwrap();
            if let Some(guard) = self.count(lock.lock(options()).await) {
                // One in three is waited for.
                if fastrand::u8(0..3) == 0 {
                    let _ = guard.unlock().await;
                }
            }
            sleep(millis(0..30)).await;
        }
    }

    async fn leaves_while_it_waits(self) {
        while self.goes_on() {
            let key = match fastrand::bool() {
                true => hot(),
                false => self.new_key(),
            };
            let lock = self.factory.create_lock(&*key).unwrap();
            if let Ok(result) = timeout(millis(0..4), lock.lock(options())).await {
                self.count(result);
            }
            sleep(millis(0..30)).await;
        }
    }

    async fn holds_for_long(self) {
        while self.goes_on() {
            let lock = self.factory.create_lock(&*self.new_key()).unwrap();
            if let Some(guard) = self.count(lock.lock(options()).await)
                && timeout(2 * TTL, guard.lost()).await.is_ok()
            {
                self.tally.lost.fetch_add(1, Relaxed);
            }
        }
    }

    async fn does_not_wait(self) {
        while self.goes_on() {
            let lock = self.factory.create_lock(&*hot()).unwrap();
            self.count(lock.try_lock(options()).await);
            sleep(millis(0..30)).await;
        }
    }

    async fn wants_several(self) {
        while self.goes_on() {
            let keys = [hot(), self.new_key(), self.new_key()];
            let set = self
                .factory
                .create_lock_set(keys.each_ref().map(|key| &**key));
            self.count(set.unwrap().lock(options()).await);
            sleep(millis(0..90)).await;
        }
    }

    /// Of its requests one ends, one is dropped in mid-body, and one is dropped while it waits.
    async fn serves_requests(self) {
        let streams = async || {
            let (frames, body) = mpsc::channel::<Result<&'static str, io::Error>>(1);
            tokio::spawn(async move {
                for _ in 0..3 {
                    if frames.send(Ok("frame")).await.is_err() {
                        return;
                    }
                    sleep(ms(2)).await;
                }
            });
            let frames = futures_util::stream::unfold(body, async |mut body| {
                let frame = body.recv().await?;
                Some((frame, body))
            });
            Body::from_stream(frames)
        };
        let path = |request: &Request<Body>| -> Result<LockKey, InvalidKey> {
            LockKey::new(&request.uri().path()[1..])
        };
        let layer = DistributedLockLayer::new(self.factory.clone(), path);
        let layer = layer.options(options()).hold_to_body_end();
        let app: Router = Router::new().route("/{*key}", post(streams).route_layer(layer));
        while self.goes_on() {
            let key = match fastrand::bool() {
                true => hot(),
                false => self.new_key(),
            };
            let request = Request::post(format!("/{key}"))
                .body(Body::empty())
                .unwrap();
            let answer = app.clone().oneshot(request);
            match fastrand::u8(0..3) {
                0 => drop(timeout(millis(0..4), answer).await),
                way => {
                    let answer = answer.await.unwrap();
                    let served = &self.tally.served;
                    served.fetch_add(u64::from(answer.status().is_success()), Relaxed);
                    if way == 1 {
                        // Cut off where the lock was lost.
                        let _ = answer.into_body().collect().await;
                    }
                }
            }
            sleep(millis(0..60)).await;
        }
    }

    /// Somebody deletes its key in Redis.
    async fn loses_its_lock(self) {
        while self.goes_on() {
            let key = self.new_key();
            let lock = self.factory.create_lock(&*key).unwrap();
            if let Some(guard) = self.count(lock.lock(options()).await)
                && self
                    .delete(&format!("distributed-locks:{key}"))
                    .await
                    .is_ok()
            {
                within(LIMIT, "the loss", guard.lost()).await;
                self.tally.lost.fetch_add(1, Relaxed);
            }
        }
    }

    async fn delete(&self, name: &str) -> redis::RedisResult<u64> {
        let mut connection = self.server.get_multiplexed_async_connection().await?;
        redis::cmd("DEL")
            .arg(name)
            .query_async(&mut connection)
            .await
    }
}

// --- outside -----------------------------------------------------------------------------------------

/// The process of a replica. It ends with this value.
pub struct Replica {
    process: Child,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Replica {
    pub async fn start(url: &str, name: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["replica", url, name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::unbounded_channel();
        // Ends with the process, or when nobody listens any more.
        std::thread::spawn(move || {
            out.lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        let mut replica = Self { process, lines };
        assert_eq!(replica.says().await, "ready");
        replica
    }

    async fn says(&mut self) -> String {
        let word = within(6 * LIMIT, "a replica's word", self.lines.recv()).await;
        word.expect("a replica ended without a word")
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{order}").unwrap();
    }

    pub fn works(&mut self) {
        self.tell("work");
    }

    pub fn rests(&mut self) {
        self.tell("rest");
    }

    /// What it says when it rests.
    pub async fn report(&mut self) -> Report {
        self.says().await.parse().unwrap()
    }

    /// Gives back all that it has.
    pub async fn end(mut self) {
        drop(self.process.stdin.take());
        within(LIMIT, "a replica ends", async {
            while self.lines.recv().await.is_some() {}
        })
        .await;
        assert!(self.process.wait().unwrap().success(), "it failed");
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // The test has its result; a process that has ended by itself does not change it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
