//! What clients and handlers see while a real Redis is away.

use axum::Extension;
use tower_distributed_lock::{
    error::LossReason,
    middleware::{OnLoss, OnStorageFailure, ProblemDetails},
    storage::RedisStorage,
};

use super::kit::RedisServer;
use super::*;

async fn locks(server: &RedisServer) -> LockFactory {
    LockFactory::new(RedisStorage::connect(server.url()).await.unwrap())
}

/// Waits for 200 ms, and has what it holds for a second.
fn short() -> LockOptions {
    LockOptions::builder()
        .ttl(ms(1_000))
        .interval(ms(50))
        .retries(4)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_route_fails_open_or_closed_as_it_was_told() {
    async fn is_locked(lock: Option<HeldLock>) -> String {
        lock.is_some().to_string()
    }
    for version in VERSIONS {
        let mut server = RedisServer::start().await;
        let lock = DistributedLockLayer::new(locks(&server).await, path)
            .options(short())
            .on_reject(ProblemDetails::new());
        let open = lock.clone().on_storage_failure(OnStorageFailure::FailOpen);
        let app = Router::new()
            .route("/pay", post(is_locked).route_layer(lock))
            .route("/report", post(is_locked).route_layer(open));
        let client = Client::new(version, serve(app).await);
        let are_locked = async || {
            let answers = [
                client.send("POST", "/pay").await,
                client.send("POST", "/report").await,
            ];
            answers.iter().all(|answer| answer.text == "true")
        };
        assert!(are_locked().await);

        server.kill();
        for _ in 0..3 {
            let report = client.send("POST", "/report").await;
            assert_eq!((report.status, &*report.text), (StatusCode::OK, "false"));
            let pay = client.send("POST", "/pay").await;
            assert_eq!(pay.status, StatusCode::SERVICE_UNAVAILABLE);
            assert!(
                pay.text.contains(r#""reason":"storage_unavailable""#),
                "{}",
                pay.text
            );
            assert!(!pay.text.contains("127.0.0.1"), "{}", pay.text);
            assert_eq!(pay.header("retry-after"), None, "nobody knows");
        }

        server.restart().await;
        eventually("both take locks again", LIMIT, are_locked).await;
        kit::no_key_is_left(&server).await;
    }
}

/// Says that the handler runs.
type Running = Arc<Notify>;

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_waits_for_the_loss_is_told_when_redis_is_killed() {
    async fn told(lock: HeldLock, Extension(running): Extension<Running>) -> String {
        running.notify_one();
        tokio::select! {
            reason = lock.lost() => {
                assert_eq!(reason, LossReason::Expired);
                format!("told, {} held", if lock.is_held() { "still" } else { "not" })
            }
            () = tokio::time::sleep(LIMIT) => "not told".into(),
        }
    }
    for version in VERSIONS {
        let mut server = RedisServer::start().await;
        let running = Running::default();
        let lock = DistributedLockLayer::new(locks(&server).await, path)
            .options(short())
            .on_loss(OnLoss::Signal);
        let app = Router::new()
            .route("/a", post(told).route_layer(lock))
            .layer(Extension(Arc::clone(&running)));
        let client = Client::new(version, serve(app).await);
        let answer = tokio::spawn(async move { client.send("POST", "/a").await });
        within(LIMIT, "the handler runs", running.notified()).await;
        server.kill();
        let answer = answer.await.unwrap();
        assert_eq!(
            (answer.status, &*answer.text),
            (StatusCode::OK, "told, not held")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_not_to_run_on_is_cut_off_when_redis_is_killed() {
    async fn hangs(Extension(running): Extension<Running>) {
        running.notify_one();
        std::future::pending::<()>().await;
    }
    for version in VERSIONS {
        let mut server = RedisServer::start().await;
        let running = Running::default();
        let lock = DistributedLockLayer::new(locks(&server).await, path)
            .options(short())
            .on_reject(ProblemDetails::new());
        let app = Router::new()
            .route("/a", post(hangs).route_layer(lock))
            .layer(Extension(Arc::clone(&running)));
        let client = Client::new(version, serve(app).await);
        let answer = tokio::spawn(async move { client.send("POST", "/a").await });
        within(LIMIT, "the handler runs", running.notified()).await;
        server.kill();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer.text.contains("lock_lost"), "{}", answer.text);
    }
}
