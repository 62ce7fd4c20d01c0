//! What is counted and timed.

use std::collections::{BTreeMap, BTreeSet};

use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_util::MetricKindMask;
use tower::{Layer, Service, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, Unlocked,
    error::{InvalidKey, StorageErrorKind},
};

use super::{numbers::Numbers, *};

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_free_is_counted_and_timed() {
    let numbers = Numbers::start();
    let factory = factory(&memory());
    let guard = key(&factory).lock(patient()).await.unwrap();
    assert_eq!(numbers.of("distributed_lock_held"), 1.0);
    assert_eq!(numbers.of("distributed_lock_waiters"), 0.0);
    tokio::time::sleep(ms(70)).await;
    drop(guard);
    numbers.are(&[
        ("acquired_total{source=storage}", 1.0),
        ("hold_seconds", 1.0),
        ("wait_seconds{outcome=acquired}", 1.0),
    ]);
    assert_eq!(numbers.values("distributed_lock_hold_seconds"), [0.07]);
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_counted_by_where_it_came_from() {
    let memory = memory();
    let here = listening(&memory).await;
    let there = LockFactory::builder(memory.clone())
        .clock(Clock::tokio())
        .fencing(false)
        .linger(ms(500))
        .build()
        .unwrap();
    drop(there.create_lock("first").unwrap().lock(patient()).await);
    settle().await;
    let numbers = Numbers::start();

    // From the storage; two more in memory.
    let guard = key(&here).lock(patient()).await.unwrap();
    let others = [0, 1].map(|_| {
        let lock = key(&here).lock(patient());
        tokio::spawn(async move { drop(lock.await.unwrap()) })
    });
    settle().await;
    assert_eq!(numbers.of("distributed_lock_waiters"), 2.0);
    // In the queue of the storage, behind them.
    let queued = key(&there).lock(patient());
    let queued = tokio::spawn(async move { drop(queued.await.unwrap()) });
    settle().await;
    assert_eq!(numbers.of("distributed_lock_waiters"), 3.0);
    tokio::time::sleep(ms(4)).await;
    drop(guard);
    for other in others {
        other.await.unwrap();
    }
    settle().await;
    queued.await.unwrap();
    // It stays there for a while.
    drop(key(&there).lock(patient()).await.unwrap());
    there.drain(ms(1)).await;

    numbers.are(&[
        ("acquired_total{source=handoff}", 2.0),
        ("acquired_total{source=linger}", 1.0),
        ("acquired_total{source=queue}", 1.0),
        ("acquired_total{source=storage}", 1.0),
        ("hold_seconds", 5.0),
        // What came by a message is renewed at once.
        ("renewals_total{outcome=in_time}", 1.0),
        ("wait_seconds{outcome=acquired}", 5.0),
    ]);
    assert_eq!(
        numbers.values("distributed_lock_wait_seconds{outcome=acquired}"),
        [0.0, 0.004, 0.004, 0.004, 0.0]
    );
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_without_is_counted_by_why() {
    let numbers = Numbers::start();
    let factory = LockFactory::builder(memory())
        .clock(Clock::tokio())
        .max_waiters_per_key(1)
        .build()
        .unwrap();
    let lock = key(&factory);
    let guard = lock.lock(patient()).await.unwrap();
    lock.try_lock(patient()).await.unwrap_err();
    let waiting = tokio::spawn(lock.lock(options().retries(2).build().unwrap()));
    settle().await;
    lock.lock(patient()).await.unwrap_err();
    waiting.await.unwrap().unwrap_err();
    assert!(!polled(2, lock.lock(patient())).await);
    drop(guard);
    factory.drain(ms(1)).await;
    lock.lock(patient()).await.unwrap_err();
    numbers.are(&[
        ("acquired_total{source=storage}", 1.0),
        ("hold_seconds", 1.0),
        ("rejected_total{reason=draining}", 1.0),
        ("rejected_total{reason=not_obtained}", 2.0),
        ("rejected_total{reason=too_many_waiters}", 1.0),
        ("wait_seconds{outcome=acquired}", 1.0),
        ("wait_seconds{outcome=draining}", 1.0),
        ("wait_seconds{outcome=dropped}", 1.0),
        ("wait_seconds{outcome=not_obtained}", 2.0),
        ("wait_seconds{outcome=too_many_waiters}", 1.0),
    ]);
    assert_eq!(
        numbers.values("distributed_lock_wait_seconds{outcome=not_obtained}"),
        [0.0, 0.2]
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_valid_key_is_counted() {
    let numbers = Numbers::start();
    let keys = |_: &Request<()>| Err::<String, _>(InvalidKey::Empty);
    let mut service = DistributedLockLayer::new(factory(&memory()), keys).layer(service_fn(
        async |_: Request<()>| Ok::<_, Infallible>(Response::new(())),
    ));
    service.call(Request::new(())).await.unwrap();
    numbers.are(&[("rejected_total{reason=invalid_key}", 1.0)]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_has_no_time_to_ask_is_counted() {
    let numbers = Numbers::start();
    let (storage, factory) = faulty();
    let mut service = DistributedLockLayer::new(factory.clone(), |_: &Request<()>| "orders/42")
        .layer(service_fn(async |_: Request<()>| {
            Ok::<_, Infallible>(Response::new(()))
        }));
    let mut request = Request::post("/")
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "1m")
        .body(())
        .unwrap();
    *request.version_mut() = http::Version::HTTP_2;
    service.call(request).await.unwrap();
    numbers.are(&[("rejected_total{reason=not_obtained}", 1.0)]);

    // Nothing is left of the wait after the first of several.
    let set = factory.create_lock_set(["a", "b"]).unwrap();
    storage.next(Op::Acquire, Fault::timed(ms(100)));
    let options = options().retries(1).build().unwrap();
    let _first = set.lock(options).await.unwrap_err();
    assert_eq!(storage.count(Op::Acquire), 1);
    assert_eq!(
        numbers.of("distributed_lock_rejected_total{reason=not_obtained}"),
        2.0
    );
}

#[tokio::test(start_paused = true)]
async fn series_that_a_recorder_has_forgotten_for_idleness_come_back_with_the_next_lock() {
    const IDLE: Duration = ms(20);
    let recorder = PrometheusBuilder::new()
        .idle_timeout(MetricKindMask::ALL, Some(IDLE))
        .build_recorder();
    let scrape = recorder.handle();
    let _local = ::metrics::set_default_local_recorder(Box::leak(Box::new(recorder)));
    let factory = factory(&memory());
    let acquired = || {
        let text = scrape.render();
        let name = "distributed_lock_acquired_total{source=\"storage\"} ";
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(name).map(str::to_owned))
    };
    drop(key(&factory).lock(patient()).await.unwrap());
    assert_eq!(acquired().as_deref(), Some("1"));
    // The recorder has a clock of its own, which cannot be paused.
    std::thread::sleep(2 * IDLE);
    assert_eq!(acquired(), None);
    tokio::time::advance(ms(1_000)).await;
    drop(key(&factory).lock(patient()).await.unwrap());
    assert_eq!(acquired().as_deref(), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn what_the_storage_does_not_do_is_counted_by_operation_and_kind() {
    use StorageErrorKind as Kind;
    for (kind, word) in [
        (Kind::Unauthorized, "unauthorized"),
        (Kind::WrongType, "wrong_type"),
        (Kind::Rejected, "rejected"),
        (Kind::Unavailable, "unavailable"),
        (Kind::Timeout, "timeout"),
    ] {
        let numbers = Numbers::start();
        let (storage, factory) = faulty();
        let lock = key(&factory);
        storage.next(Op::Acquire, Fault::fails(kind));
        lock.lock(impatient()).await.unwrap_err();
        settle().await;
        let guard = lock.lock(patient()).await.unwrap();
        storage.next(Op::Release, Fault::fails(kind));
        let unlocked = guard.unlock().await;
        assert_eq!(unlocked.unwrap_err().kind(), kind);
        tokio::time::sleep(TTL).await;
        let (acquire, release) = (
            format!("storage_errors_total{{kind={word},operation=acquire}}"),
            format!("storage_errors_total{{kind={word},operation=release}}"),
        );
        numbers.are(&[
            ("acquired_total{source=storage}", 1.0),
            ("hold_seconds", 1.0),
            ("rejected_total{reason=storage}", 1.0),
            (&acquire, 1.0),
            (&release, 1.0),
            ("wait_seconds{outcome=acquired}", 1.0),
            ("wait_seconds{outcome=storage}", 1.0),
        ]);
    }
}

#[tokio::test(start_paused = true)]
async fn renewals_are_counted_by_whether_they_came_in_time() {
    let numbers = Numbers::start();
    let behind = memory();
    let (storage, factory) = faulty_over(&behind);
    let guard = key(&factory).lock(patient()).await.unwrap();
    let renewals = |outcome: &str| {
        numbers.of(&format!(
            "distributed_lock_renewals_total{{outcome={outcome}}}"
        ))
    };
    // At 1 s.
    tokio::time::sleep(ms(1_100)).await;
    assert_eq!(renewals("in_time"), 1.0);
    // At 2 s, 2.3 s; at 2.6 s there is less than half left.
    for _ in 0..2 {
        storage.next(Op::Renew, Fault::fails(StorageErrorKind::Unavailable));
    }
    tokio::time::sleep(ms(1_800)).await;
    assert_eq!(renewals("failed"), 2.0);
    assert_eq!(renewals("late"), 1.0);
    behind.clear();
    guard.lost().await;
    assert_eq!(renewals("not_ours"), 1.0);
    assert_eq!(
        numbers.of("distributed_lock_lost_total{reason=not_ours}"),
        1.0
    );
    assert_eq!(
        numbers.of("distributed_lock_storage_errors_total{kind=unavailable,operation=renew}"),
        2.0
    );
    drop(guard);
    settle().await;
    assert_eq!(
        numbers.of("distributed_lock_lost_total{reason=not_ours}"),
        1.0,
        "the release finds nothing that is not known"
    );
}

#[tokio::test(start_paused = true)]
async fn a_renewal_of_a_lock_that_was_given_back_meanwhile_is_no_news() {
    let numbers = Numbers::start();
    let (storage, factory) = faulty();
    let guard = key(&factory).lock(patient()).await.unwrap();
    let valve = faulty::Valve::shut();
    storage.next(Op::Renew, Fault::sent_by(&valve));
    storage.sent_times(Op::Renew, 1).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    valve.open();
    settle().await;
    numbers.are(&[
        ("acquired_total{source=storage}", 1.0),
        ("hold_seconds", 1.0),
        ("wait_seconds{outcome=acquired}", 1.0),
    ]);
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_counted_by_reason_when_it_happens_and_once() {
    for reason in ["expired", "not_ours", "max_hold", "draining"] {
        let numbers = Numbers::start();
        let behind = memory();
        let (storage, factory) = faulty_over(&behind);
        let options = options().max_hold(ms(10_000)).build().unwrap();
        let guard = key(&factory).lock(options).await.unwrap();
        match reason {
            "expired" => storage.always(Op::Renew, Fault::fails(StorageErrorKind::Timeout)),
            "not_ours" => behind.clear(),
            "draining" => drop(tokio::spawn(async move { factory.drain(ms(1)).await })),
            _ => {}
        }
        guard.lost().await;
        tokio::time::sleep(ms(1)).await;
        let series = format!("distributed_lock_lost_total{{reason={reason}}}");
        assert_eq!(numbers.of(&series), 1.0);
        assert_eq!(numbers.of("distributed_lock_held"), 0.0);
        assert!(numbers.values("distributed_lock_hold_seconds").is_empty());
        drop(guard);
        tokio::time::sleep(ms(1)).await;
        let lost = numbers.seen();
        let lost: Vec<_> = lost
            .iter()
            .filter(|(name, _)| name.contains("lost"))
            .collect();
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert_eq!(numbers.of(&series), 1.0);
        assert_eq!(numbers.of("distributed_lock_held"), 0.0);
        assert_eq!(numbers.values("distributed_lock_hold_seconds").len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_loss_that_only_the_release_finds_is_counted() {
    let numbers = Numbers::start();
    let behind = memory();
    let (storage, factory) = faulty_over(&behind);
    for unlocks in [true, false] {
        let guard = key(&factory).lock(patient()).await.unwrap();
        behind.clear();
        // At once, or after the first poll.
        storage.next(Op::Release, Fault::slow());
        if unlocks {
            assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
        } else {
            drop(guard);
        }
        settle().await;
    }
    assert_eq!(
        numbers.of("distributed_lock_lost_total{reason=not_ours}"),
        2.0
    );
}

#[tokio::test(start_paused = true)]
async fn a_release_that_was_carried_out_before_its_answer_got_lost_is_no_loss() {
    let numbers = Numbers::start();
    let (storage, factory) = faulty();
    let guard = key(&factory).lock(patient()).await.unwrap();
    let executed = Fault {
        error: Some(StorageErrorKind::Timeout),
        ..Fault::default()
    };
    storage.next(Op::Release, executed);
    drop(guard);
    storage.sent_times(Op::Release, 2).await;
    settle().await;
    assert_eq!(
        numbers.of("distributed_lock_lost_total{reason=not_ours}"),
        0.0
    );
}

#[tokio::test(start_paused = true)]
async fn the_gauges_return_to_zero_wherever_a_caller_is_dropped() {
    let numbers = Numbers::start();
    drop(key(&factory(&memory())).lock(patient()).await.unwrap());
    let mut ended = 0;
    for times in 0..30 {
        let (storage, factory) = faulty();
        let lock = key(&factory);
        storage.always(Op::Acquire, Fault::slow());
        storage.always(Op::Release, Fault::slow());
        // Alone, and behind others.
        for others in [0, 2] {
            let guards: Vec<_> = (0..others)
                .map(|_| {
                    let lock = lock.lock(patient());
                    tokio::spawn(async move {
                        let guard = lock.await.unwrap();
                        tokio::task::yield_now().await;
                        drop(guard);
                    })
                })
                .collect();
            tokio::task::yield_now().await;
            let whole = async {
                let guard = lock.lock(patient()).await.unwrap();
                tokio::task::yield_now().await;
                guard.unlock().await.unwrap()
            };
            ended += u32::from(polled(times, whole).await);
            for guard in guards {
                guard.await.unwrap();
            }
            assert_eq!(numbers.of("distributed_lock_waiters"), 0.0, "{times}");
            assert_eq!(numbers.of("distributed_lock_held"), 0.0, "{times}");
        }
    }
    assert!(ended > 10, "some got to the end: {ended}");
    assert!(
        numbers
            .values("distributed_lock_wait_seconds{outcome=dropped}")
            .len()
            > 3
    );
}

#[tokio::test(start_paused = true)]
async fn a_recorder_that_comes_later_counts_the_locks_that_come_after_it() {
    let factory = factory(&memory());
    let lock = key(&factory);
    let before = lock.lock(patient()).await.unwrap();
    let numbers = Numbers::start();
    drop(before);
    // Nothing below zero: it was never counted.
    numbers.are(&[]);
    drop(lock.lock(patient()).await.unwrap());
    numbers.are(&[
        ("acquired_total{source=storage}", 1.0),
        ("hold_seconds", 1.0),
        ("wait_seconds{outcome=acquired}", 1.0),
    ]);
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_counted_to_its_end_by_the_recorder_that_saw_it_arrive() {
    let factory = factory(&memory());
    let first = Numbers::start();
    let guard = key(&factory).lock(patient()).await.unwrap();
    let second = Numbers::start();
    drop(guard);
    assert_eq!(first.of("distributed_lock_held"), 0.0);
    assert_eq!(first.values("distributed_lock_hold_seconds").len(), 1);
    second.are(&[]);
    // The guards of recorders end in the order in which they began the other way round.
    drop(second);
}

#[tokio::test(start_paused = true)]
async fn the_name_of_a_factory_is_a_label_of_all_it_counts() {
    let numbers = Numbers::start();
    let factory = LockFactory::builder(memory())
        .clock(Clock::tokio())
        .metrics_name(String::from("orders"))
        .build()
        .unwrap();
    drop(key(&factory).lock(patient()).await.unwrap());
    for series in numbers.all().keys() {
        assert!(series.contains("factory=orders"), "{series}");
    }
}

type Words = BTreeMap<String, BTreeSet<String>>;

/// The rows of the table of metrics in the docs: name, kind, unit, and the words of each label.
fn documented() -> BTreeMap<String, (String, String, Words)> {
    let text = include_str!("../../docs/observability.md");
    let mut rows = BTreeMap::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with("| `distributed_lock_"))
    {
        let mut columns = line.trim_matches('|').split('|').map(str::trim);
        let name = columns.next().unwrap().trim_matches('`').to_owned();
        let (kind, unit) = (columns.next().unwrap(), columns.next().unwrap());
        let mut labels = Words::new();
        // `label`: `word`, `word`; `label`: ..
        for label in columns.next().unwrap().split(';').map(str::trim) {
            if let Some((label, words)) = label.split_once(':') {
                let words = words
                    .split(',')
                    .map(|word| word.trim().trim_matches('`').to_owned());
                labels.insert(label.trim_matches('`').to_owned(), words.collect());
            }
        }
        rows.insert(name, (kind.to_owned(), unit.to_owned(), labels));
    }
    rows
}

#[tokio::test(start_paused = true)]
async fn the_docs_list_every_metric_with_its_kind_unit_and_words() {
    let numbers = Numbers::start();
    drop(key(&factory(&memory())).lock(patient()).await.unwrap());
    let mut found = BTreeMap::new();
    for (series, what) in numbers.all() {
        let (name, labels) = series.split_once('{').unwrap_or((&series, ""));
        let (_, _, words) = found.entry(name.to_owned()).or_insert_with(|| {
            let unit = if what.unit == "seconds" {
                "seconds"
            } else {
                "1"
            };
            (what.kind.to_owned(), unit.to_owned(), Words::new())
        });
        let labels = labels.trim_end_matches('}').split(',');
        for (label, word) in labels.filter_map(|label| label.split_once('=')) {
            let words = words.entry(label.to_owned()).or_default();
            words.insert(word.to_owned());
        }
    }
    assert_eq!(found, documented());
}
