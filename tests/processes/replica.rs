//! One replica of a service: what its process does, and a test's hold on that process.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, TryRecvError, channel},
    time::Duration,
};

use tokio::{io::AsyncBufReadExt, task::JoinSet};
use tower_distributed_lock::Unlocked;

use super::{
    diary::Diary,
    factory,
    kit::{LIMIT, ms, signal, within},
    options, run,
};

// --- inside the process ---------------------------------------------------------------------------------------------

/// The program of a replica's process.
pub fn main(arguments: &[&str]) {
    let number = |text: &str| text.parse().unwrap();
    match *arguments {
        ["increment", url, name, times] => run(increment(url, name, number(times))),
        ["hold", url, ttl] => run(hold(url, ms(number(ttl)))),
        ["wait", url, name, ttl, interval] => {
            run(wait(url, name, ms(number(ttl)), ms(number(interval))));
        }
        ["contend", url, name, tasks, stays] => {
            run(contend(url, name, number(tasks), number(stays) as usize));
        }
        _ => panic!("a replica that does not know what to do: {arguments:?}"),
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

type Orders = tokio::io::Lines<tokio::io::BufReader<tokio::io::Stdin>>;

fn orders() -> Orders {
    tokio::io::BufReader::new(tokio::io::stdin()).lines()
}

/// Waits to be told to go on.
async fn told(orders: &mut Orders) {
    let order = orders.next_line().await.unwrap();
    // Without a test there is nothing to do.
    assert_eq!(order.as_deref(), Some("go"));
}

pub const TASKS: u64 = 4;

/// Adds 1 to the key `counter`, `times` times in each of some tasks, by reading it and writing it
/// back. Nothing but the lock keeps others from doing the same in between.
async fn increment(url: &str, name: &str, times: u64) {
    let lock = factory(url).await.create_lock("counter").unwrap();
    let diary = Diary::open(url, "counter").await;
    say("ready");
    // Until then everybody waits here, so that all begin together.
    told(&mut orders()).await;

    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (lock, mut diary) = (lock.clone(), diary.clone());
        let name = format!("{name}{task}");
        tasks.spawn(async move {
            for turn in 0..times {
                // Other work, so that the processes take turns.
                tokio::time::sleep(ms((turn * 7 + task) % 5)).await;
                let guard = lock.lock(options(LIMIT, ms(10))).await.unwrap();
                diary.enter(&name).await;
                let get = redis::cmd("GET").arg("counter").to_owned();
                let seen: Option<u64> = get.query_async(diary.connection()).await.unwrap();
                let mut set = redis::cmd("SET");
                set.arg("counter").arg(seen.unwrap_or(0) + 1);
                let () = set.query_async(diary.connection()).await.unwrap();
                diary.leave(&name).await;
                assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
            }
        });
    }
    tasks.join_all().await;
    say("done");
}

/// Takes the lock `k` and keeps it for as long as it can.
async fn hold(url: &str, ttl: Duration) {
    let factory = factory(url).await;
    let lock = factory.create_lock("k").unwrap();
    let guard = lock.lock(options(ttl, ms(10))).await.unwrap();
    say("held");
    let reason = guard.lost().await;
    say(&format!("lost: {reason:?}, held: {}", guard.is_held()));
    say(&format!("{:?}", guard.unlock().await.unwrap()));
    // Until the server has answered all that was sent to it.
    say(&format!("keys left: {}", factory.drain(LIMIT).await));
    // The process goes on, like a service does, until it is killed.
    std::future::pending().await
}

/// Each time it is told to, it waits for the lock `k`, and keeps it until it is told to go on.
async fn wait(url: &str, name: &str, ttl: Duration, interval: Duration) {
    let lock = factory(url).await.create_lock("k").unwrap();
    let mut diary = Diary::open(url, "k").await;
    let mut orders = orders();
    say("ready");
    loop {
        told(&mut orders).await;
        let guard = lock.lock(options(ttl, interval)).await.unwrap();
        diary.enter(name).await;
        told(&mut orders).await;
        diary.leave(name).await;
        say(&format!("{:?}", guard.unlock().await.unwrap()));
    }
}

/// Takes the lock `k` again and again, in each of some tasks, until the diary has so many stays.
async fn contend(url: &str, name: &str, tasks: u64, stays: usize) {
    let lock = factory(url).await.create_lock("k").unwrap();
    let diary = Diary::open(url, "k").await;
    say("ready");
    told(&mut orders()).await;

    let mut working = JoinSet::new();
    for _ in 0..tasks {
        let (lock, mut diary, name) = (lock.clone(), diary.clone(), name.to_owned());
        working.spawn(async move {
            loop {
                // Nothing but wake-ups brings it the lock in time.
                let guard = lock.lock(options(5 * LIMIT, 3 * LIMIT)).await.unwrap();
                let stay = diary.enter(&name).await;
                // What the lock is there for.
                tokio::time::sleep(ms(1)).await;
                diary.leave(&name).await;
                assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
                if stay >= stays {
                    return;
                }
            }
        });
    }
    working.join_all().await;
    say("done");
}

// --- outside --------------------------------------------------------------------------------------------------------

/// The process of a replica. It ends with this value.
pub struct Replica {
    process: Child,
    lines: Receiver<String>,
}

impl Replica {
    pub fn start(arguments: &[&str]) -> Self {
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
    pub async fn says(&self) -> String {
        within(3 * LIMIT, "a replica's word", async {
            loop {
                match self.lines.try_recv() {
                    Ok(line) => return line,
                    Err(TryRecvError::Empty) => tokio::time::sleep(ms(1)).await,
                    Err(TryRecvError::Disconnected) => panic!("a replica ended without a word"),
                }
            }
        })
        .await
    }

    pub fn go(&mut self) {
        writeln!(self.process.stdin.as_mut().unwrap(), "go").unwrap();
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Ends it at once (SIGKILL). Returns when it has ended.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Stops it where it stands (SIGSTOP): its connections stay open.
    pub fn stop(&self) {
        signal("STOP", &self.process);
    }

    /// Lets it go on. It reads what it was sent meanwhile.
    pub fn resume(&self) {
        signal("CONT", &self.process);
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // The test has its result; a process that has ended by itself does not change it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
