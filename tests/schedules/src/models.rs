//! Models: a few threads that use the lock, and what holds however they come by each other.
//!
//! Shuttle switches threads at each step on a lock or an atomic of ours, by chance (`random`), or with few
//! switches at the worst moments (`pct`). What tokio and futures-util have (`Notify`, `AtomicWaker`, the
//! runtime) are steps that nothing comes between. Time stands still, so no timer makes up for a wake-up
//! that was lost: whoever is not woken waits for ever, and the model ends with "exceeded max_steps".

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use shuttle::{
    Config, MaxSteps, Runner,
    future::block_on,
    scheduler::{PctScheduler, RandomScheduler},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use crate::{
    Clock, LockFactory, LockGuard, LockOptions, calls,
    clock::Timestamp,
    coordinator::{
        signal::{Holding, Signal},
        table::Table,
    },
    error::LossReason,
    key::LockName,
    nodes,
    storage::MemoryStorage,
};

/// By name, which is the promise.
const MODELS: &[(&str, fn())] = &[
    (
        "one_of_all_callers_holds_the_lock_and_each_has_its_turn",
        callers_of_one_process,
    ),
    (
        "a_caller_that_goes_while_it_is_woken_passes_the_turn_on",
        a_caller_goes,
    ),
    ("processes_give_the_lock_to_each_other", two_processes),
    (
        "a_process_whose_caller_goes_while_it_is_given_the_lock_gives_it_on",
        a_process_gives_up,
    ),
    (
        "a_key_that_comes_and_goes_is_in_the_table_once_and_then_not_at_all",
        comes_and_goes,
    ),
    ("whoever_waits_for_the_loss_hears_of_it", the_loss_is_heard),
    (
        "a_lock_is_lost_or_given_back_but_not_both",
        lost_or_given_back,
    ),
    ("what_is_lost_does_not_come_back", not_prolonged),
    ("whoever_waits_for_a_key_is_found_in_the_table", is_found),
    (
        "calls_of_a_thread_are_written_in_their_order_and_answered_to_whom_they_belong",
        calls::in_their_order,
    ),
    ("a_full_part_is_written_by_who_filled_it", calls::full_parts),
    (
        "calls_that_are_given_up_keep_no_others_from_their_answers",
        calls::given_up,
    ),
    (
        "calls_are_told_when_their_runtime_ends",
        calls::the_runtime_ends,
    ),
    ("a_grant_that_comes_late_is_given_back", nodes::late_grants),
    (
        "one_of_all_holds_the_lock_of_three_nodes_and_leaves_nothing",
        nodes::one_of_all,
    ),
    (
        "what_was_released_is_not_set_again_by_its_renewal",
        nodes::healed_and_released,
    ),
];

/// Runs all models, or those whose name contains the first argument; `SCHEDULES` says how many orders of each,
/// `SEED` from where they are chosen.
pub(crate) fn run() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let number = |name, usual| {
        let set = std::env::var(name).ok();
        set.map_or(usual, |set| set.parse().expect("a number"))
    };
    let schedules = number("SCHEDULES", 400) as usize;
    let seed = number("SEED", std::process::id().into());
    let mut failed = false;
    for (name, model) in MODELS.iter().filter(|(name, _)| name.contains(&wanted)) {
        let started = Instant::now();
        let mut config = Config::new();
        config.stack_size = 1 << 20;
        config.max_steps = MaxSteps::FailAfter(100_000);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let random = RandomScheduler::new_from_seed(seed, schedules / 2);
            Runner::new(random, config.clone()).run(model);
            let pct = PctScheduler::new_from_seed(seed, 3, schedules / 2);
            Runner::new(pct, config.clone()).run(model);
        }));
        match outcome {
            Ok(()) => println!("{name}: {schedules} schedules in {:.1?}", started.elapsed()),
            Err(_) => {
                failed = true;
                println!("{name}: FAILED. Once more: SEED={seed} SCHEDULES={schedules}, {name}");
            }
        }
    }
    std::process::exit(failed.into());
}

pub(crate) fn driver() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// Runs `model` with a runtime that a thread of its own drives.
pub(crate) fn driven<R>(model: impl FnOnce() -> R) -> R {
    // Pauses are chosen by chance.
    fastrand::seed(7);
    let runtime = driver();
    // All of shuttle's threads are one for tokio.
    let handle = runtime.handle().clone();
    let _entered = handle.enter();
    let has_ended = Arc::new(AtomicBool::new(false));
    let driver = thread::spawn({
        let has_ended = Arc::clone(&has_ended);
        move || {
            runtime.block_on(async {
                while !has_ended.load(SeqCst) {
                    thread::yield_now();
                    tokio::task::yield_now().await;
                }
            });
        }
    });
    let result = model();
    has_ended.store(true, SeqCst);
    driver.join().expect("the driver has ended");
    result
}

/// The same with a storage, and then until nothing is left.
fn with_runtime(model: impl FnOnce(&MemoryStorage) -> Vec<LockFactory>) {
    driven(|| {
        let storage = MemoryStorage::with_clock(Clock::tokio());
        let factories = model(&storage);
        // What is on its way comes to its end by itself.
        while !storage.is_empty() || factories.iter().any(|factory| factory.keys() > 0) {
            thread::yield_now();
        }
        assert!(factories.iter().all(|factory| factory.waiters() == 0));
        factories
    });
}

fn factory(storage: &MemoryStorage) -> LockFactory {
    LockFactory::builder(storage.clone())
        .clock(Clock::tokio())
        .build()
        .expect("settings")
}

async fn lock(factory: &LockFactory) -> LockGuard {
    let lock = factory.create_lock("key").expect("a key");
    lock.lock(LockOptions::default()).await.expect("in time")
}

/// Asks for the lock, and goes after a few looks at it.
async fn ask_and_go(factory: &LockFactory, looks: usize) {
    let mut asking = pin!(lock(factory));
    let mut left = looks;
    poll_fn(|cx| match asking.as_mut().poll(cx) {
        Poll::Ready(_) => Poll::Ready(()),
        Poll::Pending if left == 0 => Poll::Ready(()),
        Poll::Pending => {
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

/// Counts who is inside.
#[derive(Clone, Default)]
pub(crate) struct Inside(Arc<AtomicUsize>);

impl Inside {
    pub(crate) fn visit(&self) {
        assert_eq!(self.0.fetch_add(1, SeqCst), 0, "two are inside");
        thread::yield_now();
        self.0.fetch_sub(1, SeqCst);
    }
}

fn visitors(factories: &[LockFactory], inside: &Inside) -> Vec<thread::JoinHandle<()>> {
    let visitor = |factory: &LockFactory| {
        let (factory, inside) = (factory.clone(), inside.clone());
        thread::spawn(move || {
            block_on(async {
                let guard = lock(&factory).await;
                inside.visit();
                drop(guard);
            });
        })
    };
    factories.iter().map(visitor).collect()
}

pub(crate) fn join(threads: Vec<thread::JoinHandle<()>>) {
    threads
        .into_iter()
        .for_each(|it| it.join().expect("no panic"));
}

fn callers_of_one_process() {
    with_runtime(|storage| {
        let factory = factory(storage);
        join(visitors(
            &[factory.clone(), factory.clone(), factory.clone()],
            &Inside::default(),
        ));
        vec![factory]
    });
}

fn a_caller_goes() {
    with_runtime(|storage| {
        let factory = factory(storage);
        let mut threads = visitors(&[factory.clone(), factory.clone()], &Inside::default());
        for looks in [0, 2] {
            let factory = factory.clone();
            threads.push(thread::spawn(move || block_on(ask_and_go(&factory, looks))));
        }
        join(threads);
        vec![factory]
    });
}

fn two_processes() {
    with_runtime(|storage| {
        let factories = [factory(storage), factory(storage)];
        let inside = Inside::default();
        let mut threads = visitors(&factories, &inside);
        threads.extend(visitors(&factories[..1], &inside));
        join(threads);
        factories.into()
    });
}

fn a_process_gives_up() {
    with_runtime(|storage| {
        let factories = [factory(storage), factory(storage), factory(storage)];
        let mut threads = visitors(&factories[..2], &Inside::default());
        let factory = factories[2].clone();
        threads.push(thread::spawn(move || block_on(ask_and_go(&factory, 3))));
        join(threads);
        factories.into()
    });
}

fn comes_and_goes() {
    with_runtime(|storage| {
        let factory = factory(storage);
        let inside = Inside::default();
        let threads = [(); 2].map(|()| {
            let (factory, inside) = (factory.clone(), inside.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    let lock = factory.create_lock("key").expect("a key");
                    if let Ok(guard) = block_on(lock.try_lock(LockOptions::default())) {
                        inside.visit();
                        drop(guard);
                    }
                }
            })
        });
        join(threads.into());
        vec![factory]
    });
}

/// A signal of a lock that is good for a second, and its clock.
fn signal() -> (Arc<Signal>, Timestamp) {
    let clock = Clock::system();
    let deadline = clock.now() + Duration::from_secs(3_600);
    let ends = deadline + Duration::from_secs(3_600);
    (Arc::new(Signal::new(clock, deadline, ends)), deadline)
}

fn the_loss_is_heard() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let _entered = runtime.enter();
    let (signal, _) = signal();
    let loses = Arc::clone(&signal);
    let awaits = Arc::clone(&signal);
    let threads = vec![
        thread::spawn(move || {
            assert!(loses.lose(LossReason::NotOurs));
        }),
        thread::spawn(move || {
            assert_eq!(block_on(awaits.lost()), LossReason::NotOurs);
        }),
        // As a response future does: it has itself woken, and then looks.
        thread::spawn(move || {
            block_on(poll_fn(|cx| {
                signal.watch(cx.waker());
                match signal.look() {
                    Holding::Held => Poll::Pending,
                    _ => Poll::Ready(()),
                }
            }));
        }),
    ];
    join(threads);
}

fn lost_or_given_back() {
    let (signal, _) = signal();
    let told = Arc::new(AtomicUsize::new(0));
    let mut threads = Vec::new();
    for reason in [LossReason::NotOurs, LossReason::Draining] {
        let (signal, told) = (Arc::clone(&signal), Arc::clone(&told));
        threads.push(thread::spawn(move || {
            if signal.lose(reason) {
                told.fetch_add(1, SeqCst);
                assert_eq!(signal.look(), Holding::Lost(reason));
            }
        }));
    }
    let gives_back = Arc::clone(&signal);
    threads.push(thread::spawn(move || {
        gives_back.give_back();
        let is = gives_back.look();
        assert!(is != Holding::Held);
        assert_eq!(gives_back.look(), is);
    }));
    join(threads);
    let was_lost = matches!(signal.look(), Holding::Lost(_));
    assert_eq!(told.load(SeqCst), usize::from(was_lost));
}

fn not_prolonged() {
    let (signal, deadline) = signal();
    let looks = Arc::clone(&signal);
    let threads = vec![
        thread::spawn(move || {
            let first = looks.look_at(deadline);
            if first != Holding::Held {
                assert_eq!(looks.look_at(deadline), first, "it came back");
                assert_eq!(
                    looks.look_at(Timestamp::from_nanos(0)),
                    first,
                    "it came back"
                );
            }
        }),
        thread::spawn(move || signal.prolong(deadline + Duration::from_secs(3_600))),
    ];
    join(threads);
}

/// Nobody is in a cell that others do not find: there would be two for one key.
fn is_found() {
    let table = Arc::new(Table::new(false));
    let name = LockName::parse("lock", "lock:key").expect("a name");
    let threads = [(); 3].map(|()| {
        let (table, name) = (Arc::clone(&table), name.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                let (cell, place) = table.enter(&name, |cell, slot| {
                    let second = Duration::from_secs(1);
                    (Arc::clone(cell), slot.state.join(second, second, second))
                });
                let found = table.find(&name).expect("a cell");
                assert!(Arc::ptr_eq(&found, &cell), "a second cell");
                assert_eq!(table.len(), 1);
                let _ = cell.lock().state.leave(place);
                table.forget(&cell);
            }
        })
    });
    join(threads.into());
    assert!(table.is_empty());
}
