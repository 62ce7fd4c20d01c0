//! A lock that is taken away.

use std::{
    io,
    sync::{Arc, Mutex, Once},
    time::{Duration, Instant},
};

use axum::{Router, body::Body, http::Request, routing::get};
use tower::ServiceExt;
use tower_distributed_lock::{
    DistributedLockLayer, LockKey, Unlocked,
    error::LossReason,
    inspect::{ForceReleased, LockInspector},
};
use tracing::{Instrument, subscriber::DefaultGuard};
use tracing_subscriber::fmt::MakeWriter;

use super::{
    factory, hold,
    kit::{LIMIT, Proxy, RedisServer, eventually, is_queued, ms, no_key_is_left, options, within},
    listens, served, wait_for, was_of,
};

fn key() -> LockKey {
    LockKey::new("k").unwrap()
}

async fn take(inspector: &LockInspector) -> Option<ForceReleased> {
    let key = key();
    let taking = inspector.force_release(&key, "it hangs");
    within(LIMIT, "it is taken", taking).await.unwrap()
}

#[tokio::test]
async fn a_lock_that_is_taken_away_goes_to_the_next_and_its_holder_is_told_at_once() {
    let server = RedisServer::start().await;
    let [one, two, three, looking] = [
        factory(server.url(), "shop-1").await,
        factory(server.url(), "shop-2").await,
        factory(server.url(), "shop-3").await,
        factory(server.url(), "on call").await,
    ];
    let first = hold(&one, "k").await;
    listens(&server, 1).await;
    let second = wait_for(&two, "k");
    is_queued(&server, "k", 1).await;
    let third = wait_for(&three, "k");
    is_queued(&server, "k", 2).await;

    let taken = take(&looking.inspector()).await.unwrap();
    assert!(taken.holder_told);
    let was = taken.lock;
    assert_eq!(was.key.as_str(), "k");
    assert!(was_of(&was, "shop-1"), "{was:?}");
    assert!(!was.holder.answered || was.fencing_token == first.fencing_token());
    assert_eq!(was.waiters.len(), 2);
    // Its ttl is 300 s, and its next renewal 100 s away.
    let reason = within(LIMIT, "it is told", first.lost()).await;
    assert_eq!(reason, LossReason::ForceReleased);
    assert!(!first.is_held());
    let second = served(second).await;
    assert!(second.fencing_token() > first.fencing_token());

    // Late, it touches nothing.
    assert_eq!(first.unlock().await.unwrap(), Unlocked::Lost);
    assert!(second.is_held());
    is_queued(&server, "k", 1).await;
    let token = second.fencing_token();
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
    let third = served(third).await;
    assert!(third.fencing_token() > token);
    assert_eq!(third.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
    assert_eq!(take(&looking.inspector()).await, None);
}

#[tokio::test]
async fn a_process_takes_its_own_lock_away_too() {
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let first = hold(&one, "k").await;
    let second = wait_for(&one, "k");
    eventually("it waits", LIMIT, async || one.waiters() == 1).await;
    let taken = take(&one.inspector()).await.unwrap();
    assert!(taken.lock.holder.is_this && taken.holder_told);
    assert_eq!(
        within(LIMIT, "it is told", first.lost()).await,
        LossReason::ForceReleased
    );
    let second = served(second).await;
    assert!(second.fencing_token() > first.fencing_token());
    drop(first);
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn a_handler_whose_lock_is_taken_away_is_cancelled() {
    struct Gone(Option<tokio::sync::oneshot::Sender<()>>);
    impl Drop for Gone {
        fn drop(&mut self) {
            let _ = self.0.take().unwrap().send(());
        }
    }
    let server = RedisServer::start().await;
    let (one, looking) = (
        factory(server.url(), "shop-1").await,
        factory(server.url(), "on call").await,
    );
    let (gone, is_gone) = tokio::sync::oneshot::channel();
    let gone = Arc::new(Mutex::new(Some(gone)));
    let layer = DistributedLockLayer::new(one.clone(), |_: &Request<Body>| key());
    let app = Router::new()
        .route(
            "/",
            get(move || async move {
                let _gone = Gone(gone.lock().unwrap().take());
                std::future::pending::<()>().await
            }),
        )
        .layer(layer);
    let answer = tokio::spawn(app.oneshot(Request::new(Body::empty())));
    eventually("it is held", LIMIT, async || {
        looking.inspector().get(&key()).await.unwrap().is_some()
    })
    .await;
    listens(&server, 1).await;
    take(&looking.inspector()).await.unwrap();
    within(LIMIT, "the handler ends", is_gone).await.unwrap();
    let answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.status(), 503);
}

#[tokio::test]
async fn a_holder_that_cannot_hear_finds_out_at_its_renewal() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let (deaf, two) = (
        factory(proxy.url(), "deaf").await,
        factory(server.url(), "two").await,
    );
    let lock = deaf.create_lock("k").unwrap();
    let first = lock
        .lock(options(Duration::from_secs(6), LIMIT))
        .await
        .unwrap();
    listens(&server, 1).await;
    proxy.swallow_next(usize::MAX);
    proxy.black_hole();
    let started = Instant::now();
    let taken = take(&two.inspector()).await.unwrap();
    assert!(!taken.lock.holder.answered);
    assert!(started.elapsed() < LIMIT / 4);
    let second = hold(&two, "k").await;
    proxy.swallow_next(0);
    assert_eq!(
        within(2 * LIMIT, "it is told", first.lost()).await,
        LossReason::NotOurs
    );
    assert!(second.fencing_token() > first.fencing_token());
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn another_clients_lock_is_taken_away_and_given_to_who_waits() {
    let server = RedisServer::start().await;
    let (one, looking) = (
        factory(server.url(), "shop-1").await,
        factory(server.url(), "on call").await,
    );
    let () = server.run("SET distributed-locks:k theirs!").await;
    let waiting = wait_for(&one, "k");
    is_queued(&server, "k", 1).await;
    let taken = take(&looking.inspector()).await.unwrap();
    assert_eq!((taken.lock.ttl, taken.holder_told), (None, false));
    let guard = served(waiting).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

/// What was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, DefaultGuard) {
        // While a test's is the only one, whoever logs on another thread finds none, and tracing
        // remembers that nobody wants to hear of that line.
        static ANOTHER: Once = Once::new();
        ANOTHER.call_once(|| {
            let deaf = tracing_subscriber::fmt().with_writer(io::sink).finish();
            tracing::subscriber::set_global_default(deaf).unwrap();
        });
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(log.clone())
            .with_ansi(false)
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn audit(&self) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().map(str::to_owned);
        lines
            .filter(|line| line.contains("tower_distributed_lock::audit"))
            .collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn what_is_begun_is_carried_through_and_logged_though_nobody_waits_for_it() {
    let (log, _here) = Log::start();
    let server = RedisServer::start().await;
    let (one, looking) = (
        factory(server.url(), "shop-1").await,
        factory(server.url(), "on call").await,
    );
    let guard = hold(&one, "k").await;
    listens(&server, 1).await;
    let inspector = looking.inspector();
    // Polled once.
    let key = key();
    let taking = inspector.force_release(&key, "impatient");
    assert!(tokio::time::timeout(ms(0), taking).await.is_err());
    assert_eq!(
        within(LIMIT, "it is told", guard.lost()).await,
        LossReason::ForceReleased
    );
    eventually("it is logged", LIMIT, async || {
        let lines = log.audit();
        lines.len() == 1 && lines[0].contains("lock released by force")
    })
    .await;
    assert!(log.audit()[0].contains("reason=\"impatient\""));
}

#[tokio::test]
async fn each_lock_that_is_taken_away_is_logged_with_who_why_and_no_token() {
    let (log, _here) = Log::start();
    let server = RedisServer::start().await;
    let (one, looking) = (
        factory(server.url(), "shop-1").await,
        factory(server.url(), "on call").await,
    );
    let inspector = looking.inspector();
    // On a busy machine it may not answer in time for once.
    let (mut times, mut value, mut token) = (0, String::new(), None);
    eventually("it answers", LIMIT, async || {
        let guard = hold(&one, "k").await;
        listens(&server, 1).await;
        value = server.run("GET distributed-locks:k").await;
        token = guard.fencing_token();
        let span = tracing::info_span!("request", user = "ada");
        let was = take(&inspector).instrument(span).await.unwrap();
        times += 1;
        was.lock.holder.answered
    })
    .await;
    assert_eq!(take(&inspector).await, None);
    let (lines, log) = (log.audit(), log.text());
    assert_eq!(lines.len(), times, "{log}");
    let line = &lines[times - 1];
    let token = token.unwrap();
    for part in [
        "WARN",
        "request{user=\"ada\"}",
        "lock released by force",
        "key=\"k\"",
        "reason=\"it hangs\"",
        "holder=\"shop-1\"",
        &format!("fencing_token={token}"),
        "holder_told=true",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!log.contains(&value[..32]), "{log}");
}
