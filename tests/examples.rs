//! The examples do what they say, as the processes that their users start.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod kit;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Output, Stdio},
    thread,
    time::Instant,
};

use kit::{LIMIT, RedisServer};
use tower_distributed_lock::{LockFactory, storage::RedisStorage};

/// The example, built as the tests were.
fn example(name: &str) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "--example", name]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    // What cargo tells a test of its package looks like a change to build scripts that read it
    // (ring's does), and all that hangs on them would be built anew, here and at the next `cargo test`.
    for (name, _) in std::env::vars_os() {
        let told = ["CARGO_PKG_", "CARGO_MANIFEST_"];
        if told
            .iter()
            .any(|told| name.to_string_lossy().starts_with(told))
        {
            command.env_remove(name);
        }
    }
    assert!(command.status().unwrap().success(), "{name} builds");
    // target/<profile>/deps/<this test>, and target/<profile>/examples/<example>
    let this = std::env::current_exe().unwrap();
    let profile = this.parent().unwrap().parent().unwrap();
    Command::new(profile.join("examples").join(name))
}

/// The figures in a row of a table that an example prints; what is none is `u32::MAX`.
fn row(output: &Output, name: &str) -> Vec<u32> {
    let text = String::from_utf8_lossy(&output.stdout);
    let row = text.lines().find_map(|line| line.strip_prefix(name));
    let row = row.unwrap_or_else(|| panic!("no row `{name}` in:\n{text}"));
    let columns = row.split_whitespace();
    columns
        .map(|column| column.parse().unwrap_or(u32::MAX))
        .collect()
}

#[tokio::test]
async fn updates_are_lost_without_the_layer_and_none_with_it() {
    let server = RedisServer::start().await;
    let url = server.url();
    for arguments in [vec![], vec!["--redis", &url]] {
        let output = example("lost_update").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(row(&output, "no layer")[0] > 0, "{output:?}");
        // Lost, and rejected.
        assert_eq!(row(&output, "with the layer")[..2], [0, 0], "{output:?}");
    }
    assert_eq!(server.keys().await, 0);
    let calls = server.calls("set").await;
    assert!(calls > 0, "the locks were in that server");
}

#[tokio::test]
async fn jobs_of_one_account_never_overlap_and_others_run_in_parallel() {
    let server = RedisServer::start().await;
    let url = server.url();
    for arguments in [vec![], vec!["--redis", &url]] {
        let output = example("job_queue").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let [done, _, overlaps, lost, ..] = row(&output, "no layer")[..] else {
            panic!("{output:?}")
        };
        assert_eq!(done, 80);
        assert!(overlaps > 0 && lost > 0, "{output:?}");
        let [done, _, overlaps, lost, at_once, ..] = row(&output, "with the layer")[..] else {
            panic!("{output:?}")
        };
        assert_eq!((done, overlaps, lost), (80, 0, 0), "{output:?}");
        assert!((2..=5).contains(&at_once), "{output:?}");
    }
    kit::no_key_is_left(&server).await;
    assert!(
        server.calls("set").await > 0,
        "the locks were in that server"
    );
}

#[test]
fn examples_say_how_they_are_used() {
    for name in ["lost_update", "job_queue"] {
        let output = example(name).arg("--what").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
    }
}

/// A process that ends with this value, if it has not ended by itself.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a service on a port of its own, and gives its log, and where it listens.
fn service(
    name: &str,
    redis: Option<&RedisServer>,
) -> (Running, impl Iterator<Item = String> + use<>, String) {
    let mut command = example(name);
    command
        .env("ADDRESS", "127.0.0.1:0")
        .env_remove("REDIS_URL")
        .envs(redis.map(|server| ("REDIS_URL", server.url())))
        .stdout(Stdio::piped());
    let mut service = Running(command.spawn().unwrap());
    let mut log = log(&mut service);
    let address = log
        .find_map(|line| Some(line.split_once("http://")?.1.to_owned()))
        .expect("it says where it listens");
    (service, log, address)
}

fn log(program: &mut Running) -> impl Iterator<Item = String> + use<> {
    let lines = BufReader::new(program.0.stdout.take().unwrap()).lines();
    lines.map(Result::unwrap)
}

/// Reads on to a line that begins so.
fn says(log: &mut impl Iterator<Item = String>, what: &str) {
    let started = Instant::now();
    let mut lines = log.take_while(|_| started.elapsed() < LIMIT);
    let found = lines.any(|line| line.starts_with(what));
    assert!(found, "it does not say `{what}`");
}

fn post(address: &str, path: &str) -> String {
    send("POST", address, path)
}

/// The whole answer, head and body.
fn send(method: &str, address: &str, path: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// It is told to end, and does so with all its locks given back.
fn ends_cleanly(mut service: Running, log: impl Iterator<Item = String>) {
    kit::signal("INT", &service.0);
    assert!(service.0.wait().unwrap().success());
    let last = log.last().expect("it says that it ends");
    assert!(
        last.contains("locks given back") && last.contains("left=0"),
        "{last}"
    );
}

#[test]
fn an_order_is_paid_once_and_the_service_ends_cleanly() {
    let (service, log, address) = service("axum_orders", None);
    let payments = [0, 1].map(|_| {
        let address = address.clone();
        thread::spawn(move || post(&address, "/orders/42/pay"))
    });
    let mut answers = payments.map(|payment| payment.join().unwrap());
    answers.sort();
    assert!(answers[0].starts_with("HTTP/1.1 200"), "{answers:?}");
    assert!(answers[1].starts_with("HTTP/1.1 409"), "{answers:?}");
    ends_cleanly(service, log);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_when_a_service_is_told_to_end_is_answered_at_once() {
    let server = RedisServer::start().await;
    let locks = LockFactory::new(RedisStorage::connect(server.url()).await.unwrap());
    let elsewhere = locks.create_lock("orders/42").unwrap();
    let elsewhere = elsewhere.lock(kit::patient()).await.unwrap();
    for name in ["axum_orders", "metrics"] {
        let (mut service, _log, address) = service(name, Some(&server));
        let waits = thread::spawn(move || post(&address, "/orders/42/pay"));
        kit::is_queued(&server, "orders/42", 1).await;
        kit::signal("INT", &service.0);
        // Not 423, which is what it gets when its time is over.
        let answer = waits.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 503"), "{name}: {answer}");
        assert!(service.0.wait().unwrap().success());
    }
    assert!(elsewhere.is_held());
}

/// A client that reads an answer line by line.
fn open(address: &str, path: &str) -> impl Iterator<Item = String> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    BufReader::new(socket).lines().map_while(Result::ok)
}

#[test]
fn a_document_has_one_writer_for_as_long_as_its_stream_is_open() {
    let (service, log, address) = service("sse", None);
    let write = || open(&address, "/documents/42/write");
    let is_saved = |line: &String| line.starts_with("data: document 42");

    let mut first = write();
    assert_eq!(first.next().unwrap(), "HTTP/1.1 200 OK");
    assert!(first.any(|line| is_saved(&line)), "it writes");
    assert_eq!(write().next().unwrap(), "HTTP/1.1 423 Locked");
    // The client goes, in mid-stream.
    drop(first);
    let mut next = loop {
        let mut next = write();
        if next.next().unwrap() == "HTTP/1.1 200 OK" {
            break next;
        }
    };
    assert_eq!(write().next().unwrap(), "HTTP/1.1 423 Locked");
    assert_eq!(next.by_ref().filter(is_saved).count(), 5, "to the end");
    let mut last = loop {
        let mut last = write();
        if last.next().unwrap() == "HTTP/1.1 200 OK" {
            break last;
        }
    };
    assert!(last.any(|line| is_saved(&line)), "it writes");
    ends_cleanly(service, log);
}

#[test]
fn an_order_is_worked_on_by_one_grpc_call_at_a_time() {
    let mut demo = example("tonic_orders");
    let output = demo.env_remove("REDIS_URL").arg("--demo").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let steps = |who: &str| {
        let steps = ["reserved", "packed", "shipped"];
        steps.map(|step| format!("{who} order 42 is {step}"))
    };
    let denied = "second: Aborted, the resource is locked".to_owned();
    let mut expected = Vec::new();
    for step in steps("first: ") {
        expected.extend([step, denied.clone()]);
    }
    expected.push("first:  the stream has ended".into());
    expected.extend(steps("second:"));
    // It has the lock of the one, and would have worked on the other.
    expected
        .push("third:  InvalidArgument, the message names another order than the metadata".into());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_told_to_end_finishes_what_runs_and_leaves_no_lock() {
    let server = RedisServer::start().await;
    let (mut service, mut log, address) = service("graceful_shutdown", Some(&server));
    let locks = LockFactory::new(RedisStorage::connect(server.url()).await.unwrap());
    let elsewhere = locks.create_lock("reports/9").unwrap();
    let elsewhere = elsewhere.lock(kit::patient()).await.unwrap();

    let request = |path: &'static str| {
        let address = address.clone();
        thread::spawn(move || post(&address, path))
    };
    let hangs = request("/hang");
    says(&mut log, "hang: begun");
    let waits = request("/reports/9");
    kit::is_queued(&server, "reports/9", 1).await;
    let runs = request("/reports/7");
    says(&mut log, "report 7: begun");
    assert_eq!(server.keys().await, 4, "three locks and a queue");

    kit::signal("TERM", &service.0);
    // In this order: who waits can go elsewhere at once, who runs has time, who hangs is cut off.
    let waits = waits.join().unwrap();
    assert!(waits.starts_with("HTTP/1.1 503"), "{waits}");
    kit::eventually("nobody new is let in", LIMIT, async || {
        TcpStream::connect(&address).is_err()
    })
    .await;
    assert!(!runs.is_finished() && !hangs.is_finished());
    let runs = runs.join().unwrap();
    assert!(runs.starts_with("HTTP/1.1 200"), "{runs}");
    assert!(runs.ends_with("report 7 is written\n"), "{runs}");
    assert!(!hangs.is_finished());
    let hangs = hangs.join().unwrap();
    assert!(hangs.starts_with("HTTP/1.1 503"), "{hangs}");

    assert_eq!(service.0.wait().unwrap().code(), Some(0));
    says(&mut log, "ended: 0 locks left behind");
    // Not in a moment, nor when a ttl is over: they are gone when the process is.
    assert_eq!(server.keys().await, 1, "the lock of this test alone");
    assert!(elsewhere.is_held());
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_in_all_directions_lose_no_money_and_leave_no_lock() {
    let server = RedisServer::start().await;
    for redis in [None, Some(&server)] {
        let (_service, _log, address) = service("transfer", redis);
        // Around the circle in both directions, and from an account to itself.
        let mut transfers = Vec::new();
        for from in 1..=5 {
            for to in [from % 5 + 1, (from + 3) % 5 + 1, from] {
                let path = format!("/transfer?from={from}&to={to}&amount={from}");
                let address = address.clone();
                transfers.push(thread::spawn(move || {
                    [0; 4].map(|_| post(&address, &path)).to_vec()
                }));
            }
        }
        for transfer in transfers {
            for answer in transfer.join().unwrap() {
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
        }
        // Each has paid 8 times its own number, and was paid 4 times that of each neighbour.
        let accounts = send("GET", &address, "/accounts");
        let expected = r#"{"1":120,"2":100,"3":100,"4":100,"5":80}"#;
        assert!(accounts.ends_with(expected), "{accounts}");

        let poor = post(&address, "/transfer?from=5&to=1&amount=81");
        assert!(poor.starts_with("HTTP/1.1 409"), "{poor}");
        let unknown = post(&address, "/transfer?from=5&to=6&amount=1");
        assert!(unknown.starts_with("HTTP/1.1 404"), "{unknown}");
        let invalid = post(&address, "/transfer?from=x&to=1&amount=1");
        assert!(invalid.starts_with("HTTP/1.1 400"), "{invalid}");
        assert!(invalid.contains(r#""reason":"invalid_key""#), "{invalid}");
    }
    kit::no_key_is_left(&server).await;
    assert!(
        server.calls("set").await > 0,
        "the locks were in that server"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_over_three_servers_goes_on_without_one_of_them_and_not_without_two() {
    let mut servers = [(); 3].map(|()| None);
    for server in &mut servers {
        *server = Some(RedisServer::start().await);
    }
    let mut command = example("redlock");
    command
        .args(servers.iter().flatten().map(RedisServer::url))
        .stdout(Stdio::piped());
    let mut looping = Running(command.spawn().unwrap());
    let mut log = log(&mut looping);
    says(&mut log, "2 of 3 servers are needed");
    says(&mut log, "in, with the fencing token Some(");
    servers[0] = None;
    // Of the lock that was held meanwhile, and of the next.
    says(&mut log, "out");
    says(&mut log, "out");
    servers[1] = None;
    says(&mut log, "not in: the lock storage");
}
/// The names of metrics in `docs/observability.md`, with their types.
fn documented_metrics() -> Vec<(&'static str, &'static str)> {
    let docs = include_str!("../docs/observability.md");
    let rows = docs.lines().filter_map(|line| {
        let (name, rest) = line
            .strip_prefix("| `distributed_lock_")?
            .split_once("` | ")?;
        Some((name, rest.split_once(" |")?.0))
    });
    rows.collect()
}

#[test]
fn prometheus_finds_every_metric_that_the_docs_list() {
    let mut command = example("metrics");
    command
        .env("ADDRESS", "127.0.0.1:0")
        .env_remove("REDIS_URL")
        .env("NO_COLOR", "1")
        .stdout(Stdio::piped());
    let mut service = Running(command.spawn().unwrap());
    let mut log = BufReader::new(service.0.stdout.take().unwrap()).lines();
    let address = log
        .find_map(|line| Some(line.unwrap().split_once("http://")?.1.to_owned()))
        .expect("it says where it listens");
    for _ in 0..3 {
        let answer = post(&address, "/orders/42/pay");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("server-timing: lock;dur="), "{answer}");
    }

    let scraped = send("GET", &address, "/metrics");
    let metrics = documented_metrics();
    assert!(metrics.len() > 5, "{metrics:?}");
    for (name, kind) in metrics {
        let name = format!("distributed_lock_{name}");
        let kind = format!("# TYPE {name} {kind}\n");
        assert!(scraped.contains(&kind), "no {kind} in {scraped}");
        let help = format!("# HELP {name} ");
        assert!(scraped.contains(&help), "no {help} in {scraped}");
        let series = scraped.lines().any(|line| line.starts_with(&name));
        assert!(series, "no series of {name} in {scraped}");
    }
    for line in [
        "distributed_lock_acquired_total{source=\"storage\"} 3",
        "distributed_lock_lost_total{reason=\"expired\"} 0",
        "distributed_lock_hold_seconds_bucket{le=\"0.025\"} 0",
        "distributed_lock_hold_seconds_count 3",
        "distributed_lock_waiters 0",
        "distributed_lock_held 0",
    ] {
        assert!(
            scraped.lines().any(|it| it == line),
            "no {line} in {scraped}"
        );
    }

    // The handler's own line carries the key, and the span's says how it went.
    kit::signal("INT", &service.0);
    assert!(service.0.wait().unwrap().success());
    let log: Vec<_> = log.map(Result::unwrap).collect();
    let has = |words: &[&str]| {
        log.iter()
            .any(|line| words.iter().all(|word| line.contains(word)))
    };
    assert!(has(&["key=\"orders/42\"", "charging the card"]), "{log:#?}");
    assert!(
        has(&["key=\"orders/42\"", "outcome=\"released\"", "close"]),
        "{log:#?}"
    );
}
