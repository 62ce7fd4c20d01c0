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

mod diary;
#[path = "../kit/mod.rs"]
mod kit;
mod replica;

use std::{
    collections::HashMap,
    env,
    future::Future,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions, Unlocked, error::LockError, storage::RedisStorage,
};

use self::{
    diary::{Diary, Reader, queue_name},
    kit::{LIMIT, RedisServer, asking, eventually, ms, within},
    replica::{Replica, TASKS},
};

macro_rules! trials {
    ($($test:ident,)*) => {
        vec![$(Trial::test(stringify!($test), || { run($test()); Ok(()) })),*]
    };
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["replica", arguments @ ..] = &arguments[..] {
        return replica::main(arguments);
    }
    let trials = trials![
        no_update_is_lost_between_processes,
        a_killed_process_blocks_its_key_for_its_ttl_and_not_longer,
        the_first_in_the_queue_gets_the_lock_of_a_killed_process,
        killed_waiters_are_passed_over_at_once,
        processes_that_were_all_killed_leave_nothing_for_good,
        a_process_that_stood_still_knows_that_it_has_lost_its_lock,
        a_holder_that_stood_still_does_not_disturb_the_queue,
        a_first_in_the_queue_that_stands_still_delays_the_others_by_its_ttl_and_waits_its_turn,
        a_waiter_that_stands_still_delays_those_behind_it_by_its_ttl_and_waits_its_turn,
        processes_are_served_in_the_order_in_which_they_came,
        busy_processes_take_turns_and_get_fair_shares,
        processes_whose_inboxes_are_cut_again_and_again_go_on_at_once,
        a_process_that_stands_still_is_shown_not_to_answer_and_its_lock_can_be_taken,
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
    let storage = RedisStorage::builder(url).connect_timeout(LIMIT);
    let builder = LockFactory::builder(storage.connect().await.unwrap());
    // A busy machine is not a broken server.
    let label = format!("process {}", std::process::id());
    builder.storage_timeout(LIMIT).label(label).build().unwrap()
}

/// Nobody gives up within the time that a test may take.
fn options(ttl: Duration, interval: Duration) -> LockOptions {
    asking(ttl, Duration::from_secs(600), interval)
}

/// For callers who keep a lock that they have, and hardly ever ask for one: half an interval is
/// longer than anything here is waited for. Whoever gets a lock sooner was woken.
const LONG_TTL: Duration = Duration::from_secs(300);
const LONG_INTERVAL: Duration = Duration::from_secs(60);

/// What a busy machine may need for what should happen at once; far below a [`LONG_INTERVAL`].
const A_LITTLE: Duration = Duration::from_secs(5);

/// This process takes the lock `k`.
async fn hold(server: &RedisServer) -> LockGuard {
    let lock = factory(&server.url()).await.create_lock("k").unwrap();
    let locking = lock.lock(options(LONG_TTL, LONG_INTERVAL));
    within(LIMIT, "the lock", locking).await.unwrap()
}

/// A process that waits for the lock `k`, or has it until it is told to go on.
struct Waiter {
    name: &'static str,
    replica: Replica,
}

impl Waiter {
    fn start(
        server: &RedisServer,
        name: &'static str,
        (ttl, interval): (Duration, Duration),
    ) -> Self {
        let [ttl, interval] = [ttl, interval].map(|time| time.as_millis().to_string());
        let replica = Replica::start(&["wait", &server.url(), name, &ttl, &interval]);
        Self { name, replica }
    }

    async fn is_ready(&self) {
        assert_eq!(self.replica.says().await, "ready");
    }

    async fn enters(&self, diary: &mut Reader<'_>) {
        assert_eq!(diary.next().await, format!("{} enters", self.name));
    }

    async fn leaves(&mut self, diary: &mut Reader<'_>) {
        self.replica.go();
        assert_eq!(diary.next().await, format!("{} leaves", self.name));
        assert_eq!(self.replica.says().await, "Held");
    }
}

/// Processes that wait for the lock `k`, which somebody has, in this order.
async fn line<const N: usize>(server: &RedisServer, names: [&'static str; N]) -> [Waiter; N] {
    let mut line = names.map(|name| Waiter::start(server, name, (LONG_TTL, LONG_INTERVAL)));
    for waiter in &line {
        waiter.is_ready().await;
    }
    stand_in_line(server, &mut line).await;
    line
}

async fn stand_in_line(server: &RedisServer, waiters: impl IntoIterator<Item = &mut Waiter>) {
    for (before, waiter) in waiters.into_iter().enumerate() {
        waiter.replica.go();
        queued(server, before + 1).await;
    }
}

/// The queue of the lock `k`, as it is in the server.
async fn queue(server: &RedisServer) -> Vec<String> {
    let lines: Option<String> = server.run(&format!("GET {}", queue_name("k"))).await;
    let lines = lines.unwrap_or_default();
    lines.lines().map(str::to_owned).collect()
}

async fn queued(server: &RedisServer, count: usize) {
    eventually("they stand in the queue", LIMIT, async || {
        queue(server).await.len() == count
    })
    .await;
}

/// Each gets the lock, in this order, and leaves.
async fn are_served(line: impl IntoIterator<Item = &mut Waiter>, diary: &mut Reader<'_>) {
    for waiter in line {
        waiter.enters(diary).await;
        waiter.leaves(diary).await;
    }
}

async fn nothing_is_left_but_the_diary(server: &RedisServer) {
    // Nobody was in there with another, from the beginning to the end.
    diary::read(server).await;
    let _: u64 = server.run("DEL diary").await;
    assert_eq!(server.keys().await, 0);
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

    let stays = diary::read(&server).await;
    let mut entries: HashMap<&str, usize> = HashMap::new();
    let mut changes = 0;
    let mut last = "";
    for stay in &stays {
        *entries.entry(&stay.who).or_default() += 1;
        let process = &stay.who[..1];
        changes += usize::from(process != last);
        last = process;
    }
    assert_eq!(entries.len(), names.len() * TASKS as usize);
    assert!(entries.values().all(|&times| times == TIMES), "{entries:?}");
    // Else they ran one after the other, and the test has shown nothing.
    assert!(changes > names.len(), "{changes}");
    diary::assert_served_in_order(&stays);
    diary::assert_one_place_each(&stays);

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
    let refused = lock.try_lock(options(ttl, ms(10))).await;
    assert!(
        matches!(refused, Err(LockError::NotObtained(_))),
        "{refused:?}"
    );

    let waiting = tokio::spawn(lock.lock(options(ttl, ms(10))));
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

async fn the_first_in_the_queue_gets_the_lock_of_a_killed_process() {
    let server = RedisServer::start().await;
    let mut holder = Replica::start(&["hold", &server.url(), "1500"]);
    assert_eq!(holder.says().await, "held");
    let mut line = line(&server, ["b", "c", "d"]).await;
    let mut diary = Reader::of(&server);

    holder.kill();
    let killed = Instant::now();
    let left: u64 = server.run("PTTL distributed-locks:k").await;
    line[0].enters(&mut diary).await;
    let after = killed.elapsed();
    assert!(after + ms(2) >= ms(left), "{after:?} of {left} ms");
    // They ask when the holder's time is over, not when their long interval is.
    assert!(after < ms(left) + A_LITTLE, "{after:?} of {left} ms");

    line[0].leaves(&mut diary).await;
    are_served(&mut line[1..], &mut diary).await;
    nothing_is_left_but_the_diary(&server).await;
}

async fn killed_waiters_are_passed_over_at_once() {
    let server = RedisServer::start().await;
    let guard = hold(&server).await;
    // The first, one in the middle, and the last.
    let [mut b, mut c, mut d, mut e, mut f] = line(&server, ["b", "c", "d", "e", "f"]).await;
    for waiter in [&mut b, &mut d, &mut f] {
        waiter.replica.kill();
    }
    // Ours and those of c and e.
    eventually("the server knows", LIMIT, async || {
        let inboxes: Vec<String> = server.run("PUBSUB CHANNELS *:inbox:*").await;
        inboxes.len() == 3
    })
    .await;
    assert_eq!(
        queue(&server).await.len(),
        5,
        "their places are still there"
    );

    let mut diary = Reader::of(&server);
    let started = Instant::now();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    are_served([&mut c, &mut e], &mut diary).await;
    // Nobody's time is over by now, and nobody has asked: the releases gave it to them.
    assert!(started.elapsed() < LONG_INTERVAL / 2);
    nothing_is_left_but_the_diary(&server).await;
}

async fn processes_that_were_all_killed_leave_nothing_for_good() {
    let server = RedisServer::start().await;
    let mut holder = Replica::start(&["hold", &server.url(), "1500"]);
    assert_eq!(holder.says().await, "held");
    let mut waiter = Waiter::start(&server, "b", (ms(1500), ms(200)));
    waiter.is_ready().await;
    stand_in_line(&server, [&mut waiter]).await;
    waiter.replica.kill();
    holder.kill();
    assert_eq!(queue(&server).await.len(), 1, "its place is still there");
    // Nobody comes who would clear it away.
    eventually("nothing is left", LIMIT, async || server.keys().await == 0).await;
}

async fn a_process_that_stood_still_knows_that_it_has_lost_its_lock() {
    let server = RedisServer::start().await;
    let lock = factory(&server.url()).await.create_lock("k").unwrap();
    let replica = Replica::start(&["hold", &server.url(), "1000"]);
    assert_eq!(replica.says().await, "held");

    replica.stop();
    let locking = lock.lock(options(LIMIT, ms(10)));
    let guard = within(LIMIT, "our turn", locking).await.unwrap();
    let owner: String = server.run("GET distributed-locks:k").await;
    let () = server.run("CONFIG RESETSTAT").await;
    replica.resume();
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

async fn a_holder_that_stood_still_does_not_disturb_the_queue() {
    let server = RedisServer::start().await;
    let holder = Replica::start(&["hold", &server.url(), "1500"]);
    assert_eq!(holder.says().await, "held");
    let mut line = line(&server, ["b", "c", "d"]).await;
    let mut diary = Reader::of(&server);

    holder.stop();
    let stopped = Instant::now();
    line[0].enters(&mut diary).await;
    assert!(stopped.elapsed() < ms(1500) + A_LITTLE);
    let owner: String = server.run("GET distributed-locks:k").await;
    let waiting = queue(&server).await;
    assert_eq!(waiting.len(), 2);

    holder.resume();
    assert_eq!(holder.says().await, "lost: Expired, held: false");
    assert_eq!(holder.says().await, "Lost");
    // The server has answered what it sent late, and nothing has changed.
    assert_eq!(holder.says().await, "keys left: 0");
    let still: String = server.run("GET distributed-locks:k").await;
    assert_eq!(still, owner);
    assert_eq!(queue(&server).await, waiting);

    line[0].leaves(&mut diary).await;
    are_served(&mut line[1..], &mut diary).await;
    nothing_is_left_but_the_diary(&server).await;
}

async fn a_first_in_the_queue_that_stands_still_delays_the_others_by_its_ttl_and_waits_its_turn() {
    a_stopped_waiter(0).await;
}

async fn a_waiter_that_stands_still_delays_those_behind_it_by_its_ttl_and_waits_its_turn() {
    a_stopped_waiter(1).await;
}

/// Three processes wait, and the one at this place is stopped. Its socket is open, so it is given
/// the lock like the others, and sits on it.
async fn a_stopped_waiter(place: usize) {
    let server = RedisServer::start().await;
    let guard = hold(&server).await;
    let mut diary = Reader::of(&server);
    let mut line: Vec<Waiter> = ["b", "c", "d"]
        .into_iter()
        .enumerate()
        .map(|(number, name)| {
            let times = if number == place {
                // No time but that of the one that is stopped is to run out here.
                (ms(1500), LONG_INTERVAL)
            } else {
                // Nobody tells the others whom the lock was given to, and for how long: they ask.
                (LONG_TTL, ms(200))
            };
            Waiter::start(&server, name, times)
        })
        .collect();
    for waiter in &line {
        waiter.is_ready().await;
    }
    stand_in_line(&server, &mut line).await;
    let entry = queue(&server).await.remove(place);
    let mut behind = line.split_off(place + 1);
    let mut stopped = line.remove(place);
    let ahead = &mut line;

    stopped.replica.stop();
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    are_served(ahead, &mut diary).await;
    // It has the lock now, and does not know.
    let owner: String = server.run("GET distributed-locks:k").await;
    assert!(
        entry.starts_with(owner.trim_end_matches('!')),
        "{entry}: {owner}"
    );
    let given = Instant::now();
    let left: u64 = server.run("PTTL distributed-locks:k").await;
    assert!(left <= 1500, "{left} ms");
    behind[0].enters(&mut diary).await;
    let after = given.elapsed();
    assert!(after + ms(2) >= ms(left), "{after:?} of {left} ms");
    assert!(after < ms(left) + A_LITTLE, "{after:?} of {left} ms");

    let owner: String = server.run("GET distributed-locks:k").await;
    let waiting = queue(&server).await;
    let lines: usize = server.run("LLEN diary").await;
    stopped.replica.resume();
    // What it was given is over. It does not use it, it goes to the end of the queue.
    eventually("it stands in the queue again", LIMIT, async || {
        let now: usize = server.run("LLEN diary").await;
        assert_eq!(now, lines, "it enters while another is in");
        queue(&server).await.len() == waiting.len() + 1
    })
    .await;
    let mut now = queue(&server).await;
    assert!(now.pop().is_some_and(|last| !waiting.contains(&last)));
    assert_eq!(now, waiting);
    let still: String = server.run("GET distributed-locks:k").await;
    assert_eq!(
        still.trim_end_matches('!'),
        owner.trim_end_matches('!'),
        "what it gave back has not touched the lock"
    );

    behind[0].leaves(&mut diary).await;
    are_served(behind[1..].iter_mut().chain([&mut stopped]), &mut diary).await;
    nothing_is_left_but_the_diary(&server).await;
}

async fn processes_are_served_in_the_order_in_which_they_came() {
    let server = RedisServer::start().await;
    let lock = factory(&server.url()).await.create_lock("k").unwrap();
    let names = ["b", "c", "d"];
    let mut line = names.map(|name| Waiter::start(&server, name, (LONG_TTL, LONG_INTERVAL)));
    for waiter in &line {
        waiter.is_ready().await;
    }
    let mut diary = Reader::of(&server);
    // Every order there is, and each process is first, second and last twice.
    for (step, exchange) in [(0, 1), (1, 2), (0, 1), (1, 2), (0, 1), (1, 2)] {
        line.swap(step, exchange);
        let locking = lock.lock(options(LONG_TTL, LONG_INTERVAL));
        let guard = within(LIMIT, "the lock", locking).await.unwrap();
        stand_in_line(&server, &mut line).await;
        assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
        are_served(&mut line, &mut diary).await;
    }
    diary::assert_served_in_order(&diary::read(&server).await);
    nothing_is_left_but_the_diary(&server).await;
}

async fn busy_processes_take_turns_and_get_fair_shares() {
    const STAYS: usize = 600;
    // A process that has more to do gets no more than the others.
    let crowds = [("b", "4"), ("c", "4"), ("d", "8"), ("e", "16")];
    let server = RedisServer::start().await;
    let guard = hold(&server).await;
    let mut replicas = crowds.map(|(name, tasks)| {
        Replica::start(&["contend", &server.url(), name, tasks, &STAYS.to_string()])
    });
    for replica in &replicas {
        assert_eq!(replica.says().await, "ready");
    }
    replicas.iter_mut().for_each(Replica::go);
    // All of them are there before the first can begin.
    queued(&server, crowds.len()).await;
    let mut diary = Diary::open(&server.url(), "k").await;
    diary.enter("a").await;
    diary.leave("a").await;
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    for replica in &replicas {
        assert_eq!(replica.says().await, "done");
    }

    let stays = diary::read(&server).await;
    // Each token is one process's, so the server and the processes agree on who is in.
    let mut owners: HashMap<&str, &str> = HashMap::new();
    for stay in &stays {
        let (process, _) = stay.line[0].split_once(':').unwrap();
        assert_eq!(*owners.entry(process).or_insert(&stay.who), stay.who);
    }
    assert_eq!(owners.len(), 1 + crowds.len());
    diary::assert_served_in_order(&stays);
    diary::assert_one_place_each(&stays);

    // From here on not all of them want it.
    let stays = &stays[1..STAYS];
    // Else few waited, and the test has shown nothing.
    let all_there = stays.iter().filter(|stay| stay.line.len() == crowds.len());
    assert!(all_there.count() >= STAYS / 2);
    // Whoever gives up the lock has others of its process wait behind the other processes already:
    // it sees one lease of each of them. Twice that is for a process that was slow to ask again.
    let longest = diary::longest_wait(stays);
    assert!(longest <= 2 * (crowds.len() - 1), "{longest}");
    // In turn, each gets a lease that ends with the first stay that ends after 5 ms. A stay takes
    // 1 ms and two round trips, so that makes 5 stays at most, and 1 at least. However unlucky a
    // process is, over dozens of leases it gets more than half of what is fair.
    for (name, _) in crowds {
        let share = stays.iter().filter(|stay| stay.who == name).count();
        assert!(share >= stays.len() / crowds.len() / 2, "{name}: {share}");
    }
    nothing_is_left_but_the_diary(&server).await;
}

/// A grant may be lost with the inbox that it was sent to, and who has none is passed over. Nobody
/// asks by itself within the time in which each has to come in: it is the new inbox that makes them
/// ask.
async fn processes_whose_inboxes_are_cut_again_and_again_go_on_at_once() {
    const STAYS: usize = 400;
    let names = ["b", "c", "d"];
    let server = RedisServer::start().await;
    let mut replicas = names
        .map(|name| Replica::start(&["contend", &server.url(), name, "4", &STAYS.to_string()]));
    for replica in &replicas {
        assert_eq!(replica.says().await, "ready");
    }
    replicas.iter_mut().for_each(Replica::go);
    let (mut lines, mut cut) = (0_usize, 0_usize);
    while lines < 2 * STAYS {
        cut += server.run::<usize>("CLIENT KILL TYPE pubsub").await;
        let since = format!("LRANGE diary {lines} -1");
        eventually("each enters", LIMIT, async || {
            let since: Vec<String> = server.run(&since).await;
            let enters = |name| since.iter().any(|line| line.starts_with(name));
            names
                .map(|name| format!("{name} enters"))
                .iter()
                .all(enters)
        })
        .await;
        lines = server.run("LLEN diary").await;
    }
    // Else the test has shown nothing.
    assert!(cut > 3 * names.len(), "{cut}");
    for replica in &replicas {
        let done = within(LIMIT, "all have had their turns", replica.says()).await;
        assert_eq!(done, "done");
    }
    nothing_is_left_but_the_diary(&server).await;
}

async fn a_process_that_stands_still_is_shown_not_to_answer_and_its_lock_can_be_taken() {
    let server = RedisServer::start().await;
    let replica = Replica::start(&["hold", &server.url(), &LONG_TTL.as_millis().to_string()]);
    assert_eq!(replica.says().await, "held");
    let this = factory(&server.url()).await;
    let inspector = this.inspector();
    let look = async || {
        let snapshot = inspector.locks(10).await.unwrap();
        assert_eq!(snapshot.locks.len(), 1);
        snapshot.locks.into_iter().next().unwrap()
    };
    eventually("it answers", LIMIT, async || {
        let info = look().await;
        let label = format!("process {}", replica.id());
        info.holder.label == Some(label) && info.held_for.is_some()
    })
    .await;

    replica.stop();
    let started = Instant::now();
    let info = look().await;
    assert!(started.elapsed() < A_LITTLE, "{:?}", started.elapsed());
    assert!(!info.holder.answered);
    assert_eq!((info.holder.label, info.held_for), (None, None));

    let lock = this.create_lock("k").unwrap();
    let waiting = tokio::spawn(lock.lock(options(LONG_TTL, LONG_INTERVAL)));
    queued(&server, 1).await;
    let key = "k".parse().unwrap();
    let was = inspector
        .force_release(&key, "it stands still")
        .await
        .unwrap();
    assert!(!was.unwrap().lock.holder.answered);
    let guard = within(A_LITTLE, "the lock", waiting)
        .await
        .unwrap()
        .unwrap();
    // It reads what it was told meanwhile.
    replica.resume();
    assert_eq!(replica.says().await, "lost: ForceReleased, held: false");
    assert_eq!(replica.says().await, "Lost");
    assert_eq!(replica.says().await, "keys left: 0");
    assert_eq!(guard.unlock().await.unwrap(), Unlocked::Held);
    assert_eq!(server.keys().await, 0);
}
