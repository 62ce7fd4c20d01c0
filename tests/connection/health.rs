//! When a connection is given up, and when it is not.

use std::sync::{Arc, OnceLock};

use futures_util::future::join_all;
use tower_distributed_lock::{LockFactory, LockOptions, Unlocked, error::StorageErrorKind};

use super::{
    LONG, builder, factory, it_stands_in_the_queue,
    kit::{FakeServer, LIMIT, Proxy, RedisServer, eventually, within},
    no_key_is_left, patient, storage_error,
};

/// Calls of which the first few go by themselves, and the others together.
#[tokio::test]
async fn a_server_that_refuses_to_write_is_left_also_if_only_calls_that_went_together_are_told() {
    // Demoted between the calls that go by themselves and the others, and for those who are connected.
    let first = Arc::new(OnceLock::new());
    let server = FakeServer::start(move |connection, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'",
            "SET"
                if *first.get_or_init(|| connection) == connection
                    && words[1].ends_with("late") =>
            {
                "-READONLY You can't write against a read only replica."
            }
            "EVAL" | "EVALSHA" => ":1",
            _ => "+OK",
        })
    })
    .await;
    let storage = builder(server.url()).connect().await.unwrap();
    let factory = LockFactory::builder(storage).fencing(false).build();
    let factory = factory.unwrap();
    let asks = |key: String| factory.create_lock(key).unwrap().try_lock(patient());
    let early = (0..3).map(|caller| asks(format!("{caller}/early")));
    let late = (0..5).map(|caller| asks(format!("{caller}/late")));
    let answers = within(LIMIT, "all answers", join_all(early.chain(late))).await;
    for (number, answer) in answers.into_iter().enumerate() {
        if number < 3 {
            drop(answer.unwrap());
        } else {
            let error = storage_error(answer);
            assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
        }
    }
    // Over another connection.
    drop(asks("late".to_owned()).await.unwrap());
}

#[tokio::test]
async fn a_server_that_refuses_to_write_is_left_also_if_it_says_so_among_other_replies() {
    // Demoted after the first lock, for those who are connected.
    let first = Arc::new(OnceLock::new());
    let server = FakeServer::start(move |connection, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command 'HELLO'".to_owned(),
            "SET" | "INCRBY" if first.get() == Some(&connection) => {
                "-READONLY You can't write against a read only replica.".to_owned()
            }
            "MGET" => "*2\r\n$-1\r\n$-1".to_owned(),
            // Taken, with a token.
            "EVAL" | "EVALSHA" if words.len() > 9 => {
                first.get_or_init(|| connection);
                let token = &words[6];
                format!(
                    "*3\r\n${}\r\n{token}\r\n:0\r\n:2000000000000000",
                    token.len()
                )
            }
            "EVAL" | "EVALSHA" => ":1".to_owned(),
            _ => "+OK".to_owned(),
        })
    })
    .await;
    let factory = factory(builder(server.url())).await;
    let asks = |key: &str| factory.create_lock(key).unwrap().try_lock(patient());
    // Held, so that nothing but what is asked for next goes over the connection.
    let _first = asks("first").await.unwrap();
    let error = storage_error(asks("refused").await);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    // Over another connection.
    drop(asks("next").await.unwrap());
}

#[tokio::test]
async fn messages_come_again_when_their_connection_was_a_black_hole() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let first = factory(builder(server.url())).await;
    let second = factory(builder(proxy.url())).await;
    for factory in [&first, &second] {
        drop(factory.create_lock("other").unwrap().lock(patient()).await);
    }
    let listen = async |count: usize| {
        eventually("they listen", LIMIT, async || {
            let clients: String = server.run("CLIENT LIST TYPE pubsub").await;
            clients.lines().count() == count
        })
        .await;
    };
    listen(2).await;
    proxy.black_hole();
    // The server does not know that one of them is lost.
    listen(3).await;
    let guard = first.create_lock("k").unwrap().lock(patient()).await;
    // It asks by itself only after a long time.
    let slow = LockOptions::builder().ttl(LONG).interval(LONG).retries(1);
    let lock = second.create_lock("k").unwrap();
    let waiting = tokio::spawn(lock.lock(slow.build().unwrap()));
    it_stands_in_the_queue(&server).await;
    assert_eq!(guard.unwrap().unlock().await.unwrap(), Unlocked::Held);
    drop(within(LIMIT, "the lock", waiting).await.unwrap().unwrap());
}

/// Its clock and that by which the place was had may be any time apart.
#[tokio::test]
async fn who_is_given_the_lock_by_another_server_asks_before_it_enters() {
    let (server, other) = (RedisServer::start().await, RedisServer::start().await);
    let proxy = Proxy::to(&server);
    let first = factory(builder(server.url())).await;
    let plain = LockFactory::builder(builder(proxy.url()).connect().await.unwrap());
    let second = plain.fencing(false).build().unwrap();
    let held = first.create_lock("k").unwrap().lock(patient()).await;
    let slow = LockOptions::builder().ttl(LONG).interval(LONG).retries(1);
    let lock = second.create_lock("k").unwrap();
    let waiting = tokio::spawn(lock.lock(slow.build().unwrap()));
    it_stands_in_the_queue(&server).await;
    // Commands go where they went, and messages come from elsewhere.
    let asked = async |times| {
        eventually("it asks", LIMIT, async || {
            // Who gets a place is told the time.
            server.calls("time").await == times
        })
        .await;
    };
    let () = server.run("CONFIG RESETSTAT").await;
    proxy.switch_to(&other);
    let _: u64 = server.run("CLIENT KILL TYPE pubsub").await;
    let mut inboxes: Vec<String> = Vec::new();
    eventually("it listens", LIMIT, async || {
        inboxes = other.run("PUBSUB CHANNELS *:inbox:*").await;
        !inboxes.is_empty()
    })
    .await;
    asked(1).await;
    let queue: String = server.run("GET {distributed-locks:k}:queue").await;
    let token = queue.split(' ').next().unwrap();
    let (seconds, micros): (u64, u64) = other.run("TIME").await;
    let grant = format!("g distributed-locks:k {token} 300000 {seconds} {micros} 0 0 0");
    let heard: u64 = other.run_words(&["PUBLISH", &inboxes[0], &grant]).await;
    assert_eq!(heard, 1);
    asked(2).await;
    assert!(!waiting.is_finished(), "it enters while another is in");
    waiting.abort();
    assert_eq!(held.unwrap().unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn who_is_not_told_any_more_that_a_lock_is_wanted_keeps_none() {
    let server = RedisServer::start().await;
    let () = server.run("ACL SETUSER app on >secret ~* &* +@all").await;
    let url = server.url().replace("redis://", "redis://app:secret@");
    let storage = builder(url).connect().await.unwrap();
    let keeps = LockFactory::builder(storage).linger(10 * LIMIT).build();
    let keeps = keeps.unwrap();
    eventually("it lingers", LIMIT, async || {
        let guard = keeps.create_lock("k").unwrap().lock(patient()).await;
        guard.unwrap().unlock().await.unwrap() == Unlocked::Held && server.keys().await == 1
    })
    .await;
    // It cannot listen again.
    let () = server.run("ACL SETUSER app -subscribe").await;
    let _: u64 = server.run("CLIENT KILL TYPE pubsub").await;
    no_key_is_left(&server).await;
}
