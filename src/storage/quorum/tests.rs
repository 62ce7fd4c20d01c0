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
