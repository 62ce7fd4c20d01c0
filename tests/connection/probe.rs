//! What is said of a server that may lose locks.

use std::{
    io,
    sync::{Arc, Mutex, Once},
};

use tower_distributed_lock::{LockFactory, Unlocked};
use tracing_subscriber::fmt::MakeWriter;

use super::{
    builder, factory,
    kit::{LIMIT, RedisServer, ServerOptions, eventually},
    patient,
};

/// What was logged on this thread since it was made.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub(super) fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        // While this test's is the only one, whoever logs on another thread finds none, and tracing
        // remembers that nobody wants to hear of that line.
        static ANOTHER: Once = Once::new();
        ANOTHER.call_once(|| {
            let deaf = tracing_subscriber::fmt()
                .with_max_level(tracing::Level::DEBUG)
                .with_writer(io::sink)
                .finish();
            tracing::subscriber::set_global_default(deaf).unwrap();
        });
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(log.clone())
            .with_ansi(false)
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    pub(super) fn lines(&self, level: &str, text: &str) -> usize {
        let log = self.0.lock().unwrap();
        let log = String::from_utf8_lossy(&log);
        let lines = log.lines();
        lines
            .filter(|line| line.contains(level) && line.contains(text))
            .count()
    }

    async fn comes_to_say(&self, level: &str, text: &str) {
        eventually("it is said", LIMIT, async || self.lines(level, text) > 0).await;
    }
}

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

const EVICTS: &str = "throws keys away";
const FORGETS: &str = "keeps nothing on disk";

const LOOKED: &str = "how Redis is set up";

#[tokio::test]
async fn a_server_that_may_evict_locks_or_forget_them_is_told_of_once() {
    let mut server = RedisServer::start().await;
    let () = server.run("CONFIG SET maxmemory 100mb").await;
    let () = server.run("CONFIG SET maxmemory-policy allkeys-lru").await;
    let (log, _logging) = Log::start();
    let factory = factory(builder(server.url())).await;
    let lock = factory.create_lock("k").unwrap();
    log.comes_to_say("WARN", FORGETS).await;
    assert_eq!(log.lines("WARN", EVICTS), 1);
    assert_eq!(log.lines("WARN", "allkeys-lru"), 1);

    // A new connection to the same run of the server is no news.
    let connections = server.info("total_connections_received").await;
    let _: u64 = server.run("CLIENT KILL TYPE normal").await;
    drop(lock.lock(patient()).await.unwrap());
    assert!(server.info("total_connections_received").await > connections);
    // To another storage it is: what comes after that would have come before.
    let other = super::factory(builder(server.url())).await;
    eventually("it is said", LIMIT, async || log.lines("WARN", FORGETS) > 1).await;
    assert_eq!(log.lines("WARN", FORGETS), 2);
    drop(other);
    // So is a new run, but what it was set to by CONFIG SET it has forgotten.
    server.restart().await;
    drop(lock.lock(patient()).await.unwrap());
    eventually("it is said again", LIMIT, async || {
        log.lines("WARN", FORGETS) > 2
    })
    .await;
    assert_eq!(
        (log.lines("WARN", FORGETS), log.lines("WARN", EVICTS)),
        (3, 2)
    );
}

#[tokio::test]
async fn a_server_that_keeps_locks_is_not_spoken_of() {
    let durable = ServerOptions {
        durable: true,
        ..ServerOptions::default()
    };
    let appends = RedisServer::start_with(durable).await;
    let () = appends.run("CONFIG SET maxmemory 100mb").await;
    let saves = RedisServer::start().await;
    let () = saves.run_words(&["CONFIG", "SET", "save", "3600 1"]).await;
    for server in [appends, saves] {
        let (log, _logging) = Log::start();
        let _factory = factory(builder(server.url())).await;
        log.comes_to_say("DEBUG", LOOKED).await;
        assert_eq!(log.lines("persists=Some(true)", LOOKED), 1);
        assert_eq!(log.lines("WARN", ""), 0);
    }
}

#[tokio::test]
async fn a_server_that_does_not_tell_is_no_cause_for_alarm() {
    let server = RedisServer::start().await;
    // Nothing else is needed where nobody waits.
    let may = "ACL SETUSER app on >secret ~* +set +get +eval +evalsha +exists +del";
    for (more, eviction) in [(" +info", "Some(Keeps)"), (" -info", "None")] {
        let () = server.run(&format!("{may}{more}")).await;
        let (log, _logging) = Log::start();
        let url = server.url().replace("redis://", "redis://app:secret@");
        let storage = builder(url).connect().await.unwrap();
        let factory = LockFactory::builder(storage)
            .fencing(false)
            .build()
            .unwrap();
        let lock = factory.create_lock("k").unwrap();
        let guard = lock.try_lock(patient()).await.unwrap();
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        log.comes_to_say("DEBUG", LOOKED).await;
        assert_eq!(
            log.lines(&format!("eviction={eviction} persists=None"), LOOKED),
            1
        );
        // Of wake-ups, not of this.
        assert_eq!(log.lines("WARN", "") - log.lines("WARN", "waiters poll"), 0);
    }
}

#[tokio::test]
async fn who_does_not_want_it_looked_at_is_not_told() {
    let server = RedisServer::start().await;
    let (log, _logging) = Log::start();
    let not = factory(builder(server.url()).probe(false)).await;
    drop(not.create_lock("k").unwrap().lock(patient()).await.unwrap());
    // The one beside it is, in its time.
    let _looks = factory(builder(server.url())).await;
    log.comes_to_say("DEBUG", LOOKED).await;
    assert_eq!(
        (log.lines("DEBUG", LOOKED), log.lines("WARN", FORGETS)),
        (1, 1)
    );
}
