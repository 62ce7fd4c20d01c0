//! The promises of the lock over Redis Sentinel: what a failover does to locks that are held and
//! waited for.
//!
//! Two factories in a test stand for two replicas of a service: they share nothing but the servers.

// A test says what it expects by panicking, and has no users who read its documentation. How long a
// failover took is printed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod kit;

use std::{
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::poll;
use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked,
    error::{LockError, LossReason, StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, LockStorage, RedisStorage, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest, conformance,
    },
};

use self::kit::{
    FakeServer, LIMIT, LONG, Load, RedisServer, Sentinel, ServerOptions, asking, eventually,
    is_queued, ms, no_key_is_left, token, within,
};

fn storage(redis: &Sentinel) -> RedisStorage {
    RedisStorage::sentinel(Sentinel::SERVICE, redis.urls())
        .connect_lazily()
        .unwrap()
}

fn factory(redis: &Sentinel) -> LockFactory {
    LockFactory::new(storage(redis))
}

/// Waits for up to [`LIMIT`], and asks every 100 to 200 ms.
fn options(ttl: Duration) -> LockOptions {
    asking(ttl, LIMIT, ms(200))
}

/// Renewed every second.
const TTL: Duration = Duration::from_secs(3);

async fn lock(factory: &LockFactory, key: &str, ttl: Duration) -> LockGuard {
    let locking = factory.create_lock(key).unwrap().lock(options(ttl));
    within(LIMIT, "the lock", locking).await.unwrap()
}

/// A client of one server, whose connection carries nothing but what locks take.
async fn direct(server: &RedisServer) -> LockFactory {
    let storage = RedisStorage::builder(server.url()).probe(false).connect();
    LockFactory::new(storage.await.unwrap())
}

/// The connections over which locks are asked for, by the server's own numbers.
async fn connections(server: &RedisServer) -> Vec<String> {
    let list = server.try_run("CLIENT LIST TYPE normal").await;
    let list: String = list.unwrap_or_default();
    // A lock was given back over them, by a script.
    let ours = |line: &&str| line.contains("cmd=eval");
    let id = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    list.lines().filter(ours).map(id).collect()
}

// --- finding the master -----------------------------------------------------------------------------------------

#[tokio::test]
async fn the_master_is_found_while_a_sentinel_is_away_and_another_hangs_later() {
    let mut redis = Sentinel::start().await;
    redis.sentinels[0].kill();
    conformance::check(storage(&redis)).await;
    redis.sentinels[1].pause();
    // Less than half of them, but nobody says otherwise.
    let factory = factory(&redis);
    let guard = lock(&factory, "k", LONG).await;
    assert_eq!(redis.servers[0].keys().await, 1);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&redis.servers[0]).await;
}

#[tokio::test]
async fn a_service_that_no_sentinel_knows_is_told_at_once() {
    let redis = Sentinel::start().await;
    let connecting = RedisStorage::sentinel("another", redis.urls()).connect();
    let error = within(LIMIT, "the error", connecting).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected);

    let error = RedisStorage::sentinel("locks", [""; 0]).connect_lazily();
    assert_eq!(error.unwrap_err().kind(), StorageErrorKind::Rejected);
}

/// A Sentinel that says what it is told to.
struct FakeSentinel {
    server: FakeServer,
    says: Arc<Mutex<String>>,
}

impl FakeSentinel {
    async fn start() -> Self {
        let says = Arc::new(Mutex::new(String::new()));
        let told = Arc::clone(&says);
        let server = FakeServer::start(move |_, words: &[String]| {
            let answer = match words[0].as_str() {
                "SENTINEL" => told.lock().unwrap().clone(),
                "HELLO" => "-ERR unknown command 'HELLO'".to_owned(),
                _ => "+OK".to_owned(),
            };
            Some(answer)
        });
        Self {
            server: server.await,
            says,
        }
    }

    fn says(&self, master: &RedisServer, epoch: u64, flags: &str) {
        let port = master.port().to_string();
        let epoch = epoch.to_string();
        let fields = [
            "ip",
            "127.0.0.1",
            "port",
            &port,
            "flags",
            flags,
            "config-epoch",
            &epoch,
        ];
        let words = fields.map(|word| format!("\r\n${}\r\n{word}", word.len()));
        *self.says.lock().unwrap() = format!("*{}{}", words.len(), words.concat());
    }
}

/// Two servers, of which the second follows the first.
async fn pair() -> [RedisServer; 2] {
    let settings = ["--repl-diskless-sync-delay", "0"].map(str::to_owned);
    let options = ServerOptions {
        settings: settings.to_vec(),
        ..ServerOptions::default()
    };
    let master = RedisServer::start_with(options.clone()).await;
    let replica = RedisServer::start_with(options).await;
    follow(&replica, &master).await;
    [master, replica]
}

async fn follow(replica: &RedisServer, master: &RedisServer) {
    let replicate = format!("REPLICAOF 127.0.0.1 {}", master.port());
    let () = replica.run(&replicate).await;
    eventually("it follows", LIMIT, async || {
        let link = replica.info("master_link_status").await;
        let offsets = [replica, master].map(|server| server.info("master_repl_offset"));
        let [one, other] = offsets;
        link.as_deref() == Some("up") && one.await == other.await
    })
    .await;
}

#[tokio::test]
async fn the_sentinel_that_knows_of_the_latest_failover_counts() {
    let [old, new] = [RedisServer::start().await, RedisServer::start().await];
    let sentinels = [
        FakeSentinel::start().await,
        FakeSentinel::start().await,
        FakeSentinel::start().await,
    ];
    // At first only the one knows that has done it.
    sentinels[0].says(&old, 3, "master");
    sentinels[1].says(&old, 3, "master");
    sentinels[2].says(&new, 4, "master");
    for _ in 0..20 {
        let urls = sentinels.iter().map(|sentinel| sentinel.server.url());
        let storage = RedisStorage::sentinel("any", urls).connect().await.unwrap();
        let _guard = lock(&LockFactory::new(storage), "k", LONG).await;
        assert_eq!((old.keys().await, new.keys().await), (0, 1));
        let () = new.run("FLUSHALL").await;
    }
}

#[tokio::test]
async fn a_server_that_is_no_master_or_is_down_is_not_used() {
    let [master, replica] = pair().await;
    let sentinel = FakeSentinel::start().await;
    let connect = || RedisStorage::sentinel("any", [sentinel.server.url()]).connect();
    for (server, flags) in [(&replica, "master"), (&master, "s_down,o_down,master")] {
        sentinel.says(server, 1, flags);
        let error = within(LIMIT, "the error", connect()).await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{flags}");
    }
    // One Sentinel alone may be wrong about that.
    sentinel.says(&master, 1, "s_down,master");
    connect().await.unwrap();
}

#[tokio::test]
async fn the_servers_may_have_another_password_than_the_sentinels() {
    let server = RedisServer::start_with(ServerOptions {
        password: Some("of-the-server"),
        ..ServerOptions::default()
    });
    let server = server.await;
    let sentinel = FakeSentinel::start().await;
    sentinel.says(&server, 1, "master");
    let url = sentinel.server.url_with_password("of-the-sentinel");
    let storage = || RedisStorage::sentinel("any", [url.as_str()]);
    let error = storage().connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized);
    let storage = storage().username("default").password("of-the-server");
    assert!(!format!("{storage:?}").contains("of-the"), "{storage:?}");
    let storage = storage.connect().await.unwrap();
    assert!(!format!("{storage:?}").contains("of-the"), "{storage:?}");
    token(&LockFactory::new(storage), "k").await;
}

// --- a master that becomes a replica ------------------------------------------------------------------------------

#[tokio::test]
async fn a_write_to_a_demoted_master_moves_the_connection() {
    let [old, new] = pair().await;
    let sentinel = FakeSentinel::start().await;
    sentinel.says(&old, 1, "master");
    let storage = RedisStorage::sentinel("any", [sentinel.server.url()]).connect();
    let factory = LockFactory::new(storage.await.unwrap());
    let guard = lock(&factory, "k", LONG).await;

    // By hand: nobody closes the connection.
    follow(&new, &old).await;
    let () = new.run("REPLICAOF NO ONE").await;
    follow(&old, &new).await;
    sentinel.says(&new, 2, "master");
    assert!(guard.fencing_token().unwrap() < token(&factory, "other").await);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&new).await;
    let () = new.run("CONFIG RESETSTAT").await;

    // Wake-ups come from there, too.
    let listens = async |server: &RedisServer| {
        let inboxes: Vec<String> = server.run("PUBSUB CHANNELS *:inbox:*").await;
        inboxes.len()
    };
    eventually("it listens there", LIMIT, async || {
        listens(&new).await == 1 && listens(&old).await == 0
    })
    .await;
    let second = LockFactory::new(
        RedisStorage::sentinel("any", [sentinel.server.url()])
            .connect_lazily()
            .unwrap(),
    );
    let guard = lock(&second, "k", LONG).await;
    let waiting = factory.create_lock("k").unwrap();
    // Asks once, and then for a minute not again.
    let once = LockOptions::builder().interval(Duration::from_secs(60));
    let waiting = tokio::spawn(waiting.lock(once.build().unwrap()));
    is_queued(&new, "k", 1).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&new).await;
}

/// A storage that can be looked at beside its factory, and does not hear of failovers.
struct Watched(Arc<RedisStorage>);

impl LockStorage for Watched {
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

/// Whoever has stood still reads what the old master said before it was replaced.
#[tokio::test]
async fn a_grant_that_is_read_when_its_connection_is_lost_is_asked_for_at_the_new_master() {
    for has_reconnected in [false, true] {
        let [old, new] = [RedisServer::start().await, RedisServer::start().await];
        let sentinel = FakeSentinel::start().await;
        sentinel.says(&old, 1, "master");
        let storage = RedisStorage::sentinel("any", [sentinel.server.url()]).connect();
        let storage = Arc::new(storage.await.unwrap());
        let factory = LockFactory::new(Watched(Arc::clone(&storage)));
        let mut asking = pin!(factory.create_lock("k").unwrap().lock(options(LONG)));
        assert!(poll!(&mut asking).is_pending());
        eventually("it is granted", LIMIT, async || old.keys().await == 1).await;

        sentinel.says(&new, 2, "master");
        let _: u64 = old.run("CLIENT KILL TYPE normal SKIPME yes").await;
        eventually("the connection is lost", LIMIT, async || {
            format!("{storage:?}").contains("connected: false")
        })
        .await;
        if has_reconnected {
            token(&factory, "other").await;
        }
        let guard = within(LIMIT, "the lock", asking).await.unwrap();
        assert_eq!(new.keys().await, 1, "reconnected: {has_reconnected}");
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        no_key_is_left(&new).await;
    }
}

#[tokio::test]
async fn a_master_that_is_replaced_while_it_is_alive_is_left() {
    let redis = Sentinel::start().await;
    let [old, new] = &redis.servers[..] else {
        unreachable!("there are two");
    };
    let (first, second) = (factory(&redis), factory(&redis));
    token(&second, "k").await;
    let guard = lock(&first, "k", LONG).await;
    redis.are_in_step().await;
    // Sentinel cannot make it a replica, and it goes on as a master.
    let () = old.run("ACL SETUSER default -replicaof -slaveof").await;
    let failover = format!("SENTINEL FAILOVER {}", Sentinel::SERVICE);
    let () = redis.sentinels[0].run(&failover).await;
    // Without a command of ours.
    eventually("they listen to the new master", LIMIT, async || {
        // It may close our own connection.
        let inboxes = new.try_run::<Vec<String>>("PUBSUB CHANNELS *:inbox:*");
        inboxes.await.is_ok_and(|inboxes| inboxes.len() == 2)
    })
    .await;
    assert_eq!(old.info("role").await.as_deref(), Some("master"));
    let () = new.run("CONFIG RESETSTAT").await;
    let once = LockOptions::builder().ttl(LONG).build().unwrap();
    let refused = second.create_lock("k").unwrap().try_lock(once).await;
    assert!(
        matches!(refused, Err(LockError::NotObtained(_))),
        "{refused:?}"
    );
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert!(new.calls("del").await > 0, "it was given back there");
    no_key_is_left(new).await;
}

#[tokio::test]
async fn sentinel_closes_the_connections_of_a_master_that_it_demotes() {
    let redis = Sentinel::start().await;
    // A client that does not hear of failovers.
    let direct = direct(&redis.servers[0]).await;
    token(&direct, "k").await;
    let before = connections(&redis.servers[0]).await;
    assert!(!before.is_empty());

    let failover = format!("SENTINEL FAILOVER {}", Sentinel::SERVICE);
    let () = redis.sentinels[0].run(&failover).await;
    redis.is_master(1).await;
    eventually("it follows", LIMIT, async || {
        redis.servers[0].info("role").await.as_deref() == Some("slave")
    })
    .await;
    let now = connections(&redis.servers[0]).await;
    assert!(!before.iter().any(|connection| now.contains(connection)));
}

#[tokio::test]
async fn tokens_grow_though_a_server_was_demoted_and_promoted_behind_an_idle_connection() {
    let [old, new] = pair().await;
    let idle = direct(&old).await;
    let mut last = token(&idle, "k").await;
    let before = connections(&old).await;

    let () = new.run("REPLICAOF NO ONE").await;
    // It becomes a replica, but hears nothing: what the other grants, it never knows.
    let () = new.run("ACL SETUSER default -psync -sync").await;
    let () = old
        .run(&format!("REPLICAOF 127.0.0.1 {}", new.port()))
        .await;
    let demoted = Instant::now();
    let other = direct(&new).await;
    for _ in 0..20 {
        let next = token(&other, "k").await;
        assert!(next > last);
        last = next;
    }
    // No failover takes less.
    tokio::time::sleep_until((demoted + ms(2_000)).into()).await;
    let () = old.run("REPLICAOF NO ONE").await;
    let now = connections(&old).await;
    assert!(before.iter().all(|connection| now.contains(connection)));
    assert!(token(&idle, "k").await > last);
}

// --- failover -------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_lock_that_a_replica_has_confirmed_outlives_the_master_without_a_moment_between() {
    let mut redis = Sentinel::start().await;
    let storage = RedisStorage::sentinel(Sentinel::SERVICE, redis.urls()).replicas(1, LIMIT);
    let factory = LockFactory::builder(storage.connect_lazily().unwrap());
    let factory = factory.storage_timeout(2 * LIMIT).build().unwrap();
    let guard = lock(&factory, "k", LONG).await;
    redis.servers[0].kill();
    redis.is_master(1).await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&redis.servers[1]).await;

    // There are no replicas any more.
    let storage = RedisStorage::sentinel(Sentinel::SERVICE, redis.urls()).replicas(1, ms(50));
    let alone = LockFactory::new(storage.connect().await.unwrap());
    let once = LockOptions::builder().ttl(LONG).build().unwrap();
    let refused = alone.create_lock("k").unwrap().try_lock(once).await;
    assert!(
        matches!(&refused, Err(LockError::Storage(error)) if error.kind() == StorageErrorKind::Unavailable),
        "{refused:?}"
    );
    no_key_is_left(&redis.servers[1]).await;
}

#[tokio::test]
async fn a_lock_that_the_replica_knows_outlives_the_master_and_its_waiters_are_served() {
    let mut redis = Sentinel::start().await;
    let (first, second) = (factory(&redis), factory(&redis));
    let guard = lock(&first, "k", LONG).await;
    let waiting = tokio::spawn(second.create_lock("k").unwrap().lock(options(LONG)));
    is_queued(&redis.servers[0], "k", 1).await;
    redis.are_in_step().await;
    redis.servers[0].kill();
    let killed = Instant::now();

    // Somebody is served by the new master.
    let other = lock(&first, "other", LONG).await;
    println!("first grant {:?} after the kill", killed.elapsed());
    redis.is_master(1).await;
    assert!(guard.is_held());
    assert!(!waiting.is_finished(), "two would be in");
    let (held, other_token) = (guard.fencing_token(), other.fencing_token());
    assert!(held < other_token);
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    assert!(next.fencing_token() > other_token);
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(other.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&redis.servers[1]).await;
}

#[tokio::test]
async fn a_lock_that_the_replica_does_not_know_is_lost_and_its_holder_told() {
    let mut redis = Sentinel::start().await;
    let (first, second) = (factory(&redis), factory(&redis));
    let before = token(&second, "k").await;
    redis.are_in_step().await;
    // The replica is cut off, and the lock is taken.
    let () = redis.servers[0]
        .run("ACL SETUSER default -psync -sync")
        .await;
    let _: u64 = redis.servers[0].run("CLIENT KILL TYPE replica").await;
    let guard = lock(&first, "k", TTL).await;
    let waiting = tokio::spawn(second.create_lock("k").unwrap().lock(options(TTL)));
    is_queued(&redis.servers[0], "k", 1).await;
    redis.servers[0].kill();
    let killed = Instant::now();

    let next = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    println!("first grant {:?} after the kill", killed.elapsed());
    let granted = Instant::now();
    // It may have expired before that; else the next renewal tells.
    let reason = within(LIMIT, "the holder is told", guard.lost()).await;
    assert!(matches!(reason, LossReason::NotOurs | LossReason::Expired));
    assert!(
        granted.elapsed() < TTL / 3 + ms(1_000),
        "{:?}",
        granted.elapsed()
    );
    assert!(before < guard.fencing_token().unwrap());
    assert!(guard.fencing_token() < next.fencing_token());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Lost);
    assert!(next.is_held(), "a late unlock has not touched it");
    assert_eq!(next.unlock().await.unwrap(), Unlocked::Held);
    no_key_is_left(&redis.servers[1]).await;
}

#[tokio::test]
async fn no_failover_under_load_gives_a_lock_twice_without_a_word() {
    let mut redis = Sentinel::start_guarded().await;
    let factories = [factory(&redis), factory(&redis)];
    let load = Load::start(factories, &["a", "b"], options(TTL));
    load.goes_on().await;

    // A failover in good order.
    let failover = format!("SENTINEL FAILOVER {}", Sentinel::SERVICE);
    let () = redis.sentinels[0].run(&failover).await;
    redis.is_master(1).await;
    load.goes_on().await;
    redis.follow().await;

    // One that stands still, and comes back when there is another.
    redis.servers[1].pause();
    redis.is_master(0).await;
    load.goes_on().await;
    redis.servers[1].resume();
    load.goes_on().await;
    redis.follow().await;

    // One that is gone.
    redis.servers[0].kill();
    redis.is_master(1).await;
    load.goes_on().await;

    load.ends().await;
    no_key_is_left(&redis.servers[1]).await;
}

/// Of the kit: else the Sentinels of one test would meet the servers of another.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_port_is_its_servers_also_while_that_is_down() {
    let mut server = RedisServer::start().await;
    let port = server.port();
    let is_free = || std::net::TcpListener::bind(("127.0.0.2", port)).is_ok();
    server.kill();
    assert!(!is_free());
}
