//! What errors, and the log beside them, say of passwords, users, addresses and tokens: nothing, by
//! whatever way a deployment fails.

use std::fmt::Write;

use tower_distributed_lock::{
    LockFactory, LockOptions,
    storage::{RedisStorage, Redlock, redis::RedisStorageBuilder},
};
use tracing_subscriber::filter::LevelFilter;

use super::{
    capture::Capture,
    kit::{Authority, LIMIT, RedisServer, ServerOptions, Tls, eventually, options, texts, within},
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

/// All that can be heard of a storage that does not let us in.
async fn texts_of(factory: &LockFactory) -> String {
    let lock = factory.create_lock("orders/42").unwrap();
    let options = LockOptions::builder().retries(0).build().unwrap();
    let error = within(LIMIT, "a refusal", lock.lock(options)).await;
    let mut all = texts(&error.unwrap_err());
    let looked = within(LIMIT, "a refusal", factory.inspector().locks(10)).await;
    all += &texts(&looked.unwrap_err());
    write!(all, "{factory:?} {factory:#?} {lock:?}").unwrap();
    all
}

/// The same, and of connecting to it.
async fn all_texts(storage: RedisStorageBuilder) -> String {
    let mut all = format!("{storage:?} {storage:#?}");
    let connecting = within(LIMIT, "a refusal", storage.clone().connect()).await;
    all += &texts(&connecting.unwrap_err());
    all + &texts_of(&factory(storage)).await
}

/// None of these are in it.
#[track_caller]
fn assert_silent(text: &str, secrets: &[&str]) {
    for &secret in secrets {
        if let Some(at) = text.find(secret) {
            let before: String = text[..at].chars().rev().take(300).collect();
            let before: String = before.chars().rev().collect();
            panic!("`{secret}` is in {}", before);
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

/// A port where nobody is.
fn nobody() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn however_a_deployment_fails_its_errors_show_no_secret() {
    let authority = Authority::new();
    let server = RedisServer::start_with(ServerOptions {
        password: Some("another-that-nobody-sees"),
        tls: Some(Tls {
            certificate: authority.issue(&["127.0.0.1"]),
            clients: None,
        }),
        ..ServerOptions::default()
    });
    let server = server.await;
    let (port, tls, nobody) = (server.port(), server.tls_port(), nobody());
    let url = |scheme: &str, port: u16| format!("{scheme}://{USER}:{PASSWORD}@127.0.0.1:{port}");
    let (seen, _default) = Capture::start(LevelFilter::TRACE);
    let one = |url: String| RedisStorage::builder(url);
    let sentinel = |url: String| RedisStorage::sentinel("the-service", [url]);
    let cluster = |url: String| RedisStorage::cluster([url]);
    let failing = [
        // The password is wrong.
        one(url("redis", port)),
        one(url("rediss", tls)).root_certificate(authority.pem()),
        sentinel(url("redis", port)),
        cluster(url("redis", port)),
        // The certificate is not trusted.
        one(url("rediss", tls)),
        sentinel(url("rediss", tls)),
        cluster(url("rediss", tls)),
        // No TLS on this port, and nothing but TLS on that.
        one(url("rediss", port)).connect_timeout(ms(300)),
        one(url("redis", tls)).connect_timeout(ms(300)),
        // Nobody is there, and no such host.
        one(url("redis", nobody)),
        one(url("rediss", nobody)),
        sentinel(url("redis", nobody)),
        cluster(url("redis", nobody)),
        one(format!("redis://{USER}:{PASSWORD}@no-such-host.invalid")),
        one(format!(
            "unix:///no/such/socket?user={USER}&pass={PASSWORD}"
        )),
    ];
    let mut text = String::new();
    for storage in &failing {
        text += &all_texts(storage.clone()).await;
    }
    // As nodes of a Redlock.
    let nodes = [port, nobody].map(|port| one(url("redis", port)).connect_lazily().unwrap());
    let mut redlock = Redlock::builder();
    for node in nodes {
        redlock = redlock.node(node);
    }
    write!(text, "{redlock:?}").unwrap();
    let redlock = redlock.build().unwrap();
    write!(text, "{redlock:?}").unwrap();
    text += &texts_of(&LockFactory::new(redlock)).await;
    // Through a pool of the user's.
    for port in [port, nobody] {
        let manager = bb8_redis::RedisConnectionManager::new(url("redis", port)).unwrap();
        let pool = bb8_redis::bb8::Pool::builder().build_unchecked(manager);
        let storage = RedisStorage::from_pool(pool);
        write!(text, "{storage:?}").unwrap();
        text += &texts_of(&LockFactory::new(storage)).await;
    }
    text += &seen.text();
    let ports = [port, tls, nobody].map(|port| format!("127.0.0.1:{port}"));
    let secrets = [
        PASSWORD,
        USER,
        "another-that",
        "redis://",
        "rediss://",
        "no-such-host",
    ];
    assert_silent(&text, &secrets);
    assert_silent(&text, &ports.each_ref().map(String::as_str));
    assert!(
        text.contains("denied access") && text.contains("TLS: "),
        "{text}"
    );
}

#[tokio::test]
async fn a_user_that_may_not_do_something_is_not_named() {
    let server = RedisServer::start().await;
    let rules = format!("ACL SETUSER {USER} on >{PASSWORD} ~* &* +@all -set -subscribe");
    let () = server.run(&rules).await;
    let (seen, _default) = Capture::start(LevelFilter::TRACE);
    let factory = factory(url(&server).username(USER).password(PASSWORD));
    let lock = factory.create_lock("orders/42").unwrap();
    let options = LockOptions::builder().retries(0).build().unwrap();
    let error = lock.lock(options).await.unwrap_err();
    let mut text = texts(&error);
    assert!(text.contains("Unauthorized"), "{text}");
    eventually("it is logged", LIMIT, async || {
        drop(lock.lock(options).await);
        seen.text().contains("no wake-ups from Redis")
    })
    .await;
    text += &seen.text();
    assert_silent(&text, &[PASSWORD, USER, &address(&server)]);
}
