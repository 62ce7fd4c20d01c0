//! The example does what it says: the store refuses what comes too late, and it is the condition on
//! the fencing token that does it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

#[path = "../../../tests/kit/mod.rs"]
mod kit;

use std::process::{Command, Output};

use kit::RedisServer;

fn example(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fenced_sqlite"));
    command.args(arguments).output().unwrap()
}

#[tokio::test]
async fn a_late_write_is_refused_with_the_fence_and_loses_an_update_without_it() {
    let server = RedisServer::start().await;
    let output = example(&["--redis", &server.url()]);
    let text = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| {
            line.split("  ")
                .map(str::trim)
                .filter(|column| !column.is_empty())
                .collect()
        })
        .collect();
    for row in [
        // Both were told that their write was taken, and of one of them nothing is left: of B's
        // where A wrote last, of A's where B did.
        ["without", "after B's write", "taken", "taken", "110", "20"],
        ["without", "before B's write", "taken", "taken", "120", "10"],
        // A was refused, whenever it came.
        ["with", "after B's write", "refused", "taken", "120", "0"],
        ["with", "before B's write", "refused", "taken", "120", "0"],
    ] {
        assert!(
            rows.iter().any(|found| found == &row),
            "{row:?} is not in\n{text}{output:?}"
        );
    }
    assert!(output.status.success(), "{output:?}");
    assert_eq!(server.keys().await, 0, "all locks were given back");
}

#[test]
fn it_says_how_it_is_used() {
    let output = example(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
}
