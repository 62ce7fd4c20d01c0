//! What errors, and the log beside them, say of passwords, users, addresses and tokens: nothing, by
//! whatever way a deployment fails.

use std::fmt::Write;

use tower_distributed_lock::{
    LockFactory, LockOptions,
    error::StorageErrorKind,
    storage::{RedisStorage, Redlock, redis::RedisStorageBuilder},
};
use tracing_subscriber::filter::LevelFilter;

use super::{
    capture::Capture,
    kit::{LIMIT, RedisServer, ServerOptions, eventually, options, texts, within},
    *,
};

const PASSWORD: &str = "pass-that-nobody-sees";
const USER: &str = "user-that-nobody-sees";

fn with(settings: &[&str]) -> ServerOptions {
    ServerOptions {
        settings: settings.iter().map(|&word| word.to_owned()).collect(),
        ..ServerOptions::default()
    }
}

/// All that can be heard of a storage that does not let us in: connecting, and locking.
async fn all_texts(storage: RedisStorageBuilder) -> String {
    let mut all = format!("{storage:?} {storage:#?}");
    let connecting = within(LIMIT, "a refusal", storage.clone().connect()).await;
    all += &texts(&connecting.unwrap_err());
    let factory = factory(storage);
    let lock = factory.create_lock("orders/42").unwrap();
    let options = LockOptions::builder().retries(0).build().unwrap();
    let error = within(LIMIT, "a refusal", lock.lock(options)).await;
    all += &texts(&error.unwrap_err());
    let looked = within(LIMIT, "a refusal", factory.inspector().locks(10)).await;
    all += &texts(&looked.unwrap_err());
    write!(all, "{factory:?} {lock:?}").unwrap();
    all
}

/// None of these are in it.
#[track_caller]
fn assert_silent(text: &str, secrets: &[&str]) {
    for &secret in secrets {
        if let Some(at) = text.find(secret) {
            let from = text.floor_char_boundary(at.saturating_sub(300));
            panic!("`{secret}` is in {}", &text[from..at + secret.len()]);
        }
    }
}

fn address(server: &RedisServer) -> String {
    format!("127.0.0.1:{}", server.port())
}

#[tokio::test]
async fn a_server_that_repeats_what_it_was_sent_tells_nobody_the_password() {
    // As servers before Redis 6 do with HELLO, and proxies with what they do not know.
    for unknown in [&["HELLO"][..], &["HELLO", "AUTH"]] {
        let unknown = unknown
            .iter()
            .flat_map(|name| ["--rename-command", name, ""]);
        let server = RedisServer::start_with(with(&unknown.collect::<Vec<_>>())).await;
        let (seen, _default) = Capture::start(LevelFilter::TRACE);
        let storage = url(&server).username(USER).password(PASSWORD);
        let mut text = all_texts(storage.clone()).await;
        // Who listens is not let in either, and that is logged.
        let factory = factory(storage);
        let lock = factory.create_lock("orders/42").unwrap();
        eventually("it is logged", LIMIT, async || {
            let options = LockOptions::builder().retries(0).build().unwrap();
            text += &texts(&lock.lock(options).await.unwrap_err());
            seen.text().contains("no wake-ups from Redis")
        })
        .await;
        text += &seen.text();
        assert_silent(&text, &[PASSWORD, USER, &address(&server), "redis://"]);
        assert!(text.contains("unknown command 'HELLO'"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_repeats_what_it_was_sent_tells_nobody_a_token() {
    // Of a command that it does not know; the lock may be free, held, or its holder's.
    for unknown in ["SET", "INCRBY", "MGET", "EVALSHA", "EVAL", "PEXPIRE", "DEL"] {
        let server = RedisServer::start_with(with(&["--rename-command", unknown, ""])).await;
        let (seen, _default) = Capture::start(LevelFilter::TRACE);
        let (factory, other) = (factory(url(&server)), factory(url(&server)));
        let mut text = String::new();
        let options = options(ms(60), ms(100));
        for factory in [&factory, &other] {
            let lock = factory.create_lock("orders/42").unwrap();
            for _ in 0..3 {
                match within(LIMIT, "an answer", lock.lock(options)).await {
                    Ok(guard) => {
                        tokio::time::sleep(ms(30)).await;
                        if let Err(error) = guard.unlock().await {
                            text += &texts(&error);
                        }
                    }
                    Err(error) => text += &texts(&error),
                }
            }
        }
        text += &seen.text();
        for word in text.split(|c: char| !c.is_ascii_hexdigit()) {
            assert!(word.len() != 32, "{word} is a token's in {text}");
        }
    }
}
