//! What is found out of a server holds for the connection over which it was found out, and for no
//! other.

use std::{
    pin::pin,
    sync::{Arc, Mutex},
};

use futures_util::poll;
use tower_distributed_lock::{
    LockFactory,
    error::{LockError, StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, RedisStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest,
    },
};

use super::{
    kit::{FakeServer, LIMIT, eventually, within},
    patient, storage_error,
};

/// A server on which the lock `held` is another's and all others are free. Before it takes the lock
/// `refused`, it becomes a replica, for those who are connected.
struct Server {
    server: FakeServer,
    heard: Arc<Mutex<Vec<Vec<String>>>>,
}

impl Server {
    async fn start() -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&heard);
        let server = FakeServer::start(move |_, words| {
            hears.lock().unwrap().push(words.to_vec());
            let is_about = |key: &str| words.iter().any(|word| *word == name(key));
            Some(match words[0].as_str() {
                "HELLO" => "-ERR unknown command 'HELLO'".to_owned(),
                "SET" if is_about("refused") => {
                    "-READONLY You can't write against a read only replica.".to_owned()
                }
                "SET" if is_about("held") => "$-1".to_owned(),
                "INCRBY" => ":2000000000000001".to_owned(),
                "MGET" => "*2\r\n$-1\r\n$-1".to_owned(),
                "EVAL" | "EVALSHA" if seen(words).is_none() => ":1".to_owned(),
                "EVAL" | "EVALSHA" if is_about("held") => "*1\r\n:5000".to_owned(),
                "EVAL" | "EVALSHA" => {
                    let token = &words[6];
                    format!(
                        "*3\r\n${}\r\n{token}\r\n:0\r\n:2000000000000000",
                        token.len()
                    )
                }
                _ => "+OK".to_owned(),
            })
        })
        .await;
        Self { server, heard }
    }

    /// The commands about a lock, and whether they raise the fencing counter.
    fn heard_of(&self, key: &str) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        let heard = heard.iter().filter(|words| words.contains(&name(key)));
        heard
            .map(|words| match seen(words) {
                Some(seen) if seen >= 0 => format!("{} and raise", words[0]),
                _ => words[0].clone(),
            })
            .collect()
    }
}

fn name(key: &str) -> String {
    format!("distributed-locks:{key}")
}

/// What the script that takes a lock raises the counter to. No other has so many words.
fn seen(words: &[String]) -> Option<i64> {
    words.get(9)?.parse().ok()
}

/// A storage for several factories. None of them listens.
#[derive(Clone)]
struct Shared(Arc<RedisStorage>);

impl LockStorage for Shared {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.0.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.0.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.0.release(request).await
    }
}

/// With one connection to a server: locks with fencing tokens, and locks without.
async fn factories(server: &Server) -> (LockFactory, LockFactory) {
    let storage = RedisStorage::builder(server.server.url()).connect_timeout(LIMIT);
    let storage = Shared(Arc::new(storage.connect().await.unwrap()));
    let plain = LockFactory::builder(storage.clone()).fencing(false);
    (LockFactory::new(storage), plain.build().unwrap())
}

async fn is_denied(factory: &LockFactory) {
    let denied = factory
        .create_lock("held")
        .unwrap()
        .try_lock(patient())
        .await;
    assert!(
        matches!(denied, Err(LockError::NotObtained(_))),
        "{denied:?}"
    );
}

#[tokio::test]
async fn what_a_late_reply_shows_is_not_believed_of_the_connection_that_came_after() {
    let server = Server::start().await;
    let (fenced, plain) = factories(&server).await;
    // It brings the script, raises the counter, and is answered. Nobody looks at the answer yet.
    let mut late = pin!(fenced.create_lock("late").unwrap().lock(patient()));
    assert!(poll!(&mut late).is_pending());
    eventually("it has asked", LIMIT, async || {
        server.heard_of("late") == ["EVAL and raise"]
    })
    .await;
    // The connection ends, and there is another.
    let refused = plain
        .create_lock("refused")
        .unwrap()
        .try_lock(patient())
        .await;
    let error = storage_error(refused);
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
    let other = plain.create_lock("other").unwrap();
    let _other = other.try_lock(patient()).await.unwrap();
    let _late = within(LIMIT, "its answer", late).await.unwrap();

    is_denied(&plain).await;
    assert_eq!(server.heard_of("held"), ["SET", "EVAL"]);
    let next = fenced.create_lock("next").unwrap();
    let _next = next.try_lock(patient()).await.unwrap();
    assert_eq!(server.heard_of("next"), ["EVALSHA and raise"]);
}

#[tokio::test]
async fn who_wants_no_token_does_not_vouch_for_the_counter() {
    let server = Server::start().await;
    let (fenced, plain) = factories(&server).await;
    is_denied(&plain).await;
    assert_eq!(server.heard_of("held"), ["SET", "EVAL"]);
    let lock = fenced.create_lock("free").unwrap();
    let _held = lock.try_lock(patient()).await.unwrap();
    assert_eq!(server.heard_of("free"), ["EVALSHA and raise"]);
}

#[tokio::test]
async fn who_is_denied_does_not_vouch_for_a_counter_that_is_not_used() {
    let server = Server::start().await;
    let (fenced, _) = factories(&server).await;
    let lock = fenced.create_lock("free").unwrap();
    let _held = lock.try_lock(patient()).await.unwrap();
    // Asked for far more often than it is forgotten, and raised all the same.
    eventually("it is raised again", LIMIT, async || {
        is_denied(&fenced).await;
        let heard = server.heard_of("held");
        heard.iter().any(|command| command == "EVALSHA and raise")
    })
    .await;
}
