//! The promises of the lock between processes: what no test inside one process can show.
//!
//! This binary has no test harness of its own kind: called with the first argument `replica` it is
//! one replica of a service, which the tests start, watch, stop and kill.

// A test says what it expects by panicking, and has no users who read its documentation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

mod kit;

use std::{
    collections::HashMap,
    env,
    future::Future,
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use tokio::task::JoinSet;
use tower_distributed_lock::{
    LockFactory, LockOptions, Unlocked, error::LockError, storage::RedisStorage,
};

use self::kit::{LIMIT, RedisServer, eventually, ms, signal, within};

fn main() {
    let mut arguments = env::args().skip(1);
    if arguments.next().as_deref() == Some("replica") {
        let arguments: Vec<String> = arguments.collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match arguments[..] {
            ["increment", url, name, times] => {
                run(increment(url, name, times.parse().unwrap()));
            }
            ["hold", url, ttl] => run(hold(url, ms(ttl.parse().unwrap()))),
            _ => panic!("a replica that does not know what to do: {arguments:?}"),
        }
        return;
    }
    let trials = vec![
        Trial::test("no_update_is_lost_between_processes", || {
            run(no_update_is_lost_between_processes());
            Ok(())
        }),
        Trial::test(
            "a_killed_process_blocks_its_key_for_its_ttl_and_not_longer",
            || {
                run(a_killed_process_blocks_its_key_for_its_ttl_and_not_longer());
                Ok(())
            },
        ),
        Trial::test(
            "a_process_that_stood_still_knows_that_it_has_lost_its_lock",
            || {
                run(a_process_that_stood_still_knows_that_it_has_lost_its_lock());
                Ok(())
            },
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

async fn factory(url: &str) -> LockFactory {
    let builder = RedisStorage::builder(url).connect_timeout(LIMIT);
    LockFactory::new(builder.connect().await.unwrap())
}

fn options(ttl: Duration) -> LockOptions {
    LockOptions::builder()
        .ttl(ttl)
        .interval(ms(10))
        .retries(6_000)
        .build()
        .unwrap()
}

// --- a replica ------------------------------------------------------------------------------------------------------

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

const TASKS: u64 = 4;

/// Adds 1 to the key `counter`, `times` times in each of some tasks, by reading it and writing it
/// back. Nothing but the lock keeps others from doing the same in between.
async fn increment(url: &str, name: &str, times: usize) {
    let lock = factory(url).await.create_lock("counter").unwrap();
    let client = redis::Client::open(url).unwrap();
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(LIMIT));
    let connection = client
        .get_multiplexed_async_connection_with_config(&config)
        .await
        .unwrap();
    say("ready");
    // Until then everybody waits here, so that all begin together.
    io::stdin().lock().read_line(&mut String::new()).unwrap();

    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (lock, mut redis) = (lock.clone(), connection.clone());
        let name = format!("{name}{task}");
        tasks.spawn(async move {
            for turn in 0..times {
                // Other work, so that the processes take turns.
                tokio::time::sleep(ms((turn as u64 * 7 + task) % 5)).await;
                let guard = lock.lock(options(LIMIT)).await.unwrap();
                // The server keeps the diary, so its order is the true one, whatever the clocks
                // say.
                let (_, seen): ((), Option<u64>) = redis::pipe()
                    .rpush("diary", format!("{name} enters"))
                    .get("counter")
                    .query_async(&mut redis)
                    .await
                    .unwrap();
                let () = redis::pipe()
                    .set("counter", seen.unwrap_or(0) + 1)
                    .rpush("diary", format!("{name} leaves"))
                    .query_async(&mut redis)
                    .await
                    .unwrap();
                assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            }
        });
    }
    tasks.join_all().await;
    say("done");
}

/// Takes the lock `k` and keeps it for as long as it can.
async fn hold(url: &str, ttl: Duration) {
    let lock = factory(url).await.create_lock("k").unwrap();
    let guard = lock.lock(options(ttl)).await.unwrap();
    say("held");
    let reason = guard.lost().await;
    say(&format!("lost: {reason:?}, held: {}", guard.is_held()));
    say(&format!("{:?}", guard.unlock().await.unwrap()));
    // The process goes on, like a service does, until it is killed.
    std::future::pending().await
}

/// The process of a replica. It ends with this value.
struct Replica {
    process: Child,
    lines: Receiver<String>,
}

impl Replica {
    fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(env::current_exe().unwrap())
            .arg("replica")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        // Ends with the process, or when nobody listens any more.
        std::thread::spawn(move || {
            out.lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self { process, lines }
    }

    /// The next line that it says.
    async fn says(&self) -> String {
        within(3 * LIMIT, "a replica's word", async {
            loop {
                match self.lines.try_recv() {
                    Ok(line) => return line,
                    Err(std::sync::mpsc::TryRecvError::Empty) => tokio::time::sleep(ms(1)).await,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                        panic!("a replica ended without a word")
                    }
                }
            }
        })
        .await
    }

    fn go(&mut self) {
        writeln!(self.process.stdin.as_mut().unwrap(), "go").unwrap();
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // The test has its result; a process that has ended by itself does not change it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// --- the tests ------------------------------------------------------------------------------------------------------

async fn no_update_is_lost_between_processes() {
    const TIMES: usize = 50;
    let names = ["a", "b", "c"];
    let server = RedisServer::start().await;
    let mut replicas =
        names.map(|name| Replica::start(&["increment", &server.url(), name, &TIMES.to_string()]));
    for replica in &replicas {
        assert_eq!(replica.says().await, "ready");
    }
    replicas.iter_mut().for_each(Replica::go);
    for replica in &replicas {
        assert_eq!(replica.says().await, "done");
    }

    let diary: Vec<String> = server.run("LRANGE diary 0 -1").await;
    let mut entries: HashMap<&str, usize> = HashMap::new();
    let mut changes = 0;
    let mut last = "";
    for stay in diary.chunks(2) {
        let who = stay[0].strip_suffix(" enters").expect("nobody else is in");
        assert_eq!(
            stay[1],
            format!("{who} leaves"),
            "two holders at the same time"
        );
        *entries.entry(who).or_default() += 1;
        let process = &who[..1];
        changes += usize::from(process != last);
        last = process;
    }
    assert_eq!(entries.len(), names.len() * TASKS as usize);
    assert!(entries.values().all(|&times| times == TIMES), "{entries:?}");
    // Else they ran one after the other, and the test has shown nothing.
    assert!(changes > names.len(), "{changes}");

    let counter: usize = server.run("GET counter").await;
    assert_eq!(
        counter,
        names.len() * TASKS as usize * TIMES,
        "updates were lost"
    );
    let _: u64 = server.run("DEL counter diary").await;
    assert_eq!(server.keys().await, 0);
}

async fn a_killed_process_blocks_its_key_for_its_ttl_and_not_longer() {
    let server = RedisServer::start().await;
    let lock = factory(&server.url()).await.create_lock("k").unwrap();
    let ttl = ms(1500);
    let mut replica = Replica::start(&["hold", &server.url(), "1500"]);
    assert_eq!(replica.says().await, "held");

    // As long as it lives, it keeps its lock, for longer than the ttl.
    let () = server.run("CONFIG RESETSTAT").await;
    eventually("it renews its lock", LIMIT, async || {
        server.calls("pexpire").await >= 4
    })
    .await;
    let refused = lock.try_lock(options(ttl)).await;
    assert!(
        matches!(refused, Err(LockError::NotObtained(_))),
        "{refused:?}"
    );

    let waiting = tokio::spawn(lock.lock(options(ttl)));
    replica.kill();
    let killed = Instant::now();
    let left: u64 = server.run("PTTL distributed-locks:k").await;
    let guard = within(LIMIT, "our turn", waiting).await.unwrap().unwrap();
    let after = killed.elapsed();
    // Nobody knows that it is dead before its time is over.
    assert!(after + ms(2) >= ms(left), "{after:?} of {left} ms");
    assert!(after < ttl + ms(1500), "{after:?}");
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}

async fn a_process_that_stood_still_knows_that_it_has_lost_its_lock() {
    let server = RedisServer::start().await;
    let lock = factory(&server.url()).await.create_lock("k").unwrap();
    let replica = Replica::start(&["hold", &server.url(), "1000"]);
    assert_eq!(replica.says().await, "held");

    signal("STOP", &replica.process);
    let guard = within(LIMIT, "our turn", lock.lock(options(LIMIT)))
        .await
        .unwrap();
    let owner: String = server.run("GET distributed-locks:k").await;
    let () = server.run("CONFIG RESETSTAT").await;
    signal("CONT", &replica.process);
    // By its own clock, before it has heard anything from the server.
    assert_eq!(replica.says().await, "lost: Expired, held: false");
    assert_eq!(replica.says().await, "Lost");

    // It gives back what it may still have. (Its first script, so the server did not know the
    // text.)
    eventually("it releases", LIMIT, async || {
        server.calls("eval").await > 0
    })
    .await;
    let still: Option<String> = server.run("GET distributed-locks:k").await;
    assert_eq!(
        still,
        Some(owner),
        "what it did late has not touched our lock"
    );
    assert!(guard.is_held());
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
}
