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
};

use kit::{LIMIT, RedisServer};

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
    assert!(command.status().unwrap().success(), "{name} builds");
    // target/<profile>/deps/<this test>, and target/<profile>/examples/<example>
    let this = std::env::current_exe().unwrap();
    let profile = this.parent().unwrap().parent().unwrap();
    Command::new(profile.join("examples").join(name))
}

/// The columns of a row of the table that `lost_update` prints: lost updates, and rejected
/// requests.
fn row(output: &Output, name: &str) -> (u32, u32) {
    let text = String::from_utf8_lossy(&output.stdout);
    let row = text.lines().find_map(|line| line.strip_prefix(name));
    let row = row.unwrap_or_else(|| panic!("no row `{name}` in:\n{text}"));
    let mut columns = row
        .split_whitespace()
        .map(|column| column.parse().unwrap_or(u32::MAX));
    (columns.next().unwrap(), columns.next().unwrap())
}

#[tokio::test]
async fn updates_are_lost_without_the_layer_and_none_with_it() {
    let server = RedisServer::start().await;
    let url = server.url();
    for arguments in [vec![], vec!["--redis", &url]] {
        let output = example("lost_update").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(row(&output, "no layer").0 > 0, "{output:?}");
        assert_eq!(row(&output, "with the layer"), (0, 0), "{output:?}");
    }
    assert_eq!(server.keys().await, 0);
    let calls = server.calls("set").await;
    assert!(calls > 0, "the locks were in that server");
}

#[test]
fn lost_update_says_how_it_is_used() {
    let output = example("lost_update").arg("--what").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
}

/// A process that ends with this value, if it has not ended by itself.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn post(address: &str, path: &str) -> String {
    send("POST", address, path)
}

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

#[test]
fn an_order_is_paid_once_and_the_service_ends_cleanly() {
    let mut command = example("axum_orders");
    command
        .env("ADDRESS", "127.0.0.1:0")
        .env_remove("REDIS_URL")
        .stdout(Stdio::piped());
    let mut service = Running(command.spawn().unwrap());
    let mut log = BufReader::new(service.0.stdout.take().unwrap()).lines();
    let address = log
        .find_map(|line| Some(line.unwrap().split_once("http://")?.1.to_owned()))
        .expect("it says where it listens");

    let payments = [0, 1].map(|_| {
        let address = address.clone();
        thread::spawn(move || post(&address, "/orders/42/pay"))
    });
    let mut answers = payments.map(|payment| payment.join().unwrap());
    answers.sort();
    assert!(answers[0].starts_with("HTTP/1.1 200"), "{answers:?}");
    assert!(answers[1].starts_with("HTTP/1.1 409"), "{answers:?}");

    kit::signal("INT", &service.0);
    assert!(service.0.wait().unwrap().success());
    let last = log
        .map(Result::unwrap)
        .last()
        .expect("it says that it ends");
    assert!(
        last.contains("locks given back") && last.contains("left=0"),
        "{last}"
    );
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
