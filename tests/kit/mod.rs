//! What the integration tests stand on: a Redis server of one's own, a way to it that can fail, locks
//! that are taken as tests take them, and waits that end.
//!
//! Every test starts its own server ([`RedisServer`]), so tests neither wait for nor disturb each
//! other. Every wait has a limit far above what a busy machine needs: a limit that is met is a
//! failure, never a matter of speed.

// Each test binary uses its own part of the kit.
#![allow(dead_code, unused_imports, unreachable_pub)]

mod certificates;
mod cluster;
mod command_proxy;
mod fake_server;
mod history;
mod load;
mod locks;
mod proxy;
mod redis_server;
mod sentinel;

use std::{
    future::Future,
    process::Command,
    time::{Duration, Instant},
};

pub use self::{
    certificates::{Authority, Certificate},
    cluster::Cluster,
    command_proxy::{CommandProxy, Onward, Passing, Watch},
    fake_server::FakeServer,
    history::{History, Stay},
    load::Load,
    locks::{
        LONG, asking, is_queued, it_stands_in_the_queue, no_key_is_left, options, patient, queued,
        storage_error, texts, token,
    },
    proxy::Proxy,
    redis_server::{RedisServer, ServerOptions, Tls},
    sentinel::Sentinel,
};

/// How long anything may take that should happen at once.
pub const LIMIT: Duration = Duration::from_secs(20);

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Waits for `future`, but not for ever.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {limit:?}"),
    }
}

/// Looks again and again until `holds` says so. For what sends no event, such as a key that is to
/// disappear.
pub async fn eventually(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(ms(5)).await;
    }
}

/// Sends a signal to a process that this test started and has not waited for: until then its id is
/// not given to another.
pub fn signal(name: &str, child: &std::process::Child) {
    // The shell's own `kill`: it is there where no `kill` program is.
    let status = Command::new("sh")
        .args(["-c", &format!("kill -{name} {}", child.id())])
        .status()
        .expect("sh can be run");
    assert!(status.success(), "SIG{name} was not sent");
}
