//! Streams that the user makes.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tokio::{
    net::{TcpStream, UnixStream},
    sync::oneshot,
};
use tower_distributed_lock::{
    LockFactory, Unlocked,
    error::StorageErrorKind,
    storage::{RedisStorage, redis::RedisStorageBuilder},
};

use super::{
    builder, factory,
    kit::{Authority, LIMIT, RedisServer, eventually, ms, within},
    no_key_is_left, options, the_lock_goes_round, tls,
};

/// Where no name is looked up, and nobody answers.
const NOWHERE: &str = "nowhere.invalid";

/// Whom connections were wanted to.
type Asked = Arc<Mutex<Vec<(String, u16)>>>;

fn through_socket(server: &RedisServer, asked: &Asked) -> RedisStorageBuilder {
    let (socket, asked) = (server.socket(), Arc::clone(asked));
    builder(format!("redis://{NOWHERE}:7")).connector(move |host, port| {
        asked.lock().unwrap().push((host, port));
        UnixStream::connect(socket.clone())
    })
}

#[tokio::test]
async fn all_connections_are_made_by_the_users_connector() {
    let server = RedisServer::start().await;
    let asked = Asked::default();
    let first = factory(through_socket(&server, &asked)).await;
    let second = factory(through_socket(&server, &asked).replicas(0, ms(1))).await;
    the_lock_goes_round([&first, &second]).await;
    no_key_is_left(&server).await;
    let asked = asked.lock().unwrap();
    // For commands and for messages.
    assert!(asked.len() >= 4, "{asked:?}");
    assert!(asked.iter().all(|it| *it == (NOWHERE.to_owned(), 7)));
}

#[tokio::test]
async fn tls_is_spoken_over_the_users_stream_and_with_the_host_of_the_url() {
    let authority = Authority::new();
    let server = tls::server(authority.issue(&["redis.example"])).await;
    let port = server.tls_port();
    let through = |host: &str| {
        builder(format!("rediss://{host}:7"))
            .root_certificate(authority.pem())
            .connector(move |_, _| TcpStream::connect(("127.0.0.1", port)))
    };
    let factories = [
        factory(through("redis.example")).await,
        factory(through("redis.example")).await,
    ];
    the_lock_goes_round(factories.each_ref()).await;
    let error = through("other.example").connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
}

#[tokio::test]
async fn a_connector_that_fails_is_a_server_that_is_away() {
    let server = RedisServer::start().await;
    let port = server.port();
    let is_up = Arc::new(Mutex::new(false));
    let up = Arc::clone(&is_up);
    let storage = builder("redis://server").connector(move |_, _| {
        let is_up = *up.lock().unwrap();
        async move {
            match is_up {
                true => TcpStream::connect(("127.0.0.1", port)).await,
                false => Err(io::Error::other("no tunnel")),
            }
        }
    });
    let error = storage.clone().connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("no tunnel"), "{error}");
    // Once it is there, so is the lock.
    let factory = LockFactory::new(storage.connect_lazily().unwrap());
    let lock = factory.create_lock("k").unwrap();
    let options = tower_distributed_lock::LockOptions::default();
    assert!(lock.try_lock(options).await.is_err());
    *is_up.lock().unwrap() = true;
    drop(
        within(LIMIT, "the lock", lock.lock(super::patient()))
            .await
            .unwrap(),
    );
}

#[tokio::test]
async fn a_connector_that_does_not_end_is_dropped_after_the_time_out() {
    let (dropped, ended) = oneshot::channel::<()>();
    let dropped = Arc::new(Mutex::new(Some(dropped)));
    let storage = RedisStorage::builder("redis://server")
        .connect_timeout(ms(50))
        .connector(move |_, _| {
            let guard = dropped.lock().unwrap().take();
            async move {
                std::future::pending::<()>().await;
                drop(guard);
                TcpStream::connect("127.0.0.1:1").await
            }
        });
    let error = within(LIMIT, "an error", storage.connect())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    // What it had is gone.
    assert!(within(LIMIT, "its end", ended).await.is_err());
}

#[tokio::test]
async fn a_connector_that_panics_is_a_server_that_is_away_and_renewals_go_on() {
    let server = RedisServer::start().await;
    let port = server.port();
    // The first connection is for commands, and works. Later ones are for messages, again and again.
    let asked = Arc::new(Mutex::new(0));
    let count = Arc::clone(&asked);
    let storage = builder("redis://server").connector(move |_, _| {
        let mut asked = count.lock().unwrap();
        *asked += 1;
        let (number, at_once) = (*asked, *asked % 2 == 0);
        drop(asked);
        assert!(number == 1 || !at_once, "at once");
        async move {
            assert!(number == 1, "later");
            TcpStream::connect(("127.0.0.1", port)).await
        }
    });
    let factory = factory(storage).await;
    let lock = factory.create_lock("k").unwrap();
    let guard = lock.try_lock(options(ms(3_000), ms(300))).await.unwrap();
    eventually("three attempts have panicked", LIMIT, async || {
        *asked.lock().unwrap() >= 4
    })
    .await;
    let renewals = server.calls("evalsha").await;
    eventually("it is renewed twice more", LIMIT, async || {
        server.calls("evalsha").await >= renewals + 2
    })
    .await;
    assert!(guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}
