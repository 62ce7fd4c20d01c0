use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

use super::*;
use crate::{
    key::{KeyPrefix, LockKey},
    storage::{GivenUp, MemoryStorage, OwnerToken, conformance},
    sync::atomic::Ordering::Relaxed,
};

#[tokio::test]
async fn keeps_the_contract_over_any_number_of_nodes() {
    let checks = (1..=5).map(|nodes| {
        let storages: Vec<_> = (0..nodes).map(|_| MemoryStorage::new()).collect();
        conformance::check(Redlock::new(storages).unwrap())
    });
    join_all(checks).await;
}

#[test]
fn a_redlock_has_nodes_and_a_time_limit_for_them() {
    let none = Redlock::new(Vec::<MemoryStorage>::new());
    assert_eq!(none.unwrap_err(), InvalidSettings::NoNodes);
    for wrong in [Duration::ZERO, Duration::MAX] {
        let builder = Redlock::builder().node(MemoryStorage::new());
        let error = builder.node_timeout(wrong).build().unwrap_err();
        assert_eq!(error, InvalidSettings::NodeTimeout);
    }
    for (nodes, quorum) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)] {
        let redlock = Redlock::new(vec![MemoryStorage::new(); nodes]).unwrap();
        assert_eq!((redlock.nodes(), redlock.quorum()), (nodes, quorum));
    }
}

/// A node that is never heard of again.
struct Silent;

impl LockStorage for Silent {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        std::future::pending().await
    }

    async fn renew(&self, _: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        std::future::pending().await
    }

    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        std::future::pending().await
    }
}

fn request(ttl: Duration) -> AcquireRequest {
    let key = LockKey::from_parts(["k"]).unwrap();
    AcquireRequest {
        name: KeyPrefix::default().name(&key),
        token: OwnerToken::new(1, 1),
        ttl,
        again: false,
        repeated: false,
        queue: None,
        hint: None,
        fencing: 0,
        given_up: GivenUp::default(),
    }
}

/// A node that carries acquires out when it is let, whether somebody still waits for them or not.
#[derive(Clone)]
struct Slow {
    node: MemoryStorage,
    lets: Arc<Semaphore>,
}

impl LockStorage for Slow {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let (reply, replied) = oneshot::channel();
        let (slow, request) = (self.clone(), request.clone());
        tokio::spawn(async move {
            slow.lets.acquire().await.unwrap().forget();
            let _ = reply.send(slow.node.acquire(&request).await);
        });
        replied.await.unwrap()
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.node.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.node.release(request).await
    }
}

fn with_two(one: MemoryStorage, two: MemoryStorage, third: impl LockStorage) -> Redlock {
    let builder = Redlock::builder().node(one).node(two);
    builder.node(third).build().unwrap()
}

/// A Redlock of this node and two that have no locks and answer at once.
fn with_two_free(third: impl LockStorage) -> Redlock {
    with_two(MemoryStorage::new(), MemoryStorage::new(), third)
}

/// Three nodes of which the last is slow, and a lock that the others have granted.
async fn granted_by_two_of_three() -> (Redlock, Slow, AcquireRequest) {
    let slow = Slow {
        node: MemoryStorage::new(),
        lets: Arc::new(Semaphore::new(0)),
    };
    let redlock = with_two_free(slow.clone());
    let request = request(Duration::from_secs(10));
    let reply = redlock.acquire(&request).await.unwrap();
    assert_eq!(reply, AcquireReply::granted());
    assert_eq!(redlock.shared.stragglers.len(), 1);
    (redlock, slow, request)
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_comes_after_its_release_does_not_stay() {
    let (redlock, slow, request) = granted_by_two_of_three().await;
    let reply = redlock.release(&release(&request, false)).await.unwrap();
    assert_eq!(reply, ReleaseReply::Released);
    slow.lets.add_permits(1);
    sleep(Duration::from_millis(500)).await;
    assert!(slow.node.is_empty(), "{:?}", slow.node);
    assert_eq!(redlock.shared.stragglers.len(), 0);
}

/// A node that needs two steps for an acquire. The first tells it nothing.
#[derive(Clone, Default)]
struct TwoSteps {
    node: MemoryStorage,
    answers: Arc<tokio::sync::Notify>,
    /// How often the second was made.
    second: Arc<AtomicUsize>,
}

impl LockStorage for TwoSteps {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.answers.notified().await;
        if request.is_given_up() {
            return Ok(AcquireReply::held(None));
        }
        self.second.fetch_add(1, Relaxed);
        self.node.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.node.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.node.release(request).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_begins_no_further_step_after_the_release() {
    // The first answer is there before the release, after it, or after the call was followed.
    for (before, followed) in [(true, false), (false, false), (false, true)] {
        let slow = TwoSteps::default();
        let redlock = with_two_free(slow.clone());
        let request = request(Duration::from_secs(10));
        let reply = redlock.acquire(&request).await.unwrap();
        assert_eq!(reply, AcquireReply::granted());
        if before {
            slow.answers.notify_one();
        }
        if followed {
            sleep(Duration::from_millis(100)).await;
        }
        let reply = redlock.release(&release(&request, false)).await.unwrap();
        assert_eq!(reply, ReleaseReply::Released);
        // What had its answer before is done with.
        assert_eq!(redlock.shared.stragglers.len(), usize::from(!before));
        slow.answers.notify_one();
        sleep(Duration::from_millis(500)).await;
        assert_eq!(slow.second.load(Relaxed), 0, "{before} {followed}");
        assert_eq!(redlock.shared.stragglers.len(), 0);
    }
}

/// A node that answers with an error once, and whose commands may be on their way all the same.
#[derive(Clone, Default)]
struct Broken {
    answers: Arc<tokio::sync::Notify>,
    releases: Arc<AtomicUsize>,
}

impl LockStorage for Broken {
    async fn acquire(&self, _: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.answers.notified().await;
        Err(StorageError::new(StorageErrorKind::Unavailable))
    }

    async fn renew(&self, _: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        std::future::pending().await
    }

    async fn release(&self, _: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.releases.fetch_add(1, Relaxed);
        Ok(ReleaseReply::NotOurs)
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_failed_before_the_release_is_released_once_more() {
    let broken = Broken::default();
    let redlock = with_two_free(broken.clone());
    let request = request(Duration::from_secs(10));
    let reply = redlock.acquire(&request).await.unwrap();
    assert_eq!(reply, AcquireReply::granted());
    broken.answers.notify_one();
    let reply = redlock.release(&release(&request, false)).await.unwrap();
    assert_eq!(reply, ReleaseReply::Released);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(broken.releases.load(Relaxed), 2);
    assert_eq!(redlock.shared.stragglers.len(), 0);
}

/// The second step may leave word there that somebody waits.
#[tokio::test(start_paused = true)]
async fn an_attempt_in_vain_goes_on_where_it_was_not_answered() {
    let held = MemoryStorage::new();
    let mut others = request(Duration::from_secs(10));
    others.token = OwnerToken::new(2, 1);
    held.acquire(&others).await.unwrap();
    let slow = TwoSteps::default();
    let redlock = with_two(held.clone(), held, slow.clone());
    let request = request(Duration::from_secs(10));
    let reply = redlock.acquire(&request).await.unwrap();
    assert!(!matches!(reply, AcquireReply::Granted { .. }), "{reply:?}");
    let reply = redlock.release(&release(&request, true)).await.unwrap();
    assert_eq!(reply, ReleaseReply::NotOurs);
    slow.answers.notify_one();
    sleep(Duration::from_millis(500)).await;
    assert_eq!(slow.second.load(Relaxed), 1);
    assert!(slow.node.is_empty(), "{:?}", slow.node);
}

fn release(request: &AcquireRequest, quiet: bool) -> ReleaseRequest {
    ReleaseRequest {
        name: request.name.clone(),
        token: request.token,
        ttl: request.ttl,
        wanted: Some(false),
        requeue: None,
        quiet,
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_a_grant_left_behind_is_followed_though_nobody_releases_the_lock() {
    let (redlock, slow, _) = granted_by_two_of_three().await;
    slow.lets.add_permits(1);
    sleep(Duration::from_millis(500)).await;
    assert!(!slow.node.is_empty());
    assert_eq!(redlock.shared.stragglers.len(), 0);
    // The task that follows them has come to its end, and the next grant starts another.
    assert_eq!(Arc::strong_count(&redlock.shared), 1);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_settled_as_long_as_a_call_that_a_grant_left_behind_is_not() {
    let (redlock, slow, _) = granted_by_two_of_three().await;
    // It is put aside at first, and followed later.
    for _ in 0..2 {
        let settled = timeout(Duration::from_millis(50), redlock.settled()).await;
        assert!(settled.is_err());
        assert_eq!(redlock.shared.stragglers.len(), 1);
    }
    slow.lets.add_permits(1);
    redlock.settled().await;
    assert_eq!(redlock.shared.stragglers.len(), 0);
}

#[test]
fn what_is_put_aside_on_a_runtime_that_stands_still_is_followed_on_another() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    };
    let (stalled, alive) = (runtime(), runtime());
    let (redlock, _slow, first) = stalled.block_on(granted_by_two_of_three());
    alive.block_on(async {
        sleep(Duration::from_secs(2)).await;
        assert_eq!(redlock.shared.stragglers.len(), 1);
        let key = LockKey::from_parts(["other"]).unwrap();
        let second = AcquireRequest {
            name: KeyPrefix::default().name(&key),
            token: OwnerToken::new(1, 2),
            ..first
        };
        let reply = redlock.acquire(&second).await.unwrap();
        assert_eq!(reply, AcquireReply::granted());
        // Neither is ever answered.
        timeout(Duration::from_secs(5), redlock.settled())
            .await
            .unwrap();
    });
}

#[tokio::test(start_paused = true)]
async fn a_node_has_a_tenth_of_the_ttl_to_answer_and_200_ms_at_most() {
    let asked = async |redlock: RedlockBuilder, ttl| {
        let redlock = redlock.node(Silent).node(Silent).build().unwrap();
        let started = tokio::time::Instant::now();
        let error = redlock.acquire(&request(ttl)).await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Timeout);
        // A timer has whole milliseconds.
        started.elapsed().as_millis()
    };
    let ms = Duration::from_millis;
    assert_eq!(asked(Redlock::builder(), ms(10_000)).await, 200);
    assert_eq!(asked(Redlock::builder(), ms(500)).await, 50);
    let long = Redlock::builder().node_timeout(ms(3_000));
    assert_eq!(asked(long, ms(10_000)).await, 3_000);
}

#[tokio::test(start_paused = true)]
async fn a_majority_waits_for_no_node_that_was_silent_before() {
    let memory = [MemoryStorage::new(), MemoryStorage::new()];
    let [one, other] = memory;
    let redlock = Redlock::builder().node(one).node(Silent).node(other);
    let redlock = redlock.build().unwrap();
    let started = tokio::time::Instant::now();
    let reply = redlock.acquire(&request(Duration::from_secs(10))).await;
    assert!(matches!(reply, Ok(AcquireReply::Granted { .. })));
    assert_eq!(started.elapsed(), Duration::ZERO);
    // And what is on its way to it is known of.
    assert_eq!(redlock.shared.stragglers.len(), 1);
}
