//! A span for each lock.

use tower::{Layer, Service, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockKey, Unlocked, error::StorageErrorKind,
    middleware::RequestKey,
};
use tracing::{Instrument, Level};
use tracing_subscriber::filter::LevelFilter;

use super::{capture::Capture, *};

fn start() -> (Capture, tracing::subscriber::DefaultGuard) {
    Capture::start(LevelFilter::TRACE)
}

/// Field by field: what must be there, and nothing else.
#[track_caller]
fn has(span: &capture::Span, expected: &[(&str, &str)]) {
    let fields: Vec<_> = span
        .fields
        .iter()
        .filter(|(name, _)| *name != "fencing_token")
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let mut expected = expected.to_vec();
    expected.push(("key", "orders/42"));
    expected.sort_unstable();
    assert_eq!(fields, expected);
    assert!(span.is_closed, "{span:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lock_has_a_span_with_its_wait_its_hold_and_its_outcome() {
    let (seen, _default) = start();
    let (_, factory) = faulty();
    let guard = key(&factory).lock(patient()).await.unwrap();
    let token = guard.fencing_token().unwrap();
    tokio::time::sleep(ms(70)).await;
    assert!(!seen.lock().is_closed);
    drop(guard);

    let span = seen.lock();
    has(
        &span,
        &[
            ("wait_ms", "0.0"),
            ("source", "storage"),
            ("hold_ms", "70.0"),
            ("outcome", "released"),
        ],
    );
    assert_eq!(span.field("fencing_token"), Some(&*token.to_string()));
    assert_eq!(span.target, "tower_distributed_lock::lock");
    assert_eq!(span.level, Level::INFO);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_knows_who_blocked_it_and_for_how_long() {
    let factory = listening(&memory()).await;
    let (seen, _default) = start();
    let guard = key(&factory).lock(patient()).await.unwrap();
    let next = tokio::spawn(key(&factory).lock(patient()));
    settle().await;
    tokio::time::sleep(ms(250)).await;
    drop(guard);
    drop(next.await.unwrap().unwrap());

    let second = &seen.locks()[1];
    has(
        second,
        &[
            ("blocked_by", "this process"),
            ("wait_ms", "250.0"),
            ("source", "handoff"),
            ("hold_ms", "0.0"),
            ("outcome", "released"),
        ],
    );
}

#[tokio::test(start_paused = true)]
async fn a_grant_by_the_queue_of_the_storage_says_so() {
    let (seen, _default) = start();
    let memory = memory();
    let here = listening(&memory).await;
    let there = listening(&memory).await;
    let guard = key(&there).lock(patient()).await.unwrap();
    let next = tokio::spawn(key(&here).lock(patient()));
    settle().await;
    drop(guard);
    settle().await;
    drop(next.await.unwrap().unwrap());
    let span = seen.locks().pop().unwrap();
    // Who holds it in another process is not known.
    has(
        &span,
        &[
            ("wait_ms", "0.0"),
            ("source", "queue"),
            ("hold_ms", "0.0"),
            ("outcome", "released"),
        ],
    );
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_not_obtained_says_why() {
    let (seen, _default) = start();
    let memory = memory();
    let factory = LockFactory::builder(memory.clone())
        .clock(Clock::tokio())
        .max_waiters_per_key(1)
        .build()
        .unwrap();
    let lock = key(&factory);
    let guard = lock.lock(patient()).await.unwrap();
    lock.try_lock(patient()).await.unwrap_err();
    let options = options().retries(2).build().unwrap();
    let waiting = tokio::spawn(lock.lock(options));
    settle().await;
    lock.lock(patient()).await.unwrap_err();
    waiting.await.unwrap().unwrap_err();
    drop(guard);
    factory.drain(ms(1)).await;
    lock.lock(patient()).await.unwrap_err();

    let spans = seen.locks();
    has(
        &spans[1],
        &[("wait_ms", "0.0"), ("outcome", "not_obtained")],
    );
    has(
        &spans[2],
        &[
            ("blocked_by", "this process"),
            ("wait_ms", "200.0"),
            ("outcome", "not_obtained"),
        ],
    );
    has(
        &spans[3],
        &[("wait_ms", "0.0"), ("outcome", "too_many_waiters")],
    );
    has(&spans[4], &[("wait_ms", "0.0"), ("outcome", "draining")]);

    let (storage, factory) = faulty();
    storage.always(Op::Acquire, Fault::fails(StorageErrorKind::Unauthorized));
    key(&factory).lock(patient()).await.unwrap_err();
    has(
        &seen.locks()[5],
        &[("wait_ms", "0.0"), ("outcome", "storage")],
    );
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_while_it_waits_is_seen_as_dropped() {
    let (seen, _default) = start();
    let (storage, factory) = faulty();
    storage.always(Op::Acquire, Fault::hangs());
    let waiting = tokio::time::timeout(ms(30), key(&factory).lock(patient()));
    waiting.await.unwrap_err();
    has(&seen.lock(), &[("wait_ms", "30.0"), ("outcome", "dropped")]);
}

#[tokio::test(start_paused = true)]
async fn a_future_that_was_never_polled_has_no_span() {
    let (seen, _default) = start();
    drop(key(&factory(&memory())).lock(patient()));
    assert!(seen.locks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn each_loss_has_its_outcome_at_once() {
    for reason in ["expired", "not_ours", "max_hold", "draining"] {
        let (seen, _default) = start();
        let behind = memory();
        let (storage, factory) = faulty_over(&behind);
        let options = options().max_hold(ms(10_000)).build().unwrap();
        let guard = key(&factory).lock(options).await.unwrap();
        match reason {
            "expired" => storage.always(Op::Renew, Fault::fails(StorageErrorKind::Unavailable)),
            "not_ours" => behind.clear(),
            "draining" => drop(tokio::spawn(async move { factory.drain(ms(1)).await })),
            _ => {}
        }
        assert_eq!(
            format!("{:?}", guard.lost().await).to_lowercase(),
            reason.replace('_', "")
        );
        // The keeper looks at a deadline a moment after its holder.
        tokio::time::sleep(ms(1)).await;
        let outcome = format!("lost:{reason}");
        let span = seen.lock();
        assert_eq!(span.field("outcome"), Some(&*outcome));
        assert!(!span.is_closed, "its holder goes on");
        assert_eq!(span.field("hold_ms"), None);
        drop(guard);
        let span = seen.lock();
        assert!(span.is_closed);
        assert_eq!(span.field("outcome"), Some(&*outcome));
        assert!(span.field("hold_ms").is_some());
        assert_eq!(warnings(&seen).len(), 1, "whoever saw it first");
        assert_eq!(warnings(&seen)[0].spans, ["lock:orders/42"]);
    }
}

/// What the log says of losses.
fn warnings(seen: &Capture) -> Vec<capture::Line> {
    let mut lines = seen.lines();
    lines.retain(|line| line.fields.get("message").map(String::as_str) == Some("lock lost"));
    lines
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_logged_once_also_if_its_holder_notices_it_first() {
    let options = options().max_hold(ms(500)).build().unwrap();
    for looks in [true, false] {
        let (seen, _default) = start();
        let factory = factory(&memory());
        let guard = key(&factory).lock(options).await.unwrap();
        tokio::time::advance(ms(501)).await;
        if looks {
            assert!(!guard.is_held());
        }
        drop(guard);
        settle().await;
        assert_eq!(warnings(&seen).len(), 1, "{looks}");
        let warning = &warnings(&seen)[0];
        assert_eq!(warning.spans, ["lock:orders/42"]);
        assert!(warning.fields["reason"].contains("max_hold"), "{warning:?}");
    }
    // The layer, which looks at the clock before each poll of the handler.
    let (seen, _default) = start();
    let layer = DistributedLockLayer::new(factory(&memory()), |_: &Request<()>| "orders/42");
    let mut service = layer
        .options(options)
        .layer(service_fn(async |_: Request<()>| {
            tokio::time::sleep(ms(500)).await;
            tokio::time::sleep(ms(500)).await;
            Ok::<_, Infallible>(Response::new(()))
        }));
    service.call(request()).await.unwrap();
    assert_eq!(warnings(&seen).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_loss_that_only_the_release_finds_is_logged() {
    let (seen, _default) = start();
    let behind = memory();
    let guard = key(&factory(&behind)).lock(patient()).await.unwrap();
    behind.clear();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(warnings(&seen).len(), 1);
    assert_eq!(warnings(&seen)[0].fields["key"], "orders/42");
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_has_lost_its_lock_blocks_nobody() {
    let (seen, _default) = start();
    let behind = memory();
    let here = factory(&behind);
    let lost = key(&here).lock(patient()).await.unwrap();
    // It stays on the key's mind here.
    let waiting = tokio::spawn(key(&here).lock(patient()));
    settle().await;
    behind.clear();
    let _there = key(&factory(&behind)).lock(patient()).await.unwrap();
    lost.lost().await;
    settle().await;
    assert!(!polled(3, key(&here).lock(patient())).await);
    let span = seen.locks().pop().unwrap();
    has(&span, &[("wait_ms", "0.0"), ("outcome", "dropped")]);
    waiting.abort();
}

fn request() -> Request<()> {
    Request::new(())
}

#[tokio::test(start_paused = true)]
async fn a_handler_runs_in_the_span_of_its_lock_in_that_of_its_request() {
    let (seen, _default) = start();
    let factory = factory(&memory());
    let layer = DistributedLockLayer::new(factory, |_: &Request<()>| "orders/42");
    let mut service = layer.layer(service_fn(|request: Request<()>| {
        tracing::debug!("called");
        let lock = request.extensions().get::<HeldLock>().cloned().unwrap();
        async move {
            tracing::debug!("begun");
            tokio::time::sleep(ms(20)).await;
            lock.release();
            tokio::time::sleep(ms(20)).await;
            tracing::debug!("done");
            Ok::<_, Infallible>(Response::new(()))
        }
    }));
    let answered = service
        .call(request())
        .instrument(tracing::info_span!("request"));
    answered.await.unwrap();
    tracing::debug!("outside");

    for message in ["called", "begun", "done"] {
        let lines = seen.lines();
        let line = lines
            .iter()
            .find(|line| line.fields.get("message").map(String::as_str) == Some(message));
        assert_eq!(
            line.unwrap().spans,
            ["request:", "lock:orders/42"],
            "{message}"
        );
    }
    assert!(seen.lines().last().unwrap().spans.is_empty());
    let span = seen.lock();
    assert_eq!(span.parent, Some("request"));
    // Its hold ended when the handler said so.
    has(
        &span,
        &[
            ("wait_ms", "0.0"),
            ("source", "storage"),
            ("hold_ms", "20.0"),
            ("outcome", "released"),
        ],
    );
}

#[tokio::test(start_paused = true)]
async fn what_a_cancelled_handler_says_in_its_drop_is_in_the_span() {
    struct Says;
    impl Drop for Says {
        fn drop(&mut self) {
            tracing::debug!("dropped");
        }
    }

    let (seen, _default) = start();
    let factory = factory(&memory());
    let options = options().max_hold(ms(50)).build().unwrap();
    let layer = DistributedLockLayer::new(factory, |_: &Request<()>| "orders/42").options(options);
    let mut service = layer.layer(service_fn(async |_: Request<()>| {
        let _says = Says;
        pending::<()>().await;
        Ok::<_, Infallible>(Response::new(()))
    }));
    service.call(request()).await.unwrap();
    let lines = seen.lines();
    let dropped = lines
        .iter()
        .find(|line| line.fields.get("message").map(String::as_str) == Some("dropped"));
    assert_eq!(dropped.unwrap().spans, ["lock:orders/42"]);
    assert_eq!(seen.lock().field("outcome"), Some("lost:max_hold"));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_key_runs_in_no_span_of_ours() {
    let (seen, _default) = start();
    let factory = factory(&memory());
    let layer = DistributedLockLayer::new(factory, |_: &Request<()>| RequestKey::none());
    let mut service = layer.layer(service_fn(async |_: Request<()>| {
        tracing::debug!("begun");
        Ok::<_, Infallible>(Response::new(()))
    }));
    service.call(request()).await.unwrap();
    assert!(seen.locks().is_empty());
    assert!(seen.lines()[0].spans.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_handler_with_several_locks_runs_in_the_spans_of_all() {
    let (seen, _default) = start();
    let factory = factory(&memory());
    let keys = |_: &Request<()>| RequestKey::all(["b", "a"].map(|key| LockKey::new(key).unwrap()));
    let mut service =
        DistributedLockLayer::new(factory, keys).layer(service_fn(async |_: Request<()>| {
            tracing::debug!("begun");
            Ok::<_, Infallible>(Response::new(()))
        }));
    service.call(request()).await.unwrap();
    assert_eq!(seen.lines()[0].spans, ["lock:a", "lock:b"]);
    for span in seen.locks() {
        assert_eq!(span.field("outcome"), Some("released"));
        assert!(span.is_closed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_is_kept_does_not_keep_the_span() {
    let (seen, _default) = start();
    let factory = factory(&memory());
    let (give, mut kept) = tokio::sync::mpsc::unbounded_channel();
    let layer = DistributedLockLayer::new(factory, |_: &Request<()>| "orders/42");
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        let lock = request.extensions().get::<HeldLock>().cloned().unwrap();
        give.send(lock).unwrap();
        async { Ok::<_, Infallible>(Response::new(())) }
    }));
    service.call(request()).await.unwrap();
    let lock = kept.recv().await.unwrap();
    assert!(seen.lock().is_closed);
    assert!(!lock.is_held());
}

#[tokio::test(start_paused = true)]
async fn there_is_no_span_where_its_level_is_off() {
    let (seen, _default) = Capture::start(LevelFilter::WARN);
    let factory = factory(&memory());
    drop(key(&factory).lock(patient()).await.unwrap());
    drop(key(&factory).lock(impatient()).await.unwrap());
    assert!(seen.locks().is_empty());
}
