//! The layer around services that are no HTTP services: a worker of jobs, a client, a stack whose
//! errors are boxed. No type of `http` is named here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

use std::{
    error::Error,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{sync::Notify, task::JoinSet};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions,
    error::{BoxError, InvalidKey, StorageError, StorageErrorKind},
    middleware::{OnReject, Rejection},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, MemoryStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

#[derive(Clone, Default)]
struct Job {
    account: u64,
    lock: Option<HeldLock>,
}

fn job(account: u64) -> Job {
    Job {
        account,
        lock: None,
    }
}

fn account(job: &Job) -> Result<LockKey, InvalidKey> {
    LockKey::from_parts(["accounts", &job.account.to_string()])
}

/// The error of a worker. Not `Clone`, and it knows of rejections by `From`.
#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error("put it back: {0}")]
    Rejected(#[from] Rejection),
    #[error("failed")]
    Failed,
}

fn at_once() -> LockOptions {
    LockOptions::builder().retries(0).build().unwrap()
}

fn memory() -> LockFactory {
    LockFactory::new(MemoryStorage::new())
}

#[tokio::test]
async fn a_worker_has_its_lock_and_rejections_are_its_own_error() {
    let locks = memory();
    let layer = DistributedLockLayer::new(locks.clone(), account)
        .options(at_once())
        .reject_with_error(JobError::from)
        .on_acquired(|job: &mut Job, lock: HeldLock| job.lock = Some(lock));
    let worker = ServiceBuilder::new()
        .layer(layer)
        .service(service_fn(async |job: Job| {
            let lock = job.lock.ok_or(JobError::Failed)?;
            Ok::<_, JobError>((lock.key().to_string(), lock.is_held()))
        }));
    let done = worker.clone().oneshot(job(7)).await.unwrap();
    assert_eq!(done, ("accounts/7".to_owned(), true));

    let elsewhere = locks.create_lock("accounts/7").unwrap();
    let elsewhere = elsewhere.lock(LockOptions::default()).await.unwrap();
    let error = worker.clone().oneshot(job(7)).await.unwrap_err();
    let JobError::Rejected(rejection) = &error else {
        panic!("{error}")
    };
    assert_eq!(rejection.reason(), "not_obtained");
    assert!(rejection.retry_after().is_some());
    worker.clone().oneshot(job(8)).await.unwrap();
    drop(elsewhere);
    worker.clone().oneshot(job(7)).await.unwrap();

    locks.drain(Duration::from_secs(5)).await;
    let error = worker.oneshot(job(7)).await.unwrap_err();
    assert!(matches!(error, JobError::Rejected(Rejection::Draining)));
}

#[tokio::test]
async fn a_request_that_has_no_room_for_a_lock_is_left_as_it_is() {
    // Not even `Clone`, and of no type of ours.
    let inside = AtomicUsize::new(0);
    let most = AtomicUsize::new(0);
    let layer = DistributedLockLayer::new(memory(), |(account, _): &(String, io::Error)| {
        account.clone()
    })
    .reject_with_error(JobError::from)
    .without_held_lock();
    let worker = ServiceBuilder::new().layer(layer).service(service_fn(
        async |(_, request): (String, io::Error)| {
            most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::task::yield_now().await;
            inside.fetch_sub(1, SeqCst);
            Ok::<_, JobError>(request.to_string())
        },
    ));
    let request = |number: u32| ("7".to_owned(), io::Error::other(number.to_string()));
    let calls = (0..10).map(|number| worker.clone().oneshot(request(number)));
    for (number, answer) in futures_util::future::join_all(calls)
        .await
        .iter()
        .enumerate()
    {
        assert_eq!(answer.as_ref().unwrap(), &number.to_string());
    }
    assert_eq!(most.load(SeqCst), 1);
}

/// In front of a client that many share, which knows nothing of locks and has an error of its own.
#[tokio::test]
async fn a_client_stack_with_boxed_errors_takes_rejections_as_they_are() {
    let locks = memory();
    let layer = DistributedLockLayer::new(locks.clone(), |account: &String| account.clone())
        .options(at_once())
        .reject_with_error(|rejection| rejection)
        .without_held_lock();
    let server = service_fn(async |account: String| match account.as_str() {
        "broken" => Err(io::Error::other("connection refused")),
        _ => Ok(account.len()),
    });
    let client = ServiceBuilder::new()
        .layer(layer)
        .map_err(BoxError::from)
        .service(server);
    assert_eq!(client.clone().oneshot("seven".into()).await.unwrap(), 5);

    let error = client.clone().oneshot("broken".into()).await.unwrap_err();
    assert!(error.is::<io::Error>(), "the client's own error: {error}");

    let lock = locks.create_lock("seven").unwrap();
    let _elsewhere = lock.lock(LockOptions::default()).await.unwrap();
    let error = client.oneshot("seven".into()).await.unwrap_err();
    let rejection = error.downcast_ref::<Rejection>().unwrap();
    assert!(matches!(rejection, Rejection::NotObtained(_)));
}

#[tokio::test]
async fn jobs_of_one_account_follow_each_other_over_two_replicas_and_others_pass() {
    let storage = MemoryStorage::new();
    let started = Arc::new(Notify::new());
    let go_on = Arc::new(Notify::new());
    let replica = || {
        let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
        let layer = DistributedLockLayer::new(LockFactory::new(storage.clone()), account)
            .options(
                LockOptions::builder()
                    .interval(Duration::from_millis(20))
                    .retries(500)
                    .build()
                    .unwrap(),
            )
            .reject_with_error(JobError::from)
            .without_held_lock();
        ServiceBuilder::new()
            .layer(layer)
            .service(service_fn(move |job: Job| {
                let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
                async move {
                    started.notify_one();
                    if job.account == 1 {
                        go_on.notified().await;
                    }
                    Ok::<_, JobError>(job.account)
                }
            }))
    };
    let replicas = [replica(), replica()];
    let first = tokio::spawn(replicas[0].clone().oneshot(job(1)));
    started.notified().await;
    let second = tokio::spawn(replicas[1].clone().oneshot(job(1)));
    // Others pass, on both.
    let mut others = JoinSet::new();
    for (number, replica) in replicas.iter().cycle().take(6).enumerate() {
        others.spawn(replica.clone().oneshot(job(10 + number as u64)));
    }
    let mut done = Vec::new();
    while let Some(other) = others.join_next().await {
        done.push(other.unwrap().unwrap());
    }
    done.sort();
    assert_eq!(done, [10, 11, 12, 13, 14, 15]);
    assert!(!first.is_finished() && !second.is_finished());
    go_on.notify_one();
    assert_eq!(first.await.unwrap().unwrap(), 1);
    // It was not inside before, or it would have taken that signal.
    go_on.notify_one();
    assert_eq!(second.await.unwrap().unwrap(), 1);
}

/// A job that may be carried out in part is another error than one that was not begun.
#[tokio::test]
async fn a_hook_may_look_at_the_request_and_answer_or_fail() {
    struct Tells;

    impl OnReject<Job, String, JobError> for Tells {
        type Context = u64;

        fn context(&self, job: &Job) -> u64 {
            job.account
        }

        fn reject(&self, account: u64, rejection: Rejection) -> Result<String, JobError> {
            match rejection {
                Rejection::Lost(_) => Err(JobError::Failed),
                _ => Ok(format!("{account}: {}", rejection.reason())),
            }
        }
    }
    let storage = MemoryStorage::new();
    let locks = LockFactory::new(storage.clone());
    let started = Notify::new();
    let options = LockOptions::builder()
        .ttl(Duration::from_millis(100))
        .retries(0)
        .build()
        .unwrap();
    let layer = DistributedLockLayer::new(locks.clone(), account)
        .options(options)
        .on_reject(Tells)
        .without_held_lock();
    let worker = ServiceBuilder::new()
        .layer(layer)
        .service(service_fn(|_: Job| {
            started.notify_one();
            std::future::pending::<Result<String, JobError>>()
        }));
    let loses = async {
        started.notified().await;
        let answer = worker.clone().oneshot(job(7)).await.unwrap();
        assert_eq!(answer, "7: not_obtained");
        storage.clear();
    };
    let (lost, ()) = tokio::join!(worker.clone().oneshot(job(7)), loses);
    assert!(matches!(lost, Err(JobError::Failed)), "{lost:?}");
}

#[test]
fn a_rejection_is_an_error_that_says_each_thing_once_and_has_one_word_for_its_kind() {
    #[derive(Debug, thiserror::Error)]
    #[error("no route to the host")]
    struct NoRoute;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot connect")]
    struct CannotConnect(#[source] NoRoute);

    let storage =
        |kind| Rejection::Storage(StorageError::with_source(kind, CannotConnect(NoRoute)));
    let rejection = storage(StorageErrorKind::Unavailable);
    assert_eq!(rejection.reason(), "storage");
    let mut text = rejection.to_string();
    let mut source = rejection.source();
    while let Some(error) = source {
        text += &format!(" | {error}");
        source = error.source();
    }
    assert_eq!(
        text,
        "the lock storage is unavailable: cannot connect | no route to the host"
    );
    let boxed: BoxError = rejection.into();
    assert!(boxed.is::<Rejection>());
}

/// A storage that is away.
#[derive(Clone)]
struct Away;

impl LockStorage for Away {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        Err(StorageError::new(StorageErrorKind::Unavailable))
    }
    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let away = |_| Err(StorageError::new(StorageErrorKind::Unavailable));
        requests.iter().map(away).collect()
    }
    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        Err(StorageError::new(StorageErrorKind::Unavailable))
    }
}

#[tokio::test]
async fn every_reason_has_its_own_word() {
    let reason = async |locks: LockFactory, account: &str| {
        let layer = DistributedLockLayer::new(locks, |account: &String| account.clone())
            .options(at_once())
            .reject_with_error(|rejection| rejection.reason())
            .without_held_lock();
        let service = ServiceBuilder::new()
            .layer(layer)
            .service(service_fn(async |_: String| Ok::<(), &str>(())));
        service.oneshot(account.into()).await.unwrap_err()
    };
    assert_eq!(reason(memory(), "").await, "invalid_key");
    assert_eq!(reason(LockFactory::new(Away), "7").await, "storage");
    let draining = memory();
    draining.drain(Duration::ZERO).await;
    assert_eq!(reason(draining, "7").await, "draining");
}
