//! The same over Sentinel, a Cluster, several servers, and a pool of one's own.

use std::time::Instant;

use futures_util::future::join_all;
use tower_distributed_lock::{
    LockFactory, LockKey, Redlock, Unlocked,
    error::{LossReason, StorageErrorKind},
    storage::{
        RedisStorage,
        redis::bb8_redis::{RedisConnectionManager, bb8::Pool},
    },
};

use super::{
    all_answered, factory, hold,
    kit::{Cluster, FakeServer, LIMIT, RedisServer, Sentinel, eventually, is_queued, within},
    label, labelled, labels, listens, served, shown, wait_for, was_of,
};

/// One holds a lock and another waits: both are seen by a third, which takes it away.
async fn it_is_shown_and_taken_away([one, two, looking]: [&LockFactory; 3], key: &str) {
    let first = hold(one, key).await;
    let second = wait_for(two, key);
    let info = shown(looking, "it waits", key, |info| {
        info.holder.answered && info.waiters.iter().any(|it| it.callers == Some(1))
    })
    .await;
    assert_eq!(
        (label(&info.holder), &labels(&info)[..]),
        ("one", &["two"][..])
    );
    assert_eq!(info.fencing_token, first.fencing_token());
    let snapshot = looking.inspector().locks(100).await.unwrap();
    let listed = snapshot
        .locks
        .iter()
        .find(|lock| lock.key.as_str() == key)
        .unwrap();
    assert!(was_of(listed, "one"));
    assert_eq!(listed.waiters.len(), 1);

    let name = LockKey::new(key).unwrap();
    let taken = looking.inspector().force_release(&name, "r").await.unwrap();
    let taken = taken.unwrap();
    assert!(was_of(&taken.lock, "one") && taken.holder_told);
    let reason = within(LIMIT, "it is told", first.lost()).await;
    assert_eq!(reason, LossReason::ForceReleased);
    let second = served(second).await;
    assert!(second.fencing_token() > first.fencing_token());
    assert_eq!(first.unlock().await.unwrap(), Unlocked::Lost);
    assert_eq!(second.unlock().await.unwrap(), Unlocked::Held);
}

const LABELS: [&str; 3] = ["one", "two", "looking"];

#[tokio::test]
async fn locks_of_the_master_that_sentinel_names_are_shown_and_taken_away() {
    let redis = Sentinel::start().await;
    let factories = LABELS.map(|label| {
        let storage = RedisStorage::sentinel(Sentinel::SERVICE, redis.urls());
        labelled(storage.connect_lazily().unwrap(), label)
    });
    it_is_shown_and_taken_away(factories.each_ref(), "k").await;
}

#[tokio::test]
async fn locks_of_all_nodes_of_a_cluster_are_shown_and_taken_away() {
    let redis = Cluster::start().await;
    let factories = LABELS.map(|label| {
        let storage = RedisStorage::cluster(redis.urls());
        labelled(storage.connect_lazily().unwrap(), label)
    });
    let mut keys = Vec::new();
    for node in 0..3 {
        keys.push(redis.key_at(node).await);
    }
    keys.sort();
    let mut guards = Vec::new();
    for key in &keys {
        guards.push(hold(&factories[0], key).await);
    }
    let inspector = factories[2].inspector();
    eventually("all of them are shown", LIMIT, async || {
        let snapshot = inspector.locks(10).await.unwrap();
        let found: Vec<_> = snapshot
            .locks
            .iter()
            .map(|lock| lock.key.as_str())
            .collect();
        assert_eq!(found, keys);
        snapshot
            .locks
            .iter()
            .all(|lock| label(&lock.holder) == "one")
    })
    .await;
    let two = inspector.locks(2).await.unwrap();
    assert!(two.more && two.locks.len() == 2);
    for (guard, key) in guards.into_iter().zip(&keys) {
        let _ = guard.unlock().await.unwrap();
        it_is_shown_and_taken_away(factories.each_ref(), key).await;
    }

    // Also while its slot is on its way.
    let guard = hold(&factories[0], &keys[0]).await;
    let slot = redis.slot(&format!("distributed-locks:{}", keys[0])).await;
    let from = redis.owner(&keys[0]).await;
    redis.begin_to_move(slot, from, (from + 1) % 3).await;
    for moved in [false, true] {
        if moved {
            redis.move_keys(slot, from, (from + 1) % 3).await;
        }
        let snapshot = all_answered(&factories[2], 10).await;
        let token = snapshot.locks.first().map(|lock| lock.fencing_token);
        assert_eq!(token, Some(guard.fencing_token()), "{moved}");
    }
}

async fn redlock(servers: &[RedisServer], label: &str) -> LockFactory {
    let nodes = servers.iter().map(|server| {
        let builder = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
        builder.connect_lazily().unwrap()
    });
    let builder = nodes.fold(Redlock::builder(), |builder, node| builder.node(node));
    labelled(builder.node_timeout(LIMIT / 4).build().unwrap(), label)
}

async fn three() -> Vec<RedisServer> {
    join_all((0..3).map(|_| RedisServer::start())).await
}

#[tokio::test]
async fn locks_that_a_majority_has_are_shown_and_taken_away() {
    let servers = three().await;
    let factories = join_all(LABELS.map(|label| redlock(&servers, label))).await;
    let [one, two, looking] = &factories[..] else {
        panic!("three");
    };
    it_is_shown_and_taken_away([one, two, looking], "k").await;

    // What only a minority has is not held, and what a majority has is, whatever the rest says.
    let () = servers[0]
        .run("SET distributed-locks:few x PX 300000")
        .await;
    for server in &servers[1..] {
        let () = server.run("SET distributed-locks:most x PX 300000").await;
    }
    let () = servers[0]
        .run("SET distributed-locks:most y PX 300000")
        .await;
    let inspector = looking.inspector();
    let snapshot = inspector.locks(10).await.unwrap();
    let keys: Vec<_> = snapshot
        .locks
        .iter()
        .map(|lock| lock.key.as_str())
        .collect();
    assert_eq!(keys, ["most"]);
    let few = LockKey::new("few").unwrap();
    assert_eq!(inspector.get(&few).await.unwrap(), None);
    assert_eq!(inspector.force_release(&few, "r").await.unwrap(), None);
    // Another client's, and only where it is that one's.
    let most = LockKey::new("most").unwrap();
    assert!(inspector.force_release(&most, "r").await.unwrap().is_some());
    assert_eq!(
        servers[0].run::<String>("GET distributed-locks:most").await,
        "y"
    );
    assert_eq!(inspector.get(&most).await.unwrap(), None);
}

#[tokio::test]
async fn a_minority_of_servers_that_is_away_hides_no_lock_and_a_majority_is_an_error() {
    let mut servers = three().await;
    let (one, looking) = (
        redlock(&servers, "one").await,
        redlock(&servers, "looking").await,
    );
    let _guard = hold(&one, "k").await;
    // The third may have been asked last: without it and the first, nobody would know.
    for server in &servers {
        eventually("all have heard of it", LIMIT, async || {
            let locks: u64 = server.run("EXISTS distributed-locks:k").await;
            locks == 1
        })
        .await;
    }
    shown(&looking, "it", "k", |info| info.holder.answered).await;
    servers[0].kill();
    let info = shown(&looking, "it", "k", |info| info.holder.answered).await;
    assert_eq!(label(&info.holder), "one");
    assert_eq!(looking.inspector().locks(10).await.unwrap().locks.len(), 1);
    servers[1].kill();
    let error = looking.inspector().locks(10).await.unwrap_err();
    assert!(error.kind().is_transient(), "{error}");
    assert_eq!(error.quorum().unwrap().needed, 2);
}

#[tokio::test]
async fn over_a_pool_of_ones_own_it_shows_what_the_server_knows() {
    let server = RedisServer::start().await;
    let manager = RedisConnectionManager::new(server.url()).unwrap();
    let pool = Pool::builder().max_size(1).build(manager).await.unwrap();
    let (one, pooled) = (
        factory(server.url(), "one").await,
        labelled(RedisStorage::from_pool(pool), "pooled"),
    );
    let first = hold(&one, "a").await;
    listens(&server, 1).await;
    let _ours = hold(&pooled, "b").await;
    let waiting = wait_for(&one, "b");
    is_queued(&server, "b", 1).await;
    let snapshot = pooled.inspector().locks(10).await.unwrap();
    let [a, b] = &snapshot.locks[..] else {
        panic!("{snapshot:?}");
    };
    assert!(!a.holder.answered && a.ttl.is_some());
    assert_eq!((label(&b.holder), b.holder.is_this), ("pooled", true));
    assert!(b.held_for.is_some() && b.fencing_token.is_some());
    assert_eq!((b.waiters.len(), b.waiters[0].callers), (1, None));
    // It can tell others, though it hears nothing.
    let key = LockKey::new("a").unwrap();
    let taken = pooled.inspector().force_release(&key, "r").await.unwrap();
    assert!(taken.unwrap().holder_told);
    let reason = within(LIMIT, "it is told", first.lost()).await;
    assert_eq!(reason, LossReason::ForceReleased);
    // And its own waiters, which poll.
    let poll = wait_for(&pooled, "b");
    let info = shown(&pooled, "it waits", "b", |info| info.waiters.len() == 2).await;
    assert!(info.waiters[0].process.is_this);
    poll.abort();
    waiting.abort();
}

#[tokio::test]
async fn a_server_that_is_away_is_an_error() {
    let mut server = RedisServer::start().await;
    let looking = factory(server.url(), "looking").await;
    server.kill();
    let error = looking.inspector().locks(10).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
}

#[tokio::test]
async fn a_server_with_keys_without_end_is_looked_at_for_a_while() {
    let name = "distributed-locks:k";
    let bulk = |text: &str| format!("${}\r\n{text}", text.len());
    let server = FakeServer::start(move |_, words| {
        let verb: Vec<_> = words.iter().map(String::as_str).collect();
        Some(match verb[..] {
            // Always the same, and always more.
            ["SCAN", ..] => format!("*2\r\n{}\r\n*2\r\n{1}\r\n{1}", bulk("7"), bulk(name)),
            ["GET", key] if key == name => bulk("theirs"),
            ["GET", _] => "$-1".to_owned(),
            ["PTTL", _] => ":1000".to_owned(),
            ["INFO", ..] => "-ERR no".to_owned(),
            _ => "+OK".to_owned(),
        })
    })
    .await;
    let looking = factory(server.url(), "looking").await;
    let started = Instant::now();
    let snapshot = looking.inspector().locks(10).await.unwrap();
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    assert!(snapshot.more);
    assert_eq!(snapshot.locks.len(), 1);
}
