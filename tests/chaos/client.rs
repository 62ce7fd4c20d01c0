//! One client: what its process does, and the hold that the run has on that process.

use std::{
    env,
    io::{BufRead, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::AsyncBufReadExt,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_distributed_lock::{
    Lock, LockFactory, LockGuard, LockOptions, Redlock, Unlocked, error::LockError,
    storage::RedisStorage,
};

use super::{
    kit::{LIMIT, Sentinel, asking, ms, signal},
    record::{End, Line, now},
    sabotage::{Sabotage, Sabotaged},
    store::Store,
    world::Deployment,
};

/// Keys whose holders do nothing but be there, and look again and again whether they still are.
pub const HISTORIES: [&str; 2] = ["history-1", "history-2"];
/// Holders read the counter, sleep, and write what they have read and one more, if they are not told
/// that they have lost their lock.
pub const PLAIN: &str = "plain";
/// The same with the fencing token as condition. These holders never ask whether they hold the lock.
pub const FENCED: &str = "fenced";

pub fn keys() -> impl Iterator<Item = &'static str> {
    HISTORIES.into_iter().chain([PLAIN, FENCED])
}

/// How many tasks of a process want the same key.
const TASKS: u64 = 2;

/// What a client process is started with.
#[derive(Clone, Debug)]
pub struct Orders {
    pub name: String,
    pub deployment: Deployment,
    pub ttl: Duration,
    pub store: String,
    pub urls: Vec<String>,
    pub seed: u64,
    pub sabotage: Option<Sabotage>,
    /// How many replicas have to confirm a lock.
    pub replicas: u32,
}

impl Orders {
    fn words(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.deployment.name().to_owned(),
            self.ttl.as_millis().to_string(),
            self.store.clone(),
            self.urls.join(","),
            self.seed.to_string(),
            self.sabotage.map_or("-".into(), |it| format!("{it:?}")),
            self.replicas.to_string(),
        ]
    }

    fn from_words(words: &[&str]) -> Self {
        let [name, deployment, ttl, store, urls, seed, sabotage, replicas] = *words else {
            panic!("a client that does not know what to do: {words:?}");
        };
        Self {
            name: name.to_owned(),
            deployment: Deployment::from_name(deployment).unwrap(),
            ttl: ms(ttl.parse().unwrap()),
            store: store.to_owned(),
            urls: urls.split(',').map(str::to_owned).collect(),
            seed: seed.parse().unwrap(),
            sabotage: Sabotage::from_name(sabotage),
            replicas: replicas.parse().unwrap(),
        }
    }
}

// --- inside the process ---------------------------------------------------------------------------------------------

/// The program of a client's process.
pub fn main(words: &[&str]) {
    let orders = Orders::from_words(words);
    fastrand::seed(orders.seed);
    super::run(work(orders));
}

async fn factory(orders: &Orders) -> LockFactory {
    let label = orders.name.clone();
    let one = || RedisStorage::builder(orders.urls[0].as_str()).connect_timeout(ms(300));
    let builder = match (orders.deployment, orders.sabotage) {
        (Deployment::Single, None) => LockFactory::builder(one().connect_lazily().unwrap()),
        (Deployment::Redlock, _) => {
            let redlock = Redlock::connect_lazily(orders.urls.clone()).unwrap();
            return LockFactory::builder(redlock).label(label).build().unwrap();
        }
        (Deployment::Sentinel, _) => {
            let storage = RedisStorage::sentinel(Sentinel::SERVICE, orders.urls.clone());
            let storage = storage.replicas(orders.replicas, ms(300));
            LockFactory::builder(storage.connect_lazily().unwrap())
        }
        (Deployment::Cluster, _) => {
            let storage = RedisStorage::cluster(orders.urls.clone());
            LockFactory::builder(storage.connect_lazily().unwrap())
        }
        (Deployment::Single, Some(how)) => {
            let client = redis::Client::open(orders.urls[0].as_str()).unwrap();
            let storage = Sabotaged {
                storage: one().connect_lazily().unwrap(),
                how,
                server: client.get_multiplexed_async_connection().await.unwrap(),
            };
            return LockFactory::builder(storage).build().unwrap();
        }
    };
    let builder = builder.storage_timeout(ms(500)).label(label);
    builder.build().unwrap()
}

async fn work(orders: Orders) {
    let factory = factory(&orders).await;
    let store = Store::open(&orders.store).await;
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for (number, key) in (0..TASKS).flat_map(|_| keys()).enumerate() {
        let task = Task {
            name: format!("{}/{number}", orders.name),
            key,
            lock: factory.create_lock(key).unwrap(),
            options: asking(orders.ttl, LIMIT, ms(200)),
            store: store.clone(),
            stopped: stopped.clone(),
        };
        tasks.spawn(task.work());
    }
    // A word, or the end of whoever would say it.
    let mut words = tokio::io::BufReader::new(tokio::io::stdin()).lines();
    let _ = words.next_line().await;
    let _ = stop.send(true);
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let keys = factory.drain(ms(5_000)).await;
    Line::Drained { keys }.say();
}

struct Task {
    name: String,
    key: &'static str,
    lock: Lock,
    options: LockOptions,
    store: Store,
    stopped: watch::Receiver<bool>,
}

impl Task {
    async fn work(mut self) {
        for number in 0.. {
            let asked = now();
            let mut stopped = self.stopped.clone();
            // Some lose their patience, and drop what they wait for.
            let patience = match fastrand::u8(..20) {
                0 => ms(fastrand::u64(..100)),
                _ => 2 * LIMIT,
            };
            let guard = tokio::select! {
                guard = timeout(patience, self.lock.lock(self.options)) => guard,
                _ = stopped.wait_for(|stopped| *stopped) => return,
            };
            match guard {
                Ok(Ok(guard)) => {
                    let granted = now();
                    let stay = format!("{}:{number}", self.name);
                    Line::In {
                        stay: stay.clone(),
                        key: self.key.to_owned(),
                        asked,
                        granted,
                        token: guard.fencing_token().unwrap_or(0),
                        held: guard.is_held(),
                    }
                    .say();
                    self.stay(&stay, guard).await;
                }
                Ok(Err(error)) => {
                    let why = match &error {
                        LockError::Storage(error) => format!("{:?}", error.kind()),
                        LockError::NotObtained(_) => "NotObtained".to_owned(),
                        error => format!("{error:?}").replace(' ', "-"),
                    };
                    Line::Not { why }.say();
                    sleep(ms(20)).await;
                }
                Err(_) => {}
            }
        }
    }

    /// Mostly short; now and then as long as a lock that has to be renewed.
    fn hold(&self) -> Duration {
        match fastrand::u8(..25) {
            0 => self.options.ttl().mul_f64(1.5 * fastrand::f64()),
            _ => ms(fastrand::u64(..4)),
        }
    }

    async fn stay(&mut self, stay: &str, guard: LockGuard) {
        let hold = self.hold();
        match self.key {
            PLAIN => {
                let read = self.store.read(PLAIN, None).await;
                if still(stay, &guard) && holds(stay, &guard, hold).await {
                    let read = read.expect("nothing is refused here");
                    let write = self.store.write(PLAIN, None, read, stay).await;
                    let held = still(stay, &guard);
                    let stay = stay.to_owned();
                    Line::Wrote { stay, write, held }.say();
                }
            }
            FENCED => {
                let token = guard.fencing_token();
                if let Some(read) = self.store.read(FENCED, token).await {
                    sleep(hold).await;
                    let write = self.store.write(FENCED, token, read, stay).await;
                    let held = still(stay, &guard);
                    let stay = stay.to_owned();
                    Line::Wrote { stay, write, held }.say();
                }
            }
            _ => {
                holds(stay, &guard, hold).await;
            }
        }
        let held = still(stay, &guard);
        let left = now();
        let end = match guard.unlock().await {
            Ok(Unlocked::Held) if held => End::Held,
            Ok(_) => End::Told,
            Err(_) if !held => End::Told,
            Err(_) => End::Unknown,
        };
        let stay = stay.to_owned();
        Line::Out { stay, left, end }.say();
    }
}

/// What the guard says. If it says yes, it holds at `at` too, which is before.
fn still(stay: &str, guard: &LockGuard) -> bool {
    let at = now();
    let held = guard.is_held();
    if held {
        let stay = stay.to_owned();
        Line::Still { stay, at }.say();
    }
    held
}

/// Stays for so long, unless the lock is lost before.
async fn holds(stay: &str, guard: &LockGuard, hold: Duration) -> bool {
    let step = ms(20);
    let mut left = hold;
    while !left.is_zero() {
        tokio::select! {
            () = sleep(left.min(step)) => {}
            _ = guard.lost() => return false,
        }
        left = left.saturating_sub(step);
        if !still(stay, guard) {
            return false;
        }
    }
    true
}

// --- outside --------------------------------------------------------------------------------------------------------

/// What the processes have said, each line with the number of the client that said it.
pub type Record = Arc<Mutex<Vec<(usize, Line)>>>;

/// The process of a client. It ends with this value.
pub struct Client {
    process: Child,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Client {
    pub fn start(number: usize, orders: &Orders, record: &Record) -> Self {
        let mut process = Command::new(env::current_exe().unwrap())
            .arg("client")
            .args(orders.words())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let record = Arc::clone(record);
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let line = line.parse().expect("a line as it is written");
                let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
                record.push((number, line));
            }
        });
        Self {
            process,
            reader: Some(reader),
        }
    }

    /// Stops it where it stands (SIGSTOP).
    pub fn pause(&self) {
        signal("STOP", &self.process);
    }

    pub fn resume(&self) {
        signal("CONT", &self.process);
    }

    /// Ends it at once (SIGKILL). Returns when all that it had said is read.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("it said nothing but lines");
        }
    }

    /// It takes no more locks, gives back those that it has, and ends.
    pub fn stop(&mut self) {
        // One that has ended by itself is found out by what it has not said.
        let _ = writeln!(self.process.stdin.as_mut().unwrap(), "stop");
    }

    /// Whether it has ended, and well.
    pub fn ended(&mut self) -> Option<bool> {
        let status = self.process.try_wait().expect("it can be waited for");
        status.map(|status| status.success())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
