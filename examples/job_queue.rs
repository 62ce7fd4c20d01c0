//! Workers that take jobs from a queue, with nothing of HTTP.
//!
//! Two replicas of a service with four workers each take jobs from one queue. Each job changes one
//! account: two jobs of one account must not run at the same time, on whichever replicas they are;
//! jobs of different accounts should. A worker's service has types of its own for jobs, receipts and
//! errors. A job whose account is busy for long goes to the end of the queue, and its worker does
//! something else meanwhile.
//!
//! ```text
//! cargo run --example job_queue
//! cargo run --example job_queue -- --redis redis://127.0.0.1:6379
//! ```
//!
//! The locks are in memory by default (one storage that both replicas share, as they would share a
//! Redis), or in the Redis server named with `--redis`. Exits with 1 if two jobs of one account ran
//! at the same time under the layer, or if none of different accounts did.

#![allow(clippy::unwrap_used, reason = "a poisoned mutex should end an example")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what it is for"
)]

use std::{
    collections::VecDeque,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey, LockOptions,
    error::BoxError,
    middleware::Rejection,
    storage::{MemoryStorage, RedisStorage},
};

const JOBS: usize = 80;
const ACCOUNTS: usize = 5;
const REPLICAS: usize = 2;
const WORKERS: usize = 4;
/// How long a job takes.
const WORK: Duration = Duration::from_millis(10);

// --- what a service like this has of its own: its request, its response, its error ---------------

/// A request of the service: pay one coin into an account.
#[derive(Clone, Copy)]
struct Job {
    account: usize,
}

struct Receipt {
    balance: usize,
}

#[derive(Debug, thiserror::Error)]
enum JobError {
    /// The job was not begun, or was cut off: it has to be done again.
    #[error("try again: {0}")]
    TryAgain(#[from] Rejection),
}

/// The stack of a worker: the lock, and what a job does under it.
fn worker(
    accounts: Arc<Accounts>,
    locks: Option<LockFactory>,
) -> Result<
    impl Service<Job, Response = Receipt, Error = JobError, Future: Send> + Clone + Send + 'static,
    BoxError,
> {
    // A worker waits for an account for up to 4 × 5 ms before it puts the job back.
    let options = LockOptions::builder()
        .interval(Duration::from_millis(5))
        .retries(4)
        .build()?;
    let one_job_per_account = locks.map(|locks| {
        DistributedLockLayer::new(locks, |job: &Job| {
            LockKey::from_parts(["accounts", &job.account.to_string()])
        })
        .options(options)
        .reject_with_error(JobError::from)
        // A job that has to know its fencing token: `.on_acquired(|job: &mut Job, lock| ..)`.
        .without_held_lock()
    });
    Ok(ServiceBuilder::new()
        .option_layer(one_job_per_account)
        .service(service_fn(move |job: Job| {
            let accounts = Arc::clone(&accounts);
            async move { Ok(accounts.pay_into(job.account).await) }
        })))
}

/// Takes jobs until there are none.
async fn work<S>(mut service: S, queue: Arc<Queue>) -> Result<(), JobError>
where
    S: Service<Job, Response = Receipt, Error = JobError>,
{
    while let Some(job) = queue.take() {
        match service.ready().await?.call(job).await {
            Ok(receipt) => queue.done(job, receipt),
            Err(JobError::TryAgain(_)) => queue.put_back(job),
        }
    }
    Ok(())
}

// --- the queue, and what is measured -------------------------------------------------------------

/// Stands for the broker.
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    counts: Mutex<Counts>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    done: usize,
    put_back: usize,
    /// The greatest balance that a receipt named.
    balances: [usize; ACCOUNTS],
}

impl Queue {
    fn new() -> Self {
        // Jobs of one account come in pairs: they meet.
        let jobs = (0..JOBS).map(|number| Job {
            account: number / 2 % ACCOUNTS,
        });
        Self {
            jobs: Mutex::new(jobs.collect()),
            counts: Mutex::default(),
        }
    }

    fn take(&self) -> Option<Job> {
        self.jobs.lock().unwrap().pop_front()
    }

    fn put_back(&self, job: Job) {
        self.counts.lock().unwrap().put_back += 1;
        self.jobs.lock().unwrap().push_back(job);
    }

    fn done(&self, job: Job, receipt: Receipt) {
        let mut counts = self.counts.lock().unwrap();
        counts.done += 1;
        let balance = &mut counts.balances[job.account];
        *balance = receipt.balance.max(*balance);
    }
}

/// Stands for the database, and sees who works in it.
#[derive(Default)]
struct Accounts {
    balances: Mutex<[usize; ACCOUNTS]>,
    running: Mutex<[usize; ACCOUNTS]>,
    seen: Mutex<Seen>,
}

#[derive(Clone, Copy, Default)]
struct Seen {
    /// Jobs that began while another of their account ran.
    overlaps: usize,
    most_at_once: usize,
}

/// A job that runs, until this is dropped.
struct Running<'a>(&'a Accounts, usize);

impl Accounts {
    /// Reads the balance, works for a while, and writes it: two at a time, and a coin is lost.
    async fn pay_into(&self, account: usize) -> Receipt {
        let _running = self.begin(account);
        let balance = self.balances.lock().unwrap()[account];
        tokio::time::sleep(WORK).await;
        let balance = balance + 1;
        self.balances.lock().unwrap()[account] = balance;
        Receipt { balance }
    }

    fn begin(&self, account: usize) -> Running<'_> {
        let mut running = self.running.lock().unwrap();
        running[account] += 1;
        let mut seen = self.seen.lock().unwrap();
        seen.overlaps += usize::from(running[account] > 1);
        seen.most_at_once = seen.most_at_once.max(running.iter().sum());
        Running(self, account)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.lock().unwrap()[self.1] -= 1;
    }
}

// --- two replicas --------------------------------------------------------------------------------

/// Where the locks are kept.
#[derive(Clone)]
enum Locks {
    Memory(MemoryStorage),
    Redis(String),
}

impl Locks {
    /// A factory such as each replica makes at its start.
    async fn factory(&self) -> Result<LockFactory, BoxError> {
        Ok(match self {
            Self::Memory(storage) => LockFactory::new(storage.clone()),
            Self::Redis(url) => LockFactory::new(RedisStorage::connect(url).await?),
        })
    }
}

async fn run(name: &str, locks: Option<&Locks>) -> Result<Row, BoxError> {
    let queue = Arc::new(Queue::new());
    let accounts = Arc::new(Accounts::default());
    let mut workers = JoinSet::new();
    let mut factories = Vec::new();
    let started = Instant::now();
    for _ in 0..REPLICAS {
        let factory = match locks {
            Some(locks) => Some(locks.factory().await?),
            None => None,
        };
        let service = worker(Arc::clone(&accounts), factory.clone())?;
        for _ in 0..WORKERS {
            workers.spawn(work(service.clone(), Arc::clone(&queue)));
        }
        factories.extend(factory);
    }
    while let Some(worker) = workers.join_next().await {
        worker??;
    }
    let elapsed = started.elapsed();
    for factory in factories {
        factory.drain(Duration::from_secs(1)).await;
    }

    let counts = *queue.counts.lock().unwrap();
    let seen = *accounts.seen.lock().unwrap();
    let row = Row {
        done: counts.done,
        put_back: counts.put_back,
        overlaps: seen.overlaps,
        lost: counts.done - counts.balances.iter().sum::<usize>(),
        most_at_once: seen.most_at_once,
    };
    row.print(name, elapsed);
    Ok(row)
}

struct Row {
    done: usize,
    put_back: usize,
    overlaps: usize,
    /// Coins that were paid in and are not there.
    lost: usize,
    most_at_once: usize,
}

impl Row {
    const HEAD: &str = "                done   put back   overlaps   lost   at once    time";

    fn print(&self, name: &str, time: Duration) {
        let Self {
            done,
            put_back,
            overlaps,
            lost,
            most_at_once,
        } = self;
        println!(
            "{name:<14}{done:>6}{put_back:>11}{overlaps:>11}{lost:>7}{most_at_once:>10}{time:>8.0?}"
        );
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let mut arguments = std::env::args().skip(1);
    let locks = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Locks::Memory(MemoryStorage::new()),
        (Some("--redis"), Some(url)) => Locks::Redis(url),
        _ => {
            eprintln!("usage: job_queue [--redis redis://host:port]");
            return Ok(ExitCode::from(2));
        }
    };
    let place = match &locks {
        Locks::Memory(_) => "memory",
        Locks::Redis(_) => "Redis",
    };
    println!(
        "{JOBS} jobs of {ACCOUNTS} accounts, {REPLICAS} replicas with {WORKERS} workers each; locks in {place}\n"
    );
    println!("{}", Row::HEAD);
    run("no layer", None).await?;
    let with = run("with the layer", Some(&locks)).await?;

    let one_at_a_time = with.overlaps == 0 && with.lost == 0;
    Ok(
        if with.done == JOBS && one_at_a_time && with.most_at_once > 1 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        },
    )
}
