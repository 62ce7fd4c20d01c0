use super::*;
use crate::storage::{MemoryStorage, conformance};

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
    let key = crate::key::LockKey::from_parts(["k"]).unwrap();
    AcquireRequest {
        name: crate::key::KeyPrefix::default().name(&key),
        token: crate::storage::OwnerToken::new(1, 1),
        ttl,
        again: false,
        repeated: false,
        queue: None,
        hint: None,
        fencing: 0,
    }
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
