//! What cannot heal by waiting is told at once, with the right kind, and no text tells how to log in.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use tower_distributed_lock::{
    LockFactory, Unlocked,
    error::{LockError, LossReason, StorageErrorKind},
    storage::RedisStorage,
};

use super::{
    kit::{
        FakeServer, LIMIT, LONG, RedisServer, ServerOptions, eventually, ms, options, patient,
        storage_error, texts, within,
    },
    lock, storage,
};

const PASSWORD: &str = "hunter2-secret";

/// Neither the text nor the debug output of any of these may tell how to log in.
fn assert_no_secret(text: impl Debug, url: &str) {
    let text = format!("{text:?}\n{text:#?}");
    for secret in [PASSWORD, "guessed-secret", url] {
        assert!(!text.contains(secret), "{text}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_at_once_and_no_text_repeats_it() {
    let server = RedisServer::start_with(ServerOptions {
        password: Some(PASSWORD),
        ..ServerOptions::default()
    })
    .await;
    let none = server.url().replace(&format!(":{PASSWORD}@"), "");
    for url in [server.url_with_password("guessed-secret"), none] {
        let started = Instant::now();
        let builder = RedisStorage::builder(&url).connect_timeout(LIMIT);
        assert_no_secret(&builder, &url);
        let error = builder.connect().await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
        assert_no_secret(texts(&error), &url);

        let storage = RedisStorage::builder(&url).connect_lazily().unwrap();
        assert_no_secret(&storage, &url);
        let builder = LockFactory::builder(storage);
        assert_no_secret(&builder, &url);
        let factory = builder.build().unwrap();
        assert_no_secret(&factory, &url);
        let refused = factory.create_lock("k").unwrap().lock(patient()).await;
        let error = LockError::from(storage_error(refused));
        assert!(matches!(&error, LockError::Storage(error)
            if error.kind() == StorageErrorKind::Unauthorized));
        assert_no_secret(texts(&error), &url);
        // These callers were ready to wait for much longer.
        assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
        assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    }

    let storage = storage(&server).await;
    assert_no_secret(&storage, &server.url());
    let factory = LockFactory::new(storage);
    let lock = factory.create_lock("k").unwrap();
    let guard = lock.lock(patient()).await.unwrap();
    // Whoever knows the owner's token can free the lock.
    let token: String = server.run("GET distributed-locks:k").await;
    let (id, _) = token.split_once(':').unwrap();
    for text in [
        format!("{factory:?}"),
        format!("{lock:?}"),
        format!("{guard:?}"),
    ] {
        assert!(!text.contains(id), "{text}");
        assert_no_secret(text, &server.url());
    }
}

#[tokio::test]
async fn an_unreadable_url_is_refused_and_not_repeated() {
    for url in [
        "hunter2-secret",
        "http://user:hunter2-secret@localhost",
        "redis://:hunter2-secret@localhost:not-a-port",
        "redis://:hunter2-secret@localhost/not-a-database",
        "redis://user:hunter2-secret@",
    ] {
        let eager = RedisStorage::connect(url).await.unwrap_err();
        let lazy = RedisStorage::builder(url).connect_lazily().unwrap_err();
        for error in [eager, lazy] {
            assert_eq!(error.kind(), StorageErrorKind::Rejected, "{url}: {error}");
            assert_no_secret(texts(&error), url);
        }
    }
}

#[tokio::test]
async fn a_key_of_another_type_is_told_and_left_untouched() {
    let server = RedisServer::start().await;
    let lock = lock(&server, "list").await;
    let push = "RPUSH distributed-locks:list a b";
    let list = async || -> Vec<String> { server.run("LRANGE distributed-locks:list 0 -1").await };

    let () = server.run(push).await;
    // It cannot heal by waiting, so nobody waits.
    let started = Instant::now();
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::WrongType);
    assert!(started.elapsed() < LIMIT / 2);
    assert_eq!(list().await, ["a", "b"]);

    // And when it takes the place of a lock that is held.
    let () = server.run("DEL distributed-locks:list").await;
    let guard = lock
        .lock(options(Duration::from_secs(6), LIMIT))
        .await
        .unwrap();
    let () = server.run("DEL distributed-locks:list").await;
    let () = server.run(push).await;
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert_eq!(reason, LossReason::NotOurs);
    let () = server.run("CONFIG RESETSTAT").await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    // What it may still have is given back in the background.
    eventually("it releases", LIMIT, async || {
        server.calls("eval").await + server.calls("evalsha").await > 0
    })
    .await;
    assert_eq!(list().await, ["a", "b"]);
}

#[tokio::test]
async fn a_cluster_that_keeps_the_key_elsewhere_is_an_error_at_once() {
    let server = FakeServer::start(|_, words| {
        Some(match words[0].as_str() {
            "HELLO" => "-ERR unknown command `HELLO`, with args beginning with: `3`, ",
            "CLIENT" => "+OK",
            _ => "-MOVED 3999 127.0.0.1:6381",
        })
    })
    .await;
    let storage = RedisStorage::connect(server.url()).await.unwrap();
    let lock = LockFactory::new(storage).create_lock("k").unwrap();
    let started = Instant::now();
    // It cannot heal by waiting, so nobody waits.
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_error_of_an_old_attempt_to_connect_is_not_told_to_later_callers() {
    // Once there is a wrong password, and later no answer at all.
    let server = FakeServer::start(|connection, _| {
        // The one for locks and the one for wake-ups.
        (connection < 2).then_some("-WRONGPASS invalid username-password pair or user is disabled.")
    })
    .await;
    let storage = RedisStorage::builder(server.url_with_password(PASSWORD))
        .connect_timeout(ms(300))
        .connect_lazily()
        .unwrap();
    let factory = LockFactory::builder(storage)
        .storage_timeout(LIMIT)
        .build()
        .unwrap();
    let lock = factory.create_lock("k").unwrap();
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
    for _ in 0..5 {
        let error = storage_error(lock.try_lock(patient()).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
        let error = storage_error(lock.lock(options(LONG, ms(1_000))).await);
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    }
}
