//! Who can publish to the inboxes of our processes, and knows what is to be known for it.

use tower_distributed_lock::{Unlocked, error::LossReason};

use super::{
    kit::{LIMIT, LONG, RedisServer, is_queued, options, patient, within},
    *,
};

/// The place of the only one who waits for `k`: its token.
async fn place(server: &RedisServer) -> String {
    is_queued(server, "k", 1).await;
    let queue: String = server.run("GET {distributed-locks:k}:queue").await;
    queue.split(' ').next().unwrap().to_owned()
}

/// Tells `token` that it has been given `k` now, with one fencing token.
async fn forge(server: &RedisServer, token: &str, fencing: u64) {
    let (seconds, micros): (u64, u64) = server.run("TIME").await;
    let grant = format!("g distributed-locks:k {token} 300000 {seconds} {micros} 0 {fencing} 1");
    let inbox = format!("distributed-locks:inbox:{}", &token[..32]);
    let heard: u64 = server.run_words(&["PUBLISH", &inbox, &grant]).await;
    assert_eq!(heard, 1);
}

#[tokio::test]
async fn who_enters_by_a_forged_grant_is_out_after_a_round_trip_and_nobody_else_is_harmed() {
    let server = RedisServer::start().await;
    let (holder, victim) = (factory(url(&server)), factory(url(&server)));
    let guard = holder.create_lock("k").unwrap().lock(patient());
    let guard = within(LIMIT, "the lock", guard).await.unwrap();
    let waiting = tokio::spawn(victim.create_lock("k").unwrap().lock(patient()));
    let token = place(&server).await;
    forge(&server, &token, guard.fencing_token().unwrap() + 1).await;

    // It believes its server, and asks it at once: not only when a third of the ttl is over.
    let fooled = within(LIMIT, "the forged lock", waiting).await.unwrap();
    if let Ok(fooled) = fooled {
        let lost = within(LIMIT, "the loss", fooled.lost()).await;
        assert_eq!(lost, LossReason::NotOurs);
        drop(fooled);
    }
    assert!(guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    // And nothing stays of it.
    let lock = victim.create_lock("k").unwrap();
    let guard = within(LIMIT, "the lock", lock.lock(patient()))
        .await
        .unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    kit::no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_forged_grant_that_nobody_waits_for_is_given_back_and_not_entered() {
    let server = RedisServer::start().await;
    let (holder, victim) = (factory(url(&server)), factory(url(&server)));
    let guard = holder.create_lock("k").unwrap().lock(patient());
    let guard = within(LIMIT, "the lock", guard).await.unwrap();
    let mut waiting = tokio::spawn(victim.create_lock("k").unwrap().lock(options(LONG, LIMIT)));
    let token = place(&server).await;
    // Of this process, but of no attempt of it.
    let other = format!("{}:123456789", &token[..32]);
    forge(&server, &other, guard.fencing_token().unwrap() + 1).await;
    tokio::time::timeout(ms(100), &mut waiting)
        .await
        .expect_err("it waits on");
    assert!(guard.is_held());
    drop(guard);
    drop(within(LIMIT, "the lock", waiting).await.unwrap().unwrap());
    kit::no_key_is_left(&server).await;
}

#[tokio::test]
async fn a_forged_fencing_token_does_not_use_up_all_that_come_after_it() {
    let server = RedisServer::start().await;
    let (holder, victim) = (factory(url(&server)), factory(url(&server)));
    let guard = holder.create_lock("k").unwrap().lock(patient());
    let guard = within(LIMIT, "the lock", guard).await.unwrap();
    let waiting = tokio::spawn(victim.create_lock("k").unwrap().lock(patient()));
    let token = place(&server).await;
    let highest = (1 << 53) - 2;
    for forged in [token.clone(), format!("{}:123456789", &token[..32])] {
        forge(&server, &forged, highest).await;
    }
    let first = guard.fencing_token().unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let given = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    let mut last = given.fencing_token().unwrap();
    assert!(last > first);
    drop(given);
    for _ in 0..3 {
        let next = kit::token(&victim, "k").await;
        assert!(last < next && next < 1 << 52, "{last} {next}");
        last = next;
    }
}
