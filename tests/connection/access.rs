//! Users, passwords and sockets.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use futures_util::future::join_all;
use redis::Value;
use tower_distributed_lock::{
    LockFactory, Unlocked,
    error::{LockError, StorageErrorKind},
};

use super::{
    LONG, builder, factory,
    kit::{LIMIT, RedisServer, eventually, ms, within},
    no_key_is_left, options, patient,
    probe::Log,
    storage_error, texts, the_lock_goes_round,
};

const POLL: &str = "waiters poll";

/// The line that the documentation of `storage::redis` shows.
const DOCUMENTED: &str = include_str!("../../src/storage/redis/acl.txt");

fn commands() -> Vec<&'static str> {
    let words = DOCUMENTED.split_ascii_whitespace();
    words.filter_map(|word| word.strip_prefix('+')).collect()
}

/// Makes a user as the documentation has it, but for its name and some commands; the URL by which
/// it logs in.
async fn user(server: &RedisServer, name: &str, without: &[&str]) -> String {
    let rules = DOCUMENTED.trim().replace(" locks ", &format!(" {name} "));
    let mut rules = rules.replace(">password", ">its-secret");
    for command in without {
        assert!(commands().contains(command));
        rules += &format!(" -{command}");
    }
    let () = server.run(&rules).await;
    server
        .url()
        .replace("redis://", &format!("redis://{name}:its-secret@"))
}

/// What was refused to each user.
async fn refused(server: &RedisServer) -> BTreeMap<String, BTreeSet<String>> {
    let log: Vec<BTreeMap<String, Value>> = server.run("ACL LOG 10000").await;
    let mut refused = BTreeMap::<_, BTreeSet<_>>::new();
    for entry in log {
        let field = |name| redis::from_redis_value::<String>(entry[name].clone()).unwrap();
        let (user, what) = (field("username"), field("object"));
        refused.entry(user).or_default().insert(what);
    }
    refused
}

/// All that can happen to a lock, whatever is refused meanwhile.
async fn a_locks_whole_life(url: &str, key: &str) {
    // The probe is refused what it asks for, as it may be.
    let connect = || builder(url).probe(false).connect_lazily().unwrap();
    let factories = [(); 3].map(|()| LockFactory::new(connect()));
    let [first, second, third] = &factories.each_ref().map(|it| it.create_lock(key).unwrap());
    let short = options(ms(400), ms(600));
    // By script, and then by plain commands.
    for _ in 0..2 {
        if let Ok(guard) = first.lock(short).await {
            let _ = guard.unlock().await;
        }
    }
    let guard = first.lock(short).await;
    let waits = tokio::spawn(second.lock(options(ms(400), ms(900))));
    let _ = third.lock(options(ms(400), ms(300))).await;
    let _ = factories[0].inspector().locks(10).await;
    // Renewed meanwhile.
    tokio::time::sleep(ms(250)).await;
    if let Ok(guard) = guard {
        let _ = guard.unlock().await;
    }
    drop(waits.await.unwrap());
    // From time to time it is made sure that messages can still arrive.
    tokio::time::sleep(ms(2_200)).await;
}

#[tokio::test]
async fn the_documented_user_may_do_all_that_is_needed_and_nothing_else() {
    let server = RedisServer::start().await;
    let () = server.run("CONFIG SET acllog-max-len 10000").await;
    let everything = user(&server, "everything", &[]).await;
    let lives = commands().into_iter().map(async |command| {
        let name = format!("not-{command}");
        let url = user(&server, &name, &[command]).await;
        // Some of what happens in a life is a matter of moments.
        let started = Instant::now();
        while !refused(&server).await.contains_key(&name) {
            assert!(started.elapsed() < 2 * LIMIT, "{command} is not used");
            a_locks_whole_life(&url, command).await;
        }
    });
    tokio::join!(
        a_locks_whole_life(&everything, "everything"),
        join_all(lives)
    );
    let refused = refused(&server).await;
    for command in commands() {
        let only = BTreeSet::from([command.to_owned()]);
        assert_eq!(refused.get(&format!("not-{command}")), Some(&only));
    }
    assert_eq!(refused.get("everything"), None);
    // Whatever was refused: in the end the ttl frees it.
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn the_documented_user_has_the_lock_go_round() {
    let server = RedisServer::start().await;
    let url = user(&server, "locks", &[]).await;
    let (first, second) = (factory(builder(&url)).await, factory(builder(&url)).await);
    the_lock_goes_round([&first, &second]).await;
    no_key_is_left(&server).await;
}

#[tokio::test]
async fn what_is_not_permitted_is_told_at_once_and_leaves_no_lock() {
    let server = RedisServer::start().await;
    let mut told = BTreeSet::new();
    for command in commands() {
        // On a new connection, and on one over which all went well before.
        for learned in [false, true] {
            let url = user(
                &server,
                command,
                if learned {
                    &[]
                } else {
                    std::slice::from_ref(&command)
                },
            )
            .await;
            let factory = LockFactory::new(builder(&url).connect_lazily().unwrap());
            let lock = factory.create_lock("k").unwrap();
            if learned {
                assert_eq!(
                    lock.lock(patient()).await.unwrap().unlock().await.unwrap(),
                    Unlocked::Held
                );
                user(&server, command, &[command]).await;
            }
            match within(LIMIT / 2, "an answer", lock.lock(options(LONG, LIMIT))).await {
                Ok(_guard) => {}
                Err(LockError::Storage(error)) => {
                    assert_eq!(
                        error.kind(),
                        StorageErrorKind::Unauthorized,
                        "{command}: {error}"
                    );
                    assert!(!texts(&error).contains("its-secret"));
                    // Taken while it may still be read, it cannot be given back afterwards.
                    if (command, learned) != ("get", true) {
                        let locks: Vec<String> = server.run("KEYS distributed-locks:*").await;
                        assert!(locks.is_empty(), "{command}, {learned}: {locks:?}");
                    }
                    told.insert(command);
                }
                Err(other) => panic!("{command}: {other}"),
            }
            assert_eq!(factory.drain(LIMIT).await, 0);
            // Without `del` a lock stays, for its ttl.
            let _: Value = server.run("DEL distributed-locks:k").await;
        }
    }
    // Without these there is no lock to be had; the others are for its end, or for those who wait.
    let needed = ["set", "get", "incrby", "time", "eval"];
    assert_eq!(told, BTreeSet::from(needed));
}

#[tokio::test]
async fn a_waiter_that_is_not_permitted_something_leaves_no_queue_for_good() {
    let server = RedisServer::start().await;
    for command in commands() {
        let () = server.run("SET distributed-locks:k theirs PX 300000").await;
        let url = user(&server, command, &[command]).await;
        let factory = LockFactory::new(builder(&url).connect_lazily().unwrap());
        let lock = factory.create_lock("k").unwrap();
        // The first begins to listen; then there is a queue to stand in.
        let mut listens = false;
        for _ in 0..100 {
            let _ = lock.lock(options(LONG, ms(40))).await;
            let inboxes = "PUBSUB CHANNELS distributed-locks:inbox:*";
            if listens || ["subscribe", "ping"].contains(&command) {
                break;
            }
            listens = !server.run::<Vec<String>>(inboxes).await.is_empty();
        }
        drop((lock, factory));
        let left: i64 = server.run("PTTL {distributed-locks:k}:queue").await;
        assert_ne!(left, -1, "{command}: it has no end");
        let () = server.run("FLUSHALL").await;
    }
}

#[tokio::test]
async fn who_may_not_listen_is_told_once_that_waiters_poll() {
    let server = RedisServer::start().await;
    let (log, _logging) = Log::start();
    let url = user(&server, "locks", &["subscribe"]).await;
    let factory = factory(builder(&url)).await;
    drop(factory.create_lock("k").unwrap().lock(patient()).await);
    for attempt in 1..=3 {
        eventually("it is refused", LIMIT, async || {
            let refused = server.info("cmdstat_subscribe").await.unwrap_or_default();
            refused.contains(&format!("rejected_calls={attempt},"))
        })
        .await;
        eventually("it is told", LIMIT, async || log.lines("WARN", POLL) > 0).await;
        no_key_is_left(&server).await;
        assert_eq!(log.lines("WARN", POLL), 1, "attempt {attempt}");
        // It tries again after 30 s.
        tokio::time::pause();
        tokio::time::advance(ms(31_000)).await;
        tokio::time::resume();
    }
}

#[tokio::test]
async fn another_channel_or_key_is_not_permitted_either() {
    let server = RedisServer::start().await;
    let url = user(&server, "locks", &[]).await;
    let other = LockFactory::builder(builder(&url).connect().await.unwrap()).key_prefix("others");
    let lock = other.build().unwrap().create_lock("k").unwrap();
    let error = storage_error(lock.lock(patient()).await);
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
    assert_eq!(server.keys().await, 0);
}

#[tokio::test]
async fn a_user_that_is_locked_out_meanwhile_is_told_and_comes_back() {
    let server = RedisServer::start().await;
    let url = user(&server, "locks", &[]).await;
    let factory = factory(builder(&url)).await;
    let lock = factory.create_lock("k").unwrap();
    drop(lock.lock(patient()).await.unwrap());
    no_key_is_left(&server).await;
    // Its connections are closed with it.
    let () = server.run("ACL DELUSER locks").await;
    eventually("it is told", LIMIT, async || {
        let error = storage_error(lock.try_lock(patient()).await);
        // The first may have been on its way on the old connection.
        error.kind() == StorageErrorKind::Unauthorized
    })
    .await;
    assert_eq!(server.keys().await, 0);
    user(&server, "locks", &[]).await;
    let guard = lock.lock(patient()).await.unwrap();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}

#[tokio::test]
async fn a_user_and_a_password_need_not_be_in_the_url() {
    let server = RedisServer::start().await;
    user(&server, "locks", &[]).await;
    let () = server
        .run("ACL SETUSER locks resetpass >a#b/c?d@e%f:g")
        .await;
    let (url, password) = (server.url(), "a#b/c?d@e%f:g");
    let storage = builder(&url).username("locks").password(password);
    assert!(!format!("{storage:?}").contains(password));
    let first = factory(storage).await;
    // Nothing of the URL's is left beside them.
    let wrong = url.replace("//", "//somebody:something@");
    let second = factory(builder(wrong).username("locks").password(password)).await;
    the_lock_goes_round([&first, &second]).await;

    let error = builder(&url).username("locks").connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    let wrong = builder(&url).username("locks").password("guessed");
    let error = wrong.connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized, "{error}");
    assert!(!texts(&error).contains("guessed"));
}

#[cfg(unix)]
#[tokio::test]
async fn a_lock_lives_its_whole_life_through_a_socket() {
    let server = RedisServer::start().await;
    user(&server, "locks", &[]).await;
    let () = server.run("ACL SETUSER locks +select").await;
    let socket = server.socket();
    let socket = socket.display();
    let urls = [
        format!("redis+unix://{socket}?db=3&user=locks&pass=its-secret"),
        format!("unix://{socket}?db=3"),
    ];
    let [first, second] = &urls;
    let (first, second) = (
        factory(builder(first)).await,
        factory(builder(second)).await,
    );
    the_lock_goes_round([&first, &second]).await;
    // The one key that stays: it is in the database that was asked for.
    let keyspace: String = server.run("INFO keyspace").await;
    assert!(
        keyspace.contains("db3:keys=1") && !keyspace.contains("db0"),
        "{keyspace}"
    );

    let nobody = builder("unix:///nowhere/at/all")
        .connect()
        .await
        .unwrap_err();
    assert_eq!(nobody.kind(), StorageErrorKind::Unavailable, "{nobody}");
}
