//! A day of two processes over one storage, in simulated time: holders, renewals, losses, waits,
//! callers that leave, a storage that is slow, fails, hangs, or forgets all. At the end of each hour
//! they rest, and there is what there was at the rest before.

use std::{
    env,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use fastrand::Rng;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tower_distributed_lock::{
    Clock, LockFactory, LockOptions,
    error::{LockError, StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockStorage, MemoryStorage, ReleaseReply,
        ReleaseRequest, RenewReply, RenewRequest,
    },
};

use crate::{
    heap,
    kit::ms,
    seconds,
    world::{paused, settle, warm_up},
};

const CALLERS: usize = 10;

const HOUR: Duration = seconds(3_600);

/// A storage at the end of a line whose weather changes.
#[derive(Clone)]
struct Weather {
    memory: MemoryStorage,
    random: Arc<Mutex<Rng>>,
}

impl Weather {
    /// What becomes of a call: how long it is on its way there, whether it arrives, how long its
    /// answer is on its way back, and whether that arrives. `None`: it is never heard of again.
    fn fate(&self) -> Option<(Duration, bool, Duration, bool)> {
        let mut random = self.random.lock().unwrap();
        let fate = random.u32(0..1_000);
        let mut way = || Duration::from_micros(random.u64(50..2_000));
        let (there, back) = (way(), way());
        match fate {
            0..5 => None,
            5..15 => Some((there, false, back, false)),
            15..25 => Some((there, true, back, false)),
            25..50 => Some((100 * there, true, 100 * back, true)),
            _ => Some((there, true, back, true)),
        }
    }

    async fn call<T>(&self, call: impl AsyncFnOnce() -> T) -> Result<T, StorageError> {
        let Some((there, arrives, back, answers)) = self.fate() else {
            return pending().await;
        };
        let lost = || StorageError::new(StorageErrorKind::Unavailable);
        sleep(there).await;
        if !arrives {
            return Err(lost());
        }
        let answer = call().await;
        sleep(back).await;
        if answers { Ok(answer) } else { Err(lost()) }
    }
}

impl LockStorage for Weather {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.call(async || self.memory.acquire(request).await)
            .await?
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let renewed = self.call(async || self.memory.renew(requests).await).await;
        renewed.unwrap_or_else(|error| vec![Err(error); requests.len()])
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.call(async || self.memory.release(request).await)
            .await?
    }

    async fn listen(&self, inbox: Inbox) {
        self.memory.listen(inbox).await;
    }
}

#[derive(Clone, Copy, Default)]
struct Seen {
    served: u32,
    refused: u32,
    failed: u32,
    left: u32,
    lost: u32,
}

/// One that comes and goes until `end`. It does any of the things that callers do.
async fn caller(factory: LockFactory, mut random: Rng, end: Instant) -> Seen {
    let mut seen = Seen::default();
    let wait = |ttl| {
        let options = LockOptions::builder().ttl(seconds(ttl)).interval(ms(500));
        options.retries(60).build().unwrap()
    };
    while Instant::now() < end {
        let key = match random.u8(0..4) {
            0 => format!("new/{}", random.u64(..)),
            _ => format!("hot/{}", random.u8(0..3)),
        };
        let lock = factory.create_lock(&*key).unwrap();
        let options = wait(random.u64(2..6));
        let locking = match random.u8(0..8) {
            0 => lock.try_lock(options),
            _ => lock.lock(options),
        };
        let patience = ms(random.u64(0..60_000));
        let hold = ms(random.u64(0..20_000));
        match timeout(patience, locking).await {
            Err(_) => seen.left += 1,
            Ok(Ok(guard)) => {
                seen.served += 1;
                if timeout_at(Instant::now() + hold, guard.lost())
                    .await
                    .is_ok()
                {
                    seen.lost += 1;
                }
                if random.bool() {
                    drop(guard);
                } else {
                    let _ = guard.unlock().await;
                }
            }
            Ok(Err(LockError::NotObtained(_))) => seen.refused += 1,
            Ok(Err(LockError::Storage(_))) => seen.failed += 1,
            Ok(Err(other)) => panic!("{other:?}"),
        }
        sleep(ms(random.u64(0..60_000))).await;
    }
    seen
}

async fn hour(factories: &[LockFactory], memory: &MemoryStorage, random: &mut Rng) -> Seen {
    let end = Instant::now() + HOUR - seconds(120);
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let factory = factories[number % factories.len()].clone();
        callers.spawn(caller(factory, random.fork(), end));
    }
    for _ in 0..3 {
        sleep(ms(random.u64(0..1_000_000))).await;
        memory.clear();
    }
    sleep_until(end).await;
    let mut all = Seen::default();
    while let Some(seen) = callers.join_next().await {
        let seen = seen.unwrap();
        all.served += seen.served;
        all.refused += seen.refused;
        all.failed += seen.failed;
        all.left += seen.left;
        all.lost += seen.lost;
    }
    // Until all that hangs is given up, and the locks that were left have run out.
    sleep(seconds(120)).await;
    settle().await;
    all
}

pub fn a_day_leaves_nothing() {
    let seed = env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    paused(async {
        let mut random = Rng::with_seed(seed);
        let weather = Weather {
            memory: MemoryStorage::with_clock(Clock::tokio()),
            random: Arc::new(Mutex::new(random.fork())),
        };
        let factories = [(); 2].map(|()| {
            let builder = LockFactory::builder(weather.clone()).clock(Clock::tokio());
            builder.build().unwrap()
        });
        warm_up(64).await;
        let tasks = || {
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks()
        };
        let mut rests = Vec::with_capacity(24);
        let mut all = Seen::default();
        for _ in 0..24 {
            let seen = hour(&factories, &weather.memory, &mut random).await;
            all.served += seen.served;
            all.refused += seen.refused;
            all.failed += seen.failed;
            all.left += seen.left;
            all.lost += seen.lost;
            for factory in &factories {
                assert_eq!((factory.keys(), factory.waiters()), (0, 0), "SEED={seed}");
            }
            assert!(weather.memory.is_empty(), "SEED={seed}");
            rests.push((heap::live(), tasks()));
        }
        println!(
            "{} locks given, {} callers left, {} lost their lock, {} refused, {} told of a failure; \
             bytes and tasks at rest {:?}",
            all.served, all.left, all.lost, all.refused, all.failed, rests
        );
        assert!(
            all.served > 1_000 && all.lost > 10 && all.left > 10,
            "it has shown nothing"
        );
        // Two keepers.
        assert!(rests.iter().all(|rest| rest.1 == 2), "SEED={seed}");
        let most = rests[..4].iter().map(|rest| rest.0).max().unwrap();
        for rest in &rests {
            // A table or a queue may have to be a little larger once in a day.
            assert!(rest.0 <= most + 4_096, "SEED={seed}: {rests:?}");
        }
    });
}
