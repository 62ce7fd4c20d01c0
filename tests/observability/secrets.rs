//! What must never be seen.

use tracing_subscriber::filter::LevelFilter;

use super::{
    capture::Capture,
    kit::{LIMIT, RedisServer, ServerOptions, eventually, no_key_is_left, within},
    *,
};
use tower_distributed_lock::{LockKey, storage::RedisStorage};

const PASSWORD: &str = "pass-that-nobody-sees";

#[tokio::test]
async fn no_token_no_password_and_no_url_is_said_at_any_level() {
    let (seen, _default) = Capture::start(LevelFilter::TRACE);
    let options = ServerOptions {
        password: Some(PASSWORD),
        ..ServerOptions::default()
    };
    let mut server = RedisServer::start_with(options).await;
    let url = server.url_with_password(PASSWORD);
    let connect = async || LockFactory::new(RedisStorage::connect(url.as_str()).await.unwrap());
    let (here, there) = (connect().await, connect().await);
    let options = LockOptions::builder()
        .ttl(ms(500))
        .interval(ms(50))
        .retries(400)
        .build()
        .unwrap();

    // Taken, waited for here and in another process, handed over, renewed.
    let guard = key(&here).lock(options).await.unwrap();
    let token: String = within(LIMIT, "the token", async {
        server.run("GET distributed-locks:orders/42").await
    })
    .await;
    let token = token.split([':', ' ']).next().unwrap().to_owned();
    assert!(token.len() >= 32, "{token}");
    let waiting = [key(&here), key(&there)]
        .map(|lock| tokio::spawn(async move { drop(lock.lock(options).await.unwrap()) }));
    eventually("they wait", LIMIT, async || {
        here.waiters() + there.waiters() == 2
    })
    .await;
    tokio::time::sleep(ms(400)).await;
    drop(guard);
    for lock in waiting {
        within(LIMIT, "the lock", lock).await.unwrap();
    }
    // Looked at, and taken away, by one whose inbox is nobody's business either.
    let guard = key(&here).lock(options).await.unwrap();
    let lock = there.create_lock("elsewhere").unwrap();
    let elsewhere = lock.lock(options).await.unwrap();
    let looker: String = within(LIMIT, "the looker's token", async {
        server.run("GET distributed-locks:elsewhere").await
    })
    .await;
    let looker = looker.split([':', ' ']).next().unwrap().to_owned();
    assert!(looker.len() >= 32 && looker != token, "{looker}");
    let inspector = there.inspector();
    within(LIMIT, "the look", inspector.locks(10))
        .await
        .unwrap();
    let wanted = LockKey::new("orders/42").unwrap();
    let taking = inspector.force_release(&wanted, "it hangs");
    let taken = within(LIMIT, "the lock", taking).await.unwrap();
    assert!(taken.is_some());
    within(LIMIT, "the word", guard.lost()).await;
    drop((guard, elsewhere));
    // Lost to an outage, and refused by a server with another password.
    let guard = key(&here).lock(options).await.unwrap();
    server.kill();
    within(LIMIT, "the loss", guard.lost()).await;
    drop(guard);
    key(&there).lock(impatient()).await.unwrap_err();
    server.restart().await;
    let mistaken = server.url_with_password("another-that-nobody-sees");
    RedisStorage::connect(mistaken).await.unwrap_err();
    eventually("they are back", LIMIT, async || {
        key(&here).lock(options).await.is_ok()
    })
    .await;
    drop((here, there));
    no_key_is_left(&server).await;

    let text = seen.text();
    assert!(text.contains("orders/42") && text.contains("lost:expired"));
    assert!(text.contains("lock released by force"));
    let address = format!("127.0.0.1:{}", server.port());
    for secret in [
        PASSWORD,
        "another-that-nobody-sees",
        token.as_str(),
        looker.as_str(),
        "redis://",
        address.as_str(),
    ] {
        let at = text.find(secret);
        assert!(
            at.is_none(),
            "{secret} is in {}",
            &text[at.unwrap().saturating_sub(300)..at.unwrap() + 100]
        );
    }
}
